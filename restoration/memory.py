"""How much memory a picture will take, from the sizes of the network's maps, and how much it may take."""

import torch

from restoration.strips import Program, maps_in_memory
from vision_ssm.device import free_memory, size_text
from vision_ssm.errors import UserError

_WHOLE = 1.6  # measured on a CPU: peak of whole-picture inference over the maps that must exist, 1.1 to 1.5
_SPARE = 0.9  # share of free memory that is used
_ON_HOST = 4  # copies of the picture and of its result as float32 on the host
_STRIPS = {"cpu": 0.18, "cuda": 0.5}  # share of it for the strip that is counted: convolutions take as much again


def whole_bytes(program: Program) -> int:
    """Estimate of the memory that a network takes for a whole picture beside its weights, in bytes."""
    return int(_WHOLE * maps_in_memory(program))


def allowed_bytes(device: torch.device, limit: int | None) -> int:
    """What inference may take: free memory less a reserve, and no more than the user's limit."""
    free = int(free_memory(device) * _SPARE)
    return free if limit is None else min(limit, free)


def strip_bytes(device: torch.device, allowed: int, pixels: int) -> int:
    """The part of the allowed memory that the tensors of a strip may take.

    Args:
        device: on a CPU the picture itself counts too.
        allowed: bytes in all.
        pixels: of the picture or its result, whichever is larger.

    Raises:
        UserError: nothing is left beside the picture.
    """
    if device.type == "cpu":
        own = _ON_HOST * 3 * 4 * pixels
        if own >= allowed:
            raise UserError(
                f"the picture and its result alone take {size_text(own)}, {size_text(allowed)} are allowed; "
                "allow more memory"
            )
        allowed -= own
    return max(int(allowed * _STRIPS.get(device.type, 0.3)), 1)
