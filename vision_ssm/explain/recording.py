"""Taking down what the scans of any network are given while it runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from torch import nn

from kernels.mixing import Direction, Mixing, mixing_of
from kernels.observe import Call
from vision_ssm.errors import UserError
from vision_ssm.mixing import observing_all


@dataclass
class Layer:
    """A scan module that ran, with its calls of operators; two directions may be two calls or one.

    Attributes:
        name: of the module in the network.
        mixings: one for each call.
    """

    name: str
    mixings: list[Mixing]

    @property
    def grid(self) -> tuple[int, int] | None:
        """Height and width where the positions are those of a map."""
        return self.mixings[0].grid

    @property
    def places(self) -> int:
        """All positions of all sequences: batch x length, or batch x frames x places."""
        return self.mixings[0].index().numel()

    def directions(self) -> Iterator[tuple[Mixing, int, Direction]]:
        """Every direction with its call and its number in the call, in the order in which they ran."""
        for mixing in self.mixings:
            for k, direction in enumerate(mixing.directions):
                yield mixing, k, direction


@dataclass
class Recording:
    """The layers in the order in which they ran; a module that ran twice is there twice."""

    layers: list[Layer] = field(default_factory=list)

    def select(self, pattern: str) -> "Recording":
        """Only the layers whose name matches a pattern (`neck.*`) or begins with it.

        Raises:
            UserError: none does; the message lists the names.
        """
        if pattern == "all":
            return self
        found = [x for x in self.layers if fnmatch(x.name, pattern) or x.name.startswith(pattern)]
        if not found:
            names = ", ".join(dict.fromkeys(layer.name for layer in self.layers))
            raise UserError(f"no layer is called {pattern!r}; there are: {names}")
        return Recording(found)


@dataclass(frozen=True)
class _Running:
    """A module whose forward is running."""

    name: str
    module: nn.Module


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Take down the calls of operators that `model` makes inside the context.

    A layer is the outermost module with a `mixing_matrix` around a call, else the innermost module; so any network
    works whose parts call our operators or torch's attention. Everything stays alive, with its graph, as long as the
    recording does. Run the model once for each recording, and use the maps after the context has ended.

    Raises:
        UserError: nothing was called.
    """
    recording = Recording()
    whole = _Running(type(model).__name__, model)
    running: list[_Running] = []
    owners: list[_Running] = []  # of recording.layers

    def see(call: Call) -> None:
        marked = [r for r in running if hasattr(r.module, "mixing_matrix")]
        owner = marked[0] if marked else running[-1] if running else whole
        if owners and owners[-1] is owner:
            recording.layers[-1].mixings.append(mixing_of(call))
        else:
            owners.append(owner)
            recording.layers.append(Layer(owner.name, [mixing_of(call)]))

    def enter(name: str) -> Any:
        return lambda module, _: running.append(_Running(name, module))

    def leave(*_: object) -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(enter(name or whole.name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        stack.enter_context(observing_all(see))
        yield recording
    if not recording.layers:
        raise UserError(f"{type(model).__name__} called no scan and no attention of torch: there is nothing to explain")
