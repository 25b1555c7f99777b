"""Measures speed, side by side in one run: medians over repeats, with the slowest and the fastest.

    python -m minibridge.bench data      problems and worked answers per second

Wall time of this machine, whatever else runs on it: let nothing else run.
"""
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from minibridge import arms, igsm, splits, traces
from minibridge.config import option, run_command


def rates(work: int, repeats: int, *functions: Callable[[], object]) -> list[list[float]]:
    """Units of work per second of each function, in turn, `repeats` times after one run that does not count."""
    measured: list[list[float]] = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, found in zip(functions, measured):
            started = time.perf_counter()
            function()
            found.append(work / (time.perf_counter() - started))
    return [found[1:] for found in measured]


def row(name: str, found: list[float]) -> str:
    return f"| {name} | {statistics.median(found):,.0f} | {min(found):,.0f} to {max(found):,.0f} |"


# --- data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    count: int = option(500, "problems of each repeat", least=10)
    repeats: int = option(5, "repeats that count", least=1)
    ops: tuple[int, int] = option((15, 20), "operations of a problem")
    workers: int = option(2, "processes of the last row", least=1, most=256)
    seed: int = option(0, "seed of the problems", least=0)


def main_data(config: Data):
    problems = [_drawn(config, i) for i in range(config.count)]

    def finished(number: int) -> str:
        return _told(config, _drawn(config, number))

    def whole_split(workers: int):
        drawn = splits.problems("sft", config.count, config.ops, igsm.PAPER, config.seed, workers=workers)
        return [json.dumps(arms.record(problem, config.seed, traces.BRIDGE)) for problem in drawn]

    numbers = range(config.count)
    found = rates(config.count, config.repeats,
                  lambda: [_drawn(config, i) for i in numbers],
                  lambda: [_told(config, problem) for problem in problems],
                  lambda: [finished(i) for i in numbers],
                  lambda: whole_split(1), lambda: whole_split(config.workers))
    names = ["problem that passes the filters", "its question and BRIDGE answer", "both: a problem with its texts",
             "row of an SFT file, one process", f"row of an SFT file, {config.workers} processes"]
    print(f"iGSM, {config.ops[0]}-{config.ops[1]} operations, {config.count} problems, {config.repeats} repeats\n\n"
          "| per second | median | range |\n|---|---|---|\n" + "\n".join(map(row, names, found)))
    print("\nAn SFT file takes one structure in five, so that no other split shares one; its rows hold JSON and hashes.")


def _drawn(config: Data, number: int):
    return igsm.draw(random.Random(f"{config.seed} {number}"), config.ops)


def _told(config: Data, problem) -> str:
    rng = random.Random(config.seed)
    return traces.question(problem, rng) + traces.answer(problem, rng, traces.BRIDGE)


COMMANDS = {"data": (main_data, Data)}

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
