"""Writing what detect.py finds: pictures, videos, labels, tables, crops."""

from __future__ import annotations

import csv
import json
import os
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.sources import Frame
from engine.outputs import FreeNames, write_yolo_labels
from utils.errors import ConfigError
from utils.logger import get_logger
from utils.structures import Detections
from utils.visualize import draw_boxes, save_image


class DetectionWriter:
    """Opened for a run, fed frame by frame, closed at its end."""

    def __init__(self, folder: Path, names: Sequence[str], options: Any) -> None:
        self.folder, self.names, self.options = folder, tuple(names), options
        self.rows: list[dict[str, Any]] = []
        self.video: tuple[str, Any] | None = None
        self.free_names = FreeNames()

    def __enter__(self) -> DetectionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        if self.options.save_csv:
            self._write_csv()
        if self.options.save_json:
            # ASCII escapes also carry file names that are no UTF-8.
            text = json.dumps(self.rows, indent=1)
            (self.folder / "predictions.json").write_text(text, encoding="ascii")
        if self.options.view_img:
            cv2.destroyAllWindows()

    def write(self, frame: Frame, found: Detections) -> None:
        """Everything the flags ask for, of one frame."""
        options, stem = self.options, self._stem(frame)
        size = (frame.image.shape[0], frame.image.shape[1])
        self._remember(frame, found)
        if options.save_txt and options.save_format == 0:
            write_yolo_labels(
                self.folder / "labels" / f"{stem}.txt", found, size, options.save_conf
            )
        elif options.save_txt:
            self._write_corners(self.folder / "labels" / f"{stem}.txt", found)
        if options.save_voc:
            write_voc(
                self.folder / "voc" / f"{stem}.xml", frame, found, self.names, options.save_conf
            )
        if options.save_crop:
            self._write_crops(stem, frame.image, found)
        if options.nosave and not options.view_img:
            return
        picture = draw_boxes(
            frame.image, found.boxes, found.labels, self.names, found.scores, line_thickness=options.line_thickness,
            hide_labels=options.hide_labels, hide_conf=options.hide_conf,
        )  # fmt: skip
        if not options.nosave:
            self._save(frame, stem, picture)
        if options.view_img:
            _show(frame.path, picture)

    def _stem(self, frame: Frame) -> str:
        """A file name for this frame."""
        name = Path(frame.path).stem
        return self.free_names.take(
            f"{name}_{frame.index + 1}" if frame.video else name, f"{frame.path}:{frame.index}"
        )

    def _remember(self, frame: Frame, found: Detections) -> None:
        for box, score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
        ):
            self.rows.append({
                "image": frame.path, "frame": frame.index + 1 if frame.video else 0, "class": self.names[label],
                "label": label, "confidence": round(score, 5), "box": [round(v, 2) for v in box],
            })  # fmt: skip

    def _write_csv(self) -> None:
        path = self.folder / "predictions.csv"
        # File names that are no UTF-8 stand in the table byte for byte.
        with path.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(
                ("image", "frame", "class", "label", "confidence", "x1", "y1", "x2", "y2")
            )
            writer.writerows((*list(row.values())[:-1], *row["box"]) for row in self.rows)

    def _write_corners(self, path: Path, found: Detections) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = []
        for box, score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
        ):
            numbers = [
                *(f"{v:.2f}" for v in box),
                *([f"{score:.5f}"] if self.options.save_conf else []),
            ]
            lines.append(" ".join([str(label), *numbers]))
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def _write_crops(self, stem: str, image: np.ndarray, found: Detections) -> None:
        height, width = image.shape[:2]
        for number, (box, label) in enumerate(zip(found.boxes.tolist(), found.labels.tolist())):
            x1, y1, x2, y2 = (round(v) for v in box)
            crop = image[
                max(y1, 0) : min(max(y2, y1 + 1), height), max(x1, 0) : min(max(x2, x1 + 1), width)
            ]
            if crop.size:
                save_image(
                    self.folder
                    / "crops"
                    / _safe_name(self.names[label], "class")
                    / f"{stem}_{number}.jpg",
                    crop,
                )

    def _save(self, frame: Frame, stem: str, picture: np.ndarray) -> None:
        if not frame.video:
            suffix = Path(frame.path).suffix.lower()
            save_image(
                self.folder / f"{stem}{suffix if suffix in ('.png', '.webp') else '.jpg'}", picture
            )
            return
        if self.video is None or self.video[0] != frame.path:
            self._close_video()
            stem = _safe_name(Path(frame.path).stem, "video")
            name = self.folder / self.free_names.take(stem, frame.path, ".mp4")
            fps = max(frame.video.fps / self.options.vid_stride, 1)
            size = (picture.shape[1], picture.shape[0])
            self.video = (
                frame.path,
                cv2.VideoWriter(str(name), cv2.VideoWriter_fourcc(*"mp4v"), fps, size),
            )
        self.video[1].write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def _close_video(self) -> None:
        if self.video:
            self.video[1].release()
            self.video = None


def _safe_name(text: str, otherwise: str) -> str:
    """`text` as the name of a file or folder: letters, digits and `- _ . space`, never `..`."""
    safe = "".join(c if c.isalnum() or c in "-_. " else "_" for c in text).strip(". ")
    return safe or otherwise


def _show(title: str, picture: np.ndarray) -> None:
    try:
        cv2.imshow(title, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        cv2.waitKey(1)
    except cv2.error as error:
        raise ConfigError(
            "--view-img: this OpenCV cannot open windows (headless). Leave the flag out."
        ) from error


def write_voc(
    path: Path, frame: Frame, found: Detections, names: Sequence[str], with_score: bool
) -> None:
    """One image's detections as a Pascal VOC annotation."""
    root = ElementTree.Element("annotation")
    # XML has no form for bytes that are no UTF-8: they stand there as \xff.
    name = os.fsencode(Path(frame.path).name).decode("utf-8", "backslashreplace")
    ElementTree.SubElement(root, "filename").text = name
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("height", "width", "depth"), frame.image.shape, strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    for box, score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    ):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = names[label]
        if with_score:
            ElementTree.SubElement(item, "confidence").text = f"{score:.5f}"
        bounds = ElementTree.SubElement(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, tag).text = f"{value:.2f}"
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="unicode")
    get_logger().debug(str(path))
