"""Files that a command writes: checked before the work is done, written whole at its end, and held by the disk."""

import os
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"  # what the name of a file ends with while it is written


def check_output(file: Path) -> None:
    """ValueError unless a file can be written there, or its directories made first: called before the work is done."""
    real = Path(os.path.realpath(file))  # the file that a link stands for
    if len(os.fsencode(real.name + PARTIAL)) > 255:
        raise ValueError(f"{file}: the name of a file has at most {255 - len(PARTIAL)} bytes here")
    if real.exists() and not real.is_file():
        what = "a directory" if real.is_dir() else "no ordinary file"
        raise ValueError(f"{file}: this is {what}, the path of a file is needed")
    there = next(path for path in real.parents if path.exists())
    if not there.is_dir():
        raise ValueError(f"{file}: {there} is not a directory")
    for path in (there, real):
        if path.exists() and not os.access(path, os.W_OK):
            raise ValueError(f"{file}: {path} cannot be written")


def write_whole(file: Path, text: str) -> None:
    """Write a file so that it is always whole: on a full disk what was there before stays. A link stays, and what it
    stands for is written. OSError names the file."""
    real = Path(os.path.realpath(file))
    partial = real.with_name(real.name + PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, real)
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
