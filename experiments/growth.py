"""How does cost grow? One figure and one table: each size is raised alone, and what it costs is measured.

    python experiments/growth.py [--rounds 5] [--only PART ...] [--out docs/performance]

sequence      a dense training step of 4,096 tokens (d_model 256, 2 layers): longer sequences, fewer of them
width         the same step with sequences of 256 tokens
domains       `dro_weights`, and an update of the schedule with 24 points
evaluations   an update of the schedule at 7 domains, when so many evaluations have been
data          opening a data set of so many MB, and drawing a batch of 8 sequences
processes     memory of each of so many processes and a step's FLOPs in each, by the dry run (fsdp, toy shapes)

`growth` is the exponent g of cost ∝ size^g over the upper half of the sizes, and `arithmetic` the largest that the
operations account for. Everything is on 2 threads; a time is the median of the rounds.
"""

import json
import statistics
import sys
import tempfile
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path

import matplotlib
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from experiments.bench import CONFIG, take_turns, time_schedule, time_weights  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from plot import STYLE, new_figure  # noqa: E402
from plumbing import cost  # noqa: E402
from plumbing.command_line import Parser, number, user_errors  # noqa: E402
from plumbing.data import BatchReader, TokenData  # noqa: E402
from plumbing.dataset import FORMAT, SPLITS  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from train import rehearse  # noqa: E402

TOKENS = 4096  # in a step


def median(function, rounds: int) -> float:
    """Median seconds of a call."""
    return statistics.median(take_turns({"": function}, rounds, warmup=1)[""])


def step_time(config: LlamaConfig, rounds: int) -> float:
    """Seconds of a dense training step with TOKENS tokens."""
    model = Llama(config).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tokens = torch.randint(config.vocab_size, (TOKENS // config.max_seq_len, config.max_seq_len))

    def step():
        model(tokens, targets=tokens).mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return median(step, rounds)


def data_times(megabytes: int, rounds: int) -> tuple[float, float]:
    """Seconds to open a data set of so many MB, which is empty on the disk, and to draw a batch from it."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {split: megabytes * 500_000 if split == "train" else 4096 for split in SPLITS}
        (Path(folder) / "text").mkdir()
        for split, n in sizes.items():
            with open(Path(folder) / "text" / f"{split}.bin", "w+b") as file:
                file.truncate(2 * n)
                for _ in iter(partial(file.read, 1 << 20), b""):  # once: what is measured is not the disk
                    pass
        counts = {split: {"tokens": n, "documents": 1, "bytes": n} for split, n in sizes.items()}
        meta = {"format": FORMAT, "tokenizer": "byte", "tokenizer_fingerprint": "none", "vocab_size": 257, "eot": 256}
        meta |= {"bos": None, "dtype": "uint16", "window": 1024, "seed": 0, "domains": {"text": counts}}
        (Path(folder) / "meta.json").write_text(json.dumps(meta))
        reader, steps = BatchReader(TokenData(folder), 256, 8, seed=0), count()
        return median(lambda: TokenData(folder), rounds), median(lambda: reader.next_batch(next(steps), [1.0]), 50)


def rehearsed_memory(processes: int) -> float:
    """Bytes that each process holds at the peak of a step of the same global batch."""
    shape = {"n_layer": 4, "d_model": 512, "n_head": 8, "d_ffn": 1376, "seq_len": 256, "batch_size": 32}
    s = Settings(**shape, micro_batch=4, parallel="fsdp" if processes > 1 else "ddp", world_size=processes)
    return cost.memory(s, s.shape_from_scratch(cost.BYTES), rehearse)["all"]


def measure(rounds: int) -> dict[str, tuple]:
    """part -> (unit of the size, sizes, {what is measured: (function of the size, unit, largest exponent)})."""
    small = replace(CONFIG, n_layer=2)
    seconds, weights = partial(time_schedule, rounds), partial(time_weights, 20 * rounds)
    of_data = {}  # both times of a size are measured at once

    def data(i, megabytes):
        if megabytes not in of_data:
            of_data[megabytes] = data_times(megabytes, rounds)
        return of_data[megabytes][i]

    def longer(n):
        return step_time(replace(small, max_seq_len=n), rounds)

    def wider(n):
        return step_time(replace(small, d_model=n, n_head=n // 32, n_kv_head=n // 32, d_ffn=8 * n // 3), rounds)

    domains = {"weights": (lambda n: weights(n), "s", 2), "update": (lambda n: seconds(n, 24), "s", 3)}
    opened = {"opening": (partial(data, 0), "s", 0), "a batch": (partial(data, 1), "s", 0)}
    return {
        "sequence": ("tokens", [256, 512, 1024, 2048, 4096], {"step": (longer, "s", 1)}),
        "width": ("d_model", [128, 256, 512, 1024], {"step": (wider, "s", 2)}),
        "domains": ("domains", [7, 14, 28, 56, 100], domains),
        "evaluations": ("points", [24, 100, 300, 1000], {"update": (lambda n: seconds(7, n), "s", 1)}),
        "data": ("MB", [10, 100, 1000], opened),
        "processes": ("processes", [1, 2, 4, 8], {"memory": (rehearsed_memory, "bytes", 0)}),
    }


def main():
    parts = measure(1)
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=number(int, 1), default=5, help="calls of which the median is taken")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts), help="these parts and no others")
    parser.add_argument("--out", default="docs/performance", help="folder of growth.png")
    with user_errors():
        args = parser.parse_args()
        Path(args.out).mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(2)
    parts = measure(args.rounds)
    matplotlib.rcParams.update(STYLE)
    rows = -(-len(args.only) // 3)
    figure, axes = new_figure(rows, 3, height=3.6 * rows)
    for axis in axes.flat[len(args.only) :]:
        axis.set_axis_off()
    print(f"{'part':<14}{'what':<10}{'sizes':<26}{'growth':>7}{'arithmetic':>12}   cost")
    for axis, name in zip(axes.flat, args.only):
        unit, sizes, curves = parts[name]
        for what, (function, measured, largest) in curves.items():
            values = [function(n) for n in sizes]
            half = len(sizes) // 2
            growth = np.log(values[-1] / values[half]) / np.log(sizes[-1] / sizes[half])
            span = f"{sizes[0]} to {sizes[-1]} {unit}"
            print(f"{name:<14}{what:<10}{span:<26}{growth:>7.2f}{largest:>12}   ", end="")
            print(" ".join(f"{value:.3g}" for value in values), measured, flush=True)
            axis.loglog(sizes, np.divide(values, values[0]), "o-", label=what)
        axis.loglog(sizes, np.divide(sizes, sizes[0]) ** largest, color="black", ls=":", label="arithmetic, at most")
        axis.set(xlabel=unit, ylabel="cost (smallest: 1)")
        axis.set_xticks(sizes, sizes, fontsize=11)
        axis.minorticks_off()
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, 0.2), max(high, 5))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.legend(fontsize=11, loc="upper left")
    figure.savefig(Path(args.out) / "growth.png")


if __name__ == "__main__":
    main()
