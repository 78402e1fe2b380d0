"""Several models side by side: parameters, GFLOPs, latency, memory and mAP in one table and one picture.

python compare.py --models yolov5n yolov5n-emo yolo11n --imgsz 320
python compare.py --models runs/train/exp/weights/best.pt runs/train/exp2/weights/best.onnx --data my.yaml

With --epochs it is a study: every config over every backbone is trained, measured and compared, each in a process of its
own; --resume goes on with one that was stopped. What it leaves stands in `study/plan.py`.

python compare.py --cfg yolo11n rtdetr-r18 --backbone none EMO_1M resnet18 --data my.yaml --epochs 30 --imgsz 320
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from data.dataset import LoadOptions
from deploy.backends import Backend, load_backend
from engine.evaluation import Validation, tell_other_score
from engine.flags import read_given, spelling
from engine.options import CompareOptions
from models.reparam import reparameterize_model
from models.table import Totals
from models.weights.load import load_weights
from models.yolo import DetectionModel, build_model
from study.latency import Timed, latencies
from study.measure import sizes_of
from study.plan import Entry, entries_of
from study.run import run_study
from utils.config import parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, run_cli
from utils.logger import get_logger

STUDY_ONLY = ("seeds", "budget", "runtime", "markdown", "train")
CONFIG_SIZE = 640  # of models without weights, which have no size of their own


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


class Candidate(NamedTuple):
    """A model to compare: how it is called, how large it is, and the image size it is measured at."""

    name: str
    imgsz: tuple[int, int]
    run: Callable[[Tensor], object]
    backend: Backend | None = None
    trained: Totals | None = None
    deployed: Totals | None = None


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare from the command line."""
    given = read_given(CompareOptions, arguments)
    options = CompareOptions(**given)
    if options.resume or options.epochs is not None:
        run_study(options, given.keys())
        return
    if idle := [spelling(name) for name in STUDY_ONLY if name in given]:
        raise ConfigError(
            f"{', '.join(idle)}: belongs to a study. Give --epochs too, or leave it out."
        )
    if not options.models:
        raise ConfigError("--models: got nothing, expected configs or weights. Name some.")
    device = select_device(options.device)
    entries = entries_of(options.models, options.backbone)
    candidates = [load_candidate(entry, options, device) for entry in entries]
    times = latencies([Timed(c.run, c.imgsz) for c in candidates], device, options.runs)
    lines = [
        line_of(candidate, latency.median, options, device)
        for candidate, latency in zip(candidates, times, strict=True)
    ]
    folder = options.make_folder()
    print(format_lines(lines))
    with (folder / "compare.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Line._fields)
        writer.writerows(lines)
    plot(lines, folder / "compare.png")
    sizes = ", ".join(dict.fromkeys(f"{h}x{w}" for h, w in (c.imgsz for c in candidates)))
    get_logger().info(f"at {sizes} on {device}; table and picture in {folder}")


def load_candidate(entry: Entry, options: CompareOptions, device: torch.device) -> Candidate:
    """A weights file, an exported file, or a config; weights at their own size unless a flag says another."""
    path, allow = entry.file, options.allow_code
    if path is None:
        return _of_config(entry, options, device)
    backend = load_backend(path, device, allow_code=allow)
    imgsz = parse_imgsz(options.imgsz, backend.stride) if options.imgsz else backend.imgsz
    if path.suffix != ".pt":
        return Candidate(entry.name, imgsz, backend, backend)
    model = load_weights(path, allow_code=allow).model
    return Candidate(entry.name, imgsz, backend, backend, *sizes_of(model, imgsz))


def _of_config(entry: Entry, options: CompareOptions, device: torch.device) -> Candidate:
    imgsz, words = parse_imgsz(options.imgsz or CONFIG_SIZE, 32), list(entry.backbone) or None
    model = build_model(
        entry.model, imgsz=imgsz, backbone=words, allow_code=options.allow_code
    ).eval()
    totals = sizes_of(model, imgsz)
    deployed = reparameterize_model(model).to(device)
    assert isinstance(deployed, DetectionModel)
    return Candidate(entry.name, imgsz, lambda x: deployed.decode(deployed(x)), None, *totals)


def line_of(
    candidate: Candidate, latency: float, options: CompareOptions, device: torch.device
) -> Line:
    """What is told of a model; mAP on the validation split for models with weights, if there is `--data`."""
    name, imgsz, _, backend, trained, deployed = candidate
    found: tuple[float | None, float | None] = (None, None)
    if options.data and backend is not None:
        load = LoadOptions(imgsz=imgsz, batch_size=16, stride=backend.stride)
        validation = Validation(backend, name, options, "val", load, options.workers)
        metrics, _ = validation.run(device)
        tell_other_score(validation.dataset, validation.evaluator)
        found = (metrics.map50, metrics.map50_95)
    params = trained.params if trained else None
    if deployed is None:
        return Line(name, params, None, None, latency, None, *found)
    return Line(name, params, deployed.params, deployed.gflops, latency, deployed.memory, *found)


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
    from matplotlib.collections import PathCollection
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
        if isinstance(mark, PathCollection):
            mark.set_sizes([40])
    axes.set(xlabel="latency of one image, ms", ylabel="mAP50-95" if with_map else "GFLOPs")
    axes.margins(0.2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    run_cli(main)
