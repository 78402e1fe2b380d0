"""Parallel convolutions folded into one (RepVGG, arXiv 2101.03697, section 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.common import Conv


@torch.no_grad()
def fold_branches(branches: Sequence[Conv], identity: nn.BatchNorm2d | None = None) -> nn.Conv2d:
    """The one convolution that equals, in eval mode, the sum of `branches` before their activations.

    Args:
        branches: on one input; strides and groups are equal, kernels odd and centred. The first has the largest kernel.
        identity: BatchNorm of a path without a convolution; input and output channels are then equal.
    """
    first = branches[0].conv
    size: tuple[int, int] = (first.kernel_size[0], first.kernel_size[1])
    folded = [_folded(branch) for branch in branches]
    if identity is not None:
        per_group = first.in_channels // first.groups
        kernel = torch.eye(per_group).repeat(first.groups, 1)[:, :, None, None].to(first.weight)
        folded.append(_with_norm(kernel, None, identity))
    conv = nn.Conv2d(
        first.in_channels, first.out_channels, size, first.stride, first.padding, first.dilation, first.groups,  # type: ignore[arg-type]
        device="meta",
    )  # fmt: skip
    conv.weight = nn.Parameter(
        sum((_centred(weight, size) for weight, _ in folded), torch.tensor(0.0).to(first.weight))
    )
    conv.bias = nn.Parameter(sum((bias for _, bias in folded), torch.tensor(0.0).to(first.weight)))
    return conv


def _folded(branch: Conv) -> tuple[Tensor, Tensor]:
    return _with_norm(branch.conv.weight, branch.conv.bias, branch.bn)


def _with_norm(weight: Tensor, bias: Tensor | None, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias with `norm` in them; what `fuse` leaves in place of a norm that it has folded changes nothing."""
    mean, variance = getattr(norm, "running_mean", None), getattr(norm, "running_var", None)
    if mean is None or variance is None:
        bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
        return weight.detach(), bias.detach()
    assert isinstance(norm, nn.BatchNorm2d)
    return fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, norm.weight, norm.bias)


def _centred(weight: Tensor, size: tuple[int, int]) -> Tensor:
    """A kernel with zeros around it, up to `size` (height, width)."""
    rows, columns = (size[0] - weight.shape[2]) // 2, (size[1] - weight.shape[3]) // 2
    return functional.pad(weight, (columns, columns, rows, rows))
