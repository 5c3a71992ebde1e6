"""The detector's backbone for timm's users."""

import numpy as np
import pytest
import timm
import torch
from timm.models import group_parameters

import detection.backbone  # noqa: F401 (registers the networks)
from detection import MambaYOLO
from detection.pretrained import starting_weights
from vision_ssm.checkpoint import load_matching
from vision_ssm.classify.commands import COMMANDS
from vision_ssm.classify.model import Classifier
from vision_ssm.cli import call
from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture


@pytest.fixture(scope="module")
def detector() -> MambaYOLO:
    torch.manual_seed(0)
    return MambaYOLO("t", 3).eval()


@torch.no_grad()
def test_weights_of_a_detector_give_its_maps(detector) -> None:
    model = timm.create_model("mamba_yolo_t", num_classes=5, pretrained=False).eval()
    report = load_matching(model, detector.state_dict())
    assert set(report.not_in_file) == {"head.fc.weight", "head.fc.bias"}
    x = torch.rand(2, 3, 64, 96)
    torch.testing.assert_close(model.forward_features(x), detector.backbone(x)[-1])
    features = timm.create_model("mamba_yolo_t", features_only=True).eval()
    load_matching(features, {f"model.{name}": t for name, t in detector.state_dict().items()})
    maps = features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]
    assert features.feature_info.reduction() == [4, 8, 16, 32]
    for got, wanted in zip(maps[1:], detector.backbone(x), strict=True):
        torch.testing.assert_close(got, wanted)
    some = timm.create_model("mamba_yolo_t", features_only=True, out_indices=(1, 2)).eval()
    some.load_state_dict(features.state_dict())
    torch.testing.assert_close(some(x), maps[1:3])


@torch.no_grad()
def test_what_timms_users_do() -> None:
    model = timm.create_model("mamba_yolo_t", num_classes=5, in_chans=1).eval()
    x = torch.rand(1, 1, 45, 70)
    features = model.forward_features(x)
    torch.testing.assert_close(model.get_classifier()(model.forward_head(features, pre_logits=True)), model(x))
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)
    assert model.no_weight_decay() < dict(model.named_parameters()).keys()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["backbone.stages.0.0.norm1.weight"] < groups["backbone.merges.0.0.weight"]
    assert groups["backbone.merges.0.0.weight"] < groups["backbone.stages.1.0.norm1.weight"]
    with pytest.raises(UserError, match="32 pixels and more, got 31x64"):
        model(torch.rand(1, 1, 31, 64))


def test_checkpointing_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = timm.create_model("mamba_yolo_t", num_classes=2).eval()
    x, gradients = torch.rand(1, 3, 32, 32), []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_a_classifier_is_trained_by_its_name_and_starts_a_detector(tmp_path) -> None:
    detector = MambaYOLO("t", 3)
    for split in ("train", "val"):
        for label, gray in (("dark", 40), ("light", 200)):
            for i in range(2):
                save_picture(tmp_path / split / label / f"{i}.png", np.full((32, 32, 3), gray + i, np.uint8))
    flags = {
        "network.name": "mamba_yolo_t", "data.train": tmp_path, "data.side": 32, "train.run_dir": tmp_path / "run",
        "train.epochs": 1, "train.batch_size": 4, "train.workers": 0, "train.device": "cpu",
    }  # fmt: skip
    assert call("vssm classify train", COMMANDS["train"], [f"--{flag}={value}" for flag, value in flags.items()]) == 0
    assert Classifier.load(tmp_path / "run" / "last", device="cpu").classes == ("dark", "light")
    report = load_matching(detector, starting_weights(tmp_path / "run" / "last"))
    assert {name.split(".")[0] for name in report.taken} == {"backbone"}
    assert {name.split(".")[0] for name in report.not_in_file} == {"neck", "head"}
