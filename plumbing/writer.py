"""Tokens -> disk: the files of a data set as prepare_data.py writes them, and plumbing/data.py reads them."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from plumbing.data import DTYPES, FORMAT, SPLITS
from plumbing.shared import SharedText
from plumbing.tokenizer import Tokenizer, fingerprint

MAX_DOMAINS = 256


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
        self.files[split].write(ids.astype(self.dtype).tobytes())
        counts = self.counts[split]
        counts["tokens"] += len(ids)
        counts["documents"] += int((ids == self.eot).sum())  # those that end here
        counts["bytes"] += int(sizes.sum())

    def close(self):
        """Close the files. A last window that is not full is dropped."""
        for file in self.files.values():
            file.close()

    def too_small(self) -> str:
        """What the domain lacks to be usable; empty if nothing."""
        tokens = self.counts["train"]["tokens"]
        if self.windows < 2 or tokens < self.window:
            return f"{tokens:,} train tokens and {self.windows} held-out windows, {self.window:,} and 2 are needed"
        return ""


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
            self.domains[domain] = DomainWriter(self.folder / domain, self.dtype, self.window, self.tokenizer.eot)
        return self.domains[domain]

    def close(self):
        """Close the files of all domains."""
        for writer in self.domains.values():
            writer.close()

    def leave_out_small(self):
        """Remove the domains that are too small to be used, and say so."""
        for domain, writer in sorted(self.domains.items()):
            if writer.too_small():
                print(f"{domain}: left out, it has {writer.too_small()}")
                shutil.rmtree(writer.folder)
                del self.domains[domain]

    def refuse_small(self):
        """ValueError if a domain is too small to be used."""
        for domain, writer in sorted(self.domains.items()):
            if writer.too_small():
                raise ValueError(f"domain {domain}: it has {writer.too_small()}; raise --held_out or lower --window")

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
            "shared": {domain: share for domain, share in self.shared.shares().items() if domain in self.domains},
            "domains": {domain: writer.counts for domain, writer in sorted(self.domains.items())},
        }
        (self.folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
