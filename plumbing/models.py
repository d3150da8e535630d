"""What a path that is given as a model holds, and what stands beside the weights.

    a model directory       config.json and model.safetensors in Hugging Face's format
    a run                   its finished model/, or else its newest checkpoint
    a checkpoint            out/RUN/checkpoints/step_N; that of a pruning run is cut out at its target shape

Beside a model that train.py wrote stand pruning.json, which says what was kept; trained_with.json, which says which
tokenizer its text was prepared with and how far the data were read; and checksums.json (checksums.py).
"""

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

import torch
from torch import nn

from masks import PruningMasks, extract
from model import Llama, LlamaConfig
from plumbing import checkpoint, checksums, choices, records
from plumbing.data import BatchReader, TokenData
from plumbing.huggingface import stored_dtype
from plumbing.output import flush
from plumbing.parallel import check_finite
from plumbing.run import find_checkpoint, read_state, shapes_of
from plumbing.tokenizer import files_of_tokenizer, fingerprint, load_tokenizer, sentencepiece_only, tokenizer_file

PRUNING, TRAINED_WITH = "pruning.json", "trained_with.json"


def model_directory(path: str | Path) -> Path | None:
    """The directory in Hugging Face's format that `path` is, or that the finished run `path` holds; None otherwise."""
    path = Path(path)
    if (path / "model" / "config.json").is_file():
        return path / "model"
    if (path / "config.json").is_file() and not (path / "metrics.jsonl").exists():
        return path
    return None


def directory_of(model: str) -> Path:
    """The directory in Hugging Face's format of a model or a finished run. ValueError if there is none."""
    directory = model_directory(model)
    if directory is not None:
        return directory
    if not Path(model).is_dir():
        raise ValueError(f"{model}: no such model or run")
    if (Path(model) / "state.json").is_file():
        raise ValueError(
            f"{model}: this is a checkpoint, and a model directory or a finished run is needed: give the run's path "
            "when it is finished; --resume goes on from a checkpoint"
        )
    if (Path(model) / "metrics.jsonl").is_file():
        raise ValueError(f"{model}: this run is not finished, run it to its end first")
    raise ValueError(f"{model}: no model or run there: give a run's path, or that of a directory with a config.json")


def load_model(path: str | Path) -> Llama:
    """The model of a run, of one of its checkpoints, or of a model directory, in float32. ValueError if there is none,
    and where it is damaged."""
    path = Path(path)
    if (directory := model_directory(path)) is not None:
        checksums.check(directory)
        model = Llama.from_pretrained(directory)
        check_finite(dict(model.named_parameters()), directory)
        return model
    found = find_checkpoint(path)
    if found is None:
        what = "has no model and no checkpoint yet" if path.is_dir() else "no such model, run or checkpoint"
        raise ValueError(f"{path}: {what}")
    state = read_state(found)
    source, target = shapes_of(state)
    tree = nn.ModuleDict({"model": Llama(source)})
    if target is not None:
        tree["masks"] = PruningMasks(source, target, 0)
    checkpoint.load(tree, found)
    if found.parent.parent == path:
        print(f"note: {path} is not finished, so its newest checkpoint is read: {found.name}", file=sys.stderr)
    if state["settled"]:
        choices.settle_(tree["masks"])
    return tree["model"] if target is None else extract(tree["model"], tree["masks"])


def check_tokenizer(path: str | Path, config: LlamaConfig, data: TokenData) -> None:
    """ValueError unless the model can read the data: it has all ids that occur, and the tokenizer is its own. Whether
    that is so is not known of a directory without a tokenizer, or with a sentencepiece one alone."""
    if config.vocab_size <= largest_id(data):
        raise ValueError(
            f"{path}: its vocabulary has {config.vocab_size} tokens, {data.path} needs {largest_id(data) + 1} "
            f"({data.tokenizer}): prepare the text with the model's own tokenizer"
        )
    directory, own, its = model_directory(path), None, None
    if directory is not None:
        trained_with = read_trained_with(directory)
    else:
        found = find_checkpoint(Path(path))
        trained_with = read_state(found) if found else None
    if trained_with is not None:
        own, its = trained_with.get("tokenizer"), trained_with.get("fingerprint")
    elif directory is not None and tokenizer_file(directory) and not sentencepiece_only(directory):
        own, its = directory, fingerprint(load_tokenizer(str(directory)))
    if its not in (None, data.fingerprint):
        raise ValueError(
            f"{path}: its tokenizer is not the one {data.path} was prepared with ({data.tokenizer}): "
            f"prepare the text with --tokenizer {own}"
        )


def largest_id(data: TokenData) -> int:
    """The largest token id in the files of the data's domains, or of the whole tokenizer where none was counted."""
    files = data.meta.get("files", {})
    if not files.keys() >= set(data.domains):
        return data.vocab_size - 1
    return max(facts["max_id"] for domain in data.domains for facts in files[domain].values())


def read_trained_with(directory: Path) -> dict | None:
    """What stands in trained_with.json, or None if there is none. ValueError where that is not what train.py writes."""
    file = directory / TRAINED_WITH
    return records.read(file, records.TrainedWith, "what train.py writes") if file.is_file() else None


def data_position(model: str) -> dict | None:
    """How far the data were read when the model was trained: a BatchReader's state_dict, or None if it is not known."""
    found = read_trained_with(directory_of(model))
    return found.get("reader") if found else None


def digest(model: str) -> str:
    """What tells a model from others, wherever it is: of its config and of a sample of the bytes of its weights."""
    found, directory = hashlib.sha256(), directory_of(model)
    found.update((directory / "config.json").read_bytes())
    for file in sorted(directory.glob("*.safetensors")):
        with open(file, "rb") as weights:
            size = weights.seek(0, os.SEEK_END)
            found.update(str(size).encode())
            for start in range(0, size, max(1 << 16, size // 64)):
                weights.seek(start)
                found.update(weights.read(1 << 12))
    return found.hexdigest()[:16]


def export_dtype(setting: str, source: Path | None) -> str:
    """The dtype that a finished model is written in, by the setting of this name: that of the model directory that the
    run starts from (None: it starts from scratch, and float32 is what it trains in), or the one named."""
    if setting != "source":
        return setting
    return str(stored_dtype(source)).removeprefix("torch.") if source else "float32"


def save_model(
    path: Path, model: Llama, kept: dict | None, source: str, reader: BatchReader, dtype: torch.dtype
) -> None:
    """Write a model directory, in `dtype`, with pruning.json (which indices were kept), trained_with.json (which
    tokenizer, and which sequences of which data), tokenizer files, and the checksums of all of them. The tokenizer is
    that of `source`, the model that the run started from, or, where this has none that can be read, that of the data.
    ValueError where the source is damaged, or where a value is too large for the dtype."""
    data = reader.data
    shutil.rmtree(path, ignore_errors=True)
    model.save_pretrained(path, dtype)
    trained_with = {"tokenizer": data.tokenizer, "fingerprint": data.fingerprint, "reader": reader.state_dict()}
    (path / TRAINED_WITH).write_text(json.dumps(trained_with))
    if kept is not None:
        (path / PRUNING).write_text(json.dumps(kept))
    origin = model_directory(source) if source else None
    files = files_of_tokenizer(str(origin.absolute())) if origin else {}
    if "tokenizer.json" not in files:
        files = files_of_tokenizer(data.tokenizer) | files
    if Path(data.tokenizer).is_absolute() and not {"tokenizer.json", "tokenizer.model"} & files.keys():
        print(f"note: the model has no tokenizer files: {data.tokenizer} is not there any more")
    for name, file in files.items():
        shutil.copyfile(file, path / name)
    checksums.write(path)
    flush(path)
