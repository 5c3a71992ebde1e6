"""Answer questions about a text by pointing at a span of it: a bidirectional scan over the code points of a sequence.

    python tools/sequence_qa.py --config examples/sequence_qa_hi
    python tools/sequence_qa.py --config examples/sequence_qa_hi --mixer gated_conv --out runs/sequence_qa_control
    python tools/sequence_qa.py --train my_train.json --val my_dev.json          # SQuAD's format

Trains on made-up facts in Hindi, Tamil or Bengali (or on your files), scores exact match and character F1 on names and
values that training has not seen, shows some answers, and writes OUT/scores.json and OUT/answers.json.
A demonstration that the scan serves other things than pictures; it says nothing about real questions.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sequence_qa_data import Example, Script, attaches, character_f1, exact_match, facts, read_squad, shared_words
from torch import Tensor, nn

from vision_ssm import cli
from vision_ssm.errors import UserError
from vision_ssm.files import check_writable, write_text
from vision_ssm.probe.stack import Stack, StackConfig, fit

# Shapes: B batch, L code points of question, separator and context, right-padded.

PAD, SEPARATOR, UNKNOWN = 0, 1, 2
MADE, SCORED, SHOWN = 16384, 500, 3
"""Made-up texts for training and for scoring, and how many answers are printed."""


@dataclass(frozen=True, kw_only=True)
class QAConfig:
    """Span question answering."""

    script: Script = "hi"
    """Language of the made-up facts."""
    people: int = 3
    """Names in a text of made-up facts."""
    sentences: int = 4
    """Facts in such a text, more than people and at most twice as many."""
    train: Path | None = None
    """JSON file in SQuAD's format instead of made-up facts; needs val."""
    val: Path | None = None
    """JSON file in SQuAD's format to score on; needs train."""
    max_length: int = 512
    """Code points of question and context; training leaves out longer ones, scoring reads only so far."""
    max_answer: int = 64
    """Longest answer in code points."""
    mixer: str = "s6"
    """s6, ssd, nc_ssd, s4d, attention or gated_conv; one for every layer, or layer by layer, joined by +."""
    layers: int = 2
    dim: int = 48
    state_size: int | None = None
    steps: int = 200
    batch_size: int = 16
    lr: float = 4e-3
    seed: int = 0
    out: Path = Path("runs/sequence_qa")
    """Folder for the scores and the weights."""

    def __post_init__(self) -> None:
        if (self.train is None) != (self.val is None):
            raise ValueError("train and val go together: give both files, or none for made-up facts")
        for name in ("max_length", "max_answer", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


class Letters(nn.Module):
    """(B, L, 2) numbers of code points and their sides -> (B, L, C): an embedding of each.

    Sides are question (0), context (1), and words of the context that the question has (2), a feature of classical
    readers (Chen et al., "Reading Wikipedia to answer open-domain questions", 2017, section 3.2): names that training
    has not seen are then recognised by comparison, and what is left for the mixers is to carry this to the answer.
    """

    def __init__(self, count: int, dim: int) -> None:
        super().__init__()
        self.letters = nn.Embedding(count, dim, padding_idx=PAD)
        self.sides = nn.Embedding(3, dim)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return self.letters(x[..., 0]) + self.sides(x[..., 1])


class SpanQA(nn.Module):
    """Code points -> bidirectional mixers -> a score for every place to be the start, and to be the end.

    Args:
        config: Sizes.
        alphabet: The code points that have an embedding.
    """

    def __init__(self, config: QAConfig, alphabet: str) -> None:
        super().__init__()
        self.numbers = {char: UNKNOWN + 1 + i for i, char in enumerate(alphabet)}
        mixers = StackConfig.of(config.mixer, config.layers, dim=config.dim, state_size=config.state_size, causal=False)
        self.stack = Stack(mixers, Letters(UNKNOWN + 1 + len(alphabet), config.dim), 2, length=None)

    def encode(self, examples: list[Example], max_length: int) -> tuple[Tensor, Tensor]:
        """(B, L, 2) question, separator and context; (B, L) bits: an answer may start here (1), may end here (2)."""
        rows, places = [], []
        for e in examples:
            context = e.context[: max(1, max_length - len(e.question) - 1)]
            skip = len(e.question) + 1
            question = [self.numbers.get(char, UNKNOWN) for char in e.question]
            letters = [*question, SEPARATOR, *(self.numbers.get(char, UNKNOWN) for char in context)]
            sides = [0] * skip + [1 + shared for shared in shared_words(e.question, context)]
            rows.append(torch.tensor([letters, sides]).T)
            marks = [attaches(char) for char in context] + [False]
            allowed = [(not marks[i]) + 2 * (not marks[i + 1]) for i in range(len(context))]
            places.append(torch.tensor([0] * skip + allowed))
        pad = nn.utils.rnn.pad_sequence
        return pad(rows, batch_first=True, padding_value=PAD), pad(places, batch_first=True)

    def forward(self, tokens: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) each: scores of start and end, minus infinity where they may not be."""
        start, end = self.stack(tokens).unbind(-1)
        return start.masked_fill(places & 1 == 0, -torch.inf), end.masked_fill(places & 2 == 0, -torch.inf)


def span_loss(model: SpanQA, tokens: Tensor, places: Tensor, spans: Tensor) -> Tensor:
    """Mean of the two cross-entropies; (B, 2) first and last position of the answers."""
    start, end = model(tokens, places)
    return 0.5 * (F.cross_entropy(start, spans[:, 0]) + F.cross_entropy(end, spans[:, 1]))


def decode(start: Tensor, end: Tensor, max_answer: int) -> Tensor:
    """(B, 2): the span of the highest sum of scores with start <= end < start + max_answer."""
    length = start.shape[1]
    both = start[:, :, None] + end[:, None]  # (B, L, L)
    shape = torch.ones(length, length, dtype=torch.bool, device=start.device).triu().tril(max_answer - 1)
    best = both.masked_fill(~shape, -torch.inf).flatten(1).argmax(1)
    return torch.stack([best // length, best % length], dim=1)


def batches(model: SpanQA, examples: list[Example], config: QAConfig) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless random batches of (tokens, places, spans)."""
    generator = torch.Generator().manual_seed(config.seed)
    while True:
        chosen = [examples[i] for i in torch.randint(len(examples), (config.batch_size,), generator=generator)]
        skip = torch.tensor([[len(e.question) + 1] for e in chosen])
        yield *model.encode(chosen, config.max_length), skip + torch.tensor([[e.start, e.end] for e in chosen])


@torch.inference_mode()
def answers(model: SpanQA, examples: list[Example], config: QAConfig) -> list[str]:
    """The model's answer to each question."""
    found = []
    for i in range(0, len(examples), config.batch_size):
        some = examples[i : i + config.batch_size]
        starts, ends = model(*model.encode(some, config.max_length))
        for e, (start, end) in zip(some, decode(starts, ends, config.max_answer).tolist(), strict=True):
            skip = len(e.question) + 1
            found.append(e.context[start - skip : end - skip + 1])
    return found


def trainable(e: Example, config: QAConfig) -> bool:
    """Whether the answer is short enough, within reach, and no letter is cut from its marks."""
    whole = not attaches(e.context[e.start]) and not attaches(e.context[e.end + 1 : e.end + 2] or " ")
    return whole and e.end - e.start < config.max_answer and len(e.question) + 1 + e.end < config.max_length


def read_examples(config: QAConfig) -> tuple[list[Example], list[Example]]:
    """For training and for scoring."""
    if config.train is not None and config.val is not None:
        given, val = read_squad(config.train), read_squad(config.val)
    else:
        about = {"people": config.people, "sentences": config.sentences}
        given = facts(config.script, MADE, held_out=False, seed=config.seed, **about)
        val = facts(config.script, SCORED, held_out=True, seed=config.seed + 1, **about)
    train = [e for e in given if trainable(e, config)]
    if not train:
        raise UserError(f"no example of {config.train} can be learned with max_length {config.max_length} and "
                        f"max_answer {config.max_answer}; raise them")  # fmt: skip
    if len(train) < len(given):
        print(f"{len(given) - len(train)} of {len(given)} training examples left out: too long, or cut within a letter")
    return train, val


def run(config: QAConfig) -> int:
    """Train on made-up facts or on files in SQuAD's format, and score."""
    check_writable(config.out)
    train, val = read_examples(config)
    torch.manual_seed(config.seed)
    model = SpanQA(config, "".join(sorted({char for e in train for char in e.question + e.context})))
    print(f"{len(train)} texts such as: {train[0].context} | {train[0].question}")

    def loss(*batch: Tensor) -> Tensor:
        return span_loss(model, *batch)

    seconds = fit(model, batches(model, train, config), loss, steps=config.steps, lr=config.lr)
    found = answers(model, val, config)
    pairs = list(zip(found, val, strict=True))
    scores = {
        "exact match %": 100 * sum(exact_match(a, e.answers) for a, e in pairs) / len(val),
        "character F1 %": 100 * sum(character_f1(a, e.answers) for a, e in pairs) / len(val),
        "questions": len(val), "training seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()), "mixer": config.mixer, "layers": config.layers,
    }  # fmt: skip
    rows = [{"question": e.question, "answer": a, "right": e.answers, "context": e.context} for a, e in pairs]
    write_text(config.out / "answers.json", json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    write_text(config.out / "scores.json", json.dumps(scores, indent=2) + "\n")
    for row in rows[:SHOWN]:
        print(f"{row['context']} | {row['question']} -> {row['answer']} (right: {row['right'][0]})")
    print(
        ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in scores.items()
        )
    )
    return 0


def main() -> int:
    """Flags are those of ``QAConfig``; a mistake is one line and exit code 2."""
    try:
        return cli.call("sequence_qa.py", run, sys.argv[1:])
    except Exception as error:
        message = cli.readable(error)
        if message is None:
            raise
        print(f"sequence_qa.py: error: {message}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
