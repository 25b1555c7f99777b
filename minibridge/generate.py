"""Sampling completions: prompts in, token ids and their log-probabilities out.

Each prompt is prefilled once, but for its last token, and its samples share its keys and values. A row begins with
that last token; each step runs the newest token of every row and draws the next. Live rows are always the first ones
of the cache: when a row finishes, the last live row moves into its place and the next waiting sample joins at the end.
So no step computes anything for a finished row, with two exceptions: on a GPU one step is under way before the host
hears of the end, and compiled steps round up the number of rows (`KVCache.run_step`). Sampled tokens stay on the
device until their row has finished; each step the host asks only which rows have. Not here: chat format, rewards,
penalties, beam search.

Axes: N prompts of P tokens, B rows, T tokens of an answer at most, C hidden, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor

from minibridge.cache import PromptCache, mark
from minibridge.config import InputError
from minibridge.flash import decoding_cache
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
    text, or after max_new_tokens. (top_p and stop_strings are for callers of your own: no script sets them.)
    `compiled`: steps run as graphs of torch.compile, which take from seconds to minutes to make and are
    worth it for long runs. Raises InputError for a prompt that is empty or, with max_new_tokens, longer than
    the model's max_position_embeddings, and for numbers that nothing can be drawn by.

    Each prompt has a seed of its own for all its samples: what is drawn for it depends neither on the other prompts nor on
    `rows`, but for the rounding of logits. By default the seeds come from `generator` (a CPU one; None: torch's own).
    """
    _check(model, prompts, samples, max_new_tokens, rows, temperature, top_p)
    stop = _Stop(frozenset(stop_ids), tuple(stop_strings), tokenizer, max_new_tokens)
    results = [[Completion() for _ in range(samples)] for _ in prompts]
    if seeds is None:
        seeds = torch.randint(2**63 - 1, (len(prompts),), generator=generator).tolist()
    if len(seeds) != len(prompts):
        raise InputError(f"{len(seeds)} seeds for {len(prompts)} prompts")
    pool = _Pool(model, prompts, results, seeds, rows, stop, (temperature, top_p), compiled)
    while pool.admit():
        pool.advance()
        pool.retire()
    return results


def _check(model: Decoder, prompts, samples: int, max_new_tokens: int, rows: int, temperature: float, top_p: float):
    for name, value in (("samples", samples), ("max_new_tokens", max_new_tokens), ("rows", rows)):
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")
    if temperature != 0 and not 1e-3 <= temperature < math.inf:
        raise InputError(f"temperature must be 0 or at least 0.001, not {temperature}")
    if not 0 < top_p <= 1:
        raise InputError(f"top_p must be above 0 and at most 1, not {top_p}")
    limit = model.config.max_position_embeddings
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            raise InputError(f"prompt {index} is text; the tokenizer makes token ids of it")
        if not len(prompt):
            raise InputError(f"prompt {index} is empty")
        if len(prompt) + max_new_tokens > limit:
            raise InputError(f"prompt {index} of {len(prompt)} tokens and max_new_tokens {max_new_tokens} "
                             f"exceed the model's max_position_embeddings {limit}")


def prefill_batch(rows: int, samples: int, longest: int) -> int:
    """Prompts, of at most `longest` tokens, to run at once: enough for all rows, but no more than keep the device busy."""
    return max(1, min(rows // samples, PREFILL_TOKENS // longest))


def prompt_places(rows: int, samples: int, batch: int, prompts: int) -> int:
    """Prompts to have room for: those just prefilled, and those with live rows. A prompt lives until the last of its samples
    ends, so where that is thrice as long as the mean, three times as many live as fill the rows."""
    return min(min(rows, 3 * -(-rows // samples)) + batch, prompts)


def draw(model: Decoder, hidden: Tensor, newest: Tensor, lengths: Tensor, over: Tensor, ids: Tensor, logprobs: Tensor,
         numbers: Tensor, stops: Tensor, temperature: float, top_p: float):
    """The token after each of the hidden states (B, C) becomes `newest` (B,), and goes to place `lengths` (B,) of ids
    (B, T + 1), as its log-probability does of logprobs (B, T + 1); then `lengths` and `over` (B,) are updated. What is
    drawn for rows already over is discarded. numbers (B, T + 1): uniform ones to draw by; stops (V,): true for stop tokens.
    """
    at = lengths[:, None]  # (B, 1)
    tokens, drawn = sample(model.logits(hidden), temperature, top_p, numbers.gather(1, at)[:, 0])  # (B,), (B,)
    newest.copy_(tokens)
    ids.scatter_(1, at, tokens[:, None])
    logprobs.scatter_(1, at, drawn[:, None])
    lengths += ~over
    over |= stops[tokens] | (lengths >= ids.shape[1] - 1) | ~drawn.isfinite()


@dataclass
class _Prompt:
    """Where the cache has a prompt, how many of its tokens (all but the last), and its unfinished samples."""

    place: int
    length: int
    samples: int


@dataclass
class _Row:
    """A completion in the making, the token it begins with, the uniform numbers (T,) that draw its tokens, and how many
    steps there had been before its first."""

    completion: Completion
    prompt: _Prompt
    first: int
    numbers: Tensor
    born: int = 0


class _Pool:
    """The samples being decoded: live[b] owns row b of the cache and of the tensors here.

    Those stay where they are, so that a step of a GPU can be recorded once and played again.
    """

    def __init__(self, model: Decoder, prompts, results: list[list[Completion]], seeds: Sequence[int], rows: int,
                 stop: "_Stop", how: tuple[float, float], compiled: bool):
        samples = len(results[0]) if results else 1
        self.model, self.rows, self.seeds = model, min(rows, samples * len(prompts)), seeds
        self.stop, self.how, self.compiled = stop, how, compiled
        longest, device = max([2, *map(len, prompts)]) - 1, model.device  # of which at least one is prefilled
        self.batch = prefill_batch(rows, samples, longest)
        self.cache = decoding_cache(
            model.config, prompt_places(rows, samples, self.batch, len(prompts)), longest, self.rows, stop.max_new_tokens,
            model.activation_dtype, device, compiled)
        self.live: list[_Row] = []
        self.prompts: list[_Prompt] = []  # those of live and of waiting rows, in the order of the cache
        self.changed = False  # whether the rows are no longer those that the cache has been told of
        self.steps = 0  # so far
        self.waiting = self._prefill(prompts, results)
        # (B, T + 1): rows that are over draw into the place after their last. The cache may have more rows than ever live:
        # a step may take them for live ones.
        shape = self.cache.answers.shape[2], stop.max_new_tokens + 1
        self.ids, self.logprobs = torch.zeros(shape, dtype=torch.long, device=device), torch.zeros(shape, device=device)
        self.numbers = torch.zeros(shape, dtype=torch.float64, device=device)
        self.newest, self.lengths = (torch.zeros(shape[0], dtype=torch.long, device=device) for _ in range(2))  # (B,)
        self.over = torch.zeros(shape[0], dtype=torch.bool, device=device)
        self.state = self.newest, self.lengths, self.over, self.ids, self.logprobs, self.numbers  # as `draw` takes it
        self.parts: dict[int, list[Tensor]] = {}  # of the state, by the number of first rows
        self.ahead = runs_ahead(device) and not stop.strings
        self.pending: Callable[[], list[bool]] = list  # of the step before the last, if we run ahead, which rows were over
        self.stops = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.stops[[id_ for id_ in stop.ids if 0 <= id_ < len(self.stops)]] = True

    def _prefill(self, prompts, results: list[list[Completion]]) -> Iterator[_Row]:
        """Each sample in order. A batch of prompts is run when the first of its samples is asked for."""
        for start in range(0, len(prompts), self.batch):
            given = [torch.as_tensor(prompt) for prompt in prompts[start : start + self.batch]]
            ids = torch.zeros(len(given), max(2, *map(len, given)) - 1, dtype=torch.long)  # (N, P), padded on the right
            for row, prompt in zip(ids, given):
                row[: len(prompt) - 1] = prompt[:-1]
            filled, first = PromptCache(), len(self.prompts)
            self.model(ids.to(self.model.device), cache=filled)
            self.cache.put_prompts(first, filled)
            self.prompts += [_Prompt(first + n, len(prompt) - 1, len(results[start + n])) for n, prompt in enumerate(given)]
            del filled  # while samples wait, only what the cache holds is needed
            for prompt, tokens, group, seed in zip(self.prompts[first:], given, results[start:], self.seeds[start:]):
                shape, stream = (len(group), self.stop.max_new_tokens), torch.Generator().manual_seed(seed)
                numbers = torch.rand(shape, dtype=torch.float64, generator=stream).to(self.model.device)
                for completion, row in zip(group, numbers):
                    yield _Row(completion, prompt, tokens[-1].item(), row)

    def admit(self) -> bool:
        """Fill the free rows with waiting samples; False when nothing is left to decode."""
        first = len(self.live)
        new = list(islice(self.waiting, self.rows - first))
        if new:
            self.changed, rows = True, slice(first, first + len(new))
            for row in new:
                row.born = self.steps
            self.live += new
            self.numbers[rows, :-1] = torch.stack([row.numbers for row in new])
            self.newest[rows] = torch.tensor([row.first for row in new], device=self.model.device)
            self.lengths[rows], self.over[rows] = 0, False
        return bool(self.live)

    def retire(self):
        """Let go of the rows that have come to their end, and of prompts whose last sample has."""
        ask = deferred(self.over[: len(self.live)])
        if self.ahead:
            ask, self.pending = self.pending, ask
        over = ask()  # the step's one wait
        if self.stop.strings:
            over = [is_over or found for is_over, found in zip(over, self._strings())]
        ended = [b for b, is_over in enumerate(over) if is_over]
        if not ended:
            return
        for b, ids, logprobs, length in zip(ended, *(x[ended].tolist() for x in (self.ids, self.logprobs, self.lengths))):
            self.stop.finish(self.live[b].completion, ids[:length], logprobs[:length])
            self.live[b].prompt.samples -= 1
        self.changed = True
        _close_gaps(self.live, {*ended}, self._move_rows)
        done = {n for n, prompt in enumerate(self.prompts) if not prompt.samples}
        _close_gaps(self.prompts, done, self.cache.move_prompts)
        for n, prompt in enumerate(self.prompts):
            prompt.place = n
        self.pending = deferred(self.over[: len(self.live)])  # the rows are others now

    def advance(self):
        """Run the newest token of every live row, and draw the next."""
        if self.changed:
            self.cache.arrange([row.prompt.place for row in self.live], [prompt.length for prompt in self.prompts])
            self.changed = False
        self.cache.run_step(self._advance, len(self.live), self.steps - min(row.born for row in self.live))
        self.steps += 1

    def _advance(self, rows: int, longest: int):
        """Of the first `rows`; longest: tokens that the longest of the answers has."""
        if rows not in self.parts:
            self.parts[rows] = [tensor[:rows] for tensor in self.state]
            if self.compiled:
                for part in self.parts[rows]:
                    mark(part, *range(part.ndim))
        self.cache.step(self.model, longest, draw, *self.parts[rows], self.stops, *self.how)

    def _strings(self) -> list[bool]:
        """Whether each live row's newest token completes a stop string."""
        for row, token in zip(self.live, self.newest[: len(self.live)].tolist()):
            row.completion.ids.append(token)
        return [self.stop.completes_string(row.completion.ids) for row in self.live]

    def _move_rows(self, sources: list[int], places: list[int]):
        self.cache.move_rows(sources, places)
        for tensor in self.state:
            tensor[places] = tensor[sources]


def runs_ahead(device: torch.device) -> bool:
    """Whether to begin the next step before it is known which rows the last one has ended: on a GPU, which works on by
    itself."""
    return device.type == "cuda"


def deferred(flags: Tensor) -> Callable[[], list[bool]]:
    """To be called for what `flags` are now; on a GPU it waits for what is under way now, and for nothing begun since."""
    copied = flags.to("cpu", non_blocking=True, copy=True)
    if not flags.is_cuda:
        return copied.tolist
    now = torch.cuda.Event()
    now.record()

    def ask() -> list[bool]:
        now.synchronize()
        return copied.tolist()

    return ask


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
    """What ends a completion, and what is noted of its end."""

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

    def finish(self, completion: Completion, ids: list[int], logprobs: list[float]):
        if not math.isfinite(logprobs[-1]):
            raise InputError("the model's logits are not finite: its weights are broken")
        completion.ids, completion.logprobs = ids, logprobs
        if ids[-1] in self.ids or self.completes_string(ids):
            completion.finish_reason = "stop"

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
