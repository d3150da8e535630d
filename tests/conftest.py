"""What the tests share: a small data set whose domains can be learned, built by prepare_data itself."""

import gzip
import json
import random
import sys
from pathlib import Path

import pytest

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
    """`folder` with one sub-folder a domain, each of `n_documents` .txt files."""
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
def upstream() -> dict:
    """Numbers printed by the paper's published code, in float64: inputs and outputs only (tests/README.md)."""
    return json.loads(gzip.decompress((Path(__file__).parent / "upstream_values.json.gz").read_bytes()))
