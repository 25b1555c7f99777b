"""One line of a data file, or of saved answers, as a person reads it: question, graph, and the answer marked step by step.

    python -m minibridge.show --data runs/toy/seed_0/sft_vanilla.jsonl,runs/toy/seed_0/sft_bridge.jsonl --line 2
    python -m minibridge.show --data runs/toy/seed_0/rl_bridge_id_sampled.jsonl --line 7

Files of one seed hold the same problems in the same order, so the same line of two arms shows one problem, whose question
and graph are printed once. The marks are the verifier's (`verify`): a line without a "problem" has none.
"""
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from minibridge import answer
from minibridge.config import REQUIRED, InputError, option, read_jsonl, run_main
from minibridge.dag import Problem, read_problem
from minibridge.traces import formula
from minibridge.verify import Step, verify


@dataclass(frozen=True)
class Config:
    data: str = option(REQUIRED, "JSONL files of gen_data.py, train_rl.py or minibridge.evaluate, separated by commas")
    line: int = option(1, "which line of each", least=1)


def line_of(path: str, number: int) -> dict:
    records = read_jsonl(path)
    if number > len(records):
        raise InputError(f"line: {number}, but {path} has {len(records)}")
    return records[number - 1]


def turns(record: dict, where: str) -> tuple[str | None, str | None]:
    """Question and answer of a line, None for what it does not hold."""
    messages = record.get("messages", record.get("prompt", []))
    if not isinstance(messages, list) or not all(isinstance(turn, dict) and isinstance(turn.get("role"), str)
                                                 and isinstance(turn.get("content"), str) for turn in messages):
        raise InputError(f"{where}: no conversation in it")
    said = {turn["role"]: turn["content"] for turn in messages}
    text = record.get("text", said.get("assistant", "").removeprefix(answer.OPENING) or None)
    if text is not None and not isinstance(text, str) or text is None and "user" not in said:
        raise InputError(f"{where}: neither a question nor an answer in it")
    return said.get("user"), text


def graph(problem: Problem) -> str:
    """Every quantity with its formula and value: the needed ones in a solving order, then the others."""
    names = {key: key for key in problem.nodes}
    rows = [(key, formula(problem.nodes[key].expr, names), str(problem.values[key]))
            for key in (*problem.order, *problem.redundant)]
    notes = {problem.target: "asked"} | dict.fromkeys(problem.redundant, "not needed")
    notes |= {key: "not stated" for key, node in problem.nodes.items() if not node.stated and key not in notes}
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{key:{widths[0]}}  = {expr:{widths[1]}}  = {value:>{widths[2]}}  {notes.get(key, '')}".rstrip()
                     for key, expr, value in rows)


def mark(step: Step) -> str:
    """What a step is, and what else is in it: "step, 2 subgoals"."""
    parts = Counter(part.kind for part in step.parts)
    return ", ".join([step.kind, *(kind if count == 1 else f"{count} {kind}s" for kind, count in parts.items())])


def marked(problem: Problem, text: str) -> Iterator[str]:
    """The answer's lines behind the marks of what begins in them; a wrong step is followed by what is wrong in it."""
    steps, end = list(verify(problem, text).steps), 0
    width = max(len(mark(step)) for step in steps)
    for line in text.splitlines(keepends=True):
        end += len(line)
        here = []
        while steps and first_letter(text, steps[0]) < end:
            here.append(steps.pop(0))
        if line.strip() or here:
            yield f"{', '.join(map(mark, here)):{width}}  {line.strip()}".rstrip()
        yield from faults(here, width)
    yield from faults(steps, width)


def first_letter(text: str, step: Step) -> int:
    """Where a step's text begins; that of an empty one is the end of the answer."""
    return next((place for place in range(step.start, step.end) if not text[place].isspace()), len(text))


def faults(steps: list[Step], width: int) -> Iterator[str]:
    return (f"{'':{width}}  ^ {step.error}: {step.reason}" for step in steps if step.error)


def main(config: Config):
    before = None
    for path in config.data.split(","):
        record, where = line_of(path, config.line), f"{path}:{config.line}"
        question, text = turns(record, where)
        problem = read_problem(record, where) if isinstance(record.get("problem"), dict) else None
        print(f"=== {where}\n")
        if (question, problem) != before:
            print("".join(part + "\n\n" for part in (question, problem and graph(problem)) if part), end="")
        before = question, problem
        if text is not None:
            print("\n".join(marked(problem, text)) if problem else text)
            if "answer" in record:
                answer.check_scoring(record, where)
                print("\n" + answer.explain(text, record["answer"], record.get("tolerance", 0.0)))
            print()


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
