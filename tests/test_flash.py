"""What a GPU's kernel for texts of different lengths is told: it stands here as a loop, and results are those of a CPU's path."""
import math
from types import SimpleNamespace

import pytest
import torch

from minibridge import flash, generate, packed
from test_cache import OWNERS, PROMPTS as LENGTHS, prefill, step, texts_of
from test_generate import PROMPTS, decoder, flat, seeded  # noqa: F401 (a fixture)
from test_model import config_of_each_family, random_decoder  # noqa: F401 (a fixture)


def varlen(q, k, v, queries, keys, most, causal=False, used=None):
    """`flash.varlen` as its description says, one text and one head at a time; what no text asks for is NaN."""
    out, sums = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan).T.contiguous()
    assert len(queries) == len(keys) and all(x is None or x.dtype == torch.int32 for x in (queries, keys, used))
    for text in range(len(queries) - 1):
        asking = slice(*queries[text : text + 2].tolist())
        start, count = keys[text].item(), (used[text] if used is not None else keys[text + 1] - keys[text]).item()
        assert asking.stop - asking.start <= most[0] and count <= most[1]
        for head in range(q.shape[1]) if asking.stop > asking.start else ():
            key_head = head // (q.shape[1] // k.shape[1])
            met, values = (x[start : start + count, key_head] for x in (k, v))
            scores = q[asking, head] @ met.T / q.shape[2] ** 0.5
            if causal:
                late = torch.ones_like(scores, dtype=torch.bool).triu(count - len(scores) + 1)
                scores = scores.masked_fill(late, -torch.inf)
            out[asking, head] = scores.softmax(-1) @ values
            sums[head, asking] = scores.logsumexp(-1).float() if count else torch.inf
    return out, sums


def varlen_backward(grad, q, k, v, out, sums, queries, keys, most, causal=False):
    """By the equations of arXiv 2307.08691, 2.3: with p from the scores and the sums given, whatever these are of."""
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for text in range(len(queries) - 1):
        asking, met = (slice(*x[text : text + 2].tolist()) for x in (queries, keys))
        for head in range(q.shape[1]):
            key_head = head // (q.shape[1] // k.shape[1])
            q_, k_, v_, g = q[asking, head], k[met, key_head], v[met, key_head], grad[asking, head]
            p = (q_ @ k_.T / q.shape[2] ** 0.5 - sums[head, asking, None]).exp()
            p = p.tril(len(k_) - len(q_)) if causal else p
            slope = p * (g @ v_.T - (g * out[asking, head]).sum(-1, keepdim=True)) / q.shape[2] ** 0.5
            for whole, here, at, part in zip(grads, (asking, met, met), (head, key_head, key_head),
                                             (slope @ k_, slope.T @ q_, p.T @ g)):
                whole[here, at] += part
    return grads


@pytest.fixture(autouse=True)
def a_loop_for_the_kernel(monkeypatch):
    monkeypatch.setattr(flash, "varlen", varlen)
    monkeypatch.setattr(flash, "varlen_backward", varlen_backward)


def flash_cache(config, *sizes: int) -> flash.FlashCache:
    return flash.FlashCache(config, *sizes, torch.float32, torch.device("cpu"), False)


@torch.no_grad()
def test_a_step_equals_the_full_forward(config):
    """Among what earlier samples left behind; then some rows and a prompt move, as in `generate`."""
    model, cache = random_decoder(config), flash_cache(config, 3, 9, 6, 7)
    cache.prompts.fill_(9.0)
    cache.answers.fill_(9.0)
    prompts, texts = texts_of(OWNERS, LENGTHS)
    full = model(texts)
    prefill(model, cache, prompts, LENGTHS)
    rows, owners, lengths = list(range(6)), OWNERS, LENGTHS
    for said in range(6):
        if said == 3:  # prompt 0 is over, and its rows 1 and 4
            cache.move_rows([5], [1])
            cache.move_prompts([2], [0])
            rows, owners, lengths = [0, 5, 2, 3], [0, 0, 0, 1], [3, 9]
        cache.arrange(owners, lengths)
        expected = torch.stack([full[row, lengths[owner] + said] for row, owner in zip(rows, owners)])
        torch.testing.assert_close(step(model, cache, texts[rows], owners, lengths, said), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_there_is_always_room_for_one_more_prompt(config):
    model, cache = random_decoder(config), flash_cache(config, 2, 9, 6, 7)
    cache.graphs[6] = "of the layout before"
    prompts, texts = texts_of(OWNERS, LENGTHS)
    prefill(model, cache, prompts, LENGTHS)
    cache.arrange(OWNERS, LENGTHS)
    expected = torch.stack([model(texts)[row, LENGTHS[owner]] for row, owner in enumerate(OWNERS)])
    torch.testing.assert_close(step(model, cache, texts, OWNERS, LENGTHS, 0), expected, atol=1e-5, rtol=1e-5)
    assert not cache.graphs


@pytest.mark.parametrize("rows", [1, 5, 64])
@pytest.mark.parametrize("recorded, ahead", [(False, False), (True, False), (True, True)])
def test_sampling_is_that_of_the_other_cache(model, monkeypatch, rows, recorded, ahead):
    """Also by steps that are recorded for certain sizes and played again, in which rows that are over run on."""
    sizes = []

    def record(cache, advance, size):
        sizes.append(size)
        return SimpleNamespace(replay=lambda: advance(size, 0))

    def samples():
        return flat(generate.generate(model, PROMPTS, 7, 12, stop_ids=(0, 1), generator=seeded(), rows=rows))

    expected = samples()
    monkeypatch.setattr(generate, "runs_ahead", lambda device: ahead)
    monkeypatch.setattr(flash, "FEWEST_ROWS", 2)
    monkeypatch.setattr(flash, "run_graph", lambda function, compiled, sizes, *inputs: function(*inputs))
    monkeypatch.setattr(flash.FlashCache, "_recorded", record)
    monkeypatch.setattr(generate, "decoding_cache", lambda *sizes_and_so_on: flash.FlashCache(*sizes_and_so_on[:-1], recorded))
    found = samples()
    assert [completion.ids for completion in found] == [completion.ids for completion in expected]
    for a, b in zip(found, expected):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert len(sizes) <= len({*sizes}) + 1  # anew when there are more prompts than places
    assert {*sizes} == ({1: {1}, 5: {5, 2}, 64: {42, 21}}[rows] if recorded else set())


def test_what_changes_comes_to_the_same_places():
    """A recorded step knows addresses, not names."""
    config = SimpleNamespace(num_hidden_layers=1, num_key_value_heads=1, num_attention_heads=2, head_dim=4)
    cache, seen = flash_cache(config, 3, 9, 6, 7), []
    for owners, lengths in ((OWNERS, LENGTHS), ([1, 0, 0], [4, 2])):
        cache.arrange(owners, lengths)
        layout = cache.order, cache.place, cache.row_prompts, cache.by_prompt, cache.prompt_lengths
        seen.append([tensor.data_ptr() for tensor in layout])
    assert seen[0] == seen[1]
    assert [tensor.tolist() for tensor in layout] == [
        [1, 2, 0, 3, 4, 5], [2, 0, 1, 3, 4, 5], [2, 4, 4, 1, 1, 1], [0, 4, 6, 6], [4, 2, 1]]


@pytest.mark.parametrize("lengths, after", [
    ([7, 70, 1, 90, 40], [None, None, 0, 1, 1]), ([70, 7, 50, 40, 41], [None, None, 0, 1, 0]),
    ([0, 80, 60, 68], [None, None, 0, 1])], ids=["side by side", "in turns", "nothing to go on from"])
def test_pieces_on_a_gpu_equal_pieces_on_a_cpu(lengths, after):
    inputs = [torch.randn(208, heads, 16, dtype=torch.float64, generator=seeded()).mul(3).requires_grad_() for heads in (4, 2, 2)]
    weights, line = torch.randn(208, 4, 16, dtype=torch.float64, generator=seeded(1)), packed.Packed(lengths, after)
    found = []
    for pieces in (packed._OnCPU, packed._OnGPU):
        out = packed._PieceAttention.apply(*inputs, pieces(line.lengths, line.shared, "cpu"), line.shared)
        found.append((out, *torch.autograd.grad(out, inputs, weights)))
    for on_cpu, on_gpu in zip(*found):
        torch.testing.assert_close(on_gpu, on_cpu, atol=3e-5, rtol=3e-5)  # the kernel's sums are fp32


def test_a_score_with_itself_is_summed_in_fp32():
    """Products of 1,089, in bf16 1,088, and -1,088, sixteen of each: their sum is 16, the score 2. The prompt's token has a
    score and a value of 0."""
    q = torch.tensor([33.0, 32.0] * 16 + [0.0] * 32).bfloat16().view(1, 1, 1, 64)
    k = torch.tensor([33.0, -34.0] * 16 + [0.0] * 32).bfloat16().view(1, 1, 1, 64)
    v, slots = torch.ones_like(k), torch.zeros(2, 1, 2, 1, 64, dtype=torch.bfloat16)
    one = [torch.tensor(numbers, dtype=torch.int32) for numbers in ([0], [0], [0, 1], [0, 2], [1], [0, 1], [0, 2], [0])]
    out, _ = flash.decode_block(lambda x, rope, layer, attend: attend(layer, q, k, v), q, q, q, slots, slots, *one)
    assert out[0, 0, 0, 0].item() == pytest.approx(1 / (1 + math.exp(-2)), abs=4e-3)


def test_where_the_kernel_is_taken(monkeypatch):
    on_gpu, on_cpu = torch.device("cuda"), torch.device("cpu")
    config = SimpleNamespace(head_dim=64)
    monkeypatch.setattr(flash, "FlashCache", lambda *_: "flash")
    monkeypatch.setattr(flash, "KVCache", lambda *_: "other")
    for device, dtype, size, expected in ((on_gpu, torch.bfloat16, 64, "flash"), (on_gpu, torch.float32, 64, "other"),
                                          (on_cpu, torch.bfloat16, 64, "other"), (on_gpu, torch.bfloat16, 60, "other"),
                                          (on_gpu, torch.bfloat16, 512, "other")):
        config.head_dim = size
        assert flash.decoding_cache(config, 1, 1, 1, 1, dtype, device, True) == expected
        if device == on_gpu:
            assert packed.in_pieces(device, dtype, 2, size) == (expected == "flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability in ((7, 5), (8, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert flash.usable(on_gpu, torch.bfloat16, 64) == (capability == (8, 0))
