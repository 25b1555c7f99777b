"""The optimizer, its learning rate and its step; what a step's work is in floating-point operations."""
import math

import torch

from minibridge.config import InputError
from minibridge.model import Decoder
from minibridge.sharding import whole


class NonFinite(InputError):
    """A loss or a gradient with a NaN or an infinity in it."""


def training_flops(model: Decoder, tokens: int, scored: int, pairs: float, passes: float = 3) -> float:
    """Floating-point operations of `passes` forward passes' worth of work: a backward pass is two. In a forward pass each
    parameter takes part in two for every token, but those of the head only for the tokens `scored`, and each pair of a
    token and one that it attends to in 4 D of each head of each layer."""
    c, head = model.config, model.lm_head_weight.numel()
    embedding = head if c.tie_word_embeddings else 2 * head  # looked up, and the head
    body = sum(parameter.numel() for parameter in model.parameters()) - embedding
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    return passes * (2 * body * tokens + 2 * head * scored + attention)


def adamw(model: Decoder, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters (arXiv 1711.05101); `update` sets its learning rate at every step."""
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "constant") -> float:
    """Learning rate of step 0 .. steps - 1. The first step is never 0, so none is wasted."""
    # 1) linear warm-up over `warmup` steps
    if step < warmup:
        return peak * (step + 1) / warmup
    # 2) constant after it
    if schedule == "constant":
        return peak
    # 3) or a half cosine, down to a tenth of the peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def update(model: Decoder, optimizer: torch.optim.Optimizer, rate: float, clip: float) -> float:
    """Clip the accumulated gradient to the norm `clip`, take one step at `rate`, drop the gradient.

    Returns the norm before clipping. One that is not finite raises NonFinite and changes nothing: the model stays as it
    was, and the checkpoints written so far stay good.
    """
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)).item()
    if not math.isfinite(norm):
        raise NonFinite(f"the gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
