"""Parameter groups, optimisers and the course of their rates."""

import math
from typing import Any

import torch
from torch import nn

from vision_ssm.training.config import OptimConfig, ScheduleConfig


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in three named groups: ``decay``, ``no_decay`` and ``bias``.

    ``bias`` holds every parameter with "bias" in its name, ``no_decay`` the weights of normalisation layers and the
    parameters that the model marks with an attribute ``_no_weight_decay = True`` or, as timm's networks do, names by a
    method ``no_weight_decay()``; all others decay. Empty groups are left out.
    """
    members: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], "bias": []}
    seen: set[int] = set()
    named = getattr(model, "no_weight_decay", set)()
    for prefix, module in model.named_modules():
        is_norm = "Norm" in type(module).__name__  # also those of timm and our own
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if "bias" in name:
                members["bias"].append(parameter)
            elif is_norm or getattr(parameter, "_no_weight_decay", False) or f"{prefix}.{name}".lstrip(".") in named:
                members["no_decay"].append(parameter)
            else:
                members["decay"].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, parameters in members.items()
        if parameters
    ]


def build_optimizer(model: nn.Module, config: OptimConfig, weight_decay: float) -> torch.optim.Optimizer:
    """torch's optimiser over ``parameter_groups``; fused, because a fused one can skip a step without a host sync."""
    groups = parameter_groups(model, weight_decay)
    if config.name == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)


def decay_factor(config: ScheduleConfig, done: float) -> float:
    """Learning rate relative to its peak when the share ``done`` (0 to 1) of the run is over; warm-up left out."""
    if config.kind == "constant":
        return 1.0
    falling = 1 - done if config.kind == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.final_ratio + (1 - config.final_ratio) * falling


def set_rates(
    optimizer: torch.optim.Optimizer,
    optim: OptimConfig,
    schedule: ScheduleConfig,
    *,
    done: float,
    warm: float,
) -> float:
    """Set learning rate and momentum of every group for one step, and return the learning rate of the weights.

    Args:
        done: Share of the run that is over, 0 to 1.
        warm: Share of the warm-up that is over, 0 to 1.
    """
    peak = optim.lr * decay_factor(schedule, done)
    for group in optimizer.param_groups:
        start = schedule.warmup_bias_lr if group["name"] == "bias" else 0.0
        group["lr"] = start + (peak - start) * warm
        if "momentum" in group and optim.momentum > 0:
            group["momentum"] = schedule.warmup_momentum + (optim.momentum - schedule.warmup_momentum) * warm
    return peak * warm
