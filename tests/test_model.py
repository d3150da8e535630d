"""The dense Llama against transformers, and its files in transformers' hands."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import model as model_module
from model import KVCache, Llama, LlamaConfig, RMSNorm, linear, read_config

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


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_transformers_both_ways(name, tmp_path):
    ours = random_llama(SHAPES[name])
    tokens = torch.randint(97, (2, 40))
    ours.save_pretrained(tmp_path / "ours")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        assert relative(ours(tokens), theirs(tokens).logits) < 1e-5
    theirs.save_pretrained(tmp_path / "theirs")
    again = Llama.from_pretrained(tmp_path / "theirs")
    assert again.config == replace(ours.config, bos_token_id=again.config.bos_token_id)
    for (name, a), (_, b) in zip(again.named_parameters(), ours.named_parameters()):
        assert torch.equal(a, b), name


def test_sharded_and_bfloat16_weights(tmp_path):
    ours = random_llama(MHA)
    ours.save_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=40e3)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2 and not list((tmp_path / "ours").glob("*.partial"))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    tokens = torch.randint(97, (2, 40))
    with torch.no_grad():
        assert relative(ours(tokens), theirs(tokens).logits) < 1e-5
    sharded = Llama.from_pretrained(tmp_path / "many")
    assert all(torch.equal(a, b.bfloat16().float()) for a, b in zip(sharded.parameters(), ours.parameters()))


@pytest.mark.parametrize("before, after", [(40e3, 5e9), (5e9, 40e3)])
def test_a_model_written_over_another_is_what_is_read(before, after, tmp_path):
    """One file over several and the other way round: what is left of the old one counts neither here nor there."""
    random_llama(MHA).save_pretrained(tmp_path, max_shard_bytes=before)
    ours = random_llama(MHA)
    ours.save_pretrained(tmp_path, max_shard_bytes=after)
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(97, (2, 40))
    with torch.no_grad():
        assert torch.equal(ours(tokens), Llama.from_pretrained(tmp_path)(tokens))
        assert relative(ours(tokens), theirs(tokens).logits) < 1e-5


def test_what_config_json_leaves_out_is_what_transformers_takes(tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    optional = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads", "head_dim")
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k not in optional}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    random_llama(read_config(tmp_path)).save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert all(getattr(config, key, None) == getattr(again, key, None) for key in (*optional, "rope_parameters"))


def test_a_norm_in_bfloat16_scales_rows_as_exactly_as_transformers():
    x = torch.randn(2000, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    theirs = transformers.models.llama.modeling_llama.LlamaRMSNorm(256, 1e-5).bfloat16()

    def error(norm):  # of a row's scale: rounding of single values averages out
        y = norm(x).double()
        return ((y * exact).sum(-1) / exact.square().sum(-1) - 1).square().mean().sqrt().item()

    assert error(RMSNorm(256, 1e-5).bfloat16()) < 1.1 * error(theirs)


@pytest.mark.parametrize("shape", [(32, 40), (3, 16, 40), (1, 33, 40), (2, 1, 40), (2, 0, 40)])
def test_products_and_their_gradients_are_float64_s(shape):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, generator=generator) for s in (shape, (24, 40), (*shape[:-1], 24)))
    # rows gated, or laid out in another order: what weights and activations look like in the model
    for change in (lambda w: w, lambda w: w * torch.linspace(0, 1, 24)[:, None], lambda w: w.t().contiguous().t()):
        results = []
        for dtype in (torch.float32, torch.float64):
            inputs = [y.detach().to(dtype, copy=True).requires_grad_() for y in (x, change(weight))]
            product = linear(*inputs) if dtype == torch.float32 else (inputs[0][..., None, :] * inputs[1]).sum(-1)
            product.backward(grad.to(dtype))
            results.append((product, *(y.grad for y in inputs)))
        for ours, exact in zip(*results):
            assert ours.shape == exact.shape
            assert 0 in exact.shape or (ours.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="F.linear has no MKL to be slow with")
def test_float32_products_are_onednn_s_and_can_be_turned_off(monkeypatch):
    x, weight = torch.randn(4, 8, 40), torch.randn(24, 40, requires_grad=True)
    assert "OneDNN" in linear(x, weight).grad_fn.name()
    assert "OneDNN" not in linear(x[:1], weight).grad_fn.name()  # too few rows to be worth it
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "OneDNN" not in linear(x, weight).grad_fn.name()


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


@pytest.mark.parametrize("name", ["mha", "gqa"])
def test_cache_gives_the_logits_of_the_whole_text(name):
    llama = random_llama(SHAPES[name]).double()
    tokens = torch.randint(97, (2, 20))
    cache = [KVCache(20) for _ in llama.layers]
    with torch.no_grad():
        parts = [llama(tokens[:, :12], cache=cache)] + [llama(tokens[:, i : i + 1], cache=cache) for i in range(12, 20)]
        assert relative(torch.cat(parts, 1), llama(tokens)) < 1e-12


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


@pytest.mark.parametrize("name", ["mha", "gqa", "tied", "head_dim that is not d / heads"])
def test_n_params_counts_the_parameters(name):
    assert SHAPES[name].n_params() == sum(p.numel() for p in Llama(SHAPES[name]).parameters())


MISTAKES = {
    "attention_bias": (lambda c: c | {"attention_bias": True}, "attention_bias"),
    "activation": (lambda c: c | {"hidden_act": "gelu"}, "hidden_act"),
    "architecture": (lambda c: c | {"model_type": "mistral"}, "model_type"),
    "rope type": (lambda c: c | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    "missing key": (lambda c: {k: v for k, v in c.items() if k != "hidden_size"}, "hidden_size"),
    "other shape": (lambda c: c | {"intermediate_size": 81}, "gate_proj.weight has shape (80, 48)"),
    "too few layers": (lambda c: c | {"num_hidden_layers": 4}, "layers.3"),
    "too many layers": (lambda c: c | {"num_hidden_layers": 2}, "layers.2"),
    "heads": (lambda c: c | {"num_key_value_heads": 3}, "multiple of n_kv_head"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_what_cannot_be_read_is_named(mistake, tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    change, words = MISTAKES[mistake]
    file = tmp_path / "config.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    assert words in str(error.value)


def test_rotary_frequencies_of_older_files_are_no_weights(tmp_path):
    ours = random_llama(MHA)
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, tmp_path / "model.safetensors")
    assert torch.equal(Llama.from_pretrained(tmp_path).lm_head.weight, ours.lm_head.weight)


def test_missing_surplus_and_broken_files_are_named(tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole, tensors = file.read_bytes(), load_file(file)
    for change, words in (
        ({"model.norm.weight": None}, "norm.weight is missing"),
        ({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)}, "q_proj.bias is not part"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file)
        with pytest.raises(ValueError, match=words):
            Llama.from_pretrained(tmp_path)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        Llama.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no such file"):
        Llama.from_pretrained(tmp_path)
