"""What the scripts share: opening a model, room for a prompt, checkpoints of a run, the optimizer, its rate, its step."""
import dataclasses
import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.model import Decoder
from minibridge.parallel import ALONE, Ranks
from minibridge.run_folder import same_settings, settings_before
from minibridge.sharding import whole
from minibridge.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Settings that a resumed run may change: they touch no number, or (rows, micro_tokens, shard, compile) only its last digits.
MAY_CHANGE = ("out", "resume", "plan", "rows", "micro_tokens", "shard", "checkpointing", "compile", "eval_every",
              "influence_every", "save_every", "keep", "log_every", "show_every")


class NonFinite(InputError):
    """A loss or a gradient with a NaN or an infinity in it."""


def pick_device(name: str) -> torch.device:
    """ "auto" is a GPU if there is one, else the CPU; "cuda" is the first GPU, or a process's own if torchrun started it.
    InputError for a device this machine lacks."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda:") and os.environ.get("LOCAL_WORLD_SIZE", "1") != "1":
        raise InputError(f"device {name!r}: each of several processes takes a GPU of its own; say cuda")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"device {name!r}: only cpu and cuda are supported")
    try:
        if torch.empty(0, device=name).device.type == "cuda":
            torch.cuda.set_device(name)  # what is timed and counted without a name is then this one
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device {name!r}: {str(error).splitlines()[0]}") from None


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Of the matrix products; "auto" is bf16 on a GPU and fp32 on a CPU. Parameters and Adam's state stay fp32: in
    bf16 an update smaller than the weight's last bit (at lr 1e-6, nearly all of them) would be lost."""
    return DTYPES[name] if name != "auto" else DTYPES["bf16" if device.type == "cuda" else "fp32"]


def open_model(folder: str, device: torch.device, dtype: str) -> tuple[Decoder, Tokenizer]:
    """The fp32 model and the tokenizer of a Hugging Face folder; `dtype` as in `pick_dtype`."""
    model = checkpoint.load(folder, torch.float32, device)
    tokenizer = Tokenizer.load(folder)
    model.compute_dtype = pick_dtype(dtype, device)
    if (largest := max(tokenizer.tokenizer.get_vocab().values())) >= model.config.vocab_size:
        raise InputError(f"{folder}: the tokenizer has a token {largest}, "
                         f"the model's vocab_size is {model.config.vocab_size}")
    return model, tokenizer


def prompt_limit(model: Decoder, max_prompt: int, max_new_tokens: int) -> int:
    """Longest prompt, in tokens, after which an answer of `max_new_tokens` still has positions in the model."""
    room = model.config.max_position_embeddings - max_new_tokens
    if room < 1:
        raise InputError(f"max_new_tokens: {max_new_tokens} leave no room for a prompt in the model's "
                         f"max_position_embeddings {model.config.max_position_embeddings} (--max-new-tokens)")
    return min(max_prompt, room)


def resume_point(config: Any, mark: str) -> Path | None:
    """The checkpoint a script goes on from, None to begin. InputError if --resume meets other settings, data or weights
    (`mark`, the run's fingerprint), or if without it the run folder holds an earlier run, whose results would be lost or
    be taken for this one's."""
    out = Path(config.out)
    saved, metrics = checkpoint.latest(out / "checkpoints"), out / "metrics.jsonl"
    begun = settings_before(out, config) is not None
    if saved and not begun:
        raise InputError(f"{out}: holds checkpoints, but no run.json to say of which run")
    if config.resume:
        same_settings(config.out, config, but=MAY_CHANGE)
        if saved and checkpoint.read_state(saved).get("fingerprint") != mark:
            raise InputError(f"{saved}: not of this run, or {config.data} or {config.model} has changed since")
        if not finished(config):
            what = (f"goes on from {saved.name}" if saved else "no checkpoint yet, so the run begins anew" if begun
                    else "no run yet, so one begins")
            print(f"{config.out}: {what}", flush=True)
    elif begun and (saved or (out / "model").exists() or metrics.exists() and metrics.stat().st_size):
        raise InputError(f"{config.out}: holds an earlier run; give --resume or choose another --out")
    return saved


def finished(config: Any) -> bool:
    """Whether --resume was given for a run that is finished: the model folder is written last."""
    return config.resume and (Path(config.out) / "model" / "config.json").exists()


def fingerprint(config: Any) -> str:
    """SHA-256 of all that a run's steps depend on: the settings that no resumed run may change, its data file, and the
    model and tokenizer it starts from, which in RL stay the reference's. To be taken once, when they are read."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    model = Path(config.model)
    for path in (config.data, model / "config.json", model / "tokenizer.json", *checkpoint.weight_files(model)):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_checkpoint(config: Any, mark: str, step: int, model: Decoder, optimizer: torch.optim.Optimizer,
                    tokenizer: Tokenizer, ranks: Ranks = ALONE, **state: int):
    """All that the steps after `step` depend on, in out/checkpoints/step_K; the oldest make room for it.

    The schedule and the order of the rows are functions of the settings and the step; `state` is what is not. `mark` is the
    run's fingerprint.
    """
    folder = Path(config.out) / "checkpoints"
    state = {"step": step, "fingerprint": mark, **state}
    checkpoint.save_training(folder / f"step_{step}", model, optimizer, state, tokenizer, ranks)
    if ranks.main:
        checkpoint.prune(folder, config.keep)


def training_flops(model: Decoder, tokens: int, scored: int, pairs: float, passes: float = 3) -> float:
    """Floating-point operations of `passes` forward passes' worth of work: a backward pass is two. In a forward pass each
    parameter takes part in two for every token, but those of the head only for the tokens `scored`, and each pair of a
    token and one that it attends to in 4 D of each head of each layer."""
    c, head = model.config, model.lm_head_weight.numel()
    embedding = head if c.tie_word_embeddings else 2 * head  # looked up, and the head
    body = sum(parameter.numel() for parameter in model.parameters()) - embedding
    attention = 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    return passes * (2 * body * tokens + 2 * head * scored + attention)


def adamw(model: Decoder, betas: tuple[float, float], weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters (arXiv 1711.05101); `update` sets its learning rate at every step."""
    return torch.optim.AdamW(model.parameters(), betas=betas, weight_decay=weight_decay, fused=True)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 0, schedule: str = "constant") -> float:
    """Learning rate of step 0 .. steps - 1. The first step is never 0, so none is wasted."""
    # 1) linear warm-up over `warmup` steps
    if step < warmup:
        return peak * (step + 1) / warmup
    # 2) constant after it
    if schedule == "constant":
        return peak
    # 3) or a half cosine, down to a tenth of the peak
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    return peak * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))


def update(model: Decoder, optimizer: torch.optim.Optimizer, rate: float, clip: float) -> float:
    """Clip the accumulated gradient to the norm `clip`, take one step at `rate`, drop the gradient.

    Returns the norm before clipping. One that is not finite raises NonFinite and changes nothing: the model stays as it
    was, and the checkpoints written so far stay good.
    """
    norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), clip)).item()
    if not math.isfinite(norm):
        raise NonFinite(f"the gradient norm is {norm}")
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm
