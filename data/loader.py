"""Batches out of a data set: order, sharding over processes, workers.

B batch, n images of the data set. The sampler gives keys (epoch, index), so workers that live
through all epochs know which epoch a sample is for.
"""

from __future__ import annotations

import atexit
import logging
import math
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Sampler

from data.dataset import DetectionDataset, Sample
from utils.distributed import local_processes
from utils.errors import DatasetError, worker_death
from utils.structures import Batch, Targets

LOGGER = logging.getLogger("yoke.data")
PREFETCH = 2
"""Batches that each worker holds ready."""
SHARED_MEMORY = "/dev/shm"
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) in an order that depends on seed and epoch alone.

    With several processes each takes every `world_size`-th key, so that one step of all of them
    sees the images of one step of a single process with the joint batch. If shuffled, all get
    equally many (the first keys again at the end); otherwise each image comes exactly once.

    Args:
        length: images of the data set.
        shuffle: a new order every epoch.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        block: this many neighbours stay together, whole blocks are shuffled and dealt out; for
            data sets whose batches have their own shapes.
        image_weights: how often each image is drawn, with replacement, in place of once, (n,).
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        block: int = 1,
        image_weights: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        assert 0 <= rank < world_size, "a rank of this run"
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world_size, self.block = rank, world_size, block
        self.epoch = self.skip = 0
        self.image_weights: NDArray[np.float64] | None = None
        if image_weights is not None:
            self.set_image_weights(image_weights)

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch that the next iteration is for, without its first `skip` keys."""
        self.epoch, self.skip = epoch, skip

    def set_image_weights(self, weights: Sequence[float] | NDArray[np.float64]) -> None:
        """Draw images in proportion to `weights`, (n,), from the next iteration on."""
        numbers = np.asarray(weights, dtype=np.float64)
        if numbers.shape != (self.length,) or numbers.min() < 0 or not numbers.sum() > 0:
            raise ValueError(f"image weights: got {numbers.shape}, expected {self.length}, >= 0")
        if self.block > 1:
            raise DatasetError("--image-weights: cannot be used with --rect. Drop one of them.")
        self.image_weights = numbers / numbers.sum()

    def __len__(self) -> int:
        return len(self._own(self._blocks(np.arange(self.length))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.image_weights is not None:
            order = rng.choice(self.length, self.length, p=self.image_weights)
        elif self.shuffle and self.block == 1:
            order = rng.permutation(self.length)
        blocks = self._blocks(order)
        if self.shuffle and self.block > 1:
            # A last block that is not full stays last, or it would shift all batches after it.
            full = self.length // self.block
            blocks = [blocks[k] for k in rng.permutation(full)] + blocks[full:]
        return ((self.epoch, int(index)) for index in self._own(blocks)[self.skip :])

    def _blocks(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [order[k : k + self.block] for k in range(0, len(order), self.block)]

    def _own(self, blocks: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The indices that this process takes."""
        if self.shuffle and blocks and self.world_size > 1:
            if self.block > 1 and len(blocks[-1]) < self.block:
                blocks = [*blocks[:-1], np.resize(blocks[-1], self.block)]
            wanted = math.ceil(len(blocks) / self.world_size) * self.world_size
            blocks = [blocks[k % len(blocks)] for k in range(wanted)]
        own = blocks[self.rank :: self.world_size]
        return np.concatenate(own) if own else np.zeros(0, dtype=np.int64)


class DetectionLoader(DataLoader[Sample]):
    """A `DataLoader` that yields `Batch` and says what to do when a worker fails."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            with _signals_blocked():  # a new worker opens itself to them when it knows what to do
                batches = super().__iter__()
            yield from batches  # type: ignore[misc]
        except DatasetError as error:
            # Workers hand over the whole traceback as the message; its last line is the message.
            message = str(error).strip().splitlines()[-1]
            # Without its frames: they hold the loader in a cycle, and workers whose loader is
            # collected late take seconds to end.
            raise DatasetError(message.split("Error: ", 1)[-1]) from error.with_traceback(None)
        except RuntimeError as error:
            if not (told := worker_death(error)):
                raise
            raise DatasetError(told) from error

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch that the next iteration is for; it begins behind the `done` first batches."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.set_epoch(epoch, done * (self.batch_size or 1))


def build_loader(
    dataset: DetectionDataset,
    batch_size: int,
    *,
    workers: int,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = False,
) -> DetectionLoader:
    """Make the loader of a data set.

    Args:
        dataset: what to load.
        batch_size: images of a batch, of this process.
        workers: processes that load; fewer are taken if there are fewer cores or too little
            shared memory. 0 loads in this process.
        shuffle: a new order every epoch, by the weights of the data set if it has some.
        seed: of the order.
        rank: of this process.
        world_size: number of processes that train together.
        drop_last: leave out a last batch that is not full.
    """
    _end_workers_at_exit()
    if dataset.rect and batch_size != dataset.batch_size:
        raise ValueError(f"rect batches: got {batch_size} images, expected {dataset.batch_size}")
    sampler = EpochSampler(
        len(dataset),
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        block=batch_size if dataset.rect else 1,
        image_weights=dataset.weights.chances if shuffle and dataset.weights else None,
    )
    workers = bounded_workers(workers, dataset, batch_size, local_processes(world_size))
    options: dict[str, Any] = {}
    if workers:
        options = {"prefetch_factor": PREFETCH, "persistent_workers": True}
    return DetectionLoader(
        dataset,
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
        # A generator of its own: the global one, which a resumed run restores, stays untouched.
        generator=torch.Generator().manual_seed(seed),
        **options,
    )


def collate(samples: Sequence[Sample]) -> Batch:
    """Put samples of one size into a batch."""
    counts = torch.tensor([len(sample.labels) for sample in samples])
    targets = Targets(
        torch.repeat_interleave(torch.arange(len(samples)), counts),
        torch.cat([sample.labels for sample in samples]),
        torch.cat([sample.boxes for sample in samples]),
    )
    return Batch(
        torch.stack([sample.image for sample in samples]),
        targets,
        tuple(sample.image_id for sample in samples),
        tuple(sample.letterbox for sample in samples),
        tuple(sample.path for sample in samples),
    )


def bounded_workers(
    workers: int, dataset: DetectionDataset, batch_size: int, world_size: int = 1
) -> int:
    """How many workers to start: no more than cores, nor than shared memory has room for.

    `world_size` counts the processes of this machine.
    """
    cores = max(1, available_cores() // world_size)
    chosen = min(workers, cores)
    reason = f"{cores} cores per process"
    room = _shared_memory()
    if room is not None and chosen:
        batch_bytes = batch_size * dataset.imgsz[0] * dataset.imgsz[1] * 3
        fitting = int(room / world_size / (batch_bytes * (PREFETCH + 1)))
        if fitting < chosen:
            chosen, reason = fitting, f"{room / 1e6:.0f} MB free in {SHARED_MEMORY}"
    if chosen < workers:
        _tell_once(f"--workers: {chosen} instead of {workers} ({reason})")
    return chosen


@cache
def _tell_once(message: str) -> None:
    """Training and validation loaders have the same to say."""
    LOGGER.info(message)


def available_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shared_memory() -> int | None:
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None


@cache
def _end_workers_at_exit() -> None:
    """Leave no worker that the end of this process would wait for: a program that ends by an error sends them one SIGTERM or
    two, and two that arrive together count as one."""
    atexit.register(_end_workers)


def _end_workers() -> None:
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep back the signals that all processes of a run get; processes that are made meanwhile do too."""
    if not hasattr(signal, "pthread_sigmask"):  # as on Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin_worker(_: int) -> None:
    """One thread per worker, or they would fight over the cores; and the main process decides when they end.

    Terminals and schedulers send their signals to all processes of a run. Workers that ended at the
    first one would take the batches with them that the main process needs to finish its step.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for number in GROUP_SIGNALS:
        # The main process sends SIGTERM, and repeats it, to a worker that hangs.
        is_last_resort = number == signal.SIGTERM
        signal.signal(number, _end_next_time if is_last_resort else signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def _end_next_time(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
