"""Serpent: its sizes, its work, the identity at the start, any picture size, training and half precision."""

import json

import pytest
import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from kernels.testing import assert_close
from restoration.blocks import Blocks, SerpentBlock, checkpoint_blocks
from restoration.model import VARIANTS, Serpent, VariantName
from restoration.summary import count_operations, summarize
from restoration.unet import pad_to_multiple
from vision_ssm import ss2d
from vision_ssm.errors import UserError

# millions of parameters; GMAC at 256 and 512; GFLOP of the scans at 512: measured on a separate model of the same plan
SIZES = {
    "fast": (5.23, 1.73, 6.92, 6.57),
    "small": (2.51, 3.12, 12.47, 17.52),
    "base": (5.20, 6.19, 24.75, 26.27),
    "base-p4": (19.12, 5.95, 23.81, 13.14),
    "large": (15.23, 13.44, 53.76, 41.07),
    "full-res": (2.51, 12.06, 48.26, 70.06),
}
TINY = {"width": 8, "depths": (1, 1, 1)}


def tiny(*, awake: bool = True, patch: int = 2, in_channels: int = 3, detail: int = 0) -> Serpent:
    """A small net; `awake` gives its last convolution weights, so that it is no identity."""
    torch.manual_seed(0)
    model = Serpent("small", patch=patch, in_channels=in_channels, detail=detail, **TINY)
    if awake:
        nn.init.normal_(model.get_parameter("head.out.weight"), std=0.1)
    return model


@pytest.fixture(scope="module")
def net() -> Serpent:
    return tiny().eval()


def test_every_variant_is_listed() -> None:
    assert SIZES.keys() == VARIANTS.keys()


@pytest.mark.parametrize("variant", VARIANTS)
def test_size_and_work(variant: VariantName) -> None:
    with torch.device("meta"):
        model = Serpent(variant)
    summary = summarize(model)
    parameters, macs, more_macs, scan = SIZES[variant]
    assert summary.parameters == sum(p.numel() for p in model.parameters())
    assert summary.parameters / 1e6 == pytest.approx(parameters, abs=0.005)
    assert summary.operations[256].macs / 1e9 == pytest.approx(macs, rel=0.01)
    assert summary.operations[512].macs / 1e9 == pytest.approx(more_macs, rel=0.01)
    assert summary.operations[512].scan_flops / 1e9 == pytest.approx(scan, rel=0.01)
    assert f"{summary.parameters:,} parameters" in str(summary)


def test_work_of_one_convolution_and_one_scan_by_hand() -> None:
    assert count_operations(nn.Conv2d(3, 5, 3, padding=1), 7, 9).macs == 7 * 9 * 3 * 5 * 9
    block = SerpentBlock(16)  # 32 channels in the scan, 16 states, rank 1
    pixels = 4 * 6
    counted = count_operations(block, 4, 6, channels=16)
    assert counted.scan_flops == 9 * 4 * pixels * 32 * 16
    assert counted.macs == pixels * (16 * 64 + 32 * 9 + 32 * 4 * 33 + 4 * 32 + 32 * 16)


@pytest.mark.parametrize(("patch", "detail"), [(1, 0), (2, 0), (4, 0), (2, 1)])
@pytest.mark.parametrize("size", [(1, 1), (1, 23), (3, 2), (17, 40)], ids=str)
def test_untrained_is_the_identity_at_any_size(size: tuple[int, int], patch: int, detail: int) -> None:
    model = tiny(awake=False, patch=patch, detail=detail)
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(model(image), image)


def test_padded_sizes_give_the_crop_of_the_padded_image(net: Serpent) -> None:
    image = torch.rand(1, 3, 13, 30)
    padded = F.pad(image, (0, 2, 0, 3), mode="reflect")
    with torch.no_grad():
        torch.testing.assert_close(net(image), net(padded)[..., :13, :30])
        assert not torch.allclose(net(image), image, atol=1e-3)


def test_padding_reflects_and_repeats_where_it_cannot() -> None:
    image = torch.arange(6.0).view(1, 1, 2, 3)
    want = torch.tensor([[0, 1, 2, 1], [3, 4, 5, 4], [3, 4, 5, 4], [3, 4, 5, 4]])
    assert torch.equal(pad_to_multiple(image, 4)[0, 0], want.float())
    assert pad_to_multiple(image[..., :2], 2).shape == (1, 1, 2, 2)


def test_every_output_sees_every_pixel(net: Serpent) -> None:
    image = torch.rand(1, 3, 20, 24, requires_grad=True)
    for row, column in ((0, 0), (19, 23), (7, 11)):
        (gradient,) = torch.autograd.grad(net(image)[0, :, row, column].sum(), image)
        assert (gradient[0].abs().sum(0) > 0).all()


def test_mask_channel_is_read_but_not_restored() -> None:
    image = torch.rand(1, 4, 9, 12)
    with torch.no_grad():
        assert torch.equal(tiny(awake=False, in_channels=4)(image), image[:, :3])
        model = tiny(in_channels=4)
        other = torch.cat((image[:, :3], 1 - image[:, 3:]), dim=1)
        assert (model(image) - model(other)).abs().max() > 1e-4


def test_images_of_a_batch_do_not_mix(net: Serpent) -> None:
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(net(images)[1:2], net(images[1:2]), atol=1e-6, rtol=0)


def test_detail_is_a_level_of_convolutions_around_the_same_scans() -> None:
    plain, fine = tiny(), tiny(detail=2)
    scans = [[m for m in model.modules() if isinstance(m, SerpentBlock)] for model in (plain, fine)]
    assert len(scans[0]) == len(scans[1])
    seen = []
    fine.encoder[0].blocks.register_forward_hook(lambda block, given, result: seen.append(result.shape))
    fine.decoder[-1].blocks.register_forward_hook(lambda block, given, result: seen.append(result.shape))
    with torch.no_grad():
        fine(torch.rand(1, 3, 8, 16))
    assert seen == [(1, 8, 8, 16)] * 2
    with pytest.raises(UserError, match="or 0, got -1"):
        tiny(detail=-1)


@pytest.mark.parametrize("detail", [0, 1])
def test_config_rebuilds_the_model(detail: int) -> None:
    model = tiny(in_channels=4, detail=detail)
    again = Serpent(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    assert again.config == model.config
    assert again.multiple == model.multiple == 8


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = Serpent("small", width=64, depths=(1,))
    block = model.middle[0]
    assert isinstance(block, SerpentBlock)
    want = -torch.arange(1.0, 17.0)
    torch.testing.assert_close(block.ss2d.scan.A, want.expand(4, 128, 16))
    steps = F.softplus(block.ss2d.scan.dt_bias)
    assert steps.min() >= 0.9e-3
    assert steps.max() <= 0.101
    for projection in (block.ss2d.in_proj, block.ss2d.gate_proj, block.ss2d.out_proj):
        assert projection.weight.std().item() == pytest.approx(0.02, rel=0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 3
    assert {norm.eps for norm in norms} == {1e-5}


def test_checkpointing_gives_the_same_gradients_and_keeps_less() -> None:
    image = torch.rand(1, 3, 16, 16)
    kept: dict[bool, int] = {}
    gradients: dict[bool, list[Tensor]] = {}
    for enable in (False, True):
        model = tiny()
        checkpoint_blocks(model, enable)
        assert {m.checkpointing for m in model.modules() if isinstance(m, Blocks)} == {enable}
        stored: list[int] = []

        def pack(tensor: Tensor, stored: list[int] = stored) -> Tensor:
            stored.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(image).square().sum()
        kept[enable] = sum(stored)
        loss.backward()
        gradients[enable] = [p.grad for p in model.parameters() if p.grad is not None]
        assert len(gradients[enable]) == len(list(model.parameters()))
    assert kept[True] < kept[False] / 2
    for want, got in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(got, want)


def test_half_precision_keeps_the_scan_in_float32(net: Serpent, monkeypatch: pytest.MonkeyPatch) -> None:
    types = set()
    scan = ss2d.selective_scan_2d

    def look(x: Tensor, delta: Tensor, A: Tensor, *args, **options) -> object:
        y, state = scan(x, delta, A, *args, **options, return_final_state=True)
        types.add((x.dtype, A.dtype, options["delta_bias"].dtype, state.dtype))
        return y

    image = torch.rand(1, 3, 24, 40)
    monkeypatch.setattr(ss2d, "selective_scan_2d", look)
    with torch.no_grad():
        want = net(image)
        types.clear()
        with torch.autocast("cpu", torch.bfloat16):
            got = net(image)
    assert types == {(torch.bfloat16, torch.float32, torch.float32, torch.float32)}
    assert got.dtype == torch.float32
    assert_close("correction", got - image, want - image, rel=0.05)


def test_maps_stay_in_channels_last_memory(net: Serpent) -> None:
    """A block that leaves channels-last memory costs a copy of every map behind it."""
    strayed = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] > 3 and output.stride(1) != 1:
            strayed.append(name)

    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=n: look(n, out))
        for n, m in net.named_modules()
        if isinstance(m, nn.Conv2d | LayerNorm2d | SerpentBlock | Blocks)
    ]
    with torch.no_grad():
        net(torch.rand(2, 3, 24, 32))
    for hook in hooks:
        hook.remove()
    assert strayed == []


def test_compiles_in_one_graph() -> None:
    torch.manual_seed(0)
    model = Serpent("small", width=8, depths=(1, 1)).eval()
    nn.init.normal_(model.get_parameter("head.out.weight"), std=0.1)
    image = torch.rand(1, 3, 13, 16)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(image), model(image))


def test_bad_arguments_say_what_is_allowed(net: Serpent) -> None:
    with pytest.raises(UserError, match="variants fast, small, base.*got 'tiny'"):
        Serpent("tiny")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="positive numbers, got .*depths="):
        Serpent("small", depths=())
    with pytest.raises(UserError, match="in_channels=3 and out_channels=4"):
        Serpent("small", out_channels=4)
    with pytest.raises(UserError, match=r"\(batch, 3, height, width\), got \(1, 4, 8, 8\)"):
        net(torch.rand(1, 4, 8, 8))
    with pytest.raises(UserError, match="at least one pixel, got 0x8"):
        net(torch.rand(1, 3, 0, 8))
    with pytest.raises(UserError, match="floats"):
        net(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
