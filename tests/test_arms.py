"""The arms: what each injects, the rows of the augmented ones, and which problems and answers rejection sampling keeps."""

import random
import re
from collections import Counter, defaultdict

import pytest

from minibridge import arithmetic, arms, igsm, traces
from minibridge.answer import OPENING, extract
from minibridge.arms import augmented, behaviors_of, middling, own_answers, read_rollouts, record
from minibridge.config import InputError, write_jsonl
from minibridge.dag import Problem
from minibridge.traces import BRIDGE, VANILLA, Behaviors


@pytest.fixture(scope="module")
def problems():
    """Both tasks in turn."""
    return [igsm.draw(random.Random(i), (6, 9)) if i % 2 else arithmetic.draw(random.Random(i), 4) for i in range(24)]


def question(row):
    return row["messages"][1]["content"]


def written(row):
    return row["messages"][2]["content"]


# --- behaviors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments, behaviors", [
    (("vanilla",), VANILLA), (("bridge",), BRIDGE), (("pp-aug",), VANILLA), (("rc-aug",), VANILLA),
    (("own-answers",), None), (("prompts",), None),
    (("subgoal",), Behaviors(subgoal=True)), (("analysis",), Behaviors(analysis=2)),
    (("reflection",), Behaviors(reflection=.1)), (("subgoal+analysis",), Behaviors(True, 2)),
    (("reflection+subgoal",), Behaviors(True, 0, .1)), (("analysis+reflection",), Behaviors(False, 2, .1)),
    (("subgoal+analysis+reflection",), BRIDGE), (("bridge", 4, .3), Behaviors(True, 4, .3)),
    (("bridge", None, 0.0), Behaviors(True, 2, 0.0)), (("analysis", 0), VANILLA),
    (("bridge", None, .3, True), Behaviors(True, 2, .3, True)),
    (("reflection", None, None, True), Behaviors(False, 0, .1, True)),
    (("bridge@0.3",), Behaviors(True, 2, .3, True)), (("subgoal+reflection@.2",), Behaviors(True, 0, .2, True)),
    (("bridge@1", 4), Behaviors(True, 4, 1.0, True)), (("reflection@0",), Behaviors(False, 0, 0.0, True)),
])
def test_behaviors_of_an_arm(arguments, behaviors):
    assert behaviors_of(*arguments) == behaviors


@pytest.mark.parametrize("arguments, named", [
    (("gold",), "'gold'"), (("",), "arm"), (("subgoal+subgoal",), "arm"), (("subgoal+",), "arm"),
    (("bridge+subgoal",), "arm"),
    (("vanilla", 2), "analysis"), (("vanilla", 0), "analysis"), (("vanilla", None, .1), "reflection"), (("subgoal", 2), "analysis"),
    (("rc-aug", None, 0.0), "reflection"), (("vanilla", None, None, True), "strict"),
    (("subgoal+analysis", None, None, True), "strict"), (("prompts", 2), "analysis"), (("bridge", 7), "analysis"),
    (("bridge", None, 2.0), "reflection"), (("bridge@2",), "'2' is not a probability"), (("bridge@",), "'' is not a prob"),
    (("bridge@1e-1",), "not a probability"), (("bridge@0.1@0.2",), "not a probability"), (("bird@0.1",), "'bird' is none of"),
    (("analysis@0.1",), "reflection"), (("bridge@0.1", None, .1), "says itself"), (("bridge@0.1", None, None, True), "says itself"),
])
def test_settings_that_an_arm_does_not_have(arguments, named):
    with pytest.raises(InputError, match=named):
        behaviors_of(*arguments)


# --- augmented arms ------------------------------------------------------------------------------------


def test_premises_permuted(problems):
    orders = Counter()
    for problem in problems:
        rows = augmented("pp-aug", problem, 3)
        assert rows[0] == record(problem, 3, VANILLA) and len(rows) == 4
        *lines, ask = question(rows[0]).split("\n")
        for row in rows:
            assert {key: row[key] for key in row if key != "messages"} == {k: rows[0][k] for k in row if k != "messages"}
            assert written(row) == written(rows[0])
            *own, last = question(row).split("\n")
            assert last == ask and sorted(own) == sorted(lines)
        orders[len({question(row) for row in rows})] += 1
    assert orders[4] > len(problems) / 2 and sum(orders.values()) == len(problems)


def test_premises_are_permuted_also_where_the_plain_order_is_fixed(problems):
    problem = max(problems, key=lambda problem: len(problem.nodes))
    rows = augmented("pp-aug", problem, 3, lines="given")
    assert question(rows[0]) == traces.question(problem, random.Random(0), "given")
    assert len({question(row) for row in rows}) == 4


def test_reasoning_chains(problems):
    """Questions alike; answers in several topological orders, the first the plain one, with fresh letters and words."""
    orders, first_letters = defaultdict(set), set()
    for problem in problems:
        rows = augmented("rc-aug", problem, 3)
        assert rows[0] == record(problem, 3, VANILLA) and len(rows) == 4
        for row in rows:
            assert {key: row[key] for key in row if key != "messages"} == {k: rows[0][k] for k in row if k != "messages"}
            assert question(row) == question(rows[0]) and extract(written(row)) == row["answer"]
            bullets = [line for line in written(row).split("\n") if line.startswith("- ")]
            heads = [re.search(r"(\w+) = ", bullet)[1] for bullet in bullets]  # a name, or a letter of the node before it
            keys = "|".join(sorted(map(re.escape, problem.order), key=len, reverse=True))
            solved = heads if problem.task == "arithmetic" else [re.search(keys, bullet)[0] for bullet in bullets]
            assert sorted(solved) == sorted(problem.order) and solved[-1] == problem.target
            for i, key in enumerate(solved):
                assert set(problem.nodes[key].parents) <= set(solved[:i])
            orders[problem.id].add(tuple(solved))
            if problem.task == "igsm":
                first_letters.add(tuple(re.findall(r"(?<![\w'])[A-Za-z](?= = )", written(row))))
        assert problem.order in orders[problem.id]
    assert sum(len(found) > 2 for found in orders.values()) > len(problems) / 3
    assert len(first_letters) == 4 * 12


def test_forms_depend_on_the_seed_alone(problems):
    for arm in arms.AUGMENTED:
        assert augmented(arm, problems[1], 3) == augmented(arm, problems[1], 3) != augmented(arm, problems[1], 4)


def test_records_carry_the_tolerance(problems):
    for problem in problems:
        for behaviors in (None, BRIDGE):
            row = record(problem, 0, behaviors)
            assert row.get("tolerance", 0) == problem.tolerance and ("tolerance" in row) == (problem.task == "arithmetic")
            assert Problem.from_dict(row["problem"]).id == row["id"] == problem.id


# --- rejection sampling --------------------------------------------------------------------------------


def rollout(problem, text, **changes):
    line = {"group": 0, "id": problem.id, "answer": str(problem.answer), "text": text, "correct": None}
    return line | ({"tolerance": problem.tolerance} if problem.tolerance else {}) | changes


def worked(answer, words="So"):
    return f"{words} it is.\n</think>\n<answer>\n\\boxed{{{answer}}}\n</answer>"


@pytest.fixture
def sampled(problems, tmp_path):
    """Problem i of ten is right in i of nine rollouts, whatever the file says of them; the eleventh has none."""
    rows = [rollout(problem, worked(problem.answer if k < i else "none", f"{k}"), correct=k >= i)
            for i, problem in enumerate(problems[:10]) for k in range(9)]
    random.Random(0).shuffle(rows)
    write_jsonl(tmp_path / "rollouts.jsonl", rows)
    return read_rollouts(str(tmp_path / "rollouts.jsonl"))


@pytest.mark.parametrize("keep, kept", [((20, 80), range(2, 8)), ((0, 100), range(10)), ((1, 99), range(1, 9)),
                                        ((100, 100), [9]), ((0, 0), [0]), ((11, 12), [1])])
def test_problems_of_middling_accuracy(problems, sampled, keep, kept):
    assert middling(problems[:11], sampled, keep) == [problems[i] for i in kept]


def test_no_problem_is_left(problems, sampled):
    with pytest.raises(InputError, match="rollouts: 10 of the 11 .*12-13%"):
        middling(problems[:11], sampled, (12, 13))
    with pytest.raises(InputError, match="rollouts: 0 of the 5 "):
        middling(problems[11:16], sampled, (0, 100))


def test_own_right_answers(problems):
    for problem in problems[:4]:
        text = worked(problem.answer, "first")
        lines = [rollout(problem, words, correct=right) for words, right in (
            (worked("77"), False), (text, True), (text + "\n", True), (text + " and more", True), (worked(1, "x"), False),
            (worked(problem.answer, "second"), True))]
        rows = own_answers(problem, 3, lines)
        assert [written(row) for row in rows] == [OPENING + text, OPENING + worked(problem.answer, "second")]
        plain = record(problem, 3, VANILLA)
        for row in rows:
            assert row["messages"][:2] == plain["messages"][:2] and row.keys() == plain.keys()
            assert row["behaviors"] == "own-answers" and row["messages"][2]["role"] == "assistant"
            assert {key: row[key] for key in row if key not in ("messages", "behaviors")} == \
                {key: plain[key] for key in row if key not in ("messages", "behaviors")}
        many = [rollout(problem, worked(problem.answer, f"{i}"), correct=True) for i in range(9)]
        assert [written(row)[8] for row in own_answers(problem, 3, many)] == list("0123")


def test_rollouts_are_scored_again_with_their_tolerance(problems, tmp_path):
    problem = problems[0]
    near = f"{float(problem.answer) * (1 + 5e-5):.8f}"
    write_jsonl(tmp_path / "r", [rollout(problem, worked(near)), rollout(problem, worked(near), tolerance=0)])
    assert [line["correct"] for line in read_rollouts(str(tmp_path / "r"))[problem.id]] == [True, False]


@pytest.mark.parametrize("change, named", [({"id": 3}, "'id'"), ({"text": None}, "'text'"), ({"answer": 1}, "'answer'")])
def test_bad_rollout_lines_are_named(problems, tmp_path, change, named):
    write_jsonl(tmp_path / "r", [rollout(problems[1], ""), rollout(problems[1], "") | change])
    with pytest.raises(InputError, match=f"r:2: .*{named}"):
        read_rollouts(str(tmp_path / "r"))


def test_rollouts_of_another_answer_are_refused(tmp_path):
    problem = igsm.draw(random.Random(1), (6, 9))
    write_jsonl(tmp_path / "r", [{"id": problem.id, "answer": f"{problem.answer}1", "text": ""}])
    with pytest.raises(InputError, match=f"the answer to problem {problem.id} is {problem.answer}, not {problem.answer}1"):
        middling([problem], read_rollouts(str(tmp_path / "r")), (0, 100))
