"""EMO, a backbone of inverted residual mobile blocks (Zhang et al., ICCV 2023, arXiv 2301.01146).

Every block is one iRMB (the paper's Fig. 2): a norm, window attention on the *unexpanded* map in
the last two stages, an expanding 1x1 convolution `v`, a depthwise convolution with a skip around
it, squeeze-and-excitation where the form has it, a projecting 1x1 convolution, and a residual.

Letters: B batch, C channels, H height, W width, N heads, D channels of a head, and R, S the number
of windows in a column and in a row.
"""

from __future__ import annotations

import itertools
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.layers import DropPath, LayerNorm2d, init_trunc_normal, linear_rates
from models.registry import LayerError, backbone, register
from utils.errors import CheckpointError

Form = Literal["paper", "se"]

WINDOW = 7
EPS = 1e-6
CLASSIFIER = ("head.", "pre_head.")


class Size(NamedTuple):
    """One row of the paper's table of models; four entries are the four stages."""

    depths: tuple[int, int, int, int]
    widths: tuple[int, int, int, int]
    expansions: tuple[float, float, float, float]
    head_widths: tuple[int, int, int, int]
    drop_path: float
    stem: int = 24
    kernels: tuple[int, int, int, int] = (3, 3, 5, 5)


SIZES = {
    "1M": Size((2, 2, 8, 3), (32, 48, 80, 168), (2, 2.5, 3, 3.5), (16, 16, 20, 21), 0.04036),
    "2M": Size((3, 3, 9, 3), (32, 48, 120, 200), (2, 2.5, 3, 3.5), (16, 16, 20, 20), 0.05),
    "5M": Size((3, 3, 9, 3), (48, 72, 160, 288), (2, 3, 4, 4), (24, 24, 32, 32), 0.05),
    "6M": Size((3, 3, 9, 3), (48, 72, 160, 320), (2, 3, 4, 5), (16, 24, 20, 32), 0.05),
}


def strided_windows(x: Tensor, heads: int) -> Tensor:
    """Cut a map into windows that take every R-th row and every S-th column.

    With 14 x 14 and windows of 7, R = S = 2: window (0, 0) holds the rows and columns 0, 2, ..., 12
    and window (1, 0) the rows 1, 3, ..., 13. So each window sees the whole map.

    Args:
        x: (B, N * D, 7R, 7S), N being `heads`.

    Returns:
        (B * R * S, N, 49, D), the windows of an image in order of (R, S).
    """
    return rearrange(x, "b (n d) (h r) (w s) -> (b r s) n (h w) d", n=heads, h=WINDOW, w=WINDOW)


def merge_windows(windows: Tensor, rows: int, columns: int) -> Tensor:
    """Undo `strided_windows`: (B * R * S, N, 49, D) becomes (B, N * D, 7R, 7S)."""
    return rearrange(
        windows, "(b r s) n (h w) d -> b (n d) (h r) (w s)", r=rows, s=columns, h=WINDOW
    )


class ConvNorm(nn.Module):
    """A convolution, and a BatchNorm behind it where `norm` says so."""

    def __init__(
        self, channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1,
        groups: int = 1, *, bias: bool = False, norm: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = nn.Conv2d(
            channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels, eps=EPS) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation of full width, the paper's: only stage 0 has it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, channels, 1)
        self.conv_expand = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * self.conv_expand(F.silu(self.conv_reduce(squeezed))).sigmoid()


class BranchedExcite(nn.Module):
    """Squeeze-and-excitation of the second form, without biases.

    Four parallel branches `Linear(C, C/4) + ReLU`, concatenated, into `Linear(C, C) + Sigmoid`. The
    branches read the same input, so their four matrices are the rows of one: `branches.weight`.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branches = nn.Linear(channels, channels, bias=False)
        self.merge = nn.Linear(channels, channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.merge(F.relu(self.branches(x.mean((2, 3))))).sigmoid()
        return x * weights[:, :, None, None]


class Block(nn.Module):
    """One inverted residual mobile block (iRMB).

    Args:
        channels: of the input.
        out_channels: of the output; a residual is added where it equals `channels` at stride 1.
        hidden: channels of the expanded map.
        norm: the layer in front, "batch", "layer" or None.
        activation: behind the expansion, "silu" or "gelu"; the depthwise convolution has SiLU.
        head_width: channels of an attention head; 0 leaves attention out.
        skip: whether there is a skip around the depthwise convolution and around the block.
        expand: whether there is an expanding convolution `v`.
        excite: squeeze-and-excitation of the hidden map.
        drop_path: rate of the block's residual branch.
    """

    def __init__(
        self, channels: int, out_channels: int, hidden: int, *, kernel_size: int = 3,
        stride: int = 1, norm: str | None = "batch", activation: str = "silu", head_width: int = 0,
        skip: bool = True, expand: bool = True, excite: nn.Module | None = None,
        drop_path: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.skip, self.head_width = skip, head_width
        self.norm = _norm(norm, channels)
        if head_width:
            self.qk = ConvNorm(channels, 2 * channels, bias=True)
        self.v = ConvNorm(channels, hidden, bias=True) if expand else nn.Identity()
        self.act = _activation(activation) if expand else nn.Identity()
        self.conv_local = ConvNorm(hidden, hidden, kernel_size, stride, hidden, norm=True)
        self.se = excite or nn.Identity()
        self.proj = ConvNorm(hidden, out_channels)
        self.drop_path = DropPath(drop_path)

    def attend(self, x: Tensor) -> Tensor:
        """Window attention whose values are the unexpanded map itself (attn_pre), (B, C, H, W).

        The map is padded below and to the right to a multiple of 7 and cropped afterwards. The
        padding takes part in the softmax: that is the published design, and its weights rely on it.
        """
        _, _, height, width = x.shape
        # Written so that the padded size is 7 * rows for a symbolic height too: exporters can then
        # prove that it divides by the window.
        rows, columns = (height + WINDOW - 1) // WINDOW, (width + WINDOW - 1) // WINDOW
        x = F.pad(x, (0, WINDOW * columns - width, 0, WINDOW * rows - height))
        joined = torch.cat((self.qk(x), x), 1)
        windows = strided_windows(joined, joined.shape[1] // self.head_width)
        query, key, value = windows.chunk(3, 1)
        attended = F.scaled_dot_product_attention(query, key, value)
        return merge_windows(attended, rows, columns)[:, :, :height, :width]

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        x = self.norm(x)
        if self.head_width:
            x = self.attend(x)
        x = self.act(self.v(x))
        local = self.se(F.silu(self.conv_local(x)))
        x = self.proj(x + local if self.skip else local)
        return shortcut + self.drop_path(x) if self.skip else x


class PatchEmbedding(nn.Module):
    """The strided convolution in front, without activation; `convs.0` as in published weights."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.convs = nn.ModuleList([nn.Sequential(conv, nn.BatchNorm2d(channels, eps=EPS))])

    def forward(self, images: Tensor) -> Tensor:
        return self.convs[0](images)


class EMO(nn.Module):
    """Five feature maps at strides 2, 4, 8, 16 and 32; the last one is normalised.

    Args:
        size: depths and widths.
        form: "paper", or "se": squeeze-and-excitation of four branches in every block.
        drop_path: rate of the last block, growing linearly from 0; None is the size's own.
    """

    def __init__(self, size: Size, form: Form = "paper", drop_path: float | None = None) -> None:
        super().__init__()
        self.channels = [size.stem, *size.widths]
        self.strides = [2, 4, 8, 16, 32]
        excite = BranchedExcite(size.stem) if form == "se" else SqueezeExcite(size.stem)
        first = Block(
            size.stem, size.stem, size.stem, norm=None, expand=False, skip=False, excite=excite
        )
        self.stage0 = nn.ModuleList([PatchEmbedding(size.stem), first])
        rates = linear_rates(size.drop_path if drop_path is None else drop_path, sum(size.depths))
        ends = list(itertools.accumulate(size.depths, initial=0))
        self.stage1, self.stage2, self.stage3, self.stage4 = (
            nn.ModuleList(_stage(size, stage, form, rates[ends[stage] : ends[stage + 1]]))
            for stage in range(4)
        )
        self.norm = LayerNorm2d(size.widths[3], eps=EPS)
        init_trunc_normal(self)

    def stages(self, images: Tensor) -> list[Tensor]:
        """The five maps of (B, 3, H, W) images, without the final norm."""
        x, features = images, []
        for blocks in (self.stage0, self.stage1, self.stage2, self.stage3, self.stage4):
            for block in blocks:
                x = block(x)
            features.append(x)
        return features

    def forward(self, images: Tensor) -> list[Tensor]:
        features = self.stages(images)
        features[-1] = self.norm(features[-1])
        return features


def _norm(kind: str | None, channels: int) -> nn.Module:
    if kind is None:
        return nn.Identity()
    return nn.BatchNorm2d(channels, eps=EPS) if kind == "batch" else LayerNorm2d(channels, eps=EPS)


def _activation(name: str) -> nn.Module:
    return {"silu": nn.SiLU, "gelu": nn.GELU}[name]()


def _stage(size: Size, stage: int, form: Form, rates: list[float]) -> list[Block]:
    """The blocks of one stage: the first halves the map with twice the expansion."""
    late = stage >= 2
    blocks, channels, width = [], (size.stem, *size.widths)[stage], size.widths[stage]
    for index, rate in enumerate(rates):
        first = index == 0
        hidden = int(channels * size.expansions[stage] * (2 if first else 1))
        blocks.append(Block(
            channels, width, hidden, kernel_size=size.kernels[stage], stride=2 if first else 1,
            norm="layer" if late else "batch", activation="gelu" if late else "silu",
            head_width=size.head_widths[stage] if late and not first else 0, skip=not first,
            excite=BranchedExcite(hidden) if form == "se" else None, drop_path=rate,
        ))  # fmt: skip
        channels = width
    return blocks


def load_official(model: EMO, path: str | Path) -> None:
    """Load published EMO weights in place; classifier keys are ignored.

    Under the second form the squeeze-and-excitation layers keep their initialisation, since no
    published file has them; every other tensor must be there with its shape.

    Raises:
        CheckpointError: the file cannot be read, or tensors are missing, unknown or misshapen.
    """
    state = _read_state(Path(path))
    branched = any(isinstance(module, BranchedExcite) for module in model.modules())
    ignored = (*CLASSIFIER, "stage0.1.se.") if branched else CLASSIFIER
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    own = {k: v for k, v in model.state_dict().items() if not (branched and ".se." in k)}
    problems = [f"{key} is missing" for key in own if key not in state]
    problems += [f"{key} is unknown" for key in state if key not in own]
    problems += [
        f"{key} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}"
        for key, value in own.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise CheckpointError(
            f"{path}: does not fit this EMO - {'; '.join(problems[:3])}{more}. "
            "Give the weights of the same size, or False for none."
        )
    model.load_state_dict(state, strict=False)


def _read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by key: plain, or under "net", "model" or "state_dict"."""
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file. Give the path of EMO weights, or False for none."
        )
    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, EOFError, OSError) as error:
        is_foreign = isinstance(
            error, pickle.UnpicklingError
        )  # torch's own text advises unsafe loading
        reason = "it holds more than tensors" if is_foreign else str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: cannot be read as weights - {reason}") from error
    for key in ("net", "model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds {type(content).__name__}, expected tensors by name.")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _build(
    size: str, weights: str | Path | bool | None, form: str | None, drop_path: float | None
) -> EMO:
    """An EMO of `size`; see `EMO_1M` for the arguments."""
    if form not in (None, "paper", "se"):
        raise LayerError(f"form - got {form!r}, expected 'paper' or 'se'")
    if weights is True or not isinstance(weights, (str, Path, bool, type(None))):
        raise LayerError(
            f"weights - got {weights!r}, expected the path of a file, or False for none"
        )
    if form is None:
        form = "se" if weights is None else "paper"
    model = EMO(SIZES[size], "se" if form == "se" else "paper", drop_path)
    if weights:
        load_official(model, weights)
    return model


@register(backbone)
def EMO_1M(  # noqa: N802 - the name in published configs
    weights: str | Path | bool | None = None, *, form: str | None = None,
    drop_path: float | None = None,
) -> EMO:  # fmt: skip
    """EMO with 1.2 M parameters.

    There are two published ways to write this layer into a YAML, and they mean different networks:
    `EMO_1M, [False]` (or a path) is the paper's, and `EMO_1M, []`, whose constructor takes no
    weights, is the second form. So `form` follows from whether `weights` is given, unless it is
    named: write `{form: paper}` or `{form: se}` and nothing is left to guess.

    Args:
        weights: path of published weights; False for none. Left out, it selects the second form.
        form: "paper", or "se" for squeeze-and-excitation of four branches in every block.
        drop_path: stochastic depth of the last block; None is the paper's.

    Raises:
        LayerError: `form` or `weights` is none of these.
        CheckpointError: the weights cannot be read or do not fit.
    """
    return _build("1M", weights, form, drop_path)


@register(backbone)
def EMO_2M(  # noqa: N802 - the name in published configs
    weights: str | Path | bool | None = None, *, form: str | None = None,
    drop_path: float | None = None,
) -> EMO:  # fmt: skip
    """EMO with 2.2 M parameters; arguments as for `EMO_1M`."""
    return _build("2M", weights, form, drop_path)


@register(backbone)
def EMO_5M(  # noqa: N802 - the name in published configs
    weights: str | Path | bool | None = None, *, form: str | None = None,
    drop_path: float | None = None,
) -> EMO:  # fmt: skip
    """EMO with 4.8 M parameters; arguments as for `EMO_1M`."""
    return _build("5M", weights, form, drop_path)


@register(backbone)
def EMO_6M(  # noqa: N802 - the name in published configs
    weights: str | Path | bool | None = None, *, form: str | None = None,
    drop_path: float | None = None,
) -> EMO:  # fmt: skip
    """EMO with 5.8 M parameters; arguments as for `EMO_1M`."""
    return _build("6M", weights, form, drop_path)
