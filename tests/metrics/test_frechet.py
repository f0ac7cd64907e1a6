"""Frechet distance against Gaussians whose distance is known in closed form; features and their file."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from vivace.errors import ArgumentError, ModelError, ShapeError
from vivace.metrics import Features, frechet, frechet_distance, gaussian_of
from vivace.metrics.features import FILE, patches, posed
from vivace.metrics.make_features import make_features, write_features

SIZE, CLASSES = 16, 6


@pytest.fixture(scope="module")
def renders():
    """Bars of six directions and colours, premultiplied."""
    row, column = np.mgrid[:32, :32] - 15.5
    out = np.zeros((CLASSES, 4, 32, 32), dtype=np.uint8)
    for i in range(CLASSES):
        angle = np.pi * i / CLASSES
        bar = np.abs(row * np.cos(angle) + column * np.sin(angle)) < 5
        out[i, 3], out[i, i % 3] = 255 * bar, 255 * bar
    return out


@pytest.fixture(scope="module")
def features(renders):
    return make_features(renders, range(CLASSES), size=SIZE, layout=12, texture=6, draws=150)


@pytest.fixture(scope="module")
def pictures(renders):
    """40 fresh pictures of each class, class-major."""
    from vivace.metrics.renders import augment

    stack = torch.from_numpy(renders).repeat_interleave(40, 0)
    return augment(stack, SIZE, torch.Generator().manual_seed(1)).numpy()


def covariance(d, seed):
    a = np.random.default_rng(seed).standard_normal((d, 2 * d))
    return a @ a.T / (2 * d)


def test_means_apart_and_equal_covariance_is_the_squared_distance():
    c = covariance(5, 0)
    assert frechet_distance(np.zeros(5), c, np.arange(5.0), c) == pytest.approx(30.0, rel=1e-12)


def test_commuting_covariances_differ_by_their_standard_deviations():
    basis = np.linalg.qr(np.random.default_rng(1).standard_normal((4, 4)))[0]
    a, b = np.array([1.0, 4.0, 9.0, 0.01]), np.array([4.0, 4.0, 0.25, 1.0])
    expected = np.square(np.sqrt(a) - np.sqrt(b)).sum()
    value = frechet_distance(np.zeros(4), (basis * a) @ basis.T, np.zeros(4), (basis * b) @ basis.T)
    assert value == pytest.approx(expected, rel=1e-10)


def test_two_by_two_has_a_closed_form():
    """tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) for M = Ca Cb of 2 x 2."""
    a, b = covariance(2, 2), covariance(2, 3)
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a) * np.linalg.det(b)))
    expected = 0.25 + np.trace(a) + np.trace(b) - 2 * root
    assert frechet_distance([0.0, 0.0], a, [0.3, 0.4], b) == pytest.approx(expected, rel=1e-12)


def test_it_is_symmetric_zero_on_equals_and_blind_to_rotation():
    a, b, d = covariance(6, 4), covariance(6, 5), np.linspace(0, 1, 6)
    value = frechet_distance(d, a, 0 * d, b)
    assert frechet_distance(0 * d, b, d, a) == pytest.approx(value, rel=1e-10)
    q = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 6)))[0]
    assert frechet_distance(q @ d, q @ a @ q.T, 0 * d, q @ b @ q.T) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(3 * d, 9 * a, 0 * d, 9 * b) == pytest.approx(9 * value, rel=1e-10)
    assert frechet_distance(d, a, d, a) == pytest.approx(0.0, abs=1e-12)
    singular = np.outer(d, d)
    assert frechet_distance(d, singular, d, singular) == pytest.approx(0.0, abs=1e-6)


def test_gaussian_of_is_the_textbook_estimate():
    x = np.random.default_rng(7).standard_normal((50, 3)) @ np.diag([1, 2, 3]) + [4, 5, 6]
    mean, cov = gaussian_of(x)
    assert mean == pytest.approx(x.mean(axis=0))
    assert cov == pytest.approx(np.cov(x, rowvar=False))


@pytest.mark.parametrize(
    ("arguments", "error", "fragment"),
    [
        (([0.0], [[1.0]], [0.0, 0.0], np.eye(2)), ShapeError, "1 and 2"),
        (([0.0], np.eye(2), [0.0], [[1.0]]), ShapeError, "cov_a"),
        (([0.0], [[1.0]], [float("nan")], [[1.0]]), ArgumentError, "mean_b"),
        (([0.0, 0.0], [[1.0, 0.5], [0.0, 1.0]], [0.0, 0.0], np.eye(2)), ArgumentError, "symmetric"),
        (([0.0, 0.0], np.diag([1.0, -1.0]), [0.0, 0.0], np.eye(2)), ArgumentError, "negative"),
    ],
)
def test_what_is_no_gaussian_is_refused(arguments, error, fragment):
    with pytest.raises(error, match=fragment):
        frechet_distance(*arguments)
    with pytest.raises(ShapeError, match="two rows"):
        gaussian_of(np.zeros((1, 3)))


def test_data_are_near_themselves_and_damage_is_far(features, pictures):
    near = frechet(pictures, features)
    assert near < 2.0
    assert frechet(pictures, features, pictures) == pytest.approx(0.0, abs=1e-6)
    generator = np.random.default_rng(8)
    noisy = pictures + 0.1 * generator.standard_normal(pictures.shape)
    blurred = (pictures + np.roll(pictures, 1, 2) + np.roll(pictures, 1, 3) + np.roll(pictures, (1, 1), (2, 3))) / 4
    one_class = np.repeat(pictures[:40], CLASSES, axis=0)
    for worse in (noisy, blurred, one_class, 0.5 * pictures):
        assert frechet(worse, features) > 4 * near


def test_features_are_standardised_on_the_data(features, pictures):
    values = features.of(pictures)
    assert values.shape == (len(pictures), features.count) == (240, 18)
    assert np.abs(values.mean(axis=0)).max() < 0.4
    assert np.abs(values.std(axis=0) - 1).max() < 0.4
    assert np.diag(features.covariance) == pytest.approx(np.ones(18), rel=1e-2)


def test_layout_and_texture_are_their_formulas(features, pictures):
    """One feature of each kind, written out."""
    x = pictures[3].astype(np.float64)
    layout = sum(b * (v - m) for b, v, m in zip(features.basis[2], x.ravel(), features.mean, strict=True))
    squares = []
    for i in range(0, SIZE - 7, 4):
        for j in range(0, SIZE - 7, 4):
            patch = x[:, i : i + 8, j : j + 8].ravel() - features.patch_mean
            squares.append([(features.patch_basis[k] @ patch) ** 2 for k in range(32, 64)])  # band 1 of 6
    texture = np.sqrt(np.mean(squares))
    values = features.of(pictures[3:4])[0]
    assert values[2] == pytest.approx((layout - features.center[2]) / features.scale[2], rel=1e-9)
    assert values[13] == pytest.approx((texture - features.center[13]) / features.scale[13], rel=1e-9)


def test_larger_pictures_are_averaged_and_tensors_taken(features, pictures):
    large = np.repeat(np.repeat(pictures[:4], 2, axis=2), 2, axis=3)
    assert features.of(large) == pytest.approx(features.of(pictures[:4]))
    assert np.array_equal(features.of(torch.from_numpy(pictures[:4])), features.of(pictures[:4]))
    for shape in ((0, 3, 16, 16), (2, 1, 16, 16), (2, 3, 20, 20), (2, 3, 16, 32), (3, 16, 16)):
        with pytest.raises(ShapeError, match="multiple of 16"):
            features.of(np.zeros(shape))


def test_a_turn_by_a_quarter_and_a_half_size_shift():
    x = np.random.default_rng(9).standard_normal((2, 3, 8, 8))
    assert posed(x, 180.0, 1.0) == pytest.approx(x[:, :, ::-1, ::-1], abs=1e-9)
    quarter = posed(x, 90.0, 1.0)
    assert min(np.abs(quarter - np.rot90(x, k, (2, 3))).max() for k in (1, 3)) < 1e-9
    assert posed(np.ones((1, 1, 8, 8)), 7.0, 1.07) == pytest.approx(np.ones((1, 1, 8, 8)))
    assert patches(x[:, :, :8, :8]).shape == (2, 1, 192)


def test_a_feature_file_reads_back_and_damage_is_refused(features, pictures, tmp_path):
    write_features(features, tmp_path / FILE, {"data": "bars"})
    read = Features.load(tmp_path)
    assert read.size == SIZE
    assert read.of(pictures) == pytest.approx(features.of(pictures), abs=1e-4)
    assert read.prototypes == pytest.approx(features.prototypes, rel=1e-2, abs=1e-2)
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    stored = load_file(tmp_path / FILE)
    for change, fragment in (
        ({"center": np.zeros(5)}, "scale"),
        ({"mean": stored["mean"] * np.nan}, "mean"),
    ):
        save_file(stored | change, tmp_path / FILE)
        with pytest.raises(ModelError, match=fragment):
            Features.load(tmp_path)
    save_file({"mean": stored["mean"]}, tmp_path / FILE)
    with pytest.raises(ModelError, match="lacks basis"):
        Features.load(tmp_path)
    (tmp_path / FILE).write_bytes(b"no")
    with pytest.raises(ModelError, match="damaged"):
        Features.load(tmp_path)
    with pytest.raises(ModelError, match="make_features"):
        Features.load(tmp_path / "none" / FILE)


def test_too_few_draws_are_refused(renders):
    with pytest.raises(ArgumentError, match="draws"):
        make_features(renders, range(CLASSES), size=SIZE, layout=12, texture=6, draws=2)
    with pytest.raises(ArgumentError, match="texture"):
        make_features(renders, range(CLASSES), size=SIZE, layout=12, texture=7, draws=8)


def test_the_bundled_file_is_small_and_its_data_variance_is_known():
    from vivace.models.load import WEIGHTS

    assert (WEIGHTS / "emoji" / FILE).stat().st_size <= 1_000_000
    bundled = Features.load(WEIGHTS / "emoji")
    assert (bundled.size, bundled.count, len(bundled.ids)) == (32, 104, 1000)
    within, total = bundled.variance
    assert 0.4 < within / total < 0.7
    assert np.diag(bundled.covariance) == pytest.approx(np.ones(104), rel=1e-3)
