"""Mixers by name: what each lets a position see, pieces and wholes, options of scans, patterns, the tasks' networks."""

import dataclasses
import json
from typing import get_args

import pytest
import timm
import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

import detection.backbone  # noqa: F401  (timm knows the backbone by it)
from detection.model import MambaYOLO
from generation.dim import DiM
from generation.pipelines import VideoDiMPipeline
from generation.streaming import VideoStream
from kernels import causal_conv1d, selective_scan, selective_scan_2d, ssd, ssd_2d
from kernels.selective_scan.reference import read_in_order, write_in_order
from kernels.testing import assert_close
from restoration.card import WeightsCard
from restoration.model import Serpent
from restoration.restorer import PictureRestorer, Route
from vision_ssm.directions import S6Direction, SSDDirection
from vision_ssm.errors import UserError
from vision_ssm.mamba import BidirectionalMamba
from vision_ssm.memory_replay import MemoryReplay
from vision_ssm.mixer_config import NO_OPTIONS, MixerName, MixerStack, ScanOptions
from vision_ssm.mixers import Mixer, ScanMixer, build_mixer, norm_out
from vision_ssm.mixers2d import SSD2D, build_mixer2d
from vision_ssm.ss2d import DIRECTIONS, SS2D

NAMES: tuple[MixerName, ...] = get_args(MixerName)
CAUSAL: tuple[MixerName, ...] = ("s6", "ssd", "s4d", "attention", "gated_conv")
RECURRENT: tuple[MixerName, ...] = ("s6", "ssd", "s4d", "gated_conv")
SCANS: tuple[MixerName, ...] = ("s6", "ssd", "s4d")
DIM = 96
"""Three heads of 64 channels in ssd, so that polar [1, 1] leaves one."""


def options_of(name: str) -> ScanOptions:
    """All the options that a mixer can have."""
    if name not in SCANS:
        return NO_OPTIONS
    return ScanOptions(polar=(1, 0) if name == "s4d" else (1, 1), smr=3)


def scrambled(module: nn.Module) -> nn.Module:
    """The module in float64 with no parameter at zero: options that start as the identity do something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.double()


def mixer(name: MixerName, *, causal: bool = False) -> Mixer:
    torch.manual_seed(0)
    return scrambled(build_mixer(name, DIM, causal=causal, options=options_of(name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_mixer_reads_one_axis_and_all_of_it(name):
    module = mixer(name)
    x = torch.randn(2, 3, 5, DIM, dtype=torch.float64)
    assert_close("along axis 1", module(x, 1), module(x.transpose(1, 2), 2).transpose(1, 2), 1e-12)
    changed = x.clone()
    changed[1, 2, 2] += 1
    moved = (module(changed, 2) - module(x, 2)).abs().amax(-1)
    assert moved[1, 2].min() > 1e-9  # the middle: within the taps of gated_conv too
    moved[1, 2] = 0
    assert moved.max() == 0


@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mixer_does_not_see_what_comes_later(name):
    x = torch.randn(1, 7, DIM, dtype=torch.float64)
    changed = x.clone()
    changed[:, 4] += 1
    for causal in (True, False):
        module = mixer(name, causal=causal)
        moved = (module(changed, 1) - module(x, 1)).abs().amax(-1)[0]
        assert moved[4:].min() > 1e-9
        assert bool(moved[:4].max() < 1e-15) is causal


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("name", RECURRENT)
def test_pieces_are_exactly_the_whole(name, causal):
    module = mixer(name, causal=causal)
    x = torch.randn(2, 11, 2, DIM, dtype=torch.float64)
    pieces, after, state, found = x.split((1, 4, 6), dim=1), [None], None, []
    for piece in reversed(pieces[1:]):
        after.append(module.look_back(piece, 1, after[-1]))
    for piece, end in zip(pieces, reversed(after), strict=True):
        y, state = module.advance(piece, 1, state, end)
        found.append(y)
    assert_close("pieces", torch.cat(found, dim=1), module(x, 1), 1e-12)


@pytest.mark.parametrize("axis", [1, 2])
def test_one_scan_of_ssd_branches_off_like_one_position_after_another(axis):
    mixer = scrambled(build_mixer("ssd", DIM, causal=True))
    x = torch.randn(4, 9, 7, DIM, dtype=torch.float64, requires_grad=True)
    inputs = [x, *mixer.parameters()]
    fast, slow = mixer.branch(x, axis), ScanMixer.branch(mixer, x, axis)
    assert_close("branches", fast, slow, rel=1e-12)
    assert_close("the main sequence, as ever", fast[2:], mixer(x[2:], axis), rel=1e-12)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (fast, slow)), strict=True):
        assert_close("gradient", one, other, rel=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("autocast", [False, True])
def test_branches_on_a_gpu_are_those_of_the_cpu(autocast):
    torch.manual_seed(1)
    mixer = build_mixer("ssd", DIM, causal=True)
    x = torch.randn(4, 9, 7, DIM)
    expected = mixer.branch(x, 1).detach()
    x = x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = mixer.cuda().branch(x, 1)
    assert_close("branches", y.float().cpu(), expected, rel=2e-2 if autocast else 1e-3)
    y.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("optional", [False, True])
def test_a_branch_is_what_follows_the_main_sequence(name, optional):
    options = options_of(name) if optional else NO_OPTIONS
    mixer = scrambled(build_mixer(name, DIM, causal=True, options=options))
    x = torch.randn(2, 6, 3, DIM, dtype=torch.float64)
    y = mixer.branch(x, 1)
    for i in range(6):
        line = torch.cat([x[1:, :i], x[:1, i : i + 1]], dim=1)
        assert_close(f"position {i}", y[:1, i], mixer(line, 1)[:, i], rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_weight(name):
    options = options_of(name)
    for module, x in (
        (build_mixer(name, DIM, options=options), torch.randn(2, 9, DIM)),
        (build_mixer2d(name, DIM, init="vmamba", act="silu", options=options), torch.randn(1, 3, 5, DIM)),
    ):
        (module(x, 1) if isinstance(module, Mixer) else module(x)).square().sum().backward()
        for weight, parameter in module.named_parameters():
            assert parameter.grad is not None, weight
            assert parameter.grad.abs().max() > 0, weight


def test_attention_and_gated_conv_and_nc_ssd_are_their_formulas():
    x = torch.randn(2, 6, DIM, dtype=torch.float64)
    one = mixer("attention")
    q, k, v = (t.unflatten(-1, (one.heads, -1)).transpose(1, 2) for t in one.qkv(x).chunk(3, dim=-1))
    y = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v
    assert_close("attention", one(x, 1), one.proj(y.transpose(1, 2).flatten(2)), 1e-12)
    one = mixer("gated_conv", causal=True)
    value, gate = one.in_proj(x).chunk(2, dim=-1)
    u = one.forwards.conv(F.pad(value.mT, (3, 0))).mT
    assert_close("gated_conv", one(x, 1), one.out_proj(F.silu(u) * F.silu(gate)), 1e-12)
    one = mixer("nc_ssd")
    z, xBC, dt = one.in_proj(x).split((2 * DIM, 2 * DIM + 128, 3), dim=-1)
    u, B, C = F.silu(one.conv(xBC.mT).mT).split((2 * DIM, 64, 64), dim=-1)
    weight = F.softplus(dt + one.dt_bias) * one.A_log.exp()
    u = u.unflatten(-1, (3, -1))
    M = torch.einsum("bin,bjn,bjh->bhij", C, B, weight)
    y = (torch.einsum("bhij,bjhp->bihp", M, u) + one.D[:, None] * u).flatten(2)
    assert_close("nc_ssd", one(x, 1), one.out_proj(one.norm(y * F.silu(z))), 1e-12)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lstm", {}, "s6, ssd, nc_ssd, s4d, attention, gated_conv"),
        ("nc_ssd", dict(causal=True), "no order"),
        ("attention", dict(state_size=4), "no states"),
        ("gated_conv", dict(options=ScanOptions(smr=2)), "options of scans"),
        ("attention", dict(options=ScanOptions(polar=(1, 1))), "options of scans"),
        ("s4d", dict(options=ScanOptions(polar=(1, 1))), r"polar \[1, 0\]"),
        ("s4d", dict(state_size=3), "even"),
        ("ssd", dict(options=ScanOptions(polar=(2, 1))), "this width has 3"),
    ],
)
def test_mixers_that_cannot_be(name, arguments, message):
    with pytest.raises(UserError, match=message):
        build_mixer(name, DIM, **arguments)
    if "causal" not in arguments and "state_size" not in arguments:
        with pytest.raises(UserError, match=message):
            build_mixer2d(name, DIM, init="vmamba", act="silu", **arguments)


def test_options_that_cannot_be():
    for wrong in (dict(polar=(1,)), dict(polar=(-1, 0)), dict(smr=-1), dict(smr=17)):
        with pytest.raises(UserError, match="polar must|smr must"):
            ScanOptions(**wrong)
    with pytest.raises(UserError, match="reads a sequence as a whole"):
        build_mixer("attention", DIM).look_back(torch.randn(1, 3, DIM), 1)


# --- polar


def test_polar_channels_of_s6_are_exactly_one_and_zero():
    torch.manual_seed(0)
    one = scrambled(S6Direction(8, state_size=3, reverse=False, options=ScanOptions(polar=(2, 1))))
    u, gate = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    delta, B, C = one.x_proj(u).split(one.split, dim=-1)
    learned = -one.scan.A_log[0].exp()
    A = torch.cat(
        [learned, torch.zeros(16, 2), torch.full((16, 1), -1e30)], dim=1
    )  # the decay is 0 in float64, however small the step
    want = selective_scan(
        u, delta, A, B, C, one.scan.D[0], delta_weight=one.scan.dt_weight[0], delta_bias=one.scan.dt_bias[0],
        softplus=True, z=gate, backend="reference",
    )  # fmt: skip
    assert_close("polar s6", one.scanned(u, gate)[0], want, 1e-12)


def test_a_channel_of_decay_one_forgets_nothing_and_one_of_zero_all():
    """An impulse and then silence: the one-decay state keeps its bits, the zero-decay output is over at once."""
    torch.manual_seed(0)
    one = S6Direction(8, state_size=2, reverse=False, options=ScanOptions(polar=(1, 1)))
    u = torch.zeros(1, 400, 16)
    u[:, 0] = torch.randn(16)
    gate = torch.ones_like(u)
    _, first, _ = one.scanned(u, gate)
    _, last, _ = one.scanned(torch.zeros_like(u), gate, 1, first)
    assert first[..., 2].abs().min() > 0
    assert torch.equal(first[..., 2], last[..., 2])
    assert (last[..., :2].abs() < first[..., :2].abs()).all()
    with torch.no_grad():
        one.x_proj.weight[one.split[0] :].view(2, 4, 16)[:, :3] = 0  # only the state of decay 0 is left
        one.scan.D.zero_()
    y, _, _ = one.scanned(u, gate)
    assert y[:, 0].abs().max() > 0
    assert y[:, 1:].abs().max() == 0


def test_a_norm_before_a_projection_keeps_the_type_of_its_input():
    """As the norm with its weight; under autocast no activation becomes float32, and the sums are still float32's."""
    torch.manual_seed(0)
    norm, out = nn.RMSNorm(384, eps=1e-5), nn.Linear(384, 8, bias=False)
    nn.init.uniform_(norm.weight, 0.5, 2)
    y = torch.randn(3, 384)
    assert_close("float32", norm_out(y, norm, out), out(norm(y)), 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        short = norm_out(300 * y.bfloat16(), norm, out)  # squares summed in bfloat16 would be 5 % off
    assert short.dtype == torch.bfloat16
    assert_close("bfloat16", short, out(norm(300 * y)), 1e-2)


def test_polar_heads_of_ssd_are_exactly_one_and_zero():
    torch.manual_seed(0)
    one = scrambled(SSDDirection(DIM, state_size=4, reverse=True, options=ScanOptions(polar=(1, 1))))
    projected = torch.randn(2, 9, 2 * 192 + 8 + 3, dtype=torch.float64)
    parts = projected.split((192, 200, 3), dim=-1)
    _, xBC, dt = parts
    xBC = causal_conv1d(xBC, one.conv.weight.squeeze(1), one.conv.bias, activation="silu", reverse=True)
    x, B, C = xBC.split((192, 4, 4), dim=-1)
    A = torch.cat([torch.zeros(1), -one.A_log.exp(), torch.full((1,), -1e30)])
    want = ssd(
        x.unflatten(-1, (3, -1)), dt, A, B.unsqueeze(2), C.unsqueeze(2), one.D, dt_bias=one.dt_bias, softplus=True,
        reverse=True, backend="reference",
    )  # fmt: skip
    assert_close("polar ssd", one.read(parts, 1, None)[0], want.flatten(2), 1e-12)


def test_polar_of_s4d_adds_the_sum_of_all_inputs():
    one, plain = (build_mixer("s4d", 8, causal=True, options=ScanOptions((n, 0))).double() for n in (1, 0))
    one.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    assert_close("the gain starts at zero", one(x, 1), plain(x, 1), 1e-15)
    scan = one.forwards.scan
    nn.init.normal_(scan.total_gain)
    u = torch.randn(2, 9, 16, dtype=torch.float64)
    want = plain.forwards.scan(u) + scan.total_gain * scan.log_dt.exp() * u.cumsum(1)
    assert_close("sum", scan(u), want, 1e-12)


@pytest.mark.parametrize("kind", [SS2D, SSD2D])
def test_polar_over_maps_is_the_scan_with_explicit_decays(kind):
    torch.manual_seed(0)
    one = scrambled(kind(DIM, state_size=3, options=ScanOptions(polar=(1, 1))))
    x = torch.randn(1, 3, 4, 192, dtype=torch.float64)
    first, B, C = one.x_proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).unflatten(-1, (4, -1)).split(one.split, -1)
    if kind is SS2D:
        scan = one.scan
        A = torch.cat([-scan.A_log.exp(), torch.zeros(4, 192, 1), torch.full((4, 192, 1), -1e30)], dim=2)
        want = selective_scan_2d(
            x, first.contiguous(), A, B.contiguous(), C.contiguous(), scan.D, delta_weight=scan.dt_weight,
            delta_bias=scan.dt_bias, softplus=True, backend="reference",
        )  # fmt: skip
    else:
        A = torch.cat([torch.zeros(4, 1), -one.A_log.exp(), torch.full((4, 1), -1e30)], dim=1)
        want = ssd_2d(
            x.unflatten(-1, (3, -1)), first, A, B.unsqueeze(-2).contiguous(), C.unsqueeze(-2).contiguous(), one.D,
            dt_bias=one.dt_bias, softplus=True, backend="reference",
        ).flatten(-2)  # fmt: skip
    assert_close("polar map", one.core(x), one.norm(want), 1e-12)


# --- memory replay


def with_and_without(name: MixerName) -> list[tuple[nn.Module, nn.Module]]:
    pairs: list[tuple[nn.Module, nn.Module]] = []
    for build in (build_mixer, lambda *a, options: build_mixer2d(*a, init="vmamba", act="silu", options=options)):
        plain, replaying = (build(name, 32, options=ScanOptions(smr=taps)) for taps in (0, 3))
        missing = replaying.load_state_dict(plain.state_dict(), strict=False)
        assert missing.missing_keys
        assert all("replay" in key for key in missing.missing_keys)
        pairs.append((plain, replaying))
    return pairs


@pytest.mark.parametrize("name", SCANS)
def test_memory_replay_starts_as_the_identity_to_the_last_bit(name):
    for (plain, replaying), arguments in zip(
        with_and_without(name), ((torch.randn(2, 9, 32), 1), (torch.randn(1, 4, 5, 32),)), strict=True
    ):
        want, got = plain(*arguments), replaying(*arguments)
        if isinstance(plain, Mixer) or name == "s4d":
            assert torch.equal(want, got)
        else:  # one call per direction: the same sums in another order
            assert_close("map", got, want, 1e-6)
        got.square().sum().backward()
        for key, parameter in replaying.named_parameters():
            if "replay" in key:
                assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("reverse", [False, True])
def test_memory_replay_weights_by_what_came_before(reverse):
    replay = MemoryReplay(5, 3, reverse=reverse)
    u = torch.randn(2, 6, 5)
    assert torch.equal(replay(u)[0], u)
    nn.init.normal_(replay.weight)
    padded = F.pad(u.flip(1) if reverse else u, (0, 0, 2, 0))
    memory = sum(replay.weight[:, j] * padded[:, j : j + 6] for j in range(3))
    assert_close("replayed", replay(u)[0], u * 2 * torch.sigmoid(memory.flip(1) if reverse else memory), 1e-6)


def test_memory_replay_follows_each_direction_of_a_map():
    module = scrambled(SS2D(8, state_size=2, options=ScanOptions(smr=2)))
    x = torch.randn(2, 3, 4, 16, dtype=torch.float64)
    want = torch.zeros_like(x)
    for k, weight in enumerate(module.x_proj.weight.chunk(4)):
        u = read_in_order(x, k)  # the orders have the numbers of DIRECTIONS
        past = F.pad(u, (0, 0, 1, 0))
        taps = module.replays[k].weight
        u = u * 2 * torch.sigmoid(taps[:, 0] * past[:, :-1] + taps[:, 1] * past[:, 1:])
        delta, B, C = (u @ weight[:, :, 0, 0].T).split(module.split, dim=-1)
        scan = module.scan
        y = selective_scan(
            u, delta, scan.A[k], B, C, scan.D[k], delta_weight=scan.dt_weight[k], delta_bias=scan.dt_bias[k],
            softplus=True, backend="reference",
        )  # fmt: skip
        want += write_in_order(y, k, 2, 3, 4)
    assert len(DIRECTIONS) == 4
    assert_close("map", module.core(x), module.norm(want), 1e-12)


def test_the_bidirectional_module_has_the_options_too():
    module = scrambled(BidirectionalMamba(8, options=ScanOptions(polar=(1, 1), smr=2)))
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    mixer = build_mixer("s6", 8, options=ScanOptions(polar=(1, 1), smr=2)).double()
    mixer.load_state_dict(module.state_dict())
    assert_close("the same mixer under two names", module(x), mixer(x, 1), 1e-12)


# --- maps


REACH = {"s6": "all", "ssd": "all", "nc_ssd": "all", "attention": "all", "s4d": "cross", "gated_conv": "near"}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_pixel_sees(name):
    torch.manual_seed(0)
    module = scrambled(build_mixer2d(name, 64, init="vmamba", act="silu"))
    x = torch.randn(1, 6, 9, 64, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0, 0] += 1
    moved = (module(changed) - module(x)).abs().amax(-1)[0] > 1e-15
    rows, columns = torch.arange(6)[:, None] <= 1, torch.arange(9) <= 1  # the 3x3 convolution reaches one pixel on
    expected = {"all": torch.ones(6, 9, dtype=torch.bool), "cross": rows | columns, "near": rows & columns}
    assert torch.equal(moved, expected[REACH[name]])


@pytest.mark.parametrize("name", ["s6", "ssd", "nc_ssd"])
def test_the_mixing_matrix_of_a_map_is_what_its_core_computes(name):
    """Before the norm, of a head: M times the value, whatever the order of reading."""
    module = scrambled(build_mixer2d(name, 32, init="vmamba", act="silu"))
    x = torch.randn(1, 3, 4, 32, dtype=torch.float64)
    seen: dict[str, Tensor] = {}
    module.norm.register_forward_hook(lambda norm, given, result: seen.update(mixed=given[0]))
    value = module.act(module.conv(module.in_proj(x.permute(0, 3, 1, 2)))).flatten(2)  # (B, D, L)
    matrix = module.mixing_matrix(x, reduce=None)  # (B, D, L, L)
    assert_close("scan", (matrix @ value.unsqueeze(-1)).squeeze(-1).mT, seen["mixed"].flatten(1, 2), 1e-12)


# --- stacks and networks


def test_patterns_of_layers():
    def names(pattern, count, **more):
        return [name for name, _ in MixerStack("ssd", pattern, ScanOptions(smr=2)).layers(count, **more)]

    assert names("same", 3) == ["ssd"] * 3
    assert names("alternating", 5) == ["ssd", "attention", "ssd", "attention", "ssd"]
    assert names("first_scan_without_positions", 4) == ["ssd", "attention", "ssd", "attention"]
    assert names("last_half_attention", 5) == ["ssd"] * 3 + ["attention"] * 2
    assert names("last_half_attention", 4, coarse=False) == ["ssd"] * 4
    layers = MixerStack("ssd", "alternating", ScanOptions(smr=2)).layers(2)
    assert [options.smr for _, options in layers] == [2, 0]  # attention has no options
    for arguments, message in (
        (dict(mixer="nc_ssd", pattern="first_scan_without_positions"), "does not know it"),
        (dict(mixer="attention", pattern="alternating"), "between other mixers"),
        (dict(pattern="first_scan_without_positions", maps=True), "same, alternating, last_half_attention"),
    ):
        with pytest.raises(UserError, match=message):
            MixerStack(**arguments)


@pytest.mark.parametrize("name", NAMES)
def test_the_networks_of_all_tasks_take_every_mixer_and_rebuild_from_their_config(name):
    options = options_of(name)
    given = dict(mixer=name, polar=list(options.polar), smr=options.smr)
    pattern = "same" if name == "attention" else "alternating"
    dim = DiM("tiny", depth=2, width=96, sample_size=8, mixer_pattern=pattern, **given)
    serpent = Serpent("fast", width=48, depths=(1, 2), mixer_pattern=pattern, **given)
    for model, again, inputs in (
        (dim, DiM.from_config(json.loads(dim.to_json_string())), (torch.rand(1, 3, 8, 8), 0.5)),
        (serpent, Serpent(**json.loads(json.dumps(serpent.config))), (torch.rand(1, 3, 9, 16),)),
    ):
        again.load_state_dict(model.state_dict())
        y = model(*inputs)
        assert torch.isfinite(y.sample if model is dim else y).all()
    with torch.device("meta"):  # of the detector, names and shapes: its blocks are built by the same function
        yolo = MambaYOLO("t", 3, mixer_pattern=pattern, **{**given, "polar": (0, 0)})
        again = MambaYOLO(**json.loads(json.dumps(yolo.config)))
    assert {n: t.shape for n, t in again.state_dict().items()} == {n: t.shape for n, t in yolo.state_dict().items()}
    kinds = [type(block.ss2d[0]).__name__ for block in yolo.backbone.stages[2]]
    assert kinds[1] == "Attention2D"
    assert (kinds[0] == kinds[1]) is (name == "attention")


def test_a_detector_with_another_mixer_detects():
    model = MambaYOLO("t", 3, stage_repeats=(1, 1, 9, 1), mixer="ssd", mixer_pattern="last_half_attention", smr=2)
    kinds = [[type(block.ss2d[0]).__name__ for block in stage] for stage in model.backbone.stages]
    assert kinds == [["SSD2D"], ["SSD2D"], ["SSD2D", "SSD2D", "Attention2D"], ["SSD2D"]]
    assert [tuple(y.shape) for y in model(torch.rand(1, 3, 64, 64))] == [(1, 67, 8, 8), (1, 67, 4, 4), (1, 67, 2, 2)]


def test_a_backbone_with_another_mixer_starts_such_a_detector():
    backbone = timm.create_model("mamba_yolo_t", num_classes=2, mixer="gated_conv", stage_repeats=(1, 1, 1, 1))
    detector = MambaYOLO("t", 3, mixer="gated_conv", stage_repeats=(1, 1, 1, 1))
    shared = {name: tensor for name, tensor in backbone.state_dict().items() if name.startswith("backbone.")}
    assert not detector.load_state_dict(shared, strict=False).unexpected_keys
    assert shared.keys() == {name for name in detector.state_dict() if name.startswith("backbone.")}


def test_a_dim_without_positions_learns_the_order_from_its_scan():
    plain, hybrid = (
        DiM("tiny", depth=2, sample_size=8, mixer_pattern=pattern)
        for pattern in ("alternating", "first_scan_without_positions")
    )
    image = torch.ones(1, 3, 8, 8)
    tokens = hybrid.embed(image, 0.5, None)[0][0, 0]
    assert torch.equal(tokens, tokens[:1].expand_as(tokens))
    assert not torch.equal(plain.embed(image, 0.5, None)[0][0, 0, 0], plain.embed(image, 0.5, None)[0][0, 0, 1])


def test_only_recurrent_layers_along_time_stream():
    hybrid = DiM("tiny", depth=4, layout="st", causal=True, mixer_pattern="alternating")
    with pytest.raises(UserError, match="attention along time"):
        hybrid.require_causal()
    DiM("tiny", depth=4, layout="ts", causal=True, mixer_pattern="alternating").require_causal()


@pytest.mark.parametrize("name", RECURRENT)
def test_a_stream_remembers_all_that_its_mixers_do(name, tmp_path):
    options = options_of(name)
    model = DiM(
        "tiny", depth=2, width=96, layout="st", causal=True, sample_size=8, mixer=name, polar=options.polar,
        smr=options.smr,
    )  # fmt: skip
    pipeline = VideoDiMPipeline(scrambled(model).float().eval(), FlowMatchEulerDiscreteScheduler())
    stream = VideoStream(pipeline, num_inference_steps=1)
    next(stream)
    stream.save(tmp_path / "stream.safetensors")
    assert torch.equal(next(VideoStream.load(tmp_path / "stream.safetensors", pipeline)), next(stream))


def test_a_restorer_with_another_mixer_runs_as_a_whole_or_in_tiles_but_not_in_strips():
    model = Serpent("fast", width=32, depths=(1, 1), mixer="ssd")
    card = WeightsCard(task="denoise", scale=1, model={"name": "serpent", **model.config})
    image = torch.rand(3, 40, 50)
    whole = PictureRestorer(model, card, device="cpu").restore(image)
    assert torch.equal(whole, image)  # an untrained network returns its input
    tiles = dataclasses.replace(Route(), tile=32)
    assert PictureRestorer(model, card, device="cpu", route=tiles).restore(image).shape == image.shape
    strips = dataclasses.replace(Route(), strip=8)
    with pytest.raises(UserError, match="SSD2D"):
        PictureRestorer(model, card, device="cpu", route=strips).restore(image)


def test_networks_refuse_mixers_that_cannot_be():
    for build in (
        lambda: MambaYOLO("t", mixer="mamba"),
        lambda: Serpent(mixer="mamba"),
        lambda: DiM("tiny", mixer="mamba"),
    ):
        with pytest.raises(UserError, match="mixer must be one of s6, ssd"):
            build()
