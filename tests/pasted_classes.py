"""Classes as people paste them, made from their constructor's parameters, and how a row for them is read."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from models.parser.pasted import Settled, settle
from models.parser.readings import RowArguments
from models.registry import Layer, Scaling, by_signature

NANO = Scaling(width=0.25, max_channels=1024)


def block(
    parameters: str, inside: str = "c1", outside: str = "c1", keeps: bool = True
) -> Callable[..., nn.Module]:
    """A class with these constructor parameters, whose convolution maps `inside` to `outside` channels."""
    layer = f"nn.Conv2d({inside}, {outside}, 1)" if keeps else "nn.Identity()"
    code = compile(
        f"class Block(nn.Module):\n    def __init__(self, {parameters}):\n        super().__init__()\n"
        f"        self.conv = {layer}\n    def forward(self, x):\n        return self.conv(x)\n",
        "block.py",
        "exec",
    )
    scope: dict[str, Any] = {"nn": nn, "__name__": "pasted_block"}
    types.FunctionType(code, scope)()
    return scope["Block"]


def settled(
    build: Callable[..., Any], args: list, *channels: int, repeats: int = 1, **kwargs: Any
) -> Settled:
    """How a row with `args` is read for maps of `channels` at 8x8."""
    row = RowArguments(args, kwargs, NANO._replace(repeats=repeats))
    values = [torch.empty(1, c, 8, 8, device="meta") for c in channels or (256,)]
    layer = Layer("Block", build, by_signature)
    return settle(layer, row, values, is_image=False, is_list=len(values) > 1)
