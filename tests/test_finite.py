"""Steps at the extremes: no NaN and no infinity in a loss, a metric, a gradient or a weight."""

import math
from dataclasses import replace

import pytest
import torch

import train_rl
from conftest import make_model, metrics
from minibridge import checkpoint
from minibridge.config import parse, read_jsonl, run_main
from minibridge.data import Prompt
from minibridge.generate import Completion, generate
from minibridge.grpo import PRESETS
from minibridge.optim import adamw
from minibridge.policy import pack
from minibridge.rollout import Episode
from train_rl import Config

CPU = torch.device("cpu")
VOCABULARY = 90


def sharp(factor: float):
    """A random model whose logits are some hundred times as far apart as usual: most probabilities round to 0."""
    model = make_model(VOCABULARY)
    with torch.no_grad():
        model.model.norm.weight *= factor
    return model


def rollouts(model, answer_tokens: int, stop_ids=()) -> list[list[Episode]]:
    prompts = [Prompt([3, 1, 4, 1, 5], "6", {}), Prompt([9], "6", {}), Prompt([2, 6], "6", {})]
    found = generate(model, [prompt.ids for prompt in prompts], 4, answer_tokens, stop_ids=stop_ids,
                     generator=torch.Generator().manual_seed(0))
    return [[Episode(prompt, completion, "", False, False, float(number == 1)) for number, completion in enumerate(group)]
            for prompt, group in zip(prompts, found)]


def changed(groups: list[list[Episode]], completion=lambda completion: completion, reward=lambda reward: reward):
    return [[replace(episode, completion=completion(episode.completion), reward=reward(episode.reward)) for episode in group]
            for group in groups]


def noted(logprob: float):
    """As if the sampler had noted this log-probability for every token."""
    return lambda completion: Completion(completion.ids, [logprob] * len(completion.ids), completion.finish_reason)


def cut(completion: Completion) -> Completion:
    return Completion(completion.ids[:1], completion.logprobs[:1], "stop")


CASES = {
    "the sampler far below": (lambda groups: changed(groups, noted(-1e4)), "--old-logps sampler"),
    "the sampler far above": (lambda groups: changed(groups, noted(0.0)), "--old-logps sampler"),
    "a weight far above": (lambda groups: changed(groups, noted(-1e4)), "--tis-cap 2"),
    "a weight far below": (lambda groups: changed(groups, noted(0.0)), "--tis-cap 2"),
    "identical rewards": (lambda groups: changed(groups, reward=lambda _: 0.1), ""),
    "rewards almost identical": (lambda groups: changed(groups, reward=lambda old: 1.0 + 1e-7 * old), ""),
    "huge rewards": (lambda groups: changed(groups, reward=lambda old: 1e15 * old), ""),
    "answers of one token": (lambda groups: changed(groups, cut), ""),
    "one long and many short": (lambda groups: [[group[0], *changed([group[1:]], cut)[0]] for group in groups], ""),
    "all truncated": (lambda groups: groups, "--mask-truncated"),
    "a threshold that drops all": (lambda groups: groups, "--kl-threshold 1e-30"),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_step_stays_finite(case, dtype, preset):
    change, flags = CASES[case]
    if PRESETS[preset].clip_low is None:  # it has no ratios
        flags = flags.replace("--old-logps sampler", "")
    flags += f" --model x --data x --out x --updates 2 --preset {preset} --kl-coef 0.1 --entropy-coef 0.1"
    config = parse(Config, flags.split())
    model, reference = sharp(40), sharp(-40)  # the reference finds almost impossible what the policy says
    model.compute_dtype = reference.compute_dtype = dtype
    groups = change(rollouts(model, 6))
    recipe = PRESETS[preset]
    rewards = torch.tensor([[episode.reward for episode in group] for group in groups])
    batches = pack(groups, recipe.advantages(rewards), 40, CPU)
    found = train_rl.optimizer_steps(model, reference, adamw(model, (0.9, 0.999), 0.01), batches, 1e-3, config)
    assert all(math.isfinite(value) for value in found.values()), found
    assert found["kept"] == 0 or "threshold" not in flags
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_rows_of_the_vocabulary_that_no_token_has(toy, tmp_path):
    """Models pad their vocabulary; a sampled id without a token is an answer like any other."""
    model = make_model(toy.tokenizer.vocab_size + 40)
    checkpoint.save(model, tmp_path / "model", toy.tokenizer)
    words = f"""--model {tmp_path / 'model'} --data {toy.rl} --out {tmp_path / 'run'} --device cpu --prompts 3 --samples 4
                --steps 2 --max-new-tokens 12 --temperature 5 --show-every 0"""
    assert run_main(train_rl.main, Config, words.split()) == 0
    lines = [line for path in (tmp_path / "run" / "rollouts").iterdir() for line in read_jsonl(path)]
    assert any(token >= toy.tokenizer.vocab_size for line in lines for token in line["ids"])
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in metrics(tmp_path / "run"))
