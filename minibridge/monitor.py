"""What a step's rollouts look like, for the log of train_rl.py; docs/manual.md explains every figure."""
from collections import Counter

from minibridge import spans
from minibridge.answer import extract
from minibridge.config import printable
from minibridge.dag import problem_in
from minibridge.rollout import Episode, correctness, dead, mix
from minibridge.verify import verify

VERIFIED = 128  # answers verified per step, but at least one for each prompt


def describe(groups: list[list[Episode]]) -> dict[str, float]:
    """What the rollouts look like, before any training on them."""
    episodes = [episode for group in groups for episode in group]

    def mean(values) -> float:
        return sum(values) / len(episodes)

    answers = Counter(text for episode in episodes if (text := extract(episode.text)) is not None)
    return {
        **mix(correctness(groups)),
        "reward": mean(episode.reward for episode in episodes),
        "well_formed": mean(episode.well_formed for episode in episodes),
        "length": mean(len(episode.completion.ids) for episode in episodes),
        "truncated": mean(episode.completion.finish_reason == "length" for episode in episodes),
        "common_answer": max(answers.values(), default=0) / len(episodes),
        "dead_groups": sum(map(dead, groups)) / len(groups),
    }


def wasted(groups: list[list[Episode]], mask_truncated: bool = False) -> float:
    """Share of the sampled tokens that no gradient of a reward comes from: answers of dead groups, and with
    mask_truncated those cut off; what --kl-threshold drops later is not counted."""
    def tokens(groups) -> int:
        return sum(len(episode.completion.ids) for group in groups for episode in group
                   if not (mask_truncated and episode.completion.finish_reason == "length"))

    sampled = sum(len(episode.completion.ids) for group in groups for episode in group)
    return 1 - tokens(group for group in groups if not dead(group)) / sampled


def behaviors(groups: list[list[Episode]], data: str) -> dict[str, float]:
    """What some answers to each prompt show: the verifier takes milliseconds for each. data: their file, to name it."""
    some = max(1, VERIFIED // len(groups))
    problems = [problem_in(group[0].prompt.record, data) for group in groups]
    if None in problems:
        return {}
    verdicts = [verify(problem, episode.text) for group, problem in zip(groups, problems) for episode in group[:some]]
    return {name.replace(" ", "_"): rate for name, rate in spans.behavior_rates(verdicts).items()}


def show(groups: list[list[Episode]]):
    """Two rollouts in full, a right and a wrong one if there are both."""
    episodes = sorted((episode for group in groups for episode in group), key=lambda episode: -episode.correct)
    for episode in (episodes[0], episodes[-1]):
        question = episode.prompt.record["prompt"][-1]["content"]
        told = f"--- reward {episode.reward:g}, right answer {episode.prompt.answer}\n{question}\n{episode.text}"
        print(printable(told), flush=True)
