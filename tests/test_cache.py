"""Keys and values kept between forward passes: decoding and shared prompts against the full forward."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from minibridge.cache import KVCache, PromptCache, shared_attention
from minibridge.packed import Packed
from minibridge.model_config import ModelConfig
from test_model import FAMILIES, SHAPE, config_of_each_family, random_decoder, random_ids  # noqa: F401 (a fixture)

PROMPTS = [5, 9, 3]  # tokens
OWNERS = [2, 0, 2, 1, 0, 2]  # the prompt that each row answers: in no order, and not equally often


def cache_of(config, **sizes) -> KVCache:
    """A cache full of what earlier samples left behind."""
    cache = KVCache(config, **dict(prompts=3, prompt_slots=9, rows=6, slots=7) | sizes)
    cache.prompts.fill_(9.0)
    cache.answers.fill_(9.0)
    return cache


def prefill(model, cache: KVCache, ids: torch.Tensor, lengths: list[int], first: int = 0) -> torch.Tensor:
    """Hidden states (N, P, C) of the prompts: the first `lengths` tokens of each row of ids."""
    padded = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    for n, length in enumerate(lengths):
        padded[n, :length] = ids[n, :length]
    filled = PromptCache()
    hidden = model(padded, cache=filled)
    cache.put_prompts(first, filled)
    return hidden


def step(model, cache: KVCache, texts: torch.Tensor, owners: list[int], lengths: list[int], said: int) -> torch.Tensor:
    """Hidden states (B, C) of token `said` of each row's answer; row b of texts is its prompt and its answer."""
    newest = torch.tensor([text[lengths[owner] + said] for text, owner in zip(texts.tolist(), owners)])  # (B,)
    return cache.step(model, said, hidden_states, newest, torch.full_like(newest, said))


def hidden_states(model, hidden: torch.Tensor, *_) -> torch.Tensor:
    """In place of `generate.draw`."""
    return hidden


def texts_of(owners: list[int], lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts (N, 9), and rows (B, 16) that begin with their prompt and go on each in its own way."""
    prompts, texts = random_ids(len(lengths), 9), random_ids(len(owners), 16).flip(1)
    for row, owner in enumerate(owners):
        texts[row, :lengths[owner]] = prompts[owner, :lengths[owner]]
    return prompts, texts


@torch.no_grad()
def test_decoding_on_shared_prompts_equals_the_full_forward(config):
    model, cache = random_decoder(config), cache_of(config)
    prompts, texts = texts_of(OWNERS, PROMPTS)
    full = model(texts)  # (B, T, C)
    hidden = prefill(model, cache, prompts, PROMPTS)
    for row, owner in enumerate(OWNERS):
        torch.testing.assert_close(hidden[owner, :PROMPTS[owner]], full[row, :PROMPTS[owner]], atol=1e-5, rtol=1e-5)
    cache.arrange(OWNERS, PROMPTS)
    for said in range(7):
        hidden = step(model, cache, texts, OWNERS, PROMPTS, said)
        expected = torch.stack([full[row, PROMPTS[owner] + said] for row, owner in enumerate(OWNERS)])
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_rows_and_prompts_that_move_go_on_as_before(config):
    model, cache = random_decoder(config), cache_of(config)
    prompts, texts = texts_of(OWNERS, PROMPTS)
    full = model(texts)
    prefill(model, cache, prompts, PROMPTS)
    cache.arrange(OWNERS, PROMPTS)
    step(model, cache, texts, OWNERS, PROMPTS, 0)
    # Prompt 0 is over, and its rows 1 and 4: prompt 2 and row 5 take their places; of the rest row 4 is cut off.
    cache.move_rows([5], [1])
    cache.move_prompts([2], [0])
    rows, owners, lengths = [0, 5, 2, 3], [0, 0, 0, 1], [3, 9]
    cache.arrange(owners, lengths)
    for said in (1, 2):
        hidden = step(model, cache, texts[rows], owners, lengths, said)
        expected = torch.stack([full[row, lengths[owner] + said] for row, owner in zip(rows, owners)])
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_there_is_always_room_for_one_more_prompt():
    config = ModelConfig(**SHAPE, **FAMILIES["qwen2"])
    model, cache = random_decoder(config), cache_of(config, prompts=1)
    prompts, texts = texts_of(OWNERS, PROMPTS)
    prefill(model, cache, prompts[[1]], [9], first=0)  # in the way of nobody
    places = cache.prompts.shape[2]
    prefill(model, cache, prompts, PROMPTS, first=places - 1)
    owners, lengths = [places - 1 + owner for owner in OWNERS], [9] * (places - 1) + PROMPTS
    cache.arrange(owners, lengths)
    expected = torch.stack([model(texts)[row, PROMPTS[owner]] for row, owner in enumerate(OWNERS)])
    torch.testing.assert_close(step(model, cache, texts, owners, lengths, 0), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("loud", ["prompt", "answer", "itself"])
def test_shared_attention_is_finite_whichever_part_is_loud(loud):
    """Scores of thousands in one part, of which exp() overflows, and nothing in the others: that part's value comes out."""
    q = torch.full((2, 1, 1, 4), 50.0)
    keys = {part: torch.full((4,), 50.0 if part == loud else 0.0) for part in ("prompt", "answer", "itself")}
    values = {"prompt": 1.0, "answer": 2.0, "itself": 3.0}
    prompts, answers = (torch.stack((keys[part].expand(2, 1, 3, 4), torch.full((2, 1, 3, 4), values[part])))
                        for part in ("prompt", "answer"))
    out = shared_attention(q, keys["itself"].expand(2, 1, 4), torch.full((2, 1, 4), 3.0), prompts, answers,
                           torch.tensor([[0, 0], [1, 1]]), torch.tensor([0, 2]), torch.zeros(2, 3), torch.zeros(2, 3))
    torch.testing.assert_close(out, torch.full((2, 1, 1, 4), values[loud]))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_shared_attention_equals_attention_on_copies(dtype, close, compiled):
    """As matrix products, and as a compiled step has it."""
    generator = torch.Generator().manual_seed(0)
    N, B, K, G, P, S, D = 3, 6, 2, 3, 9, 4, 8
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((B, K, G, D), (B, K, D), (B, K, D)))
    prompts, answers = (torch.randn(2, n, K, s, D, generator=generator).to(dtype) for n, s in ((N, P), (B, S)))
    prompt_bias = torch.zeros(N, P).masked_fill(torch.arange(P) >= torch.tensor([4, 9, 1])[:, None], -torch.inf)
    answer_bias = torch.zeros(B, S).masked_fill(torch.arange(S) >= torch.tensor([3, 0, 4, 1, 2, 0])[:, None], -torch.inf)
    bias = torch.cat((prompt_bias[OWNERS], answer_bias, torch.zeros(B, 1)), 1)  # (B, P + S + 1)
    grid, place = torch.tensor([[1, 4, 0], [3, 0, 0], [0, 2, 5]]), torch.tensor([6, 0, 7, 3, 1, 8])
    config = ModelConfig(**SHAPE | {"num_attention_heads": K * G}, **FAMILIES["qwen2"])
    cache = KVCache(config, 2, 2, rows=B, slots=S, dtype=dtype, compiled=compiled)
    cache.answers[0, :, :B, :, :S] = answers
    flat = cache.flat(B, cache.slots[:S])
    assert (flat is not None) == compiled
    out = shared_attention(q, k, v, prompts, cache.answers[0], grid, place, prompt_bias, answer_bias, flat)
    keys, values = torch.cat((prompts[:, OWNERS], answers, torch.stack((k, v))[:, :, :, None]), 3).float()
    scores = q.float() @ keys.mT / D**0.5 + bias[:, None, None]
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), scores.softmax(-1) @ values, atol=close, rtol=close)


def test_a_step_writes_one_slot_of_each_row():
    config = ModelConfig(**SHAPE, **FAMILIES["qwen2"])
    cache = KVCache(config, prompts=2, prompt_slots=5, rows=5, slots=30)
    cache.arrange([1, 0, 0], [2, 5])
    cache.step(random_decoder(config), 3, hidden_states, torch.tensor([3, 4, 5]), torch.tensor([0, 3, 1]))
    written = cache.answers[:, :, [0, 1, 2], :, [0, 3, 1]]  # the slots that are new in their answers
    assert written.ne(0).all() and cache.answers.count_nonzero() == written.numel()
    assert cache.prompts.count_nonzero() == 0


def test_packed_texts_equal_rows_run_alone(config, path):
    """A text of 2 tokens, one of 3 that others of 2, 1 and 0 go on from, and one of 3 with a single other of 2 after it; in value
    and in gradient."""
    model, ids, lengths, after = random_decoder(config), random_ids(1, 13), [2, 3, 3, 2, 1, 0, 2], [None] * 3 + [1, 1, 1, 2]
    positions = torch.tensor([[0, 1, 0, 1, 2, 0, 1, 2, 3, 4, 3, 3, 4]])
    rows = [[0, 1], [2, 3, 4, 8, 9], [2, 3, 4, 10], [2, 3, 4], [5, 6, 7, 11, 12]]
    weights = torch.randn(5, 5, config.hidden_size, generator=torch.Generator().manual_seed(0))
    packed = Packed(lengths, after)
    found = model(ids, positions, packed)[0]  # (13, C)
    assert (packed.rows is None) == (path == "pieces")
    expected, gradients = [model(ids[:, row])[0] for row in rows], []
    for hidden in ([found[row] for row in rows], expected):
        model.zero_grad(set_to_none=True)
        sum((one * weight[:len(one)]).sum() for one, weight in zip(hidden, weights)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})  # not of the head
    for row, one in zip(rows, expected):
        torch.testing.assert_close(found[row], one, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradients[0][name], gradient, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths, after", [
    ([7, 70, 1, 90, 40], [None, None, 0, 1, 1]), ([70, 7, 50, 40, 41], [None, None, 0, 1, 0]),  # not side by side
    ([0, 80, 60, 68], [None, None, 0, 1])], ids=["side by side", "in turns", "nothing to go on from"])
def test_attention_by_pieces_equals_attention_by_rows(dtype, close, lengths, after, monkeypatch):
    """Few key heads, and scores whose exp() overflows, in value and in gradient."""
    generator, found = torch.Generator().manual_seed(0), []
    inputs = [torch.randn(1, 208, heads, 16, generator=generator).mul(9).to(dtype).requires_grad_() for heads in (4, 2, 2)]
    weights = torch.randn(1, 208, 4, 16, generator=generator).to(dtype)
    assert (inputs[0][0, :, 0] @ inputs[1][0, :, 0].T).max() / 4 > 200
    for threads in (1, 100):
        monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
        packed = Packed(lengths, after)
        out = packed.attend(0, *inputs)
        assert (packed.rows is None) == (threads == 1)
        found.append((out, *torch.autograd.grad(out, inputs, weights)))
    for by_pieces, by_rows in zip(*found):
        torch.testing.assert_close(by_pieces, by_rows, atol=close * by_rows.abs().max().item(), rtol=0)


def test_without_fused_kernels_there_are_rows():
    """So that forward-mode derivatives exist."""
    packed = Packed([2, 3], [None, 0])
    with sdpa_kernel(SDPBackend.MATH):
        packed.attend(0, *torch.randn(3, 1, 5, 2, 4))
    assert packed.rows is not None


@pytest.mark.parametrize("compiled, given", [(True, [4, 4, 4, 8, 64, 68]), (False, [1, 3, 4, 5, 64, 65])])
def test_a_compiled_step_works_on_rows_in_fours(compiled, given):
    cache, found = KVCache(ModelConfig(**SHAPE, **FAMILIES["qwen2"]), 1, 1, 65, 1, compiled=compiled), []
    for rows in (1, 3, 4, 5, 64, 65):
        cache.run_step(lambda *turn: found.append(turn), rows, 7)
    assert found == [(rows, 7) for rows in given]
    assert cache.answers.shape[2] > max(given)


def test_rows_that_nobody_owns_write_to_slot_0_and_others_never_past_their_last():
    config = ModelConfig(**SHAPE, **FAMILIES["qwen2"])
    model, cache = random_decoder(config), KVCache(config, prompts=2, prompt_slots=5, rows=5, slots=6)
    cache.arrange([1, 0, 0], [2, 5])
    cache.step(model, 3, hidden_states, torch.tensor([3, 4, 5, 6]), torch.tensor([0, 3, 1, 97]))
    written = cache.answers[:, :, [0, 1, 2, 3], :, [0, 3, 1, 0]]
    assert written.ne(0).all() and cache.answers.count_nonzero() == written.numel()
    with pytest.raises(IndexError):
        cache.step(model, 6, hidden_states, torch.tensor([3, 4, 5]), torch.tensor([0, 3, 97]))
