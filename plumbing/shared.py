"""How much of the held-out text stands word for word in train, too.

A loss on text that was trained on measures memory. Exact duplicates never stand on both sides, but copies with small
changes may: licences, headers, tables. The measure is the share of the held-out text's *stretches* that occur in train.
A stretch is 100 bytes in a row within a document; one starts at each byte. Each stretch has a hash, and those with a
small hash are the sample. Equal stretches have equal hashes, so each is in the sample everywhere, or nowhere.

The hash of the stretch that starts at byte i is sum_j x[i + j] B^j modulo 2^64, with a large odd B. A cumulative sum
of x[j] B^j gives the hashes of all stretches: a difference of two of its values is the hash times B^i.
"""

from collections import defaultdict

import numpy as np

STRETCH = 100  # bytes
SAMPLE = 16  # one stretch in so many is in the sample, and fewer once there are more than MAX_HASHES
MAX_HASHES = 1 << 23  # 8 bytes each
PIECE = 1 << 15  # bytes that are hashed at a time, so that the arrays stay in the processor's cache
BASE = 0x9E3779B97F4A7C15
POWERS = np.cumprod(np.full(PIECE + STRETCH, BASE, np.uint64))
INVERSES = np.cumprod(np.full(PIECE + STRETCH, pow(BASE, -1, 1 << 64), np.uint64))


def sample_stretches(documents: list[bytes]) -> np.ndarray:
    """Hashes of one in SAMPLE of the stretches of the documents, uint64 (n,)."""
    data, limit = np.frombuffer(b"".join(documents), np.uint8), np.uint64((1 << 64) // SAMPLE)
    starts, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for begin in range(0, len(data) - STRETCH + 1, PIECE):
        piece = data[begin : begin + PIECE + STRETCH - 1]
        sums = np.zeros(len(piece) + 1, np.uint64)
        np.cumsum(piece * POWERS[: len(piece)], out=sums[1:])
        hashed = (sums[STRETCH:] - sums[:-STRETCH]) * INVERSES[: len(piece) - STRETCH + 1]
        small = np.flatnonzero((hashed < limit) & (hashed > 0))  # 0 is that of zeros, which would fill any sample
        starts.append(begin + small)
        hashes.append(hashed[small])
    starts, hashes = np.concatenate(starts), np.concatenate(hashes)
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    whole = starts + STRETCH <= ends[np.searchsorted(ends, starts, side="right")]  # within one document
    return hashes[whole]


class SharedText:
    """Samples of the stretches of train, and of each domain's held-out text, and what they share.

    Memory is constant: when there are too many hashes, the larger half of all possible ones is given up.
    """

    def __init__(self):
        self.limit = (1 << 64) // SAMPLE  # hashes below it are in the samples
        self.train, self.held_out = defaultdict(list), defaultdict(list)  # domain -> arrays of hashes
        self.count, self.merged = 0, True

    def add(self, domain: str, held_out: bool, hashes: np.ndarray):
        """Add what sample_stretches() gives for some documents."""
        hashes = self._in_sample(hashes)
        if held_out or len(hashes):  # an empty array takes memory, too, and there may be one for each document
            (self.held_out if held_out else self.train)[domain].append(hashes)
        self.count, self.merged = self.count + len(hashes), False
        if self.count > MAX_HASHES:
            self._merge()
            while self.count > MAX_HASHES // 2:
                self.limit //= 2
                self._merge()

    def _in_sample(self, hashes: np.ndarray) -> np.ndarray:
        return hashes[hashes < np.uint64(self.limit)]

    def _merge(self):
        """Make each list of arrays one array, those of train sorted and without repetitions."""
        for samples in (self.train, self.held_out):
            for domain in samples:
                whole = np.concatenate(samples[domain])
                samples[domain] = []  # what is not needed any more makes room
                samples[domain] = [self._in_sample(whole)]
        for domain, [array] in self.train.items():
            self.train[domain] = [np.unique(array)]
        self.count = sum(len(a) for samples in (self.train, self.held_out) for [a] in samples.values())
        self.merged = True

    def share(self, hashes: np.ndarray) -> float | None:
        """The share of these hashes that are in train's sample. None if there are none to look at."""
        if not self.merged:
            self._merge()
        hashes = self._in_sample(hashes)
        if len(hashes) == 0:
            return None
        found = np.zeros(len(hashes), bool)
        for [known] in self.train.values():
            if len(known):
                found |= known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes
        return float(found.mean())

    def forget(self, domain: str):
        """Take out a domain that is left out of the data set."""
        self.train.pop(domain, None)
        self.held_out.pop(domain, None)

    def shares(self) -> dict[str, float | None]:
        """domain -> the share of its held-out stretches that stand in train, of any domain."""
        return {domain: self.share(np.concatenate(arrays)) for domain, arrays in sorted(self.held_out.items())}
