"""`vssm explain VERB`: each function is a verb, its options the flags, its docstring the help. Imports no torch.

The verbs of a task are carried out by its module `explain`, imported by name when it is used.
"""

import importlib
from collections.abc import Callable

from vision_ssm.explain.options import ClassifyOptions, DetectOptions, GenerateOptions, PerturbOptions, RestoreOptions


def detect(options: DetectOptions) -> int:
    """Why this box: what added to the class score of one detection."""
    return _run("detection.explain", options)


def restore(options: RestoreOptions) -> int:
    """Which pixels repaired this one: where the scans of a restorer read, and its effective receptive field."""
    return _run("restoration.explain", options)


def generate(options: GenerateOptions) -> int:
    """What a generated patch was made from, at several steps of the denoising; of videos also frame by frame."""
    return _run("generation.explain", options)


def classify(options: ClassifyOptions) -> int:
    """What a class was recognised by: any network of `vssm classify` that has scans or attention."""
    return _run("vision_ssm.explain.classifier", options)


def perturb(options: PerturbOptions) -> int:
    """Test maps by blanking what they name: accuracy with the most relevant cells gone first, last, and at random."""
    from vision_ssm.explain.classifier import run_perturb

    return run_perturb(options)


def _run(module: str, options: DetectOptions | RestoreOptions | GenerateOptions | ClassifyOptions) -> int:
    from vision_ssm.files import check_writable

    check_writable(options.output)
    return importlib.import_module(module).run_explain(options)


COMMANDS: dict[str, Callable[..., int]] = {
    "detect": detect, "restore": restore, "generate": generate, "classify": classify, "perturb": perturb,
}  # fmt: skip
