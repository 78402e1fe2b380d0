"""Find objects: `python detect.py --weights best.pt --source photos/` (image, folder, glob, list, video, camera, stream).

Pictures and videos with boxes go to `runs/detect/exp`, and on request labels, tables, crops, VOC or JSON files.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import chain

import torch

from data.sources import open_source
from data.videos import Frame
from deploy.backends import Backend, network_of
from deploy.ensemble import load_as_one
from engine.detections import DetectionWriter
from engine.flags import read_flags
from engine.frames import Fitted, detect, fit, in_batches
from engine.levels import Levels
from engine.options import DetectOptions, Thresholds
from engine.slices import AT_ONCE, OVERLAP, detect_slices, fit_slices
from engine.tracking import Tracker
from utils.device import select_device
from utils.errors import ConfigError, nearest, run_cli
from utils.logger import get_logger
from utils.structures import Detections
from utils.threads import InOrder, ahead


def main(arguments: Sequence[str] | None = None) -> None:
    """Detect from the command line."""
    options = read_flags(DetectOptions, arguments)
    log, device = get_logger(), select_device(options.device)
    _check_flags(options)
    backend = load_as_one(
        options.weights,
        device,
        half=options.half,
        cfg=options.cfg,
        backbone=options.backbone,
        allow_code=options.allow_code,
        one_to_many=options.one_to_many,
    )
    name, names = ", ".join(options.weights), backend.names
    classes, imgsz = class_indices(options.classes, names), options.size_for(backend, name)
    if backend.end2end:
        log.info(
            f"{name}: {backend.info.told_inside}; --iou-thres and --agnostic-nms cannot act on it, "
            "--conf-thres and --max-det only cut further"
        )
    thresholds = options.thresholds_for(backend.info.class_conf, name)
    tracker = Tracker(thresholds, options.vid_stride) if options.track else None
    thresholds = tracker.thresholds if tracker else thresholds
    source = open_source(
        options.source,
        vid_stride=options.vid_stride,
        white=backend.info.white,
        reconnect=options.reconnect,
    )
    if options.reconnect and not source.is_live:
        log.info("--reconnect: without effect, %s is no camera or stream", source.name)
    frames = iter(source)
    first = next(frames, None)  # a source that cannot be read leaves no folder
    if first is None:
        raise ConfigError(f"--source: {options.source} has no readable image.")
    levels = levels_of(backend, name) if options.visualize else None
    stride = backend.stride if backend.dynamic and not options.square else None
    batches = batches_of(chain([first], frames), imgsz, stride, options, source.is_live)
    folder = options.make_folder()
    count, objects, seconds = 0, 0, 0.0
    with DetectionWriter(folder, names, options) as writer, InOrder() as writing:
        write = writer.write if options.view_img else partial(writing.call, writer.write)
        for batch in batches:
            start = time.perf_counter()
            pairs = find(backend, batch, thresholds, classes, options)
            elapsed = time.perf_counter() - start
            seconds += elapsed
            for place, (fitted, found) in enumerate(pairs):
                frame = fitted.frame
                found, tracks = tracker(frame, found) if tracker else (found, [])
                count, objects = count + 1, objects + len(found.labels)
                number = f" frame {frame.index + 1}" if frame.video else ""
                took = f"{1000 * elapsed / len(pairs):.0f} ms"
                log.info(f"{frame.path}{number}: {summary(found, names)}, {took}")
                seen = levels.pictures(place, frame.image, fitted.box) if levels else ()
                write(frame, found, tracks, seen)
    print(
        f"{objects} objects in {count} images, {1000 * seconds / count:.1f} ms an image; results in {folder}"
    )


def find(
    backend: Backend,
    batch: Sequence[Fitted],
    thresholds: Thresholds,
    classes: Sequence[int] | None,
    options: DetectOptions,
) -> list[tuple[Fitted, Detections]]:
    """The frames of a batch, as `batches_of` makes them, and what is found in each."""
    if options.slice:
        at_once = max(options.batch_size, AT_ONCE)
        return [(batch[0], detect_slices(backend, batch, thresholds, classes, at_once))]
    return list(zip(batch, detect(backend, batch, thresholds, classes), strict=True))


def batches_of(
    frames: Iterable[Frame],
    imgsz: tuple[int, int],
    stride: int | None,
    options: DetectOptions,
    is_live: bool,
) -> Iterator[list[Fitted]]:
    """Frames as the network gets them: as many as `--batch-size` says, or with `--slice` the parts of one.

    A live source's next picture is taken when it is wanted; those of files are prepared ahead.
    """
    batches: Iterator[list[Fitted]]
    if options.slice:
        size, overlap = options.slice, OVERLAP if options.overlap is None else options.overlap
        batches = (fit_slices(frame, imgsz, stride, size, overlap) for frame in frames)
    else:
        fitted = (fit(frame, imgsz, stride) for frame in frames)
        batches = in_batches(fitted, 1 if is_live else options.batch_size)
    return batches if is_live else ahead(batches)


def levels_of(backend: Backend, name: str) -> Levels:
    """What sees the maps of the network behind a backend.

    Raises:
        ConfigError: it is an exported file, or several models.
    """
    network = network_of(backend)
    if network is None:
        raise ConfigError(f"--visualize: got {name}, expected one .pt, whose maps can be seen.")
    return Levels(network)


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


def summary(found: Detections, names: Sequence[str]) -> str:
    """`3 RBC, 1 WBC`, or `nothing found`."""
    counts = torch.bincount(found.labels, minlength=len(names)).tolist()
    return ", ".join(f"{n} {name}" for n, name in zip(counts, names) if n) or "nothing found"


def _check_flags(options: DetectOptions) -> None:
    """Refuse what cannot be done together or here, and tell what has no effect."""
    if options.view_img:
        _check_display()
    if options.visualize and options.slice:
        raise ConfigError("--visualize: cannot be used with --slice. Drop one of them.")
    if options.overlap is not None and not options.slice:
        get_logger().info("--overlap: without effect without --slice")


def _check_display() -> None:
    """Refuse to open windows where there is no screen: the window library would end the process."""
    has_display = os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.platform.startswith("linux") and not has_display:
        raise ConfigError(
            "--view-img: got no display, expected DISPLAY or WAYLAND_DISPLAY to name one. Leave the "
            "flag out; pictures are written to --project."
        )


if __name__ == "__main__":
    run_cli(main)
