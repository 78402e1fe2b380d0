"""From flags to the parts of a training: recipe, model, what is frozen, loaders, anchors."""

from __future__ import annotations

import copy
import fnmatch
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data.config import DataConfig, load_data_config
from data.dataset import DetectionDataset
from data.download import fetch
from models.family import recipe_file
from models.heads.anchor import AnchorDetect
from models.losses.box import name_problem
from models.losses.classification import class_loss_problem
from models.losses.own import settle_own
from models.yolo import DetectionModel
from utils.anchors import anchor_fit, fit_anchors
from utils.channels import white_of
from utils.config import check_recipe, load_hyp
from utils.errors import ConfigError, nearest
from utils.logger import get_logger

RECIPE_CHECKS = {"box_loss": name_problem, "cls_loss": class_loss_problem}
GOOD_RECALL = 0.99  # AP is sampled at recalls 0.01 apart: what is missed beyond costs a whole step


def open_data(options: Any, white: float | None = None) -> DataConfig:
    """The data set of `--data`; fetched first if `--download` asks for it.

    Args:
        options: the flags.
        white: what the model takes for white, see `with_white`.

    Raises:
        DatasetError: it is not there, or not as it should be.
    """
    config = load_data_config(options.data)
    if options.download:
        config = fetch(config)
    return with_white(config, white)


def with_white(config: DataConfig, white: float | None) -> DataConfig:
    """The data set with the white of the model's weights in images deeper than 8 bits, if it states none itself."""
    if config.white is None:
        return replace(config, white=white)
    if white is not None and white != config.white:
        get_logger().warning(
            f"{config.file}: white: {config.white:g}, but the model learned with {white:g}"
        )
    return config


def settle_white(data: DataConfig, model: DetectionModel) -> DataConfig:
    """The data set with the white that it or the model's weights state; the model keeps it."""
    data = with_white(data, white_of(model.config))
    if data.white is not None:
        model.config["white"] = data.white
    return data


def check_classes(
    model_names: Sequence[str], data_names: Sequence[str], weights: Any, data: Any
) -> None:
    """Refuse to measure a model on a data set with other classes; warn where names differ.

    Names such as `class0`, which stand in for names that nobody gave, fit everything.

    Raises:
        ConfigError: another number of classes, or the same names in another order.
    """
    if len(model_names) != len(data_names):
        raise ConfigError(
            f"{weights}: got a model of {len(model_names)} classes for {data} with {len(data_names)}, expected the "
            "same number. Give the data the model was trained on."
        )
    differing = [
        (k, ours, theirs)
        for k, (ours, theirs) in enumerate(zip(model_names, data_names))
        if ours != theirs and f"class{k}" not in (ours, theirs)
    ]
    if not differing:
        return
    index, ours, theirs = differing[0]
    told = f"{data}: class {index} - got {theirs!r}, expected {ours!r} as in {weights}"
    if sorted(model_names) == sorted(data_names):
        raise ConfigError(f"{told}. The names stand in another order: put them in the model's.")
    get_logger().warning(f"{told}; {len(differing)} of {len(data_names)} names differ")


def recipe(family: str, hyp: str | None, overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The hyper-parameters of a run: the family's file, the user's over it, then flags that are set.

    Raises:
        ConfigError: unknown keys or wrong types in the user's file.
    """
    default = recipe_file(family)
    merged = dict(load_hyp(hyp, default, RECIPE_CHECKS))
    if hyp:
        get_logger().info(f"recipe: {hyp} over data/hyps/{family}.yaml")
    else:
        get_logger().info(
            f"recipe: data/hyps/{family}.yaml, the {family} family's own (--hyp to change it)"
        )
    given = {key: value for key, value in overrides.items() if value is not None}
    for key in given.keys() - merged.keys():
        flag = "--" + key.replace("_", "-")
        get_logger().info(f"{flag}: without effect for {family}, its recipe has no such number")
    return {key: given.get(key, value) for key, value in merged.items()}


def settle_losses(hyp: Mapping[str, Any], options: Any) -> dict[str, Any]:
    """The recipe with the whole path of a user's box loss, by which a resumed run finds it again.

    Raises:
        ConfigError: it is neither beside the recipe nor in the working folder.
    """
    beside = [Path(options.hyp).parent] if options.hyp and not options.box_loss else []
    return {**hyp, "box_loss": settle_own(hyp["box_loss"], [*beside, Path()])}


def complete(hyp: Mapping[str, Any], family: str, source: str = "resume") -> dict[str, Any]:
    """The recipe of an earlier run, with the family's numbers for keys that it did not know yet.

    Raises:
        ConfigError: a value is not what such a recipe has; `source` is the run's file.
    """
    default = load_hyp(None, recipe_file(family))
    check_recipe(hyp, default, source)
    return {**default, **hyp}


def freeze(model: DetectionModel, wanted: Sequence[str]) -> list[nn.Module]:
    """Take rows out of the training.

    Args:
        model: its parameters lose `requires_grad`.
        wanted: `10` (rows whose index in the table is below 10), `0 3 4` (those rows; any index from 0 to 4 means a
            backbone that the table prints as 4), or names: `backbone`, `head`, a module name of the table, or a
            pattern of parameter names such as `model.0.*`.

    Returns:
        The frozen modules; the caller keeps them in eval mode, so that their BatchNorm statistics stay too.

    Raises:
        ConfigError: a word that fits nothing.
    """
    numbers = [int(word) for word in wanted if word.isdigit()]
    is_bound = len(numbers) == len(wanted) == 1
    frozen = _freeze_below(model, numbers[0]) if is_bound else _freeze_listed(model, numbers)
    for word in wanted:
        if not word.isdigit():
            frozen += _freeze_by_name(model, word)
    for module in frozen:
        module.requires_grad_(False)
    return frozen


def _freeze_below(model: DetectionModel, bound: int) -> list[nn.Module]:
    rows = model.rows
    lowest, highest = rows[0].index + 1, rows[-1].index + 1
    if bound and not lowest <= bound <= highest:
        raise ConfigError(
            f"--freeze: got {bound}, expected a number from {lowest} to {highest}: rows below it are frozen, and the table "
            f"prints {rows[0].module} as {rows[0].index}, {rows[-1].module} as {rows[-1].index}."
        )
    return [module for row, module in zip(rows, model.model, strict=True) if row.index < bound]


def _freeze_listed(model: DetectionModel, numbers: Sequence[int]) -> list[nn.Module]:
    ends = [row.index for row in model.rows]
    if numbers and max(numbers) > ends[-1]:
        raise ConfigError(
            f"--freeze: got {max(numbers)}, expected indices from 0 to {ends[-1]}, as the table prints."
        )
    return [model.model[k] for k in sorted({bisect_left(ends, number) for number in numbers})]


def _freeze_by_name(model: DetectionModel, word: str) -> list[nn.Module]:
    pairs = list(zip(model.rows, model.model, strict=True))
    found = [m for row, m in pairs if word in (row.section, row.module)]
    if found:
        return found
    names = [name for name, _ in model.named_parameters()]
    matching = [
        n for n in names if fnmatch.fnmatchcase(n, word) or n == word or n.startswith(word + ".")
    ]
    if not matching:
        known = [*{row.module for row in model.rows}, "backbone", "head", *names]
        raise ConfigError(
            f"--freeze: got {word!r}, expected an index, backbone, head, a module of the table or a parameter name."
            f"{nearest(word, known)}"
        )
    parameters = dict(model.named_parameters())
    for name in matching:
        parameters[name].requires_grad_(False)
    modules = dict(model.named_modules())
    return [
        modules[n] for n in modules if n and all(p in matching for p in _parameters_under(n, names))
    ]


def _parameters_under(module: str, names: Sequence[str]) -> list[str]:
    under = [name for name in names if name.startswith(module + ".")]
    return under or ["nothing"]


def refuse_sizes(options: Any, model: DetectionModel) -> None:
    """Refuse flags that change the size of images for a model that takes one size alone.

    Raises:
        ConfigError: such a flag is given.
    """
    given = [flag for flag in ("rect", "multi_scale") if getattr(options, flag)]
    if given and not model.any_size:
        bound = next((f"{row.place} {row.module}" for row in model.rows if not row.any_size), "")
        raise ConfigError(
            f"--{given[0].replace('_', '-')}: {bound or 'the model'} takes images of {model.imgsz[0]}x{model.imgsz[1]} "
            "alone. Leave the flag out."
        )


def fit_to_objects(
    model: DetectionModel,
    train_set: DetectionDataset,
    imgsz: tuple[int, int],
    hyp: Mapping[str, Any],
    options: Any,
) -> None:
    """Measure, and where it has anchors fit, the head on the objects of the training split."""
    sizes = _sizes_at(train_set, imgsz)
    model.head.tell_limits(sizes, np.diff(train_set.offsets))
    if isinstance(model.head, AnchorDetect):
        refit = not (options.noautoanchor or options.resume)
        check_anchors(model, sizes, hyp["anchor_t"], options.seed, refit=refit)


def _sizes_at(dataset: DetectionDataset, imgsz: tuple[int, int]) -> np.ndarray:
    """Object sizes in pixels, images scaled to fit `imgsz`."""
    sizes, image_sizes = dataset.box_sizes_wh()
    if len(sizes) == 0:
        return np.zeros((0, 2))
    scale = np.minimum(imgsz[0] / image_sizes[:, 0], imgsz[1] / image_sizes[:, 1])
    return np.asarray(sizes * scale[:, None], dtype=np.float64)


def check_anchors(
    model: DetectionModel, sizes: np.ndarray, threshold: float, seed: int, *, refit: bool = True
) -> None:
    """Measure the anchors on the data set's object sizes and fit new ones where they cover too little.

    Args:
        model: its head's anchors are replaced in place.
        sizes: object widths and heights at the training size, in pixels, (N, 2).
        threshold: largest ratio of sides, `anchor_t`.
        seed: of the fit.
        refit: False keeps them and only tells.
    """
    log, head = get_logger(), model.head
    assert isinstance(head, AnchorDetect)
    strides = head.anchors.new_tensor(head.strides).view(-1, 1, 1)
    current = (head.anchors * strides).reshape(-1, 2).cpu().double().numpy()
    if len(sizes) == 0:
        return
    fit = anchor_fit(sizes, current, threshold)
    log.info(f"anchors: {fit.per_object:.2f} an object, best possible recall {fit.recall:.4f}")
    if fit.recall >= GOOD_RECALL or not refit:
        return
    try:
        new = fit_anchors(sizes, len(current), seed=seed)
    except ValueError as error:
        log.info(f"anchors: kept - {error}")
        return
    better = anchor_fit(sizes, new, threshold)
    if better.recall <= fit.recall:
        log.info(f"anchors: kept, a fit reaches {better.recall:.4f}")
        return
    head.anchors.copy_(head.anchors.new_tensor(new).view_as(head.anchors) / strides)
    log.info(
        f"anchors: fitted to the data, best possible recall {better.recall:.4f} ({np.round(new).astype(int).tolist()})"
    )


def automatic_batch_size(
    model: nn.Module, imgsz: tuple[int, int], device: torch.device, share: float = 0.7
) -> int:
    """The largest power of two whose training step fits into `share` of the GPU's free memory; 16 without a GPU."""
    log = get_logger()
    if device.type != "cuda":
        log.info("--batch-size -1: no GPU to measure, 16 is used")
        return 16
    free, _ = torch.cuda.mem_get_info(device)
    used = _memory_of_steps(copy.deepcopy(model), imgsz, device)
    if not used:
        raise ConfigError(
            f"--batch-size -1: not one image of {imgsz[0]}x{imgsz[1]} fits into {free / 2**30:.1f} GiB. Give a smaller "
            "--imgsz or model."
        )
    if len(used) == 1:
        return 1
    slope, offset = np.polyfit([b for b, _ in used], [m for _, m in used], 1)
    fits = max(int((free * share - offset) / slope), 1)
    size = 2 ** int(np.log2(fits))
    log.info(
        f"--batch-size -1: {size} ({slope / 2**20:.0f} MiB an image, {free / 2**30:.1f} GiB free)"
    )
    return size


def _memory_of_steps(
    model: nn.Module, imgsz: tuple[int, int], device: torch.device
) -> list[tuple[int, int]]:
    """Bytes that a step takes, for some batch sizes, as long as they fit; moves the model's BatchNorm statistics."""
    used = []
    for batch in (1, 2, 4, 8):
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        try:
            raw = model(torch.zeros(batch, 3, *imgsz, device=device))
            sum(t.float().sum() for t in _tensors(raw)).backward()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            break
        model.zero_grad(set_to_none=True)
        used.append((batch, torch.cuda.max_memory_allocated(device) - before))
    return used


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value] if value.requires_grad else []
    return [t for item in value for t in _tensors(item)] if isinstance(value, (list, tuple)) else []
