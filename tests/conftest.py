"""Shared fixtures: a folder with a tiny random model, its toy tokenizer, and small SFT and RL files."""

import signal
import string
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from minibridge import arms, checkpoint, igsm, splits, traces
from minibridge.config import read_jsonl, write_jsonl
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.tokenizer import Tokenizer, train_toy

# Toy problems with letters in their answers and quantities that nobody needs; there are some of a single operation.
FREE_TOY = replace(igsm.TOY, letters=string.ascii_lowercase[:20], redundant=None)

torch.set_num_threads(1)  # on matrices this small threads only wait for one another


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often test_kill.py kills each script")
    parser.addoption("--fuzz", type=int, default=280, help="how many damaged files tests/test_fuzz.py tries")
    parser.addoption("--fuzz-seed", type=int, default=0, help="seed of their damage")


class Late(BaseException):
    """Raised by `within`; no Exception, so that no reader takes it for bad input."""


@contextmanager
def within(seconds: int):
    """Ends the block with `Late` after so many seconds of processor time: a busy machine makes nothing late."""
    def late(*_):
        raise Late(f"not done within {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@dataclass(frozen=True)
class Toy:
    """Paths as the command line takes them. `model` is Qwen2-shaped and random, not near uniform."""

    folder: Path
    model: str
    sft: str  # 12 lines of 1 to 3 operations
    rl: str  # 8 lines
    tokenizer: Tokenizer

    def load(self) -> Decoder:
        return checkpoint.load(self.model)


def make_model(vocab_size: int, seed: int = 0) -> Decoder:
    """Tied embeddings, two layers, and no parameter left at a 0 or 1 that could hide a mistake."""
    config = ModelConfig("qwen2", vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                         max_position_embeddings=1024, tie_word_embeddings=True)
    model, generator = Decoder(config), torch.Generator().manual_seed(seed)
    model.init_weights(generator, std=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(params=["pieces", "rows"])
def path(request, monkeypatch) -> str:
    """How a CPU finds attention in `Packed` texts; the number of threads decides."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1 if request.param == "pieces" else 100)
    return request.param


def scripted_model(vocab_size: int, follow: Mapping[int, Mapping[int, float]] = {},
                   otherwise: Mapping[int, float] = {}) -> Decoder:
    """A model of known distribution: after token a, token b has the logit `follow[a][b]`, or 0 if not given.

    Tokens that are no key of `follow` are followed by `otherwise`; with neither, all logits are 0. The layers
    add nothing at first, but they have gradients.
    """
    config = ModelConfig("qwen2", vocab_size, hidden_size=16, intermediate_size=8, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=1, head_dim=4,
                         max_position_embeddings=1024, rms_norm_eps=1e-12)
    model = Decoder(config)
    model.init_weights(torch.Generator().manual_seed(0))
    rows = [otherwise, *follow.values()]  # row r of the table is told by coordinate r of the hidden state
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding, head = model.model.embed_tokens.weight.zero_(), model.lm_head.weight.zero_()
        embedding[:, 0] = 1
        for row, token in enumerate(follow, start=1):
            embedding[token] = torch.eye(16)[row]
        for row, logits in enumerate(rows):
            for token, logit in logits.items():
                head[token, row] = logit / 16**0.5  # RMSNorm makes the one coordinate √C
    return model


def metrics(out) -> list[dict]:
    return read_jsonl(out / "metrics.jsonl")


def without_times(rows) -> list[dict]:
    return [{name: value for name, value in row.items()
             if "second" not in name and name not in ("utilisation", "memory_gib")} for row in rows]


def weights(folder) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.fixture(scope="session")
def toy(tmp_path_factory) -> Toy:
    folder = tmp_path_factory.mktemp("toy")
    sft = [arms.record(problem, 0, traces.BRIDGE)
           for problem in splits.problems("sft", 12, (1, 3), FREE_TOY, seed=0)]
    rl = [arms.record(problem, 0) for problem in splits.problems("rl", 8, (1, 3), FREE_TOY, seed=0)]
    write_jsonl(folder / "sft.jsonl", sft)
    write_jsonl(folder / "rl.jsonl", rl)
    tokenizer = train_toy([message["content"] for line in sft for message in line["messages"]], 400)
    checkpoint.save(make_model(tokenizer.vocab_size), folder / "model", tokenizer)
    return Toy(folder, *(str(folder / name) for name in ("model", "sft.jsonl", "rl.jsonl")), tokenizer)


@pytest.fixture(scope="session")
def guesser(toy) -> str:
    """Folder of a model that answers \\boxed{d} and ends its turn, each digit d being as likely."""
    encode = toy.tokenizer.encode
    before = encode("<think>\n")[-1:] + encode("\\boxed{")
    after = encode("}") + [toy.tokenizer.end_of_turn_id]
    digits = [encode(str(digit))[0] for digit in range(10)]
    follow = {token: {following: 20.0} for token, following in zip(before, before[1:])}
    follow |= {before[-1]: dict.fromkeys(digits, 20.0), after[0]: {after[1]: 20.0}}
    model = scripted_model(toy.tokenizer.vocab_size, follow, otherwise={after[0]: 20.0})
    checkpoint.save(model, toy.folder / "guesser", toy.tokenizer)
    return str(toy.folder / "guesser")
