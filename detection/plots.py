"""Curves and pictures of a training run and of an evaluation, as PNG files.

matplotlib is imported when a plot is made, and used without pyplot, so that no global state or window is involved.
"""

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from detection.formats import DetectionSet, ImageRecord
from detection.metrics import Detections, Metrics
from vision_ssm.errors import UserError
from vision_ssm.files import replacing
from vision_ssm.viz import class_color, draw_boxes, fit, grid, save_picture, titled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SAMPLE_HEIGHT = 480
_MANY = 15  # more classes than this are not told apart by colour or number
_TOGETHER = (("AP", "AP50", "AP75"), ("APs", "APm", "APl"), ("AR1", "AR10", "AR100"), ("VOC_AP50", "VOC_AP50_11"))
_LEFT_OUT = ("step", "seconds", "data_wait", "images_per_s", "gpu_memory_gb", "ARs", "ARm", "ARl")


def plot_history(table: str | Path, path: str | Path) -> None:
    """Losses, AP and learning rate over the epochs of a run.

    Args:
        table: CSV file with a row for each epoch: `epoch`, `train/...` losses, `val/...` metrics, `lr`; others are
            plotted too. Empty cells are epochs without that value.
        path: PNG to write.

    Raises:
        UserError: the file is missing or has no rows.
    """
    from matplotlib.ticker import MaxNLocator

    columns = _read_columns(table)
    epochs = columns.pop("epoch", np.arange(1, len(next(iter(columns.values()))) + 1))
    panels = _panels([name for name in columns if name.split("/")[-1] not in _LEFT_OUT])
    figure, axes = _figure(len(panels))
    for axis, names in zip(axes, panels, strict=True):
        for name in names:
            there = ~np.isnan(columns[name])
            marker = "o" if there.sum() < 25 else None
            axis.plot(epochs[there], columns[name][there], marker=marker, markersize=3, label=name.split("/")[-1])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        _label(axis, title=_panel_title(names), x="epoch")
        if len(names) > 1:
            axis.set_ylim(0, max(0.05, 1.08 * max(np.nanmax(columns[name], initial=0) for name in names)))
            axis.legend(fontsize=8, loc="lower right")
    _save(figure, path)


def plot_precision_recall(metrics: Metrics, path: str | Path) -> None:
    """Precision against recall at IoU 0.5, for each class and in the mean."""
    recall = np.linspace(0, 1, metrics.precision.shape[1])
    figure, (axis,) = _figure(1, size=(7, 5))
    shown = [k for k, c in enumerate(metrics.per_class) if c.boxes]
    for k in shown:
        one = metrics.per_class[k]
        if len(shown) <= _MANY:
            color = _rgb(k)
            axis.plot(recall, metrics.precision[k], color=color, linewidth=1.2, label=f"{one.name} {one.ap50:.3f}")
        else:
            axis.plot(recall, metrics.precision[k], color="0.8", linewidth=0.6)
    if len(shown) > 1:
        label = f"mean of {len(shown)} classes {metrics.ap50:.3f}"
        axis.plot(recall, metrics.precision[shown].mean(axis=0), color="black", linewidth=2.5, label=label)
    _label(axis, title="Precision and recall at IoU 0.5 (AP50 in the legend)", x="recall", y="precision")
    axis.set(xlim=(0, 1), ylim=(0, 1.02))
    if shown:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
    _save(figure, path)


def plot_confusion(metrics: Metrics, path: str | Path) -> None:
    """What each true class was taken for: columns add up to 1, the last column is what was seen in the background."""
    counts = metrics.confusion
    shares = counts / np.maximum(counts.sum(axis=0, keepdims=True), 1)
    names = [c.name for c in metrics.per_class] + ["background"]
    side = min(max(5.0, 2.5 + 0.55 * len(names)), 16.0)
    figure, (axis,) = _figure(1, size=(side + 1, side))
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axis, shrink=0.8, label="share of the column")
    font = 9 if len(names) <= _MANY else 6
    axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 5 else 0, fontsize=font)
    axis.set_yticks(range(len(names)), names, fontsize=font)
    for row, column in np.argwhere(counts) if len(names) <= _MANY + 1 else ():
        color = "white" if shares[row, column] > 0.5 else "black"
        text = f"{shares[row, column]:.2f}\n{counts[row, column]}"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    _label(axis, title="Confusion (score > 0.25, IoU > 0.45)", x="true", y="predicted")
    axis.grid(False)
    _save(figure, path)


def plot_labels(dataset: DetectionSet, path: str | Path) -> None:
    """Statistics of the boxes of a data set: classes, boxes per picture, sizes, shapes. Ignored boxes are left out."""
    labels = np.concatenate([r.labels[~r.ignore] for r in dataset.records] or [np.zeros(0, np.int64)])
    sides = np.concatenate([_relative_sides(r) for r in dataset.records] or [np.zeros((0, 4))])
    figure, axes = _figure(4, columns=2, size=(12, 8.5))
    _plot_class_counts(axes[0], np.bincount(labels, minlength=len(dataset.names)), dataset.names)
    per_picture = [int((~r.ignore).sum()) for r in dataset.records]
    step = max(1, math.ceil((max(per_picture, default=0) + 1) / 40))
    axes[1].hist(per_picture, bins=(np.arange(0, max(per_picture, default=0) + step + 1, step) - 0.5).tolist())
    _label(axes[1], title=f"Boxes in a picture ({len(per_picture)} pictures)", x="boxes", y="pictures")
    if len(sides):
        root = np.sqrt(sides[:, 2] * sides[:, 3])
        bins = np.geomspace(0.9 * max(root.min(), 1), 1.1 * max(root.max(), 1), 40).tolist()
        axes[2].hist(root, bins=bins)
        axes[2].set_xscale("log")
        for limit in (32, 96):
            axes[2].axvline(limit, color="black", linestyle="--", linewidth=1)
        _plain_log_ticks(axes[2])
        axes[3].scatter(sides[:, 0], sides[:, 1], s=4, alpha=min(1.0, 300 / len(sides) + 0.05), color="tab:blue")
    _label(axes[2], title="Size (small | medium | large)", x="square root of the area, pixels", y="boxes")
    _label(axes[3], title="Shape", x="width / picture width", y="height / picture height")
    axes[3].set(xlim=(0, 1.02), ylim=(0, 1.02))
    _save(figure, path)


def save_samples(
    dataset: DetectionSet, detections: Detections, path: str | Path, *, count: int = 8, conf: float = 0.25
) -> None:
    """Pictures of a data set as a grid: the truth at the left, what was found beside it.

    Args:
        dataset: the ground truth; `count` of its pictures are taken, evenly spread.
        detections: in native pixels, for example of `collect_detections`.
        path: picture to write; .jpg keeps it small.
        count: number of pictures.
        conf: detections below this are not drawn.
    """
    spread = np.linspace(0, len(dataset.records) - 1, min(count, len(dataset.records))).round().astype(int)
    records = [dataset.records[k] for k in spread]
    if not records:
        return
    aspect = float(np.median([r.width / r.height for r in records]))
    cell = (_SAMPLE_HEIGHT, round(_SAMPLE_HEIGHT * min(max(aspect, 0.5), 2.0)))
    pairs = [_truth_and_found(record, dataset.names, detections, conf, cell) for record in records]
    save_picture(path, grid(pairs, columns=2, gap=8))


def _truth_and_found(
    record: ImageRecord, names: Sequence[str], detections: Detections, conf: float, cell: tuple[int, int]
) -> np.ndarray:
    """Two drawn pictures side by side, each in a cell of (height, width) below its title."""
    image = fit(record.read(), *cell)
    scale = image.shape[1] / record.width
    wanted = ~record.ignore
    classes = record.labels[wanted]
    truth = draw_boxes(image, scale * record.boxes[wanted], classes, [names[int(label)] for label in classes])
    mine = np.flatnonzero((detections.image_ids == record.image_id) & (detections.scores > conf))
    mine = mine[np.argsort(-detections.scores[mine], kind="stable")]
    labels, scores = detections.labels[mine], detections.scores[mine]
    captions = [f"{names[int(label)]} {score:.2f}" for label, score in zip(labels, scores, strict=True)]
    found = draw_boxes(image, scale * detections.boxes[mine], labels, captions)
    titles = (f"{record.path.name}: truth, {len(classes)} boxes", f"found, {len(mine)}")
    parts = [titled(grid([part], cell=cell), title) for part, title in zip((truth, found), titles, strict=True)]
    return grid(parts, columns=2, gap=2)


def _read_columns(table: str | Path) -> dict[str, np.ndarray]:
    try:
        with Path(table).open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {table}: {error.strerror or error}") from error
    if not rows:
        raise UserError(f"{table} has no epoch to plot")
    columns = {name: np.array([_number(row[name]) for row in rows]) for name in rows[0]}
    return {name: values for name, values in columns.items() if not np.isnan(values).all()}


def _number(cell: str | None) -> float:
    try:
        return float(cell or "nan")
    except ValueError:
        return float("nan")


def _panels(names: list[str]) -> list[list[str]]:
    """Column names dealt out to panels: each loss alone, metrics that belong together, the learning rate last."""
    panels = [[name] for name in names if name.startswith("train/")]
    groups: dict[object, list[str]] = {}
    for name in sorted(names, key=lambda name: name == "lr"):
        if not name.startswith("train/"):
            short = name.split("/")[-1]
            groups.setdefault(next((group for group in _TOGETHER if short in group), name), []).append(name)
    return panels + list(groups.values())


def _panel_title(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(name.split("/")[-1] for name in names)


def _plot_class_counts(axis: "Axes", counts: np.ndarray, names: Sequence[str]) -> None:
    """Bars of the most frequent classes."""
    order = np.argsort(-counts, kind="stable")[: 2 * _MANY]
    axis.bar(range(len(order)), counts[order], color=[_rgb(int(k)) for k in order])
    axis.set_xticks(range(len(order)), [names[int(k)] for k in order], rotation=90 if len(order) > 6 else 0, fontsize=8)
    for place, k in enumerate(order if len(order) <= _MANY else ()):
        axis.text(place, float(counts[k]), str(counts[k]), ha="center", va="bottom", fontsize=8)
    rest = f", the {len(order)} most frequent of {len(names)}" if len(names) > len(order) else ""
    _label(axis, title=f"Classes ({counts.sum()} boxes{rest})", y="boxes")


def _relative_sides(record: ImageRecord) -> np.ndarray:
    """(n, 4) width and height of the boxes as shares of the picture's, then in pixels."""
    boxes = record.boxes[~record.ignore]
    sides = boxes[:, 2:] - boxes[:, :2]
    return np.concatenate((sides / (record.width, record.height), sides), axis=1)


def _rgb(label: int) -> tuple[float, ...]:
    return tuple(v / 255 for v in class_color(label))


def _figure(
    panels: int, *, columns: int | None = None, size: tuple[float, float] | None = None
) -> "tuple[Figure, list[Axes]]":
    """A figure with so many axes, filled row by row."""
    from matplotlib.figure import Figure

    columns = columns or min(panels, 4)
    rows = math.ceil(panels / columns)
    figure = Figure(figsize=size or (3.6 * columns, 2.8 * rows), layout="constrained")
    axes: list[Any] = [figure.add_subplot(rows, columns, k + 1) for k in range(panels)]
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _label(axis: "Axes", *, title: str, x: str = "", y: str = "") -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)


def _plain_log_ticks(axis: "Axes") -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    axis.xaxis.set_major_locator(FixedLocator([2**k for k in range(12)]))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(ScalarFormatter())


def _save(figure: "Figure", path: str | Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
