"""The pickle machine of `foreign`: builds tensors and plain containers, and runs nothing that a file names."""

import io
import math
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

_MAX_PICKLE_BYTES = 1 << 28  # of structure; tensors lie outside the pickle
_MAX_COPIED = 1 << 28  # bytes or items that calls may copy in all
_MAX_EXPANDED = 1 << 24  # elements of a tensor that repeats its storage by stride 0
_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
    "UntypedStorage": torch.uint8,
}


class RefusedError(Exception):
    """The file asks for something that is never done; the message says what."""


@dataclass(frozen=True)
class ForeignName:
    """A class or function named in a file; only the name, nothing is imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An inert stand-in for an object of a class that is not ours: what the file said about it."""

    class_name: str
    arguments: tuple = ()
    attributes: dict[Any, Any] = field(default_factory=dict)
    items: list[Any] = field(default_factory=list)
    """List items, or (key, value) pairs, of classes derived from list or dict."""

    def __repr__(self) -> str:
        return f"Record({self.class_name})"


@dataclass(frozen=True, eq=False)
class Typed:
    """A storage as a pickle refers to it; not a tensor, so that only the checked builders can use it."""

    flat: Tensor


LoadStorage = Callable[[str, torch.dtype, int], Tensor]  # key, type, elements -> all elements, 1-D


class _Reader:
    """Reads at most what is there, so that an absurd length in the file allocates nothing."""

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self.readline = file.readline

    def read(self, count: int) -> bytes:
        if count < 0 or count > self._size - self._file.tell():
            raise EOFError("the file is cut off, or it claims an absurd length")
        return self._file.read(count)


def unpickle(file: Any, size: int, load: LoadStorage) -> Any:
    """Read one pickle.

    Args:
        file: binary, at the start of the pickle; left behind its end.
        size: bytes of the whole file.
        load: gives the storages that tensors lie on.

    Raises:
        RefusedError: the pickle asks for something that is never done.
        Exception: any other, when it is damaged.
    """
    if size - file.tell() > _MAX_PICKLE_BYTES and isinstance(file, io.BytesIO):
        raise RefusedError(f"its structure alone takes {size} bytes, at most {_MAX_PICKLE_BYTES} are read")
    return _InertUnpickler(_Reader(file, size), load).load()


_PickleMachine: Any = vars(pickle)["_Unpickler"]  # in every CPython, but unknown to type checkers


class _InertUnpickler(_PickleMachine):
    """The standard library's pickle machine with every operation that could call or change something replaced.

    The pure Python one, because there each operation is a method: nothing callable is ever on its stack.
    """

    dispatch: ClassVar[dict[int, Callable]] = dict(_PickleMachine.dispatch)

    def __init__(self, file: _Reader, load: LoadStorage) -> None:
        super().__init__(file, encoding="utf-8")
        self._load_storage = load
        self._copied = 0

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        return ForeignName(_MOVED.get(module, module), name)

    def persistent_load(self, pid: Any) -> Typed | ForeignName:
        match pid:
            case ("module", ForeignName() as name, *_):  # the old format: a class with its source text
                return name
            case ("storage", ForeignName() as kind, str(key), str(), int(numel)):
                pass
            case ("storage", ForeignName() as kind, str(key), str(), int(numel), None):
                pass
            case _:
                raise RefusedError(f"it refers to something outside that is no storage: {pid!r:.200}")
        if not kind.module.startswith("torch") or kind.name not in _STORAGES or numel < 0:
            raise RefusedError(f"storages of type {kind} with {numel} elements are not read")
        dtype = _STORAGES[kind.name]
        return Typed(self._load_storage(key, dtype, numel))

    def get_extension(self, code: int) -> None:
        raise RefusedError("it uses the pickle extension registry")

    def _made(self, what: Any, args: Any) -> Any:
        """`_construct`, with a limit on what calls of a few bytes can copy again and again."""
        if isinstance(args, tuple):
            self._copied += sum(
                len(arg) for arg in args if isinstance(arg, str | bytes | bytearray | list | tuple | dict)
            )
        if self._copied > _MAX_COPIED:
            raise RefusedError("it copies the same values absurdly often")
        return _construct(what, args)

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.append(self._made(klass, tuple(args)))

    def _reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)

    def _newobj_ex(self) -> None:
        options, args = self.stack.pop(), self.stack.pop()
        self.stack[-1] = self._made(self.stack[-1], args)
        if options and isinstance(self.stack[-1], Record):
            _set_state(self.stack[-1], options)

    def _build(self) -> None:
        state = self.stack.pop()
        _set_state(self.stack[-1], state)

    def _append_one(self) -> None:
        value = self.stack.pop()
        _extend(self.stack[-1], [value])

    def _append_many(self) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def _set_one(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _update(self.stack[-1], [(key, value)])

    def _set_many(self) -> None:
        flat = self.pop_mark()
        _update(self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True)))

    def _dict(self) -> None:
        flat = self.pop_mark()
        self.append({})
        _update(self.stack[-1], list(zip(flat[::2], flat[1::2], strict=True)))

    def _add_many(self) -> None:
        values = self.pop_mark()
        if not isinstance(self.stack[-1], set):
            raise RefusedError("it adds set items to something that is no set")
        self.stack[-1].update(map(_key, values))

    def _frozenset(self) -> None:
        values = self.pop_mark()
        self.append(frozenset(map(_key, values)))

    def _bytearray(self) -> None:
        self.append(bytearray(self.read(int.from_bytes(self.read(8), "little"))))

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _reduce,
        pickle.NEWOBJ_EX[0]: _newobj_ex,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append_one,
        pickle.APPENDS[0]: _append_many,
        pickle.SETITEM[0]: _set_one,
        pickle.SETITEMS[0]: _set_many,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _add_many,
        pickle.FROZENSET[0]: _frozenset,
        pickle.BYTEARRAY8[0]: _bytearray,
    }


def _construct(what: Any, args: Any) -> Any:
    """What a call in the file gives: one of the few known values, else an inert record."""
    if not isinstance(args, tuple):
        raise RefusedError("it calls something without an argument list")
    if not isinstance(what, ForeignName):
        return Record(f"call of {what!r:.200}", args)
    name = str(what)
    if name in ("copyreg._reconstructor", "copyreg.__newobj__") and args:
        return Record(str(args[0]), args[1:])
    if builder := _BUILDERS.get(name):
        return builder(*args)
    if what.module == "torch._utils" and what.name.startswith("_rebuild"):
        raise RefusedError(f"it holds a kind of tensor that is not read ({what.name}); save plain dense tensors")
    return Record(name, args)


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, Record):
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or type(part) is dict for part in parts):
            for part in parts:
                target.attributes |= part or {}
        else:
            target.attributes["__state__"] = state
    elif isinstance(target, np.ndarray):
        _fill_array(target, state)
    elif isinstance(target, np.dtype):
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "|", "=")):
            raise RefusedError("it holds numpy arrays that are big-endian or structured")
    elif not isinstance(target, dict | Tensor):  # attributes of an OrderedDict or a tensor are left out
        raise RefusedError(f"it changes the state of {target!r:.100}")


def _key(key: Any) -> Any:
    """A dict key or set item; nested ones are refused, since hashing them can take any time and depth."""
    plain = str | bytes | int | float | complex | None | torch.dtype | torch.device | ForeignName | Record
    if isinstance(key, plain) or (isinstance(key, tuple) and all(isinstance(item, plain) for item in key)):
        return key
    raise RefusedError(f"it uses a {type(key).__name__} as a key")


def _extend(target: Any, values: list) -> None:
    if not isinstance(target, list | Record):
        raise RefusedError(f"it appends to {target!r:.100}, which is no list")
    (target.items if isinstance(target, Record) else target).extend(values)


def _update(target: Any, pairs: list[tuple[Any, Any]]) -> None:
    if isinstance(target, Record):
        target.items.extend(pairs)
    elif isinstance(target, dict):
        target.update((_key(key), value) for key, value in pairs)
    else:
        raise RefusedError(f"it sets items of {target!r:.100}, which is no dict")


def _plain(values: Any) -> Any:
    if not isinstance(values, list | tuple | set | dict):
        raise RefusedError(f"it makes a container of a {type(values).__name__}")
    return values


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Tensor:
    if not isinstance(storage, Typed):
        raise RefusedError("a tensor is built on something that is no storage")
    if any(isinstance(extra, dict) and (extra.get("conj") or extra.get("neg")) for extra in rest):
        raise RefusedError("it holds tensors with lazy conjugation or negation")
    numbers = (offset, *_plain(size), *_plain(stride))
    if len(size) != len(stride) or len(size) > 64 or any(type(n) is not int or n < 0 for n in numbers):
        raise RefusedError(f"a tensor has size {tuple(size)}, stride {tuple(stride)}, offset {offset}")
    numel = math.prod(size)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if numel else 0
    if last >= storage.flat.numel() and numel:
        raise RefusedError(f"a tensor reaches element {last} of a storage of {storage.flat.numel()}")
    if numel > max(storage.flat.numel(), _MAX_EXPANDED):
        raise RefusedError(f"a tensor of {numel} elements repeats a storage of {storage.flat.numel()}")
    return storage.flat.as_strided(tuple(size), tuple(stride), offset if numel else 0)


def _tensor_v3(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Any, *rest: Any
) -> Tensor:
    if not isinstance(storage, Typed) or not isinstance(dtype, torch.dtype):
        raise RefusedError("a tensor is built on something that is no storage, or with no type")
    raw = storage.flat.view(torch.uint8)
    flat = raw[: raw.numel() // dtype.itemsize * dtype.itemsize].view(dtype)
    return _tensor(Typed(flat), offset, size, stride, *rest)


def _same_tensor(data: Any, *rest: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise RefusedError("a parameter is made of something that is no tensor")
    return data


def _from_type(function: Any, kind: Any, args: Any, state: Any = None) -> Any:
    return _construct(function, args)


def _dict(pairs: Any = (), *rest: Any) -> dict:
    made: dict = {}
    _update(made, [(key, value) for key, value in _plain(pairs)])
    return made


def _default_dict(*factory: Any) -> dict:
    return {}


def _set(values: Any = ()) -> set:
    return set(map(_key, _plain(values)))


def _list(values: Any = ()) -> list:
    return list(_plain(values))


def _tuple(values: Any = ()) -> tuple:
    return tuple(_plain(values))


def _bytes(text: Any = b"", encoding: Any = "latin1") -> bytes:
    if isinstance(text, str) and encoding in ("latin1", "latin-1", "utf-8"):
        return text.encode(encoding)
    if isinstance(text, bytes | bytearray):
        return bytes(text)
    raise RefusedError("it makes bytes of something odd")


def _complex(real: Any, imag: Any = 0.0) -> complex:
    return complex(float(real), float(imag))


def _size(values: Any = ()) -> torch.Size:
    return torch.Size([int(n) for n in _plain(values)])


def _device(kind: Any, index: Any = None) -> torch.device:
    return torch.device(str(kind)) if index is None else torch.device(str(kind), int(index))


def _numpy_dtype(code: Any, *rest: Any) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[<=|]?(b1|[iufc]\d{1,2}|[SU]\d{1,6})", code):
        raise RefusedError(f"it holds numpy values of type {code!r:.100}")
    return np.dtype(code)


def _numpy_empty(kind: Any, *rest: Any) -> np.ndarray:
    return np.empty(0, dtype=np.uint8)


def _fill_array(array: np.ndarray, state: Any) -> None:
    match state:
        case (int(), tuple(shape), np.dtype() as dtype, bool(fortran), bytes(raw)):
            array.__setstate__((1, _checked_shape(shape, dtype, raw), dtype, fortran, raw))  # pyright: ignore
        case _:
            raise RefusedError("it holds a numpy array of objects")


def _numpy_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
    if not isinstance(raw, bytes | bytearray) or not isinstance(dtype, np.dtype) or order not in ("C", "F"):
        raise RefusedError("it holds a numpy array of objects")
    return np.frombuffer(bytes(raw), dtype).reshape(_checked_shape(shape, dtype, raw), order=order).copy(order)


def _numpy_scalar(dtype: Any, raw: Any = b"") -> Any:
    if not isinstance(dtype, np.dtype) or not isinstance(raw, bytes):
        raise RefusedError("it holds a numpy scalar of an odd type")
    _checked_shape((), dtype, raw)
    return np.frombuffer(raw, dtype)[0]


def _checked_shape(shape: Any, dtype: np.dtype, raw: Any) -> tuple[int, ...]:
    numel = 1
    for side in shape:
        if type(side) is not int or side < 0:
            raise RefusedError(f"a numpy array has shape {shape!r:.100}")
        numel *= side
    if numel * dtype.itemsize != len(raw):
        raise RefusedError(f"a numpy array of shape {shape!r:.100} has {len(raw)} bytes")
    return tuple(shape)


_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_MOVED = {  # old module names
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
    "numpy.core.numeric": "numpy._core.numeric",
}
_BUILDERS: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same_tensor,
    "torch._utils._rebuild_parameter_with_state": _same_tensor,
    "torch._tensor._rebuild_from_type_v2": _from_type,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.tuple": _tuple,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "builtins.complex": _complex,
    "_codecs.encode": _bytes,
    "numpy.dtype": _numpy_dtype,
    "numpy._core.multiarray._reconstruct": _numpy_empty,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "numpy._core.numeric._frombuffer": _numpy_from_buffer,
}
