"""Seeing what a network's scans look at: recording, hidden attention, roll-out, attribution, perturbation tests.

```
with record(model) as recording:
    logits = model(images)
heats = attribution(recording, logits[:, 3])
heat = combine(heats, images.shape[-2:])        # (B, H, W)
```
"""

from vision_ssm.explain.maps import Heat, attribution, combine, hidden_attention, rollout
from vision_ssm.explain.perturb import perturbation_test
from vision_ssm.explain.record import Layer, Recording, record

__all__ = [
    "Heat",
    "Layer",
    "Recording",
    "attribution",
    "combine",
    "hidden_attention",
    "perturbation_test",
    "record",
    "rollout",
]
