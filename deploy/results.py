"""What a detector found in a list of images, in every form that programs around YOLOv5 expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.images import Image
from utils.config import increment_path
from utils.detection_files import cut_boxes, fitting_stem, save_crops
from utils.files import FreeNames
from utils.logger import get_logger
from utils.visualize import draw_boxes, save_image

if TYPE_CHECKING:
    import supervision
    from pandas import DataFrame

CORNERS = ("xmin", "ymin", "xmax", "ymax")
CENTRES = ("xcenter", "ycenter", "width", "height")


class Frames(NamedTuple):
    """One pandas DataFrame for each image, in each of the four formats."""

    xyxy: list[DataFrame]
    xyxyn: list[DataFrame]
    xywh: list[DataFrame]
    xywhn: list[DataFrame]


class Results:
    """Detections of a list of images; a row is x1, y1, x2, y2, confidence, class in their pixels.

    Attributes:
        ims: the images, RGB (H, W, 3) uint8.
        pred: detections, one tensor (n, 6) for each image, best first.
        names: class name by index.
        files: file name of each image.
        xyxy, xywh: the same rows as corners, or as centre and size, in pixels.
        xyxyn, xywhn: the same, divided by the width and height of the image.
    """

    def __init__(
        self,
        ims: Sequence[Image],
        pred: Sequence[Tensor],
        names: Mapping[int, str],
        files: Sequence[str],
    ) -> None:
        self.ims = list(ims)
        self.pred = list(pred)
        self.names = dict(names)
        self.files = list(files)
        self.xyxy = self.pred
        self.xywh = [_centres(rows) for rows in self.pred]
        self.xyxyn = [_divided(rows, im) for rows, im in zip(self.xyxy, self.ims, strict=True)]
        self.xywhn = [_divided(rows, im) for rows, im in zip(self.xywh, self.ims, strict=True)]

    def __len__(self) -> int:
        """How many images."""
        return len(self.ims)

    def __getitem__(self, index: int) -> Results:
        """The results of one image."""
        index = range(len(self))[index]
        return Results([self.ims[index]], [self.pred[index]], self.names, [self.files[index]])

    def __iter__(self) -> Iterator[Results]:
        """One image after another."""
        return (self[index] for index in range(len(self)))

    def __str__(self) -> str:
        """One line for each image: its size and how many of each class."""
        return "\n".join(self._line(number) for number in range(len(self)))

    def tolist(self) -> list[Results]:
        """The results of each image on its own."""
        return list(self)

    def print(self) -> None:
        """Log what was found."""
        for line in str(self).splitlines():
            get_logger().info(line)

    def _line(self, number: int) -> str:
        height, width = self.ims[number].shape[:2]
        classes, counts = self.pred[number][:, 5].int().unique(return_counts=True)
        found = [f"{n} {self._name(int(c))}" for c, n in zip(classes, counts.tolist(), strict=True)]
        return f"image {number + 1}/{len(self)}: {height}x{width} {', '.join(found) or 'nothing'}"

    def _name(self, label: int) -> str:
        return self.names.get(label, str(label))

    def pandas(self) -> Frames:
        """The rows as DataFrames with columns for the box, `confidence`, `class` and `name`."""
        return Frames(
            self._frames(self.xyxy, CORNERS),
            self._frames(self.xyxyn, CORNERS),
            self._frames(self.xywh, CENTRES),
            self._frames(self.xywhn, CENTRES),
        )

    def _frames(self, tables: Sequence[Tensor], columns: Sequence[str]) -> list[DataFrame]:
        import pandas as pd

        frames = []
        for table in tables:
            frame = pd.DataFrame(table.cpu().numpy(), columns=[*columns, "confidence", "class"])
            frame["class"] = frame["class"].astype("int64")
            frame["name"] = [self._name(label) for label in frame["class"]]
            frames.append(frame)
        return frames

    def to_supervision(self, index: int = 0) -> supervision.Detections:
        """The detections of one image as `supervision.Detections`, class names under `class_name`.

        Raises:
            ImportError: the supervision package is not installed.
        """
        import numpy as np
        import supervision

        rows = self.pred[index].cpu().numpy()
        labels = rows[:, 5].astype(int)
        return supervision.Detections(
            xyxy=rows[:, :4],
            confidence=rows[:, 4],
            class_id=labels,
            data={"class_name": np.array([self._name(label) for label in labels], dtype=str)},
        )

    def render(self, labels: bool = True) -> list[Image]:
        """Copies of the images with the boxes drawn, RGB."""
        names = [self._name(label) for label in range(max(self.names, default=-1) + 1)]
        return [
            draw_boxes(
                image, rows[:, :4], rows[:, 5].long(), names, rows[:, 4], hide_labels=not labels
            )
            for image, rows in zip(self.ims, self.pred, strict=True)
        ]

    def show(self, labels: bool = True) -> None:
        """Open the drawn images in the system's viewer."""
        from PIL import Image as Pillow

        for image in self.render(labels):
            Pillow.fromarray(image).show()

    def save(
        self, labels: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False
    ) -> Path:
        """Write the drawn images to a new folder `save_dir` (`exp2`, ... if it is taken).

        Returns:
            The folder.
        """
        folder = _folder(save_dir, exist_ok)
        for stem, image in zip(self._stems(), self.render(labels), strict=True):
            save_image(folder / f"{stem}.jpg", image)
        get_logger().info(f"saved {len(self)} to {folder}")
        return folder

    def crop(
        self, save: bool = True, save_dir: str | Path = "runs/detect/exp", exist_ok: bool = False
    ) -> list[dict[str, object]]:
        """Cut out every detection, see `cut_boxes`; `save` writes to `<folder>/crops/<class>/`.

        Returns:
            For each: `box` (xyxy), `conf`, `cls`, `label` (name and score) and `im` (RGB).
        """
        folder = _folder(save_dir, exist_ok) if save else None
        found: list[dict[str, object]] = []
        for stem, image, rows in zip(self._stems(), self.ims, self.pred, strict=True):
            crops, names = cut_boxes(image, rows[:, :4]), [self._name(int(i)) for i in rows[:, 5]]
            if folder is not None:
                save_crops(folder, stem, crops, names)
            for row, name, crop in zip(rows, names, crops):
                label = f"{name} {float(row[4]):.2f}"
                found.append(
                    {"box": row[:4], "conf": row[4], "cls": row[5], "label": label, "im": crop}
                )
        return found

    def _stems(self) -> list[str]:
        """A name of its own for the picture of each image; a.jpg and a.png are two."""
        free = FreeNames()
        return [free.take(fitting_stem(name), str(n)) for n, name in enumerate(self.files)]


def _centres(rows: Tensor) -> Tensor:
    """xyxy rows as centre and size."""
    low, high = rows[:, :2], rows[:, 2:4]
    return torch.cat(((low + high) / 2, high - low, rows[:, 4:]), 1)


def _divided(rows: Tensor, image: Image) -> Tensor:
    """Rows in shares of the image's width and height."""
    height, width = image.shape[:2]
    return rows / rows.new_tensor([width, height, width, height, 1, 1])


def _folder(save_dir: str | Path, exist_ok: bool) -> Path:
    path = Path(save_dir)
    return increment_path(path.parent, path.name, exist_ok)
