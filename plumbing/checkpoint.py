"""A run's directory, and how it survives anything: stopped or killed at any time, it goes on as if it had not been.

    out/RUN/config.json            all settings
    out/RUN/metrics.jsonl          what was measured, a line each; follows from the settings alone, to the last byte
    out/RUN/timings.jsonl          how fast it was: steps, tokens/s, memory
    out/RUN/checkpoints/step_N/    torch.distributed.checkpoint's files (weights, optimizer, gates, multipliers), a
                                   shard per process, readable by any number of processes; and state.json: domain
                                   weights and history, data position, how long metrics.jsonl was
    out/RUN/model/                 the finished model in Hugging Face's format, and what is to be known of it:
                                   pruning.json (which indices were kept), trained_with.json (which tokenizer)

A checkpoint and the model are written beside their place and renamed when they are whole, so whatever bears its name
is whole. The first process writes and the others read: on several machines, `out` is on a file system that they share.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from masks import PruningMasks, extract
from model import Llama, LlamaConfig
from plumbing import parallel
from plumbing.data import TokenData
from plumbing.tokenizer import fingerprint, load_tokenizer

TOKENIZER_FILES = (  # what `transformers` may write beside the weights
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
# beside a model that train.py wrote: the indices that were kept; the tokenizer of its data, and fingerprint
PRUNING, TRAINED_WITH = "pruning.json", "trained_with.json"


# -- runs and their checkpoints -------------------------------------------------------------------------------------


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the one with the most steps last."""
    found = [p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def read_checkpoint(content: dict, path: Path) -> None:
    """Read a checkpoint's tensors into those of `content`, in place. ValueError where the files are damaged."""
    try:
        dcp.load(content, checkpoint_id=path, no_dist=parallel.size() == 1)
    except CheckpointException as error:  # of all processes, and no subclass of Exception
        raise ValueError(f"{path}: damaged: {next(iter(error.failures.values()))[0]}") from None


class Run:
    """A run's directory. `finished`: it has a model. `state`: of the checkpoint it goes on from, or None.

    resume: 'auto' goes on from the newest checkpoint; 'never' refuses where there is one; a path, of a run or of one
    of its checkpoints, is what a new run goes on from (and is not touched); one that has checkpoints of its own goes
    on from those. ValueError where either was started with other settings, except for those in `free`, or is no run,
    for an older checkpoint of its own, and where metrics.jsonl lacks what was logged before the checkpoint.
    """

    def __init__(self, out: str, settings: dict, free: set[str], resume: str = "auto"):
        self.path, self.settings = Path(out), settings
        self.finished = (self.path / "model" / "config.json").exists()
        self.checkpoint = newest_checkpoint(self.path)
        self.metrics = self.timings = self.pending = self.group = None
        if resume == "never" and (self.finished or self.checkpoint):
            raise ValueError(f"{out} holds a run already: remove it, or choose another --out, or resume='auto'")
        origin, given = self.path, Path(resume).absolute()
        if self.checkpoint and given.parent == self.checkpoint.parent.absolute() and given.name != self.checkpoint.name:
            raise ValueError(
                f"resume = '{resume}': {out} goes on from its newest checkpoint, {self.checkpoint.name}; to go back, "
                "choose another --out"
            )
        if resume not in ("auto", "never") and not (self.finished or self.checkpoint):
            self.checkpoint = given if (given / "state.json").is_file() else newest_checkpoint(given)
            if self.checkpoint is None:
                raise ValueError(
                    f"resume = '{resume}': no checkpoint there; it is 'auto', 'never', a run or a checkpoint"
                )
            origin = self.checkpoint.parent.parent
        self.state = json.loads((self.checkpoint / "state.json").read_text()) if self.checkpoint else None
        logged = origin / "metrics.jsonl"
        if self.state and not (logged.is_file() and logged.stat().st_size >= self.state["metrics_bytes"]):
            raise ValueError(f"{logged}: what was logged before {self.checkpoint.name} is not there any more")
        for config in {self.path / "config.json", origin / "config.json"}:
            if not config.exists():
                continue
            old = json.loads(config.read_text())
            if "steps" not in old:  # a model's, which would be overwritten
                raise ValueError(f"{config} is not of a run, choose another --out")
            changed = [
                f"{k} was {old.get(k)!r}, now {v!r}" for k, v in settings.items() if k not in free and old.get(k) != v
            ]
            if changed:
                raise ValueError(
                    f"{config.parent} was started with other settings, choose another --out: {'; '.join(changed)}"
                )

    def open(self) -> None:
        """Make the directory and open the logs: nothing is written before everything was found to be right."""
        parallel.barrier()  # until all have looked
        if parallel.size() > 1:
            self.group = dist.new_group(backend="gloo")  # an asynchronous save talks while training talks
        if not parallel.is_first():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        self.metrics, self.timings = (open(self.path / name, "ab") for name in ("metrics.jsonl", "timings.jsonl"))
        try:
            fcntl.lockf(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it does
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is at work on this run") from None
        except OSError:
            pass  # a file system without locks
        partial = self.path / "config.json.partial"
        partial.write_text(json.dumps(self.settings, indent=2) + "\n")
        os.replace(partial, self.path / "config.json")
        # what a dead run logged after its last checkpoint will be logged again
        length = self.state["metrics_bytes"] if self.state else 0
        if self.checkpoint and self.checkpoint.parent.parent != self.path:
            self.metrics.truncate(0)
            self.metrics.write((self.checkpoint.parent.parent / "metrics.jsonl").read_bytes()[:length])
        self.metrics.truncate(length)

    def log(self, **line) -> None:
        """Append one line to metrics.jsonl."""
        write(self.metrics, line)

    def time(self, **line) -> None:
        """Append one line to timings.jsonl."""
        write(self.timings, line)

    def save(self, step: int, tree: nn.Module, optimizer, state: dict, keep: int, in_background: bool = False) -> None:
        """Write a checkpoint, keep the newest `keep`. In the background, training goes on as soon as it is copied."""
        self.finish_save()
        final = self.path / "checkpoints" / f"step_{step:06d}"
        if parallel.from_first(final.exists()):
            return
        partial = final.with_name(final.name + ".partial")
        if parallel.is_first():
            for left_over in final.parent.glob("*.partial"):
                shutil.rmtree(left_over)
            partial.mkdir(parents=True)
            self.metrics.flush()
            os.fsync(self.metrics.fileno())
            state = {**state, "step": step, "metrics_bytes": os.fstat(self.metrics.fileno()).st_size}
            (partial / "state.json").write_text(json.dumps(state))
        parallel.barrier()
        weights, moments = get_state_dict(tree, optimizer)
        content = {"weights": weights, "optimizer": moments}
        how = {"checkpoint_id": partial, "process_group": self.group, "no_dist": self.group is None}
        saving = dcp.async_save(content, **how) if in_background else dcp.save(content, **how)
        self.pending = saving if in_background else None, partial, final, keep
        if not in_background:
            self.finish_save()

    def finish_save(self, wait: bool = True) -> None:
        """Give a checkpoint its name once it is whole, and drop the oldest ones."""
        if self.pending is None:
            return
        saving, partial, final, keep = self.pending
        if saving is not None:
            if not wait and not saving.done():
                return
            saving.result()
        self.pending = None
        if parallel.is_first():  # its part of a save ends when all the others' have
            partial.rename(final)
            for old in checkpoints(final.parent.parent)[:-keep]:
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))

    def load(self, tree: nn.Module, optimizer) -> None:
        """Load weights and optimizer state from the checkpoint that this run goes on from, in place."""
        weights, moments = get_state_dict(tree, optimizer)
        content = {"weights": weights, "optimizer": moments}
        read_checkpoint(content, self.checkpoint)
        set_state_dict(tree, optimizer, model_state_dict=weights, optim_state_dict=moments)


def write(file, line: dict) -> None:
    """One line of JSON, in the file at once; nothing in the processes that do not log."""
    if file is not None:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()


# -- models: what a path holds, what is beside the weights ----------------------------------------------------------


def model_directory(path: str | Path) -> Path | None:
    """The directory in Hugging Face's format that `path` is, or that the finished run `path` holds; None otherwise."""
    path = Path(path)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file() and not (path / "metrics.jsonl").exists():
        return path
    return None


def directory_of(model: str) -> Path:
    """The directory in Hugging Face's format of a model or a finished run. ValueError if there is none."""
    directory = model_directory(model)
    if directory is None:
        there = Path(model).is_dir()
        what = "this run is not finished, run it to its end first" if there else "no such model or run"
        raise ValueError(f"{model}: {what}")
    return directory


def load_model(path: str | Path) -> Llama:
    """The model of a run, of one of its checkpoints, or of a model directory, in float32; ValueError if none."""
    path = Path(path)
    if (directory := model_directory(path)) is not None:
        return Llama.from_pretrained(directory)
    checkpoint = path if (path / "state.json").is_file() else newest_checkpoint(path)
    if checkpoint is None:
        what = "has no model and no checkpoint yet" if path.is_dir() else "no such model, run or checkpoint"
        raise ValueError(f"{path}: {what}")
    state = json.loads((checkpoint / "state.json").read_text())
    source, target = LlamaConfig(**state["source"]), state["target"]
    tree = nn.ModuleDict({"model": Llama(source)})
    if target is not None:
        tree["masks"] = PruningMasks(source, LlamaConfig(**target), 0)
    weights = tree.state_dict()
    read_checkpoint({"weights": weights}, checkpoint)
    tree.load_state_dict(weights)
    return tree["model"] if target is None else extract(tree["model"], tree["masks"])


def check_tokenizer(path: str | Path, config: LlamaConfig, data: TokenData) -> None:
    """ValueError unless the model can read the data: a vocabulary as large, and its own tokenizer if that is known."""
    if config.vocab_size < data.vocab_size:
        raise ValueError(
            f"{path}: its vocabulary has {config.vocab_size} tokens, {data.path} needs {data.vocab_size} "
            f"({data.tokenizer}): prepare the text with the model's own tokenizer"
        )
    directory, own, its = model_directory(path), None, None
    if directory is not None and (directory / TRAINED_WITH).is_file():
        trained_with = json.loads((directory / TRAINED_WITH).read_text())
        own, its = trained_with["tokenizer"], trained_with["fingerprint"]
    elif directory is not None and any((directory / x).is_file() for x in ("tokenizer.json", "tokenizer.model")):
        own, its = directory, fingerprint(load_tokenizer(str(directory)))
    if its not in (None, data.fingerprint):
        raise ValueError(
            f"{path}: its tokenizer is not the one {data.path} was prepared with ({data.tokenizer}): "
            f"prepare the text with --tokenizer {own}"
        )


def save_model(path: Path, model: Llama, kept: dict | None, origin: Path | None, data: TokenData) -> None:
    """Write a model directory, with pruning.json (which indices were kept), the tokenizer files of `origin`, and which
    tokenizer the text was prepared with."""
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path)
    trained_with = {"tokenizer": data.tokenizer, "fingerprint": data.fingerprint}
    (path / TRAINED_WITH).write_text(json.dumps(trained_with))
    if kept is not None:
        (path / PRUNING).write_text(json.dumps(kept))
    for name in TOKENIZER_FILES:
        if origin is not None and (origin / name).is_file():
            shutil.copy(origin / name, path)
