"""Questions and answers, read back from their text alone by parsers that share no code with `traces`."""

import itertools
import random
import re
from collections import Counter, defaultdict
from decimal import Decimal
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

import pytest

from conftest import FREE_TOY
from minibridge import dag, igsm, traces
from minibridge.answer import OPENING, extract, well_formed
from minibridge.config import InputError
from minibridge.dag import Node, Problem
from minibridge.traces import BRIDGE, VANILLA, Behaviors, plan
from minibridge.worlds import TOY_WORLDS, WORLDS

CATEGORY = {name: category for world in WORLDS + TOY_WORLDS for category, themes in world
            for theme in themes for name in theme}
COMBINATIONS = [Behaviors(*choice) for choice in itertools.product((False, True), (0, 2, 4), (0.0, 0.1, 0.5))]
# Probability of restating a condition, by in-degree 1, 2, 3, 4 with constants counted, for each level.
RESTATED = {0: (0, 0, 0, 0), 1: (0, .1, .4, .8), 2: (.1, .4, .8, 1), 3: (.4, .8, 1, 1), 4: (1, 1, 1, 1)}


@pytest.fixture(scope="module")
def problems():
    """360 problems: training range, validation range and toy scale in turn."""
    kinds = [((15, 20), igsm.PAPER), ((21, 25), igsm.PAPER), ((1, 8), FREE_TOY), ((15, 20), igsm.PAPER)]
    return [igsm.draw(random.Random(f"traces {i}"), *kinds[i % len(kinds)]) for i in range(360)]


def build(expressions, order, redundant=()):
    """A small problem; the node "Crate a's Ball" is called "a"."""
    def full(expr):
        if isinstance(expr, tuple):
            return (expr[0], *map(full, expr[1:]))
        return f"Crate {expr}'s Ball" if isinstance(expr, str) else expr

    nodes = [Node(f"Crate {name}", "Ball", full(expr)) for name, expr in expressions.items()]
    return Problem("test", {node.key: node for node in nodes}, tuple(map(full, order)),
                   tuple(map(full, redundant)), num_ops=1)


def name(attempt):
    """The short name of an attempt's node in a problem of `build`."""
    return attempt.key.removeprefix("Crate ").removesuffix("'s Ball")


# --- the question --------------------------------------------------------------------------------------

NODE = r"each ([A-Z][A-Za-z ]*)'s ([A-Z][A-Za-z ]*)"


def read_question(text):
    """Conditions {(owner, item): expression} and what is asked (owner, item), by the benchmark's grammar."""
    *lines, ask = text.split("\n")
    conditions = {}
    for line in lines:
        owner, item, expr = re.fullmatch(f"The number of {NODE} equals (.+)\\.", line).groups()
        assert (owner, item) not in conditions
        conditions[owner, item] = read_expression(expr)
    item, owner = re.fullmatch(r"How many (.+) does each (.+) have\?", ask).groups()
    return conditions, (owner, item)


def read_expression(text):
    if text.isdigit():
        return int(text)
    if match := re.fullmatch(r"(\d+) (more than|times) (.+)", text):
        return ("+" if match[2] == "more than" else "*", int(match[1]), read_expression(match[3]))
    if match := re.fullmatch(f"the (sum|difference) of ((?:{NODE}, )*{NODE} and {NODE})", text):
        operands = re.split(", | and ", match[2])
        assert len(operands) == 2 or match[1] == "sum"
        return ("+" if match[1] == "sum" else "-", *map(read_expression, operands))
    owner, item = re.fullmatch(NODE, text).groups()
    return f"{owner}'s {item}"


def solve(text):
    """The answer, from the text and the knowledge which names belong to a category."""
    conditions, asked = read_question(text)

    def value(owner, item):
        if (owner, item) in conditions:
            return calculate(conditions[owner, item])
        parts = [part for holder, part in conditions if holder == owner]
        assert parts and item in CATEGORY.values()  # an abstract quantity: count what is inside
        return sum(value(owner, part) * (1 if CATEGORY[part] == item else value(part, item))
                   for part in parts)

    def calculate(expr):
        if isinstance(expr, int):
            return expr
        if isinstance(expr, str):
            return value(*expr.split("'s "))
        first, *rest = map(calculate, expr[1:])
        if expr[0] == "*":
            return first * rest[0]
        return first + sum(rest) if expr[0] == "+" else first - sum(rest)

    return value(*asked)


def test_question_holds_the_whole_problem(problems):
    for i, problem in enumerate(problems):
        text = traces.question(problem, random.Random(i))
        conditions, (owner, item) = read_question(text)
        assert f"{owner}'s {item}" == problem.target
        conditions = {f"{owner}'s {item}": expr for (owner, item), expr in conditions.items()}
        assert conditions == {key: node.expr for key, node in problem.nodes.items() if node.stated}
        assert solve(text) == problem.answer


@pytest.mark.parametrize("expr, text", [
    (4, "4"),
    ("a", "each Crate a's Ball"),
    (("*", 0, "a"), "0 times each Crate a's Ball"),
    (("-", "b", "a"), "the difference of each Crate b's Ball and each Crate a's Ball"),
    (("+", 3, ("-", "a", "b")), "3 more than the difference of each Crate a's Ball and each Crate b's Ball"),
    (("*", 2, ("+", "a", "b", "c")),
     "2 times the sum of each Crate a's Ball, each Crate b's Ball and each Crate c's Ball"),
])
def test_expressions_in_words(expr, text):
    problem = build({"a": 1, "b": 2, "c": 3, "t": expr}, "abct")
    assert traces.describe(problem.nodes[problem.target].expr, problem.nodes) == text
    lines = traces.question(problem, random.Random(0)).split("\n")
    assert f"The number of each Crate t's Ball equals {text}." in lines


def test_conditions_are_shuffled_uniformly_and_the_question_comes_last():
    problem = build({"a": 1, "b": 2, "t": ("+", "a", "b")}, "abt")
    rng, counts = random.Random(0), Counter()
    for _ in range(3000):
        *lines, ask = traces.question(problem, rng).split("\n")
        assert ask == "How many Ball does each Crate t have?"
        counts[tuple(line.split("Crate ")[1][0] for line in lines)] += 1
    assert counts.keys() == set(itertools.permutations("abt"))
    assert all(abs(count - 500) < 4 * sqrt(500 * 5 / 6) for count in counts.values())


def test_same_stream_same_text(problems):
    for problem in problems[::4][:20]:
        for write in (traces.question, lambda p, rng: traces.answer(p, rng, BRIDGE)):
            assert write(problem, random.Random(3)) == write(problem, random.Random(3))
            assert write(problem, random.Random(3)) != write(problem, random.Random(4))


# --- reading an answer back ----------------------------------------------------------------------------


class Step(NamedTuple):
    key: str
    letter: str
    restated: str | None        # the right side of the condition
    locked: tuple[str, ...]     # the nodes an attempt found missing
    chain: tuple[str, ...]      # "x", "p + q", "3 + 4", "7"; empty when locked
    text: str


def read_steps(problem, text):
    keys = "|".join(sorted(map(re.escape, problem.nodes), key=len, reverse=True))
    assert text.startswith("<think>\n")
    for line in text.split("</think>")[0].split("\n"):
        if line.startswith("- "):
            *before, last = re.split(r"(?<=\.) ", line[2:])
            named = re.findall(rf"[Ee]ach ({keys})(?!\w)", " ".join(before))
            letter = re.search(r"(?<![\w'])[A-Za-z](?!\w)", line)[0]
            restated = re.search(r"equals (.+)\.$", before[-1])
            chain = tuple(last[:-1].split(" = ")) if " = " in last else ()
            locked = () if chain else tuple(re.findall(rf"[Ee]ach ({keys})(?!\w)", last))
            assert last.endswith(".") and (chain or locked)
            yield Step(named[0], letter, restated and restated[1], locked, chain, line)


def tokens(text):
    return text.replace("(", "( ").replace(")", " )").split()


def operations(text):
    return sum(token in ("+", "-", "*") for token in tokens(text))


def calculate(text, letters):
    """Value of "4 * (p + -3) - q": + - * with the usual precedence, parentheses, signed integers, letters."""
    rest = tokens(text)

    def total():
        result = product()
        while rest and rest[0] in ("+", "-"):
            result = result + product() if rest.pop(0) == "+" else result - product()
        return result

    def product():
        result = atom()
        while rest and rest[0] == "*":
            rest.pop(0)
            result *= atom()
        return result

    def atom():
        token = rest.pop(0)
        if token == "(":
            result = total()
            assert rest.pop(0) == ")"
            return result
        return letters[token] if token.isalpha() else int(token)

    result = total()
    assert not rest
    return result


def test_the_calculator_of_these_tests():
    assert calculate("4 * (p + -3) - q - 2", {"p": 5, "q": -1}) == 7
    assert calculate("2 * 3 + -4 * 5", {}) == -14
    assert operations("4 - -3 * (2 + 1)") == 3


def execute(problem, text, subgoal, rng):
    """Checks every step of an answer against the problem, using only what was solved in earlier steps."""
    letters, known = {}, {}
    for step in read_steps(problem, text):
        node, value = problem.nodes[step.key], problem.values[step.key]
        again = step.key in letters
        assert letters.setdefault(step.key, step.letter) == step.letter  # a node keeps its letter
        reminded = any(words.format(letter=step.letter) in step.text for words in traces.REMIND)
        assert reminded == again
        assert step.letter not in known  # nothing is solved twice
        missing = {parent for parent in node.parents if letters.get(parent) not in known}
        assert set(step.locked) == missing and len(step.locked) == len(missing)
        if step.locked:
            verb = re.search(r"\b(is|are)\b", re.split(r"(?<=\.) ", step.text)[-1])[0]
            assert verb == ("is" if len(missing) == 1 else "are")
            assert not re.search(r"\d", step.text.replace(step.restated or "", ""))  # nothing is computed
            continue
        assert step.chain[0] == step.letter
        assert not isinstance(node.expr, int) or set(re.findall(r"-?\d+", step.text)) == {str(value)}
        check_chain(node, step.chain, known, value, subgoal)
        junk = {key: rng.randint(-9, 9) for key in node.parents}
        assert calculate(step.chain[1], {letters[key]: junk[key] for key in junk}) == \
            dag.evaluate(node.expr, junk)  # so the formula is right whatever the numbers
        known[step.letter] = value
    assert len(set(letters.values())) == len(letters)
    assert all(letters[key] in known for key in problem.order)


def check_chain(node, chain, known, value, subgoal):
    """letter = formula in letters = in numbers (= one operation less at a time) = value."""
    assert chain[-1] == str(value)
    assert all(calculate(link, known) == value for link in chain[1:])
    if isinstance(node.expr, int):
        assert len(chain) == 2
    elif isinstance(node.expr, str):
        assert len(chain) == 3 and chain[1].isalpha()
    else:
        letters, numbers = tokens(chain[1]), tokens(chain[2])
        assert numbers == [str(known[token]) if token.isalpha() else token for token in letters]
        counts = [operations(link) for link in chain[1:]]
        most = len(dag.leaves(node.expr)) - 1
        assert counts == ([most, *range(most, -1, -1)] if subgoal else [most, most, 0])


@pytest.mark.parametrize("behaviors", COMBINATIONS, ids=str)
def test_every_step_of_an_answer_is_right(problems, behaviors):
    offset = COMBINATIONS.index(behaviors)
    for i, problem in enumerate(problems[offset % 9::9]):
        text = traces.answer(problem, random.Random(f"{offset} {i}"), behaviors)
        execute(problem, text, behaviors.subgoal, random.Random(i))


@pytest.mark.parametrize("behaviors", COMBINATIONS, ids=str)
def test_layout(problems, behaviors):
    for problem in problems[COMBINATIONS.index(behaviors)::18]:
        text = traces.answer(problem, random.Random(0), behaviors)
        lines = text.split("\n")
        bullets = [line.startswith("- ") for line in lines]
        assert text.startswith(OPENING) and bullets == [False] * 2 + [True] * sum(bullets) + [False] * 5
        assert re.search(r"(?<![-\d])-?\d+", lines[-5])[0] == str(problem.answer)
        assert lines[-4:-2] == ["</think>", "<answer>"] and lines[-1] == "</answer>"
        for tag in ("<think>", "</think>", "<answer>", "</answer>", "\\boxed{"):
            assert text.count(tag) == 1
        assert extract(text) == str(problem.answer) and well_formed(text.removeprefix(OPENING))
        assert "  " not in text and all(line and (line[0] in "-<" or line[0].isupper()) for line in lines)


def test_vanilla_solves_the_necessary_nodes_once_each_in_order(problems):
    for i, problem in enumerate(problems):
        steps = list(read_steps(problem, traces.answer(problem, random.Random(i), VANILLA)))
        assert [step.key for step in steps] == list(problem.order)
        assert not any(step.locked or step.restated for step in steps)


@pytest.mark.parametrize("expr, subgoal, plain", [
    (("*", "a", ("+", "b", "c", "d")),
     "4 * (9 + 3 + 9) = 4 * (12 + 9) = 4 * 21 = 84", "4 * (9 + 3 + 9) = 84"),
    (("+", ("*", "e", "c"), ("*", "a", "f")),
     "2 * 3 + 4 * 5 = 6 + 4 * 5 = 6 + 20 = 26", "2 * 3 + 4 * 5 = 26"),
    (("+", 8, ("+", "g", "h")), "8 + (24 + -35) = 8 + -11 = -3", "8 + (24 + -35) = -3"),
    (("*", 5, ("-", "h", "h2")), "5 * (-35 - -4) = 5 * -31 = -155", "5 * (-35 - -4) = -155"),
    (("-", "a", "h2"), "4 - -4 = 8", "4 - -4 = 8"),
    (("+", "a", "b", "c", "d"), "4 + 9 + 3 + 9 = 13 + 3 + 9 = 16 + 9 = 25", "4 + 9 + 3 + 9 = 25"),
    (("*", 3, "h"), "3 * -35 = -105", "3 * -35 = -105"),
    ("h", "-35", "-35"),
])
def test_chains(expr, subgoal, plain):
    values = {"a": 4, "b": 9, "c": 3, "d": 9, "e": 2, "f": 5, "g": 24, "h": -35, "h2": -4}
    letters = dict(zip(values, "pqrstuvwy"))
    for flag, chain in ((True, subgoal), (False, plain)):
        text = traces.compute(expr, "x", letters, values, flag)
        assert text.startswith("x = ") and text.endswith(f" = {chain}.")
        assert len(text.split(" = ")) == len(chain.split(" = ")) + 2
    assert traces.compute(7, "x", {}, {}, True) == "x = 7."


# --- analysis ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", RESTATED)
def test_analysis_frequency(problems, level):
    """By in-degree the table's share, at failed attempts too; in the words of the question's condition."""
    drawn, failed = defaultdict(list), defaultdict(list)
    for i, problem in enumerate(problems):
        question = traces.question(problem, random.Random(i))
        answer = traces.answer(problem, random.Random(i), Behaviors(analysis=level, reflection=.3))
        for step in read_steps(problem, answer):
            node = problem.nodes[step.key]
            if not node.stated or not node.parents:
                assert step.restated is None
                continue
            if step.restated:
                assert f"The number of each {step.key} equals {step.restated}.\n" in question
            degree = len(node.parents) + any(isinstance(leaf, int) for leaf in dag.leaves(node.expr))
            drawn[degree].append(step.restated is not None)
            if step.locked:
                failed[degree].append(step.restated is not None)
    for sample in (drawn, failed):
        assert sample.keys() == {1, 2, 3, 4}
        for degree, share in enumerate(RESTATED[level], start=1):
            error = sqrt(share * (1 - share) / len(sample[degree]))
            assert abs(mean(sample[degree]) - share) <= 4 * error, (degree, share)


def test_levels_of_analysis_nest(problems):
    """What a level restates the next one restates too: the draws come from a stream of their own."""
    for problem in problems[:40]:
        restated = []
        for level in RESTATED:
            text = traces.answer(problem, random.Random(1), Behaviors(analysis=level, reflection=.2))
            restated.append({i for i, step in enumerate(read_steps(problem, text)) if step.restated})
        assert all(less <= more for less, more in itertools.pairwise(restated))


def test_analysis_of_five_and_more_parents():
    node = Node("Crate", "Ball", ("+", *"abcdef"))
    restated = [traces.exploited(node, (), random.Random(0), Behaviors(analysis=level))[0] for level in range(5)]
    assert restated == [False, True, True, True, True]


# --- reflection ----------------------------------------------------------------------------------------


class Finite(random.Random):
    """A stream that runs dry, so that a plan without an end fails instead of hanging."""

    def __init__(self, seed):
        super().__init__(seed)
        self.left = 5000

    def random(self):
        self.left -= 1
        assert self.left, "the plan does not come to an end"
        return super().random()


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3, 1.0])
def test_plan(problems, p):
    for i, problem in enumerate(problems):
        attempts = plan(problem, Finite(i), p)
        solved, previous = set(), None
        for key, missing in attempts:
            turn = next(k for k in problem.order if k not in solved)  # the node whose turn it is
            assert key not in solved
            assert missing == tuple(k for k in problem.nodes[key].parents if k not in solved)
            if previous is None or previous.missing:
                assert key == turn  # nothing out of turn at first, or right after a failed attempt
            if key != turn:
                assert key in problem.redundant or problem.order.index(key) > problem.order.index(turn)
            if not missing:
                solved.add(key)
            previous = traces.Attempt(key, missing)
        assert solved >= set(problem.order)  # so a necessary node that was locked is solved later
        assert previous == (problem.target, ())
        if p == 0:
            assert attempts == [(key, ()) for key in problem.order]


def test_no_pick_at_the_last_node():
    short = build({"a": 1, "t": ("+", 1, "a"), "r": 5}, "at", "r")
    longer = build({"a": 1, "b": 2, "t": ("+", "b", "a"), "r": 5}, "abt", "r")
    for seed in range(50):
        assert [attempt.key for attempt in plan(short, random.Random(seed), .99)] == list(short.order)
        assert name(plan(longer, random.Random(seed), .99)[-2]) == "b"


def test_picks_out_of_turn():
    """Three in ten go to a redundant node if there is one, the rest evenly to the later necessary nodes."""
    expressions = {"a": 1, "b": ("+", 1, "a"), "c": ("+", 1, "b"), "d": ("+", "a", "c"), "t": ("+", "c", "d")}
    others = {"r": 5, "q": ("+", "t", 1)}
    n = 4000
    for redundant, p, shares in (("r", .1, {"b": .9, "r": .03, "c": .07 / 3, "d": .07 / 3, "t": .07 / 3}),
                                 ("rq", 1.0, {"r": .15, "q": .15, "c": .7 / 3, "d": .7 / 3, "t": .7 / 3}),
                                 ("", 1.0, {"c": 1 / 3, "d": 1 / 3, "t": 1 / 3})):
        problem = build(expressions | {key: others[key] for key in redundant}, "abcdt", redundant)
        rng = random.Random(0)
        second = Counter(name(plan(problem, rng, p)[1]) for _ in range(n))
        assert second.keys() == shares.keys()
        for node, share in shares.items():
            assert abs(second[node] / n - share) < 4 * sqrt(share * (1 - share) / n), (redundant, node)


def test_a_lucky_pick_may_be_followed_by_another():
    problem = build({"a": 1, "b": 2, "c": 3, "d": 4, "t": ("+", "a", "b", "c", "d")}, "abcdt")
    plans = ["".join(map(name, plan(problem, random.Random(i), .9))) for i in range(200)]
    assert {"acdb", "adcb"} <= {names[:4] for names in plans}


@pytest.mark.parametrize("low, high, rate, spread, size, none",
                         [(15, 20, .83, .95, 3000, .46), (21, 25, 1.14, .98, 2000, .32)])
def test_failed_attempts_of_the_published_generator(problems, low, high, rate, spread, size, none):
    """At p = 0.1 their mean number, and the share of answers without any, within 3 standard errors."""
    chosen, plans = [problem for problem in problems if low <= problem.num_ops <= high], 4
    failed = [[sum(bool(attempt.missing) for attempt in plan(problem, random.Random(f"{problem.id} {i}"), .1))
               for i in range(plans)] for problem in chosen]  # plans of one problem are not independent
    ours, without = list(map(mean, failed)), mean(count == 0 for counts in failed for count in counts)
    assert abs(mean(ours) - rate) <= 3 * sqrt(stdev(ours) ** 2 / len(ours) + spread**2 / size)
    assert abs(without - none) <= 3 * sqrt(none * (1 - none) * (1 / 300 + 1 / len(chosen)))


# --- the paper's Algorithm 1 ---------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.1, 1.0])
def test_strict_picks_are_locked(problems, p):
    picks = 0
    for i, problem in enumerate(problems):
        attempts, solved, previous = plan(problem, Finite(i), p, strict=True), set(), None
        for key, missing in attempts:
            turn = next(k for k in problem.order if k not in solved)
            assert missing == tuple(k for k in problem.nodes[key].parents if k not in solved)
            assert (key != turn) == bool(missing)  # out of turn means locked, and in turn means solved
            if key != turn:
                picks += 1
                assert not (previous is None or previous.missing)
                assert key in problem.redundant or problem.order.index(key) > problem.order.index(turn)
            else:
                solved.add(key)
            previous = traces.Attempt(key, missing)
        assert [key for key, missing in attempts if not missing] == list(problem.order)
    assert (picks > 100) == (p > 0)


def test_strict_picks_are_uniform_over_the_locked_nodes():
    """"b" is next, "d" and "q" are as ready as "b": only "c", "t" and the redundant "r" are left to pick."""
    expressions = {"a": 1, "b": ("+", 1, "a"), "d": 2, "c": ("+", 1, "b"), "t": ("+", "c", "d"), "q": 5, "r": ("+", "t", 1)}
    n, rng = 4000, random.Random(0)
    for redundant, p, shares in (("qr", 1.0, {"r": .3, "c": .35, "t": .35}), ("q", 1.0, {"c": .5, "t": .5}),
                                 ("", .2, {"b": .8, "c": .1, "t": .1})):
        used = {key: expr for key, expr in expressions.items() if key not in "qr" or key in redundant}
        problem = build(used, "abdct", redundant)
        second = Counter(name(plan(problem, rng, p, strict=True)[1]) for _ in range(n))
        assert second.keys() == shares.keys()
        for node, share in shares.items():
            assert abs(second[node] / n - share) < 4 * sqrt(share * (1 - share) / n), (redundant, node)


def test_strict_goes_on_in_turn_when_nothing_is_locked():
    problem = build({"a": 1, "b": 2, "c": 3, "t": 4}, "abct")
    assert [name(attempt) for attempt in plan(problem, random.Random(0), 1.0, strict=True)] == list("abct")


@pytest.mark.parametrize("p, subgoal, analysis", [(.1, True, 2), (.3, True, 1), (.3, False, 4), (.3, True, 0), (1, True, 2)])
def test_strict_exploitation_is_one_draw_for_each_unlocked_node(problems, p, subgoal, analysis):
    drawn = []
    for i, problem in enumerate(problems):
        text = traces.answer(problem, random.Random(i), Behaviors(subgoal, analysis, p, strict=True))
        for step in read_steps(problem, text):
            node = problem.nodes[step.key]
            assert not (step.locked and step.restated)  # a locked node is announced, no more
            if step.locked or not node.stated or not node.parents or len(dag.leaves(node.expr)) < 3:
                continue  # what is left could be both restated and reduced stepwise
            stepwise, restated = len(step.chain) > 4, step.restated is not None
            assert (stepwise or not subgoal or not restated) and (restated or not analysis or not stepwise)
            drawn.append(stepwise or restated)
    assert len(drawn) > 300
    assert abs(mean(drawn) - p) <= 4 * sqrt(p * (1 - p) / len(drawn))


def test_strict_answers_are_right(problems):
    for i, problem in enumerate(problems[:60]):
        text = traces.answer(problem, random.Random(i), Behaviors(False, 2, .3, strict=True))
        execute(problem, text, False, random.Random(i))


def test_strict_with_probability_0_is_vanilla(problems):
    for i, problem in enumerate(problems[:20]):
        strict = Behaviors(True, 4, 0.0, strict=True)
        assert traces.answer(problem, random.Random(i), strict) == traces.answer(problem, random.Random(i), VANILLA)


# --- other problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("expr, text", [
    (("-", ("-", "a", "b"), ("*", "a", "b")), "(p - q) - p * q"),
    (("*", "a", ("/", "b", "a")), "p * (q / p)"),
    (("/", ("*", "a", "b"), ("*", "b", "a")), "(p * q) / (q * p)"),
    (("+", ("/", "a", "b"), ("sqrt", ("+", "a", 1))), "p / q + sqrt(p + 1)"),
    (("square", ("-", "a", "b")), "square(p - q)"),
])
def test_formulas_are_in_parentheses_where_precedence_needs_them(expr, text):
    assert traces.infix(expr, {"a": "p", "b": "q"}) == text


@pytest.mark.parametrize("expr, text", [
    (("-", "a", ("+", "b", "c")), "the difference of a and the sum of b and c"),
    (("/", "a", ("*", "b", "c")), "the quotient of a and the product of b and c"),
    (("*", "a", "b", "c"), "the product of a, b and c"),
    (("sqrt", "a"), "the square root of a"), (("square", "b"), "the square of b"), (Decimal("0.5"), "0.5"),
])
def test_other_expressions_in_words(expr, text):
    nodes = {key: Node(key, "", 1) for key in "abc"}
    assert traces.describe(expr, nodes) == text
    assert traces.condition(Node("d", "", expr), nodes) == f"The value of d equals {text}."


def test_orders_of_the_conditions():
    problem = build({"t": ("+", "a", "b"), "r": ("+", 1, "c"), "c": 3, "b": ("+", 1, "a"), "a": 1}, "abt", "cr")
    seen = {lines: {tuple(line.split("Crate ")[1][0] for line in
                          traces.question(problem, random.Random(seed), lines).split("\n")[:-1]) for seed in range(300)}
            for lines in ("given", "topological", "reversed", "random")}
    assert seen["given"] == {tuple("trcba")}
    orders = {order for order in itertools.permutations("abtcr")
              if order.index("a") < order.index("b") < order.index("t") and order.index("c") < order.index("r")}
    assert seen["topological"] == orders and seen["reversed"] == {order[::-1] for order in orders}
    assert len(seen["random"]) > 100


# --- arms ----------------------------------------------------------------------------------------------


def test_arms_of_one_seed_share_letters_plans_and_analysis(problems):
    def read(problem, **behaviors):
        return list(read_steps(problem, traces.answer(problem, random.Random(5), Behaviors(**behaviors))))

    for problem in problems[:60]:
        vanilla = {step.key: step.letter for step in read(problem)}
        reflective = read(problem, reflection=.3)
        bridge = read(problem, reflection=.3, analysis=2, subgoal=True)
        assert all(vanilla.get(step.key, step.letter) == step.letter for step in reflective + bridge)
        for one, other in zip(reflective, bridge, strict=True):
            assert (one.key, one.letter, one.locked) == (other.key, other.letter, other.locked)
        without_subgoals = read(problem, reflection=.3, analysis=2)
        assert [step.restated for step in without_subgoals] == [step.restated for step in bridge]


def test_letters_are_drawn_anew_for_every_stream(problems):
    answers = [traces.answer(problems[0], random.Random(seed)) for seed in range(600)]
    letters = {next(read_steps(problems[0], answer)).letter for answer in answers}
    assert len(letters) == 52
    few = [traces.answer(problems[2], random.Random(seed), BRIDGE, FREE_TOY.letters) for seed in range(200)]
    letters = {step.letter for answer in few for step in read_steps(problems[2], answer)}
    assert letters == set(FREE_TOY.letters)


def test_more_nodes_than_letters():
    names = [f"{i:02d}" for i in range(53)]
    many = build({name: 1 for name in names[:52]}, names[:1], names[1:52])
    traces.answer(many, random.Random(0))
    with pytest.raises(InputError, match="53 nodes.* 52 letters"):
        traces.answer(build({name: 1 for name in names}, names[:1], names[1:]), random.Random(0))
    with pytest.raises(InputError, match="52 nodes.* 51 letters"):
        traces.answer(many, random.Random(0), letters="".join(map(chr, range(1000, 1051))))


@pytest.mark.parametrize("wrong, named", [
    ({"analysis": 5}, "analysis.* 5 "), ({"analysis": -1}, "analysis.*-1"),
    ({"reflection": -.1}, "reflection.*-0.1"), ({"reflection": 1.5}, "reflection.*1.5"),
    ({"reflection": float("nan")}, "reflection.*nan")])
def test_behaviors_out_of_range(wrong, named):
    with pytest.raises(InputError, match=named):
        Behaviors(**wrong)


def test_named_arms():
    assert (VANILLA, BRIDGE) == (Behaviors(False, 0, 0.0), Behaviors(True, 2, 0.1))
    assert str(VANILLA) == "subgoal=0 analysis=0 reflection=0"
    assert str(BRIDGE) == "subgoal=1 analysis=2 reflection=0.1"
    assert str(Behaviors(True, 2, 0.1, strict=True)) == "subgoal=1 analysis=2 reflection=0.1 strict=1"


# --- quantities under their own names ------------------------------------------------------------------


def spelled(chain, names):
    """The links of a step with every letter written out as the quantity's name."""
    return " = ".join(re.sub(r"[A-Za-z]", lambda found: names[found[0]], link) for link in chain) + "."


@pytest.mark.parametrize("behaviors", COMBINATIONS, ids=str)
def test_without_letters_formulas_hold_the_names(problems, behaviors):
    """Step for step the answer with letters, its letters spelled out; no sentence gives or recalls a letter."""
    named = traces.NAME + traces.SELECT_AND_NAME + traces.REMIND
    locked = [re.sub(r"\\{\w+\\}", ".+", re.escape(words)) for words in traces.LOCKED]
    for number, problem in enumerate(problems[:40]):
        steps = list(read_steps(problem, traces.answer(problem, random.Random(number), behaviors)))
        text = traces.answer(problem, random.Random(number), behaviors, letters="")
        names = {step.letter: step.key for step in steps}
        lines = [line for line in text.split("\n") if line.startswith("- ")]
        assert len(lines) == len(steps)
        for step, line in zip(steps, lines):
            assert traces.phrase(problem.nodes[step.key]) in line.replace("Each", "each")
            assert bool(step.locked) == any(re.search(words, line) for words in locked)
            assert step.locked or line.endswith(spelled(step.chain, names))
            assert not any(words.split("{letter}")[0] in line for words in named)


def test_bare_equations_are_the_vanilla_formulas_and_nothing_else(problems):
    for number, problem in enumerate(problems[:100]):
        steps = list(read_steps(problem, traces.answer(problem, random.Random(number))))
        names = {step.letter: step.key for step in steps}
        expected = [f"- {spelled(step.chain, names)}" for step in steps]
        text = traces.equations(problem)
        assert text.startswith("<think>\n- ") and well_formed(text.removeprefix("<think>\n"))
        assert [line for line in text.split("\n") if line.startswith("- ")] == expected
        assert extract(text) == str(problem.answer)


# --- wordings ------------------------------------------------------------------------------------------


SLOTS = ("OPENINGS", "STATED", "SELECT", "NAME", "SELECT_AND_NAME", "REMIND", "RESTATE", "LOCKED", "CLOSINGS")


def test_every_wording_is_used():
    problems = [igsm.draw(random.Random(seed), (15, 20)) for seed in range(30)]
    texts = "\n".join(traces.answer(problem, random.Random(0), Behaviors(False, 4, 0.5)) for problem in problems)
    for wording in (wording for slot in SLOTS for wording in getattr(traces, slot)):
        assert re.search("(?i)" + ".+?".join(map(re.escape, re.split(r"\{\w+\}", wording))), texts), wording


def test_a_letter_is_given_in_the_sentence_or_after_it_equally_often():
    problems = [igsm.draw(random.Random(seed), (15, 20)) for seed in range(60)]
    steps = [line for seed, problem in enumerate(problems) for line in traces.answer(problem, random.Random(seed)).split("\n")]
    after = sum(line.startswith(("- Next is ", "- Now take ")) for line in steps)
    inside = sum(line.startswith(("- Let ", "- Write ")) for line in steps)
    assert abs(after - inside) < 4 * (after + inside) ** 0.5


def test_more_than_and_times_are_of_a_number_and_one_quantity():
    nodes = {key: Node(key, "", 1) for key in "ab"}
    assert traces.describe(("+", 2, "a", "b"), nodes) == "the sum of 2, a and b"
    assert traces.describe(("-", 2, "a"), nodes) == "the difference of 2 and a"


def test_strict_restates_only_what_depends_on_another():
    restated = 0
    for problem in (igsm.draw(random.Random(seed), (15, 20)) for seed in range(40)):
        for step in read_steps(problem, traces.answer(problem, random.Random(0), Behaviors(False, 2, 0.9, strict=True))):
            assert step.restated is None or problem.nodes[step.key].parents
            restated += step.restated is not None
    assert restated
