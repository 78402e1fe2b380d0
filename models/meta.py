"""Running a module on the `meta` device: shapes without arithmetic, memory or random numbers.

What PyTorch keeps to itself and this project uses stands here alone: dispatch modes (`torch.utils._python_dispatch`), tensors
that say they are on the CPU (`torch._subclasses`) and the hooks of a module; seen in torch 2.14.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from utils.errors import ForeignError, foreign_code
from utils.trees import map_tensors, tensors_in


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches the calls of `module`."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


class PeakMemory(TorchDispatchMode):
    """Bytes of the tensors that are made in the block and live at one time, at most; what a kernel borrows is not seen.

    Attributes:
        held: bytes alive now.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        outputs = func(*args, **(kwargs or {}))
        for tensor in tensors_in(outputs):
            storage = tensor.untyped_storage()  # the memory itself, which views share
            if storage not in self._known:
                self._known.add(storage)
                self._hold(storage.nbytes())
                weakref.finalize(storage, self._hold, -storage.nbytes())
        return outputs

    def _hold(self, count: int) -> None:
        self.held += count
        self.peak = max(self.peak, self.held)


@contextmanager
def evaluating(module: nn.Module, training: bool = False) -> Iterator[None]:
    """Put `module` in eval mode (or training) for a while; every submodule gets its own mode back."""
    modes = {m: m.training for m in module.modules()}
    module.train(training)
    try:
        yield
    finally:
        for submodule, was_training in modes.items():
            submodule.training = was_training


def run_on_meta(module: nn.Module, *inputs: object) -> Any:
    """The outputs of `module` for meta tensors `inputs`, in eval mode.

    Parameters and buffers are replaced by meta tensors for the call: nothing is computed, no running
    statistic moves and no random number is drawn.
    """
    shapes = _meta_tensors(module)
    with evaluating(module), torch.no_grad():
        try:
            return _call_with(module, shapes, inputs)
        except RuntimeError:  # code that asks for the type of the device, as `torch.autocast` does
            with suppress(ForeignError), foreign_code(), _fake_tensors():
                outputs = _call_with(module, map_tensors(_fake, shapes), map_tensors(_fake, inputs))
                return map_tensors(_as_meta, outputs)
            raise


def run_without_images(module: nn.Module, *inputs: object) -> Any:
    """As `run_on_meta`, for layers of our own: they run as they are, on a batch of no images.

    What works out shapes on the meta device is Python, which imports PyTorch's compiler before it adds two tensors: a second
    and more. What makes (N, ...) of a batch of N makes (0, ...) of none.

    Raises:
        RuntimeError, ValueError: a layer that cannot do with nothing, or inputs that do not fit.
    """
    with evaluating(module), torch.no_grad():
        outputs = module(*map_tensors(_without_images, inputs))
    return map_tensors(_of_one_image, outputs)


def run_for_real(module: nn.Module, *inputs: object) -> Any:
    """As `run_on_meta`, for code that asks for values: a copy of `module` computes on random numbers on the CPU."""
    with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        outputs = copy.deepcopy(module)(*map_tensors(_random, inputs))
    return map_tensors(_as_meta, outputs)


def idle_parameters(
    module: nn.Module, inputs: tuple[object, ...], kept: Sequence[int]
) -> list[str]:
    """Names of the parameters that the outputs number `kept` of `module` do not depend on.

    Found by a backward pass of meta tensors in eval mode; empty for code that cannot be run so.
    """
    shapes = _meta_tensors(module)
    with suppress(ForeignError), foreign_code(), evaluating(module):
        return _without_gradient(module, shapes, inputs, kept)
    with suppress(ForeignError), foreign_code(), _fake_tensors(), evaluating(module):
        return _without_gradient(
            module, map_tensors(_fake, shapes), map_tensors(_fake, inputs), kept
        )
    return []


def train_on_meta(
    module: nn.Module, inputs: tuple[object, ...], memory_format: torch.memory_format
) -> None:
    """One forward and backward pass in training mode on the meta device; `module` is not changed.

    Raises:
        Whatever its code raises.
    """

    def laid_out(value: Tensor) -> Tensor:
        return value.to(memory_format=memory_format) if value.ndim == 4 else value

    tensors = {key: laid_out(value) for key, value in _meta_tensors(module).items()}
    with evaluating(module, training=True):
        _without_gradient(module, tensors, map_tensors(laid_out, inputs), None)


def train_for_real(module: nn.Module, inputs: tuple[object, ...]) -> None:
    """As `train_on_meta`, with random numbers on the CPU and a copy of `module`."""
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        outputs = copy.deepcopy(module).train()(*map_tensors(_random, inputs))
        _total(outputs, None).backward()


def _without_gradient(
    module: nn.Module, tensors: dict[str, Tensor], inputs: object, kept: Sequence[int] | None
) -> list[str]:
    parameters = {
        key: tensors[key].requires_grad_()
        for key, p in module.named_parameters()
        if p.requires_grad
    }
    with torch.enable_grad():
        total = _total(_call_with(module, tensors, inputs), kept)
        if total.requires_grad:  # without, all of them are idle
            total.backward()
    return [key for key, tensor in parameters.items() if tensor.grad is None]


def _total(outputs: Any, kept: Sequence[int] | None) -> Tensor:
    """The sum of the maps number `kept`, or of all."""
    maps = list(outputs.values()) if isinstance(outputs, Mapping) else outputs
    maps = [maps] if isinstance(maps, Tensor) else maps
    return torch.stack([maps[k].sum() for k in (range(len(maps)) if kept is None else kept)]).sum()


def _meta_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, one that stands under two names of a submodule twice."""
    return {
        f"{prefix}.{key}" if prefix else key: torch.empty_like(value, device="meta")
        for prefix, submodule in module.named_modules()  # each once, however many names it has
        for own in (submodule.named_parameters, submodule.named_buffers)
        for key, value in own(recurse=False, remove_duplicate=False)
    }


def _call_with(module: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> Any:
    # Following ties would swap a shared module's tensors once for each of its names, and put the wrong ones back.
    return torch.func.functional_call(module, tensors, inputs, tie_weights=False)


@contextmanager
def _fake_tensors() -> Iterator[None]:
    """New tensors have no memory and say that they are on the CPU; what fails is raised, not logged as well."""
    from torch._subclasses import fake_tensor  # seldom wanted, slow to import

    log = logging.getLogger(fake_tensor.__name__)
    was_disabled, log.disabled = log.disabled, True
    try:
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            yield
    finally:
        log.disabled = was_disabled


def _fake(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype)


def _without_images(value: Tensor) -> Tensor:
    return torch.empty(0, *value.shape[1:], dtype=value.dtype)


def _of_one_image(value: Tensor) -> Tensor:
    if not value.numel() and value.shape[0]:
        raise ValueError(f"got {tuple(value.shape)}, expected the batch in the first place")
    shape = (1, *value.shape[1:]) if not value.numel() else value.shape
    return torch.empty(shape, dtype=value.dtype, device="meta")


def _random(value: Tensor) -> Tensor:
    return torch.rand(value.shape, dtype=value.dtype)


def _as_meta(value: Tensor) -> Tensor:
    return torch.empty(value.shape, dtype=value.dtype, device="meta")
