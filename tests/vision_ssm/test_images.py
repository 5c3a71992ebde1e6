"""Every kind of picture becomes the same RGB array; damaged ones are named."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from vision_ssm.data.images import list_images, read_header, read_image
from vision_ssm.errors import UserError


@pytest.fixture
def colors() -> np.ndarray:
    """(48, 64, 3) RGB with a different colour in each quarter."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:24, :32], image[:24, 32:], image[24:, :32], image[24:, 32:] = (250, 0, 0), (0, 250, 0), (0, 0, 250), 128
    return image


def test_png_is_exact_rgb(tmp_path: Path, colors: np.ndarray) -> None:
    Image.fromarray(colors).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colors)


def test_transparency_and_palette(tmp_path: Path, colors: np.ndarray) -> None:
    alpha = np.full((48, 64, 1), 10, np.uint8)
    Image.fromarray(np.concatenate((colors, alpha), axis=2)).save(tmp_path / "alpha.png")
    Image.fromarray(colors).quantize(8).save(tmp_path / "palette.png")
    Image.fromarray(colors).quantize(8).save(tmp_path / "palette.gif")
    for name in ("alpha.png", "palette.png", "palette.gif"):
        np.testing.assert_allclose(read_image(tmp_path / name).astype(int), colors, atol=4, err_msg=name)


@pytest.mark.parametrize("name", ["grey.png", "grey.jpg", "grey.tif"])
def test_grey_becomes_three_channels(tmp_path: Path, name: str) -> None:
    grey = np.full((10, 20), 77, np.uint8)
    Image.fromarray(grey).save(tmp_path / name)
    assert read_header(tmp_path / name).is_grey
    np.testing.assert_array_equal(read_image(tmp_path / name), np.full((10, 20, 3), 77))


@pytest.mark.parametrize("name", ["deep.png", "deep.tif"])
def test_sixteen_bits_become_eight(tmp_path: Path, name: str) -> None:
    deep = np.arange(200, dtype=np.uint16).reshape(10, 20) * 256 + 3
    cv2.imwrite(str(tmp_path / name), deep)
    np.testing.assert_array_equal(read_image(tmp_path / name)[..., 0], np.arange(200).reshape(10, 20))
    cv2.imwrite(str(tmp_path / name), np.repeat(deep[..., None], 3, axis=2))
    colored = read_image(tmp_path / name)[..., 2].astype(int)
    np.testing.assert_allclose(colored, np.arange(200).reshape(10, 20), atol=1)  # OpenCV rounds for some formats
    assert read_header(tmp_path / name).shown_size == (20, 10)


def test_exif_rotation(tmp_path: Path, colors: np.ndarray) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    for name in ("turned.jpg", "turned.webp"):
        Image.fromarray(colors).save(tmp_path / name, exif=exif, quality=95)
        turned = np.rot90(colors, -1)
        assert read_header(tmp_path / name).shown_size == (48, 64)
        shown = read_image(tmp_path / name).astype(int)
        stored = read_image(tmp_path / name, apply_exif=False).astype(int)
        assert np.abs(shown - turned).mean() < 8, name
        assert np.abs(stored - colors).mean() < 8, name


def test_cut_off_files_are_refused(tmp_path: Path, colors: np.ndarray) -> None:
    preview = Image.fromarray(colors).resize((16, 12))
    preview.save(tmp_path / "preview.jpg")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("a.jpg", "a.png"):
        path = tmp_path / name
        # a preview with its own end mark must not make a cut file look whole
        Image.fromarray(noise).save(
            path, **({"comment": (tmp_path / "preview.jpg").read_bytes()} if "jpg" in name else {})
        )
        whole = path.read_bytes()
        assert read_image(path).shape == (64, 64, 3)
        path.write_bytes(whole + b"\x00 a film \xff\xda appended")
        assert read_image(path).shape == (64, 64, 3)
        path.write_bytes(whole[: len(whole) * 2 // 3])
        with pytest.raises(UserError, match=f"{name}.*cut off"):
            read_image(path)


@pytest.mark.parametrize("content", [b"", b"no picture at all", b"\xff\xd8\xff\xd9"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(content)
    for reader in (read_image, read_header):
        with pytest.raises(UserError, match=r"broken\.jpg"):
            reader(path)
    with pytest.raises(UserError, match=r"missing\.jpg.*No such file"):
        read_image(tmp_path / "missing.jpg")


def test_list_images(tmp_path: Path, colors: np.ndarray) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("b.png", "a.JPG", "deep/c.png"):
        Image.fromarray(colors).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    assert [p.name for p in list_images(tmp_path)] == ["a.JPG", "b.png", "c.png"]
    assert [p.name for p in list_images(tmp_path / "b.png")] == ["b.png"]
    assert [p.name for p in list_images(str(tmp_path / "*.png"))] == ["b.png"]
    with pytest.raises(UserError, match="does not exist"):
        list_images(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no pictures"):
        list_images(str(tmp_path / "*.txt"))
