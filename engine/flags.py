"""Command lines as frozen dataclasses: a field is a flag of the same name.

@dataclass(frozen=True)
class Options:
    '''Count something.'''
    batch_size: int = flag(16, "images a step", type=integer(1))    # --batch-size 8
    rect: bool = flag(False, "batches of the images' own shape")    # --rect
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from copy import copy
from dataclasses import field, fields
from typing import TYPE_CHECKING, Any, TypeVar, cast

from utils.config import ArgumentParser
from utils.logger import get_logger

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
Options = TypeVar("Options", bound="DataclassInstance")


def flag(default: T, help: str, *aliases: str, **how: object) -> T:
    """A field of a command line's dataclass.

    Args:
        default: its value where the flag is not given; a flag whose default is False is a switch.
        help: a line for `--help`.
        aliases: other spellings of the flag.
        how: what `argparse` is told besides: `type`, `nargs`, `choices`, `const`, `metavar`, `required`.
    """
    metadata = {"default": default, "aliases": aliases, "has_effect": True, "help": help, **how}
    return cast(T, field(default_factory=lambda: copy(default), metadata=metadata))


def without_effect(default: T) -> T:
    """A flag of other trees that changes nothing here; giving it is told."""
    nargs = {} if default is False else {"nargs": "?"}
    return flag(default, "accepted, without effect", has_effect=False, **nargs)


def spelling(name: str) -> str:
    """`--batch-size` of `batch_size`."""
    return "--" + name.replace("_", "-")


def read_given(
    kind: type[DataclassInstance], arguments: Sequence[str] | None = None, epilog: str = ""
) -> dict[str, Any]:
    """Values of the flags that stand on a command line, by field; those without effect too, which are told."""
    parser = ArgumentParser(description=(kind.__doc__ or "").partition("\n")[0], epilog=epilog)
    idle = {}
    for item in fields(kind):
        how = {**item.metadata, "default": argparse.SUPPRESS, "dest": item.name}
        names = [spelling(item.name), *how.pop("aliases")]
        if not how.pop("has_effect"):
            idle[item.name] = item.metadata["default"]
            names += [f"--{item.name}"] if "_" in item.name else []
        if item.metadata["default"] is False and "nargs" not in how:
            how["action"] = "store_true"
        parser.add_argument(*names, **how)
    given = vars(parser.parse_args(arguments))
    needless = [
        spelling(name) for name, default in idle.items() if given.get(name, default) != default
    ]
    if needless:
        get_logger().info(f"accepted but without effect here: {', '.join(needless)}")
    return given


def read_flags(kind: type[Options], arguments: Sequence[str] | None = None) -> Options:
    """The options that a command line means.

    Raises:
        SystemExit: it has a mistake, which is told in one line; exit code 2.
    """
    return kind(**read_given(kind, arguments))
