"""The paper's comparison from an empty folder to its table: problems -> SFT of each arm -> GRPO -> accuracy.

    python -m minibridge.reproduce toy                             vanilla and BRIDGE, on the toy base model
    python -m minibridge.reproduce replication                     more arms, seeds and steps: the table of docs/results.md
    python -m minibridge.reproduce small --base FOLDER             problems of the paper, the small model of `pretrain`
    python -m minibridge.reproduce qwen2.5-1.5b --base FOLDER      as in the paper; also qwen2.5-3b and llama-3.2-1b
    python -m minibridge.reproduce qwen2.5-1.5b --base FOLDER --task arithmetic --max-prompt 2048      its other task

`--plan` prints what SFT and RL would take, and stops. What is shrunk in `toy` and `replication`: four to six operations in
SFT and six in RL, where the paper has fifteen to twenty in both; no quantity that is not needed, four small categories of
one-word names, which formulas use as they are (no letters), values below 50, no KL and no entropy term, and a Qwen2-shaped
model of a million parameters, whose pretraining is `pretrain`. What is not shrunk: every stage.

A stage whose result lies in the run folder is not run again, and training goes on from its newest checkpoint, so an
interrupted run is continued by the same command; it may then name more arms or seeds.
"""
import dataclasses
import hashlib
import itertools
import shlex
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import train_rl
import train_sft
from minibridge import arms, checkpoint, evaluate, igsm, plan, results, splits, tables, traces
from minibridge.config import InputError, option, read_json, read_jsonl, run_command, write_jsonl, write_whole
from minibridge.dag import Problem
from minibridge.data import Example, load_prompts, load_sft, micro_batches
from minibridge.jobs import side_by_side
from minibridge.opening import add_files, model_files, pick_device
from minibridge.run_folder import Run, same_settings
from minibridge.tokenizer import Tokenizer

TOY_BASE = Path(__file__).parent / "toy_base"
MAY_CHANGE = ("out", "base", "workers", "arms", "seeds", "rows", "micro_tokens", "checkpointing", "plan")
IGSM_SIZES, ARITHMETIC_SIZES = ("sft_ops", "ops", "rl_ops", "ood_ops"), ("sft_depth", "depth", "redundant", "ood_redundant")


@dataclass(frozen=True)
class Experiment:
    """The defaults are those of `toy`; see train_sft.py and train_rl.py for what the numbers mean."""
    out: str = option("runs/toy", "run folder")
    base: str | None = option(str(TOY_BASE), "Hugging Face folder of the base model")
    arms: str = option("vanilla,bridge", "arms of gen_data.py; NAME@P is its strict form with probability P")
    seed: int = option(0, "seed of problems, training and sampling", least=0)
    seeds: int = option(1, "how often all is done, with the seeds from --seed on", least=1, most=1000)
    workers: int = option(2, "processes, each for an arm of a seed at a time; they share the threads", least=1, most=256)
    task: Literal["igsm", "arithmetic", "arithmetic-int"] = option("igsm", "of gen_data.py; toy_base knows the first alone")
    sft_depth: int = option(splits.DEPTHS["sft"], "arithmetic: levels of the SFT problems' trees", least=2, most=6)
    depth: int = option(splits.DEPTHS["rl"], "arithmetic: levels of all other trees", least=2, most=6)
    redundant: tuple[int, int] = option(splits.REDUNDANT, "arithmetic: unneeded premises, two or three sentences each")
    ood_redundant: tuple[int, int] = option((20, 22), "arithmetic: those of the out-of-distribution test")
    problems: Literal["toy", "paper"] = option("toy", "iGSM of small worlds, nothing redundant; or as in the paper")
    sft_ops: tuple[int, int] = option((4, 6), "operations of the SFT problems")
    ops: tuple[int, int] = option((6, 6), "operations of the in-distribution test problems")
    rl_ops: tuple[int, int] = option((6, 6), "operations of the RL problems")
    ood_ops: tuple[int, int] = option((7, 7), "operations of the out-of-distribution test problems")
    sft_rows: int = option(1600, "SFT examples of each arm", least=1)
    sft_epochs: float = option(1.0, "passes over them", least=1e-6, most=1e6)
    sft_batch: int = option(32, "examples of an SFT step", least=1)
    sft_learning_rate: float = option(5e-4, "peak", least=0)
    rl_steps: int = option(40, "rollout batches", least=1)
    rl_prompts: int = option(16, "prompts of a rollout batch", least=1)
    rl_samples: int = option(8, "answers sampled for each prompt", least=2)
    rl_learning_rate: float = option(1.5e-4, "peak", least=0)
    schedule: Literal["cosine", "constant"] = option("cosine", "cosine: after 10 steps of warm-up in SFT, 5 in RL")
    kl_coef: float = option(0.0, "weight of the KL term", least=0)
    kl_threshold: float | None = option(None, "drop rollouts whose mean k3 reaches this", least=0)
    entropy_coef: float = option(0.0, "weight of the entropy bonus")
    clip: float = option(1.0, "largest gradient norm in RL", least=1e-6)
    format_scale: float = option(0.0, "extra reward of a well-formed answer", least=0)
    as_authors: bool = option(False, "as the authors' trainer does in effect: SFT on the whole chat, long examples cut, "
                              "RL's gradient clipped at 8 times --clip")
    val_problems: int = option(0, "problems for RL's validation every 5 steps (iGSM: 21 to 25 operations)", least=0)
    test_problems: int = option(400, "problems of each test set", least=2)
    test_samples: int = option(1, "answers to each at temperature 1, beside the greedy one", least=1)
    max_prompt: int = option(400, "longest prompt, in tokens", least=1)
    max_new_tokens: int = option(320, "longest answer, in tokens", least=1)
    max_length: int = option(1024, "longest SFT example, in tokens", least=1)
    rows: int = option(128, "answers decoded at the same time", least=1)
    micro_tokens: int = option(8192, "most tokens trained at a time, as if padded", least=1)
    checkpointing: bool = option(False, "keep only the input of each layer for the backward pass: less memory, more time")
    device: str = option("cpu", "cpu, cuda, cuda:1, ...")
    plan: bool = option(False, "print the memory and time that SFT and RL would take, and stop")

    @property
    def names(self) -> list[str]:
        return self.arms.split(",")

    @property
    def one_seed_each(self) -> list["Experiment"]:
        return [replace(self, out=str(Path(self.out) / f"seed_{seed}"), seed=seed, seeds=1)
                for seed in range(self.seed, self.seed + self.seeds)]

    @property
    def tests(self) -> dict[str, tuple[int, int]]:
        """The test sets, and the sizes by which they differ: operations, or in arithmetic unneeded premises."""
        id_, ood = (self.ops, self.ood_ops) if self.task == "igsm" else (self.redundant, self.ood_redundant)
        return {"id": id_, "ood": ood}

    @property
    def scale(self) -> igsm.Scale:
        return igsm.PAPER if self.problems == "paper" else igsm.TOY


def setting(**defaults) -> type[Experiment]:
    """Experiment with other defaults."""
    known = {field.name: field for field in dataclasses.fields(Experiment)}
    changed = [(name, known[name].type, dataclasses.field(default=value, metadata=known[name].metadata))
               for name, value in defaults.items()]
    namespace = {"__module__": __name__}  # whose first lines --help shows
    return dataclasses.make_dataclass("Setting", changed, bases=(Experiment,), frozen=True, namespace=namespace)


PAPER = dict(base=None, problems="paper", sft_ops=(15, 20), ops=(20, 20), rl_ops=(15, 20), ood_ops=(25, 25), sft_rows=2000,
             sft_epochs=5.0, sft_batch=128, sft_learning_rate=5e-6, rl_steps=200, rl_prompts=32, rl_samples=32,
             rl_learning_rate=1e-6, schedule="constant", kl_coef=0.001, entropy_coef=0.001, val_problems=500,
             test_problems=500, max_prompt=1024, max_new_tokens=2560, max_length=2048, rows=256, device="auto", workers=1)
SETTINGS = {
    "toy": Experiment,
    "replication": setting(out="runs/replication", arms="vanilla,bridge,pp-aug,rc-aug", seeds=3, rl_steps=60,
                           test_problems=600),
    "small": setting(**PAPER | dict(
        out="runs/small", sft_learning_rate=3e-4, rl_steps=100, rl_learning_rate=5e-5, schedule="cosine", kl_coef=0.0,
        entropy_coef=0.0, val_problems=0, max_new_tokens=1200)),
    "qwen2.5-1.5b": setting(**PAPER | dict(out="runs/qwen2.5-1.5b")),
    "qwen2.5-3b": setting(**PAPER | dict(out="runs/qwen2.5-3b", rl_steps=100)),
    "llama-3.2-1b": setting(**PAPER | dict(out="runs/llama-3.2-1b", kl_coef=0.01, kl_threshold=0.15, entropy_coef=0.0,
                                           clip=0.2, format_scale=0.05))}


# --- the whole -----------------------------------------------------------------------------------------------


def main(config: Experiment):
    check_task(config)
    config, out = Experiment(**dataclasses.asdict(config)), Path(config.out)  # a preset's own class cannot be pickled
    check(config)
    if config.plan:
        return print_plans(config)
    # before any file of these seeds, so that others' cannot join them
    run = Run(out, config, pick_device(config.device), base=base_mark(config, out))
    for one in config.one_seed_each:
        make_data(one)
        check_data(one)
    jobs = [(one, arm) for one in config.one_seed_each for arm in config.names]
    if config.workers == 1:
        for job in jobs:
            run_arm(*job)
    else:
        side_by_side(run_arm, jobs, config.workers)
    text = write_results(config)
    run.finish()
    print(f"\n{text}\n\nwritten: table.md, results.csv, gains.csv, curves.csv in {out}; {run.record['seconds']:.0f} s")
    answers = Path(config.one_seed_each[0].out) / f"rl_{config.names[-1]}_id_greedy.jsonl"
    print(f"a lesson: docs/lesson.md; an answer step by step: python -m minibridge.show --data {shlex.quote(str(answers))}")


def check_task(config: Experiment):
    """InputError for a size of the other task's problems, which nothing would read."""
    idle = ARITHMETIC_SIZES if config.task == "igsm" else IGSM_SIZES
    for field in dataclasses.fields(config):
        if field.name in idle and getattr(config, field.name) != field.default:
            raise InputError(f"{field.name}: does not apply to task {config.task}")


def check(config: Experiment):
    """InputError for what would fail only after hours, or after the run folder's settings are written."""
    same_settings(Path(config.out), config, but=MAY_CHANGE)
    pick_device(config.device)
    if config.base is None:
        raise InputError("base: give the folder of a base model")
    train_rl.recipe_of(rl_config(config, Path(config.out), config.names[0]))
    if len({arm if arm in arms.AUGMENTED else behaviors_of(arm) for arm in config.names}) < len(config.names):
        raise InputError(f"arms: {config.arms} names one twice")
    if config.sft_batch > config.sft_rows:
        raise InputError(f"sft_batch: {config.sft_batch} examples of a step, but sft_rows is {config.sft_rows}")
    base = checkpoint.outline(config.base)
    Tokenizer.load(config.base)
    for name, needed in (("max_prompt", config.max_prompt + config.max_new_tokens), ("max_length", config.max_length)):
        if needed > base.config.max_position_embeddings:
            raise InputError(f"{name}: {needed} tokens in all, but the base has positions for "
                             f"{base.config.max_position_embeddings}")
    for which in ("sft", "rl", *config.tests):
        try:
            draw(config, which, 1)
        except InputError as error:
            raise InputError(f"{which} problems: {error}") from None


def check_data(config: Experiment):
    """InputError for rows longer than the settings allow, which training would find after hours."""
    out, tokenizer = Path(config.out), Tokenizer.load(config.base)
    for arm in config.names:
        micro_batches(load_sft(out / f"sft_{arm}.jsonl", tokenizer, config.max_length, truncate=config.as_authors),
                      config.micro_tokens)
    for name in (*(f"test_{test}" for test in config.tests), *["val"] * bool(config.val_problems), "rl"):
        prompts = load_prompts(out / f"{name}.jsonl", tokenizer, config.max_prompt)
    plan.check_answer_fits(config, max(len(prompt.ids) for prompt in prompts), seen=True)


def base_mark(config: Experiment, out: Path) -> str:
    """SHA-256 of the base: its weights, shape and tokenizer. InputError if the run folder began with another."""
    digest = hashlib.sha256()
    add_files(digest, model_files(Path(config.base)))
    if (out / "run.json").exists() and read_json(out / "run.json").get("base") != digest.hexdigest():
        raise InputError(f"{out}: began with another base than {config.base}; choose another --out")
    return digest.hexdigest()


def print_plans(config: Experiment):
    """As if every prompt and example were as long as is allowed."""
    where = Path(config.out), config.names[0]
    longest = Example([0] * config.max_length, [1] * config.max_length)
    print(f"=== SFT\n{plan.sft(sft_config(config, *where), [longest] * config.sft_rows, loaded=False)}\n")
    print(f"=== RL\n{plan.rl(replace(rl_config(config, *where), model=config.base))}\n")
    print(f"Of one arm and seed, without the tests; there are {len(config.names)} arms and {config.seeds} seeds.")


def behaviors_of(arm: str) -> traces.Behaviors:
    found = arms.behaviors_of(arm)
    if found is None:
        raise InputError(f"arms: {arm!r} has no answers to train on")
    return found


def run_arm(config: Experiment, arm: str):
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


def make_data(config: Experiment):
    """All arms get as many SFT rows, of the same problems; those that write a problem four times get the first quarter of
    them. No answer of the toy's is more frequent than 5%, so that none is a shortcut."""
    out, prompts = Path(config.out), partial(rows, config, None)
    sets = [("sft", config.sft_rows, {f"sft_{arm}": partial(rows, config, arm) for arm in config.names}),
            ("rl", config.rl_steps * config.rl_prompts, {"rl": prompts})]
    sets += [("val", config.val_problems, {"val": prompts})] * bool(config.val_problems)
    sets += [(name, config.test_problems, {f"test_{name}": prompts}) for name in config.tests]
    for which, count, files in sets:
        if missing := [name for name in files if not (out / f"{name}.jsonl").exists()]:
            drawn = draw(config, which, count)
            for name in files.keys() - missing:
                check_same(out / f"{name}.jsonl", drawn)
            for name in missing:
                write_jsonl(out / f"{name}.jsonl", files[name](drawn))


def check_same(path: Path, drawn: list[Problem]):
    """InputError for a file of an arm trained before whose problems are others than those of an arm added now."""
    ids = list(dict.fromkeys(row.get("id") for row in read_jsonl(path)))
    if ids != [problem.id for problem in drawn[:len(ids)]]:
        raise InputError(f"{path}: other problems than are drawn now, as by another version; choose another --out")


def draw(config: Experiment, which: str, count: int) -> list[Problem]:
    """Problems for "sft", "rl", "val" or one of the tests."""
    split, balance = "test" if which in config.tests else which, 1.0 if config.problems == "paper" else 0.05
    if config.task == "igsm":
        ops = {"sft": config.sft_ops, "rl": config.rl_ops, "val": (21, 25), **config.tests}[which]
        return splits.problems(split, count, ops, config.scale, config.seed, balance)
    depth = config.sft_depth if which == "sft" else config.depth
    redundant = config.tests.get(which, config.redundant)
    return splits.arithmetic_problems(split, count, config.task, depth, redundant, config.seed, balance)


def rows(config: Experiment, arm: str | None, problems: list[Problem]) -> list[dict]:
    """Of an SFT file; without an arm, prompts."""
    if arm in arms.AUGMENTED:
        first = problems[:-(-len(problems) // arms.FORMS)]
        return [row for problem in first
                for row in arms.augmented(arm, problem, config.seed, config.scale.letters)][:len(problems)]
    behaviors = None if arm is None else behaviors_of(arm)
    return [arms.record(problem, config.seed, behaviors, config.scale.letters) for problem in problems]


def sft_config(config: Experiment, out: Path, arm: str) -> train_sft.Config:
    return train_sft.Config(
        model=config.base, data=str(out / f"sft_{arm}.jsonl"), out=str(out / f"sft_{arm}"), epochs=config.sft_epochs,
        batch_size=config.sft_batch, learning_rate=config.sft_learning_rate, schedule=config.schedule,
        warmup=10 * (config.schedule == "cosine"), max_length=config.max_length, truncate=config.as_authors,
        whole_chat=config.as_authors, save_every=25, log_every=25, resume=True, seed=config.seed,
        micro_tokens=config.micro_tokens, checkpointing=config.checkpointing, device=config.device)


def rl_config(config: Experiment, out: Path, arm: str) -> train_rl.Config:
    return train_rl.Config(
        model=str(out / f"sft_{arm}" / "model"), data=str(out / "rl.jsonl"), out=str(out / f"rl_{arm}"),
        val=str(out / "val.jsonl") if config.val_problems else None, steps=config.rl_steps, prompts=config.rl_prompts,
        samples=config.rl_samples, learning_rate=config.rl_learning_rate, schedule=config.schedule,
        warmup=5 * (config.schedule == "cosine"), kl_coef=config.kl_coef, kl_threshold=config.kl_threshold,
        entropy_coef=config.entropy_coef, clip=config.clip * (8 if config.as_authors else 1),
        format_scale=config.format_scale, max_prompt=config.max_prompt, max_new_tokens=config.max_new_tokens,
        rows=config.rows, save_every=10, resume=True, seed=config.seed, micro_tokens=config.micro_tokens,
        checkpointing=config.checkpointing, device=config.device)


def answer_tests(config: Experiment, out: Path, name: str):
    """Answers of one model to both test sets: the greedy ones, and those it gives at the temperature RL trains it at."""
    settings = {"greedy": {}, "sampled": {"samples": config.test_samples, "temperature": 1.0, "seed": config.seed}}
    for which, decoding in itertools.product(config.tests, results.DECODINGS):
        answers = out / f"{name}_{which}_{decoding}.jsonl"
        if announce_if_missing(answers, f"test of {name}, {which}, {decoding}"):
            write_jsonl(answers, evaluate.sample(evaluate.Config(
                model=str(out / name / "model"), data=str(out / f"test_{which}.jsonl"), max_new_tokens=config.max_new_tokens,
                max_prompt=config.max_prompt, rows=config.rows, device=config.device, **settings[decoding])))
            print(f"accuracy {evaluate.accuracy(evaluate.rescore(str(answers))):.1%}", flush=True)


def write_results(config: Experiment) -> str:
    """results.csv, gains.csv, curves.csv and table.md; returns the latter."""
    runs, out = [(one.seed, Path(one.out)) for one in config.one_seed_each], Path(config.out)
    unit = "ops" if config.task == "igsm" else "unneeded"
    tests = {test: results.title(test, sizes, unit) for test, sizes in config.tests.items()}
    found = [outcome for seed, folder in runs for outcome in results.outcomes(seed, folder, config.names, tests)]
    text = results.table(found)
    tables.write(out / "results.csv", [row for outcome in found for row in outcome.rows()])
    tables.write(out / "gains.csv", results.gains(found))
    tables.write(out / "curves.csv", results.curves(runs, config.names))
    write_whole(out / "table.md", text + "\n")
    return text


COMMANDS = {name: (main, chosen) for name, chosen in SETTINGS.items()}

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
