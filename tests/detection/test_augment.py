"""Augmentation: boxes follow the pixels exactly, draws cover their ranges, nothing else is random."""

import numpy as np
import pytest

from detection import augment
from detection.augment import Sample
from detection.data_config import AugmentConfig, DataConfig
from vision_ssm.errors import UserError

_PLAIN = AugmentConfig(translate=0, scale=0, hsv_h=0, hsv_s=0, hsv_v=0, flip_lr=0)


def _marked(width: int = 96, height: int = 64, box: tuple[int, ...] = (20, 10, 60, 40), value: int = 255) -> Sample:
    """A dark picture with one bright rectangle, and the box around it."""
    image = np.zeros((height, width, 3), np.uint8)
    image[box[1] : box[3], box[0] : box[2]] = value
    return Sample(image, np.array([box], np.float32), np.array([3]))


def _bright_box(image: np.ndarray) -> np.ndarray:
    """xyxy around what is brighter than the padding."""
    rows, columns = (np.flatnonzero((image[..., 0] > 127).any(axis)) for axis in (1, 0))
    return np.array((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))


def test_without_ranges_the_picture_is_centred_unchanged() -> None:
    sample = _marked()
    result = augment.random_affine(sample, 96, _PLAIN, np.random.default_rng(0))
    np.testing.assert_array_equal(result.image[16:80], sample.image)
    assert (result.image[:16] == 114).all()
    assert (result.image[80:] == 114).all()
    np.testing.assert_array_equal(result.boxes, np.array([[20, 26, 60, 56]], np.float32))


@pytest.mark.parametrize(
    "config",
    [
        AugmentConfig(translate=0.3, scale=0),
        AugmentConfig(translate=0, scale=0.5),
        AugmentConfig(translate=0.1, scale=0.5),
    ],
)
def test_boxes_follow_the_pixels(config: AugmentConfig) -> None:
    for seed in range(20):
        result = augment.random_affine(_marked(), 96, config, np.random.default_rng(seed))
        np.testing.assert_allclose(_bright_box(result.image), result.boxes[0], atol=0.6, err_msg=str(seed))


def test_boxes_surround_turned_pixels() -> None:
    config = AugmentConfig(degrees=30, shear=10, translate=0, scale=0)
    for seed in range(20):
        result = augment.random_affine(_marked(), 96, config, np.random.default_rng(seed))
        np.testing.assert_allclose(_bright_box(result.image), result.boxes[0], atol=1.5, err_msg=str(seed))


def test_mosaic_joins_four_pictures_and_their_boxes() -> None:
    samples = [
        Sample(np.full((64, 64, 3), 200 + 10 * n, np.uint8), np.array([[0, 0, 64, 64]], np.float32), np.array([n]))
        for n in range(4)
    ]
    config = AugmentConfig(translate=0, scale=0)
    shown = set()
    for seed in range(30):
        result = augment.mosaic(samples, 64, config, np.random.default_rng(seed))
        assert result.image.shape == (64, 64, 3)
        for box, label in zip(result.boxes, result.labels, strict=True):
            x1, y1, x2, y2 = np.round(box).astype(int)
            assert (result.image[y1:y2, x1:x2] == 200 + 10 * label).all(), (seed, label)
        shown |= {tuple(sorted(result.labels.tolist()))}
        covered = (result.boxes[:, 2:] - result.boxes[:, :2]).prod(1).sum()
        assert covered == pytest.approx((result.image[..., 0] > 114).sum(), rel=0.1)
    assert (0, 1, 2, 3) in shown


def test_mosaic_leaves_no_seam_between_scaled_tiles() -> None:
    samples = [Sample(np.full((64, 64, 3), 200, np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, np.int64))] * 4
    rows, columns = [], []
    for seed in range(30):
        image = augment.mosaic(samples, 64, AugmentConfig(), np.random.default_rng(seed)).image[..., 0]
        inside = np.argwhere(image == 200)
        (top, left), (bottom, right) = inside.min(0), inside.max(0)
        rows.append((image[top : bottom + 1, left : right + 1] == 200).all())
        columns.append(set(np.unique(image)) <= {114, 200})
    assert all(rows)
    assert all(columns)


def test_small_hidden_and_thin_boxes_are_dropped() -> None:
    boxes = np.array([[10, 10, 12, 30], [10, 10, 13, 30], [-30, 0, 3, 20], [-30, 0, 5, 20]], np.float32)
    sample = Sample(np.zeros((640, 640, 3), np.uint8), boxes, np.arange(4))
    result = augment.random_affine(sample, 640, _PLAIN, np.random.default_rng(0))
    assert result.labels.tolist() == [1, 3], "2 px wide; 3/33 visible"
    thin = Sample(sample.image, np.array([[0, 10, 640, 14], [0, 10, 640, 17]], np.float32), np.arange(2))
    assert augment.random_affine(thin, 640, _PLAIN, np.random.default_rng(0)).labels.tolist() == [1], (
        "aspect 160 and 91"
    )


def test_flips() -> None:
    sample = _marked()
    both = augment.random_flips(sample, AugmentConfig(flip_lr=1, flip_ud=1), np.random.default_rng(0))
    np.testing.assert_array_equal(both.image, sample.image[::-1, ::-1])
    np.testing.assert_array_equal(both.boxes, np.array([[36, 24, 76, 54]], np.float32))
    left = augment.random_flips(sample, AugmentConfig(flip_lr=1), np.random.default_rng(0))
    np.testing.assert_array_equal(left.image, sample.image[:, ::-1])
    np.testing.assert_array_equal(_bright_box(left.image), left.boxes[0])
    upright = augment.random_flips(sample, AugmentConfig(flip_lr=0), np.random.default_rng(0))
    np.testing.assert_array_equal(upright.boxes, sample.boxes)


def test_colors_stay_in_their_ranges() -> None:
    image = np.full((4, 4, 3), (200, 100, 50), np.uint8)  # hue 10 of 180, value 200
    brightest = []
    for seed in range(200):
        changed = augment.change_colors(image, AugmentConfig(hsv_h=0, hsv_s=0, hsv_v=0.2), np.random.default_rng(seed))
        brightest.append(int(changed.max()))
        assert changed[0, 0].argmax() == 0
    assert 158 <= min(brightest) < 170
    assert 230 < max(brightest) <= 241
    np.testing.assert_array_equal(augment.change_colors(image, _PLAIN, np.random.default_rng(0)), image)
    grey = augment.change_colors(image, AugmentConfig(hsv_s=0.99, hsv_h=0, hsv_v=0), np.random.default_rng(3))
    assert grey[0, 0].max() == 200, "saturation leaves the value alone"


def test_mixup_blends_and_keeps_all_boxes() -> None:
    first, second = _marked(value=255), _marked(box=(50, 30, 90, 60), value=155)
    mixed = augment.mixup(first, second, np.random.default_rng(0))
    assert len(mixed.boxes) == len(mixed.labels) == 2
    weight = mixed.image[15, 25, 0] / 255
    assert 0.2 < weight < 0.8
    assert mixed.image[55, 85, 0] == pytest.approx(155 * (1 - weight), abs=1)


def test_same_seed_same_picture() -> None:
    samples = [_marked(box=(4 * n, 10, 40 + 4 * n, 40)) for n in range(4)]
    config = AugmentConfig(degrees=10, shear=3)
    first, again, other = (augment.mosaic(samples, 96, config, np.random.default_rng(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.boxes, again.boxes)
    assert (first.image != other.image).any()


@pytest.mark.parametrize(
    "field", [{"mosaic": 1.5}, {"scale": 1}, {"degrees": -1}, {"flip_ud": 2}, {"close_mosaic": -1}]
)
def test_config_ranges(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        AugmentConfig(**field)
    with pytest.raises(UserError, match="multiple of 32"):
        DataConfig(image_size=100)
