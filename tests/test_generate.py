"""Sampling: every number is checked against the full forward, every cut against a naive one."""

import copy
import math

import pytest
import torch

import minibridge.generate as generate_module
from minibridge import cache
from minibridge.cache import KVCache
from minibridge.config import InputError
from minibridge.generate import generate, prefill_batch
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.sampling import inverse_transform, nucleus, sample

VOCAB = 23
CONFIG = ModelConfig("qwen2", vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                     num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=40)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [4], [12, 13, 14, 15], [16, 17]]  # ragged, and two alike


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", name="model")
def decoder() -> Decoder:
    model = Decoder(CONFIG)
    model.init_weights(seeded(), std=0.25)  # far from uniform, far from certain
    return model


def flat(results) -> list:
    return [completion for group in results for completion in group]


def naive_greedy(model: Decoder, prompt: list[int], tokens: int) -> list[int]:
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(model.logits(model(torch.tensor([ids])))[0, -1].argmax().item())
    return ids[len(prompt) :]


# What is sampled


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
@pytest.mark.parametrize("longest, stop_ids", [(9, (0, 1, 2)), (9, ()), (1, (0,)), (2, (0, 1)), (12, range(12))])
def test_a_step_begun_before_the_ends_are_known_changes_nothing(model, monkeypatch, rows, longest, stop_ids):
    """As on a GPU: rows that are over run once more, and what is drawn then is in no answer."""
    steps, step = [], KVCache.step

    def noted_step(cache, decoder, longest, draw, newest, *more):
        steps.append(len(newest))
        step(cache, decoder, longest, draw, newest, *more)

    monkeypatch.setattr(KVCache, "step", noted_step)
    expected = generate(model, PROMPTS, 3, longest, stop_ids=stop_ids, generator=seeded(), rows=rows)
    work, steps[:] = sum(steps), []
    monkeypatch.setattr(generate_module, "runs_ahead", lambda device: True)
    found = generate(model, PROMPTS, 3, longest, stop_ids=stop_ids, generator=seeded(), rows=rows)
    assert [(a.ids, a.finish_reason) for a in flat(found)] == [(b.ids, b.finish_reason) for b in flat(expected)]
    for a, b in zip(flat(found), flat(expected)):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert work < sum(steps) <= work + len(flat(found))


def test_prompts_whose_last_sample_is_long_find_room(model, monkeypatch):
    """Each prompt waits for the longest of its 16 answers, so that more live than would fill the rows; room is not made anew."""
    grown, doubled = [], cache.doubled
    monkeypatch.setattr(cache, "doubled", lambda prompts: grown.append(0) or doubled(prompts))
    prompts = [[n % VOCAB] * 3 for n in range(40)]
    found = generate(model, prompts, 16, 30, stop_ids=(0, 1, 2), generator=seeded(), rows=32)
    lengths = sorted(len(answer.ids) for answer in flat(found))
    assert sum(lengths) / len(lengths) < lengths[-1] / 2 and not grown


def test_stop_strings_are_asked_for_at_once(model, monkeypatch):
    monkeypatch.setattr(generate_module, "runs_ahead", lambda device: True)
    asked = dict(stop_strings=("b",), tokenizer=Letters(), generator=seeded(), rows=4)
    found = flat(generate(model, PROMPTS, 3, 9, **asked))
    assert any(completion.finish_reason == "stop" for completion in found)
    for completion in found:
        assert "b" not in Letters().decode(completion.ids[:-1])


@pytest.mark.parametrize("rows", [1, 4, 7, 64])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
def test_logprobs_are_those_of_the_full_forward(model, rows, temperature):
    results = generate(model, PROMPTS, 3, 9, temperature, stop_ids=(0, 1, 2), generator=seeded(), rows=rows)
    assert [len(group) for group in results] == [3] * len(PROMPTS)
    assert len({len(completion.ids) for completion in flat(results)}) > 1  # rows end and are refilled
    for prompt, group in zip(PROMPTS, results):
        for completion in group:
            ids = torch.tensor([prompt + completion.ids])
            with torch.no_grad():
                logits = model.logits(model(ids))[0, len(prompt) - 1 : -1] / (temperature or 1.0)  # (T, V)
            expected = logits.log_softmax(-1)[range(len(completion.ids)), completion.ids]
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-4, rtol=0)


def test_a_bfloat16_copy_is_sampled_in_bfloat16(model):
    rounded = copy.deepcopy(model).to(torch.bfloat16)
    results, gaps = generate(rounded, PROMPTS, 4, 6, generator=seeded(), rows=5), []
    for prompt, group in zip(PROMPTS, results):
        for completion in group:
            with torch.no_grad():
                hidden = rounded(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1]  # (T, C)
            expected = rounded.logits(hidden).log_softmax(-1)[range(6), completion.ids]
            gaps.append((torch.tensor(completion.logprobs) - expected).abs())
    assert torch.cat(gaps).max() < 0.12 and torch.cat(gaps).mean() < 0.015


@pytest.mark.parametrize("rows", [1, 2, 5, 64])
def test_greedy_does_not_depend_on_rows(model, rows):
    results = generate(model, PROMPTS, 2, 12, temperature=0, rows=rows)
    for prompt, group in zip(PROMPTS, results):
        expected = naive_greedy(model, prompt, 12)
        assert [completion.ids for completion in group] == [expected, expected]


def test_same_seed_same_completions_and_no_other_randomness(model):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first, second, other = (generate(model, PROMPTS, 4, 8, generator=seeded(s), rows=5) for s in (1, 1, 2))
    assert first == second != other
    assert torch.equal(before, torch.get_rng_state())
    assert len({tuple(completion.ids) for completion in first[1]}) > 1  # samples of one prompt differ


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_what_a_prompt_gets_depends_on_its_own_seed_alone(model, top_p):
    """Not on the other prompts, their order or the rows; so ranks that share the work draw what one process would."""
    def ids(chosen, rows):
        groups = generate(model, [PROMPTS[n] for n in chosen], 4, 12, top_p=top_p, stop_ids=(0, 1),
                          seeds=[100 + n for n in chosen], rows=rows)
        return {n: [completion.ids for completion in group] for n, group in zip(chosen, groups)}

    whole = ids(range(len(PROMPTS)), rows=64)
    assert len({len(answer) for group in whole.values() for answer in group}) > 1  # rows end at different times and move
    for chosen, rows in ((range(len(PROMPTS)), 3), ((2, 0), 5), ((1,), 1), ((1, 0, 2), 4)):
        found = ids(chosen, rows)
        assert found == {n: whole[n] for n in chosen}


def test_prompts_stay_as_they_were(model):
    prompts = copy.deepcopy(PROMPTS)
    generate(model, prompts, 2, 5, generator=seeded())
    assert prompts == PROMPTS


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (2.0, 1.0), (1.0, 0.6), (1.5, 0.8)])
def test_tokens_come_as_often_as_the_softmax_says(temperature, top_p):
    logits, draws = torch.tensor([2.0, -1.0, 0.5, 1.0, -torch.inf, 0.0, -2.0]), 200_000
    uniform = torch.rand(draws, dtype=torch.float64, generator=seeded())
    tokens, logprobs = sample(logits.expand(draws, -1), temperature, top_p, uniform)
    expected = naive_nucleus((logits / temperature).softmax(-1), top_p)
    expected = expected / expected.sum()
    counts = tokens.bincount(minlength=len(logits))
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    chi_square = ((counts - draws * expected)[kept] ** 2 / (draws * expected[kept])).sum()
    assert chi_square < 22.5  # 0.1 % of draws exceed it with 6 degrees of freedom
    torch.testing.assert_close(logprobs, expected.log()[tokens], atol=1e-5, rtol=0)


@pytest.mark.parametrize("uniform, token", [(0.0, 1), (1 - 2**-53, 3)])
def test_the_ends_of_the_unit_interval_are_tokens_that_can_be_drawn(uniform, token):
    uniform = torch.full((3,), uniform, dtype=torch.float64)
    logits = torch.tensor([[-torch.inf, 1.0, 0.0, 0.3, -torch.inf]])
    assert sample(logits, 1.0, 1.0, uniform[:1])[0].item() == token
    weights = torch.zeros(3, 1000)
    weights[:, [130, 131, 700]] = torch.tensor([[1e-30, 1.0, 2.0], [0.3, 3e-8, 1e-8], [5.0, 1e-9, 1e20]])
    assert inverse_transform(weights, uniform).tolist() == [130 if uniform[0] == 0 else 700] * 3


@pytest.mark.parametrize("vocabulary", [64, 100])
def test_nan_weights_give_some_token_and_a_nan(vocabulary):
    """Which `generate` reports; an index beyond the vocabulary would end in a crash."""
    tokens, logprobs = sample(torch.full((2, vocabulary), torch.nan), 1.0, 1.0, torch.tensor([0.1, 0.9]).double())
    assert (tokens < vocabulary).all() and logprobs.isnan().all()


def test_a_token_is_drawn_where_its_stretch_of_the_unit_interval_lies():
    """Over 300 tokens, of very different weights, in blocks of 64 and of 7: the naive search says which."""
    weights = (4 * torch.randn(5, 300, generator=seeded())).exp() * (torch.rand(5, 300, generator=seeded(1)) < 0.8)
    edges = weights.double().cumsum(-1)
    for number in range(200):
        uniform = torch.rand(5, dtype=torch.float64, generator=seeded(number))
        expected = (edges <= uniform[:, None] * edges[:, -1:]).sum(-1)
        for block in (64, 7):
            assert torch.equal(inverse_transform(weights, uniform, block), expected)


def test_generate_draws_the_samples_of_a_prompt_independently(model):
    """Over many samples the first two tokens are as frequent as the model says, whatever row they were in."""
    (group,) = generate(model, [[3, 1]], 3000, 2, temperature=1.3, generator=seeded(), rows=100)
    with torch.no_grad():
        first = (model.logits(model(torch.tensor([[3, 1]])))[0, -1] / 1.3).softmax(-1)  # (V,)
        ids = torch.tensor([[3, 1, token] for token in range(VOCAB)])
        second = (model.logits(model(ids))[:, -1] / 1.3).softmax(-1)  # (V, V): after each first token
    for place, expected in ((0, first), (1, first @ second)):
        counts = torch.tensor([completion.ids[place] for completion in group]).bincount(minlength=VOCAB)
        assert ((counts - 3000 * expected) ** 2 / (3000 * expected)).sum() < 48.3  # 0.1 %, 22 degrees


def naive_nucleus(weights: torch.Tensor, top_p: float) -> torch.Tensor:
    kept, total = torch.zeros_like(weights), 0.0
    for token in sorted(range(len(weights)), key=lambda token: -weights[token]):
        if total < top_p:
            kept[token] = weights[token]
            total += weights[token].item()
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_nucleus_is_the_fewest_tokens_that_hold_top_p(top_p):
    weights = torch.randn(20, 30, generator=seeded()).mul(2).softmax(-1)
    expected = torch.stack([naive_nucleus(row, top_p) for row in weights])
    assert torch.equal(nucleus(weights, top_p), expected)


def test_a_nucleus_that_holds_just_top_p_takes_no_more():
    assert nucleus(torch.tensor([[0.25, 0.5, 0.25]]), 0.5).tolist() == [[0, 0.5, 0]]
    assert nucleus(torch.full((1, 4), 0.25), 0.75).count_nonzero() == 3


def test_the_nucleus_of_a_large_vocabulary(top_p=0.9999):
    """Of 150,000 tokens, whose sum in fp32 is no more than a thousandth right in what its last ones hold."""
    weights = torch.randn(2, 150_000, generator=seeded()).mul(5).softmax(-1)
    ordered = weights.double().sort(-1, descending=True).values
    assert torch.equal((nucleus(weights, top_p) > 0).sum(-1), (ordered.cumsum(-1) - ordered < top_p).sum(-1))


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"temperature": 1e-39}, {"temperature": float("nan")},
                                   {"temperature": float("inf")}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_p": float("nan")}])
def test_a_temperature_or_nucleus_that_nothing_can_be_drawn_by(model, wrong):
    with pytest.raises(InputError, match=f"^{[*wrong][0]} must be"):
        generate(model, PROMPTS, 2, 3, **wrong)


def test_a_stop_id_that_no_token_has_stops_nothing(model):
    expected = generate(model, PROMPTS, 3, 9, generator=seeded())
    assert generate(model, PROMPTS, 3, 9, stop_ids=(-1, 10**6), generator=seeded()) == expected


@pytest.mark.parametrize("samples", [2, 7, 40])
def test_the_first_answers_do_not_depend_on_how_many_there_are(model, samples):
    one, many = (generate(model, PROMPTS, count, 9, stop_ids=(0, 1), seeds=range(len(PROMPTS))) for count in (1, samples))
    assert [group[0].ids for group in many] == [group[0].ids for group in one]
    more = generate(model, PROMPTS, samples + 3, 9, stop_ids=(0, 1), seeds=range(len(PROMPTS)))
    assert [[answer.ids for answer in group[:samples]] for group in more] == [[a.ids for a in group] for group in many]


@pytest.mark.parametrize("seeds", [[1], range(7)])
def test_each_prompt_needs_a_seed(model, seeds):
    with pytest.raises(InputError, match=f"^{len(seeds)} seeds for {len(PROMPTS)} prompts$"):
        generate(model, PROMPTS, 2, 3, seeds=seeds)


def test_what_draws_tokens_has_53_bits(model, monkeypatch):
    """A token rarer than an fp32 number's last digit could otherwise never be drawn."""
    seen, draw = [], generate_module.draw
    monkeypatch.setattr(generate_module, "draw", lambda *given: seen.append(given[7].clone()) or draw(*given))
    generate(model, PROMPTS, 3, 5, generator=seeded())
    numbers = seen[0][:, :-1]
    assert (numbers != numbers.float()).double().mean() > 0.9


# Where it ends


def test_completions_end_at_stop_ids_or_the_length(model):
    completions = flat(generate(model, PROMPTS, 8, 10, stop_ids=(0, 5), generator=seeded(), rows=6))
    assert {completion.finish_reason for completion in completions} == {"stop", "length"}
    for completion in completions:
        assert len(completion.ids) == len(completion.logprobs) <= 10
        assert not {0, 5} & set(completion.ids[:-1])
        assert (completion.ids[-1] in (0, 5)) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.ids) == 10


class Letters:
    """A tokenizer of byte strings: 'é' takes two tokens, and the others are one or more letters each."""

    pieces = [b"a", b"b", b"ab", b"ba", b"</", b"s>", b">", b"\xc3", b"\xa9", b"s", b"</s", b">a", b""]

    def decode(self, ids: list[int]) -> str:
        return b"".join(self.pieces[token % len(self.pieces)] for token in ids).decode(errors="replace")


@pytest.mark.parametrize("stop_strings", [("</s>",), ("bab",), ("é",), ("s>a", "bb"), ("</s></",)])
def test_completions_end_where_a_stop_string_first_appears(model, stop_strings):
    tokenizer = Letters()
    (group,) = generate(model, [[1, 2]], 120, 30, temperature=1.5, generator=seeded(), rows=40,
                        tokenizer=tokenizer, stop_strings=stop_strings)
    stopped = 0
    for completion in group:
        ends = range(1, len(completion.ids) + 1)
        *earlier, found = (
            any(string in tokenizer.decode(completion.ids[:end]) for string in stop_strings) for end in ends)
        assert not any(earlier)
        assert completion.finish_reason == ("stop" if found else "length")
        assert found or len(completion.ids) == 30
        stopped += found
    assert 0 < stopped < len(group)


# What it costs


@pytest.mark.parametrize("rows", [1, 4, 12, 64])
def test_prompts_are_prefilled_once_and_finished_rows_cost_nothing(model, monkeypatch, rows):
    prefills, steps, samples = [], [], 4
    put_prompts, step = KVCache.put_prompts, KVCache.step

    def noted_prompts(cache, first, filled):
        prefills.append(len(filled.layers[0][0]))
        assert filled.layers[0][0].shape[2] < max(map(len, PROMPTS))  # all but the last token, and no more padding
        put_prompts(cache, first, filled)

    def noted_step(cache, decoder, longest, draw, newest, lengths, *more):
        steps.append(len(newest))
        assert longest == lengths.max()  # attention reads no further than it must
        assert len(cache.grid) <= rows + max(1, rows // samples)  # prompts whose answers are all over are gone
        step(cache, decoder, longest, draw, newest, lengths, *more)

    monkeypatch.setattr(KVCache, "put_prompts", noted_prompts)
    monkeypatch.setattr(KVCache, "step", noted_step)
    completions = flat(generate(model, PROMPTS, samples, 9, stop_ids=(0, 1, 2, 3), generator=seeded(), rows=rows))
    assert sum(prefills) == len(PROMPTS) and max(prefills) <= max(1, rows // samples)
    assert max(steps) <= rows
    assert sum(steps) == sum(len(completion.ids) for completion in completions)
    ideal = sum(steps) / min(rows, len(completions))
    assert len(steps) <= ideal + 2 * 9  # rows are refilled as they end


@pytest.mark.parametrize("rows, samples, longest, batch", [
    (64, 8, 100, 8), (4, 8, 100, 1), (256, 1, 1000, 16), (256, 1, 16_385, 1)])
def test_as_many_prompts_are_prefilled_as_fill_the_rows_or_the_device(rows, samples, longest, batch):
    assert prefill_batch(rows, samples, longest) == batch


# Bad input


def test_no_prompts_no_completions(model):
    assert generate(model, [], 3, 5) == []


@pytest.mark.parametrize("arguments, words", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1], "Hello"]), "prompt 1 is text"),
    (dict(prompts=[[1], [2] * 36]), "prompt 1 of 36 tokens"),
    (dict(max_new_tokens=0), "max_new_tokens"),
    (dict(samples=0), "samples"),
    (dict(rows=0), "rows"),
    (dict(stop_strings=("x",)), "tokenizer"),
    (dict(stop_strings=("b", ""), tokenizer=Letters()), "none of them may be empty"),
])
def test_bad_arguments_are_named(model, arguments, words):
    with pytest.raises(InputError, match=words):
        generate(model, **dict(prompts=[[1]], max_new_tokens=5) | arguments)


@pytest.mark.parametrize("temperature", [0, 1])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_broken_weights_are_noticed_at_the_first_token(model, temperature, bad, monkeypatch):
    broken, drawn, draw = copy.deepcopy(model), [], generate_module.draw
    with torch.no_grad():
        broken.model.norm.weight[0] = bad
    monkeypatch.setattr(generate_module, "draw", lambda *given: drawn.append(draw(*given)))
    with pytest.raises(InputError, match="the model's logits are not finite: its weights are broken"):
        generate(broken, [[1, 2]], 2, 30, temperature=temperature)
    assert len(drawn) == 1


def test_a_prompt_may_fill_the_context_to_the_last_position(model):
    (completion,) = flat(generate(model, [[2] * 35], 1, 5, temperature=0))
    assert completion.ids == naive_greedy(model, [2] * 35, 5)
