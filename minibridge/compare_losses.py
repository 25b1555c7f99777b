"""What the presets of `grpo` make of one and the same step: loss, gradient norm, and the angles between gradients.

    python -m minibridge.compare_losses --rollouts runs/rl/rollouts/step_0001.jsonl --model runs/sft/model

Each row is what `train_rl.py --preset NAME --old-logps sampler` would minimise in its first update on these rollouts
(grpo_zero, which has no ratios: without that flag), KL and entropy terms included. With the model that sampled them the
ratios are 1, and presets differ by their advantages and by the weights of tokens alone; with a later one, by their clips as
well. (All is computed in fp32. Rollouts sampled in bf16 have ratios a little off 1, and the narrow range of gspo clips
some.) The run.json of the run folder says where the prompts and the reference are, at what temperature it sampled, and how
long an answer may be.

One gradient a preset is kept on the CPU: 24 bytes a parameter. One that is zero has no direction: its cosines are nan.
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from minibridge.config import REQUIRED, InputError, option, read_json, run_main
from minibridge.data import load_prompts
from minibridge.grpo import PRESETS, Recipe
from minibridge.jvp import Direction, inner
from minibridge.model import Decoder
from minibridge.opening import open_model, pick_device
from minibridge.policy import answer_logps, pack, share_of_loss, total, whole_step
from minibridge.rollout import Episode, read_episodes, rewards
from minibridge.tables import markdown


@dataclass(frozen=True)
class Config:
    rollouts: str = option(REQUIRED, "JSONL file of a step of train_rl.py, where that script has left it")
    model: str = option(REQUIRED, "Hugging Face folder of the policy")
    data: str | None = option(None, "JSONL file of the prompts; none: the run's")
    reference: str | None = option(None, "Hugging Face folder of the reference of the KL term; none: the run's")
    micro_tokens: int = option(8192, "most tokens trained at a time, as if padded: sets memory, no result", least=1)
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


@dataclass(frozen=True)
class Settings:
    """Of the run that sampled: fields of its run.json."""
    data: str
    model: str
    temperature: float
    max_new_tokens: int
    prompts: int

    @classmethod
    def read(cls, rollouts: str) -> "Settings":
        path = Path(rollouts).parent.parent / "run.json"
        try:
            saved = read_json(path)["config"]
            kinds = {"data": str, "model": str, "temperature": float, "max_new_tokens": int, "prompts": int}
            found = {name: saved[name] for name, kind in kinds.items() if type(saved[name]) is kind}
            if found.keys() == kinds.keys() and min(found["max_new_tokens"], found["prompts"]) > 0 < found["temperature"]:
                return cls(**found)
        except InputError as error:
            raise InputError(f"{error}; --rollouts must lie in a run folder") from None
        except (KeyError, TypeError):
            pass
        raise InputError(f"{path}: not the record of a run of train_rl.py")


def step_gradient(model: Decoder, reference: Decoder, groups: list[list[Episode]], recipe: Recipe, run: Settings,
             micro_tokens: int) -> tuple[dict[str, float], Direction]:
    """The metrics of the whole step and its gradient, fp32 on the CPU."""
    batches = pack(groups, recipe.advantages(rewards(groups)), micro_tokens, model.device)
    step = whole_step(batches, recipe, run.temperature, run.max_new_tokens)
    model.zero_grad()
    parts = []
    for batch in batches:
        batch.old_logps = batch.sampled_logps
        if recipe.kl_coef:
            with torch.no_grad():
                batch.ref_logps = answer_logps(reference, batch, run.temperature)[0]
        loss, metrics = share_of_loss(model, batch, step)
        loss.backward()
        parts.append(metrics)
    return total(parts, step), {name: parameter.grad.cpu() for name, parameter in model.named_parameters()}


def main(config: Config):
    run, device = Settings.read(config.rollouts), pick_device(config.device)
    model, tokenizer = open_model(config.model, device, "fp32")
    reference = open_model(config.reference or run.model, device, "fp32")[0]
    positions = model.config.max_position_embeddings
    prompts = load_prompts(config.data or run.data, tokenizer, positions, "positions of the model")
    groups = read_episodes(config.rollouts, prompts)[: run.prompts]
    largest = max(max(episode.completion.ids) for group in groups for episode in group)
    for who, size in (("model", model.config.vocab_size), ("reference", reference.config.vocab_size)):
        if largest >= size:
            raise InputError(f"{config.rollouts}: a token {largest}, but the {who}'s vocab_size is {size}")
    found = {name: step_gradient(model, reference, groups, recipe, run, config.micro_tokens)
             for name, recipe in PRESETS.items()}
    gradients = [gradient for _, gradient in found.values()]
    products = torch.tensor([[inner(a, b) for b in gradients] for a in gradients])  # fp32 has digits enough for these
    norms = products.diagonal().sqrt()
    cosines = products / (norms[:, None] * norms)
    print(markdown([{"preset": name, "loss": f"{metrics['loss']:.6f}", "gradient norm": f"{norm:.4g}",
                     "clipped": f"{metrics['clip_fraction']:.1%}"}
                    | {f"cosine with {other}": f"{cosine:.4f}" for other, cosine in zip(PRESETS, row)}
                    for (name, (metrics, _)), norm, row in zip(found.items(), norms, cosines.tolist())]))


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
