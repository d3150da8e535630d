"""Which small model is best for the tokens spent? Choices of what to keep, and ways to get there, at equal tokens.

    python experiments/pruning.py toy [--seeds 3] [--jobs 2] [--rows "magnitude, fading" ...]
    python experiments/pruning.py smollm2 [--seeds 3] [--jobs 6]    # on a GPU; without one, a run takes hours

`toy` makes its data set and its source model, where they are not there; `smollm2` needs those of docs/smollm2.md. Every
row is one run of equal settings (the config's, with the paper's mixture) but for what its name says, and sees the same
number of tokens. A seed is that of data order, gates and random choice.

    CHOICE, at one stroke     the small model is cut out before the first step
    CHOICE, fading            what goes fades out in the first 2/7 of the run, then the small model is cut out
    learned, two stages       gates for 4/7 of the run as in the paper; then a run with its own warm-up and cosine
    learned, settling         gates for 2/7 of the run, their noise fades out; then what goes fades out for 2/7
    learned, settling sooner  the same in half of the time, 1/7 of the run each
    from scratch              the target shape, with initial weights drawn at random

Losses are eval.py's on the test split. Runs that are done are skipped. Results of all rows go to docs/pruning/; those
of some (--rows) are printed.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plot import COLORS, STYLE, new_figure  # noqa: E402
from plumbing.command_line import Parser, user_errors  # noqa: E402
from plumbing.metrics import read_metrics  # noqa: E402

OUT, DOCS = Path("out/pruning"), ROOT / "docs" / "pruning"
CHOICES = ["random", "magnitude", "activation", "taylor"]
ROWS = [
    *(f"{choice}, {way}" for choice in CHOICES for way in ("at one stroke", "fading")),
    *("learned, two stages", "learned, settling", "learned, settling sooner", "from scratch"),
]
DRAWN = ["random, at one stroke", "magnitude, at one stroke", "activation, at one stroke", "activation, fading",
         "learned, two stages", "learned, settling"]  # fmt: skip
PAPER = {"gates": "learned", "noise_from": 0, "noise_to": 0, "settle_at": 0, "fade": 0}  # in place of the config's
# a run takes a minute there, and a checkpoint of a real model is large
ON_GPU = {"dtype": "bfloat16", "save_interval": 10**6} if torch.cuda.is_available() else {}


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
    settings: dict = field(default_factory=dict)  # what differs from the config


SCALES = {
    "toy": Scale(
        "config/toy_gates.py",
        "out/pruning/source",
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
        700,
        {
            **{"n_layer": 24, "d_model": 480, "n_head": 6, "n_kv_head": 2, "head_dim": 64, "d_ffn": 1152},
            "tie_embeddings": True,
        },
        1e-3,
        28,
        64,
        {"batch_size": 8, "eval_sequences": 16} | ON_GPU,
    ),
}


def call(*command: object) -> None:
    """One of the project's commands, on one thread, from the project's directory. OSError where it fails."""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=one, stdout=subprocess.DEVNULL)
    if ended.returncode:
        raise OSError(f"`{' '.join(map(str, command))}` failed, and has said why")


def train(config: str, out: Path, seed: int, **settings) -> None:
    """One run on one thread, with the paper's mixture."""
    given = [f"--{key}={value}" for key, value in settings.items()]
    call("train.py", config, "config/paper.py", "--threads=1", f"--seed={seed}", f"--out={out}", *given)


def test_loss(scale: Scale, model: str | Path, file: Path) -> float:
    """The test loss of a model, average over domains, which eval.py writes to a file, unless it is there."""
    if not (ROOT / file).exists():
        test = {"--data": scale.data, "--seq_len": 256, "--sequences": scale.sequences, "--json": file}
        call("eval.py", model, *(word for item in test.items() for word in item))
    [found] = json.loads((ROOT / file).read_text())["models"].values()
    return found["average"]["loss"]


def judge(scale: Scale, row: str, seed: int) -> tuple[Path, float]:
    """The directory of a row's last run, and its test loss. train.py does nothing where a run is done."""
    out = OUT / f"{scale.data.removeprefix('data/')}_{row.replace(', ', '_').replace(' ', '_')}_{seed}"
    run(scale, row, seed, out)
    return out, test_loss(scale, out, out / "test.json")


def run(scale: Scale, row: str, seed: int, out: Path) -> None:
    """The runs of one row, which leave one model."""
    steps, seventh = scale.steps, scale.steps // 7
    interval = max(1, steps // scale.evaluations)
    usual = PAPER | scale.settings | {"init_from": scale.source, "reference_model": scale.source}
    usual |= {"steps": steps, "warmup": steps // 17, "eval_interval": interval, "sparsity_warmup": 0}
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


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW")
    with user_errors():
        args = parser.parse_args()
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """All runs of some rows, their test losses, the table and the figure."""
    scale, runs = SCALES[args.scale], {}
    if scale.data == "data/demo" and not (ROOT / scale.data / "meta.json").exists():
        call("prepare_data.py", "installed", "--out", scale.data, "--held_out", "0.1")
    if args.scale == "toy" and not (ROOT / scale.source / "model").exists():  # it learns for longer than the demo's
        train("config/toy_pretrain.py", Path(scale.source), 0, schedule="constant", steps=1200, warmup=120)
    with ThreadPoolExecutor(args.jobs) as pool:
        todo = {(row, seed): pool.submit(judge, scale, row, seed) for seed in range(args.seeds) for row in args.rows}
        for key, future in todo.items():
            runs[key] = future.result()
            print(f"{len(runs)}/{len(todo)}: {key[0]}, seed {key[1]}", flush=True)
    result = {
        "command": f"python experiments/pruning.py {shlex.join(sys.argv[1:])}",
        "measure": "test loss, nats per token, average over domains; one value per seed",
        "source": test_loss(scale, scale.source, OUT / f"{args.scale}_source.json"),
        "losses": {row: [runs[row, seed][1] for seed in range(args.seeds)] for row in args.rows},
    }
    if args.rows == ROWS:
        DOCS.mkdir(parents=True, exist_ok=True)
        (DOCS / f"{args.scale}.json").write_text(json.dumps(result, indent=1) + "\n")
        drawn = {row: [ROOT / runs[row, seed][0] for seed in range(args.seeds)] for row in DRAWN}
        figure(drawn).savefig(DOCS / f"{args.scale}.png")
    print(table(result))


def table(result: dict) -> str:
    """Markdown: the test loss of each row, mean ± standard deviation over seeds, the best first."""
    lines = ["| choice, way | test loss |", "|---|---|"]
    for row, values in sorted(result["losses"].items(), key=lambda item: statistics.fmean(item[1])):
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        lines.append(f"| {row} | {statistics.fmean(values):.3f}{spread} |")
    return "\n".join([*lines, f"| *the source* | {result['source']:.3f} |"])


def figure(runs: dict[str, list[Path]]):
    """Left: validation loss over tokens, mean over seeds. Right: which layers each choice has kept, in how many of the
    seeds. runs: row -> the run of each seed."""
    with matplotlib.rc_context(STYLE):
        fig, [[left, right]] = new_figure(1, 2, height=5, width_ratios=[3, 2])
        drawn = list(runs)
        for color, row in zip(COLORS, drawn):
            curves = []
            for out in runs[row]:
                stages = [read_metrics(path) for path in (out.with_name(out.name + "_gated"), out) if path.exists()]
                before = np.cumsum([0, *(stage.evals[-1]["tokens"] for stage in stages)])
                points = [(e["tokens"] + n, np.mean(list(e["loss"].values()))) for n, stage in zip(before, stages)
                          for e in stage.evals]  # fmt: skip
                curves.append(points)
            tokens, loss = np.mean(curves, axis=0).T
            left.plot(tokens / 1e6, loss, color=color, label=row)
        source = np.mean(list(read_metrics(runs[drawn[0]][0]).evals[0]["reference"].values()))  # it was measured on it
        left.axhline(source, color="black", linestyle=":", label="the source")
        left.set_ylim(source - 0.1, source + 0.5)
        left.set_xlabel("tokens (millions)")
        left.set_ylabel("validation loss (nats per token)")
        left.legend(fontsize=11)
        chosen = [row for row in drawn if (runs[row][0] / "model" / "pruning.json").exists()]
        kept = [[json.loads((out / "model" / "pruning.json").read_text()) for out in runs[row]] for row in chosen]
        layers = range(kept[0][0]["source"]["n_layer"])
        right.imshow([[np.mean([i in k["layer"]["kept"] for k in seeds]) for i in layers] for seeds in kept],
                     cmap="Greys", vmin=0, vmax=1, aspect="auto", zorder=3)  # fmt: skip
        right.set_yticks(range(len(chosen)), chosen)
        right.set_xlabel("layers kept (grey: in some seeds)")
    return fig


if __name__ == "__main__":
    main()
