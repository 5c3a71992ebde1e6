"""The built-in workloads by name, and workloads read from the command line."""

import re
from collections.abc import Sequence
from dataclasses import MISSING, fields

from vision_ssm.bench.workloads import SSD, Convolution, Core2D, Scan1D, Scan2D, Temporal, Workload
from vision_ssm.config import near_match
from vision_ssm.errors import UserError

KINDS: dict[str, type[Workload]] = {w.kind: w for w in (Scan1D, Scan2D, Core2D, Temporal, SSD, Convolution)}

GPU: dict[str, Workload] = {
    "1d": Scan1D(batch=8, length=4096, channels=768),
    "1d-long": Scan1D(batch=1, length=16384, channels=1536),
    "1d-short": Scan1D(batch=64, length=196, channels=384),
    "1d-n1": Scan1D(batch=8, length=4096, channels=768, states=1),
    "2d-large": Scan2D(batch=16, height=160, width=160, channels=64),
    "2d-medium": Scan2D(batch=16, height=80, width=80, channels=128),
    "2d-small": Scan2D(batch=16, height=40, width=40, channels=256),
    "2d-tiny": Scan2D(batch=16, height=20, width=20, channels=512),
    "2d-one": Scan2D(batch=1, height=160, width=160, channels=64),
    "2d-n1": Scan2D(batch=32, height=56, width=56, channels=192, states=1),
    "2d-huge": Scan2D(batch=1, height=512, width=512, channels=64),
    "2d-core": Core2D(batch=1, height=1024, width=1024, channels=64),
    "ssd-64": SSD(batch=8, length=4096, heads=24, states=64),
    "ssd-128": SSD(batch=8, length=4096, heads=24, states=128),
    "temporal": Temporal(batch=4, frames=16, height=64, width=64, channels=128),
    "conv": Convolution(batch=8, length=4096, channels=1536),
}
"""Sequences of language and image models; the maps of Mamba-YOLO-T at 640 px (large to tiny; one: a single picture),
of VMamba-T (n1) and of large pictures (huge, core); clips."""

CPU: dict[str, Workload] = {
    "1d": Scan1D(batch=1, length=1024, channels=128),
    "1d-long": Scan1D(batch=1, length=4096, channels=64),
    "1d-short": Scan1D(batch=8, length=196, channels=96),
    "1d-n1": Scan1D(batch=1, length=1024, channels=128, states=1),
    "2d-large": Scan2D(batch=1, height=80, width=80, channels=64),
    "2d-medium": Scan2D(batch=1, height=40, width=40, channels=128),
    "2d-small": Scan2D(batch=1, height=20, width=20, channels=256),
    "2d-tiny": Scan2D(batch=1, height=10, width=10, channels=512),
    "2d-one": Scan2D(batch=1, height=40, width=40, channels=64),
    "2d-n1": Scan2D(batch=1, height=56, width=56, channels=96, states=1),
    "2d-huge": Scan2D(batch=1, height=128, width=128, channels=16),
    "2d-core": Core2D(batch=1, height=128, width=128, channels=16),
    "ssd-64": SSD(batch=1, length=512, heads=4, states=64),
    "ssd-128": SSD(batch=1, length=512, heads=4, states=128),
    "temporal": Temporal(batch=1, frames=16, height=16, width=16, channels=64),
    "conv": Convolution(batch=1, length=2048, channels=256),
}
"""The same kinds under the same names, each of some seconds on a CPU at most."""


def choose(names: Sequence[str] | None, shapes: Sequence[str], *, on_gpu: bool) -> dict[str, Workload]:
    """The workloads asked for, by name: all built-in ones if nothing is asked for.

    Raises:
        UserError: an unknown name, or a shape that cannot be read.
    """
    known = GPU if on_gpu else CPU
    if names is None:
        names = () if shapes else tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"{name!r} is no workload; there are: {', '.join(known)}{near_match(name, known)}")
    return {name: known[name] for name in names} | {text: parse_shape(text) for text in shapes}


def parse_shape(text: str) -> Workload:
    """A workload from KIND:SIZES, such as `2d:B16,H160,W160,D64,N16,R4`.

    Raises:
        UserError: the kind or a letter is unknown, a size is missing or is no positive number.
    """
    kind, colon, sizes = text.partition(":")
    if kind not in KINDS or not colon:
        hint = near_match(kind, KINDS)
        raise UserError(f"--shape {text!r}: expected KIND:SIZES with a kind of {', '.join(KINDS)}{hint}")
    letters = {f.metadata["letter"]: f for f in fields(KINDS[kind])}
    form = f"{kind} takes " + ", ".join(
        letter if f.default is MISSING else f"{letter} (default {f.default or 'D / 32'})"
        for letter, f in letters.items()
    )
    given: dict[str, int] = {}
    for part in filter(None, sizes.split(",")):
        match = re.fullmatch(r"([A-Z])([1-9][0-9]*)", part.strip())
        if match is None or match[1] not in letters or letters[match[1]].name in given:
            raise UserError(
                f"--shape {text!r}: cannot read {part!r}, expected a letter and a number, each once; {form}"
            )
        given[letters[match[1]].name] = int(match[2])
    missing = [letter for letter, f in letters.items() if f.default is MISSING and f.name not in given]
    if missing:
        raise UserError(f"--shape {text!r}: {', '.join(missing)} is missing; {form}")
    return KINDS[kind](**given)
