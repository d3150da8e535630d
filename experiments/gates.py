"""Does learning the gates choose better than chance or weight magnitude? Equal tokens, settings, source; 3 seeds.

    python experiments/gates.py [--seeds 3] [--steps 400] [--jobs 2]

Needs the data set and the source model of `make demo`. For each seed (of gates, data order and the random choice) the
toy pruning stage runs with learned gates, and with the same shape cut out of the source beforehand, at random or by
magnitude, and trained for the same steps. A fourth run, `learned choice, dense`, cuts out what the learned gates kept
and trains it from the source's weights in the same way: it tells the choice from the training through gates. Each model
then goes through the toy continue stage. Losses by eval.py on the test split; results in docs/gates/. What is done is
skipped, so an interrupted call goes on.
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT, DOCS = Path("out/gates"), ROOT / "docs" / "gates"
CHOICES = ["learned", "random", "magnitude", "learned choice, dense"]


def call(*command: str) -> None:
    """Run one of the project's commands on one thread, from the project's directory; stop at the first that fails."""
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def run(choice: str, seed: int, steps: int) -> tuple[Path, Path]:
    """Prune (or cut and train) and continue; returns both runs' directories."""
    name = f"{choice.replace(', ', '_').replace(' ', '_')}_{steps}_{seed}"
    pruned, continued = OUT / name, OUT / f"{name}_continued"
    scale = steps / 400  # the shipped toy config's proportions
    gates = choice
    if choice == "learned choice, dense":
        gates = str(OUT / f"learned_{steps}_{seed}" / "model" / "pruning.json")
    call(
        "train.py", "config/toy_prune.py", f"--gates={gates}", f"--seed={seed}", f"--out={pruned}", "--threads=1",
        f"--steps={steps}", f"--warmup={round(40 * scale)}", f"--sparsity_warmup={round(240 * scale)}",
        f"--eval_interval={max(1, round(16 * scale))}",
    )  # fmt: skip
    call(
        "train.py", "config/toy_continue.py", f"--init_from={pruned}", f"--seed={seed}", f"--out={continued}",
        "--threads=1",
    )  # fmt: skip
    return pruned, continued


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of the pruning stage")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    args = parser.parse_args()
    runs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for choices in (CHOICES[:3], CHOICES[3:]):  # the last needs what the first chose
            todo = {(c, s): pool.submit(run, c, s, args.steps) for c in choices for s in range(args.seeds)}
            for key, future in todo.items():
                runs[key] = future.result()
                print(f"{len(runs)}/{len(CHOICES) * args.seeds}: {key[0]}, seed {key[1]}", flush=True)
    models = ["out/toy_pretrain", *(str(path) for pair in runs.values() for path in pair)]
    file = OUT / f"eval_{args.steps}.json"
    call("eval.py", *models, "--data", "data/demo", "--sequences", "128", "--json", str(file))
    losses = {m: r["average"]["loss"] for m, r in json.loads((ROOT / file).read_text())["models"].items()}
    table = {
        choice: {
            stage: [losses[str(runs[choice, seed][i])] for seed in range(args.seeds)]
            for i, stage in enumerate(("end of the pruning stage", "after the continue stage"))
        }
        for choice in CHOICES
    }
    DOCS.mkdir(parents=True, exist_ok=True)
    result = {"command": f"python experiments/gates.py --seeds {args.seeds} --steps {args.steps}",
              "measure": "test loss, nats per token, average over domains; one value per seed",
              "source": losses["out/toy_pretrain"], "losses": table}  # fmt: skip
    (DOCS / f"results_{args.steps}.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"source {result['source']:.3f}")
    for choice, stages in table.items():
        cells = (f"{statistics.fmean(v):.3f} ± {statistics.stdev(v) if len(v) > 1 else 0:.3f}" for v in stages.values())
        print(f"{choice:<24}" + "   ".join(cells))


if __name__ == "__main__":
    main()
