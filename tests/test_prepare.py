"""prepare_data.py: what is on disk is the text, and what is not used is said."""

import base64
import gzip
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT

import prepare_data
from plumbing import documents, shared, tokenizer
from plumbing.command_line import load
from plumbing.data import BatchReader
from plumbing.dataset import SPLITS, TokenData
from plumbing.documents import read_file
from plumbing.folder import File
from plumbing.left_out import LeftOut
from plumbing.settings import Settings
from plumbing.shared import SharedText, sample_stretches
from plumbing.tokenizer import load_tokenizer
from plumbing.writer import DataWriter, Encoded, whole_or_nothing
from prepare_data import prepare


@pytest.fixture
def command(monkeypatch, capsys):
    """prepare_data.py in this process, as a function: its exit status, and what it prints on stdout and stderr."""

    def run(*args) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        capsys.readouterr()
        try:
            prepare_data.main()
            status = 0
        except SystemExit as end:
            status = end.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return status, *capsys.readouterr()

    return run


def documents_of(data: TokenData, domain: str, split: str) -> list[bytes]:
    """Byte-tokenized documents of a split, cut at the eots without any help from prepare_data."""
    ids = np.asarray(data.tokens(domain, split)).astype(int)
    parts = np.split(ids, np.flatnonzero(ids == 256) + 1)
    return [bytes(part[part != 256].tolist()) for part in parts if len(part)]


# --- text -> tokens on disk ---------------------------------------------------------------------------------------


def test_every_document_once_in_train_or_in_the_pool(tiny_corpus, tiny_data):
    data = TokenData(tiny_data)
    for domain in data.domains:
        texts = {path.read_bytes() for path in (tiny_corpus / domain).iterdir()}
        train = documents_of(data, domain, "train")
        assert len(train) == len(set(train)) and set(train) <= texts
        val, test = (np.asarray(data.tokens(domain, split)) for split in ("val", "test"))
        assert len(val) % 128 == len(test) % 128 == 0 and len(val) - len(test) in (0, 128)
        # val and test windows in turn give the pool back: whole documents, none of them a train document
        pool, windows = [], {"val": val.reshape(-1, 128), "test": test.reshape(-1, 128)}
        for i in range(len(windows["val"])):
            pool += [windows[split][i] for split in ("val", "test") if i < len(windows[split])]
        pool = np.concatenate(pool)
        documents = b"".join(bytes([t]) if t < 256 else b"|eot|" for t in pool.tolist()).split(b"|eot|")
        *whole, cut = documents
        assert whole and set(whole) <= texts and set(whole).isdisjoint(train)
        missing = texts - set(train) - set(whole)  # the one whose end does not fill a window
        assert len(missing) <= 1 and all(text.startswith(cut) for text in missing)
        assert abs(len(texts - set(train)) / len(texts) - 0.1) < 0.08  # 150 documents, a tenth held out


def test_counts_give_bits_per_byte(tiny_corpus, bpe_file, tmp_path):
    corpus = tmp_path / "corpus"
    rng = random.Random(3)
    for domain, words in (("ascii", ["one", "cat", "likes"]), ("wide", ["日本語", "👩‍👧", "é", "moon"])):
        (corpus / domain).mkdir(parents=True)
        for i in range(60):
            (corpus / domain / f"{i}.txt").write_text(" ".join(rng.choices(words, k=120)), encoding="utf-8")
    prepare(str(corpus), tmp_path / "byte", held_out=0.2, window=64)
    prepare(str(corpus), tmp_path / "bpe", tokenizer=str(bpe_file), held_out=0.2, window=64)
    for data in map(TokenData, (tmp_path / "byte", tmp_path / "bpe")):
        tokenizer = load_tokenizer(data.tokenizer)
        for domain in data.domains:
            for split in SPLITS:
                ids, counts = np.asarray(data.tokens(domain, split)), data.meta["domains"][domain][split]
                assert counts["tokens"] == len(ids) and counts["documents"] == (ids == data.eot).sum()
                if data.tokenizer == "byte":
                    assert counts["bytes"] == (ids != data.eot).sum()
                elif split == "train":
                    text = tokenizer.decode(ids[ids != data.eot])
                    assert counts["bytes"] == len(text.encode())
                assert data.bytes_per_token(domain, split) == counts["bytes"] / len(ids)
    # a window may cut a character, whose bytes then belong to one of the two tokens: 3 bytes per window at most
    byte, bpe = TokenData(tmp_path / "byte"), TokenData(tmp_path / "bpe")
    for split in ("val", "test"):
        ids = np.asarray(bpe.tokens("wide", split))
        table = {i: len(bytes_of(t)) for t, i in json.loads(bpe_file.read_text())["model"]["vocab"].items()}
        true = sum(table[i] for i in ids.tolist() if i != bpe.eot)
        assert abs(bpe.meta["domains"]["wide"][split]["bytes"] - true) <= 3 * len(ids) / 64
    for domain in byte.domains:  # the same documents, so the same bytes, in fewer tokens
        one, other = (data.meta["domains"][domain]["train"] for data in (byte, bpe))
        assert one["bytes"] == other["bytes"] and one["tokens"] > other["tokens"]


def test_bos_starts_each_document(bpe_file, bos_file, tmp_path):
    """With bos the data are those without it and one token more before each document, which stands for no text."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    texts = [f"the moon {i} likes cats " * 9 for i in range(100)]
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl(texts))
    plain, data = (tmp_path / "plain", tmp_path / "bos")
    prepare(str(tmp_path / "c"), plain, str(bpe_file), window=16, held_out=0.2)
    prepare(str(tmp_path / "c"), data, str(bos_file), window=16, held_out=0.2)
    plain, data = TokenData(plain), TokenData(data)
    tokenizer = load_tokenizer(str(bos_file))
    assert (plain.bos, plain.meta["bos"]) == (None, None)
    assert data.bos == data.meta["bos"] == tokenizer.bos
    ids = data.tokens("d", "train")
    documents = np.split(ids, np.flatnonzero(ids == data.eot) + 1)[:-1]
    assert {tuple(d) for d in documents} <= {(data.bos, *tokenizer.encode(t), data.eot) for t in texts}
    assert ids[ids != data.bos].tolist() == plain.tokens("d", "train").tolist()
    train = [x.meta["domains"]["d"]["train"] for x in (plain, data)]
    assert train[1]["tokens"] == train[0]["tokens"] + train[0]["documents"]
    assert train[1]["bytes"] == train[0]["bytes"] and train[1]["documents"] == train[0]["documents"]
    windows = [data.tokens("d", split).reshape(-1, 16) for split in ("val", "test")]
    pool = np.concatenate([w[i] for i in range(len(windows[0])) for w in windows if i < len(w)])
    starts = np.flatnonzero(pool == data.bos)
    assert len(starts) > 10 and starts[0] == 0 and (pool[starts[1:] - 1] == data.eot).all()
    held = sum(data.meta["domains"]["d"][split]["bytes"] for split in ("val", "test"))
    text = tokenizer.decode(pool[(pool != data.bos) & (pool != data.eot)])
    assert held == len(text.encode())


def test_bos_that_is_eot_stands_once_between_documents(bos_file, tmp_path):
    """As OPT has it: the token that ends a document starts the next."""
    shutil.copytree(bos_file.parent, tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": "<s>"}')
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl(texts_for("x")))
    prepare(str(tmp_path / "c"), tmp_path / "out", str(tmp_path / "tokenizer"), window=16, held_out=0.2)
    data = TokenData(tmp_path / "out")
    ends = np.flatnonzero(data.tokens("d", "train") == data.eot)
    assert data.bos == data.eot and np.diff(ends).min() > 1
    assert data.meta["domains"]["d"]["train"]["documents"] == len(ends) < 80


def bytes_of(token: str) -> bytes:
    """GPT-2's byte alphabet, from its definition: printable Latin-1 stands for itself, the rest follows from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in printable]
    table = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}
    return bytes(table.get(c, 0) for c in token)


def jsonl(texts: list[str], source: str | int | None = None) -> bytes:
    lines = [{"text": t} | ({"meta": {"set": source}} if source else {}) for t in texts]
    return "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines)).encode()


def texts_for(name: str, n: int = 80) -> list[str]:
    rng = random.Random(name)
    return [f"{name} {i} \u2028 日 " + " ".join(rng.choices(["a", "bb", "ccc"], k=60)) for i in range(n)]


def test_every_format_reads_the_same(tmp_path):
    """.txt, .jsonl, .gz, .zst (in two frames), .json, .parquet and --domain_field give the same documents."""
    zstandard = pytest.importorskip("zstandard")
    texts, domains, sorted_documents = texts_for("x"), ("txt", "plain", "gz", "zst", "json", "list", "parquet"), {}
    try:
        import pyarrow.parquet
    except ImportError:
        domains = domains[:-1]
    for domain in domains:
        folder = tmp_path / domain / "only" / "deep"
        folder.mkdir(parents=True)
        if domain == "txt":
            for i, text in enumerate(texts):
                (folder / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
        half = jsonl(texts[:40]), jsonl(texts[40:] + texts[:3] + ["", " \n"])  # with duplicates and empty documents
        if domain == "plain":
            (folder / "a.jsonl").write_bytes(b"\n".join(half))  # with an empty line
        if domain == "gz":
            (folder / "a.jsonl.gz").write_bytes(gzip.compress(half[0]) + gzip.compress(half[1]))
        if domain == "zst":
            (folder / "a.jsonl.zst").write_bytes(zstandard.compress(half[0]) + zstandard.compress(half[1]))
        if domain == "json":
            (folder / "a.json").write_bytes(half[0])
            (folder / "b.json.gz").write_bytes(gzip.compress(half[1]))
        if domain == "list":  # on one line, and on many
            lists = [[json.loads(line) for line in lines.splitlines()] for lines in half]
            (folder / "a.json").write_text(json.dumps(lists[0]))
            (folder / "b.json.zst").write_bytes(zstandard.compress(json.dumps(lists[1], indent=2).encode()))
        if domain == "parquet":
            rows = {"text": [json.loads(line)["text"] for lines in half for line in lines.splitlines()]}
            table = pyarrow.table(rows | {"id": list(range(len(rows["text"])))})
            pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=30)
        prepare(str(tmp_path / domain), tmp_path / "out" / domain, window=32, held_out=0.1)
    field = tmp_path / "field"
    field.mkdir()
    (field / "b.jsonl").write_bytes(jsonl(texts, "Red/Pajama: Git") + jsonl(texts_for("y"), "wiki"))
    prepare(str(field), tmp_path / "out" / "field", window=32, held_out=0.1, domain_field="meta.set")
    assert TokenData(tmp_path / "out" / "field").domains == ["Red/Pajama: Git", "wiki"]
    for name, domain in [*((d, "only") for d in domains), ("field", "Red/Pajama: Git")]:
        data = TokenData(tmp_path / "out" / name)
        sorted_documents[name] = sorted(documents_of(data, domain, "train"))
        assert len(sorted_documents[name]) > 60
        assert {t.decode() for t in sorted_documents[name]} < set(texts)
    assert all(documents == sorted_documents["txt"] for documents in sorted_documents.values())


def test_duplicates_go_unique_documents_stay(tmp_path, monkeypatch):
    """The fixed table may miss a duplicate, but never takes one text for another, however full it is."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    unique = [f"document {i} " + "z" * 20 for i in range(3000)]
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl(unique + unique[::2]))
    kept = {}
    for slots in (prepare_data.SEEN_SLOTS, 64):
        monkeypatch.setattr(prepare_data, "SEEN_SLOTS", slots)
        prepare(str(tmp_path / "c"), tmp_path / str(slots), window=16)
        kept[slots] = documents_of(TokenData(tmp_path / str(slots)), "d", "train")
    large, small = kept.values()
    assert set(large) == set(small) and 2700 < len(set(large)) <= len(large) <= len(set(large)) + 5
    assert len(small) > len(large) + 1000


def test_a_text_of_two_domains_is_of_the_one_that_is_read_first(tmp_path):
    for domain in ("a", "b"):
        (tmp_path / "c" / domain).mkdir(parents=True)
        (tmp_path / "c" / domain / "x.jsonl").write_bytes(jsonl(texts_for("both") + texts_for(domain)))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=16, held_out=0.1)
    data, both = TokenData(tmp_path / "out"), {text.encode() for text in texts_for("both")}
    train = {domain: documents_of(data, domain, "train") for domain in data.domains}
    first, second = sorted(train.values(), key=lambda found: -len(both.intersection(found)))
    assert len(both.intersection(first)) > 60 and not both.intersection(second) and len(second) > 60


def test_surrogates_and_broken_utf8(tmp_path, capsys):
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(
        b'{"text": "half \\ud83d pair \\ud83d\\ude00"}\n' + jsonl(texts_for("q"))
    )
    (tmp_path / "c" / "d" / "b.txt").write_bytes(b"latin \xe9 caf\xc3\xa9")
    (tmp_path / "c" / "d" / "C.TXT").write_bytes(b"\xef\xbb\xbflatin \xe9 caf\xc3\xa9")  # the same, with a mark
    (tmp_path / "c" / "d" / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["marked"]))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=16, held_out=0.1)
    out = capsys.readouterr().out
    assert "2 documents have bytes that are no UTF-8, or half a character: U+FFFD or ?" in out
    data = TokenData(tmp_path / "out")
    everything = b"".join(documents_of(data, "d", "train"))
    assert "half ? pair 😀".encode() in everything and everything.count("latin \ufffd café".encode()) == 1
    assert b"marked" in everything


def test_vocabulary_beyond_16_bits(tmp_path, tiny_corpus):
    import tokenizers

    words = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000, "<unk>": 70_001}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "c" / "d").mkdir(parents=True)
    rng = random.Random(0)
    numbers = [[rng.randrange(70_000) for _ in range(40)] for _ in range(50)]
    lines = jsonl([" ".join(f"w{n}" for n in row) for row in numbers])
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(lines)
    prepare(str(tmp_path / "c"), tmp_path / "out", str(tmp_path / "tokenizer.json"), window=16, held_out=0.1)
    data = TokenData(tmp_path / "out")
    assert (data.meta["dtype"], data.vocab_size, data.eot) == ("uint32", 70_002, 70_000)
    raw = np.frombuffer((tmp_path / "out" / "d" / "train.bin").read_bytes(), "<u4").reshape(-1, 41)
    assert (raw[:, -1] == 70_000).all() and raw[:, :-1].tolist() == [n for n in numbers if n in raw[:, :-1].tolist()]
    assert raw.max() > 2**16


def test_workers_and_seed(tiny_corpus, tiny_data, tmp_path, monkeypatch):
    """Two processes write what one writes, byte for byte; another seed splits differently."""
    small = prepare_data.batches
    monkeypatch.setattr(prepare_data, "batches", lambda documents: small(documents, 20_000))  # many batches
    prepare(str(tiny_corpus), tmp_path / "two", window=128, held_out=0.1, workers=2)
    names = sorted(p.relative_to(tiny_data) for p in tiny_data.rglob("*") if p.is_file())
    assert len(names) == 10
    for name in names:
        assert (tiny_data / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    prepare(str(tiny_corpus), tmp_path / "seed", window=128, held_out=0.1, seed=1)
    trains = [set(documents_of(TokenData(path), "sums", "train")) for path in (tiny_data, tmp_path / "seed")]
    assert trains[0] - trains[1] and trains[1] - trains[0]


def test_max_mb_is_a_limit_a_domain(tiny_corpus, tmp_path):
    prepare(str(tiny_corpus), tmp_path / "out", window=64, held_out=0.2, max_mb=0.05)
    data = TokenData(tmp_path / "out")
    for domain in data.domains:
        size = sum(data.meta["domains"][domain][split]["bytes"] for split in SPLITS)
        assert 45_000 < size < 53_000
        # a choice by seed, not the first by name
        first = {p.read_bytes() for p in sorted((tiny_corpus / domain).iterdir())[:60]}
        assert set(documents_of(data, domain, "train")) - first


def test_max_mb_counts_bytes(tmp_path):
    """A Chinese character has three."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl([f"{i} " + "日" * 300 for i in range(200)]))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.2, max_mb=0.05)
    assert 49_000 < sum(facts["bytes"] for facts in TokenData(tmp_path / "out").meta["domains"]["d"].values()) < 51_000


def test_max_mb_ends_the_reading(tmp_path):
    """What comes after it in a file is not read, be it gigabytes or damaged."""
    for domain in ("a", "b"):
        (tmp_path / "c" / domain).mkdir(parents=True)
        lines, bad = jsonl([f"{domain} {i} a text " * 9 for i in range(500)]), b"no JSON\n" * 500
        (tmp_path / "c" / domain / "x.jsonl").write_bytes(lines + bad)
    with pytest.raises(ValueError, match="lines are bad"):
        prepare(str(tmp_path / "c"), tmp_path / "all", window=64, held_out=0.2)
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.2, max_mb=0.02)
    assert TokenData(tmp_path / "out").domains == ["a", "b"]


def test_nothing_half_written(tiny_corpus, tmp_path, monkeypatch):
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(self, *args, error=error):
            raise error

        monkeypatch.setattr(prepare_data.DataWriter, "add", fail)
        with pytest.raises(type(error)):
            prepare(str(tiny_corpus), tmp_path / "deep" / "out", window=128)
        assert list(tmp_path.iterdir()) == []  # nor the folders around it


def test_half_of_a_cut_document_is_no_empty_document(tmp_path):
    """Of a few letters all may go to one side."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    for i in range(10):
        (tmp_path / "c" / "d" / f"{i}.txt").write_text(f"Hi {i}\n")
    (tmp_path / "c" / "d" / "large.txt").write_text("".join(f"{i} a line of text\n" for i in range(20_000)))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=32, held_out=0.05)
    data = TokenData(tmp_path / "out")
    found = [text for split in SPLITS for text in documents_of(data, "d", split)]
    assert all(text.strip() for text in found) and sum(text.startswith(b"Hi") for text in found) == 10


def exact_shares(data: TokenData) -> dict[str, float]:
    """The share of each domain's held-out 100-byte stretches that stand in train, by looking each of them up."""
    train = {s for domain in data.domains for text in documents_of(data, domain, "train") for s in stretches(text)}
    shares = {}
    for domain in data.domains:
        windows = [np.asarray(data.tokens(domain, split)).astype(int) for split in ("val", "test")]
        windows = np.concatenate(windows).reshape(-1, data.meta["window"])
        parts = [part for window in windows for part in np.split(window, np.flatnonzero(window == 256))]
        held_out = [s for part in parts for s in stretches(bytes(part[part != 256].tolist()))]
        shares[domain] = np.mean([s in train for s in held_out])
    return shares


def stretches(text: bytes) -> list[bytes]:
    return [text[i : i + 100] for i in range(len(text) - 99)]


def write_near_duplicates(folder: Path) -> Path:
    """A folder of two domains of letters drawn at random; one has a licence with other names in half of its texts."""
    rng = random.Random(0)
    draw = [lambda n, letters=letters: "".join(rng.choices(letters, k=n)) for letters in ("abcd ef", "uvwx yz")]
    licence = [draw[0](400) for _ in range(3)]
    for domain in ("copied", "own"):
        (folder / domain).mkdir(parents=True)
    copied = [draw[0](1000) for _ in range(150)]
    copied += [f"{licence[0]} {draw[0](9)} {licence[1]} {draw[0](9)} {licence[2]}" for _ in range(150)]
    (folder / "copied" / "a.jsonl").write_bytes(jsonl(copied))
    (folder / "own" / "a.jsonl").write_bytes(jsonl([draw[1](2000) for _ in range(150)]))
    return folder


def test_shared_text_is_measured_and_dropped(tmp_path):
    """Copies with small changes are not equal, so they stand on both sides, unless they are dropped."""
    folder = write_near_duplicates(tmp_path / "c")
    prepare(str(folder), tmp_path / "as_is", window=128, held_out=0.2)
    prepare(str(folder), tmp_path / "dropped", window=128, held_out=0.2, drop_shared=True)
    as_is, dropped = TokenData(tmp_path / "as_is"), TokenData(tmp_path / "dropped")
    exact = exact_shares(as_is), exact_shares(dropped)
    assert 0.3 < exact[0]["copied"] < 0.7 and exact[1]["copied"] < 0.03
    assert as_is.meta["shared"] == pytest.approx(exact[0], abs=0.05)
    assert dropped.meta["shared"] == pytest.approx(exact[1], abs=0.05)
    for domain in dropped.domains:  # train is as it was, and what is not shared is still held out
        assert documents_of(as_is, domain, "train") == documents_of(dropped, domain, "train")
    assert as_is.tokens("own", "test").tolist() == dropped.tokens("own", "test").tolist()
    assert len(dropped.tokens("copied", "test")) > len(as_is.tokens("copied", "test")) / 3


def test_the_table_has_what_the_data_set_has(tmp_path):
    """A token of the byte tokenizer is a byte of text, or the end of a document."""
    prepare(str(write_near_duplicates(tmp_path / "c")), tmp_path / "d", window=128, held_out=0.11)
    data = TokenData(tmp_path / "d")
    titles, *lines = prepare_data.table(data).splitlines()
    assert titles.split() == ["domain", "documents", *SPLITS, "MB", "bytes/token", "shared"]
    for domain, line in zip(data.domains, lines, strict=True):
        sizes = [data.tokens(domain, split).size for split in SPLITS]
        ends = [int((np.asarray(data.tokens(domain, split)) == data.meta["eot"]).sum()) for split in SPLITS]
        text = [size - n for size, n in zip(sizes, ends)]
        assert len(set(sizes)) == len(set(ends)) == 3
        expected = [domain, f"{sum(ends):,}", *(f"{size:,}" for size in sizes)]
        share = f"{100 * data.meta['shared'][domain]:.1f}"
        assert line.split() == [*expected, f"{sum(text) / 1e6:.2f}", f"{text[0] / sizes[0]:.2f}", share, "%"]


def test_documents_too_short_to_be_judged_stay_held_out(tmp_path):
    (tmp_path / "c" / "d").mkdir(parents=True)
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ", k=80)) for _ in range(500)]
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl(texts))
    held_out = []
    for drop in (False, True):
        prepare(str(tmp_path / "c"), tmp_path / str(drop), window=64, held_out=0.2, drop_shared=drop)
        held_out.append(TokenData(tmp_path / str(drop)).tokens("d", "test").tolist())
    assert held_out[0] == held_out[1]


def test_memory_for_shared_text_is_constant(monkeypatch):
    """However few hashes are kept, the estimate is right; and each train text is known, in whatever order they come."""
    monkeypatch.setattr(shared, "MAX_HASHES", 20_000)
    rng = np.random.default_rng(0)
    texts = [rng.integers(97, 123, 5000, np.uint8).tobytes() for _ in range(600)]
    sample = SharedText()
    for i, text in enumerate(texts):
        sample.add("a", False, sample_stretches([text]))
        if i % 10 == 0:  # a third of it is train's
            sample.add(
                "a", True, sample_stretches([texts[-1 - i][:2000] + rng.integers(97, 123, 4000, np.uint8).tobytes()])
            )
        assert sample.count <= 20_000
    assert sample.limit < 2**64 // shared.SAMPLE  # it did not fit
    arrays = len(sample.train["a"])
    sample.add("a", False, sample_stretches([b"short"]))
    assert len(sample.train["a"]) == arrays
    assert sample.shares()["a"] == pytest.approx(1901 / 5901, abs=0.04)


def test_bytes_that_repeat_do_not_fill_the_sample(monkeypatch):
    """A file of zeros, or of one line again and again, leaves the other text's measure as it is."""
    monkeypatch.setattr(shared, "MAX_HASHES", 20_000)
    rng = np.random.default_rng(0)
    text = rng.integers(97, 123, 100_000, np.uint8).tobytes()
    sample = SharedText()
    sample.add("a", True, sample_stretches([text[:50_000] + bytes(1_000_000)]))
    for again in (text, bytes(1_000_000), *(bytes([c]) * 1_000_000 for c in b"B,x~"), b"0123456789\n" * 100_000):
        sample.add("a", False, sample_stretches([again]))
    assert sample.limit == 2**64 // shared.SAMPLE and sample.shares()["a"] > 0.99


def test_stretches_do_not_reach_into_the_next_document(monkeypatch):
    monkeypatch.setattr(shared, "SAMPLE", 1.0000001)
    rng = random.Random(0)
    texts = [rng.randbytes(n) for n in (0, 5, 99, 100, 101, 70_000, 1, 250, 0)]
    hashes = sample_stretches(texts)
    assert len(hashes) == sum(max(0, len(text) - 99) for text in texts) == len(set(hashes.tolist()))
    assert hashes.tolist() == np.concatenate([sample_stretches([text]) for text in texts]).tolist()
    assert len(sample_stretches([])) == len(sample_stretches([b"short", b""])) == 0


def test_installed_has_domains_enough(tmp_path):
    # with less text, a few odd documents decide: another Python, or another seed, has others
    prepare("installed", tmp_path / "out", window=128, held_out=0.2, max_mb=1.5)
    data = TokenData(tmp_path / "out")
    assert len(data.domains) >= 6
    assert max(data.meta["shared"].values()) < 0.03
    tokens = {d: np.asarray(data.tokens(d, "train")).astype(int) for d in data.domains}
    pairs = {d: np.bincount(t[:-1] * 257 + t[1:], minlength=257**2) + 1 for d, t in tokens.items()}
    for a in data.domains:  # each domain's own statistics of byte pairs code it better than any other's
        held = np.asarray(data.tokens(a, "val")).astype(int)
        costs = {
            b: -np.log(c[held[:-1] * 257 + held[1:]] / c.reshape(257, 257).sum(1)[held[:-1]]).mean()
            for b, c in pairs.items()
        }
        assert min(costs, key=costs.get) == a, (a, costs)


# --- text as people have it ---------------------------------------------------------------------------------------


def test_names_are_kept(command, tmp_path):
    """Any Unicode, whether a folder or a field has the name; the folder on disk is named alike."""
    names = ["C", "C++", "C#", "Objective-C++", "新闻_cn", "百科_cn", "新闻", "a/b", "..", "50 %", "7"]
    lines = [jsonl(texts_for(name), int(name) if name == "7" else name) for name in names]
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(b"".join(lines))
    args = [tmp_path / "c", "--window=64", "--held_out=0.2", "--workers=1", "--domain_field=meta.set"]
    status, out, _ = command(*args, "--out", tmp_path / "out")
    data = TokenData(tmp_path / "out")
    assert status == 0 and data.domains == sorted(names)
    for name in names:
        assert all(text.startswith(name.encode()) for text in documents_of(data, name, "train"))
        assert f"\n{name} " in out
    for name in names[:7]:
        (tmp_path / "f" / name).mkdir(parents=True)
        (tmp_path / "f" / name / "a.jsonl").write_bytes(jsonl(texts_for(name)))
    prepare(str(tmp_path / "f"), tmp_path / "folders", window=64, held_out=0.2)
    folders = TokenData(tmp_path / "folders")
    assert (
        folders.domains == sorted(names[:7]) == sorted(p.name for p in (tmp_path / "folders").iterdir() if p.is_dir())
    )
    assert documents_of(folders, "C#", "train") == documents_of(data, "C#", "train")
    assert command(*args, "--domains", "C#", "新闻", "--out", tmp_path / "two")[0] == 0
    assert TokenData(tmp_path / "two").domains == ["C#", "新闻"]
    assert command(*args, "--domains", "新闻", "C#", "--out", tmp_path / "two")[0] == 0  # already prepared
    status, _, error = command(tmp_path / "f", "--domains", "C$", "--out", tmp_path / "none")
    assert status == 2 and re.fullmatch(r"prepare_data.py: .*: no domain C\$, did you mean C.*\?\n", error)


def test_two_domains_with_one_folder(tmp_path, monkeypatch):
    """As on a file system that does not tell C from c."""
    monkeypatch.setattr("plumbing.writer.folder_of", str.lower)
    (tmp_path / "a.jsonl").write_bytes(jsonl(texts_for("C"), "C") + jsonl(texts_for("c"), "c"))
    with pytest.raises(ValueError, match="on this file system, another domain has the folder c"):
        prepare(str(tmp_path), tmp_path / "out", domain_field="meta.set")


def test_what_is_left_out_is_said(tmp_path, capsys):
    folder = tmp_path / "c"
    (folder / "d" / "deep").mkdir(parents=True)
    (folder / "d" / "deep" / "a.jsonl").write_bytes(jsonl(texts_for("x")))
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "b.jsonl").write_bytes(jsonl(texts_for("y")))
    (folder / "d" / "linked").symlink_to(other)
    (folder / "d" / "again").symlink_to(other)
    (other / "loop").symlink_to(folder / "d")
    (folder / "d" / "self").symlink_to("self")
    (folder / "d" / "gone.jsonl").symlink_to("nowhere")
    for name in ("._a.jsonl", ".DS_Store", "README.md", "data.csv", "more.csv", "a.jsonl.xz"):
        (folder / "d" / name).write_bytes(b"\x00\x05\x16\x07")
    (folder / "d" / "info.json").write_text(json.dumps({"rows": 80}, indent=1))
    (folder / "d" / "line.json").write_text(json.dumps({"rows": 80}))
    for name in ("__MACOSX", ".git", "d/__MACOSX", "pictures"):
        (folder / name).mkdir()
        (folder / name / "x.jsonl").write_bytes(jsonl(["hidden"] if name != "pictures" else []))
    (folder / "stray.jsonl").write_bytes(jsonl(["in no sub-folder"]))
    prepare(str(folder), tmp_path / "out", window=64, held_out=0.2)
    out = capsys.readouterr().out
    for line in (
        "5 hidden files and folders, as ",
        "2 links that lead nowhere, and what else is no file, as ",
        "1 .md files, as ",
        "2 .csv files, as ",
        "1 .xz files, as ",
        "2 .json files of one object without a text, as ",
        "1 files that are in no sub-folder, as ",
    ):
        assert f"left out: {line}" in out
    assert "domain pictures: left out, it has 0 train, 0 val and 0 test tokens; of each, more than one window" in out
    data = TokenData(tmp_path / "out")
    assert data.domains == ["d"]
    train = documents_of(data, "d", "train")
    assert {text[:1] for text in train} == {b"x", b"y"} and len(set(train)) == len(train) > 110
    (folder / "d" / "b.txt").write_text("text")
    (folder / "d" / "deep" / "a.jsonl").write_bytes(jsonl(texts_for("x"), "x"))
    (other / "b.jsonl").write_bytes(jsonl(texts_for("y"), "y"))
    for name in ("d/gone.jsonl", "pictures/x.jsonl", "stray.jsonl", "d/info.json", "d/line.json"):
        (folder / name).unlink()
    prepare(str(folder), tmp_path / "field", window=64, held_out=0.2, domain_field="meta.set")
    assert "left out: 1 .txt files, which name no domain, as " in capsys.readouterr().out
    assert TokenData(tmp_path / "field").domains == ["x", "y"]


@pytest.mark.parametrize("files, size", [(1, 300_000), (3, 40_000)])
def test_a_domain_of_few_files_is_cut(tmp_path, files, size, monkeypatch):
    """The layout of nanoGPT. Each piece gives its end to the held-out text, from the start of a line on."""
    monkeypatch.setattr(documents, "PIECE", 100_000)
    (tmp_path / "c" / "d").mkdir(parents=True)
    rng, texts = random.Random(0), []
    for i in range(files):
        lines = []
        while sum(map(len, lines)) < size:
            lines.append(" ".join(rng.choices(["eins", "zwei", "drüben"], k=20)) + "\n")
        texts.append("".join(lines))
        (tmp_path / "c" / "d" / f"{i}.txt").write_text(texts[-1], encoding="utf-8", newline="")
    prepare(str(tmp_path / "c"), tmp_path / "out", window=256, held_out=0.2)
    data = TokenData(tmp_path / "out")
    counts = data.meta["domains"]["d"]
    sizes = {split: counts[split]["bytes"] for split in SPLITS}
    assert abs((sizes["val"] + sizes["test"]) / sum(sizes.values()) - 0.2) < 0.01
    pieces = documents_of(data, "d", "train")
    assert len(pieces) == 3
    windows = [np.asarray(data.tokens("d", split)).reshape(-1, 256) for split in ("val", "test")]
    pool = np.concatenate([w[i] for i in range(len(windows[0])) for w in windows if i < len(w)])
    parts = [bytes(part[part != 256].tolist()) for part in np.split(pool, np.flatnonzero(pool == 256) + 1)]
    for text in texts:
        text = text.encode()
        for piece in pieces:
            if piece in text:  # what follows it is held out, up to the next
                rest = text[text.index(piece) + len(piece) :]
                assert piece.endswith(b"\n") and any(part and rest.startswith(part[:1000]) for part in parts)
    assert not any(piece in b"".join(parts) for piece in pieces)


def test_a_file_that_is_cut_keeps_its_bytes(tmp_path):
    """But for the mark at its beginning, which is no text."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    text = "eine Zeile\r\nnoch eine\n" * 400
    (tmp_path / "c" / "d" / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.2)
    [train] = documents_of(TokenData(tmp_path / "out"), "d", "train")
    assert text.encode().startswith(train) and len(train) > 0.7 * len(text)


def test_twenty_files_are_documents_and_nineteen_are_cut(tmp_path):
    for n in (19, 20):
        (tmp_path / str(n) / "d").mkdir(parents=True)
        texts = {f"{i} " + "eine Zeile\n" * 99 for i in range(n)}
        for i, text in enumerate(sorted(texts)):
            (tmp_path / str(n) / "d" / f"{i}.txt").write_text(text)
        prepare(str(tmp_path / str(n)), tmp_path / "out" / str(n), window=32, held_out=0.3)
        whole = [text.decode() in texts for text in documents_of(TokenData(tmp_path / "out" / str(n)), "d", "train")]
        assert any(whole) == all(whole) == (n == 20)


def test_one_document_on_many_lines(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"text": "one\ntwo"}, indent=2))
    assert [text for _, text, _ in read_file(File("d", tmp_path / "a.json"), LeftOut())] == ["one\ntwo"]


def test_a_wrong_domain_field_makes_no_thousand_folders(tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.jsonl").write_bytes(b"".join(jsonl([f"{i} text " * 30], i + 1) for i in range(300)))
    with pytest.raises(ValueError, match="more than 256 domains, the last is .*; is --domain_field right"):
        prepare(str(tmp_path / "c"), tmp_path / "out", window=16, domain_field="meta.set")


def test_a_single_line_is_cut_within(tmp_path):
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.txt").write_text("wörter " * 3000, encoding="utf-8")
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.2)
    assert TokenData(tmp_path / "out").meta["domains"]["d"]["train"]["bytes"] == pytest.approx(0.8 * 24_000, abs=8)


def test_long_lines_do_not_hold_out_more(tmp_path):
    """A book in a line, and a title line before a long one: the held-out share is what was asked for."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    books = ["".join(chr(97 + i) for i in range(n, n + 5)) * 20_000 for n in range(10)]
    for name, lines in (("a", books), ("b", ["title", "x y " * 30_000])):
        (tmp_path / "c" / "d" / f"{name}.txt").write_text("\n".join(lines) + "\n")
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.05)
    counts = TokenData(tmp_path / "out").meta["domains"]["d"]
    size = {split: counts[split]["bytes"] for split in SPLITS}
    assert 0.05 * 0.95 < 1 - size["train"] / sum(size.values()) < 2 * 0.05


def test_small_files_do_not_hold_out_more(tmp_path):
    """Letters of three long lines each, and of a title and one line."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    rng = random.Random(0)
    for i in range(19):
        words = [" ".join(rng.choices(["eins", "zwei", "drei"], k=240)) for _ in range(3)]
        (tmp_path / "c" / "d" / f"{i}.txt").write_text("\n".join(words if i % 2 else ["title", " ".join(words)]))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.1)
    counts = TokenData(tmp_path / "out").meta["domains"]["d"]
    size = {split: counts[split]["bytes"] for split in SPLITS}
    assert 0.1 * 0.95 < 1 - size["train"] / sum(size.values()) < 2 * 0.1


BAD_LINES = [
    (b'{"text": ', "not valid JSON"),
    (b'{"text": null}', "no document"),
    (b'{"text": 3}', "no document"),
    (b'{"text": ["a"]}', "no document"),
    (b'{"txt": "a"}', "no document"),
    (b'"text"', "no document"),
    (b"[]", "no document"),
    (b"12", "no document"),
    (b"null", "no document"),
    (b"1" * 5000, "a number of too many digits"),
    (b'{"text": "a", "x": ' + b"[" * 100_000, "JSON that is nested too deeply"),
    (b"[" * 100_000, "JSON that is nested too deeply"),
    (b"\0" * 100, "not valid JSON"),
    (b'{"text": "raw \0 byte"}', "not valid JSON"),
    (b"\xff\xfe\xfd", "not valid JSON"),
    (b"\x80\x02}q\x00", "not valid JSON"),
    (b'{"text": "' + b"x" * 300_000 + b'"}', "longer than 0 MB"),
    (b"y" * 900_000, "longer than 0 MB"),
]


@pytest.mark.parametrize("ending", [".jsonl", ".json"])
def test_bad_lines_are_skipped_and_said(tmp_path, monkeypatch, capsys, ending):
    monkeypatch.setattr(documents, "MAX_LINE", 250_000)
    good = [jsonl([f"good {i} " + "x" * 50]) for i in range(2000)]
    left_out = LeftOut()
    left_out.files = 1
    file = File("d", tmp_path / f"a{ending}")
    file.path.write_bytes(b"".join(g + b + b"\n" for g, (b, _) in zip(good, BAD_LINES)) + b"".join(good))
    found = list(read_file(file, left_out))
    assert len(found) == len(BAD_LINES) + 2000 and all(text.startswith("good ") for _, text, _ in found)
    assert left_out.lines == len(found) + len(BAD_LINES)
    assert left_out.told() == [f"left out: {len(BAD_LINES)} bad lines, as {'; '.join(left_out.places['bad lines'])}"]
    left_out.check()  # less than 1 %
    for number, (line, message) in enumerate(BAD_LINES, 1):
        left_out = LeftOut()
        left_out.files = 1
        file.path.write_bytes(jsonl(["good"]) * number + line + b"\n")
        assert [text for _, text, _ in read_file(file, left_out)] == ["good"] * number
        with pytest.raises(
            ValueError, match=rf"1 of {number + 1} lines are bad, more than 1%: .*a{ending}:{number + 1}: {message}"
        ):
            left_out.check()


def test_bad_domains_are_bad_lines(tmp_path):
    path = tmp_path / "a.jsonl"
    names = [None, True, "", " ", 1.5, [], {}, "a\nb", "\x1b[2J", "\ud83d", "x" * 300]
    path.write_bytes(
        b"".join(json.dumps({"text": "a", "of": name}).encode() + b"\n" for name in names) + b'{"text": "b"}'
    )
    left_out = LeftOut()
    assert list(read_file(File(None, path), left_out, "of")) == [] and left_out.lines == len(names) + 1
    assert left_out.places["bad lines"][0].endswith(
        "a.jsonl:1: no domain in the field of (--domain_field); it has text, of"
    )
    path.write_text('{"text": "a", "\\u001b[2J\\n": 1}')  # no terminal is to be told what to do
    left_out = LeftOut()
    assert list(read_file(File(None, path), left_out, "of")) == []
    assert left_out.told()[0].endswith("no domain in the field of (--domain_field); it has text, ?[2J?")


def test_a_field_whose_name_holds_a_dot(tmp_path):
    """As in tables that were made flat. It comes before a field of a field."""
    rows = [{"text": "a", "meta.set": "x"}, {"text": "b", "meta": {"set": "y"}}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_file(File(None, tmp_path / "a.jsonl"), LeftOut(), "meta.set")
    assert [(domain, text) for domain, text, _ in found] == [("x", "a"), ("y", "b")]
    table = pytest.importorskip("pyarrow").table({key: [value] for key, value in rows[0].items()})
    pytest.importorskip("pyarrow.parquet").write_table(table, tmp_path / "a.parquet")
    found = read_file(File(None, tmp_path / "a.parquet"), LeftOut(), "meta.set")
    assert [(domain, text) for domain, text, _ in found] == [("x", "a")]


def test_many_bad_lines_end_it_early(tmp_path, monkeypatch):
    """A wrong field in each line is not noticed only at the end of a huge file."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_bytes(b'{"content": "x"}\n' * 5000)
    with pytest.raises(ValueError, match=r"1,000 of 1,000 lines are bad, more than 1%: .*a.jsonl:1: no document"):
        prepare(str(tmp_path), tmp_path / "out")


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.parquet"])
def test_a_pointer_of_git_lfs_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(POINTER)
    left_out = LeftOut()
    with pytest.raises(ValueError, match=f"{name}: this is a git-LFS pointer"):
        list(read_file(File("d", tmp_path / name), left_out))


def test_few_broken_files_are_said(tmp_path):
    """What stands before the damage is used; one of 100 files may be damaged, two may not."""
    left_out, path = LeftOut(), tmp_path / "a.jsonl.gz"
    left_out.files = 100
    path.write_bytes(gzip.compress(jsonl(texts_for("z", 400)))[:-1000])
    assert len(list(read_file(File("d", path), left_out))) > 200
    with pytest.raises(ValueError, match=r"2 of 100 files cannot be read, more than 1%: .*a.jsonl.gz:\d+: "):
        list(read_file(File("d", path), left_out))


def test_zstd_with_a_long_window(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    packed = compressor.compress(jsonl(texts_for("z"))) + compressor.flush()
    with pytest.raises(zstandard.ZstdError):
        zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    (tmp_path / "a.jsonl.zst").write_bytes(packed)
    assert len(list(read_file(File("d", tmp_path / "a.jsonl.zst"), LeftOut()))) == 80


def test_parquet_without_pyarrow_or_text(tmp_path, monkeypatch):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.parquet").write_bytes(b"PAR1")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match=r"a.parquet: to read .parquet files, `pip install pyarrow`"):
            prepare(str(tmp_path), tmp_path / "out")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    with pytest.raises(ValueError, match=r"1 of 1 files cannot be read, more than 1%: .*a.parquet: "):
        prepare(str(tmp_path), tmp_path / "out")
    parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "d" / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: no column text; there are content"):
        prepare(str(tmp_path), tmp_path / "out")
    parquet.write_table(pyarrow.table({"text": ["a"], "set": ["b"]}), tmp_path / "d" / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet: no column sett \(--domain_field\); there are text, set"):
        prepare(str(tmp_path / "d"), tmp_path / "out", domain_field="sett")
    day = pyarrow.scalar(10**7, pyarrow.date32())  # after the year 9999: Python has no such date, and nobody needs it
    sets = pyarrow.array(["x", "y", None])
    meta = pyarrow.StructArray.from_arrays([sets, pyarrow.array([day] * 3, pyarrow.date32())], ["set", "day"])
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"], "meta": meta}), tmp_path / "d" / "a.parquet")
    left_out = LeftOut()
    found = list(read_file(File(None, tmp_path / "d" / "a.parquet"), left_out, "meta.set"))
    assert [(domain, text) for domain, text, _ in found] == [("x", "a")] and left_out.lines == 3
    assert [place.partition(".parquet:")[2][:15] for place in left_out.places["bad lines"]] == [
        "2: no document,", "3: no domain in"
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"no column meta.sett \(--domain_field\); there are text, meta.set, meta.day"):
        prepare(str(tmp_path / "d"), tmp_path / "out", domain_field="meta.sett")


@pytest.mark.parametrize("windows", [2, 3, 4])
def test_enough_to_prepare_is_enough_to_train(tmp_path, windows):
    """A sequence of one window takes one token more than the window has."""
    writer = DataWriter(tmp_path, load_tokenizer("byte"), 16)
    for held_out, n in ((False, 17), (True, 16 * windows + 3)):
        ids = np.full(n, 65, np.uint32)
        writer.add(Encoded("d", held_out, ids, np.ones_like(ids), np.empty(0, np.uint64)))
    writer.close()
    if windows < 4:
        with pytest.raises(ValueError, match="no domain has enough text .*domain d: left out, it has 17 train, "):
            writer.leave_out_small()
        return
    writer.leave_out_small()
    writer.write_meta({"seed": 0})
    data = TokenData(tmp_path)
    assert all(data.sequences("d", split, 16) == 1 for split in SPLITS)
    BatchReader(data, 16, 1, seed=0)


def test_a_small_domain_is_left_out(command, tmp_path):
    for domain, n in (("large", 100), ("small", 1)):
        (tmp_path / "c" / domain).mkdir(parents=True)
        (tmp_path / "c" / domain / "a.jsonl").write_bytes(jsonl(texts_for(domain, n)))
    args = [tmp_path / "c", "--window=64", "--held_out=0.2", "--workers=1"]
    status, out, _ = command(*args, "--out", tmp_path / "out")
    assert status == 0 and TokenData(tmp_path / "out").domains == ["large"]
    assert "domain small: left out, it has " in out and "lower --window, or raise --held_out" in out
    assert not (tmp_path / "out" / "small").exists()


def test_a_small_domain_does_not_count_as_train(tmp_path):
    """Its text is not in the data set, so nothing held out stands in train by it."""
    text = "".join(random.Random(0).choices("abcdefgh ", k=40_000))
    ids, stretches = np.full(40_000, 65, np.uint32), sample_stretches([text.encode()])
    for domains, share in ((["large", "small"], 0.0), (["large", "other"], 1.0)):
        writer = DataWriter(tmp_path / domains[1], load_tokenizer("byte"), 16)
        writer.folder.mkdir()
        writer.add(Encoded("large", True, ids, np.ones_like(ids), stretches))
        writer.add(Encoded("large", False, ids, np.array([40_000]), np.empty(0, np.uint64)))
        writer.add(Encoded(domains[1], False, ids, np.array([40_000]), stretches))  # the small one has no held-out text
        if domains[1] == "other":
            writer.add(Encoded("other", True, ids, np.ones_like(ids), np.empty(0, np.uint64)))
        writer.close()
        writer.leave_out_small()
        assert writer.shared.shares()["large"] == share


# --- nothing is left behind ---------------------------------------------------------------------------------------


def slow_corpus(folder: Path) -> Path:
    """Text that takes some seconds to prepare."""
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a.jsonl").write_bytes(jsonl([f"{i} {random.Random(i).random()} " * 500 for i in range(4000)]))
    return folder


def start(*args, **how) -> subprocess.Popen:
    """prepare_data.py in a process of its own, at work when this returns."""
    words = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, args)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)
    line = process.stdout.readline()
    assert "reading 1 files" in line, process.communicate()
    return process


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_killed_and_again(tmp_path):
    """After SIGKILL the workers end, and the same command makes the data set. Two at a time are told."""
    if not Path("/proc/self/task").exists():
        pytest.skip("needs /proc")
    folder, out = slow_corpus(tmp_path / "c"), tmp_path / "o" / "out"
    args = [folder, "--out", out, "--workers=2", "--window=64"]
    process = start(*args)
    deadline = time.monotonic() + 60
    while len(workers := children(process.pid)) < 3 and time.monotonic() < deadline:  # one of them counts semaphores
        time.sleep(0.02)
    with pytest.raises(ValueError, match="out: another process is making it"):
        prepare(str(folder), out, window=64)
    process.kill()
    process.communicate()
    assert len(workers) == 3 and sorted(p.name for p in out.parent.iterdir()) == [".out.lock", ".out.partial"]
    while any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    (out.parent / ".out.partial" / "d" / "old").write_text("of the process that was killed")
    (folder / "d" / "a.jsonl").write_bytes(jsonl(texts_for("z")))
    prepare(str(folder), out, window=64, held_out=0.2)
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert sorted(p.name for p in out.iterdir()) == ["d", "meta.json"] and not (out / "d" / "old").exists()


def test_a_data_set_that_another_process_has_made_meanwhile_is_left_alone(tmp_path):
    """It was not there when this process looked; that must be known before hours of work."""
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match="out: another process has just made it"):
        with whole_or_nothing(tmp_path / "out"):
            raise AssertionError
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_signals_leave_nothing(tmp_path, number):
    usual = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}  # under nohup, SIGHUP is ignored
    process = start(slow_corpus(tmp_path / "c"), "--out", tmp_path / "o" / "out", "--workers=1", **usual)
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in error
    assert not (tmp_path / "o").exists()


def test_a_full_disk_leaves_nothing(tmp_path):
    """A limit on the size of files fails as a full disk does: in write(), and again when the file is closed."""
    folder = slow_corpus(tmp_path / "c")
    code = (
        "import resource, prepare_data; resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6)); prepare_data.main()"
    )
    args = [folder, "--out", tmp_path / "o" / "out", "--workers=1"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large" in done.stderr, done.stderr
    assert not (tmp_path / "o").exists()


# --- the command --------------------------------------------------------------------------------------------------


def test_many_domains_where_few_files_may_be_open(tmp_path):
    """macOS allows 256 open files, unless a program asks for more."""
    import resource

    def few():
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))

    for i in range(100):
        (tmp_path / "c" / f"d{i:02}").mkdir(parents=True)
        (tmp_path / "c" / f"d{i:02}" / "a.txt").write_text(f"{i} " * 200)
    words = [tmp_path / "c", "--out", tmp_path / "o", "--workers=1", "--window=16", "--held_out=0.5"]
    command = [sys.executable, "prepare_data.py", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=few, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(TokenData(tmp_path / "o").domains) == 100


def test_command_twice_and_with_other_options(command, tiny_corpus, tmp_path):
    args = [tiny_corpus, "--out", tmp_path / "a", "--window=128", "--held_out=0.1", "--workers=1"]
    for already in ("", ": already prepared, with these options; if the text has changed, delete it first"):
        status, out, error = command(*args)
        assert (status, error) == (0, "")
        assert out.endswith(f"{tmp_path / 'a'}{already}\n") and re.search(r"sums +1\d\d ", out)
    status, _, error = command(*args, "--seed=1")
    assert status == 2 and error.count("\n") == 1
    assert "exists, made with seed 0, not 1; delete it or choose another --out" in error
    edit = json.loads((tmp_path / "a" / "meta.json").read_text())
    del edit["options"]["domains"]  # made before that was an option
    (tmp_path / "a" / "meta.json").write_text(json.dumps(edit))
    assert command(*args)[0] == 0
    status, _, error = command(tmp_path / "a", "--verify", "--domains=sums")
    assert status == 2 and "--verify reads a data set, and takes no --domains" in error
    assert command(tmp_path / "a", "--verify") == (0, f"{tmp_path / 'a'}: every file is as it was written\n", "")
    file = tmp_path / "a" / "sums" / "val.bin"
    file.write_bytes(file.read_bytes().replace(b"1", b"2", 1))
    status, _, error = command(tmp_path / "a", "--verify")
    assert status == 2 and error.count("\n") == 1 and f"{file}: its CRC-32 is" in error


def test_a_tokenizer_whose_path_is_no_utf8(tiny_corpus, bpe_file, tmp_path):
    """meta.json could not be read again, so it is refused before any text is read."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff"))
    shutil.copytree(bpe_file.parent, folder)
    with pytest.raises(ValueError, match="--tokenizer .* is no UTF-8 text"):
        prepare(str(tiny_corpus), tmp_path / "out", str(folder / "tokenizer.json"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_that_was_changed_in_place(tiny_corpus, bpe_file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    folder = shutil.copytree(bpe_file.parent, tmp_path / "t")
    made = [str(tiny_corpus), tmp_path / "a", str(folder)]
    assert prepare(*made, window=128, held_out=0.1) and not prepare(*made, window=128, held_out=0.1)
    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bpe.normalizer = tokenizers.normalizers.Lowercase()
    with_bos = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    with_bos.post_processor = tokenizers.processors.TemplateProcessing("</s> $A", special_tokens=[("</s>", 2)])
    for file, text in (
        ("tokenizer_config.json", '{"eos_token": "</s>"}'),
        ("tokenizer.json", bpe.to_str()),
        ("tokenizer.json", with_bos.to_str()),
    ):
        before = (folder / file).read_text()
        (folder / file).write_text(text)
        with pytest.raises(ValueError, match="exists, made with .* as it was, and it has changed; delete it"):
            prepare(*made, window=128, held_out=0.1)
        (folder / file).write_text(before)
    assert not prepare(*made, window=128, held_out=0.1)


def test_the_end_token_of_a_unigram_model_stays_text(tmp_path):
    """Such a model has </s> as a piece like any other: without care its letters in a text would end a document."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = [("<unk>", 0.0), ("<s>", -1.0), ("</s>", -1.0), *((c, -2.0) for c in "▁abcdefghijklmnopqrstuvwxyz<>/.")]
    model = tokenizers.Tokenizer(tokenizers.models.Unigram(pieces, unk_id=0))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.save(str(tmp_path / "tokenizer.json"))
    assert 2 in model.encode("and </s> more").ids
    unigram, text = load_tokenizer(str(tmp_path / "tokenizer.json")), "and </s> more </s> of it.</s>"
    ids, sizes = unigram.encode_with_bytes(text)
    assert unigram.eot == 2 and 2 not in ids and sizes.sum() == len(text)
    assert unigram.encode(text).tolist() == ids.tolist()
    assert unigram.encode("abc").tolist() == model.encode("abc").ids

    for normalizer, text in (("NFKC", "a\uff1c/s\uff1eb"), ("Lowercase", "<S>a</S> b</s>c")):  # full-width < and >
        model.normalizer = getattr(tokenizers.normalizers, normalizer)()
        model.save(str(tmp_path / "tokenizer.json"))
        assert 2 in model.encode(text).ids
        ids, sizes = load_tokenizer(str(tmp_path / "tokenizer.json")).encode_with_bytes(text)
        assert 2 not in ids and sizes.sum() == len(text.encode())


def test_the_end_token_stays_text_where_bpe_has_learned_its_letters(tmp_path):
    """From HTML, say: alone it is ▁< / s >, and within a text </s>."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = ["<unk>", "<s>", "</s>", *"▁abcdefghijklmnopqrstuvwxyz<>/.", "▁<", "</", "</s"]
    merges = [("▁", "<"), ("<", "/"), ("</", "s"), ("</s", ">")]
    ids = {token: i for i, token in enumerate(vocabulary)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=ids, merges=merges, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    model.save(str(tmp_path / "tokenizer.json"))
    assert 2 not in model.encode("</s>").ids and 2 in model.encode("it was</s>.").ids
    (tmp_path / "c" / "web").mkdir(parents=True)
    texts = [f"{'so ' * (10 + i)}it was</s>. and </s>so on</s>" for i in range(200)]
    (tmp_path / "c" / "web" / "a.jsonl").write_bytes(jsonl(texts))
    prepare(str(tmp_path / "c"), tmp_path / "out", str(tmp_path), window=64, held_out=0.3)
    train = np.asarray(TokenData(tmp_path / "out").tokens("web", "train"))
    documents = np.split(train[train != 2], np.flatnonzero(train == 2) - np.arange((train == 2).sum()))[:-1]
    bare = ["".join(vocabulary[i] for i in document).replace("▁", "") for document in documents]
    assert len(bare) > 100 and set(bare) <= {text.replace(" ", "") for text in texts}


def test_an_end_token_that_is_a_letter_is_refused(tmp_path):
    """Where such a tokenizer makes it of a text's letter, the text cannot be cut within it."""
    tokenizers = pytest.importorskip("tokenizers")
    letters = {letter: i for i, letter in enumerate("?$abcdefghijklmnopqrstuvwxyz ")}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(letters, unk_token="?"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "$"}')
    assert model.encode("a$b").ids[1] == letters["$"]
    with pytest.raises(ValueError, match="'\\$' starts or ends each document"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))

    pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = {letter: i for i, letter in enumerate(pre_tokenizer.alphabet())}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=alphabet, merges=[]))
    model.pre_tokenizer = pre_tokenizer
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\u010a"}')  # how ByteLevel writes a newline
    with pytest.raises(ValueError, match=r"'\\n' starts or ends each document"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_wrong_place_is_refused_before_the_work(tiny_corpus, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "not" / "there")
    monkeypatch.setattr(prepare_data, "write_domains", None)  # nothing is read
    with pytest.raises(ValueError, match="link: exists and is no data set"):
        prepare(str(tiny_corpus), tmp_path / "link")
    (tmp_path / "c" / "meta.json").mkdir(parents=True)
    (tmp_path / "c" / "meta.json" / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="meta.json"):
        prepare(str(tmp_path / "c"), tmp_path / "out")


def test_what_is_made_stays_where_nobody_reads(tmp_path, monkeypatch):
    """As under `prepare_data.py ... | head -1`, where something was left out."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(jsonl([*texts_for("a"), " "]))
    monkeypatch.setattr(prepare_data, "print", lambda text, **_: text.startswith("left out") and 1 / 0, raising=False)
    with pytest.raises(ZeroDivisionError):
        prepare(str(tmp_path / "c"), tmp_path / "out", window=64, held_out=0.2)
    TokenData(tmp_path / "out").verify()


def test_home_folder(command, tiny_corpus, tmp_path, monkeypatch):
    """bash puts the home folder for ~ in `--out ~/x`, but not in `--out=~/x`; nobody does in a config file."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    args = [tiny_corpus, "--out=~/deep/out", "--window=128", "--held_out=0.1", "--workers=1"]
    assert [command(*args)[0] for _ in range(2)] == [0, 0] and not (tmp_path / "~").exists()
    assert TokenData(tmp_path / "deep" / "out").domains == ["animals", "brackets", "sums"]
    (tmp_path / "config.py").write_text('data = "~/a"\nout = "b~/c"\n')
    settings = load(Settings, ["config.py", "--init_from=~/m"])
    home = str(tmp_path)
    assert (settings.data, settings.out, settings.init_from) == (f"{home}/a", "b~/c", f"{home}/m")


def test_ascii_terminal(command, tmp_path, monkeypatch):
    (tmp_path / "c" / "新闻").mkdir(parents=True)
    (tmp_path / "c" / "新闻" / "a.jsonl").write_bytes(jsonl(texts_for("x")))
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    args = [tmp_path / "c", "--out", tmp_path / "out", "--window=64", "--held_out=0.2", "--workers=1"]
    assert command(*args)[0] == 0
    stream.flush()
    assert b"\n\\u65b0\\u95fb " in stream.buffer.getvalue()


def test_command_warns_of_shared_text(command, tmp_path):
    folder = write_near_duplicates(tmp_path / "c")
    args = [folder, "--out", tmp_path / "a", "--window=128", "--held_out=0.2", "--workers=1"]
    _, out, _ = command(*args)
    assert re.search(r"copied .* [3-6]\d\.\d %\n", out) and re.search(r"own .* 0\.0 %\n", out)
    assert re.search(r"warning: domain copied: [3-6]\d\.\d % of the held-out text stands word for word", out)
    assert "warning: domain own" not in out
    status, _, error = command(*args, "--drop_shared")
    assert status == 2 and "made with drop_shared False, not True" in error


def test_no_advice_that_was_followed():
    """What is left of shared text, such as a licence in each file, is below what a document may have."""
    meta = {"shared": {"code": 0.043, "prose": None, "own": 0.01}, "options": {"drop_shared": True}}
    (line,) = prepare_data.warnings_about(SimpleNamespace(meta=meta))
    assert "domain code: 4.3 %" in line and "it is at most 5 % of a document" in line


def bad_folder(path: Path, *lines: bytes) -> Path:
    (path / "d").mkdir()
    (path / "d" / "x.jsonl").write_bytes(b'{"text": "good"}\n' + b"\n".join(lines))
    return path


@pytest.mark.parametrize(
    "source, args, message",
    [
        ("nowhere", [], "nowhere: no such folder"),
        (".", ["--tokenisor", "byte"], "did you mean --tokenizer"),
        (".", ["--tokenizer", "gtp2"], "did you mean gpt2?"),
        (".", ["--domains"], "--domains"),
        ([b'{"text": '], [], "x.jsonl:2: not valid JSON"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, source, args, message):
    source = bad_folder(tmp_path, *source) if isinstance(source, list) else tmp_path / source
    status, _, error = command(source, "--out", tmp_path / "out" / "x", "--workers=1", *args)
    assert status == 2 and error.count("\n") == 1, error
    assert message in error and error.startswith("prepare_data.py: ")
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    "lines, options, message",
    [
        ([b'{"txt": "a"}'], {}, r"1 of 2 lines are bad, more than 1%: .*x.jsonl:2: no document"),
        ([], {"domain_field": "meta.set"}, r"1 of 1 lines are bad, more than 1%: .*x.jsonl:1: no domain in the field"),
        ([b'{"text": "a"}'], {}, r"no domain has enough text .*lower --window, or raise --held_out"),
        ([], {"domains": ["e"]}, r": no domain e; it has d"),
        ([], {"domains": ["d", "d"]}, r"none of them twice"),
        ([], {"seed": 2**63}, r"--seed: .* is out of range"),
        ([], {"held_out": 1.5}, r"--held_out: 1.5 is out of range"),
        ([], {"window": 0}, r"--window: 0 is out of range"),
    ],
)
def test_mistakes_name_the_place(tmp_path, lines, options, message):
    with pytest.raises(ValueError, match=message):
        prepare(str(bad_folder(tmp_path, *lines)), tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d"]


def test_more_mistakes(tmp_path, tiny_corpus, monkeypatch):
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="make a sub-folder of such files for each domain"):
        prepare(str(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is no data set"):
        prepare(str(tiny_corpus), tmp_path / "d")
    (tmp_path / "d" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(texts_for("z")))[:-20])
    with pytest.raises(ValueError, match=r"x.jsonl.gz:\d+: "):
        prepare(str(tmp_path), tmp_path / "out")
    (tmp_path / "d" / "x.jsonl.gz").rename(tmp_path / "d" / "x.jsonl.zst")
    zstandard = pytest.importorskip("zstandard")
    with pytest.raises(ValueError, match=r"x.jsonl.zst: zstd"):
        prepare(str(tmp_path), tmp_path / "out")
    frames = [zstandard.compress(jsonl(texts_for(x, 4000))) for x in "ab"]
    for cut in (0, 10, len(frames[0]) // 2, len(frames[0]) - 1, len(frames[0]) + 5, sum(map(len, frames)) - 1):
        (tmp_path / "d" / "x.jsonl.zst").write_bytes(b"".join(frames)[:cut])
        with pytest.raises(ValueError, match=r"x.jsonl.zst(:\d+)?: (the file is cut short|zstd)"):
            list(read_file(File("d", tmp_path / "d" / "x.jsonl.zst"), LeftOut()))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="pip install zstandard"):
        prepare(str(tmp_path), tmp_path / "out")

    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="--tokenizer gpt2: cannot be downloaded.*the tokenizer byte"):
        load_tokenizer("gpt2")
    (tmp_path / "sp.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\n\x00sentencepiece")
    with pytest.raises(ValueError, match="this is sentencepiece's|not Llama 3's rank file"):
        load_tokenizer(str(tmp_path / "sp.model"))
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(ranks)  # of another model, whose pattern nobody knows
    with pytest.raises(ValueError, match="qwen.tiktoken: not Llama 3's rank file"):
        load_tokenizer(str(tmp_path / "qwen.tiktoken"))
    (tmp_path / "d" / "x.jsonl.zst").unlink()
    (tmp_path / "d" / "a.jsonl").write_bytes(jsonl(texts_for("z")))
    (tmp_path / "d" / "b.txt").write_bytes("Grüße".encode("utf-16"))
    with pytest.raises(ValueError, match="b.txt: this is UTF-16"):
        prepare(str(tmp_path), tmp_path / "other")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(tmp_path / "d"))


def test_help_starts_with_the_commands(command):
    status, out, _ = command("--help")
    assert status == 0 and "python prepare_data.py installed --out" in "".join(out.splitlines()[:4])


def test_command_loads_no_torch():
    """Each worker imports the file: torch would cost every one of them seconds and 200 MB."""
    code = "import sys, prepare_data; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
