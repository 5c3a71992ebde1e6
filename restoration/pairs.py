"""`vssm restore degrade`: clean pictures to pairs on disk, the same for everybody who uses the same seed."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from torch import Tensor
from tqdm import tqdm

from restoration.degrade import Degradation, crop_to_multiple, degradation_for, seed_of
from restoration.reading import read_levels, to_tensor, with_name
from vision_ssm.data.images import list_images
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_bytes, write_text

Format = Literal["png", "tiff"]


def run_degrade(
    source: str | Path,
    output: str | Path,
    *,
    task: str,
    degradation: Mapping[str, Any] | None = None,
    seed: int = 0,
    format: Format = "png",
) -> int:
    """Write input/ and target/ with the names and folders of the source, mask/ for inpainting, and degradation.json.

    The clean picture is cut to a multiple of the scale. In PNG files, of 8 bits or of 16 where the source has them,
    values are clipped and rounded; TIFF files of 32-bit floats keep noise exactly as training and scoring see it.

    Args:
        source: picture, folder (to any depth) or glob pattern.
        output: folder; files in it are replaced, and are no source.
        task: of `restoration.tasks`.
        degradation: parameters that replace the task's.
        seed: another one gives other noise, kernels and masks; they also follow from each file's name.
        format: png or tiff.

    Returns:
        Exit code: 0, or 1 if some picture could not be degraded.

    Raises:
        UserError: no pictures, unknown parameters, an unwritable folder.
    """
    operator = degradation_for(task, degradation)
    output = Path(output)
    files = [file for file in list_images(source) if not file.resolve().is_relative_to(output.resolve())]
    if not files:
        raise UserError(f"{source} lies in the output folder {output}: its pictures would be replaced; give another")
    base = Path(source) if Path(source).is_dir() else None
    check_writable(output)
    failed = 0
    written: dict[Path, Path] = {}
    for file in tqdm(files, desc="degrade", leave=False, disable=None):
        name = (file.relative_to(base) if base else Path(file.name)).with_suffix(f".{format}")
        try:
            if name in written:
                raise UserError(f"{written[name]} has the same name; their results would overwrite each other")
            _degrade_file(file, name, output, operator, seed_of(file, seed), format)
            written[name] = file
        except UserError as error:
            failed += 1
            print(with_name(file, error), file=sys.stderr)
    facts = {"task": task, "degradation": operator.parameters(), "seed": seed, "pictures": len(written)}
    write_text(output / "degradation.json", json.dumps(facts, indent=2) + "\n")
    exact = "" if format == "tiff" else " (clipped and rounded; --format tiff keeps noise as it is)"
    print(f"{len(written)} {'pair' if len(written) == 1 else 'pairs'} written to {output}, {failed} failed{exact}")
    return int(failed > 0)


def _degrade_file(file: Path, name: Path, output: Path, operator: Degradation, seed: int, format: Format) -> None:
    pixels = read_levels(file)
    deep = pixels.dtype != np.uint8
    clean = crop_to_multiple(to_tensor(pixels), operator.scale)
    degraded = operator.apply(clean, seed=seed)
    if degraded.shape[0] == 4:
        write_bytes((output / "mask" / name).with_suffix(".png"), _encoded(degraded[3:], "png", deep=False))
    write_bytes(output / "input" / name, _encoded(degraded[:3], format, deep))
    write_bytes(output / "target" / name, _encoded(clean, format, deep))


def _encoded(image: Tensor, format: Format, deep: bool) -> bytes:
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy()[..., ::-1])  # OpenCV's order is BGR
    if format == "png":
        white, kind = (65535, np.uint16) if deep else (255, np.uint8)
        pixels = np.rint(pixels.clip(0, 1) * white).astype(kind)
    _, data = cv2.imencode(f".{format}", pixels)
    return data.tobytes()
