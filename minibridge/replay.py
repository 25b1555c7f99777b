"""A step of RL whose loss or gradient was not finite: what it leaves behind, and a second look at it.

    python train_rl.py --replay runs/rl/failed_step_0007.safetensors

The file holds the policy just before that update and the micro-batches with all that the loss reads, so the replay needs
neither the run folder nor the reference model. It says which micro-batch and which answers went wrong, and where first:
in the weights, in an input of the loss, at a module of the forward pass, in the loss itself, or in the backward pass.
"""
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minibridge import checkpoint
from minibridge.config import REQUIRED, InputError, no_memory, option
from minibridge.grpo import Recipe
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.opening import DTYPES, pick_device
from minibridge.parallel import ALONE, Ranks
from minibridge.policy import MicroBatch, StepTotals, share_of_loss

OF_THE_PROMPTS = ("prompts", "prompt_lengths")  # all other fields of a MicroBatch have a row for each answer


@dataclass(frozen=True)
class Config:
    replay: str = option(REQUIRED, "failed_step_*.safetensors of a run folder")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


def save_failure(path: Path, model: Decoder, batches: list[MicroBatch], step: StepTotals, ranks: Ranks = ALONE):
    """Write what `load_failure` reads: all tensors, and in the file's metadata the shape of the model and the recipe. All
    `ranks` call it with their micro-batches."""
    tensors = ranks.tensors({f"model/{name}": tensor for name, tensor in model.state_dict().items()})
    values = [{name: value.tolist() for name, value in vars(batch).items() if value is not None} for batch in batches]
    for number, batch in enumerate(ranks.gather(values)):
        tensors |= {f"{number}/{name}": torch.tensor(value) for name, value in batch.items()}
    if not ranks.main:
        return
    aside = path.with_name(f".{path.name}.part")
    metadata = {"model": model.config.to_hf(), "dtype": str(model.activation_dtype), "step": dataclasses.asdict(step)}
    checkpoint.write_tensors(aside, tensors, {name: json.dumps(value) for name, value in metadata.items()})
    aside.rename(path)


def load_failure(path: str | Path, device: torch.device) -> tuple[Decoder, list[MicroBatch], StepTotals]:
    """Raises InputError for anything but a file of `save_failure`."""
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
        model = Decoder(ModelConfig.from_hf(metadata["model"]))
        model.load_state_dict({name.removeprefix("model/"): tensor for name, tensor in tensors.items()
                               if name.startswith("model/")}, assign=True)
        model.compute_dtype = {str(dtype): dtype for dtype in DTYPES.values()}[metadata["dtype"]]
        parts: dict[int, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            number, _, field = name.partition("/")
            if number != "model":
                parts.setdefault(int(number), {})[field] = tensor
        batches = [MicroBatch(**parts[number]) for number in sorted(parts)]
        return model, batches, StepTotals(**metadata["step"] | {"recipe": Recipe(**metadata["step"]["recipe"])})
    except OSError as error:
        raise InputError(f"{path}: not read ({error.strerror or error})") from None
    except (SafetensorError, InputError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        if no_memory(error):
            raise
        raise InputError(f"{path}: not what a failed step leaves ({str(error).splitlines()[0]})") from None


@dataclass(frozen=True)
class Finding:
    """A micro-batch's share of the loss, its gradient's norm, and where a value was not finite first ("": nowhere)."""
    loss: float
    norm: float
    where: str


def examine(model: Decoder, batch: MicroBatch, step: StepTotals) -> Finding:
    model.zero_grad(set_to_none=True)
    inputs = [name for name, value in vars(batch).items() if value is not None and not value.isfinite().all()]
    with _watching(model) as modules:
        loss, _ = share_of_loss(model, batch, step)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm().item()
    unfinished = [name for name, gradient in gradients.items() if not gradient.isfinite().all()]
    places = ([f"input {name}" for name in inputs] + [f"output of {name}" for name in modules]
              + ["the loss"] * (not loss.isfinite()) + [f"gradient of {name}" for name in reversed(unfinished)])
    return Finding(loss.item(), norm, (places + [""])[0])


@contextmanager
def _watching(model: Decoder) -> Iterator[list[str]]:
    """The names of the modules whose output is not finite, in the order of their ends: the first is where it began."""
    names: list[str] = []

    def note(name: str):
        return lambda module, inputs, output: None if output.isfinite().all() else names.append(name)

    handles = [module.register_forward_hook(note(name or "the decoder")) for name, module in model.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def rows(batch: MicroBatch) -> Iterator[MicroBatch]:
    """Each answer alone, with its prompt."""
    for row, prompt in enumerate(batch.owner.tolist()):
        parts = {name: value if value is None else value[prompt, None] if name in OF_THE_PROMPTS else value[row, None]
                 for name, value in vars(batch).items()}
        yield MicroBatch(**parts | {"owner": torch.zeros_like(parts["owner"])})


def main(config: Config):
    model, batches, step = load_failure(config.replay, pick_device(config.device))
    try:
        _report(model, batches, step)
    except (RuntimeError, IndexError, ValueError, TypeError, OverflowError) as error:  # what does not fit together
        if no_memory(error):
            raise
        raise InputError(f"{config.replay}: not what a failed step leaves ({str(error).splitlines()[0]})") from None


def _report(model: Decoder, batches: list[MicroBatch], step: StepTotals):
    broken = [name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()]
    print(f"weights that are not finite: {', '.join(broken) or 'none'}")
    print(f"\n{'micro-batch':<12} {'answers':>7} {'tokens':>7} {'loss':>12} {'grad norm':>12}  first not finite")
    for number, batch in enumerate(batches):
        _print(str(number), batch, found := examine(model, batch, step))
        if found.where:
            for row, answer in enumerate(rows(batch)):
                if (alone := examine(model, answer, step)).where:
                    _print(f"  answer {row}", answer, alone)


def _print(name: str, batch: MicroBatch, found: Finding):
    tokens = int(batch.trained.sum())
    print(f"{name:<12} {len(batch.answers):>7} {tokens:>7} {found.loss:>12.4g} {found.norm:>12.4g}  {found.where or '-'}")
