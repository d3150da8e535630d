"""What cannot be meant is refused: exit status 2, one line on stderr that names it, and no file changed.

A row of the table is a command, what is damaged before it, and words of the line that it must end in. The commands run
in one process, in a directory with the runs of the demo in small, which are made without network.
"""

import errno
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import torch._dynamo
from conftest import GATES, ROOT, SHAPE, TARGET, write_corpus
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import eval
import plot
import prepare_data
import train
from plumbing import command_line, output
from plumbing.settings import Settings

MAINS = {"train": train.main, "eval": eval.main, "plot": plot.main, "prepare_data": prepare_data.main}
TRAIN = [*SHAPE, "--data=data", "--seq_len=32", "--eval_sequences=2", "--eval_interval=2", "--save_interval=4"]
PRUNE = [*TARGET, *GATES, "--init_from=out/source", "--steps=16", "--sparsity_warmup=4", "--gate_samples=2"]
PRUNE += "--schedule=dro --reference_model=out/source --dynamic_reference --dynamic_ratio --eval_interval=1".split()
COMMANDS = {  # the words that a row of the table may begin with -> the arguments that they stand for
    "train": [*TRAIN, "--steps=8", "--out=out/new"],
    "prune": [*TRAIN, *PRUNE, "--out=out/new"],
    "resume": [*TRAIN, *PRUNE, "--out=out/half"],  # as it was begun
    "continue": [*TRAIN, "--steps=8", "--init_from=out/small", "--out=out/new"],
    "dry_run": [*TRAIN, "--steps=8", "--dry_run"],
    "eval": ["--data=data", "--sequences=2"],
    "ask": ["out/source", "--data=data", "--questions"],
    "sample": ["out/source", "--data=data", "--sample=one", "--tokens=2"],
    "plot": [],
    "prepare_data": ["--workers=1", "--out=new"],
}


def run(command: str, args: list[str], patch: pytest.MonkeyPatch) -> int:
    """Run a command of COMMANDS, with more arguments, in this process. Its exit status."""
    name = command if command in MAINS else {"ask": "eval", "sample": "eval"}.get(command, "train")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    patch.setattr(sys, "argv", [f"{name}.py", *COMMANDS[command], *args])
    try:
        MAINS[name]()
        return 0
    except SystemExit as end:
        return end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A directory in which the steps of the demo were run, its files, and the addresses that they tried to reach."""
    home, patch, reached = tmp_path_factory.mktemp("demo"), pytest.MonkeyPatch(), []

    def forbidden(*args, **kwargs):
        reached.append(args)
        raise OSError("no network here")

    for owner, name in [(socket.socket, "connect"), (socket.socket, "connect_ex"), (socket.socket, "sendto"),
                        (socket, "create_connection"), (socket, "getaddrinfo"), (socket, "gethostbyname")]:  # fmt: skip
        patch.setattr(owner, name, forbidden)
    patch.chdir(home)
    write_corpus(home / "text", n_bytes=30_000, n_documents=60)
    steps = [
        ("prepare_data", ["text", "--out=data", "--window=128", "--held_out=0.2"]),
        ("train", ["--out=out/source"]),
        ("prune", ["--out=out/half", "--stop_at=4"]),
        ("prune", ["--out=out/small", "--resume=out/half"]),
        ("continue", ["--out=out/on"]),
        ("eval", ["out/small", "out/on", "--json=eval.json"]),
        ("eval", ["out/source", "--continuation", "--split=train", "--write_questions=asked", "--sequences=4"]),
        ("plot", ["out/small", "out/on"]),
    ]
    status = {f"{command} {' '.join(args)}": run(command, args, patch) for command, args in steps}
    assert set(status.values()) == {0}, status
    so_far = list(reached)
    with pytest.raises(OSError):  # so that the guard is known to work
        urllib.request.urlopen("http://127.0.0.1:9")
    assert len(reached) > len(so_far)
    whole = files()
    patch.undo()
    return home, whole, so_far


def test_the_steps_of_the_demo_need_no_network(demo):
    home, _, reached = demo
    assert reached == []
    made = ["data/meta.json", "out/small/model/pruning.json", "out/on/model/model.safetensors", "eval.json"]
    made += ["asked/sums.jsonl", "out/small/gates.png", "out/small/comparison.png"]
    assert [name for name in made if not (home / name).is_file()] == []


# -- what is damaged ------------------------------------------------------------------------------------------------


def write(name: str, content: str | bytes):
    """A file with this content."""

    def damage():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def put(name: str, keys: str, value):
    """A JSON file in which the value at "a.b.c" is another one."""

    def damage():
        content = at = json.loads(Path(name).read_text())
        *path, last = keys.split(".")
        for key in path:
            at = at[key]
        at[last] = value
        Path(name).write_text(json.dumps(content))

    return damage


def flip(name: str):
    """A file of which 64 bytes in the middle are others."""

    def damage():
        content = bytearray(Path(name).read_bytes())
        for i in range(len(content) // 2, len(content) // 2 + 64):
            content[i] ^= 0xFF
        Path(name).write_bytes(content)

    return damage


def without(name: str, key: str):
    """A JSON file that lacks a key."""

    def damage():
        content = json.loads(Path(name).read_text())
        del content[key]
        Path(name).write_text(json.dumps(content))

    return damage


def cut(name: str, size: int):
    """A file of which only the beginning is there."""
    return lambda: Path(name).write_bytes(Path(name).read_bytes()[:size])


def remove(name: str):
    """A file that is not there any more."""
    return lambda: Path(name).unlink()


def folder(name: str):
    """A directory where a file is expected."""

    def damage():
        Path(name).unlink(missing_ok=True)
        Path(name).mkdir(parents=True)

    return damage


def begun_from(path: str):
    """A run that was begun from another one, and died before its first checkpoint."""
    settings = asdict(command_line.load(Settings, ["--resume", path, *COMMANDS["train"]]))
    return write("out/new/config.json", json.dumps(settings))


DEEP = "[" * 100_000
HUGE = "1" + "0" * 400
STATE = "out/half/checkpoints/step_000004/state.json"
MODEL, RECORD = "out/source/model/config.json", "out/source/model/trained_with.json"
CHECKPOINT = "out/half/checkpoints/step_000004"
PICKLE = b"cbuiltins\nopen\n(Vexecuted\nVw\ntR."  # it opens a file for writing, if it is unpickled
WEIGHTS, SMALL = "out/source/model/model.safetensors", "out/small/model/config.json"
RUN = '{"type": "run", "stage": "pretrain", "steps": 8, "tokens_per_step": 128, "domains": ["a"]}\n'
QUESTION = {"question": "a", "choice1": "b", "choice2": "c", "label": 0}
Q = json.dumps(QUESTION)

TABLE = [
    # settings that are no values
    ("a misspelt key", "train --stesp=3", None, "unknown setting 'stesp', did you mean 'steps'?"),
    ("a key of no setting", "train --zzz 3", None, "unknown setting 'zzz'"),
    ("a setting after --", "train -- --steps=x", None, "steps: 'x' is a string"),
    ("a key without a value", "train --lr", None, "argument --lr: expected one argument"),
    ("a short option", "train -x", None, "unknown setting 'x'"),
    ("text for a number", "train --steps=many", None, "steps: 'many' is a string, a whole number is needed"),
    ("a switch in other words", "train --compile yes", None, "compile: 'yes' is a string, True or False is needed"),
    ("a word for a list", "train --domains sums", None, "domains: 'sums' is a string, a list is needed"),
    ("a setting without dashes", "train steps=9", None, "steps=9: a setting is given as --steps=9"),
    ("a fraction for a whole number", "train --steps=1.5", None, "1.5 is a number, a whole number is needed"),
    ("a number for a switch", "train --compile=1", None, "1 is a whole number, True or False is needed"),
    ("a list for a number", "train --lr=[1]", None, "is a list, a number is needed"),
    ("no number", "train --lr=None", None, "only literals"),
    ("a complex number", "train --lr=1j", None, "only literals"),
    ("bytes", "train --lr=b'x'", None, "only literals"),
    ("a call", "train --steps=exit()", None, "only literals and arithmetic on them are allowed, not `exit()`"),
    ("an attribute", "train --steps=().__class__", None, "only literals"),
    ("a choice that is none", "train --schedule=droo", None, "'droo' is not one of"),
    ("a bound below 1", "train --bound=0.5", None, "bound = 0.5 must be 1 to"),
    ("a power that never ends", "train --steps=9**9**9", None, "a whole number must be below 2**63"),
    ("a power of floats", "train --lr=9.0**9.0**9.0", None, "it cannot be computed"),
    ("a sum of 3,000 terms", "train --steps=" + "+".join("1" * 3000), None, "a whole number is needed"),
    ("a text as long as no memory", "train --steps='a'*10**11", None, "arithmetic is for numbers only"),
    ("a list as long as no memory", "train --steps=[0]*10**11", None, "arithmetic is for numbers only"),
    ("20,000 signs", "train --steps=" + "-" * 20_000 + "1", None, "a whole number is needed"),
    ("10,000 lists", "train --ratio=" + "[" * 10_000 + "]" * 10_000, None, "a dict is needed"),
    ("10,000 brackets that stay open", "train --steps=" + "(" * 10_000, None, "a whole number is needed"),
    ("10,000 attributes", "train --steps=a" + ".b" * 10_000, None, "a whole number is needed"),
    ("5,000 digits", "train --steps=" + "9" * 5000, None, "a whole number is needed"),
    ("400 digits", f"train --steps={HUGE}", None, "a whole number must be below 2**63"),
    ("a value of 200,000 characters", "train --steps=" + "1" * 200_000, None, "a whole number is needed"),
    ("division by zero", "train --steps=1//0", None, "it cannot be computed"),
    ("the root of a negative number", "train --lr=(-1)**0.5", None, "the root of a number below 0"),
    ("arithmetic on texts", "train --steps='a'+1", None, "arithmetic is for numbers only"),
    ("a key twice", "train --ratio={'a':1,'a':2}", None, "each of them once"),
    ("a key that is no text", "train --ratio={1:2}", None, "must be texts"),
    ("control characters", "train --schedule=\x1b[31m", None, "is not one of"),
    ("bytes that are no UTF-8", "train --schedule=\udc80", None, "'\\udc80' is not one of"),
    ("a path that is no UTF-8", "train --out=\udc80", None, "out: '\\udc80' is no UTF-8 text"),
    ("a seed that no file may have", "train --seed=2**62+1", None, "seed = 4611686018427387905 must be 0 to"),
    ("a model that no file may have", "train --d_ffn=2**20+1", None, "d_ffn = 1048577 must be 1 to 1048576"),
    ("too many layers", "train --n_layer=4097", None, "n_layer = 4097 must be 1 to 4096"),
    # settings that are out of range
    ("no steps", "train --steps=0", None, "steps = 0 must be at least 1"),
    ("two at once", "train --steps=0 --floor=2.0", None, "steps = 0 must be at least 1; floor = 2.0 must be"),
    ("a negative seed", "train --seed=-1", None, "seed = -1 must be 0 to"),
    ("an infinite rate", "train --lr=1e999", None, "lr = inf must be finite"),
    ("a rate that is no number", "train --lr=1e999-1e999", None, "lr = nan must be finite"),
    ("an infinite log_alpha", "train --log_alpha=1e999", None, "log_alpha = inf must be finite"),
    ("a log_alpha beyond float32", "train --log_alpha=1e300", None, "log_alpha = 1e+300 must be -100 to 100"),
    ("a temperature that is no number", "train --temperature=1e999*0", None, "temperature = nan must be finite"),
    ("a million threads", "train --threads=10**6", None, "threads = 1000000 must be 0 to 1024"),
    ("negative threads", "train --threads=-1", None, "threads = -1 must be 0 to 1024"),
    ("a processor that is not there", "train --device=cpu:99", None, "device = 'cpu:99' is not one of"),
    ("a GPU that is not there", "train --device=cuda:99", None, "device = 'cuda:99' is not there"),
    ("a device without memory", "train --device=meta", None, "device = 'meta' is not one of"),
    ("a device of others", "train --device=xpu", None, "device = 'xpu' is not one of"),
    ("no device", "train --device=", None, "device = '' is not one of"),
    ("no directory", "train --out=", None, "out is empty"),
    ("a dry run of long sequences", "dry_run --init_from=out/source --seq_len=64", None, "was made for 32 tokens"),
    ("a dry run of other domains", "dry_run --ratio={'a':1}", None, "ratio must name the domains animals, brackets, s"),
    ("a dry run of longer text", "dry_run --seq_len=2**40", None, "too few for one sequence"),
    ("a dry run of a model of others", "dry_run --init_from=out/source", put(RECORD, "fingerprint", "x"), "its tok"),
    ("a model of others", "train --out=mine", write("mine/model/config.json", "{}"), "model is of no run"),
    ("a folder of others", "train --out=mine --resume=never", write("mine/model/a.bin", "a"), "model is of no run"),
    ("a file named model", "train --out=mine", write("mine/model", "a"), "model is of no run"),
    ("a log of others", "train --out=mine", write("mine/metrics.jsonl", "a"), "metrics.jsonl is of no run"),
    ("shares with an infinite sum", "train --ratio={'a':1e308,'b':1e308}", None, "from 1e-15 to 1e15"),
    ("an infinite share", "train --ratio={'animals':1e999,'brackets':1,'sums':1}", None, "a number above 0"),
    ("a share of 0", "train --ratio={'animals':0,'brackets':1,'sums':1}", None, "a number above 0"),
    ("a share that is true", "train --ratio={'animals':True,'brackets':1,'sums':1}", None, "a number above 0"),
    ("shares of other domains", "train --ratio={'a':1}", None, "ratio must name the domains animals, brackets, sums"),
    ("a share is lacking", "train --ratio={'sums':1,'animals':2}", None, "but it lacks brackets; --ratio={} takes"),
    ("a share too many", "train --ratio={'sums':1,'animals':2,'brackets':1,'a':1}", None, "but it names a; --ratio={}"),
    ("a domain that is not there", "train --domains=['animal']", None, "did you mean animals?"),
    ("a domain twice", "train --domains=['sums','sums']", None, "none of them twice"),
    ("domains in a list", "train --domains=[['sums']]", None, "no domain"),
    ("references of both kinds", "train --reference_losses={'a':1} --reference_model=x", None, "are both set"),
    ("a huge loss", "train --schedule=dro --reference_losses={'animals':1e99,'brackets':1,'sums':1}", None, "to 1e15"),
    ("a tiny share", "train --ratio={'animals':1e-60,'brackets':1,'sums':1}", None, "ratio = "),
    ("a rule without references", "train --schedule=sheared", None, "needs references"),
    ("a batch that does not divide", "prune --gate_samples=3", None, "must be a multiple of gate_samples"),
    ("no gate sample", "train --gate_samples=0", None, "gate_samples = 0 must be"),
    ("an epsilon of 0", "train --eps=0", None, "eps = 0"),
    ("micro-batches that do not divide", "train --micro_batch=3", None, "micro_batch = 3 must divide 4"),
    ("sequences longer than the text", "train --seq_len=2**40", None, "too few for one sequence"),
    # sizes that no machine has
    ("2**20 wide", "train --d_model=2**20 --head_dim=64", None, "needs more than"),
    ("10**9 layers", "train --n_layer=10**9", None, "n_layer = 1000000000 must be 1 to 4096"),
    ("2**31 dimensions", "train --d_model=2**31", None, "d_model = 2147483648 must be 1 to 1048576"),
    ("2**20 heads", "train --n_head=2**20 --d_model=2**20 --head_dim=64", None, "needs more than"),
    ("2**20 feed-forward dimensions", "train --d_ffn=2**20 --d_model=2**18 --head_dim=64", None, "needs more than"),
    ("heads of 2**50", "train --head_dim=2**50", None, "head_dim = 1125899906842624 must be 0 to 65536"),
    ("a batch of 10**9", "train --batch_size=10**9", None, "needs more than"),
    ("a batch of 10**12, one by one", "train --batch_size=10**12 --micro_batch=1", None, "needs more than"),
    ("a dry run of it", "dry_run --d_model=2**20", None, "it does not fit: 1,024 GPUs would need more than"),
    ("a dry run of 2**20", "dry_run --d_ffn=2**20 --d_model=2**20 --n_layer=4096", None, "it does not fit"),
    ("a dry run of a batch of 2**60", "dry_run --batch_size=2**60", None, "it does not fit"),
    ("a dry run of no GPU", "dry_run --gpu=h1000", None, "gpu = 'h1000' is not one of"),
    ("a dry run of a GPU too small for CUDA", "dry_run --gpu=0.5GB", None, "must have more than the 4.00 GiB"),
    ("a dry run of a GPU beyond all", "dry_run --gpu=" + "9" * 400 + "GB", None, "is not one of"),
    ("a dry run of 10**9 GPUs", "dry_run --world_size=10**9", None, "world_size = 1000000000 must be 1 to 100000"),
    # config files
    ("no such file", "train none.py", None, "none.py: no such config file"),
    ("a directory", "train out", None, "out: no such config file"),
    ("a name longer than a file's", "train " + "x" * 300 + ".py", None, "File name too long"),
    ("an empty argument", "train EMPTY", None, "no such config file"),
    ("a statement", "train c.py", write("c.py", "import os"), "c.py:1: only `name = value` is allowed"),
    ("two problems", "train c.py", write("c.py", "stesp = 1\nlr = f()"), "'steps'?; c.py:2: lr: only literals"),
    ("a file that is no text", "train c.py", write("c.py", b"\xff\xfe\x00"), "c.py: not a config file"),
    ("a file with a zero byte", "train c.py", write("c.py", "lr = 1\0"), "c.py: not a config file"),
    ("a file nested too deep", "train c.py", write("c.py", "lr = " + "-" * 20_000 + "1"), "nested too deep"),
    ("a file of 10 MB", "train c.py", write("c.py", "lr = 1\n" * 10**6), "longer than 100,000 characters"),
    ("a power in a file", "train c.py", write("c.py", "steps = 9**9**9"), "c.py:1: steps: a whole number"),
    ("a base that leads back", "train c.py", write("c.py", 'base = "c.py"'), "leads back to this file"),
    ("a base that is not there", "train c.py", write("c.py", 'base = "d.py"'), "d.py: no such config file"),
    ("two bases", "train c.py", write("c.py", 'base = "c.py"\nbase = "c.py"'), "unknown setting 'base'"),
    # models, runs and where a run goes on
    ("no such model", "train --init_from=out/none", None, "out/none: no such model or run"),
    ("a target of no source", "train --target_n_layer=1", None, "set init_from"),
    ("a target that no gates learn", "prune --target_d_ffn=1", None, "closes 47 of 48 ffn gates"),
    ("a dry run of it", "prune --target_d_ffn=1 --dry_run", None, "'learned' can close 0.2 to 95.3 % of them"),
    ("a target that is larger", "prune --target_d_ffn=2**40", None, "is larger than the source's 48"),
    ("a target as large", "train --init_from=out/source --target_n_layer=3 --sparsity_warmup=4", None, "nothing to"),
    ("heads that do not divide", "prune --target_d_model=25", None, "must be a multiple of the 2 heads kept"),
    ("a ramp as long as the run", "prune --sparsity_warmup=16", None, "must be below steps = 16"),
    ("no such reference", "prune --reference_model=out/none", None, "out/none: no such model or run"),
    ("a run that is half done", "train --init_from=out/half", None, "this run is not finished"),
    ("gates of no file", "prune --gates=none.json", None, "gates = 'none.json': neither one of learned, random"),
    ("a choice that was damaged", "prune --gates=out/small/model/pruning.json",
     put("out/small/model/pruning.json", "layer.kept", [1]), "pruning.json: damaged: its checksum"),
    ("gates of a folder", "prune --gates=out", None, "gates = 'out': neither one of learned, random"),
    ("a dry run of them", "prune --gates=activatoin --dry_run", None, "neither one of learned, random"),
    ("a run of other settings", "resume --lr=1.0", None, "was started with other settings"),
    ("the same, with the way on", "resume --lr=1.0", None, "another --out, with --resume out/half to go on from here"),
    ("a run that is there", "resume --resume=never", None, "holds a run already"),
    ("begun from another run", "train", begun_from("out/half"), "was begun with --resume out/half"),
    ("a run that is not there", "train --resume=yes", None, "resume = 'yes': no checkpoint there"),
    ("fewer steps than are done", "prune --resume=out/small --steps=12", None, "has 16 already"),
    ("the directory of a model", "train --out=out/source/model", None, "is not the config.json of a run"),
    ("a log that is cut", "resume", cut("out/half/metrics.jsonl", 100), "is not there any more"),
    ("a checkpoint's state that is cut", "resume", cut(STATE, 100), STATE),
    ("a state of another version", "resume", without(STATE, "reader"), STATE),
    ("data made again", "resume", put("data/meta.json", "seed", 7), "is not what out/half was started with"),
    ("a model's config that is cut", "continue", cut(SMALL, 50), "config.json"),
    ("a model without a config", "continue", remove(SMALL), "not finished"),
    ("a config without heads", "continue", without(SMALL, "num_attention_heads"), "config.json"),
    ("an option cut short", "eval out/source --sequ=1", None, "--sequ=1, did you mean --seq"),
    ("another architecture", "eval out/source", put(MODEL, "model_type", "gpt2"), "model_type = 'gpt2'"),
    ("another shape", "eval out/source", put(MODEL, "hidden_size", 64), "tensors do not fit"),
    ("no weights", "eval out/source", remove(WEIGHTS), "model.safetensors: no such file"),
    ("weights that are cut", "eval out/source", cut(WEIGHTS, 5000), "model.safetensors"),
    ("weights that are none", "eval out/source", write(WEIGHTS, b"\x80" * 100), "model.safetensors"),
    ("another tokenizer", "eval out/source", put(RECORD, "fingerprint", "x"), "its tokenizer is not the one"),
    ("a record of numbers", "eval out/source", put(RECORD, "tokenizer", 3), "trained_with.json"),
    ("a record that is cut", "continue", cut("out/small/model/trained_with.json", 30), "trained_with.json"),
    # data sets
    ("no data set", "train --data=none", None, "none: no data set there"),
    ("a folder of text for a data set", "train --data=text", None, "prepare_data.py text --out data/NAME`, if it is a"),
    ("a file as data set", "train --data=eval.json", None, "eval.json"),
    ("a data set without meta", "train", remove("data/meta.json"), "no data set there"),
    ("a data set whose meta is cut", "train", cut("data/meta.json", 100), "meta.json"),
    ("a data set of a later format", "train", put("data/meta.json", "format", 99), "meta.json"),
    ("a data set without tokenizer", "train", without("data/meta.json", "tokenizer"), "meta.json"),
    ("a data set of another dtype", "train", put("data/meta.json", "dtype", "int8"), "meta.json"),
    ("counts that are wrong", "train", put("data/meta.json", "domains.sums.val.tokens", 5), "it is damaged"),
    ("tokens that are cut", "train", cut("data/sums/train.bin", 99), "sums/train.bin"),
    ("tokens that are missing", "train", remove("data/sums/train.bin"), "sums/train.bin"),
    ("tokens beyond the vocabulary", "train", write("data/sums/val.bin", b"\xff" * 4608), "sums/val.bin"),
    # eval.py
    ("no model", "eval out/none", None, "out/none: no such model, run or checkpoint"),
    ("a file as model", "eval eval.json", None, "eval.json"),
    ("an unknown option", "eval out/source --sequnces=3", None, "did you mean --sequences?"),
    ("a split that is none", "eval out/source --split=dev", None, "invalid choice: 'dev'"),
    ("sequences below 0", "eval out/source --sequences=-1", None, "argument --sequences: -1 must be at least 0"),
    ("sequences that are no number", "eval out/source --sequences=nan", None, "--sequences: 'nan' is a string"),
    ("tokens of losses", "eval out/source --tokens=9", None, "--tokens has no effect on losses"),
    ("lengths of questions", "eval out/source --continuation --seq_len=9", None, "seq_len has no effect on questions"),
    ("a split of files", "ask asked/sums.jsonl --split=val", None, "--split has no effect on questions of files"),
    ("a seed of files", "ask asked/sums.jsonl --seed=3", None, "--seed has no effect on questions of files"),
    ("sequences of a sample", "sample --sequences=9", None, "--sequences has no effect on a sample"),
    ("a batch of none", "eval out/source --batch_size=0", None, "argument --batch_size: 0 must be at least 1"),
    ("a batch of 10**400", "eval out/source --batch_size=10**400", None, "--batch_size: a whole number must be"),
    ("sequences too long for the model", "eval out/source --seq_len=999", None, "the models take 1 to 32 tokens"),
    ("sequences of negative length", "eval out/source --seq_len=-1", None, "argument --seq_len: -1 must be at least 0"),
    ("a device that is not there for eval", "eval out/source --device=cpu:99", None, "device = 'cpu:99' is not one of"),
    ("a dtype that is none", "eval out/source --dtype=int8", None, "invalid choice: 'int8'"),
    ("a temperature of nan", "sample --temperature=nan", None, "--temperature: 'nan' is a string, a number is needed"),
    ("an infinite temperature", "sample --temperature=1e999", None, "argument --temperature: inf must be finite"),
    ("a negative temperature", "sample --temperature=-1", None, "argument --temperature: -1.0 must be at least 0"),
    ("a temperature that divides to nan", "sample --temperature=1e-320", None, "must be 0 or at least 0.001"),
    ("no tokens", "sample --tokens=0", None, "argument --tokens: 0 must be 1 to 1000000"),
    ("10**18 tokens", "sample --tokens=10**18", None, "argument --tokens: 1000000000000000000 must be 1 to"),
    ("a sample that is no UTF-8", "sample --sample=\udc80", None, "--sample '\\udc80' is no UTF-8 text"),
    ("a negative seed for eval", "sample --seed=-1", None, "argument --seed: -1 must be at least 0"),
    ("a seed beyond 64 bits", "sample --seed=2**64", None, "argument --seed: a whole number must be below 2**63"),
    ("all questions", "eval out/source --continuation --sequences=0", None, "questions need a number"),
    ("results in place of data", "eval out/source --json=data/meta.json", None, "holds no results of eval.py"),
    ("results in place of weights", "eval out/source --json=" + WEIGHTS, None, "holds no results of eval.py"),
    ("results in place of questions", "ask asked/sums.jsonl --json=asked/sums.jsonl", None, "holds no results"),
    ("results of no name", "eval out/source --json=", None, "--json: this path is empty"),
    ("questions of no name", "eval out/source --write_questions=", None, "--write_questions: this path is empty"),
    ("pictures of no name", "plot out/small --out=", None, "--out: this path is empty"),
    ("results in a directory", "eval out/source --json=out", None, "out: this is a directory"),
    ("results that are no file", "eval out/source --json=/dev/null", None, "/dev/null: this is no ordinary file"),
    ("results of a long name", "eval out/source --json=" + "x" * 250, None, "has at most 247 bytes"),
    ("results below a file", "eval out/source --json=eval.json/x.json", None, "eval.json is not a directory"),
    ("questions in place of text", "ask asked/sums.jsonl --write_questions=.", write("sums.jsonl", "a"), "a question"),
    ("questions in their own place", "ask asked/sums.jsonl --write_questions=asked", None, "--questions reads asked"),
    ("equal choices", "ask q.jsonl", write("q.jsonl", Q.replace('"c"', '"b"')), "q.jsonl:1: the two choices are"),
    ("questions below a file", "ask asked/sums.jsonl --write_questions=eval.json", None, "is not a directory"),
    ("questions of no file", "ask none.jsonl", None, "none.jsonl: No such file"),
    ("questions of a directory", "ask asked", None, "asked: Is a directory"),
    ("questions of one name", "ask asked/sums.jsonl asked/sums.jsonl", None, "two files of one name"),
    ("no questions", "ask q.jsonl", write("q.jsonl", ""), "labels must be"),
    ("questions nested too deep", "ask q.jsonl", write("q.jsonl", DEEP), "q.jsonl:1: not a question"),
    ("a label of 400 digits", "ask q.jsonl", write("q.jsonl", Q[:-2] + HUGE + "}"), "q.jsonl:1"),
    ("a label that is true", "ask q.jsonl", write("q.jsonl", json.dumps(QUESTION | {"label": True})), "$.label"),
    ("an empty choice", "ask q.jsonl", write("q.jsonl", json.dumps(QUESTION | {"choice2": ""})), "$.choice2"),
    ("a question of null", "ask q.jsonl", write("q.jsonl", json.dumps(QUESTION | {"question": None})), "$.question"),
    ("half a surrogate pair", "ask q.jsonl", write("q.jsonl", Q.replace('"b"', '"\\ud800"')), "q.jsonl:1"),
    ("labels of two kinds", "ask q.jsonl", write("q.jsonl", f"{Q}\n{Q[:-2]}2}}"), "labels must be 0 and 1, or 1 and 2"),
    # plot.py
    ("no run", "plot", None, "required: RUN"),
    ("no such run", "plot out/sorce", None, "out/sorce: no such run"),
    ("a file as run", "plot eval.json", None, "eval.json: no such run"),
    ("a directory without metrics", "plot data", None, "metrics.jsonl: no such file"),
    ("metrics that are a directory", "plot x", folder("x/metrics.jsonl"), "metrics.jsonl: no such file"),
    ("empty metrics", "plot x", write("x/metrics.jsonl", ""), "there is no `run` line"),
    ("metrics of another program", "plot x", write("x/metrics.jsonl", '{"loss": 1}'), "there is no `run` line"),
    ("metrics nested too deep", "plot x", write("x/metrics.jsonl", DEEP), "metrics.jsonl:1: not a line of metrics"),
    ("metrics without an evaluation", "plot x", write("x/metrics.jsonl", RUN), "no evaluation yet"),
    ("metrics of no steps", "plot x", write("x/metrics.jsonl", RUN.replace("8", HUGE)), "metrics.jsonl:1"),
    ("metrics without domains", "plot x", write("x/metrics.jsonl", RUN.replace('"a"', "")), "$.domains"),
    ("pictures below a file", "plot out/source --out=eval.json", None, "eval.json is not a directory"),
    ("a picture that is a directory", "plot out/source", folder("out/source/loss.png"), "loss.png: this is a"),
    ("an unknown option of plot", "plot out/source --size=3", None, "unrecognized arguments: --size=3"),
    # prepare_data.py
    ("no text", "prepare_data none", None, "none: no such folder"),
    ("a file as text", "prepare_data eval.json", None, "eval.json: no such folder"),
    ("a folder without text", "prepare_data data", None, "data: no .jsonl"),
    ("no source", "prepare_data ", None, "SOURCE is empty"),
    ("a share of nan", "prepare_data text --held_out=nan", None, "held_out"),
    ("a share of 1", "prepare_data text --held_out=1", None, "held_out"),
    ("a window of 2**40", "prepare_data text --window=1099511627776", None, "window: 1099511627776 is out of range"),
    ("a window of 1", "prepare_data text --window=1", None, "window"),
    ("no workers", "prepare_data text --workers=0", None, "workers"),
    ("a million workers", "prepare_data text --workers=1000000", None, "workers: 1000000 is out of range"),
    ("a domain of no name", "prepare_data text --domains EMPTY", None, "--domains: '' is no domain's name"),
    ("an infinite limit", "prepare_data text --max_mb=inf", None, "max_mb"),
    ("domains that are no UTF-8", "prepare_data text --domain_field=d --domains=b\udcfc", None, "no UTF-8"),
    ("a limit of nan", "prepare_data text --max_mb=nan", None, "max_mb"),
    ("a seed below 0", "prepare_data text --seed=-1", None, "seed"),
    ("a seed of 10**400", "prepare_data text --seed=10**400", None, "seed"),
    ("a tokenizer that is none", "prepare_data text --tokenizer=gtp2", None, "did you mean gpt2?"),
    ("a tokenizer of no folder", "prepare_data text --tokenizer=out", None, "neither tokenizer.json nor"),
    ("a tokenizer that is no file of one", "prepare_data text --tokenizer=t.json", write("t.json", "{}"), "t.json"),
    ("a folder that is there", "prepare_data text --out=out", None, "out: exists and is no data set"),
    ("a data set of other options", "prepare_data text --out=data --window=64", None, "data: exists, made with"),
    ("a data set below a file", "prepare_data text --out=eval.json/x", None, "eval.json"),
    ("a field of an installed text", "prepare_data installed --domain_field=x", None, "domain_field"),
    ("a jsonl file that is none", "prepare_data t", write("t/a/x.jsonl", "{"), "x.jsonl:1: not valid JSON"),
    ("a line without text", "prepare_data t", write("t/a/x.jsonl", '{"txt": ""}'), "x.jsonl:1: no document"),
    ("a line nested too deep", "prepare_data t", write("t/a/x.jsonl", DEEP), "x.jsonl:1"),
    ("too little text", "prepare_data t", write("t/a/x.jsonl", '{"text": "a"}'), "a"),
    # what others made, or what was damaged
    ("a state nested too deep", "resume", write(STATE, DEEP), "state.json"),
    ("a state that is pickled", "resume", write(STATE, PICKLE), "state.json"),
    ("a checkpoint of an older version", "resume", write(f"{CHECKPOINT}/.metadata", PICKLE), "with pickle"),
    ("a gate that is pickled", "resume", write(f"{CHECKPOINT}/weights-1-of-1.safetensors", PICKLE), "damaged"),
    ("flipped bytes in a checkpoint", "resume", flip(f"{CHECKPOINT}/optimizer-1-of-1.safetensors"), "its checksum"),
    ("flipped bytes in a state", "resume", flip(STATE), "state.json: damaged: its checksum"),
    ("flipped bytes in weights", "eval out/source", flip(WEIGHTS), "model.safetensors: damaged: its checksum"),
    ("flipped bytes in the source", "prune", flip(WEIGHTS), "model.safetensors: damaged: its checksum"),
    ("a run's config that is cut", "train", write("out/new/config.json", '{"st'), "is not the config.json of a run"),
    ("a window of 0", "train", put("data/meta.json", "window", 0), "$.window"),
    ("an end token that is text", "train", put("data/meta.json", "eot", "x"), "$.eot"),
    ("an end token beyond the vocabulary", "train", put("data/meta.json", "eot", 10**6), "meta.json"),
    ("negative bytes", "train", put("data/meta.json", "domains.sums.val.bytes", -1), "bytes"),
    ("counts of 10**400", "train", put("data/meta.json", "domains.sums.val.tokens", 10**400), "meta.json"),
    ("a data set nested too deep", "train", write("data/meta.json", DEEP), "meta.json"),
    ("text that was cut", "train", cut("data/sums/train.bin", 1000), "train.bin"),
    ("2**31 layers", "eval out/source", put(MODEL, "num_hidden_layers", 2**31), "num_hidden_layers"),
    ("a width of 2**70", "eval out/source", put(MODEL, "hidden_size", 2**70), "hidden_size"),
    ("a config nested too deep", "eval out/source", write(MODEL, DEEP), "config.json"),
    ("weights that are pickled", "eval out/source", write(WEIGHTS, PICKLE), "model.safetensors"),
]  # fmt: skip


def files() -> dict[Path, bytes | None]:
    """Everything below the working directory: its content, None for a directory."""
    return {path: path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


def restore(whole: dict[Path, bytes | None], now: dict[Path, bytes | None]) -> None:
    """Let everything be as it was."""
    for path, content in now.items():
        if path.exists() and (path not in whole or (content is None) != (whole[path] is None)):
            shutil.rmtree(path) if content is None else path.unlink()
    for path, content in whole.items():
        if content is not None and content != now.get(path):
            path.write_bytes(content)


@pytest.mark.parametrize("row", TABLE, ids=[name for name, *_ in TABLE])
def test_it_is_refused_in_one_line_and_nothing_changes(row, demo, monkeypatch, capfd):
    _, line, damage, said = row
    command, *args = line.split(" ")
    home, whole, _ = demo
    monkeypatch.chdir(home)
    before = whole
    try:
        if damage:
            damage()
            before = files()
            changed = {path for path, _ in before.items() ^ whole.items()}
            assert changed
            for path in changed if "checksum" not in said else ():  # what stands there was written by somebody else
                (path.parent / "checksums.json").unlink(missing_ok=True)
            before = files()
        capfd.readouterr()
        status, err = run(command, ["" if arg == "EMPTY" else arg for arg in args], monkeypatch), capfd.readouterr().err
        assert status == 2 and err.count("\n") == 1 and said in err, (status, err)
        assert len(err) < 2200 and err[:-1].isprintable() and err.split(":")[0] in [f"{name}.py" for name in MAINS]
    finally:
        after = files()
        if after != whole:
            restore(whole, after)
    assert after == before


# -- terminals, pipes and torchrun ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAINS)
def test_help_and_errors_on_an_ascii_terminal(name, monkeypatch):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", screens[0])
    monkeypatch.setattr(sys, "stderr", screens[1])
    assert run(name, ["--help"], monkeypatch) == 0
    assert run(name, ["x", "--out=x", "--é±日"], monkeypatch) == 2
    for screen, said in zip(screens, (b"--", b"--\\xe9\\xb1\\u65e5")):
        screen.flush()
        assert said in screen.buffer.getvalue()


def test_nobody_reads_the_output(monkeypatch, capfd):
    """As in `eval.py ... | head`."""
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    with pytest.raises(SystemExit) as end:
        command_line.command(lambda: print("a result"))
    sys.stdout.close()
    assert end.value.code == 1 and capfd.readouterr().err == ""


def test_no_room_for_the_output(monkeypatch, capfd):
    """As where a log is on a full disk; and where stdout was closed."""
    monkeypatch.setattr(sys, "stdout", open("/dev/full", "w"))
    with pytest.raises(SystemExit) as end:
        command_line.command(lambda: print("a result"))
    sys.stdout.close()
    error = capfd.readouterr().err
    assert end.value.code == 1 and "could not print: No space left" in error and error.count("\n") == 1
    monkeypatch.setattr(sys, "stdout", None)
    command_line.command(lambda: print("a result"))


def test_a_closed_stderr(bpe_file, tiny_corpus, tmp_path):
    """As after 2>&-: neither a bar nor the tokenizers library may miss it."""
    args = [tiny_corpus, "--out", tmp_path / "out", "--tokenizer", bpe_file, "--window=64", "--held_out=.1"]
    command = shlex.join(map(str, [sys.executable, ROOT / "prepare_data.py", *args, "--workers=1"]))
    done = subprocess.run(["sh", "-c", f"{command} 2>&-"], stdout=subprocess.PIPE, text=True)
    assert done.returncode == 0 and "documents" in done.stdout and (tmp_path / "out" / "meta.json").exists()


@pytest.mark.parametrize(
    "error, status, words",
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (torch.OutOfMemoryError("CUDA out of memory."), 1, "out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1, "out of memory"),
        (MemoryError(), 1, "out of memory"),
        (torch._dynamo.exc.BackendCompilerFailed(print, RuntimeError("no g++"), None), 1, "again, or --compile False"),
    ],
)
def test_what_is_nobodys_mistake_is_one_line(error, status, words, capsys, monkeypatch):
    """The dry run knows what train.py needs, and nothing of other commands."""
    name = "eval.py" if isinstance(error, MemoryError) else "train.py"
    monkeypatch.setattr(sys, "argv", [name])

    def main():
        raise error

    with pytest.raises(SystemExit) as end:
        command_line.command(main)
    said = capsys.readouterr().err.strip()
    assert end.value.code == status and words in said and "\n" not in said
    assert ("--dry_run" in said) == (words == "out of memory" and name == "train.py")
    with pytest.raises(RuntimeError, match="our own"):  # which keeps its traceback
        command_line.command(lambda: (_ for _ in ()).throw(RuntimeError("our own")))


def test_a_full_disk_leaves_the_results_that_were_there(tmp_path, monkeypatch):
    file, link = tmp_path / "eval.json", tmp_path / "link"
    link.symlink_to(file)
    output.write_whole(link, "first")

    def full(self, text, **options):
        with open(self, "w") as half:
            half.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=re.escape(str(file))):
        output.write_whole(file, "second")
    assert file.read_bytes() == b"first" and sorted(tmp_path.iterdir()) == [file, link] and link.is_symlink()


def test_torchruns_report_ends_with_our_line(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("LOCAL_RANK", "1")  # the first process prints it
    assert run("train", ["--stesp=3"], monkeypatch) == 2 and capfd.readouterr().err == ""
    failure = ProcessFailure(local_rank=1, pid=1, exitcode=2, error_file=str(tmp_path / "error.json"))
    *_, last, border = str(ChildFailedError("train.py", {1: failure})).splitlines()
    assert "train.py: --stesp: unknown setting 'stesp', did you mean 'steps'?" in last and set(border) == {"="}
