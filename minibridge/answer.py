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

OPENING = "<think>\n"
SYSTEM = "Reason step by step inside <think> </think>, then give the result inside <answer> </answer>."
_WELL_FORMED = re.compile(r"[^<]*</think>\s*<answer>[^<]*</answer>\s*")


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
    return _WELL_FORMED.fullmatch(completion) is not None


def reward(completion: str, answer: str, format_scale: float = 0.0) -> float:
    """1 for the right answer (exact string match) else 0, plus format_scale for a well-formed completion."""
    return float(extract(completion) == answer) + format_scale * well_formed(completion)
