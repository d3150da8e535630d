"""What survives: full disks, saves in the background, a start from somebody else's checkpoint."""

import ast
import errno
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SHAPE, TARGET, metrics, run
from processes import fresh, script
from safetensors import safe_open
from safetensors.torch import save, save_file

import eval as eval_module
import train
from model import Llama, LlamaConfig
from plumbing import checkpoint, data
from plumbing.models import digest, directory_of, load_model
from plumbing.run import Run, checkpoints, newest_checkpoint
from plumbing.settings import FREE


def with_small_files(limit, *args):
    """train.py, where no file may grow beyond `limit` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script("train.py", *args)


def test_a_full_disk_loses_nothing_older(chain, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk: the save of step 40 fails, and the run ends as ever."""
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["prune"]]
    assert run(monkeypatch, *mine, "--stop_at=30") == 0
    (weights,) = (tmp_path / "x" / "checkpoints" / "step_000030").glob("optimizer-*.safetensors")
    limit = weights.stat().st_size // 2
    done = fresh(with_small_files, limit, *SHAPE, *mine)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr  # fmt: skip
    assert "File too large" in done.stderr and "the same command goes on from" in done.stderr
    assert newest_checkpoint(tmp_path / "x").name == "step_000030"
    done = fresh(with_small_files, 1000, *SHAPE, *mine)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr  # not even the settings can be written
    assert run(monkeypatch, *mine) == 0
    for name in ("model/model.safetensors", "model/pruning.json"):
        assert (tmp_path / "x" / name).read_bytes() == (out["prune"] / name).read_bytes()
    assert metrics(tmp_path / "x")[1:] == metrics(out["prune"])[1:]


def test_a_run_goes_on_from_another_runs_checkpoint(chain, tmp_path, monkeypatch, capsys):
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["prune"]]
    before = {p: p.read_bytes() for p in out["prune"].rglob("*") if p.is_file()}
    origin = out["prune"] / "checkpoints" / "step_000050"
    assert run(monkeypatch, *mine, f"--resume={origin}", "--stop_at=57") == 0
    assert f"going on from {origin}" in capsys.readouterr().out
    assert run(monkeypatch, *mine, f"--resume={origin}") == 0  # the same command goes on from its own checkpoint
    assert "going on from " + str(tmp_path / "x" / "checkpoints" / "step_000057") in capsys.readouterr().out
    for name in ("metrics.jsonl", "model/model.safetensors", "model/pruning.json"):
        assert (tmp_path / "x" / name).read_bytes() == (out["prune"] / name).read_bytes()
    assert before == {p: p.read_bytes() for p in out["prune"].rglob("*") if p.is_file()}


def test_a_run_goes_on_with_other_settings_elsewhere(chain, tmp_path, monkeypatch, capsys):
    """As after a gradient that was not finite: from the last good checkpoint, at a lower rate. What changed is logged,
    also where the new run is stopped before its own first checkpoint."""
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["prune"]]
    origin = out["prune"] / "checkpoints" / "step_000050"
    other = [f"--resume={origin}", "--lr=1e-3", "--grad_clip=0.5", "--schedule=constant"]
    assert run(monkeypatch, *mine, *other, "--stop_at=51") == 0
    before, after = (
        json.loads((at / "state.json").read_text()) for at in (origin, tmp_path / "x/checkpoints/step_000051")
    )
    rates, rates_now = (state["mixture"]["history"]["rates"] for state in (before, after))
    assert rates_now == pytest.approx([3 * rate for rate in rates]) and len(rates) > 10  # shares of the new peak
    assert run(monkeypatch, *mine, *other) == 0
    assert "changed: lr was 0.003, now 0.001; grad_clip was 1.0, now 0.5; sche" in capsys.readouterr().out
    at_end = json.loads((tmp_path / "x/checkpoints/step_000060/state.json").read_text())["mixture"]["history"]["rates"]
    assert at_end[: len(rates)] == rates_now  # a second start with the same setting changes nothing
    first, second = metrics(tmp_path / "x", "run")
    assert "changed" not in first and second["changed"]["lr"] == {"was": 3e-3, "now": 1e-3}
    assert metrics(tmp_path / "x", "train")[-1]["lr"] == pytest.approx(1e-4, rel=0.1)
    assert run(monkeypatch, *mine, *other, "--lr=1e-4") == 2  # where it has a run of its own, all stays
    assert f"started with other settings, choose another --out, with --resume {tmp_path}" in capsys.readouterr().err
    shutil.copytree(tmp_path / "x", tmp_path / "begun", ignore=shutil.ignore_patterns("checkpoints", "model"))
    begun = [f"--out={tmp_path / 'begun'}" if a.startswith("--out=") else a for a in mine]
    config = tmp_path / "begun/config.json"
    config.write_text(config.read_text().replace(str(tmp_path / "x"), str(tmp_path / "begun")))
    assert run(monkeypatch, *begun, *other, "--lr=1e-4") == 2  # and where it has no checkpoint, none is named
    assert "started with other settings, choose another --out: lr was" in capsys.readouterr().err
    shape = [a for a in mine if not a.startswith("--out=")] + [f"--out={tmp_path / 'y'}", f"--resume={origin}"]
    assert run(monkeypatch, *shape, f"--init_from={out['prune']}", "--target_n_layer=1", "--target_d_ffn=16") == 2
    assert "is not what" in capsys.readouterr().err and not (tmp_path / "y").exists()


def test_what_changes_elsewhere_is_what_counts_there(chain, tmp_path, monkeypatch, capsys):
    """Another ratio and other references take effect; what cannot is refused before anything is written."""
    out, args = chain
    mine = [a for a in args["prune"] if not a.startswith(("--out=", "--reference_model="))]
    resume = f"--resume={out['prune'] / 'checkpoints' / 'step_000050'}"
    losses = {"animals": 0.5, "brackets": 0.6, "sums": 0.7}
    other = [
        "--ratio={'animals': 8, 'brackets': 1, 'sums': 1}",
        f"--reference_losses={losses}",
        "--dynamic_reference=False",
    ]
    assert run(monkeypatch, *mine, f"--out={tmp_path / 'x'}", resume, *other) == 0
    _, again = metrics(tmp_path / "x", "run")
    assert again["step"] == 50 and again["weights"] == again["ratio"] == {"animals": 0.8, "brackets": 0.1, "sums": 0.1}
    first = metrics(tmp_path / "x", "eval")[-5]
    assert first["step"] == 52 and first["reference"] == losses and first["ratio"]["animals"] > 0.7
    keep = f"--reference_model={out['pretrain']}"
    assert run(monkeypatch, *mine, keep, f"--out={tmp_path / 'w'}", resume, "--dynamic_reference=False") == 0
    given = metrics(out["prune"], "eval")[0]["reference"]  # not the predictions of the run before
    assert metrics(tmp_path / "w", "eval")[-5]["reference"] == pytest.approx(given)
    for wrong, words in (
        (["--domains=['sums', 'brackets', 'animals']"], "in this order"),
        (["--steps=49", "--sparsity_warmup=20"], "has 50 already"),
        (["--seq_len=32"], "the checkpoint was made with 64"),
    ):
        assert run(monkeypatch, *mine, keep, f"--out={tmp_path / 'y'}", resume, *wrong) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1
    # no step is left, only the model is to be written: where it did not fit into another dtype
    ended = ["--steps=50", "--sparsity_warmup=20", "--export_dtype=bfloat16"]
    assert run(monkeypatch, *mine, keep, f"--out={tmp_path / 'z'}", resume, *ended) == 0
    assert (tmp_path / "z" / "model").is_dir() and metrics(tmp_path / "z")[-1]["type"] == "end"


def everything(folder):
    """path -> content of each file, None for a directory: what a refused command must leave as it is."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that asserts that train.py refuses its arguments: status 2, one line with some words, and nothing is
    changed in a folder."""

    def check(folder, words, *args):
        before = everything(folder)
        capsys.readouterr()
        assert run(monkeypatch, *args) == 2, args
        err = capsys.readouterr().err
        assert words in err and err.startswith("train.py: ") and err.count("\n") == 1, err
        assert everything(folder) == before

    return check


@pytest.fixture
def stopped(chain, tmp_path):
    """A pruning run without its model, as if it had been stopped after its last checkpoint, and the command for it."""
    out, args = chain
    x = shutil.copytree(out["prune"], tmp_path / "x")
    shutil.rmtree(x / "model")
    return x, [f"--out={x}" if a.startswith("--out=") else a for a in args["prune"]]


def without_checksums(folder):
    """As if the damage had been done before the checksums were."""
    (folder / "checksums.json").unlink(missing_ok=True)
    return folder


STATES = {  # what is wrong: how it is made, what the line must say
    "no JSON": (lambda s: "{", "state.json: not the state of a run"),
    "a list": (lambda s: [], "Expected `object`, got `array`"),
    "empty": (lambda s: {}, "Object missing required field `step`"),
    "more steps than it was to have": (lambda s: s | {"step": 99}, "step 99 of 60"),
    "steps that are text": (lambda s: s | {"settings": s["settings"] | {"steps": "60"}}, "Expected `int`, got `str`"),
    "an unknown setting": (lambda s: s | {"settings": s["settings"] | {"lrr": 1}}, "no setting lrr"),
    "no shape": (lambda s: s | {"source": s["source"] | {"n_head": 0}}, "n_head = 0 must be"),
    "a key that no shape has": (lambda s: s | {"source": s["source"] | {"depth": 3}}, "'depth'"),
    "another shape": (lambda s: s | {"source": s["source"] | {"d_ffn": 64}}, "d_ffn was 64, now 48"),
    "a target beyond the source": (lambda s: s | {"target": s["target"] | {"d_ffn": 64}}, "64"),
    "other gates": (lambda s: s | {"target": s["target"] | {"d_ffn": 48}}, "gates for layer, hidden, head, and these"),
    "a domain too few": (lambda s: s | {"mixture": s["mixture"] | {"ratio": [0.5, 0.5]}}, "each of 3 domains"),
    "weights that are no shares": (lambda s: s | {"mixture": s["mixture"] | {"weights": [1, 1, 1]}}, "no shares"),
    "sums of one kind": (lambda s: s | {"unlogged": s["unlogged"][:1]}, "unlogged"),
    "more read before than now": (
        lambda s: s | {"reader": s["reader"] | {"first": dict.fromkeys(s["reader"]["first"], 10**9)}},
        "does not precede",
    ),
    "a huge number": (lambda s: json.dumps(s).replace('"step": 60', '"step": 1' + "0" * 400), "state.json"),
    "nested too deep": (lambda s: '{"settings": {"a": ' + "[" * 100_000, "nested too deep"),
}


def test_a_state_that_is_not_ours_is_one_line(stopped, refused):
    x, args = stopped
    folder = without_checksums(newest_checkpoint(x))
    state = json.loads((folder / "state.json").read_text())
    for make, words in STATES.values():
        content = make(state)
        (folder / "state.json").write_text(content if isinstance(content, str) else json.dumps(content))
        refused(x, words, *args)


def test_what_stands_beside_a_model_is_checked(chain, tmp_path, refused):
    out, args = chain
    source = shutil.copytree(out["prune"], tmp_path / "source")
    mine = [f"--init_from={source}" if a.startswith("--init_from=") else a for a in args["continue"]]
    file = without_checksums(source / "model") / "trained_with.json"
    for text in ("{", "[]", "{}", '{"tokenizer": "byte", "fingerprint": "x", "reader": {"data": 1}}'):
        file.write_text(text)
        refused(tmp_path, "trained_with.json: not what train.py writes", *mine, f"--out={tmp_path / 'y'}")


def flipped(file, at=None):
    """Damage a byte of a file, in the middle or somewhere else; returns what it was."""
    whole = file.read_bytes()
    at = len(whole) // 2 if at is None else at
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
    return whole


def test_damage_is_seen_in_each_file(chain, stopped, tmp_path, refused):
    out, args = chain
    x, mine = stopped
    checkpoint = newest_checkpoint(x)
    names = {file.name for file in checkpoint.iterdir()}
    parts = {"weights-1-of-1.safetensors", "optimizer-1-of-1.safetensors"}
    assert names == {"state.json", "checksums.json"} | parts
    for name in names:
        whole = flipped(checkpoint / name, at=len((checkpoint / name).read_bytes()) - 9)
        refused(x, "checksum", *mine)
        if not name.startswith("optimizer"):
            with pytest.raises(ValueError, match=re.escape(str(checkpoint))):
                load_model(x)
        (checkpoint / name).write_bytes(whole[: len(whole) // 2])
        refused(x, str(checkpoint / name), *mine)
        (checkpoint / name).unlink()
        if name != "checksums.json":  # a directory without it is read as it is
            refused(x, name, *mine)
        (checkpoint / name).write_bytes(whole)
    model = shutil.copytree(out["prune"] / "model", tmp_path / "model")
    start = [f"--init_from={model}" if a.startswith("--init_from=") else a for a in args["continue"]]
    for file in sorted(model.iterdir()):
        whole = flipped(file)
        refused(tmp_path, str(model), *start, f"--out={tmp_path / 'y'}")
        with pytest.raises(ValueError, match=re.escape(str(model))):
            load_model(model)
        file.write_bytes(whole)
    load_model(model)
    reference = shutil.copytree(out["pretrain"] / "model", tmp_path / "reference")
    flipped(reference / "model.safetensors")
    mine = [f"--reference_model={reference}" if a.startswith("--reference") else a for a in args["prune"]]
    refused(tmp_path, "checksum", *mine, f"--out={tmp_path / 'y'}")


def test_a_weight_that_is_not_finite_is_named(chain, stopped, tmp_path, refused):
    out, args = chain
    x, mine = stopped
    for folder, file, name, command in (
        (newest_checkpoint(x), "weights-1-of-1.safetensors", "model.norm.weight", mine),
        (newest_checkpoint(x), "optimizer-1-of-1.safetensors", "masks.ffn.log_alpha.exp_avg", mine),
        (shutil.copytree(out["prune"] / "model", tmp_path / "model"), "model.safetensors", "norm.weight",
         [*args["continue"], f"--init_from={tmp_path / 'model'}", f"--out={tmp_path / 'y'}"]),
        (shutil.copytree(out["pretrain"] / "model", tmp_path / "source"), "model.safetensors", "norm.weight",
         [*args["pretrain"], f"--init_from={tmp_path / 'source'}", f"--out={tmp_path / 'y'}", "--gates=random",
          *TARGET]),
    ):  # fmt: skip
        without_checksums(folder)
        whole = (folder / file).read_bytes()
        with safe_open(folder / file, "pt") as opened:
            tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
        next(v for k, v in tensors.items() if k.endswith(name)).view(-1)[-1] = torch.inf
        save_file(tensors, folder / file, metadata)
        refused(tmp_path, f"{name} has values that are not finite", *command)
        (folder / file).write_bytes(whole)


def test_nothing_that_is_read_can_run(stopped, tmp_path, refused):
    """Pickles that would make a file: an older checkpoint, the files of one, a weight. And rows that are missing."""
    x, args = stopped
    checkpoint, made = without_checksums(newest_checkpoint(x)), tmp_path / "made"
    pickled = f"cbuiltins\nopen\n(V{made}\nVw\ntR.".encode()  # open(made, "w"), as pickle would do it
    weights, optimizer = (checkpoint / f"{kind}-1-of-1.safetensors" for kind in ("weights", "optimizer"))
    with safe_open(weights, "pt") as opened:
        tensors, metadata = {key: opened.get_tensor(key) for key in opened.keys()}, opened.metadata()
    late = {"first_rows": json.dumps(json.loads(metadata["first_rows"]) | {"model.norm.weight": 1})}
    as_weight = tensors | {"model.norm.weight": torch.frombuffer(bytearray(pickled), dtype=torch.uint8)}
    whole = weights.read_bytes()
    for file, content, words in (
        (checkpoint / ".metadata", pickled, "an older version of train.py wrote this with pickle"),
        (checkpoint / "state.json", pickled, "state.json: not the state of a run"),
        (optimizer, pickled, "optimizer-1-of-1.safetensors: damaged"),
        (weights, pickled, "weights-1-of-1.safetensors: damaged"),
        (weights, save(as_weight, metadata), f"model.norm.weight, U8 ({len(pickled)},), does not belong"),
        (weights, save(tensors), "first_rows in its header"),
        (weights, save(tensors, {"first_rows": "{}"}), "does not belong to this run"),
        (weights, save(tensors, late), "have not all 32 rows of model.norm.weight"),
        (weights, save({name: x[:1] for name, x in tensors.items()}, metadata), "have not all"),
    ):
        before = file.read_bytes() if file.exists() else None
        file.write_bytes(content)
        refused(x, words, *args)
        if file != optimizer:  # which is not read for a model alone
            with pytest.raises(ValueError):
                load_model(x)
        file.unlink() if before is None else file.write_bytes(before)
    assert not made.exists() and weights.read_bytes() == whole


def test_no_file_of_ours_runs_what_it_reads():
    """No pickle, no code from data: neither by name nor by option."""
    modules = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "dcp.load", "dcp.save"}
    options = {"weights_only", "allow_pickle", "trust_remote_code"}
    folders = [f for f in ROOT.iterdir() if f.is_dir() and f.name[0] != "." and f.name not in ("out", "data", "venv")]
    files = [*ROOT.glob("*.py"), *(file for folder in folders for file in folder.rglob("*.py"))]
    assert {ROOT / "train.py", ROOT / "plumbing" / "checkpoint.py", Path(__file__)} <= set(files)
    found = []
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = set()
            if isinstance(node, ast.Import):
                names = {name.name.partition(".")[0] for name in node.names} & modules
            elif isinstance(node, ast.ImportFrom):
                names = {(node.module or "").partition(".")[0]} & modules
            elif isinstance(node, ast.Call):
                names = {ast.unparse(node.func)} & calls | {keyword.arg for keyword in node.keywords} & options
            found += [f"{file}:{node.lineno}: {name}" for name in names]
    assert not found


def test_what_is_needed_is_said(chain, stopped, tmp_path, monkeypatch, capsys, refused):
    """A checkpoint as a start, other gates, a directory that is no run; and a finished run needs nothing any more."""
    out, args = chain
    x, mine = stopped
    new = [a for a in args["continue"] if not a.startswith("--out=")] + [f"--out={tmp_path / 'y'}"]
    refused(tmp_path, "this is a checkpoint, and a model directory or a finished run is needed", *new,
            f"--init_from={newest_checkpoint(x)}")  # fmt: skip
    refused(tmp_path, "this run is not finished", *new, f"--init_from={x}")
    refused(tmp_path, "no model or run there", *new, f"--init_from={tmp_path}")
    fewer = [a for a in mine if not a.startswith(("--out=", "--target_d_ffn=", "--target_n_layer="))]
    refused(tmp_path, "it has gates for layer, hidden, head, ffn, and these settings need gates for hidden, head",
            *fewer, f"--resume={x / 'checkpoints' / 'step_000050'}", f"--out={tmp_path / 'y'}")  # fmt: skip
    done = shutil.copytree(out["continue"], tmp_path / "done")
    source = shutil.copytree(out["prune"], tmp_path / "source")
    mine = [a for a in args["continue"] if not a.startswith(("--out=", "--init_from="))]
    mine += [f"--out={done}", f"--init_from={source}"]
    assert run(monkeypatch, *mine) == 0 and "is finished already" in capsys.readouterr().out
    for gone in (source / "model", source):
        shutil.rmtree(gone)
        assert run(monkeypatch, *mine) == 0 and "is finished already" in capsys.readouterr().out


def test_data_and_source_may_move(chain, tiny_data, tmp_path, monkeypatch, capsys):
    """They are known by what they hold: another path is the same data set, another content at the same path is not."""
    out, args = chain
    data, source = shutil.copytree(tiny_data, tmp_path / "data"), shutil.copytree(out["prune"], tmp_path / "source")
    mine = [a for a in args["continue"] if not a.startswith(("--out=", "--data=", "--init_from="))]
    x = f"--out={tmp_path / 'x'}"
    assert run(monkeypatch, *mine, x, f"--data={data}", f"--init_from={source}", "--stop_at=13") == 0
    other = [f"--data={tiny_data}/", f"--init_from={out['prune'] / 'model'}"]
    capsys.readouterr()
    assert run(monkeypatch, *mine, x, other[0], f"--init_from={out['pretrain']}") == 2
    assert "init_from" in (err := capsys.readouterr().err) and "is not what" in err and err.count("\n") == 1
    assert run(monkeypatch, *mine, x, *other) == 0
    for name in ("model/model.safetensors", "model/config.json"):
        assert (tmp_path / "x" / name).read_bytes() == (out["continue"] / name).read_bytes()
    assert metrics(tmp_path / "x")[1:] == metrics(out["continue"])[1:]


def test_what_tells_models_apart(tmp_path):
    """A sample of their weights, from all of the file, and each number of the config."""
    config, seen = LlamaConfig(300, 2, 64, 2, 2, 32, 96, 64), set()
    for name, change in (("a", {}), ("b", {}), ("c", {"rope_theta": 5e3})):
        model = Llama(replace(config, **change)).init_weights(0)
        for parameter in model.layers.parameters() if name == "b" else ():  # as if it was trained on
            parameter.data += 1e-3
        model.save_pretrained(tmp_path / name)
        seen.add(digest(str(tmp_path / name)))
    assert len(seen) == 3 and digest(str(shutil.copytree(tmp_path / "a", tmp_path / "d"))) in seen


def test_the_newest_checkpoint_is_that_with_the_most_steps(tmp_path):
    for step in (1_000_000, 999_999, 42):
        (tmp_path / "checkpoints" / f"step_{step:06d}").mkdir(parents=True)
    assert newest_checkpoint(tmp_path).name == "step_1000000"


def test_what_a_run_may_change_while_it_goes_on():
    """What neither its numbers nor its model depend on, but for rounding."""
    machine = {"micro_batch", "activation_checkpointing", "compile", "device", "parallel", "shard_gradients", "threads"}
    files = {"out", "resume", "save_interval", "keep_checkpoints", "stop_at", "log_interval"}
    assert FREE == machine | files | {"dry_run", "world_size", "gpu", "utilisation", "dollars_per_gpu_hour"}


def test_ctrl_c_ends_with_130():
    """As shells expect it; a run that SIGTERM stops has done what it was told."""
    run = object.__new__(Run)
    for signals, status in (([], 0), ([signal.SIGTERM], 0), ([signal.SIGINT], 130)):
        run.signals = signals
        assert run.exit_status == status


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_goes_away_stops_a_run(tiny_data, tmp_path, monkeypatch, ignored):
    """It leaves a checkpoint. Under nohup the signal is ignored, and the run goes on."""
    next_batch = data.BatchReader.next_batch

    def hang_up(self, step, weights):
        if step == 3:
            os.kill(os.getpid(), signal.SIGHUP)
        return next_batch(self, step, weights)

    monkeypatch.setattr(data.BatchReader, "next_batch", hang_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        assert run(monkeypatch, *SHAPE, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=8") == 0
    finally:
        signal.signal(signal.SIGHUP, before)
    assert newest_checkpoint(tmp_path / "x").name == ("step_000008" if ignored else "step_000004")
    assert (tmp_path / "x" / "model").exists() == ignored


def test_a_finished_run_needs_no_checkpoint(chain, tmp_path, monkeypatch, capsys):
    """Its model is what counts, also where an older checkpoint is left."""
    out, args = chain
    mine = shutil.copytree(out["continue"], tmp_path / "mine")
    command = [f"--out={mine}" if a.startswith("--out=") else a for a in args["continue"]]
    assert len(checkpoints(mine)) > 1
    for old in reversed(checkpoints(mine)):
        shutil.rmtree(old)
        before = everything(mine)
        assert run(monkeypatch, *command) == 0 and "is finished already" in capsys.readouterr().out
        assert everything(mine) == before and torch.equal(
            load_model(mine).lm_head.weight, Llama.from_pretrained(mine / "model").lm_head.weight
        )
    more = [f"--out={tmp_path / 'more'}" if a.startswith("--out=") else a for a in args["continue"]]
    assert run(monkeypatch, *more, f"--resume={out['continue']}", "--export_dtype=bfloat16") == 0  # no step is left
    assert run(monkeypatch, *more, "--export_dtype=bfloat16") == 0 and "is finished already" in capsys.readouterr().out


def test_eval_says_which_checkpoint_it_reads(chain, tmp_path, monkeypatch, capsys):
    mine = shutil.copytree(chain[0]["continue"], tmp_path / "mine")
    load_model(mine)
    load_model(newest_checkpoint(mine))
    assert capsys.readouterr().err == ""
    shutil.rmtree(mine / "model")
    load_model(mine)
    name = newest_checkpoint(mine).name
    assert capsys.readouterr().err == f"note: {mine} is not finished, so its newest checkpoint is read: {name}\n"


def test_a_reference_model_is_not_needed_twice(chain, tmp_path, monkeypatch):
    """A checkpoint has its losses."""
    out, args = chain
    reference = shutil.copytree(out["pretrain"], tmp_path / "reference")
    mine = [a for a in args["prune"] if not a.startswith(("--out=", "--reference_model="))]
    mine += [f"--out={tmp_path / 'x'}", f"--reference_model={reference}"]
    assert run(monkeypatch, *mine, "--stop_at=4") == 0
    shutil.rmtree(reference)
    assert run(monkeypatch, *mine, "--stop_at=6") == 0
    first, *_, last = metrics(tmp_path / "x", "eval")
    assert last["step"] == 6 and last["reference"] == first["reference"]


def test_a_mixture_that_is_to_stay_does_so_at_once(chain, tmp_path, monkeypatch):
    """And the tokens are those that were read, also where the batches have another size from here on."""
    out, args = chain
    mine = [a for a in args["prune"] if not a.startswith("--out=")]
    mine += [f"--out={tmp_path / 'x'}", f"--resume={out['prune'] / 'checkpoints' / 'step_000050'}"]
    before = next(line for line in metrics(out["prune"], "eval") if line["step"] == 50)
    assert run(monkeypatch, *mine, "--schedule=constant", "--batch_size=8", "--log_interval=1", "--stop_at=52") == 0
    first, last = (line for line in metrics(tmp_path / "x", "train") if line["step"] > 50)
    assert first["weights"] == metrics(out["prune"], "eval")[0]["weights"] != before["weights"]
    assert last["tokens"] == before["tokens"] + 2 * 8 * 64
    assert last["tokens"] == sum(metrics(tmp_path / "x", "eval")[-1]["domain_tokens"].values())


def test_a_run_that_was_given_more_steps_is_not_finished(chain, tmp_path, monkeypatch):
    """The model of fewer steps is gone at once, so that nothing takes it for the run's: not after a stop, nor where the
    new one cannot be written."""
    out, args = chain
    again = shutil.copytree(out["continue"], tmp_path / "again")
    mine = [f"--out={again}" if a.startswith("--out=") else a for a in args["continue"]]
    older = load_model(again).lm_head.weight
    with monkeypatch.context() as killed:  # what is half removed is no model
        killed.setattr(shutil, "rmtree", lambda *_, ignore_errors=False: ignore_errors or sys.exit(9))
        assert run(killed, *mine, "--steps=50") == 9
    assert not (again / "model").exists()
    assert run(monkeypatch, *mine, "--steps=50", "--stop_at=45") == 0
    with pytest.raises(ValueError, match="this run is not finished"):
        directory_of(str(again))
    ours, theirs = (load_model(path).lm_head.weight for path in (again, again / "checkpoints" / "step_000045"))
    assert torch.equal(ours, theirs) and not torch.equal(ours, older) and not (again / "model").exists()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "model.safetensors")

    save_model = train.save_model
    monkeypatch.setattr(train, "save_model", full)
    assert "No space left" in run(monkeypatch, *mine, "--steps=50")
    monkeypatch.setattr(train, "save_model", save_model)
    with pytest.raises(ValueError, match="this run is not finished"):
        directory_of(str(again))
    assert run(monkeypatch, *mine, "--steps=50") == 0
    last = load_model(again / "checkpoints" / "step_000050").lm_head.weight
    assert torch.equal(load_model(again).lm_head.weight, last) and not torch.equal(last, ours)


def test_directories_may_be_links(tiny_data, tmp_path, monkeypatch, capsys):
    """A run whose checkpoints are out of reach is not begun anew; and what a link stands for is not removed."""
    x, scratch = tmp_path / "x", tmp_path / "scratch"
    args = [f"--data={tiny_data}", f"--out={x}", "--keep_checkpoints=1"]
    assert run(monkeypatch, *args, "--steps=10") == 0
    (x / "checkpoints").rename(scratch)
    (x / "checkpoints").symlink_to(scratch)
    scratch.rename(tmp_path / "not mounted")
    before = {p: p.read_bytes() for p in x.rglob("*") if p.is_file()}
    assert run(monkeypatch, *args, "--steps=20") == 2
    err = capsys.readouterr().err
    assert "checkpoints: this links to" in err and "which is not there" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in x.rglob("*") if p.is_file()}
    (tmp_path / "not mounted").rename(scratch)
    for name in ("model", "checkpoints/step_000010"):
        kept = (x / name).resolve().rename(tmp_path / Path(name).name)
        (x / name).symlink_to(kept)
    assert run(monkeypatch, *args, "--steps=20") == 0
    assert [p.name for p in scratch.iterdir()] == ["step_000020"] and not (x / "model").is_symlink()
    assert metrics(x, "eval")[-1]["step"] == 20
    assert load_model(tmp_path / "model") and load_model(tmp_path / "step_000010")


def test_a_model_that_cannot_be_replaced_is_said_before_anything_is_changed(tiny_data, tmp_path, monkeypatch, capsys):
    x = tmp_path / "x"
    args = [f"--data={tiny_data}", f"--out={x}"]
    assert run(monkeypatch, *args, "--steps=10") == 0
    before = {p: p.read_bytes() for p in x.rglob("*") if p.is_file()}

    def denied(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("plumbing.run.shutil.rmtree", denied)
        assert run(patch, *args, "--steps=20") == 2
    err = capsys.readouterr().err
    assert "Permission denied" in err and err.count("\n") == 1
    assert before == {p: p.read_bytes() for p in x.rglob("*") if p.is_file()}


def test_an_old_checkpoint_that_cannot_be_removed_does_not_end_the_run(tiny_data, tmp_path, monkeypatch, capsys):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=30", "--keep_checkpoints=1"]
    rmtree = shutil.rmtree

    def denied(path, **options):
        if Path(path).name.startswith("step_000010"):
            raise OSError(errno.EACCES, "Permission denied", str(path))
        rmtree(path, **options)

    monkeypatch.setattr("plumbing.run.shutil.rmtree", denied)
    assert run(monkeypatch, *args) == 0
    assert "step_000010.partial could not be removed: Permission denied" in capsys.readouterr().out
    names = sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir())
    assert names == ["step_000010.partial", "step_000030"]


@pytest.mark.parametrize("in_background", [False, True])
def test_a_checkpoint_is_of_the_moment_it_was_asked_for(in_background, tmp_path):
    """Training goes on while it is written, and must not be seen in it."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    run = Run(str(tmp_path / "x"), {"a": 1}, set())
    run.open()
    expected = {}
    for step in (1, 2, 3):
        model(torch.randn(8, 300)).square().mean().backward()
        optimizer.step()
        expected[step] = model.weight.detach().clone()
        run.log(step=step)
        run.save(step, model, optimizer, {"seconds": step}, keep=2, in_background=in_background)
        with torch.no_grad():
            model.weight.zero_()  # the next step, while the file is being written
            run.finish_save()
            model.weight.copy_(expected[step])
    assert sorted(p.name for p in (tmp_path / "x" / "checkpoints").iterdir()) == ["step_000002", "step_000003"]
    for step in (2, 3):
        found = torch.nn.Linear(300, 300)
        where = tmp_path / "x" / "checkpoints" / f"step_{step:06d}"
        checkpoint.load(found, where)
        assert torch.equal(found.weight, expected[step])
        state = json.loads((where / "state.json").read_text())
        assert state["step"] == step and state["metrics_bytes"] == sum(
            len(f'{{"step": {i}}}\n') for i in range(1, step + 1)
        )


def test_a_run_that_another_process_has_begun_meanwhile_is_left_alone(tmp_path):
    slow, quick = (Run(str(tmp_path / "x"), {"a": 1}, set()) for _ in range(2))
    quick.open()
    quick.log(step=1)
    quick.save(1, torch.nn.Linear(2, 2), torch.optim.AdamW([torch.zeros(1)]), {}, keep=2)
    quick.metrics.close()
    before = {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="another process has written checkpoints there"):
        slow.open()
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").rglob("*") if p.is_file()}


@pytest.mark.parametrize("end", ["not finite", "out of memory", "not finite, and a full disk"])
def test_a_run_that_gives_up_keeps_the_checkpoint_it_is_writing(end, tiny_data, tmp_path, monkeypatch):
    """If that cannot be written, either, the run says why it gave up, and not this."""
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=20", "--log_interval=1"]
    save_it, whole = Run.save, train.Llama.forward
    monkeypatch.setattr(Run, "save", lambda *a, **k: save_it(*a, **{**k, "in_background": True}))
    calls = []

    def poisoned(self, tokens, z=None, targets=None, cache=None):
        calls.append(torch.is_grad_enabled())
        loss = whole(self, tokens, z, targets, cache)
        if not calls[-1] or sum(calls) <= 10:
            return loss
        if end == "out of memory":
            raise torch.OutOfMemoryError(end)
        if "full" in end:
            monkeypatch.setattr(Path, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        return loss * torch.nan

    monkeypatch.setattr(train.Llama, "forward", poisoned)
    if end == "out of memory":
        with pytest.raises(torch.OutOfMemoryError):
            run(monkeypatch, *args)
    else:
        said = run(monkeypatch, *args)
        assert "step 10" in said and "not finite" in said
    assert "full" in end or [p.name for p in (tmp_path / "x" / "checkpoints").iterdir()] == ["step_000010"]


def test_what_is_half_written_is_never_read(chain, tmp_path, monkeypatch, capsys):
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["continue"]]
    assert run(monkeypatch, *mine, "--stop_at=20") == 0
    half = tmp_path / "x" / "checkpoints" / "step_000030.partial"
    half.mkdir()
    (half / "state.json").write_text('{"step": 30, "metrics')
    (tmp_path / "x" / "model.partial").mkdir()
    (tmp_path / "x" / "model.partial" / "config.json").write_text("{")
    capsys.readouterr()
    assert run(monkeypatch, *mine) == 0 and "step_000020" in capsys.readouterr().out
    assert metrics(tmp_path / "x")[1:] == metrics(out["continue"])[1:]
    assert not [*(tmp_path / "x").rglob("*.partial")]


def test_a_run_that_never_goes_on_names_what_does(tiny_data, tmp_path, monkeypatch, capsys):
    args = [f"--data={tiny_data}", f"--out={tmp_path}", "--steps=4"]
    assert run(monkeypatch, *args, "--stop_at=2", "--resume=never") == 0
    assert "stopped after step 2; the same command with --resume auto goes on from here" in capsys.readouterr().out
    assert run(monkeypatch, *args, "--resume=never") == 2
    assert "--resume auto goes on with it" in capsys.readouterr().err
    assert run(monkeypatch, *args, "--resume=auto") == 0 and (tmp_path / "model").exists()


def test_what_is_no_run_or_another_one_is_not_overwritten(chain, tiny_data, tmp_path, monkeypatch, capsys):
    out, _ = chain
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=20"]
    shutil.copytree(out["pretrain"] / "model", tmp_path / "x")
    before = {p: p.read_bytes() for p in (tmp_path / "x").iterdir()}
    assert run(monkeypatch, *args, f"--init_from={tmp_path / 'x'}") == 2
    assert "config.json is not the config.json of a run" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (tmp_path / "x").iterdir()}

    shutil.rmtree(tmp_path / "x")
    evaluate = train.Trainer.evaluate
    monkeypatch.setattr(train.Trainer, "evaluate", lambda *a, **k: sys.exit(9))  # dies before its first checkpoint
    assert run(monkeypatch, *args) == 9
    monkeypatch.setattr(train.Trainer, "evaluate", evaluate)
    log = (tmp_path / "x" / "metrics.jsonl").read_bytes()
    assert run(monkeypatch, *args, "--lr=1.0") == 2
    assert "started with other settings" in capsys.readouterr().err
    assert run(monkeypatch, *args, "--resume=never") == 2
    assert "holds a run already" in capsys.readouterr().err
    assert log and log == (tmp_path / "x" / "metrics.jsonl").read_bytes()

    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "x" / "metrics.jsonl"], stdin=-1, stdout=-1)
    other.stdout.readline()  # it has the file
    assert run(monkeypatch, *args) == 2
    assert "another process is at work on this run" in capsys.readouterr().err
    assert log == (tmp_path / "x" / "metrics.jsonl").read_bytes()
    other.communicate(b"\n")
    assert run(monkeypatch, *args) == 0


def test_a_run_goes_on_with_its_own_data_and_whole_checkpoints(tiny_data, tmp_path, monkeypatch, capsys):
    data, x = shutil.copytree(tiny_data, tmp_path / "data"), tmp_path / "x"
    args = [f"--data={data}", f"--out={x}", "--steps=30", "--keep_checkpoints=1"]
    assert run(monkeypatch, *args, "--stop_at=10") == 0
    meta = (data / "meta.json").read_text()
    (data / "meta.json").write_text(meta.replace('"seed": 0', '"seed": 1'))
    assert run(monkeypatch, *args) == 2
    assert "it was made again, with other content" in capsys.readouterr().err
    (data / "meta.json").write_text(meta)
    copy = shutil.copytree(x / "checkpoints" / "step_000010", x / "checkpoints" / "step_000010-mine")
    shutil.copytree(copy, copy.with_name("step_000010_2"))
    (weights,) = (x / "checkpoints" / "step_000010").glob("weights-*")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    monkeypatch.setattr(sys, "argv", ["eval.py", str(x), f"--data={data}"])
    with pytest.raises(SystemExit) as end:
        eval_module.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and "weights-1-of-1.safetensors: damaged" in err and err.count("\n") == 1
    weights.write_bytes(whole)
    assert run(monkeypatch, *args, "--stop_at=20", "--keep_checkpoints=2") == 0
    assert run(monkeypatch, *args, f"--resume={x / 'checkpoints' / 'step_000010'}") == 2  # no silent way back
    assert "goes on from its newest checkpoint, step_000020" in capsys.readouterr().err
    log = (x / "metrics.jsonl").read_bytes()
    for lost in (log[:-1], b""):
        (x / "metrics.jsonl").write_bytes(lost)
        assert run(monkeypatch, *args) == 2
        assert "before step_000020 is not there any more" in capsys.readouterr().err
    (x / "metrics.jsonl").write_bytes(log)
    assert run(monkeypatch, *args) == 0
    names = sorted(p.name for p in (x / "checkpoints").iterdir())
    assert names == ["step_000010-mine", "step_000010_2", "step_000030"]  # a user's copies are not ours to delete


def test_state_does_not_grow_with_the_tokens(tiny_data, tmp_path, monkeypatch):
    sizes = []
    for seq_len in (8, 64):  # eight times the tokens
        out = tmp_path / str(seq_len)
        args = [f"--data={tiny_data}", f"--out={out}", f"--seq_len={seq_len}", "--batch_size=8", "--steps=20"]
        assert run(monkeypatch, *args) == 0
        text = (newest_checkpoint(out) / "state.json").read_text()
        sizes.append(len(re.sub(r"\d+(\.\d+)?(e-?\d+)?", "1", text)))  # but for the digits of its numbers
    assert sizes[0] == sizes[1]


def test_metrics_hold_nothing_but_what_the_settings_give(chain):
    """How fast it was is in timings.jsonl, a line for each training line."""
    for run_ in chain[0].values():
        assert not {"seconds", "tokens_per_second"} & {key for line in metrics(run_) for key in line}
        times = [json.loads(line) for line in (run_ / "timings.jsonl").read_text().splitlines()]
        assert [t["step"] for t in times] == [line["step"] for line in metrics(run_, "train")]
        assert all(t["tokens_per_second"] > 0 and t["peak_memory"] > 1e7 and t["mfu"] is None for t in times)
