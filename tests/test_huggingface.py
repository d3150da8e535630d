"""A Llama's files in transformers' hands, and transformers' in ours; mistakes in them are named."""

import json
import os
from dataclasses import replace

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_model import MHA, SHAPES, random_llama, relative

from model import Llama, read_config
from plumbing.huggingface import stored_dtype


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


FAMILIES = {
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral, a window that is never full": (transformers.MistralConfig, {"sliding_window": 64}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 20, "tie_word_embeddings": True}),
    "llama": (transformers.LlamaConfig, {"pad_token_id": 5, "pretraining_tp": 2, "attention_dropout": 0.1}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_there_and_back(family, tmp_path):
    kind, keys = FAMILIES[family]
    config = kind(
        vocab_size=97, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=80, max_position_embeddings=64, rope_parameters={"rope_type": "default", "rope_theta": 5e3},
        **keys,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for weight in theirs.parameters():  # large enough that every part shows in the logits
        torch.nn.init.normal_(weight, 1.0 if weight.dim() == 1 else 0.0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = Llama.from_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    tokens = torch.randint(97, (2, 40))
    with torch.no_grad():
        logits = theirs(tokens).logits
        assert relative(ours(tokens), logits) < 1e-5 and relative(again(tokens).logits, logits) < 1e-5
    assert not any(info.values()) and type(again) is type(theirs)
    before, after = ({k: v for k, v in c.to_dict().items() if k != "_name_or_path"} for c in (config, again.config))
    before |= {"architectures": [type(theirs).__name__], "dtype": "float32"}
    assert after == {"head_dim": 12} | before  # which Qwen2's config leaves out: it follows from the width


def test_sharded_and_bfloat16_weights(tmp_path):
    ours = random_llama(MHA)
    ours.save_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16)
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "one").dtype == torch.bfloat16
    theirs.save_pretrained(tmp_path / "many", max_shard_size="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    ours.save_pretrained(tmp_path / "ours", max_shard_bytes=40e3)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 2 and not list((tmp_path / "ours").glob("*.partial"))
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * MHA.n_params()
    for file in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}  # some releases of transformers want it
    ours.save_pretrained(tmp_path / "halves", dtype=torch.bfloat16, max_shard_bytes=40e3)
    sizes = [len(list((tmp_path / name).glob("*.safetensors"))) for name in ("ours", "halves")]
    assert 0.4 * sizes[0] < sizes[1] < 0.7 * sizes[0]
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


def test_whole_numbers_beyond_what_torch_takes(tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    scaling = LLAMA3 | {"factor": 2**70, "high_freq_factor": 2**71, "original_max_position_embeddings": 2**40}
    large = {"rope_theta": 2**70, "rms_norm_eps": 2**70, "rope_scaling": scaling}
    file.write_text(json.dumps(json.loads(file.read_text()) | large))
    assert Llama.from_pretrained(tmp_path)(torch.tensor([[1, 2, 3]])).isfinite().all()


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_what_config_json_leaves_out_is_what_transformers_takes(model_type, tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    optional = ("rms_norm_eps", "rope_theta", "tie_word_embeddings", "num_key_value_heads", "head_dim")
    optional += ("max_position_embeddings", "bos_token_id", "eos_token_id", "rope_scaling", "hidden_act")
    left = {k: v for k, v in json.loads(file.read_text()).items() if k not in optional}
    left |= {"hidden_size": 64, "num_attention_heads": 32}  # Qwen2 and Qwen3 take 32 KV heads
    left |= {"max_sequence_length": 64}  # the name in the first Llama's files: it never had a meaning
    if model_type == "mistral":
        left["sliding_window"] = None
    file.write_text(json.dumps(left | {"model_type": model_type}))
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    Llama(read_config(tmp_path)).save_pretrained(tmp_path / "again")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "again")
    assert type(config) is type(again) and again.max_sequence_length == 64
    keys = (*set(optional) - {"rope_theta", "rope_scaling", "head_dim"}, "rope_parameters")
    assert all(getattr(config, key) == getattr(again, key) for key in keys)
    assert again.head_dim == (getattr(config, "head_dim", None) or 2)


LLAMA3 = SHAPES["llama 3's rope scaling"].rope_scaling
PLAIN = {"rope_type": "default"}


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_theta": 5e3, "rope_scaling": LLAMA3},
        {"rope_theta": 5e3, "rope_parameters": LLAMA3},
        {"rope_theta": 5e3, "rope_parameters": LLAMA3 | {"rope_theta": 7e3}},
        {"rope_theta": 5e3, "rope_scaling": LLAMA3, "rope_parameters": PLAIN | {"rope_theta": 7e3}},
        {"rope_theta": 5e3, "rope_scaling": PLAIN, "rope_parameters": LLAMA3},
        {"rope_theta": 5e3, "rope_scaling": {}, "rope_parameters": LLAMA3},
        {"rope_scaling": LLAMA3 | {"factor": 2.0}, "rope_parameters": LLAMA3 | {"rope_theta": 7e3}},
        {"rope_theta": 5e3, "rope_scaling": None, "rope_parameters": {}},
        {"rope_theta": 5e3, "rope_scaling": LLAMA3, "original_max_position_embeddings": 16},
        {"rope_theta": 5e3, "original_max_position_embeddings": 16},
    ],
)
def test_old_and_new_keys_of_the_rotary_embedding_are_read_as_transformers_reads_them(keys, tmp_path):
    random_llama(MHA).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    others = {k: v for k, v in json.loads(file.read_text()).items() if not k.startswith("rope_")}
    file.write_text(json.dumps(others | keys))
    theirs, ours = transformers.AutoConfig.from_pretrained(tmp_path).rope_parameters, read_config(tmp_path)
    assert theirs["rope_theta"] == ours.rope_theta
    assert (theirs["rope_type"] == "llama3") == (ours.rope_scaling is not None)
    assert all(theirs[key] == value for key, value in (ours.rope_scaling or {}).items())


NESTED = "NESTED"  # stands for JSON that Python itself could not write
MISTAKES = {
    "attention_bias": (lambda c: c | {"attention_bias": True}, "attention_bias"),
    "activation": (lambda c: c | {"hidden_act": "gelu"}, "hidden_act"),
    "a model of embeddings": (lambda c: c | {"is_causal": False}, "is_causal = False is not supported, only True"),
    "architecture": (lambda c: c | {"model_type": "gemma"}, "model_type = 'gemma' is not supported, only llama, mist"),
    "architecture with other keys": (lambda c: {"model_type": "gpt2", "n_layer": 2}, "model_type = 'gpt2' is not"),
    "experts": (lambda c: c | {"model_type": "qwen3_moe"}, "model_type = 'qwen3_moe'"),
    "window": (lambda c: c | {"model_type": "mistral", "sliding_window": 16}, "sliding_window = 16"),
    "default window": (
        lambda c: c | {"model_type": "mistral", "max_position_embeddings": 8192},
        "sliding_window = 4096",
    ),
    "window of Qwen2": (lambda c: c | {"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    "windows of some layers": (
        lambda c: c | {"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]},
        "layer_types = ['sliding_attention']",
    ),
    "linear rope": (lambda c: c | {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_type = 'linear'"),
    "rope by layer": (lambda c: c | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "partial rope": (lambda c: c | {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
    "no bands": (lambda c: c | {"rope_scaling": LLAMA3 | {"low_freq_factor": 4}}, "low_freq_factor = 4 must be below"),
    "bands": (lambda c: c | {"rope_scaling": LLAMA3 | {"low_freq_factor": 5.0}}, "low_freq_factor = 5.0 must be below"),
    "rope factor": (lambda c: c | {"rope_scaling": LLAMA3 | {"factor": -8}}, "$.rope_scaling.factor"),
    "rope without factor": (lambda c: c | {"rope_scaling": LLAMA3 | {"factor": None}}, "factor missing"),
    "theta 0": (lambda c: c | {"rope_theta": 0}, "$.rope_theta"),
    "theta -1": (lambda c: c | {"rope_parameters": {"rope_theta": -1}}, "$.rope_parameters.rope_theta"),
    "theta NaN": (lambda c: c | {"rope_theta": float("nan")}, "config.json: not a model's config"),
    "theta that no float holds": (lambda c: c | {"rope_theta": 10**400}, "config.json: not a model's config"),
    "eps": (lambda c: c | {"rms_norm_eps": -1}, "$.rms_norm_eps"),
    "eps 0": (lambda c: c | {"rms_norm_eps": 0.0}, "$.rms_norm_eps"),
    "type": (lambda c: c | {"hidden_size": "48"}, "$.hidden_size"),
    "size that no machine has": (lambda c: c | {"num_hidden_layers": 10**9}, "$.num_hidden_layers"),
    "no object": (lambda c: [c], "not a model's config"),
    "nesting": (lambda c: c | {"x": NESTED}, "nested too deep"),
    "eos": (lambda c: c | {"eos_token_id": [1, 97]}, "eos_token_id = [1, 97] is beyond the vocabulary of 97"),
    "bos": (lambda c: c | {"bos_token_id": 97}, "bos_token_id = 97"),
    "quantised": (lambda c: c | {"quantization_config": {"bits": 4}}, "quantization_config"),
    "code": (lambda c: c | {"architectures": ["Mine"], "auto_map": {"AutoModelForCausalLM": "m.Mine"}}, "['Mine']"),
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
    text = json.dumps(change(json.loads(file.read_text())))
    file.write_text(text.replace('"NESTED"', "[" * 100_000 + "]" * 100_000))
    with pytest.raises(ValueError) as error:
        Llama.from_pretrained(tmp_path)
    assert words in str(error.value) and str(tmp_path) in str(error.value)


def test_code_beside_a_model_is_not_executed_and_not_passed_on(tmp_path):
    """Where a Llama names code of its own, it is read as transformers does without trust_remote_code."""
    random_llama(MHA).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "config.json"
    keys = {"auto_map": {"AutoModelForCausalLM": "modeling.Mine"}, "trust_remote_code": True, "pad_token_id": 3}
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))
    (tmp_path / "a" / "modeling.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")
    Llama.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "mine"}))
    with pytest.raises(ValueError, match="model_type = 'mine'"):
        Llama.from_pretrained(tmp_path / "a")
    assert not (tmp_path / "executed").exists()
    written = json.loads((tmp_path / "b" / "config.json").read_text())
    assert written["pad_token_id"] == 3 and not {"auto_map", "trust_remote_code"} & set(written)


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
        ({"norm.weight": torch.zeros(48)}, "norm.weight is there twice"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.int8)}, "norm.weight is stored as I8, only F64, F32"),
        ({"model.norm.weight": torch.ones(48, dtype=torch.bool)}, "norm.weight is stored as BOOL"),
        ({"model.norm.weight": torch.ones(48).to(torch.float8_e4m3fn)}, "norm.weight is stored as F8_E4M3"),
    ):
        save_file({k: v for k, v in (tensors | change).items() if v is not None}, file)
        with pytest.raises(ValueError, match=words):
            Llama.from_pretrained(tmp_path)
    for content, words in (
        (whole[: len(whole) // 2], "not a whole safetensors file"),
        (b"", "not a whole safetensors file"),
        ((200).to_bytes(8, "little") + b"[" * 200, "not a whole safetensors file"),
        (  # opens a file for writing, if it is unpickled
            f"\x80\x02cbuiltins\nopen\n(V{tmp_path / 'executed'}\nVw\ntR.".encode("latin-1"),
            "not a whole.*a pickle, which is never opened",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64, "git-LFS pointer"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=words):
            Llama.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="no such file"):
        Llama.from_pretrained(tmp_path)
    assert not (tmp_path / "executed").exists()


def test_an_index_names_files_beside_it(tmp_path):
    random_llama(MHA).save_pretrained(tmp_path / "elsewhere")
    random_llama(MHA).save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    index = tmp_path / "m" / "model.safetensors.index.json"
    for content, words in (
        ('{"weight_map": {"model.norm.weight": 3}}', "not an index"),
        ("{}", "weight_map"),
        ('{"weight_map": {"a": "../elsewhere/model.safetensors"}}', "'../elsewhere/model.safetensors' is not the name"),
        (json.dumps({"weight_map": {"a": str(tmp_path / "elsewhere" / "model.safetensors")}}), "is not the name"),
        ("[" * 100_000, "not an index"),
    ):
        index.write_text(content)
        with pytest.raises(ValueError, match=words):
            Llama.from_pretrained(tmp_path / "m")


def test_the_two_copies_of_a_tied_matrix_are_compared_to_the_last_row(tmp_path):
    """Row by row: the matrix of a large vocabulary is read in pieces."""
    ours = random_llama(replace(MHA, n_layer=1, vocab_size=5000, tie_embeddings=True))
    ours.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    Llama.from_pretrained(tmp_path)
    tensors["lm_head.weight"][-1, -1] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight"):
        Llama.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", ["embed_tokens", "lm_head", "both"])
def test_tied_weights_may_be_stored_under_either_name(kept, tmp_path):
    ours = random_llama(SHAPES["tied"])
    ours.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    matrix = tensors.pop("model.embed_tokens.weight")
    names = {"embed_tokens": ["model.embed_tokens.weight"], "lm_head": ["lm_head.weight"]}
    for name in names.get(kept, ["model.embed_tokens.weight", "lm_head.weight"]):
        tensors[name] = matrix.clone()
    save_file(tensors, file, metadata={"format": "pt"})
    theirs, tokens = transformers.AutoModelForCausalLM.from_pretrained(tmp_path), torch.randint(97, (2, 40))
    with torch.no_grad():
        assert torch.equal(Llama.from_pretrained(tmp_path)(tokens), ours(tokens))
        assert relative(theirs(tokens).logits, ours(tokens)) < 1e-5
    if kept == "both":
        tensors["lm_head.weight"][96, 47] += 1
        save_file(tensors, file)
        with pytest.raises(ValueError, match="lm_head.weight is not embed_tokens.weight"):
            Llama.from_pretrained(tmp_path)


def test_files_have_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        random_llama(MHA).save_pretrained(tmp_path)
        random_llama(MHA).save_pretrained(tmp_path / "shards", max_shard_bytes=40e3)
    finally:
        os.umask(before)
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(files) > 4 and {file.stat().st_mode & 0o777 for file in files} == {0o644}


def test_a_model_is_exported_in_the_dtype_that_most_of_it_has(tmp_path):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        random_llama(MHA).save_pretrained(tmp_path, dtype=dtype)
        tensors = load_file(tmp_path / "model.safetensors")
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        save_file(tensors, tmp_path / "model.safetensors")
        assert stored_dtype(tmp_path) == dtype
    save_file({"x": torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")  # what no model has:
    assert stored_dtype(tmp_path) == torch.float32  # reading it says so, in one line
    save_file({}, tmp_path / "model.safetensors")
    assert stored_dtype(tmp_path) == torch.float32
