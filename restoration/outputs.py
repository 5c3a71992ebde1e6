"""Where results go: names below the output folder, never over an input."""

from collections.abc import Sequence
from pathlib import Path

from restoration.picture import Picture
from restoration.picture_writer import SUFFIXES, why_not
from restoration.video import WRITABLE
from vision_ssm.data.images import IMAGE_SUFFIXES
from vision_ssm.data.media import is_video, named_files
from vision_ssm.errors import UserError

_FALLBACK, _FALLBACK_FLOAT, _FALLBACK_VIDEO = ".png", ".tif", ".mp4"


def find_targets(inputs: Sequence[str | Path], output: Path) -> dict[Path, Path]:
    """Each input file with the path of its result, whose ending may still change (see `final_target`).

    Args:
        inputs: pictures, videos, folders, glob patterns.
        output: a folder, or for a single file the name of the result.

    Raises:
        UserError: nothing there, an output that is a single file for several inputs, the folder of the inputs, or a
            picture of a kind that cannot be written.
    """
    if output.is_dir() and any(Path(one).is_dir() and output.samefile(one) for one in inputs):
        raise UserError(f"-o {output} is the folder of the inputs; choose another output folder")
    ending = output.suffix.lower()
    as_file = ending in (*SUFFIXES, *WRITABLE) and not output.is_dir()
    if ending in IMAGE_SUFFIXES and not as_file and not output.is_dir():
        raise UserError(f"-o {output}: {ending} cannot be written; take one of {' '.join(SUFFIXES)}, or give a folder")
    files = named_files(inputs, output)
    if not as_file:
        return {path: output / name for path, name in files.items()}
    if len(files) > 1 or any(Path(one).is_dir() for one in inputs):
        raise UserError(f"-o {output} is one file, but there are {len(files)} to restore; give a folder")
    (path,) = files
    if is_video(path) != is_video(output):
        raise UserError(f"{path} cannot become {output}: a video gives a video, a picture a picture")
    return {path: output}


def final_target(target: Path, picture: Picture, suffix: str | None) -> Path:
    """Where a picture is written: with the wanted ending, else that of its file where the format can hold it.

    Raises:
        UserError: the wanted format cannot hold the picture.
    """
    if suffix is not None:
        reason = why_not(suffix, picture)
        if reason is not None:
            raise UserError(f"cannot be written as {suffix}: {reason}")
        return target.with_suffix(suffix)
    if why_not(target.suffix, picture) is None:
        return target
    return target.with_suffix(_FALLBACK_FLOAT if picture.bits == 32 else _FALLBACK)


def video_target(target: Path) -> Path:
    """Where a video is written: endings that cannot be written become .mp4."""
    return target if target.suffix.lower() in WRITABLE else target.with_suffix(_FALLBACK_VIDEO)


def check_inputs_kept(targets: dict[Path, Path], suffix: str | None) -> None:
    """Refuse to write over an input.

    Raises:
        UserError: names the file.
    """
    inputs = {path.resolve() for path in targets}
    for target in targets.values():
        endings = {target.suffix, suffix or "", _FALLBACK, _FALLBACK_FLOAT, _FALLBACK_VIDEO}
        hit = next((one for one in (target.with_suffix(end) for end in endings) if one.resolve() in inputs), None)
        if hit is not None:
            raise UserError(f"the result {hit} would replace an input; choose another output folder")
