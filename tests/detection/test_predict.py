"""Prediction from every kind of source, in tiles, and what the command writes.

Most tests use a network that marks red spots, because a picture with known objects needs a known answer; one goes
through a real Mamba-YOLO checkpoint.
"""

import dataclasses
import inspect
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from detection import commands, outputs
from detection.head import decode
from detection.letterbox import letterbox
from detection.model import MambaYOLO
from detection.outputs import run_predict
from detection.postprocess import postprocess, to_native
from detection.predict import Detector
from detection.predict_options import PredictOptions
from detection.tiles import merge_tiles, tile_boxes
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.data.images import read_image
from vision_ssm.data.video import read_frames, video_writer
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.viz import save_picture


class RedSpots(nn.Module):
    """A 32x32 box of class 1, score about 0.98, around each stride-8 cell whose centre is red."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[tuple[int, ...]] = []

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.batches.append(tuple(images.shape))
        batch, _, height, width = images.shape
        raw = [torch.full((batch, 66, height // s, width // s), -20.0) for s in (8, 16, 32)]
        raw[0][:, 2:64:16] = 20
        red, green = images[:, 0, 4::8, 4::8], images[:, 1, 4::8, 4::8]
        raw[0][:, 65] = torch.where((red > 0.8) & (green < 0.2), 4.0, -20.0)
        return raw


def picture(spots: list[tuple[int, int]], height: int = 128, width: int = 128) -> np.ndarray:
    """Grey, with a red 8x8 spot in the cell that holds each (x, y)."""
    image = np.full((height, width, 3), 120, dtype=np.uint8)
    for x, y in spots:
        image[y // 8 * 8 : y // 8 * 8 + 8, x // 8 * 8 : x // 8 * 8 + 8] = (255, 0, 0)
    return image


@pytest.fixture
def detector() -> Detector:
    return Detector(RedSpots(), ("cat", "dog"), image_size=128, device="cpu")


ONE, ONE_BOX = picture([(44, 60)]), [28.0, 44.0, 60.0, 76.0]


def test_real_checkpoint_end_to_end(tmp_path: Path) -> None:
    """The same boxes as network, decoding and suppression by hand, on a picture that needs resizing and padding."""
    torch.manual_seed(0)
    model = MambaYOLO("t", 3, stage_repeats=(1, 1, 1, 1)).eval()
    config = {"task": "detect", "model": model.config, "names": ["a", "b", "c"], "image_size": 64}
    save_checkpoint(tmp_path / "weights", model.state_dict(), config)
    image = np.random.default_rng(0).integers(0, 255, (70, 100, 3), dtype=np.uint8)

    detector = Detector.from_pretrained(tmp_path / "weights", device="cpu")
    assert (detector.names, detector.image_size, detector.category_ids) == (("a", "b", "c"), 64, (1, 2, 3))
    (found,) = detector.predict(image, conf=0.0, max_det=20)

    boxed, geometry = letterbox(image, 64)
    assert boxed.shape == (64, 64, 3)
    with torch.inference_mode():
        raw = model(torch.from_numpy(boxed).permute(2, 0, 1)[None] / 255)
    (want,) = postprocess(decode(raw), conf=0.0, max_det=20)
    assert len(found) == len(want["scores"]) > 1
    np.testing.assert_allclose(found.boxes, to_native(want["boxes"], torch.tensor(geometry), (70, 100)), atol=1e-3)
    np.testing.assert_allclose(found.scores, want["scores"], rtol=1e-4)


def test_wrong_weights_are_explained(tmp_path: Path) -> None:
    model = MambaYOLO("t", 2, stage_repeats=(1, 1, 1, 1))
    good = {"task": "detect", "model": model.config, "names": ["a", "b"], "image_size": 64}
    cases = {
        "for the task 'restore'": good | {"task": "restore"},
        "names 3 classes, the network has 2": good | {"names": ["a", "b", "c"]},
        "belong to another model": good | {"model": model.config | {"num_classes": 3}, "names": ["a", "b", "c"]},
    }
    for k, (message, config) in enumerate(cases.items()):
        save_checkpoint(tmp_path / str(k), model.state_dict(), config)
        with pytest.raises(UserError, match=message):
            Detector.from_pretrained(tmp_path / str(k), device="cpu")


def test_every_kind_of_source(detector: Detector, tmp_path: Path) -> None:
    save_picture(tmp_path / "photos" / "sub" / "one.png", ONE)
    tensor = torch.from_numpy(ONE).permute(2, 0, 1)
    sources = [
        ONE,
        Image.fromarray(ONE),
        tensor,
        tensor.float() / 255,
        torch.stack((tensor,)),
        tmp_path / "photos",
        str(tmp_path / "photos" / "*" / "*.png"),
        tmp_path / "photos" / "sub" / "one.png",
        [[ONE]],
    ]
    for source in sources:
        (found,) = detector.predict(source)
        assert found.boxes.tolist() == [ONE_BOX]
        assert (found.labels.tolist(), found.width, found.height) == ([1], 128, 128)
        np.testing.assert_allclose(found.scores, [0.982], atol=1e-3)
        assert (found.image == ONE).all()
    assert len(detector.predict(sources)) == len(sources)


def test_video_frames_in_order(detector: Detector, tmp_path: Path) -> None:
    path = tmp_path / "clip.avi"
    with video_writer(path, fps=5) as append:
        for x in (20, 60, 100):
            append(cv2.resize(picture([(x, 60)]), (256, 256), interpolation=cv2.INTER_NEAREST))
    found = detector.predict(path, batch_size=2)
    assert [one.frame for one in found] == [0, 1, 2]
    centres = [(one.boxes[0, 0] + one.boxes[0, 2]) / 2 for one in found]
    np.testing.assert_allclose(centres, [40, 120, 200], atol=1)
    assert [one.pixels for one in found] == [None] * 3
    assert (found[2].image == list(read_frames(path))[2]).all()


def test_wrong_sources_are_explained(detector: Detector, tmp_path: Path) -> None:
    cases = {
        "does not exist": tmp_path / "missing",
        r"\(H, W, 3\) uint8 RGB": ONE.astype(np.float32),
        "a list": np.stack((ONE, ONE)),
        "divide by 255": torch.full((3, 64, 64), 200.0),
        r"\(3, H, W\)": torch.zeros(1, 64, 64),
        "uint8, or float": torch.zeros(3, 64, 64, dtype=torch.int64),
        "cannot look at a int": 5,
    }
    for message, source in cases.items():
        with pytest.raises(UserError, match=message):
            detector.predict(source)  # type: ignore[arg-type]
    for option in ({"conf": 1.5}, {"iou": -1}, {"batch_size": 0}, {"image_size": 8}, {"tile": 4}, {"overlap": 1.0}):
        with pytest.raises(UserError, match=next(iter(option))):
            detector.predict(ONE, **option)
    with pytest.raises(UserError, match="'gpu7' cannot be used"):
        choose_device("gpu7")


def test_batches_hold_one_shape_and_do_not_change_results(detector: Detector) -> None:
    wide = picture([(100, 20)], 64, 128)
    sources = [ONE, wide, ONE, ONE, wide]
    together = detector.predict(sources, batch_size=3)
    assert detector.model.batches == [(2, 3, 128, 128), (1, 3, 64, 128), (1, 3, 128, 128), (1, 3, 64, 128)]
    assert [one.height for one in together] == [128, 64, 128, 128, 64]
    for alone, one in zip((detector.predict(s)[0] for s in sources), together, strict=True):
        assert alone.boxes.tolist() == one.boxes.tolist()


def test_stream_is_lazy_and_keeps_going_after_a_broken_file(detector: Detector, tmp_path: Path) -> None:
    for k in range(5):
        save_picture(tmp_path / f"{k}.png", ONE)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1\.png"):
        detector.predict(tmp_path)
    detector.model.batches.clear()
    failed: list[UserError] = []
    stream = detector.stream(tmp_path, PredictOptions(batch_size=2), on_error=failed.append)
    next(stream)
    assert detector.model.batches == [(2, 3, 128, 128)]
    assert [one.path.stem for one in stream if one.path] == ["2", "3", "4"]
    assert len(failed) == 1


def test_prediction_forms(detector: Detector, tmp_path: Path) -> None:
    (found,) = detector.predict(ONE)
    content = json.loads(found.to_json())
    (row,) = content["detections"]
    assert row == {"box": ONE_BOX, "score": pytest.approx(0.982, abs=1e-3), "label": 1, "name": "dog"}
    assert found.to_coco(7, (1, 18))[0] | {"score": 0} == {
        "image_id": 7,
        "category_id": 18,
        "bbox": [28.0, 44.0, 32.0, 32.0],
        "score": 0,
    }
    assert found.to_yolo() == "1 0.343750 0.468750 0.250000 0.250000\n"
    drawn = found.draw()
    assert drawn.shape == ONE.shape
    assert (drawn != ONE).any()
    found.save(tmp_path / "drawn.png")
    assert (read_image(tmp_path / "drawn.png") == drawn).all()


def test_tiles_cover_the_picture() -> None:
    tiles = tile_boxes(250, 400, 128, 0.25)
    covered = np.zeros((250, 400), bool)
    for x1, y1, x2, y2 in tiles:
        assert (x2 - x1, y2 - y1) == (128, 128)
        covered[y1:y2, x1:x2] = True
    assert covered.all()
    starts = sorted({x1 for x1, *_ in tiles})
    assert max(np.diff(starts)) <= 96
    assert tile_boxes(100, 120, 128, 0.25) == [(0, 0, 120, 100)]


def test_tiles_find_each_object_once(detector: Detector) -> None:
    """Spots in one tile alone, in the overlap of two, and cut by an inner edge."""
    spots = [(20, 20), (116, 60), (132, 124), (204, 204)]
    image = picture(spots, 224, 224)
    (found,) = detector.predict(image, tile=128, overlap=0.25)
    assert set(detector.model.batches) == {(4, 3, 128, 128)}
    centres = sorted(map(tuple, ((found.boxes[:, :2] + found.boxes[:, 2:]) / 2).tolist()))
    assert centres == [(20.0, 20.0), (116.0, 60.0), (132.0, 124.0), (204.0, 204.0)]
    assert (found.image == image).all()


def test_merge_keeps_pieces_of_other_classes_and_neighbours() -> None:
    def part(*rows: tuple[float, ...]) -> dict[str, torch.Tensor]:
        table = torch.tensor(rows, dtype=torch.float32).reshape(-1, 6)
        return {"scores": table[:, 0], "labels": table[:, 1].long(), "boxes": table[:, 2:]}

    tiles = [(0, 0, 100, 100), (60, 0, 160, 100)]
    left = part((0.9, 0, 70, 20, 100, 40), (0.8, 1, 70, 20, 100, 40), (0.7, 0, 10, 60, 40, 90))
    right = part((0.6, 0, 70, 20, 130, 40), (0.5, 0, 110, 60, 140, 90))
    merged = merge_tiles([left, right], tiles, (100, 160), iou=0.7)
    # only the piece of class 0 at the inner edge goes, although its score is the best
    torch.testing.assert_close(merged["scores"], torch.tensor([0.8, 0.7, 0.6, 0.5]))


@pytest.fixture
def predict_files(detector: Detector, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(outputs.Detector, "from_pretrained", lambda path, device: detector)

    def call(sources: list[Path], output: Path, **options: object) -> int:
        return run_predict(sources, weights="weights", output=output, **options)  # type: ignore[arg-type]

    return call


def test_command_writes_everything(predict_files, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    save_picture(source / "000000000139.jpg", ONE)
    save_picture(source / "deep" / "b.png", picture([]))
    (source / "bad.jpg").write_bytes(b"not a picture")
    with video_writer(source / "clip.mp4", fps=5) as append:
        append(ONE)
        append(ONE)
    assert predict_files([source], out, save=("pictures", "json", "txt"), options=PredictOptions(conf=0.5)) == 1
    said = capsys.readouterr()
    assert "bad.jpg" in said.err
    assert "2 pictures and 2 video frames: 3 objects (dog 3)" in said.out
    assert "1 not read" in said.out
    written = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    assert written == [
        "classes.txt",
        "pictures/000000000139.jpg",
        "pictures/clip.mp4",
        "pictures/deep/b.png",
        "predictions.json",
        "txt/000000000139.txt",
        "txt/clip/000000.txt",
        "txt/clip/000001.txt",
        "txt/deep/b.txt",
    ]
    rows = json.loads((out / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [139, "clip.mp4#0", "clip.mp4#1"]
    assert rows[0]["category_id"] == 2
    assert (out / "txt" / "deep" / "b.txt").read_text() == ""
    assert (out / "classes.txt").read_text() == "cat\ndog\n"
    assert len(list(read_frames(out / "pictures" / "clip.mp4"))) == 2


def test_equal_names_do_not_collide_and_own_results_are_not_read(predict_files, tmp_path: Path) -> None:
    for name in ("a/x.jpg", "b/x.png"):
        save_picture(tmp_path / name, ONE)
    sources = [tmp_path / "a" / "x.jpg", tmp_path / "b", tmp_path / "a"]
    assert predict_files(sources, tmp_path / "a" / "out", save=("txt",)) == 0
    assert predict_files(sources, tmp_path / "a" / "out", save=("txt", "pictures")) == 0
    names = sorted(p.name for p in (tmp_path / "a" / "out").rglob("x*"))
    assert names == ["x.jpg", "x.txt", "x_2.png", "x_2.txt"]


def test_command_refuses_before_it_works(predict_files, tmp_path: Path) -> None:
    save_picture(tmp_path / "pictures" / "x.png", ONE)
    before = (tmp_path / "pictures" / "x.png").read_bytes()
    with pytest.raises(UserError, match="would overwrite an input"):
        predict_files([tmp_path / "pictures" / "x.png"], tmp_path)
    assert (tmp_path / "pictures" / "x.png").read_bytes() == before
    with pytest.raises(UserError, match="cannot write to the output folder"):
        predict_files([tmp_path / "pictures"], tmp_path / "pictures" / "x.png" / "out")
    with pytest.raises(UserError, match="pictures, json, txt; got xml"):
        predict_files([tmp_path / "pictures"], tmp_path / "out", save=("json", "xml"))
    with pytest.raises(UserError, match="does not exist"):
        predict_files([tmp_path / "nothing.jpg"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_options_are_the_same_everywhere() -> None:
    """Command line and Python have every option, with the default that `PredictOptions` gives it."""
    fields = {field.name: field.default for field in dataclasses.fields(PredictOptions)}
    for function in (commands.predict, Detector.predict):
        parameters = inspect.signature(function).parameters
        assert {name: parameters[name].default for name in fields} == fields


def test_command_refuses_options_before_it_looks_for_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="overlap must lie between 0 and 0.9, got 1"):
        commands.predict([str(tmp_path)], weights=tmp_path / "none", overlap=1.0)
