"""Vim and VMamba: values of published weights, what timm's users do with a backbone, conversion, messages."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import group_parameters
from torch import Tensor, nn

import vision_ssm.backbones as backbones
from tests.vision_ssm.published_backbones import Weights, vim, vim_weights, vmamba, vmamba_weights
from vision_ssm.backbones.convert import from_official, network_of
from vision_ssm.classify.commands import COMMANDS
from vision_ssm.classify.config import NetworkConfig
from vision_ssm.classify.model import Classifier, build_network
from vision_ssm.cli import call
from vision_ssm.errors import UserError
from vision_ssm.flops import count_flops
from vision_ssm.ss2d import SS2D
from vision_ssm.training.optim import parameter_groups
from vision_ssm.viz import save_picture

SMALL = {
    "vssm_vim_tiny": {"embed_dim": 16, "depth": 3, "patch_size": 8, "img_size": 24},
    "vssm_vmamba_tiny": {"embed_dim": 16, "depths": (1, 2, 1)},
}
PUBLISHED = {
    "vssm_vim_tiny": (7, None),
    "vssm_vim_small": (26, None),
    "vssm_vim_base": (98, None),
    "vssm_vmamba_tiny": (30, 4.9),
    "vssm_vmamba_small": (49, None),
    "vssm_vmamba_base": (87, 15.2),
}
"""Millions of parameters; GFLOPs at 224 pixels, a multiply-add counted as one and a scan by 9 per state."""


def small(name: str, **arguments) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **{"num_classes": 5, **SMALL[name], **arguments}).eval()


def loaded(published: Weights) -> tuple[str, nn.Module]:
    weights = from_official(published)
    name, options = network_of(weights)
    model = timm.create_model(name, **options).eval()
    model.load_state_dict(weights)
    return name, model


def picture(*size: int) -> Tensor:
    return torch.rand(3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(
    "dim, depth, patch, grid, stride, states", [(16, 3, 4, 3, 4, 16), (24, 2, 3, 4, 3, 5), (8, 1, 16, 27, 8, 2)]
)
def test_a_published_vim_has_its_values(dim, depth, patch, grid, stride, states) -> None:
    """Odd and even grids; the last is as the finer-grained files, with patches that overlap."""
    published = vim_weights(dim, depth, patch, grid, 5, states)
    _, model = loaded(published)
    side = (grid - 1) * stride + patch
    x = picture(side, side)
    torch.testing.assert_close(model(x[None])[0].double(), vim(published, x, stride), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    "depths, options, size",
    [
        ((1, 2, 1), {}, (33, 22)),
        ((2, 1), {"as_convolutions": True}, (16, 24)),
        ((1, 1), {"ratio": 2, "states": 3}, (9, 13)),
    ],
)
def test_a_published_vmamba_has_its_values(depths, options, size) -> None:
    published = vmamba_weights(16, depths, 5, **options)
    _, model = loaded(published)
    x = picture(*size)
    torch.testing.assert_close(model(x[None])[0].double(), vmamba(published, x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_work_are_those_published(name) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    millions, giga = PUBLISHED[name]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
    assert network_of(model.state_dict())[0] == name
    if giga is not None:
        work = count_flops(model, 224, 224).get_flop_counts()["Global"]
        places = sum(4 * m.in_proj.out_channels * (56 >> i) ** 2 for i, m in stages_of(model))
        scans = work.pop(torch.ops.vision_ssm.selective_scan)
        assert (sum(work.values()) + scans + 9 * places) / 2e9 == pytest.approx(giga, rel=0.01)


def stages_of(model: nn.Module) -> list[tuple[int, SS2D]]:
    """Every scan with the number of its stage."""
    return [(i, m) for i, stage in enumerate(model.stages) for m in stage.modules() if isinstance(m, SS2D)]


@torch.no_grad()
@pytest.mark.parametrize("size", [(24, 24), (37, 50), (5, 9)], ids=str)
@pytest.mark.parametrize("name", SMALL)
def test_features_of_any_size(name, size) -> None:
    model = timm.create_model(name, features_only=True, **SMALL[name]).eval()
    maps = model(torch.rand(2, 3, *size))
    assert len(maps) == 3
    for map_, channels, step in zip(maps, model.feature_info.channels(), model.feature_info.reduction(), strict=True):
        assert map_.shape == (2, channels, *(math.ceil(side / step) for side in size))
    assert model.feature_info.reduction() == ([8, 8, 8] if "vim" in name else [4, 8, 16])
    chosen = timm.create_model(name, features_only=True, out_indices=(1,), **SMALL[name])
    assert [tuple(m.shape) for m in chosen(torch.rand(2, 3, *size))] == [tuple(maps[1].shape)]


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_features_are_what_the_classifier_sees(name) -> None:
    x = torch.rand(1, 3, 30, 41)
    last, model = small(name, features_only=True)(x)[-1], small(name, global_pool="avg")
    normed = model.norm(last.permute(0, 2, 3, 1)) if "vim" in name else model.norm(last).permute(0, 2, 3, 1)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(pooled, normed.mean((1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_what_timms_users_do(name) -> None:
    model = small(name, in_chans=4, global_pool="max")
    x = torch.rand(2, 4, 24, 24)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.num_features)
    torch.testing.assert_close(model.get_classifier()(pooled), model(x))
    model.reset_classifier(7, "avg")
    assert model(x).shape == (2, 7)
    assert not torch.equal(model.forward_head(features, pre_logits=True), pooled)
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_head(features, pre_logits=True))
    named = dict(model.named_parameters())
    assert model.no_weight_decay() < named.keys()
    assert any(n.endswith("A_log") for n in model.no_weight_decay())
    decaying = next(group["params"] for group in parameter_groups(model, 0.1) if group["name"] == "decay")
    assert not {id(named[n]) for n in model.no_weight_decay()} & {id(p) for p in decaying}
    for coarse in (False, True):
        assert group_parameters(model, model.group_matcher(coarse)).keys() >= {0, 1, 2, 3}


@pytest.mark.parametrize("name", SMALL)
def test_checkpointing_changes_no_gradient(name) -> None:
    x, gradients = torch.rand(2, 3, 20, 28), []
    for enable in (False, True):
        model = small(name)
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(g is not None for g in gradients[0])
    torch.testing.assert_close(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_half_precision(name) -> None:
    model, x = small(name), torch.rand(2, 3, 24, 24)
    exact = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x)
    halved = model.bfloat16()(x.bfloat16())
    assert mixed.dtype == halved.dtype == torch.bfloat16
    for scores in (mixed, halved):
        torch.testing.assert_close(scores.float(), exact, atol=0.05 * exact.abs().max().item(), rtol=0)


@pytest.mark.parametrize("name", SMALL)
def test_drop_path_grows_with_depth(name) -> None:
    rates = [m.drop_prob for m in small(name, drop_path_rate=0.3).modules() if isinstance(m, DropPath)]
    assert rates == pytest.approx([0.3 * i / (len(rates) - 1) for i in range(len(rates))])


@torch.no_grad()
def test_vims_positions_are_resized() -> None:
    model = backbones.Vim(img_size=(16, 24), patch_size=8, embed_dim=4, depth=1)
    model.pos_embed.copy_(torch.arange(3.0).repeat(2).view(1, 6, 1).expand(-1, -1, 4))  # grows from left to right
    x = torch.zeros(1, 3, 32, 96)
    tokens = model.tokens(x)[0]
    assert tokens.shape == (4 * 12 + 1, 4)
    torch.testing.assert_close(tokens[24], model.cls_token[0, 0])
    positions = (torch.cat((tokens[:24], tokens[25:])) - model.patch_embed.proj.bias).view(4, 12, 4)
    torch.testing.assert_close(positions[0], positions[3])
    assert (positions[:, 1:] - positions[:, :-1] > -0.1).all()
    assert positions[0, 5, 0] == pytest.approx(1 - 1 / 8, abs=0.05)


@pytest.fixture(scope="module")
def published_file(tmp_path_factory) -> Path:
    """A file as VMamba's training writes it, averaged weights beside the others."""
    file = tmp_path_factory.mktemp("published") / "vssm1_tiny.pth"
    weights = vmamba_weights(16, (1, 1), 3)
    torch.save({"model": {n: torch.zeros_like(t) for n, t in weights.items()}, "model_ema": weights, "epoch": 3}, file)
    return file


def test_a_published_file_converts_scores_and_predicts(published_file, tmp_path, capsys) -> None:
    out, images = str(tmp_path / "out"), picture(40, 40).mul(255).byte()
    for label in range(3):
        save_picture(tmp_path / "data" / str(label) / "a.png", images.roll(label, 2).permute(1, 2, 0).numpy())
    assert call("vssm classify convert", COMMANDS["convert"], [str(published_file), out]) == 0
    assert "vssm_vmamba_tiny" in capsys.readouterr().out
    classifier = Classifier.load(out, device="cpu")
    classifier.side = 40
    mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    wanted = vmamba(vmamba_weights(16, (1, 1), 3), (images / 255 - mean) / std).softmax(0)
    torch.testing.assert_close(classifier(images[None])[1][0].double(), wanted, atol=1e-5, rtol=1e-4)
    report = tmp_path / "val.json"
    assert call("vssm classify val", COMMANDS["val"], [out, str(tmp_path / "data"), "-o", str(report)]) == 0
    assert json.loads(report.read_text())["pictures"] == 3
    assert call("vssm classify predict", COMMANDS["predict"], [out, str(tmp_path / "data" / "1")]) == 0
    assert call("vssm classify pack", COMMANDS["pack"], [out, str(tmp_path / "packed")]) == 0
    assert Classifier.load(tmp_path / "packed", device="cpu").statistics == "imagenet"


def test_a_thousand_classes_are_imagenets(tmp_path) -> None:
    torch.save(vim_weights(8, 1, 4, 2, 1000), tmp_path / "vim.pth")
    assert call("vssm classify convert", COMMANDS["convert"], [str(tmp_path / "vim.pth"), str(tmp_path / "out")]) == 0
    classifier = Classifier.load(tmp_path / "out", device="cpu")
    assert (classifier.classes[0], classifier.side) == ("n01440764", 8)
    with pytest.raises(UserError, match="out is not empty"):
        call("vssm classify convert", COMMANDS["convert"], [str(tmp_path / "vim.pth"), str(tmp_path / "out")])


def test_other_weights_are_refused(tmp_path) -> None:
    vim_file, vmamba_file = vim_weights(8, 1, 4, 2, 3), vmamba_weights(16, (1, 1), 3)
    vanilla = {n.replace(".op.", ".self_attention."): t for n, t in vmamba_file.items()}
    gated = vmamba_file | {"layers.0.blocks.0.op.in_proj.weight": torch.zeros(32, 16)}
    for weights, told in (
        (vanilla, "no published Vim or VMamba"),
        (gated, "of another shape: stages.0.blocks.0.ss2d.in_proj.weight"),
        (vmamba_file | {"layers.0.blocks.0.op.conv2d.bias": torch.zeros(16)}, "not in the model: .*conv.bias"),
        ({n: t for n, t in vmamba_file.items() if n != "classifier.head.bias"}, "head.fc.bias"),
        ({n: t for n, t in vim_file.items() if n != "cls_token"}, "without a class token"),
        ({n: t for n, t in vim_file.items() if not n.endswith("D_b")}, "D_b"),
        (vim_file | {"layers.0.mixer.gamma": torch.zeros(8)}, "another kind than Vim's v2: it has gamma"),
        (vim_file | {"pos_embed": torch.zeros(1, 4, 8)}, "pos_embed"),
    ):
        with pytest.raises(UserError, match=told):
            from_official(weights)
    torch.save(vanilla, tmp_path / "vanilla.pth")
    with pytest.raises(UserError, match=r"vanilla\.pth: no published"):
        call("vssm classify convert", COMMANDS["convert"], [str(tmp_path / "vanilla.pth"), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_summary_counts(capsys) -> None:
    assert call("vssm classify summary", COMMANDS["summary"], ["mamba_yolo_t", "--side", "32"]) == 0
    assert "mamba_yolo_t: 3,107,384 parameters; at 32x32" in capsys.readouterr().out
    assert call("vssm classify summary", COMMANDS["summary"], ["resnet10t", "--side", "32"]) == 0
    assert "0.00 of them in scans" in capsys.readouterr().out
    with pytest.raises(UserError, match="32 pixels and more, got 16x16"):
        call("vssm classify summary", COMMANDS["summary"], ["mamba_yolo_t", "--side", "16"])
    with pytest.raises(UserError, match="global_pool must be token"):
        build_network(NetworkConfig("vssm_vim_tiny", {"global_pool": "sum"}), 3)
    with pytest.raises(UserError, match="timm cannot build vssm_vmamba_tiny"):
        build_network(NetworkConfig("vssm_vmamba_tiny", {"global_pool": "sum"}), 3)


@pytest.mark.parametrize("name", SMALL)
def test_a_backbone_is_trained_by_its_name(name, tmp_path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, gray in (("dark", 40), ("light", 200)):
            for i in range(4):
                pixels = (gray + rng.integers(-20, 20, (24, 24, 3))).astype(np.uint8)
                save_picture(tmp_path / split / label / f"{i}.png", pixels)
    flags = {
        "network.name": name, "network.options": json.dumps({**SMALL[name], "drop_path_rate": 0.1}),
        "data.train": tmp_path, "data.side": 24, "data.statistics": "imagenet", "data.color": 0.05,
        "train.run_dir": tmp_path / "run", "train.epochs": 4, "train.batch_size": 4, "train.workers": 0,
        "train.device": "cpu", "train.optim.lr": 0.01, "train.schedule.warmup_epochs": 0,
        "train.ema.decay": 0.5, "train.ema.warmup_steps": 1,
    }  # fmt: skip
    assert call("vssm classify train", COMMANDS["train"], [f"--{flag}={value}" for flag, value in flags.items()]) == 0
    classifier = Classifier.load(tmp_path / "run" / "best", device="cpu")
    assert (classifier.accuracy, classifier.statistics) == (1.0, "imagenet")
