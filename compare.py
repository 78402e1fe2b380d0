"""Several models side by side: parameters, GFLOPs, latency, memory and mAP in one table and one picture.

python compare.py --models yolov5n yolov5n-emo yolo11n --imgsz 320
python compare.py --models runs/train/exp/weights/best.pt runs/train/exp2/weights/best.onnx --data my.yaml
"""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.dataset import build_dataset
from data.loader import build_loader
from deploy.backends import Backend, load_backend
from engine.evaluation import evaluate
from engine.flags import add_data_flag, add_device_flag, add_run_flags, add_size_flag
from engine.outputs import tell_other_score
from engine.setup import check_classes, open_data
from models.reparam import reparameterize_model
from models.table import Totals, measure
from models.weights.load import load_weights
from models.yolo import build_model
from utils.config import ArgumentParser, increment_path, integer, parse_imgsz
from utils.device import select_device, synchronize
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger
from utils.metrics import CocoEvaluator


class Line(NamedTuple):
    """One model's row.

    Attributes:
        name: what was given.
        params: parameters of the training form, None for an exported file.
        params_deployed: of the deployed form.
        gflops: 2 x GMACs of the deployed form for one image.
        latency: median milliseconds for one image, deployed form.
        memory: MiB of weights and maps of the deployed form at a time for one image, None for an exported file.
        map50: COCO mAP at 0.5, None without `--data`.
        map50_95: COCO mAP.
    """

    name: str
    params: int | None
    params_deployed: int | None
    gflops: float | None
    latency: float
    memory: float | None
    map50: float | None
    map50_95: float | None


CONFIG_SIZE = 640  # of models without weights, which have no size of their own


class Candidate(NamedTuple):
    """A model to compare: how it is called, how large it is, and the image size it is measured at."""

    name: str
    imgsz: tuple[int, int]
    run: Callable[[Tensor], Any]
    backend: Backend | None
    trained: Totals | None
    deployed: Totals | None


def load_candidate(name: str, options: Any, device: torch.device) -> Candidate:
    """A weights file, an exported file, or a config (with `--backbone`); weights at their own size unless a flag says another."""
    path = Path(name)
    if path.suffix in (".pt", ".safetensors"):
        if options.backbone:
            raise ConfigError(
                f"--backbone: belongs to configs; {name} says what it is. Leave one of them out."
            )
        allow = options.allow_code
        model = load_weights(path, allow_code=allow).model if path.suffix == ".pt" else None
        backend = load_backend(name, device, allow_code=allow)
        imgsz = _size(options, backend)
        totals = (
            (measure(model, imgsz), measure(reparameterize_model(model), imgsz))
            if model
            else (None, None)
        )
        run = path.resolve().parent.parent.name if path.parent.name == "weights" else ""
        shown = f"{run}/{path.name}" if run else path.name
        return Candidate(shown, imgsz, backend, backend, *totals)
    if path.exists() and path.suffix not in (".yaml", ".yml"):
        backend = load_backend(name, device)
        return Candidate(path.name, _size(options, backend), backend, backend, None, None)
    imgsz = parse_imgsz(options.imgsz or CONFIG_SIZE, 32)
    model = build_model(
        name, imgsz=imgsz, backbone=options.backbone, allow_code=options.allow_code
    ).eval()
    deployed = reparameterize_model(model).to(device)
    shown = f"{name} + {options.backbone[0]}" if options.backbone else name
    return Candidate(
        shown,
        imgsz,
        lambda x: deployed.decode(deployed(x)),
        None,
        measure(model, imgsz),
        measure(deployed, imgsz),
    )


def _size(options: Any, backend: Backend) -> tuple[int, int]:
    return parse_imgsz(options.imgsz, backend.stride) if options.imgsz else backend.imgsz


@torch.inference_mode()
def latencies(candidates: Sequence[Candidate], device: torch.device, runs: int) -> list[float]:
    """Median milliseconds of each candidate for one image; they take turns, so that a busy machine is fair to all."""
    images = [torch.rand(1, 3, *candidate.imgsz, device=device) for candidate in candidates]
    times: list[list[float]] = [[] for _ in candidates]
    for number in range(runs + 2):
        for candidate, image, taken in zip(candidates, images, times, strict=True):
            synchronize(device)
            start = time.perf_counter()
            candidate.run(image)
            synchronize(device)
            if number >= 2:  # the first two warm up
                taken.append(1000 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def measure_map(
    candidate: Candidate, options: Any, device: torch.device
) -> tuple[float, float] | None:
    """mAP50 and mAP50-95 on the validation split, for models with weights."""
    backend = candidate.backend
    if not options.data or backend is None:
        return None
    dataset = build_dataset(
        open_data(options, backend.info.white),
        "val",
        imgsz=candidate.imgsz,
        batch_size=16,
        stride=backend.stride,
    )
    check_classes(backend.names, dataset.names, candidate.name, options.data)
    loader = build_loader(dataset, 16, workers=options.workers)
    evaluator = CocoEvaluator(dataset.coco_ground_truth(), dataset.category_ids, dataset.names)
    result = evaluate(
        lambda images, targets: backend(images),
        backend.postprocess_kind,
        loader,
        evaluator,
        device=device,
    )
    tell_other_score(dataset, evaluator)
    return result.metrics.map50, result.metrics.map50_95


def format_lines(lines: Sequence[Line]) -> str:
    """The table as text."""
    head = f"{'model':<34}{'params':>12}{'deployed':>12}{'GFLOPs':>9}{'MiB':>8}{'ms':>9}{'mAP50':>8}{'mAP50-95':>10}"
    return "\n".join([head, *map(_format_line, lines)])


def _format_line(line: Line) -> str:
    def show(value: float | None, layout: str) -> str:
        return "-" if value is None else format(value, layout)

    return (
        f"{line.name[-32:]:<34}{show(line.params, ','):>12}{show(line.params_deployed, ','):>12}"
        f"{show(line.gflops, '.2f'):>9}{show(line.memory, '.1f'):>8}{line.latency:>9.1f}{show(line.map50, '.4f'):>8}"
        f"{show(line.map50_95, '.4f'):>10}"
    )


def plot(lines: Sequence[Line], path: Path) -> None:
    """Latency against mAP where it was measured, else against GFLOPs; the area is the parameters."""
    from matplotlib.figure import Figure

    with_map = all(line.map50_95 is not None for line in lines)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        height = line.map50_95 if with_map else line.gflops
        if height is None:
            continue
        area = (line.params_deployed or 1e6) / 2e4 + 20
        axes.scatter(line.latency, height, s=area, alpha=0.6, label=line.name)
    times = [line.latency for line in lines]
    if max(times) > 4 * min(times):  # else small models lie on top of each other
        axes.set_xscale("log")
        if not with_map:
            axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
    for mark in axes.legend(fontsize=9, title="area: parameters").legend_handles:
        mark.set_sizes([40])
    axes.set(xlabel="latency of one image, ms", ylabel="mAP50-95" if with_map else "GFLOPs")
    axes.margins(0.2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


def parse_options(arguments: Sequence[str] | None = None) -> Any:
    """Read the command line."""
    parser = ArgumentParser(description="Compare models: parameters, GFLOPs, latency, memory, mAP.")
    parser.add_argument(
        "--models",
        "--weights",
        "--cfg",
        nargs="+",
        required=True,
        help="configs, weights, exported files",
    )
    parser.add_argument(
        "--backbone",
        nargs="+",
        default=None,
        metavar="NAME",
        help="put this backbone under every config",
    )
    parser.add_argument("--allow-code", action="store_true", help="let a YAML's imports run")
    add_data_flag(parser)
    add_size_flag(parser, None)
    add_device_flag(parser)
    parser.add_argument("--runs", type=integer(1), default=10, help="timed calls of each model")
    parser.add_argument("--workers", type=integer(0), default=2, help="processes that load images")
    add_run_flags(parser, "runs/compare")
    parser.set_defaults(data=None)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    options = parse_options(arguments)
    device = select_device(options.device)
    candidates = [load_candidate(name, options, device) for name in options.models]
    times = latencies(candidates, device, options.runs)
    lines = []
    for candidate, latency in zip(candidates, times, strict=True):
        found = measure_map(candidate, options, device) or (None, None)
        params = candidate.trained.params if candidate.trained else None
        deployed = candidate.deployed
        lines.append(Line(
            candidate.name, params, deployed.params if deployed else None, deployed.gflops if deployed else None,
            latency, deployed.memory if deployed else None, *found,
        ))  # fmt: skip
    folder = increment_path(options.project, options.name, options.exist_ok)
    folder.mkdir(parents=True, exist_ok=True)
    print(format_lines(lines))
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(lines)
    plot(lines, folder / "compare.png")
    sizes = ", ".join(dict.fromkeys(f"{h}x{w}" for h, w in (c.imgsz for c in candidates)))
    get_logger().info(f"at {sizes} on {device}; table and picture in {folder}")


if __name__ == "__main__":
    run_cli(main)
