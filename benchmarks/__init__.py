"""Measurements; each is a script that prints what it found."""
