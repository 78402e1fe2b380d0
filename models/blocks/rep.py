"""Parallel convolutions folded into one (RepVGG, arXiv 2101.03697, section 3.3), and the blocks made of them.

Letters: B batch, C channels, H height, W width. Attribute names are those of the published state dicts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.common import Conv, batch_norm, short_names
from models.fusing.folding import fold_norm
from models.registry import LayerError, convolution, register, stacked
from utils.device import AutocastState


class _ConvNorm(Protocol):
    """A convolution and the norm behind it, or what `fuse` has left of that."""

    def __call__(self, x: Tensor, /) -> Tensor: ...

    @property
    def conv(self) -> nn.Conv2d: ...
    @property
    def bn(self) -> nn.Module: ...


@torch.no_grad()
def fold_branches(branches: Sequence[_ConvNorm], identity: nn.Module | None = None) -> nn.Conv2d:
    """The one convolution that equals, in eval mode, the sum of `branches` before their activations.

    All sums are made in float64 and rounded once, to the type of the first branch.

    Args:
        branches: on one input; strides and groups are equal, kernels odd and centred. The first has the largest kernel.
        identity: norm of a path without a convolution; input and output channels are then equal.
    """
    first = branches[0].conv
    folded = nn.utils.skip_init(
        nn.Conv2d, first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding,
        first.dilation, first.groups, device=first.weight.device, dtype=first.weight.dtype,
    )  # fmt: skip
    weight = torch.zeros_like(first.weight, dtype=torch.float64)
    bias = weight.new_zeros(first.out_channels)
    one, none = weight.new_ones(first.out_channels), torch.zeros_like(bias)
    for branch in branches:
        scale, shift = fold_norm(branch.bn) or (one, none)
        rows, columns = ((weight.shape[i] - branch.conv.weight.shape[i]) // 2 for i in (2, 3))
        kernel = branch.conv.weight.double() * scale[:, None, None, None]
        weight += functional.pad(kernel, (columns, columns, rows, rows))
        bias += shift if branch.conv.bias is None else branch.conv.bias.double() * scale + shift
    if identity is not None:
        scale, shift = fold_norm(identity) or (one, none)
        outputs = torch.arange(first.out_channels, device=weight.device)
        centre = weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2]
        centre[outputs, outputs % weight.shape[1]] += scale
        bias += shift
    folded.weight.copy_(weight)
    folded.bias.copy_(bias)
    return folded.requires_grad_(first.weight.requires_grad).train(first.training)


def sum_branches(
    x: Tensor, branches: Sequence[_ConvNorm], identity: nn.Module | None = None
) -> Tensor:
    """The sum of `branches` on one input, and of the norm `identity`, before their activation.

    Where several dense 1x1 branches train with BatchNorm, one convolution computes them all.
    """
    if len(branches) > 1 and all(map(_is_pointwise, branches)):
        norms = [*(branch.bn for branch in branches), *([] if identity is None else [identity])]
        if _count(x) > 2 * x.shape[1] and all(_takes_statistics(norm) for norm in norms):
            return _sum_of_pointwise(x, branches, identity)
    total = branches[0](x)
    for branch in branches[1:]:
        total = total + branch(x)
    return total if identity is None else total + identity(x)


def _is_pointwise(branch: _ConvNorm) -> bool:
    conv = branch.conv
    return conv.kernel_size == conv.stride == (1, 1) and conv.groups == 1 and conv.bias is None


def _takes_statistics(norm: nn.Module) -> bool:
    """Whether it is a BatchNorm of one process that takes its statistics from this batch."""
    return isinstance(norm, nn.BatchNorm2d) and norm.training and norm.momentum is not None


def _count(x: Tensor) -> int:
    """Values of a channel."""
    return x.numel() // x.shape[1]


def _sum_of_pointwise(
    x: Tensor, branches: Sequence[_ConvNorm], identity: nn.Module | None
) -> Tensor:
    """`sum_branches` as one convolution.

    With mean m and covariance S of the input's channels, the outputs `W x` of a branch have mean `W m` and variance
    diag(`W S W'`), which is all that BatchNorm asks of them.
    """
    with AutocastState.now(x.device.type)._replace(enabled=False).again():
        pixels = x.permute(0, 2, 3, 1).flatten(0, 2)  # (BHW, C)
        pixels = pixels.to(torch.promote_types(x.dtype, torch.float32))
        mean = pixels.mean(0)
        centred = pixels - mean
        # Both factors would get the same gradient; it is taken once and doubled.
        product = centred.T @ centred.detach()
        covariance = (2 * product - product.detach()) / len(pixels)
        weight = bias = mean.new_zeros(())
        for branch in branches:
            kernel = branch.conv.weight.flatten(1)
            variance = ((kernel @ covariance) * kernel).sum(1)
            scale, shift = _batch_affine(branch.bn, kernel @ mean, variance, len(pixels))
            weight, bias = weight + kernel * scale[:, None], bias + shift
        if identity is not None:
            scale, shift = _batch_affine(identity, mean, covariance.diagonal(), len(pixels))
            weight, bias = weight + scale.diag(), bias + shift
        bias = bias - weight @ mean
    return functional.linear(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)


def _batch_affine(
    norm: nn.Module, mean: Tensor, variance: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """What BatchNorm makes of centred values of this (biased) variance: factor and shift; its running statistics follow."""
    assert isinstance(norm, nn.BatchNorm2d) and norm.momentum is not None
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.num_batches_tracked is not None
    with torch.no_grad():
        norm.running_mean.lerp_(mean, norm.momentum)
        norm.running_var.lerp_(variance * (count / (count - 1)), norm.momentum)
        norm.num_batches_tracked.add_(1)
    return norm.weight * (variance.clamp(min=0) + norm.eps).rsqrt(), norm.bias


@register(convolution)
@short_names
class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution in parallel, foldable into one 3x3 (arXiv 2101.03697).

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel_size: of the larger convolution, odd.
        stride: of both.
        padding: of the larger convolution; None keeps the size at stride 1.
        groups: of both.
        dilation: of the larger convolution.
        activation: behind the sum, as in `Conv`.
        bn: a third path, BatchNorm alone, where the input has the output's shape.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        padding: int | None = None,
        groups: int = 1,
        dilation: int = 1,
        activation: bool | nn.Module = True,
        bn: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise LayerError(f"got kernel size {kernel_size}, expected an odd one")
        self.conv1: Conv | None = Conv(
            in_channels, out_channels, kernel_size, stride, padding, groups, dilation, activation
        )
        self.act, self.has_default_activation = self.conv1.act, activation is True
        self.conv1.act, self.conv1.has_default_activation = nn.Identity(), False
        self.conv2: Conv | None = Conv(
            in_channels, out_channels, 1, stride, groups=groups, activation=False
        )
        has_identity = bn and in_channels == out_channels and stride == 1
        self.bn = batch_norm(in_channels) if has_identity else None
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.act(self.conv(x))
        assert self.conv1 is not None and self.conv2 is not None
        return self.act(sum_branches(x, (self.conv1, self.conv2), self.bn))

    def reparameterize(self) -> None:
        """Replace the branches by the one convolution that equals them in eval mode."""
        if self.conv1 is None or self.conv2 is None:
            return
        self.conv = fold_branches((self.conv1, self.conv2), self.bn)
        self.conv1 = self.conv2 = self.bn = None


@register(convolution)
@short_names
class RepConvN(RepConv):
    """`RepConv` as YOLOv9's rows write it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        groups: int = 1,
        activation: bool = True,
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, groups=groups, activation=activation
        )


@register(stacked)
@short_names
class RepC3(nn.Module):
    """RT-DETR's fusion block: one path through `RepConv`s, one past them, added.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        repeats: number of `RepConv`s.
        expansion: inner channels as a share of the output's.
    """

    def __init__(
        self, in_channels: int, out_channels: int, repeats: int = 3, expansion: float = 1.0
    ) -> None:
        super().__init__()
        hidden = int(out_channels * expansion)
        self.cv1 = Conv(in_channels, hidden, 1)
        self.cv2 = Conv(in_channels, hidden, 1)
        self.m = nn.Sequential(*(RepConv(hidden, hidden) for _ in range(repeats)))
        self.cv3 = nn.Identity() if hidden == out_channels else Conv(hidden, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.m(self.cv1(x)) + self.cv2(x))
