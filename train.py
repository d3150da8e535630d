"""One loop for all three stages: pretrain a source model, prune it, continue the small model's training.

    python train.py config/toy_pretrain.py                     # a small Llama from scratch, on a laptop
    python train.py config/toy_prune.py                        # learn what to keep, with DRPruning; cut it out
    python train.py config/toy_continue.py --schedule=constant # train the small model on, with a fixed mixture
    python train.py --help

What a run is follows from its settings: `init_from` empty means from scratch, a target shape means pruning.
Every step draws a batch by the current domain weights, samples gates (pruning), and descends

    cross entropy (of the gated model)  +  constraint (paper, eq. 1)

on the weights and log_alpha while lambda and phi ascend. Every `eval_interval` steps the validation loss of each
domain moves the domain weights (dro.py). A run that is stopped goes on from its newest checkpoint.
"""

import json
import math
import re
import resource
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from dro import MORE_POINTS_THAN, Mixture
from eval import bits_per_byte, domain_losses
from masks import PruningMasks, describe, extract, magnitude_scores, random_scores, scores_of
from model import Gates, Llama, LlamaConfig, read_config
from plumbing import cost, parallel
from plumbing.checkpoint import (
    PRUNING,
    Run,
    check_tokenizer,
    directory_of,
    model_directory,
    newest_checkpoint,
    save_model,
)
from plumbing.command_line import load, user_errors
from plumbing.data import BatchReader, TokenData

GATE_BINS = 32  # hidden and ffn gates are logged as means over at most this many bins


@dataclass(frozen=True)
class Settings:
    """python train.py [config/FILE.py] [--key=value ...]   settings, their defaults and meaning:"""

    # files
    data: Annotated[str, "data set made by prepare_data.py"] = "data/demo"
    domains: Annotated[list, "domains of it to use, [] = all"] = field(default_factory=list)
    out: Annotated[str, "directory of this run"] = "out/run"
    resume: Annotated[
        str,
        "'auto': go on from the newest checkpoint in `out`; 'never': refuse if there is one; or a run to go on from",
    ] = "auto"
    save_interval: Annotated[int, "steps between checkpoints"] = 200
    keep_checkpoints: Annotated[int, "how many checkpoints to keep, the newest"] = 2
    stop_at: Annotated[int, "save and stop after this step as if interrupted, 0 = go to the end"] = 0

    # model: a shape from scratch, or a model to start from and what to prune it to
    init_from: Annotated[str, "model directory or run to start from, '' = from scratch with the shape below"] = ""
    n_layer: Annotated[int, "layers"] = 6
    d_model: Annotated[int, "hidden dimensions"] = 128
    n_head: Annotated[int, "query heads"] = 4
    n_kv_head: Annotated[int, "key/value heads, 0 = n_head"] = 0
    head_dim: Annotated[int, "dimensions per head, 0 = d_model / n_head"] = 0
    d_ffn: Annotated[int, "feed-forward dimensions"] = 344
    tie_embeddings: Annotated[bool, "share input and output embedding"] = False
    target_n_layer: Annotated[int, "layers to keep, 0 = all"] = 0
    target_d_model: Annotated[int, "hidden dimensions to keep, 0 = all"] = 0
    target_n_head: Annotated[int, "query heads to keep a layer, 0 = all; KV groups go whole"] = 0
    target_d_ffn: Annotated[int, "feed-forward dimensions to keep a layer, 0 = all"] = 0

    # gates
    gate_samples: Annotated[int, "times per step that gates are drawn, each for an equal part of the batch"] = 1
    gates: Annotated[str, "'learned'; or cut first, then train: 'random', 'magnitude', or a pruning.json"] = "learned"
    sparsity_warmup: Annotated[int, "steps in which the target sparsity ramps up"] = 640
    gate_lr: Annotated[float, "peak learning rate of log_alpha"] = 1.0
    multiplier_lr: Annotated[float, "peak learning rate of lambda and phi"] = 1.0
    log_alpha: Annotated[float, "initial log_alpha of every gate (clamped to ±4.605)"] = math.log(100)
    phi: Annotated[float, "initial phi of every granularity"] = 0.0

    # optimization
    steps: Annotated[int, "optimizer steps"] = 1000
    batch_size: Annotated[int, "sequences per step"] = 8
    micro_batch: Annotated[
        int, "sequences at once in a process, 0 = as many as it can be; only rounding depends on it"
    ] = 0
    seq_len: Annotated[int, "tokens per sequence"] = 256
    lr: Annotated[float, "peak learning rate of the weights; all rates follow the same warm-up and cosine"] = 1e-4
    min_lr: Annotated[float, "final learning rates as a share of the peak"] = 0.1
    warmup: Annotated[int, "steps of linear learning-rate warm-up"] = 0
    beta1: Annotated[float, "AdamW"] = 0.9
    beta2: Annotated[float, "AdamW"] = 0.95
    eps: Annotated[float, "AdamW"] = 1e-8
    weight_decay: Annotated[float, "AdamW"] = 0.0
    grad_clip: Annotated[float, "largest norm of all gradients together, 0 = no clipping"] = 1.0

    # domains
    ratio: Annotated[dict, "initial share of each domain, {} = by its number of tokens"] = field(default_factory=dict)
    schedule: Annotated[
        Literal["constant", "sheared", "dro"],
        "how evaluations move the domain weights; 'sheared' is Sheared LLaMA's without dynamic_reference",
    ] = "constant"
    dynamic_reference: Annotated[
        bool, "reference loss from the scaling law's prediction (section 3.2), for 'dro' and 'sheared'"
    ] = False
    dynamic_ratio: Annotated[bool, "reference ratio follows the weights (section 3.3), for 'dro'"] = False
    law: Annotated[
        Literal["rate", "paper"], "what predicts: eq. 4 with a learning-rate term, all domains together; or eq. 4 alone"
    ] = "rate"
    reference_losses: Annotated[dict, "first reference loss of each domain in nats per token"] = field(
        default_factory=dict
    )
    reference_model: Annotated[str, "model whose validation losses are the first references, '' = none"] = ""
    rho: Annotated[float, "radius of the robust set (eq. 5)"] = 0.1
    floor: Annotated[
        float, "least weight of a domain, as a share of its reference ratio, before the weights are made to sum to 1"
    ] = 0.2
    temperature: Annotated[
        float, "nats of excess by which a share rises by its ratio at most, so that noise moves little; 0 = the paper's"
    ] = 0.0
    delta: Annotated[float, "how fast the reference ratio follows the weights"] = 0.1
    bound: Annotated[
        float, "reference ratio: 1/bound to bound times the initial one, and within its smallest and largest share"
    ] = 2.0
    step_size: Annotated[float, "step size of the sheared schedule"] = 1.0
    clip_excess: Annotated[bool, "sheared: count losses below the reference as 0, as its paper has it"] = False
    eval_interval: Annotated[int, "steps between evaluations"] = 50
    eval_sequences: Annotated[int, "validation sequences per domain"] = 16

    # machine
    seed: Annotated[int, "seed of initial weights, gates and data order"] = 0
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', ...; 'auto' = cuda if there is one"] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"], "of the matrix products (with fsdp, of all but the loss); weights stay float32"
    ] = "float32"
    parallel: Annotated[Literal["ddp", "fsdp"], "several processes: each holds the whole model, or a shard"] = "ddp"
    shard_gradients: Annotated[bool, "fsdp: average after every micro-batch: less memory, more traffic"] = False
    activation_checkpointing: Annotated[bool, "compute each layer again in the backward pass: less memory"] = False
    compile: Annotated[bool, "torch.compile each layer"] = False
    threads: Annotated[int, "CPU threads, 0 = torch's choice"] = 0
    log_interval: Annotated[int, "steps between log lines"] = 10

    # what would it cost?
    dry_run: Annotated[bool, "run two steps without memory and print what the run would need; nothing is written"] = (
        False
    )
    world_size: Annotated[int, "of the dry run: GPUs"] = 1
    gpu: Annotated[str, "of the dry run: h100, h200, a100, a100-40gb, or a memory size such as 24GB"] = "h100"
    utilisation: Annotated[float, "of the dry run: share of the GPU's peak (in the run's dtype) that is reached"] = 0.4

    def __post_init__(self):
        positive = "steps batch_size seq_len n_layer d_model n_head d_ffn eval_interval eval_sequences log_interval "
        positive += "save_interval keep_checkpoints bound gate_samples world_size"
        not_negative = "lr gate_lr multiplier_lr weight_decay eps warmup sparsity_warmup phi grad_clip rho temperature "
        not_negative += "step_size seed stop_at micro_batch threads n_kv_head head_dim "
        not_negative += "target_n_layer target_d_model target_n_head target_d_ffn"
        limits = {positive: (1, math.inf), not_negative: (0, math.inf), "min_lr delta": (0, 1)}
        limits |= {"beta1 beta2 floor": (0, 0.999), "utilisation": (0.01, 1)}
        wrong = [
            f"{name} = {getattr(self, name)} must be " + (f"at least {low}" if high == math.inf else f"{low} to {high}")
            for names, (low, high) in limits.items()
            for name in names.split()
            if not (low <= getattr(self, name) <= high and math.isfinite(getattr(self, name)))
        ]
        for name in ("ratio", "reference_losses"):
            values = getattr(self, name).values()
            if not all(type(value) in (int, float) and 0 < value < math.inf for value in values):
                wrong.append(f"{name} = {getattr(self, name)} must have a number above 0 for each domain")
        if not self.out:
            wrong.append("out is empty")
        if self.batch_size % self.gate_samples:
            wrong.append(f"batch_size = {self.batch_size} must be a multiple of gate_samples = {self.gate_samples}")
        references = self.reference_losses or self.reference_model or self.dynamic_reference
        if self.schedule != "constant" and not references:
            wrong.append(f"schedule = '{self.schedule}' needs references: set reference_model or reference_losses")
        if self.reference_losses and self.reference_model:
            wrong.append("reference_losses and reference_model are both set, one of them must be empty")
        predicted_only = self.dynamic_reference and not self.reference_losses and not self.reference_model
        if self.schedule != "constant" and predicted_only and self.steps <= self.eval_interval * (MORE_POINTS_THAN + 1):
            wrong.append(
                f"eval_interval = {self.eval_interval} must be below steps / {MORE_POINTS_THAN + 1}: with no "
                f"references given, the domain weights move only after more than {MORE_POINTS_THAN} evaluations"
            )
        if self.is_pruning and self.gates == "learned" and self.sparsity_warmup >= self.steps:
            wrong.append(
                f"sparsity_warmup = {self.sparsity_warmup} must be below steps = {self.steps}: only after "
                "it is the target sparsity reached"
            )
        if self.gates != "learned" and not self.is_pruning:
            wrong.append(f"gates = '{self.gates}' needs a target shape")
        if self.is_pruning and not self.init_from:
            wrong.append("a target shape needs a model to prune: set init_from")
        if wrong:
            raise ValueError("; ".join(wrong))

    def rows(self, processes: int) -> tuple[int, int]:
        """(sequences of a step's batch per process, sequences per micro-batch); a micro-batch never has two samples of
        the gates. ValueError where they do not divide."""
        if self.batch_size % processes:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of the {processes} processes")
        mine, sample = self.batch_size // processes, self.batch_size // self.gate_samples
        most = math.gcd(mine, sample if self.is_pruning and self.gates == "learned" else mine)
        if self.micro_batch and most % self.micro_batch:
            raise ValueError(
                f"micro_batch = {self.micro_batch} must divide {most}: batch_size = {self.batch_size} is for "
                f"{processes} processes" + f" and {self.gate_samples} gate samples" * (most < mine)
            )
        return mine, self.micro_batch or most

    def shape(self, vocab_size: int, eot: int | None = None) -> LlamaConfig:
        """Shape of a model from scratch. ValueError for one that cannot be."""
        if self.d_model % self.n_head:
            raise ValueError(
                f"d_model = {self.d_model} must be a multiple of n_head = {self.n_head}: transformers loads no other"
            )
        return LlamaConfig(
            vocab_size=vocab_size,
            n_layer=self.n_layer,
            d_model=self.d_model,
            n_head=self.n_head,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.d_model // self.n_head,
            d_ffn=self.d_ffn,
            max_seq_len=self.seq_len,
            tie_embeddings=self.tie_embeddings,
            eos_token_id=eot,
        )

    @property
    def is_pruning(self) -> bool:
        """Whether a target shape is set."""
        return any((self.target_n_layer, self.target_d_model, self.target_n_head, self.target_d_ffn))

    @property
    def stage(self) -> str:
        """'pretrain', 'prune' or 'continue', as the settings imply."""
        return "prune" if self.is_pruning else "continue" if self.init_from else "pretrain"


# settings that may change when a run goes on
FREE = set("out resume stop_at save_interval keep_checkpoints log_interval device compile threads".split())
FREE |= set("micro_batch parallel shard_gradients activation_checkpointing dry_run world_size gpu utilisation".split())


# -- what a run is made of ------------------------------------------------------------------------------------------


def make_config(s: Settings, data: TokenData) -> LlamaConfig:
    """Shape of the model that a run starts from."""
    if not s.init_from:
        return s.shape(data.vocab_size, data.eot)
    config = read_config(directory_of(s.init_from))
    check_model(s, s.init_from, config, data)
    return config


def check_model(s: Settings, name: str, config: LlamaConfig, data: TokenData) -> None:
    """ValueError unless the model can read the data, in sequences as long as the run's."""
    check_tokenizer(name, config, data)
    if s.seq_len > config.max_seq_len:
        raise ValueError(f"seq_len = {s.seq_len}: {name} was made for {config.max_seq_len} tokens at most")


def make_masks(s: Settings, source: LlamaConfig) -> PruningMasks | None:
    """The gates of a pruning run. ValueError where the target shape cannot be."""
    if not s.is_pruning:
        return None
    n_head = s.target_n_head or source.n_head
    if n_head * source.n_kv_head % source.n_head:
        group = source.n_head // source.n_kv_head
        raise ValueError(f"target_n_head = {n_head} must be a multiple of {group}, the query heads of a KV group")
    target = replace(
        source,
        n_layer=s.target_n_layer or source.n_layer,
        d_model=s.target_d_model or source.d_model,
        n_head=n_head,
        n_kv_head=n_head * source.n_kv_head // source.n_head,
        d_ffn=s.target_d_ffn or source.d_ffn,
    )
    if target.d_model % target.n_head:
        raise ValueError(
            f"target_d_model = {target.d_model} must be a multiple of the {target.n_head} heads kept: "
            "transformers loads no other Llama"
        )
    masks = PruningMasks(source, target, s.sparsity_warmup, s.log_alpha, s.phi)
    masks.clamp_()
    if not masks.gates():
        raise ValueError(f"the target shape is that of {s.init_from}: there is nothing to prune")
    if s.gates not in ("learned", "random", "magnitude"):
        try:
            masks.choose_(scores_of(masks, json.loads(Path(s.gates).read_text())))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"gates = '{s.gates}': not a pruning.json of this source and target ({error})") from None
    return masks


def cut(s: Settings, masks: PruningMasks, path: Path) -> None:
    """Write the small model of a choice that is not learned, and that choice: the training starts from it."""
    model = Llama.from_pretrained(directory_of(s.init_from))
    if s.gates == "random":
        masks.choose_(random_scores(masks, s.seed))
    elif s.gates == "magnitude":
        masks.choose_(magnitude_scores(model))
    shutil.rmtree(path, ignore_errors=True)
    extract(model, masks).save_pretrained(path)
    (path / PRUNING).write_text(json.dumps(describe(masks)))


def make_optimizer(s: Settings, model: Llama, masks: PruningMasks | None) -> torch.optim.AdamW:
    """One AdamW: weights and log_alpha descend, lambda and phi ascend, each group at its own rate."""
    groups = [{"params": list(model.parameters()), "lr": s.lr, "weight_decay": s.weight_decay}]
    if masks is not None:
        log_alphas = [gates.log_alpha for gates in masks.gates().values()]
        groups.append({"params": log_alphas, "lr": s.gate_lr})
        groups.append({"params": list(masks.multipliers.parameters()), "lr": s.multiplier_lr, "maximize": True})
    betas = (s.beta1, s.beta2)
    return torch.optim.AdamW(groups, betas=betas, eps=s.eps, weight_decay=0.0, fused=True)


def make_mixture(s: Settings, data: TokenData, references: dict[str, float] | None) -> Mixture:
    """The domain weights at the start of a run."""
    for name, given in (("ratio", s.ratio), ("reference_losses", s.reference_losses)):
        if given and set(given) != set(data.domains):
            raise ValueError(
                f"{name} must name the domains {', '.join(data.domains)}, not {', '.join(map(str, given))}"
            )
    return Mixture(
        data.domains,
        [s.ratio[d] if s.ratio else data.tokens(d, "train").size for d in data.domains],
        s.schedule,
        references and [references[d] for d in data.domains],
        dynamic_reference=s.dynamic_reference,
        dynamic_ratio=s.dynamic_ratio,
        law=s.law,
        rho=s.rho,
        floor=s.floor,
        temperature=s.temperature,
        delta=s.delta,
        bound=s.bound,
        step_size=s.step_size,
        clip=s.clip_excess,
    )


def measure_references(s: Settings, data: TokenData, device, sharding: dict, micro_batch: int) -> dict[str, float]:
    """Validation losses of the reference model, by domain. It is gone from memory afterwards."""
    say(f"measuring the reference losses on {s.reference_model}")
    model = parallel.read_model(directory_of(s.reference_model), device, **sharding)
    with autocast(s, model):
        return domain_losses(model, data, "val", s.seq_len, s.eval_sequences, micro_batch)


def lr_scale(step: int, s: Settings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine down to min_lr."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


class Trainer:
    """Model, gates and optimizer, and the step that trains them: the same on a CPU, on 8 GPUs and on fake tensors.

    Nothing in `step` waits for the device; what is measured stays there until it is read for a log line.
    """

    def __init__(self, s: Settings, model: Llama, masks: PruningMasks | None, n_domains: int):
        self.s, self.model, self.masks = s, model, masks
        self.device = parallel.local(model.embed_tokens.weight).device
        self.tree = nn.ModuleDict({"model": model} | ({"masks": masks} if masks else {}))
        self.engine = parallel.engine(model)
        self.optimizer = make_optimizer(s, model, masks)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rows, self.micro_batch = s.rows(parallel.size())
        # since the last log line, of this process's rows: sum of cross entropies and number of tokens of each domain
        self.unlogged = torch.zeros(2, n_domains, dtype=torch.float64, device=self.device)
        self.constraint, self.stats, self.norm = torch.zeros(()), {}, torch.zeros(())
        self.bad_step = torch.full((), -1.0, device=self.device)  # the first whose gradient is not finite

    def step(self, step: int, tokens: Tensor, domain: Tensor) -> None:
        """One update on this process's rows (b, T+1) of the batch, whose domains are (b,)."""
        s, masks = self.s, self.masks
        for group, rate in zip(self.optimizer.param_groups, self.rates):  # all rates follow one schedule
            group["lr"] = rate * lr_scale(step, s)
        for row in range(0, self.rows, self.micro_batch):
            part = slice(row, row + self.micro_batch)
            self.accumulate(step, row, tokens[part], domain[part])
        if masks:  # each process has its rows' share of the cross entropy, but all of the constraint: that comes after
            parallel.average_gradients(masks.parameters())
            self.constraint, self.stats = masks.lagrangian(step)
            self.constraint.backward()
        self.norm = parallel.clip_gradients(self.tree.values(), s.grad_clip or math.inf)
        # once a gradient is not finite, `found_inf` makes AdamW skip this and all later steps; `check` tells of it
        self.bad_step = torch.where((self.bad_step < 0) & ~self.norm.isfinite(), float(step), self.bad_step)
        self.optimizer.found_inf = (self.bad_step >= 0).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if masks:
            masks.clamp_()

    def accumulate(self, step: int, row: int, tokens: Tensor, domain: Tensor) -> None:
        """Forward and backward of a micro-batch that starts at this row of the process's."""
        s = self.s
        sample = (parallel.rank() * self.rows + row) // (s.batch_size // s.gate_samples)
        z = self.masks.sample(s.seed, step, sample) if self.masks else None
        last = row + len(tokens) == self.rows
        with parallel.synchronised(self.engine, now=last or s.shard_gradients):
            with autocast(s, self.model):
                nll = self.engine(tokens[:, :-1], z, targets=tokens[:, 1:])  # (b, T)
            # the processes' gradients are averaged: times their number, this is the mean over the global batch
            (nll.sum() * (parallel.size() / (s.batch_size * s.seq_len))).backward()
        counts = torch.full_like(domain, s.seq_len, dtype=torch.float64)
        self.unlogged.index_add_(1, domain, torch.stack((nll.detach().sum(1, dtype=torch.float64), counts)))

    def measured(self) -> Tensor:
        """`unlogged` of all processes."""
        return parallel.sum_(self.unlogged.clone())

    def check(self, domains: list[str]) -> None:
        """Stop the run if a gradient was not finite."""
        if (step := int(self.bad_step)) >= 0:
            sums = self.measured()[0].tolist()
            bad = [d for d, x in zip(domains, sums) if not math.isfinite(x)]
            where = f"cross entropy of domain {', '.join(bad)}" if bad else "constraint or gradient"
            give_up(f"step {step}: the {where} is not finite; nothing was updated")


# -- the run --------------------------------------------------------------------------------------------------------


def main():
    """Settings to a model, its gates, data and mixture; from there to the last step; from there to model/."""
    with user_errors():
        s = load(Settings, sys.argv[1:])
        if s.dry_run:
            return cost.dry_run(s, make_masks, Trainer)
        device = parallel.start(parallel.find_device(s.device))
        torch.set_num_threads(s.threads or torch.get_num_threads())
        _, micro_batch = s.rows(parallel.size())
        data = TokenData(s.data, s.domains or None)
        run = Run(s.out, asdict(s), FREE, s.resume)
        if run.finished:
            return say(f"{run.path / 'model'} is finished already")
        if run.state and run.state.get("data") != data.digest:
            raise ValueError(f"{s.data} was prepared again, with other text or options, since {s.out} was started")
        reader = BatchReader(data, s.seq_len, s.batch_size, s.seed)
        for domain in data.domains:
            data.eval_sequences(domain, "val", s.seq_len, 1)  # is there enough text?
        config = make_config(s, data)
        masks = make_masks(s, config)
        mixture = make_mixture(s, data, s.reference_losses or None)
        if s.reference_model:
            check_model(s, s.reference_model, read_config(directory_of(s.reference_model)), data)
        mesh = parallel.make_mesh(device) if s.parallel == "fsdp" else None
        sharding = {"mesh": mesh, "dtype": torch.bfloat16 if s.dtype == "bfloat16" else None}

        start = directory_of(s.init_from) if s.init_from else s.seed
        if masks and s.gates != "learned":
            start = run.path / "start"
            if parallel.is_first() and (run.state is None or not start.exists()):
                cut(s, masks, start)
            config, masks = masks.target, None
        parallel.barrier()
        model = parallel.make_model(
            config,
            None if run.state else start,
            device,
            **sharding,
            checkpoint_layers=s.activation_checkpointing,
            compiled=s.compile,
        )
        if s.reference_model and run.state is None:
            mixture = make_mixture(s, data, measure_references(s, data, device, sharding, micro_batch))
        run.open()
    for key, value in asdict(s).items():
        say(f"{key} = {value!r}")
    if s.seq_len > data.meta["window"]:
        say(
            f"note: a validation sequence of {s.seq_len} tokens is of unrelated pieces of {data.meta['window']}; "
            f"prepare_data.py --window {s.seq_len} makes them whole"
        )

    if s.schedule == "dro" and s.dynamic_ratio and np.ptp(mixture.initial) == 0:
        say("note: with equal shares in `ratio` its bounds leave dynamic_ratio no room (section 3.3)")

    trainer = Trainer(s, model, masks.to(device) if masks else None, len(data.domains))
    try:
        train(s, trainer, data, reader, mixture, run)
        finish(s, trainer, data, run, sharding)
    except SystemExit:  # whatever for: a checkpoint that is still being written is a good one
        run.finish_save()
        raise
    except (OSError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        newest = newest_checkpoint(run.path)
        where = f"the same command goes on from {newest}" if newest else "there is no checkpoint yet"
        sys.exit(f"train.py: could not write to {run.path}: {error}; {where}")
    parallel.stop()


def train(s: Settings, trainer: Trainer, data: TokenData, reader: BatchReader, mixture: Mixture, run: Run) -> None:
    """All steps, from the run's checkpoint if it has one. SystemExit when it is told to stop before the last."""
    config, masks, device = trainer.model.config, trainer.masks, trainer.device
    first, seconds, tokens_per_step = 0, 0.0, s.batch_size * s.seq_len
    if run.state is not None:
        with user_errors():
            run.load(trainer.tree, trainer.optimizer)
        mixture.state, first, seconds = run.state["mixture"], run.state["step"], run.state["seconds"]
        reader.load_state_dict(run.state["reader"])
        if parallel.is_first():
            trainer.unlogged += torch.tensor(run.state["unlogged"], dtype=torch.float64, device=device)
        say(f"going on from {run.checkpoint}")
    else:
        run.log(
            type="run",
            name=Path(s.out).name,
            stage=s.stage,
            steps=s.steps,
            tokens_per_step=tokens_per_step,
            domains=data.domains,
            schedule=s.schedule,
            dynamic_reference=s.dynamic_reference,
            dynamic_ratio=s.dynamic_ratio,
            source=config.shape,
            target=masks.target.shape if masks else None,
            parameters=config.n_params(),
        )
    started = since = time.time()
    position, seen = reader.state_dict(), reader.tokens_seen()  # of the batches that were trained on
    interrupted = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: interrupted.append(number))

    def fetch(step):
        """This process's rows of a step's batch, ready to be copied to the device."""
        start = parallel.rank() * trainer.rows
        batch = reader.next(step, mixture.weights, slice(start, start + trainer.rows))
        tensors = [torch.from_numpy(x) for x in batch]
        return [x.pin_memory() for x in tensors] if device.type == "cuda" else tensors

    def save(step):
        state = {
            "source": asdict(config),
            "target": asdict(masks.target) if masks else None,
            "data": data.digest,
            "mixture": mixture.state,
            "reader": position,
            "unlogged": trainer.measured().tolist(),
            "seconds": seconds + time.time() - started,
        }
        run.save(step, trainer.tree, trainer.optimizer, state, s.keep_checkpoints, in_background=device.type == "cuda")

    if first == 0:
        evaluate(s, trainer, data, mixture, run, 0, seen)
        since = time.time()
    ahead = ThreadPoolExecutor(1)  # reads the next batch while this one is trained on
    upcoming, logged = ahead.submit(fetch, first), first
    for step in range(first, s.steps):
        done = step + 1
        batch = upcoming.result()
        position, seen = reader.state_dict(), reader.tokens_seen()
        evaluating = done % s.eval_interval == 0 or done == s.steps
        if not evaluating:
            upcoming = ahead.submit(fetch, done)
        trainer.step(step, *(x.to(device, non_blocking=True) for x in batch))
        run.finish_save(wait=False)

        if done % s.log_interval == 0 or done == s.steps:
            log(s, trainer, data.domains, mixture, run, done)
            now = time.time()
            speed = (done - logged) * tokens_per_step / (now - since)
            left = (s.steps - done) * (now - started) / (done - first)
            report_speed(s, trainer, run, done, speed, seconds + now - started, left)
            since, logged = now, done
        if evaluating:
            trainer.check(data.domains)
            before = time.time()
            evaluate(s, trainer, data, mixture, run, done, seen)
            since += time.time() - before  # that was no training
            if done < s.steps:
                upcoming = ahead.submit(fetch, done)  # by the new weights
        stop = parallel.any_of(bool(interrupted)) or done == s.stop_at
        if done % s.save_interval == 0 or done == s.steps or stop:
            trainer.check(data.domains)
            save(done)
        if stop and done < s.steps:
            run.finish_save()
            say(f"stopped after step {done}; the same command goes on from here")
            parallel.stop()
            sys.exit(130 if signal.SIGINT in interrupted else 0)
    run.finish_save()


def evaluate(s: Settings, trainer: Trainer, data: TokenData, mixture: Mixture, run: Run, step: int, seen: dict) -> None:
    """Measure the validation loss of each domain, move the domain weights, log."""
    masks, domains = trainer.masks, data.domains
    z = masks.deterministic(at_target=False) if masks else None  # not yet the target shape: it would say nothing
    with autocast(s, trainer.model):
        losses = domain_losses(trainer.model, data, "val", s.seq_len, s.eval_sequences, trainer.micro_batch, z)
    params_end = float((masks.target if masks else trainer.model.config).n_params())
    params = masks.expected_params().item() if masks else params_end
    seen = np.array([seen[d] for d in domains])
    at_end = seen + mixture.weights * (s.steps - step) * s.batch_size * s.seq_len
    rate, rate_end = (lr_scale(max(0, i - 1), s) for i in (step, s.steps))  # of the last update, of the run's last
    try:
        fits = mixture.update(
            step / s.steps, [losses[d] for d in domains], seen, params, at_end, params_end, rate, rate_end
        )
    except ValueError as error:
        give_up(f"step {step}: {error}")
    mixture.state = parallel.from_first(mixture.state)
    laws, tokens_per_step = fits["laws"], s.batch_size * s.seq_len
    curve = None
    if any(laws):  # the fitted laws from here to the end of the run: the tokens go on as now, P and rate as scheduled
        share = np.linspace(0, 1, 9)
        rates = np.array([lr_scale(max(0, step + x * (s.steps - step) - 1), s) for x in share])
        ramp = np.clip(share * (s.steps - step) / max(1, s.sparsity_warmup - step), 0, 1)
        tokens, left = seen + share[:, None] * (at_end - seen), params + ramp * (params_end - params)
        lines = [law and law.predict(t, left, rates).tolist() for law, t in zip(laws, tokens.T)]
        curve = {"step": (step + share * (s.steps - step)).tolist(), "loss": dict(zip(domains, lines))}
    run.log(
        type="eval",
        step=step,
        tokens=step * tokens_per_step,
        domain_tokens=by_domain(domains, seen),
        parameters=params,
        loss=losses,
        bits_per_byte=bits_per_byte(losses, data, "val"),
        reference=by_domain(domains, mixture.state["reference"]),
        prediction=by_domain(domains, [law and law.predict(t, params_end, rate_end) for law, t in zip(laws, at_end)]),
        no_prediction=by_domain(domains, fits["no_prediction"]),
        curve=curve,
        ratio=by_domain(domains, mixture.state["ratio"]),
        weights=by_domain(domains, mixture.weights),
        **({"gates": gate_picture(z), "sparsity": by_name(masks.lagrangian(step)[1])["sparsity"]} if masks else {}),
    )
    say(
        f"step {step}: validation loss {np.mean(list(losses.values())):.4f}  "
        + "  ".join(f"{d} {loss:.3f}" for d, loss in losses.items())
    )
    say("    domain weights: " + "  ".join(f"{d} {w:.3f}" for d, w in zip(domains, mixture.weights)))


def log(s: Settings, trainer: Trainer, domains: list[str], mixture: Mixture, run: Run, done: int) -> None:
    """The training line of the steps since the last one: where the device is waited for."""
    trainer.check(domains)
    sums, counts = trainer.measured()
    trainer.unlogged.zero_()
    means = (sums / counts).tolist()
    constraint = {"constraint": trainer.constraint.item(), **by_name(trainer.stats)} if trainer.masks else {}
    lr = trainer.optimizer.param_groups[0]["lr"]
    loss = (sums.sum() / counts.sum()).item()
    run.log(
        type="train",
        step=done,
        tokens=done * s.batch_size * s.seq_len,
        loss=loss,
        lr=lr,
        grad_norm=trainer.norm.item(),
        weights=by_domain(domains, mixture.weights),
        domain_loss=by_domain(domains, [m if math.isfinite(m) else None for m in means]),
        **constraint,
    )
    text = f"step {done}/{s.steps}  loss {loss:.4f}"
    if constraint:
        text += f"  constraint {constraint['constraint']:+.4f}  sparsity " + " ".join(
            f"{g} {x:.3f}/{constraint['target_sparsity'][g]:.3f}" for g, x in constraint["sparsity"].items()
        )
    if parallel.is_first():
        print(f"{text}  lr {lr:.2e}", end="  ")


def report_speed(s: Settings, trainer: Trainer, run: Run, done: int, speed: float, seconds: float, left: float) -> None:
    """The rest of that line, and a line of timings.jsonl: nothing that another run would repeat."""
    device, flops_per_token = trainer.device, trainer.model.config.flops_per_token(s.seq_len)
    flops, peak = flops_per_token * speed / parallel.size(), cost.peak_flops(device, s.dtype)
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else host_memory()
    run.time(
        step=done,
        seconds=round(seconds, 3),
        tokens_per_second=round(speed, 1),
        mfu=peak and round(flops / peak, 4),
        peak_memory=memory,
    )
    utilisation = f"  MFU {flops / peak:.1%}" if peak else ""
    say(f"{speed:,.0f} tokens/s{utilisation}  {memory / 1e9:.1f} GB  {clock(left)} left")


def finish(s: Settings, trainer: Trainer, data: TokenData, run: Run, sharding: dict) -> None:
    """Cut the small model out, write model/, measure what was written."""
    masks, partial = trainer.masks, run.path / "model.partial"
    whole = get_model_state_dict(trainer.model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    picture = gate_picture(masks.deterministic(at_target=True)) if masks else None
    if parallel.is_first():
        model = Llama.of_weights(trainer.model.config, whole)
        chosen = run.path / "start" / PRUNING  # and not learned
        kept = describe(masks.cpu()) if masks else json.loads(chosen.read_text()) if chosen.is_file() else None
        origin = model_directory(s.init_from) if s.init_from else None
        save_model(partial, extract(model, masks) if masks else model, kept, origin, data)
        del model
    del whole
    parallel.barrier()
    small = parallel.read_model(partial, trainer.device, **sharding)
    with autocast(s, small):
        losses = domain_losses(small, data, "val", s.seq_len, s.eval_sequences, trainer.micro_batch)
    run.log(
        type="end",
        step=s.steps,
        loss=losses,
        bits_per_byte=bits_per_byte(losses, data, "val"),
        parameters=small.config.n_params(),
        gates=picture,
    )
    if parallel.is_first():
        shutil.rmtree(run.path / "start", ignore_errors=True)
        partial.rename(run.path / "model")
    mean = np.mean(list(losses.values()))
    say(f"{run.path / 'model'}: {small.config.n_params():,} parameters, validation loss {mean:.4f}")


def autocast(s: Settings, model: Llama):
    """Matrix products in s.dtype. A sharded model computes in it throughout."""
    device = parallel.local(model.embed_tokens.weight).device.type
    mixed = s.dtype == "bfloat16" and not parallel.is_sharded(model)
    return torch.autocast(device, torch.bfloat16, enabled=mixed)


def give_up(text: str) -> None:
    """End all processes, which are all here; one of them says why."""
    sys.exit(f"train.py: {text}" if parallel.is_first() else 1)


def say(text: str) -> None:
    """Print, in one process."""
    if parallel.is_first():
        print(text, flush=True)


def host_memory() -> int:
    """Most bytes that this process has had in memory so far."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux's getrusage would count what the process that started this one had, too
        return 1024 * int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def by_domain(domains: list[str], values) -> dict:
    """Domain -> plain Python value, for a log line."""
    if values is None:
        return dict.fromkeys(domains)
    return {d: v if v is None or isinstance(v, str) else np.asarray(v).item() for d, v in zip(domains, values)}


def by_name(stats: dict) -> dict:
    """granularity -> {name: tensor}, as `lagrangian` gives it, to name -> {granularity: number} for a log line."""
    names = next(iter(stats.values()))
    return {name: {g: float(values[name]) for g, values in stats.items()} for name in names}


def gate_picture(z: Gates) -> dict:
    """Gates as lists for a log line; hidden and ffn as means over at most GATE_BINS bins."""

    def bins(x):
        parts = x.float().tensor_split(min(GATE_BINS, x.shape[-1]), dim=-1)
        return torch.stack([part.mean(-1) for part in parts], -1)

    return {
        name: None if x is None else (bins(x) if name in ("hidden", "ffn") else x).detach().cpu().tolist()
        for name, x in zip(z._fields, z)
    }


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


if __name__ == "__main__":
    main()
