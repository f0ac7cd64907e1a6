"""Latents to pictures and back; grids; PNG files with their metadata, all or nothing."""

import os

import numpy as np
import pytest
import torch
from PIL import Image

from vivace.errors import ArgumentError, OutputError, ShapeError
from vivace.models.pictures import check_writable, grid, open_image, read_metadata, to_images, to_latent, write_png


@pytest.fixture
def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def test_rounding_is_to_nearest_and_clipped():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.5, 1.0, 7.0, float("nan")]).view(1, 1, 1, 8)
    assert np.asarray(to_images(x)[0]).tolist() == [[0, 0, 0, 128, 191, 255, 255, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
def test_modes_and_sizes(dtype, channels, mode):
    images = to_images(torch.zeros(2, channels, 4, 6, dtype=dtype))
    assert [(image.mode, image.size) for image in images] == [(mode, (6, 4))] * 2
    assert to_images(torch.zeros(0, channels, 4, 6)) == []


def test_arrays_and_tensors_agree():
    x = torch.randn(3, 3, 5, 5).transpose(2, 3)
    assert [image.tobytes() for image in to_images(x)] == [image.tobytes() for image in to_images(x.numpy())]


@pytest.mark.parametrize("shape", [(3, 4, 4), (1, 2, 4, 4), (1, 3, 4, 4, 1)])
def test_what_is_no_picture_is_refused(shape):
    with pytest.raises(ShapeError, match="to_images"):
        to_images(torch.zeros(shape))


def test_bytes_survive_the_way_to_latents_and_back(picture):
    latent = to_latent(picture, (3, 32, 32))
    assert latent.dtype == torch.float32
    assert latent.min() >= -1
    assert latent.max() <= 1
    assert to_images(latent[None])[0].tobytes() == picture.tobytes()


def test_pictures_are_resized_and_laid_on_white(tmp_path):
    clear = Image.new("RGBA", (64, 16), (255, 0, 0, 0))
    assert torch.equal(to_latent(clear, (3, 8, 8)), torch.ones(3, 8, 8))
    clear.save(tmp_path / "a.png")
    assert torch.equal(to_latent(tmp_path / "a.png", (1, 8, 8)), torch.ones(1, 8, 8))
    with pytest.raises(ShapeError, match="8"):
        to_latent(clear, (8, 4, 4))


def test_files_that_are_no_pictures_are_named(tmp_path):
    (tmp_path / "a.png").write_text("no")
    with pytest.raises(ArgumentError, match="a.png: not a picture"):
        open_image(tmp_path / "a.png")
    with pytest.raises(ArgumentError, match="b.png: cannot be read"):
        open_image(tmp_path / "b.png")


@pytest.mark.parametrize(("n", "size"), [(2, (72, 36)), (4, (72, 72)), (5, (108, 72)), (9, (108, 108))])
def test_a_grid_is_near_square(picture, n, size):
    sheet = grid([picture] * n)
    assert sheet.size == size
    assert sheet.crop((2, 2, 34, 34)).tobytes() == picture.tobytes()
    assert sheet.getpixel((0, 0)) == (255, 255, 255)


def test_one_picture_has_no_border(picture):
    assert grid([picture]) is picture


def test_captions_fit_their_cells(picture):
    sheet = grid([picture] * 2, captions=["a very long caption indeed", ""])
    assert sheet.size == (72, 48)
    assert np.asarray(sheet)[34:, :36].min() < 128
    assert np.asarray(sheet)[34:, 36:].min() == 255
    with pytest.raises(ArgumentError, match="captions"):
        grid([picture], captions=[])
    with pytest.raises(ArgumentError, match="no pictures"):
        grid([])


def test_metadata_survives(picture, tmp_path):
    text = {
        "vivace:plan": '{"steps": [1, 2]}' * 200,
        "vivace:seed": "7",
        "vivace:prompt": "\u2764\ufe0f na\u00efve\nline",
    }
    write_png(picture, tmp_path / "a.png", text)
    assert read_metadata(tmp_path / "a.png") == text
    assert open_image(tmp_path / "a.png").tobytes() == picture.tobytes()
    write_png(picture, tmp_path / "b")
    assert read_metadata(tmp_path / "b") == {}
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b"]
    assert (tmp_path / "b").stat().st_mode & 0o444 == 0o444


def test_bad_keywords_and_other_files_are_refused(picture, tmp_path):
    for key in ("", "x" * 80, "\u2764", "a\nb"):
        with pytest.raises(ArgumentError, match="keyword"):
            write_png(picture, tmp_path / "a.png", {key: "x"})
    picture.save(tmp_path / "a.jpg")
    with pytest.raises(ArgumentError, match="JPEG"):
        read_metadata(tmp_path / "a.jpg")


def test_targets_that_cannot_be_written_are_refused_before_work(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "a.png", "does not exist"),
        (tmp_path / "file" / "a.png", "does not exist"),
        (tmp_path / "a.jpg", "name it a.png"),
    ):
        with pytest.raises(OutputError, match=reason):
            check_writable(path)
    check_writable(tmp_path / "a.png")
    assert os.listdir(tmp_path) == ["file"]


def test_a_write_that_fails_leaves_the_old_file(picture, tmp_path, monkeypatch):
    target = tmp_path / "a.png"
    write_png(picture, target, {"vivace:seed": "1"})
    before = target.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    for name in ("PIL.Image.Image.save", "os.replace"):
        with monkeypatch.context() as patch:
            patch.setattr(name, full)
            with pytest.raises(OutputError, match="nothing was changed"):
                write_png(picture, target)
    assert target.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.png"]
