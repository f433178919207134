"""Products by oneDNN are those by MKL, gradients included, and take the way that is the faster one."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Qwen3VLForConditionalGeneration

from vsr1.models import loading

POLICY = "vsr1/mini/weights/policy"


@pytest.fixture(params=[True, False], ids=["onednn", "mkl"])
def by_onednn(request, monkeypatch):
    monkeypatch.setattr(loading, "mkl_lacks_avx512", lambda: request.param)
    return request.param


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def operators(work):
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    return {event.key for event in seen.key_averages()}


@pytest.mark.parametrize("shape", [(7, 40, 96), (500, 96), (3, 96), (96,)])
def test_a_product_equals_that_in_double_precision(by_onednn, shape):
    inputs, weight, bias = numbers(*shape), numbers(48, 96, seed=1), numbers(48, seed=2)
    for one_bias in (bias, None):
        expected = F.linear(inputs.double(), weight.double(), None if one_bias is None else bias.double())
        torch.testing.assert_close(
            loading.product(inputs, weight, one_bias).double(), expected, atol=1e-4, rtol=0
        )


def test_gradients_equal_those_in_double_precision(by_onednn):
    leaves = numbers(8, 50, 96), numbers(48, 96, seed=1), numbers(48, seed=2)
    gradients = {}
    for kind in (torch.float32, torch.float64):
        parts = [leaf.to(kind).clone().requires_grad_() for leaf in leaves]
        product = loading.product if kind == torch.float32 else F.linear
        (product(*parts) * numbers(8, 50, 48, seed=3).to(kind)).sum().backward()
        gradients[kind] = [part.grad.double() for part in parts]
    for found, expected in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("rows, faster", [(214, True), (213, False)])
def test_onednn_is_asked_for_where_pytorch_gives_it(monkeypatch, rows, faster):
    """One number fewer, and the convolution would be PyTorch's own, which is the slowest of the three."""
    monkeypatch.setattr(loading, "mkl_lacks_avx512", lambda: True)
    weight = numbers(48, 96).requires_grad_()
    used = operators(lambda: loading.product(numbers(rows, 96), weight).sum().backward())
    assert ("aten::mkldnn_convolution" in used, "aten::convolution_backward" in used) == (faster, faster)
    assert not any("slow_conv" in name for name in used)


def test_other_types_are_left_to_pytorch(monkeypatch):
    monkeypatch.setattr(loading, "mkl_lacks_avx512", lambda: True)
    inputs, weight = numbers(500, 96).bfloat16(), numbers(48, 96).bfloat16()
    assert torch.equal(loading.product(inputs, weight), F.linear(inputs, weight))


def test_a_model_keeps_its_names_and_its_results(by_onednn):
    plain, _ = loading.load(Qwen3VLForConditionalGeneration, POLICY)
    chosen = loading.choose_products(copy.deepcopy(plain))
    assert chosen.state_dict().keys() == plain.state_dict().keys()
    replaced = [module for module in chosen.modules() if type(module) in (nn.Linear, nn.Conv3d)]
    assert not replaced, "layers that are still PyTorch's own"
    patches, grid = numbers(8 * 16 * 4, 1536), torch.tensor([[8, 4, 4]] * 4)
    hidden = numbers(4, 60, plain.config.text_config.hidden_size, seed=1)
    for part, inputs in (("visual", (patches, grid)), ("language_model", (None, None, None, None, hidden))):
        with torch.no_grad():
            expected, found = (
                getattr(model.model, part)(*inputs).last_hidden_state for model in (plain, chosen)
            )
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=0)


def test_what_is_not_one_patch_is_refused():
    layer = nn.Conv3d(3, 8, kernel_size=2, stride=2)
    loading.choose_products(layer)
    with pytest.raises(AssertionError):
        layer(numbers(1, 3, 4, 4, 4))
