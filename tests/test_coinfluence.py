"""Proposition 3.1 against explicit gradients, four terms against all pairs of answers, predictions against steps taken."""

import math
from dataclasses import replace

import pytest
import torch

from conftest import make_model
from minibridge import checkpoint, coinfluence
from minibridge.breakdown import rank_correlation
from minibridge.coinfluence import (
    adam_scale, factor, live_batches, means, measure, per_step, taken, validation_directions
)
from minibridge.config import InputError
from minibridge.data import Prompt
from minibridge.generate import Completion
from minibridge.grpo import PRESETS, group_advantages, grpo_loss
from minibridge.influence import columns_of, doubts, summarise
from minibridge.jvp import directional, gradient, inner
from minibridge.optim import adamw
from minibridge.policy import answer_logps, pack, share_of_loss, whole_step
from minibridge.rollout import Episode, correctness, mix

CPU = torch.device("cpu")
F64 = torch.float64
RIGHT = ([1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 0, 0])  # of the answers to each prompt
TRAIN = ([1, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 0, 0])


def rollouts(right, seed: int) -> list[list[Episode]]:
    generator = torch.Generator().manual_seed(seed)

    def ids():
        return torch.randint(0, 50, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator).tolist()

    prompts = [Prompt(ids(), "6", {}) for _ in right]
    return [[Episode(prompt, Completion(answer := ids(), [0.0] * len(answer)), "", bool(correct), False, float(correct))
             for correct in row] for prompt, row in zip(prompts, right)]


@pytest.fixture
def model():
    return make_model(50).double()


@pytest.fixture
def val():
    return rollouts(RIGHT, 0)


@pytest.fixture
def groups():
    return rollouts(TRAIN, 1)


def alone(model, group, weights) -> dict:
    """Gradient of sum of weights * mean log-probability of a group's answers."""
    return gradient(model, pack([group], torch.tensor([weights], dtype=F64), 10**6, CPU), 0.7)


# ---- the proposition


def test_the_factor_in_closed_form():
    alpha = torch.arange(33, dtype=F64) / 32
    root = (alpha * (1 - alpha)).sqrt()
    torch.testing.assert_close(factor(alpha, 32), root * 0.9842509842514764, rtol=1e-5, atol=0)  # sqrt(31 / 32)
    std = root * math.sqrt(32 / 31)
    torch.testing.assert_close(factor(alpha, 32), root * 0.9842509842514764 * std / (std + 1e-6))
    assert factor(alpha, 32)[[0, 32]].tolist() == [0, 0]


@pytest.mark.parametrize("samples", [2, 3, 16])
def test_the_closed_form_is_the_mean_of_advantage_times_kappa(samples):
    correct = (torch.arange(samples) < torch.arange(samples + 1)[:, None]).double()  # 0, 1, ... all of them right
    kappa = torch.randn(samples + 1, samples, dtype=F64, generator=torch.Generator().manual_seed(0))
    found = per_step(kappa, correct)
    advantages = group_advantages(correct)
    torch.testing.assert_close(found.value, (advantages * kappa).mean(1), rtol=0, atol=1e-13)
    assert found.alpha.tolist() == [n / samples for n in range(samples + 1)]
    assert found.value[[0, -1]].tolist() == [0, 0] and found.right[0].isnan() and found.wrong[-1].isnan()
    assert found.right[-1].item() == pytest.approx(kappa[-1].mean().item())
    assert found.wrong[1].item() == pytest.approx(kappa[1, 1:].mean().item())


def test_influence_is_the_inner_product_with_the_trainers_own_gradient(model, val, groups):
    """g_Q and each group's gradient by way of the loss that train_rl.py minimises, in double precision."""
    recipe = replace(PRESETS["paper"], kl_coef=0.0, entropy_coef=0.0)

    def ascent(chosen) -> dict:
        rows = torch.tensor([[episode.reward for episode in group] for group in chosen], dtype=F64)
        batches = pack(chosen, group_advantages(rows), 10**6, CPU)
        for batch in batches:
            batch.sampled_logps = batch.sampled_logps.double()
            share_of_loss(model, batch, whole_step(batches, recipe, 0.7, 100))[0].backward()
        found = {name: -parameter.grad for name, parameter in model.named_parameters()}
        model.zero_grad()
        return found

    direction = ascent(val)
    expected = [inner(direction, ascent([group])) for group in groups]
    found = measure(model, val, groups, 0.7, 60)
    assert found.norm == pytest.approx(math.sqrt(inner(direction, direction)), rel=1e-6)
    assert found.influence.value.tolist() == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert expected[2] == expected[4] == 0 and min(abs(expected[n]) for n in (0, 1, 3)) > 1e-3


@pytest.mark.parametrize("max_tokens", [10**6, 30])
def test_over_q_itself_influence_is_on_average_the_squared_norm(model, val, max_tokens):
    found = measure(model, val, val, 0.7, max_tokens)
    assert found.influence.value.mean().item() == pytest.approx(found.norm**2, rel=1e-9)


def test_kappa_of_tokens_averages_to_that_of_answers(model, val, groups):
    found = measure(model, val, groups, 0.7, 60)
    kappa = means(found.tokens)
    direction = validation_directions(model, val, 0.7, 60)["whole"]
    for n, g in ((0, 0), (1, 2), (4, 3)):
        assert kappa[n, g].item() == pytest.approx(inner(direction, alone(model, [groups[n][g]], [1.0])), rel=1e-8)


# ---- other directions


def test_four_terms_are_means_over_all_pairs_of_answers(model, val, groups):
    """K++ = mean over Q's live prompts of factor * <mean score of its right answers, mean score of q's right ones>."""
    found = measure(model, val, groups, 0.7, 60, contrast=True)
    scores = {(id(group), g): alone(model, [group[g]], [1.0]) for group in val + groups for g in range(4)}

    def mean_product(theirs, their_sign, group, own_sign) -> float:
        pairs = [inner(scores[id(theirs), i], scores[id(group), j]) for i in range(4) for j in range(4)
                 if theirs[i].correct == their_sign and group[j].correct == own_sign]
        return sum(pairs) / len(pairs)

    weights = factor(correctness(val).mean(1), 4).tolist()
    live = [n for n, weight in enumerate(weights) if weight]
    columns = columns_of(found, correctness(groups), means(found.tokens))
    for n in (0, 1, 3):
        for (of_q, own) in ("++", "+-", "-+", "--"):
            expected = sum(weights[m] * mean_product(val[m], of_q == "+", groups[n], own == "+") for m in live) / len(val)
            assert columns[f"K{of_q}{own}"][n].item() == pytest.approx(expected, rel=1e-7)
    contrast = columns["K++"] - columns["K+-"] - columns["K-+"] + columns["K--"]
    torch.testing.assert_close(contrast, columns["K+ - K-"], equal_nan=True)
    assert contrast[[2, 4]].isnan().all()


def test_halves_add_up_to_q(model, val, groups):
    found = measure(model, val, groups, 0.7, 60, halves=True)
    plain = measure(model, val, groups, 0.7, 60)
    torch.testing.assert_close(found.influence.value, plain.influence.value)
    weights = group_advantages(correctness(val)) / 20
    first, second = (gradient(model, pack([val[n] for n in half], weights[half], 60, CPU), 0.7) for half in ([0, 4], [2]))
    shared = inner(first, second)
    assert found.cosine == pytest.approx(shared / math.sqrt(inner(first, first) * inner(second, second)), rel=1e-9)
    assert found.common == (None if shared < 0 else pytest.approx(2 * math.sqrt(shared), rel=1e-9))
    assert plain.cosine is None and not plain.parts
    columns = columns_of(found, correctness(groups), means(found.tokens))
    for direction, half in ((first, 1), (second, 2)):
        kappa = means(directional(model, groups, direction, 0.7, 60))
        torch.testing.assert_close(columns[f"influence, half {half}"], per_step(kappa, correctness(groups)).value)
    assert not found.parts["half"][[2, 4]].any()  # prompts without influence are not run again


def test_what_halves_agree_on_has_less_noise_than_the_gradient(model, val):
    """Twice the same prompts: both halves are the same, and all of the gradient is common."""
    twice = [val[n] for n in (0, 0, 2, 2)]
    found = measure(model, twice, val, 0.7, 60, halves=True)
    assert found.cosine == pytest.approx(1) and found.common == pytest.approx(found.norm)


def test_summary_and_doubts(model, val, groups):
    found, correct = measure(model, val, groups, 0.7, 60, halves=True), correctness(groups)
    kappa = means(found.tokens)
    columns = columns_of(found, correct, kappa)
    summary = summarise(found, correct, kappa, columns)
    own = [per_step(kappa[:, first::2], correct[:, first::2]).value[[0, 1, 3]] for first in (0, 1)]
    assert summary["answers_rank_correlation"] == rank_correlation(*own) != 1
    halves = [columns[f"influence, half {half}"][[0, 1, 3]] for half in (1, 2)]
    assert summary["halves_rank_correlation"] == rank_correlation(*halves)
    names = ("halves_rank_correlation", "answers_rank_correlation")
    for values, said in (((0.9, 0.9), []), ((0.9, None), ["--samples"]), ((-0.1, 0.9), ["Q needs"]), ((0.6, 0.4), ["--samples"])):
        text = doubts(dict(zip(names, values)), 3)
        assert len(text) == len(said) and all(word in line for word, line in zip(said, text))
    assert not doubts({names[1]: 0.9}, 3)  # without halves of Q nothing is said of them
    assert "nothing to rank" in doubts(summary, 2)[0]


def test_a_scale_is_applied_to_every_direction(model, val, groups):
    scale = {name: torch.rand(p.shape, dtype=F64, generator=torch.Generator().manual_seed(2)) for name, p in
             model.named_parameters()}
    plain = validation_directions(model, val, 0.7, 60, True, True)
    scaled = validation_directions(model, val, 0.7, 60, True, True, scale)
    for direction in plain:
        for name, tensor in plain[direction].items():
            torch.testing.assert_close(scaled[direction][name], tensor * scale[name])


def test_q_must_have_two_prompts_that_teach(model, groups):
    for right in ([[1, 1], [0, 0]], [[1, 0], [0, 0]]):
        with pytest.raises(InputError, match=f"of 2 prompts {right[0].count(0)} got both"):
            measure(model, rollouts(right, 0), groups, 0.7, 60)
    assert measure(model, rollouts([[1, 0], [0, 1]], 0), groups, 0.7, 60).norm > 0


def test_a_model_ready_for_nothing_has_no_influence(model, val):
    found = measure(model, val, rollouts([[1, 1], [0, 0]], 1), 0.7, 60, halves=True, contrast=True)
    assert found.influence.value.tolist() == [0, 0] and not any(part.any() for part in found.parts.values())


# ---- steps that are taken


@pytest.mark.parametrize("chosen", [[0], [1], [3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("adam", [False, True])
def test_growth_is_as_predicted_with_an_error_that_falls_with_the_step(model, val, groups, chosen, adam, monkeypatch):
    lengths = (1e-4, 1e-5)  # beyond, other orders and rounding show
    monkeypatch.setattr(coinfluence, "LENGTHS", lengths)
    scale = {name: torch.rand(p.shape, dtype=F64, generator=torch.Generator().manual_seed(2)) for name, p in
             model.named_parameters()} if adam else None
    found = measure(model, val, groups, 0.7, 60, scale=scale)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    predicted = found.influence.value[chosen].mean().item()
    rows = taken(model, live_batches(val, 60, CPU), live_batches([groups[n] for n in chosen], 60, CPU), predicted, 0.7, scale)
    errors = [row["relative error"] for row in rows]
    assert errors == pytest.approx([abs(row["measured"] / row["predicted"] - 1) for row in rows])
    assert errors[-1] < 1e-3  # the deviation by N, not N - 1, would be 13% off
    assert [one / other for one, other in zip(errors, errors[1:])] == pytest.approx([10], rel=0.05)
    assert [row["length"] for row in rows] == list(lengths)
    assert rows[0]["predicted"] == pytest.approx(10 * rows[1]["predicted"])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_the_growth_that_is_measured_is_that_of_grpos_objective(model, val, groups, monkeypatch):
    """Of the ratio, that is, and not of its logarithm; by the loss itself with its clip wide open."""
    monkeypatch.setattr(coinfluence, "LENGTHS", (0.5,))
    advantages = group_advantages(correctness(val))
    q, step = (pack(x, group_advantages(correctness(x)) / 20, 60, CPU) for x in (val, groups))
    (row,) = taken(model, q, step, 1.0, 0.7)
    move = gradient(model, step, 0.7)
    before = [answer_logps(model, batch, 0.7)[0].detach() for batch in pack(val, advantages, 60, CPU)]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += 0.5 / math.sqrt(inner(move, move)) * move[name]
    loss = sum(grpo_loss(answer_logps(model, batch, 0.7)[0], old, None, batch.advantages, batch.trained, clip=(1.0, 1e9),
                         normalizer=20)[0].item() for batch, old in zip(pack(val, advantages, 60, CPU), before))
    assert row["measured"] == pytest.approx(-loss, rel=1e-9) and abs(loss) > 1e-3


def test_the_objective_that_grows_is_the_expected_accuracy(model):
    """A model that finds all answers equally likely, and every answer as a sample: the growth of the true accuracy by a
    step, by enumeration, is what kappa predicts, if advantages and means are those of the textbook."""
    vocabulary, length = 5, 2
    model = make_model(vocabulary).double()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding.copy_(embedding[:1].clone().expand(vocabulary, -1))  # all tokens alike
    answers = [[a, b] for a in range(vocabulary) for b in range(vocabulary)]
    right = [float(sum(answer) % 3 == 0) for answer in answers]
    prompts = [Prompt([1, 2], "", {}), Prompt([3], "", {})]
    groups = [[Episode(prompt, Completion(answer, [0.0, 0.0]), "", bool(r), False, r) for answer, r in zip(answers, right)]
              for prompt in prompts]
    alpha = sum(right) / len(right)
    weights = (correctness(groups) - alpha) / 25 * length  # no division by the deviation, sums over tokens and not means
    step = gradient(model, pack(groups[:1], weights[:1], 10**6, CPU), 1.0)

    def expected_accuracy() -> float:
        total = 0.0
        for answer, r in zip(answers, right):
            logps = (model(torch.tensor([prompts[0].ids + answer]))[0, 1:-1] @ model.lm_head_weight.T).log_softmax(-1)
            total += r * logps.gather(1, torch.tensor(answer)[:, None]).sum().exp().item()
        return total

    kappa = means(directional(model, groups, step, 1.0, 10**6))
    predicted = (weights * kappa)[0].sum().item()
    before, size = expected_accuracy(), 1e-4
    assert before == pytest.approx(alpha)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter += size * step[name]
    assert (expected_accuracy() - before) / size == pytest.approx(predicted, rel=1e-3) and predicted > 0.01


def test_adams_scale_from_a_checkpoint(tmp_path):
    model = make_model(50)
    optimizer = adamw(model, (0.9, 0.999), 0.0)
    with pytest.raises(InputError, match="training.json"):
        checkpoint.save(model, tmp_path / "plain")
        adam_scale(str(tmp_path / "plain"), model)
    checkpoint.save_training(tmp_path / "sft", model, optimizer, {"step": 0})
    with pytest.raises(InputError, match="sft: not a checkpoint of train_rl.py"):
        adam_scale(str(tmp_path / "sft"), model)
    checkpoint.save_training(tmp_path / "fresh", model, optimizer, {"step": 0, "drawn": 0})
    with pytest.raises(InputError, match="no second moments"):
        adam_scale(str(tmp_path / "fresh"), model)
    generator = torch.Generator().manual_seed(3)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    gradients["model.embed_tokens.weight"][7] = 0
    gradients["model.embed_tokens.weight"][8] = 1e-8  # as large as what is added to the root
    for _ in range(3):  # with equal gradients, bias-corrected moments are their squares
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    checkpoint.save_training(tmp_path / "c", model, optimizer, {"step": 3, "drawn": 9})
    weight = model.lm_head_weight.clone()
    found = adam_scale(str(tmp_path / "c"), make_model(50, seed=1))
    for name, tensor in found.items():
        expected = torch.where(gradients[name] == 0, 0.0, 1 / (gradients[name].abs() + 1e-8))
        torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=0)
    assert torch.equal(model.lm_head_weight, weight)
    with pytest.raises(InputError, match="another kind of model"):
        adam_scale(str(tmp_path / "c"), make_model(51))


# ---- for the log of training


def test_bf16_products_are_back_after_an_error(model, val, groups, monkeypatch):
    monkeypatch.setattr(coinfluence, "measure", lambda *_: [][0])
    model.compute_dtype = torch.bfloat16
    with pytest.raises(IndexError):
        coinfluence.training_numbers(model, val, groups, 0.7, 60)
    assert model.compute_dtype == torch.bfloat16


def test_format_rewards_are_left_out(val):
    paid = [[replace(episode, reward=episode.reward + 0.1 * n) for n, episode in enumerate(group)] for group in val]
    assert torch.equal(correctness(paid), torch.tensor(RIGHT, dtype=F64))


def test_the_mix():
    correct = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 0, 0]], dtype=F64)
    root = "root_of_alpha_1_minus_alpha"
    mean = (math.sqrt(3 / 16) + 0.5) / 4
    assert mix(correct) == {"accuracy": 7 / 16, "between_0_and_1": 0.5, root: pytest.approx(mean)}


def test_numbers_for_training_are_in_fp32_and_leave_the_model_as_it_is(val, groups):
    model = make_model(50)
    expected = measure(model, val, groups, 0.7, 60)
    model.compute_dtype = torch.bfloat16
    found = coinfluence.training_numbers(model, val, groups, 0.7, 60)
    assert found == {"influence": pytest.approx(expected.influence.value.mean().item()),
                     "validation_gradient_norm": pytest.approx(expected.norm)}
    assert model.compute_dtype == torch.bfloat16
    for right in ([[1, 1], [0, 0]], [[1, 0], [0, 0]]):  # no live prompt of Q, and one
        assert coinfluence.training_numbers(model, rollouts(right, 0), groups, 0.7, 60) == {}
    assert coinfluence.training_numbers(model, val, [groups[2], groups[4]], 0.7, 60) == {}
    assert model.compute_dtype == torch.bfloat16
