"""The recipe of a run: the family's file, the user's over it, the flags over both, and what follows from them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from engine.flags import spelling
from engine.options import SCHEDULES, TrainOptions
from engine.pace import Length, settle_pace
from models.family import Recipe, recipe_file
from models.losses.box import name_problem
from models.losses.classification import class_loss_problem
from models.losses.own import settle_own
from models.yolo import DetectionModel
from utils.config import check_recipe, load_hyp, written_keys
from utils.logger import get_logger

OF_AN_OPTIMIZER = frozenset(("lr0", "momentum", "warmup_bias_lr"))
"""Keys that mean a certain optimiser, where a user's recipe has them without naming one."""
LONG = 10  # times `least_steps`: a training that may teach a plain transformer from scratch
CHECKS = {"box_loss": name_problem, "cls_loss": class_loss_problem}


def recipe_of(options: TrainOptions, model: DetectionModel, saved: Recipe | None) -> Recipe:
    """The recipe of a new run, or that of an earlier one, `saved`, with the whole path of a user's box loss in it.

    Raises:
        ConfigError: a file has unknown keys or wrong values, or a user's loss is not found.
    """
    family = model.head.family
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


def settle(hyp: Recipe, options: TrainOptions, model: DetectionModel, length: Length) -> Recipe:
    """The recipe with what follows from a new run's length and first weights; what the user's file says stays."""
    family, num_classes = model.head.family, model.head.num_classes
    kept = written_keys(options.hyp, recipe_file(family)) if options.hyp else frozenset()
    if hyp["optimizer"] == "auto" and (own := sorted(kept & OF_AN_OPTIMIZER)):
        get_logger().info(f"optimizer: SGD, which {', '.join(own)} of {options.hyp} are for")
        hyp = {**hyp, "optimizer": "SGD"}
    has_weights = bool(model.is_pretrained or options.weights or options.backbone_weights)
    hyp = settle_optimizer(hyp, length, num_classes if has_weights else None)
    hyp = settle_pace(hyp, length, kept)
    if not has_weights and length.iterations < LONG * hyp["least_steps"]:
        _warn_of_plain_transformers(model)
    if has_weights or "backbone_lr" in kept or hyp["backbone_lr"] == 1.0:
        return hyp
    get_logger().info(
        f"backbone_lr: 1, its {hyp['backbone_lr']:g} is for backbones with weights, and this one has none"
    )
    return {**hyp, "backbone_lr": 1.0}


def _warn_of_plain_transformers(model: DetectionModel) -> None:
    """Backbones that need weights say so by an attribute."""
    for row, module in zip(model.rows, model.model, strict=True):
        if getattr(module, "needs_weights", False):
            get_logger().warning(
                f"{row.place} {row.module}: has no weights, and a plain transformer learns next to nothing from scratch in "
                "a training like this one. Give it pretrained=true, weights=FILE or --backbone-weights FILE, or take a "
                "backbone with convolutions"
            )


def settle_optimizer(hyp: Recipe, length: Length, num_classes: int | None) -> Recipe:
    """Decide what `optimizer: auto` means for a training of this length; the recipe has the rule and its numbers.

    Args:
        hyp: the recipe.
        length: of the training.
        num_classes: of a model that starts from weights; None for one that starts from nothing.
    """
    if hyp["optimizer"] != "auto":
        return hyp
    images = length.batches * length.batch_size
    steps = math.ceil(images / max(length.batch_size, hyp["nbs"])) * length.epochs
    name, lr, momentum = "SGD", hyp["auto_sgd_lr"], hyp["auto_sgd_momentum"]
    bias_lr = hyp["auto_sgd_warmup_bias_lr"]
    if steps <= hyp["auto_steps"]:
        share = 1.0 if num_classes is None else 5 / (4 + num_classes)
        name, lr = "AdamW", round(hyp["auto_adamw_lr"] * share, 6)
        momentum, bias_lr = hyp["auto_momentum"], hyp["auto_warmup_bias_lr"]
    get_logger().info(
        f"optimizer: {name}, lr0 {lr}, momentum {momentum} (auto, {steps} steps; --optimizer to choose)"
    )
    return {**hyp, "optimizer": name, "lr0": lr, "momentum": momentum, "warmup_bias_lr": bias_lr}


def lr_factors(model: DetectionModel, hyp: Recipe) -> dict[str, float]:
    """Learning-rate factor of each parameter that does not have the common one: those of the backbone rows."""
    factor = hyp["backbone_lr"]
    if factor == 1.0:
        return {}
    prefixes = tuple(f"model.{i}." for i, row in enumerate(model.rows) if row.section == "backbone")
    return {name: factor for name, _ in model.named_parameters() if name.startswith(prefixes)}
