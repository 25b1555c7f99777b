"""The paper's comparison from an empty folder to its table, at toy scale.

    python -m minibridge.reproduce toy      problems -> SFT (vanilla, BRIDGE) -> GRPO -> accuracy before and after
    python -m minibridge.reproduce base     makes the toy base model anew, into --out (an hour and a half of two cores); it
                                            comes with the package, in minibridge/toy_base

What is shrunk: three and four operations in SFT and six in RL, where the paper has fifteen to twenty in both (but, in its
arithmetic task, an SFT on easier problems than RL); no quantity that is not needed, four small categories of one-word
names, which formulas use as they are (no letters), values below 50, no KL and no entropy term, a Qwen2-shaped model of a
million parameters. The part of the pretrained model is played by one trained from scratch on other problems of three to six
operations, solved in bare equations, half of the smallest ones in the words of vanilla answers: it has seen no injected
behavior and no problem structure of the SFT, RL, validation or test splits. What is not shrunk: every stage.

A stage whose result lies in the run folder is not run again, and training goes on from its newest checkpoint, so an
interrupted run is continued by the same command.
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
from minibridge import arms, checkpoint, evaluate, igsm, results, splits, tables, traces
from minibridge.config import InputError, Run, option, run_command, same_settings, write_jsonl
from minibridge.dag import Problem
from minibridge.model import Decoder, ModelConfig
from minibridge.optim import open_model, prompt_limit
from minibridge.tokenizer import Tokenizer, train_toy

TOY_BASE = Path(__file__).parent / "toy_base"
SCALE = replace(igsm.TOY, redundant=0, letters="")  # of all toy problems, those of the base too
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
    workers: int = option(1, "processes, each for an arm of a seed at a time; they share the threads", least=1, most=256)
    sft_ops: tuple[int, int] = option((3, 4), "operations of the SFT problems")
    ops: tuple[int, int] = option((6, 6), "operations of the RL and in-distribution test problems")
    ood_ops: tuple[int, int] = option((7, 7), "operations of the out-of-distribution test problems")
    sft_rows: int = option(800, "SFT examples of each arm", least=SFT_BATCH)
    sft_epochs: float = option(1.0, "passes over them", least=1, most=1e6)
    sft_learning_rate: float = option(1e-3, "peak, then a cosine", least=0)
    rl_steps: int = option(50, "rollout batches", least=1)
    rl_prompts: int = option(16, "prompts of a rollout batch", least=1)
    rl_samples: int = option(8, "answers sampled for each prompt", least=2)
    rl_learning_rate: float = option(1.5e-4, "peak, after five steps of warm-up, then a cosine", least=0)
    test_problems: int = option(600, "problems of each test set", least=2)
    test_samples: int = option(2, "answers to each at temperature 1, beside the greedy one", least=1)
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
    same_settings(out, config, but=("out", "workers"))
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


# --- base: the model the comparison starts from --------------------------------------------------------------

BASE_ROWS = {3: 40_000, 4: 50_000, 5: 70_000, 6: 90_000}  # problems by op count
WORDED = (3, 4)  # op counts of which every other answer is a vanilla one, the others bare equations
BASE_MODEL = {"model_type": "qwen2", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5,
              "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10_000.0, "rms_norm_eps": 1e-6,
              "max_position_embeddings": 1024, "tie_word_embeddings": True}


@dataclass(frozen=True)
class Base:
    out: str = option("runs/base", "run folder; the model is in its folder toy_base")
    epochs: float = option(1.0, "passes over the 249,600 examples")


def main_base(config: Base):
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "train.jsonl").exists():
        parts = [base_rows(ops, rows) for ops, rows in BASE_ROWS.items()]
        write_jsonl(out / "val.jsonl", [row for part in parts for row in part[-100:]])
        write_jsonl(out / "train.jsonl", [row for part in parts for row in part[:-100]])
    if not (out / "init").exists():
        tokenizer = base_tokenizer()
        rows = -(-tokenizer.vocab_size // 64) * 64
        model = Decoder(ModelConfig.from_hf({**BASE_MODEL, "vocab_size": rows}))
        # 0.02 is for wide models: at 128 it leaves attention nearly flat, and copying is learned late (docs/log.md).
        model.init_weights(torch.Generator().manual_seed(0), std=0.08)
        checkpoint.save(model, out / "init", tokenizer)
    train_sft.main(train_sft.Config(
        model=str(out / "init"), data=str(out / "train.jsonl"), val=str(out / "val.jsonl"), out=str(out / "sft"),
        epochs=config.epochs, batch_size=16, micro_tokens=8192, learning_rate=1.5e-3, schedule="cosine", warmup=100,
        max_length=1024, eval_every=500, save_every=500, log_every=50, resume=True))
    trained = out / "sft" / "model"
    checkpoint.save(checkpoint.load(trained), out / "toy_base", Tokenizer.load(trained), dtype=torch.float16)


def base_rows(ops: int, rows: int) -> list[dict]:
    lines = []
    for number, problem in enumerate(splits.problems("base", rows, (ops, ops), SCALE, seed=0, balance=0.1, workers=2)):
        line = arms.record(problem, 0, traces.VANILLA, SCALE.letters)
        if ops not in WORDED or number % 2:
            line["messages"][-1]["content"] = traces.equations(problem)
        lines.append(line)
    return lines


def base_tokenizer():
    """Trained on every wording of the answers to come: a tokenizer is no knowledge of them, and without it their
    sentences would fall into letters."""
    rows = [arms.record(problem, 0, traces.Behaviors(subgoal=True, analysis=4, reflection=0.5), igsm.TOY.letters)
            for problem in splits.problems("base", 2000, (4, 5), SCALE, seed=0, balance=0.1)]
    return train_toy([f"{m['role']}\n{m['content']}" for row in rows for m in row["messages"]], vocab_size=1024)


COMMANDS = {"toy": (main_toy, Toy), "base": (main_base, Base)}

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
