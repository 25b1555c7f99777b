"""What the comparison of arms found: accuracy before and after RL, gains and their intervals, behaviors in the answers.

Answers are files FOLDER/STAGE_ARM_TEST_DECODING.jsonl of one seed's folder, as `reproduce` leaves them.
"""
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev

from minibridge import evaluate
from minibridge.arms import AUGMENTED, IN_BRIDGE, parts_of
from minibridge.config import InputError, check_fields, numbered, read_jsonl
from minibridge.spans import behavior_rates
from minibridge.tables import Table, half_width, markdown

STAGES, DECODINGS = ("sft", "rl"), ("greedy", "sampled")
CURVES = ("accuracy", "length", "common_answer", "dead_groups", "root_of_alpha_1_minus_alpha", "entropy", "grad_norm",
          "val_accuracy")


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
        return [{**where, "stage": stage, "problems": len(scored), "tokens": tokens,
                 **dict(zip(("accuracy", "low", "high"), evaluate.estimate(scored))),
                 "accuracy, answer not 0": accuracy_of([problem for problem in scored if problem.answer != "0"]),
                 **shown(scored)}
                for stage, scored, tokens in zip(STAGES, (self.before, self.after), self.tokens)]


def outcomes(seed: int, folder: Path, arms: Sequence[str], tests: dict[str, str]) -> list[Outcome]:
    """tests: the titles of the test sets by their names in the files."""
    found, files = [], {test: folder / f"test_{test}.jsonl" for test in tests}
    right = {test: [line.get("answer") for _, line in numbered(path)] for test, path in files.items()}
    for arm, (test, said), decoding in itertools.product(arms, tests.items(), DECODINGS):
        paths = [folder / f"{stage}_{arm}_{test}_{decoding}.jsonl" for stage in STAGES]
        (before, tokens), (after, tokens_after) = map(answers, paths)
        for path, scored in zip(paths, (before, after)):
            if [problem.answer for problem in scored] != right[test]:
                raise InputError(f"{path}: not answers to the problems of {files[test]}, one after another")
        found.append(Outcome(seed, arm, said, decoding, before, after, (tokens, tokens_after)))
    return found


def answers(path: Path) -> tuple[list[evaluate.Scored], float]:
    """Saved answers, scored, and their mean length in tokens. InputError for lines that are not whole."""
    scored, lines = evaluate.rescore(str(path)), numbered(path)
    for where, line in lines:
        check_fields(line, {"ids": (list,), "problem": (dict,)}, where)
    return scored, mean(len(line["ids"]) for _, line in lines)


def accuracy_of(scored: list[evaluate.Scored]) -> float | None:
    return evaluate.accuracy(scored) if scored else None


def shown(scored: list[evaluate.Scored]) -> dict[str, float]:
    """Behaviors in the answers, by the verifier."""
    return behavior_rates([verdict for problem in scored for verdict in problem.verdicts])


def mean_and_reach(seeds: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Mean of numbers of the problems of each seed, and the half width of its 95% interval (Student's t): over the problems
    of a single seed, or over the means of several seeds, each of which has problems and training of its own."""
    values = seeds[0] if len(seeds) == 1 else [mean(numbers) for numbers in seeds]
    return mean(values), half_width(stdev(values), len(values))


def table(found: list[Outcome]) -> str:
    """Of each arm and test: accuracy before and after RL, its gain, and by how much that is more than the gain of the first
    arm, on the same problems. The paper's accuracy is greedy; RL raises that of sampled answers."""
    rows = [{"arm": ours[0].arm, "test": ours[0].test, "answers": ours[0].decoding, **row(ours, first)}
            for ours, first in compared(found)]
    tests = list(dict.fromkeys(outcome.test for outcome in found))
    lucky = [f"{test}: {mean(evaluate.best_constant(o.before)[1] for o in found if o.test == test):.1%}" for test in tests]
    behaviors = [{"arm": ours[0].arm, "after": stage.upper(), "answers": f"{tests[0]}, {ours[0].decoding}",
                  **averages(ours, stage)}
                 for ours, _ in compared(found) if ours[0].test == tests[0] for stage in STAGES]
    crossed, seeds = effects(found), len({outcome.seed for outcome in found})
    over = f"{seeds} seeds (Student's t)" if seeds > 1 else "the problems of one seed (how much seeds differ is not in them)"
    return "\n".join([markdown(rows), "", f"95% intervals: of the gain, and of how much more it is; over {over}.",
                      f"Best constant answer, {'; '.join(lucky)}", "",
                      "Behaviors per answer, and the share of answers that are right in every step:", "",
                      markdown(behaviors), *(["", markdown(crossed)] if crossed else [])])


def gains(found: list[Outcome]) -> Table:
    """What `table` says of RL gains, in numbers, for a CSV file; "+-" is half the width of a 95% interval."""
    return [{"arm": ours[0].arm, "test": ours[0].test, "decoding": ours[0].decoding, "gain": gain,
             "gain +-": reach, "more": more, "more +-": more_reach}
            for ours, first in compared(found) for (gain, reach), (more, more_reach) in [gain_of(ours, first)]]


def compared(found: list[Outcome]) -> list[tuple[list[Outcome], list[Outcome]]]:
    """For each test, decoding and arm in turn: its outcomes, one a seed, and those of the first arm with the same seeds."""
    by: dict[tuple[str, str], dict[str, list[Outcome]]] = {}
    for outcome in found:
        by.setdefault((outcome.test, outcome.decoding), {}).setdefault(outcome.arm, []).append(outcome)
    return [(ours, next(iter(arms.values()))) for arms in by.values() for ours in arms.values()]


def gain_of(ours: list[Outcome], first: list[Outcome]) -> tuple[tuple[float, float], tuple[float | None, float | None]]:
    """Gain and half width, and the same of how much more that is than the gain of the first arm; None for that arm
    itself."""
    more = None, None
    if ours[0].arm != first[0].arm:
        more = mean_and_reach([[a - b for a, b in zip(one.changes, other.changes, strict=True)]
                         for one, other in zip(ours, first, strict=True)])
    return mean_and_reach([outcome.changes for outcome in ours]), more


def effects(found: list[Outcome]) -> Table:
    """What each behavior adds to the RL gain, if every combination of the three is an arm: the mean gain of the four
    arms that have it less that of the four that do not, so that each training serves all three comparisons (a 2 x 2 x 2
    design)."""
    parts = {outcome.arm: frozenset(parts_of(outcome.arm)) for outcome in found if outcome.arm not in AUGMENTED}
    arms = {behaviors: arm for arm, behaviors in parts.items() if behaviors <= set(IN_BRIDGE)}
    if len(arms) < 2 ** len(IN_BRIDGE):
        return []
    changes = {(o.test, o.decoding, o.seed, o.arm): o.changes for o in found}
    tests, seeds = dict.fromkeys((o.test, o.decoding) for o in found), dict.fromkeys(o.seed for o in found)

    def gains_of(chosen: list[str], test: str, decoding: str) -> list[list[float]]:
        """Of each seed, the mean change of each problem over some arms."""
        return [[mean(problem) for problem in zip(*(changes[test, decoding, seed, arm] for arm in chosen))]
                for seed in seeds]

    rows = []
    for behavior in IN_BRIDGE:
        having, lacking = ([arm for shown, arm in arms.items() if (behavior in shown) == has] for has in (True, False))
        for test, decoding in tests:
            with_it, without = gains_of(having, test, decoding), gains_of(lacking, test, decoding)
            more, reach = mean_and_reach([[a - b for a, b in zip(*both)] for both in zip(with_it, without)])
            rows.append({"behavior": behavior, "test": test, "answers": decoding,
                         "gain with": f"{mean_and_reach(with_it)[0]:+.1%}", "without": f"{mean_and_reach(without)[0]:+.1%}",
                         "more": f"{more:+.1%}", "95% interval": around(more, reach)})
    return rows


def title(test: str, sizes: tuple[int, int], unit: str) -> str:
    return f"{test}, {sizes[0]} {unit}" if sizes[0] == sizes[1] else f"{test}, {sizes[0]}-{sizes[1]} {unit}"


def row(ours: list[Outcome], first: list[Outcome]) -> dict[str, str]:
    (gain, reach), (more, more_reach) = gain_of(ours, first)
    before, after = (mean(outcome.accuracy[stage] for outcome in ours) for stage in (0, 1))
    tokens = (mean(outcome.tokens[stage] for outcome in ours) for stage in (0, 1))
    return {"after SFT": f"{before:.1%}", "after RL": f"{after:.1%}", "RL gain": f"{gain:+.1%}",
            "95% interval": around(gain, reach),
            f"more than {first[0].arm}": "" if more is None else f"{more:+.1%}",
            "interval": "" if more is None else around(more, more_reach),
            "tokens": " -> ".join(f"{count:.0f}" for count in tokens)}


def around(value: float, reach: float) -> str:
    """An interval; empty if all values were equal, since no spread among a few says nothing about others."""
    return f"{value - reach:+.1%} to {value + reach:+.1%}" if reach else ""


def averages(ours: list[Outcome], stage: str) -> dict[str, float]:
    """Behaviors per answer, over all seeds."""
    rates = [shown(outcome.before if stage == STAGES[0] else outcome.after) for outcome in ours]
    return {name: mean(each[name] for each in rates) for name in rates[0]}


def curves(runs: Sequence[tuple[int, Path]], arms: Sequence[str]) -> Table:
    """The training curves, one row a step."""
    return [{"seed": seed, "arm": arm, "step": line.get("step"), **{name: line.get(name) for name in CURVES}}
            for seed, folder in runs for arm in arms for line in read_jsonl(folder / f"rl_{arm}" / "metrics.jsonl")
            if "accuracy" in line]  # not what the validation before the first step found
