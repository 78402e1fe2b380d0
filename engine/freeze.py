"""`--freeze`: which part of a model is left as it is."""

from __future__ import annotations

import fnmatch
from bisect import bisect_left
from collections.abc import Sequence

from torch import nn

from models.yolo import DetectionModel
from utils.errors import ConfigError, nearest


def freeze(model: DetectionModel, wanted: Sequence[str]) -> list[nn.Module]:
    """Take rows out of the training.

    Args:
        model: its parameters lose `requires_grad`.
        wanted: `10` (rows whose index in the table is below 10), `0 3 4` (those rows; any index from 0 to 4 means a
            backbone that the table prints as 4), or names: `backbone`, `head`, a module name of the table, or a
            pattern of parameter names such as `model.0.*`.

    Returns:
        The frozen modules; the caller keeps them in eval mode, so that their BatchNorm statistics stay too.

    Raises:
        ConfigError: a word that fits nothing.
    """
    numbers = [int(word) for word in wanted if word.isdigit()]
    is_bound = len(numbers) == len(wanted) == 1
    frozen = _freeze_below(model, numbers[0]) if is_bound else _freeze_listed(model, numbers)
    for word in wanted:
        if not word.isdigit():
            frozen += _freeze_by_name(model, word)
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _freeze_below(model: DetectionModel, bound: int) -> list[nn.Module]:
    rows = model.rows
    lowest, highest = rows[0].index + 1, rows[-1].index + 1
    if bound and not lowest <= bound <= highest:
        raise ConfigError(
            f"--freeze: got {bound}, expected a number from {lowest} to {highest}: rows below it are frozen, and the table "
            f"prints {rows[0].module} as {rows[0].index}, {rows[-1].module} as {rows[-1].index}."
        )
    return [module for row, module in zip(rows, model.model, strict=True) if row.index < bound]


def _freeze_listed(model: DetectionModel, numbers: Sequence[int]) -> list[nn.Module]:
    ends = [row.index for row in model.rows]
    if numbers and max(numbers) > ends[-1]:
        raise ConfigError(
            f"--freeze: got {max(numbers)}, expected indices from 0 to {ends[-1]}, as the table prints."
        )
    return [model.model[k] for k in sorted({bisect_left(ends, number) for number in numbers})]


def _freeze_by_name(model: DetectionModel, word: str) -> list[nn.Module]:
    pairs = list(zip(model.rows, model.model, strict=True))
    found = [m for row, m in pairs if word in (row.section, row.module)]
    if found:
        return found
    names = [name for name, _ in model.named_parameters()]
    matching = [
        n for n in names if fnmatch.fnmatchcase(n, word) or n == word or n.startswith(word + ".")
    ]
    if not matching:
        known = [*{row.module for row in model.rows}, "backbone", "head", *names]
        raise ConfigError(
            f"--freeze: got {word!r}, expected an index, backbone, head, a module of the table or a parameter name."
            f"{nearest(word, known)}"
        )
    parameters = {name: p for name, p in model.named_parameters() if name in matching}
    for parameter in parameters.values():
        parameter.requires_grad_(False)
    chosen = {id(parameter) for parameter in parameters.values()}
    parts = [(part, {id(p) for p in part.parameters()}) for part in model.modules()]
    return [part for part, own in parts[1:] if own and own <= chosen]  # the first is the model
