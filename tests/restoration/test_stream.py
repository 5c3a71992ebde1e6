"""Strips with carried scan states give the result of the whole picture, and an interrupted run goes on."""

import json
import shutil
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from restoration import mambair
from restoration.card import WeightsCard
from restoration.mambair import MambaIR
from restoration.restorer import PictureRestorer, Route
from restoration.scratch import Map, Scratch, _write_all
from restoration.stream import program_of, restore_streamed
from restoration.strips import LocalPass, ScanPass
from restoration.tiles import restore_tiled
from restoration.unet import DecoderLevel, EncoderLevel, RestorationUNet
from tests.restoration.tiny_weights import shaken, tiny_serpent
from vision_ssm.errors import UserError

CARD = WeightsCard(model={"name": "serpent"}, task="denoise")
SIZES = [(1, 1), (9, 21), (24, 7)]
NETS = {
    "p2": lambda: tiny_serpent(),
    "p1 with mask": lambda: tiny_serpent(patch=1, in_channels=4),
    "p2 with detail": lambda: tiny_serpent(detail=2),
    "p4 of three levels": lambda: tiny_serpent(variant="fast", depths=(1, 1, 1)),
}


def difference(model: nn.Module, size: tuple[int, int], strip: int) -> float:
    image = torch.rand(model.in_channels, *size, generator=torch.Generator().manual_seed(1))  # type: ignore[arg-type]
    with torch.inference_mode():
        whole = model(image[None])[0]
    streamed = restore_streamed(model, image, strip=strip)
    assert streamed.shape == whole.shape
    assert float((whole - image[:3]).abs().max() if whole.shape[1:] == size else whole.std()) > 0.01
    return float((streamed - whole).abs().max())


@pytest.mark.parametrize("strip", [1, 7, 16])
@pytest.mark.parametrize("net", NETS)
def test_strips_equal_the_whole_picture(net, strip):
    model = NETS[net]()
    for size in SIZES:
        assert difference(model, size, strip) < 1e-5, size


def test_mambair_in_strips():
    """Its channel attention looks at means over the whole picture."""
    assert difference(shaken(MambaIR("light", scale=3)), (9, 12), 4) < 1e-5


def test_mambair_unet_in_strips():
    """Two levels of it: resampling by 3 x 3 convolutions, a decoder level without a merge, blocks in the head."""
    net = RestorationUNet(
        stem=mambair._conv(3, 30, bias=False),
        encoder=[EncoderLevel(mambair._unet_blocks(30, 1), mambair._down(30))],
        middle=mambair._unet_blocks(60, 1),
        decoder=[DecoderLevel(mambair._up(60), nn.Identity(), mambair._unet_blocks(60, 1))],
        head=nn.Sequential(mambair._unet_blocks(60, 1), mambair._conv(60, 3, bias=False)),
        in_channels=3,
        out_channels=3,
        multiple=2,
    )
    assert difference(shaken(net), (11, 7), 3) < 1e-5


def test_tiles_do_not_equal_the_whole_picture():
    """What strips are for: scans that end at a tile's edge give something else."""
    model, image = tiny_serpent(), torch.rand(3, 48, 48, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        tiled = restore_tiled(model, image, tile=32, overlap=8)
        assert float((tiled - model(image[None])[0]).abs().max()) > 1e-3


def test_strips_as_thick_as_memory_allows():
    model, image = tiny_serpent(), torch.rand(3, 40, 40)
    thick, thin = restore_streamed(model, image, memory=1 << 26), restore_streamed(model, image, memory=1 << 17)
    assert float((thick - thin).abs().max()) < 1e-5
    with pytest.raises(UserError, match="too few for one line"):
        restore_streamed(model, image, memory=100)


def test_every_kind_of_pass_takes_part():
    kinds = {type(one) for one in program_of(tiny_serpent(), 16, 16).passes}
    assert kinds == {LocalPass, ScanPass}


def test_other_networks_are_refused():
    with pytest.raises(UserError, match="use --tile"):
        restore_streamed(nn.Sequential(nn.Conv2d(3, 3, 1)), torch.rand(3, 4, 4))


class Interruption:
    """Raises Ctrl-C when a share of the work is done; also counts the work."""

    def __init__(self, at: float = 2.0) -> None:
        self.at, self.done, self.calls = at, 0.0, 0

    def __call__(self, share: float) -> None:
        self.done += share
        self.calls += 1
        if self.done > self.at:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(tmp_path):
    """A model, a picture, and the scratch folder of a run that stopped half-way."""
    model, image = tiny_serpent(), torch.rand(3, 33, 20, generator=torch.Generator().manual_seed(1))
    with pytest.raises(KeyboardInterrupt):
        restore_streamed(model, image, strip=3, scratch=tmp_path / "maps", tick=Interruption(0.5))
    return model, image, tmp_path / "maps"


def test_an_interrupted_run_goes_on(interrupted):
    model, image, maps = interrupted
    whole, rest = Interruption(), Interruption()
    expected = restore_streamed(model, image, strip=3, tick=whole)
    found = restore_streamed(model, image, strip=3, scratch=maps, tick=rest)
    assert torch.equal(found, expected)
    assert rest.calls < 0.7 * whole.calls
    assert rest.done == pytest.approx(1)
    assert not maps.exists()


@pytest.mark.parametrize("change", ["weights", "precision"])
def test_another_network_starts_from_the_beginning(interrupted, change):
    model, image, maps = interrupted
    if change == "weights":
        with torch.no_grad():
            model.get_parameter("stem.bias").add_(0.1)
    precision = torch.bfloat16 if change == "precision" else torch.float32
    expected = restore_streamed(model, image, strip=3, precision=precision)
    assert torch.equal(restore_streamed(model, image, strip=3, precision=precision, scratch=maps), expected)


def test_files_of_others_in_the_scratch_folder_are_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    restore_streamed(tiny_serpent(), torch.rand(3, 8, 8), strip=3, scratch=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_another_picture_starts_from_the_beginning(interrupted):
    model, image, maps = interrupted
    whole, rest = Interruption(), Interruption()
    other = image.flip(1)
    expected = restore_streamed(model, other, strip=3, tick=whole)
    found = restore_streamed(model, other, strip=3, scratch=maps, tick=rest)
    assert torch.equal(found, expected)
    assert rest.calls == whole.calls


def test_after_a_power_cut_only_a_clean_stop_is_trusted(interrupted, monkeypatch):
    maps = interrupted[2]
    identity = json.loads((maps / "journal.json").read_text())["identity"]
    clean = Scratch(maps, identity)
    assert clean.done > 0
    monkeypatch.setattr(psutil, "boot_time", lambda: 1e9)
    assert Scratch(maps, identity).done == clean.done
    clean.note(clean.done)
    monkeypatch.setattr(psutil, "boot_time", lambda: 2e9)
    assert Scratch(maps, identity).done == 0


def test_a_full_disk_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(UserError, match="needs .* more, its disk has"):
        restore_streamed(tiny_serpent(), torch.rand(3, 64, 64), strip=8, scratch=tmp_path / "maps")
    assert not (tmp_path / "maps").exists()


@pytest.mark.gpu
@pytest.mark.parametrize("net", NETS)
def test_strips_equal_the_whole_picture_on_a_gpu(net):
    restorer = PictureRestorer(NETS[net](), CARD, device="cuda")
    strips = PictureRestorer(restorer.model, CARD, device="cuda", route=Route(strip=7))
    image = torch.rand(3, 45, 70, generator=torch.Generator().manual_seed(1))
    known = (image[:1] > 0.3).float() if restorer.needs_mask else None
    assert float((restorer.restore(image, known=known) - strips.restore(image, known=known)).abs().max()) < 1e-5


def test_windows_of_a_map(tmp_path):
    scratch, one = Scratch(tmp_path / "maps", ""), Map("a", 5, 7, 3)
    values = torch.rand(1, 3, 5, 7)
    scratch.make(one)
    scratch.write(one, slice(0, 5), slice(0, 7), torch.zeros(1, 3, 5, 7))
    scratch.write(one, slice(0, 5), slice(2, 6), values[..., 2:6])
    scratch.write(one, slice(4, 5), slice(0, 7), values[:, :, 4:])
    found = scratch.read(one, slice(1, 5), slice(1, 7))
    assert found.is_contiguous(memory_format=torch.channels_last)
    expected = torch.zeros(1, 3, 5, 7)
    expected[..., 2:6], expected[:, :, 4:] = values[..., 2:6], values[:, :, 4:]
    assert torch.equal(found, expected[:, :, 1:, 1:])


def test_large_maps_are_written_in_full():
    """A call of the system takes 2 GiB at most and says how much it took."""

    class Slow:
        taken = b""

        def write(self, part: memoryview) -> int:
            self.taken += bytes(part[:3])
            return min(len(part), 3)

    file = Slow()
    _write_all(file, memoryview(b"abcdefgh"))
    assert file.taken == b"abcdefgh"
