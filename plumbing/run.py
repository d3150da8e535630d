"""A run's directory, and how it survives anything: stopped or killed at any time, it goes on as if it had not been.

    out/RUN/config.json            all settings
    out/RUN/metrics.jsonl          what was measured; every line follows from the settings alone, to the last byte
    out/RUN/timings.jsonl          how fast it was: steps, tokens/s, memory
    out/RUN/checkpoints/step_N/    the tensors of a checkpoint (checkpoint.py); and state.json: domain weights and
                                   their history, data position, and how long metrics.jsonl was
    out/RUN/model/                 the finished model in Hugging Face's format, and what is known of it (models.py)

A checkpoint and the model are written beside their place and renamed when they are whole, so whatever bears its name
is whole. The first process writes all but the tensors of a checkpoint, of which each process writes its rows. On
several machines, `out` is on a file system that they share.
"""

import fcntl
import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from masks import PruningMasks, check_target
from model import LlamaConfig
from plumbing import checkpoint, checksums, parallel, records
from plumbing.output import write_whole

OF_THE_CHOICE = {"gates", "settle_at", "fade"}  # settings that say what is kept, with the target's shape
KNOWN_BY_CONTENT = {"data", "init_from"}  # settings that name files, which may move: `digests` tell what they hold
OF_A_MACHINE = {"out", "resume", "device", "threads"}  # settings that may differ between the processes of a run


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, the one with the most steps last. ValueError or OSError where they are out of
    reach: a run that took this for an empty directory would begin anew."""
    directory = run / "checkpoints"
    if directory.is_symlink() and not directory.exists():
        raise ValueError(f"{directory}: this links to {os.readlink(directory)}, which is not there")
    names = os.listdir(directory) if directory.is_dir() else []
    found = [directory / name for name in names if name.startswith("step_") and name[5:].isdecimal()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint with the most steps of a run, or None."""
    return next(reversed(checkpoints(run)), None)


def find_checkpoint(path: Path) -> Path | None:
    """The checkpoint that `path` is, or the newest one of the run that `path` is; None if there is none."""
    return path if (path / "state.json").is_file() else newest_checkpoint(path)


def read_state(checkpoint: Path) -> dict:
    """What the state.json of a checkpoint holds. ValueError where it is damaged, of another version, or where its parts
    do not belong together."""
    file = checkpoint / "state.json"
    checksums.check(checkpoint, file.name)
    state = records.read(file, records.State, "the state of a run, or that of another version of train.py")
    try:
        check_state(state)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not the state of a run: {error}") from None
    return state


def check_state(state: dict) -> None:
    """ValueError or TypeError unless the parts of a state, each of which has its type, belong together."""
    steps = records.convert(state["settings"], records.RunConfig, "settings")["steps"]
    if state["step"] > steps:
        raise ValueError(f"step {state['step']} of {steps}")
    source, target = shapes_of(state)
    if target is not None:
        check_target(source, target)
    reader, mixture, unlogged = state["reader"], state["mixture"], state["unlogged"]
    history, domains = mixture["history"], list(reader["sequences"])
    if list(reader["first"]) != domains or any(reader["first"][d] > reader["sequences"][d] for d in domains):
        raise ValueError("reader: `first` does not precede `sequences`")
    by_domain = [mixture[key] for key in ("weights", "ratio", "reference", "reference_is")]
    by_domain += [*history["tokens"], *history["losses"], *unlogged]
    if any(len(values) != len(domains) for values in by_domain) or len(unlogged) != 2:
        raise ValueError(f"mixture or unlogged have not one value for each of {len(domains)} domains")
    if len({len(points) for points in history.values()}) > 1:
        raise ValueError("mixture: the lists of `history` differ in length")
    if abs(sum(mixture["weights"]) - 1) > 1e-3 or abs(sum(mixture["ratio"]) - 1) > 1e-3 or 0 in mixture["ratio"]:
        raise ValueError("mixture: weights or ratio are no shares")


def shapes_of(state: dict) -> tuple[LlamaConfig, LlamaConfig | None]:
    """Shape of the model that a state belongs to, and the shape that it is pruned to, if it is. ValueError or TypeError
    where they cannot be."""
    source, target = state["source"], state["target"]
    return LlamaConfig(**source), None if target is None else LlamaConfig(**target)


class Run:
    """A run's directory. Nothing in it changes before `open`.

    finished    whether it has a model, of as many steps as are asked for
    checkpoint  the checkpoint that the run goes on from, or None
    origin      the directory of the run that this checkpoint is of: another one where `resume` names it
    state       what that checkpoint's state.json holds, or None
    changed     setting -> (what it was, what it is now), for those that changed and may
    digests     what tells the content of the data and of the model it starts from: see `check_content`
    signals     the signals that told this process to stop

    resume: 'auto' goes on from the newest checkpoint; 'never' refuses where there is a run; the path of a run or of one
    of its checkpoints is what a new run goes on from, and is not touched. A run that has checkpoints of its own goes on
    from those. Several processes must make it within `parallel.together`.

    ValueError where another process is at work on the run, and where the run was started with other settings: only
    those in `free` may change, and `steps` may grow; a new run that `resume` starts from another one may change all.
    ValueError, too, where the path is no run, for an older checkpoint of its own, and where metrics.jsonl lacks what
    was logged before the checkpoint.
    """

    def __init__(self, out: str, settings: dict, free: set[str], resume: str = "auto"):
        self.path, self.settings, self.free = Path(out), settings, free
        self.digests: dict[str, str] = {}
        self.signals: list[int] = []
        self.metrics = self.timings = self.pending = self.group = None
        log = self.path / "metrics.jsonl"
        self.has_log = log.is_file() and log.stat().st_size > 0
        if log.is_file():
            with suppress(OSError):  # it cannot be written: `open` will say so, if it comes to that
                self._lock()
        self.has_model = (self.path / "model" / "config.json").is_file()
        self.checkpoint = self._find_checkpoint(resume)
        self.origin, self.state, self.changed = self.path, None, {}
        if self.checkpoint:
            self.origin = self.checkpoint.parent.parent
            self.state = read_state(self.checkpoint)
            self._check_checkpoint()
        if self.checkpoint is None or self.origin != self.path:
            self._check_config()
            self._check_what_is_there()
        self.finished = self.has_model and self._steps_of_model() >= settings["steps"]

    def _steps_of_model(self) -> int:
        """After how many steps model/ was made: a run that is given more of them loses it first (`open`)."""
        config = self.path / "config.json"
        return records.read(config, records.RunConfig, "the config.json of a run")["steps"] if config.exists() else 0

    def _lock(self) -> None:
        """Open metrics.jsonl and keep it for this process until it ends, however it does. ValueError if another process
        has it."""
        if self.metrics is not None or not parallel.is_first():
            return
        self.metrics = open(self.path / "metrics.jsonl", "ab")
        try:
            fcntl.lockf(self.metrics, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is at work on this run") from None
        except OSError:
            pass  # a file system without locks

    def _find_checkpoint(self, resume: str) -> Path | None:
        """Its own newest checkpoint. Or else, where nothing is there yet, the one that `resume` names."""
        own, given = newest_checkpoint(self.path), Path(resume).absolute()
        if resume == "auto":
            return own
        if resume == "never":
            if own or self.has_model or self.has_log:
                raise ValueError(
                    f"{self.path} holds a run already: --resume auto goes on with it; or choose another --out"
                )
            return None
        if own and given.parent == own.parent.absolute() and given.name != own.name:
            raise ValueError(
                f"resume = '{resume}': {self.path} goes on from its newest checkpoint, {own.name}; to go back, "
                "choose another --out"
            )
        if own or self.has_model:
            return own
        found = find_checkpoint(given)
        if found is None:
            raise ValueError(f"resume = '{resume}': no checkpoint there; it is 'auto', 'never', a run or a checkpoint")
        return found

    def _check_checkpoint(self) -> None:
        """Hold the log and the settings against those of the checkpoint. A new run may change all settings."""
        logged = self.origin / "metrics.jsonl"
        if not logged.is_file() or logged.stat().st_size < self.state["metrics_bytes"]:
            raise ValueError(f"{logged}: what was logged before {self.checkpoint.name} is not there any more")
        self.changed = self._changes(self.checkpoint / "state.json", self.state["settings"])
        for name in KNOWN_BY_CONTENT:
            self.changed.pop(name, None)
        if self.origin == self.path:
            self._refuse({k: (was, now) for k, (was, now) in self.changed.items() if k != "steps" or now < was})
        elif self.state["step"] > self.settings["steps"]:
            raise ValueError(f"steps = {self.settings['steps']}: {self.checkpoint} has {self.state['step']} already")
        was, now = self.changed.get("lr", (1, 1))
        if now:  # the learning rates in the history are shares of the peak
            history = self.state["mixture"]["history"]
            history["rates"] = [rate * was / now for rate in history["rates"]]

    def _check_config(self) -> None:
        """Hold the settings against config.json: a run that was begun, but has no checkpoint, is known by it."""
        config = self.path / "config.json"
        if config.exists():
            complaint = f"{config} is not the config.json of a run, choose another --out"  # it would be overwritten
            begun = records.parse(config.read_bytes(), dict[str, Any], complaint)
            records.convert(begun, records.RunConfig, complaint)
            self._refuse(self._changes(config, begun))
            was = begun.get("resume", "auto")
            if was not in ("auto", "never", self.settings["resume"]) and not self.has_model:
                raise ValueError(f"{self.path} was begun with --resume {was} and has no checkpoint yet: give it again")

    def _check_what_is_there(self) -> None:
        """ValueError for a model or a log that no run has left here: it would be overwritten."""
        begun = (self.path / "config.json").exists()
        for name, known in (("model", begun and self.has_model), ("metrics.jsonl", begun or not self.has_log)):
            if os.path.lexists(self.path / name) and not known:
                raise ValueError(
                    f"{self.path / name} is of no run that this command goes on with, choose another --out"
                )

    def _changes(self, file: Path, before: dict) -> dict[str, tuple]:
        """What differs between the settings of a file and those of this run, without those that are free."""
        if unknown := before.keys() - self.settings.keys():
            raise ValueError(f"{file}: this version of train.py has no setting {', '.join(sorted(unknown))}")
        bound = self.settings.keys() - self.free
        return {k: (before.get(k), v) for k, v in self.settings.items() if k in bound and before.get(k) != v}

    def _refuse(self, changed: dict[str, tuple]) -> None:
        if changed:
            what = "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in changed.items())
            own = self.checkpoint and self.origin == self.path
            hint = f", with --resume {self.path} to go on from here" if own else ""
            raise ValueError(f"{self.path} was started with other settings, choose another --out{hint}: {what}")

    @property
    def new_references(self) -> bool:
        """Whether a run that goes on takes the references of its settings, and not those that its checkpoint has, which
        may be predictions."""
        has_none = None in self.state["mixture"]["reference"]
        fixed_now = "dynamic_reference" in self.changed and not self.settings["dynamic_reference"]
        return has_none or fixed_now or bool({"reference_losses", "reference_model"} & set(self.changed))

    def check_content(self, digests: dict[str, str]) -> None:
        """ValueError where the data or the model that the run starts from have other content than when it was begun.
        digests: setting that names a file -> what tells its content from others."""
        self.digests = digests
        before = self.state["digests"] if self.state else digests
        for name in sorted(before.keys() | digests.keys()):
            if before.get(name) != digests.get(name):
                raise ValueError(
                    f"{name} = {self.settings[name]!r} is not what {self.origin} was started with: it is another one, "
                    "or it was made again, with other content"
                )

    def check_choice(self, fixed_at: int) -> None:
        """ValueError where a checkpoint has fixed what is kept, and the settings that say so have changed; where an
        initial value of the gates has changed, which a checkpoint has moved on from; and where the choice was to be
        fixed, after `fixed_at` steps, before the checkpoint's step."""
        if self.state is None:
            return
        if self.state["settled"] or self.state["kept"]:
            changed = [key for key in self.changed if key in OF_THE_CHOICE or key.startswith("target_")]
            if changed:
                raise ValueError(f"{', '.join(changed)} must be as in {self.origin}: its choice is fixed")
        elif "gates" in self.changed:
            raise ValueError(f"gates must be 'learned', as in {self.checkpoint}")
        elif initial := [name for name in ("log_alpha", "phi") if name in self.changed]:
            raise ValueError(f"{', '.join(initial)} must be as in {self.origin}: an initial value acts only at step 0")
        elif fixed_at < self.state["step"]:
            raise ValueError(f"settle_at = {fixed_at}: {self.checkpoint} has {self.state['step']} steps already")

    def check_model(self, shape: LlamaConfig, masks: PruningMasks | None) -> None:
        """ValueError unless the checkpoint, if there is one, has a model of this shape, and these gates."""
        if self.state is None:
            return
        source, target = shapes_of(self.state)
        was, now = asdict(source), asdict(shape)
        if changed := [f"{key} was {was[key]!r}, now {now[key]!r}" for key in was if was[key] != now[key]]:
            raise ValueError(f"{self.checkpoint}: its model has another shape: {', '.join(changed)}")
        its = PruningMasks(source, target, 0).distributions() if target else {}
        mine = masks.distributions() if masks else {}
        if list(its) != list(mine):
            its, mine = (", ".join(gates) or "nothing" for gates in (its, mine))
            raise ValueError(f"{self.checkpoint}: it has gates for {its}, and these settings need gates for {mine}")

    def check_processes(self) -> None:
        """ValueError where a process has other settings or data than the first one, or another checkpoint: each machine
        has its own command line and its own disk. Several processes must call it within `parallel.together`."""
        step = {"the step of its newest checkpoint": self.state["step"] if self.state else None}
        bound = {k: v for k, v in self.settings.items() if k not in OF_A_MACHINE | KNOWN_BY_CONTENT}
        mine = bound | {f"the content of {name}": digest for name, digest in self.digests.items()} | step
        first = parallel.from_first(mine)
        for what in sorted(first.keys() | mine.keys()):  # the content of a model is known where there is one
            here, there = mine.get(what), first.get(what)
            if here != there:
                raise ValueError(f"process {parallel.rank()}: {what} is {here!r}, and {there!r} in process 0")

    def open(self) -> None:
        """Make the directory and open the logs: everything was found to be right. From now on SIGTERM, Ctrl-C and a
        terminal that goes away do not end the process: `interrupted` tells of them. OSError where nothing can be
        written, ValueError where another process has been at work since this one looked."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
                signal.signal(number, lambda number, frame: self.signals.append(number))
        if parallel.size() > 1:  # an asynchronous save talks while training talks
            self.group = dist.new_group(backend="gloo", timeout=parallel.PATIENCE)
        with parallel.together():
            if parallel.is_first():
                self._begin_to_write()

    def _begin_to_write(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock()
        if newest_checkpoint(self.path) not in (None, self.checkpoint):
            raise ValueError(f"{self.path}: another process has written checkpoints there meanwhile")
        self.timings = open(self.path / "timings.jsonl", "ab")
        model, partial = self.path / "model", self.path / "model.partial"
        if os.path.lexists(model):  # of fewer steps; its checkpoint can make it again
            shutil.rmtree(partial, ignore_errors=True)
            model.rename(partial)  # what is half removed when this process is killed is no model
            try:
                remove(partial)
            except OSError:  # then nothing is to change
                partial.rename(model)
                raise
        write_whole(self.path / "config.json", json.dumps(self.settings, indent=2) + "\n")
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
    def way_on(self) -> str:
        """What goes on from the newest checkpoint."""
        return "the same command" + (" with --resume auto" if self.settings["resume"] == "never" else "")

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
        partial = final.with_name(final.name + ".partial")
        with parallel.together():
            if parallel.is_first():
                self._begin_checkpoint(partial, {**state, "step": step})
        saving = checkpoint.save(tree, optimizer, partial, self.group, in_background)
        self.pending = saving, partial, final, keep
        if not in_background:
            self.finish_save()

    def _begin_checkpoint(self, partial: Path, state: dict) -> None:
        for left_over in partial.parent.glob("step_*.partial"):
            tidy_up(left_over)
        partial.mkdir(parents=True)
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        state["metrics_bytes"] = os.fstat(self.metrics.fileno()).st_size
        (partial / "state.json").write_text(json.dumps(state))

    def finish_save(self, wait: bool = True) -> None:
        """Give a checkpoint its name once it is whole, and drop the oldest ones."""
        if self.pending is None:
            return
        saving, partial, final, keep = self.pending
        if saving is not None:
            if not wait and parallel.any_of(not saving.done()):  # one that fails must fail in the same step everywhere
                return
            saving.result()
        self.pending = None
        if parallel.is_first():  # it ends its part of a save only after all others
            partial.rename(final)
            for old in checkpoints(final.parent.parent)[:-keep]:
                tidy_up(old)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Finish a checkpoint that is still being written when the run ends. The error that ends the run is raised.
        With several processes, an error other than SystemExit may have hit this one alone: then the checkpoint is not
        finished, since the others would not take part."""
        try:
            yield
        except BaseException as error:
            if isinstance(error, SystemExit) or parallel.size() == 1:
                with suppress(Exception):
                    self.finish_save()
            raise

    def load(self, tree: nn.Module, optimizer) -> None:
        """Load weights and optimizer state from the checkpoint that this run goes on from, in place."""
        checkpoint.load(tree, self.checkpoint, optimizer)


def remove(directory: Path) -> None:
    """Remove a directory, or a link to one. OSError where that cannot be."""
    if directory.is_symlink():
        directory.unlink()
    else:
        shutil.rmtree(directory)


def tidy_up(checkpoint: Path) -> None:
    """Remove a checkpoint that nobody needs. Where that cannot be, say so: a run does not end for it."""
    partial = checkpoint.with_suffix(".partial")  # what is half removed is no checkpoint
    try:
        remove(checkpoint.rename(partial))
    except OSError as error:
        print(f"note: {partial} could not be removed: {error.strerror}", flush=True)


def append(file, line: dict) -> None:
    """Append a line of JSON and flush it. Processes that do not log do nothing."""
    if file is not None:
        file.write(json.dumps(line).encode() + b"\n")
        file.flush()
