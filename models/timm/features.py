"""What a timm model gives as features, found on the `meta` device: nothing is computed and no random number is drawn.

timm's models differ in how they take another image size, in which of their stages they offer, and in the layout of their
maps. `plan_features` tries the ways that timm has, in a fixed order, and writes down the first that works.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from models.registry import LayerError
from models.timm.mobileone import with_fast_branches
from utils.errors import ForeignError, foreign_code

Options = Mapping[str, Any]
"""Keyword arguments of `timm.create_model`."""


class FeatureInfo(Protocol):
    """What timm says of the maps of a model: `reduction` and more of every stage, and which of them come out."""

    info: Sequence[Mapping[str, float]]
    out_indices: Sequence[int]

    def reduction(self) -> Sequence[float]:
        """Of the maps that come out."""


class Tap(NamedTuple):
    """One map of a timm model.

    Attributes:
        channels: its width.
        stride: the power of two nearest to the reduction that timm states.
        is_exact: whether the map has just the size that `stride` says; if not it is resized.
    """

    channels: int
    stride: int
    is_exact: bool


class FeaturePlan(NamedTuple):
    """How to build a timm model as a backbone.

    Attributes:
        options: keyword arguments of `timm.create_model`, without `out_indices`.
        indices: `out_indices`.
        taps: the maps it then returns.
        kept: stride -> position in `taps`; of two maps with one stride the later, none of stride 1.
        is_channels_last: the maps are (B, H, W, C).
        any_size: other image sizes than the planned one work too.
    """

    options: Options
    indices: tuple[int, ...]
    taps: tuple[Tap, ...]
    kept: dict[int, int]
    is_channels_last: bool
    any_size: bool

    @property
    def arguments(self) -> Options:
        """All keyword arguments of `create`."""
        return {**self.options, "out_indices": self.indices}


def bare_name(name: str) -> str:
    """`timm/resnet18.a1_in1k` -> `resnet18.a1_in1k`."""
    return name.removeprefix("timm/")


def timm_names() -> list[str]:
    """Every model name of the installed timm; empty where timm is not installed."""
    try:
        import timm
    except ImportError:
        return []
    return list(timm.list_models())


def is_timm_model(name: str) -> bool:
    """Whether `name` (with or without `timm/` and a weights tag) is a model of the installed timm."""
    try:
        import timm
    except ImportError:
        return False
    return bool(timm.is_model(bare_name(name)))


def statistics_of(name: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that images were normalised by when timm's weights of `name` were trained; None if timm
    does not say."""
    try:
        import timm
    except ImportError:
        return None
    config = timm.get_pretrained_cfg(bare_name(name))
    if config is None or config.mean is None or config.std is None:
        return None
    return tuple(map(float, config.mean)), tuple(map(float, config.std))


@contextmanager
def quiet() -> Iterator[None]:
    """timm's warnings of names that it does not use are kept back: what became of a file is told by its reader."""
    log = logging.getLogger("timm")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def create(name: str, options: Options) -> nn.Module:
    """`timm.create_model` with `features_only`: a module with a `feature_info`."""
    import timm

    net: nn.Module = timm.create_model(bare_name(name), features_only=True, **options)
    return with_fast_branches(net)


def info_of(net: nn.Module) -> FeatureInfo:
    """The `feature_info` of what `create` gave."""
    return cast(FeatureInfo, net.feature_info)


def plan_features(name: str, imgsz: tuple[int, int], options: Options) -> FeaturePlan:
    """Find out how `name` gives features for images of `imgsz`; `options` are the user's and stand above ours.

    Raises:
        LayerError: no way works; the reason of the most telling one is given.
    """
    errors: dict[str, ForeignError] = {}
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        for candidate in _candidates(name, imgsz):
            try:
                with foreign_code():
                    return _try_plan(name, imgsz, {**candidate, **options})
            except ForeignError as error:
                errors[" ".join(candidate)] = error
    takes_size = not isinstance(errors["img_size"].__cause__, TypeError)
    reason = errors["img_size" if takes_size else ""]
    raise LayerError(
        f"timm cannot give features of {name!r} at {imgsz[0]}x{imgsz[1]} - {str(reason)[:200]}. "
        "Choose another size or model, or other options."
    )


def _candidates(name: str, imgsz: tuple[int, int]) -> list[Options]:
    """Ways to take images of any size, best first; a patch of 14 or so becomes 16, so that strides are powers of two."""
    import timm

    config = timm.get_pretrained_cfg(bare_name(name))
    sizes: list[Options] = [
        {"dynamic_img_size": True},
        {"strict_img_size": False},
        {"img_size": imgsz},
    ]
    is_fixed = config is not None and config.fixed_input_size
    ways: list[Options] = [*sizes, {}] if is_fixed else [{}, *sizes]
    patches: list[Options] = [{"patch_size": 16}, {}] if _has_odd_patch(name) else [{}]
    return [{**patch, **way} for patch in patches for way in ways]


def _has_odd_patch(name: str) -> bool:
    """Whether all maps have one stride that is not a power of two."""
    with suppress(ForeignError), foreign_code():
        strides = {int(stage["reduction"]) for stage in info_of(create(name, {})).info}
        return len(strides) == 1 and all(stride & (stride - 1) for stride in strides)
    return False


def _try_plan(name: str, imgsz: tuple[int, int], options: Options) -> FeaturePlan:
    info = info_of(create(name, options))
    indices = _last_of_each_stride(info)
    try:
        with foreign_code():
            net = create(name, {**options, "out_indices": indices})
            maps = _maps_at(net, imgsz, options)
    except ForeignError:  # some cannot give every stage that they list, but their own choice works
        indices = tuple(int(i) for i in info.out_indices)
        net = create(name, {**options, "out_indices": indices})
        maps = _maps_at(net, imgsz, options)
    is_channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")
    strides = [power_of_two(float(r)) for r in info_of(net).reduction()]
    taps = [_tap(m, s, imgsz, is_channels_last) for m, s in zip(maps, strides, strict=True)]
    any_size, other = False, (imgsz[0] + 32, imgsz[1] + 64)
    with suppress(ForeignError), foreign_code():
        maps = _maps_at(net, other, options)
        any_size = True
    if any_size:  # some models round their maps up, which shows at one size and not at another
        others = [_tap(m, s, other, is_channels_last) for m, s in zip(maps, strides)]
        taps = [t._replace(is_exact=t.is_exact and o.is_exact) for t, o in zip(taps, others)]
    kept = {tap.stride: i for i, tap in enumerate(taps) if tap.stride > 1}  # of two the later
    return FeaturePlan(options, indices, tuple(taps), kept, is_channels_last, any_size)


def narrow_plan(plan: FeaturePlan, strides: Sequence[int]) -> FeaturePlan:
    """`plan` with only the maps at `strides`."""
    kept = [(stride, plan.kept[stride]) for stride in sorted(strides)]
    return plan._replace(
        indices=tuple(plan.indices[i] for _, i in kept),
        taps=tuple(plan.taps[i] for _, i in kept),
        kept={stride: position for position, (stride, _) in enumerate(kept)},
    )


def find_unused(
    name: str, imgsz: tuple[int, int], plan: FeaturePlan, strides: Sequence[int]
) -> list[str]:
    """Names of parameters of the timm model that none of the maps at `strides` depends on.

    Found by a backward pass in training mode on the meta device.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"), torch.enable_grad():
        net = create(name, plan.arguments).train()
        maps = net(torch.empty(2, plan.options.get("in_chans", 3), *imgsz))
        sum((maps[plan.kept[stride]].sum() for stride in strides), torch.zeros(())).backward()
    return sorted(key for key, parameter in net.named_parameters() if parameter.grad is None)


def power_of_two(stride: float) -> int:
    """The power of two nearest to `stride`: 14 -> 16."""
    return 2 ** round(math.log2(stride))


def _last_of_each_stride(info: FeatureInfo) -> tuple[int, ...]:
    """Stages to take: the last of each stride, none of stride 1."""
    last = {power_of_two(stage["reduction"]): i for i, stage in enumerate(info.info)}
    return tuple(sorted(i for stride, i in last.items() if stride > 1))


def _maps_at(net: nn.Module, imgsz: tuple[int, int], options: Options) -> list[Tensor]:
    """Maps for one meta image, in eval mode."""
    net.eval()
    with torch.no_grad():
        return list(net(torch.empty(1, options.get("in_chans", 3), *imgsz)))


def _tap(tap_map: Tensor, stride: int, imgsz: tuple[int, int], is_channels_last: bool) -> Tap:
    if tap_map.ndim != 4:
        raise ValueError(
            f"a feature has shape {tuple(tap_map.shape)}, expected a map with height and width"
        )
    channels, height, width = tap_map.shape[1:]
    if is_channels_last:
        height, width, channels = tap_map.shape[1:]
    is_exact = (height, width) == (-(-imgsz[0] // stride), -(-imgsz[1] // stride))
    return Tap(int(channels), stride, is_exact)
