"""How many images a second the training loader gives, with mosaics, by what it keeps.

python benchmarks/loader_rate.py --data my.yaml --imgsz 640 --epochs 3 --workers 0
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data.config import load_data_config
from data.dataset import LoadOptions, build_dataset
from data.image_cache import CACHES
from data.loader import build_loader
from engine.recipe import recipe


def rates(
    data: Path, imgsz: int, cache: str, epochs: int, workers: int
) -> tuple[float, list[float]]:
    """Seconds until the loader stands, and images a second of each epoch."""
    start = time.perf_counter()
    options = LoadOptions(
        imgsz=(imgsz, imgsz), augment=True, hyp=recipe("yolo11", None, {}), cache=cache
    )
    dataset = build_dataset(load_data_config(data), "train", options)
    loader = build_loader(dataset, 16, workers=workers, shuffle=True)
    ready, found = time.perf_counter() - start, []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        start = time.perf_counter()
        images = sum(len(batch.images) for batch in loader)
        found.append(images / (time.perf_counter() - start))
    return ready, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache", nargs="+", choices=CACHES, default=["off", "auto"])
    args = parser.parse_args()
    for cache in args.cache:
        ready, found = rates(args.data, args.imgsz, cache, args.epochs, args.workers)
        print(
            f"--cache {cache}: {statistics.median(found):.1f} images/s, median of {args.epochs} epochs "
            f"({min(found):.1f} to {max(found):.1f}); {ready:.2f} s until the first"
        )


if __name__ == "__main__":
    main()
