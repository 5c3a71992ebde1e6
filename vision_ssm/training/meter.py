"""Means of the losses within an epoch, and where its time went."""

from typing import Any

import torch
from torch import Tensor


class Meter:
    """Adds up losses on the device, so that the host waits for it only when it wants to know the means."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.batches = 0
        self.seconds = 0.0
        """Spent on training, without evaluation and checkpoints."""
        self.waited = 0.0
        """Of which waiting for data."""

    def add(self, losses: dict[str, Tensor]) -> None:
        """Take the losses of one batch; every batch gives the same names."""
        values = torch.stack([value.detach().double() for value in losses.values()])
        if self.sums is None:
            self.names, self.sums = list(losses), torch.zeros_like(values)
        self.sums += values
        self.batches += 1

    def means(self) -> dict[str, float]:
        """Mean of each loss so far."""
        if self.sums is None:
            return {}
        return dict(zip(self.names, (self.sums / self.batches).tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return dict(vars(self))

    @classmethod
    def of(cls, state: dict[str, Any], device: torch.device) -> "Meter":
        """The meter that gave this ``state``."""
        meter = cls()
        vars(meter).update(state)
        if meter.sums is not None:
            meter.sums = meter.sums.to(device)
        return meter
