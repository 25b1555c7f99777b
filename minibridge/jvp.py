"""Derivatives of rollouts' log-probabilities in two passes, neither of which holds the gradient of a single rollout.

    gradient     sum_i a_i grad mean_t log pi(o_it)            of many rollouts: one backward pass, accumulated
    directional  d/de log pi_{theta + e v}(o_it) at e = 0      of every token: one forward pass

The second is forward-mode differentiation: each activation x carries its change dx along v through the model ("dual
numbers", torch.autograd.forward_ad), and by linearity the change of a rollout's mean log-probability is <v, its gradient>.
Attention takes PyTorch's plain path in it, because the fused kernels have no forward derivative.

A direction is a dict of tensors by parameter name, like a gradient. Axes: N prompts with G answers each, T tokens of an
answer, R tokens at a time, C hidden, V vocabulary.
"""
from collections.abc import Callable, Iterable

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from minibridge.grpo import token_weights
from minibridge.logprob import fused_loss
from minibridge.model import Decoder
from minibridge.packed import PLACES
from minibridge.policy import MicroBatch, answer_hidden, answer_logps, pack
from minibridge.rollout import Episode

Direction = dict[str, Tensor]

LOGIT_ELEMENTS = 2**25  # logits at a time in `directional`, which needs five such blocks: 640 MiB in fp32
PAIR_ELEMENTS = 2**27  # pairs of tokens of all heads at a time, likewise: 2.5 GiB


def gradient(model: Decoder, batches: list[MicroBatch], temperature: float) -> Direction:
    """Sum over all rollouts of advantage * grad mean_t log pi(o_t); the advantages carry any normaliser.

    At ratio 1 this is the ascent direction of GRPO's objective. The model must hold no gradient, and holds none after.
    """
    for batch in batches:
        weights = (token_weights(batch.trained.to(batch.advantages.dtype), "sequence", 1.0)
                   * batch.advantages[:, None])[batch.trained]  # (tokens,)
        loss, _ = fused_loss(answer_hidden(model, batch), model.lm_head_weight, batch.answers[batch.trained],
                             lambda logps, _, rows: ((weights[rows] * logps).sum(), {}), temperature, with_entropy=False)
        loss.backward()
    found = {name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
             for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


def directional(model: Decoder, groups: list[list[Episode]], direction: Direction, temperature: float,
                max_tokens: int) -> list[list[Tensor]]:
    """For every answer (3, T) on the CPU: log-probabilities, their derivatives along the direction, and entropies.

    In nats, and nats per unit of the direction. Micro-batches have at most max_tokens, fewer where they attend to many.
    """
    found: list[list[Tensor | None]] = [[None] * len(group) for group in groups]
    longest = max(len(episode.prompt.ids) + len(episode.completion.ids) for group in groups for episode in group)
    max_tokens = min(max_tokens, PAIR_ELEMENTS // (PLACES * model.config.num_attention_heads * longest))
    for batch, places in numbered_batches(groups, max_tokens, model.device):
        eager = torch.compiler.set_stance("force_eager")  # compiled layers have no forward derivative
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), eager:
            duals = {name: forward_ad.make_dual(parameter, direction[name]) for name, parameter in model.named_parameters()}
            values = at(duals, model, _derivatives, batch, temperature).cpu()  # (3, tokens)
        for (n, g), part in zip(places, values.split(batch.trained.sum(1).tolist(), 1)):
            found[n][g] = part
    return found


def directional_naive(model: Decoder, groups: list[list[Episode]], direction: Direction, temperature: float) -> Tensor:
    """<direction, grad mean_t log pi(o_t)> (N, G), by the gradient of each answer in turn."""
    rows = []
    for group in groups:
        batches = [pack([[episode]], torch.ones(1, 1, dtype=torch.float64), 1, model.device) for episode in group]
        rows.append([inner(direction, gradient(model, batch, temperature)) for batch in batches])
    return torch.tensor(rows, dtype=torch.float64)


def numbered_batches(groups: list[list[Episode]], max_tokens: int,
                     device: torch.device) -> Iterable[tuple[MicroBatch, list[tuple[int, int]]]]:
    """Micro-batches of all answers, and for each row which answer it is: its number stands in for the advantage."""
    samples = len(groups[0])
    numbers = torch.arange(len(groups) * samples, dtype=torch.float64).view(-1, samples)
    for batch in pack(groups, numbers, max_tokens, device):
        yield batch, [divmod(int(number), samples) for number in batch.advantages.tolist()]


def at(parameters: Direction, model: Decoder, function: Callable, *args):
    """function(model, *args) with other numbers in place of the model's parameters, which stay as they are."""
    return functional_call(_Call(model, function), {f"model.{name}": value for name, value in parameters.items()}, args)


def logps_at(parameters: Direction, model: Decoder, batch: MicroBatch, temperature: float) -> Tensor:
    """Log-probabilities (B, T) of a micro-batch under other parameters."""
    with torch.no_grad():
        return at(parameters, model, answer_logps, batch, temperature)[0]


def inner(a: Direction, b: Direction) -> float:
    """Inner product, summed in double precision."""
    return sum((a[name] * b[name]).sum(dtype=torch.float64).item() for name in a)


class _Call(nn.Module):
    """A function of a model as a module, for functional_call."""

    def __init__(self, model: Decoder, function: Callable):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *args):
        return self.function(self.model, *args)


def _derivatives(model: Decoder, batch: MicroBatch, temperature: float) -> Tensor:
    """(3, tokens), within `at` with dual numbers: see `directional`."""
    hidden = answer_hidden(model, batch)  # (tokens, C)
    (hidden, hidden_change), (weight, weight_change) = (forward_ad.unpack_dual(x) for x in (hidden, model.lm_head_weight))
    size = max(1, LOGIT_ELEMENTS // len(weight))
    parts = [_softmax_derivatives(*rows, weight, weight_change, temperature)
             for rows in zip(hidden.split(size), hidden_change.split(size), batch.answers[batch.trained].split(size))]
    return torch.cat(parts, 1)


def _softmax_derivatives(hidden: Tensor, hidden_change: Tensor, targets: Tensor, weight: Tensor, weight_change: Tensor,
                         temperature: float) -> Tensor:
    """d log p_t = dz_t - sum_j p_j dz_j of R tokens, written out: the fused log-probabilities have no forward derivative."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, weight_change = weight.to(hidden.dtype), weight_change.to(hidden.dtype)
    logps = ((hidden @ weight.T).to(wide) / temperature).log_softmax(-1)  # (R, V)
    change = (hidden_change @ weight.T + hidden @ weight_change.T).to(wide) / temperature
    probabilities = logps.exp()
    slopes = change.gather(1, targets[:, None])[:, 0] - (probabilities * change).sum(-1)
    return torch.stack((logps.gather(1, targets[:, None])[:, 0], slopes, -(probabilities * logps).sum(-1)))
