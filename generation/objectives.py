"""What a diffusion model learns to predict, and which of diffusers' schedulers sample from it.

``flow`` (rectified flow, the default): x_t = (1 - s) x0 + s noise with s = t / 1000, the net predicts noise - x0.
``eps``, ``x0``, ``v``: x_t = sqrt(a_t) x0 + sqrt(1 - a_t) noise over 1,000 steps; the net predicts the noise, the clean
sample or sqrt(a_t) noise - sqrt(1 - a_t) x0, with the min-SNR weight of Hang et al. (2303.09556, section 3.4).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler
from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from vision_ssm.errors import UserError

# Shapes: B batch, F frames. Noise levels are (B,), or (B, F) where every frame has its own.

ObjectiveName = Literal["flow", "eps", "x0", "v"]
ScheduleName = Literal["cosine", "linear"]
STEPS = 1000
"""Noise levels run from 0 (clean) to this number, whatever the objective."""

_PREDICTION = {"flow": "flow_prediction", "eps": "epsilon", "x0": "sample", "v": "v_prediction"}
_BETAS: dict[str, Any] = {"cosine": "squaredcos_cap_v2", "linear": "linear"}
_FLOW_SAMPLERS = ("euler", "heun", "dpm++", "unipc")
_STEP_SAMPLERS = ("dpm++", "ddim", "ddpm", "unipc")
_COSINE_LAMBDA_MIN = -5.1  # diffusers' advice for DPM-Solver on the cosine schedule, whose last step is infinite


@dataclass(frozen=True)
class Objective:
    """A way to noise samples, the target that belongs to it and its weight in the loss.

    Raises:
        UserError: A value that is not allowed.
    """

    kind: ObjectiveName = "flow"
    """What the model predicts; must equal ``DiM(objective=...)``."""
    schedule: ScheduleName = "cosine"
    """Noise schedule of eps, x0 and v."""
    shift: float = 1.0
    """Of flow: above 1 spends more on high noise, s -> shift s / (1 + (shift - 1) s), as large images need."""
    min_snr_gamma: float = 5.0
    """Of eps, x0 and v: signal-to-noise ratios above it count no more."""
    sampler_shift: float | None = None
    """The same of the samplers; None for ``shift``."""
    clip_sample: bool = True
    """Of eps, x0 and v: samplers keep the clean sample in [-1, 1]. Right for pixels, wrong for latents."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(ObjectiveName):
            raise UserError(f"objective must be one of {', '.join(get_args(ObjectiveName))}, got {self.kind!r}")
        if self.schedule not in get_args(ScheduleName):
            raise UserError(f"noise schedule must be cosine or linear, got {self.schedule!r}")
        for name in ("shift", "min_snr_gamma", "sampler_shift"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise UserError(f"{name} must be above 0, got {value}")

    def sample_timesteps(
        self,
        shape: int | tuple[int, ...],
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Draw noise levels for training: logit-normal (0, 1) for flow, uniform whole steps for the others.

        Args:
            shape: B, (B,) or (B, F).
            generator: Source of randomness; the numbers are drawn on its device.
            device: Of the result.

        Returns:
            What the model takes as ``timestep``: float32 for flow, int64 for the others.
        """
        shape = (shape,) if isinstance(shape, int) else shape
        source = device if generator is None else generator.device
        if self.kind != "flow":
            return torch.randint(0, STEPS, shape, generator=generator, device=source).to(device)
        s = torch.randn(shape, generator=generator, device=source).sigmoid()
        return (STEPS * self.shift * s / (1 + (self.shift - 1) * s)).to(device)

    def add_noise(self, x0: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Noise clean samples and say what the model should answer.

        Args:
            x0: (B, C, H, W), or (B, C, F, H, W).
            t: Noise levels (B,), or (B, F) for videos.
            noise: Standard normal, shaped as ``x0``.

        Returns:
            The noisy samples, the target, and its weight, which broadcasts over them:
            ``loss = (weight * (model(noisy, t).sample - target) ** 2).mean()``.
        """
        t = per_sample(t, x0)
        if self.kind == "flow":
            s = (t / STEPS).to(x0.dtype)
            return torch.lerp(x0, noise, s), noise - x0, torch.ones_like(s)
        alpha = _alphas_cumprod(self.schedule).to(x0.device)[t.long()]
        signal, noise_part = alpha.sqrt().to(x0.dtype), (1 - alpha).sqrt().to(x0.dtype)
        noisy = signal * x0 + noise_part * noise
        target = {"eps": noise, "x0": x0, "v": signal * noise - noise_part * x0}[self.kind]
        return noisy, target, self._weight(alpha / (1 - alpha)).to(x0.dtype)

    @property
    def schedulers(self) -> tuple[str, ...]:
        """Names that ``scheduler`` takes, the default first."""
        return _FLOW_SAMPLERS if self.kind == "flow" else _STEP_SAMPLERS

    def scheduler(self, name: str | None = None) -> SchedulerMixin:
        """diffusers' scheduler of that name, set up for this objective; the default of ``schedulers`` for None.

        Raises:
            UserError: The name does not exist or belongs to another objective.
        """
        name = self.schedulers[0] if name is None else name
        if name not in self.schedulers:
            raise UserError(
                f"no scheduler {name!r} for the objective {self.kind!r}; there are {', '.join(self.schedulers)}"
            )
        return self._flow_scheduler(name) if self.kind == "flow" else self._step_scheduler(name)

    def _flow_scheduler(self, name: str) -> SchedulerMixin:
        shift = self.shift if self.sampler_shift is None else self.sampler_shift
        if name == "euler":
            return FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=shift)
        if name == "heun":
            return FlowMatchHeunDiscreteScheduler(num_train_timesteps=STEPS, shift=shift)
        solver = DPMSolverMultistepScheduler if name == "dpm++" else UniPCMultistepScheduler
        return solver(
            num_train_timesteps=STEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )

    def _step_scheduler(self, name: str) -> SchedulerMixin:
        shared: dict[str, Any] = {
            "num_train_timesteps": STEPS,
            "beta_schedule": _BETAS[self.schedule],
            "prediction_type": _PREDICTION[self.kind],
        }
        if name in ("ddim", "ddpm"):
            kind = DDIMScheduler if name == "ddim" else DDPMScheduler
            return kind(**shared, clip_sample=self.clip_sample, timestep_spacing="trailing")
        # with sample_max_value 1 their dynamic thresholding is a plain clip to [-1, 1]
        shared |= {"thresholding": self.clip_sample, "sample_max_value": 1.0}
        if name == "unipc":
            return UniPCMultistepScheduler(**shared)
        lowest = _COSINE_LAMBDA_MIN if self.schedule == "cosine" else -float("inf")
        return DPMSolverMultistepScheduler(**shared, lambda_min_clipped=lowest)

    def _weight(self, snr: Tensor) -> Tensor:
        """min(SNR, gamma) in the loss of x0, expressed for what is predicted."""
        capped = snr.clamp(max=self.min_snr_gamma)
        return {"eps": capped / snr, "x0": capped, "v": capped / (snr + 1)}[self.kind]


def per_sample(t: Tensor, like: Tensor) -> Tensor:
    """Noise levels (B,) or (B, F), shaped so that they broadcast over (B, C, H, W) or (B, C, F, H, W).

    Raises:
        UserError: They are not one per sample, nor one per frame.
    """
    if t.shape == like.shape[:1]:
        return t.view(-1, *[1] * (like.ndim - 1))
    if like.ndim == 5 and t.shape == (like.shape[0], like.shape[2]):
        return t.view(like.shape[0], 1, -1, 1, 1)
    raise UserError(
        f"noise levels must be one per sample or one per frame of {tuple(like.shape)}, got {tuple(t.shape)}"
    )


def check_scheduler(objective: str, scheduler: Any) -> None:
    """Refuse a scheduler that takes the model's output for something else.

    Args:
        objective: What the model predicts, ``model.config.objective``.
        scheduler: Any of diffusers' schedulers.

    Raises:
        UserError: They do not fit; names a scheduler that does.
    """
    is_flow = type(scheduler).__name__.startswith("FlowMatch")
    expects = "flow_prediction" if is_flow else scheduler.config.get("prediction_type", "epsilon")
    wanted = _PREDICTION[objective]
    if expects == wanted == "flow_prediction" and not is_flow and not scheduler.config.get("use_flow_sigmas"):
        raise UserError(
            f"{type(scheduler).__name__} is set to flow_prediction without flow sigmas; pass use_flow_sigmas=True"
        )
    if expects != wanted:
        raise UserError(
            f"{type(scheduler).__name__} expects a model that predicts {expects!r}, but this one was trained for "
            f"{objective!r} ({wanted!r}); take one from Objective({objective!r}).scheduler()"
        )


def sample_generators(seeds: Iterable[int]) -> list[torch.Generator]:
    """One source of noise per sample, on the CPU: what is drawn depends on its own seed alone.

    Not on the other samples of a batch, nor on the device. Give the list to a pipeline as ``generator``.
    """
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


@lru_cache(maxsize=2)
def _alphas_cumprod(schedule: ScheduleName) -> Tensor:
    """(1000,) products of 1 - beta as diffusers has them, in float64."""
    betas = DDPMScheduler(num_train_timesteps=STEPS, beta_schedule=_BETAS[schedule]).betas
    return (1 - betas.double()).cumprod(0)
