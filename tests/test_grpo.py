import doctest
import inspect
import math
import re
from dataclasses import replace

import pytest
import torch

from minibridge import grpo
from minibridge.config import InputError
from minibridge.grpo import PRESETS, group_advantages, grpo_loss, importance_weights, step_normalizer

F64 = torch.float64
LN = math.log


def tensor(*rows):
    return torch.tensor(rows, dtype=F64)


def batch(rows=6, tokens=5, seed=0, requires_grad=True):
    """Random log-probabilities around each other, ragged lengths 1..tokens, advantages of both signs."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=generator, dtype=F64) * 2 - 0.1
    logps = old + torch.randn(rows, tokens, generator=generator, dtype=F64) * 0.3
    ref = old + torch.randn(rows, tokens, generator=generator, dtype=F64) * 0.3
    entropy = torch.rand(rows, tokens, generator=generator, dtype=F64)
    advantages = torch.randn(rows, generator=generator, dtype=F64)
    lengths = torch.arange(rows) % tokens + 1
    mask = (torch.arange(tokens) < lengths[:, None]).to(F64)
    importance = torch.rand(rows, tokens, generator=generator, dtype=F64) + 0.5
    return {"logps": logps.requires_grad_(requires_grad), "old_logps": old, "ref_logps": ref, "importance": importance,
            "advantages": advantages, "mask": mask, "entropy": entropy.requires_grad_(requires_grad)}


SURROGATES = ("ppo", "gspo", "cispo", "reinforce")
FULL = {"clip": (0.2, 0.3), "kl_coef": 0.1, "kl_threshold": 0.05, "entropy_coef": 0.02}


def single(ratio, advantage, **options):
    """Loss and its gradient for the log-probability, for one rollout of one token with this ratio."""
    logps = tensor([LN(ratio)]).requires_grad_()
    arguments = logps, tensor([0.0]), None, tensor(advantage), tensor([1.0])
    loss, metrics = grpo_loss(*arguments, normalizer=1, **options)
    loss.backward()
    return loss.item(), logps.grad.item(), metrics["clip_fraction"].item()


def test_the_worked_examples_in_the_docstrings():
    results = doctest.testmod(grpo)
    assert results.attempted >= 11 and results.failed == 0


def test_the_table_of_presets_is_what_its_doctest_finds():
    """The formulas beside the names, read as arithmetic, give the numbers below them."""
    doc = inspect.getdoc(grpo.Recipe)  # without the indentation, as Python 3.13 keeps it
    rows = dict(re.findall(r"^ {4}(\w+) +(0\.5.*)$", doc, re.MULTILINE))
    printed = {name: numbers for name, *numbers in re.findall(r"^(\w+) +([\d.]+) (-?[\d.]+)$", doc, re.MULTILINE)}
    assert list(rows) == list(printed) == list(PRESETS)
    for name, row in rows.items():
        row = re.sub(r"ln ([\d.]+)", r"ln(\1)", row.split(",")[0])
        advantage, loss = (re.sub(r"([\dA]) (ln|sqrt|\()", r"\1 * \2", formula) for formula in re.split(" {3,}", row))
        names = {"ln": math.log, "sqrt": math.sqrt}
        names["A"] = eval(advantage, names)
        assert [f"{names['A']:.4f}", f"{eval(loss, names):.6f}"] == printed[name]


# ---- advantages


@pytest.mark.parametrize("ddof, std", [(1, 1.0), (0, math.sqrt(2 / 3))])
def test_advantages_by_hand(ddof, std):
    # rewards 1, 2, 3: mean 2, variance 2 / (3 - ddof)
    advantages = group_advantages(tensor([1.0, 2.0, 3.0]), ddof=ddof, eps=0.5)
    torch.testing.assert_close(advantages, tensor([-1.0, 0.0, 1.0]) / (std + 0.5))


def test_the_defaults_are_the_papers():
    expected = tensor([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-6)
    torch.testing.assert_close(group_advantages(tensor([1.0, 0.0, 0.0, 0.0])), expected, rtol=0, atol=1e-12)


def test_advantages_without_scale():
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 0.0]), scale=False)
    assert advantages.tolist() == [[0.75, -0.25, -0.25, -0.25]]


def test_groups_do_not_see_each_other():
    rewards = tensor([1.0, 0.0, 0.0], [0.0, 5.0, 1.0])
    both = group_advantages(rewards)
    assert torch.equal(both, torch.cat([group_advantages(rewards[:1]), group_advantages(rewards[1:])]))


@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dead_groups_get_exactly_zero(dtype, scale):
    values = torch.tensor([0.0, 1.0, 0.1, 1.05, 1 / 3], dtype=dtype)
    rewards = values[:, None].expand(5, 31)  # 31 times 0.1 do not have the mean 0.1
    assert not rewards.mean(1).eq(values).all()
    assert group_advantages(rewards, eps=0.0, scale=scale).eq(0).all()


def test_a_nearly_dead_group_is_not_dead():
    assert group_advantages(tensor([1.0, 1.0, 1.0, 1.0 + 1e-9])).ne(0).all()


@pytest.mark.parametrize("ddof", [0, 1])
def test_a_group_of_one_is_refused(ddof):
    with pytest.raises(InputError, match="at least 2 samples"):
        group_advantages(torch.ones(4, 1), ddof=ddof)


@pytest.mark.parametrize("rewards", [torch.tensor([[1, 0]]), torch.ones(4)])
def test_rewards_of_another_kind_are_refused(rewards):
    with pytest.raises(ValueError, match=r"floats \(N, G\), not torch"):
        group_advantages(rewards)


@pytest.mark.parametrize("shape", [(2, 3), (2, 1), (3,)])
def test_advantages_that_would_be_broadcast_are_refused(shape):
    with pytest.raises(ValueError, match=r"one a rollout, \(2,\), not"):
        grpo_loss(*torch.zeros(3, 2, 3), torch.ones(shape), torch.ones(2, 3), normalizer=2)


# ---- the surrogate


@pytest.mark.parametrize("surrogate, aggregate", [("ppo", "sequence"), ("ppo", "token"), ("gspo", "sequence"),
                                                  ("cispo", "token"), ("reinforce", "token")])
def test_at_ratio_one_the_gradient_is_reinforce(surrogate, aggregate):
    """Of every surrogate; gspo's where all tokens of a rollout weigh the same."""
    data = batch(rows=8)
    advantages = group_advantages((torch.arange(8, dtype=F64) % 3 == 0).to(F64).view(2, 4)).flatten()
    logps, mask = data["logps"], data["mask"]
    options = {"aggregate": aggregate, "normalizer": 8 if aggregate == "sequence" else mask.sum()}
    loss, metrics = grpo_loss(logps, logps.detach(), None, advantages, mask, surrogate=surrogate, **options)
    weights = mask / mask.sum(1, keepdim=True) / 8 if aggregate == "sequence" else mask / mask.sum()
    reinforce, = torch.autograd.grad(-(advantages[:, None] * weights * logps).sum(), logps)
    gradient, = torch.autograd.grad(loss, logps)
    torch.testing.assert_close(gradient, reinforce, rtol=0, atol=1e-15)
    assert metrics["clip_fraction"] == 0 and metrics["log_ratio"] == 0
    assert metrics["kept"].item() == pytest.approx(1, abs=1e-15)


@pytest.mark.parametrize("ratio, advantage, loss, gradient", [
    (1.5, 2.0, -2 * 1.3, 0.0),         # A > 0, already too likely: clipped at 1 + high
    (1.25, 2.0, -2 * 1.25, -2 * 1.25),  # inside
    (0.5, 2.0, -2 * 0.5, -2 * 0.5),    # A > 0, too unlikely: still pulled up
    (0.5, -2.0, 2 * 0.8, 0.0),         # A < 0, already too unlikely: clipped at 1 - low
    (0.85, -2.0, 2 * 0.85, 2 * 0.85),  # inside
    (1.5, -2.0, 2 * 1.5, 2 * 1.5),     # A < 0, too likely: still pushed down
])
def test_the_clip_acts_on_the_right_sides(ratio, advantage, loss, gradient):
    value, slope, clipped = single(ratio, advantage, clip=(0.2, 0.3))
    assert (value, slope) == (pytest.approx(loss), pytest.approx(gradient, abs=1e-15))
    assert clipped == (gradient == 0)


def test_the_default_clip_is_the_papers():
    assert single(1.5, 1.0)[0] == pytest.approx(-1.2) and single(0.5, -1.0)[0] == pytest.approx(0.8)


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("ratio, advantage", [(9.0, 1.0), (9.0, -1.0), (0.01, 1.0), (0.01, -1.0)])
def test_what_each_surrogate_stops(surrogate, ratio, advantage):
    """Far from 1: the clips stop the gradient on one side of each sign, cispo bounds it on both, reinforce has no ratio."""
    _, slope, clipped = single(ratio, advantage, surrogate=surrogate, clip=(0.2, 0.3))
    stopped = (ratio > 1) == (advantage > 0)
    within = min(max(ratio, 0.8), 1.3)
    weight = {"ppo": ratio * (not stopped), "gspo": ratio * (not stopped), "cispo": within, "reinforce": 1.0}
    assert slope == pytest.approx(-advantage * weight[surrogate])
    assert clipped == {"cispo": True, "reinforce": False}.get(surrogate, stopped)


def test_the_ratio_of_gspo_is_that_of_the_whole_rollout():
    """Two ratios of 2 and 1/2 make one of 1: inside the clip range, and with a gradient of 1/2 for each token."""
    logps = tensor([LN(2), -LN(2), 9.0]).requires_grad_()
    loss, metrics = grpo_loss(logps, torch.zeros(1, 3, dtype=F64), None, tensor(3.0), tensor([1.0, 1.0, 0.0]),
                              surrogate="gspo", clip=(3e-4, 4e-4), normalizer=1)
    loss.backward()
    assert loss.item() == pytest.approx(-3) and metrics["clip_fraction"] == 0
    assert metrics["log_ratio"].item() == pytest.approx(LN(2))
    assert logps.grad.tolist() == [pytest.approx([-1.5, -1.5, 0])]


def test_a_step_down_the_gradient_moves_probability_to_the_better_samples():
    logits = torch.zeros(3, dtype=F64, requires_grad=True)  # a policy over three one-token rollouts
    advantages = group_advantages(tensor([1.0, 0.0, 0.0]))[0]
    logps = logits.log_softmax(0)[:, None]
    loss, _ = grpo_loss(logps, logps.detach(), None, advantages, torch.ones(3, 1), normalizer=3)
    loss.backward()
    after = (logits - 0.1 * logits.grad).detach().softmax(0)
    assert after[0] > 1 / 3 > after[1] and after[1].item() == pytest.approx(after[2].item())


def test_log_ratio_is_a_mean_of_distances():
    logps, mask = tensor([0.3, -0.1, 5.0], [-0.2, 5.0, 5.0]), tensor([1.0, 1.0, 0.0], [1.0, 0.0, 0.0])
    arguments = logps, torch.zeros_like(logps), None, tensor(1.0, 1.0), mask
    assert grpo_loss(*arguments, normalizer=2)[1]["log_ratio"].item() == pytest.approx((0.2 + 0.2) / 2)
    metrics = grpo_loss(*arguments, normalizer=3, aggregate="token")[1]
    assert metrics["log_ratio"].item() == pytest.approx((0.3 + 0.1 + 0.2) / 3)


# ---- KL and entropy


@pytest.mark.parametrize("gap", [LN(2), -LN(4), 0.0])
def test_k3_by_hand(gap):
    logps = tensor([-1.0]).requires_grad_()
    loss, metrics = grpo_loss(logps, logps.detach(), logps.detach() + gap, tensor(0.0), tensor([1.0]),
                              kl_coef=0.5, normalizer=1)
    loss.backward()
    k3 = {LN(2): 2 - LN(2) - 1, -LN(4): 0.25 + LN(4) - 1, 0.0: 0.0}[gap]
    assert metrics["kl"].item() == pytest.approx(k3) and loss.item() == pytest.approx(0.5 * k3)
    assert logps.grad.item() == pytest.approx(0.5 * (1 - math.exp(gap)), abs=1e-15)


def test_k3_of_a_tiny_gap_keeps_its_digits_in_fp32():
    gap = torch.tensor([1e-3, -1e-4])
    torch.testing.assert_close(grpo.kl_k3(gap), gap**2 / 2 + gap**3 / 6, rtol=1e-3, atol=0)


def test_k3_is_capped_at_10_with_no_gradient_beyond():
    gap = tensor(2.5, 2.7, 50.0, 1e30, -9.0, -50.0).requires_grad_()
    k3 = grpo.kl_k3(gap)
    k3.sum().backward()
    below = [math.exp(-9) + 9 - 1, 10]
    assert k3.tolist() == pytest.approx([math.exp(2.5) - 2.5 - 1, 10, 10, 10, *below])
    assert gap.grad.tolist() == pytest.approx([math.exp(2.5) - 1, 0, 0, 0, math.exp(-9) - 1, 0])


@pytest.mark.parametrize("aggregate, normalizer, expected", [
    ("sequence", 2, (2.0 + 4.0) / 2), ("token", 3, (1.0 + 3.0 + 4.0) / 3)])
def test_entropy_is_rewarded(aggregate, normalizer, expected):
    entropy = tensor([1.0, 3.0], [4.0, 99.0]).requires_grad_()
    mask, zeros = tensor([1.0, 1.0], [1.0, 0.0]), torch.zeros(2, 2, dtype=F64)
    loss, metrics = grpo_loss(zeros, zeros, None, torch.zeros(2, dtype=F64), mask, entropy=entropy,
                              entropy_coef=0.1, aggregate=aggregate, normalizer=normalizer)
    loss.backward()
    assert metrics["entropy"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(-0.1 * expected)
    assert (entropy.grad < 0).tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("aggregate", ["sequence", "token"])
def test_the_threshold_drops_the_whole_rollout_and_keeps_the_denominator(aggregate):
    data = batch(rows=3) | {"mask": torch.ones(3, 5, dtype=F64)}
    data["ref_logps"] = data["logps"].detach() + tensor([0.0], [0.8], [-0.1])  # k3 0, 0.426, 0.0048
    options = {"kl_coef": 0.1, "entropy_coef": 0.2, "aggregate": aggregate,
               "normalizer": 3 if aggregate == "sequence" else 15}
    loss, metrics = grpo_loss(**data, kl_threshold=0.15, **options)
    gradient, entropy_gradient = torch.autograd.grad(loss, (data["logps"], data["entropy"]))
    two = {name: value[[0, 2]] for name, value in data.items()}
    expected, kept = grpo_loss(**two, **options)  # the other two, over the same normalizer
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)
    assert gradient[1].eq(0).all() and entropy_gradient[1].eq(0).all() and gradient[[0, 2]].ne(0).any(1).all()
    assert metrics["kept"].item() == pytest.approx(2 / 3)
    assert metrics["policy_loss"].item() == pytest.approx(kept["policy_loss"].item(), abs=1e-15)
    assert metrics["kl"].item() == pytest.approx(kept["kl"].item() + (math.exp(0.8) - 1.8) / 3)


def test_rollouts_that_are_not_kept_leave_the_loss_and_stay_in_the_denominator():
    """Like those beyond the threshold, and together with them; what is only logged still counts them."""
    data = batch()
    kept = torch.tensor([True, False, True, True, False, True])
    options = {"kl_coef": 0.1, "entropy_coef": 0.2, "normalizer": 6}
    loss, metrics = grpo_loss(**data, **options, kept=kept)
    gradient, entropy_gradient = torch.autograd.grad(loss, (data["logps"], data["entropy"]))
    expected, of_kept = grpo_loss(**{name: value[kept] for name, value in data.items()}, **options)
    everything = grpo_loss(**data, **options)[1]
    assert loss.item() == pytest.approx(expected.item(), abs=1e-15)
    assert gradient[~kept].eq(0).all() and entropy_gradient[~kept].eq(0).all()
    assert metrics["kept"].item() == pytest.approx(4 / 6)
    for name in ("kl", "entropy", "clip_fraction", "log_ratio", "importance"):
        assert metrics[name] == everything[name] != of_kept[name]
    both = grpo_loss(**data, **options, kept=kept, kl_threshold=0.06)[1]["kept"].item()
    other = grpo_loss(**data, **options, kl_threshold=0.06)[1]["kept"].item()
    assert 0 < both < min(4 / 6, other)


def test_the_threshold_is_on_the_mean_over_the_rollouts_own_tokens_and_dropped_from_equality_on():
    gap = grpo.kl_k3(tensor(0.8)).item()
    logps, mask = torch.zeros(1, 4, dtype=F64), tensor([1.0, 1.0, 0.0, 0.0])
    ref = tensor([0.8, 0.0, 5.0, 5.0])  # mean over the mask gap / 2
    def kept(threshold):
        arguments = logps, logps, ref, tensor(1.0), mask
        return grpo_loss(*arguments, kl_threshold=threshold, normalizer=1)[1]["kept"].item()
    assert kept(gap / 2) == 0 and kept(gap / 2 * 0.999) == 0 and kept(gap / 2 * 1.001) == 1


# ---- importance weights


def test_importance_weights_are_capped_from_above_alone_and_carry_no_gradient():
    trainer = tensor(LN(1.5), LN(3), LN(0.01), 0.0, 1e30, -1e30).requires_grad_()
    weights = importance_weights(trainer, torch.zeros(6, dtype=F64), cap=2.0)
    assert weights.tolist() == pytest.approx([1.5, 2, 0.01, 1, 2, math.exp(-20)]) and not weights.requires_grad


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_importance_weights_multiply_the_first_term_alone(surrogate):
    data = batch()
    terms = {"surrogate": surrogate, "normalizer": 6}
    plain = {name: value for name, value in data.items() if name != "importance"}
    doubled = data | {"importance": torch.full_like(data["importance"], 2.0)}
    one, two = grpo_loss(**plain, **terms)[0], grpo_loss(**doubled, **terms)[0]
    assert two.item() == pytest.approx(2 * one.item())
    with_more = terms | {"kl_coef": 0.1, "entropy_coef": 0.2}
    more = grpo_loss(**plain, **with_more)[0].item() - one.item()
    loss, metrics = grpo_loss(**doubled, **with_more)
    assert loss.item() == pytest.approx(two.item() + more) and abs(more) > 0.01
    assert metrics["importance"].item() == pytest.approx(2) and metrics["policy_loss"].item() == pytest.approx(two.item())


# ---- aggregation


def test_sequence_and_token_means_in_closed_form():
    # A = 1 and -1 at ratio 1: rollouts of 1 and 3 tokens have token losses -1 and +1.
    zeros, mask = torch.zeros(2, 3, dtype=F64), tensor([1.0, 0.0, 0.0], [1.0, 1.0, 1.0])
    arguments = zeros, zeros, None, tensor(1.0, -1.0), mask
    assert grpo_loss(*arguments, normalizer=2)[0].item() == pytest.approx(0, abs=1e-15)
    assert grpo_loss(*arguments, normalizer=4, aggregate="token")[0].item() == pytest.approx((-1 + 3) / 4)
    assert grpo_loss(*arguments, normalizer=8, aggregate="token")[0].item() == pytest.approx((-1 + 3) / 8)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("order", [[0, 1, 2, 3, 4, 5], [5, 2, 0, 4, 1, 3]])
@pytest.mark.parametrize("sizes", [[6], [1] * 6, [2, 4], [3, 1, 2]])
def test_micro_batches_padding_and_order_change_nothing(sizes, order, name):
    data, recipe = batch(), PRESETS[name]
    normalizer = step_normalizer(recipe.aggregate, data["mask"].sum(1), longest=9)
    options = recipe.token_terms | {"kl_coef": 0.1, "kl_threshold": 0.05, "entropy_coef": 0.02,
                                    "aggregate": recipe.aggregate, "normalizer": normalizer}
    loss, metrics = grpo_loss(**data, **options)
    assert 0 < metrics["kept"] < 1 and (metrics["clip_fraction"] > 0) == (name not in ("cispo", "grpo_zero"))
    expected = torch.autograd.grad(loss, (data["logps"], data["entropy"]))
    total, sums = 0.0, dict.fromkeys(metrics, 0.0)
    gradients = [torch.zeros(6, 5, dtype=F64) for _ in range(2)]
    for rows in torch.tensor(order).split(sizes):
        longest = int(data["mask"][rows].sum(1).max())
        padding = (0, 3) if len(rows) % 2 else (0, 0)  # also wider than the longest row
        part = {name: value[rows] if name == "advantages" else
                torch.nn.functional.pad(value[rows, :longest], padding, value=0.0 if name == "mask" else 7.0)
                for name, value in data.items()}
        share, share_metrics = grpo_loss(**part, **options)
        for gradient, piece in zip(gradients, torch.autograd.grad(share, (data["logps"], data["entropy"]))):
            gradient += piece
        total += share.item()
        sums = {name: sums[name] + value.item() for name, value in share_metrics.items()}
    assert total == pytest.approx(loss.item(), abs=1e-12)
    assert sums == pytest.approx({name: value.item() for name, value in metrics.items()}, abs=1e-12)
    for gradient, value in zip(gradients, expected):
        torch.testing.assert_close(gradient, value, rtol=0, atol=1e-12)


# ---- presets: the formulas of the papers and of well-known libraries, restated on whole padded tensors


def in_words(name, logps, old_logps, advantages, mask, ref_logps, entropy, kl_coef, entropy_coef, longest):
    """Loss of a preset, all rollouts at once."""
    ratio, A, N, lengths = torch.exp(logps - old_logps), advantages[:, None], len(mask), mask.sum(1)
    gap = ref_logps - logps
    more = kl_coef * (torch.exp(gap) - gap - 1) - entropy_coef * entropy  # per token, as TRL and verl add them

    def clipped(ratio, low, high):
        return -torch.minimum(ratio * A, torch.clamp(ratio, 1 - low, 1 + high) * A)

    if name == "paper":  # verl's "seq-mean-token-mean", TRL's "grpo"
        return (((clipped(ratio, .2, .2) + more) * mask).sum(1) / lengths).mean()
    if name == "dr_grpo":  # TRL's "dr_grpo": a sum over rows times the longest completion
        return ((clipped(ratio, .2, .2) + more) * mask).sum() / (N * longest)
    if name == "dapo":  # verl's "token-mean", TRL's "dapo": tokens of the whole step
        return ((clipped(ratio, .2, .28) + more) * mask).sum() / mask.sum()
    if name == "gspo":  # arXiv 2507.18071, equations 5 to 7; TRL's "grpo" with ratios of sequences
        importance = torch.exp(((logps - old_logps) * mask).sum(1, keepdim=True) / lengths[:, None])
        return clipped(importance, 3e-4, 4e-4).mean() + ((more * mask).sum(1) / lengths).mean()
    if name == "cispo":  # TRL's "cispo" with epsilon_high 5
        return ((-torch.clamp(ratio, max=5.0).detach() * A * logps + more) * mask).sum() / mask.sum()
    if name == "grpo_zero":  # its update: log-probability times advantage over all tokens of the step
        return ((-A * logps + more) * mask).sum() / mask.sum()


@pytest.mark.parametrize("spread", [1.0, 0.001, 8.0])
@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_published_formulas(name, spread):
    """In value and gradient, for ratios far apart, nearly 1, and up to the hundreds."""
    data, recipe = batch(), replace(PRESETS[name], kl_coef=0.1, entropy_coef=0.02)
    old = data["logps"].detach() + (data["old_logps"] - data["logps"].detach()) * spread
    fixed = {"old_logps": old} | {name: data[name] for name in ("advantages", "mask", "ref_logps", "entropy")}
    loss, metrics = grpo_loss(data["logps"], **fixed, **recipe.token_terms, aggregate=recipe.aggregate,
                              normalizer=step_normalizer(recipe.aggregate, fixed["mask"].sum(1), longest=9))
    expected = in_words(name, data["logps"], **fixed, kl_coef=0.1, entropy_coef=0.02, longest=9)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    for leaf in ("logps", "entropy"):
        ours, theirs = (torch.autograd.grad(value, data[leaf], retain_graph=True)[0] for value in (loss, expected))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name, expected", [
    ("paper", [.75 / (.5 + 1e-6), -.25 / (.5 + 1e-6)]), ("dr_grpo", [.75, -.25]),
    ("grpo_zero", [.75 / (math.sqrt(3) / 4 + 1e-4), -.25 / (math.sqrt(3) / 4 + 1e-4)])])
def test_advantages_of_presets(name, expected):
    recipe = PRESETS[name]
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 0.0]), recipe.ddof, recipe.eps, recipe.scale)
    assert advantages[0, :2].tolist() == pytest.approx(expected, abs=1e-14)


def test_only_the_papers_preset_has_kl_and_entropy_terms():
    terms = {name: (recipe.kl_coef, recipe.entropy_coef) for name, recipe in PRESETS.items()}
    assert terms.pop("paper") == (0.001, 0.001) and set(terms.values()) == {(0, 0)}
    assert {(r.kl_threshold, r.tis_cap, r.mask_truncated) for r in PRESETS.values()} == {(None, None, False)}


def test_normalizers():
    lengths = torch.tensor([3, 1])
    assert [step_normalizer(aggregate, lengths, 10) for aggregate in ("sequence", "token", "length")] == [2, 4, 20]


def test_unknown_aggregate_and_missing_inputs_are_refused():
    data = batch()
    plain = {name: data[name] for name in ("logps", "old_logps", "advantages", "mask")} | {"normalizer": 6}
    grpo_loss(ref_logps=None, **plain)
    for wrong in ({"aggregate": "mean"}, {"surrogate": "clip"}, {"kl_coef": 0.1}, {"kl_threshold": 0.1},
                  {"entropy_coef": 0.1}):
        with pytest.raises(ValueError):
            grpo_loss(ref_logps=None, **plain, **wrong)


# ---- garbage and gradients


@pytest.mark.parametrize("surrogate, aggregate", [("ppo", "sequence"), ("ppo", "token"), ("gspo", "sequence"),
                                                  ("cispo", "token"), ("reinforce", "length")])
@pytest.mark.parametrize("name", ["logps", "old_logps", "ref_logps", "entropy", "importance"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30, -1e30])
def test_masked_garbage_changes_nothing(garbage, name, surrogate, aggregate):
    clean, dirty = batch(), batch()
    with torch.no_grad():
        dirty[name].masked_fill_(dirty["mask"] == 0, garbage)
    results = []
    for data in (clean, dirty):
        loss, metrics = grpo_loss(**data, **FULL, surrogate=surrogate, aggregate=aggregate, normalizer=6)
        loss.backward()
        results.append([loss.detach(), data["logps"].grad, data["entropy"].grad, *metrics.values()])
    assert all(torch.equal(one, two) for one, two in zip(*results)) and results[1][0].isfinite()


@pytest.mark.parametrize("gap", [-1e30, -1e3, 1e3, 1e30])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_trained_extremes_stay_finite(surrogate, dtype, advantage, gap):
    logps = torch.tensor([[gap, -1.0]], dtype=dtype, requires_grad=True)
    others = torch.tensor([[0.0, -1.0]], dtype=dtype)
    loss, metrics = grpo_loss(logps, others, others, torch.tensor([advantage], dtype=dtype), torch.ones(1, 2),
                              surrogate=surrogate, kl_coef=0.1, kl_threshold=0.15, normalizer=1)
    loss.backward()
    assert logps.grad.isfinite().all() and all(value.isfinite() for value in metrics.values())


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_rows_without_tokens_add_nothing(surrogate):
    data = batch()
    data["mask"][1:3] = 0
    options = FULL | {"normalizer": 6, "surrogate": surrogate}
    loss, metrics = grpo_loss(**data, **options)
    gradient, = torch.autograd.grad(loss, data["logps"])
    others = {name: value[[0, 3, 4, 5]] for name, value in data.items()}
    expected = grpo_loss(**others, **options)[1]
    assert gradient[1:3].eq(0).all()
    for name, value in metrics.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-15)


@pytest.mark.parametrize("dropped", [{"kl_threshold": 1e-9}, {"kept": torch.zeros(6)}])
def test_a_nan_in_a_dropped_rollout_is_still_one_in_the_loss(dropped):
    data = batch(requires_grad=False)
    assert grpo_loss(**data, **dropped, normalizer=6)[0] == 0
    data["logps"][5, 0] = math.nan
    assert grpo_loss(**data, **dropped, normalizer=6)[0].isnan()


@pytest.mark.parametrize("name", PRESETS)
def test_gradcheck(name):
    """With KL, entropy, threshold, importance and rollouts left out. What is detached must not move with the numeric
    derivative: cispo's ratio stays if the old log-probabilities follow the new ones."""
    data, recipe = batch(), PRESETS[name]
    constants = {name: data[name] for name in ("ref_logps", "advantages", "mask", "importance")}
    log_ratio = data["logps"].detach() - data["old_logps"]

    def loss(logps, entropy):
        old_logps = logps.detach() - log_ratio if name == "cispo" else data["old_logps"]
        options = recipe.token_terms | {"kl_coef": 0.1, "entropy_coef": 0.02, "aggregate": recipe.aggregate}
        return grpo_loss(logps, old_logps, entropy=entropy, **constants, **options, kl_threshold=0.2, normalizer=6,
                         kept=torch.tensor([1, 1, 0, 1, 1, 1]))[0]

    assert torch.autograd.gradcheck(loss, (data["logps"], data["entropy"]))


def test_inputs_stay_as_they_are_and_metrics_carry_no_graph():
    data = batch()
    before = {name: value.detach().clone() for name, value in data.items()}
    loss, metrics = grpo_loss(**data, **FULL, normalizer=6)
    loss.backward()
    assert all(torch.equal(data[name], before[name]) for name in data)
    assert not any(value.requires_grad for value in metrics.values())
    rewards = tensor([1.0, 0.0], [1.0, 1.0])
    copy = rewards.clone()
    group_advantages(rewards)
    assert torch.equal(rewards, copy)


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32])
def test_the_mask_may_have_any_type(kind):
    data = batch()
    expected = grpo_loss(**data, **FULL, normalizer=6)[0]
    assert torch.equal(grpo_loss(**data | {"mask": data["mask"].to(kind)}, **FULL, normalizer=6)[0], expected)
