"""Which files of a user's folder hold text.

    text/code/a.jsonl.zst      a sub-folder is a domain, with files at any depth
    text/part-0001.parquet     or, with --domain_field, each line of any file names its domain

Links are followed. Hidden files (.git, ._a.jsonl, .DS_Store) and the __MACOSX folder of a zip file are no text. What
else is there and is not used is counted.
"""

import importlib.util
import os
from pathlib import Path
from typing import NamedTuple

from plumbing.dataset import wrong_name
from plumbing.left_out import LeftOut

PACKED = ("", ".gz", ".zst")
TABLES = (*(f"{kind}{packed}" for kind in (".jsonl", ".json") for packed in PACKED), ".parquet")  # of many documents
TEXT = (*TABLES, ".txt")
NEEDS = {".zst": "zstandard", ".parquet": "pyarrow"}  # the package that reads them
FEW = 20  # a domain of fewer .txt files, and nothing else, is cut into train and held-out text


class File(NamedTuple):
    """A file of text. `domain` is None where each of its lines names one. If it is `cut`, each piece of it gives its
    end to the held-out text."""

    domain: str | None
    path: Path
    cut: bool = False


def folder_files(folder: Path, domain_field: str | None, left_out: LeftOut) -> list[File]:
    """The files of a user's folder, sorted. ValueError if there is nothing to read."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; SOURCE is a folder of text, or the word installed")
    if domain_field:
        files = [File(None, path) for path in text_files(folder, TABLES, left_out)]
        where = ""
    else:
        files = []
        for top in sub_folders(folder, left_out):
            paths = text_files(top, TEXT, left_out)
            cut = len(paths) < FEW and all(path.suffix.lower() == ".txt" for path in paths)
            files += [File(top.name, path, cut) for path in paths]
            if not paths:
                print(f"{top}: left out, it holds no {', '.join(TEXT)} file")
        where = (
            " in a sub-folder: make a sub-folder of such files for each domain, or give --domain_field if each line "
            "names its domain. Other text, such as source code, goes into .txt files"
        )
    if not files:
        raise ValueError(f"{folder}: no {', '.join(TABLES if domain_field else TEXT)} files{where}")
    for file in files:
        package = NEEDS.get(file.path.suffix.lower())
        if package and importlib.util.find_spec(package) is None:
            raise ValueError(f"{file.path}: to read {file.path.suffix} files, `pip install {package}`")
    return files


def sub_folders(folder: Path, left_out: LeftOut) -> list[Path]:
    """The folders in `folder` whose names are domains, sorted."""
    tops = []
    for path in sorted(folder.iterdir()):
        if is_foreign(path.name):
            left_out.add("hidden files and folders", path)
        elif not path.is_dir():
            left_out.add("files that are in no sub-folder", path)
        elif why := wrong_name(path.name):
            raise ValueError(f"{str(path)!r}: its name is no domain's, {why}; rename the folder")
        else:
            tops.append(path)
    return tops


def is_foreign(name: str) -> bool:
    """Whether a file or folder is hidden, or the one in which macOS puts a copy of every file's properties."""
    return name.startswith(".") or name == "__MACOSX"


def text_files(top: Path, endings: tuple[str, ...], left_out: LeftOut) -> list[Path]:
    """The files below `top` that have one of these endings, sorted. Links are followed, each folder is read once."""

    def fail(error: OSError):
        raise error

    found, seen = [], set()
    for folder, folders, names in os.walk(top, followlinks=True, onerror=fail):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:  # a link that leads back, or to where another leads
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()  # where two links lead to one folder, the first by name counts
        names.sort()
        for name in [name for name in folders if is_foreign(name)]:
            left_out.add("hidden files and folders", Path(folder, name))
            folders.remove(name)
        for name in names:
            path = Path(folder, name)
            if is_foreign(name):
                left_out.add("hidden files and folders", path)
            elif not path.is_file():
                left_out.add("links that lead nowhere, and what else is no file", path)
            elif name.lower().endswith(endings):
                found.append(path)
            elif name.lower().endswith(TEXT):
                left_out.add(".txt files, which name no domain", path)
            else:
                left_out.add(f"{path.suffix or 'other'} files", path)
    return sorted(found)
