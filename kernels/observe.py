"""What the operators are given, for whoever wants to see it: the mixing matrices of `kernels.mixing` are made of it.

An operator that is called inside a module is seen with the very tensors that the module made for it, so nothing about
the module has to be known or computed a second time.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])


class Call(NamedTuple):
    """One call of an operator."""

    operator: str
    output: Tensor
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any]


_observers: list[Callable[[Call], None]] = []


@contextmanager
def observing(observer: Callable[[Call], None]) -> Iterator[None]:
    """Hand every call inside the context to `observer`, in the order in which they end."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


def watched() -> bool:
    """Whether anybody observes: who has a shorter way than an operator must then take the operator."""
    return bool(_observers)


def announce(operator: str, output: Tensor, *tensors: Tensor | None, **options: Any) -> None:
    """Tell the observers of a call; free where there are none."""
    for observer in _observers:
        observer(Call(operator, output, tensors, options))


def observed(operator: str) -> Callable[[F], F]:
    """Announce the calls of a function whose positional arguments are tensors and whose keyword ones are options."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*tensors: Tensor | None, **options: Any) -> Any:
            result = function(*tensors, **options)
            if _observers:
                announce(operator, result if isinstance(result, Tensor) else result[0], *tensors, **options)
            return result

        return call  # pyright: ignore[reportReturnType]

    return decorate
