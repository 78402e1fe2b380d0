"""COCO mAP against pycocotools on the same predictions, curves and confusion by hand."""

import contextlib
import copy
import io
import json
from typing import Any

import numpy as np
import pytest
import torch

from utils.matching import Objects, match, matrices_of, pair_up
from utils.metrics import CocoEvaluator, ConfusionMatrix
from utils.structures import Detections


def annotation(image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    area = box[2] * box[3]
    return {
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": area,
        "iscrowd": 0,
        **more,
    }


def dataset(images: int, categories: list[int], annotations: list[dict]) -> dict[str, Any]:
    for number, item in enumerate(annotations, start=1):
        item.setdefault("id", number)
    return {
        "images": [{"id": i, "height": 200, "width": 200} for i in range(1, images + 1)],
        "annotations": annotations,
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }


def found(*rows: tuple[list[float], float, int]) -> Detections:
    """Rows of (xyxy, score, class index)."""
    boxes = torch.tensor([row[0] for row in rows], dtype=torch.float32).reshape(-1, 4)
    scores = torch.tensor([row[1] for row in rows], dtype=torch.float32)
    return Detections(boxes, scores, torch.tensor([row[2] for row in rows], dtype=torch.int64))


def pycocotools_stats(truth: dict[str, Any], results: list[dict[str, Any]]) -> np.ndarray:
    coco_module = pytest.importorskip("pycocotools.coco")
    eval_module = pytest.importorskip("pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        if results:
            loaded = coco.loadRes(json.loads(json.dumps(results)))
        else:
            loaded = coco_module.COCO()
            loaded.dataset = {**copy.deepcopy(truth), "annotations": []}
            loaded.createIndex()
        evaluation = eval_module.COCOeval(coco, loaded, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats


def random_case(seed: int, *, images=12, classes=3, objects=6, extra=20, **options: Any):
    """A made-up data set and detections: jittered objects, doubles, and boxes out of the air."""
    rng = np.random.default_rng(seed)
    categories = list(range(1, 2 * classes, 2))
    annotations, outputs = [], []
    for image in range(1, images + 1):
        rows = []
        count = 0 if image % 5 == 0 else int(rng.integers(1, objects + 1))
        for _ in range(count):
            size = rng.choice([12, 40, 120]) * rng.uniform(0.8, 1.2, 2)
            corner = rng.uniform(0, 80, 2)
            c = int(rng.integers(classes))
            more: dict[str, Any] = {}
            if options.get("crowd") and rng.random() < 0.3:
                more["iscrowd"] = 1
            if options.get("ignore"):
                more["ignore"] = int(rng.random() < 0.5)
            if options.get("area"):
                more["area"] = float(size.prod() * rng.uniform(0.3, 0.9))
            annotations.append(annotation(image, categories[c], [*corner, *size], **more))
            for _ in range(int(rng.integers(0, 3))):
                noise = rng.normal(0, 0.06, 4) * np.tile(size, 2)
                box = np.concatenate((corner, corner + size)) + noise
                c_seen = c if rng.random() < 0.9 else int(rng.integers(classes))
                rows.append((box.tolist(), round(float(rng.uniform(0, 1)), 2), c_seen))
        for _ in range(extra):
            corner, size = rng.uniform(0, 150, 2), rng.uniform(5, 50, 2)
            box = [*corner.tolist(), *(corner + size).tolist()]
            rows.append((box, round(float(rng.uniform(0, 0.7)), 2), int(rng.integers(classes))))
        outputs.append(found(*rows))
    return dataset(images, categories, annotations), categories, outputs


CASES = {
    "plain": {},
    "crowd": {"crowd": True},
    "ignore": {"ignore": True, "crowd": True},
    "area of the file": {"area": True},
    "many detections": {"images": 3, "classes": 1, "extra": 300},
    "many classes": {"classes": 40, "objects": 12},
}


@pytest.mark.parametrize("case", CASES)
def test_all_twelve_numbers_are_those_of_pycocotools(case: str, capfd) -> None:
    truth, categories, outputs = random_case(len(case), **CASES[case])
    untouched = copy.deepcopy(truth)
    evaluator = CocoEvaluator(truth, categories, [f"c{c}" for c in categories])
    evaluator.process(range(1, len(outputs) + 1), outputs)
    metrics = evaluator.evaluate()
    printed = capfd.readouterr()
    assert printed.out == printed.err == ""
    assert truth == untouched
    expected = pycocotools_stats(truth, evaluator.predictions())
    assert len(metrics.stats) == 12
    np.testing.assert_allclose(metrics.stats, expected, atol=1e-6)
    assert 0 < metrics.map50_95 < 1, "the case must not be trivial"
    assert metrics.stats[:2] == metrics[:2]
    means = [row.map50_95 for row in metrics.per_class if row.map50_95 >= 0]
    assert np.mean(means) == pytest.approx(metrics.map50_95, abs=1e-9)
    means = [row.map50 for row in metrics.per_class if row.map50 >= 0]
    assert np.mean(means) == pytest.approx(metrics.map50, abs=1e-9)


def test_recall_at_confidence_zero_is_cocos_recall_at_half() -> None:
    truth, categories, outputs = random_case(3, crowd=True, extra=150)
    evaluator = CocoEvaluator(truth, categories, ["a", "b", "c"])
    evaluator.process(range(1, len(outputs) + 1), outputs)
    curves = evaluator.evaluate().curves
    eval_module = pytest.importorskip("pycocotools.cocoeval")
    coco_module = pytest.importorskip("pycocotools.coco")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = coco_module.COCO()
        coco.dataset = copy.deepcopy(truth)
        coco.createIndex()
        evaluation = eval_module.COCOeval(coco, coco.loadRes(evaluator.predictions()), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    np.testing.assert_allclose(curves.recall[:, 0], evaluation.eval["recall"][0, :, 0, -1])


def test_no_predictions_is_zero_and_no_ground_truth_is_undefined() -> None:
    truth = dataset(2, [7], [annotation(1, 7, [0, 0, 50, 50])])
    evaluator = CocoEvaluator(truth, [7], ["thing"])
    metrics = evaluator.evaluate()
    np.testing.assert_allclose(metrics.stats, pycocotools_stats(truth, []), atol=1e-6)
    assert metrics.map50_95 == metrics.precision == metrics.recall == metrics.fitness == 0
    assert metrics.stats[3] == -1

    empty = dataset(2, [7], [])
    evaluator = CocoEvaluator(empty, [7], ["thing"])
    evaluator.process([1], [found(([0, 0, 10, 10], 0.9, 0))])
    metrics = evaluator.evaluate()
    np.testing.assert_allclose(metrics.stats, pycocotools_stats(empty, evaluator.predictions()))
    assert metrics.map50_95 == metrics.precision == -1
    assert metrics.fitness == 0
    assert metrics.per_class[0].instances == 0


def test_precision_and_recall_at_the_best_f1_by_hand() -> None:
    truth = dataset(
        2,
        [1, 2],
        [
            annotation(1, 1, [0, 0, 10, 10]),
            annotation(1, 1, [50, 50, 10, 10]),
            annotation(2, 1, [0, 0, 10, 10]),
        ],
    )
    evaluator = CocoEvaluator(truth, [1, 2], ["cat", "dog"])
    evaluator.process(
        [1, 2],
        [
            found(([0, 0, 10, 10], 0.9, 0), ([50, 50, 60, 61], 0.6, 0), ([90, 90, 99, 99], 0.3, 0)),
            found(([30, 30, 40, 40], 0.7, 0)),
        ],
    )
    metrics = evaluator.evaluate()
    # from 0.3: 2 of 4, F1 4/7; above it 2 of 3, F1 2/3; above 0.6 1 of 2, F1 2/5; above 0.7 1/2
    assert metrics.precision == pytest.approx(2 / 3)
    assert metrics.recall == pytest.approx(2 / 3)
    assert metrics.f1 == pytest.approx(2 / 3)
    assert metrics.confidence == pytest.approx(0.3003, abs=1e-4)
    cat, dog = metrics.per_class
    assert (cat.images, cat.instances, metrics.instances, metrics.images) == (2, 3, 3, 2)
    # recall 1/3 at precision 1, recall 2/3 at precision 2/3: 34 and 33 of 101 points
    assert cat.map50 == pytest.approx((34 * 1 + 33 * 2 / 3) / 101)
    assert (dog.instances, dog.precision, dog.map50) == (0, -1, -1)
    assert metrics.curves.names == ("cat",)
    assert metrics.fitness == pytest.approx(0.1 * metrics.map50 + 0.9 * metrics.map50_95)


def test_predictions_are_coco_results_with_category_ids() -> None:
    evaluator = CocoEvaluator(dataset(1, [3, 9], []), [3, 9], ["a", "b"])
    evaluator.process([1], [found(([1, 2, 4, 8], 0.5, 1))])
    expected = {"image_id": 1, "category_id": 9, "bbox": [1, 2, 3, 6], "score": 0.5}
    assert evaluator.predictions() == [expected]
    evaluator.reset()
    assert evaluator.predictions() == []


def test_an_annotation_with_id_zero_can_be_found() -> None:
    truth = dataset(1, [1], [annotation(1, 1, [0, 0, 50, 50], id=0)])
    evaluator = CocoEvaluator(truth, [1], ["a"])
    evaluator.process([1], [found(([0, 0, 50, 50], 0.9, 0))])
    assert evaluator.evaluate().map50_95 == pytest.approx(1)


def test_area_and_iscrowd_may_be_missing() -> None:
    item = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 50, 50]}
    evaluator = CocoEvaluator(dataset(1, [1], [item]), [1], ["a"])
    evaluator.process([1], [found(([0, 0, 50, 50], 0.9, 0))])
    assert evaluator.evaluate().stats[4] == pytest.approx(1)


def test_area_and_iscrowd_may_be_null() -> None:
    item = annotation(1, 1, [0, 0, 50, 50], area=None, iscrowd=None)
    evaluator = CocoEvaluator(dataset(1, [1], [item]), [1], ["a"])
    evaluator.process([1], [found(([0, 0, 50, 50], 0.9, 0))])
    assert evaluator.evaluate().stats[4] == pytest.approx(1)


@pytest.mark.parametrize("first", [-5, 2**60, 2**63 - 2])
def test_image_ids_of_any_size_are_told_apart(first: int) -> None:
    """Neighbours of this size are one number in floating point; one of the two objects is found."""
    truth = dataset(2, [1], [annotation(first + k, 1, [0, 50 * k, 50, 50]) for k in (0, 1)])
    truth["images"] = [{"id": first + k} for k in (1, 0)]
    evaluator = CocoEvaluator(truth, [1], ["a"])
    evaluator.process([first, first + 1], [found(), found(([0, 50, 50, 100], 0.9, 0))])
    assert evaluator.evaluate().map50_95 == pytest.approx(51 / 101)
    assert [row["image_id"] for row in evaluator.predictions()] == [first + 1]
    with pytest.raises(ValueError, match=f"image id {first + 2}"):
        evaluator.process([first + 2], [found()])


def test_merged_processes_give_what_one_process_gives() -> None:
    truth, categories, outputs = random_case(5)
    whole, first, second = (CocoEvaluator(truth, categories, ["a", "b", "c"]) for _ in range(3))
    ids = list(range(1, len(outputs) + 1))
    whole.process(ids, outputs)
    first.process(ids[::2], outputs[::2])
    second.process([*ids[1::2], 1], [*outputs[1::2], outputs[0]])  # a sampler's padding repeats one
    first.merge([second.state()])
    assert first.predictions() == whole.predictions()
    assert first.evaluate().stats == whole.evaluate().stats


def test_an_image_outside_the_ground_truth_is_an_error() -> None:
    with pytest.raises(ValueError, match="image id 5"):
        CocoEvaluator(dataset(1, [1], []), [1], ["a"]).process([5], [found()])


def test_matching_prefers_objects_to_crowds_and_takes_each_object_once() -> None:
    truth = np.array([[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 10, 10.0]])
    boxes = np.array(
        [[0, 0, 10, 10], [0, 0, 10, 10], [20, 0, 10, 10], [20, 0, 10, 10], [0, 0, 4, 4.0]]
    )
    objects = Objects(np.array([7, 7, 7]), truth, np.array([True, False, False]))
    pairs = pair_up(np.full(5, 7), boxes, objects, limit=5)
    # the last lies wholly inside the crowd: its own area is the divisor
    assert match(pairs, objects.is_crowd).tolist() == [1, -1, 1, 0, -1]


def test_detections_stand_beside_the_objects_of_their_group_and_only_the_best_count() -> None:
    """By hand: groups 3, 5, 3, 4 of detections, 3 and 5 with 2 and 1 objects; 12 of 20 are shared with the moved one."""
    box = [0, 0, 4, 4.0]
    truth = np.array([box, [1, 0, 4, 4], box])
    objects = Objects(np.array([3, 3, 5]), truth, np.zeros(3, bool))
    groups = np.array([3, 5, 3, 4])
    pairs = pair_up(groups, np.array([box] * 4), objects, limit=1)
    assert pairs.detections.tolist() == [0, 3, 1] and pairs.counts.tolist() == [2, 0, 1]
    found = matrices_of(pairs)
    assert {group: matrix.tolist() for group, matrix in found.items()} == {3: [[1, 0.6]], 5: [[1]]}


def test_of_two_objects_that_overlap_alike_the_later_one_is_found() -> None:
    """So the second box, which overlaps the earlier object alone, finds that one."""
    truth = np.array([[0, 0, 10, 10], [2, 0, 10, 10.0]])
    objects = Objects(np.array([7, 7]), truth, np.zeros(2, bool))
    boxes = np.array([[1, 0, 10, 10], [-3, 0, 10, 10.0]])
    pairs = pair_up(np.array([7, 7]), boxes, objects, limit=2)
    assert match(pairs, objects.is_crowd).tolist() == [1, 1]


def test_confusion_matrix_by_hand() -> None:
    matrix = ConfusionMatrix(2)
    detections = found(
        ([0, 0, 10, 10], 0.9, 0),  # right
        ([20, 0, 30, 10], 0.8, 1),  # the place is right, the class is not
        ([0, 0, 10, 9], 0.95, 1),  # surer, but it overlaps the first object less
        ([70, 70, 80, 80], 0.2, 1),  # too unsure to count
    )
    labels = torch.tensor([0, 0, 1])
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [50, 50, 60, 60]])
    matrix.update(detections, labels, boxes)
    assert matrix.matrix.tolist() == [[1, 0, 0], [1, 0, 1], [0, 1, 0]]
    matrix.update(found(), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 4))
    matrix.update(found(([0, 0, 5, 5], 0.9, 1)), labels[:0], boxes[:0])
    assert matrix.matrix[1, 2] == 2
