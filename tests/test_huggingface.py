"""A Llama's files in transformers' hands, and transformers' in ours; mistakes in them are named."""

import json
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_model import MHA, SHAPES, random_llama, relative

from model import Llama, read_config


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


MISTAKES = {
    "attention_bias": (lambda c: c | {"attention_bias": True}, "attention_bias"),
    "activation": (lambda c: c | {"hidden_act": "gelu"}, "hidden_act"),
    "architecture": (lambda c: c | {"model_type": "mistral"}, "model_type"),
    "rope type": (lambda c: c | {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    "rope that is no object": (lambda c: c | {"rope_scaling": "llama3"}, "not a model's config"),
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
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": 3}}')
    with pytest.raises(ValueError, match="not an index"):
        Llama.from_pretrained(tmp_path)
