"""The console command: `vssm TASK VERB [arguments]`.

A task is a module named in `TASKS`, imported when it is used; its `COMMANDS` maps verbs to typed functions. A
function's signature and docstring become its flags and help, through jsonargparse:

- parameters without a default are positional (list[...]: one or more), keyword-only ones required flags;
- parameters with a default are flags;
- a bool is `--flag` or `--no-flag`;
- the fields of a dataclass named `options` are parameters of their own;
- any other dataclass is a config, filled from `--config NAME_OR_FILE` and dotted flags (`--train.epochs 3`).
"""

import dataclasses
import errno
import importlib
import inspect
import os
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any

import vision_ssm
from vision_ssm.errors import UserError, is_out_of_gpu_memory, is_out_of_memory

TASKS = {
    "detect": ("detection.commands", "find objects in pictures: train, score, predict, export"),
    "restore": ("restoration.commands", "make pictures better: denoise, deblur, enlarge, fill in; train, score"),
    "generate": ("generation.commands", "make pictures and videos: train, sample, score"),
    "classify": ("vision_ssm.classify.commands", "name what a picture shows: train, score, predict"),
    "distill": ("vision_ssm.distill.commands", "make a state-space network of a trained vision transformer"),
    "explain": ("vision_ssm.explain.commands", "see what a network looks at: heat maps and their test"),
    "bench": ("vision_ssm.bench.commands", "time the kernels against this machine's limits"),
    "probe": ("vision_ssm.probe.commands", "measure a mixer: what it remembers, smooths, expresses, learns in context"),
}
DIRECT = {"doctor": ("vision_ssm.doctor", "check this machine: versions, GPU, scan back ends")}
EXTRAS = {
    "onnx": "export",
    "onnxscript": "export",
    "onnxruntime": "export",
    "av": "video",
    "diffusers": "generation",
    "sklearn": "test",
}
"""Import name -> our extra that brings it."""

_MISTAKE, _INTERRUPTED, _BROKEN_PIPE = 2, 130, 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `vssm`; those of the process when None.

    Returns:
        Exit code: 0 or the verb's own, 2 for a mistake of the user, 130 when interrupted.
    """
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a broken pipe must show here, not at exit
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except Exception as error:
        message = readable(error)
        if message is None:
            error.add_note("This is a bug in vision-ssm: please report it with the text above and your command.")
            raise
        rank = os.environ.get("RANK")
        print(f"vssm: error: {f'[rank {rank}] ' if rank else ''}{message}", file=sys.stderr)
        return _MISTAKE


def readable(error: BaseException) -> str | None:
    """One line for an error that the user can do something about; None for a bug."""
    if isinstance(error, UserError | FileNotFoundError | PermissionError) and " worker process " in str(error):
        last = str(error).strip().splitlines()[-1]  # torch's data workers send the whole traceback as the message
        return last.partition("Error: ")[2] or last
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"this needs the package {error.name!r}; run: pip install 'vision-ssm[{EXTRAS[error.name]}]'"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "the disk is full; files written before are intact"
    if is_out_of_gpu_memory(error):
        return (
            "out of GPU memory; lower the batch size or the image size, close other programs on the GPU, "
            f"or use --device cpu ({str(error).splitlines()[0]})"
        )
    if is_out_of_memory(error):
        reason = str(error).partition("\n")[0]
        return "out of memory; lower the batch size, the image size or the number of workers" + (
            f" ({reason})" if reason else ""
        )
    return None


def _run(argv: list[str]) -> int:
    if argv[:1] == ["--version"]:
        print(f"vssm {vision_ssm.__version__}")
        return 0
    about = {name: text for name, (_, text) in (TASKS | DIRECT).items()}
    if not argv or argv[0] in ("-h", "--help"):
        _print_menu("vssm TASK VERB [arguments]", "tasks and commands", about, "vssm TASK --help")
        return 0 if argv else _MISTAKE
    name, *rest = argv
    if name in DIRECT:
        function = getattr(importlib.import_module(DIRECT[name][0]), name)
        return call(f"vssm {name}", function, rest)
    if name not in TASKS:
        raise UserError(_unknown("task or command", name, about))
    commands: dict[str, Callable] = importlib.import_module(TASKS[name][0]).COMMANDS
    if not rest or rest[0] in ("-h", "--help"):
        verbs = {verb: inspect.getdoc(function).splitlines()[0] for verb, function in commands.items()}  # pyright: ignore
        _print_menu(f"vssm {name} VERB [arguments]", TASKS[name][1], verbs, f"vssm {name} VERB --help")
        return 0 if rest else _MISTAKE
    if rest[0] not in commands:
        raise UserError(_unknown(f"verb of vssm {name}", rest[0], commands))
    return call(f"vssm {name} {rest[0]}", commands[rest[0]], rest[1:])


def _unknown(what: str, name: str, known: typing.Iterable[str]) -> str:
    from vision_ssm.config import near_match

    return f"{name!r} is no {what}; there are: {', '.join(known)}{near_match(name, known)}"


def _print_menu(usage: str, title: str, entries: dict[str, str], more: str) -> None:
    width = max(map(len, entries))
    print(f"usage: {usage}\n\n{title}:")
    for name, text in entries.items():
        print(f"  {name:<{width}}  {text}")
    print(f"\nmore: {more}    version: vssm --version")


def call(prog: str, function: Callable[..., int | None], argv: list[str]) -> int:
    """Call a typed function with arguments from the command line.

    Args:
        prog: the command as the user typed it, for usage lines.
        function: its signature and Google docstring become flags and help.
        argv: the arguments after `prog`.

    Raises:
        UserError: an unknown flag, a wrong value, a missing argument.
    """
    from jsonargparse import ArgumentError

    from vision_ssm.command_line import build_parser, check_sizes, explain, with_underscores
    from vision_ssm.config import load_config

    parser, hints = build_parser(prog, function)
    try:
        given = parser.parse_args([with_underscores(word) for word in argv], defaults=False).as_dict()
    except ArgumentError as error:
        raise UserError(explain(str(error), prog, parser, hints)) from None
    except SystemExit as stop:  # --help
        return int(stop.code or 0)
    check_sizes(given)
    arguments: dict[str, Any] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        kind = hints[name]
        if dataclasses.is_dataclass(kind):
            cls, config = typing.cast(type, kind), given.get("config")
            fields = {f.name: given[f.name] for f in dataclasses.fields(kind) if f.name in given}
            arguments[name] = cls(**fields) if name == "options" else load_config(cls, config, fields)
        else:
            arguments[name] = given.get(name, parameter.default)
    return function(**arguments) or 0


if __name__ == "__main__":
    sys.exit(main())
