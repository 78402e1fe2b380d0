"""The models of timm as backbones."""
