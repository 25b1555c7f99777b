"""Prompts -> sampled completions -> scored episodes: the one object that RL, evaluation and the analysis share."""
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from minibridge import answer
from minibridge.config import InputError, check_fields, numbered
from minibridge.data import COPIED, Prompt
from minibridge.generate import Completion, generate
from minibridge.model import Decoder
from minibridge.parallel import ALONE, Ranks
from minibridge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Episode:
    """One completion of one prompt and what it earned. `text` is the completion, special tokens left out."""
    prompt: Prompt
    completion: Completion
    text: str
    correct: bool
    well_formed: bool
    reward: float

    def to_dict(self) -> dict:
        """Enough to score it again, to verify its steps, and to train on it again."""
        record = self.prompt.record
        keep = {key: record[key] for key in (*COPIED, "tolerance", "problem") if key in record}
        return {**keep, "answer": self.prompt.answer, "text": self.text, "reward": self.reward, "correct": self.correct,
                "well_formed": self.well_formed, "finish_reason": self.completion.finish_reason,
                "ids": self.completion.ids, "logprobs": [round(logprob, 6) for logprob in self.completion.logprobs]}


def rollout(model: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], samples: int, *, max_new_tokens: int,
            temperature: float = 1.0, format_scale: float = 0.0, rows: int = 64,
            generator: torch.Generator | None = None, seeds: Sequence[int] | None = None,
            compiled: bool = False, ranks: Ranks = ALONE) -> list[list[Episode]]:
    """`samples` episodes for each prompt, grouped by position: two equal prompts are still two groups.

    Sampling is from the full distribution (no top-k or top-p), so that the loss can describe it; temperature 0 is greedy.
    A completion stops at the end-of-turn or end-of-text token. Each of `ranks` samples for its share of the prompts, and
    all get all episodes.
    """
    groups = generate(ranks.sampler(model), [prompt.ids for prompt in ranks.mine(prompts)], samples, max_new_tokens,
                      temperature, stop_ids=tokenizer.stop_ids, generator=generator,
                      seeds=None if seeds is None else ranks.mine(seeds), rows=rows, compiled=compiled)
    groups = ranks.gather([[vars(completion) for completion in group] for group in groups])
    return [[score(prompt, Completion(**found), tokenizer.decode(found["ids"]), format_scale) for found in group]
            for prompt, group in zip(prompts, groups)]


def score(prompt: Prompt, completion: Completion, text: str, format_scale: float = 0.0) -> Episode:
    return Episode(prompt, completion, text, answer.correct(text, prompt.answer, prompt.tolerance),
                   answer.well_formed(text), answer.reward(text, prompt.answer, format_scale, prompt.tolerance))


def rewards(groups: list[list[Episode]]) -> Tensor:
    """(N, G)"""
    return torch.tensor([[episode.reward for episode in group] for group in groups])


def correctness(groups: list[list[Episode]]) -> Tensor:
    """(N, G) of 1 for a right answer and 0, in fp64; format rewards are left out."""
    return torch.tensor([[episode.correct for episode in group] for group in groups], dtype=torch.float64)


def mix(correct: Tensor) -> dict[str, float]:
    """What GRPO can learn from rollouts, by their `correctness` (N, G)."""
    alpha = correct.mean(1)
    return {"accuracy": alpha.mean().item(), "between_0_and_1": ((alpha > 0) & (alpha < 1)).double().mean().item(),
            "root_of_alpha_1_minus_alpha": (alpha * (1 - alpha)).sqrt().mean().item()}


def dead(group: list[Episode]) -> bool:
    """Whether all answers earned exactly the same, so that their advantages are zero."""
    return len({episode.reward for episode in group}) == 1


def refilled(sample: Callable[[int], list[list[Episode]]], count: int, rounds: int) -> list[list[Episode]]:
    """`count` groups; then, in at most `rounds` rounds, as many more as live ones are missing (the dynamic sampling of DAPO,
    arXiv 2503.14476, 3.2): those to train on first, the dead ones last. sample(n) gives n new groups."""
    groups = sample(count)
    for _ in range(rounds):
        missing = count - sum(not dead(group) for group in groups)
        if not missing:
            break
        groups += sample(missing)
    return sorted(groups, key=dead)


def lines(groups: list[list[Episode]]) -> list[dict]:
    """JSONL lines of all episodes; "group" is the position of the prompt."""
    return [{"group": number, **episode.to_dict()} for number, group in enumerate(groups) for episode in group]


def read_episodes(path: str, prompts: list[Prompt]) -> list[list[Episode]]:
    """The groups in a file of `lines`, their prompts found by "id" among `prompts`. InputError("path:line: what")."""
    by_id = {prompt.record.get("id"): prompt for prompt in prompts}
    if len(by_id) < len(prompts) or None in by_id:
        raise InputError("data: its prompts cannot be told apart: some have no id, or two have one")
    groups: dict[int, list[Episode]] = {}
    for where, line in numbered(path):
        _check_line(line, where)
        if (prompt := by_id.get(line["id"])) is None:
            raise InputError(f"{where}: no prompt has the id {line['id']!r}")
        group = groups.setdefault(line["group"], [])
        if group and group[0].prompt is not prompt:
            raise InputError(f"{where}: another prompt than that of its group's first line")
        logprobs = [float(logprob) for logprob in line["logprobs"]]  # others' JSON may have -1 for -1.0
        group.append(Episode(prompt, Completion(line["ids"], logprobs, line["finish_reason"]), line["text"],
                             line["correct"], line["well_formed"], float(line["reward"])))
    if len({len(group) for group in groups.values()}) != 1:
        raise InputError(f"{path}: no groups of one size")
    return list(groups.values())


def _check_line(line: dict, where: str):
    check_fields(line, {"id": (str, int), "group": (int,), "ids": (list,), "logprobs": (list,), "text": (str,), "reward":
                        (float,), "correct": (bool,), "well_formed": (bool,), "finish_reason": (str,)}, where)
    ids, logprobs = line["ids"], line["logprobs"]
    if not ids or len(ids) != len(logprobs):
        raise InputError(f"{where}: {len(ids)} ids and {len(logprobs)} logprobs")
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise InputError(f"{where}: ids must be whole numbers from 0 on")
    if not all(type(number) in (int, float) and abs(number) < 1e9 for number in (*logprobs, line["reward"])):
        raise InputError(f"{where}: reward and logprobs must be numbers, none of them huge")
