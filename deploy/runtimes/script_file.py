"""Reading a TorchScript file, whose format and library torch is giving up.

`torch.jit` offers no documented way to the operations and arguments of a loaded network; the graphs and
schemas that this file looks into were seen in torch 2.14, and nothing else rests on them.
"""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from deploy.runtimes.artifact import loading
from deploy.runtimes.metadata import GraphInput
from deploy.runtimes.program_file import FILE_CALLS
from utils.errors import CheckpointError

MOST_CODE = 1 << 26  # bytes
TRAPS = re.compile(rb"\b(?:%s)\s*\(" % "|".join(sorted(FILE_CALLS)).encode())


class Script(NamedTuple):
    """A network, what it takes, and the extra file beside it."""

    network: torch.jit.ScriptModule
    inputs: list[GraphInput]
    text: str


def read_script(path: Path, extra: str, device: torch.device) -> Script:
    """The network in `path`, on `device`, with its extra file called `extra`.

    Raises:
        CheckpointError: damaged, or with more than a network.
    """
    files = {extra: ""}
    with loading(path), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate the format
        if fault := _fault(path):
            raise CheckpointError(
                f"{path}: cannot be loaded - {fault}. Expected a file that export.py wrote."
            )
        network = torch.jit.load(str(path), map_location=device, _extra_files=files)
        arguments = network.forward.schema.arguments[1:]
        move_constants(network, device)
    text = files[extra]  # which torch leaves as bytes
    inputs = [GraphInput(a.name, None, str(a.type)) for a in arguments]
    return Script(network, inputs, text.decode() if isinstance(text, bytes) else text)


def _fault(path: Path) -> str:
    """What a file holds beside a network: loading one runs code of its own language, which can open files by name."""
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
        if sum(item.file_size for item in parts) > path.stat().st_size + MOST_CODE:
            return "its parts claim far more bytes than it has"  # only code is compressed
        for item in parts:
            if item.filename.endswith(".py") and (found := TRAPS.search(archive.read(item))):
                return f"it calls {found.group().decode('ascii', 'replace')!r}"
    return ""


def move_constants(network: torch.jit.ScriptModule, device: torch.device) -> None:
    """Let a traced network make its grids on `device`: tracing wrote down the one it ran on."""
    for module in network.modules():
        try:
            graph = module.forward.graph  # type: ignore[attr-defined]
        except (AttributeError, RuntimeError):  # a module without code
            continue
        for node in graph.findAllNodes("prim::Constant"):
            if str(node.output().type()) == "Device":
                node.s_("value", str(device))
