"""A trained generator from disk: a run's checkpoint of `vssm generate train`, or a pipeline that was saved."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from generation.dim import DiM
from generation.objectives import Objective, sample_generators
from generation.pipelines import DiMPipeline, VideoDiMPipeline, load_pipeline
from generation.streaming import VideoStream
from vision_ssm.checkpoint import WEIGHTS_FILE, load_checkpoint, load_matching
from vision_ssm.config import near_match
from vision_ssm.errors import UserError
from vision_ssm.files import check_new, shipped_or_path

Pipeline = DiMPipeline | VideoDiMPipeline
_SHIPPED = Path(__file__).parent / "weights"


def find_weights(place: str | Path) -> Path:
    """A file or folder that exists, or the folder of shipped weights of that name; else the path as it is."""
    return shipped_or_path(place, _SHIPPED)


def shipped_names() -> list[str]:
    """Names of the weights that ship."""
    return sorted(folder.name for folder in _SHIPPED.iterdir() if folder.is_dir())


def load_generator(path: str | Path, *, scheduler: str | None = None) -> Pipeline:
    """Read a generator.

    Args:
        path: checkpoint folder or file of a run, or a folder that `save_pretrained` wrote.
        scheduler: sampler by name (`Objective.schedulers`); by default the run's or the folder's own.

    Raises:
        UserError: missing, damaged, something else, or a sampler of another objective.
    """
    path = find_weights(path)
    if not path.exists():
        raise UserError(
            f"no generator at {path}: give a run's checkpoint, the folder of a pipeline, or a shipped name "
            f"({', '.join(shipped_names())}){near_match(str(path), shipped_names())}"
        )
    if (path / "model_index.json").is_file():
        pipeline = load_pipeline(path, torch_dtype=torch.float32)  # shipped weights are stored in half precision
        if scheduler is not None:
            pipeline.scheduler = _objective_of(pipeline).scheduler(scheduler)
        return pipeline
    return pipeline_from(*load_checkpoint(path), path, scheduler=scheduler)


def _objective_of(pipeline: Pipeline) -> Objective:
    """What a saved pipeline's model predicts, with the noise schedule of its own sampler."""
    sampler: Any = pipeline.scheduler.config
    schedule = "linear" if sampler.get("beta_schedule") == "linear" else "cosine"
    shift = sampler.get("shift") or sampler.get("flow_shift") or 1.0
    model: Any = pipeline.transformer.config
    return Objective(model.objective, schedule, shift, clip_sample=pipeline.vae is None)


def pipeline_from(
    weights: Mapping[str, Tensor], config: Mapping[str, Any], source: str | Path, *, scheduler: str | None = None
) -> Pipeline:
    """The pipeline of a run's checkpoint, on the CPU.

    Raises:
        UserError: the checkpoint is no generator's.
    """
    if config.get("task") != "generate":
        raise UserError(f"{source} is no generator; train one with `vssm generate train`")
    model = DiM(**config["model"])
    load_matching(model, weights).require_complete(source)
    return build_pipeline(model.eval(), config, scheduler=scheduler)


def build_pipeline(model: DiM, config: Mapping[str, Any], *, scheduler: str | None = None) -> Pipeline:
    """A pipeline around a model, as the `config.json` of its run says (keys objective, classes, vae, video)."""
    objective = Objective(**config["objective"])
    kind = VideoDiMPipeline if config["video"] else DiMPipeline
    names = dict(enumerate(config["classes"])) or None
    return kind(model, objective.scheduler(scheduler), vae=load_vae(config["vae"]), id2label=names)  # type: ignore[arg-type]


def load_vae(folder: str | Path | None) -> Any:
    """diffusers' AutoencoderKL from a local folder; None for None.

    Raises:
        UserError: no such folder, or damaged.
    """
    if folder is None:
        return None
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"{folder} holds no AutoencoderKL: there is no config.json; give a folder of diffusers")
    try:
        return AutoencoderKL.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UserError(f"the AutoencoderKL in {folder} is damaged: {error}") from None


def weights_hash(path: str | Path) -> str:
    """SHA-256 of all weight files of a checkpoint or pipeline folder, or of shipped weights, for reports."""
    root = find_weights(path)
    files = [root] if root.is_file() else sorted(root.rglob("*.safetensors"))
    if (root / WEIGHTS_FILE).is_file():
        files = [root / WEIGHTS_FILE]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def run_pack(weights: Path, output: Path) -> int:
    """Write a generator in half precision; `load_generator` gives it back in single.

    Raises:
        UserError: no generator there, or a folder that cannot be written.
    """
    pipeline = load_generator(weights)
    check_new(output)
    exact = set(DiM._keep_in_fp32_modules)
    for name, parameter in pipeline.transformer.named_parameters():
        if name.rpartition(".")[2] not in exact:
            parameter.data = parameter.data.half()
    pipeline.save_pretrained(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    print(f"{type(pipeline).__name__} in {output}, {size / 1e6:.2f} MB")
    return 0


def draw(
    pipeline: Pipeline,
    labels: list[int] | None,
    seeds: list[int],
    *,
    steps: int,
    first_steps: int | None = None,
    guidance: float = 1.0,
    frames: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Draw samples; each depends on its own seed and class alone. A model that can stream draws frame after frame.

    Args:
        pipeline: of `load_generator`, on the device that computes.
        labels: a class per sample; None without classes.
        seeds: one per sample.
        steps: of the sampler.
        first_steps: of a stream's first two frames; by default `steps`.
        guidance: above 1 stresses the class.
        frames: length of clips; by default the model's.
        batch_size: samples that go through the network together.
        progress: a bar on a terminal.

    Returns:
        (n, C, H, W) or (n, F, C, H, W) uint8 on the CPU.
    """
    parts = []
    for start in range(0, len(seeds), batch_size):
        chosen = slice(start, start + batch_size)
        given = None if labels is None else labels[chosen]
        named = f"samples {start + 1} to {start + len(seeds[chosen])} of {len(seeds)}"
        pipeline.set_progress_bar_config(desc=named, disable=None if progress else True)  # None: where nobody looks
        shared: dict[str, Any] = {
            "class_labels": given,
            "num_inference_steps": steps,
            "guidance_scale": guidance if labels is not None else 1.0,
        }
        if isinstance(pipeline, VideoDiMPipeline) and streams(pipeline):
            stream = VideoStream(pipeline, seeds=seeds[chosen], first_steps=first_steps, **shared)
            length = pipeline.transformer.config["sample_frames"] if frames is None else frames
            bar = tqdm(range(length), desc=f"frames of {named}", disable=None if progress else True)
            parts.append(torch.stack([_to_bytes(next(stream)) for _ in bar], dim=1))
            continue
        shared |= {"batch_size": len(seeds[chosen]), "generator": sample_generators(seeds[chosen]), "output_type": "pt"}
        if isinstance(pipeline, VideoDiMPipeline):
            found = pipeline(num_frames=frames, **shared).frames  # type: ignore[union-attr]
        else:
            found = pipeline(**shared).images  # type: ignore[union-attr]
        parts.append(_to_bytes(torch.as_tensor(found)))
    return torch.cat(parts)


def streams(pipeline: Pipeline) -> bool:
    """Whether samples are drawn frame after frame, as a causal model must: drawn at once, early frames could not take
    account of what the later ones turn into."""
    return isinstance(pipeline, VideoDiMPipeline) and pipeline.transformer.can_stream


def _to_bytes(samples: Tensor) -> Tensor:
    return (samples.cpu().float().clamp(0, 1) * 255).round().to(torch.uint8)
