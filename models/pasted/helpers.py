"""Small functions of the YOLO projects under the names that pasted files import, each from its public description.

Letters: B batch, A anchor points, R bins of a distance, H and W size of a map.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from utils import boxes
from utils.device import select_device
from utils.distributed import unwrap
from utils.errors import ConfigError

T = TypeVar("T")
ConvT = TypeVar("ConvT", nn.Conv2d, nn.ConvTranspose2d)


def make_divisible(x: float, divisor: int | Tensor = 8) -> int:
    """`x` rounded up to a multiple of `divisor`."""
    step = int(divisor.max()) if isinstance(divisor, Tensor) else divisor
    return math.ceil(x / step) * step


def colorstr(*words: str) -> str:
    """The last word: ours are not coloured."""
    return words[-1]


def fuse_conv_and_bn(conv: ConvT, bn: nn.BatchNorm2d) -> ConvT:
    """The convolution, or transposed one, that equals `conv` followed by `bn` in eval mode."""
    fused = copy.deepcopy(conv)
    assert bn.running_mean is not None and bn.running_var is not None
    fused.weight, fused.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias,
        transpose=isinstance(conv, nn.ConvTranspose2d),
    )  # fmt: skip
    return fused.requires_grad_(False)


def initialize_weights(model: nn.Module) -> None:
    """BatchNorm as the YOLO families are published with: eps 1e-3, momentum 0.03."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-3, 0.03


def copy_attr(
    a: object, b: object, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> None:
    """Attributes of `b` to `a`, private ones left out."""
    for name, value in vars(b).items():
        if (not include or name in include) and name not in exclude and not name.startswith("_"):
            setattr(a, name, value)


def time_sync() -> float:
    """Seconds, when the GPU has done its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def is_parallel(model: nn.Module) -> bool:
    """Whether the model is wrapped for several processes."""
    return unwrap(model) is not model


def smart_inference_mode() -> Callable[[T], T]:
    """`@smart_inference_mode()`: no gradients are kept."""
    return torch.inference_mode()  # type: ignore[return-value]


def check_version(current: str = "0", minimum: str = "0", *args: object, **kwargs: object) -> bool:
    """Whether version `current` is `minimum` or later."""
    return _numbers(current) >= _numbers(minimum)


def _numbers(version: str) -> list[int]:
    parts = version.split("+")[0].split(".")
    return [int("".join(c for c in part if c.isdigit()) or 0) for part in parts]


def make_anchors(
    feats: Sequence[Tensor], strides: Sequence[float], grid_cell_offset: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Cell centres (A, 2) as x, y in cells, and the stride of each (A, 1), for maps (B, *, H, W)."""
    points, sizes = [], []
    for feature, stride in zip(feats, strides):
        height, width = feature.shape[-2:]
        rows = torch.arange(height, device=feature.device, dtype=feature.dtype) + grid_cell_offset
        columns = torch.arange(width, device=feature.device, dtype=feature.dtype) + grid_cell_offset
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        points.append(torch.stack((x, y), -1).view(-1, 2))
        sizes.append(torch.full((height * width, 1), float(stride), device=feature.device).to(x))
    return torch.cat(points), torch.cat(sizes)


def dist2bbox(distance: Tensor, anchor_points: Tensor, xywh: bool = True, dim: int = -1) -> Tensor:
    """Distances left, top, right, bottom of points to boxes: centre and size, or corners (FCOS, arXiv 1904.01355)."""
    low, high = distance.chunk(2, dim)
    first, second = anchor_points - low, anchor_points + high
    if xywh:
        return torch.cat(((first + second) / 2, second - first), dim)
    return torch.cat((first, second), dim)


def bbox2dist(anchor_points: Tensor, bbox: Tensor, reg_max: float) -> Tensor:
    """Corners to distances left, top, right, bottom in [0, reg_max)."""
    low, high = bbox.chunk(2, -1)
    return torch.cat((anchor_points - low, high - anchor_points), -1).clamp(0, reg_max - 0.01)


def bbox_iou(
    box1: Tensor,
    box2: Tensor,
    xywh: bool = True,
    GIoU: bool = False,
    DIoU: bool = False,
    CIoU: bool = False,
    eps: float = boxes.EPS,
) -> Tensor:
    """Overlap of boxes (..., 4) at the same place, (..., 1), less the penalty that is asked for.

    Boxes are centre and size, or corners.
    """
    both = [boxes.cxcywh_to_xyxy(box) if xywh else box for box in (box1, box2)]
    pair = boxes.BoxPair(both[0], both[1], eps)
    overlap = pair.iou
    if CIoU or DIoU:
        overlap = overlap - pair.centre_distance
    if CIoU:
        overlap = overlap - pair.aspect_difference
    return (overlap - pair.empty_share if GIoU else overlap)[..., None]


class DFL(nn.Module):
    """Expected distance of a distribution (arXiv 2006.04388, eq. 3): (B, 4R, A) logits to (B, 4, A) bins."""

    def __init__(self, c1: int = 16) -> None:
        super().__init__()
        self.c1 = c1
        self.conv = nn.Conv2d(c1, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data = torch.arange(c1, dtype=torch.float32).view(1, c1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, points = x.shape
        sides = x.view(batch, 4, self.c1, points).transpose(1, 2).softmax(1)
        return self.conv(sides).view(batch, 4, points)


def _unusable(name: str) -> Callable[..., None]:
    """A tool that measures a network: pasted files import it and call it where they are run as a script."""

    def measure(*args: object, **kwargs: object) -> None:
        raise ConfigError(
            f"{name}: got a call, expected none: it is not installed. `python models/yolo.py --cfg X.yaml` prints parameters "
            "and GFLOPs."
        )

    return measure


MEASURING: Mapping[str, object] = {
    name: _unusable(name)
    for name in ("profile", "clever_format", "get_model_complexity_info", "summary", "stat", "calculate_flops",
                 "FlopCountAnalysis", "flop_count_table", "parameter_count", "parameter_count_table")
}  # fmt: skip

SAME: Mapping[str, object] = {
    "TORCH_1_10": True, "de_parallel": unwrap, "select_device": select_device,
    "time_synchronized": time_sync, "fuse_deconv_and_bn": fuse_conv_and_bn, "box_iou": boxes.pairwise_iou,
    "xywh2xyxy": boxes.cxcywh_to_xyxy, "xyxy2xywh": boxes.xyxy_to_cxcywh, "clip_boxes": boxes.clip_boxes,
}  # fmt: skip
"""What we have under another name."""
