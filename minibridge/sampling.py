"""Logits to tokens, drawn from the full distribution or its nucleus: pure functions of a batch and its uniform numbers."""

import torch
import torch.nn.functional as F
from torch import Tensor


def sample(logits: Tensor, temperature: float, top_p: float, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens (B,) drawn from fp32 logits (B, V) as `generate.generate` says, and their log-probabilities (B,).

    uniform (B,): fp64 numbers in [0, 1), independent of all else; temperature 0 has no use for them."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    weights = (logits if temperature == 1 else logits / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        weights = nucleus(weights, top_p)
    tokens = inverse_transform(weights, uniform)[:, None]  # (B, 1)
    return tokens[:, 0], (weights.gather(-1, tokens) / weights.sum(-1, keepdim=True)).log()[:, 0]


def inverse_transform(weights: Tensor, uniform: Tensor, block: int = 64) -> Tensor:
    """Indices (B,) drawn as often as weights (B, V) say, by a uniform number a row (B,): first a block, then a token in it.

    The sums are fp64, so that rare tokens keep their chance; those over all tokens are few, so that they cost little.
    """
    blocks = F.pad(weights, (0, -weights.shape[-1] % block)).unflatten(-1, (-1, block))  # (B, V / block, block)
    edges = blocks.sum(-1).cumsum(-1, dtype=torch.float64)
    point = uniform[:, None] * edges[:, -1:]
    chosen = torch.searchsorted(edges, point, right=True).clamp(max=edges.shape[-1] - 1)  # past the end: NaN, as below
    before = torch.where(chosen > 0, edges.gather(-1, (chosen - 1).clamp(min=0)), 0.0)
    fraction = (point - before) / (edges.gather(-1, chosen) - before)  # in [0, 1): uniform again
    inside = blocks.gather(1, chosen[:, :, None].expand(-1, -1, block))[:, 0].cumsum(-1, dtype=torch.float64)  # (B, block)
    point = fraction * inside[:, -1:]  # below the last edge, so never a token of weight 0
    return (chosen * block + torch.searchsorted(inside, point, right=True))[:, 0].clamp(max=weights.shape[-1] - 1)


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V), set to 0 outside the fewest most likely tokens that hold top_p of the whole."""
    ordered, order = weights.sort(-1, descending=True)
    outside = ordered.cumsum(-1, dtype=torch.float64) - ordered >= top_p  # what comes before already holds top_p
    return weights.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)
