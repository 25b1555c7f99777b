"""Write problems as JSON lines: SFT examples of any arm, RL prompts, validation and test sets.

    python gen_data.py --split sft --arm bridge --out data/sft_bridge.jsonl
    python gen_data.py --split sft --arm subgoal+reflection --reflection 0.2 --out data/sft_ablation.jsonl
    python gen_data.py --split sft --arm rc-aug --out data/sft_rc.jsonl              # 4 rows a problem; --rows 2000 caps
    python gen_data.py --split rl --out data/rl.jsonl
    python gen_data.py --split test --ops 25 --out data/test_ood.jsonl
    python gen_data.py --task arithmetic --split test --redundant 20-22 --out data/arithmetic_ood.jsonl
    python gen_data.py --problems docs/own_problems.jsonl --split sft --arm bridge --out data/own.jsonl

The problems of a split depend on the task, its sizes, the seed, the split, the count and the balance, never on the arm: two
arms hold the same problems in the same order, with the same `id`, differently worded (augmented ones four times each). No
structure stands in two splits (problems of your own all stand in every split: give each a file of its own).
`minibridge/arms.py` says what the arms are, `minibridge/custom.py` how a file of your own problems is written.
SFT lines hold "messages", all others "prompt", in the form TRL reads.

An augmented arm has 4 rows a problem, so 4 times the optimizer steps of the plain one at equal epochs. Match them by rows
(--rows 2000: the first 500 problems in their 4 forms), or by steps (fewer epochs: the number is printed).
--rollouts FILE keeps the problems that a model gets right in --keep percent of its answers, for any split and arm.
"""
import sys
from collections import Counter
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from minibridge import custom, igsm, traces
from minibridge.arms import AUGMENTED, augmented, behaviors_of, middling, own_answers, read_rollouts, record
from minibridge.config import REQUIRED, InputError, jsonl, option, printable, run_main, write_whole
from minibridge.dag import Problem
from minibridge.splits import DEPTHS, REDUNDANT, SPLITS, arithmetic_problems, problems

SCALES = {"paper": igsm.PAPER, "toy": igsm.TOY}
FITS = {"igsm": ("task", "ops", "scale", "balance", "workers"),  # options that others do not have
        "arithmetic": ("task", "depth", "redundant", "balance", "workers"), "own": ()}
ANSWERED = ("sft", "base")  # splits whose rows have answers, of an arm
BATCH, EPOCHS = 128, 5  # train_sft.py's defaults


@dataclass(frozen=True)
class Config:
    out: str = option(REQUIRED, "JSONL file to write")
    task: Literal["igsm", "arithmetic", "arithmetic-int"] = option(
        "igsm", "arithmetic: six operations, four decimals; arithmetic-int: + - * of whole numbers")
    problems: str | None = option(None, "JSONL file of your own problems, instead of a task")
    split: Literal["sft", "rl", "val", "test", "base"] = option(
        "sft", "which disjoint part of all problems to draw from; base: for pretraining, with answers as sft")
    arm: str | None = option(None, "of SFT rows: vanilla, bridge, any of subgoal, analysis, reflection joined by +, pp-aug, "
                                   "rc-aug, own-answers, prompts; with reflection, ARM@0.3 is ARM --strict --reflection "
                                   "0.3; none: bridge")
    analysis: int | None = option(None, "level 0..4 of restating conditions (strict: 0 or not 0); none: 2 in arms with it")
    reflection: float | None = option(None, "probability of trying a node out of turn; none: 0.1 in arms that have it")
    strict: bool = option(False, "our reading of the paper's Algorithm 1 (traces.Behaviors), with --reflection for every "
                                "probability")
    count: int | None = option(None, "problems; none: the paper's (2000 sft, 10000 rl, 500 val and test; base: 2000), or "
                                     "all your own")
    rows: int | None = option(None, "most rows to write; none: all", least=1)
    ops: tuple[int, int] | None = option(None, "igsm: operations, as 15-20 or 20; none: the paper's for the split")
    scale: Literal["paper", "toy"] = option("paper", "igsm: structures, values, words; toy: those toy_base knows")
    depth: int | None = option(None, "arithmetic: levels of the tree; none: 3 for base, the paper's 4 for sft, 5 for others",
                               least=2, most=6)
    redundant: tuple[int, int] | None = option(None, "arithmetic: unneeded premises, of two or three sentences "
                                                     "each; none: 0-8 (20-22 is the OOD test)")
    lines: traces.Lines | None = option(None, "order of the conditions; none: random, of your own problems as given")
    balance: float = option(1.0, "largest share of the problems with one and the same answer (each may have one)")
    rollouts: str | None = option(None, "JSONL file of a model's answers to these problems: keep those of middling accuracy")
    keep: tuple[int, int] | None = option(None, "percent of right rollouts that a problem is kept for; none: 20-80")
    workers: int = option(1, "processes that draw; any number of them gives the same file", least=1, most=256)
    seed: int = option(0, "seed of everything random", least=0)


def task_of(config: Config) -> str:
    return "own" if config.problems is not None else config.task.removesuffix("-int")


def chosen_problems(config: Config) -> list[Problem]:
    """What the command line asks for, before the arm."""
    kind = task_of(config)
    if kind == "own":
        found = custom.read(config.problems)
        if config.count is not None and not 1 <= config.count <= len(found):
            raise InputError(f"count: must be at least 1 and at most {len(found)}, as many as {config.problems} has")
        return found[:config.count]
    count = SPLITS[config.split][0] if config.count is None else config.count
    if kind == "igsm":
        ops = config.ops or SPLITS[config.split][1]
        return problems(config.split, count, ops, SCALES[config.scale], config.seed, config.balance, config.workers)
    depth = DEPTHS[config.split] if config.depth is None else config.depth
    return arithmetic_problems(config.split, count, config.task, depth, config.redundant or REDUNDANT, config.seed,
                               config.balance, config.workers)


def check_fit(config: Config):
    """Raises InputError for an option that would do nothing."""
    kind, called = task_of(config), "problems of your own" if config.problems is not None else config.task
    idle = {name: called for names in FITS.values() for name in names if name not in FITS[kind]}
    if config.split not in ANSWERED:
        idle |= dict.fromkeys(("arm", "analysis", "reflection", "strict"), f"split {config.split}: its rows have no answers")
    if config.rollouts is None:
        idle["keep"] = "a file without --rollouts"
    for field in fields(Config):
        if field.name in idle and getattr(config, field.name) != field.default:
            raise InputError(f"{field.name}: does not apply to {idle[field.name]}")
    if config.keep is not None and config.keep[1] > 100:
        raise InputError(f"keep: {config.keep[1]} is no percentage")
    if config.arm == "own-answers" and config.rollouts is None:
        raise InputError("arm: own-answers needs --rollouts")
    for name in ("problems", "rollouts"):
        if (source := getattr(config, name)) is not None and Path(source).resolve() == Path(config.out).resolve():
            raise InputError(f"out: would replace the file of --{name}")


def write_new(path: str, rows: list[dict]):
    """A repeated command may write the same rows again; rows of another one are not replaced."""
    text = jsonl(rows)
    if Path(path).is_file() and Path(path).read_bytes() != text.encode():
        raise InputError(f"out: {path} holds other rows; remove it or choose another")
    write_whole(path, text)


def main(config: Config):
    check_fit(config)
    arm = (config.arm or "bridge") if config.split in ANSWERED else "prompts"
    behaviors = behaviors_of(arm, config.analysis, config.reflection, config.strict)
    if Path(config.out).is_dir():
        raise InputError(f"out: {config.out} is a folder")
    rollouts = {} if config.rollouts is None else read_rollouts(config.rollouts)
    drawn = chosen_problems(config)
    if config.rollouts is not None:
        drawn = middling(drawn, rollouts, config.keep or (20, 80))
    order = config.lines or ("random" if config.problems is None else "given")
    letters = SCALES[config.scale].letters
    rows: list[dict] = []
    for problem in drawn:
        if arm in AUGMENTED:
            rows += augmented(arm, problem, config.seed, letters, order)
        elif arm == "own-answers":
            rows += own_answers(problem, config.seed, rollouts[problem.id], order)
        else:
            rows.append(record(problem, config.seed, behaviors, letters, order))
    if not rows:
        raise InputError("rollouts: no right and well-formed answer among those of the kept problems")
    rows = rows[:config.rows]
    write_new(config.out, rows)
    print(summary(rows))
    if config.split in ANSWERED:
        print(matched_steps(len(rows), len(drawn)), end="")
    print(f"{config.out}: {len(rows)} rows")


def summary(lines: list[dict]) -> str:
    """One row in full, and the counts that matter: op counts, the commonest answer (what a constant guess would earn)."""
    conversation = "\n".join(message["content"] for message in lines[0].get("messages") or lines[0]["prompt"])
    ops = ", ".join(f"{ops}: {count}" for ops, count in sorted(Counter(line["num_ops"] for line in lines).items()))
    answers = Counter(line["answer"] for line in lines)
    common, times = answers.most_common(1)[0]
    shares = f"commonest answer: {common}, {times / len(lines):.1%} of the rows; answer 0: {answers['0'] / len(lines):.1%}"
    return printable(f"{conversation}\n\noperations: {ops}\n{shares}")


def matched_steps(rows: int, problems: int) -> str:
    """A line on the epochs of train_sft.py in which `rows` rows take as many steps as one row a problem would; "" where
    that is no question."""
    steps, epoch = EPOCHS * (problems // BATCH), rows // BATCH
    if not steps or not epoch or rows == problems:
        return ""
    return (f"optimizer steps: in batches of {BATCH}, {EPOCHS} epochs of one row a problem are {steps} steps; "
            f"for as many on these rows: --epochs {steps / epoch:.4f}\n")


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
