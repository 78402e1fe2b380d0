"""Writing what detect.py finds: pictures, videos, labels, tables, crops."""

from __future__ import annotations

import csv
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.sources import Frame
from engine.outputs import write_yolo_labels
from utils.detection_files import cut_boxes, fitting_stem, safe_name, save_crops
from utils.errors import ConfigError
from utils.file_names import FreeNames
from utils.logger import get_logger
from utils.structures import Detections
from utils.visualize import draw_boxes, save_image

NOT_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class DetectionWriter:
    """Opened for a run, fed frame by frame, closed at its end."""

    def __init__(self, folder: Path, names: Sequence[str], options: Any) -> None:
        self.folder, self.names, self.options = folder, tuple(names), options
        self.tables: list[Table] = []
        if options.save_csv:
            self.tables.append(CsvTable(folder / "predictions.csv"))
        if options.save_json:
            self.tables.append(JsonTable(folder / "predictions.json"))
        self.video: tuple[str, Any] | None = None
        self.free_names = FreeNames()

    def __enter__(self) -> DetectionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        for table in self.tables:
            table.close()
        if self.options.view_img:
            cv2.destroyAllWindows()

    def write(self, frame: Frame, found: Detections) -> None:
        """Everything the flags ask for, of one frame."""
        options, stem = self.options, self._stem(frame)
        size = (frame.image.shape[0], frame.image.shape[1])
        for table in self.tables:
            table.write(_rows(frame, found, self.names))
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
            crops = cut_boxes(frame.image, found.boxes)
            save_crops(self.folder, stem, crops, [self.names[i] for i in found.labels.tolist()])
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
        """A file name for this frame; those of a video are not remembered one by one, a stream has no end."""
        name = fitting_stem(frame.path)
        if not frame.video:
            return self.free_names.take(name, frame.path)
        prefix = self.free_names.take(name, frame.path, "/frames").removesuffix("/frames")
        return self.free_names.find(f"{prefix}_{frame.index + 1}", frame.path)

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

    def _save(self, frame: Frame, stem: str, picture: np.ndarray) -> None:
        if not frame.video:
            suffix = Path(frame.path).suffix.lower()
            save_image(
                self.folder / f"{stem}{suffix if suffix in ('.png', '.webp') else '.jpg'}", picture
            )
            return
        if self.video is None or self.video[0] != frame.path:
            self._close_video()
            stem = safe_name(fitting_stem(frame.path), "video")
            name = self.folder / self.free_names.take(stem, frame.path, ".mp4")
            fps = frame.video.fps / self.options.vid_stride or 1.0
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


def _rows(frame: Frame, found: Detections, names: Sequence[str]) -> list[dict[str, Any]]:
    """What is told of each detection of a frame."""
    return [
        {
            "image": frame.path,
            "frame": frame.index + 1 if frame.video else 0,
            "class": names[label],
            "label": label,
            "confidence": round(score, 5),
            "box": [round(v, 2) for v in box],
        }  # fmt: skip
        for box, score, label in zip(
            found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
        )
    ]


class Table:
    """A file to which rows are written as they come: a stream has no end, and its end may be a signal."""

    def __init__(self, path: Path, encoding: str) -> None:
        self.path = path
        # File names that are no UTF-8 stand in the table byte for byte.
        self.file = path.open("w", newline="", encoding=encoding, errors="surrogateescape")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a frame."""
        raise NotImplementedError

    def close(self) -> None:
        """Finish the file; a full disk is told here at the latest, by the system without a name."""
        try:
            self.file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


class CsvTable(Table):
    """`predictions.csv`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "utf-8")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerow(
            ("image", "frame", "class", "label", "confidence", "x1", "y1", "x2", "y2")
        )

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a frame."""
        self.writer.writerows((*list(row.values())[:-1], *row["box"]) for row in rows)


class JsonTable(Table):
    """`predictions.json`, a list; ASCII escapes also carry file names that are no UTF-8."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "ascii")
        self.lead = "[\n "

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        """Add the rows of a frame, each in a line of its own."""
        for row in rows:
            self.file.write(self.lead + json.dumps(row))
            self.lead = ",\n "

    def close(self) -> None:
        """Close the list and the file."""
        self.file.write("[]" if self.lead.startswith("[") else "\n]")
        super().close()


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
    # Neither has it one for bytes that are no UTF-8: they stand there as \xff.
    name = os.fsencode(Path(frame.path).name).decode("utf-8", "backslashreplace")
    ElementTree.SubElement(root, "filename").text = _in_xml(name)
    size = ElementTree.SubElement(root, "size")
    for tag, value in zip(("height", "width", "depth"), frame.image.shape, strict=True):
        ElementTree.SubElement(size, tag).text = str(value)
    for box, score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist()
    ):
        item = ElementTree.SubElement(root, "object")
        ElementTree.SubElement(item, "name").text = _in_xml(names[label])
        if with_score:
            ElementTree.SubElement(item, "confidence").text = f"{score:.5f}"
        bounds = ElementTree.SubElement(item, "bndbox")
        for tag, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True):
            ElementTree.SubElement(bounds, tag).text = f"{value:.2f}"
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="unicode")
    get_logger().debug(str(path))


def _in_xml(text: str) -> str:
    """XML has no form for control characters: they stand there as \\x1b."""
    return NOT_XML.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
