"""A class as its author wrote it, without registration: which call of its constructor a row means, settled by trying.

Every reading of the row (`readings`) is built and run on the meta device, or for real where code asks for values. The first
that fits is taken; where another fits as well and means something else, both are told. What comes out is measured: one map
from one or more is a block, a list of maps is a neck, and a backbone where it is made from the image.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from models import modules
from models.meta import evaluating, run_for_real, run_on_meta
from models.parser.advice import reason_of
from models.parser.readings import (
    Inputs,
    Reading,
    RowArguments,
    as_row_number,
    as_written,
    readings,
)
from models.parser.signature import Constructor, Role, read_constructor, shown, signature_of, usage
from models.parser.slots import brief, is_map, shapes_of, told
from models.parser.wiring import Style, arguments
from models.registry import Layer, LayerError
from utils.errors import ForeignError, foreign_code, nearest

MOST_NUMBERS = 2**28  # a GiB of weights: larger ones are tried on the meta device alone
MOST_TOLD = 2  # readings that an error shows


class Settled(NamedTuple):
    """How a row is read.

    Attributes:
        reading: the call of the constructor.
        text: the call as the table prints it, `CBAM(c1=256, reduction=16)`.
        style: how `forward` is called.
        output: what comes out, on the meta device.
        note: what its author should know of the choice, "" where there was none.
    """

    reading: Reading
    text: str
    style: Style
    output: object
    note: str = ""


class _Failure(NamedTuple):
    """Why a reading does not fit."""

    text: str
    stage: Literal["bind", "build", "run", "output"]
    reason: str


@dataclass(frozen=True)
class _Case:
    """A row and what it is tried on; see `settle`."""

    layer: Layer
    row: RowArguments
    values: Sequence[Tensor]
    is_image: bool
    is_list: bool

    @property
    def inputs(self) -> Inputs:
        height, width = self.values[0].shape[2:]
        return Inputs(tuple(int(v.shape[1]) for v in self.values), (int(height), int(width)))


def settle(
    layer: Layer, row: RowArguments, values: Sequence[Tensor], *, is_image: bool, is_list: bool
) -> Settled:
    """The reading of `row` that fits `layer`, a class or factory function without a rule.

    Args:
        layer: what the row names.
        row: its arguments.
        values: meta tensors (1, C, H, W) that the row reads.
        is_image: the row reads the image, so that a list of maps is a backbone's.
        is_list: `from` is a list.

    Raises:
        LayerError: nothing fits; with the constructor, what was tried and what to write.
    """
    case = _Case(layer, row, values, is_image, is_list)
    constructor = read_constructor(layer.build)
    _check_names(layer, constructor, row)
    candidates = readings(constructor, row, case.inputs)
    if is_image:
        candidates = [as_written(row), *(r for r in candidates if r[:2] != as_written(row)[:2])]
    failures: list[_Failure] = []
    for run in (run_on_meta, run_for_real):
        fitting, failures = _try_all(case, candidates, run)
        if fitting:
            return _choose(case, fitting)
    raise _unfit(case, constructor, failures)


def _check_names(layer: Layer, constructor: Constructor, row: RowArguments) -> None:
    names = {a.name for a in constructor.arguments}
    wrong = [] if constructor.takes_any_name else sorted(set(row.kwargs) - names)
    if wrong:
        raise LayerError(
            f"got an unexpected keyword argument {wrong[0]!r}, expected those of {layer.name}{shown(layer.build)}."
            f"{nearest(wrong[0], names)}"
        )


def _try_all(
    case: _Case, candidates: Sequence[Reading], run: Callable[..., object]
) -> tuple[list[Settled], list[_Failure]]:
    """The first fitting reading of each group; a guess only where nothing before it fits. And what failed."""
    fitting: list[Settled] = []
    failures: list[_Failure] = []
    for reading in candidates:
        if reading.is_doubt and not fitting:
            continue
        if fitting and (reading.is_guess or any(s.reading.group == reading.group for s in fitting)):
            continue
        found = _try(case, reading, run)
        if isinstance(found, _Failure):
            failures.extend([] if reading.is_doubt else [found])
        elif not any(found.text == other.text for other in fitting):
            fitting.append(found)
            if case.is_image and isinstance(found.output, (list, tuple, Mapping)):
                break  # a backbone's numbers are its own
    return fitting, failures


def _try(case: _Case, reading: Reading, run: Callable[..., object]) -> Settled | _Failure:
    text = call_text(case.layer, reading)
    if _bound(case.layer.build, reading) is None:
        return _Failure(text, "bind", "is not what its constructor takes")
    try:
        module = _build(case.layer, reading, on_meta=run is run_on_meta)
    except (ForeignError, LayerError) as error:
        return _Failure(text, "build", reason_of(error))
    failure: _Failure | None = None
    for style in _styles(module, case):
        try:
            with foreign_code(LayerError, users=modules.USER_CODE):
                materialize(module, case.values, style)
                output = run(module, *arguments(case.values, style))
        except (ForeignError, LayerError) as error:
            failure = failure or _Failure(text, "run", reason_of(error))
            continue
        wrong = _wrong_output(output, case.is_image)
        if not wrong:
            return Settled(reading, text, style, output)
        if failure is None or failure.stage == "run":
            failure = _Failure(text, "output", wrong)
    assert failure is not None
    return failure


def _build(layer: Layer, reading: Reading, *, on_meta: bool) -> nn.Module:
    """The module of one reading; no random number of the caller's is drawn and nothing is warned."""
    if not on_meta and _is_too_large(layer, reading):
        raise LayerError("has too many weights to be tried with numbers")
    device = torch.device("meta" if on_meta else "cpu")
    with torch.random.fork_rng(devices=[]), device, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with foreign_code(LayerError, users=modules.USER_CODE):
            module = layer.build(*reading.args, **reading.kwargs)
    if not isinstance(module, nn.Module):
        raise LayerError(f"is a {type(module).__name__}, expected a torch.nn.Module.")
    if any(not is_lazy(p) and p.numel() == 0 for p in module.parameters()):
        raise LayerError("has weights without a number")
    return module


def _is_too_large(layer: Layer, reading: Reading) -> bool:
    """Whether its weights would fill the memory: a width taken for the size of a kernel."""
    with (
        suppress(ForeignError),
        foreign_code(),
        torch.device("meta"),
        torch.random.fork_rng(devices=[]),
    ):
        draft = layer.build(*reading.args, **reading.kwargs)
        return sum(p.numel() for p in draft.parameters() if not is_lazy(p)) > MOST_NUMBERS
    return False


def materialize(module: nn.Module, values: Sequence[Tensor], style: Style) -> None:
    """Let lazy layers, if there are any, see their inputs once: they find their own channels."""
    if not any(is_lazy(p) for p in module.parameters()):
        return
    device = next(module.parameters()).device
    inputs = [torch.rand(v.shape, device=device) for v in values]
    with torch.no_grad(), evaluating(module):
        module(*arguments(inputs, style))


def _styles(module: nn.Module, case: _Case) -> list[Style]:
    """How `forward` may want its inputs, the likeliest first."""
    if len(case.values) == 1:
        return ["map", "list"]
    signature = signature_of(module.forward)
    parameters = signature.parameters.values() if signature is not None else ()
    required = [p for p in parameters if p.default is p.empty]
    wants_each = len(required) > 1 or any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return ["spread", "list"] if wants_each else ["list", "spread"]


def _wrong_output(output: object, is_image: bool) -> str:
    """What is neither a map nor maps, in words; a backbone's list is looked at where its slots are made."""
    if is_image and isinstance(output, (list, tuple, Mapping)):
        return ""
    maps = list(output.values()) if isinstance(output, Mapping) else output
    maps = [maps] if isinstance(maps, Tensor) else maps
    least = 2 if isinstance(output, Mapping) else 1
    if isinstance(maps, (list, tuple)) and len(maps) >= least and all(map(is_map, maps)):
        return ""
    advice = "Return one map, or a list of maps."
    if isinstance(output, Mapping) and output:
        advice = f"Return the map itself, {next(iter(output))!r} of that dictionary."
    return f"returns {told(output)}, expected a map (B, C, H, W) or a list of maps. {advice}"


def _is_loose(settled: Settled, inputs: Inputs) -> bool:
    """Whether the row's width was dropped though nothing of that width goes in or comes out."""
    reading = settled.reading
    if not reading.drops_width:
        return False
    widths = {*inputs.channels, sum(inputs.channels), *(s[0] for s in shapes_of(settled.output))}
    return not {reading.width, reading.written} & widths


def _choose(case: _Case, fitting: Sequence[Settled]) -> Settled:
    """The first that uses the row's width as one; a warning where another means something else."""
    sound = [s for s in fitting if not _is_loose(s, case.inputs)]
    chosen, *others = sound or fitting[:1]
    if not sound:
        return chosen._replace(
            note=f"read as {chosen.text}; the row's {chosen.reading.written} is neither its input nor its output of "
            f"{shapes_of(chosen.output)[0][0]} channels and is not used. Leave it out, or name the argument that is meant."
        )
    if not others:
        return chosen
    first, second = _difference(case, chosen, others[0]), _difference(case, others[0], chosen)
    return chosen._replace(
        note=f"read as {chosen.text}, but {others[0].text} fits the row too. Write {first} for the first, {second} for "
        "the second."
    )


def _difference(case: _Case, this: Settled, other: Settled) -> str:
    """`{reduction: 16}`: the whole of what a row says by name so that `this` and not `other` is meant."""
    own, others = (_bound(case.layer.build, s.reading) or {} for s in (this, other))
    named = {a.name: a for a in read_constructor(case.layer.build).arguments}
    differing = {k: v for k, v in own.items() if k in named and others.get(k, _bound) != v}
    wanted = {k: v for k, v in differing.items() if v != named[k].default} or differing
    if this.reading.width is not None:
        outputs = {k: v for k, v in own.items() if k in named and named[k].role is Role.OUTPUT}
        wanted = {**outputs, **wanted}
    numbers = {k: as_row_number(named[k], v, case.row.scaling) for k, v in wanted.items()}
    return f"{{{', '.join(f'{k}: {_value(v)}' for k, v in numbers.items())}}}"


def call_text(layer: Layer, reading: Reading) -> str:
    """`CBAM(c1=256, reduction=16)`, defaults among them; as given where the call does not bind."""
    bound = _bound(layer.build, reading)
    name = layer.name.rpartition(".")[2]
    if bound is None:
        bound = {**{f"#{i}": v for i, v in enumerate(reading.args)}, **reading.kwargs}
    words = (f"{'' if k.startswith(('*', '#')) else f'{k}='}{_value(v)}" for k, v in bound.items())
    return f"{name}({', '.join(words)})"


def _bound(build: Callable[..., Any], reading: Reading) -> dict[str, Any] | None:
    """Every argument of the call by name, defaults among them; those of `*args` as `*0`, `*1`."""
    signature = signature_of(build)
    if signature is None:
        return None
    try:
        call = signature.bind(*reading.args, **reading.kwargs)
    except TypeError:
        return None
    call.apply_defaults()
    found: dict[str, Any] = {}
    for name, value in call.arguments.items():
        kind = signature.parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            found.update({f"*{i}": v for i, v in enumerate(value)})
        elif kind is Parameter.VAR_KEYWORD:
            found.update(value)
        else:
            found[name] = value
    return found


def _value(value: object) -> str:
    if inspect.isroutine(value) or inspect.isclass(value):
        return str(value.__name__)
    return repr(value)


def _unfit(case: _Case, constructor: Constructor, failures: Sequence[_Failure]) -> LayerError:
    """Nothing fits: one call is told as it is, of several the one that got furthest."""
    seen = list({f.text: f for f in failures if f.stage != "bind"}.values())
    own = f"{case.layer.name}{shown(case.layer.build)}"
    says = f"Channels and repeats come from the parser; a row says {usage(constructor)}."
    if not seen:
        return LayerError(f"got {case.row.text}, which {own} does not take. {says}")
    shape = brief([s for v in case.values for s in shapes_of(v)])
    stages = ("build", "run", "output")
    first = max(seen, key=lambda f: stages.index(f.stage))
    if first.stage == "output":
        return LayerError(first.reason)
    if len({f.reason for f in seen}) == 1:  # whatever the call, it ends there
        if first.stage == "run":
            return LayerError(f"does not fit its input of shape {shape} - {first.reason}")
        return LayerError(f"cannot be built as {first.text} - {first.reason}")
    shown_calls = [first, *(f for f in seen if f is not first)][:MOST_TOLD]
    tried = "; ".join(f"{f.text}: {f.reason.rstrip('.')}" for f in shown_calls)
    more = f" ({len(seen) - MOST_TOLD} more were tried)" if len(seen) > MOST_TOLD else ""
    return LayerError(
        f"no call of {own} fits an input of shape {shape} - tried {tried}{more}. {says}"
    )
