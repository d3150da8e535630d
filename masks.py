"""Pruning as learning: hard-concrete gates, the constraint that makes them hit the target shape, and the extraction.

Every structure that may go (a layer, a hidden dimension, a KV group with its query heads, a feed-forward dimension)
gets a gate z in [0, 1]. While training, z is sampled from a hard-concrete distribution, a stretched and clipped sigmoid
that puts real probability on exactly 0 and exactly 1 (arXiv 1712.01312), so "how many survive" has a gradient:

    y = sigmoid((ln u - ln(1-u) + log_alpha) / beta)      u ~ U(0, 1)          HardConcrete.sample
    z = clip(y · (zeta - gamma) + gamma, 0, 1)
    P(z != 0) = 1 - sigmoid(beta · ln(x/(1-x)) - log_alpha),  x = -gamma/(zeta - gamma)
                                                                               HardConcrete.prob_nonzero
    l~ = lambda · (s - t) + phi · (s - t)²                paper, eq. 1         PruningMasks.lagrangian

    symbol        variable                     meaning
    log_alpha     HardConcrete.log_alpha       what is learned: large = keep
    s, t          sparsity, target             expected and wanted share of zeros, t ramps up linearly
    s - t         gap                          what the constraint brings to 0
    lambda, phi   multipliers[granularity]     Lagrange multipliers: gradient *ascent*

After training the highest-scoring structures are kept, exactly as many as the target shape has, and `extract` cuts them
out: the small dense Llama computes exactly what the source does with its deterministic gates at the target shape.

    python train.py config/toy_gates.py
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from model import Gates, Llama, LlamaConfig, scale_rows
from plumbing import randomness
from plumbing.transfer import send

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # stretch and temperature
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(1e-2), math.log(1e2)
UNDECIDED = (0.05, 0.95)  # a gate whose P(z != 0) lies between is neither pruned nor kept yet


def gate_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """granularity -> shape of its gates. The gates of a row (the last axis) compete for the places that are kept."""
    return {
        "layer": (config.n_layer,),
        "hidden": (config.d_model,),
        "head": (config.n_layer, config.n_kv_head),
        "ffn": (config.n_layer, config.d_ffn),
    }


def survivors(scores: Tensor, keep: int | Tensor) -> Tensor:
    """True for the `keep` highest scores of each row (the last axis), False for the others: bool, shape of the scores.

    keep: a number for all rows, or one for each row (..., 1). Equal scores are ordered by a random draw, always the
    same one. Ordered by index, a model whose scores are all equal would lose the same heads in every layer.
    """
    lot = send(torch.from_numpy(randomness.generator(0, randomness.TIES).random(scores.shape)), scores.device)
    shuffled = lot.argsort(dim=-1)
    rank = scores.gather(-1, shuffled).argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 for the lowest score
    return torch.empty_like(rank, dtype=torch.bool).scatter_(-1, shuffled, rank >= scores.shape[-1] - keep)


class HardConcrete(nn.Module):
    """The distribution of one granularity's gates, `shape` of them. `keep` of each row (the last axis) survive."""

    def __init__(self, shape: tuple[int, ...], keep: int, init: float = LOG_ALPHA_MAX):
        super().__init__()
        if not 0 < keep <= shape[-1]:
            raise ValueError(f"cannot keep {keep} of {shape[-1]}")
        self.keep = keep
        self.log_alpha = nn.Parameter(torch.full(shape, float(init)))

    def prob_nonzero(self) -> Tensor:
        """P(z != 0), shape of the gates. Its sum is the expected number of survivors, and has a gradient."""
        x = -GAMMA / (ZETA - GAMMA)
        prob_zero = torch.sigmoid(BETA * math.log(x / (1 - x)) - self.log_alpha)
        return 1 - prob_zero.clamp(1e-6, 1 - 1e-6)

    def sample(self, u: Tensor, noise: float = 1.0) -> Tensor:
        """Gates for uniform noise u in (0, 1) of the same shape. noise: how much of it counts, 1 is the paper's."""
        y = torch.sigmoid((noise * (u.log() - (1 - u).log()) + self.log_alpha) / BETA)
        return (y * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def deterministic(self, keep: int | None = None) -> Tensor:
        """Gates without noise. In each row `keep` gates survive; without `keep`, as many as are expected to now."""
        z = torch.sigmoid(0.8 * self.log_alpha / BETA)  # 0.8 and no stretch, as in Sheared LLaMA's code
        if keep is None:  # each row has its own number: on the way to the target, layers differ
            size = z.shape[-1]  # the number of zeros is rounded, as in Sheared LLaMA's code: a half goes the other way
            keep = size - (size - self.prob_nonzero().sum(-1, keepdim=True)).round()
        return z * survivors(self.log_alpha, keep)

    @torch.no_grad()
    def fading(self, share: float) -> Tensor:
        """Gates on a straight line from `sample` without noise (`deterministic` has another formula), at share 0, to 0
        or 1 as at the target, at share 1."""
        now = self.sample(torch.full_like(self.log_alpha, 0.5), noise=0.0)
        return now.lerp(self.kept(), share)

    def kept(self) -> Tensor:
        """1 where a gate survives at the target, else 0."""
        return survivors(self.log_alpha, self.keep).to(self.log_alpha.dtype)


class PruningMasks(nn.Module):
    """The distributions of all gates that prune `source` to `target`, with their Lagrange multipliers.

    `layer`, `hidden`, `head`, `ffn` are a HardConcrete each, or None where the target equals the source. `head` gates
    KV groups: a key/value head with all its query heads. `multipliers[granularity]` is (lambda, phi).

    sparsity_warmup: steps in which the target sparsity ramps up from 0. log_alpha, phi: initial values (short runs need
    a phi above 0). ValueError when the target cannot be cut out of the source.

    How gates settle, which the paper's do not: between the steps noise_from and noise_to their noise fades out; at
    settle_at the choice is fixed, and within `fade` steps what goes fades out. Then the gates are 0 or 1.
    """

    def __init__(
        self,
        source: LlamaConfig,
        target: LlamaConfig,
        sparsity_warmup: int,
        log_alpha: float = LOG_ALPHA_MAX,
        phi: float = 0.0,
        noise_from: float = 0,
        noise_to: float = math.inf,
        settle_at: float = math.inf,
        fade: int = 0,
    ):
        super().__init__()
        check_target(source, target)
        self.source, self.target, self.sparsity_warmup = source, target, sparsity_warmup
        self.noise_from, self.noise_to, self.settle_at, self.fade = noise_from, noise_to, settle_at, fade
        self.multipliers = nn.ModuleDict()
        for granularity, shape in gate_shapes(source).items():
            keep, distribution = gate_shapes(target)[granularity][-1], None
            if keep < shape[-1]:
                distribution = HardConcrete(shape, keep, log_alpha)
                self.multipliers[granularity] = nn.ParameterList([torch.tensor(0.0), torch.tensor(float(phi))])
            setattr(self, granularity, distribution)

    def distributions(self) -> dict[str, HardConcrete]:
        """granularity -> its HardConcrete, for those that are pruned."""
        return {granularity: getattr(self, granularity) for granularity in self.multipliers}

    def each(self, gates_of: Callable[[HardConcrete], Tensor]) -> Gates:
        """What a function gives for the distribution of each granularity that is pruned."""
        return Gates(**{granularity: gates_of(d) for granularity, d in self.distributions().items()})

    def sample(self, seed: int, step: int, gate_sample: int) -> Gates:
        """One draw of all gates. A step's batch may be divided into several parts, each with its own gate sample. Once
        the choice is fixed, the gates are not drawn, see `settling`.

        The noise follows from (seed, step, gate_sample), so it is the same on any number of processes.
        """
        if step >= self.settle_at:
            return self.settling(step + 1)
        noise = 1.0 - share_of(step, self.noise_from, self.noise_to)
        rng = randomness.generator(seed, randomness.NOISE, step, gate_sample)

        def draw(distribution):
            log_alpha = distribution.log_alpha
            u = torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, log_alpha.shape)).to(log_alpha.dtype)
            return distribution.sample(send(u, log_alpha.device), noise)

        return self.each(draw)

    def settling(self, step: int) -> Gates:
        """The gates after `step` steps, once the choice is fixed: within `fade` steps they go to 0 or 1."""
        share = share_of(step, self.settle_at, self.settle_at + self.fade)
        return self.each(lambda distribution: distribution.fading(share))

    def deterministic(self, at_target: bool = True) -> Gates:
        """Gates without noise: exactly the target shape, or (at_target=False) as many survivors as are expected now."""
        return self.each(lambda distribution: distribution.deterministic(distribution.keep if at_target else None))

    def evaluated(self, step: int) -> Gates | None:
        """The gates that an evaluation after `step` steps measures with: none at first, and those that are trained once
        the choice is fixed. Until then the target shape would cut off what is still in use, and losses say nothing."""
        if step >= self.settle_at:
            return self.settling(step)
        return self.deterministic(at_target=False) if step > 0 else None

    def lagrangian(self, step: int) -> tuple[Tensor, dict]:
        """The constraint (eq. 1), summed over granularities, and what to log of it.

        head and ffn have a row of gates per layer. Each row has its own sparsity and its own constraint, and the mean
        over rows counts. The second value: granularity -> {sparsity, target_sparsity, undecided, lambda, phi}. Most of
        these are tensors, so that nothing here waits for the GPU.
        """
        total, stats = 0.0, {}
        ramp = share_of(step, 0, self.sparsity_warmup)
        for granularity, distribution in self.distributions().items():
            lam, phi = self.multipliers[granularity]
            nonzero = distribution.prob_nonzero()
            sparsity = 1 - nonzero.mean(-1)  # () or (L,)
            target = ramp * (1 - distribution.keep / nonzero.shape[-1])
            gap = sparsity - target
            total = total + (lam * gap + phi * gap**2).mean()  # eq. 1
            undecided = (nonzero > UNDECIDED[0]) & (nonzero < UNDECIDED[1])
            stats[granularity] = {
                "sparsity": sparsity.detach().mean(),
                "target_sparsity": target,
                "undecided": undecided.float().mean(),
                "lambda": lam.detach().clone(),  # as they are now: the step changes them
                "phi": phi.detach().clone(),
            }
        return total, stats

    @torch.no_grad()
    def left(self, step: int) -> Gates:
        """What is left of each structure after `step` steps: P(z != 0), under the full noise. Once the choice is fixed:
        all of what stays, and of what goes as much as its gate says."""
        if step < self.settle_at:
            return self.each(HardConcrete.prob_nonzero)
        share = share_of(step, self.settle_at, self.settle_at + self.fade)
        return self.each(lambda distribution: torch.maximum(distribution.fading(share), distribution.kept()))

    def sparsity(self, step: int) -> dict[str, float]:
        """granularity -> expected share of zeros after `step` steps."""
        left = self.left(step)
        return {g: (1 - getattr(left, g).mean(-1)).mean().item() for g in self.distributions()}

    @torch.no_grad()
    def expected_params(self, step: int) -> float:
        """Expected number of parameters left: P in the scaling law. Gates are independent: means multiply."""
        s, left = self.source, self.left(step)

        def survivors_of(z, size):  # expected number in each row, () or (L,)
            return torch.tensor(size) if z is None else z.sum(-1).cpu()

        d, groups = survivors_of(left.hidden, s.d_model), survivors_of(left.head, s.n_kv_head)
        ffn = survivors_of(left.ffn, s.d_ffn)
        layer = torch.ones(s.n_layer) if left.layer is None else left.layer.cpu()  # (L,)
        return float((layer * s.layer_params(d, groups, ffn)).sum() + s.embedding_params(d) + d)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep every log_alpha where it has a gradient. To be called after each optimizer step."""
        for distribution in self.distributions().values():
            distribution.log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)


def share_of(step: float, start: float, end: float) -> float:
    """How much of the way from `start` to `end` is behind at a step, 0 to 1."""
    if step >= end:
        return 1.0
    return (step - start) / (end - start) if step > start else 0.0


def check_target(source: LlamaConfig, target: LlamaConfig) -> None:
    """ValueError unless `target` can be cut out of `source`: not larger, same head_dim, same query heads per KV head,
    and the same in all but its shape.

    target.d_model need not be a multiple of target.n_head, since head_dim stays. Only transformers wants it to be, so
    train.py checks that.
    """
    for name, size in source.shape.items():
        if target.shape[name] > size:
            raise ValueError(f"target {name} = {target.shape[name]} is larger than the source's {size}")
    group = source.n_head // source.n_kv_head
    if target.head_dim != source.head_dim or target.n_head != group * target.n_kv_head:
        raise ValueError(
            f"target head_dim = {target.head_dim}, n_head = {target.n_head}, n_kv_head = {target.n_kv_head}: KV groups "
            f"go whole, {group} query heads of {source.head_dim} dimensions for each KV head, as in the source"
        )
    if replace(target, **source.shape) != source:
        raise ValueError("source and target must differ in their shapes only")


# -- extraction -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(model: Llama, masks: PruningMasks) -> Llama:
    """The small dense Llama of exactly the target shape, equal in function to `model` gated at the target shape.

    What is zero is cut out. What is left of a gate, say 0.93, is multiplied into the weights that it gates in the
    forward pass of model.py, and into no others. `model` and `masks` are on the same device, and stay as they are.
    """
    config, z, kept = masks.source, masks.deterministic(), kept_indices(masks)
    hidden = kept["hidden"]
    # The gate scales the embedding's columns. A tied lm_head reads the same columns, and their gate stands in for that
    # of the last norm, whose weight then has none.
    weights = {"embed_tokens.weight": scale_rows(model.embed_tokens.weight.T, z.hidden)[hidden].T}
    if masks.target.tie_embeddings:
        weights["norm.weight"] = model.norm.weight[hidden]
    else:
        weights["norm.weight"] = scale_rows(model.norm.weight, z.hidden)[hidden]
        weights["lm_head.weight"] = model.lm_head.weight[:, hidden]

    for new, old in enumerate(kept["layer"].tolist()):
        layer, gates = model.layers[old], z.at(old)
        ffn, one_head = kept["ffn"][old], torch.arange(config.head_dim)
        groups, one_group = kept["head"][old], config.n_head // config.n_kv_head * config.head_dim
        q, kv = rows_of_groups(groups, one_group), rows_of_groups(groups, config.head_dim)
        z_v = None if gates.head is None else gates.head.repeat_interleave(config.head_dim)
        rules = {  # gate on the rows, rows that are kept, columns that are kept
            "self_attn.q_proj": (None, q, hidden),
            "self_attn.k_proj": (None, kv, hidden),
            "self_attn.v_proj": (z_v, kv, hidden),
            "self_attn.o_proj": (gates.out, hidden, q),
            "self_attn.q_norm": (None, one_head, None),
            "self_attn.k_norm": (None, one_head, None),
            "mlp.gate_proj": (None, ffn, hidden),
            "mlp.up_proj": (gates.ffn, ffn, hidden),
            "mlp.down_proj": (gates.out, hidden, ffn),
            "input_layernorm": (gates.hidden, hidden, None),
            "post_attention_layernorm": (gates.hidden, hidden, None),
        }
        for name, weight in layer.named_parameters():
            gate, rows, columns = rules[name.rpartition(".")[0]]
            weight = scale_rows(weight, gate)[rows]
            weights[f"layers.{new}.{name}"] = weight[:, columns] if weight.dim() == 2 else weight
    return Llama.of_weights(masks.target, weights)


def rows_of_groups(groups: Tensor, size: int) -> Tensor:
    """The rows of a weight that belong to these KV groups (indices), `size` rows to each."""
    return (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()


def kept_indices(masks: PruningMasks) -> dict[str, Tensor]:
    """granularity -> indices kept at the target, in order: layer (L',), hidden (D',), head (L, G'), ffn (L, I')."""
    kept = {}
    for granularity, shape in gate_shapes(masks.source).items():
        gates = getattr(masks, granularity)
        survive = torch.ones(shape) if gates is None else gates.kept()
        kept[granularity] = survive.nonzero()[:, -1].view(*shape[:-1], -1)
    return kept
