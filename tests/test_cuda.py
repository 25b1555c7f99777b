"""On a GPU: the numbers of the CPU, by other kernels. Run where there is one: python -m pytest tests/test_cuda.py"""
import copy

import pytest
import torch

from conftest import metrics
from minibridge import flash, packed, policy
from minibridge.data import load_prompts
from minibridge.generate import generate
from minibridge.grpo import group_advantages
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig
from minibridge.policy import pack
from minibridge.rollout import rollout
from test_generate import flat, seeded
from test_train_rl import train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
CONFIG = ModelConfig("qwen3", vocab_size=700, hidden_size=128, intermediate_size=192, num_hidden_layers=3, num_attention_heads=6,
                     num_key_value_heads=2, head_dim=64, max_position_embeddings=512)
PROMPTS = [[(7 * n + token) % 700 for token in range(length)] for n, length in enumerate((3, 1, 70, 12, 33, 5, 2))]


@pytest.fixture(scope="module", name="model")
def decoder() -> Decoder:
    model = Decoder(CONFIG)
    model.init_weights(seeded(), std=0.08)
    return model


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("rows", [1, 6, 48, 300])
def test_logprobs_are_those_of_the_full_forward(model, compiled, rows):
    """Rows end and are refilled, prompts come and go, and as rows leave for good smaller steps are recorded."""
    on_gpu = copy.deepcopy(model).to("cuda", torch.bfloat16)
    results = generate(on_gpu, PROMPTS, 16, 40, 0.9, stop_ids=range(12), generator=seeded(), rows=rows, compiled=compiled)
    assert len({len(completion.ids) for completion in flat(results)}) > 10
    gaps = []
    for prompt, group in zip(PROMPTS, results):
        for completion in group[:4]:
            assert (completion.ids[-1] < 12) == (completion.finish_reason == "stop")
            with torch.no_grad():
                hidden = model(torch.tensor([prompt + completion.ids]))[0, len(prompt) - 1 : -1]
            expected = (model.logits(hidden) / 0.9).log_softmax(-1)[range(len(completion.ids)), completion.ids]
            gaps.append((torch.tensor(completion.logprobs) - expected).abs())
    assert torch.cat(gaps).max() < 0.2 and torch.cat(gaps).mean() < 0.02


def test_steps_of_a_few_sizes_are_recorded_and_played(model, monkeypatch):
    sizes, recorded = [], flash.FlashCache._recorded
    monkeypatch.setattr(flash.FlashCache, "_recorded", lambda cache, advance, size: (
        sizes.append(size), recorded(cache, advance, size))[1])
    on_gpu = copy.deepcopy(model).to("cuda", torch.bfloat16)
    for _ in range(2):
        generate(on_gpu, PROMPTS, 16, 200, stop_ids=range(12), generator=seeded(), rows=64, compiled=True)
    assert sizes == [64, 32, 16] * 2


@pytest.mark.parametrize("rows", [3, 64])
def test_greedy_answers_in_fp32_are_those_of_the_cpu(model, rows):
    expected, found = (generate(copy.deepcopy(model).to(device), PROMPTS, 2, 20, 0.0, rows=rows) for device in ("cpu", "cuda"))
    assert [completion.ids for completion in flat(found)] == [completion.ids for completion in flat(expected)]
    for a, b in zip(flat(found), flat(expected)):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.parametrize("dtype, close", [(torch.float32, 1e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("lengths, after", [
    ([7, 70, 1, 90, 40], [None, None, 0, 1, 1]), ([70, 7, 50, 40, 41], [None, None, 0, 1, 0]),
    ([0, 80, 60, 68], [None, None, 0, 1])], ids=["side by side", "in turns", "nothing to go on from"])
def test_packed_attention_is_that_of_the_cpu(dtype, close, lengths, after):
    """In value and gradient: in bf16 by pieces, in fp32 by rows."""
    found = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        inputs = [torch.randn(1, 208, heads, 64, generator=seeded()).to(device, kind).requires_grad_() for heads in (6, 2, 2)]
        line = packed.Packed(lengths, after)
        out = line.attend(0, *inputs)
        weights = torch.randn(1, 208, 6, 64, generator=seeded(1)).to(device, kind)
        found.append([x.double().cpu() for x in (out, *torch.autograd.grad(out, inputs, weights))])
    assert (line.rows is None) == (dtype == torch.bfloat16)
    for on_cpu, on_gpu in zip(*found):
        assert (on_gpu - on_cpu).norm() < close * on_cpu.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_a_step_is_that_of_the_cpu(toy, dtype):
    prompts = load_prompts(toy.rl, toy.tokenizer, 512)[:3]
    groups = rollout(toy.load(), toy.tokenizer, prompts, 4, max_new_tokens=30, generator=seeded())
    advantages, gradients, losses = group_advantages(torch.arange(12.0).view(3, 4) % 5), [], []
    for device, kind in (("cpu", torch.float32), ("cuda", dtype)):
        model = toy.load().to(device)
        model.compute_dtype = kind
        batches = pack(groups, advantages, 300, model.device)
        whole = policy.whole_step(batches, policy.Recipe(kl_coef=0.0, entropy_coef=0.01), 1.0, 30)
        losses.append(0.0)
        for batch in batches:
            loss, _ = policy.share_of_loss(model, batch, whole)
            loss.backward()
            losses[-1] += loss.item()
        gradients.append(torch.cat([parameter.grad.cpu().flatten() for parameter in model.parameters()]))
    close = 1e-3 if dtype == torch.float32 else 0.05
    assert (gradients[1] - gradients[0]).norm() < close * gradients[0].norm()
    assert losses[1] == pytest.approx(losses[0], abs=close)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_run(toy, tmp_path, dtype):
    """train_rl.py as a user starts it on a GPU, KL term and validation included."""
    flags = f"--device cuda --dtype {dtype} --steps 3 --val {toy.rl} --kl-coef 0.1 --compile {'on' if dtype == 'bf16' else 'off'}"
    assert train(toy.model, toy.rl, tmp_path, flags) == 0
    rows = [row for row in metrics(tmp_path) if "grad_norm" in row]
    assert len(rows) == 3 and all(0 < row["memory_gib"] < 5 for row in rows)
    assert all(row["mismatch_mean"] < (1e-3 if dtype == "fp32" else 0.1) for row in rows)
