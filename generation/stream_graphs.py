"""The passes of a stream as CUDA graphs: frames of small networks without Python between their kernels."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from generation.dim import DiM
from vision_ssm.directions import ScanState
from vision_ssm.errors import UserError

# Shapes: R rows of the batch, C channels, H/W height and width.

_WARM_UPS = 2
"""Passes before one is captured, in which kernels are compiled and chosen."""
Given = tuple[Tensor, Tensor, Tensor | None]
"""Frames (R, C, 1, H, W), noise levels (one, or (R,)), and class labels (R,) or None."""


class StreamGraphs:
    """``DiM.advance`` for single frames through CUDA graphs: one that predicts for each number of rows, one that reads.

    Args:
        model: Causal, on a GPU, where its weights stay.
        states: After the frames so far. They are copied; the copies are moved on in place.
    """

    def __init__(self, model: DiM, states: Sequence[ScanState]) -> None:
        self.model = model
        self.states = [state.clone() for state in states]
        self._graphs: dict[tuple[str, int], _Graph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # what one graph computes in is free when another one begins

    def predict(self, *given: *Given) -> Tensor:
        """A prediction (R, C, 1, H, W) for the frame that follows; the next one of as many rows overwrites it."""
        return self._run("predict", self._predict, given)

    def read(self, *given: *Given) -> None:
        """Move the states past a finished frame."""
        self._run("read", self._read, given)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.model.advance(x, t, labels, [state.rows(len(x)) for state in self.states], last=True)[0]

    def _read(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        y, after = self.model.advance(x, t, labels, self.states)
        for state, moved in zip(self.states, after, strict=True):
            state.copy_(moved)
        return y

    def _run(self, name: str, function: Callable[..., Tensor], given: Given) -> Tensor:
        key = (name, len(given[0]))
        if key not in self._graphs:
            before = [state.clone() for state in self.states]
            self._graphs[key] = _Graph(function, given, self._pool)
            for state, kept in zip(self.states, before, strict=True):
                state.copy_(kept)  # warming up has moved them
        return self._graphs[key](given)


class _Graph:
    """A function of tensors on one GPU, captured with what it is first given."""

    def __init__(self, function: Callable[..., Tensor], given: Given, pool: Any) -> None:
        self.given = tuple(None if value is None else value.clone() for value in given)
        self.graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(given[0].device):
                _warm_up(function, self.given)
                with torch.cuda.graph(self.graph, pool=pool, capture_error_mode="thread_local"):  # others may go on
                    self.result = function(*self.given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the network cannot be captured as a CUDA graph ({reason}); stream with VideoStream(graph=False)"
            ) from None

    def __call__(self, given: Given) -> Tensor:
        for place, value in zip(self.given, given, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.result


def _warm_up(function: Callable[..., Tensor], given: tuple[Tensor | None, ...]) -> None:
    """Some calls beside the stream that everything else waits in, as captures need it."""
    beside, here = torch.cuda.Stream(), torch.cuda.current_stream()
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        for _ in range(_WARM_UPS):
            function(*given)
    here.wait_stream(beside)
