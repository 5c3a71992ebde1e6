"""Everything recorded of the published video networks and of Vim, at the tolerances of two exact rewritings."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from generation.convert import config_from_state_dict, convert_layer, from_official
from generation.mixers import S6Mixer
from generation.published_diffusion import CosineSchedule
from generation.temporal import GLULayer, TemporalConfig, temporal_layer
from generation.unet import SSMVideoUNet
from kernels.s4d import torch_path
from tests.generation.published import SHIPPED, Case, read
from tests.golden import values
from vision_ssm.backbones.convert import vim_mixer
from vision_ssm.backbones.vim import VimBlock
from vision_ssm.mamba import BidirectionalMamba

LAYER_ERROR, GRADIENT_ERROR, NET_ERROR = 2e-6, 1e-4, 2e-5
"""Largest absolute error of layers and of nets; of gradients relative to the largest entry."""
VARIANTS = {8: "glu", 1: "mlp", 2: "glu", 10: "gated", 20: "mamba"}
LAYERS = sorted(file.stem for file in SHIPPED.glob("ssmv_v?_*_layer*.json"))
NETS = sorted(file.stem for file in SHIPPED.glob("ssmv_v?_unet*.json"))


def assert_matches(module: nn.Module, recorded: dict[str, Tensor]) -> None:
    """Output and gradient of the input."""
    x = recorded["x"].requires_grad_()
    y = module(x)
    (y * recorded["grad_weight"]).sum().backward()
    assert x.grad is not None
    assert (y - recorded["y"]).abs().max() <= LAYER_ERROR
    assert (x.grad - recorded["grad_x"]).abs().max() <= GRADIENT_ERROR * recorded["grad_x"].abs().max()


def layer(case: Case) -> nn.Module:
    config = TemporalConfig(
        kind="s6" if case.config["cls"] == "S6Layer" else "s4d",
        variant=VARIANTS[case.config["version"]],
        bidirectional=case.config["bidirectional"],
        state_size=case.config["d_state"],
        hidden=case.config["linear_dim"],
    )
    module = temporal_layer(config, case.config["dim"])
    module.load_state_dict(convert_layer(case.weights))
    return module


def test_every_case_is_here():
    assert len(LAYERS) == 18
    assert len(NETS) == 4


@pytest.mark.parametrize("stem", LAYERS)
def test_temporal_layer(stem: str) -> None:
    case = read(stem)
    assert_matches(layer(case), case.values)


def test_layers_take_frames_on_axis_1_of_any_tensor() -> None:
    case = read("ssmv_v4_bi_s6_layer_ver20")
    x = case.values["x"].unflatten(0, (1, 3)).transpose(1, 2)  # (1, frames, 3, C)
    y = layer(case)(x.contiguous())
    assert (y.transpose(1, 2)[0] - case.values["y"]).abs().max() <= LAYER_ERROR


def test_s4d_with_its_gated_unit() -> None:
    case = read("ssmv_v1_s4d_core")
    module = GLULayer(16, state_size=16, bidirectional=False, hidden=None)
    module.load_state_dict(convert_layer({f"s4d.{name}": tensor for name, tensor in case.weights.items()}))
    assert_matches(module, case.values)


def test_s4d_convolution_kernel() -> None:
    case = read("ssmv_v1_s4d_kernel")
    modes = torch_path.discretise(*(case.weights[f"kernel.{n}"] for n in ("log_dt", "log_A_real", "A_imag", "C")))
    taps = torch_path.convolution_kernel(modes, torch_path.powers(modes.z, 40))
    assert (taps - case.values["K"]).abs().max() <= LAYER_ERROR


def net(stem: str) -> tuple[SSMVideoUNet, Case]:
    case = read(stem)
    weights = from_official(case.weights, linear_attention=case.config["temporal_arch"] == "l-attn")
    model = SSMVideoUNet(**config_from_state_dict(weights)).eval()
    model.load_state_dict(weights)
    return model, case


@pytest.mark.parametrize("stem", NETS)
@torch.no_grad()
def test_net(stem: str) -> None:
    model, case = net(stem)
    y = model(case.values["x"], case.values["time"]).sample
    assert (y - case.values["y"]).abs().max() <= NET_ERROR


@pytest.mark.gpu
@pytest.mark.parametrize("stem", LAYERS)
def test_temporal_layer_on_the_gpu(stem: str) -> None:
    case = read(stem)
    module, recorded = layer(case).cuda(), {name: tensor.cuda() for name, tensor in case.values.items()}
    x = recorded["x"].requires_grad_()
    y = module(x)
    (gradient,) = torch.autograd.grad(y, x, recorded["grad_weight"])
    assert (y - recorded["y"]).abs().max() <= 5 * LAYER_ERROR
    assert (gradient - recorded["grad_x"]).abs().max() <= GRADIENT_ERROR * recorded["grad_x"].abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize("stem", NETS)
@torch.no_grad()
def test_net_on_the_gpu(stem: str) -> None:
    model, case = net(stem)
    with torch.backends.cudnn.flags(allow_tf32=False):
        y = model.cuda()(case.values["x"].cuda(), case.values["time"].cuda()).sample
    assert (y.cpu() - case.values["y"]).abs().max() <= 5 * NET_ERROR


def assert_same_schedule(recorded: dict[str, Tensor], timesteps: int) -> None:
    schedule = CosineSchedule.of(timesteps)
    assert recorded.keys() == {field.name for field in dataclasses.fields(schedule)}
    for name, table in recorded.items():
        assert torch.equal(getattr(schedule, name), table), name


def test_cosine_schedule_is_equal_bit_for_bit() -> None:
    assert_same_schedule(values(SHIPPED, "ssmv_schedule_cosine256"), 256)


@pytest.mark.parametrize("stem", ["vim_bimamba_v2_div0", "vim_bimamba_v2_div1"])
def test_vim_mixer(stem: str) -> None:
    case = read(stem)
    module = BidirectionalMamba(case.config["d_model"])
    module.load_state_dict(vim_mixer(case.weights, averaged=case.config["if_divide_out"]))
    assert_matches(module, case.values)


class AlongTokens(nn.Module):
    """DiM's mixer over (B, L, C)."""

    def __init__(self, mixer: S6Mixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x, 1)


def test_mixer_of_dim_is_vims() -> None:
    case = read("vim_bimamba_v2_div1")
    mixer = S6Mixer(case.config["d_model"])
    mixer.load_state_dict(vim_mixer(case.weights))
    assert_matches(AlongTokens(mixer), case.values)


@pytest.mark.parametrize("place", ["first", "next"])
@torch.no_grad()
def test_vim_block(place: str) -> None:
    case = read("vim_block_v2")
    block = VimBlock(32, state_size=16, drop_path=0.0)
    block.norm.weight.copy_(case.weights["norm.weight"])
    block.mixer.load_state_dict(
        vim_mixer({n.removeprefix("mixer."): t for n, t in case.weights.items() if "mixer" in n})
    )
    residual = case.values["hidden"] + (case.values["residual"] if place == "next" else 0)
    hidden = block.mixer(block.norm(residual))
    assert (residual - case.values[f"{place}_residual"]).abs().max() <= LAYER_ERROR
    assert (hidden - case.values[f"{place}_hidden"]).abs().max() <= LAYER_ERROR
    assert torch.equal(block(residual), residual + hidden)


def test_the_longer_schedule(shared_root: Path) -> None:
    assert_same_schedule(values(shared_root / "golden" / "generation", "ssmv_schedule_cosine1000"), 1000)


def test_shipped_selection_is_what_was_recorded(shared_root: Path) -> None:
    folder = shared_root / "golden" / "generation"
    for file in SHIPPED.glob("*.json"):
        assert json.loads(file.read_text()) == json.loads((folder / file.name).read_text())
    for file in SHIPPED.glob("*.safetensors"):
        assert file.read_bytes() == (folder / file.name).read_bytes()
