"""Writing what detect.py finds: pictures, videos, labels, tables, crops."""

from __future__ import annotations

import csv
import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2

from data.images import Image
from data.videos import Frame
from engine.options import DetectOptions
from engine.outputs import write_yolo_labels
from utils.detection_files import cut_boxes, fitting_stem, safe_name, save_crops
from utils.errors import ConfigError
from utils.files import FreeNames
from utils.logger import get_logger
from utils.structures import Detections
from utils.visualize import draw_boxes, save_image

NOT_XML = re.compile("[^\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Row(NamedTuple):
    """One detection: its box (xyxy, pixels), score, class, and the number of its track, if it has one."""

    box: list[float]
    score: float
    label: int
    name: str
    track: int | None = None


class DetectionWriter:
    """Opened for a run, fed frame by frame, closed at its end."""

    def __init__(self, folder: Path, names: Sequence[str], options: DetectOptions) -> None:
        self.folder, self.names, self.options = folder, tuple(names), options
        wanted = {"predictions.csv": options.save_csv, "predictions.json": options.save_json}
        chosen = [folder / name for name, is_on in wanted.items() if is_on]
        self.tables = [Table(path, options.track) for path in chosen]
        self.video: cv2.VideoWriter | None = None
        self.video_of = ""
        self.free_names = FreeNames()

    def __enter__(self) -> DetectionWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._close_video()
        for table in self.tables:
            table.close()
        if self.options.view_img:
            cv2.destroyAllWindows()

    def write(
        self,
        frame: Frame,
        found: Detections,
        tracks: Sequence[int] = (),
        levels: Sequence[tuple[int, Image]] = (),
    ) -> None:
        """Everything the flags ask for, of one frame.

        Args:
            frame: where it was found.
            found: what was found.
            tracks: the number of each detection, of `--track`.
            levels: strides and pictures of a pyramid.
        """
        options, folder, stem = self.options, self.folder, self._stem(frame)
        columns = (found.boxes.tolist(), found.scores.tolist(), found.labels.tolist())
        names = [self.names[label] for label in columns[2]]
        numbers: Sequence[int | None] = tracks or [None] * len(names)
        rows = [Row(*values) for values in zip(*columns, names, numbers)]
        for table in self.tables:
            table.write(frame, rows)
        labels = folder / "labels" / f"{stem}.txt"
        if options.save_txt and options.save_format == 0:
            size = (frame.image.shape[0], frame.image.shape[1])
            write_yolo_labels(labels, found, size, options.save_conf, tracks)
        elif options.save_txt:
            write_corners(labels, rows, options.save_conf)
        if options.save_voc:
            write_voc(folder / "voc" / f"{stem}.xml", frame, rows, options.save_conf)
        if options.save_crop:
            crops = cut_boxes(frame.image, found.boxes)
            save_crops(folder, stem, crops, [row.name for row in rows])
        for stride, picture in levels:
            save_image(folder / f"{stem}_stride{stride}.jpg", picture)
        if options.nosave and not options.view_img:
            return
        picture = draw_boxes(
            frame.image,
            found.boxes,
            found.labels,
            self.names,
            found.scores,
            line_thickness=options.line_thickness,
            hide_labels=options.hide_labels,
            hide_conf=options.hide_conf,
            tracks=tracks,
        )
        if not options.nosave and frame.video:
            self._write_video(frame, picture, frame.video.fps)
        elif not options.nosave:
            suffix = Path(frame.path).suffix.lower()
            suffix = suffix if suffix in (".png", ".webp") else ".jpg"
            save_image(folder / f"{stem}{suffix}", picture)
        if options.view_img:
            _show(frame.path, picture)

    def _stem(self, frame: Frame) -> str:
        """A file name for this frame; those of a video are not remembered one by one, a stream has no end."""
        name = fitting_stem(frame.path)
        if not frame.video:
            return self.free_names.take(name, frame.path)
        prefix = self.free_names.take(name, frame.path, "/frames").removesuffix("/frames")
        return self.free_names.find(f"{prefix}_{frame.index + 1}", frame.path)

    def _write_video(self, frame: Frame, picture: Image, fps: float) -> None:
        if self.video is None or self.video_of != frame.path:
            self._close_video()
            stem = safe_name(fitting_stem(frame.path), "video")
            path = self.folder / self.free_names.take(stem, frame.path, ".mp4")
            code, size = cv2.VideoWriter.fourcc(*"mp4v"), (picture.shape[1], picture.shape[0])
            fps = fps / self.options.vid_stride or 1.0
            self.video, self.video_of = cv2.VideoWriter(str(path), code, fps, size), frame.path
        self.video.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))

    def _close_video(self) -> None:
        if self.video:
            self.video.release()
            self.video = None


def _show(title: str, picture: Image) -> None:
    try:
        cv2.imshow(title, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
        cv2.waitKey(1)
    except cv2.error as error:
        raise ConfigError(
            "--view-img: this OpenCV cannot open windows (headless). Leave the flag out."
        ) from error


class Table:
    """`predictions.csv` or `predictions.json`, written row by row: a stream has no end, and its end may be a signal."""

    def __init__(self, path: Path, has_tracks: bool = False) -> None:
        self.has_tracks = has_tracks
        self.path, self.is_json = path, path.suffix == ".json"
        # File names that are no UTF-8 stand in the CSV byte for byte, in the JSON as ASCII escapes.
        encoding = "ascii" if self.is_json else "utf-8"
        self.file = path.open("w", newline="", encoding=encoding, errors="surrogateescape")
        self.lead = "[\n "
        self.csv = csv.writer(self.file, lineterminator="\n")
        if not self.is_json:
            columns = "image frame class label confidence x1 y1 x2 y2".split()
            self.csv.writerow([*columns, *["track"] * has_tracks])

    def write(self, frame: Frame, rows: Sequence[Row]) -> None:
        """Add the rows of a frame, each in a line of its own."""
        number = frame.index + 1 if frame.video else 0
        for row in rows:
            score, box = round(row.score, 5), [round(value, 2) for value in row.box]
            # Python 3.10 writes no NUL into a CSV.
            name = row.name if self.is_json else row.name.replace("\0", "\\x00")
            values = (frame.path, number, name, row.label, score)
            track = [row.track] * self.has_tracks
            if not self.is_json:
                self.csv.writerow((*values, *box, *track))
                continue
            names = ("image", "frame", "class", "label", "confidence", "box", "track")
            self.file.write(self.lead + json.dumps(dict(zip(names, (*values, box, *track)))))
            self.lead = ",\n "

    def close(self) -> None:
        """Finish the file; a full disk is told here at the latest, by the system without a name."""
        try:
            if self.is_json:
                self.file.write("[]" if self.lead.startswith("[") else "\n]")
            self.file.close()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def write_corners(path: Path, rows: Sequence[Row], with_score: bool) -> None:
    """`class x1 y1 x2 y2 [score] [track]` lines in pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        numbers = [f"{value:.2f}" for value in row.box] + [f"{row.score:.5f}"] * with_score
        numbers += [str(row.track)] * (row.track is not None)
        lines.append(" ".join([str(row.label), *numbers]) + "\n")
    path.write_text("".join(lines), encoding="utf-8")


def write_voc(path: Path, frame: Frame, rows: Sequence[Row], with_score: bool) -> None:
    """One image's detections as a Pascal VOC annotation."""

    def add(parent: ElementTree.Element, **texts: str) -> None:
        for tag, text in texts.items():
            ElementTree.SubElement(parent, tag).text = text

    root = ElementTree.Element("annotation")
    # XML has no form either for bytes that are no UTF-8: they stand there as \xff.
    name = os.fsencode(Path(frame.path).name).decode("utf-8", "backslashreplace")
    add(root, filename=_in_xml(name))
    height, width, depth = map(str, frame.image.shape)
    add(ElementTree.SubElement(root, "size"), height=height, width=width, depth=depth)
    for row in rows:
        item = ElementTree.SubElement(root, "object")
        add(item, name=_in_xml(row.name))
        if with_score:
            add(item, confidence=f"{row.score:.5f}")
        if row.track is not None:
            add(item, track=str(row.track))
        corners = zip(("xmin", "ymin", "xmax", "ymax"), row.box, strict=True)
        bounds = ElementTree.SubElement(item, "bndbox")
        add(bounds, **{tag: f"{value:.2f}" for tag, value in corners})
    ElementTree.indent(root)
    path.parent.mkdir(parents=True, exist_ok=True)
    ElementTree.ElementTree(root).write(path, encoding="unicode")
    get_logger().debug(str(path))


def _in_xml(text: str) -> str:
    """XML has no form for control characters: they stand there as \\x1b."""
    return NOT_XML.sub(lambda found: found.group().encode("unicode_escape").decode(), text)
