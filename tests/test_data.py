"""prepare_data.py: what is on disk is the text, what a batch holds is what the weights ask for."""

import base64
import collections
import gzip
import json
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import prepare_data
from plumbing import shared, tokenizer
from plumbing.data import SPLITS, BatchReader, TokenData
from plumbing.documents import read_file
from plumbing.shared import SharedText, sample_stretches
from plumbing.tokenizer import LLAMA3_PATTERN, load_tokenizer
from prepare_data import prepare

ROOT = Path(__file__).resolve().parent.parent
AWKWARD = [
    "",
    " ",
    "plain text",
    "  two  spaces,\ttabs\r\nand\n\n\nlines \n",
    "日本語のテキスト、中文，한국어",
    "👩‍👩‍👧 family 🏳️‍🌈 e\u0301 é ß ﬃ \u2028 \ufeff",
    "\x00\x01\x07\x1b\x7f control",
    "<|endoftext|> <|end_of_text|> </s> [MASK] are text",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": None}\n" * 20,
    "x" * 5000 + " " * 5000,
]


def run_cli(*args) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "prepare_data.py"), *map(str, args)], capture_output=True, text=True, cwd=ROOT
    )


def documents_of(data: TokenData, domain: str, split: str) -> list[bytes]:
    """Byte-tokenized documents of a split, cut at the eots without any help from prepare_data."""
    ids = np.asarray(data.tokens(domain, split)).astype(int)
    parts = np.split(ids, np.flatnonzero(ids == 256) + 1)
    return [bytes(part[part != 256].tolist()) for part in parts if len(part)]


# --- tokenizers ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
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


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory) -> Iterator[Path]:
    """A rank file as Llama 3 has it: 256 bytes and a few merges, for 128,000."""
    tokens = [bytes([i]) for i in range(256)] + [b"th", b"the", b" t", b" the", b"  ", b"xx", b"xxxx"]
    path = tmp_path_factory.mktemp("llama") / "tokenizer.model"
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LLAMA3_RANKS", len(tokens))
        yield path


def test_byte_tokenizer_is_utf8():
    tokenizer = load_tokenizer("byte")
    assert (tokenizer.n_vocab, tokenizer.eot, tokenizer.bos) == (257, 256, None)
    for text in AWKWARD:
        assert tokenizer.encode(text).tolist() == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_huggingface_file_agrees_with_the_library(bpe_file):
    import tokenizers

    reference = tokenizers.Tokenizer.from_file(str(bpe_file))
    reference.no_truncation()
    for spec in (bpe_file, bpe_file.parent):
        tokenizer = load_tokenizer(str(spec))
        assert (
            tokenizer.eot == reference.token_to_id("<|endoftext|>") and tokenizer.n_vocab == reference.get_vocab_size()
        )
        assert load_tokenizer(tokenizer.name).eot == tokenizer.eot
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if "<|" not in text:  # as it is, the library would take these for special tokens
            assert ids.tolist() == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.eot not in ids


def test_bos_is_the_token_that_the_library_adds(bpe_file, bos_file, tmp_path):
    import tokenizers

    assert load_tokenizer(str(bpe_file)).bos is None
    tokenizer = load_tokenizer(str(bos_file))
    library = tokenizers.Tokenizer.from_file(str(bos_file))
    library.no_truncation()
    assert library.encode("cats").ids == [tokenizer.bos, *tokenizer.encode("cats").tolist()]
    for template, expected in (("<s> $A <s>", tokenizer.bos), ("$A <s>", None), ("<s> <s> $A", ValueError)):
        library.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", tokenizer.bos)]
        )
        library.save(str(tmp_path / "tokenizer.json"))
        if expected is ValueError:
            with pytest.raises(ValueError, match="it puts 2 tokens before a text"):
                load_tokenizer(str(tmp_path / "tokenizer.json"))
        else:
            assert load_tokenizer(str(tmp_path / "tokenizer.json")).bos == expected


def test_rank_file_is_llama3s(rank_file):
    import tiktoken

    tokenizer = load_tokenizer(str(rank_file))
    assert load_tokenizer(str(rank_file.parent)).n_vocab == tokenizer.n_vocab == 263 + 256
    assert (tokenizer.bos, tokenizer.eot) == (263, 263 + 1)
    for name, place in (("<|start_header_id|>", 6), ("<|eot_id|>", 9), ("<|reserved_special_token_250|>", 255)):
        assert tokenizer.decode([263 + place]) == name
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" t": 258, b" the": 259}
    ranks |= {b"  ": 260, b"xx": 261, b"xxxx": 262}
    reference = tiktoken.Encoding("r", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode_ordinary(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode("the the").tolist() == [257, 259]
    desert = " " * 1_500_000 + "x"  # more than the pattern's backtracking bears in one piece
    assert tokenizer.decode(tokenizer.encode(desert)) == desert


@pytest.mark.parametrize("kind", ["byte", "bpe_file", "rank_file"])
def test_bytes_of_tokens_sum_to_the_text(kind, request):
    tokenizer = load_tokenizer("byte" if kind == "byte" else str(request.getfixturevalue(kind)))
    for text in AWKWARD:
        ids, sizes = tokenizer.encode_with_bytes(text)
        assert len(ids) == len(sizes) and ids.tolist() == tokenizer.encode(text).tolist()
        assert sizes.sum() == len(text.encode())
    if kind == "bpe_file":  # the text that a normalizer drops counts too
        import tokenizers

        tokenizer.tokenizer.normalizer = tokenizers.normalizers.Strip()
        assert tokenizer.encode_with_bytes("  cats  \n")[1].sum() == 9
        tokenizer.tokenizer.normalizer = tokenizers.normalizers.Sequence([])
    ids, sizes = tokenizer.encode_with_bytes("the moon, 日")
    for k in range(len(ids)):  # and each prefix that ends at a character is as long as the text it decodes to
        if "\ufffd" not in (prefix := tokenizer.decode(ids[:k])):
            assert sizes[:k].sum() == len(prefix.encode())


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
        assert set(whole) == texts - set(train) or set(whole) == texts - set(train) - {
            t for t in texts - set(train) - set(whole) if t.startswith(cut)
        }
        assert whole and set(whole).isdisjoint(train)
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


def jsonl(texts: list[str], source: str | None = None) -> bytes:
    lines = [{"text": t} | ({"meta": {"set": source}} if source else {}) for t in texts]
    return "".join(json.dumps(line, ensure_ascii=i % 2 == 0) + "\n" for i, line in enumerate(lines)).encode()


def texts_for(name: str, n: int = 80) -> list[str]:
    rng = random.Random(name)
    return [f"{name} {i} \u2028 日 " + " ".join(rng.choices(["a", "bb", "ccc"], k=60)) for i in range(n)]


def test_every_format_reads_the_same(tmp_path):
    """.txt, .jsonl, .gz, .zst (in two frames) and --domain_field give the same documents."""
    zstandard = pytest.importorskip("zstandard")
    texts, domains, sorted_documents = texts_for("x"), ("txt", "plain", "gz", "zst"), {}
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
        prepare(str(tmp_path / domain), tmp_path / "out" / domain, window=32, held_out=0.1)
    field = tmp_path / "field"
    field.mkdir()
    (field / "b.jsonl").write_bytes(jsonl(texts, "Red/Pajama: Git") + jsonl(texts_for("y"), "wiki"))
    prepare(str(field), tmp_path / "out" / "field", window=32, held_out=0.1, domain_field="meta.set")
    assert TokenData(tmp_path / "out" / "field").domains == ["Red_Pajama_Git", "wiki"]
    for name, domain in [*((d, "only") for d in domains), ("field", "Red_Pajama_Git")]:
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


def test_surrogates_and_broken_utf8(tmp_path, capsys):
    (tmp_path / "c" / "d").mkdir(parents=True)
    (tmp_path / "c" / "d" / "a.jsonl").write_bytes(
        b'{"text": "half \\ud83d pair \\ud83d\\ude00"}\n' + jsonl(texts_for("q"))
    )
    (tmp_path / "c" / "d" / "b.txt").write_bytes(b"latin \xe9 caf\xc3\xa9")
    (tmp_path / "c" / "d" / "C.TXT").write_bytes(b"\xef\xbb\xbflatin \xe9 caf\xc3\xa9")  # the same, with a mark
    (tmp_path / "c" / "d" / "d.jsonl").write_bytes(b"\xef\xbb\xbf" + jsonl(["marked"]))
    (tmp_path / "c" / "stray.jsonl").write_bytes(jsonl(["in no sub-folder"]))
    prepare(str(tmp_path / "c"), tmp_path / "out", window=16, held_out=0.1)
    out = capsys.readouterr().out
    assert "1 documents hold U+FFFD" in out and "left out 1 files that are in no sub-folder, as stray.jsonl" in out
    data = TokenData(tmp_path / "out")
    everything = b"".join(documents_of(data, "d", "train"))
    assert "half ? pair 😀".encode() in everything and everything.count("latin \ufffd café".encode()) == 1
    assert b"marked" in everything and b"sub-folder" not in everything


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


def test_nothing_half_written(tiny_corpus, tmp_path, monkeypatch):
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(self, *args, error=error):
            raise error

        monkeypatch.setattr(prepare_data.DataWriter, "add", fail)
        with pytest.raises(type(error)):
            prepare(str(tiny_corpus), tmp_path / "deep" / "out", window=128)
        assert list((tmp_path / "deep").iterdir()) == []


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
    assert sample.shares()["a"] == pytest.approx(1901 / 5901, abs=0.04)


def test_stretches_do_not_reach_into_the_next_document(monkeypatch):
    monkeypatch.setattr(shared, "SAMPLE", 1.0000001)
    rng = random.Random(0)
    texts = [rng.randbytes(n) for n in (0, 5, 99, 100, 101, 70_000, 1, 250, 0)]
    hashes = sample_stretches(texts)
    assert len(hashes) == sum(max(0, len(text) - 99) for text in texts) == len(set(hashes.tolist()))
    assert hashes.tolist() == np.concatenate([sample_stretches([text]) for text in texts]).tolist()
    assert len(sample_stretches([])) == len(sample_stretches([b"short", b""])) == 0


def test_installed_has_domains_enough(tmp_path):
    prepare("installed", tmp_path / "out", window=128, held_out=0.2, max_mb=0.1)
    data = TokenData(tmp_path / "out")
    assert len(data.domains) >= 6
    assert max(exact_shares(data).values()) < 0.03
    tokens = {d: np.asarray(data.tokens(d, "train"))[:60_000].astype(int) for d in data.domains}
    pairs = {d: np.bincount(t[:-1] * 257 + t[1:], minlength=257**2) + 0.01 for d, t in tokens.items()}
    for a in data.domains:  # each domain's own statistics of byte pairs code it better than any other's
        held = np.asarray(data.tokens(a, "val")).astype(int)
        costs = {
            b: -np.log(c[held[:-1] * 257 + held[1:]] / c.reshape(257, 257).sum(1)[held[:-1]]).mean()
            for b, c in pairs.items()
        }
        assert min(costs, key=costs.get) == a, (a, costs)


# --- reading tokens -----------------------------------------------------------------------------------------------


def test_sequences(tiny_data):
    data = TokenData(tiny_data)
    stream = np.fromfile(tiny_data / "sums" / "val.bin", "<u2")
    assert data.sequences("sums", "val", 50) == (len(stream) - 1) // 50
    everything = data.eval_sequences("sums", "val", 50)
    assert everything.dtype == np.int64 and everything.shape == ((len(stream) - 1) // 50, 51)
    for i, row in enumerate(everything):
        assert row.tolist() == stream[50 * i : 50 * i + 51].tolist()
    assert len(data.eval_sequences("sums", "val", 50, 10**6)) == len(everything)
    some = data.eval_sequences("sums", "val", 50, 7)
    places = [next(i for i, row in enumerate(everything) if (row == s).all()) for s in some]
    assert (
        places[0] == 0 and places[-1] >= len(everything) * 6 // 7 and max(np.diff(places)) - min(np.diff(places)) <= 1
    )
    with pytest.raises(ValueError, match=r"val of domain sums has [\d,]+ tokens"):
        data.eval_sequences("sums", "val", 10**6)


def rows_seen(tokens: np.ndarray, domains: np.ndarray, d: int) -> list[bytes]:
    return [row.tobytes() for row in tokens[domains == d]]


def test_no_repeat_before_a_domain_is_used_up(tiny_data):
    data, T = TokenData(tiny_data), 64
    stream = {d: np.fromfile(tiny_data / d / "train.bin", "<u2").astype(np.int64) for d in data.domains}
    reader, seen = BatchReader(data, T, 16, seed=5), collections.defaultdict(list)
    weights, step = np.array([0.6, 0.4, 0.0]), 0
    while len(seen[0]) < 2 * reader.totals[0] + 5:
        [(tokens, domains, _)] = reader.next_batch(step, weights)
        tokens, domains = tokens.numpy(), domains.numpy()
        assert tokens.shape == (16, T + 1) and tokens.dtype == domains.dtype == np.int64
        for d in range(3):
            seen[d] += rows_seen(tokens, domains, d)
        step += 1
    assert not seen[2]  # weight 0 is never drawn
    n = reader.totals[0]
    all_sequences = sorted(stream["animals"][i * T : i * T + T + 1].tobytes() for i in range(n))
    assert sorted(seen[0][:n]) == sorted(seen[0][n : 2 * n]) == all_sequences
    assert seen[0][:n] != seen[0][n : 2 * n] and seen[0][:n] != [
        stream["animals"][i * T : i * T + T + 1].tobytes() for i in range(n)
    ]
    assert reader.tokens_seen().tolist() == [len(seen[i]) * T for i in range(3)]
    other = BatchReader(data, T, 16, seed=6)
    assert other.draw(0, weights)[1].tolist() != BatchReader(data, T, 16, seed=5).draw(0, weights)[1].tolist()


def test_draws_follow_the_weights(tiny_data):
    data = TokenData(tiny_data)
    reader = BatchReader(data, 64, 64, seed=1)
    for weights in ([0.2, 0.3, 0.5], [0.9, 0.05, 0.05]):  # the second acts from the very next batch on
        start = 0 if weights[0] == 0.2 else 100
        draws = [reader.draw(step, weights)[0] for step in range(start, start + 100)]
        assert len({tuple(d) for d in draws}) > 95  # each step has its own
        counts = np.bincount(np.concatenate(draws), minlength=3)
        assert stats.chisquare(counts, 6400 * np.array(weights)).pvalue > 1e-3
    assert (reader.draw(200, [0, 0, 1])[0] == 2).all() and (reader.draw(201, [1, 0, 0])[0] == 0).all()


def test_ranks_slices_make_the_whole(tiny_data):
    data, weights = TokenData(tiny_data), [0.2, 0.3, 0.5]
    whole = BatchReader(data, 32, 12, seed=2)
    cut = {"processes": 3, "micro_batch": 2, "gate_samples": 6}
    ranks = [BatchReader(data, 32, 12, seed=2, rank=i, **cut) for i in range(3)]
    for step in range(40):
        [batch] = whole.next_batch(step, weights)
        parts = [part for reader in ranks for part in reader.next_batch(step, weights)]
        assert torch.equal(torch.cat([p.tokens for p in parts]), batch.tokens)
        assert torch.equal(torch.cat([p.domain for p in parts]), batch.domain)
        assert [p.gate_sample for p in parts] == [0, 1, 2, 3, 4, 5]
    assert all(r.state_dict() == whole.state_dict() for r in ranks)


def test_resume_is_exact_and_state_does_not_grow(tiny_data):
    data, weights = TokenData(tiny_data), [0.2, 0.3, 0.5]
    one = BatchReader(data, 256, 32, seed=2)
    sizes = set()
    for step in range(100):  # several epochs
        one.draw(step, weights)
        sizes.add(len(re.sub(r"\d+", "0", json.dumps(one.state_dict()))))
    assert len(sizes) == 1 and min(c // t for c, t in zip(one.counts, one.totals, strict=True)) >= 1
    two = BatchReader(TokenData(tiny_data), 256, 32, seed=2)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(100, 130):
        [a], [b] = one.next_batch(step, weights), two.next_batch(step, weights)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.domain, b.domain)
    with pytest.raises(ValueError, match="animals"):
        BatchReader(TokenData(tiny_data, ["sums"]), 256, 8, seed=2).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    "weights", [[0.5, 0.5], [0.5, 0.6, -0.1], [0.5, 0.5, np.nan], [0.5, 0.5, 0.5], [np.inf, 0, 0], [0, 0, 0]]
)
def test_weights_that_are_none(tiny_data, weights):
    with pytest.raises(ValueError, match="weights must be 3 numbers"):
        BatchReader(TokenData(tiny_data), 64, 4, seed=0).draw(0, weights)


def test_subset_of_domains(tiny_data):
    data = TokenData(tiny_data, ["sums", "animals"])
    assert data.domains == ["sums", "animals"]
    [(tokens, domains, _)] = BatchReader(data, 64, 4, seed=0).next_batch(0, [1, 0])
    assert (domains == 0).all() and set(tokens.ravel().tolist()) <= {*b"0123456789+=;\n", 256}
    with pytest.raises(ValueError, match="did you mean animals"):
        TokenData(tiny_data, ["animal"])
    with pytest.raises(ValueError, match="it has animals, brackets, sums"):
        TokenData(tiny_data, ["zzz"])
    with pytest.raises(ValueError, match="shorter than one sequence"):
        BatchReader(data, 10**6, 4, seed=0)


def edit_meta(**changes):
    def edit(path: Path):
        meta = json.loads((path / "meta.json").read_text()) | changes
        (path / "meta.json").write_text(json.dumps(meta))

    return edit


def add_token(token: int):
    def edit(path: Path):
        file = path / "sums" / "val.bin"
        file.write_bytes(file.read_bytes()[:-2] + token.to_bytes(2, "little"))

    return edit


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "first run `python prepare_data.py"),
        (lambda p: (p / "meta.json").unlink(), "first run `python prepare_data.py"),
        (lambda p: (p / "meta.json").write_text("{"), "meta.json"),
        (lambda p: (p / "meta.json").write_text("{}"), "'format' is missing"),
        (edit_meta(format=2), "format 2, not 1"),
        (edit_meta(dtype="uint32"), "uint32 tokens; it is damaged"),
        (edit_meta(dtype="int7"), "'int7' is missing or unknown"),
        (edit_meta(vocab_size=200), "outside the vocabulary of 200"),
        (add_token(257), "token 257 is outside the vocabulary of 257"),
        (lambda p: (p / "sums" / "test.bin").unlink(), "test.bin: 0 bytes"),
        (lambda p: (p / "sums" / "train.bin").open("ab").write(b"\0"), "train.bin"),
    ],
)
def test_damaged_data_is_refused(tiny_data, tmp_path, damage, message):
    path = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    TokenData(path)
    damage(path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TokenData(path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_data_without_the_key_bos(tiny_data, bpe_file, bos_file, tmp_path):
    """Prepared before meta.json said whether a token starts each document: right only where the tokenizer has none."""
    path = Path(shutil.copytree(tiny_data, tmp_path / "old"))
    meta = json.loads((path / "meta.json").read_text())
    meta.pop("bos", None)
    (path / "meta.json").write_text(json.dumps(meta))
    assert TokenData(path).bos is None
    for file, n_vocab in ((bpe_file, 400), (bos_file, 401)):
        (path / "meta.json").write_text(json.dumps(meta | {"tokenizer": str(file), "vocab_size": n_vocab}))
        if file == bpe_file:
            assert TokenData(path).bos is None
        else:
            with pytest.raises(ValueError, match="starts every text with one: delete it and prepare it again"):
                TokenData(path)


# --- the command --------------------------------------------------------------------------------------------------


def test_command_twice_and_with_other_options(tiny_corpus, tmp_path):
    args = [tiny_corpus, "--out", tmp_path / "a", "--window=128", "--held_out=0.1", "--workers=1"]
    for already in ("", ": already prepared"):
        done = run_cli(*args)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.endswith(f"{tmp_path / 'a'}{already}\n") and re.search(r"sums +1\d\d ", done.stdout)
    done = run_cli(*args, "--seed=1")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "exists, made with seed 0, not 1; delete it or choose another --out" in done.stderr


def test_command_warns_of_shared_text(tmp_path):
    folder = write_near_duplicates(tmp_path / "c")
    args = [folder, "--out", tmp_path / "a", "--window=128", "--held_out=0.2", "--workers=1"]
    done = run_cli(*args)
    assert re.search(r"copied .* [3-6]\d\.\d %\n", done.stdout) and re.search(r"own .* 0\.0 %\n", done.stdout)
    assert re.search(r"warning: domain copied: [3-6]\d\.\d % of the held-out text stands word for word", done.stdout)
    assert "warning: domain own" not in done.stdout
    done = run_cli(*args, "--drop_shared")
    assert done.returncode == 2 and "made with drop_shared False, not True" in done.stderr


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
        ([b'{"text": '], [], "x.jsonl:2: not valid JSON"),
    ],
)
def test_mistakes_are_one_line(tmp_path, source, args, message):
    source = bad_folder(tmp_path, *source) if isinstance(source, list) else tmp_path / source
    done = run_cli(source, "--out", tmp_path / "out" / "x", *args)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert message in done.stderr and done.stderr.startswith("prepare_data.py: ")
    assert not list(tmp_path.glob("out/*")) + list(tmp_path.glob("out/.*"))


@pytest.mark.parametrize(
    "lines, options, message",
    [
        ([b'{"txt": "a"}'], {}, r"x.jsonl:2: a line must be an object"),
        ([b'"text"'], {}, r"x.jsonl:2: a line must be an object"),
        ([b'{"text": 3}'], {}, r"x.jsonl:2: a line must be an object"),
        ([b'{"text": "a", "x": ' + b"[" * 50_000], {}, r"x.jsonl:2: JSON that is nested too deeply"),
        ([], {"domain_field": "meta.set"}, r"x.jsonl:1: no domain in the field meta.set"),
        ([b'{"text": "a"}'], {}, r"domain d: it has .* held-out windows.*raise --held_out or lower --window"),
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
    with pytest.raises(ValueError, match="in sub-folders, one per domain"):
        prepare(str(tmp_path), tmp_path / "out")
    with pytest.raises(ValueError, match="exists and is no data set"):
        prepare(str(tiny_corpus), tmp_path / "d")
    (tmp_path / "d" / "x.jsonl.gz").write_bytes(gzip.compress(jsonl(texts_for("z")))[:-20])
    with pytest.raises(ValueError, match=r"x.jsonl.gz:\d+: "):
        prepare(str(tmp_path), tmp_path / "out")
    (tmp_path / "d" / "x.jsonl.gz").rename(tmp_path / "d" / "x.jsonl.zst")
    zstandard = pytest.importorskip("zstandard")
    with pytest.raises(ValueError, match=r"x.jsonl.zst:0: zstd"):
        prepare(str(tmp_path), tmp_path / "out")
    frames = [zstandard.compress(jsonl(texts_for(x, 4000))) for x in "ab"]
    for cut in (0, 10, len(frames[0]) // 2, len(frames[0]) - 1, len(frames[0]) + 5, sum(map(len, frames)) - 1):
        (tmp_path / "d" / "x.jsonl.zst").write_bytes(b"".join(frames)[:cut])
        with pytest.raises(ValueError, match=r"x.jsonl.zst:\d+: (the file is cut short|zstd)"):
            list(read_file("d", tmp_path / "d" / "x.jsonl.zst"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match="pip install zstandard"):
        prepare(str(tmp_path), tmp_path / "out")

    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(tokenizer.tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="--tokenizer gpt2: cannot be downloaded.*use --tokenizer byte"):
        load_tokenizer("gpt2")
    (tmp_path / "sp.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\n\x00sentencepiece")
    with pytest.raises(ValueError, match="not Llama 3's rank file"):
        load_tokenizer(str(tmp_path / "sp.model"))
    ranks = b"".join(base64.b64encode(bytes([i])) + b" %d\n" % i for i in range(256))
    (tmp_path / "qwen.tiktoken").write_bytes(ranks)  # of another model, whose pattern nobody knows
    with pytest.raises(ValueError, match="qwen.tiktoken: not Llama 3's rank file"):
        load_tokenizer(str(tmp_path / "qwen.tiktoken"))
    (tmp_path / "out").mkdir()
    shutil.move(tmp_path / "out", tmp_path / ".new.partial")
    (tmp_path / "d" / "x.jsonl.zst").unlink()
    (tmp_path / "d" / "a.jsonl").write_bytes(jsonl(texts_for("z")))
    with pytest.raises(ValueError, match=r".new.partial: of another process .* or of one that was killed"):
        prepare(str(tmp_path), tmp_path / "new")
    assert (tmp_path / ".new.partial").is_dir()
    (tmp_path / "d" / "b.txt").write_bytes("Grüße".encode("utf-16"))
    with pytest.raises(ValueError, match="b.txt: this is UTF-16"):
        prepare(str(tmp_path), tmp_path / "other")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="not a tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="neither tokenizer.json nor tokenizer.model"):
        load_tokenizer(str(tmp_path / "d"))


def test_help_starts_with_the_commands():
    done = run_cli("--help")
    assert done.returncode == 0 and "python prepare_data.py installed --out" in "".join(done.stdout.splitlines()[:4])
