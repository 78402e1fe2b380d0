"""What there is to know of one entry of a study: `python -m study.measure FOLDER ENTRY`, in a process of its own.

Sizes of the training form and the deployed one, then for each runtime the file that is deployed and its mAP; latencies
are measured of the same files, of all entries in turn (`study.latency`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image as PillowImage

from data.dataset import LoadOptions
from data.images import read_image
from deploy.backends import Backend, load_backend
from deploy.exporters.forms import export
from deploy.exporters.network import ExportOptions
from engine.evaluation import Validation
from models.reparam import reparameterize_model
from models.table import Totals, measure
from models.weights.load import load_weights
from models.yolo import DetectionModel
from study.plan import MEASURED, WEIGHTS, Entry, Study, load_study
from utils.bootstrap import resample
from utils.config import parse_imgsz
from utils.device import select_device
from utils.errors import ConfigError, UserError, run_cli
from utils.files import write_whole
from utils.metrics import Metrics
from utils.visualize import Image, draw_boxes, save_image

EXAMPLES, SIDE = 4, 240  # pictures of an entry, and the longer side of each in pixels
STATS = {"map50": 1, "map50_95": 0, "small": 3, "medium": 4, "large": 5}
"""Places of the numbers that are kept in COCO's summary."""


class Accuracy(NamedTuple):
    """An artifact on the validation split."""

    metrics: Metrics
    samples: list[float]
    validation: Validation


def sizes_of(model: DetectionModel, imgsz: tuple[int, int]) -> tuple[Totals, Totals]:
    """Of the training form and the deployed one."""
    return measure(model, imgsz), measure(reparameterize_model(model), imgsz)


def files_of(study: Study, entry: Entry) -> list[Path]:
    """The weights of an entry, one file a seed.

    Raises:
        ConfigError: there are none yet.
    """
    if entry.file is not None:
        return [entry.file]
    files = [training.best for training in study.trainings(entry) if training.best.is_file()]
    if not files:
        raise ConfigError(f"{entry.name}: no epoch was trained to its end, so nothing is measured.")
    return files


def measure_entry(study: Study, entry: Entry) -> dict[str, object]:
    """Everything of an entry, as plain data; a runtime that cannot take it has the reason instead.

    Raises:
        ConfigError: there are no weights, or no runtime takes them.
    """
    options, files = study.options, files_of(study, entry)
    result: dict[str, object] = {}
    runtimes: Sequence[str] = options.runtime
    if files[0].suffix in WEIGHTS:
        model = load_weights(files[0], allow_code=options.allow_code).model
        imgsz = parse_imgsz(options.imgsz, model.max_stride) if options.imgsz else model.imgsz
        trained, deployed = sizes_of(model, imgsz)
        result |= {"trained": trained._asdict(), "deployed": deployed._asdict()}
    else:
        imgsz, runtimes = None, [files[0].suffix.removeprefix(".") or "openvino"]
    found: dict[str, dict[str, object]] = {}
    for runtime in runtimes:
        try:
            found[runtime] = _in_runtime(
                study, entry, files, runtime, imgsz, has_examples=not found
            )
        except UserError as error:
            found[runtime] = {"reason": str(error)}
    reasons = [str(result["reason"]) for result in found.values() if "reason" in result]
    if len(reasons) == len(found):
        raise ConfigError(reasons[0])
    return {**result, "runtimes": found}


def _in_runtime(
    study: Study,
    entry: Entry,
    files: Sequence[Path],
    runtime: str,
    imgsz: tuple[int, int] | None,
    *,
    has_examples: bool,
) -> dict[str, object]:
    """mAP of the files of all seeds in one runtime, and the file that is timed."""
    found, artifacts, device = [], [], select_device(study.options.device)
    for seed, file in enumerate(files):
        artifacts.append(_artifact(study, entry, file, runtime, imgsz, seed))
        backend = load_backend(artifacts[-1], device, allow_code=study.options.allow_code)
        found.append(accuracy(study, backend, entry.name, device))
    if has_examples:
        save_examples(found[0], study.folder_of(entry))
    stats = {name: [a.metrics.stats[place] for a in found] for name, place in STATS.items()}
    return {
        "file": str(artifacts[0].resolve()),
        "seeds": stats,
        **{name: mean(values) for name, values in stats.items()},
        "samples": np.mean([a.samples for a in found], axis=0).round(5).tolist(),
        "images": found[0].metrics.images,
        "names": found[0].validation.dataset.names,
    }


def _artifact(
    study: Study, entry: Entry, file: Path, runtime: str, imgsz: tuple[int, int] | None, seed: int
) -> Path:
    """The file that a runtime runs, in the folder of the entry; the weights themselves for PyTorch."""
    if imgsz is None or runtime == "torch":
        return file
    model = load_weights(file, allow_code=study.options.allow_code).model
    options = ExportOptions(imgsz=imgsz, channels=model.channels)
    folder = study.folder_of(entry) / "exports"
    folder.mkdir(parents=True, exist_ok=True)
    return export(model, [runtime], options, folder / f"seed{seed}.pt")[0].path


def accuracy(study: Study, backend: Backend, name: str, device: torch.device) -> Accuracy:
    """mAP on the validation split, and that of halves of it."""
    options = study.options
    imgsz = parse_imgsz(options.imgsz, backend.stride) if options.imgsz else backend.imgsz
    load = LoadOptions(imgsz=imgsz, batch_size=16, stride=backend.stride)
    validation = Validation(backend, name, options, "val", load, options.workers)
    metrics, _ = validation.run(device)
    samples = resample(validation.evaluator.outcomes()).map50_95.tolist()
    return Accuracy(metrics, samples, validation)


def save_examples(found: Accuracy, folder: Path) -> None:
    """Pictures with what was found in them, at the score of the best F1, and with what is there."""
    dataset, threshold = found.validation.dataset, found.metrics.confidence
    predictions = found.validation.evaluator.predictions()
    truth = dataset.coco_ground_truth()["annotations"]
    labels = {category: label for label, category in enumerate(dataset.category_ids)}
    for number, index in enumerate(example_indices(np.diff(dataset.offsets))):
        image, key = read_image(dataset.paths[index], dataset.config.white), int(dataset.image_ids[index])  # fmt: skip
        shown = [row for row in predictions if row["image_id"] == key and row["score"] >= threshold]
        there = [row for row in truth if row["image_id"] == key]
        for kind, rows in (("found", shown), ("truth", there)):
            picture = _drawn(image, rows, labels, dataset.names)
            save_image(folder / f"{kind}{number}.jpg", picture, quality=72)


def example_indices(objects: np.ndarray) -> list[int]:
    """Images with objects, evenly through the split."""
    filled = np.flatnonzero(objects)
    places = np.linspace(0, len(filled) - 1, min(EXAMPLES, len(filled))).round().astype(int)
    return [int(index) for index in filled[places]]


def _drawn(
    image: Image, rows: Iterable[dict[str, object]], labels: dict[int, int], names: Sequence[str]
) -> Image:
    """A small copy of an image with boxes on it."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    small = PillowImage.fromarray(image).resize((round(width * scale), round(height * scale)))
    rows = list(rows)
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4) * scale
    boxes[:, 2:] += boxes[:, :2]
    classes = np.array([labels[int(str(row["category_id"]))] for row in rows], dtype=np.int64)
    scores = np.array([float(str(row["score"])) for row in rows]) if rows and "score" in rows[0] else None  # fmt: skip
    return draw_boxes(
        np.asarray(small), boxes, classes, names, scores, line_thickness=2, hide_conf=True
    )


def main() -> None:
    """Measure one entry, and write it down."""
    study = load_study(Path(sys.argv[1]))
    entry = next(entry for entry in study.entries if entry.folder_name == sys.argv[2])
    folder = study.folder_of(entry)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / MEASURED, json.dumps(measure_entry(study, entry)).encode())


if __name__ == "__main__":
    run_cli(main)
