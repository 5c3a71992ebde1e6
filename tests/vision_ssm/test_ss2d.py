"""The scan modules: SS2D against recorded values and a plain loop, the bidirectional mixer against its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from detection.convert import convert_entry
from kernels.testing import assert_close
from tests.golden import ASSETS, values, weights
from vision_ssm.mamba import BidirectionalMamba, DirectionalScan
from vision_ssm.scan_parameters import ScanParameters
from vision_ssm.ss2d import SS2D


def golden_ss2d(stem: str, dim: int) -> tuple[SS2D, dict[str, Tensor]]:
    module = SS2D(dim)
    state: dict[str, Tensor] = {}
    for name, tensor in weights(ASSETS / "detection", stem).items():
        state |= convert_entry(f"model.11.ss2d.0.{name}", tensor)
    module.load_state_dict({name.removeprefix("neck.top_down4.ss2d.0."): tensor for name, tensor in state.items()})
    return module.eval(), values(ASSETS / "detection", stem)


def test_ss2d_matches_the_released_code() -> None:
    module, recorded = golden_ss2d("ss2d_24_odd", 24)
    with torch.no_grad():
        core = module.core(recorded["core_input"].permute(0, 2, 3, 1).contiguous())
        output = module(recorded["input"].permute(0, 2, 3, 1))
    assert (core - recorded["core_output_bhwc"]).abs().max() <= 1e-4
    assert (output.permute(0, 3, 1, 2) - recorded["output"]).abs().max() <= 1e-4


def test_ss2d_matches_the_larger_recorded_map(shared_root) -> None:
    folder = shared_root / "golden" / "detection"
    module = SS2D(32)
    state: dict[str, Tensor] = {}
    for name, tensor in weights(folder, "ss2d_32").items():
        state |= convert_entry(f"model.11.ss2d.0.{name}", tensor)
    module.load_state_dict({name.removeprefix("neck.top_down4.ss2d.0."): tensor for name, tensor in state.items()})
    recorded = values(folder, "ss2d_32")
    with torch.no_grad():
        output = module(recorded["input"].permute(0, 2, 3, 1))
    assert (output.permute(0, 3, 1, 2) - recorded["output"]).abs().max() <= 1e-4


def test_ss2d_gradients_agree_with_the_reference_back_end() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 5, 8)
    want = SS2D(8, state_size=3, backend="reference")
    got = SS2D(8, state_size=3)
    got.load_state_dict(want.state_dict())
    for module in (want, got):
        module(x).square().sum().backward()
    for (name, w), g in zip(want.named_parameters(), got.parameters(), strict=True):
        assert w.grad is not None
        assert g.grad is not None
        assert_close(name, g.grad, w.grad, rel=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1)], ids=str)
def test_ss2d_on_thin_maps_in_float64(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    module = SS2D(4, state_size=2).double()
    x = torch.randn(1, *size, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(module, (x,), fast_mode=True)


def test_ss2d_under_autocast_keeps_constants_in_float32() -> None:
    torch.manual_seed(0)
    module = SS2D(8)
    x = torch.randn(1, 4, 4, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert_close("y", y.float(), module(x), rel=0.05)
    y.float().sum().backward()
    assert module.scan.A_log.grad is not None
    assert module.scan.A_log.grad.dtype == torch.float32


def test_vmamba_initialisation() -> None:
    torch.manual_seed(0)
    scan = ScanParameters(2, 64, state_size=5, rank=4, init="vmamba")
    torch.testing.assert_close(scan.A[1, 3], -torch.arange(1.0, 6.0))
    steps = F.softplus(scan.dt_bias)
    assert steps.min() >= 0.9e-3
    assert steps.max() <= 0.101
    assert steps.log().std() > 0.5  # spread over the range, not at one value
    assert scan.dt_weight.abs().max() <= 0.5
    with pytest.raises(ValueError, match="'random'"):
        ScanParameters(1, 2, state_size=1, rank=1, init="random")  # pyright: ignore[reportArgumentType]


def plain_direction(layer: DirectionalScan, x: Tensor, z: Tensor) -> Tensor:
    """The definition of one direction, token by token, on sequences already in reading order."""
    u = F.silu(F.conv1d(F.pad(x.mT, (3, 0)), layer.conv.weight, layer.conv.bias, groups=x.shape[-1])).mT
    rank, state = layer.split[0], layer.split[1]
    dt, B, C = layer.x_proj(u).split((rank, state, state), dim=-1)
    delta = F.softplus(dt @ layer.scan.dt_weight[0].T + layer.scan.dt_bias[0])
    h = torch.zeros(x.shape[0], x.shape[2], state, dtype=x.dtype)
    outputs = []
    for t in range(x.shape[1]):
        decay = torch.exp(delta[:, t, :, None] * layer.scan.A[0])
        h = decay * h + (delta[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append((h * C[:, t, None]).sum(-1) + layer.scan.D[0] * u[:, t])
    return torch.stack(outputs, dim=1) * F.silu(z)


def test_bidirectional_mamba_matches_its_definition() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(6, state_size=3).double()
    tokens = torch.randn(2, 9, 6, dtype=torch.float64)
    with torch.no_grad():
        x, z = mixer.in_proj(tokens).chunk(2, dim=-1)
        forward = plain_direction(mixer.forwards, x, z)
        backward = plain_direction(mixer.backwards, x.flip(1), z.flip(1)).flip(1)
        want = mixer.out_proj((forward + backward) / 2)
        assert_close("mixer", mixer(tokens), want, rel=1e-10)


def test_every_token_of_the_mixer_sees_all_others() -> None:
    torch.manual_seed(0)
    mixer = BidirectionalMamba(4, state_size=2)
    tokens = torch.randn(1, 6, 4, requires_grad=True)
    for position in range(6):
        (gradient,) = torch.autograd.grad(mixer(tokens)[0, position].sum(), tokens)
        assert (gradient[0].abs().sum(-1) > 0).all()
