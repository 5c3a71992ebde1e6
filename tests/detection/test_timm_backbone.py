"""Networks of timm, and students of attention among them, as backbones of the detector."""

from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import vision_ssm.distill.student  # noqa: F401  (timm knows the student by it)
from detection.config import BackboneConfig
from detection.model import MambaYOLO
from detection.predict import Detector
from detection.summary import summarize
from detection.timm_backbone import TimmBackbone
from tests.detection.drawn_sets import voc_tree
from vision_ssm.checkpoint import load_checkpoint, save_checkpoint
from vision_ssm.cli import main
from vision_ssm.errors import UserError

STUDENT = {"base": "vit_tiny_patch16_224", "mixer": "ssd", "depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 32}
NETWORKS = {
    "maps of several strides": {"name": "resnet10t"},
    "our maps": {"name": "vssm_vmamba_tiny", "options": {"depths": (1, 1, 1, 1), "embed_dim": 16}},
    "one stride, up and down": {"name": "vit_ssm", "options": STUDENT},
    "one stride, down": {"name": "vit_ssm", "options": STUDENT | {"patch_size": 8}},
    "one stride, up": {"name": "vit_ssm", "options": STUDENT | {"patch_size": 32, "img_size": 64}},
}


@pytest.mark.parametrize("given", NETWORKS.values(), ids=NETWORKS)
def test_three_maps_that_learn(given):
    torch.manual_seed(0)
    backbone = TimmBackbone(**given, widths=(8, 16, 32))
    maps = backbone(torch.rand(2, 3, 64, 96))
    assert [tuple(one.shape) for one in maps] == [(2, 8, 8, 12), (2, 16, 4, 6), (2, 32, 2, 3)]
    sum(one.square().mean() for one in maps).backward()
    assert all(p.grad is not None for p in [*backbone.project.parameters(), *backbone.pyramid.parameters()])
    first = next(m for m in backbone.network.modules() if isinstance(m, nn.Conv2d))
    assert first.weight.grad is not None
    assert first.weight.grad.abs().sum() > 0


def test_a_detector_is_rebuilt_from_its_config():
    model = MambaYOLO("t", 3, stage_repeats=(1, 1, 1, 1), backbone=NETWORKS["one stride, down"]).eval()
    again = MambaYOLO(**model.config).eval()
    again.load_state_dict(model.state_dict())
    picture = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(model(picture), again(picture), strict=True))
    parts = {part.name: part for part in summarize(model, 64).parts}
    assert parts["backbone"].flops > 0
    assert sum(part.parameters for part in parts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"name": "vit_tny_patch16_224"}, "timm has no network 'vit_tny_patch16_224'.*vit_tiny_patch16_224"),
        ({"name": "swin_tiny_patch4_window7_224"}, "takes no pictures of any size: .*224"),
        (
            {"name": "vit_ssm", "options": STUDENT | {"patch_size": 14, "img_size": 56}},
            "strides 14; a detector needs 8",
        ),
        ({"name": "resnet10t", "options": {"nix": 1}}, "cannot build resnet10t"),
        ({"name": "resnet10t", "statistics": "own"}, "statistics must be plain or imagenet, got 'own'"),
    ],
    ids=["unknown", "one size", "stride", "options", "statistics"],
)
def test_what_cannot_be_a_backbone_is_refused(given, said):
    with pytest.raises(UserError, match=said):
        TimmBackbone(**given, widths=(8, 16, 32))


def test_bad_settings():
    with pytest.raises(UserError, match="not both"):
        BackboneConfig(weights="a", name="resnet10t")
    for alone in ({"options": {"depth": 2}}, {"weights": "a", "options": {"depth": 2}}, {"statistics": "imagenet"}):
        with pytest.raises(UserError, match="options and statistics belong to a name"):
            BackboneConfig(**alone)


def test_a_distilled_student_starts_a_detector_that_goes_on_and_predicts(tmp_path: Path, capsys):
    torch.manual_seed(0)
    student = timm.create_model("vit_ssm", num_classes=2, **STUDENT)
    told = {"task": "classify", "network": {"name": "vit_ssm", "options": STUDENT}, "statistics": "imagenet"}
    save_checkpoint(tmp_path / "student", student.state_dict(), told | {"classes": ["a", "b"], "side": 32})
    boxes = [("cat", 5, 5, 40, 40)]
    data = voc_tree(tmp_path / "data", {"train": {"a": boxes, "b": boxes}, "val": {"c": boxes}})
    train = [
        "detect", "train", f"--data.path={data}", "--train.device=cpu", "--train.workers=0", "--train.batch_size=2",
        "--data.image_size=64", "--train.epochs=1", f"--train.run_dir={tmp_path / 'run'}", "--freeze=none",
        "--model.stage_repeats=[1,1,1,1]",
    ]  # fmt: skip
    assert main([*train, f"--model.backbone.weights={tmp_path / 'student'}"]) == 0
    assert "backbone from" in capsys.readouterr().out
    weights, config = load_checkpoint(tmp_path / "run" / "last")
    assert config["model"]["backbone"] == {"name": "vit_ssm", "options": STUDENT, "statistics": "imagenet"}
    name = "blocks.0.mlp.fc1.weight"
    moved = (weights[f"backbone.network.{name}"] - student.state_dict()[name]).abs().mean()
    assert moved < 1e-3 < student.state_dict()[name].abs().mean(), "the student's weights were not taken"
    assert main(["detect", "train", f"--resume={tmp_path / 'run'}"]) == 2  # finished; its settings were read again
    assert "is finished" in capsys.readouterr().err
    (found,) = Detector.from_pretrained(tmp_path / "run" / "last").predict(str(data / "JPEGImages" / "c.jpg"))
    assert found.boxes.shape[-1] == 4
    assert main([*train, f"--model.backbone.weights={tmp_path / 'run' / 'last'}", "--train.run_dir=x"]) == 2
    assert "is no classifier" in capsys.readouterr().err
