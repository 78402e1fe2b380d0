"""Read mutated model, data and recipe YAMLs: they are taken or refused in short lines, nothing else.

    python benchmarks/fuzz_yaml.py --files 2000 --kinds model data recipe --seed 0

Files start as those of the project and are changed in one to four places: values become numbers out of range, words,
lists, control characters or a hundred kilobytes; lines are doubled, moved or dropped; bytes are changed. A model is
built, a data set described, a recipe laid over its family's. The first file that raises anything but a user's error,
takes longer than `--seconds` or more memory than `--gigabytes`, is kept and ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import re
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.fuzz_weights import TooSlowError, mutate
from data.config import load_data_config
from models.yolo import build_model
from utils.config import load_hyp
from utils.errors import UserError
from utils.logger import get_logger

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 40_000  # characters of a message: thirty problems of a line each
VALUES = (
    *("-1", "0", "1", "7", "1000000000", "1e300", "-1e9", ".nan", ".inf", "-0.5", "010", "0x10"),
    *("abc", "''", "null", "true", "no", "[]", "[[]]", "{}", "{a: b}", "[1, [2, [3]]]", "-1.5"),
    *(
        "[-1, -1, -1]",
        "nn.Conv2d",
        "Detect",
        "__import__",
        "../../x",
        "&a [*a]",
        "*b",
        "!!python/x y",
    ),
    *('"\\x1b[31m\\x07"', '"a\\nb"', "'" + "x" * 100_000 + "'", "[" * 300, "9" * 5000, "é\u202e"),
)
VALUE = re.compile(r"(?<=[:\[,\-] )[^\s\[\],#][^\[\],#\n]*|-?\d+(?:\.\d+)?")


def seeds(kind: str) -> list[str]:
    """Good files of a kind."""
    if kind == "model":
        names = (
            "yolov5n",
            "yolov5n6",
            "gelan-t",
            "yolov9-t",
            "yolo11",
            "yolov5n-emo",
            "rtdetr-r18",
        )
        return [(ROOT / "models" / "detect" / f"{name}.yaml").read_text() for name in names]
    folder = ROOT / "data" if kind == "data" else ROOT / "data" / "hyps"
    # The shapes draw themselves where they are not, which takes long.
    return [path.read_text() for path in sorted(folder.glob("*.yaml")) if path.stem != "shapes"]


def change(text: str, rng: random.Random) -> str:
    """One to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.splitlines(keepends=True) or ["\n"]
        at, kind = rng.randrange(len(lines)), rng.randrange(10)
        if kind < 6:
            places = list(VALUE.finditer(lines[at]))
            if places:
                place = rng.choice(places)
                lines[at] = (
                    lines[at][: place.start()] + rng.choice(VALUES) + lines[at][place.end() :]
                )
        elif kind == 6:
            lines.insert(rng.randrange(len(lines)), lines[at])
        elif kind == 7:
            lines.insert(rng.randrange(len(lines)), lines.pop(at))
        elif kind == 8:
            lines.pop(at)
        else:
            raw = mutate("".join(lines).encode(), rng, b"[]{}:,&*!|>%@\x00\t")
            lines = [raw.decode("utf-8", "replace")]
        text = "".join(lines)
    return text


def read(kind: str, path: Path) -> None:
    """What a script would do with the file."""
    if kind == "model":
        build_model(path, imgsz=(64, 64))
    elif kind == "data":
        load_data_config(path)
    else:
        load_hyp(path, ROOT / "data" / "hyps" / "yolov5.yaml")


def check(kind: str, path: Path) -> str:
    """ "taken" or "refused"."""
    try:
        read(kind, path)
    except UserError as error:
        text = str(error)
        lines = text.splitlines()
        is_shown = all(line.replace("\u200d", "").isprintable() for line in lines)
        if not text or not is_shown or len(text) > LONGEST or len(lines) > 31:
            raise ValueError(f"message: {text[:3000]!r}") from error
        if path.name not in text:
            raise ValueError(f"message without its file: {text[:1000]!r}") from error
        return "refused"
    return "taken"


def _too_slow(*_: object) -> None:
    raise TooSlowError


def fuzz(kind: str, options: argparse.Namespace, folder: Path, told: Callable[[str], None]) -> None:
    """Run one kind until something breaks, print the counts."""
    rng, good = random.Random(f"{options.seed} {kind}"), seeds(kind)
    counts, slowest, start = Counter[str](), 0.0, time.time()
    for number in range(options.files):
        path = folder / f"{kind}-{options.seed}-{number}.yaml"
        path.write_text(change(rng.choice(good), rng), encoding="utf-8")
        begun, result = time.perf_counter(), None
        signal.setitimer(signal.ITIMER_PROF, options.seconds)
        try:
            result = check(kind, path)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            if result is None:
                options.keep.mkdir(parents=True, exist_ok=True)
                (options.keep / path.name).write_bytes(path.read_bytes())
                print(f"BROKEN: {options.keep / path.name}", file=sys.stderr)
        counts[result] += 1
        slowest = max(slowest, time.perf_counter() - begun)
        path.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    told(
        f"{kind}: {options.files} files in {time.time() - start:.0f} s, seed {options.seed}: {dict(counts)}, slowest "
        f"{slowest:.1f} s, peak memory {peak:.2f} GiB, none broke"
    )


def main() -> None:
    """Fuzz each kind."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--kinds", nargs="+", default=["model", "data", "recipe"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=int, default=20, help="longest processor time for one file"
    )
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="memory beyond that of the start"
    )
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _too_slow)
    get_logger().setLevel("CRITICAL")
    torch.set_num_threads(1)
    with open("/proc/self/statm", encoding="ascii") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    bound = now + int(options.gigabytes * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))
    with tempfile.TemporaryDirectory() as name:
        for kind in options.kinds:
            fuzz(kind, options, Path(name), print)


if __name__ == "__main__":
    main()
