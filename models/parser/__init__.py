"""From the rows of a model YAML to modules that are wired together."""
