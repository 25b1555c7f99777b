"""Problems from a file: formulas parsed, problems built and asked, every mistake named with its line and node."""

import itertools
import json
import random
from decimal import Decimal
from pathlib import Path

import pytest

from minibridge import custom, traces
from minibridge.answer import extract
from minibridge.config import InputError, write_jsonl
from minibridge.custom import parse
from minibridge.traces import BRIDGE, Behaviors, plan

EXAMPLE = Path(custom.__file__).parent.parent / "docs" / "own_problems.jsonl"


def node(name, formula, statement=None):
    return {"name": name, "formula": formula} | ({} if statement is None else {"statement": statement})


ANN = node("Ann's apples", "5", "Ann picked 5 apples.")
BEN = node("Ben's apples", "2 * Ann's apples", "Ben picked twice as many as Ann.")
TOTAL = node("the total", "Ann's apples + Ben's apples")
GOOD = {"nodes": [ANN, BEN, TOTAL], "target": "the total", "ask": "How many apples are there?"}


@pytest.fixture
def read(tmp_path):
    def read(*records):
        write_jsonl(tmp_path / "own.jsonl", records)
        return custom.read(str(tmp_path / "own.jsonl"))

    return read


# --- formulas ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, expr", [
    ("7", 7), (" 0.50 ", Decimal("0.5")), ("2.0", 2), ("-3", -3), ("Ann's  apples", "Ann's apples"),
    ("2 * Ann's apples", ("*", 2, "Ann's apples")),
    ("a+b*c-d", ("-", ("+", "a", ("*", "b", "c")), "d")),
    ("a - b - c", ("-", "a", "b", "c")), ("a - (b - c)", ("-", "a", ("-", "b", "c"))),
    ("a / b / c", ("/", "a", "b", "c")), ("a / (b * c)", ("/", "a", ("*", "b", "c"))),
    ("a * b / c", ("/", ("*", "a", "b"), "c")),
    ("(a + b) * (c + 1)", ("*", ("+", "a", "b"), ("+", "c", 1))), ("a + b + c", ("+", "a", "b", "c")),
    ("((a))", "a"), ("a * -2", ("*", "a", -2)), ("a - -2", ("-", "a", -2)), ("3 pens", "3 pens"), ("10%", "10%"),
    ("__import__", "__import__"), ("2 * the end", ("*", 2, "the end")),
])
def test_parse(text, expr):
    assert parse(text) == expr


@pytest.mark.parametrize("text", [
    "", "  ", "a +", "* a", "a + * b", "(a", "a)", "()", "a b (c)", "(a) b", "a - - b", "-a", "+1", "a ** b", "a // b",
    "3 (4)", "1234567890", "0.12345", "-", "(" * 30 + "a", "a" + " + a" * 50])
def test_bad_formulas(text):
    with pytest.raises(InputError, match="formula: "):
        parse(text)


def test_long_formulas_are_refused_before_they_are_deep():
    for text in ("(" * 10**5, "a + " * 10**4, "9" * 10**5):
        with pytest.raises(InputError) as error:
            parse(text)
        assert len(str(error.value)) < 200
    assert parse("(" * 49 + "a" + ")" * 49) == "a"


# --- problems ------------------------------------------------------------------------------------------


def test_the_example_file():
    """Its answers are worked out by hand."""
    problems = custom.read(str(EXAMPLE))
    assert [str(problem.answer) for problem in problems] == ["61", "7.5", "19.65", "41"]
    assert [problem.tolerance for problem in problems] == [0, 1e-4, 1e-4, 0]
    assert [problem.redundant for problem in problems] == [("Zoe's marbles",), ("the price of a ruler",), (), ("e",)]
    assert [problem.symbolic for problem in problems] == [False, False, False, True]
    for record, problem in zip(map(json.loads, EXAMPLE.read_text().splitlines()), problems, strict=True):
        statements = [node["statement"] for node in record["nodes"] if "statement" in node]
        assert traces.question(problem, random.Random(0), "given").split("\n") == [*statements, record["ask"]]
        for behaviors in (traces.VANILLA, BRIDGE, Behaviors(True, 4, .5), Behaviors(True, 2, .5, strict=True)):
            for seed in range(20):
                text = traces.answer(problem, random.Random(seed), behaviors)
                assert extract(text) == str(problem.answer)
                quoted = [statement for statement in statements if f": {statement} " in text]
                assert behaviors != traces.VANILLA or not quoted
    assert "12.5 = 7.5." in traces.answer(problems[1], random.Random(0))


def test_order_follows_the_file_as_far_as_it_can(read):
    (problem,) = read(GOOD | {"nodes": [TOTAL, BEN, node("x y", "Ben's apples"), ANN, node("alone", "4", "It is 4.")]})
    assert problem.order == ("Ann's apples", "Ben's apples", "the total")
    assert problem.redundant == ("x y", "alone") and problem.num_ops == 2 and problem.task == "own"
    nodes = [node(name, "1", "It is 1.") for name in "zyx"]
    (problem,) = read({"nodes": [*nodes, node("t", "x + y + z")], "target": "t", "ask": "What is t?"})
    assert problem.order == tuple("zyxt")


@pytest.mark.parametrize("statement", ['He said "3."', "It is 3!", "三个。", "(So it is.)"])
def test_statements_may_end_in_quotes(read, statement):
    assert read(nodes(ANN, BEN, TOTAL, node("x", "3", statement)))


def test_analysis_quotes_the_statement_and_nothing_is_said_of_what_has_none(read):
    (problem,) = read(GOOD)
    answers = [traces.answer(problem, random.Random(seed), Behaviors(analysis=4)) for seed in range(20)]
    assert all(BEN["statement"] in text and ANN["statement"] not in text for text in answers)
    assert all(sum(text.count(words.split("{")[0]) for words in traces.QUOTE) == 1 for text in answers)


def test_letters_are_no_names(read):
    """Where one node is called x, no other gets this letter."""
    (problem,) = read(GOOD | {"nodes": [ANN, BEN, TOTAL, node("x", "Ann's apples", "So.")]})
    for seed in range(150):
        assert "the total. Call it x." not in (text := traces.answer(problem, random.Random(seed)))
        assert "Let x " not in text and " it x" not in text and "Write x" not in text


def test_reflection_on_own_problems(read):
    (problem,) = read(GOOD | {"nodes": [ANN, BEN, node("more", "Ben's apples", "It is the same."), TOTAL]})
    plans = [plan(problem, random.Random(seed), .5) for seed in range(50)]
    assert any(missing for attempts in plans for _, missing in attempts)
    assert any(key == "more" for attempts in plans for key, _ in attempts)


@pytest.mark.parametrize("formulas, tolerance", [
    (("5", "2 * a", "b - a"), 0.0), (("5", "a / 5", "b - a"), 1e-4), (("0.5", "2 * a", "b - a"), 1e-4),
    (("5", "2 * (a - 0.5)", "b"), 1e-4)])
def test_tolerance_where_something_may_be_rounded(read, formulas, tolerance):
    nodes = [node(name, formula, "So it is.") for name, formula in zip("abc", formulas)]
    unneeded = node("d", "a / 2", "So it is.")
    (problem,) = read({"nodes": [*nodes, unneeded], "target": "c", "ask": "c?"})
    assert problem.tolerance == tolerance


def test_letters_bound_the_size_unless_names_are_words(read):
    def chain(name, size):
        names = [name.format(i) for i in range(size)]
        nodes = [node(names[0], "1", "It is 1.")] + [node(b, f"{a} + 1") for a, b in itertools.pairwise(names)]
        return {"nodes": nodes, "target": names[-1], "ask": "How many?"}

    assert read(chain("box {}", 52), chain("box{}", 300))[1].answer == 300
    with pytest.raises(InputError, match=":1: nodes: 53"):
        read(chain("box {}", 53))


# --- mistakes ------------------------------------------------------------------------------------------


def nodes(*changed):
    return GOOD | {"nodes": list(changed)}


@pytest.mark.parametrize("record, named", [
    (nodes(ANN, node("Ben's apples", "2 * Ann", "So."), TOTAL), ["node \"Ben's apples\"", "'Ann'"]),
    (nodes(node("Ann's apples", "the total", "So."), BEN, TOTAL),
     ["node", "computed from itself: ", "Ann's apples -> the total -> "]),
    (nodes(ANN, BEN, TOTAL, node("x", "x + 1", "So.")), ["node 'x'", "x -> x"]),
    (nodes(ANN, BEN, node("the total", "Ben's apples / (Ann's apples - 5)")), ["node 'the total'", "division by zero"]),
    (nodes(ANN, BEN, BEN, TOTAL), ["node \"Ben's apples\"", "second"]),
    (nodes(ANN, BEN, node("the total", "Ann's apples +")), ["node 'the total'", "formula"]),
    (nodes(ANN, BEN, node("the total", 5)), ["node 'the total'", "'formula' must be a text"]),
    (nodes(ANN, BEN, {"name": "the total"}), ["node 'the total'", "'formula'"]),
    (nodes(ANN, BEN, TOTAL | {"statment": "So."}), ["node 'the total'", "'statment'"]),
    (nodes(ANN, BEN, node("the total", "3")), ["node 'the total'", "statement"]),
    (nodes(ANN, BEN, TOTAL | {"statement": "No stop"}), ["node 'the total'", "statement"]),
    (nodes(ANN, BEN, TOTAL | {"statement": "Two\nlines."}), ["node 'the total'", "statement"]),
    (nodes(ANN, BEN, TOTAL | {"statement": ""}), ["node 'the total'", "statement"]),
    (nodes(ANN, BEN, TOTAL | {"statement": 3}), ["node 'the total'", "'statement'"]),
    (nodes(ANN, BEN, TOTAL, node("a-b", "1", "So.")), ["number 4", "'a-b'"]),
    (nodes(ANN, BEN, TOTAL, node("12", "1", "So.")), ["number 4", "'12'"]),
    (nodes(ANN, BEN, TOTAL, node("a=b", "1", "So.")), ["number 4", "'a=b'"]),
    (nodes(ANN, BEN, TOTAL, node("Mr. Li", "1", "So.")), ["number 4", "'Mr. Li'"]),
    *((nodes(ANN, BEN, TOTAL, node(name, "1", "So.")), ["number 4", "name"]) for name in (
        "etc.", "It", "and", "_", "a × b", "− q", "x" * 101, "½", "<answer>", "\\boxed{7}", "İ_x")),
    (nodes(ANN, BEN, TOTAL, node("Ben’s apples", "1", "So.")), ["node 'Ben’s apples'", "second"]),
    *((nodes(ANN, BEN, TOTAL | {"statement": text}), ["node 'the total'", "statement"]) for text in (
        ".", "See </think>.", "It is \\boxed{7}.")),
    (nodes(ANN, BEN, TOTAL, node("x" * 101, "1", "So.")), ["longer than 100 characters"]),
    (nodes(ANN, BEN, TOTAL, node("x" * 85 + "<answer>", "1", "So.")), ["because of '<answer>'"]),
    (nodes(ANN, BEN, TOTAL, node("x" * 85 + " ", "1", "So.")), ["because of ' '"]),
    (nodes(ANN, BEN, TOTAL, node([1] * 50, "1", "So.")), ["no usable name: '[1, 1, "]),
    (GOOD | {"ask": "<think> what?"}, ["ask: holds one of <think>"]), (nodes(*[ANN] * 1001), ["nodes: 1001"]),
    (nodes(ANN, BEN, TOTAL, node("The Total", "1", "So.")), ["node 'The Total'", "second", "case"]),
    (nodes(ANN, BEN, TOTAL, node(" x", "1", "So.")), ["number 4", "' x'"]),
    (nodes(ANN, BEN, TOTAL, node("", "1", "So.")), ["number 4", "name"]),
    (nodes(ANN, BEN, TOTAL, node(7, "1", "So.")), ["number 4", "name"]),
    (nodes(ANN, BEN, TOTAL, {"formula": "1"}), ["number 4", "name"]),
    (nodes(ANN, BEN, TOTAL, "x"), ["number 4", "object"]),
    (nodes(ANN, node("Ben's apples", "999999999 + 1", "So."), TOTAL), ["node \"Ben's apples\"", "1000000000"]),
    (nodes(node("Ann's apples", "1 / 3", "So."), BEN, node("the total", "Ann's apples / 1000")),
     ["node 'the total'", "rounding"]),
    (nodes(ANN, node("the half-price", "1", "So.")), ["number 2 has no usable name", "'the half-price', because of '-'"]),
    (nodes(), ["target", "'the total'"]),
    (GOOD | {"target": "nobody"}, ["target", "'nobody'"]), (GOOD | {"target": 3}, ["'target'"]),
    (GOOD | {"ask": ""}, ["ask"]), (GOOD | {"ask": "a\nb"}, ["ask"]), (GOOD | {"answer": "15"}, ["'answer'"]),
    (GOOD | {"nodes": {}}, ["'nodes'", "list"]), ({"nodes": [], "target": "x"}, ["'ask'"]),
])
def test_mistakes_are_named(read, record, named):
    with pytest.raises(InputError) as error:
        read(GOOD, record)
    message = str(error.value)
    assert "own.jsonl:2: " in message and "\n" not in message and all(part in message for part in named), message


def test_squares_that_would_fill_the_memory(read):
    many = [node("n0", "10", "So.")] + [node(f"n{i}", f"n{i - 1} * n{i - 1}") for i in range(1, 60)]
    with pytest.raises(InputError, match="node 'n4'"):  # 10 to the 16th
        read({"nodes": many, "target": "n59", "ask": "How many?"})


def test_an_empty_file(read, tmp_path):
    with pytest.raises(InputError, match="no lines"):
        read()
    with pytest.raises(InputError, match="No such file"):
        custom.read(str(tmp_path / "nowhere"))


def test_a_name_that_may_be_a_plural_is_never_said_to_be_its_number():
    pupils = custom.problem({"nodes": [{"name": "the pupils", "formula": "27", "statement": "There are 27 pupils."}],
                             "target": "the pupils", "ask": "How many?"})
    answers = {traces.answer(pupils, random.Random(seed)) for seed in range(10)}
    assert all("The text gives the pupils as 27." in answer for answer in answers)
