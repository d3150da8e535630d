"""What survives: full disks, saves in the background, a start from somebody else's checkpoint."""

import json
import re
import resource
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SHAPE, metrics, run
from torch.distributed import checkpoint as dcp

import eval as eval_module
import train
from plumbing.run import Run, newest_checkpoint


def test_a_full_disk_loses_nothing_older(chain, tmp_path, monkeypatch):
    """A limit on the size of files stands in for the disk: the save of step 40 fails, and the run ends as ever."""
    out, args = chain
    mine = [f"--out={tmp_path / 'x'}" if a.startswith("--out=") else a for a in args["prune"]]
    assert run(monkeypatch, *mine, "--stop_at=30") == 0
    (weights,) = (tmp_path / "x" / "checkpoints" / "step_000030").glob("*.distcp")
    limit = weights.stat().st_size // 2
    done = subprocess.run(
        [sys.executable, "train.py", *SHAPE, *map(str, mine)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr  # fmt: skip
    assert "File too large" in done.stderr and "the same command goes on from" in done.stderr
    assert newest_checkpoint(tmp_path / "x").name == "step_000030"
    done = subprocess.run(
        [sys.executable, "train.py", *SHAPE, *map(str, mine)], cwd=ROOT, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100)),
    )  # fmt: skip
    assert done.returncode != 0  # not even the settings can be written
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
    assert run(monkeypatch, *mine, *other) == 0
    assert "changed: lr was 0.003, now 0.001; grad_clip was 1.0, now 0.5; sche" in capsys.readouterr().out
    first, second = metrics(tmp_path / "x", "run")
    assert "changed" not in first and second["changed"]["lr"] == {"was": 3e-3, "now": 1e-3}
    assert metrics(tmp_path / "x", "train")[-1]["lr"] == pytest.approx(1e-4, rel=0.1)
    assert run(monkeypatch, *mine, *other, "--lr=1e-4") == 2  # where it has a run of its own, all stays
    assert "started with other settings" in capsys.readouterr().err
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
    first = metrics(tmp_path / "x", "eval")[-5]
    assert first["step"] == 52 and first["reference"] == losses and first["ratio"]["animals"] > 0.7
    keep = f"--reference_model={out['pretrain']}"
    for wrong, words in (
        (["--domains=['sums', 'brackets', 'animals']"], "in this order"),
        (["--steps=50", "--sparsity_warmup=20"], "has 50 already"),
        (["--seq_len=32"], "the checkpoint was made with 64"),
    ):
        assert run(monkeypatch, *mine, keep, f"--out={tmp_path / 'y'}", resume, *wrong) == 2
        err = capsys.readouterr().err
        assert words in err and err.count("\n") == 1


def test_a_state_that_is_not_ours_is_one_line(chain, tmp_path, monkeypatch, capsys):
    out, args = chain
    again = shutil.copytree(out["continue"], tmp_path / "x")
    mine = [f"--out={again}" if a.startswith("--out=") else a for a in args["continue"]]
    state = newest_checkpoint(again) / "state.json"
    for text, words in (("{", "not a JSON object"), ("[]", "not a JSON object"), ("{}", "another version of train.py")):
        state.write_text(text)
        assert run(monkeypatch, *mine) == 2
        err = capsys.readouterr().err
        assert "state.json: " in err and words in err and err.count("\n") == 1
    source = shutil.copytree(out["prune"], tmp_path / "source")
    mine = [f"--init_from={source}" if a.startswith("--init_from=") else a for a in args["continue"]]
    for text in ("{", "[]", "{}", '{"tokenizer": "byte", "fingerprint": "x", "reader": {"data": 1}}'):
        (source / "model" / "trained_with.json").write_text(text)
        assert run(monkeypatch, *mine, f"--out={tmp_path / 'y'}") == 2
        err = capsys.readouterr().err
        assert "trained_with.json: not what train.py writes" in err and err.count("\n") == 1
        assert not (tmp_path / "y").exists()


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
        found = {"weights": {"weight": torch.zeros(300, 300), "bias": torch.zeros(300)}}
        where = tmp_path / "x" / "checkpoints" / f"step_{step:06d}"
        dcp.load(found, checkpoint_id=where, no_dist=True)
        assert torch.equal(found["weights"]["weight"], expected[step])
        state = json.loads((where / "state.json").read_text())
        assert state["step"] == step and state["metrics_bytes"] == sum(
            len(f'{{"step": {i}}}\n') for i in range(1, step + 1)
        )


def test_a_run_that_gives_up_keeps_the_checkpoint_it_is_writing(tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=20", "--log_interval=4"]
    save, whole = Run.save, train.Llama.forward
    monkeypatch.setattr(Run, "save", lambda *a, **k: save(*a, **{**k, "in_background": True}))
    calls = []

    def poisoned(self, tokens, z=None, targets=None, cache=None):
        calls.append(torch.is_grad_enabled())
        loss = whole(self, tokens, z, targets, cache)
        return loss * torch.nan if calls[-1] and sum(calls) > 10 else loss

    monkeypatch.setattr(train.Llama, "forward", poisoned)
    assert "step 10" in run(monkeypatch, *args)
    assert [p.name for p in (tmp_path / "x" / "checkpoints").iterdir()] == ["step_000010"]


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
    assert run(monkeypatch, *args, "--lr=1.0", "--resume=never") == 2
    assert "started with other settings" in capsys.readouterr().err
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
    (weights,) = (x / "checkpoints" / "step_000010").glob("*.distcp")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    assert run(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert "step_000010: damaged" in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["eval.py", str(x), f"--data={data}"])
    with pytest.raises(SystemExit) as end:
        eval_module.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and "step_000010: damaged" in err and err.count("\n") == 1
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
