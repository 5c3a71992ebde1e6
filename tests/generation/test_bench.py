"""The benchmark of layers: the attention beside them, what is counted and written, what a failure costs."""

import json
from dataclasses import replace

import pytest
import torch

from generation import bench
from generation.bench import ATTENTION, Attention, crossing, kept_bytes, run_bench
from kernels.testing import assert_close
from vision_ssm.cli import main
from vision_ssm.errors import UserError

SMALL = bench.Sizes((8, 16), (2, 3), 2, (2, 5), 2, 64)


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench, "_CPU", SMALL)


@pytest.mark.parametrize("axis", [1, 2])
def test_attention_is_softmax_along_the_axis(axis):
    layer = Attention(128)
    x = torch.randn(2, 3, 5, 128)
    q, k, v = layer.to_qkv(x).movedim(axis, -2).unflatten(-1, (3, 2, 64)).transpose(-2, -4).unbind(-3)
    y = (q @ k.transpose(-1, -2) / 8).softmax(-1) @ v  # (2, rest, 2 heads, length, 64)
    assert_close("y", layer(x, axis), layer.to_out(y.transpose(-2, -3).flatten(-2)).movedim(-2, axis), 1e-5)


def test_attention_over_a_cache_is_that_of_the_last_frame():
    layer, x = Attention(64), torch.randn(1, 7, 3, 64)
    q, k, v = layer.split(x, 1)
    assert_close("last frame", layer.attend(q[..., -1:, :], k, v, 1), layer(x, 1)[:, -1:], 1e-5)


def test_kept_bytes_counts_storages_once_and_no_leaves():
    x, w = torch.randn(50, 3, requires_grad=True), torch.randn(3, requires_grad=True)
    assert kept_bytes(lambda: (x * w).exp(), [x, w]) == 50 * 3 * 4  # the product keeps leaves, exp its result

    def twice():
        y = (x * w).exp()
        return y.t() * y

    x = torch.randn(3, 3, requires_grad=True)
    assert kept_bytes(twice, [x, w]) == 3 * 3 * 4


def test_crossing():
    theirs = {length: length**2 / 1000 for length in (100, 1000, 10_000, 100_000)}
    assert crossing({length: float(length) for length in theirs}, theirs) == pytest.approx(1000)
    assert crossing({100: 20, 1000: 2000, 10_000: 50_000}, theirs) == pytest.approx(1000 * 10**0.5)
    assert crossing({100: 1.0, 1000: 5.0}, theirs) == 100
    assert crossing({100: 1.0, 1000: 5000.0, 50: 1.0}, theirs) is None
    assert crossing({}, theirs) is None


def test_table_json_and_plot(small, tmp_path, capsys):
    options = ["--device=cpu", "--width=64", "--repeats=1", "--studies", "tokens", "temporal"]
    assert main(["generate", "bench", *options, f"--output={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_text())
    layers = {study: {row["layer"] for row in found["rows"] if row["study"] == study} for study in _names(found)}
    assert layers["tokens"] == {ATTENTION, "s6 mixer, both ways", "ssd mixer, both ways"}
    kinds = {
        f"{kind}, {how}" for kind in ("s6 mixer", "ssd mixer", "s6 layer", "ssd layer", "s4d layer") for how in _WAYS
    }
    assert layers["temporal"] == {ATTENTION} | kinds
    assert layers["one streamed frame"] == {ATTENTION, "s6 mixer, causal", "ssd mixer, causal"}
    assert [row["length"] for row in found["rows"][:4]] == [8, 16, 8, 16]
    for row in found["rows"]:
        assert row["problem"] is None
        assert row["forward"]["median"] > 0
        assert (row["both"] is None) == (row["kept_bytes"] is None) == (row["study"] == "one streamed frame")
    assert len(found["crossings"]) == 2 + 10
    written = (tmp_path / "bench.md").read_text()
    assert all(line in printed for line in written.splitlines())
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


_WAYS = ("causal", "both ways")


def _names(found):
    return dict.fromkeys(row["study"] for row in found["rows"])


def test_lengths_asked_for_are_sorted_and_what_would_take_too_long_is_left_out(small, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_LONGEST_MS", 0.0)
    run_bench(studies=["tokens"], width=64, tokens=[9, 3, 9], repeats=1, device="cpu", output=tmp_path)
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert [row["length"] for row in rows] == [3, 9] * 3
    assert all(row["problem"].startswith("left out: would take about") for row in rows[1::2])
    expected = 9 * rows[0]["both"]["median"] / 1e3
    assert f"{expected:.1f} s" in rows[1]["problem"]


@pytest.mark.parametrize(
    ("error", "said", "code"),
    [
        (torch.OutOfMemoryError("no room"), "out of memory", 0),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory", 0),
        (ValueError("broken\nindeed"), "ValueError: broken", 1),
    ],
)
def test_a_layer_that_fails_costs_itself(small, monkeypatch, tmp_path, error, said, code):
    measure = bench._measure

    def failing(row, **options):
        if row.layer == ATTENTION:
            raise error
        return measure(row, **options)

    monkeypatch.setattr(bench, "_measure", failing)
    assert run_bench(studies=["frames"], width=64, repeats=1, device="cpu", output=tmp_path) == code
    found = json.loads((tmp_path / "bench.json").read_text())
    assert list(_names(found)) == ["frames, layout j", "frames, layout sst"]
    assert [row["problem"] for row in found["rows"]] == 2 * ([said] * 2 + [None] * 4)
    assert {crossed["both"] for crossed in found["crossings"]} == {None}


def test_the_time_of_a_forward_pass_stays_where_the_backward_pass_does_not_fit(small, monkeypatch, tmp_path):
    def full(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(bench, "kept_bytes", full)
    assert run_bench(studies=["tokens"], width=64, repeats=1, device="cpu", output=tmp_path) == 0
    for row in json.loads((tmp_path / "bench.json").read_text())["rows"]:
        assert (row["forward"] is None, row["both"], row["problem"]) == (False, None, "out of memory")
    assert (tmp_path / "bench.md").read_text().count(") | out of memory |") == 6


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"studies": []}, "studies must be some of tokens, frames, temporal; got none"),
        ({"studies": ["time"]}, "got time"),
        ({"width": 100}, "multiple of 64"),
        ({"tokens": []}, "tokens must be numbers of 1 or more, got none"),
        ({"frames": [4, 0]}, "frames must be numbers of 1 or more"),
        ({"repeats": 0}, "repeats must be 1 or more"),
        ({"device": "meta"}, "measured on auto, cpu or cuda"),
    ],
)
def test_bad_arguments(options, said, tmp_path):
    with pytest.raises(UserError, match=said):
        run_bench(**{"device": "cpu", "output": tmp_path, **options})


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_GPU", replace(SMALL, frames=(4, 32)))
    assert run_bench(width=64, repeats=2, device="cuda", output=tmp_path) == 0
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    assert all(row["peak_bytes"] > 0 for row in rows if row["both"])
