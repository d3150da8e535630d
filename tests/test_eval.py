"""eval.py as a person runs it: several models at once, as a table and as JSON, a sample, and mistakes in one line."""

import json
import math
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, metrics, with_labels
from conftest import run as train_run

import eval as eval_module
from experiments import bench
from model import Llama, LlamaConfig
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
    monkeypatch.setattr(eval_module, "REPEATS", 2)
    return call(monkeypatch, eval_module.main, "eval.py", *args)


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
            first = source["domains"][domain]
            assert row["degradation"] == pytest.approx(loss - first["loss"], abs=1e-6)
            in_bits = row["bits_per_byte"] - first["bits_per_byte"]
            assert row["degradation_bits_per_byte"] == pytest.approx(in_bits, abs=1e-9)
            assert f"{loss:.3f}" in text
    assert pruned["average"]["loss"] == pytest.approx(sum(r["loss"] for r in pruned["domains"].values()) / 3)
    assert pruned["worst"]["degradation"] == max(r["degradation"] for r in pruned["domains"].values())
    assert pruned["parameters"] == continued["parameters"] < source["parameters"]
    assert all(r[f"{kind}_tokens_per_second"] > 0 for r in results.values() for kind in ("prefill", "decode"))
    for word in ("average", "worst", "parameters", "prefill tokens/s", "decode tokens/s", f"{pruned['parameters']:,}"):
        assert word in text


def test_a_table_compares_speeds_with_the_first_model():
    row = {"loss": 1.0, "perplexity": 1.0, "bits_per_byte": 1.0, "degradation": 0.0}
    rows = {"domains": {"a": row}, "average": row, "worst": row}
    speeds = [{"parameters": n, "prefill_tokens_per_second": a, "decode_tokens_per_second": b}
              for n, a, b in ((100, 10.0, 5.0), (50, 30.0, 4.0))]  # fmt: skip
    row |= {"loss": 1.125, "perplexity": 3.25, "bits_per_byte": 0.375, "degradation": 0.0625}
    text = tables.loss_table({str(i): rows | speed for i, speed in enumerate(speeds)})
    assert text.splitlines()[2].split() == ["a", *["1.125", "3.25", "0.375", "0.062"] * 2]
    shown = [line.split()[-2:] for line in text.splitlines()[-3:]]
    assert shown == [["50", "(0.50x)"], ["30", "(3.00x)"], ["4", "(0.80x)"]]


def test_speed_is_a_median_and_decoding_has_a_cache(monkeypatch):
    """What is measured: a prompt, then one token at a time. The clock moves by a second a token that is computed."""
    now, llama, lengths = [0.0], Llama(LlamaConfig(61, 1, 16, 2, 2, 8, 16, 512)), []

    def forward(tokens, cache=None):
        now[0] += tokens.shape[1]
        lengths.append((tokens.shape[1], cache is not None and cache[0].used))
        return Llama.forward(llama, tokens, cache=cache)

    monkeypatch.setattr(llama, "forward", forward)
    monkeypatch.setattr(eval_module.time, "perf_counter", lambda: now[0])
    measured = eval_module.speed_once(llama)
    assert measured == {"prefill": pytest.approx(1.0), "decode": pytest.approx(1.0)}
    decoded = [length for length in lengths if length[0] == 1]
    assert decoded == [(1, 256 + i) for i in range(eval_module.DECODE)]
    once = iter([{"prefill": x, "decode": 2 * x} for x in (9.0, 1.0, 2.0, 1.5, 0.1)])
    monkeypatch.setattr(eval_module, "speed_once", lambda model: next(once))
    [found] = eval_module.speed([llama], nullcontext)
    assert found == {"prefill_tokens_per_second": 1.5, "decode_tokens_per_second": 3.0}


def test_a_domain_may_be_called_average():
    rows = [{"loss": x, "perplexity": 1.0, "bits_per_byte": 1.0, "degradation": 0.0} for x in (9.0, 5.0, 7.0)]
    result = {"domains": {"average": rows[0]}, "average": rows[1], "worst": rows[2]}
    result |= {"parameters": 1, "prefill_tokens_per_second": 1.0, "decode_tokens_per_second": 1.0}
    shown = [line.split()[:2] for line in tables.loss_table({"m": result}).splitlines()[2:5]]
    assert shown == [["average", "9.000"], ["average", "5.000"], ["worst", "7.000"]]


def test_a_limit_of_sequences_and_what_it_covers(chain, tiny_data, tmp_path, monkeypatch, capsys):
    """Without --sequences a domain has at most 256 sequences; the report says how many there are."""
    data, model = TokenData(tiny_data), chain[0]["pretrain"]
    available = {d: (data.tokens(d, "train").size - 1) // 64 for d in data.domains}
    assert min(available.values()) > 1000
    calls = {"default": [], "five": ["--sequences", "5"], "all": ["--sequences=0", "--split=test"]}
    found = {}
    for name, args in calls.items():
        file = tmp_path / f"{name}.json"
        assert run(monkeypatch, model, "--data", tiny_data, "--split=train", *args, "--json", file) == 0
        found[name] = json.loads(file.read_text())
        text = capsys.readouterr().out
        for domain, n in found[name]["sequences"].items():
            assert f"{domain} {n['evaluated']:,} of {n['available']:,}" in text
    assert found["default"]["sequences"] == {d: {"evaluated": 256, "available": n} for d, n in available.items()}
    assert {n["evaluated"] for n in found["five"]["sequences"].values()} == {5}
    assert all(n["evaluated"] == n["available"] for n in found["all"]["sequences"].values())
    for name, result in found.items():
        tokens, labels = with_labels(data, "sums", result["split"], 64, {"five": 5, "all": 0}.get(name, 256))
        with torch.no_grad():
            logits = eval_module.load_model(model)(tokens[:, :-1])
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten()).item()
        (measured,) = result["models"].values()
        assert measured["domains"]["sums"]["loss"] == pytest.approx(expected, rel=1e-5)


def test_sequences_that_cross_the_borders_of_windows_are_told(chain, tiny_data, monkeypatch, capsys):
    for split, seq_len, said in (("test", 64, False), ("test", 48, True), ("train", 48, False)):
        args = [chain[0]["pretrain"], "--data", tiny_data, f"--split={split}", f"--seq_len={seq_len}", "--sequences=2"]
        assert run(monkeypatch, *args) == 0
        assert ("windows of 128 tokens, and sequences of 48 go across" in capsys.readouterr().out) == said


@pytest.mark.parametrize("seq_len", [1, 50, 127, 128, 129, 256])
def test_the_first_token_of_a_held_out_window_does_not_count(tiny_data, tmp_path, seq_len):
    """It follows unrelated text. The training split has no windows, so there each token counts."""
    folder = Path(shutil.copytree(tiny_data, tmp_path / "data"))
    for file in folder.glob("*/*.bin"):
        tokens = np.ones(file.stat().st_size // 2, "<u2")
        tokens[::128] = 7
        tokens.tofile(file)
    data = TokenData(folder)

    def model(tokens, z, targets):
        return 1.0 + 99 * (targets == 7)

    model.embed_tokens = torch.nn.Embedding(1, 1)
    for split, expected in (("val", 1), ("test", 1), ("train", 1 + 99 / 128)):
        losses = eval_module.domain_losses(model, data, split, seq_len, 0, 64)
        assert losses == pytest.approx(dict.fromkeys(data.domains, expected), abs=0.01 if split == "train" else 1e-9)


def test_bfloat16_is_autocast_as_in_training(chain, tiny_data, tmp_path, monkeypatch):
    out, args = chain
    losses = {}
    for dtype in ("", "float32", "bfloat16"):
        file = tmp_path / f"{dtype}.json"
        given = [f"--dtype={dtype}"] if dtype else []
        command = [out["pretrain"], f"--data={tiny_data}", "--split=val", "--sequences=4", f"--json={file}"]
        assert run(monkeypatch, *command, *given) == 0
        result = json.loads(file.read_text())
        assert result["dtype"] == (dtype or "float32")  # the default on a CPU
        losses[dtype] = {d: x["loss"] for d, x in result["models"][str(out["pretrain"])]["domains"].items()}
    assert losses[""] == losses["float32"] != losses["bfloat16"]
    # what train.py itself logs at the end of a run in bfloat16 that starts from this model and changes nothing in it
    same = ["--dtype=bfloat16", "--steps=1", "--lr=0", f"--init_from={out['pretrain']}", f"--out={tmp_path / 'run'}"]
    assert train_run(monkeypatch, f"--data={tiny_data}", *same) == 0
    assert losses["bfloat16"] == pytest.approx(metrics(tmp_path / "run", "end")[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("device, dtype", [("cpu", "float32"), ("cuda", "bfloat16")])
def test_the_default_dtype_of_a_device(device, dtype):
    args = eval_module.argparse.Namespace(
        continuation=False, questions=None, write_questions=None, dtype=None, sequences=1, seq_len=1
    )
    eval_module.fill_in_defaults(args, None, {}, torch.device(device))
    assert args.dtype == dtype


def test_the_time_left_is_shown_where_it_takes_long(chain, tiny_data, monkeypatch, capsys):
    args = [chain[0]["pretrain"], f"--data={tiny_data}", "--sequences=6", "--batch_size=4"]
    monkeypatch.setattr(tables, "PATIENCE", 60)
    assert run(monkeypatch, *args) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(tables, "PATIENCE", 0)
    for more, total in (([], "18"), (["--continuation", "--split=train"], "36")):  # three domains; two choices each
        assert run(monkeypatch, *args, *more) == 0
        shown = capsys.readouterr().err
        assert f"0/{total} [" in shown and f"{chain[0]['pretrain']}: 100%" not in shown.split("\r")[1]

    class Bar:
        n = 0

        def update(self, n):
            self.n += n

    bar, data = Bar(), TokenData(tiny_data)
    eval_module.domain_losses(eval_module.load_model(args[0]), data, "test", 64, 6, 4, progress=bar)
    assert bar.n == 18


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
    monkeypatch.setattr(eval_module, "load_tokenizer", lambda *spec: tokenizer)
    for bos in (None, 1):
        monkeypatch.setattr(tokenizer, "bos", bos, raising=False)
        for text in ("ab", ""):
            assert run(monkeypatch, chain[0]["pretrain"], f"--data={tiny_data}", f"--sample={text}") == 0
            assert capsys.readouterr().out.splitlines()[1:] == [text]
    assert prompts == [[97, 98], [256], [1, 97, 98], [1]]


def test_a_text_that_the_model_has_no_token_for(tiny_data, tmp_path, monkeypatch, capsys):
    """The tokenizer of the data may have more tokens than the model has rows."""
    Llama(LlamaConfig(110, 1, 16, 1, 1, 16, 16, 64)).save_pretrained(tmp_path / "m")
    monkeypatch.setattr(eval_module, "check_tokenizer", lambda *_: None)
    assert run(monkeypatch, tmp_path / "m", f"--data={tiny_data}", "--sample=a bad egg") == 0
    assert run(monkeypatch, tmp_path / "m", f"--data={tiny_data}", "--sample=two") == 2
    assert "it has 110 tokens, and the text holds the id 119" in capsys.readouterr().err


def test_a_sample_ends_where_the_model_ends(chain, tiny_data, monkeypatch, capsys):
    """The model takes 64 tokens, a byte each: by default the sample is no longer; more is an error."""
    lengths = []

    def generate(self, tokens, n, temperature, seed):
        lengths.append((tokens.shape[1], n))
        return tokens

    monkeypatch.setattr(eval_module.Llama, "generate", generate)
    for text, more in (("ab", []), ("a" * 63, []), ("ab", ["--tokens=62"])):
        assert run(monkeypatch, chain[0]["pretrain"], f"--data={tiny_data}", f"--sample={text}", *more) == 0
    assert lengths == [(2, 62), (63, 1), (2, 62)]
    for text, more in (("a" * 64, []), ("ab", ["--tokens=63"])):
        assert run(monkeypatch, chain[0]["pretrain"], f"--data={tiny_data}", f"--sample={text}", *more) == 2
        assert "the models take 64 at most" in capsys.readouterr().err


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_sample_of_no_numbers_is_told(temperature, chain, tiny_data, tmp_path, monkeypatch, capsys):
    """All weights are finite, and the logits are not."""
    model = Llama.from_pretrained(chain[0]["pretrain"] / "model")
    with torch.no_grad():
        model.norm.weight.mul_(1e38)
        model.lm_head.weight.mul_(1e10)
    model.save_pretrained(tmp_path / "m")
    more = "--sample=the cat", f"--temperature={temperature}"
    assert run(monkeypatch, tmp_path / "m", f"--data={tiny_data}", *more) == 2
    assert capsys.readouterr().err == f"eval.py: {tmp_path / 'm'}: the logits are not finite\n"


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
    "questions have a number": (["MODEL", "--questions", "a.jsonl", "--sequences=2"], "has no effect on questions of"),
    "a sample has no results": (["MODEL", "--sample=a", "--json=x.json"], "--json cannot go with it"),
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
    """Held-out text no longer than the model's sequences: as much of it as there is."""
    (tmp_path / "c" / "d").mkdir(parents=True)
    for i in range(40):
        (tmp_path / "c" / "d" / f"{i}.txt").write_text(f"{i} " * 12)
    prepare(str(tmp_path / "c"), tmp_path / "out", window=32, held_out=0.2)
    data = TokenData(tmp_path / "out")
    assert data.tokens("d", "test").size == 64
    assert run(monkeypatch, chain[0]["pretrain"], f"--data={tmp_path / 'out'}") == 0
    assert run(monkeypatch, chain[0]["pretrain"], f"--data={tmp_path / 'out'}", "--seq_len=64") == 2
    err = capsys.readouterr().err
    assert "has 64 tokens, too few for one sequence of 64" in err and err.count("\n") == 1


def test_the_benchmark_compares_models_of_one_size_and_trains_all(monkeypatch):
    """One round; speed itself is experiments/bench.py's to say."""
    monkeypatch.setattr(bench, "BATCH", 1)
    for name in ("CONFIG", "TARGET"):
        monkeypatch.setattr(bench, name, replace(getattr(bench, name), n_layer=1, vocab_size=64))
    steps = bench.make_steps()
    assert set(steps) == {"transformers", "other products", "dense", "gated"}
    for step in steps.values():
        step()
    assert 0 < bench.time_schedule(1, points=12) < 1 and 0 < bench.time_weights(3) < 0.1


def test_the_benchmark_says_which_bound_is_not_kept(capsys):
    table = bench.Table()
    table.add("time", 2.0, "ms", high=3)
    table.add("speed", 0.8, low=0.85)
    table.add("broken", float("nan"), high=1)
    assert table.failed == ["speed", "broken"]
    assert [line.endswith("FAILED") for line in capsys.readouterr().out.splitlines()] == [False, True, True]
    assert bench.law_errors(12, 0.0, 3).max() < 1e-6
