"""Data YAML or folder -> `DataConfig`.

Keys of a data YAML:

    path: ../datasets/coco      # folder of the data, relative to this file; absent: its own folder
    train: images/train         # a folder, a .txt list of images, or several of them (YOLO);
    val: images/val             #   a .json (COCO); a folder of .xml or an ImageSets list (VOC)
    test: images/test           # may be absent
    names: {0: cat, 1: dog}     # or a list; may be absent for COCO and VOC (`nc: 2` is understood)
    images: {train: train2017}  # COCO, VOC: image folders, where they are not found by themselves
    one_based: true             # VOC: corners count from 1
    white: 4095                 # the value of white in images deeper than 8 bits (12 bits in 16)
    kpt_shape: [17, 3]          # YOLO: rows are boxes with so many keypoints, which are passed over
    sources:                    # what --download fetches; nothing is fetched without it
      - {url: https://..., to: images, md5: ..., size: 815585330}

The file is read as model YAMLs and recipes are: `no` is a word and 010 is ten; names are text as it
is written, 02146 and 1.10 too. A `download` key in the manner of other projects, a script or an
address, is never run.
"""

from __future__ import annotations

import logging
import os
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import yaml

from data.formats import coco, voc
from data.formats.description import SPLITS, DataConfig, DownloadSource
from data.formats.text import read_text
from data.recognise import describe_folder, recognise_entry, yaml_in
from data.shapes import draw_if_absent
from utils.channels import white_of
from utils.config import parse_yaml
from utils.errors import ConfigError, DatasetError, nearest

__all__ = ["DataConfig", "DownloadSource", "load_data_config"]

LOGGER = logging.getLogger("yoke.data")
ROOT = Path(__file__).resolve().parents[1]
FORMATS = ("yolo", "coco", "voc")
ALIASES: dict[str, str] = {"valid": "val", "validation": "val"}
KEYS = (
    *("path", *SPLITS, *ALIASES, "names", "nc", "images", "one_based", "white", "kpt_shape"),
    *("channels", "format", "builtin", "sources", "download"),
)
MOST_CLASSES = 100_000
"""More are a slip, and would take memory before anything else is looked at."""
LONGEST_NAME, LONGEST_PATH = 255, 4000  # bytes, as file systems have it
LONGEST_VALUE = 80  # characters of a value in a message
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxlist, _REPR.maxdict, _REPR.maxstring = 3, 20, 20, 80


def load_data_config(source: str | Path) -> DataConfig:
    """Read a data YAML, or recognise the data in a folder.

    The files of the splits need not exist yet (see `data.download`), unless the class names have
    to be taken from them. The built-in set (`builtin: shapes`) is drawn if it is absent.

    Args:
        source: YAML file or folder; a relative name is also looked for in this project and its
            `data` folder.

    Raises:
        DatasetError: none is given, no such file, or problems in it, all of them in one message.
    """
    if not str(source).strip():
        raise DatasetError("--data: got nothing, expected a data YAML or folder.")
    file = _find_source(Path(source))
    if file.is_dir():
        file = yaml_in(file) or file
    document = describe_folder(file) if file.is_dir() else _read_yaml(file)
    config = _build(document, file)
    if file.is_dir() and config.splits.get("val") in _other_splits(config):
        LOGGER.warning("%s: no val split of its own, it is scored on train or test", file)
    builtin = document.get("builtin")
    if builtin == "shapes":
        _draw_shapes(config)
    elif builtin is not None:
        raise DatasetError(f"{file}: builtin - got {_shown(builtin)}, expected shapes.")
    return config


def _other_splits(config: DataConfig) -> list[tuple[Path, ...]]:
    return [entries for split, entries in config.splits.items() if split != "val"]


def _draw_shapes(config: DataConfig) -> None:
    try:
        if draw_if_absent(config.path):
            LOGGER.info("%s: drew the built-in shapes into %s", config.file, config.path)
    except OSError as error:
        raise DatasetError(
            f"{config.path}: the built-in shapes cannot be written - got {error.strerror}."
        ) from error


def _find_source(source: Path) -> Path:
    for place in (source, ROOT / source, ROOT / "data" / source):
        if place.exists():
            return place
    known = [path.name for path in (ROOT / "data").glob("*.yaml")]
    raise DatasetError(
        f"{source}: no such data YAML or folder, expected for example data/shapes.yaml."
        f"{nearest(source.name, known)}"
    )


def _read_yaml(file: Path) -> dict[str, Any]:
    text = read_text(file)
    try:
        document = parse_yaml(text, str(file)).data
    except ConfigError as error:
        raise DatasetError(str(error)) from error
    if isinstance(document.get("names"), (list, dict)):
        document["names"] = _as_written(text).get("names", document["names"])
    return document


def _as_written(text: str) -> dict[str, Any]:
    """The document with every value as the text that stands there."""
    loader = yaml.BaseLoader(text)
    try:
        return dict(loader.get_single_data())
    finally:
        loader.dispose()


def _shown(value: Any) -> str:
    """A value in a message, however long or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _build(document: Mapping[str, Any], file: Path) -> DataConfig:
    _tell_unknown(document, file)
    problems: list[str] = []
    folder = file if file.is_dir() else file.parent
    bases = (
        (folder,) if document.get("builtin") else (folder, Path.cwd(), ROOT)
    )  # drawn where it says
    path = _data_folder(document.get("path"), bases, problems)
    splits, detected = _read_splits(document, path, problems)
    form = document.get("format", detected)
    if form not in FORMATS:
        problems.append(f"format - got {_shown(form)}, expected one of {', '.join(FORMATS)}")
    names = _read_names(document, problems)
    sources = _read_sources(document.get("sources"), problems)
    images = _read_image_folders(document.get("images"), path, problems)
    pixels = _read_pixels(document, problems)
    if problems:
        told = "; ".join(problems)
        raise DatasetError(f"{file}: {told}" + ("" if told.endswith("?") else "."))
    script = document.get("download")
    config = DataConfig(
        path=path,
        names=names,
        splits=splits,
        format=str(form),
        file=file,
        images=images,
        sources=sources,
        script=" ".join(script.split())[:60] if isinstance(script, str) else "",
        **pixels,
    )
    return config if names else _with_names_of_files(config)


def _tell_unknown(document: Mapping[str, Any], file: Path) -> None:
    unknown = [f"{_shown(key)}.{nearest(str(key), KEYS)}" for key in document if key not in KEYS]
    if unknown:
        LOGGER.warning("%s: without effect here, unknown key %s", file, " ".join(unknown))


def _read_pixels(document: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
    """How coordinates and pixel values are meant."""
    one_based, channels = document.get("one_based", False), document.get("channels", 3)
    if not isinstance(one_based, bool):
        problems.append(f"one_based - got {_shown(one_based)}, expected true or false")
    if isinstance(channels, bool) or channels not in (1, 3):
        told = "expected 3. Images are read as RGB, which a model of ch: 1 turns grey"
        problems.append(f"channels - got {_shown(channels)}, {told}")
    shape = document.get("kpt_shape")
    if shape is not None and not _is_keypoint_shape(shape):
        told = "expected the number of keypoints and 2 or 3, as [17, 3]"
        problems.append(f"kpt_shape - got {_shown(shape)}, {told}")
        shape = None
    try:
        white = white_of(document)
    except ConfigError as error:
        problems.append(str(error).rstrip("."))
        white = None
    return {"one_based": one_based, "white": white, "keypoints": tuple(shape) if shape else None}


def _is_keypoint_shape(value: Any) -> bool:
    is_pair = isinstance(value, list) and len(value) == 2 and all(type(n) is int for n in value)
    return is_pair and value[0] >= 1 and value[1] in (2, 3)


def _data_folder(value: Any, bases: Sequence[Path], problems: list[str]) -> Path:
    """The folder that `path:` means: the first that exists under one of `bases`, else under the first of them."""
    if value is not None and not _is_path(value):
        problems.append(f"path - got {_shown(value)}, expected a folder. Put a number in quotes")
        return bases[0]
    path = Path(os.path.expanduser(value or "."))
    if path.is_absolute():
        return path
    places = [Path(os.path.normpath(base / path)) for base in bases]
    return next((place for place in places if place.is_dir()), places[0])


def _read_splits(
    document: Mapping[str, Any], path: Path, problems: list[str]
) -> tuple[dict[str, tuple[Path, ...]], str]:
    """Entries of every split and the format that they show."""
    splits: dict[str, tuple[Path, ...]] = {}
    forms: dict[str, str] = {}
    for key, value in document.items():
        split = ALIASES.get(key, key)
        if split not in SPLITS or value is None or (key in ALIASES and split in document):
            continue
        entries = value if isinstance(value, list) else [value]
        if not entries or not all(map(_is_path, entries)):
            problems.append(f"{key} - got {_shown(value)}, expected a path or a list of paths")
            continue
        found = [recognise_entry(_entry_path(entry, path)) for entry in entries]
        splits[split] = tuple(place for _, place in found)
        # A folder that is not there yet shows nothing.
        forms.update({form: key for form, place in found if form != "yolo" or place.exists()})
    if not splits:
        problems.append("no split found, expected train and val")
    if len(forms) > 1 and "format" not in document:
        shown = ", ".join(f"{form} ({key})" for form, key in forms.items())
        problems.append(f"got splits in several forms: {shown}, expected one form")
    return {split: splits[split] for split in SPLITS if split in splits}, next(iter(forms), "yolo")


def _is_path(value: Any) -> bool:
    """Whether `value` is text that a file system takes for a path and a message can show."""
    if not isinstance(value, str) or not value or _has_controls(value):
        return False
    parts = os.fsencode(value).split(os.fsencode(os.sep))
    return max(map(len, parts)) <= LONGEST_NAME and sum(map(len, parts)) <= LONGEST_PATH


def _entry_path(entry: str, path: Path) -> Path:
    place = Path(os.path.normpath(path / os.path.expanduser(entry)))
    # Exports of a labelling service write ../train/images for what lies beside the YAML.
    inside = Path(os.path.normpath(path / entry.lstrip("./")))
    if entry.startswith("../") and not place.exists() and inside.exists():
        return inside
    return place


def _read_names(document: Mapping[str, Any], problems: list[str]) -> tuple[str, ...]:
    names, count = document.get("names"), document.get("nc")
    if count is not None and not (type(count) is int and 1 <= count <= MOST_CLASSES):
        told = f"expected a number of classes, 1 to {MOST_CLASSES}"
        problems.append(f"nc - got {_shown(count)}, {told}")
        return ()
    if names is None:
        return tuple(f"class{k}" for k in range(count or 0))
    if isinstance(names, dict):
        keys = [int(k) if str(k).isdecimal() and len(str(k)) < 10 else k for k in names]
        if sorted(keys, key=str) != sorted(range(len(names)), key=str):
            got, last = ", ".join(str(k)[:20] for k in keys[:20]), len(names) - 1
            problems.append(f"names - got keys [{got}], expected 0 to {last}")
            return ()
        names = [name for _, name in sorted(zip(keys, names.values()))]
    if not isinstance(names, list) or not names:
        told = "expected a list or a mapping of class names"
        problems.append(f"names - got {_shown(names)}, {told}")
        return ()
    wrong = [name for name in names if not _is_name(name)]
    if wrong:
        problems.append(f"names - got {_shown(wrong[0])}, expected text that can be printed")
        return ()
    texts = tuple(str(name) for name in names)
    repeated = sorted({name for name in texts if texts.count(name) > 1})
    if repeated:
        problems.append(f"names - got {_shown(repeated[0])} twice, expected each name once")
    if count is not None and count != len(texts):
        problems.append(f"nc - got {count}, expected {len(texts)}, the number of names")
    return texts


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and bool(name.strip()) and not _has_controls(name)


def _has_controls(text: str) -> bool:
    """Whether there are characters that act on a terminal or end a line; joiners of scripts are none."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _read_sources(value: Any, problems: list[str]) -> tuple[DownloadSource, ...]:
    known = {field.name for field in fields(DownloadSource)}
    if value is not None and not isinstance(value, list):
        problems.append(f"sources - got {_shown(value)}, expected a list of addresses")
        return ()
    sources = []
    for number, row in enumerate(value or []):
        if isinstance(row, str):
            row = {"url": row}
        size = row.get("size", 0) if isinstance(row, dict) else 0
        if (
            not isinstance(row, dict)
            or "url" not in row
            or set(row) - known
            or type(size) is not int
        ):
            expected = ", ".join(sorted(known))
            problems.append(f"sources[{number}] - got {_shown(row)}, expected keys {expected}")
            continue
        texts = {key: str(row[key]) for key in row if key != "size"}
        sources.append(DownloadSource(size=size, **texts))
    return tuple(sources)


def _read_image_folders(value: Any, path: Path, problems: list[str]) -> dict[str, Path]:
    if value is None:
        return {}
    if isinstance(value, str):
        value = dict.fromkeys(SPLITS, value)
    if not isinstance(value, dict) or not all(map(_is_path, value.values())):
        problems.append(f"images - got {_shown(value)}, expected a folder, or one per split")
        return {}
    unknown = [key for key in value if key not in (*SPLITS, *ALIASES)]
    if unknown:
        hint = nearest(str(unknown[0]), SPLITS)
        told = f"expected {', '.join(SPLITS)}{'.' if hint else ''}{hint}"
        problems.append(f"images - got {_shown(unknown[0])}, {told}")
    folders = {str(key): _entry_path(folder, path) for key, folder in value.items()}
    return {ALIASES.get(split, split): folder for split, folder in folders.items()}


def _with_names_of_files(config: DataConfig) -> DataConfig:
    entries = [entry for split in config.splits for entry in config.entries(split)]
    if config.format == "coco":
        names = coco.names_of(entries)
    elif config.format == "voc":
        names = voc.names_of(entries)
    else:
        names = ()
    if not names:
        raise DatasetError(f"{config.file}: no class names. Add `names: [...]`.")
    return replace(config, names=names)
