"""Files made to do harm: each is refused in one line, nothing runs, memory and time stay small."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from pickle_streams import (
    call,
    colliding_pairs,
    identity,
    number,
    numbers,
    protocol,
    state_dict,
    tensor,
    text,
    zipped,
)

from models.weights.read import read_weights
from utils.errors import CheckpointError
from utils.weight_files.unpickle_names import shown

ROOT = Path(__file__).resolve().parents[2]


def bomb(size: int) -> bytes:
    """A small zip whose storage unpacks to `size` zeros."""
    kind = zipfile.ZIP_DEFLATED
    good = tensor(numbers(size // 4), numbers(1), storage=identity(count=size // 4))
    return zipped(state_dict(good), {"data/0": bytes(size)}, kind)


def overlapping() -> bytes:
    """A zip of many entries that all mean the same bytes."""
    data = zipped(state_dict(GOOD), {"data/0": bytes(1 << 12)})
    start = data.index(b"PK\x01\x02")
    record = data[data.index(b"PK\x01\x02", start + 4) : data.rindex(b"PK\x01\x02")]
    count = 20_000
    names = [b"w/data/%05d" % i for i in range(count)]
    many = b"".join(record[:28] + struct.pack("<H", len(n)) + record[30:46] + n for n in names)
    first = data[start : data.index(b"PK\x01\x02", start + 4)]
    tail = struct.pack(
        "<4sHHHHIIH", b"PK\x05\x06", 0, 0, count + 1, count + 1, len(first + many), start, 0
    )
    return data[:start] + first + many + tail


CANARY = "canary"
RUN = text(f"touch {CANARY}")
WRITE = text(f"open({CANARY!r}, 'w')")
GOOD = tensor(numbers(2, 2), numbers(2, 1))
LEGACY = protocol(number(0x1950A86A20F9469CFC6C)) + protocol(number(1001)) + protocol(b"}")
# name: (bytes of the file, words of the message)
CALLS = {
    "os.system": (call(b"cposix\nsystem\n", RUN), "posix.system"),
    "os.system by its usual name": (call(b"cos\nsystem\n", RUN), "os.system"),
    "nt.system": (call(b"cnt\nsystem\n", RUN), "nt.system"),
    "subprocess": (call(b"csubprocess\nPopen\n", RUN), "subprocess.Popen"),
    "eval": (call(b"cbuiltins\neval\n", WRITE), "builtins.eval"),
    "exec of Python 2": (call(b"c__builtin__\nexec\n", WRITE), "__builtin__.exec"),
    "getattr": (call(b"cbuiltins\ngetattr\n", text("a"), text("upper")), "builtins.getattr"),
    "partial": (call(b"cfunctools\npartial\n", b"cbuiltins\neval\n"), "functools.partial"),
    "attrgetter": (call(b"coperator\nattrgetter\n", text("a")), "operator.attrgetter"),
    "import_module": (call(b"cimportlib\nimport_module\n", text("os")), "importlib"),
    "ctypes": (call(b"cctypes\nCDLL\n", text("libc.so.6")), "ctypes.CDLL"),
    "pickle in pickle": (call(b"cpickle\nloads\n", text("x")), "pickle.loads"),
    "cPickle": (call(b"c_pickle\nloads\n", text("x")), "_pickle.loads"),
    "shutil as a mere value": (b"cshutil\nrmtree\n", "shutil.rmtree"),
    "dotted name": (call(b"ctorch.serialization\nos.system\n", RUN), "os.system"),
    "dotted module": (call(b"cos.path\nos.system\n", RUN), "os.path"),
    "STACK_GLOBAL": (text("posix") + text("system") + b"\x93(" + RUN + b"tR", "posix.system"),
    "STACK_GLOBAL from the memo": (
        text("builtins") + b"q\x000" + text("eval") + b"q\x010h\x00h\x01\x93(" + WRITE + b"tR",
        "builtins.eval",
    ),
    "nested": (
        call(b"ccollections\nOrderedDict\n", b"](" + call(b"cposix\nsystem\n", RUN) + b"e"),
        "posix.system",
    ),
    "INST": (b"(" + RUN + b"iposix\nsystem\n", "posix.system"),
    "OBJ": (b"(cposix\nsystem\n" + RUN + b"o", "posix.system"),
    "NEWOBJ": (b"cposix\nsystem\n(" + RUN + b"t\x81", "posix.system"),
    "EXT": (b"\x82\x01", "EXT1"),
    "module-level state": (
        b"cother.models\nNet\n)\x81}" + text("f") + b"cos\nsystem\nsb",
        "os.system",
    ),
    "a foreign function": (call(b"cother.models\nbuild\n", text("x")), "other.models.build"),
    "run in numpy": (
        call(b"cnumpy.testing._private.utils\nrunstring\n", WRITE, b"}"),
        "numpy.testing._private.utils.runstring",
    ),
    "torch.load in torch.load": (
        call(b"ctorch.storage\n_load_from_bytes\n", text("x")),
        "_load_from_bytes",
    ),
    "torch.hub": (call(b"ctorch.hub\nload\n", text("x"), text("y")), "torch.hub.load"),
    "torch.load": (call(b"ctorch.serialization\nload\n", text("x")), "torch.serialization.load"),
    "compiled code": (
        call(b"ctorch.utils.cpp_extension\nload_inline\n", text("x")),
        "torch.utils.cpp_extension.load_inline",
    ),
    "torch.fx": (
        call(b"ctorch.fx.graph_module\nreduce_graph_module\n", b"}", text("import os")),
        "torch.fx.graph_module.reduce_graph_module",
    ),
    "a function in a tensor": (
        call(b"ctorch._tensor\n_rebuild_from_type_v2\n", b"ctorch.hub\nload\n", b"N", b")", b"}"),
        "torch.hub.load",
    ),
    "quantised": (call(b"ctorch._utils\n_rebuild_qtensor\n", text("x")), "_rebuild_qtensor"),
}
SHAPES = {
    "unknown storage": tensor(numbers(4), numbers(1), storage=identity("7")),
    "storage outside the folder": tensor(numbers(4), numbers(1), storage=identity("../version")),
    "storage larger than it is": tensor(numbers(4), numbers(1), storage=identity(count=5)),
    "storage of negative size": tensor(numbers(4), numbers(1), storage=identity(count=-4)),
    "storage of huge size": tensor(numbers(4), numbers(1), storage=identity(count=1 << 200)),
    "persistent id that is a number": number(3) + b"Q",
    "persistent id that is text": b"Pposix\n",
    "persistent id that is a pair": b"(" + text("storage") + number(1) + b"tQ",
    "shape beyond the storage": tensor(numbers(5), numbers(1)),
    "stride beyond the storage": tensor(numbers(2, 2), numbers(3, 1)),
    "offset beyond the storage": tensor(numbers(2, 2), numbers(2, 1), 1),
    "negative offset": tensor(numbers(2, 2), numbers(2, 1), -1),
    "negative stride": tensor(numbers(4), numbers(-1), 3),
    "negative shape": tensor(numbers(-4, -1), numbers(1, 1)),
    "expanded to a terabyte": tensor(numbers(1 << 40), numbers(0)),
    "product that overflows": tensor(numbers(1 << 32, 1 << 32, 1), numbers(0, 0, 0)),
    "shape and stride that differ": tensor(numbers(4), numbers(1, 1)),
    "thousand dimensions": tensor(numbers(*[1] * 1000), numbers(*[1] * 1000)),
    "shape of huge numbers": tensor(numbers(1 << 1000), numbers(1)),
    "storage that is none": tensor(numbers(4), numbers(1), storage=text("x")),
}


FILLER = b"]q\x00(" + b"N" * 300_000 + b"e"
WORK = {
    "deep lists": b"]" * 300_000 + b"a" * 299_999,
    "deep tuples as a key": b"}" + b")" + b"\x85" * 300_000 + b"Ns",
    "lists shared endlessly": b"]q\x000" + b"](h\x00h\x00eq\x000" * 60 + b"h\x00",
    "copies of a long list": FILLER + b"0" + b"ctorch\nSize\n(h\x00tR0" * 100_000 + b"N",
    "colliding keys": b"}("
    + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(2, 20_000))
    + b"u",
    "places in the memo that collide": b"N"
    + b"".join(b"p%d\n" % (i * (2**61 - 1)) for i in range(100_000)),
    "tuples that collide": b"}("
    + b"".join(pair + b"N" for pair in colliding_pairs(60_000))
    + b"u",
    "memo at two billion": b"Nr\xff\xff\xff\x7f",
    "bytes of an exabyte": b"\x8e" + struct.pack("<Q", 1 << 60) + b"x",
    "bytearray of an exabyte": b"\x96" + struct.pack("<Q", 1 << 60) + b"x",
    "number of a million digits": b"I" + b"9" * 1_000_000 + b"\n",
    "four million opcodes": b"N0" * 2_000_000 + b"N",
    "module inside itself": (
        b"cother\nNet\n)\x81q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb"
    ),
    "modules that double": b"".join(
        b"cother\nNet\n)\x81}" + text("_modules") + b"}"
        + b"".join(text(key) + b"h%c" % (i - 1) + b"s" for key in ("ab" if i else ""))
        + b"sbq%c0" % i
        for i in range(60)
    ) + b"h\x3b",
    "empty stack": b"0000",
    "tuple of a mark": b"(\x85",
    "no mark": b"NNt",
    "state of a number": b"K\x01}b",
    "items of a number": b"K\x01(NNu",
    "name that is a number": b"K\x01K\x02\x93",
    "call of text": text("x") + b")R",
}  # fmt: skip
FILES: dict[str, tuple[bytes, str]] = {
    **{f"zip: {name}": (zipped(state_dict(body)), words) for name, (body, words) in CALLS.items()},
    **{f"legacy: {n}": (LEGACY + state_dict(body), said) for n, (body, said) in CALLS.items()},
    **{f"bare: {name}": (protocol(body, 4), words) for name, (body, words) in CALLS.items()},
    **{f"zip: {name}": (zipped(state_dict(body)), "damaged") for name, body in SHAPES.items()},
    **{f"zip: {name}": (zipped(protocol(body, 5)), "") for name, body in WORK.items()},
    **{f"legacy: {n}": (LEGACY + protocol(WORK[n], 5), "") for n in WORK if "exabyte" in n},
    "zip bomb": (bomb(1 << 28), "compressed"),
    "overlapping entries": (overlapping(), "more bytes than the file has"),
    "TorchScript": (zipped(state_dict(GOOD), {"constants.pkl": b"x"}), "TorchScript"),
    "another zip": (
        zipped(state_dict(GOOD)).replace(b"data.pkl", b"data.txt"),
        "not one of torch.save",
    ),
    "storage of another length": (
        zipped(state_dict(GOOD), {"data/0": b"1234"}),
        "has 4 bytes, expected 16",
    ),
    "big-endian": (
        zipped(state_dict(GOOD), {"data/0": bytes(16), "byteorder": b"big"}),
        "big-endian",
    ),
    "legacy without storages": (LEGACY + state_dict(GOOD) + protocol(b"]"), "not in the file"),
    "legacy cut short": (
        LEGACY + state_dict(GOOD) + protocol(b"]" + text("0") + b"a") + struct.pack("<q", 4),
        "not whole",
    ),
    "legacy of huge storages": (
        LEGACY + state_dict(GOOD) + protocol(b"]" + text("0") + b"a") + struct.pack("<q", 1 << 60),
        "not whole",
    ),
    "legacy of negative storages": (
        LEGACY + state_dict(GOOD) + protocol(b"]" + text("0") + b"a") + struct.pack("<q", -4),
        "not whole",
    ),
    "another pickle": (protocol(b"}"), "not one of torch.save"),
    "empty": (b"", "empty"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(100), "not a weights file"),
    "web page": (b"<!DOCTYPE html><html>", "web page"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "gzip": (b"\x1f\x8b" + bytes(100), "gzip"),
    "text": (b"hello, this is a text file", "not a weights file"),
    "safetensors with a huge header": (struct.pack("<Q", 1 << 62) + b"{}" + bytes(20), ""),
    "safetensors with a broken header": (
        struct.pack("<Q", 16) + b'{"a":{"dtype":"F' + bytes(20),
        "safetensors",
    ),
    "safetensors beyond the end": (
        (lambda header: struct.pack("<Q", len(header)) + header + bytes(8))(
            b'{"a":{"dtype":"F32","shape":[1000000],"data_offsets":[0,4000000]}}'
        ),
        "safetensors",
    ),
}  # fmt: skip

MEMORY = 512 << 20
READ_ALL = f"""
import json, os, resource, sys, time
sys.path.insert(0, sys.argv[1])
from models.weights.read import read_weights
from utils.errors import CheckpointError
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + {MEMORY}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
answers = {{}}
for name in sorted(os.listdir("files")):
    start = time.perf_counter()
    try:
        read_weights(os.path.join("files", name))
        answer = "accepted"
    except CheckpointError as error:
        answer = str(error)
    answers[name] = (answer, time.perf_counter() - start)
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, tuple[str, float]]]:
    """What one process, short of memory, says of every file, and the seconds it took."""
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc to limit memory")
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "files").mkdir()
    for index, (data, _) in enumerate(FILES.values()):
        (folder / "files" / f"{index:03d}.pt").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", READ_ALL, str(ROOT)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    return folder, {name: found[f"{i:03d}.pt"] for i, name in enumerate(FILES)}


@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_refused_in_one_line(
    answers: tuple[Path, dict[str, tuple[str, float]]], name: str
) -> None:
    folder, found = answers
    message, seconds = found[name]
    assert message.startswith("files"), message
    assert FILES[name][1] in message
    assert "\n" not in message and message.isprintable() and len(message) < 400
    assert seconds < 30
    assert not (folder / CANARY).exists(), "code of the file has run"


def test_the_limit_on_memory_bites(
    answers: tuple[Path, dict[str, tuple[str, float]]],
) -> None:
    """So that the test above says something of memory: twice the limit cannot be had."""
    code = READ_ALL.partition("answers = ")[0] + f"bytearray({2 * MEMORY})"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, check=False
    )
    assert "MemoryError" in done.stderr


def test_the_streams_around_the_harm_are_good(tmp_path: Path) -> None:
    """So that the files above are refused for what they do and for nothing else."""
    path = tmp_path / "good.pt"
    path.write_bytes(zipped(state_dict(GOOD)))
    assert read_weights(path).state["w"].tolist() == [[1, 2], [3, 4]]
    assert torch.load(path, weights_only=True)["w"].tolist() == [[1, 2], [3, 4]]
    storage = struct.pack("<q4f", 4, 1, 2, 3, 4)
    path.write_bytes(LEGACY + state_dict(GOOD) + protocol(b"]" + text("0") + b"a") + storage)
    assert read_weights(path).state["w"].tolist() == [[1, 2], [3, 4]]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    state = {"a": torch.randn(8, 3), "b": torch.arange(5)}
    path = tmp_path / "w.pt"
    for new in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=new)
        whole = path.read_bytes()
        start = time.perf_counter()
        for length in range(0, len(whole) - 1, 7):
            path.write_bytes(whole[:length])
            with pytest.raises(CheckpointError) as error:
                read_weights(path)
            assert "\n" not in str(error.value)
        assert time.perf_counter() - start < 30


def test_a_small_file_may_not_ask_for_much_memory(tmp_path: Path) -> None:
    storage = identity(count=1 << 16)
    views = b"".join(
        text(f"w{i}") + tensor(numbers((1 << 16) - i), numbers(1), storage=storage)
        for i in range(200)
    )
    path = tmp_path / "w.pt"
    path.write_bytes(zipped(protocol(b"}(" + views + b"u"), {"data/0": bytes(1 << 18)}))
    with pytest.raises(CheckpointError, match="more memory than the size of the file justifies"):
        read_weights(path)


def test_missing_files_and_folders_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        read_weights(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_weights(tmp_path)


def test_a_message_does_not_spell_out_what_is_shared_without_end():
    shared: list = ["x"]
    for _ in range(60):
        shared = [shared, shared]
    assert shown(shared) == "list"
    assert shown("a\nb") == "a\\nb" and shown(7) == "7"
