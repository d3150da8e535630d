"""Choices that are not learned, which the learned choice is compared with.

    --gates=random        at random
    --gates=magnitude     what has the largest weights
    --gates=activation    what gives the largest activations (Minitron, arXiv 2407.14679)
    --gates=taylor        what the loss depends on most, to first order (arXiv 1906.10771, LLM-Pruner 2305.11627)
    --gates=FILE          what another run kept, by its pruning.json

A choice is made in two steps: give each structure a score, then keep those with the highest scores, as many as the
target shape has. activation and taylor measure their scores on some batches of training text. All is scored once, on
the whole model, before anything goes.

    python train.py config/toy_prune.py --gates=magnitude

`describe` is the other way round: it says what was kept, learned or not, for the pruning.json of a model.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masks import PruningMasks, gate_shapes, kept_indices, survivors
from model import Gates, Llama
from plumbing import checksums, randomness, records

Scores = Gates  # the same fields and shapes; a score may be any number, and the higher are kept
WITH_TEXT = ("activation", "taylor")
OF_MODEL = ("magnitude", *WITH_TEXT)  # those that look at the weights
NAMES = ("learned", "random", *OF_MODEL)  # anything else is a file
CHOSEN = 100.0  # log_alpha of what is kept: above all that are learned, and its gates are 1 to the last digit


@torch.no_grad()
def choose_(masks: PruningMasks, scores: Scores) -> None:
    """Fix the choice, in place: the highest scores of each row are kept, with z = 1. What goes stays as open as it is
    until it is cut out."""
    for granularity, distribution in masks.distributions().items():
        kept = survivors(getattr(scores, granularity), distribution.keep).to(distribution.log_alpha.device)
        distribution.log_alpha.masked_fill_(kept, CHOSEN)


def settle_(masks: PruningMasks) -> None:
    """Fix the choice that the gates have learned, in place."""
    choose_(masks, masks.each(lambda distribution: distribution.log_alpha))


def scores(gates: str, masks: PruningMasks, model: Llama, text: list[Tensor], seed: int) -> Scores:
    """The scores of a choice by its name (see above), on the device of what it looks at. text: tokens (b, T+1), on the
    device of the model, for those that look at text. ValueError for a file that is no choice of this source and
    target."""
    match gates:
        case "random":
            return random_scores(masks, seed)
        case "magnitude":
            return magnitude_scores(model)
        case "activation":
            return activation_scores(model, text)
        case "taylor":
            return taylor_scores(model, text)
    file = Path(gates)
    try:
        checksums.check(file.parent, file.name)
        return scores_of(masks, records.read(file, records.Pruning, "a pruning.json"))
    except OSError as error:
        names = ", ".join(NAMES)
        raise ValueError(f"gates = '{gates}': neither one of {names} nor a file: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"gates = '{gates}': not a pruning.json for this source and target ({error})") from None


def random_scores(masks: PruningMasks, seed: int) -> Scores:
    """Scores drawn at random."""
    rng = randomness.generator(seed, randomness.CHOICE)
    return masks.each(lambda distribution: torch.from_numpy(rng.random(distribution.log_alpha.shape)))


@torch.no_grad()
def activation_scores(model: Llama, text: list[Tensor]) -> Scores:
    """Scores by what flows through a structure, as in Minitron: mean absolute activations of hidden dimensions (after
    the norms), KV groups and feed-forward dimensions. A layer's is its block influence, 1 - cos(input, output)."""
    config, device = model.config, model.embed_tokens.weight.device
    total = layer, hidden, head, ffn = [torch.zeros(shape, device=device) for shape in gate_shapes(config).values()]
    identity = nn.Parameter(torch.eye(config.n_head * config.head_dim, device=device))

    def watch(i: int, block) -> list:
        def look_at_layer(_, inputs, output):
            layer[i] += (1 - F.cosine_similarity(inputs[0], output, dim=-1)).mean()

        def look_at_norm(_, inputs, output):
            hidden.add_(output.abs().mean((0, 1)))

        def look_at_attention(_, inputs, output):
            weight, block.self_attn.o_proj.weight = block.self_attn.o_proj.weight, identity
            heads = block.self_attn.forward(*inputs)  # once more, to see what o_proj gets
            block.self_attn.o_proj.weight = weight
            head[i] += heads.abs().mean((0, 1)).view(config.n_kv_head, -1).mean(1)

        def look_at_ffn(_, inputs, output):
            inner = F.silu(block.mlp.gate_proj(inputs[0])) * block.mlp.up_proj(inputs[0])
            ffn[i] += inner.abs().mean((0, 1))

        return [
            block.register_forward_hook(look_at_layer),
            block.input_layernorm.register_forward_hook(look_at_norm),
            block.post_attention_layernorm.register_forward_hook(look_at_norm),
            block.self_attn.register_forward_hook(look_at_attention),
            block.mlp.register_forward_hook(look_at_ffn),
        ]

    hooks = [hook for i, block in enumerate(model.layers) for hook in watch(i, block)]
    for tokens in text:
        for sequence in tokens.split(1):  # with targets, as in training: all logits would be the largest tensor by far
            model(sequence[:, :-1], targets=sequence[:, 1:])
    for hook in hooks:
        hook.remove()
    return Scores(*(x / sum(map(len, text)) for x in total))


def taylor_scores(model: Llama, text: list[Tensor]) -> Scores:
    """Scores by first-order Taylor expansion: the mean over sequences of |dL/dz| at z = 1, what the loss L of a
    sequence would change by, to first order, if the structure's gate closed."""
    ones = partial(torch.ones, device=model.embed_tokens.weight.device, requires_grad=True)
    gates = [ones(shape) for shape in gate_shapes(model.config).values()]
    total = [torch.zeros_like(z) for z in gates]
    for tokens in text:
        for sequence in tokens.split(1):
            loss = model(sequence[:, :-1], Gates(*gates), targets=sequence[:, 1:]).mean()
            loss.backward(inputs=gates)
            for sum_, z in zip(total, gates):
                sum_ += z.grad.abs()
                z.grad = None
    return Scores(*(sum_ / sum(map(len, text)) for sum_ in total))


@torch.no_grad()
def magnitude_scores(model: Llama) -> Scores:
    """Scores by weight magnitude: the L2 norm of the matrices' weights and the biases that would go with a structure.
    Those of the norms do not count."""
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
        rows = [w.sum(1) for w in (q, k, v, o.T)]
        if config.qkv_bias:
            rows += [getattr(attention, f"{x}_proj").bias.float().square() for x in "qkv"]
        head.append(sum(row.view(config.n_kv_head, -1).sum(1) for row in rows))
        ffn.append(gate.sum(1) + up.sum(1) + down.sum(0))
        layer.append(head[-1].sum() + ffn[-1].sum())
    return Scores(torch.stack(layer).sqrt(), hidden.sqrt(), torch.stack(head).sqrt(), torch.stack(ffn).sqrt())


def scores_of(masks: PruningMasks, description: dict) -> Scores:
    """Scores that choose again what a pruning.json (see `describe`) says was kept: 1 for the kept, 0 for the others.

    ValueError if its source or target has another shape than that of `masks`, or its indices are not of this shape.
    """
    shapes = {"source": masks.source.shape, "target": masks.target.shape}
    if any(description.get(name) != shape for name, shape in shapes.items()):
        raise ValueError("its source or target has another shape")
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
