"""What to write instead, for the mistakes that pasted code has most often."""

from __future__ import annotations

import re

from torch import nn

from utils.errors import nearest

_IMPORTS = {
    "F": "import torch.nn.functional as F",
    "nn": "from torch import nn",
    "torch": "import torch",
    "math": "import math",
    "np": "import numpy as np",
    "Tensor": "from torch import Tensor",
    "rearrange": "from einops import rearrange",
    "repeat": "from einops import repeat",
    "partial": "from functools import partial",
    **{
        name: f"from timm.layers import {name}"
        for name in ("DropPath", "trunc_normal_", "to_2tuple")
    },
    **{
        name: f"from models.common import {name}"
        for name in ("Conv", "DWConv", "autopad", "Bottleneck", "C2f", "C3")
    },
}
_SAID = (
    (r"cannot assign (module|parameter|buffers?) before", "Write super().__init__() first in the constructor."),
    (r"missing the required \"forward\"", "Define forward(self, x)."),
    (r"a leaf Variable that requires grad", "What trains must not be changed in forward: write `y = x * self.scale`, which "
     "leaves the parameter as it is."),
    (r"modified by an inplace operation", "Write `x = x + y` for `x += y`, and no inplace=True behind what is used again."),
    (r"not compiled with CUDA|NVIDIA driver|Expected all tensors to be on the same device", "Leave .cuda() and fixed devices out: "
     "--device moves the model."),
    (r"mat1 and mat2 shapes cannot be multiplied", "A linear layer reads the last dimension: permute the map to (B, H, W, C)."),
    (r"values to unpack \(expected 3", "A map has four dimensions, (B, C, H, W): flatten and transpose it to tokens first."),
    (r"forward\(\) missing \d+ required positional argument", "It reads several maps: list them in the row, as [[-1, 6], ...]."),
    (r"forward\(\) takes \d+ positional arguments? but \d+ were given", "It reads fewer maps than the row gives: list fewer."),
)  # fmt: skip


def reason_of(error: BaseException, end: str = "") -> str:
    """What `error` says and, where that is known, a sentence of what to write instead, for it or for what caused it.

    Args:
        error: of a user's code.
        end: what the line ends with where no such sentence is known; without, it stays as it is.
    """
    cause: BaseException | None = error
    while cause is not None:
        if said := _of(cause):
            return f"{str(error).rstrip('.')}. {said}"
        cause = cause.__cause__
    return f"{str(error).rstrip(end)}{end}" if end else str(error)


def _of(error: BaseException) -> str:
    if isinstance(error, NameError) and error.name in _IMPORTS:
        return f"Write `{_IMPORTS[error.name]}` at the top of the file."
    if isinstance(error, AttributeError) and isinstance(error.obj, nn.Module) and error.name:
        return _of_attribute(error.obj, error.name)
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.isidentifier():
        return (
            f"Install {error.name}, put {error.name}.py beside the file, or leave the import out."
        )
    if isinstance(error, SystemExit):
        return "Put what a file does when it is run under `if __name__ == '__main__':`."
    text = str(error)
    return next((advice for pattern, advice in _SAID if re.search(pattern, text)), "")


def _of_attribute(module: nn.Module, name: str) -> str:
    own = [key for key in vars(module) if not key.startswith("_")]
    own += [key for key, _ in (*module.named_children(), *module.named_parameters(recurse=False))]
    return nearest(name, own).strip()
