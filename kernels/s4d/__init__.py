"""S4D, the diagonal state space: contract in op.py, implementations beside it, README.md for the mathematics."""
