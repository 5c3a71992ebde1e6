"""Pictures keep what their files carry: depth, grey, transparency, profile, EXIF data, resolution, orientation."""

from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageOps

from restoration import picture_reader
from restoration.picture import Picture
from restoration.picture_reader import read_picture
from restoration.picture_writer import write_picture
from vision_ssm.errors import UserError

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
LAB = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
MAKE, ORIENTATION, EXPOSURE, EXIF_DIRECTORY = 271, 274, 33434, 34665


def camera_data(orientation: int = 1) -> Image.Exif:
    exif = Image.Exif()
    exif[MAKE] = "Camera maker"
    exif[ORIENTATION] = orientation
    exif.get_ifd(EXIF_DIRECTORY)[EXPOSURE] = 0.5
    return exif


def random_picture(dtype: str, channels: int, alpha: bool) -> Picture:
    rng = np.random.default_rng(0)
    white = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    values = (rng.random((9, 13, channels + alpha)) * white).astype(dtype)
    exif = camera_data().tobytes().removeprefix(b"Exif\0\0")
    icc = SRGB if channels == 3 else None
    return Picture(values[..., :channels], values[..., -1] if alpha else None, icc, exif, (300.0, 150.0))


@pytest.mark.parametrize("alpha", [False, True], ids=["opaque", "alpha"])
@pytest.mark.parametrize("channels", [1, 3], ids=["grey", "rgb"])
@pytest.mark.parametrize("kind", ["uint8 .png", "uint16 .png", "uint8 .tif", "uint16 .tif", "float32 .tif"])
def test_files_without_loss_give_back_everything(kind, channels, alpha, tmp_path):
    dtype, suffix = kind.split()
    made = random_picture(dtype, channels, alpha)
    write_picture(tmp_path / f"a{suffix}", made)
    found = read_picture(tmp_path / f"a{suffix}")
    if channels == 1 and alpha and kind in ("uint16 .tif", "float32 .tif"):
        made = Picture(np.repeat(made.pixels, 3, axis=2), made.alpha)  # grey with alpha of that depth becomes RGBA
    np.testing.assert_array_equal(found.pixels, made.pixels)
    assert found.pixels.dtype == made.pixels.dtype
    assert (found.alpha is not None) == alpha
    if alpha:
        np.testing.assert_array_equal(found.alpha, made.alpha)
    assert found.icc == (SRGB if channels == 3 else None)
    assert found.dpi == pytest.approx((300, 150), abs=0.02)
    assert found.exif is not None
    exif = Image.Exif()
    exif.load(found.exif)
    assert (exif[MAKE], exif.get_ifd(EXIF_DIRECTORY)[EXPOSURE]) == ("Camera maker", 0.5)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_compressed_files_keep_profile_and_exif(suffix, tmp_path):
    made = Picture(np.full((16, 16, 3), (200, 60, 90), np.uint8), None, SRGB, random_picture("uint8", 3, False).exif)
    write_picture(tmp_path / f"a{suffix}", made)
    found = read_picture(tmp_path / f"a{suffix}")
    assert np.abs(found.pixels.astype(int) - made.pixels).max() <= 3
    assert (found.icc, found.exif) == (made.icc, made.exif)


def test_other_programs_see_the_16_bit_colours_and_the_profile(tmp_path):
    made = random_picture("uint16", 3, False)
    for suffix in (".png", ".tif"):
        write_picture(tmp_path / f"a{suffix}", made)
        values = cv2.imread(str(tmp_path / f"a{suffix}"), cv2.IMREAD_UNCHANGED)
        assert values is not None
        np.testing.assert_array_equal(values[..., ::-1], made.pixels)
        with Image.open(tmp_path / f"a{suffix}") as image:
            assert image.info["icc_profile"] == SRGB


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["8 .png", "8 .jpg", "8 .tif", "16 .png", "16 .tif"])
def test_orientation_is_applied_once(kind, orientation, tmp_path):
    bits, suffix = kind.split()
    file, result = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    stored = np.kron(np.arange(6).reshape(2, 3, 1) * 40 + 20, np.ones((8, 8, 3))).astype(np.uint8)
    upright = np.asarray(ImageOps.exif_transpose(with_orientation(Image.fromarray(stored), orientation)))
    if bits == "8":
        Image.fromarray(stored).save(file, exif=camera_data(orientation))
    else:
        write_picture(file, Picture(stored.astype(np.uint16) * 257))
        turn_file(file, orientation)
        upright = upright.astype(np.uint16) * 257
    found = read_picture(file)
    assert found.pixels.shape == upright.shape
    assert np.abs(found.pixels.astype(int) - upright).max() <= (2 if suffix == ".jpg" else 0)
    write_picture(result, found)
    again = read_picture(result)
    assert again.pixels.shape == upright.shape
    assert np.abs(again.pixels.astype(int) - upright).max() <= (3 if suffix == ".jpg" else 0)


def with_orientation(image: Image.Image, orientation: int) -> Image.Image:
    image.getexif()[ORIENTATION] = orientation
    return image


def turn_file(file: Path, orientation: int) -> None:
    """Give a 16-bit file an orientation tag: TIFF has one already, PNG gets a chunk."""
    data = file.read_bytes()
    if file.suffix == ".png":
        picture = read_picture(file)
        exif = camera_data(orientation).tobytes().removeprefix(b"Exif\0\0")
        write_picture(file, Picture(picture.pixels, exif=exif))
    else:
        tag = np.array([ORIENTATION, 3], "<u2").tobytes() + np.array([1, 1], "<u4").tobytes()
        assert data.count(tag) == 1
        file.write_bytes(data.replace(tag, tag[:-4] + np.array([orientation], "<u4").tobytes()))


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (4, 2))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1, 0, 1, 1, 1, 0, 0])
    image.save(tmp_path / "a.png", transparency=0)
    found = read_picture(tmp_path / "a.png")
    assert found.pixels[0, :2].tolist() == [[10, 20, 30], [200, 100, 50]]
    assert found.alpha is not None
    assert found.alpha[0].tolist() == [0, 255, 0, 255]


def test_grey_stays_grey():
    picture = random_picture("uint8", 1, False)
    image = picture.to_tensor()
    assert image.shape == (3, 9, 13)
    result = picture.with_result(torch.stack((image[0] - 0.1, image[1], image[2] + 0.1)))
    np.testing.assert_array_equal(result.pixels, picture.pixels)


def test_result_is_rounded_and_limited_to_the_depth():
    picture = Picture(np.zeros((1, 4, 3), np.uint16))
    values = torch.tensor([-0.5, 0.50001, 0.9999999, 3.0]).expand(3, 1, 4)
    assert picture.with_result(values).pixels[0, :, 0].tolist() == [0, 32768, 65535, 65535]


def test_colours_that_nobody_sees_do_not_leak():
    """A cut-out on black: what is transparent gets the colour of its nearest visible pixel before the network."""
    pixels, alpha = np.zeros((5, 6, 3), np.uint8), np.zeros((5, 6), np.uint8)
    pixels[:, :2], alpha[:, :2] = (255, 128, 0), 255
    pixels[:, 5], alpha[:, 5] = (0, 0, 255), 10
    image = Picture(pixels, alpha).to_tensor()
    torch.testing.assert_close(image[:, 2, 2], torch.tensor([1, 128 / 255, 0]))
    torch.testing.assert_close(image[:, 2, 4], torch.tensor([0.0, 0, 1]))
    torch.testing.assert_close(image[:, 2, 0], torch.tensor([1, 128 / 255, 0]))


def test_alpha_is_kept_or_grows_with_the_picture():
    picture = random_picture("uint8", 3, True)
    assert picture.with_result(picture.to_tensor()).alpha is picture.alpha
    larger = picture.with_result(torch.zeros(3, 18, 26))
    assert larger.alpha is not None
    assert larger.alpha.shape == (18, 26)
    assert abs(larger.alpha.mean() - np.float64(picture.alpha.mean())) < 5  # type: ignore[union-attr]


@pytest.mark.parametrize(("value", "message"), [(np.nan, "first in row 3, column 4"), (200.0, "0 for black and 1")])
def test_float_pixels_that_cannot_be_are_refused(value, message, tmp_path):
    pixels = np.full((6, 7), 0.5, np.float32)
    pixels[3, 4] = value
    Image.fromarray(pixels).save(tmp_path / "a.tif")
    with pytest.raises(UserError, match=message):
        read_picture(tmp_path / "a.tif")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_damaged_files_are_refused(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(file)
    whole = file.read_bytes()
    half = whole[: len(whole) // 2]
    for data, message in ((b"", "empty"), (b"not a picture", "no known picture"), (half, "cut off")):
        file.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_picture(file)
    with pytest.raises(UserError, match="No such file"):
        read_picture(tmp_path / "missing.png")


def test_a_16_bit_file_that_is_cut_off_is_refused(tmp_path):
    write_picture(tmp_path / "a.png", random_picture("uint16", 3, False))
    data = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(data[: len(data) - 300])
    with pytest.raises(UserError, match="cut off"):
        read_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("suffix", "picture", "message"),
    [
        (".jpg", random_picture("uint16", 3, False), "16 bits"),
        (".jpg", random_picture("uint8", 3, True), "transparency"),
        (".png", random_picture("float32", 3, False), "float"),
        (".xyz", random_picture("uint8", 3, False), "not a format"),
    ],
)
def test_formats_that_would_lose_something_are_refused(suffix, picture, message, tmp_path):
    with pytest.raises(UserError, match=message):
        write_picture(tmp_path / f"a{suffix}", picture)
    assert not list(tmp_path.iterdir())


def test_what_a_person_should_know_is_noted(tmp_path):
    frames = [Image.new("L", (4, 4), value) for value in (0, 90)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", icc_profile=LAB)
    Image.new("CMYK", (4, 4)).save(tmp_path / "c.jpg")
    assert "2 pages" in read_picture(tmp_path / "a.gif").notes[0]
    assert "trained on sRGB" in read_picture(tmp_path / "b.png").notes[0]
    assert "CMYK" in read_picture(tmp_path / "c.jpg").notes[0]


def test_size_is_limited_by_memory_alone(tmp_path, monkeypatch):
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    assert read_picture(tmp_path / "a.png").size == (40, 40)
    assert Image.MAX_IMAGE_PIXELS == 10
    monkeypatch.setattr(picture_reader.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    with pytest.raises(UserError, match="too large: 40x40"):
        read_picture(tmp_path / "a.png")
