"""Measures speed and memory, side by side with peers in one run: medians over repeats that take turns.

    python -m minibridge.bench decode --peers            tokens sampled per second, equal and ragged lengths
    python -m minibridge.bench logprob --shape 0.5b      log-probs forward and backward, time and memory
    python -m minibridge.bench train --peers             tokens trained per second, one SFT step
    python -m minibridge.bench step --peers              one GRPO step: sampling, reference, loss, update
    python -m minibridge.bench influence                 answers whose derivative along a direction is found, per second
    python -m minibridge.bench data                      problems and worked answers per second

--peers needs the oracle extra, and trl for `step`. Peers run as they come, our decoding compiled unless --eager (and in bf16
on a GPU the layers that are trained); a first turn of each does not count. --json FILE writes the rows. The limit beside a
figure is what this device's own rates, measured beside it, would allow: multiplications over its matmul rate, or bytes over
its bandwidth. Wall time of this machine, whatever else runs on it: let nothing else run.
"""
import importlib.util
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import train_rl
from minibridge import arms, checkpoint, igsm, peers, splits, traces
from minibridge.config import InputError, option, run_command
from minibridge.data import Prompt
from minibridge.generate import Completion, generate
from minibridge.grpo import group_advantages
from minibridge.jvp import directional, directional_naive, gradient
from minibridge.logprob import fused_loss, token_logprobs, token_logprobs_naive
from minibridge.measure import Repeats, bandwidth, clock, matmul_rate, peak_memory, rates, report, row
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.opening import pick_device, pick_dtype
from minibridge.optim import adamw, training_flops
from minibridge.parallel import ALONE
from minibridge.policy import answer_logps, pack
from minibridge.reproduce import TOY_BASE
from minibridge.rollout import Episode, rewards
from minibridge.tokenizer import Tokenizer

MEASURABLE = 2**26  # bytes of logits; beside fewer a process's memory shows little but what its allocator had at hand
NAMES = "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size"
SHAPES = {  # Qwen2.5's, with random weights: hidden, MLP, layers, heads, key heads, vocabulary
    "toy": (256, 768, 4, 4, 2, 1024), "0.5b": (896, 4864, 24, 14, 2, 151_936), "1.5b": (1536, 8960, 28, 12, 2, 151_936)}


@dataclass(frozen=True)
class Rollouts(Repeats):
    shape: Literal["toy", "0.5b", "1.5b"] = option("toy", "shape of the model")
    prompts: int = option(8, "prompts", least=1)
    prompt_tokens: int = option(128, "tokens of each", least=2)
    samples: int = option(8, "answers to each", least=2)
    new_tokens: int = option(256, "longest answer, in tokens", least=2)
    micro_tokens: int = option(8192, "tokens of a micro-batch", least=1)
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


@dataclass(frozen=True)
class Work(Rollouts):
    peers: bool = option(False, "the same work through the libraries, in turns")
    eager: bool = option(False, "nothing of ours compiled: no decoding, and in bf16 on a GPU no trained layers")
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 on a GPU, fp32 on a CPU")


def build(config: Work | Rollouts, device: torch.device, trained: bool = False) -> Decoder:
    shape = ModelConfig.from_hf({
        **dict(zip(NAMES, SHAPES[config.shape])), "model_type": "qwen2", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": config.prompt_tokens + config.new_tokens, "tie_word_embeddings": True})
    model = Decoder(shape)
    model.init_weights(torch.Generator().manual_seed(0))
    if trained and device.type == "cuda" and config.dtype != "fp32" and not config.eager:
        model.compile_layers()
    return model.to(device)


def random_prompts(config: Rollouts) -> list[list[int]]:
    shape, generator = (config.prompts, config.prompt_tokens), torch.Generator().manual_seed(0)
    return torch.randint(SHAPES[config.shape][-1], shape, generator=generator).tolist()


# --- decode --------------------------------------------------------------------------------------------------


def main_decode(config: Work):
    check_peers(config, "transformers")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, prompts, rows = build(config, device).to(dtype), random_prompts(config), []
    peer = peers.Transformers.of(model, dtype) if config.peers else None
    for lengths in ("equal", "ragged"):
        stop = stop_ids(model.config.vocab_size, config.new_tokens) if lengths == "ragged" else []
        answers: list[list[Completion]] = []

        def ours() -> int:
            answers[:] = generate(model, prompts, config.samples, config.new_tokens, stop_ids=stop,
                                  rows=config.prompts * config.samples, compiled=not config.eager)
            return sum(len(answer.ids) for group in answers for answer in group)

        functions = [ours] + ([lambda: peer.decode(prompts, config.samples, config.new_tokens, stop)] if peer else [])
        found = rates(config.repeats, *functions)
        rows.append(row(config, f"decode, {lengths}", "tokens/s", found[0], peer.name if peer else "", found[-1] if peer
                        else (), decode_limit(model, answers, config.prompt_tokens)))
    report(config, rows)


def stop_ids(vocabulary: int, longest: int) -> list[int]:
    """As many ids as make the mean answer about half of the longest, if each id is drawn as often as any other."""
    return list(range(max(1, round(1.6 * vocabulary / longest))))


def decode_limit(model: Decoder, answers: list[list[Completion]], prompt_tokens: int) -> float:
    """Tokens a second if only the products of these answers, or only the bytes they must read, took time."""
    c, size = model.config, model.lm_head_weight.element_size()
    lengths = [len(answer.ids) for group in answers for answer in group]
    tokens, steps = sum(lengths), max(lengths)
    seen = tokens * prompt_tokens + sum(n * n for n in lengths) / 2  # pairs of a new token and one it attends to
    flops = training_flops(model, tokens, tokens, seen, passes=1)
    slot = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size  # bytes of one token's keys and values
    read = steps * sum(p.nbytes for p in model.parameters()) + slot * sum(n * n for n in lengths) / 2
    read += slot * prompt_tokens * sum(max(len(answer.ids) for answer in group) for group in answers)
    device, dtype = model.device, model.activation_dtype
    return tokens / max(flops / matmul_rate(device, dtype, 2048), read / bandwidth(device))


# --- logprob -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LogProb(Repeats):
    shape: Literal["toy", "0.5b", "1.5b"] = option("0.5b", "shape of the model: its width and its vocabulary")
    tokens: int = option(1024, "tokens", least=16)
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


def main_logprob(config: LogProb):
    """Forward and backward of the mean log-probability; and, if `MEASURABLE`, the memory beyond inputs and gradients."""
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    width, vocabulary = SHAPES[config.shape][0], SHAPES[config.shape][-1]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(config.tokens, width, generator=generator).to(device, dtype).requires_grad_()
    weight = (0.02 * torch.randn(vocabulary, width, generator=generator)).to(device).requires_grad_()
    targets = torch.randint(vocabulary, (config.tokens,), generator=generator).to(device)

    def run(loss_of: Callable[[], Tensor]) -> Callable[[], int]:
        def once() -> int:
            hidden.grad = weight.grad = None
            loss_of().backward()
            return config.tokens
        return once

    ways = {
        "log_softmax of all logits": run(lambda: -F.log_softmax((hidden @ weight.to(dtype).T).float(), -1)
                                         .gather(1, targets[:, None]).mean()),
        "token_logprobs": run(lambda: -token_logprobs(hidden, weight, targets, with_entropy=False)[0].mean()),
        "fused_loss": run(lambda: fused_loss(hidden, weight, targets, with_entropy=False, loss_of=lambda logprobs, *_:
                                             (-logprobs.sum() / config.tokens, {}))[0]),
        "naive, with entropy": run(lambda: sum(x.mean() for x in token_logprobs_naive(hidden, weight, targets))),
        "token_logprobs, with entropy": run(lambda: sum(x.mean() for x in token_logprobs(hidden, weight, targets))),
        "fused_loss, with entropy": run(lambda: fused_loss(hidden, weight, targets, lambda logprobs, entropy, _: (
            (logprobs.sum() + entropy.sum()) / config.tokens, {}))[0])}
    found = dict(zip(ways, rates(config.repeats, *ways.values())))
    limit = matmul_rate(device, dtype, 2048) / (6 * width * vocabulary)
    rows = []
    gradients, logits = 4 * vocabulary * width + hidden.nbytes, 4 * config.tokens * vocabulary
    for name, way in ways.items():
        naive = "naive, with entropy" if "with entropy" in name else "log_softmax of all logits"
        if name != naive:
            rows.append(row(config, name, "tokens/s", found[name], naive, found[naive], limit))
        hidden.grad = weight.grad = None
        if device.type == "cuda" or logits >= MEASURABLE:
            extra = (peak_memory(device, way) - gradients) / 2**20
            rows.append(row(config, f"{name}: memory", "MiB", [extra], "the logits", [logits / 2**20], logits / 2**20))
    report(config, rows)


# --- train ---------------------------------------------------------------------------------------------------


def main_train(config: Work):
    """Cross-entropy of every token of prompts * samples rows, and AdamW; the peer does the same."""
    check_peers(config, "transformers")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model = build(config, device, trained=True)
    model.compute_dtype = dtype
    shape = (config.prompts * config.samples, config.prompt_tokens + config.new_tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(device)
    optimizer = adamw(model, (0.9, 0.999), 0.01)

    def ours() -> int:
        for rows in ids.split(max(1, config.micro_tokens // ids.shape[1])):
            hidden = model(rows[:, :-1]).flatten(0, 1)
            loss, _ = fused_loss(hidden, model.lm_head_weight, rows[:, 1:].flatten(), lambda logprobs, *_: (
                -logprobs.sum() / ids.numel(), {}), with_entropy=False)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return ids.numel()

    functions, peer = [ours], None
    if config.peers:
        peer = peers.Transformers.of(model, dtype)
        functions.append(peer.trainer(ids, config.micro_tokens))
    found = rates(config.repeats, *functions)
    per_token = training_flops(model, 1, 1, ids.shape[1] / 2)
    report(config, [row(config, "train", "tokens/s", found[0], peer.name if peer else "", found[-1] if peer else (),
                        matmul_rate(device, dtype, 2048) / per_token)])


# --- step ----------------------------------------------------------------------------------------------------


def main_step(config: Work):
    """One GRPO step with a KL term. No answer stops early; its reward is whether the sum of its ids is odd."""
    check_peers(config, "transformers", "trl", "datasets")
    if config.peers and config.shape != "toy":
        raise InputError("shape: TRL is measured at the toy shape only")
    device = pick_device(config.device)
    dtype = pick_dtype(config.dtype, device)
    model, reference = build(config, device, trained=True), build(config, device, trained=True)
    model.compute_dtype, reference = dtype, reference.to(dtype)
    optimizer = adamw(model, (0.9, 0.999), 0.01)
    tokenizer = Tokenizer.load(str(TOY_BASE))
    prompts = peers.spelled(random_prompts(config), tokenizer)
    settings = train_rl.Config(model="", data="", out="", kl_coef=0.001, entropy_coef=0.0)

    def ours() -> float:
        began = clock()
        answers = generate(ALONE.sampler(model), prompts, config.samples, config.new_tokens,
                           rows=config.prompts * config.samples, compiled=not config.eager)
        groups = [[Episode(Prompt(ids, "", {}), answer, "", False, False, reward=float(sum(answer.ids) % 2))
                   for answer in group] for ids, group in zip(prompts, answers)]
        batches = pack(groups, group_advantages(rewards(groups)), config.micro_tokens, device)
        train_rl.optimizer_steps(model, reference, optimizer, batches, 1e-6, settings)
        return clock() - began

    ours()  # not counted, like each peer's first
    found: dict[str, Iterable] = {}  # seconds, ours and theirs
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, folder, tokenizer)
        texts = [tokenizer.decode(ids) for ids in prompts]
        for checkpointing in (True, False) if config.peers else ():
            peer = peers.TRL(Path(folder), texts, config.samples, config.new_tokens, config.repeats + 1, checkpointing,
                             device.type == "cpu", dtype == torch.bfloat16)
            turns = [(ours(), peer.step()) for _ in range(config.repeats + 1)]
            found[peer.name] = zip(*turns[1:])
    if not config.peers:
        found[""] = [ours() for _ in range(config.repeats)], ()
    answers = config.prompts * config.samples
    report(config, [row(config, "GRPO step", "answers/s", [answers / x for x in ours_], name, [answers / x for x in theirs])
                    for name, (ours_, theirs) in found.items()])


# --- influence -----------------------------------------------------------------------------------------------


def main_influence(config: Rollouts):
    """Beside a forward pass on the same attention path, and a gradient of each answer in turn."""
    model, generator = build(config, pick_device(config.device)), torch.Generator().manual_seed(0)

    def answer(ids: list[int]) -> Episode:
        sampled = torch.randint(model.config.vocab_size, (config.new_tokens,), generator=generator).tolist()
        return Episode(Prompt(ids, "", {}), Completion(sampled, [0.0] * len(sampled)), "", False, False, 0.0)

    groups = [[answer(ids) for _ in range(config.samples)] for ids in random_prompts(config)]
    count, most = config.prompts * config.samples, config.micro_tokens
    batches = pack(groups, torch.full((config.prompts, config.samples), 1 / count), most, model.device)
    direction = gradient(model, batches, 1.0)

    def forward() -> int:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return sum(len(answer_logps(model, batch, 1.0)[0]) for batch in batches)

    ways = {"forward pass, same attention": forward,
            "gradient of all together": lambda: count * bool(gradient(model, batches, 1.0)),
            "gradient of each answer": lambda: directional_naive(model, groups, direction, 1.0).numel(),
            "derivative of each answer": lambda: len(directional(model, groups, direction, 1.0, most)) * config.samples}
    found = dict(zip(ways, rates(config.repeats, *ways.values())))
    name, ours = found.popitem()
    report(config, [row(config, name, "answers/s", ours, other, rate) for other, rate in found.items()])


# --- data ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data(Repeats):
    count: int = option(500, "problems of each repeat", least=10)
    ops: tuple[int, int] = option((15, 20), "operations of a problem")
    workers: int = option(2, "processes of the last row", least=1, most=256)
    seed: int = option(0, "seed of the problems", least=0)
    shape, device = "iGSM", "cpu"  # for the rows


def main_data(config: Data):
    problems = [_drawn(config, i) for i in range(config.count)]

    def finished(number: int) -> str:
        return _told(config, _drawn(config, number))

    def whole_split(workers: int):
        drawn = splits.problems("sft", config.count, config.ops, igsm.PAPER, config.seed, workers=workers)
        return [json.dumps(arms.record(problem, config.seed, traces.BRIDGE)) for problem in drawn]

    numbers = range(config.count)
    found = rates(config.repeats,
                  lambda: len([_drawn(config, i) for i in numbers]),
                  lambda: len([_told(config, problem) for problem in problems]),
                  lambda: len([finished(i) for i in numbers]),
                  lambda: len(whole_split(1)), lambda: len(whole_split(config.workers)))
    names = ["problem that passes the filters", "its question and BRIDGE answer", "both: a problem with its texts",
             "row of an SFT file, one process", f"row of an SFT file, {config.workers} processes"]
    print(f"iGSM, {config.ops[0]}-{config.ops[1]} operations, {config.count} problems, {config.repeats} repeats\n")
    report(config, [row(config, *pair) for pair in zip(names, ["problems/s"] * len(names), found)])
    print("\nAn SFT file takes one structure in five, so that no other split shares one; its rows hold JSON and hashes.")


def _drawn(config: Data, number: int):
    return igsm.draw(random.Random(f"{config.seed} {number}"), config.ops)


def _told(config: Data, problem) -> str:
    rng = random.Random(config.seed)
    return traces.question(problem, rng) + traces.answer(problem, rng, traces.BRIDGE)


def check_peers(config: Work, *packages: str):
    """InputError, before anything is measured, if a package of the peers is missing."""
    missing = [name for name in packages if config.peers and importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"peers: {', '.join(missing)} not installed (pip install {' '.join(missing)})")


COMMANDS = {"decode": (main_decode, Work), "logprob": (main_logprob, LogProb), "train": (main_train, Work),
            "step": (main_step, Work), "influence": (main_influence, Rollouts), "data": (main_data, Data)}

if __name__ == "__main__":
    sys.exit(run_command(COMMANDS))
