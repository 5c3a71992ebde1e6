"""`vssm bench kernels`: floors against numbers worked out by hand, checks that catch wrong kernels, its files."""

import json
import math
import re

import pytest
import torch

import kernels
from vision_ssm import cli
from vision_ssm.bench import catalogue, check
from vision_ssm.bench.accuracy import long_cases
from vision_ssm.bench.check import check_float64_forms, check_workload, forms_agree
from vision_ssm.bench.commands import bench_kernels
from vision_ssm.bench.floors import H100, convolution_cost, scan_cost, ssd_cost
from vision_ssm.bench.measure import Stopwatch
from vision_ssm.bench.report import COLUMNS
from vision_ssm.bench.workloads import SSD, Convolution, Core2D, Scan1D, Scan2D, Temporal

CPU = torch.device("cpu")
TINY = {
    "1d": Scan1D(batch=2, length=24, channels=6, states=3),
    "2d": Scan2D(batch=2, height=5, width=6, channels=6, states=3),
    "2d-core": Core2D(batch=1, height=4, width=6, channels=4, states=2),
    "temporal": Temporal(batch=2, frames=4, height=2, width=3, channels=4, states=3, rank=2),
    "ssd": SSD(batch=2, length=20, heads=3, head_dim=4, states=5, chunk=8),
    "conv": Convolution(batch=2, length=9, channels=5),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Tiny workloads and short sequences; the command is wired."""
    monkeypatch.setattr(catalogue, "CPU", TINY)
    monkeypatch.setattr("vision_ssm.bench.session._LENGTHS", {"cpu": (16, 64)})
    monkeypatch.setattr(
        "vision_ssm.bench.session.long_cases", lambda kinds, device, quick: long_cases(kinds, device, quick=quick)[:1]
    )


# State-steps in millions, exp2 and slot floor forward, unavoidable MB, slot floor backward (ms, one H100).
SEQUENCES = [  # batch, length, channels, states, bytes of a number
    ((8, 4096, 768, 16, 2), (403, 0.122, 0.109, 153, 0.272)),
    ((8, 4096, 768, 16, 4), (403, 0.122, 0.109, 306, 0.272)),
    ((1, 16384, 1536, 16, 2), (403, 0.122, 0.109, 152, 0.272)),
    ((64, 196, 384, 16, 2), (77, 0.023, 0.021, 30, 0.052)),
    ((8, 4096, 768, 1, 2), (25, 0.020, 0.007, 151, 0.017)),
]


@pytest.mark.parametrize(("sizes", "by_hand"), SEQUENCES, ids=str)
def test_floors_of_sequences_are_those_worked_out_by_hand(sizes, by_hand):
    batch, length, channels, states, size = sizes
    workload = Scan1D(batch=batch, length=length, channels=channels, states=states)
    cost, (steps, exp2, slots, megabytes, backward) = workload.cost(size), by_hand
    assert round(workload.state_steps / 1e6) == steps
    assert 1e3 * cost.forward.limits(H100)["exp2"] == pytest.approx(exp2, abs=6e-4)
    assert 1e3 * cost.forward.limits(H100)["slots"] == pytest.approx(slots, abs=6e-4)
    assert cost.forward.bytes / 1e6 == pytest.approx(megabytes, abs=0.6)
    assert 1e3 * cost.backward.limits(H100)["slots"] == pytest.approx(backward, abs=6e-4)


def test_the_floor_is_the_slowest_resource():
    forward, both = Scan1D(batch=8, length=4096, channels=768).cost(2).floors(H100)
    assert forward == pytest.approx(0.122e-3, rel=0.01)
    assert both == pytest.approx((0.122 + 0.272) * 1e-3, rel=0.01)
    forward, both = Scan1D(batch=8, length=4096, channels=768, states=1).cost(2).floors(H100)
    assert forward == pytest.approx(151.13e6 / 3e12, rel=1e-3)  # bytes
    assert both == pytest.approx(
        (151.13e6 + 251.93e6) / 3e12, rel=1e-3
    )  # 2 x (x, delta, B, C) and the output's gradient


@pytest.mark.parametrize(
    ("pixels", "channels", "states", "steps", "exp2", "megabytes"),
    [
        (16 * 160 * 160, 64, 16, 1678, 0.509, 472), (16 * 80 * 80, 128, 16, 839, 0.255, 210),
        (32 * 56 * 56, 192, 1, 77, 0.062, 271), (512 * 512, 64, 16, 1074, 0.326, 302),
    ],
)  # fmt: skip
def test_floors_of_images_with_a_float32_output(pixels, channels, states, steps, exp2, megabytes):
    """The table worked out by hand has bfloat16 inputs, delta given and a float32 output."""
    elements = pixels * channels
    cost = scan_cost(
        elements=4 * elements, states=states, rank=0, softplus=True,
        read=2 * (elements + 4 * (elements + 2 * pixels * states)), written=4 * elements,
    )  # fmt: skip
    assert round(4 * elements * states / 1e6) == steps
    assert 1e3 * cost.forward.limits(H100)["exp2"] == pytest.approx(exp2, abs=1e-3)
    assert cost.forward.bytes / 1e6 == pytest.approx(megabytes, abs=0.6)


def test_the_projection_and_the_rank_are_counted():
    """16 x 160 x 160 x 64, rank 2: x 52.4 MB twice, 4 (2 + 32) numbers a pixel written and read, 52.4 MB result."""
    cost = Scan2D(batch=16, height=160, width=160, channels=64).cost(2).forward
    pixels = 16 * 160 * 160
    assert cost.bytes == 2 * pixels * (3 * 64 + 2 * 4 * 34)
    assert cost.flops == 2 * pixels * 64 * 4 * 34
    assert cost.slots == 8 * 1_677_721_600 + 2 * 4 * pixels * 64


@pytest.mark.parametrize(
    ("states", "chunk", "gigaflop", "exp2_ms"), [(64, 64, 16, 0.007), (64, 256, 26, 0.028), (128, 256, 40, 0.028)]
)
def test_floors_of_ssd(states, chunk, gigaflop, exp2_ms):
    cost = ssd_cost(
        tokens=8 * 4096, heads=24, head_dim=64, groups=1, states=states, chunk=chunk, softplus=False, size=2
    )
    assert cost.forward.flops / 1e9 == pytest.approx(gigaflop, abs=0.6)
    assert 1e3 * cost.forward.limits(H100)["exp2"] == pytest.approx(exp2_ms, abs=1.1e-3)
    assert cost.forward.bytes / 1e6 == pytest.approx({64: 211, 128: 220}[states], abs=0.6)


def test_floor_of_a_convolution_is_bytes():
    cost = convolution_cost(elements=8 * 4096 * 1536, width=4, silu=True, size=2)
    assert cost.forward.floor(H100) == 2 * 2 * 8 * 4096 * 1536 / 3e12
    assert cost.backward.floor(H100) == pytest.approx(1.5 * cost.forward.floor(H100))


def test_costs_agree_with_the_tensors():
    """Bytes read are those of the large inputs that the call really gets."""
    for workload in (TINY["1d"], TINY["2d-core"], TINY["temporal"], TINY["ssd"]):
        t = workload.tensors(torch.float32, CPU)
        large = [v for name, v in t.items() if workload.axes[name][0] is not None]
        assert workload.cost(4).forward.bytes == sum(v.nbytes for v in large) + t["x"].nbytes, workload.kind


def test_float64_forms_agree_and_a_difference_shows():
    found = check_float64_forms(list(TINY.values()))
    assert set(found) == set(TINY)
    assert forms_agree(found)
    assert not forms_agree(found | {"1d": 1e-9})


@pytest.mark.parametrize("workload", TINY.values(), ids=TINY)
def test_every_kind_passes_its_check(workload):
    check = check_workload(workload, torch.float32, CPU, "auto")
    assert check.passed
    leaves = workload.checked(workload.tensors(torch.float32, CPU))
    assert set(check.errors) == {"y", *(f"d{name}" for name in leaves)}


def test_a_sum_of_sequences_that_cancel_may_be_further_off():
    """The gradient of A is a tenth of what either sequence gives: its bound is that of what is added."""
    workload = TINY["ssd"]
    t = {n: v.double() for n, v in workload.tensors(torch.float32, CPU).items()}
    t |= {n: v[:1].expand_as(v) for n, v in t.items() if workload.axes[n][0] is not None}
    grad = torch.randn(1, *t["x"].shape[1:], dtype=torch.float64) * torch.tensor([1, -0.9]).view(2, 1, 1, 1)
    _, cancels = check._float64(workload, t, check._follow(workload, t["x"]), grad)
    assert cancels["dA"] == pytest.approx((1 + 0.9**2) ** 0.5 / 0.1)
    assert cancels["dx"] == cancels["y"] == 1


def test_a_part_can_stand_for_the_whole(monkeypatch):
    """float64 follows some sequences and channels; the gradient of the output is zero elsewhere."""
    monkeypatch.setattr("vision_ssm.bench.check._BUDGET", {"cpu": 300})
    monkeypatch.setattr("vision_ssm.bench.check._CHEAPER", 1)
    for workload in TINY.values():
        check = check_workload(workload, torch.float32, CPU, "auto")
        assert check.passed, workload.kind
        assert check.channels[0] < check.channels[1], workload.kind


@pytest.mark.parametrize("part", ["values", "gradients", "stray gradients", "not finite"])
def test_a_wrong_kernel_makes_the_exit_code_1(monkeypatch, tmp_path, part):
    right = kernels.selective_scan

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y, x):
            return y * 1.0001 if part == "values" else y / (y != y[-1, -1]) if part == "not finite" else y.clone()

        @staticmethod
        def backward(ctx, g):
            if part == "stray gradients":  # in a channel that float64 does not follow
                return g, torch.zeros_like(g).index_fill_(-1, torch.tensor([2]), 1)
            return g * 1.0001 if part == "gradients" else g, None

    def wrong(x, *args, **options):
        y = right(x, *args, **options)
        return y if options["backend"] in ("torch", "reference") else Wrong.apply(y, x)

    if part == "stray gradients":
        monkeypatch.setattr("vision_ssm.bench.check._BUDGET", {"cpu": 300})
    monkeypatch.setattr("vision_ssm.bench.check._CHEAPER", 1)
    monkeypatch.setattr(kernels, "selective_scan", wrong)
    assert bench_kernels(workloads=["1d"], device="cpu", repeats=1, quick=True, output=tmp_path) == 1
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["passed"] is False
    assert "WRONG" in (tmp_path / "results.md").read_text()


def test_table_json_and_plots(tmp_path, capsys):
    code = bench_kernels(
        shape=["1d:B1,L16,D4,N2"], workloads=list(TINY), backends=["torch", "c"] if c_runs() else ["torch"],
        device="cpu", repeats=2, output=tmp_path,
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert code == 0, printed
    found = json.loads((tmp_path / "results.json").read_text())
    assert found["passed"] is True
    assert {row["name"] for row in found["rows"]} == {*TINY, "1d:B1,L16,D4,N2"}
    for row in found["rows"]:
        check_row(row, found["rates"])
    table = [line for line in (tmp_path / "results.md").read_text().splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(found["rows"])
    assert all(line.count("|") == len(COLUMNS) + 1 for line in table)
    assert all(line in printed for line in table)
    assert {p["curve"] for p in found["over_length"]} == {"S6", "S6, four directions", "SSD", "attention"}
    assert {p["length"] for p in found["over_length"]} == {16, 64}
    for name in ("time_over_length.png", "roofline.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def check_row(row: dict, rates: dict) -> None:
    """Figures of one row follow from its times, its shapes and the rates."""
    time, cost = row["forward"]["full"], row["cost"]["forward"]
    assert 0 < time["low"] <= time["median"] <= time["high"]
    assert row["both"]["full"]["median"] > 0
    seconds = time["median"] * 1e-3
    floor = max(cost["bytes"] / rates["copy"], cost["exp2"] / rates["exp2"], cost["flops"] / rates["matmul"])
    assert row["floor_ms"] == pytest.approx(floor * 1e3)
    assert row["part_of_floor"] == pytest.approx(floor / seconds)
    assert row["gigabytes_per_second"] == pytest.approx(cost["bytes"] / seconds / 1e9)
    assert row["state_steps_per_second"] == pytest.approx(row["state_steps"] / seconds)
    assert all(math.isfinite(error) for error in row["check"]["errors"].values())


def c_runs() -> bool:
    return not kernels.backends()["c"]


def test_a_kernel_that_raises_is_told_and_the_others_still_run(monkeypatch, tmp_path, capsys):
    def broken(*args, **options):
        raise RuntimeError("no such kernel image")

    monkeypatch.setattr(kernels, "causal_conv1d", broken)
    assert (
        bench_kernels(workloads=["conv", "1d"], device="cpu", repeats=1, quick=True, check=False, output=tmp_path) == 1
    )
    assert "not measured: RuntimeError: no such kernel image" in capsys.readouterr().out
    problems = [row["problem"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]]
    assert problems == ["RuntimeError: no such kernel image", None]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--workloads 2d-cor", "'2d-cor' is no workload; there are: 1d, .*; did you mean '2d-core'?"),
        ("--shape 2d:B1,H4,D4", "W is missing; 2d takes B, H, W, D, N (default 16), R (default D / 32)"),
        ("--shape 2d:B1,H4,W4,D4,D5", "cannot read 'D5'"),
        ("--shape 1d:B1,L0,D4", "cannot read 'L0'"),
        ("--shape sd:B1", "expected KIND:SIZES with a kind of 1d, 2d"),
        ("--repeats 0", "--repeats must be at least 1, got 0"),
        ("--device gpu", "device 'gpu' cannot be used"),
        ("--device meta", "kernels are measured on auto, cpu or cuda"),
        ("--backends triton --device cpu", "backend='triton' cannot run here"),
    ],
)
def test_mistakes_are_told_and_exit_with_2(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.setitem(cli.TASKS, "bench", ("vision_ssm.bench.commands", "measure"))
    assert cli.main(["bench", "kernels", *arguments.split(), "--output", str(tmp_path)]) == 2
    pattern = ".*".join(re.escape(part) for part in message.split(".*"))
    assert re.search(pattern, capsys.readouterr().err)


def test_shapes_are_read():
    assert catalogue.parse_shape("2d:B16,H160,W150,D64,N8,R4") == Scan2D(
        batch=16, height=160, width=150, channels=64, states=8, rank=4
    )
    assert catalogue.parse_shape("1d:B1, L7, D3") == Scan1D(batch=1, length=7, channels=3, states=16)
    assert catalogue.parse_shape("ssd:B1,L7,H2,P8,N4") == SSD(batch=1, length=7, heads=2, head_dim=8, states=4)


def test_the_built_in_workloads_have_one_name_on_both_devices(monkeypatch):
    monkeypatch.undo()
    assert list(catalogue.CPU) == list(catalogue.GPU)
    for name, workload in catalogue.CPU.items():
        assert type(workload) is type(catalogue.GPU[name])
        assert workload.state_steps < 2**25
    assert catalogue.GPU["temporal"].state_steps == 16384 * 16 * 128 * 16


def test_long_cases_cover_every_range():
    assert {(c.workload.kind, c.steps) for c in long_cases(TINY, CPU, quick=False)} >= {
        ("1d", "usual"), ("1d", "large"), ("1d", "slow"), ("2d", "usual"), ("ssd", "large"),
    }  # fmt: skip
    assert {c.workload.kind for c in long_cases(["2d"], CPU, quick=False)} == {"2d"}
    slow = long_cases(TINY, CPU, quick=False)[-1]
    short = Scan1D(batch=1, length=200, channels=3, states=2)
    assert type(slow)(short, torch.float32, "slow").check(CPU, "auto").passed


def test_stopwatch_counts_what_it_runs():
    calls = []
    found = Stopwatch(CPU, repeats=7).measure(lambda: calls.append(1))
    assert len(calls) == 2 + 7
    assert found.full.runs == 7
    assert found.full.low <= found.full.median <= found.full.high
    assert found.extra_bytes is None
