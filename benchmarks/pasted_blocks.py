"""Pasted blocks, fusions and necks, none registered, before the heads of three families: read, built, trained, fused, exported.

    python benchmarks/pasted_blocks.py                       all of them; run again to go on where it stopped
    python benchmarks/pasted_blocks.py --blocks CBAM SimAM --heads yolo11n
    python benchmarks/pasted_blocks.py --report              only print what has been found

The files are those of tests/pasted/, the rows those of `pasted_table.py`. A block works under a head when

1. every kind of row that names it builds, and the model's table shows the constructor's arguments as its author
   means them;
2. one step of the family's recipe gives every parameter that trains a finite gradient;
3. it predicts finite boxes with settled weights, and `fuse` is within its own tolerance;
4. its ONNX file gives what PyTorch gives.

Under `FORMATS_HEAD` the other formats are written and compared as well; where one cannot, the reason is told below the
table. Blocks run in child processes; every result is one line of the JSONL file --out. The exit code is 1 if a
block does not work, or a format cannot that `CANNOT` does not name.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.children import read_results, run_open
from benchmarks.coupling_matrix import CLASSES, FAILURES, require_finite, train_step
from benchmarks.pasted_places import HEADS, config_with, expected_reading
from benchmarks.pasted_table import PASTED, Args
from benchmarks.settling import settle
from benchmarks.tables import aligned
from deploy.exporters.forms import EXPORTERS
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.verify import verify
from models.parser.wiring import Row
from models.reparam import fuse
from models.table import count_params
from models.yolo import DetectionModel, build_model
from utils.errors import UserError, foreign_code

SIZE = (64, 96)
RANKING_SIZE = (128, 160)  # RT-DETR ranks 300 places
FORMATS = ("onnx", "torchscript", "openvino", "pt2")
FORMATS_HEAD = "yolo11n"
LIMIT = 1e-4
CHUNK = 12  # names a child process, whose start takes as long as one of them
CANNOT = {
    "NAM pt2": "fake tensor",  # .data in forward
    **{f"{name} openvino": "no DeformConv" for name in ("DeformBlock", "DyHeadLike", "DCNConv")},
    # One cell stands at the gate's threshold of 0.5 but for rounding; at 0.5001 they agree to 8e-7.
    "ScConv x rtdetr-r18 onnx": "differs from PyTorch",
}
"""`block format` or `block x head format` -> a part of the reason why it is not written, or not equal."""


def size_of(head: str) -> tuple[int, int]:
    """Small, and not square."""
    return RANKING_SIZE if head.startswith("rtdetr") else SIZE


def build(name: str, args: Args, head: str, module: str = "") -> DetectionModel:
    """The config of `head` with the block in it, by a row with `args`."""
    config = config_with(name, args, head, module)
    torch.manual_seed(0)
    return build_model(config, num_classes=CLASSES, imgsz=size_of(head), allow_code=True)


def check_block(name: str, head: str, folder: Path, formats: Sequence[str]) -> dict[str, Any]:
    """What became of a block under a head: `status`, the figures, and `step` and `reason` where it does not work.

    Args:
        name: in `PASTED`.
        head: one of `HEADS`.
        folder: where files are written for the moment.
        formats: to write beside ONNX; their differences, or why they cannot, are `formats`.
    """
    start = time.process_time()
    result: dict[str, Any] = {"step": "build"}
    try:
        _check_steps(name, head, folder, formats, result)
        result["status"] = "works"
        del result["step"]
    except FAILURES as error:
        result["status"] = "fails"
        result["reason"] = _told(error)
    result["seconds"] = round(time.process_time() - start, 1)
    return result


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _check_steps(
    name: str, head: str, folder: Path, formats: Sequence[str], result: dict[str, Any]
) -> None:
    model = build(name, PASTED[name].rows[0], head)
    result.update(params=count_params(model), read=readings(model, name)[-1])
    result["step"] = "read"
    check_readings(model, name)
    for number, args in enumerate(PASTED[name].rows[1:]):
        result["step"] = f"row {number + 1} {args}"
        check_same(model, build(name, args, head), name)
    result["step"] = "train"
    check_frozen(model, name)
    train_step(model, size_of(head))
    result["step"] = "evaluate"
    settle(model, size_of(head))
    with torch.no_grad():
        decoded = model.decode(model(blobs(1, size_of(head), seed=3)))
    require_finite({"boxes": decoded.boxes, "scores": decoded.scores}.items(), "predictions")
    result["step"] = "fuse"
    fused = copy.deepcopy(model)
    result["fuse"] = fuse(fused).difference
    result["step"] = "export"
    result["formats"] = dict(write_all(fused, head, folder, ("onnx", *formats)))
    result["onnx"] = result["formats"]["onnx"]
    if _is_reason(result["onnx"]) and not known_reason(name, head, "onnx"):
        raise ValueError(f"onnx: {result['onnx']}")


def known_reason(name: str, head: str, form: str) -> str:
    """What `CANNOT` says of a block in a format, under this head or any."""
    return CANNOT.get(f"{name} x {head} {form}") or CANNOT.get(f"{name} {form}", "")


def write_all(
    fused: DetectionModel, head: str, folder: Path, formats: Sequence[str]
) -> Iterator[tuple[str, float | str]]:
    """For each format the largest relative difference from PyTorch, or the reason why there is none."""
    options = ExportOptions(imgsz=size_of(head))
    for form in formats:
        try:
            with foreign_code():  # openvino has errors of its own
                path = EXPORTERS[form].write(fused, options, folder / "block.pt")
                cases = verify(path, fused, options)
            yield form, max(c.relative for c in cases)
        except UserError as error:
            yield form, str(error)


def own_rows(model: DetectionModel, name: str) -> list[Row]:
    """The rows that name the block, of whatever file."""
    return [row for row in model.rows if row.module.split(".")[-1] == name]


def readings(model: DetectionModel, name: str) -> list[str]:
    """How the constructor of each of its rows was called, as the table prints it."""
    return [row.args for row in own_rows(model, name)]


def check_readings(model: DetectionModel, name: str) -> None:
    """Compare what the table prints with what the block's author means.

    Raises:
        ValueError: some argument has another value.
    """
    widths = {
        slot: shape[0] for row in model.rows for slot, shape in zip(_filled_slots(row), row.shape)
    }
    for row in own_rows(model, name):
        channels = [widths[slot] for slot in row.inputs]
        expected = f"{name}({expected_reading(name, channels, row.shape[0], row)})"
        missing = [part for part in _parts(expected) if part not in _parts(row.args)]
        if missing:
            raise ValueError(f"read as {row.args}, expected {expected}")


def _filled_slots(row: Row) -> list[int]:
    return sorted(s for s in row.map_slots if s is not None) if row.map_slots else [row.index]


def _parts(arguments: str) -> list[str]:
    """`CBAM(c1=64, k=(3, 3))` -> `["c1=64", "k=(3, 3)"]`; lists and tuples look alike."""
    inside = arguments[arguments.find("(") + 1 : -1]
    text, depth = inside.replace("[", "(").replace("]", ")"), 0
    parts = [""]
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def check_same(model: DetectionModel, other: DetectionModel, name: str) -> None:
    """Require that another kind of row means the same.

    Raises:
        ValueError: it was read in another way.
    """
    check_readings(other, name)
    shapes = [[(k, v.shape) for k, v in m.state_dict().items()] for m in (model, other)]
    if shapes[0] != shapes[1]:
        raise ValueError("gives other parameters")


def check_frozen(model: DetectionModel, name: str) -> None:
    """Require that the block's parameters train, but for those that no map which is read has a use for.

    Raises:
        ValueError: others do not train.
    """
    useless = set(PASTED[name].frozen.split())
    for row, module in zip(model.rows, model.model, strict=True):
        if row in own_rows(model, name):
            still = [n for n, p in module.named_parameters() if not p.requires_grad]
            if set(still) != useless:
                raise ValueError(f"parameters that do not train: {still}, expected {useless}")


def run_worker(names: Sequence[str]) -> None:
    """Check `block x head` names in this process, one JSON line each."""
    torch.set_num_threads(1)
    for name in names:
        block, head = name.split(" x ")
        with tempfile.TemporaryDirectory() as folder:
            formats = FORMATS[1:] if head == FORMATS_HEAD else ()
            result = check_block(block, head, Path(folder), formats)
        print(json.dumps({"name": name, **result}), flush=True)


def format_table(results: dict[str, dict[str, Any]], wanted: Sequence[str]) -> str:
    """One line a block, aligned; below it what failed and why, and what formats cannot."""
    blocks = list(dict.fromkeys(name.split(" x ")[0] for name in wanted))
    rows: list[tuple[str, ...]] = [("block", "row", "read as", *HEADS, *FORMATS)]
    for block in blocks:
        found = {head: results.get(f"{block} x {head}") for head in HEADS}
        read = next((r["read"] for r in found.values() if r and "read" in r), "-")
        formats = (found[FORMATS_HEAD] or {}).get("formats", {})
        written = [_cell(formats[form]) if form in formats else "-" for form in FORMATS]
        rows.append((block, _row_text(block), read, *map(_status, found.values()), *written))
    lines = aligned(rows)
    failed = [n for n in wanted if n in results and results[n]["status"] != "works"]
    lines += [f"fails: {n} at {results[n].get('step')}: {results[n]['reason']}" for n in failed]
    for name in wanted:
        formats = results.get(name, {}).get("formats", {})
        lines += [f"cannot: {name} {f}: {why}" for f, why in formats.items() if _is_reason(why)]
    count = sum(name in results for name in wanted)
    lines.append(f"{count - len(failed)} of {count} work; {len(wanted)} wanted")
    return "\n".join(lines)


def _row_text(block: str) -> str:
    shown = str(PASTED[block].rows[0]).replace("'", "")
    return shown.replace("<width>", "C").replace("<half>", "C/2")


def _is_reason(value: Any) -> bool:
    return isinstance(value, str)


def _cell(value: float | str) -> str:
    return "no" if isinstance(value, str) else f"{value:.0e}"


def _status(result: dict[str, Any] | None) -> str:
    if result is None:
        return "-"
    return _cell(result["onnx"]) if result["status"] == "works" else f"fails: {result.get('step')}"


def unexpected(results: dict[str, dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    """What does not work and is not named in `CANNOT`."""
    found = [results[name] for name in wanted if name in results]
    faults = [r["name"] for r in found if r["status"] != "works"]
    for result in found:
        for form, why in result.get("formats", {}).items():
            block, head = result["name"].split(" x ")
            known = known_reason(block, head, form)
            if _is_reason(why) != bool(known) or (known and known not in why):
                faults.append(f"{result['name']} {form}")
    return faults


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--blocks", nargs="+", default=list(PASTED), choices=list(PASTED), metavar="NAME")
    add("--heads", nargs="+", default=list(HEADS), choices=HEADS, metavar="NAME")
    add("--out", type=Path, default=Path("runs/pasted_blocks.jsonl"), help="file of results")
    add("--timeout", type=float, default=300, help="seconds a block under a head")
    add("--again", action="store_true", help="check what failed before once more")
    add("--report", action="store_true", help="print the results and stop")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check what has not been checked yet, then report."""
    args = parse_args()
    if args.worker:
        run_worker(args.worker)
        return
    wanted = [f"{block} x {head}" for block in args.blocks for head in args.heads]
    results = read_results(args.out)
    if args.again:
        results = {name: r for name, r in results.items() if r["status"] == "works"}

    def next_names() -> list[str]:
        return [name for name in wanted if name not in results][:CHUNK]

    if not args.report:
        command = [sys.executable, __file__, "--worker"]
        run_open(args.out, results, command, args.timeout, next_names)
    print(format_table(results, wanted))
    if unexpected(results, wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
