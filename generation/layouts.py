"""The order in which a DiM reads a video: one letter per layer, so that a model's plan is one short string."""

from typing import Literal, get_args

from torch import Tensor

from vision_ssm.errors import UserError

# Shapes: B batch, F frames, L places (tokens) per frame, D channels.

Letter = Literal["s", "t", "j"]
"""``s`` scans the places of each frame, ``t`` the frames at each place, ``j`` all places frame by frame."""


def expand_layout(layout: str, depth: int) -> list[Letter]:
    """Repeat a pattern of letters over the layers, cut off at the last one: ("sst", 4) -> s, s, t, s.

    Raises:
        UserError: The pattern is empty or has other letters, or there is no layer.
    """
    letters: dict[str, Letter] = {letter: letter for letter in get_args(Letter)}
    if not layout or any(letter not in letters for letter in layout):
        raise UserError(
            f"layout must be made of s (places of a frame), t (frames at a place) and j (both jointly), "
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
