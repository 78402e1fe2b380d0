"""What the requirements ask for: every package that is imported, and floors that `make oldest` installs as they stand."""

from __future__ import annotations

import ast
import re
import sys

from test_architecture import MODULES, PRODUCT, ROOT, imports_of, parse

CALLED_OTHERWISE = {"cv2": "opencv-python", "PIL": "pillow", "yaml": "pyyaml"}
UNASKED = {"openvino", "optuna", "supervision", "trackers"}
"""For single flags and methods, which say what to install."""
FOR_TYPES = {"_typeshed"}
TOOLS = {"ruff", "mypy", "pre-commit", "types-pyyaml"}  # these look at the code and do not run it
NEW = {"trackers"}  # asks for more than our floors; its tests are skipped where it is not


def lines_of(name: str, sign: str) -> dict[str, str]:
    """Packages of a requirements file, and the versions that stand behind `sign`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return {
        found[1].lower(): found[2] for found in re.finditer(rf"^([\w-]+){sign}(\S+)", text, re.M)
    }


def test_the_oldest_environment_has_the_floors():
    floors = lines_of("requirements.txt", ">=")
    assert {"torch", "pillow", "huggingface_hub"} <= floors.keys()
    tested = {
        k: v for k, v in lines_of("requirements-dev.txt", ">=").items() if k not in TOOLS | NEW
    }
    assert lines_of("requirements-oldest.txt", "==") == floors | tested


def third_party(tree: ast.AST) -> set[str]:
    """Packages of others that a file imports."""
    roots = {name.split(".")[0] for name in imports_of(tree)}
    own = {name.split(".")[0] for name in MODULES}
    return roots - own - FOR_TYPES - set(sys.stdlib_module_names)


def test_every_package_that_is_imported_is_asked_for():
    assert third_party(ast.parse("import os, PIL.Image\nfrom torch import nn")) == {"PIL", "torch"}
    found = {root: path for path in PRODUCT for root in third_party(parse(path))}
    asked = lines_of("requirements.txt", ">=")
    names = {root: CALLED_OTHERWISE.get(root, root).replace("_", "-") for root in found}
    asked_for = {name.replace("_", "-") for name in asked} | UNASKED
    assert not {str(found[root]): root for root, name in names.items() if name not in asked_for}
