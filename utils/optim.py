"""Optimiser, learning-rate schedules, warm-up: pure functions of the epoch and the iteration.

Optimiser state is kept by parameter name, so that a change in the order or number of parameter
groups (another freeze list, another module) does not shift it onto the wrong parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from utils.errors import CheckpointError, ConfigError, nearest
from utils.foreach import norms
from utils.layers import NORM_LAYERS
from utils.muon import MuSGD

OPTIMIZERS = ("SGD", "Adam", "AdamW", "MuSGD")
ROLES = ("weight", "norm", "bias")

Schedule = Callable[[float], float]


def build_optimizer(
    model: nn.Module,
    name: str,
    lr: float,
    momentum: float,
    weight_decay: float,
    *,
    lr_factors: Mapping[str, float] | None = None,
) -> Optimizer:
    """Make an optimiser with three parameter groups, in this order: weights, norms, biases.

    Only the weights decay. Frozen parameters are left out; a group may be empty, so that the order
    never changes. Each group carries `role`, `names` (of its parameters) and `initial_lr`.

    Args:
        model: parameters are named as the model names them (give it unwrapped from DDP).
        name: SGD (with Nesterov momentum), Adam, AdamW, or MuSGD, whose dense filters take a group before the others.
        lr: learning rate before schedule and warm-up.
        momentum: of SGD, or beta1 of the Adams.
        weight_decay: of the first group.
        lr_factors: parameter name -> factor of its learning rate, for those whose is not 1; they form
            three more groups per factor, behind the first three.

    Raises:
        ConfigError: unknown name, or nothing left to train.
    """
    if name not in OPTIMIZERS:
        raise ConfigError(
            f"optimizer: got {name!r}, expected one of {', '.join(OPTIMIZERS)}."
            f"{nearest(name, OPTIMIZERS)}"
        )
    groups = parameter_groups(model, lr_factors)
    if name == "MuSGD":
        groups = [part for group in groups for part in _with_filters_apart(model, group)]
    if not any(group["params"] for group in groups):
        raise ConfigError(
            "freeze: every parameter is frozen, nothing is left to train. Freeze fewer rows."
        )
    for group in groups:
        group["initial_lr"] = lr * group.pop("factor")
        group["weight_decay"] = weight_decay if group["role"].startswith("weight") else 0.0
    if name == "SGD":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0)
    if name == "MuSGD":
        return MuSGD(groups, lr, momentum=momentum)
    adam = torch.optim.Adam if name == "Adam" else torch.optim.AdamW
    return adam(groups, lr=lr, betas=(momentum, 0.999))


def _with_filters_apart(model: nn.Module, group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group of weights as two: the dense filters, whose step may be orthogonal, behind all others."""
    if not group["role"].startswith("weight"):
        return [group]
    owners = dict(model.named_modules())
    is_dense = [_is_dense(owners[name.rpartition(".")[0]], p) for name, p in _pairs(group)]
    parts = []
    for wanted, role in ((False, group["role"]), (True, f"{group['role']} dense")):
        chosen = [pair for pair, dense in zip(_pairs(group), is_dense) if dense == wanted]
        names, params = [name for name, _ in chosen], [p for _, p in chosen]
        parts.append({**group, "role": role, "names": names, "params": params, "muon": wanted})
    return parts


def _pairs(group: Mapping[str, Any]) -> list[tuple[str, nn.Parameter]]:
    return list(zip(group["names"], group["params"], strict=True))


def _is_dense(owner: nn.Module, parameter: Tensor) -> bool:
    """Whether a weight is one matrix over all channels: not of a depthwise or grouped convolution, not an embedding."""
    is_grouped = isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and owner.groups > 1
    return parameter.ndim >= 2 and not is_grouped and not isinstance(owner, nn.Embedding)


def parameter_groups(
    model: nn.Module, lr_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Trainable parameters by role: `{"role", "factor", "names", "params"}` for weight, norm, bias.

    A bias is what its module calls `bias`; a norm is what stands in a normalisation layer, has one dimension
    that counts or none (layer scales, strengths of connections), or is a table of positions; all the rest
    are weights. A shared parameter is listed once. Parameters with a factor of their own stand in groups
    such as `weight x0.1`.
    """
    factors = lr_factors or {}
    groups: dict[str, dict[str, Any]] = {}
    for factor in (1.0, *sorted(set(factors.values()) - {1.0})):
        for role in ROLES:
            name = role if factor == 1.0 else f"{role} x{factor:g}"
            groups[name] = {"role": name, "factor": factor, "names": [], "params": []}
    norm_modules = {n for n, m in model.named_modules() if isinstance(m, NORM_LAYERS)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = factors.get(name, 1.0)
        role = _role(name, parameter, norm_modules)
        group = groups[role if factor == 1.0 else f"{role} x{factor:g}"]
        group["names"].append(name)
        group["params"].append(parameter)
    return list(groups.values())


def _role(name: str, parameter: Tensor, norm_modules: set[str]) -> str:
    owner, _, leaf = name.rpartition(".")
    if leaf == "bias":
        return "bias"
    is_scale = leaf != "weight" and parameter.numel() == max(parameter.shape, default=1)
    is_table = "pos_embed" in leaf or "position" in leaf or leaf.endswith("_token")
    is_free = owner in norm_modules or parameter.ndim <= 1 or is_scale or is_table
    return "norm" if is_free else "weight"


def optimizer_state_by_name(optimizer: Optimizer) -> dict[str, Any]:
    """State of an optimiser of `build_optimizer`, keyed by parameter name; plain data and tensors.

    Returns:
        `{"kind": "SGD", "groups": {role: options}, "state": {parameter name: {slot: tensor}}}`.
    """
    groups: dict[str, dict[str, Any]] = {}
    state: dict[str, dict[str, Any]] = {}
    for group in optimizer.param_groups:
        groups[group["role"]] = _options(group)
        for name, parameter in zip(group["names"], group["params"], strict=True):
            if parameter in optimizer.state:
                state[name] = dict(optimizer.state[parameter])
    return {"kind": type(optimizer).__name__, "groups": groups, "state": state}


def load_optimizer_state_by_name(optimizer: Optimizer, saved: Mapping[str, Any]) -> list[str]:
    """Give `optimizer` the state that `optimizer_state_by_name` saw, parameter by parameter.

    Returns:
        Names of trainable parameters for which nothing was stored; they start afresh.

    Raises:
        CheckpointError: another kind of optimiser, or a slot whose shape is not its parameter's.
    """
    kind = type(optimizer).__name__
    if saved["kind"] != kind:
        raise CheckpointError(
            f"optimizer: the checkpoint holds {saved['kind']}, the run uses {kind}. "
            f"Resume with --optimizer {saved['kind']}."
        )
    named = {
        name: parameter
        for group in optimizer.param_groups
        for name, parameter in zip(group["names"], group["params"], strict=True)
    }
    complete = optimizer.state_dict()
    for group in complete["param_groups"]:
        restored = _restored(saved["groups"].get(group["role"], {}))
        _check_options(group, restored)
        group.update(restored)
    complete["state"] = {}
    for index, (name, parameter) in enumerate(named.items()):
        if name in saved["state"]:
            _check_shapes(name, parameter, saved["state"][name])
            complete["state"][index] = dict(saved["state"][name])
    optimizer.load_state_dict(complete)
    return [name for name in named if name not in saved["state"]]


def build_schedule(
    kind: str, epochs: int, lrf: float, flat: float = 0.5, end: float = 1.0
) -> Schedule:
    """Epoch (from 0) to factor of the initial learning rate, 1 at first and `lrf` at `epochs`.

    Args:
        kind: "linear", "cosine" (Loshchilov and Hutter, ICLR 2017), "flat_cosine" (1, then a cosine, then
            `lrf`) or "fixed" (1).
        epochs: of the training.
        lrf: the last factor.
        flat, end: where the cosine of "flat_cosine" begins and ends, as shares of the training (DEIM, arXiv 2412.04234).

    Raises:
        ConfigError: another kind.
    """
    first, length = flat * epochs, max((end - flat) * epochs, 1e-9)

    def cosine(part: float) -> float:
        return lrf + (1 - lrf) * (1 + math.cos(math.pi * part)) / 2

    table: dict[str, Schedule] = {
        "linear": lambda epoch: 1 + (lrf - 1) * _bounded(epoch / epochs),
        "cosine": lambda epoch: cosine(_bounded(epoch / epochs)),
        "flat_cosine": lambda epoch: cosine(_bounded((epoch - first) / length)),
        "fixed": lambda epoch: 1.0,
    }
    if kind not in table:
        raise ConfigError(
            f"schedule: got {kind!r}, expected one of {', '.join(table)}.{nearest(kind, table)}"
        )
    return table[kind]


def _bounded(share: float) -> float:
    return min(max(share, 0.0), 1.0)


@dataclass(frozen=True)
class Warmup:
    """Ways over the first `iterations`: where learning rates and momentum start.

    Attributes:
        iterations: length; 0 is no warm-up.
        bias_lr: learning rate of the biases at iteration 0; the other groups start from 0.
        momentum: momentum at iteration 0.
        power: of the share of the way that is gone; 1 is a straight line.
    """

    iterations: int
    bias_lr: float
    momentum: float
    power: float = 1.0

    def is_active(self, iteration: int) -> bool:
        """Whether `iteration`, counted over all epochs from 0, is still in the warm-up."""
        return iteration <= self.iterations and self.iterations > 0

    def lr(self, iteration: int, role: str, target: float) -> float:
        """Learning rate of a group that is on its way to `target`."""
        start = self.bias_lr if role.startswith("bias") else 0.0
        return self._between(iteration, start, target)

    def momentum_at(self, iteration: int, target: float) -> float:
        """Momentum on its way to `target`."""
        return self._between(iteration, self.momentum, target)

    def accumulate(self, iteration: int, target: float) -> int:
        """Batches per optimiser step, from 1 to `target` (nominal batch / batch), never below 1."""
        return max(1, round(self._between(iteration, 1.0, target)))

    def _between(self, iteration: int, start: float, end: float) -> float:
        if not self.is_active(iteration):
            return end
        return start + (end - start) * (iteration / self.iterations) ** self.power


def set_learning_rates(
    optimizer: Optimizer, factor: float, iteration: int, warmup: Warmup, momentum: float
) -> None:
    """Write learning rates (and SGD's momentum) for one iteration into the groups.

    Args:
        optimizer: made by `build_optimizer`.
        factor: what the schedule gives for this epoch.
        iteration: counted over all epochs from 0.
        warmup: see `Warmup`.
        momentum: SGD's momentum after the warm-up.
    """
    for group in optimizer.param_groups:
        group["lr"] = warmup.lr(iteration, group["role"], group["initial_lr"] * factor)
        if "momentum" in group:
            group["momentum"] = warmup.momentum_at(iteration, momentum)


def clip_gradients(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients down to a total L2 norm of `max_norm`; returns the norm before."""
    return nn.utils.clip_grad_norm_(model.parameters(), max_norm)


def gradient_norms(model: nn.Module) -> dict[str, Tensor]:
    """L2 norm of each parameter's gradient, by name; of those that have one."""
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    found = norms(list(named.values()))
    return dict(zip(named, found, strict=True))


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a group that are plain data, such as `lr` and `betas`."""
    left_out = ("params", "names", "role")
    plain = (bool, int, float, str, tuple, type(None))
    return {k: v for k, v in group.items() if k not in left_out and isinstance(v, plain)}


def _restored(options: Mapping[str, Any]) -> dict[str, Any]:
    """A checkpoint stores tuples (betas) as lists."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


def _check_options(group: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    for key, value in saved.items():
        own = group.get(key)
        numbers = value if isinstance(value, tuple) else (value,)
        is_number = all(isinstance(n, (int, float)) and math.isfinite(n) for n in numbers)
        is_like = is_number and isinstance(value, tuple) == isinstance(own, tuple)
        is_switch = own is None or (isinstance(own, bool) and value is None)
        if not is_like and not is_switch:
            raise CheckpointError(
                f"optimizer {group['role']}: {key} - got {str(value)[:60]!r}, expected a value such as {own!r}."
            )


def _check_shapes(name: str, parameter: Tensor, slots: Mapping[str, Any]) -> None:
    for slot, value in slots.items():
        if value is None or (slot == "step" and isinstance(value, (int, float))):
            continue
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"optimizer[{name}].{slot}: got {str(value)[:60]!r}, expected a tensor."
            )
        expected = torch.Size() if slot == "step" else parameter.shape
        if value.shape != expected:
            raise CheckpointError(
                f"optimizer[{name}].{slot}: got shape {tuple(value.shape)}, expected "
                f"{tuple(expected)}. The checkpoint belongs to another model."
            )
