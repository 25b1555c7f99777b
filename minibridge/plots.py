"""Figures from run folders, each with the numbers behind it as CSV beside it.

    python -m minibridge.plots --runs vanilla=runs/influence_vanilla,bridge=runs/influence_bridge,runs/toy --out figures

A folder gives what it has, and folders of one name (by default their own) share a colour:

    of minibridge.influence    rollout_accuracy, influence, fluency
    of train_rl.py             training (metrics.jsonl)
    of minibridge.reproduce    training, of its folders rl_ARM; and accuracy before and after RL, from answers saved by
                               minibridge.evaluate under names such as sft_ARM_TEST_DECODING.jsonl and rl_ARM_...

matplotlib draws them: pip install -e ".[plot]". Colours are those of Okabe and Ito, who chose them for colour-blind readers;
every arm also has a line style, a marker and a hatching of its own, for print.
"""
import importlib.util
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from minibridge import tables
from minibridge.config import REQUIRED, InputError, option, read_jsonl, run_main
from minibridge.evaluate import accuracy, rescore, wilson
from minibridge.tables import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # jfly.uni-koeln.de/color
LINES, MARKERS, HATCHES = ("-", "--", "-.", ":"), "osD^vP*X", ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
CURVES = {"accuracy": "accuracy of sampled answers", "dead_groups": "share of dead groups",
          "entropy": "entropy (nats per token)", "length": "tokens per answer"}
BIN_LABELS = [name.replace("0.", ".").replace("-", "–") for name in tables.BINS]
LOOK = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.5}
SMOOTHED = 5  # steps of the running mean in training curves
ANSWERS = re.compile(r"(sft|rl)_(.+)_([^_]+)_([^_]+)\.jsonl")  # stage, arm, test, decoding
MISSING = 'no figures without matplotlib: pip install -e ".[plot]"'


@dataclass(frozen=True)
class Config:
    runs: str = option(REQUIRED, "folders, separated by commas, each with NAME= before it or not")
    out: str = option(REQUIRED, "folder for the figures")


# --- from folders to tables ----------------------------------------------------------------------------------


def named_folders(text: str) -> list[tuple[str, Path]]:
    """("bridge", Path("runs/x")) of "bridge=runs/x"."""
    pairs = []
    for word in text.split(","):
        name, _, folder = word.rpartition("=")
        if not Path(folder).is_dir():
            raise InputError(f"runs: {folder or word}: no such folder")
        pairs.append((name or Path(folder).name, Path(folder)))
    return pairs


def training(runs: list[tuple[str, Path]]) -> Table:
    """Steps of GRPO runs; an SFT run's lines have no accuracy."""
    inside = [(folder.name.removeprefix("rl_"), folder) for _, path in runs for folder in sorted(path.glob("rl_*/"))]
    files = [(name, path / "metrics.jsonl") for name, path in runs + inside]
    return [{"arm": name, "step": line["step"], **{curve: line[curve] for curve in CURVES}}
            for name, path in files if path.exists() for line in read_jsonl(path) if "accuracy" in line]


def collected(file: str) -> Callable[[list[tuple[str, Path]]], Table]:
    """The tables of that name that `influence` wrote, one under another."""
    return lambda runs: [{"arm": name, **row} for name, path in runs if (path / file).exists()
                         for row in tables.read(path / file)]


def ablation(runs: list[tuple[str, Path]]) -> Table:
    """Accuracy with its Wilson interval, of every file of saved answers."""
    table = []
    for _, folder in runs:
        for path in sorted(folder.glob("*.jsonl")):
            if match := ANSWERS.fullmatch(path.name):
                stage, arm, test, decoding = match.groups()
                problems = rescore(str(path))
                share = accuracy(problems)
                low, high = wilson(share, len(problems))
                table.append({"arm": arm, "stage": stage, "test": f"{test}, {decoding}", "problems": len(problems),
                              "accuracy": share, "low": low, "high": high})
    return table


# --- from tables to figures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What tells one arm from the others, by its number among them, in every figure alike."""
    name: str
    number: int

    @property
    def line(self) -> dict:
        return {"color": COLOURS[self.number % len(COLOURS)], "linestyle": LINES[self.number % len(LINES)]}

    @property
    def point(self) -> dict:
        return {**self.line, "marker": MARKERS[self.number % len(MARKERS)], "markersize": 4, "capsize": 2}

    @property
    def bar(self) -> dict:
        return {"color": COLOURS[self.number % len(COLOURS)], "hatch": HATCHES[self.number % len(HATCHES)]}


def of(table: Table, **wanted: str) -> Table:
    return [row for row in table if all(row[name] == value for name, value in wanted.items())]


def numbers(table: Table, column: str) -> list[float]:
    return [float(row[column]) for row in table]


def names_in(table: Table, column: str) -> list[str]:
    return list(dict.fromkeys(row[column] for row in table))


def bars(axes, place: int, count: int, ticks: list[float], heights: list[float], **look):
    """The bars of one among `count`, beside those of the others, around whole numbers."""
    width = 0.8 / count
    axes.bar([tick + (place - (count - 1) / 2) * width for tick in ticks], heights, width, edgecolor="white", linewidth=0.5,
             error_kw={"elinewidth": 0.8, "capsize": 2}, **look)
    axes.grid(axis="x", visible=False)


def draw_training(figure, table: Table, arms: list[Arm]):
    for axes, (curve, title) in zip(figure.subplots(2, 2, sharex=True).flat, CURVES.items()):
        for arm in arms:
            steps, values = (numbers(of(table, arm=arm.name), column) for column in ("step", curve))
            means = [sum(values[max(0, i - SMOOTHED + 1):i + 1]) / min(i + 1, SMOOTHED) for i in range(len(values))]
            axes.plot(steps, values, color=arm.line["color"], alpha=0.25, linewidth=0.7)
            axes.plot(steps, means, label=arm.name, **arm.line)
        axes.set_title(title)
    for axes in figure.axes[2:]:
        axes.set_xlabel(f"step (bold: mean of the last {SMOOTHED})")


def draw_rollout_accuracy(figure, table: Table, arms: list[Arm]):
    """Shares of prompts by bin, so that arms with other numbers of answers can stand beside each other."""
    axes, ticks = figure.subplots(), list(range(len(tables.BINS)))
    for place, arm in enumerate(arms):
        rows = of(table, arm=arm.name)
        shares = [sum(float(row["share"]) for row in rows if bin_of(float(row["alpha"])) == b) for b in ticks]
        bars(axes, place, len(arms), ticks, shares, label=f"{arm.name}: {sum(shares[1:-1]):.0%} between 0 and 1", **arm.bar)
    axes.set_xticks(ticks, BIN_LABELS)
    axes.set_xlabel("share α of right answers to a prompt")
    axes.set_ylabel("share of prompts")


def bin_of(alpha: float) -> int:
    return 0 if alpha == 0 else len(tables.BINS) - 1 if alpha == 1 else 1 + int(alpha * (len(tables.BINS) - 2))


def draw_influence(figure, table: Table, arms: list[Arm]):
    """Means over the prompts of each bin, with 95% intervals; a bin of one prompt has none, and is left out."""
    columns = {"K+ - K-": "contrast of co-influence, K⁺ − K⁻", "influence": "influence of a step, I(q)"}
    for axes, (column, title) in zip(figure.subplots(1, 2), columns.items()):
        for arm in arms:
            rows = [row for row in of(table, arm=arm.name) if row["alpha"] in tables.BINS and row[f"{column} +-"] != ""]
            ticks = [tables.BINS.index(row["alpha"]) + 0.12 * (arm.number - (len(arms) - 1) / 2) for row in rows]
            axes.errorbar(ticks, numbers(rows, column), numbers(rows, f"{column} +-"), label=arm.name, **arm.point)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(tables.BINS)), BIN_LABELS)
        axes.set_xlim(-0.5, len(tables.BINS) - 0.5)
        axes.set_xlabel("share α of right answers to a prompt")
        axes.set_title(title)


def draw_ablation(figure, table: Table, arms: list[Arm]):
    """Greys and not the arms' colours, because bars here differ by stage."""
    tests, ticks = names_in(table, "test"), {arm.name: tick for tick, arm in enumerate(arms)}
    looks = {"sft": {"label": "after SFT", "color": "0.75"}, "rl": {"label": "after RL", "color": "0.4", "hatch": "///"}}
    columns = len(tests) if len(arms) < 4 else 2 if len(arms) < 9 else 1
    lines = -(-len(tests) // columns)
    figure.set_size_inches(6.5, 0.6 + 2.2 * lines)
    for axes, test in zip(figure.subplots(lines, columns, sharey=True, squeeze=False).flat, tests):
        for place, (stage, look) in enumerate(looks.items()):
            rows = of(table, test=test, stage=stage)
            reach = [[abs(row[end] - row["accuracy"]) for row in rows] for end in ("low", "high")]
            bars(axes, place, 2, [ticks[row["arm"]] for row in rows], numbers(rows, "accuracy"), yerr=reach, **look)
        axes.set_xticks(range(len(arms)), list(ticks), rotation=0 if len(arms) < 4 else 30)
        axes.set_title(test)
    figure.supylabel("accuracy")


def draw_fluency(figure, table: Table, arms: list[Arm]):
    texts = names_in(table, "text")
    labels = [text.removesuffix(" answers").replace(" ", "\n") for text in texts]
    titles = {"entropy": ("entropy (nats per token)", 0), "perplexity": ("perplexity", 1)}
    for axes, (column, (title, least)) in zip(figure.subplots(1, 2), titles.items()):
        for place, arm in enumerate(arms):
            rows = of(table, arm=arm.name)
            ticks = [texts.index(row["text"]) for row in rows]
            bars(axes, place, len(arms), ticks, numbers(rows, column), label=arm.name, **arm.bar)
        axes.set_xticks(range(len(texts)), labels)
        axes.set_title(title)
        axes.set_ylim(bottom=least)


FIGURES = {  # name of the files: where the numbers come from, how they are drawn, inches
    "training": (training, draw_training, (6.5, 4.6)),
    "rollout_accuracy": (collected("rollout_accuracy.csv"), draw_rollout_accuracy, (6.5, 2.8)),
    "influence": (collected("influence.csv"), draw_influence, (6.5, 2.8)),
    "ablation": (ablation, draw_ablation, (6.5, 2.8)),
    "fluency": (collected("fluency.csv"), draw_fluency, (6.5, 2.6)),
}


def draw(runs: list[tuple[str, Path]], out: Path) -> list[str]:
    """Every figure that the runs have numbers for; returns their names. InputError without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InputError(MISSING)
    import matplotlib
    from matplotlib.figure import Figure

    found = {name: table for name, (read, _, _) in FIGURES.items() if (table := read(runs))}
    arms = {row["arm"] for table in found.values() for row in table}
    named = [name for name, _ in runs if name in arms]  # in the order given, then those of folders within
    order = {name: number for number, name in enumerate(dict.fromkeys([*named, *sorted(arms)]))}
    out.mkdir(parents=True, exist_ok=True)
    for name, table in found.items():
        _, draw_one, size = FIGURES[name]
        tables.write(out / f"{name}.csv", table)
        with matplotlib.rc_context(LOOK):
            figure = Figure(size, layout="constrained")
            draw_one(figure, table, [Arm(arm, order[arm]) for arm in sorted(names_in(table, "arm"), key=order.get)])
            handles = figure.axes[0].get_legend_handles_labels()
            figure.legend(*handles, loc="outside upper center", ncols=4)
            figure.savefig(out / f"{name}.png", dpi=200)
    return list(found)


def main(config: Config):
    drawn = draw(named_folders(config.runs), Path(config.out))
    if not drawn:
        raise InputError(f"runs: no numbers for a figure in {config.runs}")
    print(f"{config.out}: {', '.join(f'{name}.png' for name in drawn)}, and each as .csv")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
