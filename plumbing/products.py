"""Faster matrix products: the same results as `F.linear` to rounding, sooner on some CPUs.

For float32 on x86 CPUs, PyTorch multiplies by Intel's MKL, which uses AVX-512 on Intel's CPUs only. oneDNN, the other
library that PyTorch brings along, uses it on all. Where that helps depends on the CPU: AVX-512 on AMD's Zen 4 is no
faster than AVX2. So a CPU that has AVX-512 is measured once, when this file is imported, which takes 50 ms. `linear` is
oneDNN's where that is clearly faster, and F.linear elsewhere, as with AVX2 alone, on a GPU, and in bfloat16.

    python experiments/bench.py
"""

import time

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
        and ONEDNN
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
        """grad (..., O), the gradient of the output -> those of x (..., I) and of the weight (O, I)."""
        x, weight = ctx.saved_tensors
        x_flat, grad_flat = x.flatten(0, -2), grad.flatten(0, -2)
        return onednn_product(grad, weight.t()), onednn_product(grad_flat.t(), x_flat.t())


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """a (..., K), b (N, K) -> a bᵀ (..., N). The operator is a private one of torch."""
    return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")


def use_onednn() -> bool:
    """Whether this CPU has AVX-512, this torch the operator, with the arguments and the result that we expect, and a
    product with its gradients takes oneDNN less than CLEARLY of the time that it takes PyTorch, on one thread."""
    if "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    x, weight, grad = torch.ones(256, 256), torch.ones(688, 256), torch.ones(256, 688)
    inputs = x.clone().requires_grad_(), weight.clone().requires_grad_()

    def seconds(product) -> float:
        began = time.thread_time()  # of this thread: what else runs on the machine must not decide
        torch.autograd.grad(product(*inputs), inputs, grad)
        return time.thread_time() - began

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if not torch.equal(onednn_product(x, weight), x @ weight.t()):
            return False
        ours, theirs = map(min, zip(*((seconds(OneDNNLinear.apply), seconds(F.linear)) for _ in range(8))))
        return ours < CLEARLY * theirs
    except (AttributeError, TypeError, RuntimeError):
        return False
    finally:
        torch.set_num_threads(threads)


# far from 1, which Zen 4 has: all processes on a machine must choose alike, to give the same numbers
CLEARLY = 0.75
ONEDNN = use_onednn()
