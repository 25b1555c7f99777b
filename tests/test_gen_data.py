"""Files of problems: the same for every arm, kept apart between splits, reproducible to the byte."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import gen_data
from conftest import FREE_TOY
from minibridge import arms, igsm, reproduce, splits, traces
from minibridge.answer import OPENING, SYSTEM, extract
from minibridge.config import read_jsonl, run_main, write_jsonl
from minibridge.dag import Problem

TOY = ("--scale", "toy", "--ops", "2-5")
OWN = str(Path(gen_data.__file__).parent / "docs" / "own_problems.jsonl")


@pytest.fixture
def make(tmp_path, capsys):
    """Runs the script and returns the rows it wrote, to a file that no other command has written."""
    def make(*argv, out="rows.jsonl"):
        (tmp_path / out).unlink(missing_ok=True)
        status = run_main(gen_data.main, gen_data.Config, [*argv, "--out", str(tmp_path / out)])
        assert status == 0, capsys.readouterr().err
        return read_jsonl(tmp_path / out)

    return make


@pytest.fixture
def fails(tmp_path, capsys):
    """Runs the script, which has to end in status 2 and one line, writing nothing; returns the line."""
    def fails(*argv):
        status = run_main(gen_data.main, gen_data.Config, [*argv, "--out", str(tmp_path / "rows.jsonl")])
        output = capsys.readouterr()
        assert status == 2 and not list(tmp_path.iterdir()) and output.out == ""
        assert output.err.startswith("error: ") and output.err.count("\n") == 1
        return output.err

    return fails


def question(row):
    return row["messages"][1]["content"]


def written(row):
    return row["messages"][2]["content"]


# --- arms ----------------------------------------------------------------------------------------------


def test_arms_hold_the_same_problems_in_other_words(make):
    arms = {arm: make("--arm", arm, "--count", "25") for arm in ("vanilla", "bridge")}
    arms["custom"] = make("--arm", "bridge", "--analysis", "4", "--reflection", "0.3", "--count", "25")
    for vanilla, bridge, custom in zip(*arms.values(), strict=True):
        for key in ("answer", "task", "num_ops", "id", "problem"):
            assert vanilla[key] == bridge[key] == custom[key]
        assert question(vanilla) == question(bridge) == question(custom)
        problem = Problem.from_dict(vanilla["problem"])
        assert written(vanilla).count("\n- ") == len(problem.order)
    assert [{row["behaviors"] for row in rows} for rows in arms.values()] == [
        {"subgoal=0 analysis=0 reflection=0"}, {"subgoal=1 analysis=2 reflection=0.1"},
        {"subgoal=1 analysis=4 reflection=0.3"}]
    lengths = [sum(len(written(row)) for row in rows) for rows in arms.values()]
    assert lengths[0] < lengths[1] < lengths[2]


def test_an_rl_file_words_a_problem_as_an_sft_file_does():
    problem = igsm.draw(random.Random(0))
    sft, rl = arms.record(problem, 3, traces.BRIDGE), arms.record(problem, 3)
    assert rl["prompt"] == sft["messages"][:2]
    assert rl.keys() - {"prompt"} == sft.keys() - {"messages", "behaviors"}
    assert all(rl[key] == sft[key] for key in rl if key != "prompt")
    assert arms.record(problem, 4)["prompt"] != rl["prompt"]


# --- records -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["sft", "base"])
def test_sft_records(make, split):
    for row in make("--split", split, "--count", "10", *TOY):
        assert list(row) == ["messages", "answer", "task", "num_ops", "id", "behaviors", "problem"]
        assert row["task"] == "igsm"
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        assert row["messages"][0]["content"] == SYSTEM
        problem = Problem.from_dict(row["problem"])
        assert (row["id"], row["answer"]) == (problem.id, str(problem.answer))
        assert row["num_ops"] == problem.num_ops
        assert extract(written(row)) == row["answer"]
        assert written(row).startswith(OPENING) and written(row).endswith("</answer>")
        asked = problem.nodes[problem.target]
        assert question(row).endswith(f"\nHow many {asked.item} does each {asked.owner} have?")


@pytest.mark.parametrize("split", ["rl", "val", "test"])
def test_rl_records_hold_no_worked_answer(make, split):
    for row in make("--split", split, "--count", "10", *TOY):
        assert list(row) == ["prompt", "answer", "task", "num_ops", "id", "problem"]
        assert [message["role"] for message in row["prompt"]] == ["system", "user"]
        assert "boxed" not in json.dumps(row) and "</think>" not in row["prompt"][1]["content"]
        problem = Problem.from_dict(row["problem"])
        assert (row["id"], row["answer"]) == (problem.id, str(problem.answer))
        assert row["num_ops"] == problem.num_ops


# --- splits --------------------------------------------------------------------------------------------


def test_splits_of_the_paper():
    sizes = {name: split[:2] for name, split in gen_data.SPLITS.items() if name != "base"}
    assert sizes == {"sft": (2000, (15, 20)), "rl": (10000, (15, 20)), "val": (500, (21, 25)),
                     "test": (500, (20, 20))}


@pytest.mark.parametrize("split, ops", [("sft", (15, 20)), ("rl", (15, 20)), ("val", (21, 25)),
                                        ("test", (20, 20)), ("base", (1, 14))])
def test_op_range_of_a_split(make, split, ops):
    counts = [row["num_ops"] for row in make("--split", split, "--count", "6")]
    assert len(counts) == 6 and ops[0] <= min(counts) and max(counts) <= ops[1]
    assert {row["num_ops"] for row in make("--split", split, "--count", "3", "--ops", "6")} == {6}


def test_arithmetic_splits_of_the_paper(make):
    assert splits.DEPTHS == {"base": 3, "sft": 4, "rl": 5, "val": 5, "test": 5}
    for split, depth in splits.DEPTHS.items():
        for row in make("--task", "arithmetic-int", "--split", split, "--count", "1"):
            problem = Problem.from_dict(row["problem"])
            assert len(problem.order) == 2**depth - 1 and len(problem.redundant) <= 8 * 3
    rows = make("--task", "arithmetic-int", "--split", "test", "--redundant", "20-22", "--count", "2")
    assert all(60 <= len(Problem.from_dict(row["problem"]).redundant) <= 66 for row in rows)


# --- reproducibility -----------------------------------------------------------------------------------


def test_same_seed_same_bytes_in_any_process(tmp_path):
    """Also in processes that hash text differently, where the order of a set would show."""
    script, argv = Path(gen_data.__file__), ["--count", "12", "--seed", "5"]
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(script.parent)}
        result = subprocess.run([sys.executable, script, *argv, "--out", tmp_path / hash_seed],
                                env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert sum(1 for _ in open(tmp_path / "1")) == 12


def test_seeds_splits_and_prefixes(make):
    ten = make("--count", "10", *TOY)
    ids = [row["id"] for row in ten]
    assert make("--count", "4", *TOY) == ten[:4]  # a row depends neither on the count nor on the other rows
    for other in (("--seed", "1"), ("--split", "base"), ("--split", "rl"), ("--ops", "2-6")):
        assert not set(ids) & {row["id"] for row in make("--count", "10", *TOY, *other)}


# --- every arm of every task ---------------------------------------------------------------------------

ARMS = ("vanilla", "bridge", "subgoal", "analysis+reflection", "pp-aug", "rc-aug", "prompts")


@pytest.mark.parametrize("source", [("--task", "igsm", "--scale", "toy", "--ops", "4"), ("--task", "arithmetic"),
                                    ("--task", "arithmetic-int", "--depth", "3"), ("--problems", OWN)])
def test_every_arm_holds_the_same_problems(make, source):
    rows = {arm: make("--arm", arm, "--count", "3", *source) for arm in ARMS}
    plain = rows["vanilla"]
    for arm, lines in rows.items():
        forms = 4 if arm.endswith("aug") else 1
        for place, row in enumerate(lines):
            same = plain[place // forms]
            assert all(row[key] == same[key] for key in ("id", "answer", "problem", "num_ops"))
            assert row.get("tolerance") == same.get("tolerance")
            messages = row["prompt"] if arm == "prompts" else row["messages"]
            assert arm == "pp-aug" or messages[:2] == same["messages"][:2]
        assert len(lines) == forms * len(plain)
    strict = make("--arm", "bridge", "--strict", "--reflection", "0", "--count", "3", *source)
    assert list(map(written, strict)) == list(map(written, plain))


def test_rows_are_capped_problem_by_problem(make):
    every = make("--arm", "rc-aug", "--count", "5", *TOY)
    assert make("--arm", "rc-aug", "--count", "5", "--rows", "10", *TOY) == every[:10]
    assert len(make("--arm", "vanilla", "--count", "5", "--rows", "99", *TOY)) == 5


def test_epochs_that_match_the_steps_of_the_plain_arm():
    """2,000 problems are 75 steps of 128 in 5 epochs; in train_sft.py's own arithmetic, 8,000 rows then take as many."""
    import train_sft
    default = train_sft.Config(model="", data="", out="")
    assert (gen_data.BATCH, gen_data.EPOCHS) == (default.batch_size, default.epochs)
    for problems, rows in ((2000, 8000), (300, 1200), (1000, 2000), (2000, 5000), (2000, 1100)):
        line = gen_data.matched_steps(rows, problems)
        plain = round(default.epochs * (problems // 128))
        assert f" {plain} steps" in line and round(float(line.split("--epochs ")[1]) * (rows // 128)) == plain
    assert gen_data.matched_steps(2000, 2000) == ""  # one row a problem, or as many by --rows
    assert gen_data.matched_steps(400, 100) == gen_data.matched_steps(100, 400) == ""  # not one batch


def test_epochs_are_printed_for_the_augmented_arms(tmp_path, capsys):
    for arm, rows, printed in (("rc-aug", "none", True), ("rc-aug", "128", False), ("vanilla", "none", False)):
        argv = ["--arm", arm, "--count", "128", "--rows", rows, "--scale", "toy", "--ops", "4", "--out", str(tmp_path / f"{arm}_{rows}")]
        assert run_main(gen_data.main, gen_data.Config, argv) == 0
        assert ("--epochs 1.2500\n" in capsys.readouterr().out) == printed


def test_line_orders(make):
    def places(order):
        (row,) = make("--task", "arithmetic", "--lines", order, "--count", "1", "--split", "rl")
        return [line.split()[3] for line in row["prompt"][1]["content"].split("\n")[:-1]], Problem.from_dict(row["problem"])

    (forward, problem), (backward, _) = places("topological"), places("reversed")
    assert forward[::-1] == backward
    assert all(forward.index(parent) < forward.index(key) for key in forward for parent in problem.nodes[key].parents)


@pytest.mark.parametrize("argv, named", [
    ("--split rl --arm bridge", "arm"), ("--split val --reflection 0.3", "reflection"), ("--split test --strict", "strict"),
    ("--split rl --analysis 3", "analysis"), ("--keep 5-6", "keep"), ("--task arithmetic --ops 3", "ops"),
    ("--task arithmetic --scale toy", "scale"), ("--depth 3", "depth"), ("--redundant 1-2", "redundant"),
    (f"--problems {OWN} --task arithmetic", "task"), (f"--problems {OWN} --balance 0.5", "balance"),
    (f"--problems {OWN} --count 5", "count"), (f"--problems {OWN} --count 0", "count"), ("--arm own-answers", "arm"),
    ("--rollouts x --keep 20-800", "keep"), ("--task arithmetic --redundant 1000-4000", "redundant"),
    ("--workers 1000", "workers"), ("--task arithmetic --depth 30", "depth"),
    ("--task arithmetic --depth 1", "depth"), ("--workers 0", "workers")])
def test_options_that_would_do_nothing_or_never_end_are_refused(fails, argv, named):
    assert fails(*argv.split()).startswith(f"error: {named}: ")


def test_rows_of_another_command_are_not_replaced(make, tmp_path, capsys):
    argv = ["--scale", "toy", "--ops", "3", "--count", "2", "--out", str(tmp_path / "rows.jsonl")]
    make(*argv[:-2])
    before = (tmp_path / "rows.jsonl").read_bytes()
    assert run_main(gen_data.main, gen_data.Config, argv) == 0  # the same rows
    capsys.readouterr()
    assert run_main(gen_data.main, gen_data.Config, [*argv, "--seed", "1"]) == 2
    assert f"out: {tmp_path / 'rows.jsonl'} holds other rows" in capsys.readouterr().err
    assert (tmp_path / "rows.jsonl").read_bytes() == before


@pytest.mark.parametrize("option", ["--problems", "--rollouts"])
def test_no_source_is_replaced(fails, tmp_path, option):
    assert fails(option, str(tmp_path / "." / "rows.jsonl")).startswith("error: out: ")


def test_a_missing_rollout_file_is_named_before_anything_is_drawn(fails, monkeypatch):
    monkeypatch.setattr(gen_data, "problems", None)
    assert "nowhere" in fails("--rollouts", "nowhere")


def test_rejection_sampling(make, tmp_path):
    """Prompts of the SFT problems, "rollouts" to them, and then the rows of both kinds."""
    prompts = make("--arm", "prompts", "--count", "12", *TOY)
    lines = [{"group": i, "id": row["id"], "answer": row["answer"],
              "text": f"{k}\n</think>\n<answer>\\boxed{{{row['answer'] if k < i % 3 else 'x'}}}</answer>"}
             for i, row in enumerate(prompts) for k in range(2)]
    write_jsonl(tmp_path / "rollouts.jsonl", lines)
    given = ("--count", "12", *TOY, "--rollouts", str(tmp_path / "rollouts.jsonl"))
    half = [row["id"] for row in prompts][1::3]
    plain = make("--arm", "vanilla", "--count", "12", *TOY)
    assert make("--arm", "vanilla", *given) == [row for row in plain if row["id"] in half]
    assert [row["id"] for row in make("--arm", "own-answers", *given)] == half
    both = make("--arm", "own-answers", "--keep", "1-100", *given)
    assert Counter(row["id"] for row in both) == {row["id"]: i % 3 for i, row in enumerate(prompts) if i % 3}
    assert all(row["messages"][:2] == prompt["prompt"] for row, prompt in zip(both, prompts[1::3][:1]))


def test_own_problems(make):
    sft, rl = make("--problems", OWN, "--arm", "bridge"), make("--problems", OWN, "--split", "rl")
    assert [row["answer"] for row in sft] == [row["answer"] for row in rl] == ["61", "7.5", "19.65", "41"]
    assert [row.get("tolerance") for row in rl] == [None, 1e-4, 1e-4, None]
    assert question(sft[0]) == rl[0]["prompt"][1]["content"] and question(sft[0]).startswith("Mia has 14 stickers.\nLeo has")
    assert {row["behaviors"] for row in sft} == {"subgoal=1 analysis=2 reflection=0.1"}
    assert question(make("--problems", OWN, "--lines", "random", "--seed", "1")[0]) != question(sft[0])


# --- the command line ----------------------------------------------------------------------------------


def test_summary_on_the_console(tmp_path, capsys):
    out = tmp_path / "folder" / "rows.jsonl"
    argv = ["--split", "rl", "--count", "40", *TOY, "--out", str(out)]
    assert run_main(gen_data.main, gen_data.Config, argv) == 0
    rows, text = read_jsonl(out), capsys.readouterr().out
    assert rows[0]["prompt"][1]["content"] in text and text.endswith(f"{out}: 40 rows\n")
    answer, times = Counter(row["answer"] for row in rows).most_common(1)[0]
    zeros = sum(row["answer"] == "0" for row in rows)
    assert f"commonest answer: {answer}, {times / 40:.1%} of the rows; answer 0: {zeros / 40:.1%}\n" in text
    assert all(f"{ops}: {count}" in text for ops, count in Counter(row["num_ops"] for row in rows).items())


@pytest.mark.parametrize("argv, named", [
    (["--colour", "red"], "--colour"),
    (["--count", "0"], "count"),
    (["--count", "-3"], "count"),
    (["--count", "many"], "count"),
    (["--ops", "0"], "ops"),
    (["--ops", "0-5"], "ops"),
    (["--ops", "20-15"], "ops"),
    (["--ops", "few"], "ops"),
    (["--balance", "0"], "balance"),
    (["--balance", "1.5"], "balance"),
    (["--balance", "nan"], "balance"),
    (["--split", "train"], "split"),
    (["--arm", "gold"], "arm"),
    (["--scale", "huge"], "scale"),
    (["--task", "logic"], "task"),
    (["--task", "arithmetic", "--ops", "5"], "ops"),
    (["--task", "arithmetic", "--scale", "toy"], "scale"),
    (["--task", "arithmetic", "--depth", "1"], "depth"),
    (["--depth", "4"], "depth"),
    (["--redundant", "2"], "redundant"),
    (["--problems", OWN, "--ops", "5"], "ops"),
    (["--problems", OWN, "--depth", "5"], "depth"),
    (["--problems", OWN, "--balance", "0.5"], "balance"),
    (["--problems", OWN, "--count", "0"], "count"),
    (["--problems", "nowhere.jsonl"], "nowhere.jsonl"),
    (["--lines", "sorted"], "lines"),
    (["--rows", "0"], "rows"),
    (["--arm", "own-answers"], "--rollouts"),
    (["--arm", "vanilla", "--strict"], "strict"),
    (["--arm", "vanilla", "--reflection", "0.1"], "reflection"),
    (["--rollouts", "nowhere.jsonl", "--count", "2"], "nowhere.jsonl"),
    (["--arm", "bridge", "--analysis", "5"], "analysis"),
    (["--arm", "reflection", "--reflection", "1.1"], "reflection"),
])
def test_wrong_arguments_end_in_one_line(fails, argv, named):
    assert named in fails(*argv)


def test_out_is_required(capsys):
    assert run_main(gen_data.main, gen_data.Config, []) == 2
    assert "--out" in capsys.readouterr().err


def test_an_op_range_that_no_problem_has(fails, monkeypatch):
    monkeypatch.setattr(igsm, "MAX_DRAWS", 100)
    assert "60-60" in fails("--scale", "toy", "--ops", "60")


def test_the_toy_scale_is_that_of_the_base_model(make, tmp_path):
    """The rows of `reproduce toy`, whose words its base knows."""
    config = reproduce.Experiment(out=str(tmp_path / "run"), arms="bridge", sft_rows=8, rl_steps=1, rl_prompts=6, test_problems=2)
    reproduce.make_data(config)
    toy = ("--scale", "toy", "--balance", "0.05")
    assert make("--split", "rl", "--ops", "6", "--count", "6", *toy) == read_jsonl(tmp_path / "run" / "rl.jsonl")
    sft = make("--arm", "bridge", "--ops", "4-6", "--count", "8", *toy)
    assert sft == read_jsonl(tmp_path / "run" / "sft_bridge.jsonl")


def test_a_balance_that_cannot_be_had(fails, monkeypatch):
    """One operation, one digit: ten answers, once each. The script says so, and writes no short file."""
    monkeypatch.setattr(splits, "PATIENCE", 300)
    monkeypatch.setitem(gen_data.SCALES, "toy", FREE_TOY)
    line = fails("--count", "30", "--balance", "0.05", "--scale", "toy", "--ops", "1")
    assert "10 of 30" in line and "balance 0.05" in line


def test_the_plain_rows_of_an_augmented_arm_are_the_vanilla_ones_in_the_toys_size_too(make):
    toy = ("--scale", "toy", "--ops", "4", "--count", "2")
    assert make("--arm", "rc-aug", *toy)[::4] == make("--arm", "vanilla", *toy)


def test_balance_holds_for_arithmetic(make):
    rows = make("--task", "arithmetic-int", "--depth", "2", "--redundant", "0-0", "--count", "20", "--balance", "0.1")
    assert max(Counter(row["answer"] for row in rows).values()) <= 2


def test_by_default_problems_that_are_right_in_20_to_80_percent_are_kept(make, tmp_path):
    """The first problem has one right answer of ten, the ninth nine."""
    toy = ("--scale", "toy", "--ops", "4", "--count", "9", "--arm")
    prompts = make(*toy, "prompts")
    write_jsonl(tmp_path / "rollouts", [
        {"id": row["id"], "answer": row["answer"], "text": f"\\boxed{{{row['answer'] if k <= n else 'x'}}}"}
        for n, row in enumerate(prompts) for k in range(10)])
    kept = make(*toy, "vanilla", "--rollouts", str(tmp_path / "rollouts"))
    assert [row["id"] for row in kept] == [row["id"] for row in prompts][1:8]


def test_count_takes_the_first_of_ones_own_problems(make):
    own = "--problems", OWN, "--arm", "vanilla"
    assert make(*own, "--count", "2") == make(*own)[:2]


def test_own_answers_follow_the_questions_that_lines_asks_for(make, tmp_path):
    toy = ("--scale", "toy", "--ops", "4", "--count", "4", "--lines", "topological", "--arm")
    text = "1\n</think>\n<answer>\nIt is \\boxed{%s}.\n</answer>"
    prompts = make(*toy, "prompts")
    write_jsonl(tmp_path / "rollouts", [{"id": row["id"], "answer": row["answer"], "text": text % (row["answer"] if right else "x")}
                                        for row in prompts for right in (True, False)])
    own = make(*toy, "own-answers", "--rollouts", str(tmp_path / "rollouts"))
    assert [row["messages"][:2] for row in own] == [row["prompt"] for row in prompts]
