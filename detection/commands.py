"""`vssm detect VERB`: each function is a verb, its signature the flags, its docstring the help. Imports no torch."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from detection.config import DetectConfig
from detection.predict_options import PredictOptions

Saved = Literal["pictures", "json", "txt"]


def train(config: DetectConfig, *, resume: Path | None = None) -> int:
    """Train or fine-tune a detector on a folder in COCO, Pascal VOC or YOLO form.

    Args:
        resume: Folder of a run (runs/detect) to go on with; its own settings count, only the data may have moved
            (--data.path).
    """
    from detection.report import write_report
    from detection.train import resumed_config, train_detector
    from vision_ssm.training.environment import is_main_process

    if resume is not None:
        config, resume = resumed_config(resume, data_path=config.data.path)
    result = train_detector(config, resume=resume)
    if result.best is not None and is_main_process():
        write_report(
            result.best,
            result.run_dir,
            data=config.data.path,
            split=config.data.val,
            batch_size=config.train.batch_size,
            workers=config.train.workers,
            device=config.train.device,
        )
    return 0


def val(
    weights: Path,
    data: Path,
    *,
    split: str = "val",
    image_size: int | None = None,
    batch_size: int = 16,
    workers: int = 2,
    device: str = "auto",
    output: Path = Path("runs/val"),
) -> int:
    """Score weights on a data set: COCO AP by pycocotools, VOC AP50, per class; with plots.

    Args:
        weights: Checkpoint folder.
        data: Folder in COCO, Pascal VOC or YOLO form.
        split: Which split of it.
        image_size: Long side in pixels; by default that of the training.
        batch_size: Pictures that go through the network together.
        workers: Processes that load pictures.
        device: auto, cpu or cuda.
        output: Folder for metrics.json and the plots.
    """
    from detection.report import write_report

    write_report(
        weights, output, data=data, split=split, image_size=image_size, batch_size=batch_size, workers=workers,
        device=device,
    )  # fmt: skip
    return 0


def predict(
    source: list[str],
    *,
    weights: Path,
    output: Path = Path("runs/predict"),
    save: list[Saved] = ["pictures", "json"],  # noqa: B006 (a default for the command line, never changed)
    conf: float = PredictOptions.conf,
    iou: float = PredictOptions.iou,
    image_size: int | None = PredictOptions.image_size,
    batch_size: int = PredictOptions.batch_size,
    max_det: int = PredictOptions.max_det,
    tile: int | None = PredictOptions.tile,
    overlap: float = PredictOptions.overlap,
    device: str = "auto",
) -> int:
    """Find objects in pictures, folders, glob patterns and videos.

    Args:
        source: Pictures, folders, glob patterns (in quotes) or videos.
        weights: Checkpoint folder.
        output: Folder for the results.
        save: Any of pictures (drawn pictures and videos), json (COCO results), txt (YOLO labels).
        conf: Least score.
        iou: Of boxes of one class that overlap more than this, only the best is kept.
        image_size: Long side that the network sees; by default that of the training.
        batch_size: Pictures that go through the network together.
        max_det: Most detections in a picture.
        tile: Cut large pictures into square tiles of this side.
        overlap: Share of a tile's side that neighbours have in common.
        device: auto, cpu, cuda or mps.
    """
    # before the import, which takes seconds: a number out of range is told at once
    options = PredictOptions(conf, iou, image_size, batch_size, max_det, tile, overlap)
    from detection.outputs import run_predict

    return run_predict(source, weights=weights, output=output, save=save, options=options, device=device)


def check(path: Path, *, strict: bool = False) -> int:
    """Check a data set: counts, classes, every defect with its place and its cure.

    Args:
        path: Folder in COCO, Pascal VOC or YOLO form, or a folder of such folders.
        strict: Warnings fail too.
    """
    from detection.check import run_check

    return run_check(path, strict=strict)


def data(name: Literal["trees", "scenes"], path: Path) -> int:
    """Make a small real data set from a package of the Python package index: trees (aerial) or scenes (digits).

    Args:
        name: trees: crowns in aerial photographs (deepforest's wheel, MIT, 20 MB); scenes: handwritten digits on
            photographs (scikit-learn's and scikit-image's wheels).
        path: Folder to write it to, in Pascal VOC form.
    """
    from detection.samples import make_sample

    make_sample(name, path)
    return 0


def export(
    weights: Path,
    output: Path,
    *,
    format: Literal["onnx", "pt2"] = "onnx",
    operators: Literal["standard", "custom"] = "standard",
    image_size: int = 640,
    check_images: list[Path] | None = None,
) -> int:
    """Export to ONNX or torch.export and compare the result with torch on real pictures.

    Args:
        weights: Checkpoint folder.
        output: File to write.
        format: onnx (onnxruntime) or pt2 (torch.export).
        operators: standard runs anywhere; custom (pt2 only) keeps our scan operator, which is faster and needs this
            package where it is loaded.
        image_size: Side of the pictures of the comparison; batch, height and width stay free (multiples of 32).
        check_images: Pictures for the comparison; by default three of scikit-image's.
    """
    from detection.export import export_detector

    report = export_detector(
        weights, output, format=format, operators=operators, image_size=image_size, check_images=check_images
    )
    print(report)
    return 0


def convert(file: Path, output: Path) -> int:
    """Convert published Mamba-YOLO weights (.pt) to a checkpoint folder. No code in the file is run.

    Args:
        file: The .pt, .pth or .safetensors file.
        output: Folder to write, new or empty.
    """
    from detection.pretrained import load_model, load_weights
    from vision_ssm.checkpoint import save_checkpoint
    from vision_ssm.files import check_new

    load_model(file)  # refuses weights that no network fits
    weights, config = load_weights(file)
    check_new(output)
    save_checkpoint(output, weights, config)
    model = config["model"]
    print(f"{output}: Mamba-YOLO-{model['size'].upper()}, {model['num_classes']} classes, {len(weights)} tensors")
    return 0


def summary(size: Literal["t", "b", "l"] = "t", *, num_classes: int = 80, image_size: int = 640) -> int:
    """Parameters and FLOPs of the parts of a network; the scan is counted, and it says how.

    Args:
        size: t, b or l.
        num_classes: Number of classes.
        image_size: Side of the picture for the FLOPs.
    """
    from detection.model import MambaYOLO
    from detection.summary import summarize

    print(summarize(MambaYOLO(size, num_classes), image_size))
    return 0


def bench(
    *,
    size: Literal["t", "b", "l"] = "t",
    weights: Path | None = None,
    resolutions: list[int] = [320, 640],  # noqa: B006
    batch_size: list[int] = [1],  # noqa: B006
    device: str = "auto",
    precision: Literal["fp32", "bf16"] = "fp32",
    threads: int | None = None,
    train: bool = False,
    modes: list[Literal["eager", "compiled", "graph", "compiled_graph"]] = ["eager"],  # noqa: B006
    scan: list[Literal["auto", "torch", "c", "triton"]] = ["auto"],  # noqa: B006
    output: Path | None = None,
) -> int:
    """Time, FLOPs and memory over resolutions, beside a convolutional detector; on a GPU also the scans' share.

    Args:
        size: t, b or l, untrained, where no weights are given.
        weights: Checkpoint folder.
        resolutions: Sides of the square pictures.
        batch_size: Pictures that go through the network together; several numbers are measured one by one.
        device: auto, cpu or cuda.
        precision: fp32 or bf16.
        threads: Threads of the CPU; by default torch's choice.
        train: Measure training steps instead of inference.
        modes: eager, compiled (torch.compile), graph (a captured CUDA graph), compiled_graph (both).
        scan: Back ends of the scan: auto, torch, c or triton.
        output: Folder for bench.json and a plot.
    """
    from detection.bench import run_bench

    return run_bench(
        size=size, weights=weights, resolutions=resolutions, batch_size=batch_size, device=device,
        precision=precision, threads=threads, train=train, modes=modes, scan=scan, output=output,
    )  # fmt: skip


COMMANDS: dict[str, Callable[..., int]] = {
    "train": train, "val": val, "predict": predict, "check": check, "data": data, "export": export,
    "convert": convert, "summary": summary, "bench": bench,
}  # fmt: skip
