"""Plot: the pictures of a run. They are made from its metrics.jsonl alone, also while the run is still going on.

    python plot.py out/toy_prune                        # the pictures of one run
    python plot.py out/toy_prune out/toy_continue       # the pictures of each run, and comparison.png in the first run
    python plot.py out/a out/b --out figures            # comparison.png is written to figures/

| picture | the question that it answers | paper |
|---|---|---|
| weights.png | Which domains did the schedule prefer, compared with the reference ratio p? | eq. 3, 5, p_R |
| loss.png | Did each domain reach its reference loss? Did the scaling law predict the final loss? | eq. 4, 3.2 |
| sparsity.png | Do the gates follow the rising target? What do the multipliers lambda and phi do? | eq. 1 |
| gates.png | Which layers, KV heads, feed-forward dimensions and hidden dimensions are kept? | fig. 1 |
| comparison.png | Which of several runs is better, on average and on its worst domain? | table 1 |

sparsity.png and gates.png exist for runs with gates only. A notebook can call the functions `*_figure`: each takes a
`Metrics` (comparison_figure: a list) and returns a matplotlib Figure, or None when the run has nothing to show there.
The seven colours are from the palette of Okabe and Ito, which colour-blind readers can tell apart.
"""

import os
import sys
import textwrap
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # without pyplot there is no global state and no display is needed
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator
from scipy.optimize import isotonic_regression

from dro import COLLECT_FROM, MORE_POINTS_THAN, PREDICT_FROM, RATIO_FROM
from plumbing.command_line import Parser, command, one_line, some_path, user_errors
from plumbing.metrics import Metrics, get, latest, read_metrics, series
from plumbing.output import check_output

COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"]  # Okabe and Ito, no yellow
MARKERS = ["", "o", "s", "^", "D", "v", "X", "P"]  # the eighth to the fourteenth line have circles, the next squares
NAMES = {"layer": "layers", "hidden": "hidden dimensions", "head": "KV heads", "ffn": "feed-forward dimensions"}
SHAPE = {"layer": "n_layer", "hidden": "d_model", "head": "n_kv_head", "ffn": "d_ffn"}  # keys of the model's config
REFERENCE_LINES = {"given": "-", "predicted": "--", "seen": ":", None: "--"}  # None: a run that does not say which
WIDTH, HEIGHT, GREY = 12, 6.75, "#666666"  # inches; the shape of a slide
FONTS = ["DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "PingFang SC", "Hiragino Sans", "Microsoft YaHei"]
FONTS += ["WenQuanYi Micro Hei", "Arial Unicode MS"]  # a domain may have a name in any script
STYLE = {
    "figure.dpi": 120,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.1,
    "font.size": 14,
    "font.family": [name for name in FONTS if name in font_manager.get_font_names()],
    "axes.titlesize": 15,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": "#e4e4e4",
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "text.parse_math": False,  # the name of a domain may contain "$"
}
RAW = {"lw": 1, "alpha": 0.45}  # a noisy line, below its running mean
warnings.filterwarnings("ignore", "Glyph .* missing from")  # no font has all scripts: a box is drawn


# --- what all pictures use


def timeline(run: Metrics) -> dict[str, float]:
    """What the paper's two additions do -> from which share of the run on, as far as its schedule uses them."""
    marks = {}
    if run.info.get("dynamic_reference") and run.info.get("schedule") in ("sheared", "dro"):
        marks["points"] = COLLECT_FROM
        points = [e["step"] / run.info["steps"] for e in run.evals if e["step"] >= COLLECT_FROM * run.info["steps"]]
        if len(points) > MORE_POINTS_THAN:
            marks["law"] = max(PREDICT_FROM, points[MORE_POINTS_THAN])
    if run.info.get("dynamic_ratio") and run.info.get("schedule") == "dro":
        marks |= {"ratio": RATIO_FROM}
    return dict(sorted(marks.items(), key=lambda mark: mark[1]))


def new_figure(rows=1, columns=1, height=HEIGHT, **grid):
    """A figure as wide as a slide, and an array (rows, columns) of its axes."""
    fig = Figure(figsize=(WIDTH, height), layout="constrained")
    return fig, fig.subplots(rows, columns, squeeze=False, **grid)


def styles(names: list[str]) -> dict[str, dict]:
    """name -> colour and marker of its lines, the same in every picture of a run."""
    looks = [{"color": color, "marker": marker} for marker in MARKERS for color in COLORS]
    return {name: looks[i % len(looks)] for i, name in enumerate(names)}


def draw(ax, x, y, marker="", **style):
    """A line. One of one or two points gets markers, or it could not be seen."""
    if np.isfinite(y).sum() < 3:
        marker = marker or "o"
    ax.plot(x, y, marker=marker, markevery=max(1, len(x) // 10), **style)


def step_axis(ax, run: Metrics, steps: float):
    """Let x be the step, from 0 to `steps`."""
    ax.set_xlim(0, max(steps, 1))
    ax.locator_params(axis="x", nbins=4, integer=True)
    ax.xaxis.set_major_formatter("{x:,.0f}")
    ax.set_xlabel(f"step ({run.info['tokens_per_step']:,} tokens each)")


def heading(fig, run: Metrics, text: str):
    """The title of a figure: of which run it is, what is to be seen, and how far the run is."""
    last = max(r["step"] for r in [*run.train, *run.evals])
    so_far = "" if run.end else f" (step {last:,} of {run.info['steps']:,})"
    title(fig, f"{shorten(run.name, 32)}: {text}{so_far}")


def title(fig, text: str):
    """A title that is no wider than the figure."""
    fig.suptitle(textwrap.fill(text, 92), x=0.012, ha="left")


def shorten(text: str, length: int) -> str:
    """The beginning of a text that is too long."""
    return text if len(text) <= length else text[: length - 1] + "…"


def entry(text: str, **style) -> Line2D:
    """An entry of a legend."""
    label = " " + text if text.startswith("_") else text  # matplotlib leaves a label out that begins so
    return Line2D([], [], label=label, **{"color": "#333333", **style})


def legend(fig, entries: list[Line2D]):
    """A legend below the axes: one row if the entries fit, else as many columns as the longest entry allows."""
    widths = [len(e.get_label()) + 7 for e in entries]  # in letters, with the sample of the line
    columns = len(entries) if sum(widths) <= 100 else max(1, 100 // max(widths))
    fig.legend(handles=entries, loc="outside lower center", ncols=columns)


def spread(positions: np.ndarray, gap: float, low=0.0, high=1.0) -> np.ndarray:
    """Positions moved as little as possible (least squares) until neighbours are `gap` apart, for labels."""
    order, offsets = np.argsort(positions, kind="stable"), gap * np.arange(len(positions))
    start = isotonic_regression(positions[order] - offsets).x  # does not fall, so neighbours will be `gap` apart
    moved = np.empty(len(positions))
    moved[order] = np.clip(start, low, max(low, high - offsets[-1])) + offsets
    return moved


def running_mean(y: np.ndarray, reach=2) -> np.ndarray:
    """The mean of each number and of up to `reach` neighbours on either side, as many on both: the ends stay."""
    reaches = [min(reach, i, len(y) - 1 - i) for i in range(len(y))]
    return np.array([y[i - r : i + r + 1].mean() for i, r in enumerate(reaches)])


def label_ends(ax, ends: dict[str, float], texts: dict[str, str], look: dict[str, dict], size=14.0):
    """A text to the right of each line's end. They are kept apart; y is on the axes' scale, which is final by now."""
    to_axes = ax.transData + ax.transAxes.inverted()
    at = np.nan_to_num([to_axes.transform((0, y))[1] for y in ends.values()])
    gap = 1.35 * size / 72 / (ax.get_position().height * 0.85 * ax.figure.get_figheight())
    for name, here, there in zip(ends, at, spread(at, gap)):
        ax.text(1.045, there, texts[name], transform=ax.transAxes, va="center", fontsize=size)
        ax.plot([1.005, 1.038], [here, there], transform=ax.transAxes, clip_on=False, color=look[name]["color"], lw=0.8)


def draw_timeline(ax, run: Metrics, labels=True) -> list[Line2D]:
    """A vertical line where each of the paper's additions sets in, as far as the run has come. Returns the entries of
    the legend for it."""
    marks, last = timeline(run), run.evals[-1]["step"]
    style = {"color": "#aaaaaa", "lw": 1}
    label = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "ha": "center", "fontsize": 12}
    for share in marks.values():
        if (at := share * run.info["steps"]) <= last:
            ax.axvline(at, **style, zorder=0, gid="timeline")
            ax.annotate(f"{100 * share:.0f} %" * labels, (at, 1), (0, 3), **label)
    text = ", ".join(f"{what} {100 * share:.0f} %" for what, share in marks.items())
    return [entry(text, **style, marker="|", ms=16, ls="")] if marks else []


def zoom(ax):
    """Choose y limits in which the last 40 % of the lines fill at least a quarter of the height.

    Otherwise the first losses of a random model, or the bump while gates close, would flatten what matters.
    """
    lines = [line.get_data() for line in ax.lines]
    everything = np.concatenate([y[np.isfinite(y)] for _, y in lines])
    late = np.concatenate([y[np.isfinite(y) & (x >= 0.6 * x[-1])] for x, y in lines])
    if len(late):
        low = everything.min()
        height = min(everything.max() - low, 4 * (late.max() - low)) or 1.0
        ax.set_ylim(low - 0.08 * height, low + 1.08 * height)


# --- the pictures


@matplotlib.rc_context(STYLE)
def weights_figure(run: Metrics) -> Figure:
    """Data weights q and reference ratio p. Those of an evaluation, or of a new ratio, are in force until the next."""
    tall = max(1, len(run.domains) / 28)  # so that the labels fit beside the axes, with 9 points at least
    fig, [[ax]] = new_figure(height=tall * HEIGHT)
    points = sorted([*run.evals, *run.changes], key=lambda line: line["step"])
    steps, look = series(points, "step"), styles(run.domains)
    q = {d: 100 * series(points, "weights", d) for d in run.domains}
    p = {d: 100 * series(points, "ratio", d) for d in run.domains}
    for d in run.domains:
        color, stairs = look[d]["color"], {"drawstyle": "steps-post", "clip_on": False}
        draw(ax, steps, p[d], **stairs, color=color, ls=":", lw=1.5, gid=f"ratio {d}")
        draw(ax, steps, q[d], **stairs, color=color, **RAW, gid=f"weight {d}")
        draw(ax, steps, running_mean(q[d]), **look[d], clip_on=False, gid=f"mean {d}")
    step_axis(ax, run, steps[-1])
    ax.set_ylabel("share of the next batches (%)")
    shown = np.array([*q.values(), *p.values()])
    if shown.min() > 0 and shown.max() > 8 * shown.min():  # so that 2 % to 4 % looks as much as 30 % to 60 %
        ax.set(yscale="log", ylabel="share of the next batches (%), log scale")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        ax.minorticks_off()
    ax.yaxis.set_major_formatter("{x:g}")
    ax.autoscale_view()
    texts = {d: f"{shorten(d, 18)}  {format(q[d][-1], '#.3g').rstrip('.')} %" for d in q}
    label_ends(ax, {d: q[d][-1] for d in q}, texts, look, size=min(14, 250 * tall / len(q)))
    entries = [entry("data weight q", **RAW), entry("running mean"), entry("reference ratio p", ls=":", lw=1.5)]
    legend(fig, [*entries, *draw_timeline(ax, run)])

    drawn = np.diff(steps) if steps[-1] > steps[0] else [1]  # steps in which each was in force
    share = {d: np.average(q[d][: len(drawn)], weights=drawn) for d in q}
    growth = {d: share[d] / p[d][0] for d in run.domains if p[d][0] > 0}
    most = max(growth, key=growth.get, default=None)
    text = "every domain keeps its share of the batches"
    if most and growth[most] <= 1.005:  # nobody gained: has somebody lost?
        most = min(growth, key=growth.get)
    if most and abs(growth[most] - 1) > 0.005:
        excess = {d: np.nanmean([0, *series(run.evals, "loss", d) - series(run.evals, "reference", d)]) for d in q}
        behind = "falls behind and " if excess[most] == max(excess.values()) > 0 else ""
        text = f"{shorten(most, 18)} {behind}gets {share[most]:.3g} % of all batches"
        text += f", {growth[most]:.2f} times its first share"
    heading(fig, run, text)
    text = f"{run.info.get('schedule')} schedule"
    used = {d: get(run.evals[-1], "epochs", d) or 0 for d in run.domains}
    most = max(used, key=used.get)
    if used[most] > 1:
        text += f"; the text of {shorten(most, 18)} has been used {used[most]:.2f} times"
    ax.set_title(text, fontweight="normal", pad=22)
    return fig


def forecast(run: Metrics, domain: str) -> dict | None:
    """The evaluation whose fitted curve is drawn: the newest, or, of a finished run, the first from half time on."""
    steps = run.info["steps"]
    fitted = [e for e in run.evals if get(e, "curve", "loss", domain) and get(e, "prediction", domain) is not None]
    fitted = [e for e in fitted if e["step"] < steps and e["curve"]["step"][-1] == steps]  # not of before steps grew
    if run.end:
        fitted = [e for e in fitted if e["step"] >= steps / 2][:1]
    return fitted[-1] if fitted else None


@matplotlib.rc_context(STYLE)
def loss_figure(run: Metrics) -> Figure:
    """A panel per domain: validation loss, reference loss and where it comes from, the law's forecast, and the end."""
    n, look, steps = len(run.domains), styles(run.domains), series(run.evals, "step")
    columns = min(4, (n + 1) // 2)
    rows = -(-n // columns)
    fig, grid = new_figure(rows, columns, height=max(HEIGHT, 2.1 * rows))
    name = "validation loss" + (" (gated, while pruning)" if run.has_gates else "")
    entries, excess = {"loss": entry(name, **RAW), "mean": entry("running mean")}, {}
    for ax, d in zip(grid.flat, run.domains):
        color, notes = look[d]["color"], []
        loss, reference = series(run.evals, "loss", d), series(run.evals, "reference", d)
        draw(ax, steps, loss, color=color, **RAW, gid="loss")
        draw(ax, steps, running_mean(loss), color=color, gid="mean")
        excess[d] = (loss - reference)[-1]
        sources = np.array([get(e, "reference_is", d) for e in run.evals])
        for source, ls in REFERENCE_LINES.items():
            y = np.where(sources == source, reference, np.nan)
            if np.isfinite(y).any():
                name, style = f"reference loss: {source}" if source else "reference loss", {"ls": ls, "lw": 1.5}
                x, y = [*steps, run.info["steps"]], [*y, y[-1]]
                ax.plot(x, y, color="black", drawstyle="steps-post", gid=name, **style)
                entries[name] = entry(name, color="black", **style)
        if evaluation := forecast(run, d):
            x, y = evaluation["curve"]["step"], evaluation["curve"]["loss"][d]
            target = evaluation["prediction"][d]
            style = {"color": "black", "mfc": "none", "mew": 1.5, "zorder": 4, "ls": "-."}
            ax.plot(x, y, gid="curve", **style)
            ax.plot(x[0], y[0], marker="o", ms=6, gid="forecast", **style)
            ax.plot(x[-1], target, marker="D", ms=10, gid="prediction", clip_on=False, **style)
            notes.append(f"◇ {target:.3f}")
            entries["forecast"] = entry("predicted from ○ on", marker="D", ms=9, **style)
        if (end := get(run.end, "loss", d)) is not None:
            ax.plot(run.end["step"], end, "*", ms=14, color=color, gid="end", clip_on=False, zorder=3)
            notes.append(f"★ {end:.3f}")
            entries["end"] = entry("finished model", ls="", marker="*", ms=14)
        else:
            notes.append(f"now {latest(run, 'loss', d):.3f}")
        zoom(ax)
        step_axis(ax, run, run.info["steps"])
        marks = draw_timeline(ax, run, labels=False)
        ax.set_xlabel("step" if ax in grid[-1] else "")
        ax.set_title(shorten(d, 70 // columns), pad=22)
        ax.annotate("    ".join(notes), (0, 1), (0, 6), "axes fraction", textcoords="offset points", fontsize=13)
    for ax in grid.flat[n:]:
        ax.remove()
    fig.supylabel("validation loss (nats/token)", fontsize=14)
    worst = max(excess, key=excess.get)
    text = "validation loss by domain"
    if np.isfinite(excess[worst]):
        text = f"{shorten(worst, 18)} has the largest excess over its reference loss, {excess[worst]:+.3f} nats/token"
    heading(fig, run, text)
    legend(fig, [*entries.values(), *marks])
    return fig


@matplotlib.rc_context(STYLE)
def sparsity_figure(run: Metrics) -> Figure | None:
    """Per granularity: expected sparsity s and its target t, undecided gates, and the multipliers."""
    gaps = {g: abs(series(run.train, "sparsity", g) - series(run.train, "target_sparsity", g)) for g in NAMES}
    pruned = [g for g in NAMES if np.isfinite(gaps[g]).any()]
    if not pruned:
        return None
    panels = {
        "sparsity": ("expected sparsity s and target t", "share of gates at 0 (%)", 100),
        "undecided": ("undecided: P(z = 0) in .05 … .95", "share of gates (%)", 100),
        "lambda": ("multiplier of s − t", "λ (nats)", 1),
        "phi": ("multiplier of (s − t)²", "φ (nats)", 1),
    }
    fig, grid = new_figure(2, 2)
    steps, look = series(run.train, "step"), styles(list(NAMES))
    for ax, (key, (title, unit, scale)) in zip(grid.flat, panels.items()):
        for g in pruned:
            color = look[g]["color"]
            if key == "sparsity":
                target = scale * series(run.train, "target_sparsity", g)
                draw(ax, steps, target, color=color, ls="--", lw=1.4, gid=f"target {g}")
            draw(ax, steps, scale * series(run.train, key, g), color=color, gid=f"{key} {g}")
        step_axis(ax, run, steps[-1])
        ax.set_title(title)
        ax.set_ylabel(unit)
        if scale == 100:
            ax.set_ylim(0)
    for ax in grid[0]:
        ax.set_xlabel("")
    last = np.flatnonzero(np.isfinite(gaps[pruned[0]]))[-1]  # gates may settle before the end
    worst = max(gaps[g][last] for g in pruned)
    at = f"at step {int(steps[last]):,} expected sparsity"
    heading(fig, run, f"{at} is at most {100 * worst:.2g} percentage points off its target")
    entries = [entry(NAMES[g], color=look[g]["color"]) for g in pruned]
    legend(fig, [*entries, entry("target t", ls="--", lw=1.4)])
    return fig


@matplotlib.rc_context(STYLE)
def gates_figure(run: Metrics) -> Figure | None:
    """Heat maps of the latest deterministic gates. Each row is a layer; all layers share the hidden dimensions.

    Heads and feed-forward dimensions of a layer whose own gate is 0 are removed with the layer: they are grey.
    """
    logged = [r for r in [*run.evals, run.end] if any(get(r, "gates", g) for g in NAMES)]
    if not logged:
        return None
    gates = {g: np.array(z, float) for g, z in logged[-1]["gates"].items() if z}
    color_map = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9ecae1", "#0072B2", "#004166"])
    color_map = color_map.with_extremes(bad="#d9d9d9")
    by_layer = {g: width for g, width in {"layer": 1.3, "head": 5, "ffn": 8}.items() if g in gates}
    mosaic = [row for row in (list(by_layer), ["hidden"] * max(1, len(by_layer))) if row and row[0] in gates]
    ratios = {"height_ratios": [5, 1][: len(mosaic)], "width_ratios": list(by_layer.values()) or None}
    fig = Figure(figsize=(WIDTH, HEIGHT if by_layer else 3), layout="constrained")
    axes = fig.subplot_mosaic(mosaic, **ratios)
    removed = gates["layer"] == 0 if "layer" in gates else np.zeros(1, bool)
    for g, ax in axes.items():
        z = gates[g].reshape(1 if g == "hidden" else len(gates[g]), -1)  # (layers or 1, columns)
        if g in ("head", "ffn"):
            z = np.ma.masked_array(z, np.broadcast_to(removed[:, None], z.shape))
        rows, columns = z.shape
        source, target = (get(run.info, which, SHAPE[g]) for which in ("source", "target"))
        width = columns if g == "layer" else source or columns  # the gates of many dimensions are logged in bins
        edges = (-0.5, width - 0.5, rows - 0.5, -0.5)
        image = ax.imshow(z, cmap=color_map, vmin=0, vmax=1, aspect="auto", extent=edges)
        ax.grid(visible=False)
        ax.hlines(np.arange(1, rows) - 0.5, *edges[:2], color="#cccccc", lw=0.8)
        ax.spines[:].set(visible=True, color=GREY)
        ax.set_title(NAMES[g] + (f"\n{source:,} → {target:,}" if source and target else ""), fontsize=14)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1))
        ax.yaxis.set_major_locator(MaxNLocator(12, integer=True, min_n_ticks=1))
        ax.set_ylabel("" if g == "hidden" else "layer")
        if g == "layer":
            ax.set_xticks([])
        if g == "hidden":
            ax.set_yticks([])
    fig.colorbar(image, ax=list(axes.values()), shrink=0.8, aspect=30, pad=0.02, label="gate z")
    text = f"gates at step {logged[-1]['step']:,} (white: removed)"
    if removed.any():
        text = f"removed layers: {', '.join(map(str, np.flatnonzero(removed)))} (white, and what is grey with them)"
    heading(fig, run, text)
    return fig


@matplotlib.rc_context(STYLE)
def comparison_figure(runs: list[Metrics]) -> Figure:
    """Average and worst-domain validation loss over tokens, and the final losses, on the domains that all runs have.

    In bits per byte if every run has them, which also compares across tokenizers, else in nats per token.
    """
    domains, names = common_domains(runs), [run.name for run in runs]
    if len(set(names)) < len(names):
        paths = [run.path.absolute() for run in runs]
        names = [one_line(str(path.relative_to(os.path.commonpath(paths))), 255) for path in paths]
    in_bits = all(np.isfinite(latest(run, "bits_per_byte", d)) for run in runs for d in domains)
    measure, unit = ("bits_per_byte", "bits per byte") if in_bits else ("loss", "nats/token")
    kinds = {"average": (np.mean, "-", 2.4), "worst domain": (np.max, "--", 1.7)}
    finals = np.array([[latest(run, measure, d) for d in domains] for run in runs])  # (runs, domains)
    look, rows = styles(names), range(len(domains) + 1)
    height = max(HEIGHT, 0.3 * len(rows)) + 0.25 * max(0, len(runs) - 6)  # for the legend
    fig, [[ax, dots]] = new_figure(1, 2, height=height, width_ratios=(1.15, 1))
    for run, name, final in zip(runs, names, finals):
        color, marker = look[name]["color"], look[name]["marker"]
        tokens = series(run.evals, "tokens")
        values = np.array([series(run.evals, measure, d) for d in domains])  # (domains, evaluations)
        for kind, (reduce, ls, lw) in kinds.items():
            # NaN, a gap, where a domain is missing: an average over fewer domains is another measure
            draw(ax, tokens, reduce(values, axis=0), marker, color=color, ls=ls, lw=lw, gid=f"{kind} {name}")
            if run.end:
                at = float(run.evals[-1]["tokens"])  # not steps times tokens: a run may go on with larger batches
                star = {"ms": 15, "mec": "white", "clip_on": False, "zorder": 5, "gid": f"end, {kind} {name}"}
                ax.plot(at, reduce(final), "*", color=color, **star)
        dots.plot([*final, final.mean()], rows, marker or "o", ms=10, color=color, alpha=0.8, gid=f"final {name}")
    zoom(ax)
    ax.set_xlim(left=0)
    ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    ax.set(title="average and worst domain", xlabel="tokens", ylabel=f"validation loss ({unit})")
    dots.axhline(len(domains) - 0.5, color=GREY, lw=0.8)
    dots.set_yticks(rows, [*(shorten(d, 16) for d in domains), "average"])
    dots.invert_yaxis()
    dots.set(title="at the end, or so far", xlabel=f"validation loss ({unit})")

    best = {kind: names[np.argmin(reduce(finals, axis=1))] for kind, (reduce, *_) in kinds.items()}
    text = "; ".join(f"lowest {kind}: {shorten(name, 24)}" for kind, name in best.items())
    title(fig, f"{text} (domains in common: {len(domains)})")
    entries = [entry(f"{shorten(name, 44)} ({run.info['stage']})", **look[name]) for run, name in zip(runs, names)]
    entries += [entry(kind, ls=ls, lw=lw) for kind, (_, ls, lw) in kinds.items()]
    legend(fig, [*entries, entry("finished model", ls="", marker="*", ms=14)])
    return fig


def common_domains(runs: list[Metrics]) -> list[str]:
    """The domains that all runs have; ValueError if there is none."""
    domains = [d for d in runs[0].domains if all(d in run.domains for run in runs)]
    if not domains:
        raise ValueError(f"nothing to compare: no domain is in all of {', '.join(str(run.path) for run in runs)}")
    return domains


# --- the command

FIGURES = {"weights": weights_figure, "loss": loss_figure, "sparsity": sparsity_figure, "gates": gates_figure}


def main():
    with user_errors():
        parser = Parser(__doc__)
        parser.add_argument("runs", nargs="+", metavar="RUN", help="The directory of a run, such as out/toy_prune.")
        where = "The directory for comparison.png, or for the pictures of a single run. Default: the (first) run."
        parser.add_argument("--out", type=some_path, metavar="DIR", help=where)
        args = parser.parse_args()
        runs = list({Path(path).resolve(): read_metrics(path) for path in args.runs}.values())
        common_domains(runs)  # raises an error before anything is written
        out = args.out or runs[0].path
        for directory in {out} if len(runs) == 1 else {out, *(run.path for run in runs)}:
            for name in (*FIGURES, "comparison"):
                check_output(directory / f"{name}.png")
        out.mkdir(parents=True, exist_ok=True)

    for run in runs:
        if run.left_out:
            note = f"lines that are left out: {len(run.left_out)}; the first: {one_line(run.left_out[0], 500)}"
            print(f"plot.py: {run.path}: {note}", file=sys.stderr)
    pictures = {}
    for run in runs:
        directory = out if len(runs) == 1 else run.path
        pictures |= {directory / f"{name}.png": figure(run) for name, figure in FIGURES.items()}
    if len(runs) > 1:
        pictures[out / "comparison.png"] = comparison_figure(runs)
    for path, fig in pictures.items():
        if fig is not None:
            with user_errors():
                fig.savefig(path)
            print(path, flush=True)


if __name__ == "__main__":
    command(main)
