"""Choices that are not learned: keep structures at random, by the size of their weights, or as another run chose.

The learned choice is compared with these. A choice is made in two steps: give each structure a score, then keep those
with the highest scores, as many as the target shape has.

    python train.py config/toy_prune.py --gates=magnitude

`describe` is the other way round: it says what was kept, learned or not, for the pruning.json of a model.
"""

import math

import torch

from masks import PruningMasks, kept_indices, survivors
from model import Gates, Llama
from plumbing import randomness

Scores = Gates  # the same fields and shapes; a score may be any number, and the higher are kept


@torch.no_grad()
def choose_(masks: PruningMasks, scores: Scores) -> None:
    """Decide all gates at once, in place: z = 1 for the highest scores of each row, z = 0 for the others."""
    for granularity, distribution in masks.distributions().items():
        kept = survivors(getattr(scores, granularity), distribution.keep)
        distribution.log_alpha.copy_(torch.where(kept, math.inf, -math.inf))


def random_scores(masks: PruningMasks, seed: int) -> Scores:
    """Scores drawn at random."""
    rng = randomness.generator(seed, randomness.CHOICE)
    distributions = masks.distributions()
    return Scores(**{g: torch.from_numpy(rng.random(d.log_alpha.shape)) for g, d in distributions.items()})


@torch.no_grad()
def magnitude_scores(model: Llama) -> Scores:
    """Scores by weight magnitude: the L2 norm of all the weights that would go with a structure."""
    config = model.config
    layer, head, ffn = [], [], []  # sums of squares, layer by layer
    hidden = model.embed_tokens.weight.float().square().sum(0)
    if not config.tie_embeddings:
        hidden = hidden + model.lm_head.weight.float().square().sum(0)
    for block in model.layers:
        attention, mlp = block.self_attn, block.mlp
        q, k, v, o = (getattr(attention, f"{x}_proj").weight.float().square() for x in "qkvo")
        gate, up, down = (getattr(mlp, f"{x}_proj").weight.float().square() for x in ("gate", "up", "down"))
        hidden = hidden + sum(w.sum(0) for w in (q, k, v, gate, up)) + o.sum(1) + down.sum(1)
        head.append(sum(w.sum(1).view(config.n_kv_head, -1).sum(1) for w in (q, k, v, o.T)))
        ffn.append(gate.sum(1) + up.sum(1) + down.sum(0))
        layer.append(head[-1].sum() + ffn[-1].sum())
    return Scores(torch.stack(layer).sqrt(), hidden.sqrt(), torch.stack(head).sqrt(), torch.stack(ffn).sqrt())


def scores_of(masks: PruningMasks, description: dict) -> Scores:
    """Scores that choose again what a pruning.json (see `describe`) says was kept: 1 for the kept, 0 for the others.

    ValueError if its source or target has another shape than that of `masks`, or its indices are not of this shape.
    """
    shapes = {"source": masks.source.shape, "target": masks.target.shape}
    if any(description.get(name) != shape for name, shape in shapes.items()):
        raise ValueError("these gates are not of this source and target")
    scores = {}
    for granularity, distribution in masks.distributions().items():
        shape, keep = distribution.log_alpha.shape, distribution.keep
        kept = torch.tensor(description[granularity]["kept"])
        whole = kept.dtype == torch.int64 and kept.shape == (*shape[:-1], keep)
        if not whole or kept.min() < 0 or kept.max() >= shape[-1]:
            raise ValueError(f"{granularity} does not name {keep} of {shape[-1]} in each row")
        scores[granularity] = torch.zeros(shape).scatter_(-1, kept, 1.0)
        if (scores[granularity].sum(-1) != keep).any():
            raise ValueError(f"{granularity} names an index twice")
    return Scores(**scores)


@torch.no_grad()
def describe(masks: PruningMasks) -> dict:
    """What is kept at the target shape, for pruning.json.

    {"source": shape, "target": shape, granularity: {"kept": indices, "gates": values z of the kept}, ...}. Indices are
    the source model's. head and ffn have a list for each layer of the source, also for the layers that were removed.
    The gate values are for information: `masks.extract` has multiplied them into the weights.
    """
    z = masks.deterministic(at_target=True)
    description = {"source": masks.source.shape, "target": masks.target.shape}
    for granularity, indices in kept_indices(masks).items():
        gates = getattr(z, granularity)
        values = torch.ones(indices.shape) if gates is None else gates.gather(-1, indices)
        description[granularity] = {"kept": indices.tolist(), "gates": values.tolist()}
    return description
