"""A tensor of another shape that still says what the model wants: what can be made to fit, and how.

First convolutions are brought to another number of image channels, tables of positions and of relative positions to another
grid, patch kernels to another patch; timm's own functions do the interpolation, so that the numbers are those that timm
itself would make. Letters: O outputs, I inputs, N cells of a grid, K heads, C channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

RGB = 3
MOST_GIVEN, MOST_WANTED = (
    4,
    16,
)  # channels of an image, in weights and in a model; more inputs are no image's
FIRST = "first convolution"
POSITIONS = "position table"
WINDOW = "window table"
PATCH = "patch kernel"
LAYOUT = "linear layer"
LINES = (
    "rel_pos_h",
    "rel_pos_w",
    "height_rel",
    "width_rel",
)  # a row for each distance along one side


def kind_of_change(key: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What a tensor of shape `given` is to one of shape `wanted`: one of the kinds above, "" if it does not fit."""
    name, rank = key.rsplit(".", 1)[-1], len(wanted)
    if given == wanted:
        return ""
    if len(given) != rank:  # (O, I) and (O, I, 1, 1) are one layer
        pair = sorted((given, wanted), key=len)
        return LAYOUT if name == "weight" and pair[1] == (*pair[0], 1, 1) else ""
    if rank == 4 and name == "weight":
        is_square = given[2:] != wanted[2:] and given[:2] == wanted[:2] and wanted[1] == RGB
        if is_square and "patch" in key:
            return PATCH
        return FIRST if _reads_images(given, wanted) else ""
    if "pos_embed" in name and rank in (3, 4) and given[0] == wanted[0] == 1:
        has_channels = given[-1] == wanted[-1] or rank == 4 and given[1] == wanted[1]
        return POSITIONS if has_channels else ""  # (1, N, C), (1, H, W, C) or (1, C, H, W)
    if name == "relative_position_bias_table":
        heads = -1 if rank == 2 else 0
        return WINDOW if rank in (2, 3) and given[heads] == wanted[heads] else ""
    if name == "attention_biases" and rank == 2 and given[0] == wanted[0]:
        return WINDOW
    if name in LINES and rank == 2 and given[1] == wanted[1]:
        return WINDOW
    return ""


def _reads_images(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether two convolutions differ in nothing but the channels of their images, colour on one side."""
    from_rgb = given[1] == RGB and wanted[1] <= MOST_WANTED
    to_rgb = wanted[1] == RGB and given[1] <= MOST_GIVEN
    return (from_rgb or to_rgb) and given[0] == wanted[0] and given[2:] == wanted[2:]


def made_to_fit(
    kind: str,
    given: Tensor,
    wanted: Tensor,
    owner: nn.Module | None,
    imgsz: tuple[int, int] | None = None,
) -> Tensor | None:
    """`given` in the shape of `wanted`, None where the grid behind its numbers cannot be told.

    Args:
        kind: what `kind_of_change` says of the two.
        given: the file's tensor.
        wanted: the model's; of a table that has a class token only here the token stays as it is.
        owner: the module that holds it; tells a grid or window that is not square.
        imgsz: size (height, width) that the model was built for; tells the shape of a grid that its owner does not.
    """
    if kind == FIRST:
        return with_channels(given, wanted.shape[1])
    if kind == LAYOUT:
        return given.reshape(wanted.shape)
    if kind == PATCH:
        from timm.layers import resample_patch_embed

        return resample_patch_embed(given, list(wanted.shape[2:]))
    if kind == POSITIONS:
        return _positions(given, wanted, owner, imgsz)
    return _window(given, wanted, owner)


def with_channels(weight: Tensor, channels: int) -> Tensor:
    """A first convolution (O, I, H, W) for images of `channels`: summed for grey, else repeated and scaled.

    A grey image stands for three equal channels, so the sum gives just what the colour network gave for it. With more
    channels each gets the kernel of one of the I, and all are scaled by I / channels to keep the size of the output.
    """
    inputs = weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-channels // inputs), 1, 1)[:, :channels]
    return repeated * (inputs / channels)


def told(kind: str, given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    """What was done to a tensor of this kind, in words."""
    if kind == FIRST:
        how = "summed" if wanted[1] == 1 else "averaged" if wanted[1] < given[1] else "repeated"
        return f"first convolution {how} from {given[1]} to {wanted[1]} channels"
    if kind == LAYOUT:
        return "linear layer and 1x1 convolution taken as the same"
    return f"{kind} interpolated from {_cross(given)} to {_cross(wanted)}"


def _cross(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _positions(
    given: Tensor, wanted: Tensor, owner: Any, imgsz: tuple[int, int] | None
) -> Tensor | None:
    if wanted.ndim == 4:
        return _position_maps(given, wanted)
    from timm.layers import resample_abs_pos_embed

    new_size = _grid_of(owner, wanted.shape[1], imgsz)
    if new_size is None:
        return None
    tokens = wanted.shape[1] - new_size[0] * new_size[1]
    own = next((n for n in (tokens, 0, 1, 2) if _square(given.shape[1] - n)), None)
    old_size = None if own is None else _square(given.shape[1] - own)
    if own is None or old_size is None:
        return None
    grid = resample_abs_pos_embed(given[:, own:], list(new_size), list(old_size), 0)
    kept = given[:, :own] if own >= tokens else wanted[:, :tokens].to(given)
    return torch.cat((kept[:, :tokens], grid), 1)


def _position_maps(given: Tensor, wanted: Tensor) -> Tensor | None:
    """A table with a grid of its own: (1, H, W, C), (1, C, H, W), or (1, T, N, C) of T square blocks with N cells each."""
    same = [axis for axis in (1, 3) if given.shape[axis] == wanted.shape[axis]]
    if max(same, key=lambda axis: given.shape[axis]) == 1:
        return _between(given[0], wanted.shape[2:])[None]
    blocks, old, new = (_square(n) for n in (given.shape[1], given.shape[2], wanted.shape[2]))
    if len(same) == 2 and blocks and old and new:
        image = _blocks_to_map(given[0], blocks, old)
        size = (blocks[0] * new[0], blocks[1] * new[1])
        return _map_to_blocks(_between(image, size), blocks, new)[None]
    return _between(given[0].permute(2, 0, 1), wanted.shape[1:3]).permute(1, 2, 0)[None]


def _blocks_to_map(table: Tensor, blocks: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(T, N, C) to (C, H, W): blocks of cells side by side."""
    parts = table.unflatten(1, cells).unflatten(
        0, blocks
    )  # rows, columns, rows within, columns within, C
    return parts.permute(4, 0, 2, 1, 3).flatten(3, 4).flatten(1, 2)


def _map_to_blocks(grid: Tensor, blocks: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """The way back from `_blocks_to_map`."""
    parts = grid.unflatten(2, (blocks[1], cells[1])).unflatten(1, (blocks[0], cells[0]))
    return parts.permute(1, 3, 2, 4, 0).flatten(2, 3).flatten(0, 1)


def _grid_of(owner: Any, count: int, imgsz: tuple[int, int] | None) -> tuple[int, int] | None:
    """Height and width of the grid behind a table of `count` positions, class tokens among them perhaps."""
    grid = getattr(getattr(owner, "patch_embed", None), "grid_size", None)
    if isinstance(grid, (tuple, list)) and len(grid) == 2 and 0 <= count - grid[0] * grid[1] <= 8:
        return int(grid[0]), int(grid[1])
    for cells in (count, count - 1, count - 2):
        if imgsz is not None:
            height = round(math.sqrt(max(cells, 0) * imgsz[0] / imgsz[1]))
            if height and cells % height == 0 and height * imgsz[1] == cells // height * imgsz[0]:
                return height, cells // height
        if _square(cells):
            return _square(cells)
    return None


def _window(given: Tensor, wanted: Tensor, owner: Any) -> Tensor | None:
    """A table by relative position: (N, K), (K, H, W) or (K, N) with N cells of a grid, or a line (N, C)."""
    window = getattr(owner, "window_size", None)
    is_line = given.shape[1:] == wanted.shape[1:]
    if isinstance(window, (tuple, list)) and len(window) == 2 and (is_line or wanted.ndim == 3):
        from timm.layers import resize_rel_pos_bias_table

        try:
            return resize_rel_pos_bias_table(given, (window[0], window[1]), tuple(wanted.shape))
        except (ValueError, RuntimeError, AssertionError):  # the file's window is not square
            return None
    if wanted.ndim == 3:
        return _between(given, wanted.shape[1:])
    if is_line:
        line = F.interpolate(given.T[None], wanted.shape[0], mode="linear", align_corners=False)
        return line[0].T
    resolution = getattr(owner, "resolution", None)
    new, old = _square(wanted.shape[1]), _square(given.shape[1])
    if isinstance(resolution, (tuple, list)) and math.prod(resolution) == wanted.shape[1]:
        new = (int(resolution[0]), int(resolution[1]))
    if new is None or old is None:
        return None
    return _between(given.unflatten(1, old), new).flatten(1)


def _between(grid: Tensor, size: Any) -> Tensor:
    """Maps (K, H, W) at another size."""
    return F.interpolate(grid[None], tuple(size), mode="bicubic", align_corners=False)[0]
