"""Sampling completions: prompts in, token ids and their log-probabilities out.

Each prompt is prefilled once and its keys and values are copied to the rows of its samples. Live rows are
always the first ones of the cache: when a row finishes, the last live row moves into its place and the next
waiting sample joins at the end, so no step computes anything for a finished row. Not here: chat format,
rewards, penalties, beam search.

Axes: B rows, T tokens, S cache slots, C hidden, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import Tensor

from minibridge.config import InputError
from minibridge.model import Decoder, KVCache


class Decodes(Protocol):
    """What stop strings need of a tokenizer."""

    def decode(self, ids: list[int]) -> str: ...


@dataclass
class Completion:
    """One sample of a prompt."""

    ids: list[int] = field(default_factory=list)         # with the stop token, if one was drawn
    logprobs: list[float] = field(default_factory=list)  # nats, under the distribution each id was drawn from
    finish_reason: str = "length"                        # or "stop"


@torch.inference_mode()
def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    samples: int = 1,
    max_new_tokens: int = 512,
    temperature: float = 1.0,
    top_p: float = 1.0,
    stop_ids: Sequence[int] = (),
    stop_strings: Sequence[str] = (),
    tokenizer: Decodes | None = None,
    generator: torch.Generator | None = None,
    rows: int = 64,
) -> list[list[Completion]]:
    """`samples` completions of each prompt (token ids), in the order of the prompts, `rows` at a time.

    Tokens are drawn from softmax(logits / temperature), cut to its top_p nucleus (arXiv 1904.09751);
    temperature 0 takes the most likely token and gives its log-probability under softmax(logits). A
    completion ends with one of stop_ids, with the token that completes one of stop_strings in the decoded
    text, or after max_new_tokens. The generator is on the model's device (None: torch's own); the same state
    and arguments give the same completions. Raises InputError for a prompt that is empty or, with
    max_new_tokens, longer than the model's max_position_embeddings.
    """
    _check(model, prompts, samples, max_new_tokens, rows)
    stop = _Stop(frozenset(stop_ids), tuple(stop_strings), tokenizer, max_new_tokens)
    results = [[Completion() for _ in range(samples)] for _ in prompts]
    waiting = _prefill(model, prompts, results, batch=max(1, rows // samples))
    slots = max(map(len, prompts), default=0) + max_new_tokens
    pool = _Pool(model, min(rows, samples * len(prompts)), slots)
    while pool.admit(waiting):
        tokens, logprobs = sample(model.logits(pool.hidden), temperature, top_p, generator)  # (B,), (B,)
        drawn = torch.stack((tokens.double(), logprobs.double())).tolist()  # the step's one wait
        if not all(map(math.isfinite, drawn[1])):
            raise InputError("the model's logits are not finite: its weights are broken")
        for row, token, logprob in zip(pool.live, *drawn):
            row.completion.ids.append(int(token))
            row.completion.logprobs.append(logprob)
        pool.retire(stop)
        pool.advance()
    return results


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None):
    """Tokens (B,) drawn from fp32 logits (B, V) as `generate` says, and their log-probabilities (B,)."""
    if temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    weights = (logits / temperature).softmax(-1)  # (B, V)
    if top_p < 1:
        weights = nucleus(weights, top_p)
    # Inverse transform: one uniform number a row. The sums are fp64 so that rare tokens keep their chance.
    edges = weights.cumsum(-1, dtype=torch.float64)
    total = edges[:, -1:]
    uniform = torch.rand(total.shape, dtype=torch.float64, device=logits.device, generator=generator)
    tokens = torch.searchsorted(edges, uniform * total, right=True)  # (B, 1), never one of weight 0
    tokens = tokens.clamp(max=logits.shape[-1] - 1)  # past the end only if the logits are NaN
    return tokens[:, 0], (weights.gather(-1, tokens) / total).log().float()[:, 0]


def nucleus(weights: Tensor, top_p: float) -> Tensor:
    """Probabilities (B, V), set to 0 outside the fewest most likely tokens that hold top_p of the whole."""
    ordered, order = weights.sort(-1, descending=True)
    outside = ordered.cumsum(-1) - ordered >= top_p  # what comes before already holds top_p
    return weights.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), 0)


def _check(model: Decoder, prompts, samples: int, max_new_tokens: int, rows: int):
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("rows", rows)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    limit = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise InputError(f"prompt {index} is empty")
        if len(prompt) + max_new_tokens > limit:
            raise InputError(f"prompt {index} of {len(prompt)} tokens and max_new_tokens {max_new_tokens} "
                             f"exceed the model's max_position_embeddings {limit}")


@dataclass
class _Row:
    """A completion in the making."""

    completion: Completion
    prompt_length: int

    @property
    def length(self) -> int:
        return self.prompt_length + len(self.completion.ids)


def _prefill(model: Decoder, prompts, results, batch: int) -> Iterator[tuple[_Row, KVCache, int, Tensor]]:
    """Each sample in order: with the cache and the row of it that hold its prompt, and its last hidden (C,).

    A batch of prompts is run when the first of its samples is asked for.
    """
    for start in range(0, len(prompts), batch):
        lengths = [len(prompt) for prompt in prompts[start : start + batch]]
        ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)  # (B, T), padded on the right
        for b, length in enumerate(lengths):
            ids[b, :length] = torch.as_tensor(prompts[start + b])
        cache = model.new_cache(*ids.shape)
        hidden = model(ids.to(model.device), cache=cache)  # (B, T, C)
        last = [hidden[b, length - 1].clone() for b, length in enumerate(lengths)]
        del hidden  # while these samples wait, only the ends are needed
        for b, length in enumerate(lengths):
            for completion in results[start + b]:
                yield _Row(completion, length), cache, b, last[b]


class _Pool:
    """The samples being decoded: live[b] owns row b of the cache; its next token is drawn from hidden[b]."""

    def __init__(self, model: Decoder, rows: int, slots: int):
        self.model, self.rows, self.cache = model, rows, model.new_cache(rows, slots)
        self.live: list[_Row] = []
        self.hidden = torch.empty(0, model.config.hidden_size).to(model.device, model.activation_dtype)

    def admit(self, waiting: Iterator[tuple[_Row, KVCache, int, Tensor]]) -> bool:
        """Fill the free rows with samples from `waiting`; False when nothing is left to decode."""
        new = list(islice(waiting, self.rows - len(self.live)))
        for source, group in groupby(new, key=lambda item: item[1]):
            added, _, source_rows, _ = zip(*group)
            rows = range(len(self.live), len(self.live) + len(added))
            self.cache.copy_rows(source, list(source_rows), list(rows))
            self.live += added
        self.hidden = torch.cat((self.hidden, *(item[3][None] for item in new)))  # (B, C)
        return bool(self.live)

    def retire(self, stop: "_Stop"):
        """Let go of the rows that have come to their end, and close the gaps with rows from the back."""
        alive = [b for b, row in enumerate(self.live) if not stop(row.completion)]
        moved = [b for b in alive if b >= len(alive)]
        gaps = sorted(set(range(len(alive))) - set(alive))
        self.cache.limit = max((self.live[b].length for b in alive), default=0)
        if gaps:
            self.cache.copy_rows(self.cache, moved, gaps)
        for gap, b in zip(gaps, moved):
            self.live[gap] = self.live[b]
        del self.live[len(alive) :]

    def advance(self):
        """Run the newest token of every live row."""
        self.hidden, self.cache.rows = self.hidden[:0], len(self.live)
        if self.live:
            newest = [[row.completion.ids[-1], row.length - 1] for row in self.live]
            ids, positions = torch.tensor(newest, device=self.model.device).T[:, :, None]  # (B, 1) each
            self.hidden = self.model(ids, positions, self.cache)[:, 0]


@dataclass
class _Stop:
    """Says whether a completion is at its end, and notes why."""

    ids: frozenset[int]
    strings: tuple[str, ...]
    tokenizer: Decodes | None
    max_new_tokens: int

    def __post_init__(self):
        if self.strings and (self.tokenizer is None or "" in self.strings):
            raise InputError("stop_strings need a tokenizer, and none of them may be empty")
        self.reach = max((len(string.encode()) for string in self.strings), default=0)
        self.last = tuple(string[-1] for string in self.strings) + ("\ufffd",)  # that: part of a character
        self.pieces: dict[int, str] = {}

    def __call__(self, completion: Completion) -> bool:
        if completion.ids[-1] in self.ids or self.completes_string(completion.ids):
            completion.finish_reason = "stop"
            return True
        return len(completion.ids) >= self.max_new_tokens

    def completes_string(self, ids: list[int]) -> bool:
        """Whether the last token ends a stop string; few tokens can, so the text is seldom decoded."""
        if not self.strings or not any(character in self.piece(ids[-1]) for character in self.last):
            return False
        start, visible = len(ids), 0
        while start > 0 and visible < self.reach:  # a stop string has a byte or more of each token in it
            start -= 1
            visible += self.piece(ids[start]) != ""  # special tokens leave no text
        text = self.tokenizer.decode(ids[start:])
        return any(string in text for string in self.strings)

    def piece(self, token: int) -> str:
        if token not in self.pieces:
            self.pieces[token] = self.tokenizer.decode([token])
        return self.pieces[token]
