"""Probes: gauges against cases worked out by hand, tasks against their definitions, and what a scan must express."""

import json

import pytest
import torch

from vision_ssm import cli
from vision_ssm.mixer_config import ScanOptions
from vision_ssm.mixers import AttentionMixer
from vision_ssm.probe import digits, expressivity, icl, recency, sampling, smooth
from vision_ssm.probe.stack import Stack, StackConfig


@pytest.mark.parametrize("name", ["s6", "ssd", "s4d"])
def test_log_decays_are_those_of_the_scan(name):
    """Transmission is a product of numbers in (0, 1) that falls with distance."""
    torch.manual_seed(0)
    decays = recency.log_decays(StackConfig.of(name, 1, dim=32).build(0), torch.randn(2, 11, 32))
    assert decays.max() < 0
    mean, best = recency.transmission(decays)
    assert mean[0] == best[0] == 1
    assert (mean.diff() < 0).all()
    torch.testing.assert_close(mean[2], decays[:, -2:].sum(1).exp().mean())


@pytest.mark.parametrize("name, ones, zeros", [("s6", 2, 1), ("ssd", 1, 2), ("s4d", 1, 0)])
def test_polar_states_keep_all_or_nothing(name, ones, zeros):
    """Of the states that decay separately (one a head in ssd), the share that polar takes."""
    torch.manual_seed(0)
    options = ScanOptions((ones, zeros))
    config = StackConfig.of(name, 1, dim=128, state_size=None if name == "ssd" else 2, options=options)
    with torch.no_grad():
        decays = recency.log_decays(config.build(0), torch.randn(2, 11, 128), options)
    states = {"s6": 2 + ones + zeros, "ssd": 4, "s4d": 1 + ones}[name]  # s4d: a complex mode has one
    assert (decays == 0).float().mean().item() == pytest.approx(ones / states)
    assert (decays == -torch.inf).float().mean().item() == pytest.approx(zeros / states)
    mean, best = recency.transmission(decays)
    assert (best == 1).all()
    assert ones / states < mean[-1] < 1 - zeros / states


@pytest.mark.parametrize("name", ["attention", "gated_conv", "nc_ssd"])
def test_mixers_without_a_scan_have_no_decays(name):
    mixer = StackConfig.of(name, 1, dim=32, causal=False).build(0)
    assert recency.log_decays(mixer, torch.randn(1, 5, 32)) is None


def test_s6_decays_against_its_impulse_response():
    """An impulse into a scan whose step sizes are constant dies as the decays say."""
    torch.manual_seed(0)
    mixer = StackConfig.of("s6", 1, dim=4, state_size=1).build(0)
    scan = mixer.forwards.scan
    scan.dt_weight.data.zero_()
    decays = recency.log_decays(mixer, torch.randn(1, 9, 4))
    assert decays.shape == (1, 9, 8)
    torch.testing.assert_close(decays[0, 0], -torch.nn.functional.softplus(scan.dt_bias[0]) * scan.A_log[0, :, 0].exp())


class Fading(torch.nn.Module):
    """y_t = sum_s 0.5^(t-s) x_s, each channel by itself."""

    def forward(self, x, axis):
        gap = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        return torch.where(gap >= 0, 0.5 ** gap.clamp(min=0), 0.0) @ x


def test_influence_of_a_known_decay():
    torch.manual_seed(0)
    curve = recency.influence(Fading(), torch.randn(8, 7, 16))
    torch.testing.assert_close(curve, 0.5 ** torch.arange(7.0), rtol=0.1, atol=0)


def test_smoothness_of_known_tokens():
    torch.manual_seed(0)
    constant = torch.ones(3, 9, 4)
    noise = torch.randn(8, 500, 32)
    alternating = torch.tensor([1.0, -1.0]).repeat(250)[None, :, None] * torch.ones(4)
    assert smooth.cosine(constant) == pytest.approx(1)
    assert smooth.energy(constant) == 0
    assert smooth.cosine(noise) == pytest.approx(0, abs=0.01)
    assert smooth.energy(noise) == pytest.approx(1, abs=0.02)
    assert smooth.energy(alternating) == pytest.approx(2, abs=0.01)


def test_signature_against_a_fine_sum():
    steps = expressivity.paths(3, seed=1)
    fine = (steps / 50).repeat_interleave(50, dim=1)
    x = fine.cumsum(1) - fine / 2
    s12 = (x[..., 0] * fine[..., 1]).cumsum(1)
    s21 = (x[..., 1] * fine[..., 0]).sum(1)
    s123 = (s12 * fine[..., 2]).sum(1)
    ends = steps.sum(1)
    want = torch.stack([ends[:, 0] * ends[:, 1], (s12[:, -1] - s21) / 2, s12[:, -1], s123], dim=1)
    torch.testing.assert_close(expressivity.signature(steps), want, atol=2e-3, rtol=0)


class Constant(torch.nn.Module):
    """The same numbers for every token, in place of a projection."""

    def __init__(self, projection):
        super().__init__()
        self.values = torch.nn.Parameter(0.3 * torch.randn(projection.out_features))

    def forward(self, u):
        return self.values.expand(*u.shape[:-1], -1)


class Frozen(StackConfig):
    """Scans whose step sizes, B and C do not depend on the input."""

    def build(self, layer):
        mixer = super().build(layer)
        for module in mixer.modules():
            if hasattr(module, "x_proj"):
                module.x_proj = Constant(module.x_proj)
        return mixer


def test_expressivity_thresholds():
    """The guard against a selective scan that became a constant one; docs/probe.md has the whole table."""
    steps = expressivity.paths(8000, seed=0)
    targets = expressivity.signature(steps)
    lti, gate, one, two = (
        expressivity.read_out(expressivity.reference_features(name, steps, 0), targets)
        for name in ("LTI", "gate only", "diagonal", "two diagonal")
    )
    assert max(lti) < 0.05
    assert gate[0] > 0.99
    assert gate[1] < 0.1
    assert two[3] - one[3] >= 0.15

    def area(config: StackConfig) -> float:
        return expressivity.read_out(expressivity.stack_features(config, steps, 0), targets)[1]

    assert area(StackConfig(mixers=("s6",), dim=64)) > 0.95
    assert area(StackConfig(mixers=("gated_conv",), dim=64)) < 0.05
    assert area(Frozen(mixers=("s6",), dim=64)) < 0.05


def test_linreg_is_solved_by_least_squares():
    options = icl.ICLOptions([], task="linreg", dims=3, points=8)
    batch = icl.linreg(options, 5, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (5, 16, 4)
    x, y = batch.inputs[:, ::2, :3], batch.inputs[:, 1::2, 3]
    assert (batch.inputs[:, ::2, 3] == 0).all()
    torch.testing.assert_close(y, batch.answers)
    w = torch.linalg.lstsq(x[:, :7], y[:, :7, None]).solution
    torch.testing.assert_close((x[:, 7:] @ w).flatten(), y[:, 7], atol=1e-3, rtol=1e-3)
    assert (batch.places == torch.arange(0, 16, 2)).all()


def test_parity_is_a_product_of_two_signs():
    options = icl.ICLOptions([], task="parity", dims=5, points=40)
    batch = icl.parity(options, 6, torch.Generator().manual_seed(0))
    x = batch.inputs[:, ::2, :5]
    pairs = torch.stack([x[..., i] * x[..., j] for i in range(5) for j in range(i)], dim=-1)
    assert ((pairs == batch.answers[..., None]).all(1).sum(1) == 1).all()


def test_mqar_asks_every_key_once():
    options = icl.ICLOptions([], task="mqar", points=4, vocabulary=20)
    batch = icl.mqar(options, 7, torch.Generator().manual_seed(0))
    assert batch.inputs.shape == (7, 32)
    for tokens, places, answers in zip(batch.inputs, batch.places, batch.answers, strict=True):
        told = dict(zip(tokens[:8:2].tolist(), tokens[1:8:2].tolist(), strict=True))
        assert len(told) == 4
        assert [told[k] for k in tokens[places].tolist()] == answers.tolist()
        assert (tokens[8:] > 0).sum() == 4
        assert min(told.values()) > max(told)


def test_retrieval_asks_a_key_that_was_told():
    options = icl.ICLOptions([], task="retrieval", dims=6, points=5)
    batch = icl.retrieval(options, 9, torch.Generator().manual_seed(0))
    keys, values, query = batch.inputs[:, :5, :6], batch.inputs[:, :5, 6:], batch.inputs[:, 5, :6]
    nearest = (keys @ query[..., None]).argmax(1)[..., None].expand(-1, -1, 6)
    torch.testing.assert_close(values.gather(1, nearest), batch.answers)


def test_scores():
    signs = torch.tensor([[1.0, -1.0], [1.0, 1.0]])
    assert icl.score("parity", torch.tensor([[[2.0], [3.0]], [[1.0], [0.5]]]), signs).tolist() == [100, 50]
    assert icl.score("linreg", torch.zeros(2, 2, 1), signs).tolist() == [1, 1]
    assert icl.score("retrieval", torch.zeros(1, 1, 2), torch.tensor([[[0.6, 0.8]]])).item() == pytest.approx(1)
    assert icl.score("mqar", torch.eye(3)[None], torch.tensor([[0, 1, 1]])).tolist() == [100, 100, 0]


def test_signals_at_another_rate_are_the_same_signals():
    """Jitter moves the samples, not the signal; a step of 0.2 gives every second sample of 0.1."""
    x, w = sampling.signals(4, 0.1, 0.0, torch.Generator().manual_seed(3))
    y, v = sampling.signals(4, 0.2, 0.0, torch.Generator().manual_seed(3))
    torch.testing.assert_close(x[:, ::2], y[:, :32], atol=1e-5, rtol=1e-5)
    assert torch.equal(w, v)
    z, _ = sampling.signals(4, 0.1, 0.5, torch.Generator().manual_seed(3))
    assert torch.equal(z[:, 0], x[:, 0])
    assert not torch.allclose(z, x)


def test_stacks_are_read_layer_by_layer():
    assert StackConfig.of("s6", 3, dim=8).label == "s6 x 3"
    mixed = StackConfig.of("s6+attention", 5, dim=8)
    assert mixed.label == "s6+attention"
    model = Stack(mixed, torch.nn.Linear(1, 8), 2, length=6)
    states = model.states(torch.randn(2, 5, 1))
    assert [h.shape for h, _ in states] == [(2, 5, 8)] * 3
    torch.testing.assert_close(states[2][0], states[1][0] + states[2][1])


def test_options_of_a_stack_are_those_of_its_scans():
    options = ScanOptions((1, 1), smr=3)
    mixed = StackConfig.of("s6+attention", 1, dim=8, state_size=5, options=options)
    assert mixed.label == "s6+attention, polar 1 1, smr 3"
    scan = mixed.build(0).forwards
    assert scan.options == options
    assert scan.split[1] == 5 + 2
    assert isinstance(mixed.build(1), AttentionMixer)


def test_causal_reader_of_the_last_token_has_a_recency_bias():
    """Noise on the last pixels costs a causal classifier more than noise on the first."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    pixels, labels = digits.load()
    torch.manual_seed(0)
    model = digits.classifier(StackConfig.of("s6", 1, dim=16))
    digits.train(model, pixels, labels, pool="last", steps=80, seed=0)
    clean, first, _, last = recency.accuracies(model, pixels[-500:], labels[-500:], "last", 0)
    assert clean > 25
    assert clean - last > max(5, 2 * (clean - first))


@pytest.mark.parametrize(
    "arguments",
    [
        ["recency", "s6", "s6+gated_conv", "--dim", "8", "--length", "80", "--steps", "2", "--polar", "1", "1"],
        ["smooth", "nc_ssd", "--dim", "32", "--layers", "2", "--steps", "2"],
        ["smooth", "s6", "--smr", "3", "--dim", "8", "--layers", "2", "--steps", "2"],
        ["expressivity", "attention", "--dim", "8", "--layers", "1", "--no-references", "--paths", "1000"],
        ["icl", "s6+attention", "--task", "linreg", "--dim", "8", "--steps", "2", "--points", "4"],
        ["icl", "s4d", "--task", "mqar", "--dim", "8", "--steps", "2", "--points", "2", "--vocabulary", "16"],
        ["sampling", "gated_conv", "--dim", "8", "--layers", "1", "--steps", "2", "--seeds", "2"],
    ],
    ids=lambda arguments: "-".join(arguments[:4]),
)
def test_commands_write_a_table_json_and_a_plot(arguments, tmp_path, capsys):
    if arguments[0] in ("recency", "smooth"):
        pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    assert cli.main(["probe", *arguments, "-o", str(tmp_path)]) == 0
    (result,) = tmp_path.glob("*.json")
    rows = json.loads(result.read_text())["rows"]
    assert capsys.readouterr().out.count("\n| ") == len(rows) + 1
    assert result.with_suffix(".png").stat().st_size > 5000


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["recency", "s7"], "got 's7'"),
        (["recency", "nc_ssd"], "cannot read forwards only"),
        (["recency", "attention", "--polar", "1", "1"], "no recurrence"),
        (["recency", "s6", "--polar", "1"], "two numbers"),
        (["smooth", "gated_conv", "--state-size", "4"], "no states"),
        (["smooth", "ssd", "--dim", "48"], "multiple of 32"),
        (["smooth", "s6", "--dim", "0"], "at least 1"),
        (["recency", "s6", "--layers", "0"], "at least 1"),
        (["recency", "s4d", "--state-size", "3"], "even number"),
        (["icl", "s6", "--task", "mqar", "--points", "200"], "vocabulary"),
        (["icl", "s6", "--task", "parity", "--dims", "2"], "at least 3"),
        (["icl", "s6", "--task", "linreg", "--lr", "-1"], "above 0"),
        (["expressivity", "s6", "--layers"], "--layers needs a value: a whole number"),
        (["expressivity", "s6", "--paths", "10"], "at least 1000"),
        (["sampling", "s6", "--seeds", "0"], "at least 1"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_mistakes_are_one_line(arguments, told, tmp_path, capsys):
    assert cli.main(["probe", *arguments, "-o", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
