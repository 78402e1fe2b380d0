"""Command-line flags that several scripts share, under the names users know."""

from __future__ import annotations

from typing import Any

from utils.config import ArgumentParser, integer, number, report_ignored_flags


def add_size_flag(parser: ArgumentParser, default: int | None = 640) -> None:
    """`--imgsz 640` or `--imgsz 480 640`."""
    parser.add_argument(
        "--imgsz", "--img", "--img-size", nargs="+", type=integer(1), default=default, metavar="N",
        help="image size: one number, or height and width; rounded up to the model's stride",
    )  # fmt: skip


def add_device_flag(parser: ArgumentParser) -> None:
    """`--device cpu`, `--device 0`, `--device 0,1`."""
    parser.add_argument(
        "--device", default="", help="cpu, 0, 0,1 or mps; empty: a GPU if there is one"
    )


def add_run_flags(parser: ArgumentParser, project: str) -> None:
    """Where the run's folder stands."""
    parser.add_argument("--project", default=project, help="folder of all runs")
    parser.add_argument(
        "--name", default="exp", help="folder of this run; a number is added if it is taken"
    )
    parser.add_argument(
        "--exist-ok", action="store_true", help="write into the folder even if it is taken"
    )


def add_threshold_flags(parser: ArgumentParser, conf: float, iou: float, max_det: int) -> None:
    """Confidence, NMS overlap and number of detections."""
    parser.add_argument(
        "--conf-thres", type=number(0, 1), default=conf, help="lowest score of a detection"
    )
    parser.add_argument(
        "--iou-thres", type=number(0, 1), default=iou, help="largest overlap that NMS leaves"
    )
    parser.add_argument(
        "--max-det", type=integer(1), default=max_det, help="detections an image at most"
    )


def add_ignored_flags(parser: ArgumentParser, flags: dict[str, Any]) -> None:
    """Flags of other trees that have no effect here; `--dnn`, `--quad`, ..."""
    for name, default in flags.items():
        flag = "--" + name.replace("_", "-")
        aliases = [flag] if "_" not in name else [flag, "--" + name]
        if isinstance(default, bool):
            parser.add_argument(
                *aliases, dest=name, action="store_true", help="accepted, without effect"
            )
        else:
            parser.add_argument(
                *aliases, dest=name, nargs="?", default=default, help="accepted, without effect"
            )


def say_ignored(options: Any, flags: dict[str, Any]) -> None:
    """One line that names the given flags without effect."""
    report_ignored_flags(options, flags)


def add_data_flag(parser: ArgumentParser) -> None:
    """The data set, and leave to fetch it."""
    parser.add_argument(
        "--data",
        default="data/shapes.yaml",
        help="data YAML, or a folder in YOLO, COCO or VOC form",
    )
    parser.add_argument(
        "--download",
        action="store_true",
        help="fetch the data set if it is missing (never done unasked)",
    )


def add_foreign_flags(parser: ArgumentParser) -> None:
    """What a weights file belongs to, if it does not say so itself."""
    parser.add_argument("--cfg", default="", help="model YAML of foreign weights that carry none")
    parser.add_argument(
        "--backbone", nargs="+", default=None, metavar="NAME",
        help="what they have instead of that YAML's backbone: NAME [key=value ...]",
    )  # fmt: skip
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="let the Python files run that the model's YAML imports",
    )


def add_model_flags(parser: ArgumentParser) -> None:
    """Which model to build."""
    parser.add_argument(
        "--cfg", default="", help="model YAML, or a name in models/detect such as yolo11s"
    )
    parser.add_argument("--scale", default=None, help="size letter of a YAML with scales")
    parser.add_argument(
        "--backbone", nargs="+", default=None, metavar="NAME",
        help="put this backbone under the model: NAME [key=value ...], any of models/modules or timm",
    )  # fmt: skip
    parser.add_argument(
        "--allow-code",
        action="store_true",
        help="let the YAML's `imports:` run files outside the tree",
    )
