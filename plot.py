"""Plot: a run's pictures, from nothing but its metrics.jsonl; also while the run is still going on.

    python plot.py out/toy_prune                        # weights, loss, sparsity and gates, as far as they apply
    python plot.py out/toy_prune out/toy_continue       # the same for each run, and comparison.png in the first one
    python plot.py out/a out/b --out figures            # comparison.png in figures/

| picture | what it answers | paper |
|---|---|---|
| weights.png | which data did the schedule ask for, against the reference ratio p? | eq. 3, 5 and p_R |
| loss.png | did each domain get below its reference loss, and did the scaling law see it coming? | eq. 4, 3.2 |
| sparsity.png | do the gates meet the ramping target and make up their minds, what do lambda and phi do? | eq. 1 |
| gates.png | which layers, KV heads, feed-forward and hidden dimensions were kept? | fig. 1 |
| comparison.png | which of several runs is better, on average and on its worst domain? | table 1 |

Every `*_figure` function takes a `Run` (or a list) and returns a matplotlib Figure, or None when the run has nothing
to show there, so a notebook can call them. Colours are Okabe-Ito's, which colour-blind readers can tell apart.
"""

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # no pyplot: no global state, no display, Agg writes the PNG
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from scipy.optimize import isotonic_regression

from plumbing.command_line import Parser, user_errors

COLORS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000"]  # Okabe-Ito without its yellow
MARKERS = ["", "o", "s", "^", "D", "v", "X", "P"]  # a second round of colours gets circles, a third squares, ...
GRANULARITIES = {"layer": "layers", "hidden": "hidden dimensions", "head": "KV heads", "ffn": "feed-forward dimensions"}
SHAPE = {"layer": "n_layer", "hidden": "d_model", "head": "n_kv_head", "ffn": "d_ffn"}  # granularity -> config key
SIZE, DPI, GREY = (12, 6.75), 120, "#666666"
STYLE = {
    "font.size": 14,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 15,
    "axes.titlelocation": "left",
    "axes.labelsize": 14,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.titlesize": 17,
    "legend.fontsize": 13,
    "legend.frameon": False,
    "lines.linewidth": 2.2,
    "text.parse_math": False,  # a domain may be called "$"
}


# --- metrics.jsonl -> Run


@dataclass
class Run:
    """What metrics.jsonl says: the `run` line, the `train` and `eval` lines by rising step, the `end` line or None."""

    path: Path
    info: dict = field(default_factory=dict)
    train: list[dict] = field(default_factory=list)
    evals: list[dict] = field(default_factory=list)
    end: dict | None = None

    @property
    def name(self) -> str:
        """The run's name, or its directory's."""
        return self.info.get("name") or self.path.resolve().name

    @property
    def domains(self) -> list[str]:
        """The domains, in the order of the run."""
        return self.info["domains"]

    @property
    def pruning(self) -> bool:
        """Whether there are gates."""
        return self.info["stage"] == "prune"


def read_metrics(path: str | Path) -> Run:
    """The run in directory `path`. A half-written line is skipped: the run may be going on."""
    run = Run(Path(path))
    file = run.path / "metrics.jsonl"
    if not run.path.is_dir():
        near = sorted(str(p.parent) for p in run.path.parent.glob("*/metrics.jsonl"))
        raise ValueError(f"{path}: no such run" + (f"; there are {', '.join(near)}" if near else ""))
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a directory that train.py wrote to is needed")
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            kind, step = record["type"], record.get("step")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
        if kind == "run":
            run.info = record
        elif kind == "end":
            run.end = record
        elif kind in ("train", "eval") and step is not None:
            (run.train if kind == "train" else run.evals).append(record)
    missing = [key for key in ("stage", "steps", "domains", "tokens_per_step") if key not in run.info]
    if missing:
        raise ValueError(f"{file}: not the metrics of a run: no `run` line with {', '.join(missing)}")
    if not run.evals:
        raise ValueError(f"{file}: no evaluation yet, so there is nothing to draw; try again after the first one")
    return run


def series(records: list[dict], *keys: str) -> np.ndarray:
    """records -> float array of record[key][key]...; what is absent or null becomes NaN, a gap in the line."""

    def at(record):
        for key in keys:
            record = record.get(key) if isinstance(record, dict) else None
        return record

    return np.array([at(r) for r in records], dtype=float)


def final(run: Run, key: str, domain: str) -> float:
    """The last word on a domain: the end line (of a pruning run: the extracted model), else the latest evaluation."""
    values = series([*run.evals, run.end or {}], key, domain)
    values = values[np.isfinite(values)]
    return values[-1] if len(values) else np.nan


# --- small helpers of all pictures


def styles(names: list[str]) -> dict[str, dict]:
    """name -> colour and marker, the same in every picture of a run."""
    return {
        name: {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i // len(COLORS) % len(MARKERS)]}
        for i, name in enumerate(names)
    }


def line(ax, x, y, marker="", **style) -> Line2D:
    """A line that is also there when it has one or two points."""
    few = np.isfinite(y).sum() < 3
    return ax.plot(x, y, marker="o" if few and not marker else marker, markevery=max(1, len(x) // 10), **style)[0]


def new_figure(rows=1, columns=1, height=SIZE[1], **grid):
    """A figure of slide width and its axes, (rows, columns)."""
    fig = Figure(figsize=(SIZE[0], height), dpi=DPI, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1, wspace=0.02, hspace=0.02)
    return fig, fig.subplots(rows, columns, squeeze=False, **grid)


def label(ax, title="", x="", y=""):
    """Title, axis labels with units, and a light grid."""
    ax.set(xlabel=x, ylabel=y)
    ax.set_title(title, fontweight="bold")
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=12, color=GREY)


def step_axis(run: Run) -> str:
    """The label of an axis of steps."""
    return f"step ({run.info['tokens_per_step']:,} tokens each)"


def count_axis(ax, steps: float):
    """x from 0 to `steps`, with few whole numbers: 0, 1,000, 2,000."""
    ax.set_xlim(0, max(steps, 1))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))


def heading(fig, run: Run, what: str):
    """The figure's title: which run, what, and how far it is."""
    last = max(r["step"] for r in [*run.train, *run.evals])
    so_far = "" if run.end else f", step {last:,} of {run.info['steps']:,}"
    fig.suptitle(f"{shorten(run.name, 40)}: {what}{so_far}", x=0.012, ha="left")


def shorten(text: str, length: int) -> str:
    """The beginning of a text that is too long."""
    return text if len(text) <= length else text[: length - 1] + "…"


def legend(fig, handles: list):
    """Below the axes: one row if the entries fit, else as many columns as the longest entry allows."""
    widths = [len(h.get_label()) + 7 for h in handles]  # in letters
    columns = len(handles) if sum(widths) <= 112 else max(1, 112 // max(widths))
    fig.legend(handles=handles, loc="outside lower center", ncols=columns)


def key(text: str, **style) -> Line2D:
    """An entry of the legend."""
    return Line2D([], [], label=text, **{"color": "#333333", **style})


def spread(positions: np.ndarray, gap: float, low=0.0, high=1.0) -> np.ndarray:
    """Positions moved as little as possible (least squares) until neighbours are `gap` apart, for labels."""
    order, steps = np.argsort(positions, kind="stable"), gap * np.arange(len(positions))
    start = isotonic_regression(positions[order] - steps).x  # rising, so neighbours are a gap apart, and closest to it
    moved = np.empty(len(positions))
    moved[order] = np.clip(start, low, max(low, high - steps[-1])) + steps
    return moved


def zoom(ax, lines: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """y limits in which the last 40 % of the lines fill at least a quarter of the height; returns the upper one.

    The first losses of a random model, or the bump while gates close, would otherwise flatten what matters.
    """
    everything = np.concatenate([y for _, y in lines])
    late = np.concatenate([y[x >= 0.6 * x[-1]] if len(x) > 5 else y for x, y in lines])
    late, everything = late[np.isfinite(late)], everything[np.isfinite(everything)]
    if not len(late):
        return np.inf
    low = min(late.min(), everything.min())
    span = min(everything.max() - low, 4 * (late.max() - low)) or 0.1 * abs(low) or 1.0
    ax.set_ylim(low - 0.08 * span, low + 1.08 * span)
    return low + 1.08 * span


# --- the pictures


@matplotlib.rc_context(STYLE)
def weights_figure(run: Run) -> Figure:
    """Data weights q (solid, in force from each evaluation to the next) and reference ratio p (dashed)."""
    fig, [[ax]] = new_figure()
    steps, look = series(run.evals, "step"), styles(run.domains)
    q = {d: 100 * series(run.evals, "weights", d) for d in run.domains}
    p = {d: 100 * series(run.evals, "ratio", d) for d in run.domains}
    for d in run.domains:
        line(
            ax,
            steps,
            p[d],
            **look[d] | {"marker": ""},
            ls="--",
            lw=1.3,
            alpha=0.8,
            ds="steps-post",
            clip_on=False,
            gid=f"ratio {d}",
        )
        line(ax, steps, q[d], **look[d], ds="steps-post", clip_on=False, gid=f"weight {d}")
    shown = np.concatenate([*q.values(), *p.values()])
    shown = shown[np.isfinite(shown) & (shown > 0)]
    log = len(shown) > 0 and shown.max() > 8 * shown.min()
    label(ax, "", step_axis(run), "share of the next batches (%)" + (", log scale" if log else ""))
    if log:  # a domain at 2 % that doubles is as much news as one at 60 % that halves
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.minorticks_off()
    elif len(shown):
        room = 0.1 * np.ptp(shown) or 0.1 * shown[0]
        ax.set_ylim(max(0, shown.min() - room), shown.max() + room)
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
    count_axis(ax, steps[-1])

    ends = {d: v[np.isfinite(v)][-1] for d, v in q.items() if np.isfinite(v).any() and (not log or np.nanmin(v) > 0)}
    if ends:  # direct labels, right of the axes and kept apart
        size = min(14, 330 / len(ends))
        to_axes = ax.transData + ax.transAxes.inverted()
        at = np.array([to_axes.transform((steps[-1], y))[1] for y in ends.values()])
        for (d, y), here, there in zip(ends.items(), at, spread(at, 1.25 * size / 380)):
            text = f"{shorten(d, 18)}  {y:.{1 if y >= 10 else 2}f} %"
            ax.text(1.045, there, text, transform=ax.transAxes, va="center", fontsize=size)
            ax.plot([1.003, 1.038], [here, there], transform=ax.transAxes, clip_on=False, color=look[d]["color"])
    heading(fig, run, f"data weights, {schedule(run)}")
    legend(fig, [key("data weight q"), key("reference ratio p", ls="--", lw=1.3)])
    return fig


def schedule(run: Run) -> str:
    """The schedule and its additions in words."""
    name = run.info.get("schedule", "unknown")
    additions = {"dro": ("reference", "ratio"), "sheared": ("reference",)}.get(name, ())  # that it makes use of
    parts = [w for w in additions if run.info.get(f"dynamic_{w}")]
    return f"{name} schedule" + (f", dynamic {' and '.join(parts)}" if parts else "")


def forecasts(run: Run, domain: str) -> list[dict]:
    """Evaluations whose fitted curve is worth drawing: the last by half of the run, to be judged, and the latest."""
    end = run.info["steps"]
    fitted = [e for e in run.evals if e["step"] < end and ((e.get("curve") or {}).get("loss") or {}).get(domain)]
    early = [e for e in fitted if e["step"] <= end / 2] or fitted[:1]
    return early[-1:] + [e for e in fitted[-1:] if e is not early[-1] and run.evals[-1]["step"] < end]


@matplotlib.rc_context(STYLE)
def loss_figure(run: Run) -> Figure:
    """A panel per domain: validation loss, reference loss, what the scaling law predicted and what came true."""
    n = len(run.domains)
    columns = n if n <= 3 else 2 if n == 4 else 3 if n <= 6 else 4
    rows = -(-n // columns)
    fig, grid = new_figure(rows, columns, height=max(SIZE[1], 2.1 * rows))
    look, steps = styles(run.domains), series(run.evals, "step")
    some = set()  # what the legend must explain
    for ax, d in zip(grid.flat, run.domains):
        loss, reference = series(run.evals, "loss", d), series(run.evals, "reference", d)
        line(ax, steps, loss, color=look[d]["color"], gid="loss")
        seen = [(steps, loss), (steps, reference)]
        if np.isfinite(reference).any():
            until = [*steps, max(steps[-1], run.info["steps"])], [*reference, reference[-1]]
            ax.plot(*until, color="black", ls="--", lw=1.5, ds="steps-post", gid="reference")
            some.add("reference")
        notes = []
        for e in (found := forecasts(run, d)):
            x, y = np.array(e["curve"]["step"], float), np.array(e["curve"]["loss"][d], float)
            target = e["prediction"][d] if (e.get("prediction") or {}).get(d) is not None else y[-1]
            style = {"color": "black", "alpha": 1 if e is found[-1] else 0.5, "zorder": 4}
            ax.plot(x, y, ls=":", lw=2.2, gid="curve", **style)
            ax.plot(x[:1], y[:1], "o", ms=6, mfc="white", mew=1.5, gid="forecast", **style)
            ax.plot(x[-1:], [target], "D", ms=10, mfc="none", mew=1.8, gid="prediction", clip_on=False, **style)
            seen.append((x, np.append(y, target)[-len(x) :]))
            notes = [f"◇ {target:.3f}"]
            some.add("prediction")
        end = series([run.end or {}], "loss", d)
        if np.isfinite(end[0]):
            ax.plot([run.end["step"]], end, "*", ms=14, color=look[d]["color"], gid="end", clip_on=False, zorder=3)
            seen.append((np.zeros(1), end))
            notes.append(f"★ {end[0]:.3f}")
            some.add("end")
        elif np.isfinite(loss).any():
            notes.append(f"now {loss[np.isfinite(loss)][-1]:.3f}")
        label(ax)
        top = zoom(ax, seen)
        if np.isfinite(loss).any() and np.nanmax(loss) > top:  # say how far the line goes beyond the top
            back = steps[min(np.flatnonzero(loss > top)[-1] + 1, len(steps) - 1)]
            style = {"textcoords": "offset points", "va": "top", "fontsize": 11, "color": GREY}
            ax.annotate(f"↑ {np.nanmax(loss):.2f}", (back, top), (5, -1), **style)
        count_axis(ax, run.info["steps"])
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.set_title(shorten(d, 70 // columns), fontweight="bold", pad=22)
        ax.annotate("    ".join(notes), (0, 1), (0, 6), "axes fraction", textcoords="offset points", fontsize=13)
    for ax in grid.flat[n:]:
        ax.remove()
    for ax in grid[-1][: n - columns * (rows - 1)]:
        ax.set_xlabel(step_axis(run) if columns < 4 else "step")
    fig.supylabel("validation loss (nats/token)", fontsize=14)
    heading(fig, run, "validation loss by domain")
    entries = {
        "reference": key("reference loss", ls="--", lw=1.5, color="black"),
        "prediction": key("predicted from ○ on", ls=":", marker="D", ms=9, mfc="none", color="black"),
        "end": key("extracted model" if run.pruning else "end of the run", ls="", marker="*", ms=14),
    }
    first = key("validation loss" + (", gated model" if run.pruning else ""))
    legend(fig, [first, *(entry for name, entry in entries.items() if name in some)])
    return fig


@matplotlib.rc_context(STYLE)
def sparsity_figure(run: Run) -> Figure | None:
    """Per granularity: expected sparsity s against its target t, undecided gates, and the multipliers."""
    pruned = [g for g in GRANULARITIES if np.isfinite(series(run.train, "sparsity", g)).any()]
    panels = {
        "sparsity": ("expected sparsity s and target t", "share of gates at 0 (%)", 100),
        "undecided": ("undecided: P(z = 0) in .05 … .95", "share of gates (%)", 100),
        "lambda": ("multiplier of s − t", "λ (nats)", 1),
        "phi": ("multiplier of (s − t)²", "φ (nats)", 1),
    }
    panels = {k: v for k, v in panels.items() if any(np.isfinite(series(run.train, k, g)).any() for g in pruned)}
    if not pruned:
        return None
    rows, columns = (1, len(panels)) if len(panels) < 3 else (2, 2)
    fig, grid = new_figure(rows, columns)
    steps, look = series(run.train, "step"), styles(list(GRANULARITIES))
    for ax, (k, (title, unit, scale)) in zip(grid.flat, panels.items()):
        for g in pruned:
            if k == "sparsity":
                target = scale * series(run.train, "target_sparsity", g)
                line(ax, steps, target, color=look[g]["color"], ls="--", lw=1.4, gid=f"target {g}")
            line(ax, steps, scale * series(run.train, k, g), color=look[g]["color"], gid=f"{k} {g}")
        label(ax, title, "", unit)
        count_axis(ax, steps[-1])
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}".replace("-", "−")))
        if scale == 100:
            ax.set_ylim(0, 1.06 * max(ax.dataLim.y1, 1))
    for ax in grid.flat[len(panels) :]:
        ax.remove()
    for ax in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        ax.set_xlabel(step_axis(run))
    heading(fig, run, "pruning constraint")
    entries = [key(GRANULARITIES[g], color=look[g]["color"]) for g in pruned]
    legend(fig, [*entries, key("target t", ls="--", lw=1.4)])
    return fig


@matplotlib.rc_context(STYLE)
def gates_figure(run: Run) -> Figure | None:
    """Heat map of the latest deterministic gates: a row per layer, then the hidden dimensions, which all layers share.

    Heads and feed-forward dimensions of a layer whose own gate is 0 are gone with it: masked, so drawn grey.
    """
    records = [r for r in [*run.evals, run.end or {}] if any((r.get("gates") or {}).values())]
    if not records:
        return None
    step, gates = records[-1]["step"], {k: np.array(v, float) for k, v in records[-1]["gates"].items() if v}
    shape = run.info.get("source") or {}
    blocks = [g for g in ("layer", "head", "ffn") if g in gates]
    gone = gates["layer"] == 0 if "layer" in gates else None
    cmap = LinearSegmentedColormap.from_list("kept", ["#ffffff", "#9ecae1", "#0072B2", "#004166"])
    cmap = cmap.with_extremes(bad="#d9d9d9")

    fig = Figure(figsize=SIZE if blocks else (SIZE[0], 3), dpi=DPI, layout="constrained")
    fig.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    heights = [5] * bool(blocks) + [1] * ("hidden" in gates)
    widths = [{"layer": 1.3, "head": 5, "ffn": 8}[g] for g in blocks] or [1]
    spec = fig.add_gridspec(len(heights), len(widths), height_ratios=heights, width_ratios=widths)
    axes = {g: fig.add_subplot(spec[0, i]) for i, g in enumerate(blocks)}
    if "hidden" in gates:
        axes["hidden"] = fig.add_subplot(spec[-1, :])
    for g, ax in axes.items():
        z = gates[g].reshape(1, -1) if g == "hidden" else gates[g].reshape(len(gates[g]), -1)  # (layers or 1, columns)
        if g in ("head", "ffn") and gone is not None:
            z = np.ma.masked_array(z, np.broadcast_to(gone[:, None], z.shape))
        rows, n = z.shape
        width = n if g in ("layer", "head") else shape.get(SHAPE[g], n)  # bins are labelled by dimension
        left = -0.5 if g in ("layer", "head") else 0
        image = ax.imshow(z, cmap=cmap, vmin=0, vmax=1, aspect="auto", extent=(left, left + width, rows - 0.5, -0.5))
        for edge in range(1, rows):
            ax.axhline(edge - 0.5, color="#cccccc", lw=0.8)
        for edge in range(1, n if g == "head" else 1):
            ax.axvline(edge - 0.5, color="#cccccc", lw=0.8)
        ax.spines[:].set_visible(True)
        ax.spines[:].set_color(GREY)
        ax.set_title(kept(run, g), fontweight="bold", fontsize=14)
        ax.tick_params(labelsize=12, color=GREY)
        ax.yaxis.set_major_locator(MaxNLocator(min(rows, 12), integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
        if g == "layer":
            ax.set_xticks([])
        else:
            ax.set_xlabel({"head": "KV head", "ffn": "feed-forward dimension", "hidden": "hidden dimension"}[g])
        if g == "hidden":
            ax.set_yticks([])
        elif g == blocks[0]:
            ax.set_ylabel("layer")
        else:
            ax.set_yticklabels([])
    bar = fig.colorbar(image, ax=list(axes.values()), shrink=0.8, aspect=30, pad=0.02)
    bar.set_label("gate z")
    bar.ax.tick_params(labelsize=12)
    bar.outline.set_edgecolor(GREY)
    meaning = "white: removed" + (", grey: gone with its layer" if gone is not None and gone.any() else "")
    text = f"{shorten(run.name, 40)}: gates at step {step:,} of {run.info['steps']:,} ({meaning})"
    fig.suptitle(text, x=0.012, ha="left")
    return fig


def kept(run: Run, granularity: str) -> str:
    """'KV heads 4 → 3', as far as the run says."""
    k, source, target = SHAPE[granularity], run.info.get("source") or {}, run.info.get("target") or {}
    name = {"ffn": "feed-forward", "hidden": "hidden"}.get(granularity, GRANULARITIES[granularity])
    space = "\n" if granularity == "layer" else " "  # a narrow block
    return f"{name}{space}{source[k]:,} → {target[k]:,}" if k in source and k in target else name


@matplotlib.rc_context(STYLE)
def comparison_figure(runs: list[Run]) -> Figure:
    """Average and worst-domain validation loss over tokens, and the final losses, on the domains all runs have.

    In bits per byte if every run has them, which also compares across tokenizers, else in nats per token.
    """
    domains = common_domains(runs)
    whole = all(np.isfinite(final(run, "bits_per_byte", d)) for run in runs for d in domains)
    measure, unit = ("bits_per_byte", "bits per byte") if whole else ("loss", "nats/token")
    names = run_names(runs)
    look, n_bars = styles(names), (len(domains) + 1) * len(runs)
    fig, [[ax, bars]] = new_figure(1, 2, height=max(SIZE[1], 0.13 * n_bars), width_ratios=(1.15, 1))

    longest = max(series(run.evals, "tokens")[-1] for run in runs)
    units = ((1e9, " (billions)"), (1e6, " (millions)"), (1e3, " (thousands)"), (0, ""))
    scale, word = next((s or 1, w) for s, w in units if longest >= s)
    log = longest > 12 * min(series(run.evals, "tokens")[-1] for run in runs)
    seen = []
    for run, name in zip(runs, names):
        x = series(run.evals, "tokens") / scale
        values = np.array([series(run.evals, measure, d) for d in domains])  # (domains, evaluations)
        ends = np.array([series([run.end or {}], measure, d)[0] for d in domains])
        for how, ls, lw in ((np.mean, "-", 2.4), (np.max, "--", 1.7)):
            y = how(values, axis=0)  # NaN where a domain is missing: an average over fewer domains is another measure
            line(ax, x, y, **look[name], ls=ls, lw=lw, gid=f"{how.__name__} {name}")
            seen.append((x, y))
            if np.isfinite(ends).all():
                at = run.info["tokens_per_step"] * run.end["step"] / scale
                ax.plot([at], [how(ends)], "*", ms=15, color=look[name]["color"], mec="white", clip_on=False, zorder=5)
                seen.append((np.zeros(1), np.array([how(ends)])))
    label(ax, "average and worst domain", f"tokens{word}" + (", log scale" if log else ""))
    ax.set_ylabel(f"validation loss ({unit})")
    zoom(ax, seen)
    if log:
        ax.set_xscale("log", nonpositive="mask")
        ax.xaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_xlim(left=0)
        ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,g}"))

    groups, height = [*domains, "average"], 0.8 / len(runs)
    for i, (run, name) in enumerate(zip(runs, names)):
        lengths = np.array([final(run, measure, d) for d in domains])
        lengths = np.append(lengths, lengths.mean())
        at = np.arange(len(groups)) + (i - (len(runs) - 1) / 2) * height
        hatch = "//" if look[name]["marker"] else ""
        drawn = bars.barh(at, lengths, 0.9 * height, color=look[name]["color"], hatch=hatch, ec="white", lw=0)
        room = 340 / n_bars  # points a bar
        if room > 7:
            text = [f"{v:.3f}" if np.isfinite(v) else "" for v in lengths]
            bars.bar_label(drawn, text, padding=3, fontsize=min(12, 0.9 * room))
    bars.axhline(len(domains) - 0.5, color=GREY, lw=0.8)
    bars.set_yticks(np.arange(len(groups)), [shorten(g, 16) for g in groups])
    label(bars, "at the end" if all(run.end for run in runs) else "at the end, or so far", f"validation loss ({unit})")
    bars.grid(visible=False)
    bars.set_ylim(len(groups) - 0.5, -0.5)
    bars.margins(x=0.14)
    bars.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    text = f"comparison of {len(runs)} runs on {len(domains)} domain{'s' * (len(domains) > 1)}"
    if any(set(run.domains) != set(domains) for run in runs):
        text += ", those that all runs have"
    fig.suptitle(text, x=0.012, ha="left")
    stages = len({run.info["stage"] for run in runs}) > 1
    entries = [
        key(shorten(name, 44) + (f" ({run.info['stage']})" if stages else ""), **look[name])
        for run, name in zip(runs, names)
    ]
    end = "end" + (" (pruned: the extracted model)" if any(run.pruning for run in runs) else "")
    entries += [key("average"), key("worst domain", ls="--", lw=1.7)]
    if any(run.end for run in runs):
        entries.append(key(end, ls="", marker="*", ms=14))
    legend(fig, entries)
    return fig


def common_domains(runs: list[Run]) -> list[str]:
    """Domains that all runs have; ValueError if there is none."""
    domains = [d for d in runs[0].domains if all(d in run.domains for run in runs)]
    if not domains:
        raise ValueError(f"nothing to compare: no domain is in all of {', '.join(str(run.path) for run in runs)}")
    return domains


def run_names(runs: list[Run]) -> list[str]:
    """Names if they differ, else the directories' names, else their paths."""
    for names in ([r.name for r in runs], [r.path.resolve().name for r in runs], [str(r.path) for r in runs]):
        if len(set(names)) == len(names):
            break
    return names


# --- the command


FIGURES = {"weights": weights_figure, "loss": loss_figure, "sparsity": sparsity_figure, "gates": gates_figure}


def main():
    with user_errors():
        parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("runs", nargs="+", metavar="RUN", help="directory of a run, as in out/toy_prune")
        parser.add_argument("--out", type=Path, metavar="DIR", help="for comparison.png, or for one run's pictures")
        args = parser.parse_args()
        runs = list({Path(path).resolve(): read_metrics(path) for path in args.runs}.values())
        common_domains(runs)  # complains before anything is written
        out = args.out or runs[0].path
        out.mkdir(parents=True, exist_ok=True)

    pictures = {}
    for run in runs:
        directory = out if len(runs) == 1 else run.path
        pictures |= {directory / f"{name}.png": figure(run) for name, figure in FIGURES.items()}
    if len(runs) > 1:
        pictures[out / "comparison.png"] = comparison_figure(runs)
    for path, fig in pictures.items():
        if fig is not None:
            with user_errors():
                fig.savefig(path, dpi=DPI)
            print(path, flush=True)


if __name__ == "__main__":
    main()
