"""Hugging Face's format of a model: a directory with config.json (the shape) and model.safetensors (the weights).

`transformers` loads what is written here, and what it writes is read here. A model larger than `max_shard_bytes` is
written as several files, model-00001-of-00003.safetensors and so on. model.safetensors.index.json then says which of
them holds which weight. Names differ in two ways: KEYS below translates config.json's, and all weights but lm_head
begin with "model." in the file.

Nothing of a directory is executed: config.json may name Python files beside it (`auto_map`), and they are not opened.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plumbing import records
from plumbing.foreign import what_it_is

Config = TypeVar("Config")  # model.LlamaConfig, which imports this file
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"  # where both are there, the first is what counts
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}  # safetensors' names
KEYS = {  # config.json's key -> field of model.LlamaConfig
    "vocab_size": "vocab_size",
    "num_hidden_layers": "n_layer",
    "hidden_size": "d_model",
    "num_attention_heads": "n_head",
    "num_key_value_heads": "n_kv_head",
    "head_dim": "head_dim",
    "intermediate_size": "d_ffn",
    "max_position_embeddings": "max_seq_len",
    "rope_theta": "rope_theta",
    "rope_scaling": "rope_scaling",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
}
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class Family(NamedTuple):
    """A kind of model that is a Llama but for what LlamaConfig says."""

    architecture: str  # its class in transformers
    fields: dict[str, bool]  # the fields of LlamaConfig that make the difference
    defaults: dict[str, int]  # key -> what transformers takes where config.json does not have it


FAMILIES = {  # config.json's model_type -> family
    "llama": Family(
        "LlamaForCausalLM",
        {"qkv_bias": False, "qk_norm": False},
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "mistral": Family(
        "MistralForCausalLM",
        {"qkv_bias": False, "qk_norm": False},
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "bos_token_id": 1, "eos_token_id": 2}
        | {"sliding_window": 4096},
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"qkv_bias": True, "qk_norm": False},
        {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"qkv_bias": False, "qk_norm": True},
        {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
    ),
}
FIXED = {  # no other value can be represented
    "hidden_act": "silu",
    "attention_bias": False,  # it would be on o_proj, too; Qwen2's own biases have no key
    "mlp_bias": False,
    "use_sliding_window": False,
    "partial_rotary_factor": 1.0,
    "is_causal": True,
}
NOT_KEPT = {  # keys that are not written as they were: the export has its own, or none
    *("architectures", "dtype", "torch_dtype", "rope_parameters", "layer_types", "auto_map", "trust_remote_code"),
}


def read_config(path: Path, kind: Callable[..., Config]) -> Config:
    """The LlamaConfig (`kind`) that a directory's config.json stands for.

    ValueError where there is none, where a key is missing or of a wrong type, and where one says what LlamaConfig
    cannot represent.
    """
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"{path}: no model here (no config.json)")
    raw = records.read(file, dict[str, Any], "a model's config")  # with the keys that only `others` is for
    model_type = raw.setdefault("model_type", "llama")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(f"{file}: model_type = {model_type!r} is not supported, only {', '.join(FAMILIES)}")
    records.read(file, records.ModelConfig, "a model's config")
    family = FAMILIES[model_type]
    if "auto_map" in raw and raw.get("architectures", [family.architecture]) != [family.architecture]:
        raise ValueError(f"{file}: architectures = {raw['architectures']} is code of its own, and that is not executed")
    others = {key: value for key, value in raw.items() if key not in KEYS.keys() | NOT_KEPT}
    raw = {**family.defaults, **raw}
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}  # the old key goes first, as in transformers
    if original := raw.get("original_max_position_embeddings"):  # some write it beside rope_scaling
        rope = rope | {"original_max_position_embeddings": original}
    check_fixed(file, raw | rope, model_type)
    raw["rope_theta"] = rope.get("rope_theta") or raw.get("rope_theta")
    raw["rope_scaling"] = read_rope_scaling(file, rope)

    values = {field: raw[key] for key, field in KEYS.items() if raw.get(key) is not None}
    values.setdefault("norm_eps", 1e-6)  # transformers' default
    for name in values.keys() & {"norm_eps", "rope_theta"}:
        values[name] = float(values[name])  # JSON may have a whole number, and one that torch cannot take
    values.setdefault("n_kv_head", values["n_head"])
    values.setdefault("head_dim", values["d_model"] // values["n_head"])
    for name in ("bos_token_id", "eos_token_id"):
        ids = values.get(name, 0)
        if max(ids if isinstance(ids, list) else [ids]) >= values["vocab_size"]:
            raise ValueError(f"{file}: {name} = {ids} is beyond the vocabulary of {values['vocab_size']}")
    try:
        return kind(**values, **family.fields, others=others)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def check_fixed(file: Path, raw: dict, model_type: str) -> None:
    """ValueError for a key whose value LlamaConfig cannot represent."""
    for key, needed in FIXED.items():
        if raw.get(key, needed) not in (needed, None):
            raise ValueError(f"{file}: {key} = {raw[key]!r} is not supported, only {needed!r}")
    if raw.get("quantization_config") or raw.get("compression_config"):
        raise ValueError(f"{file}: quantization_config: quantised weights cannot be trained, take the model's own")
    other_layers = set(raw.get("layer_types") or ()) - {"full_attention"}
    if model_type.startswith("qwen") and other_layers:
        raise ValueError(f"{file}: layer_types = {sorted(other_layers)} are not supported, only 'full_attention'")
    window = raw.get("sliding_window") if model_type == "mistral" else None
    if window is not None and window < raw["max_position_embeddings"]:
        raise ValueError(
            f"{file}: sliding_window = {window} is not supported: it is shorter than max_position_embeddings = "
            f"{raw['max_position_embeddings']}"
        )


def read_rope_scaling(file: Path, rope: dict) -> dict | None:
    """Llama 3's scaling of the rotary embedding, or None for the plain one. ValueError for any other."""
    by_layer = [key for key, value in rope.items() if isinstance(value, dict)]
    if by_layer:
        raise ValueError(
            f"{file}: rope_parameters for {', '.join(by_layer)} are not supported, only one for all layers"
        )
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "llama3"):
        raise ValueError(f"{file}: rope_type = {kind!r} is not supported, only 'default' and 'llama3'")
    if kind == "default":
        return None
    missing = [key for key in LLAMA3_ROPE if rope.get(key) is None]
    if missing:
        raise ValueError(f"{file}: {', '.join(missing)} missing in rope_scaling")
    if rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(
            f"{file}: low_freq_factor = {rope['low_freq_factor']} must be below "
            f"high_freq_factor = {rope['high_freq_factor']}"
        )
    *numbers, length = LLAMA3_ROPE
    return {"rope_type": kind, **{key: float(rope[key]) for key in numbers}, length: rope[length]}


class Place(NamedTuple):
    """Where a weight is stored, and as what."""

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name

    def read(self, rows: slice = slice(None)) -> Tensor:
        """The weight as it is stored, or some rows of it."""
        # the file is mapped into memory; opened anew each time, pages that were copied do not stay there
        with safe_open(self.file, framework="pt") as tensors:
            return tensors.get_slice(self.key)[rows]


def stored(path: Path) -> Iterator[tuple[str, Place]]:
    """(name, place) of each tensor in the files of a directory. Only headers are read. ValueError for a damaged one."""
    for file in weight_files(path):
        if not file.is_file():
            raise ValueError(f"{file}: no such file; a model directory holds config.json and model.safetensors")
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    header = tensors.get_slice(key)
                    place = Place(file, key, tuple(header.get_shape()), header.get_dtype())
                    yield key.removeprefix("model."), place
        except SafetensorError as error:
            raise ValueError(f"{file}: not a whole safetensors file ({what_it_is(file) or error})") from None


def stored_dtype(path: Path) -> torch.dtype:
    """The dtype that most weights of a directory are stored in."""
    counts = Counter(place.dtype for _, place in stored(path) if place.dtype in DTYPES)
    return DTYPES[counts.most_common(1)[0][0]] if counts else torch.float32  # `open_weights` will refuse it


def open_weights(path: Path, shapes: dict[str, torch.Size], tied: bool) -> dict[str, Place]:
    """Where each weight of a directory is stored.

    shapes: name -> shape of each weight the model has. tied: lm_head is the embedding, and not among them. It may be
    stored as either, or as both if they are equal. ValueError unless the files hold exactly these weights.
    """
    places, wrong = {}, []
    for name, place in stored(path):
        if name.endswith("rotary_emb.inv_freq"):  # in older files; the frequencies follow from rope_theta
            continue
        if name in places:
            wrong.append(f"{name} is there twice")
        places[name] = place
    if tied and "lm_head.weight" in places:
        head = places.pop("lm_head.weight")
        embedding = places.setdefault("embed_tokens.weight", head)
        if not equal(head, embedding):
            wrong.append("lm_head.weight is not embed_tokens.weight, though config.json says tie_word_embeddings")
    wrong += [f"{name} is missing" for name in shapes.keys() - places.keys()]
    wrong += [f"{name} is not part of this model" for name in places.keys() - shapes.keys()]
    for name in shapes.keys() & places.keys():
        place, needed = places[name], tuple(shapes[name])
        if place.shape != needed:
            wrong.append(f"{name} has shape {place.shape}, config.json says {needed}")
        if place.dtype not in DTYPES:
            wrong.append(f"{name} is stored as {place.dtype}, only {', '.join(DTYPES)} are weights")
    if wrong:
        raise ValueError(f"{path}: {len(wrong)} tensors do not fit: {', '.join(sorted(wrong)[:4])}")
    return places


def equal(a: Place, b: Place) -> bool:
    """Whether two stored matrices are the same, read some rows at a time."""
    if a is b:
        return True
    if (a.shape, a.dtype) != (b.shape, b.dtype) or len(a.shape) != 2:
        return False
    pieces = (slice(row, row + 4096) for row in range(0, a.shape[0], 4096))
    return all(torch.equal(a.read(rows), b.read(rows)) for rows in pieces)


def weight_files(path: Path) -> list[Path]:
    """The files that hold a directory's weights: model.safetensors, or those that the index names."""
    index = path / INDEX
    if (path / SINGLE).exists() or not index.exists():
        return [path / SINGLE]
    names = set(records.read(index, records.WeightIndex, "an index of safetensors files")["weight_map"].values())
    for name in sorted(names):
        if Path(name).name != name:
            raise ValueError(f"{index}: {name!r} is not the name of a file beside it")
    return [path / name for name in sorted(names)]


def write(path: Path, fields: dict, weights: dict[str, Tensor], dtype: torch.dtype, max_shard_bytes: float) -> None:
    """Write config.json and the weights, in `dtype`.

    fields: name -> value of LlamaConfig's fields. weights: name -> tensor, a tied lm_head not among them. OSError where
    the disk does not take them, ValueError for a shape that no family has or a value that is too large for the dtype.
    """
    config = config_of(fields, dtype)
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
        for name, tensor in tensors.items():
            if tensor.isinf().any() and weights[name].isfinite().all():
                raise ValueError(
                    f"{path}: {name} has values that are too large for {str(dtype).removeprefix('torch.')}"
                )
        write_tensors(path / file, tensors, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    # what an older model left must not be read: its one file, or its index
    if len(shards) == 1:
        (path / INDEX).unlink(missing_ok=True)
    else:
        write_json(path / INDEX, {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})
        (path / SINGLE).unlink(missing_ok=True)
    write_json(path / "config.json", config)


def model_type_of(fields: dict) -> str:
    """The family of a LlamaConfig's fields, as config.json names it. ValueError for a model that no family has."""
    same = [name for name, family in FAMILIES.items() if all(fields[k] == v for k, v in family.fields.items())]
    if not same:
        raise ValueError("no family of models has biases on q, k and v, and norms of q and k, too")
    return fields["others"].get("model_type", same[0])


def config_of(fields: dict, dtype: torch.dtype) -> dict:
    """The content of config.json. ValueError for a model that no family has."""
    model_type = model_type_of(fields)
    own = {key: fields[field] for key, field in KEYS.items()}
    kept = {"model_type": model_type, "hidden_act": "silu"} | fields["others"]
    architecture = FAMILIES[model_type].architecture
    return {"architectures": [architecture], **kept, "torch_dtype": str(dtype).removeprefix("torch."), **own}


def write_tensors(file: Path, tensors: dict[str, Tensor], header: dict[str, str]) -> None:
    """Write a safetensors file, with the permissions of any other new file: the library would give 0600. OSError where
    the disk does not take it."""
    partial = file.with_name(file.name + ".partial")
    partial.unlink(missing_ok=True)
    partial.touch()
    mode = partial.stat().st_mode
    try:
        save_file(tensors, partial, metadata=header)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from None
    partial.chmod(mode)
    os.replace(partial, file)


def write_json(file: Path, content: dict) -> None:
    """Write a JSON file."""
    file.write_text(json.dumps(content, indent=2) + "\n")
