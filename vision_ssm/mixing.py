"""The mixing matrix of a module: M with M @ value = what its scan (or attention) gives before gate and projection.

A module need not say how it calls its operators; they are observed while it runs (`kernels.observe`).
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kernels.mixing import Direction, Mixing, mixing_of
from kernels.observe import Call, observing
from vision_ssm.device import size_text
from vision_ssm.errors import UserError

# Shapes: S sequences (the batch and every other axis that is not read), K directions, E heads, L positions, D channels.

Reduce = Literal["heads", "mean"] | None
Directions = Literal["sum", "each"]
LARGEST = 1 << 31
"""Bytes of the largest result that `mixing_matrix` makes."""


class MixingMatrix:
    """For scan modules: gives them `mixing_matrix`, and makes them one layer for `vision_ssm.explain`."""

    def mixing_matrix(
        self, *inputs: Any, reduce: Reduce = "heads", directions: Directions = "sum", pool: int | None = None
    ) -> Tensor:
        """The matrices by which this module mixes positions when it is given `inputs`, as `forward` is.

        Where every direction has a convolution of its own, each has a value of its own too, and the scan's output is
        the sum of the products; with `directions="sum"` M is then only the sum of the matrices.

        Args:
            inputs: what `forward` takes.
            reduce: "heads" for a matrix for each head (a channel, in S6 and S4D), None for one for each channel,
                "mean" for the mean over the channels.
            directions: "sum", or "each" for an axis of them in the order in which the module runs them.
            pool: side of square cells (of stretches, in sequences): M is made between cells, so that
                M @ (sum of a value over cells) is the mean over cells where the value is constant in each. For maps
                whose matrix would not fit; nothing larger than a few rows is ever held.

        Returns:
            (S, [K,] [E or D,] L, L); positions are those of the input, whatever the reading order, row after row in a
            map. With `pool`, L is the number of cells. Gradients flow to the parameters.

        Raises:
            UserError: the result would be larger than 2 GiB.
        """
        assert isinstance(self, nn.Module)
        return matrix_of(mixings(self, *inputs), reduce=reduce, directions=directions, pool=pool)


class _Attentions(TorchFunctionMode):
    """Reports calls of torch's attention in the form of the operators' calls."""

    def __init__(self, observer: Callable[[Call], None]) -> None:
        super().__init__()
        self.observer = observer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self.observer(_attention_call(output, *args, **kwargs))
        return output


def _attention_call(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Call:  # fmt: skip
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], dim=-3) for t in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return Call("attention", output, (query, key, value, attn_mask), {"scale": scale})


@contextmanager
def observing_all(observer: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call of our operators and of torch's attention to `observer`."""
    with observing(observer), _Attentions(observer):
        yield


def mixings(module: nn.Module, *inputs: Any) -> list[Mixing]:
    """Run a module and take down what its operators did, one `Mixing` for each call.

    Raises:
        UserError: it called none.
    """
    calls: list[Call] = []
    with observing_all(calls.append):
        module(*inputs)
    if not calls:
        raise UserError(f"{type(module).__name__} calls no scan and no attention of torch, so it has no mixing matrix")
    return [mixing_of(call) for call in calls]


def matrix_of(found: list[Mixing], *, reduce: Reduce, directions: Directions, pool: int | None = None) -> Tensor:
    """The matrices of one module's calls; see `MixingMatrix.mixing_matrix`."""
    grid = found[0].grid
    each = [direction for mixing in found for direction in mixing.directions]
    length = each[0].value.shape[1]
    cells = None if pool is None else cells_of(grid or (1, length), pool, each[0].value)
    _check_size(each, length if cells is None else len(cells), reduce, directions)
    if cells is None:
        parts = [_whole(direction, reduce) for direction in each]
    else:
        parts = [_pooled(direction, cells, reduce) for direction in each]
    return torch.stack(parts, dim=1) if directions == "each" else _total(parts)


def _check_size(each: list[Direction], length: int, reduce: Reduce, directions: Directions) -> None:
    value = each[0].value
    matrices = {"mean": 1, "heads": each[0].heads, None: value.shape[2]}[reduce]
    count = value.shape[0] * matrices * (len(each) if directions == "each" else 1)
    size = count * length**2 * value.element_size()
    if size > LARGEST:
        fitting = math.ceil(math.sqrt(size / LARGEST))
        raise UserError(
            f"the mixing matrix of {length} positions would take {size_text(size)} ({count} matrices), at most "
            f'{size_text(LARGEST)} are made; take pool={fitting} or more for cells of positions, or reduce="mean"'
        )


def cells_of(grid: tuple[int, int], side: int, like: Tensor) -> Tensor:
    """(cells, L) membership of positions in square cells of a grid (in stretches, if it has one row); 1 or 0.

    Raises:
        UserError: the side is not positive.
    """
    if side < 1:
        raise UserError(f"pool must be 1 or more positions, got {side}")
    rows, columns = (torch.arange(n, device=like.device) // side for n in grid)
    cell = (rows[:, None] * (columns[-1] + 1) + columns).flatten()
    return F.one_hot(cell).T.to(like.dtype)


def _whole(direction: Direction, reduce: Reduce) -> Tensor:
    if reduce == "mean":
        return _total(block.sum(1) for _, block in direction.blocks()) / direction.heads
    matrix = torch.cat([block for _, block in direction.blocks()], dim=1)
    return _per_channel(matrix, direction) if reduce is None else matrix


def _total(parts: Iterable[Tensor]) -> Tensor:
    """The sum, without holding the parts together."""
    return functools.reduce(torch.add, parts)


def _per_channel(matrix: Tensor, direction: Direction) -> Tensor:
    """A head's matrix for each of its channels."""
    return matrix.repeat_interleave(direction.value.shape[2] // direction.heads, dim=1)


def _pooled(direction: Direction, cells: Tensor, reduce: Reduce) -> Tensor:
    """Mean over the rows of a cell and sum over its columns, one row of cells after the other."""
    rows = []
    for members in cells:
        blocks = [block.mean(2) @ cells.T for _, block in direction.blocks(members.nonzero().squeeze(1))]
        row = torch.cat(blocks, dim=1)  # (S, E, cells)
        rows.append(row.mean(1) if reduce == "mean" else row)
    matrix = torch.stack(rows, dim=-2)
    return _per_channel(matrix, direction) if reduce is None else matrix
