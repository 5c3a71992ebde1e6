"""The passes of a stream as CUDA graphs: frames of small networks without Python between their kernels."""

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from generation.dim import DiM
from vision_ssm.directions import ScanState

# Shapes: R rows of the batch, C channels, H/W height and width.

_WARM_UPS = 2
"""Passes before one is captured, in which kernels are compiled and chosen."""
Given = tuple[Tensor, Tensor, Tensor | None]
"""Frames (R, C, 1, H, W), noise levels (one, or (R,)), and class labels (R,) or None."""
Pass = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class StreamGraphs:
    """``DiM.advance`` for single frames through CUDA graphs: one that predicts for each number of rows, one that reads.

    A pass that cannot be captured runs without, with a warning. Where weights have moved, graphs are captured again.

    Args:
        model: Causal, on a GPU.
        states: After the frames so far. They are copied; the copies are moved on in place.
    """

    def __init__(self, model: DiM, states: Sequence[ScanState]) -> None:
        self.model = model
        self.states = [state.clone() for state in states]
        self._weights: tuple[int, ...] = ()  # where they were when graphs were captured
        self._passes: dict[tuple[Any, ...], Pass] = {}
        self._pool: Any = None  # what one graph computes in is free when another one begins

    def predict(self, *given: *Given) -> Tensor:
        """A prediction (R, C, 1, H, W) for the frame that follows."""
        return self._run(self._predict, given).clone()  # the next one overwrites it, and samplers keep some

    def read(self, *given: *Given) -> None:
        """Move the states past a finished frame."""
        self._run(self._read, given)

    def _predict(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        return self.model.advance(x, t, labels, [state.rows(len(x)) for state in self.states], last=True)[0]

    def _read(self, x: Tensor, t: Tensor, labels: Tensor | None) -> Tensor:
        y, after = self.model.advance(x, t, labels, self.states)
        for state, moved in zip(self.states, after, strict=True):
            state.copy_(moved)
        return y

    def _run(self, function: Pass, given: Given) -> Tensor:
        weights = tuple(parameter.data_ptr() for parameter in self.model.parameters())
        if weights != self._weights:
            self._weights, self._pool = weights, torch.cuda.graph_pool_handle()
            self._passes.clear()
        autocast, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        key = (function.__name__, given[0].shape, given[0].dtype, autocast, dtype)
        if key not in self._passes:
            before = [state.clone() for state in self.states]
            try:
                # a cached copy of a weight lives as long as the caller's context, a graph longer
                with torch.autocast("cuda", dtype, enabled=autocast, cache_enabled=False):
                    self._passes[key] = _captured(function, given, self._pool)
            finally:
                for state, kept in zip(self.states, before, strict=True):
                    state.copy_(kept)  # warming up has moved them
        return self._passes[key](*given)


class _Graph:
    """A pass that was captured with the tensors of its first call."""

    def __init__(self, graph: torch.cuda.CUDAGraph, given: Given, result: Tensor) -> None:
        self.graph, self.given, self.result = graph, given, result

    def __call__(self, *given: *Given) -> Tensor:
        """The pass's result in the graph's memory."""
        for place, value in zip(self.given, given, strict=True):
            if place is not None and value is not None:
                place.copy_(value)
        self.graph.replay()
        return self.result


def _captured(function: Pass, given: Given, pool: Any) -> Pass:
    """A pass as a graph; the pass itself, with a warning, where it cannot be captured."""
    x, t, labels = given
    mine: Given = (x.clone(), t.clone(), None if labels is None else labels.clone())
    graph, beside = torch.cuda.CUDAGraph(), _capture_stream(x.device)
    with torch.cuda.device(x.device):
        here = torch.cuda.current_stream()
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UPS):
                function(*mine)
        here.wait_stream(beside)
        try:
            # other threads, such as those that load data, may go on meanwhile
            with torch.cuda.graph(graph, pool=pool, stream=beside, capture_error_mode="thread_local"):
                result = function(*mine)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"streaming without CUDA graphs, which is slower: {reason}", stacklevel=2)
            return function
    return _Graph(graph, mine, result)


@lru_cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures on a GPU: the libraries keep a workspace for each that was ever used."""
    return torch.cuda.Stream(device)
