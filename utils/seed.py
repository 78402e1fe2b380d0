"""Moved to `utils.device`."""

from utils.device import seed_everything

__all__ = ["seed_everything"]
