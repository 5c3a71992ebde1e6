"""The video U-Net, its temporal layers and the published process beyond the recorded values."""

import pytest
import torch
from torch import Tensor

from generation.frame_attention import FramePositionBias, rotate
from generation.published_diffusion import CosineSchedule, PublishedDiffusion
from generation.temporal import TemporalConfig, temporal_layer
from generation.unet import SSMVideoUNet
from vision_ssm.errors import UserError
from vision_ssm.training.optim import parameter_groups

TINY = dict(dim=8, dim_mults=(1, 2), heads=1, head_width=8, groups=4, state_size=4, hidden=8)
WIDE = dict(dim=112, heads=14, state_size=16, hidden=None)
KINDS = ("s4d", "s6", "ssd", "attention", "linear_attention")


def tiny(**changes: object) -> SSMVideoUNet:
    torch.manual_seed(0)
    return SSMVideoUNet(**(TINY | changes))


# arguments -> millions of parameters of the published network
COUNTS = {
    "paper": ({}, 61.22),
    "one_way": ({"bidirectional": False}, 57.70),
    "attention": ({"temporal": "attention"}, 56.28),
    "mamba": ({"temporal": "s6", "variant": "mamba", "state_size": 16}, 57.48),
    "wide_attention": (WIDE | {"temporal": "attention"}, 172.3),
    "wide_s6": (WIDE | {"temporal": "s6", "variant": "mamba"}, 175.4),
    "wide_s6_one_way": (WIDE | {"temporal": "s6", "variant": "mamba", "bidirectional": False}, 173.9),
    "wide_s4d": (WIDE | {"temporal": "s4d", "variant": "mamba"}, 173.0),
}


@pytest.mark.parametrize(("arguments", "millions"), COUNTS.values(), ids=COUNTS)
def test_has_as_many_parameters_as_published(arguments, millions):
    with torch.device("meta"):
        model = SSMVideoUNet(**arguments)
    found = sum(p.numel() for p in model.parameters())
    if model.frame_bias is None:
        found += 32 * arguments.get("heads", 8)  # the published scans carry the table of frame positions, unused
    assert round(found / 1e6, 2 if millions < 100 else 1) == millions


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_it_predicts_the_same(kind, tmp_path):
    model = tiny(temporal=kind).eval()
    x, time = torch.randn(1, 3, 5, 8, 4), torch.tensor([7])
    model.save_pretrained(tmp_path)
    again = SSMVideoUNet.from_pretrained(tmp_path).eval()
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        assert torch.allclose(again(x, time).sample, model(x, time).sample, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_learns(kind):
    model = tiny(temporal=kind)
    model(torch.randn(2, 3, 4, 4, 4), torch.tensor([3.0, 200.0])).sample.square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradient_checkpointing_changes_nothing():
    model, x = tiny(temporal="attention"), torch.randn(1, 3, 3, 4, 4)
    gradients = []
    for use in (model.disable_gradient_checkpointing, model.enable_gradient_checkpointing):
        use()
        model.zero_grad()
        model(x, 5, return_dict=False)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert model.gradient_checkpointing
    assert all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(*gradients, strict=True))


def test_one_frame_and_one_number_for_the_time():
    model, x = tiny().eval(), torch.randn(2, 3, 1, 4, 4)
    with torch.no_grad():
        assert torch.equal(model(x, 9).sample, model(x, torch.tensor([9, 9])).sample)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_weights_and_autocast(kind):
    model, x = tiny(temporal=kind).eval(), torch.randn(1, 3, 6, 4, 4)
    with torch.no_grad():
        want = model(x, 3).sample
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, 3).sample
        short = model.to(torch.bfloat16)(x.bfloat16(), 3).sample
    for got in (mixed, short):
        assert got.dtype == torch.bfloat16
        assert (got.float() - want).norm() <= 0.05 * want.norm()


@pytest.mark.parametrize("variant", ["glu", "mlp", "gated", "mamba"])
@pytest.mark.parametrize("kind", ["s4d", "s6", "ssd"])
def test_one_way_layers_see_the_past_and_two_way_layers_all(kind, variant):
    x = torch.randn(1, 6, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = x.clone()
    other[:, 3] += 1
    for both in (False, True):
        config = TemporalConfig(kind=kind, variant=variant, bidirectional=both, state_size=4, hidden=8)
        layer = temporal_layer(config, 8).double()
        with torch.no_grad():
            changed = (layer(other) - layer(x)).abs().amax((0, 2, 3)) > 1e-10
        assert changed.tolist() == [both] * 3 + [True] * 3


def test_constants_of_the_scans_do_not_decay():
    for kind, spared in (("s4d", {"log_dt", "log_A_real", "A_imag"}), ("s6", {"A_log", "D"}), ("ssd", {"A_log", "D"})):
        model = tiny(temporal=kind)
        groups = {group["name"]: {id(p) for p in group["params"]} for group in parameter_groups(model, 0.1)}
        named = {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in spared}
        assert named
        assert all(id(p) in groups["no_decay"] for p in named.values())


def test_a_position_bias_knows_distance_and_direction_but_not_place():
    bias = FramePositionBias(2)(40)
    assert torch.equal(bias[:, 3, 5], bias[:, 20, 22])
    assert not torch.equal(bias[:, 3, 5], bias[:, 5, 3])
    assert torch.equal(bias[:, 39, 0], bias[:, 38, 5])  # beyond the largest distance there is one bucket
    assert not torch.equal(bias[:, 20, 10], bias[:, 20, 4])  # up to there, buckets grow


def test_rotation_leaves_products_a_function_of_the_distance():
    q, k = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)), torch.randn(1, 48)
    scores = rotate(q.expand(9, 48)) @ rotate(k.expand(9, 48)).T
    assert (scores.diagonal(2) - scores[0, 2]).abs().max() < 1e-4
    assert (scores[0, 1:] - scores[0, 0]).abs().min() > 1e-4
    assert torch.equal(rotate(q.expand(9, 48))[:, 32:], q.expand(9, 48)[:, 32:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 7}, "dim: got 7"),
        ({"dim": 10}, r"divisible by groups \(4\)"),
        ({"dim_mults": ()}, "dim_mults"),
        ({"temporal": "lstm"}, "temporal kind: got 'lstm'"),
        ({"variant": "lstm"}, "temporal variant"),
        ({"state_size": 5}, "even number of states"),
    ],
)
def test_messages_of_the_network(arguments, message):
    with pytest.raises(UserError, match=message):
        tiny(**arguments)


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 3, 4, 4), "frames"), ((1, 1, 2, 4, 4), "3 channels"), ((1, 3, 2, 4, 5), "multiples of 2")],
)
def test_messages_of_the_input(shape, message):
    with pytest.raises(UserError, match=message):
        tiny()(torch.zeros(shape), 0)


class Oracle:
    """Knows the clean video, hence the noise in any noisy one."""

    def __init__(self, clean: Tensor, timesteps: int) -> None:
        self.clean, self.schedule = clean, CosineSchedule.of(timesteps)

    def __call__(self, sample: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        signal = self.schedule.sqrt_alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        noise = self.schedule.sqrt_one_minus_alphas_cumprod[timestep].view(-1, 1, 1, 1, 1)
        return ((sample - signal * self.clean) / noise,)


@pytest.mark.parametrize("percentile", [None, 1.0])
def test_sampling_with_the_true_noise_ends_at_the_video(percentile):
    video = torch.rand(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    process = PublishedDiffusion(20)
    drawn = process.sample(
        Oracle(2 * video - 1, 20), (2, 1, 3, 4, 4), generator=torch.manual_seed(0), percentile=percentile
    )
    assert (drawn - video).abs().max() < 1e-4


def test_loss_is_that_of_the_predicted_noise():
    video, process = torch.rand(3, 1, 2, 4, 4), PublishedDiffusion(20)
    assert process.loss(Oracle(2 * video - 1, 20), video) < 1e-6

    def silent(sample: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        return (torch.zeros_like(sample),)

    video = torch.rand(64, 1, 2, 8, 8)
    assert abs(process.loss(silent, video, generator=torch.manual_seed(0)) - 1) < 0.05
    absolute = process.loss(silent, video, kind="l1", generator=torch.manual_seed(0))
    assert abs(absolute - (2 / torch.pi) ** 0.5) < 0.05


def test_noisy_videos_have_the_variance_of_the_schedule():
    process, clean = PublishedDiffusion(256), torch.full((3, 1, 1, 1, 1), 0.5)
    noisy = process.add_noise(clean, torch.ones_like(clean), torch.tensor([0, 128, 255])).flatten()
    kept = process.schedule.alphas_cumprod[[0, 128, 255]]
    assert torch.allclose(noisy, 0.5 * kept.sqrt() + (1 - kept).sqrt())


def test_a_sample_does_not_depend_on_its_batch():
    model, process = tiny().eval(), PublishedDiffusion(3)
    seeds = [torch.Generator().manual_seed(s) for s in (1, 2)]
    both = process.sample(model, (2, 3, 4, 4, 4), generator=seeds)
    alone = process.sample(model, (1, 3, 4, 4, 4), generator=[torch.Generator().manual_seed(2)])
    assert (both[1:] - alone).abs().max() <= 1e-4


def test_the_network_learns():
    model, process = tiny(), PublishedDiffusion(16)
    video = torch.linspace(0, 1, 4).view(1, 1, 4, 1, 1).expand(4, 3, 4, 4, 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for step in range(25):
        optimizer.zero_grad()
        loss = process.loss(model, video, generator=torch.manual_seed(step % 5))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_messages_of_the_process():
    with pytest.raises(UserError, match="timesteps: got 0"):
        PublishedDiffusion(0)
    with pytest.raises(UserError, match="percentile: got 90"):
        PublishedDiffusion(2).sample(tiny(), (1, 3, 1, 4, 4), percentile=90)
