"""The text contract between a question and its scored answer: tags, the box, extraction, reward.

An assistant turn is
    <think>
    ... reasoning ...
    </think>
    <answer>
    The answer is \\boxed{24}.
    </answer>
The prompt ends with OPENING, so a completion starts right after it, in training, sampling and evaluation alike.
"""
import re

from minibridge.config import InputError

OPENING = "<think>\n"
SYSTEM = "Reason step by step inside <think> </think>, then give the result inside <answer> </answer>."


def chat(question: str, answer: str | None = None) -> list[dict]:
    """The messages of one exchange; without an answer, the prompt alone."""
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    return messages + ([{"role": "assistant", "content": answer}] if answer is not None else [])


def extract(text: str) -> str | None:
    """Content of the first `\\boxed{...}`, up to the first closing brace, outer blanks removed; None without one.

    Linear in the length of the text, and nothing is evaluated.
    """
    _, found, rest = text.partition("\\boxed{")
    content, closed, _ = rest.partition("}")
    return content.strip() if found and closed else None


def format_fault(completion: str) -> str | None:
    """What is wrong with a completion's format (it must close its think block, then hold exactly one answer block and
    nothing else); None if nothing is."""
    thought, closed, rest = completion.partition("</think>")
    rest = rest.strip()
    faults = {
        "no </think>": not closed,
        "<think> again, which the prompt has opened": "<think>" in completion,
        "</think> again": "</think>" in rest,
        "<answer> before </think>": "<answer>" in thought,
        "no <answer>": "<answer>" not in rest,
        "text between </think> and <answer>": not rest.startswith("<answer>"),
        "no </answer>": "</answer>" not in rest,
        "text after </answer>": not rest.endswith("</answer>"),
        "more than one <answer> or </answer>": rest.count("<answer>") + rest.count("</answer>") > 2,
    }
    return next((fault for fault, found in faults.items() if found), None)


def well_formed(completion: str) -> bool:
    return format_fault(completion) is None


def number(text: str) -> float | None:
    """The value of a plain decimal such as "-3" or "0.25"; None for anything else, and for more than 32 characters."""
    return float(text) if len(text) <= 32 and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None


def reward(completion: str, answer: str, format_scale: float = 0.0, tolerance: float = 0.0) -> float:
    """1 for the right answer else 0, plus format_scale for a well-formed completion."""
    return correct(completion, answer, tolerance) + format_scale * well_formed(completion)


def correct(completion: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether the box holds exactly the answer's text; blanks around it are forgiven (the authors' code does not).
    With a tolerance, whether it holds a plain decimal of no larger relative error."""
    return box_fault(completion, answer, tolerance) is None


def box_fault(completion: str, answer: str, tolerance: float = 0.0) -> str | None:
    """Why the box does not earn its 1: a few words, mostly with details after a colon; None if it does."""
    text = extract(completion)
    if text is None:
        return "\\boxed{ that no } closes" if "\\boxed{" in completion else "no \\boxed{}"
    if not tolerance:
        return None if text == answer else f"wrong answer: {_shown(text)} is not {_shown(answer)}"
    given, right = number(text), number(answer)
    if given is None or right is None:
        return f"no plain decimal: {_shown(answer if right is None else text)}"
    if abs(given - right) <= tolerance * abs(right):
        return None
    return f"wrong answer: {text} is not {answer}, give or take {tolerance:g} of it"


def _shown(text: str) -> str:
    """Cut to 60 characters; those beyond ASCII as escapes, for a minus sign may be one that only looks like it."""
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}... ({len(text)} characters)"


def explain(completion: str, answer: str, tolerance: float = 0.0) -> str:
    """One line on what `correct` and `well_formed` say, and why."""
    boxes = completion.count("\\boxed{")
    which = f" ({boxes} boxes, the first counts)" * (boxes > 1)
    fault = box_fault(completion, answer, tolerance)
    box = f"right: {_shown(extract(completion))}" if fault is None else fault
    return f"{box}{which}; format: {format_fault(completion) or 'good'}"


def check_scoring(record: dict, where: str) -> None:
    """Raise InputError when a record's "answer" or its optional "tolerance" cannot be scored by `correct`."""
    right, tolerance = record.get("answer"), record.get("tolerance", 0.0)
    if not isinstance(right, str):
        raise InputError(f"{where}: field 'answer' must be a string")
    if right != right.strip() or "}" in right:
        raise InputError(f"{where}: field 'answer' is {_shown(right)}: no box can hold a }} or blanks around its content")
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        raise InputError(f"{where}: field 'tolerance' must be a number of at least 0 and below 1")
    if tolerance and number(right) is None:
        raise InputError(f"{where}: with a tolerance, the answer must be a number, not {right!r}")
