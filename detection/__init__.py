"""Object detection with Mamba-YOLO. Names are imported on first use, so that `import detection` stays quick."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detection.convert import config_from_state_dict, from_official
    from detection.head import decode
    from detection.loss import DetectionLoss
    from detection.model import MambaYOLO
    from detection.predict import Detector
    from detection.predict_options import PredictOptions
    from detection.summary import summarize

__all__ = [
    "DetectionLoss",
    "Detector",
    "MambaYOLO",
    "PredictOptions",
    "config_from_state_dict",
    "decode",
    "from_official",
    "summarize",
]

_HOMES = {
    "DetectionLoss": "detection.loss",
    "Detector": "detection.predict",
    "MambaYOLO": "detection.model",
    "PredictOptions": "detection.predict_options",
    "config_from_state_dict": "detection.convert",
    "decode": "detection.head",
    "from_official": "detection.convert",
    "summarize": "detection.summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'detection' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
