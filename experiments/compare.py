"""Is the claim true? Schedules against each other: one pruned model, equal tokens, several seeds, one test split.

    python experiments/compare.py toy                  # a case, in order of importance; what is done is skipped
    python experiments/compare.py toy --seeds 2 --schedules constant sheared "--schedule=dro --rho=1"
    python experiments/compare.py --report             # tables and the figure of all that is done
    python experiments/compare.py toy --data data/mine --ratio "{'code': .8, 'prose': .1, 'mail': .1}"

In each seed a source model is trained and pruned, both at the mixture of the text; the seed is that of the source and
of the data order. (SmolLM2 is there, see docs/smollm2.md, and is pruned at the paper's mixture.) Then every schedule
trains the pruned model on, for as many tokens, from the same references: the source's validation losses.
docs/comparison.md says what the schedules are. Settings in the place of one stand on those of `dro`.

Mixtures: `skewed` gives 78 % to one domain; `own` is the source's. `skewed, pruning too` and `own, pruning too` start
from the source instead, and prune under each schedule. Others have a third of the steps, or three times as many.
Degradation is the loss above that of the source. Some models are asked the two-choice questions of
plumbing/continuation.py, too. Results and the figure go to docs/compare/ (with --data: to out/compare/NAME_NUMBER).
"""

import itertools
import json
import os
import re
import zlib
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib
import numpy as np
from runs import ON_GPU, ROOT, demo_text, each, judged, test_losses, train
from scipy import stats

from plot import COLORS, STYLE, new_figure, read_metrics
from plumbing.command_line import Parser, load, number, user_errors
from plumbing.continuation import make_or_read
from plumbing.data import TokenData
from plumbing.output import write_whole
from plumbing.tokenizer import load_tokenizer
from train import Settings

OUT, DOCS = Path("out/compare"), Path("docs/compare")
PAPER = {"rho": 0.1, "temperature": 0, "delta": 0.1, "bound": 2, "dynamic_reference": False, "dynamic_ratio": False}
ROOM = {"schedule": "dro", "rho": 1, "temperature": 0.2, "delta": 0.5, "bound": 16, "dynamic_ratio": True}
SCHEDULES = {  # what differs from PAPER
    "constant": {"schedule": "constant"},
    "sheared": {"schedule": "sheared"},  # Sheared LLaMA's
    "sheared, step 2": {"schedule": "sheared", "step_size": 2},
    "paper": {"schedule": "dro", "dynamic_reference": True, "dynamic_ratio": True},  # DRPruning, the paper's settings
    "even": ROOM,  # the default of `--schedule dro`: room for the ratio, fixed references
    "low": ROOM | {"dynamic_reference": True},
    "dro": {"schedule": "dro"},  # robust weights, fixed references and ratio
    "dro + reference": {"schedule": "dro", "dynamic_reference": True},
    "dro + ratio": {"schedule": "dro", "dynamic_ratio": True},
    "uniform": {"schedule": "constant"},  # with equal shares
}
LENGTHS = {"a third as long": 1 / 3, "three times as long": 3}  # of the runs from the pruned model
WAYS = ["", *(f", {way}" for way in [*LENGTHS, "pruning too"])]  # a table each
MIXTURES = [mixture + way for way in WAYS for mixture in ("skewed", "own")]
ANSWERS = {"right answers": "accuracy", "their error": "standard_error"}
OF_THE_CASE = {"out", "seed", "threads", "data", "init_from", "reference_model", "ratio"}
SHARES = [0.78, 0.10, 0.04, 0.03, 0.02, 0.02, 0.01]
PRETRAIN = {"steps": 1200, "warmup": 120}  # longer than the demo's
PRUNE = {"steps": 700, "warmup": 41, "eval_interval": 25}


@dataclass(frozen=True)
class Case:
    """A scale or a text at which schedules are compared. Its settings of a stage: what differs from the config."""

    name: str
    seeds: int
    skew: dict[str, float]
    mixtures: tuple[str, ...] = ("skewed", "own")
    data: str = "data/demo"
    source: str = ""  # a model directory; empty: config/toy_pretrain.py trains one
    pruning: str = "config/toy_prune.py"
    config: str = "config/toy_continue.py"
    pretrain: dict = field(default_factory=PRETRAIN.copy)
    prune: dict = field(default_factory=PRUNE.copy)
    train_on: dict = field(default_factory=dict)
    sequences: int = 128  # of each domain, of the test split
    asked: tuple[str, ...] = ("constant", "sheared", "paper", "even")  # two-choice questions, at the plain mixtures

    def at(self, seed: int, *names: str) -> Path:
        """A place of a seed: its source, or the run of a mixture and a schedule."""
        return OUT.joinpath(self.name, str(seed), *(re.sub("[^a-z0-9.]+", "_", name).strip("_") for name in names))

    def source_of(self, seed: int) -> Path:
        """The source model of a seed."""
        return Path(self.source or self.at(seed, "source"))

    def losses(self, seed: int, *names: str) -> dict[str, float]:
        """The test loss of each domain, of a run or, without names, of the source."""
        model, file = (self.at(seed, *names), "eval.json") if names else (self.source_of(seed), "source.json")
        return test_losses(model, self.at(seed, *names) / file, self.data, self.sequences)

    def answers(self, seed: int, *names: str) -> dict:
        """What a run answers to two-choice questions, by domain."""
        return judged(self.at(seed, *names), self.at(seed, *names) / "answers.json", self.data, "--continuation")


DEMO = dict(zip(["cpp", "python", "docstrings", "comments", "formulas", "manuals", "stubs"], SHARES))
LANGUAGES = dict(zip(["en", "de", "fr", "ru", "ja", "zh", "ar"], SHARES))
LARGER = {"n_layer": 8, "d_model": 256, "n_head": 8, "d_ffn": 688}
ITS_TARGET = {"target_n_layer": 6, "target_d_model": 192, "target_n_head": 6, "target_d_ffn": 512}
SMOLLM2 = {
    "data": "data/smollm2",
    "source": "SmolLM2-135M",
    "pruning": "config/prune_smollm2.py",
    "config": "config/continue_smollm2.py",
    "prune": PRUNE | PAPER | SCHEDULES["paper"] | ON_GPU,  # as docs/pruning.md's `activation, at one stroke`
    "train_on": ON_GPU,
    "sequences": 64,
}
TWICE = {stage: SMOLLM2[stage] | {"batch_size": 8, "eval_sequences": 16} for stage in ("prune", "train_on")}
CASES = {
    "toy": Case("toy", 5, DEMO, tuple(MIXTURES)),
    "middle": Case("middle", 3, DEMO, pretrain=PRETRAIN | LARGER, prune=PRUNE | ITS_TARGET),
    "smollm2": Case("smollm2", 3, DEMO, **SMOLLM2 | TWICE),
    "smollm2_short": Case("smollm2_short", 1, DEMO, **SMOLLM2),  # half of the tokens
    "languages": Case("languages", 3, LANGUAGES, data="data/languages"),
}


def prepare(case: Case, seed: int) -> None:
    """The source model of a seed, with its test losses, and the pruned model."""
    source = case.source_of(seed)
    if not case.source:
        train(source, seed, "config/toy_pretrain.py", data=case.data, **case.pretrain)
    start = {"data": case.data, "init_from": source, "reference_model": source, "schedule": "constant"}
    train(case.at(seed, "pruned"), seed, case.pruning, **start | case.prune)
    case.losses(seed)


def judge(case: Case, seed: int, mixture: str, schedule: str) -> None:
    """The run of a schedule, with its test losses and answers."""
    settings = PAPER | settings_of(schedule) | {"data": case.data, "reference_model": case.source_of(seed)}
    start, _, way = mixture.partition(", ")
    if way == "pruning too":
        config, settings = case.pruning, case.prune | settings | {"init_from": case.source_of(seed)}
    else:
        config, settings = case.config, settings | case.train_on | {"init_from": case.at(seed, "pruned")}
    if way in LENGTHS:
        usual = load(Settings, [config])
        settings["steps"] = steps = round(LENGTHS[way] * usual.steps)
        settings["eval_interval"] = min(usual.eval_interval, steps // 25)  # a short run has 25 evaluations, too
    ratio = dict.fromkeys(case.skew, 1) if schedule == "uniform" else {} if start == "own" else case.skew
    train(case.at(seed, mixture, schedule), seed, config, **settings, ratio=ratio)
    case.losses(seed, mixture, schedule)
    if schedule in case.asked and not way:
        case.answers(seed, mixture, schedule)


def settings_of(schedule: str) -> dict:
    """The settings of a schedule by its name, or those that stand in its place: "--schedule=dro --rho=1"."""
    if schedule in SCHEDULES:
        return SCHEDULES[schedule]
    if wrong := [word for word in schedule.split() if not re.fullmatch(r"--\w+=.+", word)]:
        raise ValueError(f"--schedules: '{wrong[0]}' is neither the name of a schedule nor --setting=value")
    settings = dict(word.removeprefix("--").split("=", 1) for word in schedule.split())
    if of_the_case := OF_THE_CASE & settings.keys():
        raise ValueError(f"--schedules: {', '.join(sorted(of_the_case))} is set for all schedules alike")
    return settings


def run_all(case: Case, seeds: range, mixtures: list[str], schedules: list[str], jobs: int) -> None:
    """Everything that is asked for and not done, some at a time. The first failure stops it."""
    demo_text(case.data)
    each(prepare, [(case, seed) for seed in seeds], jobs)
    each(judge, list(itertools.product([case], seeds, mixtures, schedules)), jobs)


# -- what came of it ------------------------------------------------------------------------------------------------


def measures(case: Case, seed: int, mixture: str, schedule: str) -> dict:
    """Everything that a run is judged by: degradation in nats per token, shares of the tokens, right answers."""
    source, loss, out = case.losses(seed), case.losses(seed, mixture, schedule), case.at(seed, mixture, schedule)
    drawn = read_metrics(out).evals[-1]["domain_tokens"]
    worse = {d: loss[d] - source[d] for d in source}
    found = {
        "average": np.mean([*worse.values()]),
        "worst": max(worse.values()),
        "degradation": worse,
        "share of the tokens": {d: n / sum(drawn.values()) for d, n in drawn.items()},
    }
    if (out / "answers.json").exists():
        answers = case.answers(seed, mixture, schedule)
        rows = answers["domains"] | {"average": answers["average"]}
        for what, key in ANSWERS.items():
            found[what] = {d: row[key] for d, row in rows.items()}
    return json.loads(json.dumps(found), parse_float=lambda text: round(float(text), 5))


def collect(case: Case, schedules: list[str]) -> dict:
    """Of all that is done in a case: mixture -> schedule -> seed -> measure -> value."""
    results, ready = {}, sorted(int(file.parent.name) for file in (OUT / case.name).glob("*/source.json"))
    for mixture, schedule, seed in itertools.product(MIXTURES, schedules, ready):
        if (case.at(seed, mixture, schedule) / "eval.json").exists():
            runs = results.setdefault(mixture, {}).setdefault(schedule, {})
            runs[str(seed)] = measures(case, seed, mixture, schedule)
    return results


def paired(runs: dict, others: dict, key: str) -> np.ndarray:
    """A measure minus that of another schedule, for each seed that both have."""
    return np.array([run[key] - others[seed][key] for seed, run in runs.items() if seed in others])


def three(x: float) -> str:
    """Three digits after the point, and no zero before it."""
    return re.sub(r"^(-?)0\.", r"\1.", f"{round(x, 3) + 0.0:.3f}").replace("-", "−")


def table(results: dict) -> str:
    """Markdown: mean ± standard deviation over seeds. Bold: lower than `sheared` in every seed. *Minus `sheared`*: the
    mean differences over the seeds that both have, with the p of a paired t-test."""
    heads = [f"{m}: {key}" for m in results for key in ("average", "worst domain", "minus `sheared`")]
    lines = [f"| schedule | {' | '.join(heads)} | seeds |", "|---" * (len(heads) + 2) + "|"]
    for schedule in dict.fromkeys(s for rows in results.values() for s in rows):
        cells, seeds = [], []
        for rows in results.values():
            if (runs := rows.get(schedule)) is None:
                cells += [""] * 3
                continue
            seeds.append(len(runs))
            differences = []
            for key in ("average", "worst"):
                values = [run[key] for run in runs.values()]
                text = three(np.mean(values)) + (f" ± {three(np.std(values, ddof=1))}" if len(runs) > 1 else "")
                both = paired(runs, rows.get("sheared", {}), key) if schedule != "sheared" else []
                cells.append(f"**{text}**" if len(both) and max(both) < 0 else text)
                if len(both):
                    p = f" (p {stats.ttest_1samp(both, 0).pvalue:.1g})" if len(both) > 1 else ""
                    differences.append(three(np.mean(both)) + p)
            cells.append(" / ".join(differences))
        lines.append(f"| {schedule} | {' | '.join(cells)} | {', '.join(map(str, dict.fromkeys(seeds)))} |")
    return "\n".join(lines)


def tables(results: dict) -> list[str]:
    """A table for each of WAYS."""
    parts = [{m: results[m] for m in ("skewed" + way, "own" + way) if m in results} for way in WAYS]
    return [table(part) for part in parts if part]


def answers_table(rows: dict) -> str:
    """Markdown: right answers to two-choice questions in %, mean over seeds ± the standard error of one model."""
    lines = []
    for schedule, runs in rows.items():
        if asked := [run for run in runs.values() if "right answers" in run]:
            keys = asked[0]["right answers"]
            means = [[100 * np.mean([run[what][key] for run in asked]) for what in ANSWERS] for key in keys]
            cells = [f"{right:.1f} ± {error:.1f}" for right, error in means]
            lines = lines or [f"| | {' | '.join(keys)} |", "|---" * (len(keys) + 1) + "|"]
            lines.append(f"| {schedule} | {' | '.join(cells)} |")
    return "\n".join(lines)


@matplotlib.rc_context(STYLE)
def figure(panels: dict):
    """What each schedule wins on `constant` in each case and mixture, seed by seed."""
    sizes = [len(rows) + 1 for rows in panels.values()]
    fig, axes = new_figure(len(panels), 2, height=0.42 * sum(sizes) + 1, height_ratios=sizes)
    for line, ((name, mixture), rows) in zip(axes, panels.items()):
        others = [s for s in reversed(SCHEDULES) if s in rows and s != "constant"]
        for ax, key in zip(line, ("worst", "average")):
            for y, schedule in enumerate(others):
                won, color = paired(rows[schedule], rows["constant"], key), COLORS[schedule in ("paper", "even", "low")]
                ax.plot(won, [y] * len(won), "o", color=color, alpha=0.4, markersize=6)
                ax.plot(won.mean(), y, "|", color=color, markersize=16, markeredgewidth=4)
            ax.axvline(0, color="black", linewidth=1)
            ax.set_yticks(range(len(others)), others if ax is line[0] else [], fontsize=12)
            ax.set_ylim(-0.6, len(others) - 0.4)
            ax.locator_params(axis="x", nbins=6)
            ax.set_title(f"{name}, {mixture}: {key}", fontsize=13)
            ax.grid(axis="x", color="#e4e4e4")
    fig.supxlabel("degradation minus that of `constant` (nats per token)", fontsize=12)
    return fig


def merge(before: dict, found: dict) -> dict:
    """The results of two places. At a mixture, a seed has the runs of the place where more schedules of it are done, or
    the later ones: only runs of one place are pairs."""
    merged = {}
    for case, mixture in itertools.product(CASES, MIXTURES):
        places = [place.get(case, {}).get(mixture, {}) for place in (before, found)]
        for seed in sorted({seed for rows in places for runs in rows.values() for seed in runs}, key=int):
            old, new = ({schedule: runs[seed] for schedule, runs in rows.items() if seed in runs} for rows in places)
            for schedule, run in (new if len(new) >= len(old) else old).items():
                merged.setdefault(case, {}).setdefault(mixture, {}).setdefault(schedule, {})[seed] = run
    return merged


def report(schedules: list[str]) -> None:
    """Print the tables of what is done here, and put it into results.json and compare.png (see `merge`)."""
    schedules = [*dict.fromkeys([*SCHEDULES, *schedules])]  # all, or `merge` would not know the place of a seed
    found = {name: rows for name, case in CASES.items() if (rows := collect(case, schedules))}
    if not found:
        raise ValueError(f"nothing in {OUT} is done yet")
    for name, mixtures in found.items():
        answers = [f"Right answers, %, {m}:\n\n{text}" for m, rows in mixtures.items() if (text := answers_table(rows))]
        print(f"## {name}", *tables(mixtures), *answers, sep="\n\n", end="\n\n")
    file, command = DOCS / "results.json", {"command": "python experiments/compare.py --report"}
    results = merge(json.loads(file.read_text()) if file.exists() else {}, found)
    DOCS.mkdir(parents=True, exist_ok=True)
    text = re.sub(r"\n {5,}|\n {4}(?=[}\]])", " ", json.dumps(command | results, indent=1))  # a line per run
    write_whole(file, text + "\n")
    shown = itertools.product(results, ("skewed", "own"))
    if panels := {(c, m): results[c][m] for c, m in shown if "constant" in results[c].get(m, {})}:
        figure(panels).savefig(DOCS / "compare.png")


def main():
    global OUT, DOCS
    parser = Parser(__doc__)
    parser.add_argument("case", nargs="?", choices=CASES)
    parser.add_argument("--seeds", type=int, nargs="+", help="how many, or the first and the last; default: the case's")
    parser.add_argument("--mixtures", nargs="+", choices=MIXTURES, help="default: the case's")
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), help="names, or several settings in a word")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time, one thread each")
    parser.add_argument("--data", metavar="DIR", help="another data set, as prepare_data.py makes it")
    parser.add_argument("--ratio", default="{}", help="its skewed mixture")
    parser.add_argument("--report", action="store_true", help="run nothing")
    os.chdir(ROOT)
    with user_errors():
        args = parser.parse_args()
        case = CASES.get(args.case)
        if not case and (args.data or not args.report):
            raise ValueError(f"which case? One of {', '.join(CASES)}, or --report")
        seeds = args.seeds or [case.seeds if case else 1]
        first, last = seeds if len(seeds) == 2 else (0, seeds[0] - 1)
        if len(seeds) > 2 or not 0 <= first <= last:
            raise ValueError("--seeds takes how many, above 0, or the first and the last")
        if args.ratio != parser.get_default("ratio") and not args.data:
            raise ValueError("--ratio needs --data")
        for schedule in args.schedules:
            load(Settings, [CASES["toy"].config, *(f"--{k}={v}" for k, v in settings_of(schedule).items())])
        if args.data:
            given = load(Settings, [case.config, f"--data={args.data}", f"--ratio={args.ratio}"])
            text = TokenData(given.data)
            if given.ratio.keys() != set(text.domains):
                raise ValueError(f"--ratio needs a share of each domain: {', '.join(text.domains)}")
            case = CASES[case.name] = replace(case, data=given.data, skew=given.ratio)
            try:  # as eval.py will
                make_or_read(text, load_tokenizer(text.tokenizer), "test", 200, 0, None)
            except ValueError as error:
                print(f"no model is asked two-choice questions: {error}")
                case = CASES[case.name] = replace(case, asked=())
            known_by = zlib.crc32(f"{text.digest} {sorted(given.ratio.items())}".encode())
            OUT = DOCS = OUT / f"{Path(given.data).name}_{known_by:08x}"  # another text or ratio has other runs
        if not args.report:
            run_all(case, range(first, last + 1), args.mixtures or case.mixtures, args.schedules, args.jobs)
        report(args.schedules)


if __name__ == "__main__":
    main()
