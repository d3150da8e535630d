"""How good and how fast are these models? The loss of each domain on text they never saw, and the speed of inference.

    python eval.py out/toy_pretrain out/toy_prune out/toy_continue --data data/demo
    python eval.py out/toy_prune/checkpoints/step_000200 --data data/demo --json eval.json
    python eval.py out/toy_continue --data data/demo --sample "def main("
    python eval.py out/toy_prune out/toy_continue --data data/demo --continuation     # plumbing/continuation.py

Each argument is a run, a checkpoint of a run, or a model directory in Hugging Face's format. A run that is not finished
is read from its newest checkpoint. A checkpoint of a pruning run still holds the large model: the small model of the
target shape is cut out of it first.

    loss           cross entropy in nats per token
    perplexity     exp(loss)
    bits per byte  loss / ln 2 · tokens / bytes of text: it can be compared between tokenizers
    degradation    loss minus the loss of the first model that is named (+loss in the table)
"""

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from model import Gates, KVCache, Llama
from plumbing import parallel
from plumbing.command_line import Parser, check_utf8, command, number, some_path, user_errors
from plumbing.continuation import LENGTH, PREFIX, answer, encode, make_or_read, start_of_text, write_all
from plumbing.data import TokenData
from plumbing.dataset import DamagedData
from plumbing.models import check_tokenizer, load_model
from plumbing.output import check_output, write_whole
from plumbing.tables import answer_table, loss_table, time_left
from plumbing.tokenizer import Tokenizer, load_tokenizer

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant

SEQUENCES_A_DOMAIN, QUESTIONS_A_DOMAIN = 256, 200  # unless --sequences is given
TOKENS_OF_A_SAMPLE = 200  # unless --tokens is given
NO_EFFECT_ON = {
    "losses": ("tokens", "temperature", "seed"),
    "questions": ("seq_len", "tokens", "temperature"),
    "questions of files": ("split", "seq_len", "sequences", "tokens", "temperature", "seed"),
    "a sample": ("split", "seq_len", "sequences", "batch_size"),
}
PREFILL, DECODE, REPEATS = 256, 64, 5  # speed: tokens of the prompt, tokens generated, times measured


# -- losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def domain_losses(
    model,
    data: TokenData,
    split: str,
    seq_len: int,
    sequences: int,
    batch_size: int,
    z: Gates | None = None,
    progress: tqdm | None = None,
) -> dict[str, float]:
    """Domain -> mean cross entropy in nats per token, over `sequences` sequences of seq_len tokens. They are spread
    evenly over the split; 0 means all of them. The first token of a held-out window does not count: it continues
    nothing.

    Several processes share the sequences, and all get the same numbers. z: gates of the model; progress: a bar that
    counts this process's sequences. ValueError where a domain's split is shorter than one sequence.
    """
    device, rank, size = parallel.local(model.embed_tokens.weight).device, parallel.rank(), parallel.size()
    sums = torch.zeros(len(data.domains), 2, dtype=torch.float64, device=device)  # cross entropies; how many
    for of_domain, domain in zip(sums, data.domains):
        numbers = data.eval_numbers(domain, split, seq_len, sequences)
        n = len(numbers)
        # Each process computes as many sequences, or one would wait for the others. An index past the end adds nothing.
        indices = torch.arange(rank, math.ceil(n / size) * size, size)
        for part in indices.split(batch_size):
            chosen = numbers[part.numpy() % n]
            batch = torch.from_numpy(data.read(domain, split, seq_len, chosen)).to(device, non_blocking=True)
            counts = torch.from_numpy(data.continues(split, seq_len, chosen)) & (part < n)[:, None]
            counts = counts.to(device, non_blocking=True)
            nll = model(batch[:, :-1], z, targets=batch[:, 1:])  # (B, T)
            of_domain += torch.stack((torch.where(counts, nll, 0).sum(dtype=torch.float64), counts.sum()))
            if progress is not None:
                progress.update(len(part))
    return {domain: total / n for domain, (total, n) in zip(data.domains, parallel.sum_(sums).tolist())}


def coverage(data: TokenData, split: str, seq_len: int, sequences: int) -> dict[str, dict[str, int]]:
    """Domain -> how many sequences `domain_losses` evaluates, and how many there are."""
    available = {d: data.sequences(d, split, seq_len) for d in data.domains}
    return {d: {"evaluated": min(sequences, n) or n, "available": n} for d, n in available.items()}


def measures(losses: dict[str, float], first: dict[str, float], data: TokenData, split: str) -> dict[str, dict]:
    """Domain -> all that its loss says. `first`: the losses of the model that this one is compared with."""
    bits, first_bits = data.bits_per_byte(losses, split), data.bits_per_byte(first, split)
    return {
        d: {
            "loss": losses[d],
            "perplexity": math.exp(min(losses[d], 700)),  # beyond that is no float
            "bits_per_byte": bits[d],
            "degradation": losses[d] - first[d],
            "degradation_bits_per_byte": bits[d] - first_bits[d],
        }
        for d in losses
    }


def summary(domains: dict[str, dict]) -> dict[str, dict]:
    """Average and worst domain of each measure."""
    values = {key: [measured[key] for measured in domains.values()] for key in next(iter(domains.values()))}
    return {
        "average": {key: statistics.fmean(v) for key, v in values.items()},
        "worst": {key: max(v) for key, v in values.items()},
    }


# -- speed ----------------------------------------------------------------------------------------------------------


def speed(models: list[Llama], precision) -> list[dict[str, float]]:
    """Of each model: how many tokens a second it reads of a prompt (prefill) and writes after it (decode), batch 1.
    Medians of several measurements, in which the models take turns. `precision()` is the context to compute in."""
    measured = [[] for _ in models]
    for _ in range(REPEATS):
        for model, of_model in zip(models, measured):
            with precision():
                of_model.append(speed_once(model))
    return [
        {f"{kind}_tokens_per_second": statistics.median(once[kind] for once in of_model) for kind in of_model[0]}
        for of_model in measured
    ]


@torch.no_grad()
def speed_once(model: Llama) -> dict[str, float]:
    """Tokens a second of one model, measured once: prefill and decode."""
    device = model.embed_tokens.weight.device
    length = min(PREFILL, model.config.max_seq_len)
    prompt = torch.arange(length, device=device)[None] % model.config.vocab_size
    model(prompt)  # not measured: what happens first only, such as the weights' bfloat16 copies
    cache = [KVCache() for _ in model.layers]
    found = {}
    for kind, inputs in {"prefill": [prompt], "decode": [prompt[:, :1]] * DECODE}.items():
        synchronize(device)
        start = time.perf_counter()
        for tokens in inputs:
            model(tokens, cache=cache)
        synchronize(device)
        found[kind] = sum(tokens.shape[1] for tokens in inputs) / (time.perf_counter() - start)
    return found


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work: a GPU works on while the program goes on."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- command --------------------------------------------------------------------------------------------------------


def main():
    with user_errors():
        args = arguments()
        device, data = parallel.find_device(args.device), TokenData(args.data)
        models = {path: load_model(path).to(device).eval() for path in args.models}
        fill_in_defaults(args, data, models, device)
        check(args, data, models)
        tokenizer = questions = None
        if args.asking or args.sample is not None:
            tokenizer = load_tokenizer(data.tokenizer, f"--data {args.data}: its tokenizer")
        if args.asking:
            asked = make_or_read(data, tokenizer, args.split, args.sequences, args.seed, args.questions)
            questions = {domain: [encode(tokenizer, q) for q in of_domain] for domain, of_domain in asked.items()}
            choices = (choice for of_domain in questions.values() for q in of_domain for choice in q.choices)
            check_ids(models, {i for choice in choices for i in choice.ids})
            if args.write_questions:
                write_all(args.write_questions, asked, args.questions or [])
            print_questions(asked, None if args.questions else data, args.split)
        if args.sample is not None:
            start, ids = encode_sample(args, tokenizer, models)
    # As in training, the weights stay float32. One context for each model: bfloat16 copies live as long as it does.
    precision = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    if args.sample is not None:
        with user_errors(FloatingPointError):
            print_samples(models, tokenizer, start, ids, args, precision)
        return
    report = {"data": args.data, "split": None if args.questions else args.split, "dtype": args.dtype}
    if args.asking:
        with user_errors(FloatingPointError):
            report["models"] = answer(models, questions, args.batch_size, precision)
        print(answer_table(report["models"]))
    else:
        what = args.split, args.seq_len, args.sequences
        report |= {"seq_len": args.seq_len, "sequences": coverage(data, *what)}
        print_coverage(report, data)
        with user_errors(DamagedData, FloatingPointError):
            report["models"] = evaluate(models, data, *what, args.batch_size, precision)
        print(loss_table(report["models"]))
    if args.json:
        with user_errors():
            args.json.parent.mkdir(parents=True, exist_ok=True)
            write_whole(args.json, json.dumps(report, indent=1))


def evaluate(
    models: dict[str, Llama], data: TokenData, split: str, seq_len: int, sequences: int, batch_size: int, precision
) -> dict[str, dict]:
    """Model name -> domains, average, worst, parameters, speed. `precision()` is the context to compute in.
    FloatingPointError names a model and a domain whose loss is not finite."""
    speeds = speed(list(models.values()), precision)
    total = sum(n["evaluated"] for n in coverage(data, split, seq_len, sequences).values())
    losses = {}
    for name, model in models.items():
        with precision(), time_left(name, total, "sequences") as progress:
            losses[name] = domain_losses(model, data, split, seq_len, sequences, batch_size, progress=progress)
        for domain, loss in losses[name].items():
            if not math.isfinite(loss):
                raise FloatingPointError(f"{name}: the loss of domain '{domain}' is {loss}")
    first = next(iter(losses.values()))
    results = {}
    for (name, model), fast in zip(models.items(), speeds):
        domains = measures(losses[name], first, data, split)
        results[name] = {"domains": domains, **summary(domains), "parameters": model.config.n_params(), **fast}
    return results


def print_coverage(report: dict, data: TokenData) -> None:
    """What the losses are measured on, before that takes its time."""
    counts = [f"{domain} {n['evaluated']:,} of {n['available']:,}" for domain, n in report["sequences"].items()]
    print(f"{report['split']} split, {report['dtype']}, sequences of {report['seq_len']} tokens: {', '.join(counts)}")
    if report["split"] != "train" and (why := data.crosses_borders(report["seq_len"])):
        print(f"note: {why}")


def print_questions(asked: dict[str, list], data: TokenData | None, split: str) -> None:
    """How many questions are asked, and whether those made from the text of `data` are too many for it."""
    print(f"questions: {', '.join(f'{domain} {len(questions):,}' for domain, questions in asked.items())}")
    for domain, questions in asked.items() if data else ():
        room = data.tokens(domain, split).size // (PREFIX + LENGTH)
        if len(questions) > room:
            print(f"note: the text of {domain} has room for {room:,}: these overlap, and their error is too small")


def encode_sample(args: argparse.Namespace, tokenizer: Tokenizer, models: dict[str, Llama]) -> tuple[list, list]:
    """The token ids of what comes before the text of --sample, and of the text. Where --tokens was not given, it
    becomes what the models have room for. ValueError where they have none, or do not know a token of the text."""
    ids = tokenizer.encode(args.sample).tolist()
    check_ids(models, ids)
    start = start_of_text(tokenizer, ids)
    longest = min(model.config.max_seq_len for model in models.values())
    given = len(start) + len(ids)
    if args.tokens is None:
        args.tokens = max(1, min(TOKENS_OF_A_SAMPLE, longest - given))
    if given + args.tokens > longest:
        raise ValueError(f"--sample: {given} tokens of text and {args.tokens} more; the models take {longest} at most")
    return start, ids


def print_samples(models: dict[str, Llama], tokenizer: Tokenizer, start: list, ids: list, args, precision) -> None:
    """The text of --sample as each model continues it. FloatingPointError names a model whose logits are not finite."""
    for path, model in models.items():
        prompt = torch.tensor([start + ids], device=model.embed_tokens.weight.device)
        try:
            with precision():
                out = model.generate(prompt, args.tokens, args.temperature, args.seed)[0].tolist()
        except FloatingPointError as error:
            raise FloatingPointError(f"{path}: {error}") from None
        print(f"--- {path}\n{tokenizer.decode(out[len(start) :])}")


def fill_in_defaults(args: argparse.Namespace, data: TokenData, models: dict[str, Llama], device: torch.device) -> None:
    """Those that depend on something else."""
    if args.dtype is None:
        args.dtype = "bfloat16" if device.type == "cuda" else "float32"
    if args.sequences is None:
        args.sequences = QUESTIONS_A_DOMAIN if args.asking else SEQUENCES_A_DOMAIN
    if args.seq_len == 0:
        longest = min(model.config.max_seq_len for model in models.values())
        shortest = min(data.tokens(domain, args.split).size for domain in data.domains)
        args.seq_len = min(data.meta["window"], longest, max(1, shortest - 1))


def check(args: argparse.Namespace, data: TokenData, models: dict[str, Llama]) -> None:
    """ValueError for what cannot be, or does not fit together."""
    for path, model in models.items():
        check_tokenizer(path, model.config, data)
    longest = min(model.config.max_seq_len for model in models.values())
    if args.seq_len > longest:
        raise ValueError(f"--seq_len {args.seq_len}: the models take 1 to {longest} tokens")
    for domain in data.domains:
        data.eval_numbers(domain, args.split, args.seq_len)  # raises where there is too little text


def check_ids(models: dict[str, Llama], ids: Iterable[int]) -> None:
    """ValueError where a model has no embedding for one of these token ids: its tokenizer may have more tokens."""
    largest = max(ids, default=0)
    for path, model in models.items():
        if largest >= model.config.vocab_size:
            raise ValueError(f"{path}: it has {model.config.vocab_size} tokens, and the text holds the id {largest}")


def arguments() -> argparse.Namespace:
    """The command line. ValueError for what is not on it."""
    parser = Parser(__doc__)
    parser.add_argument("models", nargs="+", metavar="MODEL_OR_RUN", help="A run, a checkpoint or a model directory.")

    group = parser.add_argument_group("text")
    group.add_argument("--data", required=True, metavar="DIR", help="The data set, as prepare_data.py made it.")
    group.add_argument(
        "--split",
        default="test",
        choices=["val", "test", "train"],
        help="Which part of the data is used. Default: test, which training never sees.",
    )
    group.add_argument(
        "--seq_len",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="Tokens per sequence. Default: the window of the data set, or less where a model takes less.",
    )
    group.add_argument(
        "--sequences",
        type=number(int, 0),
        metavar="N",
        help="How many sequences of each domain are evaluated, evenly spread over the split; 0 means all. With "
        "--continuation: how many questions of each domain are asked. "
        f"Default: {SEQUENCES_A_DOMAIN} sequences, {QUESTIONS_A_DOMAIN} questions.",
    )

    group = parser.add_argument_group("two-choice questions, instead of losses and speed")
    group.add_argument(
        "--continuation",
        action="store_true",
        help="Ask which of two continuations of a text is the true one. The questions are made from the split.",
    )
    group.add_argument(
        "--questions", nargs="+", metavar="FILE", help="Ask the questions of these .jsonl files. A file is a domain."
    )
    group.add_argument(
        "--write_questions",
        type=some_path,
        metavar="DIR",
        help="Write the questions that are asked into this folder as .jsonl files.",
    )

    group = parser.add_argument_group("a sample, instead of losses and speed")
    group.add_argument("--sample", metavar="TEXT", help="Let each model continue this text.")
    group.add_argument(
        "--tokens",
        type=number(int, 1, 10**6),
        metavar="N",
        help=f"How many tokens it adds. Default: {TOKENS_OF_A_SAMPLE}, or less where a model takes less.",
    )
    group.add_argument(
        "--temperature",
        type=number(float, 0),
        default=0.8,
        metavar="X",
        help="Logits are divided by it before a token is drawn. 0 takes the likeliest token. Default: 0.8.",
    )

    group = parser.add_argument_group("machine")
    group.add_argument(
        "--device",
        default="auto",
        help="cpu, cuda, cuda:1 or the like. Default: auto, which is cuda if there is one, else cpu.",
    )
    group.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        help="What matrix products are computed in; weights stay float32. Default: bfloat16 on cuda, float32 on cpu.",
    )
    group.add_argument(
        "--batch_size",
        type=number(int, 1),
        default=16,
        metavar="N",
        help="How many sequences are computed at once. More need more memory; the results are the same to rounding. "
        "Default: 16.",
    )
    group.add_argument(
        "--seed",
        type=number(int, 0),
        default=0,
        metavar="N",
        help="Seed of the questions and of the sample. Default: 0.",
    )

    group = parser.add_argument_group("results")
    group.add_argument("--json", type=some_path, metavar="FILE", help="Write the results into this file, too.")
    args = parser.parse_args()
    args.asking = bool(args.continuation or args.questions or args.write_questions)
    if args.asking and not args.questions and args.sequences == 0:
        raise ValueError("--sequences 0 means all sequences, but questions need a number, as in --sequences 200")
    kinds = {"a sample": args.sample is not None, "questions of files": args.questions, "questions": args.asking}
    mode = next((kind for kind, asked in kinds.items() if asked), "losses")
    for name in NO_EFFECT_ON[mode]:
        if getattr(args, name) != parser.get_default(name):
            raise ValueError(f"--{name} has no effect on {mode}")
    if args.sample is not None and (args.asking or args.json):
        raise ValueError(f"--sample only prints text, so {'--json' if args.json else 'questions'} cannot go with it")
    if args.sample is not None:
        check_utf8(args.sample, "--sample ")
    if 0 < args.temperature < 1e-3:
        raise ValueError(f"--temperature {args.temperature} must be 0 or at least 0.001")
    if args.json:
        check_report(args.json)
    return args


def check_report(file: Path) -> None:
    """ValueError unless the results can be written there, and replace nothing but earlier results."""
    check_output(file)
    if file.exists() and file.stat().st_size:
        try:
            earlier = json.loads(file.read_bytes())
        except (ValueError, RecursionError):
            earlier = None
        if not isinstance(earlier, dict) or "models" not in earlier:
            raise ValueError(f"--json {file}: this file holds no results of eval.py, and they would replace it")


if __name__ == "__main__":
    command(main)
