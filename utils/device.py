"""Devices: which one, in which precision, how much of its memory, from which seed."""

from __future__ import annotations

import os
import random
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from utils.errors import ConfigError, nearest
from utils.logger import get_logger

AMP_CHOICES = ("auto", "bf16", "fp16", "off")


def autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Compute in `dtype` inside the block; None changes nothing, also on devices without autocast."""
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype=dtype)


class AutocastState(NamedTuple):
    """The autocast state of a forward pass, to be entered again where a part of it is run once more."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def now(cls, device: str) -> AutocastState:
        """The state in force for tensors on `device`; the meta device has none."""
        if not torch.amp.is_autocast_available(device):
            return cls("cpu", torch.bfloat16, False)
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def again(self) -> AbstractContextManager[Any]:
        """Enter the state. Without autocast's cache: a weight cast where no gradient is recorded
        must not be handed to a later use that needs one."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


def select_device(text: str = "", local_rank: int | None = None) -> torch.device:
    """Turn the `--device` flag into a device.

    Args:
        text: empty for the best there is, `cpu`, `mps`, a GPU number such as `0`, or several,
            `0,1`, of which a process started by torchrun takes the one at its local rank.
        local_rank: of this process under torchrun, None without.

    Raises:
        ConfigError: no such device here, or several GPUs without torchrun.
    """
    name = text.strip().lower().removeprefix("cuda:")
    if name in ("", "cuda"):
        return _best_device(local_rank or 0)
    if name == "cpu":
        return torch.device("cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError("--device mps: this machine has none. Use --device cpu.")
        return torch.device("mps")
    if not re.fullmatch(r"\d+(,\s*\d+)*", name):
        raise ConfigError(
            f"--device: got {text!r}, expected cpu, mps, or GPU numbers such as 0 or 0,1."
            f"{nearest(name, ('cpu', 'mps', 'cuda'))}"
        )
    numbers = [int(part) for part in name.split(",")]
    count = torch.cuda.device_count()
    absent = [n for n in numbers if n >= count]
    if absent:
        here = f"GPUs 0 to {count - 1}" if count else "no CUDA device"
        raise ConfigError(
            f"--device {text}: GPU {absent[0]} is not here - {here}. Use --device cpu."
        )
    return _current(torch.device("cuda", _of_rank(numbers, local_rank, text)))


def autocast_dtype(amp: str, device: torch.device) -> torch.dtype | None:
    """The type to compute in under autocast; None is full precision.

    `auto` is off on the CPU; on CUDA it is bfloat16 where the GPU computes in it, else float16, if
    a small product in that type agrees with float32 (some GPUs return NaN), else off.

    Raises:
        ConfigError: unknown word, or a type that the device has not.
    """
    if amp not in AMP_CHOICES:
        raise ConfigError(
            f"--amp: got {amp!r}, expected one of {', '.join(AMP_CHOICES)}."
            f"{nearest(amp, AMP_CHOICES)}"
        )
    if amp == "off" or (amp == "auto" and device.type != "cuda"):
        return None
    if amp == "fp16" and device.type == "cpu":
        raise ConfigError(
            "--amp fp16: training on the CPU needs more range. Use --amp bf16 or off."
        )
    if amp != "auto":
        return torch.bfloat16 if amp == "bf16" else torch.float16
    dtype = (
        torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    )
    if agrees_with_float32(device, dtype):
        return dtype
    get_logger().warning(f"{dtype} is not reliable on {device}: training in float32")
    return None


@torch.no_grad()
def agrees_with_float32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a convolution under autocast gives finite values near float32's; local, 10 ms."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 32, 16, 16, generator=generator).to(device)
    weights = (torch.randn(32, 32, 3, 3, generator=generator) / 17).to(device)
    exact = torch.nn.functional.conv2d(images, weights)
    with torch.autocast(device.type, dtype=dtype):
        rounded = torch.nn.functional.conv2d(images, weights).float()
    return bool(rounded.isfinite().all()) and bool((rounded - exact).abs().max() < 0.1)


def memory_used(device: torch.device) -> float:
    """GiB in use: of the GPU the peak that torch reserved, else what this process has in RAM."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    status = Path("/proc/self/statm")
    if not status.exists():
        return 0.0
    pages = int(status.read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def describe_device(device: torch.device) -> str:
    """One line for the log: `cuda:0 NVIDIA H200, 139.8 GiB`."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} {properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return str(device)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work; ask before reading a clock."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _best_device(local_rank: int) -> torch.device:
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count:
        if local_rank >= count:
            raise ConfigError(
                f"--device: local rank {local_rank} has no GPU - {count} here. "
                f"Start torchrun with --nproc_per_node {count}, or use --device cpu."
            )
        return _current(torch.device("cuda", local_rank))
    return torch.device("mps") if torch.backends.mps.is_available() else torch.device("cpu")


def _current(device: torch.device) -> torch.device:
    """Make it the one that libraries take which are not told: pinned memory, questions about its abilities."""
    if torch.cuda.is_available():
        torch.cuda.set_device(device)
    return device


def _of_rank(numbers: list[int], local_rank: int | None, text: str) -> int:
    if local_rank is None:
        if len(numbers) > 1:
            raise ConfigError(
                f"--device {text}: several GPUs need one process each. "
                f"Start with torchrun --nproc_per_node {len(numbers)} train.py ..."
            )
        return numbers[0]
    if local_rank >= len(numbers):
        raise ConfigError(
            f"--device {text}: local rank {local_rank} has no GPU in the list. "
            f"Start torchrun with --nproc_per_node {len(numbers)}."
        )
    return numbers[local_rank]


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices); `seed` is any whole number from 0."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
