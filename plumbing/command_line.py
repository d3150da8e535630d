"""Settings: one dataclass, a config file that is read but never executed, `--key=value` on top.

    python train.py config/toy_prune.py --steps=800 --lr=1e-3      # the file, then the overrides
    python train.py --help                                         # every field, its default and its meaning

A config file is plain Python assignments of literals and arithmetic on them (`tokens = 32 * 4096`). It is parsed,
not run, so it can do nothing but set values, and a misspelt key is an error instead of a silent default. Every
problem of the file and of the command line is reported at once.

`user_errors` is how every command of this project treats a mistake: one line on stderr, exit status 2.
"""

import argparse
import ast
import dataclasses
import difflib
import operator
import os
import re
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

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
def user_errors():
    """Turn a ValueError or OSError raised inside into one line on stderr and exit status 2, without a traceback.

    Wrap the part of a command that reads what the user gave; leave the part where such an error would be our own
    mistake outside, so that it keeps its traceback.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of torchrun's processes, one on each machine
            print(f"{Path(sys.argv[0]).name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake raised as ValueError, for `user_errors`, and the nearest option named."""

    def error(self, message: str):
        """Raise instead of printing usage and exiting."""
        if match := re.match(r"unrecognized arguments: (--\w+)", message):
            near = difflib.get_close_matches(match[1], self._option_string_actions, n=1)
            message += f", did you mean {near[0]}?" if near else "; --help lists the options"
        raise ValueError(message)


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


def fields(cls: type) -> dict[str, tuple[type, Any, str]]:
    """name -> (type, default, documentation) of a dataclass whose fields are `Annotated[type, "documentation"]`."""
    hints, found = get_type_hints(cls, include_extras=True), {}
    for f in dataclasses.fields(cls):
        kind, doc = get_args(hints[f.name])
        found[f.name] = (kind, f.default if f.default_factory is dataclasses.MISSING else f.default_factory(), doc)
    return found


def coerce(value: Any, kind: type) -> Any:
    """`value` as `kind`, with int -> float the only conversion; ValueError says what was expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is not one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{value!r} is {_named(type(value))}, {_named(kind)} is needed")
    return value


def _named(kind: type) -> str:
    return {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a string"}.get(
        kind.__name__, f"a {kind.__name__}"
    )


def load(cls: type, args: list[str]) -> Any:
    """An instance of the dataclass `cls` from command-line arguments: config files, then `--key=value`.

    Prints the fields and exits for `--help`. Raises ValueError with all problems found, in one message.
    """
    known, values, problems = fields(cls), {}, []

    def put(where: str, key: str, node: ast.AST | None, text: str):
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f", did you mean '{near[0]}'?" if near else "; --help lists the settings"
            problems.append(f"{where}: unknown setting '{key}'{hint}")
            return
        kind = known[key][0]
        try:
            values[key] = coerce(text if node is None else literal(node), kind)
        except (ValueError, TypeError, ArithmeticError) as error:
            problems.append(f"{where}: {key}: {error}")

    for arg in sorted(args, key=lambda arg: arg.startswith("-")):  # files first: what is given by hand wins
        if arg in ("-h", "--help"):
            print(help_text(cls))
            sys.exit(0)
        elif arg.startswith("--"):
            key, given, text = arg[2:].partition("=")
            key = key.replace("-", "_")
            if not given:
                problems.append(f"{arg}: a value is needed, as in {arg}=VALUE")
                continue
            try:
                node = ast.parse(text, mode="eval").body
            except SyntaxError:
                node = None  # not a Python expression: the text itself, as in --out=out/my run
            is_text = key in known and (known[key][0] is str or get_origin(known[key][0]) is Literal)
            if is_text and not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                node = None
            put(arg.partition("=")[0], key, node, text)
        else:
            for where, key, node in read_config(Path(arg), problems):
                put(where, key, node, "")
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**values)


def read_config(path: Path, problems: list[str]) -> list[tuple[str, str, ast.AST]]:
    """(place, key, expression) of each assignment of a config file; what is not one is appended to `problems`."""
    if not path.is_file():
        others = sorted(str(p) for p in path.parent.glob("*.py")) or sorted(str(p) for p in Path("config").glob("*.py"))
        problems.append(f"{path}: no such config file" + (f"; there are {', '.join(others)}" if others else ""))
        return []
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        problems.append(f"{path}: not a config file: {error}")
        return []
    found = []
    for statement in body:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                found.append((where, key, node))
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                problems.append(f"{where}: only `name = value` is allowed, not `{ast.unparse(statement)}`")
    return found


def help_text(cls: type) -> str:
    """The dataclass' docstring and one line per field: `--name=default  documentation`."""
    rows = [(f"--{name}={default!r}", doc) for name, (_, default, doc) in fields(cls).items()]
    width = min(40, max(len(left) for left, _ in rows))
    return "\n".join([cls.__doc__.strip(), "", *(f"  {left:<{width}}  {doc}" for left, doc in rows)])
