"""Log-probabilities of rollouts under a model, each prompt run once for all its answers; and their loss. SFT examples too.

    batches = pack(groups, advantages, max_tokens, device)
    for batch in batches:
        logps, entropy = answer_logps(model, batch, temperature, with_entropy=True)  # (B, T) each

    step = whole_step(batches, recipe, temperature, longest)
    for batch in batches:
        loss, metrics = share_of_loss(model, batch, step)                            # shares, which add up to the step's

With G answers to a prompt of P tokens, running prompt and answer together would run the same P tokens G times, which is
half of the work when answers are as long as prompts. Here all prompts and answers lie end to end, each prompt once and no
padding (`packed.Packed`). Same values, same gradients.

Axes: N prompts and B answers of a micro-batch, P and T tokens of the longest of them, S tokens in all, C hidden.
"""
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from minibridge.data import Example
from minibridge.grpo import Recipe, grpo_loss, importance_weights, step_normalizer, token_loss, token_weights
from minibridge.logprob import fused_loss, token_logprobs
from minibridge.model import Decoder
from minibridge.packed import PLACES, Packed, in_pieces
from minibridge.parallel import ALONE, Ranks
from minibridge.rollout import Episode


@dataclass
class MicroBatch:
    """Answers trained together and the prompts they answer; both padded on the right."""
    prompts: Tensor         # (N, P) ids
    prompt_lengths: Tensor  # (N,)
    owner: Tensor           # (B,) the row of `prompts` that an answer belongs to
    answers: Tensor         # (B, T) ids
    trained: Tensor         # (B, T) true on the sampled tokens, the stop token included; from lengths, never from ids
    sampled_logps: Tensor   # (B, T) as the sampler noted them, 0 elsewhere
    advantages: Tensor      # (B,)
    truncated: Tensor       # (B,) true where the answer was cut off at the most tokens
    old_logps: Tensor | None = None  # (B, T)
    ref_logps: Tensor | None = None  # (B, T)


def pack(groups: list[list[Episode]], advantages: Tensor, max_tokens: int, device: torch.device,
         ranks: Ranks = ALONE) -> list[MicroBatch]:
    """All episodes of this rank's share of the groups, advantages (N, G), in micro-batches of at most max_tokens padded
    tokens, each prompt once, and of at most PLACES * max_tokens in the rows of attention, where each answer has its prompt.

    Answers of a group stay together, so that they share; longest first, so that little is padding and lack of memory
    shows at once. A micro-batch always takes one answer, however long.
    """
    longest_first = sorted(range(len(groups)), key=lambda n: -max(map(_length, groups[n])))
    order = [(number, column) for number in ranks.mine(longest_first)
             for column in sorted(range(len(groups[number])), key=lambda g: -_length(groups[number][g]))]
    packed: list[list[tuple[int, int]]] = []
    for place in order:
        if packed and _fit(groups, [*packed[-1], place], max_tokens):
            packed[-1].append(place)
        else:
            packed.append([place])
    return [_micro_batch(groups, advantages, places, device) for places in packed]


def padding(model: Decoder, batches: list[MicroBatch], ranks: Ranks = ALONE) -> float:
    """Share of padding in the rows, prompt and answer, that attention has on all ranks: none where it goes by pieces."""
    config = model.config
    rows = [] if in_pieces(model.device, model.activation_dtype, config.num_key_value_heads, config.head_dim) else batches
    lengths = [batch.prompt_lengths[batch.owner] + batch.trained.sum(1) - 1 for batch in rows]  # (B,) each
    real = ranks.total(sum(row.sum().item() for row in lengths))
    places = ranks.total(sum(row.max().item() * len(row) for row in lengths))
    return 1 - real / places if places else 0.0


def _length(episode: Episode) -> int:
    return len(episode.completion.ids)


def _fit(groups, places: list[tuple[int, int]], max_tokens: int) -> bool:
    prompts = {number: len(groups[number][0].prompt.ids) for number, _ in places}
    prompt, answer = max(prompts.values()), max(_length(groups[number][column]) for number, column in places)
    return (len(prompts) * prompt + len(places) * answer <= max_tokens
            and len(places) * (prompt + answer) <= PLACES * max_tokens)


def _micro_batch(groups, advantages: Tensor, places: list[tuple[int, int]], device: torch.device) -> MicroBatch:
    rows = {number: row for row, number in enumerate(dict.fromkeys(number for number, _ in places))}
    prompts = [torch.tensor(groups[number][0].prompt.ids) for number in rows]
    completions = [groups[number][column].completion for number, column in places]
    lengths = torch.tensor([len(completion.ids) for completion in completions])  # (B,)
    tensors = (
        pad_sequence(prompts, batch_first=True), torch.tensor([len(prompt) for prompt in prompts]),
        torch.tensor([rows[number] for number, _ in places]),
        pad_sequence([torch.tensor(completion.ids) for completion in completions], batch_first=True),
        torch.arange(int(lengths.max())) < lengths[:, None],
        pad_sequence([torch.tensor(completion.logprobs) for completion in completions], batch_first=True),
        torch.stack([advantages[place] for place in places]),
        torch.tensor([completion.finish_reason == "length" for completion in completions]))
    return MicroBatch(*(tensor.to(device) for tensor in tensors))


def answer_logps(model: Decoder, batch: MicroBatch, temperature: float, with_entropy: bool = False) -> list[Tensor]:
    """Log-probabilities of the sampled tokens, and entropies if asked for: (B, T) each, 0 where nothing was sampled."""
    values = token_logprobs(answer_hidden(model, batch), model.lm_head_weight, batch.answers[batch.trained], temperature,
                            with_entropy=with_entropy)
    return [torch.zeros_like(batch.trained, dtype=value.dtype).masked_scatter(batch.trained, value)
            for value in values if value is not None]


def answer_hidden(model: Decoder, batch: MicroBatch) -> Tensor:
    """(tokens, C): the hidden states that predict answers[trained], an answer's first token from the last of its prompt.

    What goes through the model is one line of S tokens: all prompts, then all answers but for their last tokens, from which
    nothing is predicted.
    """
    given, fed = batch.prompt_lengths, batch.trained.sum(1) - 1  # tokens that are run: of a prompt (N,), of an answer (B,)
    (N, P), (_, T) = batch.prompts.shape, batch.trained.shape
    columns = torch.arange(max(P, T), device=given.device)
    prompt, in_prompt, in_answer = given[batch.owner, None], columns[:P] < given[:, None], columns[:T] < fed[:, None]
    ids = torch.cat((batch.prompts[in_prompt], batch.answers[in_answer]))  # (S,)
    positions = torch.cat((columns[:P].expand(N, P)[in_prompt], (prompt + columns[:T])[in_answer]))  # (S,)
    lengths = torch.cat((given, fed))  # (N + B,) of prompts and answers in the line
    hidden = model(ids[None], positions[None], Packed(lengths.tolist(), [None] * N + batch.owner.tolist()))[0]  # (S, C)
    ends = lengths.cumsum(0)
    own = (ends[N:] - fed)[:, None] + columns[:T] - 1
    before = torch.where(columns[:T] == 0, ends[batch.owner, None] - 1, own)  # (B, T)
    return hidden.index_select(0, before[batch.trained])


def example_hidden(model: Decoder, examples: list[Example]) -> tuple[Tensor, Tensor]:
    """Of SFT examples, end to end: the hidden states (tokens, C) that predict the trained tokens, and these (tokens,)."""
    given = torch.tensor([id_ for example in examples for id_ in example.ids[:-1]], device=model.device)  # (S,)
    targets = torch.tensor([id_ for example in examples for id_ in example.ids[1:]], device=model.device)
    trained = torch.tensor([bool(weight) for example in examples for weight in example.mask[1:]], device=model.device)
    counts = [len(example.ids) - 1 for example in examples]
    positions = torch.tensor([position for count in counts for position in range(count)], device=model.device)  # (S,)
    hidden = model(given[None], positions[None], Packed(counts, [None] * len(counts)))[0]  # (S, C)
    return hidden[trained], targets[trained]


@dataclass(frozen=True)
class StepTotals:
    """What a micro-batch's share of the loss depends on beside itself, counted over the whole optimizer step."""
    recipe: Recipe
    temperature: float
    normalizer: int  # `grpo.step_normalizer`
    tokens: int      # trained

    @property
    def mean_weight(self) -> float:
        """Sum of the weights of all tokens of the step (`grpo.token_weights`)."""
        return self.tokens / self.normalizer if self.recipe.aggregate == "length" else 1.0


def whole_step(batches: list[MicroBatch], recipe: Recipe, temperature: float, longest: int,
               ranks: Ranks = ALONE) -> StepTotals:
    """`longest`: the most tokens that an answer may have."""
    lengths = torch.cat([batch.trained.sum(1) for batch in batches])  # (rollouts,)
    lengths = torch.tensor(ranks.gather(lengths.tolist()))  # of all ranks
    return StepTotals(recipe, temperature, step_normalizer(recipe.aggregate, lengths, longest), int(lengths.sum()))


def share_of_loss(model: Decoder, batch: MicroBatch, step: StepTotals) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of a step, and of its metrics: those of `grpo_loss`, and `mismatch` and
    `mismatch_mean`, the largest and the mean |logp - the sampler's|. `total` adds up the shares."""
    rollouts_needed = step.recipe.kl_threshold is not None or step.recipe.surrogate == "gspo"
    return (unchunked_loss if rollouts_needed else chunked_loss)(model, batch, step)


def unchunked_loss(model: Decoder, batch: MicroBatch, step: StepTotals) -> tuple[Tensor, dict[str, Tensor]]:
    """By way of all the micro-batch's log-probabilities at once; the logits are computed again in the backward pass."""
    recipe = step.recipe
    logps, entropy = answer_logps(model, batch, step.temperature, with_entropy=True)
    old_logps = logps.detach() if batch.old_logps is None else batch.old_logps
    weights = None if recipe.tis_cap is None else importance_weights(old_logps, batch.sampled_logps, recipe.tis_cap)
    loss, metrics = grpo_loss(
        logps, old_logps, batch.ref_logps, batch.advantages, batch.trained, **recipe.token_terms, entropy=entropy,
        kl_threshold=recipe.kl_threshold, kept=~batch.truncated if recipe.mask_truncated else None, importance=weights,
        aggregate=recipe.aggregate, normalizer=step.normalizer)
    gaps = (logps.detach() - batch.sampled_logps)[batch.trained].abs()
    return loss, {**metrics, "mismatch": gaps.max(), "mismatch_mean": gaps.sum() / step.tokens}


def chunked_loss(model: Decoder, batch: MicroBatch, step: StepTotals) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, some tokens at a time and with their gradients, so that no logits are computed twice."""
    trained, recipe = batch.trained, step.recipe

    def of_tokens(x: Tensor | None) -> Tensor | None:  # (B, T) or (B,) -> (tokens,)
        return None if x is None else (x if x.ndim == 2 else x[:, None].expand_as(trained))[trained]

    weights = of_tokens(token_weights(trained.to(batch.sampled_logps.dtype), recipe.aggregate, step.normalizer))
    advantages, kept = of_tokens(batch.advantages), of_tokens(~batch.truncated) if recipe.mask_truncated else None
    sampled, old, ref = (of_tokens(x) for x in (batch.sampled_logps, batch.old_logps, batch.ref_logps))
    largest = []

    def loss_of(logps: Tensor, entropy: Tensor, rows: slice) -> tuple[Tensor, dict[str, Tensor]]:
        old_logps = logps.detach() if old is None else old[rows]
        importance = None if recipe.tis_cap is None else importance_weights(old_logps, sampled[rows], recipe.tis_cap)
        loss, metrics = token_loss(
            logps, old_logps, None if ref is None else ref[rows], advantages[rows], weights[rows],
            None if kept is None else kept[rows], **recipe.token_terms, entropy=entropy, importance=importance)
        gaps = (logps.detach() - sampled[rows]).abs()
        largest.append(gaps.max())
        return loss, {**metrics, "mismatch_mean": gaps.sum() / step.tokens}

    hidden = answer_hidden(model, batch)  # (tokens, C)
    loss, metrics = fused_loss(hidden, model.lm_head_weight, batch.answers[trained], loss_of, step.temperature)
    return loss, {**metrics, "mismatch": torch.stack(largest).max()}


MEANS = ("clip_fraction", "log_ratio", "kept", "kl", "entropy", "importance")  # weighted as the loss is


def total(parts: list[dict[str, Tensor]], step: StepTotals, ranks: Ranks = ALONE) -> dict[str, float]:
    """A step's figures from those of its micro-batches: the largest mismatch, sums and weighted means of the others."""
    rows = ranks.gather(torch.stack([torch.stack([*part.values()]) for part in parts]).tolist())
    columns = dict(zip(parts[0], torch.tensor(rows, dtype=torch.double).T))  # (micro-batches,) each
    found = {name: (column.max() if name == "mismatch" else column.sum()).item() for name, column in columns.items()}
    return {name: value / step.mean_weight if name in MEANS else value for name, value in found.items()}
