"""GRPO (DeepSeekMath, arXiv:2402.03300) as pure functions: rewards -> advantages, log-probabilities -> loss.

What it is not: it never sees a model, a text or a group of processes, and it keeps no state. The loss of
one rollout i with tokens t, advantage A, ratio = exp(logp - old_logp), d = ref_logp - logp and policy
entropy H:

    l_i = mean_t max(-A ratio_t, -A clip(ratio_t, 1 - low, 1 + high)) - c_H mean_t H_t + c_KL mean_t k3_t
    k3_t = min(exp(d_t) - d_t - 1, 10)          (never negative: http://joschu.net/blog/kl-approx.html)

and the loss of an optimizer step is the mean of l_i over its rollouts. Two traps are dealt with here:

1. A normaliser counted per micro-batch makes the gradient depend on how rollouts were packed. `normalizer`
   is counted over the whole optimizer step by the caller, so losses, gradients and metrics simply add up.
2. exp() of a garbage difference is inf, and inf * 0 is NaN, in the gradient too. Padding leaves through
   `where` before any exp(), and what enters exp() is clamped.
"""

import torch
from torch import Tensor

from minibridge.config import InputError

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond any clip range, far from overflow
MAX_K3 = 10.0  # the authors' cap on k3 per token, reached at d = 2.6; beyond it the gradient is zero


def group_advantages(rewards: Tensor, ddof: int = 1, eps: float = 1e-6, scale: bool = True) -> Tensor:
    """Advantage of each sample within its prompt's group: rewards (N, G) -> (N, G), (r - mean) / (std + eps).

    `ddof` 1 divides the variance by G - 1 (the paper), 0 by G; `scale=False` leaves out the division by the
    std (Dr. GRPO, arXiv:2503.20783). A group whose rewards are all equal gets exactly zero: its std is
    rounding noise, not a scale. A group of one has no baseline and raises InputError.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]), eps=0.0)
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.shape[1] < 2:
        raise InputError("GRPO compares the samples of a prompt: it needs at least 2 samples per prompt")
    advantages = rewards - rewards.mean(1, keepdim=True)  # (N, G)
    if scale:
        advantages = advantages / (rewards.std(1, correction=ddof, keepdim=True) + eps)
    dead = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (N, 1)
    return advantages.masked_fill(dead, 0.0)


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, mask: Tensor, *,
    clip: tuple[float, float] = (0.2, 0.2), kl_coef: float = 0.0, kl_threshold: float | None = None,
    entropy: Tensor | None = None, entropy_coef: float = 0.0, aggregate: str = "sequence", normalizer: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the loss of an optimizer step, and of its metrics.

    logps, old_logps, ref_logps, entropy, mask (B, T), advantages (B,). Only `logps` and `entropy` carry
    gradients. The mask is true on the tokens to train: the sampled ones, the stop token included.
    `ref_logps` may be None if neither `kl_coef` nor `kl_threshold` asks for it, `entropy` if `entropy_coef`
    is 0. `clip` is (low, high).

    aggregate   a token's weight              normalizer: of the whole step   used by
    "sequence"  1 / (own length * normalizer) rollouts                        GRPO, and the paper
    "token"     1 / normalizer                tokens (or any constant)        DAPO (Dr. GRPO)

    `kl_threshold`: a rollout whose mean k3 reaches it has its whole l_i multiplied by 0, and still counts
    in the normalizer (the paper's Llama runs). A row without tokens adds nothing.

    Every metric is, like the loss, a sum already divided by `normalizer`: adding up those of the
    micro-batches gives the step's figure. Means are weighted as the loss is, so "clip_fraction" under
    "sequence" is the mean over rollouts of their fraction of clipped tokens. All are detached and stay on
    the device.

        loss           the loss                    policy_loss    its first term alone
        clip_fraction  tokens whose gradient the clip has set to zero
        log_ratio      mean |logp - old_logp|
        kept           weight left by kl_threshold (1 if it is off and no row is empty)
        kl             mean k3, dropped rollouts included (if ref_logps)
        entropy        mean entropy, dropped rollouts included (if entropy)

    Two rollouts, of two tokens and one, with ratios (1.5, 1.0) and (0.5): -A ratio is (-1.5, -1) and (0.5),
    the clip turns it into (-1.2, -1) and (0.8), whose means are -1.1 and 0.8.

    >>> logps = torch.tensor([[1.5, 1.0], [0.5, 99.0]]).log()
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> step = logps, torch.zeros(2, 2), None, torch.tensor([1.0, -1.0]), mask
    >>> loss, metrics = grpo_loss(*step, normalizer=2)                         # (-1.1 + 0.8) / 2
    >>> f"{loss:.4f} {metrics['clip_fraction']:.4f}"                           # (1/2 + 1) / 2
    '-0.1500 0.7500'
    >>> f"{grpo_loss(*step, aggregate='token', normalizer=3)[0]:.4f}"          # (-1.2 - 1 + 0.8) / 3
    '-0.4667'
    """
    weights = token_weights(mask.to(logps.dtype), aggregate, normalizer)  # (B, T)
    logps, old_logps, ref_logps, entropy = (
        None if x is None else torch.where(mask.bool(), x, 0.0) for x in (logps, old_logps, ref_logps, entropy))
    kept = None
    if kl_threshold is not None:
        if ref_logps is None:
            raise ValueError("kl_threshold needs ref_logps")
        k3 = kl_k3(ref_logps - logps.detach()).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        kept = (k3 < kl_threshold).to(k3.dtype)  # (B, 1)
    return token_loss(logps, old_logps, ref_logps, advantages[:, None], weights, kept, clip=clip, kl_coef=kl_coef,
                      entropy=entropy, entropy_coef=entropy_coef)


def token_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, weights: Tensor,
    kept: Tensor | None = None, *, clip: tuple[float, float] = (0.2, 0.2), kl_coef: float = 0.0,
    entropy: Tensor | None = None, entropy_coef: float = 0.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `grpo_loss` computes, of tokens of any shape that each bring their weight: any part of an optimizer step.

    All of one shape, or broadcast to it; `kept` is 1 or 0, and 0 takes a token's terms out of the loss.
    """
    log_ratio = (logps - old_logps).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    policy, clipped = clipped_surrogate(log_ratio.exp(), advantages, clip)
    terms, means = policy, {"clip_fraction": clipped, "log_ratio": log_ratio.abs()}
    if ref_logps is not None:
        means["kl"] = k3 = kl_k3(ref_logps - logps)
        terms = terms + kl_coef * k3
    elif kl_coef:
        raise ValueError("kl_coef needs ref_logps")
    if entropy is not None:
        means["entropy"] = entropy if entropy_coef else entropy.detach()  # no backward pass for what is only logged
        terms = terms - entropy_coef * means["entropy"]
    elif entropy_coef:
        raise ValueError("entropy_coef needs entropy")
    kept_weights = weights if kept is None else weights * kept
    loss = (terms * kept_weights).sum()
    metrics = {"loss": loss, "policy_loss": (policy * kept_weights).sum(), "kept": kept_weights.sum()}
    metrics |= {name: (values * weights).sum() for name, values in means.items()}
    return loss, {name: value.detach() for name, value in metrics.items()}


def token_weights(mask: Tensor, aggregate: str, normalizer: float) -> Tensor:
    """Weight of each token in the loss of the whole optimizer step: mask (B, T) of 0.0 and 1.0 -> (B, T)."""
    if aggregate == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * normalizer)
    if aggregate == "token":
        return mask / normalizer
    raise ValueError(f'aggregate must be "sequence" or "token", not {aggregate!r}')


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound, to be minimised, and where the clip decides: ratio (B, T), advantages (B, 1).

    The clip decides, and stops the gradient, for A > 0 above 1 + high and for A < 0 below 1 - low: the step
    is already taken. On the other sides a step in the wrong direction is still corrected.
    """
    plain = -advantages * ratio  # (B, T)
    bounded = -advantages * ratio.clamp(1 - clip[0], 1 + clip[1])  # (B, T)
    return torch.maximum(plain, bounded), bounded > plain


def kl_k3(gap: Tensor) -> Tensor:
    """k3 estimate of KL(policy | reference) per token, from gap = ref_logp - logp, of any shape.

    The gradient for logp is 1 - exp(gap), zero where the two agree; beyond the cap MAX_K3 it is zero too.
    """
    gap = gap.clamp(max=MAX_K3)  # only exp of a large gap overflows
    # expm1 because exp(gap) - 1 has lost all digits of the result, gap^2 / 2, when the gap is small.
    return (torch.expm1(gap) - gap).clamp(max=MAX_K3)
