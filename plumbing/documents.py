"""Files -> documents: what prepare_data.py reads of a user's folder.

A document is a .txt file, or the "text" of one line of a .jsonl, .jsonl.gz or .jsonl.zst file. The readers yield
(domain, text, bytes of the file that have been read so far); the last is for the progress bar.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")  # endings of files with a document in each line


def folder_files(folder: Path, domain_field: str | None) -> list[tuple[str | None, Path]]:
    """The files of a user's folder, sorted: [(domain, file)].

    A sub-folder is a domain. With `domain_field` there are no sub-folders: each line names its domain itself, and the
    domain of the file is None. Raises ValueError if there is nothing to read.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; SOURCE is a folder of text, or the word installed")
    if domain_field:
        files = [(None, path) for path in text_files(folder, LINES)]
        layout = ""
    else:
        files = [(top.name, path) for top in sub_folders(folder) for path in text_files(top, (*LINES, ".txt"))]
        layout = " in sub-folders, one per domain (does each line name it? Give --domain_field)"
        beside = [p for p in folder.iterdir() if p.name.lower().endswith((*LINES, ".txt"))]
        if beside:
            print(f"{folder}: left out {len(beside)} files that are in no sub-folder, as {beside[0].name}")
    if not files:
        endings = LINES if domain_field else (*LINES, ".txt")
        raise ValueError(f"{folder}: no {', '.join(endings)} files{layout}")
    return files


def sub_folders(folder: Path) -> list[Path]:
    """The folders in `folder`, sorted, without the hidden ones."""
    return sorted(p for p in folder.glob("[!.]*") if p.is_dir())


def text_files(top: Path, endings: tuple[str, ...]) -> list[Path]:
    """The files below `top` that have one of these endings, sorted. Says so if there are none."""
    found = sorted(p for p in top.rglob("*") if p.name.lower().endswith(endings) and p.is_file())
    if not found:
        print(f"{top}: left out, it holds no {', '.join(endings)} file")
    return found


def read_file(domain: str | None, path: Path, domain_field: str | None = None) -> Iterator[tuple[str, str, int]]:
    """The documents of one file. A .jsonl file is read line by line and never held whole.

    Raises ValueError with the file and the line of whatever is wrong.
    """
    with open(path, "rb") as raw:
        if path.suffix.lower() == ".txt":
            yield domain, decode(raw.read(), path), raw.tell()
            return
        stream, broken = decompress(raw, path)
        number = 0
        try:
            for line in io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace"):
                number += 1
                if line.strip():
                    record = parse_line(line)
                    name = find_domain(record, domain_field) if domain_field else domain
                    yield name, record["text"], raw.tell()
        except broken as error:
            raise ValueError(f"{path}:{number}: {error}") from None


def decode(data: bytes, path: Path) -> str:
    """The text of a .txt file. Bytes that are no UTF-8 become U+FFFD."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError(f"{path}: this is UTF-16; convert it to UTF-8")
    return data.decode("utf-8-sig", errors="replace")


def parse_line(line: str) -> dict:
    """The object in a line of a .jsonl file, which has a "text"."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    if not isinstance(record, dict) or not isinstance(record.get("text"), str):
        raise ValueError('a line must be an object with the document in "text", as {"text": "..."}')
    return record


def find_domain(record: dict, domain_field: str) -> str:
    """The domain that a line names in the field "a.b", as a file name: domains that differ only in other characters
    become one."""
    value = record
    for key in domain_field.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    name = re.sub(r"[^\w.-]+", "_", str(value), flags=re.ASCII).strip("._")
    if value is None or isinstance(value, dict | list) or not name:
        raise ValueError(f"no domain in the field {domain_field} (--domain_field); the line has {', '.join(record)}")
    return name


def decompress(raw: BinaryIO, path: Path) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """The stream of a .jsonl file's bytes, and the exceptions that reading it raises where the file is broken."""
    broken = (ValueError, EOFError, zlib.error, gzip.BadGzipFile)
    match path.suffix.lower():
        case ".gz":
            return gzip.GzipFile(fileobj=raw), broken
        case ".zst":
            try:
                import zstandard
            except ImportError:
                raise ValueError(f"{path}: to read .zst files, `pip install zstandard`") from None
            stream = io.BufferedReader(ZstdFrames(raw, zstandard.ZstdDecompressor()))
            return stream, (*broken, zstandard.ZstdError)
    return raw, broken


class ZstdFrames(io.RawIOBase):
    """The bytes that the frames of a .zst file hold.

    Raises EOFError where the file ends within a frame. zstandard's own reader takes that for the end of the text.
    """

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
