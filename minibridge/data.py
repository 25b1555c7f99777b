"""JSONL records to ids and masks to batches.

    load_sft       {"messages": [system, user, assistant], ...}     ->  Example(ids, mask)
    load_prompts   {"prompt": [system, user], "answer": "24", ...}  ->  Prompt(ids, answer, record)
    index_stream   which examples make up optimizer step k, by (seed, k) alone: resuming is exact
    prompt_stream  the same for RL: (index, sampling seed) of each prompt
    micro_batches  how a step's examples are split to fit the memory; the loss must not depend on it

The mask goes with the ids, not with the predictions: hidden state t predicts token t + 1, so the targets are
`ids[:, 1:]` and their weights `mask[:, 1:]`.
"""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from minibridge.answer import check_scoring
from minibridge.config import InputError, check_fields, numbered
from minibridge.tokenizer import Tokenizer


COPIED = {"id": (str, int, None), "task": (str, int, None), "num_ops": (int, None)}  # into every line written about a prompt


@dataclass(frozen=True)
class Example:
    """One row to train on: `mask[t]` is 1 where token t is to be learned; both of the same length."""

    ids: list[int]
    mask: list[int]


@dataclass(frozen=True)
class Prompt:
    """One problem to sample answers for. `ids` end with the opening tag; `record` is the whole JSONL line."""

    ids: list[int]
    answer: str
    record: dict

    @property
    def tolerance(self) -> float:
        """Relative error up to which an answer counts as right; 0: it must be the very text."""
        return self.record.get("tolerance", 0.0)


def load_sft(
    path: str | Path, tokenizer: Tokenizer, max_length: int, whole_chat: bool = False, truncate: bool = False,
    first: int | None = None, limit: str = "of --max-length"
) -> list[Example]:
    """Read SFT lines; a bad line, or one longer than `max_length` tokens (`limit`: whose): InputError "path:line: what".

    whole_chat: learn the system and user turns too, as the authors' trainer does; the default learns the completion.
    truncate: cut long examples on the right, as the authors' trainer does. The model then never sees their answer.
    first: so many lines only.
    """
    examples = []
    for where, record in numbered(path)[:first]:
        messages = _messages(record, "messages", ("user", "assistant"), where)
        try:
            ids, mask = tokenizer.encode_example(messages)
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
        if len(ids) > max_length and not truncate:
            raise InputError(f"{where}: {len(ids)} tokens, more than the {max_length} {limit}")
        mask = [1] * len(ids) if whole_chat else mask
        if 1 not in mask[1:max_length]:
            raise InputError(f"{where}: nothing is left to learn within {max_length} tokens")
        examples.append(Example(ids[:max_length], mask[:max_length]))
    return examples


def load_prompts(path: str | Path, tokenizer: Tokenizer, max_prompt: int,
                 limit: str = "that max_prompt, or max_new_tokens and the model's positions, allow") -> list[Prompt]:
    """Read RL lines; a bad line, or one longer than `max_prompt` tokens (`limit`: whose): InputError "path:line: what"."""
    prompts = []
    for where, record in numbered(path):
        messages = _messages(record, "prompt", ("user",), where)
        check_scoring(record, where)
        check_fields(record, COPIED, where)
        ids = tokenizer.encode_prompt(messages)
        if len(ids) > max_prompt:
            raise InputError(f"{where}: a prompt of {len(ids)} tokens, more than the {max_prompt} {limit}")
        prompts.append(Prompt(ids, record["answer"], record))
    return prompts


def _messages(record: dict, field: str, roles: tuple[str, ...], where: str) -> list[dict]:
    """record[field], checked: the given roles in order, after a system message or none, each with a text."""
    messages = record.get(field)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise InputError(f"{where}: field {field!r} must be a list of messages")
    found = tuple(message.get("role") for message in messages)
    if found not in (roles, ("system", *roles)):
        raise InputError(f"{where}: the roles of {field!r} must be {('system', *roles)}, not {found}")
    if not all(isinstance(message.get("content"), str) for message in messages):
        raise InputError(f"{where}: every message of {field!r} needs a text in 'content'")
    return messages


def batches(count: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices 0 .. count-1, shuffled by (seed, epoch), in batches; an incomplete last one is dropped."""
    if not 1 <= batch_size <= count:
        raise InputError(f"a batch of {batch_size} cannot be made from {count} examples")
    order = list(range(count))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return [order[start : start + batch_size] for start in range(0, count - batch_size + 1, batch_size)]


def index_stream(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[list[int]]:
    """Batches `start`, `start` + 1, ... without end, epoch after epoch. Batch k depends on (seed, k) only."""
    epoch, done = divmod(start, len(batches(count, batch_size, seed, 0)))
    epochs = (batches(count, batch_size, seed, number) for number in itertools.count(epoch))
    return itertools.islice(itertools.chain.from_iterable(epochs), done, None)


def prompt_stream(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[tuple[int, int]]:
    """(index, sampling seed) of the prompts at positions `start`, `start` + 1, ... of `index_stream`."""
    batch, done = divmod(start, batch_size)
    indices = itertools.chain.from_iterable(index_stream(count, batch_size, seed, batch))
    for position, index in enumerate(itertools.islice(indices, done, None), start):
        yield index, sample_seed(seed, "rollout", position)


def sample_seed(seed: int, purpose: str, position: int) -> int:
    """Seed of one prompt's samples; it depends on the prompt's position alone, not on what was drawn before."""
    return random.Random(f"{seed}/{purpose}/{position}").getrandbits(63)


def micro_batches(examples: Sequence[Example], max_tokens: int) -> list[list[int]]:
    """Split the indices into pieces of rows x longest row <= `max_tokens`, each index in exactly one.

    Longest first: rows of like length lie together, so little is padding; lack of memory shows at once.
    """
    lengths = [len(example.ids) for example in examples]
    pieces: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if lengths[index] > max_tokens:
            raise InputError(f"micro_tokens: a row of {lengths[index]} tokens does not fit into {max_tokens}")
        # The first row of a piece is its longest.
        if pieces and (len(pieces[-1]) + 1) * lengths[pieces[-1][0]] <= max_tokens:
            pieces[-1].append(index)
        else:
            pieces.append([index])
    return pieces
