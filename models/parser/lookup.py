"""What a name in a row means: a user's file first, our layers, then timm's models; and the files that `imports:` names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models import modules
from models.parser.advice import reason_of
from models.parser.rows import ModelSpec
from models.registry import Layer, LayerError, Plan, Scaling, find, names, offered
from models.timm.backbone import find_timm_layer
from models.timm.features import timm_names
from utils.errors import ConfigError, ForeignError, foreign_code, nearest

HOME = "imports_from"
"""Key of a config: the folder that the files of `imports` were found from when the model was built."""


def find_layer(name: str) -> Layer:
    """The layer called `name`.

    Raises:
        LayerError: there is none, or there are two.
    """
    layer = modules.find_pasted(name) or find(name) or offered(name) or find_timm_layer(name)
    if layer is None:
        raise UnknownLayerError(_unknown(name))
    return layer


class UnknownLayerError(LayerError):
    """Nothing has this name."""


def _unknown(name: str) -> str:
    inside = modules.names_in_file(name)
    if inside:
        ways = " or ".join(f"{name}.{own}" for own in inside)
        return f"is the name of a file, expected that of a class in it. Write {ways}."
    if place := modules.private_place(name):
        return f"is private in {place}, _{name}, expected a public class. Rename it to {name}."
    broken = "".join(
        f" {file} could not be imported ({why})." for file, why in modules.broken_files().items()
    )
    known = sorted({*names(), *timm_names()}) + modules.public_names()
    return (
        f"unknown layer {name!r}, expected a registered layer, a class in models/modules/ or a timm model."
        f"{nearest(name, known)}{broken}"
    )


def plan_of(layer: Layer, channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """What the rule of `layer` decides.

    Raises:
        LayerError: it does not take these arguments.
    """
    try:
        with foreign_code(LayerError, users=modules.USER_CODE):
            return layer.rule(channels, args, scaling)
    except ForeignError as error:
        raise LayerError(f"does not take {args} - {error}") from error


def is_backbone(layer: Layer, args: Sequence[Any]) -> bool:
    """Whether it makes all maps from the image, as far as its rule tells."""
    try:
        return plan_of(layer, [3], args, Scaling()).channels is None
    except LayerError:
        return False


def require_backbone(name: str) -> None:
    """Refuse what cannot stand behind `--backbone`.

    Raises:
        LayerError: nothing is called `name`, or it is a layer of another kind.
    """
    if not is_backbone(find_layer(name), []):
        raise LayerError(
            f"got {name}, a layer that does not make all maps from the image, expected a backbone "
            "such as EMO_1M, or a timm model such as resnet18."
        )


def import_code(spec: ModelSpec, allowed: bool) -> set[str]:
    """Run what `imports:` names, if that is allowed; the names of its modules in this process.

    Raises:
        ConfigError: it is not, nothing of that name is found, or its code failed.
    """
    seen: set[str] = set()
    for name in spec.imports:
        if not allowed:
            raise ConfigError(
                f"{spec.file} imports: {name} would run code. Read it, then give --allow-code if you trust it."
            )
        folders = [Path(spec.file).parent, Path(spec.config.get(HOME) or ""), Path()]
        home = next((folder for folder in folders if _is_code(folder / name)), None)
        if home is None:
            places = dict.fromkeys(str(folder.resolve()) for folder in folders)
            raise ConfigError(
                f"{spec.file} imports: got {name}, expected a file beside the YAML, or a folder with an __init__.py; it is "
                f"not in {', '.join(places)}. Put it into one of them."
            )
        spec.config[HOME] = str(home.resolve())
        try:
            seen |= modules.import_outside(home / name)
        except ForeignError as error:
            raise ConfigError(
                f"{spec.file} imports: {name} cannot be imported - {reason_of(error, '.')}"
            ) from error
    return seen


def _is_code(path: Path) -> bool:
    return path.is_file() or (path / modules.PACKAGE).is_file()
