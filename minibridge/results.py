"""What the comparison of arms found: accuracy before and after RL, gains and their intervals, behaviors in the answers.

Answers are files FOLDER/STAGE_ARM_TEST_DECODING.jsonl of one seed's folder, as `reproduce` leaves them.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from minibridge import evaluate
from minibridge.arms import AUGMENTED, parts_of
from minibridge.arms import BEHAVIORS as INJECTED
from minibridge.config import read_jsonl
from minibridge.tables import Table, markdown, t_quantile

STAGES, DECODINGS = ("sft", "rl"), ("greedy", "sampled")
BEHAVIORS = {"attempts": "attempts", "restated": "analyses", "subgoals": "subgoals", "every step right": "correct"}
CURVES = ("accuracy", "length", "common_answer", "dead_groups", "root_of_alpha_1_minus_alpha", "entropy", "grad_norm")


@dataclass(frozen=True)
class Outcome:
    """One arm's answers to one test, of one seed, before and after RL: problem by problem."""
    seed: int
    arm: str
    test: str  # its title
    decoding: str
    before: list[evaluate.Scored] = field(repr=False)
    after: list[evaluate.Scored] = field(repr=False)
    tokens: tuple[float, float]

    @property
    def accuracy(self) -> tuple[float, float]:
        return evaluate.accuracy(self.before), evaluate.accuracy(self.after)

    @property
    def changes(self) -> list[float]:
        return [evaluate.accuracy([b]) - evaluate.accuracy([a]) for a, b in zip(self.before, self.after, strict=True)]

    def rows(self) -> Table:
        """For a CSV file, a row a stage."""
        where = {"seed": self.seed, "arm": self.arm, "test": self.test, "decoding": self.decoding}
        return [{**where, "stage": stage, "problems": len(scored), "accuracy": share, "tokens": tokens,
                 "accuracy, answer not 0": accuracy_of([problem for problem in scored if problem.answer != "0"]),
                 **behaviors(scored)}
                for stage, scored, share, tokens in zip(STAGES, (self.before, self.after), self.accuracy, self.tokens)]


def outcomes(seed: int, folder: Path, arms: Sequence[str], tests: dict[str, str]) -> list[Outcome]:
    """tests: the titles of the test sets by their names in the files."""
    found = []
    for arm in arms:
        for test, said in tests.items():
            for decoding in DECODINGS:
                paths = [folder / f"{stage}_{arm}_{test}_{decoding}.jsonl" for stage in STAGES]
                tokens = tuple(mean(len(line["ids"]) for line in read_jsonl(path)) for path in paths)
                found.append(Outcome(seed, arm, said, decoding, *(evaluate.rescore(str(path)) for path in paths), tokens))
    return found


def accuracy_of(scored: list[evaluate.Scored]) -> float | None:
    return evaluate.accuracy(scored) if scored else None


def behaviors(scored: list[evaluate.Scored]) -> dict[str, float]:
    """What the answers show, per answer, by the verifier."""
    verdicts = [verdict for problem in scored for verdict in problem.verdicts]
    return {name: mean(getattr(verdict, attribute) for verdict in verdicts) for name, attribute in BEHAVIORS.items()}


def interval(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of numbers of the problems of each seed, and the half width of its 95% interval (Student's t): over the problems
    of a single seed, or over the means of several seeds, each of which has problems and training of its own."""
    values = seeds[0] if len(seeds) == 1 else [mean(numbers) for numbers in seeds]
    return mean(values), t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))


def table(found: list[Outcome]) -> str:
    """Of each arm and test: accuracy before and after RL, its gain, and by how much that is more than the gain of the first
    arm, on the same problems. The paper's accuracy is greedy; RL raises that of sampled answers."""
    by = {(o.test, o.decoding, o.arm, o.seed): o for o in found}
    tests, arms, seeds = (list(dict.fromkeys(getattr(o, name) for o in found)) for name in ("test", "arm", "seed"))
    rows, lucky = [], []
    for test in tests:
        for decoding in DECODINGS:
            for arm in arms:
                rows.append({"arm": arm, "test": test, "answers": decoding,
                             **row([by[test, decoding, arm, seed] for seed in seeds],
                                   [by[test, decoding, arms[0], seed] for seed in seeds])})
        constants = [evaluate.best_constant(by[test, DECODINGS[0], arms[0], seed].before) for seed in seeds]
        lucky.append(f"{test}: {mean(share for _, share in constants):.1%}")
    shown = [{"arm": arm, "after": stage.upper(), "answers": f"{tests[0]}, {decoding}", **averaged}
             for decoding in DECODINGS for arm in arms for stage in STAGES
             for averaged in [averages([by[tests[0], decoding, arm, seed] for seed in seeds], stage)]]
    crossed = effects(found)
    return "\n".join([markdown(rows), "", f"Best constant answer, {'; '.join(lucky)}", "", markdown(shown),
                      *(["", markdown(crossed)] if crossed else [])])


def effects(found: list[Outcome]) -> Table:
    """What each behavior adds to the RL gain, if every combination of the three is an arm: the mean gain of the four arms that
    have it less that of the four that do not, so that each training serves all three comparisons (a 2 x 2 x 2 design)."""
    parts = {outcome.arm: frozenset(parts_of(outcome.arm)) for outcome in found if outcome.arm not in AUGMENTED}
    arms = {behaviors: arm for arm, behaviors in parts.items() if behaviors <= set(INJECTED)}
    if len(arms) < 2 ** len(INJECTED):
        return []
    changes = {(o.test, o.decoding, o.seed, o.arm): o.changes for o in found}
    tests, seeds = dict.fromkeys((o.test, o.decoding) for o in found), dict.fromkeys(o.seed for o in found)
    rows = []
    for behavior in INJECTED:
        for test, decoding in tests:
            sides = [[[mean(problem) for problem in zip(*(changes[test, decoding, seed, arm] for behaviors, arm in arms.items()
                                                          if (behavior in behaviors) == having))] for seed in seeds]
                     for having in (True, False)]
            more, reach = interval([[a - b for a, b in zip(*both)] for both in zip(*sides)])
            rows.append({"behavior": behavior, "test": test, "answers": decoding,
                         **{name: f"{interval(side)[0]:+.1%}" for name, side in zip(("gain with", "without"), sides)},
                         "more": f"{more:+.1%}", "95% interval": around(more, reach)})
    return rows


def title(test: str, ops: tuple[int, int]) -> str:
    return f"{test}, {ops[0]} ops" if ops[0] == ops[1] else f"{test}, {ops[0]}-{ops[1]} ops"


def row(outcomes: list[Outcome], first: list[Outcome]) -> dict[str, str]:
    gain, reach = interval([outcome.changes for outcome in outcomes])
    before, after = (mean(outcome.accuracy[stage] for outcome in outcomes) for stage in (0, 1))
    cells = {"after SFT": f"{before:.1%}", "after RL": f"{after:.1%}", "RL gain": f"{gain:+.1%}",
             "95% interval": around(gain, reach)}
    if outcomes[0].arm != first[0].arm:
        more, reach = interval([[a - b for a, b in zip(one.changes, other.changes, strict=True)]
                                for one, other in zip(outcomes, first)])
        cells |= {f"more than {first[0].arm}": f"{more:+.1%}", "interval": around(more, reach)}
    else:
        cells |= {f"more than {first[0].arm}": "", "interval": ""}
    tokens = (mean(outcome.tokens[stage] for outcome in outcomes) for stage in (0, 1))
    return cells | {"tokens": " -> ".join(f"{count:.0f}" for count in tokens)}


def around(value: float, reach: float) -> str:
    """An interval, if the values differed at all: that few were alike says nothing of others."""
    return f"{value - reach:+.1%} to {value + reach:+.1%}" if reach else ""


def averages(outcomes: list[Outcome], stage: str) -> dict[str, float]:
    """Behaviors per answer, over all seeds."""
    shown = [behaviors(outcome.before if stage == STAGES[0] else outcome.after) for outcome in outcomes]
    return {name: mean(each[name] for each in shown) for name in BEHAVIORS}


def curves(runs: Sequence[tuple[int, Path]], arms: Sequence[str]) -> Table:
    """The training curves, one row a step."""
    return [{"seed": seed, "arm": arm, "step": line["step"], **{name: line[name] for name in CURVES}}
            for seed, folder in runs for arm in arms for line in read_jsonl(folder / f"rl_{arm}" / "metrics.jsonl")
            if "accuracy" in line]  # not what the validation before the first step found
