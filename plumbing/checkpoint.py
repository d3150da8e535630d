"""The tensors of a checkpoint on disk: weights, gates and multipliers, and AdamW's state. Nothing in it can run.

    weights-1-of-4.safetensors     what the first of four processes wrote of the parameters
    optimizer-1-of-4.safetensors   and of AdamW's state: NAME.exp_avg, NAME.exp_avg_sq, NAME.step
    checksums.json                 of all files of the checkpoint

Each process writes its share of the rows of each tensor, whether it holds only these (FSDP) or all. The header of a
file has the number of the first row of each tensor in it. Any number of processes reads the tensors again, each only
the rows that it holds.
"""

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from plumbing import checksums, parallel, records
from plumbing.huggingface import write_tensors
from plumbing.output import flush
from plumbing.parallel import local, my_rows

FIRST_ROWS = "first_rows"  # the key in a file's header: name -> number of the first row, as JSON
BACKGROUND = ThreadPoolExecutor(max_workers=1)  # where a checkpoint is written while the training goes on


def tensors_of(tree: nn.Module, optimizer: torch.optim.AdamW | None) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds: kind of file -> name -> tensor, whole or this process's shard of it."""
    content = {"weights": parallel.parameters_of(tree)}
    if optimizer is not None:
        content["optimizer"] = {
            f"{name}.{key}": x for name, p in content["weights"].items() for key, x in optimizer.state[p].items()
        }
    return content


def shape_of(x: Tensor) -> tuple[int, ...]:
    """Shape of a tensor as it is stored: a number is one row."""
    return tuple(x.shape) or (1,)


# -- writing --------------------------------------------------------------------------------------------------------


def save(
    tree: nn.Module, optimizer: torch.optim.AdamW, path: Path, group=None, in_background: bool = False
) -> Future | None:
    """Write the tensors of modules and optimizer into the directory `path`, and the checksums of all its files.

    group: the processes that write together, None for one alone. In the background, training goes on as soon as the
    tensors are copied; then a future is returned. OSError, here or from the future, where the disk is full or not
    writable; all processes raise it.
    """
    content = {}  # kind -> (name -> rows, name -> number of the first of them)
    for kind, tensors in tensors_of(tree, optimizer).items():
        mine, first = {}, {}
        for name, x in tensors.items():
            share = parallel.share(shape_of(x)[0])
            rows = local(x.detach()) if parallel.is_shard(x) else x.detach().reshape(shape_of(x))[share]
            if len(rows):
                mine[name], first[name] = rows.to("cpu", copy=in_background).contiguous(), share.start
        if mine:
            content[kind] = mine, first
    if in_background:
        return BACKGROUND.submit(write, content, path, group)
    write(content, path, group)


def write(content: dict, path: Path, group) -> None:
    """Write what `save` has collected."""
    written = {}
    with parallel.together(group):
        for kind, (tensors, first) in content.items():
            file = path / f"{kind}-{parallel.rank() + 1}-of-{parallel.size()}.safetensors"
            write_tensors(file, tensors, {FIRST_ROWS: json.dumps(first)})
            written[file.name] = checksums.of(file)
    everyones = parallel.gather(written, group)
    with parallel.together(group):
        if parallel.is_first():
            checksums.write(path, {name: checksum for one in everyones for name, checksum in one.items()})
            flush(path)


# -- reading --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(tree: nn.Module, path: Path, optimizer: torch.optim.AdamW | None = None) -> None:
    """Read what `save` wrote into modules and optimizer, in place; without an optimizer only weights are read.

    ValueError where a file is damaged, does not fit, has a value that is not finite, or is of an older version. Several
    processes must call it within `parallel.together`.
    """
    if (path / ".metadata").exists():
        raise ValueError(
            f"{path}: an older version of train.py wrote this with pickle, which can run any code when it is read: "
            "end the run with that version, or train again"
        )
    for parameter in tree.parameters() if optimizer is not None else ():
        if not parameter.requires_grad:
            continue  # the gates of a choice that is not learned
        moments = {key: torch.empty_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros((), device=local(parameter).device), **moments}
    for kind, tensors in tensors_of(tree, optimizer).items():
        checksums.check(path, f"{kind}-*")
        read = open_tensors(path, kind, {name: shape_of(x) for name, x in tensors.items()})
        for name, x in tensors.items():
            local(x).copy_(read(name, my_rows(x)).view_as(local(x)))
        parallel.check_finite(tensors, path)


def open_tensors(path: Path, kind: str, shapes: dict[str, tuple[int, ...]]) -> Callable[[str, slice], Tensor]:
    """Open the files of one kind: read(name, rows) gives rows of a tensor. Only headers are read here. ValueError
    unless the files hold all rows of the tensors with these shapes, each once, in float32, and no other tensors."""
    places = {name: [] for name in shapes}  # name -> (first row, number of rows, open file) of each part
    for file in sorted(path.glob(f"{kind}-*.safetensors")):
        try:
            tensors = safe_open(file, framework="pt")  # it stays open as long as `read`: for each tensor anew is slow
            text = (tensors.metadata() or {}).get(FIRST_ROWS, "")
            first = records.parse(text.encode(), records.FirstRows, f"{file}: {FIRST_ROWS} in its header")
            for name in tensors.keys():
                part = tensors.get_slice(name)
                shape, dtype = tuple(part.get_shape()), part.get_dtype()
                known = name in shapes and name in first
                if not known or dtype != "F32" or not shape or shape[1:] != shapes[name][1:]:
                    raise ValueError(f"{file}: {name}, {dtype} {shape}, does not belong to this run")
                places[name].append((first[name], shape[0], tensors))
        except SafetensorError as error:
            raise ValueError(f"{file}: damaged: {error}") from None
    for name, parts in places.items():
        parts.sort(key=lambda part: part[:2])
        end = 0
        for start, n, _ in parts:
            end = end + n if start == end else -1
        if end != shapes[name][0]:
            raise ValueError(f"{path}: {kind}-*.safetensors have not all {shapes[name][0]} rows of {name}, each once")

    def read(name: str, rows: slice) -> Tensor:
        low, high, _ = rows.indices(shapes[name][0])
        parts = [
            tensors.get_slice(name)[max(low - start, 0) : high - start]
            for start, n, tensors in places[name]
            if low < start + n and start < high
        ]
        return parts[0] if len(parts) == 1 else torch.cat([torch.empty(0, *shapes[name][1:]), *parts])

    return read
