"""A run's directory, and how it survives anything: stopped or killed at any time, it goes on as if it had not been.

    out/RUN/config.json            all settings
    out/RUN/metrics.jsonl          what was measured; every line follows from the settings alone, to the last byte
    out/RUN/timings.jsonl          how fast it was: steps, tokens/s, memory
    out/RUN/checkpoints/step_N/    the tensors of a checkpoint (checkpoint.py); and state.json: domain weights and
                                   their history, data position, and how long metrics.jsonl was
    out/RUN/model/                 the finished model in Hugging Face's format, and what is known of it (models.py)

A checkpoint and the model are written beside their place and renamed when they are whole, so whatever bears its name
is whole. The first process writes and the others read: on several machines, `out` is on a file system that they share.
"""

import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import torch.distributed as dist
from torch import nn

from plumbing import checkpoint, parallel

STATE = {  # keys of state.json
    *("step", "metrics_bytes", "settings", "digests", "source", "target", "mixture", "reader", "unlogged", "seconds"),
}


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the one with the most steps last."""
    found = [p for p in (run / "checkpoints").glob("step_*") if p.name[5:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def read_state(checkpoint: Path) -> dict:
    """What the state.json of a checkpoint holds. ValueError where it is not whole, or of an older version."""
    file = checkpoint / "state.json"
    try:
        state = json.loads(file.read_text())
        missing = STATE - state.keys()
    except (ValueError, AttributeError):
        raise ValueError(f"{file}: damaged, it is not a JSON object") from None
    if missing:
        raise ValueError(f"{file}: written by another version of train.py: {', '.join(sorted(missing))} missing")
    return state


def flush(directory: Path) -> None:
    """Have the disk hold all files of a directory, so that a power failure after its renaming loses nothing."""
    for path in (*directory.iterdir(), directory):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class Run:
    """A run's directory.

    finished    whether it has a model, of as many steps as are asked for
    checkpoint  the checkpoint that the run goes on from, or None
    origin      the directory of the run that this checkpoint is of: another one where `resume` names it
    state       what that checkpoint's state.json holds, or None
    changed     setting -> (what it was, what it is now), for those that changed and may
    signals     the signals that told this process to stop

    resume: 'auto' goes on from the newest checkpoint; 'never' refuses where there is one; the path of a run or of one
    of its checkpoints is what a new run goes on from, and is not touched. A run that has checkpoints of its own goes on
    from those. digests: setting that names a file -> what tells its content from others, so that it may have moved.
    ValueError where the run was started with other settings: only those in `free` may change, and `steps` may grow; a
    new run that `resume` starts from another one may change all. ValueError, too, where the path is no run, for an
    older checkpoint of its own, and where metrics.jsonl lacks what was logged before the checkpoint.
    """

    def __init__(self, out: str, settings: dict, free: set[str], resume: str = "auto", digests: dict | None = None):
        self.path, self.settings, self.free, self.digests = Path(out), settings, free, digests or {}
        self.metrics = self.timings = self.pending = self.group = None
        self.signals: list[int] = []
        has_model = (self.path / "model" / "config.json").exists()
        self.checkpoint = self._find_checkpoint(resume, has_model)
        self.origin, self.state, self.changed = self.path, None, {}
        if self.checkpoint:
            self.origin = self.checkpoint.parent.parent
            self.state = read_state(self.checkpoint)
            self._check_log()
            self._check_content()
            if self.origin != self.path and self.state["step"] >= settings["steps"]:
                raise ValueError(f"steps = {settings['steps']}: {self.checkpoint} has {self.state['step']} already")
            self.changed = self._changes(self.state["settings"], moved=set(self.digests))
        self._check_settings()
        grown = self.state is not None and self.state["step"] < settings.get("steps", 0)
        self.finished = has_model and not grown

    def _find_checkpoint(self, resume: str, has_model: bool) -> Path | None:
        own, given = newest_checkpoint(self.path), Path(resume).absolute()
        if resume == "never" and (has_model or own):
            raise ValueError(f"{self.path} holds a run already: remove it, or choose another --out, or resume='auto'")
        if own and given.parent == own.parent.absolute() and given.name != own.name:
            raise ValueError(
                f"resume = '{resume}': {self.path} goes on from its newest checkpoint, {own.name}; to go back, "
                "choose another --out"
            )
        if resume in ("auto", "never") or has_model or own:
            return own
        found = given if (given / "state.json").is_file() else newest_checkpoint(given)
        if found is None:
            raise ValueError(f"resume = '{resume}': no checkpoint there; it is 'auto', 'never', a run or a checkpoint")
        return found

    def _check_log(self) -> None:
        logged = self.origin / "metrics.jsonl"
        if not logged.is_file() or logged.stat().st_size < self.state["metrics_bytes"]:
            raise ValueError(f"{logged}: what was logged before {self.checkpoint.name} is not there any more")

    def _check_content(self) -> None:
        for setting, digest in self.digests.items():
            if self.state["digests"].get(setting) != digest:
                raise ValueError(
                    f"{setting} = {self.settings[setting]!r} is not what {self.origin} was started with: it was made "
                    "again, with other content"
                )

    def _changes(self, old: dict, moved: set[str] = frozenset()) -> dict:
        same = self.free | moved
        return {k: (old.get(k), new) for k, new in self.settings.items() if k not in same and old.get(k) != new}

    def _check_settings(self) -> None:
        config, changed = self.path / "config.json", dict(self.changed)
        if config.exists() and (self.checkpoint is None or self.origin != self.path):
            old = json.loads(config.read_text())
            if not isinstance(old, dict) or "steps" not in old:  # it would be overwritten: of a model, say
                raise ValueError(f"{config} is not the config.json of a run, choose another --out")
            changed = self._changes(old)
        elif self.origin != self.path:
            return
        was, now = changed.get("steps", (0, 0))
        if self.checkpoint and now > was:
            del changed["steps"]
        if changed:
            what = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in changed.items())
            raise ValueError(f"{self.path} was started with other settings, choose another --out: {what}")

    def open(self) -> None:
        """Make the directory and open the logs: nothing is written before everything was found to be right. From now on
        SIGTERM and Ctrl-C do not end the process: `interrupted` tells of them."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: self.signals.append(number))
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
        if self.origin != self.path:
            self.metrics.truncate(0)
            self.metrics.write((self.origin / "metrics.jsonl").read_bytes()[:length])
        self.metrics.truncate(length)

    def interrupted(self) -> bool:
        """Whether one of the processes was told to stop."""
        return parallel.any_of(bool(self.signals))

    @property
    def exit_status(self) -> int:
        """What an interrupted process ends with: 130 after Ctrl-C, as shells expect it."""
        return 130 if signal.SIGINT in self.signals else 0

    def log(self, **line) -> None:
        """Append one line to metrics.jsonl."""
        append(self.metrics, line)

    def time(self, **line) -> None:
        """Append one line to timings.jsonl."""
        append(self.timings, line)

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
        saving = checkpoint.save(tree, optimizer, partial, self.group, in_background)
        self.pending = saving, partial, final, keep
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
            checkpoint.wait(saving)
        self.pending = None
        if parallel.is_first():  # it ends its part of a save only after all others
            flush(partial)
            partial.rename(final)
            for old in checkpoints(final.parent.parent)[:-keep]:
                shutil.rmtree(old.rename(old.with_name(old.name + ".partial")))

    def load(self, tree: nn.Module, optimizer) -> None:
        """Load weights and optimizer state from the checkpoint that this run goes on from, in place."""
        checkpoint.load(tree, optimizer, self.checkpoint)


def append(file, line: dict) -> None:
    """Append a line of JSON and flush it. Processes that do not log do nothing."""
    if file is not None:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
