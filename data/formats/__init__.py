"""Readers of annotation files: each has `find(config, split)` and `read(config, split, listing)`."""
