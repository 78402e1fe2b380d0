"""Several models as one: what they predict for an image is joined, and suppression chooses among all of it.

Each member answers in its own way: with every anchor point, with a set of queries, or with finished detections. All of them
become boxes with class scores; what two members find is one object for NMS. Letters: B batch, K detections, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from deploy.backends import load_backend
from deploy.runtimes.artifact import ArtifactInfo, Backend
from utils.errors import ConfigError
from utils.logger import get_logger
from utils.structures import Decoded, Detections


def load_as_one(
    files: Sequence[str],
    device: torch.device,
    *,
    half: bool = False,
    cfg: str = "",
    backbone: Sequence[str] | None = None,
    allow_code: bool = False,
    one_to_many: bool = False,
) -> Backend:
    """The model of a file, or those of several as one; the arguments are those of `load_backend`."""
    members = [
        load_backend(
            file,
            device,
            half=half,
            cfg=cfg,
            backbone=backbone,
            allow_code=allow_code,
            one_to_many=one_to_many,
        )
        for file in files
    ]
    return as_one(members, files)


def as_one(members: Sequence[Backend], files: Sequence[str]) -> Backend:
    """The only one of `members`, or all of them as one, which is told.

    Raises:
        ConfigError: they do not go together.
    """
    if len(members) == 1:
        return members[0]
    ensemble = Ensemble(members, files)
    (height, width), log = ensemble.imgsz, get_logger()
    why = "the largest size among them" if ensemble.dynamic else "the size that all can take"
    log.info(
        f"ensemble of {', '.join(files)}: images of {height}x{width}, {why}, in steps of {ensemble.stride}; predictions are "
        "joined before NMS"
    )
    for member, file in zip(members, files):
        if member.end2end:
            log.info(f"{file}: {member.info.told_inside}, before the others' join them")
    return ensemble


class Ensemble(Backend):
    """Models that answer together.

    Args:
        members: what is run; they know the same classes, and those of a fixed size take one size.
        files: what errors call them.

    Raises:
        ConfigError: they differ in their classes or sizes.
    """

    def __init__(self, members: Sequence[Backend], files: Sequence[str]) -> None:
        _require_same_names(members, files)
        stride = math.lcm(*(member.stride for member in members))
        imgsz = _common_size(members, files, stride)
        info = ArtifactInfo(
            members[0].names, stride, imgsz, None, all(m.dynamic for m in members), "ensemble", "nms", "decoded",
            white=_common_white(members, files),
        )  # fmt: skip
        super().__init__(info, lambda images: (), members[0].device)
        self.members, self.files = tuple(members), tuple(files)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Decoded:
        """Boxes and scores of all members, one behind the other; see `Backend`."""
        outputs = [_as_scores(member(images), len(self.names)) for member in self.members]
        boxes, scores = (torch.cat(parts, 1) for parts in zip(*outputs))
        return Decoded(boxes, scores)


def _as_scores(output: Decoded | list[Detections], num_classes: int) -> Decoded:
    """Finished detections as boxes (B, K, 4) with a score for their own class alone, (B, K, C)."""
    if isinstance(output, Decoded):
        return output
    most = max(len(found.scores) for found in output)
    boxes = output[0].boxes.new_zeros(len(output), most, 4)
    scores = output[0].scores.new_zeros(len(output), most, num_classes)
    for index, found in enumerate(output):
        rows = torch.arange(len(found.scores), device=scores.device)
        boxes[index, : len(rows)] = found.boxes
        scores[index, rows, found.labels] = found.scores
    return Decoded(boxes, scores)


def _require_same_names(members: Sequence[Backend], files: Sequence[str]) -> None:
    for member, file in zip(members[1:], files[1:]):
        ours, theirs = members[0].names, member.names
        if ours == theirs:
            continue
        pairs = zip((*theirs, *[""] * len(ours)), (*ours, *[""] * len(theirs)))
        row, (got, expected) = next((k, pair) for k, pair in enumerate(pairs) if pair[0] != pair[1])
        raise ConfigError(
            f"--weights: class {row} of {file} - got {got!r}, expected {expected!r} as in {files[0]}. Models that answer "
            "together know the same classes in one order."
        )


def _common_size(members: Sequence[Backend], files: Sequence[str], stride: int) -> tuple[int, int]:
    """The size that members of a fixed size take, else the largest of all."""
    fixed = {m.imgsz: file for m, file in zip(members, files) if not m.dynamic}
    if len(fixed) > 1:
        told = ", ".join(f"{h}x{w} ({file})" for (h, w), file in fixed.items())
        raise ConfigError(
            f"--weights: got fixed sizes {told}, expected one. Export them for one size, or with --dynamic."
        )
    if fixed:
        (height, width), file = next(iter(fixed.items()))
        if height % stride or width % stride:
            raise ConfigError(
                f"--weights: {file} takes {height}x{width} alone, the others multiples of {stride}. Export it for such a "
                "size, or with --dynamic."
            )
        return height, width
    heights, widths = zip(*(member.imgsz for member in members))
    return -(-max(heights) // stride) * stride, -(-max(widths) // stride) * stride


def _common_white(members: Sequence[Backend], files: Sequence[str]) -> float | None:
    """What all take for white in deep images: one picture is read for them all."""
    whites = {member.info.white: file for member, file in zip(members, files)}
    if len(whites) > 1:
        told = ", ".join(f"{w or 'the full range'} ({file})" for w, file in whites.items())
        raise ConfigError(
            f"--weights: got white {told}, expected one. Train them with the same `white:` of the data YAML."
        )
    return next(iter(whites))
