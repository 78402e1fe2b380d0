"""What kind of network a backbone is, since each wants another recipe: said by its class, or seen from its layers."""

from __future__ import annotations

from typing import Literal, Protocol, get_args, runtime_checkable

from torch import nn

from models.yolo import DetectionModel

Kind = Literal["plain", "depthwise", "reparameterized", "reversible", "attention"]
KINDS: tuple[Kind, ...] = get_args(Kind)
DEPTHWISE_SHARE = (
    0.2  # of the convolutions; MobileNets and EfficientNets have a third, ResNets none
)


@runtime_checkable
class SaysKind(Protocol):
    """A backbone that says which recipe it wants."""

    kind: Kind


@runtime_checkable
class Reparameterizes(Protocol):
    """A block of several branches that become one for inference."""

    def reparameterize(self) -> None: ...


def backbone_kind(model: DetectionModel) -> Kind | None:
    """The kind of the backbone under `model`; None for one that the YAML builds of the family's own blocks."""
    for row, module in zip(model.rows, model.model, strict=True):
        if row.section == "backbone":
            kind = kind_of(module) if row.map_slots is not None else said_kind(module)
            if kind is not None:
                return kind
    return None


def kind_of(backbone: nn.Module) -> Kind:
    """What a backbone says of itself, else what it is made of."""
    inside = [part for part in backbone.modules() if part is not backbone]
    if said := said_kind(backbone):
        return said
    if any(isinstance(part, nn.MultiheadAttention) or _is_attention(part) for part in inside):
        return "attention"
    if any(isinstance(part, Reparameterizes) for part in inside):
        return "reparameterized"
    convolutions = [part for part in inside if isinstance(part, nn.Conv2d)]
    depthwise = [c for c in convolutions if c.groups == c.in_channels > 1]
    is_depthwise = len(depthwise) > DEPTHWISE_SHARE * max(len(convolutions), 1)
    return "depthwise" if is_depthwise else "plain"


def said_kind(module: nn.Module) -> Kind | None:
    """What the module or a part of it says."""
    said = (part.kind for part in module.modules() if isinstance(part, SaysKind))
    return next((kind for kind in said if kind in KINDS), None)


def _is_attention(module: nn.Module) -> bool:
    """Whether places of a map look at each other in it, by queries; a gate of channels or places is none."""
    firsts = {name.split(".")[0] for name, _ in module.named_parameters()}
    is_called = "attention" in (name := type(module).__name__.lower()) or "attn" in name
    return is_called and any(first in ("q", "query") or "qkv" in first for first in firsts)
