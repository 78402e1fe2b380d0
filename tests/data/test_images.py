"""Images are read as a person sees them."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as PillowImage

from data.images import (
    ImageError,
    decode_image,
    from_array,
    from_pillow,
    image_header,
    read_image,
)
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
    assert image_header(path)[:2] == UPRIGHT.shape[:2]
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


# Values of 12 bits in files of 16: what is read without a word, and with white at 4095.
TWELVE_BITS = np.array([[0, 16, 1000, 4095]], dtype=np.uint16)
DARK, BRIGHT = [0, 0, 4, 16], [0, 1, 62, 255]


@pytest.mark.parametrize(
    ("suffix", "channels"),
    [(".png", 1), (".png", 3), (".png", 4), (".tif", 1), (".tif", 3), (".tif", 4)]
    + [(".pgm", 1), (".ppm", 3), (".jp2", 1), (".jp2", 3)],
)
def test_white_may_be_less_than_sixteen_bits_in_grey_and_in_colour(tmp_path, suffix, channels):
    values = TWELVE_BITS.repeat(64, 0).repeat(16, 1)
    if channels > 1:
        values = np.stack([values, values[:, ::-1], values // 2, values * 0 + 65535][:channels], 2)
    path = tmp_path / f"a{suffix}"
    order = {1: slice(None), 3: [2, 1, 0], 4: [2, 1, 0, 3]}[channels]
    stored = values if channels == 1 else values[..., order]
    assert cv2.imwrite(str(path), stored, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    plain, bright = read_image(path), read_image(path, white=4095)
    assert plain[0, ::16, 0].tolist() == DARK and bright[0, ::16, 0].tolist() == BRIGHT
    if channels > 1:
        assert bright[0, ::16, 1].tolist() == BRIGHT[::-1]
        assert bright[0, ::16, 2].tolist() == [0, 0, 31, 127]
    assert image_header(path) == (64, 64, 4095)
    assert (from_array(values, 4095) == bright).all() and (from_array(values) == plain).all()
    with PillowImage.open(path) as image:
        assert (from_pillow(image, 4095) == bright).all()


def test_white_does_not_touch_images_of_eight_bits(tmp_path):
    PillowImage.fromarray(UPRIGHT).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png", white=100) == UPRIGHT).all()
    assert image_header(tmp_path / "a.png") == (16, 24, 0)


def test_values_beyond_white_are_white_and_float_grey_runs_up_to_it(tmp_path):
    assert from_array(np.array([[0, 100, 200]], np.uint16), 100)[0, :, 0].tolist() == [0, 255, 255]
    assert from_array(np.array([[0.0, 0.5, 1]]), 2)[0, :, 0].tolist() == [0, 64, 128]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_of_sixteen_bits_are_turned_as_others_are(tmp_path, orientation, suffix):
    """The deep file gets the tag of a shallow one; its values are multiples of 257."""
    stored = np.ascontiguousarray(STORED[orientation](UPRIGHT))
    ok, deep = cv2.imencode(suffix, stored[..., ::-1].astype(np.uint16) * 257)
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    if suffix == ".png":
        body = exif.tobytes()[6:]
        chunk = b"eXIf" + body
        chunk = len(body).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        data = deep.tobytes()[:33] + chunk + deep.tobytes()[33:]
    else:
        data = with_orientation_tag(deep.tobytes(), orientation)
    (tmp_path / f"a{suffix}").write_bytes(data)
    assert (read_image(tmp_path / f"a{suffix}") == UPRIGHT).all()
    assert image_header(tmp_path / f"a{suffix}") == (16, 24, 65535 // 255 * 250 + 1285)


def with_orientation_tag(tiff: bytes, orientation: int) -> bytes:
    """A little-endian TIFF whose directory, moved to the end, has one entry more."""
    place = int.from_bytes(tiff[4:8], "little")
    count = int.from_bytes(tiff[place : place + 2], "little")
    rows = [tiff[place + 2 + 12 * k : place + 14 + 12 * k] for k in range(count)]
    rows = [row for row in rows if row[:2] != (0x0112).to_bytes(2, "little")]
    rows.append(struct.pack("<HHIHH", 0x0112, 3, 1, orientation, 0))
    body = struct.pack("<H", len(rows)) + b"".join(sorted(rows, key=lambda r: r[:2][::-1]))
    return tiff[:4] + struct.pack("<I", len(tiff)) + tiff[8:] + body + b"\0\0\0\0"


# An array, the picture that a file of these values gives.
ARRAYS = [
    (np.full((2, 3), 7, np.uint8), [7, 7, 7]),
    (np.full((2, 3, 1), 7, np.uint8), [7, 7, 7]),
    (np.full((3, 2, 5), 7, np.uint8), [7, 7, 7]),
    (np.tile(np.array([200, 0, 0, 128], np.uint8), (2, 3, 1)), [227, 127, 127]),
    (np.tile(np.array([0, 0], np.uint8), (2, 3, 1)), [255, 255, 255]),
    (np.tile(np.array([257, 514, 65535], np.uint16), (2, 3, 1)), [1, 2, 255]),
    (np.tile(np.array([0, 0, 0, 0], np.uint16), (2, 3, 1)), [255, 255, 255]),
    (np.full((2, 3), True), [255, 255, 255]),
    (np.full((2, 3), 32896, np.int32), [128, 128, 128]),
]


@pytest.mark.parametrize(("array", "colour"), ARRAYS, ids=lambda v: getattr(v, "dtype", None))
def test_arrays_are_read_as_their_files_would_be(array, colour):
    assert np.abs(from_array(array)[0, 0].astype(int) - colour).max() <= 1
    assert from_array(array).dtype == np.uint8 and from_array(array).shape[2] == 3


@pytest.mark.parametrize(
    "array",
    [np.zeros((2, 3, 3)), np.zeros((2, 3, 3), np.int64), np.zeros((0, 3, 3), np.uint8)]
    + [np.zeros((7, 3, 5), np.uint8), np.zeros(4, np.uint8), np.array([[np.nan]])],
)
def test_arrays_that_are_no_pictures_are_refused(array):
    with pytest.raises(ValueError, match="got|no numbers"):
        from_array(array)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_a_pillow_image_is_read_as_its_file(tmp_path, suffix):
    save_with_orientation(tmp_path / f"a{suffix}", 6)
    with PillowImage.open(tmp_path / f"a{suffix}") as image:
        difference = from_pillow(image).astype(int) - read_image(tmp_path / f"a{suffix}")
    # Two decoders of JPEG differ by a level or two.
    assert difference.shape == UPRIGHT.shape and np.abs(difference).max() <= 2


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
        image_header(path)


@pytest.mark.parametrize("data", [b"", b"no image at all", b"\xff\xd8\xff\xe0 broken"])
def test_bytes_that_are_no_image_are_named(tmp_path, data):
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    for read in (read_image, image_header):
        with pytest.raises(ImageError, match="bad.jpg"):
            read(path)


def test_bytes_after_the_end_of_a_jpeg_do_no_harm(tmp_path):
    PillowImage.fromarray(UPRIGHT).save(tmp_path / "a.jpg", quality=98)
    path = tmp_path / "a.jpg"
    path.write_bytes(path.read_bytes() + b"maker's note " * 20)
    assert read_image(path).shape == UPRIGHT.shape
    assert image_header(path)[:2] == UPRIGHT.shape[:2]


def test_a_missing_file_is_no_decode_error(tmp_path):
    for read in (read_image, image_header):
        with pytest.raises(DatasetError) as caught:
            read(tmp_path / "none.jpg")
        assert not isinstance(caught.value, ImageError)


def test_the_result_belongs_to_the_caller():
    buffer = io.BytesIO()
    PillowImage.fromarray(UPRIGHT).save(buffer, "PNG")
    image = decode_image(buffer.getvalue(), "memory")
    image[0, 0] = 3
    assert image.flags["C_CONTIGUOUS"] and image.dtype == np.uint8
