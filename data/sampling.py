"""Which images come, in which order, and in batches of which shape. n images."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from data.account import Objects
from data.transforms import fitted_size


class EpochSampler(Sampler[tuple[int, int]]):
    """Keys (epoch, index) in an order that depends on seed and epoch alone.

    With several processes each takes every `world_size`-th key, so that one step of all of them
    sees the images of one step of a single process with the joint batch. If shuffled, all get
    equally many (the first keys again at the end); otherwise each image comes exactly once.

    Args:
        length: images of the data set.
        shuffle: a new order every epoch.
        seed: of the order.
        rank: of this process.
        world_size: number of processes.
        block: this many neighbours stay together, whole blocks are shuffled and dealt out; for
            data sets whose batches have their own shapes.
        image_weights: how often each image is drawn, with replacement, in place of once, (n,).
    """

    def __init__(
        self,
        length: int,
        *,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        block: int = 1,
        image_weights: Sequence[float] | NDArray[np.float64] | None = None,
    ) -> None:
        assert 0 <= rank < world_size, "a rank of this run"
        self.length, self.shuffle, self.seed = length, shuffle, seed
        self.rank, self.world_size, self.block = rank, world_size, block
        self.epoch = self.skip = 0
        self.image_weights: NDArray[np.float64] | None = None
        if image_weights is not None:
            numbers = np.asarray(image_weights, dtype=np.float64)
            if numbers.shape != (length,) or numbers.min() < 0 or not numbers.sum() > 0:
                raise ValueError(f"image weights: got {numbers.shape}, expected {length}, >= 0")
            self.image_weights = numbers / numbers.sum()

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """Choose the epoch that the next iteration is for, without its first `skip` keys."""
        self.epoch, self.skip = epoch, skip

    def __len__(self) -> int:
        return len(self._own(self._blocks(np.arange(self.length))))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = np.arange(self.length)
        rng = np.random.default_rng((self.seed, self.epoch))
        if self.image_weights is not None:
            order = rng.choice(self.length, self.length, p=self.image_weights)
        elif self.shuffle and self.block == 1:
            order = rng.permutation(self.length)
        blocks = self._blocks(order)
        if self.shuffle and self.block > 1:
            # A last block that is not full stays last, or it would shift all batches after it.
            full = self.length // self.block
            blocks = [blocks[k] for k in rng.permutation(full)] + blocks[full:]
        return ((self.epoch, int(index)) for index in self._own(blocks)[self.skip :])

    def _blocks(self, order: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        return [order[k : k + self.block] for k in range(0, len(order), self.block)]

    def _own(self, blocks: list[NDArray[np.int64]]) -> NDArray[np.int64]:
        """The indices that this process takes."""
        if self.shuffle and blocks and self.world_size > 1:
            if self.block > 1 and len(blocks[-1]) < self.block:
                blocks = [*blocks[:-1], np.resize(blocks[-1], self.block)]
            wanted = math.ceil(len(blocks) / self.world_size) * self.world_size
            blocks = [blocks[k % len(blocks)] for k in range(wanted)]
        own = blocks[self.rank :: self.world_size]
        return np.concatenate(own) if own else np.zeros(0, dtype=np.int64)


class ImageWeights:
    """`--image-weights`: chances of images by the classes of their objects.

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


def by_aspect(sizes: NDArray[np.int32]) -> NDArray[np.int64]:
    """`--rect`: places of the images, widest first; images of one aspect stay in order."""
    return np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")


def shapes_of_batches(
    sizes: NDArray[np.int32], imgsz: tuple[int, int], batch_size: int, stride: int
) -> NDArray[np.int64]:
    """Height and width of each `--rect` batch: what its largest resized image needs, in whole strides."""
    fitted = np.array([fitted_size(int(h), int(w), imgsz) for h, w in sizes]).reshape(-1, 2)
    shapes = []
    for start in range(0, len(fitted), batch_size):
        needed = fitted[start : start + batch_size].max(axis=0)
        shapes.append([math.ceil(side / stride) * stride for side in needed])
    return np.array(shapes, dtype=np.int64).reshape(-1, 2)
