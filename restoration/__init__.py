"""Image restoration with Serpent and MambaIR. Names are imported on first use, so that the import stays quick."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from restoration.card import WeightsCard
    from restoration.convert import config_from_state_dict, from_official
    from restoration.mambair import MambaIR, MambaIRUNet
    from restoration.model import Serpent
    from restoration.pretrained import load_model, save_weights
    from restoration.restorer import PictureRestorer
    from restoration.stream import restore_streamed
    from restoration.summary import summarize

__all__ = [
    "MambaIR",
    "MambaIRUNet",
    "PictureRestorer",
    "Serpent",
    "WeightsCard",
    "config_from_state_dict",
    "from_official",
    "load_model",
    "restore_streamed",
    "save_weights",
    "summarize",
]

_HOMES = {
    "MambaIR": "restoration.mambair",
    "MambaIRUNet": "restoration.mambair",
    "PictureRestorer": "restoration.restorer",
    "Serpent": "restoration.model",
    "WeightsCard": "restoration.card",
    "config_from_state_dict": "restoration.convert",
    "from_official": "restoration.convert",
    "load_model": "restoration.pretrained",
    "restore_streamed": "restoration.stream",
    "save_weights": "restoration.pretrained",
    "summarize": "restoration.summary",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'restoration' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
