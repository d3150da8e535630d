"""A run's directory, and how it survives anything: stopped or killed at any time, it goes on as if it had not been.

    out/RUN/config.json            all settings
    out/RUN/metrics.jsonl          what was measured, a line each; follows from the settings alone, to the last byte
    out/RUN/timings.jsonl          how fast it was: steps, tokens/s, memory
    out/RUN/checkpoints/step_N/    torch.distributed.checkpoint's files (weights, optimizer, gates, multipliers), a
                                   shard per process, readable by any number of processes; and state.json: domain
                                   weights and history, data position, how long metrics.jsonl was
    out/RUN/model/                 the finished model in Hugging Face's format

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

import parallel


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
    """A run's directory. `finished`: it has a model. `state`: of the checkpoint it goes on from, None for a new run.

    resume: 'auto' goes on from the newest checkpoint; 'never' refuses where there is one; a path, of a run or of one
    of its checkpoints, is what a new run goes on from (and is not touched). ValueError where either was started with
    other settings, except for those in `free`, or is no run.
    """

    def __init__(self, out: str, settings: dict, free: set[str], resume: str = "auto"):
        self.path, self.settings = Path(out), settings
        self.finished = (self.path / "model" / "config.json").exists()
        self.checkpoint = newest_checkpoint(self.path)
        self.metrics = self.timings = self.pending = self.group = None
        if resume == "never" and (self.finished or self.checkpoint):
            raise ValueError(f"{out} holds a run already: remove it, or choose another --out, or resume='auto'")
        origin = self.path
        if resume not in ("auto", "never") and not (self.finished or self.checkpoint):
            given = Path(resume).absolute()
            self.checkpoint = given if (given / "state.json").is_file() else newest_checkpoint(given)
            if self.checkpoint is None:
                raise ValueError(
                    f"resume = '{resume}': no checkpoint there; it is 'auto', 'never', a run or a checkpoint"
                )
            origin = self.checkpoint.parent.parent
        self.state = json.loads((self.checkpoint / "state.json").read_text()) if self.checkpoint else None
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
