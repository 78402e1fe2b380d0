"""What the scripts are told: the flags of train.py, val.py, detect.py and compare.py under the names users know."""

from __future__ import annotations

from argparse import REMAINDER, ArgumentTypeError
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from data.image_cache import CACHES
from engine.flags import flag, read_given, spelling, without_effect
from models.losses.box import name_problem
from models.losses.classification import CLASS_LOSSES
from utils.config import increment_path, integer, number, parse_imgsz
from utils.device import AMP_CHOICES
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger
from utils.optim import OPTIMIZERS

T = TypeVar("T")
PATIENCE = 100
SCHEDULES = {"cos_lr": "cosine", "flat_cos_lr": "flat_cosine", "fixed_lr": "fixed"}
TRIALS = 300
HIGHEST_SEED = 2**31 - 1  # every library takes it, also with an epoch or a trial added
SPLITS = ("train", "val", "test")
RUNTIMES = ("torch", "onnx", "openvino", "torchscript")
FROM_ZERO, FROM_ONE, SHARE = integer(0), integer(1), number(0, 1)
BATCH = integer(1, allowed=(-1,))
AUTO = -1.0
PROJECT_HELP = "folder of all runs"
BACKBONE_HELP = "instead of the YAML's: NAME [key=value ...], any of models/modules or timm"
MANY_HELP = "of a model with end2end: true, the branch that needs NMS, with NMS"
BEST = "runs/train/exp/weights/best.pt"
COMMAND_LINE_ONLY = frozenset(
    "resume device allow_code download check evolve resume_evolve".split()
)
"""A resumed run has these from its own command line alone: a checkpoint may be a stranger's."""
CHANGEABLE = frozenset("data workers cache patience noval noplots save_period".split())
"""What may be given anew when a run is resumed: where it reads, how fast, and what it writes."""


def seed(text: str) -> int:
    """An argparse type: a seed that every library takes."""
    value = FROM_ZERO(text)
    if value > HIGHEST_SEED:
        raise ArgumentTypeError(f"got {value}, expected 0 to {HIGHEST_SEED}")
    return value


def box_loss(text: str) -> str:
    """An argparse type: the name of a box loss, or a user's `file.py:name`."""
    if problem := name_problem(text):
        raise ArgumentTypeError(problem)
    return text


def size_flag(default: T) -> T:
    """`--imgsz 640` or `--imgsz 480 640`, height then width."""
    told = "image size: one number, or height and width; rounded up to the model's stride"
    return flag(default, told, "--img", "--img-size", nargs="+", type=FROM_ONE, metavar="N")


def share_or_auto(text: str) -> float:
    """An argparse type: a number from 0 to 1, or AUTO for `auto`."""
    return AUTO if text == "auto" else SHARE(text)


class Thresholds(NamedTuple):
    """What counts as a detection.

    Attributes:
        conf: lowest score of any class.
        iou: largest overlap that NMS leaves.
        max_det: detections an image at most.
        agnostic: NMS over all classes together.
        by_class: lowest score of each class, where they differ.
    """

    conf: float = 0.001
    iou: float = 0.6
    max_det: int = 300
    agnostic: bool = False
    by_class: tuple[float, ...] = ()


class Sized(Protocol):
    """A model, as far as it bounds the size of images: see `Backend`."""

    imgsz: tuple[int, int]
    stride: int
    dynamic: bool


@dataclass(frozen=True)
class RunFlags:
    """Where a script runs, and where it writes."""

    device: str = flag("", "cpu, 0, 0,1 or mps; empty: a GPU if there is one")
    project: str = flag("runs", PROJECT_HELP)
    name: str = flag("exp", "folder of this run; a number is added if it is taken")
    exist_ok: bool = flag(False, "write into the folder even if it is taken")

    def make_folder(self) -> Path:
        """Make the folder of this run, which is new unless `--exist-ok` says that it need not be."""
        folder = increment_path(self.project, self.name, self.exist_ok)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass(frozen=True)
class DataFlags:
    """The data set, and leave to fetch it."""

    data: str = flag("data/shapes.yaml", "data YAML, or a folder in YOLO, COCO or VOC form")
    download: bool = flag(False, "fetch the data set if it is missing (never done unasked)")


@dataclass(frozen=True)
class BackboneFlags:
    """What stands under a model YAML, and whether its code may run."""

    backbone: list[str] | None = flag(None, BACKBONE_HELP, nargs="+", metavar="NAME")
    allow_code: bool = flag(False, "let the Python files run that a model YAML imports")


@dataclass(frozen=True)
class ModelFlags(BackboneFlags):
    """Which model to build."""

    cfg: str = flag("", "model YAML, or a name in models/detect such as yolo11s")
    scale: str | None = flag(None, "size letter of a YAML with scales")


@dataclass(frozen=True)
class WeightsFlags(BackboneFlags):
    """Models that are there already, and what is kept of their predictions."""

    weights: list[str] = flag([BEST], "one or more .pt or exported models", nargs="+")
    cfg: str = flag("", "model YAML of foreign weights that carry none")
    one_to_many: bool = flag(False, MANY_HELP)
    imgsz: list[int] | None = size_flag(None)
    half: bool = flag(False, "half precision")
    conf_thres: float = flag(0.001, "lowest score of a detection", type=SHARE)
    iou_thres: float = flag(0.6, "largest overlap that NMS leaves", type=SHARE)
    max_det: int = flag(300, "detections an image at most", type=FROM_ONE)
    agnostic_nms: bool = flag(False, "NMS over all classes together")
    save_txt: bool = flag(False, "write predictions as labels/*.txt in YOLO form")
    save_conf: bool = flag(False, "write the score behind each")

    @property
    def thresholds(self) -> Thresholds:
        """What counts as a detection."""
        return Thresholds(self.conf_thres, self.iou_thres, self.max_det, self.agnostic_nms)

    def size_for(self, model: Sized, name: str) -> tuple[int, int]:
        """The image size (height, width) for a model that messages call `name`; its own, unless a flag says another.

        Raises:
            ConfigError: the model has a fixed size, and a flag asks for others.
        """
        imgsz = model.imgsz if self.imgsz is None else parse_imgsz(self.imgsz, model.stride)
        if not model.dynamic and imgsz != model.imgsz:
            raise ConfigError(
                f"--imgsz: got {imgsz[0]} {imgsz[1]}, but {name} was exported for "
                f"{model.imgsz[0]} {model.imgsz[1]}. Leave --imgsz out or export with --dynamic."
            )
        return imgsz


@dataclass(frozen=True)
class ValOptions(RunFlags, DataFlags, WeightsFlags):
    """Measure a detector: COCO mAP, per class table, plots."""

    project: str = flag("runs/val", PROJECT_HELP)
    ensemble: bool = flag(False, "measure them as one, predictions joined before NMS")
    batch_size: int = flag(32, "images a batch", type=FROM_ONE)
    rect: bool = flag(False, "images of their own shape, not square (.pt, --dynamic exports)")
    task: str = flag("val", "split, or what to measure", choices=(*SPLITS, "speed", "study"))
    workers: int = flag(2, "processes that load images", type=FROM_ZERO)
    single_cls: bool = flag(False, "treat all classes as one")
    verbose: bool = flag(False, "one line a class, also beyond 20 classes")
    save_json: bool = flag(False, "write predictions as COCO JSON")
    report: bool = flag(False, "write report.html; best thresholds go into the .pt")
    noplots: bool = flag(False, "write no pictures")
    save_hybrid: bool = without_effect(False)
    dnn: bool = without_effect(False)
    augment: bool = without_effect(False)
    min_items: str | None = without_effect(None)


@dataclass(frozen=True)
class DetectOptions(RunFlags, WeightsFlags):
    """Find objects in images, videos, cameras and streams."""

    source: str = flag("", "image, folder, glob, list, video, camera or stream", required=True)
    conf_thres: float = flag(
        0.25, "lowest score, or auto: by class, as val.py --report left it", type=share_or_auto
    )
    iou_thres: float = flag(0.45, "largest overlap that NMS leaves", type=SHARE)
    max_det: int = flag(1000, "detections an image at most", type=FROM_ONE)
    classes: list[str] | None = flag(None, "only these classes, by index or name", nargs="+")
    batch_size: int = flag(1, "images of one shape at a time, of files", type=FROM_ONE)
    square: bool = flag(False, "pad images to --imgsz, as a fixed size needs it and val.py does")
    slice: int | None = flag(None, "look at slices of so many pixels too", type=integer(32))
    overlap: float | None = flag(None, "share of a slice in the next (0.2)", type=number(0, 0.9))
    track: bool = flag(False, "number objects from frame to frame (pip install trackers)")
    vid_stride: int = flag(1, "take every so many frames of a video", type=FROM_ONE)
    reconnect: float | None = flag(None, "seconds to call a silent stream again (rtsp: 30)", type=number(0, 1e9))  # fmt: skip
    project: str = flag("runs/detect", PROJECT_HELP)
    view_img: bool = flag(False, "show each picture in a window")
    save_format: int = flag(
        0, "--save-txt in: 0 YOLO, 1 corners in pixels", type=int, choices=(0, 1)
    )
    save_csv: bool = flag(False, "write predictions.csv")
    save_voc: bool = flag(False, "write Pascal VOC XML files")
    save_json: bool = flag(False, "write predictions.json")
    save_crop: bool = flag(False, "write each object with 2 %% and 10 pixels around, by class")
    nosave: bool = flag(False, "write no pictures")
    line_thickness: int | None = flag(None, "of boxes, in pixels", type=FROM_ONE)
    hide_labels: bool = flag(False, "draw boxes only")
    hide_conf: bool = flag(False, "draw no scores")
    rect: bool = without_effect(False)
    augment: bool = without_effect(False)
    update: bool = without_effect(False)
    dnn: bool = without_effect(False)
    visualize: bool = flag(False, "also write what each pyramid level responds to (.pt)")
    data: str | None = without_effect(None)

    def thresholds_for(self, class_conf: Sequence[float] | None, name: str) -> Thresholds:
        """What counts as a detection of a model that keeps `class_conf`.

        Raises:
            ConfigError: `--conf-thres auto`, and it keeps none.
        """
        if self.conf_thres != AUTO:
            return self.thresholds
        if class_conf is None:
            raise ConfigError(
                f"--conf-thres: got auto, but {name} keeps no thresholds. Run python val.py --report --weights on its .pt "
                "(and export that again), or give a number."
            )
        return self.thresholds._replace(conf=min(class_conf), by_class=tuple(class_conf))


@dataclass(frozen=True)
class CompareOptions(RunFlags, DataFlags, BackboneFlags):
    """Compare models: parameters, GFLOPs, latency, memory, mAP; with --epochs a study that trains them first."""

    models: list[str] = flag([], "configs, weights, exports, runs", "--weights", "--cfg", nargs="+")
    backbone: list[str] | None = flag(
        None, "under every config, several in a row: none resnet18 ...", nargs="+", metavar="NAME"
    )
    data: str = flag("", "data YAML, or a folder in YOLO, COCO or VOC form, for mAP")
    imgsz: list[int] | None = size_flag(None)
    runs: int = flag(10, "timed calls of each model", type=FROM_ONE)
    workers: int = flag(2, "processes that load images", type=FROM_ZERO)
    project: str = flag("runs/compare", PROJECT_HELP)
    # a study
    epochs: int | None = flag(None, "train what has no weights so long; 0: nothing", type=FROM_ZERO)
    seeds: int = flag(1, "trainings of each config", type=FROM_ONE)
    budget: float | None = flag(None, "minutes for all trainings", type=number(0))
    runtime: list[str] = flag(["torch"], "where it is measured", nargs="+", choices=RUNTIMES)
    markdown: str = flag("", "write the study's Markdown here as well")
    resume: str | bool = flag(False, "go on with the newest, or this, study", nargs="?", const=True)
    train: list[str] = flag([], "all further flags are train.py's", nargs=REMAINDER, metavar="...")


@dataclass(frozen=True)
class TrainOptions(RunFlags, DataFlags, ModelFlags):
    """Train a detector."""

    weights: str = flag("", "weights to start from; empty: from scratch")
    backbone_weights: str = flag("", "weights of the backbone only")
    end2end: bool = flag(False, "train a branch without NMS beside the head's own")
    freeze: list[str] = flag(
        [], "10: rows below; 0 3: those; or backbone, C3, model.0.*", nargs="+"
    )
    noautoanchor: bool = flag(False, "keep the anchors of the YAML")
    sync_bn: bool = flag(False, "BatchNorm over all processes")
    # images
    imgsz: int | list[int] = size_flag(640)
    batch_size: int = flag(16, "images a step, of all processes; -1: what fits", type=BATCH)
    rect: bool = flag(False, "batches of the images' own shape, without mosaic")
    multi_scale: bool = flag(False, "vary the image size by half")
    single_cls: bool = flag(False, "treat all classes as one")
    image_weights: bool = flag(False, "draw images with rare classes more often")
    close_mosaic: int | None = flag(None, "last epochs without mosaic and mixup", type=FROM_ZERO)
    cache: str = flag(
        "auto",
        "keep images: ram, disk, off; auto is ram for few",
        nargs="?",
        const="ram",
        choices=CACHES,
    )
    workers: int = flag(8, "processes that load images, at most one a core", type=FROM_ZERO)
    check: bool = flag(False, "look the data set over, as data/check.py does, and end")
    # optimisation
    hyp: str | None = flag(None, "recipe YAML over the family's own in data/hyps")
    epochs: int = flag(100, "passes over the data, 100 if left out", type=FROM_ONE)
    optimizer: str | None = flag(None, "instead of the recipe's", choices=OPTIMIZERS)
    box_loss: str | None = flag(None, "instead of the recipe's: giou, file.py:name", type=box_loss)
    cls_loss: str | None = flag(None, "instead of the recipe's", choices=tuple(CLASS_LOSSES))
    cos_lr: bool = flag(False, "cosine instead of the recipe's schedule")
    flat_cos_lr: bool = flag(False, "flat, then cosine")
    fixed_lr: bool = flag(False, "constant after the warm-up")
    label_smoothing: float = flag(0.0, "part taken off certainty", type=SHARE)
    patience: int = flag(PATIENCE, "epochs without a better one; 0: any number", type=FROM_ZERO)
    amp: str = flag("auto", "mixed precision", choices=AMP_CHOICES)
    seed: int = flag(0, "of everything random", type=seed)
    evolve: int = flag(0, "search the recipe: trainings", nargs="?", type=FROM_ONE, const=TRIALS)
    resume_evolve: str | None = flag(None, "folder of a search to go on with", "--resume_evolve")
    # what is kept
    project: str = flag("runs/train", PROJECT_HELP)
    resume: str | bool = flag(
        False, "go on with the newest, or this, last.pt", nargs="?", const=True
    )
    nosave: bool = flag(False, "save the last checkpoint only")
    noval: bool = flag(False, "validate the last epoch only")
    noplots: bool = flag(False, "write no pictures")
    save_period: int = flag(-1, "also save every so many epochs", type=int)
    bucket: str = without_effect("")
    quad: bool = without_effect(False)
    local_rank: int = without_effect(-1)
    entity: str | None = without_effect(None)
    upload_dataset: str | None = without_effect(None)
    bbox_interval: int = without_effect(-1)
    artifact_alias: str | None = without_effect(None)
    evolve_population: str | None = without_effect(None)
    min_items: str | None = without_effect(None)


def read_training(arguments: Sequence[str] | None = None) -> tuple[TrainOptions, frozenset[str]]:
    """The options of train.py, and which of them stand on the command line."""
    example = "Example: python train.py --cfg yolov5n-emo.yaml --data data/shapes.yaml --imgsz 320"
    given = read_given(TrainOptions, arguments, example)
    options = TrainOptions(**given)
    if options.freeze == ["0"]:  # the customary default: nothing is frozen
        options = replace(options, freeze=[])
    if options.resume_evolve and not options.evolve:
        options = replace(options, evolve=TRIALS)
    effective = {item.name for item in fields(TrainOptions) if item.metadata["has_effect"]}
    return options, frozenset(given.keys() & effective)


def check_pairs(options: TrainOptions) -> None:
    """Refuse flags that exclude each other, and tell those that change nothing beside another one.

    Raises:
        ConfigError: several schedules, or an order of images beside that of `--rect`.
    """
    schedules = [spelling(name) for name in SCHEDULES if vars(options)[name]]
    if len(schedules) > 1:
        raise ConfigError(f"{', '.join(schedules)}: got {len(schedules)} schedules, expected one.")
    if options.rect and options.image_weights:
        raise ConfigError("--image-weights: cannot be used with --rect. Drop one of them.")
    if options.rect and options.close_mosaic is not None:
        get_logger().info("--close-mosaic: without effect with --rect, which makes no mosaics")
    if options.nosave and options.save_period > 0:
        get_logger().info("--save-period: without effect with --nosave")
    if options.noval and options.patience != PATIENCE:
        get_logger().info("--patience: without effect with --noval")


def check_saved(own: Mapping[str, object], path: Path) -> None:
    """Make sure that flags which a checkpoint kept are such as the command line takes.

    Raises:
        CheckpointError: the first that is not.
    """
    for item in fields(TrainOptions):
        default = item.metadata["default"]
        value = own.get(item.name, default)
        is_plain = isinstance(value, (bool, int, float, str, list, type(None)))
        if is_plain and (value == default or value is None):
            continue
        takes_several = item.metadata.get("nargs") == "+"
        parts = value if takes_several and isinstance(value, list) else [value]
        if not all(_is_taken(item, part) for part in parts):
            raise CheckpointError(
                f"{path}: its flag {spelling(item.name)} - got {str(value)[:60]!r}, expected what the flag takes."
            )


def _is_taken(item: Field[object], value: object) -> bool:
    """Whether a flag would give `value` for its own text."""
    how = item.metadata
    if item.metadata["default"] is False and "nargs" not in how:
        return isinstance(value, bool)
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        return "const" in how and value == how["const"]
    if "choices" in how and value not in how["choices"]:
        return False
    if "type" not in how:
        return isinstance(value, str)
    try:
        return bool(how["type"](str(value)) == value)
    except (ValueError, TypeError, ArgumentTypeError):
        return False
