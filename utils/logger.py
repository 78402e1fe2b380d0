"""Where a run writes what it has to say: console, results.csv, TensorBoard."""

from __future__ import annotations

import csv
import io
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from utils.errors import printable
from utils.files import write_whole

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NAME = "yoke"


def get_logger(rank: int | None = None) -> logging.Logger:
    """The project's console logger: messages as they are, to stderr.

    The root logger is left alone; a program that embeds the project may attach its own handlers to
    `logging.getLogger("yoke")`.

    Args:
        rank: of this process; ranks above 0 tell warnings only. None keeps what was set before.
    """
    logger = logging.getLogger(NAME)
    if not logger.handlers:
        logger.addHandler(_StderrHandler())
        logger.setLevel(logging.INFO)
        logger.propagate = False
    if rank is not None:
        logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    return logger


class _StderrHandler(logging.Handler):
    """Writes to whatever `sys.stderr` is at the time of the message."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        prefix = "warning: " if record.levelno >= logging.WARNING else ""
        lines = map(printable, record.getMessage().split("\n"))
        print(prefix + "\n".join(lines), file=sys.stderr, flush=True)


def results_columns(loss_terms: Sequence[str]) -> tuple[str, ...]:
    """Columns of results.csv for a family with these loss terms (`box`, `cls`, ...)."""
    return (
        "epoch",
        "time",
        *(f"train/{term}_loss" for term in loss_terms),
        "metrics/precision",
        "metrics/recall",
        "metrics/mAP_0.5",
        "metrics/mAP_0.5:0.95",
        *(f"val/{term}_loss" for term in loss_terms),
        "lr/pg0",
        "lr/pg1",
        "lr/pg2",
    )


class CsvLogger:
    """One row per epoch in a plain CSV file.

    Each row is flushed to the disk. A resumed run drops the rows of epochs that it will run again.
    """

    def __init__(self, path: str | Path, columns: Sequence[str], start_epoch: int = 0) -> None:
        """Open the file.

        Args:
            path: the file; made where missing.
            columns: names, the first of which is `epoch`.
            start_epoch: the first epoch that will be written; 0 starts a new file.
        """
        self.path = Path(path)
        self.columns = tuple(columns)
        kept = self._rows_before(start_epoch) if start_epoch and self.path.exists() else []
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        csv.writer(text, lineterminator="\n").writerows([self.columns, *kept])
        write_whole(self.path, text.getvalue().encode())

    def write(self, row: Mapping[str, float | int | str]) -> None:
        """Append one epoch; a column that `row` lacks stays empty.

        Raises:
            ValueError: `row` has a column that the file has not.
        """
        unknown = [name for name in row if name not in self.columns]
        if unknown:
            raise ValueError(
                f"{self.path}: unknown columns {unknown}, expected {list(self.columns)}"
            )
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(
                [_cell(row.get(name, "")) for name in self.columns]
            )
            file.flush()
            os.fsync(file.fileno())

    def _rows_before(self, start_epoch: int) -> list[list[str]]:
        """Whole rows of earlier epochs, in the order of this logger's columns."""
        with self.path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if None not in row.values()]
        return [
            [row.get(name, "") for name in self.columns]
            for row in rows
            if row["epoch"].strip().isdigit() and int(row["epoch"]) < start_epoch
        ]


class TensorBoardLogger:
    """Scalars for TensorBoard; does nothing where TensorBoard is not installed."""

    def __init__(self, folder: str | Path, enabled: bool = True) -> None:
        self._writer: SummaryWriter | None = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            get_logger().info("TensorBoard is not installed, no events are written")
            return
        self._writer = SummaryWriter(str(folder))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write numbers of one step."""
        if self._writer:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush and close the file."""
        if self._writer:
            self._writer.close()


def _cell(value: float | int | str) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
