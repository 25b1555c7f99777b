"""Which tokens of a sampled answer belong to which behavior, by the verifier, and how much of each there is."""
from collections.abc import Sequence

import torch
from torch import Tensor

from minibridge.dag import Problem
from minibridge.rollout import Episode
from minibridge.tokenizer import Tokenizer
from minibridge.verify import FAILED_ATTEMPT, RESTATEMENT, SUBGOAL, Verdict, verify

KINDS = (FAILED_ATTEMPT, RESTATEMENT, SUBGOAL, "rest")
REST = KINDS.index("rest")
# What is counted of behaviors in answers, by its name in every table: the property of `Verdict`.
COUNTED = {"failed attempts": "attempts", "restatements": "restatements", "subgoals": "subgoals",
           "right in every step": "correct"}


def token_ends(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Where the text of each token ends in tokenizer.decode(ids). Special tokens have no text; a token that begins a
    character and does not end it counts as one character."""
    ends, first, before = [], 0, 0
    for place in range(len(ids)):
        piece = tokenizer.decode(ids[first:place + 1])
        ends.append(before + len(piece))
        if not piece.endswith("\ufffd"):  # whole characters: what follows is decoded apart, so text takes linear time
            first, before = place + 1, ends[-1]
    return ends


def token_kinds(tokenizer: Tokenizer, episode: Episode, problem: Problem) -> Tensor:
    """(T,) indices into KINDS: the kind of text that a token's last character belongs to. A restatement within a failed
    attempt is a restatement; what has no text, such as the stop token, is the rest."""
    kinds = [REST] * len(episode.text)
    for part in verify(problem, episode.text).spans():  # the parts of a step come after it
        if part.kind in KINDS:
            kinds[part.start:part.end] = [KINDS.index(part.kind)] * (part.end - part.start)
    ids = episode.completion.ids
    silent = {token for token in set(ids) if not tokenizer.decode([token])}
    return torch.tensor([REST if token in silent else kinds[end - 1] for token, end in zip(ids, token_ends(tokenizer, ids))])


def behavior_rates(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """What answers show, per answer, and the share of them that is right in every step."""
    return {name: sum(getattr(verdict, field) for verdict in verdicts) / len(verdicts) for name, field in COUNTED.items()}
