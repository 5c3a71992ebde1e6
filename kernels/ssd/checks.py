"""Checks of what a caller of SSD gives: one clear ValueError naming the argument, what came and what is allowed."""

from collections.abc import Sequence

from torch import Tensor

from ..selective_scan.checks import MAX_STATE, check_dtypes, check_layout, check_shape


def check_axis(x: Tensor, dim: int) -> int:
    """`dim` counted from the front; x is (..., heads, head_dim) and any axis but the last two can be scanned."""
    if x.ndim < 3:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected at least (length, heads, head_dim)")
    axis = dim + x.ndim if dim < 0 else dim
    if not 0 <= axis < x.ndim - 2:
        raise ValueError(
            f"dim: got {dim} for x of shape {tuple(x.shape)}; any axis but the last two (heads, head_dim) is allowed"
        )
    return axis


def check_chunk(chunk: int) -> None:
    """A chunk has at least one position."""
    if chunk < 1:
        raise ValueError(f"chunk: got {chunk}, expected a number of positions of at least 1 (64 to 256 are usual)")


def check_directions(directions: Sequence[str], allowed: Sequence[str]) -> None:
    """Different names out of `allowed`."""
    unknown = [d for d in directions if d not in allowed]
    if isinstance(directions, str) or unknown or not directions or len(set(directions)) < len(directions):
        raise ValueError(f"directions: got {directions!r}, expected different ones of {', '.join(allowed)}")


def check_tensors(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, dt_bias: Tensor | None,
    initial_state: Tensor | None, *, directions: int | None, state_lead: tuple[int, ...],
) -> None:  # fmt: skip
    """Shapes, dtypes, devices and layouts of one call.

    Args:
        x, dt, A, B, C, D, dt_bias, initial_state: as given; x is (..., heads, head_dim).
        directions: number of directions K, an axis behind x's leading axes, or None where there is no such axis.
        state_lead: the axes of the state before (heads, head_dim, state).
    """
    lead, (heads, head_dim) = tuple(x.shape[:-2]), tuple(x.shape[-2:])
    k = () if directions is None else (directions,)
    before = "x's leading axes" if directions is None else "x's leading axes, directions"
    per_head = "(heads)" if directions is None else "(directions, heads)"
    check_shape("dt", dt, (*lead, *k, heads), f"{before} and (heads)")
    check_shape("A", A, (*k, heads), per_head)
    if B.ndim != len(lead) + len(k) + 2:
        raise ValueError(f"B: got shape {tuple(B.shape)}, expected {before} = {(*lead, *k)}, then (groups, state)")
    groups, state = tuple(B.shape[-2:])
    check_shape("B", B, (*lead, *k, groups, state), f"{before}, groups and state")
    check_shape("C", C, tuple(B.shape), "B's shape")
    if not 1 <= state <= MAX_STATE:
        raise ValueError(f"B: got a state size of {state} (last axis), expected 1 to {MAX_STATE}")
    if groups < 1 or heads % groups:
        raise ValueError(f"B: got {groups} groups for {heads} heads, the groups must divide the heads")
    check_shape("D", D, (*k, heads), per_head)
    check_shape("dt_bias", dt_bias, (*k, heads), per_head)
    meaning = "(batch axes" + (", directions" if k else "") + ", heads, head_dim, state)"
    check_shape("initial_state", initial_state, (*state_lead, *k, heads, head_dim, state), meaning)
    like_x: dict[str, Tensor | None] = {"dt": dt, "B": B, "C": C}
    exact = {"A": A, "D": D, "dt_bias": dt_bias, "initial_state": initial_state}
    check_dtypes("x", x, like_x, exact)
    check_layout("x", x, {"B": B, "C": C}, like_x | exact)
