"""Compare `utils.tide` with the package of TIDE's authors: `python benchmarks/tide_agreement.py [folder ...]`.

Needs `pip install tidecv`. Compares the random splits of tests/utils/test_tide.py, and for each folder that
`val.py --save-json` has written the predictions in it. Prints both sets of numbers and the largest difference.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "utils")]

from test_tide import random_split  # noqa: E402
from tidecv import TIDE  # noqa: E402
from tidecv.data import Data  # noqa: E402

from utils.curves import ImageDetections  # noqa: E402
from utils.tide import KINDS, costs, judge  # noqa: E402

SHORT = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")


def theirs(
    detections: dict[int, ImageDetections], annotations: list[dict], images: list[int]
) -> tuple[dict, dict]:
    """Counts, and costs in points, by their package."""
    truth, found = Data("truth", 100), Data("found", 100)
    for number in images:
        truth.add_image(number, str(number))
    for row in annotations:
        add = truth.add_ignore_region if row["iscrowd"] else truth.add_ground_truth
        add(row["image_id"], row["category_id"], box=list(row["bbox"]))
    for number, (boxes, scores, labels) in detections.items():
        sizes = np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], 1).tolist()
        for box, score, label in zip(sizes, scores.tolist(), labels.tolist()):
            found.add_detection(number, label, score, box=box)
    tide = TIDE()
    run = tide.evaluate(truth, found, mode=TIDE.BOX)
    every = tide.get_all_errors()
    main, special = every["main"]["found"], every["special"]["found"]
    counts = {kind.short_name: count for kind, count in run.count_errors().items()}
    values = {name: main[short] for name, short in zip(KINDS, SHORT)}
    values |= {"false positives": special["FalsePos"], "false negatives": special["FalseNeg"]}
    return {name: counts[short] for name, short in zip(KINDS, SHORT)}, {"mAP": run.ap, **values}


def saved(folder: Path) -> tuple[dict[int, ImageDetections], list[dict]]:
    """What `val.py --save-json` left."""
    truth = json.loads((folder / "ground_truth.json").read_text())
    rows = json.loads(next(folder.glob("*_predictions.json")).read_text())
    places = {row["id"]: k for k, row in enumerate(truth["categories"])}
    annotations = [
        {**row, "category_id": places[row["category_id"]]} for row in truth["annotations"]
    ]
    detections = {}
    for image in truth["images"]:
        own = sorted((r for r in rows if r["image_id"] == image["id"]), key=lambda r: -r["score"])
        boxes = np.array([r["bbox"] for r in own], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([places[r["category_id"]] for r in own], np.int64)
        detections[image["id"]] = ImageDetections(
            boxes, np.array([r["score"] for r in own]), labels
        )
    return detections, annotations


def main() -> None:
    """Compare, and tell the largest difference."""
    splits = {f"random split {seed}": random_split(seed) for seed in range(6, 16)}
    splits |= {folder: saved(Path(folder)) for folder in sys.argv[1:]}
    for name, (detections, truth) in splits.items():
        classes = 1 + max(row["category_id"] for row in truth)
        errors = judge(detections, truth, range(classes))
        ours = {key: 100 * value for key, value in costs(errors, classes).items()}
        counts, values = theirs(detections, truth, sorted(detections))
        worst = max(abs(ours[key] - value) for key, value in values.items())
        print(
            f"{name}: counts {'equal' if counts == errors.counts() else 'DIFFER'}, largest difference {worst:.1e} points"
        )
        print(f"  {counts}\n  {values}")


if __name__ == "__main__":
    main()
