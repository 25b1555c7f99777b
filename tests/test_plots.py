"""Figures: the numbers they are drawn from, and that each is drawn; how they look is for the eye."""

import pytest

from minibridge import plots, tables
from minibridge.config import run_main, write_jsonl

METRICS = [{"step": 0, "val_accuracy": 0.5},
           *({"step": step, "accuracy": step / 8, "dead_groups": 0.5, "entropy": 0.1 * step, "length": 20.0}
             for step in (1, 2, 3))]


def run(*argv) -> int:
    return run_main(plots.main, plots.Config, [str(word) for word in argv])


def answers(path, right: int, count: int = 4):
    write_jsonl(path, [{"group": n, "answer": "6", "text": f"\\boxed{{{6 if n < right else 7}}}"} for n in range(count)])


@pytest.fixture
def folders(tmp_path):
    """One of influence, one of RL, one of reproduce with two arms."""
    for name, scale in (("a", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        tables.write(tmp_path / name / "rollout_accuracy.csv", [
            {"alpha": n / 10, "prompts": n, "share": n / 55} for n in range(11)])
        tables.write(tmp_path / name / "influence.csv", [
            {"alpha": alpha, "K+ - K-": None if alpha in "01" else 0.1, "K+ - K- +-": None if alpha in "01" else 0.02,
             "influence": 0.05 * scale, "influence +-": None if alpha == "0.4-0.6" else 0.01}
            for alpha in (*tables.BINS, "all")])
        tables.write(tmp_path / name / "fluency.csv", [
            {"text": text, "entropy": 0.1 * scale, "perplexity": 1.1} for text in ("own answers", "reference answers")])
    write_jsonl(tmp_path / "rl" / "metrics.jsonl", METRICS)
    whole = tmp_path / "whole"
    for arm in ("vanilla", "bridge"):
        write_jsonl(whole / f"rl_{arm}" / "metrics.jsonl", METRICS[1:])
        answers(whole / f"sft_{arm}_id_greedy.jsonl", 1)
        answers(whole / f"rl_{arm}_id_greedy.jsonl", 3 if arm == "bridge" else 2)
        write_jsonl(whole / f"sft_{arm}.jsonl", [{"messages": []}])  # data, no answers
    write_jsonl(whole / "test_id.jsonl", [{"prompt": []}])
    return tmp_path


def test_numbers_of_every_figure(folders, capsys):
    pytest.importorskip("matplotlib")
    runs = ",".join(f"{name}{folders / folder}" for name, folder in (
        ("bridge=", "b"), ("vanilla=", "a"), ("", "rl"), ("", "whole")))
    assert run("--runs", runs, "--out", folders / "out") == 0
    printed, names = capsys.readouterr().out, ["training", "rollout_accuracy", "influence", "ablation", "fluency"]
    assert all(f"{name}.png" in printed for name in names)
    assert sorted(path.name for path in (folders / "out").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("csv", "png"))
    found = {name: tables.read(folders / "out" / f"{name}.csv") for name in names}
    assert [(row["arm"], row["step"], row["accuracy"]) for row in found["training"]] == [
        (arm, str(step), str(step / 8)) for arm in ("rl", "bridge", "vanilla") for step in (1, 2, 3)]
    assert [row["arm"] for row in found["influence"]] == ["bridge"] * 8 + ["vanilla"] * 8
    assert [row["influence"] for row in found["influence"]] == ["0.1"] * 8 + ["0.05"] * 8
    assert {(row["arm"], row["stage"]): (row["accuracy"], row["problems"]) for row in found["ablation"]} == {
        ("vanilla", "sft"): ("0.25", "4"), ("bridge", "sft"): ("0.25", "4"), ("vanilla", "rl"): ("0.5", "4"),
        ("bridge", "rl"): ("0.75", "4")}
    for row in found["ablation"]:
        assert row["test"] == "id, greedy" and float(row["low"]) < float(row["accuracy"]) < float(row["high"])
    for name in names:
        assert (folders / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_an_arm_looks_the_same_in_every_figure_and_no_two_alike(folders, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = {}
    for name, (read, _, size) in plots.FIGURES.items():
        monkeypatch.setitem(plots.FIGURES, name, (read, lambda figure, table, arms, name=name: (
            figure.subplots(), seen.update({(name, arm.name): arm.number for arm in arms})), size))
    plots.draw([("vanilla", folders / "a"), ("bridge", folders / "b"), ("whole", folders / "whole")], folders / "out")
    assert {arm: {number for (_, name), number in seen.items() if name == arm} for arm in ("bridge", "vanilla")} == {
        "bridge": {1}, "vanilla": {0}}
    assert len(seen) == 10
    looks = [(arm.bar["color"], arm.bar["hatch"], arm.point["marker"]) for arm in map(plots.Arm, "abcdefgh", range(8))]
    for column in zip(*looks):
        assert len(set(column)) == 8


def test_bins_of_alpha_are_those_of_the_tables():
    assert [plots.bin_of(n / 10) for n in range(11)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for samples in (5, 7, 16, 32):
        assert [plots.bin_of(n / samples) for n in range(1, samples)] == [1 + 5 * n // samples for n in range(1, samples)]


def test_what_is_drawn(folders, monkeypatch):
    """A bin without interval is left out; shares of a bin add up; bars stand at their arm."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    arms = [plots.Arm("bridge", 0), plots.Arm("vanilla", 1)]
    runs = [("bridge", folders / "b"), ("vanilla", folders / "a")]
    figure = Figure()
    plots.draw_influence(figure, plots.collected("influence.csv")(runs), arms)
    contrast, influence = ([container for container in axes.containers] for axes in figure.axes)
    assert [len(container.lines[0].get_xdata()) for container in contrast] == [5, 5]
    assert [len(container.lines[0].get_xdata()) for container in influence] == [6, 6]
    figure = Figure()
    plots.draw_rollout_accuracy(figure, plots.collected("rollout_accuracy.csv")(runs), arms)
    heights = [[patch.get_height() for patch in container] for container in figure.axes[0].containers]
    assert heights[0] == pytest.approx([0, 1 / 55, 5 / 55, 9 / 55, 13 / 55, 17 / 55, 10 / 55])
    figure = Figure()
    plots.draw_ablation(figure, plots.ablation([("whole", folders / "whole")]), arms[::-1])
    stages = {container.get_label(): container for container in figure.axes[0].containers}
    before, after = (stages[name].patches for name in ("after SFT", "after RL"))
    assert [patch.get_height() for patch in before] == [0.25, 0.25]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["vanilla", "bridge"]
    assert {round(patch.get_x() + patch.get_width() / 2): patch.get_height() for patch in after} == {0: 0.5, 1: 0.75}


@pytest.mark.parametrize("argv, message", [
    ("--runs {folder}/no --out {folder}/out", "runs: {folder}/no: no such folder"),
    ("--runs x={folder}/no --out {folder}/out", "runs: {folder}/no: no such folder"),
    ("--runs {folder}/empty --out {folder}/out", "runs: no numbers for a figure in {folder}/empty"),
])
def test_wrong_input_is_one_line(folders, capsys, argv, message):
    pytest.importorskip("matplotlib")
    (folders / "empty").mkdir()
    assert run(*argv.format(folder=folders).split()) == 2
    assert capsys.readouterr().err == f"error: {message.format(folder=folders)}\n"


def test_without_matplotlib_one_line_says_so(folders, capsys, monkeypatch):
    monkeypatch.setattr(plots.importlib.util, "find_spec", lambda name: None)
    assert run("--runs", folders / "a", "--out", folders / "out") == 2
    assert capsys.readouterr().err == f"error: {plots.MISSING}\n" and not (folders / "out").exists()
