"""Images and videos by DiM and the SSM video U-Net. Names are imported on first use, so that the import stays quick."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from generation.convert import config_from_state_dict, from_official
    from generation.dim import DiM
    from generation.objectives import Objective
    from generation.pipelines import DiMPipeline, VideoDiMPipeline, load_pipeline
    from generation.published_diffusion import PublishedDiffusion
    from generation.streaming import VideoStream
    from generation.unet import SSMVideoUNet

__all__ = [
    "DiM",
    "DiMPipeline",
    "Objective",
    "PublishedDiffusion",
    "SSMVideoUNet",
    "VideoDiMPipeline",
    "VideoStream",
    "config_from_state_dict",
    "from_official",
    "load_pipeline",
]

_HOMES = {
    "DiM": "generation.dim",
    "DiMPipeline": "generation.pipelines",
    "Objective": "generation.objectives",
    "PublishedDiffusion": "generation.published_diffusion",
    "SSMVideoUNet": "generation.unet",
    "VideoDiMPipeline": "generation.pipelines",
    "VideoStream": "generation.streaming",
    "config_from_state_dict": "generation.convert",
    "from_official": "generation.convert",
    "load_pipeline": "generation.pipelines",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'generation' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
