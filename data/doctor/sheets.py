"""Pictures of findings: a sheet for each kind, its first places with their boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.doctor.findings import Finding, Place
from data.formats.description import DataConfig
from data.images import Image, ImageError, is_image_path, read_image
from data.transforms import letterbox, letterbox_boxes
from utils.detection_files import safe_name
from utils.structures import Targets
from utils.visualize import plot_batch

TILE = 384
MOST_TILES = 12


class Tile(NamedTuple):
    """A picture of TILE x TILE pixels with the boxes that a finding is about."""

    image: Image
    boxes: torch.Tensor
    labels: tuple[int, ...]
    path: str


def write_sheets(findings: Sequence[Finding], config: DataConfig, folder: Path) -> None:
    """`<split>-<kind>.jpg` for each finding that is about images that can be shown."""
    for finding in findings:
        tiles: list[Tile] = []
        for place in finding.places:
            if len(tiles) < MOST_TILES:
                tiles += _tiles(place, config.white)
        if tiles:
            name = safe_name(f"{finding.split}-{finding.kind}".replace(" ", "-"), "finding")
            counts = torch.tensor([len(tile.labels) for tile in tiles])
            objects = Targets(
                torch.repeat_interleave(torch.arange(len(tiles)), counts),
                torch.tensor([label for tile in tiles for label in tile.labels]),
                torch.cat([tile.boxes for tile in tiles]),
            )
            path, titles = folder / f"{name}.jpg", [tile.path for tile in tiles]
            images = [tile.image for tile in tiles]
            plot_batch(images, objects, config.names, path, titles=titles, max_images=len(tiles))


def _tiles(place: Place, white: float | None) -> Iterator[Tile]:
    """The image of a place, and the one beside it; nothing of what is no image."""
    for path, boxes, labels in ((place.path, place.boxes, place.labels), (place.beside, (), ())):
        if not is_image_path(path):
            continue
        try:
            image, box = letterbox(read_image(path, white), (TILE, TILE))
        except ImageError:
            continue
        corners = np.array(boxes, np.float32).reshape(-1, 4)
        yield Tile(image, torch.from_numpy(letterbox_boxes(corners, box)), labels, path)
