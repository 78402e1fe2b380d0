"""SGD whose step on dense filters is partly an orthogonal one.

Sources: Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) for the iteration and its coefficients;
Moonlight (arXiv 2502.16982) for the factor that makes a step as large as Adam's; YOLO26 (arXiv 2606.03748) for the sum with SGD's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # of an Adam step's entries, which an orthogonal matrix is scaled to


def orthogonalize(matrix: Tensor) -> Tensor:
    """Bring the singular values of (rows, columns) near 1 by Newton-Schulz iterations, in float32 or wider."""
    a, b, c = COEFFICIENTS
    wide = matrix.float() if matrix.dtype in (torch.float16, torch.bfloat16) else matrix
    is_tall = wide.shape[0] > wide.shape[1]
    x = wide.mT if is_tall else wide
    x = x / x.norm().clamp(min=torch.finfo(x.dtype).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class MuSGD(Optimizer):
    """SGD with Nesterov momentum; groups with `muon: True` add the orthogonalised direction.

    For momentum m = momentum * m + g and n = g + momentum * m, a parameter moves by
    -lr * (share * .2 * sqrt(max(rows, columns)) * orthogonalize(n) + (1 - share) * n + decay * parameter), where a filter
    (out, in, height, width) is a matrix of `out` rows. In other groups it is SGD.

    Args:
        params: parameters or groups; a group may say `muon`, and only of parameters with two dimensions or more.
        lr: learning rate.
        momentum: of the gradients.
        weight_decay: of the parameters.
        share: part of the orthogonal step.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        share: float = 0.5,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "share": share,
            "muon": False,
        }
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)
        return loss

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state, momentum, lr = self.state[parameter], group["momentum"], group["lr"]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(momentum).add_(gradient)
        direction = gradient + momentum * buffer
        parameter.mul_(1 - lr * group["weight_decay"])
        if not group["muon"]:
            parameter.sub_(direction, alpha=lr)
            return
        matrix = direction.reshape(len(direction), -1)
        size = RMS * max(matrix.shape) ** 0.5
        turned = orthogonalize(matrix).view_as(direction).to(parameter.dtype)
        parameter.sub_(turned, alpha=lr * group["share"] * size)
        parameter.sub_(direction, alpha=lr * (1 - group["share"]))
