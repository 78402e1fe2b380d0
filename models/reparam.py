"""From the training form of a network to the deployed form: the same outputs from less work.

`fuse` works in place, `reparameterize_model` on a copy. In this order it

1. drops what the outputs do not need: rows that only an auxiliary branch reads, found by walking back from the main head;
2. lets every module that can re-parameterize itself do so (`reparameterize()`, `switch_to_deploy()` or `fuse()`, ours or
   foreign);
3. runs the network once, watched, and folds every BatchNorm and layer scale into the convolution or linear layer before it,
   or a BatchNorm into the one behind it, where nothing else reads what lies between;
4. removes modules that inference never touches (embeddings for denoising);
5. compares its outputs with those from before, and names the first module that differs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from models.fusing.flow import Prints, Record, prints_of, record_run
from models.fusing.pairs import Folder, put
from models.head import Head
from models.parser.wiring import Row, with_releases
from models.table import count_params
from utils.structures import Decoded
from utils.trees import tensors_in

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}
HALF_TOLERANCE = 1e-2
OWN_ROUNDINGS = 4
"""Where float64 cannot be asked: how many times what one rounding of the input changes is allowed, as for exported files."""
PROTOCOLS = ("reparameterize", "switch_to_deploy", "fuse")
WIDEN_UP_TO = 200_000_000
"""Parameters of the largest network that is checked in float64 (which doubles its memory for a moment)."""


class FuseError(RuntimeError):
    """The fused network does not do what the network did."""


@dataclass
class FuseReport:
    """What `fuse` did.

    Attributes:
        before, after: parameters of both forms.
        dropped: rows and modules that inference does not need.
        reparameterized: modules that folded themselves.
        folded: pairs, `layer + module`.
        left: BatchNorms and layer scales that stay, with the reason.
        difference: largest |difference| of any output, over the largest |value| of that output;
            None if it was not checked.
        tolerance: what `difference` was held against.
    """

    before: int
    after: int = 0
    dropped: list[str] = field(default_factory=list)
    reparameterized: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    difference: float | None = None
    tolerance: float = 0.0

    def __str__(self) -> str:
        reasons = [f"{name}, {reason}" for name, reason in self.left.items()]
        left = f"{len(reasons)} norms left" + (f" ({reasons[0]})" if len(reasons) == 1 else "")
        check = "not checked"
        if self.difference is not None:
            check = f"max |difference| {self.difference:.1e} of the largest value"
        return (
            f"fused: {self.before:,} -> {self.after:,} parameters; "
            f"{len(self.folded)} pairs folded, "
            f"{len(self.reparameterized)} modules re-parameterized, "
            f"{len(self.dropped)} dropped, {left}; {check}"
        )


def reparameterize_model(
    model: nn.Module, *, check: bool = True, sample: Tensor | None = None
) -> nn.Module:
    """A fused copy of `model`; see `fuse`."""
    duplicate = copy.deepcopy(model)
    fuse(duplicate, check=check, sample=sample)
    return duplicate


@runtime_checkable
class Detector(Protocol):
    """A `DetectionModel`, as far as it is brought into its deployed form here; its row modules stand under `model`."""

    rows: tuple[Row, ...]
    imgsz: tuple[int, int]

    @property
    def head(self) -> Head[NamedTuple]: ...
    @property
    def channels(self) -> int: ...
    @property
    def any_size(self) -> bool: ...
    @property
    def max_stride(self) -> int: ...
    def decode(self, raw: NamedTuple) -> Decoded: ...


@runtime_checkable
class Reparameterizable(Protocol):
    """A module that can bring itself into its deployed form."""

    def reparameterize(self) -> None:
        """In place; once more changes nothing."""


@runtime_checkable
class FoldsInside(Protocol):
    """A module whose `reparameterize()` speaks for everything inside."""

    reparameterizes_inside: bool


@torch.inference_mode(False)  # which would taint parameters
def fuse(model: nn.Module, *, check: bool = True, sample: Tensor | None = None) -> FuseReport:
    """Bring `model` into its deployed form, in place; it is in eval mode afterwards.

    Doing it again changes nothing. Parameters still take gradients.

    Args:
        model: a detector, or any network of one input.
        check: compare the outputs before and after.
        sample: what the network is run on, (B, 3, H, W); random by default.

    Raises:
        FuseError: an output changed; the first module whose own output changed is named.
    """
    model.eval()
    images = _sample_for(model) if sample is None else sample
    names = {module: name for name, module in model.named_modules()}
    report = FuseReport(count_params(model))
    own, wide = _types(model)
    before = _run_before(model, images, own, wide) if check else None
    with in_type(model, before.dtype if before else own):
        report.dropped += _drop_rows(model)
        with in_type(model, wide), _default_type(wide):
            report.reparameterized += _call_protocols(model)
        typed = _typed(model, images)
        record = record_run(model, lambda: _predict(model, typed))
        folder = Folder(model, record, names)
        with in_type(model, wide):
            folder.run()
        report.folded, report.left = folder.folded, folder.left
        report.dropped += _drop_idle(model, record, images)
        if before:
            _compare(model, images, before, folder, report)
    report.after = count_params(model)
    return report


class _Before(NamedTuple):
    """What the network did: its outputs, prints of its modules, the type it ran in, and what one rounding of the input
    alone changes in the outputs where that type is not the widest."""

    outputs: list[Tensor]
    prints: Prints
    dtype: torch.dtype
    rounding: float = 0.0


def _run_before(model: nn.Module, images: Tensor, own: torch.dtype, wide: torch.dtype) -> _Before:
    """The run to compare with: in the widest type, or in the network's own where its code insists on that."""
    try:
        with in_type(model, wide):
            return _Before(*prints_of(model, lambda: _predict(model, images)), wide)
    except (RuntimeError, TypeError):
        if wide == own:
            raise
    outputs, prints = prints_of(model, lambda: _predict(model, images))
    moved = _predict(model, _rounded(images))
    return _Before(outputs, prints, own, _largest_difference(outputs, moved))


def _rounded(images: Tensor) -> Tensor:
    """Every other pixel's value moved to the next one that float32 has."""
    moved = images.clone()
    moved[..., ::2] = torch.nextafter(images[..., ::2], torch.zeros_like(images[..., ::2]))
    return moved


def _compare(
    model: nn.Module, images: Tensor, before: _Before, folder: Folder, report: FuseReport
) -> None:
    own = min(OWN_ROUNDINGS * before.rounding, HALF_TOLERANCE)  # a network may amplify rounding
    report.tolerance = max(TOLERANCES.get(before.dtype, HALF_TOLERANCE), own)
    outputs, prints = prints_of(model, lambda: _predict(model, images))
    report.difference = _largest_difference(before.outputs, outputs)
    if not report.difference <= report.tolerance:
        culprit = _first_different(before.prints, prints, folder, report)
        raise FuseError(
            f"fuse: the fused network differs - got max |difference| {report.difference:.1e}, expected at most "
            f"{report.tolerance:.0e}. The first module that differs is {culprit}."
        )


def _largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    """Largest |difference| of any output over the largest |value| of that output."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    ratios = [
        float((a.double() - b.double()).abs().max() / a.double().abs().max().clamp(min=1e-30))
        for a, b in zip(expected, found)
        if a.numel()
    ]
    return max(ratios, default=0.0)


def _first_different(before: Prints, after: Prints, folder: Folder, report: FuseReport) -> str:
    """The name of the first module whose output differs, among those that exist in both forms."""
    earlier: dict[nn.Module, list[list[Tensor]]] = {}
    for module, prints in before:
        earlier.setdefault(module, []).append(prints)
    changed = {c.module for c in folder.record.calls if not folder.changed.isdisjoint(c.results)}
    inside = tuple(f"{name}." for name in report.reparameterized)
    for module, prints in after:
        module = folder.replaced.get(module, module)
        if module not in earlier or module in changed or folder.names[module].startswith(inside):
            continue
        if not _largest_difference(earlier[module].pop(0), prints) <= report.tolerance:
            return f"{folder.names[module]!r} ({type(module).__name__})"
    return "the network itself"


def _sample_for(model: nn.Module) -> Tensor:
    """A random image, small but not square; large enough for a head that ranks 300 candidates."""
    generator = torch.Generator().manual_seed(0)
    if not isinstance(model, Detector):
        return torch.rand(1, 3, 64, 96, generator=generator)
    rows, columns = (5, 6) if model.head.num_queries > 0 else (2, 3)
    size = (rows * model.max_stride, columns * model.max_stride)
    images = torch.rand(1, model.channels, *size, generator=generator)
    with suppress(RuntimeError):  # too small for its kernels
        if model.any_size:
            _predict(model, images)
            return images
    return torch.rand(1, model.channels, *model.imgsz, generator=generator)


def _typed(model: nn.Module, images: Tensor) -> Tensor:
    return images.to(next((p for p in model.parameters()), images))


@torch.no_grad()
def _predict(model: nn.Module, images: Tensor) -> list[Tensor]:
    """What inference makes of `images`: decoded, if the model can decode."""
    raw = model(_typed(model, images))
    return list(tensors_in(model.decode(raw) if isinstance(model, Detector) else raw))


# --- the type of the weights, for a while ---------------------------------------------------------


def _types(model: nn.Module) -> tuple[torch.dtype, torch.dtype]:
    """The type of the parameters, and float64 where memory and device allow: rounding then hides no fault."""
    parameter = next((p for p in model.parameters()), None)
    if parameter is None:
        return torch.float32, torch.float32
    fits = parameter.dtype == torch.float32 and count_params(model) <= WIDEN_UP_TO
    widens = fits and parameter.device.type != "mps"
    return parameter.dtype, torch.float64 if widens else parameter.dtype


@contextmanager
def in_type(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Run with float32 parameters and buffers widened to `dtype`; they are float32 afterwards, and the same objects.

    Inside another such block nothing changes: what is made there stays wide until the outer one ends.
    """
    tensors = [*model.parameters(), *model.buffers()]
    narrow = [t for t in tensors if t.dtype == torch.float32]
    if dtype != torch.float64 or not narrow:
        yield
        return
    stays = {id(t) for t in tensors if t.dtype == torch.float64}
    for tensor in narrow:
        tensor.data = tensor.data.double()
    try:
        yield
    finally:
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype == torch.float64 and id(tensor) not in stays:
                tensor.data = tensor.data.float()


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    """Layers that foreign code makes meanwhile have `dtype`, so that it rounds nothing."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


# --- dropping -------------------------------------------------------------------------------------


def _drop_rows(model: nn.Module) -> list[str]:
    """Keep the main head and the rows it is fed by, found by walking back from it."""
    if not isinstance(model, Detector):
        return []
    head = model.head
    last = model.rows[-1]._replace(inputs=tuple(model.rows[-1].inputs[head.main_inputs]))
    rows = (*model.rows[:-1], last)
    needed = set(last.inputs)
    kept = [len(rows) - 1]
    for number in range(len(rows) - 2, -1, -1):
        slots = rows[number].map_slots or (rows[number].index,)
        if needed & set(slots):
            needed |= set(rows[number].inputs)
            kept.insert(0, number)
    main = head.main_head()
    if len(kept) == len(rows) and main is head:
        return []
    dropped = [f"model.{n} ({row.module})" for n, row in enumerate(rows) if n not in kept]
    modules = model.get_submodule("model")
    assert isinstance(modules, nn.ModuleList)
    model.register_module("model", nn.ModuleList([*(modules[n] for n in kept[:-1]), main]))
    model.rows = with_releases([rows[number] for number in kept])
    return [*dropped, f"model.{len(rows) - 1} (auxiliary part)"]


def _drop_idle(model: nn.Module, record: Record, images: Tensor) -> list[str]:
    """Remove modules with parameters that the run neither called nor read."""
    used = {call.module for call in record.calls}
    read = {identity for identity, _ in record.readers}
    removed: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        parameters = [id(p) for p in module.parameters()]
        is_idle = read.isdisjoint(parameters) and used.isdisjoint(module.modules())
        if parameters and is_idle and not name.startswith(tuple(f"{n}." for n in removed)):
            removed[name] = module
    for name in removed:
        put(model, name, nn.Identity())
    try:
        if removed:
            _predict(model, images)
        return list(removed)
    except (AttributeError, TypeError):  # something asks an unused module for its type or size
        for name, module in removed.items():
            put(model, name, module)
        return []


# --- modules that fold themselves -----------------------------------------------------------------


def _call_protocols(model: nn.Module, prefix: str = "") -> list[str]:
    """Let every module that has one of the `PROTOCOLS` re-parameterize itself; the names of those that changed."""
    done = []
    if not prefix and isinstance(model, Reparameterizable):
        model.reparameterize()
        done.append("(the network)")
    for name, child in list(model.named_children()):
        path = f"{prefix}{name}"
        before = sum(1 for _ in child.parameters())
        result = _call_protocol(child)
        if isinstance(result, nn.Module) and result is not child:
            result.train(child.training)
            child = result
            model.register_module(name, child)
        if sum(1 for _ in child.parameters()) != before:
            done.append(path)
        if not isinstance(child, FoldsInside):
            done += _call_protocols(child, f"{path}.")
    return done


def _call_protocol(module: nn.Module) -> object:
    """What the first of the `PROTOCOLS` that can be called as it is gives; `fuse(a, b)` of a module that merges maps cannot."""
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return None
    for name in PROTOCOLS:
        method = getattr(module, name, None)
        if not callable(method) or isinstance(method, nn.Module):
            continue
        with suppress(TypeError):
            inspect.signature(method).bind()
            break
    else:
        return None
    return method()
