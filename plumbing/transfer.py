"""From the host's memory to the device's, so that neither waits for the other."""

import torch
from torch import Tensor


def send(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device: a copy for which nobody waits, or the tensor itself on the CPU."""
    if device.type == "cuda":
        x = x.pin_memory()  # from other memory, the copy would wait until the device has done all that it was given
    return x.to(device, non_blocking=True)
