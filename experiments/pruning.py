"""Which small model is best for the tokens spent? Choices of what to keep, and ways to get there, at equal tokens.

    python experiments/pruning.py toy [--seeds 3] [--jobs 2] [--rows "magnitude, fading" ...]
    python experiments/pruning.py smollm2 [--seeds 3] [--jobs 6]    # on a GPU; without one, a run takes hours
    python experiments/pruning.py smollm2_short [--seeds 2]         # half of the tokens, on a CPU: an hour a run

`toy` makes its data set and its source model, where they are not there; the others need those of docs/smollm2.md. Every
row is one run of equal settings (the config's, with the paper's mixture) but for what its name says, and sees the same
number of tokens. A seed is that of the domain of each sequence, of the gates' noise and of the random choice.

    CHOICE, at one stroke     the small model is cut out before the first step
    CHOICE, fading            what goes fades out in the first 2/7 of the run, then the small model is cut out
    learned, two stages       gates for 4/7 of the run as in the paper; then a run with its own warm-up and cosine
    learned, settling         gates for 2/7 of the run, their noise fades out; then what goes fades out for 2/7
    learned, settling sooner  the same in half of the time, 1/7 of the run each
    learned, at one stroke    what `learned, settling` has kept with that seed, cut out before the first step
    from scratch              the target shape, with initial weights drawn at random

Losses are eval.py's on the test split. Runs that are done are skipped. Results are printed, and join those in
docs/pruning/ that are of the same text and source; there a row with more seeds stays.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from runs import ON_GPU, ROOT, demo_text, each, test_losses, train

from plot import COLORS, STYLE, new_figure
from plumbing.command_line import Parser, number, user_errors
from plumbing.metrics import read_metrics
from plumbing.output import write_whole

OUT, DOCS = Path("out/pruning"), Path("docs/pruning")
CHOICES = ["random", "magnitude", "activation", "taylor"]
ROWS = [
    *(f"{choice}, {way}" for choice in CHOICES for way in ("at one stroke", "fading")),
    *("learned, two stages", "learned, settling", "learned, settling sooner"),
    *("learned, at one stroke", "from scratch"),
]
LATER = "learned, at one stroke"  # it needs the runs of another row
DRAWN = ["random, at one stroke", "magnitude, at one stroke", "activation, at one stroke", "activation, fading",
         "learned, two stages", "learned, settling"]  # fmt: skip
PAPER = {"gates": "learned", "noise_from": 0, "noise_to": 0, "settle_at": 0, "fade": 0}  # in place of the config's


USUAL = PAPER | {"steps": 700, "warmup": 41, "eval_interval": 25, "sparsity_warmup": 0}
DENSE = dict.fromkeys(("target_n_layer", "target_d_model", "target_n_head", "target_d_ffn"), 0) | {"gate_samples": 1}


@dataclass(frozen=True)
class Scale:
    """A source model, its data, and the shape that it is cut to."""

    config: str
    source: str
    data: str
    shape: dict  # the target's, for a model from scratch
    scratch_lr: float
    sequences: int  # of each domain, of the test split
    settings: dict = field(default_factory=dict)  # what differs from the config


SCALES = {
    "toy": Scale(
        "config/toy_gates.py",
        "out/pruning/source",
        "data/demo",
        {"n_layer": 4, "d_model": 96, "n_head": 3, "d_ffn": 256},
        3e-3,
        128,
    ),
    "smollm2": Scale(
        "config/prune_smollm2.py",
        "SmolLM2-135M",
        "data/smollm2",
        {
            **{"n_layer": 24, "d_model": 480, "n_head": 6, "n_kv_head": 2, "head_dim": 64, "d_ffn": 1152},
            "tie_embeddings": True,
        },
        1e-3,
        64,
        {"batch_size": 8, "eval_sequences": 16} | ON_GPU,
    ),
}
SHORT = {"batch_size": 4, "eval_sequences": 8, "eval_interval": 50, "dtype": "bfloat16"}  # a CPU should multiply that
SCALES["smollm2_short"] = replace(SCALES["smollm2"], settings=SHORT)


def place(name: str, row: str, seed: int) -> Path:
    """The directory of a row's last run."""
    return OUT / f"{name}_{row.replace(', ', '_').replace(' ', '_')}_{seed}"


def judge(name: str, row: str, seed: int) -> float:
    """The test loss of a row, average over domains, after its runs, if they are not done."""
    scale, out = SCALES[name], place(name, row, seed)
    if not (out / "model").exists():
        run(name, row, seed)
    return statistics.fmean(test_losses(out, out / "test.json", scale.data, scale.sequences).values())


def run(name: str, row: str, seed: int) -> None:
    """The runs of one row, which leave one model."""
    scale, out = SCALES[name], place(name, row, seed)
    configs, (choice, _, way) = (scale.config, "config/paper.py"), row.partition(", ")
    usual = USUAL | scale.settings | {"init_from": scale.source, "reference_model": scale.source}
    if row == "from scratch":
        fresh = {"init_from": "", "lr": scale.scratch_lr, "warmup": 70, "schedule": "constant"}
        train(out, seed, *configs, **usual | DENSE | fresh, **scale.shape)
    elif way == "two stages":
        gated = out.with_name(out.name + "_gated")
        train(gated, seed, *configs, **usual | {"steps": 400, "warmup": 40, "sparsity_warmup": 240})
        train(out, seed, *configs, **usual | DENSE | {"init_from": gated, "steps": 300, "warmup": 9})
    elif way.startswith("settling"):
        gated = 200 if way == "settling" else 100
        noise = {"noise_from": gated * 35 // 100, "noise_to": gated * 9 // 10, "sparsity_warmup": gated // 2}
        train(out, seed, *configs, **usual | noise | {"settle_at": gated, "fade": gated})
    else:
        if choice == "learned":
            run(name, "learned, settling", seed)
            choice = place(name, "learned, settling", seed) / "model" / "pruning.json"
        train(out, seed, *configs, **usual | {"gates": choice, "fade": 200 if way == "fading" else 0})


def main():
    parser = Parser(__doc__)
    parser.add_argument("scale", choices=SCALES)
    parser.add_argument("--seeds", type=number(int, 1), default=3)
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time, one thread each")
    parser.add_argument("--rows", nargs="+", default=ROWS, choices=ROWS, metavar="ROW")
    os.chdir(ROOT)
    with user_errors():
        args = parser.parse_args()
        compare(args)


def compare(args: argparse.Namespace) -> None:
    """All runs of some rows, their test losses, the table and the figure."""
    scale = SCALES[args.scale]
    demo_text(scale.data)
    if args.scale == "toy":  # its source learns for longer than the demo's
        configs = ("config/toy_pretrain.py", "config/paper.py")
        train(Path(scale.source), 0, *configs, schedule="constant", steps=1200, warmup=120)
    for later in (False, True):
        rows = [row for row in args.rows if (row == LATER) == later]
        each(judge, [(args.scale, row, seed) for seed in range(args.seeds) for row in rows], args.jobs)
    losses = {row: [judge(args.scale, row, seed) for seed in range(args.seeds)] for row in args.rows}
    of_source = test_losses(scale.source, OUT / f"{args.scale}_source.json", scale.data, scale.sequences)
    result = {
        "command": f"python experiments/pruning.py {shlex.join(sys.argv[1:])}",
        "measure": "test loss, nats per token, average over domains; one value per seed",
        "source": statistics.fmean(of_source.values()),
        "losses": losses,
    }
    print(table(result))
    file = DOCS / f"{args.scale}.json"
    before = json.loads(file.read_text()) if file.exists() else result
    if abs(before["source"] - result["source"]) < 1e-3:
        old = before["losses"]
        result["losses"] = old | {row: max(new, old.get(row, new), key=len) for row, new in losses.items()}
        result["command"] = " && ".join(dict.fromkeys([*before["command"].split(" && "), result["command"]]))
    elif sum(map(len, before["losses"].values())) > sum(map(len, losses.values())):
        return print(f"{file} stays as it is: it has more runs, of another text or source")
    DOCS.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(result, indent=1) + "\n")
    drawn = {row: [out for seed in range(100) if ((out := place(args.scale, row, seed)) / "model").exists()]
             for row in DRAWN if row in result["losses"]}  # fmt: skip
    if drawn and all(drawn.values()):
        figure(drawn).savefig(DOCS / f"{args.scale}.png")


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
        for row in drawn:
            curves = []
            for out in runs[row]:
                stages = [read_metrics(path) for path in (out.with_name(out.name + "_gated"), out) if path.exists()]
                before = np.cumsum([0, *(stage.evals[-1]["tokens"] for stage in stages)])
                points = [(e["tokens"] + n, np.mean(list(e["loss"].values()))) for n, stage in zip(before, stages)
                          for e in stage.evals]  # fmt: skip
                curves.append(points)
            tokens, loss = np.mean(curves, axis=0).T
            left.plot(tokens / 1e6, loss, color=COLORS[DRAWN.index(row)], label=row)
        source = np.mean(list(read_metrics(runs[drawn[0]][0]).evals[0]["reference"].values()))  # it was measured on it
        left.axhline(source, color="black", linestyle=":", label="the source")
        worst = max(line.get_ydata()[-1] for line in left.lines)
        left.set_ylim(source - 0.1, max(source + 0.5, worst + 0.1))
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
