"""Where will the loss end? Laws that predict it, tried on real loss histories at 25, 50 and 75 % of a run.

    python experiments/laws.py record --jobs 2      # constant runs of both stages, measured in more ways
    python experiments/laws.py                      # every law on every history: docs/laws/laws.json and a table

Needs the source models of `experiments/compare.py toy`. `record` prunes with learned gates and trains on, seed 0 at the
skewed mixture and seed 1 at the source's own. At each evaluation it writes down the loss of each validation window for
the weights as they are and for an exponential moving average of them (over 5 % of the run). The other histories are
those of `constant` and `paper` that experiments/compare.py has left. Every law is told how many tokens of each domain
the run will have seen at its end: what is judged is the law, not the guess of the mixture.
"""

import itertools
import json
import os
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from scipy.optimize import minimize, nnls
from scipy.special import huber, logsumexp

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from compare import CASES, PAPER  # noqa: E402
from runs import call, each  # noqa: E402

from plumbing.command_line import Parser, number, user_errors  # noqa: E402
from plumbing.metrics import read_metrics  # noqa: E402
from plumbing.output import write_whole  # noqa: E402
from scaling_law import FitError, fit_together  # noqa: E402
from train import lr_scale  # noqa: E402

OUT, COMPARE = Path("out/laws"), Path("out/compare")
STAGES = {"prune": "config/toy_gates.py", "continue": "config/toy_continue.py"}
SHARES = (0.25, 0.5, 0.75)
ANNEALING_MEMORY = 0.99
HORIZONS = {"ema": 0.05}  # of the moving averages of the weights, in shares of the run
WINDOWS = 32  # validation windows per domain


def watch(name: str, *command: str) -> None:
    """Run train.py, and write a history as well: out/laws/<name>.jsonl, a line per evaluation."""
    import torch

    import train

    class Watched(train.Trainer):
        def __init__(self, s, model, *args):
            super().__init__(s, model, *args)
            self.averages = {key: [p.detach().clone() for p in model.parameters()] for key in HORIZONS}
            self.updates = 0
            self.optimizer.register_step_post_hook(lambda *_: self.average())

        def average(self):
            self.updates += 1
            for key, share in HORIZONS.items():
                memory = min(self.updates, max(1, share * self.s.steps))
                now = [p.detach() for p in self.model.parameters()]
                torch._foreach_lerp_(self.averages[key], now, 1 / memory)

        def evaluate(self, log, step):
            super().evaluate(log, step)
            z = self.masks.evaluated(step) if self.masks else None
            params, found = list(self.model.parameters()), {}
            weights = [p.detach().clone() for p in params]
            for key in ["weights", *HORIZONS]:
                for p, value in zip(params, self.averages.get(key, weights)):
                    p.data.copy_(value)
                found[key] = windows(self.model, self.reader.data, self.s.seq_len, z)
            for p, value in zip(params, weights):
                p.data.copy_(value)
            with open(OUT / f"{name}.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **found}) + "\n")

    @torch.no_grad()
    def windows(model, data, seq_len, z):
        losses = {}
        for domain in data.domains:
            numbers = data.eval_numbers(domain, "val", seq_len, WINDOWS)
            tokens = torch.from_numpy(data.read(domain, "val", seq_len, numbers))
            nll = torch.cat([model(x[:, :-1], z, targets=x[:, 1:]) for x in tokens.split(8)])
            counts = torch.from_numpy(data.continues("val", seq_len, numbers))
            losses[domain] = nll.where(counts, torch.nan).nanmean(1).tolist()
        return losses

    train.Trainer = Watched
    sys.argv = ["train.py", *command]
    train.main()


def record(mixture: str, seed: int) -> None:
    """One prune and one continue run under `constant`."""
    source = before = CASES["toy"].source_of(seed)
    for stage, config in STAGES.items():
        name = f"{stage}_{mixture}_{seed}"
        if not (OUT / name / "model").exists():
            settings = PAPER | {"schedule": "constant", "ratio": CASES["toy"].skew if mixture == "skewed" else {}}
            settings |= {"init_from": before, "reference_model": source, "seed": seed, "out": OUT / name}
            command = [config, "--threads=1", "--resume=never", *(f"--{key}={x}" for key, x in settings.items())]
            OUT.mkdir(parents=True, exist_ok=True)
            (OUT / f"{name}.jsonl").unlink(missing_ok=True)
            shutil.rmtree(OUT / name, ignore_errors=True)  # the averages are in no checkpoint: from the start again
            call("experiments/laws.py", "watch", name, *command)
        before = OUT / name


# -- histories ------------------------------------------------------------------------------------------------------


@dataclass
class History:
    """The losses of a run: n evaluations of d domains, and where they ended."""

    stage: str
    progress: np.ndarray  # (n,) shares of the run
    losses: np.ndarray  # (n, d) nats per token
    tokens: np.ndarray  # (n, d) of the domain seen
    params: np.ndarray  # (n,)
    rate: np.ndarray  # (n,) learning rate, of the peak
    area: np.ndarray  # (n,) sum of learning rates so far, of the run's: S1 of arXiv 2408.11029
    annealed: np.ndarray  # (n,) S2 of arXiv 2408.11029, of the run's
    plain: np.ndarray  # (n, d) losses of the weights as they are, by the same windows as `final`
    final: np.ndarray  # (d,) of these at the end
    before: "History | None" = None  # of the stage before

    def until(self, share: float) -> "History":
        """What is known at this share of the run."""
        rows = (self.progress >= 0.02) & (self.progress <= share + 1e-9)
        known = {k: getattr(self, k)[rows] for k in "progress losses tokens params rate area annealed plain".split()}
        return replace(self, **known)


def history(path: Path) -> History:
    """Read a run."""
    run, config = read_metrics(path), json.loads((path / "config.json").read_text())
    s = SimpleNamespace(**config)
    rates = np.array([lr_scale(step, s) for step in range(s.steps)])
    drops, momentum, annealed = np.maximum(0, rates[:-1] - rates[1:]), 0.0, [0.0]
    for drop in drops:
        momentum = ANNEALING_MEMORY * momentum + drop
        annealed.append(annealed[-1] + momentum)
    domains, evals = run.info["domains"], run.evals
    at = np.array([e["step"] for e in evals])
    logged = np.array([[e["loss"][d] for d in domains] for e in evals])
    cut = lambda total: np.concatenate([[0], np.cumsum(total)])[at] / np.sum(total)  # noqa: E731
    return History(
        run.info["stage"], at / s.steps, logged,
        np.array([[e["domain_tokens"][d] for d in domains] for e in evals], float),
        np.array([e["parameters"] for e in evals], float), rates[np.maximum(at - 1, 0)], cut(rates),
        np.array(annealed)[np.maximum(at - 1, 0)] / annealed[-1], logged, logged[-1],
    )  # fmt: skip


# -- laws: a history until now -> predicted final loss of each domain, (d,) -----------------------------------------


def published(h: History, end: History) -> np.ndarray:
    """Eq. 4 as the published code fits it: unscaled tokens, L-BFGS from 36 starts, Huber loss of log loss."""
    found = []
    for i in range(h.losses.shape[1]):
        on = h.tokens[:, i] > 0
        t, p, y = np.log(h.tokens[on, i]), np.log(h.params[on]), np.log(h.losses[on, i])

        def parts(x, t, p):
            return np.stack([x[0] - x[1] * p - x[2] * t, np.full_like(t, x[3])])

        def cost(x, t=t, p=p, y=y):
            return huber(1e-3, logsumexp(parts(x, t, p), axis=0) - y).sum()

        starts = itertools.product((0.0, 5.0, 10.0), (0.0, 0.5), (0.0, 0.5, 1.0), (-1.0, 0.5))
        best = min((minimize(cost, x0, method="L-BFGS-B") for x0 in starts), key=lambda r: r.fun)
        found.append(np.exp(logsumexp(parts(best.x, np.log(end.tokens[-1:, i]), np.log(end.params[-1:])))))
    return np.array(found)


def fitted(one_by_one=False, rates=False, area=False, carried=False):
    """A law as scaling_law.py fits it; the best loss so far where it cannot.

    one_by_one: each domain alone; rates: with the term of the learning rate; area: by the sum of learning rates (S1)
    in place of tokens; carried: exponents and B from the stage before, A and E from this one.
    """

    def law(h: History, end: History) -> np.ndarray:
        tokens = np.repeat(h.area[:, None], h.losses.shape[1], 1) if area else h.tokens
        tokens_end = np.ones(h.losses.shape[1]) if area else end.tokens[-1]
        rate = h.rate if rates else None
        if carried and h.before is not None:
            return carry_over(h, end)
        if one_by_one:
            laws = [fit_together(t[:, None], y[:, None], h.params, rate)[0] for t, y in zip(tokens.T, h.losses.T)]
        else:
            laws = fit_together(tokens, h.losses, h.params, rate)
        return np.array(
            [
                h.losses[:, i].min() if isinstance(law, FitError) else law.predict(t, end.params[-1], end.rate[-1])
                for i, (law, t) in enumerate(zip(laws, tokens_end))
            ]
        )

    return law


def carry_over(h: History, end: History) -> np.ndarray:
    """Exponents and B as fitted to the whole stage before, A and E to this one."""
    laws = fit_together(h.before.tokens, h.before.losses, h.before.params, h.before.rate)
    old = next(law for law in laws if not isinstance(law, FitError))
    found = []
    for tokens, losses, tokens_end in zip(h.tokens.T, h.losses.T, end.tokens[-1]):
        on = tokens > 0
        power = (tokens[on] / tokens[-1]) ** -old.beta
        (A, E), _ = nnls(np.stack([power, np.ones_like(power)], 1), losses[on] - old.B * h.rate[on])
        found.append(A * (tokens_end / tokens[-1]) ** -old.beta + E + old.B * end.rate[-1])
    return np.array(found)


def schedule_aware(column, shared: bool):
    """E + A · (S1^-beta · P^-alpha + ratio · column): the best of a grid by least squares, for all domains or each."""

    def law(h: History, end: History) -> np.ndarray:
        d, costs, found = h.losses.shape[1], [], []
        for beta, alpha, ratio in itertools.product(EXPONENTS, ALPHAS if np.ptp(h.params) > 1 else [0.0], RATIOS):
            x = h.area**-beta * (h.params / end.params[-1]) ** -alpha + ratio * column(h, end)
            fits = [nnls(np.stack([np.ones_like(x), x], 1), y) for y in h.losses.T]
            costs.append([rest**2 for _, rest in fits])
            found.append([E + A * (1 + ratio * column(end, end)[-1]) for (E, A), _ in fits])
        costs, found = np.array(costs), np.array(found)
        best = np.full(d, costs.sum(1).argmin()) if shared else costs.argmin(0)
        return found[best, np.arange(d)]

    return law


EXPONENTS = np.geomspace(0.05, 3, 8)
RATIOS = np.array([0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.5, 5.0])
ALPHAS = np.array([0, 0.2, 0.4, 0.7, 1.0, 1.5])
LAWS = {
    "best so far": lambda h, end: h.losses.min(0),
    "eq. 4, as published": published,
    "eq. 4, scaled (law=paper)": fitted(one_by_one=True),
    "eq. 4, shared exponents": fitted(),
    "eq. 4 + B · rate, each alone": fitted(one_by_one=True, rates=True),
    "eq. 4 + B · rate, together (law=rate)": fitted(rates=True),
    "the same, by S1 instead of tokens": fitted(rates=True, area=True),
    "the same, carried over": fitted(rates=True, carried=True),
    "B proportional to A": schedule_aware(lambda h, end: h.rate, shared=True),
    "L0 + A · S1^-alpha - C · S2, each": schedule_aware(lambda h, end: 1 - h.annealed, shared=False),
    "L0 + A · S1^-alpha - C · S2, shared": schedule_aware(lambda h, end: 1 - h.annealed, shared=True),
}


def histories() -> list[tuple[str, History]]:
    """What there is: name of the group, history."""
    found = []
    for path in sorted(OUT.glob("*.jsonl")):
        if not (OUT / path.stem / "model").exists():
            continue  # that run is not finished
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        plain = np.array([list(row["weights"].values()) for row in rows]).mean(-1)
        stage = path.stem.split("_")[0]
        before = history(OUT / path.stem.replace("continue", "prune")).until(1) if stage == "continue" else None
        usual = replace(history(OUT / path.stem), before=before, plain=plain, final=plain[-1])
        for key in ["weights", *HORIZONS]:
            windows = np.array([list(row[key].values()) for row in rows])  # (n, d, windows)
            for n in (16, WINDOWS):
                found.append((f"{key}, {n} windows", replace(usual, losses=windows[..., :: WINDOWS // n].mean(-1))))
    pruned = {}
    runs = itertools.product(("skewed", "own"), ("constant", "paper"))
    for path in sorted(p for names in runs for p in COMPARE.glob(f"toy/*/{'/'.join(names)}/eval.json")):
        name, seed, mixture, _ = path.parent.relative_to(COMPARE).parts
        if (name, seed) not in pruned:
            pruned[name, seed] = history(CASES[name].at(int(seed), "pruned"))
        run, before = history(path.parent), pruned[name, seed]
        found.append((f"{name}, {mixture}", replace(run, before=before.until(1) if run.stage == "continue" else None)))
    return [*found, *((f"{name}, pruned", before) for (name, _), before in pruned.items())]


def main():
    if sys.argv[1:2] == ["watch"]:  # a process of `record`
        return watch(*sys.argv[2:])
    parser = Parser(__doc__)
    parser.add_argument("what", nargs="?", choices=["record", "report"], default="report")
    parser.add_argument("--jobs", type=number(int, 1), default=2, help="runs at a time, one thread each")
    os.chdir(ROOT)
    with user_errors():
        args = parser.parse_args()
        if args.what == "report" and not (found := histories()):
            raise ValueError(f"no histories in {OUT} or {COMPARE}: run experiments/compare.py or `record` first")
        for source in map(CASES["toy"].source_of, (0, 1)):
            if args.what == "record" and not (source / "model").exists():
                raise ValueError(f"there is no {source} yet: run experiments/compare.py toy first")
        if args.what == "record":
            return each(record, [("skewed", 0), ("own", 1)], args.jobs)
    results = {"command": "python experiments/laws.py", "unit": "nats per token, means over runs and domains"}
    for group, stage in itertools.product(dict.fromkeys(g for g, _ in found), ("prune", "continue")):
        runs = [h for g, h in found if g == group and h.stage == stage]
        if not runs:
            continue
        known = {share: [h.until(share) for h in runs] for share in SHARES}
        left = {s: np.mean([np.abs(k.plain[-1] - h.final).mean() for k, h in zip(known[s], runs)]) for s in SHARES}
        print(f"\n{group}, {stage}, {len(runs)} runs: error (error of the differences between domains)")
        print(f"{'left to gain':40}" + "".join(f"{f'{left[s]:.3f} at {s:.0%}':>17}" for s in SHARES))
        rows = results.setdefault(group, {})[stage] = {"runs": len(runs), "left to gain": left, "laws": {}}
        for name, law in LAWS.items():
            row = rows["laws"][name] = {}
            for s in SHARES:
                error = np.array([law(k, h) - h.final for k, h in zip(known[s], runs)])
                differences = error - error.mean(1, keepdims=True)
                row[s] = {"error": np.abs(error).mean(), "of differences": np.abs(differences).mean()}
            cells = (f"{x['error']:.3f} ({x['of differences']:.3f})" for x in row.values())
            print(f"{name:40}" + "".join(f"{cell:>17}" for cell in cells), flush=True)
    write_whole(Path("docs/laws/laws.json"), json.dumps(rounded(results), indent=1))


def rounded(x):
    """The same with numbers to five digits after the point."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return round(x, 5) if isinstance(x, float) else x


if __name__ == "__main__":
    main()
