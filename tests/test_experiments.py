"""experiments/: every chain is planned once, differences are paired as scipy pairs them, languages come through."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from data import TokenData
from tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))

import compare  # noqa: E402
import languages  # noqa: E402
import laws  # noqa: E402


def test_every_chain_has_a_place_of_its_own():
    chains = compare.plan(list(compare.PARTS), 5, list(compare.SCHEDULES))
    assert len({c.path for c in chains}) == len(chains)
    settings = {c.setting for c in chains if c.part == "ablation"}
    assert len(settings) == sum(map(len, compare.ABLATIONS.values()))
    assert [c.part for c in chains] == sorted((c.part for c in chains), key=list(compare.PARTS).index)
    assert {c.seed for c in chains if c.part == "skew"} == set(range(5))


def test_differences_are_paired_by_seed():
    rng = np.random.default_rng(0)
    mine, other = rng.normal(1, 0.1, 5), rng.normal(1.2, 0.1, 5)
    rows = [{seed: {"x": x} for seed, x in enumerate(values)} for values in (mine, other)]
    rows[0][4]["x"] = None  # never reached: this seed counts for neither
    found = compare.compared(*rows, "x")
    assert found["p"] == pytest.approx(stats.ttest_1samp((mine - other)[:4], 0).pvalue)
    assert found["mean"] == pytest.approx((mine - other)[:4].mean())
    assert found["lower in"] == f"{sum(mine[:4] < other[:4])} of 4"
    assert compare.compared({0: {"x": 1.0}}, {0: {"x": 2.0}}, "x") is None


def test_the_tables_in_the_docs_are_what_was_measured():
    results = json.loads((ROOT / "docs/compare/results.json").read_text())
    text = (ROOT / "docs/comparison.md").read_text()
    assert compare.overview({part: rows for part, rows in results.items() if part != "command"}) in text
    assert compare.answers_table(results["skew"]["answers"]) in text


def test_a_law_sees_only_what_was_known():
    """What comes after the given share of a run changes no prediction."""
    n, d = 25, 3
    progress, rng = np.linspace(0, 1, n), np.random.default_rng(0)
    tokens = 1e5 * progress[:, None] * np.array([3, 2, 1])
    losses = 2 + 0.3 * (progress[:, None] + 0.05) ** -0.4 + 0.01 * rng.standard_normal((n, d))
    rate = 0.1 + 0.45 * (1 + np.cos(np.pi * progress))
    area, ones = np.cumsum(rate) / rate.sum(), np.ones(n)
    history = laws.History("continue", progress, losses, tokens, ones, rate, area, progress, losses, losses[-1])
    other = laws.replace(history, losses=np.where(progress[:, None] > 0.5, 9.0, losses), final=losses[-1] + 1)
    for name, law in laws.LAWS.items():
        assert law(history.until(0.5), history) == pytest.approx(law(other.until(0.5), other)), name


PAGE = "<html><head><title>no</title></head><p>{}</p><pre>apt\n install</pre><p>Same in <em>all</em>.</p></html>"
TEXTS = {"ar-MA": "مرحبا بالعالم", "ja-JP": "こんにちは、世界。", "de-DE": "Grüße", "zh-CN": "你好，世界"}


def test_languages_come_through_whole(tmp_path):
    for name in languages.LANGUAGES:
        folder = tmp_path / "html" / name
        folder.mkdir(parents=True)
        for i in range(40):
            (folder / f"page{i}.html").write_text(PAGE.format(f"{i} " + TEXTS.get(name, name) * 9), "utf-8")
    run = [sys.executable, ROOT / "experiments/languages.py", tmp_path / "html", tmp_path / "text"]
    subprocess.run(run, check=True)
    assert (tmp_path / "text/ja/page7.txt").read_text("utf-8") == "7 " + TEXTS["ja-JP"] * 9 + "\n"
    assert (tmp_path / "text/en/page7.txt").read_text("utf-8").splitlines()[1:] == ["apt install", "Same in all."]
    command = ["prepare_data.py", tmp_path / "text", "--out", tmp_path / "data", "--window", "16", "--workers", "1"]
    subprocess.run([sys.executable, *map(str, command), "--held_out", "0.2"], cwd=ROOT, check=True, capture_output=True)
    data = TokenData(tmp_path / "data")
    assert data.domains == sorted(name.split("-")[0] for name in languages.LANGUAGES)
    train = load_tokenizer(data.tokenizer).decode(data.tokens("ja", "train").tolist())
    assert train.count(TEXTS["ja-JP"] * 9) >= 20 and "\ufffd" not in train
    wrong = subprocess.run([*run[:2], tmp_path, tmp_path / "x"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "ar-MA" in wrong.stderr and not (tmp_path / "x").exists()
