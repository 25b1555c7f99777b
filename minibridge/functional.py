"""What a decoder layer computes beside attention: products with weights, norm, rotation, MLP.

On a CPU autograd's backward passes for them are chains of whole-array operations, each bound by memory, and most keeping
their result. Where there may be a backward pass they are written by hand here: they keep their inputs, and of the MLP the
two first products; norm and MLP work on some rows at a time, so that less of an array's size is held. On a GPU, in
compiled decoding and in forward-mode differentiation (`jvp`) autograd's own operations run. On a CPU a model has the same
bits with and without a backward pass.

Axes: B rows, T tokens, D head size, C hidden, I middle of the MLP.
"""
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

NORM_ELEMENTS = 2**17  # numbers of an array at a time in a norm: 512 KiB in fp32
MLP_ROWS = 2**11  # tokens at a time in an MLP: enough for products to be fast, and few enough for what is between them


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean of x² + eps) * weight over the last axis, computed in fp32 at least (arXiv 1910.07467)."""
    if x.is_cpu and torch.is_grad_enabled():
        return _RMSNorm.apply(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, the middle of SwiGLU."""
    return F.silu(gate) * up if torch.is_grad_enabled() else F.silu(gate).mul_(up)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias of x (..., C), with weight (O, C) and bias (O,).

    Compiled decoding on a CPU has few rows of x for a large weight: there the product's transpose, with the weight on the
    left, takes a tenth to two thirds less time (fp32 and bf16, on an AMD EPYC)."""
    if not x.is_cpu or torch.is_grad_enabled() or not torch.compiler.is_compiling():
        return F.linear(x, weight, bias)
    out = (weight @ x.flatten(0, -2).mT).mT.unflatten(0, x.shape[:-1])
    return out if bias is None else out + bias


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """(silu(x gateᵀ) * x upᵀ) downᵀ of x (..., C), with gate and up (I, C) and down (C, I) (arXiv 2002.05202)."""
    if x.is_cpu and torch.is_grad_enabled():
        return _SwiGLU.apply(x, gate, up, down)
    if not x.is_cpu or torch.compiler.is_compiling():
        return linear(gated(linear(x, gate), linear(x, up)), down)
    parts = [F.linear(gated(F.linear(rows, gate), F.linear(rows, up)), down) for rows, in _parts(MLP_ROWS, x)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(x.shape)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x (B, T, heads, D); coordinates i and i + D/2 are a pair.

    cos and sin (B, T, 1, D), in fp32 at least: of each angle twice, the first half of sin with a minus."""
    if x.is_cpu and torch.is_grad_enabled():
        return _Rotation.apply(x, cos, sin)
    if x.is_cpu and not torch.compiler.is_compiling():
        return _turned(x, cos, sin, 1)  # as with a backward pass
    return (x * cos + x.roll(x.shape[-1] // 2, -1) * sin).to(x.dtype)


def rotary_frequencies(size: int, theta: float, scaling: dict | None = None) -> Tensor:
    """Radians per position of each pair of a head's coordinates, (D/2,) fp32 (arXiv 2104.09864, 3.2.2).

    With scaling, as Llama 3.1 has it: pairs that turn more than high_freq_factor times over the original context are kept,
    those that turn less than low_freq_factor times are slowed by `factor`, and those between interpolated
    (https://github.com/meta-llama/llama-models, models/llama3/model.py).
    """
    exponents = torch.arange(0, size, 2, dtype=torch.float32, device="cpu") / size
    frequencies = 1.0 / theta**exponents  # (D/2,)
    if not scaling:
        return frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / scaling["factor"]


class _RMSNorm(torch.autograd.Function):
    """With n = x / rms, g the gradient for the output and h = g weight: d weight = sum of g n, d x = (h - n mean(h n))
    / rms."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, out = eps, x.new_empty(x.shape)
        for rows, result in _parts(_norm_rows(x), x, out):
            rows = rows.to(_wide(x))
            result.copy_(rows * _inverse_rms(rows, eps) * weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grad_x, grad_weight = x.new_empty(x.shape), torch.zeros(weight.shape, dtype=_wide(x))
        for rows, slope, result in _parts(_norm_rows(x), x, grad, grad_x):
            rows, slope = rows.to(_wide(x)), slope.to(_wide(x))
            inverse = _inverse_rms(rows, ctx.eps)
            normed = rows * inverse
            grad_weight += (slope * normed).sum(0)
            slope = slope * weight
            result.copy_(slope.addcmul_(normed, (slope * normed).mean(-1, keepdim=True), value=-1).mul_(inverse))
        return grad_x, grad_weight.to(weight.dtype), None


class _Rotation(torch.autograd.Function):
    """Backward: the gradient, rotated by the opposite angle."""

    @staticmethod
    def forward(ctx, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return _turned(grad, *ctx.saved_tensors, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    half, out = x.shape[-1] // 2, x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:], value=sign)
    return out.to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """With g = x gateᵀ, u = x upᵀ, a = silu(g) and y the output's gradient times down: the gradient is y for a u, y a
    for u, and y u silu'(g) for g. Those of the weights are summed in fp32 at least."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, ups = (x.new_empty(*x.shape[:-1], len(gate)) for _ in range(2))
        out = x.new_empty(x.shape)
        for rows, g, u, result in _parts(MLP_ROWS, x, gates, ups, out):
            torch.mm(rows, gate.T, out=g)
            torch.mm(rows, up.T, out=u)
            torch.mm(F.silu(g).mul_(u), down.T, out=result)
        ctx.save_for_backward(x, gate, up, down, gates, ups)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, gate, up, down, gates, ups = ctx.saved_tensors
        grad_x = x.new_empty(x.shape)
        grad_gate, grad_up, grad_down = (torch.zeros_like(weight, dtype=_wide(x)) for weight in (gate, up, down))
        for rows, g, u, slope, result in _parts(MLP_ROWS, x, gates, ups, grad, grad_x):
            a = F.silu(g)
            grad_down += slope.T @ (a * u)
            y = slope @ down  # (R, I)
            for_u = a.mul_(y)
            for_g = torch.ops.aten.silu_backward(y.mul_(u), g)
            grad_up += for_u.T @ rows
            grad_gate += for_g.T @ rows
            torch.mm(for_g, gate, out=result).addmm_(for_u, up)
        return grad_x, grad_gate.to(x.dtype), grad_up.to(x.dtype), grad_down.to(x.dtype)


def _parts(count: int, *arrays: Tensor):
    """Arrays of one shape but for their last axes, `count` rows (R, ...) of each at a time. Those to be written must be
    contiguous (so not `empty_like`): of others these are copies."""
    return zip(*(x.reshape(-1, x.shape[-1]).split(count) for x in arrays))


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return rows.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (R, 1)


def _norm_rows(x: Tensor) -> int:
    return max(1, NORM_ELEMENTS // x.shape[-1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
