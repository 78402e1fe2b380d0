"""EMO: published layout and numbers, both forms, strided windows, gradients, export."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from published import FOLDER, fill, golden, layout, needs_golden, read_json
from torch import Tensor, nn
from torch_versions import onnx_by_tracing

from models.modules import emo
from models.registry import LayerError, find
from utils.errors import CheckpointError

BUILD = {"1M": emo.EMO_1M, "2M": emo.EMO_2M, "5M": emo.EMO_5M, "6M": emo.EMO_6M}


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def small(
    form: emo.Form = "paper",
    drop_path: float = 0.0,
    depths: tuple[int, int, int, int] = (1, 1, 2, 2),
) -> emo.EMO:
    """A narrow EMO with weights large enough that every layer matters."""
    torch.manual_seed(0)
    size = emo.Size(depths, (8, 8, 16, 16), (2, 2, 2, 2), (8, 8, 8, 8), 0.1, stem=8)
    model = emo.EMO(size, form, drop_path)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.kaiming_uniform_(parameter)
    return model


@pytest.mark.parametrize(
    ("size", "paper", "second"),
    [
        ("1M", 1_192_168, 4_450_208 - 169_000),
        ("2M", 2_176_472, 7_930_728),
        ("5M", 4_819_848, 21_029_976),
        ("6M", 5_847_496, 28_832_408),
    ],
)
def test_both_forms_of_every_size_have_the_published_counts(
    size: str, paper: int, second: int
) -> None:
    with torch.device("meta"):
        assert parameters(BUILD[size](False)) == paper
        assert parameters(BUILD[size]()) == second
        assert parameters(BUILD[size](form="paper")) == paper
        assert parameters(BUILD[size](False, form="se")) == second


def test_channels_and_strides_agree_with_the_maps_that_come_out() -> None:
    model = emo.EMO_1M(False)
    assert (model.channels, model.strides) == ([24, 32, 48, 80, 168], [2, 4, 8, 16, 32])
    with torch.no_grad():
        features = model(torch.rand(1, 3, 64, 96))
    shapes = [(1, c, 64 // s, 96 // s) for c, s in zip(model.channels, model.strides, strict=True)]
    assert [tuple(feature.shape) for feature in features] == shapes


@needs_golden
@pytest.mark.parametrize("size", ["1M", "5M"])
def test_keys_and_outputs_equal_the_published_network(size: str) -> None:
    keys = read_json(f"EMO_{size}.keys.json")
    model = BUILD[size](False).eval()
    own = {key: shape for key, shape in keys.items() if not key.startswith("head.")}
    assert layout(model) == own
    fill(model)
    with torch.no_grad():
        features = model.stages(golden().image(224, 288))
    for stage in range(1, 5):
        path = str(FOLDER / f"EMO_{size}.npz")
        assert golden().difference(features[stage], path, f"stage{stage}") < 1e-4


def test_windows_take_every_second_row_and_column_of_a_14_by_14_map() -> None:
    rows = torch.arange(14.0)[:, None].expand(14, 14)
    columns = torch.arange(14.0)[None, :].expand(14, 14)
    windows = emo.strided_windows(torch.stack((rows, columns))[None], heads=1)
    assert windows.shape == (4, 1, 49, 2)
    even, odd = [0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11, 13]
    for index, (own_rows, own_columns) in enumerate(
        [(even, even), (even, odd), (odd, even), (odd, odd)]
    ):
        window = windows[index, 0].view(7, 7, 2)
        assert window[:, 0, 0].tolist() == own_rows
        assert window[0, :, 1].tolist() == own_columns


def test_merging_undoes_the_cut_for_several_images_heads_and_a_map_that_is_not_square() -> None:
    x = torch.rand(2, 12, 14, 21)
    assert torch.equal(emo.merge_windows(emo.strided_windows(x, heads=3), 2, 3), x)


def test_attention_equals_a_loop_over_strided_windows() -> None:
    torch.manual_seed(0)
    block = emo.Block(8, 8, 16, head_width=4).eval()
    nn.init.normal_(block.qk.conv.weight)
    x = torch.rand(2, 8, 9, 7)
    padded = torch.zeros(2, 8, 14, 7)
    padded[:, :, :9] = x
    expected = torch.zeros_like(padded)
    with torch.no_grad():
        query, key = block.qk(padded).chunk(2, 1)
        for image in range(2):
            for row in range(2):
                for head in range(2):
                    part = (image, slice(4 * head, 4 * head + 4), slice(row, None, 2))
                    q, k, v = (t[part].reshape(4, 49).T for t in (query, key, padded))
                    weights = (q @ k.T / 4**0.5).softmax(1)
                    expected[part] = (weights @ v).T.reshape(4, 7, 7)
        assert torch.allclose(block.attend(x), expected[:, :, :9], atol=1e-6)


def test_second_form_equals_four_separate_branches() -> None:
    torch.manual_seed(0)
    excite = emo.BranchedExcite(8)
    x = torch.rand(2, 8, 5, 3)
    squeezed = x.mean((2, 3))
    branches = [torch.relu(squeezed @ rows.T) for rows in excite.branches.weight.split(2)]
    weights = torch.sigmoid(torch.cat(branches, 1) @ excite.merge.weight.T)
    assert torch.allclose(excite(x), x * weights[:, :, None, None], atol=1e-6)


@pytest.mark.parametrize("form", ["paper", "se"])
def test_a_training_step_gives_every_parameter_a_gradient(form: emo.Form) -> None:
    model = small(form, drop_path=0.1).train()
    features = model(torch.rand(4, 3, 64, 96))
    torch.stack([feature.square().mean() for feature in features]).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_two_images_give_what_each_gives_alone() -> None:
    model, images = small().eval(), torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        together = model(images)
        alone = [model(image[None]) for image in images]
    for index, feature in enumerate(together):
        assert torch.allclose(feature, torch.cat([maps[index] for maps in alone]), atol=1e-5)


def test_channels_last_gives_the_same_maps() -> None:
    model, images = small().eval(), torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected = model(images)
        got = model.to(memory_format=torch.channels_last)(
            images.contiguous(memory_format=torch.channels_last)
        )
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, expected, strict=True))


def test_bfloat16_autocast_stays_near_float32() -> None:
    model, images = small().eval(), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(images)[-1]
        with torch.autocast("cpu", torch.bfloat16):
            got = model(images)[-1]
    assert (got.float() - expected).abs().max() < 0.1 * expected.abs().max()


def test_drop_path_grows_from_zero_to_the_published_rate() -> None:
    with torch.device("meta"):
        model = emo.EMO_1M(False)
    rates = [m.drop_path.rate for m in model.modules() if isinstance(m, emo.Block)]
    assert len(rates) == 16
    assert rates[1] == 0.0 and rates[-1] == pytest.approx(0.04036)
    steps = [b - a for a, b in itertools.pairwise(rates[1:])]
    assert steps == pytest.approx([0.04036 / 14] * 14)


def test_building_draws_the_same_weights_and_runs_no_forward() -> None:
    torch.manual_seed(3)
    first = emo.EMO_1M(False)
    torch.manual_seed(3)
    second = emo.EMO_1M(False)
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
        if key.endswith(("num_batches_tracked", "running_mean")):
            assert not value.any(), key


def worst(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_an_exported_program_runs_at_another_batch_and_size() -> None:
    model = small(depths=(1, 1, 2, 1)).eval()
    batch, height, width = (torch.export.Dim(name, min=1, max=1024) for name in ("b", "h", "w"))
    shapes = ({0: batch, 2: 32 * height, 3: 32 * width},)
    # More than one window both ways, since the exporter treats sizes of one apart.
    program = torch.export.export(model, (torch.rand(2, 3, 128, 160),), dynamic_shapes=shapes)
    images = torch.rand(3, 3, 256, 128)
    with torch.no_grad():
        assert worst(program.module()(images), model(images)) < 1e-4


def test_an_onnx_file_traced_at_one_size_is_right_at_others(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = small().eval(), str(tmp_path / "emo.onnx")
    onnx_by_tracing(
        model, torch.rand(2, 3, 128, 96), path, input_names=["images"],
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}}, opset_version=17,
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path)
    for shape in [(1, 3, 96, 64), (3, 3, 256, 160)]:
        images = torch.rand(shape)
        got = [torch.from_numpy(part) for part in session.run(None, {"images": images.numpy()})]
        with torch.no_grad():
            assert worst(got, model(images)) < 1e-4


def save(model: nn.Module, path: Path, **changes: Tensor) -> Path:
    torch.save(
        {"net": {f"module.{k}": v for k, v in {**model.state_dict(), **changes}.items()}}, path
    )
    return path


def test_official_weights_load_without_their_classifier(tmp_path: Path) -> None:
    source = emo.EMO_1M(False)
    head = {"head.weight": torch.ones(1000, 168), "head.bias": torch.ones(1000)}
    path = save(source, tmp_path / "emo.pth", **head)
    for loaded in (emo.EMO_1M(str(path)), emo.EMO_1M(path, form="se")):
        for key, value in loaded.state_dict().items():
            if ".se." not in key:
                assert torch.equal(value, source.state_dict()[key]), key
    se = emo.EMO_1M(str(path)).state_dict()["stage0.1.se.conv_reduce.weight"]
    assert torch.equal(se, source.state_dict()["stage0.1.se.conv_reduce.weight"])


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path: Path) -> None:
    path = save(emo.EMO_1M(False), tmp_path / "emo.pth", **{"norm.norm.bias": torch.zeros(3)})
    with pytest.raises(
        CheckpointError, match=r"norm\.norm\.bias has shape \(3,\), expected \(168,\)"
    ):
        emo.EMO_1M(str(path))
    with pytest.raises(CheckpointError, match=r"is missing"):
        emo.EMO_5M(str(path))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04 cut"])
def test_a_file_that_is_not_weights_is_one_checkpoint_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"broken\.pth: cannot be read"):
        emo.EMO_1M(str(path))
    with pytest.raises(CheckpointError, match=r"no such file"):
        emo.EMO_1M(str(tmp_path / "absent.pth"))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"net": Path("emo")}, tmp_path / "code.pth")
    with pytest.raises(CheckpointError, match=r"code\.pth: cannot be read"):
        emo.EMO_1M(str(tmp_path / "code.pth"))


@pytest.mark.parametrize(("keyword", "value"), [("form", "third"), ("weights", True)])
def test_a_wrong_argument_says_what_was_expected(keyword: str, value: object) -> None:
    with pytest.raises(LayerError, match=rf"{keyword} - got .*, expected"):
        emo.EMO_1M(**{keyword: value})


def test_every_size_is_registered_as_a_backbone() -> None:
    for size, build in BUILD.items():
        layer = find(f"EMO_{size}")
        assert layer is not None and layer.build is build
