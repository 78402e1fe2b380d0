"""A model from a YAML, and its table: `python models/yolo.py --cfg yolov5n-emo.yaml [--imgsz 640 640] [--json]`."""

from __future__ import annotations

import ast
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # run as a script: the folder above holds the packages
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from torch import Tensor, nn

from models import common, modules, transformer  # noqa: F401  (they register layers)
from models.blocks import cbam, csp, fusion, gelan, ghost, hg, resnet, sampling, vit, yolov10  # noqa: F401
from models.drawing import draw
from models.head import Head
from models.heads import ddetect, detect, dfine, one_to_one, rtdetr  # noqa: F401
from models.parser.build import apply_activation, build_rows
from models.parser.graft import forget_weights, replace_backbone
from models.parser.lookup import import_code, require_backbone
from models.parser.rows import ModelSpec, parse_spec, read_model_config, resolve
from models.parser.wiring import Row
from models.registry import LayerError
from models.reparam import reparameterize_model
from models.table import format_table, measure, row_records
from utils.channels import as_channels
from utils.config import ArgumentParser, integer, parse_imgsz, parse_value
from utils.errors import CheckpointError, ConfigError, ForeignError, foreign_code, nearest, run_cli
from utils.logger import get_logger
from utils.structures import Decoded, Targets

ACTIVATIONS = ("ReLU", "ReLU6", "SiLU", "GELU", "Hardswish", "LeakyReLU", "Mish", "ELU", "Identity")


class DetectionModel(nn.Module):
    """The rows of a YAML as one module: image -> raw predictions of its head.

    Attributes:
        model: the row modules; state-dict keys are `model.<row number>.…`.
        rows: how they are wired.
        config: the mapping that rebuilds the model.
        names: class names.
        imgsz: size (height, width) the model was built for.
        is_pretrained: whether its rows asked for weights.
    """

    def __init__(
        self,
        built: Sequence[nn.Module],
        rows: tuple[Row, ...],
        config: Mapping[str, Any],
        names: tuple[str, ...],
        imgsz: tuple[int, int],
    ) -> None:
        super().__init__()
        self.model = nn.ModuleList(built)
        self.rows = rows
        self.config = dict(config)
        self.names = names
        self.imgsz = imgsz
        self.is_pretrained = False

    @property
    def head(self) -> Head[Any]:
        """The last row's module."""
        head = self.model[-1]
        assert isinstance(head, Head)
        return head

    @property
    def channels(self) -> int:
        """Of an image."""
        return int(self.config.get("ch", 3))

    @property
    def strides(self) -> tuple[int, ...]:
        """Strides of the maps that the head reads."""
        return self.head.strides

    @property
    def any_size(self) -> bool:
        """Whether it takes images of other sizes than it was built for."""
        own = (getattr(module, "any_size", True) for module in self.model.modules())
        return all(own) and all(row.any_size for row in self.rows)

    @property
    def computes_channels_last(self) -> bool:
        """Whether every module works in that memory format."""
        return all(row.channels_last for row in self.rows)

    @property
    def max_stride(self) -> int:
        """Image sizes must be multiples of this: the largest stride of a map, not of what was pooled to one cell."""
        maps = (
            stride
            for row in self.rows[:-1]
            for shape, stride in zip(row.shape, row.strides)
            if len(shape) == 3 and max(shape[1:]) > 1
        )
        return max(32, *self.strides, *maps)

    def forward(self, images: Tensor, targets: Targets | None = None) -> Any:
        """Raw predictions for images (B, 3, H, W) in [0, 1]; `targets` serve heads that train with denoising.

        A model with `ch: 1` takes (B, 1, H, W) and makes colour images grey.
        """
        if self.channels != 3:
            images = as_channels(images, self.channels)
        self._check_size(images)
        slots: dict[int, Any] = {-1: images}
        output: Any = images
        for row, module in zip(self.rows, self.model, strict=True):
            inputs = row.arguments([slots[i] for i in row.inputs])
            output = module(*inputs, targets) if module is self.model[-1] else module(*inputs)
            if row.map_slots is None:
                slots[row.index] = output
            else:
                maps = list(output.values()) if isinstance(output, Mapping) else output
                if not isinstance(maps, (list, tuple)) or len(maps) != len(row.map_slots):
                    raise ConfigError(_other_maps(row, maps))
                filled = zip(row.map_slots, maps, strict=True)
                slots.update({slot: m for slot, m in filled if slot is not None})
            for slot in row.release:
                slots.pop(slot, None)
        return output

    def _check_size(self, images: Tensor) -> None:
        bound = next((row for row in self.rows if not row.any_size), None)
        height, width = images.shape[-2:]
        if bound is not None and (height, width) != self.imgsz:
            raise ConfigError(
                f"{bound.place} {bound.module}: got images of {height}x{width}, expected the {self.imgsz[0]}x{self.imgsz[1]} that "
                "it was built for. Give that --imgsz, without --rect and --multi-scale."
            )

    def decode(self, raw: Any) -> Decoded:
        """Boxes (B, A, 4) in xyxy pixels and scores (B, A, C)."""
        return self.head.decode(raw)


def _other_maps(row: Row, maps: Any) -> str:
    got = f"{len(maps)} things" if isinstance(maps, (list, tuple)) else f"a {type(maps).__name__}"
    return (
        f"{row.place} {row.module}: got {got}, expected the {len(row.map_slots or ())} maps that it gave when it was built. "
        "A backbone returns the same maps in training and evaluation."
    )


def build_model(
    cfg: str | Path | Mapping[str, Any],
    *,
    num_classes: int | None = None,
    names: Sequence[str] | None = None,
    scale: str | None = None,
    imgsz: tuple[int, int] = (640, 640),
    backbone: Sequence[str] | None = None,
    allow_code: bool = False,
    fresh: bool = False,
    end2end: bool = False,
) -> DetectionModel:
    """Build a model from a YAML.

    Args:
        cfg: a path, a bare name such as `yolo11s`, or a mapping.
        num_classes: instead of the file's `nc`.
        names: class names; their number stands for `num_classes` where that is not given.
        scale: size letter of a file with `scales`.
        imgsz: size (height, width) that shapes are worked out for, and fixed-size backbones are made for.
        backbone: `["convnext_tiny", "pretrained=true"]` replaces the backbone rows.
        allow_code: whether files that the YAML imports may run.
        fresh: the weights come from elsewhere, so those that the rows ask for are neither read nor fetched.
        end2end: give the head a branch that needs no NMS, as `end2end: true` in the file does.

    Raises:
        ConfigError: with every problem of the file, one line each.
    """
    num_classes = num_classes if num_classes is not None or not names else len(names)
    file, config, lines = read_model_config(
        cfg, num_classes=num_classes, scale=scale, end2end=end2end
    )
    spec = parse_spec(file, config, lines)
    with modules.seeing(import_code(spec, allow_code)):
        if fresh:
            spec = parse_spec(file, forget_weights(config), lines)
        if backbone:
            spec = _with_backbone(spec, lines, backbone)
        model = parse_model(spec, names, imgsz, fits=fresh)
        # Weights that rows ask for are in the model by now, and go where it goes.
        plain = forget_weights(model.config)
        model.is_pretrained, model.config = plain != model.config, plain
        modules.tell_broken_files()
        _tell_notes(spec, model.rows)
    return model


def _tell_notes(spec: ModelSpec, rows: Sequence[Row]) -> None:
    """Warn of rows that can be read in two ways, or whose modules cannot do everything."""
    notes = [(row.place, row.module, note) for row in rows for note in row.notes]
    said = dict.fromkeys(
        (row.module, note) for row in rows if (note := modules.shadowed(row.module))
    )
    for place, name, note in [*notes, *(("", *words) for words in said)]:
        get_logger().warning(f"{' '.join(filter(None, (spec.file, place, name)))}: {note}")


def _with_backbone(
    spec: ModelSpec, lines: Mapping[str, Sequence[int]], words: Sequence[str]
) -> ModelSpec:
    """The spec with another backbone; what the rows' slots mean comes from the model as it was."""
    name, options = words[0], parse_options(words[1:])
    try:
        require_backbone(name)
    except LayerError as error:
        raise ConfigError(f"--backbone: {error}") from error
    rows = _draft(parse_spec(spec.file, forget_weights(spec.config), lines))
    config = replace_backbone(spec.config, name, options, [row.slots for row in rows])
    kept = {key: places for key, places in lines.items() if key == "head"}  # its rows all stay
    return parse_spec(f"{spec.file} (--backbone {name})", config, kept)


def _draft(spec: ModelSpec) -> tuple[Row, ...]:
    """How the rows of `spec` hang together; memory is taken only for code that cannot be built without."""
    with torch.random.fork_rng(devices=[]):
        with suppress(ConfigError), torch.device("meta"):
            return build_rows(spec, (256, 256))[1]
        return build_rows(spec, (256, 256))[1]


def parse_options(words: Sequence[str]) -> dict[str, Any]:
    """`["factor=0.5", "widths=[8, 16]"]` as a mapping; values are read as in a YAML, nothing is evaluated.

    Raises:
        ConfigError: a word without `=`, a value that is missing or broken, a key given twice.
    """
    options: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.isidentifier():
            raise ConfigError(
                f"--backbone: got {word!r}, expected key=value such as pretrained=true."
            )
        if key in options:
            raise ConfigError(f"--backbone: got {key} twice, expected it once. Leave one out.")
        try:
            value = parse_value(text)
        except ValueError:
            value = None
        if value is None and text not in ("None", "none", "null", "~"):
            raise ConfigError(
                f"--backbone: got {word!r}, expected a value behind the = such as 0.5, true, a path or [8, 16]."
            )
        options[key] = resolve(value, {})
    return options


def parse_model(
    spec: ModelSpec, names: Sequence[str] | None, imgsz: tuple[int, int], *, fits: bool
) -> DetectionModel:
    """Build the rows of `spec` and tell the head its strides; `fits` as for `build_rows`."""
    built, rows = build_rows(spec, imgsz, fits=fits)
    head = built[-1]
    if not isinstance(head, Head):
        raise ConfigError(
            f"{spec.file} {rows[-1].place} {rows[-1].module}: is the last row, expected a head such as Detect."
        )
    strides = {row.index: row.strides[-1] for row in rows if row.map_slots is None and row.strides}
    for row in rows:
        filled = sorted(slot for slot in row.map_slots or () if slot is not None)
        strides.update(zip(filled, row.strides))
    one_to_one.check_form(head, spec.head, f"{spec.file} {rows[-1].place} {rows[-1].module}")
    _check_head(spec, rows[-1], head.num_classes, names)
    read = [strides[slot] for slot in rows[-1].inputs]
    try:
        with foreign_code(users=modules.USER_CODE):
            head.initialize(read)
    except ForeignError as error:
        place = f"{spec.file} {rows[-1].place} {rows[-1].module}"
        raise ConfigError(f"{place}: cannot be set up with strides {read} - {error}.") from error
    for module in built:
        if spec.activation:
            apply_activation(module, _activation(spec))
    names = tuple(names) if names else tuple(f"class{i}" for i in range(spec.num_classes))
    return DetectionModel(built, rows, spec.config, names, imgsz)


def _check_head(spec: ModelSpec, row: Row, count: int, names: Sequence[str] | None) -> None:
    """Refuse a head that was given another number of classes than the file, or the data, says."""
    if count != spec.num_classes and "nc" in spec.config:
        raise ConfigError(
            f"{spec.file} {row.place} {row.module}: got {count} classes, expected the {spec.num_classes} of nc. Write nc "
            "there, which follows the data."
        )
    if names and len(names) != count:
        raise ConfigError(
            f"{spec.file}: got {len(names)} class names for {count} classes, expected one each. Mend names or nc."
        )


def _activation(spec: ModelSpec) -> Callable[[], nn.Module]:
    """`nn.LeakyReLU(0.1)` as a factory, read as a literal call: nothing is evaluated."""
    try:
        call = ast.parse(str(spec.activation), mode="eval").body
        func, args = (call.func, call.args) if isinstance(call, ast.Call) else (call, [])
        name = func.attr if isinstance(func, ast.Attribute) else getattr(func, "id", "")
        values = [ast.literal_eval(arg) for arg in args]
        options = {k.arg: ast.literal_eval(k.value) for k in getattr(call, "keywords", []) if k.arg}
    except (SyntaxError, ValueError):
        name, values, options = "", [], {}
    if name not in ACTIVATIONS:
        raise ConfigError(
            f"{spec.file} activation: got {spec.activation!r}, expected one of {', '.join(ACTIVATIONS)}, "
            f"such as nn.ReLU().{nearest(name, ACTIVATIONS)}"
        )
    try:
        getattr(nn, name)(*values, **options)
    except TypeError as error:
        raise ConfigError(
            f"{spec.file} activation: got {spec.activation!r}, which cannot be built - {error}."
        ) from error
    return lambda: getattr(nn, name)(*values, **options)


def model_from_checkpoint(
    checkpoint: Mapping[str, Any], allow_code: bool = False
) -> DetectionModel:
    """Rebuild the model of one of our checkpoints (EMA weights if it has them); `allow_code` as in `build_model`."""
    model = build_model(
        checkpoint["config"],
        num_classes=checkpoint["config"].get("nc"),
        names=checkpoint["names"],
        imgsz=tuple(checkpoint.get("imgsz", (640, 640))),
        allow_code=allow_code,
        fresh=True,
    )
    state = checkpoint["ema"]["model"] if checkpoint.get("ema") else checkpoint["model"]
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"weights do not fit their own config - {' '.join(str(error).split())[:300]}"
        ) from error
    return model


def describe(model: DetectionModel, imgsz: tuple[int, int]) -> dict[str, Any]:
    """Size and rows of a model as plain data, in its training and its deployed form."""
    trained = measure(model, imgsz)
    deployed = measure(reparameterize_model(model), imgsz)
    return {
        "params": trained.params, "params_deployed": deployed.params,
        "gflops": round(trained.gflops, 3), "gflops_deployed": round(deployed.gflops, 3),
        "imgsz": list(imgsz), "strides": list(model.strides), "rows": row_records(model),
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table of a model."""
    parser = ArgumentParser(description="Print the table of a model, without touching data.")
    parser.add_argument(
        "--cfg", default="yolov5n.yaml", help="model YAML, or a name in models/detect"
    )
    parser.add_argument(
        "--imgsz", nargs="+", type=integer(1), default=[640], help="size, or height and width"
    )
    parser.add_argument("--scale", default=None, help="size letter of a YAML with scales")
    parser.add_argument("--nc", type=integer(1), default=None, help="number of classes")
    parser.add_argument(
        "--backbone", nargs="+", default=None, metavar="NAME", help="NAME [key=value ...]"
    )
    parser.add_argument("--allow-code", action="store_true", help="let the YAML's imports run")
    parser.add_argument("--draw", metavar="FILE", help="draw its rows into an .svg")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object as the last line"
    )
    options = parser.parse_args(arguments)
    imgsz = parse_imgsz(options.imgsz, 32)
    given = {"scale": options.scale, "backbone": options.backbone, "allow_code": options.allow_code}
    model = build_model(options.cfg, num_classes=options.nc, imgsz=imgsz, **given)
    record = describe(model, imgsz)
    print(format_table(model))
    size = f"{imgsz[0]}x{imgsz[1]}"
    for form, end, told in (("training", "", " (2 x GMACs)"), ("deployed", "_deployed", "")):
        totals = f"{record[f'params{end}']:,} parameters, {record[f'gflops{end}']:.2f} GFLOPs"
        print(f"{form} form: {totals} at {size}{told}")
    if options.draw:
        title = f"{Path(options.cfg).stem}, images of {size}"
        Path(options.draw).write_text(draw(model.rows, title), encoding="utf-8")
    if options.json:
        print(json.dumps(record))


if __name__ == "__main__":
    run_cli(main)
