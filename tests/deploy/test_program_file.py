"""A program of torch.export is read only if it carries numbers and operators, nothing that runs."""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor, nn
from torch_versions import NO_PROGRAMS

from deploy.exporters import torch_files
from deploy.exporters.network import ExportOptions
from deploy.runtimes.program_file import (
    is_arithmetic,
    program_fault,
    read_program,
    reads_programs,
)
from utils.errors import CheckpointError, ConfigError


class Doubling(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not reads_programs():
        pytest.skip(NO_PROGRAMS)
    path = tmp_path_factory.mktemp("program") / "doubling.pt2"
    exported = torch.export.export(
        Doubling(), (torch.ones(2, 3),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    torch.export.save(exported, str(path), extra_files={"note": "ours"})
    return path


def rewritten(source: Path, path: Path, part: str, change: Callable[[bytes], bytes]) -> Path:
    """A copy of `source` whose member that ends in `part` is changed."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        names = [n for n in old.namelist() if n.endswith(part)]
        assert len(names) == 1
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name in names else data)
    return path


def test_an_honest_program_is_read(program: Path):
    found, note = read_program(program, "note")
    assert note == "ours"
    assert found.module()(torch.ones(5, 3)).sum() == 30


class Bomb:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_a_pickle_in_place_of_the_sample_is_refused_and_not_run(program: Path, tmp_path: Path):
    trace = tmp_path / "trace"
    buffer = io.BytesIO()
    torch.save(Bomb(trace), buffer)
    path = rewritten(
        program, tmp_path / "x.pt2", "sample_inputs/model.pt", lambda _: buffer.getvalue()
    )
    with pytest.raises(CheckpointError, match="more than tensors"):
        read_program(path, "note")
    assert not trace.exists()


def with_guard(text: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        tree = json.loads(data)
        tree["guards_code"] = [text]
        return json.dumps(tree).encode()

    return change


def test_a_guard_that_calls_something_is_refused(program: Path, tmp_path: Path):
    change = with_guard("open('trace', 'w') is None")
    path = rewritten(program, tmp_path / "x.pt2", "models/model.json", change)
    with pytest.raises(CheckpointError, match="expression"):
        read_program(path, "note")


@pytest.mark.parametrize(
    "target",
    [
        "os.system", "torch.ops.aten.from_file.default", "torch.ops.aten.save.default", "torch.ops.aten.mul",
        "torch.ops.higher_order.cond.default", "torch.load", "_operator.methodcaller", "_operator.call", "math.__loader__",
    ],
)  # fmt: skip
def test_an_operator_that_is_no_arithmetic_of_tensors_is_refused(
    program: Path, tmp_path: Path, target: str
):
    def change(data: bytes) -> bytes:
        return data.replace(b"torch.ops.aten.mul.Tensor", target.encode())

    path = rewritten(program, tmp_path / "x.pt2", "models/model.json", change)
    with pytest.raises(CheckpointError, match=rf"calls '{re.escape(target)}'"):
        read_program(path, "note")


def test_a_name_that_would_run_in_the_code_that_torch_writes_is_refused(
    program: Path, tmp_path: Path
):
    """The names of a program's inputs become arguments of a Python function."""
    trace = tmp_path / "trace"
    name = f"x, y=open('{trace}', 'w')"

    def change(data: bytes) -> bytes:
        return data.replace(b'"name": "x"', b'"name": ' + json.dumps(name).encode())

    path = rewritten(program, tmp_path / "x.pt2", "models/model.json", change)
    with pytest.raises(CheckpointError, match="it has the name"):
        read_program(path, "note")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"parameter_name": "network.model.0-a.weight"}, ""),
        ({"parameter_name": 'a", open("b'}, "name"),
        ({"forward_arg_names": ["images", "a, b=print()"]}, "name"),
        ({"tensor_values": {"x": 1, "print()": 2}}, "name 'print()'"),
        ({"inputs": [{"arg": {"as_operator": "os.system"}}]}, "calls 'os.system'"),
        ({"inputs": [{"arg": {"as_string": "a text, as it comes()"}}]}, ""),
        ({"in_spec": '[1, {"type": "builtins.dict", "context": "[\\"a=b()\\"]", "children_spec": []}]'}, "packs"),
        ({"in_spec": '[1, {"type": "a.B", "context": "null", "children_spec": []}]'}, "packs"),
    ],
)  # fmt: skip
def test_parts_of_a_program_are_words_and_numbers(part: dict[str, Any], told: str):
    fault = program_fault({"graph_module": [part]})
    assert told in fault and bool(fault) == bool(told)


def test_weights_that_ask_to_be_unpickled_are_refused(program: Path, tmp_path: Path):
    entry = {"config": {"w": {"path_name": "weight_0", "use_pickle": True}}}
    path = rewritten(
        program,
        tmp_path / "x.pt2",
        "model_weights_config.json",
        lambda _: json.dumps(entry).encode(),
    )
    with pytest.raises(CheckpointError, match="unpickled"):
        read_program(path, "note")


def test_a_member_that_programs_do_not_have_is_refused(program: Path, tmp_path: Path):
    path = tmp_path / "x.pt2"
    path.write_bytes(program.read_bytes())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("doubling/data/constants/opaque_obj_0", b"cos\nsystem\n.")
    with pytest.raises(CheckpointError, match="opaque_obj_0"):
        read_program(path, "note")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mul(Integer(32), Symbol('s18', positive=True, integer=True))", True),
        ("(torch.sym_max(1, 1 + (((-1) + (L['images'].size()[2] // 2)) // 16))*2) != 1", True),
        ("L['x'].size()[0] >= 2 and (L['x'].size()[1] == 3)", True),
        ("exec(chr(1))", False),
        ("L['x'].__class__", False),
        ("L['x'].numpy", False),
        ("__builtins__['exec']", False),
        ("Symbol('exec()')", False),
        ("[1 for a in L['x']]", False),
        ("f'{1}'", False),
        ("(lambda: 1)()", False),
        ("Integer(1); 2", False),
        ('"a"', False),
    ],
)
def test_expressions_over_sizes_and_nothing_else(text: str, expected: bool):
    assert is_arithmetic(text) is expected


def test_compressed_parts_are_refused(tmp_path):
    path = tmp_path / "bomb.pt2"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb/data/weights/weight_0", bytes(1_000_000))
    with pytest.raises(CheckpointError, match="compressed parts"):
        read_program(path, "metadata.txt")


def test_a_torch_that_packs_programs_otherwise_is_told(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(torch_files, "reads_programs", lambda: False)
    with pytest.raises(ConfigError, match=r"--include pt2: torch \S+ packs programs in an earlier"):
        torch_files.export_pt2(tiny_model("channels"), ExportOptions(), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())
