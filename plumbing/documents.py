"""A file -> its documents, as prepare_data.py reads a user's text.

    .txt                  the file is one document
    .jsonl, .json         a document in each line, {"text": "..."}; a .json may also be one list of such objects
    .gz, .zst after that  the same, packed
    .parquet              a table with a column "text", by pyarrow

The reader yields (domain, text, bytes of the file that have been read so far); the last is for the progress bar. A line
that holds no document is left out, and so is the rest of a file that cannot be read.
"""

import codecs
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from plumbing.dataset import wrong_name
from plumbing.folder import File
from plumbing.foreign import IS_POINTER, POINTER
from plumbing.left_out import LeftOut, TooMuchLeftOut

PIECE = 1 << 20  # characters of a long .txt file that are read at a time, where it is cut
MAX_LINE = 1 << 27  # bytes of a line, or of a .json file that is one list: it is held in memory
NO_LINES = (".json", ".json.gz", ".json.zst")  # a file with such a name may be one list
Text = tuple[str, str, int]
Record = tuple[int, bytes | dict | None, int]  # number in the file, content (None: a line too long), bytes read so far


def read_file(file: File, left_out: LeftOut, domain_field: str | None = None) -> Iterator[Text]:
    """The documents of one file. ValueError if more is left out, by now, than may be."""
    place, kind = str(file.path), file.path.suffix.lower()
    try:
        with open(file.path, "rb") as raw:
            check_head(raw)
            if kind == ".txt":
                for text in pieces(raw) if file.cut else [raw.read().decode("utf-8-sig", errors="replace")]:
                    yield file.domain, text, raw.tell()
                return
            records = read_parquet(raw, domain_field) if kind == ".parquet" else read_json(raw, file.path, left_out)
            for number, content, position in records:
                place = f"{file.path}:{number}"
                try:
                    found = document(content, file.domain, domain_field)
                except ValueError as error:
                    left_out.bad_line(f"{place}: {error}")
                    continue
                left_out.lines += 1
                yield *found, position
    except TooMuchLeftOut:
        raise
    except (ValueError, OSError, EOFError, zlib.error) as error:
        left_out.bad_file(f"{place}: {getattr(error, 'strerror', None) or error}")


def check_head(stream: BinaryIO):
    """ValueError for what a file of text cannot begin with."""
    head = stream.peek(len(POINTER))
    if head.startswith(POINTER):
        raise ValueError(f"this is {IS_POINTER}")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("this is UTF-16; convert it to UTF-8")


def pieces(raw: BinaryIO) -> Iterator[str]:
    """The text of a file in pieces of about PIECE characters, which end where a line ends."""
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", errors="replace", newline="")
    while piece := text.read(PIECE):
        yield piece + text.readline(PIECE)


def document(content: bytes | dict | None, domain: str | None, domain_field: str | None) -> tuple[str, str]:
    """(domain, text) of a line or a row. ValueError where it holds no document."""
    if content is None:
        raise ValueError(f"longer than {MAX_LINE / 1e6:.0f} MB")
    record = parse(content) if isinstance(content, bytes) else content
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('no document, which is an object with a "text", as {"text": "..."}')
    return find_domain(record, domain_field) if domain_field else domain, record["text"]


def parse(line: bytes) -> object:
    """The value of a JSON text. Bytes that are no UTF-8 become U+FFFD. ValueError for what is no JSON."""
    try:
        return json.loads(line.decode("utf-8", errors="replace"))
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError:
        raise ValueError("a number of too many digits") from None


def find_domain(record: dict, domain_field: str) -> str:
    """The domain that a line names in the field "a.b", or in b of its field a; ValueError if it names none."""
    value = record.get(domain_field)
    if value is None:
        value = record
        for key in domain_field.split("."):
            value = value.get(key) if isinstance(value, dict) else None
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise ValueError(f"no domain in the field {domain_field} (--domain_field); it has {', '.join(record)[:200]}")
    if why := wrong_name(str(value)):
        raise ValueError(f"the field {domain_field} (--domain_field) names no domain, {why}")
    return str(value)


def read_json(raw: BinaryIO, path: Path, left_out: LeftOut) -> Iterator[Record]:
    """The lines of a file, or the items of the list that a .json file may be."""
    stream = unpack(raw, path)
    check_head(stream)
    head = stream.readline(MAX_LINE).removeprefix(codecs.BOM_UTF8)
    if path.name.lower().endswith(NO_LINES) and not (isinstance(value_of(head), dict) and stream.peek(1)):
        head += stream.read(MAX_LINE)
        value = value_of(head)
        if isinstance(value, dict) and "text" not in value:
            left_out.add(".json files of one object without a text", path)
            return
        if isinstance(value, list | dict):
            items = value if isinstance(value, list) else [value]
            yield from ((number, item or {}, raw.tell()) for number, item in enumerate(items, 1))
            return
        if head.lstrip().startswith(b"["):
            raise ValueError(
                f"a list that is damaged or longer than {MAX_LINE / 1e6:.0f} MB; give each document a line"
            )
        head += stream.readline(MAX_LINE)
    for number, line in enumerate(chain(lines(io.BytesIO(head)), lines(stream)), 1):
        if line is None or line.strip():
            yield number, line, raw.tell()


def value_of(text: bytes) -> object:
    """The value of a JSON text; None for what is no JSON."""
    try:
        return parse(text)
    except ValueError:
        return None


def lines(stream: BinaryIO) -> Iterator[bytes | None]:
    """The lines that are left of a stream; None for one of more than MAX_LINE bytes."""
    while line := stream.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            line = None
            while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
        yield line


def read_parquet(raw: BinaryIO, domain_field: str | None) -> Iterator[Record]:
    """The rows of a table."""
    import pyarrow
    import pyarrow.parquet

    size, names = os.fstat(raw.fileno()).st_size, ["text"] + ([domain_field] if domain_field else [])
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        there = [table.schema.column(i).path for i in range(table.metadata.num_columns)]  # b of a column a is a.b
        if "text" not in there:
            raise ValueError(f"no column text; there are {', '.join(there)}")
        if domain_field and domain_field not in there:
            raise ValueError(f"no column {domain_field} (--domain_field); there are {', '.join(there)}")
        number = 0
        for batch in table.iter_batches(1000, columns=names, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, row, size * number // table.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise ValueError(str(error)) from None


def unpack(raw: BinaryIO, path: Path) -> BinaryIO:
    """The stream of what a packed file holds; of another, the file itself."""
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=raw)
        case ".zst":
            return io.BufferedReader(ZstdFrames(raw))
    return raw


class ZstdFrames(io.RawIOBase):
    """The bytes that the frames of a .zst file hold.

    Raises EOFError where the file ends within a frame. zstandard's own reader takes that for the end of the text.
    """

    def __init__(self, raw):
        import zstandard

        self.raw, self.error = raw, zstandard.ZstdError
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)  # of `zstd --long=31`
        self.frame, self.ready = self.decompressor.decompressobj(), memoryview(b"")

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
            try:
                self.ready = memoryview(self.frame.decompress(data))
            except self.error as error:
                raise ValueError(str(error)) from None
        n = min(len(buffer), len(self.ready))
        buffer[:n], self.ready = self.ready[:n], self.ready[n:]
        return n
