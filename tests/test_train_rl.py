"""RL: the gradient against naive REINFORCE, micro-batches, the frozen reference, exact resume, learning."""

import json
import math
import shutil
from dataclasses import asdict, replace

import pytest
import torch

import train_rl
from conftest import make_model, metrics, weights, without_times
from minibridge import cache, checkpoint, evaluate, grpo, logprob, monitor, policy
from minibridge.config import parse, read_jsonl, run_main, write_jsonl
from minibridge.data import Prompt, load_prompts
from minibridge.generate import Completion
from minibridge.grpo import PRESETS, group_advantages
from minibridge.optim import learning_rate
from minibridge.parallel import ALONE
from minibridge.policy import answer_logps, chunked_loss, pack, padding, unchunked_loss, whole_step
from minibridge.rollout import Episode, rollout
from minibridge.tokenizer import Tokenizer
from minibridge.verify import verify
from train_rl import Config, describe, optimizer_steps, recipe_of, step_flops

CPU = torch.device("cpu")


def train(model, data, out, *flags) -> int:
    """Batches of 3 from 8 prompts (two an epoch), 4 samples of each."""
    words = ["--model", model, "--data", data, "--out", out, "--device", "cpu", "--prompts", 3,
             "--samples", 4, "--max-new-tokens", 8, "--learning-rate", 0.01, "--show-every", 0,
             *" ".join(map(str, flags)).split()]
    return run_main(train_rl.main, Config, [str(word) for word in words])


# ---- one step, against naive code


def settings(flags: str = "") -> Config:
    return parse(Config, ("--model x --data x --out x --temperature 0.7 " + flags).split())


@pytest.fixture
def groups(toy) -> list[list[Episode]]:
    """9 rollouts of the toy model at temperature 0.7, cut to lengths from 2 to 10."""
    prompts = load_prompts(toy.rl, toy.tokenizer, 512)[:3]
    found = rollout(toy.load(), toy.tokenizer, prompts, 3, max_new_tokens=10, temperature=0.7,
                    generator=torch.Generator().manual_seed(0))
    for row, group in enumerate(found):
        for column, episode in enumerate(group):
            length = 2 + row + 3 * column
            cut = Completion(episode.completion.ids[:length], episode.completion.logprobs[:length])
            group[column] = replace(episode, completion=cut)
    return found


ADVANTAGES = torch.tensor([[1.0, -0.5, 0.25], [2.0, -1.0, 0.0], [0.5, 0.5, -1.5]])


def naive_terms(model, reference, episode: Episode, temperature: float):
    """(T,) log-probabilities, entropies and k3 of the sampled tokens: one row, all logits, no padding."""
    ids, sampled = episode.prompt.ids + episode.completion.ids, torch.tensor(episode.completion.ids)[:, None]
    first = len(episode.prompt.ids) - 1
    logits = (policy.logits(policy(torch.tensor([ids])))[0, first:-1] for policy in (model, reference))
    logps, ref_logps = ((z / temperature).log_softmax(-1) for z in logits)  # (T, V)
    gap = (ref_logps - logps).gather(1, sampled)[:, 0]
    return logps.gather(1, sampled)[:, 0], -(logps.exp() * logps).sum(-1), gap.exp() - gap - 1


def catch_gradients(monkeypatch) -> list[dict]:
    """Make the optimizer step a note of the gradient."""
    caught = []

    def note(model, optimizer, rate, clip):
        caught.append({name: parameter.grad for name, parameter in model.named_parameters()})
        model.zero_grad()
        return 0.0

    monkeypatch.setattr(train_rl, "update", note)
    return caught


def largest_difference(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.mark.parametrize("kl_coef, entropy_coef", [(0.0, 0.0), (0.5, 0.3)])
def test_gradient_where_the_ratio_is_1_is_reinforce(toy, groups, monkeypatch, kl_coef, entropy_coef):
    """Mean over rollouts of the mean over their own tokens of -A log p, + c k3, - c H."""
    model, reference = toy.load(), make_model(toy.tokenizer.vocab_size, seed=1)
    loss, kls, entropies = 0.0, [], []
    for episode, advantage in zip([episode for group in groups for episode in group], ADVANTAGES.flatten()):
        logps, entropy, k3 = naive_terms(model, reference, episode, temperature=0.7)
        loss = loss + (-advantage * logps + kl_coef * k3.clamp(max=10) - entropy_coef * entropy).mean() / 9
        kls.append(k3.clamp(max=10).mean().item())
        entropies.append(entropy.mean().item())
    loss.backward()
    naive = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert max(gradient.abs().max().item() for gradient in naive.values()) > 0.01

    caught = catch_gradients(monkeypatch)
    config = settings(f"--kl-coef {kl_coef} --entropy-coef {entropy_coef} --micro-tokens 400")
    model = toy.load()
    found = optimizer_steps(model, reference, None, pack(groups, ADVANTAGES, config.micro_tokens, CPU), 0.1, config)
    assert largest_difference(caught[0], naive) < 2e-6
    assert found["policy_loss"] == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-5)
    assert found["entropy"] == pytest.approx(sum(entropies) / 9, abs=1e-5)
    assert found["mismatch"] < 1e-4
    if kl_coef:
        assert found["kl"] == pytest.approx(sum(kls) / 9, rel=1e-5)


def test_micro_batches_and_order_change_nothing(toy, groups):
    """Neither the metrics nor the weights after two updates, of which the second clips and weighs the KL."""
    results = []
    for micro_tokens, order in ((16384, (0, 1, 2)), (400, (0, 1, 2)), (200, (2, 0, 1))):
        flags = "--updates 2 --kl-coef 0.1 --entropy-coef 0.1 --clip-low 0.01 --clip-high 0.01 --clip 100"
        config = settings(f"{flags} --micro-tokens {micro_tokens}")
        model, reference = toy.load(), make_model(toy.tokenizer.vocab_size, seed=1)
        # Plain SGD: Adam would turn a rounding error in a gradient near 0 into a whole step.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        batches = pack([groups[row] for row in order], ADVANTAGES[list(order)], micro_tokens, CPU)
        found = optimizer_steps(model, reference, optimizer, batches, 0.01, config)
        results.append((len(batches), found, model.state_dict()))
    assert 1 == results[0][0] < results[1][0] < results[2][0]
    start = toy.load().state_dict()
    assert largest_difference(start, results[0][2]) > 1e-3
    for _, found, state in results[1:]:
        assert found == pytest.approx(results[0][1], rel=1e-5, abs=2e-6)
        assert largest_difference(state, results[0][2]) < 1e-6


@pytest.mark.parametrize("row, column", [(0, 0), (2, 2)])
def test_mismatch_is_the_largest_of_all_micro_batches(toy, groups, monkeypatch, row, column):
    catch_gradients(monkeypatch)
    monkeypatch.setattr(logprob, "WHOLE_ELEMENTS", 0)  # several chunks to a micro-batch, too
    config = settings("--micro-tokens 200")
    groups[row][column].completion.logprobs[-1] -= 0.5
    batches = pack(groups, ADVANTAGES, config.micro_tokens, CPU)
    found = optimizer_steps(toy.load(), toy.load(), None, batches, 0.1, config)
    assert len(batches) > 1 and found["mismatch"] == pytest.approx(0.5, abs=1e-4)
    tokens = sum(len(episode.completion.ids) for group in groups for episode in group)
    assert found["mismatch_mean"] == pytest.approx(0.5 / tokens, abs=1e-6)


def test_later_updates_are_off_policy(toy, groups, monkeypatch):
    """The ratio is to the policy that sampled, not to the last update's; the metrics are the first's."""
    calls = []
    token_loss = policy.token_loss

    def spy(logps, old_logps, *rest, **options):
        loss, found = token_loss(logps, old_logps, *rest, **options)
        calls.append((logps.detach(), old_logps, found))
        return loss, found

    monkeypatch.setattr(policy, "token_loss", spy)
    config = settings("--updates 3 --micro-tokens 440")
    model, reference = toy.load(), make_model(toy.tokenizer.vocab_size, seed=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    batches = pack(groups, ADVANTAGES, config.micro_tokens, CPU)
    assert len(batches) == 2
    found = optimizer_steps(model, reference, optimizer, batches, 0.02, config)
    assert len(calls) == 6
    for number, (logps, old_logps, _) in enumerate(calls):
        assert not old_logps.requires_grad and torch.equal(old_logps, calls[number % 2][1])
        gap = (logps - old_logps).abs().max().item()
        assert gap < 1e-6 if number < 2 else gap > 1e-3
    assert found["loss"] == pytest.approx(sum(metrics["loss"].item() for _, _, metrics in calls[:2]))
    assert found["mismatch"] < 1e-4  # at the first update; what the updates have led to is seen at the last
    assert found["log_ratio"] == pytest.approx(sum(metrics["log_ratio"].item() for _, _, metrics in calls[4:])) != 0
    clipped = sum(metrics["clip_fraction"].item() for _, _, metrics in calls[4:])
    assert found["clip_fraction"] == pytest.approx(clipped) != 0


@pytest.mark.parametrize("flags", ["", "--tis-cap 1.02 --mask-truncated"])
@pytest.mark.parametrize("preset", [name for name, recipe in PRESETS.items() if recipe.surrogate != "gspo"])
def test_the_chunked_loss_is_the_unchunked_one(toy, groups, monkeypatch, preset, flags):
    """In value, metrics and gradient; where ratios are not 1, clips decide and some answers were cut off."""
    monkeypatch.setattr(logprob, "WHOLE_ELEMENTS", 0)  # several chunks
    config = settings(f"--preset {preset} --kl-coef 0.1 --entropy-coef 0.05 {flags}")
    recipe = recipe_of(config) if PRESETS[preset].clip_low is None else replace(recipe_of(config), clip_low=0.01, clip_high=0.02)
    groups[1][0].completion.finish_reason = "stop"
    (batch,) = pack(groups, ADVANTAGES, 16384, CPU)
    assert batch.truncated.sum() == 8
    noise = 0.05 * torch.randn(batch.trained.shape, generator=torch.Generator().manual_seed(0))
    other = make_model(toy.tokenizer.vocab_size, seed=1)
    with torch.no_grad():
        batch.old_logps, batch.ref_logps = batch.sampled_logps + noise, answer_logps(other, batch, 0.7)[0]
    results = []
    for loss_of in (unchunked_loss, chunked_loss):
        model = toy.load()
        loss, found = loss_of(model, batch, whole_step([batch], recipe, 0.7, 10))
        loss.backward()
        results.append(({name: value.item() for name, value in found.items()}, loss.item(),
                        {name: parameter.grad for name, parameter in model.named_parameters()}))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5, abs=1e-6)
    assert results[0][0]["clip_fraction"] > 0.1 or PRESETS[preset].clip_low is None
    if flags:
        assert results[0][0]["importance"] != pytest.approx(1, abs=1e-3) and results[0][0]["kept"] < 0.3
    assert results[1][1] == pytest.approx(results[0][1], rel=1e-5)
    assert largest_difference(results[0][2], results[1][2]) < 1e-6
    assert max(gradient.abs().max().item() for gradient in results[0][2].values()) > 1e-3


def improved(toy, batches, flags: str = "") -> dict[str, float]:
    """The metrics of one update of the toy model, which moves nothing; without KL unless asked for."""
    return optimizer_steps(toy.load(), None, torch.optim.SGD([torch.zeros(1)], lr=0.0), batches, 0.0,
                           settings(f"--kl-coef 0 {flags}"))


def test_a_threshold_drops_whole_rollouts(toy, groups):
    (batch,) = pack(groups, ADVANTAGES, 16384, CPU)
    with torch.no_grad():
        batch.ref_logps = answer_logps(make_model(toy.tokenizer.vocab_size, seed=1), batch, 0.7)[0]
    k3 = improved(toy, [batch], "--kl-coef 0.1")["kl"]
    kept = [improved(toy, [batch], f"--kl-coef 0.1 --kl-threshold {limit}")["kept"] for limit in (k3 / 1e3, k3, 1e3)]
    assert kept[0] == 0.0 < kept[1] < kept[2] == pytest.approx(1.0)


@pytest.mark.parametrize("flags", ["", "--preset gspo"])
def test_truncated_answers_leave_the_loss_if_asked(toy, groups, flags):
    """All answers of the group but those that ended by themselves; they still count in the denominator."""
    for row, column in ((0, 1), (2, 0)):
        groups[row][column].completion.finish_reason = "stop"
    batches = pack(groups, ADVANTAGES, 300, CPU)
    plain, masked = improved(toy, batches, flags), improved(toy, batches, f"{flags} --mask-truncated")
    assert plain["kept"] == pytest.approx(1) and masked["kept"] == pytest.approx(2 / 9)
    assert plain["policy_loss"] == pytest.approx(-ADVANTAGES.mean().item(), abs=1e-5)
    assert masked["policy_loss"] == pytest.approx(-(ADVANTAGES[0, 1] + ADVANTAGES[2, 0]).item() / 9, abs=1e-5)
    assert plain["entropy"] == masked["entropy"] and plain["grad_norm"] != pytest.approx(masked["grad_norm"], rel=0.01)


def test_ratios_are_to_the_trainer_or_to_the_sampler(toy, groups):
    """A sampler that was wrong by a factor of 1.1 (less likely) or 4 (more): what each way makes of it."""
    wrong = torch.tensor([math.log(1.1), -math.log(4)])
    for group in groups:
        for episode in group:
            episode.completion.logprobs[:] = [x - wrong[token % 2].item() for x, token in
                                              zip(episode.completion.logprobs, episode.completion.ids)]
    batches = pack(groups, ADVANTAGES, 300, CPU)
    weights = torch.cat([wrong.exp()[batch.answers[batch.trained] % 2] for batch in batches])  # (tokens,)
    assert set(weights.tolist()) == {wrong.exp()[0].item(), 0.25}
    share = torch.cat([(batch.trained / batch.trained.sum(1, keepdim=True))[batch.trained] / 9 for batch in batches])
    advantages = torch.cat([batch.advantages[:, None].expand_as(batch.trained)[batch.trained] for batch in batches])

    found = improved(toy, batches, "--tis-cap 1.05")
    capped = weights.clamp(max=1.05)
    assert found["mismatch"] == pytest.approx(math.log(4), abs=1e-4) and found["log_ratio"] == 0
    assert found["mismatch_mean"] == pytest.approx(weights.log().abs().mean().item(), abs=1e-5)
    assert found["importance"] == pytest.approx((share * capped).sum().item(), abs=1e-5)
    assert found["policy_loss"] == pytest.approx(-(share * advantages * capped).sum().item(), abs=1e-5)

    found = improved(toy, batches, "--old-logps sampler --clip-low 0.5 --clip-high 0.5")
    surrogate = torch.minimum(advantages * weights, advantages * weights.clamp(0.5, 1.5))
    assert found["log_ratio"] == pytest.approx((share * weights.log().abs()).sum().item(), abs=1e-5)
    assert found["policy_loss"] == pytest.approx(-(share * surrogate).sum().item(), abs=1e-5)
    assert "importance" not in found


def test_padding_and_flops_are_those_counted_by_hand(toy, monkeypatch):
    prompt = [Episode(Prompt([5] * 4, "6", {}), Completion([1] * n, [-1.0] * n, "stop"), "", False, False, 0.0)
              for n in (3, 1)]
    batches = pack([prompt], torch.zeros(1, 2), 16384, CPU)
    model = toy.load()
    assert padding(model, batches) == 0  # attention by pieces
    with monkeypatch.context() as many:
        many.setattr(torch, "get_num_threads", lambda: 100)
        assert padding(model, batches) == pytest.approx(1 - (6 + 4) / (6 + 6))  # rows of a prompt and all but the last token
    c, parameters = model.config, sum(parameter.numel() for parameter in model.parameters())
    pairs = 4**2 / 2 + 3 * 4 + 3**2 / 2 + 1 * 4 + 1 / 2
    head = c.vocab_size * c.hidden_size  # tied: for the four tokens that are scored
    once = 2 * (parameters - head) * 8 + 2 * head * 4 + 4 * c.num_hidden_layers * c.num_attention_heads * c.head_dim * pairs
    assert step_flops(model, [prompt], False, settings()) == pytest.approx(3 * once)
    assert step_flops(model, [prompt], True, settings("--updates 2")) == pytest.approx(8 * once)
    assert step_flops(model, [prompt], True, settings("--updates 2 --old-logps sampler")) == pytest.approx(7 * once)


def episode(text: str, reward: float, tokens: int = 1, reason: str = "stop", well_formed=False) -> Episode:
    completion = Completion([1] * tokens, [-1.0] * tokens, reason)
    return Episode(Prompt([5], "6", {}), completion, text, reward >= 1, well_formed, reward)


def test_describe():
    groups = [
        [episode("\\boxed{6}", 1.25, 3, well_formed=True), episode("\\boxed{7}", 0.0, 5)],
        [episode("\\boxed{7}", 0.0, 7), episode("six", 0.0, 9, "length")],
        [episode("\\boxed{6}", 1.0, 1), episode("\\boxed{6}", 1.25, 2, well_formed=True)],
        [episode("", 1.0, 5), episode("", 1.0, 0)],
    ]
    assert describe(groups) == {"accuracy": 5 / 8, "between_0_and_1": 1 / 4, "root_of_alpha_1_minus_alpha": 1 / 8,
                                "reward": 5.5 / 8, "well_formed": 2 / 8, "length": 4.0,
                                "truncated": 1 / 8, "common_answer": 3 / 8, "dead_groups": 2 / 4}


# ---- whole runs


def test_two_steps_and_their_files(toy, guesser, tmp_path, capsys):
    out = tmp_path / "run"
    assert train(guesser, toy.rl, out, "--steps 2 --samples 16 --val", toy.rl, "--show-every 1") == 0
    before, *rows = metrics(out)
    assert (before["step"], set(before)) == (0, {"step", "val_accuracy"})
    assert [row["step"] for row in rows] == [1, 2] and set(rows[0]) | {"val_accuracy"} == set(rows[1])
    assert all(isinstance(value, (int, float)) for row in rows for value in row.values())  # null: not finite
    assert all(0 < row["accuracy"] < 1 and row["grad_norm"] > 0 and row["dead_groups"] < 1 for row in rows)
    start, end = checkpoint.load(guesser).state_dict(), checkpoint.load(out / "model").state_dict()
    assert not any(torch.equal(start[name], end[name]) for name in start)
    assert Tokenizer.load(out / "model").vocab_size == toy.tokenizer.vocab_size
    problems = {row["id"]: row["problem"] for row in read_jsonl(toy.rl)}
    for row in rows:
        path = out / "rollouts" / f"step_{row['step']:04d}.jsonl"
        lines = read_jsonl(path)
        assert [line["group"] for line in lines] == [group for group in range(3) for _ in range(16)]
        assert {"id", "answer", "text", "reward", "correct", "finish_reason", "logprobs"} <= set(lines[0])
        assert len({line["id"] for line in lines}) == 3
        assert all(line["problem"] == problems[line["id"]] for line in lines)
        assert row["accuracy"] == pytest.approx(evaluate.accuracy(evaluate.rescore(path)))  # the same format
        assert row["length"] == pytest.approx(sum(len(line["ids"]) for line in lines) / 48)
    printed = capsys.readouterr().out
    assert printed.count("--- reward") == 4 and printed.count("--- reward 1, right answer") == 2
    assert printed.count("How many") == 4


def test_behaviors_are_counted_where_problems_are_known(toy, guesser, tmp_path, monkeypatch):
    monkeypatch.setattr(monitor, "VERIFIED", 6)  # of 3 groups of 16
    seen = []
    monkeypatch.setattr(monitor, "verify", lambda problem, text: seen.append(text) or verify(problem, text))
    plain = tmp_path / "plain.jsonl"
    write_jsonl(plain, [{**line, "problem": "a text"} for line in read_jsonl(toy.rl)])
    for data, out in ((toy.rl, tmp_path / "a"), (plain, tmp_path / "b")):
        assert train(guesser, data, out, "--steps 1 --samples 16") == 0
    with_them, without = metrics(tmp_path / "a")[0], metrics(tmp_path / "b")[0]
    assert with_them.keys() - without.keys() == {"failed_attempts", "restatements", "subgoals", "right_in_every_step"}
    assert len(seen) == 6
    assert 0 <= with_them["right_in_every_step"] <= 1
    lines = read_jsonl(toy.rl)
    del lines[2]["problem"]["order"]
    write_jsonl(plain, lines)
    assert train(guesser, plain, tmp_path / "c", "--steps 1") == 2


def test_influence_is_logged_and_changes_nothing(toy, guesser, tmp_path, capsys, monkeypatch):
    lines = [line for line in read_jsonl(toy.rl) if len(line["answer"]) == 1]
    write_jsonl(tmp_path / "rl.jsonl", lines[:3])
    write_jsonl(tmp_path / "val.jsonl", lines[3:8])
    asked = []
    numbers = train_rl.coinfluence.training_numbers
    monkeypatch.setattr(train_rl.coinfluence, "training_numbers", lambda *args: asked.append(args) or numbers(*args))
    for name, words in (("a", "--influence-every 2 --val"), ("b", "--val")):
        assert train(guesser, tmp_path / "rl.jsonl", tmp_path / name, "--steps 3 --samples 30 --temperature 1.2", words,
                     tmp_path / "val.jsonl") == 0
    rows = metrics(tmp_path / "a")[1:]
    assert [set(row) & {"influence", "validation_gradient_norm"} != set() for row in rows] == [False, True, False]
    assert rows[1]["influence"] != 0 < rows[1]["validation_gradient_norm"]
    ((_, val, groups, temperature, _),) = asked
    assert [group[0].prompt.record["id"] for group in val] == [line["id"] for line in lines[3:6]] and temperature == 1.2
    assert {group[0].prompt.record["id"] for group in groups} == {line["id"] for line in lines[:3]}
    assert {len(group) for group in val} == {30} and len({str([e.text for e in group]) for group in val}) == 3
    a, b = (checkpoint.load(tmp_path / name / "model").state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    assert train(guesser, toy.rl, tmp_path / "c", "--influence-every 2") == 2
    assert "influence_every: needs two prompts of --val in a batch" in capsys.readouterr().err
    assert train(guesser, toy.rl, tmp_path / "c", "--influence-every 2 --val", toy.rl) == 2
    assert "are also in --data" in capsys.readouterr().err


def test_validation_is_the_greedy_accuracy_and_leaves_sampling_alone(toy, guesser, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    assert train(guesser, toy.rl, one, "--steps 3 --eval-every 2 --val", toy.rl) == 0
    assert train(guesser, toy.rl, other, "--steps 3") == 0
    assert [row["step"] for row in metrics(one) if "val_accuracy" in row] == [0, 2, 3]
    assert weights(one / "model") == weights(other / "model")
    for folder, row in ((guesser, metrics(one)[0]), (one / "model", metrics(one)[-1])):
        words = f"--model {folder} --data {toy.rl} --out {folder}.jsonl --max-new-tokens 8 --device cpu"
        assert run_main(evaluate.main, evaluate.Config, words.split()) == 0
        assert row["val_accuracy"] == evaluate.accuracy(evaluate.rescore(f"{folder}.jsonl")) < 1


def test_the_policy_learns(toy, guesser, tmp_path):
    """Where 6 is always the answer, a model that guesses among ten digits comes to say 6."""
    write_jsonl(tmp_path / "rl.jsonl", [{"prompt": line["prompt"], "answer": "6"} for line in read_jsonl(toy.rl)])
    assert train(guesser, tmp_path / "rl.jsonl", tmp_path, "--steps 15 --prompts 4 --samples 16",
                 "--learning-rate 0.03") == 0
    rewards = [row["reward"] for row in metrics(tmp_path)]
    assert sum(rewards[:3]) / 3 < 0.3 and min(rewards[-3:]) > 0.8


def test_reference_stays_frozen_and_sampler_and_trainer_agree(toy, tmp_path, monkeypatch):
    """With a temperature, refilled rows and small pieces; each step samples from the weights of that step."""
    references = []

    def spy(model, reference, *rest):
        references.append(reference.state_dict())
        assert not any(parameter.grad is not None for parameter in reference.parameters())
        return optimizer_steps(model, reference, *rest)

    monkeypatch.setattr(train_rl, "optimizer_steps", spy)
    assert train(toy.model, toy.rl, tmp_path, "--steps 3 --temperature 0.7 --rows 5 --micro-tokens 400",
                 "--entropy-coef 0.1") == 0
    rows, start = metrics(tmp_path), toy.load().state_dict()
    assert rows[0]["kl"] == 0 and all(row["kl"] > 1e-4 for row in rows[1:])
    assert all(0 < row["mismatch_mean"] < row["mismatch"] < 2e-5 and row["log_ratio"] == 0 for row in rows)
    assert len(references) == 3 and all(largest_difference(start, reference) == 0 for reference in references)
    assert largest_difference(start, checkpoint.load(tmp_path / "model").state_dict()) > 0.01


def test_flags_reach_their_places(toy, guesser, tmp_path, monkeypatch):
    seen = {}

    def spy(module, name):
        function = getattr(module, name)

        def call(*words, **options):
            seen[name] = words, options
            return function(*words, **options)

        monkeypatch.setattr(module, name, call)

    for name in ("rollout", "adamw", "update"):
        spy(train_rl, name)
    spy(policy, "grpo_loss")
    monkeypatch.setattr(cache, "compiled_form", lambda function, _: function)  # in no need of a compiler
    flags = """--steps 1 --compile on --samples 5 --temperature 0.9 --format-scale 0.25 --rows 7 --clip-low 0.3
               --clip-high 0.4 --kl-coef 0.05 --kl-threshold 0.6 --entropy-coef 0.07 --weight-decay 0.08
               --clip 0.9"""
    assert train(guesser, toy.rl, tmp_path, flags) == 0
    words, options = seen["rollout"]
    assert len(words[2]) == 3 and words[3] == 5 and len(set(options.pop("seeds"))) == 3 and options.pop("ranks") is ALONE
    assert options == {"max_new_tokens": 8, "temperature": 0.9, "format_scale": 0.25, "rows": 7, "compiled": True}
    options = seen["grpo_loss"][1]
    assert options.pop("entropy") is not None
    assert options == {"surrogate": "ppo", "clip": (0.3, 0.4), "kl_coef": 0.05, "kl_threshold": 0.6, "entropy_coef": 0.07,
                       "kept": None, "importance": None, "aggregate": "sequence", "normalizer": 15}
    assert seen["adamw"][0][2] == 0.08 and seen["update"][0][2:] == (0.01, 0.9)


def test_validation_samples_as_training_does_but_greedily(toy, guesser, tmp_path, monkeypatch):
    rollout, seen = train_rl.rollout, []
    monkeypatch.setattr(train_rl, "rollout", lambda *words, **options: seen.append((words, options)) or rollout(*words, **options))
    monkeypatch.setattr(cache, "compiled_form", lambda function, _: function)  # in no need of a compiler
    assert train(guesser, toy.rl, tmp_path, "--steps 1 --compile on --samples 5 --rows 7 --val", toy.rl) == 0
    validations = [(words, options) for words, options in seen if options["temperature"] == 0]
    assert len(seen) == 3 and len(validations) == 2  # before the step and after it
    for words, options in validations:
        assert len(words[2]) == len(read_jsonl(toy.rl)) and words[3] == 1
        assert options == {"max_new_tokens": 8, "temperature": 0.0, "rows": 7, "compiled": True, "ranks": ALONE}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_reaches_its_places(toy, guesser, tmp_path, monkeypatch, name):
    """Advantages, the loss, the normaliser of the whole step, and run.json, with what was given by name."""
    recipe, losses, advantages = PRESETS[name], [], []

    def spy(function):
        return lambda *words, **given: losses.append(given) or function(*words, **given)

    for way in ("grpo_loss", "token_loss"):
        monkeypatch.setattr(policy, way, spy(getattr(policy, way)))
    monkeypatch.setattr(grpo, "group_advantages", lambda *words: advantages.append(words) or group_advantages(*words))
    steps = []
    monkeypatch.setattr(train_rl, "whole_step", lambda *words: steps.append(whole_step(*words)) or steps[-1])
    given = "--kl-coef 0.25" if recipe.clip_low is None else "--kl-coef 0.25 --clip-high 0.7"
    assert train(guesser, toy.rl, tmp_path, "--steps 1 --preset", name, given) == 0
    assert advantages[0][1:] == (recipe.ddof, recipe.eps, recipe.scale)
    high = None if recipe.clip_low is None else 0.7
    assert {(given["surrogate"], given["clip"], given["kl_coef"], given["entropy_coef"]) for given in losses} == {
        (recipe.surrogate, (recipe.clip_low, high), 0.25, recipe.entropy_coef)}
    tokens = sum(len(line["ids"]) for line in read_jsonl(tmp_path / "rollouts" / "step_0001.jsonl"))
    normalizer = {"sequence": 12, "token": tokens, "length": 12 * 8}[recipe.aggregate]
    assert (steps[0].normalizer, steps[0].tokens, steps[0].recipe.aggregate) == (normalizer, tokens, recipe.aggregate)
    record = json.loads((tmp_path / "run.json").read_text())
    saved = record["config"]
    assert record["recipe"] == asdict(replace(recipe, kl_coef=0.25, clip_high=high))
    assert saved["preset"] == name and [saved[field] for field in ("clip_low", "clip_high", "kl_coef", "entropy_coef")] == [
        recipe.clip_low, high, 0.25, recipe.entropy_coef]


def test_means_are_means_under_a_constant_length(toy, groups):
    """Weights under "length" do not add up to 1; what is logged is the mean over tokens, as under "token"."""
    groups[1][0].completion.finish_reason = groups[2][2].completion.finish_reason = "stop"
    batches = pack(groups, ADVANTAGES, 300, CPU)
    with torch.no_grad():
        for batch in batches:
            batch.old_logps, batch.ref_logps = batch.sampled_logps + 0.3, answer_logps(toy.load(), batch, 1.0)[0]
    one, other = (improved(toy, batches, f"--preset {name} --clip-high 0.1 --mask-truncated --tis-cap 2")
                  for name in ("dr_grpo", "dapo"))
    for name in ("clip_fraction", "log_ratio", "kept", "kl", "entropy", "importance"):
        assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7)
    assert one["entropy"] > 1 and one["kl"] > 0.01 and 0 < one["kept"] < 1
    assert one["importance"] == pytest.approx(math.exp(0.3), rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_reference_has_no_wider_copy_of_its_weights(toy, guesser, tmp_path, monkeypatch, dtype):
    def look(model, reference, *rest):
        assert {parameter.dtype for parameter in reference.parameters()} == {dtype}
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        return original(model, reference, *rest)

    original = train_rl.optimizer_steps
    monkeypatch.setattr(train_rl, "optimizer_steps", look)
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert train(guesser, toy.rl, tmp_path, f"--steps 1 --dtype {name}") == 0
    assert metrics(tmp_path)[0]["kl"] == pytest.approx(0.0, abs=1e-6)  # rounded once or at each use, it is the same model


def test_kl_threshold_alone_needs_the_reference_and_no_kl_needs_none(toy, guesser, tmp_path):
    assert train(guesser, toy.rl, tmp_path / "a", "--steps 1 --kl-coef 0 --kl-threshold 0.1") == 0
    assert train(guesser, toy.rl, tmp_path / "b", "--steps 1 --kl-coef 0") == 0
    assert metrics(tmp_path / "a")[0]["kl"] == 0 and "kl" not in metrics(tmp_path / "b")[0]


# ---- stopping and going on


def long(toy, guesser, out, *flags) -> int:
    return train(guesser, toy.rl, out, "--steps 4 --save-every 2 --schedule cosine --warmup 1 --kl-coef 0.1",
                 "--eval-every 3 --val", toy.rl, *flags)


def test_refilled_batches_are_trained_on_live_groups_and_resumed_exactly(toy, guesser, tmp_path, monkeypatch):
    """Every fifth answer or so is right, so that most groups of four are dead."""
    packed = []
    monkeypatch.setattr(train_rl, "pack", lambda groups, *rest: packed.append(groups) or policy.pack(groups, *rest))
    flags = "--steps 4 --save-every 2 --refill 3 --learning-rate 0"
    assert train(guesser, toy.rl, tmp_path / "whole", flags) == 0
    rows = metrics(tmp_path / "whole")
    assert all(len(groups) == 3 for groups in packed) and max(row["groups"] for row in rows) > 3
    for row, groups, path in zip(rows, packed, sorted((tmp_path / "whole" / "rollouts").iterdir())):
        sampled: dict[int, list[dict]] = {}
        for line in read_jsonl(path):
            sampled.setdefault(line["group"], []).append(line)
        live = [number for number, group in sampled.items() if len({line["reward"] for line in group}) > 1]
        assert len(sampled) == row["groups"] and row["dead_groups"] == pytest.approx(1 - len(live) / len(sampled))
        assert sum(len({episode.reward for episode in group}) > 1 for group in groups) == min(3, len(live))
        taught = sum(len(line["ids"]) for number in live[:3] for line in sampled[number])
        total = sum(len(line["ids"]) for group in sampled.values() for line in group)
        assert row["wasted"] == pytest.approx(1 - taught / total)
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert train(guesser, toy.rl, tmp_path / "run", flags, "--resume") == 0
    assert same_run(tmp_path / "run", tmp_path / "whole")


def test_answers_cut_off_are_wasted_where_they_are_masked():
    def episode(tokens, reward, reason):
        return Episode(Prompt([1], "6", {}), Completion([1] * tokens, [0.0] * tokens, reason), "", bool(reward), True, reward)

    groups = [[episode(3, 1.0, "stop"), episode(5, 0.0, "length")], [episode(2, 0.0, "stop"), episode(6, 0.0, "length")]]
    assert (monitor.wasted(groups), monitor.wasted(groups, mask_truncated=True)) == (0.5, pytest.approx(13 / 16))


@pytest.fixture(scope="module")
def whole(toy, guesser, tmp_path_factory):
    """A run of four steps, never cut: two passes over the prompts."""
    out = tmp_path_factory.mktemp("whole")
    assert long(toy, guesser, out) == 0
    return out


def rollouts(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "rollouts").iterdir()}


def same_run(one, other) -> bool:
    return (weights(one / "model") == weights(other / "model") and rollouts(one) == rollouts(other)
            and without_times(metrics(one)) == without_times(metrics(other)))


def test_learning_rates_and_prompts_of_the_steps(toy, whole):
    _, *rows = metrics(whole)
    expected = [learning_rate(step, 4, 0.01, 1, "cosine") for step in range(4)]
    assert [row["learning_rate"] for row in rows] == expected
    files = [whole / "rollouts" / f"step_000{step}.jsonl" for step in (1, 2, 3, 4)]
    asked = [{line["id"] for line in read_jsonl(path)} for path in files]
    assert all(len(ids) == 3 for ids in asked)
    assert not asked[0] & asked[1] and not asked[2] & asked[3] and asked[:2] != asked[2:]


def test_resumed_run_is_the_whole_run_bit_for_bit(toy, guesser, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    for step in (3, 4):
        (out / "rollouts" / f"step_000{step}.jsonl").unlink()
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:4]) + lines[4][:20])  # killed while writing step 4
    assert long(toy, guesser, out, "--resume") == 0
    assert same_run(out, whole) and [row["step"] for row in metrics(out)] == [0, 1, 2, 3, 4]
    assert json.loads((out / "run.json").read_text())["resume_step"] == 3


def test_interrupted_run_leaves_a_good_checkpoint(toy, guesser, whole, tmp_path, monkeypatch, capsys):
    def interrupted(*words):
        if metrics(tmp_path)[-1]["step"] == 3:
            raise KeyboardInterrupt
        return optimizer_steps(*words)

    monkeypatch.setattr(train_rl, "optimizer_steps", interrupted)
    assert long(toy, guesser, tmp_path) == 130
    assert capsys.readouterr().err.startswith("interrupted") and not (tmp_path / "model").exists()
    latest = checkpoint.latest(tmp_path / "checkpoints")
    assert latest.name == "step_2" and checkpoint.load(latest) and Tokenizer.load(latest)
    monkeypatch.undo()
    assert long(toy, guesser, tmp_path, "--resume") == 0
    assert same_run(tmp_path, whole)


def test_a_checkpoint_of_sft_is_refused(toy, guesser, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    path = out / "checkpoints" / "step_2" / checkpoint.TRAINING
    path.write_text(json.dumps({name: value for name, value in json.loads(path.read_text()).items() if name != "drawn"}))
    assert long(toy, guesser, out, "--resume") == 2
    assert "step_2: not a checkpoint of train_rl.py" in capsys.readouterr().err


def test_a_folder_with_checkpoints_is_not_begun_again(toy, guesser, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert long(toy, guesser, out) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert same_run(out, whole)


def test_gradient_that_is_not_finite_stops_the_run(toy, guesser, whole, tmp_path, monkeypatch, capsys):
    def broken(*words):
        loss, found = share_of_loss(*words)
        return loss * (math.nan if metrics(tmp_path)[-1]["step"] == 2 else 1), found

    share_of_loss = train_rl.share_of_loss
    monkeypatch.setattr(train_rl, "share_of_loss", broken)
    assert long(toy, guesser, tmp_path) == 2
    path = tmp_path / "failed_step_0003.safetensors"
    assert capsys.readouterr().err == (f"error: step 3: the gradient norm is nan; to inspect it: "
                                       f"python train_rl.py --replay {path}\n")
    assert path.is_file()
    assert len(read_jsonl(tmp_path / "rollouts" / "step_0003.jsonl")) == 12  # the batch that did it is kept
    assert weights(tmp_path / "checkpoints" / "step_2") == weights(whole / "checkpoints" / "step_2")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("flags, message", [
    ("--max-prompt 60", "{rl}:1: a prompt of"),
    ("--data {sft}", "{sft}:1: field 'prompt'"),
    ("--val {sft}", "{sft}:1: field 'prompt'"),
    ("--data {folder}/no", "{folder}/no: No such file"),
    ("--model {folder}/no", "{folder}/no: no such folder"),
    ("--samples 1", "samples: must be at least 2"),
    ("--samples 0", "samples"),
    ("--temperature 0", "temperature: must be at least 0.001"),
    ("--temperature 1e-40", "temperature: must be at least 0.001"),
    ("--updates 0", "updates: must be at least 1"),
    ("--prompts 9", "prompts: 9 of a batch, but {rl} has only 8 rows"),
    ("--prompts 0", "prompts: must be at least 1"),
    ("--max-new-tokens 1000", "more than the 24 that max_prompt, or max_new_tokens and"),
    ("--max-new-tokens 1024", "max_new_tokens: 1024 leave no room for a prompt"),
    ("--kl-threshold -1", "kl_threshold: must be at least 0"),
    ("--kl-threshold 0", "kl_threshold: 0 would drop every rollout"),
    ("--clip-low 1.5", "clip_low: must be at most 1"),
    ("--preset ppo", "--preset"),
    ("--preset grpo_zero --clip-high 0.3", "clip_low, clip_high: the preset grpo_zero has no ratio to clip"),
    ("--preset grpo_zero --old-logps sampler", "old_logps: the preset grpo_zero has no ratios"),
    ("--old-logps sampler --tis-cap 2", "tis_cap: with old_logps sampler"),
    ("--tis-cap 0.5", "tis_cap: must be at least 1"),
    ("--seed 99999999999999999999", "seed: must be at most"),
    ("--device nosuch", "device 'nosuch'"),
    ("--micro-tokens 50", "micro_tokens: 50 cannot hold"),
    ("--top-p 0.9", "--top-p"),
])
def test_wrong_input_is_one_line(toy, guesser, tmp_path, capsys, flags, message):
    names = {"folder": toy.folder, "sft": toy.sft, "rl": toy.rl}
    assert train(guesser, toy.rl, tmp_path / "run", "--steps 1", flags.format(**names)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message.format(**names) in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "run" / "model").exists()


def test_a_loss_that_the_code_has_changed_is_noticed(toy, guesser, tmp_path, monkeypatch, capsys):
    assert train(guesser, toy.rl, tmp_path, "--steps 2 --save-every 1 --preset dapo") == 0
    shutil.rmtree(tmp_path / "model")
    monkeypatch.setitem(PRESETS, "dapo", replace(PRESETS["dapo"], aggregate="sequence"))
    assert train(guesser, toy.rl, tmp_path, "--steps 2 --save-every 1 --preset dapo --resume") == 2
    assert "or the loss in the code has changed since" in capsys.readouterr().err


def test_settings_reach_the_optimizer_the_console_and_the_advantages(toy, guesser, tmp_path, monkeypatch, capsys):
    made, seen = [], []
    adamw = train_rl.adamw
    monkeypatch.setattr(train_rl, "adamw", lambda *words: made.append(words[1:]) or adamw(*words))
    monkeypatch.setattr(grpo, "group_advantages", lambda rewards, *rest: seen.append(rewards) or group_advantages(rewards, *rest))
    monkeypatch.setattr("minibridge.answer.well_formed", lambda text: "\\boxed{7" in text)
    assert train(guesser, toy.rl, tmp_path, "--steps 3 --show-every 2 --format-scale 0.25 --weight-decay 0.08 --samples 16") == 0
    assert made == [((0.9, 0.999), 0.08)]
    assert capsys.readouterr().out.count("--- reward") == 4  # two rollouts of steps 1 and 3
    for step, rewards in enumerate(seen, 1):
        lines = read_jsonl(tmp_path / "rollouts" / f"step_000{step}.jsonl")
        assert rewards.flatten().tolist() == [line["reward"] for line in lines]
    assert any(0.25 in rewards for rewards in seen)


def test_answers_that_are_masked_are_wasted(toy, guesser, tmp_path):
    """All are cut off before their end of turn: whatever they earned, masked ones teach nothing."""
    length = len(toy.tokenizer.encode("\\boxed{5}"))
    for name, flags in (("a", ""), ("b", "--mask-truncated")):
        assert train(guesser, toy.rl, tmp_path / name, f"--steps 1 --samples 16 --max-new-tokens {length} {flags}") == 0
    plain, masked = (metrics(tmp_path / name)[0] for name in "ab")
    assert plain["truncated"] == masked["truncated"] == masked["wasted"] == 1 > plain["wasted"]
