"""Tokens by the behavior they belong to: places in the text, and what the verifier makes of an answer."""

import random
from types import SimpleNamespace

import pytest
import torch

from minibridge import igsm, traces
from minibridge.answer import OPENING
from minibridge.data import Prompt
from minibridge.generate import Completion
from minibridge.rollout import Episode
from minibridge.spans import KINDS, behavior_rates, token_ends, token_kinds
from minibridge.verify import verify


def episode_of(tokenizer, text: str) -> Episode:
    ids = tokenizer.encode(text) + [tokenizer.end_of_turn_id]
    return Episode(Prompt([1], "", {}), Completion(ids, [0.0] * len(ids), "stop"), tokenizer.decode(ids), False, False, 0.0)


@pytest.mark.parametrize("text", ["Let x be 12 - 3.\n\n- y = 4", "x × y ≠ 5 — 日本 🙂 é", "a<|im_end|>b\n", ""])
def test_ends_of_tokens(toy, text):
    ids = toy.tokenizer.encode(text)
    ends = token_ends(toy.tokenizer, ids)
    whole = toy.tokenizer.decode(ids)
    assert len(ends) == len(ids) and ends == sorted(ends) and (ends[-1:] or [0]) == [len(whole)]
    for place, end in enumerate(ends):
        piece = toy.tokenizer.decode(ids[:place + 1])
        assert end == len(piece)
        assert piece.endswith("\ufffd") or whole[:end] == piece


@pytest.mark.parametrize("number", range(4))
def test_kinds_are_those_of_the_verifier(toy, number):
    """Every token of an answer whose text lies within one span has its kind, and all kinds occur."""
    problem = igsm.draw(random.Random(number), (15, 20))
    text = traces.answer(problem, random.Random(number), traces.Behaviors(True, 4, 0.5)).removeprefix(OPENING)
    episode = episode_of(toy.tokenizer, text)
    kinds = token_kinds(toy.tokenizer, episode, problem)
    assert len(kinds) == len(episode.completion.ids) and kinds[-1] == KINDS.index("rest")
    ends = [0, *token_ends(toy.tokenizer, episode.completion.ids)]
    inner = {kind: [] for kind in KINDS}
    for part in verify(problem, episode.text).spans():
        inner.setdefault(part.kind, []).append(part)
    silent = {toy.tokenizer.end_of_turn_id}
    for token, end, kind in zip(episode.completion.ids, ends[1:], kinds.tolist()):
        inside = [name for name in ("subgoal", "restatement", "failed attempt") for part in inner[name]
                  if part.start < end <= part.end]  # the smaller ones first
        assert KINDS[kind] == (inside[0] if inside and token not in silent else "rest")
    for name in KINDS:
        assert (kinds == KINDS.index(name)).any()
    pieces = [(text[a:b], KINDS[kind]) for a, b, kind in zip(ends, ends[1:], kinds.tolist())]
    said = {name: "".join(piece for piece, kind in pieces if kind == name) for name in KINDS}
    assert " equals " in said["restatement"] and " equals " not in said["failed attempt"] + said["subgoal"]
    assert "known" in said["failed attempt"] or "go back" in said["failed attempt"]


def test_bytes_of_a_character_belong_where_it_does(toy, monkeypatch):
    """A character of several tokens: the last ones too are a part of the subgoal around it."""
    problem = igsm.draw(random.Random(0), (15, 20))
    episode = episode_of(toy.tokenizer, "3 日 4")
    monkeypatch.setattr("minibridge.spans.verify", lambda problem, text: SimpleNamespace(
        spans=lambda: [SimpleNamespace(kind="subgoal", start=0, end=5)]))
    kinds = token_kinds(toy.tokenizer, episode, problem).tolist()
    assert len(kinds) > 6 and kinds == [KINDS.index("subgoal")] * (len(kinds) - 1) + [KINDS.index("rest")]


def test_rates_are_means_over_answers():
    problems = [igsm.draw(random.Random(number), (15, 20)) for number in range(2)]
    worked = [verify(problem, traces.answer(problem, random.Random(0), traces.Behaviors(True, 4, 0.5)).removeprefix(OPENING))
              for problem in problems]
    found = behavior_rates([*worked, *(verify(problem, "I do not know.") for problem in problems)])
    assert found == {"failed attempts": sum(v.attempts for v in worked) / 4,
                     "restatements": sum(v.restatements for v in worked) / 4,
                     "subgoals": sum(v.subgoals for v in worked) / 4, "right in every step": 0.5}
    assert all(found.values())


def test_a_stop_token_alone_is_rest(toy):
    problem = igsm.draw(random.Random(0), (15, 20))
    kinds = token_kinds(toy.tokenizer, episode_of(toy.tokenizer, ""), problem)
    assert torch.equal(kinds, torch.tensor([KINDS.index("rest")]))
