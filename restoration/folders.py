"""Which pictures of a folder belong together: clean ones, or pairs as the known data sets unpack."""

import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from restoration.reading import header_of, refuse_bad
from vision_ssm.data.images import ImageHeader, list_images
from vision_ssm.errors import UserError

Split = Literal["train", "val", "test"]
Layout = Literal["pictures", "twin folders", "SIDD", "high and low resolution"]

_DEGRADED = ("blur", "input", "inputs", "lq", "lr", "noisy", "degraded", "low")
_CLEAN = ("sharp", "target", "targets", "gt", "hq", "hr", "clean", "groundtruth", "reference", "high")
_MASK = "mask"
_UNUSED = ("blur_gamma", _MASK)
"""GoPro has every blurred picture a second time, with gamma correction."""
_SPLIT_WORDS: dict[str, Split] = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "test": "test",
    "testing": "test",
}  # fmt: skip
_FFHQ_TEST, _FFHQ_VAL = 1000, 2000
"""FFHQ: pictures below 1000 for testing, then to 2000 for validation, the rest for training, as is the custom in work
on inverse problems."""


@dataclass(frozen=True)
class Example:
    """A clean picture, with its degraded partner and the mask of known pixels where the data has them."""

    name: str
    """Path below the folder of the set, without ending."""
    target: Path
    input: Path | None = None
    mask: Path | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """Those that there are."""
        return tuple(file for file in (self.target, self.input, self.mask) if file)


@dataclass(frozen=True)
class ExampleSet:
    """What was found in a folder."""

    root: Path
    layout: Layout
    split: Split | None
    """None where the folder has no splits."""
    examples: tuple[Example, ...]

    @property
    def paired(self) -> bool:
        """Whether the inputs are given."""
        return self.layout != "pictures"

    def __str__(self) -> str:
        what = f"pairs ({self.layout})" if self.paired else "clean pictures"
        of = f", {self.split} split" if self.split else ""
        return f"{self.root}: {len(self.examples)} {what}{of}"


def find_examples(root: str | Path, *, split: Split | None = None, scale: int = 1) -> ExampleSet:
    """Find clean pictures or pairs in a folder, to any depth.

    Pairs are: twin folders (GoPro's ``blur`` and ``sharp``, ``input`` and ``target``, ...) with the same names in
    both; SIDD's ``..._NOISY_...`` and ``..._GT_...``; with a scale above 1 the ``..._HR`` and ``..._LR_.../X4`` folders
    of DIV2K and Flickr2K. With scale 1 the latter give their clean pictures.

    Args:
        root: the folder (or one picture, or a glob pattern).
        split: the part of it that is wanted, where folders are called train, val or test, or where it is FFHQ; val and
            test stand in for each other where there is one of them. None takes all.
        scale: of the task.

    Raises:
        UserError: Nothing there, pictures without a partner, or no such split.
    """
    files = list_images(root)
    base = Path(root) if Path(root).is_dir() else files[0].parent
    files, found_split = _of_split(base, files, split)
    for layout, pairs in (("twin folders", _twins(base, files)), ("SIDD", _sidd(base, files))):
        if pairs:
            return ExampleSet(Path(root), layout, found_split, tuple(pairs))  # type: ignore[arg-type]
    high, low = _by_resolution(base, files)
    if scale > 1 and (pairs := _high_and_low(base, high, low, scale)):
        return ExampleSet(Path(root), "high and low resolution", found_split, tuple(pairs))
    clean = tuple(Example(_name(base, file), file) for file in high if not _has_folder(base, file, _UNUSED))
    if not clean:
        raise UserError(f"{root} holds {len(files)} degraded pictures but no clean ones to compare them with")
    return ExampleSet(Path(root), "pictures", found_split, clean)


def check_pictures(sets: Sequence[ExampleSet], *, scale: int) -> dict[Path, ImageHeader]:
    """Read the header of every picture, and refuse the sets if some are bad or do not fit their partner.

    Returns:
        Header of each picture, in order.

    Raises:
        UserError: Names the bad files.
    """
    files = [file for found in sets for e in found.examples for file in e.files]
    with ThreadPoolExecutor() as pool:
        headers = dict(zip(files, pool.map(_header_or_problem, files), strict=True))
    problems = [header for header in headers.values() if isinstance(header, str)]
    good = {file: header for file, header in headers.items() if isinstance(header, ImageHeader)}
    for example in (e for found in sets for e in found.examples if e.input is not None):
        problems += _misfits(example, good, scale)
    refuse_bad(problems)
    return good


def _misfits(example: Example, headers: dict[Path, ImageHeader], scale: int) -> list[str]:
    target = headers.get(example.target)
    found = []
    for partner, factor in ((example.input, scale), (example.mask, 1)):
        other = headers.get(partner) if partner else None
        if target is None or other is None:
            continue
        (width, height), (small_width, small_height) = target.shown_size, other.shown_size
        # what is left of a side when it is not a multiple of the scale may be cut off or kept
        if not (0 <= width - factor * small_width < factor and 0 <= height - factor * small_height < factor):
            found.append(
                f"{partner} is {small_width}x{small_height} and {example.target} {width}x{height}; with scale {factor} "
                "they do not belong together"
            )
    return found


def _header_or_problem(file: Path) -> ImageHeader | str:
    try:
        return header_of(file)
    except UserError as error:
        return str(error)


def _name(base: Path, file: Path) -> str:
    return file.relative_to(base).with_suffix("").as_posix() if file.is_relative_to(base) else file.stem


def _folders(base: Path, file: Path) -> tuple[str, ...]:
    return file.relative_to(base).parts[:-1] if file.is_relative_to(base) else ()


def _has_folder(base: Path, file: Path, names: Iterable[str]) -> bool:
    return any(part.lower() in names for part in _folders(base, file))


def _of_split(base: Path, files: list[Path], wanted: Split | None) -> tuple[list[Path], Split | None]:
    """Files of the wanted split, and its name; all files where there are no splits."""
    if wanted is None:
        return files, None
    splits = _ffhq_splits(files) or [_split_word(base, file) for file in files]
    present = {split for split in splits if split}
    if len(present) < 2:
        return files, None
    instead: dict[Split, Split] = {"val": "test", "test": "val", "train": "train"}
    chosen = wanted if wanted in present else instead[wanted]
    found = [file for file, split in zip(files, splits, strict=True) if split == chosen]
    if not found:
        raise UserError(f"{base} has the splits {', '.join(sorted(present))}, but no {wanted}")
    return found, chosen


def _split_word(base: Path, file: Path) -> Split | None:
    words = re.split(r"[^a-z]+", "/".join(_folders(base, file)).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _ffhq_splits(files: list[Path]) -> list[Split] | None:
    numbers = [int(file.stem) for file in files if re.fullmatch(r"\d{5}", file.stem)]
    if len(numbers) < len(files) or len(set(numbers)) < len(numbers) or max(numbers) <= _FFHQ_VAL:
        return None
    return ["test" if n < _FFHQ_TEST else "val" if n < _FFHQ_VAL else "train" for n in numbers]


def _twins(base: Path, files: list[Path]) -> list[Example]:
    degraded = [file for file in files if _has_folder(base, file, _DEGRADED)]
    clean: dict[tuple[str, ...], Path] = {}
    masks: dict[tuple[str, ...], Path] = {}
    for file in files:
        if _has_folder(base, file, _CLEAN):
            clean[_twin_key(base, file, _CLEAN)] = file
        elif _has_folder(base, file, (_MASK,)):
            masks[_twin_key(base, file, (_MASK,))] = file
    if not degraded or not clean:
        return []
    keys = {file: _twin_key(base, file, _DEGRADED) for file in degraded}
    _refuse_lonely([file for file, key in keys.items() if key not in clean], "clean partner of the same name")
    return [Example("/".join(key), clean[key], file, masks.get(key)) for file, key in keys.items()]


def _twin_key(base: Path, file: Path, names: Sequence[str]) -> tuple[str, ...]:
    """Path below the set without ending and without the folder that tells the twins apart."""
    folders = list(_folders(base, file))
    place = max(i for i, part in enumerate(folders) if part.lower() in names)
    return (*folders[:place], *folders[place + 1 :], file.stem)


def _sidd(base: Path, files: list[Path]) -> list[Example]:
    noisy = [file for file in files if "_NOISY_" in file.name]
    clean = {str(file) for file in files if "_GT_" in file.name}
    if not noisy or not clean:
        return []
    partners = {file: str(file.with_name(file.name.replace("_NOISY_", "_GT_"))) for file in noisy}
    _refuse_lonely([file for file, partner in partners.items() if partner not in clean], "_GT_ partner")
    return [Example(_name(base, file), Path(partner), file) for file, partner in partners.items()]


def _by_resolution(base: Path, files: list[Path]) -> tuple[list[Path], list[Path]]:
    """Pictures, and those among them that lie in LR folders beside HR folders."""
    low = [file for file in files if any(re.search(r"_lr(_|$)", part.lower()) for part in _folders(base, file))]
    return [file for file in files if file not in set(low)], low


def _high_and_low(base: Path, high: list[Path], low: list[Path], scale: int) -> list[Example]:
    ending = re.compile(rf"x{scale}$", re.IGNORECASE)
    partners = {(_family(base, file), ending.sub("", file.stem)): file for file in low if ending.search(file.stem)}
    if not partners:
        return []
    _refuse_lonely([f for f in high if (_family(base, f), f.stem) not in partners], f"partner of scale {scale}")
    return [Example(_name(base, file), file, partners[_family(base, file), file.stem]) for file in high]


def _family(base: Path, file: Path) -> str:
    """``DIV2K_train`` for files in DIV2K_train_HR and in DIV2K_train_LR_bicubic/X4."""
    parts = (re.match(r"(.*)_(hr|lr)(_|$)", part, re.IGNORECASE) for part in _folders(base, file))
    return next((found[1] for found in parts if found), "")


def _refuse_lonely(lonely: list[Path], what: str, most: int = 5) -> None:
    if lonely:
        more = f" and {len(lonely) - most} more" if len(lonely) > most else ""
        raise UserError(f"without a {what}: {', '.join(map(str, lonely[:most]))}{more}; add or remove them")
