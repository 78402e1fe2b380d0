"""Whether NMS inside an ONNX graph chooses what our own NMS chooses, box for box.

    python benchmarks/end2end_agreement.py --weights best.pt --source folder/of/images --images 200

Exports `--weights` twice with `--dynamic`: plain, and with NMS (or top-k) in the graph. Both run
over the same images in batches of 1, 2 and 5, every tenth image replaced by an empty grey one; the
plain output goes through `models.postprocess`. Counts, classes, order, boxes and scores are
compared, and PyTorch's own detections beside them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from data.images import IMAGE_SUFFIXES, read_image
from data.transforms import letterbox
from deploy.backends import Backend, load_backend, model_backend
from deploy.exporters.forms import export
from deploy.exporters.network import ExportOptions
from models.postprocess import postprocess
from models.weights.load import load_weights
from utils.config import integer, number, parse_imgsz
from utils.structures import Decoded, Detections, as_float

EMPTY_EVERY = 10
GREY = 114 / 255


class Agreement(NamedTuple):
    """What a comparison over many images found.

    Attributes:
        images: compared.
        detections: of the reference.
        unlike: images in which number, classes or order of the detections differ.
        boxes: largest |difference| of a coordinate where they do not, in pixels.
        scores: the same of a score.
    """

    images: int
    detections: int
    unlike: int
    boxes: float
    scores: float

    def __str__(self) -> str:
        return (
            f"{self.images} images, {self.detections} detections: {self.unlike} images unlike, "
            f"boxes within {self.boxes:.1e} px, scores within {self.scores:.1e}"
        )


def compare(found: Sequence[Detections], expected: Sequence[Detections]) -> Agreement:
    """Hold detections of the same images against each other, image by image."""
    unlike, boxes, scores = 0, 0.0, 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if not torch.equal(ours.labels, theirs.labels):
            unlike += 1
        elif len(ours.labels):
            boxes = max(boxes, float((ours.boxes - theirs.boxes).abs().max()))
            scores = max(scores, float((ours.scores - theirs.scores).abs().max()))
    return Agreement(len(found), sum(len(d.labels) for d in expected), unlike, boxes, scores)


def load_images(folder: str, count: int, imgsz: tuple[int, int]) -> Tensor:
    """The first `count` images of a folder, letterboxed, every tenth an empty one: (N, 3, H, W)."""
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)[:count]
    if len(paths) < count:
        raise SystemExit(f"{folder}: got {len(paths)} images, expected at least {count}.")
    arrays = [letterbox(read_image(path), imgsz)[0] for path in paths]
    images = torch.stack([torch.from_numpy(a.copy()).permute(2, 0, 1) for a in arrays])
    images = as_float(images, "cpu")
    images[::EMPTY_EVERY] = GREY
    return images


def detect(
    backend: Backend, images: Tensor, batch: int, options: ExportOptions
) -> list[Detections]:
    """Detections of every image, NMS done by the artifact or by us."""
    found: list[Detections] = []
    for part in images.split(batch):
        output = backend(part)
        if isinstance(output, Decoded):
            output = postprocess(
                output, backend.postprocess_kind, conf_thres=options.conf_thres,
                iou_thres=options.iou_thres, max_det=options.max_det,
            )  # fmt: skip
        found.extend(output)
    return found


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="a trained checkpoint")
    parser.add_argument("--source", required=True, help="folder of images, searched deeply")
    parser.add_argument("--images", type=integer(1), default=200)
    parser.add_argument("--imgsz", nargs="+", type=integer(1), default=[320])
    parser.add_argument("--batches", nargs="+", type=integer(1), default=[1, 2, 5])
    parser.add_argument("--conf-thres", type=number(0, 1), default=0.05)
    parser.add_argument("--iou-thres", type=number(0, 1), default=0.45)
    parser.add_argument("--max-det", type=integer(1), default=300)
    return parser.parse_args()


def main() -> int:
    """Export, run, compare; 1 if an image is unlike."""
    args = parse_args()
    model = load_weights(args.weights).model
    imgsz = parse_imgsz(args.imgsz, model.max_stride)
    images = load_images(args.source, args.images, imgsz)
    options = ExportOptions(
        imgsz=imgsz, dynamic="all", conf_thres=args.conf_thres, iou_thres=args.iou_thres,
        max_det=args.max_det,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp())
    try:
        plain = export(model, ["onnx"], options, folder / "plain.pt")[0].path
        inside = export(model, ["onnx"], replace(options, end2end=True), folder / "inside.pt")[
            0
        ].path
        failed = 0
        for batch in args.batches:
            ours = detect(load_backend(plain), images, batch, options)
            theirs = detect(load_backend(inside), images, batch, options)
            own = detect(model_backend(deepcopy(model)), images, batch, options)
            against_onnx, against_torch = compare(theirs, ours), compare(theirs, own)
            print(f"batch {batch}, our NMS over the plain ONNX file: {against_onnx}")
            print(f"batch {batch}, our NMS over PyTorch:             {against_torch}")
            failed += against_onnx.unlike
    finally:
        shutil.rmtree(folder)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
