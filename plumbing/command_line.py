"""From a command line to values: one dataclass of settings, a config file that is read but never executed.

    python train.py config/toy_prune.py --steps 800 --lr=1e-3      # the file first, then what is given by hand
    python train.py --help                                         # every setting, its default and its meaning

A config file is plain Python assignments of literals and arithmetic on them (`tokens = 32 * 4096`). It is parsed and
not run, so it can do nothing but set values, and a misspelt key is an error instead of a silent default. Its text, the
depth of an expression and the size of a number are limited, so reading it ends at once, whatever stands in it. The
assignment `base = "other.py"` reads another config file of the same folder first. What is read later counts, also where
it stands in the base of a later file. All that cannot be read is reported at once; else all values that are out of
range.

`user_errors` is how every command of this project treats a mistake: one line on stderr, exit status 2.
"""

import argparse
import ast
import dataclasses
import difflib
import errno
import io
import json
import math
import operator
import os
import re
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager, suppress
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


LONGEST, DEEPEST = 100_000, 50  # characters of a config file or a value, and how deep an expression may be nested
LARGEST = 2**63  # whole numbers are below it, as in the libraries that they are given to


@contextmanager
def user_errors(*kinds: type[Exception]):
    """Turn an error raised inside into one line on stderr and exit status 2, without a traceback: an error of these
    kinds, by default a ValueError or OSError.

    Wrap the part of a command that reads what the user gave; leave the part where such an error would be our own
    mistake outside, so that it keeps its traceback. What a terminal cannot show is printed as an escape sequence, here
    and later.
    """
    kinds = kinds or (ValueError, OSError)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except BrokenPipeError:  # for `command`
        raise
    except kinds as error:
        if isinstance(error, OSError) and error.filename is not None:
            error = f"{error.filename}: {error.strerror}"
        line = f"{Path(sys.argv[0]).name}: {one_line(str(error), 2000)}"
        if os.environ.get("LOCAL_RANK", "0") == "0":  # torchrun starts many processes: one on each machine says it
            print(line, file=sys.stderr)
        tell_torchrun(line)
        sys.exit(2)


def tell_torchrun(line: str) -> None:
    """Have torchrun, if it started this process, show this line in its report, which is the last that is printed."""
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        Path(file).write_text(json.dumps({"message": line, "timestamp": int(time.time())}))


def command(main: Callable[[], None]) -> None:
    """Run a command. It ends in silence where nobody reads its output any more, as in `train.py --help | head`, and in
    one line after Ctrl-C and what `known_failure` knows."""
    if sys.stderr is None:  # it was closed: else the next file that is opened would take its place
        sys.stderr = os.fdopen(os.dup2(os.open(os.devnull, os.O_WRONLY), 2), "w")
    allow_open_files()
    try:
        try:
            main()
        finally:
            if sys.stdout:  # None where it was closed
                sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted", file=sys.stderr)
        sys.exit(130)
    except (MemoryError, RuntimeError) as error:
        if (why := known_failure(error)) is None:
            raise
        line = f"{Path(sys.argv[0]).name}: {why}"
        print(line, file=sys.stderr)
        tell_torchrun(line)
        sys.exit(1)
    except OSError as error:
        if not isinstance(error, BrokenPipeError) and error.errno != errno.ENOSPC:
            raise
        if error.errno == errno.ENOSPC:
            print(f"{Path(sys.argv[0]).name}: could not print: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still flushes when it ends
        sys.exit(1)


def known_failure(error: Exception) -> str | None:
    """What to say of an error that is no mistake of this program: there is too little memory, or no compiler."""
    if any(kind.__name__ in ("MemoryError", "OutOfMemoryError") for kind in type(error).__mro__) or (
        "can't allocate memory" in str(error)
    ):
        if Path(sys.argv[0]).name != "train.py":
            return "out of memory"
        return "out of memory: --dry_run says what a run needs, and which settings make it less"
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        return f"torch.compile failed: try it again, or --compile False: {one_line(str(error), 300)}"
    return None


def allow_open_files(wanted: int = 10_000) -> None:
    """Raise the soft limit on open files as far as the system lets us: a domain has three, and macOS allows 256."""
    try:
        import resource
    except ImportError:  # Windows, which has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def one_line(text: str, length: int = 80) -> str:
    """A text without line breaks and control characters, cut where it is too long."""
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[: length + 1])
    return text if len(text) <= length else text[: length - 3] + "..."


class Parser(argparse.ArgumentParser):
    """argparse, with a mistake raised as ValueError, for `user_errors`, and the nearest option named. Options are
    given whole. The description is printed as it is, unless a formatter_class says otherwise."""

    def __init__(self, description: str, formatter_class=argparse.RawDescriptionHelpFormatter, **options):
        super().__init__(description=description, formatter_class=formatter_class, allow_abbrev=False, **options)

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


def parse(text: str, mode: str) -> ast.AST:
    """The syntax tree of a text. ValueError for what is not Python, too long or nested too deep."""

    def depth(node: ast.AST) -> int:
        return 1 + max(map(depth, ast.iter_child_nodes(node)), default=0)

    if len(text) > LONGEST:
        raise ValueError(f"it is longer than {LONGEST:,} characters")
    try:
        with warnings.catch_warnings():  # of odd spellings, such as "\d"
            warnings.simplefilter("ignore")
            tree = ast.parse(text, mode=mode)
        if depth(tree) > DEEPEST:
            raise RecursionError
    except SyntaxError as error:
        raise ValueError(str(error)) from None
    except (RecursionError, MemoryError):  # MemoryError is how Python's own parser says it
        raise ValueError("it is nested too deep") from None
    return tree


def literal(node: ast.AST) -> Any:
    """Value of an expression made of literals and arithmetic on numbers; ValueError for anything else. The expression
    comes from `parse`, which limits its depth."""
    match node:
        case ast.Constant(value=str() | bool() | float() as value):
            return value
        case ast.Constant(value=int(value)):
            return in_range(value)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return compute(type(op), literal(left), literal(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in OPERATORS:
            return compute(type(op), literal(operand))
        case ast.List(elts=items) | ast.Tuple(elts=items):
            return [literal(item) for item in items]
        case ast.Dict(keys=keys, values=values) if None not in keys:
            names = [literal(key) for key in keys]
            if not all(type(name) is str for name in names) or len(set(names)) < len(names):
                raise ValueError("the keys of {...} must be texts, each of them once")
            return {name: literal(value) for name, value in zip(names, values)}
    raise ValueError(f"only literals and arithmetic on them are allowed, not `{one_line(ast.unparse(node))}`")


def compute(operation: type[ast.AST], *numbers: Any) -> int | float:
    """The result of one operation. ValueError for one that is not on numbers, or has no result that a setting can have.
    Whatever the numbers are, it takes no time."""
    if not all(type(number) in (int, float) for number in numbers):
        raise ValueError("arithmetic is for numbers only")
    if operation is ast.Pow and set(map(type, numbers)) == {int} and numbers[0].bit_length() * numbers[1] > 256:
        return in_range(LARGEST)  # it has more than 128 bits
    try:
        result = OPERATORS[operation](*numbers)
    except ArithmeticError as error:
        raise ValueError(f"it cannot be computed: {error}") from None
    if type(result) is complex:
        raise ValueError("it is the root of a number below 0")
    return in_range(result)


def in_range(value: int | float) -> int | float:
    """The value. ValueError for a whole number that is too large."""
    if type(value) is int and abs(value) >= LARGEST:
        raise ValueError("a whole number must be below 2**63")
    return value


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
    values = {name: (getattr(settings, name), field.limits) for name, field in fields(type(settings)).items()}
    return [f"{name} = {value} {wrong}" for name, (value, limits) in values.items() if (wrong := beyond(value, limits))]


def beyond(value: Any, limits: Limits | None) -> str:
    """What a number must be, where it is not; otherwise nothing. NaN and infinity are beyond any limits."""
    low, high = limits or (-math.inf, math.inf)
    if type(value) not in (int, float) or (low <= value <= high and math.isfinite(value)):
        return ""
    if not math.isfinite(value):
        return "must be finite"
    return f"must be at least {low}" if high == math.inf else f"must be {low} to {high}"


def number(kind: type, low: float = -math.inf, high: float = math.inf) -> Callable[[str], int | float]:
    """The type of an option that is a number within limits, for argparse's `add_argument`. It takes arithmetic, as
    settings do."""

    def read(text: str) -> int | float:
        try:
            value = coerce(value_of(text, kind), kind)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        if wrong := beyond(value, Limits(low, high)):
            raise argparse.ArgumentTypeError(f"{value} {wrong}")
        return value

    return read


def some_path(text: str) -> Path:
    """The type of an option that is a path. An empty one, as of a variable of the shell that is not set, is refused."""
    if not text:
        raise argparse.ArgumentTypeError("this path is empty")
    return Path(text)


def coerce(value: Any, kind: type) -> Any:
    """`value` as `kind`, with int -> float and ~/ -> the home folder the only conversions; ValueError says what was
    expected."""
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{one_line(repr(value))} is not one of {', '.join(map(repr, get_args(kind)))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if kind is str and type(value) is str and value.startswith("~/"):
        return os.path.expanduser(value)
    if type(value) is not kind:
        example = {list: ", such as ['code', 'prose']", dict: ", such as {'code': .6, 'prose': .4}"}.get(kind, "")
        raise ValueError(f"{one_line(repr(value))} is {_named(type(value))}, {_named(kind)} is needed{example}")
    if kind is str:
        check_utf8(value)
    return value


def check_utf8(text: str, named: str = "") -> None:
    """ValueError for a text that a JSON file cannot hold; `named` is what it was given as. Python turns bytes of the
    command line that are no UTF-8 into halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{named}{one_line(repr(text))} is no UTF-8 text") from None


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
        except ValueError as error:
            problems.append(f"{where}: {error}")

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
        elif arg.partition("=")[0] in known and "=" in arg:
            problems.append(f"{arg}: a setting is given as --{arg}")
        else:
            for where, key, node in read_config(Path(arg), problems):
                if key in known:
                    put(f"{where}: {key}", key, partial(literal, node))
                else:
                    unknown(where, key)
    for key, text in vars(given).items():  # what is given by hand wins
        put(f"--{key}", key, partial(value_of, text, known[key].kind))
    if problems:
        raise ValueError("; ".join(problems))
    return cls(**values)


def with_values(args: list[str], known: dict[str, Field]) -> list[str]:
    """The arguments with `-` in the names of settings as `_`, `--key value` as `--key=value`, and `--key` alone as
    `--key=True` for a switch. A `--` alone means nothing: what follows it are settings, too."""
    result, rest = [], [arg for arg in args if arg != "--"]
    while rest:
        arg = rest.pop(0)
        name, equals, value = arg.partition("=")
        if name.startswith("--"):
            name = "--" + name[2:].replace("-", "_")
            field = known.get(name[2:])
            if field and not equals and field.kind is bool:
                has_value = rest and not rest[0].startswith("--") and not rest[0].endswith(".py")
                equals, value = "=", rest.pop(0) if has_value else "True"
            elif field and not equals and rest and not rest[0].startswith("--"):
                equals, value = "=", rest.pop(0)  # argparse takes some negative numbers for options
            arg = f"{name}{equals}{value}"
        result.append(arg)
    return result


def parser_of(cls: type, known: dict[str, Field]) -> Parser:
    """The parser of the settings of `cls`: its `--help` is their documentation."""
    title, _, usage = cls.__doc__.partition("\n")
    parser = Parser(usage, argparse.HelpFormatter, usage=title)
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
        node = parse(text, "eval").body
    except ValueError:
        return text
    if kind is str or get_origin(kind) is Literal:
        return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else text
    return text if isinstance(node, ast.Name) else literal(node)


def read_config(path: Path, problems: list[str], above: tuple[Path, ...] = ()) -> list[tuple[str, str, ast.AST]]:
    """(place, key, expression) of each assignment of a config file, those of its `base` first; what is not one is
    appended to `problems`. `above`: the files that named this one as their base."""
    if not path.is_file():
        folders = (path.parent, Path("config")) if path.parent != Path() else (Path("config"),)
        others = next(filter(None, (sorted(str(p) for p in folder.glob("*.py")) for folder in folders)), [])
        problems.append(f"{path}: no such config file" + (f"; there are {', '.join(others)}" if others else ""))
        return []
    try:
        with open(path, encoding="utf-8") as file:
            body = parse(file.read(LONGEST + 1), "exec").body
    except ValueError as error:
        problems.append(f"{path}: not a config file: {error}")
        return []
    found, named = [], None
    for statement in body:
        where = f"{path}:{statement.lineno}"
        match statement:
            case ast.Assign(targets=[ast.Name(id="base")], value=ast.Constant(value=str(name))) if named is None:
                named = path.parent / name
                if named.resolve() in [other.resolve() for other in (path, *above)]:
                    problems.append(f"{where}: base = {name!r} leads back to this file")
                else:
                    found[:0] = read_config(named, problems, (path, *above))
            case ast.Assign(targets=[ast.Name(id=key)], value=node):
                found.append((where, key, node))
            case ast.Expr(value=ast.Constant()):
                pass  # a docstring
            case _:
                text = one_line(ast.unparse(statement))
                problems.append(f"{where}: only `name = value` is allowed, not `{text}`")
    return found
