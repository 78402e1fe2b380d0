"""Checkpoints: atomic, plain, safe to read."""

import os
import random
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from utils.checkpoint import (
    ForeignCheckpointError,
    capture_rng,
    clear_temporary,
    finalize_checkpoint,
    load_checkpoint,
    restore_rng,
    save_checkpoint,
)
from utils.errors import CheckpointError
from utils.files import write_whole


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((2, 3), value), "a.steps": torch.tensor(7)}


def test_what_is_saved_is_read_back_with_format_and_version(tmp_path: Path) -> None:
    path = tmp_path / "new" / "last.pt"
    save_checkpoint(path, {"model": weights(), "names": ("cat", "dog"), "hyp": {"lr0": 0.01}})
    content = load_checkpoint(path)
    assert content["format"] == "yoke"
    assert content["version"] == 1
    assert content["names"] == ["cat", "dog"]
    assert content["hyp"] == {"lr0": 0.01}
    assert torch.equal(content["model"]["a.weight"], torch.ones(2, 3))
    assert content["model"]["a.steps"].item() == 7
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_view_is_stored_without_the_tensor_it_looks_into(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pt", {"model": {"x": torch.zeros(1_000_000)[:2]}})
    assert (tmp_path / "a.pt").stat().st_size < 10_000


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model", "ema"])
def test_weights_that_are_not_finite_never_replace_a_good_file(tmp_path, bad, key) -> None:
    path = tmp_path / "best.pt"
    save_checkpoint(path, {"model": weights()})
    content = {"model": weights(bad)} if key == "model" else {"ema": {"model": weights(bad)}}
    with pytest.raises(CheckpointError, match=r"a\.weight.*not finite"):
        save_checkpoint(path, content)
    assert torch.equal(load_checkpoint(path)["model"]["a.weight"], torch.ones(2, 3))


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": weights()})

    def half_written(content, file) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(CheckpointError, match=r"last.pt: cannot be written - no space left; got"):
        save_checkpoint(path, {"model": weights(2.0)})
    monkeypatch.undo()
    assert torch.equal(load_checkpoint(path)["model"]["a.weight"], torch.ones(2, 3))
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_write_that_the_system_ends_is_one_line_and_leaves_the_old_file(tmp_path: Path) -> None:
    """By a limit on the size of files: torch itself tells of a wrong position then."""
    path = tmp_path / "last.pt"
    save_checkpoint(path, {"model": weights()})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save_checkpoint(path, {"model": {"a": torch.zeros(1 << 19)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    told = str(caught.value)
    assert told.startswith(f"{path}: cannot be written - File too large; got ")
    assert "expected 2.0. The file that was there is whole." in told and "\n" not in told
    assert load_checkpoint(path)["model"].keys() == weights().keys()
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_only_what_a_killed_write_left_is_cleared(tmp_path: Path) -> None:
    for name in (".last.pt.4711.tmp", ".results.csv.1.tmp", ".mine.tmp", "a.1.tmp", "last.pt"):
        (tmp_path / name).write_bytes(b"")
    clear_temporary(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".mine.tmp", "a.1.tmp", "last.pt"]


def test_objects_are_refused_with_the_key_they_stand_under(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"opt\.path.*Path"):
        save_checkpoint(tmp_path / "a.pt", {"opt": {"path": Path("x")}})


class Planted:
    """Runs something when unpickled by a careless reader."""

    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def test_a_pickle_with_code_is_refused_and_runs_nothing(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Planted()}, "evil.pt")
    with pytest.raises(ForeignCheckpointError) as caught:
        load_checkpoint("evil.pt")
    assert not Path("planted").exists()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "the file is empty"),
        (b"this is text", "not a weights file"),
        ({"weights": torch.zeros(1)}, "expected format: 'yoke'"),
        (torch.zeros(1), "expected format: 'yoke'"),
    ],
)
def test_other_files_are_named_in_one_line(tmp_path: Path, content, words: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ForeignCheckpointError) as caught:
        load_checkpoint(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_half_a_checkpoint_and_a_missing_one_are_user_errors(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    save_checkpoint(path, {"model": weights()})
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(CheckpointError, match="cut short"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")


def test_a_later_version_is_not_taken_for_ours(tmp_path: Path) -> None:
    torch.save({"format": "yoke", "version": 2}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="version 2, expected 1"):
        load_checkpoint(tmp_path / "a.pt")


def test_finalizing_keeps_the_average_and_drops_the_state_of_training(tmp_path: Path) -> None:
    path = tmp_path / "best.pt"
    full = {
        "model": weights(1.0),
        "ema": {"model": weights(2.0), "updates": 5},
        "optimizer": {},
        "rng": capture_rng(),
        "epoch": 3,
    }
    save_checkpoint(path, full)
    for _ in range(2):
        finalize_checkpoint(path)
        content = load_checkpoint(path)
        assert sorted(content) == ["epoch", "format", "model", "version"]
        assert content["model"]["a.weight"].unique().item() == 2
        assert content["model"]["a.steps"].dtype == torch.int64


def test_generators_go_on_where_they_were_saved(tmp_path: Path) -> None:
    random.gauss(0, 1), np.random.randn(1), torch.rand(1)
    save_checkpoint(tmp_path / "a.pt", {"rng": capture_rng()})

    def draw() -> tuple:
        return (
            random.random(),
            random.gauss(0, 1),
            np.random.rand(3).tolist(),
            np.random.randn(3).tolist(),
            torch.randn(3).tolist(),
        )

    first = draw()
    assert draw() != first
    restore_rng(load_checkpoint(tmp_path / "a.pt")["rng"])
    assert draw() == first


def put(path: Path, pickled: bytes, compression: int = zipfile.ZIP_STORED) -> Path:
    """A file as torch.save would write it around a pickle."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", "little")
        archive.writestr("archive/version", "3\n")
    return path


def colliding(count: int, behind: bytes = b"") -> bytes:
    """A dictionary whose keys all have the hash 0; `behind` each key may make a tuple of it."""
    prime = (1 << 61) - 1
    keys = ((k * prime).to_bytes(10, "little") for k in range(count))
    items = (b"\x8a" + bytes([len(key)]) + key + behind + b"K\x00" for key in keys)
    return b"\x80\x02}q\x00(" + b"".join(items) + b"u."


@pytest.mark.parametrize("behind", [b"", b"\x85"])
def test_keys_that_collide_cost_no_time(behind: bytes, tmp_path: Path) -> None:
    path = put(tmp_path / "a.pt", colliding(100_000, behind))  # a minute and more where it is read
    start = time.process_time()
    with pytest.raises(ForeignCheckpointError, match="it has numbers beyond 2"):
        load_checkpoint(path)
    assert time.process_time() - start < 5


def test_parts_that_grow_are_refused_unread(tmp_path: Path) -> None:
    bomb = put(tmp_path / "a.pt", b"N0" * (1 << 24) + b"N.", zipfile.ZIP_DEFLATED)
    assert bomb.stat().st_size < 100_000
    with pytest.raises(ForeignCheckpointError, match="it has compressed parts"):
        load_checkpoint(bomb)
    with pytest.raises(ForeignCheckpointError, match="more than 3000000 steps"):
        load_checkpoint(put(tmp_path / "b.pt", b"\x80\x02" + b"N0" * 1_600_000 + b"N."))


def test_a_tensor_without_its_numbers_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for tensor, told in (
        (
            torch.zeros(1).expand(10**6, 10**6),
            r"a tensor \(1000000, 1000000\) that is not stored whole",
        ),
        (torch.empty(10**9, device="meta"), "asks for a call of torch._utils._rebuild_meta"),
    ):
        torch.save({"format": "yoke", "version": 1, "model": [(tensor,)]}, path)
        with pytest.raises(ForeignCheckpointError, match=told):
            load_checkpoint(path)


def test_a_pipe_is_no_checkpoint(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"last.pt: got a named pipe, expected a .pt file"):
        load_checkpoint(tmp_path / "last.pt")


def test_a_file_that_cannot_be_written_whole_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "best.onnx"
    write_whole(path, b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_whole(path, bytes(5000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert caught.value.filename == str(path) and path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["best.onnx"]
