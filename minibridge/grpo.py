"""GRPO (DeepSeekMath, arXiv:2402.03300) and its kin as pure functions: rewards -> advantages, log-probabilities -> loss.

What it is not: it never sees a model, a text or a group of processes, and it keeps no state. The loss of
one rollout i with tokens t, advantage A, ratio = exp(logp - old_logp), d = ref_logp - logp and policy
entropy H:

    l_i = mean_t max(-A ratio_t, -A clip(ratio_t, 1 - low, 1 + high)) - c_H mean_t H_t + c_KL mean_t k3_t
    k3_t = min(exp(d_t) - d_t - 1, 10)          (never negative: http://joschu.net/blog/kl-approx.html)

and the loss of an optimizer step is the mean of l_i over its rollouts. Other recipes have another first term, or
other weights of tokens: `PRESETS`. Two traps are dealt with here:

1. A normaliser counted per micro-batch makes the gradient depend on how rollouts were packed. `normalizer`
   is counted over the whole optimizer step by the caller, so losses, gradients and metrics simply add up.
2. exp() of a garbage difference is inf, and inf * 0 is NaN, in the gradient too. Padding leaves through
   `where` before any exp(), and what enters exp() is clamped.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minibridge.config import InputError

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond any clip range, far from overflow
MAX_K3 = 10.0  # the authors' cap on k3 per token, reached at d = 2.6 and at d = -11; beyond it the gradient is zero


@dataclass(frozen=True)
class Recipe:
    """All choices that make a loss. ddof, eps and scale are those of `group_advantages`, tis_cap is that of
    `importance_weights`, mask_truncated fills `kept` of `grpo_loss`, and the others are its options.

    kl_threshold, tis_cap and mask_truncated are None or False in every preset.

    The presets on the same step, two rollouts of a group with rewards 1 and 0, of two tokens and one, of probabilities
    (0.6, 0.5) and (0.2), under the old policy (0.4, 0.5) and (0.4), where answers have at most 4 tokens. The ratios are
    (1.5, 1) and (0.5), the advantages A and -A; KL and entropy are 0 here:

        preset     A                            loss
        paper      0.5 / (0.5 sqrt(2) + 1e-6)   A (-(1.2 + 1) / 2 + 0.8) / 2
        dr_grpo    0.5                          A (-(1.2 + 1) + 0.8) / (2 * 4)
        dapo       0.5 / (0.5 sqrt(2) + 1e-6)   A (-(1.28 + 1) + 0.8) / 3
        gspo       0.5 / (0.5 sqrt(2) + 1e-6)   A (-1.0004 + 0.9997) / 2, since sqrt(1.5 * 1) = 1.22 is clipped too
        cispo      0.5 / (0.5 sqrt(2) + 1e-6)   A (-1.5 ln 0.6 - ln 0.5 + 0.5 ln 0.2) / 3
        grpo_zero  0.5 / (0.5 + 1e-4)           A (-ln 0.6 - ln 0.5 + ln 0.2) / 3

    >>> logps, old_logps = torch.tensor([[0.6, 0.5], [0.2, 1]]).log(), torch.tensor([[0.4, 0.5], [0.4, 1]]).log()
    >>> mask = torch.tensor([[1, 1], [1, 0]])
    >>> for name, r in PRESETS.items():
    ...     A = r.advantages(torch.tensor([[1.0, 0.0]]))[0]
    ...     loss, _ = grpo_loss(logps, old_logps, logps, A, mask, entropy=0 * logps, aggregate=r.aggregate,
    ...                         normalizer=step_normalizer(r.aggregate, mask.sum(1), 4), **r.token_terms)
    ...     print(f"{name:9} {A[0]:.4f} {loss:.6f}")
    paper     0.7071 -0.106066
    dr_grpo   0.5000 -0.087500
    dapo      0.7071 -0.348839
    gspo      0.7071 -0.000247
    cispo     0.7071 0.154306
    grpo_zero 0.9998 -0.135128
    """

    ddof: int = 1
    eps: float = 1e-6
    scale: bool = True
    surrogate: str = "ppo"
    aggregate: str = "sequence"
    clip_low: float | None = 0.2  # None: nothing is clipped
    clip_high: float | None = 0.2
    kl_coef: float = 0.0
    entropy_coef: float = 0.0
    kl_threshold: float | None = None
    tis_cap: float | None = None
    mask_truncated: bool = False

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards (N, G) -> (N, G)."""
        return group_advantages(rewards, self.ddof, self.eps, self.scale)

    @property
    def token_terms(self) -> dict:
        """The options that `grpo_loss` shares with `token_loss`."""
        return {"surrogate": self.surrogate, "clip": (self.clip_low, self.clip_high), "kl_coef": self.kl_coef,
                "entropy_coef": self.entropy_coef}


PRESETS = {
    "paper": Recipe(kl_coef=0.001, entropy_coef=0.001),  # arXiv 2505.18917, for Qwen2.5
    "dr_grpo": Recipe(scale=False, aggregate="length"),  # arXiv 2503.20783
    "dapo": Recipe(clip_high=0.28, aggregate="token"),  # arXiv 2503.14476, without its dynamic sampling and soft punishment
    "gspo": Recipe(surrogate="gspo", clip_low=3e-4, clip_high=4e-4),  # arXiv 2507.18071, 5.1
    # arXiv 2506.13585, which sets no lower bound; weights up to 5, as TRL recommends after arXiv 2510.13786
    "cispo": Recipe(surrogate="cispo", clip_low=1.0, clip_high=4.0, aggregate="token"),
    "grpo_zero": Recipe(ddof=0, eps=1e-4, surrogate="reinforce", clip_low=None, clip_high=None,
                        aggregate="token"),  # https://github.com/policy-gradient/GRPO-Zero
}


def group_advantages(rewards: Tensor, ddof: int = 1, eps: float = 1e-6, scale: bool = True) -> Tensor:
    """Advantage of each sample within its prompt's group: rewards (N, G) -> (N, G), (r - mean) / (std + eps).

    `ddof` 1 divides the variance by G - 1 (the paper), 0 by G; `scale=False` leaves out the division by the
    std (Dr. GRPO, arXiv:2503.20783). A group whose rewards are all equal gets exactly zero: its std is
    rounding noise, not a scale. A group of one has no baseline and raises InputError; ValueError for other shapes and types.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 0.1, 0.1, 0.1]]), eps=0.0)
    tensor([[ 1.5000, -0.5000, -0.5000, -0.5000],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floats (N, G), not {rewards.dtype} {tuple(rewards.shape)}")
    if rewards.shape[1] < 2:
        raise InputError("GRPO compares the samples of a prompt: it needs at least 2 samples per prompt")
    advantages = rewards - rewards.mean(1, keepdim=True)  # (N, G)
    if scale:
        advantages = advantages / (rewards.std(1, correction=ddof, keepdim=True) + eps)
    dead = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (N, 1)
    return advantages.masked_fill(dead, 0.0)


def grpo_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, mask: Tensor, *,
    surrogate: str = "ppo", clip: tuple[float | None, float | None] = (0.2, 0.2), kl_coef: float = 0.0,
    kl_threshold: float | None = None, entropy: Tensor | None = None, entropy_coef: float = 0.0,
    importance: Tensor | None = None, kept: Tensor | None = None, aggregate: str = "sequence", normalizer: float,
) -> tuple[Tensor, dict[str, Tensor]]:
    """One micro-batch's share of the loss of an optimizer step, and of its metrics.

    logps, old_logps, ref_logps, entropy, importance, mask (B, T), advantages, kept (B,). Only `logps` and `entropy`
    carry gradients (for advantages of single tokens: `token_loss`). The mask is true on the tokens to train: the sampled
    ones, the stop token included.
    `ref_logps` may be None if neither `kl_coef` nor `kl_threshold` asks for it, `entropy` if `entropy_coef`
    is 0. `clip` is (low, high).

    surrogate    a token's first term                                                     used by
    "ppo"        max(-A ratio, -A clip(ratio, 1 - low, 1 + high))                         GRPO, Dr. GRPO, DAPO
    "gspo"       the same with exp(mean_t (logp_t - old_logp_t)), the rollout's one ratio GSPO
    "cispo"      -A logp times clip(ratio, 1 - low, 1 + high) without its gradient        CISPO
    "reinforce"  -A logp                                                                  GRPO-Zero

    aggregate   a token's weight              `step_normalizer`         used by
    "sequence"  1 / (own length * normalizer) rollouts                  GRPO, GSPO, and the paper
    "token"     1 / normalizer                tokens                    DAPO, CISPO, GRPO-Zero
    "length"    1 / normalizer                rollouts * longest        Dr. GRPO

    `kl_threshold`: a rollout whose mean k3 reaches it has its whole l_i multiplied by 0, and still counts
    in the normalizer (the paper's Llama runs); a NaN in it is still one in the loss, so that it stops the run. `kept`
    (1 or 0) takes out rollouts in the same way, such as those that were truncated. `importance` multiplies a token's first
    term (`importance_weights`). A row without tokens adds nothing.

    Every metric is, like the loss, a sum already divided by `normalizer`: adding up those of the
    micro-batches gives the step's figure. Means are weighted as the loss is, so "clip_fraction" under
    "sequence" is the mean over rollouts of their fraction of clipped tokens. (Under "length" the weights of a step
    add up to tokens / normalizer, not to 1: there a mean is the sum over that, as in `policy.total`.) All are detached and
    stay on the device.

        loss           the loss                    policy_loss    its first term alone
        clip_fraction  tokens whose gradient the clip has set to zero ("cispo": whose weight it has changed)
        log_ratio      mean |logp - old_logp|, each at most MAX_LOG_RATIO
        kept           weight left by kl_threshold and kept (1 if both are off and no row is empty)
        kl             mean k3, dropped rollouts included (if ref_logps)
        entropy        mean entropy, dropped rollouts included (if entropy)
        importance     mean importance weight (if importance)

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
    if advantages.shape != mask.shape[:1]:
        raise ValueError(f"advantages must be one a rollout, {tuple(mask.shape[:1])}, not {tuple(advantages.shape)}")
    weights = token_weights(mask.to(logps.dtype), aggregate, normalizer)  # (B, T)
    logps, old_logps, ref_logps, entropy, importance = (
        None if x is None else torch.where(mask.bool(), x, 0.0) for x in (logps, old_logps, ref_logps, entropy, importance))
    lengths = mask.sum(1, keepdim=True).clamp(min=1)  # (B, 1)
    kept = None if kept is None else kept[:, None].to(logps.dtype)  # (B, 1)
    if kl_threshold is not None:
        if ref_logps is None:
            raise ValueError("kl_threshold needs ref_logps")
        near = kl_k3(ref_logps - logps.detach()).sum(1, keepdim=True) / lengths < kl_threshold  # (B, 1)
        kept = near.to(logps.dtype) if kept is None else kept * near
    rollout_log_ratio = (logps - old_logps).sum(1, keepdim=True) / lengths if surrogate == "gspo" else None  # (B, 1)
    return token_loss(logps, old_logps, ref_logps, advantages[:, None], weights, kept, surrogate=surrogate, clip=clip,
                      kl_coef=kl_coef, entropy=entropy, entropy_coef=entropy_coef, importance=importance,
                      rollout_log_ratio=rollout_log_ratio)


def token_loss(
    logps: Tensor, old_logps: Tensor, ref_logps: Tensor | None, advantages: Tensor, weights: Tensor,
    kept: Tensor | None, *, surrogate: str, clip: tuple[float | None, float | None], kl_coef: float, entropy_coef: float,
    entropy: Tensor | None = None, importance: Tensor | None = None, rollout_log_ratio: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What `grpo_loss` computes, of tokens of any shape that each bring their weight: any part of an optimizer step.

    All of one shape, or broadcast to it; `kept` is 1 or 0, and 0 takes a token's terms out of the loss.
    `rollout_log_ratio` is the mean of logp - old_logp over the token's rollout, which "gspo" needs.
    """
    log_ratio = _clamped(logps - old_logps)
    policy, clipped = surrogate_terms(surrogate, logps, log_ratio, rollout_log_ratio, advantages, clip)
    means = {"clip_fraction": clipped, "log_ratio": log_ratio.abs()}
    if importance is not None:
        means["importance"] = importance
        policy = policy * importance
    terms = policy
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


def surrogate_terms(surrogate: str, logps: Tensor, log_ratio: Tensor, rollout_log_ratio: Tensor | None, advantages: Tensor,
                    clip: tuple[float | None, float | None]) -> tuple[Tensor, Tensor]:
    """The first term of each token's loss, and where clipping has changed it: all as `token_loss` has them."""
    if surrogate == "ppo":
        return clipped_surrogate(log_ratio.exp(), advantages, clip)
    if surrogate == "gspo":
        return clipped_surrogate(_clamped(rollout_log_ratio).exp().expand_as(log_ratio), advantages, clip)
    if surrogate == "cispo":
        ratio = log_ratio.detach().exp()
        bounded = ratio.clamp(1 - clip[0], 1 + clip[1])
        return -advantages * bounded * logps, bounded != ratio
    if surrogate == "reinforce":
        return -advantages * logps, torch.zeros_like(logps)
    raise ValueError(f'surrogate must be "ppo", "gspo", "cispo" or "reinforce", not {surrogate!r}')


def importance_weights(trainer_logps: Tensor, sampler_logps: Tensor, cap: float) -> Tensor:
    """min(exp(trainer - sampler), cap) of any shape, without gradient: tokens that the sampler's numerics drew too often
    or too seldom get the weight that the trainer's would have given them, up to the cap (truncated importance sampling,
    "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", https://fengyao.notion.site/off-policy-rl).

    >>> importance_weights(torch.tensor([0.5, 0.9]).log(), torch.tensor([0.4, 0.3]).log(), cap=2.0)
    tensor([1.2500, 2.0000])
    """
    return _clamped(trainer_logps.detach() - sampler_logps).exp().clamp(max=cap)


def step_normalizer(aggregate: str, lengths: Tensor, longest: int) -> int:
    """`normalizer` of an optimizer step, from the lengths (rollouts,) of all its answers, of at most `longest` tokens."""
    return {"sequence": len(lengths), "token": int(lengths.sum()), "length": len(lengths) * longest}[aggregate]


def token_weights(mask: Tensor, aggregate: str, normalizer: float) -> Tensor:
    """Weight of each token in the loss of the whole optimizer step: mask (B, T) of 0.0 and 1.0 -> (B, T)."""
    if aggregate == "sequence":
        return mask / (mask.sum(1, keepdim=True).clamp(min=1) * normalizer)
    if aggregate in ("token", "length"):
        return mask / normalizer
    raise ValueError(f'aggregate must be "sequence", "token" or "length", not {aggregate!r}')


def clipped_surrogate(ratio: Tensor, advantages: Tensor, clip: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """PPO's pessimistic bound, to be minimised, and where the clip decides, of ratio's shape; advantages broadcast to it.

    The clip decides, and stops the gradient, for A > 0 above 1 + high and for A < 0 below 1 - low: the step
    is already taken. On the other sides a step in the wrong direction is still corrected.
    """
    plain = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - clip[0], 1 + clip[1])
    return torch.maximum(plain, bounded), bounded > plain


def kl_k3(gap: Tensor) -> Tensor:
    """k3 estimate of KL(policy | reference) per token, from gap = ref_logp - logp, of any shape.

    The gradient for logp is 1 - exp(gap), zero where the two agree; beyond the cap MAX_K3 it is zero too.
    """
    gap = gap.clamp(max=MAX_LOG_RATIO)  # only exp of a large gap overflows
    # expm1 because exp(gap) - 1 has lost all digits of the result, gap^2 / 2, when the gap is small.
    return (torch.expm1(gap) - gap).clamp(max=MAX_K3)


def _clamped(log_ratio: Tensor) -> Tensor:
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
