"""The openvino package without its telemetry: it would tell a server of every conversion and of the operations in it."""

from __future__ import annotations

import sys
from typing import Any


def import_openvino() -> Any:
    """The package; it takes its own silent stand-in for a telemetry module that cannot be imported.

    Raises:
        ImportError: openvino is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
