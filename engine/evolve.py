"""`--evolve N`: search the recipe by N trainings, with optuna's tree-structured Parzen estimator.

The first training uses the recipe as it stands. Every row of `evolve.csv` is one training;
`hyp_evolve.yaml` is the best recipe so far, ready for `--hyp`. A search that was cut off goes on
with `--resume_evolve FOLDER`.

Source: Bergstra et al., Algorithms for Hyper-Parameter Optimization, NeurIPS 2011.
"""

from __future__ import annotations

import csv
from argparse import Namespace
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from utils.config import increment_path, load_yaml, save_yaml
from utils.errors import ConfigError, UserError
from utils.logger import get_logger
from utils.metrics import Metrics

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
RESULTS = ("trial", "fitness", "mAP50", "mAP50-95")

Trainer = Callable[[Namespace], "Metrics | None"]


def search_space(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What is searched of a recipe, and where: optuna distributions by key.

    A recipe's own value lies always inside; numbers that a logarithmic range cannot hold are left
    alone.
    """
    from optuna.distributions import FloatDistribution

    space = {}
    for key, value in recipe.items():
        if key in GAINS and value > 0:
            space[key] = FloatDistribution(value / GAIN_FACTOR, value * GAIN_FACTOR, log=True)
        elif key in RANGES and (value > 0 or key not in LOGARITHMIC):
            low, high = RANGES[key]
            low, high = min(low, float(value)), max(high, float(value))
            space[key] = FloatDistribution(low, high, log=key in LOGARITHMIC)
    return space


def evolve(options: Namespace, train: Trainer) -> Path:
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
    log = get_logger()
    folder = _folder(options)
    rows = read_rows(folder / "evolve.csv")
    if not rows:
        rows.append(_trial(options, folder, 0, None, train))
    recipe = load_yaml(folder / "trial0" / "hyp.yaml")
    space = search_space(recipe)
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.TPESampler(seed=options.seed + len(rows))
    )
    for row in rows:
        params = {key: float(row[key]) for key in space}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=space, value=float(row["fitness"])
            )
        )
    while True:
        best = max(rows, key=lambda row: float(row["fitness"]))
        log.info(f"evolve: {len(rows)}/{options.evolve}, best {_told(best)}")
        save_yaml(folder / "hyp_evolve.yaml", {**recipe, **{k: float(best[k]) for k in space}})
        if len(rows) >= options.evolve:
            return folder / "hyp_evolve.yaml"
        trial = study.ask(space)
        hyp = {**recipe, **trial.params}
        rows.append(_trial(options, folder, len(rows), hyp, train))
        study.tell(trial, float(rows[-1]["fitness"]))


def _folder(options: Namespace) -> Path:
    if not options.resume_evolve:
        project = "runs/evolve" if options.project == "runs/train" else options.project
        folder = increment_path(project, options.name, options.exist_ok)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    given = Path(options.resume_evolve)
    folder = given.parent if given.name == "evolve.csv" else given
    if not (folder / "evolve.csv").is_file():
        raise ConfigError(
            f"--resume_evolve: got {given}, expected a folder with evolve.csv, or that file."
        )
    return folder


def _trial(
    options: Namespace, folder: Path, number: int, hyp: dict[str, Any] | None, train: Trainer
) -> dict[str, Any]:
    """Train once with a recipe, and write its row; a training that breaks down counts as 0."""
    flags = Namespace(**vars(options))
    flags.project, flags.name, flags.exist_ok = str(folder), f"trial{number}", True
    flags.noplots, flags.nosave, flags.noval = True, True, True
    if hyp is not None:
        flags.hyp = str(folder / f"trial{number}.yaml")
        save_yaml(flags.hyp, hyp)
    get_logger().info(f"evolve: trial {number}")
    try:
        metrics = train(flags)
    except UserError as error:
        if hyp is None:  # the recipe itself: nothing to learn from
            raise
        get_logger().warning(f"evolve: trial {number} broke down: {error}")
        metrics = None
    fitness, map50, map50_95 = (
        (metrics.fitness, metrics.map50, metrics.map50_95) if metrics else (0.0, 0.0, 0.0)
    )
    values = hyp or load_yaml(folder / f"trial{number}" / "hyp.yaml")
    row = dict(zip(RESULTS, (number, fitness, map50, map50_95)))
    row |= {key: value for key, value in values.items() if type(value) in (int, float)}
    _append(folder / "evolve.csv", row)
    return row


def _append(path: Path, row: Mapping[str, Any]) -> None:
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def read_rows(path: Path) -> list[dict[str, Any]]:
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
    return rows


def _told(row: Mapping[str, Any]) -> str:
    return f"trial {row['trial']} with mAP50 {float(row['mAP50']):.4f}, mAP50-95 {float(row['mAP50-95']):.4f}"
