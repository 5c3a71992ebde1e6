"""DiM against diffusers' DiT of equal parameters: same data, order of batches, steps, objective, samplers and judge.

    python tools/compare_dit.py --network dim --seed 0 --data data/eurosat --classifier runs/classify_eurosat/best
    python tools/compare_dit.py --network dit --seed 0 --data data/eurosat --classifier runs/classify_eurosat/best
    python tools/compare_dit.py                      # the table of all that is there

Trains one network by a shipped recipe, scores samples of its averaged weights against all real pictures, and writes
OUT/NETWORK_SEED.json. A run that was stopped goes on; one that is finished is only scored.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import LabelEmbedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from torch import Tensor, nn

from generation.config import GenerateConfig
from generation.dim import DiM
from generation.evaluate import score_features
from generation.features import ClassifierFeatures
from generation.generator import build_pipeline, draw
from generation.reference import feature_reference
from generation.train import GenerateTask
from vision_ssm.checkpoint import load_checkpoint, load_matching
from vision_ssm.config import load_config
from vision_ssm.device import choose_device
from vision_ssm.errors import UserError
from vision_ssm.training import train

HEAD_WIDTH = 32
WIDTHS, DEPTHS = (96, 128, 160, 192, 256, 320, 384), range(4, 25)


class DiT(DiTTransformer2DModel):
    """diffusers' DiT with the signature and the config entries that our pipelines read.

    Its blocks each drop labels by themselves, so that one sample is with and without class at once; here labels are
    dropped once for all of them, as DiT's own code does.
    """

    def adopt(self, arguments: dict[str, Any]) -> "DiT":
        """Take over what a DiM with these arguments says of itself."""
        shared = {name: arguments[name] for name in ("num_classes", "objective", "patch", "sample_frames")}
        self.register_to_config(**shared)
        self.label_dropout = arguments["label_dropout"]
        for module in self.modules():
            if isinstance(module, LabelEmbedding):
                module.dropout_prob = 0.0
        return self

    def forward(  # type: ignore[override]
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        """As `DiM.forward`."""
        none = self.config["num_classes"]
        labels = torch.full((len(sample),), none, device=sample.device) if class_labels is None else class_labels
        if self.training:
            labels = labels.masked_fill(torch.rand(len(labels), device=labels.device) < self.label_dropout, none)
        output = super().forward(sample, timestep, labels, return_dict=False)[0]  # type: ignore[arg-type]
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)


def matching_dit(arguments: dict[str, Any]) -> DiT:
    """The DiT whose number of parameters is nearest to that of a DiM with these arguments."""
    with torch.device("meta"):
        wanted = count(DiM(**arguments))
        sizes = {(width, depth): count(dit(arguments, width, depth)) for width in WIDTHS for depth in (4, 8)}
    per_block = {width: (sizes[width, 8] - sizes[width, 4]) // 4 for width in WIDTHS}
    all_sizes = {(w, d): sizes[w, 4] + (d - 4) * per_block[w] for w in WIDTHS for d in DEPTHS}
    return dit(arguments, *min(all_sizes, key=lambda size: abs(all_sizes[size] - wanted)))


def dit(arguments: dict[str, Any], width: int, depth: int) -> DiT:
    """A DiT of this width and depth for the samples of a DiM."""
    return DiT(
        num_attention_heads=width // HEAD_WIDTH,
        attention_head_dim=HEAD_WIDTH,
        in_channels=arguments["in_channels"],
        out_channels=arguments["in_channels"],
        num_layers=depth,
        sample_size=arguments["sample_size"],
        patch_size=arguments["patch"],
        num_embeds_ada_norm=arguments["num_classes"],
        attention_bias=True,
    )


def count(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


class CompareTask(GenerateTask):
    """The recipe with one network or the other."""

    def __init__(self, config: GenerateConfig, network: str) -> None:
        super().__init__(config)
        self.network = network

    def build(self) -> nn.Module:
        """The network, untrained."""
        return super().build() if self.network == "dim" else matching_dit(self.arguments).adopt(self.arguments)


def trained(options: argparse.Namespace) -> tuple[CompareTask, nn.Module, Path]:
    """Train, go on, or find finished; the task and the network with its averaged weights of the last step."""
    run = options.out / f"{options.network}_{options.seed}"
    config = load_config(GenerateConfig, options.config, {"data.train": str(options.data)})
    changes: dict[str, Any] = {"run_dir": str(run), "seed": options.seed}
    if options.steps:
        changes["steps"] = options.steps
    config = replace(config, train=replace(config.train, **changes))
    task = CompareTask(config, options.network)
    try:
        train(task, config.train, resume=run if (run / "last").is_dir() else None)
    except UserError as error:
        if "is finished" not in str(error):
            raise
    model = task.build()
    load_matching(model, load_checkpoint(run / "last")[0]).require_complete(run)
    return task, model.eval(), run


def compare(options: argparse.Namespace) -> None:
    """Train and score one network."""
    task, model, run = trained(options)
    device = choose_device()
    pipeline = build_pipeline(model.to(device), task.config())  # type: ignore[arg-type]
    labels = [i % len(task.classes) for i in range(options.count)]
    samples = draw(pipeline, labels, list(range(options.count)), steps=options.sample_steps, batch_size=250)
    judge = ClassifierFeatures(options.classifier)
    real = feature_reference(str(options.data), task.settings.data, judge)
    report = {
        "network": options.network,
        "seed": options.seed,
        "parameters": count(model),
        "steps": task.settings.train.steps,
        "samples": options.count,
        "sample_steps": options.sample_steps,
        "reference": real.about,
        "scores": score_features(samples, labels, real, judge),
    }
    run.with_suffix(".json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def show(folder: Path) -> None:
    """Print a line for each report of the folder."""
    reports = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("di[mt]_*.json"))]
    print(f"{'network':<9}{'seed':>5}{'parameters':>12}{'Frechet':>28}{'kernel':>34}{'right':>8}")
    for report in reports:
        scores = report["scores"]
        frechet, kernel = (
            f"{s['value']:.4g} [{s['low']:.4g}, {s['high']:.4g}]" for s in (scores["frechet"], scores["kernel"])
        )
        right = scores["conditional_accuracy"]["value"]
        head = f"{report['network']:<9}{report['seed']:>5}{report['parameters']:>12,}"
        print(f"{head}{frechet:>28}{kernel:>34}{right:>8.1%}")
    if reports and (floor := reports[0]["reference"]["floor"]):
        print(f"floor: Frechet {floor['frechet']:.4g}, kernel {floor['kernel']:.4g} ({floor['of']})")


def main() -> int:
    """Train and score one network, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("dim", "dit"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--config", default="generation/eurosat_dim")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--classifier", type=Path)
    parser.add_argument("--steps", type=int, help="of the training, instead of the recipe's")
    parser.add_argument("--count", type=int, default=5_000, help="samples that are scored")
    parser.add_argument("--sample-steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("runs/compare_dit"))
    options = parser.parse_args()
    if options.network and not (options.data and options.classifier):
        parser.error("--network needs --data and --classifier")
    try:
        if options.network:
            compare(options)
        show(options.out)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
