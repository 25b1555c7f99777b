"""One optimizer step is one step: however it is cut into micro-batches, ordered, packed or padded, the scripts' own
training code gives the same loss, the same gradient and the same numbers in the log."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import train_rl
import train_sft
from conftest import make_model, metrics, without_times
from minibridge.config import parse, run_main
from minibridge.data import Example, Prompt, load_sft
from minibridge.generate import generate
from minibridge.grpo import PRESETS
from minibridge.policy import MicroBatch, pack
from minibridge.rollout import Episode

CPU = torch.device("cpu")
LAYOUTS = [(10**6, 1, 7), (150, 2, 3), (1, None, 5)]  # tokens of a micro-batch, seed of the order, more padding
# Of the gradient, relative to its norm. In fp32 every layout is 1e-6 to 1.6e-6 away from the fp64 gradient.
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def gradient(model) -> torch.Tensor:
    """All parameters' in one vector, which are then cleared."""
    found = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    model.zero_grad()
    return found


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return ((one - other).norm() / other.norm()).item()


# ---- RL


@pytest.fixture(scope="module")
def groups(toy) -> list[list[Episode]]:
    """20 rollouts of 1 to 40 tokens, each token's noted log-probability off by some 0.1 or 0.2."""
    rng = random.Random(0)
    prompts = [Prompt([rng.randrange(300) for _ in range(length)], "6", {}) for length in (3, 40, 11, 1, 25)]
    found = generate(toy.load(), [prompt.ids for prompt in prompts], 4, 40, 0.7, stop_ids=range(0, 400, 60),
                     generator=torch.Generator().manual_seed(0))
    for completion in (completion for group in found for completion in group):
        completion.logprobs = [logprob + rng.gauss(0, 0.15) for logprob in completion.logprobs]
    return [[Episode(prompt, completion, "", False, False, rng.random()) for completion in group]
            for prompt, group in zip(prompts, found)]


def padded(batch: MicroBatch, columns: int) -> MicroBatch:
    """More padding than is needed, of ids that mean something."""
    filled = {name: F.pad(getattr(batch, name), (0, columns), value=value)
              for name, value in (("prompts", 5), ("answers", 6), ("trained", False), ("sampled_logps", 9.0))}
    return replace(batch, **filled)


def arranged(groups, advantages, layout) -> list[MicroBatch]:
    micro_tokens, seed, columns = layout
    if seed is not None:
        rng = random.Random(seed)
        rows = rng.sample(range(len(groups)), len(groups))
        orders = {row: rng.sample(range(len(groups[row])), len(groups[row])) for row in rows}
        groups = [[groups[row][column] for column in orders[row]] for row in rows]
        advantages = torch.stack([advantages[row][orders[row]] for row in rows])
    return [padded(batch, columns) for batch in pack(groups, advantages, micro_tokens, CPU)]


RECIPES = [f"--preset {name} --old-logps {'recomputed' if recipe.clip_low is None else 'sampler'}"
           for name, recipe in PRESETS.items()] + [
    f"--preset {name} --tis-cap 1.1 --mask-truncated" for name in ("paper", "gspo", "cispo")] + [
    "--old-logps sampler --kl-threshold 2.2 --mask-truncated", "--preset dr_grpo --kl-threshold 2.2 --tis-cap 1.1"]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("recipe", RECIPES)
def test_an_rl_step(toy, groups, monkeypatch, recipe, dtype):
    """Every number that `optimizer_steps` returns, and the gradient it takes. In fp64 nothing but rounding is left to differ."""
    config = parse(train_rl.Config, f"--model x --data x --out x --temperature 0.7 --max-new-tokens 40 {recipe} "
                                    "--kl-coef 0.1 --entropy-coef 0.05".split())
    model, reference = toy.load().to(dtype), make_model(toy.tokenizer.vocab_size, seed=1).to(dtype)
    caught = []
    monkeypatch.setattr(train_rl, "update", lambda *_: caught.append(gradient(model)) or caught[-1].norm().item())
    chosen = PRESETS[config.preset]
    rewards = torch.tensor([[episode.reward for episode in group] for group in groups])
    advantages = chosen.advantages(rewards) + 0.3  # or losses would be near 0
    results, sizes = [], set()
    for layout in [(10**6, None, 0), *LAYOUTS]:
        batches = arranged(groups, advantages, layout)
        results.append(train_rl.optimizer_steps(model, reference, None, batches, 0.1, config))
        sizes.add(len(batches))
    assert min(sizes) == 1 and max(sizes) == 20 and len(sizes) == 3
    assert 0.01 < results[0]["clip_fraction"] < 0.99 or "tis" in recipe or chosen.surrogate in ("reinforce", "cispo")
    assert 0 < results[0]["kept"] < 0.9 or "mask" not in recipe and "threshold" not in recipe
    assert results[0]["importance"] != pytest.approx(1, abs=1e-3) if "tis" in recipe else "importance" not in results[0]
    for found, one in zip(results[1:], caught[1:]):
        assert found.pop("mismatch") == pytest.approx(results[0]["mismatch"], abs=2e-6)  # one log-prob's last bits
        least = 3e-8 if dtype == torch.float32 else 0  # of a loss near 0, which is left of terms near 1
        assert found == pytest.approx({name: results[0][name] for name in found}, rel=1e-6, abs=least)
        assert distance(one, caught[0]) < TOLERANCE[dtype] and (one - caught[0]).abs().max() < 1e-6


def test_what_an_rl_run_logs(toy, guesser, tmp_path, monkeypatch):
    """From the first step's rollouts, which are the same; what is 0 but for rounding stays 0 but for rounding."""
    rows, cuts = [], []
    monkeypatch.setattr(train_rl, "pack", lambda *given: cuts.append(pack(*given)) or cuts[-1])
    for number, micro_tokens in enumerate((16384, 400, 200)):
        words = f"""--model {guesser} --data {toy.rl} --out {tmp_path}/{number} --device cpu --prompts 3 --samples 8
                    --steps 1 --max-new-tokens 20 --show-every 0 --old-logps sampler --micro-tokens {micro_tokens}"""
        assert run_main(train_rl.main, train_rl.Config, words.split()) == 0
        (row,) = without_times(metrics(tmp_path / str(number)))
        rows.append(row)
    assert len({len(batches) for batches in cuts}) == 3
    assert rows[0]["grad_norm"] > 0.01 and rows[0]["dead_groups"] < 1
    for row in rows[1:]:
        assert row == pytest.approx(rows[0], rel=1e-6, abs=2e-6)


# ---- SFT


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("whole_chat", [False, True])
def test_an_sft_step(toy, whole_chat, dtype):
    examples = load_sft(toy.sft, toy.tokenizer, 800, whole_chat)
    examples[2] = Example(examples[2].ids, [0] * (len(examples[2].ids) - 3) + [1, 0, 1])  # few to learn, some in the midst
    model, results = toy.load().to(dtype), []
    longest = max(len(example.ids) for example in examples)
    for micro_tokens in (10**6, longest, 3 * longest):
        for seed in (None, 0):
            batch = examples if seed is None else random.Random(seed).sample(examples, len(examples))
            config = parse(train_sft.Config, f"--model x --data x --out x --micro-tokens {micro_tokens}".split())
            loss = train_sft.accumulate(model, batch, config)
            results.append((loss, gradient(model)))
    for loss, one in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-6 if dtype == torch.float32 else 1e-12)
        assert distance(one, results[0][1]) < TOLERANCE[dtype]


def test_what_an_sft_run_logs(toy, tmp_path):
    rows = []
    for number, micro_tokens in enumerate((16384, 1200, 500)):
        words = f"""--model {toy.model} --data {toy.sft} --val {toy.sft} --out {tmp_path}/{number} --device cpu
                    --batch-size 12 --epochs 1 --max-length 800 --micro-tokens {micro_tokens}"""
        assert run_main(train_sft.main, train_sft.Config, words.split()) == 0
        rows += without_times(metrics(tmp_path / str(number)))
    assert {"loss", "grad_norm", "val_loss"} <= set(rows[0]) and len(rows) == 3
    assert rows[1] == pytest.approx(rows[0], rel=1e-6) and rows[2] == pytest.approx(rows[0], rel=1e-6)
