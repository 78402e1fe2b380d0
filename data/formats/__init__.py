"""Annotation files: each reader has `find(config, split)` and `read(config, split, listing)`."""
