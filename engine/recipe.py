"""The recipe of a run: the family's file, the user's over it, the flags over both, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from engine.flags import spelling
from engine.options import SCHEDULES, TrainOptions
from models.family import Recipe, recipe_file
from models.losses.box import name_problem
from models.losses.classification import class_loss_problem
from models.losses.own import settle_own
from models.yolo import DetectionModel
from utils.config import check_recipe, load_hyp
from utils.logger import get_logger

CHECKS = {"box_loss": name_problem, "cls_loss": class_loss_problem}


def recipe_of(options: TrainOptions, family: str, saved: Recipe | None) -> Recipe:
    """The recipe of a new run, or that of an earlier one, `saved`, with the whole path of a user's box loss in it.

    Raises:
        ConfigError: a file has unknown keys or wrong values, or a user's loss is not found.
    """
    if saved is None:
        schedule = next((kind for name, kind in SCHEDULES.items() if vars(options)[name]), None)
        overrides = {
            "optimizer": options.optimizer,
            "schedule": schedule,
            "close_mosaic": options.close_mosaic,
            "label_smoothing": options.label_smoothing or None,
            "box_loss": options.box_loss,
            "cls_loss": options.cls_loss,
        }
        hyp = recipe(family, options.hyp, overrides)
    else:
        hyp = complete(saved, family, str(options.resume))
    beside = [Path(options.hyp).parent] if options.hyp and not options.box_loss else []
    return {**hyp, "box_loss": settle_own(hyp["box_loss"], [*beside, Path()])}


def recipe(family: str, hyp: str | None, overrides: Recipe) -> dict[str, Any]:
    """The hyper-parameters of a run: the family's file, the user's over it, then flags that are set.

    Raises:
        ConfigError: unknown keys or wrong types in the user's file.
    """
    merged = dict(load_hyp(hyp, recipe_file(family), CHECKS))
    if hyp:
        get_logger().info(f"recipe: {hyp} over data/hyps/{family}.yaml")
    else:
        get_logger().info(
            f"recipe: data/hyps/{family}.yaml, the {family} family's own (--hyp to change it)"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in given.keys() - merged.keys():
        get_logger().info(
            f"{spelling(key)}: without effect for {family}, its recipe has no such number"
        )
    return {key: given.get(key, value) for key, value in merged.items()}


def complete(hyp: Recipe, family: str, source: str = "resume") -> dict[str, Any]:
    """The recipe of an earlier run, with the family's numbers for keys that it did not know yet.

    Raises:
        ConfigError: a value is not what such a recipe has; `source` is the run's file.
    """
    default = load_hyp(None, recipe_file(family))
    check_recipe(hyp, default, source)
    return {**default, **hyp}


def settle_optimizer(
    hyp: Recipe, num_classes: int, images: int, batch_size: int, epochs: int
) -> Recipe:
    """Decide what `optimizer: auto` means for a training of this length; the recipe has the rule and its numbers."""
    if hyp["optimizer"] != "auto":
        return hyp
    steps = math.ceil(images / max(batch_size, hyp["nbs"])) * epochs
    is_short = steps <= hyp["auto_steps"]
    name, lr = "SGD", hyp["auto_sgd_lr"]
    if is_short:
        name, lr = "AdamW", round(hyp["auto_adamw_lr"] * 5 / (4 + num_classes), 6)
    momentum = hyp["auto_momentum"]
    get_logger().info(
        f"optimizer: {name}, lr0 {lr}, momentum {momentum} (auto, {steps} steps; --optimizer to choose)"
    )
    bias_lr = hyp["auto_warmup_bias_lr"]
    return {**hyp, "optimizer": name, "lr0": lr, "momentum": momentum, "warmup_bias_lr": bias_lr}


def lr_factors(model: DetectionModel, hyp: Recipe) -> dict[str, float]:
    """Learning-rate factor of each parameter that does not have the common one: those of the backbone rows."""
    factor = hyp.get("backbone_lr", 1.0)
    if factor == 1.0:
        return {}
    prefixes = tuple(f"model.{i}." for i, row in enumerate(model.rows) if row.section == "backbone")
    return {name: factor for name, _ in model.named_parameters() if name.startswith(prefixes)}
