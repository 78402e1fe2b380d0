"""timm's MobileOne with its branches summed as `models.blocks.rep` does it, in less than half of the time of a training step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.blocks.rep import fold_branches, sum_branches
from utils.layers import PointwiseConv


class MobileOneBlock(nn.Module):
    """timm's block with its parts under the same names, in the same order.

    Args:
        block: gives its parts away.
    """

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.identity, self.conv_kxk = block.identity, block.conv_kxk
        self.conv_scale, self.drop_path = block.conv_scale, block.drop_path
        self.attn, self.act = block.attn, block.act
        self.reparam_conv: nn.Conv2d | None = None
        if self.conv_scale is not None:
            self.conv_scale.conv = _as_pointwise(self.conv_scale.conv)

    def forward(self, x: Tensor) -> Tensor:
        if self.reparam_conv is not None:
            total = self.reparam_conv(x)
        elif isinstance(self.drop_path, nn.Identity):
            total = sum_branches(x, self._branches(), self.identity)
        else:
            total = self.drop_path(sum_branches(x, self._branches())) + self.identity(x)
        return self.act(self.attn(total))

    def _branches(self) -> list[Any]:
        return [*self.conv_kxk, *([] if self.conv_scale is None else [self.conv_scale])]

    def reparameterize(self) -> None:
        """Replace the branches by the one convolution that equals them in eval mode."""
        if self.reparam_conv is None:
            self.reparam_conv = fold_branches(self._branches(), self.identity)
            del self.identity, self.conv_kxk, self.conv_scale, self.drop_path


def with_fast_branches(net: nn.Module) -> nn.Module:
    """`net` of timm with such blocks in place of timm's, in place."""
    from timm.models.byobnet import MobileOneBlock as Block

    for module in list(net.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Block) and child.reparam_conv is None:
                setattr(module, name, MobileOneBlock(child))
    return net


def _as_pointwise(conv: nn.Conv2d) -> PointwiseConv:
    """The same convolution, with the same parameter."""
    with torch.device("meta"):
        made = PointwiseConv(conv.in_channels, conv.out_channels, conv.stride[0], conv.groups)
    made.weight = conv.weight
    return made
