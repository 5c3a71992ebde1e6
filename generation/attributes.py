"""What can be read from the pixels of a clip of moving shapes, and how far two sets of clips differ in it."""

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np

# Shapes: F frames, S side.

ATTRIBUTES = ("speed", "straightness", "area", "color_drift", "jump", "count")
"""What `attributes` measures, in this order."""
_VISIBLE = 0.15
"""Brightness (0 to 1) above which a pixel belongs to a body."""
_MOST_VISIBLE = 0.3
"""Largest share of a frame that bodies fill; more is noise, whose bright parts run into one."""
_SMALLEST = 4
"""Pixels of the smallest body that counts."""


def attributes(clip: np.ndarray) -> np.ndarray:
    """Attributes of a clip (F, S, S, 3) uint8 with two frames at least: (6,) in the order of `ATTRIBUTES`.

    With the centroid weighted by brightness: speed is the mean length of its steps, straightness the median length of
    its second differences, jump its longest step, all in pixels per frame. Area is the share of pixels that belong to
    a body, color_drift the standard deviation over frames of their mean colour (largest channel, 0 to 1), count the
    mean number of bodies.
    """
    frames = clip.astype(np.float64) / 255
    bright = frames.max(axis=-1)
    visible = bright > _VISIBLE
    steps = np.diff(centroids(bright), axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    bends = np.linalg.norm(np.diff(steps, axis=0), axis=1) if len(steps) > 1 else np.zeros(1)
    pixels = visible.sum(axis=(1, 2)).clip(1)[:, None]
    colors = (frames * visible[..., None]).sum(axis=(1, 2)) / pixels
    counts = [body_count(frame) for frame in clip]
    return np.array(
        [lengths.mean(), np.median(bends), visible.mean(), colors.std(axis=0).max(), lengths.max(), np.mean(counts)]
    )


def measure_all(clips: Iterable[np.ndarray]) -> np.ndarray:
    """`attributes` of every clip, (n, 6)."""
    return np.stack([attributes(clip) for clip in clips])


def centroids(bright: np.ndarray) -> np.ndarray:
    """Brightness-weighted (x, y) in pixels of each frame of (F, S, S), from 0 to 1; the middle of an empty one."""
    axis = np.arange(bright.shape[-1]) + 0.5
    weights = np.where(bright > _VISIBLE / 3, bright, 0)  # so that faint noise far away does not pull
    total = weights.sum(axis=(1, 2))
    x, y = (weights.sum(axis=1) * axis).sum(axis=1), (weights.sum(axis=2) * axis).sum(axis=1)
    centre = np.full((len(bright), 2), bright.shape[-1] / 2)
    return np.where(total[:, None] > 1e-6, np.stack((x, y), axis=1) / total.clip(1e-6)[:, None], centre)


def body_count(frame: np.ndarray) -> int:
    """Number of bodies in a frame (S, S, 3) uint8: connected bright areas, tiny ones left out."""
    return len(_bodies(frame))


def body_colors(frame: np.ndarray) -> np.ndarray:
    """Mean colour of each body in a frame, (N, 3) from 0 to 1, sorted by hue."""
    colors = [frame[mask].mean(axis=0) / 255 for mask in _bodies(frame)]
    hue = [colorsys.rgb_to_hsv(*color)[0] for color in colors]
    return np.array(colors).reshape(-1, 3)[np.argsort(hue)]


def identity_kept(first: np.ndarray, later: np.ndarray, *, tolerance: float = 0.15) -> bool:
    """Whether two frames have the same number of bodies, in the same colours; never for frames of noise.

    Args:
        first: (S, S, 3) uint8.
        later: the same of a later frame.
        tolerance: largest difference of a channel, from 0 to 1.
    """
    before, after = body_colors(first), body_colors(later)
    crowded = max((frame.max(axis=-1) > _VISIBLE * 255).mean() for frame in (first, later)) > _MOST_VISIBLE
    if crowded or len(before) != len(after) or not len(before):
        return False
    # a red on either side of hue 0 is sorted to the front or to the back
    orders = (after, after[::-1])
    return bool(min(np.abs(before - order).max() for order in orders) <= tolerance)


def attribute_distances(samples: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """1-D Wasserstein distance of each attribute, in standard deviations of the reference.

    Args:
        samples: (n, 6) of `measure_all`.
        reference: (m, 6), of real clips.
    """
    spread = reference.std(axis=0).clip(1e-6)
    return {
        name: wasserstein(samples[:, place], reference[:, place]) / float(spread[place])
        for place, name in enumerate(ATTRIBUTES)
    }


def attribute_floors(reference: np.ndarray, samples: int, *, rounds: int = 20, seed: int = 0) -> dict[str, float]:
    """Mean distance of `samples` real clips from as many others as are left: what a perfect model would have.

    Args:
        reference: (m, 6) of real clips, m at least twice `samples`.
        samples: size of the set that is scored.
        rounds: divisions over which the mean is taken.
    """
    if len(reference) < 2 * samples:
        raise ValueError(f"{len(reference)} real clips are too few for floors of {samples}: take twice as many")
    rng, found = np.random.default_rng(seed), []
    for _ in range(rounds):
        order = rng.permutation(len(reference))
        found.append(attribute_distances(reference[order[:samples]], reference[order[samples:]]))
    return mean_of(found)


def in_floors(distances: Mapping[str, float], floors: Mapping[str, float]) -> dict[str, float]:
    """Distances in units of their floors, so that 1 is as good as real clips."""
    return {name: value / max(floors[name], 1e-6) for name, value in distances.items()}


def stream_scores(
    streams: Sequence[np.ndarray], reference: np.ndarray, *, window: int = 16, settled: int = 64, until: int = 256
) -> dict[str, Any]:
    """Whether long clips stay what they were: attribute distances early and late, and identity.

    Args:
        streams: (F, S, S, 3) uint8 each, of one length above `settled` + `window`.
        reference: (m, 6) attributes of real clips of `window` frames.
        window: frames that are measured together.
        settled: frames before the late windows; the distance of each late window's place is taken over all streams,
            so that early and late ones are of equal numbers, and their mean is told.
        until: identity is compared between the first frame and this one (counted from 1), or the last.

    Returns:
        Distances `early` and `late`, `late_by_early`, and `identity_kept`, a share.
    """
    length = len(streams[0])
    if length < settled + window:
        raise ValueError(f"streams of {length} frames have no late windows: draw {settled + window} at least")

    def distances(start: int) -> dict[str, float]:
        return attribute_distances(measure_all(s[start : start + window] for s in streams), reference)

    early = distances(0)
    late = mean_of([distances(start) for start in range(settled, length - window + 1, window)])
    last = min(until, length) - 1
    return {
        "streams": len(streams),
        "frames": length,
        "early": early,
        "late": late,
        "late_by_early": {name: late[name] / max(early[name], 1e-6) for name in ATTRIBUTES},
        "identity_kept": float(np.mean([identity_kept(stream[0], stream[last]) for stream in streams])),
        "identity_until_frame": last + 1,
    }


def wasserstein(a: np.ndarray, b: np.ndarray) -> float:
    """1-D Wasserstein distance of two samples: the area between their distribution functions."""
    a, b = np.sort(a), np.sort(b)
    both = np.sort(np.concatenate((a, b)))
    below = [np.searchsorted(one, both[:-1], side="right") / len(one) for one in (a, b)]
    return float((np.abs(below[0] - below[1]) * np.diff(both)).sum())


def mean_of(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each entry."""
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def _bodies(frame: np.ndarray) -> list[np.ndarray]:
    """Masks of the bodies; their soft edges are left out, so that colours are pure and neighbours stay apart."""
    mask = (frame.max(axis=-1) > 0.4 * 255).astype(np.uint8)
    count, areas, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=4)
    return [areas == i for i in range(1, count) if stats[i, cv2.CC_STAT_AREA] >= _SMALLEST]
