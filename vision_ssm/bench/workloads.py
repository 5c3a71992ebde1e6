"""What is measured: one class per kernel with its inputs, its call and its unavoidable cost; sizes by single letters.

A workload's `tensors` are the leaves whose gradients are taken. `axes` says for each of them which axis counts the
batch and which the channels, so that a check can follow some sequences and channels only.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from vision_ssm.bench import floors

# The back end is a checked name here, and no call asks for a final state:
# pyright: reportArgumentType=false, reportReturnType=false

# Shapes: B batch, L length, T frames, H height, W width, D channels, K = 4 directions, N states, R rank of delta.

Tensors = dict[str, Tensor]
Axes = Mapping[str, tuple[int | None, int | None]]
DIRECTIONS = 4
_DELTA_BIAS = -4.0
"""softplus(-4 + noise): steps of about 0.02, as a trained model has them."""


class Attention(NamedTuple):
    """Softmax attention over the tokens of a workload, (batch, heads, tokens, head_dim)."""

    batch: int
    heads: int
    tokens: int
    head_dim: int


def _letter(letter: str, **default: Any) -> Any:
    """A size and the letter that stands for it in `--shape`."""
    return field(metadata={"letter": letter}, **default)


def _attention(batch: int, tokens: int, width: int) -> Attention:
    return Attention(batch, max(1, width // 64), tokens, min(64, width))


@dataclass(frozen=True, kw_only=True)
class Workload(ABC):
    """One problem with fixed sizes."""

    kind: ClassVar[str]
    axes: ClassVar[Axes]
    has_c_form: ClassVar[bool] = True
    batch: int = _letter("B")

    @abstractmethod
    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        """Random leaves, by name; the same values at every call."""

    @abstractmethod
    def run(self, t: Tensors, backend: str) -> Tensor:
        """The measured call."""

    @abstractmethod
    def cost(self, size: int) -> floors.Passes:
        """What the call cannot avoid; `size` is the bytes of an activation."""

    @property
    @abstractmethod
    def tokens(self) -> int:
        """Positions of one sequence, as attention would see them."""

    @property
    @abstractmethod
    def state_steps(self) -> int:
        """Updates of one state in one call."""

    @property
    @abstractmethod
    def attention(self) -> Attention | None:
        """Attention over the same tokens, or None where nothing corresponds to it."""

    def __str__(self) -> str:
        return " ".join(f"{f.metadata['letter']}{getattr(self, f.name)}" for f in fields(self) if getattr(self, f.name))

    def checked(self, t: Tensors) -> Tensors:
        """The leaves of the call that is compared with float64; `run` takes them too."""
        return t


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device)


def _decays(device: torch.device, *lead: int, states: int) -> Tensor:
    """-1, ..., -N for every channel (S4D-real)."""
    return -torch.arange(1.0, states + 1, device=device).repeat(*lead, 1)


@dataclass(frozen=True, kw_only=True)
class Scan1D(Workload):
    """S6 along a sequence, every channel's delta given: (B, L, D)."""

    kind: ClassVar[str] = "1d"
    axes: ClassVar[Axes] = {
        "x": (0, 2), "delta": (0, 2), "A": (None, 0), "B": (0, None), "C": (0, None), "D": (None, 0), "bias": (None, 0),
    }  # fmt: skip
    length: int = _letter("L")
    channels: int = _letter("D")
    states: int = _letter("N", default=16)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        lead = (self.batch, self.length)
        torch.manual_seed(0)
        return {
            "x": _draw(device, *lead, self.channels).to(dtype), "delta": _draw(device, *lead, self.channels).to(dtype),
            "A": _decays(device, self.channels, states=self.states),
            "B": _draw(device, *lead, self.states).to(dtype), "C": _draw(device, *lead, self.states).to(dtype),
            "D": torch.ones(self.channels, device=device),
            "bias": torch.full((self.channels,), _DELTA_BIAS, device=device),
        }  # fmt: skip

    def run(self, t: Tensors, backend: str) -> Tensor:
        return kernels.selective_scan(
            t["x"], t["delta"], t["A"], t["B"], t["C"], t["D"], delta_bias=t["bias"], softplus=True,
            backend=backend,
        )  # fmt: skip

    def cost(self, size: int) -> floors.Passes:
        positions = self.batch * self.length
        elements = positions * self.channels
        read = size * (2 * elements + 2 * positions * self.states)
        return floors.scan_cost(
            elements=elements, states=self.states, rank=0, softplus=True, read=read, written=size * elements
        )

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def state_steps(self) -> int:
        return self.batch * self.length * self.channels * self.states

    @property
    def attention(self) -> Attention:
        return _attention(self.batch, self.length, self.channels)


@dataclass(frozen=True, kw_only=True)
class _Image(Workload):
    """A feature map (B, H, W, D) read in four directions.

    Attention is measured at D / 2 channels, the width of the model whose block scans D channels.
    """

    height: int = _letter("H")
    width: int = _letter("W")
    channels: int = _letter("D")
    states: int = _letter("N", default=16)

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def state_steps(self) -> int:
        return self.batch * self.tokens * DIRECTIONS * self.channels * self.states

    @property
    def attention(self) -> Attention:
        return _attention(self.batch, self.tokens, max(1, self.channels // 2))


@dataclass(frozen=True, kw_only=True)
class Scan2D(_Image):
    """S6 in four directions over a feature map (B, H, W, D), from the map: projection, low-rank delta, scan, sum."""

    kind: ClassVar[str] = "2d"
    axes: ClassVar[Axes] = {
        "x": (0, 3), "projected": (0, None), "A": (None, 1), "D": (None, 1), "weight": (None, 1), "bias": (None, 1),
    }  # fmt: skip
    rank: int = _letter("R", default=0)
    """0: ceil(D / 32), the rule of the published models, whose blocks scan twice their width."""

    @property
    def _rank(self) -> int:
        return self.rank or math.ceil(self.channels / 32)

    @property
    def _columns(self) -> list[int]:
        return [self._rank, self.states, self.states]

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        torch.manual_seed(0)
        columns = DIRECTIONS * sum(self._columns)
        return {
            "x": _draw(device, self.batch, self.height, self.width, self.channels).to(dtype),
            "projection": (_draw(device, columns, self.channels) * self.channels**-0.5).to(dtype),
            "A": _decays(device, DIRECTIONS, self.channels, states=self.states),
            "D": torch.ones(DIRECTIONS, self.channels, device=device),
            "weight": _draw(device, DIRECTIONS, self.channels, self._rank) * self._rank**-0.5,
            "bias": torch.full((DIRECTIONS, self.channels), _DELTA_BIAS, device=device),
        }

    def run(self, t: Tensors, backend: str) -> Tensor:
        projected = t["projected"] if "projected" in t else F.linear(t["x"], t["projection"])
        low, b, c = projected.unflatten(-1, (DIRECTIONS, -1)).split(self._columns, dim=-1)
        return kernels.selective_scan_2d(
            t["x"], low, t["A"], b, c, t["D"], delta_weight=t["weight"], delta_bias=t["bias"], softplus=True,
            backend=backend,
        )  # fmt: skip

    def checked(self, t: Tensors) -> Tensors:
        """With what the projection gives in place of its weight: the matrix product is torch's."""
        with torch.no_grad():
            projected = F.linear(t["x"], t["projection"])
        return {name: v for name, v in t.items() if name != "projection"} | {"projected": projected}

    def cost(self, size: int) -> floors.Passes:
        pixels = self.batch * self.height * self.width
        elements = pixels * self.channels
        columns = DIRECTIONS * sum(self._columns)
        scan = floors.scan_cost(
            elements=DIRECTIONS * elements, states=self.states, rank=self._rank, softplus=True,
            read=size * (elements + pixels * columns), written=size * elements,
        )  # fmt: skip
        return floors.with_projection(scan, pixels=pixels, inputs=self.channels, outputs=columns, size=size)


@dataclass(frozen=True, kw_only=True)
class Core2D(_Image):
    """S6 in four directions over a feature map, delta (B, H, W, K, D) given."""

    kind: ClassVar[str] = "2d-core"
    axes: ClassVar[Axes] = {
        "x": (0, 3), "delta": (0, 4), "A": (None, 1), "B": (0, None), "C": (0, None), "D": (None, 1), "bias": (None, 1),
    }  # fmt: skip

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        torch.manual_seed(0)
        lead = (self.batch, self.height, self.width)
        return {
            "x": _draw(device, *lead, self.channels).to(dtype),
            "delta": _draw(device, *lead, DIRECTIONS, self.channels).to(dtype),
            "A": _decays(device, DIRECTIONS, self.channels, states=self.states),
            "B": _draw(device, *lead, DIRECTIONS, self.states).to(dtype),
            "C": _draw(device, *lead, DIRECTIONS, self.states).to(dtype),
            "D": torch.ones(DIRECTIONS, self.channels, device=device),
            "bias": torch.full((DIRECTIONS, self.channels), _DELTA_BIAS, device=device),
        }

    def run(self, t: Tensors, backend: str) -> Tensor:
        return kernels.selective_scan_2d(
            t["x"], t["delta"], t["A"], t["B"], t["C"], t["D"], delta_bias=t["bias"], softplus=True,
            backend=backend,
        )  # fmt: skip

    def cost(self, size: int) -> floors.Passes:
        pixels = self.batch * self.height * self.width
        elements = pixels * self.channels
        read = size * (elements + DIRECTIONS * (elements + 2 * pixels * self.states))
        return floors.scan_cost(
            elements=DIRECTIONS * elements, states=self.states, rank=0, softplus=True, read=read,
            written=size * elements,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Temporal(Workload):
    """S6 over the frames of clips (B, T, H, W, D), in place, delta from its low-rank signal: B H W short sequences."""

    kind: ClassVar[str] = "temporal"
    axes: ClassVar[Axes] = {
        "x": (0, 4), "low": (0, None), "A": (None, 0), "B": (0, None), "C": (0, None), "D": (None, 0),
        "weight": (None, 0), "bias": (None, 0),
    }  # fmt: skip
    frames: int = _letter("T")
    height: int = _letter("H")
    width: int = _letter("W")
    channels: int = _letter("D")
    states: int = _letter("N", default=16)
    rank: int = _letter("R", default=8)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        torch.manual_seed(0)
        lead = (self.batch, self.frames, self.height, self.width)
        return {
            "x": _draw(device, *lead, self.channels).to(dtype), "low": _draw(device, *lead, self.rank).to(dtype),
            "A": _decays(device, self.channels, states=self.states),
            "B": _draw(device, *lead, self.states).to(dtype), "C": _draw(device, *lead, self.states).to(dtype),
            "D": torch.ones(self.channels, device=device),
            "weight": _draw(device, self.channels, self.rank) * self.rank**-0.5,
            "bias": torch.full((self.channels,), _DELTA_BIAS, device=device),
        }  # fmt: skip

    def run(self, t: Tensors, backend: str) -> Tensor:
        return kernels.selective_scan(  # pyright: ignore[reportReturnType]
            t["x"], t["low"], t["A"], t["B"], t["C"], t["D"], delta_weight=t["weight"], delta_bias=t["bias"],
            softplus=True, dim=1, backend=backend,
        )  # fmt: skip

    def cost(self, size: int) -> floors.Passes:
        positions = self.batch * self.frames * self.height * self.width
        elements = positions * self.channels
        return floors.scan_cost(
            elements=elements, states=self.states, rank=self.rank, softplus=True,
            read=size * (elements + positions * (self.rank + 2 * self.states)), written=size * elements,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.frames

    @property
    def state_steps(self) -> int:
        return self.batch * self.frames * self.height * self.width * self.channels * self.states

    @property
    def attention(self) -> Attention:
        return _attention(self.batch * self.height * self.width, self.frames, self.channels)


@dataclass(frozen=True, kw_only=True)
class SSD(Workload):
    """The chunked scan of Mamba-2, (B, L, heads, P), one group of B and C."""

    kind: ClassVar[str] = "ssd"
    has_c_form: ClassVar[bool] = False
    axes: ClassVar[Axes] = {
        "x": (0, 2), "dt": (0, 2), "A": (None, 0), "B": (0, None), "C": (0, None), "D": (None, 0), "bias": (None, 0),
    }  # fmt: skip
    length: int = _letter("L")
    heads: int = _letter("H")
    head_dim: int = _letter("P", default=64)
    states: int = _letter("N", default=64)
    chunk: int = _letter("C", default=256)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        torch.manual_seed(0)
        lead = (self.batch, self.length)
        return {
            "x": _draw(device, *lead, self.heads, self.head_dim).to(dtype),
            "dt": _draw(device, *lead, self.heads).to(dtype),
            "A": -torch.linspace(1.0, 16.0, self.heads, device=device),
            "B": _draw(device, *lead, 1, self.states).to(dtype), "C": _draw(device, *lead, 1, self.states).to(dtype),
            "D": torch.ones(self.heads, device=device), "bias": torch.full((self.heads,), _DELTA_BIAS, device=device),
        }  # fmt: skip

    def run(self, t: Tensors, backend: str) -> Tensor:
        return kernels.ssd(
            t["x"], t["dt"], t["A"], t["B"], t["C"], t["D"], chunk=self.chunk, dt_bias=t["bias"], softplus=True,
            backend=backend,
        )  # fmt: skip

    def cost(self, size: int) -> floors.Passes:
        return floors.ssd_cost(
            tokens=self.batch * self.length, heads=self.heads, head_dim=self.head_dim, groups=1, states=self.states,
            chunk=self.chunk, softplus=True, size=size,
        )  # fmt: skip

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def state_steps(self) -> int:
        return self.batch * self.length * self.heads * self.head_dim * self.states

    @property
    def attention(self) -> Attention:
        return _attention(self.batch, self.length, self.heads * self.head_dim)


@dataclass(frozen=True, kw_only=True)
class Convolution(Workload):
    """Depthwise causal convolution with SiLU, (B, L, D)."""

    kind: ClassVar[str] = "conv"
    has_c_form: ClassVar[bool] = False
    axes: ClassVar[Axes] = {"x": (0, 2), "weight": (None, 0), "bias": (None, 0)}
    length: int = _letter("L")
    channels: int = _letter("D")
    width: int = _letter("W", default=4)

    def tensors(self, dtype: torch.dtype, device: torch.device) -> Tensors:
        torch.manual_seed(0)
        return {
            "x": _draw(device, self.batch, self.length, self.channels).to(dtype),
            "weight": (_draw(device, self.channels, self.width) * self.width**-0.5).to(dtype),
            "bias": _draw(device, self.channels).to(dtype),
        }

    def run(self, t: Tensors, backend: str) -> Tensor:
        return kernels.causal_conv1d(t["x"], t["weight"], t["bias"], activation="silu", backend=backend)

    def cost(self, size: int) -> floors.Passes:
        elements = self.batch * self.length * self.channels
        return floors.convolution_cost(elements=elements, width=self.width, silu=True, size=size)

    @property
    def tokens(self) -> int:
        return self.length

    @property
    def state_steps(self) -> int:
        return self.batch * self.length * self.channels * self.width

    @property
    def attention(self) -> None:
        return None
