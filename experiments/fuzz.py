"""Damage what the commands read, again and again: does every input end in a value or in one line?

    python experiments/fuzz.py --n 200000 --seed 0 [--kind settings arguments meta config safetensors index tokenizer
                                                          jsonl questions metrics pictures state]

A valid example of each kind is changed at random: bytes are flipped, cut out, doubled; values of JSON are swapped for
others, or left out. The function that the commands read it with is called in this process. It may accept the input, or
refuse it: raise ValueError or OSError with one line. Anything else is a failure, and so is an input that takes longer
than ten seconds of CPU time. The first failure at each place in the code is printed, and its input is saved. Input i of
a kind follows from the seed alone. The exit status is 1 if anything failed.
"""

import contextlib
import io
import json
import random
import signal
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import tokenizers  # noqa: E402

import plot  # noqa: E402
import train  # noqa: E402
from model import Llama  # noqa: E402
from plumbing.command_line import Parser, load, number, user_errors  # noqa: E402
from plumbing.continuation import read_questions  # noqa: E402
from plumbing.data import TokenData  # noqa: E402
from plumbing.documents import read_file  # noqa: E402
from plumbing.folder import File  # noqa: E402
from plumbing.left_out import LeftOut  # noqa: E402
from plumbing.run import read_state  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from plumbing.tokenizer import load_tokenizer  # noqa: E402
from prepare_data import prepare  # noqa: E402

SECONDS = 10  # of CPU time, for an input
PICTURES = 200  # pictures are drawn of one in so many inputs, because that is slow
VALUES = [None, True, "", "x", "../x", "/etc", "\ud800", "\0", "é", "x" * 10_000, "DEEP", [], {}, [[]], [None]]
VALUES += [-1, 0, 1, 2, 2**31, 2**63, 2**70, 10**400, 0.5, -0.0, 1e308, 1e-320, float("nan"), float("inf"), {"a": 1}]
EXPRESSIONS = (
    """9**9**9 1/0 'a'*10**9 -1 10**400 1e999 1e308*10 (-8)**0.5 nan None True f() x.y 1j b'x' 2**62 0 1e-320
    '' ' ( [] {} {'a':1}""".split()
    + ["+".join("1" * 3000), "-" * 20_000, "[" * 5000, "9" * 5000, "\udc80", "\0"]
)
TRAIN = "train.py --n_layer=2 --d_model=8 --n_head=2 --d_ffn=8 --seq_len=16 --batch_size=2 --eval_sequences=1".split()
PRUNE = "--target_d_ffn=4 --target_n_layer=1 --sparsity_warmup=2 --schedule=dro --dynamic_reference".split()


def examples(top: Path) -> dict:
    """kind -> (files that are damaged, what reads them): data, runs and models in small."""
    for domain in "ab":
        (top / "text" / domain).mkdir(parents=True)
        for i in range(60):
            (top / "text" / domain / f"{i}.txt").write_text(f"{domain} {i} words of a text " * 9)
    prepare(str(top / "text"), top / "data", window=32, held_out=0.3)
    for name, more in (("source", []), ("run", [*PRUNE, "--eval_interval=1", f"--init_from={top / 'source'}"])):
        sys.argv = [*TRAIN, *more, "--steps=16", "--threads=1", f"--data={top / 'data'}", f"--out={top / name}"]
        train.main()
    for which in (signal.SIGINT, signal.SIGTERM):  # a run would end at its next step; this is to end at once
        signal.signal(which, signal.default_int_handler)
    model, run, bpe = top / "source" / "model", top / "run", tokenizers.Tokenizer(tokenizers.models.BPE())
    Llama.from_pretrained(model).save_pretrained(top / "shards", max_shard_bytes=9000)
    (top / "tokenizer").mkdir()
    bpe.train_from_iterator(["a text"], tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False))
    bpe.save(str(top / "tokenizer" / "tokenizer.json"))
    (top / "tokenizer" / "tokenizer_config.json").write_text('{"eos_token": {"content": "</s>"}}')
    question = {"question": "a b", "choice1": " c", "choice2": " d", "label": 0}
    (top / "q.jsonl").write_text("".join(json.dumps(question | {"label": i % 2}) + "\n" for i in range(3)))
    document = {"text": "some text", "meta": {"domain": "a"}}
    (top / "t.jsonl").write_text((json.dumps(document) + "\n") * 3)
    keys = "steps lr ratio domains out device data d_model seed schedule compile".split()
    (top / "settings.py").write_text("\n".join(f"{key} = {getattr(Settings(), key)!r}" for key in keys))
    (top / "arguments").write_text("\n".join(f"--{key}={getattr(Settings(), key)}" for key in keys))
    state, text = next(run.glob("checkpoints/*/state.json")), File(None, top / "t.jsonl")
    (state.parent / "checksums.json").unlink()  # or damage would be found before the content is looked at
    return {
        "settings": ([top / "settings.py"], lambda: load(Settings, [str(top / "settings.py")])),
        "arguments": ([top / "arguments"], lambda: load(Settings, words(top / "arguments"))),
        "meta": ([top / "data" / "meta.json"], lambda: TokenData(top / "data")),
        "config": ([model / "config.json"], lambda: Llama.from_pretrained(model)),
        "safetensors": ([model / "model.safetensors"], lambda: Llama.from_pretrained(model)),
        "index": ([top / "shards" / "model.safetensors.index.json"], lambda: Llama.from_pretrained(top / "shards")),
        "tokenizer": (sorted((top / "tokenizer").iterdir()), lambda: load_tokenizer(str(top / "tokenizer"))),
        "jsonl": ([top / "t.jsonl"], lambda: list(read_file(text, LeftOut(), "meta.domain"))),
        "questions": ([top / "q.jsonl"], lambda: read_questions(top / "q.jsonl")),
        "metrics": ([run / "metrics.jsonl"], lambda: plot.read_metrics(run)),
        "pictures": ([run / "metrics.jsonl"], lambda: draw(run)),
        "state": ([state], lambda: read_state(state.parent)),
    }


def draw(run: Path) -> None:
    """All pictures of a run."""
    metrics = plot.read_metrics(run)
    for fig in [*(figure(metrics) for figure in plot.FIGURES.values()), plot.comparison_figure([metrics, metrics])]:
        if fig:
            fig.savefig(io.BytesIO())


def words(file: Path) -> list[str]:
    """A command line: a line is an argument."""
    return file.read_bytes().decode(errors="surrogateescape").split("\n")


def change(data: bytes, suffix: str, rng: random.Random) -> bytes:
    """The content of a file, damaged."""
    if suffix in (".json", ".jsonl") and rng.random() < 0.7:
        lines = data.split(b"\n") if suffix == ".jsonl" else [data]
        i = rng.randrange(max(1, len(lines) - 1))
        lines[i] = change_json(lines[i], rng)
        return b"\n".join(lines)
    if suffix in (".py", "") and rng.random() < 0.7:
        lines = data.split(b"\n")
        i = rng.randrange(len(lines))
        key, equals, _ = lines[i].partition(b"=")
        lines[i] = key + equals + rng.choice(EXPRESSIONS).encode(errors="surrogateescape")
        return b"\n".join(lines)
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, size = rng.randrange(len(data) + 1), rng.choice((1, 2, 8, 100))
        part = data[at : at + size]
        new = rng.choice((b"", part + part, rng.randbytes(len(part)), rng.randbytes(size), data[:at], b"\0" * size))
        data[at : at + size] = new
    return bytes(data[: rng.randrange(len(data) + 1)] if rng.random() < 0.2 else data)


def change_json(text: bytes, rng: random.Random) -> bytes:
    """A JSON text with one value swapped or left out, or a key added."""
    content = [json.loads(text)]
    places, todo = [], [content]
    while todo:
        at = todo.pop()
        for key, value in list(at.items() if isinstance(at, dict) else enumerate(at)):
            places.append((at, key))
            if isinstance(value, dict | list):
                todo.append(value)
    at, key = rng.choice(places)
    if at is not content and rng.random() < 0.2:
        del at[key]
    elif isinstance(at, dict) and rng.random() < 0.1:
        at[rng.choice(("", "x", "../x", "\0"))] = at[key]
    else:
        at[key] = rng.choice(VALUES)
    depth = rng.choice((100, 100_000))
    return json.dumps(content[0]).replace('"DEEP"', "[" * depth + "]" * depth).encode()


def late(*_):
    """Called when an input has taken too long."""
    raise TimeoutError("it takes too long")  # an OSError, see below


def main():
    parser = Parser(__doc__)
    parser.add_argument("--n", type=number(int, 1), default=200_000, help="Inputs, over all kinds.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", nargs="+", help="Only these kinds.")
    with user_errors():
        args = parser.parse_args()
    signal.signal(signal.SIGPROF, late)
    warnings.simplefilter("ignore")
    failures, total, saved = Counter(), 0, ROOT / "out" / "fuzz"
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()):
            given, known = sys.argv, examples(Path(folder))
        sys.argv = given
        if wrong := set(args.kind or ()) - known.keys():
            with user_errors():
                raise ValueError(f"--kind {wrong.pop()} is not one of {', '.join(known)}")
        kinds = {kind: it for kind, it in known.items() if not args.kind or kind in args.kind}
        for kind, (files, read) in kinds.items():
            read()  # what is not damaged is accepted
            whole, outcomes = {file: file.read_bytes() for file in files}, Counter()
            for i in range(args.n // len(kinds) // (PICTURES if kind == "pictures" else 1)):
                rng = random.Random(f"{args.seed} {kind} {i}")
                file = rng.choice(files)
                file.write_bytes(change(whole[file], file.suffix, rng))
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                try:
                    read()
                    outcomes["accepted"] += 1
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a library's panic is no Exception
                    signal.setitimer(signal.ITIMER_PROF, 0)
                    told = isinstance(error, ValueError | OSError) and not isinstance(error, TimeoutError)
                    told = told and str(error) != "" and "\n" not in str(error)
                    outcomes["refused" if told else "failed"] += 1
                    frames = [] if isinstance(error, TimeoutError) else traceback.extract_tb(error.__traceback__)
                    place = " ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:])
                    where = f"{kind}: {type(error).__name__} {place}"
                    failures[where] += not told
                    if not told and failures[where] == 1:
                        saved.mkdir(parents=True, exist_ok=True)
                        (saved / f"{kind}-{args.seed}-{i}").write_bytes(file.read_bytes())
                        print(f"{where}: {str(error)[:200]!r} (input {i} is saved in {saved})", flush=True)
                signal.setitimer(signal.ITIMER_PROF, 0)
                file.write_bytes(whole[file])
            total += outcomes.total()
            print(f"{kind:<12}" + "".join(f"{n:>10,} {outcome}" for outcome, n in sorted(outcomes.items())), flush=True)
    print(f"{failures.total():,} of {total:,} inputs failed, at {len(+failures)} places")
    sys.exit(failures.total() > 0)


if __name__ == "__main__":
    main()
