"""Mixing matrices: M @ value is what the scan of every module and every operator gives; rows are its Jacobian."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

import vision_ssm.mixing as mixing_module
from generation.frame_attention import FramePositionBias, TemporalAttention, TemporalLinearAttention
from generation.temporal import S4D, S6, TemporalConfig, temporal_layer
from generation.unet_blocks import SpatialAttention, SpatialLinearAttention
from kernels import s4d, selective_scan, selective_scan_2d, ssd, ssd_2d, ssd_bidirectional, ssd_noncausal
from kernels.mixing import Direction, Mixing, mixing_of, s6_matrix
from kernels.observe import Call
from vision_ssm.errors import UserError
from vision_ssm.mamba import BidirectionalMamba, DirectionalScan
from vision_ssm.mixers import build_mixer
from vision_ssm.mixing import MixingMatrix, cells_of, mixings, observing_all
from vision_ssm.ss2d import SS2D

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
"""Largest error over the largest output."""


class Layer(nn.Module):
    """A module around a call of an operator with random tensors of the given shapes."""

    def __init__(self, function: Callable[..., Any], *shapes: tuple[int, ...], **options: Any) -> None:
        super().__init__()
        self.function, self.shapes, self.options = function, shapes, options

    def forward(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return self.function(x, *(torch.randn(s, generator=generator).to(x) for s in self.shapes), **self.options)


def gated_scan(x: Tensor, dt: Tensor, A: Tensor, *others: Tensor, **options: Any) -> Any:
    *others, z = others
    return selective_scan(x, dt, -A.exp(), *others, z=z, softplus=True, **options)


def negative(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(x: Tensor, dt: Tensor, A: Tensor, *others: Tensor, **options: Any) -> Any:
        return function(x, dt, -A.exp(), *others, softplus=True, **options)

    return call


def transformed_s4d(x: Tensor, *parameters: Tensor, **options: Any) -> Tensor:
    return s4d(x, *parameters, **options)  # pyright: ignore


def masked(q: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q.flip(-2), q.roll(1, -1), attn_mask=mask)


def causal_grouped(q: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, q[:, :2].flip(-2), q[:, :2], is_causal=True, enable_gqa=True, scale=0.3)


VARIANTS: dict[str, Callable[[], tuple[nn.Module, list[Any]]]] = {
    "ss2d": lambda: (SS2D(6, state_size=5, init="vmamba"), [torch.randn(2, 5, 7, 6)]),
    "ss2d official": lambda: (SS2D(4, state_size=3), [torch.randn(1, 7, 3, 4)]),
    "bidirectional": lambda: (BidirectionalMamba(6, state_size=5), [torch.randn(2, 13, 6)]),
    "directional": lambda: (
        DirectionalScan(6, state_size=3, rank=2, conv_size=4, reverse=True, backend="auto"),
        [torch.randn(2, 11, 6), torch.randn(2, 11, 6)],
    ),
    **{
        f"dim {name} {'causal' if causal else 'both ways'} axis {axis}": lambda name=name, causal=causal, axis=axis: (
            build_mixer(name, 32, state_size=6, causal=causal),
            [torch.randn(2, 3, 5, 32), axis],
        )
        for name in ("s6", "ssd")
        for causal in (False, True)
        for axis in (1, 2)
    },
    "s4d layer": lambda: (S4D(6, state_size=4, reverse=True), [torch.randn(2, 9, 3, 6)]),
    "s6 layer": lambda: (S6(6, state_size=4), [torch.randn(2, 9, 3, 6)]),
    **{
        f"temporal {kind} {variant}": lambda kind=kind, variant=variant: (
            temporal_layer(TemporalConfig(kind=kind, variant=variant, state_size=4, hidden=12), 6),
            [torch.randn(2, 9, 2, 6)],
        )
        for kind in ("s4d", "s6", "ssd")
        for variant in ("glu", "mlp", "gated", "mamba")
    },
    "temporal attention": lambda: (
        TemporalAttention(6, heads=2, head_width=8),
        [torch.randn(2, 9, 3, 6), FramePositionBias(2)(9).double().detach()],
    ),
    "temporal linear attention": lambda: (
        TemporalLinearAttention(6, heads=2, head_width=8),
        [torch.randn(2, 9, 3, 6)],
    ),
    "spatial attention": lambda: (SpatialAttention(6, heads=2), [torch.randn(1, 2, 3, 5, 6)]),
    "spatial linear attention": lambda: (SpatialLinearAttention(6, heads=2), [torch.randn(1, 2, 3, 5, 6)]),
    **{
        f"grouped scan axis {dim} {'backwards' if reverse else ''}": lambda dim=dim, reverse=reverse: (
            Layer(
                gated_scan, (2, 7, 3, 6), (6, 5), (2, 7, 3, 2, 5), (2, 7, 3, 2, 5), (6,), (2, 7, 3, 6),
                dim=dim, reverse=reverse,
            ),
            [torch.randn(2, 7, 3, 6)],
        )
        for dim, reverse in ((1, False), (2, True))
    },
    "scan in 3 directions apart": lambda: (
        Layer(
            negative(selective_scan_2d), (2, 3, 4, 3, 5), (3, 5, 2), (2, 3, 4, 3, 2), (2, 3, 4, 3, 2), (3, 5),
            directions=("columns_reversed", "rows", "columns"), merge="none",
        ),
        [torch.randn(2, 3, 4, 5)],
    ),
    "ssd groups": lambda: (
        Layer(negative(ssd), (2, 7, 4), (4,), (2, 7, 2, 5), (2, 7, 2, 5), (4,), reverse=True, chunk=3),
        [torch.randn(2, 7, 4, 3)],
    ),
    "ssd both ways": lambda: (
        Layer(negative(ssd_bidirectional), (2, 7, 2, 4), (2, 4), (2, 7, 2, 2, 5), (2, 7, 2, 2, 5), (4,)),
        [torch.randn(2, 7, 4, 3)],
    ),
    "ssd 2-d": lambda: (
        Layer(negative(ssd_2d), (2, 3, 5, 4, 2), (4, 2), (2, 3, 5, 4, 1, 3), (2, 3, 5, 4, 1, 3)),
        [torch.randn(2, 3, 5, 2, 3)],
    ),
    "ssd without order": lambda: (
        Layer(negative(ssd_noncausal), (2, 3, 5, 4), (4,), (2, 3, 5, 2, 6), (2, 3, 5, 2, 6), (4,)),
        [torch.randn(2, 3, 5, 4, 3)],
    ),
    "s4d axis 2": lambda: (
        Layer(transformed_s4d, (6,), (6, 3), (6, 3), (6, 3, 2), (6,), dim=2), [torch.randn(2, 3, 9, 6)]
    ),
    "masked attention": lambda: (Layer(masked, (2, 3, 7, 7)), [torch.randn(2, 3, 7, 4)]),
    "causal grouped attention": lambda: (Layer(causal_grouped), [torch.randn(2, 4, 7, 4)]),
}  # fmt: skip


def built(name: str, dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    module, inputs = VARIANTS[name]()
    return module.to(dtype), [t.to(dtype) if isinstance(t, Tensor) else t for t in inputs]


def product(matrix: Tensor, value: Tensor) -> Tensor:
    """(S, E, L, L) and (S, L, D) -> (S, L, D)."""
    heads = value.unflatten(-1, (matrix.shape[1], -1))
    return torch.einsum("seij,sjep->siep", matrix, heads).flatten(2)


def largest_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got - want).abs().max() / want.abs().max()).item()


def outputs(mixing: Mixing) -> list[Tensor]:
    """The outputs that a mixing's matrices must give: one for each direction, or their sum."""
    parts = range(len(mixing.directions)) if mixing.separate else (0,)
    return [mixing.output_of(k, mixing.output) for k in parts]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_matrix_times_value_is_the_output_of_the_scan(name: str, dtype: torch.dtype) -> None:
    module, inputs = built(name, dtype)
    with torch.no_grad():
        for mixing in mixings(module, *inputs):
            made = [product(direction.rows(), direction.value) for direction in mixing.directions]
            made = made if mixing.separate else [torch.stack(made).sum(0)]
            for got, want in zip(made, outputs(mixing), strict=True):
                gated = got if mixing.gate is None else got * mixing.gate
                assert largest_error(gated, want) <= TOLERANCE[dtype]


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_the_jacobian_and_its_transpose_is_the_gradient(name: str) -> None:
    """With delta, B and C held fixed, dy_i / du_j = M_ij."""
    module, inputs = built(name, torch.float64)
    for direction in [d for mixing in mixings(module, *inputs) for d in mixing.directions]:
        value = direction.value.detach()
        matrix = direction.rows().detach()
        at = torch.tensor([0, value.shape[1] // 2])
        assert largest_error(direction.rows(at), matrix[:, :, at]) <= 1e-12
        jacobian_is(direction, value, matrix, channel=0)
        jacobian_is(direction, value, matrix, channel=value.shape[2] - 1)
        weight = torch.randn_like(value)
        assert largest_error(direction.transposed(weight), product(matrix.transpose(-1, -2), weight)) <= 1e-12


def jacobian_is(direction: Direction, value: Tensor, matrix: Tensor, channel: int) -> None:
    """The derivative of the first sequence's outputs by its inputs, in one channel, is its head's matrix."""
    found = jacobian(lambda v: direction.apply(v)[0, :, channel], value)[:, 0, :, channel]  # pyright: ignore
    wanted = matrix[0, channel // (value.shape[2] // direction.heads)]
    assert (found - wanted).abs().max() <= 1e-12 * max(1.0, wanted.abs().max().item())


@pytest.mark.parametrize("name", ["ss2d", "bidirectional", "dim ssd both ways axis 2", "temporal s4d glu"])
def test_forms_of_a_modules_matrix_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = built(name, torch.float64)
    assert isinstance(module, MixingMatrix)
    with torch.no_grad():
        each = module.mixing_matrix(*inputs, directions="each")
        channels = module.mixing_matrix(*inputs, reduce=None)
        monkeypatch.setattr("kernels.mixing.BLOCK", 1)  # head by head
        total = module.mixing_matrix(*inputs)
        mean = module.mixing_matrix(*inputs, reduce="mean")
    heads, value = total.shape[1], mixings(module, *inputs)[0].directions[0].value
    assert channels.shape[1] == value.shape[2]
    assert largest_error(each.sum(1), total) <= 1e-12
    assert (
        largest_error(
            channels.unflatten(1, (heads, -1)), total.unsqueeze(2).expand(-1, -1, value.shape[2] // heads, -1, -1)
        )
        <= 1e-12
    )
    assert largest_error(mean, total.mean(1)) <= 1e-12


def test_ss2d_matrix_gives_what_its_norm_sees() -> None:
    module, (x,) = built("ss2d", torch.float64)
    assert isinstance(module, SS2D)
    seen: dict[str, Tensor] = {}
    module.x_proj.register_forward_pre_hook(lambda _, args: seen.update(value=args[0].flatten(2).transpose(1, 2)))
    module.norm.register_forward_pre_hook(lambda _, args: seen.update(output=args[0].flatten(1, 2)))
    matrix = module.mixing_matrix(x)
    assert largest_error(product(matrix, seen["value"]), seen["output"]) <= 1e-12


@pytest.mark.parametrize("name", ["ss2d", "bidirectional"])
def test_pooled_matrix_is_exact_for_values_constant_in_cells(name: str) -> None:
    module, inputs = built(name, torch.float64)
    assert isinstance(module, MixingMatrix)
    with torch.no_grad():
        found = mixings(module, *inputs)
        grid = found[0].grid or (1, found[0].directions[0].value.shape[1])
        cells = cells_of(grid, 3, found[0].directions[0].value)
        matrix, pooled = module.mixing_matrix(*inputs), module.mixing_matrix(*inputs, pool=3)
        averaged = module.mixing_matrix(*inputs, pool=3, reduce="mean")
    value = cells.T @ torch.randn(len(cells), matrix.shape[1], dtype=torch.float64)
    means = cells / cells.sum(1, keepdim=True)
    wanted = means @ product(matrix, value.expand(len(matrix), -1, -1))
    assert largest_error(product(pooled, (means @ value).expand(len(matrix), -1, -1)), wanted) <= 1e-12
    assert largest_error(averaged, pooled.mean(1)) <= 1e-12


def test_too_large_a_matrix_names_its_size_and_the_pooled_form(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = built("ss2d", torch.float32)
    assert isinstance(module, MixingMatrix)
    monkeypatch.setattr(mixing_module, "LARGEST", 2 * 12 * 35**2 * 4 - 1)
    with pytest.raises(UserError, match=r"35 positions would take 1 MiB \(24 matrices\).*pool=2 or more"):
        module.mixing_matrix(*inputs)
    assert module.mixing_matrix(*inputs, pool=2).shape == (2, 12, 12, 12)
    assert module.mixing_matrix(*inputs, reduce="mean").shape == (2, 35, 35)


def test_mixing_refuses_what_has_no_matrix() -> None:
    with pytest.raises(UserError, match="Linear calls no scan"):
        mixings(nn.Linear(2, 2), torch.randn(1, 2))
    module, inputs = built("ss2d", torch.float32)
    assert isinstance(module, MixingMatrix)
    with pytest.raises(UserError, match="pool must be 1 or more"):
        module.mixing_matrix(*inputs, pool=0)


def test_gradients_flow_through_the_matrix_to_the_parameters() -> None:
    module, inputs = built("ss2d", torch.float64)
    assert isinstance(module, SS2D)
    module.mixing_matrix(*inputs, reduce="mean").square().sum().backward()
    for name in ("scan.A_log", "scan.D", "scan.dt_weight", "x_proj.weight", "conv.weight", "in_proj.weight"):
        gradient = module.get_parameter(name).grad
        assert gradient is not None
        assert gradient.abs().max() > 0, name
        assert gradient.isfinite().all(), name


def test_decays_of_one_and_of_zero_are_exact() -> None:
    """A = 0 keeps all of the past, A = -inf none of it."""
    steps, ones = torch.rand(1, 5, 2, dtype=torch.float64), torch.ones(1, 5, 1, 1, dtype=torch.float64)
    matrix = s6_matrix(steps, torch.tensor([[0.0], [-torch.inf]], dtype=torch.float64), ones, ones)
    assert torch.equal(matrix[0, 0], steps[0, :, 0].expand(5, 5).tril())
    assert torch.equal(matrix[0, 1], torch.diag(steps[0, :, 1]))


def test_observers_are_told_in_order_and_leave_no_trace() -> None:
    module, inputs = built("bidirectional", torch.float32)
    calls: list[Call] = []
    with observing_all(calls.append):
        module(*inputs)
    module(*inputs)
    assert [call.operator for call in calls] == ["s6", "s6"]
    orders = [mixing_of(call).directions[0].rank[0].item() for call in calls]  # pyright: ignore
    assert orders == [0, 12]
