"""Configs of `models/detect` with pasted blocks before their heads.

Every block is put before the heads of configs that know nothing of it, on each of the maps that the head reads:

    map     a row on a map; the head reads it instead
    last    the same on the coarsest map alone, for blocks that are made for one size of map
    down    from each map to the next coarser one's size, joined with that by Concat
    up      from each map to the next finer one's size, joined with that by Concat
    pair    two maps of one shape in, one out
    uneven  two maps of one size, the second half as wide
    steps   a map and the next coarser one in, one of the first's size out
    finest, middle  all maps in, one of the finest or the middle one's size out
    neck    all maps in, all maps out
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.pasted_table import PASTED, Args, C, H, Pasted
from models.parser.rows import read_model_config

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "pasted"
HEADS = ("yolov5n", "yolo11n", "rtdetr-r18")
WIDTHS = {
    "yolov5n": (256, 512, 1024),
    "yolo11n": (256, 512, 1024),
    "rtdetr-r18": (256, 256, 256),
    "tiny": (512, 512, 512),
}
"""Full widths of the maps that a head reads, from fine to coarse, before the size factor."""
TINY = {
    "scales": {"n": [0.5, 0.125, 1024]},
    "backbone": [[-1, 1, "Conv", [width, 3, 2]] for width in (64, 128, 512, 512, 512)],
    "head": [[[2, 3, 4], 1, "Detect", ["nc"]]],
}
"""A trunk of five convolutions, 64 channels to a map: what is read is read in a moment."""
CLASSES = 3
Row = list[Any]


class Site(NamedTuple):
    """A config that a block is put into.

    Attributes:
        config: without the head's own row.
        maps: what the head reads, from fine to coarse.
        widths: full widths of these maps.
        head: the head's row.
    """

    config: dict[str, Any]
    maps: list[int | str]
    widths: tuple[int, ...]
    head: Row


def site_of(head: str) -> Site:
    """The config of `head`, opened before its last row."""
    source: Any = TINY if head == "tiny" else head
    config = copy.deepcopy(read_model_config(source, num_classes=CLASSES)[1])
    last = config["head"].pop()
    return Site(config, list(last[0]), WIDTHS[head], last)


def filled(args: Any, width: int) -> Any:
    """The arguments with the widths that C and H stand for."""
    if isinstance(args, list):
        return [filled(arg, width) for arg in args]
    return {C: width, H: width // 2}.get(args, args) if isinstance(args, str) else args


def config_with(name: str, args: Args, head: str, module: str = "") -> dict[str, Any]:
    """The config of `head` with the block `name` before its head, as rows with `args`.

    Args:
        name: in `PASTED`.
        args: of a row.
        head: a name of `WIDTHS`.
        module: how the row names it, if it is not by `name`.
    """
    pasted, site = PASTED[name], site_of(head)
    rows, reads = _PLACES[pasted.place](site, pasted, module or name, args)
    config = site.config
    config["imports"] = [imported_path(name)]
    config["head"] = [*config["head"], *rows, [reads, *site.head[1:]]]
    return config


def imported_path(name: str) -> str:
    """The file or the package that defines a block."""
    path = FOLDER / PASTED[name].file
    return str(path if path.is_dir() else path.with_suffix(".py"))


Placed = tuple[list[Row], list[Any]]


def _on_maps(site: Site, pasted: Pasted, module: str, args: Args, first: int = 0) -> Placed:
    rows: list[Row] = []
    reads = list(site.maps)
    for k in range(first, len(reads)):
        rows.append([reads[k], pasted.repeats, module, filled(args, site.widths[k]), f"own{k}"])
        reads[k] = f"own{k}"
    return rows, reads


def _on_last(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    return _on_maps(site, pasted, module, args, len(site.maps) - 1)


def _down(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    return _sampled(site, module, args, [(k, k + 1) for k in range(len(site.maps) - 1)])


def _up(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    return _sampled(site, module, args, [(k + 1, k) for k in range(len(site.maps) - 1)])


def _sampled(site: Site, module: str, args: Args, ways: Sequence[tuple[int, int]]) -> Placed:
    rows: list[Row] = []
    reads = list(site.maps)
    for source, target in ways:
        own = filled(args, site.widths[target])
        rows.append([site.maps[source], 1, module, own, f"own{target}"])
        rows.append([[f"own{target}", site.maps[target]], 1, "Concat", [1], f"joined{target}"])
        reads[target] = f"joined{target}"
    return rows, reads


def _pair(site: Site, pasted: Pasted, module: str, args: Args, part: int = 1) -> Placed:
    rows: list[Row] = []
    reads = list(site.maps)
    for k, width in enumerate(site.widths):
        rows.append([site.maps[k], 1, "Conv", [width // part, 3, 1], f"other{k}"])
        rows.append([[site.maps[k], f"other{k}"], 1, module, filled(args, width), f"own{k}"])
        reads[k] = f"own{k}"
    return rows, reads


def _uneven(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    return _pair(site, pasted, module, args, part=2)


def _steps(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    rows: list[Row] = []
    reads = list(site.maps)
    for k in range(len(reads) - 1):
        source = [site.maps[k], site.maps[k + 1]]
        rows.append([source, 1, module, filled(args, site.widths[k]), f"own{k}"])
        reads[k] = f"own{k}"
    return rows, reads


def _all_into(place: int) -> Any:
    def rows_of(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
        reads = list(site.maps)
        row = [list(site.maps), 1, module, filled(args, site.widths[place]), "own"]
        reads[place] = "own"
        return [row], reads

    return rows_of


def _neck(site: Site, pasted: Pasted, module: str, args: Args) -> Placed:
    row = [list(site.maps), 1, module, filled(args, site.widths[0]), "neck"]
    return [row], [int(s) if s.lstrip("-").isdigit() else s for s in pasted.source.split()]


_PLACES: dict[str, Any] = {
    "map": _on_maps, "last": _on_last, "down": _down, "up": _up, "pair": _pair, "uneven": _uneven, "steps": _steps,
    "finest": _all_into(0), "middle": _all_into(1), "neck": _neck,
}  # fmt: skip


def expected_reading(name: str, channels: Sequence[int], shape: Sequence[int], row: Any) -> str:
    """Arguments as the model's table must show them.

    Args:
        name: in `PASTED`.
        channels: of the row's inputs.
        shape: (C, height, width) that comes out.
        row: of the built model.
    """
    height, width = shape[-2:]
    own = channels[0]
    values = {
        "c": own, "h": own // 2, "cs": list(channels), "n": row.repeats,
        "next": channels[1] if PASTED[name].place == "steps" else shape[0],
        "h_": height, "w": width, "hw": (height, width),
    }  # fmt: skip
    return PASTED[name].reads.format(**values)
