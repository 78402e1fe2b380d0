"""`--image-weights`: which images, and which partners of a mosaic, are drawn more often."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from data.account import Objects


class ImageWeights:
    """Chances of images by the classes of their objects.

    An image weighs the sum of its objects' inverse class counts, so that every class comes equally
    often. A background weighs what an image with objects does on average: backgrounds keep the
    share that they have in the data.

    Args:
        objects: of the split, of at least two classes.

    Attributes:
        chances: of each image, (n,), their sum is 1.
    """

    def __init__(self, objects: Objects) -> None:
        counts = np.diff(objects.offsets)
        inverse = 1 / np.maximum(np.bincount(objects.labels), 1)
        image_of = np.repeat(np.arange(len(counts)), counts)
        weights = np.bincount(image_of, inverse[objects.labels], minlength=len(counts))
        weights[counts == 0] = weights[counts > 0].mean()
        self.chances: NDArray[np.float64] = weights / weights.sum()
        self._sums = np.cumsum(self.chances)

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        """Places of images, drawn with replacement."""
        places = np.searchsorted(self._sums, rng.random(count), side="right")
        return np.minimum(places, len(self._sums) - 1)


def weights_of(objects: Objects) -> ImageWeights | None:
    """The weights of a split; None where it has objects of fewer than two classes."""
    return ImageWeights(objects) if len(np.unique(objects.labels)) > 1 else None
