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
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer

from minibridge.config import InputError
from minibridge.model import Decoder, ModelConfig
from minibridge.parallel import ALONE, Ranks
from minibridge.sharding import part
from minibridge.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
TRAINING = "training.json"  # present only in a checkpoint that training can resume from
TRAINING_TENSORS = "training.safetensors"
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


def load(
    folder: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> Decoder:
    """Open a Hugging Face folder; weights stored as bf16, fp16 or fp32 are cast to `dtype`.

    Raises InputError for a missing or broken file, or a tensor missing, unexpected or wrong in shape.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    path = folder / "config.json"
    config = ModelConfig.from_hf(_read_json(path), source=str(path))
    with torch.device("meta"):  # shapes only: no time is spent on weights about to be replaced
        model = Decoder(config)
    model.load_state_dict(_read_weights(folder, model, dtype, device), assign=True)
    return model


def _read_weights(folder: Path, model: Decoder, dtype: torch.dtype, device) -> dict[str, Tensor]:
    """The model's parameters by name: exactly those, each of the right shape."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    allowed = shapes | ({HEAD: shapes[EMBEDDING]} if model.config.tie_word_embeddings else {})
    weights: dict[str, Tensor] = {}
    for path in _weight_files(folder):
        for name, tensor in _read_tensors(path):
            if name.endswith("rotary_emb.inv_freq"):  # old Llama files hold this constant
                continue
            if name not in allowed or name in weights:
                raise InputError(f"{path}: unexpected tensor {name}")
            if tensor.shape != allowed[name] or not tensor.is_floating_point():
                found = f"{tensor.dtype} {tuple(tensor.shape)}"
                raise InputError(f"{path}: tensor {name} is {found}, not floats {tuple(allowed[name])}")
            weights[name] = tensor.to(device, dtype, copy=True)  # a view would change with the mapped file
    for name in sorted(shapes.keys() - weights.keys()):
        raise InputError(f"{folder}: tensor {name} is missing")
    # A tied head may be repeated in the file, but two different ones would be two different models.
    if HEAD not in shapes and not torch.equal(weights.pop(HEAD, weights[EMBEDDING]), weights[EMBEDDING]):
        raise InputError(f"{folder}: config.json ties {HEAD} to {EMBEDDING}, but they differ")
    return weights


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    index = folder / INDEX
    if not index.is_file():
        raise InputError(f"{folder}: neither {WEIGHTS} nor {INDEX} in it")
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
        raise InputError(f"{index}: field 'weight_map' must map tensor names to file names")
    for shard in shards.values():
        if Path(shard).name != shard:
            raise InputError(f"{index}: shard {shard!r} is not a file name in this folder")
    return [folder / shard for shard in sorted(set(shards.values()))]


def _read_json(path: Path) -> dict:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:  # bad JSON or bad UTF-8
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object")
    return data


def _read_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) one at a time, each a view of the mapped file: copy what is to be kept."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)
    except SafetensorError as error:
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
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise InputError(f"{folder.parent}: a model was not saved, as {dtype} not all of {broken[0]} is finite")
    write_tensors(folder / WEIGHTS, weights, {"format": "pt"})  # older transformers want the metadata
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes it private; a server under another user could not read it
    _write_json(folder / "config.json", model.config.to_hf(str(dtype).removeprefix("torch.")))
    if tokenizer is not None:
        tokenizer.save(folder)
        ids = {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}
        _write_json(folder / "generation_config.json", ids)


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as error:  # a full disk, mostly
        raise InputError(f"{path.parent.parent}: a model was not saved there ({error})") from None


def _write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place, whole and on disk, if the block succeeds."""
    folder = folder.resolve()
    if folder.exists() and not (folder / "config.json").is_file() and any(folder.iterdir()):
        raise InputError(f"{folder}: exists and is not a checkpoint, so it is not replaced")
    aside, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("part", "old"))
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
    """`save`, and what resuming needs: the optimizer's moments and `state`, which holds "step", a number.

    The values of `state` are tensors (a generator's `get_state()`) or what JSON can hold. All `ranks` call it.
    """
    weights = ranks.tensors(model.state_dict())  # first: it puts back what a forward pass may have left unsharded
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = ranks.tensors({
        f"optimizer/{names[parameter]}/{key}": value
        for parameter, moments in optimizer.state.items()
        for key, value in moments.items()
    })  # fmt: skip
    if not ranks.main:
        return
    tensors |= {f"state/{key}": value.cpu() for key, value in state.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in state.items() if not isinstance(value, Tensor)}
    with _replacing(Path(folder)) as aside:
        _write_model(model, weights, aside, tokenizer, dtype=None)
        write_tensors(aside / TRAINING_TENSORS, tensors)
        _write_json(aside / TRAINING, numbers)


def load_training(folder: str | Path, model: Decoder, optimizer: Optimizer) -> dict:
    """Fill `model` and `optimizer` in place from a folder of `save_training`; returns the `state` given then.

    Learning rate, betas and the like stay those of `optimizer`. A folder of another model is an InputError.
    """
    folder = Path(folder)
    state, moments = _read_json(folder / TRAINING), {}
    for name, tensor in _read_tensors(folder / TRAINING_TENSORS):
        kind, _, rest = name.partition("/")
        if kind == "state":
            state[rest] = tensor.clone()
        else:
            parameter, _, key = rest.rpartition("/")
            moments.setdefault(parameter, {})[key] = tensor.clone()
    parameter = next(model.parameters())
    weights = _read_weights(folder, model, parameter.dtype, parameter.device)
    model.load_state_dict({name: part(tensor, model.get_parameter(name)) for name, tensor in weights.items()})
    _fill_optimizer(optimizer, model, moments, folder / TRAINING_TENSORS)
    return state


def _fill_optimizer(optimizer: Optimizer, model: Decoder, moments: dict, path: Path) -> None:
    """Give `optimizer` the moments {parameter name: {"step", "exp_avg", ...}}."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    if moments and moments.keys() != set(order):  # none at all before the first step
        raise InputError(f"{path}: the optimizer's tensors are not those of this model")
    for parameter, name in names.items():
        if any(key != "step" and value.shape != parameter.shape for key, value in moments.get(name, {}).items()):
            raise InputError(f"{path}: the optimizer's tensors of {name} have the wrong shape")
    # Loading by position lets the optimizer put each tensor where its implementation (fused or not) wants it.
    settings = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({
        "state": {position: {key: value if key == "step" else part(value, model.get_parameter(name))
                             for key, value in moments[name].items()}
                  for position, name in enumerate(order) if name in moments},
        "param_groups": settings,
    })  # fmt: skip


def read_state(folder: str | Path) -> dict:
    """The numbers among the `state` that `save_training` was given."""
    return _read_json(Path(folder) / TRAINING)


def latest(checkpoints: str | Path) -> Path | None:
    """The folder in `checkpoints` that training resumes from: the largest step. None if there is none."""
    return next(iter(_newest_first(checkpoints)), None)


def prune(checkpoints: str | Path, keep: int) -> None:
    """Delete all but the `keep` newest folders (0: none is), and what a killed process left of its own."""
    for path in _newest_first(checkpoints)[keep:] if keep else []:
        path.rename(path.with_name(f".{path.name}.old"))  # at once: half a checkpoint is never taken for one
    for path in Path(checkpoints).glob(".*"):
        shutil.rmtree(path)


def _newest_first(checkpoints: str | Path) -> list[Path]:
    found = {}
    for path in Path(checkpoints).glob("[!.]*/" + TRAINING):
        step = read_state(path.parent).get("step")
        if type(step) is not int or step < 0:
            raise InputError(f"{path}: field 'step' must be a whole number, not {step!r}")
        found[step] = path.parent
    return [found[step] for step in sorted(found, reverse=True)]
