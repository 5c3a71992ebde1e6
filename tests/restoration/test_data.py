"""Folders as the data sets unpack, pictures of any depth, crops that belong together, pairs on disk."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from restoration.config import RestoreDataConfig
from restoration.data import CropDataset, collate, load_sets, read_example
from restoration.degrade import degradation_for, seed_of
from restoration.folders import check_pictures, find_examples
from restoration.pairs import run_degrade
from restoration.reading import PictureStore, read_levels, to_tensor
from tests.restoration.photographs import NAMES, as_image, photograph, write, write_set
from vision_ssm.errors import UserError
from vision_ssm.training import SampleKey

SMALL = photograph(side=16)


def names(found) -> list[str]:
    return [example.name for example in found.examples]


def dataset(folder: Path, task: str = "denoise", *, epochs: int = 1, cache="ram", **options) -> CropDataset:
    operator = degradation_for(task)
    sets = load_sets(str(folder), split="train", scale=operator.scale)
    config = RestoreDataConfig(**{"crops": ((32, 1.0),), "epoch_samples": 8, **options})
    headers = check_pictures(sets, scale=operator.scale)
    return CropDataset(
        [example for found in sets for example in found.examples],
        PictureStore(headers, cache).read,
        degradation=operator,
        scale=operator.scale,
        config=config,
        epochs=epochs,
    )


def test_clean_pictures_to_any_depth(tmp_path):
    write_set(tmp_path / "a" / "b", 16)
    write(tmp_path / "c.jpg", SMALL)
    found = find_examples(tmp_path, split="train")
    assert not found.paired
    assert names(found) == [*(f"a/b/{name}" for name in NAMES), "c"]
    assert "5 clean pictures" in str(found)


def test_gopro(tmp_path):
    for split, scene in (("train", "GOPR1"), ("train", "GOPR2"), ("test", "GOPR3")):
        for kind in ("blur", "blur_gamma", "sharp"):
            write(tmp_path / split / scene / kind / "000047.png", SMALL)
    train, test = find_examples(tmp_path, split="train"), find_examples(tmp_path, split="val")
    assert (train.layout, train.split, test.split) == ("twin folders", "train", "test")
    assert names(train) == ["train/GOPR1/000047", "train/GOPR2/000047"]
    assert names(test) == ["test/GOPR3/000047"]
    example = train.examples[1]
    assert example.input == tmp_path / "train/GOPR2/blur/000047.png"
    assert example.target == tmp_path / "train/GOPR2/sharp/000047.png"


def test_sidd(tmp_path):
    scene = tmp_path / "Data" / "0001_001_S6_00100_00060_3200_L"
    for number in ("010", "011"):
        write(scene / f"0001_GT_SRGB_{number}.PNG", SMALL)
        write(scene / f"0001_NOISY_SRGB_{number}.PNG", SMALL)
    found = find_examples(tmp_path)
    assert found.layout == "SIDD"
    assert [(e.input.name, e.target.name) for e in found.examples] == [
        ("0001_NOISY_SRGB_010.PNG", "0001_GT_SRGB_010.PNG"),
        ("0001_NOISY_SRGB_011.PNG", "0001_GT_SRGB_011.PNG"),
    ]


def test_div2k(tmp_path):
    for split in ("train", "valid"):
        for number in ("0001", "0002"):
            write(tmp_path / f"DIV2K_{split}_HR" / f"{number}.png", photograph(side=16))
            write(tmp_path / f"DIV2K_{split}_LR_bicubic" / "X2" / f"{number}x2.png", photograph(side=8))
            write(tmp_path / f"DIV2K_{split}_LR_bicubic" / "X4" / f"{number}x4.png", photograph(side=4))
    found = find_examples(tmp_path, split="val", scale=4)
    assert names(found) == ["DIV2K_valid_HR/0001", "DIV2K_valid_HR/0002"]
    assert found.examples[1].input == tmp_path / "DIV2K_valid_LR_bicubic/X4/0002x4.png"
    check_pictures([found], scale=4)
    clean = find_examples(tmp_path, split="train", scale=1)
    assert names(clean) == ["DIV2K_train_HR/0001", "DIV2K_train_HR/0002"]
    assert not clean.paired
    assert not find_examples(tmp_path, split="train", scale=8).paired


def test_ffhq_is_split_by_number(tmp_path):
    for number in range(2100):
        folder = tmp_path / f"{number // 1000 * 1000:05d}"
        folder.mkdir(exist_ok=True)
        (folder / f"{number:05d}.png").touch()
    sizes = {split: names(find_examples(tmp_path, split=split)) for split in ("train", "val", "test")}
    assert {split: len(found) for split, found in sizes.items()} == {"train": 100, "val": 1000, "test": 1000}
    assert sizes["val"][0] == "01000/01000"
    assert len(find_examples(tmp_path).examples) == 2100


def test_partners_that_are_missing_or_do_not_fit_are_named(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / "input" / f"{name}.png", SMALL)
    write(tmp_path / "target" / "a.jpg", SMALL)
    with pytest.raises(UserError, match=r"without a clean partner.*input.b\.png"):
        find_examples(tmp_path)
    write(tmp_path / "target" / "b.png", photograph(side=18))
    with pytest.raises(UserError, match=r"input.b\.png is 16x16 and .*target.b\.png 18x18"):
        check_pictures([find_examples(tmp_path)], scale=1)


def test_bad_pictures_are_all_named(tmp_path):
    write_set(tmp_path, 16)
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"2 bad pictures(.|\n)*empty\.png(.|\n)*text\.jpg"):
        dataset(tmp_path)
    (tmp_path / "empty.png").unlink()
    (tmp_path / "text.jpg").write_bytes((tmp_path / "coffee.png").read_bytes()[:-40])
    with pytest.raises(UserError, match=r"1 bad pictures(.|\n)*text\.jpg"):
        dataset(tmp_path)


def test_a_folder_that_is_not_there():
    with pytest.raises(UserError, match="does not exist"):
        load_sets("no/such/folder", split="train", scale=1)
    with pytest.raises(UserError, match=r"--data\.val"):
        load_sets("", split="val", scale=1)


@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
@pytest.mark.parametrize("ending", ["png", "tif"])
def test_depth_is_kept(tmp_path, kind, ending):
    pixels = np.arange(5 * 7 * 3).reshape(5, 7, 3).astype(kind) * (600 if kind is np.uint16 else 2)
    read = read_levels(write(tmp_path / f"x.{ending}", pixels))
    assert read.dtype == kind
    assert np.array_equal(read, pixels)
    want = pixels.astype(np.float64) / np.iinfo(kind).max
    assert np.abs(to_tensor(read).permute(1, 2, 0).numpy() - want).max() < 1e-7


@pytest.mark.parametrize("task", ["denoise", "deblur", "motion", "sr2", "sr8", "jpeg", "inpaint"])
def test_samples(tmp_path, task):
    data = dataset(write_set(tmp_path), task)
    scale = data.scale
    batch = collate([data[SampleKey(0, 0, index)] for index in range(4)])
    assert batch["target"].shape == (4, 3, 32, 32)
    assert batch["target"].dtype == torch.uint8
    assert batch["input"].shape == (4, 4 if task == "inpaint" else 3, 32 // scale, 32 // scale)
    assert len(data) == 8


def test_a_key_gives_the_same_sample_from_memory_and_from_disk(tmp_path):
    folder = write_set(tmp_path)
    kept, read = dataset(folder, cache="ram"), dataset(folder, cache="none")
    for key in (SampleKey(3, 0, 1), SampleKey(3, 7, 1), SampleKey(4, 0, 1)):
        assert all(torch.equal(kept[key][name], read[key][name]) for name in ("input", "target"))
    assert not torch.equal(kept[SampleKey(3, 0, 1)]["target"], kept[SampleKey(3, 7, 1)]["target"])


def test_crops_grow(tmp_path):
    data = dataset(write_set(tmp_path), crops=((8, 0.5), (20, 0.5)), epochs=4)
    assert [data[SampleKey(0, epoch, 0)]["target"].shape[-1] for epoch in range(4)] == [8, 8, 20, 20]
    with pytest.raises(UserError, match="add up to 1"):
        RestoreDataConfig(crops=((8, 0.5), (20, 0.4)))


def test_crops_are_shrunk_at_random(tmp_path):
    """Of a ramp that rises by 1 a pixel, crops rise by 1 to 2; a picture of the crop's size has nothing to shrink."""
    write(tmp_path / "large" / "a.png", np.tile(np.arange(64, dtype=np.uint8)[:, None], (64, 1, 3)))
    write(tmp_path / "exact" / "a.png", np.tile(np.arange(32, dtype=np.uint8)[:, None], (32, 1, 3)))
    write(tmp_path / "small" / "a.png", SMALL)
    data = dataset(tmp_path / "large", shrink=0.5, flips=False)
    ramps = [data[SampleKey(0, 0, index)]["target"].float() for index in range(8)]
    slopes = torch.tensor([(ramp[0, 0, -1] - ramp[0, 0, 0]) / 31 for ramp in ramps])
    assert {tuple(ramp.shape) for ramp in ramps} == {(3, 32, 32)}
    assert ((slopes >= 1) & (slopes <= 2.02)).all()
    assert slopes.std() > 0.1
    for size in ("exact", "small"):
        kept, plain = (dataset(tmp_path / size, shrink=s, flips=False)[SampleKey(0, 0, 0)]["target"] for s in (0.5, 1))
        assert torch.equal(kept, plain)
    with pytest.raises(UserError, match="shrink must be above 0 and at most 1, got 0"):
        RestoreDataConfig(shrink=0)


def test_small_pictures_are_reflected(tmp_path):
    target = dataset(write_set(tmp_path, 20), flips=False)[SampleKey(0, 0, 0)]["target"]
    assert target.shape == (3, 32, 32)
    assert torch.equal(target[:, 20:], target[:, 7:19].flip(1))


@pytest.mark.parametrize("deep", [False, True])
def test_crops_of_pairs_belong_together(tmp_path, deep):
    """Input and target are the same ramp of unlike numbers, so every crop, mirrored or turned, must match."""
    ramp = np.arange(24 * 24, dtype=np.uint16).reshape(24, 24, 1).repeat(3, 2) * (100 if deep else 1)
    ramp = ramp if deep else (ramp % 251).astype(np.uint8)
    write(tmp_path / "gt" / "a.png", ramp.repeat(2, 0).repeat(2, 1))
    write(tmp_path / "lq" / "a.png", ramp)
    data = dataset(tmp_path, "sr2", crops=((16, 1.0),))
    turns = set()
    for index in range(16):
        sample = data[SampleKey(0, index, index)]
        target = sample["target"].float() / (1 if deep else 255)
        assert torch.allclose(target[:, ::2, ::2], sample["input"], atol=1e-6)
        turns.add(bool(sample["input"][0, 0, 0] < sample["input"][0, 0, 1]))
    assert len(turns) == 2, "never turned"


@pytest.mark.parametrize("task", ["denoise", "sr4", "inpaint"])
def test_degraded_pairs_are_found_again_with_the_same_pixels(tmp_path, task):
    source = write_set(tmp_path / "clean" / "sub", 34)
    assert run_degrade(tmp_path / "clean", tmp_path / "out", task=task, format="tiff") == 0
    operator = degradation_for(task)
    found = find_examples(tmp_path / "out", scale=operator.scale)
    assert names(found) == [f"sub/{name}" for name in NAMES]
    for example in found.examples:
        side = 34 - 34 % operator.scale
        clean = as_image(read_levels(source / f"{Path(example.name).name}.png"))[:, :side, :side]
        target, given = read_example(example, read_levels, operator.scale)
        assert torch.equal(target, clean)
        assert given is not None
        assert torch.allclose(given, operator.apply(clean, seed=seed_of(example.name)), atol=1e-7)


def test_degrading_goes_on_after_a_bad_file(tmp_path, capsys):
    write_set(tmp_path / "in", 16)
    (tmp_path / "in" / "bad.png").write_bytes(b"\x89PNG nothing")
    write(tmp_path / "in" / "coffee.jpg", SMALL)
    assert run_degrade(tmp_path / "in", tmp_path / "out", task="jpeg", degradation={"quality": 20}) == 1
    output = capsys.readouterr()
    assert "bad.png" in output.err
    assert "coffee.jpg has the same name" in output.err
    assert "4 pairs" in output.out
    assert sorted(file.stem for file in (tmp_path / "out" / "input").iterdir()) == sorted(NAMES)


def test_degrading_into_the_source_leaves_the_source_and_earlier_pairs_alone(tmp_path):
    source = write_set(tmp_path / "in", 16)
    for _ in range(2):
        assert run_degrade(source, source / "pairs", task="denoise") == 0
        assert len([file for file in (source / "pairs").rglob("*") if file.is_file()]) == 2 * len(NAMES) + 1
    with pytest.raises(UserError, match="would be replaced"):
        run_degrade(source / "pairs" / "target", source / "pairs", task="sr8")


def test_floats_on_another_scale_are_no_training_pictures(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((5, 6, 3), 200, np.float32))
    with pytest.raises(UserError, match=r"a\.tif: float pixels must have 0 for black and 1"):
        read_levels(tmp_path / "a.tif")


def test_degrading_twice_gives_the_same_files_and_another_seed_others(tmp_path):
    source = write_set(tmp_path / "in", 16)
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        run_degrade(source, tmp_path / folder, task="denoise", degradation={"sigma": 25}, seed=seed)
    first, again, other = ((tmp_path / folder / "input" / "coffee.png").read_bytes() for folder in "abc")
    assert first == again
    assert first != other


def test_cid22_and_kodak(shared_root):
    """Real sets: nothing is mistaken for a pair or a split, every file opens, and they fit into memory as stated."""
    data = shared_root / "data" / "restoration"
    counts = {"train_cid22": 209, "val_cid22": 11, "test_kodak8": 8}
    for folder, count in counts.items():
        sets = load_sets(str(data / folder), split="train", scale=1)
        headers = check_pictures(sets, scale=1)
        assert (len(headers), sets[0].layout, sets[0].split) == (count, "pictures", None)
        if folder == "train_cid22":
            assert PictureStore(headers, "none").bytes == 209 * 256 * 256 * 3
