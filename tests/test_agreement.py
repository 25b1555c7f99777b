"""The sampler's log-probabilities against the trainer's: decoding with a cache, and one forward pass over prompts and
answers, are two ways to the same numbers. What is left is rounding, whose size is measured here."""

import random

import pytest
import torch

from minibridge import checkpoint
from minibridge.data import Prompt, load_prompts
from minibridge.generate import generate
from minibridge.grpo import PRESETS
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.policy import pack, share_of_loss, total, whole_step
from minibridge.reproduce import TOY_BASE
from minibridge.rollout import Episode
from minibridge.tokenizer import Tokenizer

SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def build(kind: str) -> Decoder:
    config = ModelConfig(kind, 200, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, head_dim=8, max_position_embeddings=1024,
                         tie_word_embeddings=kind == "qwen2", rope_scaling=SCALING if kind == "llama" else None)
    model, generator = Decoder(config), torch.Generator().manual_seed(0)
    model.init_weights(generator, std=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def agreement(model: Decoder, prompts: list[list[int]], temperature: float, new_tokens: int) -> dict[str, float]:
    """A step's metrics on fresh samples: six a prompt, decoded seven at a time, trained 800 tokens at a time."""
    found = generate(model, prompts, 6, new_tokens, temperature, stop_ids=(1, 2), rows=7,
                     generator=torch.Generator().manual_seed(0))
    groups = [[Episode(Prompt(ids, "", {}), completion, "", False, False, 0.0) for completion in group]
              for ids, group in zip(prompts, found)]
    batches = pack(groups, torch.zeros(len(prompts), 6), 800, torch.device("cpu"))
    step = whole_step(batches, PRESETS["dapo"], temperature, new_tokens)
    assert step.tokens > 800
    with torch.no_grad():
        return total([share_of_loss(model, batch, step)[1] for batch in batches], step)


def some_prompts(vocabulary: int) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(vocabulary) for _ in range(length)] for length in (1, 90, 9, 40, 9)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["qwen2", "qwen3", "llama"])
def test_they_agree_to_fp32_rounding(kind, temperature):
    """Seen: 3e-6 to 7e-6 for the worst of some 1,800 tokens, 5e-7 to 8e-7 in the mean; log-probabilities are near -5."""
    found = agreement(build(kind), some_prompts(200), temperature, 60)
    assert 0 < found["mismatch_mean"] < found["mismatch"] < 2e-5 and found["mismatch_mean"] < 2e-6


def test_what_bf16_costs():
    """Seen, with all three kinds: up to 0.16 for the worst token, 0.010 to 0.018 in the mean. bf16 keeps 8 bits."""
    model = build("qwen2")
    model.compute_dtype = torch.bfloat16
    found = agreement(model, some_prompts(200), 0.7, 60)
    assert 1e-3 < found["mismatch_mean"] < 0.05 and 1e-2 < found["mismatch"] < 0.5


@pytest.mark.parametrize("dtype, largest, mean", [(torch.float32, 5e-5, 2e-6), (torch.bfloat16, 0.5, 0.01)])
def test_the_toy_base_model(toy, dtype, largest, mean):
    """A trained model, sure of most tokens. Seen: 1.1e-5 and 5e-7 in fp32, 0.13 and 0.0025 in bf16."""
    model, tokenizer = checkpoint.load(TOY_BASE), Tokenizer.load(TOY_BASE)
    model.compute_dtype = dtype
    found = agreement(model, [prompt.ids for prompt in load_prompts(toy.rl, tokenizer, 512)[:4]], 1.0, 60)
    assert found["mismatch"] < largest and found["mismatch_mean"] < mean
