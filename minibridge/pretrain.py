"""The base model of the comparison, from random weights: the part that a pretrained model plays in the paper.

    python -m minibridge.pretrain --out runs/base     some hours on two cores
    python -m minibridge.pretrain --size small --out runs/small_base --device cuda

`toy`, a million parameters, is trained in three stages on worked answers to problems of three to six operations:

    equations   bare equations; half of the smallest problems in the words of vanilla answers
    words       both at every size
    styles      a fifth bare equations, the others in any mix of the three behaviors, equally often

So the base has seen restatements, subgoals and failed attempts, as a model pretrained on much text has, and SFT on any arm
chooses among styles that it knows. `small`, 14 million, has the last stage alone, on problems of the paper with three to
fourteen operations. No problem has a structure of the SFT, RL, validation or test splits. (minibridge/toy_base is of an
earlier version, for which that does not quite hold: README.md.)
"""
import itertools
import string
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import train_sft
from minibridge import arms, checkpoint, igsm, splits, traces
from minibridge.config import option, run_main, write_jsonl
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.opening import pick_device
from minibridge.run_folder import Run, same_settings
from minibridge.tokenizer import Tokenizer, train_toy

MIXES = [traces.Behaviors(*mix) for mix in itertools.product((False, True), (0, 2), (0.0, 0.1))]

Style = Callable[[int, int], traces.Behaviors | None]  # of operations and number of a problem; None: bare equations


def mostly_equations(ops: int, number: int) -> traces.Behaviors | None:
    return traces.VANILLA if ops in (3, 4) and number % 2 == 0 else None


def half_words(ops: int, number: int) -> traces.Behaviors | None:
    return traces.VANILLA if number % 2 == 0 else None


def all_styles(ops: int, number: int) -> traces.Behaviors | None:
    five, place = divmod(number, 5)
    return None if place == 4 else MIXES[five % 2 * 4 + place]


@dataclass(frozen=True)
class Stage:
    name: str
    rows: dict[int, int]  # problems by op count; the last 100 of each are held out
    style: Style
    learning_rate: float
    warmup: int


@dataclass(frozen=True)
class Size:
    model: dict  # of config.json
    vocabulary: int
    std: float  # of the first weights
    scale: igsm.Scale
    balance: float
    stages: tuple[Stage, ...]
    batch: int
    micro_tokens: int


FEW = {3: 4_000, 4: 8_000, 5: 20_000, 6: 26_000}
SHARED = {"model_type": "qwen2", "rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}
SIZES = {
    "toy": Size(
        SHARED | {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 5, "num_attention_heads": 4,
                  "num_key_value_heads": 2, "max_position_embeddings": 1024},
        # 0.02 is for wide models: at 128 it leaves attention nearly flat, and copying is learned late (docs/log.md).
        1024, 0.08, igsm.TOY, 0.1,
        (Stage("equations", {3: 40_000, 4: 50_000, 5: 70_000, 6: 90_000}, mostly_equations, 1.5e-3, 100),
         Stage("words", FEW, half_words, 1e-3, 50), Stage("styles", FEW, all_styles, 1e-3, 50)), 16, 8192),
    "small": Size(
        SHARED | {"hidden_size": 384, "intermediate_size": 1152, "num_hidden_layers": 8, "num_attention_heads": 6,
                  "num_key_value_heads": 2, "max_position_embeddings": 4096},
        1024, 0.04, igsm.PAPER, 1.0,
        (Stage("styles", {ops: 20_000 for ops in range(3, 15)}, all_styles, 1e-3, 200),), 64, 65_536)}


@dataclass(frozen=True)
class Config:
    out: str = option("runs/base", "run folder; the model is in its folder toy_base or small_base")
    size: Literal["toy", "small"] = option("toy", "which model")
    epochs: float = option(1.0, "passes over the examples of each stage", least=1e-6, most=1e6)
    share: float = option(1.0, "share of the examples that is drawn", least=1e-6, most=1)
    workers: int = option(2, "processes that draw problems", least=1, most=256)
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


def main(config: Config):
    size, out = SIZES[config.size], Path(config.out)
    device = pick_device(config.device)  # InputError now, and not when all problems are drawn
    same_settings(out, config, but=("out", "workers"))
    run, start = Run(out, config, device=device), out / "init"
    if not start.exists():
        tokenizer = shared_tokenizer(size)
        model = Decoder(ModelConfig.from_hf({**size.model, "vocab_size": -(-tokenizer.vocab_size // 64) * 64}))
        model.init_weights(torch.Generator().manual_seed(0), size.std)
        checkpoint.save(model, start, tokenizer)
    for seed, stage in enumerate(size.stages):
        folder = out / stage.name
        if not (folder / "train.jsonl").exists():
            rows = {ops: max(100 + size.batch, round(config.share * count)) for ops, count in stage.rows.items()}
            parts = [examples(size, stage, ops, count, seed, config.workers) for ops, count in rows.items()]
            write_jsonl(folder / "val.jsonl", [row for part in parts for row in part[-100:]])
            write_jsonl(folder / "train.jsonl", [row for part in parts for row in part[:-100]])
        print(f"\n=== {stage.name}", flush=True)
        train_sft.main(train_sft.Config(
            model=str(start), data=str(folder / "train.jsonl"), val=str(folder / "val.jsonl"), out=str(folder / "sft"),
            epochs=config.epochs, batch_size=size.batch, micro_tokens=size.micro_tokens, learning_rate=stage.learning_rate,
            schedule="cosine", warmup=stage.warmup, max_length=size.model["max_position_embeddings"], eval_every=500,
            save_every=500, log_every=50, resume=True, device=config.device))
        start = folder / "sft" / "model"
    checkpoint.save(checkpoint.load(start), out / f"{config.size}_base", Tokenizer.load(start), dtype=torch.float16)
    run.finish()


def examples(size: Size, stage: Stage, ops: int, count: int, seed: int, workers: int = 1) -> list[dict]:
    lines = []
    for number, problem in enumerate(splits.problems("base", count, (ops, ops), size.scale, seed, size.balance, workers)):
        style = stage.style(ops, number)
        line = arms.record(problem, 0, style or traces.VANILLA, size.scale.letters)
        if style is None:
            line["messages"][-1]["content"] = traces.equations(problem)
        lines.append(line)
    return lines


def shared_tokenizer(size: Size) -> Tokenizer:
    """Trained on every wording of the answers to come: a tokenizer is no knowledge of them, and without it their
    sentences would fall into letters."""
    letters = size.scale.letters or string.ascii_lowercase[:20]
    rows = [arms.record(problem, 0, traces.Behaviors(subgoal=True, analysis=4, reflection=0.5), letters)
            for problem in splits.problems("base", 2000, (4, 5), size.scale, seed=0, balance=size.balance)]
    return train_toy([f"{m['role']}\n{m['content']}" for row in rows for m in row["messages"]], size.vocabulary)


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
