"""Every config in every form: how long writing takes, how large the file is, how near it comes.

    python benchmarks/export_table.py                                   all of them; run again to go on where it stopped
    python benchmarks/export_table.py --configs "yolo11*" --scale n s m l x --formats onnx
    python benchmarks/export_table.py --report                          only print what has been found

Each config of `models/detect` is built with fresh weights, which are settled so that every part counts (see
`settling.py`), fused, and written with `--dynamic`, traced at --imgsz, batch 1. Every artifact is then run at
batches 1, 2 and 5, at the traced size and at --other, and each of the six results is compared with PyTorch's:
largest |difference| over largest |value|, of boxes and of scores, at most 1e-4. ONNX files pass onnx.checker with
full_check. The seconds are those of the writing alone, processor time beside wall time since machines are busy;
what fusing takes comes once a config on top.

Configs run in one child process each; every result is one line of the JSONL file --out. The exit code is 1 if a
comparison fails or fusing and writing takes more than 90 s of processor time.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.children import read_results, run_open
from benchmarks.settling import settle
from benchmarks.tables import aligned
from deploy.backends import load_backend
from deploy.exporters.forms import EXPORTERS
from deploy.exporters.network import ExportOptions
from deploy.exporters.verify import Reference, hold, predict, take_reference
from models.parser.rows import read_model_config
from models.reparam import FuseError, fuse
from models.table import count_params
from models.yolo import DetectionModel, build_model
from utils.config import parse_imgsz
from utils.errors import UserError

CONFIGS = Path(__file__).resolve().parent.parent / "models" / "detect"
FORMATS = ("onnx", "torchscript", "openvino", "pt2")
BATCHES = (1, 2, 5)
LIMIT = 1e-4
MOST_SECONDS = 90.0
FAILURES = (
    UserError, FuseError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError,
    OSError, MemoryError, ArithmeticError,
)  # fmt: skip


class Subject(NamedTuple):
    """A fused network and what it gives.

    Attributes:
        model: settled and fused.
        references: one for each batch and size, the traced size first.
        figures: what the results of all its formats share.
    """

    model: DetectionModel
    references: list[Reference]
    figures: dict[str, Any]


def prepare(config: str, sizes: Sequence[tuple[int, int]]) -> Subject:
    """Build, settle and fuse a config, and run it on the images of all comparisons."""
    name, _, scale = config.partition(":")
    torch.manual_seed(0)
    model = build_model(name, scale=scale or None, imgsz=sizes[0])
    figures: dict[str, Any] = {"params": count_params(model)}
    settle(model, sizes[0])
    start = time.process_time()
    figures["fuse_difference"] = fuse(model).difference
    figures["fuse_cpu"] = round(time.process_time() - start, 1)
    figures["params_fused"] = count_params(model)
    cases = [(batch, size) for size in sizes for batch in BATCHES]
    references = [take_reference(model, *case, seed=10 * i) for i, case in enumerate(cases)]
    figures["influence"] = influence(references[0], references[len(BATCHES)], references[1])
    return Subject(model, references, figures)


def influence(*references: Reference) -> list[float]:
    """How far apart two images of one batch are, over the largest value: of boxes, and of scores.

    What the comparison could not see if it were small.
    """
    shares = []
    for tensors in zip(*(r.decoded for r in references if len(r.images) > 1)):
        shares.append(min(float((t[0] - t[1]).abs().max() / t.abs().max()) for t in tensors))
    return shares


def check_format(
    subject: Subject, name: str, sizes: Sequence[tuple[int, int]], folder: Path
) -> dict[str, Any]:
    """Write one form and run it: seconds, megabytes, differences of each case, `status` and `reason`."""
    options = ExportOptions(imgsz=sizes[0], dynamic="all")
    result: dict[str, Any] = {**subject.figures, "step": "write"}
    wall, processor = time.perf_counter(), time.process_time()
    try:
        path = EXPORTERS[name].write(subject.model, options, folder / "artifact.pt")
        result["wall"] = round(time.perf_counter() - wall, 1)
        result["cpu"] = round(time.process_time() - processor, 1)
        result["megabytes"] = megabytes(path)
        result["step"] = "run"
        backend = load_backend(path, threads=1)
        cases = []
        for reference in subject.references:
            output = predict(backend, subject.model, reference.images, options)
            case = hold(output, subject.model, reference, options)
            cases.append([case.batch, *case.imgsz, *(gap.relative for gap in case.gaps)])
        result["cases"] = cases
        result.update(verdict(result))
    except FAILURES as error:
        result["status"] = "fails"
        result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    return result


def verdict(result: dict[str, Any]) -> dict[str, Any]:
    """`status`, and `reason` where the figures are not good enough."""
    far = [case for case in result["cases"] if not max(case[3:]) <= LIMIT]
    seconds = result["fuse_cpu"] + result["cpu"]
    faults = [f"batch {b} at {h}x{w}: boxes {x:.1e}, scores {s:.1e}" for b, h, w, x, s in far]
    if seconds > MOST_SECONDS:
        faults.append(f"{seconds:.0f} s of processor time, expected at most {MOST_SECONDS:.0f}")
    if faults:
        return {"status": "fails", "step": "compare", "reason": "; ".join(faults)}
    return {"status": "works", "step": ""}


def megabytes(path: Path) -> float:
    """Size of a file, or of what lies in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return round(sum(file.stat().st_size for file in files) / 1e6, 1)


def run_worker(names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> None:
    """Check `config format` pairs of one config in this process, one JSON line each."""
    torch.set_num_threads(1)
    config = names[0].split()[0]
    try:
        subject = prepare(config, sizes)
    except FAILURES as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        for name in names:
            result = {"name": name, "status": "fails", "step": "prepare", "reason": reason}
            print(json.dumps(result), flush=True)
        return
    for name in names:
        folder = Path(tempfile.mkdtemp())
        try:
            result = check_format(subject, name.split()[1], sizes, folder)
        finally:
            shutil.rmtree(folder)
        print(json.dumps({"name": name, **result}), flush=True)


def find_configs(patterns: Sequence[str], scales: Sequence[str]) -> list[str]:
    """Names such as `yolov5n` or `yolo11:m`, smallest first.

    Args:
        patterns: of the files' stems.
        scales: of those wanted, where a file has several; the others are left out.
    """
    found: dict[str, int] = {}
    for path in sorted(CONFIGS.glob("*.yaml")):
        if not any(fnmatch.fnmatch(path.stem, pattern) for pattern in patterns):
            continue
        known = list(read_model_config(path)[1].get("scales") or {})
        chosen = [scale for scale in known if scale in scales] if len(known) > 1 else []
        for scale in chosen or [None]:
            with torch.device("meta"):
                size = count_params(build_model(path.stem, scale=scale))
            found[f"{path.stem}:{scale}" if scale else path.stem] = size
    return sorted(found, key=found.__getitem__)


def format_table(results: dict[str, dict[str, Any]], wanted: Sequence[str]) -> str:
    """One line a result, aligned; below it what failed and why, and the extremes."""
    head = ("config", "format", "params (M)", "fuse cpu s", "cpu s", "wall s", "MB", "boxes", "scores", "status")  # fmt: skip
    found = [results[name] for name in wanted if name in results]
    rows = [head, *(_row(result) for result in found)]
    lines = aligned(rows)
    failed = [r for r in found if r["status"] != "works"]
    lines += [f"fails: {r['name']} at {r.get('step')}: {r['reason']}" for r in failed]
    lines += list(_extremes([r for r in found if r["status"] == "works"]))
    lines.append(f"{len(found) - len(failed)} of {len(found)} work; {len(wanted)} wanted")
    return "\n".join(lines)


def _row(r: dict[str, Any]) -> tuple[str, ...]:
    boxes, scores = (
        f"{max(case[i] for case in r['cases']):.1e}" if r.get("cases") else "-" for i in (3, 4)
    )
    times = [f"{r[key]:.1f}" if key in r else "-" for key in ("fuse_cpu", "cpu", "wall", "megabytes")]  # fmt: skip
    params = f"{r['params'] / 1e6:.2f}" if "params" in r else "-"
    return (*r["name"].split(), params, *times, boxes, scores, r["status"])


def _extremes(found: Sequence[dict[str, Any]]) -> Iterator[str]:
    if not found:
        return
    slowest = max(found, key=lambda r: r["fuse_cpu"] + r["cpu"])
    yield (
        f"slowest: {slowest['name']}, {slowest['fuse_cpu'] + slowest['cpu']:.1f} s of processor time with "
        f"fusing; largest difference {max(max(c[3:]) for r in found for c in r['cases']):.1e}"
    )
    least = [min(r["influence"][i] for r in found) for i in (0, 1)]
    yield f"two images differ by at least {least[0]:.1e} in boxes and {least[1]:.1e} in scores"


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=["*"], help="stems in models/detect, or patterns")
    add("--formats", nargs="+", default=list(FORMATS), choices=FORMATS)
    add("--scale", nargs="+", default=["n", "m"], help="of configs that have several")
    add("--imgsz", nargs="+", type=int, default=[160], help="traced size")
    add("--other", nargs="+", type=int, default=[128, 224], help="second size")
    add("--out", type=Path, default=Path("runs/export_table.jsonl"), help="file of results")
    add("--timeout", type=float, default=600, help="seconds a format")
    add("--again", action="store_true", help="check what failed before once more")
    add("--report", action="store_true", help="print the results and stop")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check what has not been checked yet, then report."""
    args = parse_args()
    sizes = [parse_imgsz(size, 32) for size in (args.imgsz, args.other)]
    if args.worker:
        run_worker(args.worker, sizes)
        return
    configs = find_configs(args.configs, args.scale)
    wanted = [f"{config} {name}" for config in configs for name in args.formats]
    results = read_results(args.out)
    if args.again:
        results = {name: r for name, r in results.items() if r["status"] == "works"}
    shapes = [["--imgsz", *map(str, sizes[0])], ["--other", *map(str, sizes[1])]]
    command = [sys.executable, __file__, *shapes[0], *shapes[1], "--worker"]

    def next_config() -> list[str]:
        todo = [name for name in wanted if name not in results]
        return [name for name in todo if name.split()[0] == todo[0].split()[0]]

    if not args.report:
        run_open(args.out, results, command, args.timeout, next_config)
    print(format_table(results, wanted))
    if any(results[name]["status"] != "works" for name in wanted if name in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
