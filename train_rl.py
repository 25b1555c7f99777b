"""GRPO from a Hugging Face folder and a JSONL file of prompts with known answers.

    python train_rl.py --model runs/sft_bridge/model --data data/rl.jsonl --val data/val.jsonl --out runs/rl_bridge
    python train_rl.py --replay runs/rl_bridge/failed_step_0007.safetensors      # what was not finite, and where

A step: sample a group of answers for each prompt, score them, turn rewards into advantages within each group, take one
or more optimizer steps on the clipped surrogate with a KL penalty towards the model it started from, or on another loss
(--preset). The defaults are those of the paper (arXiv 2505.18917) for Qwen2.5-1.5B. Where it departs from the authors' code:

1. The gradient that --clip limits is that of the mean loss. Theirs is divided by eight before: --clip 8 is their 1.0.
2. The first step trains; theirs has rate 0.
3. Exactly the sampled tokens are trained, the stop token included.
4. Answers stop at the end-of-turn token, not at "</answer>".
5. Blanks around a boxed answer are forgiven.
6. A well-formed answer (--format-scale) has each tag once and nothing behind the last.
7. A prompt may have 1,024 tokens, theirs 512; a longer one is an error, theirs a warning.

The run folder holds run.json, metrics.jsonl, rollouts/step_*.jsonl, checkpoints/ and, at the end, model/.
"""
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from minibridge import checkpoint, coinfluence, parallel, plan, replay
from minibridge.config import REQUIRED, InputError, option, run_main, write_jsonl
from minibridge.dag import problem_in
from minibridge.data import Prompt, load_prompts, prompt_stream, sample_seed
from minibridge.grpo import PRESETS, Recipe
from minibridge.measure import highest_memory, start_peak
from minibridge.model import Decoder
from minibridge.monitor import behaviors, describe, show, wasted
from minibridge.opening import fingerprint, finished, open_model, pick_device, prompt_limit, resume_point, save_checkpoint
from minibridge.optim import NonFinite, adamw, learning_rate, training_flops, update
from minibridge.parallel import ALONE, Ranks
from minibridge.policy import MicroBatch, answer_logps, pack, padding, share_of_loss, total, whole_step
from minibridge.rollout import Episode, lines, refilled, rewards, rollout
from minibridge.tokenizer import Tokenizer

CONSOLE = ("accuracy", "dead_groups", "length", "truncated", "common_answer", "entropy", "kl", "grad_norm", "seconds",
           "memory_gib", "val_accuracy")
Sampler = Callable[..., list[list[Episode]]]


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
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after warm-up; cosine falls to a tenth")
    warmup: int = option(0, "rollout batches of linear warm-up", least=0)
    weight_decay: float = option(0.01, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest gradient norm", least=1e-6)
    preset: Literal[*PRESETS] = option("paper", "recipe of the loss; clip, KL and entropy options override its own")
    clip_low: float | None = option(None, "ratios below 1 - clip_low are clipped; none: the preset's", least=0, most=1)
    clip_high: float | None = option(None, "ratios above 1 + clip_high are clipped; none: the preset's", least=0)
    kl_coef: float | None = option(None, "weight of the k3 estimate of KL(policy | reference); none: the preset's", least=0)
    kl_threshold: float | None = option(None, "drop rollouts whose mean k3 reaches this (the paper's Llama runs: 0.15)",
                                       least=0)
    entropy_coef: float | None = option(None, "weight of the entropy bonus; none: the preset's")
    refill: int = option(0, "rounds of sampling other prompts for those whose answers all earned the same", least=0)
    mask_truncated: bool = option(False, "take answers that hit max_new_tokens out of the loss")
    old_logps: Literal["recomputed", "sampler"] = option(
        "recomputed", "log-probabilities that ratios are taken against: the policy's own before the first update, or the "
                      "sampler's")
    tis_cap: float | None = option(
        None, "truncated importance sampling: the largest weight of a token, exp(its log-prob in training - in sampling)",
        least=1)
    format_scale: float = option(0.0, "extra reward of a well-formed answer (the paper's Llama runs: 0.05)", least=0)
    temperature: float = option(1.0, "of sampling and of the loss alike", least=1e-3)
    max_prompt: int = option(1024, "longest prompt, in tokens; a longer one is an error", least=1)
    max_new_tokens: int = option(2560, "longest answer, in tokens", least=1)
    rows: int = option(256, "answers decoded at the same time", least=1)
    micro_tokens: int = option(8192, "most tokens trained at a time, as if padded: sets memory, no result", least=1)
    influence_every: int = option(
        0, "steps between measurements of what a plain GRPO step would do for --val, by answers to --prompts of its "
           "prompts; 0: never", least=0)
    eval_every: int = option(5, "steps between validations; also before the first step and after the last", least=0)
    save_every: int = option(100, "steps between checkpoints; 0: none", least=0)
    show_every: int = option(50, "steps between printing two rollouts in full, from the first on; 0: never", least=0)
    keep: int = option(2, "newest checkpoints that stay; 0: all", least=0)
    resume: bool = option(False, "go on from the newest checkpoint of --out")
    seed: int = option(0, "seed of the order of prompts and of sampling", least=0)
    checkpointing: bool = option(False, "keep only the input of each layer for the backward pass: less memory, more time")
    compile: Literal["auto", "on", "off"] = option(
        "auto", "torch.compile decoding, on a GPU the layers in training too; auto: on a GPU")
    shard: bool = option(False, "with several processes (torchrun): split weights, gradients and Adam's state among them")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "matrix products; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")
    plan: bool = option(False, "load no weights: print the memory and time that these settings would take, and stop")

    def __post_init__(self):  # so that run.json and the fingerprint hold the values that are used
        for name in ("clip_low", "clip_high", "kl_coef", "entropy_coef"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, getattr(PRESETS[self.preset], name))


def recipe_of(config: Config) -> Recipe:
    """The preset, with the options given by name. InputError for an option that would do nothing."""
    preset = PRESETS[config.preset]
    if preset.clip_low is None and (config.clip_low, config.clip_high) != (None, None):
        raise InputError(f"clip_low, clip_high: the preset {config.preset} has no ratio to clip")
    if preset.surrogate == "reinforce" and config.old_logps == "sampler":
        raise InputError(f"old_logps: the preset {config.preset} has no ratios")
    if config.kl_threshold == 0:
        raise InputError("kl_threshold: 0 would drop every rollout; none drops none")
    if config.tis_cap is not None and config.old_logps == "sampler":
        raise InputError("tis_cap: with old_logps sampler, the ratios themselves are to the sampler")
    return replace(preset, clip_low=config.clip_low, clip_high=config.clip_high, kl_coef=config.kl_coef,
                   entropy_coef=config.entropy_coef, kl_threshold=config.kl_threshold, tis_cap=config.tis_cap,
                   mask_truncated=config.mask_truncated)


def optimizer_steps(model: Decoder, reference: Decoder | None, optimizer: torch.optim.Optimizer, batches: list[MicroBatch],
                    rate: float, config: Config, ranks: Ranks = ALONE) -> dict[str, float]:
    """The optimizer steps on one rollout batch. Returns the first one's metrics, where ratios to the trainer are 1; but the
    last one's clip_fraction and log_ratio, which tell how far the steps have led."""
    totals = whole_step(batches, recipe_of(config), config.temperature, config.max_new_tokens, ranks)
    turns = ranks.even(batches)  # with weights: 1.0, or 0.0 for a pass that only keeps step with the other processes
    with torch.no_grad():
        for batch, _ in turns:
            if reference is not None:
                batch.ref_logps = answer_logps(reference, batch, config.temperature)[0]
            if config.old_logps == "sampler":
                batch.old_logps = batch.sampled_logps
            elif config.updates > 1:
                batch.old_logps = answer_logps(model, batch, config.temperature)[0]
    if reference is not None:
        ranks.reshard(reference)
    first: dict[str, float] = {}
    for number in range(config.updates):
        parts = []
        for batch, weight in turns:
            loss, metrics = share_of_loss(model, batch, totals)
            (weight * loss).backward()
            parts += [metrics] if weight else []
        ranks.sum_gradients(model)
        found = total(parts, totals, ranks)
        if not math.isfinite(found["loss"]):
            raise NonFinite(f"the loss is {found['loss']}")
        found["grad_norm"] = update(model, optimizer, rate, config.clip)
        first = first or found
    return first | {name: found[name] for name in ("clip_fraction", "log_ratio")}


def train_on(model: Decoder, reference: Decoder | None, optimizer: torch.optim.Optimizer, groups: list[list[Episode]],
             step: int, config: Config, ranks: Ranks = ALONE) -> dict[str, float]:
    """`optimizer_steps` on a rollout batch, N prompts of G answers; a batch whose loss or gradient is not finite is kept in
    a file."""
    advantages = recipe_of(config).advantages(rewards(groups))  # (N, G)
    batches = pack(groups, advantages, config.micro_tokens, model.device, ranks)
    rate = learning_rate(step - 1, config.steps, config.learning_rate, config.warmup, config.schedule)
    try:
        found = optimizer_steps(model, reference, optimizer, batches, rate, config, ranks)
    except NonFinite as error:
        said = keep_failed(Path(config.out) / f"failed_step_{step:04d}.safetensors", model, batches, config, ranks)
        raise InputError(f"step {step}: {error}; {said}") from None
    return found | {"learning_rate": rate, "padding": padding(model, batches, ranks)}


def step_flops(model: Decoder, groups: list[list[Episode]], with_reference: bool, config: Config) -> float:
    """Of the training on these rollouts, each prompt run once."""
    tokens, scored, pairs = 0, 0, 0.0
    for group in groups:
        prompt, answers = len(group[0].prompt.ids), [len(episode.completion.ids) for episode in group]
        tokens += prompt + sum(answers)
        scored += sum(answers)
        pairs += prompt**2 / 2 + sum(answer * (prompt + answer / 2) for answer in answers)
    return training_flops(model, tokens, scored, pairs, plan.passes(config, with_reference))


def sampler_of(model: Decoder, tokenizer: Tokenizer, config: Config, ranks: Ranks) -> Sampler:
    """`rollout` of this policy by the settings; prompts, number of samples, seeds and temperature are left to give."""
    compiled = config.compile == "on" or config.compile == "auto" and model.device.type == "cuda"
    return partial(rollout, model, tokenizer, max_new_tokens=config.max_new_tokens, rows=config.rows, compiled=compiled,
                   ranks=ranks)


def batches_of(prompts: list[Prompt], sampler: Sampler, drawn: int, config: Config) -> Callable[[int], list[list[Episode]]]:
    """next_groups(n): answers to the next n prompts of the run's order, of which `drawn` are behind us."""
    stream = prompt_stream(len(prompts), config.prompts, config.seed, drawn)

    def next_groups(count: int) -> list[list[Episode]]:
        indices, seeds = zip(*itertools.islice(stream, count))
        return sampler([prompts[index] for index in indices], config.samples, seeds=seeds, temperature=config.temperature,
                       format_scale=config.format_scale)

    return next_groups


def validate(sampler: Sampler, prompts: list[Prompt]) -> float:
    """Greedy accuracy."""
    groups = sampler(prompts, 1, temperature=0.0)
    return sum(group[0].correct for group in groups) / len(groups)


def influence(model: Decoder, sampler: Sampler, held_out: list[Prompt], groups: list[list[Episode]], step: int,
              config: Config) -> dict[str, float]:
    """What a plain GRPO step on correctness alone would do now for held-out prompts, by fresh answers to them."""
    asked = held_out[: config.prompts]
    seeds = [sample_seed(config.seed, f"influence/{step}", position) for position in range(len(asked))]
    val = sampler(asked, config.samples, seeds=seeds, temperature=config.temperature)
    return coinfluence.training_numbers(model, val, groups, config.temperature, config.micro_tokens)


def open_data(config: Config, model: Decoder, tokenizer: Tokenizer, ranks: Ranks) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts and those held out, once it is sure that every batch of them will fit."""
    limit = prompt_limit(model, config.max_prompt, config.max_new_tokens)
    prompts = load_prompts(config.data, tokenizer, limit)
    held_out = load_prompts(config.val, tokenizer, limit) if config.val else []
    ranks.check("prompts", config.prompts)
    for number, prompt in enumerate(prompts, 1):
        problem_in(prompt.record, f"{config.data}:{number}")  # what is wrong is said now
    if config.influence_every:
        if ranks.size > 1 or min(len(held_out), config.prompts) < 2:
            raise InputError("influence_every: needs two prompts of --val in a batch of --prompts, and one process")
        asked = {tuple(prompt.ids) for prompt in prompts}
        if shared := sum(tuple(prompt.ids) in asked for prompt in held_out[: config.prompts]):
            raise InputError(f"influence_every: {shared} prompts of --val are also in --data")
    if len(prompts) < config.prompts:
        raise InputError(f"prompts: {config.prompts} of a batch, but {config.data} has only {len(prompts)} rows")
    return prompts, held_out


def open_models(config: Config, device: torch.device, ranks: Ranks) -> tuple[Decoder, Decoder | None, Tokenizer]:
    """The policy, its frozen reference if the loss needs one, and their tokenizer."""
    model, tokenizer = open_model(config.model, device, config.dtype)
    model.checkpointing, reference = config.checkpointing, None
    if config.kl_coef or config.kl_threshold is not None:
        reference, _ = open_model(config.model, device, config.dtype)
        reference.to(reference.activation_dtype)  # frozen: it needs no wider copy of its weights
    copied = model.activation_dtype != torch.float32 and not config.shard  # sampled by a copy, so the layers may be compiled
    for trained in (model, reference):
        if trained is not None and copied and config.compile != "off" and device.type == "cuda":
            trained.compile_layers()
    for sharded in (model, reference) if config.shard else ():
        if sharded is not None:
            ranks.shard(sharded)
    return model, reference, tokenizer


def load_state(saved, model: Decoder, optimizer: torch.optim.Optimizer, config: Config) -> dict[str, int]:
    """The last step that is done, and how many prompts were drawn till then; fills model and optimizer from a checkpoint."""
    if not saved:
        return {"step": 0, "drawn": 0}
    state = checkpoint.load_training(saved, model, optimizer, config.updates)
    least = state["step"] * config.prompts
    if type(state.get("drawn")) is not int or not least <= state["drawn"] <= least * (1 + config.refill):
        raise InputError(f"{saved}: not a checkpoint of train_rl.py")
    return state


def keep_failed(path: Path, model: Decoder, batches: list[MicroBatch], config: Config, ranks: Ranks) -> str:
    """Writes what `replay` reads; what to say of it."""
    totals = whole_step(batches, recipe_of(config), config.temperature, config.max_new_tokens, ranks)
    said = f"to inspect it: python train_rl.py --replay {path}"
    try:
        replay.save_failure(path, model, batches, totals, ranks)
    except (InputError, OSError) as trouble:  # a full disk is no reason to hide what failed
        said = f"and {trouble}"
    ranks.barrier()  # the first process to end would end the one that writes
    return said


def main(config: Config, ranks: Ranks = ALONE):
    recipe = asdict(recipe_of(config))  # InputError now for what cannot be
    if config.plan:
        return print(plan.rl(config))
    device = pick_device(config.device)
    model, reference, tokenizer = open_models(config, device, ranks)
    run_hash = fingerprint(config, recipe=recipe)
    saved = resume_point(config, run_hash)
    ranks.agree([run_hash, saved and saved.name, finished(config)], f"{config.out}: settings, data, model or checkpoints")
    if finished(config):
        return print(f"{config.out}: this run is finished")
    optimizer = adamw(model, (0.9, 0.999), config.weight_decay)
    prompts, held_out = open_data(config, model, tokenizer, ranks)
    state = load_state(saved, model, optimizer, config)
    planned = plan.rl(config, *([len(prompt.ids) for prompt in some] for some in (prompts, held_out)))
    run = ranks.open_run(config.out, config, device=device, steps=config.steps, fingerprint=run_hash, recipe=recipe,
                         resume_step=state["step"] + 1 if saved else None, plan=planned.record())
    print(planned.verdict(), flush=True)
    start_peak(device)
    sampler, drawn = sampler_of(model, tokenizer, config, ranks), state["drawn"]
    next_groups = batches_of(prompts, sampler, drawn, config)
    if held_out and not saved:
        run.log(0, val_accuracy=validate(sampler, held_out))

    for step in range(state["step"] + 1, config.steps + 1):
        began = time.monotonic()
        try:
            groups = refilled(next_groups, config.prompts, config.refill)
        except InputError as error:  # logits that are not finite: an update too large for a norm to show it
            raise InputError(f"step {step}: {error}; --resume goes back to the last checkpoint, or begins anew") from None
        drawn += len(groups)
        decoded = time.monotonic()
        if ranks.main:
            write_jsonl(run.path / "rollouts" / f"step_{step:04d}.jsonl", lines(groups))
        numbers = describe(groups) | behaviors(groups, config.data) | {
            "groups": len(groups), "wasted": wasted(groups, config.mask_truncated)}
        sampled = sum(len(episode.completion.ids) for group in groups for episode in group)
        groups = groups[: config.prompts]  # after refilling there are more, the live ones first
        if config.influence_every and step % config.influence_every == 0:
            numbers |= influence(model, sampler, held_out, groups, step, config)
        ready = time.monotonic()
        numbers |= train_on(model, reference, optimizer, groups, step, config, ranks)
        trained = time.monotonic()

        flops = step_flops(model, groups, reference is not None, config)
        numbers |= {"seconds": trained - began, "decode_seconds": decoded - began,
                    "tokens_per_second": sampled / (decoded - began), "memory_gib": highest_memory(device) / 2**30,
                    "utilisation": flops / (trained - ready) / planned.rates[0] / ranks.size}
        if held_out and (step == config.steps or config.eval_every and step % config.eval_every == 0):
            numbers["val_accuracy"] = validate(sampler, held_out)
        run.log(step, console=CONSOLE, **numbers)
        if config.show_every and (step - 1) % config.show_every == 0:
            show(groups)
        if config.save_every and step % config.save_every == 0 and step < config.steps:
            save_checkpoint(config, run_hash, step, model, optimizer, tokenizer, ranks, drawn=drawn)
    checkpoint.save(model, run.path / "model", tokenizer, ranks=ranks)
    run.finish()
    print(f"{run.path / 'model'}: written")


if __name__ == "__main__":
    again = any(word.startswith("--replay") for word in sys.argv)
    sys.exit(run_main(replay.main, replay.Config) if again else parallel.run(main, Config))
