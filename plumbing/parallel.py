"""Several processes, as torchrun starts them: who am I, what do I hold of the model, and how do we agree?

    torchrun --nproc_per_node=8 train.py config/prune_7b.py

DDP: every process holds the whole model and a share of the batch; gradients are averaged. FSDP2 (`fully_shard`): every
process holds 1/n of each parameter and optimizer state, and gathers one layer at a time to compute with it.
Both are PyTorch's. With one process nothing is exchanged, and training is the same code.

The gates are small: every process holds them all, and averages their gradients itself.
"""

import gc
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from model import Gates, Llama, LlamaConfig, open_weights, read_config

# losses are a view of a flat tensor, and nothing changes them in place
warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")

# -- who am I, and how do we agree? ---------------------------------------------------------------------------------

# The first process may score a large model, or write a large checkpoint, for longer than the default half an hour.
PATIENCE = timedelta(hours=2)
patient = None  # the group of all processes, by gloo, with this timeout: see `start`


def find_device(name: str) -> torch.device:
    """The device of a name, 'auto' for CUDA if there is one. ValueError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = re.fullmatch(r"cuda(?::(\d{1,4}))?", name)
    if name != "cpu" and not gpu:
        raise ValueError(f"device = {name!r} is not one of auto, cpu, cuda, cuda:0, cuda:1 and so on")
    if gpu and int(gpu[1] or 0) >= torch.cuda.device_count():
        raise ValueError(f"device = {name!r} is not there: torch finds {torch.cuda.device_count()} CUDA devices")
    if gpu and "LOCAL_RANK" in os.environ:  # the first GPU would have the context of every process in its memory
        name = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
    try:
        return torch.empty(0, device=name).device
    except RuntimeError as error:  # the driver's
        raise ValueError(f"device = {name!r}: {str(error).splitlines()[0]}") from None


def start(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; returns the device of this one. Nothing to do without torchrun."""
    if "WORLD_SIZE" not in os.environ:
        return device
    if device.type == "cuda":
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            if name not in os.environ:
                raise ValueError(f"WORLD_SIZE is set, but {name} is not: start it with torchrun")
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if int(os.environ["LOCAL_WORLD_SIZE"]) > torch.cuda.device_count():
            # every process sees this; the first one says so
            raise ValueError(f"{torch.cuda.device_count()} GPUs here, fewer than --nproc_per_node")
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun keeps its store when it restarts processes, and the addresses of the dead ones are still in it
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    # gloo beside nccl: what the hosts have to agree on must not wait for the devices
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    global patient
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return device


def stop() -> None:
    """Leave the group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return rank() == 0


def barrier() -> None:
    """Wait for all."""
    if size() > 1:
        dist.all_reduce(torch.zeros(()))  # between the CPUs


def sum_(x: Tensor) -> Tensor:
    """Sum over the processes, in place."""
    if size() > 1:
        dist.all_reduce(x)
    return x


def any_of(flag: bool) -> bool:
    """Whether the flag is set in any process. The hosts talk, the devices go on working."""
    if size() == 1:
        return flag
    return bool(sum_(torch.tensor(float(flag))))


def from_first(value):
    """The first process's value, a small Python object: two machines may differ in the last digit of a sum."""
    if size() > 1:
        box = [value]
        dist.broadcast_object_list(box, device=torch.device("cpu"))
        value = box[0]
    return value


def gather(value, group=None) -> list:
    """The value of each process, a small Python object, in the order of their numbers. group: those that take part."""
    values = [value]
    if size() > 1:
        values *= size()
        dist.all_gather_object(values, value, group or patient)
    return values


@contextmanager
def together(group=None):
    """An error of one process inside is raised in all of them, so that all end and none waits for another. Nothing
    inside may talk to the other processes. group: those that take part."""
    mine = None
    try:
        yield
    except (ValueError, OSError) as error:
        mine = error
    for error in gather(mine, group):
        if error is not None:
            raise error


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average the gradients of parameters that every process holds whole, in one message."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if size() > 1 and gradients:
        flat = sum_(torch.cat([g.flatten() for g in gradients])) / size()
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients])):
            gradient.copy_(mean.view_as(gradient))


# -- what do I hold? ------------------------------------------------------------------------------------------------


def sharding(parallel: str, dtype: str, device: torch.device) -> dict:
    """What `make_model` needs to know of the settings `parallel` and `dtype`: the mesh of all processes, over which a
    model is sharded (None: each process holds the whole model), and what a sharded model computes in."""
    shards = parallel == "fsdp" and dist.is_initialized()
    mesh = dist.init_device_mesh(device.type, (size(),)) if shards else None
    return {"mesh": mesh, "dtype": torch.bfloat16 if dtype == "bfloat16" else None}


def make_model(
    config: LlamaConfig,
    source: Path | int | None,
    device: torch.device,
    mesh=None,
    dtype=None,
    checkpoint_layers: bool = False,
    compiled: bool = False,
) -> Llama:
    """The model, or this process's shard of it, with the weights of `source`: a model directory, a seed to draw them
    from, or None where a checkpoint will fill them in. It is never whole in memory where it is sharded. ValueError
    where `source` has not these weights, or one that is not finite.

    mesh, dtype: see `sharding`; weights and the sums of their gradients stay float32. checkpoint_layers, compiled:
    whether each layer is computed again in the backward pass, and whether it is compiled.
    """
    with torch.device("meta"):
        model = Llama(config)
    if mesh is None:
        empty = {name: torch.empty_like(parameter, device=device) for name, parameter in model.named_parameters()}
        model = Llama.of_weights(config, empty)
    model.checkpoint_layers = checkpoint_layers
    if compiled:
        torch.compiler.reset()  # all layers share few graphs, and those of the model before a cut would count, too
        for layer in model.layers:
            layer.compile()
    if mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for module in (*model.layers, model):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        model.to_empty(device=device)
        if config.tie_embeddings:  # fully_shard has made two parameters of the tied one
            model.lm_head.weight = model.embed_tokens.weight
    if isinstance(source, Path):
        read_weights(model, source)
    elif source is not None:
        with torch.no_grad():
            for parameter, weight in zip(model.parameters(), model.initial_weights(source)):
                local(parameter).copy_(weight[my_rows(parameter)])
    return model


@torch.no_grad()
def read_weights(model: Llama, path: Path) -> None:
    """Fill a model, or this process's shard of it, with the weights of a directory in Hugging Face's format. ValueError
    unless the directory has just these weights, and all of them are finite."""
    places = open_weights(path, model.config)
    for name, parameter in model.named_parameters():
        local(parameter).copy_(places[name].read(my_rows(parameter)))
    check_finite(dict(model.named_parameters()), path)


def read_model(path: Path, device: torch.device, mesh=None, dtype=None) -> Llama:
    """The model of a directory in Hugging Face's format, in float32, whole or this process's shard."""
    return make_model(read_config(path), path, device, mesh, dtype)


def is_sharded(model: nn.Module) -> bool:
    """Whether the processes hold a shard each of it."""
    return isinstance(model, FSDPModule)


def check_finite(tensors: dict[str, Tensor], where: Path) -> None:
    """ValueError where a tensor that was read from `where`, or this process's shard of it, has NaN or infinity."""
    for name, x in tensors.items():
        values = local(x)
        if values.numel() and not torch.stack(values.aminmax()).isfinite().all():  # NaN is both, the least and the most
            raise ValueError(f"{where}: {name} has values that are not finite")


def parameters_of(tree: nn.Module) -> dict[str, Tensor]:
    """Name -> parameter as the optimizer has it, whole or this process's shard: after an evaluation, FSDP still has
    those of the outermost module whole."""
    for module in tree.modules():
        if is_sharded(module):
            module.reshard()
    return dict(tree.named_parameters())


def is_shard(x: Tensor) -> bool:
    """Whether this process holds only some rows of a tensor."""
    return isinstance(x, DTensor)


def local(x: Tensor) -> Tensor:
    """What this process holds of a parameter: all of it, or its shard."""
    return x.to_local() if is_shard(x) else x


def my_rows(x: Tensor) -> slice:
    """Which rows of a parameter those are."""
    return share(x.shape[0]) if is_shard(x) else slice(None)


def share(n: int) -> slice:
    """Which of n rows are this process's, where each process has some: as fully_shard and torch.chunk cut them. The
    last ones may have fewer rows, or none."""
    rows = -(-n // size())
    return slice(rank() * rows, (rank() + 1) * rows)


class Engine:
    """A model as the training loop calls it: in mixed precision, and as one of several processes.

    dtype: what matrix products are computed in ("float32" or "bfloat16"). each: average the gradients after each
    micro-batch, which needs less memory with shards. Otherwise they are averaged with the last one.
    """

    def __init__(self, model: Llama, dtype: str = "float32", each: bool = False):
        self.model, self.dtype, self.each = model, dtype, each
        self.device = local(model.embed_tokens.weight).device
        self.module = model

    def begin(self) -> None:
        """Make the model one of several, before the first backward pass: DDP's buckets need as much memory as it."""
        if size() > 1 and not is_sharded(self.model):
            self.module = DistributedDataParallel(self.model, gradient_as_bucket_view=True)
            self._order_buckets()

    def _order_buckets(self) -> None:
        """DDP orders its buckets anew after its first backward pass. Let that be one of two tokens, here: so a run that
        goes on adds gradients in the same order, and gets the same bytes, as one that did not stop."""
        tokens = torch.zeros(1, 2, dtype=torch.int64, device=self.device)
        with torch.compiler.set_stance("force_eager"):  # a compiled layer would be compiled for this shape
            self(tokens, targets=tokens).sum().backward()
        for parameter in self.model.parameters():
            parameter.grad = None

    def __call__(self, tokens: Tensor, z: Gates | None = None, targets: Tensor | None = None) -> Tensor:
        """As the model's forward."""
        with autocast(self.model, self.dtype):
            return self.module(tokens, z, targets=targets)

    def micro_batches(self, parts: list) -> Iterator:
        """The micro-batches of a step. The backward pass of the last one averages the gradients over the processes."""
        for i, part in enumerate(parts):
            now = self.each or i == len(parts) - 1
            if is_sharded(self.module):
                self.module.set_requires_gradient_sync(now)
            alone = isinstance(self.module, DistributedDataParallel) and not now
            with self.module.no_sync() if alone else nullcontext():
                yield part

    def release(self) -> None:
        """Drop DDP, and what it holds."""
        self.module = self.model
        gc.collect()

    def close(self) -> None:
        """Leave the other processes. DDP is dropped before the group is: what it frees after it would wait for a thread
        that waits for Python."""
        self.release()
        stop()


def autocast(model: Llama, dtype: str, cached: bool = True):
    """A context in which the matrix products of `model` are computed in `dtype`, "float32" or "bfloat16". A sharded
    model has its own rule, from `make_model`. cached: the bfloat16 copies of all weights stay until the context ends.
    """
    device, mixed = local(model.embed_tokens.weight).device, dtype == "bfloat16" and not is_sharded(model)
    return torch.autocast(device.type, torch.bfloat16, enabled=mixed, cache_enabled=cached)


def accumulated(model: nn.Module) -> list[Tensor]:
    """The gradients of a sharded model that are not averaged yet, and therefore whole."""
    groups = [m._get_fsdp_state()._fsdp_param_group for m in model.modules() if is_sharded(m)]
    gradients = [p.unsharded_accumulated_grad for group in groups if group for p in group.fsdp_params]
    return [g for g in gradients if g is not None]


@torch.no_grad()
def clip_gradients(modules: Iterable[nn.Module], max_norm: float) -> Tensor:
    """Scale all gradients so that their norm together is at most max_norm; returns what it was, without waiting for
    it. A module's parameters are all sharded or all whole."""
    parameters = [[p for p in module.parameters() if p.grad is not None] for module in modules]
    parameters = [group for group in parameters if group]
    norms = [nn.utils.get_total_norm([p.grad for p in group]) for group in parameters]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).norm()
    for group in parameters:
        nn.utils.clip_grads_with_norm_(group, max_norm, norm)
    return norm
