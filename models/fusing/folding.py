"""The arithmetic of folding: a per-channel `x * scale + shift` moves into the layer before or
behind it.

All sums are made in float64 and rounded once, to the type of the weight they go to.
"""

from __future__ import annotations

from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FOLDABLE = (*CONVOLUTIONS, *TRANSPOSED, nn.Linear)


class Affine(NamedTuple):
    """What a module does to its input: `rest(input * scale + shift)`.

    Attributes:
        scale: float64, (C,).
        shift: float64, (C,).
        axis: the channel axis of the input, 1 or -1.
        rest: what the module does afterwards (an activation), or None.
    """

    scale: Tensor
    shift: Tensor
    axis: int
    rest: nn.Module | None


def read_affine(module: nn.Module, shape: torch.Size) -> Affine | None:
    """How `module` maps an input of `shape` in eval mode, if that is a scale and shift per channel.

    BatchNorm of any make (with running statistics), frozen BatchNorm and layer scale are
    recognised by what they hold; others may say it themselves (`affine()`). What was recognised is
    tried on random numbers, so a look-alike is not taken for one.
    """
    if not any(True for _ in (*module.parameters(), *module.buffers())) or len(shape) < 2:
        return None
    tells = getattr(module, "affine", None)
    if isinstance(tells, MethodType):
        candidates = [tells()]
    elif getattr(module, "running_mean", None) is not None:
        candidates = [_read_norm(module)]
    else:
        candidates = _read_scale(module, shape)
    fitting = [c for c in candidates if isinstance(c, Affine) and _agrees(module, c, shape)]
    return fitting[0] if fitting else None


def _read_norm(module: Any) -> Affine | None:
    variance, eps = getattr(module, "running_var", None), getattr(module, "eps", None)
    if not isinstance(variance, Tensor) or not isinstance(eps, float) or module.training:
        return None
    mean = module.running_mean.detach().double()
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    scale = (variance.detach().double() + eps).rsqrt()
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -mean * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    after = [m for m in module.children() if not isinstance(m, (nn.Identity, nn.Dropout))]
    rest = None if not after else after[0] if len(after) == 1 else nn.Sequential(*after)
    return Affine(scale, shift, 1, rest)


def _read_scale(module: nn.Module, shape: torch.Size) -> list[Affine | None]:
    """A module of one parameter as a scale along either channel axis that it fits."""
    own = list(module.parameters())
    others = sum(1 for _ in module.buffers()) + sum(1 for _ in module.children())
    if len(own) != 1 or others or isinstance(module, FOLDABLE):
        return []
    scale = own[0].detach().double().flatten()
    if max(own[0].shape, default=0) != scale.numel():
        return []
    fitting = [axis for axis in (1, -1) if shape[axis] == scale.numel()]
    return [Affine(scale, torch.zeros_like(scale), axis, None) for axis in fitting]


def apply_affine(affine: Affine, x: Tensor) -> Tensor:
    """`x * scale + shift` along the channel axis, in the type of `x`, without `rest`."""
    view = [1] * x.ndim
    view[affine.axis] = -1
    return x * affine.scale.to(x).view(view) + affine.shift.to(x).view(view)


@torch.no_grad()
def _agrees(module: nn.Module, affine: Affine, shape: torch.Size) -> bool:
    reference = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    if shape[affine.axis] != affine.scale.numel():
        return False
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(shape, generator=generator).to(reference)
    expected = apply_affine(affine, probe)
    if affine.rest is not None:
        expected = affine.rest(expected)
    found = module(probe.clone())
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    limit = 1e-3 if reference.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return bool((found - expected).abs().max() <= limit * expected.abs().max().clamp(min=1e-30))


@torch.no_grad()
def fold_behind(layer: Any, affine: Affine) -> None:
    """Change `layer` (convolution or linear) so that it does what it did, then `affine`."""
    weight = layer.weight.double()
    if isinstance(
        layer, TRANSPOSED
    ):  # (in, out / groups, ...): the outputs of a group stand together
        grouped = weight.view(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        scale = affine.scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (grouped * scale).view_as(weight)
    else:
        scaled = weight * affine.scale.view(-1, *[1] * (weight.ndim - 1))
    bias = affine.shift if layer.bias is None else layer.bias.double() * affine.scale + affine.shift
    _assign(layer, scaled, bias)


@torch.no_grad()
def fold_before(layer: Any, affine: Affine) -> None:
    """Change `layer` so that it does `affine`, then what it did; exact without padding, or shift
    0."""
    weight = layer.weight.double()
    groups = getattr(layer, "groups", 1)
    grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    view = (groups, 1, -1, *[1] * (weight.ndim - 2))
    scaled = (grouped * affine.scale.view(view)).view_as(weight)
    added = (grouped * affine.shift.view(view)).view(weight.shape[0], -1).sum(1)
    _assign(layer, scaled, added if layer.bias is None else layer.bias.double() + added)


def can_fold_before(layer: Any, affine: Affine) -> bool:
    """Whether `fold_before` is exact for `layer`."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, CONVOLUTIONS):
        return False
    pads = layer.padding not in ("valid",) and any(p != 0 for p in layer.padding)
    return not pads or not bool(affine.shift.any())


def _assign(layer: Any, weight: Tensor, bias: Tensor) -> None:
    """Round to the layer's type; weight stays the same parameter, a bias is made where there is
    none."""
    layer.weight.copy_(weight)
    if layer.bias is None:
        made = bias.to(layer.weight)
        layer.bias = nn.Parameter(made, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
