"""Figures: the numbers they are drawn from, and that each is drawn; how they look is for the eye."""

import sys

import pytest

from minibridge import drawing, plots, tables
from minibridge.config import run_main, write_jsonl

pytestmark = pytest.mark.plot
METRICS = [{"step": 0, "val_accuracy": 0.5},
           *({"step": step, "accuracy": step / 8, "dead_groups": 0.5, "entropy": 0.1 * step, "length": 20.0}
             for step in (1, 2, 3))]


def run(*argv) -> int:
    return run_main(plots.main, plots.Config, [str(word) for word in argv])


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
    for name, seeds in (("whole", (0,)), ("seeds", (0, 1))):
        (tmp_path / name).mkdir()
        tables.write(tmp_path / name / "curves.csv", [
            {"seed": seed, "arm": arm, **line, "accuracy": line["accuracy"] + seed / 4}
            for seed in seeds for arm in ("vanilla", "bridge") for line in METRICS[1:]])
        tables.write(tmp_path / name / "results.csv", [
            {"seed": seed, "arm": arm, "test": "id", "decoding": "greedy", "stage": stage, "problems": 4, "accuracy": share,
             "low": share - 0.1, "high": share + 0.2}
            for seed in seeds for arm, stage, share in (("vanilla", "sft", 0.25), ("vanilla", "rl", 0.5 + seed / 4),
                                                        ("bridge", "sft", 0.25), ("bridge", "rl", 0.75))])
        tables.write(tmp_path / name / "gains.csv", [
            {"arm": arm, "test": test, "decoding": "greedy", "gain": gain, "gain +-": 0.02, "more": more, "more +-": more}
            for test in ("id", "ood") for arm, gain, more in (("vanilla", 0.01, None), ("bridge", 0.04, 0.03))])
    return tmp_path


def test_numbers_of_every_figure(folders, capsys):
    pytest.importorskip("matplotlib")
    runs = ",".join(f"{name}{folders / folder}" for name, folder in (
        ("bridge=", "b"), ("vanilla=", "a"), ("", "rl"), ("", "whole"), ("more=", "seeds")))
    assert run("--runs", runs, "--out", folders / "out") == 0
    printed, names = capsys.readouterr().out, list(plots.FIGURES)
    assert len(names) == 6
    assert all(f"{name}.png" in printed for name in names)
    assert sorted(path.name for path in (folders / "out").iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("csv", "png"))
    found = {name: tables.read(folders / "out" / f"{name}.csv") for name in names}
    assert [(row["arm"], row["step"], row["accuracy"]) for row in found["training"]] == [
        (arm, f"{step}.0", str(step / 8 + more)) for arm, more in (
            ("rl", 0), ("vanilla", 0), ("bridge", 0), ("more: vanilla", 1 / 8), ("more: bridge", 1 / 8))
        for step in (1, 2, 3)]
    assert [row["arm"] for row in found["influence"]] == ["bridge"] * 8 + ["vanilla"] * 8
    assert [row["influence"] for row in found["influence"]] == ["0.1"] * 8 + ["0.05"] * 8
    shares = {(row["arm"], row["stage"]): tuple(float(row[name]) for name in ("accuracy", "low", "high"))
              for row in found["accuracy"]}
    assert {key: share[0] for key, share in shares.items()} == {
        ("vanilla", "sft"): 0.25, ("bridge", "sft"): 0.25, ("vanilla", "rl"): 0.5, ("bridge", "rl"): 0.75,
        ("more: vanilla", "sft"): 0.25, ("more: bridge", "sft"): 0.25, ("more: vanilla", "rl"): 0.625,
        ("more: bridge", "rl"): 0.75}
    assert shares["vanilla", "rl"] == pytest.approx((0.5, 0.4, 0.7))
    assert shares["more: vanilla", "rl"] == (0.625, 0, 1) and shares["more: bridge", "rl"] == (0.75, 0.75, 0.75)
    for row in found["accuracy"]:
        assert row["test"] == "id, greedy"
    assert [(row["arm"], row["test"], row["gain"], row["more"]) for row in found["gains"][:4]] == [
        (arm, f"{test}, greedy", gain, more) for arm, gain, more in (("vanilla", "0.01", ""), ("bridge", "0.04", "0.03"))
        for test in ("id", "ood")]
    for name in names:
        assert (folders / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"


def test_validation_is_drawn_where_there_is_some(folders):
    """Joined over the steps without one, no mean with those before; a panel only if any run has it."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    steps = [METRICS[1] | {"step": step} for step in range(1, 12)]
    write_jsonl(folders / "validated" / "metrics.jsonl", [
        line | ({"val_accuracy": line["step"] / 40} if line["step"] % 5 == 1 else {}) for line in steps])
    for names, panels in ((["rl"], 4), (["rl", "validated"], 5)):
        table, figure = plots.training([(None, folders / name) for name in names]), Figure()
        drawing.training(figure, table, [drawing.Arm(name, n) for n, name in enumerate(names)])
        assert len(figure.axes) == panels
    bold = figure.axes[-1].lines[-1]
    assert figure.axes[-1].get_title() == "greedy accuracy on --val"
    assert ([*bold.get_xdata()], [*bold.get_ydata()]) == ([1, 6, 11], [1 / 40, 6 / 40, 11 / 40])


def test_an_arm_looks_the_same_in_every_figure_and_no_two_alike(folders, monkeypatch):
    pytest.importorskip("matplotlib")
    seen = {}
    for name, (read, _, size) in plots.FIGURES.items():
        monkeypatch.setitem(plots.FIGURES, name, (read, lambda figure, table, arms, name=name: (
            figure.subplots(), seen.update({(name, arm.name): arm.number for arm in arms})), size))
    plots.draw([("vanilla", folders / "a"), ("bridge", folders / "b"), (None, folders / "whole")], folders / "out")
    assert {arm: {number for (_, name), number in seen.items() if name == arm} for arm in ("bridge", "vanilla")} == {
        "bridge": {1}, "vanilla": {0}}
    assert len(seen) == 12
    looks = [(arm.bar["color"], arm.bar["hatch"], arm.point["marker"]) for arm in map(drawing.Arm, "abcdefgh", range(8))]
    for column in zip(*looks):
        assert len(set(column)) == 8
    many = [drawing.Arm("x", place) for place in range(24)]
    assert len({(arm.bar["color"], arm.bar["hatch"]) for arm in many}) == 24
    assert (drawing.Arm("$x_", 0).label, drawing.Arm("_x", 0).label) == (r"\$x_", " _x")


def test_bins_of_alpha_are_those_of_the_tables():
    assert [drawing.bin_of(n / 10) for n in range(11)] == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]
    for samples in (5, 7, 16, 32):
        assert [drawing.bin_of(n / samples) for n in range(1, samples)] == [1 + 5 * n // samples for n in range(1, samples)]


def test_what_is_drawn(folders, monkeypatch):
    """A bin of one prompt has no interval; shares of a bin add up; bars stand at their arm."""
    Figure = pytest.importorskip("matplotlib.figure").Figure
    arms = [drawing.Arm("bridge", 0), drawing.Arm("vanilla", 1)]
    runs = [("bridge", folders / "b"), ("vanilla", folders / "a")]
    figure = Figure()
    drawing.influence(figure, plots.FIGURES["influence"][0](runs), arms)
    contrast, influence = ([container for container in axes.containers] for axes in figure.axes)
    assert [sum(y == y for y in container.lines[0].get_ydata()) for container in contrast] == [5, 5]  # NaN breaks the line
    assert [sum(y == y for y in container.lines[0].get_ydata()) for container in influence] == [7, 7]
    figure = Figure()
    drawing.rollout_accuracy(figure, plots.FIGURES["rollout_accuracy"][0](runs), arms)
    heights = [[patch.get_height() for patch in container] for container in figure.axes[0].containers]
    assert heights[0] == pytest.approx([0, 1 / 55, 5 / 55, 9 / 55, 13 / 55, 17 / 55, 10 / 55])
    figure = Figure()
    drawing.accuracy(figure, plots.accuracy([(None, folders / "whole")]), arms[::-1])
    stages = {container.get_label(): container for container in figure.axes[0].containers}
    before, after = (stages[name].patches for name in ("after SFT", "after RL"))
    assert [patch.get_height() for patch in before] == [0.25, 0.25]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["vanilla", "bridge"]
    assert {round(patch.get_x() + patch.get_width() / 2): patch.get_height() for patch in after} == {0: 0.5, 1: 0.75}
    figure = Figure()
    drawing.gains(figure, plots.gains([(None, folders / "whole")]), [drawing.Arm("vanilla", 0), drawing.Arm("bridge", 1)])
    gain, more = ([(bars.get_label(), [*map(float, bars.lines[0].get_xdata())], [*map(float, bars.lines[0].get_ydata())])
                   for bars in axes.containers] for axes in figure.axes)
    assert gain == [("vanilla", [1, 1], [-0.06, 0.94]), ("bridge", [4, 4], [0.06, 1.06])]
    assert more == [("bridge", [3, 3], [0.06, 1.06])]  # where it is in the other half
    assert "more than vanilla" in figure.axes[1].get_title()
    reaches = [[bars.lines[2][0].get_segments()[0][:, 0].tolist() for bars in axes.containers] for axes in figure.axes]
    assert reaches == [[pytest.approx([-1, 3]), pytest.approx([2, 6])], [pytest.approx([0, 6])]]
    figure = Figure()
    plots.FIGURES["gains"][1](figure, [row for row in plots.gains([(None, folders / "whole")]) if row["arm"] == "vanilla"],
                              [drawing.Arm("vanilla", 0)])
    assert len(figure.axes) == 1  # with nothing to compare
    figure, table = Figure(), plots.gains([(None, folders / "whole")])
    drawing.gains(figure, [row for row in table if row["test"] == table[0]["test"]],
                  [drawing.Arm("vanilla", 0), drawing.Arm("bridge", 1)])
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["vanilla", "bridge"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first arm on top
    assert [[*map(float, bars.lines[0].get_ydata())] for bars in axes.containers] == [[0], [1]]
    assert not axes.get_legend_handles_labels()[1] and table[0]["test"] in figure.get_supxlabel()


@pytest.mark.parametrize("argv, message", [
    ("--runs {folder}/no --out {folder}/out", "runs: {folder}/no: no such folder"),
    ("--runs x={folder}/no --out {folder}/out", "runs: {folder}/no: no such folder"),
    ("--runs {folder}/a, --out {folder}/out", "runs: nothing: no such folder"),
    ("--runs {folder}/empty --out {folder}/out", "runs: no numbers for a figure in {folder}/empty"),
    ("--runs {folder}/a --out {folder}/a/../a", "out: {folder}/a/../a is one of --runs; its own tables would be replaced"),
    ("--runs {folder}/a --out {folder}/mine", "out: {folder}/mine is a run folder; its own tables would be replaced"),
    ("--runs {folder}/a --out {folder}/other", "{folder}/other/fluency.csv: has other columns than this figure's, and would be replaced; "
     "choose another --out"),
    ("--runs x={folder}/a,x={folder}/b --out {folder}/out",
     "runs: two folders have a table 'rollout_accuracy' for 'x'; give NAME= before them"),
    ("--runs {folder}/whole,{folder}/seeds --out {folder}/out",
     "runs: two folders have a table 'training' for 'vanilla'; give NAME= before them"),
])
def test_wrong_input_is_one_line(folders, capsys, argv, message):
    pytest.importorskip("matplotlib")
    (folders / "empty").mkdir()
    (folders / "mine").mkdir()
    (folders / "mine" / "run.json").write_text("{}")
    (folders / "other").mkdir()
    (folders / "other" / "fluency.csv").write_text("text,my own\nx,1\n")
    assert run(*argv.format(folder=folders).split()) == 2
    assert capsys.readouterr().err == f"error: {message.format(folder=folders)}\n"
    assert (folders / "other" / "fluency.csv").read_text() == "text,my own\nx,1\n"


@pytest.mark.parametrize("file, text, message", [
    ("a/influence.csv", "alpha,influence\n0,1\n", "row 1: no field 'K+ - K-'"),
    ("a/influence.csv", "alpha,influence\n0,1,2\n", "row 1 has not as many cells as there are columns"),
    ("a/fluency.csv", "text,entropy,perplexity\nown,1\n", "row 1 has not as many cells as there are columns"),
    ("a/fluency.csv", "text,entropy,perplexity\n", "no rows"),
    ("a/rollout_accuracy.csv", "alpha,share\n0,inf\n", "row 1: field 'share' must be a number, not 'inf'"),
    ("a/rollout_accuracy.csv", "alpha,share\n0,1\n1,x\n", "row 2: field 'share' must be a number, not 'x'"),
    ("rl/metrics.jsonl", '{"step": 1, "accuracy": 1}\n', "row 1: no field 'dead_groups'"),
    ("whole/results.csv", "arm,seed\nx,1\n", "row 1: no field 'test'"),
    ("whole/results.csv", "arm,seed,test,decoding,stage,accuracy,low,high\nx,1,a,b,sft,0.5,,1\n", "row 1: field 'low' is nan"),
    ("whole/results.csv", "arm,seed,test,decoding,stage,accuracy,low,high\nx,1,a,b,sft,5,0,1\n", "row 1: field 'accuracy' is 5"),
    ("whole/gains.csv", "arm,test,decoding,gain,gain +-,more,more +-\nx,a,b,1,-1,,\n", "row 1: field 'gain +-' is -1"),
])
def test_damaged_tables_are_named(folders, capsys, file, text, message):
    pytest.importorskip("matplotlib")
    (folders / file).write_text(text)
    assert run("--runs", (folders / file).parent, "--out", folders / "out") == 2
    assert capsys.readouterr().err.startswith(f"error: {folders / file}") and not (folders / "out").exists()


def test_a_run_that_was_killed_or_lost_a_number_is_drawn(folders):
    pytest.importorskip("matplotlib")
    path = folders / "rl" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"entropy": 0.1,', '"entropy": null,') + '{"step": 4, "acc')
    assert run("--runs", folders / "rl", "--out", folders / "out") == 0
    assert [row["entropy"] for row in tables.read(folders / "out" / "training.csv")] == ["", "0.2", "0.30000000000000004"]


def test_without_matplotlib_one_line_says_so(folders, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("--runs", folders / "a", "--out", folders / "out") == 2
    assert capsys.readouterr().err == f"error: {plots.MISSING}\n" and not (folders / "out").exists()
