"""A model from a weights file: architecture from the file or a YAML, numbers from the file.

`load_weights` takes our own checkpoints and everybody else's, `build_to_train` what a training may start from; `load_single`
turns the weights of a YOLOv9 with an auxiliary branch into those of the network without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.heads.one_to_one import OneToOne
from models.weights.claimed import claimed, first_problem, model_of
from models.weights.matching import ROW, match_keys
from models.weights.read import ForeignWeights, read_weights
from models.weights.transfer import TransferReport, load_backbone_weights, transfer
from models.yolo import DetectionModel, build_model
from utils.checkpoint import ForeignCheckpointError, load_checkpoint, require_finite
from utils.errors import CheckpointError, ConfigError
from utils.logger import get_logger

Config = str | Path | Mapping[str, object]
"""The path of a model YAML, a bare name such as `yolo11s`, or what stands in one."""

DEFAULT_CFG = "yolov5n.yaml"
WHOLE = 0.95  # of a model's numbers
SINGLE_TOLERANCE = 1e-4  # pixels, and scores
# The main branch of a dual head, under the names that it has in the single head.
MAIN_BRANCH = {"cv4": "cv2", "cv5": "cv3", "dfl2": "dfl"}
DUAL_PARTS = ("cv2", "cv3", *MAIN_BRANCH)


class Loaded(NamedTuple):
    """A model with the numbers of a file; no `report` where the file was ours and fits exactly."""

    model: DetectionModel
    report: TransferReport | None


def load_weights(
    path: str | Path,
    *,
    cfg: Config | None = None,
    num_classes: int | None = None,
    backbone: Sequence[str] | None = None,
    allow_code: bool = False,
) -> Loaded:
    """Build the model that a weights file belongs to, in eval mode on the CPU.

    Args:
        path: our checkpoint, another project's, or safetensors.
        cfg: architecture; None takes the model YAML that the file carries.
        num_classes: None takes what the file says.
        backbone: stands in for that of `cfg`, as for `build_model`.
        allow_code: whether Python files that the model YAML imports may run.

    Raises:
        CheckpointError: the file cannot be read, carries no YAML we can build and `cfg` is None, is not finite, or
            nothing in it fits.
        ConfigError: `cfg` is wrong.
    """
    if cfg is None and num_classes is None:
        try:
            model = model_of(path, load_checkpoint(path), allow_code)
            require_finite(model.state_dict(), path)
            return Loaded(model.float().eval(), None)
        except ForeignCheckpointError:
            pass  # another project's file, or none: the reader below says
    weights = read_weights(path)
    model = _build_for(path, weights, cfg, num_classes, backbone, allow_code)
    report = transfer(model, weights.state, source=path)
    if report.backbone_only:
        raise CheckpointError(
            f"{path}: has weights for the backbone only, expected those of a whole detector. Train one from it: "
            f"train.py --weights {path}."
        )
    require_finite(model.state_dict(), path)
    return Loaded(model.eval(), report)


def require_whole(path: str | Path, report: TransferReport) -> None:
    """Log what a model got from a file.

    Raises:
        CheckpointError: it is so little that the model's boxes would mean nothing.
    """
    given, wanted = report.parameters
    if given < WHOLE * wanted:
        raise CheckpointError(
            f"{path}: fills only {100 * given / wanted:.1f}% of the model, expected all of it. Give the --cfg that it "
            "was trained with."
        )
    is_partial = report.partial or report.missing or report.mismatched
    log = get_logger().warning if is_partial else get_logger().info
    log(f"{path}: {report.summary()}")


def _build_for(
    path: str | Path,
    weights: ForeignWeights,
    cfg: Config | None,
    num_classes: int | None,
    backbone: Sequence[str] | None,
    allow_code: bool,
) -> DetectionModel:
    """The network for `weights`, with their class names where the counts agree."""
    config = cfg if cfg is not None else weights.config
    if config is None:
        raise CheckpointError(f"{path}: carries no model YAML. Say which one it is for with --cfg.")
    classes = num_classes or (len(weights.names) if weights.names and cfg is None else None)
    try:
        with claimed(path, config, weights.state) if cfg is None else nullcontext():
            model = build_model(
                config,
                num_classes=classes,
                imgsz=weights.imgsz or (640, 640),
                backbone=backbone,
                allow_code=allow_code,
                fresh=cfg is None,
            )
    except ConfigError as error:
        if cfg is not None:
            raise
        raise CheckpointError(f"{error} Give --cfg.") from error
    if weights.names and len(weights.names) == model.head.num_classes:
        model.names = weights.names
    return model


def build_to_train(
    names: tuple[str, ...],
    *,
    cfg: Config = "",
    weights: str = "",
    backbone_weights: str = "",
    scale: str | None = None,
    backbone: Sequence[str] | None = None,
    imgsz: tuple[int, int] = (640, 640),
    allow_code: bool = False,
    end2end: bool = False,
) -> DetectionModel:
    """The model that a training starts from, its first weights loaded.

    Args:
        names: class names of the data set.
        cfg: architecture; empty takes the model YAML that `weights` carry, else the default.
        weights: file of a whole detector or of a backbone, of any project.
        backbone_weights: file for the backbone alone.
        scale, backbone, imgsz, allow_code, end2end: see `build_model`.

    Raises:
        ConfigError, CheckpointError: what a user can mend.
    """
    given = read_weights(weights) if weights else None
    if not cfg and given is not None:
        if given.config is None:
            raise CheckpointError(
                f"{weights}: carries no model YAML that is known here. Give it with --cfg."
            )
        cfg = given.config
    cfg = cfg or DEFAULT_CFG
    model = build_model(
        cfg,
        num_classes=len(names),
        names=names,
        scale=scale,
        imgsz=imgsz,
        backbone=backbone,
        allow_code=allow_code,
        fresh=isinstance(cfg, Mapping),
        end2end=end2end,
    )
    log = get_logger().info
    if given is not None:
        state = given.state
        if isinstance(model.head, OneToOne) and not any(".one2one_" in key for key in state):
            state = with_branch(state)
            log(f"{weights}: has no one-to-one branch, which starts as a copy of the other")
        report = transfer(model, state, names=(given.names, names), source=weights)
        log(f"{weights}: {report.summary()}")
    if backbone_weights:
        report = load_backbone_weights(model, backbone_weights)
        log(f"{backbone_weights}: {report.summary()}")
    require_finite(model.state_dict(), weights or backbone_weights or str(cfg))
    return model


def with_branch(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a head with one branch as those of a head with two, the second a copy of the first."""
    rows = [int(match[1]) for key in state if (match := ROW.match(key))]
    last = f"model.{max(rows, default=0)}."
    copied = {
        key.replace(last, f"{last}one2one_", 1): value
        for key, value in state.items()
        if key.startswith((f"{last}cv2.", f"{last}cv3."))
    }
    return {**state, **copied}


def build_to_resume(
    path: str | Path,
    config: Mapping[str, object],
    names: tuple[str, ...],
    *,
    imgsz: tuple[int, int],
    allow_code: bool = False,
) -> DetectionModel:
    """The model of a training that goes on, before its weights come.

    Args:
        path: its checkpoint, named in messages.
        config: the model YAML in it.
        names, imgsz, allow_code: see `build_model`.

    Raises:
        ConfigError: it cannot be built.
    """
    try:
        return build_model(
            config,
            num_classes=len(names),
            names=names,
            imgsz=imgsz,
            allow_code=allow_code,
            fresh=True,
        )
    except ConfigError as error:
        raise first_problem(path, error) from error


def dual_to_single(state: Mapping[str, Tensor], single: nn.Module) -> dict[str, Tensor]:
    """The main branch of a dual YOLOv9 as the state dict of the network without the auxiliary one.

    Rows are found by their place in the graph: the rows of `single` appear in the dual network in
    the same order with the same shapes, the auxiliary ones between or behind them.

    Args:
        state: weights of the dual network (`yolov9-c`).
        single: the network of the same size without auxiliary branch (`gelan-c`); not changed.

    Raises:
        CheckpointError: `state` is not that of a dual head, or a tensor of `single` has no
            counterpart.
    """
    parts = {key: _row_and_part(key) for key in state}
    rows = {row for row, _ in parts.values()}
    heads = {r for r in rows if all((r, part) in parts.values() for part in DUAL_PARTS)}
    if not heads:
        raise CheckpointError(
            "weights: have no auxiliary branch - expected a dual head with cv2 to cv5."
        )
    main = {}
    for key, value in state.items():
        row, part = parts[key]
        if row not in heads:
            main[key] = value
        elif part in MAIN_BRANCH:
            main[key.replace(f".{part}.", f".{MAIN_BRANCH[part]}.", 1)] = value
    target = {key: tuple(value.shape) for key, value in single.state_dict().items()}
    sources, _ = match_keys({key: tuple(value.shape) for key, value in main.items()}, target)
    unmatched = [
        k for k, shape in target.items() if k not in sources or main[sources[k]].shape != shape
    ]
    if unmatched:
        raise CheckpointError(
            f"weights: {len(unmatched)} tensors of the single form have no counterpart, "
            f"first {unmatched[0]} {list(target[unmatched[0]])}. "
            "Take the gelan of the same size and number of classes."
        )
    return {key: main[source] for key, source in sources.items()}


def _row_and_part(key: str) -> tuple[str, str]:
    """`("38", "cv4")` of `model.38.cv4.0.conv.weight`."""
    match = ROW.match(key)
    return (match[1], match[2].partition(".")[0]) if match else ("", "")


def load_single(path: str | Path, cfg: Config) -> DetectionModel:
    """The single form of a dual YOLOv9's weights file, checked against the dual one on a random image.

    Args:
        path: weights of the dual network, with its model YAML inside.
        cfg: the network of the same size without auxiliary branch, such as `gelan-c`.

    Raises:
        CheckpointError: the file is not that of a dual head, does not fit `cfg`, or the two forms differ.
    """
    dual = load_weights(path).model
    single = build_model(cfg, num_classes=dual.head.num_classes, names=dual.names, imgsz=dual.imgsz)
    single.load_state_dict(dual_to_single(dual.state_dict(), single))
    image = torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, found = dual.eval().decode(dual(image)), single.eval().decode(single(image))
    difference = max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
    if not difference <= SINGLE_TOLERANCE:
        raise CheckpointError(
            f"{path}: its single form differs - got max |difference| {difference:.1e}, expected at most "
            f"{SINGLE_TOLERANCE:.0e}. Is {cfg} of the same size?"
        )
    return single
