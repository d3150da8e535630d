"""Faster matrix products: the same results as `F.linear` to rounding, sooner on some CPUs.

For float32 on x86 CPUs, PyTorch multiplies by Intel's MKL. On AMD's CPUs that is much slower than oneDNN, the other
library that PyTorch brings along. `linear` uses oneDNN there. On a GPU, or in bfloat16, it is F.linear.

    python experiments/bench.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ONEDNN_FOR_MKL = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., I), weight (O, I), bias (O,) -> x Wᵀ + b (..., O), which equals F.linear's to rounding.

    With oneDNN there are first derivatives only. `torch.backends.mkldnn.enabled = False` turns it off.
    """
    if (
        not torch.compiler.is_compiling()  # a compiled model must not read the rest, and cannot train with oneDNN
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() >= 32 * x.shape[-1]  # for fewer vectors, as in decoding, starting oneDNN takes too long
        and not torch.is_autocast_enabled("cpu")
        and ONEDNN_FOR_MKL
        and torch.backends.mkldnn.enabled
    ):
        y = OneDNNLinear.apply(x, weight)
        return y if bias is None else y + bias
    return F.linear(x, weight, bias)


class OneDNNLinear(torch.autograd.Function):
    """x (..., I), weight (O, I) -> x Wᵀ (..., O) and its gradients, in float32 on the CPU, all three by oneDNN."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_product(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        x_flat, grad_flat = x.flatten(0, -2), grad.flatten(0, -2)
        return onednn_product(grad, weight.t()), onednn_product(grad_flat.t(), x_flat.t())


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., K), b (N, K) -> a bᵀ (..., N)."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
