"""YAML files: one dialect, every value with its line, and bounds for what a few lines can stand for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from yaml.composer import Composer
from yaml.constructor import SafeConstructor
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from utils.errors import ConfigError
from utils.files import refuse_special

YamlPath = tuple[str | int, ...]
MOST_BYTES = 4 << 20
MOST_DIGITS = 18  # of a whole number, so that all of them are of 64 bits
# What aliases may stand for: so many values, or times those of the file.
LEAST_EXPANDED, MOST_EXPANDED = 100_000, 10


class YamlFile(NamedTuple):
    """A parsed YAML file.

    Attributes:
        data: its top-level mapping.
        lines: line number (from 1) of every value, by its path: `("head", 3, 2)` is the third cell
            of the fourth row of `head`.
        texts: what stands there for every single value, by its path.
    """

    data: dict[str, Any]
    lines: dict[YamlPath, int]
    texts: Mapping[YamlPath, str] = MappingProxyType({})


class _Loader(Reader, Scanner, Parser, Composer, SafeConstructor, BaseResolver):
    """YAML 1.2 scalars: `no` and `on` are words, `1e-3` is a number, a date is text."""

    def __init__(self, text: str, source: str) -> None:
        try:
            Reader.__init__(self, text)
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            told = f"the character {chr(error.character)!r}. Remove it."
            raise ConfigError(f"{source}:{line}: not valid YAML - {told}") from error
        for part in (Scanner, Parser, Composer, SafeConstructor, BaseResolver):
            part.__init__(self)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """A whole number of so many digits as fit 64 bits."""
        text = str(self.construct_scalar(node))
        if len(text) > MOST_DIGITS:
            told = f"a number of {len(text)} digits"
            raise yaml.constructor.ConstructorError(None, None, told, node.start_mark)
        return int(text, 10)


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.1 or this dialect would read as anything but text, such as `on` and `1e-3`."""


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
    ("float", r"^(?:[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$", "-+."),
    ("merge", r"^<<$", "<"),
):
    for _reads in (_Loader, _Dumper):
        _reads.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), [*_first])
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)  # type: ignore[type-var]


def parse_value(text: str) -> Any:
    """One value as a file would have it behind its key: `0.5`, `true`, the word `on`, `[8, 16]`.

    Raises:
        ValueError: it is no YAML.
    """
    try:
        loader = _Loader(text, "value")
        node = loader.get_single_node()
        if node is None:
            return None
        _refuse_multiplied(node, text)
        return loader.construct_document(node)
    except (yaml.YAMLError, ConfigError, RecursionError) as error:
        raise ValueError(f"not valid YAML - {str(error).splitlines()[0]}") from error


def read_yaml(path: str | Path) -> YamlFile:
    """Read a YAML file whose top level is a mapping, with the line of every value.

    Raises:
        ConfigError: missing, too large, not YAML, not a mapping, or a key given twice.
    """
    path = Path(path)
    try:
        refuse_special(path)
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read - {error.strerror}. Give the path of a YAML file."
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{path}: not UTF-8 text - byte {error.start}. Save it as UTF-8."
        ) from error
    if len(data) > MOST_BYTES:
        raise ConfigError(f"{path}: got more than {MOST_BYTES >> 20} MiB, expected a YAML file.")
    return parse_yaml(text, str(path))


def load_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping; see `read_yaml`."""
    return read_yaml(path).data


def parse_yaml(text: str, source: str) -> YamlFile:
    """Parse YAML text; `source` names it in errors. See `read_yaml`."""
    loader = _Loader(text, source)
    try:
        root = loader.get_single_node()
        if root is None:
            return YamlFile({}, {})
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(
                f"{source}: got {_node_kind(root)}, expected `key: value` lines at the top level."
            )
        _refuse_multiplied(root, source)
        lines: dict[YamlPath, int] = {}
        texts: dict[YamlPath, str] = {}
        _record(root, (), lines, texts, source)
        return YamlFile(loader.construct_document(root), lines, texts)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{source}{line}: not valid YAML - {error.problem or error.context}."
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: not valid YAML - {str(error).splitlines()[0]}.") from error


def save_yaml(path: str | Path, data: Mapping[str, object]) -> None:
    """Write plain data as YAML, keys in their order; paths become text, tuples lists."""
    text = yaml.dump(_yaml_safe(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    Path(path).write_text(text, encoding="utf-8")


def _refuse_multiplied(root: yaml.Node, source: str) -> None:
    """Refuse aliases that stand for far more values than the file has: ten lines can mean billions.

    Every reader below, and every writer of what was read, walks through each alias anew.
    """
    sizes: dict[int, int] = {}
    whole = _expanded_size(root, source, sizes, set())
    if whole > max(LEAST_EXPANDED, MOST_EXPANDED * len(sizes)):
        raise ConfigError(
            f"{source}: its aliases (*name) stand for {whole:.3g} values, the file has {len(sizes)}. Write out what is "
            "meant."
        )


def _expanded_size(node: yaml.Node, source: str, sizes: dict[int, int], parents: set[int]) -> int:
    """How many values a node holds, itself included, each alias counted as what it stands for."""
    if id(node) in parents:
        raise ConfigError(f"{source}:{node.start_mark.line + 1}: an alias that contains itself.")
    if id(node) not in sizes:
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        pairs = [entry if isinstance(entry, tuple) else (entry,) for entry in parts]
        parents.add(id(node))
        inner = (_expanded_size(part, source, sizes, parents) for pair in pairs for part in pair)
        sizes[id(node)] = 1 + sum(inner)
        parents.remove(id(node))
    return sizes[id(node)]


def _record(
    node: yaml.Node,
    path: YamlPath,
    lines: dict[YamlPath, int],
    texts: dict[YamlPath, str],
    source: str,
) -> None:
    """Fill `lines` and `texts` and refuse duplicate keys, before anything is constructed."""
    lines[path] = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        texts[path] = node.value
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _record(item, (*path, index), lines, texts, source)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise ConfigError(
                    f"{source}:{line}: a key must be a word or a number, got {_node_kind(key)}."
                )
            if key.value in seen and key.value != "<<":
                raise ConfigError(
                    f"{source}:{line}: key {key.value!r} stands twice, first in line "
                    f"{seen[key.value]}. Remove one."
                )
            seen[key.value] = line
            name = int(key.value) if key.tag.endswith(":int") else key.value
            _record(value, (*path, name), lines, texts, source)
            lines[(*path, name)] = line


def _node_kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return "a mapping" if isinstance(node, yaml.MappingNode) else "one value"


def _yaml_safe(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(k) if not isinstance(k, int) else k: _yaml_safe(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_yaml_safe(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)
