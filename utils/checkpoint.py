"""One file of tensors and plain data: written atomically, read without running anything in it.

A checkpoint is a dict of tensors, numbers, text, None, lists and dicts, nothing else. Every file
carries `format: "yoke"` and `version`. The keys that this module itself knows:

    model      state dict of the network (after `finalize_checkpoint`: the averaged weights)
    ema        {"model": state dict of the average, "updates": int}
    optimizer, scaler, criterion, rng    what only a resumed training needs
"""

from __future__ import annotations

import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import CheckpointError
from utils.weight_files.torch_file import open_file, plain
from utils.weight_files.unpickle_names import PickleError

FORMAT = "yoke"
VERSION = 1
TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
TRAINING_ONLY = ("ema", "optimizer", "scaler", "criterion", "rng")


class ForeignCheckpointError(CheckpointError):
    """The file can not be taken as one of ours; it may be another project's."""


def save_checkpoint(path: str | Path, checkpoint: Mapping[str, Any]) -> None:
    """Write `checkpoint` so that a reader finds the old file or the new one, never half of one.

    Args:
        path: the file; its folder is made where missing.
        checkpoint: tensors and plain data; tensors are written detached and on the CPU.

    Raises:
        CheckpointError: if weights under `model` or `ema` are not finite, or the system refuses to write (the old
            file stays).
        TypeError: if a value is neither a tensor nor plain data.
    """
    path = Path(path)
    for key in ("model", "ema"):
        _refuse_non_finite(checkpoint.get(key), f"{path}: {key}")
    plain = {key: _plain(value, key) for key, value in checkpoint.items()}
    plain.update(format=FORMAT, version=VERSION)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(plain, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        if (refusal := _system_error(error)) is None:
            raise
        raise _not_written(path, refusal, plain) from error
    finally:
        temporary.unlink(missing_ok=True)


def _system_error(error: BaseException | None) -> OSError | None:
    """What the system said; torch tells of a full disk by what it finds missing later."""
    while error is not None and not isinstance(error, OSError):
        error = error.__context__
    return error


def _not_written(path: Path, refusal: OSError, content: Mapping[str, Any]) -> CheckpointError:
    reason = " ".join((refusal.strerror or str(refusal)).split())
    size = sum(tensor.nbytes for tensor in _tensors(content))
    free = shutil.disk_usage(path.parent).free
    before = "The file that was there is whole. " if path.exists() else ""
    return CheckpointError(
        f"{path}: cannot be written - {reason}; got {free / 2**20:.1f} MiB free, expected {size / 2**20:.1f}. {before}"
        "Make room; a training goes on with --resume."
    )


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(item)


def clear_temporary(folder: Path) -> None:
    """Remove what killed runs have left half written in a folder: `.last.pt.4711.tmp`."""
    for path in folder.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():
            path.unlink()


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a file that `save_checkpoint` wrote; all tensors on the CPU.

    Raises:
        ForeignCheckpointError: the file holds something else than one of our checkpoints.
        CheckpointError: it is missing, or written by a later version of the format.
    """
    try:
        with open_file(path) as file:
            found = file.content
            is_ours = isinstance(found, dict) and found.get("format") == FORMAT
            content = plain(file.content, file.tensor) if is_ours else None
    except PickleError as error:
        raise ForeignCheckpointError(
            f"{error} Expected a checkpoint that train.py wrote."
        ) from error
    if not isinstance(content, dict):
        keys = (
            sorted(map(str, found))[:5]
            if isinstance(found, dict)
            else type(found).__name__.removesuffix("Ref")
        )
        raise ForeignCheckpointError(
            f"{path}: not a checkpoint of this project - got {keys}, expected format: {FORMAT!r}."
        )
    version = content.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CheckpointError(
            f"{path}: format version {version!r}, expected {VERSION} or lower. Update this project."
        )
    return content


def finalize_checkpoint(path: str | Path) -> None:
    """Turn a training checkpoint into one for use: averaged weights, no training state.

    The file is rewritten in place, atomically; running it again changes nothing.
    """
    checkpoint = load_checkpoint(path)
    ema = checkpoint.get("ema")
    if ema:
        checkpoint["model"] = ema["model"]
    for key in TRAINING_ONLY:
        checkpoint.pop(key, None)
    save_checkpoint(path, checkpoint)


def capture_rng() -> dict[str, Any]:
    """State of the generators of torch (CPU, CUDA), NumPy and Python as tensors and plain data."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
        "python": [version, list(words), gauss],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """Put the generators back to what `capture_rng` saw; CUDA only if the device count agrees."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))


def _plain(value: object, where: str) -> Any:
    """Copy containers, detach tensors, refuse everything else."""
    if isinstance(value, Tensor):
        tensor = value.detach().cpu()
        is_view = tensor.untyped_storage().nbytes() > tensor.nbytes
        return tensor.clone() if is_view else tensor
    if isinstance(value, Mapping):
        bad = [key for key in value if not isinstance(key, (str, int))]
        if bad:
            raise TypeError(
                f"checkpoint[{where}]: key {bad[0]!r} is neither text nor a whole number"
            )
        return {key: _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"checkpoint[{where}]: {type(value).__name__} is neither a tensor nor plain data"
    )


def _refuse_non_finite(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            _refuse_non_finite(item, f"{where}.{key}")
    elif isinstance(value, Tensor) and value.is_floating_point() and not value.isfinite().all():
        raise CheckpointError(
            f"{where}: weights are not finite, not written. "
            "Lower the learning rate, or train with --amp off."
        )


def require_finite(state: Mapping[str, Tensor], source: str | Path) -> None:
    """Refuse weights that no number can come of.

    Args:
        state: tensors by name.
        source: the file that they are from.

    Raises:
        CheckpointError: some of them are NaN or infinite, or a running variance is below 0.
    """
    counts = {key: int(_unusable(key, value).sum()) for key, value in state.items()}
    bad = [key for key, count in counts.items() if count]
    if bad:
        raise CheckpointError(
            f"{source}: {len(bad)} of {len(state)} tensors cannot be used - {bad[0]} has {counts[bad[0]]} of "
            f"{state[bad[0]].numel()} numbers that are NaN, infinite or a negative variance, expected none. Take the "
            "checkpoint of an earlier epoch."
        )


def _unusable(key: str, value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return torch.zeros(())
    wrong = ~value.isfinite()
    return wrong | (value < 0) if key.endswith("running_var") else wrong
