"""Hydra configs of the command lines: data, no code."""
