"""Files that a command writes: checked before the work is done, written whole at its end, and held by the disk."""

import os
from contextlib import suppress
from pathlib import Path


def check_output(file: Path) -> None:
    """ValueError unless a file can be written there, or its directories made first: called before the work is done."""
    if file.is_dir():
        raise ValueError(f"{file}: this is a directory, the path of a file is needed")
    if len(os.fsencode(file.name)) > 255:
        raise ValueError(f"{file}: the name of a file has at most 255 bytes")
    there = next(path for path in (file, *file.absolute().parents) if path.exists())
    if there != file and not there.is_dir():
        raise ValueError(f"{file}: {there} is not a directory")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{file}: {there} cannot be written")


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is always whole: on a full disk what was there before stays. OSError names it."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, file)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise OSError(error.errno, error.strerror, str(file)) from None


def flush(directory: Path) -> None:
    """Have the disk hold all files of a directory, so that a power failure after its renaming loses nothing."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
