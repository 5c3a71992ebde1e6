"""Checkpoints: a folder with `config.json` and `model.safetensors`, written so that nothing complete is ever lost.

`config.json` is everything needed to build the model again; `model.safetensors` carries a copy of it, so that the one
file is enough too. A `training/` folder beside them, for resuming, belongs to `vision_ssm.training`.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import vision_ssm
from vision_ssm.errors import UserError
from vision_ssm.files import replacing, to_disk, write_text

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
FORMAT = 1
_MARK = "vision_ssm"  # key of config.json with the format and the version that wrote it
_FOREIGN = (".pt", ".pth", ".bin", ".ckpt")


def save_checkpoint(folder: str | Path, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Write a checkpoint folder; an older one in the same place stays whole until the new one is complete.

    Args:
        folder: made if it does not exist; other files in it are left alone.
        state_dict: tensors on any device; those that share memory are stored separately.
        config: JSON values; what `load_checkpoint` gives back.

    Raises:
        UserError: The folder cannot be written (no space, no permission).
    """
    folder = Path(folder)
    stored = {_MARK: {"format": FORMAT, "version": vision_ssm.__version__}, **config}
    text = json.dumps(stored, indent=2) + "\n"
    tensors = _storable(state_dict)
    weights = folder / WEIGHTS_FILE
    with replacing(weights) as temporary:
        try:
            save_file(tensors, temporary, metadata={"format": "pt", "config": json.dumps(stored)})
        except SafetensorError as error:
            raise UserError(f"cannot write {weights}: {error}; what was there before is intact") from None
        to_disk(temporary)
    write_text(folder / CONFIG_FILE, text)
    to_disk(folder / CONFIG_FILE)
    to_disk(folder)


def load_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read weights and config from a checkpoint folder, a `.safetensors` file or a foreign `.pt`/`.pth` file.

    Returns:
        The state dict, on the CPU in the stored types, and the config; {} where the file has none.

    Raises:
        UserError: Missing, damaged, no checkpoint, or written by a newer version.
    """
    path = Path(path)
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise UserError(f"no checkpoint at {path}: no such file or folder{_nearby(path.parent)}")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in _FOREIGN:
        from vision_ssm.foreign import find_state_dict, load_foreign

        return find_state_dict(load_foreign(path)), {}
    raise UserError(
        f"{path} is no checkpoint; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, a .safetensors file, "
        f"or a file of another project ({', '.join(_FOREIGN)})"
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config of a checkpoint folder, without its weights.

    Raises:
        UserError: Damaged, or written by a newer version.
    """
    config = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{config} is damaged: {error}") from None
    return _checked(values, config)


@dataclass(frozen=True)
class LoadReport:
    """What `load_matching` took from a state dict and what not; `str` of it is for people."""

    taken: tuple[str, ...]
    other_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]
    """(name, shape in the file, shape in the model)."""
    not_in_file: tuple[str, ...]
    not_in_model: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether file and model have the same tensors."""
        return not (self.other_shape or self.not_in_file or self.not_in_model)

    def require_complete(self, source: str | Path) -> None:
        """Refuse weights that do not fit the model exactly.

        Raises:
            UserError: Something was left out; names `source` and the tensors.
        """
        if not self.complete:
            raise UserError(f"the weights in {source} belong to another model: {'; '.join(self._parts())}")

    def __str__(self) -> str:
        return "\n".join(self._parts())

    def _parts(self) -> list[str]:
        total = len(self.taken) + len(self.other_shape) + len(self.not_in_file)
        parts = [f"{len(self.taken)} of {total} tensors of the model taken"]
        if self.other_shape:
            shapes = [f"{name} (file {list(file)}, model {list(model)})" for name, file, model in self.other_shape]
            parts.append(f"{len(shapes)} of another shape: {_some(shapes)}")
        if self.not_in_file:
            parts.append(f"{len(self.not_in_file)} not in the file: {_some(self.not_in_file)}")
        if self.not_in_model:
            parts.append(f"{len(self.not_in_model)} not in the model: {_some(self.not_in_model)}")
        return parts


def load_matching(model: nn.Module, state_dict: Mapping[str, Tensor]) -> LoadReport:
    """Copy into a model every tensor that has the name and shape of one of its own; the others keep their values.

    The model keeps its types and devices: weights stored as float16 load into a float32 model.

    Raises:
        UserError: Not one tensor fits, so these are weights of another model; the model is unchanged.
    """
    own = model.state_dict()
    found = {name: (own[name], tensor) for name, tensor in state_dict.items() if name in own}
    taken = {name: pair for name, pair in found.items() if pair[0].shape == pair[1].shape}
    report = LoadReport(
        taken=tuple(taken),
        other_shape=tuple((n, tuple(t.shape), tuple(o.shape)) for n, (o, t) in found.items() if n not in taken),
        not_in_file=tuple(name for name in own if name not in state_dict),
        not_in_model=tuple(name for name in state_dict if name not in own),
    )
    if own and not taken:
        raise UserError(f"these are weights of another model: {'; '.join(report._parts())}")
    with torch.no_grad():
        for target, tensor in taken.values():
            target.copy_(tensor)
    return report


def _storable(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, no two of which share memory."""
    tensors: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in state_dict.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"state_dict[{name!r}] is a {type(tensor).__name__}; a checkpoint holds tensors only")
        stored = tensor.detach().cpu().contiguous()
        place = stored.untyped_storage().data_ptr()
        tensors[name] = stored.clone() if place in storages else stored
        storages.add(place)
    return tensors


def _load_folder(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    weights, config = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    missing = [file.name for file in (config, weights) if not file.is_file()]
    if missing:
        raise UserError(f"{folder} is no checkpoint: it has no {' and no '.join(missing)}{_nearby(folder)}")
    values = read_config(folder)
    return _read_safetensors(weights)[0], values


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut off: {error}") from None
    try:
        values = json.loads(metadata.get("config", "{}"))
    except json.JSONDecodeError:
        values = {}  # another project's use of the word
    return tensors, _checked(values, path) if isinstance(values, dict) else {}


def _checked(values: Any, path: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{path} is damaged: it holds a {type(values).__name__}, not a mapping")
    mark = values.pop(_MARK, None)
    if isinstance(mark, dict) and isinstance(mark.get("format"), int) and mark["format"] > FORMAT:
        raise UserError(
            f"{path} was written by vision-ssm {mark.get('version')}, newer than this {vision_ssm.__version__}; "
            "update vision-ssm to read it"
        )
    return values


def _nearby(folder: Path) -> str:
    """A hint with the checkpoints that lie in a folder."""
    if not folder.is_dir():
        return ""
    found = sorted(str(file.parent) for file in folder.glob(f"*/{WEIGHTS_FILE}"))
    return f"; checkpoints there: {_some(found)}" if found else ""


def _some(names: Any, limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f", ... ({len(names) - limit} more)" if len(names) > limit else "")
