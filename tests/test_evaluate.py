"""Evaluation: pass@k by enumeration, intervals by hand, the table's rows, saved answers scored again."""

import json
import itertools
import math
import random
from pathlib import Path

import pytest

from minibridge import evaluate, igsm, traces
from minibridge.config import read_jsonl, run_main, write_jsonl
from minibridge.dag import read_problem
from minibridge.evaluate import Config, Scored, best_constant, interval, pass_at_k, rescore, table, wilson
from minibridge.verify import verify

HEAD = "| problems | count | accuracy | 95% interval |"


def run(*argv) -> int:
    return run_main(evaluate.main, Config, [str(word) for word in argv])


def cells(text: str) -> dict[str, list[str]]:
    """The rows of a table by their first cell."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(samples):
    for right in range(samples + 1):
        answers = [True] * right + [False] * (samples - right)
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations(answers, k))
            assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_does_not_overflow():
    assert pass_at_k(2000, 1, 1000) == pytest.approx(0.5)


@pytest.mark.parametrize("mean, count, low, high", [  # from tables of Wilson's interval
    (0.0, 10, 0.0, 0.2775), (0.5, 10, 0.2366, 0.7634), (1.0, 10, 0.7225, 1.0), (0.9, 50, 0.7864, 0.9565),
    (0.0, 1, 0.0, 0.7935)])
def test_wilson(mean, count, low, high):
    assert wilson(mean, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize("mean", [0.0, 1 / 3, 0.5, 1.0])
def test_wilson_solves_its_equation(mean):
    """Its ends are the shares p at which the mean lies 1.96 standard errors of p away."""
    for end in wilson(mean, 30):
        assert end in (0.0, 1.0) or abs(mean - end) == pytest.approx(1.96 * math.sqrt(end * (1 - end) / 30))


def test_an_interval_of_single_answers_is_wilsons():
    assert interval([1.0] * 27 + [0.0] * 3, 30) == pytest.approx(wilson(0.9, 30))
    assert interval([1.0] * 30, 30) == wilson(1.0, 30) and interval([0.0] * 30, 30) == wilson(0.0, 30)


@pytest.mark.parametrize("values, answers, counted", [
    ([1 / 4, 0, 3 / 4], 12, 48 / 7),  # variance 7/72; 2/9 of it a question of yes or no would have
    ([1 / 2] * 5, 20, 20), ([1 / 2, 1 / 2, 1 / 4], 12, 12),  # by chance less than even these would have, one by one
    ([1.0] * 5, 20, 5), ([0.0] * 5, 20, 5),
    ([1 - 2**-52] + [1.0] * 9, 640, 10)])  # as of pass@32 of 64 answers: the mean rounds to 1
def test_an_interval_counts_as_many_answers_as_its_variance_says(values, answers, counted):
    assert interval(values, answers) == pytest.approx(wilson(sum(values) / len(values), counted))


@pytest.mark.parametrize("k", [1, 4, 16])
def test_intervals_of_many_answers_contain_the_truth_as_often_as_they_say(k):
    """60 problems, whose chances of a right answer are spread evenly from 0 to 1, 16 answers to each, 1,000 times."""
    random_ = random.Random(0)
    truth, held = 1 - 1 / (k + 1), 0
    for _ in range(1000):
        chances = [random_.random() for _ in range(60)]
        right = [sum(random_.random() < chance for _ in range(16)) for chance in chances]
        low, high = interval([pass_at_k(16, count, k) for count in right], 60 * 16)
        held += low <= truth <= high
    assert 920 <= held <= 980


PROBLEMS = [Scored("0", 20, [True]), Scored("0", 20, [True]), Scored("7", 21, [True]),
            Scored("8", 21, [False]), Scored("9", 9, [False])]


def test_table():
    assert table(PROBLEMS).splitlines() == [
        HEAD,
        "|---|---|---|---|",
        "| all | 5 | 60.0% | 23.1% to 88.2% |",
        "| answer not 0 | 3 | 33.3% | 6.1% to 79.2% |",
        "| 9 ops | 1 | 0.0% | 0.0% to 79.3% |",  # by number, not by spelling
        "| 20 ops | 2 | 100.0% | 34.2% to 100.0% |",
        "| 21 ops | 2 | 50.0% | 9.5% to 90.5% |",
        "",
        "best constant answer: 0, 40.0%",
    ]


def test_pass_at_k_columns_are_means_over_problems():
    text = table([Scored("7", None, [True, False, False, False]), Scored("8", None, [False] * 4),
                  Scored("9", None, [True] * 3 + [False])])
    assert text.startswith(HEAD + " pass@2 | pass@4 |\n|---|---|---|---|---|---|\n")
    rows = cells(text)
    assert list(rows) == ["problems", "all", "answer not 0"]
    assert [cell.split(" ")[0] for cell in rows["all"]] == ["3", "33.3%", "10.4%", f"{(1 / 2 + 0 + 1) / 3:.1%}", "66.7%"]
    assert rows["all"][2] == "{:.1%} to {:.1%}".format(*wilson(1 / 3, 48 / 7))
    assert rows["all"][4] == "66.7% ({:.1%} to {:.1%})".format(*wilson(2 / 3, 3))  # each problem has it or has it not


def test_pass_at_k_stops_at_the_fewest_answers_of_a_problem():
    text = table([Scored("7", None, [True, False, False]), Scored("8", None, [False] * 8)])
    assert text.startswith(HEAD + " pass@2 |\n")


def test_answers_that_are_all_0_or_never():
    assert "answer not 0" not in table(PROBLEMS[:2])
    assert cells(table(PROBLEMS[2:]))["answer not 0"] == cells(table(PROBLEMS[2:]))["all"]


def test_best_constant():
    assert best_constant(PROBLEMS[1:] + [Scored("9", 20, [True])]) == ("9", 0.4)


def test_greedy_run_and_its_rescore(toy, guesser, tmp_path, capsys):
    """The guesser's most likely digit is one constant, so its accuracy is the share of that answer."""
    out = tmp_path / "new" / "eval.jsonl"
    arguments = ["--model", guesser, "--data", toy.rl, "--max-new-tokens", 8, "--device", "cpu"]
    assert run(*arguments, "--out", out) == 0
    printed = capsys.readouterr().out
    saved, asked = read_jsonl(out), read_jsonl(toy.rl)
    (digit,) = {line["text"] for line in saved}
    right = sum(digit == f"\\boxed{{{line['answer']}}}" for line in asked)
    assert cells(printed)["all"][:2] == [str(len(asked)), f"{right / len(asked):.1%}"]
    assert [line["group"] for line in saved] == list(range(len(asked)))
    for mine, line in zip(saved, asked, strict=True):
        assert all(mine[field] == line[field] for field in ("answer", "id", "num_ops"))
    assert {f"{line['num_ops']} ops" for line in asked} < set(cells(printed))
    assert run("--rescore", out) == 0
    assert capsys.readouterr().out == printed


def test_sampled_run_and_its_rescore(toy, guesser, tmp_path, capsys):
    arguments = ["--model", guesser, "--data", toy.rl, "--max-new-tokens", 8, "--samples", 4,
                 "--temperature", 1]
    outs = [tmp_path / name for name in ("a", "b", "c")]
    printed = []
    for out, seed in zip(outs, (0, 0, 1)):
        assert run(*arguments, "--out", out, "--seed", seed, "--device", "cpu") == 0
        printed.append(capsys.readouterr().out)
    assert outs[0].read_bytes() == outs[1].read_bytes() != outs[2].read_bytes()
    assert printed[0] == printed[1] and " pass@2 | pass@4 |\n" in printed[0]
    made = [json.loads(Path(f"{out}.run.json").read_text()) for out in outs]
    assert made[0]["fingerprint"] == made[1]["fingerprint"] != made[2]["fingerprint"]
    assert [(record["config"]["seed"], record["config"]["temperature"]) for record in made] == [(0, 1), (0, 1), (1, 1)]
    assert run("--rescore", outs[0]) == 0 and capsys.readouterr().out == printed[0]
    lines = read_jsonl(outs[0])
    assert cells(printed[0])["all"][1] == f"{sum(line['correct'] for line in lines) / len(lines):.1%}"
    right = {line["group"] for line in lines if line["correct"]}
    assert 0 < len(right) and cells(printed[0])["all"][4].startswith(f"{len(right) / 8:.1%} (")  # pass@4 of 4: any right


def test_rescore_looks_at_the_text(tmp_path):
    line = {"group": 3, "id": "a", "answer": "6", "text": "\\boxed{6}", "correct": False, "num_ops": 2}
    other = {"group": 1, "id": "a", "answer": "7", "text": "\\boxed{6}", "correct": True}
    write_jsonl(tmp_path / "x", [line, other, line | {"text": ""}])
    assert rescore(tmp_path / "x") == [Scored("6", 2, [True, False]), Scored("7", None, [False])]


def test_saved_answers_are_scored_with_their_tolerance(tmp_path):
    line = {"group": 0, "answer": "0.3333", "text": "\\boxed{0.33331}", "num_ops": 2}
    write_jsonl(tmp_path / "x", [line, line | {"group": 1, "tolerance": 1e-4}, line | {"group": 2, "tolerance": 1e-6}])
    assert [scored.correct for scored in rescore(tmp_path / "x")] == [[False], [True], [False]]
def worked(i: int, **change) -> dict:
    """A saved answer to a problem of its own, with one failed attempt or more."""
    problem = igsm.draw(random.Random(i), (15, 20))
    text = traces.answer(problem, random.Random(i), traces.Behaviors(True, 4, 0.5))
    return {"group": i, "answer": str(problem.answer), "text": text, "problem": problem.to_dict()} | change


def test_behaviors_and_first_errors(tmp_path, capsys):
    """Three right answers, the last with a slip in its first step; one with no step at all; one without a problem."""
    lines = [worked(i) for i in range(3)]
    solved = [line["text"].count(" = ") > 0 and sum(" = " in step for step in line["text"].split("\n- ")) for line in lines]
    lines[2]["text"] = lines[2]["text"].replace("\n- ", "\n- Hm. ", 1)
    write_jsonl(tmp_path / "x", [*lines, worked(3, text="I do not know."), worked(4, problem=None)])
    assert run("--rescore", tmp_path / "x") == 0
    printed = capsys.readouterr().out
    rows = cells(printed)
    assert rows["all"][:2] == ["5", "80.0%"]
    assert rows["with a failed attempt"] == ["75.0%"] and rows["right in every step"] == ["50.0%"]
    assert rows["steps with a value per answer"] == [f"{sum(solved) / 4:.2f}"]
    assert rows["right result with a wrong step"] == ["33.3% of right results"]
    assert printed.endswith("first errors: unreadable: 1, unfinished: 1\n")


def test_a_failed_attempt_where_nothing_is_locked_is_counted_and_not_a_right_one(tmp_path, capsys):
    """Its sentence again, once the answer has solved what it waited for."""
    line = worked(0)
    steps = verify(read_problem(line, ""), line["text"]).steps
    attempt = next(step for step in steps if step.kind == "failed attempt")
    closing = next(step for step in steps if step.kind == "closing")
    again = "\n" + line["text"][attempt.start : attempt.end]
    line["text"] = line["text"][: closing.start] + again + line["text"][closing.start :]
    write_jsonl(tmp_path / "x", [line])
    assert run("--rescore", tmp_path / "x") == 0
    rows = cells(capsys.readouterr().out)
    right = sum(step.kind == "failed attempt" for step in steps)
    assert rows["failed attempts per answer"] == [f"{right + 1:.2f}"]
    assert rows["right failed attempts per answer"] == [f"{right:.2f}"]


def test_explain_gives_the_reasons_and_their_counts(tmp_path, capsys):
    whole, slip = ({**line, "text": line["text"].removeprefix("<think>\n")} for line in (worked(1), worked(0)))
    slip["text"] = "- \x1b[31mHm.\n" + slip["text"]
    cut = worked(2, text="\\boxed{\u22127}", finish_reason="length")
    decimal = {"text": "\\boxed{0.5}\\boxed{0.3}", "answer": "0.3", "tolerance": 1e-4}
    write_jsonl(tmp_path / "x", [whole, slip, cut, decimal, decimal | {"text": "\\boxed{0.30001}"}])
    assert run("--explain", tmp_path / "x") == 0
    assert capsys.readouterr().out.replace(f"{tmp_path / 'x'}:", "").splitlines() == [
        f"1: right: '{whole['answer']}'; format: good",
        f"2: right: '{slip['answer']}'; format: good; unreadable in step 1: '\\x1b[31mHm'",
        f"3: wrong answer: '\\u22127' is not '{cut['answer']}'; format: no </think>; cut off at the longest length allowed; "
        "unfinished in step 1: \"Heron Harbour's Ship has no value\"",
        "4: wrong answer: 0.5 is not 0.3, give or take 0.0001 of it (2 boxes, the first counts); format: no </think>",
        "5: right: '0.30001'; format: no </think>",
        "answers: right 2, wrong answer 2, right with a wrong step 1",
        "formats: no </think> 3, good 2",
    ]


def test_a_right_answer_give_or_take_has_no_wrong_step(tmp_path, capsys):
    line = worked(1)
    text = line["text"].replace(f"boxed{{{line['answer']}}}", f"boxed{{{line['answer']}.01}}")
    write_jsonl(tmp_path / "x", [line | {"text": text, "tolerance": 0.1}])
    assert text != line["text"] and run("--explain", tmp_path / "x") == 0
    assert "answers: right 1" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("other", ["What is 2 + 4?", None, 3, ["2 + 4"]])
def test_a_text_that_is_called_a_problem_is_passed_over(tmp_path, capsys, other):
    write_jsonl(tmp_path / "x", [LINE | {"problem": other, "text": r"It is \boxed{6}."}])
    assert run("--rescore", tmp_path / "x") == run("--explain", tmp_path / "x") == 0
    said = capsys.readouterr().out
    assert "100.0%" in said and "right in every step" not in said


def test_explain_counts_what_rescoring_counts(toy, guesser, tmp_path, capsys):
    assert run("--model", guesser, "--data", toy.rl, "--max-new-tokens", 8, "--samples", 4, "--temperature", 1,
               "--out", tmp_path / "x", "--device", "cpu") == 0
    lines, printed = read_jsonl(tmp_path / "x"), capsys.readouterr().out
    assert run("--explain", tmp_path / "x") == 0
    explained = capsys.readouterr().out.splitlines()[:-2]
    right = [": right: " in line for line in explained]
    assert right == [line["correct"] for line in lines] and f"{sum(right) / len(right):.1%}" in printed


def test_no_behaviors_without_problems(tmp_path, capsys):
    write_jsonl(tmp_path / "x", [worked(0, problem=None)])
    assert run("--rescore", tmp_path / "x") == 0
    assert "behavior" not in capsys.readouterr().out


def test_a_problem_that_is_a_text_is_passed_over_and_a_broken_one_named_first(toy, guesser, tmp_path, capsys):
    first, *others = read_jsonl(toy.rl)
    argv = ("--model", guesser, "--max-new-tokens", 8, "--device", "cpu", "--out", tmp_path / "out", "--data")
    write_jsonl(tmp_path / "a", [first | {"problem": "How many?"}, *others])
    assert run(*argv, tmp_path / "a") == 0 and read_jsonl(tmp_path / "out")[0]["problem"] == "How many?"
    (tmp_path / "out").unlink()
    (tmp_path / "out.run.json").unlink()
    for change, message in (({"problem": {"nodes": []}}, "problem: "), ({"answer": "77777"}, "'answer' is '77777'")):
        write_jsonl(tmp_path / "a", [*others, first | change])
        assert run(*argv, tmp_path / "a") == 2 and not (tmp_path / "out").exists()
        error = capsys.readouterr().err
        assert f"{tmp_path / 'a'}:{len(others) + 1}: " in error and message in error


def test_a_sampled_line_carries_its_problem(toy, guesser, tmp_path, capsys):
    out = tmp_path / "eval.jsonl"
    assert run("--model", guesser, "--data", toy.rl, "--max-new-tokens", 8, "--device", "cpu", "--out", out) == 0
    assert [line["problem"] for line in read_jsonl(out)] == [line["problem"] for line in read_jsonl(toy.rl)]
    assert cells(capsys.readouterr().out)["right in every step"] == ["0.0%"]


NODE = {"owner": "a", "item": "", "expr": 6, "stated": True}
SIX = {"task": "own", "num_ops": 0, "nodes": [NODE], "order": ["a"], "redundant": []}
LINE = {"group": 0, "answer": "6", "text": ""}


@pytest.mark.parametrize("bad, message", [
    ("{", "not valid JSON"), ("[]", "not a JSON object"),
    ('{"answer": "6", "text": ""}', "field 'group' must be a whole number"),
    ('{"group": 0, "answer": 6, "text": ""}', "'answer' must be a str"),
    ('{"group": true, "answer": "6", "text": ""}', "field 'group' must be a whole number"),
    ('{"group": 0, "answer": "6", "text": "", "tolerance": "x"}', "'tolerance' must be a number"),
    ('{"group": 0, "answer": "6"}', "'text'"),
    (json.dumps(LINE | {"problem": SIX | {"nodes": [NODE | {"expr": 7}]}}), "'answer' is '6', its problem's '7'"),
    (json.dumps({"group": 0, "answer": "6", "text": "", "tolerance": 10**400}), "'tolerance'"),
    ('{"group": 0, "answer": "6", "text": "", "num_ops": "x"}', "field 'num_ops' must be a whole number"),
    ('{"group": 0, "answer": "6", "text": "", "problem": {}}', "problem: ")])
def test_bad_saved_line_is_named(tmp_path, capsys, bad, message):
    path = tmp_path / "eval.jsonl"
    write_jsonl(path, [LINE])
    path.write_text(path.read_text() + bad + "\n")
    assert run("--rescore", path) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}:2: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("argv, message", [
    ("", "--model, --data and --out, or --rescore, or --explain"),
    ("--model {model} --data {rl}", "--model, --data and --out, or --rescore"),
    ("--rescore {out}", "{out}: No such file"),
    ("--rescore {empty}", "{empty}: no lines"),
    ("--model {model} --data {rl} --out {out} --samples 2", "--temperature"),
    ("--model {model} --data {rl} --out {out} --samples 0", "samples: must be at least 1"),
    ("--model {model} --data {rl} --out {out} --max-new-tokens 8 --max-prompt 20", "{rl}:1: a prompt of"),
    ("--model {model} --data {rl} --out {out} --max-new-tokens 1000", "more than the 24 that max_prompt, or"),
    ("--model {model} --data {rl} --out {out} --temperature 1e-40", "temperature: 1e-40 is too small"),
    ("--rescore {rl} --samples 2", "rescore: no other option"),
    ("--explain {rl} --rescore {rl}", "no other option"),
    ("--explain {rl}", "{rl}:1: field 'text'"),
    ("--explain {empty}", "{empty}: no lines"),
    ("--model {model}/no --data {rl} --out {out}", "{model}/no: no such folder"),
    ("--model {model} --data {model}/no --out {out} --max-new-tokens 8", "{model}/no: No such file"),
    ("--model {model} --data {sft} --out {out} --max-new-tokens 8", "{sft}:1: field 'prompt'"),
    ("--model {model} --data {rl} --out {out} --device nosuch", "device 'nosuch'"),
    ("--modle {model}", "--modle"),
])
def test_wrong_input_is_one_line(toy, tmp_path, capsys, argv, message):
    names = {"model": toy.model, "rl": toy.rl, "sft": toy.sft, "out": tmp_path / "out",
             "empty": tmp_path / "empty"}
    names["empty"].write_text("")
    assert run(*argv.format(**names).split()) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(**names) in error and error.count("\n") == 1
    assert not names["out"].exists()


def test_answers_never_replace_their_prompts(toy, tmp_path, capsys):
    data = tmp_path / "data.jsonl"
    data.write_bytes(Path(toy.rl).read_bytes())
    words = ["--model", toy.model, "--data", str(data), "--out", f"{tmp_path}/../{tmp_path.name}/data.jsonl"]
    assert run_main(evaluate.main, evaluate.Config, words) == 2
    assert capsys.readouterr().err.endswith("data.jsonl is there already; remove it or choose another\n")
    assert data.read_bytes() == Path(toy.rl).read_bytes()
    (tmp_path / "new.run.json").write_text("mine")
    assert run_main(evaluate.main, evaluate.Config, [*words[:-1], str(tmp_path / "new.jsonl")]) == 2
    assert capsys.readouterr().err.endswith("new.run.json is there already; remove it or choose another\n")
    assert not (tmp_path / "new.jsonl").exists() and (tmp_path / "new.run.json").read_text() == "mine"
    for folder in (".", str(tmp_path)):
        assert run_main(evaluate.main, evaluate.Config, [*words[:-1], folder]) == 2
        assert capsys.readouterr().err == f"error: out: {folder} is a folder\n"


@pytest.mark.parametrize("change", [{"answer": "5"}, {"id": "another"}])
def test_answers_to_different_prompts_are_no_group(tmp_path, capsys, change):
    row = {"group": 0, "id": "one", "text": "\\boxed{4}", "answer": "4", "num_ops": 2}
    write_jsonl(tmp_path / "both.jsonl", [row, row | change])
    assert run("--rescore", tmp_path / "both.jsonl") == 2
    assert f"{tmp_path}/both.jsonl:2: another prompt than that of its group's first line" in capsys.readouterr().err


def test_every_problem_counts_once_however_many_answers_it_has():
    assert evaluate.accuracy([Scored("7", None, [True]), Scored("8", None, [False] * 3)]) == 0.5


def test_each_behavior_stands_in_its_own_row():
    problems = [igsm.draw(random.Random(seed), (15, 20)) for seed in range(6)]
    verdicts = [verify(problem, traces.answer(problem, random.Random(0), traces.Behaviors(True, 1, 0.5))) for problem in problems]
    fields = {"failed attempts": "attempts", "restatements": "restatements", "subgoals": "subgoals",
              "steps without need": "unneeded"}
    sums = {name: sum(getattr(verdict, field) for verdict in verdicts) for name, field in fields.items()}
    assert len(set(sums.values())) == 4
    found = cells(evaluate.behaviors(verdicts))
    assert {name: found[f"{name} per answer"] for name in sums} == {name: [f"{total / 6:.2f}"] for name, total in sums.items()}
