"""Data: text -> tokens on disk, one file a domain, and the reader that draws batches by domain weight.

    python prepare_data.py installed --out data/installed     # text that every machine has, no download: the demo
    python prepare_data.py corpus --out data/mine --tokenizer gpt2               # one sub-folder of corpus/ a domain
    python prepare_data.py SlimPajama --out data/slimpajama --tokenizer Llama-2-7b-hf --workers 16 \\
        --domain_field meta.redpajama_set_name                            # the domain is a field of each jsonl line

A .txt file is a document; so is a line {"text": ...} of a .jsonl, .jsonl.gz or .jsonl.zst file. Exact duplicates are
dropped.

A document belongs to train or to the held-out pool as a hash of its text says, never to both. The pool's tokens are
cut into windows which go to val and test in turn: two separate small sets of documents differ a lot by chance.

    data/NAME/meta.json           format, tokenizer, vocab_size, eot, dtype, options; tokens, documents, bytes by split
    data/NAME/<domain>/train.bin  and val.bin, test.bin: little-endian uint16 (uint32 where the vocabulary is larger
                                  than 65,536), an eot token after each document

`bytes` counts the UTF-8 bytes of the text that a split's tokens stand for (eot: 0), so a loss in nats a token is
loss * tokens / bytes / ln 2 bits a byte, which can be compared between tokenizers.
"""

import argparse
import ast
import base64
import difflib
import gzip
import hashlib
import importlib.util
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import sysconfig
import warnings
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path

import numpy as np
import tiktoken
from tqdm import tqdm

from settings import user_errors

FORMAT = 1  # of the data set on disk; a reader refuses any other
SPLITS = ("train", "val", "test")
SEEN_SLOTS = 1 << 22  # documents that are remembered when duplicates are looked for, 8 bytes each
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}

# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers. Both classes have the same face:
#   name, n_vocab, eot               for load_tokenizer() to load it again; largest id + 1; id of the end-of-text token
#   encode(text) -> uint32 (n,)      no token is added, and text that looks like a special token stays text
#   encode_with_bytes(text) -> ids, uint32 (n,)      the UTF-8 bytes of text that each id stands for
#   decode(ids) -> str               bytes that are no UTF-8 become U+FFFD


class TiktokenTokenizer:
    """byte, OpenAI's encodings and Llama 3's rank file, by the tiktoken library."""

    def __init__(self, name: str, encoding: tiktoken.Encoding, eot: int):
        self.name, self.encoding, self.eot, self.n_vocab = name, encoding, eot, encoding.n_vocab

    def encode(self, text: str) -> np.ndarray:
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # the pattern's backtracking gives up on enormous runs of white space
            parts = [text[i : i + 10_000] for i in range(0, len(text), 10_000)]
            return np.concatenate([self.encoding.encode_to_numpy(p, disallowed_special=()) for p in parts])

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = np.zeros(self.n_vocab, np.uint32)
        for i in range(self.n_vocab):
            try:
                sizes[i] = len(self.encoding.decode_single_token_bytes(i))
            except KeyError:
                pass  # cl100k_base has gaps between its special tokens
        return sizes

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        return ids, self._token_bytes[ids]

    def decode(self, ids: Iterable[int]) -> str:
        return self.encoding.decode([int(i) for i in ids], errors="replace")


class HuggingFaceTokenizer:
    """A tokenizer.json, by the tokenizers library."""

    def __init__(self, name: str, file: Path):
        import tokenizers

        try:
            self.tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises a bare Exception
            raise ValueError(f"{file}: not a tokenizer.json of the tokenizers library: {error}") from None
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        vocabulary = self.tokenizer.get_vocab(with_added_tokens=True)
        self.name, self.eot = name, self._find_eot(file, vocabulary)
        self.n_vocab = max(self.eot, *vocabulary.values()) + 1

    @staticmethod
    def _find_eot(file: Path, vocabulary: dict[str, int]) -> int:
        for beside in ("tokenizer_config.json", "config.json"):
            if (file.parent / beside).is_file():
                config = json.loads((file.parent / beside).read_text(encoding="utf-8"))
                token, ids = config.get("eos_token"), config.get("eos_token_id")
                token = token.get("content") if isinstance(token, dict) else token
                if token in vocabulary:
                    return vocabulary[token]
                if ids is not None:
                    return ids[0] if isinstance(ids, list) else ids
        for token in ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>", "<|eot_id|>", "<|im_end|>"):
            if token in vocabulary:
                return vocabulary[token]
        raise ValueError(f"{file}: which token ends a text? Name it as eos_token in a tokenizer_config.json beside it")

    def encode(self, text: str) -> np.ndarray:
        return np.array(self.tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_with_bytes(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """A token's bytes reach from the furthest end of the tokens before it to its own, by the library's offsets."""
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        point = np.frombuffer(text.encode("utf-32-le"), np.uint32)
        position = np.concatenate([[0], np.cumsum(1 + (point > 0x7F) + (point > 0x7FF) + (point > 0xFFFF))])
        ends = np.maximum.accumulate(np.array([end for _, end in encoding.offsets], np.int64))
        ends[-1:] = len(text)  # what a normalizer dropped at the end of the text counts too
        return np.array(encoding.ids, np.uint32), np.diff(position[ends], prepend=0).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)


Tokenizer = TiktokenTokenizer | HuggingFaceTokenizer

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [  # in the order of their ids, which follow the ranks
    *("<|begin_of_text|>", "<|end_of_text|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(4)),
    *("<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>"),
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]


def load_tokenizer(spec: str) -> Tokenizer:
    """The tokenizer `spec` names: byte, a tiktoken encoding (gpt2, cl100k_base), a file, or a folder that holds one.

    A file is a tokenizer.json, or Llama 3's tokenizer.model (lines of base64 and rank). Raises ValueError.
    """
    if spec == "byte":
        # In pieces of 32 bytes encoding runs at 50 MB/s, in single ones at 12; it is linear in the length either way.
        ranks = {bytes([i]): i for i in range(256)}
        special = {"<|endoftext|>": 256}
        encoding = tiktoken.Encoding(spec, pat_str=r"[\s\S]{1,32}", mergeable_ranks=ranks, special_tokens=special)
        return TiktokenTokenizer(spec, encoding, eot=256)
    names = tiktoken.list_encoding_names()
    if spec in names:
        try:
            encoding = tiktoken.get_encoding(spec)
        except OSError:
            raise ValueError(
                f"--tokenizer {spec}: cannot be downloaded, which tiktoken does the first time (no network?); "
                "use --tokenizer byte, or the path of a tokenizer.json"
            ) from None
        return TiktokenTokenizer(spec, encoding, encoding.eot_token)
    path = file = Path(spec).resolve()
    if path.is_dir():
        file = next((path / n for n in ("tokenizer.json", "tokenizer.model") if (path / n).is_file()), None)
        if file is None:
            raise ValueError(f"--tokenizer {spec}: the folder holds neither tokenizer.json nor tokenizer.model")
    elif not path.is_file():
        near = difflib.get_close_matches(spec, ["byte", *names], n=1)
        hint = f"; did you mean {near[0]}?" if near else f"; the names are byte, {', '.join(names)}"
        raise ValueError(f"--tokenizer {spec}: no such file or folder, nor a tokenizer's name{hint}")
    if file.suffix == ".json":
        return HuggingFaceTokenizer(str(path), file)
    try:
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, file.read_bytes().splitlines())}
        special = {token: max(ranks.values()) + 1 + i for i, token in enumerate(LLAMA3_SPECIAL)}
        encoding = tiktoken.Encoding(file.name, pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens=special)
    except ValueError:
        raise ValueError(
            f"{file}: not a tiktoken rank file (lines of base64 and rank); "
            "of a SentencePiece model use the tokenizer.json that is published beside it"
        ) from None
    return TiktokenTokenizer(str(path), encoding, special["<|end_of_text|>"])


# ---------------------------------------------------------------------------------------------------------------------
# Reading documents. A reader takes (domain, file) and yields (domain, text, bytes of the file read so far).

Document = tuple[str, str, int]


def read_file(domain: str | None, path: Path, domain_field: str | None = None) -> Iterator[Document]:
    """The documents of a user's .txt or jsonl file; with `domain_field` each line names its domain itself.

    A file is never held whole but for .txt. Raises ValueError with the file and line.
    """
    number, broken = 0, (ValueError, EOFError, zlib.error, gzip.BadGzipFile)
    with open(path, "rb") as raw:
        stream = raw
        if path.suffix == ".txt":
            yield domain, raw.read().decode("utf-8", errors="replace"), raw.tell()
            return
        if path.suffix == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        if path.suffix == ".zst":
            try:
                import zstandard
            except ImportError:
                raise ValueError(f"{path}: to read .zst files, `pip install zstandard`") from None
            stream = io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
            broken += (zstandard.ZstdError,)
        try:
            for line in io.TextIOWrapper(stream, encoding="utf-8", errors="replace"):
                number += 1
                if line.strip():
                    name, text = parse_line(line, domain_field)
                    yield name or domain, text, raw.tell()
        except broken as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def parse_line(line: str, domain_field: str | None) -> tuple[str | None, str]:
    """(domain or None, text) of a jsonl line. Domains that differ only in what no file name may hold become one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('a line must be an object with the document in "text", as {"text": "..."}')
    if domain_field is None:
        return None, record["text"]
    value = record
    for key in domain_field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    name = re.sub(r"[^\w.-]+", "_", str(value), flags=re.ASCII).strip("._")
    if value is None or isinstance(value, dict | list) or not name:
        raise ValueError(f"no domain in the field {domain_field} (--domain_field); the line has {', '.join(record)}")
    return name, record["text"]


def folder_files(folder: Path, domain_field: str | None) -> list[tuple[str | None, Path]]:
    """[(domain, file)] of a user's folder, sorted; the domain is None where each line names it."""
    endings = (".jsonl", ".jsonl.gz", ".jsonl.zst") + (() if domain_field else (".txt",))
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; SOURCE is a folder of text, or the word installed")
    tops = [folder] if domain_field else sorted(p for p in folder.glob("[!.]*") if p.is_dir())
    files = []
    for top in tops:
        found = sorted(p for p in top.rglob("*") if p.name.endswith(endings) and p.is_file())
        files += [(None if domain_field else top.name, path) for path in found]
        if not found:
            print(f"{top}: left out, it holds no {', '.join(endings)} file")
    if not files:
        layout = "" if domain_field else " in sub-folders, one a domain (does each line name it? Give --domain_field)"
        raise ValueError(f"{folder}: no {', '.join(endings)} files{layout}")
    return files


# What this project's requirements and Python itself put on every machine, as domains that differ in kind:
#   cpp         torch's C++ headers, without the thousands of generated one-operator ones
#   docstrings  of numpy, scipy, torch and matplotlib: scientific English, reST and examples
#   fonts       Adobe font metrics, a folder of matplotlib's: columns of names and numbers
#   licences    of every installed package: legal English
#   python      the standard library's source
#   readmes     long descriptions in the packages' metadata: Markdown
#   reference   the Python language reference as pydoc_data.topics has it: English prose
INSTALLED_MB = 4  # of each domain: enough for minutes on a laptop
GENERATED = 200_000  # bytes from which a source file is nearly always generated
NOT_LIBRARY = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def installed_files() -> list[tuple[str, Path]]:
    """[(domain, file)], sorted; a package that is missing only makes its domain smaller."""

    def package(name: str) -> Path:  # found, not imported: importing torch takes seconds
        spec = importlib.util.find_spec(name)
        return Path(spec.origin).parent if spec and spec.origin else Path("no such package")

    def source(top: Path, pattern: str) -> list[Path]:
        found = (p for p in top.rglob(pattern) if NOT_LIBRARY.isdisjoint(p.relative_to(top).parts))
        return [p for p in found if p.is_file() and p.stat().st_size < GENERATED]

    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [("python", p) for p in source(stdlib, "*.py")]
    files += [("cpp", p) for p in source(package("torch") / "include", "*.h") if p.parts[-3:-1] != ("ATen", "ops")]
    files += [("docstrings", p) for n in ("numpy", "scipy", "torch", "matplotlib") for p in source(package(n), "*.py")]
    files += [("fonts", p) for p in (package("matplotlib") / "mpl-data" / "fonts").rglob("*.afm")]
    files += [("reference", stdlib / "pydoc_data" / "topics.py"), ("licences", stdlib / "LICENSE.txt")]
    for path in (path for distribution in metadata.distributions() for path in distribution.files or []):
        if re.match(r"(?i)(licen[cs]e|copying|notice)(?!.*\.(py|pyc|h|json)$)", path.name):
            files.append(("licences", Path(path.locate())))
        elif path.name == "METADATA" and path.parent.name.endswith(".dist-info"):
            files.append(("readmes", Path(path.locate())))
    return sorted({(domain, path) for domain, path in files if path.is_file()})


def read_installed(domain: str, path: Path) -> Iterator[Document]:
    """The file's documents: few files are few chances for the held-out pool, so each is cut into sections."""
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    documents = [text]
    if domain == "readmes":
        documents = [text.partition("\n\n")[2]]  # below the header fields
    elif domain in ("docstrings", "reference"):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of escapes in other people's strings
                nodes = list(ast.walk(ast.parse(text)))
        except (SyntaxError, ValueError, RecursionError):
            return  # written for another version of Python
        if domain == "docstrings":
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            documents = [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
        else:
            documents = [node.value for node in nodes if isinstance(node, ast.Constant)]
        documents = [text for text in documents if isinstance(text, str) and len(text) >= 300]
    for document in documents:
        for section in sections(document):
            yield domain, section, path.stat().st_size


def sections(text: str, size: int = 4096) -> Iterator[str]:
    """Cut `text` at the first blank line after `size` characters, or at a line's end where none comes soon."""
    while len(text) > 3 * size // 2:
        cut = text.find("\n\n", size, 3 * size // 2) + 1 or text.find("\n", size) + 1 or len(text)
        yield text[:cut]
        text = text[cut:]
    yield text


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens on disk.


def select(files, read, bar: tqdm, seed: int, held_out: float, limit: int) -> Iterator[tuple[str, bool, str]]:
    """(domain, held out?, text) of every document once, until a domain has `limit` bytes (0: all of it).

    One keyed hash of the text decides both. Fingerprints are kept in a table of fixed size in which the newest takes
    a slot: on huge data a duplicate may pass, but memory stays constant and no unique document is lost.
    """
    seen = np.zeros(SEEN_SLOTS, np.uint64)
    taken = Counter()
    for domain, path in files:
        done, size = 0, path.stat().st_size
        for name, text, position in [] if limit and taken[domain] >= limit else read(domain, path):
            bar.update(position - done)
            done = position
            if limit and taken[name] >= limit or not text.strip():
                continue
            data = text.encode("utf-8", errors="replace")  # JSON can hold half a surrogate pair, UTF-8 cannot
            digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest()
            fingerprint = int.from_bytes(digest, "little") or 1  # 0 is an empty slot
            slot = fingerprint % len(seen)
            if int(seen[slot]) == fingerprint:
                continue
            seen[slot] = fingerprint
            taken[name] += len(data)
            yield name, fingerprint < held_out * 2**64, data.decode()
        bar.update(size - done)


def batches(documents: Iterable[tuple[str, bool, str]], size: int = 1 << 20) -> Iterator[list]:
    """Lists of documents of about `size` characters: what one process encodes at a time."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document[2])
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_batch(tokenizer: Tokenizer, batch: list[tuple[str, bool, str]]) -> list:
    """[(domain, held out?, ids with eots, bytes)], one a pair that occurs.

    `bytes` is an array: one number an id for held-out text, which is cut anywhere; one a document for train.
    """
    parts = {}
    for domain, held, text in batch:
        if held:
            ids, sizes = tokenizer.encode_with_bytes(text)
            sizes = np.append(sizes, np.uint32(0))
        else:
            ids, sizes = tokenizer.encode(text), np.array([len(text.encode())], np.uint32)
        parts.setdefault((domain, held), []).append((np.append(ids, np.uint32(tokenizer.eot)), sizes))
    return [(*key, *map(np.concatenate, zip(*values, strict=True))) for key, values in parts.items()]


def start_worker(spec: str):
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global worker_tokenizer
    worker_tokenizer = load_tokenizer(spec)


def encode_in_worker(batch: list) -> list:
    return encode_batch(worker_tokenizer, batch)


def encode_all(groups: Iterable[list], tokenizer: Tokenizer, workers: int) -> Iterator[list]:
    """encode_batch of each group, in order; few groups are in flight, so memory does not grow with the data."""
    if workers == 1:
        yield from map(partial(encode_batch, tokenizer), groups)
        return
    context = multiprocessing.get_context("spawn")  # the same everywhere, and safe beside other libraries' threads
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer.name,)) as pool:
        try:
            pending = deque()
            for group in groups:
                pending.append(pool.submit(encode_in_worker, group))
                if len(pending) > 2 * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ValueError("--workers: a process died, perhaps for lack of memory; use fewer") from None


class DomainWriter:
    """The three token files of one domain, with their counts."""

    def __init__(self, folder: Path, dtype: str, window: int, eot: int):
        folder.mkdir()
        self.folder, self.dtype, self.window, self.eot = folder, DTYPES[dtype], window, eot
        self.files = {split: open(folder / f"{split}.bin", "wb") for split in SPLITS}
        self.counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        self.windows = 0  # of the held-out pool so far
        self.rest = np.empty(0, np.uint32), np.empty(0, np.uint32)  # its last tokens, not yet a window, and their bytes

    def write(self, split: str, ids: np.ndarray, sizes: np.ndarray):
        self.files[split].write(ids.astype(self.dtype).tobytes())
        counts = self.counts[split]
        counts["tokens"] += len(ids)
        counts["documents"] += int((ids == self.eot).sum())  # those that end here
        counts["bytes"] += int(sizes.sum())

    def add(self, held: bool, ids: np.ndarray, sizes: np.ndarray):
        if not held:
            return self.write("train", ids, sizes)
        ids, sizes = np.concatenate([self.rest[0], ids]), np.concatenate([self.rest[1], sizes])
        end = len(ids) - len(ids) % self.window
        for start in range(0, end, self.window):
            part = slice(start, start + self.window)
            self.write(("val", "test")[self.windows % 2], ids[part], sizes[part])
            self.windows += 1
        self.rest = ids[end:], sizes[end:]

    def close(self):
        for file in self.files.values():
            file.close()

    def too_small(self) -> str:
        """What is missing for the domain to be usable, or nothing."""
        tokens = self.counts["train"]["tokens"]
        if self.windows < 2 or tokens < self.window:
            return f"{tokens:,} train tokens and {self.windows} held-out windows, {self.window:,} and 2 are needed"


def prepare(
    source: str,
    out: Path | str,
    tokenizer: str = "byte",
    workers: int = 1,
    held_out: float = 0.05,
    window: int = 1024,
    seed: int = 0,
    max_mb: float | None = None,
    domain_field: str | None = None,
) -> bool:
    """Build the data set `out` from `source`; False when it is there already, made with the same arguments.

    Until it is whole it is a hidden folder beside `out`; an error, or Ctrl-C, removes that.
    `held_out` is the share of documents, `window` in tokens, `max_mb` 10^6 bytes of text a domain (0: no limit; None:
    no limit but for `installed`). What is written does not depend on `workers`. Raises ValueError, OSError.
    """
    installed, out = source == "installed", Path(out)
    if max_mb is None:
        max_mb = INSTALLED_MB if installed else 0
    for key, value, fine, need in (
        ("held_out", held_out, 0 < held_out < 1, "between 0 and 1"),
        ("window", window, window >= 2, "2 or more"),
        ("workers", workers, workers >= 1, "1 or more"),
        ("seed", seed, 0 <= seed < 2**63, "0 or more"),
        ("max_mb", max_mb, 0 <= max_mb < float("inf"), "0 (no limit) or more"),
        ("domain_field", domain_field, not (installed and domain_field), "for a folder of jsonl files, not installed"),
    ):
        if not fine:
            raise ValueError(f"--{key}: {value} is out of range, it must be {need}")
    encoder = load_tokenizer(tokenizer)
    options = {"source": source if installed else str(Path(source).resolve()), "tokenizer": encoder.name}
    options |= {"held_out": held_out, "window": window, "seed": seed, "max_mb": max_mb, "domain_field": domain_field}
    if out.exists():
        check_same(out, options)
        return False

    read = read_installed if installed else partial(read_file, domain_field=domain_field)
    files = installed_files() if installed else folder_files(Path(source), domain_field)
    random.Random(seed).shuffle(files)  # so that a limit takes a fair choice, not the first by name
    dtype = "uint16" if encoder.n_vocab <= 2**16 else "uint32"
    total = sum(path.stat().st_size for _, path in files)
    print(f"{source}: reading {len(files):,} files, {total / 1e6:,.1f} MB", flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial_out = out.parent / f".{out.name}.{os.getpid()}.partial"
    partial_out.mkdir()
    writers = {}

    def writer_of(domain: str) -> DomainWriter:
        if domain not in writers:
            if len(writers) == 256:
                raise ValueError(f"{source}: more than 256 domains; is the --domain_field {domain_field} the domain?")
            writers[domain] = DomainWriter(partial_out / domain, dtype, window, encoder.eot)
        return writers[domain]

    try:
        for domain in sorted({domain for domain, _ in files if domain}):
            writer_of(domain)  # also of a domain that turns out to be empty, which is an error below
        with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
            documents = select(files, read, bar, seed, held_out, int(max_mb * 1e6))
            for encoded in encode_all(batches(documents), encoder, workers):
                for domain, held, ids, sizes in encoded:
                    writer_of(domain).add(held, ids, sizes)
        for domain, writer in sorted(writers.items()):
            writer.close()
            if small := writer.too_small():
                if not installed:
                    raise ValueError(f"domain {domain}: it has {small}; raise --held_out or lower --window")
                print(f"{domain}: left out, it has {small}")
                shutil.rmtree(writers.pop(domain).folder)
        if len(writers) < (2 if installed else 1):
            raise ValueError(f"{source}: {len(writers)} domains have enough text; lower --window or raise --max_mb")
        meta = {"format": FORMAT, "tokenizer": encoder.name, "vocab_size": encoder.n_vocab, "eot": encoder.eot}
        meta |= {"dtype": dtype, "window": window, "seed": seed, "options": options}
        meta["domains"] = {domain: writers[domain].counts for domain in sorted(writers)}
        (partial_out / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        partial_out.rename(out)
    finally:
        for writer in writers.values():
            writer.close()
        shutil.rmtree(partial_out, ignore_errors=True)
    return True


def check_same(out: Path, options: dict):
    """ValueError unless `out` is a data set made with `options`."""
    try:
        there = json.loads((out / "meta.json").read_text(encoding="utf-8"))["options"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: exists and is no data set; choose another --out") from None
    other = [f"{key} {there.get(key)}, not {value}" for key, value in options.items() if there.get(key) != value]
    if other:
        raise ValueError(f"{out}: exists, made with {'; '.join(other)}; delete it or choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# Reading tokens.


class TokenData:
    """A prepared data set, opened and checked; the files are mapped, not read.

    path         its folder                              domains     names, sorted or in the order asked for
    meta         meta.json                               vocab_size  largest id + 1
    tokenizer    for load_tokenizer()                    eot         id of the token after each document

    `domains` restricts it to some domains, in that order. Raises ValueError for whatever is wrong with the files.
    """

    def __init__(self, path: Path | str, domains: list[str] | None = None):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "meta.json").read_text(encoding="utf-8"))
            if self.meta["format"] != FORMAT:
                raise ValueError(f"format {self.meta['format']}, not {FORMAT}: delete it and prepare it again")
            self.tokenizer, self.vocab_size, self.eot = (self.meta[k] for k in ("tokenizer", "vocab_size", "eot"))
            dtype = DTYPES[self.meta["dtype"]]
            counts = {d: {s: self.meta["domains"][d][s]["tokens"] for s in SPLITS} for d in self.meta["domains"]}
        except FileNotFoundError:
            raise ValueError(
                f"{self.path}: no data set there (no meta.json); first run "
                f"`python prepare_data.py installed --out {self.path}`, or with a folder of text for installed"
            ) from None
        except (KeyError, TypeError) as error:
            raise ValueError(f"{self.path / 'meta.json'}: not a data set's: {error} is missing or unknown") from None
        except ValueError as error:
            raise ValueError(f"{self.path / 'meta.json'}: {error}") from None
        self.domains = sorted(counts) if domains is None else list(domains)
        for domain in self.domains:
            if domain not in counts:
                near = difflib.get_close_matches(domain, counts, n=1)
                hint = f", did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(counts))}"
                raise ValueError(f"{self.path}: no domain {domain}{hint}")
        if not self.domains or len(set(self.domains)) < len(self.domains):
            raise ValueError(f"{self.path}: the domains asked for must be at least one, each once: {self.domains}")
        self._tokens = {(d, s): self._open(d, s, counts[d][s], dtype) for d in self.domains for s in SPLITS}

    def _open(self, domain: str, split: str, n_tokens: int, dtype: np.dtype) -> np.memmap:
        file = self.path / domain / f"{split}.bin"
        size = file.stat().st_size if file.is_file() else 0
        if size != n_tokens * dtype.itemsize or not size:
            raise ValueError(
                f"{file}: {size:,} bytes where meta.json says {n_tokens:,} {self.meta['dtype']} tokens; "
                f"it is damaged: delete {self.path} and prepare it again"
            )
        tokens = np.memmap(file, dtype, mode="r")
        for start in np.linspace(0, max(0, n_tokens - 4096), 16, dtype=np.int64):  # a sample: 16 reads, however large
            if (largest := int(tokens[start : start + 4096].max())) >= self.vocab_size:
                raise ValueError(f"{file}: token {largest} is outside the vocabulary of {self.vocab_size}: damaged")
        return tokens

    def tokens(self, domain: str, split: str) -> np.memmap:
        """All tokens of a split, (n,), uint16 or uint32."""
        return self._tokens[domain, split]

    def sequences(self, domain: str, split: str, seq_len: int) -> int:
        """How many sequences of T = seq_len inputs there are; sequence i is tokens[i*T : i*T + T + 1]."""
        return (len(self._tokens[domain, split]) - 1) // seq_len

    def bytes_per_token(self, domain: str, split: str) -> float:
        """UTF-8 bytes of text a token; bits a byte = loss in nats / ln 2 / this."""
        counts = self.meta["domains"][domain][split]
        return counts["bytes"] / counts["tokens"]

    def read(self, domain: str, split: str, seq_len: int, indices: np.ndarray) -> np.ndarray:
        """The sequences with these numbers, int64 (len(indices), T+1)."""
        tokens, rows = self._tokens[domain, split], np.empty((len(indices), seq_len + 1), np.int64)
        for row, i in zip(rows, indices, strict=True):
            row[:] = tokens[int(i) * seq_len : int(i) * seq_len + seq_len + 1]
        return rows

    def eval_sequences(self, domain: str, split: str, seq_len: int, n: int = 0) -> np.ndarray:
        """int64 (n, T+1): `n` sequences evenly spread over the split; all of them when n is 0 or more than there are.

        Raises ValueError when the split is shorter than one sequence.
        """
        total = self.sequences(domain, split, seq_len)
        if total == 0:
            raise ValueError(
                f"{self.path}: {split} of domain {domain} has {len(self._tokens[domain, split]):,} tokens, too few for "
                f"one sequence of {seq_len}; use shorter sequences or prepare it with more --held_out"
            )
        n = min(n, total) or total
        return self.read(domain, split, seq_len, np.arange(n) * total // n)


class BatchReader:
    """Batches of training sequences, each sequence's domain drawn from the weights of the moment (DESIGN 2.7).

    A domain's sequences come in the order of a permutation keyed by (seed, domain, epoch): none comes back before all
    have come. What a batch holds follows from (seed, step, weights) and one counter a domain, which is all the state.
    """

    def __init__(self, data: TokenData, seq_len: int, batch_size: int, seed: int):
        self.data, self.seq_len, self.batch_size, self.seed = data, seq_len, batch_size, seed
        self.totals = [data.sequences(domain, "train", seq_len) for domain in data.domains]
        self.counts = [0] * len(data.domains)  # sequences drawn so far
        self._orders = {}  # domain index -> (epoch, permutation)
        for domain, total in zip(data.domains, self.totals, strict=True):
            if total == 0:
                raise ValueError(f"{data.path}: train of domain {domain} is shorter than one sequence of {seq_len}")

    def next(self, step: int, weights: np.ndarray, rows: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int64 (b, T+1) and domain indices int64 (b,) of `rows` of the global batch of this step.

        weights: (n domains,), summing to 1; 0 means never. Every rank must call it with the same step and weights:
        all rows are counted, `rows` are read. Raises ValueError for weights that are no distribution.
        """
        weights = np.asarray(weights, np.float64)
        if weights.shape != (len(self.totals),) or not (weights >= 0).all() or not abs(weights.sum() - 1) < 1e-3:
            names = ", ".join(self.data.domains)
            raise ValueError(
                f"domain weights must be {len(self.totals)} numbers >= 0 that sum to 1, for {names}: {weights}"
            )
        rng = np.random.default_rng([self.seed, step])
        domains = rng.choice(len(weights), size=self.batch_size, p=weights / weights.sum())
        sequences = np.array([self._advance(d) for d in domains], np.int64)
        domains, sequences = domains[rows], sequences[rows]
        tokens = np.empty((len(domains), self.seq_len + 1), np.int64)
        for d in np.unique(domains):
            mine = domains == d
            tokens[mine] = self.data.read(self.data.domains[d], "train", self.seq_len, sequences[mine])
        return tokens, domains

    def _advance(self, d: int) -> int:
        """Number of the next sequence of domain d."""
        epoch, i = divmod(self.counts[d], self.totals[d])
        if self._orders.get(d, (None,))[0] != epoch:
            # The last 1 sets this stream apart from those of `next`: numpy takes [s, t] and [s, t, 0] for the same key.
            rng = np.random.default_rng([self.seed, int(d), epoch, 1])
            self._orders[d] = epoch, rng.permutation(np.arange(self.totals[d], dtype=np.uint32))
        self.counts[d] += 1
        return int(self._orders[d][1][i])

    def tokens_seen(self) -> dict[str, int]:
        """Training tokens drawn so far, by domain."""
        return {domain: n * self.seq_len for domain, n in zip(self.data.domains, self.counts, strict=True)}

    def state_dict(self) -> dict[str, dict[str, int]]:
        return {"sequences": dict(zip(self.data.domains, self.counts, strict=True))}

    def load_state_dict(self, state: dict[str, dict[str, int]]):
        """Go on where state_dict() was taken. Raises ValueError when the domains are others."""
        if set(state["sequences"]) != set(self.data.domains):
            raise ValueError(
                f"{self.data.path}: the checkpoint was made with the domains {', '.join(sorted(state['sequences']))}, "
                f"the data has {', '.join(self.data.domains)}"
            )
        self.counts = [int(state["sequences"][domain]) for domain in self.data.domains]


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def table(data: TokenData) -> str:
    """One line a domain."""
    lines = [f"{'domain':<20}{'documents':>11}{'train':>15}{'val':>13}{'test':>13}{'MB':>11}{'bytes/token':>13}"]
    for domain in data.domains:
        counts = data.meta["domains"][domain]
        tokens = [counts[split]["tokens"] for split in SPLITS]
        documents, size = (sum(counts[split][key] for split in SPLITS) for key in ("documents", "bytes"))
        lines.append(
            f"{domain:<20}{documents:>11,}{tokens[0]:>15,}{tokens[1]:>13,}{tokens[2]:>13,}"
            f"{size / 1e6:>11,.2f}{data.bytes_per_token(domain, 'train'):>13.2f}"
        )
    return "\n".join(lines)


class Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Raise, so that a mistake is one line as everywhere else; name the nearest option."""
        if match := re.match(r"unrecognized arguments: (--\w+)", message):
            near = difflib.get_close_matches(match[1], self._option_string_actions, n=1)
            message += f", did you mean {near[0]}?" if near else "; --help lists the options"
        raise ValueError(message)


def main():
    parser = Parser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument
    add("source", metavar="SOURCE", help="the word installed, or a folder")
    add("--out", required=True, metavar="data/NAME", help="the data set to make")
    add("--tokenizer", default="byte", metavar="byte|gpt2|cl100k_base|FILE|DIR", help="byte, unless given")
    add("--workers", type=int, default=cores, help=f"processes that tokenize: {cores}, unless given")
    add("--held_out", type=float, default=0.05, help="share of the documents for val and test: 0.05")
    add("--window", type=int, default=1024, help="tokens in a row that go to val, then to test: 1024")
    add("--seed", type=int, default=0, help="of the split, and of the choice that --max_mb makes: 0")
    add("--max_mb", type=float, help=f"text of each domain, 10^6 bytes; 0: all. {INSTALLED_MB} for installed, else 0")
    add("--domain_field", metavar="A.B", help="field of each jsonl line that names its domain")
    with user_errors():
        args = parser.parse_args()
        try:
            made = prepare(**vars(args))
        except KeyboardInterrupt:
            print("\nprepare_data.py: interrupted; nothing was written", file=sys.stderr)
            sys.exit(130)
        print(table(TokenData(args.out)))
        print(args.out if made else f"{args.out}: already prepared")


if __name__ == "__main__":
    main()
