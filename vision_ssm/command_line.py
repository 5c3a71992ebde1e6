"""From a typed function to a jsonargparse parser, and from its terse errors to helpful ones; used by `cli`."""

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Callable
from typing import Any

import docstring_parser
from jsonargparse import ActionYesNo, ArgumentParser

from vision_ssm.config import describe, near_match
from vision_ssm.errors import UserError

LARGEST = 2**63 - 1

Hints = dict[str, Any]  # flag or parameter name -> type


def build_parser(prog: str, function: Callable[..., Any]) -> tuple[ArgumentParser, Hints]:
    """A parser for a function's parameters, and the type of every parameter and of every dotted config key."""
    hints = typing.get_type_hints(function)
    doc = docstring_parser.parse(inspect.getdoc(function) or "")
    texts = _texts(doc)
    about = "\n\n".join(t for t in (doc.short_description, doc.long_description) if t)
    parser = ArgumentParser(prog=prog, description=about, exit_on_error=False, allow_abbrev=False)
    for name, parameter in inspect.signature(function).parameters.items():
        if name == "options":
            hints |= _add_options(parser, hints[name])
        elif dataclasses.is_dataclass(hints[name]):
            parser.add_argument("--config", type=str, help="YAML file or name of a shipped config.")
            hints |= _add_config(parser, typing.cast(type, hints[name]))
            parser.usage = "%(prog)s [--config CONFIG] [flags]"  # the full list would fill a screen before the help
        else:
            _add_parameter(parser, parameter, hints[name], texts.get(name, ""))
    return parser, hints


def with_underscores(word: str) -> str:
    """`--max-det=3` -> `--max_det=3`: a flag may be written either way."""
    if not word.startswith("--"):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def check_sizes(given: dict[str, Any]) -> None:
    """Refuse whole numbers that no tensor and no seed can hold.

    Raises:
        UserError: One of them has more than 64 bits.
    """
    for name, value in given.items():
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and not -LARGEST <= number <= LARGEST:
                raise UserError(f"--{name} is {number}; whole numbers go from -{LARGEST} to {LARGEST}")


def explain(message: str, prog: str, parser: ArgumentParser, hints: Hints) -> str:
    """A parser's error in one readable line with what is allowed and the nearest known flag."""
    flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
    help_hint = f" (see {prog} --help)"
    if wrong := re.match(
        r'Parser key "([^"]+)"(?: element \d+)?:\s+(.*?)(?:(?:Got|Given) value: (.*))?$', message, re.DOTALL
    ):
        key, detail, value = wrong.groups()
        shown = f"{value.strip()!r}" if value else _one_line(detail)
        flag = f"--{key}" if f"--{key}" in flags else key.upper()
        return f"{flag} is {shown}; allowed is {describe(_item_type(hints[key]))}{help_hint}"
    if wrong := re.match(r"argument --([\w.]+)\S*: invalid \S+ value: (.*)", message, re.DOTALL):
        return f"--{wrong[1]} is {wrong[2]}; allowed is {describe(hints.get(wrong[1], str))}{help_hint}"
    if empty := re.match(r"argument (?:-o/)?--([\w.]+): expected (?:at least )?one argument", message):
        allowed = describe(_item_type(hints.get(empty[1], str)))
        return f"--{empty[1]} needs a value: {allowed}; one that begins with - is written --{empty[1]}=VALUE{help_hint}"
    if unknown := re.match(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
        word = unknown[1].partition("=")[0]
        if not word.startswith("-"):
            return f"unexpected argument {word!r}; several go together, before or after the flags{help_hint}"
        return f"unknown flag {word}{near_match(word, flags)}{help_hint}"
    if missing := re.match(r"the following arguments are required: (.*)", message, re.DOTALL):
        names = [f"--{name}" if f"--{name}" in flags else name.upper() for name in re.findall(r"[\w.]+", missing[1])]
        return f"missing: {', '.join(names)}{help_hint}"
    return _one_line(message) + help_hint


def _add_parameter(parser: ArgumentParser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    name, default = parameter.name, parameter.default
    text = text or name.replace("_", " ")  # jsonargparse shows type and default only beside some text
    item = _item_type(hint)
    required = default is inspect.Parameter.empty
    many: dict[str, Any] = {} if item is hint else {"nargs": "+"}
    flags = ["-o", "--output"] if name == "output" else [f"--{name}"]
    if required and parameter.kind is not inspect.Parameter.KEYWORD_ONLY:
        parser.add_argument(name, type=item, help=text, **many)
    elif required:
        parser.add_argument(*flags, type=item, required=True, help=text, **many)
    elif hint is bool:
        parser.add_argument(f"--{name}", action=ActionYesNo, default=default, help=text)
    else:
        parser.add_argument(*flags, type=item, default=default, help=text, **many)


def _add_options(parser: ArgumentParser, cls: type) -> Hints:
    """Every field of an options dataclass as a parameter, required ones first; returns the fields' types."""
    hints, texts = typing.get_type_hints(cls), {}
    for base in reversed(cls.__mro__[:-1]):
        texts |= _texts(docstring_parser.parse_from_object(base))
    made = {f.name: f.default_factory() for f in dataclasses.fields(cls) if callable(f.default_factory)}
    for parameter in sorted(inspect.signature(cls).parameters.values(), key=lambda p: p.default is not p.empty):
        name, default = parameter.name, made.get(parameter.name, parameter.default)
        _add_parameter(parser, parameter.replace(default=default), hints[name], texts.get(name, ""))
    return hints


def _item_type(hint: Any) -> Any:
    """list[X] and list[X] | None -> X; any other type as it is."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    lists = [option for option in options if typing.get_origin(option) is list]
    return typing.get_args(lists[0])[0] if len(lists) == 1 else hint


def _add_config(parser: ArgumentParser, cls: type) -> Hints:
    """One flag per dotted key of a config dataclass, grouped as the config is; returns the keys' types."""
    keys: Hints = {}
    for prefix, group_cls, default in _groups(cls, "", None):
        doc = docstring_parser.parse_from_object(group_cls)
        texts = _texts(doc)
        title = _one_line(doc.short_description).rstrip(".") or group_cls.__name__
        group = parser.add_argument_group(f"{prefix.rstrip('.')}: {title}" if prefix else title)
        hints = typing.get_type_hints(group_cls)
        for field in dataclasses.fields(typing.cast(Any, group_cls)):
            hint, key = hints[field.name], prefix + field.name
            if dataclasses.is_dataclass(hint) or not field.init:
                continue
            keys[key] = hint
            shown = getattr(default, field.name) if default is not None else _default(field)
            options = {"default": shown, "help": texts.get(field.name) or field.name.replace("_", " ")}
            if hint is bool:
                group.add_argument(f"--{key}", action=ActionYesNo, nargs="?", const=True, **options)
            else:
                group.add_argument(f"--{key}", type=hint, **options)
    return keys


def _groups(cls: type, prefix: str, default: Any) -> list[tuple[str, type, Any]]:
    """(prefix, dataclass, default instance or None) of a config and all configs inside it."""
    groups = [(prefix, cls, default)]
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = getattr(default, field.name) if default is not None else _default(field)
            groups += _groups(typing.cast(type, hints[field.name]), f"{prefix}{field.name}.", inner)
    return groups


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def _texts(doc: docstring_parser.Docstring) -> dict[str, str]:
    """What a docstring says about each parameter or attribute."""
    return {p.arg_name: _one_line(p.description) for p in doc.params}


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())
