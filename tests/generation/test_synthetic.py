"""Moving shapes and their attributes: every defect moves the attributes that it should, and real clips are at 1."""

import numpy as np
import pytest

from generation.attributes import (
    ATTRIBUTES,
    attribute_distances,
    attribute_floors,
    attributes,
    body_count,
    identity_kept,
    in_floors,
    measure_all,
    stream_scores,
    wasserstein,
)
from generation.synthetic import COLORS, KINDS, MovingShapes, Scene, perturbed_trajectory, render, trajectory

CLIPS = 120


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    return measure_all(map(MovingShapes(3 * CLIPS, seed=7).read, range(3 * CLIPS)))


def scene(kind: int = 0, places=((10.0, 16.0),), velocities=((1.0, 0.0),)) -> Scene:
    return Scene(kind, np.array(places), np.array(velocities), 4.0, np.arange(len(places)))


def test_attributes_are_those_the_clip_was_made_with():
    disc = scene()
    clip = render(disc, trajectory(disc, 8, 32), 32)
    values = dict(zip(ATTRIBUTES, attributes(clip), strict=True))
    assert values["speed"] == pytest.approx(1.0, abs=0.01)
    assert values["jump"] == pytest.approx(1.0, abs=0.02)
    assert values["straightness"] < 0.02
    assert values["area"] == pytest.approx(np.pi * 4.3**2 / 32**2, rel=0.05)
    assert values["count"] == 1


def test_bodies_keep_inside_and_apart():
    two = scene(places=((10.0, 16.0), (22.0, 16.0)), velocities=((1.2, 0.1), (-0.9, 0.2)))
    track = trajectory(two, 400, 32)
    assert track.min() >= 4.0 - 1e-9
    assert track.max() <= 28.0 + 1e-9
    assert np.linalg.norm(track[:, 0] - track[:, 1], axis=1).min() > 8.0
    moving = np.linalg.norm(np.diff(track, axis=0), axis=2).mean()
    assert 0.5 < moving < 1.6


def test_bodies_go_on_from_where_they_were_moved_to():
    errors = 0.1 * np.random.default_rng(0).standard_normal((10, 1, 2))
    disc = scene()
    track, past = perturbed_trajectory(disc, errors, 32)
    np.testing.assert_allclose(past - track, errors)
    np.testing.assert_allclose(track[0], disc.places)
    np.testing.assert_allclose(track[1:] - past[:-1], np.broadcast_to(disc.velocities, (9, 1, 2)))
    two = scene(places=((10.0, 16.0), (22.0, 16.0)), velocities=((1.2, 0.1), (-0.9, 0.2)))
    track, past = perturbed_trajectory(two, 0.3 * np.random.default_rng(1).standard_normal((400, 2, 2)), 32)
    assert past.min() == 4.0, "no farther than to the walls"
    assert past.max() == 28.0
    assert np.linalg.norm(past[:, 0] - past[:, 1], axis=1).min() > 6.5
    lengths = np.linalg.norm(track[1:] - past[:-1], axis=2)
    np.testing.assert_allclose(np.median((lengths**2).sum(axis=1)), 1.2**2 + 0.1**2 + 0.9**2 + 0.2**2, rtol=0.05)


def test_pasts_with_errors():
    clips = MovingShapes(9, frames=40)
    for same in clips.read_perturbed(4, 0.0, np.random.default_rng(0)):
        np.testing.assert_array_equal(same, clips.read(4))
    disc = clips.read(3)
    frames, past = clips.read_perturbed(3, 0.3, np.random.default_rng(0))
    light = [clip.sum(axis=(1, 2, 3)) / clip.sum(axis=(1, 2, 3)).mean() for clip in (disc, frames, past)]
    assert light[0].std() < 0.01
    assert light[1].std() < 0.01, "frames have the right size"
    radius = clips._scene(3).radius
    assert light[2].std() == pytest.approx(2 * 0.3 / radius, rel=0.3), "of the past each another one"


def test_a_clip_is_always_the_same_and_others_differ():
    clips = MovingShapes(9)
    np.testing.assert_array_equal(clips.read(4), MovingShapes(9).read(4))
    assert not np.array_equal(clips.read(4), MovingShapes(9, seed=1).read(4))
    assert [clips.label(i) for i in range(4)] == [0, 1, 2, 0]
    assert clips.read(0).shape == (16, 32, 32, 3)


@pytest.mark.parametrize("kind", range(len(KINDS)))
def test_every_kind_has_its_area_and_colour(kind):
    frame = render(scene(kind, velocities=((0.0, 0.0),)), np.array([[[16.0, 16.0]]]), 32)[0]
    share = (frame.astype(float) / COLORS[0])[..., 0].sum()
    area = {"disc": np.pi * 16, "square": 2 * 16, "triangle": 3 * np.sqrt(3) / 4 * 16}[KINDS[kind]]
    assert share == pytest.approx(area, rel=0.03)


def test_bodies_and_colours_are_kept_over_long_clips():
    for index in range(6):
        clip = MovingShapes(9, frames=256).read(index)
        assert identity_kept(clip[0], clip[-1])
        assert not identity_kept(clip[0], np.roll(clip[-1], 1, axis=-1))
        assert not identity_kept(clip[0], np.zeros_like(clip[0]))
        assert body_count(clip[0]) in (1, 2)
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    assert not identity_kept(noise[0], noise[1])
    assert not identity_kept(noise[0], noise[0])


def test_the_distance_is_the_area_between_distributions():
    assert wasserstein(np.array([0.0, 1.0]), np.array([0.5, 1.5])) == pytest.approx(0.5)
    assert wasserstein(np.array([0.0, 0.0, 3.0]), np.array([0.0, 3.0])) == pytest.approx(0.5)


DEFECTS = {
    "none": (lambda clip, rng: clip, set()),
    "still": (lambda clip, rng: np.repeat(clip[:1], len(clip), 0), {"speed", "jump"}),
    "shuffled": (lambda clip, rng: clip[rng.permutation(len(clip))], {"speed", "straightness", "jump"}),
    "noise": (lambda clip, rng: (clip + rng.normal(0, 40, clip.shape)).clip(0, 255), {"straightness", "area"}),
    "flicker": (lambda clip, rng: clip * rng.uniform(0.5, 1, (len(clip), 1, 1, 1)), {"color_drift"}),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_moves_its_attributes(name, real):
    change, moved = DEFECTS[name]
    rng, source = np.random.default_rng(0), MovingShapes(CLIPS, seed=8)
    clips = (change(source.read(i).astype(np.float64), rng).astype(np.uint8) for i in range(CLIPS))
    found = in_floors(attribute_distances(measure_all(clips), real), attribute_floors(real, CLIPS))
    for attribute in moved:
        assert found[attribute] > 5, found
    if name in ("none", "flicker"):
        assert all(value < 4.5 for key, value in found.items() if key not in moved), found


def test_streams_that_stay_what_they_are_and_one_that_does_not(real):
    clips = [MovingShapes(20, frames=112, seed=21).read(i) for i in range(20)]
    good = stream_scores(clips, real)
    assert (good["streams"], good["frames"], good["identity_until_frame"]) == (20, 112, 112)
    assert good["identity_kept"] == 1.0
    assert max(good["late"].values()) < 0.6
    faded = [np.concatenate((clip[:64], np.repeat(np.roll(clip[64:65], 1, axis=-1), 48, 0))) for clip in clips]
    bad = stream_scores(faded, real)
    assert bad["identity_kept"] == 0.0
    assert bad["early"] == good["early"]
    assert bad["late_by_early"]["speed"] > 5
    with pytest.raises(ValueError, match="draw 80 at least"):
        stream_scores([clips[0][:70]], real)


def test_too_few_real_clips_for_a_floor_are_refused(real):
    with pytest.raises(ValueError, match="take twice as many"):
        attribute_floors(real, len(real))
