"""Hugging Face folders in and out, and the state that lets training go on where it stopped.

    load, save                     config.json, model.safetensors (or shards and their index), the tokenizer's
                                   files and generation_config.json: what transformers and vLLM open
    save_training, load_training   the same, and training.json and training.safetensors in it
    latest, prune                  the checkpoint to resume from; making room for it

A folder is written beside its place and then renamed, so nobody ever sees half of one.
Nothing is pickled. What it is not: sharded saving, other weight formats, quantised weights, downloads.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from minibridge.config import InputError, read_json
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.parallel import ALONE, Ranks
from minibridge.sharding import part
from minibridge.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TRAINING = "training.json"  # present only in a checkpoint that training can resume from
TRAINING_TENSORS = "training.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # others in a file are quantised or no weights


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Decoder:
    """Open a Hugging Face folder; weights stored as bf16, fp16, fp32 or fp64 are cast to `dtype`.

    Raises InputError for a missing or broken file, or a tensor missing, unexpected, wrong in shape or not finite.
    """
    model = outline(folder)
    model.load_state_dict(_read_weights(Path(folder), model, dtype, device), assign=True)
    return model


def outline(folder: str | Path) -> Decoder:
    """The model of a Hugging Face folder in shapes alone, on the meta device: only its config.json is read."""
    if not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    path = Path(folder) / "config.json"
    if not path.exists() and (Path(folder) / "model" / "config.json").exists():
        raise InputError(f"{folder}: a run folder; its model is {Path(folder) / 'model'}")
    config = ModelConfig.from_hf(read_json(path), source=str(path))
    with torch.device("meta"):
        return Decoder(config)


def _read_weights(folder: Path, model: Decoder, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """The model's parameters by name: exactly those, each of the right shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    allowed = shapes | ({HEAD: shapes[EMBEDDING]} if model.config.tie_word_embeddings else {})
    weights: dict[str, Tensor] = {}
    for path in weight_files(folder):
        for name, tensor in _read_tensors(path):
            if name.endswith("rotary_emb.inv_freq"):  # old Llama files hold this constant
                continue
            if name not in allowed or name in weights:
                raise InputError(f"{path}: unexpected tensor {name}")
            if tensor.shape != allowed[name] or tensor.dtype not in FLOATS:
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise InputError(f"{path}: tensor {name} is {found}, not of 16 to 64 bit floats {tuple(allowed[name])}")
            weights[name] = tensor.to(device, dtype, copy=True)  # a view would change with the mapped file
            if not _finite(weights[name]):
                raise InputError(f"{path}: tensor {name} is not finite as {dtype}")
    for name in sorted(shapes.keys() - weights.keys()):
        raise InputError(f"{folder}: tensor {name} is missing")
    # A tied head may be repeated in the file, but two different ones would be two different models.
    if HEAD not in shapes and not torch.equal(weights.pop(HEAD, weights[EMBEDDING]), weights[EMBEDDING]):
        raise InputError(f"{folder}: config.json ties {HEAD} to {EMBEDDING}, but they differ")
    return weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model's folder."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} in it")
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{index}: field 'weight_map' must map tensor names to file names")
    for shard in shards.values():
        if Path(shard).name != shard or "\0" in shard:
            raise InputError(f"{index}: shard {shard!r} is not a file name in this folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _finite(tensor: Tensor) -> bool:
    """In one pass without a copy: the extremes of a tensor with a NaN are NaN."""
    return all(extreme.isfinite() for extreme in tensor.aminmax())


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, each a view of the mapped file: copy what is to be kept."""
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a whole safetensors file ({error})") from None


def save(
    model: Decoder, folder: str | Path, tokenizer: Tokenizer | None = None, dtype: torch.dtype | None = None,
    ranks: Ranks = ALONE
) -> None:
    """Write a folder that `load`, transformers and vLLM open, replacing an earlier checkpoint of that name.

    dtype: that of the stored weights, by default the parameters' own. All `ranks` call it, and the main one writes.
    """
    weights = ranks.tensors(model.state_dict())
    if ranks.main:
        with _replacing(Path(folder)) as aside:
            _write_model(model, weights, aside, tokenizer, dtype)


def _write_model(model: Decoder, weights: dict[str, Tensor], folder: Path, tokenizer: Tokenizer | None,
                 dtype: torch.dtype | None):
    dtype = dtype or model.lm_head_weight.dtype
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    if broken := [name for name, tensor in weights.items() if not _finite(tensor)]:
        raise InputError(f"{folder.parent}: a model was not saved, as {dtype} not all of {broken[0]} is finite")
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})  # older transformers want the metadata
    _write_json(folder / "config.json", model.config.to_hf(str(dtype).removeprefix("torch.")))
    # safetensors makes its file private; another user, as a server may be, reads what the umask lets them
    (folder / WEIGHTS).chmod((folder / "config.json").stat().st_mode)
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        _write_json(folder / "generation_config.json", ids)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, mostly
        raise InputError(f"{path}: not written ({error})") from None


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place, whole and on disk, if the block succeeds."""
    folder = folder.resolve()
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not a checkpoint, so it is not replaced")
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
    if old.exists() and not folder.exists():  # a process was killed between the two renamings below
        old.rename(folder)
    for leftover in (aside, old):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        yield aside
        for path in (*aside.iterdir(), aside):
            _flush(path)
        if folder.exists():
            folder.rename(old)
        aside.rename(folder)
    except BaseException:  # Ctrl-C too
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(aside, ignore_errors=True)
        raise
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_training(
    folder: str | Path, model: Decoder, optimizer: Optimizer, state: dict, tokenizer: Tokenizer | None = None,
    ranks: Ranks = ALONE
) -> None:
    """`save`, and what resuming needs: AdamW's moments and `state`, what JSON can hold of "step", a number, and more.

    All `ranks` call it.
    """
    weights = ranks.tensors(model.state_dict())  # first: it puts back what a forward pass may have left unsharded
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = ranks.tensors({
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    })
    if not ranks.main:
        return
    with _replacing(Path(folder)) as aside:
        _write_model(model, weights, aside, tokenizer, dtype=None)
        write_tensors(aside / TRAINING_TENSORS, tensors)
        _write_json(aside / TRAINING, state)


def load_training(folder: str | Path, model: Decoder, optimizer: Optimizer, updates: int | None = 1) -> dict:
    """Fill `model` and `optimizer` (AdamW) in place from a folder of `save_training`; returns the `state` given then.

    `updates`: optimizer steps in each step; None: any number. Learning rate, betas and the like stay those of `optimizer`.
    A folder of another model, or a damaged one, is an InputError, and then nothing is filled.
    """
    folder, device = Path(folder), model.device
    state, moments = read_state(folder), _read_moments(folder / TRAINING_TENSORS)
    path = folder / "config.json"
    if ModelConfig.from_hf(read_json(path), source=str(path)) != model.config:
        raise InputError(f"{path}: not the model that this run starts from")
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    _check_moments(moments, model, order, state["step"], updates, folder / TRAINING_TENSORS)
    weights = _read_weights(folder, model, model.lm_head_weight.dtype, device)
    model.load_state_dict({name: part(tensor, model.get_parameter(name)) for name, tensor in weights.items()})
    # Loading by position lets the optimizer put each tensor where its implementation (fused or not) wants it.
    by_position = {position: {key: value if key == "step" else part(value, model.get_parameter(name))
                              for key, value in moments[name].items()}
                   for position, name in enumerate(order) if name in moments}
    optimizer.load_state_dict({"state": by_position, "param_groups": optimizer.state_dict()["param_groups"]})
    return state


def _read_moments(path: Path) -> dict[str, dict[str, Tensor]]:
    """{parameter name: {"step", "exp_avg", ...}}"""
    moments: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read_tensors(path):
        parameter, _, key = name.removeprefix("optimizer/").rpartition("/")
        moments.setdefault(parameter, {})[key] = tensor.clone()
    return moments


def _check_moments(moments: dict, model: Decoder, order: list[str], step: int, updates: int | None, path: Path) -> None:
    """InputError unless they are AdamW's of the parameters `order` after `step` steps of `updates` each."""
    if moments.keys() != (set(order) if step else set()):  # none at all before the first step
        raise InputError(f"{path}: the optimizer's tensors are not those of this model at step {step}")
    for name in moments:
        shapes = {"step": torch.Size(), "exp_avg": model.get_parameter(name).shape}
        shapes["exp_avg_sq"] = shapes["exp_avg"]
        if {key: value.shape for key, value in moments[name].items()} != shapes:
            raise InputError(f"{path}: the optimizer's tensors of {name} have the wrong shape")
        for key, value in moments[name].items():
            if value.dtype not in FLOATS or not _finite(value) or key != "exp_avg" and value.min() < 0:
                raise InputError(f"{path}: the optimizer's {key} of {name} holds what no training leaves there")
        found = moments[name]["step"].item()
        if updates is not None and found != step * updates:
            raise InputError(f"{path}: {found:g} updates of {name}, but {TRAINING} says step {step}, of {updates}")


def read_state(folder: str | Path) -> dict:
    """The `state` that `save_training` was given. InputError if it does not know its step."""
    path = Path(folder) / TRAINING
    step = (state := read_json(path)).get("step")
    if type(step) is not int or step < 0:
        raise InputError(f"{path}: field 'step' must be a whole number, not {step!r}")
    return state


def latest(checkpoints: str | Path) -> Path | None:
    """The folder step_K in `checkpoints` that training resumes from: the largest K. None if there is none."""
    return next(iter(_newest_first(checkpoints)), None)


def prune(checkpoints: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest folders (0: none is), and what a killed process left of its own."""
    for path in _newest_first(checkpoints)[keep:] if keep else []:
        path.rename(path.with_name(f".{path.name}.old"))  # at once: half a checkpoint is never taken for one
    for path in (*Path(checkpoints).glob(".step_*.part"), *Path(checkpoints).glob(".step_*.old")):
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _newest_first(checkpoints: str | Path) -> list[Path]:
    found = {int(path.parent.name.removeprefix("step_")): path.parent
             for path in Path(checkpoints).glob("step_*/" + TRAINING) if re.fullmatch("step_[0-9]+", path.parent.name)}
    return [found[step] for step in sorted(found, reverse=True)]
