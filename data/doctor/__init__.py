"""What is wrong with a data set, or odd about it; see `data/check.py`."""
