"""A network as CUDA graphs: its forward and backward passes without Python between their kernels."""

from typing import Any

import torch
from torch import Tensor, nn

from vision_ssm.errors import UserError


class GraphedNetwork(nn.Module):
    """Calls a network in training mode through CUDA graphs, one for each combination of shapes and other arguments.

    The first call with a combination captures it, which takes some passes; buffers (running statistics) and random
    numbers are then as if it had not. Results are overwritten by the next call of the same kind.

    Args:
        network: Its arguments are tensors or constants, on one GPU; it asks the device for no value.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.calls: dict[tuple[Any, ...], nn.Module] = {}
        self.pool = torch.cuda.graph_pool_handle()  # one graph's activations are dead when another one begins

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the network gives.

        Raises:
            UserError: The network cannot be captured.
        """
        given = (*args, *kwargs.values())
        tensors = tuple(value for value in given if isinstance(value, Tensor))
        key = (*kwargs, *((v.shape, v.dtype) if isinstance(v, Tensor) else v for v in given))
        if key not in self.calls:
            self.calls[key] = self._capture(_Call(self.network, args, kwargs), tensors)
        return self.calls[key](*tensors)

    def own_gradients(self) -> None:
        """Take the gradients out of the graphs' memory, where the next backward pass would overwrite them."""
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()

    def _capture(self, call: "_Call", tensors: tuple[Tensor, ...]) -> nn.Module:
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        random = torch.cuda.get_rng_state()
        static = tuple(tensor.detach().clone() for tensor in tensors)
        try:
            torch.cuda.make_graphed_callables(call, static, allow_unused_input=True, pool=self.pool)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"the network cannot be captured as a CUDA graph ({reason}); train without --train.graph"
            ) from None
        for buffer, before in buffers:
            buffer.copy_(before)
        torch.cuda.set_rng_state(random)
        return call


class _Call(nn.Module):
    """A network with all arguments fixed but the tensors."""

    def __init__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__()
        self.network = network
        self.args = tuple(_constant(value) for value in args)
        self.kwargs = {name: _constant(value) for name, value in kwargs.items()}

    def forward(self, *tensors: Tensor) -> Any:
        """The network's output for these tensors, in the order of the call."""
        left = iter(tensors)
        args = [next(left) if value is _TENSOR else value for value in self.args]
        kwargs = {name: next(left) if value is _TENSOR else value for name, value in self.kwargs.items()}
        return self.network(*args, **kwargs)


_TENSOR = object()
"""Stands for a tensor."""


def _constant(value: Any) -> Any:
    return _TENSOR if isinstance(value, Tensor) else value
