"""Write problems as JSON lines: SFT examples with chosen behaviors, RL prompts, validation and test sets.

    python gen_data.py --split sft --arm bridge --out data/sft_bridge.jsonl
    python gen_data.py --split sft --arm vanilla --out data/sft_vanilla.jsonl
    python gen_data.py --split rl --out data/rl.jsonl
    python gen_data.py --split test --ops 25 --out data/test_ood.jsonl

The problems of a split depend on the seed, the split, the op range, the scale, the count and the balance, never on the
arm: two arms hold the same problems in the same order, with the same `id`, in other words. No problem structure stands
in two splits.
SFT lines hold "messages", all others "prompt", in the form TRL reads.
"""
import itertools
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from minibridge import igsm, traces
from minibridge.answer import chat
from minibridge.config import REQUIRED, InputError, option, run_main, write_jsonl
from minibridge.dag import Problem

ARMS = {"vanilla": traces.VANILLA, "bridge": traces.BRIDGE}
SCALES = {"paper": igsm.PAPER, "toy": igsm.TOY}
# Rows and op range of the paper's splits, and the share of all structures (in tenths) that a split may draw from.
SPLITS = {"base": (2000, (1, 14), range(0, 4)), "sft": (2000, (15, 20), range(4, 6)), "rl": (10000, (15, 20), range(6, 8)),
          "val": (500, (21, 25), range(8, 9)), "test": (500, (20, 20), range(9, 10))}
PATIENCE = 20_000  # candidates without a new problem before giving up


@dataclass(frozen=True)
class Config:
    out: str = option(REQUIRED, "JSONL file to write")
    split: Literal["sft", "rl", "val", "test", "base"] = option("sft", "which disjoint part of all problems to draw from")
    arm: Literal["vanilla", "bridge", "custom"] = option("bridge", "behaviors of the answers; custom: the three flags below")
    subgoal: bool = option(False, "custom arm: reduce formulas one operation at a time")
    analysis: int = option(0, "custom arm: level 0..4 of restating conditions")
    reflection: float = option(0.0, "custom arm: probability of trying a node out of turn")
    count: int | None = option(None, "rows; none: the paper's (2000 sft, 10000 rl, 500 val and test)")
    ops: tuple[int, int] | None = option(None, "operations of a problem, as 15-20 or 20; none: the paper's for the split")
    scale: Literal["paper", "toy"] = option("paper", "size of structures, values and vocabulary")
    balance: float = option(1.0, "largest share of the rows that one answer may have")
    seed: int = option(0, "seed of everything random", least=0)


def problems(split: str, count: int, ops: tuple[int, int], scale: igsm.Scale, seed: int,
             balance: float = 1.0) -> list[Problem]:
    """`count` different problems of a split. Candidate number i comes from its own random stream, so the result does
    not depend on how many candidates are drawn at a time. Raises InputError when the filters leave too few."""
    if count < 1 or not 0 < balance <= 1:
        raise InputError("count: must be at least 1" if count < 1 else "balance: must be above 0 and at most 1")
    kept: list[Problem] = []
    seen: set[str] = set()
    answers: Counter[int] = Counter()
    quota = max(1, int(balance * count))
    newest = 0
    for number, problem in _candidates(split, ops, scale, seed):
        if problem.id not in seen and answers[problem.answer] < quota:
            seen.add(problem.id)
            answers[problem.answer] += 1
            kept.append(problem)
            newest = number
        if len(kept) == count:
            return kept
        if number - newest > PATIENCE:
            raise InputError(f"count: no more than {len(kept)} of {count} problems found for split {split}, "
                             f"ops {ops[0]}-{ops[1]}, balance {balance:g}")


def _candidates(split: str, ops: tuple[int, int], scale: igsm.Scale, seed: int) -> Iterator[tuple[int, Problem]]:
    """(i, problem of stream i) for those whose structure belongs to the split."""
    for i in itertools.count():
        problem = igsm.draw(random.Random(f"{seed}/{split}/{ops[0]}-{ops[1]}/{i}"), ops, scale)
        if int(problem.structure, 16) % 10 in SPLITS[split][2]:
            yield i, problem


def record(problem: Problem, seed: int, behaviors: traces.Behaviors | None = None,
           letters: str = igsm.PAPER.letters) -> dict:
    """One line: an SFT example rendered with `behaviors`, or an RL prompt when there are none. The wording of question
    and answer comes from streams named after the problem, so it is the same in every file of one seed."""
    question = traces.question(problem, random.Random(f"{seed}/{problem.id}/question"))
    common = {"answer": str(problem.answer), "task": problem.task, "num_ops": problem.num_ops, "id": problem.id}
    if behaviors is None:
        return {"prompt": chat(question), **common, "problem": problem.to_dict()}
    answer = traces.answer(problem, random.Random(f"{seed}/{problem.id}/answer"), behaviors, letters)
    return {"messages": chat(question, answer), **common, "behaviors": str(behaviors), "problem": problem.to_dict()}


def main(config: Config):
    rows, ops, _ = SPLITS[config.split]
    behaviors = None
    custom = traces.Behaviors(config.subgoal, config.analysis, config.reflection)
    answered = config.split in ("sft", "base")
    if custom != traces.VANILLA and not (answered and config.arm == "custom"):
        raise InputError("arm: --subgoal, --analysis and --reflection are for --arm custom of --split sft or base")
    if answered:
        behaviors = ARMS.get(config.arm, custom)
    count = rows if config.count is None else config.count
    scale = SCALES[config.scale]
    drawn = problems(config.split, count, config.ops or ops, scale, config.seed, config.balance)
    lines = [record(problem, config.seed, behaviors, scale.letters) for problem in drawn]
    write_jsonl(config.out, lines)
    print(summary(lines))
    print(f"{config.out}: {len(lines)} rows")


def summary(lines: list[dict]) -> str:
    """One row in full, and the counts that matter: op counts, the commonest answer (what a constant guess would earn)."""
    conversation = "\n".join(message["content"] for message in lines[0].get("messages") or lines[0]["prompt"])
    ops = ", ".join(f"{ops}: {count}" for ops, count in sorted(Counter(line["num_ops"] for line in lines).items()))
    common, times = Counter(line["answer"] for line in lines).most_common(1)[0]
    return f"{conversation}\n\noperations: {ops}\ncommonest answer: {common}, {times / len(lines):.1%} of the rows"


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
