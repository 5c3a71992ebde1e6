"""In-context learning: what a stack makes of examples that its input holds.

Four tasks (Park et al., "Can Mamba learn how to learn?", 2024; Arora et al., "Zoology", 2023), at a size that minutes
suffice for. Every batch is new, so a score is on unseen examples. Answers are asked at every point, scored at the last.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_ssm.device import choose_device
from vision_ssm.probe.options import HIDDEN, ICLOptions, Task
from vision_ssm.probe.report import Curve, Report
from vision_ssm.probe.stack import Stack, StackConfig, fit

# Shapes: B sequences, L tokens, P points (examples or pairs), K numbers in an x, a key or a value.

TEST = 1024
SPACING = 8
"""Tokens of an mqar sequence for every pair: two for the pair, then one query among fillers."""


@dataclass(frozen=True)
class Batch:
    """Inputs, and what is asked where."""

    inputs: Tensor
    """(B, L, ...) of the embedding."""
    places: Tensor
    """(B, Q) tokens that are asked, the last point last."""
    answers: Tensor
    """(B, Q) numbers, signs or symbols, (B, Q, K) vectors."""


def linreg(options: ICLOptions, count: int, generator: torch.Generator) -> Batch:
    """x1, y1, x2, y2, ... with y = w x of unit variance."""
    x = torch.randn(count, options.points, options.dims, generator=generator)
    w = torch.randn(count, options.dims, 1, generator=generator) / options.dims**0.5
    return _interleaved(x, (x @ w).squeeze(-1))


def parity(options: ICLOptions, count: int, generator: torch.Generator) -> Batch:
    """x1, y1, ... with x of signs and y the product of two of them, the same two in a sequence."""
    x = torch.randint(2, (count, options.points, options.dims), generator=generator) * 2.0 - 1
    hidden = torch.rand(count, options.dims, generator=generator).argsort(1)[:, None, :HIDDEN]
    return _interleaved(x, x.gather(2, hidden.expand(-1, options.points, -1)).prod(-1))


def _interleaved(x: Tensor, y: Tensor) -> Batch:
    points = x.shape[1]
    tokens = torch.stack([F.pad(x, (0, 1)), F.pad(y[..., None], (x.shape[-1], 0))], dim=2).flatten(1, 2)
    return Batch(tokens, 2 * torch.arange(points).expand(len(x), -1), y)


def retrieval(options: ICLOptions, count: int, generator: torch.Generator) -> Batch:
    """Pairs of a key and a value, unit vectors, then one of the keys, whose value is asked."""
    shape = (2, count, options.points, options.dims)
    keys, values = F.normalize(torch.randn(*shape, generator=generator), dim=-1)
    chosen = torch.randint(options.points, (count, 1, 1), generator=generator).expand(-1, -1, options.dims)
    query = F.pad(keys.gather(1, chosen), (0, options.dims))
    tokens = torch.cat([torch.cat([keys, values], dim=-1), query], dim=1)
    return Batch(tokens, torch.full((count, 1), options.points), values.gather(1, chosen))


def mqar(options: ICLOptions, count: int, generator: torch.Generator) -> Batch:
    """Key, value, key, value, ..., then every key once more among fillers (symbol 0), whose value is asked there."""
    points, half = options.points, options.vocabulary // 2
    keys = 1 + torch.rand(count, half, generator=generator).argsort(1)[:, :points]
    values = 1 + half + torch.randint(half, (count, points), generator=generator)
    pairs = torch.stack([keys, values], dim=2).flatten(1)
    rest = torch.zeros(count, (SPACING - 2) * points, dtype=torch.long)
    places = torch.rand(rest.shape, generator=generator).argsort(1)[:, :points]
    rest.scatter_(1, places, keys)
    return Batch(torch.cat([pairs, rest], dim=1), places + 2 * points, values)


TASKS: dict[Task, Callable[[ICLOptions, int, torch.Generator], Batch]] = {
    "linreg": linreg, "parity": parity, "mqar": mqar, "retrieval": retrieval,
}  # fmt: skip
SCORES: dict[Task, str] = {
    "linreg": "squared error", "parity": "right %", "mqar": "right %", "retrieval": "squared error",
}  # fmt: skip


def build_stack(config: StackConfig, options: ICLOptions) -> Stack:
    """With the embedding, the positions and the head that the task needs."""
    generator = torch.Generator().manual_seed(0)
    inputs = TASKS[options.task](options, 1, generator).inputs
    if options.task == "mqar":
        symbols = 1 + 2 * (options.vocabulary // 2)
        return Stack(config, nn.Embedding(symbols, config.dim), symbols, length=inputs.shape[1])
    outputs = options.dims if options.task == "retrieval" else 1
    return Stack(config, nn.Linear(inputs.shape[2], config.dim), outputs, length=inputs.shape[1])


def predictions(model: Stack, batch: Batch) -> Tensor:
    """(B, Q, outputs) at the places that are asked."""
    found = model(batch.inputs)
    return found.gather(1, batch.places[..., None].expand(-1, -1, found.shape[-1]))


def loss(task: Task, found: Tensor, answers: Tensor) -> Tensor:
    """Cross-entropy of symbols and signs, squared error of numbers and vectors."""
    if task == "mqar":
        return F.cross_entropy(found.flatten(0, 1), answers.flatten())
    if task == "parity":
        return F.softplus(-found.squeeze(-1) * answers).mean()
    return (found.reshape(answers.shape) - answers).square().mean()


def score(task: Task, found: Tensor, answers: Tensor) -> Tensor:
    """(Q,): percent right, or squared error (1 for the answer zero)."""
    if task == "mqar":
        return 100 * (found.argmax(-1) == answers).float().mean(0)
    if task == "parity":
        return 100 * (found.squeeze(-1) * answers > 0).float().mean(0)
    errors = (found.reshape(answers.shape) - answers).square()
    return (errors if task == "linreg" else errors.sum(-1)).mean(0)


def measure(options: ICLOptions, stacks: list[StackConfig]) -> Report:
    """Train every stack and score it."""
    device = choose_device(options.device)
    rows, curves = [], []
    for config in stacks:
        torch.manual_seed(options.seed)
        model = build_stack(config, options).to(device)
        seconds = fit(
            model, _batches(options, device),
            lambda batch, model=model: loss(options.task, predictions(model, batch), batch.answers),
            steps=options.steps, lr=options.lr,
        )  # fmt: skip
        with torch.inference_mode():
            test = _draw(options, TEST, torch.Generator().manual_seed(options.seed + 1), device)
            found = score(options.task, predictions(model, test), test.answers)
        size = sum(p.numel() for p in model.parameters())
        last = found.mean() if options.task == "mqar" else found[-1]
        rows.append((config.label, size, last.item(), round(seconds)))
        if options.task in ("linreg", "parity"):
            curves.append(Curve(config.label, range(options.points), found.tolist()))
    chance = {"parity": 50.0, "mqar": 100 / (options.vocabulary // 2)}.get(options.task)
    reference = ("reference: answer zero", 1.0) if chance is None else ("reference: guess", chance)
    rows.insert(0, (reference[0], None, reference[1], None))
    columns = ("stack", "parameters", SCORES[options.task], "seconds")
    settings = options.settings(stacks) | {"device": str(device)}
    axes = {"ylabel": SCORES[options.task]} | ({"xlabel": "examples seen"} if curves else {})
    return Report(f"icl_{options.task}", settings, columns, rows, curves, axes)


def _draw(options: ICLOptions, count: int, generator: torch.Generator, device: torch.device) -> Batch:
    batch = TASKS[options.task](options, count, generator)
    return Batch(batch.inputs.to(device), batch.places.to(device), batch.answers.to(device))


def _batches(options: ICLOptions, device: torch.device) -> Iterator[tuple[Batch]]:
    generator = torch.Generator().manual_seed(options.seed + 2)
    while True:
        yield (_draw(options, options.batch_size, generator, device),)
