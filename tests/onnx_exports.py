"""torch's two ONNX exporters, in versions of torch that have both or the one by tracing alone."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor, nn

HAS_BOTH = "dynamo" in inspect.signature(torch.onnx.export).parameters
needs_both = pytest.mark.skipif(
    not HAS_BOTH, reason=f"torch {torch.__version__} writes no ONNX of programs, 2.5 does"
)


def onnx_by_tracing(model: nn.Module, images: Tensor, path: str, **how: object) -> None:
    """Write an ONNX file by tracing."""
    chosen = {"dynamo": False} if HAS_BOTH else {}
    torch.onnx.export(model, (images,), path, **how, **chosen)
