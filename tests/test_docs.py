"""README.md and the docs say what is so: their commands parse, what they name exists, every metric is explained."""

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
from conftest import metrics

from plumbing.command_line import load
from train import Settings

ROOT = Path(__file__).parent.parent
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {path.name: path.read_text() for path in DOCS}


def commands() -> list[tuple[str, str]]:
    """(document, command) of every line of a ```sh block, continuation lines joined, comments cut."""
    found = []
    for name, text in TEXT.items():
        for block in re.findall(r"```sh\n(.*?)```", text, re.S):
            lines = (line.partition("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())
            found += [(name, line) for line in lines if line and not line.startswith("#")]
    return found


def options_of(script: str) -> set[str]:
    return set(re.findall(r'"(--\w+)"', (ROOT / script).read_text()))


@pytest.mark.parametrize("name, command", commands())
def test_every_command_parses(name, command):
    words = shlex.split(command.replace("$(seq 0 2)", "0"))
    if words[0] == "torchrun":
        words = ["python", *words[2:]]
        assert words[1] == "train.py"
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets)
    elif words[0] == "python":
        script, args = words[1], words[2:]
        assert (ROOT / script).is_file()
        if script == "train.py":
            if "--help" not in args:
                load(Settings, [str(ROOT / a) if a.startswith("config/") else a for a in args])
        else:
            given = {a.partition("=")[0] for a in args if a.startswith("--")}
            assert given <= options_of(script) | {"--help"}
    else:
        assert words[0] in ("git", "cd", "pip", "for", "done", "lm_eval", "apt-get", "dpkg"), (
            f"{name}: how is this checked? {command}"
        )


@pytest.mark.parametrize("name", TEXT)
def test_what_is_named_exists(name):
    for path in re.findall(r"\]\((?!http)([^)#]+)", TEXT[name]):
        assert (ROOT / "docs" / path if name != "README.md" else ROOT / path).exists(), path
    for path in re.findall(r"`((?:\w+/)*[\w.]+\.(?:py|md|json|png))`", TEXT[name]):
        made = path.startswith(("out/", "data/")) or path.endswith((".png", ".json"))  # by a run
        assert made or (ROOT / path).exists(), path
    for script, function in re.findall(r"`(\w+\.py):([\w.]+)`", TEXT[name]):
        tree = ast.parse((ROOT / script).read_text())
        for part in function.split("."):
            body = tree.body
            tree = next((n for n in body if getattr(n, "name", None) == part), None)
            assert tree is not None, f"{script} has no {function}"


def test_the_comparison_in_the_readme_is_what_was_measured():
    results = json.loads((ROOT / "docs/compare/tempered/results.json").read_text())
    for first, schedule in (
        ("`constant`", "constant"),
        ("`sheared`", "sheared"),
        ("`dro`", "dro"),
        ("the full method, rho 0.1", "full"),
        ("the full method, rho 1", "full, tempered"),
    ):
        (row,) = re.findall(rf"^\| {first}.*$", TEXT["README.md"], re.M)
        shown = [float(x.replace("−", "-")) for x in re.findall(r"−?(?<!\d)\.\d{3}", row)]
        rows = [results[part][schedule] for part in ("skew", "own") if schedule in results[part]]
        measured = [r[f"{key} degradation"][x] for r in rows for key in ("average", "worst") for x in ("mean", "sd")]
        assert shown == pytest.approx(measured, abs=6e-4)
        assert [len(r["seeds"]) for r in rows] in ([5], [5, 3])


def test_each_equation_stands_where_the_table_says():
    """The table of the method: every row names an equation or section, and the function's source bears it too."""
    rows = re.findall(r"^\| (.+?) \| .+? \| `(\w+\.py):([\w.]+)` \|$", TEXT["README.md"], re.M)
    assert len(rows) >= 8
    for what, script, function in rows:
        source = (ROOT / script).read_text()
        tree = ast.parse(source)
        for part in function.split("."):
            tree = next(n for n in tree.body if getattr(n, "name", None) == part)
        segment = ast.get_source_segment(source, tree)
        numbers = re.search(r"(?:eq\.|section) ([\d.]+(?: and \d)?)", what)
        for number in numbers[1].split(" and ") if numbers else ():
            named = re.findall(r"(?:eq\.|section)[^)\n:]*|# \d[\d.]*", segment)
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", " ".join(named)), f"{function}: {number}"


def test_every_logged_metric_is_in_the_glossary(chain):
    glossary = TEXT["README.md"].partition("## What is logged")[2].partition("\n## ")[0]
    keys = {key for stage in chain[0].values() for line in metrics(stage) for key in line}
    named = set(re.findall(r"`(\w+)`", glossary))
    assert keys - {"type"} <= named, f"not explained: {sorted(keys - named)}"
    kinds = {line["type"] for stage in chain[0].values() for line in metrics(stage)}
    assert kinds <= named


def test_results_in_the_docs_are_json_with_their_command():
    for path in (ROOT / "docs").rglob("*.json"):
        assert "command" in json.loads(path.read_text()), path
