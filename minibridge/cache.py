"""What attention attends to, and what is kept of it: a prompt goes through the products once for all its answers.

`Decoder.forward` asks a cache for `attention(positions)`, the function that every layer then calls with its q, k and v:

    Packed        training: texts end to end, of which several may go on from the same tokens
    PromptCache   prefill: the prompts' keys and values are kept
    KVCache       sampling: a fixed place for prompts and one for answers, written as the answers grow

In sampling, with G answers to each prompt, the keys of a prompt are read once a step instead of G times: the queries of
its answers are laid side by side and meet them in one product (the idea of Hydragen, arXiv 2402.05099).

Axes: N prompts of P slots, J answers to a prompt at most, B answers of S slots, L layers, H query and K key heads,
G = H / K, D head size.
"""
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# How many places of `Packed` rows a micro-batch may have for each of its tokens, since rows copy their prompt. It holds where
# there are no rows too, so that a step's micro-batches are the same on every device.
PLACES = 2
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)


class Cache(Protocol):
    def attention(self, positions: Tensor) -> Attend: ...


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the tokens given: an `Attend` without a cache."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and q.dtype == torch.float32:  # the one fused kernel that takes fp32 there wants as many keys as queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1]).transpose(1, 2)


def shared_attention(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, answers: Tensor, grid: Tensor, place: Tensor,
                     prompt_bias: Tensor, answer_bias: Tensor) -> Tensor:
    """Attention (B, K, G, D) of new tokens' q (B, K, G, D), each over its prompt, its answer so far, and itself.

    k and v (B, K, D) are the new tokens'; prompts (2, N, K, P, D) and answers (2, B, K, S, D) hold keys and values.
    grid (N, J) names the rows of q that belong to each prompt, filled up with any row; place (B,) is where a row is
    found in the flattened grid. The biases, (N, P) and (B, S), are 0 where there is a token and -inf elsewhere.
    The three parts have one softmax, in fp32: each is summed relative to its own maximum, and scaled to the common one.
    Prompts with fewer answers than the most have fillers in the grid, whose results nobody reads.
    """
    J, G = grid.shape[1], q.shape[2]
    q = q * q.shape[-1] ** -0.5
    grouped = q[grid].transpose(1, 2).flatten(2, 3)  # (N, K, J*G, D)
    scores = (grouped @ prompts[0].mT).float() + prompt_bias[:, None, None]  # (N, K, J*G, P)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    summed = ((weights.to(q.dtype) @ prompts[1]).float(), weights.sum(-1, keepdim=True), top)
    shared = torch.cat(summed, -1).unflatten(2, (J, G)).transpose(1, 2).flatten(0, 1)[place]  # (B, K, G, D + 2)
    out, total, top = shared.split((q.shape[-1], 1, 1), -1)

    scores = (q @ answers[0].mT).float() + answer_bias[:, None, None]  # (B, K, G, S)
    itself = (q * k[:, :, None]).float().sum(-1, keepdim=True)  # (B, K, G, 1)
    highest = torch.maximum(torch.maximum(top, itself), scores.amax(-1, keepdim=True))
    scale, weights, weight = (top - highest).exp(), (scores - highest).exp(), (itself - highest).exp()
    out = out * scale + (weights.to(q.dtype) @ answers[1]).float() + weight * v[:, :, None].float()
    return (out / (total * scale + weights.sum(-1, keepdim=True) + weight)).to(q.dtype)


@dataclass
class _Step:
    """The cache as one decoding step reads it; what the step adds is left in `new`, and nothing is written in place, so
    that torch.compile makes one graph of the whole step."""

    prompts: Tensor  # (L, 2, N, K, P, D)
    answers: Tensor  # (L, 2, B, K, S, D)
    grid: Tensor
    place: Tensor
    prompt_bias: Tensor
    answer_bias: Tensor
    new: list[Tensor] = field(default_factory=list)  # (2, B, K, D) of each layer

    def attention(self, positions: Tensor) -> Attend:
        return self.attend

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, H, D = q.shape
        k, v = k[:, 0], v[:, 0]
        self.new.append(torch.stack((k, v)))
        q = q.view(B, k.shape[1], -1, D)
        out = shared_attention(q, k, v, self.prompts[layer], self.answers[layer], self.grid, self.place, self.prompt_bias,
                               self.answer_bias)
        return out.view(B, 1, H, D)


def decode_step(model, ids: Tensor, positions: Tensor, *read: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (B, C) of one new token a row, and their keys and values (L, 2, B, K, D)."""
    step = _Step(*read)
    hidden = model(ids[:, None], positions[:, None], step)
    return hidden[:, 0], torch.stack(step.new)


@cache
def compiled_decode_step(cpu: bool) -> Callable:
    """Without torch.compile's checks of its own buffers' sizes, and on a CPU called from C++ and not from Python: 5% and 7% of
    a toy step."""
    return torch.compile(decode_step, options={"size_asserts": False, "cpp_wrapper": cpu})


class KVCache:
    """What sampling keeps: `prompts` (L, 2, N, K, P, D), keys and values, and `answers` (L, 2, B, K, S, D).

    `arrange` says which answers there are: row b goes on from prompt owner[b]. Of their slots the first `used` are in use;
    the caller tells, who knows the positions without asking the device.
    Slots start at zero, because what is masked is still multiplied by 0, and uninitialised memory may hold a NaN.
    Each dimension is larger than what attention reads of it, which is never 1: torch.compile would make other graphs.
    """

    def __init__(self, config, prompts: int, prompt_slots: int, rows: int, slots: int, dtype=torch.float32, device="cpu",
                 compiled: bool = False):
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        prompts, prompt_slots, rows, slots = (size + 2 for size in (prompts, prompt_slots, rows, slots))
        self.prompts = torch.zeros(layers, 2, prompts, K, prompt_slots, D, dtype=dtype, device=device)
        self.answers = torch.zeros(layers, 2, rows, K, slots, D, dtype=dtype, device=device)
        self.used, self.compiled = 0, compiled

    def put_prompts(self, first: int, filled: "PromptCache"):
        """Copy prefilled prompts to places first, first + 1, ...; there is always room: it doubles when it is short."""
        n, _, p, _ = filled.layers[0][0].shape
        while first + n >= self.prompts.shape[2]:
            self.prompts = torch.cat((self.prompts, torch.zeros_like(self.prompts)), 2)
        for layer, pair in enumerate(filled.layers):
            self.prompts[layer, :, first : first + n, :, :p] = torch.stack(pair)

    def move_prompts(self, sources: list[int], places: list[int]):
        self.prompts[:, :, places] = self.prompts[:, :, sources]

    def move_rows(self, sources: list[int], places: list[int]):
        self.answers[:, :, places, :, : self.used] = self.answers[:, :, sources, :, : self.used]

    def arrange(self, owner: list[int], lengths: list[int]):
        """Row b answers prompt owner[b]; lengths: tokens of each prompt, by place."""
        owner = owner * 2 if len(owner) == 1 else owner
        members: list[list[int]] = [[] for _ in range(max(2, len(lengths)))]
        for row, prompt in enumerate(owner):
            members[prompt].append(row)
        most = max(2, *map(len, members))
        grid = [rows + [0] * (most - len(rows)) for rows in members]
        rank = {row: rank for rows in members for rank, row in enumerate(rows)}
        place = [prompt * most + rank[row] for row, prompt in enumerate(owner)]
        device = self.answers.device
        self.grid, self.place = torch.tensor(grid, device=device), torch.tensor(place, device=device)  # (N, J), (B,)
        self.lengths = torch.tensor([lengths[prompt] for prompt in owner], device=device)  # (B,)
        self.prompt_limit = max(2, *lengths)
        lengths = torch.tensor([*lengths, 1, 1][: len(grid)], device=device)  # at least one slot of each is seen
        self.prompt_bias = _bias(torch.arange(self.prompt_limit, device=device) < lengths[:, None])  # (N, P)

    def step(self, model, ids: Tensor, positions: Tensor, longest: int) -> Tensor:
        """Hidden states (B, C) of one new token for each row, ids (B,) at positions (B,); their keys and values are kept.

        longest: tokens that the longest of the answers had before."""
        rows, said = torch.arange(len(self.place), device=ids.device), positions - self.lengths  # (B,) the new slots
        most = max(2, longest)
        answer_bias = _bias(torch.arange(most, device=ids.device) < said[:, None])  # (B, S)
        prompts = self.prompts[:, :, : len(self.grid), :, : self.prompt_limit]
        answers = self.answers[:, :, : len(rows), :, :most]
        inputs = (*(x.expand(len(rows)).contiguous() for x in (ids, positions)), prompts, answers, self.grid, self.place,
                  self.prompt_bias, answer_bias)
        if self.compiled:
            for tensor, dims in zip(inputs, ((0,), (0,), (2, 4), (2, 4), (0, 1), (0,), (0, 1), (0, 1))):
                torch._dynamo.mark_dynamic(tensor, dims)  # sizes that change from step to step
        hidden, new = (compiled_decode_step(ids.is_cpu) if self.compiled else decode_step)(model, *inputs)
        self.answers[:, :, rows, :, said] = new.permute(2, 0, 1, 3, 4)
        self.used = longest + 1
        return hidden[: len(ids)]


def _bias(seen: Tensor) -> Tensor:
    """0 where there is something to see, -inf elsewhere."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, -torch.inf)


class PromptCache:
    """Keys and values of prompts (N, P), padded on the right, as one forward pass leaves them for a `KVCache`."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []  # (N, K, P, D) each

    def attention(self, positions: Tensor) -> Attend:
        return self._attend

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.layers.append((k.transpose(1, 2), v.transpose(1, 2)))
        return causal_attention(layer, q, k, v)


class Packed:
    """Attention in texts whose tokens lie end to end in one line of S tokens: the model sees (1, S), and no padding.

    Text i has lengths[i] tokens, and goes on from all those of text after[i] where that is not None, as answers do from their
    prompt, which so stands in the line once. What others go on from goes on from none itself.

    `in_pieces`, each text meets itself, and answers side by side meet their prompt together: nothing is copied. Elsewhere rows
    (B, L) say where the tokens of a text, and before it of what it goes on from, stand in the line. In each layer q, k and v
    are copied to them, and what attention finds is read back, of shared tokens from the first row that has them; behind a row's
    end is anything, and best not the same for all.
    """

    def __init__(self, lengths: list[int], after: list[int | None]):
        self.spans = [slice(start, start + length) for start, length in zip(accumulate(lengths, initial=0), lengths)]
        self.after, self.lengths, self.shared = after, [length for length in lengths if length], []
        for before, run in groupby(zip(after, self.spans), itemgetter(0)):
            texts = [span for _, span in run]
            if before is not None and lengths[before] and texts[0].start < texts[-1].stop:
                self.shared.append((slice(texts[0].start, texts[-1].stop), self.spans[before]))
        self.rows = None

    def attention(self, positions: Tensor) -> Attend:
        return self._attend

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.is_cpu and in_pieces(k.shape[2]):
            return _PieceAttention.apply(q[0], k[0], v[0], self.lengths, self.shared)[None]
        if self.rows is None:
            self._lay_rows(q.shape[1], q.device)
        q, k, v = (x[0].index_select(0, self.rows.flatten()).unflatten(0, self.rows.shape) for x in (q, k, v))
        return causal_attention(layer, q, k, v).flatten(0, 1).index_select(0, self.first)[None]

    def _lay_rows(self, tokens: int, device: torch.device):
        shared = set(self.after)
        last = [(slice(0, 0) if before is None else self.spans[before], span)
                for number, (span, before) in enumerate(zip(self.spans, self.after)) if number not in shared]
        numbers = torch.tensor([[before.start, before.stop, own.start, own.stop] for before, own in last], device=device)
        begins, ends, start, stop = numbers.T[..., None]  # (B, 1) each
        given, slots = ends - begins, ends - begins + stop - start
        longest = max(before.stop - before.start + own.stop - own.start for before, own in last)  # known without asking the device
        slot = torch.arange(longest, device=device)  # (L,)
        self.rows = (slot + torch.where(slot < given, begins, start - given)).clamp(max=tokens - 1)  # (B, L)
        real, places = slot < slots, torch.arange(self.rows.numel(), device=device).view_as(self.rows)
        self.first = places.new_full((tokens,), places.numel()).scatter_reduce(0, self.rows[real], places[real], "amin")  # (S,)


def in_pieces(key_heads: int) -> bool:
    """Whether a CPU's training attention goes by pieces: unless the fused kernels are switched off (`sdpa_kernel`; its switch
    is named after CUDA, but is for all), or there are more threads than key heads, since the kernel's backward pass has one
    thread for each of these in a piece."""
    return torch.backends.cuda.flash_sdp_enabled() and torch.get_num_threads() <= key_heads


class _PieceAttention(torch.autograd.Function):
    """Attention (S, H, D) of q (S, H, D) over k and v (S, K, D): of each text, by their `lengths`, over itself, causally, and of
    `shared`, pairs of slices, of the first over all of the second.

    What a query finds in two places is joined by the logsumexp of its scores in each. Given the joint one, the kernel's
    backward pass finds each place's share of the gradient by itself. Last axes must be contiguous: the kernel, called without
    the checks of `scaled_dot_product_attention`, takes it for granted.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], shared: list[tuple[slice, slice]]) -> Tensor:
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        found = [flash(*texts, is_causal=True) for texts in zip(*_texts(lengths, q, k, v))]
        out = _line(values for values, _ in found)  # (S, H, D)
        total = _line(sums for _, sums in found)  # (S, H), fp32 at least
        del found
        for queries, keys in shared:
            values, sums = flash(_heads_first(q[queries]), _heads_first(k[keys]), _heads_first(v[keys]))
            values, before, sums = values[0].transpose(0, 1).to(sums.dtype), out[queries].to(sums.dtype), sums[0].T
            out[queries] = torch.lerp(before, values, (sums - total[queries]).sigmoid()[..., None])
            total[queries] = torch.logaddexp(total[queries], sums)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.lengths, ctx.shared = lengths, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (q, k, v, out, total), flash = ctx.saved_tensors, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = [flash(*texts, 0.0, True) for texts in zip(*_texts(ctx.lengths, grad, q, k, v, out, total))]
        grads = [_line(parts) for parts in zip(*found)]
        del found
        for queries, keys in ctx.shared:
            where = (queries, queries, keys, keys, queries, queries)
            arrays = [_heads_first(x[here]) for x, here in zip((grad, q, k, v, out, total), where)]
            parts = flash(*arrays, 0.0, False)
            for sum_, part, here in zip(grads, parts, (queries, keys, keys)):
                sum_[here] += part[0].transpose(0, 1)
        return *grads, None, None


def _heads_first(x: Tensor) -> Tensor:
    """(S, H, ...) -> (1, H, S, ...)."""
    return x.transpose(0, 1)[None]


def _texts(lengths: list[int], *arrays: Tensor) -> list[list[Tensor]]:
    """Views (B, H, T, ...) of each array (S, H, ...), of texts end to end: neighbours of one length are rows of one view."""
    runs = [(length, len([*run])) for length, run in groupby(lengths)]
    sizes = [length * count for length, count in runs]
    return [[part.unflatten(0, (count, length)).transpose(1, 2) for part, (length, count) in zip(x.split(sizes), runs)]
            for x in arrays]


def _line(parts: Iterable[Tensor]) -> Tensor:
    """(S, H, ...) of `_texts`."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
