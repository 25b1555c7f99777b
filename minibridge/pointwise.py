"""What a decoder layer does between its matrix products: norm, rotation, gate.

On a CPU the backward passes that autograd puts together for norm and gate are chains of steps over whole arrays, of which
each keeps its result. Where there may be a backward pass they are written by hand here: of a layer they keep the inputs
alone, and they work on some rows at a time, so that nothing else of an array's size is held. On a GPU, in decoding and in
forward-mode differentiation (`jvp`) the plain formulas run.

Axes: B rows, T tokens, D head size.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

PART_ELEMENTS = 2**17  # numbers of an array at a time: 512 KiB in fp32


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x² + eps) * weight over the last axis, computed in fp32 at least (arXiv 1910.07467)."""
    if x.is_cpu and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of SwiGLU (arXiv 2002.05202)."""
    if torch.is_grad_enabled():
        return _Gated.apply(gate, up) if gate.is_cpu else F.silu(gate) * up
    return F.silu(gate).mul_(up)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, heads, D); coordinates i and i + D/2 are a pair, sin has their signs."""
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def rotary_frequencies(size: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of each pair of a head's coordinates, (D/2,) fp32 (arXiv 2104.09864, 3.2.2).

    With scaling, as Llama 3.1 has it: pairs that turn more than high_freq_factor times over the original context are kept,
    those that turn less than low_freq_factor times are slowed by `factor`, and those between interpolated
    (https://github.com/meta-llama/llama-models, models/llama3/model.py).
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / theta**exponents  # (D/2,)
    if scaling is None:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms, g the gradient for the output and h = g weight: d weight = sum of g n, d x = (h - n mean(h n)) / rms."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, out = eps, torch.empty(x.shape, dtype=x.dtype)
        for rows, result in _parts(x, out):
            rows = rows.to(_wide(x))
            result.copy_(rows * _inverse_rms(rows, eps) * weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = torch.empty(x.shape, dtype=x.dtype), torch.zeros(weight.shape, dtype=_wide(x))
        for rows, slope, result in _parts(x, grad, grad_x):
            rows, slope = rows.to(_wide(x)), slope.to(_wide(x))
            inverse = _inverse_rms(rows, ctx.eps)
            normed = rows * inverse
            grad_weight += (slope * normed).sum(0)
            slope = slope * weight
            result.copy_(slope.addcmul_(normed, (slope * normed).mean(-1, keepdim=True), value=-1).mul_(inverse))
        return grad_x, grad_weight.to(weight.dtype), None


class _Gated(torch.autograd.Function):
    """d up = g silu(gate), d gate = g up silu'(gate)."""

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out = torch.empty(gate.shape, dtype=gate.dtype)
        for gates, ups, result in _parts(gate, up, out):
            torch.mul(F.silu(gates), ups, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gate, up = ctx.saved_tensors
        grad_gate, grad_up = (torch.empty(x.shape, dtype=x.dtype) for x in (gate, up))
        for slope, gates, ups, for_gate, for_up in _parts(grad, gate, up, grad_gate, grad_up):
            torch.mul(slope, F.silu(gates), out=for_up)
            for_gate.copy_(torch.ops.aten.silu_backward(slope * ups, gates))
        return grad_gate, grad_up


def _parts(*arrays: Tensor):
    """Arrays of one shape (..., C), some rows (R, C) of each at a time. Those to be written must be contiguous (so not
    `empty_like`): of others these are copies."""
    size = arrays[0].shape[-1]
    return zip(*(x.reshape(-1, size).split(max(1, PART_ELEMENTS // size)) for x in arrays))


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (R, 1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
