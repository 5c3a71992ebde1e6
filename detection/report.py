"""The written result of a scoring: table, metrics.json, COCO results, plots."""

import json
from pathlib import Path

from detection.data import val_loader
from detection.evaluate import collect_detections, score
from detection.formats import load_detection_set
from detection.metrics import Metrics
from detection.plots import plot_confusion, plot_history, plot_labels, plot_precision_recall, save_samples
from detection.pretrained import load_model
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text


def write_report(
    weights: str | Path,
    output: str | Path,
    *,
    data: str | Path,
    split: str = "val",
    image_size: int | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
) -> Metrics:
    """Score weights on a split, print the table, and write everything worth keeping to a folder.

    Writes metrics.json, detections.json (COCO results), pr_curve.png, confusion.png, labels.png and samples.jpg; beside
    a run's metrics.csv also curves.png.

    Raises:
        UserError: weights or data that cannot be read, classes that differ, or a folder that cannot be written.
    """
    output = Path(output)
    model, config = load_model(weights)
    dataset = load_detection_set(data, split)
    if tuple(config["names"]) != dataset.names:
        raise UserError(
            f"{weights} knows the classes {', '.join(config['names'])}; {data} has {', '.join(dataset.names)}: "
            "score on data with the same classes in the same order"
        )
    chosen = choose_device(device)
    size = config["image_size"] if image_size is None else image_size
    loader = val_loader(dataset, image_size=size, batch_size=batch_size, workers=workers)
    check_writable(output)
    detections = collect_detections(model.to(chosen), loader, device=chosen, progress=True)
    metrics = score(dataset, detections)
    print(metrics.table())
    write_text(output / "metrics.json", json.dumps(metrics.to_dict(), indent=2) + "\n")
    results = detections.to_coco_results(dataset.category_ids)
    write_text(output / "detections.json", json.dumps(results) + "\n")
    plot_precision_recall(metrics, output / "pr_curve.png")
    plot_confusion(metrics, output / "confusion.png")
    plot_labels(dataset, output / "labels.png")
    save_samples(dataset, detections, output / "samples.jpg")
    if (output / "metrics.csv").is_file():
        plot_history(output / "metrics.csv", output / "curves.png")
    print(f"written to {output}")
    return metrics
