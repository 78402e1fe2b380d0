"""Which pairs of a recorded run can be folded, and folding them.

A pair is folded only where the record proves it exact: the layer runs once, with a weight of its
own that nothing else uses, and nothing but the norm reads what the layer made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from models.fusing.dataflow import Call, Operation, Record, Value
from models.fusing.folding import (
    FOLDABLE,
    Affine,
    can_fold_before,
    fold_before,
    fold_behind,
    read_affine,
)


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
    """

    def __init__(self, model: nn.Module, record: Record, names: dict[nn.Module, str]) -> None:
        self.model = model
        self.record = record
        self.folded: list[str] = []
        self.left: dict[str, str] = {}
        self.names = names | {module: name for name, module in model.named_modules()}
        self.owners: dict[int, list[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append(module)
        self.stands_for: dict[Value, Value] = {}
        self.changed: set[Value] = set()
        self.settled: set[nn.Module] = set()  # folded once: the bias is theirs, perhaps a new one
        self.replaced: dict[nn.Module, nn.Module] = {}

    def run(self) -> None:
        """Fold everything."""
        waiting: list[tuple[Call, Affine]] = []
        for call in list(self.record.calls):
            affine = self._affine_of(call)
            if affine is None:
                continue
            try:
                self._fold_back(call, affine)
            except NotFoldedError as reason:
                waiting.append((call, affine))
                self.left[self.names[call.module]] = str(reason)
        for call, affine in waiting:
            name = self.names[call.module]
            try:
                rest = self._fold_forward(call, affine)
            except NotFoldedError as reason:
                if call.input is None or self.record.maker(call.input) is None:
                    self.left[name] = str(reason)  # nothing stands before it
                continue
            self.left[name] = rest
            if not rest:
                del self.left[name]

    def changed_modules(self) -> set[nn.Module]:
        """Modules whose own output is rightly another one now."""
        return {c.module for c in self.record.calls if not self.changed.isdisjoint(c.results)}

    def _affine_of(self, call: Call) -> Affine | None:
        if call.input is None or call.output is None or call.module is self.model:
            return None
        return read_affine(call.module, self.record.shape(call.input))

    def _fold_back(self, call: Call, affine: Affine) -> None:
        """Fold `affine` into the layer that made its input."""
        assert call.input is not None and call.output is not None
        self._require_plain(call)
        value = self._only_read_inside(call.input, call)
        made_by = self.record.maker(value)
        layer, channels_last = self._layer_of(made_by, value)
        axis = affine.axis % len(self.record.shape(call.input))
        expected = len(self.record.shape(call.input)) - 1 if channels_last else 1
        if axis != expected or affine.scale.numel() != _out_channels(layer):
            raise NotFoldedError("its channels are not those of the layer before it")
        fold_behind(layer, affine)
        self.settled.add(layer)
        self.changed.add(call.input)
        if affine.rest is None:
            self.stands_for[call.output] = value
        self._replace(call.module, affine.rest)
        self.folded.append(f"{self.names[layer]} + {self.names[call.module]}")

    def _fold_forward(self, call: Call, affine: Affine) -> str:
        """Fold `affine` into the only layer that reads its output; what stays of it, in words."""
        assert call.output is not None
        self._require_plain(call)
        if affine.rest is not None:
            raise NotFoldedError("an activation follows")
        if call.output in self.record.outputs:
            raise NotFoldedError("its output is an output of the network")
        readers = self.record.readers.get(call.output, [])
        if len(readers) != 1:
            raise NotFoldedError(f"its output has {len(readers)} readers")
        value, operation, is_padded = self._behind_padding(call.output, readers[0])
        layer = self._weight_owner(operation)
        if operation.reads[0] != value and operation.name == "convolution":
            raise NotFoldedError("it is not the input of the layer behind it")
        axis = affine.axis % len(self.record.shape(call.output))
        expected = len(self.record.shape(call.output)) - 1 if isinstance(layer, nn.Linear) else 1
        if axis != expected:
            raise NotFoldedError("its channels are not those of the layer behind it")
        shifts_padding = is_padded and bool(affine.shift.any())
        if shifts_padding or not can_fold_before(layer, affine):
            return self._fold_scale(call, affine, layer)
        fold_before(layer, affine)
        self._settle(call, layer)
        self._replace(call.module, None)
        return ""

    def _fold_scale(self, call: Call, affine: Affine, layer: Any) -> str:
        """Fold the scale of a module that can do its shift first and alone: zeros around an image are not shifted."""
        split = getattr(call.module, "without_scale", None)
        if split is None or not can_fold_before(layer, affine._replace(shift=affine.shift * 0)):
            raise NotFoldedError("the layer behind it pads with zeros, which are not shifted")
        fold_before(layer, affine._replace(shift=affine.shift * 0))
        self._settle(call, layer)
        self._replace(call.module, split())
        return f"its mean is subtracted before {self.names[layer]}, which pads with zeros"

    def _settle(self, call: Call, layer: Any) -> None:
        """Note that `layer` does the work of `call` from now on."""
        assert call.output is not None
        self.settled.add(layer)
        self.changed.add(call.output)
        self.folded.append(f"{self.names[call.module]} + {self.names[layer]}")

    def _behind_padding(self, value: Value, reader: int) -> tuple[Value, Operation, bool]:
        """The operation behind zeros that are put around `value`, what it reads, and whether there are any."""
        operation = self.record.operations[reader]
        is_padded = False
        while operation.name == "constant_pad_nd" and not _pads_with(operation):
            value = operation.writes[0]
            self.changed.add(value)
            readers = self.record.readers.get(value, [])
            if len(readers) != 1 or value in self.record.outputs:
                raise NotFoldedError(f"its padded output has {len(readers)} readers")
            operation, is_padded = self.record.operations[readers[0]], True
        return value, operation, is_padded

    def _require_plain(self, call: Call) -> None:
        count = len(self.record.calls_of(call.module))
        if count != 1:
            raise NotFoldedError(f"it is called {count} times")
        if has_hooks(call.module):
            raise NotFoldedError("a hook watches it")

    def _only_read_inside(self, value: Value, call: Call) -> Value:
        """The value behind `value` (a folded module stands for its input), if only `call` reads
        it."""
        if value in self.record.outputs:
            raise NotFoldedError("its input is an output of the network too")
        outside = [i for i in self.record.readers.get(value, []) if not call.first <= i < call.last]
        if outside:
            raise NotFoldedError(f"its input has {len(outside) + 1} readers")
        return self.stands_for.get(value, value)

    def _layer_of(self, operation: Operation | None, value: Value) -> tuple[Any, bool]:
        """The layer that made `value`, and whether its channels come last."""
        while operation is not None and operation.name in ("view", "_unsafe_view"):
            inner = operation.reads[0]
            readers = self.record.readers[inner]
            if len(readers) != 1 or self.record.shape(inner)[-1] != self.record.shape(value)[-1]:
                break
            operation = self.record.maker(inner)
        if operation is None:
            raise NotFoldedError("its input is an input of the network")
        layer = self._weight_owner(operation)
        if operation.name in ("view", "_unsafe_view"):
            raise NotFoldedError("its input is not made by a convolution or linear layer")
        return layer, isinstance(layer, nn.Linear)

    def _weight_owner(self, operation: Operation) -> Any:
        """The module whose weight `operation` applies, if nothing else applies it."""
        if operation.name not in ("convolution", "addmm", "mm", "linear"):
            raise NotFoldedError(
                f"next to it is {operation.name}, not a convolution or linear layer"
            )
        for tensor in (leaf for leaf in operation.args if isinstance(leaf, Tensor)):
            weight = self._behind_transpose(tensor)
            owners = self.owners.get(id(weight), [])
            fitting = [m for m in owners if isinstance(m, FOLDABLE) and m.weight is weight]
            if not fitting:
                continue
            if len(owners) > 1:
                raise NotFoldedError(
                    f"{len(owners)} layers share the weight of {self.names[fitting[0]]}"
                )
            self._require_single_use(fitting[0])
            return fitting[0]
        raise NotFoldedError("the weight of the layer next to it is computed, not a parameter")

    def _behind_transpose(self, tensor: Tensor) -> Tensor:
        made_by = self.record.maker(self.record.value(tensor))
        if made_by is not None and made_by.name in ("t", "transpose", "permute"):
            return made_by.args[0]
        return tensor

    def _require_single_use(self, layer: Any) -> None:
        name = self.names[layer]
        uses = self.record.readers.get(self.record.value(layer.weight), [])
        if len(uses) != 1:
            raise NotFoldedError(f"{name} is used {len(uses)} times")
        if layer.bias is not None and layer not in self.settled:
            if len(self.owners.get(id(layer.bias), [])) != 1:
                raise NotFoldedError(f"the bias of {name} is shared or computed")
            if len(self.record.readers.get(self.record.value(layer.bias), [])) != 1:
                raise NotFoldedError(f"the bias of {name} is used elsewhere")
        if has_hooks(layer):
            raise NotFoldedError(f"a hook watches {name}")

    def _replace(self, module: nn.Module, rest: nn.Module | None) -> None:
        new = nn.Identity() if rest is None else rest
        new.train(module.training)
        if rest is None:
            self.replaced[new] = module
        for parent in self.model.modules():
            for name, child in parent._modules.items():
                if child is module:
                    parent._modules[name] = new


def _pads_with(operation: Operation) -> float:
    """The number that a padding puts around its input."""
    return float(operation.args[2]) if len(operation.args) > 2 else 0.0


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _out_channels(layer: Any) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
