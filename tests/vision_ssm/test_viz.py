"""Drawing, grids, and writing pictures, files and videos."""

from pathlib import Path

import cv2
import numpy as np
import pytest

from vision_ssm.data.video import read_frame, read_frames, video_info, video_writer
from vision_ssm.errors import UserError
from vision_ssm.files import replacing, write_text
from vision_ssm.viz import class_color, draw_boxes, grid, save_picture, titled


@pytest.fixture
def grey() -> np.ndarray:
    return np.full((100, 160, 3), 128, dtype=np.uint8)


def test_colours_are_stable_and_apart() -> None:
    colors = np.array([class_color(k) for k in range(20)], dtype=float)
    distance = np.linalg.norm(colors[:, None] - colors[None], axis=2)
    assert distance[~np.eye(20, dtype=bool)].min() > 25
    assert class_color(3) == class_color(3)


def test_edges_have_the_colour_of_the_class_and_the_input_is_kept(grey: np.ndarray) -> None:
    drawn = draw_boxes(grey, np.array([[20.0, 30.0, 80.0, 90.0]]), np.array([4]))
    edges = drawn[[30, 60, 90, 60], [50, 20, 50, 80]]
    assert (edges == class_color(4)).all()
    assert (drawn[40:80, 30:70] == 128).all()
    assert (grey == 128).all()


def test_captions_stay_inside_and_the_first_wins(grey: np.ndarray) -> None:
    corner = np.array([[-5.0, -5.0, 30.0, 30.0], [158.0, 98.0, 170.0, 120.0]])
    drawn = draw_boxes(grey, corner, np.array([0, 1]), ["Äpfel 0.91", "дом 0.50"])
    assert tuple(drawn[1, 0]) == class_color(0)
    assert (drawn[60:, 60:] != 128).any()
    same, labels = np.array([[40.0, 40.0, 90.0, 90.0]] * 2), np.array([0, 0])
    both = draw_boxes(grey, same, labels, ["best", "worse"])
    assert (both == draw_boxes(grey, same, labels, ["best", "other"])).all()
    assert (both != draw_boxes(grey, same, labels)).any()


def test_nothing_to_draw(grey: np.ndarray) -> None:
    assert (draw_boxes(grey, np.zeros((0, 4)), np.zeros(0, int), []) == grey).all()


def test_grid_fits_pictures_into_cells(grey: np.ndarray) -> None:
    tall = np.zeros((200, 40, 3), dtype=np.uint8)
    sheet = grid([grey, tall, grey], columns=2, cell=(50, 80), gap=4)
    assert sheet.shape == (104, 164, 3)
    assert (sheet[:50, :80] == 128).all()
    assert (sheet[:50, 80:84] == 255).all()
    assert (sheet[:50, 119:129] == 0).all()
    assert (sheet[54:, 84:] == 255).all()
    assert grid([grey]).shape == grey.shape
    with pytest.raises(ValueError, match="at least one"):
        grid([])


def test_title_is_added_above(grey: np.ndarray) -> None:
    picture = titled(grey, "truth")
    assert (picture[-100:] == grey).all()
    assert (picture[:-100] == 0).any()


def test_saved_picture_comes_back(tmp_path: Path, grey: np.ndarray) -> None:
    grey[:, :, 0] = 200
    save_picture(tmp_path / "new" / "тест.png", grey)
    back = cv2.imdecode(np.fromfile(tmp_path / "new" / "тест.png", np.uint8), cv2.IMREAD_COLOR)
    assert (back[:, :, ::-1] == grey).all()
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["тест.png"]
    with pytest.raises(UserError, match=r"\.png"):
        save_picture(tmp_path / "picture.txt", grey)


def test_an_unwritable_place_is_a_user_error(tmp_path: Path, grey: np.ndarray) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(UserError, match="cannot write"):
        save_picture(tmp_path / "file" / "a.png", grey)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    write_text(tmp_path / "a.json", "old")

    def interrupted() -> None:
        with replacing(tmp_path / "a.json") as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        interrupted()
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


@pytest.mark.parametrize("name", ["clip.mp4", "clip.avi"])
def test_video_comes_back(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    with video_writer(path, fps=10) as append:
        for value in (0, 60, 120, 180):
            append(np.full((48, 64, 3), (value, 30, 200), dtype=np.uint8))
        assert not path.exists()
    info = video_info(path)
    assert (info.width, info.height, info.fps) == (64, 48, 10)
    frames = list(read_frames(path))
    assert [f.shape for f in frames] == [(48, 64, 3)] * 4
    means = np.array([f.mean(axis=(0, 1)) for f in frames])
    np.testing.assert_allclose(means, [[v, 30, 200] for v in (0, 60, 120, 180)], atol=8)
    assert (read_frame(path, 2) == frames[2]).all()
    with pytest.raises(UserError, match="no frame 4"):
        read_frame(path, 4)


def test_video_errors_name_the_file(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"nothing of a video" * 50)
    with pytest.raises(UserError, match=r"broken\.mp4"):
        next(read_frames(tmp_path / "broken.mp4"))
    with pytest.raises(UserError, match="does not exist"):
        video_info(tmp_path / "missing.mp4")
    with pytest.raises(UserError, match=r"\.avi"), video_writer(tmp_path / "a.gif", fps=5):
        raise AssertionError("opened")
