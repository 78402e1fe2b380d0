"""Where a model's architecture and first weights come from: flags, a YAML, a checkpoint of any project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from models.heads.one_to_one import OneToOne
from models.weights.read import load_backbone_weights, read_weights
from models.weights.transfer import transfer
from models.yolo import DetectionModel, build_model
from utils.checkpoint import require_finite
from utils.config import parse_imgsz
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger

DEFAULT_CFG = "yolov5n.yaml"


def build_from_flags(options: Any, names: tuple[str, ...]) -> DetectionModel:
    """The model that `--cfg`, `--scale`, `--backbone` and `--weights` mean, its weights loaded.

    Args:
        options: flags; `config` (a mapping) goes before all of them, for a run that is resumed.
        names: class names of the data set.

    Raises:
        ConfigError, CheckpointError: what a user can mend.
    """
    weights = read_weights(options.weights) if options.weights and not options.resume else None
    cfg: Any = options.config or options.cfg
    if not cfg and weights is not None:
        if weights.config is None:
            raise CheckpointError(
                f"{options.weights}: carries no model YAML that is known here. Give it with --cfg."
            )
        cfg = weights.config
    is_resumed = options.config is not None
    try:
        model = _build(options, cfg, names, is_resumed)
    except ConfigError as error:
        if not is_resumed:
            raise
        first = str(error).partition("\n")[0]
        raise ConfigError(f"{options.resume}: its own model cannot be built - {first}") from error
    if weights is not None:
        report = transfer(
            model, weights.state, num_anchors=getattr(model.head, "num_anchors", None),
            names=(weights.names, names), source=options.weights,
        )  # fmt: skip
        get_logger().info(f"{options.weights}: {report.summary()}")
        if isinstance(model.head, OneToOne) and not any(
            ".one2one_" in key for key in weights.state
        ):
            model.head.start_alike()
    if options.backbone_weights and not is_resumed:
        get_logger().info(
            f"{options.backbone_weights}: {load_backbone_weights(model, options.backbone_weights).summary()}"
        )
    if not is_resumed:
        require_finite(model.state_dict(), options.weights or options.backbone_weights or cfg)
    return model


def _build(options: Any, cfg: Any, names: tuple[str, ...], is_resumed: bool) -> DetectionModel:
    return build_model(
        cfg or DEFAULT_CFG, num_classes=len(names), names=names, scale=None if is_resumed else options.scale,
        imgsz=parse_imgsz(options.imgsz, 32, tell=False), backbone=None if is_resumed else options.backbone,
        allow_code=options.allow_code, fresh=isinstance(cfg, Mapping), end2end=options.end2end,
    )  # fmt: skip
