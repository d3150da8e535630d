"""Choices that are not learned, and the description of what was kept."""

from dataclasses import replace

import pytest
import torch
from test_masks import FIELDS, SOURCE, TARGET, random_masks
from test_model import random_llama

from masks import PruningMasks, extract, kept_indices
from model import LlamaConfig
from plumbing import choices
from plumbing.command_line import load
from plumbing.settings import Settings


def test_the_heaviest_are_kept_whole():
    llama, masks = random_llama(SOURCE), PruningMasks(SOURCE, TARGET, 0)
    with torch.no_grad():  # layer 2, hidden 5, head (1, 3) and ffn (0, 7) made by far the heaviest
        llama.layers[2].mlp.up_proj.weight *= 90
        llama.embed_tokens.weight[:, 5] = 50
        llama.layers[1].self_attn.q_proj.weight[18:24] = 20
        llama.layers[0].mlp.down_proj.weight[:, 7] = 20
    choices.choose_(masks, choices.magnitude_scores(llama))
    kept = kept_indices(masks)
    assert 2 in kept["layer"] and 5 in kept["hidden"] and 3 in kept["head"][1] and 7 in kept["ffn"][0]
    for z in masks.deterministic():
        assert set(z.unique().tolist()) == {0.0, 1.0}  # nothing to fold


def test_what_is_only_for_learned_gates_refuses_nothing():
    args = ["--init_from=x", "--target_n_layer=1", "--batch_size=6", "--gate_samples=4"]
    with pytest.raises(ValueError, match="batch_size = 6 must be a multiple of gate_samples = 4"):
        load(Settings, args)
    assert load(Settings, [*args, "--gates=activation"]).split_batch(2) == (3, 3)


def test_biases_count_for_their_heads():
    source = replace(SOURCE, n_kv_head=2, qkv_bias=True)
    llama = random_llama(source)
    before = choices.magnitude_scores(llama).head[1].square()
    with torch.no_grad():  # KV group 1 of layer 1: its two query heads, its key, its value
        for name, rows in (("q_proj", slice(12, 24)), ("k_proj", slice(6, 12)), ("v_proj", slice(6, 12))):
            getattr(llama.layers[1].self_attn, name).bias[rows] = 0
            getattr(llama.layers[1].self_attn, name).bias[rows.stop - 1] = 10
    after = choices.magnitude_scores(llama).head[1].square()
    assert after[0] == before[0] and 200 < after[1] - before[1] < 300


@pytest.mark.parametrize("gates", choices.OF_MODEL)
def test_who_looks_at_a_model_leaves_it_as_it_was(gates):
    """Scores are taken of the model that is trained afterwards."""
    llama, masks = random_llama(SOURCE), PruningMasks(SOURCE, TARGET, 0)
    tokens, before = torch.arange(20)[None] % SOURCE.vocab_size, dict(llama.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    logits = llama(tokens)
    choices.scores(gates, masks, llama, [tokens], seed=0)
    after = dict(llama.named_parameters())
    assert list(after) == list(before) and all(p.grad is None and p is before[name] for name, p in after.items())
    assert all(torch.equal(after[name], values[name]) for name in values) and torch.equal(llama(tokens), logits)


def test_random_scores_follow_the_seed_alone():
    masks = PruningMasks(SOURCE, TARGET, 0)
    one, two = (choices.random_scores(masks, seed) for seed in (1, 2))
    assert not torch.equal(one.ffn, two.ffn) and torch.equal(one.ffn, choices.random_scores(masks, 1).ffn)
    assert not torch.equal(one.hidden[:4], one.layer) and not torch.equal(one.head[0], one.layer)


def test_a_description_chooses_the_same_again():
    masks, other = random_masks(SOURCE, TARGET), PruningMasks(SOURCE, TARGET, 0)
    choices.choose_(other, choices.scores_of(other, choices.describe(masks)))
    assert all(torch.equal(a, b) for a, b in zip(kept_indices(other).values(), kept_indices(masks).values()))
    smaller = PruningMasks(SOURCE, replace(TARGET, n_layer=1), 0)
    with pytest.raises(ValueError, match="its source or target has another shape"):
        choices.scores_of(smaller, choices.describe(masks))


def test_what_was_kept_is_described():
    masks = random_masks(SOURCE, TARGET)
    z, text = masks.deterministic(), choices.describe(masks)
    shapes = {"layer": (2,), "hidden": (14,), "head": (4, 2), "ffn": (4, 21)}
    for granularity in FIELDS:
        gates = getattr(z, granularity)
        indices = torch.tensor(text[granularity]["kept"])
        assert indices.shape == shapes[granularity]
        assert torch.equal(gates.nonzero()[:, -1], indices.flatten())
        torch.testing.assert_close(torch.tensor(text[granularity]["gates"]).flatten(), gates[gates != 0])
    assert text["source"]["n_layer"] == 4 and text["target"]["n_layer"] == 2


@pytest.mark.parametrize("tied", [False, True])
def test_magnitudes_are_what_extraction_takes_away(tied):
    """The sum of the squares of all weights that go with a structure."""
    source = replace(SOURCE, n_kv_head=2, head_dim=10, tie_embeddings=tied)
    less = {
        "layer": {"n_layer": 3},
        "hidden": {"d_model": 23},
        "head": {"n_head": 2, "n_kv_head": 1},
        "ffn": {"d_ffn": 39},
    }
    llama = random_llama(source)
    scores = choices.magnitude_scores(llama)

    def squares(model):
        return sum(p.double().square().sum().item() for p in model.parameters() if p.dim() == 2)

    for name, change in less.items():
        masks = PruningMasks(source, replace(source, **change), 0)
        keep = torch.ones(getattr(masks, name).log_alpha.shape)
        keep[..., 1] = 0
        choices.choose_(masks, choices.Scores(**{name: keep}))
        lost = squares(llama) - squares(extract(llama, masks))
        assert getattr(scores, name)[..., 1].double().square().sum().item() == pytest.approx(lost, rel=1e-4), name


def test_indices_that_are_no_choice_are_refused():
    source, target = LlamaConfig(64, 3, 16, 2, 2, 8, 24, 16), LlamaConfig(64, 2, 8, 1, 1, 8, 16, 16)
    masks = PruningMasks(source, target, 10)
    choices.choose_(masks, choices.random_scores(masks, 0))
    good = choices.describe(masks)
    choices.scores_of(masks, good)
    for wrong in ([0, 1], [0] * 8, [99, *range(7)], [0.5, *range(7)], [[0] * 8], 3):
        with pytest.raises(ValueError, match="hidden"):
            choices.scores_of(masks, good | {"hidden": {"kept": wrong}})
