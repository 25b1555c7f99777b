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


def reward(completion: str, answer: str, format_scale: float = 0.0) -> float:
    """1 for the right answer else 0, plus format_scale for a well-formed completion."""
    return correct(completion, answer) + format_scale * well_formed(completion)


def correct(completion: str, answer: str) -> bool:
    """Whether the box holds exactly the answer's text; blanks around it are forgiven (the authors' code does not)."""
    return extract(completion) == answer
