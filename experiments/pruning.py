"""Which small model is best for the tokens spent? Choices of what to keep, and ways to get there, at equal tokens.

    python experiments/pruning.py toy [--seeds 3] [--jobs 2] [--rows "magnitude, fading" ...]
    python experiments/pruning.py smollm2 --seeds 1

`toy` needs the data set and the source model of `make demo`, `smollm2` those of docs/smollm2.md. Every row is one run
of equal settings (the config's) but for what its name says, and sees the same number of tokens. A seed is that of data
order, gates and random choice.

    CHOICE, at one stroke     the small model is cut out before the first step
    CHOICE, fading            what goes fades out in the first 2/7 of the run, then the small model is cut out
    learned, two stages       gates for 4/7 of the run as in the paper; then a run with its own warm-up and cosine
    learned, settling         gates for 2/7 of the run, their noise fades out; then what goes fades out for 2/7
    learned, settling sooner  the same in half of the time, 1/7 of the run each
    from scratch              the target shape, with initial weights drawn at random

Losses are eval.py's on the test split. Results are in docs/pruning/. Runs that are done are skipped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = Path("out/pruning"), ROOT / "docs" / "pruning"
CHOICES = ["random", "magnitude", "activation", "taylor"]
ROWS = [
    *(f"{choice}, {way}" for choice in CHOICES for way in ("at one stroke", "fading")),
    *("learned, two stages", "learned, settling", "learned, settling sooner", "from scratch"),
]
PAPER = {"gates": "learned", "noise_from": 0, "noise_to": 0, "settle_at": 0, "fade": 0}  # in place of the config's


@dataclass(frozen=True)
class Scale:
    """A source model, its data, and how long the runs are."""

    config: str
    source: str
    data: str
    steps: int
    shape: dict  # the target's, for a model from scratch
    scratch_lr: float
    evaluations: int
    sequences: int  # of each domain, of the test split


SCALES = {
    "toy": Scale(
        "config/toy_prune.py",
        "out/toy_pretrain",
        "data/demo",
        700,
        {"n_layer": 4, "d_model": 96, "n_head": 3, "d_ffn": 256},
        3e-3,
        28,
        128,
    ),
    "smollm2": Scale(
        "config/prune_smollm2.py",
        "SmolLM2-135M",
        "data/smollm2",
        200,
        {"n_layer": 24, "d_model": 480, "n_head": 6, "n_kv_head": 2, "head_dim": 64, "d_ffn": 1152},
        1e-3,
        8,
        32,
    ),
}


def call(*command) -> None:
    """Run one of the project's commands from the project's directory; stop at the first that fails."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(config: str, out: Path, seed: int, **settings) -> None:
    """One run on one thread."""
    given = [f"--{key}={value}" for key, value in settings.items()]
    call("train.py", config, "--threads=1", f"--seed={seed}", f"--out={out}", *given)


def run(scale: Scale, row: str, seed: int) -> Path:
    """The runs of one row, which leave one model. Returns its directory."""
    steps, seventh = scale.steps, scale.steps // 7
    out = OUT / f"{scale.data.removeprefix('data/')}_{row.replace(', ', '_').replace(' ', '_')}_{seed}"
    interval = max(1, steps // scale.evaluations)
    usual = PAPER | {"steps": steps, "warmup": steps // 17, "eval_interval": interval, "sparsity_warmup": 0}
    choice, _, way = row.partition(", ")
    dense = dict.fromkeys(("target_n_layer", "target_d_model", "target_n_head", "target_d_ffn"), 0)
    dense["gate_samples"] = 1
    if row == "from scratch":
        fresh = {"init_from": "", "lr": scale.scratch_lr, "warmup": steps // 10, "schedule": "constant"}
        train(scale.config, out, seed, **usual | dense | fresh, **scale.shape)
    elif way == "two stages":
        gated, first = out.with_name(out.name + "_gated"), 4 * seventh
        train(
            scale.config,
            gated,
            seed,
            **usual | {"steps": first, "warmup": first // 10, "sparsity_warmup": first * 3 // 5},
        )
        second = {"init_from": gated, "steps": steps - first, "warmup": (steps - first) // 33}
        train(scale.config, out, seed, **usual | dense | second)
    elif way.startswith("settling"):
        gated = 2 * seventh if way == "settling" else seventh
        noise = {"noise_from": gated * 35 // 100, "noise_to": gated * 9 // 10, "sparsity_warmup": gated // 2}
        train(scale.config, out, seed, **usual | noise | {"settle_at": gated, "fade": gated})
    else:
        train(scale.config, out, seed, **usual | {"gates": choice, "fade": 2 * seventh if way == "fading" else 0})
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW")
    args = parser.parse_args()
    scale, runs = SCALES[args.scale], {}
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = {(row, seed): pool.submit(run, scale, row, seed) for seed in range(args.seeds) for row in args.rows}
        for key, future in todo.items():
            runs[key] = str(future.result())
            print(f"{len(runs)}/{len(todo)}: {key[0]}, seed {key[1]}", flush=True)
    file, models = OUT / f"{args.scale}.json", [scale.source, *runs.values()]
    call("eval.py", *models, "--data", scale.data, "--seq_len", 256, "--sequences", scale.sequences, "--json", file)
    losses = {m: r["average"]["loss"] for m, r in json.loads((ROOT / file).read_text())["models"].items()}
    table = {row: [losses[runs[row, seed]] for seed in range(args.seeds)] for row in args.rows}
    DOCS.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python experiments/pruning.py {args.scale} --seeds {args.seeds}",
        "measure": "test loss, nats per token, average over domains; one value per seed",
        "source": losses[scale.source],
        "losses": table,
    }
    (DOCS / f"{args.scale}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"source {result['source']:.3f}")
    for row, values in sorted(table.items(), key=lambda item: statistics.fmean(item[1])):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        print(f"{row:<28}{statistics.fmean(values):.3f}{spread}   " + " ".join(f"{v:.3f}" for v in values))


if __name__ == "__main__":
    main()
