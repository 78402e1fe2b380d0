"""Load exported files whose metadata lie or whose bytes are damaged: they run, or are refused in one line.

    python benchmarks/fuzz_metadata.py --files 500 --seed 0

A small detector is exported in every form. Each file has one to three of its metadata changed to what no exporter
writes, or is cut short, emptied or changed in a few bytes; it is then loaded and given one image of the size that it
asks for. The first file that raises anything but a user's error of one line, or takes longer than `--seconds`, is
kept and ends the run with its traceback.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import onnx
import torch
import yaml
from safetensors.torch import load_file, save_file

from benchmarks.fuzz_weights import TooSlowError, mutate
from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.openvino_folder import export_openvino
from deploy.exporters.torch_files import export_pt2, export_safetensors, export_torchscript
from models.yolo import build_model
from utils.errors import UserError
from utils.logger import get_logger

FORMS = {
    "onnx": export_onnx,
    "torchscript": export_torchscript,
    "pt2": export_pt2,
    "openvino": export_openvino,
    "safetensors": export_safetensors,
}
CONFIG = {
    "nc": 2,
    "backbone": [
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
        [-1, 1, "Conv", [8, 3, 2]],
    ],
    "head": [[[2], 1, "Detect", ["nc"]]],
}
LIES = (
    *("", "0", "-1", "1000000000", "1e9", "inf", "nan", "None", "True", "cube", "[0, 0]", "[64]"),
    *("[-64, 64]", "[1000000000, 1000000000]", "['inf', 64]", "[64, 64, 64]", "{}", "{0: 'a'}"),
    *(
        "{0: 'a', 2: 'b'}",
        "{'x': 'y'}",
        "[[[[",
        "(" * 5000,
        "9" * 5000,
        "\x1b[31m\x00",
        "x" * 100_000,
    ),
    *(
        "weights",
        "raw",
        "end2end",
        "anchors",
        "queries",
        "topk",
        "rtdetr",
        "batch",
        "all",
        "1",
        "7",
    ),
    *("[16384, 16384]", "[65, 33]", "4096", "{i: 'c' for i in range(9)}", "__import__('os')"),
)
CONFIG_LIES = (
    *('"x"', "[]", "null", "{}", "{" * 5000, '{"nc": 1000000000}', '{"nc": -1, "backbone": 3}'),
)


def metadata_of(path: Path) -> dict[str, str]:
    """What a file says about itself."""
    if path.is_dir():
        return dict(yaml.safe_load((path / "metadata.yaml").read_text()))
    if path.suffix == ".onnx":
        return {item.key: item.value for item in onnx.load(str(path)).metadata_props}
    if path.suffix == ".safetensors":
        size = int.from_bytes(path.read_bytes()[:8], "little")
        return dict(json.loads(path.read_bytes()[8 : 8 + size])["__metadata__"])
    with zipfile.ZipFile(path) as archive:
        return dict(json.loads(archive.read(_member(archive))))


def _member(archive: zipfile.ZipFile) -> str:
    return next(name for name in archive.namelist() if name.endswith("metadata.txt"))


def with_metadata(path: Path, target: Path, metadata: Mapping[str, str]) -> None:
    """A copy of an exported file that says something else."""
    if path.is_dir():
        shutil.copytree(path, target)
        (target / "metadata.yaml").write_text(yaml.safe_dump(dict(metadata)))
    elif path.suffix == ".onnx":
        proto = onnx.load(str(path))
        del proto.metadata_props[:]
        onnx.helper.set_model_props(proto, dict(metadata))
        onnx.save(proto, str(target))
    elif path.suffix == ".safetensors":
        save_file(load_file(path), target, metadata=dict(metadata))
    else:
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w") as new:
            for item in old.infolist():
                own = item.filename == _member(old)
                content = json.dumps(dict(metadata)).encode() if own else old.read(item)
                new.writestr(item, content)


def lied(metadata: dict[str, str], rng: random.Random) -> dict[str, str]:
    """Metadata with one to three values that no exporter writes."""
    changed = dict(metadata)
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(sorted(metadata))
        lies = CONFIG_LIES if key == "config" else LIES
        if rng.random() < 0.1:
            changed.pop(key, None)
        else:
            changed[key] = rng.choice(lies)
    return changed


def damage(path: Path, target: Path, rng: random.Random) -> None:
    """A copy with its bytes cut short, taken away or changed."""
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        shutil.copytree(path, target)
    file = rng.choice(sorted(p for p in folder.iterdir())) if path.is_dir() else path
    data = file.read_bytes()
    kind = rng.randrange(3)
    data = (
        b""
        if kind == 0
        else data[: rng.randrange(len(data))]
        if kind == 1
        else mutate(data, rng, data)
    )
    (target / file.name if path.is_dir() else target).write_bytes(data)


def check(path: Path) -> str:
    """What comes of a file: "runs", or the start of its refusal."""
    try:
        backend = load_backend(path, "cpu", threads=1)
        size = backend.imgsz if max(backend.imgsz) <= 640 else (64, 64)
        backend(torch.rand(1, 3, *size))
    except UserError as error:
        text = str(error)
        if "\n" in text or not text.isprintable() or len(text) > 1300 or path.name not in text:
            raise ValueError(f"message: {text[:2000]!r}") from error
        return " ".join(text.split(": ", 1)[1].split()[:3])
    return "runs"


def _too_slow(*_: object) -> None:
    raise TooSlowError


def main() -> None:
    """Run until something breaks, print the counts."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--files", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--seconds", type=int, default=10, help="longest processor time for one file"
    )
    parser.add_argument("--keep", type=Path, default=Path("runs/fuzz"))
    options = parser.parse_args()
    faulthandler.enable()
    signal.signal(signal.SIGPROF, _too_slow)
    get_logger().setLevel("ERROR")
    torch.set_num_threads(1)
    rng, counts, slowest, start = random.Random(options.seed), Counter[str](), 0.0, time.time()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = build_model(CONFIG, names=("a", "b"), imgsz=(64, 64)).eval()
        weights = folder / "m.pt"
        good = [write(model, ExportOptions(imgsz=(64, 64)), weights) for write in FORMS.values()]
        (folder / "lies").mkdir()
        for number in range(options.files):
            path = rng.choice(good)
            target = folder / "lies" / f"{options.seed}-{number}{path.name.removeprefix('m')}"
            if rng.random() < 0.25:
                damage(path, target, rng)
            else:
                with_metadata(path, target, lied(metadata_of(path), rng))
            begun, result = time.perf_counter(), None
            signal.setitimer(signal.ITIMER_PROF, options.seconds)
            try:
                result = check(target)
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                if result is None:
                    options.keep.mkdir(parents=True, exist_ok=True)
                    shutil.move(target, options.keep / target.name)
                    print(f"BROKEN: {options.keep / target.name}", file=sys.stderr)
            counts[result] += 1
            slowest = max(slowest, time.perf_counter() - begun)
            shutil.rmtree(target) if target.is_dir() else target.unlink()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{options.files} files of {len(good)} forms in {time.time() - start:.0f} s, seed {options.seed}"
    )
    for told, count in counts.most_common():
        print(f"  {count:6d}  {told}")
    print(f"slowest file {slowest:.1f} s, peak memory {peak:.2f} GiB, none broke")


if __name__ == "__main__":
    main()
