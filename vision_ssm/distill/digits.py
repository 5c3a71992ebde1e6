"""The acceptance table of distillation on scikit-learn's 8x8 digits: small enough for a minute on one core."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from vision_ssm.classify.config import ClassifyConfig, ClassifyDataConfig, NetworkConfig
from vision_ssm.classify.train import ClassifyTask
from vision_ssm.distill.config import DistillConfig, StudentConfig, StudentName, TeacherConfig
from vision_ssm.distill.student import STUDENT
from vision_ssm.distill.train import FOLDERS, run_distill
from vision_ssm.errors import UserError
from vision_ssm.files import check_new, write_text
from vision_ssm.training import EmaConfig, OptimConfig, ScheduleConfig, TrainConfig, train

TEACHER = NetworkConfig(
    "vit_tiny_patch16_224",
    {
        "img_size": 8,
        "patch_size": 2,
        "embed_dim": 48,
        "depth": 2,
        "num_heads": 4,
        "class_token": False,
        "global_pool": "avg",
    },
)
STUDENTS: tuple[StudentName, ...] = ("nc_ssd", "ssd", "s6", "ssd_causal")
TEACHER_STEPS, STUDENT_STEPS = 450, 90
HELD_OUT = 360
"""Of 1,797 digits, drawn at random: of the same writers as the others."""


def write_digits(folder: Path) -> Path:
    """Write the digits as idx files.

    Raises:
        UserError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError("the digits come with scikit-learn; run: pip install scikit-learn") from None
    pixels, labels = load_digits(return_X_y=True)
    images = np.round(np.asarray(pixels) * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    labels = np.asarray(labels).astype(np.uint8)
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng(0).permutation(len(labels))
    for name, part in (("train", order[HELD_OUT:]), ("t10k", order[:HELD_OUT])):
        _write_idx(folder / f"{name}-images-idx3-ubyte", images[part])
        _write_idx(folder / f"{name}-labels-idx1-ubyte", labels[part])
    return folder


def _write_idx(path: Path, values: np.ndarray) -> None:
    header = bytes([0, 0, 8, values.ndim]) + b"".join(size.to_bytes(4, "big") for size in values.shape)
    path.write_bytes(header + values.tobytes())


def settings(data: Path, run_dir: Path, steps: int) -> ClassifyConfig:
    """How teacher and scratch are trained: with labels, for so many steps."""
    return ClassifyConfig(
        network=TEACHER,
        data=ClassifyDataConfig(train=str(data), side=8, augment="none", shift=0.0, color=0.1),
        label_smoothing=0.0,
        train=TrainConfig(
            run_dir=str(run_dir),
            steps=steps,
            batch_size=64,
            workers=0,
            device="cpu",
            clip=1.0,
            patience=None,
            val_every=1_000,
            optim=OptimConfig(name="adamw", lr=8e-3, weight_decay=0.01),
            schedule=ScheduleConfig(kind="cosine", final_ratio=0.05, warmup_epochs=0, warmup_min_batches=20),
            ema=EmaConfig(decay=0.9, warmup_steps=20),
        ),
    )


def distillation(
    data: Path, teacher: Path, run_dir: Path, mixer: StudentName, *, steps: int = STUDENT_STEPS
) -> DistillConfig:
    """A third of the steps for each stage."""
    usual = settings(data, run_dir, steps)
    return DistillConfig(
        teacher=TeacherConfig(weights=str(teacher)),
        student=StudentConfig(mixer=mixer),
        data=usual.data,
        shares=(1 / 3, 1 / 3, 1 / 3),
        train=replace(usual.train, optim=OptimConfig(name="adamw", lr=5e-3, weight_decay=0.0, betas=(0.9, 0.95))),
    )


def train_teacher(data: Path, run_dir: Path, steps: int = TEACHER_STEPS) -> tuple[Path, float]:
    """The checkpoint of a teacher, and its accuracy."""
    config = settings(data, run_dir, steps)
    result = train(ClassifyTask(config), config.train)
    return result.last, result.history[-1]["val/accuracy"]


def from_scratch(data: Path, run_dir: Path, mixer: StudentName, steps: int = STUDENT_STEPS) -> float:
    """Accuracy of a student's network that is trained on labels from random weights in as many steps."""
    network = NetworkConfig(STUDENT, {"base": TEACHER.name, "mixer": mixer, "state_size": 16, **TEACHER.options})
    config = replace(settings(data, run_dir, steps), network=network)
    return train(ClassifyTask(config), config.train).history[-1]["val/accuracy"]


def run_digits(output: Path, steps: int = STUDENT_STEPS) -> int:
    """Distil a teacher into each kind of student, train each from scratch too, and print the table.

    Raises:
        UserError: scikit-learn is missing, the folder is taken, or a stage would have no step.
    """
    if steps < len(FOLDERS):
        raise UserError(f"steps must be {len(FOLDERS)} or more, one for each stage; got {steps}")
    check_new(output)
    data = write_digits(output / "data")
    teacher, accuracy = train_teacher(data, output / "teacher")
    rows = []
    for mixer in STUDENTS:
        student = run_distill(distillation(data, teacher, output / mixer, mixer, steps=steps))
        report = json.loads((student.parents[1] / "report.json").read_text(encoding="utf-8"))
        scratch = from_scratch(data, output / f"{mixer}-scratch", mixer, steps)
        rows.append({"mixer": mixer, "scratch": scratch, **{stage: report[stage] for stage in report}})
    lines = [
        f"teacher: {accuracy:.1%} of the held-out digits in {TEACHER_STEPS} steps; students: {steps} steps",
        f"{'student':<12}{'matrix':>18}{'hidden':>18}{'label-free':>12}{'distilled':>11}{'scratch':>9}",
    ]
    for row in rows:
        start, one, two, three = row["start"], *(row[FOLDERS[stage]] for stage in FOLDERS)
        lines.append(
            f"{row['mixer']:<12}{start['matrix']:>9.2f} -> {one['matrix']:.2f}  {start['hidden']:>9.2f} -> "
            f"{two['hidden']:.2f} {two['accuracy']:>12.1%}{three['accuracy']:>11.1%}{row['scratch']:>9.1%}"
        )
    lines += [
        "matrix: distance from the teacher's after stage 1; hidden: after stage 2; as shares of the teacher's norm",
        "label-free: accuracy after stages 1 and 2; distilled: after stage 3; scratch: labels, as many steps",
    ]
    print("\n".join(lines))
    write_text(output / "table.json", json.dumps({"teacher": accuracy, "students": rows}, indent=2) + "\n")
    return 0
