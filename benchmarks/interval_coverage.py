"""How often the confidence interval of an mAP holds the true value, by simulation.

    python benchmarks/interval_coverage.py --images 100 200 400 --trials 600

A made-up detector looks at made-up images, some of which are harder than others: harder ones lose more of their objects
and get more false alarms, so that what happens within an image hangs together. The true value is its mAP over a very
large split. Printed is how many of 100 intervals from splits of that many images hold it; 95 is what they promise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from utils.bootstrap import THRESHOLDS, ClassOutcomes, average_precisions, interval, resample

CLASSES, LARGE, LARGE_SPLITS = 2, 50_000, 8


def simulated_split(images: int, rng: np.random.Generator) -> list[ClassOutcomes]:
    """What a detector of fixed quality finds on so many images, two objects a class in each on average."""
    difficulty = rng.normal(0, 1, images)
    outcomes = []
    for _ in range(CLASSES):
        objects, alarms = rng.poisson(2.0, images), rng.poisson(np.exp(0.5 * difficulty))
        owner = np.repeat(np.arange(images), objects)
        owner = owner[rng.random(owner.size) < 0.8 / (1 + np.exp(0.7 * difficulty[owner] - 1))]
        image = np.concatenate((owner, np.repeat(np.arange(images), alarms)))
        overlap = np.concatenate((rng.beta(8, 2, owner.size), np.zeros(alarms.sum())))
        scores = np.concatenate((rng.beta(4, 2, owner.size), rng.beta(2, 4, alarms.sum())))
        order = np.argsort(-scores)
        found = overlap[order] >= THRESHOLDS[:, None]
        outcomes.append(ClassOutcomes(image[order], found, np.ones_like(found), objects))
    return outcomes


def map_of(outcomes: list[ClassOutcomes]) -> float:
    """mAP50-95 of a split as it is."""
    return float(average_precisions(outcomes, np.ones((1, len(outcomes[0].objects)))).mean())


def coverage(images: int, trials: int, resamples: int, seed: int = 0) -> float:
    """Share of intervals that hold the true value."""
    large = (simulated_split(LARGE, np.random.default_rng((seed, i))) for i in range(LARGE_SPLITS))
    truth, held = np.mean([map_of(split) for split in large]), 0
    for trial in range(trials):
        split = simulated_split(images, np.random.default_rng((seed, images, trial)))
        low, high = interval(map_of(split), resample(split, resamples, trial).map50_95)
        held += bool(low <= truth <= high)
    return held / trials


def main() -> None:
    """Simulate and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--images", type=int, nargs="+", default=[100, 200, 400])
    parser.add_argument("--trials", type=int, default=600)
    parser.add_argument("--resamples", type=int, default=200)
    args = parser.parse_args()
    for images in args.images:
        held = coverage(images, args.trials, args.resamples)
        print(f"{images} images: {100 * held:.1f} of 100, {args.trials} trials", flush=True)


if __name__ == "__main__":
    main()
