"""The search of a recipe: its space, its table, and that it finds a better recipe and goes on."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from engine.evolve import evolve, idle_gains, read_rows, search_space
from engine.options import TrainOptions
from utils.config import load_yaml, save_yaml
from utils.errors import ConfigError, UserError
from utils.metrics import Metrics

pytest.importorskip("optuna")
RECIPE = {
    "optimizer": "SGD",
    "lr0": 0.01,
    "weight_decay": 0.0,
    "box": 0.05,
    "degrees": 60.0,
    "nbs": 64,
}


def metrics(fitness: float) -> Metrics:
    values = dict.fromkeys(Metrics._fields, 0) | {"map50": fitness, "map50_95": fitness}
    return Metrics(**values)


def flags(folder: Path, count: int, resume: str | None = None) -> TrainOptions:
    return TrainOptions(evolve=count, resume_evolve=resume, project=str(folder), name="search")


def train_on(ideal: float):
    """A training whose fitness is the nearer to 1 the nearer lr0 is to `ideal`."""

    def train(options: TrainOptions) -> Metrics:
        recipe = load_yaml(options.hyp) if options.hyp else RECIPE
        folder = Path(options.project) / options.name
        folder.mkdir(parents=True)
        save_yaml(folder / "hyp.yaml", recipe)
        save_yaml(folder / "model.yaml", {"head": [[-1, 1, "Detect", ["nc"]]]})
        (folder / "results.csv").write_text("epoch,train/box_loss,train/cls_loss,train/dfl_loss\n")
        return metrics(1 / (1 + 100 * abs(recipe["lr0"] - ideal)))

    return train


def test_the_space_holds_the_recipe() -> None:
    space = search_space(RECIPE)
    assert set(space) == {"lr0", "box", "degrees"}  # no logarithm of a weight decay of 0
    assert (space["box"].low, space["box"].high, space["box"].log) == (0.0125, 0.2, True)
    assert space["degrees"].high == 60.0
    assert not space["degrees"].log


@pytest.mark.parametrize(
    ("head", "terms", "idle"),
    [
        ("Detect", "box cls dfl", {"l1", "aux_weight"}),
        ("DDetect", "box cls l1", {"dfl", "aux_weight"}),
        ("DualDDetect", "box cls dfl", {"l1"}),
    ],
)
def test_gains_of_terms_that_the_model_has_not_are_left_out(
    head: str, terms: str, idle: set[str], tmp_path: Path
) -> None:
    save_yaml(tmp_path / "model.yaml", {"head": [[-1, 1, head, ["nc"]]]})
    columns = ",".join(f"train/{term}_loss" for term in terms.split())
    (tmp_path / "results.csv").write_text(f"epoch,{columns}\n0,1,1,1\n")
    assert idle_gains(tmp_path) == idle
    gains = dict.fromkeys(("box", "dfl", "l1", "aux_weight"), 1.0)
    assert set(search_space(gains, idle)) == gains.keys() - idle


def test_a_search_finds_a_better_recipe_and_goes_on(tmp_path: Path) -> None:
    best = evolve(flags(tmp_path, 12), train_on(0.05))
    folder = tmp_path / "search"
    rows = list(csv.DictReader((folder / "evolve.csv").open()))
    assert [row["trial"] for row in rows] == [str(n) for n in range(12)]
    assert float(rows[0]["lr0"]) == RECIPE["lr0"]
    fitness = [float(row["fitness"]) for row in rows]
    winner = rows[fitness.index(max(fitness))]
    assert max(fitness) > fitness[0]
    assert best == folder / "hyp_evolve.yaml"
    assert load_yaml(best) == {**RECIPE, **{k: float(winner[k]) for k in ("lr0", "box", "degrees")}}
    evolve(flags(tmp_path, 14, str(folder)), train_on(0.05))
    again = read_rows(folder / "evolve.csv")
    assert len(again) == 14
    assert again[:12] == rows


def test_a_training_that_breaks_down_counts_as_zero(tmp_path: Path) -> None:
    good = train_on(0.01)

    def train(options: TrainOptions) -> Metrics:
        if options.name == "trial1":
            raise UserError("the loss is not finite")
        return good(options)

    evolve(flags(tmp_path, 3), train)
    assert [float(r["fitness"]) for r in read_rows(tmp_path / "search" / "evolve.csv")][1] == 0.0


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder with evolve.csv"):
        evolve(flags(tmp_path, 3, str(tmp_path)), train_on(0.01))
    (tmp_path / "evolve.csv").write_text("trial,fitness\n0,much\n")
    with pytest.raises(ConfigError, match="gone, expected a folder with evolve.csv"):
        evolve(flags(tmp_path, 3, str(tmp_path / "gone")), train_on(0.01))
    with pytest.raises(ConfigError, match=r"evolve.csv:2: got no fitness"):
        evolve(flags(tmp_path, 3, str(tmp_path)), train_on(0.01))
