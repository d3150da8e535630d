"""The tensors of a checkpoint on disk: weights, gates, multipliers and AdamW's moments, by torch.distributed.checkpoint

Each process writes what it holds, and any number of processes reads it again.
"""

from pathlib import Path

from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from plumbing import parallel


def save(tree: nn.Module, optimizer, path: Path, group=None, in_background: bool = False):
    """Write the tensors of modules and optimizer into the directory `path`.

    group: the processes that write together, None for one alone. In the background, training goes on as soon as the
    tensors are copied; then a future is returned. OSError where the disk is full or not writable.
    """
    weights, moments = get_state_dict(tree, optimizer)
    content = {"weights": weights, "optimizer": moments}
    how = {"checkpoint_id": path, "process_group": group, "no_dist": group is None}
    if in_background:
        return dcp.async_save(content, **how)
    try:
        dcp.save(content, **how)
    except CheckpointException as error:
        raise OSError(first_failure(error)) from None


def wait(saving) -> None:
    """Wait until what `save` does in the background is done. OSError as there."""
    try:
        saving.result()
    except CheckpointException as error:
        raise OSError(first_failure(error)) from None


def first_failure(error: CheckpointException) -> str:
    """What went wrong: the exception holds the errors of all processes, and is no subclass of Exception."""
    return str(next(iter(error.failures.values()))[0])


def load(tree: nn.Module, optimizer, path: Path) -> None:
    """Read what `save` wrote back into modules and optimizer. ValueError where the files are damaged."""
    weights, moments = get_state_dict(tree, optimizer)
    read_tensors({"weights": weights, "optimizer": moments}, path)
    set_state_dict(tree, optimizer, model_state_dict=weights, optim_state_dict=moments)


def read_tensors(content: dict, path: Path) -> None:
    """Read a checkpoint's tensors into those of `content`, in place. ValueError where the files are damaged."""
    try:
        dcp.load(content, checkpoint_id=path, no_dist=parallel.size() == 1)
    except CheckpointException as error:
        raise ValueError(f"{path}: damaged: {first_failure(error)}") from None
