"""Everything a training needs, built from its flags: `prepare` is the only place where the parts meet."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from data.config import DataConfig
from data.dataset import DetectionDataset, build_dataset
from data.loader import build_loader
from engine.setup import (
    automatic_batch_size,
    complete,
    fit_to_objects,
    freeze,
    open_data,
    recipe,
    refuse_sizes,
    settle_losses,
    settle_white,
)
from engine.stopping import StopRequest
from models.family import build_criterion
from models.weights.load import build_to_resume, build_to_train
from models.yolo import DetectionModel
from utils.config import parse_imgsz
from utils.device import autocast_dtype
from utils.distributed import World, all_gather_objects
from utils.ema import ModelEMA
from utils.errors import ConfigError
from utils.logger import get_logger
from utils.metrics import CocoEvaluator
from utils.optim import Schedule, Warmup, build_optimizer, build_schedule

ONEDNN_BLOCK = 16  # input channels that AVX-512 code computes at once; 8 with AVX2
LEAST_WARMUP = 100  # iterations; three epochs of a small data set are too short to warm up


class EpochProgress(NamedTuple):
    """How far this process is in an epoch.

    Attributes:
        step: batches that are done.
        used: those of them whose loss was finite.
        sums: of each loss term over those.
        objects: in all of them.
        rng: random state of a run that was stopped here; None where the epoch begins anew.
    """

    step: int = 0
    used: int = 0
    sums: Mapping[str, float] = MappingProxyType({})
    objects: int = 0
    rng: Mapping[str, Any] | None = None

    def after(
        self, losses: Mapping[str, torch.Tensor], is_used: bool, objects: int
    ) -> EpochProgress:
        """The progress after one more batch; its losses count if it was used."""
        sums = self.sums or dict.fromkeys(losses, 0.0)
        if is_used:
            sums = {name: sums[name] + value.item() for name, value in losses.items()}
        return self._replace(
            step=self.step + 1,
            used=self.used + is_used,
            sums=sums,
            objects=self.objects + objects,
        )


@dataclass
class Run:
    """The parts of one training and how far it is.

    Attributes:
        options: the flags.
        folder: where the run writes.
        world: this process among all.
        device: where the model stands.
        hyp: the recipe, flags applied.
        imgsz: (height, width).
        model: the network, without wrappers.
        wrapped: what `forward` is called on: the model, or DistributedDataParallel around it.
        ema: the averaged model (on the main process).
        frozen: modules that stay in eval mode.
        autocast: type of mixed precision, None: off.
        epoch: the next epoch.
        last_step: iteration of the last optimiser step.
        best_fitness: of the best epoch so far.
        best_epoch: that epoch; of several alike the latest.
        improved_epoch: the first of those.
        skipped: batches left out for a loss that was not finite, in a row.
        skipped_steps: optimiser steps left out for gradients that were not finite, in a row.
        progress: in the epoch that runs.
        stop: whether this process was told to stop.
        is_stopping: whether any was, as all of them know.
    """

    options: Any
    folder: Path
    world: World
    device: torch.device
    hyp: Mapping[str, Any]
    imgsz: tuple[int, int]
    data: DataConfig
    model: DetectionModel
    wrapped: nn.Module
    ema: ModelEMA
    frozen: list[nn.Module]
    criterion: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    warmup: Warmup
    accumulate: int
    autocast: torch.dtype | None
    train_set: DetectionDataset
    train_loader: Any
    val_set: DetectionDataset
    val_loader: Any
    evaluator: CocoEvaluator
    val_criterion: Any
    epoch: int = 0
    last_step: int = -1
    best_fitness: float = -1.0
    best_epoch: int = 0
    improved_epoch: int = 0
    skipped: int = 0
    skipped_steps: int = 0
    progress: EpochProgress = EpochProgress()
    stop: StopRequest = field(default_factory=StopRequest)
    is_stopping: bool = False


def prepare(
    options: Any,
    folder: Path,
    device: torch.device,
    world: World,
    *,
    hyp: Mapping[str, Any] | None = None,
) -> Run:
    """Build every part of a training.

    Args:
        options: flags.
        folder: where the run writes.
        device: where the model goes.
        world: this process among all.
        hyp: recipe of a run that is resumed, as it was settled then; None reads the family's and `--hyp`.

    Raises:
        ConfigError, DatasetError, CheckpointError: what a user can mend, before anything is trained.
    """
    data = open_data(options)
    names = ("object",) if options.single_cls and len(data.names) > 1 else data.names
    model = _model(options, names)
    data = settle_white(data, model)
    refuse_sizes(options, model)
    imgsz = parse_imgsz(options.imgsz, model.max_stride)
    hyp = (
        _recipe(options, model)
        if hyp is None
        else complete(hyp, model.head.family, str(options.resume))
    )
    hyp = settle_losses(hyp, options)
    criterion = build_criterion(model.head, hyp, imgsz, allow_code=options.allow_code)
    model.head.take_recipe(hyp)
    model.to(device, memory_format=memory_format_for(model, device))
    batch_size = options.batch_size = _batch_size(options.batch_size, model, imgsz, device, world)
    model = _shared_norms(model, world) if options.sync_bn else model
    frozen = freeze(model, options.freeze) if options.freeze else []
    train_set, train_loader = _train_data(options, data, hyp, imgsz, model.max_stride, world)
    val_set, val_loader = _val_data(options, data, imgsz, model.max_stride, world)
    fit_to_objects(model, train_set, imgsz, hyp, options)
    accumulate = max(round(hyp["nbs"] / batch_size), 1)
    hyp = _settle_optimizer(hyp, model.head.num_classes, len(train_set), options)
    # A gradient that grows with the batch wants a decay that does.
    images = batch_size * accumulate / hyp["nbs"] if criterion.times_batch else 1.0
    optimizer = build_optimizer(
        model,
        hyp["optimizer"],
        hyp["lr0"],
        hyp["momentum"],
        hyp["weight_decay"] * images,
        lr_factors=_lr_factors(model, hyp),
    )
    ema = ModelEMA(model, hyp["ema_decay"], hyp["ema_tau"])
    autocast = autocast_dtype(options.amp, device)
    warmup_steps = round(hyp["warmup_epochs"] * len(train_loader))
    return Run(
        options=options, folder=folder, world=world, device=device, hyp=hyp, imgsz=imgsz, data=data, model=model,
        wrapped=_wrap(model, device, world), ema=ema, frozen=frozen,
        criterion=criterion, optimizer=optimizer,
        scaler=torch.amp.GradScaler(device.type, enabled=autocast is torch.float16),
        schedule=build_schedule(hyp["schedule"], options.epochs, hyp["lrf"]),
        warmup=Warmup(max(warmup_steps, LEAST_WARMUP) if warmup_steps else 0, hyp["warmup_bias_lr"], hyp["warmup_momentum"]),
        accumulate=accumulate, autocast=autocast, train_set=train_set, train_loader=train_loader, val_set=val_set,
        val_loader=val_loader,
        evaluator=CocoEvaluator(val_set.coco_ground_truth(), val_set.category_ids, val_set.names),
        val_criterion=build_criterion(ema.model.head, hyp, imgsz, allow_code=options.allow_code),
    )  # fmt: skip


def _model(options: Any, names: tuple[str, ...]) -> DetectionModel:
    """The model of the run that is resumed, else the one that the flags mean with its first weights."""
    imgsz = parse_imgsz(options.imgsz, 32, tell=False)
    allow_code = options.allow_code
    if options.config is not None:
        return build_to_resume(
            options.resume, options.config, names, imgsz=imgsz, allow_code=allow_code
        )
    return build_to_train(
        names,
        cfg=options.cfg,
        weights=options.weights,
        backbone_weights=options.backbone_weights,
        scale=options.scale,
        backbone=options.backbone,
        imgsz=imgsz,
        allow_code=allow_code,
    )


def _batch_size(
    wanted: int, model: nn.Module, imgsz: tuple[int, int], device: torch.device, world: World
) -> int:
    """Images a step over all processes; -1 means as many as fit into the one with the least memory."""
    if wanted == -1:
        return min(all_gather_objects(automatic_batch_size(model, imgsz, device))) * world.size
    if wanted % world.size:
        raise ConfigError(
            f"--batch-size: got {wanted}, expected a multiple of the {world.size} processes."
        )
    return wanted


def _shared_norms(model: DetectionModel, world: World) -> Any:
    if world.is_distributed:
        return with_shared_norms(model)
    get_logger().info("--sync-bn: without effect, there is one process")
    return model


def _recipe(options: Any, model: DetectionModel) -> dict[str, Any]:
    schedules = {"cos_lr": "cosine", "flat_cos_lr": "flat_cosine", "fixed_lr": "fixed"}
    schedule = next((kind for flag, kind in schedules.items() if getattr(options, flag)), None)
    overrides = {
        "optimizer": options.optimizer, "schedule": schedule, "close_mosaic": options.close_mosaic,
        "label_smoothing": options.label_smoothing or None, "box_loss": options.box_loss, "cls_loss": options.cls_loss,
    }  # fmt: skip
    return recipe(model.head.family, options.hyp, overrides)


def _settle_optimizer(
    hyp: Mapping[str, Any], num_classes: int, images: int, options: Any
) -> dict[str, Any]:
    """Decide what `optimizer: auto` means for a training of this length; the recipe has the rule and its numbers."""
    if hyp["optimizer"] != "auto":
        return dict(hyp)
    steps = math.ceil(images / max(options.batch_size, hyp["nbs"])) * options.epochs
    is_short = steps <= hyp["auto_steps"]
    adamw_lr = round(hyp["auto_adamw_lr"] * 5 / (4 + num_classes), 6)
    settled = {
        **hyp, "optimizer": "AdamW" if is_short else "SGD", "lr0": adamw_lr if is_short else hyp["auto_sgd_lr"],
        "momentum": hyp["auto_momentum"], "warmup_bias_lr": hyp["auto_warmup_bias_lr"],
    }  # fmt: skip
    get_logger().info(
        f"optimizer: {settled['optimizer']}, lr0 {settled['lr0']}, momentum {settled['momentum']} "
        f"(auto, {steps} steps; --optimizer to choose)"
    )
    return settled


def _lr_factors(model: DetectionModel, hyp: Mapping[str, Any]) -> dict[str, float]:
    """Learning-rate factor of each parameter that does not have the common one: those of the backbone rows."""
    factor = hyp.get("backbone_lr", 1.0)
    if factor == 1.0:
        return {}
    prefixes = tuple(f"model.{i}." for i, row in enumerate(model.rows) if row.section == "backbone")
    return {name: factor for name, _ in model.named_parameters() if name.startswith(prefixes)}


def _train_data(
    options: Any,
    data: DataConfig,
    hyp: Mapping[str, Any],
    imgsz: tuple[int, int],
    stride: int,
    world: World,
) -> tuple[DetectionDataset, Any]:
    close = options.epochs - hyp.get("close_mosaic", 0) if hyp.get("close_mosaic", 0) else None
    share = options.batch_size // world.size
    dataset = build_dataset(
        data, "train", imgsz=imgsz, augment=True, hyp=hyp, rect=options.rect, batch_size=share,
        stride=stride, cache=options.cache, single_cls=options.single_cls, image_weights=options.image_weights,
        seed=options.seed, close_mosaic_epoch=close,
    )  # fmt: skip
    if options.image_weights and dataset.weights is None:
        get_logger().info(
            "--image-weights: without effect, the objects are of fewer than two classes"
        )
    loader = build_loader(
        dataset, share, workers=options.workers, shuffle=True,
        seed=options.seed, rank=world.rank, world_size=world.size,
    )  # fmt: skip
    return dataset, loader


def _val_data(
    options: Any, data: DataConfig, imgsz: tuple[int, int], stride: int, world: World
) -> tuple[DetectionDataset, Any]:
    batch_size = 2 * options.batch_size // world.size
    dataset = build_dataset(
        data, "val", imgsz=imgsz, batch_size=batch_size, stride=stride, cache=options.cache,
        single_cls=options.single_cls,
    )  # fmt: skip
    loader = build_loader(
        dataset, batch_size, workers=options.workers, rank=world.rank, world_size=world.size
    )
    return dataset, loader


def memory_format_for(model: nn.Module, device: torch.device) -> torch.memory_format:
    """Channels last, which is faster, unless the device computes the model wrongly in it.

    On CPUs oneDNN's gradient of a 1x1 convolution with a stride and fewer input channels than it computes at once writes
    beyond its memory in this format (https://github.com/uxlfoundation/oneDNN/issues/6035, seen with torch 2.15). Such
    branches stand in the stems of networks that re-parameterize.
    """
    faulty = (
        isinstance(m, nn.Conv2d)
        and m.kernel_size == (1, 1)
        and max(m.stride) > 1
        and m.groups == 1
        and m.in_channels < ONEDNN_BLOCK
        for m in model.modules()
    )
    computes_it = getattr(model, "computes_channels_last", True)
    is_faulty = not computes_it or (device.type == "cpu" and any(faulty))
    return torch.contiguous_format if is_faulty else torch.channels_last


def with_shared_norms(model: Any) -> Any:
    """The model with BatchNorm statistics over all processes."""
    try:
        from timm.layers import (
            convert_sync_batchnorm,  # torch's own loses the activation inside timm's norms
        )
    except ImportError:
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return convert_sync_batchnorm(model)


@contextmanager
def single_values(model: nn.Module, batch_size: int) -> Iterator[None]:
    """In a batch of one image, let each BatchNorm that sees one value a channel use its running statistics.

    One value has no variance, and torch refuses to train on it. Such maps of 1x1 stand at the end of a small
    image's trunk and in channel attention; a single image is what may be left over at the end of an epoch.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    norms = (
        [m for m in norms if m.training and m.running_mean is not None] if batch_size == 1 else []
    )
    handles = [norm.register_forward_pre_hook(_spare_single_values) for norm in norms]
    try:
        yield
    finally:
        for norm, handle in zip(norms, handles, strict=True):
            handle.remove()
            norm.training = True


def _spare_single_values(norm: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    norm.training = inputs[0].numel() > inputs[0].shape[1]


def _wrap(model: nn.Module, device: torch.device, world: World) -> nn.Module:
    if not world.is_distributed:
        return model
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)


def whole_val_loader(run: Run) -> Any:
    """All validation images, not this process's share only."""
    if not run.world.is_distributed:
        return run.val_loader
    share = 2 * run.options.batch_size // run.world.size
    return build_loader(run.val_set, share, workers=run.options.workers)
