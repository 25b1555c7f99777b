"""Which problems a split holds: different ones, and no structure that stands in another split.

    problems("sft", 2000, ops=(15, 20), scale=igsm.PAPER, seed=0)      iGSM
    arithmetic_problems("rl", 10000, "arithmetic", depth=5, redundant=(0, 8), seed=0)

A problem's structure (its graph and its constants, whatever things are called and whatever the order of terms) decides by
its hash which split may hold it. Candidate number i of a split comes from a random stream of its own, so any number of
processes draws the same problems.

    python -m minibridge.splits --files data/sft.jsonl,data/rl.jsonl,data/test.jsonl

reports, for written files, the share of zeros and of the commonest answer (what a constant guess earns), and how many
problem structures each two of them share.
"""
import itertools
import random
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

from minibridge import arithmetic, igsm
from minibridge.config import REQUIRED, InputError, numbered, option, run_main
from minibridge.dag import Problem, read_problem
from minibridge.tables import markdown

# Rows and op range of the paper's splits, and the share of all structures (in tenths) that a split may draw from.
SPLITS = {"base": (2000, (1, 14), range(0, 4)), "sft": (2000, (15, 20), range(4, 6)), "rl": (10000, (15, 20), range(6, 8)),
          "val": (500, (21, 25), range(8, 9)), "test": (500, (20, 20), range(9, 10))}
DEPTHS = {"base": 3, "sft": 4, "rl": 5, "val": 5, "test": 5}  # of arithmetic trees, in the paper (but for the base)
REDUNDANT = (0, 8)  # unneeded premises of its arithmetic problems
PATIENCE = 20_000  # candidates without a new problem before giving up
SLOW, HOPELESS = 100, 100_000  # or when the last 20 took more than SLOW each, and at that pace the rest more than HOPELESS
BLOCK = 250  # candidates that a process draws at a time

Candidate = Callable[[int], Problem]  # of each number its own


def problems(split: str, count: int, ops: tuple[int, int], scale: igsm.Scale, seed: int,
             balance: float = 1.0, workers: int = 1) -> list[Problem]:
    """`count` different iGSM problems of a split, no answer taking more than `balance` of them (or one).
    Raises InputError when the filters leave too few."""
    name = f"ops {ops[0]}-{ops[1]}"
    candidate = partial(_drawn, f"{seed}/{split}/{ops[0]}-{ops[1]}", partial(igsm.draw, ops=ops, scale=scale))
    return _chosen(candidate, split, count, balance, workers, name)


def arithmetic_problems(split: str, count: int, task: str, depth: int, redundant: tuple[int, int], seed: int,
                        balance: float = 1.0, workers: int = 1) -> list[Problem]:
    """The same of "arithmetic" or "arithmetic-int". Two that differ only in redundant premises are of the same split."""
    variant = {"arithmetic": "6op", "arithmetic-int": "int"}[task]
    name = f"{seed}/{split}/{variant} {depth} {redundant[0]}-{redundant[1]}"
    candidate = partial(_drawn, name, partial(arithmetic.draw, depth=depth, redundant=redundant, variant=variant))
    return _chosen(candidate, split, count, balance, workers, f"depth {depth}")


def _drawn(stream: str, draw: Callable[[random.Random], Problem], number: int) -> Problem:
    return draw(random.Random(f"{stream}/{number}"))


def _chosen(candidate: Candidate, split: str, count: int, balance: float, workers: int, sizes: str) -> list[Problem]:
    """The first `count` different candidates whose hash belongs to the split, one answer taking at most its share."""
    if count < 1 or not 0 < balance <= 1:
        raise InputError("count: must be at least 1" if count < 1 else "balance: must be above 0 and at most 1")
    kept: list[Problem] = []
    seen: set[str] = set()
    answers: Counter = Counter()
    quota = max(1, int(balance * count + 1e-9))  # 0.29 * 100 is 28.999999999999996
    kept_at = [0] * 20  # numbers of the candidates kept, and a start
    for number, problem in _of_split(candidate, split, workers):
        if problem is not None and problem.id not in seen and answers[problem.answer] < quota:
            seen.add(problem.id)
            answers[problem.answer] += 1
            kept.append(problem)
            kept_at.append(number)
        if len(kept) == count:
            return kept
        pace = (number - kept_at[-20]) / 20  # candidates for a new problem: it never gets better, and about 10 are usual
        if number - kept_at[-1] > PATIENCE or pace > SLOW and pace * (count - len(kept)) > HOPELESS:
            raise InputError(f"count: gave up after {number + 1:,} draws, with {len(kept)} of {count} problems for split "
                             f"{split}, {sizes}, balance {balance:g}")


def _of_split(candidate: Candidate, split: str, workers: int) -> Iterator[tuple[int, Problem | None]]:
    """Candidates in their order; None for those of other splits."""
    size = BLOCK if workers > 1 else 1
    blocks = (range(first, first + size) for first in itertools.count(step=size))
    with process_pool(workers) if workers > 1 else nullcontext() as pool:
        run = pool.map if pool else map
        while True:
            try:
                for block in run(partial(_block, candidate, split), itertools.islice(blocks, workers)):
                    yield from block
            except BrokenProcessPool:
                raise InputError("workers: a process that draws problems was killed") from None


def _block(candidate: Candidate, split: str, numbers: range) -> list[tuple[int, Problem | None]]:
    drawn = ((number, candidate(number)) for number in numbers)
    return [(number, problem if int(problem.split_key, 16) % 10 in SPLITS[split][2] else None) for number, problem in drawn]


def process_pool(workers: int) -> ProcessPoolExecutor:
    """Processes that Ctrl-C ends without a traceback of each."""
    return ProcessPoolExecutor(workers, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_DFL))


# --- the report ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    files: str = option(REQUIRED, "JSONL files of gen_data.py, separated by commas")


def main(config: Config):
    keys: dict[str, set[str]] = {}
    table = []
    for path in config.files.split(","):
        if not path or path in keys:
            raise InputError(f"files: {path!r} is " + ("given twice" if path else "no name"))
        rows = [read_problem(line, where) for where, line in numbered(path)]
        keys[path] = {problem.split_key for problem in rows}
        answers = Counter(str(problem.answer) for problem in rows)
        common, times = answers.most_common(1)[0]
        share = f"{times / len(rows):.1%}"
        table.append({"file": path, "rows": len(rows), "problems": len({problem.id for problem in rows}),
                      "answer 0": f"{answers['0'] / len(rows):.1%}", "commonest answer": f"{common}, {share}"})
    print(markdown(table) + "\n")
    for (path, own), (other, others) in itertools.combinations(keys.items(), 2):
        print(f"structures in both {path} and {other}: {len(own & others)}")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
