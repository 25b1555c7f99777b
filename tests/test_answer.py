"""The text contract: what is extracted, rewarded and well formed, on friendly and hostile text."""

import ast
import random
import re
from pathlib import Path

import pytest
from conftest import within

from minibridge import answer as module
from minibridge.answer import (OPENING, SYSTEM, box_fault, chat, check_scoring, correct, explain, extract, format_fault,
                               reward, well_formed)
from minibridge.config import InputError

GOOD = "3 + 4 = 7\n</think>\n<answer>\nThe answer is \\boxed{7}.\n</answer>"


@pytest.mark.parametrize("text, content", [
    ("", None),
    ("the answer is 24", None),
    ("\\boxed{24}", "24"),
    ("so \\boxed{-3}.\n", "-3"),
    ("\\boxed{ 24\n}", "24"),
    ("\\boxed{}", ""),
    ("\\boxed{1} no, \\boxed{2}", "1"),
    ("\\boxed{24", None),
    ("\\boxed", None),
    ("}24\\boxed{", None),
    ("\\boxed {24}", None),
    ("boxed{24}", None),
    ("\\fbox{24}", None),
    ("\\boxed{\\boxed{24}}", "\\boxed{24"),
    ("\\boxed{\\text{24}}", "\\text{24"),
    ("\\boxed{1, \\boxed{2}", "1, \\boxed{2"),
    ("\\boxed{{24}}", "{24"),
    ("} \\boxed{24} }", "24"),
    ("\\boxed{__import__('os')}", "__import__('os')"),
])
def test_extract(text, content):
    assert extract(text) == content


@pytest.mark.parametrize("content, right", [
    ("7", True), (" 7 ", True), ("\n7\t", True),
    ("7.0", False), ("07", False), ("+7", False), ("-7", False), ("7.", False), ("77", False), ("", False),
    ("3 + 4", False), ("\\text{7", False), ("７", False), ("\u0667", False), ("7\u200b", False), ("7,000", False),
    ("7 apples", False), ("\u00a07\u3000", True), ("7\x00", False), ("\ud83d7", False), ("7" * 10_000, False),
])
def test_reward_is_an_exact_match(content, right):
    value = reward(f"so \\boxed{{{content}}}", "7")
    assert value == right and type(value) is float


@pytest.mark.parametrize("content, right", [
    ("0.3333", True), (" 0.3333\n", True), ("0.33333", True), ("0.33332", True), ("0.3334", False), ("0.3332", False),
    ("0.33330000", True), ("-0.3333", False), ("1/3", False), (".3333", False), ("0,3333", False), ("3333e-4", False),
    ("0.3333x", False), ("+0.3333", False), ("nan", False), ("inf", False), ("", False), ("0_0.3333", False),
    ("\u0660.3333", False), ("00.3333", True), ("0.3333" + "0" * 30, False), ("9" * 400, False),
    ("0.3333" + "0" * 26, True), ("0.3333" + "0" * 27, False),
])
def test_a_tolerance_is_relative(content, right):
    assert reward(f"so \\boxed{{{content}}}", "0.3333", tolerance=1e-4) == right


@pytest.mark.parametrize("content, answer, right", [
    ("400.03", "400", True), ("400.05", "400", False), ("399.97", "400", True), ("399.95", "400", False),
    ("-400.03", "-400", True), ("400", "-400", False), ("0", "0", True), ("0.0", "0", True), ("0.0000001", "0", False),
    ("401", "400", False),
])
def test_tolerance_around_other_answers(content, answer, right):
    assert correct(f"\\boxed{{{content}}}", answer, 1e-4) == right
    assert correct(f"\\boxed{{{content}}}", answer) == (content == answer)  # without one, the text counts
    assert not correct(content, answer, 1e-4)


@pytest.mark.parametrize("record, named", [
    ({}, "'answer'"), ({"answer": 7}, "'answer'"), ({"answer": "7", "tolerance": "1"}, "'tolerance'"),
    ({"answer": "7", "tolerance": -1}, "'tolerance'"), ({"answer": "7", "tolerance": True}, "'tolerance'"),
    ({"answer": "7", "tolerance": 1}, "'tolerance'"),
    ({"answer": "7", "tolerance": float("nan")}, "'tolerance'"), ({"answer": "7", "tolerance": None}, "'tolerance'"),
    ({"answer": "seven", "tolerance": 1e-4}, "'seven'"), ({"answer": "1/2", "tolerance": 1e-4}, "'1/2'"),
])
def test_records_that_cannot_be_scored(record, named):
    with pytest.raises(InputError, match=f"^here: .*{named}"):
        check_scoring(record, "here")


def test_records_that_can_be_scored():
    for record in ({"answer": "seven"}, {"answer": "x", "tolerance": 0}, {"answer": "-0.5", "tolerance": 1e-4}):
        check_scoring(record, "here")


def test_reward_without_a_box():
    assert reward("7", "7") == reward("", "7") == reward("\\boxed{7", "7") == 0.0


def test_first_box_counts():
    assert reward("\\boxed{7} or \\boxed{8}", "7") == 1.0
    assert reward("\\boxed{8} or \\boxed{7}", "7") == 0.0


@pytest.mark.parametrize("completion, answer, scale, value", [
    (GOOD, "7", 0.0, 1.0),
    (GOOD, "7", 0.05, 1.05),
    (GOOD, "8", 0.05, 0.05),
    ("so \\boxed{7}", "7", 0.05, 1.0),
    ("so \\boxed{8}", "7", 0.05, 0.0),
])
def test_format_reward_is_added(completion, answer, scale, value):
    assert reward(completion, answer, scale) == pytest.approx(value)


@pytest.mark.parametrize("completion", [
    GOOD,
    GOOD + "\n",
    "</think><answer>7</answer>",
    "a\nb\n</think>\n\n <answer>7\n</answer>",
    "4 - -3 > 6 </think> <answer>\\boxed{7}</answer>",
])
def test_well_formed(completion):
    assert well_formed(completion)


@pytest.mark.parametrize("completion", [
    "",
    "3 + 4 = 7",
    "3 + 4 = 7\n</think>",
    "<answer>7</answer>",
    "3 + 4\n</think>\n<answer>7",
    "3 + 4\n</think>\n7</answer>",
    "<answer>7</answer>\n</think>",
    "3 + 4\n</think>\nso\n<answer>7</answer>",
    GOOD + " and more",
    GOOD + "\n<answer>8</answer>",
    GOOD + GOOD,
    "a </think> b </think>\n<answer>7</answer>",
    "<think>\n" + GOOD,  # the prompt has opened the block already
    "a </think><answer><answer>7</answer></answer>",
    "a </think><answer>7</think></answer>",
    "a </THINK><ANSWER>7</ANSWER>",
])
def test_not_well_formed(completion):
    assert not well_formed(completion)
    assert reward(completion.replace("\\boxed", ""), "7", 0.5) == 0.0


MEGABYTES = 5 * 2**20


@pytest.mark.parametrize("piece", ["\\boxed{", "\\boxed", "{", "}", "\\", "a", " ", "\n", "<", "</think>",
                                   "<answer>", "</think><answer></answer>"])
@pytest.mark.parametrize("before", ["", "\\boxed{", "</think>", "</think><answer>",
                                    "</think><answer></answer>"])
def test_megabytes_of_junk_take_linear_time(before, piece):
    """Some hundredths of a second; whatever looks at the rest of the text from every piece would take hours."""
    text = before + piece * (MEGABYTES // len(piece)) + "!"
    with within(60):
        assert reward(text, "7", 1.0) == reward(text, "7", 1.0, tolerance=1e-4) == 0.0
        assert len(explain(text, text)) < 400 and len(explain(text, text, tolerance=1e-4)) < 400


def test_no_text_is_taken_for_code_or_for_a_whole_number():
    """int() fails above 4,300 digits; eval and its like would run what a model writes."""
    calls = (node.func for node in ast.walk(ast.parse(Path(module.__file__).read_text())) if isinstance(node, ast.Call))
    names = {call.id if isinstance(call, ast.Name) else call.attr for call in calls}
    assert "float" in names and not names & {"int", "eval", "exec", "compile", "__import__", "literal_eval", "loads"}


def test_numbers_of_thousands_of_digits():
    huge = "9" * 10_000
    assert correct(f"\\boxed{{{huge}}}", huge) and not correct(f"\\boxed{{{huge}}}", huge[1:])
    assert not correct(f"\\boxed{{{huge}}}", "7", 1e-4) and not correct("\\boxed{7}", huge, 1e-4)
    assert not correct(f"\\boxed{{0.{huge}}}", "1", 1e-4)


PIECES = ["\\boxed{", "\\boxed", "{", "}", "<think>", "</think>", "<answer>", "</answer>", "7", "-7", "\u22127", "\uff17",
          "7.0", " 7", "1,000", "\n", " ", "\u00a0", "\x00", "\x1b[2K", "\ud83d", "9" * 40, "text"]
GOOD_PARTS = ["7 = 7", "</think>", "\n", "<answer>", "so ", "\\boxed{", "7", "}", "</answer>", "\n"]


def hostile_texts(count: int) -> list[str]:
    """Random pieces, and good answers with some of their parts lost, doubled or replaced."""
    rng, texts = random.Random(0), []
    for number in range(count):
        parts = list(GOOD_PARTS) if number % 2 else []
        for _ in range(rng.randrange(4) if number % 2 else rng.randrange(12)):
            place = rng.randrange(len(parts) + 1)
            parts[place:place + rng.randrange(2)] = [rng.choice(PIECES)] * rng.randrange(3)
        texts.append("".join(parts))
    return texts


def test_reward_and_explanation_agree_with_each_other_and_with_naive_twins():
    seen = set()
    for text in hostile_texts(4000):
        box = re.search(r"\\boxed\{([^}]*)\}", text)
        shape = r"((?!</?think>|<answer>).)*</think>\s*<answer>((?!</?think>|</?answer>).)*</answer>\s*"
        right, good = bool(box) and box[1].strip() == "7", bool(re.fullmatch(shape, text, re.DOTALL))
        near = bool(box) and bool(re.fullmatch(r"7(\.0+)?", box[1].strip(), re.ASCII))
        for tolerance, earned in ((0.0, right), (1e-4, near)):
            line = explain(text, "7", tolerance)
            assert reward(text, "7", 0.5, tolerance) == earned + 0.5 * good, text
            assert (line.startswith("right: "), line.endswith("; format: good")) == (earned, good), text
            assert line.isascii() and line.isprintable()
            assert earned or line.startswith(box_fault(text, "7", tolerance))
            assert good or line.endswith(format_fault(text))
        seen |= {(box_fault(text, "7") or "right").partition(":")[0], format_fault(text), right and good}
    assert len(seen) == 4 + 10 + 2  # every reason came up


@pytest.mark.parametrize("text, answer, tolerance, line", [
    (GOOD, "7", 0, "right: '7'; format: good"),
    ("", "7", 0, "no \\boxed{}; format: no </think>"),
    ("\\boxed{7", "7", 0, "\\boxed{ that no } closes; format: no </think>"),
    (GOOD, "8", 0, "wrong answer: '7' is not '8'; format: good"),
    ("\\boxed{8} " + GOOD, "7", 0, "wrong answer: '8' is not '7' (2 boxes, the first counts); format: good"),
    ("\\boxed{\u22127}</think>", "-7", 0, "wrong answer: '\\u22127' is not '-7'; format: no <answer>"),
    ("\\boxed{1,000}</think><answer>", "1000", 0, "wrong answer: '1,000' is not '1000'; format: no </answer>"),
    (GOOD, "7.01", 1e-4, "wrong answer: 7 is not 7.01, give or take 0.0001 of it; format: good"),
    (GOOD + "!", "7", 1e-4, "right: '7'; format: text after </answer>"),
    ("\\boxed{1/3}" + GOOD, "7", 1e-4, "no plain decimal: '1/3' (2 boxes, the first counts); format: good"),
    ("\\boxed{" + "x" * 99 + "}", "7", 0, f"wrong answer: '{'x' * 60}'... (99 characters) is not '7'; format: no </think>"),
])
def test_explain(text, answer, tolerance, line):
    assert explain(text, answer, tolerance) == line


def test_a_box_behind_megabytes_of_junk_is_found():
    junk = "{\\box }" * (MEGABYTES // 7)
    assert extract(junk + "\\boxed{7}" + junk) == "7"
    assert reward("a" * MEGABYTES + GOOD, "7", 1.0) == 2.0


def test_chat():
    system, user = {"role": "system", "content": SYSTEM}, {"role": "user", "content": "3 + 4?"}
    assert chat("3 + 4?") == [system, user]
    assert chat("3 + 4?", OPENING + GOOD) == [system, user, {"role": "assistant", "content": OPENING + GOOD}]
    assert chat("3 + 4?", "")[2:] == [{"role": "assistant", "content": ""}]


def test_the_system_message_shows_the_tags_of_the_contract():
    assert OPENING == "<think>\n"
    assert all(tag in SYSTEM for tag in ("<think>", "</think>", "<answer>", "</answer>"))


@pytest.mark.parametrize("answer", [" 24 ", "24\n", "\\frac{1}{2}"])
def test_an_answer_that_no_box_can_hold_is_refused(answer):
    with pytest.raises(InputError, match="^x:3: field 'answer' is .* no box can hold"):
        check_scoring({"answer": answer}, "x:3")


def test_the_tolerance_is_a_share_of_the_right_answer():
    assert correct("\\boxed{1.5}", "1", 0.5) and correct("\\boxed{0.5}", "1", 0.5) and not correct("\\boxed{1.8}", "1", 0.5)
