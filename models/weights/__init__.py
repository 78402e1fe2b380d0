"""Weights of any project brought into a model: names, shapes, classes; our own checkpoints."""
