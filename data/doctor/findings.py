"""What a check tells: findings by kind, each with the places where it was seen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.formats.faults import KINDS as MENDED
from data.formats.faults import Fault

Box = tuple[float, float, float, float]
"""xyxy, pixels of the upright image."""


class Kind(NamedTuple):
    """A kind of finding.

    Attributes:
        what: plural, as it stands behind a number.
        advice: what to do.
        is_fault: False for what is worth knowing and needs no repair.
    """

    what: str
    advice: str
    is_fault: bool = True


KINDS = {
    # files and rows, as the readers of labels tell them
    "broken": Kind("rows or files that stop a training", "Correct them."),
    "unreadable": Kind(MENDED["unreadable"], "Replace or remove them."),
    "background": Kind(MENDED["background"], "Right if they show no object.", False),
    "outside": Kind(MENDED["outside"], "Many of them: corners were written for centre and size."),
    "away": Kind(MENDED["away"], "Correct the rows."),
    "empty": Kind(MENDED["empty"], "Correct the rows."),
    "duplicate": Kind(MENDED["duplicate"], "Remove the second row."),
    "namesake": Kind(MENDED["namesake"], "Join the categories in the file."),
    "size": Kind(MENDED["size"], "The boxes may be those of another version of the picture."),
    "suffix": Kind(MENDED["suffix"], "Convert them to .jpg or .png, or move them away."),
    "unused": Kind(MENDED["unused"], "Find the pictures, or remove the labels."),
    "shared": Kind(MENDED["shared"], "Give each picture its own name."),
    "repeated": Kind(MENDED["repeated"], "List each once."),
    # pictures
    "flat": Kind("images of one colour", "Remove them."),
    "tiny": Kind("images with a side below 32 pixels", "Remove them; they may be thumbnails."),
    "strip": Kind("images beyond 6:1", "Cut them: the long side decides how small all becomes."),
    "grey": Kind("grey images among colour", "Right if the model will meet such.", False),
    "colour": Kind("colour images among grey", "Right if the model will meet such.", False),
    "leak": Kind("images that another split has too", "Keep each in one split."),
    "near leak": Kind(
        "images that are nearly one of another split",
        "Put what was taken together (a scene, a video, a patient) into one split.",
    ),
    "twin": Kind("images that their split has twice", "Keep one of each."),
    "near twin": Kind("images that are nearly one of their split", "They add little.", False),
    "conflict": Kind("same images with other labels", "Decide which labels are right."),
    # boxes
    "double": Kind("objects with two boxes of one class", "Keep one box of each."),
    "contested": Kind("boxes with two classes", "Decide which it is."),
    "whole": Kind("boxes of the whole image", "Often a label of the image, not of an object."),
    "sliver": Kind("boxes thinner than 2 pixels or beyond 20:1", "Slips of the mouse: draw anew."),
    "outlier": Kind("boxes of a size that is far from their class", "Look at each."),
    "copied": Kind("images with the very labels of another one", "Label them by what they show."),
    # a split as a whole
    "same split": Kind("splits that are another one", "Measure on images that were not learned."),
    "no objects": Kind("splits without any object", "Check `path` and the labels."),
    "missing split": Kind("splits whose files are not there", "Fetch them.", False),
    "mostly empty": Kind("splits with most images empty", "Are labels missing? Leave some out."),
    "unlearned": Kind("classes that are measured and never learned", "Put some into train."),
    "unmeasured": Kind("classes that are learned and not measured", "Put some into val.", False),
    "unused class": Kind("classes without an object", "Correct names, or find the labels.", False),
    "rare": Kind("classes of fewer than 10 objects to learn from", "Collect more of them."),
    "unbalanced": Kind(
        "classes a hundred times rarer than the most frequent", "Try --image-weights.", False
    ),
    "alike": Kind("class names that differ in writing only", "Join them, if they mean the same."),
    "small": Kind("splits with many objects below a cell of the finest map", ""),
    "crowded": Kind("images with more objects than the 300 that are kept", "Raise --max-det."),
}
"""Every kind of finding."""


class Place(NamedTuple):
    """Where something was seen.

    Attributes:
        path: image, label file, split or class.
        problem: what is there.
        where: `line 3` and the like, or empty.
        boxes: that it is about, in pixels of the image `path`.
        labels: their classes.
        beside: another image to look at.
    """

    path: str
    problem: str
    where: str = ""
    boxes: tuple[Box, ...] = ()
    labels: tuple[int, ...] = ()
    beside: str = ""

    def __str__(self) -> str:
        return f"{self.path} {self.where}".rstrip() + f": {self.problem}"


@dataclass(frozen=True)
class Finding:
    """One kind of thing in one split, with every place of it.

    Attributes:
        kind: key of `KINDS`.
        split: `train`, `val`, `test`; empty where it is about all of them.
        places: where it was seen, at least one.
        advice: instead of the kind's.
    """

    kind: str
    split: str
    places: tuple[Place, ...]
    advice: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether it needs repair."""
        return KINDS[self.kind].is_fault

    def __str__(self) -> str:
        where = f"{self.split}: " if self.split else ""
        level, count = "finding" if self.is_fault else "note", len(self.places)
        first = "the first: " if count > 1 else ""
        what = f"{where}{KINDS[self.kind].what}: {count}, {first}{self.places[0]}."
        return f"{level}: {what} {self.advice or KINDS[self.kind].advice}"

    def record(self) -> dict[str, object]:
        """As plain data."""
        places = [{k: v for k, v in place._asdict().items() if v} for place in self.places]
        advice, what = self.advice or KINDS[self.kind].advice, KINDS[self.kind].what
        level = "finding" if self.is_fault else "note"
        head = {"kind": self.kind, "level": level, "split": self.split, "what": what}
        return {**head, "count": len(places), "advice": advice, "places": places}


def gathered(split: str, places: Iterable[tuple[str, Place]]) -> list[Finding]:
    """Findings of a split from kinds and places, in the order of `KINDS`."""
    by_kind: dict[str, list[Place]] = {}
    for kind, place in places:
        by_kind.setdefault(kind, []).append(place)
    return [Finding(kind, split, tuple(by_kind[kind])) for kind in KINDS if kind in by_kind]


def of_faults(split: str, faults: Sequence[Fault]) -> list[Finding]:
    """What the readers of labels have mended or could not read."""
    return gathered(
        split, ((f.kind or "broken", Place(f.path, f.problem, f.where)) for f in faults)
    )
