"""Text -> tokens on disk, one file per domain and split (plumbing/dataset.py opens them).

    python prepare_data.py installed --out data/installed     # text that every machine has, no download
    python prepare_data.py corpus --out data/mine --tokenizer gpt2                 # each sub-folder is a domain
    python prepare_data.py SlimPajama --out data/slimpajama --tokenizer Llama-2-7b-hf --workers 16 \\
        --domain_field meta.redpajama_set_name                           # a field of each jsonl line names the domain

A document is a .txt file, a line {"text": ...} of a .jsonl or .json file (which may end in .gz or .zst), or a row of
a .parquet file. Of documents that are exactly equal, one is kept. On disk, a document is the token bos (if
the tokenizer has one), the tokens of its text, and the token eot.

A hash of a document's text decides its side: it belongs to train or to the held-out pool, never to both. The tokens of
the pool are cut into windows, and the windows go to val and test in turn. If whole documents were dealt out instead,
the two sets would differ a lot by chance. A domain that has only .txt files, and fewer than 20, has too few documents
for that. Its files are read in pieces of about a megabyte. The end of each piece, from the start of a line on, goes to
the pool.

Copies with small changes (licences, tables, pages that were collected twice) can stand on both sides. Then the held-out
loss is too good. The last column of the table that is printed, `shared`, says how much of a domain's held-out text
stands word for word in train. `--drop_shared` drops held-out documents that train has parts of.
"""

import argparse
import hashlib
import math
import os
import random
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from plumbing import records
from plumbing.command_line import Parser, check_utf8, command, user_errors
from plumbing.dataset import SPLITS, TokenData, check_domains, wrong_name
from plumbing.documents import read_file
from plumbing.folder import File, folder_files
from plumbing.installed import INSTALLED_MB, installed_files, read_installed
from plumbing.left_out import LeftOut
from plumbing.shared import STRETCH, SharedText, sample_stretches
from plumbing.tables import columns, padded
from plumbing.tokenizer import Tokenizer, fingerprint, load_tokenizer
from plumbing.workers import map_in_order
from plumbing.writer import DataWriter, Encoded, whole_or_nothing

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


def read_all(files: list[File], read: Callable, wanted: Callable, bar: tqdm) -> Iterator[tuple[str, str, bool]]:
    """(domain, text, whether it is to be cut) of all documents of the files, but for domains that are not `wanted`."""
    for file in files:
        done, size = 0, file.path.stat().st_size
        if file.domain is None or wanted(file.domain):
            for domain, text, position in read(file):
                bar.update(position - done)
                done = position
                if wanted(domain):
                    yield domain, text, file.cut
                elif file.domain is not None:  # of this domain there is enough
                    break
        bar.update(size - done)


def select(files: list[File], read: Callable, options: dict, left_out: LeftOut, bar: tqdm) -> Iterator[Document]:
    """Every document once, of the domains asked for, until a domain has `max_mb`.

    A hash of the text, keyed by the seed, says whether it was seen before and whether it is held out. A text that
    stands in two domains is of the one that is read first, also where that one turns out to be too small to be used.
    """
    seen, taken, spoilt = Seen(), Counter(), 0
    limit, domains = options["max_mb"] * 1e6 or math.inf, options["domains"]
    key = options["seed"].to_bytes(8, "little")

    def wanted(domain: str) -> bool:
        return taken[domain] < limit and (not domains or domain in domains)

    for domain, text, to_cut in read_all(files, read, wanted, bar):
        if not text.strip():
            left_out.add("empty documents")
            continue
        data = text.encode("utf-8", errors="replace")  # JSON can hold half a surrogate pair, UTF-8 cannot
        number = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little") or 1
        if seen.add(number):
            left_out.add("documents that are equal to another")
            continue
        taken[domain] += len(data)
        valid = data.decode()
        spoilt += "\ufffd" in text or valid != text
        if to_cut:
            end = round(len(valid) * (1 - options["held_out"]))
            earliest = max(0, end - (len(valid) - end))  # so that a long line does not go there as a whole
            end = valid.rfind("\n", earliest, end) + 1 or end
            halves = Document(domain, False, valid[:end]), Document(domain, True, valid[end:])
            yield from (half for half in halves if half.text.strip())
        else:  # the number is uniform in 1 to 2^64 - 1
            yield Document(domain, number < options["held_out"] * 2**64, valid)
    if spoilt:
        left_out.notes.append(
            f"{spoilt:,} documents have bytes that are no UTF-8, or half a character: U+FFFD or ? stands in their place"
        )


def without_shared(documents: Iterable[Document], left_out: LeftOut) -> Iterator[Document]:
    """All of train, and then the held-out documents of which no more than MAX_SHARE stands word for word in train.

    The held-out documents wait in memory until train is complete. The more text there is, the longer a document must
    be to be judged: SharedText samples one stretch in 16 of 130 MB of text, and one in 500 of 4 GB.
    """
    text, held_out, dropped = SharedText(), [], 0
    for document in documents:
        if document.held_out:
            held_out.append(document)
        else:
            text.add("train", False, sample_stretches([document.text.encode()]))
            yield document
    for document in held_out:
        share = text.share(sample_stretches([document.text.encode()]))
        if share is None or share <= MAX_SHARE:
            yield document
        else:
            dropped += 1
    left_out.notes.append(
        f"{dropped:,} of {len(held_out):,} held-out documents are dropped, because train has parts of them"
    )


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
    for encoded in map_in_order(encode_batch, batches(documents), workers, load_tokenizer, tokenizer.name):
        yield from encoded


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
    domains: list[str] | None = None,
    drop_shared: bool = False,
) -> bool:
    """Make the data set `out` from `source`, which is a folder or the word "installed".

    `held_out` is a share of the documents, `window` is in tokens. `max_mb` is a limit for the text of each domain in
    10^6 bytes; 0 is no limit, and None is no limit except for "installed". `domains` are those to take, None all.
    `drop_shared` drops held-out documents that train has parts of; for "installed" it is always on. What is written
    does not depend on `workers`. If something fails, nothing is left behind.

    Returns False if `out` is there already and was made with the same arguments. Raises ValueError and OSError.
    """
    installed = source == "installed"
    if not source:
        raise ValueError("SOURCE is empty; the folder that you are in is .")
    if max_mb is None:
        max_mb = INSTALLED_MB if installed else 0
    check_arguments(installed, workers, held_out, window, seed, max_mb, domain_field)
    out, encoder = Path(out), load_tokenizer(tokenizer)
    check_utf8(encoder.name, "--tokenizer ")  # meta.json will have these
    check_utf8(domain_field or "")
    for name in domains or []:
        if why := wrong_name(name):
            raise ValueError(f"--domains: {name!r} is no domain's name, {why}")
    folder = Path(source).resolve()
    options = {
        "source": source if installed else os.fsencode(folder).decode(errors="replace"),
        "tokenizer": encoder.name,
        "held_out": held_out,
        "window": window,
        "seed": seed,
        "max_mb": max_mb,
        "domain_field": domain_field,
        "domains": domains and sorted(domains),
        "drop_shared": drop_shared or installed,
    }
    if out.exists() or out.is_symlink():
        check_same(out, options, encoder)
        return False

    left_out = LeftOut()
    if installed:
        files, read = installed_files(), read_installed
    else:
        files = folder_files(folder, domain_field, left_out)
        read = partial(read_file, left_out=left_out, domain_field=domain_field)
    files = choose_domains(files, domains, source)
    random.Random(seed).shuffle(files)  # so that a limit takes a fair choice, not the first by name
    try:
        with whole_or_nothing(out) as partial_out, closing(DataWriter(partial_out, encoder, window)) as writer:
            write_domains(writer, files, read, options, left_out, workers)
            left_out.check()
            writer.close()
            left_out.notes += writer.leave_out_small()
            writer.write_meta(options)
    finally:  # not before the data set has its name: nobody may be there to read it
        for line in left_out.told():
            print(line)
    return True


def choose_domains(files: list[File], domains: list[str] | None, source: str) -> list[File]:
    """The files of these domains, or of all. ValueError for a domain that no folder has; lines that name their domain
    are not looked at."""
    named = {file.domain for file in files if file.domain is not None}
    if domains is not None:
        check_domains(domains, named or domains, source)
        files = [file for file in files if file.domain in (None, *domains)]
    return files


def write_domains(
    writer: DataWriter, files: list[File], read: Callable, options: dict, left_out: LeftOut, workers: int
):
    """Read, select, encode and write all documents, with a progress bar."""
    for domain in sorted({file.domain for file in files if file.domain} | set(options["domains"] or [])):
        writer.of(domain)  # a domain that turns out to have no text is one, too, and too small
    left_out.files, total = len(files), sum(file.path.stat().st_size for file in files)
    print(f"{options['source']}: reading {len(files):,} files, {total / 1e6:,.1f} MB", flush=True)
    with tqdm(total=total, unit="B", unit_scale=True, disable=None) as bar:
        documents = select(files, read, options, left_out, bar)
        if options["drop_shared"]:
            documents = without_shared(documents, left_out)
        with closing(encode_all(documents, writer.tokenizer, workers)) as everything:
            for encoded in everything:
                writer.add(encoded)


def check_arguments(
    installed: bool, workers: int, held_out: float, window: int, seed: int, max_mb: float, domain_field: str | None
):
    """ValueError for the first argument that is out of range."""
    for name, value, is_fine, need in (
        ("held_out", held_out, 0 < held_out < 1, "between 0 and 1"),
        ("window", window, 2 <= window <= records.MAX_WINDOW, f"2 to {records.MAX_WINDOW:,}"),
        ("workers", workers, 1 <= workers <= 1024, "1 to 1024"),
        ("seed", seed, 0 <= seed <= records.MAX_INT, f"0 to {records.MAX_INT:,}"),
        ("max_mb", max_mb, 0 <= max_mb < math.inf, "0 (no limit) or more"),
        ("domain_field", domain_field, not (installed and domain_field), "for a folder of jsonl files, not installed"),
    ):
        if not is_fine:
            raise ValueError(f"--{name}: {value} is out of range, it must be {need}")


def check_same(out: Path, options: dict, tokenizer: Tokenizer):
    """ValueError unless `out` is a data set made with `options`, and by the tokenizer as it is now."""
    try:
        meta = records.read(out / "meta.json", records.Meta, "a data set's")
        there = meta["options"]
    except (OSError, ValueError, KeyError):
        raise ValueError(f"{out}: exists and is no data set; choose another --out") from None
    there = {"drop_shared": False, "domains": None} | there  # data sets made before these were options have neither
    other = [f"{key} {there.get(key)}, not {value}" for key, value in options.items() if there.get(key) != value]
    was = [meta["tokenizer_fingerprint"], meta["eot"], meta.get("bos", tokenizer.bos)]
    if not other and was != [fingerprint(tokenizer), tokenizer.eot, tokenizer.bos]:
        other = [f"{options['tokenizer']} as it was, and it has changed"]
    if other:
        raise ValueError(f"{out}: exists, made with {'; '.join(other)}; delete it or choose another --out")


# ---------------------------------------------------------------------------------------------------------------------
# The command.


def table(data: TokenData) -> str:
    """One line per domain: documents, tokens of each split, text, and the share of val and test that is in train."""
    width = max(20, *(columns(domain) + 2 for domain in data.domains))
    titles = f"{'documents':>11}{'train':>15}{'val':>13}{'test':>13}{'MB':>11}{'bytes/token':>13}{'shared':>9}"
    lines = [padded("domain", width) + titles]
    shares = data.meta.get("shared", {})
    for domain in data.domains:
        counts = data.meta["domains"][domain]
        tokens = [counts[split]["tokens"] for split in SPLITS]
        documents, size = (sum(counts[split][key] for split in SPLITS) for key in ("documents", "bytes"))
        lines.append(
            f"{padded(domain, width)}{documents:>11,}{tokens[0]:>15,}{tokens[1]:>13,}{tokens[2]:>13,}"
            f"{size / 1e6:>11,.2f}{data.bytes_per_token(domain, 'train'):>13.2f}{percent(shares.get(domain)):>9}"
        )
    return "\n".join(lines)


def percent(share: float | None) -> str:
    """A share as text; a dash if it was not measured."""
    return "-" if share is None else f"{100 * share:.1f} %"


def warnings_about(data: TokenData) -> list[str]:
    """A line for each domain whose held-out text train has too much of."""
    remedy = "--drop_shared drops such documents"
    if data.meta.get("options", {}).get("drop_shared"):
        remedy = f"it is at most {100 * MAX_SHARE:.0f} % of a document, because --drop_shared dropped the others"
    return [
        f"warning: domain {domain}: {percent(share)} of the held-out text stands word for word in train (measured in "
        f"stretches of {STRETCH} bytes), so its losses are too good; {remedy}"
        for domain, share in data.meta.get("shared", {}).items()
        if share is not None and share > TOO_MUCH
    ]


def make_parser() -> Parser:
    """The command line; each option is an argument of prepare()."""
    parser = Parser(__doc__, usage=argparse.SUPPRESS)
    parser.add_argument("source", metavar="SOURCE", help="A folder of text, or the word installed.")
    parser.add_argument("--out", metavar="data/NAME", help="The folder of the data set to make.")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="SOURCE is a data set: read its files, and hold each against its checksum. Nothing is written.",
    )

    add = parser.add_argument_group("text").add_argument
    add("--domain_field", metavar="A.B", help="Each line names its domain in this field; folders do not count.")
    add("--domains", nargs="+", metavar="NAME", help="Take these domains only (default: all).")
    add(
        "--max_mb",
        type=float,
        metavar="MB",
        help="Stop taking text of a domain once there is so much of it, in 10^6 bytes. 0 takes all of it. "
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
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that what is half written is removed
    with user_errors():
        parser = make_parser()
        args = vars(parser.parse_args())
        if args.pop("verify"):
            for name in args.keys() - {"source"}:
                if args[name] != parser.get_default(name):
                    raise ValueError(f"--verify reads a data set, and takes no --{name}")
            TokenData(args["source"]).verify()
            print(f"{args['source']}: every file is as it was written")
            return
        if args["out"] is None:
            raise ValueError("--out is missing: the folder of the data set to make")
        made = prepare(**args)
        data = TokenData(args["out"])
        print(table(data))
        for line in warnings_about(data):
            print(line)
        already = "" if made else ": already prepared, with these options; if the text has changed, delete it first"
        print(f"{args['out']}{already}")


if __name__ == "__main__":
    command(main)
