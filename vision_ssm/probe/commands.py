"""`vssm probe VERB`: each function is a verb, its options the flags, its docstring the help. Imports no torch.

Each verb prints a table and writes OUTPUT/VERB.json and OUTPUT/VERB.png.
"""

from collections.abc import Callable

from vision_ssm.probe.options import ExpressivityOptions, ICLOptions, RecencyOptions, SamplingOptions, SmoothOptions


def recency(options: RecencyOptions) -> int:
    """How far back a mixer hears: influence over distance, and what noise on the first or last tokens costs."""
    from vision_ssm.probe.recency import measure

    return _run(measure, options)


def smooth(options: SmoothOptions) -> int:
    """How alike the tokens of a picture become, layer by layer."""
    from vision_ssm.probe.smooth import measure

    return _run(measure, options)


def expressivity(options: ExpressivityOptions) -> int:
    """Which terms of a path's signature a linear read-out finds in untrained mixers."""
    from vision_ssm.probe.expressivity import measure

    return _run(measure, options)


def icl(options: ICLOptions) -> int:
    """Train causal stacks to learn from examples in their input, and score them on new ones."""
    from vision_ssm.probe.icl import measure

    return _run(measure, options)


def sampling(options: SamplingOptions) -> int:
    """Train on signals sampled at one rate, test at others."""
    from vision_ssm.probe.sampling import measure

    return _run(measure, options)


def _run(measure, options) -> int:
    from vision_ssm.files import check_writable

    stacks, output = options.build(), options.output
    check_writable(output)
    report = measure(options, stacks)
    print(report.table())
    report.write(output)
    print(f"wrote {output / report.name}.json and .png")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "recency": recency, "smooth": smooth, "expressivity": expressivity, "icl": icl, "sampling": sampling,
}  # fmt: skip
