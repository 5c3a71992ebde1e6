"""Operators of state-space models: Triton on GPUs, C or plain torch on CPUs, an obvious reference beside each.

Imports torch and nothing else; Triton only when a GPU tensor arrives.
"""

from .causal_conv1d.op import causal_conv1d
from .dispatch import backends, choose_backend
from .s4d.op import s4d
from .selective_scan.op import selective_scan, selective_scan_2d, selective_scan_summary
from .ssd.op import ssd, ssd_2d, ssd_bidirectional, ssd_noncausal

__all__ = [
    "backends",
    "causal_conv1d",
    "choose_backend",
    "s4d",
    "selective_scan",
    "selective_scan_2d",
    "selective_scan_summary",
    "ssd",
    "ssd_2d",
    "ssd_bidirectional",
    "ssd_noncausal",
]
