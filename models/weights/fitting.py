"""What of a tensor serves another one: grids, windows and image channels that are made to fit, and rows of classes.

First convolutions are brought to another number of image channels, tables of positions and of relative positions to another
grid, patch kernels to another patch; timm's own functions do the interpolation, so that the numbers are those that timm
itself would make. Class rows move by the classes' names: an anchor head stacks (5 + C) rows for each anchor of a cell, the
first five the box's. Letters: O outputs, I inputs, N cells of a grid, K heads or anchors, C channels or classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

Shape = tuple[int, ...]

RGB = 3
# Channels of an image, in weights and in a model; more inputs are no image's.
MOST_GIVEN, MOST_WANTED = 4, 16
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
BOX_OUTPUTS = 5  # x, y, width, height, objectness


def fits(key: str, given: Shape, wanted: Shape) -> bool:
    """Whether a tensor of shape `given` serves for one of shape `wanted`."""
    return given == wanted or bool(kind_of_change(key, given, wanted))


def kind_of_change(key: str, given: Shape, wanted: Shape) -> str:
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


def _reads_images(given: Shape, wanted: Shape) -> bool:
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


def told(kind: str, given: Shape, wanted: Shape) -> str:
    """What was done to a tensor of this kind, in words."""
    if kind == FIRST:
        how = "summed" if wanted[1] == 1 else "averaged" if wanted[1] < given[1] else "repeated"
        return f"first convolution {how} from {given[1]} to {wanted[1]} channels"
    if kind == LAYOUT:
        return "linear layer and 1x1 convolution taken as the same"
    return f"{kind} interpolated from {cross(given)} to {cross(wanted)}"


def cross(shape: Shape) -> str:
    """`64x3x7x7`."""
    return "x".join(map(str, shape)) or "one number"


def _square(count: int) -> tuple[int, int] | None:
    side = math.isqrt(count)
    return (side, side) if side * side == count else None


def _sides(owner: nn.Module | None, name: str) -> tuple[int, int] | None:
    """The size (height, width) that a module keeps under a name."""
    match vars(owner).get(name) if owner is not None else None:
        case [height, width]:
            return int(height), int(width)
    return None


def _positions(
    given: Tensor, wanted: Tensor, owner: nn.Module | None, imgsz: tuple[int, int] | None
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
        return _map_to_blocks(_between(image, size), blocks)[None]
    return _between(given[0].permute(2, 0, 1), wanted.shape[1:3]).permute(1, 2, 0)[None]


def _blocks_to_map(table: Tensor, blocks: tuple[int, int], cells: tuple[int, int]) -> Tensor:
    """(T, N, C) to (C, H, W): blocks of cells side by side."""
    return rearrange(table, "(r s) (h w) c -> c (r h) (s w)", r=blocks[0], h=cells[0])


def _map_to_blocks(grid: Tensor, blocks: tuple[int, int]) -> Tensor:
    """The way back from `_blocks_to_map`."""
    return rearrange(grid, "c (r h) (s w) -> (r s) (h w) c", r=blocks[0], s=blocks[1])


def _grid_of(
    owner: nn.Module | None, count: int, imgsz: tuple[int, int] | None
) -> tuple[int, int] | None:
    """Height and width of the grid behind a table of `count` positions, class tokens among them perhaps."""
    children = dict(owner.named_children()) if owner is not None else {}
    grid = _sides(children.get("patch_embed"), "grid_size")
    if grid is not None and 0 <= count - math.prod(grid) <= 8:
        return grid
    for cells in (count, count - 1, count - 2):
        if imgsz is not None:
            height = round(math.sqrt(max(cells, 0) * imgsz[0] / imgsz[1]))
            if height and cells % height == 0 and height * imgsz[1] == cells // height * imgsz[0]:
                return height, cells // height
        if _square(cells):
            return _square(cells)
    return None


def _window(given: Tensor, wanted: Tensor, owner: nn.Module | None) -> Tensor | None:
    """A table by relative position: (N, K), (K, H, W) or (K, N) with N cells of a grid, or a line (N, C)."""
    window = _sides(owner, "window_size")
    is_line = given.shape[1:] == wanted.shape[1:]
    if window is not None and (is_line or wanted.ndim == 3):
        from timm.layers import resize_rel_pos_bias_table

        try:
            return resize_rel_pos_bias_table(given, window, tuple(wanted.shape))
        except (ValueError, RuntimeError, AssertionError):  # the file's window is not square
            return None
    if wanted.ndim == 3:
        return _between(given, wanted.shape[1:])
    if is_line:
        line = F.interpolate(given.T[None], wanted.shape[0], mode="linear", align_corners=False)
        return line[0].T
    new, old = _sides(owner, "resolution"), _square(given.shape[1])
    if new is None or math.prod(new) != wanted.shape[1]:
        new = _square(wanted.shape[1])
    if new is None or old is None:
        return None
    return _between(given.unflatten(1, old), new).flatten(1)


def _between(grid: Tensor, size: Sequence[int]) -> Tensor:
    """Maps (K, H, W) at another size."""
    return F.interpolate(grid[None], tuple(size), mode="bicubic", align_corners=False)[0]


class ClassRows(NamedTuple):
    """Which rows go where.

    Attributes:
        given: how many classes the file has; None where its names are not known.
        wanted: how many the model has.
        moves: (row of the model, row of the file) of the classes that both know.
        names: names of these, as the model writes them.
        is_same: both have the same classes in the same order.
    """

    given: int | None
    wanted: int
    moves: tuple[tuple[int, int], ...]
    names: tuple[str, ...]
    is_same: bool

    def summary(self) -> str:
        """`person, car (2 of 5)`."""
        shown = ", ".join(self.names[:6]) + (", ..." if len(self.names) > 6 else "")
        return f"{shown or 'none known'} ({len(self.names)} of {self.wanted})"


def match_classes(given: Sequence[str] | None, wanted: Sequence[str]) -> ClassRows:
    """Classes that both lists know; capitals, spaces, dashes and underscores make no difference.

    Names such as `class0`, which stand in for names that nobody gave, count as unknown lists.
    """
    known = given is not None and not (_are_placeholders(given) or _are_placeholders(wanted))
    if given is None or not known:
        return ClassRows(None, len(wanted), (), (), True)
    rows: dict[str, int] = {}
    for row, name in enumerate(given):
        rows.setdefault(plain_name(name), row)
    moves = tuple(
        (row, rows[plain_name(name)]) for row, name in enumerate(wanted) if plain_name(name) in rows
    )
    is_same = len(given) == len(wanted) == len(moves) and all(a == b for a, b in moves)
    return ClassRows(
        len(given), len(wanted), moves, tuple(wanted[row] for row, _ in moves), is_same
    )


def plain_name(name: str) -> str:
    """`Traffic_light` -> `trafficlight`."""
    return "".join(c for c in name.casefold() if c not in " _-")


def _are_placeholders(names: Sequence[str]) -> bool:
    return all(name == f"class{row}" for row, name in enumerate(names))


@torch.no_grad()
def copy_class_rows(target: Tensor, given: Tensor, rows: ClassRows, num_anchors: int) -> int:
    """Copy what belongs to boxes and to classes that both know; how many numbers, 0 where the shapes forbid it.

    Args:
        target: (K * (5 + C), ...) of an anchor head with K anchors, else (C, ...).
        given: the same with the file's classes; one row more, for "no object", is left out.
        rows: which classes both know; where the file's are not known the box rows alone are taken.
        num_anchors: K, 0 for other heads.
    """
    boxes, count = BOX_OUTPUTS if num_anchors else 0, num_anchors or 1
    are_split = all(t.ndim and t.shape[0] and t.shape[0] % count == 0 for t in (target, given))
    if not are_split or target.shape[1:] != given.shape[1:]:
        return 0
    new, old = (t.unflatten(0, (count, -1)) for t in (target, given))
    classes = old.shape[1] - boxes
    if new.shape[1] - boxes < 1 or classes < 1:
        return 0
    new[:, :boxes] = old[:, :boxes].to(new)
    copied = new[:, :boxes].numel()
    if rows.given is None or classes not in (rows.given, rows.given + 1):
        return copied
    for to, come_from in rows.moves:
        new[:, boxes + to] = old[:, boxes + come_from].to(new)
        copied += new[:, to].numel()
    return copied
