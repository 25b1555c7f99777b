"""Log-probabilities of rollouts: shared prompts against rows run alone, in value and gradient; what is packed where."""

import pytest
import torch

from conftest import make_model
from minibridge.data import Example, Prompt
from minibridge.generate import Completion
from minibridge.grpo import PRESETS
from minibridge.policy import answer_hidden, answer_logps, example_hidden, pack, share_of_loss, whole_step
from minibridge.rollout import Episode

pytestmark = pytest.mark.usefixtures("path")  # each test by pieces and by rows, as on a GPU
CPU = torch.device("cpu")
PROMPTS = (3, 11, 1, 6)  # tokens
ANSWERS = ((2, 9, 5), (4, 4, 1), (1, 1, 1), (12, 3, 7))
ADVANTAGES = torch.arange(12.0).view(4, 3)


@pytest.fixture
def model():
    return make_model(50).double()


@pytest.fixture
def groups() -> list[list[Episode]]:
    """Ids of all kinds, 0 (what padding holds) among them; each token's noted log-probability is its own."""
    generator, noted = torch.Generator().manual_seed(0), iter(range(1000))

    def ids(count):
        return torch.randint(0, 4, (count,), generator=generator).tolist()

    prompts = [Prompt(ids(count), "6", {}) for count in PROMPTS]
    return [[Episode(prompt, Completion(ids(count), [-float(next(noted)) for _ in range(count)]), "", False, False, 0.0)
             for count in counts] for prompt, counts in zip(prompts, ANSWERS)]


def alone(model, episode: Episode, temperature: float):
    """(T,) log-probabilities and entropies of one completion: prompt and answer in one row, all logits."""
    ids = torch.tensor([episode.prompt.ids + episode.completion.ids])
    hidden = model(ids)[0, len(episode.prompt.ids) - 1:-1]
    logps = (hidden @ model.lm_head_weight.T / temperature).log_softmax(-1)  # (T, V)
    return logps.gather(1, torch.tensor(episode.completion.ids)[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def found_by_advantage(batches) -> dict[float, tuple]:
    """The rows of all micro-batches by their advantage, which names the episode here."""
    return {advantage: (batch, row) for batch in batches for row, advantage in enumerate(batch.advantages.tolist())}


@pytest.mark.parametrize("max_tokens", [10**6, 60, 1])
def test_shared_prompts_equal_rows_run_alone(model, groups, max_tokens):
    """In value, and in the gradient of a loss that weighs every token differently."""
    weights = torch.rand(4, 3, 12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    loss = 0.0
    for number, group in enumerate(groups):
        for column, episode in enumerate(group):
            for kind, values in enumerate(alone(model, episode, 0.7)):
                loss = loss + (values * weights[number, column, :len(values), kind]).sum()
    loss.backward()
    naive = {name: parameter.grad for name, parameter in model.named_parameters()}

    model.zero_grad()
    seen = 0
    for batch in pack(groups, ADVANTAGES, max_tokens, CPU):
        kinds = answer_logps(model, batch, 0.7, with_entropy=True)
        for row, advantage in enumerate(batch.advantages.long().tolist()):
            episode, count = groups[advantage // 3][advantage % 3], int(batch.trained[row].sum())
            for values, expected in zip(kinds, alone(model, episode, 0.7)):
                torch.testing.assert_close(values[row, :count], expected, atol=1e-10, rtol=0)
                assert not values[row, count:].any()
            seen += 1
        width = batch.answers.shape[1]
        chosen = torch.stack([weights[a // 3, a % 3, :width] for a in batch.advantages.long().tolist()])  # (B, T, 2)
        sum((values * chosen[..., kind]).sum() for kind, values in enumerate(kinds)).backward()
    assert seen == 12
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, naive[name], atol=1e-9, rtol=1e-9)
        assert parameter.grad.abs().max() > 1e-3


def test_each_prompt_is_run_once_for_all_its_answers(model, groups, monkeypatch):
    run = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, *rest, **named: run.append(ids.shape) or forward(ids, *rest, **named))
    (batch,) = pack(groups, ADVANTAGES, 10**6, CPU)
    answer_hidden(model, batch)
    assert run == [(1, sum(PROMPTS) + sum(map(sum, ANSWERS)) - 12)]  # no padding, and no answer's last token


def test_pack_keeps_every_token_with_its_note_and_its_prompt(groups):
    batches = pack(groups, ADVANTAGES, 60, CPU)
    assert len(batches) > 2
    rows = found_by_advantage(batches)
    assert sorted(rows) == ADVANTAGES.flatten().tolist() and sum(len(batch.answers) for batch in batches) == 12
    for advantage, (batch, row) in rows.items():
        episode = groups[int(advantage) // 3][int(advantage) % 3]
        trained = batch.trained[row]
        assert batch.answers[row][trained].tolist() == episode.completion.ids
        assert batch.sampled_logps[row][trained].tolist() == episode.completion.logprobs
        assert not batch.sampled_logps[row][~trained].any()
        owner = batch.owner[row]
        assert batch.prompts[owner, :batch.prompt_lengths[owner]].tolist() == episode.prompt.ids


@pytest.mark.parametrize("max_tokens", [25, 40, 60, 100])
def test_micro_batches_keep_to_their_size_and_groups_together(groups, max_tokens):
    batches = pack(groups, ADVANTAGES, max_tokens, CPU)
    sizes = [batch.prompts.numel() + batch.answers.numel() for batch in batches]
    places = [len(batch.answers) * (batch.prompts.shape[1] + batch.answers.shape[1]) for batch in batches]
    assert all(size <= max_tokens and taken <= 2 * max_tokens or len(batch.answers) == 1
               for size, taken, batch in zip(sizes, places, batches))
    assert [batch.trained.sum(1).max().item() for batch in batches][0] == 12  # the longest first
    order = [int(advantage) // 3 for batch in batches for advantage in batch.advantages]
    assert order == sorted(order, key=order.index)  # a group's answers are neighbours
    for number, (one, other) in enumerate(zip(batches, batches[1:])):  # the next answer would not have fitted
        rows = len(one.answers) + 1
        width = max(one.answers.shape[1], int(other.trained[0].sum()))
        again = order[sum(len(batch.answers) for batch in batches[:number + 1])] in {
            int(advantage) // 3 for advantage in one.advantages}
        prompt = int(other.prompt_lengths[other.owner[0]])
        prompts = len(one.prompts) * one.prompts.shape[1] if again else (
            (len(one.prompts) + 1) * max(one.prompts.shape[1], prompt))
        assert prompts + rows * width > max_tokens or rows * (max(one.prompts.shape[1], prompt) + width) > 2 * max_tokens


def test_short_answers_to_a_long_prompt_are_parted():
    """Or attention would have the prompt's 30 tokens five times, in a micro-batch of 60."""
    group = [Episode(Prompt([1] * 30, "6", {}), Completion([2] * 6, [-1.0] * 6), "", False, False, 0.0) for _ in range(8)]
    assert [len(batch.answers) for batch in pack([group], torch.zeros(1, 8), 60, CPU)] == [3, 3, 2]  # 3 * 36 <= 120


def test_equal_prompts_of_two_groups_stay_two(groups):
    twice = [groups[1], groups[1]]
    (batch,) = pack(twice, ADVANTAGES[:2], 10**6, CPU)
    assert len(batch.prompts) == 2 and sorted(batch.owner.tolist()) == [0, 0, 0, 1, 1, 1]


def test_no_gradient_is_asked_for_where_none_flows(model, groups):
    (batch,) = pack(groups, ADVANTAGES, 10**6, CPU)
    with torch.no_grad():
        (logps,) = answer_logps(model, batch, 1.0)
    assert not logps.requires_grad and logps.shape == batch.trained.shape


@pytest.mark.parametrize("preset", ["dapo", "gspo"])  # by chunks, and by whole rollouts
def test_the_metrics_of_a_micro_batch_keep_no_graph_alive(model, groups, preset):
    (batch,) = pack(groups, ADVANTAGES, 10**6, CPU)
    loss, metrics = share_of_loss(model, batch, whole_step([batch], PRESETS[preset], 1.0, 20))
    assert loss.requires_grad and not any(value.requires_grad for value in metrics.values())


def test_checkpointing_changes_no_gradient(model, groups):
    found = []
    for model.checkpointing in (False, True):
        model.zero_grad()
        for batch in pack(groups, ADVANTAGES, 60, CPU):
            logps, entropy = answer_logps(model, batch, 0.7, with_entropy=True)
            (logps.sum() + entropy.square().sum()).backward()
        found.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-12, rtol=1e-12)


def test_checkpointing_runs_layers_again(model, groups, monkeypatch):
    runs = []
    block = model.model.layers[0]
    forward = block.forward
    monkeypatch.setattr(block, "forward", lambda *args: runs.append(1) or forward(*args))
    (batch,) = pack(groups, ADVANTAGES, 10**6, CPU)
    for model.checkpointing, expected in ((False, 1), (True, 2)):
        runs.clear()
        answer_logps(model, batch, 1.0)[0].sum().backward()
        assert len(runs) == expected


def test_examples_end_to_end_equal_rows_run_alone(model):
    """Trained in the midst, at the end, from the first token on, and not at all; ids of 0 among them."""
    examples = [Example([3, 0, 7, 7, 9], [0, 1, 0, 1, 1]), Example([5, 6], [1, 1]), Example([8, 0, 0], [1, 0, 0]),
                Example([1, 2, 3, 4, 5, 6, 7, 8], [0] * 7 + [1])]
    hidden, targets = example_hidden(model, examples)
    assert targets.tolist() == [0, 7, 9, 6, 8]
    alone = [model(torch.tensor([example.ids[:-1]]))[0][torch.tensor(example.mask[1:]).bool()] for example in examples]
    torch.testing.assert_close(hidden, torch.cat(alone), atol=1e-12, rtol=1e-12)
