"""Figures from run folders, each with the numbers behind it as CSV beside it.

    python -m minibridge.plots --runs vanilla=runs/influence_vanilla,bridge=runs/influence_bridge,runs/toy --out figures

A folder gives what it has:

    of minibridge.influence    rollout_accuracy, influence, fluency
    of train_rl.py             training (metrics.jsonl)
    of minibridge.reproduce    training; accuracy before and after RL (ablation) and its gains, of all arms, means over seeds

Folders of the first two kinds are an arm each, named as given or as the folder; a name before one of the third goes
before those of its arms. matplotlib draws them: pip install -e ".[plot]". An arm has one colour in all figures, of those
that Okabe and Ito chose for colour-blind readers; line styles, markers and hatchings tell arms apart in print.
"""
import io
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from math import nan
from pathlib import Path
from statistics import mean

from minibridge import tables
from minibridge.config import REQUIRED, InputError, option, run_main, whole_lines, write_whole
from minibridge.evaluate import wilson
from minibridge.results import interval
from minibridge.tables import Table, number

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # jfly.uni-koeln.de/color
LINES, MARKERS, HATCHES = ("-", "--", "-.", ":"), "osD^vP*X", ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
CURVES = {"accuracy": "accuracy of sampled answers", "dead_groups": "share of dead groups",
          "entropy": "entropy (nats per token)", "length": "tokens per answer"}
BIN_LABELS = [name.replace("0.", ".").replace("-", "–") for name in tables.BINS]
LOOK = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.5}
SMOOTHED = 5  # steps of the running mean in training curves
MISSING = 'no figures without matplotlib: pip install -e ".[plot]"'

Folder = tuple[str | None, Path]  # the name given to it, if one was


@dataclass(frozen=True)
class Config:
    runs: str = option(REQUIRED, "folders, separated by commas, each with NAME= before it or not")
    out: str = option(REQUIRED, "folder for the figures")


# --- from folders to tables ----------------------------------------------------------------------------------


def named_folders(text: str) -> list[Folder]:
    """("bridge", Path("runs/x")) of "bridge=runs/x", (None, Path("runs/x")) of "runs/x"."""
    pairs = []
    for word in text.split(","):
        name, _, folder = ("", "", word) if word and Path(word).is_dir() else word.partition("=")
        if not folder or not Path(folder).is_dir():
            raise InputError(f"runs: {folder or word or 'nothing'}: no such folder")
        pairs.append((name or None, Path(folder)))
    return pairs


def together(kind: str, parts: list[tuple[str, Table]]) -> Table:
    """One table of the tables of arms. InputError for two of one arm."""
    names = [arm for arm, _ in parts]
    if twice := [arm for arm in names if names.count(arm) > 1]:
        raise InputError(f"runs: two folders have a table {kind!r} for {twice[0]!r}; give NAME= before them")
    return [{**row, "arm": arm} for arm, table in parts for row in table]


def numeric(table: Table, path: Path, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """The columns wanted, with numbers for numbers. InputError, with file and row, for one that is none."""
    rows = []
    for line, row in enumerate(table, start=1):
        if missing := [name for name in texts if not isinstance(row.get(name), str)]:
            raise InputError(f"{path}: row {line}: no field {missing[0]!r}")
        found = {name: number(row, name, f"{path}: row {line}") for name in numbers}
        rows.append({name: row[name] for name in texts} | found)
    if not rows:
        raise InputError(f"{path}: no rows")
    return rows


def collected(kind: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Callable[[list[Folder]], Table]:
    """The tables of that name that `influence` wrote, one under another."""
    def read(runs: list[Folder]) -> Table:
        files = [(name or folder.name, folder / f"{kind}.csv") for name, folder in runs]
        return together(kind, [(arm, numeric(tables.read(path), path, texts, numbers))
                               for arm, path in files if path.exists()])
    return read


def by_arm(run: Folder, file: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> dict[str, Table]:
    """A table that `reproduce` wrote, taken apart."""
    parts, path = defaultdict(list), run[1] / file
    for row in numeric(tables.read(path), path, ("arm", *texts), numbers) if path.exists() else ():
        parts[row["arm"] if run[0] is None else f"{run[0]}: {row['arm']}"].append(row)
    return parts


def training(runs: list[Folder]) -> Table:
    """Steps of GRPO runs, means over seeds; an SFT run's lines have no accuracy."""
    parts = []
    for run in runs:
        path = run[1] / "metrics.jsonl"
        lines = [line for line in whole_lines(path) if "accuracy" in line] if path.exists() else []
        if lines:
            parts.append((run[0] or run[1].name, numeric(lines, path, (), ("step", *CURVES))))
        for arm, rows in by_arm(run, "curves.csv", (), ("seed", "step", *CURVES)).items():
            seeds = defaultdict(list)
            for row in rows:
                seeds[row["step"]].append(row)
            parts.append((arm, [{"step": step} | {curve: mean(row[curve] for row in same) for curve in CURVES}
                                for step, same in seeds.items()]))
    return together("training", parts)


def ablation(runs: list[Folder]) -> Table:
    """Accuracy with its interval, over problems (Wilson) for one seed, over seeds for more."""
    parts = []
    for run in runs:
        for arm, rows in by_arm(run, "results.csv", ("test", "decoding", "stage"), ("seed", "accuracy", "problems")).items():
            same = defaultdict(list)
            for row in rows:
                same[f"{row['test']}, {row['decoding']}", row["stage"]].append(row)
            parts.append((arm, [{"test": test, "stage": stage, **spread(seeds)} for (test, stage), seeds in same.items()]))
    return together("ablation", parts)


def spread(seeds: Table) -> dict[str, float]:
    shares = [row["accuracy"] for row in seeds]
    if len(seeds) == 1:
        low, high = wilson(shares[0], int(seeds[0]["problems"]))
        return {"accuracy": shares[0], "low": low, "high": high}
    middle, reach = interval([[share] for share in shares])
    return {"accuracy": middle, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def gains(runs: list[Folder]) -> Table:
    """RL gains with their intervals, and by how much they are larger than the first arm's (`results.gains`)."""
    return together("gains", [(arm, [{"test": f"{row['test']}, {row['decoding']}", **{name: row[name] for name in GAINS}}
                                     for row in rows])
                              for run in runs for arm, rows in by_arm(run, "gains.csv", ("test", "decoding"), GAINS).items()])


# --- from tables to figures ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What tells one arm from the others, by its number among them, in every figure alike."""
    name: str
    number: int

    @property
    def label(self) -> str:  # matplotlib reads "$" as mathematics and hides what begins with "_"
        return f"{'' if not self.name.startswith('_') else ' '}{self.name}".replace("$", r"\$")

    @property
    def turn(self) -> int:  # colours begin anew after eight arms, with other hatchings and lines than before
        return self.number + self.number // len(COLOURS)

    @property
    def line(self) -> dict:
        return {"color": COLOURS[self.number % len(COLOURS)], "linestyle": LINES[self.turn % len(LINES)]}

    @property
    def point(self) -> dict:
        return {**self.line, "marker": MARKERS[self.turn % len(MARKERS)], "markersize": 4, "capsize": 2}

    @property
    def bar(self) -> dict:
        return {"color": COLOURS[self.number % len(COLOURS)], "hatch": HATCHES[self.turn % len(HATCHES)]}


def of(table: Table, **wanted: str) -> Table:
    return [row for row in table if all(row[name] == value for name, value in wanted.items())]


def column(table: Table, name: str) -> list[float]:
    return [row[name] for row in table]


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
            rows = of(table, arm=arm.name)
            steps, values = column(rows, "step"), column(rows, curve)
            means = [mean(values[max(0, i - SMOOTHED + 1):i + 1]) for i in range(len(values))]
            axes.plot(steps, values, color=arm.line["color"], alpha=0.25, linewidth=0.7)
            axes.plot(steps, means, label=arm.label, marker="o" if len(rows) == 1 else None, **arm.line)
        axes.set_title(title)
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in figure.axes[2:]:
        axes.set_xlabel(f"step (bold: mean of the last {SMOOTHED})")


def draw_rollout_accuracy(figure, table: Table, arms: list[Arm]):
    """Shares of prompts by bin, so that arms with other numbers of answers can stand beside each other."""
    axes, ticks = figure.subplots(), list(range(len(tables.BINS)))
    for place, arm in enumerate(arms):
        rows = of(table, arm=arm.name)
        shares = [sum(row["share"] for row in rows if bin_of(row["alpha"]) == b) for b in ticks]
        bars(axes, place, len(arms), ticks, shares, label=f"{arm.label}: {sum(shares[1:-1]):.0%} between 0 and 1", **arm.bar)
    axes.set_xticks(ticks, BIN_LABELS)
    axes.set_xlabel("share α of right answers to a prompt")
    axes.set_ylabel("share of prompts")


def bin_of(alpha: float) -> int:
    return 0 if alpha == 0 else len(tables.BINS) - 1 if alpha == 1 else 1 + int(alpha * (len(tables.BINS) - 2))


def draw_influence(figure, table: Table, arms: list[Arm]):
    """Means over the prompts of each bin, with 95% intervals where there are two; lines break where there are none."""
    columns = {"K+ - K-": "contrast of co-influence, K⁺ − K⁻", "influence": "influence of a step, I(q)"}
    apart = min(0.12, 0.8 / len(arms))
    for axes, (name, title) in zip(figure.subplots(1, 2), columns.items()):
        for arm in arms:
            rows = {row["alpha"]: row for row in of(table, arm=arm.name)}
            bins = [rows.get(name, {}) for name in tables.BINS]
            ticks = [tick + apart * (arms.index(arm) - (len(arms) - 1) / 2) for tick in range(len(bins))]
            axes.errorbar(ticks, [row.get(name, nan) for row in bins], [row.get(f"{name} +-", nan) for row in bins],
                          label=arm.label, **arm.point)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(tables.BINS)), BIN_LABELS)
        axes.set_xlim(-0.5, len(tables.BINS) - 0.5)
        axes.set_xlabel("share α of right answers to a prompt")
        axes.set_title(title)


def draw_ablation(figure, table: Table, arms: list[Arm]):
    """Greys and not the arms' colours, because bars here differ by stage."""
    tests, ticks = list(dict.fromkeys(row["test"] for row in table)), {arm.name: tick for tick, arm in enumerate(arms)}
    looks = {"sft": {"label": "after SFT", "color": "0.75"}, "rl": {"label": "after RL", "color": "0.4", "hatch": "///"}}
    columns = len(tests) if len(arms) < 4 else 2 if len(arms) < 9 else 1
    lines = -(-len(tests) // columns)
    figure.set_size_inches(6.5, 1.0 + 1.8 * lines)
    for axes, test in zip(figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).flat, tests):
        for place, (stage, look) in enumerate(looks.items()):
            rows = of(table, test=test, stage=stage)
            reach = [[abs(row[end] - row["accuracy"]) for row in rows] for end in ("low", "high")]
            bars(axes, place, 2, [ticks[row["arm"]] for row in rows], column(rows, "accuracy"), yerr=reach, **look)
        crowded = len(arms) * max(len(arm.label) for arm in arms) > 21  # letters, beside one another
        axes.set_xticks(range(len(arms)), [arm.label for arm in arms], rotation=30 * crowded, rotation_mode="anchor",
                        horizontalalignment="right" if crowded else "center")
        axes.set_xlim(-0.5, len(arms) - 0.5)
        axes.set_title(test)
    figure.supylabel("accuracy")


def draw_gains(figure, table: Table, arms: list[Arm]):
    """In points, arms beside one another at each test; the first arm is not compared with itself."""
    first = [arm.label for arm in arms if all(row["more"] != row["more"] for row in of(table, arm=arm.name))]  # NaN
    tests = names_in(table, "test")
    titles = {"gain": "RL gain (points)", "more": f"RL gain less that of {' or '.join(first)} (points)"}
    for axes, (name, title) in zip(figure.subplots(1, 2, sharey=True), titles.items()):
        compared = [arm for arm in arms if any(row[name] == row[name] for row in of(table, arm=arm.name))]  # not NaN
        for arm in compared:
            rows = of(table, arm=arm.name)
            apart = min(0.12, 0.8 / len(compared)) * (compared.index(arm) - (len(compared) - 1) / 2)
            axes.errorbar([100 * row[name] for row in rows], [tests.index(row["test"]) + apart for row in rows],
                          xerr=[100 * row[f"{name} +-"] for row in rows], label=arm.label, **arm.point | {"linestyle": ""})
        axes.axvline(0, color="0.4", linewidth=0.8)
        axes.set_yticks(range(len(tests)), tests)
        axes.set_ylim(len(tests) - 0.5, -0.5)
        axes.set_title(title)


def draw_fluency(figure, table: Table, arms: list[Arm]):
    texts = list(dict.fromkeys(row["text"] for row in table))
    labels = [text.removesuffix(" answers").replace(" ", "\n") for text in texts]
    titles = {"entropy": ("entropy (nats per token)", 0), "perplexity": ("perplexity", 1)}
    for axes, (name, (title, least)) in zip(figure.subplots(1, 2), titles.items()):
        for place, arm in enumerate(arms):
            rows = of(table, arm=arm.name)
            ticks = [texts.index(row["text"]) for row in rows]
            bars(axes, place, len(arms), ticks, column(rows, name), label=arm.label, **arm.bar)
        axes.set_xticks(range(len(texts)), labels)
        axes.set_title(title)
        axes.set_ylim(bottom=least)


GAINS = ("gain", "gain +-", "more", "more +-")
INFLUENCE = ("K+ - K-", "K+ - K- +-", "influence", "influence +-")
FIGURES = {  # name of the files: where the numbers come from, how they are drawn, inches
    "training": (training, draw_training, (6.5, 4.6)),
    "rollout_accuracy": (collected("rollout_accuracy", (), ("alpha", "share")), draw_rollout_accuracy, (6.5, 2.8)),
    "influence": (collected("influence", ("alpha",), INFLUENCE), draw_influence, (6.5, 2.8)),
    "ablation": (ablation, draw_ablation, (6.5, 2.8)),
    "gains": (gains, draw_gains, (6.5, 2.4)),
    "fluency": (collected("fluency", ("text",), ("entropy", "perplexity")), draw_fluency, (6.5, 2.6)),
}


def draw(runs: list[Folder], out: Path) -> list[str]:
    """Every figure that the runs have numbers for; returns their names. InputError without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(MISSING) from None

    found = {name: table for name, (read, _, _) in FIGURES.items() if (table := read(runs))}
    names = dict.fromkeys(row["arm"] for table in found.values() for row in table)
    order = {name: place for place, name in enumerate(names)}
    for name, table in found.items():
        _, draw_one, size = FIGURES[name]
        tables.write(out / f"{name}.csv", [{"arm": row["arm"]} | {key: "" if value != value else value  # NaN
                                                                  for key, value in row.items()} for row in table])
        with matplotlib.rc_context(LOOK):
            figure = Figure(size, layout="constrained")
            draw_one(figure, table, [Arm(arm, place) for arm, place in order.items() if of(table, arm=arm)])
            handles, labels = figure.axes[0].get_legend_handles_labels()
            columns = max(1, min(4, 90 // (6 + max(map(len, labels), default=1))))  # letters of a line
            figure.legend(handles, labels, loc="outside upper center", ncols=columns)
            image = io.BytesIO()
            figure.savefig(image, dpi=200)
        write_whole(out / f"{name}.png", image.getvalue())
    return list(found)


def main(config: Config):
    runs, out = named_folders(config.runs), Path(config.out)
    if (out / "run.json").exists():
        raise InputError(f"out: {out} is a run folder; its own tables would be replaced")
    drawn = draw(runs, out)
    if not drawn:
        raise InputError(f"runs: no numbers for a figure in {config.runs}")
    print(f"{config.out}: {', '.join(f'{name}.png' for name in drawn)}, and each as .csv")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
