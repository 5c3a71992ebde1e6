"""The machine under a run: devices, processes, memory."""

import os
from datetime import timedelta

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.state import AcceleratorState
from torch import nn

from vision_ssm.errors import UserError
from vision_ssm.training.config import TrainConfig

_GONE = ("closed by peer", "reset by peer", "Broken pipe")
"""What gloo, whose errors have no class of their own, says of a process that has ended."""


def is_main_process() -> bool:
    """Whether this is the process that prints and writes: the only one, or the first of those torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Device, precision and processes of a run, from its config and from torchrun's environment variables.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    cuda = torch.cuda.is_available()
    if config.device == "cuda" and not cuda:
        raise UserError("device is cuda, but torch sees no GPU; use device cpu or auto, or check with `vssm doctor`")
    # accelerate keeps device and precision of the first Accelerator of a process; a second run may want others
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=config.device == "cpu" or not cuda,
        mixed_precision="bf16" if config.precision == "bf16" else "no",
        # the other processes wait while the main one evaluates
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )


def train_mode(model: nn.Module) -> None:
    """Training mode, but for modules whose own parameters are all frozen: their statistics stay as they are too."""
    model.train()
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.eval()


def lost_peer(error: RuntimeError) -> bool:
    """Whether an error in one process only says that another one is gone."""
    kinds = (torch.distributed.DistNetworkError, torch.distributed.DistBackendError)
    return isinstance(error, kinds) or any(sign in str(error) for sign in _GONE)


def out_of_memory_message(config: TrainConfig, accelerator: Accelerator) -> str:
    """What happened, and what to lower."""
    memory = ""
    if accelerator.device.type == "cuda":
        memory = f" of {torch.cuda.get_device_properties(accelerator.device).total_memory / 2**30:.0f} GiB"
    keep = config.nominal_batch or config.batch_size
    return (
        f"out of GPU memory with batch_size {config.batch_size} on {accelerator.num_processes} device(s)"
        f"{memory}: lower batch_size (with nominal_batch {keep} the step stays the same), the image size, or "
        f"use precision bf16 (now {config.precision}). A checkpoint already written is kept"
    )
