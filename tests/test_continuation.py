"""Two-choice continuations: the questions are what they say, the scores are those of transformers."""

import json

import numpy as np
import pytest
import torch
import transformers
from test_eval import run

from model import Llama
from plumbing.continuation import (
    LENGTH,
    PREFIX,
    Question,
    accuracy,
    log_likelihoods,
    make_questions,
    read_questions,
    write_questions,
)
from plumbing.data import TokenData
from plumbing.tokenizer import load_tokenizer


def test_questions_are_the_text_and_what_follows_it(tiny_data):
    data, tokenizer = TokenData(tiny_data), load_tokenizer("byte")
    for domain in data.domains:
        questions = make_questions(data, tokenizer, domain, "train", 40, seed=0)
        text = tokenizer.decode(data.tokens(domain, "train"))
        assert len(questions) == 40 and len({q.question for q in questions}) > 30
        for q in questions:
            true, false = (q.choice1, q.choice2) if q.label == 0 else (q.choice2, q.choice1)
            assert len(q.question) == PREFIX and len(true) == len(false) == LENGTH and true != false
            assert q.question + true in text and false in text
        assert 5 < sum(q.label for q in questions) < 35
        assert questions == make_questions(data, tokenizer, domain, "train", 40, seed=0)
        assert questions != make_questions(data, tokenizer, domain, "train", 40, seed=1)


class Positions:
    """A tokenizer, and a text, in which each token is its own position."""

    path, eot, meta = "positions", -1, {"window": 200}

    def tokens(self, domain, split):
        return np.arange(1000)

    def encode(self, text):
        return np.array([ord(c) - 0x4E00 for c in text])

    def decode(self, ids):
        return "".join(chr(0x4E00 + i) for i in ids)


def test_choices_do_not_overlap_and_stay_within_a_held_out_window():
    """val and test are windows of a pool, in turn: from one to the next the text does not go on."""
    text = Positions()
    questions = make_questions(text, text, "a", "val", 150, seed=0)
    assert len(questions) > 100
    for q in questions:
        true, false = (q.choice1, q.choice2) if q.label == 0 else (q.choice2, q.choice1)
        asked, other = text.encode(q.question + true), text.encode(false)
        assert np.array_equal(asked, asked[0] + np.arange(PREFIX + LENGTH)) and not set(asked[PREFIX:]) & set(other)
        assert len(set(asked // 200)) == len(set(other // 200)) == 1
    starts = [text.encode(q.question)[0] for q in make_questions(text, text, "a", "train", 150, seed=0)]
    assert any(start // 200 != (start + PREFIX + LENGTH - 1) // 200 for start in starts)  # train is one long text


def test_log_likelihoods_are_transformers(chain):
    """Of text with every length, some of it too long for the model, one pair after the other and unpadded."""
    path = chain[0]["pretrain"] / "model"
    model, tokenizer = Llama.from_pretrained(path), load_tokenizer("byte")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    questions = [
        Question("one cat sees ", "fish .", "the moon .", 0),
        Question("", "1+1=2;", "1+1=3;", 0),
        Question("3+4=7;" * 30, "5+5=10;", "ten owls eat mice .\n", 1),
        Question("日本", "語", "x", 1),
    ]
    means = log_likelihoods(model, tokenizer, questions, batch_size=3)
    for q, row in zip(questions, means):
        for choice, mean in zip((q.choice1, q.choice2), row):
            context, rest = tokenizer.encode(q.question).tolist() or [tokenizer.eot], tokenizer.encode(choice).tolist()
            ids = torch.tensor([context + rest])[:, -65:]
            with torch.no_grad():
                log_p = theirs(ids[:, :-1]).logits[0].log_softmax(-1)
            expected = log_p.gather(1, ids[0, 1:, None])[-len(rest) :].mean().item()
            assert mean == pytest.approx(expected, rel=1e-4)


class OneToken:
    """A tokenizer to which one text is one token."""

    eot = 256

    def encode(self, text):
        return np.array([7]) if text == "ab" else np.frombuffer(text.encode(), np.uint8).astype(int)


def test_a_choice_that_the_tokenizer_joins_to_the_question_is_scored(chain):
    model = Llama.from_pretrained(chain[0]["pretrain"] / "model")
    means = log_likelihoods(model, OneToken(), [Question("a", "b", "c", 0)], batch_size=2)
    log_p = model(torch.tensor([[256]]))[0, 0].log_softmax(-1)
    assert means[0, 0] == pytest.approx(log_p[7].item(), rel=1e-5) and means[0, 1] < 0


def test_accuracy_and_its_error():
    questions = [Question("q", "a", "b", label) for label in (0, 0, 1, 1)]
    result = accuracy(np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [-5.0, -1.0]]), questions)
    assert result["accuracy"] == 0.75 and result["answers"] == [0, 1, 1, 1]
    assert result["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_files_of_questions(tmp_path):
    questions = [Question("naïve 日本\n", " a", "b\u2028", 0), Question("", "c", "d", 1)]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions
    one_based = [json.dumps(q._asdict() | {"label": q.label + 1, "source": "x"}) for q in questions]
    (tmp_path / "one.jsonl").write_text("\n".join(one_based))
    assert read_questions(tmp_path / "one.jsonl") == questions
    for text, words in (
        ('{"question": "a", "choice1": "b", "label": 0}', "bad.jsonl:1: not a question .*choice2"),
        ('\n{"question": "a", "choice1": "b", "choice2": "", "label": 0}', "bad.jsonl:2: .*no choice may be empty"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": 3}', "labels must be 0 and 1, or 1 and 2"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": 0.9}', "bad.jsonl:1: .* a whole number"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": Infinity}', "bad.jsonl:1: .* a whole number"),
        ('{"question": "a", "choice1": "\\ud800", "choice2": "c", "label": 0}', "bad.jsonl:1: not a question"),
        ("[" * 100_000, "bad.jsonl:1: not a question"),
        ("", "labels must be"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_questions(tmp_path / "bad.jsonl")


def test_the_command(chain, tiny_data, tmp_path, monkeypatch, capsys):
    models = [chain[0]["pretrain"], chain[0]["prune"]]
    args = [*models, f"--data={tiny_data}", "--split=train", "--sequences=30"]
    # a window of 64 tokens is too short for the model of the tests to see a whole question: it still beats chance
    assert (
        run(monkeypatch, *args, "--continuation", f"--json={tmp_path / 'a.json'}", "--write_questions", tmp_path) == 0
    )
    table, first = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())["models"]
    rows = first[str(models[0])]
    assert rows["domains"]["sums"]["questions"] == 30 and rows["average"]["accuracy"] > 0.5
    assert rows["average"]["accuracy"] == pytest.approx(np.mean([d["accuracy"] for d in rows["domains"].values()]))
    assert f"{100 * rows['average']['accuracy']:.1f} ± {100 * rows['average']['standard_error']:.1f}" in table
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [f.stem for f in files] == TokenData(tiny_data).domains
    assert run(monkeypatch, *args, "--questions", *files, f"--json={tmp_path / 'b.json'}") == 0
    assert json.loads((tmp_path / "b.json").read_text())["models"] == first
    capsys.readouterr()
    assert run(monkeypatch, *args, "--questions", tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert run(monkeypatch, *args, "--questions", files[0], files[0]) == 2
    assert "two files of one name" in capsys.readouterr().err
