"""`vssm generate encode`: pictures or clips as latents of a VAE, once, so that training need not do it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from generation.config import GenerateDataConfig
from generation.data import Samples, to_unit
from generation.generator import load_vae
from generation.sources import find_source
from vision_ssm.data.labelled import Split
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import replacing
from vision_ssm.training.batches import SampleKey


def run_encode(
    config: GenerateDataConfig, vae: Path, output: Path, *, split: Split = "train", batch_size: int = 32,
    device: str = "auto",
) -> int:  # fmt: skip
    """Encode a data set and write an .npz of latents, labels and classes; nothing is mirrored.

    Args:
        config: the data, as in training; of a video the first clip is taken.
        vae: folder of diffusers' AutoencoderKL.
        output: .npz file.
        split: train or val.
        batch_size: pictures (or frames) that are encoded together.
        device: auto, cpu or cuda.

    Raises:
        UserError: no data, no VAE, another ending, sizes that the VAE cannot halve.
    """
    if output.suffix != ".npz":
        raise UserError(f"latents are written as .npz, got {output}")
    network = load_vae(vae).to(choose_device(device))
    factor = 2 ** (len(network.config.block_out_channels) - 1)
    if config.side % factor:
        raise UserError(f"data.side {config.side} is not a multiple of {factor}, by which this VAE shrinks pictures")
    source = find_source(config, split)
    samples = Samples(source, config, augment=False)
    latents, labels = [], []
    for index in tqdm(range(len(samples)), desc="encode", leave=False, disable=None):
        sample, label = samples[SampleKey(0, 0, index)]
        latents.append(encoded(network, sample, batch_size).numpy().astype(np.float16))
        labels.append(label)
    arrays: dict[str, Any] = {"latents": np.stack(latents)}
    if samples.labelled:
        arrays |= {"labels": np.array(labels), "classes": np.array(source.classes)}
    with replacing(output) as temporary:
        np.savez(temporary, **arrays)
    print(f"{len(labels)} samples as latents {arrays['latents'].shape[1:]} in {output}")
    return 0


@torch.no_grad()
def encoded(vae: Any, sample: Tensor, batch_size: int) -> Tensor:
    """Scaled latents of a picture (3, S, S) -> (C, s, s), or of a clip (3, F, S, S) -> (C, F, s, s)."""
    video = sample.ndim == 4
    pictures = to_unit(sample.transpose(0, 1) if video else sample[None])
    device = next(vae.parameters()).device
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    parts = [vae.encode(part.to(device)).latent_dist.mode().float().cpu() for part in pictures.split(batch_size)]
    latents = (torch.cat(parts) - shift) * vae.config.scaling_factor
    return latents.transpose(0, 1) if video else latents[0]
