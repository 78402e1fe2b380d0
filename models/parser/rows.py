"""Reading a model YAML: text -> rows with resolved arguments and where each of them stands.

A row is `[from, repeats, module, arguments]`, optionally with a fifth element, its name. Nothing in it is
evaluated: a string argument that is the name of a key of the same file takes that key's value, `None`, `True`,
`False` and numbers are literals, every other string stays a string.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from models.registry import HeadForm
from utils.config import read_yaml
from utils.errors import ConfigError, nearest

SECTIONS = ("backbone", "head")
LITERALS = {"None": None, "True": True, "False": False, "none": None, "true": True, "false": False}
NO_FACTORS = (1.0, 1.0, math.inf)
MOST_REPEATS, LARGEST_ARGUMENT, LARGEST_FACTOR = 1000, 1_000_000, 100
DETECT_FOLDER = Path(__file__).parents[1] / "detect"


class RowSpec(NamedTuple):
    """One row as it was written, arguments resolved."""

    section: str
    number: int
    line: int | None
    source: int | str | list[int | str]
    repeats: int
    module: str
    args: list[Any]
    kwargs: dict[str, Any]
    name: str | None

    @property
    def place(self) -> str:
        """`head[3] (line 27)`."""
        return place_of(self.section, self.number, self.line)


@dataclass(frozen=True)
class ModelSpec:
    """A model YAML, read and checked, nothing built yet.

    Attributes:
        file: what errors call it.
        config: the plain mapping, with overrides applied; it rebuilds the same model.
        rows: backbone rows, then head rows.
        num_classes: classes of the head.
        depth: factor on repeats.
        width: factor on channels.
        max_channels: channels are cut to this before `width`.
        size: chosen letter of `scales`, or "".
        activation: name of the default activation, or None.
        imports: Python files that define its layers.
        head: what `reg_max` and `end2end` say.
    """

    file: str
    config: dict[str, Any]
    rows: tuple[RowSpec, ...]
    num_classes: int
    depth: float = 1.0
    width: float = 1.0
    max_channels: float = math.inf
    size: str = ""
    activation: str | None = None
    imports: tuple[str, ...] = field(default=())
    head: HeadForm = HeadForm()

    def repeats(self, count: int) -> int:
        """Repeats of a row after the depth factor; 1 stays 1."""
        return max(round(count * self.depth), 1) if count > 1 else count


def find_config(cfg: str | Path) -> tuple[Path, str]:
    """The YAML that `cfg` means and the size letter its name carries.

    `yolo11s.yaml` is `yolo11.yaml` at size s where no such file exists; a bare name is looked up in
    `models/detect/`.
    """
    path = Path(cfg)
    folders = [path.parent, DETECT_FOLDER]
    stem = path.name.removesuffix(".yaml").removesuffix(".yml")
    for folder in folders:
        for candidate in (folder / path.name, folder / f"{stem}.yaml"):
            if candidate.is_file():
                return candidate, ""
    for folder in folders:
        for cut in range(len(stem)):
            candidate = folder / f"{stem[:cut]}{stem[cut + 1 :]}.yaml"
            if stem[cut].isalpha() and candidate.is_file() and stem[cut] in _scales_of(candidate):
                return candidate, stem[cut]
    known = sorted(p.stem for p in DETECT_FOLDER.glob("*.yaml"))
    raise ConfigError(
        f"{cfg}: no such model YAML.{nearest(stem, known)} models/detect/ has {', '.join(known)}."
    )


def _scales_of(path: Path) -> Mapping[str, Any]:
    return read_yaml(path).data.get("scales") or {}


def load_config(path: Path) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """A YAML file as a mapping, and the line of each row of `backbone` and `head`."""
    file = read_yaml(path)
    rows = {key: file.data[key] for key in SECTIONS if isinstance(file.data.get(key), list)}
    lines = {
        key: [file.lines[key, number] for number in range(len(value))]
        for key, value in rows.items()
    }
    return file.data, lines


def read_model_config(
    cfg: str | Path | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    scale: str | None = None,
    end2end: bool = False,
) -> tuple[str, dict[str, Any], dict[str, list[int]]]:
    """What `cfg` (a path or a mapping) says, with class count, size and head chosen: (file, config, lines)."""
    lines: dict[str, list[int]] = {}
    if isinstance(cfg, Mapping):
        file, config, lines, letter = str(cfg.get("yaml_file", "model")), dict(cfg), lines, ""
    else:
        path, letter = find_config(cfg)
        file = str(path)
        config, lines = load_config(path)
        config["yaml_file"] = str(cfg)
    if num_classes is not None:
        config["nc"] = num_classes
    if end2end:
        config["end2end"] = True
    scales = config.get("scales")
    chosen = scale or config.get("scale") or letter
    if scales:
        config["scale"] = str(chosen or next(iter(scales)))
    elif chosen:
        raise ConfigError(
            f"{file}: got scale {chosen!r}, but the file has no scales. Leave --scale out."
        )
    return file, config, lines


def parse_spec(file: str, config: dict[str, Any], lines: Mapping[str, Sequence[int]]) -> ModelSpec:
    """Check a config and resolve its rows.

    Raises:
        ConfigError: with every problem of the file, one line each.
    """
    problems = _wrong_values(config)
    factors, size, wrong = _factors(config)
    problems += [wrong] if wrong else []
    rows: list[RowSpec] = []
    for section in SECTIONS:
        value = config.get(section)
        if not isinstance(value, list) or not value:
            problems.append(
                f"{section}: got {value!r}, expected a list of rows [from, repeats, module, args]."
            )
            continue
        places: Sequence[int | None] = lines.get(section) or [None] * len(value)
        for number, row in enumerate(value):
            place = place_of(section, number, places[number])
            try:
                rows.append(_read_row(section, number, places[number], row, config))
            except ConfigError as error:
                problems.append(f"{place}: {error}")
    if problems:
        raise ConfigError(*(f"{file} {problem}" for problem in problems))
    imports = config.get("imports") or ()
    return ModelSpec(
        file, config, tuple(rows), config.get("nc", 80), *factors, size,
        config.get("activation"), tuple([imports] if isinstance(imports, str) else imports),
        HeadForm(config.get("reg_max", 16), bool(config.get("end2end"))),
    )  # fmt: skip


def place_of(section: str, number: int, line: int | None) -> str:
    """`head[3] (line 27)`."""
    return f"{section}[{number}]" + (f" (line {line})" if line else "")


def _wrong_values(config: Mapping[str, Any]) -> list[str]:
    """What is wrong with the plain keys."""
    num_classes, channels = config.get("nc", 80), config.get("ch", 3)
    reg_max, end2end = config.get("reg_max", 16), config.get("end2end")
    anchors, imports = config.get("anchors"), config.get("imports") or []
    names = [imports] if isinstance(imports, str) else imports
    checks = (
        (_is_count(num_classes), f"nc: got {num_classes!r}, expected a whole number of classes, 1 or more."),
        (_is_count(channels), f"ch: got {channels!r}, expected the number of an image's channels, 1 or more."),
        (_is_count(reg_max), f"reg_max: got {reg_max!r}, expected the bins of a distance, 1 for the distance itself."),
        (end2end is None or isinstance(end2end, bool), f"end2end: got {end2end!r}, expected true or false."),
        (anchors is None or _is_count(anchors) or _are_anchors(anchors),
         f"anchors: got {anchors!r}, expected a number of anchors or one list of widths and heights in "
         "pixels a level, such as [10,13, 16,30, 33,23]."),
        (isinstance(names, list) and all(isinstance(i, str) for i in names),
         f"imports: got {imports!r}, expected a Python file or a list of them."),
    )  # fmt: skip
    return [problem for is_right, problem in checks if not is_right]


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _are_anchors(value: object) -> bool:
    if not isinstance(value, list) or not all(isinstance(row, list) and row for row in value):
        return False
    lengths = {len(row) for row in value}
    are_positive = all(_is_number(n) and n > 0 for row in value for n in row)
    return are_positive and len(lengths) == 1 and not any(n % 2 for n in lengths)


def _factors(config: Mapping[str, Any]) -> tuple[tuple[float, float, float], str, str]:
    """Depth, width and max_channels, the size's letter, and what is wrong with them."""
    scales, size = config.get("scales"), str(config.get("scale") or "")
    values = [config.get("depth_multiple", 1.0), config.get("width_multiple", 1.0), math.inf]
    if scales:
        chosen = scales.get(size) if isinstance(scales, Mapping) else None
        wrong = ""
        if not isinstance(scales, Mapping):
            wrong = f"scales: got {scales!r}, expected letters with [depth, width, max_channels]."
        elif size not in scales:
            wrong = f"scales: got size {size!r}, expected one of {', '.join(map(str, scales))}."
        elif not isinstance(chosen, list) or len(chosen) not in (2, 3):
            wrong = f"scales {size}: got {chosen!r}, expected [depth, width, max_channels]."
        if wrong or chosen is None:
            return NO_FACTORS, size, wrong
        values = [*chosen, math.inf][:3]
    for label, value in zip(("depth", "width", "max_channels"), values, strict=True):
        most = math.inf if label == "max_channels" else LARGEST_FACTOR
        if not _is_number(value) or not 0 < value <= most:
            expected = "a number above 0" + ("" if most == math.inf else f", up to {most}")
            return NO_FACTORS, size, f"{label}: got {value!r}, expected {expected}."
    return (float(values[0]), float(values[1]), float(values[2])), size, ""


def _read_row(
    section: str, number: int, line: int | None, row: object, config: Mapping[str, Any]
) -> RowSpec:
    if not isinstance(row, list) or len(row) not in (4, 5):
        raise ConfigError(
            f"got {row!r}, expected [from, repeats, module, args] or the same with a name behind."
        )
    source, repeats, module, args, name = (*row, None)[:5]
    args = [] if args is None else args
    items = source if isinstance(source, list) else [source]
    are_references = all(isinstance(i, (int, str)) and not isinstance(i, bool) for i in items)
    checks = (
        (items and are_references, f"from {source!r}, expected an index, a name or a list of them."),
        (_is_count(repeats) and repeats <= MOST_REPEATS,
         f"repeats {repeats!r}, expected a whole number, 1 or more, up to {MOST_REPEATS}."),
        (isinstance(module, str), f"module {module!r}, expected the name of a layer."),
        (name is None or isinstance(name, str), f"name {name!r}, expected a word."),
        (isinstance(args, (list, dict)), f"arguments {args!r}, expected a list or a mapping."),
    )  # fmt: skip
    if wrong := next((problem for is_right, problem in checks if not is_right), ""):
        raise ConfigError(f"got {wrong}")
    positional = [] if isinstance(args, dict) else list(args)
    keywords = dict(args) if isinstance(args, dict) else {}
    if positional and isinstance(positional[-1], dict):
        keywords = positional.pop()
    meant = [resolve(value, config) for value in positional]
    named = {str(key): resolve(value, config) for key, value in keywords.items()}
    _refuse_huge([*meant, *named.values()])
    return RowSpec(
        section, number, line, source, repeats, module.removeprefix("torch."), meant, named, name
    )


def _refuse_huge(values: Sequence[object]) -> None:
    """A layer of a billion channels, or of as many parts, fills the memory before anything is said."""
    for value in values:
        if isinstance(value, list):
            _refuse_huge(value)
        elif isinstance(value, (int, float)) and LARGEST_ARGUMENT < abs(value) < math.inf:
            raise ConfigError(f"got argument {value:g}, expected {LARGEST_ARGUMENT} at most.")


def resolve(value: object, config: Mapping[str, Any]) -> Any:
    """The meaning of an argument: a key of the file, a literal, or the string itself."""
    if isinstance(value, list):
        return [resolve(item, config) for item in value]
    if not isinstance(value, str):
        return value
    if value in LITERALS:
        return LITERALS[value]
    if value in config and value not in SECTIONS:
        return config[value]
    try:
        return float(value) if any(c in value for c in ".eE") else int(value)
    except ValueError:
        return value
