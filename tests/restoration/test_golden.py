"""MambaIR and its parts against recorded values of the released code, at the tolerances of two exact rewritings."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from restoration.convert import config_from_state_dict, convert_entry, from_official
from restoration.mambair import MambaIRBlock
from restoration.networks import build_model
from tests.golden import ASSETS, fill, values
from vision_ssm.ss2d import SS2D

SHIPPED = ASSETS / "restoration"
# file -> the module, largest absolute error
PARTS: dict[str, tuple[Callable[[], nn.Module], float]] = {
    "ss2d_d48_n16": (lambda: SS2D(48, act="silu"), 2e-6),
    "ss2d_d60_n10_e1.2": (lambda: SS2D(60, state_size=10, expand=1.2, act="silu"), 2e-6),
    "vssblock_light_d60": (lambda: MambaIRBlock(60, state_size=10, expand=1.2, light=True), 5e-6),
    "vssblock_d90": (lambda: MambaIRBlock(90), 5e-6),
}
NETS = {"mambair_light_x2": 2e-5, "mambair_unet_realdn": 2e-4}


def published_weights(stem: str) -> dict[str, Tensor]:
    shapes = json.loads((SHIPPED / f"{stem}.shapes.json").read_text())
    return {name: fill(name, tuple(shape)) for name, shape in shapes.items()}


def part(stem: str) -> nn.Module:
    module = PARTS[stem][0]()
    state: dict[str, Tensor] = {}
    for name, tensor in published_weights(stem).items():
        state |= convert_entry(name, tensor)
    module.load_state_dict(state)
    if isinstance(module, MambaIRBlock):
        module.norm1.eps = 1e-6  # what a block on its own has in the released code; the nets give it 1e-5
    return module.eval()


def cases(folder: Path, stem: str) -> list[tuple[Tensor, Tensor]]:
    recorded = values(folder, stem)
    names = sorted(name.removesuffix(".input") for name in recorded if name.endswith(".input"))
    assert names
    return [(recorded[f"{name}.input"], recorded[f"{name}.output"]) for name in names]


@pytest.mark.parametrize("stem", PARTS)
@torch.no_grad()
def test_part_matches_the_released_code(stem: str) -> None:
    module = part(stem)
    for given, want in cases(SHIPPED, stem):
        if isinstance(module, MambaIRBlock):
            got = module(given.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).flatten(1, 2)
        else:
            got = module(given)
        assert (got - want).abs().max() <= PARTS[stem][1]


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[str, nn.Module]:
    state = from_official({"params": published_weights(request.param)})
    model = build_model(config_from_state_dict(state))
    model.load_state_dict(state)
    return request.param, model.eval()


@torch.no_grad()
def test_net_matches_the_released_code(net: tuple[str, nn.Module]) -> None:
    stem, model = net
    for given, want in cases(SHIPPED, stem):
        assert (model(given) - want).abs().max() <= NETS[stem]


@torch.no_grad()
def test_net_matches_the_other_recorded_size(net: tuple[str, nn.Module], shared_root: Path) -> None:
    stem, model = net
    recorded = [case for case in cases(shared_root / "golden" / "restoration", stem) if case[0].shape[3] == 96]
    assert len(recorded) == 1
    assert (model(recorded[0][0]) - recorded[0][1]).abs().max() <= NETS[stem]


def test_shipped_selection_is_what_was_recorded(shared_root: Path) -> None:
    folder = shared_root / "golden" / "restoration"
    for file in SHIPPED.glob("*.shapes.json"):
        assert json.loads(file.read_text()) == json.loads((folder / file.name).read_text())
    for file in SHIPPED.glob("*.safetensors"):
        recorded = values(folder, file.stem)
        for name, tensor in values(SHIPPED, file.stem).items():
            assert torch.equal(tensor, recorded[name])
