"""The arithmetic of folding: a per-channel `x * scale + shift` moves into the layer before or behind it.

All sums are made in float64 and rounded once, to the type of the weight they go to.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor, nn

Layer: TypeAlias = (
    nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d | nn.Linear
)  # fmt: skip
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


@runtime_checkable
class TellsAffine(Protocol):
    """A module that knows what it does to each channel, and can do its shift alone."""

    def affine(self) -> Affine | None:
        """Its scale and shift; None for nothing."""

    def without_scale(self) -> nn.Module:
        """What is left of it where the layer behind has taken the scale."""


def fold_norm(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (C,), float64, of a norm on running statistics: `(x - mean) / sqrt(variance + eps) * weight + bias`.

    Read from the tensors that it holds, so BatchNorm of any make is one; None for what is none.
    """
    held = {**dict(norm.named_parameters(recurse=False)), **dict(norm.named_buffers(recurse=False))}
    mean, variance, eps = held.get("running_mean"), held.get("running_var"), vars(norm).get("eps")
    if mean is None or variance is None or not isinstance(eps, float):
        return None
    scale = (variance.detach().double() + eps).rsqrt()
    if "weight" in held:
        scale = scale * held["weight"].detach().double()
    shift = -mean.detach().double() * scale
    return scale, shift + held["bias"].detach().double() if "bias" in held else shift


def read_affine(module: nn.Module, shape: torch.Size) -> Affine | None:
    """How `module` maps an input of `shape` in eval mode, if that is a scale and shift per channel.

    Norms on running statistics and layer scale are recognised by what they hold; others may say it themselves. What was
    recognised is tried on random numbers, so a look-alike is not taken for one.
    """
    if not any(True for _ in (*module.parameters(), *module.buffers())) or len(shape) < 2:
        return None
    norm = fold_norm(module)
    if isinstance(module, TellsAffine):
        candidates = [module.affine()]
    elif norm is not None:
        after = [m for m in module.children() if not isinstance(m, (nn.Identity, nn.Dropout))]
        rest = None if not after else after[0] if len(after) == 1 else nn.Sequential(*after)
        candidates = [] if module.training else [Affine(*norm, 1, rest)]
    else:
        candidates = _read_scale(module, shape)
    return next((c for c in candidates if c is not None and _agrees(module, c, shape)), None)


def _read_scale(module: nn.Module, shape: torch.Size) -> list[Affine | None]:
    """A module of one parameter as a scale along either channel axis that it fits."""
    own = list(module.parameters())
    others = any(True for _ in (*module.buffers(), *module.children()))
    if len(own) != 1 or others or isinstance(module, FOLDABLE):
        return []
    scale = own[0].detach().double().flatten()
    if max(own[0].shape, default=0) != scale.numel():
        return []
    fitting = [axis for axis in (1, -1) if shape[axis] == scale.numel()]
    return [Affine(scale, torch.zeros_like(scale), axis, None) for axis in fitting]


@torch.no_grad()
def _agrees(module: nn.Module, affine: Affine, shape: torch.Size) -> bool:
    reference = next(t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point())
    if shape[affine.axis] != affine.scale.numel():
        return False
    probe = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(reference)
    view = [1] * probe.ndim
    view[affine.axis] = -1
    expected = probe * affine.scale.to(probe).view(view) + affine.shift.to(probe).view(view)
    if affine.rest is not None:
        expected = affine.rest(expected)
    found = module(probe.clone())
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    limit = 1e-3 if reference.dtype in (torch.float16, torch.bfloat16) else 1e-5
    return bool((found - expected).abs().max() <= limit * expected.abs().max().clamp(min=1e-30))


@torch.no_grad()
def fold_behind(layer: Layer, affine: Affine) -> None:
    """Change `layer` so that it does what it did, then `affine`."""
    weight = layer.weight.double()
    if isinstance(layer, TRANSPOSED):  # (in, out / groups, ...): a group's outputs stand together
        grouped = weight.view(layer.groups, weight.shape[0] // layer.groups, *weight.shape[1:])
        scale = affine.scale.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
        scaled = (grouped * scale).view_as(weight)
    else:
        scaled = weight * affine.scale.view(-1, *[1] * (weight.ndim - 1))
    bias = affine.shift if layer.bias is None else layer.bias.double() * affine.scale + affine.shift
    _assign(layer, scaled, bias)


@torch.no_grad()
def fold_before(layer: Layer, affine: Affine) -> None:
    """Change `layer` so that it does `affine`, then what it did; exact where `can_fold_before` says so."""
    weight = layer.weight.double()
    groups = 1 if isinstance(layer, nn.Linear) else layer.groups
    grouped = weight.view(groups, weight.shape[0] // groups, *weight.shape[1:])
    view = (groups, 1, -1, *[1] * (weight.ndim - 2))
    scaled = (grouped * affine.scale.view(view)).view_as(weight)
    added = (grouped * affine.shift.view(view)).view(weight.shape[0], -1).sum(1)
    _assign(layer, scaled, added if layer.bias is None else layer.bias.double() + added)


def can_fold_before(layer: Layer, affine: Affine) -> bool:
    """Whether the layer can take `affine` exactly: it pads with nothing, or nothing is shifted."""
    if isinstance(layer, nn.Linear):
        return True
    if not isinstance(layer, CONVOLUTIONS):
        return False
    pads = layer.padding != "valid" and any(p != 0 for p in layer.padding)
    return not pads or not bool(affine.shift.any())


def _assign(layer: Layer, weight: Tensor, bias: Tensor) -> None:
    """Round to the layer's type; weight stays the same parameter, a bias is made where there is none."""
    layer.weight.copy_(weight)
    if layer.bias is None:
        made = bias.to(layer.weight)
        layer.bias = nn.Parameter(made, requires_grad=layer.weight.requires_grad)
    else:
        layer.bias.copy_(bias)
