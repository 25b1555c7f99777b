"""What torch.compile makes of the decoding step and of the log-probs: the same numbers, from one graph for all sizes."""

import ctypes
import shutil
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import pytest
import torch

from minibridge import cache, logprob
from minibridge.generate import generate
from minibridge.measure import peak_memory
from test_cache import hidden_states
from test_generate import PROMPTS, decoder, flat, seeded  # noqa: F401 (a fixture)
from test_logprob import assert_all_close, fused_gradients, gradients, inputs

compiler = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(not compiler, reason="torch.compile needs a C++ compiler")


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_a_compiled_step_gives_the_same_numbers_by_the_same_graphs(model):
    """Rows end and join, prompts come and go, and the last row is alone; a second call has other sizes throughout."""
    model, before = deepcopy(model), graphs()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases, which are 0, and norms
            torch.nn.init.normal_(parameter, 1.0, 0.2, generator=seeded())
    for rows, tokens, stop in ((5, 12, (0, 1, 2)), (3, 9, (4,)), (64, 7, ())):
        expected, found = (
            flat(generate(model, PROMPTS, 3, tokens, stop_ids=stop, generator=seeded(), rows=rows, compiled=compiled))
            for compiled in (False, True))
        assert [completion.ids for completion in found] == [completion.ids for completion in expected]
        for a, b in zip(found, expected):
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
    assert graphs() - before == 1  # none anew as answers grow and rows leave


@pytest.mark.parametrize("with_entropy", [True, False])
def test_compiled_logprobs_equal_their_naive_twin(monkeypatch, with_entropy):
    eager = gradients(logprob.token_logprobs, *inputs(), chunk=5, with_entropy=with_entropy)
    fused = fused_gradients(*inputs(), chunk=9, with_entropy=with_entropy)
    monkeypatch.setattr(logprob, "COMPILE_ELEMENTS", 1)
    before = graphs()
    compiled = gradients(logprob.token_logprobs, *inputs(), chunk=5, with_entropy=with_entropy)
    compiled += fused_gradients(*inputs(), chunk=9, with_entropy=with_entropy)
    assert graphs() > before
    pairs = [(a, b) for a, b in zip(compiled, eager + fused, strict=True) if a is not None]
    assert_all_close(*zip(*pairs), rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of the CPU is read from Linux")
@pytest.mark.parametrize("form", ["token_logprobs", "fused_loss"])
def test_no_more_than_an_eighth_of_the_logits_is_in_memory(form):
    tokens, vocabulary = 1024, 65536  # logits of 256 MiB
    hidden = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.randn(vocabulary, 16, requires_grad=True)
    targets = torch.arange(tokens)

    def run():
        hidden.grad = weight.grad = None
        if form == "fused_loss":
            loss, _ = logprob.fused_loss(hidden, weight, targets, lambda a, h, rows: (a.sum() + h.sum(), {}))
        else:
            loss = sum(x.sum() for x in logprob.token_logprobs(hidden, weight, targets))
        loss.backward()

    run()  # compiles
    hidden.grad = weight.grad = None
    with blocks_given_back():
        highest = peak_memory(torch.device("cpu"), run)
    assert highest - weight.nbytes - hidden.nbytes < 1.1 * 4 * tokens * vocabulary / 8


@contextmanager
def blocks_given_back():
    """What was freed goes to the system, now and from here on: what malloc keeps of it counts as memory in use, and it
    is 0 to 30 MiB by chance."""
    threshold, libc = -3, ctypes.CDLL(None)  # M_MMAP_THRESHOLD
    libc.mallopt(threshold, 2**20)
    libc.malloc_trim(0)
    yield
    libc.mallopt(threshold, 2**25)  # where malloc itself stops raising it


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory of the CPU is read from Linux")
def test_a_step_writes_into_the_cache_and_copies_none_of_it(model):
    kept = cache.KVCache(model.config, prompts=2, prompt_slots=4, rows=6, slots=2**17, compiled=True)
    kept.arrange([0, 1, 1], [4, 3])

    @torch.inference_mode()
    def step():
        newest, lengths = torch.tensor([1, 2, 3]), torch.tensor([5, 5, 4])
        cache.mark(newest, 0)
        cache.mark(lengths, 0)
        kept.step(model, 5, hidden_states, newest, lengths)

    step()  # compiles
    assert kept.answers.nbytes > 2**28 and peak_memory(torch.device("cpu"), step) < 2**24
    assert kept.answers[:, :, range(3), :, [5, 5, 4]].abs().amin((1, 2, 3, 4)).gt(0).all()
    assert kept.answers.count_nonzero() == kept.answers[:, :, :3, :, 4:6].count_nonzero()


@pytest.mark.parametrize("cpu", [True, False])
def test_only_on_a_cpu_the_step_is_called_from_c(cpu, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, options: given.append(options))
    cache.compiled_form.__wrapped__(cache.decode_step, cpu)
    assert given == [{"size_asserts": False, "cpp_wrapper": cpu, "reorder_for_locality": False}]
