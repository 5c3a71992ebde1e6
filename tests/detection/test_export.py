"""Export: the file runs by itself at any size, says what it is, holds each weight once; a wrong one is not kept."""

import json
import sys

import numpy as np
import pytest
import torch
from torch import nn

from detection import export
from detection.export import DecodedDetector, check_exported, export_detector, trace_detector
from detection.exported import load_exported
from detection.head import DetectionHead
from detection.model import MambaYOLO
from detection.pretrained import load_model
from vision_ssm.checkpoint import save_checkpoint
from vision_ssm.errors import UserError
from vision_ssm.ss2d import SS2D

NAMES = ["cat", "dog", "träd"]
SHAPES = [(1, 32, 32), (2, 32, 96), (1, 128, 64)]

needs_onnx = pytest.mark.skipif(
    any(export.importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="needs vision-ssm[export]",
)


class SmallDetector(nn.Module):
    """Two scans and the real head: exports in seconds, where Mamba-YOLO takes a minute."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 8, stride=8)
        self.scans = nn.ModuleList(SS2D(16, state_size=4, init="vmamba") for _ in range(2))
        self.down = nn.ModuleList(nn.Conv2d(16, 16, 3, stride=2, padding=1) for _ in range(2))
        self.head = DetectionHead([16, 16, 16], len(NAMES))

    def forward(self, images):
        x = self.stem(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)
        for scan in self.scans:
            x = x + scan(x)
        p3 = x.permute(0, 3, 1, 2)
        p4 = self.down[0](p3)
        return self.head([p3, p4, self.down[1](p4)])


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return SmallDetector().eval()


@pytest.fixture(scope="module", autouse=True)
def weights(model):
    """The name of weights that load as the small detector."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "load_model", lambda path: (model, {"names": NAMES, "image_size": 64}))
        yield "small"


@pytest.fixture
def mamba_yolo(tmp_path):
    """Mamba-YOLO-T and a folder with its weights."""
    torch.manual_seed(0)
    model = MambaYOLO("t", num_classes=len(NAMES), init="vmamba").eval()
    config = {"task": "detect", "model": model.config, "names": NAMES, "image_size": 64}
    save_checkpoint(tmp_path / "weights", model.state_dict(), config)
    return model, tmp_path / "weights"


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return [("noise", rng.integers(0, 256, (50, 70, 3), np.uint8)), ("grey", np.full((64, 40, 3), 90, np.uint8))]


@pytest.fixture(scope="module")
def onnx_file(weights, tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    return path, export_detector(weights, path, image_size=64)


def agrees_at_all_shapes(path, model):
    run = load_exported(path, 1)
    detector = DecodedDetector(model)
    for batch, height, width in SHAPES:
        images = torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(height))
        with torch.no_grad():
            want = detector(images).numpy()
        np.testing.assert_allclose(run(images.numpy()), want, atol=5e-4)


@needs_onnx
def test_onnx_runs_at_other_sizes(onnx_file, model):
    path, report = onnx_file
    assert report.path == path
    assert report.box_error < 0.01
    assert report.score_error < 1e-5
    assert 0 < report.file_bytes == path.stat().st_size
    assert len(report.pictures) == 3
    assert "limit 0.1" in str(report)
    agrees_at_all_shapes(path, model)


@needs_onnx
def test_onnx_says_what_it_is(onnx_file):
    import onnx

    model = onnx.load(onnx_file[0])
    facts = {p.key: json.loads(p.value) for p in model.metadata_props}
    assert facts == {"names": NAMES, "stride": 32, "image_size": 64, "task": "detect"}
    shapes = [
        [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    ]
    assert shapes == [["batch", 3, "height", "width"], ["batch", 7, "anchors"]]
    assert {o.domain for o in model.opset_import} <= {"", "pkg.onnxscript.torch_lib.common"}
    assert {n.domain for n in model.graph.node} == {""}


@needs_onnx
def test_onnx_stores_each_weight_once(onnx_file, model):
    import onnx

    tensors = [onnx.numpy_helper.to_array(t) for t in onnx.load(onnx_file[0]).graph.initializer]
    large = [t.tobytes() for t in tensors if t.nbytes > 1024]
    assert len(large) == len(set(large))
    assert sum(t.nbytes for t in tensors) < 1.02 * sum(p.nbytes for p in model.state_dict().values())


@pytest.fixture(scope="module")
def custom_file(weights, pictures, tmp_path_factory):
    path = tmp_path_factory.mktemp("pt2") / "model.pt2"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "_check_pictures", lambda paths: pictures)
        return path, export_detector(weights, path, format="pt2", operators="custom", image_size=64)


def test_pt2_with_our_operator_runs_at_other_sizes(custom_file, model):
    path, report = custom_file
    assert report.box_error < 0.01
    agrees_at_all_shapes(path, model)
    extra = {"detector.json": ""}
    torch.export.load(path, extra_files=extra)
    assert json.loads(extra["detector.json"])["names"] == NAMES


def test_pt2_in_standard_operators_runs_at_other_sizes(weights, tmp_path, model, pictures, monkeypatch):
    monkeypatch.setattr(sys.modules["kernels.selective_scan.export_path"], "_BLOCK", 4)  # a smaller graph
    monkeypatch.setattr(export, "_check_pictures", lambda paths: pictures)
    path = tmp_path / "model.pt2"
    assert export_detector(weights, path, format="pt2", image_size=64).box_error < 0.01
    agrees_at_all_shapes(path, model)


def test_standard_operators_are_checked_without_our_package(custom_file, model, pictures):
    """A file with our operator must not pass for one that loads with torch alone."""
    with pytest.raises(UserError, match="does not run by itself"):
        check_exported(custom_file[0], model, pictures, operators="standard", image_size=64)


def test_mamba_yolo_as_pt2(mamba_yolo, tmp_path, pictures, monkeypatch):
    model, folder = mamba_yolo
    monkeypatch.setattr(export, "load_model", load_model)
    monkeypatch.setattr(export, "_check_pictures", lambda paths: pictures)
    path = tmp_path / "model.pt2"
    export_detector(folder, path, format="pt2", operators="custom", image_size=64)
    agrees_at_all_shapes(path, model)


@needs_onnx
def test_mamba_yolo_as_onnx(mamba_yolo, tmp_path, monkeypatch):
    model, folder = mamba_yolo
    monkeypatch.setattr(export, "load_model", load_model)
    path = tmp_path / "model.onnx"
    report = export_detector(folder, path, image_size=640)
    assert report.box_error < 0.01
    assert report.score_error < 1e-5
    assert report.peak_memory is None or report.peak_memory < 3e9
    agrees_at_all_shapes(path, model)


def test_a_wrong_result_is_not_kept(weights, tmp_path, pictures, monkeypatch):
    """The exported graph is made of other weights than the model it is compared with."""

    def trace_another(model, *, format, operators):
        torch.manual_seed(1)
        return trace_detector(SmallDetector(), format=format, operators=operators)

    monkeypatch.setattr(export, "_check_pictures", lambda paths: pictures)
    monkeypatch.setattr(export, "trace_detector", trace_another)
    path = tmp_path / "model.pt2"
    path.write_text("from before")
    with pytest.raises(UserError, match="differs from torch by"):
        export_detector(weights, path, format="pt2", operators="custom", image_size=64)
    assert [p.name for p in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "from before"


def test_a_file_that_does_not_run_is_told(tmp_path, model, pictures):
    path = tmp_path / "broken.pt2"
    path.write_bytes(b"not a model")
    with pytest.raises(UserError, match="does not run by itself"):
        check_exported(path, model, pictures, image_size=64)


def test_differences_that_are_not_numbers():
    good = np.zeros((1, 7, 21), np.float32)
    bad = good.copy()
    bad[0, 5, 3] = np.nan
    assert export._differences([good], [good]) == (0.0, 0.0)
    assert export._differences([bad], [good]) == (float("inf"), float("inf"))
    assert export._differences([good[:, :, 1:]], [good]) == (float("inf"), float("inf"))
    bad[0, 5, 3], bad[0, 1, 2] = 0.25, -3
    assert export._differences([bad], [good]) == (3.0, 0.25)


def test_pictures_come_from_installed_packages():
    found = export._check_pictures(None)
    assert len(found) == 3
    assert all(pixels.ndim == 3 and pixels.std() > 10 for _, pixels in found)


@pytest.mark.parametrize(
    ("output", "options", "said"),
    [
        ("m.onnx", {"operators": "custom"}, "only hold standard"),
        ("m.pt2", {}, "must end in .onnx"),
        ("m.onnx", {"image_size": 100}, "multiple of 32"),
        ("m.tflite", {"format": "tflite"}, "onnx or pt2"),
        ("m.onnx", {"check_images": ["nowhere.png"]}, "nowhere.png"),
    ],
)
def test_bad_arguments(weights, tmp_path, output, options, said):
    with pytest.raises(UserError, match=said):
        export_detector(weights, tmp_path / output, **options)
    assert not list(tmp_path.iterdir())
