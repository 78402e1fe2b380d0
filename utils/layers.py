"""Layers of torch that a training must treat with care: norms of few values, and a convolution that is computed wrongly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
NORM_LAYERS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, nn.LayerNorm)
ONEDNN_BLOCK = 16  # input channels that AVX-512 code computes at once; 8 with AVX2

Module = TypeVar("Module", bound=nn.Module)


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution without bias that trains fast: a stride is sliced away first, and a depthwise one is a product.

    On CPUs oneDNN takes longer for a depthwise 1x1 convolution than for four of 3x3. In eval mode this is torch's own.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, groups: int = 1):
        super().__init__(in_channels, out_channels, 1, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        x = x[:, :, :: self.stride[0], :: self.stride[1]]
        if self.groups == self.in_channels == self.out_channels:
            return x * self.weight.flatten()[:, None, None].to(x.dtype)
        return F.conv2d(x, self.weight, groups=self.groups)


def with_shared_norms(model: Module) -> Module:
    """The model with BatchNorm statistics over all processes."""
    try:  # torch's own conversion loses the activation inside timm's norms
        from timm.layers import convert_sync_batchnorm as convert
    except ImportError:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    converted: Module = convert(model)
    return converted


@contextmanager
def single_values(model: nn.Module, batch_size: int) -> Iterator[None]:
    """In a batch of one image, let each BatchNorm that sees one value a channel use its running statistics.

    One value has no variance, and torch refuses to train on it. Such maps of 1x1 stand at the end of a small
    image's trunk and in channel attention; a single image is what may be left over at the end of an epoch.
    """
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORMS)] if batch_size == 1 else []
    norms = [norm for norm in norms if norm.training and norm.running_mean is not None]
    handles = [norm.register_forward_pre_hook(_spare_single_values) for norm in norms]
    try:
        yield
    finally:
        for norm, handle in zip(norms, handles, strict=True):
            handle.remove()
            norm.training = True


def _spare_single_values(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    norm.training = inputs[0].numel() > inputs[0].shape[1]


def memory_format_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which is faster, unless the device computes the model wrongly in it.

    On CPUs oneDNN's gradient of a 1x1 convolution with a stride and fewer input channels than it computes at once writes
    beyond its memory in this format (https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.15). Such
    branches stand in the stems of networks that re-parameterize.
    """
    is_faulty = device.type == "cpu" and any(
        isinstance(m, nn.Conv2d)
        and not isinstance(m, PointwiseConv)
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.groups == 1
        and m.in_channels < ONEDNN_BLOCK
        for m in model.modules()
    )
    return torch.contiguous_format if is_faulty else torch.channels_last
