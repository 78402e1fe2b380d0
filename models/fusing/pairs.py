"""Which pairs of a recorded run can be folded, and folding them.

A pair is folded only where the record shows it exact: the layer runs once, with a weight of its own that nothing else
uses, and nothing but the norm reads what the layer made.
"""

from __future__ import annotations

from collections import Counter

from torch import nn
from torch.nn import functional

from models.fusing.flow import Call, Record, Use, Value
from models.fusing.folding import (
    FOLDABLE,
    Affine,
    Layer,
    TellsAffine,
    can_fold_before,
    fold_before,
    fold_behind,
    read_affine,
)
from models.meta import has_hooks

LAYERS = (functional.linear, functional.conv1d, functional.conv2d, functional.conv3d,
          functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d)  # fmt: skip
RESHAPES = ("view", "reshape", "flatten", "unflatten")


class NotFoldedError(Exception):
    """Why a module is not folded."""


class Folder:
    """Folds what one record allows.

    Args:
        model: the recorded network.
        record: of one run in eval mode.
        names: what modules are called, those of the training form included.

    Attributes:
        folded: pairs, "layer + norm" or "norm + layer".
        left: norms and layer scales that stay, and why.
        replaced: what was put in place of a norm -> the norm.
        changed: values that are rightly others now.
    """

    def __init__(self, model: nn.Module, record: Record, names: dict[nn.Module, str]) -> None:
        self.model = model
        self.record = record
        self.folded: list[str] = []
        self.left: dict[str, str] = {}
        self.replaced: dict[nn.Module, nn.Module] = {}
        self.changed: set[Value] = set()
        self.names = names | {module: name for name, module in model.named_modules()}
        self._calls = Counter(call.module for call in record.calls)
        self._stands_for: dict[Value, Value] = {}
        self._owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
                self._owners.setdefault(id(parameter), []).append((module, key))

    def run(self) -> None:
        """Fold every norm and layer scale into the layer before it, or else into the one behind it."""
        for call in self.record.calls:
            if call.input is None or call.output is None or call.module is self.model:
                continue
            affine = read_affine(call.module, self.record.tensors[call.input[0]].shape)
            if affine is None:
                continue
            try:
                left = self._fold(call, affine, call.input, call.output)
            except NotFoldedError as reason:
                left = str(reason)
            if left:
                self.left[self.names[call.module]] = left

    def _fold(self, call: Call, affine: Affine, given: Value, made: Value) -> str:
        """Fold one; what stays of it, in words."""
        if self._calls[call.module] != 1:
            raise NotFoldedError(f"it is called {self._calls[call.module]} times")
        if has_hooks(call.module):
            raise NotFoldedError("a hook watches it")
        try:
            self._fold_back(call, affine, given, made)
            return ""
        except NotFoldedError as reason:
            try:
                return self._fold_forward(call, affine, made)
            except NotFoldedError:
                if given not in self.record.makers:  # nothing stands before it
                    raise
            raise reason

    def _fold_back(self, call: Call, affine: Affine, given: Value, made: Value) -> None:
        """Fold `affine` into the layer that made its input."""
        if given in self.record.outputs:
            raise NotFoldedError("its input is an output of the network too")
        readers = [use.number for use in self.record.readers.get(given, [])]
        outside = [number for number in readers if not call.first <= number < call.last]
        if outside:
            raise NotFoldedError(f"its input has {len(outside) + 1} readers")
        value = self._stands_for.get(given, given)  # a folded module stands for its input
        layer = self._layer_of(self._maker_of(value))
        width = layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
        if not self._has_axis(layer, affine, given) or affine.scale.numel() != width:
            raise NotFoldedError("its channels are not those of the layer before it")
        fold_behind(layer, affine)
        self.changed.add(given)
        if affine.rest is None:
            self._stands_for[made] = value
        self._replace(call.module, affine.rest)
        self.folded.append(f"{self.names[layer]} + {self.names[call.module]}")

    def _fold_forward(self, call: Call, affine: Affine, made: Value) -> str:
        """Fold `affine` into the only layer that reads its output; what stays of it, in words."""
        if affine.rest is not None:
            raise NotFoldedError("an activation follows")
        value, use, is_padded = made, self._only_reader(made), False
        while use.function is functional.pad and _pads_with_zeros(*use.args, **use.options):
            value, is_padded = use.writes[0], True
            self.changed.add(value)
            use = self._only_reader(value)
        layer = self._layer_of(use)
        if use.reads[0] != value or not self._has_axis(layer, affine, made):
            raise NotFoldedError("its channels are not those of the layer behind it")
        rest, left = None, ""
        if (is_padded and bool(affine.shift.any())) or not can_fold_before(layer, affine):
            affine = affine._replace(shift=affine.shift * 0)
            if not isinstance(call.module, TellsAffine) or not can_fold_before(layer, affine):
                raise NotFoldedError("the layer behind it pads with zeros, which are not shifted")
            rest = call.module.without_scale()
            left = f"its mean is subtracted before {self.names[layer]}, which pads with zeros"
        fold_before(layer, affine)
        self.changed.add(made)
        self.folded.append(f"{self.names[call.module]} + {self.names[layer]}")
        self._replace(call.module, rest)
        return left

    def _has_axis(self, layer: Layer, affine: Affine, value: Value) -> bool:
        """Whether the channels of `value` that `affine` means are those of `layer`."""
        dimensions = self.record.tensors[value[0]].ndim
        expected = dimensions - 1 if isinstance(layer, nn.Linear) else 1
        return affine.axis % dimensions == expected

    def _only_reader(self, value: Value) -> Use:
        readers = self.record.readers.get(value, [])
        if value in self.record.outputs:
            raise NotFoldedError("its output is an output of the network")
        if len(readers) != 1:
            raise NotFoldedError(f"its output has {len(readers)} readers")
        return readers[0]

    def _maker_of(self, value: Value) -> Use:
        """What made `value`, perhaps in another shape with the same last axis."""
        use = self.record.makers.get(value)
        while use is not None and use.name in RESHAPES:
            inner = use.reads[0]
            width, inner_width = (self.record.tensors[v[0]].shape[-1] for v in (value, inner))
            if width != inner_width or len(self.record.readers[inner]) != 1:
                break
            use = self.record.makers.get(inner)
        if use is None:
            raise NotFoldedError("its input is an input of the network")
        return use

    def _layer_of(self, use: Use) -> Layer:
        """The module whose weight `use` applies, if nothing else applies it."""
        if use.function not in LAYERS:
            raise NotFoldedError(f"next to it is {use.name}, not a convolution or linear layer")
        weight = use.args[1] if len(use.args) > 1 else use.options.get("weight")
        owners = self._owners.get(id(weight), [])
        layer = next((m for m, k in owners if k == "weight" and isinstance(m, FOLDABLE)), None)
        if layer is None:
            raise NotFoldedError("the weight of the layer next to it is computed, not a parameter")
        for parameter in (layer.weight, layer.bias):
            if parameter is None:
                continue
            uses = self.record.readers.get((id(parameter), 0), [])
            is_shared = len(self._owners.get(id(parameter), [])) > 1 or len(uses) > 1
            if is_shared or not isinstance(parameter, nn.Parameter):
                raise NotFoldedError(
                    f"{self.names[layer]} is used {len(uses)} times, or its parameters elsewhere"
                )
        if has_hooks(layer):
            raise NotFoldedError(f"a hook watches {self.names[layer]}")
        return layer

    def _replace(self, module: nn.Module, rest: nn.Module | None) -> None:
        new = nn.Identity() if rest is None else rest
        new.train(module.training)
        if rest is None:
            self.replaced[new] = module
        for path, child in list(self.model.named_modules(remove_duplicate=False)):
            if child is module:
                put(self.model, path, new)


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Let `module` stand at `path` in `model`."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent).register_module(name, module)


def _pads_with_zeros(
    x: object, sizes: object, mode: object = "constant", value: object = None
) -> bool:
    """The arguments of `functional.pad`, read."""
    return mode == "constant" and not value
