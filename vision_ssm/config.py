"""Frozen dataclass configs, filled from YAML and from command-line overrides.

A config is a frozen dataclass, possibly with further config dataclasses as fields. Unknown keys and wrong values are
refused with the file, the key, what is allowed and the nearest known key. Ranges belong in `__post_init__`, which
raises ValueError; the key's path is added here.
"""

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser

from vision_ssm.errors import UserError

T = TypeVar("T")
_Leaves = dict[str, tuple[Any, str]]  # dotted key -> value, and who gave it

_PACKAGE = Path(__file__).resolve().parent
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text (in quotes)",
    Path: "a path",
    Any: "anything",
}


def near_match(name: str, known: Iterable[str]) -> str:
    """A hint such as "; did you mean 'epochs'?", or "" when nothing known looks like `name`."""
    known = list(known)
    last = name.lstrip("-").rpartition(".")[2]  # a right word in the wrong group: `epochs` for `train.epochs`
    found = [k for k in known if "." in k and k.rpartition(".")[2] == last][:1]
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {found[0]!r}?" if found else ""


def shipped_configs() -> dict[str, Path]:
    """The configs that come with the package: name without suffix ("detection/mamba_yolo_t_voc") -> file."""
    for root in (_PACKAGE / "_configs", _PACKAGE.parent / "configs"):
        if root.is_dir():
            return {f.relative_to(root).with_suffix("").as_posix(): f for f in sorted(root.rglob("*.yaml"))}
    return {}


def resolve_config(name: str | Path) -> Path:
    """Find a config: a file that exists, else a shipped config by name, with or without folder and suffix.

    Raises:
        UserError: no such file or name, or a short name that several shipped configs have.
    """
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{path} is a folder; --config takes a YAML file or the name of a shipped config")
    shipped = shipped_configs()
    wanted = path.as_posix().removesuffix(".yaml").removesuffix(".yml").removeprefix("configs/")
    found = [wanted] if wanted in shipped else [key for key in shipped if key.rpartition("/")[2] == wanted]
    if len(found) == 1:
        return shipped[found[0]]
    if found:
        raise UserError(f"{str(name)!r} names several configs: {', '.join(found)}; give the name with its folder")
    hint = near_match(wanted, [*shipped, *(key.rpartition("/")[2] for key in shipped)])
    raise UserError(f"no config {str(name)!r}: no such file, and shipped are {', '.join(shipped) or 'none'}{hint}")


def load_config(cls: type[T], source: str | Path | None = None, overrides: Mapping[str, Any] | None = None) -> T:
    """Fill a config dataclass: its defaults, then a YAML file, then overrides.

    Args:
        cls: a frozen dataclass.
        source: a YAML file or the name of a shipped config; None for the defaults alone.
        overrides: nested, or with dotted keys such as {"train.epochs": 3}.

    Raises:
        UserError: unreadable file, unknown key, wrong type or value, missing value.
    """
    leaves: _Leaves = {}
    if source is not None:
        path = resolve_config(source)
        leaves |= _flatten(cls, _read_yaml(path), str(path))
    if overrides:
        leaves |= _flatten(cls, _nest(overrides), "command line")
    return _build(cls, leaves, "")


def from_dict(cls: type[T], values: Mapping[str, Any], source: str = "config") -> T:
    """Fill a config dataclass from nested dicts, as `load_config` does; `source` names them in messages."""
    return _build(cls, _flatten(cls, values, source), "")


def to_dict(config: Any) -> dict[str, Any]:
    """Nested dicts of a config with JSON values only (paths as text, tuples as lists); `from_dict` reads them back."""
    return _plain(dataclasses.asdict(config))


def field_types(cls: type) -> dict[str, Any]:
    """Name -> resolved type of each field of a config dataclass."""
    return dict(_field_types(cls))


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a config dataclass, groups left out."""
    keys: list[str] = []
    for name, hint in _field_types(cls).items():
        keys += (
            all_keys(typing.cast(type, hint), f"{prefix}{name}.") if dataclasses.is_dataclass(hint) else [prefix + name]
        )
    return keys


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {f.name: hints[f.name] for f in dataclasses.fields(cls) if f.init}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    return value.as_posix() if isinstance(value, Path) else value


def _read_yaml(path: Path) -> Mapping[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: a config is a mapping of keys to values, this file holds a {type(values).__name__}")
    return values


def _nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in overrides.items():
        *groups, last = key.split(".")
        inner = nested
        for group in groups:
            inner = inner.setdefault(group, {})
        if isinstance(value, Mapping) and isinstance(inner.get(last), dict):
            inner[last] |= value
        else:
            inner[last] = value
    return nested


def _flatten(cls: type, values: Mapping[str, Any], source: str, prefix: str = "", root: type | None = None) -> _Leaves:
    """Nested values -> dotted leaves of `cls`; refuses unknown keys and groups that are not mappings."""
    root = root or cls
    hints = _field_types(cls)
    leaves: _Leaves = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        if name not in hints:
            hint = near_match(key, all_keys(root)) or f"; known here: {', '.join(hints)}"
            raise UserError(f"{source}: unknown key {key!r}{hint}")
        if not dataclasses.is_dataclass(hints[name]):
            leaves[key] = (value, source)
        elif isinstance(value, Mapping):
            leaves |= _flatten(typing.cast(type, hints[name]), value, source, f"{key}.", root)
        elif value is not None:  # an empty group in YAML reads as None
            keys = ", ".join(_field_types(typing.cast(type, hints[name])))
            raise UserError(f"{source}: {key} is {value!r}; it is a group of keys: {keys}")
    return leaves


def _build(cls: type[T], leaves: _Leaves, prefix: str, base: Any = None) -> T:
    """An instance of `cls` from the leaves below `prefix`; what they leave out comes from `base` or the defaults."""
    given: dict[str, Any] = {}
    sources: list[str] = []
    for field in dataclasses.fields(typing.cast(Any, cls)):
        if not field.init:
            continue
        hint, key = _field_types(cls)[field.name], f"{prefix}{field.name}"
        if key in leaves:
            value, source = leaves[key]
            given[field.name] = _convert(hint, value, key, source)
            sources.append(source)
        elif dataclasses.is_dataclass(hint):
            inner = getattr(base, field.name) if base is not None else _default(field)
            inner = None if inner is dataclasses.MISSING else inner
            given[field.name] = _build(typing.cast(type, hint), leaves, f"{key}.", inner)
        elif base is None and _default(field) is dataclasses.MISSING:
            raise UserError(f"{key} needs a value: {describe(hint)}; give it in the config file or as --{key}")
    try:
        return dataclasses.replace(base, **given) if base is not None else cls(**given)
    except ValueError as error:
        where = f"{' and '.join(dict.fromkeys(sources))}: " if sources else ""
        raise UserError(f"{where}{prefix.rstrip('.')}{': ' if prefix else ''}{error}") from None


def _default(field: dataclasses.Field) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default


def _convert(hint: Any, value: Any, key: str, source: str) -> Any:
    """One value as its field's type, by jsonargparse; it lets null through everywhere, so null is checked here."""
    null_allowed = hint in (None, Any, types.NoneType) or types.NoneType in typing.get_args(hint)
    if value is None and null_allowed:
        return None
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if value is not None and not (isinstance(value, bool) and hint is float):
            return parser.instantiate(parser.parse_object({"value": value})).value
    except (ArgumentError, ValueError, TypeError):
        pass
    shown = "null" if value is None else repr(value)
    raise UserError(f"{source}: {key} is {shown}; allowed is {describe(hint)}")


def describe(hint: Any) -> str:
    """What a type allows, in words: "one of sgd, adamw", "a list of 2: a number, a number", "a path or null"."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint in (None, types.NoneType):
        return "null"
    if origin is typing.Literal:
        return "one of " + ", ".join(str(arg) for arg in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(arg) for arg in args)
    if origin is list or (origin is tuple and args[-1] is Ellipsis):
        return f"a list, each item {describe(args[0])}"
    if origin is tuple:
        return f"a list of {len(args)}: " + ", ".join(describe(arg) for arg in args)
    if origin is dict:
        return f"a mapping, each value {describe(args[1])}"
    return _WORDS.get(hint) or getattr(hint, "__name__", str(hint))
