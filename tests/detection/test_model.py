"""Mamba-YOLO against recorded values of the released code, its variants, its converter, compile and export."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from detection.blocks import LSBlock, ODSSBlock, RGBlock, SimpleStem, VisionClueMerge
from detection.convert import config_from_state_dict, convert_entry, from_official
from detection.head import DetectionHead, decode
from detection.model import MambaYOLO
from detection.summary import summarize
from tests.golden import ASSETS, fill, values, weights
from vision_ssm.errors import UserError
from vision_ssm.scan_parameters import ScanParameters

BLOCKS = ASSETS / "detection"
# file, the module, the published name it goes by, our name for it
BLOCK_FILES = {
    "lsblock_32": (LSBlock(32), "model.1.lsblock.", "backbone.stages.0.0.local."),
    "rgblock_32": (RGBlock(32), "model.1.mlp.", "backbone.stages.0.0.mlp."),
    "vcm_16_32": (VisionClueMerge(16, 32), "model.2.", "backbone.merges.0."),
    "stem_32": (SimpleStem(3, 32), "model.0.", "backbone.stem."),
    "odssblock_backbone_24_32": (ODSSBlock(24, 32), "model.1.", "backbone.stages.0.0."),
    "odssblock_neck_48_32_n1": (ODSSBlock(48, 32, neck=True), "model.11.", "neck.top_down4."),
    "odssblock_neck_32_32_n2": (ODSSBlock(32, 32, neck=True, scans=2), "model.11.", "neck.top_down4."),
}
PARAMETERS = {  # with repeats 3,3,9,3 / 3,6,6,3, and the same two without the local block
    "t": (6_131_704, 5_879_924, 5_668_920, 5_442_612),
    "b": (21_828_000, 20_882_468, 20_013_600, 19_168_164),
    "l": (57_631_024, 53_466_160, 52_945_072, 49_227_952),
}


def load_block(module: nn.Module, state: dict[str, Tensor], published: str, ours: str) -> nn.Module:
    converted: dict[str, Tensor] = {}
    for name, tensor in state.items():
        converted |= convert_entry(published + name, tensor)
    module.load_state_dict({name.removeprefix(ours): tensor for name, tensor in converted.items()})
    return module.eval()


def published_weights(folder: Path, size: str) -> dict[str, Tensor]:
    state = weights(folder, size)
    return state | {"model.21.dfl.conv.weight": torch.arange(16.0).view(1, 16, 1, 1)}


@pytest.fixture(scope="module")
def golden_t(shared_root: Path) -> MambaYOLO:
    model = MambaYOLO("t")
    model.load_state_dict(from_official(published_weights(shared_root / "golden" / "detection", "T")))
    return model.eval()


@pytest.fixture(scope="module")
def small() -> MambaYOLO:
    torch.manual_seed(0)
    return MambaYOLO("t", 3, stage_repeats=(1, 1, 1, 1)).eval()


@pytest.mark.parametrize("name", BLOCK_FILES)
def test_block_matches_the_released_code(name: str) -> None:
    module, published, ours = BLOCK_FILES[name]
    recorded = values(BLOCKS, name)
    module = load_block(module, weights(BLOCKS, name), published, ours)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        with torch.no_grad():
            got = module(recorded["input"].contiguous(memory_format=memory_format))
        assert (got - recorded["output"]).abs().max() <= 1e-4


@pytest.mark.parametrize("stem", ["T_1x3x64x64", "T_1x3x96x128"])
def test_whole_t_matches_the_released_code(golden_t: MambaYOLO, shared_root: Path, stem: str) -> None:
    recorded = values(shared_root / "golden" / "detection", stem)
    with torch.no_grad():
        raw = golden_t(recorded["input"])
        decoded = decode(raw)
    for level, name in zip(raw, ("raw_p3", "raw_p4", "raw_p5"), strict=True):
        assert (level - recorded[name]).abs().max() <= 5e-4, name
    assert (decoded - recorded["decoded"]).abs().max() <= 1e-2


@pytest.mark.parametrize("size", PARAMETERS)
def test_parameter_counts(size: str) -> None:
    counts = []
    for lsblock in (True, False):
        for repeats in ((3, 3, 9, 3), (3, 6, 6, 3)):
            with torch.device("meta"):
                model = MambaYOLO(size, lsblock=lsblock, stage_repeats=repeats)  # pyright: ignore[reportArgumentType]
            counts.append(sum(p.numel() for p in model.parameters()))
    assert tuple(counts) == PARAMETERS[size]


@pytest.mark.parametrize(
    ("size", "scans", "total"), [("t", 3.30, 19.38), ("b", 6.61, 61.05), ("l", 19.5, 192.1)], ids=["t", "b", "l"]
)
def test_summary_counts_every_flop_with_the_scans_in(size: str, scans: float, total: float) -> None:
    with torch.device("meta"):
        model = MambaYOLO(size)  # pyright: ignore[reportArgumentType]
    summary = summarize(model)
    assert summary.parameters == PARAMETERS[size][0] == sum(p.numel() for p in model.parameters())
    assert summary.flops / 1e9 == pytest.approx(total, rel=1e-3)
    # Recorded scans leave out the product that makes the step sizes, which runs inside our operator.
    assert sum(part.scan_flops for part in summary.parts) / 1e9 > scans
    assert f"{summary.parameters:,}" in str(summary)
    half = summarize(model, (320, 640))
    assert half.flops == pytest.approx(summary.flops / 2)
    with pytest.raises(UserError, match="multiples of 32, got 0x0"):
        summarize(model, 0)


@pytest.mark.parametrize("size", ["T", "B", "L"])
def test_published_names_convert_for_every_size(shared_root: Path, size: str) -> None:
    shapes = json.loads((shared_root / "golden" / "detection" / f"shapes_{size}.json").read_text())
    state = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    config = config_from_state_dict(from_official(state))
    assert config == MambaYOLO(size.lower()).config  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("size", ["t", "b", "l"])
@pytest.mark.parametrize("repeats", [(3, 3, 9, 3), (3, 6, 6, 3)], ids=str)
def test_config_is_read_off_the_weights(size: str, repeats: tuple[int, ...]) -> None:
    with torch.device("meta"):
        model = MambaYOLO(size, 7, lsblock=False, stage_repeats=repeats)  # pyright: ignore[reportArgumentType]
    assert config_from_state_dict(model.state_dict()) == model.config


def test_converter_refuses_what_is_not_a_model(shared_root: Path) -> None:
    state = published_weights(shared_root / "golden" / "detection", "T")
    with pytest.raises(UserError, match=r"no parameter is named model\.0\.conv\.0\.weight"):
        from_official({"conv1.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"lacks .*neck\.down3\.0\.weight"):
        from_official({name: tensor for name, tensor in state.items() if name != "model.15.conv.weight"})
    with pytest.raises(UserError, match=r"model\.22\.conv\.weight is no parameter"):
        from_official(state | {"model.22.conv.weight": torch.zeros(1)})
    with pytest.raises(UserError, match=r"has too much.*neck\.down3\.extra"):
        from_official(state | {"model.15.extra": torch.zeros(1)})
    with pytest.raises(UserError, match=r"neck\.down3\.0\.weight has shape \(1, 1\)"):
        from_official(state | {"model.15.conv.weight": torch.zeros(1, 1)})


def test_half_precision_files_become_float32(shared_root: Path) -> None:
    state = published_weights(shared_root / "golden" / "detection", "T")
    converted = from_official({name: t.half() if t.is_floating_point() else t for name, t in state.items()})
    assert {tensor.dtype for tensor in converted.values()} == {torch.float32, torch.int64}


def test_config_rebuilds_the_model(small: MambaYOLO) -> None:
    again = MambaYOLO(**json.loads(json.dumps(small.config)))
    again.load_state_dict(small.state_dict())
    assert again.config == small.config


def test_initialisation() -> None:
    torch.manual_seed(0)
    model = MambaYOLO("t", 20)
    for branch, stride in zip(model.head.cls, (8, 16, 32), strict=True):
        want = torch.tensor(5 / 20 / (640 / stride) ** 2).log()
        torch.testing.assert_close(branch.get_parameter("2.bias"), want.expand(20))
    for branch in model.head.box:
        assert (branch.get_parameter("2.bias") == 1).all()
    scan = model.get_submodule("backbone.stages.0.0.ss2d.0.scan")
    assert isinstance(scan, ScanParameters)
    assert (scan.A == -1).all()
    assert (scan.D == 1).all()
    assert abs(scan.dt_bias.std().item() - 1) < 0.15
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert {(m.eps, m.momentum) for m in norms} == {(1e-3, 0.03)}


def weights_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_a_width_of_its_own_is_rebuilt_from_the_config() -> None:
    narrow = MambaYOLO("b", 3, width=0.25)
    assert weights_of(narrow) == weights_of(MambaYOLO("t", 3))  # b is t at twice the width
    again = MambaYOLO(**MambaYOLO("t", 3, width=0.13).config)
    assert again.head.state_dict().keys() == narrow.head.state_dict().keys()
    assert again.config["width"] == 0.13
    assert again.backbone.stem.state_dict().keys() == narrow.backbone.stem.state_dict().keys()
    assert weights_of(again) < weights_of(narrow) / 2


def test_bad_arguments_say_what_is_allowed(small: MambaYOLO) -> None:
    with pytest.raises(UserError, match="sizes t, b, l; got 'x'"):
        MambaYOLO("x")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="at least 1"):
        MambaYOLO("t", 0)
    with pytest.raises(UserError, match="four positive numbers"):
        MambaYOLO("t", stage_repeats=(3, 3, 9))
    for width in (0, 5.0):
        with pytest.raises(UserError, match=f"width must be above 0 and at most 4, got {width}"):
            MambaYOLO("t", width=width)
    with pytest.raises(UserError, match="multiples of 32, got 64x70"):
        small(torch.zeros(1, 3, 64, 70))
    with pytest.raises(UserError, match=r"\(batch, 3, height, width\), got \(1, 1, 64, 64\)"):
        small(torch.zeros(1, 1, 64, 64))


def test_maps_stay_in_channels_last_memory(small: MambaYOLO) -> None:
    """A block that leaves channels-last memory costs a copy of every map behind it."""
    strayed = []

    def look(name: str, output: object) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and output.shape[1] > 3:
            last_dim = output.permute(0, 2, 3, 1) if output.stride(1) == 1 else output
            if not last_dim.is_contiguous():
                strayed.append(name)

    hooks = [
        m.register_forward_hook(lambda _m, _i, out, n=n: look(n, out))
        for n, m in small.named_modules()
        if isinstance(m, nn.Conv2d | nn.BatchNorm2d | ODSSBlock)
    ]
    with torch.no_grad():
        small(torch.rand(2, 3, 64, 96))
    for hook in hooks:
        hook.remove()
    assert strayed == []


def test_decode_on_hand_made_maps() -> None:
    """One cell says: 2 cells left, 1 up, 3 right, 4 down; its class 1 has logit 0."""
    raw = [torch.full((1, 64 + 2, 64 // s, 64 // s), -50.0) for s in (8, 16, 32)]
    for side, distance in enumerate((2, 1, 3, 4)):
        raw[1][0, side * 16 + distance, 2, 1] = 50.0
    raw[1][0, 64 + 1, 2, 1] = 0.0
    decoded = decode(raw)
    assert decoded.shape == (1, 6, 64 + 16 + 4)
    x1, y1, x2, y2 = (1.5 - 2) * 16, (2.5 - 1) * 16, (1.5 + 3) * 16, (2.5 + 4) * 16
    got = decoded[0, :, 64 + 2 * 4 + 1]
    torch.testing.assert_close(got, torch.tensor([(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, 0.0, 0.5]))


def test_compiles_in_one_graph(small: MambaYOLO) -> None:
    images = torch.rand(2, 3, 64, 96)
    compiled = torch.compile(small, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(decode(compiled(images)), decode(small(images)))


def test_exports_with_dynamic_shapes() -> None:
    """Stem, block and head with its decoding; the whole model is exported by the tests of the export."""

    class Short(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.maps = nn.Sequential(SimpleStem(3, 8), VisionClueMerge(8, 16), ODSSBlock(16, 16))
            self.head = DetectionHead((16, 16, 16), 2)

        def forward(self, images: Tensor) -> Tensor:
            x = self.maps(images)
            return decode(self.head([x, x[..., ::2, ::2], x[..., ::4, ::4]]))

    model = Short().eval()
    sides = torch.export.Dim("h", min=2), torch.export.Dim("w", min=2)
    shapes = {"images": {0: torch.export.Dim("batch"), 2: 32 * sides[0], 3: 32 * sides[1]}}
    with torch.no_grad():
        program = torch.export.export(model, (torch.rand(2, 3, 64, 96),), dynamic_shapes=shapes)
        other = torch.rand(1, 3, 96, 64)
        torch.testing.assert_close(program.module()(other), model(other))


def test_half_precision_autocast_stays_close(small: MambaYOLO) -> None:
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        want = decode(small(images))
        with torch.autocast("cpu", torch.bfloat16):
            got = decode(small(images))
    assert got.dtype == torch.float32
    assert (got[:, :4] - want[:, :4]).abs().max() < 2.0  # pixels
    assert (got[:, 4:] - want[:, 4:]).abs().max() < 0.02


def test_decoding_is_float32_under_autocast() -> None:
    torch.manual_seed(0)
    raw = [3 * torch.randn(1, 64 + 2, 64 // s, 64 // s) for s in (8, 16, 32)]
    with torch.autocast("cpu", torch.bfloat16):
        got = decode(raw)
    assert torch.equal(got, decode(raw))


def test_fill_is_a_function_of_the_name() -> None:
    want = torch.tensor([[-0.15947464, 0.29455513, -0.7253548], [-1.3594458, -0.09145054, 0.7531068]])
    torch.testing.assert_close(fill("model.0.conv.0.weight", (2, 3)), want)
