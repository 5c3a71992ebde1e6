"""Objectives: noise, targets and weights against diffusers' own, and that every scheduler leads back to the sample."""

import itertools

import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from torch import Tensor

from generation.objectives import Objective, check_scheduler, sample_generators
from generation.sampling import Guidance, denoise, set_steps
from kernels.testing import assert_close
from vision_ssm.errors import UserError

KINDS = ("flow", "eps", "x0", "v")
PAIRS = [(kind, name) for kind in KINDS for name in Objective(kind).schedulers]


def perfect_answer(objective: Objective, clean: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """What a model that knows the clean sample predicts for x at noise level t."""
    if objective.kind == "flow":
        return (x - clean) / (t / 1000)
    alpha = DDPMScheduler(beta_schedule="squaredcos_cap_v2").alphas_cumprod.double()[t.long()].float()
    noise = (x - alpha.sqrt() * clean) / (1 - alpha).sqrt()
    return {"eps": noise, "x0": clean, "v": alpha.sqrt() * noise - (1 - alpha).sqrt() * clean}[objective.kind]


@pytest.mark.parametrize("kind, name", PAIRS)
def test_every_scheduler_leads_back_to_the_sample(kind, name):
    objective = Objective(kind)
    scheduler = objective.scheduler(name)
    check_scheduler(kind, scheduler)
    clean = 2 * torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)) - 1
    generators = sample_generators([1, 2])
    noise = torch.cat([torch.randn(1, 3, 4, 4, generator=generator) for generator in generators])
    timesteps = set_steps(scheduler, 20, noise.device)
    sample = denoise(
        scheduler, noise, timesteps, lambda x, t: perfect_answer(objective, clean, x, t), generator=generators
    )  # fmt: skip
    assert_close("sample", sample, clean, rel=0.02)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_noise_and_targets_are_those_of_diffusers(schedule):
    x0, noise = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    t = torch.tensor([0, 250, 600, 990])
    reference = Objective("v", schedule).scheduler("ddpm")
    for kind, target in (("eps", noise), ("x0", x0), ("v", reference.get_velocity(x0, noise, t))):
        noisy, got, _ = Objective(kind, schedule).add_noise(x0, t, noise)
        assert_close("noisy", noisy, reference.add_noise(x0, noise, t), rel=1e-5)
        assert_close(kind, got, target, rel=1e-5)


def test_flow_goes_straight_from_sample_to_noise():
    x0, noise = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    noisy, target, weight = Objective().add_noise(x0, torch.tensor([0.0, 500.0, 1000.0]), noise)
    assert_close("clean", noisy[0], x0[0], rel=1e-6)
    assert_close("half", noisy[1], (x0[1] + noise[1]) / 2, rel=1e-6)
    assert_close("noise", noisy[2], noise[2], rel=1e-6)
    assert_close("velocity", target, noise - x0, rel=1e-6)
    assert (weight == 1).all()


def test_min_snr_weighs_the_same_error_alike_for_all_predictions():
    x0, noise, wrong = torch.randn(5, 1, 2, 2).double(), torch.randn(5, 1, 2, 2).double(), 0.1
    t = torch.tensor([5, 100, 400, 700, 950])
    losses = {}
    for kind in ("eps", "x0", "v"):
        objective = Objective(kind)
        noisy, target, weight = objective.add_noise(x0, t, noise)
        alpha = objective.scheduler("ddpm").alphas_cumprod.double()[t].view(-1, 1, 1, 1)
        implied = (noisy - alpha.sqrt() * (x0 + wrong)) / (1 - alpha).sqrt()
        answer = {
            "eps": implied,
            "x0": x0 + wrong,
            "v": alpha.sqrt() * implied - (1 - alpha).sqrt() * (x0 + wrong),
        }[kind]
        losses[kind] = (weight * (answer - target) ** 2).mean((1, 2, 3))
    snr = (alpha / (1 - alpha)).flatten()
    assert_close("x0", losses["x0"], wrong**2 * snr.clamp(max=5.0), rel=1e-4)
    assert_close("eps", losses["eps"], losses["x0"], rel=1e-3)
    assert_close("v", losses["v"], losses["x0"], rel=1e-3)


def test_noise_levels_of_training():
    generator = torch.Generator().manual_seed(0)
    t = Objective().sample_timesteps(20000, generator=generator)
    logits = torch.logit(t / 1000)
    assert abs(logits.mean()) < 0.03
    assert abs(logits.std() - 1) < 0.03
    shifted = Objective(shift=3.0).sample_timesteps(20000, generator=torch.Generator().manual_seed(0))
    s = t / 1000
    assert_close("shift", shifted, 1000 * 3 * s / (1 + 2 * s), rel=1e-6)
    steps = Objective("eps").sample_timesteps((1000, 20), generator=generator)
    assert steps.shape == (1000, 20)
    assert steps.dtype == torch.int64
    assert (steps.min(), steps.max()) == (0, 999)


@pytest.mark.parametrize("kind", KINDS)
def test_every_frame_has_its_own_noise(kind):
    objective = Objective(kind)
    x0, noise = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    t = objective.sample_timesteps((2, 4), generator=torch.Generator().manual_seed(0))
    noisy, target, weight = objective.add_noise(x0, t, noise)
    assert weight.shape == (2, 1, 4, 1, 1)
    for f in range(4):
        one = objective.add_noise(x0[:, :, f], t[:, f], noise[:, :, f])
        for name, whole, frame in zip(("noisy", "target", "weight"), (noisy, target, weight), one, strict=True):
            assert_close(f"{name} {f}", whole[:, :, f], frame, rel=1e-6)


def test_a_seed_is_independent_of_the_others():
    def drawn(seeds):
        return [torch.randn(5, generator=generator) for generator in sample_generators(seeds)]

    assert torch.equal(drawn([7, 8])[1], drawn([8])[0])
    assert not torch.equal(*drawn([7, 8]))


@pytest.mark.parametrize("trained, scheduled", itertools.permutations(KINDS, 2))
def test_a_scheduler_of_another_objective_is_refused(trained, scheduled):
    for name in Objective(scheduled).schedulers:
        with pytest.raises(UserError, match=f"trained for '{trained}'"):
            check_scheduler(trained, Objective(scheduled).scheduler(name))


def test_flow_needs_flow_sigmas():
    with pytest.raises(UserError, match="use_flow_sigmas=True"):
        check_scheduler("flow", DPMSolverMultistepScheduler(prediction_type="flow_prediction"))


def test_schedulers_that_scale_their_input_work_too():
    """Euler of the variance-exploding kind is not among ours, but any of diffusers' may be put into a pipeline."""
    scheduler = EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    check_scheduler("eps", scheduler)
    clean, noise = torch.full((1, 1, 2, 2), 0.5), torch.randn(1, 1, 2, 2)
    objective = Objective("eps")
    sample = denoise(
        scheduler, noise, set_steps(scheduler, 30, noise.device),
        lambda x, t: perfect_answer(objective, clean, x, t), generator=None,
    )  # fmt: skip
    assert_close("sample", sample, clean, rel=0.02)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Objective("score"), "flow, eps, x0, v"),
        (lambda: Objective(schedule="sigmoid"), "cosine or linear"),
        (lambda: Objective(shift=0.0), "shift must be above 0"),
        (lambda: Objective(sampler_shift=-1.0), "sampler_shift must be above 0"),
        (lambda: Objective().scheduler("ddim"), "euler, heun, dpm\\+\\+, unipc"),
        (lambda: Objective("v").scheduler("euler"), "dpm\\+\\+, ddim, ddpm, unipc"),
        (lambda: Objective().add_noise(torch.zeros(2, 3, 4, 4), torch.zeros(3), torch.zeros(2, 3, 4, 4)), "one per"),
        (lambda: Guidance(0.5), "at least 1"),
        (lambda: Guidance(2.0, (0.5, 0.2)), "growing"),
    ],
)
def test_values_that_cannot_be(make, message):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "unipc"])
def test_samplers_may_spread_their_levels_as_the_training_did_not(name):
    own, same, plain = (
        Objective(**o).scheduler(name) for o in ({"shift": 3.0, "sampler_shift": 1.0}, {"shift": 3.0}, {})
    )
    for scheduler in (own, same, plain):
        scheduler.set_timesteps(8)
    assert torch.equal(own.sigmas, plain.sigmas)
    assert own.sigmas[-2] < same.sigmas[-2] / 2
