"""Metrics against scikit-image's, and the table of `vssm restore eval`."""

import csv
import json

import numpy as np
import pytest
import torch
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from restoration.card import WeightsCard
from restoration.degrade import degradation_for, seed_of
from restoration.evaluate import run_eval
from restoration.metrics import Lpips, Measure, luma
from restoration.model import Serpent
from restoration.networks import model_config
from restoration.pairs import run_degrade
from restoration.pretrained import save_weights
from tests.restoration.photographs import NAMES, as_image, photograph, write_set
from vision_ssm.errors import UserError


@pytest.fixture
def pair():
    clean = as_image(photograph(side=64))
    return degradation_for("denoise", {"sigma": 20}).apply(clean, seed=1), clean


@pytest.fixture
def weights(tmp_path):
    """A tiny untrained network, which returns its input."""
    model = Serpent("small", width=8, depths=(1, 1))
    card = WeightsCard(model=model_config(model), task="denoise")
    save_weights(tmp_path / "tiny", model, card)
    return tmp_path / "tiny"


@pytest.mark.parametrize("border", [0, 4])
@pytest.mark.parametrize("channel", ["rgb", "y"])
def test_psnr_and_ssim_are_scikit_images(pair, channel, border):
    got = Measure(channel, border)(*pair)
    restored, clean = (x.clamp(0, 1).permute(1, 2, 0).double().numpy() for x in pair)
    if channel == "y":
        restored, clean = (rgb2ycbcr(x)[..., :1] / 255 for x in (restored, clean))
    restored, clean = (x[border : 64 - border, border : 64 - border] for x in (restored, clean))
    assert got["psnr"] == pytest.approx(peak_signal_noise_ratio(clean, restored, data_range=1), abs=1e-3)
    ssim = structural_similarity(
        clean, restored, data_range=1, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert got["ssim"] == pytest.approx(ssim, abs=1e-4)


def test_metrics_at_their_limits(pair):
    _, clean = pair
    assert Measure()(clean, clean) == {"psnr": 100.0, "ssim": pytest.approx(1)}
    assert "ssim" not in Measure()(clean[:, :10], clean[:, :10])
    white = luma(torch.ones(1, 3, 1, 1)).item() * 255
    assert white == pytest.approx(235, abs=1e-3)
    with pytest.raises(UserError, match="64x64 pixels large and the clean image 64x63"):
        Measure()(clean, clean[:, 1:])
    with pytest.raises(UserError, match="nothing is left"):
        Measure(border=32)(clean, clean)
    with pytest.raises(UserError, match="rgb or y"):
        Measure("grey")


def test_lpips_reads_its_trunk_from_a_file(tmp_path, pair):
    from torchvision.models import alexnet

    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), tmp_path / "alexnet.pth")
    measure = Lpips(tmp_path / "alexnet.pth")
    restored, clean = pair
    assert measure(clean, clean) == 0
    assert measure(restored, clean) > measure(0.5 * (restored + clean), clean) > 0
    assert measure(restored[:, :31, :31], clean[:, :31, :31]) > 0
    assert measure(restored[:, :30], clean[:, :30]) is None
    again = Lpips(tmp_path / "alexnet.pth")
    assert again(restored, clean) == measure(restored, clean), "not the trunk of the file"
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth is not torchvision's AlexNet"):
        Lpips(tmp_path / "other.pth")
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(UserError, match="no weights found"):
        Lpips(tmp_path / "list.pth")
    with pytest.raises(UserError, match=r"none\.pth: no such file"):
        Lpips(tmp_path / "none.pth")


def test_table_and_files(tmp_path, weights, capsys):
    data, output = write_set(tmp_path / "data"), tmp_path / "out"
    assert run_eval(data, task="denoise", weights=[weights], methods=["tv"], device="cpu", output=output) == 0
    printed = capsys.readouterr().out
    assert "4 pictures scored, 0 failed" in printed
    assert [line.split()[:3] for line in printed.splitlines() if line.startswith("sigma 25")] == [
        ["sigma", "25", name] for name in ("input", "tv", "tiny")
    ]
    rows = list(csv.DictReader((output / "scores.csv").open()))
    assert len(rows) == 4 * 3 * 3
    by = {(row["name"], row["level"], row["method"]): float(row["psnr"]) for row in rows}
    for name in NAMES:
        clean = as_image(photograph(name, 48))
        noisy = degradation_for("denoise", {"sigma": 25}).apply(clean, seed=seed_of(name))
        want = -10 * np.log10(((noisy.clamp(0, 1) - clean) ** 2).mean().item())
        assert by[name, "sigma 25", "input"] == pytest.approx(want, abs=1e-3)
        assert by[name, "sigma 25", "tiny"] == pytest.approx(want, abs=1e-3), "an untrained network is the identity"
        assert by[name, "sigma 25", "tv"] > want + 2
    facts = json.loads((output / "scores.json").read_text())
    assert (facts["channel"], facts["border"], facts["task"]) == ("rgb", 0, "denoise")
    mean = next(row for row in facts["means"] if (row["level"], row["method"]) == ("sigma 25", "tv"))
    assert mean["psnr"] == pytest.approx(np.mean([by[name, "sigma 25", "tv"] for name in NAMES]))
    assert mean["pictures"] == 4


def test_enlarging_is_scored_on_y_inside_of_the_border(tmp_path):
    data, output = write_set(tmp_path / "data", 50), tmp_path / "out"
    run_eval(data, task="sr4", methods=["bicubic"], output=output)
    facts = json.loads((output / "scores.json").read_text())
    assert (facts["channel"], facts["border"]) == ("y", 4)
    scores = {row["method"]: row["psnr"] for row in facts["means"]}
    assert scores["bicubic"] == scores["input"]


def test_pairs_give_what_degrading_on_the_fly_gives(tmp_path, capsys):
    data = write_set(tmp_path / "data")
    run_degrade(data, tmp_path / "pairs", task="sr2")
    results = []
    for source in (data, tmp_path / "pairs"):
        run_eval(source, task="sr2", methods=["lanczos"], output=tmp_path / "out")
        results.append([row["psnr"] for row in json.loads((tmp_path / "out" / "scores.json").read_text())["means"]])
    assert results[0] == pytest.approx(results[1], abs=1e-4)


def test_a_bad_picture_is_named_and_the_others_are_scored(tmp_path, capsys):
    data = write_set(tmp_path / "data")
    (data / "bad.png").write_bytes(b"\x89PNG nothing")
    assert run_eval(data, task="jpeg", degradation={"quality": 20}, output=tmp_path / "out") == 1
    output = capsys.readouterr()
    assert "bad.png" in output.err
    assert "4 pictures scored, 1 failed" in output.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "deblur", "weights": ["tiny"]}, "denoise"),
        ({"task": "denoise", "methods": ["wiener"]}, "wiener is for deblur"),
        ({"task": "denoise", "device": "gpu7", "weights": ["tiny"]}, "cannot be used"),
        ({"task": "denoise", "weights": ["nowhere"]}, "no weights 'nowhere'"),
        ({"task": "denoise", "limit": 0}, "limit must be 1 or more"),
    ],
)
def test_mistakes(tmp_path, weights, options, words):
    data = write_set(tmp_path / "data", 16)
    if options.get("weights") == ["tiny"]:
        options = options | {"weights": [weights]}
    with pytest.raises(UserError, match=words):
        run_eval(data, output=tmp_path / "out", **options)
