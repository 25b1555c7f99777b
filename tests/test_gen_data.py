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
from minibridge import igsm, traces
from minibridge.answer import OPENING, SYSTEM, extract
from minibridge.config import InputError, read_jsonl, run_main
from minibridge.dag import Problem

TOY = ("--scale", "toy", "--ops", "2-5")


@pytest.fixture
def make(tmp_path, capsys):
    """Runs the script and returns the rows it wrote."""
    def make(*argv, out="rows.jsonl"):
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
    sft, rl = gen_data.record(problem, 3, traces.BRIDGE), gen_data.record(problem, 3)
    assert rl["prompt"] == sft["messages"][:2]
    assert rl.keys() - {"prompt"} == sft.keys() - {"messages", "behaviors"}
    assert all(rl[key] == sft[key] for key in rl if key != "prompt")
    assert gen_data.record(problem, 4)["prompt"] != rl["prompt"]


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


def test_no_structure_stands_in_two_splits():
    drawn = {split: [problem.structure for problem in gen_data.problems(split, 120, (1, 1), igsm.TOY, seed=0)]
             for split in gen_data.SPLITS}
    different = [structure for structures in drawn.values() for structure in set(structures)]
    assert len(different) < 5 * 120  # problems so small that structures do repeat
    assert len(set(different)) == len(different)
    tenths = [tenth for _, _, tenths in gen_data.SPLITS.values() for tenth in tenths]
    assert sorted(tenths) == list(range(10))


def test_problems_of_a_split_differ(monkeypatch):
    few = [igsm.draw(random.Random(seed), (2, 5), igsm.TOY) for seed in range(30)]
    monkeypatch.setattr(igsm, "draw", lambda rng, ops, scale: rng.choice(few))
    monkeypatch.setattr(gen_data, "PATIENCE", 1000)
    mine = {problem.id for problem in few if int(problem.structure, 16) % 10 in gen_data.SPLITS["base"][2]}
    ids = [problem.id for problem in gen_data.problems("base", len(mine), (2, 5), igsm.TOY, 0)]
    assert len(ids) == len(mine) and set(ids) == mine
    with pytest.raises(InputError, match=f"{len(mine)} of {len(mine) + 1} "):
        gen_data.problems("base", len(mine) + 1, (2, 5), igsm.TOY, 0)


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


# --- balance -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance, most", [(1.0, 50), (0.1, 5), (0.05, 2)])
def test_balance_bounds_the_commonest_answer(balance, most):
    def commonest(balance):
        drawn = gen_data.problems("sft", 50, (2, 5), igsm.TOY, 0, balance)
        assert len(drawn) == 50
        return Counter(problem.answer for problem in drawn).most_common(1)[0][1]

    assert commonest(balance) <= most
    assert balance == 1.0 or commonest(1.0) > most  # else the bound would have had nothing to do


def test_patience_counts_from_the_last_new_problem(monkeypatch):
    monkeypatch.setattr(gen_data, "PATIENCE", 40)
    assert len(gen_data.problems("test", 30, (2, 5), igsm.TOY, 0)) == 30  # of about 300 candidates


def test_balance_lets_every_answer_stand_once():
    drawn = gen_data.problems("sft", 10, (2, 5), igsm.TOY, 0, balance=.001)
    assert len({problem.answer for problem in drawn}) == 10


def test_balance_passes_over_rows_and_changes_none():
    free = [problem.id for problem in gen_data.problems("sft", 60, (2, 5), igsm.TOY, 0)]
    bounded = [problem.id for problem in gen_data.problems("sft", 20, (2, 5), igsm.TOY, 0, balance=.1)]
    places = [free.index(key) for key in bounded]
    assert places == sorted(places) and places[-1] >= 20


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


def test_a_balance_that_cannot_be_had(fails, monkeypatch):
    """One operation, one digit: ten answers, once each. The script says so, and writes no short file."""
    monkeypatch.setattr(gen_data, "PATIENCE", 300)
    line = fails("--count", "30", "--balance", "0.05", "--scale", "toy", "--ops", "1")
    assert "10 of 30" in line and "balance 0.05" in line
