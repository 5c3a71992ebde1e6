"""Moving shapes: clips made on the fly whose attributes can be read back from the pixels (`generation.attributes`).

One or two bodies of one kind and different colours move evenly on black and bounce off the walls and off each other,
so that number, colours, size and speed stay the same in every frame, however long the clip.
"""

import math
from dataclasses import dataclass

import numpy as np

KINDS = ("disc", "square", "triangle")
"""The classes."""
COLORS = np.array(
    [[230, 60, 60], [60, 200, 80], [70, 110, 250], [235, 215, 60], [220, 80, 220], [70, 220, 225]], np.float64
)
_REFERENCE_SIDE = 32
"""Sizes and speeds below are for this side and grow with it."""
_RADIUS, _SPEED = (3.5, 5.0), (0.6, 1.4)
_TRIES = 200
_SUBSTEPS = 8
"""Steps of the bodies from one frame to the next."""


@dataclass(frozen=True)
class Scene:
    """What a clip begins with. N bodies; places are (x, y) in pixels of the middle, from the upper left corner."""

    kind: int
    places: np.ndarray
    """(N, 2)."""
    velocities: np.ndarray
    """(N, 2) pixels per frame."""
    radius: float
    """Of the circle that touches the walls and the other body."""
    colors: np.ndarray
    """(N,) rows of `COLORS`."""


class MovingShapes:
    """An endless set of clips; clip `index` is always the same.

    Args:
        clips: number of clips that `len` says.
        frames: length of a clip.
        side: of its square frames in pixels, 16 or more.
        seed: another one gives other clips.
    """

    classes: tuple[str, ...] = KINDS

    def __init__(self, clips: int, *, frames: int = 16, side: int = _REFERENCE_SIDE, seed: int = 0) -> None:
        if side < 16 or frames < 1 or clips < 1:
            raise ValueError(
                f"clips need 16 pixels and 1 frame at least, got side {side}, {frames} frames, {clips} clips"
            )
        self.clips, self.frames, self.side, self.seed = clips, frames, side, seed

    def __len__(self) -> int:
        return self.clips

    def label(self, index: int) -> int:
        """Class of a clip, the kind of its bodies."""
        return index % len(KINDS)

    def read(self, index: int) -> np.ndarray:
        """Clip `index`, (F, S, S, 3) uint8."""
        scene = self._scene(index)
        return render(scene, trajectory(scene, self.frames, self.side), self.side)

    def read_perturbed(self, index: int, error: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Clip `index` with a past like that of a stream, whose every frame has small errors.

        Errors of place add up, as the next frame goes on from there; those of size do not.

        Args:
            index: which clip.
            error: standard deviation in x, y and radius of every body in every frame of the past; pixels.
            rng: source of the errors.

        Returns:
            Frames and past, (F, S, S, 3) uint8 each. Frame 0 is the clip's own, frame t is what rightly follows frame
            t - 1 of the past.
        """
        scene = self._scene(index)
        count = len(scene.places)
        track, past = perturbed_trajectory(scene, error * rng.standard_normal((self.frames, count, 2)), self.side)
        radii = (scene.radius + error * rng.standard_normal((self.frames, count))).clip(scene.radius / 2)
        return render(scene, track, self.side), render(scene, past, self.side, radii)

    def _scene(self, index: int) -> Scene:
        return random_scene(np.random.default_rng((self.seed, index)), self.label(index), self.side)


def random_scene(rng: np.random.Generator, kind: int, side: int) -> Scene:
    """One or two bodies that do not touch, with equal radii and different colours."""
    scale = side / _REFERENCE_SIDE
    count, radius = int(rng.integers(1, 3)), float(rng.uniform(*_RADIUS)) * scale
    for _ in range(_TRIES):
        places = rng.uniform(radius, side - radius, (count, 2))
        if count == 1 or np.linalg.norm(places[0] - places[1]) > 2.4 * radius:
            break
    else:
        places = np.array([[radius, radius], [side - radius, side - radius]])[:count]
    angles, speeds = rng.uniform(0, 2 * np.pi, count), rng.uniform(*_SPEED, count) * scale
    velocities = np.stack((np.cos(angles), np.sin(angles)), axis=1) * speeds[:, None]
    return Scene(kind, places, velocities, radius, rng.choice(len(COLORS), count, replace=False))


def trajectory(scene: Scene, frames: int, side: int) -> np.ndarray:
    """Places of the bodies in every frame, (frames, N, 2); walls reflect, bodies exchange velocities where they meet.

    Args:
        scene: what is there in the first frame.
        frames: how many.
        side: of a frame.
    """
    return perturbed_trajectory(scene, np.zeros((frames, len(scene.places), 2)), side)[0]


def perturbed_trajectory(scene: Scene, errors: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Places of bodies that are moved a little after every frame, and go on from there at the velocity they have.

    Args:
        scene: what is there in the first frame.
        errors: (F, N, 2) pixels by which they are moved, no farther than to the walls.
        side: of a frame.

    Returns:
        (F, N, 2) twice: where they come to in each frame, and where they are moved to from there.
    """
    # plain numbers: with arrays of two or four this loop takes twenty times as long, and a GPU waits for its data
    places, velocities = scene.places.ravel().tolist(), scene.velocities.ravel().tolist()  # x0, y0, x1, y1
    low, high = scene.radius, side - scene.radius
    track, past = [], []
    for t, moves in enumerate(errors.reshape(len(errors), -1).tolist()):
        if t:
            _go_on(places, velocities, scene.radius, side)
        track.append(list(places))
        places = [min(max(place + move, low), high) for place, move in zip(places, moves, strict=True)]
        past.append(list(places))
    return np.array(track).reshape(errors.shape), np.array(past).reshape(errors.shape)


def render(scene: Scene, track: np.ndarray, side: int, radii: np.ndarray | None = None) -> np.ndarray:
    """Frames (F, S, S, 3) uint8 of bodies with soft edges on black.

    Args:
        scene: kind, radius and colours.
        track: (F, N, 2) places.
        side: S.
        radii: (F, N) in the place of the scene's.
    """
    axis = np.arange(side) + 0.5
    frames = np.zeros((len(track), side, side, 3))
    for body, color in enumerate(scene.colors):
        dx = axis[None, None, :] - track[:, body, 0, None, None]
        dy = axis[None, :, None] - track[:, body, 1, None, None]
        radius = scene.radius if radii is None else radii[:, body, None, None]
        coverage = (0.5 - _distance(scene.kind, dx, dy, radius)).clip(0, 1)[..., None]
        frames *= 1 - coverage
        frames += coverage * COLORS[color]
    return np.rint(frames).astype(np.uint8)


def _go_on(places: list[float], velocities: list[float], radius: float, side: int) -> None:
    """Move bodies on to the next frame."""
    low, high = radius, side - radius
    for _ in range(_SUBSTEPS):
        for i, velocity in enumerate(velocities):
            place = places[i] + velocity / _SUBSTEPS
            if place < low:
                place, velocities[i] = 2 * low - place, abs(velocity)
            elif place > high:
                place, velocities[i] = 2 * high - place, -abs(velocity)
            places[i] = place
        if len(places) == 4:
            _bounce(places, velocities, radius)


def _bounce(places: list[float], velocities: list[float], radius: float) -> None:
    """Where two equal bodies meet, each takes the other's velocity along the line between them."""
    dx, dy = places[2] - places[0], places[3] - places[1]
    distance = math.hypot(dx, dy)
    if distance > 2.2 * radius:
        return
    x, y = dx / max(distance, 1e-9), dy / max(distance, 1e-9)
    closing = (velocities[0] - velocities[2]) * x + (velocities[1] - velocities[3]) * y
    if closing > 0:
        velocities[:] = [v + closing * part for v, part in zip(velocities, (-x, -y, x, y), strict=True)]


def _distance(kind: int, dx: np.ndarray, dy: np.ndarray, radius: float | np.ndarray) -> np.ndarray:
    """Signed distance to the edge of a body in pixels, negative inside; corners lie on the circle of `radius`."""
    if KINDS[kind] == "disc":
        return np.hypot(dx, dy) - radius
    if KINDS[kind] == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - radius / np.sqrt(2)
    slope = np.sqrt(3) / 2
    return np.maximum(dy, np.maximum(slope * dx, -slope * dx) - dy / 2) - radius / 2
