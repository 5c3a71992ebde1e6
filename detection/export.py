"""Export to ONNX and `torch.export`: written, run by itself on real pictures, compared with torch, only then kept."""

import copy
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from detection.exported import best_time
from detection.head import STRIDES, decode
from detection.letterbox import letterbox, pad_to
from detection.pretrained import load_model
from kernels.selective_scan.export_path import export_mode
from vision_ssm.data.images import read_image
from vision_ssm.errors import UserError
from vision_ssm.files import replacing

Format = Literal["onnx", "pt2"]
Operators = Literal["standard", "custom"]

MAX_BOX_ERROR = 0.1
"""Pixels by which a box may differ from torch's."""
MAX_SCORE_ERROR = 1e-3
TIME_LIMIT = 3.0
"""Times torch's time. Beyond it the report says so; as time depends on what else the machine does, nothing fails."""
MEMORY_LIMIT = 3_000_000_000
_CHECK_PICTURES = 3
_REAL_PICTURES = (
    ("skimage", "data", ("astronaut.png", "coffee.png", "chelsea.png")),
    ("sklearn", "datasets/images", ("china.jpg", "flower.jpg")),
    ("matplotlib", "mpl-data/sample_data", ("grace_hopper.jpg",)),
)
"""Photographs that come with installed packages: package, folder in it, files."""


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What was written and how it compared with torch; ``str()`` is for people.

    Errors are the largest over all anchors and pictures: boxes (centre, width, height) in pixels, scores in [0, 1].
    """

    path: Path
    operators: Operators
    image_size: int
    pictures: tuple[str, ...]
    box_error: float
    score_error: float
    torch_seconds: float
    seconds: float
    peak_memory: int | None
    file_bytes: int

    @property
    def slowdown(self) -> float:
        """Time of the exported file as a multiple of torch's, same threads, same picture."""
        return self.seconds / self.torch_seconds

    def __str__(self) -> str:
        memory = "unknown" if self.peak_memory is None else f"{self.peak_memory / 1e9:.2f} GB"
        lines = [
            f"{self.path}: {self.file_bytes / 1e6:.1f} MB, {self.operators} operators, checked against torch",
            f"  pictures    {', '.join(self.pictures)} at {self.image_size}x{self.image_size}, and a batch of 2 at "
            "another size",
            f"  boxes       largest difference {self.box_error:.2g} px (limit {MAX_BOX_ERROR:g})",
            f"  scores      largest difference {self.score_error:.2g} (limit {MAX_SCORE_ERROR:g})",
            f"  time        {self.seconds * 1e3:.0f} ms, torch {self.torch_seconds * 1e3:.0f} ms: "
            f"{self.slowdown:.2f} x (limit {TIME_LIMIT:g})",
            f"  memory      peak of the process {memory} (limit {MEMORY_LIMIT / 1e9:g} GB)",
        ]
        if self.slowdown > TIME_LIMIT:
            lines.append("  warning: slower than the limit; was the machine busy?")
        if self.peak_memory is not None and self.peak_memory > MEMORY_LIMIT:
            lines.append("  warning: more memory than the limit")
        return "\n".join(lines)


class DecodedDetector(nn.Module):
    """A detector whose result is boxes and scores: what is exported.

    Shape: (B, 3, H, W) in [0, 1] -> (B, 4 + classes, anchors), see ``detection.head.decode``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        batch, channels, height, width = images.shape
        coarsest = STRIDES[-1]
        # Says once that the sides are multiples of 32; else every layer's size would be rounded in the traced graph.
        images = images.reshape(batch, channels, coarsest * (height // coarsest), coarsest * (width // coarsest))
        return decode(self.model(images))


def export_detector(
    weights: str | Path,
    output: str | Path,
    *,
    format: Format = "onnx",
    operators: Operators = "standard",
    image_size: int = 640,
    check_images: Sequence[str | Path] | None = None,
) -> ExportReport:
    """Export a detector, run the file by itself and compare it with torch; it is kept only if they agree.

    Input `images` (batch, 3, height, width) in [0, 1], RGB, any batch, height and width multiples of 32; output
    `detections` (batch, 4 + classes, anchors) as `detection.decode`. Class names, stride and image size lie in the
    ONNX metadata, or in `detector.json` of the .pt2 file.

    Args:
        weights: checkpoint folder, weights file or name of shipped weights.
        output: file to write, ending in the format's name.
        format: "onnx", checked in onnxruntime; "pt2", `torch.export`.
        operators: "standard" needs neither this package nor a compiler where it runs; "custom" (pt2 only) keeps
            our scan operator: faster, and `import kernels` must come before loading.
        image_size: side of the pictures of the comparison.
        check_images: pictures to compare on; by default three photographs of installed packages.

    Returns:
        Differences, times, memory.

    Raises:
        UserError: bad arguments, no picture to check with, or a result that differs from torch's; then no file is
            left behind, and one that was there before is untouched.
    """
    output = Path(output)
    _check_arguments(output, format, operators, image_size)
    pictures = _check_pictures(check_images)
    model, config = load_model(weights)
    mixer = config.get("model", {}).get("mixer", "s6")
    if mixer in ("ssd", "s4d"):
        raise UserError(f"{weights} has the mixer {mixer}, which has no form for export; s6 has")
    facts = {"names": list(config["names"]), "stride": STRIDES[-1], "image_size": image_size, "task": "detect"}
    with replacing(output) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's exporter warns of its own internals
        if format == "onnx":
            import onnxruntime  # noqa: F401  (a missing package is to show before the long part)

            write_onnx(trace_detector(model), temporary, facts)
        else:
            program = trace_detector(model, format=format, operators=operators)
            torch.export.save(program, temporary, extra_files={"detector.json": json.dumps(facts)})
        report = check_exported(temporary, model, pictures, operators=operators, image_size=image_size)
    return dataclasses.replace(report, path=output)


def _check_arguments(output: Path, format: str, operators: str, image_size: int) -> None:
    if format not in ("onnx", "pt2"):
        raise UserError(f"format must be onnx or pt2, got {format!r}")
    if operators not in ("standard", "custom"):
        raise UserError(f"operators must be standard or custom, got {operators!r}")
    if format == "onnx" and operators == "custom":
        raise UserError("an ONNX file can only hold standard operators; take --format pt2 for the custom one")
    if output.suffix != f".{format}":
        raise UserError(f"the output of format {format} must end in .{format}, got {output.name}")
    if image_size < STRIDES[-1] or image_size % STRIDES[-1]:
        raise UserError(f"image_size must be a multiple of {STRIDES[-1]}, got {image_size}")


def _check_pictures(paths: Sequence[str | Path] | None) -> list[tuple[str, np.ndarray]]:
    """Name and pixels of the pictures to compare on."""
    if paths is None:
        paths = _packaged_pictures()
    if not paths:
        raise UserError("found no photograph to check the export with; name some with --check-images")
    return [(Path(path).name, read_image(path)) for path in paths]


def _packaged_pictures() -> list[Path]:
    found: list[Path] = []
    for package, folder, names in _REAL_PICTURES:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            paths = (Path(spec.origin).parent / folder / name for name in names)
            found += [path for path in paths if path.is_file()]
    return found[:_CHECK_PICTURES]


def trace_detector(
    model: nn.Module, *, format: Format = "onnx", operators: Operators = "standard"
) -> torch.export.ExportedProgram:
    """Trace a detector with free batch, height and width (multiples of 32), on the CPU in float32.

    Args:
        model: returns raw maps, as MambaYOLO does; it is copied, not changed.
        format: what it is traced for.
        operators: see `export_detector`.
    """
    from torch.fx.experimental import _config as shape_config

    detector = DecodedDetector(copy.deepcopy(model)).cpu().float().eval().requires_grad_(False)
    batch, rows, columns = (torch.export.Dim(name, min=1, max=4096) for name in ("batch", "rows", "columns"))
    example = torch.zeros(2, 3, 3 * STRIDES[-1], 2 * STRIDES[-1])
    # A size of 1 (one picture, or a map of a 32-pixel side) is no special case.
    sizes = shape_config.patch(backed_size_oblivious=True)  # pyright: ignore[reportAttributeAccessIssue]
    form = export_mode(unrolled=format == "pt2") if operators == "standard" else nullcontext()
    with torch.no_grad(), form, sizes:
        return torch.export.export(
            detector,
            (example,),
            dynamic_shapes={"images": {0: batch, 2: STRIDES[-1] * rows, 3: STRIDES[-1] * columns}},
            strict=False,
            prefer_deferred_runtime_asserts_over_guards=True,
        )


def write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, Any]) -> None:
    """Translate a traced detector to ONNX, fold its constants, store each tensor once, and save it with `facts`."""
    import onnx_ir
    import onnxscript.optimizer
    from onnx_ir.passes import Sequential, common

    translated = torch.onnx.export(
        program, input_names=["images"], output_names=["detections"], dynamo=True, optimize=False, verbose=False
    )
    assert translated is not None
    model = translated.model
    # Not the exporter's own optimizer: its rewriting takes minutes here and onnxruntime does the same at loading.
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model)
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(size_limit=1 << 31),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.ClearMetadataAndDocStringPass(),
        common.NameFixPass(),
    )(model)
    images, detections = model.graph.inputs[0], model.graph.outputs[0]
    images.shape = onnx_ir.Shape(["batch", 3, "height", "width"])
    detections.shape = onnx_ir.Shape(["batch", 4 + len(facts["names"]), "anchors"])
    model.metadata_props.update({name: json.dumps(value) for name, value in facts.items()})
    model.producer_name = "vision-ssm"
    onnx_ir.save(model, path)


def check_exported(
    path: Path,
    model: nn.Module,
    pictures: Sequence[tuple[str, np.ndarray]],
    *,
    operators: Operators = "standard",
    image_size: int = 640,
) -> ExportReport:
    """Run an exported file in a process of its own and compare it with `model`.

    Args:
        path: .onnx or .pt2 file.
        model: the detector it was made from.
        pictures: names and (H, W, 3) uint8 RGB pixels.
        operators: what the file was made of; "standard" is run where our packages cannot be imported.
        image_size: side of the square that each picture is letterboxed to.

    Raises:
        UserError: the file does not run, or its result differs by more than `MAX_BOX_ERROR` or `MAX_SCORE_ERROR`.
    """
    inputs = _check_inputs([pixels for _, pixels in pictures], image_size)
    detector = DecodedDetector(copy.deepcopy(model)).cpu().float().eval()
    threads = torch.get_num_threads()
    with torch.inference_mode():
        wanted = [detector(torch.from_numpy(images)).numpy() for images in inputs]
        torch_seconds = best_time(lambda: detector(torch.from_numpy(inputs[0])))
    outputs, measured = _run_alone(path, inputs, threads, operators)
    box_error, score_error = _differences(outputs, wanted)
    if not (box_error <= MAX_BOX_ERROR and score_error <= MAX_SCORE_ERROR):
        raise UserError(
            f"the exported model differs from torch by {box_error:.3g} px in boxes (limit {MAX_BOX_ERROR:g}) and "
            f"{score_error:.3g} in scores (limit {MAX_SCORE_ERROR:g}); no file was kept. Please report this with "
            "the versions that `vssm doctor` prints"
        )
    return ExportReport(
        path, operators, image_size, tuple(name for name, _ in pictures), box_error, score_error, torch_seconds,
        measured["seconds"], measured["peak_memory"], path.stat().st_size,
    )  # fmt: skip


def _check_inputs(pictures: Sequence[np.ndarray], size: int) -> list[np.ndarray]:
    """Each picture in a square of its own, then the first and the last as a batch in a smaller, wider shape."""

    def batch(*padded: np.ndarray) -> np.ndarray:
        return np.stack(padded).transpose(0, 3, 1, 2).astype(np.float32) / 255

    squares = [batch(letterbox(picture, size, (size, size))[0]) for picture in pictures]
    small = max(size // (2 * STRIDES[-1]), 1) * STRIDES[-1]
    wide = [pad_to(letterbox(picture, small, (small, small))[0], (small, small + STRIDES[-1])) for picture in pictures]
    return [*squares, batch(wide[0][0], wide[-1][0])]


def _run_alone(
    path: Path, inputs: Sequence[np.ndarray], threads: int, operators: Operators
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Outputs of an exported file in a process of its own, and that process's time and memory."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, images in enumerate(inputs):
            np.save(folder / f"input_{number:04d}.npy", images)
        command = [sys.executable, "-m", "detection.exported", str(path.resolve()), name, str(threads), operators]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"code {done.returncode}"
            raise UserError(f"the exported model does not run by itself, no file was kept: {reason}")
        outputs = [np.load(folder / f"output_{number:04d}.npy") for number in range(len(inputs))]
        return outputs, json.loads((folder / "run.json").read_text())


def _differences(outputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> tuple[float, float]:
    """Largest difference of boxes and of scores; infinite where shapes differ or a number is not finite."""
    box_error = score_error = 0.0
    for got, want in zip(outputs, wanted, strict=True):
        if got.shape != want.shape or not np.isfinite(got).all():
            return float("inf"), float("inf")
        difference = np.abs(got - want)
        box_error = max(box_error, float(difference[:, :4].max()))
        score_error = max(score_error, float(difference[:, 4:].max()))
    return box_error, score_error
