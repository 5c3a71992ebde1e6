"""`restore run`: files, folders and bad files; what is said; memory, precision, masks; nothing half-written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from restoration import restorer as restorer_module
from restoration.card import WeightsCard
from restoration.pairs import run_degrade
from restoration.picture import Picture
from restoration.picture_reader import read_picture
from restoration.picture_writer import write_picture
from restoration.restorer import PictureRestorer, Route
from restoration.run import run_restore
from tests.restoration.tiny_weights import save_tiny, tiny_serpent
from vision_ssm import device as device_module
from vision_ssm.device import parse_size
from vision_ssm.errors import UserError


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("weights") / "denoise")


@pytest.fixture(scope="module")
def painter(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("weights") / "inpaint", "inpaint", in_channels=4)


def photo(path: Path, size: tuple[int, int] = (37, 51), channels: int = 3, dtype: str = "uint8", seed: int = 0) -> Path:
    """Write a random picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    white = np.iinfo(dtype).max
    pixels = np.random.default_rng(seed).integers(0, white, (*size, channels), dtype=dtype)
    write_picture(path, Picture(pixels))
    return path


def tree(folder: Path) -> set[str]:
    """Every file below a folder."""
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def expected(weights: Path, file: Path) -> np.ndarray:
    """What the network makes of a file, by itself."""
    picture = read_picture(file)
    restorer = PictureRestorer.from_pretrained(weights, None, device="cpu")
    with torch.inference_mode():
        result = restorer.model(picture.to_tensor()[None])[0]
    return picture.with_result(result).pixels


def test_a_folder_with_bad_files(weights, tmp_path, capsys):
    """The tree is kept, the good files are done, each bad one is named, no temporary file stays."""
    source, output = tmp_path / "in", tmp_path / "out"
    good = [
        photo(source / "a.png"),
        photo(source / "deep" / "b.tif", dtype="uint16"),
        photo(source / "c.bmp", channels=1),
    ]
    (source / "bad.jpg").write_bytes(b"nonsense")
    nan = np.full((5, 5), np.nan, np.float32)
    Image.fromarray(nan).save(source / "nan.tif")
    (source / "empty.png").touch()
    assert run_restore([source], output=output, weights=weights, device="cpu") == 1
    assert tree(output) == {"a.png", "deep/b.tif", "c.bmp"}
    for file in good:
        found = read_picture(output / file.relative_to(source))
        np.testing.assert_array_equal(found.pixels, expected(weights, file))
        assert not np.array_equal(found.pixels, read_picture(file).pixels)
    said = capsys.readouterr()
    assert "3 pictures restored, 3 failed" in said.out
    for name, reason in (("bad.jpg", "no known picture"), ("nan.tif", "not finite"), ("empty.png", "empty")):
        assert any(name in line and reason in line for line in said.err.splitlines()), name


def test_one_file_may_be_named(weights, tmp_path):
    file = photo(tmp_path / "a.jpg")
    assert run_restore([file], output=tmp_path / "new" / "b.png", weights=weights, device="cpu") == 0
    np.testing.assert_array_equal(read_picture(tmp_path / "new" / "b.png").pixels, expected(weights, file))


def test_a_named_file_is_not_for_several(weights, tmp_path):
    photo(tmp_path / "a.png")
    photo(tmp_path / "b.png")
    with pytest.raises(UserError, match="is one file, but there are 2"):
        run_restore([tmp_path / "*.png"], output=tmp_path / "out.png", weights=weights, device="cpu")


def test_inputs_are_never_replaced(weights, tmp_path):
    file = photo(tmp_path / "a.png")
    before = file.read_bytes()
    for output in (tmp_path, file):
        with pytest.raises(UserError, match=r"would replace an input|nothing to look at"):
            run_restore([file], output=output, weights=weights, device="cpu")
    assert file.read_bytes() == before


def test_format_and_endings(weights, tmp_path, capsys):
    photo(tmp_path / "in" / "a.jpg")
    Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "in" / "b.gif")
    photo(tmp_path / "in" / "c.png", dtype="uint16")
    assert run_restore([tmp_path / "in"], output=tmp_path / "same", weights=weights, device="cpu") == 0
    assert tree(tmp_path / "same") == {"a.jpg", "b.png", "c.png"}
    assert run_restore([tmp_path / "in"], output=tmp_path / "jpg", weights=weights, device="cpu", format="jpg") == 1
    assert tree(tmp_path / "jpg") == {"a.jpg", "b.jpg"}
    assert "16 bits" in capsys.readouterr().err


def test_an_unwritable_output_is_refused_before_the_work(weights, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    file = photo(tmp_path / "a.png")
    monkeypatch.setattr(PictureRestorer, "restore", lambda *args, **kwargs: pytest.fail("the work was begun"))
    with pytest.raises(UserError, match="cannot write to the output folder"):
        run_restore([file], output=tmp_path / "file" / "out", weights=weights, device="cpu")


def test_weights_of_another_task(weights, tmp_path):
    with pytest.raises(UserError, match="are for the task 'denoise', not 'deblur'"):
        run_restore([photo(tmp_path / "a.png")], output=tmp_path / "o", task="deblur", weights=weights, device="cpu")
    with pytest.raises(UserError, match="give --task, or --weights"):
        run_restore([tmp_path / "a.png"], output=tmp_path / "o", device="cpu")


def test_enlarging(tmp_path):
    weights = save_tiny(tmp_path / "weights", "sr2", scale=2)
    for name, route in (("whole", Route()), ("strips", Route(strip=3)), ("tiles", Route(tile=64, overlap=16))):
        file = photo(tmp_path / "a.png", (31, 50))
        assert run_restore([file], output=tmp_path / f"{name}.png", weights=weights, device="cpu", route=route) == 0
        assert read_picture(tmp_path / f"{name}.png").size == (62, 100)
    whole, strips = (read_picture(tmp_path / f"{name}.png").pixels.astype(int) for name in ("whole", "strips"))
    assert np.abs(whole - strips).max() <= 1


def test_strips_are_taken_when_memory_is_short_and_said(weights, tmp_path, capsys, monkeypatch):
    file = photo(tmp_path / "a.png", (120, 90))
    route = Route(max_memory=2 << 20)
    assert run_restore([file], output=tmp_path / "b.png", weights=weights, device="cpu", route=route) == 0
    assert "restored in strips, with the result of the whole picture" in capsys.readouterr().err
    assert np.abs(read_picture(tmp_path / "b.png").pixels.astype(int) - expected(weights, file)).max() <= 1
    monkeypatch.setattr(restorer_module, "allowed_bytes", lambda device, limit: 2 << 20)
    assert run_restore([file], output=tmp_path / "c.png", weights=weights, device="cpu") == 0
    assert "restored in strips" in capsys.readouterr().err
    assert tree(tmp_path) == {"a.png", "b.png", "c.png"}


def test_running_out_of_memory_leads_to_strips(weights, tmp_path, capsys, monkeypatch):
    file = photo(tmp_path / "a.png")

    def no_room(self, x, kind):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PictureRestorer, "_forward", no_room)
    assert run_restore([file], output=tmp_path / "b.png", weights=weights, device="cpu") == 0
    assert "did not fit into memory; restored in strips" in capsys.readouterr().err
    assert np.abs(read_picture(tmp_path / "b.png").pixels.astype(int) - expected(weights, file)).max() <= 1
    assert run_restore([file], output=tmp_path / "c.png", weights=weights, device="cpu", route=Route(tile=32)) == 1
    assert "smaller --tile" in capsys.readouterr().err
    assert not (tmp_path / "c.png").exists()


def test_an_interrupted_run_goes_on_by_the_same_command(weights, tmp_path, monkeypatch, capsys):
    file, output = photo(tmp_path / "in" / "a.png"), tmp_path / "out"
    calls = []
    streamed = restorer_module.restore_streamed

    def stopping(*args, tick, **options):
        def count(share):
            calls.append(share)
            if len(calls) == 40:
                raise KeyboardInterrupt
            tick(share)

        return streamed(*args, tick=count, **options)

    monkeypatch.setattr(restorer_module, "restore_streamed", stopping)
    arguments = {"output": output, "weights": weights, "device": "cpu", "route": Route(strip=4)}
    with pytest.raises(KeyboardInterrupt):
        run_restore([file], **arguments)
    assert "the same command goes on" in capsys.readouterr().err
    assert not (output / "a.png").exists()
    calls[:] = [0.0] * 41
    assert run_restore([file], **arguments) == 0
    assert calls[41] > 0.1  # what was done before
    assert tree(output) == {"a.png"}
    assert np.abs(read_picture(output / "a.png").pixels.astype(int) - expected(weights, file)).max() <= 1


def test_a_result_that_is_not_finite_is_restored_again_in_fp32(weights, tmp_path, capsys, monkeypatch):
    file = photo(tmp_path / "a.png")
    forward = PictureRestorer._forward

    def overflowing(self, x, kind):
        return forward(self, x, kind) * (torch.inf if kind == torch.float16 else 1)

    monkeypatch.setattr(PictureRestorer, "_forward", overflowing)
    route = Route(precision="fp16")
    assert run_restore([file], output=tmp_path / "b.png", weights=weights, device="cpu", route=route) == 0
    assert "the result in fp16 is not finite; restored again in fp32" in capsys.readouterr().err
    np.testing.assert_array_equal(read_picture(tmp_path / "b.png").pixels, expected(weights, file))


def test_damaged_weights_write_nothing(tmp_path, capsys):
    model = tiny_serpent()
    with torch.no_grad():
        model.get_parameter("head.out.bias").fill_(torch.nan)
    card = WeightsCard(model={"name": "serpent", **model.config}, task="denoise")
    with pytest.raises(UserError, match="the weights are damaged"):
        PictureRestorer(model, card, device="cpu").restore(torch.rand(3, 8, 8))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("strip", [None, 5])
def test_half_precision_is_near(weights, precision, strip):
    image = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))

    def restored(route: Route) -> torch.Tensor:
        return PictureRestorer.from_pretrained(weights, None, device="cpu", route=route).restore(image)

    error = (restored(Route(precision=precision, strip=strip)) - restored(Route())).abs().max()
    assert 0 < float(error) < 0.02


def test_inpainting_keeps_known_pixels(painter, tmp_path):
    file = photo(tmp_path / "a.png")
    mask = np.full((37, 51), 255, np.uint8)
    mask[10:20, 15:30] = 0
    Image.fromarray(mask).save(tmp_path / "m.png")
    arguments = {"output": tmp_path / "b.png", "weights": painter, "device": "cpu"}
    assert run_restore([file], **arguments, mask=tmp_path / "m.png") == 0
    before, after = read_picture(file).pixels, read_picture(tmp_path / "b.png").pixels
    np.testing.assert_array_equal(after[mask > 0], before[mask > 0])
    assert not np.array_equal(after[mask == 0], before[mask == 0])
    changed = before.copy()
    changed[mask == 0] = 77  # missing pixels must not be looked at
    write_picture(file, Picture(changed))
    assert run_restore([file], **arguments, mask=tmp_path / "m.png") == 0
    np.testing.assert_array_equal(read_picture(tmp_path / "b.png").pixels, after)


def test_masks_are_those_that_degrade_writes(painter, tmp_path):
    """Where `degrade` made pixels missing, they change; all others stay."""
    clean = np.full((40, 40, 3), 200, np.uint8)
    write_picture(tmp_path / "clean" / "a.png", Picture(clean))
    assert run_degrade(tmp_path / "clean", tmp_path / "pairs", task="inpaint", degradation={"size": 10}) == 0
    code = run_restore(
        [tmp_path / "pairs" / "input"], output=tmp_path / "out", weights=painter, device="cpu",
        mask=tmp_path / "pairs" / "mask",
    )  # fmt: skip
    assert code == 0
    degraded, found = (read_picture(tmp_path / name / "a.png").pixels for name in ("pairs/input", "out"))
    missing = (degraded == 0).all(axis=2)
    assert 0 < missing.sum() < 200
    np.testing.assert_array_equal(found[~missing], clean[~missing])
    assert (found[missing] != degraded[missing]).any()


def test_a_named_result_is_never_of_another_format(weights, tmp_path, capsys):
    deep = photo(tmp_path / "a.png", dtype="uint16")
    assert run_restore([deep], output=tmp_path / "out" / "a.jpg", weights=weights, device="cpu") == 1
    assert "JPEG holds no 16 bits" in capsys.readouterr().err
    assert not tree(tmp_path / "out")
    with pytest.raises(UserError, match="contradict"):
        run_restore([deep], output=tmp_path / "a.tif", weights=weights, format="png")
    with pytest.raises(UserError, match=r"\.gif cannot be written"):
        run_restore([deep], output=tmp_path / "a.gif", weights=weights)


def test_folders_that_cannot_be_are_refused_before_the_work(weights, painter, tmp_path):
    file = photo(tmp_path / "in" / "a.png")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="is the folder of the inputs"):
        run_restore([tmp_path / "in"], output=tmp_path / "in", weights=weights)
    with pytest.raises(UserError, match="cannot write"):
        run_restore([file], output=tmp_path / "out", weights=weights, device="cpu", scratch=tmp_path / "notes.txt")
    with pytest.raises(UserError, match="no such file or folder"):
        run_restore([file], output=tmp_path / "out", weights=painter, device="cpu", mask=tmp_path / "none.png")


def test_dry_run_knows_every_picture_that_can_be_restored(weights, tmp_path, monkeypatch):
    write_picture(tmp_path / "in" / "float.tif", Picture(np.full((9, 8, 3), 0.5, np.float32)))
    photo(tmp_path / "in" / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert run_restore([tmp_path / "in"], output=tmp_path / "out", weights=weights, device="cpu", dry_run=True) == 0


def test_a_picture_that_alone_takes_the_memory(weights, tmp_path, capsys):
    file = photo(tmp_path / "a.png", (300, 400))
    route = Route(max_memory=parse_size("1MiB"))
    assert run_restore([file], output=tmp_path / "out", weights=weights, device="cpu", route=route) == 1
    assert "the picture and its result alone take 5 MiB, 1 MiB are allowed" in capsys.readouterr().err


def test_masks_that_do_not_fit(painter, weights, tmp_path, capsys):
    file = photo(tmp_path / "a.png")
    Image.new("L", (5, 4)).save(tmp_path / "m.png")
    (tmp_path / "masks").mkdir()
    arguments = {"output": tmp_path / "out", "device": "cpu"}
    with pytest.raises(UserError, match="needs --mask"):
        run_restore([file], weights=painter, **arguments)
    with pytest.raises(UserError, match="--mask is for inpainting"):
        run_restore([file], weights=weights, mask=tmp_path / "m.png", **arguments)
    assert run_restore([file], weights=painter, mask=tmp_path / "m.png", **arguments) == 1
    assert "is 5x4, the picture 51x37" in capsys.readouterr().err
    (tmp_path / "m.png").write_bytes(b"nonsense")
    assert run_restore([file], weights=painter, mask=tmp_path / "m.png", **arguments) == 1
    assert f"the mask {tmp_path / 'm.png'}: cannot read" in capsys.readouterr().err
    assert run_restore([file], weights=painter, mask=tmp_path / "masks", **arguments) == 1
    assert "no mask of the name a" in capsys.readouterr().err


def test_dry_run_predicts_and_writes_nothing(weights, tmp_path, capsys):
    photo(tmp_path / "in" / "a.png", (120, 90))
    photo(tmp_path / "in" / "b.png", (12, 9))
    route = Route(max_memory=2 << 20)
    code = run_restore(
        [tmp_path / "in"], output=tmp_path / "out", weights=weights, device="cpu", route=route, dry_run=True
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0
    assert "a.png: 90x120: exact strips (whole needs about" in lines[0]
    assert "scratch files" in lines[0]
    assert "b.png: 9x12: whole picture at once" in lines[1]
    assert "2 files, about" in lines[2]
    assert tree(tmp_path) == {"in/a.png", "in/b.png"}


def test_the_estimate_grows_with_the_picture(weights):
    restorer = PictureRestorer.from_pretrained(weights, None, device="cpu")
    small, large = restorer.plan(100, 100).memory, restorer.plan(400, 300).memory
    assert large == pytest.approx(12 * small, rel=0.15)


def test_the_limit_of_a_container_counts(tmp_path, monkeypatch):
    for name, text in (("memory.max", "5000000"), ("memory.current", "3000000"),
                       ("memory.stat", "anon 1\ninactive_file 400000\nactive_file 100000\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device_module, "_CGROUP", tmp_path)
    assert device_module.free_memory(torch.device("cpu")) == 2_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert device_module.free_memory(torch.device("cpu")) > 10_000_000


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 << 30), ("512M", 512 << 20), ("1.5 gb", 3 << 29), ("4096", 4096), ("1k", 1024)]
)
def test_sizes(text, size):
    assert parse_size(text) == size
    assert device_module.size_text(3 << 29) == "1.5 GiB"


@pytest.mark.parametrize("text", ["", "0", "-1G", "2 apples", "GiB"])
def test_sizes_that_are_none(text):
    with pytest.raises(UserError, match="not an amount of memory"):
        parse_size(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile": 64, "strip": 4}, "not both"),
        ({"tile": 8}, "at least 32"),
        ({"tile": 64, "overlap": 40}, "half a tile"),
        ({"overlap": 40}, "is for --tile"),
        ({"strip": 0}, "at least 1 line"),
        ({"precision": "int8"}, "fp32, bf16, fp16"),
    ],
)
def test_routes_that_make_no_sense(options, message):
    with pytest.raises(UserError, match=message):
        Route(**options)
