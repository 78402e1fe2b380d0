"""What it saves to need no suppression: ONNX Runtime from the image's tensor to its detections.

    python benchmarks/nms_free_latency.py                           yolo11n with NMS and without, rtdetr-r18 and dfine-s
    python benchmarks/nms_free_latency.py --models a.pt b.pt --source photo.jpg --imgsz 320 --threads 1 2

Each model is a name in `models/detect`, with `+end2end` behind it for a one-to-one branch, or a `.pt` file. It is exported as
ONNX and run through the calls of detect.py and val.py: the file, then NMS or top-k in PyTorch where the file has none inside. All
models take turns, so that a busy machine is busy for all; the first round warms up. Printed are medians of --repeats rounds at
--conf, and what each is of the first one.

How long NMS takes follows from how many boxes are above --conf. Models without a training are settled (see `settling.py`),
which leaves far more of them than a trained one: for figures that mean something give trained weights and a picture.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.latency import alternate, settled_model
from benchmarks.tables import aligned
from data.images import read_image
from data.transforms import letterbox
from deploy.backends import Backend, load_backend
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.onnx_file import export_onnx
from engine.evaluation import detections_of
from engine.options import Thresholds
from models.reparam import fuse
from models.weights.load import load_weights
from utils.config import integer, number, parse_imgsz
from utils.structures import Detections, as_float

MODELS = ("yolo11n", "yolo11n+end2end", "rtdetr-r18", "dfine-s")
FORM = "+end2end"


def as_file(name: str, imgsz: tuple[int, int], threads: int, folder: Path) -> Backend:
    """The deployed form of a model in ONNX Runtime."""
    if name.endswith(".pt"):
        model = load_weights(name).model
    else:
        model = settled_model(name.removesuffix(FORM), imgsz, end2end=name.endswith(FORM))
    fuse(model)
    path = export_onnx(model, ExportOptions(imgsz=imgsz), folder / f"{Path(name).stem}.pt")
    return load_backend(path, threads=threads)


def picture(source: str, imgsz: tuple[int, int]) -> Tensor:
    """A file, or blobs, as (1, 3, H, W) in [0, 1]."""
    if not source:
        return blobs(1, imgsz, seed=0)
    image = letterbox(read_image(source), imgsz)[0]
    return as_float(torch.from_numpy(image).permute(2, 0, 1)[None].contiguous(), "cpu")


def detect(backend: Backend, image: Tensor, thresholds: Thresholds) -> Detections:
    """What detect.py does between reading a picture and drawing on it."""
    return detections_of(backend(image), backend.postprocess_kind, thresholds)[0]


@torch.inference_mode()
def measure(
    backends: dict[str, Backend], image: Tensor, confs: Sequence[float], repeats: int
) -> list[tuple[str, ...]]:
    """Rows of the table: the file alone, then to its detections above each of `confs`."""
    runs: dict[tuple[str, float | None], Callable[[], object]] = {}
    for name, backend in backends.items():
        runs[name, None] = partial(backend.run, image)
        for conf in confs:
            runs[name, conf] = partial(detect, backend, image, Thresholds(conf, 0.45))
    times = alternate(runs, repeats)
    first = next(iter(backends))
    rows: list[tuple[str, ...]] = []
    for (name, lowest), ms in times.items():
        found = (
            "-"
            if lowest is None
            else str(len(detect(backends[name], image, Thresholds(lowest, 0.45)).scores))
        )
        what = "file alone" if lowest is None else f"above {lowest:g}"
        rows.append((name, what, found, f"{ms:.2f}", f"{ms / times[first, lowest]:.2f}"))
    return rows


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", default=list(MODELS), help=f"configs (with {FORM}) or .pt files")
    add("--source", default="", help="picture; left out: blobs")
    add("--imgsz", nargs="+", type=int, default=[640], help="image size")
    add("--threads", nargs="+", type=integer(1), default=[1], help="of one operation")
    add("--conf", nargs="+", type=number(0, 1), default=[0.25, 0.001], help="lowest scores")
    add("--repeats", type=integer(1), default=30, help="counted rounds")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_args()
    imgsz = parse_imgsz(args.imgsz, 32)
    image, size = picture(args.source, imgsz), "x".join(map(str, imgsz))
    print(
        f"batch 1 at {size}, {args.repeats} rounds, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    )
    for threads in args.threads:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            backends = {name: as_file(name, imgsz, threads, Path(folder)) for name in args.models}
            rows = measure(backends, image, args.conf, args.repeats)
        print(f"threads {threads}")
        print("\n".join(aligned([("model", "detections", "found", "ms", "of the first"), *rows])))


if __name__ == "__main__":
    main()
