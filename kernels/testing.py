"""How two tensors are compared in this project: one error measure, the tensor named in the message."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
"""Largest relative RMS error of an output or gradient against the float64 reference, by dtype of the inputs.

float32: sums of up to 1e5 rounded products; bfloat16 and float16: one rounding of the output (2^-9, 2^-11) and margin.
"""


def relative_rms(got: Tensor, want: Tensor) -> float:
    """|got - want| / |want| in the L2 norm, in float64; infinite when `got` is not finite where `want` is."""
    if got.shape != want.shape:
        return float("inf")
    got64, want64 = got.detach().to("cpu", torch.float64), want.detach().to("cpu", torch.float64)
    error = (got64 - want64).norm().item()
    if error != error:
        return float("inf")
    return error / max(want64.norm().item(), 1e-30) if error else 0.0


def assert_close(name: str, got: Tensor, want: Tensor, rel: float) -> None:
    """Raise AssertionError naming the tensor when shapes differ or the relative RMS error exceeds `rel`."""
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    error = relative_rms(got, want)
    if not error <= rel:
        raise AssertionError(f"{name}: relative RMS error {error:.2e} exceeds {rel:.1e}, shape {tuple(got.shape)}")


def run_with_grads(function: Callable[..., Tensor | Sequence[Tensor]], *inputs: Tensor | None) -> list[Tensor | None]:
    """Outputs of `function`, then the gradients of a fixed weighted sum of them for each input that requires one.

    The weights are cosines of the index, so that no gradient is symmetric by accident.
    """
    leaves = [None if t is None else t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    total = torch.zeros((), dtype=torch.float64, device=outputs[0].device)
    for output in outputs:
        weight = torch.arange(output.numel(), device=output.device, dtype=torch.float64).cos().view(output.shape)
        total = total + (output.to(torch.float64) * weight.to(output.dtype).to(torch.float64)).sum()
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(total, wanted)) if wanted else iter(())
    gradients = [next(found) if t is not None and t.requires_grad else None for t in leaves]
    return [o.detach() for o in outputs] + gradients
