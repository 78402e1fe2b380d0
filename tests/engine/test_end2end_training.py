"""`--end2end` from the first training to a resumed one: the key, the weights, the epochs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import train
import val
from deploy.backends import load_backend
from models.heads.one_to_one import OneToOne
from models.losses.one_to_one import OneToOneLoss
from models.weights.load import build_to_train, load_weights
from models.yolo import build_model
from utils.checkpoint import load_checkpoint
from utils.errors import ConfigError

MODEL = """
nc: 2
backbone: [[-1, 1, Conv, [8, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]], [-1, 1, Conv, [16, 3, 2]]]
head: [[[2, 3], 1, Detect, [nc]]]
"""


class StoppedError(Exception):
    """Stands for a kill."""


def test_a_run_that_is_resumed_weighs_the_branches_by_its_epoch(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "plain.yaml").write_text(MODEL)
    words = ["--data", shared_data, "--imgsz", 64, "--batch-size", 4, "--workers", 0, "--noplots"]
    words += ["--project", tmp_path, "--device", "cpu", "--optimizer", "SGD"]
    told: list[tuple[int, int, float]] = []
    begin = OneToOneLoss.begin_epoch

    def watched(self: OneToOneLoss, epoch: int, epochs: int) -> None:
        begin(self, epoch, epochs)
        told.append((epoch, epochs, round(self.share, 6)))

    def run(*more: object) -> None:
        train.main([str(word) for word in more])

    run("--cfg", tmp_path / "plain.yaml", *words, "--epochs", 1, "--name", "plain")
    plain = tmp_path / "plain" / "weights" / "last.pt"
    monkeypatch.setattr(OneToOneLoss, "begin_epoch", watched)
    real, calls = train.validate, []

    def stopping(*args: train.Run) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise StoppedError
        return real(*args)

    monkeypatch.setattr(train, "validate", stopping)
    with pytest.raises(StoppedError):
        run("--weights", plain, "--end2end", *words, "--epochs", 3, "--name", "both")
    # Made once for the training and once for the validation; then both are told of each epoch.
    assert told == [(0, 1, 0.8)] * 2 + [(0, 3, 0.8)] * 2 + [(1, 3, 0.45)] * 2
    last = tmp_path / "both" / "weights" / "last.pt"
    told.clear()
    run("--resume", last, "--device", "cpu")
    assert told == [(0, 1, 0.8)] * 2 + [(1, 3, 0.45)] * 2 + [(2, 3, 0.1)] * 2
    assert load_checkpoint(last)["config"]["end2end"] is True
    head = load_weights(last).model.head
    assert isinstance(head, OneToOne) and not torch.equal(
        head.cv3[0][2].bias, head.one2one_cv3[0][2].bias
    )
    assert load_backend(last).postprocess_kind == "best"
    data = ["--data", shared_data, "--workers", 0, "--noplots", "--project", tmp_path]
    val.main(list(map(str, ["--weights", last, *data, "--one-to-many"])))
    with pytest.raises(ConfigError, match="plain.*got a head without a one-to-many branch"):
        val.main(list(map(str, ["--weights", plain, *data, "--one-to-many"])))


def test_weights_without_the_branch_give_both_the_same_start(
    tmp_path: Path, capfd: pytest.CaptureFixture
):
    (tmp_path / "plain.yaml").write_text(MODEL)
    torch.manual_seed(3)
    model = build_model(tmp_path / "plain.yaml", names=("square", "disc"), imgsz=(64, 64))
    saved = {"config": model.config, "names": model.names, "model": model.state_dict()}
    torch.save(saved, tmp_path / "plain.pt")
    torch.manual_seed(4)
    weights = str(tmp_path / "plain.pt")
    head = build_to_train(("square", "disc"), weights=weights, imgsz=(64, 64), end2end=True).head
    assert isinstance(head, OneToOne)
    told = capfd.readouterr().err
    assert "plain.pt: has no one-to-one branch, which starts as a copy of the other" in told
    count = len(model.state_dict()) + sum(len(m.state_dict()) for m in (head.cv2, head.cv3))
    assert f"transferred {count} of {count} tensors (100.0% of the numbers)" in told
    assert "missing" not in told
    for ours, copied, given in (
        (head.cv2, head.one2one_cv2, model.head.cv2),
        (head.cv3, head.one2one_cv3, model.head.cv3),
    ):
        for a, b, c in zip(ours.parameters(), copied.parameters(), given.parameters(), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
