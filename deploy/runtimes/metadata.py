"""What a file says about itself, believed no further than a detector of that kind can be.

The text of a file's metadata is anybody's; sizes decide how much memory its first batch takes.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from deploy.runtimes.artifact import ArtifactInfo, loading
from deploy.runtimes.layouts import LAYOUTS
from utils.channels import white_of
from utils.errors import CheckpointError, ForeignError, foreign_code
from utils.thresholds import KEY, class_thresholds

T = TypeVar("T")
LONGEST_TEXT = 1 << 21  # twenty thousand class names of a hundred characters
MOST_CLASSES = 100_000
MOST_CHANNELS = 64
LARGEST_STRIDE = 1024
LARGEST_SIDE = 1 << 14
LARGEST_BATCH = 4096
MOST_PIXELS = 1 << 27  # of a batch; a batch of 64 has 105 million at 1280
IMAGE_TYPES = ("tensor(float)", "torch.float32", "f32", "Tensor")  # in the words of each library
FAMILY = "[a-z][a-z0-9_-]{0,31}"
DYNAMIC = ("", "batch", "all")


def decode_metadata(text: str, path: Path) -> ArtifactInfo:
    """What the JSON `text` in a file says about it.

    Raises:
        CheckpointError: see `parse_metadata`.
    """
    with loading(path):
        found = json.loads(text or "{}")
    entries = found.items() if isinstance(found, dict) else ()
    return parse_metadata({str(key): str(value) for key, value in entries}, str(path))


def parse_metadata(metadata: Mapping[str, str], source: str) -> ArtifactInfo:
    """Read the metadata that `export.py` writes.

    Raises:
        CheckpointError: a key is missing, or has what no exported detector has.
    """

    def read(key: str, convert: Callable[[str], T], expected: str) -> T:
        if key not in metadata:
            raise _wrong(source, key, "nothing", expected)
        try:
            with foreign_code():
                return convert(metadata[key])
        except ForeignError:
            raise _wrong(source, key, repr(metadata[key][:60]), expected) from None

    dynamic = read("dynamic", _one_of(DYNAMIC), "nothing, batch or all")
    white = thresholds = class_conf = None
    if "white" in metadata:
        white = read("white", lambda text: white_of({"white": float(text)}), "a number above 0")
    if "thresholds" in metadata:
        thresholds = read("thresholds", _thresholds, "[score, overlap, detections]")
    names = read("names", _names, "class names by index")
    if KEY in metadata:
        class_conf = read(
            KEY,
            lambda text: class_thresholds({KEY: _literal(text)}, len(names)),
            "a number from 0 to 1 for each class",
        )
    info = ArtifactInfo(
        names=names,
        stride=read("stride", _whole(LARGEST_STRIDE), f"1 to {LARGEST_STRIDE}"),
        imgsz=read("imgsz", _imgsz, f"[height, width] from 1 to {LARGEST_SIDE}"),
        batch=read("batch", _whole(LARGEST_BATCH), f"1 to {LARGEST_BATCH}"),
        dynamic=dynamic == "all",
        family=read(
            "family", lambda text: _held(text, re.fullmatch(FAMILY, text)), "the name of a family"
        ),
        postprocess_kind=read("postprocess", _one_of(("nms", "topk", "best")), "nms, topk or best"),
        layout=read("layout", _one_of(LAYOUTS), f"one of {', '.join(LAYOUTS)}"),
        channels=read("channels", _whole(MOST_CHANNELS), f"1 to {MOST_CHANNELS}"),
        half=read("half", _one_of(("True", "False")), "True or False") == "True",
        white=white,
        class_conf=class_conf,
        thresholds=thresholds,
    )
    if not dynamic and math.prod((info.batch or 1, *info.imgsz)) > MOST_PIXELS:
        got = f"{info.batch} of {info.imgsz[0]}x{info.imgsz[1]}"
        raise _wrong(source, "batch and imgsz", got, f"{MOST_PIXELS} pixels at most")
    return replace(info, batch=None) if dynamic else info


def _wrong(source: str, key: str, got: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: its metadata {key} - got {got}, expected {expected}, as export.py writes it."
    )


def _held(value: T, is_good: object) -> T:
    """`value`, which is refused unless it is good."""
    if not is_good:
        raise ValueError
    return value


def _one_of(known: Sequence[str]) -> Callable[[str], str]:
    return lambda text: _held(text, text in known)


def _whole(most: int) -> Callable[[str], int]:
    return lambda text: _held(
        int(text), re.fullmatch("[0-9]{1,9}", text) and 1 <= int(text) <= most
    )


def _literal(text: str) -> Any:
    return ast.literal_eval(_held(text, len(text) <= LONGEST_TEXT))


def _names(text: str) -> tuple[str, ...]:
    names = _literal(text)
    _held(names, isinstance(names, dict) and 1 <= len(names) <= MOST_CLASSES)
    _held(names, all(isinstance(name, (str, int, float)) for name in names.values()))
    return tuple(str(names[key]) for key in range(len(names)))  # KeyError where one is missing


def _imgsz(text: str) -> tuple[int, int]:
    height, width = _literal(text)
    are_sides = all(type(side) is int and 1 <= side <= LARGEST_SIDE for side in (height, width))
    return _held((height, width), are_sides)


def _thresholds(text: str) -> tuple[float, float, int]:
    conf, iou, max_det = _literal(text)
    _held(max_det, type(max_det) is int and max_det >= 1 and 0 <= conf <= 1 and 0 <= iou <= 1)
    return float(conf), float(iou), max_det


class GraphInput(NamedTuple):
    """One input of a graph.

    Attributes:
        name: its own.
        sizes: whole numbers, anything else where a size may differ; None where nothing is known.
        kind: type of its elements, in the library's words.
    """

    name: str
    sizes: Sequence[object] | None
    kind: str


def check_inputs(inputs: Sequence[GraphInput], info: ArtifactInfo, path: Path) -> str:
    """The name of the only input, after making sure that it takes the images that the metadata promise.

    Raises:
        CheckpointError: there are others, or it is of another type or shape.
    """
    if len(inputs) != 1:
        told = ", ".join(item.name for item in inputs[:4])
        raise _other_input(path, f"{len(inputs)} inputs ({told})", "one, of images")
    name, sizes, kind = inputs[0]
    if kind not in IMAGE_TYPES:
        raise _other_input(path, f"an input of {kind}", "images of float32")
    height, width = (None, None) if info.dynamic else info.imgsz
    expected = (info.batch, info.channels, height, width)
    if sizes is None:
        return name
    fixed = [size if isinstance(size, int) else wanted for size, wanted in zip(sizes, expected)]
    if len(sizes) != len(expected) or fixed != list(expected):
        told = f"{_told(expected)} as its metadata say"
        raise _other_input(path, f"an input of {_told(sizes)}", told)
    return name


def _told(sizes: Sequence[object]) -> str:
    return "x".join(str(size) if isinstance(size, int) else "any" for size in sizes)


def _other_input(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: got {got}, expected {expected}. Export it again.")
