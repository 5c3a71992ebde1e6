"""Operators of state-space models: Triton on GPUs, C or plain torch on CPUs, an obvious reference beside each.

Imports torch and nothing else; Triton only when a GPU tensor arrives.
"""

from .dispatch import backends, choose_backend
from .selective_scan.op import selective_scan, selective_scan_2d, selective_scan_summary

__all__ = ["backends", "choose_backend", "selective_scan", "selective_scan_2d", "selective_scan_summary"]
