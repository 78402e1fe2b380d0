"""What every detection head is: the last row of a model, and what the other rooms may ask of it.

Letters: B batch, A anchor points or queries, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from torch import Tensor, nn

from utils.structures import Decoded, Targets

RawT = TypeVar("RawT")
"""The raw predictions of a head: a NamedTuple of tensors, the same in training and evaluation."""


class Head(nn.Module, Generic[RawT]):
    """Feature maps -> raw predictions -> boxes and scores.

    A family defines the class attributes without a value here, `forward`, `initialize`, `decode` and `export_layout`;
    the rest has defaults for heads that have nothing of the kind.

    Attributes:
        family: what exports and messages call it; its recipe is `data/hyps/<family>.yaml`.
        postprocess: "nms" for overlapping boxes, "topk" for a set without duplicates, "best" for one of which each
            prediction has its best class alone.
        layout: what `export_layout` writes, a name of `deploy.runtimes.layouts`.
        class_outputs: patterns of the state-dict keys, within the head, that have one row a class.
        num_classes: C.
        strides: of the maps that inference reads, in pixels; 1 each before `initialize`.
        num_anchors: boxes that each cell predicts with 5 + C stacked outputs; 0 where outputs are not stacked.
        num_queries: predictions of an image, whatever its size; 0 where it is one an anchor point.
        main_inputs: which of the inputs the deployed head reads.
    """

    family: ClassVar[str]
    postprocess: Literal["nms", "topk", "best"]
    layout: ClassVar[Literal["anchors", "channels", "queries"]]
    class_outputs: ClassVar[tuple[str, ...]]
    num_classes: int
    strides: tuple[int, ...]
    num_anchors: int = 0
    num_queries: int = 0
    main_inputs: slice = slice(None)

    def __init__(self, num_classes: int, num_levels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = (1,) * num_levels

    def initialize(self, strides: Sequence[int]) -> None:
        """Learn the strides of all inputs and set what depends on them."""
        raise NotImplementedError

    def forward(self, features: Sequence[Tensor], targets: Targets | None = None) -> RawT:
        """Raw predictions for one map (B, C_l, H_l, W_l) an input; `targets` serve denoising."""
        raise NotImplementedError

    def decode(self, raw: RawT) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels and scores (B, A, C) in [0, 1], float32 or wider."""
        raise NotImplementedError

    def export_layout(self, raw: RawT) -> Tensor:
        """One tensor, laid out as `layout` says."""
        raise NotImplementedError

    def main_head(self) -> Head[Any]:
        """What is deployed, sharing its modules with this one: the head without what only training needs."""
        return self

    def take_recipe(self, hyp: Mapping[str, Any]) -> None:
        """Take the numbers that the head has from the recipe."""

    def tell_limits(self, sizes: np.ndarray, per_image: np.ndarray) -> None:
        """Log what the head learns only in part, or never, of a data set's objects.

        Args:
            sizes: widths and heights at the training size, in pixels, (N, 2).
            per_image: number of objects of every image, (n,).
        """
