"""How often regions were computed, as colours over a picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from vivace.errors import ArgumentError, OutputError, ShapeError
from vivace.models import heat
from vivace.models.heat import ALWAYS, RARELY, heat_map, heat_maps, write_heat


@pytest.fixture
def picture():
    return Image.new("RGB", (64, 32), (255, 255, 255))


def over_white(colour):
    """A colour of the map over a white picture."""
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return np.rint(255 * (1 - heat.STRENGTH) + rgb * heat.STRENGTH)


def test_red_is_always_and_blue_never(picture):
    counts = np.array([[0, 10, 0, 0], [0, 0, 0, 10]])
    made = np.asarray(heat_map(picture, counts, 10)).astype(float)
    assert made.shape == (256, 512, 3)  # small pictures are enlarged, aspect kept
    cells = made.reshape(2, 128, 4, 128, 3)
    assert (cells == cells[:, :1, :, :1]).all()  # a token is one colour
    np.testing.assert_allclose(cells[0, 0, 1, 0], over_white(ALWAYS), atol=1)
    np.testing.assert_allclose(cells[1, 0, 1, 0], over_white(RARELY), atol=1)


def test_a_large_picture_keeps_its_size_and_transparency_lies_on_white():
    clear = Image.new("RGBA", (300, 400), (0, 0, 0, 0))
    made = heat_map(clear, np.ones((4, 3)), 1)
    assert made.size == (300, 400) and made.mode == "RGB"
    np.testing.assert_allclose(np.asarray(made)[0, 0], over_white(ALWAYS), atol=1)


def test_frames_of_a_video_get_their_own_latent_frame(picture):
    counts = np.stack([np.zeros((2, 2)), np.full((2, 2), 4)])
    frames = [np.asarray(frame) for frame in heat_maps([picture] * 5, counts, 4)]
    cold = [bool((frame == frames[0]).all()) for frame in frames]
    assert cold == [True, True, True, False, False]


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2), (0, 4)])
def test_what_is_no_map_is_refused(picture, shape):
    with pytest.raises(ShapeError, match="heat_map"):
        heat_map(picture, np.zeros(shape), 1)


class Result:
    def __init__(self, images, computed):
        self.images, self.computed = images, computed
        self.receipt = type("Receipt", (), {"nfe": 4})


def test_one_file_for_all_pictures(picture, tmp_path):
    results = [Result([picture, picture], torch.ones(2, 2, 4, dtype=torch.int32)), Result([[picture] * 2], None)]
    results[1].computed = torch.zeros(1, 2, 2, 4, dtype=torch.int32)
    write_heat(results, tmp_path / "heat.png")
    with Image.open(tmp_path / "heat.png") as sheet:
        assert sheet.size == (2 * 516, 2 * 260)  # four pictures, two of them frames
    with pytest.raises(OutputError):
        write_heat(results, tmp_path / "no folder" / "heat.png")


@pytest.mark.parametrize(("images", "computed"), [([], torch.ones(0, 2, 2)), ([1], None)])
def test_nothing_to_show_is_said(tmp_path, images, computed):
    with pytest.raises(ArgumentError, match="nothing to show"):
        write_heat([Result(images, computed)], tmp_path / "heat.png")
    assert list(tmp_path.iterdir()) == []
