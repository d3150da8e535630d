"""How good and how fast are these models? Per-domain loss on text they never saw, and inference speed, side by side.

    python eval.py out/toy_pretrain out/toy_prune out/toy_continue --data data/demo
    python eval.py out/toy_prune/checkpoints/step_000100 --data data/demo --json eval.json
    python eval.py out/toy_continue --data data/demo --sample "def main("
    python eval.py out/toy_prune out/toy_continue --data data/demo --continuation     # continuation.py

Each argument is a run, a checkpoint of it, or a model directory in Hugging Face's format. A run without a finished
model is read from its newest checkpoint; a checkpoint of a pruning run is extracted at its target shape first.

Perplexity is exp(loss per token). Bits per byte is loss / ln 2 · tokens / bytes, to compare across tokenizers.
Degradation is the loss above that of the first model named.
"""

import argparse
import json
import math
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch

from model import Gates, KVCache, Llama
from plumbing import parallel
from plumbing.command_line import Parser, user_errors
from plumbing.continuation import Question, accuracy, log_likelihoods, make_questions, read_questions, write_questions
from plumbing.data import TokenData
from plumbing.models import check_tokenizer, load_model
from plumbing.tokenizer import load_tokenizer

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process is what is meant

QUESTIONS_A_DOMAIN = 200
PREFILL, DECODE, REPEATS = 256, 64, 5  # speed: tokens of the prompt, tokens generated, times measured


# -- losses ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def domain_losses(
    model, data: TokenData, split: str, seq_len: int, sequences: int, batch_size: int, z: Gates | None = None
) -> dict[str, float]:
    """Mean cross entropy in nats per token of each domain, over `sequences` windows spread evenly (0: over all).

    Several processes share the windows, and all get the same numbers.
    """
    device, rank, size = parallel.local(model.embed_tokens.weight).device, parallel.rank(), parallel.size()
    totals, tokens_seen = torch.zeros(len(data.domains), dtype=torch.float64, device=device), []
    for total, domain in zip(totals, data.domains):
        tokens = torch.from_numpy(data.eval_sequences(domain, split, seq_len, sequences))
        n = len(tokens)
        # as many rows for each process, or one would wait for the others: those past the end do not count
        for rows in torch.arange(rank, -(-n // size) * size, size).split(batch_size):
            batch, counts = tokens[rows % n].to(device, non_blocking=True), (rows < n).to(device, non_blocking=True)
            total += (model(batch[:, :-1], z, targets=batch[:, 1:]).sum(1, dtype=torch.float64) * counts).sum()
        tokens_seen.append(n * seq_len)
    losses = parallel.sum_(totals).tolist()
    return {domain: loss / n for domain, loss, n in zip(data.domains, losses, tokens_seen)}


def bits_per_byte(losses: dict[str, float], data: TokenData, split: str) -> dict[str, float]:
    """Nats per token -> bits per byte of the text, by domain, at the whole split's bytes per token: a few windows may
    have others."""
    return {d: loss / math.log(2) / data.bytes_per_token(d, split) for d, loss in losses.items()}


# -- speed ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def speed(models: list[Llama]) -> list[dict[str, float]]:
    """Tokens a second of each model, batch 1: reading a prompt and writing on from it. Medians; models take turns."""
    seconds = [{"prefill": [], "decode": []} for _ in models]
    for repeat in range(REPEATS + 1):
        for model, times in zip(models, seconds):
            device, length = model.embed_tokens.weight.device, min(PREFILL, model.config.max_seq_len)
            tokens = torch.arange(length, device=device)[None] % model.config.vocab_size
            cache = [KVCache(length + DECODE) for _ in model.layers]
            for kind, calls in (("prefill", [tokens]), ("decode", [tokens[:, :1]] * DECODE)):
                synchronize(device)
                start = time.perf_counter()
                for new in calls:
                    model(new, cache=cache)
                synchronize(device)
                if repeat:  # the first is the warm-up
                    times[kind].append((time.perf_counter() - start) / (length if kind == "prefill" else DECODE))
    return [{f"{kind}_tokens_per_second": 1 / statistics.median(t[kind]) for kind in t} for t in seconds]


def synchronize(device: torch.device) -> None:
    """Wait until the device has done its work, where it works on its own."""
    if device.type == "cuda":
        torch.cuda.synchronize()


# -- command --------------------------------------------------------------------------------------------------------


def evaluate(names: list[str], models: list[Llama], data: TokenData, args) -> dict:
    """Everything the command reports, as JSON: model name -> domains, average, worst, parameters, speed."""
    results = {}
    for name, model, fast in zip(names, models, speed(models)):
        losses = domain_losses(model, data, args.split, args.seq_len, args.sequences, args.batch_size)
        bits = bits_per_byte(losses, data, args.split)
        first = next(iter(results.values()))["domains"] if results else None
        domains = {}
        for d, loss in losses.items():
            base = first[d] if first else {"loss": loss, "bits_per_byte": bits[d]}
            domains[d] = {
                "loss": loss,
                "perplexity": math.exp(min(loss, 700)),
                "bits_per_byte": bits[d],
                "degradation": loss - base["loss"],
                "degradation_bits_per_byte": bits[d] - base["bits_per_byte"],
            }
        keys = next(iter(domains.values()))
        results[name] = {
            "domains": domains,
            "average": {k: statistics.fmean(row[k] for row in domains.values()) for k in keys},
            "worst": {k: max(row[k] for row in domains.values()) for k in keys},
            "parameters": model.config.n_params(),
            **fast,
        }
    return results


def rows_of(results: dict, *summaries: str) -> list[tuple[str, list[dict]]]:
    """(label, every model's row): the domains, then the summaries, by whose names a domain may go, too."""
    models = list(results.values())
    domains = [(d, [m["domains"][d] for m in models]) for d in models[0]["domains"]]
    return domains + [(name, [m[name] for m in models]) for name in summaries]


def table(results: dict) -> str:
    """The results as text: a row per domain, a block of columns per model."""
    names, domains = list(results), list(next(iter(results.values()))["domains"])
    width = max(map(len, [*domains, "prefill tokens/s"]))
    columns = {"loss": ("loss", 9, 3), "ppl": ("perplexity", 8, 2)}  # title -> key, width, decimals
    columns |= {"bits/byte": ("bits_per_byte", 11, 3), "+loss": ("degradation", 8, 3)}
    block = sum(wide for _, wide, _ in columns.values())
    lines = [" " * width + "".join(f"{shorten(name, block - 2):>{block}}" for name in names)]
    lines.append(" " * width + "".join(f"{title:>{wide}}" for title, (_, wide, _) in columns.items()) * len(names))
    for label, rows in rows_of(results, "average", "worst"):
        cells = (f"{row[key]:>{wide}.{digits}f}" for row in rows for key, wide, digits in columns.values())
        lines.append(f"{label:<{width}}" + "".join(cells))
    for label, key in (
        ("parameters", "parameters"),
        ("prefill tokens/s", "prefill_tokens_per_second"),
        ("decode tokens/s", "decode_tokens_per_second"),
    ):
        first = results[names[0]][key]
        cells = (f"{results[n][key]:,.0f} ({results[n][key] / first:.2f}x)" for n in names)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{block}}" for cell in cells))
    return "\n".join(lines)


def ask(data: TokenData, tokenizer, args) -> dict[str, list[Question]]:
    """The questions of each domain: made from the text, or read from files."""
    if args.questions:
        if len({Path(file).stem for file in args.questions}) < len(args.questions):
            raise ValueError("--questions: two files of one name would be one domain")
        questions = {Path(file).stem: read_questions(Path(file)) for file in args.questions}
    else:
        n, split = args.sequences or QUESTIONS_A_DOMAIN, args.split
        questions = {d: make_questions(data, tokenizer, d, split, n, args.seed) for d in data.domains}
    if args.write_questions:
        Path(args.write_questions).mkdir(parents=True, exist_ok=True)
        for domain, asked in questions.items():
            write_questions(Path(args.write_questions) / f"{domain}.jsonl", asked)
    return questions


def answer(names: list[str], models: list[Llama], tokenizer, questions: dict, batch_size: int) -> dict:
    """Model name -> domains and their average, each with accuracy and standard error."""
    results = {}
    for name, model in zip(names, models):
        domains = {
            d: accuracy(log_likelihoods(model, tokenizer, asked, batch_size), asked) for d, asked in questions.items()
        }
        rows = domains.values()
        average = {
            "accuracy": statistics.fmean(r["accuracy"] for r in rows),
            "standard_error": math.sqrt(sum(r["standard_error"] ** 2 for r in rows)) / len(rows),
        }
        results[name] = {"domains": domains, "average": average}
    return results


def answer_table(results: dict) -> str:
    """The accuracies as text, in percent."""
    domains = list(next(iter(results.values()))["domains"])
    width, block = max(map(len, [*domains, "average"])), 30
    lines = [" " * width + "".join(f"{shorten(name, block - 2):>{block}}" for name in results)]
    for label, rows in rows_of(results, "average"):
        cells = (f"{100 * row['accuracy']:.1f} ± {100 * row['standard_error']:.1f}" for row in rows)
        lines.append(f"{label:<{width}}" + "".join(f"{cell:>{block}}" for cell in cells))
    return "\n".join(lines)


def shorten(name: str, width: int) -> str:
    """The end of a name, which is what tells paths apart."""
    return name if len(name) <= width else "…" + name[-width + 1 :]


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL_OR_RUN")
    parser.add_argument("--data", required=True, help="data set made by prepare_data.py")
    parser.add_argument("--continuation", action="store_true", help="ask which of two continuations is the true one")
    parser.add_argument("--questions", nargs="+", metavar="FILE", help="of the .jsonl files instead, one per domain")
    parser.add_argument("--write_questions", metavar="DIR", help="write the questions that are asked as .jsonl files")
    parser.add_argument("--split", default="test", choices=["val", "test", "train"])
    parser.add_argument(
        "--seq_len", type=int, default=0, help="tokens per window (default: the data's window, or less)"
    )
    parser.add_argument(
        "--sequences", type=int, default=0, help="windows per domain (default: all), or questions (200)"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    parser.add_argument("--sample", metavar="TEXT", help="continue this text with each model instead")
    parser.add_argument("--tokens", type=int, default=200, help="tokens to sample")
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto = cuda if there is one")
    with user_errors():
        args = parser.parse_args()
        data, device = TokenData(args.data), parallel.find_device(args.device)
        models = [load_model(path).to(device).eval() for path in args.models]
        for path, model in zip(args.models, models):
            check_tokenizer(path, model.config, data)
        for name, low in (("sequences", 0), ("batch_size", 1), ("tokens", 1)):
            if getattr(args, name) < low:
                raise ValueError(f"--{name} {getattr(args, name)} must be at least {low}")
        if args.json and not Path(args.json).absolute().parent.is_dir():
            raise ValueError(f"--json {args.json}: no such directory")
        longest = min(model.config.max_seq_len for model in models)
        shortest = min(data.tokens(domain, args.split).size for domain in data.domains)
        args.seq_len = args.seq_len or min(data.meta["window"], longest, shortest - 1)
        if not 0 < args.seq_len <= longest:
            raise ValueError(f"--seq_len {args.seq_len}: the models take 1 to {longest} tokens")
        for domain in data.domains:
            data.eval_sequences(domain, args.split, args.seq_len, 1)  # is there enough text?
        asking = args.continuation or args.questions or args.write_questions
        tokenizer = load_tokenizer(data.tokenizer) if asking or args.sample is not None else None
        questions = ask(data, tokenizer, args) if asking else None
    if args.sample is not None:
        prompt = torch.tensor([tokenizer.encode(args.sample).tolist() or [data.eot]], device=device)
        for path, model in zip(args.models, models):
            out = model.generate(prompt, args.tokens, args.temperature, args.seed)[0].tolist()
            print(f"--- {path}\n{tokenizer.decode(out)}")
        return
    if questions is None:
        results = evaluate(args.models, models, data, args)
        print(table(results))
    else:
        results = answer(args.models, models, tokenizer, questions, args.batch_size)
        print(answer_table(results))
    if args.json:
        with user_errors():
            Path(args.json).write_text(
                json.dumps({"data": args.data, "split": args.split, "models": results}, indent=1)
            )


if __name__ == "__main__":
    sys.exit(main())
