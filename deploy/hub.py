"""A detector for other programs: pictures of any kind in, `Results` out."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PillowImage
from PIL import ImageFile
from torch import Tensor, nn

from data.images import PIXEL_ERRORS, Image, from_array, from_pillow, read_image
from data.transforms import fitted_size, letterbox
from deploy.backends import quicken
from deploy.results import Results
from models.postprocess import postprocess
from models.reparam import fuse
from models.yolo import DetectionModel
from utils.channels import white_of
from utils.config import parse_imgsz
from utils.errors import DatasetError
from utils.structures import Letterbox, as_float

Picture = str | Path | PillowImage.Image | np.ndarray


class Detector(nn.Module):
    """A model with everything around it: reading, letterbox, postprocessing.

    Attributes:
        model: the network in its deployed form.
        names: class names by index.
        white: the value that is white in pictures deeper than 8 bits; None for their full range.
        conf: detections score above this.
        iou: boxes of one class that overlap more are suppressed.
        classes: only these class indices, None for all.
        agnostic: suppress across classes too.
        multi_label: several classes for one box.
        max_det: the most detections of one image.
    """

    def __init__(self, model: DetectionModel, device: str | torch.device | None = None) -> None:
        super().__init__()
        self.model = model.float().eval()
        fuse(self.model, check=False)
        if not device or torch.device(device).type == "cpu":
            quicken(self.model)
        self.names = dict(enumerate(model.names))
        self.white = white_of(model.config)
        self.conf = 0.25
        self.iou = 0.45
        self.classes: Sequence[int] | None = None
        self.agnostic = False
        self.multi_label = False
        self.max_det = 1000
        if device not in (None, ""):
            self.to(device)

    @torch.inference_mode()
    def forward(
        self,
        images: Tensor | Picture | list[Picture] | tuple[Picture, ...],
        size: int | Sequence[int] | None = None,
    ) -> Results:
        """Detect objects.

        Args:
            images: a path, a PIL image, an array (H, W, 3) in RGB, a list of those, which are read
                as files are (turned upright, alpha on white, 16 bits as 8), or a tensor (B, 3, H, W)
                in [0, 1] whose sides are multiples of the stride, which is taken as it is.
            size: the sides that images are fitted into, one number or (height, width); None: those that the model was
                trained at.

        Raises:
            DatasetError: something that is none of these, or an image that cannot be read.
        """
        parameter = next(self.model.parameters())
        if isinstance(images, Tensor):
            batch, pictures, boxes, files = _from_tensor(images, self.model.max_stride)
            batch = batch.to(parameter.device, parameter.dtype)
        else:
            items = images if isinstance(images, (list, tuple)) else [images]
            read = [_read(item, number, self.white) for number, item in enumerate(items)]
            pictures, files = [image for image, _ in read], [name for _, name in read]
            stride = self.model.max_stride
            imgsz = parse_imgsz(size, stride) if size else self.model.imgsz
            stacked, boxes = _stack(pictures, imgsz, stride)
            batch = as_float(stacked, parameter.device, parameter.dtype)
        found = postprocess(
            self.model.decode(self.model(batch)),
            self.model.head.postprocess,
            conf_thres=self.conf,
            iou_thres=self.iou,
            max_det=self.max_det,
            classes=self.classes,
            agnostic=self.agnostic,
            multi_label=self.multi_label,
        )
        pred = [
            torch.cat((box.restore(d.boxes), d.scores[:, None], d.labels[:, None].to(d.scores)), 1)
            for d, box in zip(found, boxes, strict=True)
        ]
        return Results(pictures, pred, self.names, files)


def _read(item: Picture, number: int, white: float | None) -> tuple[Image, str]:
    """One image as RGB (H, W, 3) uint8, read as its file would be, and a file name for it."""
    if isinstance(item, (str, Path)):
        if "://" in str(item):
            raise DatasetError(
                f"{item}: nothing is downloaded. Fetch the picture first and give its path."
            )
        return read_image(item, white), Path(item).name
    given = item.filename if isinstance(item, ImageFile.ImageFile) else ""
    name = Path(os.fsdecode(given) or f"image{number}.jpg").name
    try:
        if isinstance(item, PillowImage.Image):
            return from_pillow(item, white), name
        return from_array(np.asarray(item), white), name
    except PIXEL_ERRORS as error:
        kind = type(item).__name__
        raise DatasetError(
            f"image {number}: {kind} - {error}, expected a path, a PIL image or an array (H, W, 3) of uint8 or uint16."
        ) from error


def _stack(
    pictures: Sequence[Image], size: tuple[int, int], stride: int
) -> tuple[Tensor, list[Letterbox]]:
    """One batch of the smallest rectangle that holds every fitted picture, (B, 3, H, W) uint8."""
    if not pictures:
        raise DatasetError("images: got none, expected at least one.")
    fitted = [fitted_size(image.shape[0], image.shape[1], size) for image in pictures]
    common = tuple(-(-max(side) // stride) * stride for side in zip(*fitted, strict=True))
    boxed = [letterbox(image, (common[0], common[1])) for image in pictures]
    stacked = torch.from_numpy(np.stack([image for image, _ in boxed])).permute(0, 3, 1, 2)
    return stacked.contiguous(), [box for _, box in boxed]


def _from_tensor(
    images: Tensor, stride: int
) -> tuple[Tensor, list[Image], list[Letterbox], list[str]]:
    """A batch that is taken as it is."""
    if images.ndim == 3:
        images = images[None]
    good = images.ndim == 4 and images.shape[1] == 3 and images.is_floating_point()
    if not good or images.shape[2] % stride or images.shape[3] % stride:
        raise DatasetError(
            f"images: got a tensor {tuple(images.shape)} {images.dtype}, expected float "
            f"(B, 3, H, W) in [0, 1] with sides that are multiples of {stride}."
        )
    height, width = images.shape[2:]
    bytes_ = images.detach().mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    box = Letterbox(height, width, 1.0, 1.0, 0, 0)
    names = [f"image{number}.jpg" for number in range(len(images))]
    return images, list(bytes_), [box] * len(images), names
