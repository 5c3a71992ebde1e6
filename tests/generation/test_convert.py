"""Published files of the video U-Net, as they lie on a disk, to a folder that diffusers' loaders read."""

import pytest
import torch
from torch import Tensor

from generation.convert import config_from_state_dict, from_official, run_convert
from generation.unet import SSMVideoUNet
from tests.generation.published import read
from vision_ssm.backbones.convert import vim_mixer
from vision_ssm.errors import UserError

NET = "ssmv_v4_unet_bi_s6"


def training_file(weights: dict[str, Tensor]) -> dict[str, object]:
    """What the published training saves: the diffusion around the network, plain and averaged."""
    around = {"betas": torch.zeros(256), "alphas_cumprod": torch.zeros(256)}
    averaged = around | {f"denoise_fn.module.{name}": tensor for name, tensor in weights.items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in averaged.items()}
    return {"step": 100, "model": plain, "ema": averaged}


def test_a_training_file_converts(tmp_path, capsys):
    case = read(NET)
    torch.save(training_file(case.weights), tmp_path / "model-100.pt")
    assert run_convert(tmp_path / "model-100.pt", tmp_path / "unet") == 0
    assert "temporal s6, variant mamba" in capsys.readouterr().out
    model = SSMVideoUNet.from_pretrained(tmp_path / "unet").eval()
    with torch.no_grad():
        y = model(case.values["x"], case.values["time"]).sample
    assert (y - case.values["y"]).abs().max() <= 2e-5


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"bidirectional": False, "hidden": None},
        {"temporal": "s6", "variant": "mlp", "hidden": 12},
        {"temporal": "s6", "variant": "gated", "hidden": 20},
        {"variant": "mamba", "hidden": None, "time_layers": 3, "in_channels": 1},
        {"temporal": "attention"},
        {"temporal": "linear_attention", "dim_mults": [1, 1, 3]},
    ],
    ids=str,
)
def test_arguments_are_read_off_the_weights(arguments):
    wanted = dict(dim=16, dim_mults=[1, 2], in_channels=3, heads=2, head_width=8, time_layers=2, temporal="s4d",
                  variant="glu", bidirectional=True, state_size=6, hidden=24)  # fmt: skip
    wanted |= arguments
    with torch.device("meta"):
        model = SSMVideoUNet(**wanted)
    found = config_from_state_dict(model.state_dict())
    attention = wanted["temporal"] in ("attention", "linear_attention")
    left_out = {"variant", "bidirectional", "state_size", "hidden"} if attention else {"head_width"}
    assert found == {name: value for name, value in wanted.items() if name not in left_out}


def test_half_precision_becomes_float32():
    weights = {name: tensor.half() for name, tensor in read(NET).weights.items()}
    assert {tensor.dtype for tensor in from_official(weights).values()} == {torch.float32}


def broken(change: str) -> dict[str, Tensor]:
    weights = dict(read(NET).weights)
    if change == "lacks":
        del weights["ups.1.0.block1.proj.bias"]
    elif change == "too much":
        weights["ups.7.weight"] = torch.zeros(3)
    elif change == "shape":
        weights["mid_block1.mlp.1.weight"] = torch.zeros(3, 4)
    elif change == "layer":
        del weights["init_temporal_layer.fn.fn.fn.s6.A_log"]
    return weights


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("lacks", "1 not in the file: ups.1.block1.conv1.bias"),
        ("too much", "1 not in the model: ups.7.weight"),
        ("shape", "1 of another shape: middle1.time.weight"),
        ("layer", "scan.A_log"),
    ],
)
def test_incomplete_weights_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_official(broken(change))


def test_other_files_are_refused_with_their_name(tmp_path):
    torch.save({"conv.weight": torch.zeros(3, 3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"other\.pt.*init_conv\.weight"):
        run_convert(tmp_path / "other.pt", tmp_path / "out")
    torch.save(training_file(read(NET).weights), tmp_path / "cut.pt")
    whole = (tmp_path / "cut.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut\.pt"):
        run_convert(tmp_path / "cut.pt", tmp_path / "out")
    with pytest.raises(UserError, match="no checkpoint at"):
        run_convert(tmp_path / "missing.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_weights_have_no_arguments():
    with pytest.raises(UserError, match=r"stem\.weight"):
        config_from_state_dict({"conv.weight": torch.zeros(3)})


def test_half_a_mixer_is_refused():
    weights = dict(read("vim_bimamba_v2_div1").weights)
    del weights["A_b_log"]
    with pytest.raises(UserError, match="A_b_log"):
        vim_mixer(weights)
