"""Prompts -> sampled completions -> scored episodes: the one object that RL, evaluation and the analysis share."""
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from minibridge import answer
from minibridge.data import Example, Prompt
from minibridge.generate import Completion, generate
from minibridge.model import Decoder
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

    def example(self) -> Example:
        """The ids to train on: the prompt masked out, every sampled token in, the stop token too. The mask comes from
        lengths: a sampled token that happens to equal the padding is trained like any other."""
        ids = self.completion.ids
        return Example(self.prompt.ids + ids, [0] * len(self.prompt.ids) + [1] * len(ids))

    def to_dict(self) -> dict:
        """Enough to score it again, and to train on it again."""
        keep = {key: self.prompt.record[key] for key in ("id", "task", "num_ops", "tolerance") if key in self.prompt.record}
        return {**keep, "answer": self.prompt.answer, "text": self.text, "reward": self.reward, "correct": self.correct,
                "well_formed": self.well_formed, "finish_reason": self.completion.finish_reason,
                "ids": self.completion.ids, "logprobs": [round(logprob, 6) for logprob in self.completion.logprobs]}


def rollout(model: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], samples: int, *, max_new_tokens: int,
            temperature: float = 1.0, format_scale: float = 0.0, rows: int = 64,
            generator: torch.Generator | None = None, seeds: Sequence[int] | None = None,
            compiled: bool = False) -> list[list[Episode]]:
    """`samples` episodes for each prompt, grouped by position: two equal prompts are still two groups.

    Sampling is from the full distribution (no top-k or top-p), so that the loss can describe it; temperature 0 is greedy.
    A completion stops at the end-of-turn or end-of-text token.
    """
    groups = generate(model, [prompt.ids for prompt in prompts], samples, max_new_tokens, temperature,
                      stop_ids=tokenizer.stop_ids, generator=generator, seeds=seeds, rows=rows,
                      compiled=compiled)
    return [[score(prompt, completion, tokenizer.decode(completion.ids), format_scale) for completion in group]
            for prompt, group in zip(prompts, groups)]


def score(prompt: Prompt, completion: Completion, text: str, format_scale: float = 0.0) -> Episode:
    return Episode(prompt, completion, text, answer.correct(text, prompt.answer, prompt.tolerance),
                   answer.well_formed(text), answer.reward(text, prompt.answer, format_scale, prompt.tolerance))


def lines(groups: list[list[Episode]]) -> list[dict]:
    """JSONL lines of all episodes; "group" is the position of the prompt."""
    return [{"group": number, **episode.to_dict()} for number, group in enumerate(groups) for episode in group]
