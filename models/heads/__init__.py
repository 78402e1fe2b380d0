"""Heads: feature maps -> raw predictions -> boxes and scores. `Detect` names two of them, told apart by its arguments."""
