"""Every family of backbone under every head: built, trained a step, evaluated, fused, exported.

    python benchmarks/coupling_matrix.py                      all cells; run again to go on where it stopped
    python benchmarks/coupling_matrix.py --backbones EMO Swin --heads yolo11n "yolo11n end2end"
    python benchmarks/coupling_matrix.py --report             only print what has been found

A cell works when

1. the head has strides 8, 16 and 32, D-FINE-N 16 and 32;
2. one step of its family's recipe (loss, gradients, optimiser) at a small size gives every parameter that
   trains a finite gradient, and leaves finite weights;
3. it predicts finite boxes at 320x416, or at its own size where a backbone is made for one;
4. `fuse` is within its own tolerance;
5. its ONNX file, of any batch, and of any size where the backbone allows that, gives what PyTorch gives: batches of
   1 and 4, and of 2 and 5 at a second size.

Before 3 the weights are settled as a training leaves them, else a fault would not show. Cells run in one child
process a backbone; every result is one line of the JSONL file --out. The differences are parts of the largest value
of their tensor; decoded values of the YOLO heads are float32, so what folding changes in float64 is often lost in
their rounding and reads 0. The exit code is 1 if a cell does not work.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.children import read_results, run_open
from benchmarks.settling import settle
from benchmarks.tables import aligned
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.verify import verify
from engine.recipe import recipe
from models.family import build_criterion, total_loss
from models.reparam import FuseError, fuse
from models.table import count_params
from models.yolo import DetectionModel, build_model
from utils.errors import UserError
from utils.optim import build_optimizer, clip_gradients
from utils.structures import Targets

SIZE = (320, 416)
TRAIN_SIZE = (96, 128)
RANKING_TRAIN_SIZE = (128, 160)  # RT-DETR ranks 300 places
CLASSES = 3
STRIDES = (8, 16, 32)
FAILURES = (
    UserError, FuseError, RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError,
    OSError, MemoryError, ArithmeticError,
)  # fmt: skip


class Backbone(NamedTuple):
    """What is put under a head.

    Attributes:
        words: as behind `--backbone`.
        rows: rows of a YAML instead, for stages that are no backbone by themselves.
    """

    words: tuple[str, ...] = ()
    rows: tuple[tuple[Any, ...], ...] = ()


MOBILEONE_STAGES = (
    (-1, 1, "Conv", [48, 3, 2]),
    (-1, 1, "MobileOne", [48, 2, 4, False, 0]),
    (-1, 1, "MobileOne", [128, 8, 4, False, 0]),
    (-1, 1, "MobileOne", [256, 10, 4, True, 2]),
    (-1, 1, "MobileOne", [1024, 1, 4, True, 1]),
)
BACKBONES = {
    "EMO": Backbone(("EMO_1M", "form=paper")),
    "EMO(se)": Backbone(("EMO_1M", "form=se")),
    "MobileOne": Backbone(rows=MOBILEONE_STAGES),
    "MobileOne(timm)": Backbone(("mobileone_s0",)),
    "RevCol": Backbone(("revcol_tiny",)),
    "MNv4-conv": Backbone(("MobileNetV4ConvSmall", "factor=1.0")),
    "MNv4-hybrid": Backbone(("MobileNetV4HybridMedium", "factor=1.0")),
    "HGNetv2": Backbone(("HGNetv2_L",)),
    "ResNet": Backbone(("resnet18",)),
    "ConvNeXt": Backbone(("convnext_atto",)),
    "Swin": Backbone(("swin_tiny_patch4_window7_224",)),
    "ViT": Backbone(("vit_tiny_patch16_224",)),
    "EfficientNet": Backbone(("efficientnet_b0",)),
}
HEADS = (
    "yolov5n", "gelan-t", "yolov9-t", "yolo11n", "yolo11n end2end", "gelan-t end2end", "rtdetr-r18", "dfine-n",
)  # fmt: skip


def check_cell(
    backbone: Backbone, head: str, folder: Path, size: tuple[int, int] = SIZE
) -> dict[str, Any]:
    """What became of one pair: `status`, the figures, and `step` and `reason` where it does not work.

    Args:
        backbone: what goes under the head.
        head: a name in `models/detect`; with " end2end" behind it, with a one-to-one branch.
        folder: where the ONNX file is written for the moment.
        size: (height, width) of evaluation and export.
    """
    start = time.perf_counter()
    result: dict[str, Any] = {"step": "build", "size": size}
    torch.manual_seed(0)
    try:
        model = build(backbone, head, size)
        result.update(params=count_params(model), any_size=model.any_size)
        _check_steps(model, folder, size, result)
        result["status"] = "works"
    except FAILURES as error:
        result["status"] = "fails"
        result["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
    result["seconds"] = round(time.perf_counter() - start, 1)
    return result


def build(backbone: Backbone, head: str, size: tuple[int, int]) -> DetectionModel:
    """`head` on `backbone`; rows take the place that a backbone of that name would have."""
    name, _, form = head.partition(" ")
    if backbone.words:
        return build_model(
            name,
            backbone=backbone.words,
            num_classes=CLASSES,
            imgsz=size,
            end2end=form == "end2end",
        )
    with torch.device("meta"):
        config = dict(build_model(name, backbone=["resnet18"], end2end=form == "end2end").config)
    rows = config["backbone"]
    at = next(i for i, row in enumerate(rows) if row[2] == "resnet18")
    config["backbone"] = [*rows[:at], *map(list, backbone.rows), *rows[at + 1 :]]
    return build_model(config, num_classes=CLASSES, imgsz=size)


def _check_steps(
    model: DetectionModel, folder: Path, size: tuple[int, int], result: dict[str, Any]
) -> None:
    if model.strides != STRIDES[-len(model.strides) :]:
        raise ValueError(f"the head has strides {model.strides}, expected {STRIDES}")
    result["step"] = "train"
    is_ranking = model.head.num_queries > 0
    small = RANKING_TRAIN_SIZE if is_ranking else TRAIN_SIZE
    train_step(model, small if result["any_size"] else size)
    result["step"] = "evaluate"
    settle(model, size)
    with torch.no_grad():
        decoded = model.decode(model(blobs(1, size, seed=3)))
    require_finite({"boxes": decoded.boxes, "scores": decoded.scores}.items(), "predictions")
    result["step"] = "fuse"
    fused = copy.deepcopy(model)
    report = fuse(fused)
    result.update(params_fused=count_params(fused), fuse=report.difference)
    result["step"] = "onnx"
    options = ExportOptions(imgsz=size, dynamic="all" if result["any_size"] else "batch")
    path = export_onnx(fused, options, folder / "cell.pt")
    cases = verify(path, fused, options) + verify(path, fused, replace(options, batch=4))
    result.update(onnx=max(c.relative for c in cases), limit=max(c.limit for c in cases))
    result["cases"] = [str(case) for case in cases]
    del result["step"]


def train_step(model: DetectionModel, size: tuple[int, int]) -> None:
    """One step as `train.py` takes it, on two images with three objects each.

    Raises:
        ValueError: parameters without a gradient, by name.
        ArithmeticError: losses, gradients or weights that are not finite.
    """
    hyp = recipe(model.head.family, None, {})
    model.head.take_recipe(hyp)
    criterion = build_criterion(model.head, hyp, size)
    name = "AdamW" if hyp["optimizer"] == "auto" else hyp["optimizer"]
    optimizer = build_optimizer(model, name, hyp["lr0"], hyp["momentum"], hyp["weight_decay"])
    targets = random_targets(2, 3, size)
    raw = model.train()(blobs(2, size, seed=1), targets)
    losses = criterion(raw, targets)
    require_finite(losses.items(), "losses")
    total_loss(criterion, losses, 2).backward()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    missing = [n for n, p in trained.items() if p.grad is None]
    if missing:
        raise ValueError(f"{len(missing)} parameters without a gradient: {', '.join(missing[:3])}")
    require_finite(((n, p.grad) for n, p in trained.items()), "gradients")
    if hyp["clip_norm"] > 0:
        clip_gradients(model, hyp["clip_norm"])
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    require_finite(model.state_dict().items(), "weights after the step")


def random_targets(images: int, objects: int, size: tuple[int, int]) -> Targets:
    """Boxes of 8 pixels and more inside images of `size`."""
    limit = torch.tensor([size[1], size[0]]).float()
    low = torch.rand(images * objects, 2) * (limit - 8)
    high = low + 8 + torch.rand(images * objects, 2) * (limit - 8 - low)
    index = torch.arange(images).repeat_interleave(objects)
    return Targets(index, torch.randint(CLASSES, index.shape), torch.cat((low, high), 1))


def require_finite(tensors: Iterable[tuple[str, Any]], what: str) -> None:
    """Raise ArithmeticError with the names of tensors that are not finite."""
    bad = [name for name, t in tensors if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise ArithmeticError(f"{what} not finite: {', '.join(bad[:3])}, {len(bad)} in all")


def run_worker(names: Sequence[str]) -> None:
    """Check cells in this process, one JSON line each."""
    for name in names:
        backbone, head = name.split(" x ")
        with tempfile.TemporaryDirectory() as folder:
            result = check_cell(BACKBONES[backbone], head, Path(folder))
        print(json.dumps({"name": name, **result}), flush=True)


def format_table(results: dict[str, dict[str, Any]], wanted: Sequence[str]) -> str:
    """One line a cell, aligned; below it what failed and why."""
    rows = [("backbone", "head", "params", "fused", "size", "seconds", "fuse", "ONNX", "status")]
    found = [name for name in wanted if name in results]
    for name in found:
        r = results[name]
        size = "x".join(map(str, r.get("size", ()))) + ("" if r.get("any_size", True) else " only")
        onnx = f"{r['onnx']:.1e}" if "onnx" in r else "-"
        held = onnx if r.get("limit", 1e-4) <= 1e-4 else f"{onnx} (< {r['limit']:.0e})"
        rows.append((
            *name.split(" x "), _count(r, "params"), _count(r, "params_fused"), size, f"{r['seconds']:.1f}",
            f"{r['fuse']:.1e}" if "fuse" in r else "-", held, r["status"],
        ))  # fmt: skip
    lines = aligned(rows)
    failed = [name for name in found if results[name]["status"] != "works"]
    lines += [f"fails: {n} at {results[n].get('step')}: {results[n]['reason']}" for n in failed]
    lines.append(f"{len(found) - len(failed)} of {len(found)} cells work; {len(wanted)} wanted")
    return "\n".join(lines)


def _count(result: dict[str, Any], key: str) -> str:
    return f"{result[key]:,}" if key in result else "-"


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES), metavar="NAME")
    add("--heads", nargs="+", default=list(HEADS), choices=HEADS, metavar="NAME")
    add("--out", type=Path, default=Path("runs/coupling_matrix.jsonl"), help="file of results")
    add("--timeout", type=float, default=300, help="seconds a cell")
    add("--again", action="store_true", help="check cells that failed before once more")
    add("--report", action="store_true", help="print the results and stop")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check what has not been checked yet, then report."""
    args = parse_args()
    if args.worker:
        run_worker(args.worker)
        return
    wanted = [f"{backbone} x {head}" for backbone in args.backbones for head in args.heads]
    results = read_results(args.out)
    if args.again:
        results = {name: r for name, r in results.items() if r["status"] == "works"}

    def next_backbone() -> list[str]:
        todo = [name for name in wanted if name not in results]
        return [name for name in todo if name.split(" x ")[0] == todo[0].split(" x ")[0]]

    if not args.report:
        command = [sys.executable, __file__, "--worker"]
        run_open(args.out, results, command, args.timeout, next_backbone)
    print(format_table(results, wanted))
    if any(results[name]["status"] != "works" for name in wanted if name in results):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
