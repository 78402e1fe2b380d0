"""The splits of the data set that `--data` names: to train on, to measure on, to calibrate with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from data.config import DataConfig, load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.download import fetch
from data.formats.faults import write_faults
from data.loader import DetectionLoader, build_loader
from engine.options import DataFlags, TrainOptions
from engine.pace import plan_of
from models.family import Recipe
from models.yolo import DetectionModel
from utils.channels import white_of
from utils.distributed import World
from utils.errors import ConfigError
from utils.logger import get_logger


def open_data(options: DataFlags, white: float | None = None) -> DataConfig:
    """The data set of `--data`; fetched first if `--download` asks for it.

    Args:
        options: the flags.
        white: what the model takes for white, see `with_white`.

    Raises:
        DatasetError: it is not there, or not as it should be.
    """
    config = load_data_config(options.data)
    return with_white(fetch(config) if options.download else config, white)


def with_white(config: DataConfig, white: float | None) -> DataConfig:
    """The data set with the white of the model's weights in images deeper than 8 bits, if it states none itself."""
    if config.white is None:
        return replace(config, white=white)
    if white is not None and white != config.white:
        get_logger().warning(
            f"{config.file}: white: {config.white:g}, but the model learned with {white:g}"
        )
    return config


def settle_white(data: DataConfig, model: DetectionModel) -> DataConfig:
    """The data set with the white that it or the model's weights state; the model keeps it."""
    data = with_white(data, white_of(model.config))
    if data.white is not None:
        model.config["white"] = data.white
    return data


class Splits(NamedTuple):
    """What a training reads: two splits, and this process's share of each in batches."""

    train_set: DetectionDataset
    train_loader: DetectionLoader
    val_set: DetectionDataset
    val_loader: DetectionLoader


def open_splits(
    options: TrainOptions,
    data: DataConfig,
    hyp: Recipe,
    imgsz: tuple[int, int],
    stride: int,
    world: World,
) -> Splits:
    """The splits of a training, the first augmented as `hyp` says."""
    share, plan = options.batch_size // world.size, plan_of(hyp, options.epochs)
    plain = LoadOptions(
        imgsz=imgsz, stride=stride, cache=options.cache, single_cls=options.single_cls
    )
    augmented = replace(
        plain,
        augment=True,
        hyp=hyp,
        rect=options.rect,
        batch_size=share,
        image_weights=options.image_weights,
        seed=options.seed,
        close_mosaic_epoch=plan.dense_end,
        strong_epochs=plan.strong,
    )
    train_set = build_dataset(data, "train", augmented)
    if options.image_weights and train_set.weights is None:
        get_logger().info(
            "--image-weights: without effect, the objects are of fewer than two classes"
        )
    train_loader = build_loader(
        train_set,
        share,
        workers=options.workers,
        shuffle=True,
        seed=options.seed,
        rank=world.rank,
        world_size=world.size,
    )
    val_set = build_dataset(data, "val", plain)
    val_loader = validation_loader(options, val_set, world)
    return Splits(train_set, train_loader, val_set, val_loader)


def validation_loader(
    options: TrainOptions, dataset: DetectionDataset, world: World, *, whole: bool = False
) -> DetectionLoader:
    """Batches of a size that every process takes: of its share, or of the whole split."""
    rank, size = (0, 1) if whole else (world.rank, world.size)
    images = 2 * options.batch_size // world.size
    return build_loader(dataset, images, workers=options.workers, rank=rank, world_size=size)


def check_classes(
    model_names: Sequence[str], data_names: Sequence[str], weights: str, data: str
) -> None:
    """Refuse to measure a model on a data set with other classes; warn where names differ.

    Names such as `class0`, which stand in for names that nobody gave, fit everything.

    Raises:
        ConfigError: another number of classes, or the same names in another order.
    """
    if len(model_names) != len(data_names):
        raise ConfigError(
            f"{weights}: got a model of {len(model_names)} classes for {data} with {len(data_names)}, expected the "
            "same number. Give the data the model was trained on."
        )
    differing = [
        (k, ours, theirs)
        for k, (ours, theirs) in enumerate(zip(model_names, data_names))
        if ours != theirs and f"class{k}" not in (ours, theirs)
    ]
    if not differing:
        return
    index, ours, theirs = differing[0]
    told = f"{data}: class {index} - got {theirs!r}, expected {ours!r} as in {weights}"
    if sorted(model_names) == sorted(data_names):
        raise ConfigError(f"{told}. The names stand in another order: put them in the model's.")
    get_logger().warning(f"{told}; {len(differing)} of {len(data_names)} names differ")


def save_faults(folder: Path, splits: Mapping[str, DetectionDataset]) -> None:
    """Leave what was mended or skipped in labels and images as `faults.csv`, and say so."""
    path = folder / "faults.csv"
    count = write_faults(path, {split: dataset.faults for split, dataset in splits.items()})
    if count:
        get_logger().warning(f"{path}: all {count} faults of labels and images")
