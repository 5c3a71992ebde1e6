"""Training through CUDA graphs. What only a GPU can do is tested in test_training.py; here is what goes around it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vision_ssm.errors import UserError
from vision_ssm.training.graphs import GraphedNetwork


class Network(nn.Module):
    """Scales, counts its calls in a buffer, and takes constants."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, shift: Tensor | None = None, pair: bool = False) -> Any:
        self.calls += 1
        y = x * self.weight + (0 if shift is None else shift)
        return [y, -y] if pair else y


@pytest.fixture
def captures(monkeypatch):
    """Captures without a GPU: the passes of a warm-up, and no graph. Lists the shapes that were captured."""
    seen: list[list[tuple[int, ...]]] = []

    def capture(call: nn.Module, samples: tuple[Tensor, ...], **_: Any) -> nn.Module:
        call(*samples)
        torch.rand(3)
        seen.append([tuple(sample.shape) for sample in samples])
        return call

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)
    return seen


def test_each_kind_of_call_is_captured_once(captures):
    graphed = GraphedNetwork(Network())
    for _ in range(2):
        assert torch.equal(graphed(torch.ones(3)), torch.full((3,), 2.0))
        assert torch.equal(graphed(torch.ones(5), shift=torch.ones(1))[0], torch.tensor(3.0))
        first, second = graphed(torch.ones(3), shift=None, pair=True)
        assert torch.equal(first, -second)
    assert captures == [[(3,)], [(5,), (1,)], [(3,)]]


def test_a_capture_leaves_buffers_and_random_numbers_as_they_were(captures):
    network = Network()
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    GraphedNetwork(network)(torch.ones(3))
    assert network.calls == 1, "the call itself"
    assert torch.equal(torch.rand(2), wanted)


def test_gradients_are_taken_out_of_the_graphs_memory(captures):
    network = Network()
    graphed = GraphedNetwork(network)
    graphed(torch.ones(3)).sum().backward()
    held = network.weight.grad
    graphed.own_gradients()
    assert held is not None
    held.fill_(7.0)
    assert network.weight.grad == 3


def test_a_network_that_cannot_be_captured_is_told(captures, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", refuse)
    with pytest.raises(UserError, match=r"stream is capturing\); train without --train.graph"):
        GraphedNetwork(Network())(torch.ones(3))
