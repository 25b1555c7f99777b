"""GRPO from a Hugging Face folder and a JSONL file of prompts with known answers.

    python train_rl.py --model runs/sft_bridge/model --data data/rl.jsonl --val data/val.jsonl --out runs/rl_bridge

A step: sample a group of answers for each prompt, score them, turn rewards into advantages within each group, take one
or more optimizer steps on the clipped surrogate with a KL penalty towards the model it started from. The defaults are
those of the paper (arXiv 2505.18917) for Qwen2.5-1.5B. Where it departs from the authors' code: gradients are those of
the mean loss (theirs are an eighth of it, so their clip of 1.0 is 8.0 here), the first step is no no-op, exactly the
sampled tokens are trained, the stop token included, answers stop at the end-of-turn token and not at "</answer>", blanks
around a boxed answer are forgiven, and a prompt that is too long is an error.

The run folder holds run.json, metrics.jsonl, rollouts/step_*.jsonl, checkpoints/ and, at the end, model/.
"""
import itertools
import sys
import time
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minibridge import checkpoint, plan
from minibridge.answer import extract
from minibridge.config import REQUIRED, InputError, Run, option, run_main, write_jsonl
from minibridge.data import Prompt, index_stream, load_prompts
from minibridge.grpo import group_advantages, grpo_loss, token_loss, token_weights
from minibridge.logprob import fused_loss
from minibridge.measure import highest_memory, start_peak
from minibridge.model import Decoder
from minibridge.optim import (
    adamw, learning_rate, open_model, pick_device, prompt_limit, resume_point, training_flops, update
)
from minibridge.policy import MicroBatch, answer_hidden, pack, padding, score
from minibridge.rollout import Episode, lines, rollout
from minibridge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str = option(REQUIRED, "Hugging Face folder to start from; also the frozen reference of the KL term")
    data: str = option(REQUIRED, "JSONL file of prompts")
    out: str = option(REQUIRED, "run folder")
    val: str | None = option(None, "JSONL file of prompts for the greedy validation accuracy")
    steps: int = option(200, "rollout batches", least=1)
    prompts: int = option(32, "prompts of one rollout batch", least=1)
    samples: int = option(32, "sampled answers for each prompt", least=2)
    updates: int = option(1, "optimizer steps on each rollout batch; from the second on the clip range matters", least=1)
    learning_rate: float = option(1e-6, "peak learning rate", least=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after warm-up; cosine ends at a tenth")
    warmup: int = option(0, "rollout batches of linear warm-up", least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest gradient norm", least=1e-6)
    clip_low: float = option(0.2, "ratios below 1 - clip_low are clipped", least=0, most=1)
    clip_high: float = option(0.2, "ratios above 1 + clip_high are clipped", least=0)
    kl_coef: float = option(0.001, "weight of the k3 estimate of KL(policy | reference)", least=0)
    kl_threshold: float | None = option(None, "drop rollouts whose mean k3 reaches this (the paper's Llama runs: 0.15)",
                                       least=0)
    entropy_coef: float = option(0.001, "weight of the entropy bonus")
    format_scale: float = option(0.0, "extra reward of a well-formed answer (the paper's Llama runs: 0.05)", least=0)
    temperature: float = option(1.0, "of sampling and of the loss alike", least=1e-3)
    max_prompt: int = option(1024, "longest prompt, in tokens; a longer one is an error", least=1)
    max_new_tokens: int = option(2560, "longest answer, in tokens", least=1)
    rows: int = option(256, "answers decoded at the same time", least=1)
    micro_tokens: int = option(8192, "padded tokens in memory at once in training; changes speed, never results", least=1)
    eval_every: int = option(5, "steps between validations; also before the first step and after the last", least=0)
    save_every: int = option(100, "steps between checkpoints; 0: only at the end", least=0)
    show_every: int = option(50, "steps between printing two rollouts in full, from the first on; 0: never", least=0)
    resume: bool = option(False, "go on from the newest checkpoint of --out")
    seed: int = option(0, "seed of the order of prompts and of sampling", least=0)
    checkpointing: bool = option(False, "keep only the input of each layer for the backward pass: less memory, more time")
    compile: Literal["auto", "on", "off"] = option("auto", "torch.compile the decoding of rollouts; auto: on a GPU")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "matrix products; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")
    plan: bool = option(False, "load nothing: print the memory and time that these settings would take, and stop")


def improve(model: Decoder, reference: Decoder | None, optimizer: torch.optim.Optimizer, batches: list[MicroBatch],
            rate: float, config: Config) -> dict[str, float]:
    """The optimizer steps on one rollout batch; returns the metrics of the first, where the ratio is still 1."""
    rollouts = sum(len(batch.answers) for batch in batches)
    with torch.no_grad():
        for batch in batches:
            if reference is not None:
                batch.ref_logps = score(reference, batch, config.temperature)[0]
            if config.updates > 1:
                batch.old_logps = score(model, batch, config.temperature)[0]
    first: dict[str, float] = {}
    for number in range(config.updates):
        parts = []
        for batch in batches:
            loss, metrics = (fused_batch_loss if config.kl_threshold is None else batch_loss)(model, batch, rollouts, config)
            loss.backward()
            parts.append(metrics)
        norm = update(model, optimizer, rate, config.clip)
        first = first or {**total(parts), "grad_norm": norm}
    return first


def batch_loss(model: Decoder, batch: MicroBatch, rollouts: int, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the loss of a step of `rollouts`, and of its metrics, by way of all log-probabilities."""
    logps, entropy = score(model, batch, config.temperature, with_entropy=True)
    loss, metrics = grpo_loss(
        logps, logps.detach() if batch.old_logps is None else batch.old_logps, batch.ref_logps, batch.advantages,
        batch.trained, clip=(config.clip_low, config.clip_high), kl_coef=config.kl_coef, kl_threshold=config.kl_threshold,
        entropy=entropy, entropy_coef=config.entropy_coef, aggregate="sequence", normalizer=rollouts)
    return loss, {**metrics, "mismatch": (logps.detach() - batch.sampled_logps).abs().max()}


def fused_batch_loss(model: Decoder, batch: MicroBatch, rollouts: int, config: Config) -> tuple[Tensor, dict[str, Tensor]]:
    """The same, token by token, so that no logits are computed twice; a threshold needs whole rollouts."""
    trained = batch.trained
    weights = token_weights(trained.to(batch.sampled_logps.dtype), "sequence", rollouts)[trained]  # (tokens,)
    advantages = batch.advantages[:, None].expand_as(trained)[trained]
    sampled, old, ref = (None if x is None else x[trained] for x in (batch.sampled_logps, batch.old_logps, batch.ref_logps))
    gaps = []

    def loss_of(logps: Tensor, entropy: Tensor, rows: slice):
        gaps.append((logps.detach() - sampled[rows]).abs().max())
        return token_loss(logps, logps.detach() if old is None else old[rows], None if ref is None else ref[rows],
                          advantages[rows], weights[rows], clip=(config.clip_low, config.clip_high), kl_coef=config.kl_coef,
                          entropy=entropy, entropy_coef=config.entropy_coef)

    hidden = answer_hidden(model, batch)[trained]  # (tokens, C)
    loss, metrics = fused_loss(hidden, model.lm_head_weight, batch.answers[trained], loss_of, config.temperature)
    return loss, {**metrics, "mismatch": torch.stack(gaps).max()}


def total(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """A step's figures from those of its micro-batches: the largest mismatch, the sum of everything else."""
    columns = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    return {name: (column.max() if name == "mismatch" else column.sum()).item() for name, column in columns.items()}


def describe(groups: list[list[Episode]]) -> dict[str, float]:
    """What the rollouts look like, before any training on them; every figure is explained in the README."""
    episodes = [episode for group in groups for episode in group]

    def mean(values) -> float:
        return sum(values) / len(episodes)

    answers = Counter(text for episode in episodes if (text := extract(episode.text)) is not None)
    return {
        "accuracy": mean(episode.correct for episode in episodes),
        "reward": mean(episode.reward for episode in episodes),
        "well_formed": mean(episode.well_formed for episode in episodes),
        "length": mean(len(episode.completion.ids) for episode in episodes),
        "truncated": mean(episode.completion.finish_reason == "length" for episode in episodes),
        "common_answer": max(answers.values(), default=0) / len(episodes),
        "dead_groups": sum(len({episode.reward for episode in group}) == 1 for group in groups) / len(groups),
    }


def step_flops(model: Decoder, groups: list[list[Episode]], with_reference: bool, config: Config) -> float:
    """Of the training on these rollouts, each prompt run once: three passes an update, one each for other log-probs."""
    tokens, scored, pairs = 0, 0, 0.0
    for group in groups:
        prompt, answers = len(group[0].prompt.ids), [len(episode.completion.ids) for episode in group]
        tokens += prompt + sum(answers)
        scored += sum(answers)
        pairs += prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
    return training_flops(model, tokens, scored, pairs, 3 * config.updates + with_reference + (config.updates > 1))


def validate(model: Decoder, tokenizer: Tokenizer, prompts: list[Prompt], config: Config) -> float:
    groups = rollout(model, tokenizer, prompts, 1, max_new_tokens=config.max_new_tokens, temperature=0.0, rows=config.rows)
    return sum(group[0].correct for group in groups) / len(groups)


def show(groups: list[list[Episode]]):
    """Two rollouts in full, a right and a wrong one if there are both."""
    episodes = sorted((episode for group in groups for episode in group), key=lambda episode: -episode.correct)
    for episode in (episodes[0], episodes[-1]):
        question = episode.prompt.record["prompt"][-1]["content"]
        print(f"--- reward {episode.reward:g}, right answer {episode.prompt.answer}\n{question}\n{episode.text}", flush=True)


def main(config: Config):
    if config.plan:
        return print(plan.rl(config))
    device, saved = pick_device(config.device), resume_point(config)
    model, tokenizer = open_model(config.model, device, config.dtype)
    with_reference = config.kl_coef or config.kl_threshold is not None
    reference = open_model(config.model, device, config.dtype)[0] if with_reference else None
    if reference is not None:
        reference.to(reference.activation_dtype)  # frozen: it needs no wider copy of its weights
    model.checkpointing = config.checkpointing
    compiled = config.compile == "on" or config.compile == "auto" and device.type == "cuda"
    optimizer = adamw(model, (0.9, 0.999), config.weight_decay)
    limit = prompt_limit(model, config.max_prompt, config.max_new_tokens)
    prompts = load_prompts(config.data, tokenizer, limit)
    held_out = load_prompts(config.val, tokenizer, limit) if config.val else []
    if len(prompts) < config.prompts:
        raise InputError(f"prompts: {config.prompts} of a batch, but {config.data} has only {len(prompts)} rows")
    if (longest := max(len(prompt.ids) for prompt in prompts) + config.max_new_tokens) > config.micro_tokens:
        raise InputError(f"micro_tokens: {config.micro_tokens} cannot hold the longest prompt and answer, {longest} tokens")
    generator = torch.Generator(device).manual_seed(config.seed)
    state = checkpoint.load_training(saved, model, optimizer) if saved else {"step": 0, "generator": generator.get_state()}
    if "generator" not in state:
        raise InputError(f"{saved}: not a checkpoint of train_rl.py")
    generator.set_state(state["generator"])
    planned = plan.rl(config, [len(prompt.ids) for prompt in prompts], len(held_out))
    run = Run(config.out, config, device=str(device), steps=config.steps, resume_step=state["step"] + 1 if saved else None,
              plan=planned.record())
    print(planned.verdict(), flush=True)
    start_peak(device)
    (run.path / "rollouts").mkdir(exist_ok=True)
    if held_out and not saved:
        run.log(0, val_accuracy=validate(model, tokenizer, held_out, config))

    stream = index_stream(len(prompts), config.prompts, config.seed, state["step"])
    for step, indices in enumerate(itertools.islice(stream, max(0, config.steps - state["step"])), state["step"] + 1):
        began = time.monotonic()
        groups = rollout(model, tokenizer, [prompts[index] for index in indices], config.samples,
                         max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                         format_scale=config.format_scale, rows=config.rows, generator=generator, compiled=compiled)
        decoded = time.monotonic()
        write_jsonl(run.path / "rollouts" / f"step_{step:04d}.jsonl", lines(groups))
        advantages = group_advantages(torch.tensor([[episode.reward for episode in group] for group in groups]))  # (N, G)
        rate = learning_rate(step - 1, config.steps, config.learning_rate, config.warmup, config.schedule)
        batches = pack(groups, advantages, config.micro_tokens, device)
        numbers = describe(groups) | improve(model, reference, optimizer, batches, rate, config)
        trained = time.monotonic()

        numbers |= {"learning_rate": rate, "seconds": trained - began, "decode_seconds": decoded - began,
                    "tokens_per_second": numbers["length"] * config.prompts * config.samples / (decoded - began),
                    "padding": padding(batches), "memory_gib": highest_memory(device) / 2**30,
                    "utilisation": step_flops(model, groups, reference is not None, config) / (trained - decoded)
                    / planned.rates[0]}
        if held_out and (step == config.steps or config.eval_every and step % config.eval_every == 0):
            numbers["val_accuracy"] = validate(model, tokenizer, held_out, config)
        run.log(step, console=CONSOLE, **numbers)
        if config.show_every and (step - 1) % config.show_every == 0:
            show(groups)
        if config.save_every and step % config.save_every == 0 and step < config.steps:
            state = {"step": step, "generator": generator.get_state()}
            checkpoint.save_training(run.path / "checkpoints" / f"step_{step}", model, optimizer, state, tokenizer)
    checkpoint.save(model, run.path / "model", tokenizer)
    run.finish()


CONSOLE = ("accuracy", "dead_groups", "length", "common_answer", "entropy", "kl", "grad_norm", "seconds", "memory_gib",
           "val_accuracy")

if __name__ == "__main__":
    sys.exit(run_main(main, Config))
