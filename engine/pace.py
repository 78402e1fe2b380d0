"""How fast a training goes: recipes were published for hundreds of thousands of optimiser steps; this one may have a thousand.

What counts in steps follows the number of steps that the run has. In a run as long as the published ones nothing changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from typing import Any, NamedTuple

from torch import nn

from utils.layers import BATCH_NORMS
from utils.logger import get_logger
from utils.optim import Schedule, Warmup, build_schedule

LEAST_WARMUP = 100  # iterations, where so many are no larger share of the run than a warm-up may be


class Length(NamedTuple):
    """How long a training is.

    Attributes:
        batches: of an epoch, in this process.
        epochs: all of them.
        batch_size: images a batch, over all processes.
    """

    batches: int
    epochs: int
    batch_size: int

    @property
    def iterations(self) -> int:
        """Batches of the whole training."""
        return self.batches * self.epochs


class Plan(NamedTuple):
    """What the epochs of a training are augmented with, 0 the first.

    Attributes:
        strong: epochs with more than flips; where they end before the training does, it goes on from its best weights.
        dense_end: the first epoch without mosaic and mixup.
    """

    strong: range
    dense_end: int


def plan_of(hyp: Mapping[str, Any], epochs: int) -> Plan:
    """The plan of a recipe, whose shares count in whole epochs; recipes without shares have all of it all the time.

    Source: DEIM (arXiv 2412.04234).
    """
    first, dense, end = (
        round(hyp.get(key, share) * epochs)
        for key, share in (("augment_from", 0.0), ("dense_until", 1.0), ("augment_until", 1.0))
    )
    return Plan(range(first, end), min(dense, epochs - int(hyp.get("close_mosaic", 0))))


def tell_plan(plan: Plan, epochs: int) -> None:
    """Log a plan that is not the same in all epochs."""
    first, end = plan.strong.start, plan.strong.stop
    if (first, end) == (0, epochs):
        return
    parts = [f"flips alone until epoch {first}"] if first else []
    parts.append(f"mosaic and mixup until {plan.dense_end}, warp and colours until {end}")
    parts += ["then on from the best weights with flips alone"] if end < epochs else []
    get_logger().info(f"plan: {', '.join(parts)}")


def schedule_of(hyp: Mapping[str, Any], epochs: int) -> Schedule:
    """The learning rate's way through the epochs."""
    ends = (hyp.get("flat_until", 0.5), hyp.get("augment_until", 1.0))
    return build_schedule(hyp["schedule"], epochs, hyp["lrf"], *ends)


def warmup_of(hyp: Mapping[str, Any], length: Length) -> Warmup:
    """The warm-up of a settled recipe."""
    iterations = round(hyp["warmup_epochs"] * length.batches)
    power = hyp.get("warmup_power", 1.0)
    return Warmup(iterations, hyp["warmup_bias_lr"], hyp["warmup_momentum"], power)


def accumulated(hyp: Mapping[str, Any], length: Length) -> int:
    """Batches whose gradients an optimiser step gathers."""
    return max(round(hyp["nbs"] / length.batch_size), 1)


def quicken_norms(model: nn.Module, hyp: Mapping[str, Any]) -> None:
    """Let BatchNorm gather its statistics over `norm_share` of what the average of a settled recipe looks back over, at most.

    In a short training weights change faster than the statistics follow, 33 steps behind at a momentum of 0.03: what it has
    learnt is lost in validation. What is noise in quick statistics is averaged with the weights.
    """
    least = min((1 - hyp["ema_decay"]) / hyp["norm_share"], 1.0)
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and module.momentum is not None:
            module.momentum = max(module.momentum, least)


def settle_pace(
    hyp: Mapping[str, Any], length: Length, kept: Set[str] = frozenset()
) -> dict[str, Any]:
    """The recipe with `nbs`, `warmup_epochs`, `ema_decay` and `ema_tau` as this training wants them.

    Batches are gathered into steps of `nbs` images only as far as `least_steps` steps remain. The warm-up takes no more than
    `warmup_share` of the run, and LEAST_WARMUP iterations at least where that leaves room. The average looks back, and ramps up,
    over `ema_share` of the steps at most. A recipe that is settled already stays as it is.

    Args:
        hyp: the recipe.
        length: of the training.
        kept: keys that stay as they are.
    """
    wanted = accumulated(hyp, length)
    gathered = min(wanted, max(int(length.iterations / hyp["least_steps"]), 1))
    gathered = wanted if "nbs" in kept else gathered
    steps = length.iterations / gathered
    warmup, most = hyp["warmup_epochs"] * length.batches, hyp["warmup_share"] * length.iterations
    window = max(hyp["ema_share"] * steps, 1.0)
    settled = {
        "nbs": hyp["nbs"] if gathered == wanted else gathered * length.batch_size,
        "warmup_epochs": min(max(warmup, LEAST_WARMUP), most) / length.batches if warmup else 0.0,
        "ema_decay": min(hyp["ema_decay"], 1 - 1 / window),
        "ema_tau": min(hyp["ema_tau"], window),
    }
    changed = {
        key: value
        for key, value in settled.items()
        if key not in kept and not math.isclose(value, hyp[key])
    }
    told = ", ".join(f"{key} {value:.4g} (not {hyp[key]:g})" for key, value in changed.items())
    get_logger().info(
        f"pace: {length.iterations} batches, {int(steps)} optimiser steps; {told or 'as the recipe says'}"
    )
    return {**hyp, **changed}
