"""Any timm model as a backbone, by its name: `[-1, 1, convnext_tiny, []]` or `timm/convnext_tiny`.

What timm's `features_only` gives is brought into the common form: maps (B, C, H, W), coarser from item to item, strides that
are powers of two. A model without a map at stride 8, 16 or 32 gets it from the nearest one it has, by the convolutions of the
simple feature pyramid (Li et al., 2022, arXiv 2203.16527); so a plain ViT has strides 4 to 32.

Letters: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks.input_norm import InputNorm
from models.blocks.layers import ChannelNorm
from models.registry import Layer, LayerError, Plan, Scaling, backbone, single
from models.timm.features import (
    FeaturePlan,
    Options,
    bare_name,
    create,
    find_unused,
    is_timm_model,
    narrow_plan,
    plan_features,
    quiet,
    statistics_of,
)
from models.weights.transfer import load_backbone_weights
from utils.errors import CheckpointError, ConfigError, ForeignError, foreign_code
from utils.logger import get_logger

REQUIRED_STRIDES = (8, 16, 32)
VIT_STRIDES = (4, 8, 16, 32)
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
Normalize = bool | Sequence[Sequence[float]] | None
OFFLINE_ADVICE = (
    "Without a network, fetch the file once where there is one and give it as {weights: path}, "
    "or leave pretrained out to start from fresh weights."
)


class PyramidLevel(nn.Sequential):
    """A map at another stride: transposed convolutions up or max-pooling down, then 1x1 and 3x3 convolutions.

    Section 3 of the paper of the simple feature pyramid; a step up halves the width.
    """

    def __init__(
        self, in_channels: int, out_channels: int, from_stride: int, to_stride: int
    ) -> None:
        layers: list[nn.Module] = []
        width = in_channels
        while from_stride > to_stride:
            half = max(width // 2, 1)
            layers += [nn.GELU()] if layers else []
            layers.append(nn.ConvTranspose2d(width, half, 2, 2))
            from_stride, width = from_stride // 2, half
            layers += [ChannelNorm(half)] if from_stride > to_stride else []
        while from_stride < to_stride:
            layers.append(nn.MaxPool2d(2, 2))
            from_stride *= 2
        layers += [
            nn.Conv2d(width, out_channels, 1, bias=False),
            ChannelNorm(out_channels),
            nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
            ChannelNorm(out_channels),
        ]
        super().__init__(*layers)


class TimmBackbone(nn.Module):
    """A timm model whose maps go to the slots by stride.

    Args:
        model_name: timm's name, `timm/` in front or a `.tag` behind are allowed.
        imgsz: size (height, width); only models with a fixed input size depend on it. A third number is the channels of
            an image that has not three.
        pretrained: load timm's weights, from its cache or the hub.
        weights: load weights of this model from a local file instead.
        pyramid_width: channels of the maps that the model itself does not have.
        normalize: bring images from [0, 1] to what the weights were trained on. None: by timm's mean and std once weights
            of a bare backbone come in; true: from the start; false: never; or a mean and a std a channel.
        options: go to `timm.create_model`, such as `drop_path_rate`.

    Attributes:
        channels: widths of the maps.
        strides: strides of the maps, each a power of two, rising.
        any_size: other image sizes than `imgsz` work too.
        needs_weights: it is a plain transformer or the like, of one map, and no weights came in: a short training from
            scratch teaches it nothing.
        unused: parameters of the timm model that no selected map depends on; they are frozen.

    Raises:
        LayerError: timm cannot give features of this model at this size, or does not take these options.
        CheckpointError: the weights cannot be had, or do not fit.
    """

    reparameterizes_inside = True
    """`reparameterize()` covers all modules inside; theirs are not to be called again."""
    pretrained_prefix = "net."
    """Where the tensors stand that weights of the bare backbone have."""
    translator = "timm"

    def __init__(
        self,
        model_name: str,
        imgsz: Sequence[int] = (640, 640),
        pretrained: bool = False,
        weights: str | None = None,
        pyramid_width: int = 256,
        normalize: Normalize = None,
        **options: Any,
    ) -> None:
        super().__init__()
        _check(pretrained, pyramid_width, options)
        self.model_name = model_name
        self.imgsz = (int(imgsz[0]), int(imgsz[1]))
        if len(imgsz) > 2:
            options = {"in_chans": int(imgsz[2]), **options}
        self.plan = plan_features(model_name, self.imgsz, options)
        self.any_size = self.plan.any_size
        self.normalize: InputNorm | nn.Identity = InputNorm(int(options.get("in_chans", 3)))
        self.normalizes = normalize
        self._set_norm(normalize)
        self.net = _create_net(model_name, self.plan, pretrained and not weights)
        self.needs_weights = len(self.plan.kept) == 1 and not (pretrained or weights)
        self.unused: list[str] = []
        self.channels: list[int] = []
        self.strides: list[int] = []
        self.sources: list[tuple[int, str]] = []
        self.levels = nn.ModuleDict()
        self._add_outputs(pyramid_width)
        self._is_reparameterized = False
        if weights:
            get_logger().info(f"{weights}: {load_backbone_weights(self, weights).summary()}")
        elif pretrained:
            told = (f"{model_name}: has timm's weights", self.on_pretrained())
            get_logger().info("; ".join(filter(None, told)))

    def _set_norm(self, normalize: Normalize) -> None:
        """Take the numbers of `normalize`: true for timm's, or a mean and a std."""
        if normalize is None or normalize is False:
            return
        numbers = statistics_of(self.model_name) if normalize is True else normalize
        try:
            mean, std = numbers  # type: ignore[misc]
            assert isinstance(self.normalize, InputNorm)
            self.normalize.set([float(n) for n in mean], [float(n) for n in std])
        except (TypeError, ValueError) as error:
            raise LayerError(
                f"got normalize {normalize!r}, expected true, false or a mean and a std for each channel, such as "
                "[[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]]"
            ) from error

    def on_pretrained(self) -> str:
        """Weights of the bare backbone have come in: images are to be normalised as those were that it learnt from.

        Returns:
            What becomes of the images, in words.
        """
        assert isinstance(self.normalize, InputNorm)
        self.needs_weights = False
        if self.normalizes is None:
            return self.normalize.set_as_timm(self.model_name)
        return "" if self.normalize.is_active else "images are not normalised, as its row says"

    def read_foreign(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What timm makes of weights in their authors' own spelling, by key of this module; only what is in the file.

        timm does not say which tensors it has taken, so it also gets a file of the same names without numbers.
        """
        blank = {k: t * torch.nan if t.is_floating_point() else t for k, t in state.items()}
        with (
            torch.random.fork_rng(devices=[]),
            quiet(),
            suppress(ForeignError, CheckpointError),
            foreign_code(),
        ):
            probe, numbers = (self._as_timm_loads(s) for s in (blank, state))
            taken = [k for k, t in probe.items() if t.is_floating_point() and t.isnan().any()]
            return {self.pretrained_prefix + key: numbers[key] for key in taken}
        return {}

    def _as_timm_loads(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The state dict of a fresh timm model that was given `state` as its pretrained weights."""
        overlay = {"pretrained_cfg_overlay": {"state_dict": dict(state)}, "pretrained": True}
        return create(self.model_name, {**self.plan.arguments, **overlay}).state_dict()

    def _add_outputs(self, width: int) -> None:
        """Which of timm's maps each output comes from, and the levels that derive those it does not have."""
        own = self.plan.kept
        is_single = len(own) == 1
        for stride in (
            sorted(set(VIT_STRIDES) | set(own)) if is_single else sorted({*own, *REQUIRED_STRIDES})
        ):
            nearest = min(own, key=lambda s: (abs(s.bit_length() - stride.bit_length()), -s))
            is_derived = is_single or stride not in own
            key = f"stride{stride}" if is_derived else ""
            if is_derived:
                self.levels[key] = PyramidLevel(
                    self.plan.taps[own[nearest]].channels, width, nearest, stride
                )
            self.sources.append((nearest, key))
            self.strides.append(stride)
            self.channels.append(width if is_derived else self.plan.taps[own[stride]].channels)

    def select_strides(self, strides: Sequence[int]) -> None:
        """Return only the maps at `strides` from now on; what serves none of them goes, or is frozen where it cannot go."""
        kept = [i for i, stride in enumerate(self.strides) if stride in strides]
        self.strides = [self.strides[i] for i in kept]
        self.channels = [self.channels[i] for i in kept]
        self.sources = [self.sources[i] for i in kept]
        for key in set(self.levels) - {key for _, key in self.sources}:
            del self.levels[key]
        own = sorted({stride for stride, _ in self.sources})
        unused = find_unused(self.model_name, self.imgsz, self.plan, own)
        if unused and len(own) < len(self.plan.kept):
            self._narrow(own)
            unused = find_unused(self.model_name, self.imgsz, self.plan, own)
        self.unused = unused
        for name, parameter in self.net.named_parameters():
            if name in unused:
                parameter.requires_grad_(False)

    def _narrow(self, strides: list[int]) -> None:
        """Build the timm model anew for `strides` alone, with the same weights; it stays as it is where these do not fit."""
        plan = narrow_plan(self.plan, strides)
        state = self.net.state_dict()
        with torch.random.fork_rng(devices=[]):
            net = create(self.model_name, plan.arguments)
        wanted = {key: value.shape for key, value in net.state_dict().items()}
        if all(key in state and state[key].shape == shape for key, shape in wanted.items()):
            net.load_state_dict({key: state[key] for key in wanted})
            self.plan, self.net = plan, net.train(self.training)

    def forward(self, x: Tensor) -> list[Tensor]:
        height, width = x.shape[2:]
        if not self.any_size and (height, width) != self.imgsz:
            raise ConfigError(
                f"{self.model_name} has a fixed input size - got {height}x{width}, expected the {self.imgsz[0]}x"
                f"{self.imgsz[1]} it was built for. Give this size as --imgsz."
            )
        taps = [
            self._to_common_form(tap_map, i, height, width)
            for i, tap_map in enumerate(self.net(self.normalize(x)))
        ]
        maps = [taps[self.plan.kept[stride]] for stride, _ in self.sources]
        return [
            self.levels[key](m) if key else m
            for m, (_, key) in zip(maps, self.sources, strict=True)
        ]

    def _to_common_form(self, tap_map: Tensor, index: int, height: int, width: int) -> Tensor:
        tap = self.plan.taps[index]
        if self.plan.is_channels_last:
            tap_map = tap_map.permute(0, 3, 1, 2)
        if tap.is_exact:
            return tap_map
        size = (-(-height // tap.stride), -(-width // tap.stride))
        return F.interpolate(tap_map, size, mode="bilinear", align_corners=False)

    def reparameterize(self) -> None:
        """Fold what timm itself can fold (RepVGG, MobileOne, LeViT and the like); in place, idempotent."""
        from timm.utils import reparameterize_model

        if isinstance(self.normalize, InputNorm) and not self.normalize.is_active:
            self.normalize = nn.Identity()
        if not self._is_reparameterized:
            reparameterize_model(self.net, inplace=True)
            self._is_reparameterized = True


def _check(pretrained: object, pyramid_width: object, options: Options) -> None:
    """Refuse arguments of a wrong kind."""
    if not isinstance(pretrained, bool):
        raise LayerError(
            f"got pretrained {pretrained!r}, expected true or false; a file is given as weights: path"
        )
    refused = sorted({"out_indices", "features_only"} & set(options))
    if refused:
        raise LayerError(
            f"got {refused[0]}, which is not for a backbone to be told: the rows that read its maps by stride "
            "decide. Leave it out."
        )
    if not isinstance(pyramid_width, int) or isinstance(pyramid_width, bool) or pyramid_width < 1:
        raise LayerError(f"got pyramid_width {pyramid_width!r}, expected a number of channels")


def _create_net(model_name: str, plan: FeaturePlan, pretrained: bool) -> nn.Module:
    """The timm model, with timm's own weights, from the cache or the hub, where they are asked for."""
    if not pretrained:
        return create(model_name, plan.arguments)
    source = f"timm's weights of {model_name}"
    cached = cached_weights(model_name)
    if not cached and not hub_is_reachable():
        raise CheckpointError(
            f"{source}: are not in the cache, and the hub cannot be reached. {OFFLINE_ADVICE}"
        )
    overlay = {"pretrained_cfg_overlay": {"file": cached}} if cached else {}
    try:
        with foreign_code():
            return create(model_name, {**plan.arguments, **overlay, "pretrained": True})
    except ForeignError as error:
        raise CheckpointError(
            f"{source}: cannot be loaded - {type(error.__cause__).__name__}: {str(error)[:200]}. {OFFLINE_ADVICE}"
        ) from error


def cached_weights(name: str) -> str | None:
    """Path of the weights of timm's model `name` in the cache of the hub; None if they are not there.

    Models whose weights are in a format of their own are left to timm itself.
    """
    import timm
    from huggingface_hub import try_to_load_from_cache

    config = timm.get_pretrained_cfg(bare_name(name))
    if config is None or not config.hf_hub_id or config.custom_load:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    for file in filter(None, (config.hf_hub_filename, *HUB_FILES)):
        path = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(path, str):
            return path
    return None


def hub_is_reachable() -> bool:
    """Whether the hub's name resolves (a proxy would resolve it for us): a quick no instead of minutes of retries."""
    from huggingface_hub import constants

    if getproxies():
        return True
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return False
    return True


def _timm_rule(in_channels: Sequence[Any], args: Sequence[Any], scaling: Scaling) -> Plan:
    """`[pretrained, ...]` becomes `(image size, pretrained, ...)`; an image may have other channels than three."""
    is_image = len(in_channels) == 1 and isinstance(in_channels[0], int) and scaling.strides == (1,)
    if is_image and in_channels[0] != 3:
        return Plan([(*scaling.imgsz, single(in_channels)), *args], None, repeats_inside=True)
    plan = backbone(in_channels, args, scaling)
    return plan._replace(args=[scaling.imgsz, *plan.args])


def find_timm_layer(name: str) -> Layer | None:
    """A timm model as a layer of the registry."""
    return Layer(name, partial(TimmBackbone, name), _timm_rule) if is_timm_model(name) else None
