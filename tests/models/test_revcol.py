"""RevCol: published layout and numbers, and reversible training equal to plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from published import FOLDER, fill, golden, layout, needs_golden, read_json
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch_versions import onnx_by_tracing

from models.modules import revcol
from models.registry import LayerError, find

SIZES = {
    "tiny": 29_942_144,
    "small": 60_054_400,
    "base": 138_038_256,
    "large": 272_068_352,
    "xlarge": 832_010_816,
}


def small(
    save_memory: bool | str = True,
    columns: int = 3,
    drop_path: float = 0.3,
    channels: tuple[int, int, int, int] = (4, 8, 8, 16),
) -> revcol.RevCol:
    """A narrow network whose layer scales are near one, so that every branch counts."""
    torch.manual_seed(0)
    size = revcol.Size(channels, (1, 1, 2, 1), columns, drop_path)
    model = revcol.RevCol(size, save_memory)
    for name, parameter in model.named_parameters():
        if "gamma" in name:
            nn.init.uniform_(parameter, 0.5, 1.0)
        elif parameter.ndim > 1 and "alpha" not in name:
            nn.init.kaiming_uniform_(parameter)
    return model.train()


def score(maps: list[Tensor]) -> Tensor:
    """A number in which every element of every map has a weight of its own."""
    weights = [torch.linspace(-1, 1, m.numel(), dtype=m.dtype).view_as(m) for m in maps]
    return torch.stack([(m * w).sum() for m, w in zip(maps, weights, strict=True)]).sum()


def gradients(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradients of `score` by parameter name, and of the images, from one fixed random state."""
    torch.manual_seed(7)
    images = images.clone().requires_grad_()
    score(model(images)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**found, "images": images.grad}


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The largest difference of a gradient relative to its own size."""
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).norm() / a[k].norm().clamp(min=1e-12)) for k in a)


@pytest.mark.parametrize("size", SIZES)
def test_every_size_has_the_published_count_and_builds_without_memory(size: str) -> None:
    layer = find(f"revcol_{size}")
    assert layer is not None
    with torch.device("meta"):
        model = layer.build()
    assert sum(p.numel() for p in model.parameters()) == SIZES[size]
    assert model.strides == [4, 8, 16, 32]


def test_channels_and_strides_agree_with_the_maps_that_come_out() -> None:
    model = small()
    shapes = [(2, c, 64 // s, 96 // s) for c, s in zip(model.channels, model.strides, strict=True)]
    assert [tuple(m.shape) for m in model(torch.rand(2, 3, 64, 96))] == shapes


@needs_golden
def test_keys_and_outputs_equal_the_published_network() -> None:
    keys = read_json("revcol_tiny.keys.json")
    with torch.device("meta"):
        model = revcol.revcol_tiny().eval()
    model = model.to_empty(device="cpu")
    heads = ("cls_blocks.", "decoder_blocks.")
    own = {key: shape for key, shape in keys.items() if not key.startswith(heads)}
    assert layout(model) == own
    fill(model)
    with torch.no_grad():
        maps = model(golden().image(224, 288))
    for stage, feature in enumerate(maps, 1):
        path = str(FOLDER / "revcol_tiny.npz")
        assert golden().difference(feature, path, f"stage{stage}") < 1e-4


def test_a_column_is_the_equation_written_out() -> None:
    model = small(drop_path=0.0).eval()
    stem, images = model.stem, torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        previous = model.subnet0(stem(images), (), None)
        got = model.subnet1(stem(images), previous, None)
        below = stem(images)
        for index, level in enumerate(model.subnet1.levels()):
            x = level.fusion.down(below)
            if index < 3:
                up = level.fusion.up.channel_reschedule(previous[index + 1].permute(0, 2, 3, 1))
                x = x + up.permute(0, 3, 1, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
            for block in level.blocks:
                x = block(x)
            below = x + 0.5 * previous[index]
            assert torch.allclose(got[index], below, atol=1e-5)


@pytest.mark.parametrize("columns", [1, 2, 5])
@pytest.mark.parametrize("drop_path", [0.0, 0.4])
def test_reversible_gradients_equal_plain_ones(columns: int, drop_path: float) -> None:
    images = torch.rand(3, 3, 64, 96)
    plain = gradients(small(False, columns, drop_path), images)
    state = torch.get_rng_state()
    reversible = gradients(small(True, columns, drop_path), images)
    assert worst(plain, reversible) < 1e-5
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("columns", [4, 8])
def test_sparse_gradients_equal_plain_ones_but_for_rounding(columns: int) -> None:
    images, widths = torch.rand(2, 3, 64, 64), (8, 16, 24, 32)
    plain = gradients(small(False, columns, channels=widths), images)
    sparse = gradients(small("sparse", columns, channels=widths), images)
    assert 0 < worst(plain, sparse) < 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1e-3, -0.05])
def test_sparse_keeps_the_maps_that_could_not_be_worked_back(alpha: float) -> None:
    images = torch.rand(2, 3, 64, 64)
    models = [small(mode, 5) for mode in (False, "sparse")]
    for model in models:
        for index in (1, 3):
            for parameter in getattr(model, f"subnet{index}").alphas():
                nn.init.constant_(parameter, alpha)
    plain, sparse = (gradients(model, images) for model in models)
    assert worst(plain, sparse) < 1e-3


@pytest.mark.parametrize("save_memory", [True, "sparse"])
def test_gradcheck_in_float64(save_memory: bool | str) -> None:
    model = small(save_memory, 2, 0.3, (2, 2, 3, 2)).double()
    learned = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    sizes = [p.numel() for p in learned.values()]

    def run(images: Tensor, flat: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(7)
        parts = zip(learned, flat.split(sizes), strict=True)
        state = {name: part.view_as(learned[name]) for name, part in parts}
        return tuple(torch.func.functional_call(model, state, (images,)))

    images = torch.rand(2, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    flat = torch.cat([p.flatten() for p in learned.values()]).requires_grad_()
    assert torch.autograd.gradcheck(run, (images, flat), fast_mode=True)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_bfloat16_autocast_gives_the_gradients_of_plain_autocast(backward_inside: bool) -> None:
    images = torch.rand(2, 3, 64, 64)
    found = []
    for save_memory in (False, True):
        model = small(save_memory)
        torch.manual_seed(7)
        with torch.autocast("cpu", torch.bfloat16):
            loss = score(model(images))
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    plain, reversible = found
    assert (plain - reversible).norm() / plain.norm() < 1e-2


def freeze_stem(model: revcol.RevCol) -> None:
    model.stem.requires_grad_(False)


def freeze_half(model: revcol.RevCol) -> None:
    for part in (model.stem, model.subnet0, model.subnet1.level2, model.subnet2.level0):
        part.requires_grad_(False)


@pytest.mark.parametrize("freeze", [freeze_stem, freeze_half])
def test_frozen_parts_leave_the_other_gradients_as_they_are(
    freeze: Callable[[revcol.RevCol], None],
) -> None:
    images = torch.rand(2, 3, 64, 64)
    plain, reversible = small(False), small(True)
    found = []
    for model in (plain, reversible):
        freeze(model)
        torch.manual_seed(7)
        score(model(images)).backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert len(found[-1]) == sum(p.requires_grad for p in model.parameters())
    assert worst(*found) < 1e-5


@pytest.mark.parametrize("save_memory", [True, "sparse"])
def test_a_hook_on_a_parameter_runs_once_and_backward_can_be_repeated(
    save_memory: bool | str,
) -> None:
    model, calls = small(save_memory, drop_path=0.0), []
    model.subnet1.level0.blocks[0].gamma.register_hook(lambda grad: calls.append(1))
    loss = score(model(torch.rand(1, 3, 32, 32)))
    loss.backward(retain_graph=True)
    once = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    loss.backward()
    assert len(calls) == 2
    twice = {name: p.grad / 2 for name, p in model.named_parameters() if p.requires_grad}
    assert worst(once, twice) < 1e-6


def saved_bytes(model: nn.Module, images: Tensor) -> int:
    """Bytes of all storages saved for the backward pass, parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}
    held = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        held.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        maps = model(images)
    assert all(m.requires_grad for m in maps)
    return sum(storages.values())


def test_saved_memory_grows_by_a_columns_outputs_and_sparse_by_a_third() -> None:
    images = torch.rand(1, 3, 64, 64)
    outputs = 4 * sum(c * (64 // s) ** 2 for c, s in zip((4, 8, 8, 16), (4, 8, 16, 32)))
    noise = 4 * 5  # one number for each of five blocks
    for save_memory, share in ((True, 1), ("sparse", 3)):
        sizes = [saved_bytes(small(save_memory, columns), images) for columns in (3, 6, 9)]
        for growth in (sizes[1] - sizes[0], sizes[2] - sizes[1]):
            assert growth <= 3 * (outputs / share + noise)
    plain = [saved_bytes(small(False, columns), images) for columns in (3, 6)]
    assert plain[1] - plain[0] > 10 * 3 * outputs


@pytest.mark.parametrize("save_memory", [False, True, "sparse"])
def test_alpha_is_kept_from_zero_and_never_written(save_memory: bool | str) -> None:
    model = small(save_memory, columns=2, drop_path=0.0)
    values = torch.tensor([0.0, -1e-5, 2e-4, -0.25])
    with torch.no_grad():
        model.subnet1.alpha0.copy_(values.view(1, 4, 1, 1))
    kept = revcol.keep_from_zero(model.subnet1.alpha0).flatten()
    assert kept.tolist() == pytest.approx([1e-3, -1e-3, 1e-3, -0.25])
    found = gradients(model, torch.rand(1, 3, 32, 32))
    assert all(grad.isfinite().all() for grad in found.values())
    assert (found["subnet1.alpha0"] != 0).all()
    assert torch.equal(model.subnet1.alpha0.flatten(), values)


def test_the_first_columns_alphas_are_kept_but_ask_for_no_gradient() -> None:
    model = small()
    found = gradients(model, torch.rand(2, 3, 64, 64))
    dead = {f"subnet0.alpha{level}" for level in range(4)}
    assert dead <= model.state_dict().keys()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == dead
    learned = {name for name, p in model.named_parameters() if p.requires_grad}
    assert found.keys() == learned | {"images"}
    assert all(grad.abs().sum() > 0 for grad in found.values())


def uses_reversible_columns(model: nn.Module, images: Tensor) -> bool:
    node = model(images)[-1].grad_fn
    return node is not None and type(node).__name__ == "ReversibleColumnBackward"


def test_only_eager_training_takes_the_reversible_path() -> None:
    images = torch.rand(1, 3, 32, 32)
    assert uses_reversible_columns(small(True), images)
    assert uses_reversible_columns(small("sparse"), images)
    assert not uses_reversible_columns(small(False), images)
    assert not uses_reversible_columns(small(True).eval(), images)


def test_torch_compile_trains_on_the_plain_path_with_the_same_gradients() -> None:
    images = torch.rand(2, 3, 32, 32)
    model = small(columns=2, drop_path=0.0)
    expected = gradients(copy.deepcopy(model), images)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    got = {n.removeprefix("_orig_mod."): g for n, g in gradients(compiled, images).items()}
    assert worst(expected, got) < 1e-5


def test_an_onnx_file_traced_at_one_size_is_right_at_another(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, path = small(columns=2).eval(), str(tmp_path / "revcol.onnx")
    onnx_by_tracing(
        model, torch.rand(2, 3, 64, 96), path, input_names=["images"],
        dynamic_axes={"images": {0: "batch", 2: "height", 3: "width"}}, opset_version=17,
    )  # fmt: skip
    images = torch.rand(3, 3, 96, 32)
    got = onnxruntime.InferenceSession(path).run(None, {"images": images.numpy()})
    with torch.no_grad():
        for part, expected in zip(got, model(images), strict=True):
            assert torch.allclose(torch.from_numpy(part), expected, atol=1e-4)


def test_an_exported_program_runs_at_another_batch_and_size() -> None:
    model = small(columns=2).eval()
    batch, height, width = (torch.export.Dim(name, min=1, max=1024) for name in ("b", "h", "w"))
    shapes = ({0: batch, 2: 32 * height, 3: 32 * width},)
    program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
    images = torch.rand(3, 3, 96, 64)
    with torch.no_grad():
        for got, expected in zip(program.module()(images), model(images), strict=True):
            assert torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize("save_memory", [True, "sparse"])
def test_training_runs_on_the_meta_device(save_memory: bool | str) -> None:
    with torch.device("meta"):
        size = revcol.Size((4, 8, 8, 16), (1, 1, 2, 1), 4, 0.3)
        model = revcol.RevCol(size, save_memory).train()
        maps = model(torch.empty(1, 3, 64, 64))
    torch.stack([m.sum() for m in maps]).sum().backward()
    assert [m.shape[-1] for m in maps] == [16, 8, 4, 2]


def test_channels_last_gives_the_same_gradients() -> None:
    images = torch.rand(2, 3, 64, 96)
    expected = gradients(small(), images)
    model = small().to(memory_format=torch.channels_last)
    got = gradients(model, images.contiguous(memory_format=torch.channels_last))
    assert worst(expected, got) < 1e-5


def test_a_wrong_save_memory_says_what_was_expected() -> None:
    with pytest.raises(LayerError, match=r"save_memory - got 'flat', expected True, False or"):
        revcol.revcol_tiny("flat")


def distributed_worker(rank: int, folder: str) -> None:
    """One of two ranks: its averaged gradients must be the mean of both ranks' plain ones."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    batches = [torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(r)) for r in (0, 1)]
    plain = [gradients(small(False, drop_path=0.0), images) for images in batches]
    mean = {name: (plain[0][name] + plain[1][name]) / 2 for name in plain[0] if name != "images"}
    for find_unused in (False, True):
        for save_memory in (True, "sparse"):
            model = small(save_memory, drop_path=0.0)
            wrapped = DistributedDataParallel(model, find_unused_parameters=find_unused)
            for _ in range(2):  # a second step fails where the first left gradients unreduced
                model.zero_grad()
                score(wrapped(batches[rank])).backward()
            got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
            error = worst(mean, got)
            if error > (1e-5 if save_memory is True else 1e-3):
                raise ValueError(f"{save_memory}, {find_unused}: gradients differ by {error}")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="this torch has no gloo")
def test_two_gloo_ranks_average_to_the_plain_gradients(tmp_path: Path) -> None:
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=distributed_worker, args=(r, str(tmp_path))) for r in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=300)
    assert [process.exitcode for process in ranks] == [0, 0]


@pytest.mark.parametrize("rate", [1.0, -0.1])
def test_a_drop_path_that_is_no_probability_below_one_is_refused(rate: float) -> None:
    with pytest.raises(LayerError, match=r"drop_path.*\[0, 1\)"):
        small(drop_path=rate)
