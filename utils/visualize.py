"""Pictures with boxes. Images are RGB, (H, W, 3), uint8; boxes are xyxy in their pixels."""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from utils.structures import Detections, Targets

if TYPE_CHECKING:
    from PIL import ImageDraw
    from PIL.ImageFont import FreeTypeFont

Image = NDArray[np.uint8]
Colour = tuple[int, int, int]
Values = Tensor | ArrayLike
Floats = NDArray[np.float64]

# Apart from each other and from photographs, for most colour-blind readers too (Okabe and Ito).
FIRST_COLOURS = "e63946 0079bf 009e60 ff9f1c 9444c4 00bed6 d628a0 a0c81e 8c5632 fade28".split()
GRID_SIDE = 1920  # pixels, the longer side of a grid of images
DEJAVU = Path("fonts", "ttf", "DejaVuSans.ttf")
WIDE_FONTS = (
    "Noto Sans CJK JP,Noto Sans CJK SC,WenQuanYi Zen Hei,Microsoft YaHei,SimHei,PingFang SC,"
    "Hiragino Sans,Malgun Gothic,Arial Unicode MS,Unifont"
).split(",")


def class_colour(index: int) -> Colour:
    """The colour of a class, the same in every picture; golden-ratio hues after the first ten."""
    if index < len(FIRST_COLOURS):
        red, green, blue = bytes.fromhex(FIRST_COLOURS[index])
        return red, green, blue
    hue = (index * 0.61803398875) % 1
    shares = colorsys.hsv_to_rgb(hue, (0.85, 0.6)[index % 2], (0.85, 1.0)[index // 2 % 2])
    return round(shares[0] * 255), round(shares[1] * 255), round(shares[2] * 255)


def draw_boxes(
    image: Image,
    boxes: Values,
    labels: Values,
    names: Sequence[str],
    scores: Values | None = None,
    *,
    line_thickness: int | None = None,
    hide_labels: bool = False,
    hide_conf: bool = False,
    colours: Sequence[Colour] = (),
    tracks: Sequence[int] = (),
) -> Image:
    """Draw boxes with their class names on a copy of `image`; the best score ends on top.

    Args:
        image: RGB, (H, W, 3), uint8.
        boxes: xyxy, (K, 4), array or tensor.
        labels: class indices, (K,).
        names: class names; a missing one is shown as its number.
        scores: shown behind the name, (K,), or None.
        line_thickness: pixels, None for one that fits the image.
        hide_labels: boxes only.
        hide_conf: names without scores.
        colours: one a box, instead of those of the classes.
        tracks: numbers shown before the names, one a box, which choose the colours.

    Returns:
        A new image of the same size.
    """
    from PIL import Image as Pillow
    from PIL import ImageDraw

    height, width = image.shape[:2]
    line = line_thickness or max(1, round((height + width) / 2 * 0.0035))
    font_size = max(10, round((height + width) / 2 * 0.022))
    canvas = Pillow.fromarray(np.ascontiguousarray(image)).convert("RGB")
    draw = ImageDraw.Draw(canvas)
    boxes, labels = _array(boxes).reshape(-1, 4), _array(labels).astype(int)
    values = None if scores is None else _array(scores)
    order = range(len(boxes)) if values is None else np.argsort(values, kind="stable")
    texts = []
    for k in order:
        colour = colours[k] if colours else class_colour(int(tracks[k] if tracks else labels[k]))
        x1, y1, x2, y2 = _inside(boxes[k], width, height)
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=line)
        if not hide_labels:
            score = None if values is None or hide_conf else float(values[k])
            number = f"{tracks[k]} " if tracks else ""
            texts.append((number + _caption(int(labels[k]), names, score), colour, (x1, y1)))
    for text, colour, corner in texts:
        _draw_caption(draw, text, colour, corner, (width, height), font_size, line)
    return np.asarray(canvas).copy()


def plot_batch(
    images: Tensor | Sequence[Image],
    objects: Targets | Sequence[Detections],
    names: Sequence[str],
    path: str | Path,
    *,
    titles: Sequence[str] = (),
    max_images: int = 16,
    conf: float = 0.25,
) -> Path:
    """Write the first images of a batch as one grid, with their targets or detections.

    Args:
        images: RGB uint8, a tensor (B, 3, H, W) or arrays (H, W, 3) of one size.
        objects: boxes in pixels of `images`: the batch's targets, or detections of each image.
        names: class names.
        path: the file, .jpg or .png.
        titles: text in the corner of each image, such as its file name.
        max_images: how many images to show.
        conf: detections under this score are left out.

    Returns:
        `path`.
    """
    arrays = _arrays(images)[:max_images]
    columns = math.ceil(math.sqrt(len(arrays)))
    height, width = arrays[0].shape[:2]
    scale = min(GRID_SIDE / (columns * max(height, width)), max(1.0, 480 / max(height, width)))
    tile_h, tile_w = round(height * scale), round(width * scale)
    rows = math.ceil(len(arrays) / columns)
    grid = np.full((rows * tile_h, columns * tile_w, 3), 255, dtype=np.uint8)
    for i, array in enumerate(arrays):
        tile = _resize(array, tile_w, tile_h)
        labels, boxes, scores = _objects_of(objects, i, conf)
        tile = draw_boxes(tile, boxes * scale, labels, names, scores)
        if i < len(titles):
            tile = _with_title(tile, Path(titles[i]).name)
        top, left = i // columns * tile_h, i % columns * tile_w
        grid[top : top + tile_h, left : left + tile_w] = tile
    grid[tile_h - 1 : -1 : tile_h] = 255
    grid[:, tile_w - 1 : -1 : tile_w] = 255
    return save_image(path, grid)


def save_image(path: str | Path, image: Image, quality: int = 92) -> Path:
    """Write an RGB image; any path that the system takes, the folder is made where missing."""
    from PIL import Image as Pillow

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = Pillow.fromarray(np.ascontiguousarray(image))
    if path.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        canvas.save(path, quality=quality)
    else:
        canvas.save(path)
    return path


@functools.lru_cache(maxsize=64)
def _font(size: int, text_is_wide: bool) -> FreeTypeFont:
    """matplotlib's DejaVu Sans, or a font of the system with East Asian characters.

    Nothing is downloaded; without such a system font these characters are drawn as boxes.
    """
    from PIL import ImageFont

    package = find_spec("matplotlib")  # imported only where its font is not in its wheel's place
    data = Path(package.origin if package and package.origin else "").parent / "mpl-data"
    if not (data / DEJAVU).is_file():
        import matplotlib

        data = Path(matplotlib.get_data_path())
    found = str(data / DEJAVU)
    if text_is_wide:
        from matplotlib import font_manager

        files = {entry.name: entry.fname for entry in font_manager.fontManager.ttflist}
        found = next((files[name] for name in WIDE_FONTS if name in files), found)
    return ImageFont.truetype(found, size)


def _caption(label: int, names: Sequence[str], score: float | None) -> str:
    name = str(names[label]) if 0 <= label < len(names) else str(label)
    return name if score is None else f"{name} {score:.2f}"


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    text: str,
    colour: Colour,
    corner: tuple[float, float],
    size: tuple[int, int],
    font_size: int,
    line: int,
) -> None:
    """A filled label above the box, inside it where there is no room; never outside the image."""
    font = _font(font_size, _is_wide(text))
    pad = max(1, font_size // 6)
    text_width = draw.textlength(text, font=font) + 2 * pad
    text_height = font_size + 2 * pad
    x, y = corner
    left = max(0.0, min(x, size[0] - text_width))
    top = y - text_height + line if y - text_height + line >= 0 else max(0.0, y)
    top = min(top, max(0.0, size[1] - text_height))
    draw.rectangle((left, top, left + text_width - 1, top + text_height - 1), fill=colour)
    ink = (0, 0, 0) if _luminance(colour) > 0.5 else (255, 255, 255)
    draw.text((left + pad, top + text_height / 2), text, fill=ink, font=font, anchor="lm")


def _with_title(tile: Image, text: str) -> Image:
    from PIL import Image as Pillow
    from PIL import ImageDraw

    canvas = Pillow.fromarray(tile)
    draw = ImageDraw.Draw(canvas)
    size = max(10, round(max(tile.shape[:2]) * 0.026))
    font = _font(size, _is_wide(text))
    while len(text) > 8 and draw.textlength(text, font=font) > tile.shape[1] - 8:
        text = text[: len(text) // 2 - 2] + "…" + text[len(text) // 2 + 2 :]
    bottom = tile.shape[0] - 4
    draw.text(
        (4, bottom), text, fill="white", font=font, anchor="lb", stroke_width=2, stroke_fill="black"
    )
    return np.asarray(canvas).copy()


def _objects_of(
    objects: Targets | Sequence[Detections], index: int, conf: float
) -> tuple[Floats, Floats, Floats | None]:
    """Labels, boxes and scores (None for targets) of one image, as arrays."""
    if isinstance(objects, Targets):
        labels, boxes = objects.of_image(index)
        return _array(labels), _array(boxes), None
    found = objects[index]
    keep = _array(found.scores) >= conf
    return _array(found.labels)[keep], _array(found.boxes)[keep], _array(found.scores)[keep]


def _arrays(images: Tensor | Sequence[Image]) -> list[Image]:
    if isinstance(images, Tensor):
        return list(images.detach().cpu().permute(0, 2, 3, 1).numpy())
    return list(images)


def _array(values: Values) -> Floats:
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values)


def _resize(image: Image, width: int, height: int) -> Image:
    from PIL import Image as Pillow

    if image.shape[:2] == (height, width):
        return image
    kind = Pillow.Resampling.BILINEAR
    return np.asarray(Pillow.fromarray(np.ascontiguousarray(image)).resize((width, height), kind))


def _inside(box: Floats, width: int, height: int) -> tuple[float, float, float, float]:
    """Corners in order and inside the image, as drawing needs them."""
    corners = np.sort(box.reshape(2, 2).astype(np.float64), axis=0)
    left, top, right, bottom = np.clip(corners, 0, (width - 1, height - 1)).reshape(-1).tolist()
    return left, top, right, bottom


def _is_wide(text: str) -> bool:
    """Whether the text has characters (East Asian and beyond) that DejaVu Sans lacks."""
    return any(ord(character) >= 0x2E80 for character in text)


def _luminance(colour: Colour) -> float:
    red, green, blue = (value / 255 for value in colour)
    return 0.299 * red + 0.587 * green + 0.114 * blue
