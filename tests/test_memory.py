"""Counted bytes against what the allocator hands out, in real steps of small models."""

import gc
import itertools
import random
from collections import Counter

import pytest
import torch

import train_rl
import train_sft
from minibridge import functional, memory
from minibridge.data import Example, Prompt
from minibridge.functional import MLP_ROWS
from minibridge.generate import Completion, generate
from minibridge.memory import Line, decoding, held, highest, sizes, training
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.optim import adamw, update
from minibridge.parallel import ALONE
from minibridge.policy import MicroBatch, pack
from minibridge.rollout import Episode

CPU = torch.device("cpu")


def shape(kind="qwen2", tied=True, keys=2, vocabulary=768, middle=320, mlp_bias=False, layers=2) -> ModelConfig:
    return ModelConfig(kind, vocabulary, hidden_size=128, intermediate_size=middle, num_hidden_layers=layers, num_attention_heads=4,
                       num_key_value_heads=keys, head_dim=32, max_position_embeddings=1024, tie_word_embeddings=tied,
                       mlp_bias=mlp_bias)


def live_bytes(phases) -> list[int]:
    """The most bytes that are allocated during each of the `phases`, functions that run one after the other; what the
    earlier ones leave counts too, as nothing was allocated before them."""
    gc.collect()  # what else would be freed in between has been counted by an earlier profile
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        for number, phase in enumerate(phases):
            with torch.profiler.record_function(f"phase {number}"):
                phase()
    events = profile.profiler.kineto_results.events()
    spans = sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in events
                   if event.name().startswith("phase "))
    highest, live = [0] * len(spans), 0
    for time, change in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        live += change
        for number, (start, end) in enumerate(spans):
            if start <= time <= end:
                highest[number] = max(highest[number], live)
    return highest


def build(config: ModelConfig, dtype, checkpointing=False) -> Decoder:
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    model.compute_dtype, model.checkpointing = dtype, checkpointing
    return model


def outline(config: ModelConfig, dtype, checkpointing=False, cuda=False):
    with torch.device("meta"):
        return sizes(Decoder(config), dtype.itemsize, cuda, checkpointing)


def answered(answers: list[list[Completion]], *prompts: list[int]) -> list[list[Episode]]:
    """One prompt for all, or one for each group."""
    return [[Episode(Prompt(prompt, "", {}), answer, "", False, False, 0.0) for answer in group]
            for prompt, group in zip(itertools.cycle(prompts), answers)]


def line_of(batch: MicroBatch) -> Line:
    asked, said = batch.prompt_lengths, batch.trained.sum(1)
    slots = (asked[batch.owner] + said).max()
    return Line(*map(int, (asked.sum() + said.sum(), len(said), slots, said.sum())))


def random_answers(lengths: list[list[int]]) -> list[list[Completion]]:
    return [[Completion([1] * length, [0.0] * length) for length in group] for group in lengths]


# Each setting has its peak at another moment, or most of it in other items.
@pytest.mark.parametrize("flags, prompts, samples, prompt, answer, micro, rows", [
    ({}, 4, 4, 30, 60, 10**6, 16),
    ({"reference": True}, 4, 6, 30, 60, 600, 7),
    ({}, 2, 3, 100, 250, 10**6, 6),                       # attention
    ({"checkpointing": True}, 4, 8, 30, 60, 600, 32),
    ({"checkpointing": True}, 2, 3, 100, 200, 10**6, 6),
    ({"checkpointing": True, "layers": 4}, 8, 2, 250, 5, 10**6, 6),  # prompts
    ({"checkpointing": True, "mlp_rows": 100, "layers": 4}, 8, 2, 250, 5, 10**6, 6),  # the MLP by parts
    ({"layers": 4}, 8, 2, 250, 5, 10**6, 6),
    ({"vocabulary": 20_000}, 2, 2, 5, 5, 10**6, 4),       # gradients of embedding and head
    ({"vocabulary": 20_000, "tied": False}, 2, 2, 5, 5, 10**6, 4),
    ({"dtype": torch.bfloat16, "reference": True}, 4, 4, 30, 60, 10**6, 16),
    ({"dtype": torch.bfloat16, "checkpointing": True}, 4, 4, 30, 60, 700, 16),
    ({"kind": "qwen3", "tied": False}, 4, 4, 30, 60, 10**6, 16),
    ({"kind": "llama", "keys": 4, "tied": False}, 4, 8, 30, 60, 400, 16),
    ({"kind": "llama", "mlp_bias": True}, 4, 4, 30, 60, 10**6, 16),
    ({"middle": 4096, "layers": 4}, 2, 2, 20, 20, 10**6, 4),  # the MLP's weights
    ({"threads": 100}, 2, 3, 100, 250, 10**6, 6),         # attention by rows
    ({"threads": 100, "dtype": torch.bfloat16}, 4, 4, 30, 60, 10**6, 16),
])
def test_a_grpo_step(monkeypatch, flags, prompts, samples, prompt, answer, micro, rows):
    flags = {"dtype": torch.float32, "checkpointing": False, "reference": False, "threads": 1, "mlp_rows": MLP_ROWS} | flags
    threads, mlp_rows = flags.pop("threads"), flags.pop("mlp_rows")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)  # decides how attention goes
    for module in (functional, memory):
        monkeypatch.setattr(module, "MLP_ROWS", mlp_rows)
    dtype, checkpointing, with_reference = flags.pop("dtype"), flags.pop("checkpointing"), flags.pop("reference")
    config, settings, ids = shape(**flags), train_rl.Config("", "", "", kl_coef=0.1 * with_reference), [1] * prompt
    made = []

    def begin():
        """Build, and one step, from which on there are Adam's moments."""
        model = build(config, dtype, checkpointing)
        reference = build(config, dtype).to(dtype) if with_reference else None
        made.extend((model, reference, adamw(model, (0.9, 0.999), 0.01)))
        train(random_answers([[2, 2]]))

    def train(answers):
        batches = pack(answered(answers, ids), torch.ones(len(answers), len(answers[0])), micro, CPU)
        train_rl.optimizer_steps(*made, batches, 0.0, settings)

    sampled, full = [], random_answers([[answer] * samples] * prompts)

    def sample():
        sampled.extend(generate(ALONE.sampler(made[0]), [ids] * prompts, samples, answer, rows=rows))

    _, decoded, trained = live_bytes([begin, sample, lambda: train(full)])
    assert [len(group) for group in sampled] == [samples] * prompts

    s = outline(config, dtype, checkpointing)
    always = held(s, with_reference, sampled=True)
    found = (always + decoding(s, prompts, samples, prompt, answer, rows)).total()
    assert found == pytest.approx(decoded, rel=0.05)
    parts = []
    for number, batch in enumerate(pack(answered(full, ids), torch.ones(prompts, samples), micro, CPU)):
        parts.append(training(s, line_of(batch), number == 0, entropy=True))
    assert (always + max(parts, key=Counter.total)).total() == pytest.approx(trained, rel=0.05)
    assert (always + highest(s, prompts * samples, samples, prompt, answer, micro, True)).total() > 0.97 * trained


@pytest.mark.parametrize("flags, micro", [
    ({}, 10**6), ({"checkpointing": True}, 500), ({"dtype": torch.bfloat16}, 500), ({"tied": False}, 250)])
def test_an_sft_step(flags, micro):
    flags = {"dtype": torch.float32, "checkpointing": False} | flags
    dtype, checkpointing = flags.pop("dtype"), flags.pop("checkpointing")
    config, settings, made = shape(**flags), train_sft.Config("", "", "", micro_tokens=micro), []
    examples = [Example([1] * 120, [0] + [1] * 119)] * 8

    def begin():
        made.append(build(config, dtype, checkpointing))
        made.append(adamw(made[0], (0.9, 0.95), 0.01))
        train()

    def train():
        train_sft.accumulate(made[0], examples, settings)
        update(*made, 0.0, 1.0)

    _, trained = live_bytes([begin, train])
    s = outline(config, dtype, checkpointing)
    found = (held(s, False, sampled=False) + highest(s, 8, 1, 0, 120, micro, entropy=False)).total()
    assert found == pytest.approx(trained, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_no_lengths_take_more_than_the_highest(seed):
    """Prompts and answers of any lengths, as `pack` packs them."""
    rng, s = random.Random(seed), outline(shape(), torch.float32)
    for _ in range(40):
        count, samples, prompt, longest = rng.randint(1, 6), rng.randint(2, 8), rng.randint(1, 120), rng.randint(1, 120)
        micro = prompt + longest + rng.randint(0, 1000)
        least, least_asked = rng.randint(1, longest), rng.randint(1, prompt)
        lengths = [[rng.randint(least, longest) for _ in range(samples)] for _ in range(count)]
        prompts = [[1] * rng.choice((least_asked, rng.randint(1, prompt))) for _ in range(count)]
        bound = highest(s, count * samples, samples, prompt, longest, micro, True).total()
        groups = answered(random_answers(lengths), *prompts)
        for number, batch in enumerate(pack(groups, torch.ones(count, samples), micro, CPU)):
            assert training(s, line_of(batch), number == 0, entropy=True).total() <= 1.02 * bound


@pytest.mark.parametrize("answers, group, prompt, limit", [
    (6, 3, 20, 90), (8, 2, 30, 10**6), (5, 1, 0, 70), (8, 8, 60, 100)])
def test_highest_is_that_of_all_packings(answers, group, prompt, limit):
    """Tried one by one, each as the first micro-batch, which finds no gradients, and if there are others as a later one."""
    s, found, longest = outline(shape(), torch.float32), [], 40

    def prompts(rows: int) -> set[int]:
        """Distinct prompts of so many neighbours among all answers."""
        return {len({row // group for row in range(start, start + rows)}) for start in range(answers - rows + 1)}

    one = -(-answers // group) * prompt + answers * longest <= limit and answers * (prompt + longest) <= 2 * limit
    lengths = range(min(1, prompt), prompt + 1), range(1, longest + 1)
    for rows, given, tokens in itertools.product(range(1, answers + 1), *lengths):
        for asked in prompts(rows):
            line = Line(asked * given + rows * tokens, rows, given + tokens, rows * tokens)
            if line.tokens <= limit and rows * line.slots <= 2 * limit:
                found += [training(s, line, first, True).total() for first in {True, one or rows == answers}]
    bound = highest(s, answers, group, prompt, longest, limit, True).total()
    assert 0.99 * max(found) <= bound <= max(found)  # below where a corner is between two whole numbers


def test_a_gpu_keeps_other_things(monkeypatch):
    """Its MLP keeps two arrays more (320 wide); in fp32 attention has rows of its own there, each with its prompt, and keys and
    values for each query head."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # or attention has rows on the CPU too
    line, places = Line(2 * 30 + 6 * 60, 6, 90, 6 * 60), 6 * 90
    on_cpu, on_gpu = (training(outline(shape(), torch.bfloat16, cuda=cuda), line, True, True) for cuda in (False, True))
    assert on_gpu["activations"] - on_cpu["activations"] == 2 * 2 * 2 * 320 * line.tokens
    alike, grouped = (training(outline(shape(keys=keys), torch.float32, cuda=True), line, True, False) for keys in (4, 2))
    on_cpu = training(outline(shape(keys=4), torch.float32), line, True, False)
    of_rows = 2 * (places * (4 * 4 * 128 + 16) - line.tokens * (4 * 3 * 128 + 16))
    assert alike["activations"] - on_cpu["activations"] == of_rows + 2 * 2 * 4 * 320 * line.tokens
    assert grouped["activations"] == alike["activations"]
