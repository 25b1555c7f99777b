"""The graph: evaluated once and rightly, hashed by what it is, refused when it cannot be solved."""

import json
import random
from decimal import Decimal

import pytest

from minibridge.config import InputError
from minibridge.dag import Node, Problem, evaluate, leaves, rounded

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
    (("+", ("*", "a", "b"), ("*", "a", "c")), ("a", "b", "c"), 4),
    (("*", 2, ("+", "a", 2)), ("a",), 3),
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
    ({"a": ("+", 1, "t")}, "abcdt", ["computed from itself", *map(full, "act")]),
    ({"r": ("+", "r", 1)}, "abcdt", ["computed from itself", full("r")]),
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
    turned = EXPRESSIONS | {"d": ("*", ("+", "a", "b"), 4), "t": ("+", "d", "c")}
    same = [build(), build(owner="Box"), build(backwards(EXPRESSIONS), order="badct"), build(turned),
            build(renamed, "yxwvu", "s")]
    assert len({problem.structure for problem in same}) == 1
    shorter = {name: expr for name, expr in EXPRESSIONS.items() if name != "r"}
    changes = {"a": 4}, {"c": ("-", "b", "a")}, {"c": ("+", "a", "b")}, {"r": ("+", 1, "c")}
    different = [build(), build(order="abc"), build(shorter, redundant=""),
                 build(EXPRESSIONS | {"s": EXPRESSIONS["r"]}, redundant="rs"),  # the same condition twice
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


# --- numbers that are not whole ------------------------------------------------------------------------


@pytest.mark.parametrize("number, text", [
    ("0.12345", "0.1235"), ("-0.12345", "-0.1235"), ("0.12344999", "0.1234"), ("0.03125", "0.0313"), ("2.0", "2"),
    ("-0.00004", "0"), ("0.00005", "0.0001"), ("1.99996", "2"), ("1E+3", "1000"), ("0.5000", "0.5"),
    ("999999999.99994", "999999999.9999"),
])
def test_rounding_to_four_decimals(number, text):
    result = rounded(Decimal(number))
    assert str(result) == text and isinstance(result, int) == ("." not in text)


def test_whole_numbers_stay_exact():
    huge = 10**40 + 1
    assert evaluate(("*", huge, huge, -1), {}) == -huge * huge


@pytest.mark.parametrize("expr, text", [
    (("/", 6, 3), "2"), (("/", 2, 3), "0.6667"), (("*", ("/", 2, 3), 3), "2.0001"), (("/", 2, 3, 3), "0.2222"),
    (("/", 1, ("*", 2, 16)), "0.0313"), (("sqrt", 2), "1.4142"), (("sqrt", 16), "4"), (("sqrt", 0), "0"),
    (("square", ("-", 1, 4)), "9"), (("square", ("/", 1, 3)), "0.1111"), (("-", Decimal("0.1"), Decimal("0.3")), "-0.2"),
    (("+", Decimal("0.75"), "a", Decimal("0.25")), "8"),
])
def test_every_operation_is_rounded(expr, text):
    result = evaluate(expr, {"a": 7})
    assert str(result) == text and isinstance(result, int) == ("." not in text)


@pytest.mark.parametrize("expr", [("/", 1, "z"), ("/", "z", "z"), ("sqrt", ("-", "z", 1)), ("/", 10**30, 7)])
def test_what_cannot_be_computed_is_refused(expr):
    nodes = {"z": Node("z", "", 0), "t": Node("t", "", expr)}
    with pytest.raises(InputError, match="node 't'.*(zero|negative|large)"):
        Problem("test", nodes, ("z", "t"), (), 1)


@pytest.mark.parametrize("expr, drift", [
    (("*", ("/", 2, 3), 3), .00005), (("+", 2, 3), 0), (("/", 1, 8), 0), (("*", ("/", 1, 30000), 30000), 1.0),
    (("/", ("/", 1, 3), 1000), 1 - .0003 * 3000), (("-", 3, 3), 0),
    (("-", ("*", 2, ("/", 1, 32)), ("/", 1, 16)), float("inf")),  # 0 but for rounding
    (("/", 1, ("-", ("*", 2, ("/", 1, 32)), ("/", 1, 16))), float("inf")),
])
def test_drift_is_the_error_that_rounding_leaves(expr, drift):
    assert Problem("test", {"t": Node("t", "", expr)}, ("t",), (), 1).drift == pytest.approx(drift, rel=1e-6)


GOOD = {"task": "own", "num_ops": 1, "nodes": [{"owner": "a", "item": "", "expr": 2, "stated": True},
                                               {"owner": "t", "item": "", "expr": ["*", "a", 3.5], "stated": True}],
        "order": ["a", "t"], "redundant": []}


@pytest.mark.parametrize("change", [
    None, 3, [], {"task": 3}, {"num_ops": "1"}, {"num_ops": True}, {"nodes": {}}, {"nodes": [3]}, {"order": None},
    {"order": [3]},
    {"redundant": [["a"]]}, {"tolerance": "x"}, {"tolerance": 1}, {"tolerance": 1.0}, {"ask": 7}, {"nodes": GOOD["nodes"] * 2},
    {"tolerance": None}, {"ask": None},
    *({"nodes": [GOOD["nodes"][0], GOOD["nodes"][1] | node]} for node in (
        {"owner": 7}, {"item": None}, {"stated": 1}, {"text": 5}, {"text": None}, {"expr": None}, {"expr": {}},
        {"expr": True}, {"expr": []},
        {"expr": ["*"]}, {"expr": ["*", "a"]}, {"expr": ["sqrt", "a", "a"]}, {"expr": ["%", "a", "a"]},
        {"expr": [["*"], 1, 2]},
        {"expr": ["*", "a", None]}, {"expr": ["*", "a", True]}, {"expr": ["/", "a", 0]}, {"expr": ["*", "a", 10**100]},
        {"expr": ["*", "a", "nobody"]}, {"expr": "t"}))], ids=str)
def test_from_dict_refuses_what_to_dict_does_not_write(change):
    assert Problem.from_dict(GOOD).answer == 7
    with pytest.raises(InputError) as error:
        Problem.from_dict(GOOD | change if isinstance(change, dict) else change)
    assert "\n" not in str(error.value)


def test_operations_nest_fifty_deep_and_no_deeper():
    expr = 1
    for depth in range(50):
        expr = ["+", expr, 1]
    nodes = [{"owner": "a", "item": "", "expr": expr, "stated": True}]
    record = GOOD | {"nodes": nodes, "order": ["a"]}
    assert Problem.from_dict(record).answer == 51
    nodes[0]["expr"] = ["+", 1, expr]
    with pytest.raises(InputError, match="nested more than 50 deep"):
        Problem.from_dict(record)


def test_the_question_is_part_of_the_id():
    assert len({Problem.from_dict(GOOD | {"ask": ask}).id for ask in ("", "t?", "How many?")}) == 3


def test_a_long_chain_has_a_structure():
    names = [f"n{i}" for i in range(3000)]
    nodes = {a: Node(a, "", ("+", b, 1)) for a, b in zip(names[1:], names)} | {"n0": Node("n0", "", 1)}
    assert len(Problem("test", nodes, tuple(names), (), 1).structure) == 16


def test_round_trip_of_decimals_texts_and_tolerance():
    nodes = [Node("a b", "", Decimal("0.0001"), True, "A text."), Node("t", "", ("/", "a b", ("*", Decimal("2.5"), 3)))]
    problem = Problem("own", {node.key: node for node in nodes}, ("a b", "t"), (), 2, 1e-4, "How many?")
    again = Problem.from_dict(json.loads(json.dumps(problem.to_dict())))
    assert again == problem and (again.id, again.structure) == (problem.id, problem.structure)
    assert isinstance(again.nodes["a b"].expr, Decimal) and again.nodes["a b"].text == "A text."
    assert (again.tolerance, again.ask) == (1e-4, "How many?")


def test_records_of_plain_problems_have_no_new_fields():
    record = build().to_dict()
    assert list(record) == ["task", "num_ops", "nodes", "order", "redundant"]
    assert all(list(node) == ["owner", "item", "expr", "stated"] for node in record["nodes"])


def test_known_hashes():
    """They decide which split a problem is of, so they must not change with the code."""
    assert (build().id, build().structure) == ("b88931c3bf0a8036", "03bfebaed39c2c23")


def test_a_text_is_part_of_the_problem_but_not_of_its_structure():
    plain, told = (Problem("own", {"t": Node("t", "", 3, True, text)}, ("t",), (), 0) for text in ("", "It is 3."))
    assert plain.id != told.id and plain.structure == told.structure


def test_core_forgets_what_is_not_needed():
    shorter = {name: expr for name, expr in EXPRESSIONS.items() if name != "r"}
    same = [build(), build(owner="Box"), build(shorter, redundant=""), build(EXPRESSIONS | {"r": 1})]
    assert len({problem.core for problem in same}) == 1
    assert len({build().core, build(EXPRESSIONS | {"a": 4}).core, build(order="abc").core}) == 3


def test_symbolic_when_every_name_is_one_word():
    def named(*names):
        return Problem("test", {name: Node(name, "", 1) for name in names}, names[-1:], names[:-1], 1).symbolic

    assert named("abc", "x1", "rate_of") and not named("abc", "two words") and not named("Ann's") and not build().symbolic


@pytest.mark.parametrize("change, named", [
    ({"order": ["a", "a", "t"]}, "order: 'a'"), ({"redundant": ["a"]}, "redundant: 'a'"),
    ({"nodes": [], "order": []}, "no node to ask for"),
    ({"nodes": [*GOOD["nodes"], {"owner": "u", "item": "", "expr": 1, "stated": True}]}, "must name every node"),
    ({"tolerance": -1e-4}, "tolerance"), ({"num_ops": -1}, "num_ops")])
def test_what_no_problem_has_is_named(change, named):
    with pytest.raises(InputError, match=named):
        Problem.from_dict(GOOD | change)
