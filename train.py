"""One loop for all three stages: pretrain a source model, prune it, continue the training of the small model.

    python train.py config/toy_pretrain.py                     # a small Llama from scratch, on a laptop
    python train.py config/toy_prune.py                        # prune it by its activations, train the small model
    python train.py config/toy_gates.py                        # or learn what to keep, as the paper does
    python train.py config/toy_continue.py --schedule=constant # train the small model on, with a fixed mixture
    python train.py --help                                     # all settings

What a run is follows from its settings: `init_from` empty means from scratch, a target shape means pruning.
Every step draws a batch by the current domain weights, samples the gates (pruning), and descends

    cross entropy (of the gated model)  +  constraint (paper, eq. 1)

on the weights and log_alpha while lambda and phi ascend. Every `eval_interval` steps the validation losses of the
domains move the domain weights (dro.py). A run that is stopped goes on from its newest checkpoint.
"""

import gc
import math
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dro import Mixture, Point
from eval import domain_losses
from masks import LOG_ALPHA_MAX, PruningMasks, extract
from model import Gates, Llama, LlamaConfig, read_config
from plumbing import choices, cost, parallel
from plumbing import cut as cutting
from plumbing.command_line import command, load, user_errors
from plumbing.data import BatchReader, TokenData
from plumbing.dataset import DamagedData
from plumbing.log import Log, Meter, give_up, say
from plumbing.models import directory_of, save_model
from plumbing.parallel import Engine
from plumbing.run import Run, newest_checkpoint
from plumbing.settings import Settings
from plumbing.sources import open_sources

CALIBRATION_STEPS = 4  # a choice that looks at text looks at the batches of so many steps


class Trainer:
    """One run, from its first step to the finished model: the same on a CPU, on 8 GPUs, and in the dry run."""

    def __init__(self, s: Settings, model: Llama, masks: PruningMasks | None, reader: BatchReader, mixture: Mixture):
        self.s, self.masks, self.reader, self.mixture = s, masks, reader, mixture
        self.model, self.engine = model, Engine(model, s.dtype, s.shard_gradients)
        self.tree = nn.ModuleDict({"model": model} if masks is None else {"model": model, "masks": masks})
        self.optimizer = make_optimizer(s, model, masks)
        self.meter = Meter(len(mixture.domains), self.engine.device)
        self.kept = None  # what is kept, once the small model was cut out

    def train(self, run: Run, log: Log, first: int = 0) -> int:
        """The steps from `first` on, until the small model is to be cut out, or else all. Returns how many are done.
        SystemExit when the run is told to stop before the last."""
        s, masks, engine, optimizer, meter = self.s, self.masks, self.engine, self.optimizer, self.meter
        end = s.cut_at if masks else s.steps
        engine.begin()
        gc.collect()  # after a cut: the large model is in cycles that nothing else holds
        per_token = parallel.size() / (s.batch_size * s.seq_len)  # a mean over processes follows
        for step in range(first, end):
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * lr_scale(step, s)
            for part in engine.micro_batches(self.reader.next_batch(step, self.mixture.weights)):
                z = masks.sample(s.seed, step, part.gate_sample) if masks else None
                nll = engine(part.tokens[:, :-1], z, targets=part.tokens[:, 1:])  # (b, T) cross entropies, nats
                (nll.sum() * per_token).backward()
                meter.add(part.domain, nll)
            learning = masks is not None and step < masks.settle_at  # then the choice is fixed
            if learning:
                parallel.average_gradients(masks.parameters())
                meter.constraint, meter.stats = masks.lagrangian(step)  # eq. 1; every process has all of it
                meter.constraint.backward()
            else:
                meter.stats = {}
            norm = parallel.clip_gradients(self.tree.values(), s.grad_clip or math.inf)
            optimizer.found_inf = meter.found_inf(step, norm)  # AdamW skips its update once a gradient is not finite
            optimizer.step()
            optimizer.zero_grad()
            if learning:
                masks.clamp_()

            done, last = step + 1, step + 1 == s.steps
            if done % s.log_interval == 0 or last:
                log.training(done, meter, optimizer.param_groups[0]["lr"], self.mixture.weights)
            if done % s.eval_interval == 0 or last:
                self.evaluate(log, done)  # losses -> law -> reference -> weights
            stop = run.interrupted() or done == s.stop_at
            if done % s.save_interval == 0 or last or stop:
                self.save(run, log, done)
            run.finish_save(wait=last or stop)  # of a checkpoint that is being written in the background
            if stop and not last:
                say(f"stopped after step {done}; {run.way_on} goes on from here")
                engine.close()
                sys.exit(run.exit_status)
        return end

    def evaluate(self, log: Log, step: int) -> None:
        """Measure the validation loss of each domain, move the domain weights by it, log both."""
        s, masks, mixture = self.s, self.masks, self.mixture
        self.meter.check(mixture.domains)
        with log.clock.paused():
            z = masks.evaluated(step) if masks else None
            losses = validation_losses(s, self.model, self.reader.data, z)
            course = self.course(step)
            now, *_, end = course
            try:
                mixture.update(step / s.steps, list(losses.values()), now, end)
            except ValueError as error:
                give_up(f"step {step}: {error}")
            mixture.state = parallel.from_first(mixture.state)
            log.evaluation(step, losses, course, mixture, masks, z)

    def course(self, step: int) -> list[Point]:
        """Nine points from here to the end of the run on the scaling law's axes. We assume that each domain gets tokens
        at its average rate so far, because the weights jump. Parameters and learning rate follow their schedules."""
        s, left = self.s, self.s.steps - step
        seen = self.reader.tokens_seen()
        at_end = float(seen.sum()) + left * s.batch_size * s.seq_len  # tokens of all domains
        seen_at_end = seen * (at_end / max(1, seen.sum()))
        params = params_at_end = float(self.model.config.n_params())
        if self.masks:
            params, params_at_end = self.masks.expected_params(step), float(self.masks.target.n_params())
        points = []
        for share in np.linspace(0, 1, 9):
            pruned = 1.0 if share == 1 else min(1.0, share * left / max(1, s.pruned_at - step))  # at the end: all of it
            rate = lr_scale(max(0, step + share * left - 1), s)  # of the last update
            tokens = seen + share * (seen_at_end - seen)
            points.append(Point(tokens, params + pruned * (params_at_end - params), rate))
        return points

    def save(self, run: Run, log: Log, step: int) -> None:
        """Write a checkpoint: all that the run needs to go on as if it had not stopped."""
        self.meter.check(self.mixture.domains)
        state = {
            "settings": run.settings,
            "digests": run.digests,
            "source": asdict(self.model.config),
            "target": asdict(self.masks.target) if self.masks else None,
            "settled": self.masks is not None and step >= self.masks.settle_at,
            "kept": self.kept,
            "mixture": self.mixture.state,
            "reader": self.reader.state_dict(),
            "tokenizer": self.reader.data.tokenizer,
            "fingerprint": self.reader.data.fingerprint,
            "unlogged": self.meter.totals().tolist(),
            "seconds": log.clock.total(),
        }
        in_background = self.engine.device.type == "cuda"
        run.save(step, self.tree, self.optimizer, state, self.s.keep_checkpoints, in_background=in_background)

    def restore(self, run: Run, log: Log) -> None:
        """Take up what `save` wrote. ValueError where a file of it is damaged."""
        state, given = run.state, self.mixture.state
        run.load(self.tree, self.optimizer)
        self.mixture.state, self.kept = state["mixture"], state["kept"]
        if "ratio" in run.changed or self.s.schedule == "constant":
            self.mixture.state |= {key: given[key] for key in ("weights", "ratio")}
        if None not in given["reference"] and run.new_references:
            self.mixture.state |= {key: given[key] for key in ("reference", "reference_is")}
        if parallel.is_first():
            self.meter.sums += torch.tensor(state["unlogged"], dtype=torch.float64, device=self.engine.device)
        log.go_on(state["step"], state["seconds"])
        say(f"going on from {run.checkpoint}")

    def finish(self, run: Run, log: Log, make: Callable[..., Llama]) -> None:
        """Cut the small model out, write model/, measure what was written."""
        s, masks, directory = self.s, self.masks, run.path / "model.partial"
        whole = get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        self.engine.release()
        self.optimizer.state.clear()  # the finished model takes its place
        if masks and s.settles:
            choices.settle_(masks)
        z = masks.deterministic(at_target=True) if masks else None
        with user_errors(ValueError), parallel.together():  # the directory of the source may be damaged by now
            if parallel.is_first():
                model, kept = Llama.of_weights(self.model.config, whole), self.kept
                if masks:
                    masks.cpu()  # as the weights are
                    kept, model = choices.describe(masks), extract(model, masks)
                save_model(directory, model, kept, s.init_from, self.reader, getattr(torch, s.export_dtype))
                del model
        del whole
        # weights that are not finite, after the last step or in the dtype of the export
        with user_errors(ValueError), parallel.together():
            small = make(read_config(directory), directory, checkpoint_layers=False, compiled=False)
        log.end(validation_losses(s, small, self.reader.data), small.config, z)
        if parallel.is_first():
            directory.rename(run.path / "model")


def validation_losses(s: Settings, model: Llama, data: TokenData, z: Gates | None = None) -> dict[str, float]:
    """Validation loss of each domain, nats per token, in the dtype of the training."""
    _, micro_batch = s.split_batch(parallel.size())
    with parallel.autocast(model, s.dtype, cached=False):
        return domain_losses(model, data, "val", s.seq_len, s.eval_sequences, micro_batch, z)


# -- what a run is made of ------------------------------------------------------------------------------------------


def make_optimizer(s: Settings, model: Llama, masks: PruningMasks | None) -> torch.optim.AdamW:
    """One AdamW: weights and log_alpha descend, lambda and phi ascend, each group at its own peak rate."""
    groups = [{"params": list(model.parameters()), "peak_lr": s.lr, "weight_decay": s.weight_decay}]
    if masks is not None:
        log_alphas = [distribution.log_alpha for distribution in masks.distributions().values()]
        groups.append({"params": log_alphas, "peak_lr": s.gate_lr})
        groups.append({"params": list(masks.multipliers.parameters()), "peak_lr": s.multiplier_lr, "maximize": True})
    return torch.optim.AdamW(groups, betas=(s.beta1, s.beta2), eps=s.eps, weight_decay=0.0, fused=True)


def lr_scale(step: float, s: Settings) -> float:
    """Share of their peaks that all learning rates have at a step: linear warm-up, then cosine down to min_lr."""
    if step < s.warmup:
        return min(1.0, (step + 1) / s.warmup)  # `course` asks for steps between two
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def make_mixture(s: Settings, data: TokenData, references: dict[str, float] | None) -> Mixture:
    """The domain weights at the start of a run."""
    initial = [s.ratio[d] if s.ratio else data.tokens(d, "train").size for d in data.domains]
    return Mixture(s, data.domains, initial, [references[d] for d in data.domains] if references else None)


def make_masks(s: Settings, source: LlamaConfig, target: LlamaConfig) -> PruningMasks:
    """The gates of a pruning run."""
    noise_to, settle_at = s.noise_to or math.inf, s.settle_at if s.settles else math.inf
    log_alpha = s.log_alpha if s.learns_gates else LOG_ALPHA_MAX  # a choice starts with all gates at 1
    settling = {"noise_from": s.noise_from, "noise_to": noise_to, "settle_at": settle_at, "fade": s.fade}
    masks = PruningMasks(source, target, s.sparsity_warmup, log_alpha, s.phi, **settling)
    masks.clamp_()
    return masks.requires_grad_(s.learns_gates)


def choose_(s: Settings, masks: PruningMasks, reader: BatchReader, model: Llama) -> None:
    """Fix a choice that is not learned, of the source `model`. Some look at the text that the first steps will read.
    Where the model is sharded, the first process reads it whole. ValueError for a file that is no choice."""
    if s.gates in choices.OF_MODEL and parallel.is_sharded(model):
        model = Llama.from_pretrained(directory_of(s.init_from)).to(reader.device)
        model.checkpoint_layers = s.activation_checkpointing
    weights = make_mixture(s, reader.data, None).weights
    text = reader.peek(CALIBRATION_STEPS, weights) if s.gates in choices.WITH_TEXT else []
    text = [tokens.to(reader.device) for tokens in text]
    with torch.compiler.set_stance("force_eager"):  # hooks need values inside a layer; no layer is compiled for this
        scores = choices.scores(s.gates, masks, model, text, s.seed)
    choices.choose_(masks, scores)


def cut(trainer: Trainer, run: Run, log: Log, make: Callable[..., Llama], step: int) -> Trainer:
    """The trainer that goes on after `step` steps with the small model, which is cut out of weights and moments."""
    s, masks, path = trainer.s, trainer.masks.cpu(), run.path / "cut.partial"
    trainer.meter.check(trainer.mixture.domains)
    with log.clock.paused():
        choices.settle_(masks)
        cutting.write(path, trainer.tree, trainer.optimizer, masks)
        trainer.engine.release()
        trainer.optimizer.state.clear()  # our caller still holds the large model: only its weights stay
        small = Trainer(s, make(masks.target, path / cutting.WEIGHTS), None, trainer.reader, trainer.mixture)
        cutting.read_moments(path, small.model, small.optimizer, step)
    small.kept = choices.describe(masks)
    small.meter.sums = trainer.meter.sums  # of the steps since the last log line
    log.becomes(masks.target, step)
    parallel.barrier()
    if parallel.is_first():
        shutil.rmtree(path)
    return small


def rehearse(s: Settings, source: LlamaConfig, rehearsal: cost.Rehearsal) -> None:
    """Train on shapes without content, for the dry run. The rehearsal stands in for the batches and for the run. Its
    settings are such that nothing is logged, evaluated or saved."""
    shape, masks = source, None
    if target := s.target_shape(source):
        with rehearsal.device:
            shape, masks = (source, make_masks(s, source, target)) if s.cut_at else (target, None)
    layers = {**rehearsal.sharding, "checkpoint_layers": s.activation_checkpointing}
    model = parallel.make_model(shape, None, rehearsal.device, **layers)
    trainer = Trainer(s, model, masks, rehearsal, Mixture(s, ["all"], [1.0]))
    rehearsal.watch(trainer)
    trainer.train(run=rehearsal, log=None)


def set_up(s: Settings) -> tuple[Trainer, Run, Log, Callable[..., Llama]] | None:
    """Everything that a run needs, or None where it is finished already. ValueError for what is not right. All of it is
    read and checked before anything is written."""
    device = parallel.start(parallel.find_device(s.device))
    torch.set_num_threads(s.threads or torch.get_num_threads())
    sharding = parallel.sharding(s.parallel, s.dtype, device)
    layers = {"checkpoint_layers": s.activation_checkpointing, "compiled": s.compile}
    make = partial(parallel.make_model, device=device, **sharding, **layers)
    with parallel.together():
        sources = open_sources(s, device)
        if sources is None:
            return None
        run, reader, shape = sources.run, sources.reader, sources.shape
        masks = reference_model = None
        if target := s.target_shape(shape):
            run.check_choice(s.settle_at or s.cut_at)
            if run.state and run.state["kept"]:
                shape = target  # the small model was cut out already
            else:
                masks = make_masks(s, shape, target)
        run.check_model(shape, masks)
        model = make(shape, sources.start)
        if masks and s.gates != "learned" and run.state is None and parallel.is_first():
            choose_(s, masks, reader, model)
        if sources.reference:
            reference_model = parallel.read_model(sources.reference, device, **sharding)

    with parallel.together():
        run.check_processes()
    if masks:
        masks.load_state_dict(parallel.from_first(masks.state_dict()))
        masks.to(device)
    references = s.reference_losses or None
    if reference_model:
        say(f"measuring the reference losses on {s.reference_model}")
        references = validation_losses(s, reference_model, reader.data)
        del reference_model
    s = replace(s, export_dtype=sources.export_dtype)
    mixture, log = make_mixture(s, reader.data, references), Log(s, run, reader, sources.shape, device)
    log.shape = shape
    if why := sources.from_the_beginning:
        say(f"note: this run reads {s.data} from its beginning, not from where {s.init_from} stopped: {why}")
    log.settings(mixture)
    trainer = Trainer(s, model, masks, reader, mixture)
    if run.state:
        with parallel.together():
            trainer.restore(run, log)
    run.open()
    return trainer, run, log, make


def main():
    """Settings to a model, its gates, data and mixture; from there to the last step; from there to model/."""
    with user_errors():
        s = load(Settings, sys.argv[1:])
        if s.dry_run:
            return cost.dry_run(s, rehearse)
        if (what := set_up(s)) is None:
            return
    trainer, run, log, make = what
    del what  # after a cut, nothing may hold the large model
    first = run.state["step"] if run.state else 0
    try:
        with run.ending():
            if trainer.masks and s.cut_at == 0:  # a choice at one stroke
                trainer = cut(trainer, run, log, make, first)
            if first == 0 or run.changed:
                log.begin(first, trainer.mixture)
            if first == 0:
                trainer.evaluate(log, step=0)
            first = trainer.train(run, log, first)
            if first < s.steps:
                trainer = cut(trainer, run, log, make, first)
                trainer.train(run, log, first)
            trainer.finish(run, log, make)
    except BrokenPipeError:  # nobody reads what is printed: for `command`
        raise
    except OSError as error:
        newest = None
        with suppress(OSError, ValueError):
            newest = newest_checkpoint(run.path)
        where = f"{run.way_on} goes on from {newest}" if newest else "there is no checkpoint yet"
        sys.exit(f"train.py: could not write to {run.path}: {error}; {where}")
    except DamagedData as error:  # only the process that has read it can say so
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    trainer.engine.close()


if __name__ == "__main__":
    command(main)
