"""Questions with an answer inside a text: made-up facts in Hindi, Tamil and Bengali, and files in SQuAD's format.

Positions are code points of the text as it is given. Nothing is normalised before a span is cut out, because NFC may
change the number of code points; only comparisons of two answers are made on normalised text.
"""

import json
import random
import unicodedata
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vision_ssm.errors import UserError

Script = Literal["hi", "ta", "bn"]
JOINERS = "\u200c\u200d"


@dataclass(frozen=True)
class Example:
    """A question about a text, and where its answer stands."""

    question: str
    context: str
    start: int
    """First code point of the answer in the context."""
    end: int
    """Last code point, inclusive."""
    answers: tuple[str, ...]
    """All that count as right."""


@dataclass(frozen=True)
class Language:
    """Letters to make words from, and one sentence and one question for each relation."""

    consonants: str
    vowels: str
    """Dependent signs; a syllable has one of them or none."""
    zero: str
    place: str
    """Ending of the names of towns."""
    age: tuple[str, str]
    town: tuple[str, str]


LANGUAGES: dict[Script, Language] = {
    "hi": Language(
        "कखगचजटडतदनपबमरलवशसह", "ािीुूेैो", "०", "पुर",
        ("{name} की आयु इस समय {value} वर्ष है।", "{name} की आयु क्या है?"),
        ("{name} का घर इस समय {value} में है।", "{name} का घर कहाँ है?"),
    ),
    "ta": Language(
        "கசடதநபமயரலவளனழற", "ாிீுூெேைொோ", "௦", "புரம்",
        ("{name} அவர்களின் வயது இப்போது {value} ஆண்டுகள்.", "{name} அவர்களின் வயது என்ன?"),
        ("{name} அவர்களின் வீடு இப்போது {value} நகரில் உள்ளது.", "{name} அவர்களின் வீடு எங்கே உள்ளது?"),
    ),
    "bn": Language(
        "কখগচজটডতদনপবমরলশসহ", "ািীুূেৈো", "০", "পুর",
        ("{name} এর বয়স এখন {value} বছর।", "{name} এর বয়স কত?"),
        ("{name} এর বাড়ি এখন {value} শহরে।", "{name} এর বাড়ি কোথায়?"),
    ),
}  # fmt: skip


def facts(
    script: Script, count: int, *, held_out: bool, people: int = 3, sentences: int = 4, seed: int
) -> list[Example]:
    """Texts of several facts about several people, each with a question about one of them.

    Every text has at least one other fact of the kind that is asked, so that the name decides. Words and numbers fall
    into two lots by their checksum: one in five is held out, and no text of the other lot has it.

    Args:
        script: Language.
        count: How many.
        held_out: Take names, towns and ages from the lot that is held out.
        people: Names in a text.
        sentences: Facts in a text, more than ``people`` and at most twice as many.
        seed: Of the choice.
    """
    if not people < sentences <= 2 * people:
        raise UserError(f"facts: {people} people take {people + 1} to {2 * people} sentences, got {sentences}")
    rng = random.Random(seed)
    return [_example(LANGUAGES[script], rng, held_out, people, sentences) for _ in range(count)]


def _example(language: Language, rng: random.Random, held_out: bool, people: int, sentences: int) -> Example:
    names: list[str] = []
    while len(names) < people:
        name = _chosen(lambda: _word(language, rng, rng.choice((2, 3))), held_out)
        names += [name] * (name not in names)
    pairs = [(name, kind) for name in names for kind in ("age", "town")]
    told = rng.sample(pairs, sentences)
    kinds = Counter(kind for _, kind in told)
    asked = rng.choice([i for i, (_, kind) in enumerate(told) if kinds[kind] > 1])
    text, question, start, end = "", "", 0, 0
    for i, (name, kind) in enumerate(told):
        value = _chosen(lambda kind=kind: _value(language, rng, kind), held_out)
        before, after = getattr(language, kind)[0].format(name=name, value="\0").split("\0")
        text += (" " if text else "") + before
        if i == asked:
            start, end = len(text), len(text) + len(value) - 1
            question = getattr(language, kind)[1].format(name=name)
        text += value + after
    return Example(question, text, start, end, (text[start : end + 1],))


def _chosen(draw, held_out: bool) -> str:
    while is_held_out(word := draw()) != held_out:
        pass
    return word


def is_held_out(word: str) -> bool:
    """Whether a name, town or number is kept for the test."""
    return zlib.crc32(word.encode()) % 5 == 0


def _word(language: Language, rng: random.Random, syllables: int) -> str:
    return "".join(
        rng.choice(language.consonants) + rng.choice(language.vowels) * (rng.random() < 0.75) for _ in range(syllables)
    )


def _value(language: Language, rng: random.Random, kind: str) -> str:
    if kind == "town":
        return _word(language, rng, 2) + language.place
    return "".join(chr(ord(language.zero) + int(digit)) for digit in str(rng.randrange(10, 100)))


def read_squad(path: Path) -> list[Example]:
    """Questions of a JSON file in SQuAD's format (1.1 or 2.0; questions without an answer are left out).

    ``answer_start`` counts code points; where the answer does not stand there (some files count bytes or UTF-16
    units), its occurrence nearest to that place is taken.

    Raises:
        UserError: Not such a file, or an answer that its text does not hold.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        entries = [(p["context"], qa) for article in articles for p in article["paragraphs"] for qa in p["qas"]]
        found = [
            _from_squad(path, context, qa["question"], [(a["text"], int(a["answer_start"])) for a in qa["answers"]])
            for context, qa in entries
            if qa.get("answers")
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a JSON file in SQuAD's format: {type(error).__name__} {error}") from None
    if not found:
        raise UserError(f"{path} holds no question with an answer")
    return found


def _from_squad(path: Path, context: str, question: str, answers: list[tuple[str, int]]) -> Example:
    text, start = answers[0]
    if not text or text not in context:
        raise UserError(f"{path}: the answer {text!r} of {question!r} is not in its context")
    if context[start : start + len(text)] != text:
        places = [i for i in range(len(context)) if context.startswith(text, i)]
        start = min(places, key=lambda place: abs(place - start))
    return Example(question, context, start, start + len(text) - 1, tuple(dict.fromkeys(a for a, _ in answers)))


def attaches(char: str) -> bool:
    """Whether a code point belongs to the one before it: vowel signs, viramas, joiners."""
    return unicodedata.category(char).startswith("M") or char in JOINERS


def shared_words(question: str, context: str) -> list[bool]:
    """For every code point of the context, whether its word occurs in the question; spaces and punctuation do not.

    Words end at spaces and punctuation (the danda is punctuation), not where ``\\w`` of regular expressions ends: that
    leaves out vowel signs.
    """
    asked = {question[a:b] for a, b in _words(question)}
    shared = [False] * len(context)
    for a, b in _words(context):
        shared[a:b] = [context[a:b] in asked] * (b - a)
    return shared


def _words(text: str) -> list[tuple[int, int]]:
    """First code point of each word, and the one after its last."""
    edges = [i for i, char in enumerate(text) if char.isspace() or unicodedata.category(char).startswith("P")]
    starts = [0, *(i + 1 for i in edges)]
    return [(a, b) for a, b in zip(starts, [*edges, len(text)], strict=True) if a < b]


def exact_match(answer: str, right: tuple[str, ...]) -> float:
    """1 if the answer is one of the right ones after NFC, without spaces around."""
    return float(_plain(answer) in {_plain(r) for r in right})


def character_f1(answer: str, right: tuple[str, ...]) -> float:
    """Best F1 of the bags of code points, without spaces; tools that count Latin words would drop the vowel signs."""
    return max(_f1(_bag(answer), _bag(r)) for r in right)


def _plain(text: str) -> str:
    return unicodedata.normalize("NFC", text).strip()


def _bag(text: str) -> Counter[str]:
    return Counter("".join(_plain(text).split()))


def _f1(a: Counter[str], b: Counter[str]) -> float:
    return 2 * (a & b).total() / max(1, a.total() + b.total())
