"""Gates, constraint and extraction: against the published code's numbers, sampling, autograd and the gated model."""

import itertools
import math
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import transformers
from test_model import random_llama, relative

from masks import HardConcrete, PruningMasks, extract, survivors
from model import Gates, Llama, LlamaConfig
from plumbing.choices import choose_, magnitude_scores
from plumbing.command_line import load
from plumbing.settings import Settings

SOURCE = LlamaConfig(61, 4, 24, 4, 4, 6, 40, 32)
TARGET = replace(SOURCE, n_layer=2, d_model=14, n_head=2, n_kv_head=2, d_ffn=21)
FIELDS = {"layer": ["n_layer"], "hidden": ["d_model"], "head": ["n_head", "n_kv_head"], "ffn": ["d_ffn"]}
SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(FIELDS, n)]


def target_of(subset, source=SOURCE, full=TARGET):
    """Only the named granularities pruned."""
    return replace(source, **{f: getattr(full, f) for g in subset for f in FIELDS[g]})


def random_masks(source, target, seed=0, low=-1.5, high=1.5):
    """Gates whose deterministic values are fractional: about .15 to .85."""
    masks = PruningMasks(source, target, 100)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for distribution in masks.distributions().values():
            noise = torch.rand(distribution.log_alpha.shape, generator=generator)
            distribution.log_alpha.copy_(low + (high - low) * noise)
    return masks


# -- against the published code -------------------------------------------------------------------------------------


def test_hard_concrete_equals_the_published_code(upstream):
    for case in upstream["hard_concrete"]:
        gates = HardConcrete((len(case["log_alpha"]),), case["keep"]).double()
        gates.log_alpha.data = torch.tensor(case["log_alpha"], dtype=torch.float64)
        for ours, name in (
            (gates.prob_nonzero(), "prob_nonzero"),
            (gates.deterministic(case["keep"]), "z_keep"),
            (gates.deterministic(), "z_free"),
            (gates.sample(torch.tensor(case["uniform"], dtype=torch.float64)), "z_sample"),
        ):
            expected = torch.tensor(case[name], dtype=torch.float64)
            if name == "z_keep":  # which of several gates at the lower clamp goes is nobody's concern
                ours, expected = ours.sort().values, expected.sort().values
            torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
        assert 1 - gates.prob_nonzero().mean().item() == pytest.approx(case["sparsity"], abs=1e-10)
        assert (gates.deterministic(case["keep"]) != 0).sum() == case["keep"]


@pytest.fixture
def upstream_model(upstream):
    """The published code's small Llama with its gates, in our classes, float64."""
    case = upstream["model"]
    cfg, state = case["cfg"], {k: torch.tensor(v, dtype=torch.float64) for k, v in case["state"].items()}
    heads, d = cfg["n_heads"], cfg["d_model"]
    source = LlamaConfig(cfg["vocab_size"], cfg["n_layers"], d, heads, heads, d // heads, cfg["intermediate_size"], 64)
    t = cfg["l0_module"]["target_model"]
    target = replace(
        source, n_layer=t["n_layers"], d_model=t["d_model"], n_head=t["n_heads"], n_kv_head=t["n_heads"],
        d_ffn=t["intermediate_size"],
    )  # fmt: skip
    llama, masks = Llama(source).double(), PruningMasks(source, target, 100).double()
    theirs = {"layer": "layer", "hidden": "hidden", "head": "head", "ffn": "intermediate"}
    for granularity, name in theirs.items():
        getattr(masks, granularity).log_alpha.data = state[f"l0_module.masks.{name}.z_loga"]
        lam, phi = masks.multipliers[granularity]
        lam.data, phi.data = state[f"l0_module.lambdas.lambda_1_{name}"], state[f"l0_module.lambdas.lambda_2_{name}"]
    names = {"attn.wq": "self_attn.q_proj", "attn.wk": "self_attn.k_proj", "attn.wv": "self_attn.v_proj"}
    names |= {"attn.out_proj": "self_attn.o_proj", "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm"}
    weights = {}
    for name, value in state.items():
        if name.startswith("transformer.blocks."):
            i, part = name.removeprefix("transformer.blocks.").removesuffix(".weight").split(".", 1)
            weights[f"layers.{i}.{names.get(part, part)}.weight"] = value
    weights["embed_tokens.weight"] = state["transformer.wte.weight"]
    weights["norm.weight"], weights["lm_head.weight"] = (
        state["transformer.ln_f.weight"],
        state["transformer.output.weight"],
    )
    llama.load_state_dict(weights)
    return case, llama, masks


def test_gated_logits_equal_the_published_code(upstream_model):
    case, llama, masks = upstream_model
    z = masks.deterministic()
    logits, expected = llama(torch.tensor(case["tokens"]), z), torch.tensor(case["logits"], dtype=torch.float64)
    assert relative(logits, expected) < 1e-6  # it has rotary angles in float32
    assert relative(extract(llama, masks)(torch.tensor(case["tokens"])), logits) < 1e-10


def test_lagrangian_equals_the_published_code(upstream_model):
    case, _, masks = upstream_model
    loss, stats = masks.lagrangian(case["step"])
    assert loss.item() == pytest.approx(case["lagrangian"], abs=1e-10)
    for granularity, name in {"layer": "layer", "hidden": "hidden", "head": "head", "ffn": "intermediate"}.items():
        assert stats[granularity]["sparsity"].item() == pytest.approx(
            case["info"][f"expected_{name}_sparsity"], abs=1e-10
        )
        assert stats[granularity]["target_sparsity"] == pytest.approx(
            case["info"][f"target_{name}_sparsity"], abs=1e-10
        )


# -- the distribution -----------------------------------------------------------------------------------------------


def test_expected_sparsity_is_the_samplers():
    gates = HardConcrete((9,), 4).double()
    gates.log_alpha.data = torch.linspace(-4.6, 4.6, 9, dtype=torch.float64)
    u = torch.rand(200_000, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z = gates.sample(u)
    p, n = gates.prob_nonzero().detach(), len(u)
    deviation = (p * (1 - p) / n).sqrt()
    assert ((z != 0).double().mean(0) - p).abs().div(deviation).max() < 4.5
    assert ((z == 1).any(0)).all() and z.min() == 0 and z.max() == 1  # real mass at both ends
    # the clipped density in between is continuous: its distribution function against the closed form
    for level in (0.2, 0.5, 0.8):
        x = torch.tensor((level + 0.1) / 1.2, dtype=torch.float64)
        cdf = torch.sigmoid(2 / 3 * torch.logit(x) - gates.log_alpha.detach())
        assert ((z <= level).double().mean(0) - cdf).abs().max() < 4.5 * 0.5 / n**0.5


def test_gradient_of_a_sampled_gate_is_autograds_of_the_closed_form():
    gates = HardConcrete((50,), 20).double()
    gates.log_alpha.data = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = torch.rand(50, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z = gates.sample(u)
    z.sum().backward()
    s = torch.sigmoid((torch.logit(u) + gates.log_alpha.detach()) * 1.5)
    inside = (z > 0) & (z < 1)
    assert inside.sum() > 5
    torch.testing.assert_close(gates.log_alpha.grad, torch.where(inside, 1.2 * 1.5 * s * (1 - s), 0.0))


def test_noise_is_keyed_by_seed_step_and_gate_sample():
    masks = random_masks(SOURCE, TARGET)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    samples = [masks.sample(*key).ffn for key in keys]
    assert torch.equal(samples[0], masks.sample(0, 0, 0).ffn)
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(samples, 2))


def test_a_gate_that_is_surely_open_still_closes_as_often_as_it_should():
    """The noise reaches into its tails. P(z = 0) is .2 % at the upper clamp, a five-hundredth of the draws."""
    masks = PruningMasks(SOURCE, TARGET, 0)
    draws = torch.cat([masks.sample(0, step, 0).ffn.flatten() for step in range(1000)])
    p = 1 / (1 + math.exp(math.log(100) - 2 / 3 * math.log(1 / 11)))
    assert abs((draws == 0).double().mean().item() - p) < 4 * (p / len(draws)) ** 0.5


def test_log_alpha_stays_where_it_has_a_gradient():
    masks = random_masks(SOURCE, TARGET, low=-9, high=9)
    before = masks.ffn.log_alpha.detach().clone()
    masks.clamp_()
    assert torch.equal(masks.ffn.log_alpha, before.clamp(-math.log(100), math.log(100)))
    assert before.min() < -8 < 8 < before.max()


def test_gates_are_undecided_between_5_and_95_percent():
    masks = random_masks(SOURCE, TARGET, low=-7, high=7)
    _, stats = masks.lagrangian(0)
    for name, distribution in masks.distributions().items():
        p = torch.sigmoid(distribution.log_alpha.detach().double() + 2 / 3 * math.log(11))  # z != 0
        expected = ((p > 0.05) & (p < 0.95)).double().mean().item()
        assert stats[name]["undecided"].item() == pytest.approx(expected) and (name != "ffn" or 0.1 < expected < 0.9)


def test_survivors_are_the_highest_scores_of_each_row():
    scores = torch.tensor([[0.3, -1.0, 2.0, 0.3], [5.0, 4.0, 3.0, 2.0]])
    for keep, expected in (
        (1, [[0, 0, 1, 0], [1, 0, 0, 0]]),
        (2, [[0, 0, 1, 1], [1, 1, 0, 0]]),  # of the equal ones the last
        (4, [[1, 1, 1, 1], [1, 1, 1, 1]]),
        (torch.tensor([[3], [0]]), [[1, 0, 1, 1], [0, 0, 0, 0]]),
    ):
        assert survivors(scores, keep).int().tolist() == expected


def test_expected_params_are_those_of_sampled_models():
    """Each granularity's gates are independent, so the expectation is a product: check it by counting samples."""
    gqa = replace(SOURCE, n_kv_head=2)
    masks = random_masks(gqa, target_of(FIELDS, gqa, replace(TARGET, n_head=2, n_kv_head=1)), low=-3, high=3)
    counts = []
    for step in range(3000):
        z = masks.sample(0, step, 0)
        d, layer = (z.hidden != 0).sum(), z.layer != 0
        attention = 2 * d * (z.head != 0).sum(1) * (2 + 1) * gqa.head_dim
        counts.append((layer * (attention + 3 * d * (z.ffn != 0).sum(1) + 2 * d)).sum() + 2 * gqa.vocab_size * d + d)
    counts = torch.stack(counts).double()
    assert abs(counts.mean() - masks.expected_params(0)) < 4 * counts.std() / len(counts) ** 0.5
    decided = PruningMasks(gqa, gqa, 0)
    assert decided.distributions() == {} and decided.expected_params(0) == gqa.n_params()


@pytest.mark.parametrize("family", [{}, {"qkv_bias": True}, {"qk_norm": True}], ids=str)
def test_expected_params_of_decided_gates_are_the_targets(family):
    source = replace(SOURCE, n_kv_head=2, **family)
    masks = PruningMasks(
        source, target_of(FIELDS, source, replace(TARGET, n_head=2, n_kv_head=1)), 0, settle_at=0
    ).double()
    choose_(masks, magnitude_scores(random_llama(source)))
    assert masks.expected_params(0) == pytest.approx(masks.target.n_params(), rel=1e-4)


# -- extraction -----------------------------------------------------------------------------------------------------


def check_extraction(source, target, seed=0, masks=None):
    llama = random_llama(source, seed)
    masks = masks or random_masks(source, target, seed)
    tokens = torch.randint(source.vocab_size, (2, 16))
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        llama, masks = llama.to(dtype), masks.to(dtype)
        small = extract(llama, masks)
        assert small.config == target
        assert sum(p.numel() for p in small.parameters()) == target.n_params()
        gated = llama(tokens, masks.deterministic())
        assert relative(small(tokens), gated) < tolerance
    assert relative(llama(tokens), gated) > 0.05  # the gates did something


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
@pytest.mark.parametrize("kind", ["mha", "gqa", "tied", "qkv_bias", "qk_norm"])
def test_extracted_equals_gated_for_fractional_gates(subset, kind):
    source, full = SOURCE, TARGET
    if kind in ("gqa", "qkv_bias", "qk_norm"):
        source, full = replace(source, n_kv_head=2), replace(full, n_head=2, n_kv_head=1)
    source = replace(source, tie_embeddings=kind == "tied", qkv_bias=kind == "qkv_bias", qk_norm=kind == "qk_norm")
    check_extraction(source, target_of(subset, source, full))


def test_extracted_equals_gated_with_a_head_dim_of_its_own():
    source = replace(SOURCE, head_dim=10)
    check_extraction(source, target_of(FIELDS, source))


def test_extracted_equals_gated_when_whole_layers_and_all_heads_of_a_layer_are_gone():
    """The gated model must cope with any zeros, also more than the target asks for."""
    llama = random_llama(SOURCE).double()
    tokens = torch.randint(SOURCE.vocab_size, (2, 16))
    z = random_masks(SOURCE, target_of(["hidden"])).double().deterministic()
    one, zero = torch.ones(4, 4, dtype=torch.float64), torch.tensor([1.0, 0.7, 0.0, 1.0], dtype=torch.float64)
    one[1] = 0  # layer 1: no head left, its attention block writes nothing
    gated = llama(tokens, Gates(layer=zero, hidden=z.hidden, head=one))
    llama.layers[1].self_attn.o_proj.weight.data.zero_()
    llama.layers[2].self_attn.o_proj.weight.data.zero_()
    llama.layers[2].mlp.down_proj.weight.data.zero_()
    llama.layers[1].mlp.down_proj.weight.data *= 0.7
    assert relative(llama(tokens, Gates(hidden=z.hidden)), gated) < 1e-12


def test_what_is_extracted_shares_no_memory_with_its_source():
    source = replace(SOURCE, qk_norm=True, qkv_bias=True)
    llama, masks = random_llama(source), random_masks(source, target_of(["layer"], source))
    theirs = {p.data_ptr() for p in llama.parameters()}
    assert not theirs & {p.data_ptr() for p in extract(llama, masks).parameters()}


@pytest.mark.parametrize("family", ["qkv_bias", "qk_norm", "tie_embeddings"])
def test_exported_logits_in_transformers_are_the_gated_ones(family, tmp_path):
    source = replace(SOURCE, n_kv_head=2, **{family: True})
    target = target_of(FIELDS, source, replace(TARGET, n_head=2, n_kv_head=1))
    llama, masks = random_llama(source), random_masks(source, target)
    extract(llama, masks).save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.randint(source.vocab_size, (2, 16))
    with torch.no_grad():
        assert relative(theirs(tokens).logits, llama(tokens, masks.deterministic())) < 1e-5


def test_norm_of_a_gated_model_sees_survivors_only():
    """With 0/1 gates: the mean square is over the kept dimensions, not over all."""
    llama = random_llama(SOURCE).double()
    z = (torch.arange(24) % 3 != 0).double()
    x = torch.randn(2, 5, 24, dtype=torch.float64) * z
    norm = llama.layers[0].input_layernorm
    kept = x[..., z == 1]
    expected = kept / (kept.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight[z == 1]
    torch.testing.assert_close(norm(x, z)[..., z == 1], expected)


def test_on_the_way_each_row_keeps_as_many_as_it_expects():
    """Rows differ: here one expects a tenth of its gates to survive, the other half of them and more."""
    gates, ends = HardConcrete((2, 100), keep=50).double(), torch.tensor([-2.0, 0.5], dtype=torch.float64)
    gates.log_alpha.data = ends[:, None] + torch.linspace(0, 1e-6, 100, dtype=torch.float64)
    zeros = 100 * torch.sigmoid(2 / 3 * math.log(1 / 11) - ends)
    assert (gates.deterministic() == 0).sum(-1).tolist() == zeros.round().tolist()


def test_gates_are_drawn_independently():
    """Also those of different granularities, as `expected_params` assumes."""
    target = replace(SOURCE, n_layer=2, d_model=12, n_head=2, n_kv_head=2, d_ffn=20)
    masks = PruningMasks(SOURCE, target, 0, log_alpha=0.0)
    draws = [torch.cat([z.detach().flatten()[:4] for z in masks.sample(0, step, 0)]) for step in range(500)]
    assert (torch.corrcoef(torch.stack(draws).T) - torch.eye(16)).abs().max() < 0.25


IMPOSSIBLE = {
    "larger": (dict(n_layer=5), "n_layer = 5 is larger than the source's 4"),
    "wider": (dict(d_model=25), "d_model = 25"),
    "head_dim": (dict(head_dim=4), "head_dim"),
    "other group size": (dict(n_head=2, n_kv_head=2), "KV groups go whole"),
    "more than the shape": (dict(n_layer=3, rope_theta=5e5), "in their shapes only"),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_targets_that_cannot_be_are_refused(name):
    change, words = IMPOSSIBLE[name]
    source = replace(SOURCE, n_kv_head=2)
    with pytest.raises(ValueError, match=words):
        PruningMasks(source, replace(source, **change), 0)


@pytest.mark.parametrize("name, size, keep, reached", [
    ("n_layer", 21, 1, True), ("n_layer", 22, 1, False), ("d_ffn", 495, 494, True), ("d_ffn", 496, 495, False),
])  # fmt: skip
def test_a_target_that_log_alpha_cannot_reach_is_refused(name, size, keep, reached):
    """P(z = 0) = sigmoid(log(1 / 11) * 2/3 - log_alpha) is at least .002018 and at most .9529: 21 / 22 is more."""
    source, target = replace(SOURCE, **{name: size}), ["--init_from=x", f"--target_{name}={keep}"]
    with nullcontext() if reached else pytest.raises(ValueError, match="'learned' can close 0.2 to 95.3 %"):
        assert load(Settings, target).target_shape(source).shape[name] == keep
    assert load(Settings, [*target, "--gates=activation"]).target_shape(source).shape[name] == keep


def test_equal_scores_are_ordered_by_lot():
    """Where all are equal, no index is favoured, each layer has its own lot, and all agree on who survives."""
    gates = HardConcrete((40, 100), keep=50)
    kept = gates.deterministic(50) > 0
    assert (kept.sum(-1) == 50).all()
    assert torch.equal(kept, gates.deterministic(50) > 0)
    first_half = kept[:, :50].float().mean().item()
    assert 0.45 < first_half < 0.55 and len({tuple(row.tolist()) for row in kept}) == 40
    with torch.no_grad():
        gates.log_alpha[:, 7] -= 1.0  # what differs decides before the lot
    assert not (gates.deterministic(99) > 0)[:, 7].any()


@pytest.mark.parametrize("where", [("layer", 0), ("head", 0), ("ffn", 0), ("hidden", ...), ("head", ...), ("ffn", ...)])
def test_gates_that_all_close_in_one_layer_or_everywhere(where):
    """Loss and gradients stay finite, and a layer that adds nothing is as if it were not there."""
    model, (name, which) = random_llama(SOURCE), where
    z = Gates(torch.ones(4), torch.ones(24), torch.ones(4, 4), torch.ones(4, 40))
    getattr(z, name)[which] = 0
    tokens = torch.arange(20).view(2, 10)
    loss = model(tokens, Gates(*(gate.requires_grad_() for gate in z)), targets=tokens.roll(1, 1)).mean()
    loss.backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in [*model.parameters(), *z])
    if name == "layer":
        del model.layers[0]
        assert model(tokens, targets=tokens.roll(1, 1)).mean().item() == pytest.approx(loss.item(), rel=1e-6)
    if name == "hidden":
        assert loss.item() == pytest.approx(math.log(SOURCE.vocab_size), rel=1e-6)
