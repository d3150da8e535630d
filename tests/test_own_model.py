"""A model somebody else trained, with its tokenizer: from transformers' directory, pruned, and back."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
import transformers
from conftest import call, metrics, run
from processes import fresh, resident_memory
from test_model import relative

import eval as eval_module
import train
from model import Llama, LlamaConfig, read_config
from plumbing.data import TokenData
from plumbing.huggingface import stored_dtype
from plumbing.log import host_memory
from plumbing.models import check_tokenizer
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
        pad_token_id=7,
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
    beside = {"generation_config.json": '{"eos_token_id": [1, 0]}', "chat_template.jinja": "{{ messages }}"}
    theirs = shutil.copytree(theirs, tmp_path / "theirs")
    for name, content in beside.items():
        (theirs / name).write_text(content)
    args = [f"--data={data}", f"--init_from={theirs}", "--steps=12", "--sparsity_warmup=4", *target]
    assert run(monkeypatch, *args, f"--out={out}") == 0
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        out / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()) and all((out / "model" / name).read_text() == beside[name] for name in beside)
    c = model.config
    assert (c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.hidden_size) == (3, 1, 8, 24)
    assert (c.bos_token_id, c.eos_token_id, c.vocab_size, c.tie_word_embeddings) == (0, [1, 0], 512, True)
    assert c.rope_parameters["rope_type"] == "llama3" and c.max_position_embeddings == 128
    assert c.pad_token_id == 7 and stored_dtype(out / "model") == stored_dtype(theirs) == torch.bfloat16
    ours, tokens = Llama.from_pretrained(out / "model"), torch.randint(400, (2, 100))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), model(tokens).logits, rtol=1e-4, atol=1e-5)
    text = "the cats see 12 + 3 é日本🦊"
    before, after = (transformers.AutoTokenizer.from_pretrained(p) for p in (theirs, out / "model"))
    assert before(text)["input_ids"] == after(text)["input_ids"] == load_tokenizer(str(theirs)).encode(text).tolist()
    # a second stage starts from the run, and carries the tokenizer on
    args = [f"--data={data}", f"--init_from={out}", "--steps=2", "--export_dtype=float32"]
    assert run(monkeypatch, *args, f"--out={tmp_path / 'continued'}") == 0
    assert (tmp_path / "continued" / "model" / "tokenizer.json").read_bytes() == (
        theirs / "tokenizer.json"
    ).read_bytes()
    assert metrics(tmp_path / "continued", "end") and stored_dtype(tmp_path / "continued" / "model") == torch.float32


def test_the_dtype_is_the_sources_where_that_moves_meanwhile(theirs, data, tmp_path, monkeypatch):
    source, finish = shutil.copytree(theirs, tmp_path / "source"), train.Trainer.finish

    def move_and_finish(*args):
        source.rename(tmp_path / "moved")
        finish(*args)

    monkeypatch.setattr(train.Trainer, "finish", move_and_finish)
    assert run(monkeypatch, f"--data={data}", f"--init_from={source}", "--steps=1", f"--out={tmp_path / 'out'}") == 0
    assert stored_dtype(tmp_path / "out" / "model") == torch.bfloat16


def test_a_model_from_scratch_has_the_tokenizer_of_its_text(theirs, data, tmp_path, monkeypatch):
    assert run(monkeypatch, f"--data={data}", "--steps=1", f"--out={tmp_path}") == 0
    text = "the cats see 12 + 3 é日本🦊"
    before, after = (transformers.AutoTokenizer.from_pretrained(p) for p in (theirs, tmp_path / "model"))
    assert before(text)["input_ids"] == after(text)["input_ids"]
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "llama" and config["torch_dtype"] == "float32"
    assert config["eos_token_id"] == after.eos_token_id


MISTRAL = {"others": {"model_type": "mistral", "sliding_window": None}}


@pytest.mark.parametrize("family", [{"qkv_bias": True}, {"qk_norm": True}, MISTRAL], ids=str)
def test_a_model_of_another_family_is_pruned_and_stays_one(family, tiny_data, tmp_path, monkeypatch):
    """Its width need not be a multiple of its heads, as transformers wants it of a Llama."""
    source = LlamaConfig(257, 3, 32, 4, 2, 8, 48, 64, **family)
    Llama(source).init_weights(0).save_pretrained(tmp_path / "source")
    args = [f"--data={tiny_data}", f"--init_from={tmp_path / 'source'}", "--target_n_head=2", "--target_d_model=25"]
    args += ["--steps=2", "--sparsity_warmup=1", "--dtype=bfloat16", f"--out={tmp_path / 'out'}"]
    assert run(monkeypatch, *args) == 0
    theirs = [transformers.AutoModelForCausalLM.from_pretrained(tmp_path / p) for p in ("source", "out/model")]
    assert type(theirs[0]) is type(theirs[1]) and theirs[1].config.hidden_size == 25
    ours, tokens = Llama.from_pretrained(tmp_path / "out" / "model"), torch.randint(257, (2, 40))
    with torch.no_grad():
        assert relative(ours(tokens), theirs[1](tokens).logits) < 1e-5


def test_text_of_another_tokenizer_is_refused(theirs, data, tiny_data, tmp_path, monkeypatch, capsys):
    args = ["--steps=2", f"--out={tmp_path / 'x'}", f"--init_from={theirs}"]
    assert run(monkeypatch, f"--data={tiny_data}", *args) == 2  # bytes: fewer ids than the model's, but others
    err = capsys.readouterr().err
    assert "its tokenizer is not the one" in err and f"--tokenizer {theirs}" in err and err.count("\n") == 1
    assert call(monkeypatch, eval_module.main, "eval.py", theirs, f"--data={tiny_data}") == 2
    assert "its tokenizer is not the one" in capsys.readouterr().err
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
    checkpoint = tmp_path / "y" / "checkpoints" / "step_000002"  # and so does each of its checkpoints
    assert call(monkeypatch, eval_module.main, "eval.py", checkpoint, f"--data={data}") == 2
    assert "its tokenizer is not the one" in capsys.readouterr().err


def test_what_counts_is_which_ids_occur(theirs, data):
    """A tokenizer may have tokens that the embedding lacks, such as an added <pad>, if the text has none of them."""
    config, opened = read_config(theirs), TokenData(data)
    vocabulary = opened.vocab_size
    files = {split: {"max_id": vocabulary - 2} for split in ("train", "val", "test")}
    opened.meta["files"] = {domain: dict(files) for domain in opened.domains}
    check_tokenizer(theirs, replace(config, vocab_size=vocabulary - 1), opened)
    opened.meta["files"]["sums"]["test"] = {"max_id": vocabulary - 1}
    with pytest.raises(ValueError, match=f"has {vocabulary - 1} tokens, .* needs {vocabulary}"):
        check_tokenizer(theirs, replace(config, vocab_size=vocabulary - 1), opened)
    opened.domains.remove("sums")
    check_tokenizer(theirs, replace(config, vocab_size=vocabulary - 1), opened)
    del opened.meta["files"]  # prepared before the ids were counted
    with pytest.raises(ValueError, match=f"needs {vocabulary}"):
        check_tokenizer(theirs, replace(config, vocab_size=vocabulary - 1), opened)


def test_a_sentencepiece_file_beside_the_weights_does_not_hinder(theirs, data, tmp_path, monkeypatch):
    """Text was prepared with the tokenizer.json that somebody made of it; the model gets both files."""
    source = tmp_path / "source"
    Llama.from_pretrained(theirs).save_pretrained(source)
    (source / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    args = [f"--data={data}", f"--init_from={source}", "--steps=1", f"--out={tmp_path / 'out'}"]
    assert run(monkeypatch, *args) == 0
    for name, origin in (("tokenizer.model", source), ("tokenizer.json", theirs), ("tokenizer_config.json", theirs)):
        assert (tmp_path / "out" / "model" / name).read_bytes() == (origin / name).read_bytes()
    with pytest.raises(ValueError, match="sentencepiece"):
        load_tokenizer(str(source))


def test_a_tokenizer_in_hugging_faces_cache(theirs, tmp_path):
    """There, files are links to blobs whose names have no suffix, and the name given decides."""
    snapshot = tmp_path / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    (tmp_path / "blobs").mkdir()
    for i, name in enumerate(("tokenizer.json", "tokenizer_config.json")):
        shutil.copy(theirs / name, tmp_path / "blobs" / f"{i}f00")
        (snapshot / name).symlink_to(Path("../../blobs") / f"{i}f00")
    (snapshot / "tokenizer_config.json").unlink()
    (snapshot / "tokenizer_config.json").write_text('{"eos_token": "the"}')
    for spec in (snapshot, snapshot / "tokenizer.json"):
        tokenizer = load_tokenizer(str(spec))
        assert tokenizer.name == str(spec) and tokenizer.decode([tokenizer.eot]) == "the"


@pytest.mark.parametrize("special", [True, False])
def test_what_looks_like_an_end_token_in_a_text_is_text(special, theirs, tmp_path):
    content = json.loads((theirs / "tokenizer.json").read_text())
    for token in content["added_tokens"]:
        token["special"] = special
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 400, "content": "<tool>", "special": False})
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text((theirs / "tokenizer_config.json").read_text())
    tokenizer, text = load_tokenizer(str(tmp_path)), "a cat </s> and a dog</s> <tool>"
    ids = tokenizer.encode(text).tolist()
    assert tokenizer.eot == 1 and 1 not in ids and tokenizer.decode(ids) == text
    assert ids[:-1] == load_tokenizer(str(theirs)).encode(text.removesuffix("<tool>")).tolist() and ids[-1] == 400


PICKLE = b"\x80\x02cbuiltins\nopen\n(Vexecuted\nVw\ntR."
TOKENIZERS = {  # what stands in which file -> what is said
    "cut": ("tokenizer.json", lambda c: json.dumps(c)[:5000], "tokenizer.json: not a tokenizer.json"),
    "empty": ("tokenizer.json", lambda c: "", "not a tokenizer.json"),
    "no object": ("tokenizer.json", lambda c: "[1]", "not a tokenizer.json"),
    "nesting": ("tokenizer.json", lambda c: "[" * 100_000, "not a tokenizer.json"),
    "no model": ("tokenizer.json", lambda c: json.dumps(c | {"model": None}), "not a tokenizer.json"),
    "panic": ("tokenizer.json", lambda c: json.dumps(c | {"post_processor": PANIC}), "fails on a simple text"),
    "no text left": ("tokenizer.json", lambda c: json.dumps(c | {"normalizer": NOTHING}), "leaves nothing of a simple"),
    "pointer": ("tokenizer.json", lambda c: POINTER, "git-LFS pointer"),
    "pickle": ("tokenizer.json", lambda c: PICKLE, "a pickle, which is never opened"),
    "pickle as ranks": ("tokenizer.model", lambda c: PICKLE, "a pickle, which is never opened"),
    "pointer as ranks": ("tokenizer.model", lambda c: POINTER, "git-LFS pointer"),
    "config that is a list": ("tokenizer_config.json", lambda c: "[]", "tokenizer_config.json: not a config that"),
    "config cut": ("tokenizer_config.json", lambda c: '{"eos_token": ', "tokenizer_config.json: not a config"),
    "eos of a wrong type": ("tokenizer_config.json", lambda c: '{"eos_token": 3}', "$.eos_token"),
    "eos that is nothing": ("tokenizer_config.json", lambda c: '{"eos_token_id": []}', "$.eos_token_id"),
    "eos beyond": ("tokenizer_config.json", lambda c: '{"eos_token_id": 4000}', "eos_token_id = 4000 is no token of"),
    "eos huge": ("tokenizer_config.json", lambda c: '{"eos_token_id": 1' + "0" * 400 + "}", "$.eos_token_id"),
}
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0"
NOTHING = {"type": "Replace", "pattern": {"Regex": r"[\s\S]"}, "content": ""}
PANIC = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {},
}


@pytest.mark.parametrize("mistake", TOKENIZERS)
def test_a_damaged_tokenizer_ends_in_one_line(mistake, theirs, tmp_path, capfd):
    name, change, words = TOKENIZERS[mistake]
    if name != "tokenizer.model":
        shutil.copy(theirs / "tokenizer.json", tmp_path)
    content = change(json.loads((theirs / "tokenizer.json").read_text()))
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as error:
        load_tokenizer(str(tmp_path))
    assert words in str(error.value) and str(tmp_path) in str(error.value)
    assert capfd.readouterr() == ("", "")  # a panic of the library writes a trace of its own


def test_a_tokenizer_that_was_moved_is_named_by_the_option_that_there_is(tiny_data, tmp_path, monkeypatch, capsys):
    data, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(tiny_data, data)
    meta = json.loads((data / "meta.json").read_text())
    (data / "meta.json").write_text(json.dumps(meta | {"tokenizer": "/moved/tokenizer.json"}))
    Llama(LlamaConfig(257, 1, 16, 2, 2, 8, 16, 32)).init_weights(0).save_pretrained(model)
    monkeypatch.setattr(sys, "argv", ["eval.py", str(model), f"--data={data}", "--sample=The"])
    with pytest.raises(SystemExit) as end:
        eval_module.main()
    err = capsys.readouterr().err
    assert end.value.code == 2 and f"--data {data}: its tokenizer /moved/tokenizer.json: no such file" in err
    assert err.count("\n") == 1 and "--tokenizer" not in err


def test_fingerprints_tell_tokenizers_apart(theirs):
    names = [fingerprint(load_tokenizer(spec)) for spec in ("byte", str(theirs), str(theirs / "tokenizer.json"))]
    assert names[0] != names[1] == names[2]
    assert names[0] == "0271dfb282076358"  # data sets and models that users have hold it


def load_whole(warm, path):
    """Print how much more memory a process takes at its most while it loads a model, as a share of the model."""
    Llama.from_pretrained(warm)  # what is loaded with the first tensor is not the model's
    before = resident_memory()
    model = Llama.from_pretrained(path)
    print((host_memory() - before) / (4 * model.config.n_params()))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
def test_memory_to_load_is_little_more_than_the_model(tmp_path):
    """In a fresh process: growth of the peak resident size over the size of the model in the run's dtype."""
    for name, shape in (("model", (2000, 10, 512, 8, 8, 64, 2048, 128)), ("warm", (64, 1, 32, 2, 2, 16, 64, 32))):
        Llama(LlamaConfig(*shape)).save_pretrained(tmp_path / name, dtype=torch.bfloat16)
    done = fresh(load_whole, tmp_path / "warm", tmp_path / "model")
    assert 0.9 < float(done.stdout) < 1.2, done.stderr
