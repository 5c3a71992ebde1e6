"""The selective scan in C (scan.c): the fastest path on a CPU, present where a compiler was found at installation.

Everything is float32; bfloat16 and float16 inputs are converted here, at the edge. The arithmetic of one block of
channels never depends on the number of threads, so results are the same bits for any `torch.set_num_threads`.
Canonical tensors and meanings as in op.py.
"""

import ctypes
import importlib.machinery
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .reference import LINES, sequences_and_length

_CHUNK, _BLOCK = 64, 16
_SPLITS, _RUNS = 4, 64
"""Backward: at least how many parts for the threads (each costs one copy of the gradients of B and C), at most how many
partial sums of the gradients of the parameters. Constants, so that sums do not depend on the machine."""
_BEST = 0
"""Instruction set of the C code: 0 the best, else 1 plain, 2 AVX2, 3 AVX-512 at most (tests lower it)."""

_SIZES = (
    "batch", "height", "width", "channels", "directions", "groups", "state", "rank", "softplus", "merge", "threads",
    "isa", "splits", "runs",
)  # fmt: skip
_INPUTS = ("x", "delta", "a", "b", "c", "skip", "delta_weight", "delta_bias", "z", "initial")
_STRIDES = {"x_stride": 3, "delta_stride": 4, "b_stride": 5, "c_stride": 5, "z_stride": 3, "grad_y_stride": 4}
_GRADIENTS = tuple("grad_" + name for name in _INPUTS)
_PARAMETERS = ("grad_a", "grad_skip", "grad_delta_weight", "grad_delta_bias")


class _Arguments(ctypes.Structure):
    """`scan_args` of scan.c, field by field."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, ctypes.c_void_p) for name in ("orders", *_INPUTS)),
        *((name, ctypes.c_void_p) for name in ("y", "final", "saved", "grad_y", "grad_final", *_GRADIENTS)),
        *((name, ctypes.c_int64 * n) for name, n in _STRIDES.items()),
    )


def library_file() -> Path | None:
    """The compiled scan.c of this installation, or None where it was not built."""
    names = ("_scan" + suffix for suffix in importlib.machinery.EXTENSION_SUFFIXES)
    return next((f for f in map(Path(__file__).parent.joinpath, names) if f.is_file()), None)


@cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    file = library_file()
    if file is None:
        return None, "its library was not built (no C compiler at installation?); install one, then reinstall"
    try:
        library = ctypes.CDLL(str(file))
        layout = library.vision_ssm_scan_layout
    except (OSError, AttributeError) as error:
        return None, f"its library cannot be loaded ({error}); reinstall"
    layout.restype = ctypes.c_int64
    if layout() != ctypes.sizeof(_Arguments) * 1_000_000 + _CHUNK * 1000 + _BLOCK:
        return None, f"its library {file.name} was built from another version of scan.c; reinstall"
    for function in (library.vision_ssm_scan_forward, library.vision_ssm_scan_backward):
        function.argtypes, function.restype = [ctypes.POINTER(_Arguments)], ctypes.c_int64
    return library, ""


def available() -> tuple[bool, str]:
    """Whether this back end can run here, and if not, why."""
    library, reason = _load()
    return library is not None, reason


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the C back end cannot run here: {reason}")
    return library


def saved_shape(x: Tensor, orders: tuple[int, ...], groups: int, state: int) -> tuple[int, ...]:
    """Shape of what `forward` keeps for `backward`, the states before every chunk of 64 steps.

    (sequences, blocks of up to 16 channels of one group, directions, chunks, state, 16).
    """
    sequences, length = sequences_and_length(x, orders)
    blocks = groups * -(-(x.shape[3] // groups) // _BLOCK)
    return (sequences, blocks, len(orders), -(-length // _CHUNK), state, _BLOCK)


class _Call:
    """One call of the library; keeps every tensor alive whose address it hands over."""

    def __init__(
        self, inputs: Sequence[Tensor | None], x: Tensor, A: Tensor, groups: int, rank: int,
        orders: tuple[int, ...], softplus: bool, merge: bool,
    ) -> None:  # fmt: skip
        if x.dtype == torch.float64 or x.device.type != "cpu":
            raise ValueError(f"the C back end takes float32, bfloat16, float16 on the CPU, got {x.dtype} on {x.device}")
        self.kept: list[Tensor] = []
        self.orders = (ctypes.c_int64 * len(orders))(*orders)
        self.args = _Arguments(
            *x.shape, len(orders), groups, A.shape[2], rank, softplus, merge,
            torch.get_num_threads(), _BEST, 1, 1, ctypes.addressof(self.orders),
        )  # fmt: skip
        for name, tensor in zip(_INPUTS, inputs, strict=True):
            self.give(name, tensor)

    def give(self, name: str, tensor: Tensor | None) -> None:
        """Hand over an input; where the library takes no strides for it, as a contiguous tensor."""
        if tensor is None:
            return
        strides = _STRIDES.get(name + "_stride")
        tensor = tensor.float()
        if strides is None or (tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
            tensor = tensor.contiguous()
        if strides is not None:
            found = tensor.stride()[:-1]
            setattr(self.args, name + "_stride", (ctypes.c_int64 * strides)(*found))
        self.kept.append(tensor)
        setattr(self.args, name, tensor.data_ptr())

    def output(self, name: str, shape: Sequence[int], *, zero: bool = False) -> Tensor:
        """A new tensor that the library fills, or adds to."""
        tensor = (torch.zeros if zero else torch.empty)(*shape, dtype=torch.float32, device="cpu")
        self.give(name, tensor)
        return tensor


def _run(function: Callable[..., int], call: _Call) -> None:
    if function(ctypes.byref(call.args)):
        raise MemoryError("selective_scan: no memory for the buffers of the C back end")


def forward(
    x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor, D: Tensor | None, delta_weight: Tensor | None,
    delta_bias: Tensor | None, z: Tensor | None, initial_state: Tensor | None, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, need_backward: bool, want_final: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Outputs, final states if wanted, chunk start states if a backward pass will come; canonical form of op.py."""
    library = _library()
    inputs = (x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    rank = 0 if delta_weight is None else delta_weight.shape[2]
    call = _Call(inputs, x, A, Bm.shape[4], rank, orders, softplus, merge)
    batch, height, width, channels = x.shape
    y = call.output("y", x.shape if merge else (batch, height, width, len(orders), channels))
    sequences = (batch, width) if orders[0] >= LINES else (batch,)
    final = call.output("final", (*sequences, len(orders), channels, A.shape[2]) if want_final else (0,))
    kept = saved_shape(x, orders, Bm.shape[4], A.shape[2]) if need_backward else (0,)
    saved = call.output("saved", kept)
    _run(library.vision_ssm_scan_forward, call)
    return y.to(x.dtype), final, saved


def backward(
    grad_y: Tensor, grad_final: Tensor | None, x: Tensor, delta: Tensor, A: Tensor, Bm: Tensor, C: Tensor,
    D: Tensor | None, delta_weight: Tensor | None, delta_bias: Tensor | None, z: Tensor | None,
    initial_state: Tensor | None, saved: Tensor, *,
    orders: tuple[int, ...], softplus: bool, merge: bool, needs: tuple[bool, ...],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the ten inputs, None where not needed; canonical form of op.py."""
    library = _library()
    inputs = (x, delta, A, Bm, C, D, delta_weight, delta_bias, z, initial_state)
    rank = 0 if delta_weight is None else delta_weight.shape[2]
    call = _Call(inputs, x, A, Bm.shape[4], rank, orders, softplus, merge)
    sequences, blocks = saved_shape(x, orders, Bm.shape[4], A.shape[2])[:2]
    splits, runs = min(blocks, -(-_SPLITS // sequences)), min(sequences, _RUNS)
    call.args.splits, call.args.runs = splits, runs
    if grad_y.stride(-1) != 1 or grad_y.dtype != torch.float32:
        grad_y = grad_y.float().contiguous()  # before `expand`, or each direction would get a copy
    call.give("grad_y", grad_y if not merge else grad_y.unsqueeze(3).expand(*x.shape[:3], len(orders), x.shape[3]))
    call.give("grad_final", grad_final)
    call.give("saved", saved)

    gradients: list[Tensor | None] = []
    for name, tensor, needed in zip(_GRADIENTS, inputs, needs, strict=True):
        if tensor is None or not needed:
            gradients.append(None)
        else:
            parts = {"grad_b": splits, "grad_c": splits, "grad_delta": splits if delta_weight is not None else 0}
            summed = runs if name in _PARAMETERS else parts.get(name, 0)
            gradients.append(call.output(name, (summed, *tensor.shape) if summed else tensor.shape, zero=summed > 0))
    _run(library.vision_ssm_scan_backward, call)
    return [
        None if g is None or t is None else (g.sum(0) if g.ndim > t.ndim else g).to(t.dtype)
        for g, t in zip(gradients, inputs, strict=True)
    ]
