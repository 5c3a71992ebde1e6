"""Checks of what a caller gives: one clear ValueError naming the argument, what came and what is allowed."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MAX_STATE = 256


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ValueError unless `tensor` is None or has `shape`; `meaning` says what the axes are."""
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {meaning} = {tuple(shape)}")


def check_dtypes(x_name: str, x: Tensor, like_x: dict[str, Tensor | None], exact: dict[str, Tensor | None]) -> None:
    """`like_x` tensors have x's dtype or float32, `exact` ones float32; everything float64 when x is."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{x_name}: got dtype {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    for name, t in like_x.items():
        if t is not None and t.dtype not in {x.dtype, wide}:
            allowed = f"{x.dtype} (as {x_name})" + (f" or {wide}" if wide != x.dtype else "")
            raise ValueError(f"{name}: got dtype {t.dtype}, expected {allowed}")
    for name, t in exact.items():
        if t is not None and t.dtype != wide:
            raise ValueError(f"{name}: got dtype {t.dtype}, expected {wide} for {x_name} in {x.dtype}")


def check_layout(x_name: str, x: Tensor, large: dict[str, Tensor | None], others: dict[str, Tensor | None]) -> None:
    """x not empty, all tensors on x's device, the last axis of the large ones contiguous (they are never copied)."""
    if x.numel() == 0:
        raise ValueError(f"{x_name}: got an empty tensor of shape {tuple(x.shape)}, every axis must be at least 1")
    for name, t in {**large, **others}.items():
        if t is not None and t.device != x.device:
            raise ValueError(f"{name}: is on {t.device}, {x_name} is on {x.device}; move them to one device")
    for name, t in {x_name: x, **large}.items():
        if t is not None and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise ValueError(
                f"{name}: the last axis must be contiguous, got strides {tuple(t.stride())}; "
                "keep channels last (x.movedim(1, -1).contiguous() for a channels-first tensor)"
            )


def check_state_size(A: Tensor) -> None:
    """The state size is A's last axis, 1 to 256."""
    if not 1 <= A.shape[-1] <= MAX_STATE:
        raise ValueError(f"A: got a state size of {A.shape[-1]} (last axis), expected 1 to {MAX_STATE}")


def check_groups(channels: int, groups: int) -> None:
    """B's groups divide the channels."""
    if groups < 1 or channels % groups:
        raise ValueError(f"B: got {groups} groups for {channels} channels, the groups must divide the channels")
