import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minibridge import logprob
from minibridge.logprob import fused_loss, token_logprobs, token_logprobs_naive

N, V, C = 23, 17, 6


def inputs(dtype=torch.float64, weight_dtype=None, scale=1.5):
    generator = torch.Generator().manual_seed(0)
    hidden = (torch.randn(N, C, generator=generator, dtype=torch.float64) * scale).to(dtype).requires_grad_()
    weight = torch.randn(V, C, generator=generator, dtype=torch.float64).to(weight_dtype or dtype)
    return hidden, weight.requires_grad_(), torch.randint(V, (N,), generator=generator)


def fused(hidden, weight, targets, *, slopes=(1.0, 1.0), **options):
    """`fused_loss` of the sum of everything, each value times its slope."""
    def loss_of(logprobs, entropy, rows):
        values = [x for x in (logprobs, entropy) if x is not None]
        loss = sum((x * torch.as_tensor(slope, dtype=x.dtype).expand(len(hidden))[rows]).sum()
                   for x, slope in zip(values, slopes))
        return loss, {"tokens": torch.tensor(float(len(logprobs))), "logprob": logprobs.sum()}

    return fused_loss(hidden, weight, targets, loss_of, **options)


def gradients(function, hidden, weight, targets, **options):
    """Results and gradients of a loss in which every log-probability and entropy has its own weight."""
    logprobs, entropy = function(hidden, weight, targets, **options)
    loss = (logprobs * torch.linspace(-1, 2, N, dtype=logprobs.dtype)).sum()
    if entropy is not None:
        loss = loss + (entropy * torch.linspace(0.5, -1, N, dtype=logprobs.dtype)).sum()
    return [logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))]


def assert_all_close(results, expected, rtol, atol):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=rtol, atol=atol)


def test_by_hand():
    # One-hot hidden states pick columns of the weight: the logits are log(1/2, 1/4, 1/4), and a uniform row.
    weight = torch.tensor([[0.5, 1.0], [0.25, 1.0], [0.25, 1.0]]).log()
    logprobs, entropy = token_logprobs(torch.eye(2), weight, torch.tensor([1, 2]))
    torch.testing.assert_close(logprobs, torch.tensor([0.25, 1 / 3]).log())
    torch.testing.assert_close(entropy, torch.tensor([1.5 * math.log(2), math.log(3)]))


def test_temperature_by_hand():
    # Probabilities 1/2, 1/4, 1/4 at temperature 1/2 are their squares over the sum: 4/6, 1/6, 1/6.
    weight = torch.tensor([[0.5], [0.25], [0.25]]).log()
    logprobs, _ = token_logprobs(torch.ones(2, 1), weight, torch.tensor([0, 1]), temperature=0.5)
    torch.testing.assert_close(logprobs.exp(), torch.tensor([4 / 6, 1 / 6]))


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("chunk", [None, *range(1, N + 2)])
def test_equals_the_naive_twin_for_every_chunk_size(chunk, temperature):
    expected = gradients(token_logprobs_naive, *inputs(), temperature=temperature)
    results = gradients(token_logprobs, *inputs(), temperature=temperature, chunk=chunk)
    assert_all_close(results, expected, rtol=1e-11, atol=1e-12)


def fused_gradients(hidden, weight, targets, **options):
    """What `gradients` gives for the same loss, as far as the fused form gives it: loss, sum of logprobs, gradients."""
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(0.5, -1, N, dtype=torch.float64)
    loss, metrics = fused(hidden, weight, targets, slopes=slopes, **options)
    assert metrics["tokens"] == N
    (3 * loss).backward()  # a factor that comes from outside
    return [loss.detach(), metrics["logprob"], hidden.grad / 3, weight.grad / 3]


@pytest.mark.parametrize("with_entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("chunk", [None, 1, 4, N - 1, N, N + 1])
def test_the_fused_loss_equals_the_loss_of_the_naive_twin(chunk, temperature, with_entropy):
    logprobs, entropy, *grads = gradients(lambda *a, **o: [*token_logprobs_naive(*a, **o)][:1 + with_entropy] + [None] * (
        not with_entropy), *inputs(), temperature=temperature)
    slopes = torch.linspace(-1, 2, N, dtype=torch.float64), torch.linspace(0.5, -1, N, dtype=torch.float64)
    loss = (logprobs * slopes[0]).sum() + ((entropy * slopes[1]).sum() if with_entropy else 0.0)
    results = fused_gradients(*inputs(), temperature=temperature, chunk=chunk, with_entropy=with_entropy)
    assert_all_close(results, [loss.detach(), logprobs.sum().detach(), *grads], rtol=1e-10, atol=1e-10)


def test_equals_the_naive_twin_in_fp32():
    results = gradients(token_logprobs, *inputs(torch.float32), chunk=4)
    assert all(result.dtype == torch.float32 for result in results)
    assert_all_close(results, gradients(token_logprobs_naive, *inputs(torch.float32)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_the_fused_loss_in_bf16(weight_dtype):
    results = fused_gradients(*inputs(torch.bfloat16, weight_dtype), chunk=4)
    expected = gradients(token_logprobs_naive, *inputs(torch.bfloat16, weight_dtype))
    assert [result.dtype for result in results] == [torch.float32] * 2 + [torch.bfloat16, weight_dtype]
    assert_all_close(results[2:], expected[2:], rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_equals_the_naive_twin_in_bf16(weight_dtype):
    results = gradients(token_logprobs, *inputs(torch.bfloat16, weight_dtype), chunk=4)
    expected = gradients(token_logprobs_naive, *inputs(torch.bfloat16, weight_dtype))
    assert [result.dtype for result in results] == [torch.float32] * 2 + [torch.bfloat16, weight_dtype]
    assert_all_close(results[:2], expected[:2], rtol=1e-5, atol=1e-5)  # same bf16 logits, fp32 from there on
    assert_all_close(results[2:], expected[2:], rtol=2e-2, atol=5e-2)


def test_weight_gradient_of_bf16_chunks_adds_up_in_fp32():
    hidden = torch.tensor([[512.0]] + [[1.0]] * 16, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, requires_grad=True)  # both tokens have probability 1/2
    fused(hidden, weight, torch.zeros(17, dtype=torch.long), slopes=(1.0, 0.0), chunk=1)[0].backward()
    assert weight.grad.flatten().tolist() == [264, -264]  # 256 + 16 / 2; in bf16 it would stay at 256


def test_hidden_gradient_of_bf16_blocks_adds_up_in_fp32():
    hidden = torch.zeros(1, 1, dtype=torch.bfloat16, requires_grad=True)  # all 18 tokens have probability 1/18
    weight = torch.tensor([[-18 * 512.0]] + [[-18.0]] * 16 + [[0.0]], dtype=torch.bfloat16)
    token_logprobs(hidden, weight, torch.tensor([17]), chunk=1)[0].sum().backward()
    assert hidden.grad.item() == 512 + 16  # one by one, in bf16, no 1 would be added to 512


def test_gradcheck():
    hidden, weight, targets = inputs(scale=0.5)
    hidden, targets = hidden[:5].detach().requires_grad_(), targets[:5]
    for entropy in (True, False):
        def run(hidden, weight):
            return tuple(x for x in token_logprobs(hidden, weight, targets, 0.7, 2, entropy) if x is not None)
        assert torch.autograd.gradcheck(run, (hidden, weight))
    assert torch.autograd.gradcheck(lambda *x: token_logprobs(*x, targets, 0.7, 2)[1], (hidden, weight))


def test_without_entropy():
    logprobs, entropy = token_logprobs(*inputs(), with_entropy=False)
    assert entropy is None
    torch.testing.assert_close(logprobs, token_logprobs_naive(*inputs())[0])
    results = gradients(token_logprobs, *inputs(), with_entropy=False, chunk=5)
    expected = gradients(lambda *x: (token_logprobs_naive(*x)[0], None), *inputs())
    assert_all_close(results[2:], expected[2:], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("loss_of", [
    lambda *arguments: token_logprobs(*arguments, chunk=5)[0].sum(),
    lambda *arguments: fused(*arguments, slopes=(1.0, 0.0), chunk=5)[0]], ids=["blocks", "fused"])
@pytest.mark.parametrize("trained", [0, 1])
def test_a_frozen_input_gets_no_gradient(trained, loss_of):
    arguments = [tensor.detach() for tensor in inputs()]
    arguments[trained].requires_grad_()
    loss_of(*arguments).backward()
    hidden, weight, targets = inputs()
    token_logprobs_naive(hidden, weight, targets)[0].sum().backward()
    torch.testing.assert_close(arguments[trained].grad, (hidden, weight)[trained].grad)
    assert arguments[1 - trained].grad is None


@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_naive])
def test_bf16_logits_are_widened_before_the_temperature(function):
    hidden, weight, targets = inputs(torch.bfloat16)
    with torch.no_grad():
        expected = ((hidden @ weight.T).double() / 0.7).log_softmax(-1)[range(N), targets]
        found = function(hidden, weight, targets, temperature=0.7)[0]
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_fused_loss_has_one_backward_pass():
    loss, _ = fused(*inputs())
    (2 * loss).backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        (2 * loss).backward()


def test_inputs_stay_as_they_are():
    hidden, weight, targets = inputs()
    before = [tensor.detach().clone() for tensor in (hidden, weight, targets)]
    gradients(token_logprobs, hidden, weight, targets, temperature=0.5, chunk=4)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((hidden, weight, targets), before))


def test_far_logits_stay_finite_and_exact():
    # Logits near 1000 with gaps of order 1: softmax by plain exp() would overflow, and H = lse - sum p z
    # would cancel to a few digits.
    weight = torch.tensor([[1000.0], [1001.0], [999.0]], requires_grad=True)
    logprobs, entropy = token_logprobs(torch.ones(1, 1), weight, torch.tensor([0]))
    expected = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64).log_softmax(0)
    torch.testing.assert_close(logprobs.double(), expected[:1], rtol=0, atol=1e-4)
    expected_entropy = -(expected.exp() * expected).sum(0, keepdim=True)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=0, atol=1e-4)
    (logprobs + entropy).sum().backward()
    assert weight.grad.isfinite().all()


def test_a_second_derivative_is_refused_not_wrong():
    hidden, weight, targets = inputs()
    loss = token_logprobs(hidden, weight, targets)[0].square().sum()
    gradient, = torch.autograd.grad(loss, hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Created(TorchDispatchMode):
    """Names of all operations, and shapes of all tensors that they create, views left out."""

    def __init__(self):
        super().__init__()
        self.shapes, self.names = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        self.names.append(function.overloadpacket.__name__)
        owned = {x.untyped_storage().data_ptr() for x in tensors((args, kwargs))}
        new = (x for x in tensors(result) if x.untyped_storage().data_ptr() not in owned)
        self.shapes += [tuple(x.shape) for x in new]
        return result

    def largest(self):
        return max(math.prod(shape) for shape in self.shapes)


def created(function, rows, vocabulary, width, train=True, **options):
    hidden = torch.randn(rows, width, requires_grad=train)
    weight = torch.randn(vocabulary, width, requires_grad=train)
    with Created() as mode:
        results = function(hidden, weight, torch.arange(rows) % vocabulary, **options)
        if train:
            sum(x.sum() for x in results if isinstance(x, torch.Tensor)).backward()
    return mode


def test_the_measure_sees_the_matrix_of_the_naive_twin():
    assert created(token_logprobs_naive, 64, 50, 4).largest() == 64 * 50


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("chunk", [1, 5, 8])
def test_no_tensor_is_larger_than_a_block_of_logits_or_the_weight(chunk, train):
    mode = created(token_logprobs, 64, 50, 4, train, chunk=chunk)
    assert mode.largest() <= max(64 * chunk, 50 * 4, 64 * 4)
    assert (64, 50) not in mode.shapes and (64, chunk) in mode.shapes
    mode = created(fused, 64, 50, 4, train, chunk=chunk)
    assert mode.largest() <= max(chunk * 50, 50 * 4, 64 * 4)
    assert (64, 50) not in mode.shapes and (chunk, 50) in mode.shapes


def test_the_default_blocks_are_a_share_of_all_and_bounded(monkeypatch):
    assert created(token_logprobs, 64, 160, 2).largest() == created(fused, 64, 160, 2).largest() == 64 * 160  # so few
    monkeypatch.setattr(logprob, "WHOLE_ELEMENTS", 64 * 2)
    assert created(token_logprobs, 64, 16, 1).largest() == 64 * 2
    monkeypatch.setattr(logprob, "WHOLE_ELEMENTS", 0)
    assert created(token_logprobs, 64, 160, 2).largest() == 64 * 160 // 16
    assert created(fused, 64, 50, 2).largest() == 64 // 8 * 50
    monkeypatch.setattr(logprob, "BLOCK_ELEMENTS", 3 * 64)
    assert created(token_logprobs, 64, 160, 1).largest() == 3 * 64
    monkeypatch.setattr(logprob, "BLOCK_ELEMENTS", 3 * 50)
    assert created(fused, 64, 50, 2).largest() == 3 * 50
    monkeypatch.setattr(logprob, "BLOCK_ELEMENTS", 1)  # never none
    assert (64, 1) in created(token_logprobs, 64, 50, 2).shapes
    assert (1, 50) in created(fused, 64, 50, 2).shapes


def test_nothing_is_multiplied_more_often_than_it_must_be():
    """With gradients: logits, their recomputation, and one product for each gradient; the fused loss recomputes nothing."""
    def products(function, train):
        names = created(function, 64, 48, 4, train, chunk=8).names
        return names.count("mm") + names.count("addmm")

    assert products(token_logprobs, False) == 48 // 8 and products(token_logprobs, True) == 4 * 48 // 8
    assert products(fused, False) == 64 // 8 and products(fused, True) == 3 * 64 // 8
    with torch.no_grad():
        assert token_logprobs(*inputs())[0].grad_fn is None


def test_an_entropy_that_is_only_logged_costs_nothing_backward():
    def backward(with_entropy):
        hidden, weight, targets = inputs()
        loss = token_logprobs(hidden, weight, targets, with_entropy=with_entropy)[0].sum()
        with Created() as mode:
            loss.backward()
        return [name for name in mode.names if name != "detach"]  # of the saved entropy: no work

    assert backward(with_entropy=True) == backward(with_entropy=False)


def test_no_rows():
    hidden, weight, targets = inputs()
    logprobs, entropy = token_logprobs(hidden[:0], weight, targets[:0])
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert weight.grad.eq(0).all()
    hidden, weight, targets = inputs()
    loss, metrics = fused(hidden[:0], weight, targets[:0])
    loss.backward()
    assert loss == 0 and metrics == {} and weight.grad.eq(0).all()
