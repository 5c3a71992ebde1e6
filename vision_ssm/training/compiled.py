"""Regional compilation: the blocks that a network repeats, compiled in place by torch.compile."""

from collections import Counter
from typing import Any

from torch import nn


def compile_network(network: nn.Module) -> int:
    """Compile a network's repeated blocks, or all of it where nothing repeats.

    Blocks are the same if class and shapes of their weights are. They share compiled code: a deep network compiles as
    fast as a shallow one. Names of weights stay; compilation itself happens at the first calls.

    Returns:
        How many modules are compiled.
    """
    count = _compile_repeated(network)
    if not count:
        network.compile()
    return count or 1


def _compile_repeated(network: nn.Module) -> int:
    """Those that stand several times in one list or sequence, the outermost ones."""
    inside = list(network.children())
    listed = isinstance(network, nn.ModuleList | nn.Sequential)
    kinds = Counter(_kind(module) for module in inside) if listed else Counter()
    count = 0
    for module in inside:
        if kinds[_kind(module)] > 1 and any(True for _ in module.children()):
            module.compile()
            count += 1
        else:
            count += _compile_repeated(module)
    return count


def _kind(module: nn.Module) -> tuple[Any, ...]:
    return type(module), tuple(parameter.shape for parameter in module.parameters())
