"""What is wrong with a pasted file is told in one line: the file, the row, what was got and what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import NamedTuple

import pytest

from models import modules, yolo
from utils.errors import ConfigError

RIGHT = """import torch
import torch.nn as nn


class Mine(nn.Module):
    def __init__(self, c1, reduction=16):
        super().__init__()
        self.conv = nn.Conv2d(c1, c1, 3, padding=1)

    def forward(self, x):
        return self.conv(x)
"""
CONFIG = """nc: 3
imports: [{file}]
backbone:
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - {row}
  - [[2, 4], 1, Detect, [nc]]
"""
ROW = "[-1, 1, Mine, [64]]"
AT_ROW = "mine.yaml head[0] (line 9) "
AT_FILE = "mine.yaml imports: mine.py cannot be imported - "
RETURN = "return self.conv(x)"


class Wrong(NamedTuple):
    """A mistake: what takes the place of `old` in `RIGHT`, the row, and parts of the line that tells it."""

    old: str
    new: str
    told: tuple[str, ...]
    row: str = ROW


WRONG = {
    "an import that is missing": Wrong(
        "import torch.nn as nn\n", "", (AT_FILE, "name 'nn' is not defined", "line 4")
    ),
    "an import that forward misses": Wrong(
        RETURN,
        "return F.relu(self.conv(x))",
        (AT_ROW, "name 'F' is not defined (mine.py line 11)", "import torch.nn.functional as F"),
    ),
    "another width than the map's": Wrong(
        "nn.Conv2d(c1, c1,",
        "nn.Conv2d(128, 128,",
        (AT_ROW, "to have 128 channels, but got 64 channels", "mine.py line 11"),
    ),
    "a dictionary": Wrong(
        RETURN, "return {'out': self.conv(x)}", (AT_ROW, "dictionary", "Return the map itself")
    ),
    "nothing returned": Wrong(
        RETURN, "self.conv(x)", (AT_ROW, "returns NoneType", "Return one map")
    ),
    "a map and a vector": Wrong(
        RETURN,
        "y = self.conv(x)\n        return y, y.mean((2, 3))",
        (AT_ROW, "(64x4x4, 64)", "Return one map"),
    ),
    "a vector": Wrong(RETURN, "return self.conv(x).mean((2, 3))", (AT_ROW, "Return one map")),
    "a parameter changed in place": Wrong(
        RETURN,
        "self.conv.bias += 1\n        return self.conv(x)",
        (AT_ROW, "in-place", "mine.py line 11", "write `y = x * self.scale`"),
    ),
    "what is used again changed in place": Wrong(
        RETURN,
        "y = self.conv(x).relu_()\n        return y + y.sigmoid_()",
        (AT_ROW, "inplace operation", "Write `x = x + y` for `x += y`"),
    ),
    "a syntax error": Wrong("(self, x):", "(self, x)", (AT_FILE, "expected ':'", "line 10")),
    "tabs among spaces": Wrong("        return", "\treturn", (AT_FILE, "TabError", "line 11")),
    "two classes, and a row that names their file": Wrong(
        "import torch\n",
        "import torch\nfrom torch.nn import Conv2d\n\n\nclass Other(Conv2d):\n    pass\n\n\n",
        (AT_ROW, "mine", "Other", "mine.Mine"),
        "[-1, 1, mine, [64]]",
    ),
    "a name that is misspelt": Wrong(
        "", "", (AT_ROW, "unknown layer 'Mime'", "Did you mean 'Mine'?"), "[-1, 1, Mime, [64]]"
    ),
    "no super().__init__()": Wrong(
        "        super().__init__()\n",
        "",
        (AT_ROW, "mine.py line 7", "Write super().__init__() first"),
    ),
    "no nn.Module": Wrong("nn.Module", "object", (AT_ROW, "expected a torch.nn.Module")),
    "a keyword that is misspelt": Wrong(
        "",
        "",
        (AT_ROW, "reductoin", "Did you mean 'reduction'?"),
        "[-1, 1, Mine, [64, {reductoin: 8}]]",
    ),
    "too many arguments": Wrong(
        "",
        "",
        (AT_ROW, "[64, 16, 3, 1]", "Mine(c1, reduction=16)", "{reduction: ...}"),
        "[-1, 1, Mine, [64, 16, 3, 1]]",
    ),
    "an argument without a default that no row says": Wrong(
        "reduction=16", "k_size", (AT_ROW, "k_size", "Mine(c1, k_size)")
    ),
    "a default that does not divide the width": Wrong(
        "reduction=16):\n        super().__init__()",
        "heads=7):\n        super().__init__()\n        assert c1 % heads == 0, f'{c1} % {heads} is not 0'",
        (AT_ROW, "64 % 7 is not 0", "mine.py line 8"),
    ),
    "a layer that we do not have": Wrong(
        "import torch\n",
        "import torch\nfrom models.common import SpinConv\n",
        (AT_FILE, "SpinConv", "line 2", "Paste its class into the file"),
    ),
    "a part of the file left behind": Wrong(
        "import torch\n",
        "import torch\nfrom .parts import Gate\n",
        (
            AT_FILE,
            "line 2: from .parts import Gate",
            "no parts.py lies beside mine.py",
            "Put the file there",
        ),
    ),
    "a library that is not there": Wrong(
        "import torch\n",
        "import torch\nimport no_such_library\n",
        (AT_FILE, "no_such_library", "line 2"),
    ),
    "a device": Wrong(
        "padding=1)", "padding=1).to('cuda')", (AT_ROW, "mine.py line 8", "--device")
    ),
    "a forward of two maps in a row of one": Wrong(
        "(self, x)", "(self, x, y)", (AT_ROW, "'y'", "[[-1, 6], ...]")
    ),
    "a convolution that loses the border": Wrong(
        ", padding=1", "", (AT_ROW, "6x6 for one of 8x8", "padding"), "[2, 1, Mine, [64]]"
    ),
    "no forward": Wrong("def forward", "def foward", (AT_ROW, "Define forward(self, x)")),
    "an attribute that is misspelt": Wrong(
        RETURN, "return self.cnov(x)", (AT_ROW, "'cnov'", "mine.py line 11", "Did you mean 'conv'?")
    ),
    "a size that is written down": Wrong(
        RETURN,
        "return self.conv(x).view(16, 64, 8, 8)",
        (AT_ROW, "[16, 64, 8, 8]", "mine.py line 11"),
    ),
    "a configuration object": Wrong(
        "c1, reduction=16):\n",
        "config):\n        c1 = config.width\n",
        (AT_ROW, "Mine(config=64)", "mine.py line 7"),
    ),
    "a script that ends at once": Wrong(
        "class Mine", "raise SystemExit(0)\n\n\nclass Mine", (AT_FILE, "SystemExit", "line 5")
    ),
}


@pytest.fixture
def pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Wrong], Path]:
    """Write `mine.py` with a mistake and the YAML that names it."""
    monkeypatch.setattr(modules, "_FILES", dict(modules._FILES))

    def write(wrong: Wrong) -> Path:
        assert wrong.old in RIGHT
        text = RIGHT.replace(wrong.old, wrong.new, 1) if wrong.old else RIGHT
        (tmp_path / "mine.py").write_text(text)
        file = tmp_path / "mine.yaml"
        file.write_text(CONFIG.format(file="mine.py", row=wrong.row))
        return file

    return write


def test_the_file_behind_the_mistakes_is_right(
    pasted: Callable[[Wrong], Path], capsys: pytest.CaptureFixture[str]
):
    yolo.main(
        [
            "--cfg",
            str(pasted(Wrong("", "", (), "[-1, 1, Mine, []]"))),
            "--imgsz",
            "64",
            "--allow-code",
        ]
    )
    captured = capsys.readouterr()
    assert "Mine(c1=64, reduction=16)" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_paste_is_one_line_that_says_where_and_what_to_write(
    mistake: str, pasted: Callable[[Wrong], Path]
):
    file = pasted(WRONG[mistake])
    with pytest.raises(ConfigError) as caught:
        yolo.main(["--cfg", str(file), "--imgsz", "64", "--allow-code"])
    line = str(caught.value).replace(f"{file.parent}/", "")
    assert "\n" not in line and line.startswith(WRONG[mistake].told[0])
    assert not [part for part in WRONG[mistake].told if part not in line], line
    assert len(line) < 500 and not line.endswith("..")


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["a syntax error", "a dictionary"])
@pytest.mark.parametrize("script", ["models/yolo.py", "train.py"])
def test_the_scripts_end_with_code_2_and_that_line(
    script: str,
    mistake: str,
    pasted: Callable[[Wrong], Path],
    run_script: Callable[..., CompletedProcess[str]],
):
    done = run_script(script, "--cfg", pasted(WRONG[mistake]), "--imgsz", 64, "--allow-code")
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and WRONG[mistake].told[1] in errors[0]
    assert "Traceback" not in done.stderr
