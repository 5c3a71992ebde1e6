"""Readers: folders, idx, arrays, shards, videos, UCF-101; samples that depend on their key alone; messages."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from generation.attributes import centroids
from generation.config import GenerateDataConfig, PastConfig
from generation.data import PerturbedSamples, Samples, to_pixels, to_unit
from generation.sources import ArraySource, VideoFiles, find_source
from vision_ssm.data.video import video_writer
from vision_ssm.errors import UserError
from vision_ssm.training import SampleKey
from vision_ssm.viz import save_picture

RNG = np.random.default_rng(0)


def picture(value: int, height: int = 12, width: int = 16) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


def write_video(path: Path, frames: int, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with video_writer(path, 8) as append:
        for number in range(frames):
            append(picture(value + 10 * number, 32, 48))


def config(train: Path | str, **changes) -> GenerateDataConfig:
    return GenerateDataConfig(**{"train": str(train), "side": 8, "augment": "none", **changes})


@pytest.fixture
def classes(tmp_path) -> Path:
    for split in ("train", "val"):
        for name, value in (("dark", 20), ("light", 200)):
            for number in range(3):
                save_picture(tmp_path / "p" / split / name / f"{number}.png", picture(value + number))
    return tmp_path / "p"


def test_a_folder_per_class(classes):
    samples = Samples(find_source(config(classes), "train"), config(classes))
    assert (len(samples), samples.source.classes, samples.labelled) == (6, ("dark", "light"), True)
    image, label = samples[SampleKey(0, 0, 4)]
    assert (image.shape, image.dtype, label, int(image[0, 0, 0])) == ((3, 8, 8), torch.uint8, 1, 201)
    grey = config(classes, channels=1, labels=False, cache_gib=0.0)
    unlabelled = Samples(find_source(grey, "val"), grey)
    assert unlabelled.kept is None
    image, label = unlabelled[SampleKey(0, 0, 0)]
    assert (image.shape, label) == ((1, 8, 8), -1)


def test_a_flat_folder_has_no_classes(tmp_path):
    save_picture(tmp_path / "a.png", picture(7))
    source = find_source(config(tmp_path), "train")
    assert (len(source), source.classes, source.label(0)) == (1, (), -1)


def test_held_out_samples_are_spread_over_the_set(classes):
    _, labels = Samples(find_source(config(classes), "val"), config(classes), augment=False).held_out(4)
    assert labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("augment", ["mirror", "turns"])
def test_a_key_gives_one_sample_and_augmentation_keeps_the_pixels(tmp_path, augment):
    np.save(tmp_path / "x.npy", RNG.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8))
    settings = config(tmp_path / "x.npy", augment=augment)
    samples = Samples(find_source(settings, "train"), settings)
    drawn = [samples[SampleKey(0, epoch, 1)][0] for epoch in range(30)]
    assert torch.equal(drawn[3], samples[SampleKey(0, 3, 1)][0])
    assert len({tuple(d.flatten().tolist()) for d in drawn}) == (2 if augment == "mirror" else 8)
    assert all(torch.equal(d.flatten().sort().values, drawn[0].flatten().sort().values) for d in drawn)


def test_arrays_with_labels_and_latents(tmp_path):
    latents = RNG.normal(size=(3, 4, 2, 2)).astype(np.float16)
    np.savez(tmp_path / "l.npz", latents=latents, labels=np.array([1, 0, 1]), classes=np.array(["a", "b"]))
    settings = config(tmp_path / "l.npz")
    samples = Samples(find_source(settings, "train"), settings)
    value, label = samples[SampleKey(0, 0, 0)]
    assert label == 1
    np.testing.assert_array_equal(value.numpy(), latents[0].astype(np.float32))
    assert torch.equal(to_unit(value), value)
    np.save(tmp_path / "f.npy", np.full((1, 8, 8, 1), 0.5, np.float32))
    assert (ArraySource.load(tmp_path / "f.npy").read(0) == 128).all()


def test_pixels_and_unit_floats_are_opposites():
    values = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_pixels(to_unit(values)), values)


def test_shards(tmp_path):
    def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))

    array = io.BytesIO()
    np.save(array, RNG.normal(size=(4, 2, 2)).astype(np.float32))
    save_picture(tmp_path / "one.png", picture(99))
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        add(archive, "x/000.png", (tmp_path / "one.png").read_bytes())
        add(archive, "x/000.cls", b"2\n")
        add(archive, "x/001.npy", array.getvalue())
        add(archive, "x/001.json", json.dumps({"label": 0}).encode())
    (tmp_path / "one.png").unlink()
    source = find_source(config(tmp_path), "train")
    assert (len(source), source.classes, source.label(0), source.label(1)) == (2, ("0", "1", "2"), 2, 0)
    assert (source.read(0) == 99).all()
    assert source.read(1).shape == (4, 2, 2)
    (tmp_path / "1.tar").write_bytes(b"no tar" * 200)
    with pytest.raises(UserError, match=r"cannot read the shard .*1\.tar"):
        find_source(config(tmp_path), "train")


def test_clips_of_videos_in_folders_per_class(tmp_path):
    for name in ("a", "b"):
        for number in range(2):
            write_video(tmp_path / name / f"{number}.mp4", 9, 40)
    settings = config(tmp_path, frames=3, stride=2)
    samples = Samples(find_source(settings, "train"), settings)
    assert (len(samples), samples.source.classes) == (4, ("a", "b"))
    clip, label = samples[SampleKey(0, 0, 3)]
    assert (clip.shape, label) == ((3, 3, 8, 8), 1)
    steps = clip.float().mean(dim=(0, 2, 3)).diff()
    assert torch.allclose(steps, torch.full((2,), 20.0), atol=5)
    long = config(tmp_path, frames=8, stride=2)
    with pytest.raises(UserError, match=r"has 9 frames; clips of 8 frames with stride 2 need 15"):
        Samples(find_source(long, "train"), long)[SampleKey(0, 0, 0)]
    with pytest.raises(UserError, match="the data are clips; set data.frames"):
        Samples(find_source(long, "train"), replace(long, frames=0))


def test_moving_shapes_go_on_from_pasts_with_errors():
    settings = config("synthetic", side=32, frames=12, past=PastConfig(bodies=0.4))
    samples = PerturbedSamples(find_source(settings, "train"), settings)
    own, wandering = [], []
    for index in range(120):
        clip, label, past = samples[SampleKey(0, 0, index)]
        assert (clip.shape, clip.dtype, past.shape, label) == ((3, 12, 32, 32), torch.uint8, (3, 12, 32, 32), index % 3)
        real = samples.source.read(index)
        np.testing.assert_array_equal(clip[:, 0], real[0].transpose(2, 0, 1))
        steps = np.diff(centroids(real.max(axis=-1) / 255), axis=0)
        if steps.std(axis=0).max() > 0.03:
            continue  # something bounces
        places, before = (centroids(frames.numpy().max(axis=0) / 255) for frames in (clip, past))
        own.append((places[1:] - before[:-1] - steps).std())
        wandering.append((before[1:] - before[:-1] - steps).std())
    assert len(own) > 10
    assert np.median(own) < 0.06, "frames go on from their past at the velocity of the clip"
    assert min(wandering) < 0.06, "of each clip other errors"
    assert np.mean(wandering) == pytest.approx(0.2, rel=0.3), "evenly from 0 to 0.4"


def test_errors_of_a_past_depend_on_seed_epoch_and_index():
    settings = config("synthetic", side=32, frames=4, augment="none", past=PastConfig(bodies=0.4))
    samples = PerturbedSamples(find_source(settings, "train"), settings)
    first, again, later = (samples[SampleKey(0, epoch, 7)] for epoch in (0, 0, 1))
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[2], again[2])
    assert torch.equal(first[0][:, 0], later[0][:, 0])
    assert not torch.equal(first[2], later[2])


def test_frames_and_their_past_are_turned_alike(tmp_path):
    settings = config("synthetic", side=32, frames=4, augment="turns")  # no errors: both are the clip
    samples = PerturbedSamples(find_source(settings, "train"), settings)
    plain = PerturbedSamples(samples.source, replace(settings, augment="none"))
    turned = 0
    for index in range(20):
        frames, _, past = samples[SampleKey(0, 0, index)]
        assert torch.equal(frames, past)
        turned += not torch.equal(past, plain[SampleKey(0, 0, index)][2])
    assert turned > 10
    with pytest.raises(UserError, match=r"leave it 0 for .*clips.npz"):
        replace(settings, train=str(tmp_path / "clips.npz"), past=PastConfig(bodies=0.5))
    with pytest.raises(UserError, match=r"data.past.bodies must be 0 to 0.5, got 2"):
        PastConfig(bodies=2)


def test_a_video_per_folder_has_no_classes(tmp_path):
    for number in range(2):
        write_video(tmp_path / "train" / f"run{number}" / "recording.mp4", 3)
    assert find_source(config(tmp_path, frames=2), "train").classes == ()


def test_official_splits_of_ucf(tmp_path):
    for name in ("v_A_g01_c01", "v_A_g02_c01", "v_B_g01_c01"):
        write_video(tmp_path / "UCF-101" / name[2] / f"{name}.avi", 3)
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("A/v_A_g02_c01.avi 1\nB/v_B_g01_c01.avi 2\n")
    (lists / "testlist01.txt").write_text("A/v_A_g01_c01.avi\n")
    train = find_source(config(tmp_path, frames=2), "train")
    test = find_source(config(tmp_path, frames=2), "val", train.classes)
    assert isinstance(train, VideoFiles)
    assert ([f.name for f in train.files], train.labels) == (["v_A_g02_c01.avi", "v_B_g01_c01.avi"], [0, 1])
    assert (len(test), test.label(0), test.classes) == (1, 0, ("A", "B"))
    (lists / "testlist01.txt").write_text("A/v_A_g09_c01.avi\n")
    with pytest.raises(UserError, match=r"1 of 1 videos of testlist01.txt are not in"):
        find_source(config(tmp_path, frames=2), "val")


def test_mistakes_are_told(tmp_path):
    with pytest.raises(UserError, match="--data.train"):
        find_source(GenerateDataConfig(), "train")
    with pytest.raises(UserError, match="no pictures in"):
        find_source(config(tmp_path), "train")
    with pytest.raises(UserError, match="no videos in"):
        find_source(config(tmp_path, frames=4), "train")
    with pytest.raises(UserError, match="are no folder"):
        find_source(config(tmp_path / "nowhere"), "train")
    with pytest.raises(UserError, match="synthetic moving shapes are clips of 2 frames"):
        GenerateDataConfig(train="synthetic")
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"not a film")
    settings = config(tmp_path / "v", frames=2)
    with pytest.raises(UserError, match=r"cannot read the video .*a\.mp4"):
        Samples(find_source(settings, "train"), settings)
    np.savez(tmp_path / "x.npz", other=np.zeros(3))
    with pytest.raises(UserError, match="none of the arrays images, videos, latents"):
        find_source(config(tmp_path / "x.npz"), "train")


def test_the_real_sets_are_read(shared_root):
    root = shared_root / "data" / "generation"
    fashion = find_source(config(root / "fashion_mnist", side=28, channels=1), "train")
    assert (len(fashion), len(fashion.classes)) == (12_000, 10)
    settings = config(root / "clips", side=32, frames=16)
    clips = find_source(settings, "val", find_source(settings, "train").classes)
    assert (len(clips), clips.classes) == (19, ("asl", "bottle", "car", "person", "scene"))
    assert clips.read(0).shape == (16, 32, 32, 3)
