"""Batches out of a data set, and the processes that load them.

The sampler gives keys (epoch, index), so workers that live through all epochs know which epoch a
sample is for.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import FrameType

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from data.dataset import DetectionDataset, Key, Sample
from data.sampling import EpochSampler
from utils.distributed import local_processes
from utils.errors import DatasetError, worker_death
from utils.logger import get_logger
from utils.structures import Batch, Targets

PREFETCH = 2
"""Batches that each worker holds ready."""
SHARED_MEMORY = "/dev/shm"
NEWS_OF_A_DEATH = 1.0  # seconds; the system tells of a killed worker after its connection is gone
GROUP_SIGNALS = {signal.SIGINT, signal.SIGTERM}
if sys.platform != "win32":
    GROUP_SIGNALS.add(signal.SIGHUP)


class _Handed(Dataset["Sample | DatasetError"]):
    """Samples, or what is wrong with one: an error that a worker raises reaches the main process as text alone."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> Sample | DatasetError:
        try:
            return self.dataset[key]
        except DatasetError as error:
            return error.with_traceback(None)


class DetectionLoader(DataLoader["Sample | DatasetError"]):
    """A `DataLoader` that yields `Batch` and says what to do when a worker fails."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            try:
                # A new worker opens itself to the signals when it knows what to do.
                with _signals_blocked(), _deaths_told_later():
                    batches = super().__iter__()
                for batch in batches:
                    if isinstance(batch, DatasetError):
                        try:
                            raise batch
                        finally:
                            del batch  # an error that holds its own frame would keep the workers, who end late then
                    yield batch  # type: ignore[misc]
            except (ConnectionError, EOFError):
                time.sleep(NEWS_OF_A_DEATH)  # torch's own error, which says whose, is on its way
                raise
        except RuntimeError as error:
            if not (told := worker_death(error)):
                raise
            raise DatasetError(told) from error

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch that the next iteration is for; it begins behind the `done` first batches."""
        assert isinstance(self.sampler, EpochSampler)
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
    atexit.unregister(_end_workers)  # so that it stands there once
    atexit.register(_end_workers)
    options = dataset.options
    if options.rect and batch_size != options.batch_size:
        raise ValueError(f"rect batches: got {batch_size} images, expected {options.batch_size}")
    sampler = EpochSampler(
        len(dataset),
        shuffle=shuffle,
        seed=seed,
        rank=rank,
        world_size=world_size,
        block=batch_size if options.rect else 1,
        image_weights=dataset.weights.chances if shuffle and dataset.weights else None,
    )
    workers = bounded_workers(workers, dataset, batch_size, local_processes(world_size))
    return DetectionLoader(
        _Handed(dataset),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_begin_worker,
        # A generator of its own: the global one, which a resumed run restores, stays untouched.
        generator=torch.Generator().manual_seed(seed),
        prefetch_factor=PREFETCH if workers else None,
        persistent_workers=workers > 0,
    )


def collate(samples: Sequence[Sample | DatasetError]) -> Batch | DatasetError:
    """Put samples of one size into a batch; the first of their errors goes before."""
    good = []
    for sample in samples:
        if isinstance(sample, DatasetError):
            return sample
        good.append(sample)
    images, labels, boxes, image_ids, letterboxes, paths = zip(*good)
    counts = torch.tensor([len(own) for own in labels])
    image_index = torch.repeat_interleave(torch.arange(len(good)), counts)
    targets = Targets(image_index, torch.cat(labels), torch.cat(boxes))
    return Batch(torch.stack(images), targets, image_ids, letterboxes, paths)


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
        batch_bytes = batch_size * dataset.options.imgsz[0] * dataset.options.imgsz[1] * 3
        fitting = int(room / world_size / (batch_bytes * (PREFETCH + 1)))
        if fitting < chosen:
            chosen, reason = fitting, f"{room / 1e6:.0f} MB free in {SHARED_MEMORY}"
    if chosen < workers:
        _tell_once(f"--workers: {chosen} instead of {workers} ({reason})")
    return chosen


@cache
def _tell_once(message: str) -> None:
    """Training and validation loaders have the same to say."""
    get_logger().info(message)


def available_cores() -> int:
    """Cores that this process may run on."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _shared_memory() -> int | None:
    return shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None


def _end_workers() -> None:
    """Leave no worker that the end of this process would wait for: a program that ends by an error sends them one SIGTERM or
    two, and two that arrive together count as one."""
    for child in multiprocessing.active_children():
        child.kill()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Keep back the signals that all processes of a run get; processes that are made meanwhile do too."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, GROUP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _deaths_told_later() -> Iterator[None]:
    """Let torch raise the death of a worker behind the block: where a process is forked Python prints it and goes on."""
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGCHLD) if is_main and sys.platform != "win32" else None
    if not callable(handler):
        yield
        return
    deaths: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGCHLD, lambda *death: deaths.append(death))
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, handler)
        if deaths:
            handler(*deaths[-1])


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
    if sys.platform != "win32":
        signal.pthread_sigmask(signal.SIG_UNBLOCK, GROUP_SIGNALS)


def _end_next_time(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)
