"""The settings of a run: what they are, what they may be, and the model shapes that follow from them.

    python train.py --help

A field is `Annotated[type, "what it means", ...]`, with its limits beside it. `Free` marks what may change when a run
goes on. The kind of run follows from two of them: without `init_from` the model is made from scratch (pretrain); a
target shape means pruning; else a model is trained on (continue).
"""

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Literal

from dro import MORE_POINTS_THAN, SCHEDULES, WITH_REFERENCES
from masks import LOG_ALPHA_MAX, LOG_ALPHA_MIN, HardConcrete, gate_shapes
from model import LlamaConfig
from plumbing import records
from plumbing.command_line import Free, Group, Limits, fields, out_of_limits
from plumbing.huggingface import model_type_of

POSITIVE, NOT_NEGATIVE, SHARE = Limits(1), Limits(0), Limits(0, 1)
SHAPE = ("n_layer", "d_model", "n_head", "n_kv_head", "head_dim", "d_ffn", "tie_embeddings")  # of a model from scratch
# the share of a row that learned gates close is between these, where all log_alpha of the row are at a limit
CLOSABLE = tuple(1 - HardConcrete((1,), 1, end).prob_nonzero().item() for end in (LOG_ALPHA_MAX, LOG_ALPHA_MIN))
SIZE, SIZE_OR_0 = Limits(1, records.MAX_SIZE), Limits(0, records.MAX_SIZE)  # what is made can be read again


@dataclass(frozen=True)
class Settings:
    """python train.py [config/FILE.py ...] [--key=value ...]
    One loop for all three stages: pretrain a source model, prune it, continue the training of the small model."""

    data: Annotated[str, Group("files"), "data set that prepare_data.py has made"] = "data/demo"
    domains: Annotated[list, "the domains to use; [] means all"] = field(default_factory=list)
    out: Annotated[str, Free, "directory of this run"] = "out/run"
    resume: Annotated[
        str,
        Free,
        "auto: go on from the newest checkpoint in `out`. never: refuse if `out` holds a run. Or the path of another "
        "run or checkpoint: go on from there, in `out`",
    ] = "auto"
    save_interval: Annotated[int, Free, POSITIVE, "steps between checkpoints"] = 200
    keep_checkpoints: Annotated[int, Free, POSITIVE, "number of checkpoints to keep; older ones are removed"] = 2
    stop_at: Annotated[
        int, Free, NOT_NEGATIVE, "save and stop after this step, if it is still to come; 0 means to train to the end"
    ] = 0

    init_from: Annotated[
        str, Group("model"), "model directory or run to start from; '' means from scratch with the shape below"
    ] = ""
    export_dtype: Annotated[
        Literal["source", "float32", "bfloat16", "float16"],
        "dtype of the finished model's weights; source: that of init_from, or float32 from scratch",
    ] = "source"
    n_layer: Annotated[int, Limits(1, records.MAX_LAYERS), "layers"] = 6
    d_model: Annotated[int, SIZE, "hidden dimensions"] = 128
    n_head: Annotated[int, SIZE, "query heads"] = 4
    n_kv_head: Annotated[int, SIZE_OR_0, "key/value heads; 0 means n_head"] = 0
    head_dim: Annotated[int, Limits(0, records.MAX_HEAD_DIM), "dimensions of a head; 0 means d_model / n_head"] = 0
    d_ffn: Annotated[int, SIZE, "feed-forward dimensions"] = 344
    tie_embeddings: Annotated[bool, "input and output share one embedding"] = False

    target_n_layer: Annotated[int, Group("pruning"), NOT_NEGATIVE, "layers to keep; 0 means all"] = 0
    target_d_model: Annotated[
        int,
        NOT_NEGATIVE,
        "hidden dimensions to keep; 0 means all. Of a Llama, a multiple of target_n_head: transformers loads no other",
    ] = 0
    target_n_head: Annotated[
        int,
        NOT_NEGATIVE,
        "query heads to keep in each layer; 0 means all; heads that share keys and values go together",
    ] = 0
    target_d_ffn: Annotated[int, NOT_NEGATIVE, "feed-forward dimensions to keep in each layer; 0 means all"] = 0
    gates: Annotated[
        str,
        "what chooses. learned: gates that are trained with the weights. random, magnitude (of weights), activation, "
        "taylor, or the path of a pruning.json: the choice is made before the first step",
    ] = "learned"
    noise_from: Annotated[int, NOT_NEGATIVE, "learned: step at which the noise of the gates begins to fade out"] = 0
    noise_to: Annotated[int, NOT_NEGATIVE, "learned: step from which on there is none; 0 means that it stays"] = 0
    settle_at: Annotated[
        int, NOT_NEGATIVE, "learned: step at which the choice is fixed; 0 means after the last, as in the paper"
    ] = 0
    fade: Annotated[
        int,
        NOT_NEGATIVE,
        "steps in which what is not kept fades out once the choice is fixed; then the small model is cut out, and the "
        "same run trains it on",
    ] = 0
    gate_samples: Annotated[
        int, POSITIVE, "learned: times that the gates are drawn in a step, each time for an equal part of the batch"
    ] = 1
    sparsity_warmup: Annotated[int, NOT_NEGATIVE, "learned: steps in which the target sparsity rises from 0"] = 640
    gate_lr: Annotated[float, NOT_NEGATIVE, "learned: peak learning rate of log_alpha"] = 1.0
    multiplier_lr: Annotated[float, NOT_NEGATIVE, "learned: peak learning rate of lambda and phi"] = 1.0
    log_alpha: Annotated[float, Limits(-100, 100), "learned: initial log_alpha, within ±4.605"] = math.log(100)
    phi: Annotated[float, NOT_NEGATIVE, "learned: initial phi of every granularity"] = 0.0

    steps: Annotated[int, Group("optimization"), POSITIVE, "optimizer steps"] = 1000
    batch_size: Annotated[int, POSITIVE, "sequences in a step, over all processes"] = 8
    micro_batch: Annotated[
        int,
        Free,
        NOT_NEGATIVE,
        "sequences that a process computes at once; 0 means all of them, or all that share a gate sample",
    ] = 0
    seq_len: Annotated[int, POSITIVE, "tokens in a sequence"] = 256
    lr: Annotated[float, NOT_NEGATIVE, "peak learning rate of the weights; all rates share one warm-up and cosine"] = (
        1e-4
    )
    min_lr: Annotated[float, SHARE, "final learning rates, as a share of the peak"] = 0.1
    warmup: Annotated[int, NOT_NEGATIVE, "steps of linear learning-rate warm-up"] = 0
    beta1: Annotated[float, Limits(0, 0.999), "AdamW's decay of the mean of gradients"] = 0.9
    beta2: Annotated[float, Limits(0, 0.999), "AdamW's decay of the mean of squared gradients"] = 0.95
    eps: Annotated[float, Limits(1e-30), "AdamW's epsilon"] = 1e-8
    weight_decay: Annotated[
        float, NOT_NEGATIVE, "AdamW's weight decay; it applies to the weights, not to the gates"
    ] = 0.0
    grad_clip: Annotated[float, NOT_NEGATIVE, "largest norm of all gradients together; 0 means no clipping"] = 1.0

    ratio: Annotated[dict, Group("domains"), "initial share of each domain; {} means by its number of tokens"] = field(
        default_factory=dict
    )
    schedule: Annotated[
        Literal[tuple(SCHEDULES)],
        "how evaluations move the domain weights. constant: not at all. sheared: by Sheared LLaMA's rule. dro: by "
        "robust optimisation",
    ] = "constant"
    dynamic_reference: Annotated[
        bool,
        "the reference loss comes from the scaling law's prediction (section 3.2); until there is one, the given "
        "reference counts, and without a given one the weights stay; for dro and sheared",
    ] = False
    dynamic_ratio: Annotated[bool, "the reference ratio follows the weights (section 3.3); for dro"] = True
    law: Annotated[
        Literal["rate", "paper"],
        "what predicts. rate: eq. 4 with a learning-rate term, fitted to all domains together. paper: the published "
        "rule, eq. 4 for each domain alone",
    ] = "rate"
    reference_losses: Annotated[dict, "first reference loss of each domain, in nats per token"] = field(
        default_factory=dict
    )
    reference_model: Annotated[
        str, "model whose validation losses are the first reference losses; '' means that there is none"
    ] = ""
    rho: Annotated[float, NOT_NEGATIVE, "radius of the robust set (eq. 5); 0.1 in the paper"] = 1.0
    floor: Annotated[
        float,
        Limits(0, 0.999),
        "smallest weight of a domain, as a part of its share in the reference ratio; a lower weight is lifted to it, "
        "then all are made to sum to 1",
    ] = 0.2
    temperature: Annotated[
        float,
        NOT_NEGATIVE,
        "so many nats of excess (loss minus reference loss) raise a domain's weight by at most its share in the "
        "reference ratio; a larger value makes smaller moves; 0 means no limit, as in the paper",
    ] = 0.2
    delta: Annotated[float, SHARE, "how fast the reference ratio follows the weights; 0.1 in the paper"] = 0.5
    bound: Annotated[
        float,
        Limits(1, 1e12),
        "each share of the reference ratio is kept within 1/bound and bound times its initial value, then within "
        "the smallest and the largest initial share. After each of the two, all are made to sum to 1, which may "
        "move some beyond. 2 in the paper",
    ] = 16.0
    step_size: Annotated[float, Limits(0, 1e12), "step size of the sheared schedule"] = 1.0
    clip_excess: Annotated[
        bool, "sheared: a loss below its reference counts as equal to it, as in Sheared LLaMA's paper"
    ] = False
    eval_interval: Annotated[int, POSITIVE, "steps between evaluations"] = 50
    eval_sequences: Annotated[int, POSITIVE, "validation sequences of each domain"] = 16

    seed: Annotated[
        int,
        Group("machine"),
        Limits(0, records.MAX_INT),
        "seed of initial weights, gates and data order (a run keeps the order of the run it starts from)",
    ] = 0
    device: Annotated[str, Free, "cpu, cuda, cuda:1, ...; auto means cuda if there is one"] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16"],
        "dtype of the matrix products (with fsdp: of everything except the loss); the weights stay float32",
    ] = "float32"
    parallel: Annotated[
        Literal["ddp", "fsdp"], Free, "with several processes each holds the whole model (ddp) or a shard of it (fsdp)"
    ] = "ddp"
    shard_gradients: Annotated[
        bool, Free, "fsdp: average gradients after every micro-batch, which needs less memory and more traffic"
    ] = False
    activation_checkpointing: Annotated[
        bool, Free, "compute each layer again in the backward pass, which needs less memory and more time"
    ] = False
    compile: Annotated[bool, Free, "compile each layer with torch.compile"] = False
    threads: Annotated[int, Free, Limits(0, 1024), "CPU threads; 0 means torch's choice"] = 0
    log_interval: Annotated[int, Free, POSITIVE, "steps between log lines"] = 10

    dry_run: Annotated[
        bool, Free, Group("dry run"), "print what the run would need: two steps run on shapes, and nothing is written"
    ] = False
    world_size: Annotated[int, Free, Limits(1, 100_000), "number of GPUs that the dry run assumes"] = 1
    gpu: Annotated[
        str, Free, "GPU that the dry run assumes: h200, h100, a100, a100-40gb, or a memory size such as 24GB"
    ] = "h100"
    utilisation: Annotated[
        float, Free, Limits(0.01, 1), "share of the GPU's peak that the dry run assumes is reached"
    ] = 0.33
    dollars_per_gpu_hour: Annotated[float, Free, NOT_NEGATIVE, "price that the dry run assumes; 0 means unknown"] = 0.0

    def __post_init__(self):
        wrong = out_of_limits(self)
        for name in ("ratio", "reference_losses"):
            values = getattr(self, name).values()
            if not all(type(value) in (int, float) and 1e-15 <= value <= 1e15 for value in values):
                wrong.append(
                    f"{name} = {getattr(self, name)} must have a number above 0, from 1e-15 to 1e15, for each domain"
                )
        if not self.out:
            wrong.append("out is empty")
        if self.reference_losses and self.reference_model:
            wrong.append("reference_losses and reference_model are both set, one of them must be empty")
        if self.learns_gates and self.batch_size % max(1, self.gate_samples):
            wrong.append(f"batch_size = {self.batch_size} must be a multiple of gate_samples = {self.gate_samples}")
        wrong += self._wrong_schedule() + self._wrong_pruning()
        if wrong:
            raise ValueError("; ".join(wrong))

    def _wrong_schedule(self) -> list[str]:
        given = self.reference_losses or self.reference_model
        if self.schedule not in WITH_REFERENCES or given:
            return []
        if not self.dynamic_reference:
            return [
                f"schedule = '{self.schedule}' needs references: set reference_model, reference_losses or "
                "dynamic_reference"
            ]
        if not self.has_points_for_a_law:
            return [
                f"eval_interval = {self.eval_interval} must be below steps / {MORE_POINTS_THAN + 1}: with no "
                f"references given, the domain weights move only after more than {MORE_POINTS_THAN} evaluations"
            ]
        return []

    def _wrong_pruning(self) -> list[str]:
        if not self.is_pruning:
            given = {"gates": "learned", "settle_at": 0, "fade": 0, "noise_from": 0, "noise_to": 0}
            given = {name: getattr(self, name) for name, usual in given.items() if getattr(self, name) != usual}
            return [f"{name} = {value!r} needs a target shape" for name, value in given.items()]
        wrong = []
        if not self.init_from:
            wrong.append("a target shape needs a model to prune: set init_from")
        for name in ("settle_at", "noise_from", "noise_to") if self.gates != "learned" else ():
            if getattr(self, name):
                wrong.append(f"{name} = {getattr(self, name)} is for gates = 'learned', not '{self.gates}'")
        if self.cut_at > self.steps:
            wrong.append(f"settle_at + fade = {self.cut_at} must not be above steps = {self.steps}")
        if self.gates == "learned":
            end, what = (self.settle_at, "settle_at") if self.settle_at else (self.steps, "steps")
            if self.sparsity_warmup >= end:
                wrong.append(
                    f"sparsity_warmup = {self.sparsity_warmup} must be below {what} = {end}: with a target shape and "
                    "gates = 'learned', the target sparsity is reached after these steps"
                )
            if self.fade and not self.settle_at:
                wrong.append(f"fade = {self.fade} needs settle_at, the step at which the choice is fixed")
            if self.noise_from and self.noise_from >= self.noise_to:
                wrong.append(f"noise_from = {self.noise_from} must be below noise_to = {self.noise_to}")
        return wrong

    @property
    def is_pruning(self) -> bool:
        """Whether a target shape is set."""
        return any((self.target_n_layer, self.target_d_model, self.target_n_head, self.target_d_ffn))

    @property
    def has_points_for_a_law(self) -> bool:
        """Whether there are enough evaluations that the scaling law is asked before the run ends."""
        return self.steps > self.eval_interval * (MORE_POINTS_THAN + 1)

    @property
    def learns_gates(self) -> bool:
        """Whether the run trains gates: it prunes, and the choice is not made before the training."""
        return self.is_pruning and self.gates == "learned"

    @property
    def settles(self) -> bool:
        """Whether the gates are 0 or 1 at the cut: the choice is fixed before the run ends."""
        return self.is_pruning and (self.gates != "learned" or self.settle_at > 0)

    @property
    def cut_at(self) -> int:
        """Number of steps after which the small model is cut out."""
        return self.settle_at + self.fade if self.settles else self.steps

    @property
    def pruned_at(self) -> int:
        """Step at which as much is to be pruned as the target shape asks for."""
        return self.sparsity_warmup if self.learns_gates else self.fade

    @property
    def stage(self) -> str:
        """pretrain, prune or continue, as the settings imply."""
        if self.is_pruning:
            return "prune"
        return "continue" if self.init_from else "pretrain"

    def split_batch(self, processes: int) -> tuple[int, int]:
        """(sequences of a step for each process, sequences in a micro-batch); the gates are the same for all sequences
        of a micro-batch. ValueError where the numbers do not divide."""
        if self.batch_size % processes:
            raise ValueError(f"batch_size = {self.batch_size} must be a multiple of the {processes} processes")
        mine = largest = self.batch_size // processes
        if self.learns_gates:
            largest = math.gcd(mine, self.batch_size // self.gate_samples)
        if self.micro_batch and largest % self.micro_batch:
            users = f"{processes} processes"
            if largest < mine:
                users += f" and {self.gate_samples} gate samples"
            raise ValueError(
                f"micro_batch = {self.micro_batch} must divide {largest}: {users} share batch_size = {self.batch_size}"
            )
        return mine, self.micro_batch or largest

    def shape_from_scratch(self, vocab_size: int, eot: int | None = None) -> LlamaConfig:
        """Shape of a model from scratch. ValueError for one that cannot be."""
        if self.d_model % self.n_head:
            raise ValueError(
                f"d_model = {self.d_model} must be a multiple of n_head = {self.n_head}: transformers needs it"
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

    def target_shape(self, source: LlamaConfig) -> LlamaConfig | None:
        """Shape that `source` is to be pruned to; None where the run prunes nothing. ValueError where it cannot be."""
        if not self.is_pruning:
            return None
        n_head = self.target_n_head or source.n_head
        if n_head * source.n_kv_head % source.n_head:
            group = source.n_head // source.n_kv_head
            raise ValueError(f"target_n_head = {n_head} must be a multiple of {group}, the query heads of a KV group")
        target = replace(
            source,
            n_layer=self.target_n_layer or source.n_layer,
            d_model=self.target_d_model or source.d_model,
            n_head=n_head,
            n_kv_head=n_head * source.n_kv_head // source.n_head,
            d_ffn=self.target_d_ffn or source.d_ffn,
        )
        if target.d_model % target.n_head and model_type_of(asdict(source)) == "llama":
            group = source.n_head // source.n_kv_head
            possible = [n for n in range(group, source.n_head + 1, group) if target.d_model % n == 0]
            advice = f"target_n_head may be {', '.join(map(str, possible))}" if possible else "no target_n_head will do"
            raise ValueError(
                f"target_d_model = {target.d_model} must be a multiple of the {target.n_head} heads kept: transformers "
                f"loads no other Llama; with this width {advice}"
            )
        if target == source:
            raise ValueError(f"the target shape is that of {self.init_from}: there is nothing to prune")
        if self.learns_gates:
            check_closable(source, target)
        return target


def check_closable(source: LlamaConfig, target: LlamaConfig) -> None:
    """ValueError where learned gates cannot get as sparse, or stay as dense, as the target."""
    low, high = CLOSABLE
    for granularity, (*_, size) in gate_shapes(source).items():
        keep = gate_shapes(target)[granularity][-1]
        if keep < size and not low <= 1 - keep / size <= high:
            raise ValueError(
                f"the target closes {size - keep} of {size} {granularity} gates, and gates = 'learned' can close "
                f"{100 * low:.1f} to {100 * high:.1f} % of them: take another target, or gates = 'activation'"
            )


FREE = {name for name, setting in fields(Settings).items() if setting.free}
