"""Compiles Triton kernels without a GPU, with the arguments of the launches that the code makes."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TYPES = {torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
"""Bytes of shared memory that one block may use, by compute capability."""


@dataclass(frozen=True)
class Launch:
    """One launch: the kernel, its arguments by name, and its warps."""

    kernel: object
    arguments: dict[str, object]
    warps: int

    @property
    def name(self) -> str:
        """Name of the kernel."""
        return self.kernel.__name__  # pyright: ignore[reportAttributeAccessIssue]


class _Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def record(*args, num_warps: int, **kwargs) -> None:
            named = dict(zip(self.kernel.arg_names, args, strict=False)) | kwargs
            self.launches.append(Launch(self.kernel, named, num_warps))

        return record


def record_launches(monkeypatch: pytest.MonkeyPatch, module: object, run: Callable[[], object]) -> list[Launch]:
    """The launches of all kernels (attributes of `module` ending in _kernel) that `run` makes, on tensors of zeros."""
    launches: list[Launch] = []
    with monkeypatch.context() as patch:
        for name in dir(module):
            if name.endswith("_kernel"):
                patch.setattr(module, name, _Recorder(getattr(module, name), launches))
        run()
    return launches


def _specialise(value: object, constant_one: bool) -> tuple[str, object, bool]:
    """Type, constant (or ...) and whether a multiple of 16, as Triton sees an argument."""
    if value is None or isinstance(value, (bool, str)):
        return "constexpr", value, False
    if isinstance(value, Tensor):
        return TYPES[value.dtype], ..., value.data_ptr() % 16 == 0
    if value == 1 and constant_one:
        return "constexpr", 1, False
    assert isinstance(value, int)
    return "i32", ..., constant_one and value % 16 == 0


def compile_launch(launch: Launch, capability: int):
    """The compiled kernel, as this launch would compile it on a GPU of this compute capability."""
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):  # pyright: ignore[reportAttributeAccessIssue]
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        parts = value if isinstance(value, tuple) else (value,)
        seen = [_specialise(part, not parameter.do_not_specialize) for part in parts]
        for j, (_, constant, aligned) in enumerate(seen):
            place = (i, j) if isinstance(value, tuple) else (i,)
            if constant is not ...:
                constants[place] = constant
            elif aligned:
                hints[place] = [["tt.divisibility", 16]]
        signature[parameter.name] = tuple(s[0] for s in seen) if isinstance(value, tuple) else seen[0][0]
    source = ASTSource(launch.kernel, signature, constants, hints)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})
