"""Images with rare classes are drawn more often, also into mosaics; backgrounds keep their share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from conftest import write_image

from data.account import Objects
from data.config import load_data_config
from data.dataset import DetectionDataset, LoadOptions, build_dataset
from data.loader import build_loader
from data.sampling import ImageWeights, weights_of
from utils.errors import DatasetError


def test_weights_worked_by_hand():
    """Classes 0 0 | 1 | none | 0: a 0 weighs 1/3, the 1 weighs 1; the background their mean, 2/3."""
    objects = Objects(
        np.array([0, 0, 1, 0]), np.zeros((4, 4), np.float32), np.array([0, 2, 3, 3, 4])
    )
    expected = np.array([2 / 3, 1, 2 / 3, 1 / 3]) / (8 / 3)
    np.testing.assert_allclose(ImageWeights(objects).chances, expected)


def test_drawing_follows_the_chances_and_one_class_has_none():
    objects = Objects(np.array([0, 1, 1, 1]), np.zeros((4, 4), np.float32), np.arange(5))
    weights = ImageWeights(objects)
    drawn = np.bincount(weights.draw(np.random.default_rng(0), 6000), minlength=4) / 6000
    np.testing.assert_allclose(drawn, [1 / 2, 1 / 6, 1 / 6, 1 / 6], atol=0.02)
    assert weights_of(objects._replace(labels=np.zeros(4, np.int64))) is None
    assert (
        weights_of(Objects(np.zeros(0, np.int64), np.zeros((0, 4)), np.zeros(3, np.int64))) is None
    )


@pytest.fixture
def lopsided(tmp_path: Path) -> Path:
    """18 images of a common class, two of a rare one, five without objects."""
    (tmp_path / "labels").mkdir()
    for number in range(25):
        write_image(tmp_path / f"images/{number:02}.png", 32, 32, number)
        label = "" if number >= 20 else f"{int(number >= 18)} .5 .5 .8 .8\n"
        (tmp_path / f"labels/{number:02}.txt").write_text(label)
    (tmp_path / "d.yaml").write_text("train: images\nnames: [common, rare]\n")
    return tmp_path / "d.yaml"


def dataset_of(file: Path, **options) -> DetectionDataset:
    hyp = {"mosaic": 1.0, "mosaic9": 0.2, "mixup": 0.2}
    return build_dataset(
        load_data_config(file),
        "train",
        LoadOptions(imgsz=(32, 32), augment=True, hyp=hyp, **options),
    )


@pytest.mark.parametrize(("is_weighted", "share"), [(True, 0.5), (False, 0.1)])
def test_partners_of_mosaics_are_drawn_as_the_images_are(lopsided, is_weighted, share):
    """What the network gets: of the objects half are of the rare class, not only of the first picture."""
    dataset = dataset_of(lopsided, image_weights=is_weighted)
    loader = build_loader(dataset, 25, workers=0, shuffle=True)
    labels = []
    for epoch in range(12):
        loader.set_epoch(epoch)
        labels += [batch.targets.labels for batch in loader]
    rare = np.concatenate(labels).mean()
    assert rare == pytest.approx(share, abs=0.06)


def test_backgrounds_come_as_often_as_they_stand_in_the_data(lopsided):
    dataset = dataset_of(lopsided, image_weights=True)
    sampler = build_loader(dataset, 5, workers=0, shuffle=True).sampler
    drawn = []
    for epoch in range(60):
        sampler.set_epoch(epoch)
        drawn += [index for _, index in sampler]
    assert np.mean(np.array(drawn) >= 20) == pytest.approx(5 / 25, abs=0.03)
    assert np.mean(np.isin(drawn, (18, 19))) == pytest.approx(0.4, abs=0.04)
    assert (dataset.weights.chances > 0).all()


def test_validation_is_never_drawn_by_weights(lopsided):
    dataset = dataset_of(lopsided, image_weights=True)
    assert build_loader(dataset, 5, workers=0).sampler.image_weights is None


def test_weights_and_rect_batches_exclude_each_other(lopsided):
    with pytest.raises(DatasetError, match="--image-weights: cannot be used with --rect"):
        dataset_of(lopsided, image_weights=True, rect=True)
