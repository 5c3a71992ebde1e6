"""MambaIR: sizes, tails written out by hand, published names of every kind, work as counted elsewhere, any size."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from restoration.convert import config_from_state_dict, from_official
from restoration.mambair import MEAN, Kind, MambaIR, MambaIRBlock, MambaIRUNet
from restoration.networks import build_model, model_config
from restoration.summary import count_operations
from tests.golden import ASSETS, fill
from vision_ssm.errors import UserError

PARAMETERS = {
    ("light", 2): 905_016,
    ("light", 3): 913_131,
    ("light", 4): 924_492,
    ("classic", 2): 20_421_863,
    ("classic", 3): 20_606_503,
    ("classic", 4): 20_569_575,
    ("denoise", 1): 15_777_507,
}
EXPAND = {"light": 1.2, "classic": 2.0, "denoise": 1.2}


def published_block(kind: Kind, prefix: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a block; d 60 with 10 states (light) or d 180 with 16."""
    d, states = (60, 10) if kind == "light" else (180, 16)
    inner, rank = int(EXPAND[kind] * d), -(-d // 16)
    shapes: dict[str, tuple[int, ...]] = {
        "self_attention.x_proj_weight": (4, rank + 2 * states, inner),
        "self_attention.dt_projs_weight": (4, inner, rank),
        "self_attention.dt_projs_bias": (4, inner),
        "self_attention.A_logs": (4 * inner, states),
        "self_attention.Ds": (4 * inner,),
        "self_attention.in_proj.weight": (2 * inner, d),
        "self_attention.conv2d.weight": (inner, 1, 3, 3),
        "self_attention.conv2d.bias": (inner,),
        "self_attention.out_norm.weight": (inner,),
        "self_attention.out_norm.bias": (inner,),
        "self_attention.out_proj.weight": (d, inner),
    }
    for name in ("skip_scale", "skip_scale2", "ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"):
        shapes[name] = (d,)
    if kind == "light":
        convs, attention = {0: (30, 60, 1, 1), 1: (30, 1, 3, 3), 3: (60, 30, 1, 1), 4: (60, 1, 3, 3)}, 5
    else:
        convs, attention = {0: (60, 180, 3, 3), 2: (180, 60, 3, 3)}, 3
    squeezed = {f"{attention}.attention.1": (d // 30, d, 1, 1), f"{attention}.attention.3": (d, d // 30, 1, 1)}
    for name, shape in (convs | squeezed).items():
        shapes |= {f"conv_blk.cab.{name}.weight": shape, f"conv_blk.cab.{name}.bias": shape[:1]}
    return {prefix + name: shape for name, shape in shapes.items()}


def published_shapes(kind: Kind, scale: int) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of a whole MambaIR."""
    d, groups = (60, 4) if kind == "light" else (180, 6)
    convs = {"conv_first": (d, 3), "conv_after_body": (d, d)} | {f"layers.{i}.conv": (d, d) for i in range(groups)}
    if kind == "light":
        convs["upsample.0"] = (3 * scale**2, d)
    elif kind == "denoise":
        convs["conv_last"] = (3, d)
    else:
        convs |= {"conv_before_upsample.0": (64, d), "conv_last": (3, 64)}
        convs |= (
            {"upsample.0": (576, 64)} if scale == 3 else {f"upsample.{2 * i}": (256, 64) for i in range(scale // 2)}
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for name, channels in convs.items():
        shapes |= {f"{name}.weight": (*channels, 3, 3), f"{name}.bias": channels[:1]}
    shapes |= {f"{norm}.{leaf}": (d,) for norm in ("patch_embed.norm", "norm") for leaf in ("weight", "bias")}
    for i in range(groups):
        for j in range(6):
            shapes |= published_block(kind, f"layers.{i}.residual_group.blocks.{j}.")
    return shapes


def published_light() -> dict[str, Tensor]:
    return {name: torch.zeros(shape) for name, shape in published_shapes("light", 2).items()}


def test_recorded_names_are_those_of_this_test() -> None:
    recorded = json.loads((ASSETS / "restoration" / "mambair_light_x2.shapes.json").read_text())
    assert {name: tuple(shape) for name, shape in recorded.items()} == published_shapes("light", 2)


def plain_net(w: dict[str, Tensor], image: Tensor, kind: Kind, scale: int) -> Tensor:
    """A MambaIR without groups, written out with published names."""

    def conv(name: str, x: Tensor) -> Tensor:
        return F.conv2d(x, w[f"{name}.weight"], w[f"{name}.bias"], padding=1)

    def norm(name: str, x: Tensor) -> Tensor:
        x = F.layer_norm(x.permute(0, 2, 3, 1), x.shape[1:2], w[f"{name}.weight"], w[f"{name}.bias"])
        return x.permute(0, 3, 1, 2)

    mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    first = conv("conv_first", image - mean)
    x = conv("conv_after_body", norm("norm", norm("patch_embed.norm", first))) + first
    if kind == "denoise":
        return image + conv("conv_last", x)
    if kind == "light":
        return F.pixel_shuffle(conv("upsample.0", x), scale) + mean
    x = F.leaky_relu(conv("conv_before_upsample.0", x), 0.01)
    for i, factor in enumerate((2, 2) if scale == 4 else (scale,)):
        x = F.pixel_shuffle(conv(f"upsample.{2 * i}", x), factor)
    return conv("conv_last", x) + mean


@pytest.mark.parametrize(("kind", "scale"), PARAMETERS, ids=str)
def test_published_weights_convert_and_stem_body_and_tail_are_as_written_out(kind: Kind, scale: int) -> None:
    """The blocks between are tested by recorded values; here they only have to find their places."""
    published = {
        name: torch.zeros(shape) if name.startswith("layers.") else fill(name, shape)
        for name, shape in published_shapes(kind, scale).items()
    }
    state = from_official({f"module.{name}": tensor for name, tensor in published.items()})
    config = config_from_state_dict(state)
    assert config == {"name": "mambair", "kind": kind, "scale": scale}
    with torch.device("meta"):
        model = MambaIR(kind, scale=scale)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[kind, scale]
    assert model_config(model) == json.loads(json.dumps(config))
    model.load_state_dict(state, assign=True)
    model.mean = torch.tensor(MEAN).view(1, 3, 1, 1)
    model.groups = nn.ModuleList()
    image = torch.rand(2, 3, 5, 7)
    with torch.no_grad():
        got = model(image)
    assert got.shape == (2, 3, 5 * scale, 7 * scale)
    torch.testing.assert_close(got, plain_net(published, image, kind, scale), atol=2e-5, rtol=0)


def test_work_is_that_counted_on_the_released_code() -> None:
    """GMAC and scan GFLOP of the published configurations, measured elsewhere."""
    with torch.device("meta"):
        counted = {
            "light x2": count_operations(MambaIR("light"), 360, 640),
            "unet": count_operations(MambaIRUNet(), 256, 256),
        }
    want = {"light x2": (183.4, 143.3), "unet": (170.4, 108.7)}
    for name, (macs, scan) in want.items():
        assert counted[name].macs / 1e9 == pytest.approx(macs, rel=1e-3)
        assert counted[name].scan_flops / 1e9 == pytest.approx(scan, rel=1e-3)


def test_unet_has_its_size_and_no_biases_outside_the_blocks() -> None:
    with torch.device("meta"):
        model = MambaIRUNet()
    assert sum(p.numel() for p in model.parameters()) == 30_750_424
    inside = {n for n, m in model.named_modules() if isinstance(m, MambaIRBlock)}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not any(name.startswith(f"{block}.") for block in inside):
            assert module.bias is None, name


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2)], ids=str)
def test_any_size(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    light = MambaIR("light").eval()
    light.groups = light.groups[:1]  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        assert light(torch.rand(1, 3, *size)).shape == (1, 3, 2 * size[0], 2 * size[1])


def test_unet_at_a_size_that_is_no_multiple() -> None:
    torch.manual_seed(0)
    model = MambaIRUNet().eval()
    image = torch.rand(1, 3, 9, 6)
    padded = F.pad(F.pad(image, (0, 2, 0, 0), mode="reflect"), (0, 0, 0, 7), mode="reflect")
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(padded)[..., :9, :6])


def test_bad_arguments_and_foreign_weights_are_refused() -> None:
    with pytest.raises(UserError, match="kinds light, classic, denoise; got 'heavy'"):
        MambaIR("heavy")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="denoise has the scales 1; got 2"):
        MambaIR("denoise", scale=2)
    with pytest.raises(UserError, match="no published MambaIR"):
        from_official({"conv1.weight": torch.zeros(1)})
    state = published_light()
    with pytest.raises(UserError, match=r"1 not in the file: norm\.bias"):
        from_official({name: tensor for name, tensor in state.items() if name != "norm.bias"})
    with pytest.raises(UserError, match=r"not in the model: groups\.0\.extra"):
        from_official(state | {"layers.0.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"norm\.bias \(file \[1\], model \[60\]\)"):
        from_official(state | {"norm.bias": torch.zeros(1)})
    with pytest.raises(UserError, match=r"reads 1 channel\(s\).*grey"):
        from_official(state | {"conv_first.weight": torch.zeros(60, 1, 3, 3)})
    with pytest.raises(UserError, match="there is no network 'unet'; there are serpent, mambair, mambair-unet"):
        build_model({"name": "unet"})
    with pytest.raises(UserError, match="'mambair' is damaged.*colour"):
        build_model({"name": "mambair", "colour": True})


def test_half_precision_files_become_float32() -> None:
    converted = from_official({name: tensor.half() for name, tensor in published_light().items()})
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32}
