"""Recipes and command-line values: every problem with its line, all of them told together."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from utils.errors import ConfigError, nearest, printable
from utils.logger import get_logger
from utils.yaml_file import YamlFile, load_yaml, read_yaml
from utils.yaml_file import parse_value as parse_value
from utils.yaml_file import parse_yaml as parse_yaml
from utils.yaml_file import save_yaml as save_yaml

# Keys of the YOLOv5, YOLOv9 and later recipes; a family that has no use for one says so once.
KNOWN_HYP_KEYS = frozenset(
    "lr0 lrf momentum weight_decay warmup_epochs warmup_momentum warmup_bias_lr nbs "
    "close_mosaic box cls cls_pw obj obj_pw iou_t anchor_t anchors fl_gamma dfl label_smoothing "
    "loss_ota hsv_h hsv_s hsv_v degrees translate scale shear perspective flipud fliplr mosaic "
    "mixup copy_paste paste_in warmup_power mosaic_scale augment_from dense_until augment_until flat_until".split()
)


HYP_RANGES = {
    **dict.fromkeys(("nbs", "anchor_t", "ema_tau", "tal_topk", "least_steps"), (1.0, math.inf)),
    **dict.fromkeys(("momentum", "warmup_momentum", "auto_momentum", "auto_sgd_momentum"), (0.0, 0.9999)),
    **dict.fromkeys(("hsv_h", "hsv_s", "hsv_v", "translate", "flipud", "fliplr"), (0.0, 1.0)),
    **dict.fromkeys(("mosaic", "mosaic9", "mixup", "copy_paste"), (0.0, 1.0)),
    **dict.fromkeys(("label_smoothing", "ema_decay", "focal_alpha", "warmup_share", "ema_share"), (0.0, 1.0)),
    **dict.fromkeys(("augment_from", "dense_until", "augment_until", "flat_until"), (0.0, 1.0)),
    "mosaic_scale": (0.1, 1.0), "warmup_power": (1.0, 10.0),
    **dict.fromkeys(("box_alpha", "shape_theta", "qfl_beta", "wiou_alpha", "wiou_steps"), (1.0, math.inf)),
    **dict.fromkeys(("nwd_constant", "wiou_delta"), (0.001, math.inf)), "inner_ratio": (0.1, 10.0), "norm_share": (0.001, 1.0),
    "scale": (0.0, 0.99), "degrees": (0.0, 180.0), "shear": (0.0, 89.0), "perspective": (0.0, 0.01),
}  # fmt: skip
"""Smallest and largest value of a recipe's number; of those that are not here, 0 and what is plainly too much."""
LARGEST_NUMBER = 1e9

Recipe = Mapping[str, Any]
"""Numbers and words of a training by their keys."""


def load_hyp(
    path: str | Path | Sequence[str | Path] | None,
    family_default_path: str | Path,
    checks: Mapping[str, Callable[[Any], str]] = MappingProxyType({}),
) -> Recipe:
    """Hyper-parameters: the family's file, overlaid with the user's, its section for the family last.

    Args:
        path: the user's file, or several, the later over the earlier; None for the family's recipe as it stands.
        family_default_path: the family's recipe; it says which keys there are and of what type. The files beside it
            are the other families', whose names may stand over sections that are meant for them alone.
        checks: for keys whose values must be more than of that type, what is wrong with a value.

    Returns:
        A read-only mapping; `dict(...)` copies it.

    Raises:
        ConfigError: unknown keys, wrong types and numbers out of range, all of them together, with their lines.
    """
    default = Path(family_default_path)
    base = load_yaml(default)
    merged = dict(base)
    for file in [path] if isinstance(path, (str, Path)) else path or ():
        merged |= _overlay(file, base, default, checks)
    return MappingProxyType(merged)


def written_keys(path: str | Path, family_default_path: str | Path) -> frozenset[str]:
    """The keys that a user's recipe has for a family."""
    return frozenset(
        key for key, _, _ in _recipe_entries(read_yaml(path), Path(family_default_path))
    )


def _overlay(
    path: str | Path, base: Recipe, default: Path, checks: Mapping[str, Callable[[Any], str]]
) -> dict[str, Any]:
    """What one file puts over the family's recipe `base`; see `load_hyp`."""
    problems, without_effect, found = [], [], {}
    for key, value, line in _recipe_entries(read_yaml(path), default):
        where = f"{path}:{line}"
        if key in base:
            if problem := _problem(key, base[key], value):
                problem += "."
            elif key in checks:
                problem = checks[key](value)
            if problem:
                problems.append(f"{where}: {key} - {problem}")
            found[key] = float(value) if type(base[key]) is float and type(value) is int else value
        elif key in KNOWN_HYP_KEYS:
            without_effect.append(key)
        else:
            problems.append(f"{where}: unknown key {key!r}.{nearest(str(key), base)}")
    if problems:
        raise ConfigError(*problems)
    if without_effect:
        get_logger().info(f"{path}: without effect for {default.stem}: {', '.join(without_effect)}")
    return found


def check_recipe(recipe: Recipe, default: Recipe, source: str) -> None:
    """Make sure that what a file holds as a recipe has the types and ranges of the family's.

    Raises:
        ConfigError: with every problem.
    """
    problems = [
        f"{source}: its recipe {key} - {problem}."
        for key, value in recipe.items()
        if key in default and (problem := _problem(key, default[key], value))
    ]
    if problems:
        raise ConfigError(*problems)


def _recipe_entries(file: YamlFile, default: Path) -> Iterator[tuple[str, Any, int]]:
    """Key, value and line of what a recipe says for all families, then for that of the file `default`."""
    family, families = default.stem, {file.stem for file in default.parent.glob("*.yaml")}
    own = file.data.get(family)
    for key, value in file.data.items():
        if key not in families or not isinstance(value, dict):
            yield key, value, file.lines.get((key,), 0)
    for key, value in own.items() if isinstance(own, dict) else ():
        yield key, value, file.lines.get((family, key), 0)


def increment_path(project: str | Path, name: str, exist_ok: bool = False) -> Path:
    """The folder of a new run: `project/name`, or `name2`, `name3`, ... if that is taken.

    Nothing is created. With `exist_ok` the plain name is given back, taken or not.
    """
    first = Path(project) / name
    if exist_ok or not first.exists():
        return first
    number = 2
    while (candidate := first.with_name(f"{first.name}{number}")).exists():
        number += 1
    return candidate


def parse_imgsz(values: int | Sequence[int], stride: int, tell: bool = True) -> tuple[int, int]:
    """Image size (height, width) from one or two numbers, rounded up to multiples of `stride`, which is told.

    Raises:
        ConfigError: not one or two numbers, or one below 1.
    """
    given = [values] if isinstance(values, int) else list(values)
    if len(given) not in (1, 2) or min(given) < 1:
        raise ConfigError(
            f"--imgsz: got {given}, expected one size or two, height then width, from 1."
        )
    height, width = given * 2 if len(given) == 1 else given
    rounded = (math.ceil(height / stride) * stride, math.ceil(width / stride) * stride)
    if tell and rounded != (height, width):
        get_logger().info(
            f"--imgsz {height} {width}: rounded up to {rounded[0]} {rounded[1]}, "
            f"multiples of stride {stride}"
        )
    return rounded


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line with the nearest flag, exit code 2."""

    def __init__(self, description: str = "", epilog: str = "", prog: str | None = None) -> None:
        self._recorded: list[argparse.Action] = []
        super().__init__(prog, description=description, epilog=epilog)

    def add_argument(self, *names: str, **settings: object) -> argparse.Action:  # type: ignore[override]
        """As argparse has it."""
        self._recorded.append(super().add_argument(*names, **settings))  # type: ignore[arg-type]
        return self._recorded[-1]

    def flags(self) -> list[argparse.Action]:
        """What stands for each flag, one that has several names once."""
        return [action for action in self._recorded if action.option_strings]

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """Parse, and name the nearest flag of each unknown one."""
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flags = [name for action in self.flags() for name in action.option_strings]
            told = [f"{word!r}.{nearest(word.split('=')[0], flags)}" for word in unknown]
            self.error("unknown argument " + " ".join(told))
        return options

    def error(self, message: str) -> NoReturn:
        """Exit with one line."""
        self.exit(2, f"error: {printable(message)}\n")


def integer(minimum: int | None = None, *, allowed: Sequence[int] = ()) -> Callable[[str], int]:
    """An argparse type: a whole number from `minimum`, or one of `allowed` (-1 for automatic)."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"[-+]?\d+", text):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number")
        value = int(text)
        if minimum is not None and value < minimum and value not in allowed:
            extra = "".join(f" or {a}" for a in allowed)
            raise argparse.ArgumentTypeError(f"got {value}, expected {minimum} or more{extra}")
        return value

    return parse


def number(minimum: float = -math.inf, maximum: float = math.inf) -> Callable[[str], float]:
    """An argparse type: a finite number in [minimum, maximum]."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"got {value:g}, expected {minimum:g} to {maximum:g}")
        return value

    return parse


def _problem(key: str, default: object, value: object) -> str:
    """What is wrong with a value where the recipe of the family has `default`; empty if nothing."""
    kind = _kind(default)
    number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else None
    is_finite = number is None or math.isfinite(number)
    if default is not None and (kind != _kind(value) or not is_finite):
        return f"got {value!r}, expected {kind} such as {default!r}"
    low, high = HYP_RANGES.get(key, (0.0, LARGEST_NUMBER))
    if number is None or low <= number <= high:
        return ""
    is_below = high >= LARGEST_NUMBER and number < low
    expected = f"{low:g} or more" if is_below else f"{low:g} to {high:g}"
    return f"got {number:g}, expected {expected}"


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return "a number"
    kinds = {str: "a word", list: "a list", dict: "a mapping", type(None): "nothing"}
    return kinds.get(type(value), type(value).__name__)
