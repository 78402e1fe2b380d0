"""What pasted files import: our layers under other projects' names, old paths, CUDA extensions, the one line for the rest."""

from __future__ import annotations

import builtins
import collections
import importlib
import importlib.util
import math
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy
import pytest
import torch
from pasted_files import run as run
from torch import nn

from models import common, registry
from models.blocks import csp, layers, rep
from models.pasted import deformable
from models.pasted.imports import PastedImportError, pasted_imports
from utils import boxes
from utils.errors import ForeignError, foreign_code
from utils.logger import get_logger


def line_of(run, text: str) -> str:
    with pytest.raises(ImportError) as caught:
        run(text)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("from models.common import Conv as found", common.Conv),
        ("from models.common import C2f as found", csp.C2f),
        ("from models.experimental import DWConv as found", common.DWConv),
        ("from models.yolo import Concat as found", common.Concat),
        ("from models import Conv as found", common.Conv),
        ("from ultralytics.nn.modules import C3k2 as found", csp.C3k2),
        ("from ultralytics.nn.modules.conv import autopad as found", common.autopad),
        ("from ultralytics.nn.modules.block import Bottleneck as found", common.Bottleneck),
        ("from ultralytics.nn.extra_modules.block import SPPF as found", common.SPPF),
        ("from ultralytics.nn.tasks import C3 as found", common.C3),
        ("from yolov5.models.common import Focus as found", common.Focus),
        ("from .conv import Conv as found", common.Conv),
        ("from ..modules.conv import GhostConv as found", common.GhostConv),
        ("from ..modules.block import C2f as found", csp.C2f),
        ("from .common import SPP as found", common.SPP),
        ("from .block import RepC3 as found", rep.RepC3),
        ("from models.common import RepConvN as found", rep.RepConvN),
        ("from ...utils.ops import xywh2xyxy as found", boxes.cxcywh_to_xyxy),
        ("from . import conv\nfound = conv.Conv", common.Conv),
        ("from ultralytics.nn import modules\nfound = modules.C2f", csp.C2f),
        ("import ultralytics.nn.modules as m\nfound = m.C2f", csp.C2f),
        ("import ultralytics.nn.modules\nfound = ultralytics.nn.modules.C2f", csp.C2f),
        ("import models.common as m\nfound = m.C2f", csp.C2f),
        ("import models.common\nfound = models.common.C2f", csp.C2f),
        ("from models.common import *\nfound = C2f", csp.C2f),
        ("from models.common import *\nfound = nn", nn),
        ("from models.common import *\nfound = math", math),
        ("from .block import *\nfound = C3k2", csp.C3k2),
        ("from utils.general import LOGGER as found", get_logger()),
        ("from ultralytics.utils import LOGGER as found", get_logger()),
        ("from utils.metrics import box_iou as found", boxes.pairwise_iou),
        ("from models.registry import register as found", registry.register),
        ("from models import registry as found", registry),
        ("from utils import boxes as found", boxes),
        ("from utils.boxes import box_area as found", boxes.box_area),
        ("from mmcv.cnn.bricks import DropPath as found", layers.DropPath),
        ("from mmcv.ops.modulated_deform_conv import DeformConv2d as found", deformable.DeformConv2d),
        ("from mmcv.ops import DeformConv2d as found", deformable.DeformConv2d),
        ("from dcn_v2 import DCN as found", deformable.DCN),
        ("from .DCNv2.dcn_v2 import DCN as found", deformable.DCN),
        ("from models.DCNv2.dcn_v2 import DCNv2 as found", deformable.DCNv2),
        ("import torch as found", torch),
        ("import torch.nn as found", nn),
        ("import torch.nn.functional\nfound = torch", torch),
    ],
)  # fmt: skip
def test_a_name_of_another_project_is_ours(run, statement: str, expected: object):
    assert run(statement).found is expected


@pytest.mark.parametrize(
    ("statement", "path"),
    [
        ("from timm.models.layers import DropPath as found", "timm.layers.DropPath"),
        ("from timm.models.layers import trunc_normal_ as found", "timm.layers.trunc_normal_"),
        ("from timm.models.layers.helpers import to_2tuple as found", "timm.layers.to_2tuple"),
        ("from timm.models.layers.weight_init import trunc_normal_ as found", "timm.layers.trunc_normal_"),
        ("import timm.models.layers as m\nfound = m.to_2tuple", "timm.layers.to_2tuple"),
        ("from timm.models.registry import register_model as found", "timm.models.register_model"),
        ("from timm.models.helpers import build_model_with_cfg as found", "timm.models.build_model_with_cfg"),
        ("from timm.models.helpers import named_apply as found", "timm.models.named_apply"),
        ("from .layers import to_2tuple as found", "timm.layers.to_2tuple"),
        ("from .registry import register_model as found", "timm.models.register_model"),
        ("from ._builder import build_model_with_cfg as found", "timm.models.build_model_with_cfg"),
        ("from timm.models.features import FeatureListNet as found", "timm.models._features.FeatureListNet"),
        ("from timm.models.efficientnet_blocks import InvertedResidual as found",
         "timm.models._efficientnet_blocks.InvertedResidual"),
        ("from timm.models.efficientnet_blocks import SqueezeExcite as found",
         "timm.models._efficientnet_blocks.SqueezeExcite"),
        ("from timm.models.efficientnet_builder import round_channels as found",
         "timm.models._efficientnet_builder.round_channels"),
        ("from torchvision.models.utils import load_state_dict_from_url as found", "torch.hub.load_state_dict_from_url"),
        ("from torchvision.ops.misc import interpolate as found", "torch.nn.functional.interpolate"),
        ("from torchvision.ops.misc import FrozenBatchNorm2d as found", "torchvision.ops.misc.FrozenBatchNorm2d"),
        ("from collections import Iterable as found", "collections.abc.Iterable"),
        ("from collections import OrderedDict as found", "collections.OrderedDict"),
        ("import collections\nfound = collections.Sequence", "collections.abc.Sequence"),
        ("from torch._six import container_abcs\nfound = container_abcs.Iterable", "collections.abc.Iterable"),
        ("import numpy as np\nfound = np.float", "builtins.float"),
        ("import numpy as np\nfound = np.sqrt", "numpy.sqrt"),
        ("import numpy.random\nfound = numpy.random", "numpy.random"),
    ],
)  # fmt: skip
def test_an_old_path_leads_to_where_the_name_is_now(
    run, statement: str, path: str, recwarn: pytest.WarningsRecorder
):
    found = run(statement).found
    module, _, name = path.rpartition(".")
    assert found is getattr(importlib.import_module(module), name)
    assert not [w for w in recwarn if "Importing from timm" in str(w.message)]


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        ("from models.common import Foo",
         "x.py line 2: from models.common import Foo - Foo is not known here, expected one of Focus, "),
        ("from models.common import Conv, C2ff",
         "x.py line 2: from models.common import C2ff - C2ff is not known here, expected one of C2f, "),
        ("from ultralytics.nn.modules.conv import GhostCon", "Did you mean 'GhostConv'? Paste its class into the file"),
        ("from ultralytics.utils.ops import make_divisibl", "Did you mean 'make_divisible'? Paste its code into the file"),
        ("from models.registry import registr", "from models.registry import registr - registr is not known here"),
        ("from .conv import Foo, Bar", "from .conv import Foo, Bar - no conv.py lies beside x.py, and Foo, Bar are not"),
        ("from mmcv.cnn import NonLocal2d", "from mmcv.cnn import NonLocal2d - NonLocal2d is not known here"),
        ("from timm.models.layers import DropPth", "Did you mean 'DropPath'?"),
        ("from .mine import Foo", "no mine.py lies beside x.py, and Foo is not known here. Put the file there"),
        ("from .helpers import Foo", "no helpers.py lies beside x.py, and Foo is not known here"),
        ("from .conv import GhostCon", "from .conv import GhostCon - GhostCon is not known here, expected one of GhostConv"),
        ("from ..mine.parts import Foo", "from ..mine.parts import Foo - got a relative import in a file that stands alone"),
        ("import mamba_ssm", "x.py line 2: import mamba_ssm - mamba_ssm is not installed, needs a CUDA extension and has no"),
        ("from mamba_ssm.ops.selective_scan_interface import selective_scan_fn", "mamba_ssm is not installed, needs a CUDA"),
        ("import selective_scan_cuda", "selective_scan_cuda is not installed, needs a CUDA extension"),
        ("import causal_conv1d", "causal_conv1d is not installed, needs a CUDA extension"),
        ("from natten import NeighborhoodAttention2D", "natten is not installed, needs a CUDA extension"),
        ("from flash_attn import flash_attn_func", "flash_attn is not installed, needs a CUDA extension"),
        ("from DCNv4 import DCNv4", "DCNv4 is not installed, needs a CUDA extension"),
        ("import DCNv3", "DCNv3 is not installed, needs a CUDA extension"),
        ("from .ops_dcnv3.modules import DCNv3", "ops_dcnv3 is not installed, needs a CUDA extension"),
        ("from models.ops_dcnv3 import modules", "ops_dcnv3 is not installed, needs a CUDA extension"),
        ("from ultralytics.nn.ops_dcnv3.modules import DCNv3", "ops_dcnv3 is not installed, needs a CUDA extension"),
        ("from mmcv.ops import CARAFEPack", "CARAFEPack needs a CUDA extension and has no equivalent here, expected one of"),
        ("from no_such_library import Foo", "No module named 'no_such_library'"),
        ("from torch.nn import Nothing", "cannot import name 'Nothing' from 'torch.nn'"),
    ],
)  # fmt: skip
def test_what_is_not_known_is_one_line(run, statement: str, told: str):
    message = line_of(run, f"import torch\n{statement}")
    assert told in message
    assert len(message) < 300  # what is longer would be cut


def test_the_line_is_not_followed_by_the_place_once_more(run):
    with pytest.raises(ForeignError) as caught, foreign_code(users=("yoke_import_",)):
        run("from models.common import Foo")
    assert str(caught.value).count("x.py line 1") == 1
    assert str(caught.value).startswith("x.py line 1: from models.common import Foo")


def test_a_file_may_catch_what_is_missing(run):
    text = """
try:
    from mamba_ssm import Mamba
except ModuleNotFoundError:
    Mamba = None
try:
    from models.common import Foo
except ImportError as error:
    reason = error
"""
    module = run(text)
    assert module.Mamba is None
    assert isinstance(module.reason, PastedImportError)


def test_an_import_in_a_function_works_when_the_file_has_long_run(run):
    module = run(
        "import torch\ndef late():\n    from ultralytics.nn.modules import C2f\n    return C2f"
    )
    assert module.late() is csp.C2f


def test_nothing_of_python_is_changed_afterwards(run):
    hook, finders = builtins.__import__, list(sys.meta_path)
    names = {name for name in sys.modules if name.split(".")[0] in ("ultralytics", "mmcv", "torch")}
    run(
        "from ultralytics.nn.modules import C2f\nfrom mmcv.cnn import ConvModule\nimport numpy as np\nnp.float"
    )
    assert builtins.__import__ is hook
    assert sys.meta_path == finders
    assert {n for n in sys.modules if n.split(".")[0] in ("ultralytics", "mmcv", "torch")} == names
    assert not hasattr(numpy, "float") and not hasattr(common, "C2f")
    with pytest.raises(PastedImportError):
        run("from models.common import Foo")
    assert builtins.__import__ is hook


@pytest.mark.parametrize("module", [torch, os, common, importlib])
def test_files_that_are_not_a_users_import_as_they_did(module: ModuleType):
    scope = {"__name__": module.__name__, "__file__": module.__file__}
    with pasted_imports():
        assert builtins.__import__("collections", scope, None, ("Iterable",), 0) is collections
        with pytest.raises(ModuleNotFoundError):
            builtins.__import__("torch._six", scope, None, ("inf",), 0)
    assert "__builtins__" not in scope


def test_a_package_keeps_its_own_files_and_takes_ours_for_the_rest(run, tmp_path: Path):
    folder = tmp_path / "pack"
    folder.mkdir()
    (folder / "conv.py").write_text("class Conv:\n    own = True\n")
    (folder / "part.py").write_text("from .block import C2f\nfrom ..utils.ops import xywh2xyxy\n")
    module = run(
        "from .conv import Conv\nfrom .block import C2f\nfrom .part import C2f as second\n", "pack/__init__.py"
    )  # fmt: skip
    assert module.Conv.own
    assert module.C2f is module.second is csp.C2f


def test_a_name_that_a_packages_own_file_lacks_is_not_filled_with_ours(run, tmp_path: Path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "conv.py").write_text("class Mine:\n    pass\n")
    with pytest.raises(ImportError, match="cannot import name 'Conv' from"):
        run("from .conv import Conv\n", "pack/__init__.py")


def test_what_fails_inside_a_file_that_is_there_is_told_as_it_is(run, tmp_path: Path):
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "conv.py").write_text("import no_such_library\n")
    with pytest.raises(ModuleNotFoundError, match="No module named 'no_such_library'"):
        run("from .conv import Conv\n", "pack/__init__.py")


def test_a_helper_beside_the_file_is_a_pasted_file_too(
    run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "yoke_import_pasted_helper.py").write_text(
        "from ultralytics.nn.modules import C2f\n"
    )
    assert run("from yoke_import_pasted_helper import C2f").C2f is csp.C2f


def test_a_file_beside_it_is_found_by_a_relative_import_before_ours(run, tmp_path: Path):
    (tmp_path / "conv.py").write_text("from .utils import WIDTH\nclass Conv:\n    width = WIDTH\n")
    (tmp_path / "utils.py").write_text("WIDTH = 24\n")
    module = run(
        "from .conv import Conv\ndef late():\n    from .utils import WIDTH\n    return WIDTH\n"
    )
    assert module.Conv.width == module.late() == 24
    (tmp_path / "conv.py").unlink()
    assert run("from .conv import Conv").Conv is common.Conv
    (tmp_path / "broken.py").write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            run("from .broken import Conv")


def test_the_stand_in_of_a_cuda_extension_is_told_once(
    run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("models.pasted.imports._told", set())
    run("from mmcv.ops import ModulatedDeformConv2dPack\nfrom mmcv.ops import DeformConv2d\n")
    told = capsys.readouterr().err.splitlines()
    assert told == [
        "x.py line 1: from mmcv.ops import ModulatedDeformConv2dPack - torchvision's deformable convolution runs in place of "
        "the CUDA extension"
    ]


def test_a_file_that_calls_torchvisions_operators_finds_them_loaded(run):
    text = """
import torch
def kernel():
    return torch.ops.torchvision.deform_conv2d
"""
    assert "deform_conv2d" in str(run(text).kernel())
    assert "torchvision" in sys.modules
