"""What a run says: the lines of metrics.jsonl and timings.jsonl, and what it prints. docs/metrics.md explains each key.

What is measured stays on the device until a line is due, so that no step waits for it.
"""

import math
import re
import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dro import MORE_POINTS_THAN, WITH_REFERENCES, Mixture, Point
from masks import PruningMasks
from model import Gates, LlamaConfig
from plumbing import cost, parallel
from plumbing.command_line import fields, tell_torchrun
from plumbing.data import BatchReader
from plumbing.run import Run
from plumbing.settings import SHAPE, Settings
from scaling_law import FitError

GATE_BINS = 32  # hidden and ffn gates are logged as means over at most this many bins


class Meter:
    """What the steps since the last log line measured, on the device."""

    def __init__(self, n_domains: int, device: torch.device):
        # of this process's sequences: sum of cross entropies and number of tokens of each domain
        self.sums = torch.zeros(2, n_domains, dtype=torch.float64, device=device)
        self.constraint, self.stats, self.norm = torch.zeros(()), {}, torch.zeros(())
        self.bad_step = torch.full((), -1.0, device=device)  # the first step whose gradient is not finite

    def add(self, domain: Tensor, nll: Tensor) -> None:
        """Count the cross entropies (b, T) of a micro-batch, whose domains are (b,)."""
        tokens = torch.full_like(domain, nll.shape[1], dtype=torch.float64)
        # multiples of 2^-20 have the same sum in any order: over processes, and where a run was stopped and went on
        total = nll.detach().sum(1, dtype=torch.float64).mul(2**20).round().div(2**20)
        self.sums.index_add_(1, domain, torch.stack((total, tokens)))

    def found_inf(self, step: int, norm: Tensor) -> Tensor:
        """Keep the norm of a step's gradients. Returns what AdamW reads as `found_inf`: 1 from the first step on whose
        norm is not finite, so that neither that step nor a later one changes anything."""
        self.norm = norm
        self.bad_step = self.bad_step.masked_fill((self.bad_step < 0) & ~norm.isfinite(), step)  # `where` would wait
        return (self.bad_step >= 0).float()

    def totals(self) -> Tensor:
        """`sums` of all processes."""
        return parallel.sum_(self.sums.clone())

    def check(self, domains: list[str]) -> None:
        """End the run if a gradient was not finite."""
        if (step := int(self.bad_step)) >= 0:
            mine = [d for d, x in zip(domains, self.sums[0].tolist()) if not math.isfinite(x)]
            bad = [f"{d} in process {i}" for i, found in enumerate(parallel.gather(mine)) for d in found]
            where = f"cross entropy of domain {', '.join(bad)}" if bad else "gradient"
            give_up(f"step {step}: the {where} is not finite; from this step on nothing was updated")


class Clock:
    """Measures the seconds of a run, those before it was stopped included, and of training since the last line."""

    def __init__(self, step: int = 0, seconds: float = 0.0):
        self.first_step = self.last_step = step
        self.before, self.started, self.since = seconds, time.monotonic(), time.monotonic()

    def total(self) -> float:
        """Seconds since the run was begun, without those in which it did not run."""
        return self.before + time.monotonic() - self.started

    @contextmanager
    def paused(self):
        """Time spent inside is no training."""
        start = time.monotonic()
        yield
        self.since += time.monotonic() - start

    def lap(self, step: int, steps: int) -> tuple[int, float, float]:
        """(steps and seconds of training since the last lap, seconds that are left of the run)."""
        now = time.monotonic()
        done, seconds = step - self.last_step, now - self.since
        left = (steps - step) * (now - self.started) / (step - self.first_step)
        self.since, self.last_step = now, step
        return done, seconds, left


class Log:
    """Writes and prints what a run measures. `shape` is that of the model that is trained now, `source` that of the one
    that the run starts from."""

    def __init__(self, s: Settings, run: Run, reader: BatchReader, source: LlamaConfig, device: torch.device):
        self.s, self.run, self.reader, self.device = s, run, reader, device
        self.source = self.shape = source
        self.data = reader.data
        self.go_on(step=0, seconds=0.0)
        self.tokens_per_step = s.batch_size * s.seq_len

    def go_on(self, step: int, seconds: float) -> None:
        """Begin at a step that the run reached after so many seconds."""
        self.clock = Clock(step, seconds)
        self.flops, self.counted = 0.0, step  # of the model, since the last line, up to this step
        self.epochs = np.floor(self.reader.epochs())  # whole epochs of each domain that were told of

    def becomes(self, shape: LlamaConfig, step: int) -> None:
        """From this step on the model has another shape."""
        self._count(step)
        self.shape = shape

    def _count(self, step: int) -> None:
        tokens = (step - self.counted) * self.tokens_per_step
        self.flops += tokens * cost.flops_per_token(self.shape, self.s.seq_len)
        self.counted = step

    def settings(self, mixture: Mixture) -> None:
        """Print all settings, and notes on those that may not do what is expected of them."""
        s = self.s
        for key, value in asdict(s).items():
            if not (s.init_from and key in SHAPE):
                say(f"{key} = {value!r}")
        for key in SHAPE if s.init_from else ():
            given, there = getattr(s, key), getattr(self.source, key)
            if given not in (fields(Settings)[key].default, there):
                say(f"note: {key} = {given} has no effect: {s.init_from} has {there}, and settings target_... prune it")
        if why := self.data.crosses_borders(s.seq_len):
            say(f"note: {why}")
        if s.warmup >= s.steps:
            say(f"note: warmup = {s.warmup} is not below steps = {s.steps}, so the learning rates rise to the end")
        if s.law != fields(Settings)["law"].default and not (s.dynamic_reference and s.schedule in WITH_REFERENCES):
            say(f"note: law = '{s.law}' has no effect: only a dynamic_reference, under dro or sheared, asks a law")
        if s.dynamic_reference and s.schedule in WITH_REFERENCES and not s.has_points_for_a_law:
            say(
                f"note: dynamic_reference has no effect: the scaling law is asked after more than {MORE_POINTS_THAN} "
                f"evaluations, so eval_interval = {s.eval_interval} must be below steps / {MORE_POINTS_THAN + 1}"
            )
        if s.schedule == "dro" and s.dynamic_ratio and np.ptp(mixture.initial) == 0:
            say("note: all domains have equal shares, so dynamic_ratio has no effect: its bounds leave no room (3.3)")
        if self.run.state is None and None not in mixture.state["reference"]:
            losses = zip(mixture.domains, mixture.state["reference"])
            say("reference losses: " + "  ".join(f"{domain} {loss:.3f}" for domain, loss in losses))

    def begin(self, step: int, mixture: Mixture) -> None:
        """The first line: what kind of run this is. Where a run goes on with other settings, it comes again, and says
        after how many steps and with which mixture."""
        s, changed = self.s, {}
        target = s.target_shape(self.source) if s.cut_at else None  # what is cut out at once is never gated
        source = self.source if s.cut_at else self.shape
        if self.run.changed:
            changed = {
                "changed": {key: {"was": was, "now": now} for key, (was, now) in self.run.changed.items()},
                "step": step,
                "weights": self._by_domain(mixture.weights),
                "ratio": self._by_domain(mixture.state["ratio"]),
            }
            say(
                "changed: "
                + "; ".join(f"{key} was {was!r}, now {now!r}" for key, (was, now) in self.run.changed.items())
            )
        self.run.log(
            type="run",
            name=Path(s.out).name,
            stage=s.stage,
            steps=s.steps,
            tokens_per_step=self.tokens_per_step,
            domains=self.data.domains,
            schedule=s.schedule,
            dynamic_reference=s.dynamic_reference,
            dynamic_ratio=s.dynamic_ratio,
            source=source.shape,
            target=target.shape if target else None,
            parameters=source.n_params(),
            **changed,
        )

    def training(self, step: int, meter: Meter, lr: float, weights: np.ndarray) -> None:
        """The line of the steps since the last one. Here the device is waited for."""
        meter.check(self.data.domains)
        self._tell_of_new_epochs()
        sums, counts = meter.totals()
        meter.sums.zero_()
        means = (sums / counts).tolist()
        loss = (sums.sum() / counts.sum()).item()
        constraint = {"constraint": meter.constraint.item(), **by_name(meter.stats)} if meter.stats else {}
        self.run.log(
            type="train",
            step=step,
            tokens=int(self.reader.tokens_seen().sum()),
            loss=loss,
            lr=lr,
            grad_norm=meter.norm.item(),
            weights=self._by_domain(weights),
            epochs=self._by_domain(self.reader.epochs()),
            domain_loss=self._by_domain([m if math.isfinite(m) else None for m in means]),
            **constraint,
        )
        text = f"step {step}/{self.s.steps}  loss {loss:.4f}"
        if constraint:
            target = constraint["target_sparsity"]
            sparsity = " ".join(f"{g} {x:.3f}/{target[g]:.3f}" for g, x in constraint["sparsity"].items())
            text += f"  constraint {constraint['constraint']:+.4f}  sparsity {sparsity}"
        say(f"{text}  lr {lr:.2e}  {self._timing(step)}")

    def _tell_of_new_epochs(self) -> None:
        """Say once an epoch that all text of a domain has been read, and comes again."""
        epochs = np.floor(self.reader.epochs())
        for domain, before, now in zip(self.data.domains, self.epochs, epochs):
            if now > before:
                say(f"note: all text of domain {domain} has been read, and comes again: epoch {int(now) + 1} begins")
        self.epochs = epochs

    def _timing(self, step: int) -> str:
        """Write a line of timings.jsonl, and return its text. Another run of the same settings has other numbers."""
        device = self.device
        steps, seconds, left = self.clock.lap(step, self.s.steps)
        speed = steps * self.tokens_per_step / seconds
        self._count(step)
        flops, self.flops = self.flops / seconds / parallel.size(), 0.0
        peak = cost.peak_flops(device, self.s.dtype)
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory()
        self.run.time(
            step=step,
            seconds=round(self.clock.total(), 3),
            tokens_per_second=round(speed, 1),
            mfu=round(flops / peak, 4) if peak else None,
            peak_memory=memory,
        )
        utilisation = f"  MFU {flops / peak:.1%}" if peak else ""
        return f"{speed:,.0f} tokens/s{utilisation}  {memory / 1e9:.1f} GB  {clock_face(left)} left"

    def evaluation(
        self,
        step: int,
        losses: dict,
        course: list[Point],
        mixture: Mixture,
        masks: PruningMasks | None,
        z: Gates | None,
    ) -> None:
        """The line of an evaluation. course: where the run is, some points on its way, and where it will end. z: the
        gates that the losses were measured with."""
        now, end = course[0], course[-1]
        gates = {}
        if masks:
            gates["gates"] = None if z is None else gate_picture(z)
            gates["sparsity"] = masks.sparsity(step)
        self.run.log(
            type="eval",
            step=step,
            tokens=int(self.reader.tokens_seen().sum()),
            domain_tokens=self._by_domain(now.tokens.astype(int)),
            parameters=now.params,
            loss=losses,
            bits_per_byte=self.data.bits_per_byte(losses, "val"),
            epochs=self._by_domain(self.reader.epochs()),
            reference=self._by_domain(mixture.state["reference"]),
            reference_is=self._by_domain(mixture.state["reference_is"]),
            prediction=self._by_domain(mixture.predictions(end)),
            no_prediction=self._by_domain([str(x) if isinstance(x, FitError) else None for x in mixture.laws]),
            curve=self._curve(step, course, mixture),
            ratio=self._by_domain(mixture.state["ratio"]),
            weights=self._by_domain(mixture.weights),
            **gates,
        )
        say(
            f"step {step}: validation loss {np.mean(list(losses.values())):.4f}  "
            + "  ".join(f"{d} {loss:.3f}" for d, loss in losses.items())
        )
        say("    domain weights: " + "  ".join(f"{d} {w:.3f}" for d, w in zip(self.data.domains, mixture.weights)))

    def _curve(self, step: int, course: list[Point], mixture: Mixture) -> dict | None:
        """The predicted loss of each domain on the way to the end; None before there is a law."""
        lines = [mixture.predictions(point) for point in course]
        if all(loss is None for loss in lines[0]):
            return None
        steps = step + np.linspace(0, 1, len(course)) * (self.s.steps - step)
        by_domain = [None if None in line else list(line) for line in zip(*lines)]
        return {"step": steps.tolist(), "loss": dict(zip(self.data.domains, by_domain))}

    def end(self, losses: dict, model: LlamaConfig, z: Gates | None) -> None:
        """The last line: what the finished model is, measured as it was written."""
        self.run.log(
            type="end",
            step=self.s.steps,
            loss=losses,
            bits_per_byte=self.data.bits_per_byte(losses, "val"),
            parameters=model.n_params(),
            gates=None if z is None else gate_picture(z),
        )
        mean = np.mean(list(losses.values()))
        say(f"{self.run.path / 'model'}: {model.n_params():,} parameters, validation loss {mean:.4f}")

    def _by_domain(self, values) -> dict:
        """Domain -> plain Python value."""
        if values is None:
            return dict.fromkeys(self.data.domains)
        plain = (v if v is None or isinstance(v, str) else np.asarray(v).item() for v in values)
        return dict(zip(self.data.domains, plain))


def by_name(stats: dict) -> dict:
    """granularity -> {name: tensor}, as `lagrangian` gives it, to name -> {granularity: number}."""
    names = next(iter(stats.values()))
    return {name: {g: float(values[name]) for g, values in stats.items()} for name in names}


def gate_picture(z: Gates) -> dict:
    """Gates as lists; hidden and ffn as means over at most GATE_BINS bins."""

    def bins(x):
        parts = x.float().tensor_split(min(GATE_BINS, x.shape[-1]), dim=-1)
        return torch.stack([part.mean(-1) for part in parts], -1)

    picture = {}
    for name, x in zip(z._fields, z):
        if x is not None:
            x = (bins(x) if name in ("hidden", "ffn") else x).detach().cpu().tolist()
        picture[name] = x
    return picture


def say(text: str) -> None:
    """Print, in one process."""
    if parallel.is_first():
        print(text, flush=True)


def give_up(text: str) -> None:
    """End the run. All processes must call it; one of them says why."""
    tell_torchrun(f"train.py: {text}")
    sys.exit(f"train.py: {text}" if parallel.is_first() else 1)


def host_memory() -> int:
    """Most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status")
    # Linux's getrusage would count what the process that started this one had, too
    if status.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def clock_face(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
