"""What a study compares, and the folder that it keeps everything in, so that a stopped one goes on.

runs/compare/exp/
  plan.json                                    what was asked for
  entries/yolo11n+resnet18/seed0/              a training, as train.py leaves it, with its train.log
  entries/yolo11n+resnet18/measured.json       what was measured of it, with measure.log
  latency.json                                 of all of them, in turn
  study.html  study.md  study.csv  study.json  model_card.md
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence, Set
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from engine.flags import spelling
from engine.options import CompareOptions
from utils.errors import ConfigError
from utils.files import write_whole

PLAN, MEASURED, LATENCY = "plan.json", "measured.json", "latency.json"
OWN = "none"  # the backbone of the YAML itself
ALIKE = ("data", "imgsz", "epochs", "seeds", "train")
"""What all entries of a study have in common; without it they could not be compared."""
COMMAND_LINE_ONLY = frozenset("device allow_code download".split())
"""What a study that goes on has from its own command line alone: its folder may be a stranger's."""
CHANGEABLE = COMMAND_LINE_ONLY | frozenset("budget workers runs runtime markdown".split())
"""What may be given anew when a study goes on."""
WEIGHTS = (".pt", ".safetensors")


@dataclass(frozen=True)
class Entry:
    """One thing to compare.

    Attributes:
        model: a config, or a file of weights or an exported one.
        backbone: `NAME key=value ...` that stands in the config instead of its own; empty: its own.
    """

    model: str
    backbone: tuple[str, ...] = ()

    @property
    def file(self) -> Path | None:
        """The file of a model that is there already; None for a config."""
        path = Path(self.model)
        if path.is_dir() and (path / "weights" / "best.pt").is_file():
            return path / "weights" / "best.pt"
        is_config = path.suffix in (".yaml", ".yml") or not (path.exists() or path.suffix in WEIGHTS)  # fmt: skip
        return None if is_config else path

    @property
    def name(self) -> str:
        """`yolo11n + resnet18 pretrained=true`; of weights with the folder of their run."""
        if file := self.file:
            parent = file.resolve().parent
            is_of_run = parent.name == "weights" and file.suffix in WEIGHTS
            return f"{parent.parent.name}/{file.name}" if is_of_run else file.name
        model = Path(self.model).stem if self.model.endswith((".yaml", ".yml")) else self.model
        return f"{model} + {' '.join(self.backbone)}" if self.backbone else model

    @property
    def folder_name(self) -> str:
        """The name as that of a folder."""
        return re.sub(r"[^\w.=+-]+", "_", self.name.replace(" + ", "+"))


def entries_of(models: Sequence[str], backbone: Sequence[str] | None) -> list[Entry]:
    """Every config over every backbone, files as they are.

    Args:
        models: configs and files.
        backbone: `none EMO_1M resnet18 pretrained=true`; a word with `=` belongs to the name before it.

    Raises:
        ConfigError: a backbone, but no config to put it under.
    """
    backbones: list[tuple[str, ...]] = []
    for word in backbone or [OWN]:
        if "=" in word and backbones:
            backbones[-1] += (word,)
        else:
            backbones.append((word,))
    grid: list[Entry] = []
    for model in models:
        entry = Entry(model)
        under = [()] if entry.file else [() if words == (OWN,) else words for words in backbones]
        grid += [replace(entry, backbone=words) for words in under]
    if backbone and all(entry.file for entry in grid):
        raise ConfigError(
            f"--backbone: belongs to configs; {models[0]} says what it is. Leave one of them out."
        )
    return list(dict.fromkeys(grid))


@dataclass(frozen=True)
class Training:
    """One training of an entry: its seed and its folder."""

    entry: Entry
    seed: int
    folder: Path

    @property
    def last(self) -> Path:
        """The checkpoint that it goes on from."""
        return self.folder / "weights" / "last.pt"

    @property
    def best(self) -> Path:
        """The weights that are measured."""
        return self.folder / "weights" / "best.pt"


@dataclass(frozen=True)
class Study:
    """A study: its folder, the flags that its entries have in common, the entries, the commands that made it."""

    folder: Path
    options: CompareOptions
    entries: tuple[Entry, ...]
    commands: tuple[str, ...]

    def folder_of(self, entry: Entry) -> Path:
        """Where what belongs to an entry is kept."""
        return self.folder / "entries" / entry.folder_name

    def trainings(self, entry: Entry) -> Iterator[Training]:
        """Those of a config, one a seed; none of a file."""
        for seed in range(self.options.seeds) if entry.file is None else ():
            yield Training(entry, seed, self.folder_of(entry) / f"seed{seed}")

    def runs_of(self, entry: Entry) -> list[Path]:
        """Folders of the trainings that an entry comes from, those of this study or the one that its file lies in."""
        if entry.file is None:
            return [training.folder for training in self.trainings(entry)]
        return [entry.file.parent.parent] if entry.file.parent.name == "weights" else []

    def save(self) -> None:
        """Write the plan."""
        content = {
            "options": vars(self.options),
            "entries": [asdict(entry) for entry in self.entries],
            "commands": self.commands,
        }
        write_whole(self.folder / PLAN, json.dumps(content, indent=1).encode())


def load_study(folder: Path) -> Study:
    """The study that a folder keeps.

    Raises:
        ConfigError: it keeps none, or a damaged one.
    """
    try:
        content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        known = {item.name for item in fields(CompareOptions)}
        own = {name: value for name, value in content["options"].items() if name in known}
        entries = [Entry(e["model"], tuple(e["backbone"])) for e in content["entries"]]
        return Study(folder, CompareOptions(**own), tuple(entries), tuple(content["commands"]))
    except FileNotFoundError as error:
        raise ConfigError(
            f"--resume: {folder} has no {PLAN}, expected the folder of a study. Give that."
        ) from error
    except (ValueError, TypeError, LookupError) as error:
        raise ConfigError(
            f"{folder / PLAN}: is damaged - {error}. Start the study anew."
        ) from error


def open_study(options: CompareOptions, given: Set[str]) -> Study:
    """The study that the flags mean: a new one, one that goes on, or one that grows (`--exist-ok`).

    Args:
        options: flags of the command line.
        given: names of those that stand on it.

    Raises:
        ConfigError: nothing to resume, or flags that the study's other entries were not made with.
    """
    if options.resume:
        study = load_study(_newest(options) if options.resume is True else Path(options.resume))
        new = {name: vars(options)[name] for name in COMMAND_LINE_ONLY | (given & CHANGEABLE)}
        others = sorted(map(spelling, given - CHANGEABLE - {"resume", "project"}))
        if others:
            raise ConfigError(
                f"--resume: the study says by itself what {', '.join(others)} is. Leave it out, or add entries with "
                f"the whole command, --name {study.folder.name} and --exist-ok."
            )
        study = replace(study, options=replace(study.options, **new))
        study.save()  # for the children, which read it
        return study
    entries = entries_of(options.models, options.backbone)
    folder, commands = options.make_folder(), [command_line()]
    if (folder / PLAN).is_file():
        before = load_study(folder)
        _require_alike(before, options)
        entries = list(dict.fromkeys([*before.entries, *entries]))
        commands = list(dict.fromkeys([*before.commands, *commands]))
    _require_names(entries)
    study = Study(folder, options, tuple(entries), tuple(commands))
    study.save()
    return study


def _require_names(entries: Sequence[Entry]) -> None:
    names = [entry.folder_name for entry in entries]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(
            f"--models: two entries are called {twice[0]}, expected one. Rename a file."
        )


def _newest(options: CompareOptions) -> Path:
    found = sorted(Path(options.project).glob(f"*/{PLAN}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ConfigError(f"--resume: no study under {options.project}. Give its folder.")
    return found[-1].parent


def _require_alike(before: Study, options: CompareOptions) -> None:
    own, now = vars(before.options), vars(options)
    if other := [spelling(name) for name in ALIKE if own[name] != now[name]]:
        raise ConfigError(
            f"{before.folder}: its entries have another {', '.join(other)}, expected the same of all that are compared. "
            "Take another --name."
        )


def command_line() -> str:
    """The command as it was typed, in a form that a shell reads."""
    return shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
