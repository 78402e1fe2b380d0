"""Images are read as a person sees them."""

from __future__ import annotations

import io
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PillowImage

from data.images import ImageError, decode_image, image_size, read_image
from utils.errors import DatasetError

# Red left, blue right; the upper left corner is white.
UPRIGHT = np.zeros((16, 24, 3), dtype=np.uint8)
UPRIGHT[:, :12] = (250, 10, 10)
UPRIGHT[:, 12:] = (10, 10, 250)
UPRIGHT[:6, :6] = 255

# How the upright picture lies in the file for each EXIF orientation.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, 1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


def save_with_orientation(path: Path, orientation: int) -> None:
    stored = np.ascontiguousarray(STORED[orientation](UPRIGHT))
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    options = {"quality": 98, "subsampling": 0} if path.suffix == ".jpg" else {}
    PillowImage.fromarray(stored).save(path, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_is_applied_in_every_format(tmp_path, orientation, suffix):
    path = tmp_path / f"a{suffix}"
    save_with_orientation(path, orientation)
    image = read_image(path)
    assert image.shape == UPRIGHT.shape
    assert image_size(path) == UPRIGHT.shape[:2]
    difference = np.abs(image.astype(int) - UPRIGHT)
    assert np.median(difference) < 12, "the picture lies another way"
    assert difference[:4, :4].mean() < 25 and difference[-4:].mean() < 25


def test_grey_jpeg_has_three_equal_channels(tmp_path):
    grey = np.tile(np.arange(0, 240, 10, dtype=np.uint8), (16, 1))
    PillowImage.fromarray(grey).save(tmp_path / "a.jpg", quality=98)
    image = read_image(tmp_path / "a.jpg")
    assert image.shape == (16, 24, 3)
    assert (image[..., 0] == image[..., 2]).all()
    assert np.abs(image[..., 0].astype(int) - grey).max() <= 3


def test_sixteen_bit_grey_is_scaled_by_its_full_range(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    assert cv2.imwrite(str(tmp_path / "a.png"), values)
    assert cv2.imwrite(str(tmp_path / "a.tif"), values)
    for name in ("a.png", "a.tif"):
        assert read_image(tmp_path / name)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_float_grey_is_stretched_from_smallest_to_largest(tmp_path):
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    PillowImage.fromarray(values).save(tmp_path / "a.tif")
    assert read_image(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 128, 255]


def test_transparent_pixels_are_laid_on_white(tmp_path):
    rgba = np.array([[[200, 0, 0, 255], [200, 0, 0, 0], [200, 0, 0, 128]]], dtype=np.uint8)
    PillowImage.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    opaque, clear, half = read_image(tmp_path / "a.png")[0].tolist()
    assert opaque == [200, 0, 0]
    assert clear == [255, 255, 255]
    assert half[0] == pytest.approx(227, abs=1) and half[1] == pytest.approx(127, abs=1)


def test_palette_images_give_their_colours(tmp_path):
    image = PillowImage.new("P", (2, 1))
    image.putpalette([0, 255, 0, 255, 0, 0])
    image.putpixel((1, 0), 1)
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[0, 255, 0], [255, 0, 0]]
    image.save(tmp_path / "b.png", transparency=1)
    assert read_image(tmp_path / "b.png")[0].tolist() == [[0, 255, 0], [255, 255, 255]]


def test_one_bit_images_are_black_and_white(tmp_path):
    PillowImage.fromarray(np.array([[True, False]])).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png")[0].tolist() == [[255] * 3, [0] * 3]


def test_cmyk_jpeg_has_the_colours_of_its_rgb_form(tmp_path):
    PillowImage.fromarray(UPRIGHT).convert("CMYK").save(tmp_path / "a.jpg", quality=98)
    image = read_image(tmp_path / "a.jpg")
    assert np.median(np.abs(image.astype(int) - UPRIGHT)) < 8


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [PillowImage.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0, 0].tolist() == [255, 0, 0]


def test_colours_are_rgb_not_bgr(tmp_path):
    PillowImage.fromarray(UPRIGHT).save(tmp_path / "a.jpg", quality=98)
    assert read_image(tmp_path / "a.jpg")[10, 1, 0] > 200


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp"])
def test_a_file_that_was_cut_off_is_no_whole_image(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), pixels)
    data = (tmp_path / f"a.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(ImageError, match=f"cut.{suffix}"):
        read_image(path)
    with pytest.raises(ImageError, match=f"cut.{suffix}"):
        image_size(path)


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff\xe0 broken"])
def test_bytes_that_are_no_image_are_named(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    for read in (read_image, image_size):
        with pytest.raises(ImageError, match="bad.jpg"):
            read(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path):
    PillowImage.fromarray(UPRIGHT).save(tmp_path / "a.jpg", quality=98)
    path = tmp_path / "a.jpg"
    path.write_bytes(path.read_bytes() + b"maker's note " * 20)
    assert read_image(path).shape == UPRIGHT.shape
    assert image_size(path) == UPRIGHT.shape[:2]


def test_a_missing_file_is_no_decode_error(tmp_path):
    for read in (read_image, image_size):
        with pytest.raises(DatasetError) as caught:
            read(tmp_path / "none.jpg")
        assert not isinstance(caught.value, ImageError)


def test_the_result_belongs_to_the_caller():
    buffer = io.BytesIO()
    PillowImage.fromarray(UPRIGHT).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), "memory")
    image[0, 0] = 3
    assert image.flags["C_CONTIGUOUS"] and image.dtype == np.uint8
