"""What older versions of torch lack, for the tests of it."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn

from deploy.runtimes.program_file import reads_programs

HAS_BOTH = "dynamo" in inspect.signature(torch.onnx.export).parameters
needs_both = pytest.mark.skipif(
    not HAS_BOTH, reason=f"torch {torch.__version__} writes no ONNX of programs, 2.5 does"
)
NO_PROGRAMS = f"torch {torch.__version__} packs .pt2 in an earlier form, 2.14 in the one read here"
needs_programs = pytest.mark.skipif(not reads_programs(), reason=NO_PROGRAMS)


def onnx_by_tracing(model: nn.Module, images: Tensor, path: str, **how: object) -> None:
    """Write an ONNX file by tracing."""
    chosen = {"dynamo": False} if HAS_BOTH else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # as in deploy.exporters.onnx_file
        torch.onnx.export(model, (images,), path, **how, **chosen)
