"""What must not drift: the direction of imports, what code may do, sizes, dependencies."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from shell import own_files

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("study", "engine", "deploy", "models", "data", "utils")
LOWER = {"utils": 0, "data": 1, "models": 1, "engine": 2, "deploy": 2, "study": 3}
SCRIPT_LEVEL = 4
HEAVY = {
    *("timm", "onnx", "onnxruntime", "onnxscript", "onnxslim", "openvino", "matplotlib", "pandas"),
    *("tensorboard", "scipy", "faster_coco_eval", "pycocotools", "torchvision"),
}
MOST_LINES = 400
# Each of these holds one thing that does not fall apart into two; they may not grow.
LONG_FILES = {
    "models/modules/revcol.py": 450,
}
MOST_FUNCTION_LINES = 60
MOST_ANY = 20  # parameters in the whole tree that take anything
LICENCE_TRAPS = ("ultralytics", "albumentationsx", "yolov5", "thop")


def python_files(*folders: str) -> list[Path]:
    """Our Python files, under `folders` or everywhere."""
    ours = (p for p in own_files() if p.suffix == ".py")
    return sorted(p for p in ours if not folders or p.parts[0] in folders)


def product_files() -> list[Path]:
    return [p for p in python_files() if p.parts[0] not in ("tests", "benchmarks", "examples")]


@functools.cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def module_name(path: Path) -> str:
    """`models/heads/anchor.py` -> `models.heads.anchor`."""
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


PRODUCT = product_files()
MODULES = {module_name(path): path for path in PRODUCT}


def imported(node: ast.AST) -> list[str]:
    """Modules that an import statement names; of our own as precisely as it can be said."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        found = []
        for alias in node.names:
            full = f"{node.module}.{alias.name}"
            found.append(full if full in MODULES else node.module)
        return found
    return []


def imports_of(tree: ast.AST) -> set[str]:
    return {name for node in ast.walk(tree) for name in imported(node)}


def own(names: set[str]) -> set[str]:
    return {name for name in names if name in MODULES}


GRAPH = {name: own(imports_of(parse(path))) for name, path in MODULES.items()}


def level(name: str) -> int:
    return LOWER.get(name.split(".")[0], SCRIPT_LEVEL)


def wrong_direction(name: str, target: str) -> bool:
    """Whether `name` may not import `target`, by rooms."""
    room, other = name.split(".")[0], target.split(".")[0]
    if level(name) == level(target) == SCRIPT_LEVEL:
        return name != target
    return room != other and level(target) >= level(name)


def test_every_file_is_seen():
    assert {"train", "val", "detect", "export", "models.yolo", "data.loader", "utils.boxes"} <= set(
        MODULES
    )
    assert "models.yolo" in GRAPH["val"] | GRAPH["models.weights.load"] | GRAPH["deploy.backends"]


@pytest.mark.parametrize(
    ("name", "target", "wrong"),
    [
        ("train", "engine.run", False),
        ("engine.run", "models.yolo", False),
        ("models.yolo", "utils.errors", False),
        ("train", "val", True),
        ("val", "train", True),
        ("detect", "val", True),
        ("models.yolo", "data.loader", True),
        ("data.loader", "models.yolo", True),
        ("utils.boxes", "data.loader", True),
        ("models.yolo", "engine.run", True),
        ("models.yolo", "deploy.backends", True),
        ("engine.run", "deploy.backends", True),
        ("deploy.backends", "engine.run", True),
        ("engine.run", "train", True),
        ("compare", "study.run", False),
        ("study.measure", "deploy.backends", False),
        ("study.run", "compare", True),
        ("engine.run", "study.plan", True),
    ],
)
def test_the_rule_of_directions_says_what_it_should(name: str, target: str, wrong: bool):
    assert wrong_direction(name, target) is wrong


def test_imports_between_rooms_point_down():
    wrong = [(n, t) for n, targets in GRAPH.items() for t in targets if wrong_direction(n, t)]
    assert not wrong


# Inside `models`: what each part must not import, however indirectly.
UPPER = ["models.yolo", "models.parser", "models.heads", "models.losses", "models.postprocess"]
BELOW = {
    "models.registry": ["models."],
    "models.common": ["models.modules", *UPPER],
    "models.transformer": ["models.modules", *UPPER],
    "models.blocks": ["models.modules", *UPPER],
    "models.modules": UPPER,
    "models.timm": UPPER,
    "models.weights.transfer": UPPER,
    "models.fusing": ["models.modules", *UPPER],
    "models.parser": ["models.heads", "models.yolo", "models.losses", "models.postprocess"],
    "models.heads": ["models.modules", "models.yolo", "models.losses", "models.assigners", "models.postprocess"],
    "models.assigners": ["models.heads", "models.losses", "models.yolo", "models.registry", "models.modules"],
    "models.losses": ["models.yolo", "models.modules", "models.postprocess"],
    "models.postprocess": ["models.losses", "models.yolo"],
    "models.yolo": ["models.losses", "models.postprocess"],
    "deploy.runtimes": ["models."],
    "deploy.backends": ["deploy.exporters", "models.losses"],
}  # fmt: skip


def reachable(start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for target in GRAPH[waiting.pop()] - seen:
            seen.add(target)
            waiting.append(target)
    return seen


def under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


@pytest.mark.parametrize("part", BELOW)
def test_inside_a_room_imports_point_down(part: str):
    members = [name for name in MODULES if under(name, part)]
    assert members
    wrong = [
        (name, target)
        for name in members
        for target in reachable(name)
        for forbidden in BELOW[part]
        if under(target, forbidden) and not under(target, part)
    ]
    assert not wrong


def test_no_ring_of_imports():
    rings = [name for name in MODULES if name in reachable(name)]
    assert not rings


def inside_functions(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes in the body of some function."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from (inner for inner in ast.walk(node) if inner is not node)


def hidden_imports(tree: ast.AST) -> list[str]:
    """Imports of the project inside functions."""
    roots = {*ROOMS, *(name for name in MODULES if "." not in name)}
    names = [n for node in inside_functions(tree) for n in imported(node)]
    return [name for name in names if name.split(".")[0] in roots]


def for_types(tree: ast.AST) -> Iterator[ast.AST]:
    """Nodes under `if TYPE_CHECKING:`, which never run."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            yield from (inner for statement in node.body for inner in ast.walk(statement))


def heavy_imports(tree: ast.AST) -> list[str]:
    """Heavy libraries imported when the file is."""
    late = {id(node) for node in (*inside_functions(tree), *for_types(tree))}
    names = [n for node in ast.walk(tree) if id(node) not in late for n in imported(node)]
    return [
        name for name in names if name.split(".")[0] in HEAVY or name == "torch.utils.tensorboard"
    ]


def _called(node: ast.Call) -> str:
    """`torch.load` of `torch.load(...)`."""
    return ast.unparse(node.func)


def forbidden_calls(tree: ast.AST) -> list[str]:
    """Calls that run text, unpickle objects or start a shell."""
    found = []
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name, keywords = _called(call), {k.arg: k.value for k in call.keywords}
        if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen"):
            found.append(name)
        if re.fullmatch(
            r"(c?pickle|_pickle|dill|joblib|shelve|marshal)\.(load|loads|open|Unpickler)", name
        ):
            found.append(name)
        if name == "torch.load" and not _is_constant(keywords.get("weights_only"), True):
            found.append("torch.load without weights_only=True")
        if _is_constant(keywords.get("shell"), True) or _is_constant(
            keywords.get("weights_only"), False
        ):
            found.append(ast.unparse(call))
        if name.endswith("np.load") and _is_constant(keywords.get("allow_pickle"), True):
            found.append(name)
        if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load"):
            found.append(name)
    return found


def _is_constant(node: ast.expr | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def broad_handlers(tree: ast.AST) -> list[int]:
    """Lines of handlers that catch everything."""
    broad = {"Exception", "BaseException"}
    lines = []
    for handler in (node for node in ast.walk(tree) if isinstance(node, ast.ExceptHandler)):
        names = (
            {n.id for n in ast.walk(handler.type) if isinstance(n, ast.Name)}
            if handler.type
            else broad
        )
        if names & broad:
            lines.append(handler.lineno)
    return lines


CHECKS = {
    "a project import inside a function": hidden_imports,
    "a heavy library at the top": heavy_imports,
    "a call that is not allowed": forbidden_calls,
    "a handler that catches everything": broad_handlers,
}

# `foreign_code`, where anything that a user's code raises becomes one line, is the only one.
BOUNDARY = "a handler that catches everything"


@pytest.mark.parametrize(
    ("check", "source"),
    [
        ("a project import inside a function", "def f():\n    from models.yolo import build_model"),
        ("a project import inside a function", "def f():\n    import train"),
        ("a heavy library at the top", "import timm"),
        ("a heavy library at the top", "from matplotlib import pyplot"),
        (
            "a heavy library at the top",
            "if True:\n    from torch.utils.tensorboard import SummaryWriter",
        ),
        ("a call that is not allowed", "eval('1')"),
        ("a call that is not allowed", "pickle.load(file)"),
        ("a call that is not allowed", "torch.load(path)"),
        ("a call that is not allowed", "torch.load(path, weights_only=False)"),
        ("a call that is not allowed", "subprocess.run('ls', shell=True)"),
        ("a call that is not allowed", "yaml.load(text)"),
        ("a handler that catches everything", "try:\n    f()\nexcept Exception:\n    pass"),
        (
            "a handler that catches everything",
            "try:\n    f()\nexcept (ValueError, BaseException):\n    pass",
        ),
        ("a handler that catches everything", "try:\n    f()\nexcept:\n    pass"),
    ],
)
def test_the_checks_find_what_they_look_for(check: str, source: str):
    assert CHECKS[check](ast.parse(source))


@pytest.mark.parametrize("check", CHECKS)
def test_no_file_has(check: str):
    found = {str(path): result for path in PRODUCT if (result := CHECKS[check](parse(path)))}
    allowed = found.pop("utils/errors.py", []) if check == BOUNDARY else []
    assert not found
    assert len(allowed) == (check == BOUNDARY)


def test_files_have_a_size_that_can_be_read():
    lengths = {
        p.as_posix(): len((ROOT / p).read_text(encoding="utf-8").splitlines())
        for p in python_files()
    }
    long = {name: n for name, n in lengths.items() if n > LONG_FILES.get(name, MOST_LINES)}
    assert not long


def test_no_exception_to_the_size_has_become_needless():
    assert all(len((ROOT / name).read_text().splitlines()) > MOST_LINES for name in LONG_FILES)


def function_lines(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Names and lengths of functions, docstrings left out."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                length -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
            yield node.name, length


def test_functions_have_a_size_that_can_be_read():
    long = {
        f"{path}:{name}": length
        for path in PRODUCT
        for name, length in function_lines(parse(path))
        if length > MOST_FUNCTION_LINES
    }
    assert not long


def any_parameters(tree: ast.AST) -> list[str]:
    """Parameters whose type is exactly `Any`."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            a = node.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
            found += [
                f"{node.name}:{p.arg}"
                for p in every
                if p.annotation and ast.unparse(p.annotation) == "Any"
            ]
    return found


def test_parameters_have_types():
    assert any_parameters(ast.parse("def f(a: Any, *b: int, **c: Any): ...")) == ["f:a", "f:c"]
    found = {str(path): names for path in PRODUCT if (names := any_parameters(parse(path)))}
    assert sum(map(len, found.values())) <= MOST_ANY, found


def test_a_training_loads_nothing_that_serves_models_elsewhere():
    assert not [name for name in reachable("train") if under(name, "deploy")]
    assert [name for name in reachable("detect") if under(name, "deploy.runtimes")]


def requirements(text: str) -> list[str]:
    """Names of the packages that a requirements file asks for."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in lines if line and line[0] != "-"]


def test_no_dependency_has_a_licence_that_binds_users():
    files = sorted(ROOT.glob("requirements*.txt"))
    assert files
    names = [name for file in files for name in requirements(file.read_text(encoding="utf-8"))]
    assert "torch" in names
    assert not [name for name in names if name.startswith(LICENCE_TRAPS)]


def test_no_file_imports_such_a_dependency():
    pasted = ROOT / "tests" / "pasted"  # files of others, whose imports resolve to our layers
    assert not {
        str(path): names
        for path in python_files()
        if pasted not in (ROOT / path).parents
        if (names := [n for n in imports_of(parse(path)) if n.startswith(LICENCE_TRAPS)])
    }
