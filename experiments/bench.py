"""Is it fast, and does it stay so? What has a bound is measured, in one process, beside what it is compared with.

    python experiments/bench.py [--rounds 30] [--mb 64] [--only PART ...] [--json FILE]

Each line is a figure and its bound; the exit status is 1 where one is not kept. What is compared takes turns, so that a
change of the machine's speed hits all alike, and a figure is the median of the rounds' ratios. All on 2 threads.
docs/performance.md says what each part is.
"""

import contextlib
import io
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dro import Mixture, Point, dro_weights  # noqa: E402
from masks import PruningMasks  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from plumbing import checkpoint, products  # noqa: E402
from plumbing.command_line import Parser, number, user_errors  # noqa: E402
from plumbing.cost import flops_per_token  # noqa: E402
from plumbing.data import BatchReader, TokenData  # noqa: E402
from plumbing.output import flush  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from plumbing.tokenizer import load_tokenizer  # noqa: E402
from prepare_data import prepare  # noqa: E402
from scaling_law import ScalingLaw, fit  # noqa: E402

PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
CONFIG = LlamaConfig(
    vocab_size=512, n_layer=6, d_model=256, n_head=8, n_kv_head=8, head_dim=32, d_ffn=688, max_seq_len=256
)
TARGET = replace(CONFIG, n_layer=4, d_model=192, n_head=6, n_kv_head=6, d_ffn=512)
BATCH, WARMUP = 8, 3


class Table:
    """The figures, printed as they come."""

    def __init__(self):
        self.figures, self.failed = {}, []

    def add(self, name: str, value: float, unit: str = "", low: float = -np.inf, high: float = np.inf) -> None:
        """Print a figure, and whether it is within its bounds."""
        bound = f"at most {high:g}" if high < np.inf else f"at least {low:g}" if low > -np.inf else ""
        failed = not low <= value <= high
        self.figures[name] = value
        self.failed += [name] * failed
        print(f"{name:<44}{value:11.4g} {unit:<10}{bound:<16}{'FAILED' if failed else ''}".rstrip(), flush=True)


def take_turns(functions: dict[str, Callable], rounds: int, warmup: int = WARMUP) -> dict[str, list[float]]:
    """Seconds of each function in each round."""
    seconds = {name: [] for name in functions}
    for i in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], a: str, b: str) -> float:
    """Median of a / b over the rounds."""
    return statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))


# -- step -------------------------------------------------------------------------------------------------------------


def make_steps() -> dict[str, Callable]:
    """name -> function that does one training step: transformers', our dense one with the products that were not chosen
    and as it is, our gated one."""
    import transformers  # not above: prepare_data's workers import this file again, and would wait for it

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        Llama(CONFIG).save_pretrained(folder)
        theirs = transformers.LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa").train()
    other, dense, gated = (Llama(CONFIG).init_weights(0) for _ in range(3))
    masks, onednn = PruningMasks(CONFIG, TARGET, 100), products.ONEDNN
    assert sum(p.numel() for p in theirs.parameters()) == CONFIG.n_params()
    trained = (theirs, other, dense, nn.ModuleList([gated, masks]))
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-4) for module in trained]
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONFIG.max_seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    count = iter(range(10**9))

    def their_loss():
        logits = theirs(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def gated_loss():
        step = next(count)
        constraint, _ = masks.lagrangian(step)
        return gated(inputs, masks.sample(0, step, 0), targets).mean() + constraint

    losses = {
        "transformers": their_loss,
        "other products": lambda: other(inputs, targets=targets).mean(),
        "dense": lambda: dense(inputs, targets=targets).mean(),
        "gated": gated_loss,
    }

    def step(name, optimizer):
        if name == "other products":
            products.ONEDNN = not onednn and torch.backends.mkldnn.is_available()
        losses[name]().backward()
        optimizer.step()
        optimizer.zero_grad()
        products.ONEDNN = onednn

    return {name: partial(step, name, optimizer) for name, optimizer in zip(losses, optimizers)}


def best_rate() -> float:
    """FLOP/s of the fastest matrix product of the step's shapes, by either library."""
    c, n = CONFIG, BATCH * CONFIG.max_seq_len
    calls, flops = {}, {}
    for i, o in ((c.d_model, c.d_model), (c.d_model, c.d_ffn), (c.d_ffn, c.d_model), (c.d_model, c.vocab_size)):
        x, weight = torch.randn(n, i), torch.randn(o, i)
        for product in (F.linear, products.onednn_product)[: 1 + torch.backends.mkldnn.is_available()]:
            calls[i, o, product] = partial(product, x, weight)
            flops[i, o, product] = 2 * n * i * o
    with torch.no_grad():
        seconds = take_turns(calls, 50)
    return max(flops[key] / statistics.median(times) for key, times in seconds.items())


def bench_step(table: Table, args) -> None:
    """Forward, backward and AdamW in float32, and how near the dense step is to what its products alone would take."""
    rate = best_rate()
    seconds = take_turns(make_steps(), args.rounds)
    for name, times in seconds.items():
        table.add(f"{name}, a step", 1e3 * statistics.median(times), "ms")
    table.add("dense / transformers", ratio(seconds, "dense", "transformers"), high=0.65 if products.ONEDNN else 0.9)
    table.add("dense / other products", ratio(seconds, "dense", "other products"), high=1.02)
    table.add("gated / dense", ratio(seconds, "gated", "dense"), high=1.05)
    flops = flops_per_token(CONFIG, CONFIG.max_seq_len) * BATCH * CONFIG.max_seq_len
    table.add("fastest product", rate / 1e9, "GFLOP/s")
    table.add("share of the limit, dense", flops / rate / statistics.median(seconds["dense"]))


# -- schedule and law -------------------------------------------------------------------------------------------------


def time_schedule(rounds: int, domains: int = 7, points: int = 64) -> float:
    """Median seconds of `Mixture.update`, full method, with so many points in each domain and a shrinking model."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(rounds):
        s = Settings(schedule="dro", reference_model="given")
        mixture = Mixture(s, list(map(str, range(domains))), [1] * domains, [2.0] * domains)
        for k in range(1, points + 1):
            mixture.s = replace(s, dynamic_reference=k == points)  # the other updates are not timed
            now = Point(np.full(domains, 1000 * k), 1.25e6 - 7.5e5 * min(1, 5 * k / points), 1 - k / points)
            losses = 2 + 5 * (1000 * k) ** -0.3 + 0.005 * rng.standard_normal(domains)
            start = time.perf_counter()
            mixture.update(max(0.02, k / points), losses, now, Point(np.full(domains, 1000 * points), 5e5, 0.0))
            last = time.perf_counter() - start
        seconds.append(last)
    return statistics.median(seconds)


def time_weights(rounds: int, domains: int = 7) -> float:
    """Median seconds of `dro_weights`."""
    rng, seconds = np.random.default_rng(0), []
    for _ in range(rounds):
        losses, ratio = 2 + 0.2 * rng.standard_normal(domains), 0.1 + rng.random(domains)
        start = time.perf_counter()
        dro_weights(losses, np.full(domains, 1.5), ratio)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def law_errors(points: int, noise: float, laws: int = 60) -> np.ndarray:
    """What the fits of random laws, seen to the middle, miss at the end, in nats, (laws,)."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(laws):
        law = ScalingLaw(rng.uniform(0.05, 1.5), 0.0, rng.uniform(0.1, 1.2), rng.uniform(0.5, 2.5), 1e9)
        tokens = 1e9 * np.linspace(0.02, 0.5, points)
        losses = law.predict(tokens) + noise * rng.standard_normal(points)
        errors.append(abs(fit(tokens, losses).predict(1e9) - law.predict(1e9)))
    return np.array(errors)


def bench_schedule(table: Table, args) -> None:
    """One evaluation's update: scaling law, reference, weights, ratio."""
    update, step = time_schedule(5), statistics.median(take_turns({"": make_steps()["dense"]}, 5)[""])
    table.add("schedule, 7 domains, 64 points each", 1e3 * update, "ms")
    table.add("schedule / dense step", update / step, high=0.25)
    table.add("dro_weights, 7 domains", 1e3 * time_weights(500), "ms", high=0.3)


def bench_law(table: Table, args) -> None:
    """Whether known laws come out."""
    for noise in (0.0, 0.002, 0.01):
        for points in (12, 24, 48):
            errors, name = law_errors(points, noise), f"law, {points} points, noise {noise:g}"
            if noise:
                table.add(f"{name}: median", np.median(errors), "nats", high=0.003 if noise == 0.002 else np.inf)
            else:
                table.add(f"{name}: largest", errors.max(), "nats", high=1e-6)


# -- text and checkpoint ----------------------------------------------------------------------------------------------


def bench_text(table: Table, args) -> None:
    """prepare_data beside its tokenizer over the same text in memory, and a batch drawn from what it has made."""
    sources = [path.read_text(errors="replace") for path in sorted(Path(torch.__file__).parent.rglob("*.py"))]
    copies = math.ceil(args.mb * 1e6 / sum(map(len, sources)))
    texts = [f"copy {copy}\n{source}" for copy in range(copies) for source in sources]
    texts = texts[: 1 + np.searchsorted(np.cumsum([len(text) for text in texts]), args.mb * 1e6)]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(folder)
        (folder / "text" / "python").mkdir(parents=True)
        (folder / "text" / "python" / "all.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        bpe = tokenizers.ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts[:300], vocab_size=4096, special_tokens=["</s>"], show_progress=False)
        bpe.save(str(folder / "tokenizer.json"))
        tokenizer = load_tokenizer(str(folder / "tokenizer.json"))

        def make(workers: int) -> None:
            prepare(str(folder / "text"), folder / f"data{workers}", tokenizer.name, workers)

        functions = {
            "alone": lambda: [tokenizer.encode(text) for text in texts],
            1: partial(make, 1),
            2: partial(make, 2),
        }
        seconds = take_turns(functions, rounds=1, warmup=0)
        reader = BatchReader(TokenData(folder / "data1"), CONFIG.max_seq_len, BATCH, seed=0)
        count = iter(range(10**9))
        drawn = take_turns({"": lambda: reader.next_batch(next(count), [1.0])}, 200)[""]
    step = statistics.median(take_turns({"": make_steps()["dense"]}, 5)[""])
    table.add("its tokenizer / prepare_data, 1 worker", ratio(seconds, "alone", 1), low=0.85)
    table.add("prepare_data, 1 worker / 2 workers", ratio(seconds, 1, 2), low=1.7)
    table.add("prepare_data, 1 worker", sum(map(len, texts)) / 1e6 / seconds[1][0], "MB/s")
    table.add("drawing a batch / dense step", statistics.median(drawn) / step, high=0.01)


def bench_memory(table: Table, args) -> None:
    """Peak memory of prepare_data.py over two sizes of text. At the smaller one its tables of fixed size are full."""
    peak, unit = {}, 1e6 if sys.platform == "darwin" else 1e3  # of ru_maxrss, in MB
    for mb in (240, 480):
        with tempfile.TemporaryDirectory(dir=".") as folder:
            text = Path(folder, "text", "numbers", "all.jsonl")
            text.parent.mkdir(parents=True)
            with open(text, "w") as file:
                file.writelines(f'{{"text": "{os.urandom(444).hex(" ", 4)}"}}\n' for _ in range(1000 * mb))
            words = [ROOT / "prepare_data.py", f"{folder}/text", "--out", f"{folder}/data", "--workers", "1"]
            # in a process of a small process: Linux counts the memory of the parent, too
            done = subprocess.run([sys.executable, "-c", PEAK, sys.executable, *words], capture_output=True, check=True)
            peak[mb] = int(done.stdout) / unit
    table.add("prepare_data, memory with 480 MB of text", peak[480], "MB")
    table.add("the same / with 240 MB", peak[480] / peak[240], high=1.1)


def bench_checkpoint(table: Table, args) -> None:
    """Weights and moments of that model, beside a plain write and read of as many bytes; both reach the disk."""
    model = Llama(CONFIG).init_weights(0)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.zeros(1, 2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    tree = nn.ModuleDict({"model": model})
    content = os.urandom(3 * 4 * CONFIG.n_params())
    with tempfile.TemporaryDirectory(dir=".") as folder:  # not on a disk in memory
        ours, plain = Path(folder) / "ours", Path(folder) / "plain"

        def new(path: Path) -> Path:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir()
            return path

        functions = {
            "save": lambda: checkpoint.save(tree, optimizer, new(ours)),
            "write": lambda: ((new(plain) / "bytes").write_bytes(content), flush(plain)),
            "load": lambda: checkpoint.load(tree, ours, optimizer),
            "read": lambda: (plain / "bytes").read_bytes(),
        }
        seconds = take_turns(functions, rounds=10)
    table.add("checkpoint", len(content) / 1e6, "MB")
    table.add("saving / a plain write", ratio(seconds, "save", "write"), high=2)
    table.add("loading / a plain read", ratio(seconds, "load", "read"), high=2)


PARTS = {name.removeprefix("bench_"): part for name, part in globals().items() if name.startswith("bench_")}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--rounds", type=number(int, 1), default=30, help="rounds of all steps")
    parser.add_argument("--mb", type=number(float, 1), default=64, help="text for prepare_data, in 10^6 bytes")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="these parts and no others")
    parser.add_argument("--json", metavar="FILE", help="write the figures here, too")
    with user_errors():
        args = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    machine = (
        f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, 2 threads, torch {torch.__version__}, "
        f"transformers {version('transformers')}, {args.rounds} rounds"
    )
    print(f"{machine}\nproducts by {'oneDNN' if products.ONEDNN else 'F.linear'}\n")
    table = Table()
    for part in args.only:
        PARTS[part](table, args)
    if args.json:
        with user_errors(), open(args.json, "w") as file:
            json.dump({"command": " ".join(sys.argv), "machine": machine, **table.figures}, file, indent=1)
    if table.failed:
        sys.exit(f"bench.py: out of bounds: {'; '.join(table.failed)}")


if __name__ == "__main__":
    main()
