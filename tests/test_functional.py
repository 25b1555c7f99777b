"""Norm, rotation and MLP: their hand-written backward passes against autograd's own, some rows at a time."""

import pytest
import torch
import torch.nn.functional as F

from minibridge import functional
from minibridge.functional import rms_norm, rotate, swiglu


def plain_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def plain_rotation(x, cos, sin):
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def plain_mlp(x, gate, up, down):
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


# By hand, plain, and the names of what they take.
PAIRS = {"norm": (lambda x, weight: rms_norm(x, weight, 1e-2), lambda x, weight: plain_norm(x, weight, 1e-2), "x weight"),
         "rotation": (rotate, plain_rotation, "x cos sin"),
         "MLP": (swiglu, plain_mlp, "x gate up down")}


def inputs(names: str, dtype=torch.float64) -> list[torch.Tensor]:
    """Those with a gradient, of size 1, but for x, which is not contiguous."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (2, 3, 5, 8), "weight": (8,), "cos": (2, 5, 1, 8), "sin": (2, 5, 1, 8), "gate": (6, 8), "up": (6, 8),
              "down": (8, 6), "slope": (2, 3, 5, 8)}
    found = {name: torch.randn(shape, dtype=torch.float64, generator=generator) for name, shape in shapes.items()}
    found |= {name: found[name].transpose(1, 2) for name in ("x", "slope")}
    found["sin"][..., :4] = -found["sin"][..., 4:]
    return [found[name].to(dtype if name not in ("cos", "sin") else torch.promote_types(dtype, torch.float32))
            .requires_grad_(name not in ("cos", "sin", "slope")) for name in names.split()]


@pytest.fixture(autouse=True, params=[1, 2, 7, 10**5], ids="{} rows".format)
def rows(request, monkeypatch):
    """At a time, of 30."""
    monkeypatch.setattr(functional, "NORM_ELEMENTS", 8 * request.param)
    monkeypatch.setattr(functional, "MLP_ROWS", request.param)


@pytest.mark.parametrize("dtype, rounding", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
@pytest.mark.parametrize("name", PAIRS)
def test_values_and_gradients_equal_the_plain_formulas(name, dtype, rounding):
    """Norm and rotation are computed in fp32 and rounded once. The MLP rounds between its products as the plain one does: its
    errors are those of the plain one in this dtype, within a factor, and not more with many parts than with one."""
    by_hand, plain, names = PAIRS[name]
    given, (slope,) = inputs(names, dtype), inputs("slope", dtype)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in given]
    results = []
    for function, arrays, downhill in ((by_hand, given, slope), (plain, wide, slope.double())):
        out = function(*arrays)
        results.append([out, *torch.autograd.grad(out, [x for x in arrays if x.requires_grad], downhill)])
    assert results[0][0].is_contiguous() or name == "rotation"
    for found, expected in zip(*results, strict=True):
        assert found.dtype == dtype and found.shape == expected.shape
        size = expected.abs().max().item()
        close = {"norm": 1.05, "rotation": 1.05, "MLP": 2.5}[name] * rounding
        assert (found - expected).abs().max() < close * size


@pytest.mark.parametrize("name, kept", [("norm", "x weight"), ("rotation", "cos sin"), ("MLP", "x gate up down")])
def test_what_is_kept_for_the_backward_pass(name, kept):
    """Inputs, and of the MLP the two first products."""
    by_hand, _, names = PAIRS[name]
    given, found = dict(zip(names.split(), inputs(names))), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: found.append(x) or x, lambda x: x):
        by_hand(*given.values())
    addresses = {given[name].data_ptr() for name in kept.split()}
    assert addresses <= {x.data_ptr() for x in found}
    assert [x.shape for x in found if x.data_ptr() not in addresses] == [(2, 5, 3, 6)] * 2 * (name == "MLP")


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_without_gradients(name, dtype):
    """Or a model's log-probabilities would not be those of its own copy, the reference, at the first step."""
    by_hand, _, names = PAIRS[name]
    given = inputs(names, dtype)
    before = [x.detach().clone() for x in given]
    with torch.no_grad():
        found = by_hand(*given)
    assert torch.equal(by_hand(*given), found) and not found.requires_grad
    assert all(map(torch.equal, given, before))  # nothing was written into the inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_at_a_real_width(dtype, monkeypatch):
    """Where a product's shape, as it is handed to the library, decides which of its ways it goes."""
    monkeypatch.undo()
    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = ((0.05 * torch.randn(shape, generator=generator)).to(dtype).requires_grad_()
                         for shape in ((1, 2600, 896), (1216, 896), (1216, 896), (896, 1216)))
    with torch.no_grad():
        found = swiglu(x, gate, up, down)
    assert torch.equal(swiglu(x, gate, up, down), found)
