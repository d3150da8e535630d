"""Which small model is best for the tokens spent? Choices of what to keep, and ways to get there, at equal tokens.

    python experiments/pruning.py [--seeds 3] [--steps 700] [--jobs 2] [--rows "magnitude, fading" ...]

Needs the data set and the source model of `make demo`. Every row is one run of equal settings (toy_prune.py's) but for
what its name says, and sees the same number of tokens. A seed is that of data order, gates and random choice.

    CHOICE, at one stroke     the small model is cut out before the first step
    CHOICE, fading            what goes fades out in the first 2/7 of the run, then the small model is cut out
    learned, two stages       gates for 4/7 of the run as in the paper; then a run with its own warm-up and cosine
    learned, settling         gates for 2/7 of the run, their noise fades out; then what goes fades out for 2/7
    from scratch              the target shape, with initial weights drawn at random

Losses are eval.py's on the test split. Results are in docs/pruning/. Runs that are done are skipped.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = Path("out/pruning"), ROOT / "docs" / "pruning"
CHOICES = ["random", "magnitude", "activation", "taylor"]
ROWS = [
    *(f"{choice}, {way}" for choice in CHOICES for way in ("at one stroke", "fading")),
    *("learned, two stages", "learned, settling", "from scratch"),
]


def call(*command) -> None:
    """Run one of the project's commands from the project's directory; stop at the first that fails."""
    subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def train(config: str, out: Path, seed: int, **settings) -> None:
    """One run on one thread."""
    call(
        "train.py",
        config,
        "--threads=1",
        f"--seed={seed}",
        f"--out={out}",
        *(f"--{k}={v}" for k, v in settings.items()),
    )


def run(row: str, seed: int, steps: int) -> Path:
    """The runs of one row, which leave one model. Returns its directory."""
    out = OUT / f"{row.replace(', ', '_').replace(' ', '_')}_{steps}_{seed}"
    seventh = steps // 7
    usual = {"steps": steps, "warmup": steps // 17, "eval_interval": max(1, steps // 28), "sparsity_warmup": 0}
    choice, _, way = row.partition(", ")
    if row == "from scratch":
        shape = {"n_layer": 4, "d_model": 96, "n_head": 3, "d_ffn": 256}
        train("config/toy_pretrain.py", out, seed, steps=steps, warmup=steps // 10, **shape)
    elif way == "two stages":
        gated, continued = 4 * seventh, steps - 4 * seventh
        first = {"steps": gated, "warmup": gated // 10, "sparsity_warmup": gated * 3 // 5}
        train("config/toy_prune.py", out.with_name(out.name + "_gated"), seed, **usual | first)
        second = {"init_from": out.with_name(out.name + "_gated"), "steps": continued, "warmup": continued // 33}
        train("config/toy_continue.py", out, seed, eval_interval=usual["eval_interval"], **second)
    elif way == "settling":
        noise = {"noise_from": seventh * 7 // 10, "noise_to": seventh * 18 // 10}
        settle = {"sparsity_warmup": seventh, "settle_at": 2 * seventh, "fade": 2 * seventh}
        train("config/toy_prune.py", out, seed, **usual | noise | settle)
    else:
        train("config/toy_prune.py", out, seed, gates=choice, fade=2 * seventh if way == "fading" else 0, **usual)
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW")
    args = parser.parse_args()
    runs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = {(row, s): pool.submit(run, row, s, args.steps) for s in range(args.seeds) for row in args.rows}
        for key, future in todo.items():
            runs[key] = str(future.result())
            print(f"{len(runs)}/{len(todo)}: {key[0]}, seed {key[1]}", flush=True)
    file = OUT / f"eval_{args.steps}.json"
    models = ["out/toy_pretrain", *runs.values()]
    call("eval.py", *models, "--data", "data/demo", "--sequences", 128, "--json", file)
    losses = {m: r["average"]["loss"] for m, r in json.loads((ROOT / file).read_text())["models"].items()}
    table = {row: [losses[runs[row, s]] for s in range(args.seeds)] for row in args.rows}
    DOCS.mkdir(parents=True, exist_ok=True)
    result = {
        "command": f"python experiments/pruning.py --seeds {args.seeds} --steps {args.steps}",
        "measure": "test loss, nats per token, average over domains; one value per seed",
        "source": losses["out/toy_pretrain"],
        "losses": table,
    }
    (DOCS / f"results_{args.steps}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"source {result['source']:.3f}")
    for row, values in sorted(table.items(), key=lambda item: statistics.fmean(item[1])):
        spread = statistics.stdev(values) if len(values) > 1 else 0
        print(f"{row:<28}{statistics.fmean(values):.3f} ± {spread:.3f}   " + " ".join(f"{v:.3f}" for v in values))


if __name__ == "__main__":
    main()
