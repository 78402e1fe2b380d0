"""A data set as its YAML describes it, and the files found for one split of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from data.formats.faults import Fault
from utils.errors import DatasetError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class DownloadSource:
    """One file that `--download` fetches and unpacks.

    Attributes:
        url: where it is.
        to: folder to unpack into, relative to the data set's folder.
        sha256: expected digest, lower-case hexadecimal; empty if not known.
        md5: the same, for publishers that state only this.
        size: expected length in bytes; 0 if not known.
    """

    url: str
    to: str = "."
    sha256: str = ""
    md5: str = ""
    size: int = 0


@dataclass(frozen=True)
class DataConfig:
    """A data set: where its files are, in which form, and what its classes are called.

    Attributes:
        path: folder that relative names are relative to.
        names: class names by index.
        splits: for `train`, `val`, `test`, as far as given: folders, list files or JSON files.
        format: `yolo`, `coco` or `voc`.
        file: the YAML (or the folder) that this was read from; named in messages.
        images: folder of the images of a split, where the annotations do not say.
        one_based: VOC corners count pixels from 1, not from 0.
        white: the value that is white in images deeper than 8 bits; None for their full range.
        keypoints: how many there are behind each box of a YOLO row, and of how many numbers each.
        sources: what `--download` fetches.
        script: start of a `download` key in the manner of other projects; never run.
    """

    path: Path
    names: tuple[str, ...]
    splits: Mapping[str, tuple[Path, ...]]
    format: str
    file: Path
    images: Mapping[str, Path]
    one_based: bool = False
    white: float | None = None
    keypoints: tuple[int, int] | None = None
    sources: tuple[DownloadSource, ...] = ()
    script: str = ""

    def entries(self, split: str) -> tuple[Path, ...]:
        """Folders or files of a split, all of which exist.

        Raises:
            DatasetError: there is no such split, or its files are not there.
        """
        if split not in self.splits:
            given = ", ".join(self.splits) or "none"
            raise DatasetError(f"{self.file}: no split {split!r} - got {given}. Add `{split}:`.")
        for entry in self.splits[split]:
            if not entry.exists():
                raise DatasetError(
                    f"{self.file}: {split} - got {entry}, which does not exist. {self.advice()}"
                )
        return self.splits[split]

    def advice(self) -> str:
        """What to do when the files of the data set are not there."""
        if self.sources:
            hosts = ", ".join(sorted({urlsplit(source.url).netloc for source in self.sources}))
            known = sum(source.size for source in self.sources)
            amount = f"{known / 1e9:.1f} GB " if known else ""
            return f"Pass --download to fetch {amount}from {hosts}, or correct `path`."
        if self.script:
            told = "Its `download` key is never run here"
            return f"{told}: fetch the data by hand, or correct `path`."
        return f"Correct the split or `path` (now {self.path})."


class Listing(NamedTuple):
    """The files of a split, found before anything is read: enough to tell whether a cache holds.

    Attributes:
        annotations: files that hold the annotations; one per image (which may be missing), or one
            for all images.
        images: image files; None if only the annotations tell which they are.
        remarks: files that do not come to use, or come to it twice.
    """

    annotations: list[str]
    images: list[str] | None
    remarks: tuple[Fault, ...] = ()
