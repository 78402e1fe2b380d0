"""Look a data set over before a training: `python data/check.py --data my.yaml [--imgsz 640]`.

Tells faults of files and labels, pictures that are in two splits, odd pictures, boxes that are no object's or not its
only one, classes that cannot be learned, objects too small for the network. The folder of the run gets `check.json`
and pictures of what was found. Exit code 0: healthy; 1: findings; 2: the data cannot be read.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

if __name__ == "__main__":  # run as a script: the folder above holds the packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data.config import load_data_config
from data.doctor.classes import (
    class_counts,
    object_sides,
    odd_classes,
    odd_sizes,
    odd_splits,
    same_splits,
    side_counts,
)
from data.doctor.findings import Finding, Place, of_faults
from data.doctor.labels import odd_boxes
from data.doctor.pictures import look_through, odd_pictures, repetitions
from data.doctor.sheets import write_sheets
from data.formats.description import DataConfig
from data.formats.table import Table
from data.label_cache import read_afresh
from utils.config import ArgumentParser, increment_path, integer, parse_imgsz
from utils.errors import run_cli
from utils.logger import get_logger

STRIDE = 8
"""Of the finest map of most detectors."""


@dataclass(frozen=True)
class Report:
    """What was found in a data set.

    Attributes:
        config: the data set.
        imgsz: height and width that sizes of objects are told at.
        tables: its splits as they were read.
        findings: faults first.
    """

    config: DataConfig
    imgsz: tuple[int, int]
    tables: Mapping[str, Table]
    findings: tuple[Finding, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether nothing needs repair."""
        return not any(finding.is_fault for finding in self.findings)

    def __str__(self) -> str:
        lines = []
        for split, table in self.tables.items():
            counts = class_counts(table, self.config.names).tolist()
            classes = ", ".join(f"{n} {name}" for n, name in zip(counts, self.config.names) if n)
            sides = side_counts(object_sides(table, self.imgsz))
            lines.append(
                f"{split}: {len(table)} images, {sum(counts)} objects: {classes or 'none'}"
            )
            told = ", ".join(f"{count} {words}" for words, count in sides.items() if count)
            if told:
                lines.append(f"{split}: sides in pixels at {max(self.imgsz)}: {told}")
        faults = sum(finding.is_fault for finding in self.findings)
        ending = f"{self.config.file}: findings: {faults}, notes: {len(self.findings) - faults}"
        return "\n".join([*lines, *map(str, self.findings), ending])

    def record(self) -> dict[str, object]:
        """As plain data."""
        splits = {}
        for split, table in self.tables.items():
            counts = dict(zip(self.config.names, class_counts(table, self.config.names).tolist()))
            sides = side_counts(object_sides(table, self.imgsz))
            splits[split] = {"images": len(table), "classes": counts, "sides": sides}
        return {
            "data": str(self.config.file),
            "format": self.config.format,
            "imgsz": list(self.imgsz),
            "healthy": self.is_healthy,
            "splits": splits,
            "findings": [finding.record() for finding in self.findings],
        }


def examine(config: DataConfig, imgsz: tuple[int, int], stride: int = STRIDE) -> Report:
    """Look over every split of a data set; each picture is decoded once.

    Args:
        config: the data set.
        imgsz: height and width of a training's images.
        stride: of the network's finest map.

    Raises:
        DatasetError: files of a split are missing, or nothing of them can be read.
    """
    absent = [
        s for s in config.splits if s == "test" and not all(map(Path.exists, config.splits[s]))
    ]
    tables = {split: read_afresh(config, split) for split in config.splits if split not in absent}
    findings = [
        Finding("missing split", split, (Place(split, f"no {config.splits[split][0]}"),))
        for split in absent
    ]
    findings += odd_splits(config, tables)
    looks = {split: look_through(table, config.white) for split, table in tables.items()}
    for split, table in tables.items():
        findings += of_faults(split, table.faults)
        findings += odd_pictures(split, table, looks[split])
        findings += odd_boxes(split, table, looks[split], config.names)
        findings += odd_sizes(split, table, imgsz, stride)
    findings += repetitions(tables, looks, tuple(same_splits(config)))
    findings += odd_classes(tables, config.names)
    return Report(config, imgsz, tables, tuple(sorted(findings, key=lambda f: not f.is_fault)))


def conclude(report: Report, folder: Path) -> NoReturn:
    """Print a report, leave `check.json` and pictures in a folder, and end with code 0 or 1."""
    print(report)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report.record(), indent=1)
    (folder / "check.json").write_text(text, encoding="ascii")
    write_sheets(report.findings, report.config, folder)
    get_logger().info(f"results in {folder}")
    sys.exit(0 if report.is_healthy else 1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Check a data set from the command line."""
    parser = ArgumentParser(description="Look a data set over before a training.")
    parser.add_argument(
        "--data",
        default="data/shapes.yaml",
        help="data YAML, or a folder in YOLO, COCO or VOC form",
    )
    parser.add_argument(
        "--imgsz", nargs="+", type=integer(1), default=[640], help="size, or height and width"
    )
    parser.add_argument("--project", default="runs/check", help="folder of all runs")
    parser.add_argument("--name", default="exp", help="folder of this run")
    parser.add_argument("--exist-ok", action="store_true", help="write into it even if it is taken")
    options = parser.parse_args(arguments)
    report = examine(load_data_config(options.data), parse_imgsz(options.imgsz, 1))
    conclude(report, increment_path(options.project, options.name, options.exist_ok))


if __name__ == "__main__":
    run_cli(main)
