"""Initialisation under the names of mmcv, from its documentation (Apache-2.0): a weight by some rule, a bias by one number."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

__all__ = [
    "constant_init",
    "normal_init",
    "trunc_normal_init",
    "uniform_init",
    "xavier_init",
    "kaiming_init",
    "caffe2_xavier_init",
    "bias_init_with_prob",
]


def _bias(module: Any, value: float) -> None:
    if getattr(module, "bias", None) is not None:
        nn.init.constant_(module.bias, value)


def constant_init(module: Any, val: float, bias: float = 0) -> None:
    """One value for the weight, one for the bias."""
    if getattr(module, "weight", None) is not None:
        nn.init.constant_(module.weight, val)
    _bias(module, bias)


def normal_init(module: Any, mean: float = 0, std: float = 1, bias: float = 0) -> None:
    """A normal distribution."""
    nn.init.normal_(module.weight, mean, std)
    _bias(module, bias)


def trunc_normal_init(
    module: Any, mean: float = 0, std: float = 1, a: float = -2, b: float = 2, bias: float = 0
) -> None:
    """A normal distribution cut to [a, b]."""
    nn.init.trunc_normal_(module.weight, mean, std, a, b)
    _bias(module, bias)


def uniform_init(module: Any, a: float = 0, b: float = 1, bias: float = 0) -> None:
    """A uniform distribution over [a, b]."""
    nn.init.uniform_(module.weight, a, b)
    _bias(module, bias)


def xavier_init(
    module: Any, gain: float = 1, bias: float = 0, distribution: str = "normal"
) -> None:
    """Glorot's initialisation."""
    fill = nn.init.xavier_uniform_ if distribution == "uniform" else nn.init.xavier_normal_
    fill(module.weight, gain)
    _bias(module, bias)


def kaiming_init(
    module: Any,
    a: float = 0,
    mode: Any = "fan_out",
    nonlinearity: Any = "relu",
    bias: float = 0,
    distribution: str = "normal",
) -> None:
    """He's initialisation."""
    fill = nn.init.kaiming_uniform_ if distribution == "uniform" else nn.init.kaiming_normal_
    fill(module.weight, a, mode, nonlinearity)
    _bias(module, bias)


def caffe2_xavier_init(module: Any, bias: float = 0) -> None:
    """Glorot's uniform initialisation by inputs alone."""
    kaiming_init(module, 1, "fan_in", "leaky_relu", bias, "uniform")


def bias_init_with_prob(prior_prob: float = 0.01) -> float:
    """The bias at which a sigmoid gives `prior_prob` (focal loss, arXiv 1708.02002, section 4.1)."""
    return -math.log((1 - prior_prob) / prior_prob)
