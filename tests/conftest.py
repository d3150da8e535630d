"""What the tests share: a small data set whose domains can be learned, built by prepare_data itself."""

import gzip
import json
import random
import shutil
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from plumbing.data import TokenData

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def grammar_text(domain: str, n_bytes: int, rng: random.Random) -> str:
    """About `n_bytes` of one of three little languages: their letters, lengths and rules all differ."""
    lines, size = [], 0
    while size < n_bytes:
        if domain == "animals":  # word order and agreement
            number, end = rng.choice([("one", ""), ("two", "s"), ("ten", "s")])
            noun, verb = rng.choice(["cat", "dog", "owl", "fox"]), rng.choice(["see", "eat", "like"])
            food = rng.choice(["fish", "mice", "the moon"])
            line = f"{number} {noun}{end} {verb}{'' if end else 's'} {food} .\n"
        elif domain == "sums":  # a correct one-digit sum: half of each line follows from the rest
            a, b = rng.randrange(10), rng.randrange(10)
            line = f"{a}+{b}={a + b};" + ("\n" if rng.random() < 0.2 else "")
        else:  # brackets that close in the right order
            line, open_brackets = "", []
            while len(line) < 60 and (open_brackets or not line):
                if len(open_brackets) < 6 and (not open_brackets or rng.random() < 0.5):
                    line += (bracket := rng.choice("([{<"))
                    open_brackets.append(bracket)
                else:
                    line += dict(zip("([{<", ")]}>", strict=True))[open_brackets.pop()]
            line += "\n"
        lines.append(line)
        size += len(line)
    return "".join(lines)


DOMAINS = ("animals", "brackets", "sums")


def write_corpus(folder: Path, n_bytes: int = 150_000, n_documents: int = 150, seed: int = 0) -> Path:
    """`folder` with one sub-folder per domain, each of `n_documents` .txt files."""
    for domain in DOMAINS:
        rng = random.Random(f"{seed} {domain}")
        (folder / domain).mkdir(parents=True)
        for i in range(n_documents):
            text = grammar_text(domain, n_bytes // n_documents, rng)
            (folder / domain / f"{i:04d}.txt").write_text(text, encoding="utf-8", newline="")
    return folder


@pytest.fixture(scope="session")
def tiny_corpus(tmp_path_factory) -> Path:
    """A folder of text: three domains, 150 documents of 1 KB each."""
    return write_corpus(tmp_path_factory.mktemp("corpus") / "tiny")


@pytest.fixture(scope="session")
def tiny_data(tiny_corpus, tmp_path_factory) -> Path:
    """`tiny_corpus` prepared: byte tokenizer, 150 KB a domain, a tenth of it held out in windows of 128 tokens."""
    from prepare_data import prepare

    out = tmp_path_factory.mktemp("data") / "tiny"
    prepare(str(tiny_corpus), out, window=128, held_out=0.1)
    return out


@pytest.fixture(scope="session")
def bpe_file(tmp_path_factory) -> Path:
    """A byte-level BPE of the tokenizers library, like GPT-2's; its eot is named by a tokenizer_config.json."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("bpe")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|pad|>", "<|endoftext|>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["one cat likes the moon, ten cats like fish. 日本語 👩"] * 20, trainer)
    bpe.enable_truncation(8)  # a file may carry this: it must not cut documents
    bpe.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    return folder / "tokenizer.json"


@pytest.fixture(scope="session")
def bos_file(bpe_file, tmp_path_factory) -> Path:
    """The same with a post-processor as Llama 3's, which puts a token before each text."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = tokenizers.Tokenizer.from_file(str(bpe_file))
    bpe.add_special_tokens(["<s>"])
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    path = tmp_path_factory.mktemp("bos") / "tokenizer.json"
    bpe.save(str(path))
    shutil.copy(bpe_file.parent / "tokenizer_config.json", path.parent)
    return path


@pytest.fixture(scope="session")
def upstream() -> dict:
    """Numbers printed by the paper's published code, in float64: inputs and outputs only (tests/README.md)."""
    return json.loads(gzip.decompress((Path(__file__).parent / "upstream_values.json.gz").read_bytes()))


# what makes a run of train.py take seconds
SHAPE = "--n_layer=3 --d_model=32 --n_head=4 --d_ffn=48 --seq_len=64 --batch_size=4 --lr=3e-3 --threads=1".split()
SHAPE += "--eval_sequences=4 --eval_interval=10 --log_interval=5 --save_interval=10".split()
TARGET = "--target_n_layer=2 --target_d_model=24 --target_n_head=2 --target_d_ffn=32".split()
GATES = "--gate_lr=1.0 --multiplier_lr=0.1 --log_alpha=3.0 --phi=200.0 --sparsity_warmup=20".split()
ROBUST = "--schedule=dro --dynamic_reference=True --dynamic_ratio=True --eval_interval=2".split()


def call(monkeypatch, main, *argv):
    """A command in this process, by its main, its name and its arguments; its exit status."""
    monkeypatch.setattr(sys, "argv", [*map(str, argv)])
    handlers = {s: signal.getsignal(s) for s in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        main()
        return 0
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(monkeypatch, *args):
    """train.py with the shape that makes it take seconds, in this process; its exit status."""
    return call(monkeypatch, train.main, "train.py", *SHAPE, *args)


def metrics(out: Path, kind=None) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind is None or line["type"] == kind]


def with_labels(data: TokenData, domain: str, split: str, seq_len: int, n: int = 0) -> tuple:
    """Evenly spread sequences (n, T+1) as transformers takes them, and their labels. The first token of a held-out
    window is -100 there: it does not count."""
    stream = data.tokens(domain, split).astype(np.int64)
    labels = stream.copy()
    if split != "train":
        labels[:: data.meta["window"]] = -100
    total = (len(stream) - 1) // seq_len
    n = min(n, total) or total
    rows = [slice(i * seq_len, (i + 1) * seq_len + 1) for i in np.arange(n) * total // n]
    return tuple(torch.from_numpy(np.stack([x[row] for row in rows])) for x in (stream, labels))


@pytest.fixture(scope="session")
def chain(tiny_data, tmp_path_factory):
    """out directories of the three stages, each a short run: pretrain 60, prune 60, continue 40 steps."""
    top, patch = tmp_path_factory.mktemp("chain"), pytest.MonkeyPatch()
    out = {stage: top / stage for stage in ("pretrain", "prune", "continue")}
    common = {stage: [f"--data={tiny_data}", f"--out={out[stage]}"] for stage in out}
    args = {
        "pretrain": [*common["pretrain"], "--steps=60"],
        "prune": [*common["prune"], "--steps=60", f"--init_from={out['pretrain']}", *TARGET, *GATES, *ROBUST,
                  f"--reference_model={out['pretrain']}", "--gate_samples=2"],
        "continue": [*common["continue"], "--steps=40", f"--init_from={out['prune']}", *ROBUST],
    }  # fmt: skip
    assert [run(patch, *args[stage]) for stage in out] == [0, 0, 0]
    patch.undo()
    return out, args
