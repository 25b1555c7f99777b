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


def well_formed(completion: str) -> bool:
    """Whether a completion closes its think block and holds exactly one answer block after it, and nothing else."""
    thought, closed, rest = completion.partition("</think>")
    rest = rest.strip()
    return (bool(closed) and "<think>" not in completion and "</think>" not in rest and "<answer>" not in thought
            and rest.startswith("<answer>") and rest.endswith("</answer>")
            and rest.count("<answer>") == rest.count("</answer>") == 1)


def number(text: str) -> float | None:
    """The value of a plain decimal such as "-3" or "0.25"; None for anything else, and for more than 32 characters."""
    return float(text) if len(text) <= 32 and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", text) else None


def reward(completion: str, answer: str, format_scale: float = 0.0, tolerance: float = 0.0) -> float:
    """1 for the right answer else 0, plus format_scale for a well-formed completion."""
    return correct(completion, answer, tolerance) + format_scale * well_formed(completion)


def correct(completion: str, answer: str, tolerance: float = 0.0) -> bool:
    """Whether the box holds exactly the answer's text; blanks around it are forgiven (the authors' code does not).
    With a tolerance, whether it holds a plain decimal of no larger relative error."""
    text = extract(completion)
    if not tolerance or text is None:
        return text == answer
    given, right = number(text), number(answer)
    return given is not None and right is not None and abs(given - right) <= tolerance * abs(right)


def check_scoring(record: dict, where: str) -> None:
    """Raise InputError when a record's "answer" or its optional "tolerance" cannot be scored by `correct`."""
    right, tolerance = record.get("answer"), record.get("tolerance", 0.0)
    if not isinstance(right, str):
        raise InputError(f"{where}: field 'answer' must be a string")
    if type(tolerance) not in (int, float) or not 0 <= tolerance < 1:
        raise InputError(f"{where}: field 'tolerance' must be a number of at least 0 and below 1")
    if tolerance and number(right) is None:
        raise InputError(f"{where}: with a tolerance, the answer must be a number, not {right!r}")
