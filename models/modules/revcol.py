"""RevCol, reversible columns (Cai et al., ICLR 2023, arXiv 2212.11696).

A network of columns, each of four ConvNeXt levels at strides 4, 8, 16 and 32. With `x_l` for level
l of this column and `p_l` for the same level of the column before (the paper's multi-level
reversible unit):

    x_l = F_l(down(x_{l-1}) + up(p_{l+1})) + alpha_l * p_l,        x_{-1} = the stem

In the first column there is no p. Training needs only the columns' outputs: what happens inside a
level is rebuilt from `x_{l-1}` and `p_{l+1}` when its gradient is due, and `p_l` itself can be had
from `x_l` by the same equation (`save_memory="sparse"`).

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from models.blocks.layers import ChannelNorm, init_trunc_normal, keep_scale, linear_rates
from models.registry import LayerError, backbone, register
from utils.device import AutocastState

LEVELS = 4
ALPHA_START = 0.5
ALPHA_FLOOR = 1e-3
LAYER_SCALE = 1e-6
EXPANSION = 4
EPS = 1e-6
# Sparse mode keeps every third column. Each rebuilt one divides by alpha, level by level, so
# rounding errors grow about sevenfold a column at alpha = 0.5: across two columns gradients stay
# within 1e-4 of plain ones in float32, across seven they are off by percents, across fifteen they
# are noise (benchmarks/revcol_memory.py). Keeping the last column alone is therefore no mode.
SPARSE_SPAN = 3
SMALLEST_DIVISOR = 0.1
"""Maps are not worked back through smaller alphas: rounding grows by 1 / alpha at every step."""


class Size(NamedTuple):
    """One row of the paper's table of models."""

    channels: tuple[int, int, int, int]
    depths: tuple[int, int, int, int]
    columns: int
    drop_path: float


SIZES = {
    "tiny": Size((64, 128, 256, 512), (2, 2, 4, 2), 4, 0.1),
    "small": Size((64, 128, 256, 512), (2, 2, 4, 2), 8, 0.3),
    "base": Size((72, 144, 288, 576), (1, 1, 3, 2), 16, 0.4),
    "large": Size((128, 256, 512, 1024), (1, 2, 6, 2), 8, 0.5),
    "xlarge": Size((224, 448, 896, 1792), (1, 2, 6, 2), 8, 0.5),
}


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, two linear layers, layer scale, residual (Liu et al., 2022)."""

    def __init__(self, channels: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.dwconv = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.pwconv1 = nn.Linear(channels, EXPANSION * channels)
        self.pwconv2 = nn.Linear(EXPANSION * channels, channels)
        self.gamma: nn.Parameter | None = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold the layer scale into the linear layer before it; in place, idempotent."""
        if self.gamma is not None:
            self.pwconv2.weight.mul_(self.gamma[:, None])
            self.pwconv2.bias.mul_(self.gamma)
            self.gamma = None

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """`noise`: one uniform number per sample for drop path, (B,), or None to drop nothing."""
        branch = self.dwconv(x).permute(0, 2, 3, 1)
        branch = self.pwconv2(F.gelu(self.pwconv1(self.norm(branch))))
        if self.gamma is not None:
            branch = branch * self.gamma
        branch = branch.permute(0, 3, 1, 2)
        if noise is not None and self.drop_path:
            branch = branch * keep_scale(noise, self.drop_path, branch.dtype)
        return x + branch


class Up(nn.Module):
    """A map of the next coarser level: channels by a linear layer, size by nearest neighbours."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.channel_reschedule = nn.Sequential(
            nn.Linear(channels, out_channels), nn.LayerNorm(out_channels, eps=EPS)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel_reschedule(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Fusion(nn.Module):
    """The sum of the finer level of this column and the coarser level of the previous one."""

    def __init__(self, channels: Sequence[int], level: int, first_column: bool) -> None:
        super().__init__()
        self.down: nn.Module = nn.Identity()
        self.up: nn.Module | None = None
        if level > 0:
            conv = nn.Conv2d(channels[level - 1], channels[level], 2, stride=2)
            self.down = nn.Sequential(conv, ChannelNorm(channels[level]))
        if level < LEVELS - 1 and not first_column:
            self.up = Up(channels[level + 1], channels[level])

    def forward(self, below: Tensor, above: Tensor | None) -> Tensor:
        x = self.down(below)
        return x if self.up is None or above is None else x + self.up(above)


class Level(nn.Module):
    """One level of a column, without its reversible connection: F_l with its fusion."""

    def __init__(
        self, channels: Sequence[int], level: int, rates: Sequence[float], first_column: bool
    ) -> None:
        super().__init__()
        self.fusion = Fusion(channels, level, first_column)
        self.blocks = nn.ModuleList(ConvNeXtBlock(channels[level], rate) for rate in rates)

    def forward(self, below: Tensor, above: Tensor | None, noise: Tensor | None) -> Tensor:
        """`noise`: uniform numbers for drop path, (blocks of this level, B), or None."""
        x = self.fusion(below, above)
        for index, block in enumerate(self.blocks):
            x = block(x, None if noise is None else noise[index])
        return x


class Column(nn.Module):
    """Four levels and the strengths `alpha0` .. `alpha3` of their reversible connections.

    The first column has nothing to connect to: its alphas exist for the published layout alone and
    do not ask for gradients.
    """

    def __init__(
        self, channels: Sequence[int], depths: Sequence[int], rates: Sequence[float], first: bool
    ) -> None:
        super().__init__()
        self.first, self.depths = first, tuple(depths)
        for level in range(LEVELS):
            start = sum(depths[:level])
            own_rates = rates[start : start + depths[level]]
            self.add_module(f"level{level}", Level(channels, level, own_rates, first))
            alpha = torch.full((1, channels[level], 1, 1), ALPHA_START)
            self.register_parameter(f"alpha{level}", nn.Parameter(alpha, requires_grad=not first))

    def levels(self) -> list[Level]:
        """The four levels, finest first."""
        return [getattr(self, f"level{level}") for level in range(LEVELS)]

    def alphas(self) -> list[nn.Parameter]:
        """The connections' learned strengths; none in the first column."""
        return [] if self.first else [getattr(self, f"alpha{level}") for level in range(LEVELS)]

    def split_noise(self, noise: Tensor | None) -> list[Tensor | None]:
        """The rows of drop path's noise, (blocks, B), that belong to each level."""
        return [None] * LEVELS if noise is None else list(noise.split(self.depths))

    def forward(
        self, stem: Tensor, previous: Sequence[Tensor], noise: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The four maps of this column from those of the previous one (empty for the first)."""
        outputs: list[Tensor] = []
        below, alphas = stem, self.alphas()
        for index, (level, own) in enumerate(zip(self.levels(), self.split_noise(noise))):
            below = level(below, _above(previous, index), own)
            if previous:
                below = below + keep_from_zero(alphas[index]) * previous[index]
            outputs.append(below)
        return tuple(outputs)


def keep_from_zero(alpha: Tensor) -> Tensor:
    """`alpha` with its magnitude raised to 1e-3 where it is smaller; zero counts as positive.

    The gradient passes as if nothing had been raised, so that a strength which came near zero can
    leave it again.
    """
    raised = torch.where(alpha < 0, alpha.clamp(max=-ALPHA_FLOOR), alpha.clamp(min=ALPHA_FLOOR))
    return raised.detach() + (alpha - alpha.detach())


def _above(previous: Sequence[Tensor], level: int) -> Tensor | None:
    """The map that `up` of a level takes: the next coarser one of the previous column."""
    return previous[level + 1] if previous and level + 1 < LEVELS else None


class Kept(NamedTuple):
    """Which maps a column saves for its backward pass; the others are rebuilt by then."""

    previous: bool
    outputs: bool


class Rebuilt:
    """What a column's backward pass leaves for the column before: the maps it has rebuilt."""

    outputs: Sequence[Any] = ()


class ReversibleColumn(torch.autograd.Function):
    """One column that keeps nothing of its inside between forward and backward.

    Saved are the stem, the previous column's maps and its own (each column's output is the next
    one's input, so a column adds just its four maps), or fewer as `kept` says. The backward pass
    goes from the coarsest level to the finest, runs one at a time again and differentiates it.
    Parameters come in as arguments, so that the outer graph knows them (DistributedDataParallel,
    hooks, frozen parts), and the levels run on detached copies of them.

    Arguments of `apply`: column; kept; what is rebuilt, shared by all columns of a pass; drop
    path's noise; stem; previous maps and alphas, four each or none; parameters of the levels.
    """

    @staticmethod
    def forward(
        ctx: Any, column: Column, kept: Kept, rebuilt: Rebuilt, noise: Tensor | None,
        stem: Tensor, *tensors: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        joined = 0 if column.first else LEVELS
        previous = tensors[:joined]
        ctx.column, ctx.rebuilt, ctx.precision = (
            column,
            rebuilt,
            AutocastState.now(stem.device.type),
        )
        with ctx.precision.again():
            outputs = column(stem, previous, noise)
        kept_previous = previous if kept.previous else ()
        kept_outputs = outputs if kept.outputs else ()
        ctx.counts = (len(kept_previous), len(kept_outputs), joined)
        ctx.save_for_backward(noise, stem, *kept_previous, *kept_outputs, *tensors[joined:])
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        noise, stem, *rest = ctx.saved_tensors
        previous, outputs, alphas = ([rest.pop(0) for _ in range(n)] for n in ctx.counts)
        outputs = outputs or ctx.rebuilt.outputs
        previous = previous or [None] * len(alphas)
        saved = iter(rest)
        passes = [
            LevelPass(level, {name: next(saved) for name, _ in level.named_parameters()}, own)
            for level, own in zip(ctx.column.levels(), ctx.column.split_noise(noise))
        ]
        gradients = _column_backward(passes, ctx.precision, stem, outputs, previous, alphas, grads)
        ctx.rebuilt.outputs = () if ctx.counts[0] else previous
        return (None, None, None, None, *gradients)


class LevelPass(NamedTuple):
    """What a level needs beside its maps to run again: its parameters and drop path's noise."""

    level: Level
    parameters: dict[str, Tensor]
    noise: Tensor | None

    def differentiate(
        self, precision: AutocastState, below: Tensor, above: Tensor | None, grad: Tensor
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Run the level once more, and pull `grad` back through it.

        Returns:
            The level's output, and the gradients of `below`, `above` and the parameters in their
            order; None for what needs none.
        """
        own = {name: _leaf(parameter) for name, parameter in self.parameters.items()}
        below, above = _leaf(below), None if above is None else _leaf(above)
        with torch.enable_grad(), precision.again():
            value = functional_call(self.level, own, (below, above, self.noise))
        inputs = [below, above, *own.values()]
        sources = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(value, sources, grad.to(value.dtype)) if sources else ())
        gradients = [None if t is None or not t.requires_grad else next(found) for t in inputs]
        return value.detach(), gradients


def _leaf(tensor: Tensor) -> Tensor:
    """`tensor` as the start of a graph of its own."""
    return tensor.detach().requires_grad_(tensor.requires_grad)


def _column_backward(
    passes: Sequence[LevelPass], precision: AutocastState, stem: Tensor, outputs: Sequence[Tensor],
    previous: list[Any], alphas: Sequence[Tensor], grads: Sequence[Tensor],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of stem, previous maps, alphas and parameters from those of a column's outputs.

    Maps of `previous` that are None are filled in through the reversible connection.
    """
    totals = list(grads)
    previous_grads: list[Any] = [None] * len(alphas)
    alpha_grads: list[Tensor | None] = [None] * len(alphas)
    parameter_grads: list[Tensor | None] = []
    stem_grad: Tensor | None = None
    for index in reversed(range(LEVELS)):
        below, above = (outputs[index - 1] if index else stem), _above(previous, index)
        value, (below_grad, above_grad, *own) = passes[index].differentiate(
            precision, below, above, totals[index]
        )
        parameter_grads = own + parameter_grads
        if index == 0:
            stem_grad = below_grad
        elif below_grad is not None:
            totals[index - 1] = totals[index - 1] + below_grad
        if above_grad is not None:
            previous_grads[index + 1] = previous_grads[index + 1] + above_grad
        if alphas:
            alpha = keep_from_zero(alphas[index])
            if previous[index] is None:
                previous[index] = ((outputs[index] - value) / alpha).requires_grad_()
            previous_grads[index] = totals[index] * alpha
            products = totals[index] * previous[index].detach()
            alpha_grads[index] = products.sum((0, 2, 3), keepdim=True)
    return [stem_grad, *previous_grads, *alpha_grads, *parameter_grads]


class RevCol(nn.Module):
    """Four maps at strides 4, 8, 16 and 32: the last column's.

    Args:
        size: widths, depths, number of columns.
        save_memory: what training keeps for its backward pass. True: the columns' outputs, which
            gives plain autograd's gradients; "sparse": those of every third column, and those before
            an alpha below 0.1, which gives them but for rounding in float32; False: everything, as
            plain autograd. Evaluation, export and `torch.compile` keep out of it.
        drop_path: rate of a column's last block, growing linearly from 0; None is the size's own.

    Raises:
        LayerError: `save_memory` is none of these.
    """

    def __init__(
        self, size: Size, save_memory: bool | str = True, drop_path: float | None = None
    ) -> None:
        super().__init__()
        if save_memory not in (True, False, "sparse"):
            raise LayerError(f"save_memory - got {save_memory!r}, expected True, False or 'sparse'")
        self.save_memory = save_memory
        self.span = SPARSE_SPAN if save_memory == "sparse" else 1
        self.channels, self.strides = list(size.channels), [4, 8, 16, 32]
        self.columns, self.blocks = size.columns, sum(size.depths)
        self.drop_path = size.drop_path if drop_path is None else drop_path
        stem = nn.Conv2d(3, size.channels[0], 4, stride=4)
        self.stem = nn.Sequential(stem, ChannelNorm(size.channels[0]))
        rates = linear_rates(self.drop_path, self.blocks)
        for index in range(size.columns):
            column = Column(size.channels, size.depths, rates, first=index == 0)
            self.add_module(f"subnet{index}", column)
        init_trunc_normal(self)

    def forward(self, images: Tensor) -> list[Tensor]:
        stem = self.stem(images)
        noise = self._noise(stem)
        run = self._reversible if self._trains_reversibly() else self._plain
        return list(run(stem, [None] * self.columns if noise is None else list(noise)))

    def _plain(self, stem: Tensor, noise: list[Tensor | None]) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = ()
        for index, own in enumerate(noise):
            column: Column = getattr(self, f"subnet{index}")
            maps = column(stem, maps, own)
        return maps

    def _reversible(self, stem: Tensor, noise: list[Tensor | None]) -> tuple[Tensor, ...]:
        maps: tuple[Tensor, ...] = ()
        rebuilt = Rebuilt()
        for index, own in enumerate(noise):
            column: Column = getattr(self, f"subnet{index}")
            kept = Kept(self._keeps(index - 1), self._keeps(index))
            parameters = (p for level in column.levels() for p in level.parameters())
            maps = ReversibleColumn.apply(
                column, kept, rebuilt, own, stem, *maps, *column.alphas(), *parameters
            )
        return maps

    def _keeps(self, index: int) -> bool:
        """Whether the outputs of column `index` are saved: every `span`-th from the last, and those that could only be
        found again by dividing by almost nothing."""
        if (self.columns - 1 - index) % self.span == 0:
            return True
        alphas = getattr(self, f"subnet{index + 1}").alphas()
        known = (alpha.detach() for alpha in alphas if not alpha.is_meta)
        return any(float(alpha.abs().min()) < SMALLEST_DIVISOR for alpha in known)

    def _trains_reversibly(self) -> bool:
        """Whether this pass is a training step outside of export and compilation."""
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
        return bool(self.save_memory) and self.training and torch.is_grad_enabled() and not traced

    def _noise(self, stem: Tensor) -> Tensor | None:
        """Drop path's uniform numbers for the whole pass, (columns, blocks, B).

        Drawn at once and in front: a level that runs again finds its numbers instead of drawing
        them again, so no random state has to be put back, and all modes draw the same.
        """
        if not self.training or self.drop_path == 0.0:
            return None
        return torch.rand(self.columns, self.blocks, stem.shape[0], device=stem.device)


@register(backbone)
def revcol_tiny(save_memory: bool | str = True, *, drop_path: float | None = None) -> RevCol:
    """RevCol with 4 columns and 30 M parameters; the arguments are `RevCol`'s."""
    return RevCol(SIZES["tiny"], save_memory, drop_path)


@register(backbone)
def revcol_small(save_memory: bool | str = True, *, drop_path: float | None = None) -> RevCol:
    """RevCol with 8 columns and 60 M parameters; the arguments are `RevCol`'s."""
    return RevCol(SIZES["small"], save_memory, drop_path)


@register(backbone)
def revcol_base(save_memory: bool | str = True, *, drop_path: float | None = None) -> RevCol:
    """RevCol with 16 columns and 138 M parameters; the arguments are `RevCol`'s."""
    return RevCol(SIZES["base"], save_memory, drop_path)


@register(backbone)
def revcol_large(save_memory: bool | str = True, *, drop_path: float | None = None) -> RevCol:
    """RevCol with 8 wide columns and 272 M parameters; the arguments are `RevCol`'s."""
    return RevCol(SIZES["large"], save_memory, drop_path)


@register(backbone)
def revcol_xlarge(save_memory: bool | str = True, *, drop_path: float | None = None) -> RevCol:
    """RevCol with 8 very wide columns and 832 M parameters; the arguments are `RevCol`'s."""
    return RevCol(SIZES["xlarge"], save_memory, drop_path)
