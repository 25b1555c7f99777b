"""One line of a data file, or of saved answers, as a person reads it: question, graph, and the answer marked step by step.

    python -m minibridge.show --data runs/toy/seed_0/sft_vanilla.jsonl,runs/toy/seed_0/sft_bridge.jsonl --line 2
    python -m minibridge.show --data runs/toy/seed_0/rl_bridge_id_sampled.jsonl --line 7

Files of one seed hold the same problems in the same order, so the same line of two arms (with one row a problem) shows one
problem, whose question and graph are printed once. The marks are the verifier's (`verify`): a line without a "problem" has
none.
"""
import re
import sys
from collections import Counter
from dataclasses import dataclass

from minibridge import answer
from minibridge.config import REQUIRED, InputError, option, printable, read_jsonl, run_main
from minibridge.dag import Problem, problem_in
from minibridge.traces import infix
from minibridge.verify import Step, verify


@dataclass(frozen=True)
class Config:
    data: str = option(REQUIRED, "JSONL files of gen_data.py, train_rl.py or minibridge.evaluate, separated by commas")
    line: int = option(1, "which line of each", least=1)


def line_of(path: str, number: int) -> dict:
    if not path:
        raise InputError("data: a file without a name")
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
    question = next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), None)
    text = record.get("text")
    if text is None and messages and messages[-1]["role"] == "assistant":
        text = messages[-1]["content"].removeprefix(answer.OPENING)
    if text is not None and not isinstance(text, str) or text is None and question is None:
        raise InputError(f"{where}: neither a question nor an answer in it")
    return question, text


def graph(problem: Problem) -> str:
    """Every quantity with its formula and value: the needed ones in a solving order, then the others."""
    rows = [(key, infix(problem.nodes[key].expr), str(problem.values[key]))
            for key in (*problem.order, *problem.redundant)]
    notes = {key: ", ".join(["asked"] * (key == problem.target) + ["not needed"] * (key in problem.redundant)
                            + ["not stated"] * (not node.stated)) for key, node in problem.nodes.items()}
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(f"{key:{widths[0]}}  = {expr:{widths[1]}}  = {value:>{widths[2]}}  {notes[key]}".rstrip()
                     for key, expr, value in rows)


def mark(step: Step) -> str:
    """What a step is, and what else is in it: "step, 2 subgoals"."""
    parts = Counter(part.kind for part in step.parts)
    return ", ".join([step.kind, *(kind if count == 1 else f"{count} {kind}s" for kind, count in parts.items())])


def marked(problem: Problem, text: str) -> str:
    """The answer's lines behind the marks of what begins in them; a wrong step is followed by what is wrong in it."""
    steps = sorted(((first_letter(text, step), step) for step in verify(problem, text).steps), key=lambda pair: pair[0])
    rows, end, done = [], 0, 0
    for line in text.split("\n"):
        end, first = end + len(line) + 1, done
        while done < len(steps) and steps[done][0] < end:
            done += 1
        here = steps[first:done]
        shown = ", ".join(mark(step) for place, step in here if place < len(text))
        rows += [(shown, line.strip())] * bool(shown or line.strip())
        rows += [("", f"^ {step.error}: {step.reason}") for _, step in here if step.error]
    width = max(len(shown) for shown, _ in rows)
    return "\n".join(f"{shown:{width}}  {line}".rstrip() for shown, line in rows)


def first_letter(text: str, step: Step) -> int:
    """Where a step's text begins; an empty one stands at the end of the answer."""
    found = re.compile(r"\S").search(text, step.start, step.end)
    return found.start() if found else len(text)


def main(config: Config):
    before = None
    for path in config.data.split(","):
        record, where = line_of(path, config.line), f"{path}:{config.line}"
        question, text = turns(record, where)
        problem = problem_in(record, where)
        told = [question, graph(problem)] if problem else [question]
        parts = [f"=== {where}", *(part for part in told if part and told != before)]
        before = told
        if text is not None:
            parts.append(marked(problem, text) if problem else text)
        if text is not None and "answer" in record:
            answer.check_scoring(record, where)
            parts.append(answer.explain(text, record["answer"], record.get("tolerance", 0.0)))
        print(printable("\n\n".join(parts)), end="\n\n")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
