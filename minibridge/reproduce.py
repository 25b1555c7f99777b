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
import csv
import itertools
import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import gen_data
import train_rl
import train_sft
from minibridge import arms, checkpoint, evaluate, igsm, splits, traces
from minibridge.config import Run, option, read_jsonl, run_command, same_settings, write_jsonl
from minibridge.model import Decoder, ModelConfig
from minibridge.optim import open_model, prompt_limit
from minibridge.tokenizer import Tokenizer, train_toy

TOY_BASE = Path(__file__).parent / "toy_base"
ARMS = ("vanilla", "bridge")
SCALE = replace(igsm.TOY, redundant=0, letters="")  # of all toy problems, those of the base too
TESTS = {"id": "ops", "ood": "ood_ops"}  # the test sets, and the settings that hold their op ranges
DECODINGS = ("greedy", "sampled")
SFT_BATCH, MAX_PROMPT = 32, 400  # rows of an SFT step; tokens of a prompt


@dataclass(frozen=True)
class Toy:
    """One line a stage; see train_sft.py and train_rl.py for what the numbers mean."""
    out: str = option("runs/toy", "run folder")
    base: str = option(str(TOY_BASE), "Hugging Face folder of the base model")
    seed: int = option(0, "seed of problems, training and sampling", least=0)
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


# --- toy: the comparison -------------------------------------------------------------------------------------


def main_toy(config: Toy):
    out = Path(config.out)
    same_settings(out, config, but=("out",))
    base, _ = open_model(config.base, torch.device("cpu"), "auto")  # what cannot work is an error now
    prompt_limit(base, MAX_PROMPT, config.max_new_tokens)
    run = Run(out, config)  # before any file of this seed, so that another seed's cannot join them
    make_data(config, out)
    for arm in ARMS:
        if announce_if_missing(out / f"sft_{arm}" / "model", f"SFT, {arm}"):
            train_sft.main(sft_config(config, out, arm))
        if announce_if_missing(out / f"rl_{arm}" / "model", f"GRPO, {arm}"):
            train_rl.main(rl_config(config, out, arm))
        for stage in ("sft", "rl"):
            answer_tests(config, out, f"{stage}_{arm}")
    text = results_table(config, out)
    (out / "table.md").write_text(text + "\n", encoding="utf-8")
    write_curves(out)
    run.finish()
    print(f"\n{text}\n\nwritten: {out / 'table.md'}, {out / 'curves.csv'}; {run.record['seconds']:.0f} s")


def announce_if_missing(path: Path, title: str) -> bool:
    if not path.exists():
        print(f"\n=== {title}", flush=True)
    return not path.exists()


def make_data(config: Toy, out: Path):
    """Both arms get the same SFT problems. No answer is more frequent than 5%, so that none is a shortcut."""
    sets = [("sft", config.sft_ops, config.sft_rows, {f"sft_{arm}": arms.ARMS[arm] for arm in ARMS}),
            ("rl", config.ops, config.rl_steps * config.rl_prompts, {"rl": None})]
    sets += [("test", getattr(config, ops), config.test_problems, {f"test_{name}": None}) for name, ops in TESTS.items()]
    for split, ops, rows, files in sets:
        if all((out / f"{name}.jsonl").exists() for name in files):
            continue
        drawn = splits.problems(split, rows, ops, SCALE, config.seed, balance=0.05)
        for name, behaviors in files.items():
            write_jsonl(out / f"{name}.jsonl", [arms.record(problem, config.seed, behaviors, SCALE.letters)
                                                for problem in drawn])
    print(gen_data.summary(read_jsonl(out / "sft_bridge.jsonl")), flush=True)


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
    for which, decoding in itertools.product(TESTS, DECODINGS):
        answers = out / f"{name}_{which}_{decoding}.jsonl"
        if announce_if_missing(answers, f"test of {name}, {which}, {decoding}"):
            write_jsonl(answers, evaluate.sample(evaluate.Config(
                model=str(out / name / "model"), data=str(out / f"test_{which}.jsonl"), max_new_tokens=config.max_new_tokens,
                rows=400, device="cpu", **settings[decoding])))


def results_table(config: Toy, out: Path) -> str:
    """The table of the paper: accuracy in % before and after RL, and the gain with its 95% interval, from paired
    differences over problems (one seed: the spread over seeds is not in it). The paper's is the greedy accuracy; RL raises
    the expected accuracy of sampled answers, so that stands beside it."""
    lines = ["| arm | test | answers | after SFT | after RL | RL gain | 95% interval | answer not 0, gain | tokens |",
             "|---|---|---|---|---|---|---|---|---|"]
    for which, setting in TESTS.items():
        low, high = getattr(config, setting)
        ops = f"{which}, {low} ops" if low == high else f"{which}, {low}-{high} ops"
        for decoding, arm in itertools.product(DECODINGS, ARMS):
            paths = [str(out / f"{stage}_{arm}_{which}_{decoding}.jsonl") for stage in ("sft", "rl")]
            before, after = map(evaluate.rescore, paths)
            gain, reach = paired_gain(before, after)
            nonzero = paired_gain(*([p for p in tested if p.answer != "0"] for tested in (before, after)))[0]
            lengths = [sum(len(line["ids"]) for line in rows) / len(rows) for rows in map(read_jsonl, paths)]
            share = evaluate.accuracy(before), evaluate.accuracy(after)
            lines.append(f"| {arm} | {ops} | {decoding} | {share[0]:.1%} | {share[1]:.1%} "
                         f"| {gain:+.1%} | {gain - reach:+.1%} to {gain + reach:+.1%} | {nonzero:+.1%} "
                         f"| {lengths[0]:.0f} -> {lengths[1]:.0f} |")
        constant, luck = evaluate.best_constant(before)
        lines.append(f"| always {constant} | {ops} | | {luck:.1%} | | | | | |")
    return "\n".join(lines)


def paired_gain(before: list[evaluate.Scored], after: list[evaluate.Scored]) -> tuple[float, float]:
    """Mean change in accuracy over the same problems, and the half width of its 95% interval."""
    changes = [evaluate.accuracy([b]) - evaluate.accuracy([a]) for a, b in zip(before, after, strict=True)]
    mean = sum(changes) / len(changes)
    variance = sum((change - mean) ** 2 for change in changes) / (len(changes) - 1)
    return mean, 1.96 * math.sqrt(variance / len(changes))


def write_curves(out: Path):
    """The training curves of both arms, one row a step, for a spreadsheet or a plot."""
    names = ("accuracy", "length", "common_answer", "dead_groups", "entropy", "grad_norm")
    with open(out / "curves.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("arm", "step", *names))
        for arm in ARMS:
            for line in read_jsonl(out / f"rl_{arm}" / "metrics.jsonl"):
                writer.writerow((arm, line["step"], *(line[name] for name in names)))


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
