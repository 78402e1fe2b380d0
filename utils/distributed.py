"""Processes started by `torchrun`: who am I, what do the others have.

No collective waits on long work of rank 0: every rank does its share of scanning and validation,
and what is gathered are results. Without `torchrun` everything here is the identity on one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.errors import ConfigError

T = TypeVar("T")


class World(NamedTuple):
    """The place of this process among all.

    Attributes:
        rank: number of this process over all machines.
        local_rank: number on this machine, the index of its GPU.
        size: how many processes there are.
    """

    rank: int = 0
    local_rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether there are others."""
        return self.size > 1


def read_world(environment: Mapping[str, str] | None = None) -> World:
    """Read what torchrun set (`RANK`, `LOCAL_RANK`, `WORLD_SIZE`); one process where it did not.

    Raises:
        ConfigError: the variables are incomplete or do not fit each other.
    """
    environment = os.environ if environment is None else environment
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    found = [environment.get(name) for name in names]
    if found[0] is None and found[2] is None:
        return World()
    if not all(value is not None and value.isdigit() for value in found):
        told = ", ".join(f"{n}={v}" for n, v in zip(names, found, strict=True))
        raise ConfigError(
            f"distributed: got {told}, expected three whole numbers. Start with torchrun."
        )
    world = World(*(int(value) for value in found if value is not None))
    if not world.rank < world.size:
        raise ConfigError(
            f"distributed: got RANK={world.rank}, expected less than WORLD_SIZE={world.size}."
        )
    return world


@contextmanager
def process_group(
    world: World, device: torch.device, timeout_minutes: float = 30
) -> Iterator[None]:
    """Join the other processes for the length of a `with` block: nccl on CUDA, gloo otherwise."""
    if not world.is_distributed:
        yield
        return
    backend = "nccl" if device.type == "cuda" and dist.is_nccl_available() else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what gathers Python objects uses the current device
    dist.init_process_group(
        backend, rank=world.rank, world_size=world.size, timeout=timedelta(minutes=timeout_minutes)
    )
    yield
    # Not after an error: leaving would wait for the others, who wait here for what will not come. torchrun ends them.
    dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process has joined others."""
    return dist.is_available() and dist.is_initialized()


def all_gather_objects(value: T) -> list[T]:
    """What every process has, by rank; trusted peers only, as torch sends Python objects."""
    if not is_initialized():
        return [value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def broadcast_object(value: T) -> T:
    """What rank 0 has."""
    if not is_initialized():
        return value
    box: list[Any] = [value]
    dist.broadcast_object_list(box, src=0)
    received: T = box[0]
    return received


def all_true(flag: Tensor, *others: bool) -> list[bool]:
    """Whether each of the flags (`flag` is a single truth value) holds in every process."""
    if not is_initialized():
        return [bool(flag), *others]
    least = torch.stack([flag, *(flag.new_tensor(other) for other in others)]).int()
    dist.all_reduce(least, op=dist.ReduceOp.MIN)
    return [bool(value) for value in least.tolist()]


def local_processes(world_size: int) -> int:
    """How many of the processes share this machine's cores and memory."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(text) if text.isdigit() and int(text) else world_size


def share_buffers(model: nn.Module) -> None:
    """Give every process the buffers (BatchNorm statistics) that rank 0 has."""
    if is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel (and `torch.compile`), or the model itself."""
    if isinstance(model, DistributedDataParallel):
        model = model.module
    original = getattr(model, "_orig_mod", None)
    return original if isinstance(original, nn.Module) else model


def unused_parameters(model: nn.Module) -> list[str]:
    """Names of trainable parameters that got no gradient; ask after `backward`, before the step.

    DistributedDataParallel stops with numbers where one has none; the names say what to mend.
    """
    return [
        name
        for name, parameter in unwrap(model).named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
