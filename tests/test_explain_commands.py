"""`vssm explain` on each task: a page with pictures from tiny or shipped weights, and clear refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import vision_ssm.explain.classifier as classifier_module
from generation.explain import Explainer, in_order
from generation.generator import load_generator
from generation.objectives import Objective
from generation.pipelines import DiMPipeline, VideoDiMPipeline
from generation.streaming import VideoStream
from tests.generation.small_models import small_dim
from tests.restoration.tiny_weights import save_tiny
from vision_ssm.classify.model import Classifier
from vision_ssm.cli import main
from vision_ssm.explain import hidden_attention
from vision_ssm.explain.options import GenerateOptions
from vision_ssm.explain.recording import record
from vision_ssm.mamba import BidirectionalMamba
from vision_ssm.viz import save_picture

TREES = "mamba_yolo_t_trees"


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Green discs on brown ground, (48, 64)."""
    y, x = np.mgrid[:48, :64]
    image = np.full((48, 64, 3), (120, 96, 70), np.uint8)
    for cx, cy in ((18, 20), (44, 30)):
        image[(x - cx) ** 2 + (y - cy) ** 2 < 90] = (40, 110, 45)
    path = tmp_path_factory.mktemp("explain") / "discs.png"
    save_picture(path, image + np.random.default_rng(0).integers(0, 12, image.shape).astype(np.uint8))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_detection_is_explained(picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["explain", "detect", str(picture), "--weights", TREES, "--image-size", "64", "--conf", "0.001"]
    assert main([*command, "-o", str(tmp_path), "--layer", "neck", "--per-direction"]) == 0
    names = names_in(tmp_path)
    assert len(names) == 10  # all, four resolutions, four directions, the page
    assert names[0].endswith("attribution-all-layers.png")
    assert main([*command, "-o", str(tmp_path / "raw"), "--method", "raw", "--layer", "neck.bottom_up4*"]) == 0
    assert main([*command, "--box", "999"]) == 2
    assert main([*command, "--name", "car"]) == 2
    assert main([*command, "--layer", "nix"]) == 2
    problems = capsys.readouterr().err
    for text in ("there is no box number 999", "these weights know no class 'car'", "no layer is called 'nix'"):
        assert text in problems


@pytest.mark.parametrize("method", ["raw", "rollout", "attribution"])
def test_a_restored_pixel_is_explained(method: str, picture: Path, tmp_path: Path) -> None:
    weights = save_tiny(tmp_path / "weights")
    command = ["explain", "restore", str(picture), "--weights", str(weights), "--method", method]
    assert main([*command, "--query", "63,0", "--window", "23", "-o", str(tmp_path / "out")]) == 0
    names = names_in(tmp_path / "out")
    assert names[0] == "01-effective-receptive-field-input-gradient.png"
    assert len(names) == 6  # all, encoder, middle, decoder


def test_an_enlarged_pixel_is_explained_and_a_bad_one_refused(
    picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    weights = save_tiny(tmp_path / "weights", "sr2", scale=2)
    command = ["explain", "restore", str(picture), "--weights", str(weights), "-o", str(tmp_path / "out")]
    assert main([*command, "--query", "3,40", "--window", "12"]) == 0
    assert main([*command, "--query", "64,0"]) == 2
    assert "lies outside of the picture of 64 x 48 pixels" in capsys.readouterr().err


def test_a_generated_patch_is_explained(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = small_dim(sample_size=16, mixer="ssd")
    names = {0: "a", 1: "b", 2: "c"}
    DiMPipeline(model, Objective("flow").scheduler(None), id2label=names).save_pretrained(tmp_path / "weights")
    command = ["explain", "generate", str(tmp_path / "weights"), "--query", "5,9", "--steps", "3", "--shown", "2"]
    assert main([*command, "--name", "b", "-o", str(tmp_path / "out")]) == 0
    assert names_in(tmp_path / "out") == [
        "01-step-1-of-3-attribution-all-layers.png",
        "02-step-3-of-3-attribution-all-layers.png",
        "index.html",
    ]
    assert main([*command, "--name", "z"]) == 2
    assert main([*command, "--shown", "4"]) == 2
    assert main([*command, "--frame", "1"]) == 2
    problems = capsys.readouterr().err
    for text in ("no class 'z'", "shown must be 1 to the number of steps (3), got 4", "frame must be 0 to 0, got 1"):
        assert text in problems


@pytest.mark.parametrize("layout", ["st", "j"])
def test_a_patch_of_a_video_is_explained(layout: str, tmp_path: Path) -> None:
    model = small_dim(sample_size=8, sample_frames=5, layout=layout, depth=2, conditioning="token", num_classes=None)
    VideoDiMPipeline(model, Objective("flow").scheduler(None)).save_pretrained(tmp_path / "weights")
    command = ["explain", "generate", str(tmp_path / "weights"), "--query", "5,1", "--frame", "2", "--steps", "2"]
    assert main([*command, "--shown", "1", "--method", "rollout", "-o", str(tmp_path / "out")]) == 0
    names = names_in(tmp_path / "out")
    assert "01-step-1-of-2-rollout-all-layers-frame-" in names[0]
    assert sum("frame-2.png" in name for name in names) == 1
    assert ("04-step-1-of-2-frames-by-frames.png" in names) == (layout == "st")


@pytest.mark.parametrize("conditioning", ["adaln_zero", "token"])
def test_layers_that_read_columns_tell_places_row_by_row(conditioning: str) -> None:
    model = small_dim(layout="c", depth=1, mixer="ssd", conditioning=conditioning)
    front = 0 if model.token_positions is None else len(model.token_positions)
    places = [*range(front), *(front + 4 * row + column for column in range(4) for row in range(3))]  # as they are read
    with record(model) as recording:
        model(torch.randn(1, 3, 6, 8), 500.0, torch.tensor([1]))
    read = front + 5
    before = hidden_attention(recording, query=lambda _: [read])[0].values
    in_order(recording, model, 1, (3, 4))
    after = hidden_attention(recording, query=lambda _: [places[read]])[0].values
    assert torch.equal(after[:, places], before)


@pytest.mark.parametrize("mixer", ["attention", "nc_ssd", "ssd"])
def test_layers_along_time_tell_places_frame_by_frame(mixer: str) -> None:
    model = small_dim(layout="t", depth=1, mixer=mixer, patch=4)
    with record(model) as recording:
        model(torch.randn(1, 3, 5, 8, 12), 500.0, torch.tensor([1]))
    in_order(recording, model, 5, (2, 3))
    seen = hidden_attention(recording, query=lambda _: [2 * 6 + 4])[0].values.view(5, 6)
    assert (seen[:, 4] > 0).all(), "place 4 reads itself in every frame"
    assert seen[:, [0, 1, 2, 3, 5]].max() == 0, "and no other place"


@pytest.mark.parametrize("frame", [0, 2])
def test_a_frame_is_explained_as_a_stream_draws_it(frame: int, tmp_path: Path) -> None:
    model = small_dim(layout="st", depth=2, sample_size=8, sample_frames=5, causal=True, num_classes=None, mixer="ssd")
    pipeline = VideoDiMPipeline(model, Objective("flow").scheduler(None))
    pipeline.save_pretrained(tmp_path / "weights")
    options = GenerateOptions(tmp_path / "weights", output=tmp_path / "out", query="5,1", frame=frame, steps=3, shown=2)
    explainer = Explainer(load_generator(tmp_path / "weights"), options)
    drawn = explainer.sample()
    stream = VideoStream(pipeline, seeds=[options.seed], num_inference_steps=3)
    frames = torch.stack([next(stream) for _ in range(frame + 1)], dim=2)
    assert torch.allclose((drawn / 2 + 0.5).clamp(0, 1), frames, atol=1e-5)
    assert len(explainer.maps) == 2
    assert all(heat.shape[0] == frame + 1 for _, heat in explainer.maps)


class Tiny(nn.Module):
    """A class token in the middle of 16 patches, two scans; (B, 3, 16, 16) -> (B, 2)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.blocks = nn.ModuleList(BidirectionalMamba(8, state_size=3) for _ in range(2))
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = torch.cat([x[:, :8], self.cls_token.expand(len(x), -1, -1), x[:, 8:]], dim=1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x[:, 8])


@pytest.fixture
def tiny_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights called "tiny" that any command finds."""
    torch.manual_seed(0)
    made = Classifier(Tiny(), ["dark", "light"], 16)
    monkeypatch.setattr(classifier_module.Classifier, "load", lambda path, device: made)


@pytest.mark.usefixtures("tiny_classifier")
@pytest.mark.parametrize("method", ["raw", "rollout", "attribution"])
def test_a_class_is_explained(method: str, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["explain", "classify", str(picture), "--weights", "tiny", "--method", method]
    assert main([*command, "--per-direction", "-o", str(tmp_path)]) == 0
    kinds = ["all-layers", "direction-0-forwards", "direction-1-backwards"]
    assert [name[3:-4].split(f"{method}-")[1] for name in names_in(tmp_path)[:-1]] == kinds
    assert main([*command, "--name", "blue"]) == 2
    assert "there is no class 'blue'; these weights know dark, light" in capsys.readouterr().err


def test_the_class_token_is_found_by_what_the_target_reads() -> None:
    net = Tiny()
    with record(net) as recording:
        target = net(torch.randn(2, 3, 16, 16))[:, 0]
    assert classifier_module.class_token(recording, target, 2) == 8
    mean = nn.Sequential(BidirectionalMamba(8, state_size=3), nn.Linear(8, 2))
    with record(mean) as recording:
        target = mean(torch.randn(2, 16, 8)).mean(1)[:, 0]
    assert classifier_module.class_token(recording, target, 2) is None


@pytest.mark.usefixtures("tiny_classifier")
def test_maps_are_tested_over_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, level in (("dark", 40), ("light", 200)):
        for number in range(3):
            save_picture(tmp_path / "val" / name / f"{number}.png", np.full((16, 16, 3), level + number, np.uint8))
    output = tmp_path / "test.json"
    assert main(["explain", "perturb", "tiny", str(tmp_path), "--count", "4", "-o", str(output)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("4 pictures; mean accuracy in %")
    assert [line.split()[0] for line in text.splitlines()[2:5]] == ["raw", "rollout", "attribution"]
    assert '"pictures": 4' in output.read_text()
    assert main(["explain", "perturb", "tiny", str(tmp_path), "--count", "0"]) == 2
    assert main(["explain", "perturb", "tiny", str(tmp_path), "--cells", "17"]) == 2
    assert main(["explain", "perturb", "tiny", str(tmp_path), "--seed", "-1"]) == 2
    problems = capsys.readouterr().err
    assert "count must be 1 or more, got 0" in problems
    assert "seed must be 0 or more, got -1" in problems
    assert "cells must be at most the pictures' 16 pixels, got 17" in problems


@pytest.mark.parametrize("verb", ["detect", "restore", "generate", "classify"])
def test_the_output_is_looked_at_before_the_work(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "file").write_text("mine")
    flags = {"generate": ["--query", "1,1"], "restore": ["--weights", "none", "--query", "1,1"]}
    command = ["explain", verb, "none", *flags.get(verb, ["--weights", "none"])]
    assert main([*command, "-o", str(tmp_path / "file")]) == 2
    assert "cannot write to the output folder" in capsys.readouterr().err
