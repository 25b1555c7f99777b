"""The verifier: right answers of every arm pass, planted slips are found where they are and named for what they are."""

import itertools
import math
import random
import re
import time
from dataclasses import replace

import pytest

from conftest import FREE_TOY
from minibridge import arithmetic, custom, dag, formula, igsm, traces, verify
from minibridge.dag import Node, Problem
from minibridge.formula import ARITHMETIC, UNKNOWN, UNREADABLE
from minibridge.verify import (RESTATEMENT, BOX, CLOSING, FAILED_ATTEMPT, LOCK, MENTION, NAMING, WRONG_RESTATEMENT, RETRIEVAL, STEP,
                               SUBGOAL, SUBSTITUTION, UNDEFINED, UNFINISHED, WRONG_BOX, WRONG_CLOSING)

COMBINATIONS = [traces.Behaviors(*choice) for choice in itertools.product((False, True), (0, 2, 4), (0.0, 0.1, 0.5))]
KINDS = [((15, 20), igsm.PAPER), ((21, 25), igsm.PAPER), ((1, 8), FREE_TOY), ((3, 14), igsm.PAPER)]


def draw(i) -> Problem:
    return igsm.draw(random.Random(f"verify {i}"), *KINDS[i % len(KINDS)])


@pytest.fixture(scope="module")
def problems():
    return [draw(i) for i in range(72)]


# --- an answer by hand ---------------------------------------------------------------------------------------


def by_hand() -> Problem:
    nodes = [Node("Ash", "Jar", 4), Node("Elm", "Jar", 9), Node("Oak", "Jar", ("-", "Ash's Jar", "Elm's Jar")),
             Node("Yew", "Jar", ("*", 2, ("+", "Ash's Jar", "Elm's Jar", "Oak's Jar"))),
             Node("Yew", "Food", ("+", ("*", "Yew's Jar", "Ash's Jar"), ("*", "Oak's Jar", "Elm's Jar")), stated=False),
             Node("Fir", "Jar", ("+", 3, "Elm's Jar")), Node("Fir", "Tin", "Elm's Jar")]
    keys = [node.key for node in nodes]
    return Problem("test", dict(zip(keys, nodes)), tuple(keys[:5]), tuple(keys[5:]), num_ops=8)


PROBLEM = by_hand()
TEXT = """<think>
I will find one quantity at a time.
- Each Ash's Jar is 4. Call it p. p = 4.
- The text gives each Elm's Jar as 9. Let it be q. q = 9.
- Now take each Yew's Jar. Write t for it. It equals 2 times the sum of each Ash's Jar, each Elm's Jar and each Oak's \
Jar. But each Oak's Jar is not known yet, so it must wait.
- Let d be each Oak's Jar. The text says it equals the difference of each Ash's Jar and each Elm's Jar. \
d = p - q = 4 - 9 = -5.
- Let r stand for each Fir's Jar. r = 3 + q = 3 + 9 = 12.
- Next is each Yew's Jar. It is t already. t = 2 * (p + q + d) = 2 * (4 + 9 + -5) = 2 * (13 + -5) = 2 * 8 = 16.
- Write Z for each Yew's Food. Z = t * p + d * q = 16 * 4 + -5 * 9 = 64 + -5 * 9 = 64 + -45 = 19.
So the result is 19.
</think>
<answer>
The answer is \\boxed{19}.
</answer>"""


def edited(old, new) -> str:
    assert TEXT.count(old) == 1, old
    return TEXT.replace(old, new)


def check(text, problem=PROBLEM):
    return verify.verify(problem, text)


def found(text, problem=PROBLEM) -> tuple:
    verdict = check(text, problem)
    assert verdict.correct == (verdict.first_wrong_step is None) == (verdict.error is None)
    return verdict.first_wrong_step, verdict.error


def test_a_right_answer_in_full():
    verdict = check(TEXT)
    assert verdict.correct and verdict.boxed and verdict.first_wrong_step is None and verdict.error is None
    assert [step.kind for step in verdict.steps] == [STEP, STEP, FAILED_ATTEMPT, STEP, STEP, STEP, STEP, CLOSING, BOX]
    assert [step.node for step in verdict.steps] == [
        "Ash's Jar", "Elm's Jar", "Yew's Jar", "Oak's Jar", "Fir's Jar", "Yew's Jar", "Yew's Food", "Yew's Food", None]
    assert not any(step.error or step.reason for step in verdict.steps)
    assert (verdict.solved, verdict.attempts, verdict.restatements, verdict.subgoals) == (6, 1, 2, 4)
    assert verdict.unneeded == 1
    assert [(kind, TEXT[start:end]) for kind, start, end in verdict.spans() if kind in (RESTATEMENT, SUBGOAL, BOX)] == [
        (RESTATEMENT, "It equals 2 times the sum of each Ash's Jar, each Elm's Jar and each Oak's Jar"),
        (RESTATEMENT, "The text says it equals the difference of each Ash's Jar and each Elm's Jar"),
        (SUBGOAL, "2 * (13 + -5)"), (SUBGOAL, "2 * 8"), (SUBGOAL, "64 + -5 * 9"), (SUBGOAL, "64 + -45"),
        (BOX, "\\boxed{19}")]
    assert [TEXT[step.start:step.end] for step in verdict.steps[:-2]] == \
        [line for line in TEXT.split("\n") if line.startswith("- ")]
    assert TEXT[verdict.steps[-2].start:verdict.steps[-2].end].strip() == "So the result is 19."


@pytest.mark.parametrize("old, new", [
    ("<think>\nI will find one quantity at a time.\n", ""),
    ("I will find", "There are 7 = 3 things. I find"),
    ("- Each Ash's", "- each Ash's"), ("- Let d be", "- let d be"), ("The text gives", "the  Text gives"),
    ("- Now take each Yew's Jar. Write t", "  -   Now   take each  Yew's\tJar.   Write t"),
    ("9 + -5) = 2 * (13 + -5)", "9+-5)=2*( 13+-5 )"), ("-45 = 19.", "-45 = 19"), ("wait.", "wait .  "),
    ("2 * (p + q + d) = 2 * (4", "2 × (p + q + d) = 2 × (4"), ("4 - 9 = -5", "4 − 9 = −5"),
    ("Each Ash's Jar is 4", "Each Ash’s Jar is 4"),
    ("2 * (p + q + d)", "(d + p + q) * 2"), ("2 * (13 + -5) =", "2 * (-5 + 13) ="), ("3 + q =", "q + 3 ="),
    ("t * p + d * q", "q * d + p * t"), ("2 * (4 + 9 + -5)", "2 * (4 + 9 - 5)"),
    ("2 * (p + q + d)", "2 * ((p + (q)) + d)"), ("2 * (13 + -5)", "2 * (-1 + 9)"), ("2 * (13 + -5)", "2 * (4 + 4)"),
    ("= 64 + -5 * 9 = 64 + -45 ", ""), ("= 64 + -5 * 9 = 64 + -45 ", "= 64 + -45 "), ("= 4 - 9 ", ""),
    ("= 2 * (4 + 9 + -5) ", "= 2 * (4 + q + -5) = 2 * (4 + 9 + d) "), ("= p - q = 4", "= 4"),
    ("3 + q = 3", "3 + q = 3 + q = 3"),
    ("- Let d be each Oak's Jar.", "- Next is each Oak's Jar. Call it d."),
    ("- Let d be each Oak's Jar.", "- Next is each Oak's Jar, call it d."),
    ("- Each Ash's Jar is 4. Call it p.", "- Each Ash's Jar is 4; let it be p."),
    ("- Each Ash's Jar is 4. Call it p.", "- Let p be each Ash's Jar."), ("Call it p. p = 4.", "Call it p."),
    ("- Each Ash's Jar is 4. Call it p.", "- Let p be each Ash's Jar.\n-"),
    ("It is t already. t =", "It is t already. So t ="), ("It is t already. ", ""), ("Z = t", "Z = t * p + q * d = t"),
    ("Next is each Yew's Jar. It is t already. ", ""), ("4 - 9 = -5", "4 - 9 = (-5)"), ("64 + -5 * 9", "64 - 5 * 9"),
    ("16 * 4 + -5 * 9", "16 * 4 - 5 * 9"), ("Each Ash's Jar is 4.", "Each Ash's Jar is 4.0."),
    ("each Ash's Jar, each Elm's Jar and each Oak's Jar. But", "each Oak's Jar, each Ash's Jar and each Elm's Jar. But"),
    ("But each Oak's Jar is not", "But each Oak's Jar are not"),
    ("So the result is 19.", "That gives 19."), ("So the result is 19.", "After 6 steps I find 19"),
    ("So the result is 19.\n", ""),
    ("boxed{19}", "boxed{ 19 }"), ("<answer>\n", ""), ("</think>\n", ""),
    ("- Let r", "- Let d be each Oak's Jar. d = p - q = -5.\n- Let r"),
    ("- Let r", "- Let f be each Fir's Tin. f = q = 9.\n- Let r"),
], ids=str)
def test_harmless_variation(old, new):
    assert found(edited(old, new)) == (None, None)


@pytest.mark.parametrize("old, new, step, error", [
    # the problem's facts
    ("Each Ash's Jar is 4", "Each Ash's Jar is 5", 0, RETRIEVAL), ("p = 4", "p = 5", 0, RETRIEVAL),
    ("is 4. Call it p. p = 4", "is 5. Call it p. p = 5", 0, RETRIEVAL),
    ("Each Ash's Jar is 4", f"Each Ash's Jar is {'4' * 5000}", 0, RETRIEVAL),
    ("- Let d be", "- Each Oak's Jar is -5.\n- Let d be", 3, RETRIEVAL),
    ("d = p - q", "d = q - p", 3, RETRIEVAL), ("d = p - q", "d = p + q", 3, RETRIEVAL),
    ("r = 3 + q = 3 + 9", "r = 2 + q = 2 + 9", 4, RETRIEVAL),
    ("r = 3 + q = 3 + 9 = 12", "r = 3 * q = 3 * 9 = 27", 4, RETRIEVAL),
    ("t = 2 * (p + q + d)", "t = 2 * p + q + d", 5, RETRIEVAL),
    ("t = 2 * (p + q + d)", "t = 2 * (p + q)", 5, RETRIEVAL),
    ("t * p + d * q", "t * q + d * p", 6, RETRIEVAL), ("Z = t * p + d * q = 16", "Z = 17", 6, RETRIEVAL),
    ("r = 3 + q = 3 + 9 = 12", "r = 12", 4, RETRIEVAL), ("r = 3 + q = 3 + 9 = 12", "r = 10 + 2 = 12", 4, RETRIEVAL),
    ("r stand for each Fir's Jar", "r stand for each Fir's Tin", 4, RETRIEVAL),
    # numbers
    ("3 + 9 = 12", "3 + 8 = 11", 4, SUBSTITUTION), ("4 - 9 = -5", "9 - 4 = 5", 3, SUBSTITUTION),
    ("(4 + 9 + -5) = 2 * (13 + -5)", "(4 + 9 + 5) = 2 * (13 + 5)", 5, SUBSTITUTION),
    ("4 - 9 = -5", "4 - 9 = 5", 3, ARITHMETIC), ("= 12.", "= 13.", 4, ARITHMETIC), ("= 12.", "= 12.5.", 4, ARITHMETIC),
    ("= 12.", "= 12.0001.", 4, ARITHMETIC), ("Each Ash's Jar is 4.", "Each Ash's Jar is 4.0001.", 0, RETRIEVAL),
    ("3 + 9 =", "3 + 9.0001 =", 4, SUBSTITUTION), ("result is 19.", "result is 19.0001.", 7, WRONG_CLOSING),
    ("= 2 * 8 = 16", "= 3 + 13 = 16", 5, ARITHMETIC), ("4 - 9 = -5.", "4 - 9 = (5).", 3, ARITHMETIC),
    ("(13 + -5)", "(14 + -5)", 5, ARITHMETIC), ("2 * 8 = 16", "2 * 8 = 18", 5, ARITHMETIC),
    ("2 * 8 =", "3 * 8 =", 5, ARITHMETIC),
    ("2 * 8 = 16", "2 * 9 = 16", 5, ARITHMETIC), ("64 + -45 = 19", "63 + -44 = 19", 6, ARITHMETIC),
    ("= 64 + -5 * 9", "= 64 + 5 * 9", 6, ARITHMETIC), ("3 + 9 = 12", "3 + 9", 4, ARITHMETIC),
    ("= 3 + 9 = 12", "", 4, ARITHMETIC),
    ("= 2 * 8 = 16", "= 2 * (4 + 4)", 5, ARITHMETIC), ("= 12.", f"= {'1' * 10_000}.", 4, ARITHMETIC),
    # names
    ("- Let r stand for each Fir's Jar. r = 3 + q = 3 + 9 = 12.",
     "- Let r be each Yew's Food. r = t * p + d * q = 8.", 4, UNKNOWN),
    ("- Let d be", "- t = 2 * (p + q + t) = 0.\n- Let d be", 3, RETRIEVAL),
    ("- Let d be", "- t = 2 * (4 + 9 + -5) = 16.\n- Let d be", 3, UNKNOWN),
    ("r = 3 + q", "r = 3 + k", 4, UNDEFINED), ("r = 3 + q", "r = 3 + Q", 4, UNDEFINED),
    ("r = 3 + q", "s = 3 + q", 4, UNDEFINED),
    ("Let d be", "Let k be", 3, UNDEFINED), ("each Fir's Jar", "each Fir's Car", 4, UNDEFINED),
    ("is t already", "is k already", 5, UNDEFINED),
    ("But each Oak's Jar is", "But each Oak's Car is", 2, UNDEFINED),
    ("Let d be each Oak's Jar", "Let d be it", 3, UNDEFINED),
    ("- Now take each Yew's Jar. Write", "- Write", 2, UNDEFINED),
    ("Let d be", "Let p be", 3, NAMING), ("is t already", "is p already", 5, NAMING),
    ("r = 3 + q", "q = 3 + q", 4, NAMING),
    # claims in words
    ("But each Oak's Jar is not", "But each Elm's Jar is not", 2, LOCK),
    ("But each Oak's Jar is", "But each Oak's Jar and each Elm's Jar are", 2, LOCK),
    ("r = 3 + q = 3 + 9 = 12.", "But each Elm's Jar is not known yet, so it must wait.", 4, LOCK),
    ("r = 3 + q = 3 + 9 = 12.", "Since each Oak's Jar is still unknown, go back.", 4, LOCK),
    ("- Let d be", "- Next is each Yew's Food. But each Oak's Jar is not known yet, so it must wait.\n- Let d be", 3, LOCK),
    ("equals 2 times", "equals 3 times", 2, WRONG_RESTATEMENT),
    ("equals 2 times the sum of each Ash's", "equals 2 times the sum of each Oak's", 2, WRONG_RESTATEMENT),
    ("2 times the sum of each Ash's Jar, each Elm's Jar and each Oak's Jar",
     "2 times each Ash's Jar, the sum of each Elm's Jar and each Oak's Jar", 2, WRONG_RESTATEMENT),
    ("2 times the sum", "2 more than the sum", 2, WRONG_RESTATEMENT), ("2 times the sum of", "the sum of", 2, WRONG_RESTATEMENT),
    ("difference of each Ash's Jar and each Elm's", "difference of each Elm's Jar and each Ash's", 3, WRONG_RESTATEMENT),
    ("Yew's Food. Z", "Yew's Food. It equals the sum of each Yew's Jar and each Ash's Jar. Z", 6, WRONG_RESTATEMENT),
    ("r = 3 + q = 3 + 9 = 12.", "But and is not known yet, so it must wait.", 4, UNDEFINED),
    # form
    ("- Let r", "- Hello there.\n- Let r", 4, UNREADABLE), ("- Let r", "hello\n- Let r", 4, UNREADABLE),
    ("r = 3 + q", "r = 3 + + * q", 4, UNREADABLE), ("r = 3 + q", "r = (3 + q", 4, UNREADABLE),
    ("r = 3 + q", "r = 3 + q)", 4, UNREADABLE),
    ("3 + 9 = 12", "3 + 9 = = 12", 4, UNREADABLE), ("r = 3 + q", "r + 1 = 3 + q", 4, UNREADABLE),
    ("3 + 9 = 12", "3 9 = 12", 4, UNREADABLE),
    ("r = 3 + q", f"r = 3 + {'+' * 97}q q", 4, UNREADABLE),
    ("r = 3 + q", "r =", 4, UNREADABLE), ("= 12.", "= twelve.", 4, UNDEFINED),
    ("is 4. Call", "is four. Call", 0, UNREADABLE),
    ("- Let r", "- Let f be each Fir's Tin. f = q.\n- Let r", 4, ARITHMETIC),
    ("- Let r", "- Let f be each Fir's Tin. f = q = q.\n- Let r", 4, ARITHMETIC),
    # the end
    ("So the result is 19", "So the result is 18", 7, WRONG_CLOSING), ("boxed{19}", "boxed{18}", 8, WRONG_BOX),
    ("boxed{19}", "boxed{019}", 8, WRONG_BOX), ("The answer is \\boxed{19}.", "", 8, WRONG_BOX),
    ("boxed{19}", "boxed{19", 8, WRONG_BOX),
    ("So the result is 19", f"So the result is {'9' * 5000}", 7, WRONG_CLOSING),
    (TEXT[TEXT.index("- Write Z"):TEXT.index("So the")], "", 6, UNFINISHED),
    (TEXT[TEXT.index(" + -45"):], "", 6, ARITHMETIC), (TEXT[TEXT.index("- Let r"):], "", 4, UNFINISHED),
    (TEXT, "", 0, UNFINISHED), (TEXT, "\\boxed{19}", 0, UNFINISHED),
], ids=lambda value: str(value)[:50])
def test_a_slip_is_found_where_it_is(old, new, step, error):
    text = edited(old, new)
    assert found(text) == (step, error)
    verdict = check(text)
    assert verdict.steps[step].reason and verdict.steps[step].start <= verdict.steps[step].end <= len(text)


def test_a_step_is_judged_by_what_was_written():
    """A wrong value carried on rightly is one wrong step; only the box knows better."""
    text = edited("4 - 9 = -5", "4 - 9 = 5").replace("(4 + 9 + -5)", "(4 + 9 + 5)").replace("(13 + -5)", "(13 + 5)")
    text = text.replace("2 * 8 = 16", "2 * 18 = 36").replace("16 * 4 + -5 * 9 = 64 + -5 * 9 = 64 + -45 = 19",
                                                             "36 * 4 + 5 * 9 = 144 + 45 = 189")
    text = text.replace("result is 19", "result is 189").replace("boxed{19}", "boxed{189}")
    assert [step.error for step in check(text).steps] == [None] * 3 + [ARITHMETIC] + [None] * 4 + [WRONG_BOX]
    assert not check(text).boxed and check(text.replace("boxed{189}", "boxed{19}")).boxed


def test_a_wrong_sentence_does_not_hide_the_rest_of_its_step():
    verdict = check(edited("equals the difference", "equals the sum"))
    assert [step.error for step in verdict.steps] == [None] * 3 + [WRONG_RESTATEMENT] + [None] * 5
    assert verdict.restatements == 2 and verdict.solved == 6


def test_steps_out_of_the_minimal_set():
    again = "- Let d be each Oak's Jar. d = p - q = -5.\n" + 2 * "- Let T be each Fir's Tin. T = q = 9.\n"
    verdict = check(edited("- Let r", again + "- Let r"))
    assert verdict.correct and (verdict.solved, verdict.unneeded) == (9, 4)


@pytest.mark.parametrize("slot, wording, old, new", [
    ("NAME", "Denote it by {letter}.", "Call it p.", "Denote it by p."),
    ("SELECT_AND_NAME", "Put {letter} as {node}.", "Let d be each Oak's Jar.", "Put d as each Oak's Jar."),
    ("STATED", "There are {value} of {node}.", "Each Ash's Jar is 4.", "There are 4 of each Ash's Jar."),
    ("LOCKED", "{nodes} {verb} missing.", "But each Oak's Jar is not known yet, so it must wait.",
     "Each Oak's Jar is missing."),
    ("RESTATE", "One reads: {expression} (so it stands).",
     "It equals 2 times the sum of each Ash's Jar, each Elm's Jar and each Oak's Jar.",
     "One reads: 2 times the sum of each Ash's Jar, each Elm's Jar and each Oak's Jar (so it stands)."),
    ("REMIND", "I call it {letter}.", "It is t already.", "I call it t."),
])
def test_a_wording_added_to_traces_is_understood(monkeypatch, slot, wording, old, new):
    text = edited(old, new)
    assert found(text)[1] in (UNREADABLE, UNDEFINED)
    monkeypatch.setattr(traces, slot, getattr(traces, slot) + (wording,))
    monkeypatch.setattr(verify, "GRAMMAR", verify._grammar())
    assert found(text) == (None, None)


# --- generated answers ---------------------------------------------------------------------------------------


def counts(problem, seed, behaviors):
    """Failed attempts, restatements, reductions, steps and redundant ones, as `traces` plans them."""
    rng = random.Random(seed)
    _, reflecting, analysing = (random.Random(rng.getrandbits(64)) for _ in range(3))
    plan = traces.plan(problem, reflecting, behaviors.reflection)
    done = [attempt.key for attempt in plan if not attempt.missing]
    operations = [len(dag.leaves(problem.nodes[key].expr)) - 1 for key in done]
    return (len(plan) - len(done),
            sum(traces.exploited(problem.nodes[key], missing, analysing, behaviors)[0] for key, missing in plan),
            behaviors.subgoal * sum(max(0, number - 1) for number in operations), len(done),
            len(set(done) & set(problem.redundant)))


@pytest.mark.parametrize("behaviors", COMBINATIONS, ids=str)
def test_generated_answers_are_right_and_counted(problems, behaviors):
    offset = COMBINATIONS.index(behaviors)
    for i, problem in enumerate(problems[offset % 4::4]):
        text = traces.answer(problem, random.Random(i), behaviors)
        verdict = check(text, problem)
        assert verdict.correct, (verdict.steps[verdict.first_wrong_step], text)
        assert counts(problem, i, behaviors) == (verdict.attempts, verdict.restatements, verdict.subgoals, verdict.solved,
                                                 verdict.unneeded)
        assert MENTION not in {step.kind for step in verdict.steps}
        assert check(text.removeprefix("<think>\n"), problem).correct  # a completion


# --- planted slips -------------------------------------------------------------------------------------------
#
# `corrupt` changes one number, letter, operator, operand or node name of a generated answer into another. It returns
# None where the change leaves a true answer, which is decided here by arithmetic and by the problem, not by the
# verifier; or it leaves out a step.

LETTER = r"(?<![\w'])[A-Za-z](?!\w)"
VALUE = r"-?\d+(?:\.\d+)?"
STRANGER = "each Moon's Robot"


def corrupt(problem, text, rng, lettered):
    """(new text, index of the step that is wrong now, the kinds of error it may be called)."""
    steps = [match.span() for match in re.finditer(r"(?m)^- .*$", text)]
    what = rng.choice((corrupt_number, corrupt_number, corrupt_letter if lettered else corrupt_operand, corrupt_operator,
                       corrupt_node, leave_out))
    if what is corrupt_number and rng.random() < .05:
        match = rng.choice(list(re.finditer(rf"(?<=is |es ){VALUE}(?=\.\n</think>)|(?<=boxed\{{){VALUE}", text)))
        boxed = match.start() > text.index("</think>")
        other = other_number(match[0], rng, away=max(9e-4, 2 * problem.tolerance * abs(float(match[0]))))
        new = text[:match.start()] + other + text[match.end():]
        return new, len(steps) + boxed, {WRONG_BOX if boxed else WRONG_CLOSING}
    index = rng.randrange(len(steps))
    start, end = steps[index]
    if what is leave_out:
        return leave_out(problem, text, text[start:end], index, lettered)
    result = what(problem, text, text[start:end], rng)
    if result is None:
        return None
    line, step, errors = result
    return text[:start] + line + text[end:], index if step is None else step, errors


def other_number(number, rng, away=9e-4) -> str:
    """Another number, by default at least a thousandth away: rounding to four decimals cannot make them equal."""
    value = float(number)
    others = [value + rng.choice((-10, -1, -.001, .001, 1, 10)), 1.5 * value, -value or 1.0, float(rng.randint(-99, 99))]
    return rng.choice([f"{other:.4f}".rstrip("0").rstrip(".") for other in others if abs(other - value) > away])


def sentences(line):
    """(start, end) of the sentences of a step."""
    return [match.span() for match in re.finditer(r"(?<=\s)\S.*?\.(?=\s|$)", line)]


def links(line):
    """(start, end) of what stands between the "=" of a step's formula, its letter left out; none in a failed attempt."""
    start, end = sentences(line)[-1]
    if " = " not in line[start:end]:
        return []
    ends = [match.span() for match in re.finditer(" = ", line)] + [(end - 1, end)]
    return [(before[1], after[0]) for before, after in itertools.pairwise(ends)]


def nodes_named(problem, line):
    """Matches of the problem's node names in a line, left to right, and the keys of all names."""
    phrases = {name: key for key, node in problem.nodes.items() for name in (key, traces.phrase(node))}
    names = "|".join(sorted(map(re.escape, phrases), key=len, reverse=True))
    return list(re.finditer(rf"(?<!\w)(?:{names})(?!\w)", line.replace("- Each", "- each"))), phrases


def corrupt_number(problem, text, line, rng):
    numbers = list(re.finditer(rf"(?<![\w.-]){VALUE}", line))
    if not numbers:
        return None
    match = rng.choice(numbers)
    spans = links(line)
    where = next((i for i, (start, end) in enumerate(spans) if start <= match.start() < end), None)
    if where is None:
        sentence = next(line[start:end] for start, end in sentences(line) if start <= match.start() < end)
        error = WRONG_RESTATEMENT if "equals" in sentence else RETRIEVAL
    else:
        error = (RETRIEVAL, SUBSTITUTION, *[ARITHMETIC] * 9)[where]
    return line[:match.start()] + other_number(match[0], rng) + line[match.end():], None, {error}


def corrupt_letter(problem, text, line, rng):
    match = rng.choice(list(re.finditer(LETTER, line)))
    new = rng.choice([letter for letter in igsm.PAPER.letters if letter != match[0]])
    changed = line[:match.start()] + new + line[match.end():]
    if links(line):
        return changed, None, {UNDEFINED, NAMING, RETRIEVAL}
    before, after = text.split(line, 1)
    known = set(re.findall(LETTER, " ".join(re.findall(r"(?m)^- .*$", before))))
    if match[0] in known or new in known:
        return changed, None, {UNDEFINED, NAMING}
    # A free choice of a letter, until the old letter turns up again or the new one is given to another node.
    for step, later in enumerate(re.findall(r"(?m)^- .*$", after), before.count("\n- ") + 1):
        if re.search(rf"(?<![\w'])(?:{match[0]}|{new})(?!\w)", later):
            return changed, step, {UNDEFINED, NAMING}
    return None


def corrupt_operand(problem, text, line, rng):
    """Without letters: another name before the first "=" of a step, or in its formula."""
    if not links(line):
        return None
    matches, phrases = nodes_named(problem, line)
    start = sentences(line)[-1][0]
    match = rng.choice([match for match in matches if match.start() >= start])
    new = rng.choice([key for key in [*problem.nodes, STRANGER] if key != match[0]])
    head = match.start() == start
    errors = {UNDEFINED} if new == STRANGER else {NAMING} if head else {RETRIEVAL}
    return line[:match.start()] + new + line[match.end():], None, errors


def value_of(problem, link, rng) -> float | None:
    """Value of a link of the grammar, by Python itself (the text is the generator's own), with the numbers that `rng`
    gives to names; None where there is none."""
    matches, phrases = nodes_named(problem, link)
    for phrase in sorted(phrases, key=len, reverse=True):
        link = link.replace(phrase, f"{rng.randint(100, 999)}.0")
    functions = {letter: float(rng.randint(100, 999)) for letter in igsm.PAPER.letters}
    functions |= {"sqrt": math.sqrt, "square": lambda number: number * number}
    assert re.fullmatch(r"([-+*/()\d. ]|sqrt|square|\b[A-Za-z]\b)+", link), link
    try:
        return eval(link, {"__builtins__": {}}, functions)
    except (ZeroDivisionError, ValueError):
        return None


def corrupt_operator(problem, text, line, rng):
    places = [(start, end, match.start() + start) for start, end in links(line)
              for match in re.finditer(r"(?<= )[-+*/](?= )", line[start:end])]
    if not places:
        return None
    start, end, at = rng.choice(places)
    new = rng.choice([operator for operator in "+-*/" if operator != line[at]])
    changed = line[:at] + new + line[at + 1:]
    for junk in range(3):
        value, other = (value_of(problem, text[start:end], random.Random(junk)) for text in (line, changed))
        if other is not None and not math.isclose(value, other, rel_tol=0, abs_tol=2e-4):
            where = [span[0] for span in links(line)].index(start)
            return changed, None, {(RETRIEVAL, SUBSTITUTION, *[ARITHMETIC] * 9)[where]}
    return None  # 3 - 0 and 3 + 0, 2 * 2 and 2 + 2; or a division by 0, which is told by its reason, not by its kind


def corrupt_node(problem, text, line, rng):
    """Another node where sentences name one (what formulas call it is left to corrupt_letter and corrupt_operand)."""
    matches, phrases = nodes_named(problem, line)
    formula_at = sentences(line)[-1][0] if links(line) else len(line)
    matches = [match for match in matches if match.start() < formula_at]
    match = rng.choice(matches)
    new = rng.choice([traces.phrase(node) for key, node in problem.nodes.items() if key != phrases[match[0]]] + [STRANGER])
    changed = line[:match.start()] + new + line[match.end():]
    sentence = next(line[start:end] for start, end in sentences(line) if start <= match.start() < end)
    if "equals" in sentence:
        return changed, None, {WRONG_RESTATEMENT}
    if match is not matches[0]:
        return changed, None, {LOCK, UNDEFINED}
    if new == STRANGER:
        return changed, None, {UNDEFINED}
    key, other = phrases[match[0]], phrases[new]
    if links(line):
        if problem.nodes[key].expr == problem.nodes[other].expr and not nodes_named(problem, line[formula_at:])[0]:
            return None  # told apart by later steps only
    else:
        solved = {key_of(problem, bullet) for bullet in re.findall(r"(?m)^- .*$", text.split(line)[0]) if links(bullet)}
        if set(problem.missing(key, solved)) == set(problem.missing(other, solved)):
            return None  # waits for the same nodes
    return changed, None, {RETRIEVAL, UNKNOWN, LOCK, WRONG_RESTATEMENT, NAMING}


def key_of(problem, bullet) -> str:
    """The node a step is about."""
    matches, phrases = nodes_named(problem, bullet)
    return phrases[matches[0][0]]


def leave_out(problem, text, line, index, lettered):
    """The step that gave a node its value is missing: wrong is the first one that uses its letter or needs the node."""
    if not links(line):
        return None
    key, letter = key_of(problem, line), line[slice(*sentences(line)[-1])][0]
    before, after = text.split(line + "\n", 1)
    for step, later in enumerate(re.findall(r"(?m)^- .*$", after), index):
        needs = key in problem.nodes[key_of(problem, later)].parents
        if needs and not links(later):
            return before + after, step, {LOCK}
        if re.search(rf"(?<![\w']){letter}(?!\w)", later) if lettered else needs:
            return before + after, step, {UNDEFINED, UNKNOWN}
    return (before + after, len(re.findall(r"(?m)^- ", before + after)), {UNFINISHED}) if key == problem.target else None


TASKS = {
    "igsm": lambda rng: igsm.draw(rng, *rng.choice(KINDS)),
    "arithmetic": lambda rng: arithmetic.draw(rng, rng.choice((3, 4, 5))),
    "arithmetic-int": lambda rng: arithmetic.draw(rng, rng.choice((3, 4, 5)), variant="int"),
}
STRICT = [replace(choice, strict=True) for choice in COMBINATIONS]


def worked(task, name):
    """A problem of a task, an answer to it in any arm and wording, the random stream, and whether it has letters."""
    rng = random.Random(f"{task} {name}")
    problem = TASKS[task](rng)
    if rng.random() < 0.2:  # as in arm rc-aug
        problem = replace(problem, order=problem.topological_order(rng))
    lettered = task == "igsm" and rng.random() < 0.7
    letters = igsm.PAPER.letters if lettered else ""
    return problem, traces.answer(problem, rng, rng.choice(COMBINATIONS + STRICT), letters), rng, lettered


def right_answers(count, task, seed=""):
    """`count` answers that are all right; every one must be found so."""
    for i in range(count):
        problem, text, *_ = worked(task, f"{seed} {i}")
        verdict = check(text, problem)
        assert verdict.correct, (verdict.steps[verdict.first_wrong_step], text)


def campaign(count, task, seed="") -> dict:
    """`count` answers with one slip each; {kind of error: times}. Every one must be found at its step, by its kind."""
    tally = {}
    for i in itertools.count():
        problem, text, rng, lettered = worked(task, f"{seed} slip {i}")
        planted = corrupt(problem, text, rng, lettered)
        if planted is not None:
            step, error = found(planted[0], problem)
            assert step == planted[1] and error in planted[2], (i, step, error, planted[1:], planted[0])
            tally[error] = tally.get(error, 0) + 1
            if sum(tally.values()) == count:
                return tally


@pytest.mark.parametrize("task", TASKS)
def test_answers_of_every_task_arm_and_wording_are_right(task):
    right_answers(200, task)


@pytest.mark.parametrize("task", TASKS)
def test_planted_slips_are_found(task):
    letters = {NAMING} if task != "igsm" else set()
    kinds = {RETRIEVAL, SUBSTITUTION, ARITHMETIC, UNDEFINED, UNKNOWN, NAMING, LOCK, WRONG_RESTATEMENT, UNFINISHED, WRONG_BOX,
             WRONG_CLOSING}
    assert set(campaign(400, task)) | letters == kinds


# --- problems of a file --------------------------------------------------------------------------------------

OWN = {"nodes": [
    {"name": "the pupils", "formula": "27", "statement": "There are 27 pupils, so x = 27."},
    {"name": "2nd class", "formula": "9", "statement": "The 2nd class sends 9."},
    {"name": "v1.2 fans", "formula": "the pupils / 2nd class", "statement": "The fans are few. There is 1 for 9 pupils."},
    {"name": "all", "formula": "2 * (the pupils - v1.2 fans)"}], "target": "all", "ask": "How many?"}
OWN_TEXT = """- The text gives the pupils as 27. Let it be a. a = 27.
- Next is v1.2 fans. Call it c. The text says: The fans are few. There is 1 for 9 pupils. But 2nd class is not known yet, \
so it must wait.
- The text gives 2nd class as 9. 2nd class = 9.
- Now take v1.2 fans. It is c already. Recall: The fans are few. There is 1 for 9 pupils. c = a / 2nd class = 27 / 9 = 3.
- All = 2 * (The pupils - c) = 2 * (27 - 3) = 2 * 24 = 48.
So the result is 48. \\boxed{48}"""


def test_problems_of_a_file():
    problem = custom.problem(OWN)
    verdict = check(OWN_TEXT, problem)
    assert verdict.correct, verdict.steps[verdict.first_wrong_step]
    assert (verdict.solved, verdict.attempts, verdict.restatements, verdict.subgoals) == (4, 1, 2, 1)
    quotes = [OWN_TEXT[start:end] for kind, start, end in verdict.spans() if kind == RESTATEMENT]
    assert all("The fans are few. There is 1 for 9 pupils" in quote for quote in quotes)
    for seed in range(50):
        assert check(traces.answer(problem, random.Random(seed), traces.Behaviors(True, 4, .5)), problem).correct


@pytest.mark.parametrize("old, new", [
    ("2nd class = 9", "2nd  class = 9"), ("a / 2nd class", "a / 2nd   class"), ("2nd class is not", "2nd  class is not"),
    ("Recall: The fans are few. There", "Recall: the fans  are few. there"), ("2 * (The pupils", "2 * (the  pupils"),
])
def test_blanks_and_case_are_free_in_problems_of_a_file(old, new):
    assert old in OWN_TEXT
    assert found(OWN_TEXT.replace(old, new), custom.problem(OWN)) == (None, None)


@pytest.mark.parametrize("old, new, step, error", [
    ("Recall: The fans are few", "Recall: The fans are many", 3, WRONG_RESTATEMENT),
    ("2nd class is not known yet", "3rd class is not known yet", 1, UNDEFINED),
    ("c = a / 2nd class", "c = a * 2nd class", 3, RETRIEVAL), ("2nd class = 9", "2nd class = 8", 2, RETRIEVAL),
    ("All = 2 * (The pupils", "All = 2 * (The pupil", 4, UNDEFINED), ("All = 2", "The pupils = 2", 4, RETRIEVAL),
    ("- All =", "- Everybody =", 4, UNDEFINED), ("- All =", "- Next is all. The pupils =", 4, NAMING),
    ("There is 1 for 9 pupils. But", "There is 1 for 9 pupils. There are 2. But", 1, UNREADABLE),
])
def test_slips_in_problems_of_a_file(old, new, step, error):
    assert old in OWN_TEXT
    assert found(OWN_TEXT.replace(old, new), custom.problem(OWN)) == (step, error)


@pytest.mark.parametrize("nodes", [
    [("zz z", "3"), ("Ann", "4"), ("Ben", "5"), ("Ann and Ben", "Ann + Ben + zz z"), ("x of all", "Ann and Ben * 2")],
    [("p p", "18"), ("q q", "192"), ("r r", "5"), ("u u", "p p / q q + r r")],  # 18 / 192 is halfway, 0.09375
    [("p p", "12"), ("q q", "48280245"), ("r r", "4"), ("s s", "5"), ("u u", "p p / q q / r r + s s")],  # 12 / 48280245 is 0
    [("z z", "3"), ("p p", "2 * z z", "Twice."), ("q q", "3 * p p", "Twice. And more."), ("u u", "p p - q q")],
    [("salt", "1"), ("pepper", "2"), ("oil", "3"), ("pepper and oil", "pepper + oil"), ("all", "salt + pepper and oil")],
], ids=lambda nodes: nodes[-1][0])
def test_generated_answers_to_odd_problems_are_right(nodes):
    nodes = [dict(zip(("name", "formula", "statement"), (*node, f"Number {i} is told."))) for i, node in enumerate(nodes)]
    problem = custom.problem({"nodes": nodes, "target": nodes[-1]["name"], "ask": "?"})
    for seed, behaviors in itertools.product(range(10), (traces.VANILLA, traces.BRIDGE, traces.Behaviors(True, 4, 1.0))):
        verdict = check(text := traces.answer(problem, random.Random(seed), behaviors), problem)
        assert verdict.correct, (verdict.steps[verdict.first_wrong_step], text)


def test_names_and_statements_in_any_typography():
    problem = custom.problem({"nodes": [
        {"name": "Ann’s apples", "formula": "5", "statement": "Ann’s apples: 5 × 1."},
        {"name": "Ben’s", "formula": "2 * Ann’s apples", "statement": "Ben’s heap is 2 × Ann’s."}], "target": "Ben’s",
        "ask": "?"})
    for seed in range(20):
        assert check(traces.answer(problem, random.Random(seed), traces.Behaviors(True, 4, .5)), problem).correct


def test_the_box_is_scored_as_the_reward_scores_it():
    """A minus that is none for the reward is none here, though the steps may be written with it."""
    problem = custom.problem({"nodes": [{"name": "a", "formula": "-5", "statement": "It is 5 below 0."}], "target": "a",
                              "ask": "?"})
    assert check("- a = −5.\n\\boxed{-5}", problem).correct
    verdict = check("- a = −5.\n\\boxed{−5}", problem)
    assert not verdict.boxed and verdict.error == WRONG_BOX


def test_a_tolerance_holds_for_the_box():
    problem = custom.problem({"nodes": [{"name": "a", "formula": "3.2", "statement": "It is 3.2."},
                                        {"name": "b", "formula": "a / 3"}], "target": "b", "ask": "b?"})
    text = "- The text gives a as 3.2. a = 3.2.\n- b = a / 3 = 3.2 / 3 = 1.0667.\n\\boxed{1.0666}"
    assert check(text, problem).correct
    assert found(text.replace("1.0666}", "1.06}"), problem) == (3, WRONG_BOX)
    assert found(text.replace("3.2 / 3", "3.2001 / 3"), problem) == (1, SUBSTITUTION)
    assert found(text.replace("= 1.0667", "= 1.0666"), problem) == (1, ARITHMETIC)
    assert found(text.replace("= 1.0667", "= 1.07"), problem) == (1, ARITHMETIC)
    assert found(text.replace("3.2", "3.21"), problem)[0] == 0


def test_bare_equations_are_right(problems):
    for problem in problems:
        assert check(traces.equations(problem), problem).correct


# --- formulas and hostile text -------------------------------------------------------------------------------


def form(text):
    return formula.parse(text, lambda letter: letter)


@pytest.mark.parametrize("text, value", [
    ("4 * (3 + -3) - 2 - 2", -4), ("2 * 3 + -4 * 5", -14), ("-(3 - 5) * 2", 4), ("7 - (3 - (2 - 5))", 1), ("2--3", 5),
    ("+3", 3),
    ("12 / 4 / 3 * 2", 2), ("1.5 * 4", 6), ("sqrt(6 + 3) * square(-2)", 12), ("6 / (1 + 2)", 2), ("((((7))))", 7),
])
def test_formulas(text, value):
    assert formula.computed(formula.value(form(text)), value)


@pytest.mark.parametrize("text, other, equal", [
    ("a + b * c", "c * b + a", True), ("a - b - c", "a - (b + c)", True), ("a - (b - c)", "a + c - b", True),
    ("a / b / c", "a / (c * b)", True),
    ("a - b", "b - a", False), ("a / b", "b / a", False), ("a * (b + c)", "a * b + c", False),
    ("2 * a", "a + a", False), ("a + 0", "a", False),
    ("1.00001 * a", "a * 1", False), ("1.0 * a", "a * 1", True), ("100001 * a", "100000 * a", False),
    ("64 + -5 * 9", "64 - 5 * 9", True), ("p * -q", "-(q * p)", True), ("a / -2", "-(a / 2)", True),
    ("a * -2", "2 * a", False),
    ("-3 * -a", "a * 3", True), ("a / (-2 * b)", "-(a / 2) / b", True),
])
def test_canonical_forms(text, other, equal):
    assert (form(text) == form(other)) == equal


@pytest.mark.parametrize("text, other, right", [
    ("2 * 3 + 4 * 5", "6 + 20", True), ("2 * 3 + 4 * 5", "4 * 5 + 6", True), ("1 + 2 + 3 + 4", "4 + 6", True),
    ("3 - 0 + 1", "1 + 3", True),
    ("1 + 2 + 3 + 4", "3 + 3 + 4", True), ("2 * (3 + 4)", "14", True), ("12", "12", True),
    ("0 * (3 + 4)", "0 * 7", True),
    ("0 * (3 + 4)", "0 * 8", False), ("0 * (3 + 4)", "7 * 0 * 1", False), ("3 + 4 + 5", "6 + 7", False),
    ("4 * 3", "3 + 9", False),
    ("7", "3 + 4", False), ("3 + 4", "4 + 3", True), ("1 + 2 + 3 + 5", "6 + 5", True),
    ("1 + 2 + 3 + 5", "4 + 7", True), ("1 + 2 + 4 + 8", "2 + 13", True), ("3 + 4", "2 + 5", False),
    ("3 * 0 + 1 * 0", "0 + -1 * 0", False), ("3 * 0 + 1 * 0", "1 * 0", True), ("3 * 0 + 1 * 0", "-1 * 0", False),
    ("2 * (3 + 4)", "6 + 8", True), ("2 * (3 + 4)", "6 + 9", False), ("3 + 0", "3 + 1 - 1", False),
    ("2 * (13 + -5)", "3 + 13", False), ("2 * (13 + -5)", "26 - 10", True), ("2 * (13 + -5)", "2 * 13 - 2 * 5", True),
    ("1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9", "1000 - 955", False), ("1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9", "45", True),
    ("1 + 2 + 3 + 4 + 5 + 6 + 7 + 8 + 9", "3 + 3 + 4 + 5 + 6 + 7 + 8 + 9", True),
    ("3.0 + 9", "12.00001", False), ("12 / 4", "3.00004", False),
    ("3 + 9", "12.00001", False), ("3 + 9", "12.0", True), ("16 * 4 + -5 * 9", "64 - 45", True), ("1 / 3", "0.3333", True),
    ("16 * (3 + -5)", "16 * 2", False), ("16 * (3 + -5)", "16 * -2", True), ("-3 * (2 + 4) * 2", "3 * 6 * 2", False),
    ("-3 * (2 + -4) * (1 + 2)", "3 * 2 * (1 + 2)", True),
    ("1 / 3", "0.333", False), ("1 / 3", "0.33333333", True), ("2.5 * 2", "5.001", False),
    ("5 * 1 * 2 + 0", "5 * 2", True),
    ("5 * 0 * 2 * 3 * 4 * 0 * 2 * 7", "0 * 2 * 3 * 4 * 0 * 2 * 7", True),  # one product done, of more than is searched
    ("5 * 0 * 2 * 3 * 4 * 0 * 2 * 7", "0 * 3 * 4 * 2 * 7", True), ("5 * 0 * 2 * 3 * 4 * 0 * 2 * 7", "0 * 9 * 4 * 2 * 7", False),
    ("5 * 1 * 2 * 3 * 4 * 3 * 2 * 7", "5 * 2 * 3 * 4 * 2 * 7", False),
    ("sqrt(4 + 5) + 1", "sqrt(9) + 1", True), ("sqrt(9) + 1", "3 + 1", True), ("sqrt(9) + 1", "2 + 2", False),
    ("7 - 2 * 3", "7 - 6", True),
    ("7 - 0 * (3 + 4)", "7 - 0 * 8", False), ("8 / (2 * 2)", "8 / 4", True), ("8 / (50 * 100)", "8 / 5000", True),
    ("8 / (50 * 100)", "8 / 6000", False), ("0.0123 * 0.5 * 800", "0.0062 * 800", True),
    ("0.5 * 0.3 * 8", "0.2 * 8", False),
    ("0.0026 + 285 + 0.0026", "285.0026 + 0.0026", True), ("1.4142 * -0.0001 * -4", "-0.0001 * -4", True),
    ("4 * (1 + 1)", "4 / 2", False), ("3 / (0.3 / 1.0001)", "3 / 0.3", True), ("8 / 2 / 2", "8 / 2", False),
    ("4 * 2 * (1 + 2 + 5)", "8 * (3 + 5)", True), ("1 * 2 * 3 + 1 * 6", "6 + 2 * 3", True),  # 8 is no (1 + 2 + 5), nor 6 a 2 * 3
    ("(1 + 1) * 3 / 3 * (2 + 2)", "2 * 4", True), ("(1 + 1) * 3 / 3 * (2 + 2)", "2 * 5", False),
    ("(-1 + 1 + 3) / (-3 + 1 + 1) / (-6 + 0 + 1)", "0.2 * (1 + 2)", True), ("0 * (3 - 5)", "0 * 2", True),
    ("-2 * (4 + 3)", "-8 - 6", True), ("-2 * (4 + 3)", "-2 * 4 + -2 * 3", True), ("-2 * (4 + 3)", "8 - 6", False),
    ("10 / 3", "3.33338", False), ("10 / 3", "3.33333", True), ("10 / 3", "3.3333", True), ("1 / 30000", "-0.00001", False),
    ("(6 + 1) * (1 + 2 + 4)", "7 * (3 + 4)", True), ("2 * 6 + 3 * 2 * 2", "12 + 3 * 4", True),
    ("(3 - 3) * 24 * 62", "0 * 62", True), ("(3 - 3) * 24 * 62", "0 * 63", False),
    ("1.4142 * -0.0001 * -4", "-0.0002 * -4", False), ("0.5 * 0.3 * 8", "0.15 * 8.0", True),
])
def test_reductions(text, other, right):
    assert formula.reduces(form(text), form(other)) == right


def test_a_verdict_does_not_depend_on_what_was_judged_before():
    """3.0 and 3 are equal and hash alike: reductions that are remembered must not be of the one and serve for the other."""
    assert [type(formula.read_number(text)) for text in ("3", "3.0", "-12.0000")] == [int] * 3


@pytest.mark.parametrize("said, right", [
    ("the sum of a, 2 and b", True), ("the sum of 2, a and b", True), ("the sum of b, a and 2", True),
    ("the sum of 3, a and b", False), ("the sum of a, 2 and a", False), ("the sum of a and b", False),
    ("2 and the sum of a and b", False), ("the sum of a, 2, 2 and b", False)])
def test_numbers_change_places_in_a_restatement_as_names_do(said, right):
    nodes = [{"name": name, "formula": number, "statement": f"{name} is {number}."} for name, number in (("a", "5"), ("b", "7"))]
    nodes += [{"name": "all", "formula": "a + 2 + b", "statement": "This is all."}]
    text = "\n".join(["<think>", "- The text gives a as 5.", "- The text gives b as 7.",
                      f"- Now take all. It equals {said}. all = a + 2 + b = 14.", "So the result is 14.", "</think>", "<answer>",
                      "The answer is \\boxed{14}.", "</answer>"])
    verdict = verify.verify(custom.problem({"nodes": nodes, "target": "all", "ask": "?"}), text)
    assert (verdict.first_wrong_step, verdict.error) == ((None, None) if right else (2, WRONG_RESTATEMENT))


@pytest.mark.parametrize("text, free", [
    ("a + b * c", False), ("a * b + c * d", False), ("2 * (a + b + 3)", True), ("a + b", True), ("a - b", False),
    ("3 + 2 * (a * b)", True), ("4 * a + 2 * b", False), ("7", True), ("a", True), ("3 * (a - b)", False)])
def test_names_may_change_places_where_nothing_else_does(text, free):
    nodes = [{"name": name, "formula": "5", "statement": f"{name} is 5."} for name in "abcd"]
    nodes += [{"name": "all", "formula": text, "statement": "This is all."}]
    assert formula.commutes(custom.problem({"nodes": nodes, "target": "all", "ask": "?"}).nodes["all"].expr) == free


HUGE = "9" * 10_000
HOSTILE = {
    "parentheses": "r = " + "(" * 1_000_000 + "3 + q", "signs": "r = " + "-" * 1_000_000 + "q",
    "nested": "r = " + "-(" * 90 + "3",
    "sums": "r = " + "q + " * 250_000 + "q", "powers": "r = 3 + q = " + " * ".join(["9" * 90] * 40) + " = 12",
    "mixed": "r = 3 + q = " + " * ".join(["9" * 90] * 40) + " * 1.5 = 12", "tower": "r = 3 + q = 1" + " / 9" * 40 + " = 12",
    "zero": "r = 3 + q = 3 / 0 = 12", "digits": "r = 3 + q = 3 + " + HUGE + " = " + HUGE,
    "million digits": "r = " + "1" * 1_000_000,
    "links": "r = 3 + q = 3 + 9" + " = 12" * 200_000, "equals": "=" * 1_000_000, "stops": "." * 1_000_000,
    "blanks": "But" + " " * 1_000_000 + "x",
    "is": "But " + "is a " * 200_000,
    "ands": "But " + "each Elm's Jar and " * 50_000 + "each Elm's Jar are not known yet, so it must wait.",
    "each": "Let r be " + "each " * 200_000, "letters": "Let " + "r" * 1_000_000 + " be each Fir's Jar.",
    "odd": "\u0130\u0131\u212a\ud800\x00\x85\u2028 ½² = ٣",
    "stated": "Each Fir's Jar is " + HUGE + ".", "words": "It equals " + "2 times the sum of " * 50_000,
    "bullets": "x\n- " * 20_000,
    "stated constant": "Each Elm's Jar is " + HUGE + ".", "lines": "\n" * 1_000_000,
    "tabs": "\n" + "\t" * 1_000_000 + "\n", "dashes": "\n-" * 200_000,
    "decimals": "r = 3 + q = 3 + 9." + "0" * 90 + "1 = 12",
}


@pytest.mark.parametrize("chain", ["square(" * 16 + "9" * 99 + ")" * 16, "2 + 2 + 2 + 3", "1 + " * 140 + "9",
                                   "9 / 7 / " * 60 + "3"])
def test_hostile_sums(chain):
    """Lines that leave many ways to regroup, or huge numbers to compute."""
    nodes = [{"name": f"n{i}", "formula": "1", "statement": "It is 1."} for i in range(18)]
    problem = custom.problem({"nodes": [*nodes, {"name": "t", "formula": " + ".join(f"n{i}" for i in range(18))},
                                        {"name": "u", "formula": " * ".join(f"n{i}" for i in range(8))},
                                        {"name": "all", "formula": "t + u"}], "target": "all", "ask": "?"})
    lines = [f"- n{i} = 1." for i in range(18)] + [f"- {name} = {chain} = 5." for name in "tu"] * 50
    begun = time.process_time()
    assert not check("\n".join(lines), problem).correct
    assert time.process_time() - begun < 5


def test_hostile_nesting_and_blanks():
    def deep(depth, leaf):
        return f"a + a * ({deep(depth - 1, leaf)})" if depth else leaf

    problem = custom.problem({"nodes": [{"name": "a", "formula": "1", "statement": "x."},
                                        {"name": "b", "formula": "2", "statement": "y."},
                                        {"name": "c", "formula": deep(16, "b")}], "target": "c", "ask": "?"})
    chain = f"c = {deep(16, '2')} = {deep(15, '9')} = 7".replace("a", "1")
    begun = time.process_time()
    assert found("- a = 1.\n- b = 2.\n- " + chain + ".", problem) == (2, ARITHMETIC)
    assert found("- a = 1.\n- b = 2.\n- c = a" + " " * 200_000 + "= 12.", problem) == (2, RETRIEVAL)
    assert time.process_time() - begun < 3


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name):
    begun = time.process_time()
    text = edited("r stand for each Fir's Jar. r = 3 + q = 3 + 9 = 12.", "r be each Fir's Jar. " + HOSTILE[name])
    step, error = found(text)
    assert time.process_time() - begun < 10  # 2 here, 3.6 once beside other work
    assert name in ("decimals", "links", "lines", "tabs", "stops") or 4 <= step <= 5 and error


def test_any_text_gets_a_verdict():
    """Pieces of answers in any order: no exception, spans within the text and in order."""
    pieces = re.split(r"(?<=[\s.()=])", TEXT) + list("\n-=()*.+~'\\{}")
    pieces += ["- ", "\n- ", " = ", HUGE, "1.5", "each ", "</think>"]
    for i in range(300):
        rng = random.Random(i)
        text = "".join(rng.choices(pieces, k=rng.randint(0, 200)))
        verdict = check(text)
        assert not verdict.correct
        spans = [(step.start, step.end) for step in verdict.steps[:-1]]
        assert all(0 <= start <= end <= len(text) for start, end in spans) and spans == sorted(spans)
        assert all(step.start <= part.start < part.end <= step.end for step in verdict.steps for part in step.parts)


# --- odd ways of writing a step ----------------------------------------------------------------------------------


def test_a_step_with_a_value_that_also_says_it_must_wait():
    verdict = check(edited("4 - 9 = -5.", "4 - 9 = -5. But each Elm's Jar is not known yet, so it must wait."))
    assert (verdict.solved, verdict.attempts, verdict.right_attempts) == (6, 1, 1) and verdict.error == LOCK


def test_a_blank_behind_a_minus_and_letters_with_numbers():
    assert found(edited("4 - 9 = -5", "4 - 9 = - 5")) == (None, None)
    assert found(re.sub(r"\bp\b", "p1", TEXT)) == (None, None)


def test_six_terms_in_two_groups():
    assert formula.reduces(form("1 + 2 + 3 + 4 + 5 + 9"), form("7 + 17"))


@pytest.mark.parametrize("formula_", ["(" * 299, "- " * 298 + "1", "sqrt(" * 149, "(" * 50 + "1" + ")" * 50])
def test_deep_formulas_do_not_raise_however_deep_the_caller(formula_):
    def called(depth):
        return called(depth - 1) if depth else found(f"<think>\n- each Ash's Jar = {formula_}")

    assert called(500)[1] is not None


def test_only_what_the_question_states_can_be_restated():
    said = traces.describe(PROBLEM.nodes["Yew's Food"].expr, PROBLEM.nodes)
    assert found(edited("Yew's Food. Z", f"Yew's Food. It equals {said}. Z")) == (6, WRONG_RESTATEMENT)
