"""Any number of processes gives the same run, holds only its share, and survives the death of one of them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import GATES, ROOT, SHAPE, TARGET, metrics, run
from processes import fresh, resident_memory, script
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from model import Layer, Llama, LlamaConfig
from plumbing import choices, cost, data, parallel
from plumbing.command_line import load
from plumbing.log import host_memory
from plumbing.run import newest_checkpoint

SMALL = LlamaConfig(257, 3, 32, 4, 2, 8, 48, 64, tie_embeddings=True)


@pytest.fixture(scope="module")
def pruning(tiny_data, tmp_path_factory):
    """14 steps of pruning with the full method, from a source with GQA and tied embeddings, in one process."""
    top, patch = tmp_path_factory.mktemp("parallel"), pytest.MonkeyPatch()
    shape = ["--n_kv_head=2", "--tie_embeddings=True", f"--data={tiny_data}", "--batch_size=8"]
    assert run(patch, *shape, "--steps=20", f"--out={top / 'source'}") == 0
    source = [f"--init_from={top / 'source'}", f"--reference_model={top / 'source'}", *TARGET, *GATES]
    robust = "--schedule=dro --dynamic_reference=True --dynamic_ratio=True --eval_interval=1 --log_interval=1".split()
    args = [*source, *robust, *shape, "--gate_samples=4", "--steps=14", "--warmup=2", "--eval_sequences=5"]
    args += ["--sparsity_warmup=9"]
    assert run(patch, *args, f"--out={top / 'one'}") == 0
    patch.undo()
    return [*SHAPE, *args], metrics(top / "one")


def assert_same(lines: list[dict], expected: list[dict]):
    """Every number of every line within 1e-5 relative; everything else equal."""
    assert [(x["type"], x.get("step")) for x in lines] == [(x["type"], x.get("step")) for x in expected]

    def compare(a, b, where):
        if isinstance(b, dict):
            assert a.keys() == b.keys()
            for key in b:
                compare(a[key], b[key], f"{where} {key}")
        elif isinstance(b, list):
            assert len(a) == len(b)
            for x, y in zip(a, b):
                compare(x, y, where)
        elif isinstance(b, float):
            assert a == pytest.approx(b, rel=1e-5, abs=1e-7), where
        else:
            assert a == b, where

    for line, other in zip(lines[1:], expected[1:]):
        compare(line, other, f"{line['type']} {line.get('step')}")


def spied(folder, *args):
    """train.py; what each process is asked to draw, and its share of it, is written to `folder`."""
    seen, next_batch = [], data.BatchReader.next_batch

    def spy(self, step, weights):
        seen.append([step, list(weights), self.start, self.start + self.mine])
        return next_batch(self, step, weights)

    data.BatchReader.next_batch = spy
    script("train.py", *args)
    (folder / f"rank{os.environ['RANK']}.json").write_text(json.dumps(seen))


def test_two_ddp_processes_are_one_and_agree_on_the_mixture(pruning, tmp_path):
    args, expected = pruning
    assert any(x["curve"] for x in expected if x["type"] == "eval")  # the law has predicted
    done = fresh(spied, tmp_path, *args, f"--out={tmp_path / 'x'}", n=2)
    assert done.returncode == 0, done.stderr
    assert_same(metrics(tmp_path / "x"), expected)
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert [x[:2] for x in first] == [x[:2] for x in second] and len(first) == 14
    assert {tuple(x[2:]) for x in first} == {(0, 4)} and {tuple(x[2:]) for x in second} == {(4, 8)}
    assert done.stdout.count("step 14: validation loss") == 1  # one process prints


def test_sharded_processes_are_one_and_their_checkpoint_is_read_by_one(pruning, tmp_path, monkeypatch, capsys):
    """FSDP, other micro-batches, activation checkpointing; stopped after 7 steps and ended in a single process."""
    args, expected = pruning
    mine = [*args, f"--out={tmp_path / 'x'}"]
    other = ["--parallel=fsdp", "--micro_batch=1", "--activation_checkpointing=True"]
    done = fresh(script, "train.py", *mine, *other, "--stop_at=7", n=2)
    assert done.returncode == 0 and "stopped after step 7" in done.stdout, done.stderr
    _, second = sorted((tmp_path / "x" / "checkpoints" / "step_000007").glob("weights-*-of-2.safetensors"))
    whole = second.read_bytes()
    second.write_bytes(whole[:-9] + bytes(9))
    assert run(monkeypatch, *mine) == 2 and f"{second}: damaged" in capsys.readouterr().err
    second.write_bytes(whole)
    assert run(monkeypatch, *mine) == 0
    assert_same(metrics(tmp_path / "x"), expected)


def test_one_process_is_continued_by_four_sharded_ones(pruning, tmp_path, monkeypatch):
    args, expected = pruning
    mine = [*args, f"--out={tmp_path / 'x'}"]
    assert run(monkeypatch, *mine, "--stop_at=7") == 0
    done = fresh(script, "train.py", *mine, "--parallel=fsdp", "--shard_gradients=True", n=4)
    assert done.returncode == 0, done.stderr
    assert_same(metrics(tmp_path / "x"), expected)


def test_sharded_processes_choose_what_one_chooses(pruning, tmp_path, monkeypatch):
    """By what the whole source does with the same text, which the first process reads beside its shard."""
    args, _ = pruning
    mine = [*args, "--gates=taylor", "--settle_at=0", "--noise_from=0", "--noise_to=0", "--steps=2", "--warmup=0"]
    assert run(monkeypatch, *mine, f"--out={tmp_path / 'one'}") == 0
    done = fresh(script, "train.py", *mine, f"--out={tmp_path / 'two'}", "--parallel=fsdp", n=2)
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / out / "model/pruning.json").read_text()) for out in ("one", "two"))
    assert one == two and len(one["hidden"]["kept"]) == one["target"]["d_model"] < one["source"]["d_model"]
    assert_same(metrics(tmp_path / "two"), metrics(tmp_path / "one"))


def test_three_processes_that_stopped_are_three_that_did_not(pruning, tmp_path):
    """To the last byte. Of three numbers, unlike of two, the order decides what their sum is: DDP must keep to one."""
    args, _ = pruning
    mine = [*args, "--batch_size=12", "--gate_samples=1", "--steps=6", "--sparsity_warmup=2", "--log_interval=6"]
    for name, stops in (("a", [0]), ("b", [2, 0])):
        for stop in stops:
            done = fresh(script, "train.py", *mine, f"--out={tmp_path / name / 'x'}", f"--stop_at={stop}", n=3)
            assert done.returncode == 0, done.stderr
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "a" / "x" / file).read_bytes() == (tmp_path / "b" / "x" / file).read_bytes()


SLOW = """
import sys, time
sys.path.insert(0, {root!r})
import train
from plumbing.run import Run
save, interrupted = Run.save, Run.interrupted
def slower(run):
    time.sleep(0.2)
    return interrupted(run)
def slow(run, *args, **how):
    time.sleep(3 * bool(run.signals))
    return save(run, *args, **how)
Run.save, Run.interrupted = slow, slower
train.main()
"""


def test_torchrun_restarts_a_killed_process_and_waits_for_a_slow_save(pruning, tmp_path, monkeypatch):
    """Its processes are killed 30 s after SIGTERM, here 1 s; the documented commands give them the time of a save."""
    args, expected = pruning
    checkpoints, mine = tmp_path / "x" / "checkpoints", [*args, f"--out={tmp_path / 'x'}", "--save_interval=2"]
    (tmp_path / "slow.py").write_text(SLOW.format(root=str(ROOT)))
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=2"]
    here = {"OMP_NUM_THREADS": "1", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([*start, "--shutdown-timeout=60", tmp_path / "slow.py", *mine], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=os.environ | here)  # fmt: skip
    while process.poll() is None and not (checkpoints / "step_000004").exists():
        time.sleep(0.01)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    for line in ("going on from", "step "):  # until it trains again
        while process.poll() is None and not process.stdout.readline().startswith(line):
            pass
    process.send_signal(signal.SIGTERM)
    step = int(re.search(r"stopped after step (\d+)", process.stdout.read())[1])
    process.wait(timeout=100)
    assert newest_checkpoint(tmp_path / "x").name == f"step_{step:06d}"
    assert not list(checkpoints.glob("*.partial"))
    assert run(monkeypatch, *mine) == 0
    assert_same(metrics(tmp_path / "x"), expected)


def test_a_mistake_is_one_line_of_ours(pruning, tmp_path):
    done = fresh(script, "train.py", *pruning[0], f"--out={tmp_path / 'x'}", "--batch_size=9", n=2)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert done.stderr == "train.py: batch_size = 9 must be a multiple of gate_samples = 4\n"


def one_is_told(*args):
    next_batch = data.BatchReader.next_batch

    def tell(self, step, weights):
        if step == 3 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return next_batch(self, step, weights)

    data.BatchReader.next_batch = tell
    script("train.py", *args)


def test_all_processes_stop_when_one_is_told(tiny_data, tmp_path):
    done = fresh(one_is_told, *SHAPE, f"--data={tiny_data}", f"--out={tmp_path / 'x'}", "--steps=8", n=2)
    assert done.returncode == 0 and "stopped after step 4" in done.stdout, done.stderr


def with_its_own(setting, values, *args):
    script("train.py", *args, f"--{setting}={values[int(os.environ['RANK'])]}")


@pytest.mark.parametrize("setting, values", [("lr", (0.001, 0.002)), ("log_interval", (5, 7))])
def test_processes_with_other_settings_do_not_train_together(setting, values, pruning, tmp_path):
    """As on two machines, of which each has its own command line: they would drift apart, and nobody would see it, or
    one would wait for the other for ever."""
    done = fresh(with_its_own, setting, values, *pruning[0], f"--out={tmp_path / 'x'}", n=2)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert done.stderr == f"train.py: process 1: {setting} is {values[1]}, and {values[0]} in process 0\n"


@pytest.mark.parametrize("who", [0, 1])
def test_a_process_without_the_source_does_not_train_along(who, pruning, tiny_data, tmp_path):
    [source] = [arg.removeprefix("--init_from=") for arg in pruning[0] if arg.startswith("--init_from=")]
    values = ("", source) if who else (source, "")
    shape = [*SHAPE, "--n_kv_head=2", "--tie_embeddings=True", f"--data={tiny_data}"]
    done = fresh(with_its_own, "init_from", values, *shape, f"--out={tmp_path / 'x'}", n=2)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert "process 1: the content of init_from is " in done.stderr and done.stderr.count("\n") == 1


def with_its_own_data(mine, theirs, *args):
    script("train.py", *args, f"--data={theirs if os.environ['RANK'] == '1' else mine}")


def test_processes_with_other_data_do_not_train_together(pruning, tiny_data, tmp_path):
    """A path is not looked at, but what is there."""
    args, same, other = pruning[0], *(shutil.copytree(tiny_data, tmp_path / name) for name in ("same", "other"))
    meta = other / "meta.json"
    meta.write_text(meta.read_text().replace('"seed": 0', '"seed": 1'))
    args = [*args, f"--out={tmp_path / 'x'}", "--steps=1", "--sparsity_warmup=0"]
    done = fresh(with_its_own_data, tiny_data, other, *args, n=2)
    assert done.returncode == 2 and not (tmp_path / "x").exists()
    assert "process 1: the content of data is " in done.stderr and done.stderr.count("\n") == 1
    done = fresh(with_its_own_data, tiny_data, same, *args, n=2)
    assert done.returncode == 0, done.stderr


def on_its_own_disk(mine, theirs, *args):
    script("train.py", *args, f"--out={theirs if os.environ['RANK'] == '1' else mine}")


def test_processes_with_other_checkpoints_do_not_train_together(tiny_data, tmp_path, monkeypatch):
    args = [f"--data={tiny_data}", "--steps=6", "--save_interval=2"]
    assert run(monkeypatch, *args, f"--out={tmp_path / 'x'}", "--stop_at=4") == 0
    shutil.copytree(tmp_path / "x", tmp_path / "y")
    shutil.rmtree(tmp_path / "y" / "checkpoints" / "step_000004")
    before = metrics(tmp_path / "x"), metrics(tmp_path / "y")
    done = fresh(on_its_own_disk, tmp_path / "x", tmp_path / "y", *SHAPE, *args, n=2)
    words = "process 1: the step of its newest checkpoint is 2, and 4 in process 0"
    assert done.returncode == 2 and done.stderr == f"train.py: {words}\n"
    assert (metrics(tmp_path / "x"), metrics(tmp_path / "y")) == before


def test_too_few_gpus_are_known_to_all_processes(monkeypatch):
    """The one that says so has a GPU itself."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="1 GPUs here, fewer than --nproc_per_node"):
        parallel.start(torch.device("cuda"))


def test_a_process_looks_at_its_own_gpu_alone(monkeypatch):
    """The first one would have the context of every process in its memory."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch, "empty", lambda size, device: SimpleNamespace(device=asked.append(device)))
    parallel.find_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "3")
    parallel.find_device("auto")
    assert asked == ["cuda", "cuda:3"]


# -- shards ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ranks():
    """A function that makes this process one of n that do not exist."""

    def be(rank, n):
        parallel.stop()
        dist.init_process_group("fake", rank=rank, world_size=n, store=FakeStore())
        return parallel.sharding("fsdp", "float32", torch.device("cpu"))["mesh"]

    yield be
    parallel.stop()


class Reduced(TorchDispatchMode):
    """Takes down the dtypes that gradients are summed in, and those of the matrix products."""

    def __init__(self):
        super().__init__()
        self.dtypes, self.products = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = {x.dtype for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        if "reduce_scatter" in str(function):
            self.dtypes |= found
        if function is torch.ops.aten.mm.default:
            self.products |= found
        return function(*args, **(kwargs or {}))


def test_shards_multiply_in_bfloat16_and_sum_their_gradients_in_float32(ranks):
    how = parallel.sharding("fsdp", "bfloat16", torch.device("cpu")) | {"mesh": ranks(0, 2)}
    config = LlamaConfig(97, 2, 48, 4, 4, 12, 64, 64)
    model, tokens = parallel.make_model(config, 0, torch.device("cpu"), **how), torch.zeros(1, 9, dtype=torch.int64)
    with Reduced() as reduced:
        model(tokens, targets=tokens).sum().backward()
    assert reduced.dtypes == {torch.float32} and reduced.products == {torch.bfloat16}


@pytest.mark.parametrize("from_file", [True, False])
def test_the_shards_together_are_the_model(ranks, from_file, tmp_path):
    """Read from safetensors or drawn from a seed: the same weights for any number of processes."""
    whole = Llama(SMALL).init_weights(3)
    whole.save_pretrained(tmp_path)
    parts = []
    for rank in range(3):  # 3 does not divide 32: shards differ in size
        mesh = ranks(rank, 3)
        model = parallel.make_model(SMALL, tmp_path if from_file else 3, torch.device("cpu"), mesh)
        assert model.lm_head.weight is model.embed_tokens.weight
        parts.append({name: parallel.local(p).detach().clone() for name, p in model.named_parameters()})
    for name, weight in whole.named_parameters():
        assert torch.equal(torch.cat([part[name] for part in parts]), weight), name


def load_a_quarter(path):
    """Print how much more memory a process takes at its most while it loads its quarter of a model."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    cpu = torch.device("cpu")
    mesh = parallel.sharding("fsdp", "float32", cpu)["mesh"]
    parallel.make_model(LlamaConfig(257, 1, 32, 2, 2, 16, 32, 64), 0, cpu, mesh)  # what is loaded once
    before = resident_memory()
    model = parallel.read_model(path, cpu, mesh)
    print((host_memory() - before) / (4 * model.config.n_params()))


def test_no_process_ever_holds_the_whole_model(tmp_path):
    Llama(LlamaConfig(2000, 6, 512, 8, 8, 64, 1376, 64)).save_pretrained(tmp_path)
    done = fresh(load_a_quarter, tmp_path)
    assert 0.2 < float(done.stdout) < 0.45, done.stderr  # a quarter is its own


# -- the step -------------------------------------------------------------------------------------------------------


class NoValues(cost.Rehearsal):
    """Some steps on the meta device, whose tensors have no values: reading one is an error. `seen` tells what the next
    step finds."""

    device = torch.device("meta")

    def __init__(self, s, source, steps, seen=lambda: None):
        super().__init__(s, s.batch_size, keeps_gradients=False)
        self.steps, self.seen, self.found = steps, seen, []
        with pytest.raises(cost.Enough):
            train.rehearse(s, source, self)

    def watch(self, trainer):
        self.trainer = trainer

    def next_batch(self, step, weights):
        self.found.append(self.seen())
        if step == self.steps:
            raise cost.Enough
        return self


class Copies(TorchDispatchMode):
    """The copies from the host to the device for which the host waits."""

    def __init__(self):
        super().__init__()
        self.waited_for = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        devices = {x.device for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)}
        if len(devices) > 1 and not (kwargs or {}).get("non_blocking"):
            self.waited_for.append(function)
        return result


@pytest.fixture
def on_meta(monkeypatch):
    """Have PyTorch allow on the meta device what it allows on a GPU."""
    optimizer = sys.modules[torch.optim.Optimizer.__module__]
    monkeypatch.setattr(optimizer, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    monkeypatch.setattr(parallel, "autocast", lambda *_: nullcontext())


LARGE = {  # config -> shape of a small source
    "prune_7b": LlamaConfig(257, 2, 32, 4, 4, 8, 48, 64),
    "prune_7b_2.7b": LlamaConfig(257, 2, 32, 4, 4, 8, 48, 64),
    "prune_llama3_8b": LlamaConfig(257, 2, 32, 4, 2, 8, 48, 64, rope_theta=5e5),
    "prune_qwen3_0.6b": LlamaConfig(257, 2, 32, 4, 2, 8, 48, 64, tie_embeddings=True, qk_norm=True),
    "continue_1.3b": LlamaConfig(257, 2, 32, 4, 4, 8, 48, 64),
}
TARGET_OF_LARGE = "--target_n_layer=1 --target_d_model=24 --target_n_head=2 --target_d_ffn=32".split()
# the noise fades, and after two steps the choice is fixed
SETTLING = "--noise_from=0 --noise_to=2 --settle_at=2 --fade=3 --sparsity_warmup=1".split()


def shrunken(name: str, *options: str) -> tuple[train.Settings, LlamaConfig]:
    """The settings of a large config and the shape of its source, both small; it logs and saves nothing."""
    small = "--steps=9 --warmup=2 --batch_size=2 --gate_samples=2 --micro_batch=1 --seq_len=16 --log_interval=99 "
    small += "--eval_interval=99 --save_interval=99 --schedule=constant --sparsity_warmup=2 --parallel=ddp"
    target = TARGET_OF_LARGE if name.startswith("prune") else []
    config = str(ROOT / "config" / f"{name}.py")
    return load(train.Settings, [config, *small.split(), *target, *options]), LARGE[name]


@pytest.mark.parametrize("name, options", [*((name, []) for name in LARGE), ("prune_7b", SETTLING)])
def test_no_step_waits_for_the_device_or_compiles_again(name, options, on_meta, monkeypatch):
    """One graph serves all layers and steps, whatever the noise. Where the gates settle there is one more: they learn
    no longer."""
    s, source = shrunken(name, *options)
    n_steps = 4 if options else 2
    with Copies() as copies:
        steps = NoValues(s, source, n_steps, lambda: len(copies.waited_for))
    assert set(steps.found) == {steps.found[0]}  # those of the set-up
    with pytest.raises(RuntimeError, match="meta"):  # the log line does, and is the place for it
        steps.trainer.meter.check(["a", "b", "c"])

    torch.compiler.reset()
    counter, compile_layer = CompileCounter(), Layer.compile
    monkeypatch.setattr(Layer, "compile", lambda layer: compile_layer(layer, backend=counter))
    monkeypatch.setattr(parallel, "make_model", partial(parallel.make_model, compiled=True))
    steps = NoValues(s, source, n_steps, lambda: counter.frame_count)
    assert steps.found == ([0, 1, 1, 2, 2] if options else [0, 1, 1])


def test_a_step_that_waits_for_the_device_is_seen(on_meta, monkeypatch):
    s, source = shrunken("prune_7b")
    clamp = train.PruningMasks.clamp_
    monkeypatch.setattr(train.PruningMasks, "clamp_", lambda masks: (clamp(masks), torch.zeros(3).to("meta")))
    with Copies() as copies:
        found = NoValues(s, source, 2, lambda: len(copies.waited_for)).found
    assert np.diff(found).tolist() == [1, 1]
    monkeypatch.setattr(train.PruningMasks, "clamp_", lambda masks: (clamp(masks), masks.layer.log_alpha.sum().item()))
    with pytest.raises(RuntimeError, match="meta"):
        NoValues(s, source, 2)


def test_checkpointed_layers_compute_the_same():
    tokens = torch.randint(257, (2, 65), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointed in (False, True):
        model = parallel.make_model(SMALL, 0, torch.device("cpu"), checkpoint_layers=checkpointed)
        model(tokens[:, :-1], targets=tokens[:, 1:]).mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert torch.equal(a, b)


# -- what it would cost ---------------------------------------------------------------------------------------------


class Batches(cost.Rehearsal):
    """Real tensors for two steps: AdamW has its state in the second. Nothing is tracked."""

    def watch(self, trainer):
        trainer.model.init_weights(0)

    def next_batch(self, step, weights):
        if step == 2:
            raise cost.Enough
        return self


def train_and_predict(*args):
    """Print the memory that the dry run predicts, as a share of what training takes."""
    torch.set_num_threads(1)
    s = load(train.Settings, args)

    def steps(s):
        batches = Batches(s, s.batch_size, keeps_gradients=False)
        with pytest.raises(cost.Enough):
            train.rehearse(s, s.shape_from_scratch(257), batches)
        return batches  # the trainer is still there

    steps(replace(s, n_layer=1, d_model=32, n_head=2, d_ffn=32))  # what is loaded once
    predicted = cost.memory(s, s.shape_from_scratch(257), train.rehearse)["all"]
    before = resident_memory()
    kept = steps(s)  # noqa: F841
    print(predicted / (host_memory() - before))


@pytest.mark.parametrize("options", [[], ["--activation_checkpointing=True"], ["--micro_batch=2"]])
def test_predicted_memory_is_what_a_process_takes(options):
    """Against the operating system's count, with an allocator that gives back what is freed."""
    shape = "--n_layer=3 --d_model=512 --n_head=8 --d_ffn=1376 --seq_len=128 --batch_size=8".split()
    done = fresh(train_and_predict, *SHAPE, *shape, *options)
    assert float(done.stdout) == pytest.approx(1, abs=0.15), done.stderr


def choose_and_predict(*args):
    """Print the memory that the dry run predicts for a choice, as a share of what the choice takes."""
    torch.set_num_threads(1)
    s = load(train.Settings, args)

    def choose(shape):
        model = Llama(shape).init_weights(0)
        model.checkpoint_layers = s.activation_checkpointing
        text = [torch.randint(257, (2, s.seq_len + 1))] * 2
        return model, choices.scores(s.gates, None, model, text, 0)

    choose(LlamaConfig(257, 1, 32, 2, 2, 16, 32, s.seq_len))  # what is loaded once
    shape = LlamaConfig(257, 6, 512, 8, 4, 64, 1376, s.seq_len)
    predicted = sum(cost.by_kind(cost.snapshot_of_choice(s, shape)).values())
    before = resident_memory()
    kept = choose(shape)  # noqa: F841
    print(predicted / (host_memory() - before))


@pytest.mark.parametrize("options", [["taylor"], ["taylor", "--activation_checkpointing=True"], ["activation"]])
def test_predicted_memory_is_what_a_choice_takes(options):
    """Against the operating system's count, too."""
    gates, *more = options
    done = fresh(choose_and_predict, "--init_from=x", "--target_n_layer=1", "--seq_len=512", f"--gates={gates}", *more)
    assert float(done.stdout) == pytest.approx(1, abs=0.15), done.stderr


def test_dry_run_of_a_sharded_run(monkeypatch, capsys):
    """Two ranks of a small Llama: weights and AdamW's state are half of 4 and 8 bytes per parameter."""
    args = "--n_layer=2 --d_model=256 --n_head=4 --d_ffn=688 --parallel=fsdp --dtype=bfloat16".split()
    s = load(train.Settings, [*SHAPE, *args])
    config, need = s.shape_from_scratch(257), {}
    for n in (1, 2):
        s = load(train.Settings, [*SHAPE, *args, f"--world_size={n}"])
        need[n] = cost.memory(s, config, train.rehearse)
        assert need[n]["weights"] == pytest.approx(4 * config.n_params() / n, rel=0.01)
        assert need[n]["optimizer"] == pytest.approx(8 * config.n_params() / n, rel=0.01)
        assert need[n]["all"] == pytest.approx(sum(need[n][kind] for kind in cost.ROWS))
        assert 0.5 * need[n]["all"] < cost.least(config, s.batch_size // n, s.seq_len, n) < need[n]["all"]
    assert need[1]["gathered shards"] == 0 < need[2]["gathered shards"]
    split = cost.memory(replace(s, micro_batch=1), config, train.rehearse)["gradients"]
    sharded = cost.memory(replace(s, micro_batch=1, shard_gradients=True), config, train.rehearse)["gradients"]
    assert sharded == pytest.approx(2 * config.n_params(), rel=0.01) and split > 1.9 * sharded
    args += ["--gpu=h100", "--dollars_per_gpu_hour=1e9"]
    assert run(monkeypatch, *args, "--dry_run=True", "--world_size=2", "--out=out/never") == 0
    out = capsys.readouterr().out
    assert "gathered shards" in out and "training tokens per second" in out and not Path("out/never").exists()
    number = {row: float(re.search(rf"^{row} .*?([\d,.]+)( tokens$| at \$)", out, re.M)[1].replace(",", ""))
              for row in ("training", "evaluation", "price")}  # fmt: skip
    flops = (number["training"] + number["evaluation"] / 3) * cost.flops_per_token(config, s.seq_len)
    assert number["price"] == pytest.approx(1e9 * flops / (0.33 * 989e12) / 3600, rel=1e-3)
    assert run(monkeypatch, *args[:-2], "--dry_run=True", "--gpu=24GB", "--out=out/never") == 0
    assert "time              not known: 24GB is a size of memory" in capsys.readouterr().out
    monkeypatch.setenv("RANK", "1")  # torchrun starts several processes, and one speaks
    assert run(monkeypatch, *args, "--dry_run=True", "--out=out/never") == 0 and capsys.readouterr() == ("", "")


def test_dry_run_of_pruning():
    """In shards, with layers recomputed: AdamW has 8 bytes for each number of a shard, of all gates and multipliers."""
    s, source = shrunken("prune_7b", "--parallel=fsdp", "--world_size=2")
    need = cost.memory(s, source, train.rehearse)
    gates = 2 + 32 + 2 * 4 + 2 * 48
    assert need["optimizer"] == pytest.approx(8 * (source.n_params() / 2 + gates + 8), rel=0.01)
    assert need["all"] == pytest.approx(sum(need[kind] for kind in cost.ROWS))


def test_dry_run_of_a_cut_at_once_knows_the_source():
    """Before the first step the source is there, in float32. Beside it are the reference model, the small model, or
    what a choice needs that looks at the weights. In shards that is a whole copy, too; `taylor` with layers recomputed
    has the scaled weights and the activations of one layer."""
    args = "--init_from=x --target_n_layer=1 --target_d_model=32 --target_n_head=1 --target_d_ffn=128".split()
    source = LlamaConfig(257, 4, 512, 8, 8, 64, 1376, 64)
    small = 4 * LlamaConfig(257, 1, 32, 1, 1, 64, 128, 64).n_params()
    shards = ("--world_size=2", "--parallel=fsdp")
    for more, bytes_each, beside in (
        (["--gates=random"], 4, small),
        (["--gates=random", "--reference_model=SmolLM2-135M"], 4, 4 * cost.PUBLISHED["SmolLM2-135M"].n_params()),
        (["--reference_model=SmolLM2-135M"], 4, 4 * cost.PUBLISHED["SmolLM2-135M"].n_params()),
        (["--gates=random", "--world_size=2"], 4, small),
        (["--gates=random", *shards], 2, small / 2),
        (["--reference_model=SmolLM2-135M", *shards], 2, 2 * cost.PUBLISHED["SmolLM2-135M"].n_params()),
    ):
        s = load(train.Settings, ["--batch_size=2", "--seq_len=16", *args, *more])
        need = cost.memory(s, source, train.rehearse)["all"]
        assert need == pytest.approx(bytes_each * source.n_params() + beside), more
    one_layer = 4 * (source.n_params() - 2 * 257 * 512) / 4
    for more, bytes_each in (([], 4), (shards, 6)):
        args += ["--gates=taylor", "--activation_checkpointing=True", "--batch_size=2", "--seq_len=16"]
        need = cost.memory(load(train.Settings, [*args, *more]), source, train.rehearse)
        whole = bytes_each * source.n_params()
        assert need["weights"] == pytest.approx(whole, rel=0.001) and need["optimizer"] == 0
        assert whole < need["all"] < whole + 2 * one_layer


def test_dry_run_looks_at_the_data(tiny_data, monkeypatch, capsys, tmp_path):
    """Its vocabulary and its domains, where it is there; and it refuses a target that cannot be, as the run does."""
    args = [f"--data={tiny_data}", "--dry_run", "--steps=100", "--eval_interval=50", "--gpu=8GB"]
    run(monkeypatch, *args)
    assert "of 3 domains: " in capsys.readouterr().out
    run(monkeypatch, *args, "--seq_len=128", "--eval_sequences=5000")
    there = data.TokenData(tiny_data)  # an evaluation has no more sequences than there are
    tokens = sum(there.sequences(d, "val", 128) for d in there.domains) * 128
    assert f"3 times at most 5000 sequences of 3 domains: {3 * tokens:,} tokens" in capsys.readouterr().out
    run(monkeypatch, f"--data={tmp_path}", "--dry_run", "--gpu=8GB")
    out = capsys.readouterr().out
    assert f"of one domain ({tmp_path} is not there): " in out
    assert f"257, that of byte tokens: {tmp_path} is not there" in out
    Llama(LlamaConfig(257, 2, 32, 2, 2, 16, 64, 64)).save_pretrained(tmp_path / "m")
    assert run(monkeypatch, f"--init_from={tmp_path / 'm'}", "--target_n_layer=9", "--gates=random", "--dry_run") == 2
    assert "target n_layer = 9 is larger than the source's 2" in capsys.readouterr().err


def test_work_is_counted_before_and_after_the_cut(tmp_path):
    """A step is three forward passes, or four where layers are recomputed; an evaluation is one."""
    args = "--steps=10 --batch_size=2 --seq_len=16 --eval_interval=4 --eval_sequences=3 --init_from=x".split()
    args += ["--gates=random", "--fade=4", "--target_n_layer=1", "--ratio={'a': 1, 'b': 1}", f"--data={tmp_path}"]
    s, source = load(train.Settings, args), LlamaConfig(300, 3, 32, 4, 2, 8, 48, 64)
    forward = [cost.flops_per_token(c, 16, backward=False) for c in (source, replace(source, n_layer=1))]
    mean, tokens, evaluated = 0.4 * forward[0] + 0.6 * forward[1], 10 * 2 * 16, 4 * 3 * 2 * 16
    for recomputed, passes in ((False, 3), (True, 4)):
        work = cost.work_of(replace(s, activation_checkpointing=recomputed), source)
        assert (work.tokens, work.eval_tokens) == (tokens, evaluated)
        assert work.flops == pytest.approx(mean * (passes * tokens + evaluated))


def test_dry_run_says_what_a_model_that_is_not_known_is(monkeypatch, tmp_path):
    """A config may start from a model of its own name, and a run may be there and not finished."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.py").write_text("init_from = 'models/mine'\n")
    monkeypatch.setattr(cost, "__file__", str(tmp_path / "plumbing" / "cost.py"))
    with pytest.raises(ValueError, match="models/mine: no such model or run, and its shape is not known either"):
        cost.known_shape("models/mine")
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="this run is not finished"):
        cost.known_shape(str(tmp_path / "begun"))


def test_dry_run_knows_what_the_runs_before_it_will_make(pruning, monkeypatch, tmp_path):
    """Of the data of this run, whatever the config's are, and with the target that a run on its way has."""
    monkeypatch.chdir(tmp_path)  # where no demo was run
    small = cost.known_shape("out/toy_prune", vocab_size=3000)
    assert (small.vocab_size, small.n_layer, small.d_model) == (3000, 4, 96)
    assert run(monkeypatch, *pruning[0], f"--out={tmp_path / 'toy_prune'}", "--stop_at=1") == 0
    assert newest_checkpoint(tmp_path / "toy_prune")
    found = cost.known_shape(str(tmp_path / "toy_prune"))
    assert [f"--target_{name}={found.shape[name]}" for name in ("n_layer", "d_model", "n_head", "d_ffn")] == TARGET


def test_dry_run_of_ddp_knows_that_buckets_stay():
    """A process alone frees its gradients after the step, before activations are at their most; DDP's does not."""
    args = "--n_layer=2 --d_model=512 --n_head=4 --d_ffn=1376 --batch_size=8 --seq_len=64".split()
    s = load(train.Settings, [*SHAPE, *args])
    alone = cost.memory(s, s.shape_from_scratch(257), train.rehearse)["all"]
    s = load(train.Settings, [*SHAPE, *args, "--batch_size=16", "--world_size=2"])
    assert cost.memory(s, s.shape_from_scratch(257), train.rehearse)["all"] > 1.1 * alone


def test_dry_run_refuses_what_does_not_fit_and_says_what_would(monkeypatch, capsys):
    args = "--n_layer=2 --d_model=512 --n_head=4 --d_ffn=1376 --batch_size=64 --seq_len=512 --dry_run=True".split()
    assert run(monkeypatch, *args, "--gpu=5GB") == 2
    out, err = capsys.readouterr()
    assert "trying --activation_checkpointing=True" in out and err.count("\n") == 1
    assert "it does not fit" in err and "most of it for activations; what fits: --activation_checkpointing=True" in err


def test_remedies_come_nearest_first_and_add_up():
    """More GPUs come last: as many as divide the batch, from where the optimizer's 16 bytes per parameter fit."""

    def tried(*args, **sizes):
        s = load(train.Settings, [*SHAPE, "--batch_size=64", *args])
        return [set(cost.changes(s, other).split()) for other in cost.remedies(s, **sizes)]

    args, checkpointing = ["--parallel=fsdp", "--world_size=4", "--micro_batch=8"], "--activation_checkpointing=True"
    less = [{checkpointing}, {checkpointing, "--micro_batch=1"}]
    less += [less[1] | {"--shard_gradients=True"}]
    more = [less[2] | {f"--world_size={n}"} for n in (16, 32, 64)]
    shards = "--shard_gradients=True"
    assert tried(*args, n_params=10**9, space=1.1e9) == less + more
    # one process holds all of the model, two a half
    assert tried("--micro_batch=1", checkpointing, n_params=10**9, space=9e9) == [
        {"--parallel=fsdp", f"--world_size={n}"} | also for n in (2, 4, 8, 16, 32, 64) for also in (set(), {shards})
    ]
    ddp = tried("--world_size=2", "--micro_batch=1", checkpointing, n_params=10**9, space=9e9)
    assert ddp[:2] == [{"--parallel=fsdp"}, {"--parallel=fsdp", shards}] and len(ddp) == 12


def test_the_peak_is_that_of_the_gpu():
    """Dense bfloat16, by NVIDIA's data sheets; an RTX A1000 is no A100."""
    peaks = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA RTX A1000 Laptop GPU": None,
    }
    assert {name: cost.peak_of(name, "bfloat16") for name in peaks} == peaks


def test_a_gpu_has_two_peaks_and_a_memory():
    """A100, H100 and H200 by NVIDIA's data sheets: float32 without tensor cores. GB and GiB are two things."""
    peaks = {"a100": 19.5e12, "h100": 67e12, "h200": 67e12}
    assert {name: cost.peak_of(name, "float32") for name in peaks} == peaks
    assert (cost.memory_of("24GB"), cost.memory_of("24GiB")) == (24e9, 24 * 2**30)
    assert (cost.memory_of("a100-40gb"), cost.memory_of("H200")) == (39 * 2**30, 140 * 2**30)


def test_published_shapes_have_the_published_numbers_of_parameters():
    """As their model cards and checkpoints have them."""
    numbers = {
        "Llama-2-7b-hf": 6_738_415_616,
        "Meta-Llama-3-8B": 8_030_261_248,
        "SmolLM2-135M": 134_515_008,
        "Qwen3-0.6B": 596_049_920,
    }
    assert {name: config.n_params() for name, config in cost.PUBLISHED.items()} == numbers
    for config in (*cost.PUBLISHED.values(), replace(SMALL, qkv_bias=True)):
        assert sum(cost.parts(config).values()) == config.n_params()


def test_a_config_that_goes_on_starts_from_the_small_model():
    s = load(train.Settings, [str(ROOT / "config" / "continue_1.3b.py")])
    assert cost.shape_of(s).n_params() == pytest.approx(1.345e9, rel=1e-3)


def test_the_rows_of_a_dry_run_fit_together(monkeypatch, capsys):
    """Two GPUs: hours, GPU-hours, tokens per second, price, FLOPs and logits of one run, computed from its settings."""
    args = "--n_layer=2 --d_model=256 --n_head=4 --d_ffn=688 --world_size=2 --gpu=a100 --data=data/none".split()
    args += "--activation_checkpointing=True --dollars_per_gpu_hour=1e6 --dry_run=True".split()
    args += "--steps=100_000_000 --eval_interval=100_000_000".split()
    assert run(monkeypatch, *args) == 0
    text, s = capsys.readouterr().out, load(train.Settings, [*SHAPE, *args])
    config, tokens = s.shape_from_scratch(257), 10**8 * 4 * 64
    forward = cost.flops_per_token(config, 64, backward=False)
    seconds = forward * (4 * tokens + 2 * 4 * 64) / (19.5e12 * 0.33) / 2
    said = re.search(r"time +([\d.]+) h, ([\d.]+) GPU-hours", text)
    assert float(said[1]) == pytest.approx(seconds / 3600, abs=0.006)
    assert float(said[2]) == pytest.approx(2 * seconds / 3600, abs=0.06)
    price = re.search(r"price +\$([\d,.]+) at", text)[1].replace(",", "")
    assert float(price) == pytest.approx(2 * seconds / 3600 * 1e6, rel=1e-3)
    speed = re.search(r"speed +([\d,]+) training tokens", text)[1].replace(",", "")
    assert float(speed) == pytest.approx(tokens / seconds, rel=1e-3)
    assert f"{3 * forward:.3g} + {forward:.3g} recomputed" in text
    logits = cost.readable(4 * 2 * 64 * 257)  # float32, of the two sequences that a process has at once
    assert re.search(rf"float32 logits +{re.escape(logits)} at once", text)


def test_what_surely_does_not_fit_is_refused_by_all_shards_together(monkeypatch):
    """A model in eight shards needs an eighth."""
    s, cpu = load(train.Settings, [*SHAPE, "--parallel=fsdp", "--batch_size=8"]), torch.device("cpu")
    page, there = os.sysconf("SC_PAGE_SIZE"), 16 * 10**6
    monkeypatch.setattr(
        cost.os, "sysconf", lambda name: {"SC_PAGE_SIZE": page, "SC_PHYS_PAGES": there // 2 // page}[name]
    )
    large = LlamaConfig(257, 2, 512, 8, 8, 64, 688, 64)
    assert there < 16 * large.n_params() < 8 * there
    with pytest.raises(ValueError, match="needs more than"):
        cost.check_memory(s, large, cpu)
    monkeypatch.setattr(parallel, "size", lambda: 8)
    cost.check_memory(s, large, cpu)
    with pytest.raises(ValueError, match="needs more than"):
        cost.check_memory(replace(s, parallel="ddp"), large, cpu)


def test_flops_are_those_that_pytorch_counts(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)  # the counter knows F.linear, not oneDNN's products
    config = LlamaConfig(300, 3, 32, 4, 2, 8, 48, 64)
    model, tokens = Llama(config), torch.zeros(2, 64, dtype=torch.int64)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(tokens)
    attention = 3 * 2 * 64 * 4 * 8  # left out by the counter: its CPU kernel is not known to it
    assert cost.flops_per_token(config, 64, backward=False) == counter.get_total_flops() / 128 + attention
