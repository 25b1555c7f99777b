"""Arithmetic problems: DyVal's rules by count, and texts solved and re-executed by code that shares none with `dag`."""

import json
import random
import re
from collections import Counter
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from math import floor, isqrt, sqrt
from statistics import mean

import pytest

from minibridge import arithmetic, traces
from minibridge.answer import extract, well_formed
from minibridge.config import InputError
from minibridge.dag import Problem, leaves
from minibridge.traces import BRIDGE, Behaviors, plan

WORDS = {"sum": "+", "difference": "-", "product": "*", "quotient": "/", "square root": "sqrt", "square": "square"}


@pytest.fixture(scope="module")
def problems():
    """The paper's training and test splits, out of distribution, and whole numbers, in turn."""
    sizes = [(4, (0, 8), "6op"), (5, (0, 8), "6op"), (5, (20, 22), "6op"), (4, (0, 8), "int")]
    return [arithmetic.draw(random.Random(f"arithmetic {i}"), *sizes[i % 4]) for i in range(160)]


def rounded(number):
    """To four decimals, halves away from zero."""
    sign = -1 if number < 0 else 1
    return Fraction(sign * floor(abs(number) * 10**4 + Fraction(1, 2)), 10**4)


def operate(op, numbers):
    first, *rest = numbers
    if op == "sqrt":
        root = isqrt(floor(first * 10**8))  # of the whole number just below
        return Fraction(root + (first * 10**8 >= (root + Fraction(1, 2)) ** 2), 10**4)
    if op == "square":
        return rounded(first * first)
    for number in rest:
        if op == "/":
            first = rounded(first / number)
        else:
            first = rounded({"+": first + number, "-": first - number, "*": first * number}[op])
    return first


def read_question(text):
    """{name: expression} and the name asked for."""
    *lines, ask = text.split("\n")
    found = {}
    for line in lines:
        name, words = re.fullmatch(r"The value of ([a-z]{3}) equals (.+)\.", line).groups()
        assert name not in found
        found[name] = read_expression(words)
    return found, re.fullmatch(r"What is the value of ([a-z]{3})\?", ask)[1]


def read_expression(words):
    if match := re.fullmatch(r"the (sum|difference|product|quotient|square root|square) of (.+)", words):
        inner = re.fullmatch(r"(\w+) and (the .+)", match[2])  # "a and the sum of b and c"
        parts = inner.groups() if inner else re.split(", | and ", match[2])
        return (WORDS[match[1]], *map(read_expression, parts))
    return int(words) if words.isdigit() else words


def value(expr, found):
    if isinstance(expr, tuple):
        return operate(expr[0], [value(arg, found) for arg in expr[1:]])
    return Fraction(expr) if isinstance(expr, int) else value(found[expr], found)


def test_a_question_holds_the_whole_problem(problems):
    for i, problem in enumerate(problems):
        found, asked = read_question(traces.question(problem, random.Random(i)))
        assert found == {key: node.expr for key, node in problem.nodes.items()} and asked == problem.target
        assert value(asked, found) == Fraction(str(problem.answer))


# --- the tree ------------------------------------------------------------------------------------------


def kinds(problem):
    return [node.expr[0] if isinstance(node.expr, tuple) else "leaf" for node in problem.nodes.values()]


def near(count, share, n):
    return abs(count - share * n) < 4 * sqrt(share * (1 - share) * n)


@pytest.fixture
def unfiltered(monkeypatch):
    monkeypatch.setattr(arithmetic, "LEAST", float("-inf"))
    for name in ("BELOW", "LARGEST", "TOLERANCE"):
        monkeypatch.setattr(arithmetic, name, float("inf"))
    return monkeypatch


@pytest.mark.parametrize("variant", arithmetic.VARIANTS)
def test_operations_and_leaves_are_uniform(unfiltered, variant):
    ops, numbers, n = Counter(), Counter(), 2000
    for seed in range(n):
        problem = arithmetic.attempt(random.Random(seed), 2, (0, 0), variant, 0)
        ops[problem.nodes[problem.target].expr[0]] += 1
        first = problem.nodes[problem.nodes[problem.target].expr[1]].expr
        numbers[first] += 1
    expected = ("+", "-", "*", "/", "sqrt", "square") if variant == "6op" else ("+", "-", "*")
    assert ops.keys() == set(expected) and all(near(count, 1 / len(expected), n) for count in ops.values())
    assert numbers.keys() == set(range(1, 11)) and all(near(count, .1, n) for count in numbers.values())


def test_levels_and_children(unfiltered):
    """Without links: a tree whose leaves all lie at its depth; with one, every operation of two numbers has a third."""
    for seed in range(60):
        tree = arithmetic.attempt(random.Random(seed), 4, (0, 0), "6op", 0)

        def levels(key):
            below = [levels(parent) for parent in tree.nodes[key].parents]
            assert len({*below}) <= 1
            return 1 + max(below, default=0)

        assert levels(tree.target) == 4 and not tree.redundant
        children = Counter(leaf for node in tree.nodes.values() for leaf in leaves(node.expr) if isinstance(leaf, str))
        assert set(children.values()) == {1} and children.keys() == tree.nodes.keys() - {tree.target}
        for links in (0, 1, 2):
            linked = arithmetic.attempt(random.Random(seed), 4, (1, 1), "6op", links)
            for key, node in linked.nodes.items() if linked else ():
                if isinstance(node.expr, tuple):
                    more = links if key in linked.order else 0  # the redundant trees are left as they are
                    assert len(leaves(node.expr)) == (1 if node.expr[0] in ("sqrt", "square") else 2 + more)
                    assert links < 2 or not more or len(leaves(node.expr)) == 1 or \
                        leaves(node.expr)[-1] == leaves(node.expr)[-2]  # both links go to the same child


def test_an_operation_of_several_numbers():
    for op, expr in (("-", ("-", "a", ("+", "b", "c"))), ("/", ("/", "a", ("*", "b", "c"))),
                     ("+", ("+", "a", "b", "c")), ("*", ("*", "a", "b", "c"))):
        assert arithmetic._expression((op, "a", "b", "c")) == expr
        assert arithmetic._expression((op, "a", "b")) == (op, "a", "b")


def test_a_link_closes_no_cycle_and_makes_no_zero_divisor():
    tree = {"a": 3, "b": 3, "z": ("-", "a", "b"), "c": 5, "d": 2, "q": ("/", "c", "d"), "t": ("+", "z", "q")}
    n, linked = 1500, {"z": Counter(), "q": Counter(), "t": Counter()}
    for seed in range(n):
        result = arithmetic._link(random.Random(seed), tree, 1)
        for key, counts in linked.items():
            assert result[key][:3] == tree[key]
            counts[result[key][3]] += 1
        assert {key: result[key] for key in "abcd"} == {key: tree[key] for key in "abcd"}
    assert linked["z"].keys() == set("abcdq")  # not itself, not its user; q unless it took z, which is 0 and cannot be
    assert linked["q"].keys() == set("abcd") and linked["t"].keys() == set("abzcdq")
    assert all(near(count, 1 / len(counts), n) for counts in linked.values() for count in counts.values())


@pytest.mark.parametrize("variant, depth, links, accept, nodes", [
    ("6op", 4, 0, .83, 9.7), ("6op", 4, 1, .71, 9.2), ("6op", 5, 1, .62, 16.4), ("int", 4, 0, .57, 15)])
def test_share_of_valid_trees(unfiltered, variant, depth, links, accept, nodes):
    """Against a second implementation of the rules, of 300 draws a row: answer at least 1e-4, and mean size."""
    n = 600
    unfiltered.setattr(arithmetic, "LEAST", 1e-4)
    drawn = [arithmetic.attempt(random.Random(seed), depth, (0, 0), variant, links) for seed in range(n)]
    valid = [problem for problem in drawn if problem]
    assert abs(len(valid) / n - accept) < 3 * sqrt(accept * (1 - accept) * (1 / n + 1 / 300))
    assert abs(mean(len(problem.order) for problem in valid) - nodes) < (.9 if variant == "6op" else 1e-9)


def test_filters(problems):
    for problem in problems:
        assert 1e-4 <= problem.answer < 1000
        assert all(abs(number) < 10_000 for number in problem.values.values())
        found = {key: node.expr for key, node in problem.nodes.items()}

        def exact(key):
            return unrounded(found[key], exact)

        assert abs(float(problem.answer) - exact(problem.target)) <= 1.0001e-4 * exact(problem.target)


def unrounded(expr, resolve):
    if isinstance(expr, str):
        return resolve(expr)
    if isinstance(expr, int):
        return float(expr)
    first, *rest = (unrounded(arg, resolve) for arg in expr[1:])
    if expr[0] in ("sqrt", "square"):
        return first**.5 if expr[0] == "sqrt" else first**2
    for number in rest:
        first = {"+": first + number, "-": first - number, "*": first * number, "/": first / (number or 1)}[expr[0]]
    return first


@pytest.mark.parametrize("name, value, seen", [
    ("LEAST", float("-inf"), lambda problem: problem.answer < 1e-4),
    ("BELOW", float("inf"), lambda problem: problem.answer >= 1000),
    ("LARGEST", float("inf"), lambda problem: max(map(abs, problem.values.values())) >= 10_000),
    ("TOLERANCE", float("inf"), lambda problem: problem.drift > 1e-4)])
def test_every_filter_has_work_to_do(monkeypatch, name, value, seen):
    monkeypatch.setattr(arithmetic, name, value)
    assert any(seen(arithmetic.draw(random.Random(seed), 5)) for seed in range(60))


def test_variants(problems):
    for problem in problems:
        used = set(kinds(problem)) - {"leaf"}
        if problem.task == "arithmetic-int":
            assert problem.tolerance == 0 and used <= {"+", "-", "*"}
            assert all(isinstance(number, int) for number in problem.values.values())
        else:
            assert problem.task == "arithmetic" and problem.tolerance == 1e-4
    assert {op for problem in problems[:40] for op in kinds(problem)} == {"leaf", *WORDS.values()}


def test_op_count(problems):
    for problem in problems:
        exprs = [problem.nodes[key].expr for key in problem.order]
        assert problem.num_ops == sum(max(1, len(leaves(expr)) - 1) for expr in exprs if isinstance(expr, tuple))


@pytest.mark.parametrize("low, high", [(0, 8), (2, 2), (20, 22)])
def test_redundant_premises(low, high):
    counts = Counter()
    for seed in range(60):
        problem = arithmetic.draw(random.Random(seed), 3, (low, high))
        ancestors, waiting = set(), [problem.target]
        while waiting:
            ancestors.add(key := waiting.pop())
            waiting += problem.nodes[key].parents
        assert ancestors == set(problem.order)  # the others are unconnected, each a tree of two levels
        roots = [key for key in problem.redundant if problem.nodes[key].parents]
        used = [parent for root in roots for parent in problem.nodes[root].parents]
        assert sorted(used + roots) == sorted(problem.redundant)
        counts[len(roots)] += 1
    assert counts.keys() == set(range(low, high + 1))


def test_names_tell_nothing(problems):
    """Three letters, no vowel; a node's name comes before those of its users as often as after them."""
    before = []
    for problem in problems:
        assert all(re.fullmatch("[b-df-hj-np-tv-xz]{3}", key) for key in problem.nodes)
        before += [parent < key for key, node in problem.nodes.items() for parent in node.parents]
        before += [early < late for early, late in pairwise(problem.order)]
    assert near(sum(before), .5, len(before))


def test_vanilla_order_is_random_and_ends_at_the_root(problems):
    unsorted = 0
    for problem in problems:
        solved = set()
        for key in problem.order:
            assert set(problem.nodes[key].parents) <= solved
            solved.add(key)
        tree = [key for key in problem.nodes if key in solved]  # as it grew
        unsorted += tree != list(problem.order)
    assert unsorted > .8 * len(problems)


@pytest.mark.parametrize("lines", ["topological", "reversed", "random"])
def test_line_orders(problems, lines):
    after = mixed = 0
    for i, problem in enumerate(problems[:60]):
        found, _ = read_question(traces.question(problem, random.Random(i), lines))
        place = {key: number for number, key in enumerate(found)}
        assert len(place) == len(problem.nodes)
        edges = [place[parent] < place[key] for key, node in problem.nodes.items() for parent in node.parents]
        assert lines == "random" or set(edges) == {lines == "topological"}
        after += sum(edges) / len(edges)
        # Redundant premises stand neither all before nor all after the needed ones.
        mixed += [key in problem.order for key in found] not in (
            [True] * len(problem.order) + [False] * len(problem.redundant),
            [False] * len(problem.redundant) + [True] * len(problem.order))
    assert mixed > 40
    assert lines != "random" or .4 < after / 60 < .6


def test_same_stream_same_problem():
    one, two, other = (arithmetic.draw(random.Random(seed)) for seed in (1, 1, 2))
    assert one == two and list(one.nodes) == list(two.nodes) and one.id != other.id
    assert Problem.from_dict(json.loads(json.dumps(one.to_dict()))) == one


def test_problems_that_cannot_be_drawn(monkeypatch):
    with pytest.raises(InputError, match="depth.*at least 2"):
        arithmetic.draw(random.Random(0), depth=1)
    monkeypatch.setattr(arithmetic, "MAX_DRAWS", 3)
    monkeypatch.setattr(arithmetic, "BELOW", 0)
    with pytest.raises(InputError, match="depth 3|3 levels"):
        arithmetic.draw(random.Random(0), depth=3)


# --- answers -------------------------------------------------------------------------------------------


def tokens(text):
    return re.findall(r"sqrt|square|[a-z]{3}|-?\d+(?:\.\d+)?|[-+*/()]", text)


def calculate(text, known):
    """Value of a formula, every operation rounded."""
    rest = re.findall(r"sqrt|square|[a-z]{3}|(?<![\w)] )-?\d+(?:\.\d+)?|\d+(?:\.\d+)?|[-+*/()]", text)

    def chain(operand, ops):
        result = operand()
        while rest and rest[0] in ops:
            result = operate(rest.pop(0), [result, operand()])
        return result

    def atom():
        token = rest.pop(0)
        if token in ("sqrt", "square"):
            return operate(token, [atom()])
        if token == "(":
            result = chain(lambda: chain(atom, "*/"), "+-")
            assert rest.pop(0) == ")"
            return result
        return known[token] if token.isalpha() else Fraction(token)

    result = chain(lambda: chain(atom, "*/"), "+-")
    assert not rest
    return result


def test_the_calculator_of_these_tests():
    assert calculate("abc / (2 * -3) - sqrt(2)", {"abc": Fraction(1)}) == Fraction("-1.5809")
    assert calculate("square(-0.5) - -1", {}) == Fraction("1.25")


def execute(problem, text, subgoal):
    """Every bullet re-executed with what earlier bullets gave; returns {restated: count, locked: count, ...}."""
    known, seen = {}, Counter()
    for line in text.split("</think>")[0].split("\n"):
        if not line.startswith("- "):
            continue
        name = next(word for word in re.findall(r"\b[a-z]{3}\b", line) if word in problem.nodes)
        expr, missing = problem.nodes[name].expr, [p for p in problem.nodes[name].parents if p not in known]
        assert name not in known
        if restated := re.search(r"equals ([^.]+)\. ", line):
            assert read_expression(restated[1]) == expr
            seen["restated"] += 1
        if missing:
            last = re.split(r"(?<=\.) ", line)[-1]
            assert [word for word in re.findall(r"\b[a-z]{3}\b", last) if word in problem.nodes] == missing
            assert not re.search(r"\d", line)
            seen["locked"] += 1
            continue
        links = re.split(r"(?<=\.) ", line)[-1].removesuffix(".").split(" = ")
        assert links[0] == name
        assert all(calculate(link, known) == Fraction(links[-1]) for link in links[1:])
        known[name] = Fraction(links[-1])
        if isinstance(expr, int):
            assert len(links) == 2
            continue
        most = max(1, len(leaves(expr)) - 1)
        assert [known.get(token, token) for token in tokens(links[1])] == \
            [Fraction(t) if re.search(r"\d", t) else t for t in tokens(links[2])]
        assert len(links) == (3 + most if subgoal else 4)
        seen["unfolded"] += most > 1
    assert known[problem.target] == Fraction(extract(text)) == Fraction(str(problem.answer))
    return seen


@pytest.mark.parametrize("behaviors", [Behaviors(), BRIDGE, Behaviors(True, 4, .5), Behaviors(analysis=2, reflection=.3)],
                         ids=str)
def test_every_step_of_an_answer_is_right(problems, behaviors):
    total = Counter()
    for i, problem in enumerate(problems[:80]):
        text = traces.answer(problem, random.Random(i), behaviors)
        assert well_formed(text.removeprefix("<think>\n"))
        total += execute(problem, text, behaviors.subgoal)
    assert bool(total["restated"]) == (behaviors.analysis > 0) and bool(total["locked"]) == (behaviors.reflection > 0)
    assert total["unfolded"]


def test_vanilla_solves_the_needed_nodes_once_each(problems):
    for i, problem in enumerate(problems):
        text = traces.answer(problem, random.Random(i))
        bullets = [line for line in text.split("\n") if line.startswith("- ")]
        assert [re.split(r"(?<=\.) ", line)[-1].split(" = ")[0] for line in bullets] == list(problem.order)


@pytest.mark.parametrize("expr, chain", [
    (("-", "bbb", ("+", "ccc", "ddd")), "x = bbb - (ccc + ddd) = 9 - (3 + 0.5) = 9 - 3.5 = 5.5."),
    (("/", "bbb", ("*", "ccc", "ddd")), "x = bbb / (ccc * ddd) = 9 / (3 * 0.5) = 9 / 1.5 = 6."),
    (("*", "bbb", "ccc", "ddd"), "x = bbb * ccc * ddd = 9 * 3 * 0.5 = 27 * 0.5 = 13.5."),
    (("sqrt", "ccc"), "x = sqrt(ccc) = sqrt(3) = 1.7321."),
    (("square", "ddd"), "x = square(ddd) = square(0.5) = 0.25."),
    (("/", "ddd", "bbb"), "x = ddd / bbb = 0.5 / 9 = 0.0556."),
])
def test_subtracted_sum_and_divisor_product_come_first(expr, chain):
    values = {"bbb": 9, "ccc": 3, "ddd": Decimal("0.5")}
    assert traces.compute(expr, "x", {key: key for key in values}, values, True) == chain


def test_leaves_are_no_picks(problems):
    """So that a pick is usually locked; three in ten go to redundant premises."""
    picks, failed, redundant = 0, 0, 0
    for i, problem in enumerate(problems):
        solved = set()
        for key, missing in plan(problem, random.Random(i), 0.3):
            turn = next(k for k in problem.order if k not in solved)
            if key != turn:
                assert problem.nodes[key].parents
                picks, failed = picks + 1, failed + bool(missing)
                redundant += key in problem.redundant
            solved |= set() if missing else {key}
        assert problem.target in solved
    assert failed > .6 * picks > 100 and redundant
