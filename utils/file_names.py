"""Moved to `utils.files`."""

from utils.files import FreeNames

__all__ = ["FreeNames"]
