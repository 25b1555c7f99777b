"""Derivatives of rollouts' log-probabilities: dual numbers against gradients, answer by answer, and central differences."""

import pytest
import torch

from conftest import make_model
from minibridge import jvp
from minibridge.data import Prompt
from minibridge.generate import Completion
from minibridge.jvp import at, directional, directional_naive, gradient, inner, logps_at, numbered_batches
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.policy import answer_logps, pack
from minibridge.rollout import Episode

CPU = torch.device("cpu")
SHAPE = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=1024)
KINDS = {"qwen2": dict(tie_word_embeddings=True), "qwen3": dict(attention_bias=True), "llama": dict(mlp_bias=True)}


def model_of(kind: str) -> Decoder:
    model, generator = Decoder(ModelConfig(kind, **SHAPE, **KINDS[kind])), torch.Generator().manual_seed(0)
    model.init_weights(generator, std=0.2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model.double()


@pytest.fixture
def model():
    return make_model(50).double()


@pytest.fixture
def groups() -> list[list[Episode]]:
    generator = torch.Generator().manual_seed(0)

    def ids(count):
        return torch.randint(0, 50, (count,), generator=generator).tolist()

    prompts = [Prompt(ids(count), "6", {}) for count in (3, 11, 1, 6)]
    return [[Episode(prompt, Completion(ids(count), [0.0] * count), "", False, False, 0.0) for count in counts]
            for prompt, counts in zip(prompts, ((2, 9, 5), (4, 4, 1), (1, 1, 1), (12, 3, 7)))]


def direction_for(model: Decoder) -> dict:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in model.named_parameters()}


def moved(model: Decoder, direction: dict, by: float) -> dict:
    return {name: parameter.detach() + by * direction[name] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("max_tokens", [10**6, 60, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_one_pass_with_dual_numbers_equals_the_gradient_of_every_answer(kind, groups, max_tokens):
    model = model_of(kind)
    direction = direction_for(model)
    found = directional(model, groups, direction, 0.7, max_tokens)
    kappa = torch.tensor([[answer[1].mean() for answer in group] for group in found], dtype=torch.float64)
    naive = directional_naive(model, groups, direction, 0.7)
    assert naive.abs().min() > 0.1
    torch.testing.assert_close(kappa, naive, rtol=1e-10, atol=1e-11)


def test_layers_compiled_for_training_have_the_same_derivatives(groups):
    model = model_of("qwen2")
    direction = direction_for(model)
    expected = directional(model, groups, direction, 0.7, 60)
    model.compile_layers()
    for row, other in zip(directional(model, groups, direction, 0.7, 60), expected):
        torch.testing.assert_close(row, other, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_token_equals_its_central_difference(kind, groups):
    model, step = model_of(kind), 1e-6
    direction = direction_for(model)
    found = directional(model, groups, direction, 0.7, 60)
    for batch, places in numbered_batches(groups, 60, CPU):
        ahead, behind = (logps_at(moved(model, direction, by), model, batch, 0.7) for by in (step, -step))
        for row, (n, g) in enumerate(places):
            expected = ((ahead - behind) / (2 * step))[row, :len(groups[n][g].completion.ids)]
            torch.testing.assert_close(found[n][g][1], expected, rtol=1e-5, atol=1e-5)


def test_log_probabilities_and_entropies_come_with_it(model, groups):
    found = directional(model, groups, direction_for(model), 0.7, 60)
    for batch, places in numbered_batches(groups, 10**6, CPU):
        logps, entropy = answer_logps(model, batch, 0.7, with_entropy=True)
        for row, (n, g) in enumerate(places):
            count = len(groups[n][g].completion.ids)
            torch.testing.assert_close(found[n][g][[0, 2]], torch.stack((logps[row, :count], entropy[row, :count])).detach())


def test_logits_a_part_at_a_time_change_nothing(model, groups, monkeypatch):
    whole = directional(model, groups, direction_for(model), 1.0, 60)
    monkeypatch.setattr(jvp, "LOGIT_ELEMENTS", 150)  # three tokens
    parts = directional(model, groups, direction_for(model), 1.0, 60)
    for one, other in zip(sum(whole, []), sum(parts, [])):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_tokens", [10**6, 60, 1])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_gradient_weighs_mean_log_probabilities(model, groups, max_tokens, checkpointing):
    weights = torch.arange(12.0, dtype=torch.float64).view(4, 3) - 5
    loss = 0.0
    for n, group in enumerate(groups):
        for g, episode in enumerate(group):
            ids = torch.tensor([episode.prompt.ids + episode.completion.ids])
            logps = (model(ids)[0, len(episode.prompt.ids) - 1:-1] @ model.lm_head_weight.T / 0.7).log_softmax(-1)
            loss = loss + weights[n, g] * logps.gather(1, torch.tensor(episode.completion.ids)[:, None]).mean()
    loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    model.checkpointing = checkpointing
    found = gradient(model, pack(groups, weights, max_tokens, CPU), 0.7)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-10)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_no_graph_is_kept_and_the_model_stays_as_it_is(model, groups):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    direction = direction_for(model)
    found = directional(model, groups, direction, 1.0, 60)
    (batch,) = pack(groups, torch.zeros(4, 3), 10**6, CPU)
    shifted = logps_at(moved(model, direction, 0.1), model, batch, 1.0)
    assert not any(answer.requires_grad for group in found for answer in group) and not shifted.requires_grad
    assert (shifted - answer_logps(model, batch, 1.0)[0]).abs().max() > 0.01
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.requires_grad and parameter.grad is None
    assert {name for name, _ in model.named_parameters()} == set(before)


def test_each_prompt_is_run_once_for_all_its_answers(model, groups, monkeypatch):
    run, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *rest, **named: run.append(ids.shape) or forward(ids, *rest, **named))
    directional(model, groups, direction_for(model), 1.0, 10**6)
    prompts = sum(len(group[0].prompt.ids) for group in groups)
    answers = [len(episode.completion.ids) for group in groups for episode in group]
    assert run == [(1, prompts + sum(answers) - len(answers))]


def test_numbers_name_the_answers(groups):
    places = [(batch, *place) for batch, rows in numbered_batches(groups, 60, CPU) for place in enumerate(rows)]
    assert sorted(place for _, _, place in places) == [(n, g) for n in range(4) for g in range(3)]
    for batch, row, (n, g) in places:
        assert batch.answers[row][batch.trained[row]].tolist() == groups[n][g].completion.ids


def test_inner_product_and_at(model):
    a = {"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([[3.0]])}
    assert inner(a, {"x": torch.tensor([4.0, 5.0]), "y": torch.tensor([[6.0]])}) == 4 + 10 + 18
    many = {"x": torch.full((2**20,), 0.1)}  # fp32 sums would stray
    assert inner(many, many) == pytest.approx(2**20 * float(torch.tensor(0.1)) ** 2, rel=1e-7)
    doubled = {name: 2 * parameter.detach() for name, parameter in model.named_parameters()}
    assert torch.equal(at(doubled, model, lambda m: m.lm_head_weight), 2 * model.lm_head_weight)
