"""The graph: evaluated once and rightly, hashed by what it is, refused when it cannot be solved."""

import json
import random

import pytest

from minibridge.config import InputError
from minibridge.dag import Node, Problem, evaluate, leaves

# Nodes of the small problems below are named by one letter: "a" stands for the node "Crate a's Ball".
EXPRESSIONS = {"a": 3, "b": 5, "c": ("-", "a", "b"), "d": ("*", 4, ("+", "b", "a")), "t": ("+", "c", "d"),
               "r": ("+", 1, "d")}


def full(expr, owner="Crate"):
    if isinstance(expr, tuple):
        return (expr[0], *(full(arg, owner) for arg in expr[1:]))
    return f"{owner} {expr}'s Ball" if isinstance(expr, str) else expr


def build(expressions=EXPRESSIONS, order="abcdt", redundant="r", owner="Crate"):
    nodes = [Node(f"{owner} {name}", "Ball", full(expr, owner)) for name, expr in expressions.items()]
    return Problem("test", {node.key: node for node in nodes}, tuple(full(name, owner) for name in order),
                   tuple(full(name, owner) for name in redundant), num_ops=5)


def backwards(expressions):
    return dict(reversed(expressions.items()))


@pytest.mark.parametrize("expr, value", [
    (7, 7),
    ("a", 3),
    (("-", 10, 3, 2), 5),
    (("-", 10, ("-", 3, 2)), 9),
    (("+", 1, "a", "b", 5), 1),
    (("*", ("+", 1, 2), ("-", "b", 5), -2), 78),
])
def test_evaluate_folds_from_the_left(expr, value):
    assert evaluate(expr, {"a": 3, "b": -8}) == value


@pytest.mark.parametrize("expr, parents, degree", [
    (4, (), 1),
    ("a", ("a",), 1),
    (("+", 3, ("-", "b", "a")), ("b", "a"), 3),
    (("+", ("*", "a", "b"), ("*", "a", "c")), ("a", "b", "c"), 3),
    (("*", 2, ("+", "a", 2)), ("a",), 2),
])
def test_parents_and_degree(expr, parents, degree):
    node = Node("Crate", "Ball", expr)
    assert node.key == "Crate's Ball"
    assert (node.parents, node.degree) == (parents, degree)


def test_leaves_are_listed_left_to_right_with_repeats():
    assert leaves(("+", ("*", "a", "b"), 2, ("*", "a", 7))) == ["a", "b", 2, "a", 7]


def test_values_of_all_nodes_whatever_their_order():
    values = {"a": 3, "b": 5, "c": -2, "d": 32, "t": 30, "r": 33}
    for problem in (build(), build(backwards(EXPRESSIONS)), build(order="badct")):
        assert problem.values == {full(name): value for name, value in values.items()}
        assert (problem.target, problem.answer) == (full("t"), 30)


def test_locked_until_every_parent_is_solved():
    problem = build()
    assert problem.missing(full("a"), set()) == []
    assert problem.missing(full("c"), set()) == [full("a"), full("b")]
    assert problem.missing(full("c"), {full("b"), full("d")}) == [full("a")]
    assert problem.missing(full("c"), {full("b"), full("a")}) == []


@pytest.mark.parametrize("changes, order, named", [
    ({"a": ("+", 1, "t")}, "abcdt", ["cycle", *map(full, "act")]),
    ({"r": ("+", "r", 1)}, "abcdt", ["cycle", full("r")]),
    ({"d": "z"}, "abcdt", [full("d"), full("z")]),
    ({}, "abzdt", ["order", full("z")]),
    ({}, "cabdt", ["order", full("c")]),
    ({}, "abct", ["order", full("t")]),
])
def test_a_problem_that_cannot_be_solved_is_refused(changes, order, named):
    with pytest.raises(InputError) as error:
        build(EXPRESSIONS | changes, order)
    message = str(error.value)
    assert "\n" not in message and all(name in message for name in named)


def test_topological_orders_are_valid_and_all_of_them_are_reached():
    problem, reached = build(), set()
    for seed in range(200):
        order = problem.topological_order(random.Random(seed))
        build(order="".join(key.split("'")[0][-1] for key in order))  # raises if it cannot be solved in turn
        assert sorted(order) == sorted(problem.order) and order[-1] == problem.target
        reached.add(order)
    assert reached == {tuple(map(full, order)) for order in ("abcdt", "abdct", "bacdt", "badct")}
    assert problem.topological_order(random.Random(7)) == problem.topological_order(random.Random(7))


def test_id_depends_on_the_problem_alone():
    assert build().id == build(backwards(EXPRESSIONS)).id == build(order="badct").id
    changes = ({"a": 4}, {"c": ("-", "b", "a")}, {"c": ("+", "a", "b")}, {"d": ("*", 4, ("+", "b", "c"))},
               {"r": 1})
    different = [build(), build(owner="Box"), build(order="abc"),
                 *(build(EXPRESSIONS | change) for change in changes)]
    assert len({problem.id for problem in different}) == len(different)


def test_structure_forgets_names_and_order_and_nothing_else():
    renamed = {"y": 3, "x": 5, "w": ("-", "y", "x"), "v": ("*", 4, ("+", "x", "y")), "u": ("+", "w", "v"),
               "s": ("+", 1, "v")}
    same = [build(), build(owner="Box"), build(backwards(EXPRESSIONS), order="badct"),
            build(renamed, "yxwvu", "s")]
    assert len({problem.structure for problem in same}) == 1
    shorter = {name: expr for name, expr in EXPRESSIONS.items() if name != "r"}
    changes = {"a": 4}, {"c": ("-", "b", "a")}, {"c": ("+", "a", "b")}, {"r": ("+", 1, "c")}
    different = [build(), build(order="abc"), build(shorter, redundant=""),
                 *(build(EXPRESSIONS | change) for change in changes)]
    assert len({problem.structure for problem in different}) == len(different)


def test_round_trip_through_json():
    problem = build()
    nodes = {**problem.nodes, "Shelf's Toys": Node("Shelf", "Toys", full("a"), stated=False)}
    problem = Problem("test", nodes, problem.order, (*problem.redundant, "Shelf's Toys"), 5)
    again = Problem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert again == problem  # tuples again, not the lists of JSON
    assert list(again.nodes) == list(problem.nodes)  # what the wording of a question is shuffled from
    assert (again.id, again.structure, again.values) == (problem.id, problem.structure, problem.values)
    assert not again.nodes["Shelf's Toys"].stated and again.num_ops == 5
