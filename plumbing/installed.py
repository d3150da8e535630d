"""The text of `prepare_data.py installed`: what this project's requirements and Python put on every machine.

Its domains differ in kind:

    cpp         torch's C++ headers, without the thousands of generated one-operator ones
    docstrings  of numpy, scipy, torch and matplotlib: scientific English, reST and examples
    fonts       Adobe font metrics, a folder of matplotlib's: columns of names and numbers
    licences    of every installed package: legal English
    python      the standard library's source
    readmes     long descriptions in the packages' metadata: Markdown
    reference   the Python language reference as pydoc_data.topics has it: English prose
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

INSTALLED_MB = 4  # of each domain: enough for minutes on a laptop
GENERATED = 200_000  # bytes from which a source file is nearly always generated
NOT_LIBRARY = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def installed_files() -> list[tuple[str, Path]]:
    """[(domain, file)], sorted. A package that is missing only makes its domain smaller."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    files = [("python", p) for p in source(stdlib, "*.py")]
    files += [("cpp", p) for p in source(package("torch") / "include", "*.h") if p.parts[-3:-1] != ("ATen", "ops")]
    files += [("docstrings", p) for n in ("numpy", "scipy", "torch", "matplotlib") for p in source(package(n), "*.py")]
    files += [("fonts", p) for p in (package("matplotlib") / "mpl-data" / "fonts").rglob("*.afm")]
    files += [("reference", stdlib / "pydoc_data" / "topics.py"), ("licences", stdlib / "LICENSE.txt")]
    for path in (path for distribution in metadata.distributions() for path in distribution.files or []):
        if re.match(r"(?i)(licen[cs]e|copying|notice)(?!.*\.(py|pyc|h|json)$)", path.name):
            files.append(("licences", Path(path.locate())))
        elif path.name == "METADATA" and path.parent.name.endswith(".dist-info"):
            files.append(("readmes", Path(path.locate())))
    return sorted({(domain, path) for domain, path in files if path.is_file()})


def package(name: str) -> Path:
    """The folder of a package. It is looked up, not imported: importing torch takes seconds."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec and spec.origin else Path("no such package")


def source(top: Path, pattern: str) -> list[Path]:
    """The source files below `top`, without tests and generated files."""
    found = (p for p in top.rglob(pattern) if NOT_LIBRARY.isdisjoint(p.relative_to(top).parts))
    return [p for p in found if p.is_file() and p.stat().st_size < GENERATED]


def read_installed(domain: str, path: Path) -> Iterator[tuple[str, str, int]]:
    """The documents of a file, as plumbing/documents.py yields them: its text, or the part of it that is prose."""
    text = path.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")
    match domain:
        case "readmes":
            documents = [text.partition("\n\n")[2]]  # below the header fields
        case "docstrings" | "reference":
            documents = [text for text in strings(domain, text) if isinstance(text, str) and len(text) >= 300]
        case _:
            documents = [text]
    for document in documents:
        yield domain, document, path.stat().st_size


def strings(domain: str, code: str) -> list:
    """The docstrings of Python code, or for the domain reference all its constants."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            nodes = list(ast.walk(ast.parse(code)))
    except (SyntaxError, ValueError, RecursionError):
        return []  # written for another version of Python
    if domain == "reference":
        return [node.value for node in nodes if isinstance(node, ast.Constant)]
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [ast.get_docstring(node) for node in nodes if isinstance(node, kinds)]
