"""Losses: (raw predictions, targets) -> named, weighted terms."""
