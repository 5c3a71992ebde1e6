"""The order in which a DiM reads a video: one letter per layer, so that a model's plan is one short string."""

from typing import Literal, get_args

import torch
from torch import Tensor

from vision_ssm.errors import UserError

# Shapes: B batch, F frames, L places (tokens) per frame, D channels.

Letter = Literal["s", "c", "t", "j"]
"""``s`` scans the places of each frame row by row, ``c`` column by column, ``t`` the frames at each place, ``j`` all
places frame by frame."""
TEMPORAL = ("t", "j")
"""Letters of layers that see more than one frame."""


def expand_layout(layout: str, depth: int) -> list[Letter]:
    """Repeat a pattern of letters over the layers, cut off at the last one: ("sst", 4) -> s, s, t, s.

    Raises:
        UserError: The pattern is empty or has other letters, or there is no layer.
    """
    letters: dict[str, Letter] = {letter: letter for letter in get_args(Letter)}
    if not layout or any(letter not in letters for letter in layout):
        raise UserError(
            f"layout must be made of s (places of a frame by rows), c (by columns), t (frames at a place) and j (both "
            f"jointly), "
            f'such as "s" for images or "sst" for video; got {layout!r}'
        )
    if depth < 1:
        raise UserError(f"depth must be at least 1 layer, got {depth}")
    return [letters[layout[i % len(layout)]] for i in range(depth)]


def scanned(x: Tensor, letter: Letter) -> tuple[Tensor, int]:
    """The view of (B, F, L, D) that a layer reads and the axis along which it reads; nothing is copied."""
    if letter == "j":
        return x.flatten(1, 2), 1
    return x, 1 if letter == "t" else 2


def turned(x: Tensor, rows: int, columns: int) -> Tensor:
    """Places of (B, F, L, D) column by column instead of row by row; tokens in front of them stay there.

    Args:
        x: L is ``rows * columns`` and as many more as stand in front.
        rows: Of places.
        columns: Of places; with both exchanged the order is as before.
    """
    front = x.shape[2] - rows * columns
    places = x[:, :, front:].unflatten(2, (rows, columns)).transpose(2, 3).flatten(2, 3)
    return torch.cat([x[:, :, :front], places], dim=2) if front else places
