"""From a command line to values: one dataclass of settings, a config file that is read but never executed.

    python train.py config/toy_prune.py --steps 800 --lr=1e-3      # the file first, then what is given by hand
    python train.py --help                                         # every setting, its default and its meaning

A config file is plain Python assignments of literals and arithmetic on them (`tokens = 32 * 4096`). It is parsed and
not run, so it can do nothing but set values, and a misspelt key is an error instead of a silent default. The assignment
`base = "other.py"` reads another config file of the same folder first. Every problem of the files and of the command
line is reported at once.

`user_errors` is how every command of this project treats a mistake: one line on stderr, exit status 2.
"""

import argparse
import ast
import dataclasses
import difflib
import io
import json
import math
import operator
import os
import re
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}


@contextmanager
def user_errors(*kinds: type[Exception]):
    """Turn an error raised inside into one line on stderr and exit status 2, without a traceback: an error of these
    kinds, by default a ValueError or OSError.

    Wrap the part of a command that reads what the user gave; leave the part where such an error would be our own
    mistake outside, so that it keeps its traceback. A terminal that cannot show a character gets its number.
    """
    kinds = kinds or (ValueError, OSError)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except kinds as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        line = f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun starts many processes: one on each machine says it
            print(line, file=sys.stderr)
        tell_torchrun(line)
        sys.exit(2)


def tell_torchrun(line: str) -> None:
    """Have torchrun, if it started this process, show this line in its report, which is the last that is printed."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake raised as ValueError, for `user_errors`, and the nearest option named."""

    def error(self, message: str):
        """Raise instead of printing usage and exiting."""
        if match := re.match(r"unrecognized arguments: (--\w+)", message):
            near = difflib.get_close_matches(match[1], self._option_string_actions, n=1)
            message += f", did you mean {near[0]}?" if near else "; --help lists the options"
        raise ValueError(message)

    def parse_known_args(self, args: list[str] | None = None, namespace=None):
        """argparse's, with the home folder for ~ in --out=~/x; in --out ~/x the shell has put it already."""
        args = sys.argv[1:] if args is None else args
        home = re.compile(r"(--\w+=)(~/.*)", re.DOTALL)
        args = [match[1] + os.path.expanduser(match[2]) if (match := home.fullmatch(arg)) else arg for arg in args]
        return super().parse_known_args(args, namespace)


def literal(node: ast.AST) -> Any:
    """Value of a parsed expression made of literals and arithmetic on them; ValueError for anything else."""
    match node:
        case ast.Expression(body=body):
            return literal(body)
        case ast.Constant(value=value):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](literal(left), literal(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return OPERATORS[type(op)](literal(operand))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            return {literal(k): literal(v) for k, v in zip(keys, values)}
    raise ValueError(f"only literals and arithmetic on them are allowed, not `{ast.unparse(node)}`")


class Limits(NamedTuple):
    """The smallest and the largest value that a setting may have."""

    low: float
    high: float = math.inf


class Group(str):
    """A heading of `--help`, given with the first setting that stands below it."""


class Free:
    """Marks a setting that may change when a run goes on: no number of the run depends on it."""


class Field(NamedTuple):
    """One setting of a dataclass whose fields are `Annotated[type, "documentation", ...]`."""

    kind: type
    default: Any
    doc: str
    limits: Limits | None
    group: Group | None
    free: bool


def fields(cls: type) -> dict[str, Field]:
    """name -> Field of each setting of a dataclass."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for f in dataclasses.fields(cls):
        kind, *marks = get_args(hints[f.name])
        found[f.name] = Field(
            kind=kind,
            default=f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
            doc=next(mark for mark in marks if type(mark) is str),
            limits=next((mark for mark in marks if isinstance(mark, Limits)), None),
            group=next((mark for mark in marks if isinstance(mark, Group)), None),
            free=Free in marks,
        )
    return found


def out_of_limits(settings: Any) -> list[str]:
    """What is wrong with the numbers of an instance of such a dataclass, one text for each."""
    wrong = []
    for name, field in fields(type(settings)).items():
        value = getattr(settings, name)
        if field.limits and not (field.limits.low <= value <= field.limits.high and math.isfinite(value)):
            low, high = field.limits
            wrong.append(f"{name} = {value} must be " + (f"at least {low}" if high == math.inf else f"{low} to {high}"))
    return wrong


def coerce(value: Any, kind: type) -> Any:
    """`value` as `kind`, with int -> float and ~/ -> the home folder the only conversions; ValueError says what was
    expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is not one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) is str and value.startswith("~/"):
        return os.path.expanduser(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is {_named(type(value))}, {_named(kind)} is needed")
    return value


def _named(kind: type) -> str:
    names = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a string"}
    return names.get(kind.__name__, f"a {kind.__name__}")


def load(cls: type, args: list[str]) -> Any:
    """An instance of the dataclass `cls` from command-line arguments: config files, then `--key=value`, `--key value`
    or, for a setting that is True or False, `--key`.

    Prints the settings and exits for `--help`. Raises ValueError with all problems found, in one message.
    """
    known, values, problems = fields(cls), {}, []

    def put(where: str, key: str, read: Callable[[], Any]):
        try:
            values[key] = coerce(read(), known[key].kind)
        except (ValueError, TypeError, ArithmeticError) as error:
            problems.append(f"{where}: {key}: {error}")

    def unknown(where: str, key: str):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f", did you mean '{near[0]}'?" if near else "; --help lists the settings"
        problems.append(f"{where}: unknown setting '{key}'{hint}")

    given, others = parser_of(cls, known).parse_known_args(with_values(args, known))
    value_of_unknown = False
    for arg in others:  # config files, and options that do not exist
        if arg.startswith("-"):
            option, has_value, _ = arg.partition("=")
            unknown(option, option.lstrip("-"))
            value_of_unknown = not has_value
        elif value_of_unknown:
            value_of_unknown = False
        else:
            for where, key, node in read_config(Path(arg), problems):
                if key in known:
                    put(where, key, partial(literal, node))
                else:
                    unknown(where, key)
    for key, text in vars(given).items():  # what is given by hand wins
        put(f"--{key}", key, partial(value_of, text, known[key].kind))
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**values)


def with_values(args: list[str], known: dict[str, Field]) -> list[str]:
    """The arguments with `-` in the names of settings as `_`, `--key value` as `--key=value`, and `--key` alone as
    `--key=True` for a switch."""
    result, rest = [], list(args)
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            field = known.get(name[2:])
            if field and not equals and field.kind is bool:
                value = rest.pop(0) if rest and rest[0] in ("True", "False") else "True"
            elif field and not equals and rest and not rest[0].startswith("--"):
                value = rest.pop(0)  # argparse takes some negative numbers for options
            arg = f"{name}={value}" if equals or value else name
        result.append(arg)
    return result


def parser_of(cls: type, known: dict[str, Field]) -> Parser:
    """The parser of the settings of `cls`: its `--help` is their documentation."""
    title, _, usage = cls.__doc__.partition("\n")
    parser = Parser(usage=title, description=usage, allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    group = parser
    for name, field in known.items():
        if field.group:
            group = parser.add_argument_group(field.group)
        doc = field.doc.replace("%", "%%")
        doc += f" (default: {field.default!r})".replace("%", "%%")
        group.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar=_placeholder(field.kind), help=doc)
    return parser


def _placeholder(kind: type) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {"int": "N", "float": "X", "bool": "True|False", "str": "TEXT"}.get(kind.__name__, kind.__name__.upper())


def value_of(text: str, kind: type) -> Any:
    """What an option's text says: a Python literal, or the text itself, as in `--out=out/my run`."""
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        return text
    if kind is str or get_origin(kind) is Literal:
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else text
    return literal(node)


def read_config(path: Path, problems: list[str], above: tuple[Path, ...] = ()) -> list[tuple[str, str, ast.AST]]:
    """(place, key, expression) of each assignment of a config file, those of its `base` first; what is not one is
    appended to `problems`. `above`: the files that named this one as their base."""
    if not path.is_file():
        others = sorted(str(p) for p in path.parent.glob("*.py")) or sorted(str(p) for p in Path("config").glob("*.py"))
        problems.append(f"{path}: no such config file" + (f"; there are {', '.join(others)}" if others else ""))
        return []
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, ValueError) as error:
        problems.append(f"{path}: not a config file: {error}")
        return []
    found = []
    for statement in body:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id="base")], value=ast.Constant(value=str(name))):
                base = path.parent / name
                if base.resolve() in [other.resolve() for other in (path, *above)]:
                    problems.append(f"{where}: base = {name!r} leads back to this file")
                else:
                    found[:0] = read_config(base, problems, (path, *above))
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                found.append((where, key, node))
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                problems.append(f"{where}: only `name = value` is allowed, not `{ast.unparse(statement)}`")
    return found
