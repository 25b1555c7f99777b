"""The problems of a split: different, disjoint by structure, balanced, and the same for any number of processes."""

import itertools
import json
import random
from collections import Counter
from types import SimpleNamespace

import pytest

from conftest import FREE_TOY
from minibridge import arms, igsm, splits
from minibridge.config import InputError, run_main, write_jsonl
from minibridge.dag import Node, Problem


# --- what a split holds ---------------------------------------------------------------------------------


def test_no_structure_stands_in_two_splits():
    drawn = {split: [problem.structure for problem in splits.problems(split, 120, (1, 1), FREE_TOY, seed=0)]
             for split in splits.SPLITS}
    different = [structure for structures in drawn.values() for structure in set(structures)]
    assert len(different) < 5 * 120  # problems so small that structures do repeat
    assert len(set(different)) == len(different)
    tenths = [tenth for _, _, tenths in splits.SPLITS.values() for tenth in tenths]
    assert sorted(tenths) == list(range(10))


def test_problems_of_a_split_differ(monkeypatch):
    few = [igsm.draw(random.Random(seed), (2, 5), FREE_TOY) for seed in range(30)]
    monkeypatch.setattr(igsm, "draw", lambda rng, ops, scale: rng.choice(few))
    monkeypatch.setattr(splits, "PATIENCE", 1000)
    mine = {problem.id for problem in few if int(problem.structure, 16) % 10 in splits.SPLITS["base"][2]}
    ids = [problem.id for problem in splits.problems("base", len(mine), (2, 5), FREE_TOY, 0)]
    assert len(ids) == len(mine) and set(ids) == mine
    with pytest.raises(InputError, match=f"{len(mine)} of {len(mine) + 1} "):
        splits.problems("base", len(mine) + 1, (2, 5), FREE_TOY, 0)


@pytest.mark.parametrize("task", ["arithmetic", "arithmetic-int"])
def test_no_arithmetic_structure_stands_in_two_splits(task):
    """Nor what is needed of one, whatever redundant premises stand beside it."""
    cores, structures = ([{getattr(problem, name) for problem in
                           splits.arithmetic_problems(split, 50, task, 2, (0, 1), seed=0)} for split in splits.SPLITS]
                         for name in ("core", "structure"))
    for sets in (cores, structures):
        assert len(set.union(*sets)) == sum(map(len, sets))
    assert sum(map(len, cores)) < 5 * 50  # problems so small that they do repeat


@pytest.mark.parametrize("balance, most", [(1.0, 50), (0.1, 5), (0.05, 2)])
def test_balance_bounds_the_commonest_answer(balance, most):
    def commonest(balance):
        drawn = splits.problems("sft", 50, (2, 5), FREE_TOY, 0, balance)
        assert len(drawn) == 50
        return Counter(problem.answer for problem in drawn).most_common(1)[0][1]

    assert commonest(balance) <= most
    assert balance == 1.0 or commonest(1.0) > most  # else the bound would have had nothing to do


def test_patience_counts_from_the_last_new_problem(monkeypatch):
    monkeypatch.setattr(splits, "PATIENCE", 100)
    assert len(splits.problems("test", 30, (2, 5), FREE_TOY, 0)) == 30  # of about 300 candidates


def test_a_hopeless_balance_is_refused_soon(monkeypatch):
    """Each answer may stand twice: now and then a new one comes up, and the patience of any one of them never ends."""
    drawn, draw = [], igsm.draw
    monkeypatch.setattr(igsm, "draw", lambda *args, **sizes: drawn.append(0) or draw(*args, **sizes))
    with pytest.raises(InputError, match=r"of 2000 problems for split .* balance 0\.001"):
        splits.problems("sft", 2000, (1, 3), FREE_TOY, 0, balance=.001)
    assert len(drawn) < splits.PATIENCE / 2


def test_balance_lets_every_answer_stand_once():
    drawn = splits.problems("sft", 10, (2, 5), FREE_TOY, 0, balance=.001)
    assert len({problem.answer for problem in drawn}) == 10


def test_balance_allows_the_whole_share(monkeypatch):
    """Though 0.29 * 100 is 28.999999999999996."""
    monkeypatch.setattr(splits, "PATIENCE", 500)
    monkeypatch.setattr(splits, "_of_split", lambda *_: ((n, SimpleNamespace(id=n, answer=1)) for n in itertools.count()))
    with pytest.raises(InputError, match="with 29 of 100 problems"):
        splits.problems("test", 100, (2, 5), FREE_TOY, 0, balance=0.29)


def test_balance_passes_over_rows_and_changes_none():
    free = [problem.id for problem in splits.problems("sft", 60, (2, 5), FREE_TOY, 0)]
    bounded = [problem.id for problem in splits.problems("sft", 20, (2, 5), FREE_TOY, 0, balance=.1)]
    places = [free.index(key) for key in bounded]
    assert places == sorted(places) and places[-1] >= 20


# --- processes -----------------------------------------------------------------------------------------


def test_any_number_of_processes_draws_the_same(monkeypatch):
    monkeypatch.setattr(splits, "BLOCK", 20)
    for balance in (1.0, .1):
        alone = splits.problems("val", 30, (2, 5), FREE_TOY, 3, balance)
        assert alone == splits.problems("val", 30, (2, 5), FREE_TOY, 3, balance, workers=2)
    assert (splits.arithmetic_problems("rl", 8, "arithmetic-int", 3, (0, 2), 0)
            == splits.arithmetic_problems("rl", 8, "arithmetic-int", 3, (0, 2), 0, workers=3))


def test_an_error_in_a_process_arrives():
    with pytest.raises(InputError, match="no problem of 50-50 operations"):
        splits.problems("sft", 5, (50, 50), FREE_TOY, 0, workers=2)


# --- the report ----------------------------------------------------------------------------------------


def report(capsys, *paths):
    status = run_main(splits.main, splits.Config, ["--files", ",".join(map(str, paths))])
    return status, capsys.readouterr()


def test_report_of_shares_and_of_shared_structures(tmp_path, capsys):
    """A second file with two of the first's four problems, one of them under other names."""
    problems = splits.problems("sft", 4, (2, 5), FREE_TOY, 0)
    other = splits.problems("rl", 6, (2, 5), FREE_TOY, 0)
    lines = [arms.record(problem, 0) for problem in problems]
    renamed = json.dumps(problems[1].to_dict())
    for name in {name for node in problems[1].nodes.values() for name in (node.owner, node.item)}:
        renamed = renamed.replace(name, name + "x")
    write_jsonl(tmp_path / "a", lines)
    others = [arms.record(problem, 0) for problem in other]
    write_jsonl(tmp_path / "b", [lines[0], {"problem": json.loads(renamed)}, *others])
    write_jsonl(tmp_path / "c", others * 2)
    status, output = report(capsys, tmp_path / "a", tmp_path / "b", tmp_path / "c")
    assert status == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in output.out.split("\n") if line.startswith("|")]
    answers = [str(problem.answer) for problem in other]
    common, times = Counter(answers).most_common(1)[0]
    assert rows[4] == [str(tmp_path / "c"), "12", "6", f"{answers.count('0') / 6:.1%}", f"{common}, {times / 6:.1%}"]
    assert [line.rsplit(" ", 1)[1] for line in output.out.split("\n") if line.startswith("structures")] == ["2", "0", "6"]


@pytest.mark.parametrize("files, message", [("{a},", "'' is no name"), ("{a},{a}", "given twice"), ("{a},{a}\nb", "a\\nb")])
def test_report_of_wrong_files(tmp_path, capsys, files, message):
    """One line, and nothing of a table that will not be finished."""
    write_jsonl(tmp_path / "a", [arms.record(splits.problems("sft", 1, (2, 5), FREE_TOY, 0)[0], 0)])
    status, output = report(capsys, files.format(a=tmp_path / "a"))
    assert status == 2 and message in output.err and output.err.count("\n") == 1 and output.out == ""


@pytest.mark.parametrize("line, message", [("{}", "x:1: problem: "), ("", "no lines"), ("[]", "x:1: "),
                                           ('{"problem": {"nodes": 3}}', "x:1: problem: ")])
def test_report_of_a_bad_file(tmp_path, capsys, line, message):
    (tmp_path / "x").write_text(line and line + "\n")
    status, output = report(capsys, tmp_path / "x")
    assert status == 2 and message in output.err and output.err.count("\n") == 1


def test_arithmetic_problems_depend_on_the_seed():
    one, other = ({p.id for p in splits.arithmetic_problems("sft", 10, "arithmetic-int", 3, (0, 2), seed)} for seed in (0, 1))
    assert not one & other


def test_the_report_takes_arithmetic_that_differs_in_redundant_premises_alone_for_one(tmp_path, capsys):
    (plain,) = splits.arithmetic_problems("sft", 1, "arithmetic-int", 2, (0, 0), 0)
    more = Problem(plain.task, {**plain.nodes, "zzz": Node("zzz", "", 3)}, plain.order, ("zzz",), plain.num_ops)
    for name, problem in (("a", plain), ("b", more)):
        write_jsonl(tmp_path / name, [arms.record(problem, 0)])
    assert run_main(splits.main, splits.Config, ["--files", f"{tmp_path}/a,{tmp_path}/b"]) == 0
    assert capsys.readouterr().out.endswith(": 1\n")
