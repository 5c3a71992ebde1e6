"""The benchmark: what it measures, what it prints and writes, what a row that fails costs."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import kernels
from detection import bench
from detection.bench import ConvolutionalDetector, Task, measure, measure_alone, run_bench
from detection.head import decode
from detection.model import MambaYOLO
from detection.summary import summarize
from vision_ssm.errors import UserError
from vision_ssm.ss2d import SS2D

TASK = Task("mamba", "t", 3, None, 64, 1, "cpu", "fp32", None)


@pytest.fixture(autouse=True)
def _short(monkeypatch):
    monkeypatch.setattr(bench, "_RUNS", 3)


def test_a_row_holds_the_models_own_numbers():
    row = measure(TASK)
    model = MambaYOLO("t", 3)
    assert row.parameters == sum(p.numel() for p in model.parameters())
    assert row.flops == summarize(model, 64).flops
    assert row.runs == 3
    assert row.quartiles[0] <= row.median <= row.quartiles[1]
    assert row.problem is None


@pytest.mark.parametrize("size", ["t", "b", "l"])
def test_the_convolutional_detector_has_about_as_many_parameters(size):
    with torch.device("meta"):
        ours, theirs = MambaYOLO(size), ConvolutionalDetector(size)
    ratio = sum(p.numel() for p in theirs.parameters()) / sum(p.numel() for p in ours.parameters())
    assert 0.9 < ratio < 1.1


def test_the_convolutional_detector_gives_the_same_anchors():
    images = torch.zeros(1, 3, 64, 96)
    with torch.no_grad():
        ours, theirs = MambaYOLO("t", 3).eval()(images), ConvolutionalDetector("t", 3).eval()(images)
    assert [tuple(level.shape) for level in theirs] == [tuple(level.shape) for level in ours]
    assert decode(theirs).shape == (1, 7, 8 * 12 + 4 * 6 + 2 * 3)


def test_flops_of_the_convolutional_detector_grow_with_the_area():
    small = measure(replace(TASK, model="convolutional"))
    large = measure(replace(TASK, model="convolutional", resolution=128))
    assert small.flops > 0
    assert large.flops == pytest.approx(4 * small.flops, rel=0.01)


def test_a_training_step_is_measured():
    trained, run = measure(replace(TASK, train=True, batch_size=2)), measure(replace(TASK, batch_size=2))
    assert trained.flops == run.flops
    assert trained.median > run.median


def test_the_scan_asked_for_runs():
    slow, fast = measure(replace(TASK, scan="torch", resolution=128)), measure(replace(TASK, resolution=128))
    assert slow.scan == "torch"
    assert fast.scan == kernels.choose_backend("auto", torch.device("cpu"), torch.float32)
    assert slow.scan == fast.scan or slow.median > fast.median
    model, _ = bench._build(replace(TASK, scan="torch"))
    assert {m.backend for m in model.modules() if isinstance(m, SS2D)} == {"torch"}


def test_a_compiled_network_is_measured(monkeypatch):
    compiled, compile_it = [], torch.compile

    def traced(model):  # the compiler proper takes half a minute
        compiled.append(model)
        return compile_it(model, backend="eager")

    monkeypatch.setattr(torch, "compile", traced)
    row = measure(replace(TASK, model="convolutional", mode="compiled"))
    assert [type(model) for model in compiled] == [ConvolutionalDetector]
    assert row.mode == "compiled"
    assert row.scan is None
    assert row.first > row.median > 0


@pytest.mark.gpu
@pytest.mark.parametrize("scan", ["triton", "torch"])
def test_a_graph_replays_the_network(scan):
    row = measure(replace(TASK, device="cuda", precision="bf16", mode="graph", scan=scan))
    assert row.median > 0
    assert (row.scan_share is None) == (scan == "torch")
    assert row.scan_share is None or 0 < row.scan_share < 1


@pytest.mark.gpu
def test_a_capture_that_fails_says_so():
    """In a process of its own: a capture that failed leaves torch's random numbers on the GPU unusable."""
    code = "import torch; from detection import bench; here = torch.ones(1, device='cuda'); bench._captured(here.item)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "RuntimeError: the CUDA graph could not be captured" in ended.stderr


def test_shipped_weights_are_named(monkeypatch, capsys):
    monkeypatch.setattr(bench, "measure_alone", measure)
    assert run_bench(weights="mamba_yolo_t_trees", resolutions=[64], device="cpu") == 0
    assert "Mamba-YOLO-T" in capsys.readouterr().out


def test_bfloat16_is_measured():
    assert measure(replace(TASK, precision="bf16")).median > 0


def test_table_json_and_plot(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "measure_alone", measure)
    options = {"scan": ["auto", "torch"], "device": "cpu", "output": tmp_path}
    assert run_bench(resolutions=[32], batch_size=[1, 2], **options) == 0
    printed = capsys.readouterr().out
    assert "Mamba-YOLO-T" in printed
    assert "resnet10t" in printed
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    auto = kernels.choose_backend("auto", torch.device("cpu"), torch.float32)
    assert [(row["batch_size"], row["model"].split()[0], row["scan"]) for row in rows] == [
        (batch, *model)
        for batch in (1, 2)
        for model in (("Mamba-YOLO-T", auto), ("Mamba-YOLO-T", "torch"), ("convolutional", None))
    ]
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_of_its_own_and_its_memory():
    row = measure_alone(replace(TASK, resolution=32))
    assert row.problem is None
    assert row.memory is None or 50_000_000 < row.memory < 4_000_000_000


def test_a_row_that_cannot_be_measured_is_told(tmp_path):
    row = measure_alone(replace(TASK, weights=str(tmp_path / "nothing")))
    assert row.problem is not None
    assert "nothing" in row.problem


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resolutions": [100]}, "multiples of 32"),
        ({"size": "x"}, "sizes t, b, l"),
        ({"batch_size": [1, 0]}, "at least 1"),
        ({"batch_size": []}, "at least 1"),
        ({"threads": 0}, "at least 1"),
        ({"modes": ["fast"]}, "some of eager, compiled, graph, compiled_graph; got fast"),
        ({"modes": ["eager", "graph"], "device": "cpu"}, "needs a GPU, this runs on cpu"),
        ({"modes": ["graph"], "train": True, "device": "cpu"}, "captured for inference"),
        ({"scan": ["triton"], "device": "cpu"}, "scan 'triton' cannot run here: it runs on a GPU"),
        ({"scan": ["quick"], "device": "cpu"}, "scan 'quick' is unknown"),
    ],
)
def test_bad_arguments(options, said):
    with pytest.raises(UserError, match=said):
        run_bench(**options)
