"""Log-probabilities and entropies of target tokens from hidden states, without holding the logits matrix.

For N tokens and a vocabulary of V the logits are N * V numbers (16 Ki tokens of Qwen2.5: 10 GB in fp32, and
several times that in a backward pass), while the loss needs two numbers a token. So rows are taken a chunk
at a time, and the backward pass computes each chunk's logits a second time instead of keeping them.

What it is not: a fused kernel. `_chunk_forward` and `_chunk_backward` are plain stateless tensor functions.
The equations, with z = logits / temperature, p = softmax(z) and H the entropy of p:

    log p_t = z_t - logsumexp(z)             d log p_t / d z_j = 1[j = t] - p_j
    H = -sum_j p_j log p_j                   d H / d z_j       = -p_j (log p_j + H)
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# The most logits in one chunk: 512 MiB in fp32. Every chunk rereads `weight` and rewrites its gradient, so
# a chunk of few rows only waits for memory (with a vocabulary of 150 thousand this is 880 rows).
CHUNK_ELEMENTS = 2**27


def token_logprobs_naive(hidden: Tensor, weight: Tensor, targets: Tensor,
                         temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `token_logprobs` computes, by way of the whole (N, V) matrix."""
    logits = _wide(hidden @ weight.to(hidden.dtype).T) / temperature  # (N, V)
    logps = logits.log_softmax(-1)  # (N, V)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)  # (N,), (N,)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                   chunk: int | None = None, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and entropy in nats, under softmax(hidden @ weight.T / temperature).

    hidden (N, C), weight (V, C), targets (N,) of ids -> logprobs (N,), entropy (N,) or None if not
    `with_entropy`. Matrix products run in the dtype of `hidden` (`weight` is cast, its gradient comes back
    in its own dtype), all else in fp32, or fp64 for fp64 input. Both results have exact gradients for
    `hidden` and `weight`, of the first order and in reverse mode only; the naive twin has the others.
    `chunk` is the number of rows at a time: by default an eighth of all, or fewer to keep to
    CHUNK_ELEMENTS.
    """
    if chunk is None:
        chunk = max(1, min(-(-len(hidden) // 8), CHUNK_ELEMENTS // len(weight)))
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk, with_entropy)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, with_entropy):
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.temperature, ctx.chunk = temperature, chunk
        cast = weight.to(hidden.dtype)
        parts = [_chunk_forward(rows, cast, ids, temperature, with_entropy)
                 for rows, ids in zip(hidden.split(chunk), targets.split(chunk))]
        logprobs, normaliser = (torch.cat(column) for column in list(zip(*parts))[:2])  # (N,), (N,)
        entropy = torch.cat([part[2] for part in parts]) if with_entropy else None  # (N,)
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        if grad_logprobs is None:
            grad_logprobs = torch.zeros_like(normaliser)
        vectors = [normaliser, grad_logprobs] + ([entropy, grad_entropy] if grad_entropy is not None else [])
        cast = weight.to(hidden.dtype)
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None  # (N, C)
        # Chunks add up in fp32: in bf16 a late chunk's share would vanish below one ulp of the sum so far.
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None  # (V, C)
        for start in range(0, len(hidden), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            grad_logits = _chunk_backward(hidden[rows], cast, targets[rows], ctx.temperature,
                                          *(vector[rows] for vector in vectors))  # (R, V)
            if needs_hidden:
                grad_hidden[rows] = grad_logits @ cast
            if needs_weight:
                grad_weight += grad_logits.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None, None, None  # autograd casts to the dtype of each input


def _chunk_forward(hidden, weight, targets, temperature, with_entropy):
    """(R, C) rows -> log-probability, logsumexp of the logits and entropy (or None), each (R,)."""
    logits = _wide(hidden @ weight.T).div_(temperature)  # (R, V)
    normaliser = logits.logsumexp(-1)  # (R,)
    logprobs = logits.gather(1, targets[:, None]).squeeze(1) - normaliser  # (R,)
    if not with_entropy:
        return logprobs, normaliser, None
    logps = logits.sub_(normaliser[:, None])  # (R, V)
    return logprobs, normaliser, -(logps.exp().mul_(logps)).sum(-1)


def _chunk_backward(hidden, weight, targets, temperature, normaliser, grad_logprobs,
                    entropy=None, grad_entropy=None):
    """Gradient for the logits of one chunk before the temperature: (R, V) in the dtype of `hidden`."""
    logps = _wide(hidden @ weight.T).div_(temperature).sub_(normaliser[:, None])  # (R, V)
    probs = logps.exp()  # (R, V)
    slope = grad_logprobs[:, None]  # (R, 1), with entropy (R, V)
    if entropy is not None:
        slope = logps.add_(entropy[:, None]).mul_(grad_entropy[:, None]).add_(slope)
    grad_logits = probs.mul_(slope).neg_()  # (R, V)
    grad_logits.scatter_add_(1, targets[:, None], grad_logprobs[:, None])
    return grad_logits.div_(temperature).to(hidden.dtype)


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
