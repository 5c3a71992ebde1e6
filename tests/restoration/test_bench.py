"""What Serpent is compared with: of equal size, of the same shape, and measured."""

import json
from dataclasses import asdict

import pytest
import torch

from restoration import bench
from restoration.bench import build, run_bench
from restoration.bench_networks import ChannelAttention, parameters
from restoration.model import Serpent
from vision_ssm.errors import UserError


@pytest.mark.parametrize("variant", ["fast", "small", "base"])
@pytest.mark.parametrize("network", ["attention", "convolution"])
def test_equal_parameters(network, variant):
    with torch.device("meta"):
        ratio = parameters(build(network, variant)) / parameters(Serpent(variant))
    assert 0.92 < ratio < 1.08


@pytest.mark.parametrize("network", ["attention", "convolution"])
def test_they_restore_any_size(network):
    model = build(network, "fast").eval()
    image = torch.rand(1, 3, 33, 18)
    with torch.inference_mode():
        assert torch.equal(model(image), image), "untrained, as Serpent, it is the identity"
        torch.nn.init.normal_(model.head.out.weight, std=0.1)
        assert not torch.equal(model(image), image)


def test_channel_attention_by_hand():
    torch.manual_seed(0)
    attention = ChannelAttention(6)
    x = torch.rand(2, 6, 5, 4)
    q, k, v = (part.flatten(2) for part in attention.local(attention.qkv(x)).chunk(3, dim=1))
    q, k = (part / part.norm(dim=-1, keepdim=True) for part in (q, k))
    weights = torch.einsum("bil,bjl->bij", q, k).softmax(-1)
    want = attention.out(torch.einsum("bij,bjl->bil", weights, v).reshape(2, 6, 5, 4))
    assert torch.allclose(attention(x), want, atol=1e-6)


@pytest.fixture
def quick(monkeypatch):
    """Few repetitions, in this process: starting others takes most of the time."""
    monkeypatch.setattr(bench, "_SECONDS", 0.0)
    monkeypatch.setattr(bench, "_measure_alone", bench.measure)


@pytest.mark.parametrize("train", [False, True])
def test_a_row(quick, capsys, train):
    case = bench.Case("serpent", "fast", 16, 2, "cpu", "bf16", train)
    bench.main([json.dumps(asdict(case))])
    row = json.loads(capsys.readouterr().out)
    assert row["parameters"] == parameters(Serpent("fast"))
    assert 0 < row["quartiles"][0] <= row["median"] <= row["quartiles"][1]
    assert row["runs"] == 3
    assert row["memory"] > 1e8


def test_table_and_plot(quick, tmp_path, capsys):
    assert run_bench(variant="fast", resolutions=[16], device="cpu", output=tmp_path) == 0
    facts = json.loads((tmp_path / "bench.json").read_text())
    assert [row["network"] for row in facts["rows"]] == ["serpent", "attention", "convolution"]
    assert all(row["median"] > 0 and row["macs"] > 0 and row["problem"] is None for row in facts["rows"])
    assert facts["rows"][0]["scan_flops"] > 0
    assert (tmp_path / "bench.png").stat().st_size > 5000
    assert "GMAC" in capsys.readouterr().out


def test_mistakes():
    with pytest.raises(UserError, match="variant must be one of"):
        run_bench(variant="huge")
    with pytest.raises(UserError, match="resolutions 1 or more"):
        run_bench(resolutions=[0])
