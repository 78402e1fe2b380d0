"""What is exported: the fused network with its decoding as one module, and what the file says of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models.head import Head
from models.postprocess import best_rows
from models.yolo import DetectionModel
from utils.channels import white_of
from utils.thresholds import KEY, class_thresholds

PRODUCER = "Yoke"
VERSION = "0.1.0"
PADDING = "letterbox: scale to fit, centre, fill with 114, size a multiple of the stride"
COLOUR = "RGB, 0 to 1"


@dataclass(frozen=True)
class ExportOptions:
    """What the user asked for.

    Attributes:
        imgsz: traced size (height, width).
        batch: traced batch.
        channels: of the images.
        dynamic: "" for fixed shapes, "batch", or "all" for batch, height and width.
        half: float16 weights; decoding and softmax stay float32.
        int8: integer weights and activations; head and decoding stay float32.
        simplify: run the graph through onnxslim (ONNX).
        opset: of the ONNX file.
        dynamo: use torch.export's ONNX exporter instead of the TorchScript one.
        end2end: NMS or top-k inside an ONNX graph, above `conf_thres`.
        raw: no decoding.
        conf_thres, iou_thres, max_det: of the postprocessing inside an end2end graph; `max_det` also of a one-to-one branch.
        device: where the network is traced.
        sampling: how deformable attention reads its maps, "grid_sample" or "gather".
        calibration: gives float images (B, 3, H, W) that int8 ranges are measured on.
    """

    imgsz: tuple[int, int] = (640, 640)
    batch: int = 1
    channels: int = 3
    dynamic: str = ""
    half: bool = False
    int8: bool = False
    simplify: bool = False
    opset: int = 17
    dynamo: bool = False
    end2end: bool = False
    raw: bool = False
    conf_thres: float = 0.25
    iou_thres: float = 0.45
    max_det: int = 300
    device: torch.device = torch.device("cpu")
    sampling: str = "grid_sample"
    calibration: Callable[[], Iterator[Tensor]] | None = field(default=None, repr=False)

    def layout(self, model: DetectionModel) -> str:
        """Form of the output, see `deploy.runtimes.layouts`."""
        form = self.form(model)
        return {"layout": model.head.layout, "raw": "raw"}.get(form, "end2end")

    def form(self, model: DetectionModel) -> str:
        """What the network itself gives, see `ExportNetwork`."""
        if self.raw:
            return "raw"
        if self.end2end:
            return "decoded"
        return "best" if model.head.postprocess == "best" else "layout"

    def suffix(self) -> str:
        """What is put behind the file's stem."""
        return "_int8" if self.int8 else ""


class Decode(nn.Module):
    """The head's decoding under a name of its own, so that tools can leave it out of
    quantisation."""

    def __init__(self, head: Head[Any], form: str, max_det: int) -> None:
        super().__init__()
        self._head = (head,)  # in a tuple: its parameters belong to the network alone
        self.form, self.max_det = form, max_det

    def forward(self, raw: object) -> Tensor | tuple[Tensor, ...]:
        """Decoded tensors in the chosen form."""
        (head,) = self._head
        if self.form == "layout":
            return head.export_layout(raw)
        decoded = head.decode(raw)
        return best_rows(decoded, self.max_det) if self.form == "best" else tuple(decoded)


class ExportNetwork(nn.Module):
    """Images (B, 3, H, W), float32 RGB in [0, 1] -> the output tensors of the file.

    Args:
        model: fused, in eval mode.
        form: "layout" for what runners expect, "decoded" for boxes (B, A, 4) in xyxy and scores
            (B, A, C), "best" for rows (B, max_det, 6) as `models.postprocess.best_rows` has them,
            "raw" for the head's own tensors.
        max_det: rows of the form "best".
    """

    def __init__(self, model: DetectionModel, form: str = "layout", max_det: int = 300) -> None:
        super().__init__()
        self.network = model
        self.decode = Decode(model.head, form, max_det)
        self.form = form

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """One tensor, or several in a tuple."""
        weight = next(self.network.parameters())
        raw = self.network(images.to(weight.dtype))
        if self.form != "raw":
            return self.decode(raw)
        return tuple(tensor.float() for tensor in floating_tensors(raw))


def floating_tensors(raw: object) -> list[Tensor]:
    """The floating tensors of a head's output, in its order."""
    if isinstance(raw, Tensor):
        return [raw] if raw.is_floating_point() else []
    parts = raw.values() if isinstance(raw, dict) else raw if isinstance(raw, (list, tuple)) else ()
    return [tensor for part in parts for tensor in floating_tensors(part)]


def build_network(
    model: DetectionModel, options: ExportOptions, half: bool = False
) -> ExportNetwork:
    """The module that is traced for `options`; with `half`, a float16 copy of the network."""
    form = options.form(model)
    model = copy.deepcopy(model).half() if half else model
    return ExportNetwork(model, form, options.max_det).to(options.device).eval()


def example(options: ExportOptions, batch: int | None = None) -> Tensor:
    """Images of the traced shape, smooth blobs rather than noise, always the same ones."""
    images = blobs(batch or options.batch, options.imgsz, seed=0).to(options.device)
    return images[:, :1].expand(-1, options.channels, -1, -1) if options.channels != 3 else images


def blobs(batch: int, imgsz: tuple[int, int], seed: int) -> Tensor:
    """Smooth random images (batch, 3, H, W) in [0, 1]: unlike noise, they look different
    everywhere."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.rand(
        batch, 3, max(imgsz[0] // 16, 2), max(imgsz[1] // 16, 2), generator=generator
    )
    return nn.functional.interpolate(small, imgsz, mode="bicubic").clamp(0, 1)


def metadata(model: DetectionModel, options: ExportOptions, stem: str) -> dict[str, str]:
    """What the file says of itself; every value is text.

    Args:
        model: what is exported.
        options: how.
        stem: name of the weights.
    """
    names, white = dict(enumerate(model.names)), white_of(model.config)
    layout = options.layout(model)
    limits = (options.conf_thres, options.iou_thres) if options.end2end else (0.0, 1.0)
    class_conf = class_thresholds(model.config, len(names))
    return {
        "description": f"{stem}: {model.head.family} detector, {len(names)} classes",
        "author": PRODUCER,
        "producer": PRODUCER,
        "version": VERSION,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "task": "detect",
        "family": model.head.family,
        "postprocess": model.head.postprocess,
        "layout": layout,
        "end2end": str(layout == "end2end"),
        "stride": str(model.max_stride),
        "batch": str(options.batch),
        "imgsz": str(list(options.imgsz)),
        "dynamic": options.dynamic,
        "channels": str(model.channels),
        "half": str(options.half),
        "int8": str(options.int8),
        "names": str(names),
        "padding": PADDING,
        "colour": COLOUR,
        **({"white": str(white)} if white is not None else {}),
        **({KEY: str(list(class_conf))} if class_conf is not None else {}),
        **({"thresholds": str([*limits, options.max_det])} if layout == "end2end" else {}),
    }


def beside(weights: Path, options: ExportOptions, ending: str) -> Path:
    """The artifact's path: next to the weights, with their stem."""
    return weights.with_name(f"{weights.stem}{options.suffix()}{ending}")
