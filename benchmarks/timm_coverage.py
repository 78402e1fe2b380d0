"""How many models of the installed timm work as a backbone under the YOLO11 head, and why the others do not.

    python benchmarks/timm_coverage.py                          all of them; run it again to go on where it stopped
    python benchmarks/timm_coverage.py --models "test_*" resnet18
    python benchmarks/timm_coverage.py --report                 only print what has been found
    python benchmarks/timm_coverage.py --max-params 6e7         a quick first round; larger ones later, with a larger limit

Each model takes the place of yolo11n's backbone, then: strides 8, 16 and 32; raw outputs at 256x256 and, where timm allows
another size, at 256x320; a backward pass with a gradient on every parameter that trains; `fuse` within its tolerance. A model
above --max-params takes the same steps but fuse on the meta device, without memory, and is counted apart.

Models run in child processes of --chunk models, one at a time, limited to --memory GiB and --timeout seconds a model; every
result is one line of the JSONL file --out. The share is taken of the models whose features timm itself can run.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from benchmarks.children import read_results, run_open
from models.reparam import fuse
from models.table import count_params
from models.timm.features import create, timm_names
from models.yolo import DetectionModel, build_model
from utils.errors import UserError, foreign_code

SIZE = (256, 256)
OTHER_SIZE = (256, 320)
WORKS = ("works", "works on meta")


def check_model(name: str, max_params: float) -> dict[str, Any]:
    """What became of one model: `status`, and `reason` where it does not work."""
    start = time.perf_counter()
    result: dict[str, Any] = {"name": name, "step": "build"}
    try:
        with foreign_code():
            result["params"] = count_params(timm_model(name))
            is_small = result["params"] <= max_params
            with torch.device("cpu" if is_small else "meta"):
                model = build_model("yolo11n", backbone=[name], num_classes=3, imgsz=SIZE)
            _check_steps(model, result, "cpu" if is_small else "meta")
            result["status"] = "works" if is_small else "works on meta"
    except UserError as error:
        result["status"] = "fails" if timm_runs(name) else "timm cannot"
        result["reason"] = str(error)[:300]
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def _check_steps(model: DetectionModel, result: dict[str, Any], device: str) -> None:
    net: Any = model.model[0]
    result.update(strides=net.strides, any_size=net.any_size, unused=len(net.unused))
    if model.strides != (8, 16, 32):
        raise ValueError(f"the head has strides {model.strides}")
    result["step"] = "forward"
    model.eval()
    with torch.no_grad():
        for size in (SIZE, OTHER_SIZE) if net.any_size else (SIZE,):
            outputs = _tensors(model(torch.rand(1, 3, *size, device=device)))
            if device == "cpu" and not all(bool(t.isfinite().all()) for t in outputs):
                raise ArithmeticError(f"an output is not finite at {size}")
    result["step"] = "backward"
    model.train()
    outputs = [
        t for t in _tensors(model(torch.rand(2, 3, *SIZE, device=device))) if t.requires_grad
    ]
    sum((t.float().square().mean() for t in outputs), torch.zeros((), device=device)).backward()
    missing = [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None]
    if missing:
        raise ValueError(f"{len(missing)} parameters without a gradient: {', '.join(missing[:3])}")
    if device == "cpu":
        result["step"] = "fuse"
        model.zero_grad(set_to_none=True)
        result["difference"] = fuse(model).difference
    del result["step"]


def _tensors(raw: Any) -> list[Tensor]:
    return [
        leaf for leaf in tree_leaves(raw) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]


def timm_model(name: str) -> Any:
    """The model `name` without its classifier, on the meta device."""
    import timm

    with torch.device("meta"):
        return timm.create_model(name, num_classes=0)


def timm_runs(name: str) -> bool:
    """Whether timm itself can build the features of `name` and run them at the model's own input size."""
    import timm

    try:
        with foreign_code(), torch.device("meta"):
            config = timm.get_pretrained_cfg(name)
            assert config is not None
            create(name, {}).eval()(torch.rand(1, *config.input_size))
    except UserError:
        return False
    return True


def run_worker(names: list[str], memory: float, max_params: float) -> None:
    """Check `names` in this process, one JSON line each."""
    limit = int(memory * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        print(json.dumps(check_model(name, max_params)), flush=True)


def is_open(result: dict[str, Any] | None, max_params: float) -> bool:
    """Whether a model is still to be checked: never seen, or only on the meta device under a smaller limit than now."""
    if result is None:
        return True
    return result["status"] == "works on meta" and result["params"] <= max_params


def print_report(results: dict[str, dict[str, Any]], wanted: list[str]) -> None:
    """The share of working models and the reasons of the rest."""
    found = [results[name] for name in wanted if name in results]
    counts = Counter(result["status"] for result in found)
    possible = len(found) - counts["timm cannot"]
    working = sum(counts[status] for status in WORKS)
    print(
        f"{len(found)} of {len(wanted)} models checked; timm itself can run the features of {possible}."
    )
    print(f"work as a backbone: {working} of {possible} ({100 * working / max(possible, 1):.2f}%)")
    print(f"  of these on the meta device only, too large here: {counts['works on meta']}")
    print(
        f"  with a fixed image size: {sum(r.get('any_size') is False for r in found if r['status'] in WORKS)}"
    )
    print(
        f"  with frozen parameters that no map depends on: {sum(bool(r.get('unused')) for r in found)}"
    )
    for result in found:
        if result["status"] not in WORKS:
            print(
                f"{result['status']:12} {result['name']:40} {result.get('step', '')}: {result['reason'][:150]}"
            )


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["*"], help="names or patterns")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/timm_coverage.jsonl"), help="file of results"
    )
    parser.add_argument("--chunk", type=int, default=8, help="models of a child process")
    parser.add_argument(
        "--memory", type=float, default=12, help="address space of a child process in GiB"
    )
    parser.add_argument("--timeout", type=float, default=300, help="seconds a model")
    parser.add_argument(
        "--max-params", type=float, default=3e8, help="larger models are run on the meta device"
    )
    parser.add_argument("--report", action="store_true", help="print the results and stop")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check what has not been checked yet, then report."""
    args = parse_args()
    if args.worker:
        run_worker(args.worker, args.memory, args.max_params)
        return
    wanted = [
        n for n in timm_names() if any(fnmatch.fnmatch(n, pattern) for pattern in args.models)
    ]
    results = read_results(args.out)
    limits = ["--memory", str(args.memory), "--max-params", str(args.max_params)]
    command = [sys.executable, __file__, *limits, "--worker"]

    def next_models() -> list[str]:
        return [n for n in wanted if is_open(results.get(n), args.max_params)][: args.chunk]

    if not args.report:
        run_open(args.out, results, command, args.timeout, next_models)
    print_report(results, wanted)


if __name__ == "__main__":
    main()
