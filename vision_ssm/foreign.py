"""Read `.pt`/`.pth` files of other projects without running any of their code.

A pickle can call anything. Here a name in the file never becomes a Python object: it is a `ForeignName`, a call of it
is a `Record` of its arguments, and only the few names in `inert_pickle._BUILDERS` (tensors, plain containers, numpy
arrays) build something. So a file that pickles whole modules, as Ultralytics' do, comes out as a tree of records whose
tensors are real, and a file that asks for `os.system` comes out as a record that does nothing.
"""

import io
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_ssm.errors import UserError
from vision_ssm.inert_pickle import Record, RefusedError, unpickle

_MAX_MODULES, _MAX_DEPTH = 1 << 18, 200
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
# where weights lie in a saved dict, averaged ones first
_PREFERRED = (
    "ema",
    "model_ema",
    "params_ema",
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "params",
    "weights",
)


def load_foreign(path: str | Path) -> Any:
    """Read a file written by `torch.save`, in the zip or the older format.

    Returns:
        What was saved: tensors (on the CPU; parameters become plain tensors), numbers, text, bytes, lists, tuples,
        sets, dicts, numpy arrays; everything else as `Record` or `ForeignName`.

    Raises:
        UserError: not such a file, damaged, or it holds something refused (sparse or quantised tensors, tensors that
            reach outside their storage, absurd sizes).
    """
    path = Path(path)
    size = path.stat().st_size
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return _read_zip(archive, size)
        with path.open("rb") as file:
            return _read_legacy(file, size)
    except RefusedError as refused:
        raise UserError(f"{path} is refused: {refused}") from None
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can fail in any way; none of them is our bug
        detail = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise UserError(f"{path} cannot be read as a torch file ({detail}); is it complete?") from None


def find_state_dict(saved: Any) -> dict[str, Tensor]:
    """The weights inside what `load_foreign` returned.

    Looks into the usual places (averaged weights "ema" first, then "state_dict", "model", ...) and walks pickled
    modules by their `_parameters`, `_buffers` and `_modules`. A common prefix "module." or "_orig_mod." is dropped.

    Raises:
        UserError: no weights found, or more than one set and no telling which.
    """
    found = _search(saved, 0)
    if not found:
        inside = ", ".join(map(repr, list(saved)[:20])) if isinstance(saved, Mapping) else repr(saved)[:200]
        raise UserError(f"no weights found; the file holds {inside}")
    for prefix in ("module.", "_orig_mod."):
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def _search(saved: Any, depth: int) -> dict[str, Tensor]:
    if depth > 4:
        return {}
    if isinstance(saved, Record):
        if "_modules" in saved.attributes or "_parameters" in saved.attributes:
            return dict(_walk_module(saved))
        return _search(saved.attributes, depth + 1)
    if not isinstance(saved, Mapping) or not saved:
        return {}
    if _is_state_dict(saved):
        return {name: value for name, value in saved.items() if isinstance(value, Tensor)}
    for key in _PREFERRED:
        if found := _search(saved.get(key), depth + 1):
            return found
    others = {key: found for key, value in saved.items() if key != "optimizer" and (found := _search(value, depth + 1))}
    if len(others) > 1:
        raise UserError(
            f"the file holds several sets of weights: {', '.join(map(str, others))}; save one of them alone"
        )
    return next(iter(others.values()), {})


def _is_state_dict(saved: Mapping) -> bool:
    """Names to tensors; a few entries of other kinds (`_extra_state`, None) do not matter."""
    tensors = sum(isinstance(value, Tensor) for value in saved.values())
    return tensors > 0 and 2 * tensors >= len(saved) and all(isinstance(key, str) for key in saved)


def _walk_module(root: Record) -> Iterator[tuple[str, Tensor]]:
    """(dotted name, tensor) of every parameter and persistent buffer below a pickled module."""
    todo: list[tuple[str, Record, tuple[int, ...]]] = [("", root, ())]
    for _ in range(_MAX_MODULES):
        if not todo:
            return
        prefix, module, above = todo.pop()
        if id(module) in above or len(above) > _MAX_DEPTH:
            raise UserError(f"the module {prefix[:200]!r} contains itself or lies absurdly deep; the file is damaged")
        state = module.attributes
        hidden = state.get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, set) else set()
        tensors = _mapping(state, "_parameters") | {
            n: b for n, b in _mapping(state, "_buffers").items() if n not in hidden
        }
        yield from ((f"{prefix}{name}", value) for name, value in tensors.items() if isinstance(value, Tensor))
        children = [(n, m) for n, m in _mapping(state, "_modules").items() if isinstance(m, Record)]
        todo += [(f"{prefix}{name}.", child, (*above, id(module))) for name, child in reversed(children)]
    raise UserError("the file's module tree is absurdly large")


def _mapping(state: Mapping, name: str) -> dict:
    value = state.get(name)
    return value if isinstance(value, dict) else {}


class _Storage:
    """The bytes of one storage in the file; every tensor on it shares them."""

    def __init__(self, memory: bytearray, itemsize: int) -> None:
        self.memory, self.itemsize = memory, itemsize
        self.bytes = torch.frombuffer(memory, dtype=torch.uint8) if memory else torch.empty(0, dtype=torch.uint8)

    def typed(self, dtype: torch.dtype) -> Tensor:
        """(numel,) all elements as `dtype`."""
        return self.bytes[: len(self.memory) // dtype.itemsize * dtype.itemsize].view(dtype)


def _read_zip(archive: zipfile.ZipFile, file_size: int) -> Any:
    entries = {info.filename: info for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise RefusedError("it is a zip file, but not one that torch.save wrote")
    if any(info.compress_type != zipfile.ZIP_STORED for info in entries.values()):
        raise RefusedError("it has compressed parts; torch.save writes none")
    if sum(info.file_size for info in entries.values()) > file_size:
        raise RefusedError("its parts claim to be larger than the file")
    root = roots[0]
    if f"{root}byteorder" in entries and archive.read(f"{root}byteorder") != b"little":
        raise RefusedError("its numbers are big-endian")
    storages: dict[str, _Storage] = {}

    def load(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if key not in storages:
            storages[key] = _Storage(bytearray(archive.read(f"{root}data/{key}")), dtype.itemsize)
        if numel * dtype.itemsize > len(storages[key].memory):
            raise RefusedError(f"a tensor of {numel} x {dtype} lies on {len(storages[key].memory)} bytes")
        return storages[key].typed(dtype)

    structure = archive.read(f"{root}data.pkl")
    return unpickle(io.BytesIO(structure), len(structure), load)


def _read_legacy(file: Any, file_size: int) -> Any:
    """Magic number, protocol, machine, the object, storage keys, then each storage as its length and its bytes."""
    claimed = 0
    storages: dict[str, _Storage] = {}

    def load(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        nonlocal claimed
        if key not in storages:
            claimed += numel * dtype.itemsize
            if claimed > file_size:
                raise RefusedError("its tensors claim to be larger than the file")
            storages[key] = _Storage(bytearray(numel * dtype.itemsize), dtype.itemsize)
        return storages[key].typed(dtype)

    def read() -> Any:
        return unpickle(file, file_size, load)

    if file.peek(1)[:1] != b"\x80" or read() != _LEGACY_MAGIC or read() != _LEGACY_PROTOCOL:
        raise RefusedError("it is not a file that torch.save wrote")
    machine = read()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise RefusedError("its numbers are big-endian")
    saved = read()
    filled = read()
    if not isinstance(filled, list) or any(type(k) is not str for k in filled) or set(filled) != set(storages):
        raise RefusedError("its list of storages does not fit its tensors")
    for key in filled:
        storage = storages[key]
        stored = int.from_bytes(file.read(8), "little") * storage.itemsize
        if stored != len(storage.memory) or file.readinto(storage.memory) != stored:
            raise RefusedError(f"the bytes of storage {key!r} are missing or of another length; the file is cut off")
    return saved
