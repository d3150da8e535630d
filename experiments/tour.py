"""The figures of docs/tour.md, which shows the method in seven chapters; its quotes of the code; and its notebook.

    python experiments/tour.py           # after `make demo`: everything, in docs/tour/, docs/tour.md, docs/tour.ipynb
    python experiments/tour.py --text    # the quotes and the notebook alone, in a second

Each figure is one function. What it shows is computed by the functions that train, or was logged by a run of the demo.
Chapters 1 to 3 run config/toy_gates.py on small batches, to look at every gate after every step (`gated_run`).
"""

import ast
import copy
import io
import json
import re
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from dro import COLLECT_FROM, MORE_POINTS_THAN, PREDICT_FROM, chi2, dro_weights, update_ratio  # noqa: E402
from masks import HardConcrete, extract, kept_indices  # noqa: E402
from plot import COLORS, NAMES, RAW, STYLE, entry, label_ends, running_mean, styles  # noqa: E402
from plumbing import choices  # noqa: E402
from plumbing.command_line import Parser, load, user_errors  # noqa: E402
from plumbing.data import TokenData  # noqa: E402
from plumbing.metrics import read_metrics, series  # noqa: E402
from plumbing.settings import Settings  # noqa: E402
from scaling_law import ScalingLaw, fit_together  # noqa: E402

PAGE, NOTEBOOK, PICTURES = ROOT / "docs/tour.md", ROOT / "docs/tour.ipynb", ROOT / "docs/tour"
SOURCE, PRUNE, CONTINUE, CONSTANT = (ROOT / f"out/toy_{name}" for name in ("pretrain", "prune", "continue", "constant"))
BLUE, ORANGE, GREEN, YELLOW, PINK, SKY, BLACK = COLORS
LIKE = {"fontsize": 13, "color": "#333333"}
SIZES = dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 13)
LOOK = STYLE | SIZES | {"axes.titlesize": 13, "figure.titlesize": 14, "figure.titleweight": "bold"}


def figure(height: float, rows=1, columns=1, **grid):
    """A figure as wide as a page, 9 inches, and its axes (rows, columns)."""
    fig = Figure(figsize=(9, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **grid)


def settings_of(run: Path) -> Settings:
    """The settings of a run."""
    return Settings(**json.loads((run / "config.json").read_text()))


@cache
def gated_run(**changed) -> tuple[Settings, list[dict], torch.nn.Module, torch.nn.Module]:
    """config/toy_gates.py up to its cut, on batches of 256 tokens and with some settings changed.

    Returns its settings; of each step a sample of the gates, what is `left` of each structure, and the `stats` of the
    constraint; and the model and its gates just before the choice was fixed."""
    never = 10**6
    small = {"batch_size": 4, "gate_samples": 4, "seq_len": 64, "schedule": "constant", "reference_model": ""}
    quiet = {"eval_interval": never, "log_interval": never, "save_interval": never, "resume": "never"}
    steps, before = [], []
    with TemporaryDirectory() as out, redirect_stdout(io.StringIO()):
        s = replace(load(Settings, [str(ROOT / "config/toy_gates.py")]), **small, **quiet, out=out, **changed)
        trainer, run, log, _ = train.set_up(s)
        masks = trainer.masks

        def watch(*_):
            step = len(steps) + 1
            stats = {g: {key: float(x) for key, x in row.items()} for g, row in trainer.meter.stats.items()}
            with torch.no_grad():
                steps.append({"z": masks.sample(s.seed, step - 1, 0), "left": masks.left(step), "stats": stats})
            if step == s.settle_at:
                before.extend((copy.deepcopy(trainer.model), copy.deepcopy(masks)))

        trainer.optimizer.register_step_post_hook(watch)
        trainer.train(run, log)
    return s, steps, *before


# -- the chapters ---------------------------------------------------------------------------------------------------


@matplotlib.rc_context(LOOK)
def gate() -> Figure:
    """Chapter 1: three distributions of a gate, and how gates settle."""
    fig = Figure(figsize=(9, 6.6), layout="constrained")
    axes = fig.subplot_mosaic([["a", "a", "b", "b", "c", "c"], ["head"] * 3 + ["hidden"] * 3], height_ratios=(1, 1.2))
    u = (torch.arange(100_000) + 0.5) / 100_000
    for ax, log_alpha in zip((axes[k] for k in "abc"), (-3.0, 0.0, 3.0)):
        distribution = HardConcrete(u.shape, len(u), log_alpha)
        z = distribution.sample(u).detach()
        inner, edges = np.histogram(z[(z > 0) & (z < 1)], bins=10, range=(0, 1))
        ax.bar(edges[:-1] + 0.05, 100 * inner / len(z), 0.08, color=SKY)
        ends = [100 * (1 - distribution.prob_nonzero()[0].item()), 100 * (z == 1).double().mean().item()]
        ax.bar([-0.08, 1.08], ends, 0.1, color=GREEN)
        for x, share in zip((-0.08, 1.08), ends):
            ax.annotate(f"{share:.0f} %", (x, share), (0, 2), textcoords="offset points", ha="center", **LIKE)
        kept = float(distribution.deterministic(len(u))[0].detach())
        ax.plot(kept, -4, "^", ms=10, color=BLACK, clip_on=False)
        ax.set(ylim=(0, 100), xlim=(-0.3, 1.3), xticks=(-0.08, 0.5, 1.08), xticklabels=("0", "½", "1"))
        ax.set_title(f"log α = {log_alpha:.0f},  ▲ {kept:.3f}".replace("-", "−").replace("0.", "."))
        ax.tick_params(axis="x", pad=9)
    axes["a"].set_ylabel("probability (%)")
    axes["b"].set_xlabel("gate z    (green: exactly 0, exactly 1; ▲: its value in the small model, if it is kept)")

    s, steps, _, masks = gated_run()
    at = np.arange(1, len(steps) + 1)
    for g in ("head", "hidden"):
        ax, log_alpha = axes[g], getattr(masks, g).log_alpha.detach().flatten()
        kept = getattr(steps[-1]["left"], g).flatten() > 0.5
        for of, color, word in ((kept, BLUE, "stays"), (~kept, ORANGE, "goes")):
            i = of.nonzero()[log_alpha[of].argsort()[of.sum() // 2]]  # the one in the middle
            ax.plot(at, [getattr(r["z"], g).flatten()[i] for r in steps], ".", ms=4, alpha=0.5, color=color)
            y = [float(getattr(r["left"], g).flatten()[i]) for r in steps[: s.settle_at - 1]]
            ax.plot(at[: len(y)], y, color=color, label=word)
        ax.axvline(s.settle_at, color="#999999", lw=1, zorder=0)
        ax.annotate("choice fixed", (s.settle_at, 0.3), (6, 0), textcoords="offset points", **LIKE)
        ax.set(xlabel="step", ylim=(-0.04, 1.04), title=f"{'a head' if g == 'head' else 'a hidden dimension'}")
    axes["head"].set_ylabel("gate z (dots),\nP(z ≠ 0) at full noise (line)")
    axes["head"].legend(loc="center right", bbox_to_anchor=(1, 0.55))
    fig.suptitle("Noise gives each gate real chances of 0 and of 1; training decides", x=0.01, ha="left")
    return fig


@matplotlib.rc_context(LOOK)
def constraint() -> Figure:
    """Chapter 2: sparsity against its target, and the multipliers, with the demo's phi and with phi from 0."""
    first = gated_run()[0].phi
    columns = {f"φ starts at {first:g}": gated_run(), "φ starts at 0": gated_run(phi=0.0, fade=0)}
    fig, grid = figure(7.6, 3, 2, sharex=True, sharey="row")
    look, off, target = styles(list(NAMES)), {}, {"color": BLACK, "ls": ":", "lw": 1.5, "zorder": 3}
    for (title, (s, steps, *_)), axes in zip(columns.items(), grid.T):
        stats = [r["stats"] for r in steps[: s.settle_at]]
        at = np.arange(1, len(stats) + 1)
        for g in stats[0]:
            value = {key: np.array([r[g][key] for r in stats]) for key in stats[0][g]}
            color = look[g]["color"]
            axes[0].plot(at, 100 * value["target_sparsity"], **target)
            axes[0].plot(at, 100 * value["sparsity"], color=color)
            axes[1].plot(at, value["lambda"], color=color)
            axes[2].plot(at, value["phi"], color=color)
            miss = np.abs(value["sparsity"] - value["target_sparsity"])
            off[title] = max(off.get(title, 0), 100 * miss[-20:].mean())
        axes[0].set_title(title)
        axes[2].set_xlabel("step")
    for ax, label in zip(grid[:, 0], ("sparsity s (%)", "λ (nats)", "φ (nats)")):
        ax.set_ylabel(label)
    entries = [entry(NAMES[g], color=look[g]["color"]) for g in stats[0]] + [entry("target t", **target)]
    fig.legend(handles=entries, loc="outside lower center", ncols=3)
    text = ", ".join(f"{miss:.1f} ({title})" for title, miss in off.items())
    fig.suptitle(f"Last 20 steps, |s − t| in points: {text}", x=0.01, ha="left")
    return fig


def activations(model, tokens, z=None, layers=None) -> list[torch.Tensor]:
    """What goes into each of these layers (all), and into the last norm; and the logits."""
    seen, layers = [], range(len(model.layers)) if layers is None else layers
    watched = [*(model.layers[i] for i in layers), model.norm]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for m in watched]
    with torch.no_grad():
        seen.append(model(tokens, z))
    for hook in hooks:
        hook.remove()
    return seen


@matplotlib.rc_context(LOOK)
def same_function() -> Figure:
    """Chapter 3: the largest difference between gated and small model, layer by layer, and with two mistakes."""
    _, _, model, masks = gated_run()
    data = TokenData(settings_of(PRUNE).data)
    tokens = torch.from_numpy(data.eval_sequences(data.domains[0], "val", 128, 2).astype(np.int64))[:, :128]
    unfolded = copy.deepcopy(masks)
    choices.settle_(unfolded)  # every gate that stays is 1
    kept = kept_indices(masks)
    cases = {  # gates of the small model, dtype, does the norm count the survivors, look
        "float32": (masks, torch.float32, True, {"color": BLUE, "marker": "o"}),
        "float64": (masks, torch.float64, True, {"color": SKY, "marker": "s"}),
        "mistake: the norm's mean is over all": (masks, torch.float64, False, {"color": ORANGE, "marker": "^"}),
        "mistake: gates not multiplied in": (unfolded, torch.float64, True, {"color": PINK, "marker": "D"}),
    }
    fig, [[ax]] = figure(5)
    worst = {}
    for name, (gates, dtype, counts, look) in cases.items():
        small = extract(copy.deepcopy(model).to(dtype), copy.deepcopy(gates).to(dtype))
        z = copy.deepcopy(masks).to(dtype).deterministic()
        if not counts:  # a gate that is not quite 0 counts as a survivor
            z = z._replace(hidden=z.hidden.clamp(min=1e-100))
        large = activations(copy.deepcopy(model).to(dtype), tokens, z, kept["layer"].tolist())
        large = [x[..., kept["hidden"]] for x in large[:-1]] + large[-1:]
        pairs = list(zip(large, activations(small, tokens)))
        y = np.array([float((a - b).abs().max() / a.abs().max()) for a, b in pairs])
        ax.plot(range(len(y)), np.maximum(y, 1e-17), label=name, ms=9, mfc="none", mew=2, **look)
        worst[name] = y[-1]
    places = [f"layer {i}" for i in kept["layer"].tolist()] + ["norm", "logits"]
    ax.set_xticks(range(len(places)), places)
    gone = sorted(set(range(len(model.layers))) - set(kept["layer"].tolist()))
    ax.set(yscale="log", ylim=(5e-18, 30))
    ax.set_yticks((1e-17, 1e-13, 1e-9, 1e-5, 1e-1), ("0", "10⁻¹³", "10⁻⁹", "10⁻⁵", "10⁻¹"))
    ax.set_xlabel(f"what goes into this part, and the logits (layers {' and '.join(map(str, gone))} were pruned)")
    ax.set_ylabel("largest difference / largest value")
    fig.legend(loc="outside lower center", ncols=2)
    text = ", ".join(f"{worst[dtype]:.0e} ({dtype})" for dtype in ("float32", "float64"))
    fig.suptitle(f"Gated minus small model: {text} of the largest logit", x=0.01, ha="left")
    return fig


def on_triangle(ax, domains: list[str]) -> np.ndarray:
    """Draw the triangle of all mixtures of three domains. Returns its corners (3, 2): q @ corners is a point in it."""
    corners = np.array([[0, 0], [1, 0], [0.5, 0.75**0.5]])
    ax.fill(*corners.T, facecolor="none", edgecolor="#333333", lw=1)
    for domain, (x, y), (ha, va) in zip(domains, corners, (("left", "top"), ("right", "top"), ("center", "bottom"))):
        ax.annotate(f"all {domain}", (x, y), (0, 5 if va == "bottom" else -5), textcoords="offset points", ha=ha, va=va)
    ax.set(aspect="equal", xlim=(-0.03, 1.03), ylim=(-0.09, 0.97))
    ax.set_axis_off()
    return corners


def ball_outline(ax, corners, p, rho: float, **style) -> None:
    """The mixtures with chi2(q, p) = rho."""
    a, b = np.meshgrid(np.linspace(0, 1, 300), np.linspace(0, 1, 300))
    q = np.stack((a, b, 1 - a - b), -1)
    distance = np.where(q[..., 2] < 0, np.nan, chi2(q, p))
    ax.contour(*np.moveaxis(q @ corners, -1, 0), distance, levels=[rho], **style)


@matplotlib.rc_context(LOOK)
def ball(excess=(0.0, 0.04, 0.10), p=(0.5, 0.2, 0.3), floor=0.2) -> Figure:
    """Chapter 4: the worst mixture within the ball, for a ball that grows and for one that moves."""
    fig, [[left, right]] = figure(6, 1, 2)
    p, excess, domains = np.array(p), np.array(excess), ["python", "manuals", "cpp"]
    corners, _ = (on_triangle(ax, domains) for ax in (left, right))
    for rho in (0.01, 0.1, 1):
        ball_outline(left, corners, p, rho, colors="#999999", linewidths=1)
    for corner, e in zip(corners, excess / excess.max()):
        way = (corner - p @ corners) * e / 2
        left.annotate("", p @ corners + way, p @ corners, arrowprops={"arrowstyle": "-|>", "color": GREEN, "lw": 2})
    for color, label in (("#999999", "ball, ρ .01, .1, 1"), (GREEN, "excess")):
        left.plot([], color=color, label=label)
    rhos = np.logspace(-2, 1, 601)
    for f, style in ((0.0, {"ls": ":", "color": ORANGE}), (floor, {"color": BLUE})):
        q = np.array([dro_weights(excess, np.zeros(3), p, rho, f) for rho in rhos]) @ corners
        left.plot(*q.T, **style, label="q, no floor" if f == 0 else f"q, floor {f:g}")
        left.plot(*q[::200].T, "o", color=style["color"])
    places = {}
    for rho, point in zip(rhos[::200], q[::200]):
        places.setdefault(tuple(point.round(2)), []).append(f"{rho:g}")
    for point, names in places.items():
        left.annotate(f"ρ {', '.join(names)}", point, (0.86, point[1]), color=BLUE, va="center",
                      arrowprops={"arrowstyle": "-", "color": BLUE, "lw": 0.7, "ls": ":"})  # fmt: skip
    left.plot(*(p @ corners), "k*", ms=14)
    left.set_title("A larger ρ: further to the worst")

    ratio = p
    for evaluation in range(31):
        q = dro_weights(excess, np.zeros(3), ratio, 0.1, floor)
        if evaluation in (0, 5, 30):
            color = {0: SKY, 5: BLUE, 30: BLACK}[evaluation]
            ball_outline(right, corners, ratio, 0.1, colors=color, linewidths=1.5)
            right.plot(*(ratio @ corners), "*", ms=14, color=color)
            right.plot(*(q @ corners), "o", color=color, label=f"p moved {evaluation}×")
        ratio = update_ratio(ratio, q, p)
    right.set_title("Dynamic ratio (ρ 0.1): the ball moves")
    for ax in (left, right):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, 0.02), ncols=2, columnspacing=1)
    fig.suptitle("The mixture (●) is the worst one in a ball around the ratio (★)", x=0.01, ha="left")
    return fig


@matplotlib.rc_context(LOOK)
def law(run: Path = CONTINUE) -> Figure:
    """Chapter 5: laws fitted at 20 to 80 % of a run, for the domain whose end is predicted best and for the worst, by
    those laws that a run would use."""
    s, metrics = settings_of(run), read_metrics(run)
    evals = [e for e in metrics.evals if e["step"] >= COLLECT_FROM * s.steps]
    steps, params = series(evals, "step"), series(evals, "parameters")
    tokens, losses = (np.array([series(evals, key, d) for d in metrics.domains]).T for key in ("domain_tokens", "loss"))
    rates = np.array([train.lr_scale(step - 1, s) for step in steps])
    fits, missed, used = {}, [], []
    for share in (0.2, 0.4, 0.6, 0.8):
        n = int((steps <= share * s.steps).sum())
        expected = np.outer(tokens[n - 1] / steps[n - 1], steps)  # as a run does, at each domain's average rate so far
        laws = fit_together(tokens[:n], losses[:n], params[:n], rates[:n], expected[:, -1])
        curves = [
            f.predict(x, params[-1], rates) if isinstance(f, ScalingLaw) else None for f, x in zip(laws, expected)
        ]
        fits[share] = n, curves
        if share >= PREDICT_FROM and n > MORE_POINTS_THAN:
            used.append(f"{100 * share:.0f}")
            missed.append([np.nan if c is None else abs(c[-1] - end) for c, end in zip(curves, losses[-1])])
    mean = np.mean(missed, axis=0)  # nan where a domain with few tokens has no law yet
    fig, grid = figure(5, 1, 2)
    colors = dict(zip(fits, (SKY, BLUE, ORANGE, BLACK)))
    for ax, i, word in zip(grid[0], (np.nanargmin(mean), np.nanargmax(mean)), ("best", "worst")):
        ax.plot(steps, losses[:, i], color="#777777", lw=1.5)
        ax.plot(steps[-1], losses[-1, i], "*", ms=16, color="#777777", clip_on=False)
        for share, (n, curves) in fits.items():
            color = colors[share]
            if curves[i] is not None:
                ax.plot(steps[n - 1 :], curves[i][n - 1 :], color=color)
                ax.plot(steps[-1], curves[i][-1], "D", ms=7, mfc="none", mew=1.5, color=color, clip_on=False)
        ax.set(xlabel="step", title=f"{word} predicted: {metrics.domains[i]}")
        text = f"mean error at {', '.join(used)} %: {mean[i]:.3f}"
        ax.annotate(text, (0.97, 0.93), xycoords="axes fraction", ha="right", **LIKE)
    grid[0, 0].set_ylabel("validation loss (nats/token)")
    entries = [entry(f"at {100 * share:.0f} %", color=color) for share, color in colors.items()]
    fig.legend(handles=[entry("measured", color="#777777"), *entries], loc="outside lower center", ncols=5)
    fig.suptitle("Predictions (◇) of the end (★), made on the way to it", x=0.01, ha="left")
    return fig


@matplotlib.rc_context(LOOK)
def steering() -> Figure:
    """Chapter 6: the demo's skewed mixture under the robust schedule, and beside it under `constant`."""
    runs = {"DRPruning": read_metrics(CONTINUE), "constant": read_metrics(CONSTANT)}
    source = read_metrics(SOURCE).end["loss"]
    fig, grid = figure(6.6, 2, 2, sharex=True, sharey="row")
    domains = runs["constant"].domains
    look, worst = styles(domains), {}
    for (name, run), axes in zip(runs.items(), grid.T):
        tokens = series(run.evals, "tokens") / 1000
        loss = {d: series(run.evals, "loss", d) for d in domains}
        rows = [
            {d: 100 * series(run.evals, "weights", d) for d in domains},
            {d: loss[d] - source[d] for d in domains},
        ]
        for ax, row in zip(axes, rows):
            for d, y in row.items():
                ax.plot(tokens, y, color=look[d]["color"], **RAW)
                ax.plot(tokens, running_mean(y), color=look[d]["color"])
        axes[0].set(title=name, yscale="log", yticks=(1, 2, 5, 10, 20, 50), yticklabels=(1, 2, 5, 10, 20, 50))
        axes[0].minorticks_off()
        axes[1].set_xlabel("tokens (thousands)")
        worst[name] = max(y[-1] for y in rows[1].values())
    for ax, label in zip(grid[:, 0], ("share of batches\n(%, log scale)", "loss minus the\nsource's (nats)")):
        ax.set_ylabel(label)
    for ax, row in zip(grid[:, 1], rows):
        ax.set_xlim(0, tokens[-1])
        label_ends(ax, {d: y[-1] for d, y in row.items()}, {d: d for d in domains}, look, size=12.5)
    text = ", ".join(f"{x:+.2f} ({name})" for name, x in worst.items()).replace("-", "−")
    grid[1, 0].annotate("faint: as measured", (0.97, 0.06), xycoords="axes fraction", ha="right", **LIKE)
    fig.suptitle(f"Worst domain, loss minus the source's: {text}", x=0.01, ha="left")
    return fig


def dots(ax, rows: dict[str, list[float]], colors) -> None:
    """A row of dots for each entry, one for each seed, and a bar at their mean. Thin lines join a seed's dots."""
    if len({len(values) for values in rows.values()}) == 1:
        ax.plot(list(rows.values()), range(len(rows)), color="#bbbbbb", lw=0.8)
    for i, ((_, values), color) in enumerate(zip(rows.items(), colors)):
        ax.plot(values, [i] * len(values), "o", ms=7, alpha=0.6, color=color)
        ax.plot([np.mean(values)] * 2, [i - 0.3, i + 0.3], color=color, lw=3)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()


@matplotlib.rc_context(LOOK)
def gained(docs: Path = ROOT / "docs") -> Figure:
    """Chapter 7: schedules, choices of what to keep, and a real model. A panel for each result that there is."""
    panels = {}
    results = json.loads((docs / "compare/results.json").read_text())
    names = {"constant": ("constant", BLACK), "paper": ("DRPruning, paper's settings", BLUE)}
    names |= {"sheared": ("Sheared LLaMA's", SKY), "even": ("DRPruning, defaults", GREEN)}
    for scale, title, measure in (
        ("toy", "toy, skewed: average", "average"),
        ("toy", "toy, skewed: worst domain", "worst"),
        ("middle", "6.5M parameters, skewed: worst domain", "worst"),
        ("smollm2", "SmolLM2-135M, skewed: worst domain", "worst"),
    ):
        part = results[scale]["skewed"]
        rows = {n: [run[measure] for run in part[key].values()] for key, (n, _) in names.items() if key in part}
        panels[title] = rows, [color for key, (_, color) in names.items() if key in part]
    for scale, title, color in (
        ("toy", "toy", BLUE),
        ("smollm2_short", "SmolLM2-135M, .7M tokens", PINK),
        ("smollm2", "SmolLM2-135M, 1.4M tokens", PINK),
    ):
        result = json.loads((docs / f"pruning/{scale}.json").read_text())
        rows = {row: [x - result["source"] for x in values] for row, values in result["losses"].items()}
        rows = dict(sorted(rows.items(), key=lambda item: np.mean(item[1])))
        panels[f"{title}: what to keep"] = rows, [color] * len(rows)
    heights = [len(rows) + 2 for rows, _ in panels.values()]
    fig, grid = figure(0.36 * sum(heights), len(panels), 1, height_ratios=heights)
    for ax, (title, (rows, colors)) in zip(grid[:, 0], panels.items()):
        dots(ax, rows, colors)
        seeds = {len(values) for values in rows.values()}
        ax.set_title(f"{title}: {' or '.join(map(str, sorted(seeds)))} seed{'s' * (seeds != {1})}")
        ax.axvline(0, color=BLACK, lw=1)  # the source
        ax.grid(axis="x", color="#e4e4e4")
    grid[-1, 0].set_xlabel("test loss minus the source's (nats/token); dots: seeds, bars: means")
    toy = results["toy"]["skewed"]
    won = [np.mean([run["worst"] for run in toy[key].values()]) for key in ("constant", "even")]
    text = f"Skewed toy, worst domain: {won[0]:+.2f} when constant, {won[1]:+.2f} when steered"
    fig.suptitle(text.replace("-", "−"), x=0.01, ha="left")
    return fig


FIGURES = [gate, constraint, same_function, ball, law, steering, gained]


# -- the page and the notebook --------------------------------------------------------------------------------------


def quote(place: str) -> str:
    """The source of a function without its docstring, with file and line: "masks.py:HardConcrete.sample". With two more
    parts, " | text | text", only from the line of it that has the first to the one that has the second."""
    (file, name), *parts = place.split(" | ")[0].split(":"), *place.split(" | ")[1:]
    lines = (ROOT / file).read_text().splitlines()
    node = ast.parse("\n".join(lines))
    for part in name.split("."):
        node = next(n for n in node.body if getattr(n, "name", None) == part)
    body = node.body[ast.get_docstring(node) is not None]
    first, last = (node.lineno, node.end_lineno) if not parts else (body.lineno, node.end_lineno)
    numbered = [(i, lines[i - 1]) for i in range(first, last + 1)]
    if parts:
        first, last = (next(i for i, line in numbered if part in line) for part in parts)
        numbered = [(i, line) for i, line in numbered if first <= i <= last]
    elif body is not node.body[0]:
        skipped = range(node.body[0].lineno, node.body[0].end_lineno + 1)
        numbered = [(i, line) for i, line in numbered if i not in skipped]
    indent = min(len(line) - len(line.lstrip()) for _, line in numbered if line)
    code = "\n".join(line[indent:] for _, line in numbered)
    return f"```python\n# {file}, line {numbered[0][0]}\n{code}\n```"


def with_quotes(page: str) -> str:
    """The page, with the code below each marker <!-- quote PLACE --> as it is now."""
    return re.sub(r"(<!-- quote (.+?) -->\n)```python\n.*?```", lambda m: m[1] + quote(m[2]), page, flags=re.S)


def notebook(page: str) -> dict:
    """The same chapters as a notebook: where the page shows a figure, a cell makes it."""
    first = (
        '%matplotlib inline\nimport os\nimport sys\n\nif os.path.basename(os.getcwd()) == "docs":\n    os.chdir("..")\n'
    )
    first += "sys.path.insert(0, os.getcwd())\nfrom experiments import tour"
    title, *parts = re.split(r"!\[[^]]*\]\(tour/(\w+)\.png\)\n", re.sub(r"<!--.*?-->\n", "", page))
    cells = [("markdown", title.strip()), ("code", first)]
    for name, text in zip(parts[::2], parts[1::2]):
        cells += [("code", f"tour.{name}()"), ("markdown", text.strip())]
    extra = {"markdown": {}, "code": {"execution_count": None, "outputs": []}}
    cells = [{"cell_type": kind, "metadata": {}, "source": text, **extra[kind]} for kind, text in cells]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 4}


def main():
    parser = Parser(__doc__)
    parser.add_argument("--text", action="store_true", help="only the quotes in docs/tour.md and the notebook")
    names = [f.__name__ for f in FIGURES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="only these figures")
    with user_errors():
        args = parser.parse_args()
        for run in () if args.text else (SOURCE, PRUNE, CONTINUE, CONSTANT):
            if not (run / "model").exists():
                raise ValueError(f"{run.relative_to(ROOT)}: no finished run; run `make demo` first")
    PICTURES.mkdir(exist_ok=True)
    for make in () if args.text else FIGURES:
        if make.__name__ not in args.only:
            continue
        fig = make()
        fig.savefig(PICTURES / f"{make.__name__}.png", dpi=150)
        with matplotlib.rc_context({"svg.hashsalt": "0"}):  # the same figure gives the same file
            fig.savefig(PICTURES / f"{make.__name__}.svg", metadata={"Date": None})
        print(PICTURES / f"{make.__name__}.png", flush=True)
    page = with_quotes(PAGE.read_text())
    PAGE.write_text(page)
    NOTEBOOK.write_text(json.dumps(notebook(page), indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
