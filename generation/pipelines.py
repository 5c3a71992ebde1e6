"""From noise to pictures and videos: diffusers pipelines around a DiM, in pixel space or in the latents of a VAE."""

import contextlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import diffusers
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from diffusers.video_processor import VideoProcessor
from packaging.version import Version
from safetensors import SafetensorError
from torch import Tensor

from generation.conditioning import check_labels
from generation.dim import DiM
from generation.objectives import check_scheduler
from generation.sampling import Generators, Guidance, check_guidance, denoise, set_steps
from vision_ssm.errors import UserError

# Shapes: B batch, F frames, C channels, H/W height and width.

OutputType = Literal["pil", "np", "pt", "latent"]
Labels = int | str | Sequence[int | str] | Tensor | None
StepCallback = Callable[[DiffusionPipeline, int, Tensor, dict[str, Tensor]], dict[str, Tensor]]
_DTYPE = "dtype" if Version(diffusers.__version__) >= Version("0.42.1") else "torch_dtype"  # the old name warns there
DECODED_AT_ONCE = 16
"""Pictures that go through a VAE together; every one is decoded by itself, so the result does not depend on it."""


class DiMPipelineBase(DiffusionPipeline):
    """What images and videos share: components, labels, sizes, the loop, VAE."""

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    transformer: DiM
    scheduler: Any
    vae: Any

    def __init__(
        self,
        transformer: DiM,
        scheduler: SchedulerMixin,
        vae: AutoencoderKL | None = None,
        id2label: dict[str, str] | dict[int, str] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae)
        names = {int(number): name for number, name in (id2label or {}).items()}
        self.register_to_config(id2label={str(number): name for number, name in names.items()} or None)
        self.labels = {name: number for number, name in sorted(names.items())}
        """Class name -> number."""
        self.vae_scale_factor = 1 if vae is None else 2 ** (len(vae.config["block_out_channels"]) - 1)

    def get_label_ids(self, labels: Labels) -> Tensor | None:
        """Class numbers (B,) of numbers or names; None for None.

        Raises:
            UserError: The model has no classes, or not that one.
        """
        if labels is None:
            return None
        classes = self.transformer.config["num_classes"]
        if classes is None:
            raise UserError("this model was trained without classes; leave class_labels away")
        given = [labels] if isinstance(labels, int | str) else list(labels)
        ids = torch.tensor([self._label_id(label) for label in given], dtype=torch.long)
        if not len(ids):
            raise UserError("class_labels is empty; give at least one class, or None")
        check_labels(ids, classes, no_class=False)
        return ids.to(self._execution_device)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to pixels in [-1, 1]: (N, C, H, W) -> (N, 3, H', W'); pixel-space samples stay as they are."""
        if self.vae is None:
            return latents
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        scaled = (latents / self.vae.config.scaling_factor + shift).to(self.vae.dtype)
        return torch.cat([self.vae.decode(part).sample.float() for part in scaled.split(DECODED_AT_ONCE)])

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels in [-1, 1] to latents, the opposite of ``decode``: (N, 3, H', W') -> (N, C, H, W)."""
        if self.vae is None:
            return pixels
        shift = getattr(self.vae.config, "shift_factor", None) or 0.0
        parts = pixels.to(self.vae.dtype).split(DECODED_AT_ONCE)
        latents = torch.cat([self.vae.encode(part).latent_dist.mode().float() for part in parts])
        return (latents - shift) * self.vae.config.scaling_factor

    def latent_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width of what the model denoises, from those of the pictures or the model's own.

        Raises:
            UserError: The model cannot make that size.
        """
        own = self.transformer.config["sample_size"]
        own = (own, own) if isinstance(own, int) else tuple(own)
        factor, patch = self.vae_scale_factor, self.transformer.config["patch"]
        pixels = (height or own[0] * factor, width or own[1] * factor)
        multiple = factor * patch
        if min(pixels) < multiple or pixels[0] % multiple or pixels[1] % multiple:
            raise UserError(
                f"height and width must be multiples of {multiple} (patch {patch} x VAE factor {factor}), "
                f"got {pixels[0]} x {pixels[1]}"
            )
        return pixels[0] // factor, pixels[1] // factor

    def _label_id(self, label: int | str | Tensor) -> int:
        if not isinstance(label, str):
            return int(label)
        if label not in self.labels:
            last = self.transformer.config["num_classes"] - 1
            known = ", ".join(self.labels) or f"none has a name, give 0 to {last}"
            raise UserError(f"there is no class {label!r}; classes: {known}")
        return self.labels[label]

    def _rows(self, labels: Tensor | None, batch_size: int, generator: Generators) -> int:
        if batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        rows = batch_size if labels is None else len(labels)
        if labels is not None and batch_size not in (1, rows):
            raise UserError(f"batch_size is {batch_size} but there are {rows} class_labels; give one of the two")
        if isinstance(generator, list) and len(generator) != rows:
            raise UserError(f"there are {len(generator)} generators for {rows} samples; give one per sample")
        return rows

    def _sample(
        self,
        shape: tuple[int, ...],
        labels: Tensor | None,
        guidance: Guidance,
        *,
        steps: int,
        generator: Generators,
        latents: Tensor | None,
        callback: StepCallback | None,
        callback_inputs: Sequence[str],
    ) -> Tensor:
        """Denoised latents of that shape, in float32."""
        check_scheduler(self.transformer.config["objective"], self.scheduler)
        check_guidance(guidance, labels)
        _check_callback(callback_inputs)
        device = self._execution_device
        if latents is None:
            latents = randn_tensor(shape, generator, device, torch.float32)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents must be {shape}, got {tuple(latents.shape)}")
        timesteps = set_steps(self.scheduler, steps, device)
        no_class = self.transformer.config["num_classes"]
        with self.progress_bar(total=len(timesteps)) as bar:  # pyright: ignore[reportAttributeAccessIssue]

            def predict(x: Tensor, t: Tensor) -> Tensor:
                return guidance.predict(self._predict, x, t, labels, no_class)

            def after_step(i: int, t: Tensor, x: Tensor) -> Tensor:
                bar.update()
                return x if callback is None else callback(self, i, t, {"latents": x}).pop("latents", x)

            return denoise(
                self.scheduler, latents.to(device), timesteps, predict, generator=generator, after_step=after_step
            )

    def _predict(self, x: Tensor, timestep: Tensor, labels: Tensor | None) -> Tensor:
        return self.transformer(x.to(self.transformer.dtype), timestep, labels).sample


class DiMPipeline(DiMPipelineBase):
    """Images from a DiM.

    Args:
        transformer: The model.
        scheduler: One that fits what the model predicts, see ``generation.objectives``.
        vae: Turns latents into pixels; None for a model of pixels.
        id2label: Names of the classes, {0: "river", ...}.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Draw images.

        Args:
            class_labels: One class per image, numbers or names; None for images of no particular class.
            batch_size: Number of images when there are no ``class_labels``.
            height: In pixels; None for the model's own.
            width: As ``height``.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Above 1 the class is stressed.
            guidance_interval: Noise levels from 0 (clean) to 1 (noise) between which it is.
            generator: Source of noise. A list with one per image (``sample_generators``) makes every image
                independent of the batch it is drawn in.
            latents: Noise to start from, (B, C, H, W) of the model's input.
            output_type: ``pil``, ``np`` (B, H, W, C), ``pt`` (B, C, H, W), both in [0, 1], or ``latent``.
            return_dict: False for a tuple.
            callback_on_step_end: Called as (pipeline, step, noise level, {"latents": ...}) after every step; what
                it returns under "latents" is gone on with.
            callback_on_step_end_tensor_inputs: Only "latents" exists.

        Returns:
            ``.images``.

        Raises:
            UserError: A class, size, scheduler or number does not fit; says what does.
        """
        _check_output_type(output_type)
        labels = self.get_label_ids(class_labels)
        shape = (
            self._rows(labels, batch_size, generator),
            self.transformer.config["in_channels"],
            *self.latent_size(height, width),
        )
        samples = self._sample(
            shape, labels, Guidance(guidance_scale, guidance_interval), steps=num_inference_steps,
            generator=generator, latents=latents, callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if output_type != "latent":
            samples = VaeImageProcessor().postprocess(self.decode(samples), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=samples) if return_dict else (samples,)  # pyright: ignore[reportArgumentType]


@dataclass
class VideoPipelineOutput(BaseOutput):
    """What ``VideoDiMPipeline`` gives."""

    frames: Any
    """A list of frames per video for ``pil``, (B, F, H, W, C) for ``np``, (B, F, C, H, W) for ``pt``, all in [0, 1];
    (B, C, F, H, W) for ``latent``."""


class VideoDiMPipeline(DiMPipelineBase):
    """Videos from a DiM; for those of causal models, which have no end, see ``generation.streaming``.

    Args:
        transformer: The model.
        scheduler: One that fits what the model predicts, see ``generation.objectives``.
        vae: Turns the latents of every frame into pixels; None for a model of pixels.
        id2label: Names of the classes, {0: "river", ...}.
    """

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels = None,
        *,
        batch_size: int = 1,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> VideoPipelineOutput | tuple[Any]:
        """Draw videos, all frames together; warns where the model was made to draw one after the other.

        Args:
            class_labels: As in ``DiMPipeline``, one per video, like all that follow.
            batch_size: Number of videos when there are no ``class_labels``.
            num_frames: None for the model's own.
            height: In pixels; None for the model's own.
            width: As ``height``.
            num_inference_steps: Steps of the scheduler.
            guidance_scale: Above 1 the class is stressed.
            guidance_interval: Noise levels from 0 to 1 between which it is.
            generator: Source of noise; a list has one per video.
            latents: Noise to start from, (B, C, F, H, W) of the model's input.
            output_type: ``pil``, ``np``, ``pt`` or ``latent``, see ``VideoPipelineOutput``.
            return_dict: False for a tuple.
            callback_on_step_end: As in ``DiMPipeline``.
            callback_on_step_end_tensor_inputs: Only "latents" exists.

        Returns:
            ``.frames``.

        Raises:
            UserError: A class, size, scheduler or number does not fit; says what does.
        """
        _check_output_type(output_type)
        labels = self.get_label_ids(class_labels)
        frames = self.transformer.config["sample_frames"] if num_frames is None else num_frames
        if frames < 1:
            raise UserError(f"num_frames must be at least 1, got {frames}")
        if self.transformer.can_stream:
            warnings.warn(
                "this model was trained to draw one frame after the other, all at once they do not fit together: use "
                "generation.VideoStream(pipe, ...)",
                stacklevel=3,  # beyond torch.no_grad
            )
        shape = (
            self._rows(labels, batch_size, generator),
            self.transformer.config["in_channels"],
            frames,
            *self.latent_size(height, width),
        )
        samples = self._sample(
            shape, labels, Guidance(guidance_scale, guidance_interval), steps=num_inference_steps,
            generator=generator, latents=latents, callback=callback_on_step_end,
            callback_inputs=callback_on_step_end_tensor_inputs,
        )  # fmt: skip
        if output_type != "latent":
            pixels = self.decode(samples.transpose(1, 2).flatten(0, 1)).unflatten(0, (shape[0], frames))
            samples = VideoProcessor().postprocess_video(pixels.transpose(1, 2), output_type)
        self.maybe_free_model_hooks()
        return VideoPipelineOutput(frames=samples) if return_dict else (samples,)


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """Without diffusers' bar over the parts of a pipeline, which load in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def load_pipeline(folder: str | Path, *, torch_dtype: torch.dtype | None = None) -> DiMPipeline | VideoDiMPipeline:
    """Read what ``save_pretrained`` of a pipeline wrote; never looks at the network.

    Args:
        folder: With ``model_index.json`` and one folder per component.
        torch_dtype: Of the weights, None as stored.

    Raises:
        UserError: No such folder, not one of our pipelines, or damaged.
    """
    folder = Path(folder)
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{folder} holds no pipeline (no {index.name}); give a folder that save_pretrained wrote")
    kinds = {kind.__name__: kind for kind in (DiMPipeline, VideoDiMPipeline)}
    try:
        name = json.loads(index.read_text(encoding="utf-8"))["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged: {error}") from None
    if name not in kinds:
        raise UserError(f"{folder} holds a {name}; here only {' and '.join(kinds)} are read")
    options: dict[str, Any] = {"local_files_only": True}
    if torch_dtype is not None:
        options[_DTYPE] = torch_dtype
    try:
        model, found = DiM.from_pretrained(folder / "transformer", output_loading_info=True, **options)  # pyright: ignore[reportGeneralTypeIssues]
        strangers = [*found["missing_keys"], *found["unexpected_keys"]]
        if not strangers:
            with _without_bars():
                return kinds[name].from_pretrained(folder, transformer=model, **options)
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"the pipeline in {folder} is damaged or incomplete: {error}") from error
    raise UserError(
        f"weights and config.json in {folder / 'transformer'} are of different models; they differ in "
        f"{', '.join(strangers[:4])}{', ...' if len(strangers) > 4 else ''}"
    )


def _check_output_type(output_type: str) -> None:
    if output_type not in get_args(OutputType):
        raise UserError(f"output_type must be one of {', '.join(get_args(OutputType))}, got {output_type!r}")


def _check_callback(names: Sequence[str]) -> None:
    wrong = [name for name in names if name != "latents"]
    if wrong:
        raise UserError(f"callback_on_step_end_tensor_inputs can only hold 'latents', got {', '.join(wrong)}")
