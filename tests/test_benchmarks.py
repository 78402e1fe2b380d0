"""What measurements are made of: weights that count, turns, verdicts, tables."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from tiny_models import HEADS, tiny_model
from torch import nn

from benchmarks import box_losses, export_table, latency, nms_free_latency, turns
from benchmarks.settling import classifiers, settle
from deploy.exporters.network import blobs
from models.yolo import build_model

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


# --- settling --------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", ["yolov5n", "yolo11n", "yolov9-t"])
def test_a_settled_network_tells_images_apart(config: str):
    imgsz = (96, 96)
    torch.manual_seed(0)
    model = build_model(config, num_classes=3, imgsz=imgsz)
    settle(model, imgsz)
    assert not any(module.training for module in model.modules())
    with torch.no_grad():
        decoded = model.decode(model(blobs(2, imgsz, seed=7)))
    for values, least in ((decoded.boxes, 0.01), (decoded.scores, 0.1)):
        assert bool(values.isfinite().all())
        assert (values[0] - values[1]).abs().max() > least * values.abs().max()
    assert decoded.scores.max() > 0.3 and decoded.scores.std() > 0.05


def test_settling_wakes_parts_that_start_at_zero_and_leaves_the_rest():
    model = tiny_model("queries")
    head = model.head
    with torch.no_grad():
        head.dec_bbox_head[0].layers[-1].weight.zero_()
        kept = head.enc_output[0].weight.clone()
    model.scale = nn.Parameter(torch.full((8,), 1e-6))
    settle(model, (64, 96))
    assert head.dec_bbox_head[0].layers[-1].weight.std() > 0.01
    assert bool((model.scale > 0.05).all())
    assert torch.equal(head.enc_output[0].weight, kept)


def test_settling_is_the_same_every_time_and_disturbs_no_other_random_numbers():
    states = []
    for _ in range(2):
        model = tiny_model("channels")
        before = torch.get_rng_state()
        settle(model, (64, 96))
        assert torch.equal(torch.get_rng_state(), before)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


@pytest.mark.parametrize(("layout", "count"), zip(HEADS, (3, 3, 3)))
def test_the_layers_that_give_class_scores_are_found(layout: str, count: int):
    head: Any = tiny_model(layout).head
    found = {id(layer) for layer in classifiers(head)}
    expected = {
        "anchors": lambda: list(head.m),
        "channels": lambda: [tower[-1] for tower in head.cv3],
        "queries": lambda: [head.enc_score_head, *head.dec_score_head],
    }[layout]()
    assert len(expected) == count and {id(layer) for layer in expected} <= found


# --- the export table ------------------------------------------------------------------------------


def result(boxes: float, scores: float, seconds: float) -> dict[str, Any]:
    return {
        "name": "yolov5n onnx", "params": 1872157, "fuse_cpu": 1.0, "cpu": seconds, "wall": 9.0, "megabytes": 7.5,
        "influence": [0.1, 0.2], "cases": [[1, 160, 160, 0.0, 0.0], [5, 128, 224, boxes, scores]],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("boxes", "scores", "seconds", "told"),
    [
        (9e-5, 1e-4, 89, ""),
        (2e-4, 0, 1, "batch 5 at 128x224: boxes 2.0e-04"),
        (0, 2e-4, 1, "scores 2.0e-04"),
        (float("inf"), 0, 1, "boxes inf"),
        (0, 0, 89.5, "90 s of processor time"),
    ],
)
def test_a_verdict_names_what_is_too_far_or_too_slow(
    boxes: float, scores: float, seconds: float, told: str
):
    verdict = export_table.verdict(result(boxes, scores, seconds))
    assert verdict["status"] == ("fails" if told else "works")
    assert told in verdict.get("reason", "")


def test_configs_are_found_by_pattern_and_scale_smallest_first():
    found = export_table.find_configs(["yolov5[ns]", "yolo11", "rtdetr-l"], ["n", "m"])
    assert found == ["yolov5n", "yolo11:n", "yolov5s", "yolo11:m", "rtdetr-l"]


def test_the_export_table_has_a_line_a_result_and_the_reasons_of_failures():
    works = result(1e-6, 2e-6, 3.0)
    works.update(export_table.verdict(works))
    fails = {"name": "yolov5n pt2", "status": "fails", "step": "process", "reason": "took too long"}
    results = {r["name"]: r for r in (works, fails)}
    text = export_table.format_table(results, [*results, "yolov5s onnx"])
    lines = text.splitlines()
    assert len({len(line) for line in lines[:4]}) == 1
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["yolov5n", "onnx", "1.87", "1.0", "3.0", "9.0", "7.5", "1.0e-06", "2.0e-06", "works"]  # fmt: skip
    assert "fails: yolov5n pt2 at process: took too long" in lines
    assert lines[-1] == "1 of 2 work; 3 wanted"


# --- latency ---------------------------------------------------------------------------------------


def test_runs_take_turns_and_the_first_round_is_not_counted(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    clock = iter([0, 100, 0, 200, 0, 1, 0, 20, 0, 3, 0, 40, 0, 2, 0, 90])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    runs = {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}
    found = latency.alternate(runs, 3, pause=0)
    assert calls == ["a", "b"] * 4
    assert found == {"a": 2000, "b": 40000}


def test_the_table_of_runtimes_has_the_ratio_to_pytorch_and_to_the_last():
    times = {"PyTorch": 100.0, "ONNX Runtime": 50.0, "other.onnx": 40.0}
    lines = latency.format_runtimes({1: times}).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells == [
        ["1", "PyTorch", "100.0", "1.00", "2.50"],
        ["1", "ONNX Runtime", "50.0", "0.50", "1.25"],
        ["1", "other.onnx", "40.0", "0.40", "1.00"],
    ]


def test_a_peer_of_another_size_is_refused(tmp_path: Path):
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["x"], ["y"])], "peer",
        [value("x", 1, [1, 3, 64, 64])], [value("y", 1, [1, 3, 64, 64])],
    )  # fmt: skip
    opset = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "peer.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=8), str(path))
    assert latency.peer_run(path, blobs(1, (64, 64), 0), 1)()[0].shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"takes \[1, 3, 64, 64\], expected \[1, 3, 32, 64\]"):
        latency.peer_run(path, blobs(1, (32, 64), 0), 1)


def test_ratios_of_whole_commands_are_taken_pair_by_pair():
    """By hand: 2/1, 4/4 and 3/2 on the clock; processors the other way round."""
    ours = [turns.Taken(2, 1), turns.Taken(4, 4), turns.Taken(3, 2)]
    other = [turns.Taken(1, 2), turns.Taken(4, 4), turns.Taken(2, 3)]
    rows = [line.split("|")[1:-1] for line in turns.table(ours, other).splitlines()[2:]]
    cells = [[cell.strip() for cell in row] for row in rows]
    assert cells[0] == ["wall", "3.00", "2.00", "1.50", "1.00", "2.00"]
    assert cells[1] == ["cpu", "2.00", "3.00", "0.67", "0.50", "1.00"]


def test_the_table_of_forms_has_both_sizes_and_the_ratio(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(latency, "alternate", lambda runs, repeats: {"before": 8.0, "after": 6.0})
    lines = latency.format_forms(latency.measure_forms("yolov9-t", (64, 64), [1], 1)).splitlines()
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    training, deployed = (int(cell.replace(",", "")) for cell in cells[1:3])
    assert cells[0] == "yolov9-t" and deployed < training and float(cells[4]) < float(cells[3])
    assert float(cells[5]) < 1e-9 and cells[6:] == ["1", "8.0", "6.0", "0.75"]


def test_the_picture_that_is_timed_is_fitted(tmp_path: Path):
    cv2.imwrite(str(tmp_path / "a.png"), np.full((40, 80, 3), 255, np.uint8))
    image = nms_free_latency.picture(str(tmp_path / "a.png"), (64, 64))
    assert image.shape == (1, 3, 64, 64) and image[0, :, 32, 32].tolist() == [1.0] * 3
    assert nms_free_latency.picture("", (64, 96)).shape == (1, 3, 64, 96)


# --- box losses ------------------------------------------------------------------------------------


def test_the_epoch_of_highest_fitness_counts(tmp_path: Path):
    """0.1 x 0.9 + 0.9 x 0.2 = 0.27, then 0.6 and 0.3: 0.33, then 0.8 and 0.25: 0.305."""
    path = tmp_path / "results.csv"
    path.write_text(
        "epoch,metrics/mAP_0.5,metrics/mAP_0.5:0.95\n0,0.9,0.2\n1,0.6,0.3\n2,0.8,0.25\n"
    )
    assert box_losses.best_epoch(path) == {"epoch": 2, "map50": 0.6, "map": 0.3}


def test_the_table_of_box_losses_has_means_and_spreads_best_first():
    rows = [("iou 0", 0.5, 0.2), ("giou 0", 0.6, 0.25), ("giou 1", 0.7, 0.35)]
    results: dict[str, Any] = {
        f"yolo11n {name}": {"status": "works", "map50": m50, "map": m, "cpu": 9.0}
        for name, m50, m in rows
    }
    results["yolo11n siou 0"] = {
        "name": "yolo11n siou 0",
        "status": "fails",
        "reason": "took too long",
    }
    lines = box_losses.format_table(results, [*results, "yolo11n wiou 0"]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:4]]
    assert cells == [
        ["yolo11n", "giou", "2", "0.650", "0.300", "0.250 to 0.350", "9"],
        ["yolo11n", "iou", "1", "0.500", "0.200", "-", "9"],
    ]
    assert lines[4:] == ["fails: yolo11n siou 0: took too long"]


SCRIPTS = [
    p.stem for p in sorted(Path(turns.__file__).parent.glob("*.py")) if "__main__" in p.read_text()
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_tells_its_flags(name: str, monkeypatch: pytest.MonkeyPatch, capsys):
    try:
        script = importlib.import_module(f"benchmarks.{name}")
    except ModuleNotFoundError as error:
        pytest.skip(f"needs {error.name}")
    monkeypatch.setattr("sys.argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out
