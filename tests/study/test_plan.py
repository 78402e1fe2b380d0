"""What a study compares: the grid, names, and a folder that only takes what can be compared."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from engine.options import CompareOptions
from study.children import alone_in
from study.plan import Entry, entries_of, load_study, open_study
from utils.errors import ConfigError


def options(folder: Path, **changed: object) -> CompareOptions:
    own = {"models": ["yolo11n"], "data": "my.yaml", "epochs": 3, "project": str(folder)}
    return CompareOptions(**{**own, **changed})


@pytest.mark.parametrize(
    ("models", "backbone", "expected"),
    [
        (["a", "b"], None, [("a", ()), ("b", ())]),
        (["a"], ["none", "x", "y"], [("a", ()), ("a", ("x",)), ("a", ("y",))]),
        (["a"], ["x", "k=1", "m=2", "y"], [("a", ("x", "k=1", "m=2")), ("a", ("y",))]),
        (["a", "b"], ["none", "x"], [("a", ()), ("a", ("x",)), ("b", ()), ("b", ("x",))]),
        (["a", "w.pt"], ["x"], [("a", ("x",)), ("w.pt", ())]),  # weights stand beside the grid
        (["a", "a"], None, [("a", ())]),
    ],
)
def test_every_config_stands_over_every_backbone(
    models: list[str], backbone: list[str] | None, expected: list[tuple[str, tuple[str, ...]]]
):
    assert [(entry.model, entry.backbone) for entry in entries_of(models, backbone)] == expected


def test_a_backbone_under_weights_alone_is_refused():
    with pytest.raises(ConfigError, match="--backbone: belongs to configs; w.pt"):
        entries_of(["w.pt"], ["x"])


def test_names_and_folders(tmp_path: Path):
    weights = tmp_path / "exp7" / "weights" / "best.pt"
    weights.parent.mkdir(parents=True)
    weights.touch()
    assert Entry(str(weights)).name == "exp7/best.pt" == Entry(str(tmp_path / "exp7")).name
    entry = Entry("configs/my.yaml", ("resnet18", "pretrained=true"))
    assert entry.name == "my + resnet18 pretrained=true"
    assert entry.folder_name == "my+resnet18_pretrained=true"
    assert Entry("a", ("../b/c",)).folder_name == "a+.._b_c"


def test_two_entries_of_one_name_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="two entries are called my, expected one"):
        open_study(options(tmp_path, models=["a/my.yaml", "b/my.yaml"]), set())


def test_a_study_is_read_back_as_it_was_saved(tmp_path: Path):
    study = open_study(options(tmp_path, backbone=["none", "x", "k=1"]), set())
    assert load_study(study.folder) == study
    resumed = open_study(CompareOptions(resume=True, project=str(tmp_path), budget=5.0), {"resume", "budget"})  # fmt: skip
    assert resumed == replace(study, options=replace(study.options, budget=5.0))


def test_a_study_grows_by_entries_of_the_same_kind_only(tmp_path: Path):
    first = open_study(options(tmp_path), set())
    grown = open_study(options(tmp_path, models=["yolov5n"], exist_ok=True), set())
    assert grown.folder == first.folder
    assert [entry.name for entry in grown.entries] == ["yolo11n", "yolov5n"]
    with pytest.raises(ConfigError, match=r"have another --epochs, expected the same"):
        open_study(options(tmp_path, epochs=9, exist_ok=True), set())
    assert open_study(options(tmp_path, epochs=9), set()).folder != first.folder


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "has no plan.json"), ("{", "is damaged"), ('{"options": {}}', "is damaged")],
)
def test_a_folder_without_a_plan_is_one_line(tmp_path: Path, content: str | None, told: str):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(ConfigError, match=told):
        open_study(CompareOptions(resume=str(tmp_path)), {"resume"})


def test_a_folder_from_elsewhere_gives_no_leave_to_run_code(tmp_path: Path):
    study = open_study(options(tmp_path, allow_code=True, download=True), set())
    resumed = open_study(CompareOptions(resume=str(study.folder)), {"resume"})
    for found in (resumed, load_study(study.folder)):  # children read the file
        assert not found.options.allow_code and not found.options.download


def test_a_resumed_study_keeps_its_own_flags(tmp_path: Path):
    study = open_study(options(tmp_path), set())
    with pytest.raises(ConfigError, match="the study says by itself what --epochs is"):
        open_study(CompareOptions(resume=str(study.folder), epochs=9), {"resume", "epochs"})


def test_a_child_that_outlives_its_study_keeps_the_folder(tmp_path: Path):
    fcntl = pytest.importorskip("fcntl")
    words = [sys.executable, "-c", "import sys; sys.stdin.read()"]
    with alone_in(tmp_path) as lock:
        child = subprocess.Popen(words, stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
    with (tmp_path / "study.lock").open("ab") as again:
        with pytest.raises(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.communicate()
        fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
