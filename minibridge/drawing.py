"""How each figure of `plots` is drawn: a matplotlib figure, a table, and the arms in it.

An arm has one colour in all figures, of those that Okabe and Ito chose for colour-blind readers; line styles, markers and
hatchings tell arms apart in print.
"""
from dataclasses import dataclass
from math import nan
from statistics import mean

from minibridge import tables
from minibridge.tables import Table

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")  # jfly.uni-koeln.de/color
LINES, MARKERS, HATCHES = ("-", "--", "-.", ":"), "osD^vP*X", ("", "///", "...", "xxx", "\\\\\\", "++", "oo", "**")
VALIDATION = "val_accuracy"  # not of every step, and of a run without --val of none
CURVES = {"accuracy": "accuracy of sampled answers", "dead_groups": "share of dead groups",
          "entropy": "entropy (nats per token)", "length": "tokens per answer", VALIDATION: "greedy accuracy on --val"}
ALPHA = "share α of right answers to a prompt (.2–.4: from .2, below .4; 0 and 1 apart)"
BIN_LABELS = [name.replace("0.", ".").replace("-", "–") for name in tables.BINS]
LOOK = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
        "grid.color": "0.9", "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.5}
SMOOTHED = 5  # steps of the running mean in training curves


def literal(text: str) -> str:
    """matplotlib reads "$" as mathematics."""
    return text.replace("$", r"\$")


@dataclass(frozen=True)
class Arm:
    """What tells one arm from the others, by its number among them, in every figure alike."""
    name: str
    number: int

    @property
    def label(self) -> str:  # matplotlib hides what begins with "_"
        return " " * self.name.startswith("_") + literal(self.name)

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


def training(figure, table: Table, arms: list[Arm]):
    shown = [curve for curve in CURVES if any(row[curve] == row[curve] for row in table)]  # not NaN alone
    lines = -(-len(shown) // 2)
    figure.set_size_inches(6.5, 0.6 + 2 * lines)
    places = figure.subplots(lines, 2, sharex=True, squeeze=False).flat
    for axes in places[len(shown):]:
        axes.remove()
    for axes, curve in zip(places, shown):
        for arm in arms:
            rows = [row for row in of(table, arm=arm.name) if row[curve] == row[curve]]
            steps, values = column(rows, "step"), column(rows, curve)
            means = [mean(values[j] for j in range(max(0, i - SMOOTHED + 1), i + 1) if steps[j] > steps[i] - SMOOTHED)
                     for i in range(len(values))]
            axes.plot(steps, values, color=arm.line["color"], alpha=0.25, linewidth=0.7)
            axes.plot(steps, means, label=arm.label, marker="o" if len(rows) == 1 else None, **arm.line)
        axes.set_title(CURVES[curve])
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in figure.axes[-2:]:
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(f"step (thin: each; bold: mean of the last {SMOOTHED})")


def rollout_accuracy(figure, table: Table, arms: list[Arm]):
    """Shares of prompts by bin, so that arms with other numbers of answers can stand beside each other."""
    axes, ticks = figure.subplots(), list(range(len(tables.BINS)))
    for place, arm in enumerate(arms):
        rows = of(table, arm=arm.name)
        shares = [sum(row["share"] for row in rows if bin_of(row["alpha"]) == b) for b in ticks]
        bars(axes, place, len(arms), ticks, shares, label=f"{arm.label}: {sum(shares[1:-1]):.0%} between 0 and 1", **arm.bar)
    axes.set_xticks(ticks, BIN_LABELS)
    axes.set_xlabel(ALPHA)
    axes.set_ylabel("share of prompts")


def bin_of(alpha: float) -> int:
    return 0 if alpha == 0 else len(tables.BINS) - 1 if alpha == 1 else 1 + int(alpha * (len(tables.BINS) - 2))


def influence(figure, table: Table, arms: list[Arm]):
    """Means over the prompts of each bin, with 95% intervals where there are two; lines break where there are none."""
    columns = {"K+ - K-": "contrast of co-influence, K⁺ − K⁻", "influence": "influence of a step, I(q)"}
    apart = min(0.12, 0.8 / len(arms))
    for axes, (name, title) in zip(figure.subplots(1, 2), columns.items()):
        for arm in arms:
            rows = {row["alpha"]: row for row in of(table, arm=arm.name)}
            bins = [rows.get(bin_, {}) for bin_ in tables.BINS]
            ticks = [tick + apart * (arms.index(arm) - (len(arms) - 1) / 2) for tick in range(len(bins))]
            axes.errorbar(ticks, [row.get(name, nan) for row in bins], [row.get(f"{name} +-", nan) for row in bins],
                          label=arm.label, **arm.point)
        axes.axhline(0, color="0.4", linewidth=0.8)
        axes.set_xticks(range(len(tables.BINS)), BIN_LABELS)
        axes.set_xlim(-0.5, len(tables.BINS) - 0.5)
        axes.set_title(title)
    figure.supxlabel(ALPHA, fontsize="medium")


def accuracy(figure, table: Table, arms: list[Arm]):
    """Greys and not the arms' colours, because bars here differ by stage."""
    tests, ticks = names_in(table, "test"), {arm.name: tick for tick, arm in enumerate(arms)}
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
        axes.set_title(literal(test))
    figure.supylabel("accuracy, with its 95% interval", fontsize="medium")


def gains(figure, table: Table, arms: list[Arm]):
    """In points, arms beside one another at each test, of a single test one below the other; the first arm is not
    compared with itself."""
    first = [arm.label for arm in arms if all(row["more"] != row["more"] for row in of(table, arm=arm.name))]  # NaN
    tests = names_in(table, "test")
    other = first[0] if len(first) == 1 else "the first arm"
    titles = {"gain": "RL gain (points)", "more": f"more than {other} (points)"}
    one = len(tests) == 1
    shown = ["gain", *(["more"] if any(row["more"] == row["more"] for row in table) else [])]
    for name, axes in zip(shown, figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]):
        for arm in arms:
            if not (rows := [row for row in of(table, arm=arm.name) if row[name] == row[name]]):  # not NaN
                continue
            apart = min(0.12, 0.8 / len(arms)) * (arms.index(arm) - (len(arms) - 1) / 2)
            places = [arms.index(arm) if one else tests.index(row["test"]) + apart for row in rows]
            axes.errorbar([100 * row[name] for row in rows], places, xerr=[100 * row[f"{name} +-"] for row in rows],
                          label=None if one else arm.label, **arm.point | {"linestyle": ""})
        axes.axvline(0, color="0.4", linewidth=0.8)
        labels = [arm.label for arm in arms] if one else [literal(test) for test in tests]
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.5, -0.5)
        axes.set_title(titles[name])
    figure.supxlabel(f"{literal(tests[0])}; lines: 95% intervals" if one else "lines: 95% intervals", fontsize="medium")


def fluency(figure, table: Table, arms: list[Arm]):
    texts = names_in(table, "text")
    labels = [literal(text.removesuffix(" answers").replace(" ", "\n")) for text in texts]
    titles = {"entropy": ("entropy (nats per token)", 0), "perplexity": ("perplexity", 1)}
    for axes, (name, (title, least)) in zip(figure.subplots(1, 2), titles.items()):
        for place, arm in enumerate(arms):
            rows = of(table, arm=arm.name)
            ticks = [texts.index(row["text"]) for row in rows]
            bars(axes, place, len(arms), ticks, column(rows, name), label=arm.label, **arm.bar)
        axes.set_xticks(range(len(texts)), labels)
        axes.set_title(title)
        axes.set_ylim(bottom=least)
