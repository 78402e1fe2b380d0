"""Devices, precision, seeds, processes."""

import random
import socket

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

from utils.device import (
    agrees_with_float32,
    autocast,
    autocast_dtype,
    memory_used,
    seed_everything,
    select_device,
)
from utils.distributed import (
    World,
    all_gather_objects,
    all_true,
    broadcast_object,
    is_initialized,
    local_processes,
    process_group,
    read_world,
    unused_parameters,
    unwrap,
)
from utils.errors import ConfigError

CPU = torch.device("cpu")


def test_cpu_is_always_there() -> None:
    assert select_device("cpu") == CPU
    assert select_device(" CPU ") == CPU


def with_gpus(monkeypatch, count: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def test_the_best_device_is_the_gpu_of_the_local_rank(monkeypatch) -> None:
    with_gpus(monkeypatch, 2)
    current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert select_device("") == torch.device("cuda", 0)
    assert select_device("", local_rank=1) == torch.device("cuda", 1)
    assert select_device("cuda:1") == torch.device("cuda", 1)
    assert select_device("1,0", local_rank=0) == torch.device("cuda", 1)
    assert [device.index for device in current] == [0, 1, 1, 1]
    with pytest.raises(ConfigError, match="local rank 2 has no GPU"):
        select_device("", local_rank=2)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU in the list"):
        select_device("0,1", local_rank=2)


@pytest.mark.parametrize(
    ("text", "gpus", "expected"),
    [
        ("0", 0, "GPU 0 is not here - no CUDA device. Use --device cpu."),
        ("0,3", 2, "GPU 3 is not here - GPUs 0 to 1"),
        ("0,1", 2, "several GPUs need one process each. Start with torchrun --nproc_per_node 2"),
        ("cpuu", 0, "expected cpu, mps, or GPU numbers such as 0 or 0,1. Did you mean 'cpu'?"),
    ],
)
def test_devices_that_are_not_there_are_refused(text, gpus, expected, monkeypatch) -> None:
    with_gpus(monkeypatch, gpus)
    with pytest.raises(ConfigError) as caught:
        select_device(text)
    assert expected in str(caught.value)


def test_automatic_precision_is_full_on_the_cpu() -> None:
    assert autocast_dtype("auto", CPU) is None
    assert autocast_dtype("off", CPU) is None
    assert autocast_dtype("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("amp", ["fp16", "f16"])
def test_precisions_that_do_not_fit_are_refused(amp: str) -> None:
    with pytest.raises(ConfigError, match="--amp"):
        autocast_dtype(amp, CPU)


@pytest.mark.parametrize(
    ("supported", "reliable", "expected"),
    [(True, True, torch.bfloat16), (False, True, torch.float16), (False, False, None)],
)
def test_automatic_precision_on_a_gpu(supported, reliable, expected, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: supported)
    monkeypatch.setattr("utils.device.agrees_with_float32", lambda device, dtype: reliable)
    assert autocast_dtype("auto", torch.device("cuda", 0)) == expected


def test_the_self_test_tells_a_good_type_from_a_broken_one(monkeypatch) -> None:
    assert agrees_with_float32(CPU, torch.bfloat16)
    convolve = torch.nn.functional.conv2d

    def broken(images, weights):
        result = convolve(images, weights)
        return result * float("nan") if torch.is_autocast_enabled("cpu") else result

    monkeypatch.setattr(torch.nn.functional, "conv2d", broken)
    assert not agrees_with_float32(CPU, torch.bfloat16)


def test_memory_of_this_process_is_counted_in_gibibytes() -> None:
    assert 0.01 < memory_used(CPU) < 100


def test_the_same_seed_gives_the_same_numbers() -> None:
    def draw() -> tuple:
        seed_everything(3)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_the_world_is_read_from_torchrun() -> None:
    assert read_world({}) == World(0, 0, 1)
    given = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}
    assert read_world(given) == World(3, 1, 4)
    assert read_world(given).is_distributed
    assert not read_world(given).is_main
    for wrong in ({"RANK": "0"}, {**given, "RANK": "x"}, {**given, "RANK": "4"}):
        with pytest.raises(ConfigError, match="distributed"):
            read_world(wrong)


def test_one_process_alone_needs_no_group() -> None:
    with process_group(World(), CPU):
        assert not is_initialized()
        assert all_gather_objects("a") == ["a"]
        assert broadcast_object("a") == "a"
        assert all_true(torch.tensor(True), False) == [True, False]
        assert all_true(torch.tensor(False)) == [False]


def test_processes_of_this_machine_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert local_processes(16) == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert local_processes(16) == 8


def test_no_type_means_no_autocast() -> None:
    with autocast(torch.device("meta"), None):
        assert torch.ones(1).dtype == torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


def test_parameters_without_gradient_are_named() -> None:
    model = nn.ModuleDict(
        {"used": nn.Linear(1, 1), "spare": nn.Linear(1, 1), "cold": nn.Linear(1, 1)}
    )
    model["cold"].requires_grad_(False)
    model["used"](torch.ones(1, 1)).sum().backward()
    assert unused_parameters(model) == ["spare.weight", "spare.bias"]


def run_rank(rank: int, port: int, queue) -> None:
    import os

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with process_group(World(rank, rank, 2), CPU):
        gathered = all_gather_objects({"rank": rank})
        first = broadcast_object(f"from {rank}")
        mean = all_true(torch.tensor(True), rank == 0, False)
        wrapped = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
        queue.put((rank, gathered, first, mean, type(unwrap(wrapped)).__name__))
    assert not is_initialized()


def test_two_gloo_processes_exchange_what_they_have() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    queue = mp.get_context("spawn").SimpleQueue()
    mp.spawn(run_rank, args=(port, queue), nprocs=2)
    results = sorted(queue.get() for _ in range(2))
    for rank, result in enumerate(results):
        expected = (rank, [{"rank": 0}, {"rank": 1}], "from 0", [True, False, False], "Linear")
        assert result == expected
