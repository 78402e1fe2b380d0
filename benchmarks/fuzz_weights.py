"""Feed the readers of weights files mutated files: they may read or refuse them, nothing else.

    python benchmarks/fuzz_weights.py --files 20000 --seed 0

Every file starts as a good one (zip and legacy, module, state dict and checkpoint, safetensors) and is changed
in one to eight places; half of the zips are changed inside the pickle and closed again with right
checksums, so that the damage gets past them. The first file that raises anything but
CheckpointError, or takes longer than `--seconds`, is kept and ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import io
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save
from torch import nn

from models.weights.read import read_weights
from utils.checkpoint import FORMAT, VERSION, capture_rng, load_checkpoint
from utils.errors import CheckpointError

INTERESTING = (
    b"\x00",
    b"\xff",
    b"\x7f\xff\xff\xff",
    b"\xff\xff\xff\xff",
    b"\x00\x00\x00\x80",
    b".",
)
OPCODES = b"()]}0123.NKJMIFSVXcbtuseaqrhjgpRdloiQP\x81\x82\x85\x86\x87\x88"
OPCODES += b"\x8a\x8b\x8c\x8e\x90\x93\x94\x95\x96"
HOW_MANY_CHANGES = (1, 1, 1, 2, 3, 8)


class Net(nn.Module):
    """A small module, for a pickle with classes in it."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.SiLU())
        self.names = {0: "ship", 1: "buoy"}
        self.stride = torch.tensor([8.0, 16.0])
        self.yaml = {"nc": 2, "anchors": [[1, 2]], "backbone": [[-1, 1, "Conv", [4]]], "head": []}


class TooSlowError(Exception):
    """A file took longer than it may."""


def seeds() -> list[bytes]:
    """Good files, one of each kind."""
    net = Net()
    contents = (
        (net, True),
        ({"model": net, "ema": Net().half(), "epoch": 3}, True),
        ({"model": net}, False),
        (net.state_dict(), True),
        ({"state_dict": net.state_dict(), "config": net.yaml, "names": ["a", "b"]}, False),
        (
            {"format": FORMAT, "version": VERSION, "model": net.state_dict(), "rng": capture_rng()},
            True,
        ),
    )
    files = []
    for content, zipped in contents:
        for protocol in (2, 4):
            buffer = io.BytesIO()
            torch.save(
                content, buffer, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped
            )
            files.append(buffer.getvalue())
    return [*files, save(net.state_dict(), {"names": '["a", "b"]'})]


def mutate(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Change `data` in one to eight places."""
    changed = bytearray(data)
    for _ in range(rng.choice(HOW_MANY_CHANGES)):
        if changed:
            rng.choice(CHANGES)(changed, rng.randrange(len(changed)), rng, other)
    return bytes(changed)


def _flip(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    data[at] ^= 1 << rng.randrange(8)


def _set(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    value = rng.choice(INTERESTING)
    data[at : at + len(value)] = value


def _opcode(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    data[at] = rng.choice(OPCODES)


def _insert(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    data[at:at] = bytes(rng.choices(OPCODES, k=rng.randint(1, 8)))


def _delete(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    del data[at : at + rng.randint(1, 32)]


def _double(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    data[at:at] = data[at : at + rng.randint(1, 64)] * rng.randint(1, 4)


def _splice(data: bytearray, at: int, rng: random.Random, other: bytes) -> None:
    start = rng.randrange(len(other))
    data[at:at] = other[start : start + rng.randint(1, 64)]


def _cut(data: bytearray, at: int, rng: random.Random, _: bytes) -> None:
    if rng.random() < 0.2:
        del data[at:]


CHANGES: tuple[Callable[[bytearray, int, random.Random, bytes], None], ...] = (
    _flip,
    _set,
    _opcode,
    _insert,
    _delete,
    _double,
    _splice,
    _cut,
)


def mutate_inside(data: bytes, rng: random.Random, other: bytes) -> bytes:
    """Change the pickle in a zip and close it again."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for item in old.infolist():
            content = old.read(item)
            if item.filename.endswith("data.pkl"):
                content = mutate(content, rng, other)
            new.writestr(item.filename, content)
    return buffer.getvalue()


def make(good: list[bytes], rng: random.Random) -> bytes:
    """One mutated file."""
    data, other = rng.choice(good), rng.choice(good)
    if data.startswith(b"PK") and rng.random() < 0.5:
        return mutate_inside(data, rng, other)
    return mutate(data, rng, other)


def check(path: Path) -> str:
    """What the readers make of a file: "read" and "ours", or the first words of their refusals."""
    results = []
    for reader, result in ((read_weights, "read"), (load_checkpoint, "ours")):
        try:
            reader(path)
        except CheckpointError as error:
            message = str(error).removeprefix(f"{path}: ")
            if "\n" in message or not message.isprintable():
                raise ValueError(f"message of several lines: {message!r}") from error
            result = message.split(maxsplit=1)[0].strip(":,")
        results.append(result)
    return ", ".join(results)


def _too_slow(_: int, __: FrameType | None) -> None:
    raise TooSlowError


def read_timed(path: Path, seconds: int, keep: Path) -> str:
    """`check` under a time limit; what breaks the reader is kept as `keep`, the error passes on."""
    result = None
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        result = check(path)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        if result is None:
            keep.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, keep)
            print(f"BROKEN: {keep}", file=sys.stderr)
    return result


def main() -> None:
    """Run until something breaks, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=int, default=5, help="longest processor time for one file"
    )
    parser.add_argument(
        "--keep", type=Path, default=Path("runs/fuzz"), help="folder for what broke"
    )
    options = parser.parse_args()
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _too_slow)
    good, rng = seeds(), random.Random(options.seed)
    counts: Counter[str] = Counter()
    before, slowest, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0.0, time.time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated.pt"
        for number in range(options.files):
            path.write_bytes(make(good, rng))
            begun = time.perf_counter()
            keep = options.keep / f"{options.seed}-{number}.pt"
            counts[read_timed(path, options.seconds, keep)] += 1
            slowest = max(slowest, time.perf_counter() - begun)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    took = time.time() - start
    print(f"{options.files} files from {len(good)} good ones in {took:.0f} s, seed {options.seed}")
    for result, count in counts.most_common():
        print(f"  {count:6d}  {result}")
    print(f"slowest file {slowest * 1000:.0f} ms, peak memory grew by {grown:.0f} MiB, none broke")


if __name__ == "__main__":
    main()
