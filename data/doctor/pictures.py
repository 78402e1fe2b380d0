"""Pictures that are odd, and pictures that are there twice.

Two pictures are nearly the same where their coarse edges agree: each is shrunk to 17 x 17 grey
values, whose 2 x 16 x 16 slopes to the right and downwards, scaled to length 1, are its fingerprint.
The product of two fingerprints is their correlation. Other exposure, size, compression and a
shift of a few percent leave it near 1; unrelated pictures of one subject stay below 0.7.

Letters: n images.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from data.doctor.findings import Finding, Place, gathered
from data.formats.table import Table
from data.images import Image, ImageError, read_image

SIDE = 16
ALIKE = 0.9
"""Correlation from which two pictures are nearly the same."""
FLAT = 2.0
"""Standard deviation of grey, of 255, below which a picture has one colour."""
GREY = 1.0
"""Mean difference of channels, of 255, below which a picture is grey."""
MINORITY = 0.1
SHORTEST, LONGEST_ASPECT = 32, 6.0
BLOCK = 1024

Floats = NDArray[np.float32]


class Look(NamedTuple):
    """What one picture shows.

    Attributes:
        edges: fingerprint, (2 * SIDE**2,); zeros of a picture of one colour.
        is_flat: whether it has one colour.
        is_grey: whether its channels are equal.
        digest: of its pixels.
    """

    edges: Floats
    is_flat: bool
    is_grey: bool
    digest: bytes


class Looks(NamedTuple):
    """What the pictures of a split show; those that do not decode are empty ones.

    Attributes:
        edges: (n, 2 * SIDE**2).
        is_flat: (n,).
        is_grey: (n,).
        digests: n of them; empty where a picture does not decode.
        problems: what is wrong with those.
    """

    edges: Floats
    is_flat: NDArray[np.bool_]
    is_grey: NDArray[np.bool_]
    digests: list[bytes]
    problems: list[Place]


def look_at(image: Image) -> Look:
    """Fingerprint, digest and colour of a picture (H, W, 3)."""
    small = cv2.resize(image, (SIDE + 1, SIDE + 1), interpolation=cv2.INTER_AREA)
    grey = small.mean(2, dtype=np.float32)
    across, down = np.diff(grey, axis=1), np.diff(grey, axis=0)
    edges = np.stack([across[1:] + across[:-1], down[:, 1:] + down[:, :-1]]).ravel()
    spread = cv2.resize(image, (64, 64), interpolation=cv2.INTER_AREA).std((0, 1)).max()
    is_flat = bool(spread < FLAT)
    if is_flat:
        edges[:] = 0
    colour = float((small.max(2).astype(np.float32) - small.min(2)).mean())
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
    digest.update(repr(image.shape).encode())
    length = max(float(np.linalg.norm(edges)), 1e-6)
    return Look((edges / length).astype(np.float32), is_flat, colour < GREY, digest.digest())


def look_through(table: Table, white: float | None) -> Looks:
    """Decode and look at every picture of a split."""

    def look(path: str) -> Look | Place:
        try:
            return look_at(read_image(path, white))
        except ImageError as error:
            return Place(path, str(error).removeprefix(f"{path}: ").rstrip("."))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(look, table.paths))
    nothing = Look(np.zeros(2 * SIDE**2, np.float32), False, False, b"")
    looks = [nothing if isinstance(one, Place) else one for one in found]
    edges = np.array([one.edges for one in looks], np.float32).reshape(-1, 2 * SIDE**2)
    flat, grey = (np.array([one[k] for one in looks], np.bool_) for k in (1, 2))
    problems = [one for one in found if isinstance(one, Place)]
    return Looks(edges, flat, grey, [one.digest for one in looks], problems)


def mirrored(edges: Floats) -> Floats:
    """Fingerprints of the pictures with left and right exchanged, (n, 2 * SIDE**2)."""
    planes = (
        edges.reshape(-1, 2, SIDE, SIDE)[..., ::-1] * np.array([-1, 1], np.float32)[:, None, None]
    )
    return np.ascontiguousarray(planes).reshape(edges.shape)


def odd_pictures(split: str, table: Table, looks: Looks) -> list[Finding]:
    """Pictures that do not decode, are of one colour, tiny, very long, or grey among coloured ones."""
    places = [("unreadable", place) for place in looks.problems]
    decodes = np.array([bool(digest) for digest in looks.digests], np.bool_)
    sides = np.sort(table.sizes, axis=1)
    grey, colour = looks.is_grey & decodes & ~looks.is_flat, ~looks.is_grey & decodes
    few = MINORITY * decodes.sum()
    chosen = {
        "flat": looks.is_flat & decodes,
        "tiny": sides[:, 0] < SHORTEST,
        "strip": sides[:, 1] > LONGEST_ASPECT * sides[:, 0],
        "grey": grey & (grey.sum() < few),
        "colour": colour & (colour.sum() < few),
    }
    for kind, mask in chosen.items():
        for k in np.flatnonzero(mask).tolist():
            height, width = table.sizes[k].tolist()
            places.append((kind, Place(table.paths[k], f"{width} x {height}")))
    return gathered(split, places)


class Match(NamedTuple):
    """The picture that another one is most like.

    Attributes:
        split: its split.
        place: where it stands there.
        likeness: correlation; 1 of the same pixels.
        is_same: whether the pixels are the same.
        is_mirrored: whether left and right are exchanged.
    """

    split: str
    place: int
    likeness: float
    is_same: bool
    is_mirrored: bool


def find_repetitions(splits: Mapping[str, Looks]) -> Iterator[tuple[str, int, Match]]:
    """Split and place of every picture that an earlier one repeats, with that one; other splits first."""
    seen: dict[bytes, tuple[str, int]] = {}
    for number, (split, looks) in enumerate(splits.items()):
        own: dict[bytes, tuple[str, int]] = {}
        same: set[int] = set()
        for k, digest in enumerate(looks.digests):
            first = seen.get(digest) or own.setdefault(digest, (split, k))
            if digest and first != (split, k):
                same.add(k)
                yield split, k, Match(*first, 1.0, True, False)
        seen = {**own, **seen}
        for other in list(splits)[: number + 1]:
            for k, match in _alike(other, splits[other].edges, looks.edges, other == split):
                if k not in same:
                    same.add(k)
                    yield split, k, match


def _alike(other: str, among: Floats, of: Floats, is_own: bool) -> Iterator[tuple[int, Match]]:
    """Each picture with the one that it is nearly like; in the same split only earlier ones count."""
    forms = (among, mirrored(among))
    for start in range(0, len(of), BLOCK):
        rows = of[start : start + BLOCK]
        likeness = np.stack([rows @ form.T for form in forms])
        if is_own:
            later = np.arange(len(among)) >= start + np.arange(len(rows))[:, None]
            likeness[:, later] = -1
        best = likeness.max(0).argmax(1) if len(among) else np.zeros(len(rows), np.int64)
        for row in np.flatnonzero(likeness.max((0, 2), initial=-1) >= ALIKE).tolist():
            plain, turned = likeness[:, row, best[row]].tolist()
            match = Match(other, int(best[row]), max(plain, turned), False, turned > plain)
            yield start + row, match


def repetitions(
    tables: Mapping[str, Table], splits: Mapping[str, Looks], same: Sequence[str] = ()
) -> list[Finding]:
    """Pictures that are there twice, or nearly; splits in `same` are others by intent, and left out."""
    chosen = {split: looks for split, looks in splits.items() if split not in same}
    by_split: dict[str, list[tuple[str, Place]]] = {split: [] for split in chosen}
    for split, k, match in find_repetitions(chosen):
        path, other = tables[split].paths[k], tables[match.split].paths[match.place]
        if path == other and split == match.split:
            continue  # listed twice, which the readers tell
        kind = "twin" if match.split == split else "leak"
        how = "the same picture as" if match.is_same else f"{match.likeness:.2f} like"
        told = f"{how} {other}{' mirrored' if match.is_mirrored else ''}"
        place = Place(path, told, beside=other)
        by_split[split].append((kind if match.is_same else f"near {kind}", place))
        first = (tables[match.split], match.place)
        if match.is_same and not _same_labels(first, (tables[split], k)):
            by_split[split].append(("conflict", place._replace(problem=f"other labels: {other}")))
    return [finding for split, places in by_split.items() for finding in gathered(split, places)]


def _same_labels(first: tuple[Table, int], second: tuple[Table, int]) -> bool:
    """Whether two images have the same objects, to a pixel."""
    rows = []
    for table, k in (first, second):
        own = slice(int(table.offsets[k]), int(table.offsets[k + 1]))
        found = np.column_stack([table.labels[own], np.rint(table.boxes[own])])
        rows.append(sorted(map(tuple, found.tolist())))
    if len(rows[0]) != len(rows[1]):
        return False
    return bool(np.abs(np.array(rows[0]) - np.array(rows[1])).max(initial=0) <= 1)
