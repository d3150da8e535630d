"""eval.py as a person runs it: several models at once, as a table and as JSON, a sample, and mistakes in one line."""

import json
import math
import sys

import pytest
import torch
from conftest import metrics

import eval as eval_module
from experiments import bench
from plumbing import tables
from plumbing.data import TokenData
from plumbing.tokenizer import load_tokenizer
from prepare_data import prepare

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, args)])
    try:
        eval_module.main()
        return 0
    except SystemExit as end:
        return end.code


def test_table_and_json_of_runs_checkpoints_and_models(chain, tiny_data, tmp_path, monkeypatch, capsys):
    out, _ = chain
    models = [out["pretrain"], out["prune"] / "checkpoints" / "step_000060", out["continue"] / "model"]
    file = tmp_path / "eval.json"
    assert run(monkeypatch, *models, f"--data={tiny_data}", "--split=val", "--sequences=4", f"--json={file}") == 0
    text, results = capsys.readouterr().out, json.loads(file.read_text())["models"]
    source, pruned, continued = (results[str(m)] for m in models)
    # the same windows as the run's own last evaluation
    for result, stage in ((source, "pretrain"), (pruned, "prune"), (continued, "continue")):
        for domain, loss in metrics(out[stage], "end")[0]["loss"].items():
            row = result["domains"][domain]
            assert row["loss"] == pytest.approx(loss, rel=1e-6)
            assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
            assert row["bits_per_byte"] == pytest.approx(
                loss / math.log(2) / TokenData(tiny_data).bytes_per_token(domain, "val"), rel=1e-6
            )
            assert row["degradation"] == pytest.approx(loss - source["domains"][domain]["loss"], abs=1e-6)
            assert f"{loss:.3f}" in text
    assert pruned["average"]["loss"] == pytest.approx(sum(r["loss"] for r in pruned["domains"].values()) / 3)
    assert pruned["worst"]["degradation"] == max(r["degradation"] for r in pruned["domains"].values())
    assert pruned["parameters"] == continued["parameters"] < source["parameters"]
    assert all(r[f"{kind}_tokens_per_second"] > 0 for r in results.values() for kind in ("prefill", "decode"))
    for word in ("average", "worst", "parameters", "prefill tokens/s", "decode tokens/s", f"{pruned['parameters']:,}"):
        assert word in text


def test_a_domain_may_be_called_average():
    rows = [{"loss": x, "perplexity": 1.0, "bits_per_byte": 1.0, "degradation": 0.0} for x in (9.0, 5.0, 7.0)]
    result = {"domains": {"average": rows[0]}, "average": rows[1], "worst": rows[2]}
    result |= {"parameters": 1, "prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0}
    shown = [line.split()[:2] for line in tables.loss_table({"m": result}).splitlines()[2:5]]
    assert shown == [["average", "9.000"], ["average", "5.000"], ["worst", "7.000"]]


def test_help_is_in_groups(monkeypatch, capsys):
    assert run(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    for title in ("text:", "two-choice questions", "a sample", "machine:", "results:"):
        assert f"\n{title}" in text
    assert "--device" in text.partition("\nmachine:")[2]


def test_a_sample_begins_with_bos(chain, tiny_data, monkeypatch, capsys):
    """Where the tokenizer has one; without BOS an empty text begins with the end token. Neither is printed."""
    prompts = []

    def generate(self, tokens, n, temperature, seed):
        prompts.append(tokens[0].tolist())
        return tokens

    monkeypatch.setattr(eval_module.Llama, "generate", generate)
    tokenizer = load_tokenizer("byte")
    monkeypatch.setattr(eval_module, "load_tokenizer", lambda spec: tokenizer)
    for bos in (None, 1):
        monkeypatch.setattr(tokenizer, "bos", bos, raising=False)
        for text in ("ab", ""):
            assert run(monkeypatch, chain[0]["pretrain"], f"--data={tiny_data}", f"--sample={text}") == 0
            assert capsys.readouterr().out.splitlines()[1:] == [text]
    assert prompts == [[97, 98], [256], [1, 97, 98], [1]]


def test_a_sample_continues_the_text(chain, tiny_data, monkeypatch, capsys):
    args = (chain[0]["pretrain"], f"--data={tiny_data}", "--sample", "the cat", "--tokens=30")
    assert run(monkeypatch, *args) == 0
    first = capsys.readouterr().out
    assert "\nthe cat" in first and len(first) > len("the cat") + 30
    run(monkeypatch, *args)
    assert capsys.readouterr().out == first  # seeded
    run(monkeypatch, *args, "--seed=1")
    assert capsys.readouterr().out != first


MISTAKES = {
    "no such model": (["out/nothing"], "out/nothing: no such model, run or checkpoint"),
    "an empty run": (["EMPTY"], "has no model and no checkpoint yet"),
    "too long": (["MODEL", "--seq_len=999"], "the models take 1 to 64 tokens"),
    "misspelt": (["MODEL", "--sequence_number=3"], "unrecognized arguments"),
    "no number of questions": (["MODEL", "--continuation", "--sequences=0"], "questions need a number"),
    "no data": (["MODEL", "--data=data/nothing"], "no data set there"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name, chain, tiny_data, tmp_path, monkeypatch, capsys):
    args, words = MISTAKES[name]
    places = {"EMPTY": tmp_path, "MODEL": chain[0]["pretrain"]}
    assert run(monkeypatch, f"--data={tiny_data}", *(places.get(a, a) for a in args)) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("eval.py: ") and err.count("\n") == 1


def test_text_as_short_as_the_window(chain, tmp_path, monkeypatch, capsys):
    """One window of held-out text, no longer than the model's sequences: as much of it as there is."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "c" / "d" / f"{i}.txt").write_text(f"{i} " * 8)
    prepare(str(tmp_path / "c"), tmp_path / "out", window=32, held_out=0.2)
    data = TokenData(tmp_path / "out")
    assert data.tokens("d", "test").size == 32
    assert run(monkeypatch, chain[0]["pretrain"], f"--data={tmp_path / 'out'}") == 0
    assert run(monkeypatch, chain[0]["pretrain"], f"--data={tmp_path / 'out'}", "--seq_len=32") == 2
    err = capsys.readouterr().err
    assert "has 32 tokens, too few for one sequence of 32" in err and err.count("\n") == 1


def test_the_benchmark_compares_models_of_one_size_and_trains_all(monkeypatch):
    """One round; speed itself is experiments/bench.py's to say."""
    monkeypatch.setattr(bench, "BATCH", 1)
    steps = bench.make_steps()
    assert set(steps) == {"transformers", "dense, F.linear", "dense", "gated"}
    for step in steps.values():
        step()
    assert 0 < bench.time_schedule(1) < 1
