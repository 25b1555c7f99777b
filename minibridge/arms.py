"""The arms of the comparison: what rows an SFT file gets for each problem. RL files hold prompts, the same for every arm.

    vanilla, bridge               plain answers; all three behaviors
    subgoal+reflection, ...       the behaviors named: any one, or several joined by "+"
    bridge@0.3, reflection@0.1    arms with reflection in their strict form (`traces.Behaviors`) with this probability
    pp-aug                        premises permuted: the plain row, and 3 with the conditions of the question reshuffled
    rc-aug                        reasoning chain: the plain row, and 3 answers in random topological orders, in fresh words
                                  (the toy's problems are nearly chains: nine in ten of its orders are the plain one)
    own-answers                   right answers that a model has given itself (rejection sampling), at most 4 a problem
    prompts                       no answers: what such a model is asked

Question and answer are worded by random streams named after the problem, so a problem's row is the same in every file of
one seed, whatever else is in it.
"""
import random
import re
import string
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from minibridge import traces
from minibridge.answer import OPENING, chat, check_scoring, correct, well_formed
from minibridge.config import InputError, check_fields, numbered
from minibridge.dag import Problem

IN_BRIDGE = ("subgoal", "analysis", "reflection")
BEHAVIORS = IN_BRIDGE  # of which an arm may name any
FORMS = 4  # rows of a problem in an augmented arm
# The forms of question and answer of the rows of a problem; 0 is the plain one.
AUGMENTED = {"pp-aug": [(form, 0) for form in range(FORMS)], "rc-aug": [(0, form) for form in range(FORMS)]}


def behaviors_of(arm: str, analysis: int | None = None, reflection: float | None = None,
                 strict: bool = False) -> traces.Behaviors | None:
    """What an arm injects; None when it has no answers of ours. `analysis` and `reflection` replace BRIDGE's level 2
    and probability 0.1. Raises InputError for an unknown arm, and for a setting of a behavior it does not have."""
    name, at, probability = arm.partition("@")
    if at:
        if behaviors_of(name) is None or "reflection" not in parts_of(name):
            raise InputError(f"arm: {arm!r}: a probability is for arms with reflection, as bridge@0.2")
        if reflection is not None or strict:
            raise InputError(f"arm: {arm!r} says itself that it is strict and how probable")
        return behaviors_of(name, analysis, _probability(arm, probability), strict=True)
    parts = parts_of(arm)
    if len(set(parts)) != len(parts) or not set(parts) <= set(BEHAVIORS):
        raise InputError(f"arm: {arm!r} is none of vanilla, bridge, {', '.join(AUGMENTED)}, own-answers, prompts, "
                         f"nor behaviors ({', '.join(BEHAVIORS)}) joined by +")
    for name, given, behavior in (("analysis", analysis is not None, "analysis"), ("strict", strict, "reflection"),
                                  ("reflection", reflection is not None, "reflection")):
        if given and behavior not in parts:
            raise InputError(f"{name}: does not apply to arm {arm!r}")
    if arm in ("own-answers", "prompts"):
        return None
    level = traces.BRIDGE.analysis if analysis is None else analysis
    probability = traces.BRIDGE.reflection if reflection is None else reflection
    return traces.Behaviors(subgoal="subgoal" in parts, analysis=level * ("analysis" in parts),
                            reflection=probability * ("reflection" in parts), strict=strict)


def _probability(arm: str, text: str) -> float:
    if not re.fullmatch(r"0|1|0?\.[0-9]+|1\.0", text):
        raise InputError(f"arm: {arm!r}: {text!r} is not a probability, as 0.2 is")
    return float(text)


def parts_of(arm: str) -> Sequence[str]:
    """The behaviors in the name of an arm, whether there are such or not."""
    if arm == "bridge":
        return IN_BRIDGE
    return () if arm in ("vanilla", *AUGMENTED, "own-answers", "prompts") else arm.split("+")


def record(problem: Problem, seed: int, behaviors: traces.Behaviors | None = None, letters: str = string.ascii_letters,
           lines: traces.Lines = "random", question_form: int = 0, answer_form: int = 0) -> dict:
    """One line: an SFT example rendered with `behaviors`, or an RL prompt when there are none.

    question_form, answer_form: 0 is the plain one. Other questions have their conditions
    reshuffled; other answers follow a topological order drawn at random, differently worded and with other letters.
    """
    question = traces.question(problem, _stream(seed, problem, "question", question_form),
                               "random" if question_form else lines)
    common = {"answer": str(problem.answer), "task": problem.task, "num_ops": problem.num_ops, "id": problem.id}
    if problem.tolerance:
        common["tolerance"] = problem.tolerance
    if behaviors is None:
        return {"prompt": chat(question), **common, "problem": problem.to_dict()}
    stream, told = _stream(seed, problem, "answer", answer_form), problem
    if answer_form:
        told = replace(problem, order=problem.topological_order(stream))
    answer = traces.answer(told, stream, behaviors, letters)
    return {"messages": chat(question, answer), **common, "behaviors": str(behaviors), "problem": problem.to_dict()}


def _stream(seed: int, problem: Problem, purpose: str, form: int) -> random.Random:
    return random.Random(f"{seed}/{problem.id}/{purpose}" + f"/{form}" * bool(form))


def augmented(arm: str, problem: Problem, seed: int, letters: str = string.ascii_letters,
              lines: traces.Lines = "random") -> list[dict]:
    """The four rows of a problem in arm pp-aug or rc-aug, the plain row first; all have the problem's id."""
    return [record(problem, seed, traces.VANILLA, letters, lines, *form) for form in AUGMENTED[arm]]


# --- rejection sampling --------------------------------------------------------------------------------------


def read_rollouts(path: str) -> dict[str, list[dict]]:
    """The lines of a rollout file (of `evaluate`, or of a step of train_rl.py) by problem id; "correct" is set by
    today's rule. Raises InputError("path:line: what") for a line without what it takes."""
    rollouts = defaultdict(list)
    for where, line in numbered(path):
        check_scoring(line, where)
        check_fields(line, {"id": (str,), "text": (str,)}, where)
        right = correct(line["text"], line["answer"], line.get("tolerance", 0.0))
        rollouts[line["id"]].append(line | {"correct": right})
    return dict(rollouts)


def middling(problems: Sequence[Problem], rollouts: dict[str, list[dict]], keep: tuple[int, int]) -> list[Problem]:
    """The problems whose rollouts are right in keep[0] to keep[1] percent of cases, ends included; a problem without
    rollouts is dropped. Raises InputError when none is left."""
    def percent(problem: Problem) -> float:
        lines = rollouts[problem.id]
        return 100 * sum(line["correct"] for line in lines) / len(lines)

    tried = [problem for problem in problems if problem.id in rollouts]
    for problem in tried:
        if others := {line["answer"] for line in rollouts[problem.id]} - {str(problem.answer)}:
            raise InputError(f"rollouts: the answer to problem {problem.id} is {problem.answer}, not {min(others)[:40]}")
    kept = [problem for problem in tried if keep[0] <= percent(problem) <= keep[1]]
    if not kept:
        raise InputError(f"rollouts: {len(tried)} of the {len(problems)} problems have rollouts, and of none are "
                         f"{keep[0]}-{keep[1]}% right (the same --seed, --split and sizes as for its prompts?)")
    return kept


def own_answers(problem: Problem, seed: int, rollouts: list[dict], lines: traces.Lines = "random") -> list[dict]:
    """Rows that answer the problem in the model's own words: its first 4 different answers that are right and well
    formed."""
    texts = dict.fromkeys(line["text"].rstrip() for line in rollouts if line["correct"] and well_formed(line["text"]))
    prompt = record(problem, seed, lines=lines)
    question, rest = prompt.pop("prompt"), {"behaviors": "own-answers", "problem": prompt.pop("problem")}
    return [{"messages": [*question, {"role": "assistant", "content": OPENING + text}], **prompt, **rest}
            for text in list(texts)[:FORMS]]
