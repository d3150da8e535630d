"""Matrix products against float64, and when oneDNN makes them."""

import math
import time
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from plumbing import products
from plumbing.products import linear


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(32, 40), (3, 16, 40), (1, 33, 40), (2, 1, 40), (2, 0, 40)])
def test_products_and_their_gradients_are_float64_s(monkeypatch, onednn, biased, shape):
    monkeypatch.setattr(products, "ONEDNN", onednn)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, grad = (torch.randn(s, generator=generator) for s in (shape, (24, 40), (24,), (*shape[:-1], 24)))
    # rows gated, or laid out in another order: what weights and activations look like in the model
    for change in (lambda w: w, lambda w: w * torch.linspace(0, 1, 24)[:, None], lambda w: w.t().contiguous().t()):
        results = []
        for dtype in (torch.float32, torch.float64):
            tensors = (x, change(weight), bias)[: 2 + biased]
            inputs = [y.detach().to(dtype, copy=True).requires_grad_() for y in tensors]
            exactly = lambda x, weight, bias=0: (x[..., None, :] * weight).sum(-1) + bias  # noqa: E731
            product = (linear if dtype == torch.float32 else exactly)(*inputs)
            product.backward(grad.to(dtype))
            results.append((product, *(y.grad for y in inputs)))
        for ours, exact in zip(*results):
            assert ours.shape == exact.shape
            assert 0 in exact.shape or (ours.double() - exact).abs().max() <= 1e-6 * exact.abs().max()


def test_float32_products_are_onednn_s_where_it_is_chosen_and_can_be_turned_off(monkeypatch):
    x, weight = torch.randn(4, 8, 40), torch.randn(24, 40, requires_grad=True)
    monkeypatch.setattr(products, "ONEDNN", False)
    assert "OneDNN" not in linear(x, weight).grad_fn.name()
    monkeypatch.setattr(products, "ONEDNN", True)
    assert "OneDNN" in linear(x, weight).grad_fn.name()
    assert "OneDNN" not in linear(x[:1], weight).grad_fn.name()  # too few rows to be worth it
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert "OneDNN" not in linear(x, weight).grad_fn.name()


def test_onednn_is_chosen_by_what_the_cpu_can_do_and_what_torch_has(monkeypatch):
    """AVX-512 or better, where it is clearly faster, and an operator that is there, takes our arguments, and gives the
    product."""
    threads = torch.get_num_threads()
    for capability, chosen in (("DEFAULT", False), ("AVX2", False), ("AVX512", True), ("AVX512_VNNI", True)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda name=capability: name)
        for clearly in (0, math.inf):  # no product is fast enough, or each is
            monkeypatch.setattr(products, "CLEARLY", clearly)
            assert products.use_onednn() is (chosen and clearly > 0) and torch.get_num_threads() == threads

    def slow(product):
        def work_and_multiply(*tensors):
            until = time.thread_time() + 0.02
            while time.thread_time() < until:
                pass
            return product(*tensors)

        return work_and_multiply

    def interrupted(product):  # by other work on the machine
        return lambda *tensors: time.sleep(0.04) or product(*tensors)

    monkeypatch.setattr(products, "CLEARLY", 0.75)
    with monkeypatch.context() as patch:
        patch.setattr(products, "onednn_product", slow(products.onednn_product))
        assert products.use_onednn() is False
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", slow(F.linear))
        assert products.use_onednn() is True
        patch.setattr(products, "onednn_product", interrupted(products.onednn_product))
        assert products.use_onednn() is True
    monkeypatch.setattr(products, "CLEARLY", math.inf)
    operator = torch.ops.mkldnn._linear_pointwise
    for other in (
        SimpleNamespace(),  # it is gone
        SimpleNamespace(_linear_pointwise=lambda a, b, bias: operator(a, b, bias, "none", [], "")),  # other arguments
        SimpleNamespace(_linear_pointwise=lambda *arguments: operator(*arguments, "more")),  # torch's own refusal
        SimpleNamespace(_linear_pointwise=lambda a, *rest: operator(a, *rest) + 1),  # another result
    ):
        monkeypatch.setattr(torch.ops, "mkldnn", other)
        assert products.use_onednn() is False
