"""plot.py: the pictures show the numbers of metrics.jsonl, of whole, running and odd runs; mistakes are one line."""

import json
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from matplotlib.text import Text
from processes import fresh, script

import plot

TOY = ["cpp", "python", "english", "german", "markup"]
SEVEN = ["CommonCrawl", "C4", "GitHub", "Book", "Wikipedia", "ArXiv", "StackExchange"]
SEVEN_RATIO = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
SOURCE = {"n_layer": 6, "d_model": 128, "n_head": 4, "n_kv_head": 4, "head_dim": 32, "d_ffn": 344}
TARGET = {"n_layer": 4, "d_model": 96, "n_head": 3, "n_kv_head": 3, "head_dim": 32, "d_ffn": 256}
GATED = {"layer": 1 - 4 / 6, "hidden": 0.25, "head": 0.25, "ffn": 1 - 256 / 344}


def records(stage="continue", domains=TOY, ratio=None, steps=200, stop=None, schedule="dro", seed=0, **info):
    """The lines of a plausible run: power-law losses with noise, weights that follow the excess losses, ramping gates.

    `stop`: the run is only that far and has no end line.
    """
    rng, n = np.random.default_rng(seed), len(domains)
    ratio = np.array(ratio or [1 / n] * n)
    level, tokens_per_step = rng.uniform(1.1, 2.0, n), 2048
    start = {"pretrain": 4.0, "prune": 0.9, "continue": 0.6}[stage]
    slope = rng.uniform(0.5, 1.1, n) * (1.3 if stage == "pretrain" else 1)
    dynamic = schedule == "dro"
    by_domain = lambda values: dict(zip(domains, (None if v is None else float(v) for v in values)))  # noqa: E731
    clean = lambda t: level + start * (1 + 60 * t / steps) ** (-0.5 * slope)  # noqa: E731
    bump = lambda t: 1.5 * np.exp(-(((t / steps - 0.2) / 0.12) ** 2)) * (stage == "prune")  # noqa: E731
    yield {
        "type": "run",
        "name": f"toy_{stage}",
        "stage": stage,
        "steps": steps,
        "tokens_per_step": tokens_per_step,
        "domains": domains,
        "schedule": schedule,
        "dynamic_reference": dynamic,
        "dynamic_ratio": dynamic,
        "source": SOURCE,
        "target": TARGET if stage == "prune" else None,
        "parameters": 1250000,
    } | info
    weights, p, reference = ratio.copy(), ratio.copy(), None if stage == "pretrain" else level + 0.25
    keep = {g: rng.permutation(np.linspace(-1, 1, s)) for g, s in (("layer", 6), ("hidden", 32))}
    keep |= {g: rng.permuted(np.tile(np.linspace(-1, 1, s), (6, 1)), axis=1) for g, s in (("head", 4), ("ffn", 43))}
    keep |= {"ffn": np.sort(keep["ffn"] + rng.normal(0, 0.4, (6, 43)), axis=1)[:, rng.permutation(43)]}
    for step in range(0, (stop or steps) + 1, 5):
        tokens = step * tokens_per_step
        loss = clean(step) + bump(step) + rng.normal(0, 0.012, n)
        ramp = min(1, step / (0.2 * steps))
        sparsity = {
            g: max(0.0, t * ramp * (1 - 0.5 * np.exp(-step / 20)) + rng.normal(0, 0.004)) for g, t in GATED.items()
        }
        if step and step % 5 == 0:
            line = {"type": "train", "step": step, "tokens": tokens, "loss": float(loss @ weights), "lr": 1e-3}
            line |= {"grad_norm": 0.7, "weights": by_domain(weights)}
            line["domain_loss"] = by_domain([None, *loss[1:]])
            if stage == "prune":
                line |= {
                    "constraint": 0.01,
                    "sparsity": sparsity,
                    "target_sparsity": {g: t * ramp for g, t in GATED.items()},
                }
                line["undecided"] = {g: 0.6 * np.exp(-step / (40 + 20 * i)) for i, g in enumerate(GATED)}
                line["lambda"] = {g: (i - 1.5) * 0.3 * (1 - np.exp(-step / 30)) for i, g in enumerate(GATED)}
                line["phi"] = {g: 200 + (3 + i) * (1 - np.exp(-step / 50)) for i, g in enumerate(GATED)}
            yield line
        if step % 10 == 0 and step:
            fitted, prediction, curve = step >= 0.1 * steps, [None] * n, None
            if fitted and dynamic:
                at = np.linspace(step, steps, 20)
                off = 1 + rng.normal(0, 0.3, n) * (1 - step / steps) ** 2
                lines = np.array([level + (clean(s) + bump(s) - level) * off for s in at]).T  # (domains, points)
                prediction = lines[:, -1]
                curve = {"step": [float(s) for s in at], "loss": dict(zip(domains, lines.tolist()))}
                reference = prediction if reference is None else np.minimum(reference, prediction)
            if reference is not None and schedule != "constant":
                weights = ratio * np.exp(5 * (loss - reference))
                weights /= weights.sum()
                p = 0.1 * weights + 0.9 * p if dynamic and step > 0.2 * steps else p
            line = {"type": "eval", "step": step, "tokens": tokens, "parameters": 1.25e6}
            line |= {"domain_tokens": {d: int(tokens / n) for d in domains}, "loss": by_domain(loss)}
            line |= {"bits_per_byte": by_domain(loss / np.log(2)), "prediction": by_domain(prediction), "curve": curve}
            line |= {"reference": by_domain([None] * n if reference is None else reference)}
            line |= {"epochs": by_domain(tokens / 1e5 * ratio)}
            line |= {"ratio": by_domain(p), "weights": by_domain(weights)}
            if stage == "prune":
                cut = {g: 2 * t * ramp - 1 for g, t in GATED.items()}
                gates = {g: np.clip(0.75 + k - cut[g], 0, 1) * (k >= cut[g]) for g, k in keep.items()}
                line |= {"gates": {g: z.tolist() for g, z in gates.items()}, "sparsity": sparsity}
            yield line
    if stop is None:
        extra = 0.06 if stage == "prune" else 0.0
        bits = by_domain((loss + extra) / np.log(2))
        end = {"type": "end", "step": steps, "loss": by_domain(loss + extra), "bits_per_byte": bits}
        yield end | {"parameters": 491000}


def write(directory: Path, lines, tail: str = "") -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines) + tail, encoding="utf-8")
    return directory


def png_size(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


def find(ax, gid):
    """The one line of the axes with this gid."""
    [line] = [artist for artist in ax.lines if artist.get_gid() == gid]
    return line


def evals(lines):
    return [r for r in lines if r["type"] == "eval"]


def column(lines, *keys):
    for key in keys:
        lines = [r[key] for r in lines]
    return np.array(lines, float)


def texts(fig):
    """Everything written in a figure, or in axes."""
    return [t.get_text() for t in fig.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()]


# --- reading


def test_read_metrics_skips_a_half_written_line(tmp_path):
    lines = list(records(stop=50))
    whole = plot.read_metrics(write(tmp_path / "a", lines))
    torn = plot.read_metrics(write(tmp_path / "b", lines, tail=json.dumps(lines[-1])[:70]))
    assert torn.evals == whole.evals == evals(lines)
    assert torn.train == [r for r in lines if r["type"] == "train"]
    assert torn.end is None


def test_a_run_that_went_on_is_what_it_is_now(tmp_path):
    """Its last `run` line counts: here the number of steps has grown."""
    first, *lines = records(stop=50)
    run = plot.read_metrics(write(tmp_path, [first, *lines, first | {"steps": 400}]))
    assert run.info["steps"] == 400


# --- what the pictures show


@pytest.mark.parametrize(
    "domains, ratio", [(TOY, None), (SEVEN, SEVEN_RATIO), ([f"lang_{i}" for i in range(10)], None)]
)
def test_weights(tmp_path, domains, ratio):
    lines = list(records(domains=domains, ratio=ratio))
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path, lines)))
    [ax] = fig.axes
    for d in domains:
        weight, p = find(ax, f"weight {d}"), find(ax, f"ratio {d}")
        assert np.allclose(weight.get_xdata(), column(evals(lines), "step"))
        assert np.allclose(weight.get_ydata(), 100 * column(evals(lines), "weights", d))
        assert np.allclose(p.get_ydata(), 100 * column(evals(lines), "ratio", d))
        mean = find(ax, f"mean {d}")
        assert np.allclose(mean.get_ydata()[[0, 1, 3, 9, -1]], [weight.get_ydata()[a:b].mean() for a, b in (
            (0, 1), (0, 3), (1, 6), (7, 12), (len(mean.get_ydata()) - 1, None))])  # fmt: skip
        assert p.get_linestyle() == ":" and weight.get_linestyle() == "-" and p.get_color() == weight.get_color()
        assert any(text.startswith(f"{d}  ") and text.endswith(" %") for text in texts(fig))
    assert ax.get_xlabel() == "step (2,048 tokens each)" and "(%)" in ax.get_ylabel()
    assert ax.get_yscale() == ("log" if ratio else "linear")
    looks = {(find(ax, f"mean {d}").get_color(), find(ax, f"mean {d}").get_marker()) for d in domains}
    assert len(looks) == len(domains)


def test_labels_never_overlap(tmp_path):
    for n in (1, 7, 24):
        lines = records("continue", [f"lang_{i}" for i in range(n)])
        fig = plot.weights_figure(plot.read_metrics(write(tmp_path, lines)))
        fig.draw_without_rendering()
        labels = [t for t in fig.axes[0].texts if t.get_text().startswith("lang_")]
        boxes = sorted((t.get_window_extent() for t in labels), key=lambda b: b.y0)
        assert len(boxes) == n
        assert all(low.y1 <= high.y0 + 1 for low, high in zip(boxes, boxes[1:]))
        assert boxes[-1].x1 <= fig.bbox.x1 and boxes[0].y0 >= 0


def test_weights_title_says_who_gained_and_whose_text_was_used_again(tmp_path):
    lines = list(records(domains=["a", "b"], ratio=[0.25, 0.75]))
    for i, e in enumerate(evals(lines)):  # the last weights are not drawn by any more
        last = i == len(evals(lines)) - 1
        e |= {"weights": {"a": 0.9, "b": 0.1} if last else {"a": 0.4, "b": 0.6}, "ratio": {"a": 0.25, "b": 0.75}}
        e |= {"loss": {"a": 2.0 + 0.1 * (i % 2), "b": 1.0}, "reference": {"a": 1.9, "b": 0.99}}
    lines[-2]["epochs"] = {"a": 0.9, "b": 1.37}
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", lines)))
    assert fig.get_suptitle() == "run: a falls behind and gets 40 % of all batches, 1.60 times its first share"
    assert fig.axes[0].get_title("left") == "dro schedule; the text of b has been used 1.37 times"
    first, *_, last = evals(lines)  # a mixture counts for as many steps as it was in force
    first["weights"] = {"a": 0.7, "b": 0.3}
    few = [line for line in lines if line["type"] != "eval" or line in (first, last) or line["step"] == 100]
    assert (first["step"], last["step"]) == (10, 200)
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", few)))
    assert "gets 54.2 % of all batches" in fig.get_suptitle()
    few = [line for line in lines if line["type"] != "eval" or line in (first, last) or line["step"] == 20]
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", few)))
    assert "gets 41.6 % of all batches" in fig.get_suptitle()
    for e in evals(lines):
        e["weights"], e["epochs"] = {"a": 0.25, "b": 0.75}, {"a": 0.1, "b": 0.4}
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", lines)))
    assert fig.get_suptitle() == "run: every domain keeps its share of the batches"
    assert fig.axes[0].get_title("left") == "dro schedule"
    at = lines.index(next(e for e in evals(lines) if e["step"] == 100)) + 1  # where the run goes on with another ratio
    new = {"a": 0.5, "b": 0.5}
    again = lines[0] | {"changed": {"ratio": {"was": {}, "now": new}}, "step": 100, "weights": new, "ratio": new}
    later = [line | {"weights": new} if line["type"] == "eval" else line for line in lines[at:]]
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", [*lines[:at], again, *later])))
    assert "gets 38.2 % of all batches" in fig.get_suptitle()  # 90 steps of 25 %, and 100 of 50 %
    for e in evals(lines):  # from so much nobody can gain much
        e["weights"], e["ratio"] = {"a": 0.001, "b": 0.999}, {"a": 0.004, "b": 0.996}
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path / "run", lines)))
    assert fig.get_suptitle() == "run: a falls behind and gets 0.1 % of all batches, 0.25 times its first share"


@pytest.mark.parametrize(
    "schedule, additions, stop, marks",
    [
        ("dro", (True, True), None, [4, 40, 110]),  # the law needs eleven points, and has one each ten steps
        ("dro", (True, True), 30, [4]),  # the run has neither these nor come to 20 % yet
        ("dro", (False, True), None, [40]),
        ("sheared", (True, True), None, [4, 110]),
        ("constant", (True, True), None, []),
        ("dro", (False, False), None, []),
    ],
)
def test_timeline_of_the_additions_that_the_run_uses(tmp_path, schedule, additions, stop, marks):
    switched = dict(zip(("dynamic_reference", "dynamic_ratio"), additions))
    fig = plot.weights_figure(plot.read_metrics(write(tmp_path, records(schedule=schedule, stop=stop, **switched))))
    [ax] = fig.axes
    vertical = [line.get_xdata() for line in ax.lines if list(line.get_ydata()) == [0, 1]]
    assert [x[0] for x in vertical] == pytest.approx(marks)
    assert [f"{x / 2:g} %" for x in marks] == [text for text in texts(ax) if text in ("2 %", "20 %", "55 %")]


def test_spread():
    assert np.allclose(plot.spread(np.array([0.5, 0.1]), 0.1), [0.5, 0.1])
    assert np.allclose(plot.spread(np.array([0.5, 0.5]), 0.1), [0.45, 0.55])
    assert np.allclose(plot.spread(np.array([1.0, 0.99, 0.2]), 0.1), [1.0, 0.9, 0.2])


@pytest.mark.parametrize("stage", ["continue", "prune"])
def test_loss_prediction_and_truth(tmp_path, stage):
    lines = list(records(stage))
    fig = plot.loss_figure(plot.read_metrics(write(tmp_path, lines)))
    half = next(e for e in evals(lines) if e["step"] == 100)  # the forecast of a finished run: made at half time
    assert [ax.get_title("left") for ax in fig.axes] == TOY
    for ax, d in zip(fig.axes, TOY):
        steps, losses = column(evals(lines), "step"), column(evals(lines), "loss", d)
        assert np.allclose(find(ax, "loss").get_data(), [steps, losses])
        assert np.allclose(find(ax, "reference loss").get_xdata(), [*steps, 200])
        assert np.allclose(find(ax, "reference loss").get_ydata()[:-1], column(evals(lines), "reference", d))
        x, mean = find(ax, "mean").get_data()
        assert np.allclose(x, steps) and np.allclose(mean[[0, 9]], [losses[0], losses[7:12].mean()])
        assert np.allclose(find(ax, "curve").get_data(), [half["curve"]["step"], half["curve"]["loss"][d]])
        assert np.allclose(find(ax, "prediction").get_data(), [[200], [half["prediction"][d]]])
        assert np.allclose(find(ax, "end").get_data(), [[200], [lines[-1]["loss"][d]]])
        low, high = ax.get_ylim()
        assert low < min(half["prediction"][d], lines[-1]["loss"][d]) and high > lines[-1]["loss"][d]
        assert f"◇ {half['prediction'][d]:.3f}    ★ {lines[-1]['loss'][d]:.3f}" in texts(fig)
    assert fig.get_supylabel() == "validation loss (nats/token)"
    assert ("validation loss (gated, while pruning)" in texts(fig)) == (stage == "prune")
    last = evals(lines)[-1]
    excess = {d: last["loss"][d] - last["reference"][d] for d in TOY}
    worst = max(excess, key=excess.get)
    assert " ".join(fig.get_suptitle().split()).endswith(
        f"{worst} has the largest excess over its reference loss, {excess[worst]:+.3f} nats/token"
    )


def test_loss_shows_where_the_reference_comes_from(tmp_path):
    lines = list(records(domains=["a", "b"]))
    for e in evals(lines):
        e["reference_is"] = {
            "a": "given" if e["step"] < 50 else "predicted" if e["step"] < 120 else "seen",
            "b": "given",
        }
    fig = plot.loss_figure(plot.read_metrics(write(tmp_path, lines)))
    a, b = fig.axes
    reference = column(evals(lines), "reference", "a")
    steps = column(evals(lines), "step")
    parts = {"given": steps < 50, "predicted": (steps >= 50) & (steps < 120), "seen": steps >= 120}
    looks = set()
    for source, here in parts.items():
        drawn = find(a, f"reference loss: {source}")
        assert np.array_equal(drawn.get_ydata()[:-1], np.where(here, reference, np.nan), equal_nan=True)
        looks.add(drawn.get_linestyle())
        assert f"reference loss: {source}" in texts(fig)
    assert len(looks) == 3 and "reference loss" not in texts(fig)
    assert [line.get_gid() for line in b.lines if "reference" in line.get_gid()] == ["reference loss: given"]
    assert [line.get_xdata()[0] for line in b.lines if line.get_gid() == "timeline"] == pytest.approx([4, 40, 110])


def test_names_in_any_script_and_with_an_underscore(tmp_path):
    names = ["_private", "中文", "العربية", "$a$"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # on a machine without a font for it
        runs = [plot.read_metrics(write(tmp_path / n, records(domains=names))) for n in names[:2]]
        for fig in (plot.weights_figure(runs[0]), plot.loss_figure(runs[0]), plot.comparison_figure(runs)):
            fig.draw_without_rendering()
            assert {tuple(text.get_fontfamily()) for text in fig.findobj(Text)} == {tuple(plot.STYLE["font.family"])}
    labels = [text.get_text().strip() for text in fig.legends[0].get_texts()]
    assert labels[:2] == ["_private (continue)", "中文 (continue)"]
    loss = plot.loss_figure(runs[0])
    assert [ax.get_title("left") for ax in loss.axes] == names


def test_a_long_title_stays_in_the_figure(tmp_path):
    run = plot.read_metrics(write(tmp_path / "a_run_with_a_rather_long_name_of_its_own", records()))
    for figure in (plot.weights_figure, plot.loss_figure):
        fig = figure(run)
        fig.draw_without_rendering()
        assert fig._suptitle.get_window_extent().x1 < fig.bbox.x1


def test_loss_of_a_pruned_run_without_gates(tmp_path):  # structures that were chosen before the run started
    fig = plot.loss_figure(plot.read_metrics(write(tmp_path, records("prune", target=None))))
    assert {"validation loss", "finished model"} <= set(texts(fig))


def test_loss_of_a_running_run_shows_the_newest_forecast(tmp_path):
    lines = list(records(stop=150))
    fig = plot.loss_figure(plot.read_metrics(write(tmp_path, lines)))
    assert find(fig.axes[0], "prediction").get_ydata() == [evals(lines)[-1]["prediction"]["cpp"]]
    assert not any(a.get_gid() == "end" for a in fig.axes[0].lines)
    assert fig.axes[0].get_xlim() == (0, 200) and "step 150 of 200" in fig.get_suptitle()


def test_a_forecast_of_before_the_run_was_made_longer_is_not_drawn(tmp_path):
    lines = list(records())
    for line in lines:
        if line["type"] == "eval" and line.get("curve"):
            line["curve"]["step"] = [step / 2 for step in line["curve"]["step"]]  # it ended at step 100
    fig = plot.loss_figure(plot.read_metrics(write(tmp_path, lines)))
    assert not any(line.get_gid() == "prediction" for line in fig.axes[0].lines)


def test_sparsity(tmp_path):
    lines = list(records("prune"))
    fig = plot.sparsity_figure(plot.read_metrics(write(tmp_path, lines)))
    gap = max(abs(lines[-3]["sparsity"][g] - lines[-3]["target_sparsity"][g]) for g in GATED)
    said = f"at step {lines[-3]['step']} expected sparsity is at most {100 * gap:.2g} percentage points"
    assert lines[-3]["type"] == "train" and said in fig.get_suptitle()
    train = [r for r in lines if r["type"] == "train"]
    sparsity, undecided, lam, phi = fig.axes
    for g in GATED:
        for ax, key in zip(fig.axes, ("sparsity", "undecided", "lambda", "phi")):
            assert np.allclose(find(ax, f"{key} {g}").get_xdata(), column(train, "step"))
        assert np.allclose(find(sparsity, f"sparsity {g}").get_ydata(), 100 * column(train, "sparsity", g))
        assert np.allclose(find(sparsity, f"target {g}").get_ydata(), 100 * column(train, "target_sparsity", g))
        assert np.allclose(find(undecided, f"undecided {g}").get_ydata(), 100 * column(train, "undecided", g))
        assert np.allclose(find(lam, f"lambda {g}").get_ydata(), column(train, "lambda", g))
        assert np.allclose(find(phi, f"phi {g}").get_ydata(), column(train, "phi", g))
    units = ["share of gates at 0 (%)", "share of gates (%)", "λ (nats)", "φ (nats)"]
    assert [ax.get_ylabel() for ax in fig.axes] == units


def test_gates(tmp_path):
    lines = list(records("prune"))
    fig = plot.gates_figure(plot.read_metrics(write(tmp_path, lines)))
    gates = evals(lines)[-1]["gates"]
    layer, head, ffn, hidden = (ax.images[0].get_array() for ax in fig.axes[:4])
    gone = np.array(gates["layer"]) == 0
    assert gone.sum() == 2
    assert np.allclose(layer[:, 0], gates["layer"]) and np.allclose(hidden[0], gates["hidden"])
    for shown, g in ((head, "head"), (ffn, "ffn")):
        assert np.array_equal(shown.mask, np.broadcast_to(gone[:, None], shown.shape))  # gone with their layer
        assert np.allclose(shown[~gone], np.array(gates[g])[~gone])
    titles = [ax.get_title("left").replace("\n", " ") for ax in fig.axes[:4]]
    assert titles == [
        "layers 6 → 4",
        "KV heads 4 → 3",
        "feed-forward dimensions 344 → 256",
        "hidden dimensions 128 → 96",
    ]
    assert fig.axes[2].get_xlim() == (-0.5, 343.5)  # dimensions, not bins
    assert fig.axes[2].get_ylim() == (5.5, -0.5)  # the first layer is the first row
    names = ", ".join(str(i) for i in range(6) if gone[i])
    assert f"removed layers: {names} (white, and what is grey with them)" in fig.get_suptitle()
    lines[-1]["gates"] = {g: np.ones_like(z).tolist() for g, z in gates.items()}  # those of the finished model count
    fig = plot.gates_figure(plot.read_metrics(write(tmp_path, lines)))
    assert np.all(fig.axes[0].images[0].get_array() == 1)


@pytest.mark.parametrize("left", [["hidden"], ["head", "ffn"], ["layer"], []])
def test_gates_of_some_granularities(tmp_path, left):
    lines = list(records("prune"))
    for e in evals(lines):
        e["gates"] = {g: z if g in left else None for g, z in e["gates"].items()}
    fig = plot.gates_figure(plot.read_metrics(write(tmp_path, lines)))
    assert (fig is None) == (not left)
    if left:
        fig.draw_without_rendering()
        assert sum(len(ax.images) for ax in fig.axes) == len(left)


def test_comparison(tmp_path):
    a, b = list(records("prune", TOY)), list(records("continue", ["python", "cpp", "french"], steps=400))
    fig = plot.comparison_figure([plot.read_metrics(write(tmp_path / n, r)) for n, r in (("a", a), ("b", b))])
    left, right = fig.axes
    both = ["cpp", "python"]
    ends = {}
    for name, lines in (("a", a), ("b", b)):
        losses = np.array([column(evals(lines), "bits_per_byte", d) for d in both])
        assert np.allclose(find(left, f"average {name}").get_ydata(), losses.mean(0))
        assert np.allclose(find(left, f"worst domain {name}").get_ydata(), losses.max(0))
        assert np.allclose(find(left, f"average {name}").get_xdata(), column(evals(lines), "tokens"))
        ends[name] = [lines[-1]["bits_per_byte"][d] for d in both]
        assert np.allclose(find(right, f"final {name}").get_xdata(), [*ends[name], np.mean(ends[name])])
        for kind, end in (("average", np.mean(ends[name])), ("worst domain", np.max(ends[name]))):
            assert np.allclose(find(left, f"end, {kind} {name}").get_data(), [[evals(lines)[-1]["tokens"]], [end]])
    fig.draw_without_rendering()
    assert [t.get_text() for t in right.get_yticklabels()] == [*both, "average"]
    assert left.get_xlabel() == "tokens" and "800k" in [t.get_text() for t in left.get_xticklabels()]
    assert left.get_ylabel() == right.get_xlabel() == "validation loss (bits per byte)"
    assert {"a (prune)", "b (continue)"} <= set(texts(fig))
    best = min(ends, key=lambda name: np.mean(ends[name])), min(ends, key=lambda name: np.max(ends[name]))
    assert fig.get_suptitle() == "lowest average: {}; lowest worst domain: {} (domains in common: 2)".format(*best)


def test_comparison_without_bits_per_byte_and_with_equal_names(tmp_path, monkeypatch):
    lines = list(records(stop=100))
    for e in evals(lines):
        e["bits_per_byte"] = dict.fromkeys(TOY)
    write(tmp_path / "dro/run", lines)
    write(tmp_path / "constant/run", records())
    monkeypatch.chdir(tmp_path)
    fig = plot.comparison_figure([plot.read_metrics("dro/run"), plot.read_metrics("constant/run")])
    mean = find(fig.axes[0], "average dro/run").get_ydata()
    assert np.allclose(mean[-1], np.mean(list(evals(lines)[-1]["loss"].values())))
    assert find(fig.axes[0], "average constant/run") and fig.axes[0].get_ylabel() == "validation loss (nats/token)"


def test_everything_optional_may_be_missing(tmp_path):
    lines = [{k: v for k, v in next(records("prune")).items() if k in ("type", "stage", "steps", "domains")}]
    lines[0]["tokens_per_step"] = 8
    lines += [{"type": "train", "step": 1, "loss": 2.0}, {"type": "eval", "step": 1, "tokens": 8}]
    lines[-1]["loss"] = {"cpp": 1.0, "python": None}
    run = plot.read_metrics(write(tmp_path / "bare", lines))
    for figure in plot.FIGURES.values():
        if fig := figure(run):
            fig.draw_without_rendering()
    plot.comparison_figure([run, run]).draw_without_rendering()
    assert run.name == "bare" and plot.gates_figure(run) is None and plot.sparsity_figure(run) is None


def test_lines_that_do_not_fit_are_left_out_and_counted(tmp_path):
    lines = list(records("prune"))
    line = next(r for r in lines if r["type"] == "eval" and r["curve"])
    gates = line["gates"]
    wrong = [{}, [], 3, None, "x", {"type": "eval"}, {"type": "evil"}, {"type": []}, {"type": "train", "step": -1}]
    wrong += [line | {key: value} for key, value in [
        ("step", 1.5), ("step", "1"), ("step", None), ("step", 10**400), ("step", 2**70), ("tokens", True),
        ("loss", []),
        ("loss", {"cpp": "1"}), ("loss", {"cpp": float("nan")}), ("loss", {"cpp": 1e300}), ("loss", {"cpp": 10**400}),
        ("weights", {"cpp": [1]}), ("reference_is", {"cpp": "guessed"}), ("curve", {"step": [], "loss": {}}),
        ("curve", line["curve"] | {"step": [1.0]}), ("curve", {"step": [1.0]}), ("gates", gates | {"layer": [1.0]}),
        ("gates", gates | {"head": [[1.0], [], [1.0], [1.0], [1.0], [1.0]]}), ("gates", gates | {"ffn": [1.0] * 6}),
        ("gates", gates | {"ffn": [[]] * 6}), ("gates", {"hidden": [[1.0]]}),
    ]]  # fmt: skip
    run = plot.read_metrics(write(tmp_path, [*lines, *wrong], tail="[" * 100_000 + "\n" + '{"type": "eval", "st'))
    assert len(run.left_out) == len(wrong) + 2 and run.evals == evals(lines) and run.end == lines[-1]
    first = len(lines) + 1
    assert [int(text.split(":")[1]) for text in run.left_out] == list(range(first, first + len(wrong) + 2))
    assert run.left_out[9].endswith("Expected `int`, got `float` - at `$.step`")


def test_a_figure_of_odd_lines(tmp_path):
    lines = list(records("prune"))[:-1]
    train, evaluation = lines[-2], lines[-1]
    assert (train["type"], evaluation["type"]) == ("train", "eval")
    train |= {"sparsity": {"layer": 0.3, "head": None}, "target_sparsity": {"hidden": 0.1}, "lambda": {"zzz": 1.0}}
    evaluation |= {"weights": {"cpp": 0.5, "zzz": 0.5}, "ratio": {"cpp": None}, "loss": {"python": 1e15}, "step": 2**62}
    evaluation |= {"gates": {"layer": [], "hidden": [0.5], "head": [[0.0]] * 3}, "prediction": {}, "tokens": 2**62}
    evals(lines)[0]["ratio"] = dict.fromkeys(TOY, 0)
    lines.append({"type": "end", "step": 2**62, "loss": {}, "gates": {"ffn": None}})
    run = plot.read_metrics(write(tmp_path, lines))
    assert run.left_out == [] and run.end == lines[-1]
    for figure in (*plot.FIGURES.values(), lambda run: plot.comparison_figure([run, run])):
        figure(run).draw_without_rendering()


def test_one_evaluation_and_sparsity_without_a_target(tmp_path):
    first, *lines = [line for line in records("prune") if line["type"] in ("run", "train", "eval")]
    train, evaluation = (next(line for line in lines if line["type"] == kind) for kind in ("train", "eval"))
    del train["target_sparsity"]
    run = plot.read_metrics(write(tmp_path, [first, train, evaluation, evaluation]))
    assert run.left_out == [] and len(run.evals) == 2
    figures = [figure(run) for figure in plot.FIGURES.values()]
    assert plot.sparsity_figure(run) is None and sum(figure is not None for figure in figures) > 1
    for figure in filter(None, figures):
        figure.draw_without_rendering()


# --- the command


def test_command_draws_what_applies(tmp_path, monkeypatch, capsys):
    young = write(tmp_path / "young", records("prune", stop=10), tail='{"type": "tra')  # one evaluation
    pretrain = write(tmp_path / "pretrain", records("pretrain", schedule="constant"))
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, plot.main, "plot.py", young, "pretrain", "young/") == 0  # twice a run is once
    drawn = {young: ["weights", "loss", "sparsity", "gates"], pretrain: ["weights", "loss"]}
    expected = [str(directory / f"{name}.png") for directory, names in drawn.items() for name in names]
    expected.append(str(young / "comparison.png"))  # in the first run, where --out does not say where
    out, err = capsys.readouterr()
    assert [str(Path(path).absolute()) for path in out.split()] == expected
    assert "lines that are left out: 1; the first: " in err and "metrics.jsonl:5: not a line" in err
    assert sorted(map(str, tmp_path.rglob("*.png"))) == sorted(expected)
    assert {png_size(Path(path)) for path in expected} == {(1440, 810)}


@pytest.mark.parametrize("runs, name", [(["a"], "weights"), (["\udcff"], "weights"), (["a", "b"], "comparison")])
def test_command_writes_where_it_is_told(tmp_path, monkeypatch, capsys, runs, name):
    """Pictures of a single run, or the comparison; the other pictures stay with their runs."""
    for run in runs:
        write(tmp_path / run, records("continue"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plot, "FIGURES", {"weights": plot.weights_figure})
    assert call(monkeypatch, plot.main, "plot.py", *runs, "--out", "figures") == 0
    own = [f"{run}/weights.png" for run in runs if len(runs) > 1]
    assert capsys.readouterr().out.split() == [*own, f"figures/{name}.png"]


@pytest.mark.parametrize(
    "args, said",
    [
        (["god"], "god: no such run; there are foreign, good"),
        (["empty"], "metrics.jsonl: no such file"),
        (["young"], "no evaluation yet"),
        (["other"], "not the metrics of a run"),
        (["good", "foreign"], "no domain is in all of good, foreign"),
        ([], "required: RUN"),
        (["good", "--size=3"], "unrecognized arguments: --size=3"),
        (["good", "--out", "good/metrics.jsonl"], "good/metrics.jsonl is not a directory"),
    ],
)
def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys, args, said):
    write(tmp_path / "good", records())
    write(tmp_path / "young", [r for r in records() if r["type"] != "eval"])
    write(tmp_path / "other", [{"loss": 1}])
    write(tmp_path / "foreign", records(domains=["french"]))
    (tmp_path / "empty").mkdir()
    if said == "required: RUN":  # as a person starts it
        done = fresh(script, "plot.py")
        status, out, err = done.returncode, done.stdout, done.stderr
    else:
        monkeypatch.chdir(tmp_path)
        status, (out, err) = call(monkeypatch, plot.main, "plot.py", *args), capsys.readouterr()
    assert status == 2 and out == ""
    assert err.count("\n") == 1 and said in err and err.startswith("plot.py: ")
    assert not list(tmp_path.rglob("*.png"))
