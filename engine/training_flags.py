"""The flags of train.py, in groups: what is trained, on what, how, and what is kept."""

from __future__ import annotations

from argparse import Action, ArgumentTypeError, Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.flags import (
    add_data_flag,
    add_device_flag,
    add_ignored_flags,
    add_model_flags,
    add_run_flags,
    add_size_flag,
    say_ignored,
)
from models.losses.box import name_problem
from models.losses.classification import CLASS_LOSSES
from utils.config import ArgumentParser, integer, number
from utils.device import AMP_CHOICES
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger

EPOCHS = 100
PATIENCE = 100
SCHEDULE_FLAGS = ("cos-lr", "flat-cos-lr", "fixed-lr")
TRIALS = 300
HIGHEST_SEED = 2**31 - 1  # every library takes it, also with an epoch or a trial added
IGNORED = {
    "bucket": "", "quad": False, "local_rank": -1, "entity": None, "upload_dataset": None, "bbox_interval": -1,
    "artifact_alias": None, "evolve_population": None, "min_items": None,
}  # fmt: skip
COMMAND_LINE_ONLY = frozenset("resume device allow_code download evolve resume_evolve".split())
"""A resumed run has these from its own command line alone: a checkpoint may be a stranger's."""
CHANGEABLE = frozenset("data workers cache patience noval noplots save_period".split())
"""What may be given anew when a run is resumed: where it reads, how fast, and what it writes."""


def parse_options(arguments: Sequence[str] | None = None) -> Namespace:
    """Read the command line of train.py."""
    options = _parser().parse_args(arguments)
    say_ignored(options, IGNORED)
    options.config = None
    if options.freeze == ["0"]:  # the customary default: nothing is frozen
        options.freeze = []
    if options.resume_evolve and not options.evolve:
        options.evolve = TRIALS
    return options


def check_pairs(options: Namespace) -> None:
    """Refuse flags that exclude each other, and tell those that change nothing beside another one.

    Raises:
        ConfigError: several schedules, or an order of images beside that of `--rect`.
    """
    schedules = [flag for flag in SCHEDULE_FLAGS if getattr(options, flag.replace("-", "_"))]
    if len(schedules) > 1:
        raise ConfigError(
            f"--{', --'.join(schedules)}: got {len(schedules)} schedules, expected one."
        )
    if options.rect and options.image_weights:
        raise ConfigError("--image-weights: cannot be used with --rect. Drop one of them.")
    needless = {
        "--close-mosaic: without effect with --rect, which makes no mosaics": options.rect
        and options.close_mosaic is not None,
        "--save-period: without effect with --nosave": options.nosave and options.save_period > 0,
        "--patience: without effect with --noval": options.noval and options.patience != PATIENCE,
    }
    for told, is_so in needless.items():
        if is_so:
            get_logger().info(told)


def check_saved(own: Mapping[str, Any], path: Path) -> None:
    """Make sure that flags which a checkpoint kept are such as the command line takes.

    Raises:
        CheckpointError: the first that is not.
    """
    for action in _parser().flags():
        value = own.get(action.dest, action.default)
        is_plain = isinstance(value, (bool, int, float, str, list, type(None)))
        if is_plain and (value == action.default or value is None):
            continue
        items = value if action.nargs in ("*", "+") and isinstance(value, list) else [value]
        if not all(_is_taken(action, item) for item in items):
            raise CheckpointError(
                f"{path}: its flag {action.option_strings[0]} - got {str(value)[:60]!r}, expected what the flag takes."
            )


def _is_taken(action: Action, item: object) -> bool:
    """Whether a flag would give `item` for its own text."""
    if action.nargs == 0:
        return isinstance(item, bool)
    if not isinstance(item, (str, int, float)) or isinstance(item, bool):
        return action.const is not None and item == action.const
    try:
        read = action.type(str(item)) if callable(action.type) else str(item)
    except (ValueError, TypeError, ArgumentTypeError):
        return False
    is_chosen = action.choices is None or item in action.choices
    return is_chosen and (read == item if callable(action.type) else isinstance(item, str))


def given_flags(arguments: Sequence[str] | None = None) -> frozenset[str]:
    """Names of the flags that stand on a command line; those without effect left out."""
    parser, nothing = _parser(), object()
    names = [name for name in vars(parser.parse_args([])) if name not in IGNORED]
    blank = Namespace(**dict.fromkeys(names, nothing))  # argparse fills in what is not there yet
    options = vars(parser.parse_args(arguments, blank))
    return frozenset(name for name in names if options[name] is not nothing)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Train a detector.",
        epilog="Example: python train.py --cfg yolov5n-emo.yaml --data data/shapes.yaml --imgsz 320",
    )
    _add_model_group(parser)
    _add_data_group(parser)
    _add_optimisation_group(parser)
    _add_output_group(parser)
    add_ignored_flags(parser, IGNORED)
    return parser


def _seed(text: str) -> int:
    value = integer(0)(text)
    if value > HIGHEST_SEED:
        raise ArgumentTypeError(f"got {value}, expected 0 to {HIGHEST_SEED}")
    return value


def _box_loss(text: str) -> str:
    if problem := name_problem(text):
        raise ArgumentTypeError(problem)
    return text


def _add_model_group(parser: ArgumentParser) -> None:
    add_model_flags(parser)
    add = parser.add_argument
    add("--weights", default="", help="weights to start from; empty: from scratch")
    add("--backbone-weights", default="", help="weights of the backbone only")
    add("--end2end", action="store_true", help="train a branch without NMS beside the head's own")
    add(
        "--freeze",
        nargs="+",
        default=[],
        help="10: rows below 10; 0 3: those rows; or names: backbone, C3, model.0.*",
    )
    add("--noautoanchor", action="store_true", help="keep the anchors of the YAML")
    add("--sync-bn", action="store_true", help="BatchNorm over all processes")


def _add_data_group(parser: ArgumentParser) -> None:
    add_data_flag(parser)
    add_size_flag(parser)
    add = parser.add_argument
    batch_size = integer(1, allowed=(-1,))
    add(
        "--batch-size",
        type=batch_size,
        default=16,
        help="images a step, over all processes; -1: what fits",
    )
    add("--rect", action="store_true", help="batches of the images' own shape, without mosaic")
    add("--multi-scale", action="store_true", help="vary the image size by half")
    add("--single-cls", action="store_true", help="treat all classes as one")
    add("--image-weights", action="store_true", help="draw images with rare classes more often")
    add(
        "--close-mosaic", type=integer(0), default=None, help="last epochs without mosaic and mixup"
    )
    cache = ("ram", "disk")
    add(
        "--cache",
        nargs="?",
        const="ram",
        choices=cache,
        help="keep images in memory or as arrays on disk",
    )
    add(
        "--workers",
        type=integer(0),
        default=8,
        help="processes that load images, at most one a core",
    )


def _add_optimisation_group(parser: ArgumentParser) -> None:
    add = parser.add_argument
    add("--hyp", default=None, help="recipe YAML over the family's own in data/hyps")
    add("--epochs", type=integer(1), help=f"passes over the data, {EPOCHS} if left out")
    add("--optimizer", choices=("SGD", "Adam", "AdamW"), help="instead of the recipe's")
    add(
        "--box-loss",
        type=_box_loss,
        help="instead of the recipe's: giou, focal-eiou, file.py:name ...",
    )
    add("--cls-loss", choices=tuple(CLASS_LOSSES), help="instead of the recipe's")
    add("--cos-lr", action="store_true", help="cosine instead of the recipe's schedule")
    add("--flat-cos-lr", action="store_true", help="flat, then cosine")
    add("--fixed-lr", action="store_true", help="constant after the warm-up")
    add("--label-smoothing", type=number(0, 1), default=0.0, help="part taken off certainty")
    add(
        "--patience",
        type=integer(0),
        default=PATIENCE,
        help="epochs without a better one before stopping; 0: never",
    )
    add("--amp", default="auto", choices=AMP_CHOICES, help="mixed precision")
    add("--seed", type=_seed, default=0, help="of everything random")
    add_device_flag(parser)
    add(
        "--evolve", nargs="?", type=integer(1), const=TRIALS, default=0,
        help="search the recipe by so many trainings (needs optuna)",
    )  # fmt: skip
    add("--resume_evolve", "--resume-evolve", default=None, help="folder of a search to go on with")


def _add_output_group(parser: ArgumentParser) -> None:
    add_run_flags(parser, "runs/train")
    add = parser.add_argument
    add(
        "--resume",
        nargs="?",
        const=True,
        default=False,
        help="go on with the newest, or the given, last.pt",
    )
    add("--nosave", action="store_true", help="save the last checkpoint only")
    add("--noval", action="store_true", help="validate the last epoch only")
    add("--noplots", action="store_true", help="write no pictures")
    add("--save-period", type=int, default=-1, help="also save every so many epochs")
