"""Two-choice continuations: the questions are what they say, the scores are those of transformers."""

import json
import random
from contextlib import nullcontext

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import DOMAINS, grammar_text
from test_eval import run
from test_model import random_llama

from model import Llama, LlamaConfig
from plumbing.continuation import (
    LENGTH,
    PREFIX,
    Question,
    accuracy,
    answer,
    average,
    encode,
    log_likelihoods,
    make_or_read,
    make_questions,
    read_questions,
    write_all,
    write_questions,
)
from plumbing.data import TokenData
from plumbing.tokenizer import HuggingFaceTokenizer, load_tokenizer
from prepare_data import prepare


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


def test_questions_are_of_the_split_that_is_asked_for(tiny_corpus, tmp_path):
    prepare(str(tiny_corpus), tmp_path / "data", window=256, held_out=0.2)
    data, tokenizer = TokenData(tmp_path / "data"), load_tokenizer("byte")
    train = tokenizer.decode(data.tokens("animals", "train"))
    for split in ("val", "test"):
        questions = make_questions(data, tokenizer, "animals", split, 10, seed=0)
        text = tokenizer.decode(data.tokens("animals", split))
        assert all(q.question + (q.choice1, q.choice2)[q.label] in text and q.question not in train for q in questions)


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
    text.meta = {"window": PREFIX + LENGTH - 1}  # no question fits into such a window
    with pytest.raises(ValueError, match="val of domain a has no document .*: its windows have 127, see --window"):
        make_questions(text, text, "a", "val", 150, seed=0)
    assert make_questions(text, text, "a", "train", 150, seed=0)


class Indented(Positions):
    """A text in which white space comes in long runs; each token is a letter or a space."""

    def tokens(self, domain, split):
        rng = np.random.default_rng(0)
        runs = [np.full(rng.integers(20, 60), ord(c) - 0x4E00) for _ in range(900) for c in rng.permutation(["a", " "])]
        return np.concatenate(runs)


def test_a_model_that_only_counts_tokens_has_half_of_the_answers():
    """No choice may begin within a run of white space: one that could would be the easier one to foresee."""
    text = Indented()
    spaces = []
    for q in make_questions(text, text, "a", "train", 2000, seed=0):
        true, false = (q.choice1, q.choice2) if q.label == 0 else (q.choice2, q.choice1)
        spaces.append(np.sign(true.count(" ") - false.count(" ")))
    assert len(spaces) == 2000 and abs(np.mean(spaces)) < 4 / 2000**0.5


def test_choices_may_begin_with_a_space_that_a_decoder_drops(tmp_path, tiny_corpus):
    """Llama 2's tokenizer writes a space before each text, and takes one away from what it decodes."""
    ours = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    ours.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    ours.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)]
    )
    text = "abc" + "".join(file.read_text() for file in tiny_corpus.rglob("*") if file.is_file())
    alphabet = sorted(set(text) - {" "})
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "▁", *alphabet])}
    merges = []
    for c in alphabet:  # words begin with a token of two characters
        if c.isalpha():
            merges.append(("▁", c))
            vocabulary["▁" + c] = len(vocabulary)
    ours.model = tokenizers.models.BPE(vocabulary, merges, unk_token="<unk>")
    ours.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    prepare(str(tiny_corpus), tmp_path / "data", str(tmp_path), window=128, held_out=0.1)
    data, tokenizer = TokenData(tmp_path / "data"), load_tokenizer(str(tmp_path))
    assert tokenizer.decode(tokenizer.encode("a bc")[1:]) == "bc"  # not " bc"
    tokens = data.tokens("animals", "train")[:2000].tolist()
    share = np.mean([tokenizer.decode([vocabulary["a"], token]).startswith("a ") for token in tokens])
    asked = make_questions(data, tokenizer, "animals", "train", 100, seed=0)
    spaces = np.mean([choice.startswith(" ") for q in asked for choice in (q.choice1, q.choice2)])
    assert len(asked) == 100 and share > 0.1 and abs(spaces - share) < 0.12


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
    means = log_likelihoods(model, [encode(tokenizer, q) for q in questions], batch_size=3)
    for q, row in zip(questions, means):
        for choice, mean in zip((q.choice1, q.choice2), row):
            context = tokenizer.encode(q.question.rstrip()).tolist() or [tokenizer.eot]
            rest = tokenizer.encode(q.question[len(q.question.rstrip()) :] + choice).tolist()
            ids = torch.tensor([context + rest])[:, -65:]
            with torch.no_grad():
                log_p = theirs(ids[:, :-1]).logits[0].log_softmax(-1)
            expected = log_p.gather(1, ids[0, 1:, None])[-len(rest) :].mean().item()
            assert mean == pytest.approx(expected, rel=1e-4)


SENTENCES = [
    "The capital of France is Paris.",
    "The capital of Italy is Rome.",
    "She is unhappy about rain.",
    "un in, out",
]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """(our tokenizer, our model, the same model in transformers): a trained byte-level BPE to which each word of
    SENTENCES with the space before it is one token, and a random Llama of 24 positions."""
    path = tmp_path_factory.mktemp("bpe")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = [grammar_text(domain, 2000, random.Random(0)) for domain in DOMAINS]
    tokenizer.train_from_iterator(SENTENCES * 50 + text, trainer)
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=24, initializer_range=0.3,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(path)
    return HuggingFaceTokenizer("bpe", path / "tokenizer.json"), Llama.from_pretrained(path), theirs


def log_p_of_last(theirs, ids, scored):
    """Mean log-probability of the last `scored` ids by transformers, one text at a time, not padded."""
    ids = torch.tensor([ids])[:, -theirs.config.max_position_embeddings - 1 :]
    with torch.no_grad():
        log_p = theirs(ids[:, :-1]).logits[0].log_softmax(-1)
    return log_p.gather(1, ids[0, 1:, None])[-scored:].mean().item()


SCORED = [  # question, choice, the tokens that must be scored, whether the question's own tokens are merged away
    ("The capital of France is", " Paris.", [" Paris", "."], False),
    ("The capital of France is ", "Paris.", [" Paris", "."], False),  # the space belongs to the choice
    ("The capital of France is ", "Rome.", [" Rome", "."], False),
    ("She is un", "happy about", [" unhappy", " about"], True),
    ("", "The capital", ["The", " capital"], False),
    (" ", "capital", [" capital"], False),
]


def test_all_of_a_choice_is_scored(bpe):
    """Also where the question ends with a space, and where the tokenizer merges its end with the choice."""
    tokenizer, model, theirs = bpe
    vocabulary = tokenizer.tokenizer.get_vocab()
    for question, choice, expected, merged in SCORED:
        encoded = encode(tokenizer, Question(question, choice, "out", 0))
        ids, scored = encoded.choices[0]
        assert [tokenizer.decode([i]) for i in ids[-scored:]] == expected
        if question.strip():
            assert ids == tokenizer.encode(question + choice).tolist()
        else:
            assert ids == [vocabulary["</s>"], *tokenizer.encode(question + choice).tolist()]
        assert encode(tokenizer, Question(question, choice, choice, 0)).merged == merged
        mean = log_likelihoods(model, [encoded], batch_size=2)[0, 0]
        assert mean == pytest.approx(log_p_of_last(theirs, ids, len(expected)), rel=1e-4)


@pytest.mark.parametrize("bos", [None, 0])
def test_scores_are_those_of_lm_evaluation_harness(bpe, monkeypatch, bos):
    """Text cut at any character, in batches, some of it too long for the model. Where nothing merges the tokens are
    those of the harness's `_encode_pair`; where something does, all of the choice is in the tokens that are scored."""
    tokenizer, model, theirs = bpe
    monkeypatch.setattr(tokenizer, "bos", bos, raising=False)
    rng = random.Random(1)
    text = " ".join(rng.choice(SENTENCES) for _ in range(200))
    questions = []
    for _ in range(60):
        start, length = rng.randrange(len(text) - 300), rng.randrange(1, 200)
        end = start + length
        choices = (text[end : end + rng.randrange(1, 60)] for _ in range(2))
        questions.append(Question(text[start:end], *choices, 0))
    encoded = [encode(tokenizer, q) for q in questions]
    means = log_likelihoods(model, encoded, batch_size=7)
    lengths, merges = set(), 0
    for q, asked, of_question in zip(questions, encoded, means):
        merged = False
        for choice, (ids, scored), mean in zip((q.choice1, q.choice2), asked.choices, of_question):
            spaces = q.question[len(q.question.rstrip()) :]
            context, continuation = q.question[: len(q.question) - len(spaces)], spaces + choice
            whole, own = (tokenizer.encode(x).tolist() for x in (context + continuation, context))
            if whole[: len(own)] == own:
                assert scored == len(whole) - len(own)
            else:
                merged = True
                assert tokenizer.decode(ids[-scored:]).endswith(continuation)
            prefix = [bos] if bos is not None else [tokenizer.eot] if scored == len(whole) else []
            assert ids == prefix + whole
            lengths.add(len(ids))
            assert mean == pytest.approx(log_p_of_last(theirs, ids, min(scored, 24)), rel=1e-4)
        assert asked.merged == merged
        merges += merged
    assert 5 < merges < 55 and min(lengths) < 24 < 30 < max(lengths)


def test_a_choice_without_tokens_is_refused(bpe):
    class Strips:
        """A tokenizer that drops white space."""

        bos, eot = None, 256

        def encode(self, text):
            return np.frombuffer(text.strip().encode(), np.uint8).astype(int)

    with pytest.raises(ValueError, match="makes no token of the choice ' '"):
        encode(Strips(), Question("a", "b", " ", 0))


def test_accuracy_and_its_error():
    questions = [Question("q", "a", "b", label) for label in (0, 0, 1, 1)]
    questions = [encode(load_tokenizer("byte"), q) for q in questions]
    result = accuracy(np.array([[2.0, 1.0], [0.0, 1.0], [0.0, 1.0], [-5.0, -1.0]]), questions)
    assert result["accuracy"] == 0.75 and result["answers"] == [0, 1, 1, 1]
    assert result["standard_error"] == pytest.approx((0.75 * 0.25 / 4) ** 0.5)


def test_the_error_of_an_average():
    """Of independent domains: the root of the sum of squares, by their number."""
    rows = {
        name: {"accuracy": a, "standard_error": e}
        for name, a, e in (("a", 0.7, 0.03), ("b", 0.6, 0.04), ("c", 0.5, 0.0))
    }
    assert average(rows) == pytest.approx({"accuracy": 0.6, "standard_error": 0.05 / 3})


def test_a_model_that_is_broken_gets_no_accuracy(tiny_data):
    """NaN would be an answer like any other: about half of these would be right."""
    model = random_llama(LlamaConfig(257, 1, 16, 1, 1, 16, 16, 256))
    with torch.no_grad():
        model.norm.weight.fill_(torch.inf)
    questions = make_questions(TokenData(tiny_data), load_tokenizer("byte"), "sums", "train", 4, seed=0)
    asked = {"sums": [encode(load_tokenizer("byte"), q) for q in questions]}
    with pytest.raises(FloatingPointError, match="broken: a likelihood of domain 'sums' is not finite"):
        answer({"broken": model}, asked, 4, nullcontext)


def test_files_of_questions(tmp_path):
    questions = [Question("naïve 日本\n", " a", "b\u2028", 0), Question("", "c", "d", 1)]
    write_questions(tmp_path / "q.jsonl", questions)
    assert read_questions(tmp_path / "q.jsonl") == questions
    one_based = [json.dumps(q._asdict() | {"label": q.label + 1, "source": "x"}) for q in questions]
    (tmp_path / "one.jsonl").write_text("\n".join(one_based))
    assert read_questions(tmp_path / "one.jsonl") == questions
    for label, ours in ((0, 0), (2, 1)):  # labels that can be read in one way only
        (tmp_path / "same.jsonl").write_text(json.dumps(questions[0]._asdict() | {"label": label}))
        assert read_questions(tmp_path / "same.jsonl") == [questions[0]._replace(label=ours)]
    for text, words in (
        ('{"question": "a", "choice1": "b", "label": 0}', "bad.jsonl:1: .*choice2"),
        ('\n{"question": "a", "choice1": "b", "choice2": "", "label": 0}', "bad.jsonl:2: .*length >= 1.*choice2"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": 3}', "bad.jsonl:1: .*<= 2.*label"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": 0.9}', "bad.jsonl:1: .*`int`.*label"),
        ('{"question": "a", "choice1": "b", "choice2": "c", "label": Infinity}', "bad.jsonl:1: .*malformed"),
        ('{"question": "a", "choice1": "\\ud800", "choice2": "c", "label": 0}', "bad.jsonl:1: not a question"),
        ("[" * 100_000, "bad.jsonl:1: not a question"),
        (
            '{"question": "a", "choice1": "b", "choice2": "c", "label": 1}\n' * 2,
            "all labels are 1, .* swap the choices",
        ),
        ("", "labels must be"),
    ):
        (tmp_path / "bad.jsonl").write_text(text)
        with pytest.raises(ValueError, match=words):
            read_questions(tmp_path / "bad.jsonl")


def test_a_domain_cannot_name_a_file_elsewhere(tmp_path):
    questions = [Question("q", "a", "b", 0)]
    write_all(tmp_path / "q", {"../../evil": questions, "a/b": questions, "é": questions}, [])
    assert sorted(file.name for file in tmp_path.rglob("*.jsonl")) == [
        "%2E.%2F..%2Fevil.jsonl",
        "a%2Fb.jsonl",
        "é.jsonl",
    ]
    assert read_questions(tmp_path / "q" / "a%2Fb.jsonl") == questions
    (tmp_path / "bom.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "q" / "é.jsonl").read_bytes())
    assert read_questions(tmp_path / "bom.jsonl") == questions


def test_what_is_written_can_be_read(tiny_data, tmp_path):
    """A single question, too, whose label must not be 1; and those of a file in which each second choice is true."""
    data, tokenizer = TokenData(tiny_data, ["sums"]), load_tokenizer("byte")
    text = tokenizer.decode(data.tokens("sums", "train"))
    for seed in range(6):
        asked = make_or_read(data, tokenizer, "train", 1, seed, None)
        write_all(tmp_path, asked, [])
        assert read_questions(tmp_path / "sums.jsonl") == asked["sums"]
        assert asked["sums"][0].question + asked["sums"][0].choice1 in text
    (tmp_path / "q.jsonl").write_text('{"question": "a", "choice1": "b", "choice2": "c", "label": 2}\n' * 2)
    asked = make_or_read(data, tokenizer, "train", 1, 0, [str(tmp_path / "q.jsonl")])
    write_all(tmp_path / "again", asked, [])
    assert read_questions(tmp_path / "again" / "q.jsonl") == asked["q"]
    assert [(q.choice1, q.choice2)[q.label] for q in asked["q"]] == ["c", "c"]


def test_the_command(chain, tiny_data, tmp_path, monkeypatch, capsys):
    models = [chain[0]["pretrain"], chain[0]["prune"]]
    args = [*models, f"--data={tiny_data}"]
    # a window of 64 tokens is too short for the model of the tests to see a whole question: it still beats chance
    assert (
        run(
            *(monkeypatch, *args, "--split=train", "--sequences=30", "--continuation", f"--json={tmp_path / 'a.json'}"),
            *("--write_questions", tmp_path),
        )
        == 0
    )
    table, report = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    assert report["split"] == "train"
    first = report["models"]
    rows = first[str(models[0])]
    assert rows["domains"]["sums"]["questions"] == 30 and rows["average"]["accuracy"] > 0.5
    assert rows["average"]["accuracy"] == pytest.approx(np.mean([d["accuracy"] for d in rows["domains"].values()]))
    assert "questions: animals 30, brackets 30, sums 30" in table and "overlap" not in table
    assert "the tokenizer merges" not in table and rows["domains"]["sums"]["merged"] == 0
    assert f"{100 * rows['average']['accuracy']:.1f} ± {100 * rows['average']['standard_error']:.1f}" in table
    files = sorted(tmp_path.glob("*.jsonl"))
    assert [f.stem for f in files] == TokenData(tiny_data).domains
    assert run(monkeypatch, *args, "--questions", *files, f"--json={tmp_path / 'b.json'}") == 0
    assert json.loads((tmp_path / "b.json").read_text()) == report | {"split": None}  # the questions are of no split
    capsys.readouterr()
    assert run(monkeypatch, *args, "--questions", tmp_path / "none.jsonl") == 2
    assert "none.jsonl" in capsys.readouterr().err
    assert run(monkeypatch, *args, "--questions", files[0], files[0]) == 2
    assert "two files of one name" in capsys.readouterr().err
