"""Learning rates, the clipped step, devices, and opening a model."""

import pytest
import torch

from conftest import make_model
from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.opening import open_model, pick_device, pick_dtype
from minibridge.optim import adamw, learning_rate, training_flops, update


def rates(steps, **options):
    return [learning_rate(step, steps, 2.0, **options) for step in range(steps)]


def test_constant():
    assert rates(3) == [2.0, 2.0, 2.0]


def test_warm_up_reaches_the_peak_on_its_last_step():
    assert rates(6, warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_falls_from_the_peak_to_a_tenth():
    values = rates(1001, schedule="cosine")
    assert values[0] == 2.0
    assert learning_rate(500, 1001, 2.0, schedule="cosine") == pytest.approx(1.1)  # the mean of 2 and 0.2
    assert learning_rate(250, 1001, 2.0, schedule="cosine") == pytest.approx(0.2 + 1.8 * (1 + 0.5**0.5) / 2)
    assert values[-1] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_cosine_starts_after_the_warm_up():
    values = rates(12, warmup=2, schedule="cosine")
    assert values[:3] == [1.0, 2.0, 2.0]
    assert values[2:] == [learning_rate(step, 10, 2.0, schedule="cosine") for step in range(10)]


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 5])
@pytest.mark.parametrize("warmup", [0, 1, 2, 5, 100])
def test_no_step_is_wasted(schedule, steps, warmup):
    assert all(0 < rate <= 2.0 for rate in rates(steps, warmup=warmup, schedule=schedule))


def parameters(*gradients) -> torch.nn.ParameterDict:
    """Scalars at 1 with these gradients."""
    module = torch.nn.ParameterDict({str(i): torch.ones(()) for i in range(len(gradients))})
    for parameter, gradient in zip(module.parameters(), gradients):
        parameter.grad = torch.tensor(gradient)
    return module


def values(module) -> list[float]:
    return [parameter.item() for parameter in module.parameters()]


@pytest.mark.parametrize("clip, moved", [
    (1.0, (0.6, 0.8)), (2.5, (1.5, 2.0)), (5.0, (3.0, 4.0)), (100.0, (3.0, 4.0))])
def test_gradient_is_clipped_to_the_norm_and_the_step_taken_at_the_rate(clip, moved):
    module = parameters(3.0, 4.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=123.0)
    assert update(module, optimizer, rate=0.1, clip=clip) == pytest.approx(5.0)  # the norm before clipping
    assert values(module) == pytest.approx([1 - 0.1 * moved[0], 1 - 0.1 * moved[1]], abs=1e-5)


def test_gradient_is_dropped_after_the_step():
    module = parameters(3.0, 4.0)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    update(module, optimizer, rate=0.1, clip=1.0)
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_gradient_that_is_not_finite_stops_and_changes_nothing(bad):
    module = parameters(3.0, 4.0)
    optimizer = adamw(module, (0.9, 0.95), weight_decay=0.1)
    update(module, optimizer, rate=0.1, clip=1.0)
    before, moments = values(module), str(optimizer.state_dict()["state"])
    for parameter, gradient in zip(module.parameters(), (1.0, bad)):
        parameter.grad = torch.tensor(gradient)
    with pytest.raises(InputError, match="gradient norm is (nan|inf)"):
        update(module, optimizer, rate=0.1, clip=1.0)
    assert values(module) == before and str(optimizer.state_dict()["state"]) == moments


def test_adamw_takes_its_settings():
    """The first step is the rate times the gradient's sign, the second mixes by the betas; decay is apart."""
    module = parameters(3.0, -4.0)
    optimizer = adamw(module, (0.5, 0.25), weight_decay=0.1)
    update(module, optimizer, rate=0.01, clip=100.0)
    assert values(module) == pytest.approx([0.999 - 0.01, 0.999 + 0.01], abs=1e-6)
    for parameter in module.parameters():
        parameter.grad = torch.tensor(1.0)
    start = values(module)[0] * 0.999
    update(module, optimizer, rate=0.01, clip=100.0)
    mean = (0.5 * 0.5 * 3 + 0.5) / (1 - 0.5**2)
    square = (0.25 * 0.75 * 9 + 0.75) / (1 - 0.25**2)
    assert values(module)[0] == pytest.approx(start - 0.01 * mean / square**0.5, abs=1e-6)


@pytest.mark.parametrize("name", ["nosuch", "cuda:99", "cpu:x", ""])
def test_device_that_is_not_here_is_named_in_one_line(name):
    with pytest.raises(InputError, match=f"device '{name}'") as error:
        pick_device(name)
    assert "\n" not in str(error.value)


def test_message_of_several_lines_is_cut_to_the_first(monkeypatch):
    def fail(*words, **options):
        raise RuntimeError("CUDA error: invalid device ordinal\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(InputError, match="device 'cuda:7': CUDA error: invalid device ordinal$"):
        pick_device("cuda:7")


def test_devices():
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name, device, dtype", [
    ("auto", "cpu", torch.float32), ("auto", "cuda", torch.bfloat16), ("fp32", "cuda", torch.float32),
    ("bf16", "cpu", torch.bfloat16)])
def test_dtypes(name, device, dtype):
    assert pick_dtype(name, torch.device(device)) is dtype


@pytest.mark.parametrize("fewer", [0, 1])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(toy, tmp_path, fewer):
    largest = max(toy.tokenizer.tokenizer.get_vocab().values())
    checkpoint.save(make_model(largest + 1 - fewer), tmp_path, toy.tokenizer)
    if not fewer:
        open_model(str(tmp_path), torch.device("cpu"), "fp32")
        return
    with pytest.raises(InputError, match=f"the tokenizer has a token {largest}, the model's vocab_size is {largest}"):
        open_model(str(tmp_path), torch.device("cpu"), "fp32")


def test_an_embedding_that_is_not_the_head_is_no_work():
    shape = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, head_dim=8, max_position_embeddings=64)
    tied, apart = (Decoder(ModelConfig("qwen2", **shape, tie_word_embeddings=tie)) for tie in (True, False))
    assert training_flops(tied, 7, 3, 5.0) == training_flops(apart, 7, 3, 5.0)
