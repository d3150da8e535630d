"""The text of `prepare_data.py installed`: what this project's requirements and Python put on every machine.

Its domains differ in kind:

    comments    of the source of numpy, scipy, torch, matplotlib, sympy and networkx: English, as programmers write it
    cpp         torch's C++ headers, without the thousands of generated one-operator ones
    docstrings  of numpy, scipy, torch and matplotlib: scientific English, reST and examples
    formulas    sympy's tests: mathematics, written as code
    manuals     the long descriptions of all packages, and Python's language reference: English prose, Markdown and reST
    python      the standard library's source
    stubs       .pyi files of numpy, torch, matplotlib, scipy and tokenizers: names and their types

(sympy and networkx come with torch.) There are no licences, because they are copies of each other.
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from importlib import metadata
from pathlib import Path

from plumbing.folder import File

INSTALLED_MB = 4  # of each domain: enough for minutes on a laptop
GENERATED = 200_000  # bytes from which a source file is nearly always generated
SHORT = 300  # characters that a text needs to be a document, where it is a part of a file
TESTS = {"test", "tests", "idle_test", "testing"}
NOT_LIBRARY = TESTS | {"site-packages", "dist-packages", "encodings", "pydoc_data"}


def installed_files() -> list[File]:
    """The files, sorted. A package that is missing only makes its domain smaller."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    found = {
        "comments": sources("*.py", "numpy", "scipy", "torch", "matplotlib", "sympy", "networkx"),
        "cpp": [p for p in sources("*.h", "torch") if p.parts[-3:-1] != ("ATen", "ops")],
        "docstrings": sources("*.py", "numpy", "scipy", "torch", "matplotlib"),
        "formulas": [p for p in package("sympy").rglob("test_*.py") if is_written_by_hand(p)],
        "manuals": [*descriptions(), stdlib / "pydoc_data" / "topics.py"],
        "python": library(stdlib, "*.py"),
        "stubs": sources("*.pyi", "numpy", "torch", "matplotlib", "scipy", "tokenizers"),
    }
    return sorted({File(domain, path) for domain, paths in found.items() for path in paths if path.is_file()})


def package(name: str) -> Path:
    """The folder of a package. It is looked up, not imported: importing torch takes seconds."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path("no such package")


def descriptions() -> list[Path]:
    """The metadata files of all packages; the long description is what README on PyPI shows."""
    files = [file for distribution in metadata.distributions() for file in distribution.files or []]
    return [Path(f.locate()) for f in files if f.name == "METADATA" and f.parent.name.endswith(".dist-info")]


def sources(pattern: str, *names: str) -> list[Path]:
    """The source files of some packages."""
    return [path for name in names for path in library(package(name), pattern)]


@cache  # two domains look through the same packages
def library(top: Path, pattern: str) -> list[Path]:
    """The source files below `top`, without tests and generated files."""
    found = (p for p in top.rglob(pattern) if NOT_LIBRARY.isdisjoint(p.relative_to(top).parts))
    return [p for p in found if is_written_by_hand(p)]


def is_written_by_hand(path: Path) -> bool:
    """Whether it is a file, and not so large that it must be generated."""
    return path.is_file() and path.stat().st_size < GENERATED


def read_installed(file: File) -> Iterator[tuple[str, str, int]]:
    """The documents of a file, as plumbing/documents.py yields them: its text, or the parts of it that are prose."""
    domain, path, _ = file
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    if domain == "comments":
        documents = [comments(text)]
    elif domain == "docstrings":
        documents = docstrings(text)
    elif domain == "manuals" and path.suffix == ".py":
        documents = strings(text)
    elif domain == "manuals":
        documents = [text.partition("\n\n")[2]]  # below the header fields
    else:
        documents = [text]
    for document in documents:
        if len(document) >= SHORT:
            yield domain, document, path.stat().st_size


def comments(code: str) -> str:
    """The comments of Python code that are a few lines long, with a blank line between them."""
    blocks = re.findall(r"(?:^[ \t]*#.*\n)+", code, flags=re.MULTILINE)
    texts = [re.sub(r"^[ \t]*#+ ?", "", block, flags=re.MULTILINE) for block in blocks]
    return "\n".join(text for text in texts if len(text) >= 120)


def docstrings(code: str) -> list[str]:
    """The docstrings of Python code."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) or "" for node in parse(code) if isinstance(node, kinds)]


def strings(code: str) -> list[str]:
    """The string constants of Python code."""
    return [node.value for node in parse(code) if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def parse(code: str) -> list[ast.AST]:
    """The nodes of the syntax tree; none if the code is for another version of Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            return list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError):
        return []
