"""Log-probabilities and entropies of target tokens from hidden states, without holding the logits matrix.

For N tokens and a vocabulary of V the logits are N * V numbers (16 Ki tokens of Qwen2.5: 10 GB in fp32, and
several times that in a backward pass), while the loss needs two numbers a token. Two forms hold a part at a time:

    token_logprobs   numbers out. Blocks of the vocabulary, whose sums add up; the backward pass computes each
                     block's logits a second time.
    fused_loss       the loss out. Chunks of tokens: a token's whole row gives its log-probability, the loss of
                     it and the gradient at once, so that nothing is computed twice.

What it is not: a hand-written kernel. `_statistics` and `_slope` are plain tensor functions, which torch.compile
turns into few passes over a block. With z = logits / temperature, p = softmax(z) and H the entropy of p:

    log p_t = z_t - logsumexp(z)             d log p_t / d z_j = 1[j = t] - p_j
    H = -sum_j p_j log p_j                   d H / d z_j       = -p_j (log p_j + H)
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_ELEMENTS = 2**27  # the most logits at a time: 512 MiB in fp32
WHOLE_ELEMENTS = 2**21  # so few are never split: small products would only be slower
COMPILE_ELEMENTS = 2**22  # a block below this is not worth the seconds that compiling takes

LossOf = Callable[[Tensor, Tensor | None, slice], tuple[Tensor, dict[str, Tensor]]]


def token_logprobs_naive(hidden: Tensor, weight: Tensor, targets: Tensor,
                         temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """What `token_logprobs` computes, by way of the whole (N, V) matrix."""
    logits = _logits(hidden, weight, temperature)  # (N, V)
    logps = logits.log_softmax(-1)  # (N, V)
    return logps.gather(1, targets[:, None]).squeeze(1), -(logps.exp() * logps).sum(-1)  # (N,), (N,)


def token_logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0,
                   chunk: int | None = None, with_entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability of each target, and entropy in nats, under softmax(hidden @ weight.T / temperature).

    hidden (N, C), weight (V, C), targets (N,) of ids -> logprobs (N,), entropy (N,) or None if not
    `with_entropy`. Matrix products run in the dtype of `hidden` (`weight` is cast, its gradient comes back
    in its own dtype), all else in fp32, or fp64 for fp64 input. Both results have exact gradients for
    `hidden` and `weight`, of the first order and in reverse mode only; the naive twin has the others.
    `chunk` is the number of vocabulary rows at a time, by default a sixteenth (`_part`).
    """
    return _TokenLogprobs.apply(hidden, weight, targets, temperature, chunk or _part(len(weight), 16, len(hidden)),
                                with_entropy)


def fused_loss(hidden: Tensor, weight: Tensor, targets: Tensor, loss_of: LossOf, temperature: float = 1.0,
               chunk: int | None = None, with_entropy: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
    """The sum of loss_of(logprobs, entropy, rows) over chunks of `token_logprobs`' tokens, and the sums of its metrics.

    loss_of gets the logprobs (R,) and the entropy (R,) or None of the tokens at `rows`, a slice, and returns the
    chunk's share of a scalar loss and of any scalar metrics. The gradient is taken in the same pass, by autograd
    through loss_of (which must depend on what it gets, and can train nothing else) and by the equations above from
    there on, so that `backward` of the loss, which may run once, only hands it on.
    `chunk` is the number of tokens at a time, by default an eighth (`_part`).
    """
    for_hidden, for_weight = (torch.is_grad_enabled() and x.requires_grad for x in (hidden, weight))
    hidden_, weight_, wide = hidden.detach(), weight.detach().to(hidden.dtype), _wide_dtype(hidden)
    grad_hidden = torch.empty_like(hidden_) if for_hidden else None  # (N, C)
    # Chunks add up in fp32: in bf16 a late chunk's share would vanish below one ulp of the sum so far.
    new = torch.empty_like if len(hidden) else torch.zeros_like  # the first chunk fills it, if there is one
    grad_weight = new(weight_, dtype=wide) if for_weight else None  # (V, C)
    total, sums = torch.zeros((), dtype=wide, device=hidden.device), {}
    for rows in _slices(len(hidden), chunk or chunk_tokens(len(hidden), len(weight))):
        with torch.no_grad():
            logits = _logits(hidden_[rows], weight_, temperature)  # (R, V)
            normaliser, entropy = _compiled(_statistics, logits)(logits, with_entropy)  # (R,) each
            logprobs = logits.gather(1, targets[rows, None])[:, 0] - normaliser
        leaves = [x.requires_grad_(for_hidden or for_weight) for x in (logprobs, entropy) if x is not None]
        loss, metrics = loss_of(logprobs, entropy, rows)
        if for_hidden or for_weight:
            slopes = torch.autograd.grad(loss, leaves, allow_unused=True)
            slope, entropy_slope = slopes if with_entropy else (*slopes, None)
            grad_logits = _grad_logits(logits, 0, targets[rows], temperature, normaliser, entropy, slope, entropy_slope,
                                       hidden.dtype)
            if for_hidden:
                torch.mm(grad_logits, weight_, out=grad_hidden[rows])
            if for_weight:
                _add_product(grad_weight, grad_logits.T, hidden_[rows], first=rows.start == 0)
            del grad_logits
        del logits  # not to stand beside the next chunk's
        total += loss.detach()
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + value.detach()
    if for_hidden or for_weight:
        total = _Handover.apply(total, hidden, weight, grad_hidden, grad_weight)
    return total, sums


def chunk_tokens(tokens: int, vocabulary: int) -> int:
    """How many of `tokens` have their logits in memory at a time in `fused_loss`."""
    return min(max(1, tokens), _part(tokens, 8, vocabulary))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, block, with_entropy):
        ctx.set_materialize_grads(False)  # an entropy that is only logged costs nothing in the backward pass
        ctx.temperature, ctx.block = temperature, block
        normaliser = entropy = None  # (N,) each, of the vocabulary so far
        target_logits = torch.zeros(len(hidden), dtype=_wide_dtype(hidden), device=hidden.device)
        for columns in _slices(len(weight), block):
            logits = _logits(hidden, weight[columns], temperature)  # (N, W)
            inside, place = _within(targets, columns.start, logits.shape[1])
            target_logits += torch.where(inside, logits.gather(1, place[:, None])[:, 0], 0.0)
            normaliser, entropy = _joined(normaliser, entropy, *_compiled(_statistics, logits)(logits, with_entropy))
            del logits  # not to stand beside the next block's
        ctx.save_for_backward(hidden, weight, targets, normaliser, entropy)
        return target_logits - normaliser, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy):
        hidden, weight, targets, normaliser, entropy = ctx.saved_tensors
        for_hidden, for_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden, dtype=_wide_dtype(hidden)) if for_hidden else None  # (N, C)
        grad_weight = torch.empty_like(weight) if for_weight else None  # (V, C)
        for columns in _slices(len(weight), ctx.block):
            part = weight[columns].to(hidden.dtype)
            logits = _logits(hidden, part, ctx.temperature)
            grad_logits = _grad_logits(logits, columns.start, targets, ctx.temperature, normaliser, entropy,
                                       grad_logprobs, grad_entropy, hidden.dtype)  # (N, W)
            if for_hidden:
                _add_product(grad_hidden, grad_logits, part)
            if for_weight:
                grad_weight[columns] = grad_logits.T @ hidden
            del logits, grad_logits
        return grad_hidden, grad_weight, None, None, None, None  # autograd casts to the dtype of each input


class _Handover(torch.autograd.Function):
    """A loss whose gradients are known already."""

    @staticmethod
    def forward(ctx, loss, hidden, weight, grad_hidden, grad_weight):
        ctx.save_for_backward(grad_hidden, grad_weight)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss):
        return None, *(None if grad is None else grad.mul_(grad_loss) for grad in ctx.saved_tensors), None, None


def _statistics(logits: Tensor, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
    """Logsumexp of each row of (R, W), and the entropy of its softmax (or None), each (R,)."""
    normaliser = logits.logsumexp(-1)  # (R,)
    if not with_entropy:
        return normaliser, None
    logps = logits - normaliser[:, None]  # (R, W)
    return normaliser, -(logps.exp() * logps).sum(-1)


def _joined(normaliser, entropy, added, added_entropy) -> tuple[Tensor, Tensor | None]:
    """The statistics of two blocks as one: a mixture of two distributions, of weights w = exp(normaliser - joint)."""
    if normaliser is None:
        return added, added_entropy
    joint = torch.logaddexp(normaliser, added)
    if entropy is None:
        return joint, None
    parts = ((normaliser, entropy), (added, added_entropy))
    return joint, sum((part - joint).exp() * (of_part + joint - part) for part, of_part in parts)


def _grad_logits(logits: Tensor, start: int, targets: Tensor, temperature: float, normaliser: Tensor, entropy,
                 grad_logprobs: Tensor | None, grad_entropy: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient for columns start, start + 1, ... of the logits before the temperature; uses up `logits`."""
    if grad_logprobs is None:
        grad_logprobs = torch.zeros_like(normaliser)
    grad_logprobs = grad_logprobs / temperature
    grad_entropy = None if grad_entropy is None else grad_entropy / temperature
    with torch.no_grad():
        _compiled(_slope, logits)(logits, normaliser, grad_logprobs, entropy, grad_entropy)
        inside, place = _within(targets, start, logits.shape[1])
        logits.scatter_add_(1, place[:, None], torch.where(inside, grad_logprobs, 0.0)[:, None])
        return logits.to(dtype)


def _slope(logits: Tensor, normaliser: Tensor, grad_logprobs: Tensor, entropy: Tensor | None, grad_entropy: Tensor | None):
    """Turns logits (R, W), in place, into the gradient for them, but for the targets' own share."""
    logps = logits.sub_(normaliser[:, None])
    slope = grad_logprobs[:, None]  # (R, 1), with entropy (R, W)
    if grad_entropy is not None:
        slope = grad_entropy[:, None] * (logps + entropy[:, None]) + slope
    logits.exp_().mul_(slope).neg_()


def _logits(hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
    """(R, W), after the temperature."""
    logits = (hidden @ weight.to(hidden.dtype).T).to(_wide_dtype(hidden))
    return logits if temperature == 1 else logits.div_(temperature)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool = False):
    """total (n, m) += a (n, k) @ b (k, m), or = if it is the first; a narrower product in parts, to be small."""
    if a.dtype == total.dtype:
        torch.addmm(total, a, b, beta=0 if first else 1, out=total)
    else:
        for sum_, part in zip(total.chunk(16), a.chunk(16)):
            sum_.copy_(part @ b) if first else sum_.add_(part @ b)


def _within(targets: Tensor, start: int, width: int) -> tuple[Tensor, Tensor]:
    """Which targets lie in columns start .. start + width - 1, and where there; 0 or the last for the others."""
    place = targets - start
    return (place >= 0) & (place < width), place.clamp(0, width - 1)


def _part(count: int, share: int, other: int) -> int:
    """How many of `count` to take at a time, of `other` logits each: one in `share`, but no more than BLOCK_ELEMENTS logits
    together, and never fewer than WHOLE_ELEMENTS."""
    return max(1, WHOLE_ELEMENTS // max(1, other), min(-(-count // share), BLOCK_ELEMENTS // max(1, other)))


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, count, size)]


def _compiled(function: Callable, logits: Tensor) -> Callable:
    """The function itself, or torch.compile's version of it when the block is large enough to pay for compiling."""
    return _compile(function) if logits.numel() >= COMPILE_ELEMENTS else function


@cache
def _compile(function: Callable) -> Callable:
    return torch.compile(function, dynamic=True)


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
