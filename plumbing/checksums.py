"""checksums.json: a checksum of each file of a directory. Damage to a file is seen when it is read.

    {"config.json": "0f3a...", "model.safetensors": "81c2..."}

XXH3 reads 5 GB/s, so that it adds little to the time of the writing. It finds accidents, not what somebody forges. A
directory of another program has no checksums.json, and is read as it is. So is a file that it does not name.
"""

import json
from pathlib import Path

import xxhash

from plumbing import parallel, records

NAME = "checksums.json"


def of(file: Path) -> str:
    """The checksum of a file: XXH3 of 128 bits, in hexadecimal digits."""
    found = xxhash.xxh3_128()
    with open(file, "rb", buffering=0) as content:
        while piece := content.read(1 << 20):
            found.update(piece)
    return found.hexdigest()


def write(directory: Path, known: dict[str, str] | None = None) -> None:
    """Write the checksums of all files of a directory. known: those that need not be computed again."""
    known = known or {}
    files = sorted(file for file in directory.iterdir() if file.is_file() and file.name != NAME)
    (directory / NAME).write_text(json.dumps({f.name: known.get(f.name) or of(f) for f in files}, indent=1) + "\n")


def check(directory: Path, files: str = "*") -> None:
    """ValueError where a file is missing or is not what was written, with its name. files: a pattern of their names.

    Several processes share the files, so all of them must call it, within `parallel.together`.
    """
    if not (directory / NAME).is_file():
        return
    written = records.read(directory / NAME, records.Checksums, "the checksums of the files beside it")
    names = sorted(name for name in written if Path(name).match(files))
    for name in names[parallel.rank() :: parallel.size()]:
        file = directory / Path(name).name  # never one of another directory
        if not file.is_file():
            raise ValueError(f"{file}: missing, though {NAME} names it")
        if of(file) != written[name]:
            raise ValueError(f"{file}: damaged: its checksum is not the one in {NAME}")
