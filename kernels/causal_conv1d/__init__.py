"""Depthwise causal convolution: contract in op.py, implementations beside it, README.md for the mathematics."""
