"""The normalisation of images inside a model: told by weights, kept in checkpoints, folded on deployment."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deploy.backends import load_backend
from deploy.exporters.network import ExportOptions
from deploy.exporters.onnx_file import export_onnx
from models.blocks.input_norm import InputNorm, Subtract
from models.registry import LayerError
from models.reparam import fuse
from models.timm.backbone import TimmBackbone
from models.weights.transfer import transfer
from models.yolo import DetectionModel, build_model, model_from_checkpoint

timm = pytest.importorskip("timm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIZE = (64, 96)


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_it_does_nothing_until_it_is_told():
    norm, x = InputNorm(), torch.rand(2, 3, 4, 5)
    assert not norm.is_active and torch.equal(norm(x), x)
    norm.set(MEAN, STD)
    assert norm.is_active
    torch.testing.assert_close(norm(x), normalised(x), rtol=0, atol=0)


def test_numbers_that_change_nothing_leave_it_idle():
    norm = InputNorm()
    norm.set((0, 0, 0), (1, 1, 1))
    assert not norm.is_active and not norm.state_dict()


def test_another_number_of_channels_takes_the_averages():
    norm = InputNorm(1)
    norm.set((0.2, 0.4, 0.6), (0.1, 0.2, 0.3))
    torch.testing.assert_close(norm(torch.full((1, 1, 1, 1), 0.8)), torch.full((1, 1, 1, 1), 2.0))


def test_weights_without_it_were_trained_without_it():
    net = nn.ModuleDict({"norm": InputNorm(), "conv": nn.Conv2d(3, 4, 3)})
    net["norm"].set(MEAN, STD)
    state = {key: value for key, value in net.state_dict().items() if "norm" not in key}
    net.load_state_dict(state)
    assert not net["norm"].is_active and net["norm"].std.tolist() == [1, 1, 1]


class Stem(nn.Module):
    """A normalised image under one convolution, with zeros around it in one of three ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm = InputNorm()
        self.norm.set(MEAN, STD)
        self.around = nn.ZeroPad2d(1) if way == "pad layer" else nn.Identity()
        self.conv = nn.Conv2d(3, 8, 3, 2, padding=1 if way == "padding" else 0)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.around(self.norm(x)))


@pytest.mark.parametrize(
    ("way", "kind", "left"),
    [
        ("none", nn.Identity, {}),
        (
            "padding",
            Subtract,
            {"norm": "its mean is subtracted before conv, which pads with zeros"},
        ),
        (
            "pad layer",
            Subtract,
            {"norm": "its mean is subtracted before conv, which pads with zeros"},
        ),
    ],
)
def test_it_folds_exactly_at_borders_too(way: str, kind: type, left: dict[str, str]):
    torch.manual_seed(0)
    stem = Stem(way).eval()
    x = torch.rand(2, 3, 20, 24)
    with torch.no_grad():
        expected = stem(x)
        report = fuse(stem)
        found = stem(x)
    assert type(stem.norm) is kind and report.left == left
    assert report.folded == ["norm + conv"]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert fuse(stem).folded == []
    with torch.no_grad():
        torch.testing.assert_close(stem(x), found, rtol=0, atol=0)


def test_two_readers_keep_it_whole():
    class Two(Stem):
        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(x)
            return self.conv(x) + x.mean()

    stem, x = Two("none").eval(), torch.rand(1, 3, 9, 9)
    with torch.no_grad():
        expected = stem(x)
        report = fuse(stem)
        assert torch.equal(stem(x), expected)
    assert report.left == {"norm": "its output has 2 readers"}


def pretrained(tmp_path: Path, **options: object) -> TimmBackbone:
    torch.manual_seed(0)
    path = tmp_path / "net.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    return TimmBackbone("test_resnet", SIZE, weights=str(path), **options).eval()


def test_weights_of_timm_bring_timms_numbers(tmp_path: Path):
    config = timm.get_pretrained_cfg("test_resnet")
    model = pretrained(tmp_path)
    assert model.normalize.mean.tolist() == pytest.approx(config.mean)
    assert model.normalize.std.tolist() == pytest.approx(config.std)
    assert not TimmBackbone("test_resnet", SIZE).normalize.is_active
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        inner = model.net(model.normalize(x))
        maps = model(x)
    assert torch.equal(maps[-1], inner[-1])


@pytest.mark.parametrize(
    ("normalize", "mean", "std"),
    [(False, [0, 0, 0], [1, 1, 1]), ([[0.5] * 3, [0.25] * 3], [0.5] * 3, [0.25] * 3)],
)
def test_a_row_may_say_otherwise(normalize: object, mean: list, std: list, tmp_path: Path):
    model = pretrained(tmp_path, normalize=normalize)
    assert (model.normalize.mean.tolist(), model.normalize.std.tolist()) == (mean, std)


def test_it_can_be_asked_for_without_weights():
    assert TimmBackbone("test_resnet", SIZE, normalize=True).normalize.is_active
    with pytest.raises(LayerError, match="got normalize 'yes', expected true, false or a mean"):
        TimmBackbone("test_resnet", SIZE, normalize="yes")


def detector(**options: object) -> DetectionModel:
    """A detector on a timm trunk whose scores depend on the image."""
    config = {
        "nc": 2,
        "backbone": [[-1, 1, "test_resnet", options]],
        "head": [[["P3", "P4", "P5"], 1, "Detect", ["nc"]]],
    }
    model = build_model(config, names=("a", "b"), imgsz=SIZE)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(2)
        for tower in model.head.cv3:
            tower[-1].weight.mul_(10)
    return model.eval()


def test_a_detector_keeps_it_and_its_files_take_images_from_0_to_1(tmp_path: Path):
    path = tmp_path / "net.pth"
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    model = detector(weights=str(path))
    path.unlink()  # what the model says of itself does not ask for it again
    checkpoint = {
        "config": model.config,
        "names": model.names,
        "imgsz": SIZE,
        "model": model.state_dict(),
    }
    again = model_from_checkpoint(copy.deepcopy(checkpoint)).eval()
    bare = detector()
    transfer(bare, model.state_dict())
    fused = copy.deepcopy(model)
    report = fuse(fused)
    assert "model.0.normalize" in report.left and isinstance(fused.model[0].normalize, Subtract)
    onnx = load_backend(export_onnx(fused, ExportOptions(SIZE), tmp_path / "net.pt"))
    x = torch.rand(1, 3, *SIZE)
    with torch.no_grad():
        expected = model.decode(model(x))
        for found in (*(m.decode(m(x)) for m in (again, bare, fused)), onnx(x)):
            torch.testing.assert_close(found.scores, expected.scores, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(found.boxes, expected.boxes, rtol=1e-4, atol=1e-3)
        model.model[0].normalize = InputNorm()
        assert (model.decode(model(x)).scores - expected.scores).abs().max() > 1e-4


def test_an_identity_leaves_no_trace_in_the_deployed_form():
    model = detector()
    report = fuse(model)
    assert type(model.model[0].normalize) is nn.Identity and not report.left
