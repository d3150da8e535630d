"""Tokenizers, and the reader: what a batch holds is what the weights ask for, and damaged data are refused."""

import base64
import collections
import json
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from conftest import run
from scipy import stats

from plumbing import dataset, tokenizer
from plumbing.data import BatchReader
from plumbing.dataset import DamagedData, TokenData, folder_of
from plumbing.tokenizer import LLAMA3_PATTERN, load_tokenizer

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


# --- tokenizers ---------------------------------------------------------------------------------------------------


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
    assert tokenizer.decode([104, 267, 105]) == "hi"  # a model may have a larger vocabulary


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
    published = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    assert published == LLAMA3_PATTERN
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257, b" t": 258, b" the": 259}
    ranks |= {b"  ": 260, b"xx": 261, b"xxxx": 262}
    reference = tiktoken.Encoding("r", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for text in AWKWARD:
        ids = tokenizer.encode(text)
        assert ids.tolist() == reference.encode_ordinary(text) and tokenizer.decode(ids) == text
    assert tokenizer.encode("the the").tolist() == [257, 259]
    desert = " " * 1_500_000 + "x"  # more than the pattern's backtracking bears in one piece
    assert tokenizer.decode(tokenizer.encode(desert)) == desert


def test_the_end_of_a_text_is_the_first_that_a_config_names(bpe_file, tmp_path):
    """Else a name that is usual for base models, before one for chats."""
    import tokenizers

    library = tokenizers.Tokenizer.from_file(str(bpe_file))
    library.enable_padding(length=64)  # which is not for text that is prepared
    library.add_special_tokens(["<|im_end|>"])
    library.save(str(tmp_path / "tokenizer.json"))
    ids = library.get_vocab(with_added_tokens=True)
    assert load_tokenizer(str(tmp_path)).eot == ids["<|endoftext|>"]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [ids["</s>"], ids["<|im_end|>"]]}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.eot == ids["</s>"] and len(tokenizer.encode("cats")) < 5


def test_a_vocabulary_may_have_gaps(tmp_path):
    import tokenizers

    words = {"a": 0, "b": 7, "</s>": 9, "<unk>": 4}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    library.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    library.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path)).n_vocab == 10


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


def test_resume_is_exact(tiny_data):
    data, weights = TokenData(tiny_data), [0.2, 0.3, 0.5]
    one = BatchReader(data, 256, 32, seed=2)
    for step in range(100):  # several epochs
        one.draw(step, weights)
    assert min(c // t for c, t in zip(one.counts, one.totals, strict=True)) >= 1
    two = BatchReader(TokenData(tiny_data), 256, 32, seed=2)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for step in range(100, 130):
        [a], [b] = one.next_batch(step, weights), two.next_batch(step, weights)
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.domain, b.domain)
    # a stage that reads in the order of an earlier one, with one domain of three, and what the next one must know
    some = TokenData(tiny_data, ["sums"])
    three, four = BatchReader(some, 256, 32, seed=3), BatchReader(some, 256, 32, seed=3)
    assert three.go_on_after(one.state_dict()) is None
    four.load_state_dict(json.loads(json.dumps(three.state_dict())))
    assert all(np.array_equal(a, b) for a, b in zip(three.draw(0, [1.0]), four.draw(0, [1.0])))
    assert four.state_dict() == three.state_dict() and set(four.state_dict()["others"]) == {"animals", "brackets"}
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


def edit(change):
    """What changes meta.json; `change` does it to its content."""

    def edit_file(path: Path):
        meta = json.loads((path / "meta.json").read_text())
        change(meta)
        (path / "meta.json").write_text(json.dumps(meta))

    return edit_file


def change(*keys):
    """What sets the value at these keys of meta.json, the last of which is the value."""
    *way, last, value = keys

    def put(meta: dict):
        for key in way:
            meta = meta[key]
        meta[last] = value

    return edit(put)


def rename_domain(name: str):
    """What gives the domain sums another name, in an old meta.json and in a new one."""

    def rename(meta: dict):
        meta["domains"][name] = meta["domains"].pop("sums")

    return edit(rename)


def text_of_meta(text: str):
    return lambda path: (path / "meta.json").write_text(text)


def put_token(token: int, where: int = -1):
    """What puts a token into a file that holds 128 tokens a window."""

    def put(path: Path):
        file = path / "sums" / "val.bin"
        tokens = np.fromfile(file, "<u2")
        tokens[where] = token
        tokens.tofile(file)

    return put


@pytest.mark.parametrize(
    "damage, message",
    [
        (shutil.rmtree, "first run `python prepare_data.py"),
        (lambda p: (p / "meta.json").unlink(), "first run `python prepare_data.py"),
        (text_of_meta("{"), "meta.json: not a data set's description: "),
        (text_of_meta(""), "meta.json: not a data set's description: "),
        (text_of_meta("[]"), "Expected `object`, got `array`"),
        (text_of_meta("{}"), "missing required field `format`"),
        (text_of_meta('{"options": ' + '{"a": ' * 100_000), "nested too deep"),
        (text_of_meta('{"x": ' + "[" * 100_000), "nested too deep"),
        (change("format", 2), "format 2, not 1"),
        (change("dtype", "uint32"), "uint32 tokens; it is damaged"),
        (change("dtype", "int7"), "`$.dtype`"),
        (change("dtype", ["uint16"]), "`$.dtype`"),
        (change("vocab_size", 200), "outside the vocabulary of 200"),
        (change("vocab_size", 0), "`$.vocab_size`"),
        (change("vocab_size", 2**70), "`$.vocab_size`"),
        (change("window", 0), "`$.window`"),
        (change("window", 10**400), "`$.window`"),
        (change("eot", "256"), "Expected `int`, got `str` - at `$.eot`"),
        (change("eot", 257), "eot is 257, outside the vocabulary of 257"),
        (change("eot", None), "`$.eot`"),
        (change("bos", 300), "bos is 300, outside the vocabulary of 257"),
        (change("tokenizer", ""), "`$.tokenizer`"),
        (change("shared", "sums", 2), "`$.shared[...]`"),
        (change("domains", {}), "`$.domains`"),
        (change("domains", "sums", []), "`$.domains[...]`"),
        (change("domains", "sums", {}), "missing required field `train`"),
        (change("domains", "sums", "val", "bytes", -1), "`$.domains[...].val.bytes`"),
        (change("domains", "sums", "val", "bytes", 0), "`$.domains[...].val.bytes`"),
        (change("domains", "sums", "val", "tokens", 0), "`$.domains[...].val.tokens`"),
        (change("domains", "sums", "val", "tokens", 2**70), "`$.domains[...].val.tokens`"),
        (change("domains", "sums", "val", "documents", 1.5), "`$.domains[...].val.documents`"),
        (change("files", "sums", "val", "crc32", "123"), "`$.files[...].val.crc32`"),
        (change("files", "sums", "val", "max_id", 257), "val of sums has the id 257"),
        (rename_domain("../sums"), "%2E.%2Fsums/train.bin: 0 bytes where"),
        (rename_domain("a/b"), "a%2Fb/train.bin: 0 bytes where"),
        (rename_domain(".."), "%2E./train.bin: 0 bytes where"),
        (rename_domain("/etc"), "%2Fetc/train.bin: 0 bytes where"),
        (rename_domain("a\0"), "'a\\x00' cannot be a domain's name"),
        (rename_domain("a\n"), "'a\\n' cannot be a domain's name"),
        (rename_domain(" "), "' ' cannot be a domain's name"),
        (rename_domain("x" * 300), "longer than 255 bytes"),
        (put_token(257), "has the id 257, outside the vocabulary of 257; it is damaged"),
        (lambda p: (p / "sums" / "test.bin").unlink(), "test.bin: 0 bytes"),
        (lambda p: (p / "sums" / "train.bin").open("ab").write(b"\0"), "train.bin"),
    ],
)
def test_damaged_data_is_refused(tiny_data, tmp_path, damage, message):
    path = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    damage(path)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        TokenData(path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_verify_reads_all(tiny_data, tmp_path, monkeypatch):
    """zlib's CRC-32 of each file; a data set that has none is read, but cannot be verified."""
    path = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    data = TokenData(path)
    for domain in data.domains:
        for split in ("train", "val", "test"):
            content, facts = (path / domain / f"{split}.bin").read_bytes(), data.meta["files"][domain][split]
            assert facts == {"crc32": f"{zlib.crc32(content):08x}", "max_id": int(np.frombuffer(content, "<u2").max())}
    data.verify()
    monkeypatch.setattr(dataset, "TOKENS_AT_ONCE", 100)
    data.verify()
    put_token(65, where=5)(path)  # a letter for another: only its checksum tells
    with pytest.raises(ValueError, match=r"sums/val.bin: its CRC-32 is [0-9a-f]{8}, meta.json says [0-9a-f]{8}"):
        TokenData(path).verify()
    edit(lambda meta: meta.pop("files"))(path)
    old = TokenData(path)
    edit(lambda meta: meta.pop("files"))(Path(shutil.copytree(tiny_data, tmp_path / "without")))
    assert old.digest == TokenData(tmp_path / "without").digest != data.digest
    again = Path(shutil.copytree(tiny_data, tmp_path / "again"))  # as if made from other text of the same counts
    edit(lambda meta: meta["files"]["sums"]["val"].update(crc32="0" * 8))(again)
    assert TokenData(again).digest != data.digest == TokenData(tiny_data).digest
    with pytest.raises(ValueError, match="has no checksums"):
        old.verify()


def test_an_id_that_comes_later_is_found(tiny_data, tmp_path):
    """A file that was changed after it was opened: the reader names the file and the position."""
    path = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    data = TokenData(path)
    put_token(60_000, where=300)(path)
    message = r"sums/val.bin: token 300 has the id 60000, outside the vocabulary of 257"
    assert len(data.read("sums", "val", 64, np.array([0, 3, 5]))) == 3
    with pytest.raises(DamagedData, match=message):
        data.read("sums", "val", 64, np.array([0, 3, 4]))
    with pytest.raises(DamagedData, match=message):
        data.eval_sequences("sums", "val", 128)


def test_a_run_on_damaged_data_ends_in_one_line(tiny_data, tmp_path, monkeypatch, capsys):
    """Between the places that are looked at when the data set is opened."""
    path = Path(shutil.copytree(tiny_data, tmp_path / "copy"))
    for file in path.glob("*/train.bin"):
        tokens = np.fromfile(file, "<u2")
        second = np.linspace(0, len(tokens) - 4096, 16, dtype=np.int64)[1]
        assert second > 4096
        tokens[4096:second] = 60_000
        tokens.tofile(file)
    args = [f"--data={path}", f"--out={tmp_path / 'out'}", "--steps=60", "--eval_interval=60"]
    assert run(monkeypatch, *args) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"train.py: .*/train.bin: token [\d,]+ has the id 60000, outside the vocabulary of 257; .*", error
    )


def test_folders_of_domains():
    """One to one, and as it is where a file system takes it."""
    names = [
        "C",
        "C++",
        "C#",
        "新闻_cn",
        "百科_cn",
        "a b",
        "a:b",
        "x.",
        "a/b",
        "a%2Fb",
        "a%b",
        ".x",
        "..",
        ".",
        "%2Ex",
        "é",
    ]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names) and folders[:8] == names[:8]
    assert [unquote(folder) for folder in folders] == names
    assert not any("/" in folder or folder.startswith(".") for folder in folders)


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
    (path / "meta.json").write_text(json.dumps(meta | {"tokenizer": "/moved", "vocab_size": 401}))
    with pytest.raises(ValueError, match="meta.json: its tokenizer /moved: no such file"):
        TokenData(path)
