"""The example of span question answering: its data, its spans in code points, and that it learns."""

import json
import sys
import unicodedata
from pathlib import Path

import pytest
import torch

from vision_ssm.config import load_config
from vision_ssm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import sequence_qa  # noqa: E402
import sequence_qa_data as data  # noqa: E402


@pytest.mark.parametrize("script", ["hi", "ta", "bn"])
def test_made_up_facts(script):
    for held_out in (False, True):
        for e in data.facts(script, 50, held_out=held_out, seed=3):
            answer = e.context[e.start : e.end + 1]
            assert e.answers == (answer,)
            assert data.is_held_out(answer) == held_out
            (name,) = {e.question[a:b] for a, b in data._words(e.question)[:1]}
            assert data.is_held_out(name) == held_out
            sentence = next(s for s in e.context.replace("।", ".").split(".") if answer in s and name in s)
            assert sentence.split()[0] == name
            assert not data.attaches(e.context[e.start])
            assert not data.attaches((e.context + " ")[e.end + 1])


def test_the_name_decides():
    """Every text has another fact of the kind that is asked, about somebody else."""
    for e in data.facts("hi", 100, held_out=False, seed=4):
        assert e.context.count("आयु" if "आयु" in e.question else "घर") > 1


def test_words_keep_their_marks():
    assert data.shared_words("राम की आयु?", "रा राम।") == [False, False, False, True, True, True, False]


def test_scores_compare_text_not_bytes():
    composed, apart = "\u0958", "\u0915\u093c"  # qa: one code point, or ka and nukta
    assert data.exact_match(composed, (apart,)) == 1
    assert data.character_f1(apart, (composed,)) == 1
    assert data.character_f1("४२", ("४७", "९")) == pytest.approx(0.5)
    assert data.exact_match("की", ("क",)) == 0
    assert data.character_f1("", ("क",)) == 0


def squad(tmp_path: Path, answers: list[dict], context: str) -> Path:
    qas = [{"question": "किस?", "answers": answers}, {"question": "?", "answers": [], "is_impossible": True}]
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"paragraphs": [{"context": context, "qas": qas}]}]}), encoding="utf-8")
    return path


def test_squad_reader_finds_answers_whose_place_counts_bytes(tmp_path):
    context = "रामू और सीता। सीता घर में है।"
    right = context.rindex("सीता")
    shifted = right + 3
    (e,) = data.read_squad(
        squad(tmp_path, [{"text": "सीता", "answer_start": shifted}, {"text": "वह", "answer_start": 0}], context)
    )
    assert (e.start, e.end, e.answers) == (right, right + 3, ("सीता", "वह"))


@pytest.mark.parametrize(
    "content, told",
    [("[]", "SQuAD"), ("{", "SQuAD"), ('{"data": []}', "no question"), ('{"data": [{"paragraphs": 3}]}', "SQuAD")],
)
def test_squad_reader_says_what_is_wrong(content, told, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=told):
        data.read_squad(path)


def test_squad_reader_refuses_an_answer_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="not in its context"):
        data.read_squad(squad(tmp_path, [{"text": "गीता", "answer_start": 0}], "राम घर में है।"))


def test_decode_is_the_best_of_all_spans():
    generator = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 6, 9, generator=generator)
    found = sequence_qa.decode(start, end, 3).tolist()
    for s, e, (a, b) in zip(start, end, found, strict=True):
        spans = [(i, j) for i in range(9) for j in range(i, min(9, i + 3))]
        assert (a, b) == max(spans, key=lambda span: s[span[0]] + e[span[1]])


def test_answers_do_not_cut_letters_and_keep_to_the_context():
    config = sequence_qa.QAConfig(dim=8, layers=1)
    torch.manual_seed(0)
    examples = data.facts("ta", 40, held_out=True, seed=5)
    model = sequence_qa.SpanQA(config, "கா")
    for e, answer in zip(examples, sequence_qa.answers(model, examples, config), strict=True):
        assert answer in e.context
        assert not unicodedata.category(answer[0]).startswith("M")


def test_learns_names_it_has_not_seen(tmp_path, monkeypatch, capsys):
    """The scan finds the fact about the asked name among several; quick, with fewer facts and steps."""
    monkeypatch.setattr(sequence_qa, "MADE", 1000)
    monkeypatch.setattr(sequence_qa, "SCORED", 60)
    small = {"people": 2, "sentences": 3, "steps": 120, "out": tmp_path}
    config = load_config(sequence_qa.QAConfig, "examples/sequence_qa_hi", small)
    assert sequence_qa.run(config) == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["exact match %"] > 60
    assert scores["character F1 %"] >= scores["exact match %"]
    assert len(json.loads((tmp_path / "answers.json").read_text())) == 60
    assert "exact match" in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sequence_qa.py", "--train", "x.json", "--out", str(tmp_path)])
    assert sequence_qa.main() == 2
    error = capsys.readouterr().err
    assert "train and val go together" in error
    assert error.count("\n") == 1
