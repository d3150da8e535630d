"""The dense Llama against transformers, and against its own definition."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from scipy import stats

import model as model_module
from model import KVCache, Llama, LlamaConfig, RMSNorm, rope

MHA = LlamaConfig(97, 3, 48, 4, 4, 12, 80, 64)
SHAPES = {
    "mha": MHA,
    "gqa": replace(MHA, n_kv_head=2),
    "one kv head": replace(MHA, n_kv_head=1),
    "tied": replace(MHA, tie_embeddings=True),
    "head_dim that is not d / heads": replace(MHA, head_dim=20),
    "other base and eps": replace(MHA, rope_theta=5e5, norm_eps=1e-3),
    "llama 3's rope scaling": replace(
        MHA,
        rope_theta=5e3,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "several ends of text": replace(MHA, eos_token_id=[3, 4], bos_token_id=1),
    "biases (Qwen2)": replace(MHA, n_kv_head=2, qkv_bias=True),
    "norms of heads (Qwen3)": replace(MHA, n_kv_head=2, head_dim=16, qk_norm=True, tie_embeddings=True),
}


def random_llama(config: LlamaConfig, seed=0) -> Llama:
    """Weights large enough that every part of the model shows in the logits."""
    torch.manual_seed(seed)
    llama = Llama(config)
    for weight in llama.parameters():
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
    return llama.eval()


def relative(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def test_a_norm_in_bfloat16_scales_rows_as_exactly_as_transformers():
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(256, 1e-5).bfloat16()

    def error(norm):  # of a row's scale: rounding of single values averages out
        y = norm(x).double()
        return ((y * exact).sum(-1) / exact.square().sum(-1) - 1).square().mean().sqrt().item()

    assert error(RMSNorm(256, 1e-5).bfloat16()) < 1.1 * error(theirs)


def test_cross_entropy_in_pieces_is_the_same_with_its_gradient(monkeypatch):
    llama = random_llama(MHA).double()
    tokens, targets = torch.randint(97, (2, 2, 30))
    expected = torch.nn.functional.cross_entropy(llama(tokens).transpose(1, 2), targets, reduction="none")
    grads = []
    for logits_at_once in (2**27, 97 * 7):
        monkeypatch.setattr(model_module, "LOGITS_AT_ONCE", logits_at_once)
        loss = llama(tokens, targets=targets)
        assert loss.shape == targets.shape and torch.allclose(loss, expected, atol=1e-10)
        llama.zero_grad()
        loss.mean().backward()
        grads.append([p.grad.clone() for p in llama.parameters()])
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))


@pytest.mark.parametrize("name", ["mha", "gqa", "biases (Qwen2)", "norms of heads (Qwen3)"])
def test_cache_gives_the_logits_of_the_whole_text(name):
    llama = random_llama(SHAPES[name]).double()
    tokens = torch.randint(97, (2, 20))
    cache = [KVCache() for _ in llama.layers]
    with torch.no_grad():
        parts = [llama(tokens[:, :12], cache=cache)] + [llama(tokens[:, i : i + 1], cache=cache) for i in range(12, 20)]
        assert relative(torch.cat(parts, 1), llama(tokens)) < 1e-12


def test_groups_are_those_of_gqa_also_where_the_kernel_knows_none(monkeypatch):
    """On CUDA in float32 keys and values are repeated: here with tensors that say they are there."""
    llama, tokens = random_llama(SHAPES["gqa"]), torch.randint(97, (2, 20))
    expected = llama(tokens)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True), raising=False)
    seen, attention = [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, **how: (seen.append((k.shape[1], how["enable_gqa"])), attention(q, k, v, **how))[1],
    )
    assert relative(llama(tokens), expected) < 1e-5 and set(seen) == {(4, False)}


def test_greedy_generation_is_transformers():
    ours = random_llama(SHAPES["gqa"]).double()
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=12,
        intermediate_size=80, rms_norm_eps=1e-5, eos_token_id=None, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    theirs = transformers.LlamaForCausalLM(config).double().eval()
    prefixed = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in ours.state_dict().items()}
    theirs.load_state_dict(prefixed)
    prompt = torch.randint(97, (1, 8))
    expected = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=16, do_sample=False)
    assert ours.generate(prompt, 16, temperature=0).tolist() == expected.tolist()


def test_initial_weights_follow_the_seed_alone():
    a, b, c = (Llama(MHA).init_weights(seed) for seed in (1, 1, 2))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert a.layers[0].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert a.layers[0].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert a.layers[0].self_attn.o_proj.weight.std().item() == pytest.approx(0.02 / 6**0.5, rel=0.1)
    assert (a.norm.weight == 1).all()
    qwen = Llama(SHAPES["biases (Qwen2)"]).init_weights(1)
    assert (qwen.layers[0].self_attn.v_proj.bias == 0).all()


@pytest.mark.parametrize("name", SHAPES)
def test_n_params_counts_the_parameters(name):
    assert SHAPES[name].n_params() == sum(p.numel() for p in Llama(SHAPES[name]).parameters())


def test_a_draw_is_from_the_softmax_at_its_temperature():
    llama, prompt, n = random_llama(MHA), torch.tensor([[5, 17, 3]]), 20_000
    with torch.no_grad():
        llama.lm_head.weight *= 0.2
        p = torch.softmax(llama(prompt)[0, -1].double() / 0.5, -1).numpy()
    drawn = llama.generate(prompt.expand(n, -1), 1, temperature=0.5)[:, -1]
    assert n * p.min() > 5 and stats.chisquare(np.bincount(drawn, minlength=97), n * p).pvalue > 1e-3


def test_sixteen_bits_lose_no_position_and_no_loss():
    """In bfloat16 itself, as in shards, angles at position 4,000 would be noise, and a loss would have three digits."""
    angle = np.arange(4096)[:, None] * 1e4 ** (-np.arange(0, 12, 2) / 12)
    cos, sin = rope(torch.arange(4096), MHA, torch.bfloat16)
    for ours, exact in ((cos[:, :6], np.cos(angle)), (sin[:, 6:], np.sin(angle))):
        assert ours.dtype == torch.bfloat16 and np.abs(ours.double().numpy() - exact).max() < 2**-7
    llama, tokens = random_llama(MHA).bfloat16(), torch.randint(97, (2, 31))
    loss, logits = llama(tokens[:, :-1], targets=tokens[:, 1:]), llama(tokens[:, :-1])
    exact = torch.nn.functional.cross_entropy(logits.double().transpose(1, 2), tokens[:, 1:], reduction="none")
    assert loss.dtype == torch.float32 and (loss - exact).abs().max() < 1e-5
