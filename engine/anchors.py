"""The objects of a data set and the head: what it cannot learn of them, and anchors that fit them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.dataset import DetectionDataset
from engine.options import TrainOptions
from models.family import Recipe
from models.heads.anchor import AnchorDetect
from models.yolo import DetectionModel
from utils.anchors import anchor_fit, fit_anchors
from utils.logger import get_logger

GOOD_RECALL = 0.99  # AP is sampled at recalls 0.01 apart: what is missed beyond costs a whole step


def fit_to_objects(
    model: DetectionModel,
    train_set: DetectionDataset,
    imgsz: tuple[int, int],
    hyp: Recipe,
    options: TrainOptions,
) -> None:
    """Measure, and where it has anchors fit, the head on the objects of the training split."""
    sizes = _sizes_at(train_set, imgsz)
    model.head.tell_limits(sizes, np.diff(train_set.offsets))
    if isinstance(model.head, AnchorDetect):
        refit = not (options.noautoanchor or options.resume)
        check_anchors(model.head, sizes, hyp["anchor_t"], options.seed, refit=refit)


def _sizes_at(dataset: DetectionDataset, imgsz: tuple[int, int]) -> NDArray[np.float64]:
    """Object sizes in pixels, images scaled to fit `imgsz`."""
    sizes, image_sizes = dataset.box_sizes_wh()
    if len(sizes) == 0:
        return np.zeros((0, 2))
    scale = np.minimum(imgsz[0] / image_sizes[:, 0], imgsz[1] / image_sizes[:, 1])
    return np.asarray(sizes * scale[:, None], dtype=np.float64)


def check_anchors(
    head: AnchorDetect,
    sizes: NDArray[np.float64],
    threshold: float,
    seed: int,
    *,
    refit: bool = True,
) -> None:
    """Measure the anchors on the data set's object sizes and fit new ones where they cover too little.

    Args:
        head: its anchors are replaced in place.
        sizes: object widths and heights at the training size, in pixels, (N, 2).
        threshold: largest ratio of sides, `anchor_t`.
        seed: of the fit.
        refit: False keeps them and only tells.
    """
    log = get_logger()
    strides = head.anchors.new_tensor(head.strides).view(-1, 1, 1)
    current = (head.anchors * strides).reshape(-1, 2).cpu().double().numpy()
    if len(sizes) == 0:
        return
    fit = anchor_fit(sizes, current, threshold)
    log.info(f"anchors: {fit.per_object:.2f} an object, best possible recall {fit.recall:.4f}")
    if fit.recall >= GOOD_RECALL or not refit:
        return
    try:
        new = fit_anchors(sizes, len(current), seed=seed)
    except ValueError as error:
        log.info(f"anchors: kept - {error}")
        return
    better = anchor_fit(sizes, new, threshold)
    if better.recall <= fit.recall:
        log.info(f"anchors: kept, a fit reaches {better.recall:.4f}")
        return
    head.anchors.copy_(head.anchors.new_tensor(new).view_as(head.anchors) / strides)
    log.info(
        f"anchors: fitted to the data, best possible recall {better.recall:.4f} ({np.round(new).astype(int).tolist()})"
    )
