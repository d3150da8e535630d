"""What will a run cost? Parameters, FLOPs, memory of each GPU and hours, before anything is rented.

    python train.py config/prune_7b.py --dry_run=True --world_size=8 --gpu=h100

Two steps of the real training code run on fake tensors, which have shapes but no memory, in a process group that only
pretends to have the other processes; PyTorch's memory tracker watches the second one (in the first, AdamW makes its
state). So the memory figure knows of whatever the code does. It does not know how fragmented the memory gets, nor
what CUDA and NCCL need for themselves. So a run must leave RESERVE free.

The time is not measured. It is the FLOPs, recomputed ones too, divided by the GPU's peak times the assumed utilisation.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from masks import PruningMasks, check_target
from model import LOGITS_AT_ONCE, Llama, LlamaConfig, read_config
from plumbing import choices, parallel
from plumbing.command_line import load
from plumbing.data import MicroBatch, TokenData, open_data
from plumbing.models import check_tokenizer, directory_of, model_directory
from plumbing.run import newest_checkpoint, read_state, shapes_of
from plumbing.settings import Settings

GIB = 2**30
PEAKS = {  # a word of its name -> FLOP/s in bfloat16, float32; the first that fits
    "h200": (989e12, 67e12),
    "h100 pcie": (756e12, 51e12),
    "h100 nvl": (835e12, 60e12),
    "h100": (989e12, 67e12),
    "a100": (312e12, 19.5e12),
}
GPUS = {  # name -> memory in bytes that a process can use
    "h200": 140 * GIB,
    "h100": 79 * GIB,
    "a100-40gb": 39 * GIB,
    "a100": 79 * GIB,
}
RESERVE = 4 * GIB
MOST_GPUS = 1024  # that a dry run tries
MOST_MEMORY = 1024 * GIB  # what surely needs more than this is not rehearsed
BYTES = 257  # vocabulary of byte tokens
PUBLISHED = {  # shapes of models that are not at hand yet
    "Llama-2-7b-hf": LlamaConfig(32000, 32, 4096, 32, 32, 128, 11008, 4096),
    "Meta-Llama-3-8B": LlamaConfig(128256, 32, 4096, 32, 8, 128, 14336, 8192, rope_theta=5e5),
    "SmolLM2-135M": LlamaConfig(49152, 30, 576, 9, 3, 64, 1536, 8192, tie_embeddings=True),
    "Qwen3-0.6B": LlamaConfig(151936, 28, 1024, 16, 8, 128, 3072, 40960, tie_embeddings=True, qk_norm=True),
}
KINDS = {  # what the trackers call it -> a row of our table
    "Parameter": "weights",
    "Sharded Param": "weights",
    "Gradient": "gradients",
    "Sharded Grad": "gradients",
    "Unsharded Grad": "gradients",
    "Optstate": "optimizer",
    "OptState": "optimizer",
    "Unsharded Param": "gathered shards",
    "All Gather": "gathered shards",
    "Reduce Scatter": "gathered shards",
}
ROWS = ["weights", "gradients", "optimizer", "gathered shards", "activations"]


def flops_per_token(config: LlamaConfig, seq_len: int, backward: bool = True) -> float:
    """Floating-point operations per token of a Llama, in sequences of `seq_len` tokens.

    A matrix product has 2 per weight. Attention's products are added, of which causality needs one half. The backward
    pass takes twice as many as the forward pass. Nothing is counted for recomputation.
    """
    heads = 2 * (config.n_head + config.n_kv_head) * config.head_dim
    # the embedding is looked up, not multiplied
    matrices = config.d_model * (config.n_layer * (heads + 3 * config.d_ffn) + config.vocab_size)
    attention = 2 * config.n_layer * seq_len * config.n_head * config.head_dim  # q·k and p·v, half of them masked
    return (3 if backward else 1) * (2 * matrices + attention)


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """Peak of a CUDA device's dense matrix products in a dtype, FLOP/s; None where it is not known."""
    return peak_of(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def peak_of(name: str, dtype: str) -> float | None:
    """Peak of the matrix products of a GPU, by its name, in a dtype, FLOP/s; None where it is not known."""
    for gpu, (bfloat16, float32) in PEAKS.items():
        if re.search(rf"\b{gpu}\b", name.lower()):  # not the RTX A1000
            return float32 if dtype == "float32" else bfloat16
    return None


def memory_of(name: str) -> float:
    """Memory in bytes of a GPU, or of a memory size such as 24GB. ValueError for neither."""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if size := re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?(?:(GB)|GiB)", name, re.IGNORECASE):
        memory = float(size[1]) * (1e9 if size[2] else GIB)
        if memory <= RESERVE:
            raise ValueError(f"gpu = '{name}' must have more than the {readable(RESERVE)} that are left free")
        return memory
    raise ValueError(f"gpu = '{name}' is not one of {', '.join(GPUS)}, and no memory size such as 24GB")


def shape_of(s: Settings) -> LlamaConfig:
    """Shape of the model that a run starts from."""
    data = data_of(s)
    return start_of(s, data.vocab_size if data else BYTES)


def start_of(s: Settings, vocab_size: int, above: tuple[str, ...] = ()) -> LlamaConfig:
    """The same, on data of such a vocabulary. above: the configs whose runs start from this one's model."""
    return known_shape(s.init_from, vocab_size, above) if s.init_from else s.shape_from_scratch(vocab_size)


def known_shape(model: str, vocab_size: int = BYTES, above: tuple[str, ...] = ()) -> LlamaConfig:
    """Shape of the model in a model directory or run, or, where that is not there yet, of what the run will make, of a
    published one, or of what the config of this name will make of such a vocabulary. ValueError where none of these is
    known."""
    if (directory := model_directory(model)) is not None:
        return read_config(directory)
    if (checkpoint := newest_checkpoint(Path(model))) is not None:
        source, target = shapes_of(read_state(checkpoint))
        return target or source
    name = Path(model).name
    if name in PUBLISHED:
        return PUBLISHED[name]
    config = Path(__file__).parent.parent / "config" / f"{name}.py"
    if name in above or not config.is_file():
        if Path(model).exists():
            directory_of(model)  # raises a ValueError, which says what is there instead
        raise ValueError(f"{model}: no such model or run, and its shape is not known either")
    before = load(Settings, [str(config)])
    source = start_of(before, vocab_size, (*above, name))
    return before.target_shape(source) or source


def data_of(s: Settings) -> TokenData | None:
    """The data set of a run, or None where it is not there yet."""
    return open_data(s) if (Path(s.data) / "meta.json").is_file() else None


def parts(c: LlamaConfig) -> dict[str, int]:
    """Parameters by part of the model."""
    return {
        "embedding": c.vocab_size * c.d_model,
        "attention": c.n_layer * c.attention_params(c.d_model, c.n_kv_head),
        "feed-forward": c.n_layer * 3 * c.d_model * c.d_ffn,
        "norms": (2 * c.n_layer + 1) * c.d_model,
        "output": 0 if c.tie_embeddings else c.vocab_size * c.d_model,
    }


class Enough(Exception):
    """The rehearsal has seen what it wanted to see."""


class Rehearsal:
    """Stands in for the batches and for the directory of a run: its batches have shapes only. A memory tracker watches
    the second step; in the first one, AdamW makes its state."""

    device = torch.device("cpu")

    def __init__(self, s: Settings, sequences: int, keeps_gradients: bool, sharding: dict | None = None):
        self.keeps_gradients, self.tracker = keeps_gradients, None
        self.sharding = sharding or {}  # for the model: the mesh, too, must not be made of fake tensors
        _, micro_batch = s.split_batch(parallel.size())
        tokens = torch.zeros(sequences, s.seq_len + 1, dtype=torch.int64, device=self.device)
        domain = torch.zeros(sequences, dtype=torch.int64, device=self.device)
        self.parts = [
            MicroBatch(*part, gate_sample=i)
            for i, part in enumerate(zip(tokens.split(micro_batch), domain.split(micro_batch)))
        ]

    def watch(self, trainer) -> None:
        """Take the trainer whose memory is to be tracked."""
        self.trainer = trainer
        if self.keeps_gradients:
            optimizer = trainer.optimizer
            optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)

    def next_batch(self, step: int, weights) -> "Rehearsal":
        """The micro-batches of this process, in the first step and in the second."""
        if step == 1:
            self.start_tracker()
        if step == 2:
            raise Enough
        return self

    def start_tracker(self) -> None:
        """Count the memory from now on."""
        # their import takes a second, which only the dry run needs to spend
        from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
        from torch.distributed._tools.mem_tracker import MemTracker

        trainer = self.trainer
        if parallel.is_sharded(trainer.model):
            self.tracker = FSDPMemTracker(trainer.model, trainer.optimizer)
        else:
            self.tracker = MemTracker()
            self.tracker.track_external(trainer.tree, trainer.optimizer)
        self.tracker.__enter__()

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[MicroBatch]:
        for part in self.parts:
            if self.tracker:
                from torch.distributed._tools.fsdp2_mem_tracker import _FSDPRefType

                self.tracker.reset_mod_stats()  # a micro-batch is an iteration of its own to the tracker
                for gradient in parallel.accumulated(self.trainer.model):
                    self.tracker._update_and_maybe_create_winfos(gradient, _FSDPRefType.UNSHARDED_GRAD)
            yield part

    def interrupted(self) -> bool:
        """Nobody stops a rehearsal."""
        return False

    def finish_save(self, wait: bool) -> None:
        """Nothing is saved."""

    def peak(self) -> dict:
        """Kind of memory -> bytes, when most was needed."""
        self.tracker.__exit__(None, None, None)
        (snapshot,) = self.tracker.get_tracker_snapshot("peak").values()
        return snapshot


def memory(s: Settings, source: LlamaConfig, rehearse: Callable) -> dict[str, float]:
    """Bytes that one of s.world_size processes holds when a training step needs most, by kind, and "all".

    rehearse(settings, source, rehearsal) is to train with the rehearsal in place of batches and run.
    """
    processes, (mine, micro_batch) = s.world_size, s.split_batch(s.world_size)
    mine = min(mine, 2 * micro_batch)  # with more micro-batches per step it needs no more
    # with DDP a process needs what it would need alone, and the buckets that hold its gradients stay in memory
    n = processes if s.parallel == "fsdp" else 1
    target = s.target_shape(source)
    hopeless = least(target if target and not s.cut_at else source, micro_batch, s.seq_len, n)
    if hopeless > MOST_MEMORY:  # the numbers may be beyond what torch can count
        return dict.fromkeys(ROWS, 0.0) | {"activations": hopeless, "all": hopeless}
    s = replace(s, batch_size=mine * n, micro_batch=micro_batch, gate_samples=mine * n // micro_batch)
    never = 10**9  # nothing is logged, evaluated or saved in two steps
    s = replace(s, schedule="constant", log_interval=never, eval_interval=never, save_interval=never, stop_at=0)
    s = replace(s, steps=s.steps + 3, fade=s.fade + 3 if s.settles and s.cut_at else s.fade)
    if n > 1:
        dist.init_process_group("fake", rank=0, world_size=n, store=FakeStore())
    sharding = parallel.sharding(s.parallel, s.dtype, torch.device("cpu"))
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            rehearsal = Rehearsal(s, mine, processes > 1 and n == 1, sharding)
            try:
                rehearse(s, source, rehearsal)
            except Enough:
                snapshot = rehearsal.peak()
    finally:
        parallel.stop()
    # outside of the steps there is the source, and beside it one after the other of these, in float32
    beside = [0.0]
    if s.reference_model:
        beside.append(known_shape(s.reference_model, source.vocab_size).n_params() / n)
    if target and s.gates != "learned":
        beside.append(target.n_params() / n)
    moments = [by_kind(snapshot), {"weights": 4 * (source.n_params() / n + max(beside))}]
    if target and s.gates in choices.OF_MODEL:
        moments.append(by_kind(snapshot_of_choice(s, source)))
        if n > 1:  # it looks at the whole source, beside its shards
            moments[-1]["weights"] += 4 * source.n_params() / n
    most = max(moments, key=lambda moment: sum(moment.values()))
    return dict.fromkeys(ROWS, 0.0) | most | {"all": sum(most.values())}


def snapshot_of_choice(s: Settings, source: LlamaConfig) -> dict:
    """Kind of memory -> bytes, when a choice that is not learned needs most. It looks at one sequence at a time."""
    from torch.distributed._tools.mem_tracker import MemTracker

    with FakeTensorMode():
        model, tracker = Llama(source), MemTracker()
        model.checkpoint_layers = s.activation_checkpointing
        tracker.track_external(model)
        with tracker:
            choices.scores(s.gates, None, model, [torch.zeros(1, s.seq_len + 1, dtype=torch.int64)], s.seed)
        (snapshot,) = tracker.get_tracker_snapshot("peak").values()
    return snapshot


def by_kind(snapshot: dict) -> dict[str, float]:
    """What PyTorch's trackers have counted, as rows of our table."""
    rows = dict.fromkeys(ROWS, 0.0)
    for kind, n_bytes in snapshot.items():
        if kind != "Total":
            rows[KINDS.get(kind.value, "activations")] += n_bytes
    return rows


def least(c: LlamaConfig, sequences: int, seq_len: int, shards: int = 1) -> float:
    """Bytes that a process surely holds at some moment of a training step. In the update these are the float32 weights,
    their gradients and AdamW's two moments, or one of their `shards` shards. Before the backward pass these are
    weights, moments, and the input of each layer for the sequences that are computed at once."""
    numbers = 4 * c.n_params() / shards
    return max(4 * numbers, 3 * numbers + 2 * sequences * seq_len * c.d_model * c.n_layer)


def check_memory(s: Settings, trained: LlamaConfig, device: torch.device) -> None:
    """ValueError where a run needs more memory than there is: it is called before a model is made. What a process
    surely holds is compared with all memory of the GPU, or with twice that of the machine, since some of it may be
    swapped out. So nothing that could run is refused."""
    mine, micro_batch = s.split_batch(parallel.size())
    need = least(trained, micro_batch, s.seq_len, parallel.size() if s.parallel == "fsdp" else 1)
    need += 8 * mine * s.seq_len  # tokens of the step, int64
    if device.type == "cuda":
        there = torch.cuda.get_device_properties(device).total_memory
    else:
        there = 2 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if need > there:
        raise ValueError(
            f"a model of {trained.n_params():,} parameters, with {micro_batch:,} sequences of {s.seq_len:,} tokens at "
            f"once, needs more than {readable(need)} of memory; {device} has no more than {readable(there)}"
        )


def remedies(s: Settings, n_params: int, space: float) -> Iterator:
    """Settings that need less memory, nearest first."""
    small = s
    if not s.activation_checkpointing:
        yield (small := replace(small, activation_checkpointing=True))
    if s.split_batch(s.world_size)[1] > 1:
        yield (small := replace(small, micro_batch=1))
    if s.parallel == "fsdp" and s.world_size > 1 and not s.shard_gradients:
        yield (small := replace(small, shard_gradients=True))
    small = replace(small, parallel="fsdp")
    more = [2**k for k in range(1, MOST_GPUS.bit_length()) if 2**k > s.world_size]
    for n in [s.world_size, *more] if s.parallel == "ddp" else more:
        # float32 weights, gradients and AdamW's two moments alone are 16 bytes per parameter
        if n > 1 and s.batch_size % n == 0 and 16 * n_params / n < space:
            for shards in sorted({small.shard_gradients, True}):
                yield replace(small, world_size=n, micro_batch=small.split_batch(n)[1], shard_gradients=shards)


def changes(s, other) -> str:
    """The options that change the settings s to `other`. Those of the machine come first."""
    return " ".join(f"--{k}={v}" for k, v in reversed(asdict(other).items()) if v != getattr(s, k))


class Work(NamedTuple):
    """What a whole run computes."""

    tokens: int  # that it is trained on
    evaluations: int
    domains: int  # 1 where neither the data set nor the settings say how many there are
    eval_tokens: int
    flops: float  # of training and evaluation, recomputed ones too


def work_of(s: Settings, source: LlamaConfig) -> Work:
    """What the run of these settings computes. Until the cut it trains the source, and then the target."""
    target, tokens = s.target_shape(source), s.steps * s.batch_size * s.seq_len
    cut_at = s.cut_at if target else s.steps
    evaluations, data = -(-s.steps // s.eval_interval) + 1, data_of(s)
    domains = len(data.domains if data else s.domains or s.ratio) or 1
    sequences = domains * s.eval_sequences
    if data:  # which may have fewer
        sequences = sum(len(data.eval_numbers(d, "val", s.seq_len, s.eval_sequences)) for d in data.domains)
    eval_tokens = evaluations * sequences * s.seq_len
    passes = 4 if s.activation_checkpointing else 3  # the backward pass counts twice
    flops = 0.0
    for config, steps in ((source, cut_at), (target, s.steps - cut_at)):
        if steps:
            forward = flops_per_token(config, s.seq_len, backward=False)
            flops += steps / s.steps * forward * (passes * tokens + eval_tokens)
    return Work(tokens, evaluations, domains, eval_tokens, flops)


def dry_run(s: Settings, rehearse: Callable) -> None:
    """Print what the run of these settings would cost, once. ValueError, with the nearest remedy, where it does not
    fit."""
    if int(os.environ.get("RANK", 0)):  # started by torchrun
        return
    total, peak = memory_of(s.gpu), peak_of(s.gpu, s.dtype)
    s.split_batch(s.world_size)
    source, data = shape_of(s), data_of(s)
    for model in filter(None, (s.init_from, s.reference_model)):
        shape = known_shape(model, source.vocab_size)
        if data:
            check_tokenizer(model, shape, data)
        if s.seq_len > shape.max_seq_len:
            raise ValueError(f"seq_len = {s.seq_len}: {model} was made for {shape.max_seq_len} tokens at most")
    if target := s.target_shape(source):
        check_target(source, target)
    cut_at = s.cut_at if target else s.steps  # until then the source is trained, and then the target
    trained = source if cut_at else target
    if (need := least(trained, 1, s.seq_len, MOST_GPUS)) > total:  # the numbers may be beyond what torch can count, too
        raise ValueError(f"it does not fit: {MOST_GPUS:,} GPUs would need more than {readable(need)} each")
    if target and s.gates not in choices.NAMES:
        with torch.device("meta"):
            masks = PruningMasks(source, target, 0)
        choices.scores(s.gates, masks, None, [], s.seed)  # is there such a file, and is it of these shapes?

    work, train_flops = work_of(s, source), flops_per_token(trained, s.seq_len)
    recomputed = flops_per_token(trained, s.seq_len, backward=False) if s.activation_checkpointing else 0.0

    if not data and source.vocab_size == BYTES:
        row("vocabulary", f"{BYTES}, that of byte tokens: {s.data} is not there")
    shapes = [parts(c) for c in (source, target) if c]
    row("parameters", "".join(f"{name:>16}" for name in ("source", "target")[: len(shapes)]))
    for part in shapes[0]:
        row(f"  {part}", "".join(f"{shape[part]:>16,}" for shape in shapes))
    row("  all", "".join(f"{sum(shape.values()):>16,}" for shape in shapes))
    row("training", f"{s.steps:,} steps of {s.batch_size} x {s.seq_len:,} tokens: {work.tokens:,} tokens")
    known = f"{work.domains} domains" if work.domains > 1 else "one domain"
    if work.domains == 1 and not data:
        known += f" ({s.data} is not there)"
    fewer = work.eval_tokens < work.evaluations * work.domains * s.eval_sequences * s.seq_len
    times = f"{work.evaluations:,} times {'at most ' if fewer else ''}{s.eval_sequences} sequences"
    row("evaluation", f"{times} of {known}: {work.eval_tokens:,} tokens")
    again = f" + {recomputed:.3g} recomputed" if recomputed else ""
    row("FLOPs per token", f"{train_flops:.3g}{again}")

    need = memory(s, source, rehearse)
    mine, micro_batch = s.split_batch(s.world_size)
    how = f"{s.world_size} x {s.gpu}"
    before = need["weights"] and not need["optimizer"]  # of what is hopeless neither is known
    peak_is = "at its peak, before the first step" if before else "at its peak"
    if s.world_size > 1:
        how += f", {s.parallel}"
    row("memory per GPU", f"{peak_is}; {how}, {mine // micro_batch} x {micro_batch} sequences per step")
    for kind in ROWS:
        row(f"  {kind}", f"{readable(need[kind]):>16}")
    logits = min(LOGITS_AT_ONCE, micro_batch * s.seq_len * source.vocab_size) * 4
    row("  all", f"{readable(need['all']):>16} of {readable(total)}, of which {readable(RESERVE)} must stay free")
    row("  float32 logits", f"{readable(logits):>16} at once, when activations are at their most")
    if need["all"] > total - RESERVE:
        fits = None
        for settings in remedies(s, trained.n_params(), total - RESERVE):
            print(f"trying {changes(s, settings)}")
            if memory(settings, source, rehearse)["all"] <= total - RESERVE:
                fits = changes(s, settings)
                break
        needed = f"{readable(need['all'])} of {readable(total - RESERVE)}, most of it for {max(ROWS, key=need.get)}"
        remedy = f"what fits: {fits}" if fits else "nothing that was tried fits"
        raise ValueError(f"it does not fit: {needed}; {remedy}")
    if peak:
        hours = work.flops / (peak * s.utilisation) / 3600 / s.world_size
        speed = f"at {s.utilisation:.0%} of {peak / 1e12:,.0f} TFLOP/s per GPU"
        row("time", f"{duration(hours)}, {hours * s.world_size:,.1f} GPU-hours, {speed}")
        row("speed", f"{work.tokens / hours / 3600:,.0f} training tokens per second, evaluations included")
        if price := s.dollars_per_gpu_hour:
            row("price", f"${hours * s.world_size * price:,.2f} at ${price:,g} per GPU-hour")
    else:
        row("time", f"not known: {s.gpu} is a size of memory, and names no GPU")


def duration(hours: float) -> str:
    """Hours, or seconds where they are few."""
    return f"{hours:,.2f} h" if hours >= 0.1 else f"{3600 * hours:,.1f} s"


def readable(n_bytes: float) -> str:
    """Bytes as GiB or MiB."""
    return f"{n_bytes / GIB:,.2f} GiB" if n_bytes >= GIB else f"{n_bytes / 2**20:,.2f} MiB"


def row(label: str, text: str) -> None:
    """A line of the table."""
    print(f"{label:<18}{text}")
