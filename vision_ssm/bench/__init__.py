"""Measurements of what several tasks share: `vssm bench kernels`. Importing this package loads nothing heavy."""
