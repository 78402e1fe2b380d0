"""The images and objects of one split, ready for the network.

A sample is asked for with a key `(epoch, index)`. All chance of a sample comes from a generator
seeded with (seed, epoch, index), so that it is the same in every worker, in any order, and after a
resumed run. n images, N objects.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from data import ground_truth
from data.account import account_of, objects_of
from data.formats.description import DataConfig
from data.formats.faults import SCORED_OTHERWISE, Fault
from data.formats.table import Table, merged
from data.image_cache import (
    CACHES,
    ImageCache,
    cache_if_small,
    cache_in_memory,
    cache_on_disk,
)
from data.images import Image, ImageError, read_image
from data.label_cache import load_table
from data.mosaic import mixup, mosaic4, mosaic9
from data.sampling import by_aspect, shapes_of_batches, weights_of
from data.storage import cache_file, digest_of_files
from data.transforms import (
    Picture,
    fitted_size,
    letterbox_boxes,
    pad_to,
    random_affine,
    random_colours,
    random_flips,
    resize_to_fit,
)
from utils.errors import DatasetError
from utils.logger import get_logger
from utils.structures import Letterbox

Key = int | tuple[int, int]


class Sample(NamedTuple):
    """One image on its way into a batch.

    Attributes:
        image: RGB, (3, H, W), uint8.
        labels: class indices, (k,), int64.
        boxes: xyxy pixels of `image`, (k, 4), float32.
        image_id: id under which the evaluator knows the image.
        letterbox: the way back to the original pixels; of an augmented image there is none, and
            this maps it onto itself.
        path: file of the image.
    """

    image: Tensor
    labels: Tensor
    boxes: Tensor
    image_id: int
    letterbox: Letterbox
    path: str


@dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """What a split is loaded with.

    Attributes:
        imgsz: height and width of the samples.
        augment: mosaic, mixup, warp, colours and flips, as far as `hyp` asks for them.
        hyp: `mosaic`, `mosaic9` (share of the mosaics that are made of nine), `mixup`, `hsv_h`,
            `hsv_s`, `hsv_v`, `degrees`, `translate`, `scale`, `shear`, `perspective`, `flipud`,
            `fliplr`; an absent key is 0. `mosaic_scale`: size of a mosaic's pictures, 1 where absent.
        rect: sort the images by aspect and pad each batch only as far as its images need; there
            is no mosaic then.
        batch_size: images of a `rect` batch.
        stride: the sides of a `rect` batch are multiples of it.
        cache: `ram` or `disk`: keep the resized images; `auto`: in memory if they are few; `off` or None: do not.
        single_cls: take all classes for one.
        image_weights: draw images with rare classes more often.
        seed: of all chance.
        close_mosaic_epoch: from this epoch on there is no mosaic and no mixup.
        strong_epochs: in others there are flips alone; None: all are such.

    Raises:
        DatasetError: options exclude each other, or have no meaning.
    """

    imgsz: tuple[int, int]
    augment: bool = False
    hyp: Mapping[str, float] = field(default_factory=dict)
    rect: bool = False
    batch_size: int = 16
    stride: int = 32
    cache: str | None = None
    single_cls: bool = False
    image_weights: bool = False
    seed: int = 0
    close_mosaic_epoch: int | None = None
    strong_epochs: range | None = None

    def __post_init__(self) -> None:
        if self.image_weights and self.rect:
            raise DatasetError("--image-weights: cannot be used with --rect. Drop one of them.")
        if self.seed < 0:
            raise DatasetError(f"--seed: got {self.seed}, expected 0 or more.")
        if self.cache not in (None, *CACHES):
            raise DatasetError(f"--cache: got {self.cache!r}, expected {', '.join(CACHES)}.")


class DetectionDataset(Dataset[Sample]):
    """Images of one split with their boxes.

    Attributes:
        config, split, options: what it is, and how it is loaded.
        names: class names; one name if all classes are taken for one.
        image_ids: ids for the evaluator, (n,).
        paths: image files, n of them.
        sizes: height and width of the images as stored, (n, 2).
        labels: class indices of the objects that are trained on, (N,).
        boxes: their boxes, xyxy in pixels of the images as stored, (N, 4).
        offsets: image i has the objects `offsets[i]` to `offsets[i + 1]`, (n + 1,).
        faults: what was mended when the labels were read.
        batch_shapes: height and width of every batch if `rect`, else None.
        weights: chances of the images if they are not drawn evenly, else None.
        cache: the resized images, if they are kept.
    """

    def __init__(self, config: DataConfig, split: str, table: Table, options: LoadOptions) -> None:
        self.config, self.split, self.options = config, split, options
        table = merged(table) if options.single_cls else table
        self.batch_shapes: NDArray[np.int64] | None = None
        if options.rect:
            table = table.take(by_aspect(table.sizes))
            self.batch_shapes = shapes_of_batches(
                table.sizes, options.imgsz, options.batch_size, options.stride
            )
        self.table = table
        self._is_one_class = options.single_cls and len(config.names) > 1
        self.names = ("object",) if self._is_one_class else config.names
        self.faults: tuple[Fault, ...] = table.faults
        self.image_ids, self.paths, self.sizes = table.image_ids, table.paths, table.sizes
        self.objects = objects_of(table, options.single_cls)
        self.labels, self.boxes, self.offsets = self.objects
        self.weights = weights_of(self.objects) if options.image_weights else None
        self.cache: ImageCache | None = None
        self._damaged: set[int] = set()

    def __len__(self) -> int:
        return len(self.table)

    @property
    def category_ids(self) -> list[int]:
        """Category id in `coco_ground_truth` of every class index."""
        return [1] if self._is_one_class else ground_truth.category_ids(self.config, self.split)

    def box_sizes_wh(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Width and height of every box in original pixels (N, 2), and height and width of the
        image that it stands in (N, 2)."""
        sizes = np.repeat(self.sizes, np.diff(self.offsets), axis=0)
        return self.boxes[:, 2:] - self.boxes[:, :2], sizes

    def coco_ground_truth(self, *, as_read: bool = False) -> ground_truth.Json:
        """Images, annotations and categories for a COCO evaluator; see `data.ground_truth`."""
        one_name = self.names[0] if self._is_one_class else ""
        return ground_truth.coco_ground_truth(
            self.config, self.split, self.table, one_name, as_read=as_read
        )

    @property
    def scored_otherwise(self) -> int:
        """Objects of a COCO file that were cut or dropped when read, and are scored as they stand."""
        if self.config.format != "coco":
            return 0
        return sum(fault.kind in SCORED_OTHERWISE for fault in self.faults)

    def fill_cache(self) -> None:
        """Keep the resized images as the options say, if there is room."""
        fitted = [fitted_size(int(h), int(w), self.options.imgsz) for h, w in self.sizes]
        sizes = np.array(fitted, dtype=np.int32).reshape(-1, 2)

        def read(index: int) -> Image | None:
            try:
                return self._read_resized(index)
            except ImageError:
                return None

        if self.options.cache == "auto":
            self.cache = cache_if_small(sizes, read)
        elif self.options.cache == "ram":
            self.cache = cache_in_memory(sizes, read)
        elif self.options.cache == "disk":
            height, width = self.options.imgsz
            file = cache_file(Path(self.paths[0]).parent, f"-{self.split}.{height}x{width}")
            key = digest_of_files(self.paths, self.config.white)
            self.cache = cache_on_disk(sizes, read, file, key)

    def __getitem__(self, key: Key) -> Sample:
        epoch, index = key if isinstance(key, tuple) else (0, int(key))
        if not 0 <= index < len(self):
            raise IndexError(index)
        if self.options.augment:
            rng = np.random.default_rng((self.options.seed, epoch, index))
            picture = self._augmented(index, epoch, rng)
            height, width = picture.image.shape[:2]
            box = Letterbox(height, width, 1.0, 1.0, 0, 0)
        else:
            picture, box, index = self._letterboxed(index)
        image = np.ascontiguousarray(picture.image.transpose(2, 0, 1))
        if not image.flags.writeable:
            image = image.copy()
        return Sample(
            torch.from_numpy(image),
            torch.from_numpy(picture.labels),
            torch.from_numpy(np.ascontiguousarray(picture.boxes)),
            int(self.image_ids[index]),
            box,
            self.paths[index],
        )

    def _read_resized(self, index: int) -> Image:
        image = read_image(self.paths[index], self.config.white)
        if image.shape[:2] != tuple(self.sizes[index]):
            raise DatasetError(
                f"{self.paths[index]}: changed since it was scanned - got {image.shape[:2]}, "
                f"expected {tuple(map(int, self.sizes[index]))}. Start again."
            )
        return resize_to_fit(image, self.options.imgsz)

    def _decodable(self, index: int) -> tuple[Image, int]:
        """The resized image at a place, or the next one that decodes, and its place.

        The scan reads no more of a JPEG than its head and end mark, so that damage in between
        shows only here. A `rect` batch takes the stand-in from its own images, for their shape.

        Raises:
            DatasetError: none of the images decodes.
        """
        span = self.options.batch_size if self.options.rect else len(self)
        first = index - index % span
        places = range(first, min(first + span, len(self)))
        for step in range(len(places)):
            place = places[(index - first + step) % len(places)]
            if place in self._damaged:
                continue
            image = self.cache[place] if self.cache is not None else None
            try:
                # The error of a file that a cache lacks says what is wrong with it.
                return self._read_resized(place) if image is None else image, place
            except ImageError as error:
                self._damaged.add(place)
                missed = "" if self.options.augment else ", its objects count as missed"
                get_logger().warning(f"skipped {error} Another image stands in for it{missed}.")
        raise DatasetError(
            f"{self.config.file}: {self.split} - got no image that decodes among {len(places)}, "
            f"expected one. Replace or remove {self.paths[first]}."
        )

    def _rows(self, index: int) -> slice:
        """Where the objects of an image stand."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def _resized(self, index: int) -> Picture:
        """An image that just fits into `imgsz`, with its objects in its own pixels."""
        image, index = self._decodable(index)
        height, width = (int(side) for side in self.sizes[index])
        scale = np.array([image.shape[1] / width, image.shape[0] / height] * 2)
        own = self._rows(index)
        return Picture(image, self.labels[own], (self.boxes[own] * scale).astype(np.float32))

    def _letterboxed(self, index: int) -> tuple[Picture, Letterbox, int]:
        shape = self.options.imgsz
        if self.batch_shapes is not None:
            rows, columns = self.batch_shapes[index // self.options.batch_size]
            shape = (int(rows), int(columns))
        resized, index = self._decodable(index)
        original = (int(self.sizes[index, 0]), int(self.sizes[index, 1]))
        image, box = pad_to(resized, shape, original)
        own = self._rows(index)
        boxes = letterbox_boxes(self.boxes[own], box)
        return Picture(image, self.labels[own].copy(), boxes), box, index

    def _augmented(self, index: int, epoch: int, rng: np.random.Generator) -> Picture:
        hyp, close = self.options.hyp, self.options.close_mosaic_epoch
        strong = self.options.strong_epochs
        if strong is not None and epoch not in strong:
            return random_flips(self._letterboxed(index)[0], hyp, rng)
        is_closed = self.options.rect or (close is not None and epoch >= close)
        if not is_closed and rng.random() < hyp.get("mosaic", 0.0):
            picture = self._mosaic(index, rng)
            if rng.random() < hyp.get("mixup", 0.0):
                other = self._mosaic(int(self._draw(rng)), rng)
                picture = mixup(picture, other, rng)
        else:
            padded = self._letterboxed(index)[0]
            size = (padded.image.shape[0], padded.image.shape[1])
            picture = random_affine(padded, size, hyp, rng)
        image = random_colours(picture.image, hyp, rng)
        return random_flips(picture._replace(image=image), hyp, rng)

    def _draw(self, rng: np.random.Generator, count: int | None = None) -> NDArray[np.int64]:
        """Places of images that join another one, drawn as the images of an epoch are."""
        if self.weights is None:
            return np.asarray(rng.integers(len(self), size=count))
        return self.weights.draw(rng, count or 1).squeeze()

    def _mosaic(self, index: int, rng: np.random.Generator) -> Picture:
        of_nine = rng.random() < self.options.hyp.get("mosaic9", 0.0)
        others = self._draw(rng, 8 if of_nine else 3)
        chosen = [index, *(int(other) for other in others)]
        rng.shuffle(chosen)
        pictures = [self._resized(place) for place in chosen]
        canvas = (mosaic9 if of_nine else mosaic4)(pictures, self.options.imgsz, rng)
        hyp = self.options.hyp
        return random_affine(canvas, self.options.imgsz, hyp, rng, hyp.get("mosaic_scale", 1.0))


def build_dataset(config: DataConfig, split: str, options: LoadOptions) -> DetectionDataset:
    """Read the labels of a split (`train`, `val` or `test`) and make its data set.

    Raises:
        DatasetError: files are missing, or labels hold faults that cannot be mended.
    """
    dataset = DetectionDataset(config, split, load_table(config, split), options)
    _tell(dataset)
    dataset.fill_cache()
    return dataset


def _tell(dataset: DetectionDataset) -> None:
    """The account of the split, and what of the recipe cannot be done with it."""
    options = dataset.options
    text, is_lossy = account_of(dataset.table, dataset.objects, dataset.names, options.imgsz)
    get_logger().log(logging.WARNING if is_lossy else logging.INFO, "%s: %s", dataset.split, text)
    if options.augment and options.hyp.get("copy_paste", 0):
        get_logger().warning("copy_paste: not done, it needs outlines and these labels are boxes")
    if not len(dataset.labels):
        get_logger().warning("%s: %s holds no objects at all", dataset.config.file, dataset.split)
