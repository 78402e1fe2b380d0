"""Find objects: `python detect.py --weights best.pt --source photos/` (image, folder, glob, list, video, camera, stream).

Pictures and videos with boxes go to `runs/detect/exp`, and on request labels, tables, crops, VOC or JSON files.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from data.sources import Frame, open_source
from data.transforms import letterbox
from deploy.backends import Backend, load_backend
from deploy.ensemble import as_one
from engine.detections import DetectionWriter
from engine.flags import (
    add_device_flag,
    add_foreign_flags,
    add_ignored_flags,
    add_run_flags,
    add_size_flag,
    add_threshold_flags,
    say_ignored,
)  # fmt: skip
from models.postprocess import keep_best, postprocess
from utils.config import ArgumentParser, increment_path, integer, parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, nearest, run_cli
from utils.logger import get_logger
from utils.structures import Decoded, Detections, as_float

IGNORED = {"augment": False, "update": False, "dnn": False, "visualize": False, "data": None}


@torch.inference_mode()
def detect_frame(backend: Backend, frame: Frame, options: Any, device: torch.device) -> Detections:
    """Detections of one image, boxes in its own pixels."""
    image, box = letterbox(
        frame.image, options.imgsz, stride=backend.stride if options.rect else None
    )
    tensor = torch.from_numpy(image).permute(2, 0, 1)[None].contiguous()
    output = backend(as_float(tensor, device))
    if isinstance(output, Decoded):
        found = postprocess(
            output, backend.postprocess_kind, conf_thres=options.conf_thres, iou_thres=options.iou_thres,
            max_det=options.max_det, classes=options.classes, agnostic=options.agnostic_nms,
        )[0]  # fmt: skip
    else:
        found = keep_best(output[0], options.conf_thres, options.max_det, options.classes)
    found = found.to("cpu")
    return found._replace(boxes=box.restore(found.boxes))


def parse_options(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line."""
    parser = ArgumentParser(description="Find objects in images, videos, cameras and streams.")
    parser.add_argument(
        "--weights",
        nargs="+",
        default=["runs/train/exp/weights/best.pt"],
        help="a .pt or any exported model; several answer together",
    )
    parser.add_argument(
        "--source",
        required=True,
        help="image, folder, glob, list file, video, camera number or stream address",
    )
    add_foreign_flags(parser)
    add_size_flag(parser, default=None)
    add_threshold_flags(parser, conf=0.25, iou=0.45, max_det=1000)
    add_device_flag(parser)
    parser.add_argument(
        "--rect",
        action="store_true",
        help="pad to the image's own shape instead of a square (needs a .pt or a dynamic export)",
    )
    _add_output_flags(parser)
    parser.add_argument(
        "--classes", nargs="+", default=None, help="only these classes, by index or name"
    )
    parser.add_argument("--agnostic-nms", action="store_true", help="NMS over all classes together")
    parser.add_argument("--half", action="store_true", help="half precision")
    parser.add_argument(
        "--vid-stride", type=integer(1), default=1, help="take every so many frames of a video"
    )
    add_run_flags(parser, "runs/detect")
    add_ignored_flags(parser, IGNORED)
    options = parser.parse_args(arguments)
    say_ignored(options, IGNORED)
    return options


def _add_output_flags(parser: ArgumentParser) -> None:
    """What is shown and written, and how it is drawn."""
    parser.add_argument("--view-img", action="store_true", help="show each picture in a window")
    parser.add_argument("--save-txt", action="store_true", help="write labels/*.txt in YOLO form")
    parser.add_argument(
        "--save-format",
        type=int,
        default=0,
        choices=(0, 1),
        help="form of --save-txt: 0 YOLO, 1 Pascal VOC corners in pixels",
    )
    parser.add_argument("--save-csv", action="store_true", help="write predictions.csv")
    parser.add_argument("--save-voc", action="store_true", help="write Pascal VOC XML files")
    parser.add_argument("--save-json", action="store_true", help="write predictions.json")
    parser.add_argument("--save-conf", action="store_true", help="write scores behind the labels")
    parser.add_argument(
        "--save-crop",
        action="store_true",
        help="write each object with 2 %% and 10 pixels around, by class",
    )
    parser.add_argument("--nosave", action="store_true", help="write no pictures")
    parser.add_argument(
        "--line-thickness", type=integer(1), default=None, help="of boxes, in pixels"
    )
    parser.add_argument("--hide-labels", action="store_true", help="draw boxes only")
    parser.add_argument("--hide-conf", action="store_true", help="draw no scores")


def class_indices(words: Sequence[str] | None, names: Sequence[str]) -> list[int] | None:
    """Indices of `--classes`, given as names or indices; a class whose name is a number goes by its name.

    Raises:
        ConfigError: a word that is neither.
    """
    if words is None:
        return None
    table = {**{str(i): i for i in range(len(names))}, **{name: i for i, name in enumerate(names)}}
    for word in words:
        if word not in table:
            raise ConfigError(
                f"--classes: got {word!r}, expected an index below {len(names)} or one of {', '.join(names[:20])}."
                f"{nearest(word, names)}"
            )
        if word.isdecimal() and word in names and word != str(table[word]):
            get_logger().info(f"--classes {word}: the class of this name, index {table[word]}")
    return [table[word] for word in words]


def main(arguments: Sequence[str] | None = None) -> None:
    """Detect from the command line."""
    options = parse_options(arguments)
    log, device = get_logger(), select_device(options.device)
    if options.view_img:
        _check_display()
    members = [
        load_backend(
            path, device, half=options.half, cfg=options.cfg, backbone=options.backbone, allow_code=options.allow_code,
        )
        for path in options.weights
    ]  # fmt: skip
    backend = as_one(members, options.weights)
    options.weights = ", ".join(options.weights)
    options.classes = class_indices(options.classes, backend.names)
    options.imgsz = _size(options, backend)
    if options.rect and not backend.dynamic:
        raise ConfigError(
            f"--rect: {options.weights} has a fixed image size. Leave it out or export with --dynamic."
        )
    if backend.end2end:
        log.info(
            f"{options.weights}: {backend.info.told_inside}; --iou-thres and --agnostic-nms cannot act on it, "
            "--conf-thres and --max-det only cut further"
        )
    frames = iter(
        open_source(options.source, vid_stride=options.vid_stride, white=backend.info.white)
    )
    first = next(frames, None)  # a source that cannot be read leaves no folder
    if first is None:
        raise ConfigError(f"--source: {options.source} has no readable image.")
    folder = increment_path(options.project, options.name, options.exist_ok)
    folder.mkdir(parents=True, exist_ok=True)
    count, objects, seconds = 0, 0, 0.0
    with DetectionWriter(folder, backend.names, options) as writer:
        for frame in chain([first], frames):
            start = time.perf_counter()
            found = detect_frame(backend, frame, options, device)
            elapsed = time.perf_counter() - start
            count, objects, seconds = count + 1, objects + len(found.labels), seconds + elapsed
            log.info(
                f"{frame.path}{_frame_number(frame)}: {summary(found, backend.names)}, {1000 * elapsed:.0f} ms"
            )
            writer.write(frame, found)
    print(
        f"{objects} objects in {count} images, {1000 * seconds / count:.1f} ms an image; results in {folder}"
    )


def _check_display() -> None:
    """Refuse to open windows where there is no screen: the window library would end the process."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not has_display:
        raise ConfigError(
            "--view-img: got no display, expected DISPLAY or WAYLAND_DISPLAY to name one. Leave the "
            "flag out; pictures are written to --project."
        )


def _size(options: Any, backend: Backend) -> tuple[int, int]:
    if options.imgsz is None:
        return tuple(backend.imgsz)
    imgsz = parse_imgsz(options.imgsz, backend.stride)
    if not backend.dynamic and imgsz != tuple(backend.imgsz):
        raise ConfigError(
            f"--imgsz: got {imgsz[0]} {imgsz[1]}, but {options.weights} was exported for {backend.imgsz[0]} "
            f"{backend.imgsz[1]}. Leave --imgsz out or export with --dynamic."
        )
    return imgsz


def _frame_number(frame: Frame) -> str:
    return f" frame {frame.index + 1}" if frame.video else ""


def summary(found: Detections, names: Sequence[str]) -> str:
    """`3 RBC, 1 WBC`, or `nothing found`."""
    counts = torch.bincount(found.labels, minlength=len(names)).tolist()
    return ", ".join(f"{n} {name}" for n, name in zip(counts, names) if n) or "nothing found"


if __name__ == "__main__":
    run_cli(main)
