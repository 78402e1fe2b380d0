"""The console logger, results.csv, the progress bar."""

import io
import logging
import sys
from pathlib import Path

import pytest

from utils.logger import CsvLogger, TensorBoardLogger, get_logger, results_columns
from utils.progress import Progress, format_seconds, train_status

COLUMNS = results_columns(["box", "cls"])


def test_columns_are_those_that_tools_look_for() -> None:
    assert ",".join(COLUMNS) == (
        "epoch,time,train/box_loss,train/cls_loss,metrics/precision,metrics/recall,metrics/mAP_0.5,"
        "metrics/mAP_0.5:0.95,val/box_loss,val/cls_loss,lr/pg0,lr/pg1,lr/pg2"
    )


def test_rows_are_appended_and_missing_cells_stay_empty(tmp_path: Path) -> None:
    log = CsvLogger(tmp_path / "run" / "results.csv", ["epoch", "a", "b"])
    log.write({"epoch": 0, "a": 0.123456789})
    log.write({"epoch": 1, "b": 2.0})
    assert log.path.read_text() == "epoch,a,b\n0,0.123457,\n1,,2\n"
    with pytest.raises(ValueError, match=r"unknown columns \['c'\]"):
        log.write({"c": 1})


def test_resuming_drops_the_epochs_that_run_again_and_a_torn_row(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    path.write_text("epoch,a,b\n0,1,2\n1,3,4\n2,5,6\n3,7")
    log = CsvLogger(path, ["epoch", "a", "b"], start_epoch=2)
    log.write({"epoch": 2, "a": 9, "b": 9})
    assert path.read_text() == "epoch,a,b\n0,1,2\n1,3,4\n2,9,9\n"
    CsvLogger(path, ["epoch", "a", "b"])
    assert path.read_text() == "epoch,a,b\n"


def test_the_logger_leaves_the_root_logger_alone(capsys) -> None:
    before = list(logging.getLogger().handlers)
    get_logger().info("hello")
    get_logger().warning("careful")
    assert logging.getLogger().handlers == before
    assert get_logger() is get_logger()
    ours = [h for h in get_logger().handlers if h.__class__.__name__ == "_StderrHandler"]
    assert len(ours) == 1
    printed = capsys.readouterr()
    assert printed.err == "hello\nwarning: careful\n"
    assert printed.out == ""


def test_ranks_above_zero_tell_warnings_only(capsys) -> None:
    get_logger(rank=1).info("hidden")
    get_logger().warning("seen")
    get_logger(rank=0).info("seen too")
    assert capsys.readouterr().err == "warning: seen\nseen too\n"


def test_a_missing_tensorboard_is_said_in_one_line(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    log = TensorBoardLogger(tmp_path)
    log.scalars({"a": 1.0}, 0)
    log.close()
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_events_are_written_where_tensorboard_is_there(tmp_path: Path) -> None:
    pytest.importorskip("torch.utils.tensorboard")
    log = TensorBoardLogger(tmp_path)
    log.scalars({"metrics/mAP_0.5": 0.5}, 0)
    log.close()
    assert [p.name for p in tmp_path.glob("events.out.tfevents*")]
    TensorBoardLogger(tmp_path / "off", enabled=False).close()
    assert not (tmp_path / "off").exists()


def test_a_pipe_gets_a_few_plain_lines() -> None:
    stream, ticks = io.StringIO(), iter(range(100))
    bar = Progress(range(8), 8, "epoch 1/3", stream=stream, clock=lambda: float(next(ticks)))
    seen = []
    for item in bar:
        bar.status(train_status({"box": 0.05}, item, (64, 96), 0.5))
        seen.append(item)
    lines = stream.getvalue().splitlines()
    assert seen == list(range(8))
    assert len(lines) == 4
    expected = "epoch 1/3 2/8 box 0.05 instances 1 size 64x96 memory 0.50G [0:01<0:03]"
    assert lines[0] == expected


def test_a_terminal_gets_one_bar_with_everything_in_it() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    bar = Progress(range(3), 3, "val", stream=stream)
    for _ in bar:
        bar.status("instances 5")
    last = stream.getvalue().split("\r")[-1]
    assert last.startswith("val")
    assert "3/3, instances 5" in last


def test_a_disabled_bar_writes_nothing() -> None:
    stream = io.StringIO()
    assert list(Progress([1, 2], 2, "x", enabled=False, stream=stream)) == [1, 2]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(("seconds", "text"), [(7, "0:07"), (754, "12:34"), (3723, "1:02:03")])
def test_seconds_read_like_a_clock(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text
