"""Order, sharding and workers: the same batches whatever loads them."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data import loader
from data.dataset import LoadOptions, build_dataset
from data.loader import EpochSampler, available_cores, bounded_workers, build_loader
from utils.errors import DatasetError

ROOT = Path(__file__).resolve().parents[2]
HYP = {"mosaic": 0.7, "mixup": 0.2, "scale": 0.4, "translate": 0.1, "hsv_s": 0.5, "fliplr": 0.5}


@pytest.fixture
def dataset(config_of):
    return build_dataset(
        config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP, seed=1)
    )


@pytest.fixture
def several_cores(monkeypatch):
    monkeypatch.setattr("data.loader.available_cores", lambda: 4)


def epochs(loader, numbers):
    batches = []
    for epoch in numbers:
        loader.set_epoch(epoch)
        batches.append(list(loader))
    return batches


def same(first, second) -> bool:
    """True if two lists of batches are equal in every bit."""
    if len(first) != len(second):
        return False
    for a, b in zip(first, second, strict=True):
        tensors = [(a.images, b.images), *zip(a.targets, b.targets, strict=True)]
        if not all(torch.equal(x, y) for x, y in tensors) or a[2:] != b[2:]:
            return False
    return True


def test_a_batch_holds_what_its_type_says(dataset):
    batch = next(iter(build_loader(dataset, 4, workers=0)))
    assert batch.images.shape == (4, 3, 64, 96) and batch.images.dtype == torch.uint8
    index, labels, boxes = batch.targets
    assert index.dtype == labels.dtype == torch.int64 and boxes.dtype == torch.float32
    assert len(index) == len(labels) == len(boxes) and (index.diff() >= 0).all()
    assert batch.image_ids == (1, 2, 3, 4) and len(batch.letterboxes) == len(batch.paths) == 4


def test_a_batch_without_any_object_is_ordinary(tiny, config_of):
    for file in (tiny / "labels" / "val").iterdir():
        file.write_text("")
    dataset = build_dataset(config_of("yolo"), "val", LoadOptions(imgsz=(64, 64)))
    batch = next(iter(build_loader(dataset, 2, workers=0)))
    assert batch.targets.image_index.dtype == torch.int64
    assert batch.targets.boxes.shape == (0, 4) and batch.targets.boxes.dtype == torch.float32


def test_workers_change_nothing_over_epochs(dataset, several_cores):
    """Workers that live through all epochs, against no workers; and the epochs differ."""
    with_workers = build_loader(dataset, 2, workers=2, shuffle=True, seed=5)
    assert with_workers.num_workers == 2 and with_workers.persistent_workers
    got = epochs(with_workers, range(3))
    expected = epochs(build_loader(dataset, 2, workers=0, shuffle=True, seed=5), range(3))
    for first, second in zip(got, expected, strict=True):
        assert same(first, second)
    assert not same(got[0], got[1]) and not same(got[1], got[2])


def test_a_resumed_run_sees_what_an_unbroken_one_sees(config_of, several_cores):
    def fresh():
        return build_dataset(
            config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP)
        )

    unbroken = epochs(build_loader(fresh(), 2, workers=2, shuffle=True), range(4))
    torch.rand(7)
    resumed = epochs(build_loader(fresh(), 2, workers=2, shuffle=True), range(2, 4))
    assert same(unbroken[2], resumed[0]) and same(unbroken[3], resumed[1])


def test_loading_draws_nothing_from_the_global_generator(dataset):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(build_loader(dataset, 2, workers=0, shuffle=True))
    assert torch.rand(1) == expected


def test_every_image_comes_once_per_epoch_in_a_new_order():
    sampler = EpochSampler(50, shuffle=True, seed=2)
    orders = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        keys = list(sampler)
        assert {key[0] for key in keys} == {epoch}
        orders.append([key[1] for key in keys])
        assert sorted(orders[-1]) == list(range(50))
    assert orders[0] != orders[1] != orders[2]
    assert [key[1] for key in EpochSampler(50, shuffle=False)] == list(range(50))


@pytest.mark.parametrize(("length", "world_size", "batch"), [(24, 2, 4), (23, 2, 4), (10, 3, 2)])
def test_shards_join_to_the_batches_of_one_process(length, world_size, batch):
    """Batch k of all ranks together is batch k of a single process with the joint batch size."""
    whole = list(EpochSampler(length, shuffle=True, seed=1))
    shards = [
        list(EpochSampler(length, shuffle=True, seed=1, rank=r, world_size=world_size))
        for r in range(world_size)
    ]
    assert len({len(shard) for shard in shards}) == 1
    joint = batch * world_size
    for k in range(length // joint):
        together = [key for shard in shards for key in shard[k * batch : (k + 1) * batch]]
        assert sorted(together) == sorted(whole[k * joint : (k + 1) * joint])


def test_unshuffled_shards_hold_every_image_exactly_once():
    for block in (1, 4):
        seen = Counter()
        for rank in range(3):
            sampler = EpochSampler(23, shuffle=False, rank=rank, world_size=3, block=block)
            keys = [key[1] for key in sampler]
            assert len(keys) == len(sampler)
            seen.update(keys)
        assert seen == Counter(range(23))


def test_rect_batches_stay_together_when_shuffled(config_of):
    dataset = build_dataset(
        config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), rect=True, batch_size=2)
    )
    loader = build_loader(dataset, 2, workers=0, shuffle=True, seed=3)
    shapes = set()
    for batches in epochs(loader, range(6)):
        assert sorted(image for batch in batches for image in batch.image_ids) == [1, 2, 3, 4]
        shapes.add(tuple(tuple(batch.images.shape[2:]) for batch in batches))
    assert shapes == {((64, 96), (64, 64)), ((64, 64), (64, 96))}
    with pytest.raises(ValueError, match="rect batches"):
        build_loader(dataset, 3, workers=0)


def test_a_rect_batch_that_is_not_full_comes_last():
    sampler = EpochSampler(10, shuffle=True, block=4, seed=0)
    for epoch in range(8):
        sampler.set_epoch(epoch)
        order = [key[1] for key in sampler]
        assert order[8:] == [8, 9] and sorted(order) == list(range(10))


def test_image_weights_decide_how_often_images_come():
    sampler = EpochSampler(4, shuffle=True, image_weights=[0, 1, 3, 0])
    counts = Counter()
    for epoch in range(500):
        sampler.set_epoch(epoch)
        counts.update(key[1] for key in sampler)
    assert set(counts) == {1, 2} and counts[2] / counts[1] == pytest.approx(3, rel=0.2)
    with pytest.raises(ValueError, match="image weights"):
        EpochSampler(4, shuffle=True, image_weights=[1, 2])


def test_no_more_workers_than_cores_or_shared_memory(dataset, monkeypatch, caplog):
    caplog.set_level("INFO", "yoke")
    assert bounded_workers(500, dataset, 2) <= available_cores()
    assert "--workers: " in caplog.text and "cores" in caplog.text
    caplog.clear()
    monkeypatch.setattr("data.loader.available_cores", lambda: 8)
    monkeypatch.setattr("data.loader._shared_memory", lambda: 3.5 * 3 * 2 * 64 * 96 * 3)
    assert bounded_workers(8, dataset, 2) == 3
    assert "free in /dev/shm" in caplog.text
    assert bounded_workers(0, dataset, 2) == 0


def test_a_worker_that_dies_is_explained(dataset, several_cores, monkeypatch):
    def die(self, key):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(type(dataset), "__getitem__", die)
    with pytest.raises(DatasetError) as caught:
        list(build_loader(dataset, 2, workers=1))
    assert "--workers 0" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_stays_one_line(tiny, dataset, several_cores, workers):
    for name in "abcd":
        (tiny / f"images/train/{name}.png").write_bytes(b"gone bad")
    with pytest.raises(DatasetError) as caught:
        list(build_loader(dataset, 4, workers=workers))
    assert "\n" not in str(caught.value)
    assert str(caught.value).split(".png")[0].startswith(str(tiny))


def test_an_error_keeps_no_worker(dataset, several_cores, monkeypatch):
    """A loader that only the collector of cycles could free has workers that nobody can tell any more to end."""

    def fail(self, key):
        raise DatasetError("no")

    monkeypatch.setattr(type(dataset), "__getitem__", fail)
    loader = build_loader(dataset, 2, workers=1)
    gc.disable()
    try:
        try:
            list(loader)
        except DatasetError:
            seen = weakref.ref(loader)
        del loader
        assert seen() is None
    finally:
        gc.enable()


def test_workers_use_one_thread(dataset, several_cores, monkeypatch):
    def report(self, key):
        raise DatasetError(f"threads {cv2.getNumThreads()} {torch.get_num_threads()}")

    monkeypatch.setattr(type(dataset), "__getitem__", report)
    with pytest.raises(DatasetError, match=r"threads [01] 1"):
        list(build_loader(dataset, 2, workers=1))


def test_what_workers_import_is_light():
    heavy = (
        "timm",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "tensorboard",
        "pandas",
        "scipy",
        "models",
    )
    script = f"import data.loader, sys; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_labels_are_flat_arrays(dataset):
    """No container of Python objects per image or object hangs on the data set."""
    for name, value in vars(dataset.table).items():
        if name != "faults":
            assert isinstance(value, (np.ndarray, int)) or type(value).__name__ == "Texts", name
    assert all(isinstance(getattr(dataset, n), np.ndarray) for n in ("labels", "boxes", "offsets"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux")
def test_the_memory_of_a_worker_does_not_grow_over_epochs(tiny, config_of, several_cores):
    pixels = (tiny / "images/train/a.png").read_bytes()
    rows = (tiny / "labels/train/a.txt").read_text() * 20
    for k in range(400):
        (tiny / f"images/train/n{k}.png").write_bytes(pixels)
        (tiny / f"labels/train/n{k}.txt").write_text(rows)
    dataset = build_dataset(
        config_of("yolo"), "train", LoadOptions(imgsz=(64, 96), augment=True, hyp=HYP, cache="ram")
    )
    loader = build_loader(dataset, 16, workers=1, shuffle=True)
    private = []
    for batches in range(8):
        epochs(loader, [batches])
        (worker,) = loader._iterator._workers
        text = Path(f"/proc/{worker.pid}/smaps_rollup").read_text()
        sizes = [line.split()[1] for line in text.splitlines() if line.startswith("Private_")]
        private.append(sum(map(int, sizes)) / 1024)
    assert max(private[3:]) - private[2] < 2, f"MB after each epoch: {private}"


DEAF = """
import signal, sys
sys.path.insert(0, {root!r})
from data.config import load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.loader import build_loader

get = DetectionDataset.__getitem__

def deaf(self, key):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    return get(self, key)

DetectionDataset.__getitem__ = deaf
dataset = build_dataset(load_data_config({data!r}), "train", LoadOptions(imgsz=(64, 64)))
sys.kept = iter(build_loader(dataset, 2, workers=1))  # a traceback keeps its loader in this way
next(sys.kept)
raise SystemExit(3)
"""


def test_a_worker_that_takes_no_signal_does_not_hold_the_end_of_the_program(small_data: Path):
    script = DEAF.format(root=str(Path(__file__).resolve().parents[2]), data=str(small_data))
    ended = subprocess.run([sys.executable, "-c", script], timeout=120, check=False)
    assert ended.returncode == 3


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGCHLD")
def test_the_death_of_a_worker_is_raised_behind_the_making_of_others():
    def die(number: int, frame: object) -> None:
        raise RuntimeError("a worker is killed")

    before, reached = signal.signal(signal.SIGCHLD, die), []
    try:
        with pytest.raises(RuntimeError, match="is killed"), loader._deaths_told_later():
            os.kill(os.getpid(), signal.SIGCHLD)
            reached.append(signal.getsignal(signal.SIGCHLD) is not die)
        assert reached == [True] and signal.getsignal(signal.SIGCHLD) is die
        with loader._deaths_told_later():
            pass  # nobody died
    finally:
        signal.signal(signal.SIGCHLD, before)
