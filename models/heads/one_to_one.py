"""Heads without suppression: beside the branch that many predictions of an object train, one that a single prediction trains.

Sources: YOLOv10 (arXiv 2405.14458, section 3.1) for two branches over the same maps; YOLO26 (arXiv 2606.03748) for the
one-to-one branch alone in the deployed form.
Letters: B batch, A anchor points, C classes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.head import Head
from models.heads.ddetect import DDetect
from models.heads.dfl import (
    DFLDetect,
    DFLHead,
    DFLRaw,
    channels_first_layout,
    decode_raw,
    predict,
    set_biases,
    tell_thin_objects,
)
from models.registry import HeadForm
from utils.errors import ConfigError
from utils.structures import Decoded, Targets


class TwoBranches(NamedTuple):
    """Raw predictions of both branches for the same anchor points.

    Attributes:
        many: of the branch that several predictions of an object train; it needs NMS.
        one: of the branch that one prediction of an object trains.
    """

    many: DFLRaw
    one: DFLRaw


class OneToOne(Head[TwoBranches]):
    """Two branches over the same maps, without shared weights; the one-to-one branch starts as a copy of the other.

    What inference reads is said by `postprocess`: "best" the one-to-one branch, "nms" the other (see `use_nms`).

    Args:
        many: the head of the family, whose towers become the one-to-many branch.

    Attributes:
        reg_max: bins of each distance, 1: the distance itself.
        detached: whether only the one-to-many branch trains the network below.
    """

    branch: ClassVar[type[DFLHead]]
    layout = "channels"
    class_outputs = ("cv3.*.2.*", "one2one_cv3.*.2.*")

    def __init__(self, many: DFLHead) -> None:
        super().__init__(many.num_classes, len(many.strides))
        self.postprocess = "best"
        self.reg_max, self.detached = many.reg_max, False
        self.cv2, self.cv3, self.dfl = many.cv2, many.cv3, many.dfl
        self.one2one_cv2, self.one2one_cv3 = copy.deepcopy(many.cv2), copy.deepcopy(many.cv3)

    def initialize(self, strides: Sequence[int]) -> None:
        """Set the biases of both branches, which depend on the stride of each level."""
        self.strides = tuple(strides)
        set_biases(self.cv2, self.cv3, self.strides)
        set_biases(self.one2one_cv2, self.one2one_cv3, self.strides)

    def take_recipe(self, hyp: Mapping[str, object]) -> None:
        """`o2o_detach`: 1 keeps the gradient of the one-to-one branch out of the network below."""
        self.detached = bool(hyp["o2o_detach"])

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> TwoBranches:
        """Raw predictions of both branches for one map (B, *, H, W) a level."""
        below = [x.detach() for x in features] if self.detached else features
        return TwoBranches(
            predict(features, self.cv2, self.cv3, self.strides),
            predict(below, self.one2one_cv2, self.one2one_cv3, self.strides),
        )

    def decode(self, raw: TwoBranches) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels and class probabilities (B, A, C) of the branch that inference reads."""
        return decode_raw(raw.one if self.postprocess == "best" else raw.many, self.dfl)

    def export_layout(self, raw: TwoBranches) -> Tensor:
        """(B, 4 + C, A): cxcywh in pixels, then class probabilities."""
        return channels_first_layout(self.decode(raw))

    def main_head(self) -> Head[DFLRaw]:
        """The branch that inference reads as a head of its own, sharing its modules with this one."""
        with torch.device("meta"):
            head = self.branch(
                self.num_classes, channels=[1] * len(self.strides), reg_max=self.reg_max
            )
        head.cv2, head.cv3, head.dfl = self.cv2, self.cv3, self.dfl
        if self.postprocess == "best":
            head.cv2, head.cv3 = self.one2one_cv2, self.one2one_cv3
        main: Head[DFLRaw] = head.train(self.training)
        main.strides, main.postprocess = self.strides, self.postprocess
        return main

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Objects between the anchor points."""
        tell_thin_objects(sizes, self.strides)


class OneToOneDetect(OneToOne):
    """YOLO11's head with a one-to-one branch."""

    family = "yolo11"
    branch = DFLDetect


class OneToOneDDetect(OneToOne):
    """YOLOv9's head, the single one of GELAN, with a one-to-one branch."""

    family = "yolov9"
    branch = DDetect


def check_form(head: Head[object], form: HeadForm, where: str) -> None:
    """Refuse `end2end: true` for a head that cannot have the branch.

    Raises:
        ConfigError: it needs NMS; `where` is its row.
    """
    if form.end2end and head.postprocess == "nms":
        raise ConfigError(
            f"{where}: got end2end true for a head that needs NMS, expected Detect with [nc], or DDetect. Leave it out."
        )


def use_nms(head: Head[object], where: str = "model") -> None:
    """Let inference read the one-to-many branch, with NMS; before the model is fused, which drops the other one.

    Args:
        head: of a whole model.
        where: what the error calls it.

    Raises:
        ConfigError: the head has no such branch.
    """
    if not isinstance(head, OneToOne):
        raise ConfigError(
            f"{where}: got a head without a one-to-many branch beside its own, expected a model with end2end: true as it was "
            "trained. Leave --one-to-many out."
        )
    head.postprocess = "nms"
