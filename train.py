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
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from data import BatchReader, TokenData
from dro import Mixture
from eval import (
    bits_per_byte,
    check_tokenizer,
    domain_losses,
    find_device,
    load_model,
    model_directory,
    newest_checkpoint,
)
from masks import PruningMasks, describe, extract, magnitude_scores, random_scores, scores_of
from model import Gates, Llama, LlamaConfig
from settings import load, user_errors

TOKENIZER_FILES = (  # what `transformers` may write beside the weights
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
GATE_BINS = 32  # hidden and ffn gates are logged as means over at most this many bins


@dataclass(frozen=True)
class Settings:
    """python train.py [config/FILE.py] [--key=value ...]   settings, their defaults and meaning:"""

    # files
    data: Annotated[str, "data set made by prepare_data.py"] = "data/demo"
    domains: Annotated[list, "domains of it to use, [] = all"] = field(default_factory=list)
    out: Annotated[str, "directory of this run"] = "out/run"
    resume: Annotated[
        Literal["auto", "never"], "'auto': go on from the newest checkpoint in `out`; 'never': refuse if there is a run"
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
    head_dim: Annotated[int, "dimensions a head, 0 = d_model / n_head"] = 0
    d_ffn: Annotated[int, "feed-forward dimensions"] = 344
    tie_embeddings: Annotated[bool, "share input and output embedding"] = False
    target_n_layer: Annotated[int, "layers to keep, 0 = all"] = 0
    target_d_model: Annotated[int, "hidden dimensions to keep, 0 = all"] = 0
    target_n_head: Annotated[int, "query heads to keep a layer, 0 = all; KV groups go whole"] = 0
    target_d_ffn: Annotated[int, "feed-forward dimensions to keep a layer, 0 = all"] = 0

    # gates
    gates: Annotated[str, "'learned'; or cut first, then train: 'random', 'magnitude', or a pruning.json"] = "learned"
    sparsity_warmup: Annotated[int, "steps in which the target sparsity ramps up"] = 640
    gate_lr: Annotated[float, "peak learning rate of log_alpha"] = 1.0
    multiplier_lr: Annotated[float, "peak learning rate of lambda and phi"] = 1.0
    log_alpha: Annotated[float, "initial log_alpha of every gate (clamped to ±4.605)"] = math.log(100)
    phi: Annotated[float, "initial phi of every granularity"] = 0.0

    # optimization
    steps: Annotated[int, "optimizer steps"] = 1000
    batch_size: Annotated[int, "sequences a step"] = 8
    micro_batch: Annotated[int, "sequences at once, 0 = batch_size; each has gates of its own"] = 0
    seq_len: Annotated[int, "tokens a sequence"] = 256
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
    schedule: Annotated[Literal["constant", "sheared", "dro"], "how evaluations move the domain weights"] = "constant"
    dynamic_reference: Annotated[bool, "reference loss from the scaling law's prediction (section 3.2)"] = False
    dynamic_ratio: Annotated[bool, "reference ratio follows the weights (section 3.3)"] = False
    reference_losses: Annotated[dict, "first reference loss of each domain in nats a token"] = field(
        default_factory=dict
    )
    reference_model: Annotated[str, "model whose validation losses are the first references, '' = none"] = ""
    rho: Annotated[float, "radius of the robust set (eq. 5)"] = 0.1
    floor: Annotated[float, "least weight of a domain, as a share of its reference ratio"] = 0.2
    delta: Annotated[float, "how fast the reference ratio follows the weights"] = 0.1
    bound: Annotated[float, "the reference ratio stays within 1/bound and bound times the initial one"] = 2.0
    step_size: Annotated[float, "step size of the sheared schedule"] = 1.0
    clip_excess: Annotated[bool, "sheared: count losses below the reference as 0, as its paper has it"] = False
    eval_interval: Annotated[int, "steps between evaluations"] = 50
    eval_sequences: Annotated[int, "validation sequences a domain"] = 16

    # machine
    seed: Annotated[int, "seed of initial weights, gates and data order"] = 0
    device: Annotated[str, "'cpu', 'cuda', 'cuda:1', ...; 'auto' = cuda if there is one"] = "auto"
    dtype: Annotated[Literal["float32", "bfloat16"], "of the matrix products; weights stay float32"] = "float32"
    compile: Annotated[bool, "torch.compile the model"] = False
    threads: Annotated[int, "CPU threads, 0 = torch's choice"] = 0
    log_interval: Annotated[int, "steps between log lines"] = 10

    def __post_init__(self):
        positive = "steps batch_size seq_len n_layer d_model n_head d_ffn eval_interval eval_sequences log_interval "
        positive += "save_interval keep_checkpoints bound"
        not_negative = (
            "lr gate_lr multiplier_lr weight_decay eps warmup sparsity_warmup phi grad_clip rho step_size seed "
        )
        not_negative += "stop_at micro_batch threads n_kv_head head_dim "
        not_negative += "target_n_layer target_d_model target_n_head target_d_ffn"
        limits = {positive: (1, math.inf), not_negative: (0, math.inf), "min_lr delta": (0, 1)}
        limits["beta1 beta2 floor"] = (0, 0.999)
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
        if self.micro_batch and self.batch_size % self.micro_batch:
            wrong.append(f"batch_size = {self.batch_size} must be a multiple of micro_batch = {self.micro_batch}")
        references = self.reference_losses or self.reference_model or self.dynamic_reference
        if self.schedule != "constant" and not references:
            wrong.append(f"schedule = '{self.schedule}' needs references: set reference_model or reference_losses")
        if self.gates != "learned" and not self.is_pruning:
            wrong.append(f"gates = '{self.gates}' needs a target shape")
        if self.is_pruning and not self.init_from:
            wrong.append("a target shape needs a model to prune: set init_from")
        if wrong:
            raise ValueError("; ".join(wrong))

    @property
    def is_pruning(self) -> bool:
        """Whether a target shape is set."""
        return any((self.target_n_layer, self.target_d_model, self.target_n_head, self.target_d_ffn))

    @property
    def stage(self) -> str:
        """'pretrain', 'prune' or 'continue', as the settings imply."""
        return "prune" if self.is_pruning else "continue" if self.init_from else "pretrain"


# settings that may change when a run goes on
FREE = {"out", "resume", "stop_at", "save_interval", "keep_checkpoints", "log_interval", "device", "compile", "threads"}


# -- what a run is made of ------------------------------------------------------------------------------------------


def make_model(s: Settings, data: TokenData) -> tuple[Llama, PruningMasks | None]:
    """The model to train, and its gates if they are to be learned."""
    if not s.init_from:
        config = LlamaConfig(
            vocab_size=data.vocab_size,
            n_layer=s.n_layer,
            d_model=s.d_model,
            n_head=s.n_head,
            n_kv_head=s.n_kv_head or s.n_head,
            head_dim=s.head_dim or s.d_model // s.n_head,
            d_ffn=s.d_ffn,
            max_seq_len=s.seq_len,
            tie_embeddings=s.tie_embeddings,
            eos_token_id=data.eot,
        )
        return Llama(config).init_weights(s.seed), None
    model = load_model(s.init_from, finished=True)
    source = model.config
    check_tokenizer(s.init_from, model, data)
    if s.seq_len > source.max_seq_len:
        raise ValueError(f"seq_len = {s.seq_len}: {s.init_from} was made for {source.max_seq_len} tokens at most")
    if not s.is_pruning:
        return model, None
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
    if s.gates == "learned":
        return model, masks
    if s.gates == "random":
        masks.choose_(random_scores(masks, s.seed))
    elif s.gates == "magnitude":
        masks.choose_(magnitude_scores(model))
    else:
        masks.choose_(scores_of(masks, json.loads(Path(s.gates).read_text())))
    return extract(model, masks), None


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
        rho=s.rho,
        floor=s.floor,
        delta=s.delta,
        bound=s.bound,
        step_size=s.step_size,
        clip=s.clip_excess,
    )


def lr_scale(step: int, s: Settings) -> float:
    """Share of the peak learning rate at a step: linear warm-up, then cosine down to min_lr."""
    if step < s.warmup:
        return (step + 1) / s.warmup
    progress = (step - s.warmup) / max(1, s.steps - s.warmup)
    return s.min_lr + (1 - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


# -- files of a run -------------------------------------------------------------------------------------------------


class Run:
    """A run's directory: config.json, metrics.jsonl, checkpoints/step_NNNNNN/, model/.

    `finished` runs have a model; `state` is that of the newest checkpoint, None where a run is to be started.
    """

    def __init__(self, s: Settings):
        self.path = Path(s.out)
        self.finished = (self.path / "model" / "config.json").exists()
        self.checkpoint = newest_checkpoint(self.path)
        self.state = json.loads((self.checkpoint / "state.json").read_text()) if self.checkpoint else None
        if not self.finished and self.state is None:
            return
        if s.resume == "never":
            raise ValueError(f"{s.out} holds a run already: remove it, or choose another --out, or resume='auto'")
        old, new = json.loads((self.path / "config.json").read_text()), asdict(s)
        changed = [f"{k} was {old.get(k)!r}, now {new[k]!r}" for k in new if k not in FREE and old.get(k) != new[k]]
        if changed:
            raise ValueError(f"{s.out} was started with other settings, choose another --out: {'; '.join(changed)}")

    def open(self, s: Settings) -> None:
        """Make the directory and open metrics.jsonl: nothing is written before everything was found to be right."""
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / "config.json").write_text(json.dumps(asdict(s), indent=2) + "\n")
        # what a dead run logged after its last checkpoint will be logged again
        self.metrics = open(self.path / "metrics.jsonl", "ab")
        self.metrics.truncate(self.state["metrics_bytes"] if self.state else 0)

    def log(self, **line) -> None:
        """Append one line to metrics.jsonl."""
        self.metrics.write(json.dumps(line).encode() + b"\n")
        self.metrics.flush()

    def save(self, step: int, tree: nn.Module, optimizer, state: dict, keep: int) -> None:
        """Write a checkpoint beside its place and rename it when it is whole; then drop the oldest ones."""
        final = self.path / "checkpoints" / f"step_{step:06d}"
        if final.exists():
            return
        for left_over in final.parent.glob("*.partial"):
            shutil.rmtree(left_over)
        partial = final.with_name(final.name + ".partial")
        weights, moments = get_state_dict(tree, optimizer)
        dcp.save({"weights": weights, "optimizer": moments}, checkpoint_id=partial, no_dist=True)
        self.metrics.flush()
        os.fsync(self.metrics.fileno())
        state = {**state, "step": step, "metrics_bytes": os.fstat(self.metrics.fileno()).st_size}
        (partial / "state.json").write_text(json.dumps(state))
        partial.rename(final)
        for old in sorted(final.parent.glob("step_*"), key=lambda p: int(p.name[5:]))[:-keep]:
            shutil.rmtree(old)

    def load(self, tree: nn.Module, optimizer) -> None:
        """Load weights and optimizer state from the checkpoint that this run goes on from, in place."""
        weights, moments = get_state_dict(tree, optimizer)
        dcp.load({"weights": weights, "optimizer": moments}, checkpoint_id=self.checkpoint, no_dist=True)
        set_state_dict(tree, optimizer, model_state_dict=weights, optim_state_dict=moments)


# -- the loop -------------------------------------------------------------------------------------------------------


def main():
    with user_errors():
        s = load(Settings, sys.argv[1:])
        device = find_device(s.device)
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=s.dtype == "bfloat16")
        torch.set_num_threads(s.threads or torch.get_num_threads())
        torch.backends.cuda.matmul.allow_tf32 = True
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("several processes are not supported yet: start one, `python train.py ...`")
        data = TokenData(s.data, s.domains or None)
        run = Run(s)
        if run.finished:
            print(f"{run.path / 'model'} is finished already")
            return
        reader = BatchReader(data, s.seq_len, s.batch_size, s.seed)
        for domain in data.domains:
            data.eval_sequences(domain, "val", s.seq_len, 1)  # is there enough text?
        model, masks = make_model(s, data)
        references = s.reference_losses or None
        if references is None and s.reference_model and run.state is None:
            print(f"measuring the reference losses on {s.reference_model}", flush=True)
            teacher = load_model(s.reference_model, finished=True).to(device)
            with autocast:
                references = domain_losses(teacher, data, "val", s.seq_len, s.eval_sequences, s.batch_size)
            del teacher
        mixture = make_mixture(s, data, references)
        run.open(s)
    for key, value in asdict(s).items():
        print(f"{key} = {value!r}")

    tree = nn.ModuleDict({"model": model} | ({"masks": masks} if masks else {})).to(device)
    optimizer = make_optimizer(s, model, masks)
    rates = [group["lr"] for group in optimizer.param_groups]
    forward = torch.compile(model) if s.compile else model
    micro_batch = s.micro_batch or s.batch_size
    tokens_per_step, n_domains = s.batch_size * s.seq_len, len(data.domains)
    params_end = float(masks.target.n_params() if masks else model.config.n_params())
    first, seconds = 0, 0.0
    if run.state is not None:
        run.load(tree, optimizer)
        mixture.state, first, seconds = run.state["mixture"], run.state["step"], run.state["seconds"]
        reader.load_state_dict(run.state["reader"])
        print(f"going on from {run.checkpoint}")
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
            source=model.config.shape,
            target=masks.target.shape if masks else None,
            parameters=model.config.n_params(),
        )

    interrupted = []
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: interrupted.append(number))

    def state():
        configs = {"source": asdict(model.config), "target": asdict(masks.target) if masks else None}
        domains = {"mixture": mixture.state, "reader": reader.state_dict()}
        log = {"unlogged": [sums.tolist(), counts.tolist()], "seconds": seconds + time.time() - started}
        return {**configs, **domains, **log}

    def evaluate(step):
        """Measure, move the domain weights, log."""
        z = masks.deterministic(at_target=False) if masks else None  # not yet the target shape: it would say nothing
        with autocast:
            losses = domain_losses(model, data, "val", s.seq_len, s.eval_sequences, micro_batch, z)
        seen = reader.tokens_seen()
        seen = np.array([seen[d] for d in data.domains])
        at_end = seen + mixture.weights * (s.steps - step) * tokens_per_step
        params = masks.expected_params().item() if masks else params_end
        values = [losses[d] for d in data.domains]
        try:
            fits = mixture.update(step / s.steps, values, seen, params, at_end, params_end)
        except ValueError as error:
            sys.exit(f"train.py: step {step}: {error}")
        run.log(
            type="eval",
            step=step,
            tokens=step * tokens_per_step,
            domain_tokens=by_domain(seen),
            parameters=params,
            loss=losses,
            bits_per_byte=bits_per_byte(losses, data, "val"),
            reference=by_domain(mixture.state["reference"]),
            prediction=by_domain([law and law.predict(t, params_end) for law, t in zip(fits["laws"], at_end)]),
            no_prediction=by_domain(fits["no_prediction"]),
            curve=curve(step, fits["laws"], seen, at_end, params),
            ratio=by_domain(mixture.state["ratio"]),
            weights=by_domain(mixture.weights),
            **({"gates": gate_picture(z), "sparsity": read(masks.lagrangian(step)[1])["sparsity"]} if masks else {}),
        )
        mean = sum(values) / n_domains
        print(f"step {step}: validation loss {mean:.4f}  " + "  ".join(f"{d} {losses[d]:.3f}" for d in data.domains))
        print(
            "    domain weights: " + "  ".join(f"{d} {w:.3f}" for d, w in zip(data.domains, mixture.weights)),
            flush=True,
        )

    def by_domain(values):
        if values is None:
            return dict.fromkeys(data.domains)
        return {d: v if v is None or isinstance(v, str) else np.asarray(v).item() for d, v in zip(data.domains, values)}

    def curve(step, laws, seen, at_end, params):
        """The fitted laws from here to the end of the run, for the pictures: the tokens go on as now, P as the ramp."""
        if not any(laws):
            return None
        share = np.linspace(0, 1, 9)
        ramp = np.clip(share * (s.steps - step) / max(1, s.sparsity_warmup - step), 0, 1)
        tokens = seen + share[:, None] * (at_end - seen)  # (points, domains)
        lines = [
            law and law.predict(t, params + ramp * (params_end - params)).tolist() for law, t in zip(laws, tokens.T)
        ]
        return {"step": (step + share * (s.steps - step)).tolist(), "loss": dict(zip(data.domains, lines))}

    # since the last log line, on the device: sum of cross entropies and number of tokens of each domain
    unlogged = run.state["unlogged"] if run.state else [[0.0] * n_domains] * 2
    sums, counts = (torch.tensor(x, dtype=torch.float64, device=device) for x in unlogged)
    started = since = time.time()
    logged, constraint, stats = first, torch.zeros(()), {}
    if first == 0:
        evaluate(0)
        since = time.time()

    for step in range(first, s.steps):
        for group, rate in zip(optimizer.param_groups, rates):  # the gates' and multipliers' follow the weights'
            group["lr"] = rate * lr_scale(step, s)
        tokens, domain = (torch.from_numpy(x).to(device) for x in reader.next(step, mixture.weights))
        loss = torch.zeros((), device=device)
        for i, (batch, d) in enumerate(zip(tokens.split(micro_batch), domain.split(micro_batch))):
            z = masks.sample(s.seed, step, i) if masks else None
            with autocast:
                nll = forward(batch[:, :-1], z, targets=batch[:, 1:])  # (B, T)
            part = nll.sum() / tokens_per_step
            part.backward()
            loss += part.detach()
            sums.index_add_(0, d, nll.detach().sum(1).double())
            counts.index_add_(0, d, torch.full(d.shape, s.seq_len, dtype=torch.float64, device=device))
        if masks:
            constraint, stats = masks.lagrangian(step)
            constraint.backward()
        norm = nn.utils.clip_grad_norm_(tree.parameters(), s.grad_clip or math.inf)
        if not torch.isfinite(loss + constraint + norm):
            bad = [data.domains[i] for i in (~torch.isfinite(sums)).nonzero().flatten()]
            where = f"cross entropy of domain {', '.join(bad)}" if bad else "constraint or gradient"
            sys.exit(f"train.py: step {step}: the {where} is not finite; nothing was updated")
        optimizer.step()
        optimizer.zero_grad()
        if masks:
            masks.clamp_()

        done = step + 1
        if done % s.log_interval == 0 or done == s.steps:
            now = time.time()
            speed = (done - logged) * tokens_per_step / (now - since)
            left = (s.steps - done) * (now - started) / (done - first)
            means = (sums / counts).tolist()
            line = {"step": done, "tokens": done * tokens_per_step, "loss": (sums.sum() / counts.sum()).item()}
            parts = {"constraint": constraint.item(), **read(stats)} if masks else {}
            run.log(
                type="train",
                **line,
                lr=optimizer.param_groups[0]["lr"],
                grad_norm=norm.item(),
                tokens_per_second=round(speed, 1),
                weights=by_domain(mixture.weights),
                domain_loss=by_domain([m if math.isfinite(m) else None for m in means]),
                **parts,
            )
            text = f"step {done}/{s.steps}  loss {line['loss']:.4f}"
            if masks:
                text += f"  constraint {parts['constraint']:+.4f}  sparsity " + " ".join(
                    f"{g} {parts['sparsity'][g]:.3f}/{parts['target_sparsity'][g]:.3f}" for g in parts["sparsity"]
                )
            print(f"{text}  lr {s.lr * lr_scale(step, s):.2e}  {speed:,.0f} tokens/s  {clock(left)} left", flush=True)
            sums.zero_(), counts.zero_()
            since, logged = now, done
        if done % s.eval_interval == 0 or done == s.steps:
            before = time.time()
            evaluate(done)
            since += time.time() - before
        stop = interrupted or done == s.stop_at
        if done % s.save_interval == 0 or done == s.steps or stop:
            run.save(done, tree, optimizer, state(), s.keep_checkpoints)
        if stop and done < s.steps:
            print(f"stopped after step {done}; the same command goes on from here")
            sys.exit(130 if signal.SIGINT in interrupted else 0)

    if masks:
        small = extract(model, masks).to(device)
        picture, kept = gate_picture(masks.deterministic(at_target=True)), describe(masks)
    else:
        small, picture, kept = model, None, None
    with autocast:
        losses = domain_losses(small, data, "val", s.seq_len, s.eval_sequences, micro_batch)
    run.log(
        type="end",
        step=s.steps,
        loss=losses,
        bits_per_byte=bits_per_byte(losses, data, "val"),
        parameters=small.config.n_params(),
        gates=picture,
        seconds=round(seconds + time.time() - started, 1),
    )
    save_model(run.path / "model", small, kept, model_directory(s.init_from) if s.init_from else None)
    mean = np.mean(list(losses.values()))
    print(f"{run.path / 'model'}: {small.config.n_params():,} parameters, validation loss {mean:.4f}")


def save_model(path: Path, model: Llama, kept: dict | None, origin: Path | None) -> None:
    """Write model/ (with pruning.json: which indices were kept; and the tokenizer files of the model it came from)
    beside its place and rename it when it is whole."""
    partial = path.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if kept is not None:
        (partial / "pruning.json").write_text(json.dumps(kept))
    for name in TOKENIZER_FILES:
        if origin is not None and (origin / name).is_file():
            shutil.copy(origin / name, partial)
    partial.rename(path)


def read(stats: dict) -> dict:
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
