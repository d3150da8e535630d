"""experiments/: every chain is planned once, differences are paired as scipy pairs them, languages come through."""

import argparse
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from conftest import call
from processes import fresh, script
from scipy import stats
from scipy.optimize import minimize

from plumbing.command_line import load
from plumbing.data import TokenData
from plumbing.tokenizer import load_tokenizer
from prepare_data import prepare
from train import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))

import compare  # noqa: E402
import languages  # noqa: E402
import laws  # noqa: E402


def test_every_chain_has_a_place_of_its_own():
    chains = compare.plan(list(compare.PARTS), 5, list(compare.SCHEDULES))
    again = [c for c in chains if c.base and c.schedule == "constant"]
    assert {c.path for c in again} == {c.base.path for c in again}  # which has pruned the model, and went on
    assert len({c.path for c in chains}) == len(chains) - len(again)
    settings = {c.setting for c in chains if c.part == "ablation"}
    assert len(settings) == sum(map(len, compare.ABLATIONS.values()))
    assert [c.part for c in chains] == sorted((c.part for c in chains), key=list(compare.PARTS).index)
    assert {c.seed for c in chains if c.part == "skew"} == set(range(5))


def test_every_run_of_a_chain_is_one_that_train_py_takes(monkeypatch, tmp_path):
    """The settings of each stage: equal but for the schedule, the mixture skewed where it is said to be."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    commands, domains = [], [f"domain{i}" for i in range(7)]
    monkeypatch.setattr(compare, "call", lambda *command: commands.append([str(word) for word in command]))
    monkeypatch.setattr(compare, "PARTS", {"skew": compare.PARTS["skew"], "own": compare.PARTS["own"]})
    mixture = {d: 10 + i for i, d in enumerate(domains)}
    for path in ("source/0", *(f"{part}/dro_0/{stage}" for part in compare.PARTS for stage in compare.STAGES)):
        (tmp_path / path).mkdir(parents=True)
        lines = (
            {"type": "run", "domains": domains, "stage": "pretrain", "steps": 1, "tokens_per_step": 1},
            {"type": "eval", "step": 1, "tokens": 1, "loss": {}, "domain_tokens": mixture},
        )
        (tmp_path / path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for chain in compare.plan(["skew", "own"], 1, list(compare.SCHEDULES)):
        commands.clear()
        compare.run(chain, 1.0)
        asked = ["eval.py"] * (chain.schedule in compare.ASKED)  # two-choice questions
        assert [c[0] for c in commands] == ["train.py", "train.py", *asked, "eval.py"]
        prune, after = (load(Settings, command[1:]) for command in commands[:2])
        assert (prune.steps, after.steps, prune.eval_interval) == (400, 300, 16)
        assert prune.init_from == str(tmp_path / "source/0") and after.init_from == prune.out
        shares = {"uniform": [1.0] * 7, "mean": list(mixture.values())}
        expected = shares.get(chain.schedule, list(compare.SKEW.values()) if chain.part == "skew" else [])
        for s in (prune, after):
            assert list(s.ratio.values()) == expected and s.reference_model == prune.init_from
            assert s.schedule == ("dro" if chain.label.startswith(("dro", "full")) else
                                  "sheared" if chain.label == "sheared" else "constant")  # fmt: skip
            assert s.dynamic_reference == (chain.label.startswith("full") or chain.label == "dro + reference")
            assert s.dynamic_ratio == (chain.label.startswith("full") or chain.label == "dro + ratio")
            robust = {"full, rho 0.5": (0.5, 0), "full, tempered": (1, 0.01)}.get(chain.label, (0.1, 0))
            assert s.schedule != "dro" or (s.rho, s.temperature) == robust


def test_what_is_known_is_not_run_again_but_what_another_needs_is(monkeypatch, tmp_path):
    """`mean` needs the mixture that `dro` drew, `recovery` the model that `constant` has pruned."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    for name, part in compare.PARTS.items():
        monkeypatch.setitem(compare.PARTS, name, replace(part, data=str(tmp_path)))
    (tmp_path / "meta.json").write_text("{}")
    sources, ran = [], []
    monkeypatch.setattr(compare, "train_source", lambda path, *others: sources.append(path))
    monkeypatch.setattr(compare, "run", lambda chain, scale: ran.append((chain.part, chain.schedule)))
    known = {("own", "dro", 0): {}, ("own", "uniform", 0): {}, ("skew", "constant", 0): {}}
    given = {"scale": 1, "jobs": 1, "seeds": 1}
    compare.run_all(argparse.Namespace(parts=["own"], schedules=["dro", "uniform", "mean"], **given), known)
    assert ran == [("own", "dro"), ("own", "mean")] and sources == [tmp_path / "source/0"]
    ran.clear()
    compare.run_all(argparse.Namespace(parts=["recovery"], schedules=["sheared"], **given), known)
    assert ran == [("skew", "constant"), ("recovery", "sheared")]


def test_numbers_of_the_tables():
    given = (0.0314, -0.12, 10.5, 100.25, -0.0001)
    assert [compare.three(x) for x in given] == [".031", "−.120", "10.500", "100.250", ".000"]


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    mine, other = rng.normal(1, 0.1, 5), rng.normal(1.2, 0.1, 5)
    rows = [
        {seed: {"x": values[seed]} for seed in order} for values, order in ((mine, [4, 2, 0, 3]), (other, range(5)))
    ]
    rows[0][4]["x"] = None  # never reached: this seed counts for neither
    found, both = compare.compared(*rows, "x"), [0, 2, 3]
    assert found["p"] == pytest.approx(stats.ttest_1samp((mine - other)[both], 0).pvalue)
    assert found["mean"] == pytest.approx((mine - other)[both].mean())
    assert found["sd"] == pytest.approx(stats.tstd((mine - other)[both]))
    assert found["lower in"] == f"{sum(mine[both] < other[both])} of 3"
    assert compare.compared({0: {"x": 1.0}}, {0: {"x": 2.0}}, "x") is None


def test_what_a_chain_is_judged_by(monkeypatch, tmp_path, tiny_data):
    """Degradation, the worst mixture by a general solver, the share of time, tokens until `constant` is reached."""
    data, n = TokenData(tiny_data), len(TokenData(tiny_data).domains)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    monkeypatch.setitem(compare.PARTS, "skew", compare.Part(["constant", "full"], 1, None, data=str(tiny_data)))
    rng, chains = np.random.default_rng(1), {s: compare.Chain("skew", s, 0) for s in ("constant", "full")}
    losses = {"source": rng.uniform(1, 2, n)}
    losses |= {(s, stage): losses["source"] + rng.uniform(0, 1, n) for s in chains for stage in compare.STAGES}

    def row(values):
        return {"domains": {d: {"loss": x, "bits_per_byte": 2 * x} for d, x in zip(data.domains, values)}}

    def by_domain(values):
        return dict(zip(data.domains, values))

    def write(path, evals, end):
        info = {"type": "run", "domains": data.domains, "stage": "pretrain", "steps": 30, "tokens_per_step": 100}
        lines = [info, *evals, {"type": "end", "step": 30, "loss": by_domain(end)}]
        path.mkdir(parents=True)
        (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        timings = [{"step": 10, "seconds": 6.0, "tokens_per_second": 500}]  # 2 seconds of training
        timings += [{"step": 30, "seconds": 20.0, "tokens_per_second": 250}]  # 8 more
        (path / "timings.jsonl").write_text("\n".join(map(json.dumps, timings)))

    first = {"type": "eval", "step": 0, "tokens": 0, "loss": by_domain(losses["source"])}
    write(tmp_path / "source/0", [first], losses["source"])
    (tmp_path / "source/0/eval.json").write_text(json.dumps({"models": {"a": row(losses["source"])}}))
    curves = {"constant": [1.0, 0.5, 0.3], "full": [1.0, 0.3, 0.1]}  # above the source, every 1000 tokens
    for s, chain in chains.items():
        evals = [
            {
                "type": "eval",
                "step": 10 * i,
                "tokens": 1000 * i,
                "loss": by_domain(losses["source"] + x),
                "domain_tokens": by_domain((i * np.arange(n)).tolist()),
            }
            for i, x in enumerate(curves[s])
        ]
        write(chain.models[1], evals, losses["source"])
        models = {stage: row(losses[s, stage]) for stage in compare.STAGES}
        chain.result.write_text(json.dumps({"models": models}))
        answered = {
            "domains": {d: {"accuracy": 0.5 + i / 20, "standard_error": 0.03} for i, d in enumerate(data.domains)},
            "average": {"accuracy": 0.6, "standard_error": 0.01},
        }
        chain.answers.write_text(json.dumps({"models": {"continue": answered}}))
    found, worse = compare.measures(chains["full"]), losses["full", "continue"] - losses["source"]
    assert found["average degradation"] == pytest.approx(worse.mean())
    assert found["worst degradation"] == pytest.approx(worse.max())
    assert found["sd of degradation"] == pytest.approx(worse.std())
    assert found["worst degradation, pruned"] == pytest.approx((losses["full", "prune"] - losses["source"]).max())
    assert found["average bits per byte"] == pytest.approx(2 * losses["full", "continue"].mean())
    assert found["share of the time for evaluations and schedule"] == pytest.approx(0.5)
    assert found[f"true continuations, {data.domains[1]}"] == 0.55
    shares = [found[f"share of the tokens, {d}"] for d in data.domains]
    assert shares == pytest.approx(np.arange(n) / np.arange(n).sum())
    natural = np.array([data.tokens(d, "train").size for d in data.domains], float)
    natural /= natural.sum()
    for rho in compare.RHOS:
        limit = {"type": "ineq", "fun": lambda q, rho=rho: rho - 0.5 * np.sum(natural * (q / natural - 1) ** 2)}
        worst = minimize(
            lambda q: -q @ losses["full", "continue"], natural, bounds=[(0, 1)] * n, method="SLSQP",
            options={"ftol": 1e-12}, constraints=[{"type": "eq", "fun": lambda q: q.sum() - 1}, limit],
        )  # fmt: skip
        assert found[f"loss under the worst mixture, rho {rho}"] == pytest.approx(-worst.fun, abs=1e-5)
    reached = compare.recovery(chains["full"])
    assert set(reached.values()) == {1000} and set(compare.recovery(chains["constant"]).values()) == {2000}
    before = compare.report(list(chains.values()))
    row = before["skew"]["full"]["worst degradation"]
    assert row["values"] == [pytest.approx(worse.max())] and row["sd"] is None and row["minus constant"] is None

    table = compare.answers_table(before["skew"]).splitlines()
    assert table[0] == f"| | {' | '.join(data.domains)} | average |"
    assert table[2].startswith("| constant | 50.0 ± 3.0 | 55.0 ± 3.0 |") and len(table) == 4

    # on another machine: what is not here is as it was, what is here is measured again
    was = json.loads(json.dumps(before))
    before["skew"]["constant"]["worst degradation"]["values"] = [9.0]
    chains["full"].result.unlink()
    assert "full" not in compare.report(list(chains.values()))["skew"]
    kept = compare.report(list(chains.values()), before)["skew"]
    assert kept == was["skew"]
    before["skew"]["full"]["average loss"]["values"][0] += 0.01  # which cannot be if the source is the same
    with pytest.raises(ValueError, match="skew, seed 0: .* another source model"):
        compare.report(list(chains.values()), before)


def alone(name, *args):
    """A script that finds the project's files by itself: nobody has imported them or said where they are."""
    places = [ROOT, *(ROOT / folder for folder in ("plumbing", "experiments", "tests"))]
    sys.path[:] = [str((ROOT / name).parent), *(path for path in sys.path if Path(path).absolute() not in places)]
    for module in [m for m, x in sys.modules.items() if Path(getattr(x, "__file__", None) or "/").parent in places]:
        del sys.modules[module]
    script(name, *args)


def test_mistakes_end_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("OUT", "DOCS"):  # which the command changes
        monkeypatch.setattr(compare, name, getattr(compare, name))
    for args, words in (
        (["--data", tmp_path / "none"], "no data set there"),
        (["--part", "skew", "--seed", "x"], "--seeds: invalid int value"),
        (["--report", "--scale", "0.123"], "nothing in out/compare_0.123 is done"),
    ):
        assert call(monkeypatch, compare.main, "compare.py", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    ended = fresh(alone, "experiments/compare.py", "--jobs", "0")
    assert ended.returncode == 2 and "must be above 0" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


@pytest.mark.parametrize("where", ["docs/compare", "docs/compare/tempered"])
def test_the_tables_in_the_docs_are_what_was_measured(where):
    results = json.loads((ROOT / where / "results.json").read_text())
    text = (ROOT / "docs/comparison.md").read_text()
    assert compare.overview({part: rows for part, rows in results.items() if part != "command"}) in text
    assert where != "docs/compare" or compare.answers_table(results["skew"]) in text


def test_a_law_sees_only_what_was_known(monkeypatch):
    """What comes after the given share of a run changes no prediction."""
    monkeypatch.setattr(laws, "minimize", partial(minimize, options={"maxiter": 2}))  # the published fit takes long
    n, d = 25, 3
    progress, rng = np.linspace(0, 1, n), np.random.default_rng(0)
    tokens = 1e5 * progress[:, None] * np.array([3, 2, 1])
    losses = 2 + 0.3 * (progress[:, None] + 0.05) ** -0.4 + 0.01 * rng.standard_normal((n, d))
    rate = 0.1 + 0.45 * (1 + np.cos(np.pi * progress))
    area, ones = np.cumsum(rate) / rate.sum(), np.ones(n)
    history = laws.History("prune", progress, losses, tokens, ones, rate, area, progress, losses, losses[-1])
    history = laws.replace(history, stage="continue", before=history)
    later = np.where(progress[:, None] > 0.5, 9.0, losses)
    other = laws.replace(history, losses=later, plain=later, final=losses[-1] + 1)
    for name, law in laws.LAWS.items():
        assert law(history.until(0.5), history) == pytest.approx(law(other.until(0.5), other)), name
    known = history.until(0.5)
    carried = laws.LAWS["the same, carried over"](known, history)
    assert np.abs(carried - history.final).max() < np.abs(known.losses.min(0) - history.final).max()


PAGE = "<html><head><title>no</title></head><p>{}</p><pre>apt\n install</pre><p>Same in <em>all</em>.</p></html>"
TEXTS = {"ar-MA": "مرحبا بالعالم", "ja-JP": "こんにちは、世界。", "de-DE": "Grüße", "zh-CN": "你好，世界"}


def test_languages_come_through_whole(monkeypatch, tmp_path, capsys):
    for name in languages.LANGUAGES:
        folder = tmp_path / "html" / name
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"page{i}.html").write_text(PAGE.format(f"{i} " + TEXTS.get(name, name) * 9), "utf-8")
    assert call(monkeypatch, languages.main, "languages.py", tmp_path / "html", tmp_path / "text") == 0
    assert (tmp_path / "text/ja/page7.txt").read_text("utf-8") == "7 " + TEXTS["ja-JP"] * 9 + "\n"
    assert (tmp_path / "text/en/page7.txt").read_text("utf-8").splitlines()[1:] == ["apt install", "Same in all."]
    prepare(str(tmp_path / "text"), tmp_path / "data", window=16, held_out=0.2)
    data = TokenData(tmp_path / "data")
    assert data.domains == sorted(name.split("-")[0] for name in languages.LANGUAGES)
    train = load_tokenizer(data.tokenizer).decode(data.tokens("ja", "train").tolist())
    assert train.count(TEXTS["ja-JP"] * 9) >= 20 and "\ufffd" not in train
    assert call(monkeypatch, languages.main, "languages.py", tmp_path, tmp_path / "x") == 2
    assert "ar-MA" in capsys.readouterr().err and not (tmp_path / "x").exists()
