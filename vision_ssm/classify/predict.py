"""`vssm classify val`, `predict` and `pack`: a trained classifier on pictures, and to pass on."""

import csv
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch

from vision_ssm.checkpoint import load_checkpoint, save_checkpoint
from vision_ssm.classify.model import Classifier, classifier_from
from vision_ssm.classify.train import read_squares, scores_of
from vision_ssm.data.images import list_images, read_image
from vision_ssm.data.labelled import find_labelled, to_square
from vision_ssm.errors import UserError
from vision_ssm.files import check_new, write_text


def run_val(weights: Path, data: Path, *, device: str = "auto", output: Path | None = None) -> int:
    """Score a classifier on a labelled set; print accuracy over all and for each class.

    Raises:
        UserError: no classifier there, or no pictures.
    """
    classifier = Classifier.load(weights, device=device)
    pictures = find_labelled(data, "val", classifier.classes)
    squares = read_squares(pictures, classifier.side)
    scores = scores_of(classifier, squares, pictures.labels)
    print(f"{len(pictures)} pictures: " + ", ".join(f"{name} {value:.4f}" for name, value in scores.items()))
    per_class: dict[str, float] = {}
    for label in np.unique(pictures.labels):
        chosen = pictures.labels == label
        per_class[classifier.classes[label]] = scores_of(classifier, squares[chosen], pictures.labels[chosen])[
            "accuracy"
        ]
    for name, value in per_class.items():
        print(f"  {name:<24}{value:7.2%}")
    if output is not None:
        report = {**scores, "pictures": len(pictures), "per_class": per_class}
        write_text(output, json.dumps(report, indent=2) + "\n")
    return 0


def run_predict(
    weights: Path, sources: list[str], *, top: int = 3, device: str = "auto", output: Path | None = None
) -> int:
    """Print the likeliest classes of pictures; a damaged picture is named and the others are done.

    Returns:
        0, or 1 if a picture could not be read.

    Raises:
        UserError: no classifier there, no pictures, or `top` below 1.
    """
    if top < 1:
        raise UserError(f"top must be 1 or more, got {top}")
    classifier = Classifier.load(weights, device=device)
    failed, rows = 0, []
    for file in [file for source in sources for file in list_images(source)]:
        try:
            square = to_square(read_image(file), classifier.side)
        except UserError as error:
            failed += 1
            print(error, file=sys.stderr)
            continue
        _, probabilities = classifier(torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1)[None])
        best = probabilities[0].topk(min(top, len(classifier.classes)))
        found = [(classifier.classes[i], p) for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
        rows += [(str(file), name, f"{probability:.4f}") for name, probability in found]
        print(f"{file}: " + ", ".join(f"{name} {probability:.2f}" for name, probability in found))
    if output is not None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([("file", "class", "probability"), *rows])
        write_text(output, text.getvalue())
    return int(failed > 0)


def run_pack(weights: Path, output: Path) -> int:
    """Write a classifier's weights in half precision, without what only its run needs.

    Raises:
        UserError: no classifier there, or a folder that cannot be written.
    """
    tensors, config = load_checkpoint(weights)
    classifier_from(tensors, config, weights)
    check_new(output)
    kept = {name: config[name] for name in ("task", "network", "classes", "side", "statistics") if name in config}
    best = config.get("trained", {}).get("best", {})
    halves = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    save_checkpoint(output, halves, {**kept, "trained": {"best": best}})
    size = sum(file.stat().st_size for file in output.iterdir())
    print(f"{len(halves)} tensors in {output}, {size / 1e6:.2f} MB")
    return 0
