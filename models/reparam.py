"""From the training form of a network to the deployed form: the same outputs from less work.

`fuse` works in place, `reparameterize_model` on a copy. In this order it

1. drops what the outputs do not need: rows that only an auxiliary branch reads, found by walking
   back from the main head;
2. lets every module that can re-parameterize itself do so (`reparameterize()`,
   `switch_to_deploy()` or `fuse()`, ours or foreign);
3. runs the network once, recorded operation by operation, and folds every BatchNorm and layer scale
   into the convolution or linear layer before it, or a BatchNorm into the one behind it, where the
   record proves that nothing else reads what lies between;
4. removes modules that inference never touches (embeddings for denoising);
5. compares its outputs with those from before, and names the first module that differs.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from models.fusing.dataflow import Call, Record, record_run
from models.fusing.pairs import Folder
from models.fusing.precision import default_type, in_type, own_type, widest_type
from models.parser.wiring import with_releases
from models.table import count_params

TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-4}
HALF_TOLERANCE = 1e-2
OWN_ROUNDINGS = 4
"""Where float64 cannot be asked: how many times what one rounding of the input changes is allowed, as for exported files."""
PROTOCOLS = ("reparameterize", "switch_to_deploy", "fuse")


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


@torch.inference_mode(False)  # which would hide operations from the record, and taint parameters
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
    sample = _sample_for(model) if sample is None else sample
    report = FuseReport(count_params(model))
    wide = widest_type(model)
    before = _run_before(model, sample, wide) if check else None
    running = before.dtype if before else own_type(model)
    with in_type(model, running):
        _convert(model, sample, wide, before, report)
    report.after = count_params(model)
    return report


def _convert(
    model: nn.Module, sample: Tensor, wide: torch.dtype, before: _Before | None, report: FuseReport
) -> None:
    """Drop, re-parameterize and fold; the arithmetic of weights is done in `wide`."""
    names = {module: name for name, module in model.named_modules()}
    report.dropped += _drop_rows(model)
    with in_type(model, wide), default_type(wide):
        report.reparameterized += _call_protocols(model)
    _, record = _run(model, sample)
    folder = Folder(model, record, names)
    with in_type(model, wide):
        folder.run()
    report.folded, report.left = folder.folded, folder.left
    _drop_idle(model, record, report, lambda: _run(model, sample))
    record.forget_tensors()
    if before:
        _compare(before, _run(model, sample), folder, report)


class _Before(NamedTuple):
    """What the network did: its outputs, the record of the run, the type it ran in, and what one rounding of the
    input alone changes in the outputs where that type is not the widest."""

    outputs: list[Tensor]
    record: Record
    dtype: torch.dtype
    rounding: float = 0.0


def _run(model: nn.Module, sample: Tensor) -> tuple[list[Tensor], Record]:
    """Outputs and record of one run."""
    images = sample.to(next((p for p in model.parameters()), sample))
    return record_run(model, lambda: _predict(model, images))


def _run_before(model: nn.Module, sample: Tensor, wide: torch.dtype) -> _Before:
    """The run to compare with: in the widest type, or in the network's own where its code insists on that."""
    own, rounding = own_type(model), 0.0
    try:
        with in_type(model, wide):
            outputs, record = _run(model, sample)
    except (RuntimeError, TypeError):
        if wide == own:
            raise
        wide = own
        outputs, record = _run(model, sample)
        rounding = _largest_difference(outputs, _run(model, _rounded(sample))[0])
    record.forget_tensors()
    return _Before(outputs, record, wide, rounding)


def _rounded(sample: Tensor) -> Tensor:
    """Every other pixel's value moved to the next one that float32 has."""
    moved = sample.clone()
    moved[..., ::2] = torch.nextafter(sample[..., ::2], torch.zeros_like(sample[..., ::2]))
    return moved


def _compare(
    before: _Before, after: tuple[list[Tensor], Record], folder: Folder, report: FuseReport
) -> None:
    found, last = after
    own = min(OWN_ROUNDINGS * before.rounding, HALF_TOLERANCE)  # a network may amplify rounding
    report.tolerance = max(TOLERANCES.get(before.dtype, HALF_TOLERANCE), own)
    report.difference = _largest_difference(before.outputs, found)
    if not report.difference <= report.tolerance:
        culprit = _first_different(before.record, last, folder, report)
        raise FuseError(
            f"fuse: the fused network differs - got max |difference| {report.difference:.1e}, expected at most "
            f"{report.tolerance:.0e}. The first module that differs is {culprit}."
        )


def _sample_for(model: Any) -> Tensor:
    """A random image, small but not square; large enough for a head that ranks 300 candidates."""
    is_ranking = getattr(getattr(model, "head", None), "postprocess", "nms") == "topk"
    stride = getattr(model, "max_stride", 32)
    height, width = (5 * stride, 6 * stride) if is_ranking else (2 * stride, 3 * stride)
    own: tuple[int, int] = getattr(model, "imgsz", (height, width))
    is_fixed = any(
        getattr(module, "any_size", True) is False for module in model.modules()
    )  # the model among them
    shape = (1, getattr(model, "channels", 3))
    generator = torch.Generator().manual_seed(0)
    sample = torch.rand(*shape, height, width, generator=generator)
    if is_fixed or not _takes(model, sample):
        sample = torch.rand(*shape, *own, generator=generator)
    return sample


def _takes(model: nn.Module, sample: Tensor) -> bool:
    """Whether the network runs on `sample`, which may be too small for its kernels."""
    try:
        with torch.no_grad():
            model(sample.to(next((p for p in model.parameters()), sample)))
    except RuntimeError:
        return False
    return True


def _predict(model: nn.Module, sample: Tensor) -> list[Tensor]:
    """What inference makes of `sample`: decoded, if the model can decode."""
    raw = model(sample)
    decode = getattr(model, "decode", None)
    result = decode(raw) if callable(decode) else raw
    return [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]


# --- dropping -------------------------------------------------------------------------------------


def _drop_rows(model: Any) -> list[str]:
    """Keep the main head and the rows it is fed by, found by walking back from it."""
    rows: Any = getattr(model, "rows", None)
    head: Any = getattr(model, "head", None)
    if not rows or head.main_head() is head:
        return []
    last = rows[-1]._replace(inputs=tuple(rows[-1].inputs[head.main_inputs]))
    modules = [*model.model[:-1], head.main_head()]
    rows = (*rows[:-1], last)
    needed = set(last.inputs)
    kept = [len(rows) - 1]
    for number in range(len(rows) - 2, -1, -1):
        slots = rows[number].map_slots or (rows[number].index,)
        if needed & set(slots):
            needed |= set(rows[number].inputs)
            kept.append(number)
    kept.reverse()
    dropped = [f"model.{n} ({row.module})" for n, row in enumerate(rows) if n not in set(kept)]
    model.model = nn.ModuleList(modules[number] for number in kept)
    model.rows = with_releases([rows[number] for number in kept])
    return [*dropped, f"model.{len(rows) - 1} (auxiliary part)"]


def _drop_idle(
    model: nn.Module, record: Record, report: FuseReport, run: Callable[[], Any]
) -> None:
    """Remove modules with parameters that the run neither called nor read."""
    called = {call.module for call in record.calls}
    read = {value[0] for operation in record.operations for value in operation.reads}
    removed: list[tuple[nn.Module, str, nn.Module]] = []
    _find_idle(model, "", called, read, removed, report.dropped)
    for parent, name, _ in removed:
        parent._modules[name] = nn.Identity()
    if not removed:
        return
    try:
        run()
    except (AttributeError, TypeError):  # something asks an unused module for its type or size
        for parent, name, module in removed:
            parent._modules[name] = module
        del report.dropped[-len(removed) :]


def _find_idle(
    module: nn.Module,
    prefix: str,
    called: set[nn.Module],
    read: set[int],
    removed: list[tuple[nn.Module, str, nn.Module]],
    names: list[str],
) -> None:
    for name, child in module.named_children():
        parameters = list(child.parameters())
        touched = any(m in called for m in child.modules()) or any(
            id(p) in read for p in parameters
        )
        if parameters and not touched:
            removed.append((module, name, child))
            names.append(f"{prefix}{name}")
        else:
            _find_idle(child, f"{prefix}{name}.", called, read, removed, names)


# --- modules that fold themselves -----------------------------------------------------------------


def _call_protocols(model: nn.Module, prefix: str = "") -> list[str]:
    """Call `reparameterize()`, `switch_to_deploy()` or `fuse()` of every module that has one."""
    done = []
    own = getattr(model, "reparameterize", None)
    if not prefix and callable(own) and not hasattr(model, "decode"):
        own()
        done.append("(the network)")
    for name, child in list(model.named_children()):
        path = f"{prefix}{name}"
        before = sum(1 for _ in child.parameters())
        result = _call_protocol(child)
        if isinstance(result, nn.Module) and result is not child:
            result.train(child.training)
            model._modules[name] = child = result
        if sum(1 for _ in child.parameters()) != before:
            done.append(path)
        if not getattr(child, "reparameterizes_inside", False):
            done += _call_protocols(child, f"{path}.")
    return done


def _call_protocol(module: nn.Module) -> Any:
    if isinstance(module, (torch.jit.ScriptModule, torch.fx.GraphModule)):
        return None
    for name in PROTOCOLS:
        method = getattr(module, name, None)
        if callable(method) and not isinstance(method, nn.Module) and _takes_nothing(method):
            return method()
    return None


def _takes_nothing(method: Callable[..., Any]) -> bool:
    """Whether it can be called as it is; `fuse(a, b)` of a module that merges maps cannot."""
    try:
        inspect.signature(method).bind()
    except TypeError:
        return False
    except ValueError:  # built in, without a signature
        return True
    return True


# --- checking -------------------------------------------------------------------------------------


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


def _first_different(before: Record, after: Record, folder: Folder, report: FuseReport) -> str:
    """The name of the first module whose output differs, among those that exist in both forms."""
    earlier: dict[nn.Module, list[Call]] = {}
    for call in before.calls:
        earlier.setdefault(call.module, []).append(call)
    changed = folder.changed_modules()
    inside = tuple(f"{name}." for name in report.reparameterized)
    for call in after.calls:
        module = folder.replaced.get(call.module, call.module)
        if module not in earlier or module in changed or folder.names[module].startswith(inside):
            continue
        for (a, size), (b, _) in zip(earlier[module].pop(0).print, call.print):
            limit = report.tolerance * max(size, 1e-30)
            if a.shape != b.shape or not bool((a - b).abs().max() <= limit):
                return f"{folder.names[module]!r} ({type(module).__name__})"
    return "the network itself"
