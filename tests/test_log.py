"""The figures of metrics.jsonl and timings.jsonl: each is what docs/metrics.md says it is."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import GATES, ROBUST, TARGET, metrics, run

import train
from model import Gates
from plumbing import cost, log
from plumbing.data import BatchReader, TokenData
from plumbing.models import load_model
from prepare_data import prepare
from scaling_law import ScalingLaw


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is moved."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(log.time, "monotonic", lambda: now.seconds)
    return now


def test_evaluations_do_not_count_as_training(clock):
    measured = log.Clock(step=10, seconds=50.0)
    clock.seconds += 4
    with measured.paused():
        clock.seconds += 6
    assert measured.lap(14, steps=34) == (4, 4.0, 50.0)  # in all 4 steps in 10 seconds, and 20 are left
    clock.seconds += 5
    assert measured.lap(24, steps=34) == (10, 5.0, pytest.approx(10 * 15 / 14))
    assert measured.total() == 65


def test_speed_and_utilisation(clock, monkeypatch):
    """MFU: the FLOPs of the tokens of a second, by those of the device. Each process has its part of them. Where the
    small model was cut out since the last line, each step has those of its own model."""
    written, shape, small = [], SimpleNamespace(flops=6e3), SimpleNamespace(flops=1e3)
    monkeypatch.setattr(cost, "flops_per_token", lambda config, length: config.flops * length)
    monkeypatch.setattr(cost, "peak_flops", lambda device, dtype: 1e8)
    monkeypatch.setattr(log.parallel, "size", lambda: 4)
    mine = object.__new__(log.Log)
    mine.s, mine.shape, mine.device = SimpleNamespace(steps=9, seq_len=100, dtype="float32"), shape, torch.device("cpu")
    mine.run, mine.tokens_per_step = SimpleNamespace(time=lambda **line: written.append(line)), 800
    mine.reader = SimpleNamespace(epochs=lambda: np.zeros(1))
    mine.go_on(step=0, seconds=0.0)
    clock.seconds += 4
    text = mine._timing(2)
    assert written[0]["tokens_per_second"] == 400 and written[0]["mfu"] == 6e3 * 100 * 400 / 4 / 1e8
    assert "MFU 60.0%" in text and written[0]["seconds"] == 4
    mine.becomes(small, 3)
    clock.seconds += 4
    mine._timing(6)  # one step of the large model, three of the small one
    assert written[1]["mfu"] == (6e3 + 3 * 1e3) / 4 * 100 * 800 / 4 / 1e8
    clock.seconds += 4
    mine._timing(7)
    assert written[2]["mfu"] == 1e3 * 100 * 200 / 4 / 1e8


def test_the_seconds_of_a_run_go_on(tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=4", "--log_interval=1"]
    for stop in (["--stop_at=2"], []):
        assert run(monkeypatch, *args, *stop) == 0
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "x" / "timings.jsonl").read_text().splitlines()]
    assert len(seconds) == 4 and seconds == sorted(seconds) and seconds[2] > seconds[1]


def test_the_loss_of_each_domain_is_the_mean_over_its_tokens(tiny_data, tmp_path, monkeypatch):
    """Of the batches that are read, with the weights before each step."""
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=6", "--save_interval=1", "--keep_checkpoints=9"]
    assert run(monkeypatch, *args, "--log_interval=3", "--ratio={'animals': 3, 'brackets': 1, 'sums': 2}") == 0
    data, losses, lines = TokenData(tiny_data), [], metrics(tmp_path / "x", "train")
    reader = BatchReader(data, 64, 4, seed=0)
    for step in range(6):
        [(tokens, domains, _)] = reader.next_batch(step, np.array([3, 1, 2]) / 6)
        if step:  # there is no checkpoint of step 0
            model = load_model(tmp_path / "x" / "checkpoints" / f"step_{step:06d}")
            with torch.no_grad():
                logits = model(tokens[:, :-1]).transpose(1, 2)
            nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)
            losses += [(step, data.domains[d], x) for d, x in zip(domains.tolist(), nll.tolist())]
    last = [(name, x) for step, name, x in losses if step >= 3]
    assert lines[1]["loss"] == pytest.approx(np.mean([x for _, x in last]), rel=1e-5)
    for name in data.domains:
        mine = [x for domain, x in last if domain == name]
        assert lines[1]["domain_loss"][name] == (pytest.approx(np.mean(mine), rel=1e-5) if mine else None)
    assert len({name for name, _ in last}) > 1


def test_a_line_across_a_cut_has_all_of_its_steps(chain, tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", *TARGET, "--gates=random", "--fade=3"]
    losses = {}
    for every in (1, 6):
        out = tmp_path / str(every) / "x"
        assert run(monkeypatch, *args, "--steps=6", f"--out={out}", f"--log_interval={every}") == 0
        losses[every] = [line["loss"] for line in metrics(out, "train")]
    assert len(losses[1]) == 6 and losses[6] == [pytest.approx(np.mean(losses[1]), rel=1e-6)]


def test_what_is_cut_out_at_once_is_never_the_large_model(chain, tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", *TARGET, "--gates=random", "--steps=2"]
    shapes, timing = [], log.Log._timing
    monkeypatch.setattr(log.Log, "_timing", lambda self, step: (shapes.append(self.shape), timing(self, step))[1])
    assert run(monkeypatch, *args, f"--out={tmp_path / 'x'}") == 0
    (first,), (end,) = metrics(tmp_path / "x", "run"), metrics(tmp_path / "x", "end")
    assert first["target"] is None and first["source"]["d_model"] == 24 and first["parameters"] == end["parameters"]
    assert {shape.n_params() for shape in shapes} == {end["parameters"]}


def test_predictions_are_those_of_the_end(tiny_data, tmp_path, monkeypatch):
    """`prediction` is where the curve ends; the curve is the law's, from this step to the last one."""
    laws, update = [], train.Mixture.update

    def watched(mixture, progress, losses, now, end):
        update(mixture, progress, losses, now, end)
        laws.append((list(mixture.laws), now, end))

    monkeypatch.setattr(train.Mixture, "update", watched)
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=40", *ROBUST, "--stop_at=36"]
    assert run(monkeypatch, *args) == 0
    predicted = 0
    for line, (found, now, end) in zip(metrics(tmp_path / "x", "eval"), laws, strict=True):
        for d, (name, law) in enumerate(zip(line["loss"], found)):
            if not isinstance(law, ScalingLaw):
                assert line["prediction"][name] is None
                continue
            at = [law.predict(p.tokens[d], p.params, p.rate) for p in (now, end)]
            curve, steps = line["curve"]["loss"][name], line["curve"]["step"]
            assert [curve[0], curve[-1]] == pytest.approx(at) and line["prediction"][name] == pytest.approx(at[1])
            assert steps == pytest.approx(np.linspace(line["step"], 40, len(curve)))
            predicted += abs(at[0] - at[1]) > 1e-3
    assert predicted


def test_bits_per_byte_are_by_the_bytes_of_val(tiny_corpus, bpe_file, tmp_path, monkeypatch):
    """With a tokenizer of several bytes a token, whose ratio is another one in train. The bytes are counted here."""
    tokenizers = pytest.importorskip("tokenizers")
    prepare(str(tiny_corpus), tmp_path / "data", tokenizer=str(bpe_file), window=64, held_out=0.1)
    data = TokenData(tmp_path / "data")
    args = [f"--data={data.path}", f"--out={tmp_path / 'x'}", "--steps=2"]
    assert run(monkeypatch, *args) == 0
    bpe = tokenizers.Tokenizer.from_file(str(bpe_file))
    for line in (metrics(tmp_path / "x", "eval")[0], metrics(tmp_path / "x", "end")[0]):
        for name, loss in line["loss"].items():
            per_token = {}
            for split in ("train", "val"):
                ids = data.tokens(name, split).tolist()
                text = [len(bpe.decode([i], skip_special_tokens=True).encode()) for i in sorted(set(ids))]
                size = dict(zip(sorted(set(ids)), text))
                per_token[split] = sum(size[i] for i in ids) / len(ids)
            assert line["bits_per_byte"][name] == pytest.approx(loss / math.log(2) / per_token["val"], rel=1e-6)
            assert per_token["val"] != pytest.approx(per_token["train"], rel=1e-5)


def test_gates_are_logged_as_means_over_bins():
    hidden, ffn = torch.rand(70), torch.rand(2, 64)
    picture = log.gate_picture(Gates(layer=torch.tensor([1.0, 0.5]), hidden=hidden, ffn=ffn))
    assert picture["layer"] == [1.0, 0.5] and picture["head"] is None
    means = [part.mean() for part in np.array_split(hidden.double().numpy(), 32)]
    assert picture["hidden"] == pytest.approx(means, rel=1e-5)
    assert np.array(picture["ffn"]) == pytest.approx(ffn.view(2, 32, 2).mean(-1).numpy(), rel=1e-5)


def test_the_last_gates_are_those_at_the_target(chain, tiny_data, tmp_path, monkeypatch):
    """Of a run that ends on its way: more would survive than the target has."""
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", *TARGET, *GATES, "--steps=25"]
    assert run(monkeypatch, *args, f"--out={tmp_path / 'x'}", "--gate_lr=0.01", "--phi=1") == 0
    end, written = metrics(tmp_path / "x", "end")[0], json.loads((tmp_path / "x/model/pruning.json").read_text())
    assert np.count_nonzero(end["gates"]["layer"]) == 2 == len(written["layer"]["kept"])
    assert [np.count_nonzero(row) for row in end["gates"]["head"]] == [2, 2, 2]
