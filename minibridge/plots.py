"""Figures from run folders, each with the numbers behind it as CSV beside it.

    python -m minibridge.plots --runs vanilla=runs/influence_vanilla,bridge=runs/influence_bridge,runs/toy --out figures

A folder gives what it has:

    of minibridge.influence    rollout_accuracy, influence, fluency
    of train_rl.py             training (metrics.jsonl)
    of minibridge.reproduce    training; accuracy before and after RL, and gains, of all arms, means over seeds

Folders of the first two kinds are an arm each, named as given or as the folder; a name before one of the third goes
before those of its arms. matplotlib draws them (`drawing`): pip install -e ".[plot]".
"""
import io
import math
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from minibridge import drawing, tables
from minibridge.config import REQUIRED, InputError, option, run_main, whole_lines, write_whole
from minibridge.results import mean_and_reach
from minibridge.tables import Table, number

RANGES = {"accuracy": (0, 1), "low": (0, 1), "high": (0, 1), "share": (0, 1), "alpha": (0, 1)}
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
        row = {drawing.VALIDATION: None} | row  # the one column that may be missing
        found = {name: number(row, name, f"{path}: row {line}") for name in numbers}
        for name, value in found.items():
            low, high = RANGES.get(name, (0.0 if name.endswith("+-") else -math.inf, math.inf))
            if not low <= value <= high and not (math.isnan(value) and name not in ("low", "high", "alpha", "share")):
                raise InputError(f"{path}: row {line}: field {name!r} is {value:g}")
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
            parts.append((run[0] or run[1].name, numeric(lines, path, (), ("step", *drawing.CURVES))))
        for arm, rows in by_arm(run, "curves.csv", (), ("seed", "step", *drawing.CURVES)).items():
            seeds = defaultdict(list)
            for row in rows:
                seeds[row["step"]].append(row)
            parts.append((arm, [{"step": step} | {curve: mean(row[curve] for row in same) for curve in drawing.CURVES}
                                for step, same in seeds.items()]))
    return together("training", parts)


def accuracy(runs: list[Folder]) -> Table:
    """Accuracy with its interval, over problems for one seed, over seeds for more."""
    parts = []
    for run in runs:
        named, numbers = ("test", "decoding", "stage"), ("seed", "accuracy", "low", "high")
        for arm, rows in by_arm(run, "results.csv", named, numbers).items():
            same = defaultdict(list)
            for row in rows:
                same[f"{row['test']}, {row['decoding']}", row["stage"]].append(row)
            parts.append((arm, [{"test": test, "stage": stage, **spread(seeds)} for (test, stage), seeds in same.items()]))
    return together("accuracy", parts)


def spread(seeds: Table) -> dict[str, float]:
    shares = [row["accuracy"] for row in seeds]
    if len(seeds) == 1:
        return {name: seeds[0][name] for name in ("accuracy", "low", "high")}
    middle, reach = mean_and_reach([[share] for share in shares])
    return {"accuracy": middle, "low": max(0.0, middle - reach), "high": min(1.0, middle + reach)}


def gains(runs: list[Folder]) -> Table:
    """RL gains with their intervals, and by how much they are larger than the first arm's (`results.gains`)."""
    parts = []
    for run in runs:
        for arm, rows in by_arm(run, "gains.csv", ("test", "decoding"), GAINS).items():
            parts.append((arm, [{"test": f"{row['test']}, {row['decoding']}", **{name: row[name] for name in GAINS}}
                                for row in rows]))
    return together("gains", parts)


GAINS = ("gain", "gain +-", "more", "more +-")
INFLUENCE = ("K+ - K-", "K+ - K- +-", "influence", "influence +-")
FIGURES = {  # name of the files: where the numbers come from, how they are drawn, inches
    "training": (training, drawing.training, (6.5, 4.6)),
    "rollout_accuracy": (collected("rollout_accuracy", (), ("alpha", "share")), drawing.rollout_accuracy, (6.5, 2.8)),
    "influence": (collected("influence", ("alpha",), INFLUENCE), drawing.influence, (6.5, 2.8)),
    "accuracy": (accuracy, drawing.accuracy, (6.5, 2.8)),
    "gains": (gains, drawing.gains, (6.5, 2.4)),
    "fluency": (collected("fluency", ("text",), ("entropy", "perplexity")), drawing.fluency, (6.5, 2.6)),
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
    texts = {name: [{"arm": row["arm"]} | {key: "" if value != value else value for key, value in row.items()}  # NaN
                    for row in table] for name, table in found.items()}
    for name, table in texts.items():
        path = out / f"{name}.csv"
        if path.exists() and any(row.keys() != table[0].keys() for row in tables.read(path)):
            raise InputError(f"{path}: has other columns than this figure's, and would be replaced; choose another --out")
    for name, table in found.items():
        _, draw_one, size = FIGURES[name]
        tables.write(out / f"{name}.csv", texts[name])
        with matplotlib.rc_context(drawing.LOOK):
            figure = Figure(size, layout="constrained")
            draw_one(figure, table, [drawing.Arm(arm, place) for place, arm in enumerate(names)
                                     if drawing.of(table, arm=arm)])
            handles, labels = figure.axes[0].get_legend_handles_labels()
            if labels:
                columns = max(1, min(4, 90 // (6 + max(map(len, labels)))))  # letters of a line
                figure.legend(handles, labels, loc="outside upper center", ncols=columns)
            image = io.BytesIO()
            figure.savefig(image, dpi=200)
        write_whole(out / f"{name}.png", image.getvalue())
    return list(found)


def main(config: Config):
    runs, out = named_folders(config.runs), Path(config.out)
    if (out / "run.json").exists():
        raise InputError(f"out: {out} is a run folder; its own tables would be replaced")
    if any(out.resolve() == folder.resolve() for _, folder in runs):
        raise InputError(f"out: {out} is one of --runs; its own tables would be replaced")
    drawn = draw(runs, out)
    if not drawn:
        raise InputError(f"runs: no numbers for a figure in {config.runs}")
    print(f"{config.out}: {', '.join(f'{name}.png' for name in drawn)}, and each as .csv")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
