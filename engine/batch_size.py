"""`--batch-size -1`: as many images a step as the GPU's memory holds."""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import nn

from utils.distributed import World, all_gather_objects
from utils.errors import ConfigError
from utils.logger import get_logger


def settle_batch_size(
    wanted: int, model: nn.Module, imgsz: tuple[int, int], device: torch.device, world: World
) -> int:
    """Images a step over all processes; -1 means as many as fit into the one with the least memory."""
    if wanted == -1:
        return min(all_gather_objects(automatic_batch_size(model, imgsz, device))) * world.size
    if wanted % world.size:
        raise ConfigError(
            f"--batch-size: got {wanted}, expected a multiple of the {world.size} processes."
        )
    return wanted


def automatic_batch_size(
    model: nn.Module, imgsz: tuple[int, int], device: torch.device, share: float = 0.7
) -> int:
    """The largest power of two whose training step fits into `share` of the GPU's free memory; 16 without a GPU."""
    log = get_logger()
    if device.type != "cuda":
        log.info("--batch-size -1: no GPU to measure, 16 is used")
        return 16
    free, _ = torch.cuda.mem_get_info(device)
    used = _memory_of_steps(copy.deepcopy(model), imgsz, device)
    if not used:
        raise ConfigError(
            f"--batch-size -1: not one image of {imgsz[0]}x{imgsz[1]} fits into {free / 2**30:.1f} GiB. Give a smaller "
            "--imgsz or model."
        )
    if len(used) == 1:
        return 1
    slope, offset = np.polyfit([b for b, _ in used], [m for _, m in used], 1)
    fits = max(int((free * share - offset) / slope), 1)
    size = 2 ** int(np.log2(fits))
    log.info(
        f"--batch-size -1: {size} ({slope / 2**20:.0f} MiB an image, {free / 2**30:.1f} GiB free)"
    )
    return size


def _memory_of_steps(
    model: nn.Module, imgsz: tuple[int, int], device: torch.device
) -> list[tuple[int, int]]:
    """Bytes that a step takes, for some batch sizes, as long as they fit; moves the model's BatchNorm statistics."""
    used = []
    for batch in (1, 2, 4, 8):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            raw = model(torch.zeros(batch, 3, *imgsz, device=device))
            torch.stack([t.float().sum() for t in _tensors(raw)]).sum().backward()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        model.zero_grad(set_to_none=True)
        used.append((batch, torch.cuda.max_memory_allocated(device) - before))
    return used


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
