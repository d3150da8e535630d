"""What a file is that is not what its name says. People have such files: a clone without git-lfs, a download that
failed, weights that were saved by pickle under another name."""

from pathlib import Path

POINTER = b"version https://git-lfs"  # how the file begins that git-LFS puts in place of a large one
IS_POINTER = "a git-LFS pointer, not the file itself; `git lfs pull` fetches that"
BEGINS_WITH = (
    (POINTER, IS_POINTER),
    (b"\x80", "a pickle, which is never opened: it could run any code"),
    (b"PK\x03\x04", "a zip file, perhaps one of torch.save, which is never opened: it could run any code"),
    (b"\x1f\x8b", "a gzip file"),
    (b"<", "a web page"),
)


def what_it_is(file: Path) -> str:
    """What a file is by its first bytes, to be said in the line that refuses it; empty where that is not known."""
    with open(file, "rb") as raw:
        start = raw.read(64).lstrip()
    return next((f"it is {what}" for begin, what in BEGINS_WITH if start.startswith(begin)), "")
