"""Which mixer to choose: detectors or restorers of equal parameters, data, steps and seed that differ in their mixer.

    python tools/compare_mixers.py detect --config bccd --mixer ssd --seed 0 data.path=data/bccd train.epochs=40
    python tools/compare_mixers.py restore --config restoration/cid22_deblur --mixer gated_conv train.steps=4000
    python tools/compare_mixers.py                   # the tables of all that is there

Trains a recipe's network with one mixer, as wide as gives it the number of parameters that the recipe's own network
has, times it, and writes OUT/TASK_MIXER_SEED.json. A run that was stopped goes on; one that is finished is only
timed. `hybrid` is s6 with attention in the last half.
"""

import argparse
import csv
import json
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

from detection.config import DetectConfig
from detection.model import MambaYOLO
from detection.train import DetectionTask, backbone_of
from restoration.bench_networks import parameters
from restoration.config import RestoreConfig
from restoration.model import Serpent
from restoration.train import RestorationTask
from vision_ssm.bench.measure import Stopwatch
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.config import load_config, to_dict
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.training import Task, read_run_config, train
from vision_ssm.training.config import TrainConfig

MIXERS = {
    "s6": {"mixer": "s6"},
    "ssd": {"mixer": "ssd"},
    "nc_ssd": {"mixer": "nc_ssd"},
    "s4d": {"mixer": "s4d"},
    "hybrid": {"mixer": "s6", "mixer_pattern": "last_half_attention"},
    "gated_conv": {"mixer": "gated_conv"},
}
CONFIGS = {"detect": DetectConfig, "restore": RestoreConfig}
SCORES = {"detect": ("AP", "AP50"), "restore": ("psnr", "ssim")}
WIDTHS: dict[str, Iterable[float]] = {"detect": [i / 128 for i in range(16, 97)], "restore": range(8, 129, 2)}
NEAR = 0.06
"""Largest difference of the numbers of parameters."""
SIDE = 32
"""Sides of pictures that detectors take are multiples of it."""


def network(task: str, config: Any) -> nn.Module:
    """The network of a configuration, without memory for its weights."""
    options = {name: getattr(config.model, name) for name in type(config.model).__dataclass_fields__}
    with torch.device("meta"):
        if task == "detect":
            return MambaYOLO(**options | {"backbone": backbone_of(config.model.backbone)[0]})
        options.pop("recompute")
        return Serpent(**options)


def matched(task: str, config: Any, mixer: str) -> Any:
    """The configuration with another mixer, as wide as has the nearest number of parameters.

    Raises:
        UserError: No width comes near enough.
    """
    wanted = parameters(network(task, config))
    found = {}
    for width in WIDTHS[task]:
        candidate = replace(config, model=replace(config.model, width=width, **MIXERS[mixer]))
        try:
            found[parameters(network(task, candidate))] = candidate
        except UserError:  # ssd and nc_ssd do not take every width
            continue
    nearest = min(found, key=lambda n: abs(n - wanted), default=0)
    if abs(nearest - wanted) > NEAR * wanted:
        raise UserError(f"no width gives a network of {mixer} about {wanted:,} parameters; the nearest has {nearest:,}")
    return found[nearest]


def compare(options: argparse.Namespace) -> None:
    """Train and time one network, write its report."""
    run = options.out / f"{options.task}_{options.mixer}_{options.seed}"
    changes = dict(change.split("=", 1) for change in options.changes)
    config = load_config(CONFIGS[options.task], options.config, changes)
    config = matched(options.task, config, options.mixer)
    config = replace(config, train=replace(config.train, run_dir=str(run), seed=options.seed))
    task: Task = DetectionTask(config) if options.task == "detect" else RestorationTask(config)
    resume = run if (run / "last").is_dir() else None
    if resume is not None:
        refuse_others(run, task, config.train)
    try:
        train(task, config.train, resume=resume)
    except UserError as error:
        if "is finished" not in str(error):
            raise
    with (run / "metrics.csv").open(encoding="utf-8") as file:
        history = list(csv.DictReader(file))
    model = task.build()
    load_matching(model, load_checkpoint(run / "last")[0]).require_complete(run)
    report = {
        "task": options.task,
        "mixer": options.mixer,
        "seed": options.seed,
        "recipe": options.config,
        "changes": changes,
        "width": config.model.width,
        "parameters": parameters(model),
        "steps": int(history[-1]["step"]),
        "scores": {name: float(history[-1][f"val/{name}"]) for name in SCORES[options.task]},
        "train_images_per_s": fmean(float(row["images_per_s"]) for row in history),
        "ms": milliseconds(model, options.side, options.precision),
        "side": options.side,
        "device": torch.cuda.get_device_name() if choose_device().type == "cuda" else "cpu",
    }
    run.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def refuse_others(run: Path, task: Task, config: TrainConfig) -> None:
    """A run only goes on with the settings that it began with: its report tells of them.

    Raises:
        UserError: They differ.
    """
    was, now = read_run_config(run), json.loads(json.dumps({**task.config(), "train": to_dict(config)}))
    if changed := [name for name in now if was.get(name) != now[name]]:
        raise UserError(f"{run} has other settings ({', '.join(changed)}): give another --out, or remove that run")


def milliseconds(model: nn.Module, side: int, precision: str) -> float:
    """Median time of a picture with the queue of a GPU kept full."""
    device = choose_device()
    model = model.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    picture = torch.rand(1, 3, side, side, device=device)

    def once() -> None:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            model(picture)

    return Stopwatch(device, 10).measure(once).full.median


def read_report(file: Path) -> dict[str, Any]:
    """What `compare` wrote.

    Raises:
        UserError: Something else, or damaged.
    """
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        if not set(report["scores"]) >= set(SCORES[report["task"]]) or report["mixer"] not in MIXERS:
            raise ValueError("not a report of this tool")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no report, or damaged ({error}): remove it, and give its command again") from None
    return report


def show(folder: Path) -> None:
    """Print a table for each task of the folder: means over seeds, and how far the seeds differ.

    Raises:
        UserError: No reports there, or a damaged one.
    """
    reports = [read_report(file) for file in sorted(folder.glob("*_*_*.json"))]
    if not reports:
        raise UserError(f"no reports in {folder}: train something first (--help)")
    for task, names in SCORES.items():
        rows = {m: [r for r in reports if (r["task"], r["mixer"]) == (task, m)] for m in MIXERS}
        if not any(rows.values()):
            continue
        print(f"{task:<12}{'width':>8}{'parameters':>12}{'steps':>8}{'seeds':>6}", end="")
        print("".join(f"{name:>18}" for name in names) + f"{'images/s, training':>20}{'ms':>8}{'pixels':>8}")
        for mixer, found in rows.items():
            if not found:
                continue
            one = found[0]
            print(f"{mixer:<12}{one['width']:>8.4g}{one['parameters']:>12,}{one['steps']:>8}{len(found):>6}", end="")
            for name in names:
                values = [report["scores"][name] for report in found]
                print(f"{f'{fmean(values):.4g} +- {(max(values) - min(values)) / 2:.2g}':>18}", end="")
            print(f"{fmean(r['train_images_per_s'] for r in found):>20.1f}{one['ms']:>8.2f}{one['side']:>8}")


def main() -> int:
    """Train and time one network, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", choices=list(CONFIGS))
    parser.add_argument("changes", nargs="*", metavar="key=value", help="settings that differ from the recipe's")
    parser.add_argument("--config", help="recipe, by name or file")
    parser.add_argument("--mixer", choices=list(MIXERS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--side", type=int, default=512, help="of the picture that is timed")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of the picture that is timed")
    parser.add_argument("--out", type=Path, default=Path("runs/compare_mixers"))
    options = parser.parse_intermixed_args()
    if options.task and not (options.config and options.mixer):
        parser.error("a task needs --config and --mixer")
    if bare := [change for change in options.changes if "=" not in change]:
        parser.error(f"settings are key=value, got {bare[0]!r}")
    if options.side < SIDE or options.side % SIDE:
        parser.error(f"--side must be a multiple of {SIDE}, got {options.side}")
    try:
        if options.task:
            compare(options)
        show(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
