"""Hugging Face's format of a Llama: a directory with config.json (the shape) and model.safetensors (the weights).

`transformers` loads what is written here, and what it writes is read here. A model larger than `max_shard_bytes` is
written as several files, model-00001-of-00003.safetensors and so on. model.safetensors.index.json then says which of
them holds which weight. Names differ in two ways: KEYS below translates config.json's, and all weights but lm_head
begin with "model." in the file.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # where both are there, the first is what counts
SHAPE_KEYS = {  # config.json's key -> field of model.LlamaConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "d_ffn",
    "max_position_embeddings": "max_seq_len",
}
KEYS = SHAPE_KEYS | {  # these may be missing
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
FIXED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}  # no other Llama here
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


def read_config(path: Path) -> dict:
    """The values of LlamaConfig's fields that a directory's config.json gives.

    ValueError where there is none, where a key is missing, and where one says what this Llama cannot represent.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no model here (no config.json)")
    try:
        raw = dict(json.loads(file.read_text()))
        rope = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}  # the old key and the new one
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: not a model's config ({error})") from None
    for key, needed in FIXED.items():
        if raw.get(key, needed) != needed:
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported, only {needed!r}")
    raw["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta"))
    raw["rope_scaling"] = read_rope_scaling(file, rope)
    values = {field: raw[key] for key, field in KEYS.items() if raw.get(key) is not None}
    # transformers' defaults
    values.setdefault("norm_eps", 1e-6)
    values.setdefault("n_kv_head", values.get("n_head"))
    if "head_dim" not in values and "n_head" in values and "d_model" in values:
        values["head_dim"] = values["d_model"] // values["n_head"]
    missing = [key for key, field in SHAPE_KEYS.items() if field not in values]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing")
    return values


def read_rope_scaling(file: Path, rope: dict) -> dict | None:
    """Llama 3's scaling of the rotary embedding, or None for the plain one. ValueError for any other."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: rope_type = {kind!r} is not supported, only 'default' and 'llama3'")
    if kind == "default":
        return None
    missing = [key for key in LLAMA3_ROPE if key not in rope]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing in rope_scaling")
    return {"rope_type": kind, **{key: rope[key] for key in LLAMA3_ROPE}}


def open_weights(path: Path, shapes: dict[str, torch.Size], tied: bool) -> Callable[..., Tensor]:
    """Open the weights of a directory: read(name, rows=slice(None)) gives one, or some rows of it, as it is stored.

    shapes: name -> shape of each weight the model has. tied: lm_head is the embedding, and not among them.
    Only headers are read here. ValueError unless the files hold exactly these weights.
    """
    places = {}  # name -> its file, its key in the file, its shape
    for file in weight_files(path):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model directory holds config.json and model.safetensors")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    places[key.removeprefix("model.")] = file, key, tuple(tensors.get_slice(key).get_shape())
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({error})") from None
    for name in list(places):
        frequencies = name.endswith("rotary_emb.inv_freq")  # in older files; they follow from rope_theta
        if frequencies or (tied and name == "lm_head.weight"):  # which some programs store a second time
            del places[name]
    wrong = [f"{name} is missing" for name in shapes.keys() - places.keys()]
    wrong += [f"{name} is not part of this Llama" for name in places.keys() - shapes.keys()]
    for name in shapes.keys() & places.keys():
        stored, needed = places[name][2], tuple(shapes[name])
        if stored != needed:
            wrong.append(f"{name} has shape {stored}, config.json says {needed}")
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit: {', '.join(sorted(wrong)[:4])}")

    def read(name: str, rows: slice = slice(None)) -> Tensor:
        file, key, _ = places[name]
        # the file is mapped into memory; opened anew each time, pages that were copied do not stay there
        with safe_open(file, framework="pt") as tensors:
            return tensors.get_slice(key)[rows]

    return read


def weight_files(path: Path) -> list[Path]:
    """The files that hold a directory's weights: model.safetensors, or those that the index names."""
    index = path / INDEX
    if (path / SINGLE).exists() or not index.exists():
        return [path / SINGLE]
    try:
        return sorted({path / name for name in json.loads(index.read_text())["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not an index of safetensors files ({error!r})") from None


def write(path: Path, fields: dict, weights: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: float) -> None:
    """Write config.json and the weights, in `dtype`.

    fields: name -> value of LlamaConfig's fields. weights: name -> tensor, a tied lm_head not among them. OSError where
    the disk does not take them.
    """
    path.mkdir(parents=True, exist_ok=True)
    weights = {name if name.startswith("lm_head.") else f"model.{name}": w for name, w in weights.items()}
    shards = [[]]  # names of the weights of each file
    shard_bytes = total_bytes = 0
    for name, weight in weights.items():
        n_bytes = weight.numel() * dtype.itemsize
        if shards[-1] and shard_bytes + n_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].append(name)
        shard_bytes += n_bytes
        total_bytes += n_bytes
    weight_map = {}  # name -> its file
    for i, names in enumerate(shards, 1):
        file = SINGLE if len(shards) == 1 else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: weights[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            save_file(tensors, path / f"{file}.partial", metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{path / file}: {error}") from None
        os.replace(path / f"{file}.partial", path / file)
        weight_map |= dict.fromkeys(names, file)
    # what an older model left must not be read: its one file, or its index
    if len(shards) == 1:
        (path / INDEX).unlink(missing_ok=True)
    else:
        write_json(path / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        (path / SINGLE).unlink(missing_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], **FIXED, "torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(path / "config.json", config | {key: fields[field] for key, field in KEYS.items()})


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n")
