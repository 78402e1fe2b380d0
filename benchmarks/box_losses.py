"""The built-in shapes learnt with each box loss, everything else alike.

    python benchmarks/box_losses.py                                       all of them; run again to go on where it stopped
    python benchmarks/box_losses.py --cfg yolov5n --losses giou inner-ciou --seeds 0 1 2
    python benchmarks/box_losses.py --report                              only print what has been found

Every training is a child process of one thread on the CPU; its result, the epoch of highest fitness in its
results.csv, is one line of the JSONL file --out. Two trainings that differ in nothing but --seed tell how
much of a difference is chance: give several seeds, and read a difference below their spread as none.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import train
from benchmarks.children import Result, read_results, run_open
from benchmarks.tables import aligned
from models.losses.measures import BOX_LOSSES

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("inner-ciou", "focal-eiou", "alpha-ciou", "alpha-giou")
FITNESS = (0.1, 0.9)  # of mAP50 and mAP50-95, as train.py weighs them


def train_once(name: str, args: argparse.Namespace) -> Result:
    """Run one training; `name` is `config loss seed`."""
    cfg, loss, seed = name.split()
    torch.set_num_threads(1)
    start = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        train.main([
            "--cfg", cfg, "--box-loss", loss, "--seed", seed, "--data", args.data, "--hyp", args.hyp,
            "--imgsz", str(args.imgsz), "--epochs", str(args.epochs), "--batch-size", str(args.batch_size),
            "--device", "cpu", "--workers", "0", "--noplots", "--patience", "0",
            "--project", folder, "--name", "run",
        ])  # fmt: skip
        best = best_epoch(Path(folder) / "run" / "results.csv")
    return {"name": name, "status": "works", **best, "cpu": time.process_time() - start}


def best_epoch(path: Path) -> dict[str, float]:
    """Number, mAP50 and mAP50-95 of the epoch of highest fitness in a results.csv."""
    with path.open(encoding="utf-8") as file:
        rows = [
            (float(r["metrics/mAP_0.5"]), float(r["metrics/mAP_0.5:0.95"]))
            for r in csv.DictReader(file)
        ]
    fitness = [sum(w * v for w, v in zip(FITNESS, row)) for row in rows]
    best = max(range(len(rows)), key=fitness.__getitem__)
    return {"epoch": best + 1, "map50": rows[best][0], "map": rows[best][1]}


def format_table(results: dict[str, Result], wanted: list[str]) -> str:
    """A line a config and loss, best first: means over the seeds, and from the lowest to the highest."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for name in wanted:
        result = results.get(name, {"status": "open"})
        if result["status"] == "works":
            groups.setdefault(tuple(name.split()[:2]), []).append(result)
    lines = sorted(
        (row(key, found) for key, found in groups.items()), key=lambda r: (r[0], -float(r[4]))
    )
    head = ("config", "box loss", "seeds", "mAP50", "mAP50-95", "lowest to highest", "CPU s")
    failed = [r for name in wanted if (r := results.get(name)) and r["status"] != "works"]
    reasons = [f"fails: {r['name']}: {r.get('reason', '')}" for r in failed]
    return "\n".join([*aligned([head, *lines]), *reasons])


def row(key: tuple[str, ...], found: list[Result]) -> tuple[str, ...]:
    """Cells of one line."""
    precise = [result["map"] for result in found]
    mean = {
        name: statistics.fmean(result[name] for result in found) for name in ("map50", "map", "cpu")
    }
    spread = f"{min(precise):.3f} to {max(precise):.3f}" if len(found) > 1 else "-"
    return (
        *key,
        str(len(found)),
        f"{mean['map50']:.3f}",
        f"{mean['map']:.3f}",
        spread,
        f"{mean['cpu']:.0f}",
    )


def parse_args() -> Any:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--cfg", nargs="+", default=["yolo11n"], help="model configs")
    add("--losses", nargs="+", default=[*BOX_LOSSES, *FORMS], help="names of box losses")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--epochs", type=int, default=10)
    add("--imgsz", type=int, default=160)
    add("--batch-size", type=int, default=16)
    add(
        "--hyp", default=str(ROOT / "data" / "hyps" / "quick.yaml"), help="recipe over the family's"
    )
    add("--data", default=str(ROOT / "data" / "shapes.yaml"))
    add(
        "--out", type=Path, default=ROOT / "runs" / "box_losses.jsonl", help="JSONL file of results"
    )
    add("--timeout", type=float, default=7200, help="seconds a training may take")
    add("--report", action="store_true", help="only print what has been found")
    add("--worker", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Train what has not been trained yet, then report."""
    args = parse_args()
    if args.worker:
        for name in args.worker:
            print(json.dumps(train_once(name, args)), flush=True)
        return
    results = read_results(args.out)
    wanted = [f"{c} {loss} {seed}" for seed in args.seeds for c in args.cfg for loss in args.losses]
    os.environ["OMP_NUM_THREADS"] = "1"
    command = [sys.executable, __file__]
    for key in ("epochs", "imgsz", "batch_size", "hyp", "data"):
        command += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
    if not args.report:
        run_open(
            args.out, results, [*command, "--worker"], args.timeout,
            lambda: [name for name in wanted if name not in results][:1],
        )  # fmt: skip
    print(format_table(results, wanted))


if __name__ == "__main__":
    main()
