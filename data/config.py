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

import os
import reprlib
import unicodedata
from dataclasses import fields, replace
from pathlib import Path
from typing import TypeGuard

from data.formats import coco, voc
from data.formats.description import (
    SPLITS,
    DataConfig,
    DownloadSource,
    describe_folder,
    recognise_entry,
    yaml_in,
)
from data.formats.files import read_text
from data.shapes import draw_if_absent
from utils.channels import white_of
from utils.errors import ConfigError, DatasetError, nearest
from utils.logger import get_logger
from utils.yaml_file import YamlFile, parse_yaml

__all__ = ["DataConfig", "DownloadSource", "load_data_config"]

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
    config = _Reader(file).config()
    others = [entries for split, entries in config.splits.items() if split != "val"]
    if file.is_dir() and config.splits.get("val") in others:
        get_logger().warning("%s: no val split of its own, it is scored on train or test", file)
    return config


def _find_source(source: Path) -> Path:
    for place in (source, ROOT / source, ROOT / "data" / source):
        if place.exists():
            return place
    known = [path.name for path in (ROOT / "data").glob("*.yaml")]
    raise DatasetError(
        f"{source}: no such data YAML or folder, expected for example data/shapes.yaml."
        f"{nearest(source.name, known)}"
    )


class _Reader:
    """Reads the keys of one data YAML, or of what a folder shows; each that is wrong is a problem, told with the others.

    Args:
        file: YAML file or folder; named in messages.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.yaml = YamlFile(describe_folder(file), {}) if file.is_dir() else _parsed(file)
        self.document = self.yaml.data
        self.problems: list[str] = []
        self.path = self._data_folder()

    def config(self) -> DataConfig:
        """All keys together.

        Raises:
            DatasetError: with every problem.
        """
        unknown = [f"{_shown(k)}.{nearest(str(k), KEYS)}" for k in self.document if k not in KEYS]
        if unknown:
            get_logger().warning(
                "%s: without effect here, unknown key %s", self.file, " ".join(unknown)
            )
        splits, detected = self._splits()
        form = self.document.get("format", detected)
        if form not in FORMATS:
            self._wrong("format", form, f"one of {', '.join(FORMATS)}")
        script = self.document.get("download")
        config = DataConfig(
            path=self.path,
            names=self._names(),
            splits=splits,
            format=str(form),
            file=self.file,
            sources=self._sources(),
            images=self._image_folders(),
            one_based=self._one_based(),
            keypoints=self._keypoints(),
            white=self._white(),
            script=" ".join(script.split())[:60] if isinstance(script, str) else "",
        )
        builtin = self.document.get("builtin")
        if builtin not in (None, "shapes"):
            self._wrong("builtin", builtin, "shapes")
        if self.problems:
            told = "; ".join(self.problems)
            raise DatasetError(f"{self.file}: {told}" + ("" if told.endswith("?") else "."))
        if builtin:
            _draw_shapes(config)
        return config if config.names else _with_names_of_files(config)

    def _wrong(self, key: str, got: object, expected: str) -> None:
        self.problems.append(f"{key} - got {_shown(got)}, expected {expected}")

    def _data_folder(self) -> Path:
        """What `path:` means: the first such folder that exists beside the YAML, here or in the project, else the first."""
        value = self.document.get("path")
        own = self.file if self.file.is_dir() else self.file.parent
        # What is built in is drawn where it says.
        bases = [own] if self.document.get("builtin") else [own, Path.cwd(), ROOT]
        if value is not None and not _is_path(value):
            self._wrong("path", value, "a folder. Put a number in quotes")
            return own
        path = Path(os.path.expanduser(value or "."))
        places = [Path(os.path.normpath(base / path)) for base in bases]
        return next((place for place in places if place.is_dir()), places[0])

    def _splits(self) -> tuple[dict[str, tuple[Path, ...]], str]:
        """Entries of every split and the format that they show."""
        splits: dict[str, tuple[Path, ...]] = {}
        forms: dict[str, str] = {}
        for key, value in self.document.items():
            split = ALIASES.get(key, key)
            if split not in SPLITS or value is None or (key in ALIASES and split in self.document):
                continue
            entries = value if isinstance(value, list) else [value]
            if not entries or not all(map(_is_path, entries)):
                self._wrong(key, value, "a path or a list of paths")
                continue
            found = [recognise_entry(_entry_path(entry, self.path)) for entry in entries]
            splits[split] = tuple(place for _, place in found)
            # A folder that is not there yet shows nothing.
            forms |= {form: key for form, place in found if form != "yolo" or place.exists()}
        if not splits:
            self.problems.append("no split found, expected train and val")
        if len(forms) > 1 and "format" not in self.document:
            shown = ", ".join(f"{form} ({key})" for form, key in forms.items())
            self.problems.append(f"got splits in several forms: {shown}, expected one form")
        ordered = {split: splits[split] for split in SPLITS if split in splits}
        return ordered, next(iter(forms), "yolo")

    def _names(self) -> tuple[str, ...]:
        names, count = self.document.get("names"), self.document.get("nc")
        if count is not None and not (type(count) is int and 1 <= count <= MOST_CLASSES):
            self._wrong("nc", count, f"a number of classes, 1 to {MOST_CLASSES}")
            return ()
        if names is None:
            return tuple(f"class{k}" for k in range(count or 0))
        keys = list(range(len(names))) if isinstance(names, list) else []
        if isinstance(names, dict):
            keys = list(names)
            numbers = [int(k) if str(k).isdecimal() and len(str(k)) < 10 else k for k in keys]
            if sorted(numbers, key=str) != sorted(range(len(names)), key=str):
                got = ", ".join(str(k)[:20] for k in numbers[:20])
                self.problems.append(f"names - got keys [{got}], expected 0 to {len(names) - 1}")
                return ()
            keys = [key for _, key in sorted(zip(numbers, keys))]
        if not keys:
            self._wrong("names", names, "a list or a mapping of class names")
            return ()
        texts = [self.yaml.texts.get(("names", key), names[key]) for key in keys]
        wrong = [text for text in texts if not _is_name(text)]
        if wrong:
            self._wrong("names", wrong[0], "text that can be printed")
            return ()
        repeated = sorted({text for text in texts if texts.count(text) > 1})
        if repeated:
            self.problems.append(
                f"names - got {_shown(repeated[0])} twice, expected each name once"
            )
        if count not in (None, len(texts)):
            self.problems.append(f"nc - got {count}, expected {len(texts)}, the number of names")
        return tuple(texts)

    def _sources(self) -> tuple[DownloadSource, ...]:
        rows = self.document.get("sources") or []
        if not isinstance(rows, list):
            self._wrong("sources", rows, "a list of addresses")
            return ()
        known = {field.name for field in fields(DownloadSource)}
        sources = []
        for number, given in enumerate(rows):
            row = {"url": given} if isinstance(given, str) else given
            is_row = isinstance(row, dict) and "url" in row and set(row) <= known
            size = row.get("size", 0) if is_row else None
            if type(size) is not int:
                self._wrong(f"sources[{number}]", row, f"keys {', '.join(sorted(known))}")
                continue
            texts = {key: str(value) for key, value in row.items() if key != "size"}
            sources.append(DownloadSource(size=size, **texts))
        return tuple(sources)

    def _image_folders(self) -> dict[str, Path]:
        value = self.document.get("images")
        if value is None:
            return {}
        if isinstance(value, str):
            value = dict.fromkeys(SPLITS, value)
        if not isinstance(value, dict) or not all(map(_is_path, value.values())):
            self._wrong("images", value, "a folder, or one per split")
            return {}
        unknown = [key for key in value if key not in (*SPLITS, *ALIASES)]
        if unknown:
            hint = nearest(str(unknown[0]), SPLITS)
            self._wrong("images", unknown[0], f"{', '.join(SPLITS)}{'.' if hint else ''}{hint}")
        return {
            ALIASES.get(str(split), str(split)): _entry_path(folder, self.path)
            for split, folder in value.items()
        }

    def _one_based(self) -> bool:
        value, channels = self.document.get("one_based", False), self.document.get("channels", 3)
        if not isinstance(value, bool):
            self._wrong("one_based", value, "true or false")
        if isinstance(channels, bool) or channels not in (1, 3):
            told = "3. Images are read as RGB, which a model of ch: 1 turns grey"
            self._wrong("channels", channels, told)
        return value is True

    def _keypoints(self) -> tuple[int, int] | None:
        value = self.document.get("kpt_shape")
        is_pair = isinstance(value, list) and [type(n) for n in value] == [int, int]
        if value is not None and is_pair and value[0] >= 1 and value[1] in (2, 3):
            return value[0], value[1]
        if value is not None:
            self._wrong("kpt_shape", value, "the number of keypoints and 2 or 3, as [17, 3]")
        return None

    def _white(self) -> float | None:
        try:
            return white_of(self.document)
        except ConfigError as error:
            self.problems.append(str(error).rstrip("."))
            return None


def _parsed(file: Path) -> YamlFile:
    try:
        return parse_yaml(read_text(file), str(file))
    except ConfigError as error:
        raise DatasetError(str(error)) from error


def _shown(value: object) -> str:
    """A value in a message, however long or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."


def _is_path(value: object) -> TypeGuard[str]:
    """Whether `value` is text that a file system takes for a path and a message can show."""
    if not isinstance(value, str) or not value or _has_controls(value):
        return False
    parts = os.fsencode(value).split(os.fsencode(os.sep))
    return max(map(len, parts)) <= LONGEST_NAME and sum(map(len, parts)) <= LONGEST_PATH


def _is_name(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip()) and not _has_controls(value)


def _has_controls(text: str) -> bool:
    """Whether there are characters that act on a terminal or end a line; joiners of scripts are none."""
    return any(unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") for character in text)


def _entry_path(entry: str, path: Path) -> Path:
    place = Path(os.path.normpath(path / os.path.expanduser(entry)))
    # Exports of a labelling service write ../train/images for what lies beside the YAML.
    inside = Path(os.path.normpath(path / entry.lstrip("./")))
    is_beside = entry.startswith("../") and not place.exists() and inside.exists()
    return inside if is_beside else place


def _draw_shapes(config: DataConfig) -> None:
    try:
        if draw_if_absent(config.path):
            get_logger().info("%s: drew the built-in shapes into %s", config.file, config.path)
    except OSError as error:
        raise DatasetError(
            f"{config.path}: the built-in shapes cannot be written - got {error.strerror}."
        ) from error


def _with_names_of_files(config: DataConfig) -> DataConfig:
    entries = [entry for split in config.splits for entry in config.entries(split)]
    readers = {"coco": coco.names_of, "voc": voc.names_of}
    names = readers[config.format](entries) if config.format in readers else ()
    if not names:
        raise DatasetError(f"{config.file}: no class names. Add `names: [...]`.")
    return replace(config, names=names)
