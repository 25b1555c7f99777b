"""The paper's comparison from an empty folder to its table, at toy scale.

    python -m minibridge.reproduce toy            problems -> SFT (vanilla, BRIDGE) -> GRPO -> accuracy before and after
    python -m minibridge.reproduce replication    more arms, seeds and steps: the table of docs/results.md

What is shrunk: four to six operations in SFT and six in RL, where the paper has fifteen to twenty in both; no quantity that
is not needed, four small categories of one-word names, which formulas use as they are (no letters), values below 50, no KL
and no entropy term, and a Qwen2-shaped model of a million parameters, whose pretraining is `pretrain`. What is not shrunk:
every stage.

A stage whose result lies in the run folder is not run again, and training goes on from its newest checkpoint, so an
interrupted run is continued by the same command; it may then name more arms or seeds.
"""
import itertools
import signal
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch

import train_rl
import train_sft
from minibridge import arms, evaluate, results, splits, tables, traces
from minibridge.config import InputError, Run, option, run_command, same_settings, write_jsonl
from minibridge.dag import Problem
from minibridge.optim import open_model, prompt_limit
from minibridge.pretrain import SCALE

TOY_BASE = Path(__file__).parent / "toy_base"
TESTS = {"id": "ops", "ood": "ood_ops"}  # the test sets, and the settings that hold their op ranges
SFT_BATCH, MAX_PROMPT = 32, 400  # rows of an SFT step; tokens of a prompt


@dataclass(frozen=True)
class Toy:
    """One line a stage; see train_sft.py and train_rl.py for what the numbers mean."""
    out: str = option("runs/toy", "run folder")
    base: str = option(str(TOY_BASE), "Hugging Face folder of the base model")
    arms: str = option("vanilla,bridge", "arms of gen_data.py; NAME@P is its strict form with probability P")
    seed: int = option(0, "seed of problems, training and sampling", least=0)
    seeds: int = option(1, "how often all is done, with the seeds from --seed on", least=1, most=1000)
    workers: int = option(2, "processes, each for an arm of a seed at a time; they share the threads", least=1, most=256)
    sft_ops: tuple[int, int] = option((4, 6), "operations of the SFT problems")
    ops: tuple[int, int] = option((6, 6), "operations of the RL and in-distribution test problems")
    ood_ops: tuple[int, int] = option((7, 7), "operations of the out-of-distribution test problems")
    sft_rows: int = option(1600, "SFT examples of each arm", least=SFT_BATCH)
    sft_epochs: float = option(1.0, "passes over them", least=1, most=1e6)
    sft_learning_rate: float = option(5e-4, "peak, then a cosine", least=0)
    rl_steps: int = option(40, "rollout batches", least=1)
    rl_prompts: int = option(16, "prompts of a rollout batch", least=1)
    rl_samples: int = option(8, "answers sampled for each prompt", least=2)
    rl_learning_rate: float = option(1.5e-4, "peak, after five steps of warm-up, then a cosine", least=0)
    test_problems: int = option(400, "problems of each test set", least=2)
    test_samples: int = option(1, "answers to each at temperature 1, beside the greedy one", least=1)
    max_new_tokens: int = option(320, "longest answer, in tokens", least=1)

    @property
    def names(self) -> list[str]:
        return self.arms.split(",")

    @property
    def one_seed_each(self) -> list["Toy"]:
        return [replace(self, out=str(Path(self.out) / f"seed_{seed}"), seed=seed, seeds=1)
                for seed in range(self.seed, self.seed + self.seeds)]


# --- toy: the comparison -------------------------------------------------------------------------------------


def main_toy(config: Toy):
    out = Path(config.out)
    same_settings(out, config, but=("out", "workers", "arms", "seeds"))
    for arm in config.names:
        behaviors_of(arm)
    base, _ = open_model(config.base, torch.device("cpu"), "auto")  # what cannot work is an error now
    prompt_limit(base, MAX_PROMPT, config.max_new_tokens)
    run = Run(out, config)  # before any file of these seeds, so that others' cannot join them
    for one in config.one_seed_each:
        make_data(one)
    jobs = [(one, arm) for one in config.one_seed_each for arm in config.names]
    if config.workers == 1:
        for job in jobs:
            run_arm(*job)
    else:
        side_by_side(jobs, config.workers)
    text = write_results(config)
    run.finish()
    print(f"\n{text}\n\nwritten: table.md, results.csv, curves.csv in {out}; {run.record['seconds']:.0f} s")


def behaviors_of(arm: str) -> traces.Behaviors | None:
    name, at, probability = arm.partition("@")
    if not at:
        return arms.behaviors_of(name)
    try:
        return arms.behaviors_of(name, reflection=float(probability), strict=True)
    except ValueError:
        raise InputError(f"arms: {arm!r}: {probability!r} is not a probability") from None


def side_by_side(jobs: list[tuple[Toy, str]], workers: int):
    """What a job prints goes to a file of its own."""
    threads = max(1, torch.get_num_threads() // workers)
    with ProcessPoolExecutor(workers, get_context("spawn"), begin_worker, (threads,)) as pool:
        running = {pool.submit(run_logged, *job): job for job in jobs}
        try:
            for future in as_completed(running):
                future.result()
                print(f"done: seed {running[future][0].seed}, {running[future][1]}", flush=True)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def begin_worker(threads: int):
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    torch.set_num_threads(threads)


def run_logged(config: Toy, arm: str):
    with open(Path(config.out) / f"{arm}.log", "a", encoding="utf-8") as log, redirect_stdout(log):
        run_arm(config, arm)


def run_arm(config: Toy, arm: str):
    out = Path(config.out)
    if announce_if_missing(out / f"sft_{arm}" / "model", f"SFT, {arm}"):
        train_sft.main(sft_config(config, out, arm))
    if announce_if_missing(out / f"rl_{arm}" / "model", f"GRPO, {arm}"):
        train_rl.main(rl_config(config, out, arm))
    for stage in results.STAGES:
        answer_tests(config, out, f"{stage}_{arm}")


def announce_if_missing(path: Path, title: str) -> bool:
    if not path.exists():
        print(f"\n=== {title}", flush=True)
    return not path.exists()


def make_data(config: Toy):
    """All arms get as many SFT rows, of the same problems; those that write a problem four times get the first quarter of
    them. No answer is more frequent than 5%, so that none is a shortcut."""
    out, rows = Path(config.out), {arm: partial(sft_rows, config, arm) for arm in config.names}
    sets = [("sft", config.sft_ops, config.sft_rows, {f"sft_{arm}": make for arm, make in rows.items()}),
            ("rl", config.ops, config.rl_steps * config.rl_prompts, {"rl": partial(prompt_rows, config)})]
    sets += [("test", getattr(config, ops), config.test_problems, {f"test_{name}": partial(prompt_rows, config)})
             for name, ops in TESTS.items()]
    for split, ops, count, files in sets:
        if missing := [name for name in files if not (out / f"{name}.jsonl").exists()]:
            drawn = splits.problems(split, count, ops, SCALE, config.seed, balance=0.05)
            for name in missing:
                write_jsonl(out / f"{name}.jsonl", files[name](drawn))


def sft_rows(config: Toy, arm: str, problems: list[Problem]) -> list[dict]:
    if arm in arms.AUGMENTED:
        first = problems[:-(-len(problems) // arms.FORMS)]
        rows = [row for problem in first for row in arms.augmented(arm, problem, config.seed, SCALE.letters)]
        return rows[:len(problems)]
    return [arms.record(problem, config.seed, behaviors_of(arm), SCALE.letters) for problem in problems]


def prompt_rows(config: Toy, problems: list[Problem]) -> list[dict]:
    return [arms.record(problem, config.seed, None, SCALE.letters) for problem in problems]


def sft_config(config: Toy, out: Path, arm: str) -> train_sft.Config:
    return train_sft.Config(
        model=config.base, data=str(out / f"sft_{arm}.jsonl"), out=str(out / f"sft_{arm}"), epochs=config.sft_epochs,
        batch_size=SFT_BATCH, micro_tokens=8192, learning_rate=config.sft_learning_rate, schedule="cosine", warmup=10,
        max_length=1024, save_every=25, log_every=25, resume=True, seed=config.seed, device="cpu")


def rl_config(config: Toy, out: Path, arm: str) -> train_rl.Config:
    return train_rl.Config(
        model=str(out / f"sft_{arm}" / "model"), data=str(out / "rl.jsonl"), out=str(out / f"rl_{arm}"),
        steps=config.rl_steps, prompts=config.rl_prompts, samples=config.rl_samples, warmup=5, schedule="cosine",
        learning_rate=config.rl_learning_rate, kl_coef=0.0, entropy_coef=0.0, max_prompt=MAX_PROMPT,
        max_new_tokens=config.max_new_tokens, rows=128, micro_tokens=8192, save_every=10, resume=True,
        seed=config.seed, device="cpu")


def answer_tests(config: Toy, out: Path, name: str):
    """Answers of one model to both test sets: the greedy ones, and those it gives at the temperature RL trains it at."""
    settings = {"greedy": {}, "sampled": {"samples": config.test_samples, "temperature": 1.0, "seed": config.seed}}
    for which, decoding in itertools.product(TESTS, results.DECODINGS):
        answers = out / f"{name}_{which}_{decoding}.jsonl"
        if announce_if_missing(answers, f"test of {name}, {which}, {decoding}"):
            write_jsonl(answers, evaluate.sample(evaluate.Config(
                model=str(out / name / "model"), data=str(out / f"test_{which}.jsonl"), max_new_tokens=config.max_new_tokens,
                rows=400, device="cpu", **settings[decoding])))


def write_results(config: Toy) -> str:
    """results.csv, curves.csv and table.md; returns the latter."""
    runs = [(one.seed, Path(one.out)) for one in config.one_seed_each]
    found = [outcome for seed, folder in runs for outcome in results.outcomes(seed, folder, config.names, list(TESTS))]
    text = results.table(found, {test: getattr(config, ops) for test, ops in TESTS.items()})
    out = Path(config.out)
    tables.write(out / "results.csv", [row for outcome in found for row in outcome.rows()])
    tables.write(out / "curves.csv", results.curves(runs, config.names))
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    return text


@dataclass(frozen=True)
class Replication(Toy):
    """The settings of the table in docs/results.md."""
    out: str = option("runs/replication", "run folder")
    arms: str = option("vanilla,bridge,pp-aug,rc-aug", "arms of gen_data.py; NAME@P is its strict form with probability P")
    seeds: int = option(3, "how often all is done, with the seeds from --seed on", least=1, most=1000)
    rl_steps: int = option(60, "rollout batches", least=1)
    test_problems: int = option(600, "problems of each test set", least=2)


COMMANDS = {"toy": (main_toy, Toy), "replication": (main_toy, Replication)}

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
