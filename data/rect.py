"""`--rect`: batches of images of one aspect, padded only as far as they need."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from data.transforms import fitted_size


def by_aspect(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """Places of the images, widest first; images of one aspect stay in order."""
    return np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")


def shapes_of_batches(
    sizes: NDArray[np.int32], imgsz: tuple[int, int], batch_size: int, stride: int, pad: float
) -> NDArray[np.int64]:
    """Height and width of each batch: what its largest resized image needs, in whole strides."""
    fitted = np.array([fitted_size(int(h), int(w), imgsz) for h, w in sizes]).reshape(-1, 2)
    shapes = []
    for start in range(0, len(fitted), batch_size):
        needed = fitted[start : start + batch_size].max(axis=0)
        shapes.append([math.ceil(side / stride + pad) * stride for side in needed])
    return np.array(shapes, dtype=np.int64).reshape(-1, 2)
