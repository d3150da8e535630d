"""Speed, side by side in one process: our training step, dense and gated, against transformers', and the schedule.

    python experiments/bench.py [--rounds 30] [--compile] [--json FILE]

A step is forward, backward and AdamW in float32 on 2 threads: d_model 256, 6 layers, 8 heads, d_ffn 688, vocabulary
512, 8 sequences of 256 tokens. The models take turns, so that a change of the machine's speed hits all alike; after a
warm-up, medians and the median of the rounds' ratios are printed. "F.linear" is our dense step with the matrix products
that transformers has, by MKL on an x86 CPU, where ours are by oneDNN (plumbing/products.py). It shows what is left of
the difference without oneDNN. Gated is the whole pruning step: sampling the gates, the forward through them, the
constraint, and AdamW on log_alpha and the multipliers too. --compile puts all through torch.compile, which has no use
for oneDNN, so that "F.linear" is what "dense" is.

The schedule is one evaluation's update (scaling law, reference, weights, ratio) at 7 domains with 64 points each.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dro import Mixture, Point  # noqa: E402
from masks import PruningMasks  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from plumbing.command_line import Parser, user_errors  # noqa: E402

CONFIG = LlamaConfig(
    vocab_size=512, n_layer=6, d_model=256, n_head=8, n_kv_head=8, head_dim=32, d_ffn=688, max_seq_len=256
)
TARGET = replace(CONFIG, n_layer=4, d_model=192, n_head=6, n_kv_head=6, d_ffn=512)
BATCH, WARMUP = 8, 3


def make_steps(compiled: bool = False) -> dict:
    """name -> function that does one training step: transformers', our dense one with F.linear and as it is, our gated
    one."""
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=CONFIG.vocab_size,
            hidden_size=CONFIG.d_model,
            num_hidden_layers=CONFIG.n_layer,
            num_attention_heads=CONFIG.n_head,
            num_key_value_heads=CONFIG.n_kv_head,
            intermediate_size=CONFIG.d_ffn,
            max_position_embeddings=CONFIG.max_seq_len,
            attn_implementation="sdpa",
        )
    ).train()
    plain, dense, gated = (Llama(CONFIG).init_weights(0) for _ in range(3))
    masks = PruningMasks(CONFIG, TARGET, 100)
    assert sum(p.numel() for p in theirs.parameters()) == CONFIG.n_params()
    trained = (theirs, plain, dense, torch.nn.ModuleList([gated, masks]))
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-4) for module in trained]
    tokens = torch.randint(CONFIG.vocab_size, (BATCH, CONFIG.max_seq_len + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    count = iter(range(10**9))
    for module in (theirs, plain, dense, gated) if compiled else ():
        module.compile()

    def their_loss():
        logits = theirs(input_ids=inputs, use_cache=False).logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def gated_loss():
        step = next(count)
        constraint, _ = masks.lagrangian(step)
        return gated(inputs, masks.sample(0, step, 0), targets).mean() + constraint

    losses = {
        "transformers": their_loss,
        "dense, F.linear": lambda: plain(inputs, targets=targets).mean(),
        "dense": lambda: dense(inputs, targets=targets).mean(),
        "gated": gated_loss,
    }

    def step(name, optimizer):
        torch.backends.mkldnn.enabled = "F.linear" not in name
        losses[name]().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {name: partial(step, name, optimizer) for name, optimizer in zip(losses, optimizers)}


def time_schedule(rounds: int) -> float:
    """Median seconds of `Mixture.update` at 7 domains, full method, with 64 points each and a shrinking model."""
    rng = np.random.default_rng(0)
    domains = [f"domain{i}" for i in range(7)]
    seconds = []
    for _ in range(rounds):
        mixture = Mixture(domains, [1] * 7, "dro", [2.0] * 7, dynamic_reference=True, dynamic_ratio=True)
        for k in range(64 + 2):
            params, tokens = 1.25e6 - 7.5e5 * min(1, k / 13), 1000 * (k + 1)
            losses = 2 + tokens**-0.3 * 5 + 0.005 * rng.standard_normal(7)
            start = time.perf_counter()
            now = Point(np.full(7, tokens), params, 1 - k / 66)
            mixture.update((k + 1) / 66, losses, now, Point(np.full(7, 66000), 5e5, 0.0))
            last = time.perf_counter() - start
        seconds.append(last)
    return statistics.median(seconds)


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30, help="rounds of all steps")
    parser.add_argument("--compile", action="store_true", help="torch.compile all models")
    parser.add_argument("--json", metavar="FILE", help="write the results here, too")
    with user_errors():
        args = parser.parse_args()
        if args.rounds < 1:
            raise ValueError("--rounds must be at least 1")
    torch.set_num_threads(2)
    torch.manual_seed(0)
    steps = make_steps(args.compile)
    seconds = {name: [] for name in steps}
    for i in range(WARMUP + args.rounds):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if i >= WARMUP:
                seconds[name].append(time.perf_counter() - start)

    pairs = (("dense", "transformers"), ("dense, F.linear", "transformers"), ("gated", "dense"))
    ratios = {f"{a} / {b}": statistics.median(x / y for x, y in zip(seconds[a], seconds[b])) for a, b in pairs}
    result = {
        "command": f"python experiments/bench.py --rounds {args.rounds}" + " --compile" * args.compile,
        "median_ms": {name: 1e3 * statistics.median(times) for name, times in seconds.items()},
        **ratios,
        "schedule_ms": 1e3 * time_schedule(5),
        "machine": f"{platform.processor() or platform.machine()}, 2 threads, torch {torch.__version__}, "
        f"transformers {transformers.__version__}, {args.rounds} rounds" + ", compiled" * args.compile,
    }
    print(f"{result['machine']}\n")
    for name, ms in result["median_ms"].items():
        spread = np.quantile(seconds[name], [0.1, 0.9]) * 1e3
        print(f"{name:<32}{ms:8.1f} ms per step   (10 to 90 %: {spread[0]:.1f} to {spread[1]:.1f})")
    for name, ratio in ratios.items():
        print(f"{name:<32}{ratio:8.3f}")
    print(f"{'schedule':<32}{result['schedule_ms']:8.1f} ms per evaluation, 7 domains, 64 points each")
    if args.json:
        with user_errors(), open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
