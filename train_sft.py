"""Supervised fine-tuning on worked answers: a JSONL file and a Hugging Face folder in, a Hugging Face folder out.

    python train_sft.py --model checkpoints/qwen2.5-1.5b --data data/sft_bridge.jsonl --out runs/sft_bridge

The defaults are the paper's (arXiv 2505.18917): AdamW, constant 5e-6, batches of 128, 5 epochs. Where it departs from
the authors' code: the loss is on the answer alone (--whole-chat for theirs), it is the mean over the answer tokens of
the whole batch whatever the micro-batches, padding is never trained, and a longer example is an error (--truncate
cuts it, as theirs does).

The run folder holds run.json, metrics.jsonl, checkpoints/ and, at the end, model/.
"""
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minibridge import checkpoint, parallel, plan
from minibridge.config import REQUIRED, InputError, option, read_jsonl, write_jsonl
from minibridge.data import Example, index_stream, load_sft, micro_batches
from minibridge.logprob import fused_loss
from minibridge.measure import highest_memory, start_peak
from minibridge.model import Decoder
from minibridge.opening import fingerprint, finished, open_model, pick_device, resume_point, save_checkpoint
from minibridge.optim import NonFinite, adamw, learning_rate, training_flops, update
from minibridge.parallel import ALONE, Ranks
from minibridge.policy import example_hidden
from minibridge.tokenizer import Tokenizer


@dataclass(frozen=True)
class Config:
    model: str = option(REQUIRED, "Hugging Face folder to start from")
    data: str = option(REQUIRED, "JSONL file of SFT examples")
    out: str = option(REQUIRED, "run folder")
    val: str | None = option(None, "JSONL file of SFT examples held out for the validation loss")
    epochs: float = option(5.0, "passes over the data", least=1e-6, most=1e6)
    batch_size: int = option(128, "examples of one optimizer step", least=1)
    micro_tokens: int = option(16384, "most tokens trained at a time, as if padded: sets memory, no result", least=1)
    learning_rate: float = option(5e-6, "peak learning rate", least=0)
    schedule: Literal["constant", "cosine"] = option("constant", "learning rate after warm-up; cosine falls to a tenth")
    warmup: int = option(0, "steps of linear warm-up", least=0)
    beta2: float = option(0.95, "AdamW's second beta; the first is 0.9", least=0, most=0.999999)
    weight_decay: float = option(0.01, "AdamW's weight decay", least=0)
    clip: float = option(1.0, "largest gradient norm", least=1e-6)
    max_length: int = option(2048, "longest example, in tokens", least=1)
    truncate: bool = option(False, "cut longer examples on the right, as the authors do; otherwise they are an error")
    whole_chat: bool = option(False, "train on system and user turns too, as the authors do")
    eval_every: int = option(0, "steps between validation losses; 0: only at the end", least=0)
    save_every: int = option(0, "steps between checkpoints; 0: none", least=0)
    log_every: int = option(1, "steps between console lines; metrics.jsonl has every step", least=0)
    keep: int = option(2, "newest checkpoints that stay; 0: all", least=0)
    resume: bool = option(False, "go on from the newest checkpoint of --out")
    seed: int = option(0, "seed of the order of examples", least=0)
    checkpointing: bool = option(False, "keep only the input of each layer for the backward pass: less memory, more time")
    shard: bool = option(False, "with several processes (torchrun): split weights, gradients and Adam's state among them")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "matrix products; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")
    plan: bool = option(False, "load no weights: print the memory and time that these settings would take, and stop")


def answer_loss(model: Decoder, batch: list[Example]) -> tuple[torch.Tensor, int]:
    """Summed negative log-likelihood of the trained tokens of one micro-batch, in nats, and their number."""
    hidden, targets = example_hidden(model, batch)
    loss, _ = fused_loss(hidden, model.lm_head_weight, targets, lambda logprobs, *_: (-logprobs.sum(), {}),
                         with_entropy=False)
    return loss, len(targets)


def shared_out(examples: list[Example], config: Config, ranks: Ranks) -> list[tuple[list[Example], float]]:
    """This process's share in micro-batches, each with its weight in the loss, 1.0 or (`Ranks.even`) 0.0; longest first, so
    that all get alike."""
    share = ranks.mine(sorted(examples, key=lambda example: -len(example.ids)))
    return ranks.even([[share[row] for row in rows] for rows in micro_batches(share, config.micro_tokens)])


def accumulate(model: Decoder, batch: list[Example], config: Config, ranks: Ranks = ALONE) -> float:
    """Leaves in .grad the gradient of the mean loss over the batch's trained tokens; returns that loss."""
    normalizer = sum(sum(example.mask[1:]) for example in batch)  # of the whole step, before any micro-batch
    total = 0.0
    for rows, weight in shared_out(batch, config, ranks):
        loss = weight * answer_loss(model, rows)[0] / normalizer
        loss.backward()
        total += loss.item()
    ranks.sum_gradients(model)
    total = ranks.total(total)
    if not math.isfinite(total):
        raise NonFinite(f"the loss is {total}")
    return total


@torch.no_grad()
def validation_loss(model: Decoder, examples: list[Example], config: Config, ranks: Ranks = ALONE) -> float:
    """Mean negative log-likelihood of the trained tokens, in nats."""
    total = tokens = 0.0
    for rows, weight in shared_out(examples, config, ranks):
        loss, number = answer_loss(model, rows)
        total, tokens = total + weight * loss.item(), tokens + weight * number
    return ranks.total(total) / ranks.total(tokens)


def open_data(config: Config, model: Decoder, tokenizer: Tokenizer, ranks: Ranks) -> tuple[list[Example], list[Example]]:
    """Examples to train on and to validate with. InputError now for what would fail at some step: too few, too long."""
    examples, held_out = (load_sft(path, tokenizer, config.max_length, config.whole_chat, config.truncate) if path else []
                          for path in (config.data, config.val))
    ranks.check("batch_size", config.batch_size)
    if held_out:
        ranks.check(f"rows of {config.val}", len(held_out))
    if len(examples) < config.batch_size:
        raise InputError(f"batch_size: {config.batch_size}, but {config.data} has only {len(examples)} rows")
    if (longest := max(len(example.ids) for example in examples + held_out)) > model.config.max_position_embeddings:
        raise InputError(f"max_length: an example of {longest} tokens exceeds the model's max_position_embeddings "
                         f"{model.config.max_position_embeddings}")
    micro_batches(examples + held_out, config.micro_tokens)  # InputError for one that is longer than micro_tokens
    return examples, held_out


def preview(example: Example, tokenizer: Tokenizer) -> str:
    """A line on what an example trains: how much of it, and how that begins and ends."""
    trained = [id_ for id_, counts in zip(example.ids[1:], example.mask[1:]) if counts]
    text = tokenizer.decode(trained, skip_special=False)
    return f"first example: trains on {len(trained)} of its {len(example.ids)} tokens, from {text[:30]!r} to {text[-30:]!r}"


def keep_failed(path: Path, indices: list[int], config: Config, ranks: Ranks) -> str:
    """Writes the rows of the data that a step was on; what to say of it."""
    said = f"{path} holds its rows"
    try:
        if ranks.main:
            records = read_jsonl(config.data)
            write_jsonl(path, [records[index] for index in indices])
    except (InputError, OSError, IndexError) as trouble:  # a full disk, or other data now: what failed is said
        said = f"its rows are not kept ({trouble})"
    ranks.barrier()  # the first process to end would end the one that writes
    return said


def main(config: Config, ranks: Ranks = ALONE):
    if config.plan:
        return print(plan.sft(config))
    device = pick_device(config.device)
    model, tokenizer = open_model(config.model, device, config.dtype)
    run_hash = fingerprint(config)
    saved = resume_point(config, run_hash)
    ranks.agree([run_hash, saved and saved.name, finished(config)], f"{config.out}: settings, data, model or checkpoints")
    if finished(config):
        return print(f"{config.out}: this run is finished")
    model.checkpointing = config.checkpointing
    if config.shard:
        ranks.shard(model)
    optimizer = adamw(model, (0.9, config.beta2), config.weight_decay)
    examples, held_out = open_data(config, model, tokenizer, ranks)
    planned = plan.sft(config, examples)
    steps = planned.steps
    if steps < 1:
        raise InputError(f"epochs: {config.epochs:g} passes over {len(examples)} examples make no step")
    start = checkpoint.load_training(saved, model, optimizer)["step"] if saved else 0
    run = ranks.open_run(config.out, config, device=device, steps=steps, resume_step=start + 1 if saved else None,
                         plan=planned.record(), fingerprint=run_hash)
    print(f"{planned.verdict()}\n{preview(examples[0], tokenizer)}", flush=True)
    start_peak(device)

    stream = index_stream(len(examples), config.batch_size, config.seed, start)
    for step, indices in enumerate(itertools.islice(stream, max(0, steps - start)), start + 1):
        began = time.monotonic()
        batch = [examples[index] for index in indices]
        rate = learning_rate(step - 1, steps, config.learning_rate, config.warmup, config.schedule)
        try:
            loss = accumulate(model, batch, config, ranks)
            norm = update(model, optimizer, rate, config.clip)
        except NonFinite as error:
            said = keep_failed(run.path / f"failed_step_{step:04d}.jsonl", indices, config, ranks)
            raise InputError(f"step {step}: {error}; {said}; --resume will reach this step again") from None
        seconds = time.monotonic() - began
        lengths = [len(example.ids) for example in batch]
        scored = sum(sum(example.mask[1:]) for example in batch)
        flops = training_flops(model, sum(lengths), scored, sum(length**2 / 2 for length in lengths))
        numbers = {"loss": loss, "grad_norm": norm, "learning_rate": rate, "seconds": seconds,
                   "tokens_per_second": sum(lengths) / seconds, "memory_gib": highest_memory(device) / 2**30,
                   "utilisation": flops / seconds / planned.rates[0] / ranks.size}
        if held_out and (step == steps or config.eval_every and step % config.eval_every == 0):
            numbers["val_loss"] = validation_loss(model, held_out, config, ranks)
        shown = step == steps or config.log_every and step % config.log_every == 0 or "val_loss" in numbers
        run.log(step, console=None if shown else (), **numbers)
        if config.save_every and step % config.save_every == 0 and step < steps:
            save_checkpoint(config, run_hash, step, model, optimizer, tokenizer, ranks)
    checkpoint.save(model, run.path / "model", tokenizer, ranks=ranks)
    run.finish()
    print(f"{run.path / 'model'}: written")


if __name__ == "__main__":
    sys.exit(parallel.run(main, Config))
