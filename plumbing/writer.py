"""Tokens -> disk: the files of a data set as prepare_data.py writes them, and plumbing/dataset.py opens them."""

import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.dataset import DTYPES, FORMAT, SPLITS, folder_of
from plumbing.shared import SharedText
from plumbing.tokenizer import Tokenizer, fingerprint

MAX_DOMAINS = 256


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, to write in. At the end it becomes `out`; after an error, Ctrl-C or SIGTERM it is
    removed, with the folders around it that were made for it. What a process that was killed has left is removed by the
    next. ValueError while another is at work."""
    new = [parent for parent in out.absolute().parents if not parent.exists()]  # the innermost first
    out.parent.mkdir(parents=True, exist_ok=True)
    folder, lock = (out.parent / f".{out.name}.{ending}" for ending in ("partial", "lock"))
    try:
        with locked(lock, f"{out}: another process is making it"):
            if os.path.lexists(out):
                raise ValueError(f"{out}: another process has just made it")
            try:
                if folder.exists():
                    shutil.rmtree(folder)
                folder.mkdir()
                yield folder
                folder.rename(out)
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    finally:
        with suppress(OSError):  # not empty: all went well
            for parent in new:
                parent.rmdir()


@contextmanager
def locked(path: Path, complaint: str) -> Iterator[None]:
    """Make a file, lock it, and remove it at the end. The lock ends with the process, also where that is killed.
    ValueError with the complaint where another process holds it."""
    with open(path, "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(complaint) from None
        except OSError:
            pass  # a file system without locks
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise ValueError(complaint)  # it has just ended
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


class Encoded(NamedTuple):
    """Documents of one domain and side, one after the other.

    `sizes` are the bytes of text: one number per token of held-out text, which is cut anywhere; one per document of
    train. `stretches` are for plumbing/shared.py.
    """

    domain: str
    held_out: bool
    ids: np.ndarray
    sizes: np.ndarray
    stretches: np.ndarray


class DomainWriter:
    """Writes the three token files of one domain, and counts."""

    def __init__(self, folder: Path, dtype: str, window: int, eot: int):
        folder.mkdir()
        self.folder, self.dtype, self.window, self.eot = folder, DTYPES[dtype], window, eot
        self.files = {split: open(folder / f"{split}.bin", "wb") for split in SPLITS}
        self.counts = {split: {"tokens": 0, "documents": 0, "bytes": 0} for split in SPLITS}
        self.largest, self.checksums = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
        self.windows = 0  # that the held-out pool has given so far
        self.rest_ids = self.rest_sizes = np.empty(0, np.uint32)  # the pool's last tokens, which fill no window yet

    def add(self, encoded: Encoded):
        """Append documents to train, or to the held-out pool."""
        if encoded.held_out:
            self.add_to_pool(encoded.ids, encoded.sizes)
        else:
            self.write("train", encoded.ids, encoded.sizes)

    def add_to_pool(self, ids: np.ndarray, sizes: np.ndarray):
        """Write each window that is full to val and test in turn."""
        ids, sizes = np.concatenate([self.rest_ids, ids]), np.concatenate([self.rest_sizes, sizes])
        end = len(ids) - len(ids) % self.window
        for start in range(0, end, self.window):
            part = slice(start, start + self.window)
            self.write(("val", "test")[self.windows % 2], ids[part], sizes[part])
            self.windows += 1
        self.rest_ids, self.rest_sizes = ids[end:], sizes[end:]

    def write(self, split: str, ids: np.ndarray, sizes: np.ndarray):
        """Append tokens to a split; `sizes` sum to the bytes of text that they stand for."""
        data, counts = ids.astype(self.dtype).tobytes(), self.counts[split]
        self.files[split].write(data)
        self.checksums[split] = zlib.crc32(data, self.checksums[split])
        self.largest[split] = max(self.largest[split], int(ids.max()))
        counts["tokens"] += len(ids)
        counts["documents"] += int((ids == self.eot).sum())  # those that end here
        counts["bytes"] += int(sizes.sum())

    def facts(self) -> dict[str, dict]:
        """What meta.json says of each file, beside the counts."""
        return {s: {"max_id": self.largest[s], "crc32": f"{self.checksums[s]:08x}"} for s in SPLITS}

    def too_small(self) -> str:
        """What the domain lacks to be usable; empty if nothing. A last window that is not full is dropped."""
        tokens = [self.counts[split]["tokens"] for split in SPLITS]
        if min(tokens) > self.window:  # a sequence of one window needs the token after it, too
            return ""
        counts = "{:,} train, {:,} val and {:,} test tokens".format(*tokens)
        return f"{counts}; of each, more than one window of {self.window:,} is needed"


class DataWriter:
    """The writers of all domains, in the folder of the data set."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, window: int):
        self.folder, self.tokenizer, self.window = folder, tokenizer, window
        self.dtype = "uint16" if tokenizer.n_vocab <= 2**16 else "uint32"
        self.domains = {}
        self.shared = SharedText()

    def add(self, encoded: Encoded):
        """Append documents to their domain."""
        self.of(encoded.domain).add(encoded)
        self.shared.add(encoded.domain, encoded.held_out, encoded.stretches)

    def of(self, domain: str) -> DomainWriter:
        """The writer of one domain."""
        if domain not in self.domains:
            if len(self.domains) == MAX_DOMAINS:
                raise ValueError(f"more than {MAX_DOMAINS} domains, the last is {domain}; is --domain_field right?")
            folder = self.folder / folder_of(domain)
            if folder.exists():
                raise ValueError(f"domain {domain}: on this file system, another domain has the folder {folder.name}")
            self.domains[domain] = DomainWriter(folder, self.dtype, self.window, self.tokenizer.eot)
        return self.domains[domain]

    def close(self):
        """Close the files of all domains, also where that fails for some."""
        with ExitStack() as stack:
            for writer in self.domains.values():
                for file in writer.files.values():
                    stack.callback(file.close)

    def leave_out_small(self) -> list[str]:
        """Remove the domains that are too small to be used. Returns what to say. ValueError if no other is left."""
        advice = "give more text or more documents, lower --window, or raise --held_out (if train lacks text, lower it)"
        lacks = {domain: writer.too_small() for domain, writer in sorted(self.domains.items())}
        lines = [f"domain {domain}: left out, it has {lack}" for domain, lack in lacks.items() if lack]
        if len(lines) == len(lacks):
            raise ValueError(f"no domain has enough text ({advice}): {'; '.join(lines) or 'there are no documents'}")
        for domain in [domain for domain, lack in lacks.items() if lack]:
            shutil.rmtree(self.domains.pop(domain).folder)
            self.shared.forget(domain)
        return [*lines, advice] if lines else []

    def write_meta(self, options: dict):
        """Write meta.json, which says what the files hold and how they were made."""
        meta = {
            "format": FORMAT,
            "tokenizer": self.tokenizer.name,
            "vocab_size": self.tokenizer.n_vocab,
            "bos": self.tokenizer.bos,
            "eot": self.tokenizer.eot,
            "tokenizer_fingerprint": fingerprint(self.tokenizer),
            "dtype": self.dtype,
            "window": self.window,
            "seed": options["seed"],
            "options": options,
            "shared": self.shared.shares(),
            "domains": {domain: writer.counts for domain, writer in sorted(self.domains.items())},
            "files": {domain: writer.facts() for domain, writer in sorted(self.domains.items())},
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
