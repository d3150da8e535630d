"""Is the claim true? Robust, self-adjusting mixtures against fixed ones: equal tokens, several seeds, one test split.

    python experiments/compare.py                    # everything, in order of importance: six hours, two cores
    python experiments/compare.py --seeds 2 --parts skew --jobs 2
    python experiments/compare.py --report           # tables and figures of what is done so far
    python experiments/compare.py --parts own --keep # more of it on another machine: beside the published results
    python experiments/compare.py --data data/mine --ratio "{'code': .8, 'prose': .1, 'mail': .1}" --seeds 3

From one source model per seed (config/toy_pretrain.py; the seed is of the source, the gates and the data order), the
toy pruning stage and the toy continue stage run under each schedule, everything else equal:

    constant, sheared, dro            the references are the source's own validation losses, measured beforehand
    dro + reference, dro + ratio      one of DRPruning's additions each
    full                              both: DRPruning, with the scaling law that knows the learning rate
    full, paper's law                 both, with eq. 4 as the paper has it
    full, rho 0.5; dro, rho 0.5       in a robust set whose divergence may be five times as large
    full, tempered                    ten times as large; a weight rises by at most its reference share per .01 nats
    sheared, step 2                   twice the step size
    full, predicted only              both, with no references given: the prediction is all there is
    uniform                           constant, at equal shares
    mean                              constant, at the mean mixture that `dro` drew in the same stage and seed

Parts, in this order:

    skew          eleven of them, 5 seeds, at a mixture of 78 % C++ headers
    recovery      all of them, the continue stage alone, from the model that `constant` has pruned: the same gates
    own           ten, at the mixture that the source was trained on
    recovery_own  nine, as recovery, at that mixture
    long          three times the steps at the skewed mixture, five schedules, 3 seeds
    languages     seven languages (experiments/languages.py), three quarters English, five schedules, 3 seeds
    ablation      as recovery, one setting of the full method at a time, one seed

All figures are of the test split, which no schedule sees. Degradation is the loss above the source's. Some of the
models are asked the two-choice questions of plumbing/continuation.py, too. What is done is skipped, so an interrupted
call goes on; after a change of the configs or of the data, remove out/compare first. Two runs go side by side, on one
thread each. The report goes to docs/compare/ (or --docs); that of a trial (--scale) or of other data, with `constant`,
`sheared`, `dro` and `full` only, to a folder of its own beside out/compare.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dro import dro_weights  # noqa: E402
from plot import COLORS, STYLE, new_figure, read_metrics  # noqa: E402
from plumbing.command_line import Parser, load, user_errors  # noqa: E402
from plumbing.data import TokenData  # noqa: E402
from train import Settings  # noqa: E402

OUT, DOCS = Path("out/compare"), Path("docs/compare")  # other folders for a trial or other data, see `main`
DRO = ["--schedule=dro", "--rho=0.1", "--temperature=0"]  # the paper's
FULL = [*DRO, "--dynamic_reference=True", "--dynamic_ratio=True"]
SCHEDULES = {
    "constant": ["--schedule=constant"],
    "sheared": ["--schedule=sheared"],
    "sheared, step 2": ["--schedule=sheared", "--step_size=2"],
    "dro": DRO,
    "full": FULL,
    "full, paper's law": [*FULL, "--law=paper"],
    "full, rho 0.5": [*FULL, "--rho=0.5"],
    "full, tempered": [*FULL, "--rho=1", "--temperature=0.01"],
    "dro, rho 0.5": [*DRO, "--rho=0.5"],
    "full, predicted only": [*FULL, "--reference_model="],
    "dro + reference": [*DRO, "--dynamic_reference=True"],
    "dro + ratio": [*DRO, "--dynamic_ratio=True"],
    "uniform": ["--schedule=constant"],
    "mean": ["--schedule=constant"],
}
OFF = ["--dynamic_reference=False", "--dynamic_ratio=False"]  # the configs' defaults are the full method
SKEW = {"cpp": 0.78, "python": 0.1, "docstrings": 0.04, "comments": 0.03, "formulas": 0.02, "manuals": 0.02}
SKEW["stubs"] = 0.01
ENGLISH = {"en": 0.78, "de": 0.10, "fr": 0.04, "ru": 0.03, "ja": 0.02, "zh": 0.02, "ar": 0.01}
ABLATIONS = {
    "rho": [0.02, 0.05, 0.2, 0.5, 1.0],  # beside the default, which `recovery` has
    "delta": [0.03, 0.3, 1.0],
    "floor": [0.0, 0.5, 0.8],
    "eval_interval": [6, 24, 48],
    "eval_sequences": [4, 64],
}
EIGHT = ["constant", "sheared", "dro", "full", "dro + reference", "dro + ratio", "uniform", "mean"]
FOUR = ["constant", "sheared", "dro", "full"]
ASKED = ["constant", "sheared", "full"]  # two-choice questions; a measure is the share of
CHOICES = "true continuations"  # among the answers
RHOS = [0.05, 0.1, 0.5, 1.0]  # of the worst mixtures that results are judged by
STAGES = ("prune", "continue")


@dataclass(frozen=True)
class Part:
    """A setting in which schedules are compared."""

    schedules: list[str]
    seeds: int
    mixture: list[float] | dict[str, float] | None  # None: as the source's
    length: int = 1  # times as many steps
    data: str = "data/demo"
    sources: str = "source"  # where the source models are
    pruned: str = ""  # the part whose `constant` has pruned the model; empty: each schedule prunes its own


PARTS = {
    "skew": Part([*EIGHT, "full, rho 0.5", "full, tempered", "full, paper's law"], 5, SKEW),
    "recovery": Part(list(SCHEDULES), 5, SKEW, pruned="skew"),
    "own": Part([*EIGHT, "full, tempered", "full, paper's law"], 5, None),
    "recovery_own": Part([*EIGHT, "full, rho 0.5"], 5, None, pruned="own"),
    "long": Part([*FOUR, "full, rho 0.5"], 3, SKEW, length=3),
    "languages": Part([*FOUR, "full, rho 0.5"], 3, ENGLISH, data="data/languages", sources="source_languages"),
    "ablation": Part(["full"], 1, SKEW, pruned="skew"),
}


@dataclass(frozen=True)
class Chain:
    """One schedule from source to continued model: a directory of two runs and the evaluation of both."""

    part: str
    schedule: str
    seed: int
    setting: tuple | None = None  # of an ablation: name and value

    @property
    def label(self) -> str:
        """What tells it from the others of its part and seed."""
        return self.schedule if self.setting is None else "{} {}".format(*self.setting)

    @property
    def path(self) -> Path:
        """Its directory. `constant` after `constant` has pruned is `constant` all along."""
        if self.base and self.schedule == "constant":
            return self.base.path
        return OUT / self.part / re.sub("[^a-z0-9.]+", "_", f"{self.label}_{self.seed}")

    @property
    def source(self) -> Path:
        """The run of its source model."""
        return OUT / PARTS[self.part].sources / str(self.seed)

    @property
    def base(self) -> "Chain | None":
        """The chain that has pruned the model, where it is another."""
        part = PARTS[self.part].pruned
        return Chain(part, "constant", self.seed) if part else None

    @property
    def needs(self) -> list["Chain"]:
        """The chains that must be done before it, in order."""
        mixture = [replace(self, schedule="dro")] if self.schedule == "mean" else []
        return [self.base, *mixture] if self.base else mixture

    @property
    def models(self) -> list[Path]:
        """The pruned and the continued run."""
        return [(self.base or self).path / "prune", self.path / "continue"]

    @property
    def result(self) -> Path:
        """Its evaluation; it is done when this is there."""
        return self.path / "eval.json"

    @property
    def answers(self) -> Path:
        """What its continued model answered to two-choice questions."""
        return self.path / "answers.json"


def plan(parts: list[str], seeds: int, schedules: list[str]) -> list[Chain]:
    """All chains, in order of importance."""
    chains = []
    for part in parts:
        settings = [(key, value) for key in ABLATIONS for value in ABLATIONS[key]] if part == "ablation" else [None]
        for seed in range(min(seeds, PARTS[part].seeds)):
            chains += [Chain(part, s, seed, x) for s in PARTS[part].schedules if s in schedules for x in settings]
    return chains


def call(*command: object) -> None:
    """One of the project's commands on one thread; its output goes to the end of a log."""
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    with open(OUT / "log.txt", "a") as log:
        ended = subprocess.run([sys.executable, *map(str, command)], env=one, stdout=log, stderr=log).returncode
    if ended:
        raise OSError(f"`{' '.join(map(str, command))}` failed, see the end of {OUT / 'log.txt'}")


def lengths(stage: str, factor: float) -> dict[str, int]:
    """What a toy config counts in steps, times a factor."""
    settings, keys = load(Settings, [f"config/toy_{stage}.py"]), ("steps", "warmup", "sparsity_warmup", "eval_interval")
    return {key: max(1, round(getattr(settings, key) * factor)) for key in keys}


def train_source(path: Path, seed: int, data: str, scale: float) -> None:
    """Train the source model of a seed, and evaluate it."""
    if not (path / "model").exists():
        call(
            "train.py", "config/toy_pretrain.py", f"--seed={seed}", f"--out={path}", "--threads=1",
            f"--data={data}", *(f"--{key}={value}" for key, value in lengths("pretrain", scale).items()),
        )  # fmt: skip
    if not (path / "eval.json").exists():
        evaluate(path, data, path)


def evaluate(path: Path, data: str, *models: Path) -> None:
    """Test losses of some runs, in path/eval.json."""
    call("eval.py", *models, "--data", data, "--sequences", 128, "--json", path / "eval.json")


def run(chain: Chain, scale: float) -> None:
    """Prune and continue under the chain's schedule, and evaluate both on the test split: losses, and two-choice
    questions to the continued model."""
    part, before = PARTS[chain.part], chain.source
    domains = read_metrics(chain.source).info["domains"]
    for out, stage in zip(chain.models, STAGES):
        start, before = before, out
        if (out / "model").exists():
            continue
        mixture = part.mixture
        if chain.schedule == "uniform":
            mixture = [1.0] * len(domains)
        elif chain.schedule == "mean":
            mixture = read_metrics(replace(chain, schedule="dro").path / stage).evals[-1]["domain_tokens"]
        if isinstance(mixture, list):
            mixture = dict(zip(domains, mixture, strict=True))
        settings = lengths(stage, part.length * scale) | (dict([chain.setting]) if chain.setting else {})
        call(
            "train.py", f"config/toy_{stage}.py", f"--out={out}", f"--init_from={start}", f"--seed={chain.seed}",
            f"--reference_model={chain.source}", "--threads=1", "--log_interval=20", f"--data={part.data}",
            *OFF, *SCHEDULES[chain.schedule], *([f"--ratio={mixture}"] if mixture else []),
            *(f"--{key}={value}" for key, value in settings.items()),
        )  # fmt: skip
    if chain.schedule in ASKED and not chain.setting:
        call("eval.py", chain.models[1], "--data", part.data, "--continuation", "--json", chain.answers)
    evaluate(chain.path, part.data, *chain.models)


# -- what came of it ------------------------------------------------------------------------------------------------


def measures(chain: Chain) -> dict[str, float]:
    """Everything that a chain is judged by, after the continue stage unless it says otherwise; nats per token."""

    def losses(file, which=0, key="loss"):
        models = list(json.loads(file.read_text())["models"].values())
        return np.array([row[key] for row in models[which]["domains"].values()])

    data = TokenData(PARTS[chain.part].data)
    natural = np.array([data.tokens(d, "train").size for d in data.domains], float)
    source = losses(chain.source / "eval.json")
    pruned, loss = (losses(chain.result, i) for i in range(2))
    worse = loss - source
    found = {
        "average degradation": worse.mean(),
        "worst degradation": worse.max(),
        "sd of degradation": worse.std(),
        "average loss": loss.mean(),
        "worst loss": loss.max(),
        "average bits per byte": losses(chain.result, 1, "bits_per_byte").mean(),
        "average degradation, pruned": (pruned - source).mean(),
        "worst degradation, pruned": (pruned - source).max(),
    }
    for rho in RHOS:
        q = dro_weights(loss, np.zeros_like(loss), natural, rho, floor=0.0)
        found[f"loss under the worst mixture, rho {rho}"] = q @ loss
    found |= {f"degradation, {d}": x for d, x in zip(data.domains, worse)}
    continued = read_metrics(chain.path / "continue")
    drawn = continued.evals[-1]["domain_tokens"]
    found |= {f"share of the tokens, {d}": drawn[d] / sum(drawn.values()) for d in data.domains}
    if chain.answers.exists():
        [answered] = json.loads(chain.answers.read_text())["models"].values()
        for d, row in (answered["domains"] | {"average": answered["average"]}).items():
            found |= {f"{CHOICES}, {d}": row["accuracy"], f"{CHOICES}, {d}: standard error": row["standard_error"]}
    times = [json.loads(x) for x in (chain.path / "continue" / "timings.jsonl").read_text().splitlines()]
    steps = np.diff([0, *(t["step"] for t in times)])
    training = sum(n * continued.info["tokens_per_step"] / t["tokens_per_second"] for n, t in zip(steps, times))
    found["share of the time for evaluations and schedule"] = 1 - training / times[-1]["seconds"]
    return {key: float(value) for key, value in found.items()}


def recovery(chain: Chain) -> dict[str, float | None]:
    """Tokens of the continue stage until validation is as good as where `constant` ended; None if it never is."""
    constant = Chain(chain.part, "constant", chain.seed)
    if chain.setting or not constant.result.exists():  # an ablation may change what validation is
        return {}
    reference = read_metrics(chain.source).end["loss"]

    def curves(c):
        evals = read_metrics(c.path / "continue").evals
        worse = np.array([[e["loss"][d] - reference[d] for d in reference] for e in evals])
        return [e["tokens"] for e in evals], worse.max(1), worse.mean(1)

    (tokens, worst, average), (_, its_worst, its_average) = curves(chain), curves(constant)
    first = lambda curve, goal: next((t for t, x in zip(tokens, curve) if x <= goal), None)  # noqa: E731
    return {
        "tokens to constant's worst degradation": first(worst, its_worst[-1]),
        "tokens to constant's average": first(average, its_average[-1]),
    }


def compared(mine: dict, others: dict, key: str) -> dict | None:
    """Paired difference in a measure over the seeds that both schedules have; None with fewer than two."""
    pairs = [(mine[s].get(key), others[s].get(key)) for s in sorted(mine.keys() & others.keys())]
    pairs = np.array([p for p in pairs if None not in p], float).reshape(-1, 2)
    difference = pairs[:, 0] - pairs[:, 1]
    if len(pairs) < 2 or np.ptp(difference) == 0:
        return None
    return {
        "mean": float(difference.mean()),
        "sd": float(difference.std(ddof=1)),
        "p": float(stats.ttest_rel(*pairs.T).pvalue),  # paired t-test, two-sided
        "lower in": f"{int((difference < 0).sum())} of {len(pairs)}",
    }


def published(results: dict) -> dict:
    """(part, schedule, seed) -> measure -> value, of a results.json."""
    return {
        (part, label, seed): {key: entry["values"][i] for key, entry in row.items() if key != "seeds"}
        for part, rows in results.items()
        for label, row in rows.items()
        for i, seed in enumerate(row["seeds"])
    }


def report(chains: list[Chain], before: dict | None = None) -> dict:
    """For results.json: part -> schedule -> measure -> values, one per seed, and paired tests. Of the chains that are
    done, and of those that are not here but in a results.json of before; ValueError if their source was another."""
    results, summary, before = {}, {}, before or {}
    known = published(before)
    for chain in chains:
        found = known.get((chain.part, chain.label, chain.seed))
        if chain.result.exists():
            found = measures(chain) | recovery(chain)
        if found:
            results.setdefault(chain.part, {}).setdefault(chain.label, {})[chain.seed] = found
    for part, rows in results.items():
        for seed in {seed for seeds in rows.values() for seed in seeds}:
            sources = [x[seed]["average loss"] - x[seed]["average degradation"] for x in rows.values() if seed in x]
            if np.ptp(sources) > 1e-4:
                raise ValueError(
                    f"{part}, seed {seed}: what results.json has is of another source model (other data?), which "
                    "cannot be compared: run all of the part here, or do without --keep"
                )
        for label, seeds in rows.items():
            entry = summary.setdefault(part, {}).setdefault(label, {"seeds": sorted(seeds)})
            for key in dict.fromkeys(key for found in seeds.values() for key in found):
                values = [seeds[s].get(key) for s in sorted(seeds)]
                known = [v for v in values if v is not None]
                entry[key] = {
                    "values": values,
                    "mean": float(np.mean(known)) if known == values else None,
                    "sd": float(np.std(known, ddof=1)) if len(known) > 1 else None,
                }
                for other in ("constant", "sheared", "sheared, step 2", "dro"):
                    if other in rows and other != label:
                        entry[key][f"minus {other}"] = compared(seeds, rows[other], key)
    return summary


def rounded(x):
    """The same with numbers to five digits after the point, p values to two significant ones."""
    if isinstance(x, dict):
        return {k: float(f"{v:.2g}") if k == "p" else rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 5) if isinstance(x, float) else x


TABLES = """# The comparison in full

By `python experiments/compare.py --report`. Degradation is the test loss above the source's, nats per token: mean ±
standard deviation over seeds. Differences are paired by seed, with the p of a paired t-test and the number of seeds in
which the schedule is lower.
"""
COLUMNS = ["average degradation", "worst degradation", "sd of degradation", "average bits per byte"]
TITLES = {
    "skew": "skewed",
    "recovery": "skewed, one pruned model",
    "own": "the source's mixture",
    "recovery_own": "the source's, one pruned model",
    "long": "skewed, three times as long",
    "languages": "languages, mostly English",
    "mine": "own data",
}


def three(x: float) -> str:
    """Three digits after the point, and no zero before it."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(x, 3) + 0.0:.3f}").replace("-", "−")


def spread(entry: dict) -> str:
    """Mean ± standard deviation."""
    return three(entry["mean"]) + (f" ± {three(entry['sd'])}" if entry["sd"] else "")


def overview(summary: dict) -> str:
    """Markdown: average / worst degradation of each schedule in each part; bold where it beats `sheared`'s."""
    parts = [part for part in TITLES if len(summary.get(part, {})) > 1]
    lines = ["| |" + "".join(f" {TITLES[part]} |" for part in parts), "|---" * (len(parts) + 1) + "|"]
    for schedule in SCHEDULES:
        cells = []
        for part in parts:
            row = summary[part].get(schedule)
            if row is None:
                cells.append("")
                continue
            values = []
            for key in ("average degradation", "worst degradation"):
                pair, text = row[key].get("minus sheared"), three(row[key]["mean"])
                always = pair and pair["lower in"] == "{0} of {0}".format(len(row["seeds"]))
                values.append(f"**{text}**" if always else text)
            cells.append(f"{' / '.join(values)} ({len(row['seeds'])})")
        if any(cells):
            lines.append(f"| {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def answers_table(rows: dict) -> str:
    """Markdown: a part's true continuations in %, mean over seeds ± the standard error of one model; empty if none."""

    def percent(entry):
        return f"{100 * np.mean([v for v in entry['values'] if v is not None]):.1f}"

    lines = []
    for label, row in rows.items():
        keys = [key.removesuffix(": standard error") for key in row if key.startswith(CHOICES) and ":" in key]
        if keys and not lines:
            domains = [key.removeprefix(f"{CHOICES}, ") for key in keys]
            lines = [f"| | {' | '.join(domains)} |", "|---" * (len(keys) + 1) + "|"]
        if keys:
            cells = [f"{percent(row[key])} ± {percent(row[f'{key}: standard error'])}" for key in keys]
            lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(summary: dict) -> str:
    """Markdown: for each part the main measures, and paired differences to `constant`, `sheared` and `dro`."""
    lines = []
    for part, rows in summary.items():
        head = [*COLUMNS, "worst − constant's", "worst − sheared's", "average − dro's"]
        lines += ["", f"## {part}: {TITLES.get(part, 'one setting of the full method at a time')}", ""]
        lines += [f"| schedule | seeds | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
        for label, row in rows.items():
            cells = [spread(row[c]) for c in COLUMNS]
            for key, other in (("worst", "constant"), ("worst", "sheared"), ("average", "dro")):
                pair = row[f"{key} degradation"].get(f"minus {other}")
                sign = "+" if pair and pair["mean"] > 0 else ""
                cells.append(f"{sign}{three(pair['mean'])} (p {pair['p']:.2g}, {pair['lower in']})" if pair else "")
            lines.append(f"| {label} | {len(row['seeds'])} | {' | '.join(cells)} |")
        if answers := answers_table(rows):
            lines += ["", "True continuations, %:", "", answers]
    return "\n".join(lines[1:])


def figures(summary: dict) -> None:
    """compare.png, of the parts in which each schedule prunes; one_pruned_model.png, of the others; ablation.png."""
    import matplotlib

    drawn = {
        part: {s: summary[part][s] for s in reversed(SCHEDULES) if s in summary[part] and s != "constant"}
        for part in TITLES
        if "constant" in summary.get(part, {})
    }
    with matplotlib.rc_context(STYLE):
        for name, given in (("compare", False), ("one_pruned_model", True)):
            rows = {part: labels for part, labels in drawn.items() if labels and bool(PARTS[part].pruned) == given}
            if rows:
                draw_gains(summary, rows).savefig(DOCS / f"{name}.png")
        if "ablation" in summary:
            draw_ablations(summary).savefig(DOCS / "ablation.png")


def draw_gains(summary: dict, rows: dict):
    """What each schedule wins on `constant`, seed by seed: a row of two panels per part. rows: part -> label -> row."""
    sizes = [len(labels) + 2 for labels in rows.values()]
    fig, axes = new_figure(len(rows), 2, height=0.45 * sum(sizes), height_ratios=sizes)
    for line, (part, labels) in zip(axes, rows.items()):
        base = summary[part]["constant"]
        for ax, key in zip(line, ("worst degradation", "average degradation")):
            start = dict(zip(base["seeds"], base[key]["values"]))
            for y, (label, row) in enumerate(labels.items()):
                won = [v - start[s] for s, v in zip(row["seeds"], row[key]["values"]) if s in start]
                color = COLORS[1] if label.startswith("full") else COLORS[0]
                ax.plot(won, [y] * len(won), "o", color=color, alpha=0.4, markersize=6)
                ax.plot(np.mean(won), y, "|", color=color, markersize=16, markeredgewidth=4)
            ax.axvline(0, color="black", linewidth=1)
            ax.set_yticks(range(len(labels)), labels if ax is line[0] else [], fontsize=12)
            ax.set_ylim(-0.6, len(labels) - 0.4)
            ax.tick_params(axis="x", labelsize=11)
            ax.set_title(f"{TITLES[part]}: {key.split()[0]}", fontsize=13)
            ax.locator_params(axis="x", nbins=6)
            ax.grid(axis="x", color="#e4e4e4")
    for ax in axes[-1]:
        ax.set_xlabel("degradation less that of `constant` (nats per token)", fontsize=12)
    return fig


def draw_ablations(summary: dict):
    """Both degradations over each setting of the full method; the default is `recovery`'s."""
    fig, axes = new_figure(1, len(ABLATIONS), height=4.5, sharey=True)
    base, default = summary.get("recovery", {}).get("full"), load(Settings, ["config/toy_continue.py", *FULL])
    for ax, (key, values) in zip(axes[0], ABLATIONS.items()):
        points = {v: summary["ablation"].get(f"{key} {v}") for v in values}
        points = {v: row for v, row in points.items() if row} | ({getattr(default, key): base} if base else {})
        xs = sorted(points)
        for i, c in enumerate(("worst degradation", "average degradation")):
            ys = [points[x][c]["values"][0] for x in xs]
            ax.plot(range(len(xs)), ys, "os"[i] + "-", color=COLORS[i], label=c)
        ax.set_xticks(range(len(xs)), map(str, xs), fontsize=10)
        ax.set_title(key, fontsize=13)
    axes[0][0].set_ylabel("degradation (nats per token)", fontsize=12)
    fig.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=12)
    return fig


def main():
    global OUT, DOCS
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="at most")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--schedules", nargs="+", choices=SCHEDULES, default=list(SCHEDULES))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    parser.add_argument("--scale", type=float, default=1.0, help="of the number of steps, to try it out")
    parser.add_argument(
        "--data", metavar="DIR", help="another data set, as prepare_data.py makes it, instead of the parts"
    )
    parser.add_argument("--ratio", default="{}", help="its mixture while pruning and after; default: as it is")
    parser.add_argument("--docs", metavar="DIR", help="where the report goes")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--keep",
        action="store_true",
        help="what results.json has: of the --parts, it is not run again but compared with; other parts as they are",
    )
    os.chdir(ROOT)
    with user_errors():
        args = parser.parse_args()
        if args.seeds < 1 or args.jobs < 1 or not 0 < args.scale < float("inf"):
            raise ValueError("--seeds, --jobs and --scale must be above 0")
        if args.data:
            given = load(Settings, ["config/toy_prune.py", f"--data={args.data}", f"--ratio={args.ratio}"])
            domains = TokenData(given.data).domains
            if given.ratio and given.ratio.keys() != set(domains):
                raise ValueError(f"--ratio needs a share of each domain: {', '.join(domains)}")
            PARTS.clear()
            PARTS["mine"] = Part(FOUR, args.seeds, given.ratio or None, data=given.data)
            of = json.dumps([TokenData(given.data).digest, given.ratio])  # other text or shares: another folder
            args.parts, OUT = ["mine"], OUT.with_name(f"compare_{Path(given.data).name}_{zlib.crc32(of.encode()):08x}")
        if args.scale != 1:
            OUT = OUT.with_name(f"{OUT.name}_{args.scale:g}")
        if args.data or args.scale != 1:
            DOCS = OUT
        DOCS = Path(args.docs or DOCS)
        kept = DOCS / "results.json"
        before = json.loads(kept.read_text()) if args.keep and kept.exists() else {}
        before.pop("command", None)
        if not args.report:
            run_all(args, published(before))
        chains = plan(args.parts if args.keep else list(PARTS), 99, list(SCHEDULES))
        if not any(chain.result.exists() for chain in chains):
            raise ValueError(f"nothing in {OUT} is done yet")
        summary = before | rounded(report(chains, before))
        summary = {part: summary[part] for part in PARTS if part in summary}
    DOCS.mkdir(parents=True, exist_ok=True)
    results = {"command": "python experiments/compare.py", **summary}
    text = re.sub(r"\n {4,}|\n {3}(?=[}\]])", " ", json.dumps(results, indent=1))  # a line per measure
    (DOCS / "results.json").write_text(text + "\n")
    (DOCS / "tables.md").write_text(f"{TABLES}\n{tables(summary)}\n")
    print(overview(summary))
    figures(summary)
    print(f"{DOCS}: results.json, tables.md and figures")


def run_all(args, known: dict) -> None:
    """Everything that is asked for, not done and not known, `args.jobs` at a time. The first failure stops it."""
    OUT.mkdir(parents=True, exist_ok=True)
    if "data/demo" in (PARTS[part].data for part in args.parts) and not Path("data/demo/meta.json").exists():
        call("prepare_data.py", "installed", "--out", "data/demo", "--held_out", "0.1")
    for part in list(args.parts):
        if not Path(PARTS[part].data, "meta.json").exists():
            print(f"{part} is left out: no {PARTS[part].data}, see experiments/languages.py")
            args.parts.remove(part)
    chains = plan(args.parts, args.seeds, args.schedules)
    chains = [c for c in chains if (c.part, c.label, c.seed) not in known]
    todo = {}
    for chain in (x for c in chains for x in (*c.needs, c) if not x.result.exists()):
        todo.setdefault(chain.path, chain)  # each once: `constant` is in two parts
    todo = list(todo.values())
    started, done, lock = time.time(), [], threading.Lock()

    def work(chain: Chain, *needs) -> None:
        for need in needs:
            need.result()
        run(chain, args.scale)
        with lock:
            done.append(chain)
            left = (time.time() - started) / len(done) * (len(todo) - len(done))
            print(f"{len(done)}/{len(todo)}: {chain.path}, {left / 3600:.1f} h left", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:  # what waits for another comes after it, so the pool cannot lock up
        sources = {c.source: c for c in todo}
        sources = {s: pool.submit(train_source, s, c.seed, PARTS[c.part].data, args.scale) for s, c in sources.items()}
        futures = {}
        for c in todo:
            futures[c] = pool.submit(work, c, sources[c.source], *(futures[b] for b in c.needs if b in futures))
        try:
            for future in as_completed([*sources.values(), *futures.values()]):
                future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
