"""`make demo`: what the suite does, on this machine's CPU, in a few minutes.

1. Detection, shipped weights: Mamba-YOLO-T finds tree crowns in aerial photographs it has not seen, and is scored.
   The photographs come from one 20 MB wheel of the Python package index; offline it is taken from the cache.
2. Detection, training: a Mamba-YOLO learns to find handwritten digits on photographs, from scratch, in about 90 s.
3. Restoration, shipped weights: photographs of scikit-image are made noisy or blurred, restored and scored beside
   classic methods on the same pixels. A task whose weights do not ship is left out and said.
4. Generation, shipped weights: satellite pictures of ten classes, and videos of moving shapes drawn frame after frame,
   each scored against statistics of real ones.
"""

import json
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from skimage import data as skimage_data

from detection.config import DetectConfig
from detection.outputs import run_predict
from detection.predict_options import PredictOptions
from detection.report import write_report
from detection.samples import make_scenes, make_trees
from detection.train import DetectionTask, train_detector
from generation.evaluate import score_attributes, score_features, stored_reference, table
from generation.features import ClassifierFeatures
from generation.generator import draw, load_generator
from generation.outputs import picture_grid, save_samples
from generation.sample import class_numbers
from restoration.evaluate import run_eval
from restoration.pairs import run_degrade
from restoration.run import run_restore
from restoration.tasks import weights_for
from vision_ssm.config import load_config
from vision_ssm.errors import UserError
from vision_ssm.training import RunInfo
from vision_ssm.viz import grid, save_picture, titled

DATA, OUT = Path("data"), Path("demo")
TREE_WEIGHTS = "mamba_yolo_t_trees"
LEAST_TREES_AP50 = 0.31
LEAST_SCENES_AP50 = 0.30
PHOTOGRAPHS = ("chelsea", "coffee")
RESTORATIONS = {
    "denoise": ({"sigma": 25}, ["nlm", "tv"], 2.0),
    "deblur": ({}, ["wiener", "richardson-lucy"], 1.0),
}
"""Task: its degradation, the classic methods beside it, the decibels by which the best of them must be beaten."""

PICTURES_WEIGHTS = "eurosat_dim"
LEAST_RIGHT = 0.6
"""Share of the generated pictures in which the judge sees the class that was asked for."""
VIDEO_WEIGHTS = "shapes_stream"
MOST_FLOORS = 6.0
"""Largest distance of an attribute of the generated videos, in that of as many real ones (few: it is large itself)."""


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


def photographs() -> None:
    """Degrade, score and restore photographs with the shipped weights of each task."""
    begun = time.perf_counter()
    folder = DATA / "photographs"
    for name in PHOTOGRAPHS:
        save_picture(folder / f"{name}.png", getattr(skimage_data, name)())
    for task, (degradation, methods, least) in RESTORATIONS.items():
        print(f"\n== Photographs, {task}, shipped weights ==")
        try:
            weights, out = weights_for(task)[0], OUT / task
        except UserError as error:
            print(f"left out: {error}")
            continue
        shutil.rmtree(out, ignore_errors=True)
        options = {"task": task, "degradation": degradation}
        run_eval(folder, **options, weights=[weights], methods=methods, device="cpu", output=out)
        means = json.loads((out / "scores.json").read_text(encoding="utf-8"))["means"]
        psnr = {row["method"]: row["psnr"] for row in means}
        gain = psnr[weights] - max(psnr[method] for method in methods)
        if gain < least:
            sys.exit(f"demo: {weights} is {gain:.2f} dB above the best classic method, {least} at least are expected")
        run_degrade(folder, out / "pairs", **options)
        run_restore([str(out / "pairs" / "input")], output=out / "restored", task=task, device="cpu")
        _side_by_side(out, folder)
    print(f"{time.perf_counter() - begun:.0f} s")


def _side_by_side(out: Path, clean: Path) -> None:
    """Middles of the degraded, restored and clean photographs in one picture."""
    parts = {"input": out / "pairs" / "input", "restored": out / "restored", "clean": clean}
    tiles = [
        titled(_middle(cv2.imread(str(folder / f"{name}.png"))), f"{name}, {part}")
        for name in PHOTOGRAPHS
        for part, folder in parts.items()
    ]
    save_picture(out / "side_by_side.png", grid(tiles, columns=len(parts)))


def _middle(pixels: np.ndarray, side: int = 256) -> np.ndarray:
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    return np.ascontiguousarray(pixels[top : top + side, left : left + side, ::-1])


def generated() -> None:
    """Draw two pictures of each class with the shipped weights and score them."""
    begun = time.perf_counter()
    print("\n== Satellite pictures of ten classes, generated with shipped weights ==")
    pipeline, real = load_generator(PICTURES_WEIGHTS), stored_reference(PICTURES_WEIGHTS)
    labels = class_numbers(pipeline, (), 20)
    assert real is not None
    assert labels is not None
    pictures = draw(pipeline, labels, list(range(len(labels))), steps=20, guidance=4.0)
    save_samples(OUT / "generated" / "eurosat.png", pictures)
    scores = score_features(pictures, labels, real, ClassifierFeatures(Path("eurosat"), "cpu"))
    few = {name: scores[name] for name in ("kernel", "conditional_accuracy")}  # the others need hundreds of samples
    print(table(few, real.about))
    print(f"{time.perf_counter() - begun:.0f} s")
    if scores["conditional_accuracy"]["value"] < LEAST_RIGHT:
        sys.exit(f"demo: fewer than {LEAST_RIGHT:.0%} of the generated pictures are of the class that was asked for")


def streamed() -> None:
    """Draw short videos of moving shapes with the shipped weights, frame after frame, and score them."""
    begun = time.perf_counter()
    print("\n== Moving shapes, generated frame after frame with shipped weights ==")
    pipeline, real = load_generator(VIDEO_WEIGHTS), stored_reference(VIDEO_WEIGHTS)
    labels = class_numbers(pipeline, (), 12)
    assert real is not None
    clips = draw(pipeline, labels, list(range(len(labels or ()))), steps=4, first_steps=50)
    save_samples(OUT / "generated" / "shapes.mp4", clips)
    save_picture(OUT / "generated" / "shapes.png", picture_grid(clips))
    scores = score_attributes(clips, real)
    print(table(scores, real.about))
    print(f"{time.perf_counter() - begun:.0f} s")
    if max(scores["in_floors"].values()) > MOST_FLOORS:
        sys.exit(f"demo: generated videos differ from real ones by more than {MOST_FLOORS:g} floors")


def main() -> None:
    """Run all parts."""
    torch.manual_seed(0)
    trees()
    scenes()
    photographs()
    generated()
    streamed()
    shown = ["trees/pictures", "trees_val/samples.jpg", "scenes/samples.jpg"]
    shown += [f"{task}/side_by_side.png" for task in RESTORATIONS if (OUT / task / "side_by_side.png").exists()]
    shown += ["generated/eurosat.png", "generated/shapes.png", "generated/shapes.mp4"]
    print("\nPictures to look at: " + ", ".join(f"{OUT}/{name}" for name in shown))


if __name__ == "__main__":
    main()
