"""What a run is made of: its directory, its data, the model it starts from, and the one it refers to.

All of it is opened and found to be right before anything is written.
"""

from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from model import LlamaConfig, read_config
from plumbing import checksums, cost, parallel
from plumbing.data import BatchReader, TokenData, open_data
from plumbing.log import say
from plumbing.models import check_tokenizer, data_position, digest, directory_of, export_dtype, model_directory
from plumbing.run import Run
from plumbing.settings import FREE, Settings


class Sources(NamedTuple):
    """What was found."""

    run: Run
    reader: BatchReader
    shape: LlamaConfig  # of the model that the run starts from
    start: Path | int | None  # where its weights are, or the seed that draws them; None: a checkpoint has all
    reference: Path | None  # the model whose losses are measured as references, if one is needed
    export_dtype: str  # what the finished model is written in
    from_the_beginning: str | None  # why the data are not read on from where the source's training stopped


def open_sources(s: Settings, device: torch.device) -> Sources | None:
    """Find what the settings name, or None where the run is finished already. ValueError for what is not right. Several
    processes must call it within `parallel.together`."""
    _, micro_batch = s.split_batch(parallel.size())
    run = Run(s.out, asdict(s), FREE, s.resume)
    gone = not (Path(s.data, "meta.json").is_file() and (not s.init_from or model_directory(s.init_from)))
    if not (run.finished and gone):  # a finished run does not need what it was made of
        data = open_data(s)
        run.check_content({"data": data.digest} | ({"init_from": digest(s.init_from)} if s.init_from else {}))
    if run.finished:
        say(f"{run.path / 'model'} is finished already")
        return None
    mine = {"rank": parallel.rank(), "processes": parallel.size(), "micro_batch": micro_batch}
    reader = BatchReader(data, s.seq_len, s.batch_size, s.seed, **mine, gate_samples=s.gate_samples, device=device)
    if s.init_from:
        shape, start = model_shape(s, s.init_from, data), directory_of(s.init_from)
    else:
        shape, start = s.shape_from_scratch(data.vocab_size, data.eot), s.seed
    dtype = export_dtype(s.export_dtype, start if s.init_from else None)  # now: the source may move before the run ends
    cut = s.cut_at == 0 or (run.state and run.state["kept"])
    cost.check_memory(s, (s.target_shape(shape) if cut else None) or shape, device)
    from_the_beginning = reference = None
    if run.state:
        reader.load_state_dict(run.state["reader"])
    elif s.init_from:
        checksums.check(start)
        position = data_position(s.init_from)
        from_the_beginning = reader.go_on_after(position) if position else None
    if s.reference_model and (run.state is None or run.new_references):  # else the checkpoint has its losses
        model_shape(s, s.reference_model, data)
        reference = directory_of(s.reference_model)
        checksums.check(reference)
    return Sources(run, reader, shape, None if run.state else start, reference, dtype, from_the_beginning)


def model_shape(s: Settings, name: str, data: TokenData) -> LlamaConfig:
    """Shape of the model that a model directory or a run holds. ValueError where it cannot read the data."""
    config = read_config(directory_of(name))
    check_tokenizer(name, config, data)
    if s.seq_len > config.max_seq_len:
        raise ValueError(f"seq_len = {s.seq_len}: {name} was made for {config.max_seq_len} tokens at most")
    return config
