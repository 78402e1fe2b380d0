"""Blocks of single families, and small layers that backbones share."""
