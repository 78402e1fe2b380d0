"""The table of a model: one line a row, totals of the training and the deployed form, GFLOPs and memory at a size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.meta import PeakMemory, run_for_real, run_on_meta


class Totals(NamedTuple):
    """Size of a model.

    Attributes:
        params: number of parameters.
        gflops: 1e-9 x floating-point operations (2 x multiply-adds) for one image.
        memory: MiB of weights and maps that are needed at a time for one image, at most.
    """

    params: int
    gflops: float
    memory: float = 0.0


def count_params(module: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(p.numel() for p in module.parameters())


def measure(model: nn.Module, imgsz: tuple[int, int]) -> Totals:
    """Size of `model` as it stands, counted operation by operation for one image of size `imgsz`.

    On the meta device, or with numbers where code asks for values.
    """
    image = torch.empty(1, getattr(model, "channels", 3), *imgsz, device="meta")
    try:
        return _count(model, image, run_on_meta)
    except (RuntimeError, TypeError) as error:
        if "meta" not in str(error).lower():
            raise
        return _count(model, image, run_for_real)


def _count(model: nn.Module, image: Tensor, run: Callable[..., Any]) -> Totals:
    from torch.utils.flop_counter import FlopCounterMode  # brings a compiler along

    with FlopCounterMode(display=False) as counter, PeakMemory() as memory:
        run(model, image)
    gflops = counter.get_total_flops() / 1e9
    return Totals(count_params(model), gflops, memory.peak / 2**20)


def row_records(model: Any) -> list[dict[str, Any]]:
    """The rows as plain data: index, from, n, params, module, args, shape, stride."""
    return [
        {
            "index": row.index, "from": row.source, "n": row.repeats, "params": count_params(module),
            "module": row.module, "args": row.args, "shape": [list(shape) for shape in row.shape if len(shape) > 1],
            "stride": list(row.strides),
        }
        for row, module in zip(model.rows, model.model, strict=True)
    ]  # fmt: skip


def format_table(model: Any) -> str:
    """The rows as text."""
    lines = [
        f"{'':>4}{'from':>20}{'n':>4}{'params':>12}  {'module':<24}{'arguments':<44}{'output':<26}stride"
    ]
    for record in row_records(model):
        shapes = [_shape(shape) for shape in record["shape"]]
        strides = record["stride"]
        first = shapes[0] if shapes else "-"
        args = _shorten(record["args"])
        lines.append(
            f"{record['index']:>4}{record['from']!s:>20}{record['n']:>4}{record['params']:>12,}  {record['module']:<24}"
            f"{args:<44}{first:<26}{strides[0] if strides and strides[0] else '-'}"
        )
        rest = zip(shapes[1:], strides[1:] if len(strides) > 1 else strides * len(shapes))
        lines += [f"{'':>108}{shape:<26}{stride or '-'}" for shape, stride in rest]
        if args != record["args"] and record["args"].startswith(f"{record['module']}("):
            lines.append(f"{'':>40}  is {record['args']}")  # how a pasted class is read, whole
    return "\n".join(line.rstrip() for line in lines)


def _shape(shape: list[int]) -> str:
    return " x ".join(map(str, shape))


def _shorten(text: str, limit: int = 42) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
