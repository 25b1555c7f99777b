"""How a script begins: its device, the model of a folder, and the checkpoint that a run goes on from; and what saves one."""
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from minibridge import checkpoint
from minibridge.config import InputError, read_json
from minibridge.model import Decoder
from minibridge.parallel import ALONE, Ranks
from minibridge.run_folder import same_settings, settings_before
from minibridge.tokenizer import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Settings that a resumed run may change: they touch no number, or (rows, micro_tokens, shard, compile) only its last digits.
MAY_CHANGE = ("out", "resume", "plan", "rows", "micro_tokens", "shard", "checkpointing", "compile", "eval_every",
              "influence_every", "save_every", "keep", "log_every", "show_every")


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


def resume_point(config: Any, run_hash: str) -> Path | None:
    """The checkpoint a script goes on from, None to begin. InputError if --resume meets other settings, data or weights
    (`run_hash`, the run's fingerprint), or if without it the run folder holds an earlier run, whose results would be lost or
    be taken for this one's."""
    out = Path(config.out)
    saved, metrics = checkpoint.latest(out / "checkpoints"), out / "metrics.jsonl"
    begun = settings_before(out, config) is not None
    if saved and not begun:
        raise InputError(f"{out}: holds checkpoints, but no run.json to say of which run")
    if config.resume:
        same_run(config, run_hash)
        if saved and checkpoint.read_state(saved).get("fingerprint") != run_hash:
            raise InputError(f"{saved}: not of this run, or {config.data} or {config.model} has changed since")
        if not finished(config):
            what = (f"goes on from {saved.name}" if saved else "no checkpoint yet, so the run begins anew" if begun
                    else "no run yet, so one begins")
            print(f"{config.out}: {what}", flush=True)
    elif begun and (saved or (out / "model").exists() or metrics.exists() and metrics.stat().st_size):
        raise InputError(f"{config.out}: holds an earlier run; give --resume or choose another --out")
    return saved


def same_run(config: Any, run_hash: str):
    """InputError if the run folder began with other settings, files or weights; `run_hash`: their fingerprint now."""
    same_settings(config.out, config, but=MAY_CHANGE)
    path = Path(config.out) / "run.json"
    record = read_json(path) if path.exists() else {}
    if record.get("fingerprint", run_hash) != run_hash:
        changed = " or ".join((*_read(config), config.model, *["the loss in the code"] * ("recipe" in record)))
        raise InputError(f"{config.out}: {changed} has changed since; choose another --out")


def finished(config: Any) -> bool:
    """Whether --resume was given for a run that is finished: the model folder is written last."""
    return config.resume and (Path(config.out) / "model" / "config.json").exists()


def fingerprint(config: Any, **more: Any) -> str:
    """SHA-256 of all that a run depends on: the settings that no resumed run may change (and `more`, what the code makes of
    them), its data files, and the model and tokenizer it starts from, which in RL stay the reference's. To be taken once,
    when they are read."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in MAY_CHANGE} | more
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    model = Path(config.model)
    add_files(digest, [*_read(config), *model_files(model)])
    return digest.hexdigest()


def model_files(folder: Path) -> list[Path]:
    """What makes a model and its tokenizer: shape, tokenizer, weights."""
    return [folder / "config.json", folder / "tokenizer.json", *checkpoint.weight_files(folder)]


def add_files(digest: Any, paths: Sequence[str | Path]):
    """Into a hash of hashlib; no file is in memory as a whole. InputError for a pipe, of which nothing would be left."""
    for path in paths:
        if Path(path).is_fifo():
            raise InputError(f"{path}: a pipe, but this is read twice; give a file")
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())


def _read(config: Any) -> list[str]:
    """The data files that a run begins with."""
    return [path for path in (getattr(config, name, None) for name in ("data", "val", "reference")) if path is not None]


def save_checkpoint(config: Any, run_hash: str, step: int, model: Decoder, optimizer: torch.optim.Optimizer,
                    tokenizer: Tokenizer, ranks: Ranks = ALONE, **state: int):
    """All that the steps after `step` depend on, in out/checkpoints/step_K; the oldest make room for it.

    The schedule and the order of the rows are functions of the settings and the step; `state` is what is not. `run_hash` is
    the run's fingerprint.
    """
    folder = Path(config.out) / "checkpoints"
    state = {"step": step, "fingerprint": run_hash, **state}
    checkpoint.save_training(folder / f"step_{step}", model, optimizer, state, tokenizer, ranks)
    if ranks.main:
        checkpoint.prune(folder, config.keep)
