"""Entry points for torch.hub.

    model = torch.hub.load("path/to/this/folder", "custom", path="best.pt", source="local")
    results = model("picture.jpg")
    results.pred, results.pandas().xyxy[0], results.save()

Programs that load a model here often have a `utils.py` or a `models` of their own. The packages of
this folder are therefore imported aside: while one of the functions below runs they stand in
`sys.modules`, afterwards the caller's modules of the same names are back, and this folder is no
longer searched.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from models.yolo import DetectionModel

dependencies = ["torch", "torchvision", "numpy", "cv2", "yaml"]

_ROOT = Path(__file__).resolve().parent
_PACKAGES = {file.parent.name for file in _ROOT.glob("*/__init__.py")}
_PACKAGES |= {file.stem for file in _ROOT.glob("*.py")} - {"hubconf"}
# Kept in a module of its own, so that loading a second time finds what the first has imported.
_KEPT = sys.modules.setdefault(f"yoke_hub:{_ROOT}", ModuleType("yoke_hub"))
_OWN: dict[str, ModuleType] = _KEPT.__dict__.setdefault("modules", {})
_LOCK: AbstractContextManager[object] = _KEPT.__dict__.setdefault("lock", threading.RLock())


def _is_named_like_ours(name: str) -> bool:
    return name.partition(".")[0] in _PACKAGES


def _is_ours(module: ModuleType) -> bool:
    """Whether `module` was imported from this folder."""
    places = [*vars(module).get("__path__", ()), vars(module).get("__file__")]
    return any(Path(place).resolve().is_relative_to(_ROOT) for place in places if place)


@contextmanager
def _own_packages() -> Iterator[None]:
    """Let `import models`, `import utils`, ... mean the packages of this folder for a while."""
    with _LOCK:
        loaded = {n: m for n, m in sys.modules.items() if _is_named_like_ours(n)}
        tops = [module for name, module in loaded.items() if "." not in name]
        if tops and all(_is_ours(module) for module in tops):
            yield  # the program runs in this folder: they are its own modules
            return
        for name in loaded:
            del sys.modules[name]
        sys.modules.update(_OWN)
        sys.path.insert(0, str(_ROOT))
        try:
            yield
        finally:
            sys.path.remove(str(_ROOT))
            for name in [name for name in sys.modules if _is_named_like_ours(name)]:
                _OWN[name] = sys.modules.pop(name)
            sys.modules.update(loaded)


def custom(
    path: str = "path/to/model.pt",
    autoshape: bool = True,
    _verbose: bool = True,
    device: str | None = None,
    cfg: str | None = None,
    allow_code: bool = False,
    one_to_many: bool = False,
) -> nn.Module:
    """A detector from a weights file: one of ours, or another project's that is read safely.

    Args:
        path: the weights.
        autoshape: False gives the bare network, (B, 3, H, W) in and raw predictions out.
        _verbose: log what was transferred from another project's file.
        device: such as "cpu" or "cuda:0"; None is the CPU.
        cfg: model YAML, for weights that carry none.
        allow_code: let Python files run that the model's YAML imports.
        one_to_many: of a model with `end2end: true`, the branch that needs NMS, with NMS.
    """
    with _own_packages():
        loaded = importlib.import_module("models.weights.load").load_weights(
            path, cfg=cfg, allow_code=allow_code
        )
        if _verbose and loaded.report is not None:
            logger = importlib.import_module("utils.logger").get_logger()
            logger.info(f"{path}: {loaded.report.summary()}")
        if one_to_many:
            importlib.import_module("models.heads.one_to_one").use_nms(loaded.model.head, path)
        return _finish(loaded.model, autoshape, device)


def _create(
    name: str,
    pretrained: bool | str,
    channels: int,
    classes: int | None,
    autoshape: bool,
    device: str | None,
) -> nn.Module:
    """A network by its published name, with weights if asked for."""
    with _own_packages():
        if pretrained:
            path = pretrained if isinstance(pretrained, str) else f"{name}.pt"
            loading = importlib.import_module("models.weights.load")
            loaded = loading.load_weights(path, cfg=name, num_classes=classes)
            loading.require_whole(path, loaded.report)
            return _finish(loaded.model, autoshape, device)
        config = importlib.import_module("models.parser.rows").read_model_config(name)[1]
        build_model = importlib.import_module("models.yolo").build_model
        model = build_model({**config, "ch": channels}, num_classes=classes)
        logger = importlib.import_module("utils.logger").get_logger()
        logger.info(f"{name}: fresh weights, not trained")
        return _finish(model.eval(), autoshape, device)


def _finish(model: DetectionModel, autoshape: bool, device: str | None) -> nn.Module:
    if autoshape:
        return importlib.import_module("deploy.hub").Detector(model, device)
    return model.to(device) if device else model


def _entry(name: str) -> Callable[..., nn.Module]:
    """The entry point of one published model."""

    def create(
        pretrained: bool | str = False,
        channels: int = 3,
        classes: int | None = None,
        autoshape: bool = True,
        _verbose: bool = True,
        device: str | None = None,
    ) -> nn.Module:
        if pretrained and channels != 3:
            raise ValueError(
                f"{name}: got channels={channels} beside weights, which say it themselves. Leave one of them out."
            )
        return _create(name, pretrained, channels, classes, autoshape, device)

    create.__name__ = create.__qualname__ = name.replace("-", "_")
    create.__doc__ = f"""{name}, untrained; nothing is downloaded.

    Args:
        pretrained: path of weights, or True for {name}.pt in the working folder.
        channels: of the input; autoshape reads files for 3, and for 1 as grey.
        classes: number of classes; None takes that of the weights, 80 without weights.
        autoshape: False gives the bare network.
        device: such as "cpu" or "cuda:0"; None is the CPU.
    """
    return create


yolov5n, yolov5s, yolov5m, yolov5l, yolov5x = (_entry(f"yolov5{size}") for size in "nsmlx")
yolov5n6, yolov5s6, yolov5m6, yolov5l6, yolov5x6 = (_entry(f"yolov5{size}6") for size in "nsmlx")
yolo11n, yolo11s, yolo11m, yolo11l, yolo11x = (_entry(f"yolo11{size}") for size in "nsmlx")
gelan_t, gelan_s, gelan_m, gelan_c, gelan_e = (_entry(f"gelan-{size}") for size in "tsmce")
yolov9_t, yolov9_s, yolov9_m, yolov9_c, yolov9_e = (_entry(f"yolov9-{size}") for size in "tsmce")
rtdetr_l, rtdetr_x = (_entry(f"rtdetr-{size}") for size in "lx")
dfine_n, dfine_s, dfine_m, dfine_l, dfine_x = (_entry(f"dfine-{size}") for size in "nsmlx")
deimv2_atto, deimv2_femto, deimv2_pico, deimv2_n = (
    _entry(f"deimv2-{size}") for size in ("atto", "femto", "pico", "n")
)
