"""`vssm generate`: sample, eval, reference and encode as a user calls them, and their messages."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from generation.commands import COMMANDS
from generation.dim import DiM
from generation.evaluate import Drawing, run_eval, score_features, stored_reference
from generation.features import ClassifierFeatures, ScriptFeatures
from generation.generator import draw, load_generator
from generation.objectives import Objective
from generation.pipelines import DiMPipeline, VideoDiMPipeline
from generation.reference import Reference
from generation.streaming import VideoStream
from generation.synthetic import MovingShapes
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.classify.config import NetworkConfig
from vision_ssm.classify.model import build_network, classifier_from
from vision_ssm.cli import call
from vision_ssm.data.video import video_info
from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture

NETWORK = {"name": "resnet10t", "options": {"channels": [8, 8, 8, 8], "stem_width": 8, "output_stride": 8}}


def vssm(verb: str, *arguments: object) -> int:
    return call(f"vssm generate {verb}", COMMANDS[verb], [str(a) for a in arguments])


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A pipeline of pictures with two classes, not trained but not zero."""
    torch.manual_seed(0)
    model = DiM(width=32, depth=2, patch=4, sample_size=16, num_classes=2, state_size=4)
    torch.nn.init.normal_(model.head.linear.weight, std=0.05)
    pipeline = DiMPipeline(model.eval(), Objective().scheduler(), id2label={0: "land", 1: "sea"})
    folder = tmp_path_factory.mktemp("images") / "p"
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    model = DiM(
        width=32, depth=2, patch=4, sample_size=16, sample_frames=4, layout="st", causal=True, state_size=4
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("videos") / "p"
    VideoDiMPipeline(model.eval(), Objective().scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = build_network(NetworkConfig(**NETWORK), 2)
    config = {"task": "classify", "network": NETWORK, "classes": ["land", "sea"], "side": 16}
    folder = tmp_path_factory.mktemp("judge") / "w"
    save_checkpoint(folder, network.state_dict(), config)
    assert classifier_from(network.state_dict(), config, "w")
    return folder


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    root, rng = tmp_path_factory.mktemp("real"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 8)):
        for name in ("land", "sea"):
            for number in range(count):
                save_picture(root / split / name / f"{number}.png", rng.integers(0, 256, (16, 16, 3), dtype=np.uint8))
    return root


def test_pictures_and_the_file_that_says_how(images, tmp_path, capsys):
    output = tmp_path / "a.png"
    assert vssm("sample", images, "--output", output, "--classes", "sea", "--count", 3, "--steps", 2, "--seed", 7) == 0
    assert "3 samples in" in capsys.readouterr().out
    facts = json.loads((tmp_path / "a.png.json").read_text())
    assert (facts["labels"], facts["seeds"], facts["steps"]) == ([1, 1, 1], [7, 8, 9], 2)
    assert {"torch", "diffusers", "vision-ssm"} <= set(facts["versions"])
    assert len(facts["weights_sha256"]) == 64
    assert facts["model"]["width"] == 32
    assert Image.open(output).size == (2 * 64 + 4, 2 * 64 + 4)


def test_npz_has_what_was_drawn_whatever_the_batch(images, tmp_path):
    for batch in (1, 3):
        vssm("sample", images, "--output", tmp_path / f"{batch}.npz", "--count", 3, "--steps", 2, "--batch-size", batch)
    one, three = (np.load(tmp_path / f"{batch}.npz") for batch in (1, 3))
    assert one["images"].shape == (3, 16, 16, 3)
    assert np.abs(one["images"].astype(int) - three["images"]).max() <= 1
    assert one["labels"].tolist() == [0, 1, 0]


def test_packed_weights_draw_nearly_the_same(images, tmp_path):
    assert vssm("pack", images, tmp_path / "half") == 0
    files = [folder / "transformer" / "diffusion_pytorch_model.safetensors" for folder in (tmp_path / "half", images)]
    assert files[0].stat().st_size < 0.75 * files[1].stat().st_size
    drawn = []
    for folder in (tmp_path / "half", images):
        pipeline = load_generator(folder)
        assert pipeline.transformer.dtype == torch.float32
        drawn.append(draw(pipeline, [0, 1], [1, 2], steps=2).int())
    assert (drawn[0] - drawn[1]).abs().max() <= 3
    with pytest.raises(UserError, match="is not empty"):
        vssm("pack", images, images)


@pytest.mark.parametrize("ending", ["mp4", "gif"])
def test_films(videos, tmp_path, ending):
    output = tmp_path / f"a.{ending}"
    assert vssm("sample", videos, "--output", output, "--count", 2, "--steps", 1, "--frames", 3) == 0
    if ending == "gif":
        assert Image.open(output).n_frames == 3  # type: ignore[attr-defined]
    else:
        assert video_info(output).frames == 3


def test_a_stream_is_as_long_as_asked(videos, tmp_path):
    flags = ["--count", 2, "--steps", 1, "--first-steps", 2, "--frames", 9]
    assert vssm("sample", videos, "--output", tmp_path / "s.npz", *flags) == 0
    clips = np.load(tmp_path / "s.npz")["videos"]
    stream = VideoStream(load_generator(videos), seeds=[0, 1], num_inference_steps=1, first_steps=2)
    for i in range(9):
        frame = (next(stream) * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert np.array_equal(clips[:, i], frame), f"frame {i} is not that of a stream"
    facts = json.loads((tmp_path / "s.npz.json").read_text())
    assert facts["stream"] is True
    assert facts["first_steps"] == 2


def test_scores_of_pictures_with_their_protocol(images, judge, real, tmp_path, capsys):
    output = tmp_path / "scores.json"
    flags = ["--classifier", judge, "--count", 12, "--steps", 2, "--rounds", 20, "--output", output]
    assert vssm("eval", images, real, *flags) == 0
    report = json.loads(output.read_text())
    assert report["reference"]["counts"] == {"train": 20, "val": 16}
    assert report["samples"]["count"] == 12
    assert report["scores"]["frechet"]["value"] > report["reference"]["floor"]["frechet"] > 0
    assert 0 <= report["scores"]["conditional_accuracy"]["value"] <= 1
    assert "bootstrap" in report["protocol"]
    assert "real held out" in capsys.readouterr().out
    stored = tmp_path / "r.npz"
    assert vssm("reference", real, stored, "--classifier", judge, "--side", 16) == 0
    assert vssm("eval", images, stored, *flags) == 0
    again = json.loads(output.read_text())
    assert again["scores"]["frechet"]["value"] == pytest.approx(report["scores"]["frechet"]["value"])
    assert again["scores"]["precision"] == pytest.approx(report["scores"]["precision"], abs=0.2)


def test_real_clips_are_at_their_floor(tmp_path, capsys):
    clips = MovingShapes(40, frames=6, seed=99)
    np.savez(tmp_path / "real.npz", videos=np.stack([clips.read(i) for i in range(40)]))
    output = tmp_path / "scores.json"
    assert vssm("eval", tmp_path / "real.npz", "synthetic", "--output", output) == 0
    scores = json.loads(output.read_text())["scores"]
    assert scores["clips"] == 40
    assert all(value < 4 for value in scores["in_floors"].values()), scores
    assert "in floors" in capsys.readouterr().out


def test_a_network_of_the_user_gives_the_features(tmp_path):
    class Means(torch.nn.Module):
        def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
            return images.float().mean(dim=[2, 3]) if return_features else images.float()

    torch.jit.script(Means()).save(str(tmp_path / "n.pt"))
    network = ScriptFeatures(tmp_path / "n.pt", "cpu")
    pictures = torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features, probabilities = network(pictures)
    torch.testing.assert_close(features, pictures.float().mean((2, 3)))
    assert probabilities is None
    assert network.facts()["options"] == ["return_features"]
    with pytest.raises(UserError, match="has no features"):
        score_features(pictures, None, Reference({}), network)


def test_latents_of_a_local_vae(real, tmp_path):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(4, 8), norm_num_groups=2, latent_channels=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    vae.save_pretrained(tmp_path / "vae")
    flags = ["--data.train", real, "--data.side", 16]
    assert vssm("encode", tmp_path / "vae", tmp_path / "l.npz", *flags) == 0
    found = np.load(tmp_path / "l.npz")
    assert found["latents"].shape == (20, 2, 8, 8)
    assert found["classes"].tolist() == ["land", "sea"]
    with pytest.raises(UserError, match="not a multiple of 2"):
        vssm("encode", tmp_path / "vae", tmp_path / "l.npz", "--data.train", real, "--data.side", 17)


def test_mistakes_are_told(images, videos, judge, real, tmp_path):
    (tmp_path / "folder.png").mkdir()
    for arguments, message in [
        ((images, "--output", tmp_path / "a.mp4"), "is a video, this model makes pictures"),
        ((images, "--output", tmp_path / "a.txt"), "the ending must be one of"),
        ((images, "--output", tmp_path / "a.png", "--classes", "moon"), "moon"),
        ((images, "--output", tmp_path / "a.png", "--classes", "7"), "7"),
        (
            (images, "--output", tmp_path / "a.png", "--scheduler", "ddim"),
            "no scheduler 'ddim'",
        ),
        ((images, "--output", tmp_path / "a.png", "--frames", 3), "--frames is for videos"),
        ((videos, "--output", tmp_path / "a.gif", "--classes", "x"), "trained without classes"),
        ((judge, "--output", tmp_path / "a.png"), "is no generator"),
        ((tmp_path / "none", "--output", tmp_path / "a.png"), "no generator at"),
        ((images, "--output", tmp_path / "a.png", "--count", 0), "count must be above 0"),
        ((images, "--output", tmp_path / "a.png", "--count", 10**15), "samples take .* draw fewer at a time"),
        ((images, "--output", tmp_path / "a.png", "--steps", 1001), "must be 1 to 1000, got 1001"),
        ((images, "--output", tmp_path / "a.png", "--classes", "²"), "there is no class '²'"),
        ((images, "--output", tmp_path / "a.png", "--classes", 10**20), f"there is no class '{10**20}'"),
        ((images, "--output", tmp_path / "folder.png"), "output is the folder .*folder.png/samples.png"),
        ((videos, "--output", tmp_path / "a.gif", "--fps", 1e-5), "fps must be 0.01 to 1000"),
        ((videos, "--output", tmp_path / "a.gif", "--frames", 0), "frames must be 1 or more, got 0"),
        ((videos, "--output", tmp_path / "a.gif", "--first-steps", 0), "first_steps must be 1 to 1000, got 0"),
        (
            (images, "--output", tmp_path / "a.png", "--first-steps", 2),
            "makes pictures; --first-steps is for causal",
        ),
    ]:
        with pytest.raises(UserError, match=message):
            vssm("sample", *arguments)
    with pytest.raises(UserError, match="--classifier WEIGHTS, or --network"):
        vssm("eval", images, real, "--count", 8, "--steps", 1)
    np.savez(tmp_path / "r.npz", about=np.array(json.dumps({"features": {"sha256": "0" * 64}})))
    with pytest.raises(UserError, match="another feature network"):
        vssm("eval", images, tmp_path / "r.npz", "--classifier", judge, "--count", 8, "--steps", 1)
    (tmp_path / "broken.npz").write_text("no archive")
    (tmp_path / "file").write_text("mine")
    for verb, arguments, message in [
        ("eval", (images, real, "--classifier", judge, "--rounds", 0), "rounds must be 8 or more, got 0"),
        ("eval", (images, real, "--classifier", judge, "--frames", 2), "--frames is for videos"),
        ("eval", (images, tmp_path / "broken.npz", "--count", 8, "--steps", 1), "cannot read .*broken.npz"),
        ("reference", (real, tmp_path / "o.npz", "--classifier", judge, "--keep", -3), "keep must be 8 or more"),
        ("reference", ("synthetic", tmp_path / "o.npz", "--frames", 4, "--count", 0), "count must be 8 or more"),
        ("reference", (tmp_path / "no", tmp_path / "file" / "o.npz"), "cannot write to the output folder"),
    ]:
        with pytest.raises(UserError, match=message):
            vssm(verb, *arguments)


def test_reports_keep_the_names_that_they_are_given(images, judge, real, tmp_path):
    for name in ("dim.best", "dim.last", "both.json"):
        flags = ("--classifier", judge, "--count", 8, "--steps", 1, "--rounds", 8, "--output", tmp_path / name)
        assert vssm("eval", images, real, *flags) == 0
    assert sorted(file.name for file in tmp_path.iterdir()) == ["both.json", "dim.best.json", "dim.last.json"]


def test_shipped_pictures_are_of_the_class_that_was_asked_for():
    pipeline, judge = load_generator("eurosat_dim", scheduler="unipc"), ClassifierFeatures(Path("eurosat"), "cpu")
    real = stored_reference("eurosat_dim")
    assert real is not None
    assert real.about["features"]["sha256"] == judge.facts()["sha256"], "the statistics are those of the shipped judge"
    assert list(pipeline.config.id2label.values()) == real.about["features"]["classes"]
    labels = list(range(10))
    pictures = draw(pipeline, labels, labels, steps=8, guidance=4.0)
    scores = score_features(pictures, labels, real, judge, rounds=8)
    assert 0 <= scores["conditional_accuracy"]["low"] <= scores["conditional_accuracy"]["high"] <= 1
    assert scores["conditional_accuracy"]["value"] >= 0.6  # 0.8 measured; 0.92 of 400 samples with 20 steps


def test_statistics_belong_to_samples_of_their_size(images, tmp_path):
    assert vssm("sample", images, "-o", tmp_path / "s.npz", "--count", 8, "--steps", 1) == 0
    with pytest.raises(UserError, match="side 64, these have 16"):
        run_eval(tmp_path / "s.npz", "eurosat_dim", classifier=Path("eurosat"), output=tmp_path / "r.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"frames": 8}, "frames 24, these have 8"), ({"count": 1_001}, "enough for 1000 samples, not 1001: --count")],
)
def test_clips_that_cannot_be_scored_are_not_drawn(changes, message, tmp_path, monkeypatch):
    monkeypatch.setattr("generation.evaluate.draw", None)
    with pytest.raises(UserError, match=message):
        run_eval(
            Path("shapes_stream"),
            "shapes_stream",
            drawing=Drawing(**{"count": 8} | changes),
            output=tmp_path / "r.json",
        )


def test_a_reference_that_is_not_there_is_told_before_samples_are_drawn(images, judge, tmp_path):
    many = Drawing(count=100_000)
    with pytest.raises(UserError, match="did you mean 'eurosat_dim'"):
        run_eval(images, "eurosat_dom", classifier=judge, drawing=many, output=tmp_path / "r.json")
