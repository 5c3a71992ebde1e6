"""Runs the Gluon twins on the CPU: Triton's interpreter knows no Gluon, but the kernels are plain Python functions.

Their modules are executed once more with a stand-in for the language: tensors are torch tensors, layouts mean nothing,
shared memory is a tensor, a pointer is a flat tensor with an offset. One program runs after another, all of its lanes
at once, so that races are not found; indices, masks, recurrences and sums are.
"""

import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import kernels

FOLDER = Path(kernels.__file__).parent / "selective_scan"
ASM = {"ex2": torch.exp2, "lg2": torch.log2, "rcp": torch.reciprocal, "pre": lambda pointers: pointers}
_program = {"id": 0, "count": 1}


class Pointer:
    """An address or a tile of addresses in a tensor's storage."""

    def __init__(self, storage: Tensor, offset: Any = 0) -> None:
        self.storage, self.offset = storage, offset
        self.dtype = types.SimpleNamespace(element_ty=storage.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.storage, self.offset + offset)


def pointer(t: Tensor) -> Pointer:
    """Address of the first element of a tensor, as a kernel gets it."""
    flat = torch.as_strided(t, (t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return Pointer(flat, t.storage_offset())


class Shared:
    """Shared memory and its views."""

    def __init__(self, data: Tensor) -> None:
        self.data, self.shape, self.dtype = data, tuple(data.shape), data.dtype

    def load(self, layout: object) -> Tensor:
        return self.data.clone()

    def store(self, value: Tensor) -> None:
        assert value.shape == self.data.shape
        assert value.dtype == torch.float32 or not self.data.is_floating_point()
        self.data.copy_(value)

    def index(self, i: Any) -> "Shared":
        assert 0 <= int(i) < self.shape[0]
        return Shared(self.data[int(i)])

    def permute(self, order: tuple[int, ...]) -> "Shared":
        return Shared(self.data.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: list[int], layout: object) -> "Shared":
        return Shared(self.data.view(shape))


def _load(ptr: Pointer, mask: Any = True, other: float = 0.0) -> Tensor:
    offset, mask = torch.broadcast_tensors(torch.as_tensor(ptr.offset), torch.as_tensor(mask))
    inside = torch.where(mask, offset, 0)
    assert int(inside.min()) >= 0, "read before the tensor"
    assert int(inside.max()) < ptr.storage.numel(), "read behind the tensor"
    return torch.where(mask, ptr.storage[inside], torch.tensor(other, dtype=ptr.storage.dtype))


def _store(ptr: Pointer, value: Tensor, mask: Any = True) -> None:
    offset, value, mask = torch.broadcast_tensors(torch.as_tensor(ptr.offset), value, torch.as_tensor(mask))
    assert value.dtype == ptr.storage.dtype
    where = offset[mask]
    if where.numel():
        assert int(where.min()) >= 0, "write before the tensor"
        assert int(where.max()) < ptr.storage.numel(), "write behind the tensor"
        assert where.unique().numel() == where.numel(), "one element written twice"
        ptr.storage[where] = value[mask]


def _where(condition: Any, a: Any, b: Any) -> Tensor:
    return torch.where(torch.as_tensor(condition), torch.as_tensor(a), torch.as_tensor(b))


def _asm(text: str, _constraints: str, values: list[Any], **_: object) -> Any:
    return ASM[text[:3]](values[0])


def _language() -> types.SimpleNamespace:
    """The part of triton.experimental.gluon.language that the twins use."""
    return types.SimpleNamespace(
        constexpr=lambda value: value, float32=torch.float32, int32=torch.int32, int64=torch.int64,
        arange=lambda a, b, layout=None: torch.arange(a, b), where=_where, load=_load, store=_store,
        maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype)),
        minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype)),
        abs=torch.abs, zeros=lambda shape, dtype, layout=None: torch.zeros(*(int(n) for n in shape), dtype=dtype),
        sum=lambda x, axis: x.sum(axis), reshape=lambda x, shape: x.reshape([int(n) for n in shape]),
        permute=lambda x, order: x.permute(order), join=lambda a, b: torch.stack([a, b], -1),
        expand_dims=lambda x, axis: x.unsqueeze(axis), convert_layout=lambda x, layout: x,
        cast=lambda x, dtype: torch.as_tensor(x).to(dtype), cdiv=lambda a, b: -(-a // b),
        multiple_of=lambda x, values: x, inline_asm_elementwise=_asm, static_range=range,
        program_id=lambda axis: torch.tensor(_program["id"]), num_programs=lambda axis: torch.tensor(_program["count"]),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(
            torch.full([int(n) for n in shape], torch.nan if dtype.is_floating_point else -(2**31), dtype=dtype)
        ),
        thread_barrier=lambda: None, SliceLayout=lambda axis, parent: None,
        SwizzledSharedLayout=lambda *a, **k: None,
        BlockedLayout=lambda size, threads, warps, order: types.SimpleNamespace(size_per_thread=size),
    )  # fmt: skip


class _Kernel:
    """Stands where the host code has a compiled kernel."""

    def __init__(self, function) -> None:
        self.function = function

    def __getitem__(self, grid: tuple[int, ...]):
        def launch(*args: object, num_warps: int = 1, maxnreg: int = 0, **named: object) -> None:
            code = self.function.__code__
            given = {**dict(zip(code.co_varnames, args, strict=False)), **named}
            given = {name: _argument(name, value) for name, value in given.items()}
            for i in range(grid[0]):
                _program.update(id=i, count=grid[0])
                self.function(**given)

        return launch


def _argument(name: str, value: object) -> object:
    if isinstance(value, Tensor):
        return pointer(value)
    runtime = isinstance(value, int) and not isinstance(value, bool) and not name.isupper() and name != "ALIGN"
    return torch.tensor(value) if runtime else value


def emulated_twins() -> types.SimpleNamespace:
    """The twins' kernels, to be launched on CPU tensors."""
    language = _language()

    def jit(function=None, **_: object):
        return (lambda f: f) if function is None else function

    gluon = types.SimpleNamespace(jit=jit, constexpr_function=lambda f: f)
    tl = types.SimpleNamespace(where=_where, maximum=language.maximum, minimum=language.minimum)
    from kernels.selective_scan import gpu_kernels

    chunk_bounds = types.FunctionType(gpu_kernels.chunk_bounds.fn.__code__, {"tl": tl})
    plain = types.SimpleNamespace(chunk_bounds=types.SimpleNamespace(fn=chunk_bounds))
    names: dict[str, Any] = {"gluon": gluon, "gl": language, "plain": plain, "__name__": "twins"}
    for file in ("gluon_kernels.py", "gluon_gradient.py"):
        source = (FOLDER / file).read_text(encoding="utf-8")
        start = source.index("RUNTIME = [") if file == "gluon_kernels.py" else source.index("__all__")
        # The stand-in's tensors carry no layout to ask for.
        exec(compile(source[start:].replace("value.type.layout", "None"), file, "exec"), names)
    kinds = ("scan_chunk_kernel", "scan_output_kernel", "scan_gradient_kernel")
    return types.SimpleNamespace(**{kind: _Kernel(names[kind]) for kind in kinds})


class Combination:
    """Stands for `gpu_kernels.scan_combine_kernel`, which Triton's interpreter tests."""

    def __getitem__(self, grid: tuple[int, ...]):
        return self.launch

    def launch(
        self, states: Tensor, decay_sum: Tensor, a: Tensor, border: Tensor | None, last: Tensor | None,
        *_: object, ADJOINT: bool, **__: object,
    ) -> None:  # fmt: skip
        """Turns the chunks' own contributions into true states, one chunk after the other."""
        batch, lines, directions, _, n, d = states.shape
        decay = torch.exp(decay_sum.unsqueeze(-2) * a.mT[None, None, :, None])  # (B, W, K, chunks, N, D)
        count = decay.shape[3]
        carry = torch.zeros(batch, lines, directions, n, d)
        if border is not None:
            carry += border.reshape(batch, lines, directions, d, n).mT
        states[:, :, :, count if ADJOINT else 0] = carry
        for step in range(count):
            chunk = count - 1 - step if ADJOINT else step
            slot = chunk if ADJOINT else chunk + 1
            carry = decay[:, :, :, chunk] * carry + states[:, :, :, slot]
            states[:, :, :, slot] = carry
        if last is not None:
            last.copy_(carry.mT.reshape(last.shape))
