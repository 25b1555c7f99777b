"""A line of a file as a person reads it: the marks against the verifier, and lines that are not whole."""
import pytest

import gen_data
from minibridge import show
from minibridge.config import read_jsonl, run_main, write_jsonl
from minibridge.dag import Problem
from minibridge.verify import verify


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same problems in two arms."""
    folder, made = tmp_path_factory.mktemp("data"), {}
    for arm in ("vanilla", "bridge@0.9"):
        made[arm] = folder / f"{arm}.jsonl"
        words = f"--split sft --arm {arm} --count 6 --scale toy --ops 5 --out {made[arm]}".split()
        assert run_main(gen_data.main, gen_data.Config, words) == 0
    return made


@pytest.fixture
def shown(capsys):
    def shown(path, line=1):
        status = run_main(show.main, show.Config, ["--data", str(path), "--line", str(line)])
        output = capsys.readouterr()
        assert (status, bool(output.err)) in ((0, False), (2, True))
        return output.err or output.out

    return shown


@pytest.mark.parametrize("line", [1, 4])
def test_marks_are_those_of_the_verifier(files, shown, line):
    row = read_jsonl(files["bridge@0.9"])[line - 1]
    problem, text = Problem.from_dict(row["problem"]), row["messages"][-1]["content"].removeprefix("<think>\n")
    lines = shown(files["bridge@0.9"], line).splitlines()
    steps = verify(problem, text).steps
    assert any(step.kind == "failed attempt" for step in steps)
    for step in steps:
        printed = next(each for each in lines if each.endswith(text[step.start:step.end].strip().splitlines()[-1])
                       ) if step.kind != "box" else next(each for each in lines if "boxed" in each)
        assert printed.startswith(step.kind)
        for kind in {part.kind for part in step.parts}:
            assert f", {kind}" in printed or f" {kind}s" in printed
    assert not any("^" in each for each in lines) and "right: " in lines[-2] and lines[-2].endswith("format: good")


def test_the_question_and_the_graph_stand_first_and_once(files, shown):
    out = shown(",".join(map(str, files.values())), 2)
    row = read_jsonl(files["vanilla"])[1]
    problem = Problem.from_dict(row["problem"])
    assert out.count(row["messages"][1]["content"]) == 1 and out.count("=== ") == 2 and out.count("asked") == 1
    graph = [each for each in out.splitlines() if each.split("  =")[0].strip() in problem.nodes and "  = " in each]
    assert [each.split("  =")[0].strip() for each in graph] == [*problem.order, *problem.redundant]
    assert [each.split("=")[2].split()[0] for each in graph] == [str(problem.values[key]) for key in
                                                                (*problem.order, *problem.redundant)]
    other = shown(files["vanilla"], 3)
    assert row["messages"][1]["content"] not in other


def test_what_is_wrong_stands_below_its_line(files, shown, tmp_path):
    row = read_jsonl(files["vanilla"])[0]
    text = row["messages"][-1]["content"].removeprefix("<think>\n")
    number = row["answer"]
    write_jsonl(tmp_path / "wrong", [row | {"text": text.replace(f"boxed{{{number}}}", "boxed{-1}")}, row | {"text": ""},
                                     {"text": "plain", "answer": "1"}])
    lines = shown(tmp_path / "wrong", 1).splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("box"))
    assert lines[place + 1].strip() == f"^ wrong box: the answer is {number}"
    assert "unfinished" in shown(tmp_path / "wrong", 2)  # also where there is no line at all
    assert shown(tmp_path / "wrong", 3).split("\n")[2:] == ["plain", "", "no \\boxed{}; format: no </think>", "", ""]


def test_marks_stand_at_what_they_mark(shown, tmp_path):
    """Also where there is no closing sentence, or where the box comes early; and what a terminal obeys is not sent to it."""
    node = {"owner": "a", "item": "", "expr": ["+", 1, 2, 3], "stated": False}
    spare = {"owner": "b", "item": "", "expr": 5, "stated": True}
    problem = {"task": "own", "num_ops": 2, "nodes": [node, spare], "order": ["a"], "redundant": ["b"]}
    row = {"problem": problem, "answer": "6", "text": "- a = 1 + 2 + 3 = 3 + 3 = 6.\n</think>\n<answer>\n\\boxed{7}\n</answer>"}
    early = "- a = 1 + 2 + 3 = 6. So \\boxed{6}.\nThat gives 6.\n</think>\n\x1b[2K\rend"
    turns = [{"role": role, "content": said} for role, said in (("user", "q1"), ("assistant", "a1"), ("user", "q2"))]
    write_jsonl(tmp_path / "rows", [row, row | {"text": early}, {"prompt": turns, "answer": "6"}, row | {"answer": "7"}])
    first = shown(tmp_path / "rows", 1).splitlines()
    assert first[2:4] == ["a  = 1 + 2 + 3  = 6  asked, not stated", "b  = 5          = 5  not needed"]
    assert first[5].startswith("step, subgoal  - a") and first[8].startswith("box ") and "^ wrong box" in first[9]
    assert first[10].strip() == "</answer>"
    second = shown(tmp_path / "rows", 2)
    assert "\x1b" not in second and "\\x1b[2K\\rend" in second
    assert [line.split("  ")[0] for line in second.splitlines()[5:8]] == ["step, box", "", "closing"]
    assert "unreadable" in second.splitlines()[6]
    third = shown(tmp_path / "rows", 3)
    assert "q2" in third and "q1" not in third and "a1" not in third and "format" not in third
    assert shown(tmp_path / "rows", 4).endswith(":4: field 'answer' is '7', its problem's '6'\n")


def test_marks_take_linear_time(files, tmp_path, capsys):
    row = read_jsonl(files["vanilla"])[0]
    write_jsonl(tmp_path / "rows", [row | {"text": "- a = 1.\n" * 2000 + "\n" * 300_000}])
    assert run_main(show.main, show.Config, ["--data", str(tmp_path / "rows")]) == 0
    assert capsys.readouterr().out.count("^ ") > 2000


@pytest.mark.parametrize("line, message", [
    ('{"a": 1}', ":1: neither a question nor an answer"), ('{"messages": "x"}', ":1: no conversation"),
    ('{"messages": [{"role": "user"}]}', ":1: no conversation"), ('{"text": 3}', ":1: neither a question"),
    ('{"text": "x", "answer": 3}', ":1: field 'answer'"), ('{"text": "x", "problem": {}}', ":1: problem: field 'task'"),
    ('{"messages": [{"role": ["user"], "content": "x"}]}', ":1: no conversation"), ("{", ":1: not valid JSON")])
def test_broken_lines(shown, tmp_path, line, message):
    (tmp_path / "rows").write_text(line)
    assert f"rows{message}" in shown(tmp_path / "rows")


def test_lines_that_are_not_there(files, shown, tmp_path):
    assert shown(files["vanilla"], 7) == f"error: line: 7, but {files['vanilla']} has 6\n"
    assert "No such file" in shown(tmp_path / "gone")
