"""The name check on pictures whose class is known, and on pictures it must not accept."""

import numpy as np
import pytest
import torch

from vivace.errors import ArgumentError, ModelError, ShapeError
from vivace.metrics import check_names, names
from vivace.metrics.features import posed
from vivace.metrics.make_features import main, make_features
from vivace.metrics.renders import augment, find_font, glyphs, most_distinct, render

CLASSES = 8


@pytest.fixture(scope="module")
def renders():
    """Eight blobs of fixed random shape and colour, premultiplied."""
    g = np.random.default_rng(0)
    coarse = g.uniform(0, 255, (CLASSES, 4, 4, 4))
    coarse[:, 3] = 255 * (coarse[:, 3] > 90)
    coarse[:, :3] *= coarse[:, 3:] / 255
    return np.repeat(np.repeat(coarse, 8, axis=2), 8, axis=3).astype(np.uint8)


@pytest.fixture(scope="module")
def features(renders):
    ids = 10 * np.arange(CLASSES)
    return make_features(renders, ids, size=16, layout=24, texture=6, draws=32)


@pytest.fixture(scope="module")
def pictures(renders):
    stack = torch.from_numpy(renders).repeat_interleave(10, 0)
    return augment(stack, 16, torch.Generator().manual_seed(3)).numpy()


LABELS = np.repeat(10 * np.arange(CLASSES), 10)


def test_real_pictures_look_like_their_class(features, pictures):
    found = check_names(pictures, LABELS, features)
    assert found.top1 > 0.95
    assert found.top5 >= found.top1
    assert np.array_equal(found.nearest[found.rank == 0], LABELS[found.rank == 0])


def test_other_labels_and_noise_do_not_pass(features, pictures):
    assert check_names(pictures, np.roll(LABELS, 10), features).top1 < 0.1
    noise = np.random.default_rng(1).standard_normal(pictures.shape)
    assert check_names(noise, LABELS, features).top1 < 0.4


def test_the_nearest_prototype_is_found_by_plain_distances(features, pictures, monkeypatch):
    """Without poses: Mahalanobis distance to class means, one picture at a time."""
    monkeypatch.setattr(names, "POSES", ((0.0, 1.0),))
    found = check_names(pictures, LABELS, features)
    for i in range(0, len(pictures), 7):
        z = features.whiten.T @ (features.basis @ (pictures[i].ravel() - features.mean))
        distance = np.linalg.norm(features.prototypes - z, axis=1)
        assert found.nearest[i] == 10 * distance.argmin()
        assert found.rank[i] == (distance < distance[LABELS[i] // 10]).sum()


def test_poses_make_turned_pictures_recognisable(features, pictures, monkeypatch):
    turned = posed(pictures.astype(np.float64), 12.0, 1.1)
    held = check_names(turned, LABELS, features)
    monkeypatch.setattr(names, "POSES", ((0.0, 1.0),))
    plain = check_names(turned, LABELS, features)
    assert held.top1 >= plain.top1
    assert held.top1 > 0.8


def test_bad_labels_are_refused(features, pictures):
    with pytest.raises(ShapeError, match="one class id each"):
        check_names(pictures, LABELS[:3], features)
    with pytest.raises(ArgumentError, match="class 5 has no prototype"):
        check_names(pictures[:1], [5], features)


def test_augmentation_is_repeatable_bounded_and_varied(renders):
    stack = torch.from_numpy(renders)
    a, b = (augment(stack, 16, torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(a, b)
    assert a.shape == (CLASSES, 3, 16, 16)
    assert a.abs().max() <= 1
    assert not torch.equal(a, augment(stack, 16, torch.Generator().manual_seed(5)))
    clear = augment(torch.zeros(4, 4, 32, 32, dtype=torch.uint8), 16, torch.Generator().manual_seed(6))
    slope = clear[:, :, 1:] - clear[:, :, :-1]  # nothing but a linear gradient
    assert (slope - slope[:, :, :1, :1]).abs().max() < 1e-5
    with pytest.raises(ShapeError, match="multiple"):
        augment(stack, 15, torch.Generator())


def test_thinning_drops_the_twin(renders):
    twins = np.concatenate([renders, renders[2:3]])
    twins[-1, :, :2] = 0
    kept = most_distinct(twins, CLASSES)
    assert len(kept) == CLASSES
    assert len({2, CLASSES} & set(kept)) == 1
    assert most_distinct(twins, CLASSES + 1) == list(range(CLASSES + 1))
    with pytest.raises(ArgumentError, match="need 1 to 9"):
        most_distinct(twins, 10)


def test_without_the_font_the_error_says_how_to_get_it(tmp_path):
    with pytest.raises(ModelError, match="apt-get install fonts-noto-color-emoji"):
        find_font(tmp_path / "no.ttf")
    other = tmp_path / "other.ttf"
    other.write_bytes(b"no font")
    for use in (lambda: glyphs(other), lambda: render([0x1F600], 32, other)):
        with pytest.raises(ModelError, match="cannot be opened at 109 pixels"):
            use()


def test_the_command_that_makes_features_explains_itself(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "names.json: need a list" in capsys.readouterr().err
    (tmp_path / "names.json").write_text('[{"id": 0, "name": "a", "codepoint": "U+1F600"}]')
    assert main([str(tmp_path), "--font", str(tmp_path / "no.ttf")]) == 2
    assert "apt-get install" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]
