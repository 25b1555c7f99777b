"""Sampling completions: prompts in, token ids and their log-probabilities out.

Each prompt is prefilled once and its samples share its keys and values. Live rows are always the first ones of the
cache: when a row finishes, the last live row moves into its place and the next waiting sample joins at the end, so no
step computes anything for a finished row. Not here: chat format, rewards, penalties, beam search.

Axes: N prompts of P tokens, B rows, C hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from minibridge.cache import KVCache, PromptCache
from minibridge.config import InputError
from minibridge.model import Decoder
from minibridge.sampling import sample


PREFILL_TOKENS = 2**14  # beyond this, more at once take memory and save no time


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
    seeds: Sequence[int] | None = None,
    rows: int = 64,
    compiled: bool = False,
) -> list[list[Completion]]:
    """`samples` completions of each prompt (token ids), in the order of the prompts, `rows` at a time.

    Tokens are drawn from softmax(logits / temperature), cut to its top_p nucleus (arXiv 1904.09751);
    temperature 0 takes the most likely token and gives its log-probability under softmax(logits). A
    completion ends with one of stop_ids, with the token that completes one of stop_strings in the decoded
    text, or after max_new_tokens. `compiled`: each step is one graph of torch.compile, which takes from
    some seconds to minutes to make and is worth it for long runs. Raises InputError for a prompt that is empty or, with
    max_new_tokens, longer than the model's max_position_embeddings.

    Each prompt has a seed of its own for all its samples: what is drawn for it depends neither on the other prompts nor on
    `rows`, but for the rounding of logits. By default the seeds come from `generator` (a CPU one; None: torch's own).
    """
    _check(model, prompts, samples, max_new_tokens, rows)
    stop = _Stop(frozenset(stop_ids), tuple(stop_strings), tokenizer, max_new_tokens)
    results = [[Completion() for _ in range(samples)] for _ in prompts]
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
    pool = _Pool(model, prompts, results, seeds, rows, max_new_tokens, compiled)
    while pool.admit():
        tokens, logprobs = sample(model.logits(pool.hidden), temperature, top_p, pool.uniform())  # (B,), (B,)
        drawn = torch.stack((tokens.double(), logprobs.double())).tolist()  # the step's one wait
        if not all(map(math.isfinite, drawn[1])):
            raise InputError("the model's logits are not finite: its weights are broken")
        for row, token, logprob in zip(pool.live, *drawn):
            row.completion.ids.append(int(token))
            row.completion.logprobs.append(logprob)
        pool.retire(stop)
        pool.advance()
    return results


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


def prefill_batch(rows: int, samples: int, longest: int) -> int:
    """Prompts, of at most `longest` tokens, to run at once: enough for all rows, but no more than keep the device busy."""
    return max(1, min(rows // samples, PREFILL_TOKENS // longest))


@dataclass
class _Prompt:
    """A prefilled prompt: where the cache has it, the hidden state (C,) of its last token, its unfinished samples."""

    place: int
    length: int
    hidden: Tensor
    samples: int


@dataclass
class _Row:
    """A completion in the making, and the uniform numbers (T,) that draw its tokens."""

    completion: Completion
    prompt: _Prompt
    numbers: Tensor


class _Pool:
    """The samples being decoded: live[b] owns row b of the cache; its token number said[b] is drawn from hidden[b]."""

    def __init__(self, model: Decoder, prompts, results: list[list[Completion]], seeds: Sequence[int], rows: int,
                 max_new_tokens: int, compiled: bool):
        samples = len(results[0]) if results else 1
        self.model, self.rows, self.seeds = model, min(rows, samples * len(prompts)), seeds
        longest = max(map(len, prompts), default=1)
        self.batch = prefill_batch(rows, samples, longest)
        self.cache = KVCache(model.config, min(-(-rows // samples) + self.batch, len(prompts)), longest,
                             self.rows, max_new_tokens, model.activation_dtype, model.device, compiled)
        self.live: list[_Row] = []
        self.prompts: list[_Prompt] = []  # those of live and of waiting rows, in the order of the cache
        self.changed = False  # whether the rows are no longer those that the cache has been told of
        self.waiting = self._prefill(prompts, results)
        self.hidden = torch.empty(0, model.config.hidden_size).to(model.device, model.activation_dtype)
        self.said = torch.empty(0, dtype=torch.long, device=model.device)
        self.numbers = torch.empty(self.rows, max_new_tokens, dtype=torch.float64, device=model.device)

    def _prefill(self, prompts, results: list[list[Completion]]) -> Iterator[_Row]:
        """Each sample in order. A batch of prompts is run when the first of its samples is asked for."""
        for start in range(0, len(prompts), self.batch):
            lengths = [len(prompt) for prompt in prompts[start : start + self.batch]]
            ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)  # (N, P), padded on the right
            for n, length in enumerate(lengths):
                ids[n, :length] = torch.as_tensor(prompts[start + n])
            filled, first = PromptCache(), len(self.prompts)
            hidden = self.model(ids.to(self.model.device), cache=filled)  # (N, P, C)
            self.cache.put_prompts(first, filled)
            self.prompts += [_Prompt(first + n, length, hidden[n, length - 1].clone(), len(results[start + n]))
                             for n, length in enumerate(lengths)]
            del filled, hidden  # while samples wait, only the ends and what the cache holds are needed
            for prompt, group, seed in zip(self.prompts[first:], results[start:], self.seeds[start:]):
                shape, stream = (len(group), self.numbers.shape[1]), torch.Generator().manual_seed(seed)
                numbers = torch.rand(shape, dtype=torch.float64, generator=stream).to(self.model.device)
                for completion, row in zip(group, numbers):
                    yield _Row(completion, prompt, row)

    def admit(self) -> bool:
        """Fill the free rows with waiting samples; False when nothing is left to decode."""
        new = list(islice(self.waiting, self.rows - len(self.live)))
        for row in new:
            self.numbers[len(self.live)] = row.numbers
            self.live.append(row)
        self.changed |= bool(new)
        self.hidden = torch.cat((self.hidden, *(row.prompt.hidden[None] for row in new)))  # (B, C)
        self.said = torch.cat((self.said, self.said.new_zeros(len(new))))  # (B,)
        return bool(self.live)

    def uniform(self) -> Tensor:
        """The number in [0, 1) that draws the next token of each live row: (B,)."""
        return self.numbers[: len(self.live)].gather(1, self.said[:, None])[:, 0]

    def retire(self, stop: "_Stop"):
        """Let go of the rows that have come to their end, and of prompts whose last sample has."""
        ended = {b for b, row in enumerate(self.live) if stop(row.completion)}
        for b in ended:
            self.live[b].prompt.samples -= 1
        if ended:
            self.changed = True
            _close_gaps(self.live, ended, self.move_rows)
            over = {n for n, prompt in enumerate(self.prompts) if not prompt.samples}
            _close_gaps(self.prompts, over, self.cache.move_prompts)
            for n, prompt in enumerate(self.prompts):
                prompt.place = n

    def move_rows(self, sources: list[int], places: list[int]):
        self.cache.move_rows(sources, places)
        self.numbers[places] = self.numbers[sources]

    def advance(self):
        """Run the newest token of every live row."""
        self.hidden, self.said = self.hidden[:0], self.said[:0]
        if not self.live:
            return
        if self.changed:
            self.cache.arrange([row.prompt.place for row in self.live], [prompt.length for prompt in self.prompts])
            self.changed = False
        said = [len(row.completion.ids) for row in self.live]
        newest = [[row.completion.ids[-1], row.prompt.length + n - 1, n] for row, n in zip(self.live, said)]
        ids, positions, self.said = torch.tensor(newest, device=self.model.device).T  # (B,) each
        self.hidden = self.cache.step(self.model, ids, positions, longest=max(said) - 1)


def _close_gaps(items: list, gone: set[int], move: Callable[[list[int], list[int]], None]):
    """Takes the items at `gone` out of the list by moving the last ones there; `move` does the same elsewhere."""
    kept = len(items) - len(gone)
    gaps = sorted(index for index in gone if index < kept)
    sources = [index for index in range(kept, len(items)) if index not in gone]
    if gaps:
        move(sources, gaps)
    for gap, source in zip(gaps, sources):
        items[gap] = items[source]
    del items[kept:]


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
