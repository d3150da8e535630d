"""Tokens on disk: a prepared data set, opened and checked.

    data/NAME/meta.json           format, tokenizer, vocab_size, bos, eot, dtype, options; tokens, documents, bytes by
                                  domain and split; files, the largest id and the checksum (CRC-32, zlib's) of each
                                  file; shared, the share of held-out text that stands in train, by domain
    data/NAME/<domain>/train.bin  and val.bin, test.bin: little-endian uint16 (uint32 where the vocabulary is larger
                                  than 65,536); a bos token before each document, if the tokenizer has one, and an eot
                                  token after it. <domain> is its name, see `folder_of`

`bytes` counts the UTF-8 bytes of the text that a split's tokens stand for (0 for bos and eot), so a loss in nats per
token is loss * tokens / bytes / ln 2 bits per byte, which can be compared between tokenizers.
"""

import difflib
import hashlib
import json
import math
import re
import zlib
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path

import numpy as np

from plumbing import records
from plumbing.tokenizer import load_tokenizer

FORMAT = 1  # of the data set on disk; a reader refuses any other
SPLITS = ("train", "val", "test")
TOKENS_AT_ONCE = 1 << 22  # that are read where a whole file is
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


def folder_of(domain: str) -> str:
    """The name of a domain's folder: the domain's, with what no file system takes as %XX. No two domains share one."""
    return re.sub(r"[%/\0]|\A\.", lambda match: f"%{ord(match[0]):02X}", domain)


@lru_cache  # each line of a text may name its domain
def wrong_name(domain: str) -> str:
    """Why a text cannot be the name of a domain; empty if it can. It stands in tables, so it is one line."""
    if not domain.strip():
        return "it is empty"
    if re.search(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", domain):
        return "it holds control characters or bytes that are no UTF-8"
    if len(folder_of(domain).encode()) > 255:
        return "it is longer than 255 bytes"
    if domain == "meta.json":
        return "a file of the data set has it"
    return ""


def check_domains(asked: list[str], there: Collection[str], where: object):
    """ValueError for domains that are not there, or asked for twice, or none."""
    for domain in asked:
        if domain not in there:
            near = difflib.get_close_matches(domain, there, n=1)
            hint = f", did you mean {near[0]}?" if near else f"; it has {', '.join(sorted(there))}"
            raise ValueError(f"{where}: no domain {domain}{hint}")
    if not asked or len(set(asked)) < len(asked):
        raise ValueError(f"{where}: name at least one domain, and none of them twice: {asked}")


class DamagedData(ValueError):
    """A token file holds what is no token."""


class TokenData:
    """A prepared data set, opened and checked; the files are mapped, not read.

    path         its folder                              domains     names, sorted or in the order asked for
    meta         meta.json                               vocab_size  largest id + 1
    tokenizer    for load_tokenizer()                    eot         id of the token after each document
                                                         bos         id of the token before each document, or None
    fingerprint  what the tokenizer makes of awkward text, to compare with a model's
    digest       of all that tells it from other data: counts, tokenizer, seed, checksums

    `domains` restricts it to some domains, in that order. Raises ValueError if something is wrong with the files, as
    far as it can be seen without reading all of them; `verify` reads all.
    """

    def __init__(self, path: Path | str, domains: list[str] | None = None):
        self.path = Path(path)
        file = self.path / "meta.json"
        if not file.is_file():
            near = sorted({str(f.parent) for p in (self.path, self.path.parent) for f in p.glob("*/meta.json")})
            make = f"prepare_data.py installed --out {self.path}`, or with a folder of text for installed"
            if self.path.is_dir():
                make = f"prepare_data.py {self.path} --out data/NAME`, if it is a folder of text"
            there = f"; there are {', '.join(near)}" if near else ""
            make += "; a model with a tokenizer of its own needs --tokenizer MODEL there"
            raise ValueError(f"{self.path}: no data set there (no meta.json){there}; first run `python {make}")
        self.meta = records.read(file, records.Meta, "a data set's description")
        self.tokenizer, self.vocab_size, self.eot = (self.meta[k] for k in ("tokenizer", "vocab_size", "eot"))
        self.fingerprint = self.meta["tokenizer_fingerprint"]
        self._check_meta(file)
        self.bos = self._find_bos()
        what = json.dumps([self.meta.get(key) for key in ("domains", "tokenizer_fingerprint", "seed", "files")])
        self.digest = hashlib.sha256(what.encode()).hexdigest()[:16]
        self.domains = sorted(self.meta["domains"]) if domains is None else list(map(str, domains))
        check_domains(self.domains, self.meta["domains"], self.path)
        self._tokens = {(d, s): self._open(d, s) for d in self.domains for s in SPLITS}

    def _check_meta(self, file: Path):
        """ValueError for what cannot be, though each key has the type that it should have."""
        meta, size = self.meta, self.vocab_size
        if meta["format"] != FORMAT:
            raise ValueError(f"{file}: format {meta['format']}, not {FORMAT}: delete it and prepare it again")
        for key in ("bos", "eot"):
            if (meta.get(key) or 0) >= size:
                raise ValueError(f"{file}: {key} is {meta[key]}, outside the vocabulary of {size}")
        for domain in meta["domains"]:
            if why := wrong_name(domain):
                raise ValueError(f"{file}: {domain!r} cannot be a domain's name, {why}")
            for split, facts in meta.get("files", {}).get(domain, {}).items():
                if facts["max_id"] >= size:
                    raise ValueError(f"{file}: {split} of {domain} has the id {facts['max_id']}, the vocabulary {size}")

    def _find_bos(self) -> int | None:
        """The token before each document; ValueError where it is missing though the tokenizer has one."""
        if "bos" in self.meta:
            return self.meta["bos"]
        # Prepared before meta.json had this key, so without one. Only a tokenizer that is a file can have one.
        named = f"{self.path / 'meta.json'}: its tokenizer"
        if Path(self.tokenizer).is_absolute() and load_tokenizer(self.tokenizer, named).bos is not None:
            raise ValueError(
                f"{self.path}: no token starts its documents, but {self.tokenizer} starts every text with one: "
                "delete it and prepare it again"
            )
        return None

    def file(self, domain: str, split: str) -> Path:
        """Where the tokens of a split are."""
        return self.path / folder_of(domain) / f"{split}.bin"

    def _open(self, domain: str, split: str) -> np.memmap:
        file, dtype = self.file(domain, split), DTYPES[self.meta["dtype"]]
        n_tokens = self.meta["domains"][domain][split]["tokens"]
        size = file.stat().st_size if file.is_file() else 0
        if size != n_tokens * dtype.itemsize:
            raise ValueError(
                f"{file}: {size:,} bytes where meta.json says {n_tokens:,} {self.meta['dtype']} tokens; "
                f"it is damaged: delete {self.path} and prepare it again"
            )
        tokens = np.memmap(file, dtype, mode="r")
        for start in np.linspace(0, max(0, n_tokens - 4096), 16, dtype=np.int64):  # a sample: 16 reads, however large
            self._check_ids(domain, split, int(start), tokens[start : start + 4096])
        return tokens

    def _check_ids(self, domain: str, split: str, start: int, ids: np.ndarray):
        """DamagedData if one of the ids, which begin at position `start` of the file, is not in the vocabulary."""
        if ids.max() >= self.vocab_size:
            i = int(np.argmax(ids >= self.vocab_size))
            raise DamagedData(
                f"{self.file(domain, split)}: token {start + i:,} has the id {ids[i]}, outside the vocabulary of "
                f"{self.vocab_size:,}; it is damaged: delete {self.path} and prepare it again"
            )

    def verify(self) -> None:
        """Read the files of all domains and hold them against their checksums. ValueError where they have none, or for
        the first that is not what was written."""
        for (domain, split), tokens in self._tokens.items():
            facts = self.meta.get("files", {}).get(domain, {}).get(split)
            if facts is None:
                raise ValueError(f"{self.path}: its meta.json has no checksums; it was prepared before there were any")
            found = 0
            for start in range(0, len(tokens), TOKENS_AT_ONCE):
                found = zlib.crc32(tokens[start : start + TOKENS_AT_ONCE], found)
            if f"{found:08x}" != facts["crc32"]:
                raise ValueError(
                    f"{self.file(domain, split)}: its CRC-32 is {found:08x}, meta.json says {facts['crc32']}; it is "
                    f"damaged: delete {self.path} and prepare it again"
                )

    def tokens(self, domain: str, split: str) -> np.memmap:
        """All tokens of a split, (n,), uint16 or uint32."""
        return self._tokens[domain, split]

    def sequences(self, domain: str, split: str, seq_len: int) -> int:
        """How many sequences of T = seq_len inputs there are; sequence i is tokens[i*T : i*T + T + 1]."""
        return (len(self._tokens[domain, split]) - 1) // seq_len

    def crosses_borders(self, seq_len: int) -> str | None:
        """Why held-out sequences of this length are not whole, where they are not."""
        if not (window := self.meta["window"]) % seq_len:
            return None
        return (
            f"held-out text is made of unrelated windows of {window} tokens, and sequences of {seq_len} go across "
            f"their borders; prepare_data.py --window {seq_len} makes them whole"
        )

    def bytes_per_token(self, domain: str, split: str) -> float:
        """UTF-8 bytes of text per token; bits per byte = loss in nats / ln 2 / this."""
        counts = self.meta["domains"][domain][split]
        return counts["bytes"] / counts["tokens"]

    def bits_per_byte(self, losses: dict[str, float], split: str) -> dict[str, float]:
        """Domain -> bits per byte of its text, from nats per token. Bytes per token are those of the whole split: they
        differ from sequence to sequence, and a few sequences would add that noise."""
        return {d: loss / math.log(2) / self.bytes_per_token(d, split) for d, loss in losses.items()}

    def read(self, domain: str, split: str, seq_len: int, indices: np.ndarray) -> np.ndarray:
        """The sequences with these numbers, int64 (len(indices), T+1). DamagedData where an id is none."""
        tokens, rows = self._tokens[domain, split], np.empty((len(indices), seq_len + 1), np.int64)
        for row, i in zip(rows, indices, strict=True):
            row[:] = tokens[int(i) * seq_len : int(i) * seq_len + seq_len + 1]
        if len(rows) and rows.max() >= self.vocab_size:
            for row, i in zip(rows, indices, strict=True):
                self._check_ids(domain, split, int(i) * seq_len, row)
        return rows

    def continues(self, split: str, seq_len: int, indices: np.ndarray) -> np.ndarray:
        """bool (len(indices), T): which targets of these sequences continue the text before them. val and test are made
        of unrelated windows, and the first token of a window continues nothing."""
        position = np.asarray(indices)[:, None] * seq_len + np.arange(1, seq_len + 1)
        return (position % self.meta["window"] != 0) | (split == "train")

    def eval_sequences(self, domain: str, split: str, seq_len: int, n: int = 0) -> np.ndarray:
        """int64 (n, T+1): the sequences that `eval_numbers` chooses."""
        return self.read(domain, split, seq_len, self.eval_numbers(domain, split, seq_len, n))

    def eval_numbers(self, domain: str, split: str, seq_len: int, n: int = 0) -> np.ndarray:
        """int64 (n,): the numbers of `n` sequences evenly spread over the split; of all when n is 0 or more than there
        are. ValueError when the split is shorter than one sequence."""
        total = self.sequences(domain, split, seq_len)
        if total == 0:
            raise ValueError(
                f"{self.path}: {split} of domain {domain} has {len(self._tokens[domain, split]):,} tokens, too few for "
                f"one sequence of {seq_len}; use shorter sequences or prepare it with more --held_out"
            )
        n = min(n, total) or total
        return np.arange(n) * total // n
