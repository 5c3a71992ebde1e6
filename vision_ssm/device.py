"""The device that computes, how much of its memory is free, and amounts of memory as people write them."""

import math
import re
from pathlib import Path

import psutil
import torch

from vision_ssm.errors import UserError

_CGROUP = Path("/sys/fs/cgroup")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def choose_device(device: str | torch.device = "auto") -> torch.device:
    """The device to run on: for "auto" CUDA, else Apple's GPU, else the CPU.

    Raises:
        UserError: not a device, or not on this machine.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"device {str(device)!r} cannot be used: {reason}; take auto, cpu or cuda") from error


def free_memory(device: torch.device) -> int:
    """Bytes that new tensors on a device can take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return max(torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory(), 0)
    return int(min(psutil.virtual_memory().available, _room_in_container()))


def _room_in_container() -> float:
    """Bytes that the container (cgroup v2) of this process may still take; infinite where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        if limit == "max":
            return math.inf
        stat = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        used = int((_CGROUP / "memory.current").read_text())
        reclaimable = int(stat["inactive_file"]) + int(stat["active_file"])
        return max(int(limit) - used + reclaimable, 0)
    except (OSError, ValueError, KeyError):
        return math.inf


def parse_size(text: str) -> int:
    """Bytes of "2GiB", "512M", "1.5 GB" or a plain number; units are powers of 1024.

    Raises:
        UserError: something else, or not positive.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
    if size < 1:
        raise UserError(f"{text!r} is not an amount of memory; write it as 2GiB, 512MiB or in bytes")
    return size


def size_text(size: float) -> str:
    """Bytes for people: 1.5 GiB, 830 MiB."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{max(size / 2**20, 1):.0f} MiB"
