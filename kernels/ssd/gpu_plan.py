"""Sizes and tiles of one SSD call on the GPU: what all its launches have in common."""

import os
from dataclasses import dataclass
from functools import cache
from math import gcd
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..selective_scan.reference import COLUMNS, COLUMNS_REVERSED, LINES
from .reference import REVERSED, length_of, lines_of

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Triton's interpreter (CPU tests) multiplies the bits of bfloat16 numbers as if they were integers."""


class Tile(NamedTuple):
    """How one kernel is launched."""

    states: int
    """Block of states."""
    head_dim: int
    """Block of head_dim."""
    warps: int = 4
    stages: int = 1
    """Stages of the pipeline of its loop."""
    heads: int = 1
    """Most heads of one program."""
    registers: int = 0
    """Most registers of a thread, so that more programs fit a multiprocessor; 0 leaves it to the compiler."""


class Tiles(NamedTuple):
    """Chunk length, and one tile for each kernel that multiplies matrices."""

    chunk: int
    state: Tile
    output: Tile
    input_gradient: Tile
    projection_gradient: Tile


def tiles(bytes_of_operand: int) -> Tiles:
    """Tiles for operands of 2 or 4 bytes; the largest takes 67 KB of shared memory, which every supported GPU has."""
    if bytes_of_operand == 2:
        gradient = Tile(128, 64, registers=168)
        return Tiles(64, Tile(64, 64, stages=3), Tile(128, 64), gradient, Tile(64, 64, stages=2, heads=8))
    return Tiles(32, Tile(32, 32, stages=2), Tile(32, 64), Tile(32, 32), Tile(16, 16, heads=8))


class Inputs(NamedTuple):
    """The canonical tensors of one call."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    bias: Tensor | None
    initial: Tensor | None


class Axis(NamedTuple):
    """Directions that share chunks of pixels, and how they run: position -> (outer, inner)."""

    kind: str
    inner: int
    directions: tuple[tuple[int, bool], ...]

    @property
    def packed(self) -> int:
        """Four bits a direction: its index and whether it is reversed."""
        return sum((2 * k + backwards) << (4 * i) for i, (k, backwards) in enumerate(self.directions))

    def strides(self, t: Tensor, directions: bool) -> tuple[int, ...]:
        """(batch, line, outer, inner, head or group, direction) of (B, H, W, E, P) or (B, H, W, K, E or G, .)."""
        s = t.stride()
        along = {"rows": (0, s[1], s[2]), "columns": (0, s[2], s[1]), "lines": (s[2], 0, s[1])}[self.kind]
        return (s[0], *along, s[-2], s[3] if directions else 0)


def _power_of_2(n: int) -> int:
    """The smallest power of two that is at least n (triton.next_power_of_2 takes longer than the rest of a launch)."""
    return 1 << (n - 1).bit_length()


def cdiv(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


@cache
def _processors(index: int | None) -> int:
    """Multiprocessors of a GPU; two for the interpreter."""
    if index is None or not torch.cuda.is_available():
        return 2
    return torch.cuda.get_device_properties(index).multi_processor_count


def alignment(t: Tensor) -> int:
    """Bytes up to 16 on which every row of the last axis starts."""
    steps = [s * t.element_size() for s, n in zip(t.stride()[:-1], t.shape[:-1], strict=True) if n > 1]
    return gcd(16, t.data_ptr(), *steps)


def operand_type(dtype: torch.dtype) -> torch.dtype:
    """dtype of the operands of products and of stored states."""
    return torch.bfloat16 if dtype == torch.bfloat16 and not INTERPRETED else torch.float32


def chunk_length(x: Tensor, longest: int) -> int:
    """The tile's chunk, or the power of two from 16 that does not exceed `longest`."""
    length = tiles(operand_type(x.dtype).itemsize).chunk
    while length > max(longest, 16):
        length //= 2
    return length


@dataclass(frozen=True)
class Plan:
    """Sizes and tiles of one call; everything the launches have in common."""

    lines: int
    sequences: int
    length: int
    directions: int
    heads: int
    head_dim: int
    groups: int
    states: int
    chunk: int
    count: int
    tiles: Tiles
    processors: int
    operand: torch.dtype
    precision: str
    axes: tuple[Axis, ...]

    @staticmethod
    def of(x: Tensor, Bm: Tensor, orders: tuple[int, ...], chunk: int) -> "Plan":
        _, height, width, heads, head_dim = x.shape
        operand = operand_type(x.dtype)
        length, lines = length_of(x, orders), lines_of(x, orders)
        steps = min(chunk_length(x, chunk), max(16, _power_of_2(length)))
        by_kind: dict[str, list[tuple[int, bool]]] = {}
        for k, order in enumerate(orders):
            kind = "lines" if order >= LINES else "columns" if order in (COLUMNS, COLUMNS_REVERSED) else "rows"
            by_kind.setdefault(kind, []).append((k, order in REVERSED))
        inner = {"rows": width, "columns": height, "lines": height}
        return Plan(
            lines, x.shape[0] * lines, length, len(orders), heads, head_dim, Bm.shape[4], Bm.shape[5], steps,
            cdiv(length, steps), tiles(operand.itemsize), _processors(x.device.index), operand,
            "tf32" if x.dtype == torch.float16 else "tf32x3",
            tuple(Axis(kind, inner[kind], tuple(d)) for kind, d in by_kind.items()),
        )  # fmt: skip

    @property
    def block_e(self) -> int:
        """Heads of a tile in the kernels over step sizes."""
        return min(32, _power_of_2(self.heads))

    @property
    def parts(self) -> int:
        """Numbers in one array (S, K, E, Q)."""
        return self.sequences * self.directions * self.heads * self.count

    def block_p(self, tile: Tile) -> int:
        return min(tile.head_dim, max(16, _power_of_2(self.head_dim)))

    def blocks_p(self, tile: Tile) -> int:
        return cdiv(self.head_dim, self.block_p(tile))

    def block_n(self, tile: Tile) -> int:
        return min(tile.states, max(16, _power_of_2(self.states)))

    def blocks_n(self, tile: Tile) -> int:
        return cdiv(self.states, self.block_n(tile))

    def geometry(self, axis: Axis) -> dict[str, int]:
        return {
            "lines": self.lines, "length": self.length, "inner": axis.inner, "n_chunks": self.count,
            "dirs": axis.packed, "K": self.directions,
        }  # fmt: skip

    @property
    def sizes(self) -> dict[str, int]:
        return {"heads": self.heads, "groups": self.groups, "head_dim": self.head_dim, "n_states": self.states}

    def dot(self, tile: Tile) -> dict[str, object]:
        """Compile-time arguments and launch options of a kernel that multiplies matrices."""
        operand = tl.bfloat16 if self.operand == torch.bfloat16 else tl.float32
        limit: dict[str, object] = {"maxnreg": tile.registers} if tile.registers and torch.version.hip is None else {}
        return limit | {
            "T": self.chunk, "BP": self.block_p(tile), "BN": self.block_n(tile), "CT": operand, "PREC": self.precision,
            "num_warps": tile.warps,
        }  # fmt: skip

    def per_program(self, tile: Tile, programs: int) -> int:
        """Heads of a program: a divisor of a group's heads that still leaves four programs a multiprocessor."""
        group = self.heads // self.groups
        fits = [n for n in range(1, min(tile.heads, group) + 1) if group % n == 0]
        return max([n for n in fits if programs * self.heads // n >= 4 * self.processors], default=1)
