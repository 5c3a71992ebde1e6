"""Sharp, clean training crops out of photographs: what a camera or JPEG left in them goes with making them smaller.

    python tools/photo_crops.py photos/ crops/ --side 256

Every picture is made smaller, to at most half its size and LONG pixels on its longer side, and cut into squares of SIDE
pixels; squares without detail (sky, blur) are left out. A side that is then shorter than a square is kept as it is.
Writes PNG files, named by their pictures and corners, and prints their number.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from vision_ssm.data.images import list_images, read_image
from vision_ssm.errors import UserError
from vision_ssm.files import check_new
from vision_ssm.viz import save_picture

SMALLEST = 64
"""Pictures that would get a side below this are left out."""


def shrunk(picture: Image.Image, longest: int) -> Image.Image:
    """A picture at half its size or less, antialiased, its longer side at most ``longest`` pixels."""
    factor = min(0.5, longest / max(picture.size))
    width, height = (max(1, round(side * factor)) for side in picture.size)
    return picture.resize((width, height), Image.Resampling.BICUBIC)


def detail(pixels: np.ndarray) -> float:
    """Mean absolute difference of neighbours in grey levels of (H, W, 3) pixels."""
    grey = pixels.astype(np.float32).mean(axis=2)
    return float(np.abs(np.diff(grey, axis=0)).mean() + np.abs(np.diff(grey, axis=1)).mean()) / 2


def crops(picture: Image.Image, side: int, least: float) -> dict[str, np.ndarray]:
    """Squares of at least so much detail (a shorter side stays as it is), by the name of their corner."""
    pixels = np.asarray(picture)
    height, width = pixels.shape[:2]
    tops, lefts = range(0, max(1, height - side + 1), side), range(0, max(1, width - side + 1), side)
    found = {f"{top}_{left}": pixels[top : top + side, left : left + side] for top in tops for left in lefts}
    return {name: crop for name, crop in found.items() if min(crop.shape[:2]) >= SMALLEST and detail(crop) >= least}


def main() -> int:
    """Read, shrink, cut, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", help="folder (searched to any depth), picture or glob pattern")
    parser.add_argument("crops", type=Path, help="new folder")
    parser.add_argument("--side", type=int, default=256, help="of a square, pixels")
    parser.add_argument("--long", type=int, default=1600, help="most pixels of the longer side before cutting")
    parser.add_argument("--detail", type=float, default=2.5, help="least mean difference of neighbours, grey levels")
    args = parser.parse_args()
    try:
        if args.side < SMALLEST:
            raise UserError(f"--side must be {SMALLEST} pixels or more, got {args.side}")
        files = list_images(args.photos)
        check_new(args.crops)
        total = 0
        for file in files:
            picture = Image.fromarray(read_image(file))
            found = crops(shrunk(picture, args.long), args.side, args.detail)
            for corner, crop in found.items():
                save_picture(args.crops / f"{file.parent.name}_{file.stem}_{corner}.png", crop)
            total += len(found)
            print(f"{file}: {len(found)}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{total} crops of {len(files)} pictures in {args.crops}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
