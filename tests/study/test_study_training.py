"""The trainings of a study: what train.py is told, what a child's end means, who goes on in a budget."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.options import CompareOptions, read_training
from study import training
from study.children import alone_in, require_success, run_child
from study.plan import Entry, Study, Training
from study.training import DONE, FAILED, check_words, read_epochs, train_all, words_of
from utils.errors import ConfigError
from utils.progress import Parts

HEAD = "epoch,time,metrics/mAP_0.5:0.95"


def study_of(folder: Path, names: str, **flags: object) -> Study:
    options = CompareOptions(**{"models": list(names), "data": "d.yaml", "epochs": 8, **flags})
    return Study(folder, options, tuple(Entry(name) for name in names), ())


def test_train_py_understands_what_it_is_told(tmp_path: Path):
    flags = {"imgsz": [96, 64], "device": "cpu", "train": ["--amp", "off", "--batch-size", "4"]}
    study = study_of(tmp_path, "a", **flags)
    entry = Entry("a", ("resnet18", "pretrained=true"))
    words = words_of(study, Training(entry, 3, tmp_path / "a" / "seed3"))
    options, _ = read_training([*words, *study.options.train])
    assert (options.cfg, options.backbone) == ("a", ["resnet18", "pretrained=true"])
    assert (options.imgsz, options.epochs, options.seed) == ([96, 64], 8, 3)
    assert (options.amp, options.batch_size, options.exist_ok) == ("off", 4, True)
    assert options.make_folder() == tmp_path / "a" / "seed3"


def test_flags_behind_train_are_train_py_s_own(tmp_path: Path):
    check_words(study_of(tmp_path, "a", train=["--amp", "off"]))
    with pytest.raises(
        ConfigError, match="--train: got --epochs, --allow-code, which compare.py has itself"
    ):
        check_words(study_of(tmp_path, "a", train=["--epochs", "9", "--allow-code"]))
    with pytest.raises(SystemExit):
        check_words(study_of(tmp_path, "a", train=["--ampp", "off"]))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("print('error: x.yaml: got 1, expected 2. Fix it.'); exit(2)", r"^x.yaml: got 1, expected 2"),
        ("import os; os.kill(os.getpid(), 9)", "ended by SIGKILL, most often because the machine ran out of memory"),
        ("raise ValueError('odd')", "ValueError: odd"),
        ("exit(3)", "it printed nothing"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_what_the_child_said(tmp_path: Path, code: str, told: str):
    log = tmp_path / "log"
    with alone_in(tmp_path) as lock:
        ending = run_child(["-c", code], log, lock, lambda: False)
    with pytest.raises(ConfigError, match=told):
        require_success(ending, log)


def test_a_child_that_has_done_enough_is_told_to_stop(tmp_path: Path):
    code = "import time; print('up', flush=True); time.sleep(60)"
    with alone_in(tmp_path) as lock:
        log = tmp_path / "log"
        ending = run_child(["-c", code], log, lock, lambda: log.read_text() == "up\n")
    assert ending.was_stopped and ending.code == -15


class FakeTrainings:
    """In place of `train`: an epoch takes a second of its own clock, `a` is the worst, `x` breaks down."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[str, int]] = []

    def train(
        self, study: Study, place: Training, epochs: int, lock: object, deadline: float,
        tell: Callable[[int], None],
    ) -> None:  # fmt: skip
        name = place.entry.model
        self.calls.append((name, epochs))
        if name == "x":
            raise ConfigError("broke down")
        done = len(read_epochs(place.folder))
        while done < epochs and self.now < deadline:
            done, self.now = done + 1, self.now + 1
        place.folder.mkdir(parents=True, exist_ok=True)
        rows = [f"{n},{n + 1},{ord(name) / 200}" for n in range(done)]
        (place.folder / "results.csv").write_text("\n".join([HEAD, *rows]) + "\n")
        if done == study.options.epochs:
            (place.folder / DONE).write_text("{}")


def run_fake(study: Study, monkeypatch: pytest.MonkeyPatch) -> FakeTrainings:
    fake = FakeTrainings()
    monkeypatch.setattr(training, "train", fake.train)
    monkeypatch.setattr(training.time, "monotonic", lambda: fake.now)
    train_all(study, io.BytesIO(), Parts(4, "study", io.StringIO()), lambda entry: None)
    return fake


def test_in_a_budget_the_better_half_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = run_fake(study_of(tmp_path, "xabcd", budget=20 / 60), monkeypatch)
    # four in five would take 32 epochs; 2 each, then those for whom the rest has room, d and c
    assert fake.calls[:5] == [(name, 2) for name in "xabcd"]
    assert fake.calls[5:] == [("d", 4), ("c", 4), ("d", 8), ("c", 8)]
    assert json.loads((tmp_path / "entries" / "x" / FAILED).read_text()) == {"reason": "broke down"}
    assert fake.now == 2 * 4 + 6 + 6


def test_a_budget_that_has_room_for_all_leaves_none_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fake = run_fake(study_of(tmp_path, "abcd", budget=1.0), monkeypatch)
    assert [call for call in fake.calls if call[1] == 8] == [(name, 8) for name in "dcba"]


def test_a_budget_that_is_spent_ends_the_trainings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fake = run_fake(study_of(tmp_path, "abcd", budget=3 / 60), monkeypatch)
    assert fake.calls == [("a", 2), ("b", 2)]
    assert fake.now == 3


def test_without_a_budget_all_are_trained_to_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    assert run_fake(study_of(tmp_path, "ab"), monkeypatch).calls == [("a", 8), ("b", 8)]
