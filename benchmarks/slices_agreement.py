"""Compare slices and merged boxes with SAHI's: `python benchmarks/slices_agreement.py --weights best.pt --source photos/`.

Needs `pip install sahi` (MIT). Both get the same boxes of the same slices; prints the number of boxes of either and the
largest difference of a corner or score.
"""

from __future__ import annotations

import argparse
import sys
from itertools import islice
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sahi.postprocess.combine import GreedyNMMPostprocess
from sahi.prediction import ObjectPrediction
from sahi.slicing import get_slice_bboxes

from data.sources import open_source
from deploy.backends import load_backend
from engine.frames import detect
from engine.options import Thresholds
from engine.slices import COVERED, detect_slices, fit_slices
from utils.structures import Detections


def theirs(found: list[Detections], size: tuple[int, int]) -> list[list[float]]:
    """Boxes, score and class of what SAHI makes of the boxes of all slices."""
    predictions = [
        ObjectPrediction(bbox=row[:4], category_id=int(row[5]), score=row[4], full_shape=list(size))
        for part in found
        for row in table(part)
    ]
    merge = GreedyNMMPostprocess(match_threshold=COVERED, match_metric="IOS", class_agnostic=False)
    merged = merge(predictions) if predictions else []
    return [[*p.bbox.to_xyxy(), p.score.value, p.category.id] for p in merged]


def table(found: Detections) -> list[list[float]]:
    """A row x1 y1 x2 y2 score class for each box."""
    columns = found.boxes, found.scores[:, None], found.labels[:, None]
    return torch.cat([column.double() for column in columns], 1).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--images", type=int, default=10)
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--slice", type=int, default=256)
    parser.add_argument("--overlap", type=float, default=0.2)
    parser.add_argument("--conf-thres", type=float, default=0.25)
    args = parser.parse_args()
    model, thresholds = load_backend(args.weights), Thresholds(conf=args.conf_thres)
    size, largest, ours_count, their_count = (args.imgsz, args.imgsz), 0.0, 0, 0
    for frame in islice(open_source(args.source), args.images):
        height, width = frame.image.shape[:2]
        parts = fit_slices(frame, size, model.stride, args.slice, args.overlap)
        slices = get_slice_bboxes(height, width, args.slice, args.slice, False, args.overlap, args.overlap)  # fmt: skip
        assert [part.corner for part in parts[1:]] == [(box[1], box[0]) for box in slices]
        ours = sorted(table(detect_slices(model, parts, thresholds)))
        other = sorted(theirs([detect(model, [p], thresholds)[0] for p in parts], (height, width)))
        ours_count, their_count = ours_count + len(ours), their_count + len(other)
        if len(ours) == len(other):
            differences = (torch.tensor(ours) - torch.tensor(other)).abs()
            largest = max(largest, differences.max().item() if len(ours) else 0)
        else:
            print(f"{frame.path}: {len(ours)} boxes here, {len(other)} of SAHI")
    print(f"{ours_count} boxes here, {their_count} of SAHI, largest difference {largest:.1e}")


if __name__ == "__main__":
    main()
