"""A package: parts that import each other relatively."""
from .block import MixerBlock
from .parts import *

__all__ = ["MixerBlock"]
