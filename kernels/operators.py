"""What the torch operators of this package have in common."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import torch
from torch import Tensor

from .dispatch import choose_backend, why_not


def as_given(x: Tensor) -> AbstractContextManager:
    """Context without autocast, which would cast the matrix products inside down to half precision."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def choose_without_c(name: str, backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """`choose_backend` for an operator that has no C form.

    Raises:
        ValueError: C was asked for, or the name is unknown.
        RuntimeError: the back end asked for cannot run here.
    """
    if backend == "c":
        raise ValueError(f"{name} has no backend='c'; choose one of auto, reference, torch, triton")
    if backend == "auto":
        return "torch" if why_not("triton", device, dtype) else "triton"
    return choose_backend(backend, device, dtype)


def refuse_second_derivative(name: str) -> Callable[..., NoReturn]:
    """What an operator's own backward pass has for a backward pass."""

    def refuse(*_: object) -> NoReturn:
        raise RuntimeError(
            f"{name}: second derivatives exist only in the reference back end; pass backend='reference' (slow), "
            "or call backward without create_graph"
        )

    return refuse
