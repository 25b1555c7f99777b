"""Co-influence and per-step influence: what a GRPO step on a prompt does for a validation set Q (arXiv 2505.18917, 3).

For a prompt q with G sampled answers, of which a share alpha is right, and s(o) = grad mean_t log pi(o_t | q, o_<t):

    g_Q      = mean of A s over the answers of Q     gradient of GRPO's objective over Q    `validation_directions`
    kappa(o) = <g_Q, s(o)>                           co-influence of an answer, or token    `jvp.directional`
    I(q)     = <g_Q, mean of A s over q's answers>   growth by a step on q, per step size
             = sqrt(alpha (1 - alpha)) (K+ - K-)     Proposition 3.1                        `per_step`
    I(q) against the growth seen when the step is really taken                              `taken`

K+ and K- are the means of kappa over the right and the wrong answers. A is GRPO's advantage as the trainer has it, by the
sample deviation plus 1e-6, which makes the first factor a little smaller: `factor`. The step is a plain one along GRPO's
gradient: no KL or entropy term, no format reward, no momentum.

Axes: N prompts, G answers to each, T tokens of an answer.
"""
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.grpo import group_advantages
from minibridge.jvp import Direction, directional, gradient, inner, logps_at
from minibridge.model import Decoder
from minibridge.optim import adamw
from minibridge.policy import MicroBatch, pack
from minibridge.rollout import Episode, correctness

LENGTHS = (0.1, 0.03, 0.01, 0.003, 0.001)  # norms of the change; a step of Adam's at rate r has about r sqrt(parameters)


# --- Proposition 3.1 -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Influence:
    """Of each prompt, (N,) each: value = factor * (right - wrong), and 0 where alpha is 0 or 1 and a mean is NaN."""
    alpha: Tensor
    factor: Tensor
    right: Tensor  # K+
    wrong: Tensor  # K-
    value: Tensor


def factor(alpha: Tensor, samples: int) -> Tensor:
    """alpha (1 - alpha) / (std + 1e-6), what stands before K+ - K-. With the deviation by G, not G - 1, and without the
    1e-6 it would be the paper's sqrt(alpha (1 - alpha)); so it is sqrt((G - 1) / G) of that, .968 at 16 answers."""
    variance = alpha * (1 - alpha)
    return torch.where(variance > 0, variance / ((variance * samples / (samples - 1)).sqrt() + 1e-6), 0.0)


def per_step(kappa: Tensor, correct: Tensor) -> Influence:
    """I(q) from the co-influence of the answers, kappa and correct (N, G): mean_i A_i kappa_i in closed form."""
    alpha = correct.mean(1)
    weight = factor(alpha, correct.shape[1])
    right, wrong = ((kappa * chosen).sum(1) / chosen.sum(1) for chosen in (correct, 1 - correct))  # NaN: there are none
    return Influence(alpha, weight, right, wrong, torch.where(weight > 0, weight * (right - wrong), 0.0))


# --- derivatives ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """norm: |g_Q|. tokens: (3, T) of each answer, as `jvp.directional` has them.

    parts: by the names of `validation_directions`, kappa (N, G) along the gradient of a part of Q alone, 0 for prompts that
    are not live; kappa less that is along the gradient of the rest of Q.
    cosine: between g1 and g2, what either half of Q adds to g_Q. common: 2 sqrt(<g1, g2>), an estimate of |g_Q| that is free
    of the noise of sampling; None where <g1, g2> is not above 0."""
    norm: float
    tokens: list[list[Tensor]]
    influence: Influence
    parts: dict[str, Tensor]
    cosine: float | None = None
    common: float | None = None


def measure(model: Decoder, val: list[list[Episode]], groups: list[list[Episode]], temperature: float, max_tokens: int,
            halves: bool = False, contrast: bool = False, scale: Direction | None = None) -> Measured:
    """The influence on Q, of which `val` are rollouts, of a step on each prompt of `groups`.

    One backward pass over val and one forward pass with dual numbers over groups; for `halves` and for `contrast` each one
    more forward pass, over groups with right and wrong answers, and for `contrast` another backward pass. Micro-batches of
    max_tokens. `scale`: as `adam_scale`.
    """
    directions = validation_directions(model, val, temperature, max_tokens, halves, contrast, scale)
    whole, correct = directions.pop("whole"), correctness(groups)
    tokens = directional(model, groups, whole, temperature, max_tokens)
    live, parts = live_prompts(correct), {}
    for name, direction in directions.items():
        parts[name] = torch.zeros_like(correct)
        if live:
            parts[name][live] = means(directional(model, [groups[n] for n in live], direction, temperature, max_tokens))
    agreement = _agreement(whole, directions["half"]) if halves else ()
    return Measured(math.sqrt(inner(whole, whole)), tokens, per_step(means(tokens), correct), parts, *agreement)


def live_prompts(correct: Tensor) -> list[int]:
    """Those with right and with wrong answers; a step on any other changes nothing."""
    return ((correct.mean(1) > 0) & (correct.mean(1) < 1)).nonzero()[:, 0].tolist()


def check_live(val: list[list[Episode]]):
    """InputError unless two prompts of Q are live, one for each half."""
    live, answers = len(live_prompts(correctness(val))), [episode for group in val for episode in group]
    if live < 2:
        cut = sum(episode.completion.finish_reason == "length" for episode in answers) / len(answers)
        right = sum(episode.correct for episode in answers) / len(answers)
        raise InputError(f"Q: of {len(val)} prompts {live} got both right and wrong answers, and the validation gradient "
                         f"needs two; {right:.0%} of the answers are right, {cut:.0%} were cut off at --max-new-tokens")


def validation_directions(model: Decoder, groups: list[list[Episode]], temperature: float, max_tokens: int,
                          halves: bool = False, contrast: bool = False,
                          scale: Direction | None = None) -> dict[str, Direction]:
    """"whole": g_Q. With `halves`, "half": what every other live prompt adds to it. With `contrast`, "right": what right
    answers add to it. Each times `scale`, parameter for parameter."""
    check_live(groups)
    correct = correctness(groups)
    weights, live = group_advantages(correct) / correct.numel(), live_prompts(correct)

    def gradient_of(chosen: list[int], weights: Tensor) -> Direction:
        batches = pack([groups[n] for n in chosen], weights[chosen], max_tokens, model.device)
        return _scaled(gradient(model, batches, temperature), scale)

    directions = {"whole": gradient_of(live[1::2] if halves else live, weights)}
    if halves:
        directions["half"] = gradient_of(live[::2], weights)
        for name, tensor in directions["half"].items():
            directions["whole"][name] += tensor
    if contrast:
        directions["right"] = gradient_of(live, weights.clamp(min=0))
    return directions


def _agreement(whole: Direction, half: Direction) -> tuple[float, float | None]:
    """`Measured.cosine` and `common`."""
    own, both = inner(half, half), inner(whole, half)
    shared, other = both - own, inner(whole, whole) - 2 * both + own  # <half, other half>, |other half|^2
    return shared / math.sqrt(own * other), 2 * math.sqrt(shared) if shared > 0 else None


def training_numbers(model: Decoder, val: list[list[Episode]], groups: list[list[Episode]], temperature: float,
                     max_tokens: int) -> dict[str, float]:
    """For the log of train_rl.py, before a step: |g_Q|, and the mean of I(q) over a rollout batch. Nothing where no prompt
    is live, or fewer than two of Q are."""
    live = live_prompts(correctness(groups))
    if not live or len(live_prompts(correctness(val))) < 2:
        return {}
    kept, model.compute_dtype = model.compute_dtype, None
    try:
        found = measure(model, val, [groups[n] for n in live], temperature, max_tokens)
    finally:
        model.compute_dtype = kept
    return {"influence": found.influence.value.sum().item() / len(groups), "validation_gradient_norm": found.norm}


def means(tokens: list[list[Tensor]]) -> Tensor:
    """kappa (N, G): the mean over tokens of what `jvp.directional` found."""
    return torch.tensor([[answer[1].double().mean() for answer in group] for group in tokens], dtype=torch.float64)


def live_batches(groups: list[list[Episode]], max_tokens: int, device: torch.device) -> list[MicroBatch]:
    """Of the live groups alone; their advantages are GRPO's, divided by the number of answers in all groups."""
    correct = correctness(groups)
    live = live_prompts(correct)
    return pack([groups[n] for n in live], group_advantages(correct)[live] / correct.numel(), max_tokens, device)


# --- steps ---------------------------------------------------------------------------------------------------


def taken(model: Decoder, val: list[MicroBatch], batches: list[MicroBatch], predicted: float, temperature: float,
          scale: Direction | None = None) -> list[dict]:
    """One row for each of LENGTHS: the growth that a step along the gradient of `batches` brings, beside step size times
    `predicted`. The step is not kept. The advantages of both carry their normalisers.

    What grows is GRPO's objective over the sampled answers `val`: sum of A mean_t (ratio_t - 1), with the ratio of each
    token's probability to that before the step. So it is 0 there, and its gradient is that of A mean_t log pi.
    """
    before = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for batch in val:
        if batch.old_logps is None:
            batch.old_logps = logps_at(before, model, batch, temperature)
    step, rows = _scaled(gradient(model, batches, temperature), scale), []
    norm = math.sqrt(inner(step, step))
    for length in LENGTHS:
        after = {name: parameter + length / norm * step[name] for name, parameter in before.items()}
        measured, expected = sum(_objective(after, model, batch, temperature) for batch in val), length / norm * predicted
        error = abs(measured / expected - 1)
        rows.append({"length": length, "predicted": expected, "measured": measured, "relative error": error})
    return rows


def _objective(parameters: Direction, model: Decoder, batch: MicroBatch, temperature: float) -> float:
    change = logps_at(parameters, model, batch, temperature) - batch.old_logps  # (B, T), 0 where nothing was sampled
    return (batch.advantages * change.double().expm1().sum(1) / batch.trained.sum(1)).sum().item()


def _scaled(direction: Direction, scale: Direction | None) -> Direction:
    """Parameter for parameter, in place; None: as it is."""
    return direction if scale is None else {name: tensor.mul_(scale[name]) for name, tensor in direction.items()}


def adam_scale(folder: str, model: Decoder) -> Direction:
    """1 / (sqrt(v) + eps), with the second moments v that a checkpoint of train_rl.py holds: what Adam does to a gradient,
    but for momentum. v is taken as fixed; if it moved, the influences of prompts would not add up. Where v is 0, because
    there was never a gradient (embeddings of tokens that did not occur), the scale is 0 and not 1e8."""
    trained = checkpoint.load(folder, device=model.device)
    if trained.config != model.config:
        raise InputError(f"adam: {folder} holds another kind of model")
    optimizer = adamw(trained, (0.9, 0.999), 0.0)  # as train_rl.py has it
    beta2, eps = optimizer.defaults["betas"][1], optimizer.defaults["eps"]
    if "drawn" not in checkpoint.load_training(folder, trained, optimizer, updates=None):
        raise InputError(f"adam: {folder}: not a checkpoint of train_rl.py")
    if not optimizer.state:
        raise InputError(f"adam: {folder} holds no second moments")

    def scale_of(state: dict) -> Tensor:
        moment = state["exp_avg_sq"] / (1 - beta2 ** float(state["step"]))
        return torch.where(moment > 0, 1 / (moment.sqrt() + eps), 0.0)

    return {name: scale_of(optimizer.state[parameter]) for name, parameter in trained.named_parameters()}
