"""What the deployed form saves, and what other runtimes do with it.

    python benchmarks/latency.py                                  training form against deployed form, in PyTorch
    python benchmarks/latency.py --configs yolov9-c --imgsz 320 --threads 1 2
    python benchmarks/latency.py --runtimes --configs yolo11n --peer other.onnx     PyTorch, ONNX Runtime, OpenVINO

A network with fresh weights is settled first (see `settling.py`): in a fresh one signals fade to numbers so small
that processors handle them slowly. Both forms compute the same image, batch 1, decoding included, in turn: one
run of each, then again, so that a busy machine is busy for all. The first round warms up. Printed are medians and
their ratios; parameters and GFLOPs (2 x GMACs) at --imgsz; and the largest |difference| that the self-check of
`fuse` found, over the largest |value|.

With --runtimes the fused network is written as ONNX and OpenVINO at --imgsz and takes turns with them, all through
the calls that detect.py uses; --peer adds another ONNX file of the same input, run by ONNX Runtime alone.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from benchmarks.settling import settle
from benchmarks.tables import aligned
from deploy.backends import load_backend, model_backend
from deploy.exporters.network import ExportOptions, blobs
from deploy.exporters.onnx_file import export_onnx
from deploy.exporters.openvino_folder import export_openvino
from models.reparam import fuse
from models.table import Totals, measure
from models.weights.load import load_weights
from models.yolo import DetectionModel, build_model
from utils.config import integer, parse_imgsz

COUPLINGS = ("rtdetr-l-emo", "yolov9-c-mobileone", "yolov5n-emo", "yolov5n-revcol", "yolo11-mobilenetv4")  # fmt: skip
PLAIN = ("yolov5n", "gelan-c", "yolov9-c", "yolo11n", "rtdetr-l")
SETTLING_SIZE = (160, 160)
PAUSE = 0.05  # seconds between two runs: threads of one runtime keep waiting awake for a moment

K = TypeVar("K")
Run = Callable[[], Any]


class Latency(NamedTuple):
    """A config's two forms.

    Attributes:
        config: its name.
        forms: sizes of the training form and of the deployed one.
        difference: of their outputs, as `fuse` measured it.
        threads: of one operation.
        before: median milliseconds of the training form.
        after: median milliseconds of the deployed form.
    """

    config: str
    forms: tuple[Totals, Totals]
    difference: float
    threads: int
    before: float
    after: float


def alternate(runs: Mapping[K, Run], repeats: int, pause: float = PAUSE) -> dict[K, float]:
    """Median milliseconds of each, from runs in turn; a first round is not counted."""
    taken: dict[K, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            time.sleep(pause)
            start = time.perf_counter()
            run()
            milliseconds = 1000 * (time.perf_counter() - start)
            if number:
                taken[name].append(milliseconds)
    return {name: statistics.median(times) for name, times in taken.items()}


def settled_model(config: str, imgsz: tuple[int, int], *, end2end: bool = False) -> DetectionModel:
    """A config with fresh weights, settled."""
    torch.manual_seed(0)
    model = build_model(config, imgsz=imgsz, end2end=end2end)
    settle(model, SETTLING_SIZE)
    return model


@torch.no_grad()  # weights made in inference mode could not be fused
def measure_forms(
    config: str, imgsz: tuple[int, int], threads: Sequence[int], repeats: int
) -> list[Latency]:
    """The training form and the deployed form in turn, once for each number of threads."""
    model = settled_model(config, imgsz)
    fused = copy.deepcopy(model)
    difference = fuse(fused).difference or 0.0
    forms = measure(model, imgsz), measure(fused, imgsz)
    image = blobs(1, imgsz, seed=0)
    found = []
    for count in threads:
        torch.set_num_threads(count)
        runs = {
            "before": lambda: model.decode(model(image)),
            "after": lambda: fused.decode(fused(image)),
        }
        times = alternate(runs, repeats)
        found.append(Latency(config, forms, difference, count, times["before"], times["after"]))
    return found


def format_forms(found: Sequence[Latency]) -> str:
    """The table of both forms as text."""
    head = ("config", "params", "deployed", "GFLOPs", "deployed", "|difference|", "threads", "ms", "deployed", "ratio")  # fmt: skip
    rows = [head]
    for line in found:
        before, after = line.forms
        rows.append((
            line.config, f"{before.params:,}", f"{after.params:,}", f"{before.gflops:.2f}", f"{after.gflops:.2f}",
            f"{line.difference:.1e}", str(line.threads), f"{line.before:.1f}", f"{line.after:.1f}",
            f"{line.after / line.before:.2f}",
        ))  # fmt: skip
    return "\n".join(aligned(rows))


def measure_runtimes(
    model: DetectionModel, imgsz: tuple[int, int], threads: int, repeats: int, peer: Path | None
) -> dict[str, float]:
    """Median milliseconds of the fused network in each runtime, in turn.

    Args:
        model: a detector in float32; stays as it is.
        imgsz: (height, width), multiples of the largest stride.
        threads: of one operation.
        repeats: rounds.
        peer: another ONNX file that takes the same images.
    """
    torch.set_num_threads(threads)
    fused = copy.deepcopy(model).eval()
    fuse(fused)
    image, options = blobs(1, imgsz, seed=0), ExportOptions(imgsz=imgsz)
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "model.pt"
        onnx_backend = load_backend(export_onnx(fused, options, weights), threads=threads)
        openvino_backend = load_backend(export_openvino(fused, options, weights), threads=threads)
    pytorch_backend = model_backend(fused, fuse=False)
    runs: dict[str, Run] = {
        "PyTorch": lambda: pytorch_backend(image),
        "ONNX Runtime": lambda: onnx_backend(image),
        "OpenVINO": lambda: openvino_backend(image),
    }
    if peer:
        runs[peer.name] = peer_run(peer, image, threads)
    return alternate(runs, repeats)


def peer_run(path: Path, image: Tensor, threads: int) -> Run:
    """Another project's ONNX file under the same settings as ours.

    Raises:
        ValueError: it does not take images of this shape.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    options.add_session_config_entry(
        "session.set_denormal_as_zero", "1"
    )  # its weights may be fresh
    network = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (images,) = network.get_inputs()
    wanted = list(image.shape)
    if any(isinstance(a, int) and a != b for a, b in zip(images.shape, wanted, strict=True)):
        raise ValueError(f"{path}: takes {images.shape}, expected {wanted}. Give another --imgsz.")
    return lambda: network.run(None, {images.name: image.numpy()})


def format_runtimes(found: Mapping[int, Mapping[str, float]]) -> str:
    """The table of runtimes as text: milliseconds, and how many times the first and the last one's.

    Args:
        found: medians by threads, then by runtime.
    """
    rows: list[Sequence[str]] = [("threads", "runtime", "ms", "of PyTorch", "of the last")]
    for threads, times in found.items():
        last = list(times.values())[-1]
        rows += [
            (str(threads), name, f"{ms:.1f}", f"{ms / times['PyTorch']:.2f}", f"{ms / last:.2f}")
            for name, ms in times.items()
        ]
    return "\n".join(aligned(rows))


def parse_args() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--configs", nargs="+", default=[], help="names in models/detect, or YAML files")
    add("--weights", default="", help="checkpoint for --runtimes, instead of a config")
    add("--imgsz", nargs="+", type=int, default=[640], help="image size")
    add("--threads", nargs="+", type=integer(1), default=[], help="of one operation")
    add("--repeats", type=integer(1), default=5, help="counted rounds")
    add("--runtimes", action="store_true", help="compare runtimes instead of forms")
    add("--peer", type=Path, help="another ONNX file for --runtimes")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = parse_args()
    imgsz = parse_imgsz(args.imgsz, 32)
    size = "x".join(map(str, imgsz))
    loads = f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores"
    print(
        f"torch {torch.__version__}, batch 1 at {size}, {args.repeats} rounds, {loads}", flush=True
    )
    if args.runtimes:
        config = (args.configs or ["yolo11n"])[0]
        model = load_weights(args.weights).model if args.weights else settled_model(config, imgsz)
        found = {
            threads: measure_runtimes(model, imgsz, threads, args.repeats, args.peer)
            for threads in args.threads or [1, 2]
        }
        print(f"{args.weights or config}\n{format_runtimes(found)}")
        return
    lines: list[Latency] = []
    for config in args.configs or [*COUPLINGS, *PLAIN]:
        lines += measure_forms(config, imgsz, args.threads or [1], args.repeats)
        print(f"{config}: {lines[-1].before:.1f} ms, deployed {lines[-1].after:.1f}", flush=True)
    print(format_forms(lines))


if __name__ == "__main__":
    main()
