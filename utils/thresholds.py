"""The lowest score of a detection, class by class, as a model keeps it for `detect.py --conf-thres auto`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.checkpoint import load_checkpoint, save_checkpoint
from utils.errors import ConfigError

KEY = "conf_thres"


def class_thresholds(config: Mapping[str, Any], num_classes: int) -> tuple[float, ...] | None:
    """What a model's mapping, or a file's metadata, says; None where it says nothing.

    Raises:
        ConfigError: something else stands there than a share for each class.
    """
    found = config.get(KEY)
    if found is None:
        return None
    values = found if isinstance(found, (list, tuple)) else ()
    if len(values) != num_classes or not all(map(_is_share, values)):
        raise ConfigError(
            f"{KEY}: got {str(found)[:40]!r}, expected {num_classes} numbers from 0 to 1, one a class."
        )
    return tuple(map(float, values))


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def keep_thresholds(path: Path, thresholds: Sequence[float]) -> None:
    """Write them into one of our checkpoints, from which exports take them.

    Raises:
        CheckpointError: the file is none, or cannot be written.
    """
    checkpoint = load_checkpoint(path)
    checkpoint["config"] = {**checkpoint["config"], KEY: list(thresholds)}
    save_checkpoint(path, checkpoint)
