"""Several models that answer together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor

import detect
import val
from deploy.backends import load_backend, model_backend
from deploy.ensemble import Ensemble, as_one
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from deploy.runtimes.artifact import ArtifactInfo, Backend
from models.postprocess import postprocess
from utils.checkpoint import save_checkpoint
from utils.errors import ConfigError
from utils.structures import Decoded, Detections

INFO = ArtifactInfo(("cat", "dog"), 32, (64, 96), None, True, "yolo11", "nms", "decoded")


class Says(Backend):
    """A member that says the same of every image."""

    def __init__(self, output: Decoded | list[Detections], info: ArtifactInfo = INFO) -> None:
        super().__init__(info, lambda images: (), torch.device("cpu"))
        self.output = output

    def __call__(self, images: Tensor) -> Decoded | list[Detections]:
        return self.output


def decoded(*rows: tuple[float, float, float]) -> Decoded:
    """Boxes of 10 pixels from (left, 0), with scores of cat and dog."""
    boxes = torch.tensor([[[left, 0.0, left + 10, 10.0] for left, _, _ in rows]])
    return Decoded(boxes, torch.tensor([[[cat, dog] for _, cat, dog in rows]]))


def test_predictions_are_joined_and_one_suppression_chooses_among_them():
    # Both see the cat at 0 (the second better by one pixel: IoU 9/11), only the second sees the dog at 50; a dog where
    # the first sees a cat is another class and stays.
    first = Says(decoded((0, 0.8, 0), (30, 0.7, 0)))
    second = Says(decoded((1, 0.9, 0), (50, 0, 0.6), (30, 0, 0.5)))
    ensemble = Ensemble([first, second], ["a.pt", "b.pt"])
    output = ensemble(torch.zeros(1, 3, 64, 96))
    assert output.boxes.shape == (1, 5, 4)
    (found,) = postprocess(
        output, ensemble.postprocess_kind, conf_thres=0.25, iou_thres=0.45, max_det=10
    )
    assert found.boxes[:, 0].tolist() == [1, 30, 50, 30]
    assert found.labels.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(found.scores, torch.tensor([0.9, 0.7, 0.6, 0.5]))


def test_finished_detections_of_a_member_join_with_their_own_class_alone():
    boxes = torch.tensor([[0.0, 0, 10, 10], [40, 0, 50, 10]])
    finished = [
        Detections(boxes, torch.tensor([0.9, 0.4]), torch.tensor([1, 0])),
        Detections(boxes[:0], torch.zeros(0), torch.zeros(0, dtype=torch.int64)),
    ]
    other = decoded((0, 0.1, 0.7))
    pair = Decoded(other.boxes.repeat(2, 1, 1), other.scores.repeat(2, 1, 1))
    ensemble = Ensemble([Says(finished, replace(INFO, layout="end2end")), Says(pair)], ["a", "b"])
    output = ensemble(torch.zeros(2, 3, 64, 96))
    both, one = postprocess(output, "nms", conf_thres=0.25, iou_thres=0.45, max_det=10)
    assert both.labels.tolist() == [1, 0] and one.labels.tolist() == [1]
    torch.testing.assert_close(both.scores, torch.tensor([0.9, 0.4]))
    torch.testing.assert_close(one.scores, torch.tensor([0.7]))


def test_one_model_stays_what_it_is():
    member = Says(decoded((0, 1, 0)))
    assert as_one([member], ["a.pt"]) is member


@pytest.mark.parametrize(
    ("changes", "size", "stride", "dynamic"),
    [
        ([{}, {"imgsz": (128, 64)}], (128, 96), 32, True),
        ([{}, {"stride": 64}], (64, 128), 64, True),  # 96 is rounded up
        ([{}, {"imgsz": (128, 128), "dynamic": False}], (128, 128), 32, False),
    ],
)
def test_an_ensemble_takes_the_largest_size_or_the_only_one(
    changes: list[dict[str, Any]], size: tuple[int, int], stride: int, dynamic: bool
):
    members = [Says(decoded((0, 1, 0)), replace(INFO, **change)) for change in changes]
    ensemble = Ensemble(members, ["a", "b"])
    assert (ensemble.imgsz, ensemble.stride, ensemble.dynamic) == (size, stride, dynamic)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"names": ("dog", "cat")}, "class 0 of b.onnx - got 'dog', expected 'cat' as in a.onnx"),
        ({"names": ("cat", "dog", "cow")}, "class 2 of b.onnx - got 'cow', expected ''"),
        ({"imgsz": (32, 32)}, r"got fixed sizes 64x96 \(a.onnx\), 32x32 \(b.onnx\), expected one"),
        (
            {"white": 4095.0},
            r"got white the full range \(a.onnx\), 4095.0 \(b.onnx\), expected one",
        ),
        ({"dynamic": True, "stride": 64}, "a.onnx takes 64x96 alone, the others multiples of 64"),
    ],
)
def test_models_that_do_not_go_together_are_refused(change: dict[str, Any], message: str):
    fixed = replace(INFO, dynamic=False)
    members = [Says(decoded((0, 1, 0)), info) for info in (fixed, replace(fixed, **change))]
    with pytest.raises(ConfigError, match=message) as caught:
        as_one(members, ["a.onnx", "b.onnx"])
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Checkpoints of a model with anchors and one with queries, and an ONNX file of a third."""
    folder = tmp_path_factory.mktemp("ensemble")
    paths = []
    for layout in ("anchors", "queries"):
        model = tiny_model(layout)
        content = {"model": model.state_dict(), "config": model.config, "names": list(model.names)}
        save_checkpoint(folder / f"{layout}.pt", {**content, "imgsz": [64, 96]})
        paths.append(str(folder / f"{layout}.pt"))
    onnx = export_onnx(tiny_model("channels"), ExportOptions((64, 96)), folder / "channels.pt")
    return [*paths, str(onnx)]


def test_families_and_forms_answer_together(files: list[str]):
    members = [load_backend(path) for path in files]
    images = torch.rand(2, 3, 64, 96)
    together = as_one(members, files)(images)
    apart = [member(images) for member in members]
    assert torch.equal(together.scores, torch.cat([part.scores for part in apart], 1))
    assert torch.equal(together.boxes, torch.cat([part.boxes for part in apart], 1))
    assert together.scores.shape == (2, 252 + 40 + 126, 3)


def test_detect_and_val_take_several(
    files: list[str], shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    source = str(next((shared_data.parent / "images" / "val").iterdir()))
    words = ["--source", source, "--project", str(tmp_path), "--device", "cpu", "--nosave"]
    detect.main(["--weights", *files, *words])
    told = capsys.readouterr()
    assert "objects in 1 images" in told.out
    assert (
        f"ensemble of {', '.join(files)}: images of 64x96, the size that all can take" in told.err
    )
    words = [
        "--data",
        str(shared_data),
        "--single-cls",
        "--noplots",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    val.main(["--weights", *files[:2], "--ensemble", "--project", str(tmp_path), *words])
    assert capsys.readouterr().out.count("speed:") == 1


def test_a_network_twice_is_the_network():
    model = model_backend(tiny_model("channels"))
    images = torch.rand(1, 3, 64, 96)
    limits: dict[str, Any] = {"conf_thres": 0.3, "iou_thres": 0.5, "max_det": 50}
    (alone,) = postprocess(model(images), "nms", **limits)
    (twice,) = postprocess(Ensemble([model, model], ["a", "a"])(images), "nms", **limits)
    assert len(alone.scores) and torch.equal(alone.scores, twice.scores)
