"""Norm and gate: their hand-written backward passes against autograd's own, some rows at a time."""

import pytest
import torch
import torch.nn.functional as F

from minibridge import pointwise
from minibridge.pointwise import gated, rms_norm


def plain_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator).mul(3).transpose(1, 2)  # not contiguous
    b = torch.randn(2, 5, 3, 8, dtype=torch.float64, generator=generator).mul(3)
    weight = 1 + torch.randn(8, dtype=torch.float64, generator=generator)
    slope = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=generator).transpose(1, 2)
    return [x.to(dtype).requires_grad_() for x in (a, b, weight)], slope.to(dtype)


@pytest.fixture(autouse=True, params=[8, 16, 56, 10**6], ids="part {}".format)
def part(request, monkeypatch):
    """1, 2, 7 (of 30) rows at a time, and all."""
    monkeypatch.setattr(pointwise, "PART_ELEMENTS", request.param)


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_values_and_gradients_equal_the_plain_formulas(dtype, rounding):
    """The norm is computed in fp32 and rounded once; the gate rounds twice or three times, as its plain formula does."""
    (a, b, weight), slope = inputs(dtype)
    wide = [x.detach().double().requires_grad_() for x in (a, b, weight)]
    pairs = [(rms_norm(a, weight, 1e-2), plain_norm(wide[0], wide[2], 1e-2), (a, weight), (wide[0], wide[2]), 1.05 * rounding),
             (gated(a, b), F.silu(wide[0]) * wide[1], (a, b), (wide[0], wide[1]), 4 * rounding)]
    for found, expected, by, by_wide, close in pairs:
        assert found.dtype == dtype and found.is_contiguous()
        torch.testing.assert_close(found.double(), expected, atol=1e-3 * close, rtol=close)
        for one, other in zip(torch.autograd.grad(found, by, slope), torch.autograd.grad(expected, by_wide, slope.double())):
            assert one.dtype == dtype
            torch.testing.assert_close(one.double(), other, atol=0.1 * close * other.abs().max().item(), rtol=close)


def test_what_is_kept_for_the_backward_pass_is_the_inputs_alone():
    (a, b, weight), _ = inputs()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        rms_norm(a, weight, 1e-2), gated(a, b)
    assert sorted(kept) == sorted(x.data_ptr() for x in (a, weight, a, b))


def test_without_gradients_the_plain_formulas_give_the_same():
    (a, b, weight), _ = inputs()
    expected = rms_norm(a, weight, 1e-2), gated(a, b)
    before = a.detach().clone()
    with torch.no_grad():
        found = rms_norm(a, weight, 1e-2), gated(a, b)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other.detach(), atol=1e-14, rtol=1e-12)
    assert torch.equal(a, before)  # nothing was written into the inputs
