"""A study: configs over backbones, trained, measured and compared; what `compare.py --epochs N` runs."""
