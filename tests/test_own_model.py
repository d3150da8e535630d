"""A model somebody else trained, with its tokenizer: from transformers' directory, pruned, and back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import metrics, run

import eval as eval_module
from model import Llama
from plumbing.tokenizer import fingerprint, load_tokenizer
from prepare_data import prepare


@pytest.fixture(scope="module")
def theirs(tiny_corpus, tmp_path_factory) -> Path:
    """A directory as `transformers` writes it: GQA, tied embeddings, bfloat16, sharded, a tokenizer."""
    path = tmp_path_factory.mktemp("theirs")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train([str(p) for p in sorted(Path(tiny_corpus).rglob("*")) if p.is_file()], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        path
    )
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=512,  # padded beyond the tokenizer's 400, as real ones are
        hidden_size=36,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=[1, 0],
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 1e4,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


@pytest.fixture(scope="module")
def data(theirs, tiny_corpus, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("own") / "data"
    prepare(str(tiny_corpus), out, tokenizer=str(theirs), held_out=0.2, window=64)
    return out


def test_their_model_pruned_loads_in_transformers_with_its_tokenizer(theirs, data, tmp_path, monkeypatch):
    out = tmp_path / "pruned"
    target = ["--target_n_layer=2", "--target_d_model=24", "--target_n_head=3", "--target_d_ffn=32"]
    args = [f"--data={data}", f"--init_from={theirs}", "--steps=12", "--sparsity_warmup=4", *target]
    assert run(monkeypatch, *args, f"--out={out}") == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(out / "model", output_loading_info=True)
    assert not any(info.values())
    c = model.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size) == (3, 1, 8, 24)
    assert (c.bos_token_id, c.eos_token_id, c.vocab_size, c.tie_word_embeddings) == (0, [1, 0], 512, True)
    assert c.rope_parameters["rope_type"] == "llama3" and c.max_position_embeddings == 128
    ours, tokens = Llama.from_pretrained(out / "model"), torch.randint(400, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)
    text = "the cats see 12 + 3 é日本🦊"
    before, after = (transformers.AutoTokenizer.from_pretrained(p) for p in (theirs, out / "model"))
    assert before(text)["input_ids"] == after(text)["input_ids"] == load_tokenizer(str(theirs)).encode(text).tolist()
    # a second stage starts from the run, and carries the tokenizer on
    args = [f"--data={data}", f"--init_from={out}", "--steps=2"]
    assert run(monkeypatch, *args, f"--out={tmp_path / 'continued'}") == 0
    assert (tmp_path / "continued" / "model" / "tokenizer.json").read_bytes() == (
        theirs / "tokenizer.json"
    ).read_bytes()
    assert metrics(tmp_path / "continued", "end")


def test_text_of_another_tokenizer_is_refused(theirs, data, tiny_data, tmp_path, monkeypatch, capsys):
    args = ["--steps=2", f"--out={tmp_path / 'x'}", f"--init_from={theirs}"]
    assert run(monkeypatch, f"--data={tiny_data}", *args) == 2  # bytes: fewer ids than the model's, but others
    err = capsys.readouterr().err
    assert "its tokenizer is not the one" in err and f"--tokenizer {theirs}" in err and err.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["eval.py", str(theirs), f"--data={tiny_data}"])
    with pytest.raises(SystemExit) as end:
        eval_module.main()
    assert end.value.code == 2 and "its tokenizer is not the one" in capsys.readouterr().err
    small = tmp_path / "small"
    Llama.from_pretrained(theirs).save_pretrained(small)
    config = json.loads((small / "config.json").read_text())
    assert config["vocab_size"] == 512  # without tokenizer files only the size can be checked
    assert run(monkeypatch, f"--data={tiny_data}", "--steps=2", f"--out={tmp_path / 'y'}", f"--init_from={small}") == 0
    # but a model that was trained here knows its text's tokenizer
    args = ["--steps=2", f"--init_from={tmp_path / 'y'}", f"--out={tmp_path / 'z'}"]
    assert run(monkeypatch, f"--data={data}", *args) == 2
    err = capsys.readouterr().err
    assert "its tokenizer is not the one" in err and "--tokenizer byte" in err


def test_fingerprints_tell_tokenizers_apart(theirs):
    names = [fingerprint(load_tokenizer(spec)) for spec in ("byte", str(theirs), str(theirs / "tokenizer.json"))]
    assert names[0] != names[1] == names[2]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_to_load_is_little_more_than_the_model(tmp_path):
    """In a fresh process: growth of the peak resident size over the size of the model in the run's dtype."""
    code = f"""
import resource, sys, torch
sys.path.insert(0, {str(Path(__file__).parent.parent)!r})
from model import Llama, LlamaConfig
from plumbing.log import host_memory
config = LlamaConfig(8000, 24, 512, 8, 8, 64, 2048, 128)
if sys.argv[1] == "write":
    Llama(config).save_pretrained({str(tmp_path)!r}, dtype=torch.bfloat16)
    Llama(LlamaConfig(64, 1, 32, 2, 2, 16, 64, 32)).save_pretrained({str(tmp_path / "warm")!r}, dtype=torch.bfloat16)
else:
    Llama.from_pretrained({str(tmp_path / "warm")!r})  # what is loaded with the first tensor is not the model's
    start = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
    Llama.from_pretrained({str(tmp_path)!r})
    print((host_memory() - start) / (4 * config.n_params()))
"""
    subprocess.run([sys.executable, "-c", code, "write"], check=True)
    done = subprocess.run([sys.executable, "-c", code, "read"], check=True, capture_output=True, text=True)
    assert 0.9 < float(done.stdout) < 1.2
