"""Text -> tokens on disk, one file per domain and split (plumbing/data.py reads them).

    python prepare_data.py installed --out data/installed     # text that every machine has, no download
    python prepare_data.py corpus --out data/mine --tokenizer gpt2                 # each sub-folder is a domain
    python prepare_data.py SlimPajama --out data/slimpajama --tokenizer Llama-2-7b-hf --workers 16 \\
        --domain_field meta.redpajama_set_name                           # a field of each jsonl line names the domain

A document is a .txt file, or a line {"text": ...} of a .jsonl, .jsonl.gz or .jsonl.zst file. Of documents that are
exactly equal, one is kept. On disk, a document is the token bos (if the tokenizer has one), the tokens of its text,
and the token eot.

A hash of a document's text decides its side: it belongs to train or to the held-out pool, never to both. The tokens of
the pool are cut into windows, and the windows go to val and test in turn: two small sets of documents would differ a
lot by chance.

Copies with small changes (licences, tables, pages that were collected twice) can stand on both sides. Then the held-out
loss is too good. The last column of the table that is printed, `shared`, says how much of a domain's held-out text
stands word for word in train. `--drop_shared` drops held-out documents that train has parts of.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import random
import shutil
import signal
import sys
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from plumbing.command_line import Parser, user_errors
from plumbing.data import SPLITS, TokenData
from plumbing.documents import folder_files, read_file
from plumbing.installed import INSTALLED_MB, installed_files, read_installed
from plumbing.shared import STRETCH, SharedText, sample_stretches
from plumbing.tokenizer import Tokenizer, load_tokenizer
from plumbing.writer import DataWriter, Encoded

SEEN_SLOTS = 1 << 22  # documents that are remembered to find duplicates, 8 bytes each
MAX_SHARE = 0.05  # --drop_shared drops a held-out document if more than this share of it stands in train
TOO_MUCH = 0.03  # there is a warning if more than this share of a domain's held-out text stands in train

# ---------------------------------------------------------------------------------------------------------------------
# Which documents, and which of them are held out.


class Document(NamedTuple):
    """A text, the domain that it belongs to, and whether it is held out from training."""

    domain: str
    held_out: bool
    text: str


class Seen:
    """Which numbers have been seen, in a table of fixed size.

    Each number has one slot, which it takes from the number before it. So memory stays constant: on huge data a number
    may be forgotten, but a new one is never taken for one that was seen.
    """

    def __init__(self):
        self.slots = np.zeros(SEEN_SLOTS, np.uint64)

    def add(self, number: int) -> bool:
        """Remember a number, which is not 0. True if it was seen before."""
        slot = number % len(self.slots)
        before, self.slots[slot] = int(self.slots[slot]), number
        return before == number


def read_all(files: list, read: Callable, full: Callable, bar: tqdm) -> Iterator[tuple[str, str]]:
    """(domain, text) of all documents of the files, but for the domains that are `full`."""
    for domain, path in files:
        done, size = 0, path.stat().st_size
        if not full(domain):
            for name, text, position in read(domain, path):
                bar.update(position - done)
                done = position
                if not full(name):
                    yield name, text
        bar.update(size - done)


def select(files: list, read: Callable, seed: int, held_out: float, limit: float, bar: tqdm) -> Iterator[Document]:
    """Every document once, until a domain has `limit` bytes.

    A hash of the text, keyed by the seed, says whether it was seen before and whether it is held out.
    """
    seen, taken, spoilt = Seen(), Counter(), 0
    for domain, text in read_all(files, read, lambda domain: taken[domain] >= limit, bar):
        if not text.strip():
            continue
        data = text.encode("utf-8", errors="replace")  # JSON can hold half a surrogate pair, UTF-8 cannot
        digest = hashlib.blake2b(data, digest_size=8, key=seed.to_bytes(8, "little")).digest()
        number = int.from_bytes(digest, "little") or 1  # uniform in 1 to 2^64 - 1
        if seen.add(number):
            continue
        taken[domain] += len(data)
        if "\ufffd" in text:
            spoilt += 1
        yield Document(domain, number < held_out * 2**64, data.decode())
    if spoilt:
        bar.write(f"{spoilt:,} documents hold U+FFFD, which stands for bytes that are no UTF-8")


def without_shared(documents: Iterable[Document], bar: tqdm) -> Iterator[Document]:
    """All of train, and then the held-out documents of which no more than MAX_SHARE stands word for word in train.

    The held-out documents wait in memory until train is complete. The more text there is, the longer a document must
    be to be judged: SharedText samples one stretch in 16 of 130 MB of text, and one in 500 of 4 GB.
    """
    text, held_out, dropped = SharedText(), [], 0
    for document in documents:
        if document.held_out:
            held_out.append(document)
        else:
            text.add(document.domain, False, sample_stretches([document.text.encode()]))
            yield document
    for document in held_out:
        share = text.share(sample_stretches([document.text.encode()]))
        if share is None or share <= MAX_SHARE:
            yield document
        else:
            dropped += 1
    bar.write(f"{dropped:,} of {len(held_out):,} held-out documents are dropped, because train has parts of them")


# ---------------------------------------------------------------------------------------------------------------------
# Documents -> tokens. plumbing/writer.py writes them.


def encode_batch(tokenizer: Tokenizer, batch: list[Document]) -> list[Encoded]:
    """One `Encoded` for each pair of domain and side that occurs in the batch."""
    groups = defaultdict(list)
    for domain, held_out, text in batch:
        groups[domain, held_out].append(text)
    encoded = []
    for (domain, held_out), texts in groups.items():
        pairs = [encode_text(tokenizer, text, held_out) for text in texts]
        ids, sizes = map(np.concatenate, zip(*pairs, strict=True))
        stretches = sample_stretches([text.encode() for text in texts])
        encoded.append(Encoded(domain, held_out, ids, sizes, stretches))
    return encoded


def encode_text(tokenizer: Tokenizer, text: str, held_out: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ids, which start with bos if the tokenizer has one and end with eot, and sizes, as `Encoded` has them."""
    before = np.array([tokenizer.bos] if needs_bos(tokenizer) else [], np.uint32)
    after = np.array([tokenizer.eot], np.uint32)
    if held_out:
        ids, sizes = tokenizer.encode_with_bytes(text)
        sizes = np.concatenate([np.zeros_like(before), sizes, np.zeros_like(after)])
    else:
        ids, sizes = tokenizer.encode(text), np.array([len(text.encode())], np.uint32)
    return np.concatenate([before, ids, after]), sizes


def needs_bos(tokenizer: Tokenizer) -> bool:
    """Whether bos goes before a document. Where bos and eot are the same token, the document before ends with it."""
    return tokenizer.bos is not None and tokenizer.bos != tokenizer.eot


def batches(documents: Iterable[Document], size: int = 1 << 20) -> Iterator[list[Document]]:
    """Lists of documents with about `size` characters each: what a process encodes at a time."""
    batch, length = [], 0
    for document in documents:
        batch.append(document)
        length += len(document.text)
        if length >= size:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def encode_all(documents: Iterable[Document], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """The documents, encoded by `workers` processes, in the order of the documents."""
    if workers == 1:
        for batch in batches(documents):
            yield from encode_batch(tokenizer, batch)
        return
    context = multiprocessing.get_context("spawn")  # the same everywhere, and safe beside other libraries' threads
    with ProcessPoolExecutor(workers, context, initializer=start_worker, initargs=(tokenizer.name,)) as pool:
        try:
            for encoded in map_in_order(pool, encode_in_worker, batches(documents), 2 * workers):
                yield from encoded
        except BrokenProcessPool:
            raise ValueError("--workers: a process died, perhaps for lack of memory; use fewer") from None


def map_in_order(pool: ProcessPoolExecutor, function: Callable, items: Iterable, ahead: int) -> Iterator:
    """pool.map(), but with at most `ahead` items waiting, so that memory does not grow with the data."""
    pending = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def start_worker(spec: str):
    """Load the tokenizer once in each process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process to handle
    global worker_tokenizer
    worker_tokenizer = load_tokenizer(spec)


def encode_in_worker(batch: list[Document]) -> list[Encoded]:
    """encode_batch() with the process' own tokenizer."""
    return encode_batch(worker_tokenizer, batch)


# ---------------------------------------------------------------------------------------------------------------------
# All of it.


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
    drop_shared: bool = False,
) -> bool:
    """Make the data set `out` from `source`, which is a folder or the word "installed".

    `held_out` is a share of the documents, `window` is in tokens. `max_mb` is a limit for the text of each domain in
    10^6 bytes; 0 is no limit, and None is no limit except for "installed". `drop_shared` drops held-out documents that
    train has parts of; for "installed" it is always on. What is written does not depend on `workers`. If something
    fails, nothing is left behind.

    Returns False if `out` is there already and was made with the same arguments. Raises ValueError and OSError.
    """
    installed = source == "installed"
    if max_mb is None:
        max_mb = INSTALLED_MB if installed else 0
    check_arguments(installed, workers, held_out, window, seed, max_mb, domain_field)
    out, encoder = Path(out), load_tokenizer(tokenizer)
    options = {
        "source": source if installed else str(Path(source).resolve()),
        "tokenizer": encoder.name,
        "held_out": held_out,
        "window": window,
        "seed": seed,
        "max_mb": max_mb,
        "domain_field": domain_field,
        "drop_shared": drop_shared or installed,
    }
    if out.exists():
        check_same(out, options)
        return False

    files, read = open_source(source, domain_field)
    random.Random(seed).shuffle(files)  # so that a limit takes a fair choice, not the first by name
    with whole_or_nothing(out) as folder, closing(DataWriter(folder, encoder, window)) as writer:
        write_domains(writer, files, read, options, workers)
        writer.close()
        if installed:
            writer.leave_out_small()
        else:
            writer.refuse_small()
        if len(writer.domains) < (2 if installed else 1):
            raise ValueError(f"{source}: too few domains have enough text; lower --window or raise --max_mb")
        writer.write_meta(options)
    return True


def open_source(source: str, domain_field: str | None) -> tuple[list, Callable]:
    """The files of the source, [(domain, file)], and the function that reads one."""
    if source == "installed":
        return installed_files(), read_installed
    return folder_files(Path(source), domain_field), partial(read_file, domain_field=domain_field)


def write_domains(writer: DataWriter, files: list, read: Callable, options: dict, workers: int):
    """Read, select, encode and write all documents, with a progress bar."""
    for domain in sorted({domain for domain, _ in files if domain}):
        writer.of(domain)  # a folder that turns out to have no text is a domain too, one that is too small
    total = sum(path.stat().st_size for _, path in files)
    print(f"{options['source']}: reading {len(files):,} files, {total / 1e6:,.1f} MB", flush=True)
    limit = int(options["max_mb"] * 1e6) or math.inf
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        documents = select(files, read, options["seed"], options["held_out"], limit, bar)
        if options["drop_shared"]:
            documents = without_shared(documents, bar)
        for encoded in encode_all(documents, writer.tokenizer, workers):
            writer.add(encoded)


def check_arguments(
    installed: bool, workers: int, held_out: float, window: int, seed: int, max_mb: float, domain_field: str | None
):
    """ValueError for the first argument that is out of range."""
    for name, value, is_fine, need in (
        ("held_out", held_out, 0 < held_out < 1, "between 0 and 1"),
        ("window", window, window >= 2, "2 or more"),
        ("workers", workers, workers >= 1, "1 or more"),
        ("seed", seed, 0 <= seed < 2**63, "0 or more"),
        ("max_mb", max_mb, 0 <= max_mb < math.inf, "0 (no limit) or more"),
        ("domain_field", domain_field, not (installed and domain_field), "for a folder of jsonl files, not installed"),
    ):
        if not is_fine:
            raise ValueError(f"--{name}: {value} is out of range, it must be {need}")


def check_same(out: Path, options: dict):
    """ValueError unless `out` is a data set made with `options`."""
    try:
        there = json.loads((out / "meta.json").read_text(encoding="utf-8"))["options"]
        there = {"drop_shared": False} | there  # data sets made before this was an option do not have it
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{out}: exists and is no data set; choose another --out") from None
    other = [f"{key} {there.get(key)}, not {value}" for key, value in options.items() if there.get(key) != value]
    if other:
        raise ValueError(f"{out}: exists, made with {'; '.join(other)}; delete it or choose another --out")


@contextmanager
def whole_or_nothing(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, to write in. At the end it becomes `out`; after an error, Ctrl-C or SIGTERM it is
    removed."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.parent / f".{out.name}.partial"
    try:
        folder.mkdir()
    except FileExistsError:
        raise ValueError(
            f"{folder}: of another process that makes {out}, or of one that was killed; then remove it"
        ) from None
    try:
        yield folder
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def table(data: TokenData) -> str:
    """One line per domain: documents, tokens of each split, text, and the share of val and test that is in train."""
    lines = [
        f"{'domain':<20}{'documents':>11}{'train':>15}{'val':>13}{'test':>13}{'MB':>11}{'bytes/token':>13}{'shared':>9}"
    ]
    shares = data.meta.get("shared", {})
    for domain in data.domains:
        counts = data.meta["domains"][domain]
        tokens = [counts[split]["tokens"] for split in SPLITS]
        documents, size = (sum(counts[split][key] for split in SPLITS) for key in ("documents", "bytes"))
        lines.append(
            f"{domain:<20}{documents:>11,}{tokens[0]:>15,}{tokens[1]:>13,}{tokens[2]:>13,}"
            f"{size / 1e6:>11,.2f}{data.bytes_per_token(domain, 'train'):>13.2f}{percent(shares.get(domain)):>9}"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as text; a dash if it was not measured."""
    return "-" if share is None else f"{100 * share:.1f} %"


def warnings_about(shares: dict[str, float | None]) -> list[str]:
    """A line for each domain whose held-out text train has too much of."""
    return [
        f"warning: domain {domain}: {percent(share)} of the held-out text stands word for word in train (measured in "
        f"stretches of {STRETCH} bytes), so its losses are too good; --drop_shared drops such documents"
        for domain, share in shares.items()
        if share is not None and share > TOO_MUCH
    ]


def make_parser() -> Parser:
    """The command line; each option is an argument of prepare()."""
    parser = Parser(
        usage=argparse.SUPPRESS,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="A folder of text, or the word installed.")
    parser.add_argument("--out", required=True, metavar="data/NAME", help="The folder of the data set to make.")

    add = parser.add_argument_group("text").add_argument
    add("--domain_field", metavar="A.B", help="Each jsonl line names its domain in this field; folders do not count.")
    add(
        "--max_mb",
        type=float,
        metavar="MB",
        help="Take at most this much text of each domain, in 10^6 bytes. 0 takes all of it. "
        f"The default is {INSTALLED_MB} for installed, and 0 for a folder.",
    )

    add = parser.add_argument_group("split").add_argument
    add(
        "--held_out",
        type=float,
        default=0.05,
        metavar="SHARE",
        help="This share of the documents is held out for val and test (default: %(default)s).",
    )
    add(
        "--drop_shared",
        action="store_true",
        help=f"Drop a held-out document if more than {100 * MAX_SHARE:.0f}%% of it stands word for word in train. The "
        "held-out text is kept in memory until all is read. For installed, such documents are always dropped.",
    )
    add(
        "--window",
        type=int,
        default=1024,
        metavar="TOKENS",
        help="The held-out tokens are cut into windows of this length, which go to val and test in turn "
        "(default: %(default)s). Choose a multiple of the sequence length that you train with.",
    )
    add(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="The seed decides which documents are held out, and which are taken where --max_mb is a limit "
        "(default: %(default)s).",
    )

    add = parser.add_argument_group("tokens").add_argument
    add(
        "--tokenizer",
        default="byte",
        metavar="byte|gpt2|cl100k_base|FILE|DIR",
        help="The tokenizer: a name, a tokenizer.json, Llama 3's tokenizer.model, or a folder with one of them "
        "(default: %(default)s).",
    )

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    add = parser.add_argument_group("speed").add_argument
    add(
        "--workers",
        type=int,
        default=cores,
        metavar="N",
        help="The number of processes that tokenize (default: %(default)s, one for each core). The result does not "
        "depend on it.",
    )
    return parser


def main():
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what is half written is removed
    with user_errors():
        args = make_parser().parse_args()
        try:
            made = prepare(**vars(args))
        except KeyboardInterrupt:
            print("\nprepare_data.py: interrupted; nothing was written", file=sys.stderr)
            sys.exit(130)
        data = TokenData(args.out)
        print(table(data))
        for line in warnings_about(data.meta.get("shared", {})):
            print(line)
        print(args.out if made else f"{args.out}: already prepared")


if __name__ == "__main__":
    main()
