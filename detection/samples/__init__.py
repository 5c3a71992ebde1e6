"""Sample data sets of real pictures from wheels of the package index: tree crowns from the air, and digit scenes."""

from pathlib import Path
from typing import Literal

from detection.formats import available_splits, load_detection_set
from detection.samples.scenes import make_scenes
from detection.samples.trees import make_trees

__all__ = ["make_sample", "make_scenes", "make_trees"]


def make_sample(name: Literal["trees", "scenes"], folder: str | Path) -> None:
    """Make a sample set with its default numbers and print what is in it.

    Raises:
        UserError: As `make_trees` and `make_scenes`.
    """
    made = (make_trees if name == "trees" else make_scenes)(folder)
    sets = [load_detection_set(folder, split) for split in available_splits(folder)]
    counts = [f"{s.split} {len(s.records)} pictures, {sum(len(r.labels) for r in s.records)} boxes" for s in sets]
    print(f"{folder} ({'made' if made else 'there already'}): {'; '.join(counts)}")
