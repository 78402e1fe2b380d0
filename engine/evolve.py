"""`--evolve N`: search the recipe by N trainings, with optuna's tree-structured Parzen estimator.

The first training uses the recipe as it stands. Every row of `evolve.csv` is one training; `hyp_evolve.yaml` is the best
recipe so far, ready for `--hyp`. A search that was cut off goes on with `--resume_evolve FOLDER`.

Source: Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.options import TrainOptions
from models.family import Recipe
from utils.config import load_yaml, save_yaml
from utils.errors import ConfigError, UserError
from utils.logger import get_logger
from utils.metrics import Metrics

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

RANGES = {
    "lr0": (1e-5, 1e-1), "lrf": (0.01, 1.0), "momentum": (0.6, 0.98), "weight_decay": (1e-6, 1e-2),
    "warmup_epochs": (0.0, 5.0), "warmup_momentum": (0.0, 0.95), "warmup_bias_lr": (0.0, 0.2),
    "anchor_t": (2.0, 8.0), "hsv_h": (0.0, 0.1), "hsv_s": (0.0, 0.9), "hsv_v": (0.0, 0.9),
    "degrees": (0.0, 45.0), "translate": (0.0, 0.9), "scale": (0.0, 0.9), "shear": (0.0, 10.0),
    "perspective": (0.0, 0.001), "flipud": (0.0, 1.0), "fliplr": (0.0, 1.0), "mosaic": (0.0, 1.0),
    "mixup": (0.0, 1.0),
}  # fmt: skip
LOGARITHMIC = ("lr0", "lrf", "weight_decay")
GAINS = ("box", "cls", "obj", "dfl", "l1", "giou", "aux_weight")
GAIN_FACTOR = 4.0
"""Gains of a loss are searched from the recipe's value over this factor to the value times it."""

Trainer = Callable[[TrainOptions], "Metrics | None"]
Row = Mapping[str, Any]


def search_space(recipe: Recipe, idle: Set[str] = frozenset()) -> dict[str, BaseDistribution]:
    """What is searched of a recipe, and where: optuna distributions by key.

    A recipe's own value lies always inside; numbers that a logarithmic range cannot hold are left
    alone, as are gains that are `idle`.
    """
    from optuna.distributions import FloatDistribution

    space: dict[str, BaseDistribution] = {}
    for key, value in recipe.items():
        if key in GAINS and value > 0 and key not in idle:
            space[key] = FloatDistribution(value / GAIN_FACTOR, value * GAIN_FACTOR, log=True)
        elif key in RANGES and (value > 0 or key not in LOGARITHMIC):
            low, high = RANGES[key]
            low, high = min(low, float(value)), max(high, float(value))
            space[key] = FloatDistribution(low, high, log=key in LOGARITHMIC)
    return space


def idle_gains(trial: Path) -> frozenset[str]:
    """Gains of a recipe that did nothing in a training: of terms that it did not have."""
    config, table = load_yaml(trial / "model.yaml"), trial / "results.csv"
    terms = table.read_text(encoding="utf-8").partition("\n")[0]
    idle = {gain for gain in ("dfl", "l1") if f"train/{gain}_loss" not in terms}
    is_dual = config["head"][-1][2] == "DualDDetect"
    return frozenset(idle if is_dual else idle | {"aux_weight"})


def evolve(options: TrainOptions, train: Trainer) -> Path:
    """Train `options.evolve` times in all, each time with a recipe drawn from what was learnt.

    Args:
        options: flags of train.py.
        train: runs one training and gives its metrics.

    Returns:
        The file of the best recipe.

    Raises:
        ConfigError: optuna is not installed, or `--resume_evolve` names no search.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError("--evolve needs optuna. pip install optuna, or leave it out.") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder = _folder(options)
    table, result = folder / "evolve.csv", folder / "hyp_evolve.yaml"
    rows: list[Row] = read_rows(table)
    if not rows:
        rows.append(_trial(options, folder, 0, None, train))
    recipe = load_yaml(folder / "trial0" / "hyp.yaml")
    space = search_space(recipe, idle_gains(folder / "trial0"))
    sampler = optuna.samplers.TPESampler(seed=options.seed + len(rows))
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for row in rows:
        params, value = {key: float(row[key]) for key in space}, float(row["fitness"])
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value))
    while True:
        best = max(rows, key=lambda row: float(row["fitness"]))
        get_logger().info(
            f"evolve: {len(rows)}/{options.evolve}, best trial {best['trial']} with mAP50 {float(best['mAP50']):.4f}, "
            f"mAP50-95 {float(best['mAP50-95']):.4f}"
        )
        save_yaml(result, {**recipe, **{key: float(best[key]) for key in space}})
        if len(rows) >= options.evolve:
            return result
        trial = study.ask(space)
        rows.append(_trial(options, folder, len(rows), {**recipe, **trial.params}, train))
        study.tell(trial, float(rows[-1]["fitness"]))


def _folder(options: TrainOptions) -> Path:
    if not options.resume_evolve:
        is_default = options.project == "runs/train"
        return (replace(options, project="runs/evolve") if is_default else options).make_folder()
    given = Path(options.resume_evolve)
    folder = given.parent if given.name == "evolve.csv" else given
    if not (folder / "evolve.csv").is_file():
        raise ConfigError(
            f"--resume_evolve: got {given}, expected a folder with evolve.csv, or that file."
        )
    return folder


def _trial(
    options: TrainOptions, folder: Path, number: int, hyp: Recipe | None, train: Trainer
) -> Row:
    """Train once with a recipe, and write its row; a training that breaks down counts as 0."""
    name, log = f"trial{number}", get_logger()
    options = replace(
        options,
        project=str(folder),
        name=name,
        exist_ok=True,
        noplots=True,
        nosave=True,
        noval=True,
    )
    if hyp is not None:
        options = replace(options, hyp=str(folder / f"{name}.yaml"))
        save_yaml(folder / f"{name}.yaml", hyp)
    log.info(f"evolve: trial {number}")
    try:
        metrics = train(options)
    except UserError as error:
        if hyp is None:  # the recipe itself: nothing to learn from
            raise
        log.warning(f"evolve: trial {number} broke down: {error}")
        metrics = None
    row: dict[str, Any] = {"trial": number, "fitness": 0.0, "mAP50": 0.0, "mAP50-95": 0.0}
    if metrics:
        row |= {"fitness": metrics.fitness, "mAP50": metrics.map50, "mAP50-95": metrics.map50_95}
    values = hyp or load_yaml(folder / name / "hyp.yaml")
    row |= {key: value for key, value in values.items() if type(value) in (int, float)}
    with (folder / "evolve.csv").open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)
    return row


def read_rows(path: Path) -> list[Row]:
    """Rows of an `evolve.csv`; none if there is no such file.

    Raises:
        ConfigError: a row lacks cells, or its fitness is no number.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for number, row in enumerate(rows, 2):
        try:
            float(row["fitness"])
        except (KeyError, TypeError, ValueError):
            raise ConfigError(
                f"{path}:{number}: got no fitness, expected a row that train.py --evolve wrote. "
                "Remove the row."
            ) from None
    return list(rows)
