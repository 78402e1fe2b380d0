"""Whether a backbone under a head learns at all: sixteen pictures by heart, in two hundred steps of the default recipe.

    python benchmarks/gate.py                              all cells; run it again to go on
    python benchmarks/gate.py --backbones EMO_1M --heads yolo11n yolov5n --again

Every cell is a whole training by `train.train`: the family's losses, assigner and optimiser at the pace of the run, 128 pixels,
eight images a step. Only augmentation is off, and what is measured is what was learnt from. A sound coupling knows such a set by
heart; one with a wrong stride, a map on another scale or a part that starts dead does not, whatever its shapes say.

Each cell is a line of the JSONL file --out. The exit code is 1 if a cell stays below --least.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import cv2
import torch

from benchmarks.children import read_results, run_open
from benchmarks.tables import aligned
from data.shapes import NAMES, draw_picture, label_row
from engine.options import TrainOptions
from train import train
from utils.distributed import World
from utils.metrics import Metrics

IMAGES, BATCH, IMGSZ, STEPS = 16, 8, 128, 200
LEAST = 0.8
OWN = "own"
BACKBONES = (
    OWN, "EMO_1M", "mobileone_s0", "revcol_tiny", "MobileNetV4ConvSmall", "hgnetv2_b0", "resnet18", "convnext_atto",
    "mobilevit_xxs", "vit_tiny_patch16_224", "efficientnet_lite0", "repvit_m0_9",
)  # fmt: skip
HEADS = ("yolov5n", "gelan-t", "yolov9-t", "yolo11n", "rtdetr-r18")
AUGMENTATIONS = (
    "hsv_h", "hsv_s", "hsv_v", "degrees", "translate", "scale", "shear", "perspective", "flipud", "fliplr", "mosaic", "mosaic9",
    "mixup", "copy_paste", "close_mosaic",
)  # fmt: skip


def draw_set(folder: Path, images: int = IMAGES) -> Path:
    """The first pictures of the built-in shapes as a data set that is measured on what it trains on; returns its YAML."""
    for index in range(images):
        picture, shapes = draw_picture(0, index)
        rows = [label_row(shape, picture.shape[:2]) for shape in shapes]
        (folder / f"{index:02d}.txt").write_text("".join(rows), encoding="utf-8")
        cv2.imwrite(str(folder / f"{index:02d}.png"), picture[:, :, ::-1])
    file = folder / "data.yaml"
    file.write_text(f"path: .\ntrain: .\nval: .\nnames: [{', '.join(NAMES)}]\n", encoding="utf-8")
    return file


def learn(backbone: str, head: str, *, steps: int = STEPS, amp: str = "off") -> Metrics:
    """Train `head` on `backbone` (OWN for the head's own) for so many steps and measure it on the same pictures."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "set").mkdir()
        hyp = folder / "plain.yaml"
        hyp.write_text("".join(f"{name}: 0\n" for name in AUGMENTATIONS), encoding="utf-8")
        options = TrainOptions(
            cfg=head, backbone=[] if backbone == OWN else [backbone], data=str(draw_set(folder / "set")), hyp=str(hyp),
            imgsz=IMGSZ, batch_size=BATCH, epochs=steps * BATCH // IMAGES, device="cpu", workers=0, amp=amp, patience=0,
            noval=True, nosave=True, noplots=True, project=str(folder / "runs"),
        )  # fmt: skip
        metrics = train(options, torch.device("cpu"), World(0, 0, 1))
    assert metrics is not None
    return metrics


def run_worker(names: list[str], amp: str) -> None:
    """Check cells in this process, one JSON line each."""
    for name in names:
        start = time.perf_counter()
        metrics = learn(*name.split(" x "), amp=amp)
        seconds = round(time.perf_counter() - start)
        status = f"{metrics.map50:.3f} / {metrics.map50_95:.3f}"
        print(
            json.dumps(
                {"name": name, "status": status, "map": metrics.map50_95, "seconds": seconds}
            ),
            flush=True,
        )


def format_table(results: dict[str, dict[str, Any]], backbones: list[str], heads: list[str]) -> str:
    """mAP50-95 of each backbone under each head."""
    rows = [["backbone", *heads]]
    for backbone in backbones:
        cells = (results.get(f"{backbone} x {head}", {}) for head in heads)
        rows.append([backbone, *(f"{cell['map']:.3f}" if "map" in cell else "-" for cell in cells)])
    return "\n".join(aligned(rows))


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--backbones", nargs="+", default=list(BACKBONES), metavar="NAME")
    add("--heads", nargs="+", default=list(HEADS), metavar="NAME")
    add("--out", type=Path, default=Path("runs/gate.jsonl"), help="file of results")
    add("--least", type=float, default=LEAST, help="mAP50-95 that a cell must reach")
    add("--amp", default="off", choices=("off", "bf16"), help="mixed precision")
    add("--timeout", type=float, default=1800, help="seconds a cell")
    add("--again", action="store_true", help="check cells that are in the file once more")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Check what has not been checked yet, then report."""
    args = parse_args()
    if args.worker:
        run_worker(args.worker, args.amp)
        return
    wanted = [f"{backbone} x {head}" for backbone in args.backbones for head in args.heads]
    results = {} if args.again else read_results(args.out)
    command = [sys.executable, __file__, "--amp", args.amp, "--worker"]
    run_open(
        args.out,
        results,
        command,
        args.timeout,
        lambda: [n for n in wanted if n not in results][:1],
    )
    print(format_table(results, args.backbones, args.heads))
    if any(results[name].get("map", 0.0) < args.least for name in wanted):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
