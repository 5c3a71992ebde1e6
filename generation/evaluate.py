"""`vssm generate eval`: how near samples are to real ones, with intervals, floors, counts and protocol."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from generation.attributes import attribute_distances, attribute_floors, in_floors, measure_all
from generation.config import SYNTHETIC, GenerateDataConfig
from generation.distances import bootstrap, frechet_interval, kernel_interval, precision_recall
from generation.features import ClassifierFeatures, Features, ScriptFeatures
from generation.generator import draw, find_weights, load_generator, shipped_names, streams, weights_hash
from generation.outputs import write_facts
from generation.pipelines import VideoDiMPipeline
from generation.reference import Reference, attribute_reference, feature_reference
from generation.sample import check_request, class_numbers
from generation.sources import HELD_OUT_CLIPS
from vision_ssm.config import near_match
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable

PROTOCOL = (
    "Frechet distance of Gaussians and unbiased kernel distance ((x y / D + 1)^3) in the named features, float64; "
    "precision, recall, density and coverage with 5 neighbours; 95 % basic bootstrap intervals over the samples, the "
    "reference taken as it is. Attributes: 1-D Wasserstein distance in standard deviations of the reference; floor: "
    "the same of as many real clips, mean over 20 divisions."
)

REFERENCE_FILE = "reference.npz"
"""Beside shipped weights: statistics of the data that they were trained on."""
LEAST = 8
"""Samples, resamplings and kept features below which no score says anything."""


DRAWN, DRAWN_CLIPS = 5_000, 1_000
"""Samples that are drawn if not told otherwise."""


@dataclass(frozen=True)
class Drawing:
    """How samples are drawn to be scored."""

    count: int | None = None
    """None for `DRAWN`, of moving shapes `DRAWN_CLIPS`."""
    steps: int = 50
    guidance: float = 1.0
    scheduler: str | None = None
    seed: int = 0
    batch_size: int = 128
    frames: int | None = None
    first_steps: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("count", LEAST), ("steps", 1), ("batch_size", 1), ("seed", 0)):
            if (value := getattr(self, name)) is not None and value < least:
                raise UserError(f"{name} must be {least} or more, got {value}")


def run_eval(
    samples: Path,
    reference: str,
    *,
    classifier: Path | None = None,
    network: Path | None = None,
    drawing: Drawing | None = None,
    output: Path = Path("runs/generate-eval.json"),
    device: str = "auto",
    rounds: int = 200,
) -> int:
    """Score weights or saved samples; print a table and write a report.

    Args:
        samples: weights, from which samples are drawn, or an .npz of `vssm generate sample`.
        reference: folder of real samples, .npz of `vssm generate reference`, the name of shipped weights for that of
            their data, or "synthetic".
        classifier: weights of `vssm classify train`, for features and conditional accuracy.
        network: TorchScript file in its place, for real FID or FVD.
        drawing: how samples are drawn.
        output: JSON file of the report.
        device: auto, cpu or cuda.
        rounds: resamplings of the intervals.

    Raises:
        UserError: files that cannot be read or do not belong together.
    """
    if rounds < LEAST:
        raise UserError(f"rounds must be {LEAST} or more, got {rounds}")
    check_writable(output.parent)
    stored = stored_reference(reference)  # what is wrong with it is told before samples are drawn
    by_attributes = reference == SYNTHETIC or (stored is not None and stored.attributes is not None)
    features = None if by_attributes else _features(classifier, network, device)
    if stored is None and not by_attributes and not Path(reference).exists():
        raise UserError(
            f"no real samples at {reference}: give a folder, an .npz, {SYNTHETIC!r}, or shipped weights by name "
            f"({', '.join(shipped_names())}){near_match(reference, shipped_names())}"
        )
    if features is not None and stored is not None:
        _check_same_network(stored, features, reference)
    clips = HELD_OUT_CLIPS if stored is None or stored.attributes is None else len(stored.attributes)

    def fits(count: int, side: int, frames: int) -> None:
        if stored is not None:
            _check_same_shape(stored, reference, side=side, frames=frames)
        if by_attributes and count > clips // 2:
            raise UserError(
                f"{reference} has {clips} real clips, enough for {clips // 2} samples, not {count}: --count"
            )

    drawing = drawing or Drawing()
    drawing = replace(drawing, count=drawing.count or (DRAWN_CLIPS if by_attributes else DRAWN))
    drawn, labels, facts = obtain_samples(samples, drawing, device, fits)
    side, frames = drawn.shape[-1], drawn.shape[1] if drawn.ndim == 5 else 0
    config = GenerateDataConfig(side=side, frames=frames, channels=3 if drawn.shape[-3] == 3 else 1)
    if features is None:
        real = stored or attribute_reference(min(HELD_OUT_CLIPS, 2 * len(drawn) + 256), config)
        scores = score_attributes(drawn, real)
    else:
        real = stored or feature_reference(reference, config, features)
        scores = score_features(drawn, labels, real, features, rounds=rounds)
    report = {"samples": facts, "reference": real.about, "scores": scores, "protocol": PROTOCOL}
    written = write_facts(output.with_suffix("") if output.suffix == ".json" else output, report)
    print(table(scores, real.about))
    print(f"written to {written}")
    return 0


def obtain_samples(
    path: Path, drawing: Drawing, device: str, fits: Callable[[int, int, int], None]
) -> tuple[Tensor, list[int] | None, dict[str, Any]]:
    """Samples (n, C, H, W) or (n, F, C, H, W) uint8, their classes, and how they came about.

    Args:
        path: weights or an .npz of samples.
        drawing: how they are drawn.
        device: auto, cpu or cuda.
        fits: told their number, side and frames (0 for pictures) before they are drawn; may refuse them.

    Raises:
        UserError: neither weights nor an .npz of samples.
    """
    if path.suffix == ".npz":
        try:
            with np.load(path, allow_pickle=False) as found:
                table = dict(found)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        key = next((name for name in ("images", "videos") if name in table), None)
        if key is None or table[key].dtype != np.uint8:
            raise UserError(
                f"{path} holds no samples: it needs images or videos, uint8, as `vssm generate sample` writes"
            )
        count, *frames, _, side, _ = table[key].shape
        fits(count, side, frames[0] if frames else 0)
        labels = table["labels"].tolist() if "labels" in table else None
        return torch.from_numpy(table[key]).movedim(-1, -3), labels, {"file": str(path), "count": len(table[key])}
    pipeline, count = load_generator(path, scheduler=drawing.scheduler), drawing.count or DRAWN
    check_request(pipeline, path, count=count, frames=drawing.frames, first_steps=drawing.first_steps)
    own: Any = pipeline.transformer.config
    frames = (drawing.frames or own.sample_frames) if isinstance(pipeline, VideoDiMPipeline) else 0
    fits(count, pipeline.latent_size(None, None)[1] * pipeline.vae_scale_factor, frames)
    classes = class_numbers(pipeline, (), count)
    pipeline.to(choose_device(device))
    seeds = list(range(drawing.seed, drawing.seed + count))
    drawn = draw(
        pipeline, classes, seeds, steps=drawing.steps, first_steps=drawing.first_steps, guidance=drawing.guidance,
        frames=drawing.frames, batch_size=drawing.batch_size, progress=True,
    )  # fmt: skip
    facts = {
        "weights": str(path),
        "sha256": weights_hash(path),
        **asdict(drawing),
        "scheduler": type(pipeline.scheduler).__name__,
        "stream": streams(pipeline),
    }
    return drawn, classes, facts


def score_features(
    samples: Tensor, labels: Sequence[int] | None, real: Reference, network: Features, *, rounds: int = 200
) -> dict[str, Any]:
    """Distances in the features of a network, and conditional accuracy where it has classes.

    Args:
        samples: (n, C, H, W) or (n, F, C, H, W) uint8.
        labels: class asked for of each, or None.
        real: with features.
        network: the same that `real` was made with.
        rounds: resamplings.
    """
    if real.mean is None or real.covariance is None or real.features is None:
        raise UserError("this reference has no features; make one with `vssm generate reference DATA --classifier W`")
    features, probabilities = network(samples)
    kept = real.features.float()
    scores: dict[str, Any] = {
        "frechet": asdict(frechet_interval(features, real.mean, real.covariance, rounds=rounds)),
        "kernel": asdict(kernel_interval(features, kept, rounds=rounds)),
        **precision_recall(features, kept),
    }
    if probabilities is not None and labels is not None:
        right = (probabilities.argmax(1) == torch.tensor(list(labels))).double()
        share = bootstrap(lambda places: right[places].mean().item(), len(right), rounds=rounds)
        scores["conditional_accuracy"] = asdict(replace(share, low=max(share.low, 0.0), high=min(share.high, 1.0)))
    return scores


def score_attributes(samples: Tensor, real: Reference) -> dict[str, Any]:
    """Attribute distances of clips of moving shapes, in standard deviations and in floors.

    Args:
        samples: (n, F, 3, S, S) uint8.
        real: with attributes, of at least 2 n clips.
    """
    if samples.ndim != 5 or samples.shape[1] < 2:
        raise UserError("attributes are read from clips of two frames or more, these are pictures")
    assert real.attributes is not None
    count = len(samples)
    found = measure_all(clip.permute(0, 2, 3, 1).numpy() for clip in samples)
    distances = attribute_distances(found, real.attributes)
    floors = attribute_floors(real.attributes, count)
    return {"clips": count, "distance": distances, "floor": floors, "in_floors": in_floors(distances, floors)}


def table(scores: dict[str, Any], about: dict[str, Any]) -> str:
    """Scores as text, each beside its floor."""
    if "in_floors" in scores:
        lines = [f"{'attribute':<16}{'distance':>10}{'floor':>10}{'in floors':>11}   ({scores['clips']} clips)"]
        for name, value in scores["distance"].items():
            lines.append(f"{name:<16}{value:>10.4f}{scores['floor'][name]:>10.4f}{scores['in_floors'][name]:>11.2f}")
        return "\n".join(lines)
    floor = about.get("floor") or {}
    lines = [f"{'score':<24}{'value':>10}{'95 % interval':>24}{'real held out':>16}"]
    for name, value in scores.items():
        interval = isinstance(value, dict)
        shown = value["value"] if interval else value
        between = f"{value['low']:.4g} to {value['high']:.4g}" if interval else ""
        real = f"{floor[name]:.4g}" if name in floor else ""
        lines.append(f"{name:<24}{shown:>10.4g}{between:>24}{real:>16}")
    if floor:
        lines.append(f"real held out: {floor['of']}")
    return "\n".join(lines)


def run_reference(
    data: str, output: Path, config: GenerateDataConfig, *, classifier: Path | None, network: Path | None,
    count: int, keep: int, device: str,
) -> int:  # fmt: skip
    """Write the statistics of real samples, to score against without them.

    Raises:
        UserError: no data, no feature network, or another ending than .npz.
    """
    if output.suffix != ".npz":
        raise UserError(f"a reference is an .npz file, got {output}")
    for name, value in (("count", count), ("keep", keep)):
        if value < LEAST:
            raise UserError(f"{name} must be {LEAST} or more, got {value}")
    check_writable(output.parent)
    if data == SYNTHETIC:
        real = attribute_reference(count, config)
    else:
        real = feature_reference(data, config, _features(classifier, network, device))
    real.save(output, keep=keep)
    print(f"{json.dumps(real.about, indent=2)}\nwritten to {output} ({output.stat().st_size / 1024:.0f} KiB)")
    return 0


def _features(classifier: Path | None, network: Path | None, device: str) -> Features:
    if (classifier is None) == (network is None):
        raise UserError("give the network of the features: --classifier WEIGHTS, or --network FILE (TorchScript)")
    return ClassifierFeatures(classifier, device) if classifier is not None else ScriptFeatures(network, device)  # type: ignore[arg-type]


def stored_reference(place: str) -> Reference | None:
    """The statistics in an .npz of `vssm generate reference`, or those that ship beside weights; None for data.

    Raises:
        UserError: a damaged .npz.
    """
    found = find_weights(place)
    file = found / REFERENCE_FILE if found != Path(place) else found
    if file.suffix != ".npz" or not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as arrays:
            holds_statistics = "about" in arrays
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {file}: {error}") from None
    return Reference.load(file) if holds_statistics else None


def _check_same_shape(real: Reference, source: str, *, side: int, frames: int) -> None:
    """Attributes depend on the size of frames and the length of clips, features on the size."""
    for name, ours in (("side", side), ("frames", frames)):
        theirs = real.about.get(name)
        if theirs is not None and theirs != ours:
            raise UserError(f"{source} tells of real samples with {name} {theirs}, these have {ours}")


def _check_same_network(real: Reference, features: Features, source: str) -> None:
    """A distance between the features of two networks means nothing."""
    theirs, ours = real.about.get("features", {}).get("sha256"), features.facts()["sha256"]
    if theirs is not None and theirs != ours:
        raise UserError(f"{source} was made with another feature network ({theirs[:12]}) than this one ({ours[:12]})")
