"""A stack of mixers between an embedding and a head, and a plain loop that trains it."""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vision_ssm.errors import UserError
from vision_ssm.mixer_config import NO_OPTIONS, MixerName, ScanOptions, check_mixer
from vision_ssm.mixers import Mixer, build_mixer

# Shapes: B batch, L tokens, C model width.

STATELESS: frozenset[MixerName] = frozenset({"attention", "gated_conv"})


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """Which mixers, how wide, how many."""

    mixers: tuple[MixerName, ...]
    """One name a layer."""
    dim: int
    state_size: int | None = None
    causal: bool = True
    options: ScanOptions = NO_OPTIONS

    @classmethod
    def of(
        cls,
        text: str,
        layers: int,
        *,
        dim: int,
        state_size: int | None = None,
        causal: bool = True,
        options: ScanOptions = NO_OPTIONS,
    ) -> "StackConfig":
        """Read ``s6`` (that mixer in every layer) or ``s6+attention`` (layer by layer, whatever ``layers`` says).

        Raises:
            UserError: An unknown mixer, or sizes and options that cannot be.
        """
        for key, number in (("layers", layers), ("dim", dim)):
            if number < 1:
                raise UserError(f"{key} must be at least 1, got {number}")
        names = tuple(text.split("+"))
        for name in names:
            check_mixer(name)
        mixers = cast(tuple[MixerName, ...], names if len(names) > 1 else names * layers)
        config = cls(mixers=mixers, dim=dim, state_size=state_size, causal=causal, options=options)
        for i in range(len(names)):
            config.build(i)  # may refuse
        return config

    @property
    def label(self) -> str:
        """For tables: s6 x 2, or s6+attention, and the options that are on."""
        same = len(set(self.mixers)) == 1
        polar = f", polar {self.options.polar[0]} {self.options.polar[1]}" if any(self.options.polar) else ""
        smr = f", smr {self.options.smr}" if self.options.smr else ""
        return (f"{self.mixers[0]} x {len(self.mixers)}" if same else "+".join(self.mixers)) + polar + smr

    def build(self, layer: int) -> Mixer:
        """The mixer of one layer; beside scans, attention and gated_conv go without the scans' states and options."""
        name = self.mixers[layer]
        if name in STATELESS and not STATELESS.issuperset(self.mixers):
            return build_mixer(name, self.dim, causal=self.causal)
        return build_mixer(name, self.dim, state_size=self.state_size, causal=self.causal, options=self.options)


class Stack(nn.Module):
    """Embedding, learned positions, blocks x + mixer(norm(x)), norm, linear head. There are no MLPs.

    Shape: what ``embed`` takes -> (B, L, outputs)

    Args:
        config: The mixers.
        embed: (B, L, ...) -> (B, L, C).
        outputs: Width of the head.
        length: L, of the table of positions; None for no positions.
    """

    def __init__(self, config: StackConfig, embed: nn.Module, outputs: int, *, length: int | None) -> None:
        super().__init__()
        self.embed = embed
        self.positions = None if length is None else nn.Parameter(0.02 * torch.randn(length, config.dim))
        self.norms = nn.ModuleList(nn.LayerNorm(config.dim) for _ in config.mixers)
        self.mixers = nn.ModuleList(config.build(i) for i in range(len(config.mixers)))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.head(self.norm(self.states(x)[-1][0]))

    def states(self, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """(B, L, C) tokens after the embedding and after every block, each with what the block added to them."""
        h = self.embed(x)
        if self.positions is not None:
            h = h + self.positions[: h.shape[1]]
        states = [(h, h)]
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            added = mixer(norm(h), 1)
            h = h + added
            states.append((h, added))
        return states


def fit(
    model: nn.Module, batches: Iterable[tuple[Any, ...]], loss: Callable[..., Tensor], *, steps: int, lr: float
) -> float:
    """Train with AdamW, a short warm-up and a linear way to zero; gradients are clipped at norm 1.

    Args:
        model: What ``loss`` calls.
        batches: At least ``steps`` of them.
        loss: ``loss(*batch)``.
        steps: Number of updates.
        lr: Peak rate.

    Returns:
        Seconds.
    """
    begin = time.perf_counter()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm + 1))
    )
    model.train()
    for _, batch in zip(range(steps), batches, strict=False):
        optimizer.zero_grad()
        loss(*batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    return time.perf_counter() - begin
