"""One loop, three stages: it learns, it hits the target, it goes on bit for bit, and mistakes end in one line."""

import json
import math
import re
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from conftest import SHAPE, metrics, run, with_labels
from processes import Fresh, script

import eval
import train
from eval import domain_losses
from masks import PruningMasks
from model import Llama, LlamaConfig
from plumbing.command_line import fields, load
from plumbing.data import BatchReader, TokenData
from plumbing.log import Clock
from plumbing.models import data_position, load_model
from plumbing.settings import Settings

ROOT = Path(__file__).parent.parent


def test_pretraining_learns(chain, tiny_data):
    evals = metrics(chain[0]["pretrain"], "eval")
    first, last = (np.mean(list(e["loss"].values())) for e in (evals[0], evals[-1]))
    assert first == pytest.approx(math.log(257), abs=0.1) and last < first - 1.5


def test_validation_losses_are_transformers(chain, tiny_data):
    """The per-domain loss of metrics.jsonl, by the library's own loss on the model/ directory."""
    for stage in chain[0]:
        data, model = TokenData(tiny_data), chain[0][stage] / "model"
        theirs, info = transformers.AutoModelForCausalLM.from_pretrained(model, output_loading_info=True)
        assert not any(info.values())
        for domain, loss in metrics(chain[0][stage], "end")[0]["loss"].items():
            tokens, labels = with_labels(data, domain, "val", 64, 4)
            with torch.no_grad():
                expected = theirs(tokens, labels=labels).loss.item()
            assert loss == pytest.approx(expected, rel=1e-5)


def test_pruning_ends_at_the_target(chain):
    out = chain[0]["prune"]
    last = metrics(out, "train")[-1]
    assert set(last["sparsity"]) == {"layer", "hidden", "head", "ffn"}
    for granularity, sparsity in last["sparsity"].items():
        assert sparsity == pytest.approx(last["target_sparsity"][granularity], abs=0.01)
    config = Llama.from_pretrained(out / "model").config
    assert (config.n_layer, config.d_model, config.n_head, config.n_kv_head, config.d_ffn) == (2, 24, 2, 2, 32)
    assert config.head_dim == 8
    kept = json.loads((out / "model" / "pruning.json").read_text())
    assert len(kept["layer"]["kept"]) == 2 and len(kept["hidden"]["kept"]) == 24
    assert [len(row) for row in kept["ffn"]["kept"]] == [32] * 3
    # what metrics.jsonl says of the extracted model is what the checkpoint of the gated one gives
    assert load_model(out / "checkpoints" / "step_000060").config == config


def test_phi_ascends(chain):
    """Its gradient is a square."""
    assert all(line["phi"]["ffn"] > 200 for line in metrics(chain[0]["prune"], "train"))


def test_domain_weights_follow_the_evaluations(chain):
    evals = metrics(chain[0]["prune"], "eval")
    assert len(evals) == 31 and evals[0]["step"] == 0
    assert evals[0]["reference"] == pytest.approx(metrics(chain[0]["pretrain"], "end")[0]["loss"], rel=1e-5)
    assert any(e["weights"] != evals[0]["weights"] for e in evals)
    assert evals[-1]["ratio"] != evals[0]["ratio"]
    assert any(any(p for p in e["prediction"].values()) and e["curve"] for e in evals)
    for e in evals:
        assert sum(e["weights"].values()) == pytest.approx(1)
    # the very next training line bears the weights of the evaluation before it
    lines = metrics(chain[0]["prune"])
    for line in (x for x in lines if x["type"] == "train"):
        before = [e for e in evals if e["step"] < line["step"]][-1]
        assert line["weights"] == before["weights"]


@pytest.mark.parametrize("stage, start", [("pretrain", 50), ("prune", 50), ("continue", 30)])
def test_stopped_and_resumed_equals_never_stopped_bit_for_bit(chain, stage, start, tmp_path, monkeypatch):
    """From a checkpoint, with a stop between evaluations, saves and log lines. The first test of test_checkpoint.py
    makes a whole run again."""
    out, args = chain
    mine = [f"--out={tmp_path / 'again'}" if a.startswith("--out=") else a for a in args[stage]]
    mine.append(f"--resume={out[stage] / 'checkpoints' / f'step_{start:06d}'}")
    assert run(monkeypatch, *mine, f"--stop_at={start + 3}") == 0
    assert not (tmp_path / "again" / "model").exists()
    with open(tmp_path / "again" / "metrics.jsonl", "a") as file:
        file.write('{"type": "train", "torn')  # it died while it wrote
    assert run(monkeypatch, *mine) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / "model" / name).read_bytes() == (out[stage] / "model" / name).read_bytes()
    assert metrics(tmp_path / "again")[1:] == metrics(out[stage])[1:]


def test_another_seed_is_another_run(chain, tmp_path, monkeypatch):
    out, args = chain
    for stage in ("pretrain", "prune"):
        mine = [f"--out={tmp_path / stage}" if a.startswith("--out=") else a for a in args[stage]]
        assert run(monkeypatch, *mine, "--seed=1", "--stop_at=5") == 0
        first, other = (metrics(top / stage, "train")[0] for top in (out["prune"].parent, tmp_path))
        assert first["step"] == other["step"] == 5 and first["loss"] != other["loss"]


def test_micro_batches_change_nothing_but_rounding(tiny_data, tmp_path, monkeypatch):
    lines = []
    for micro in (0, 2):
        out = tmp_path / str(micro)
        assert run(monkeypatch, f"--data={tiny_data}", f"--out={out}", "--steps=10", f"--micro_batch={micro}") == 0
        lines.append([[line["loss"], line["grad_norm"]] for line in metrics(out, "train")])
    np.testing.assert_allclose(*lines, rtol=1e-5)


def test_the_finished_model_takes_the_place_of_the_optimizer(tiny_data, tmp_path, monkeypatch):
    """Both at once may not fit, though every step did."""
    found, finish = [], train.Trainer.finish

    def watched(self, run, log, make):
        finish(self, run, log, lambda *args, **kwargs: found.append(len(self.optimizer.state)) or make(*args, **kwargs))

    monkeypatch.setattr(train.Trainer, "finish", watched)
    assert run(monkeypatch, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=2") == 0
    assert found == [0]


def test_a_finished_run_is_left_as_it_is(chain, monkeypatch, capsys):
    out, args = chain
    for stage in out:
        before = {p: p.read_bytes() for p in out[stage].rglob("*") if p.is_file()}
        assert run(monkeypatch, *args[stage]) == 0 and "finished already" in capsys.readouterr().out
        assert before == {p: p.read_bytes() for p in out[stage].rglob("*") if p.is_file()}


def test_the_number_of_steps_may_grow(chain, tmp_path, monkeypatch, capsys):
    """A finished run goes on from its last checkpoint, says what changed, and has a new model."""
    out, args = chain
    again = shutil.copytree(out["continue"], tmp_path / "again")
    mine = [f"--out={again}" if a.startswith("--out=") else a for a in args["continue"]]
    before = (again / "model" / "model.safetensors").read_bytes()
    assert run(monkeypatch, *mine, "--steps=30") == 2
    assert "steps was 40, now 30" in capsys.readouterr().err
    assert run(monkeypatch, *mine, "--steps=50") == 0
    assert "changed: steps was 40, now 50" in capsys.readouterr().out
    assert (again / "model" / "model.safetensors").read_bytes() != before
    assert [line["steps"] for line in metrics(again, "run")] == [40, 50]
    assert metrics(again, "run")[1]["changed"] == {"steps": {"was": 40, "now": 50}}
    assert metrics(again, "end")[0]["step"] == 50 and metrics(again, "train")[-1]["step"] == 50


def test_a_finished_run_whose_checkpoints_were_deleted_is_still_finished(tiny_data, tmp_path, monkeypatch, capsys):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=2"]
    assert run(monkeypatch, *args) == 0
    shutil.rmtree(tmp_path / "x" / "checkpoints")
    before = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    assert run(monkeypatch, *args) == 0 and run(monkeypatch, *args, "--lr=1.0") == 2
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}


def test_three_steps_of_pruning_by_hand(chain, tiny_data, tmp_path, monkeypatch):
    """The loop against three steps written out: batches by the logged weights, a gate sample a micro-batch, cross
    entropy + constraint, one clipping over everything, AdamW down for weights and gates and up for multipliers."""
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["prune"]]
    mine += [
        "--eval_interval=1",
        "--log_interval=1",
        "--save_interval=1",
        "--stop_at=3",
        "--warmup=2",
        "--grad_clip=0.5",
    ]
    assert run(monkeypatch, *mine, "--weight_decay=0.01") == 0
    data, model = TokenData(tiny_data), load_model(out["pretrain"])
    c = model.config
    target = replace(c, n_layer=2, d_model=24, n_head=2, n_kv_head=2, d_ffn=32)
    masks = PruningMasks(c, target, 20, log_alpha=3.0, phi=200.0)
    weights, gates = list(model.parameters()), [h.log_alpha for h in masks.distributions().values()]
    down = torch.optim.AdamW([{"params": weights, "weight_decay": 0.01}, {"params": gates, "weight_decay": 0.0}],
                             betas=(0.9, 0.95), eps=1e-8)  # fmt: skip
    up = torch.optim.AdamW(masks.multipliers.parameters(), betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, maximize=True)
    reader = BatchReader(data, 64, 4, seed=0)
    assert reader.go_on_after(data_position(out["pretrain"])) is None
    lines, evals = metrics(tmp_path / "x", "train"), metrics(tmp_path / "x", "eval")
    drawn = dict.fromkeys(data.domains, 0)
    for step in range(3):
        scale = (step + 1) / 2 if step < 2 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 2) / 58))
        for group, rate in zip([*down.param_groups, *up.param_groups], (3e-3, 1.0, 0.1)):
            group["lr"] = rate * scale
        assert lines[step]["lr"] == pytest.approx(3e-3 * scale)
        [(tokens, domain, _)] = reader.next_batch(step, np.array([evals[step]["weights"][d] for d in data.domains]))
        for d in domain:
            drawn[data.domains[d]] += 64
        assert evals[step + 1]["domain_tokens"] == drawn
        z = [masks.sample(0, step, i) for i in range(2)]
        logits = torch.cat([model(tokens[2 * i : 2 * i + 2, :-1], z[i]) for i in range(2)])
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:])
        assert lines[step]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        constraint = masks.lagrangian(step)[0]
        assert lines[step]["constraint"] == pytest.approx(constraint.item(), rel=1e-4, abs=1e-6)
        for optimizer in (down, up):
            optimizer.zero_grad()
        for granularity, (lam, phi) in masks.multipliers.items():  # those that made the constraint
            assert lines[step]["lambda"][granularity] == pytest.approx(lam.item(), rel=1e-4)
            assert lines[step]["phi"][granularity] == pytest.approx(phi.item(), rel=1e-6)
        (loss + constraint).backward()
        norm = torch.cat([p.grad.flatten() for p in [*weights, *masks.parameters()]]).norm()
        assert lines[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4) and norm > 0.5
        for p in [*weights, *masks.parameters()]:
            p.grad *= 0.5 / (norm + 1e-6)
        down.step(), up.step()
        for log_alpha in gates:
            log_alpha.data.clamp_(-math.log(100), math.log(100))
        with torch.no_grad():  # validation: deterministic gates, as many zeros as are expected now
            losses = domain_losses(model, data, "val", 64, 4, 2, masks.deterministic(at_target=False))
        assert evals[step + 1]["loss"] == pytest.approx(losses, rel=1e-4)
        assert evals[step + 1]["parameters"] == pytest.approx(masks.expected_params(step + 1), rel=1e-5)


def sequences_of(out, data: TokenData) -> set[tuple[str, int]]:
    """(domain, number) of the sequences that a run has read, drawn again by the weights that it logged."""
    config = json.loads((out / "config.json").read_text())
    reader, read = BatchReader(data, config["seq_len"], config["batch_size"], config["seed"]), set()
    if config["init_from"]:
        reader.go_on_after(data_position(config["init_from"]))
    evals = metrics(out, "eval")
    for step in range(config["steps"]):
        newest = [e for e in evals if e["step"] <= step][-1]
        domains, numbers = reader.draw(step, np.array([newest["weights"][d] for d in data.domains]))
        read |= {(data.domains[d], n) for d, n in zip(domains, numbers.tolist())}
    assert reader.state_dict() == data_position(out)  # what the model's directory says is what was read
    return read


def test_no_stage_reads_what_an_earlier_stage_has_read(chain, tiny_data):
    out, data = chain[0], TokenData(tiny_data)
    stages = [sequences_of(out[stage], data) for stage in ("pretrain", "prune", "continue")]
    assert [len(read) for read in stages] == [4 * 60, 4 * 60, 4 * 40]  # nothing comes twice within a stage either
    assert len(set.union(*stages)) == sum(map(len, stages))
    last = metrics(out["continue"], "eval")[-1]["epochs"]
    read = {d: sum(name == d for stage in stages for name, _ in stage) for d in data.domains}
    assert last == {d: pytest.approx(read[d] / data.sequences(d, "train", 64)) for d in data.domains}


def test_a_run_that_must_start_over_says_so(chain, tiny_data, tmp_path, monkeypatch, capsys):
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", "--steps=2"]
    assert run(monkeypatch, *args, f"--out={tmp_path / 'goes on'}", "--seed=5") == 0
    assert "from its beginning" not in capsys.readouterr().out
    assert min(metrics(tmp_path / "goes on", "eval")[0]["epochs"].values()) > 0  # the permutation of the source's seed
    assert run(monkeypatch, *args, f"--out={tmp_path / 'short'}", "--seq_len=32") == 0
    said = "it was trained on sequences of 64 tokens, not 32"
    assert said in capsys.readouterr().out
    assert set(metrics(tmp_path / "short", "eval")[0]["epochs"].values()) == {0.0}
    data = shutil.copytree(tiny_data, tmp_path / "data")
    meta = data / "meta.json"
    meta.write_text(meta.read_text().replace('"seed": 0', '"seed": 1'))
    assert run(monkeypatch, f"--data={data}", *args[1:], f"--out={tmp_path / 'other'}") == 0
    assert "from its beginning, not from where" in (text := capsys.readouterr().out) and "on other data" in text


def test_no_stage_reads_twice_also_with_some_of_the_domains_in_another_order(tiny_data):
    """The order of a domain's sequences is its own, and what a run does not use is remembered for the next one."""
    data = TokenData(tiny_data)
    first = BatchReader(data, 64, 32, seed=3)
    read = {(data.domains[d], n) for step in range(4) for d, n in zip(*first.draw(step, [0.3, 0.3, 0.4]))}
    some = TokenData(tiny_data, ["sums", "animals"])
    second = BatchReader(some, 64, 32, seed=4)
    assert second.go_on_after(json.loads(json.dumps(first.state_dict()))) is None
    read |= {(some.domains[d], n) for step in range(4) for d, n in zip(*second.draw(step, [0.5, 0.5]))}
    third = BatchReader(data, 64, 32, seed=5)
    assert third.go_on_after(json.loads(json.dumps(second.state_dict()))) is None
    read |= {(data.domains[d], n) for step in range(4) for d, n in zip(*third.draw(step, [0.3, 0.3, 0.4]))}
    assert len(read) == 3 * 4 * 32 and third.tokens_seen().sum() == 4 * 32 * 64


def test_a_domain_that_is_used_up_is_told_once_an_epoch(tiny_data, tmp_path, monkeypatch, capsys):
    data = TokenData(tiny_data)
    ratio = {"animals": 0.98, "brackets": 0.01, "sums": 0.01}
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", f"--ratio={ratio}", "--seq_len=64", "--batch_size=256"]
    steps = 2 * data.sequences("animals", "train", 64) // 256 + 4
    small = ["--n_layer=1", "--d_model=8", "--n_head=1", "--d_ffn=8", "--log_interval=1"]
    assert run(monkeypatch, *args, *small, f"--steps={steps}", f"--stop_at={steps - 2}") == 0
    text = capsys.readouterr().out
    assert run(monkeypatch, *args, *small, f"--steps={steps}") == 0
    text += capsys.readouterr().out
    for epoch in (2, 3):
        told = f"all text of domain animals has been read, and comes again: epoch {epoch} begins"
        assert text.count(told) == 1
    assert "domain sums has been read" not in text
    epochs = [line["epochs"]["animals"] for line in metrics(tmp_path / "x", "train")]
    assert epochs == sorted(epochs) and 2 < epochs[-1] < 3


def test_step_0_moves_nothing_and_is_measured_without_gates(chain):
    out = chain[0]
    first, second = metrics(out["prune"], "eval")[:2]
    assert first["loss"] == metrics(out["pretrain"], "end")[0]["loss"]  # the source as it is
    assert first["weights"] == first["ratio"] and first["gates"] is None and second["gates"]
    assert set(first["reference_is"].values()) == {"given"}
    later = [set(e["reference_is"].values()) for e in metrics(out["prune"], "eval") if any(e["prediction"].values())]
    assert later and later[-1] <= {"predicted", "seen"}


def test_sequences_that_do_not_fit_the_windows_are_told(tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *a, **k: sys.exit(0))  # it is told before the first step
    for seq_len, said in ((64, False), (128, False), (48, True), (256, True)):
        out = tmp_path / str(seq_len)
        assert run(monkeypatch, f"--data={tiny_data}", f"--out={out}", "--steps=1", f"--seq_len={seq_len}") == 0
        assert ("go across their borders" in capsys.readouterr().out) == said


def test_settings_without_effect_are_told(chain, tiny_data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *a, **k: sys.exit(0))
    source, tiny = chain[0]["pretrain"], [f"--data={tiny_data}", "--seq_len=64"]
    dynamic = ["--schedule=dro", "--dynamic_reference", f"--reference_model={source}", "--eval_interval=4"]
    for i, (args, said) in enumerate({
        (f"--init_from={source}", "--n_layer=7", "--steps=9"): f"n_layer = 7 has no effect: {source} has 3",
        (f"--init_from={source}", "--n_layer=3", "--steps=9"): None,
        ("--steps=9", "--warmup=9"): "warmup = 9 is not below steps = 9",
        ("--steps=9", "--law=paper"): "law = 'paper' has no effect",
        (*dynamic, "--steps=44"): "dynamic_reference has no effect: the scaling law is asked after more than 10",
        (*dynamic, "--steps=45"): None,
    }.items()):  # fmt: skip
        assert run(monkeypatch, *tiny, *args, f"--out={tmp_path / str(i)}") == 0
        out = capsys.readouterr().out
        assert not said or said in out
        assert said or not ("n_layer = 3 has" in out or "law is asked after more" in out)
        assert ("\nn_layer = 3\n" in out) == ("--init_from" not in args[0])


def test_the_gates_know_nothing_of_the_batch(tiny_data):
    """Neither stream of randomness may be a function of the other, at any micro-batch."""
    data = TokenData(tiny_data)
    reader, weights = BatchReader(data, 16, 8, seed=0), np.full(3, 1 / 3)
    masks = PruningMasks(LlamaConfig(257, 8, 16, 2, 2, 8, 16, 16), LlamaConfig(257, 4, 16, 2, 2, 8, 16, 16), 10, 0.0)
    domains, layers = [], []
    for step in range(400):
        domains.append(reader.draw(step, weights)[0])
        layers.append([masks.sample(0, step, i).layer.detach().numpy() for i in range(2)])
    domains, layers = np.array(domains, float), np.array(layers)  # (400, 8), (400, 2, 8)
    for i in range(2):
        correlation = np.corrcoef(domains.T, layers[:, i].T)[:8, 8:]
        assert np.abs(correlation).max() < 0.25
    assert np.abs(np.corrcoef(layers[:, 0].T, layers[:, 1].T)[:8, 8:]).max() < 0.25


@pytest.mark.parametrize("how", ["random", "magnitude"])
def test_a_choice_that_is_not_learned_trains_a_dense_model_of_the_target_shape(chain, how, tmp_path, monkeypatch):
    args = [f"--out={tmp_path / how}" if a.startswith("--out=") else a for a in chain[1]["prune"]]
    assert run(monkeypatch, *args, f"--gates={how}", "--steps=4") == 0
    assert Llama.from_pretrained(tmp_path / how / "model").config.shape == {
        "n_layer": 2, "d_model": 24, "n_head": 2, "n_kv_head": 2, "head_dim": 8, "d_ffn": 32,
    }  # fmt: skip
    choice = tmp_path / how / "model" / "pruning.json"  # which, when it is given, is made again
    kept = json.loads(choice.read_text())
    assert len(kept["hidden"]["kept"]) == 24 and [len(row) for row in kept["head"]["kept"]] == [2] * 3
    again = [f"--out={tmp_path / 'again'}" if a.startswith("--out=") else a for a in args]
    assert run(monkeypatch, *again, f"--gates={choice}", "--steps=4") == 0
    losses = [[e["loss"] for e in metrics(tmp_path / name, "eval")] for name in (how, "again")]
    assert losses[0] == losses[1] and json.loads((tmp_path / "again/model/pruning.json").read_text()) == kept


SCHEDULES = {
    "constant": "--schedule=constant",
    "sheared": "--schedule=sheared --reference_model=SOURCE",
    "fixed dro": "--schedule=dro --reference_losses={'animals':2,'brackets':1.0,'sums':1.5}",
    "dynamic reference": "--schedule=dro --dynamic_reference=True",
    "dynamic ratio": "--schedule=dro --dynamic_ratio=True --reference_model=SOURCE",
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_schedule_runs_alone(chain, name, tiny_data, tmp_path, monkeypatch):
    options = SCHEDULES[name].replace("SOURCE", str(chain[0]["pretrain"])).split()
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", f"--init_from={chain[0]['prune']}", "--steps=13"]
    assert run(monkeypatch, *args, "--eval_interval=1", "--eval_sequences=1", *options) == 0
    evals = metrics(tmp_path / "x", "eval")
    moved = any(e["weights"] != evals[0]["ratio"] for e in evals)
    assert moved == (name != "constant")


def test_bfloat16_runs(chain, tiny_data, tmp_path, monkeypatch):
    args = [a for a in chain[1]["prune"] if not a.startswith("--out=")] + [f"--out={tmp_path / 'bf16'}"]
    assert run(monkeypatch, *args, "--dtype=bfloat16", "--steps=6", "--sparsity_warmup=4") == 0
    half, full = (metrics(o, "eval")[1]["loss"]["sums"] for o in (tmp_path / "bf16", chain[0]["prune"]))
    assert half == pytest.approx(full, rel=0.05) and half != full


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=20", "--save_interval=2"]
    assert run(monkeypatch, *args, "--stop_at=4") == 0
    whole = train.Llama.forward

    def poisoned(self, tokens, z=None, targets=None, cache=None):
        loss = whole(self, tokens, z, targets, cache)
        return loss * math.nan if torch.is_grad_enabled() else loss

    monkeypatch.setattr(train.Llama, "forward", poisoned)
    message = run(monkeypatch, *args)
    assert "step 4" in message and "not finite" in message and re.search("animals|brackets|sums", message)
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir()) == ["step_000002", "step_000004"]


def test_a_model_whose_losses_are_not_finite_is_refused(tiny_data, tmp_path, monkeypatch, capsys):
    """Its weights are finite. Both before the first step and by eval.py."""
    llama = Llama(LlamaConfig(257, 1, 16, 2, 2, 8, 16, 64)).init_weights(0)
    with torch.no_grad():
        llama.lm_head.weight.fill_(3e38)
    llama.save_pretrained(tmp_path / "big")
    args = [f"--data={tiny_data}", f"--init_from={tmp_path / 'big'}", f"--out={tmp_path / 'x'}", "--steps=2"]
    assert "step 0: validation loss of domain 'animals' is" in run(monkeypatch, *args)
    assert "nan" not in (tmp_path / "x/metrics.jsonl").read_text().lower()
    monkeypatch.setattr(sys, "argv", ["eval.py", str(tmp_path / "big"), "--data", str(tiny_data), "--sequences=2"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        eval.main()
    assert end.value.code == 2 and "big: the loss of domain 'animals' is" in capsys.readouterr().err


def test_a_model_that_its_dtype_cannot_hold_is_one_line(tiny_data, tmp_path, monkeypatch, capsys):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=1", "--lr=1e6", "--export_dtype=float16"]
    assert run(monkeypatch, *args) == 2
    assert "has values that are too large for float16" in (err := capsys.readouterr().err) and err.count("\n") == 1


def test_a_clock_that_is_set_back_takes_no_seconds(monkeypatch):
    """The seconds of a checkpoint are never below 0, or it could not be read again."""
    clock = Clock(step=3, seconds=5.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    with clock.paused():
        pass
    steps, seconds, left = clock.lap(4, steps=10)
    assert clock.total() >= 5 and steps == 1 and seconds >= 0 and left >= 0


def test_sigterm_saves_and_says_how_to_go_on(tiny_data, tmp_path):
    args = [*SHAPE, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=100000"]
    training = Fresh(script, "train.py", *args)
    deadline = time.time() + 60
    while not (tmp_path / "x" / "checkpoints" / "step_000010").exists() and time.time() < deadline:
        time.sleep(0.05)
    training.processes[0].terminate()
    done = training.wait()
    assert done.returncode == 0 and "the same command goes on" in done.stdout and not done.stderr.strip()
    step = int(re.search(r"stopped after step (\d+)", done.stdout)[1])
    assert (tmp_path / "x" / "checkpoints" / f"step_{step:06d}" / "state.json").exists()
    assert len(list((tmp_path / "x" / "checkpoints").iterdir())) <= 2


MISTAKES = {
    "no switch": (["--lr", "--compile"], "argument --lr: expected one argument"),
    "beta": (["--beta1=1.0"], "beta1 = 1.0 must be 0 to 0.999"),
    "ratio of text": (["--ratio={'animals': 'x', 'brackets': 1, 'sums': 1}"], "must have a number above 0, from"),
    "sequences longer than the text": (["--seq_len=100000"], "of 100000"),
    "sequences longer than val": (["--seq_len=20000"], "val of domain"),
    "no heads": (["--n_head=0"], "n_head = 0 must be 1 to"),
    "domains of numbers": (["--domains=[1]"], "no domain 1"),
    "gates of a dense run": (["--gates=magnitude"], "gates = 'magnitude' needs a target shape"),
    "no such config": (["config/toy_prun.py"], "config/toy_prun.py: no such config file; there are config/"),
    "no data": (["--data=data/nothing"], "data/nothing: no data set there"),
    "ratio": (["--ratio={'animals': 1.0}"], "ratio must name the domains animals, brackets, sums"),
    "no such model": (["--init_from=out/nothing"], "out/nothing: no such model or run"),
    "dro without references": (["--schedule=dro"], "needs references"),
    "two kinds of references": (
        ["--reference_model=out/x", "--reference_losses={'animals': 1, 'brackets': 1, 'sums': 1}"],
        "reference_losses and reference_model are both set",
    ),
    "too few evaluations": (
        ["--schedule=dro", "--dynamic_reference=True", "--steps=110"],
        "eval_interval = 10 must be below steps / 11",
    ),
    "too long a ramp": (
        ["--init_from=out/x", "--target_n_layer=1", "--sparsity_warmup=60", "--steps=60"],
        "sparsity_warmup = 60 must be below steps = 60",
    ),
    "device": (["--device=foo"], "device = 'foo'"),
    "width": (["--d_model=33"], "d_model = 33 must be a multiple of n_head = 4"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(name, tiny_data, tmp_path, monkeypatch, capsys):
    args, words = MISTAKES[name]
    monkeypatch.chdir(ROOT)
    assert run(monkeypatch, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", *args) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_mistakes_about_models_and_runs(chain, tiny_data, tmp_path, monkeypatch, capsys):
    out, args = chain
    cases = [
        (
            [*args["prune"], f"--out={tmp_path / 'x'}", "--target_n_layer=9"],
            "n_layer = 9 is larger than the source's 3",
        ),
        ([*args["prune"], f"--out={tmp_path / 'x'}", "--target_d_model=25"], "must be a multiple of the 2 heads kept"),
        (
            [f"--data={tiny_data}", f"--init_from={out['pretrain']}", f"--out={tmp_path / 'x'}", "--target_n_layer=3"],
            "there is nothing to prune",
        ),
        ([*args["prune"], f"--out={tmp_path / 'x'}", "--seq_len=128"], "was made for 64 tokens at most"),
        ([*args["prune"], "--lr=1.0"], f"--resume {out['prune']} to go on from here: lr was 0.003, now 1.0"),
        ([*args["prune"], "--resume=never"], "holds a run already"),
    ]
    for wrong, words in cases:
        before = {p: p.stat().st_mtime_ns for p in out["prune"].rglob("*")}
        assert run(monkeypatch, *wrong) == 2
        assert words in capsys.readouterr().err
        assert not (tmp_path / "x").exists() and before == {p: p.stat().st_mtime_ns for p in out["prune"].rglob("*")}


def test_mistakes_about_reference_models_and_choices(chain, tiny_data, tmp_path, monkeypatch, capsys):
    """Whatever a run reads is looked at before anything is written."""
    small, short = LlamaConfig(100, 1, 8, 1, 1, 8, 8, 64), LlamaConfig(257, 1, 8, 1, 1, 8, 8, 16)
    for name, config in (("small", small), ("short", short)):
        Llama(config).init_weights(0).save_pretrained(tmp_path / name)
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "torn.json").write_text("{")
    args = [a for a in chain[1]["prune"] if not a.startswith("--out=")] + [f"--out={tmp_path / 'x'}"]
    for wrong, words in (
        ([f"--reference_model={tmp_path / 'small'}", "--gates=magnitude"], "its vocabulary has 100 tokens"),
        ([f"--reference_model={tmp_path / 'short'}"], "was made for 16 tokens at most"),
        ([f"--gates={tmp_path / 'list.json'}"], "list.json': not a pruning.json for this source and target"),
        ([f"--gates={tmp_path / 'torn.json'}"], "torn.json': not a pruning.json"),
    ):
        assert run(monkeypatch, *args, *wrong) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1 and not (tmp_path / "x").exists()


def test_config_files_are_read_and_never_executed(tmp_path):
    (tmp_path / "good.py").write_text(
        '"""Doc."""\nsteps = 2 * 10 + 3 ** 2  # comment\nlr = 1\nratio = {"a": 1 / 4, "b": -3 + 4}\n'
    )
    s = load(Settings, [str(tmp_path / "good.py"), "--steps=7", "--out=some dir/x"])
    assert (s.steps, s.lr, s.ratio, s.out) == (7, 1.0, {"a": 0.25, "b": 1}, "some dir/x")
    (tmp_path / "bad.py").write_text(
        "import os\nsteps = os.getpid()\nlearning_rate = 3\nfor i in []: pass\nbacth_size = 99\n"
    )
    with pytest.raises(ValueError) as error:
        load(Settings, [str(tmp_path / "bad.py")])
    for words in ("bad.py:1: only `name = value`", "bad.py:2: steps: only literals", "bad.py:3: unknown setting",
                  "bad.py:4: only", "did you mean 'batch_size'?"):  # fmt: skip
        assert words in str(error.value)


def test_a_config_may_start_from_another(tmp_path):
    (tmp_path / "first.py").write_text("steps = 20\nlr = 1\n")
    (tmp_path / "second.py").write_text('base = "first.py"\nlr = 2\n')
    s = load(Settings, ["--seed", "3", str(tmp_path / "second.py"), "--compile", "--batch-size", "4"])
    assert (s.steps, s.lr, s.seed, s.compile, s.batch_size) == (20, 2.0, 3, True, 4)
    (tmp_path / "first.py").write_text('base = "second.py"\n')
    (tmp_path / "third.py").write_text('base = "fourth.py"\n')
    for name, words in (("second.py", "leads back to this file"), ("third.py", "fourth.py: no such config file")):
        with pytest.raises(ValueError, match=words):
            load(Settings, [str(tmp_path / name)])


def test_values_that_look_like_options(tmp_path):
    """Numbers below 0 in any notation, switches before a file, and a file that names its base last."""
    (tmp_path / "first.py").write_text("steps = 20\nlr = 1\n")
    (tmp_path / "second.py").write_text('lr = 2\nbase = "first.py"\n')
    s = load(Settings, ["--compile", str(tmp_path / "second.py"), "--log_alpha", "-1e-3", "--dynamic_ratio", "False"])
    assert (s.steps, s.lr, s.compile, s.log_alpha, s.dynamic_ratio) == (20, 2.0, True, -1e-3, False)
    assert load(Settings, ["--reference_model", "x", "--reference_model", ""]).reference_model == ""


def test_help_names_every_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit):
        load(Settings, ["--help"])
    text = capsys.readouterr().out
    text = " ".join(text.split())
    for name, setting in fields(Settings).items():
        assert re.search(
            rf"--{name} \S+ {re.escape(setting.doc)} \(default: {re.escape(repr(setting.default))}\)", text
        )
    for group in {setting.group for setting in fields(Settings).values()} - {None}:
        assert f" {group}: --" in text


@pytest.mark.parametrize("config", sorted(p.name for p in (ROOT / "config").glob("*.py")))
def test_every_shipped_config_loads(config):
    s = load(Settings, [str(ROOT / "config" / config)])
    if config in ("paper.py", "slimpajama.py"):  # what others start from
        return
    assert s.out == f"out/{config.removesuffix('.py')}"
    if s.stage != "pretrain":
        papers = config in {"toy_prune.py", "toy_gates.py"} or s.law == "paper"
        mixture = ("dro", True, True, 0.1, 0, 0.1, 2) if papers else ("dro", False, True, 1, 0.2, 0.5, 16)
        assert mixture == (s.schedule, s.dynamic_reference, s.dynamic_ratio, s.rho, s.temperature, s.delta, s.bound)
        assert s.steps // s.eval_interval >= 24 and s.floor == 0.2


def test_seven_b_configs_prune_llama_2_to_the_papers_shape():
    s = load(Settings, [str(ROOT / "config" / "prune_7b.py")])
    seven = LlamaConfig(32000, 32, 4096, 32, 32, 128, 11008, 4096)
    assert seven.n_params() == 6_738_415_616
    shape = LlamaConfig(
        32000, s.target_n_layer, s.target_d_model, s.target_n_head, s.target_n_head, 128, s.target_d_ffn, 4096
    )
    assert shape.n_params() == pytest.approx(1.345e9, rel=0.01)
    with torch.device("meta"):
        assert PruningMasks(seven, shape, s.sparsity_warmup).head.log_alpha.shape == (32, 32)
    assert s.batch_size * s.seq_len == 32 * 4096 and s.steps == 3200
    assert (Settings().gate_lr, Settings().multiplier_lr) == (s.gate_lr, s.multiplier_lr) == (1.0, 1.0)
    # as published with Sheared LLaMA's 1.3B model
    names = ["CommonCrawl", "Github", "Book", "StackExchange", "Wikipedia", "ArXiv", "C4"]
    ratio, losses = [0.67, 0.045, 0.045, 0.02, 0.045, 0.025, 0.15], [1.9643, 0.7459, 2.1393, 1.6117, 1.7590, 1.4449]
    assert s.ratio == {f"RedPajama{name}": share for name, share in zip(names, ratio)}
    assert s.reference_losses == {f"RedPajama{name}": loss for name, loss in zip(names, [*losses, 2.1251])}


def test_evaluation_is_over_all_sequences_whatever_the_batch_size(chain, tiny_data):
    data, model = TokenData(tiny_data), load_model(chain[0]["continue"])
    one, many = (domain_losses(model, data, "test", 64, 0, size) for size in (3, 1000))
    assert one == pytest.approx(many, rel=1e-6)
    tokens, labels = with_labels(data, "sums", "test", 64)
    with torch.no_grad():
        logits = model(tokens[:, :-1]).transpose(1, 2)
    assert one["sums"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels[:, 1:]).item(), rel=1e-6)


def test_what_the_scaling_law_is_asked_for():
    """The end of the run: the tokens if each domain goes on as so far, the target's parameters, the last step's rate.
    Also where a run goes on with larger batches than those that it had."""
    s = Settings(steps=200, batch_size=8, seq_len=100, warmup=20, sparsity_warmup=80, init_from="x", target_n_layer=1)
    trainer = object.__new__(train.Trainer)
    trainer.s, trainer.reader = s, SimpleNamespace(tokens_seen=lambda: np.array([20_000, 60_000]))
    trainer.masks = SimpleNamespace(expected_params=lambda step: 900.0, target=SimpleNamespace(n_params=lambda: 500))
    trainer.model = SimpleNamespace(config=SimpleNamespace(n_params=lambda: 1000))
    cosine = lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * (step - 20) / 180))  # noqa: E731
    now, *_, end = trainer.course(100)  # 800 tokens a step
    assert now.tokens.tolist() == [20_000, 60_000] and (now.params, now.rate) == (900, pytest.approx(cosine(99)))
    assert end.tokens.tolist() == [40_000, 120_000] and (end.params, end.rate) == (500, pytest.approx(cosine(199)))
    trainer.reader.tokens_seen = lambda: np.array([4_000, 28_000])
    points = trainer.course(40)
    assert [point.params for point in points] == [900, 700, *[500] * 7]  # half of the ramp is left: two of 8 parts
    assert points[4].tokens.tolist() == [12_000, 84_000] and points[-1].tokens.tolist() == [20_000, 140_000]
    trainer.masks, trainer.s = None, replace(s, batch_size=32)
    now, *_, end = trainer.course(40)
    assert (now.params, end.params) == (1000, 1000) and end.tokens.sum() == 32_000 + 160 * 3_200


def test_the_mixture_hears_where_the_run_is_and_where_it_ends(tiny_data, tmp_path, monkeypatch):
    asked, update = [], train.Mixture.update
    monkeypatch.setattr(train.Mixture, "update", lambda self, *a: (asked.append(a), update(self, *a))[1])
    assert run(monkeypatch, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=20", "--eval_interval=5") == 0
    rate = lambda step: 0.1 + 0.45 * (1 + math.cos(math.pi * step / 20))  # noqa: E731
    for step, (progress, _, now, end) in zip((0, 5, 10, 15, 20), asked, strict=True):
        assert (progress, now.tokens.sum(), end.rate) == (step / 20, step * 4 * 64, pytest.approx(rate(19)))
        assert now.rate == pytest.approx(rate(max(0, step - 1)))
        assert step == 0 or end.tokens.sum() == pytest.approx(20 * 4 * 64)


def test_a_choice_looks_at_the_batches_of_the_first_four_steps(chain, tiny_data, tmp_path, monkeypatch):
    asked, scores = [], train.choices.scores
    monkeypatch.setattr(train.choices, "scores", lambda *how: (asked.extend(how[3]), scores(*how))[1])
    args = [f"--data={tiny_data}", f"--init_from={chain[0]['pretrain']}", "--target_n_layer=2", "--steps=1"]
    args += ["--gates=taylor", "--ratio={'animals': 8, 'brackets': 1, 'sums': 1}", f"--out={tmp_path / 'x'}"]
    assert run(monkeypatch, *args) == 0
    reader = BatchReader(TokenData(tiny_data), 64, 4, seed=0)
    reader.go_on_after(data_position(chain[0]["pretrain"]))
    batches = [reader.next_batch(step, np.array([0.8, 0.1, 0.1]))[0].tokens for step in range(4)]
    assert torch.equal(torch.cat(asked), torch.cat(batches))


def test_the_first_mixture_is_that_of_the_text_or_of_the_ratio(tiny_data):
    """Domains go by their names, in whatever order a user gives them."""
    data = TokenData(tiny_data)
    sizes = np.array([(tiny_data / domain / "train.bin").stat().st_size for domain in data.domains])
    assert train.make_mixture(Settings(), data, None).initial == pytest.approx(sizes / sizes.sum())
    s = Settings(ratio={"sums": 5, "animals": 3, "brackets": 2})
    mixture = train.make_mixture(s, data, {"sums": 1.5, "brackets": 1.1, "animals": 2.0})
    assert mixture.initial == pytest.approx([0.3, 0.2, 0.5]) and mixture.state["reference"] == [2.0, 1.1, 1.5]


def test_the_optimizer_is_the_one_of_the_settings(tiny_data, tmp_path, monkeypatch):
    """Five steps are those of torch's AdamW; grad_clip 0 is no limit, like one that is never reached."""
    args = [f"--data={tiny_data}", "--steps=5", "--beta1=0.5", "--beta2=0.6", "--eps=1e-2", "--min_lr=0.7"]
    found = []
    for clip in ("0", "1e9"):
        assert run(monkeypatch, *args, f"--grad_clip={clip}", f"--out={tmp_path / clip / 'x'}") == 0
        found.append(load_model(tmp_path / clip / "x").lm_head.weight)
    assert torch.equal(*found)
    rates = [3e-3 * (0.7 + 0.15 * (1 + math.cos(math.pi * step / 5))) for step in range(5)]
    assert metrics(tmp_path / "0" / "x", "train")[-1]["lr"] == pytest.approx(rates[-1])
    model = Llama(LlamaConfig(257, 3, 32, 4, 4, 8, 48, 64)).init_weights(0)
    reader, weights = (
        BatchReader(TokenData(tiny_data), 64, 4, seed=0),
        metrics(tmp_path / "0" / "x", "eval")[0]["weights"],
    )
    adam = torch.optim.AdamW(model.parameters(), betas=(0.5, 0.6), eps=1e-2, weight_decay=0.0)
    for step, rate in enumerate(rates):
        [(tokens, _, _)] = reader.next_batch(step, np.array(list(weights.values())))
        adam.param_groups[0]["lr"] = rate
        adam.zero_grad()
        model(tokens[:, :-1], targets=tokens[:, 1:]).mean().backward()
        adam.step()
    torch.testing.assert_close(found[0], model.lm_head.weight, rtol=1e-4, atol=1e-6)


def test_learning_rate_is_never_above_its_peak():
    """Also between two steps, where the scaling law's curve asks for it."""
    s = Settings(steps=100, warmup=19, min_lr=0.1)
    rates = [train.lr_scale(step, s) for step in np.linspace(0, 100, 1001)]
    assert max(rates) == 1 and rates[0] == 1 / 19 and rates[-1] == pytest.approx(0.1)
