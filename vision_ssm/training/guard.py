"""Finds losses and gradients that are not finite, keeps the weights as they were, and names the layer."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class NonFiniteGuard:
    """Watches every step on the device and freezes the weights from the first bad one on.

    The flag is handed to the fused optimiser as its ``found_inf`` (the protocol of torch's GradScaler), which then
    skips the update. So the host need not wait for the device at each step: whenever it looks, however late, the
    weights are still those with which the first bad batch can be repeated.
    """

    def __init__(self, device: torch.device) -> None:
        self.tripped = torch.zeros((), device=device)
        self.good_steps = torch.zeros((), dtype=torch.long, device=device)

    def observe(self, finite: Tensor) -> Tensor:
        """Take note of one step (``finite``: a scalar bool); returns the flag for the optimiser."""
        self.tripped = torch.maximum(self.tripped, 1 - finite.float())
        self.good_steps += (self.tripped == 0).long()
        return self.tripped

    def steps_before_first_bad(self) -> int | None:
        """How many good steps there were before the first bad one; None without a bad one. Waits for the device."""
        return int(self.good_steps) if bool(self.tripped) else None


def name_non_finite(model: nn.Module, loss: Callable[[nn.Module], dict[str, Tensor]], batch: Any) -> str | None:
    """Repeat a forward and backward pass and say where the first value that is not finite appears.

    Args:
        model: The model with the weights of that step; its gradients are lost.
        loss: Gives the losses of the batch for a model.
        batch: The batch, which is looked at first.

    Returns:
        A phrase such as ``the output of layer "stem.conv" (Conv2d)``, or None if everything is finite.
    """
    found: list[str] = []
    if not all_finite(batch):
        return "the input batch itself"
    handles = [module.register_forward_hook(_output_hook(name, found)) for name, module in model.named_modules()]
    handles += [
        parameter.register_hook(_gradient_hook(name, found))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]
    try:
        losses = loss(model)
        found += [f'the loss "{name}"' for name, value in losses.items() if not all_finite(value)]
        if not found:
            losses["loss"].backward()
    finally:
        _remove(handles)
        model.zero_grad()
    return found[0] if found else None


def all_finite(value: Any) -> bool:
    """Whether every floating-point tensor in a tensor, or in nested lists, tuples and dicts of them, is finite."""
    if isinstance(value, Tensor):
        return not (value.is_floating_point() or value.is_complex()) or bool(torch.isfinite(value).all())
    if isinstance(value, dict):
        return all(all_finite(item) for item in value.values())
    if isinstance(value, list | tuple):
        return all(all_finite(item) for item in value)
    return True


def _output_hook(name: str, found: list[str]) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not found and not all_finite(output):
            found.append(f'the output of layer "{name or "model"}" ({type(module).__name__})')

    return hook


def _gradient_hook(name: str, found: list[str]) -> Callable[[Tensor], None]:
    def hook(gradient: Tensor) -> None:
        if not found and not all_finite(gradient):
            found.append(f'the gradient of parameter "{name}"')

    return hook


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
