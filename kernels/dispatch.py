"""Which back end runs a scan, and why."""

import importlib.util
import logging
from functools import cache

import torch

BACKENDS = ("reference", "torch", "c", "triton")
"""Every back end by name; `auto` takes the fastest that can run."""

_log = logging.getLogger("kernels")
_said: set[tuple[str, str]] = set()


@cache
def _triton_problem() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (it exists for Linux; pip install triton)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    return ""


@cache
def _c_problem() -> str:
    from .selective_scan import c_path

    usable, reason = c_path.available()
    return "" if usable else reason


def backends() -> dict[str, str]:
    """Back end name -> "" where it can run on this machine, else the reason why not."""
    return {"reference": "", "torch": "", "c": _c_problem(), "triton": _triton_problem()}


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The reason why `backend` cannot scan tensors of this device and dtype; "" when it can."""
    if backend in ("reference", "torch"):
        return ""
    kind, place = ("cpu", "the CPU") if backend == "c" else ("cuda", "a GPU")
    if device.type != kind:
        return f"it runs on {place}, the tensors are on {device}"
    if dtype == torch.float64:
        return "it computes in float32, the tensors are float64"
    return _c_problem() if backend == "c" else _triton_problem()


def choose_backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """The back end that `backend` (a name or "auto") means for tensors of this device and dtype.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the back end asked for cannot run here; the message says why.
    """
    if backend == "auto":
        name = next(b for b in ("triton", "c", "torch") if not why_not(b, device, dtype))
        _say_once(name, device, dtype)
        return name
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; choose one of auto, {', '.join(BACKENDS)}")
    problem = why_not(backend, device, dtype)
    if problem:
        raise RuntimeError(f"backend={backend!r} cannot run here: {problem}; use backend='auto'")
    return backend


def _say_once(name: str, device: torch.device, dtype: torch.dtype) -> None:
    key = (name, f"{device.type} {dtype}")
    if key not in _said and not torch.compiler.is_compiling():
        _said.add(key)
        _log.info("scans of %s tensors on %s run on the %s back end", dtype, device.type, name)
