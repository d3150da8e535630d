"""README.md and the docs say what is so: their commands parse, what they name exists, every metric is explained."""

import ast
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
from conftest import metrics
from torch.distributed.run import get_args_parser

from experiments import large
from plumbing.command_line import load
from train import Settings

ROOT = Path(__file__).parent.parent
README_WORDS = 1800  # as `wc -w` counts them: ten minutes
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


def definition(script: str, name: str) -> ast.AST:
    """Where a script defines a function, class, method or name on its top level, such as `Mixture.update`."""

    def names(node):
        targets = getattr(node, "targets", [getattr(node, "target", node)])
        return [getattr(target, "name", getattr(target, "id", None)) for target in targets]

    found = ast.parse((ROOT / script).read_text())
    for part in name.split("."):
        found = next((node for node in found.body if part in names(node)), None)
        assert found is not None, f"{script} has no {name}"
    return found


def test_the_readme_is_read_in_ten_minutes():
    assert len(TEXT["README.md"].split()) <= README_WORDS


def test_the_readme_links_each_page_once():
    linked = re.findall(r"\]\((docs/\w+\.md)\)", TEXT["README.md"])
    assert sorted(linked) == sorted(f"docs/{name}" for name in TEXT if name != "README.md")


@pytest.mark.parametrize("name, command", commands())
def test_every_command_parses(name, command):
    words = shlex.split(command.replace("$(seq 0 2)", "0"))
    if words[0] == "torchrun":
        launched = get_args_parser().parse_args(words[1:])
        words = ["python", launched.training_script, *launched.training_script_args]
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
            given = {a.partition("=")[0] for a in args if a.startswith("--") and " " not in a}
            assert given <= options_of(script) | {"--help"}
    else:
        assert words[0] in ("git", "cd", "pip", "for", "done", "lm_eval", "apt-get", "dpkg", "cmp"), (
            f"{name}: how is this checked? {command}"
        )


@pytest.mark.parametrize("name", TEXT)
def test_what_is_named_exists(name):
    for path in re.findall(r"\]\((?!http)([^)#]+)", TEXT[name]):
        assert (ROOT / "docs" / path if name != "README.md" else ROOT / path).exists(), path
    for path in re.findall(r"`((?:\w+/)*[\w.]+\.(?:py|md|json|png))`", TEXT[name]):
        made = path.startswith(("out/", "data/", "model/")) or re.fullmatch(r"\w+\.(png|json)", path)  # by a run
        assert made or (ROOT / path).exists() or (ROOT / "docs" / path).exists(), path
    for script, function in re.findall(r"`((?:\w+/)*\w+\.py):([\w.]+)`", TEXT[name]):
        definition(script, function)


def test_the_comparison_in_the_readme_is_what_was_measured():
    results = json.loads((ROOT / "docs/compare/results.json").read_text())["toy"]
    for first, schedule in (
        ("`constant`", "constant"),
        ("`sheared`", "sheared"),
        ("`paper`", "paper"),
        ("`even`", "even"),
    ):
        (row,) = re.findall(rf"^\| {first}.*$", TEXT["README.md"], re.M)
        shown = [float(x.replace("−", "-")) for x in re.findall(r"−?(?<!\d)\.\d{3}", row)]
        rows = [results[mixture][schedule].values() for mixture in ("skewed", "own")]
        values = [[run[key] for run in row] for row in rows for key in ("average", "worst")]
        assert shown == pytest.approx([f(x) for x in values for f in (mean, stdev)], abs=6e-4)


def test_each_equation_stands_where_the_table_says():
    """The table of the method: every row names an equation or section, and the function's source bears it too."""
    rows = re.findall(r"^\| (.+?) \| .+? \| `((?:\w+/)*\w+\.py):([\w.]+)` \|$", TEXT["README.md"], re.M)
    assert len(rows) >= 12
    for what, script, function in rows:
        segment = ast.get_source_segment((ROOT / script).read_text(), definition(script, function))
        numbers = re.search(r"(?:eq\.|section) ([\d.]+(?: and \d)?)", what)
        for number in numbers[1].split(" and ") if numbers else ():
            named = re.findall(r"(?:eq\.|section)[^)\n:]*|# \d[\d.]*", segment, re.I)
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d.]*\d)", " ".join(named)), f"{function}: {number}"


def test_every_logged_key_is_explained(chain):
    """docs/metrics.md has a section for each type of line of metrics.jsonl, and one for timings.jsonl."""
    logged = {"timings.jsonl": set()}
    for out in chain[0].values():
        for line in metrics(out):
            logged.setdefault(f"`{line['type']}`", set()).update(line.keys() - {"type"})
        for line in (out / "timings.jsonl").read_text().splitlines():
            logged["timings.jsonl"].update(json.loads(line))
    sections = re.split(r"^##+ ", TEXT["metrics.md"], flags=re.M)
    for kind, keys in logged.items():
        (section,) = (text for text in sections if text.startswith(kind))
        explained = set(re.findall(r"`(\w+)`", " ".join(re.findall(r"^\| (.+?) \|", section, re.M))))
        assert keys <= explained, f"{kind}: not explained: {sorted(keys - explained)}"


def test_results_in_the_docs_are_json_with_their_command():
    for path in (ROOT / "docs").rglob("*.json"):
        assert "command" in json.loads(path.read_text()), path


def test_the_table_of_the_large_configs_is_that_of_its_figures():
    assert large.table(json.loads((ROOT / "docs/dry_run/large.json").read_text())["rows"]) in TEXT["dry_run.md"]
