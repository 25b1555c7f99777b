"""Rollouts: what is trained, how it is grouped, what it earns, and the distribution it comes from."""

import json
import math

import pytest
import torch

from conftest import scripted_model
from minibridge import checkpoint
from minibridge.config import InputError, read_jsonl, write_jsonl
from minibridge.data import Prompt, load_prompts
from minibridge.generate import Completion
from minibridge.rollout import Episode, lines, read_episodes, refilled, rollout, score

RIGHT = "\nb = 6.\n</think>\n<answer>\nThe answer is \\boxed{6}.\n</answer>"


def prompt(*ids: int, answer: str = "6") -> Prompt:
    record = {"prompt": [], "answer": answer, "task": "igsm", "num_ops": 3, "id": "ab"}
    return Prompt(list(ids), answer, record)


def flat(groups: list[list[Episode]]) -> list[Episode]:
    return [episode for group in groups for episode in group]


def ids_of(groups: list[list[Episode]]) -> list[list[list[int]]]:
    return [[episode.completion.ids for episode in group] for group in groups]


@pytest.fixture
def uniform(toy):
    return scripted_model(toy.tokenizer.vocab_size)


@pytest.fixture
def three_tokens(toy):
    """Writes "a", the end of turn or the end of text, a third each; the last is also the padding."""
    letter = toy.tokenizer.encode("a")[0]
    logits = dict.fromkeys((letter, *toy.tokenizer.stop_ids), 40.0)
    return scripted_model(toy.tokenizer.vocab_size, otherwise=logits)


def test_uniform_model(toy, uniform):
    """Every token has probability 1 / V: any cut of the distribution would show."""
    groups = rollout(uniform, toy.tokenizer, [prompt(5, 6), prompt(7)], 16, max_new_tokens=50,
                     generator=torch.Generator().manual_seed(0))
    assert [len(group) for group in groups] == [16, 16]
    chance = -math.log(toy.tokenizer.vocab_size)
    for episode in flat(groups):
        completion = episode.completion
        assert completion.logprobs == pytest.approx([chance] * len(completion.ids), abs=1e-5)
        assert completion.finish_reason == "stop" or len(completion.ids) == 50
        assert episode.text == toy.tokenizer.decode(completion.ids)
    drawn = {token for episode in flat(groups) for token in episode.completion.ids}
    assert len(drawn) > 0.9 * toy.tokenizer.vocab_size


def test_log_probabilities_are_those_at_the_temperature(toy):
    model = scripted_model(toy.tokenizer.vocab_size, otherwise={7: math.log(toy.tokenizer.vocab_size - 1)})
    for temperature, chance in ((1.0, 1 / 2), (0.5, 1 - 1 / toy.tokenizer.vocab_size)):
        groups = rollout(model, toy.tokenizer, [prompt(5)], 8, max_new_tokens=8, temperature=temperature,
                         generator=torch.Generator().manual_seed(0))
        found = [logprob for episode in flat(groups) for token, logprob in
                 zip(episode.completion.ids, episode.completion.logprobs) if token == 7]
        assert found and found == pytest.approx([math.log(chance)] * len(found), abs=1e-5)


def test_samples_differ_and_the_seed_decides(toy, uniform):
    one, same, other = (rollout(uniform, toy.tokenizer, [prompt(5)], 4, max_new_tokens=6,
                                generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert ids_of(one) == ids_of(same) != ids_of(other)
    assert len({tuple(ids) for ids in ids_of(one)[0]}) == 4


def test_temperature_zero_is_greedy(toy):
    model = scripted_model(toy.tokenizer.vocab_size, otherwise={7: 0.1})
    groups = rollout(model, toy.tokenizer, [prompt(5)], 2, max_new_tokens=4, temperature=0.0)
    assert ids_of(groups) == [[[7] * 4] * 2]


def test_completions_end_with_either_stop_token(toy, three_tokens):
    groups = rollout(three_tokens, toy.tokenizer, [prompt(5)], 32, max_new_tokens=50,
                     generator=torch.Generator().manual_seed(0))
    stops = set(toy.tokenizer.stop_ids)
    assert {episode.completion.ids[-1] for episode in flat(groups)} == stops
    for episode in flat(groups):
        assert episode.completion.finish_reason == "stop" and not stops & set(episode.completion.ids[:-1])
        assert episode.text == "a" * (len(episode.completion.ids) - 1)


def test_equal_prompts_are_separate_groups(toy, uniform):
    groups = rollout(uniform, toy.tokenizer, [prompt(5), prompt(6), prompt(5)], 2, max_new_tokens=5,
                     generator=torch.Generator().manual_seed(0))
    prompts = [[episode.prompt.ids for episode in group] for group in groups]
    assert prompts == [[[5]] * 2, [[6]] * 2, [[5]] * 2]
    first, _, third = ids_of(groups)
    assert first != third
    assert [line["group"] for line in lines(groups)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("text, correct, well_formed", [
    (RIGHT, True, True),
    (RIGHT.replace("6}", "7}"), False, True),
    (RIGHT.replace("6}", "06}"), False, True),  # the match is of strings
    ("\\boxed{6}", True, False),
    (RIGHT + "\\boxed{7}", True, False),  # the first box counts
    ("\\boxed{7}" + RIGHT, False, True),
    ("</answer>", False, False),
    ("", False, False),
])
def test_rewards(text, correct, well_formed):
    completion = Completion([1], [-1.0], "stop")
    plain, scaled = score(prompt(5), completion, text), score(prompt(5), completion, text, 0.25)
    for episode in (plain, scaled):
        assert (episode.correct, episode.well_formed) == (correct, well_formed)
    assert plain.reward == correct and scaled.reward == correct + 0.25 * well_formed
    assert plain.prompt == prompt(5) and plain.completion is completion and plain.text == text


def test_the_model_is_read_from_the_prompt_and_scored_against_its_own_answer(toy, guesser):
    prompts = load_prompts(toy.rl, toy.tokenizer, 512)
    groups = rollout(checkpoint.load(guesser), toy.tokenizer, prompts, 16, max_new_tokens=8, format_scale=0.5,
                     generator=torch.Generator().manual_seed(0))
    for group, line in zip(groups, read_jsonl(toy.rl), strict=True):
        for episode in group:
            assert episode.text[:7] == "\\boxed{" and episode.text[8:] == "}"
            assert episode.correct == (episode.text[7] == line["answer"]) == episode.reward
    assert 0 < sum(episode.correct for episode in flat(groups)) < 16 * len(prompts)


def test_format_scale_reaches_the_score(toy, uniform, monkeypatch):
    monkeypatch.setattr("minibridge.answer.well_formed", lambda text: True)
    (group,) = rollout(uniform, toy.tokenizer, [prompt(5)], 2, max_new_tokens=2, format_scale=0.25)
    assert [episode.reward for episode in group] == [0.25, 0.25]


def test_lines_can_be_saved_scored_and_trained_again():
    episode = score(prompt(5), Completion([7, 8], [-1.23456789, -2.0], "length"), RIGHT, 0.5)
    (line,) = lines([[episode]])
    assert json.loads(json.dumps(line)) == {
        "group": 0, "id": "ab", "task": "igsm", "num_ops": 3, "answer": "6", "text": RIGHT, "reward": 1.5,
        "correct": True, "well_formed": True, "finish_reason": "length", "ids": [7, 8],
        "logprobs": [-1.234568, -2.0]}


@pytest.fixture
def saved(toy, uniform, tmp_path):
    """Prompts, their groups of three, and the file of these."""
    prompts = load_prompts(toy.rl, toy.tokenizer, 512)
    groups = rollout(uniform, toy.tokenizer, [prompts[4], prompts[1]], 3, max_new_tokens=6,
                     generator=torch.Generator().manual_seed(0))
    write_jsonl(tmp_path / "step.jsonl", lines(groups))
    return prompts, groups, tmp_path / "step.jsonl"


def test_saved_episodes_are_read_back(saved):
    prompts, groups, path = saved
    found = read_episodes(path, prompts)
    assert ids_of(found) == ids_of(groups) and lines(found) == lines(groups)
    assert [[episode.prompt for episode in group] for group in found] == [[prompts[4]] * 3, [prompts[1]] * 3]
    for one, other in zip(flat(found), flat(groups)):
        assert one.completion.logprobs == pytest.approx(other.completion.logprobs, abs=1e-6)
        assert one.completion.finish_reason == other.completion.finish_reason


@pytest.mark.parametrize("number, change, message", [
    (1, {"ids": "x"}, ":1: field 'ids' must be a list"),
    (2, {"reward": "1"}, ":2: field 'reward' must be a number"),
    (1, {"group": None}, ":1: field 'group' must be a whole number"),
    (3, {"correct": 1}, ":3: field 'correct' must be true or false"),
    (1, {"ids": [1]}, ":1: 1 ids and 6 logprobs"),
    (1, {"ids": [], "logprobs": []}, ":1: 0 ids and 0 logprobs"),
    (1, {"ids": [-1], "logprobs": [-1.0]}, ":1: ids must be whole numbers"),
    (1, {"ids": [1.5], "logprobs": [-1.0]}, ":1: ids must be whole numbers"),
    (1, {"ids": [1], "logprobs": [None]}, ":1: reward and logprobs must be numbers"),
    (1, {"ids": [1], "logprobs": [10**30]}, ":1: reward and logprobs must be numbers"),
    (1, {"reward": 10**400}, ":1: reward and logprobs must be numbers"),
    (1, {"id": []}, ":1: field 'id' must be a text or a whole number"),
    (4, {"id": "nobody"}, ":4: no prompt has the id 'nobody'"),
    (5, {"group": 0}, ":5: another prompt than that of its group's first line"),
    (6, {"group": 7}, ": no groups of one size"),
])
def test_bad_lines_are_named(saved, number, change, message):
    prompts, _, path = saved
    rows = read_jsonl(path)
    assert all(len(row["ids"]) == 6 for row in rows)
    rows[number - 1] |= change
    write_jsonl(path, rows)
    with pytest.raises(InputError) as error:
        read_episodes(path, prompts)
    assert str(error.value).startswith(f"{path}{message}")


def test_whole_numbers_of_another_writer_are_floats(saved):
    prompts, _, path = saved
    rows = read_jsonl(path)
    rows[0]["logprobs"] = [-1, -2, 0, 0, -1, -1]
    write_jsonl(path, rows)
    logprobs = read_episodes(path, prompts)[0][0].completion.logprobs
    assert logprobs == [-1, -2, 0, 0, -1, -1] and {type(logprob) for logprob in logprobs} == {float}


def test_prompts_that_cannot_be_told_apart_are_refused(saved):
    prompts, _, path = saved
    for wrong in ([*prompts, prompts[0]], [Prompt([5], "6", {}), prompts[1]]):
        with pytest.raises(InputError, match="cannot be told apart"):
            read_episodes(path, wrong)


def test_lines_of_a_prompt_without_the_optional_fields():
    bare = Prompt([5], "6", {"prompt": [], "answer": "6"})
    (line,) = lines([[score(bare, Completion([7], [-1.0], "stop"), "")]])
    assert "id" not in line and "num_ops" not in line


def test_a_tolerance_in_the_record_reaches_the_score():
    """And the saved line, so that it can be scored again."""
    def episode(**record):
        return score(Prompt([5], "0.3333", record), Completion([7], [-0.5], "stop"), "\\boxed{0.33331}")

    assert episode(tolerance=1e-4).correct and episode(tolerance=1e-4).reward == 1
    assert episode(tolerance=1e-4).to_dict()["tolerance"] == 1e-4
    assert not episode().correct and episode().reward == 0 and "tolerance" not in episode().to_dict()


def group(*rewards) -> list[Episode]:
    return [Episode(Prompt([1], "1", {}), Completion([2]), "", False, False, reward) for reward in rewards]


@pytest.mark.parametrize("rounds, asked, order", [
    (0, [3], "BAC"), (1, [3, 2], "BEACD"), (2, [3, 2, 1], "BEFACD"), (9, [3, 2, 1], "BEFACD")])
def test_dead_groups_are_made_up_for_in_rounds(rounds, asked, order):
    """A, C and D are dead: the others come first, and nothing more is sampled once there are enough of them."""
    groups = {"A": group(1.0, 1.0), "B": group(1.0, 0.0), "C": group(0.0, 0.0), "D": group(0.1, 0.1), "E": group(0.0, 1.0),
              "F": group(0.0, 0.1), "G": group(1.0, 0.5)}
    names, counts = iter(groups), []

    def sample(count):
        counts.append(count)
        return [groups[next(names)] for _ in range(count)]

    found = refilled(sample, 3, rounds)
    assert counts == asked and [id(one) for one in found] == [id(groups[name]) for name in order]
