"""What a graph takes, against what its file says that it takes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from deploy.runtimes.artifact import ArtifactInfo
from utils.errors import CheckpointError

IMAGE_TYPES = ("tensor(float)", "torch.float32", "f32", "Tensor")  # in the words of each library


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
        raise _wrong(path, f"{len(inputs)} inputs ({told})", "one, of images")
    name, sizes, kind = inputs[0]
    if kind not in IMAGE_TYPES:
        raise _wrong(path, f"an input of {kind}", "images of float32")
    height, width = (None, None) if info.dynamic else info.imgsz
    expected = (info.batch, info.channels, height, width)
    if sizes is not None and not _fit(sizes, expected):
        raise _wrong(path, f"an input of {_told(sizes)}", f"{_told(expected)} as its metadata say")
    return name


def _fit(sizes: Sequence[object], expected: Sequence[int | None]) -> bool:
    """Whether fixed sizes are the expected ones; None expects a size that may differ."""
    return len(sizes) == len(expected) and all(
        not isinstance(size, int) or size == wanted
        for size, wanted in zip(sizes, expected, strict=True)
    )


def _told(sizes: Sequence[object]) -> str:
    return "x".join(str(size) if isinstance(size, int) else "any" for size in sizes)


def _wrong(path: Path, got: str, expected: str) -> CheckpointError:
    return CheckpointError(f"{path}: got {got}, expected {expected}. Export it again.")
