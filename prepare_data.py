"""Text -> tokens on disk, one file per domain and split (data.py reads them).

    python prepare_data.py installed --out data/installed     # text that every machine has, no download
    python prepare_data.py corpus --out data/mine --tokenizer gpt2               # one sub-folder of corpus/ a domain
    python prepare_data.py SlimPajama --out data/slimpajama --tokenizer Llama-2-7b-hf --workers 16 \\
        --domain_field meta.redpajama_set_name                            # the domain is a field of each jsonl line

A .txt file is a document; so is a line {"text": ...} of a .jsonl, .jsonl.gz or .jsonl.zst file. Exact duplicates are
dropped.

A document belongs to train or to the held-out pool as a hash of its text says, never to both. The pool's tokens are
cut into windows which go to val and test in turn: two separate small sets of documents differ a lot by chance.
"""

import argparse
import ast
import codecs
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
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.command_line import Parser, user_errors
from plumbing.data import DTYPES, FORMAT, SPLITS, TokenData
from plumbing.tokenizer import Tokenizer, fingerprint, load_tokenizer

SEEN_SLOTS = 1 << 22  # documents that are remembered when duplicates are looked for, 8 bytes each

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
        ending = path.suffix.lower()
        if ending == ".txt":
            data = raw.read()
            if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise ValueError(f"{path}: this is UTF-16; convert it to UTF-8")
            yield domain, data.decode("utf-8-sig", errors="replace"), raw.tell()
            return
        if ending == ".gz":
            stream = gzip.GzipFile(fileobj=raw)
        if ending == ".zst":
            try:
                import zstandard
            except ImportError:
                raise ValueError(f"{path}: to read .zst files, `pip install zstandard`") from None
            stream = io.BufferedReader(ZstdFrames(raw, zstandard.ZstdDecompressor()))
            broken += (zstandard.ZstdError,)
        try:
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace"):
                number += 1
                if line.strip():
                    name, text = parse_line(line, domain_field)
                    yield name or domain, text, raw.tell()
        except broken as error:
            raise ValueError(f"{path}:{number}: {error}") from None


class ZstdFrames(io.RawIOBase):
    """What the frames of a .zst file hold. EOFError where it ends within one, which zstandard's own reader hides."""

    def __init__(self, raw, decompressor):
        self.raw, self.decompressor = raw, decompressor
        self.frame, self.ready = decompressor.decompressobj(), memoryview(b"")

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer) -> int:
        """Fill the buffer as far as it goes; 0 at the end."""
        while not self.ready:
            whole = self.frame.eof
            data = self.frame.unused_data or self.raw.read(1 << 16)
            if not data and whole:
                return 0
            if not data:
                raise EOFError("the file is cut short")
            if whole:
                self.frame = self.decompressor.decompressobj()
            self.ready = memoryview(self.frame.decompress(data))
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n


def parse_line(line: str, domain_field: str | None) -> tuple[str | None, str]:
    """(domain or None, text) of a jsonl line. Domains that differ only in what no file name may hold become one."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
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
        found = sorted(p for p in top.rglob("*") if p.name.lower().endswith(endings) and p.is_file())
        files += [(None if domain_field else top.name, path) for path in found]
        if not found:
            print(f"{top}: left out, it holds no {', '.join(endings)} file")
    if beside := [p for p in folder.iterdir() if p.name.lower().endswith(endings) and not domain_field]:
        print(f"{folder}: left out {len(beside)} files that are in no sub-folder, as {beside[0].name}")
    if not files:
        layout = "" if domain_field else " in sub-folders, one per domain (does each line name it? Give --domain_field)"
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
    """The documents of a file: its text, or the long strings of its code, or the part of it that is prose."""
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
        yield domain, document, path.stat().st_size


# ---------------------------------------------------------------------------------------------------------------------
# Text -> tokens on disk.


def select(files, read, bar: tqdm, seed: int, held_out: float, limit: int) -> Iterator[tuple[str, bool, str]]:
    """(domain, held out?, text) of every document once, until a domain has `limit` bytes (0: all of it).

    One keyed hash of the text decides both. Fingerprints are kept in a table of fixed size in which the newest takes
    a slot: on huge data a duplicate may pass, but memory stays constant and no unique document is lost.
    """
    seen = np.zeros(SEEN_SLOTS, np.uint64)
    taken, spoilt = Counter(), 0
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
            spoilt += "\ufffd" in text
            yield name, fingerprint < held_out * 2**64, data.decode()
        bar.update(size - done)
    if spoilt:
        bar.write(f"{spoilt:,} documents hold U+FFFD, which stands for bytes that are no UTF-8")


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
    """[(domain, held out?, ids with eots, bytes)], one per pair that occurs.

    `bytes` is an array: one number per id for held-out text, which is cut anywhere; one per document for train.
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
    """Load the tokenizer once a process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    global worker_tokenizer
    worker_tokenizer = load_tokenizer(spec)


def encode_in_worker(batch: list) -> list:
    """encode_batch with the process' tokenizer."""
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
        """Append tokens, and the bytes they stand for, to a split."""
        self.files[split].write(ids.astype(self.dtype).tobytes())
        counts = self.counts[split]
        counts["tokens"] += len(ids)
        counts["documents"] += int((ids == self.eot).sum())  # those that end here
        counts["bytes"] += int(sizes.sum())

    def add(self, held: bool, ids: np.ndarray, sizes: np.ndarray):
        """Append documents to train, or to the pool whose windows go to val and test in turn."""
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
        """Close the files; a last window that is not full is dropped."""
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

    Until it is whole it is a hidden folder beside `out`; an error, Ctrl-C or SIGTERM removes that.
    `held_out` is the share of documents, `window` in tokens, `max_mb` 10^6 bytes of text per domain (0: no limit; None:
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
    partial_out = out.parent / f".{out.name}.partial"
    try:
        partial_out.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{partial_out}: of another process that makes {out}, or of one that was killed; then remove it"
        ) from None
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
        meta |= {"tokenizer_fingerprint": fingerprint(encoder)}
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
# The command.


def table(data: TokenData) -> str:
    """One line per domain."""
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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and what is half-written goes
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
