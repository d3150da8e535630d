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
    lambda, phi   multipliers[granularity]     Lagrange multipliers: gradient *ascent*

After training the highest-scoring structures are kept, exactly as many as the target shape has, and `extract` cuts them
out: the small dense Llama computes exactly what the source does with its deterministic gates at the target shape.

    python train.py config/toy_prune.py
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from model import Gates, Llama, LlamaConfig

GAMMA, ZETA, BETA = -0.1, 1.1, 2 / 3  # stretch and temperature
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(1e-2), math.log(1e2)
NOISE, CHOICE = 3, 4  # tags of random streams: gates must know nothing of the batch (data.py has 1 and 2)
Scores = Gates  # what structures are ranked by when they are not learned: any numbers, the higher are kept
UNDECIDED = (0.05, 0.95)  # a gate whose P(z = 0) lies between is neither kept nor pruned yet


def gate_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """granularity -> shape of the gates that prune it."""
    return {
        "layer": (config.n_layer,),
        "hidden": (config.d_model,),
        "head": (config.n_layer, config.n_kv_head),
        "ffn": (config.n_layer, config.d_ffn),
    }


class HardConcrete(nn.Module):
    """Gates of one granularity, `shape` of them; each row (the last axis) is to keep `keep`."""

    def __init__(self, shape: tuple[int, ...], keep: int, init: float = LOG_ALPHA_MAX):
        super().__init__()
        if not 0 < keep <= shape[-1]:
            raise ValueError(f"cannot keep {keep} of {shape[-1]}")
        self.keep = keep
        self.log_alpha = nn.Parameter(torch.full(shape, float(init)))

    def prob_nonzero(self) -> Tensor:
        """P(z != 0), shape of the gates: the differentiable count of what survives."""
        x = -GAMMA / (ZETA - GAMMA)
        prob_zero = torch.sigmoid(BETA * math.log(x / (1 - x)) - self.log_alpha)
        return 1 - prob_zero.clamp(1e-6, 1 - 1e-6)

    def sample(self, u: Tensor) -> Tensor:
        """Gates for uniform noise u in (0, 1) of the same shape."""
        y = torch.sigmoid((u.log() - (1 - u).log() + self.log_alpha) / BETA)
        return (y * (ZETA - GAMMA) + GAMMA).clamp(0, 1)

    def deterministic(self, keep: int | None = None) -> Tensor:
        """Gates without noise. In each row the lowest are set to 0: all but `keep` of them, or, where keep is None, as
        many as are expected to be 0 now (rounded)."""
        z = torch.sigmoid(0.8 * self.log_alpha / BETA)  # 0.8 and no stretch, as in Sheared LLaMA's code
        size = z.shape[-1]
        if keep is None:
            # the row's own expectation, not the mean over rows: each layer is on its own way to the target
            zeros = (size - self.prob_nonzero().sum(-1)).round()
        else:
            zeros = torch.full(z.shape[:-1], size - keep, device=z.device)
        rank = self.log_alpha.argsort(dim=-1, stable=True).argsort(dim=-1)  # 0 = lowest, ties by index
        return z * (rank >= zeros[..., None])

    @torch.no_grad()
    def clamp_(self) -> None:
        """Keep log_alpha where its gradient lives; called after each optimizer step."""
        self.log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)


class PruningMasks(nn.Module):
    """The gates of all granularities in which `target` is smaller than `source`, with their Lagrange multipliers.

    `layer`, `hidden`, `head`, `ffn` are a HardConcrete each, or None where the target equals the source. `head` gates
    KV groups: a key/value head with all its query heads, which is one head where every head has its own.
    `multipliers[granularity]` is (lambda, phi). sparsity_warmup: steps in which the target sparsity ramps up from 0.
    log_alpha, phi: initial values (short runs need a phi above 0). Raises ValueError when the target cannot be cut out
    of the source.
    """

    def __init__(
        self,
        source: LlamaConfig,
        target: LlamaConfig,
        sparsity_warmup: int,
        log_alpha: float = LOG_ALPHA_MAX,
        phi: float = 0.0,
    ):
        super().__init__()
        self.source, self.target, self.sparsity_warmup = source, target, sparsity_warmup
        check_target(source, target)
        self.multipliers, small = nn.ModuleDict(), gate_shapes(target)
        for granularity, shape in gate_shapes(source).items():
            keep = small[granularity][-1]
            pruned = keep < shape[-1]
            setattr(self, granularity, HardConcrete(shape, keep, log_alpha) if pruned else None)
            if pruned:
                lam = nn.Parameter(torch.tensor(0.0))
                self.multipliers[granularity] = nn.ParameterList([lam, nn.Parameter(torch.tensor(float(phi)))])

    def gates(self) -> dict[str, HardConcrete]:
        """granularity -> its HardConcrete, for those that are pruned."""
        return {g: getattr(self, g) for g in self.multipliers}

    def sample(self, seed: int, step: int, part: int) -> Gates:
        """Gates with the noise of one part of a step's batch, the same for any number of processes."""
        rng = np.random.default_rng([seed, NOISE, step, part])
        z = {}
        for granularity, gates in self.gates().items():
            u = torch.from_numpy(rng.uniform(1e-6, 1 - 1e-6, gates.log_alpha.shape)).to(gates.log_alpha.dtype)
            if gates.log_alpha.is_cuda:
                u = u.pin_memory()  # or the copy would wait for the device
            z[granularity] = gates.sample(u.to(gates.log_alpha.device, non_blocking=True))
        return Gates(**z)

    def deterministic(self, at_target: bool = True) -> Gates:
        """Gates without noise: exactly the target shape, or (at_target=False) as many zeros as are expected now."""
        return Gates(**{g: h.deterministic(h.keep if at_target else None) for g, h in self.gates().items()})

    def target_sparsity(self, step: int) -> dict[str, float]:
        """Wanted share of zeros at a step: a linear ramp, then the target's."""
        ramp = min(1.0, step / self.sparsity_warmup) if self.sparsity_warmup else 1.0
        return {g: ramp * (1 - h.keep / h.log_alpha.shape[-1]) for g, h in self.gates().items()}

    def lagrangian(self, step: int) -> tuple[Tensor, dict]:
        """The constraint (eq. 1), summed over granularities, and what to log of it.

        A granularity with a row per layer (head, ffn) has an expected sparsity per row, and the mean of the rows'
        constraints. stats (tensors, no host sync): granularity -> {sparsity, target_sparsity, undecided, lambda, phi}.
        """
        total, stats = 0.0, {}
        targets = self.target_sparsity(step)
        for granularity, gates in self.gates().items():
            lam, phi = self.multipliers[granularity]
            nonzero = gates.prob_nonzero()
            sparsity = 1 - nonzero.mean(-1)  # () or (L,)
            excess = sparsity - targets[granularity]
            total = total + (lam * excess + phi * excess**2).mean()  # eq. 1
            undecided = (nonzero > UNDECIDED[0]) & (nonzero < UNDECIDED[1])
            stats[granularity] = {
                "sparsity": sparsity.detach().mean(),
                "target_sparsity": targets[granularity],
                "undecided": undecided.float().mean(),
                "lambda": lam.detach(),
                "phi": phi.detach(),
            }
        return total, stats

    @torch.no_grad()
    def expected_params(self) -> Tensor:
        """Expected number of parameters left: P in the scaling law."""
        s = self.source

        device = next(self.parameters(), torch.empty(0)).device

        def left(gates, full):  # expected number left, () or (L,)
            return torch.tensor(full, device=device) if gates is None else gates.prob_nonzero().sum(-1)

        d, groups, ffn = left(self.hidden, s.d_model), left(self.head, s.n_kv_head), left(self.ffn, s.d_ffn)
        layer = torch.ones(s.n_layer, device=device) if self.layer is None else self.layer.prob_nonzero()  # (L,)
        attention = 2 * d * groups * (s.n_head // s.n_kv_head + 1) * s.head_dim
        embeddings = s.vocab_size * (1 if s.tie_embeddings else 2) * d
        return (layer * (attention + 3 * d * ffn + 2 * d)).sum() + embeddings + d

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp every log_alpha; called after each optimizer step."""
        for gates in self.gates().values():
            gates.clamp_()

    @torch.no_grad()
    def choose_(self, scores: Scores) -> None:
        """Decide all gates at once, without learning: the highest scores of each row get z = 1, the others 0."""
        for granularity, gates in self.gates().items():
            rank = getattr(scores, granularity).argsort(dim=-1, stable=True).argsort(dim=-1)
            kept = rank >= rank.shape[-1] - gates.keep
            gates.log_alpha.copy_(torch.where(kept, math.inf, -math.inf))


def check_target(source: LlamaConfig, target: LlamaConfig) -> None:
    """ValueError unless `target` can be cut out of `source`: not larger, same head_dim, same queries per KV head."""
    for name in ("n_layer", "d_model", "n_kv_head", "n_head", "d_ffn"):
        if getattr(target, name) > getattr(source, name):
            raise ValueError(
                f"target {name} = {getattr(target, name)} is larger than the source's {getattr(source, name)}"
            )
    if target.head_dim != source.head_dim:
        raise ValueError(f"target head_dim = {target.head_dim} must be the source's {source.head_dim}: heads go whole")
    if target.n_head * source.n_kv_head != target.n_kv_head * source.n_head:
        group = source.n_head // source.n_kv_head
        raise ValueError(
            f"target n_head = {target.n_head} with n_kv_head = {target.n_kv_head}: KV groups go whole, there must be "
            f"{group} query heads per KV head as in the source"
        )


# -- choices that are not learned, to compare with ------------------------------------------------------------------


@torch.no_grad()
def random_scores(masks: PruningMasks, seed: int) -> Scores:
    """Scores drawn at random."""
    rng = np.random.default_rng([seed, CHOICE])
    return Gates(**{g: torch.from_numpy(rng.random(h.log_alpha.shape)) for g, h in masks.gates().items()})


@torch.no_grad()
def magnitude_scores(model: Llama) -> Scores:
    """Scores by weight magnitude: the L2 norm of all the weights that would go with a structure."""
    layer, hidden, head, ffn = [], model.embed_tokens.weight.float().square().sum(0), [], []
    if not model.config.tie_embeddings:
        hidden = hidden + model.lm_head.weight.float().square().sum(0)
    for block in model.layers:
        a, f = block.self_attn, block.mlp
        q, k, v, o = (w.weight.float().square() for w in (a.q_proj, a.k_proj, a.v_proj, a.o_proj))
        gate, up, down = (w.weight.float().square() for w in (f.gate_proj, f.up_proj, f.down_proj))
        hidden = hidden + sum(w.sum(0) for w in (q, k, v, gate, up)) + o.sum(1) + down.sum(1)
        rows = [w.sum(1).view(model.config.n_kv_head, -1).sum(1) for w in (q, k, v, o.T)]
        head.append(sum(rows))
        ffn.append(gate.sum(1) + up.sum(1) + down.sum(0))
        layer.append(head[-1].sum() + ffn[-1].sum())
    return Gates(
        *(torch.as_tensor(x).sqrt() for x in (torch.stack(layer), hidden, torch.stack(head), torch.stack(ffn)))
    )


@torch.no_grad()
def scores_of(masks: PruningMasks, description: dict) -> Scores:
    """Scores that choose what `describe` says of other gates. ValueError if it is of other shapes."""
    if [description.get(k) for k in ("source", "target")] != [masks.source.shape, masks.target.shape]:
        raise ValueError("these gates are not of this source and target")
    scores = {}
    for granularity, gates in masks.gates().items():
        kept = torch.tensor(description[granularity]["kept"])
        scores[granularity] = torch.zeros(gates.log_alpha.shape).scatter_(-1, kept, 1.0)
    return Gates(**scores)


# -- extraction -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def extract(model: Llama, masks: PruningMasks) -> Llama:
    """The small dense Llama of exactly the target shape, equal in function to `model` gated at the target shape.

    What is zero is cut out; what is left of a gate is folded into the weight whose rows it scales in the forward.
    """
    z, kept = masks.deterministic(at_target=True), kept_indices(masks)
    config, d = masks.target, kept["hidden"]

    def fold(weight, z, rows, columns=None):
        if z is not None:
            weight = weight * z.to(weight.dtype).view(-1, *[1] * (weight.dim() - 1))
        return weight[rows] if columns is None else weight[rows][:, columns]

    def rows_of(groups, heads):  # the rows of q, k or v that belong to these KV groups
        return torch.arange(heads * config.head_dim).view(model.config.n_kv_head, -1)[groups.cpu()].flatten()

    state = {
        "embed_tokens.weight": fold(model.embed_tokens.weight.T, z.hidden, d).T,
        # a tied lm_head has the gate already, in its copy of the embedding
        "norm.weight": fold(model.norm.weight, None if config.tie_embeddings else z.hidden, d),
        "lm_head.weight": model.lm_head.weight[:, d],
    }
    if config.tie_embeddings:
        state["lm_head.weight"] = state["embed_tokens.weight"]
    for new, old in enumerate(kept["layer"].tolist()):
        layer, at = model.layers[old], z.at(old)
        attention, mlp, ffn = layer.self_attn, layer.mlp, kept["ffn"][old]
        q, kv = (rows_of(kept["head"][old], n) for n in (model.config.n_head, model.config.n_kv_head))
        z_v = None if at.head is None else at.head.repeat_interleave(config.head_dim)
        for name, weight in {
            "input_layernorm": fold(layer.input_layernorm.weight, at.hidden, d),
            "self_attn.q_proj": fold(attention.q_proj.weight, None, q, d),
            "self_attn.k_proj": fold(attention.k_proj.weight, None, kv, d),
            "self_attn.v_proj": fold(attention.v_proj.weight, z_v, kv, d),
            "self_attn.o_proj": fold(attention.o_proj.weight, at.out, d, q),
            "post_attention_layernorm": fold(layer.post_attention_layernorm.weight, at.hidden, d),
            "mlp.gate_proj": fold(mlp.gate_proj.weight, None, ffn, d),
            "mlp.up_proj": fold(mlp.up_proj.weight, at.ffn, ffn, d),
            "mlp.down_proj": fold(mlp.down_proj.weight, at.out, d, ffn),
        }.items():
            state[f"layers.{new}.{name}.weight"] = weight
    return Llama.of_weights(config, {name: weight.clone() for name, weight in state.items()})


@torch.no_grad()
def kept_indices(masks: PruningMasks) -> dict[str, Tensor]:
    """granularity -> indices kept at the target, in order: layer (L',), hidden (D',), head (L, G'), ffn (L, I')."""
    kept, z = {}, masks.deterministic(at_target=True)
    for granularity, shape in gate_shapes(masks.source).items():
        gates = getattr(masks, granularity)
        if gates is None:
            kept[granularity] = torch.arange(shape[-1]).expand(shape)
        else:
            kept[granularity] = getattr(z, granularity).topk(gates.keep, dim=-1).indices.sort(-1).values
    return kept


def describe(masks: PruningMasks) -> dict:
    """What was kept, for `pruning.json`: shapes of source and target and, per granularity (and source layer), the
    kept indices and their gate values, which are folded into the weights. Layers that went are listed too."""
    z, kept = masks.deterministic(at_target=True), kept_indices(masks)
    rows = {}
    for granularity, indices in kept.items():
        gate = getattr(z, granularity)
        values = torch.ones(indices.shape) if gate is None else gate.gather(-1, indices)
        rows[granularity] = {"kept": indices.tolist(), "gates": values.tolist()}
    return {"source": masks.source.shape, "target": masks.target.shape, **rows}
