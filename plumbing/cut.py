"""From the gated model to the small one, within a run: what goes is cut out of the weights and of AdamW's moments.

Once all gates are 0 or 1, extraction only selects rows and columns. What is pruned gets no gradient, and AdamW treats
each number on its own. So, in exact arithmetic, the small model with the selected moments gets the same updates as the
gated model would get.
"""

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

from masks import PruningMasks, extract
from model import Llama, open_weights
from plumbing import parallel

WEIGHTS, MOMENTS = "weights", ("exp_avg", "exp_avg_sq")


def write(path: Path, tree: nn.ModuleDict, optimizer: torch.optim.Optimizer, masks: PruningMasks) -> None:
    """Write what the small model takes over, as a model directory each: its weights and, after the first step, the two
    moments. All processes must call it; the first one writes. `masks`: whose choice is fixed, on the CPU."""
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    if parallel.is_first():
        shutil.rmtree(path, ignore_errors=True)

    def write_one(what: str, tensors: dict) -> None:  # one at a time: each is as large as the source
        with parallel.together():
            if parallel.is_first():
                own = {name.removeprefix("model."): x for name, x in tensors.items() if name.startswith("model.")}
                extract(Llama.of_weights(masks.source, own), masks).save_pretrained(path / what)

    write_one(WEIGHTS, get_model_state_dict(tree, options=whole))
    if optimizer.state:
        moments = get_optimizer_state_dict(tree, optimizer, options=whole).get("state", {})  # of the first process
        for moment in MOMENTS:
            write_one(moment, {name: state[moment] for name, state in moments.items() if moment in state})


@torch.no_grad()
def read_moments(path: Path, model: Llama, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Give AdamW the moments that `write` has written for this model, after `step` steps."""
    if step == 0:
        return
    places = {moment: open_weights(path / moment, model.config) for moment in MOMENTS}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter] = {"step": torch.tensor(float(step), device=parameter.device)}
        for moment in MOMENTS:
            state[moment] = torch.empty_like(parameter)
            parallel.local(state[moment]).copy_(places[moment][name].read(parallel.my_rows(parameter)))
