"""Seeing what a network's scans look at: recording, hidden attention, roll-out, attribution, perturbation tests.

Names are imported on first use, so that the command's menus stay quick.

```
with record(model) as recording:
    logits = model(images)
heats = attribution(recording, logits[:, 3])
heat = combine(heats, images.shape[-2:])        # (B, H, W)
```
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from vision_ssm.explain.maps import Heat, attribution, combine, hidden_attention, rollout
    from vision_ssm.explain.perturb import perturbation_test
    from vision_ssm.explain.recording import Layer, Recording, record

Method = Literal["raw", "rollout", "attribution"]

__all__ = [
    "Heat",
    "Layer",
    "Method",
    "Recording",
    "attribution",
    "combine",
    "hidden_attention",
    "perturbation_test",
    "record",
    "rollout",
]

_HOMES = {
    "Heat": "vision_ssm.explain.maps",
    "Layer": "vision_ssm.explain.recording",
    "Recording": "vision_ssm.explain.recording",
    "attribution": "vision_ssm.explain.maps",
    "combine": "vision_ssm.explain.maps",
    "hidden_attention": "vision_ssm.explain.maps",
    "perturbation_test": "vision_ssm.explain.perturb",
    "record": "vision_ssm.explain.recording",
    "rollout": "vision_ssm.explain.maps",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vision_ssm.explain' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
