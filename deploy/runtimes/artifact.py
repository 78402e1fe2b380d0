"""What an artifact says of itself, and the one call that every artifact answers.

What it needs to be told lies in its metadata, so that nothing has to be said again. An artifact of a
fixed batch is fed in portions of that batch, one of a fixed size gets smaller images padded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from deploy.runtimes.layouts import read_detections, read_layout
from utils.channels import as_channels
from utils.errors import CheckpointError, ConfigError, ForeignError, UserError, foreign_code
from utils.structures import Decoded, Detections

PAD_VALUE = 114 / 255
METADATA_FILE = "metadata.txt"
SUFFIXES = (".pt", ".onnx", ".torchscript", ".pt2", ".safetensors")
OPENVINO_FOLDER = "_openvino_model"


@dataclass(frozen=True)
class ArtifactInfo:
    """What an artifact says about itself.

    Attributes:
        names: class names.
        stride: image sizes are multiples of it.
        imgsz: size (height, width) it was made for.
        batch: the only batch it takes; None for any.
        dynamic: whether it takes other sizes than `imgsz`.
        family: "yolov5", "yolov9", "yolo11" or "rtdetr".
        postprocess_kind: one of `models.postprocess.KINDS`.
        layout: form of the output, see `deploy.runtimes.layouts`.
        channels: of the images.
        half: whether its weights are float16.
        white: the value of white in images deeper than 8 bits; None for their full range.
        class_conf: lowest score of a detection of each class that `val.py --report` found best, if it did.
        thresholds: lowest score, largest overlap that NMS leaves and most detections of one that is end-to-end.
    """

    names: tuple[str, ...]
    stride: int
    imgsz: tuple[int, int]
    batch: int | None
    dynamic: bool
    family: str
    postprocess_kind: str
    layout: str
    channels: int = 3
    half: bool = False
    white: float | None = None
    class_conf: tuple[float, ...] | None = None
    thresholds: tuple[float, float, int] | None = None

    @property
    def end2end(self) -> bool:
        """Whether the artifact does its own NMS or top-k."""
        return self.layout == "end2end"

    @property
    def told_inside(self) -> str:
        """What an end-to-end artifact has decided already, in words."""
        if self.thresholds is None:
            return "finds its boxes itself"
        conf, iou, max_det = self.thresholds
        overlap = f", overlap up to {iou:g}" if self.postprocess_kind == "nms" else ""
        return f"finds its boxes itself: scores above {conf:g}{overlap}, {max_det} an image at most"


class Backend:
    """An artifact, loaded.

    Attributes:
        info: what it says about itself; its fields are attributes of the backend too.
        device: where images are expected and results come out.
        source: the file, named in messages.

    Args:
        compute: images (B, 3, H, W) in [0, 1] on `device` -> output tensors, for sizes the artifact takes.
    """

    def __init__(
        self,
        info: ArtifactInfo,
        compute: Callable[[Tensor], Sequence[object]],
        device: torch.device,
        source: str | Path = "model",
    ) -> None:
        self.info, self._compute, self.device, self.source = info, compute, device, source
        self.names, self.stride, self.imgsz = info.names, info.stride, info.imgsz
        self.batch, self.dynamic, self.family = info.batch, info.dynamic, info.family
        self.postprocess_kind, self.end2end = info.postprocess_kind, info.end2end

    def run(self, images: Tensor) -> list[Tensor]:
        """All output tensors for images (B, 3, H, W) in [0, 1] of a batch and size that the artifact takes.

        Raises:
            CheckpointError: its graph fails, or gives something else.
        """
        try:
            with foreign_code(UserError):
                outputs = self._compute(images)
        except ForeignError as error:
            reason = [line for line in str(error.__cause__).splitlines() if line.strip()]
            told = " ".join(reason[-1].split())[:200] if reason else type(error.__cause__).__name__
            raise CheckpointError(
                f"{self.source}: fails on images of shape {tuple(images.shape)}, which its metadata say it takes - "
                f"{told}. Export it again."
            ) from error
        tensors = [output for output in outputs if isinstance(output, Tensor)]
        if len(tensors) < len(outputs):
            other = next(o for o in outputs if not isinstance(o, Tensor))
            raise CheckpointError(
                f"{self.source}: got a {type(other).__name__} as output, expected a tensor. Export it again."
            )
        return tensors

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Decoded | list[Detections]:
        """Predictions in pixels of `images`.

        Args:
            images: RGB in [0, 1], (B, 3, H, W), float.

        Returns:
            Boxes and scores of every anchor point; detections if the artifact is end-to-end.

        Raises:
            ConfigError: images larger than a fixed-size artifact takes, or not multiples of the
                stride.
        """
        images = self._fit(as_channels(images.to(self.device), self.info.channels)).contiguous()
        imgsz = (images.shape[-2], images.shape[-1])
        parts = [self.run(part)[0] for part in self._portions(images)]
        output = (torch.cat(parts) if len(parts) > 1 else parts[0])[: len(images)]
        output = output.to(self.device)
        self._check(output, len(images))
        if self.end2end:
            return read_detections(output)
        return read_layout(output, self.info.layout, imgsz)

    def _check(self, output: Tensor, batch: int) -> None:
        """Make sure that the output is what the layout says, for the classes that there are names for."""
        classes, layout = len(self.names), self.info.layout
        width = {"anchors": 5 + classes, "end2end": 6}.get(layout, 4 + classes)
        axis = 1 if layout == "channels" else 2
        if output.ndim != 3 or len(output) != batch or output.shape[axis] != width:
            raise CheckpointError(
                f"{self.source}: got an output of shape {tuple(output.shape)} for {batch} images, expected {width} "
                f"numbers a box on axis {axis} for {classes} classes in the layout {layout!r}. Export it again."
            )
        if (
            self.end2end
            and output.numel()
            and not -0.5 < float(output[..., 5].max()) < classes - 0.5
        ):
            raise CheckpointError(
                f"{self.source}: got class {float(output[..., 5].max()):g}, expected one below {classes}. Export it again."
            )

    def _portions(self, images: Tensor) -> list[Tensor]:
        """Pieces of the artifact's batch, the last one filled up with grey images."""
        if self.batch is None or len(images) == self.batch:
            return [images]
        missing = -len(images) % self.batch
        if missing:
            grey = images.new_full((missing, *images.shape[1:]), PAD_VALUE)
            images = torch.cat((images, grey))
        return list(images.split(self.batch))

    def _fit(self, images: Tensor) -> Tensor:
        """Pad smaller images below and to the right for an artifact of a fixed size."""
        height, width = images.shape[-2:]
        if self.dynamic:
            if height % self.stride or width % self.stride:
                raise ConfigError(
                    f"image size: got {height}x{width}, expected multiples of {self.stride}."
                )
            return images
        below, right = self.imgsz[0] - height, self.imgsz[1] - width
        if below < 0 or right < 0:
            raise ConfigError(
                f"image size: got {height}x{width}, but the artifact takes {self.imgsz[0]}x"
                f"{self.imgsz[1]}. Give --imgsz {self.imgsz[0]} {self.imgsz[1]}, or export with "
                "--dynamic."
            )
        return F.pad(images, (0, right, 0, below), value=PAD_VALUE) if below or right else images


def missing_library(library: str, path: Path) -> ConfigError:
    """The error for an artifact whose library is not installed."""
    return ConfigError(
        f"{path}: running it needs {library}, which is not installed. pip install {library}"
    )


@contextmanager
def loading(path: Path) -> Iterator[None]:
    """Whatever a library does not like about a file, told in one line.

    Raises:
        CheckpointError: it refuses the file.
    """
    try:
        with foreign_code(UserError):
            yield
    except ForeignError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be loaded - {reason}.") from error
