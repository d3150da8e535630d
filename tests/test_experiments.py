"""experiments/: every chain is planned once, differences are paired as scipy pairs them, languages come through."""

import json
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import call
from processes import fresh, script
from scipy import stats
from scipy.optimize import minimize

from model import LlamaConfig
from plumbing.command_line import load
from plumbing.data import TokenData
from plumbing.tokenizer import load_tokenizer
from prepare_data import prepare
from train import Settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "experiments"))

import compare  # noqa: E402
import gpu  # noqa: E402
import languages  # noqa: E402
import laws  # noqa: E402
import pruning  # noqa: E402
import runs  # noqa: E402


def test_runs_of_a_case_differ_in_their_schedule_alone(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    commands = []
    nothing = {"models": {"": {"domains": {}}}}

    def pretend(*command):
        commands.append([str(word) for word in command])
        for word in commands[-1]:
            if word.startswith("--out="):
                Path(word.removeprefix("--out="), "model").mkdir(parents=True)
        if "--json" in command:
            command[-1].parent.mkdir(parents=True, exist_ok=True)
            command[-1].write_text(json.dumps(nothing))

    monkeypatch.setattr(runs, "call", pretend)
    monkeypatch.setattr(runs, "check_text", lambda out, data: None)
    toy = compare.CASES["toy"]
    for mixture in compare.MIXTURES:
        settings = {}
        for schedule in [*compare.SCHEDULES, "--schedule=dro --rho=0.7"]:
            commands.clear()
            compare.judge(toy, 3, mixture, schedule)
            asked = ["eval.py"] * (schedule in toy.asked and "," not in mixture)  # two-choice questions
            assert [command[0] for command in commands] == ["train.py", "eval.py", *asked]
            settings[schedule] = asdict(load(Settings, commands[0][1:]))
        assert len({run["out"] for run in settings.values()}) == len(settings)
        begins, steps = ("source", 700) if mixture.endswith("pruning too") else ("pruned", 300)
        steps *= 3 if mixture.endswith("three times as long") else 1
        steps //= 3 if mixture.endswith("a third as long") else 1
        for schedule, run in settings.items():
            changed = {key for key in run if run[key] != settings["constant"][key]}
            given = {word.split("=")[0].strip("-") for word in schedule.split()} | {"schedule", "ratio"}
            assert changed <= {"out"} | set(compare.SCHEDULES.get(schedule, {})) | given, (mixture, schedule)
            assert run["steps"] // run["eval_interval"] >= 25
            assert run["seed"] == 3 and run["steps"] == steps and run["init_from"] == str(tmp_path / "toy/3" / begins)
            shares = [1] * 7 if schedule == "uniform" else [] if mixture.startswith("own") else compare.SHARES
            assert sorted(run["ratio"].values()) == sorted(shares)
            assert run["reference_model"] == str(tmp_path / "toy/3/source") and run["law"] == "rate"
        paper, even = settings["paper"], settings["even"]
        assert (paper["rho"], paper["temperature"], paper["bound"], paper["delta"]) == (0.1, 0, 2, 0.1)
        assert paper["dynamic_reference"] and paper["dynamic_ratio"] and not even["dynamic_reference"]
    commands.clear()
    compare.judge(compare.CASES["smollm2"], 3, "own, pruning too", "sheared")  # the case's own pruning is under `paper`
    run = load(Settings, commands[0][1:])
    assert (run.schedule, run.init_from, run.target_d_model) == ("sheared", "SmolLM2-135M", 480)
    for name, tokens in (("smollm2", 1_024_000), ("smollm2_short", 512_000)):
        commands.clear()
        compare.judge(compare.CASES[name], 0, "skewed", "paper")
        run = load(Settings, commands[0][1:])
        assert run.steps * run.batch_size * run.seq_len == tokens and run.ratio["stubs"] == 0.01, name


def test_settings_may_stand_in_place_of_a_schedule(monkeypatch):
    """Also on the command line, where they begin as an option does."""
    asked = []
    monkeypatch.setattr(compare, "run_all", lambda *arguments: asked.append(arguments))
    monkeypatch.setattr(compare, "report", asked.append)
    schedules = ["--schedule=dro --rho=0.7", "constant"]
    monkeypatch.setattr(sys, "argv", ["compare.py", "toy", "--seeds", "2", "3", "--schedules", *schedules])
    compare.main()
    assert asked == [(compare.CASES["toy"], range(2, 4), compare.CASES["toy"].mixtures, schedules, 2), schedules]


@pytest.mark.parametrize("window", [64, 128])
def test_models_of_a_text_too_short_for_questions_are_not_asked(tiny_corpus, monkeypatch, tmp_path, capsys, window):
    prepare(str(tiny_corpus), tmp_path / "data", window=window, held_out=0.1)
    found = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "CASES", dict(compare.CASES))
    for name in ("OUT", "DOCS"):  # which the command changes
        monkeypatch.setattr(compare, name, tmp_path)
    monkeypatch.setattr(compare, "run_all", lambda case, *others: found.append(case.asked))
    monkeypatch.setattr(compare, "report", lambda schedules: None)
    ratio = {domain: 1 for domain in TokenData(tmp_path / "data").domains}
    monkeypatch.setattr(sys, "argv", ["compare.py", "toy", f"--data={tmp_path / 'data'}", f"--ratio={ratio}"])
    compare.main()
    assert found == [compare.Case("", 1, {}).asked if window == 128 else ()]
    assert ("its windows have 64" in capsys.readouterr().out) == (window == 64)


def test_seeds_have_their_own_source_and_what_is_done_is_not_done_again(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(compare, "OUT", tmp_path)
    done = []

    def pretend(*command):
        done.append(command)
        words = [str(word) for word in command]
        files = [Path(word.removeprefix("--out="), "model") for word in words if word.startswith("--out=")]
        for file in files + [Path(words[-1])] * ("--json" in words):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text('{"models": {"": {"domains": {}}}}')

    monkeypatch.setattr(runs, "call", pretend)
    monkeypatch.setattr(runs, "check_text", lambda out, data: None)
    arguments = (compare.CASES["toy"], range(1, 3), ["skewed"], ["constant", "dro"], 1)
    compare.run_all(*arguments)
    trained = [str(word) for command in done for word in command if command[0] == "train.py" and "--out=" in str(word)]
    ends = ["source", "pruned", "skewed/constant", "skewed/dro"]
    assert sorted(trained) == sorted(f"--out={tmp_path}/toy/{seed}/{end}" for seed in (1, 2) for end in ends)
    number = len(done)
    compare.run_all(*arguments)
    assert [command[0] for command in done[number:]] in ([], ["prepare_data.py"])  # where data/demo is not there


def test_what_a_run_is_judged_by(monkeypatch, tmp_path):
    monkeypatch.setattr(compare, "OUT", tmp_path)
    domains, rng = list("abc"), np.random.default_rng(1)
    source, loss, reference, val = rng.uniform(1, 2, (4, 3))

    def write(file, **models):
        rows = {name: {"domains": {d: {"loss": x} for d, x in zip(domains, v)}} for name, v in models.items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"models": rows}))

    toy = compare.CASES["toy"]
    out = toy.at(0, "skewed", "even")
    write(toy.at(0) / "source.json", source=source)
    write(out / "eval.json", run=loss)
    by_domain = lambda values: dict(zip(domains, values))  # noqa: E731
    lines = [{"type": "run", "domains": domains, "stage": "continue", "steps": 20, "tokens_per_step": 100}]
    for step, references, drawn in ((0, reference, [0, 0, 0]), (20, val, [1, 3, 4])):
        line = {"loss": val, "reference": references, "domain_tokens": drawn}
        lines.append(
            {"type": "eval", "step": step, "tokens": sum(drawn)}
            | {key: by_domain(values) for key, values in line.items()}
        )
    lines.append({"type": "end", "step": 20, "loss": by_domain(val)})
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    answers = {"domains": {d: {"accuracy": 0.5 + i / 20, "standard_error": 0.03} for i, d in enumerate(domains)}}
    answers["average"] = {"accuracy": 0.6, "standard_error": 0.01}
    (out / "answers.json").write_text(json.dumps({"models": {"run": answers}}))
    found, worse = compare.measures(toy, 0, "skewed", "even"), loss - source
    assert found["average"] == pytest.approx(worse.mean(), abs=1e-5)
    assert found["worst"] == pytest.approx(worse.max(), abs=1e-5)
    assert found["degradation"] == pytest.approx(by_domain(worse), abs=1e-5)
    assert found["share of the tokens"]["c"] == 0.5 and found["right answers"]["b"] == 0.55
    assert compare.collect(toy, ["constant", "even"]) == {"skewed": {"even": {"0": found}}}
    not_asked = {key: value for key, value in found.items() if key not in compare.ANSWERS}
    table = compare.answers_table({"constant": {"0": not_asked}, "even": {"0": found, "1": not_asked}}).splitlines()
    assert len(table) == 3
    assert table[0] == "| | a | b | c | average |"
    assert table[2] == "| even | 50.0 ± 3.0 | 55.0 ± 3.0 | 60.0 ± 3.0 | 60.0 ± 1.0 |"


def test_numbers_of_the_tables():
    given = (0.0314, -0.12, 10.5, 100.25, -0.0001)
    assert [compare.three(x) for x in given] == [".031", "−.120", "10.500", "100.250", ".000"]


def test_differences_are_paired_by_seed():
    """As scipy pairs them; bold is what is lower in every seed that both have."""
    rng = np.random.default_rng(0)
    sheared, even = rng.normal(1.2, 0.1, (2, 5)), rng.normal(1, 0.1, (2, 4))
    even[1] = sheared[1, :4] - [0.1, 0.2, -0.01, 0.1]  # one seed is not lower
    even[0] = np.minimum(even[0], sheared[0, :4] - 0.01)
    runs = lambda values, *seeds: {str(s): {"average": values[0, s], "worst": values[1, s]} for s in seeds}  # noqa: E731
    rows = {"sheared": runs(sheared, 0, 1, 2, 3, 4), "even": runs(even, 3, 2, 1, 0)}
    line = compare.table({"skewed": rows}).splitlines()[3]
    both = [(compare.three(a.mean()), stats.ttest_rel(a, 0 * a).pvalue) for a in even - sheared[:, :4]]
    average, worst, difference, seeds = line.strip("| ").split(" | ")[1:]
    assert average == f"**{compare.three(even[0].mean())} ± {compare.three(even[0].std(ddof=1))}**"
    assert worst == f"{compare.three(even[1].mean())} ± {compare.three(even[1].std(ddof=1))}"
    assert difference == " / ".join(f"{mean} (p {p:.1g})" for mean, p in both) and seeds == "4"


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
        (["toy", "--data", tmp_path / "none"], "no data set there"),
        (["toy", "--seeds", "x"], "--seeds: invalid int value"),
        (["toy", "--schedules", "--schedule=fast"], "schedule"),
        (["toy", "--schedules", "--schedule dro"], "neither the name of a schedule nor --setting=value"),
        (["toy", "--schedules", "--schedule=dro --seed=7"], "seed is set for all schedules alike"),
        (["toy", "--ratio", "{'a': 1}"], "--ratio needs --data"),
        (["toy", "--schedules", "fast"], "neither the name of a schedule nor --setting=value"),
        (["--report", "--data", "data/mine"], "which case?"),
        ([], "which case?"),
    ):
        assert call(monkeypatch, compare.main, "compare.py", *args) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    monkeypatch.setattr(compare, "OUT", tmp_path)
    with pytest.raises(ValueError, match="nothing in .* is done"):
        compare.report(["constant"])
    ended = fresh(alone, "experiments/compare.py", "toy", "--jobs", "0")
    assert ended.returncode == 2 and "--jobs: 0 must be" in ended.stderr and ended.stderr.count("\n") == 1, ended.stderr


def test_results_of_two_places_are_put_together_by_seed():
    """A seed has the runs of the place with more of them, and of as many runs the later ones: places are not mixed."""
    row = lambda place, *seeds: {str(seed): f"of {place}" for seed in seeds}  # noqa: E731
    before = {"toy": {"skewed": {"constant": row("a", 0, 1), "even": row("a", 0, 1, 9)}, "own": {"even": row("a", 2)}}}
    found = {"toy": {"skewed": {"constant": row("b", 0, 10), "even": row("b", 0), "dro": row("b", 1, 9)}}}
    found |= {"languages": {"own": {"even": row("b", 0)}}}
    constant = {"0": "of b", "1": "of a", "10": "of b"}
    skewed = {"constant": constant, "even": {"0": "of b", "1": "of a"}, "dro": {"9": "of b"}}
    merged = {"toy": {"skewed": skewed, "own": before["toy"]["own"]}, "languages": found["languages"]}
    assert compare.merge(before, found) == merged and compare.merge({}, found) == found
    assert list(compare.merge(before, found)["toy"]["skewed"]["constant"]) == ["0", "1", "10"]


def test_a_report_keeps_what_is_not_asked_for(monkeypatch, tmp_path):
    for name in ("OUT", "DOCS"):
        monkeypatch.setattr(compare, name, tmp_path)
    monkeypatch.setattr(compare, "measures", lambda *run: {"average": 0.1, "worst": 0.2})
    (tmp_path / "toy/120").mkdir(parents=True)
    (tmp_path / "toy/120/source.json").touch()
    for schedules in (["constant", "sheared"], ["even"], ["--schedule=dro --rho=0.7"]):
        for schedule in schedules:
            out = compare.CASES["toy"].at(120, "skewed", schedule)
            out.mkdir(parents=True)
            (out / "eval.json").touch()
        compare.report(schedules)
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["toy"]["skewed"]) == ["constant", "sheared", "even", "--schedule=dro --rho=0.7"]


def test_after_a_failure_no_run_begins():
    began = []

    def run(name):
        began.append(name)
        time.sleep(0.05)
        if name == "b":
            raise ValueError("b failed")

    with pytest.raises(ValueError, match="b failed"):
        runs.each(run, [(name,) for name in "abcdefgh"], 2)
    assert began[:2] == ["a", "b"] and len(began) <= 4


def test_a_run_that_was_stopped_is_not_tested(monkeypatch, tmp_path):
    """A signal ends train.py with status 0 and a checkpoint, which eval.py would take."""
    monkeypatch.setattr(runs, "call", lambda *command: Path(tmp_path, "run/checkpoints").mkdir(parents=True))
    with pytest.raises(OSError, match="run was stopped"):
        runs.train(tmp_path / "run", 0, "config/toy_prune.py")


def test_a_run_of_another_text_is_not_compared(tiny_data, monkeypatch, tmp_path):
    """The demo's text is made anew where it is gone, of whatever is installed then."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    data, record = TokenData(tiny_data).digest, tmp_path / "run" / "model" / "trained_with.json"
    for read in (data, "another"):
        record.write_text(json.dumps({"reader": {"data": read}}))
        with nullcontext() if read == data else pytest.raises(OSError, match="run has read another text than"):
            runs.train(tmp_path / "run", 0, "config/toy_prune.py", data=tiny_data)


def test_rows_of_a_pruning_table_have_equal_settings(monkeypatch, tmp_path, capsys):
    """But for what their names say. A row with more seeds stays, if it is of the same source."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(pruning, "OUT", tmp_path / "out")
    monkeypatch.setattr(pruning, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(pruning, "figure", lambda drawn: SimpleNamespace(savefig=lambda file: None))
    commands, losses = {}, {"a": {"loss": 1.0}, "b": {"loss": 3.0}}

    def pretend(*command):
        words = [str(word) for word in command]
        if words[0] == "eval.py":
            Path(words[-1]).parent.mkdir(parents=True, exist_ok=True)
            Path(words[-1]).write_text(json.dumps({"models": {"": {"domains": losses}}}))
        else:
            settings = asdict(load(Settings, words[1:]))
            out = Path(settings.pop("out"))
            commands[out.name] = settings
            needs = [settings["gates"]] * settings["gates"].endswith(".json") + [settings["init_from"]]
            assert all(Path(x).exists() for x in needs if str(tmp_path) in x), out
            (out / "model").mkdir(parents=True)
            (out / "model/pruning.json").touch()

    monkeypatch.setattr(runs, "call", pretend)
    monkeypatch.setattr(runs, "check_text", lambda out, data: None)
    command = ["pruning.py", "smollm2_short", "--jobs", "1", "--seeds"]
    assert call(monkeypatch, pruning.main, *command, "1") == 0
    usual = commands["smollm2_short_activation_at_one_stroke_0"]
    assert usual["steps"] * usual["batch_size"] * usual["seq_len"] == 716_800 and usual["gates"] == "activation"
    stages = [run for name, run in commands.items() if "two_stages" in name]
    assert sum(run["steps"] for run in stages) == 700 and len(commands) == len(pruning.ROWS) + 1
    way = {"gates", "fade", "noise_from", "noise_to", "settle_at", "sparsity_warmup"}
    for name, run in commands.items():
        if "two_stages" not in name and "scratch" not in name:
            assert {key for key in run if run[key] != usual[key]} <= way, name
    learned = commands["smollm2_short_learned_settling_0"]
    assert (learned["settle_at"], learned["fade"], learned["noise_to"]) == (200, 200, 180)

    file, rows = tmp_path / "docs/smollm2_short.json", ["--rows", "from scratch"]
    before = json.loads(file.read_text())
    assert before["losses"] == {row: [2.0] for row in pruning.ROWS} and before["source"] == 2.0
    before["losses"] |= {"from scratch": [9.0, 9.5], "random, fading": [7.0, 7.5]}
    file.write_text(json.dumps(before))
    assert call(monkeypatch, pruning.main, *command, "1", *rows) == 0
    assert json.loads(file.read_text())["losses"] == before["losses"]
    assert call(monkeypatch, pruning.main, *command, "2", *rows) == 0
    assert json.loads(file.read_text())["losses"] == before["losses"] | {"from scratch": [2.0, 2.0]}
    of_others = json.dumps(before | {"source": 2.1})
    file.write_text(of_others)
    assert call(monkeypatch, pruning.main, *command, "2", *rows) == 0
    assert file.read_text() == of_others and "stays as it is" in capsys.readouterr().out
    file.write_text(json.dumps(before | {"source": 2.1, "losses": {"from scratch": [9.0]}}))
    assert call(monkeypatch, pruning.main, *command, "2", *rows) == 0
    assert json.loads(file.read_text())["losses"] == {"from scratch": [2.0, 2.0]}
    capsys.readouterr()
    assert call(monkeypatch, pruning.main, *command, "0") == 2 and "at least 1" in capsys.readouterr().err


def test_the_tables_in_the_docs_are_what_was_measured():
    results = json.loads((ROOT / "docs/compare/results.json").read_text())
    text = (ROOT / "docs/comparison.md").read_text() + (ROOT / "docs/default.md").read_text()
    for name in results.keys() - {"command"}:
        assert all(table in text for table in compare.tables(results[name])), name
        assert compare.answers_table(results[name]["skewed"]) in text, name  # empty where none was asked
    for scale in ("toy", "smollm2", "smollm2_short"):
        measured = json.loads((ROOT / f"docs/pruning/{scale}.json").read_text())
        assert pruning.table(measured) in (ROOT / "docs/pruning.md").read_text(), scale


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


def test_steps_that_are_timed_on_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu.Measured, "device", torch.device("cpu"))
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    wait = partial(warnings.warn, "called a synchronizing CUDA operation")
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: wait() if mode == "warn" else None)
    for name in ("max_memory_allocated", "max_memory_reserved"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(gpu, "SHAPES", {"small": LlamaConfig(128, 2, 32, 2, 2, 16, 64, 32)})
    monkeypatch.setattr(gpu, "TARGETS", {"small": (1, 16, 1, 32)})
    monkeypatch.setattr(gpu, "BATCHES", {"small": (4, 2, 16)})
    for gated in (False, True):
        began = time.perf_counter()
        row = gpu.measure(("small", gated, gated, False))
        assert 0 < row["seconds"] * gpu.STEPS / 2 < time.perf_counter() - began and row["waits"] == gpu.STEPS


def test_the_figures_of_a_gpu_go_on_where_they_were(monkeypatch, tmp_path, capsys):
    """Rows that the file has are not measured again, and another device's file stays as it is."""
    file, measured = tmp_path / "gpu.json", []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(gpu, "measure", lambda row: {"row": row, "seconds": len(measured.append(row) or measured)})
    monkeypatch.setattr(gpu, "ROWS", gpu.ROWS[:2])
    assert not call(monkeypatch, gpu.main, "gpu.py", "--out", file)
    monkeypatch.setattr(gpu, "ROWS", [("1.3B", True, True, False), *gpu.ROWS])
    assert not call(monkeypatch, gpu.main, "gpu.py", "--out", file)
    rows = json.loads(file.read_text())["rows"]
    assert [row["seconds"] for row in rows] == [1, 2, 3] and [tuple(row["row"]) for row in rows] == measured
    before = file.read_text()
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another GPU")
    assert call(monkeypatch, gpu.main, "gpu.py", "--out", file) == 2 and file.read_text() == before
    assert "another device" in capsys.readouterr().err and len(measured) == 3


def test_what_was_timed_on_a_gpu(monkeypatch):
    """The page has the figures of the file: tokens per second, the share of 989 TFLOP/s, and the memory."""
    monkeypatch.setattr(gpu.cost, "memory", lambda *_: {"all": 0})  # the dry runs take minutes
    found = json.loads((ROOT / "docs/performance/gpu.json").read_text())
    page, lines = (ROOT / "docs/performance.md").read_text(), gpu.table(found).splitlines()[2:]
    assert len(lines) == len(found["rows"]) == page.count(" GiB | 0 |")
    assert all(line.endswith("| 0.0 GiB | 0 |") and line.removesuffix("0.0 GiB | 0 |") in page for line in lines)
    [dense] = [r for r in found["rows"] if r["row"] == ["1.3B", False, False, False]]
    c = gpu.SHAPES["1.3B"]
    weights = c.n_layer * (4 * c.d_model**2 + 3 * c.d_model * c.d_ffn) + c.vocab_size * c.d_model
    flops = 32 * 4096 * 3 * (2 * weights + 2 * c.n_layer * 4096 * c.d_model)
    assert f"| 1.3B | dense | {32 * 4096 / dense['seconds']:,.0f} | {flops / dense['seconds'] / 989e12:.1%} |" in page
