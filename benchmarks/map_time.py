"""How long COCO's numbers take here and in pycocotools, for the same detections, and how far they differ.

    python benchmarks/map_time.py --images 5000

Objects and detections are random: about 7 objects of 80 classes an image, one in a hundred a crowd, 100 detections that lie
near them. Both are timed in processor seconds, from detections in memory to the twelve numbers; ours makes the curves besides.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from utils.config import integer
from utils.metrics import CocoEvaluator
from utils.structures import Detections

T = TypeVar("T")
CLASSES, FOUND, SIDE = 80, 100, 640


def random_split(count: int) -> tuple[dict[str, object], dict[int, Detections]]:
    """Ground truth in COCO's form, and detections by image id."""
    rng = np.random.default_rng(0)
    annotations: list[dict[str, object]] = []
    detections = {}
    for image in range(1, count + 1):
        sides = np.exp(rng.normal(4, 1, (1 + rng.poisson(6), 2))).clip(4, 400)
        boxes = np.concatenate([rng.uniform(0, SIDE - sides), sides], 1)
        labels = rng.integers(0, CLASSES, len(boxes))
        for box, label in zip(boxes.tolist(), labels.tolist()):
            crowd = int(rng.random() < 0.01)
            row = {"image_id": image, "category_id": label, "bbox": box, "iscrowd": crowd}
            annotations.append({"id": len(annotations) + 1, "area": box[2] * box[3], **row})
        near = rng.integers(0, len(boxes), FOUND)
        moved = boxes[near] + rng.normal(0, 0.15, (FOUND, 4)) * boxes[near][:, [2, 3, 2, 3]]
        moved[:, 2:] = moved[:, :2] + moved[:, 2:].clip(2)
        guesses = np.where(rng.random(FOUND) < 0.7, labels[near], rng.integers(0, CLASSES, FOUND))
        scores = torch.from_numpy(rng.random(FOUND)).float()
        detections[image] = Detections(torch.from_numpy(moved), scores, torch.from_numpy(guesses))
    truth = {
        "images": [{"id": image, "height": SIDE, "width": SIDE} for image in detections],
        "annotations": annotations,
        "categories": [{"id": c, "name": str(c)} for c in range(CLASSES)],
    }
    return truth, detections


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives, and the processor seconds it took; it may print what it likes."""
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    return result, time.process_time() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=integer(1), default=5000, help="of the split")
    args = parser.parse_args()
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    truth, detections = random_split(args.images)
    evaluator = CocoEvaluator(truth, range(CLASSES), [str(c) for c in range(CLASSES)])
    evaluator.process(list(detections), list(detections.values()))
    predictions = evaluator.predictions()

    def reference() -> list[float]:
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(predictions), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return list(evaluation.stats)

    metrics, ours = timed(evaluator.evaluate)
    expected, theirs = timed(reference)
    difference = max(abs(a - b) for a, b in zip(metrics.stats, expected, strict=True))
    print(
        f"{args.images} images: {ours:.1f} s here, {theirs:.1f} s in pycocotools, ratio {ours / theirs:.3f}"
    )
    print(f"largest difference of the twelve numbers: {difference:.1e}")


if __name__ == "__main__":
    main()
