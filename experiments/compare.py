"""Is the claim true? Robust, self-adjusting mixtures against fixed ones: equal tokens, several seeds, one test split.

    python experiments/compare.py                    # everything, in order of importance: five hours on two cores
    python experiments/compare.py --seeds 2 --parts skew --jobs 2
    python experiments/compare.py --report           # tables and figures of what is done so far

From one source model a seed (config/toy_pretrain.py; the seed is of the source, the gates and the data order), the toy
pruning stage and the toy continue stage run under each schedule, everything else equal:

    constant, sheared, dro            the references are the source's own validation losses, measured beforehand
    dro + reference, dro + ratio      one of DRPruning's additions each
    full                              both: DRPruning
    uniform                           constant, at equal shares
    mean                              constant, at the mean mixture that `dro` drew in the same stage and seed

Parts, in this order: `skew`, the mixture SKEW (the domains in alphabetical order); `own`, the mixture that the source
was trained on; `long`, three times the steps at the skewed mixture, four schedules and at most three seeds; `ablation`,
one setting of the full method at a time at the skewed mixture, one seed.

All figures are of the test split, which no schedule sees. Degradation is the loss above the source's. What is done is
skipped, so an interrupted call goes on; two runs on one thread each go side by side.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data import TokenData  # noqa: E402
from dro import dro_weights  # noqa: E402
from plot import COLORS, STYLE, new_figure, read_metrics  # noqa: E402

OUT, DOCS = Path("out/compare"), ROOT / "docs" / "compare"
SCHEDULES = {
    "constant": ["--schedule=constant"],
    "sheared": ["--schedule=sheared"],
    "dro": ["--schedule=dro"],
    "full": ["--schedule=dro", "--dynamic_reference=True", "--dynamic_ratio=True"],
    "dro + reference": ["--schedule=dro", "--dynamic_reference=True"],
    "dro + ratio": ["--schedule=dro", "--dynamic_ratio=True"],
    "uniform": ["--schedule=constant"],
    "mean": ["--schedule=constant"],
}
OFF = ["--dynamic_reference=False", "--dynamic_ratio=False"]  # the configs' defaults are the full method
SKEW = [0.78, 0.10, 0.04, 0.03, 0.02, 0.02, 0.01]
ABLATIONS = {
    "rho": [0.02, 0.05, 0.2, 0.5, 1.0],  # beside the default, which `skew` has
    "delta": [0.03, 0.3, 1.0],
    "floor": [0.0, 0.5, 0.8],
    "eval_interval": [6, 24, 48],
    "eval_sequences": [4, 64],
}
LONG = ["constant", "sheared", "dro", "full"]
RHOS = [0.05, 0.1, 0.5, 1.0]  # of the worst mixtures that results are judged by
STAGES = {"prune": 400, "continue": 300}  # steps


@dataclass
class Chain:
    """One schedule from source to continued model: a directory of two runs and the evaluation of both."""

    part: str
    schedule: str
    seed: int
    options: list[str] = field(default_factory=list)
    name: str = ""

    @property
    def path(self) -> Path:
        """Its directory."""
        label = (self.name or self.schedule).replace(" ", "").replace("+", "_")
        return OUT / self.part / f"{label}_{self.seed}"

    @property
    def result(self) -> Path:
        """Its evaluation; it is done when this is there."""
        return ROOT / self.path / "eval.json"


def plan(parts: list[str], seeds: int) -> list[Chain]:
    """All chains, in order of importance."""
    chains = []
    for part in parts:
        if part in ("skew", "own"):
            chains += [Chain(part, schedule, seed) for seed in range(seeds) for schedule in SCHEDULES]
        elif part == "long":
            chains += [Chain(part, schedule, seed) for seed in range(min(3, seeds)) for schedule in LONG]
        elif part == "ablation":
            chains += [
                Chain(part, "full", 0, [f"--{key}={value}"], f"{key}_{value}")
                for key, values in ABLATIONS.items()
                for value in values
            ]
    return chains


def call(*command: object) -> None:
    """One of the project's commands on one thread; its output goes to the end of a log."""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(ROOT / OUT / "log.txt", "a") as log:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, env=one, check=True, stdout=log, stderr=log)


def source(seed: int, data: TokenData, scale: float) -> None:
    """Train the source model of a seed."""
    path, steps = OUT / "source" / str(seed), round(1200 * scale)
    if not (ROOT / path / "model").exists():
        call(
            "train.py", "config/toy_pretrain.py", f"--seed={seed}", f"--out={path}", "--threads=1",
            f"--data={data.path}", f"--steps={steps}", f"--warmup={steps // 10}",
        )  # fmt: skip
    if not (ROOT / path / "eval.json").exists():
        evaluate(path, data, path)


def evaluate(path: Path, data: TokenData, *models: Path) -> None:
    """Test losses of some runs, in path/eval.json."""
    call("eval.py", *models, "--data", data.path, "--sequences", 128, "--json", path / "eval.json")


def run(chain: Chain, data: TokenData, scale: float) -> None:
    """Prune and continue under the chain's schedule, and evaluate both on the test split."""
    before = model = OUT / "source" / str(chain.seed)
    domains, scale = data.domains, 3 * scale if chain.part == "long" else scale
    for stage, steps in STAGES.items():
        out, ratio = chain.path / stage, []
        if chain.part != "own":
            ratio = [f"--ratio={dict(zip(domains, SKEW))}"]
        if chain.schedule == "uniform":
            ratio = [f"--ratio={dict.fromkeys(domains, 1.0)}"]
        if chain.schedule == "mean":
            drawn = read_metrics(ROOT / Chain(chain.part, "dro", chain.seed).path / stage).evals[-1]["domain_tokens"]
            ratio = [f"--ratio={dict(drawn)}"]
        lengths = {"steps": steps, "warmup": {"prune": 40, "continue": 9}[stage]}
        lengths["eval_interval"] = {"prune": 16, "continue": 12}[stage]
        if stage == "prune":
            lengths["sparsity_warmup"] = 240
        lengths = {key: max(1, round(value * scale)) for key, value in lengths.items()}
        if not (ROOT / out / "model").exists():
            call(
                "train.py", f"config/toy_{stage}.py", f"--out={out}", f"--init_from={before}", f"--seed={chain.seed}",
                f"--reference_model={model}", "--threads=1", "--log_interval=20", f"--data={data.path}",
                *OFF,
                *(f"--{key}={value}" for key, value in lengths.items()), *SCHEDULES[chain.schedule], *ratio,
                *chain.options,
            )  # fmt: skip
        before = out
    evaluate(chain.path, data, *(chain.path / stage for stage in STAGES))


# -- what came of it ------------------------------------------------------------------------------------------------


def measures(chain: Chain, shares: np.ndarray) -> dict[str, float]:
    """Everything that a chain is judged by, after the continue stage unless it says otherwise; nats a token."""

    def losses(file, which=0, key="loss"):
        models = list(json.loads(file.read_text())["models"].values())
        return np.array([row[key] for row in models[which]["domains"].values()])

    source = losses(ROOT / OUT / "source" / str(chain.seed) / "eval.json")
    pruned, loss = (losses(chain.result, i) for i in range(2))
    worse = loss - source
    found = {
        "average loss": loss.mean(),
        "average bits per byte": losses(chain.result, 1, "bits_per_byte").mean(),
        "worst loss": loss.max(),
        "average degradation": worse.mean(),
        "worst degradation": worse.max(),
        "sd of degradation": worse.std(),
        "worst degradation, pruned": (pruned - source).max(),
    }
    for rho in RHOS:
        q = dro_weights(loss, np.zeros_like(loss), shares, rho, floor=0.0)
        found[f"loss under the worst mixture, rho {rho}"] = q @ loss
    times = [json.loads(x) for x in (ROOT / chain.path / "continue" / "timings.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(t["step"] for t in times)])
    training = sum(n * 2048 / t["tokens_per_second"] for n, t in zip(steps, times))
    found["share of the time for evaluations and schedule"] = 1 - training / times[-1]["seconds"]
    return {key: float(value) for key, value in found.items()}


def recovery(chain: Chain, constant: Chain) -> dict[str, float | None]:
    """Tokens of the continue stage until validation is as good as where `constant` ended; None if it never is."""
    reference = read_metrics(ROOT / OUT / "source" / str(chain.seed)).end["loss"]

    def curves(c):
        evals = read_metrics(ROOT / c.path / "continue").evals
        worse = np.array([[e["loss"][d] - reference[d] for d in reference] for e in evals])
        return [e["tokens"] for e in evals], worse.max(1), worse.mean(1)

    (tokens, worst, average), (_, its_worst, its_average) = curves(chain), curves(constant)
    first = lambda curve, goal: next((t for t, x in zip(tokens, curve) if x <= goal), None)  # noqa: E731
    return {
        "tokens to constant's worst degradation": first(worst, its_worst[-1]),
        "tokens to constant's average": first(average, its_average[-1]),
    }


def report(chains: list[Chain], shares: np.ndarray) -> dict:
    """results.json: part -> schedule -> values by measure, one a seed, with paired tests."""
    results = {}
    for chain in chains:
        if chain.result.exists():
            values = measures(chain, shares)
            constant = Chain(chain.part if chain.part != "ablation" else "skew", "constant", chain.seed)
            if constant.result.exists():
                values |= recovery(chain, constant)
            rows = results.setdefault(chain.part, {}).setdefault(chain.name or chain.schedule, {})
            rows[str(chain.seed)] = values
    summary = {}
    for part, rows in results.items():
        for schedule, seeds in rows.items():
            entry = summary.setdefault(part, {}).setdefault(schedule, {"seeds": sorted(seeds)})
            for key in next(iter(seeds.values())):
                x = [seeds[s].get(key) for s in sorted(seeds)]
                known = [v for v in x if v is not None]
                entry[key] = {
                    "mean": float(np.mean(known)) if known else None,
                    "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                    "values": x,
                }
                for other in ("constant", "sheared"):
                    both = sorted(seeds.keys() & rows.get(other, {}).keys())
                    pairs = np.array([[seeds[s].get(key), rows[other][s].get(key)] for s in both], float)
                    pairs = pairs[np.isfinite(pairs).all(1)]
                    if schedule != other and len(pairs) > 1 and np.ptp(pairs[:, 0] - pairs[:, 1]) > 0:
                        difference = pairs[:, 0] - pairs[:, 1]
                        entry[key][f"minus {other}"] = {
                            "mean": float(difference.mean()),
                            "sd": float(difference.std(ddof=1)),
                            "p": float(stats.ttest_rel(*pairs.T).pvalue),  # paired t-test
                            "better in": f"{int((difference < 0).sum())} of {len(difference)} seeds",
                        }
    return summary


COLUMNS = ["average degradation", "worst degradation", "sd of degradation", "average bits per byte"]


def table(summary: dict) -> str:
    """The main table, markdown: mean ± standard deviation over seeds, paired difference in worst degradation."""
    lines = []
    for part, rows in summary.items():
        lines += ["", f"{part}", "", f"| schedule | seeds | {' | '.join(COLUMNS)} | worst − constant's | − sheared's |"]
        lines += ["|---" * (len(COLUMNS) + 4) + "|"]
        for schedule, row in rows.items():
            cells = [f"{row[c]['mean']:.3f}" + (f" ± {row[c]['sd']:.3f}" if row[c]["sd"] else "") for c in COLUMNS]
            for other in ("constant", "sheared"):
                pair = row["worst degradation"].get(f"minus {other}")
                cells.append(f"{pair['mean']:+.3f} (p {pair['p']:.2f}, {pair['better in']})" if pair else "")
            lines.append(f"| {schedule} | {len(row['seeds'])} | {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def figures(summary: dict) -> None:
    """compare.png: each seed's average against its worst degradation, a panel a part; ablation.png."""
    import matplotlib

    parts = [part for part in ("skew", "own", "long") if part in summary]
    with matplotlib.rc_context(STYLE):
        if parts:
            fig, axes = new_figure(1, len(parts))
            titles = {"skew": "skewed mixture", "own": "the source's mixture", "long": "skewed, three times as long"}
            for ax, part in zip(axes[0], parts):
                for schedule, row in summary[part].items():
                    color = COLORS[list(SCHEDULES).index(schedule) % len(COLORS)]
                    marker = "os^DvXP*"[list(SCHEDULES).index(schedule)]
                    x, y = (row[c]["values"] for c in ("average degradation", "worst degradation"))
                    ax.plot(x, y, marker, color=color, alpha=0.35, markersize=6)
                    ax.plot(np.mean(x), np.mean(y), marker, color=color, markersize=12, label=schedule)
                ax.set_title(titles[part])
                ax.set_xlabel("average degradation (nats a token)")
            axes[0][0].set_ylabel("worst domain's degradation (nats a token)")
            axes[0][-1].legend(fontsize=11)
            fig.savefig(DOCS / "compare.png")
        if "ablation" in summary:
            fig, axes = new_figure(1, len(ABLATIONS))
            default = {"rho": 0.1, "delta": 0.1, "floor": 0.2, "eval_interval": 12, "eval_sequences": 16}
            base = summary.get("skew", {}).get("full")
            for ax, (key, values) in zip(axes[0], ABLATIONS.items()):
                points = {v: summary["ablation"].get(f"{key}_{v}") for v in values}
                points = {v: row for v, row in points.items() if row} | ({default[key]: base} if base else {})
                for i, c in enumerate(("worst degradation", "average degradation")):
                    xs = sorted(points)
                    ax.plot(range(len(xs)), [points[x][c]["values"][0] for x in xs], "os"[i] + "-", color=COLORS[i],
                            label=c)  # fmt: skip
                ax.set_xticks(range(len(points)), [str(x) for x in sorted(points)], fontsize=10)
                ax.set_title(key)
            axes[0][0].set_ylabel("nats a token")
            axes[0][0].legend(fontsize=11)
            fig.savefig(DOCS / "ablation.png")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=["skew", "own", "long", "ablation"])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--data", default="data/demo", help="data set with seven domains")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps, to try it out")
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    if not (ROOT / args.data / "meta.json").exists():
        call("prepare_data.py", "installed", "--out", args.data, "--held_out", "0.1")
    data = TokenData(args.data)
    shares = np.array([data.tokens(d, "train").size for d in data.domains], float)
    chains = plan(args.parts, args.seeds)
    todo = [] if args.report else [c for c in chains if not c.result.exists()]
    started, done, lock = time.time(), [], threading.Lock()

    def work(chain: Chain, *needs) -> None:
        for need in needs:
            need.result()
        run(chain, data, args.scale)
        with lock:
            done.append(chain)
            left = (time.time() - started) / len(done) * (len(todo) - len(done))
            print(f"{len(done)}/{len(todo)}: {chain.path}, {left / 3600:.1f} h left", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        sources = {seed: pool.submit(source, seed, data, args.scale) for seed in sorted({c.seed for c in todo})}
        futures = {}
        for c in todo:  # a chain that waits for another comes after it, so the pool cannot lock up
            needs = [sources[c.seed]]
            if c.schedule == "mean" and (c.part, "dro", c.seed) in futures:
                needs.append(futures[c.part, "dro", c.seed])
            futures[c.part, c.name or c.schedule, c.seed] = pool.submit(work, c, *needs)
        for future in futures.values():
            future.result()
    summary = report(chains, shares / shares.sum())
    DOCS.mkdir(parents=True, exist_ok=True)
    (DOCS / "results.json").write_text(json.dumps({"command": "python experiments/compare.py", **summary}, indent=1))
    print(table(summary))
    figures(summary)


if __name__ == "__main__":
    main()
