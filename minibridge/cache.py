"""What attention attends to, and what is kept of it: a prompt goes through the products once for all its answers.

Every layer of `Decoder.forward` calls a cache's `attend` with its q, k and v:

    Packed        training (packed.py): texts end to end, of which several may go on from the same tokens
    PromptCache   prefill: the prompts' keys and values are kept
    _Step         a step of sampling

What sampling keeps is in a `KVCache`, a fixed place for prompts and one for answers, written as the answers grow, or on a
GPU in a `FlashCache` (flash.py). Both have `step`, which runs the model on the newest token of each row and draws the
next.

In sampling, with J answers to each prompt, the keys of a prompt are read once a step instead of J times: the queries of
its answers are laid side by side and meet them in one product (the idea of Hydragen, arXiv 2402.05099).

Axes: N prompts of P slots, J answers to a prompt at most, B answers of S slots, L layers, H query and K key heads,
G = H / K, D head size.
"""
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

warnings.filterwarnings("ignore", "\\s*Online softmax is disabled")  # of torch.compile: a remark to its own developers
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # layer, q (B, T, H, D), k and v (B, T, K, D) -> (B, T, H, D)


class Cache(Protocol):
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


def causal_attention(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention among the tokens given: an `Attend` without a cache."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.is_cuda and q.dtype == torch.float32:  # the one fused kernel that takes fp32 there wants as many keys as queries
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] > k.shape[1]).transpose(1, 2)


def shared_attention(q: Tensor, k: Tensor, v: Tensor, prompts: Tensor, answers: Tensor, grid: Tensor, place: Tensor,
                     prompt_bias: Tensor, answer_bias: Tensor, flat: Tensor | None = None) -> Tensor:
    """Attention (B, K, G, D) of new tokens' q (B, K, G, D), each over its prompt, its answer so far, and itself.

    k and v (B, K, D) are the new tokens'; prompts (2, N, K, P, D) and answers (2, B, K, S, D) hold keys and values, and
    answers may have more rows and slots than are read. flat: as `KVCache.flat` gives it.
    grid (N, J) names the rows of q that belong to each prompt, filled up with any row; place (B,) is where a row is
    found in the flattened grid. The biases, (N, P) and (B, S), are 0 where there is a token, see `_bias`.
    The three parts have one softmax, in fp32: each is summed relative to its own maximum, and scaled to the common one.
    Where a prompt has fewer answers than another, its row of the grid ends in fillers, whose results nobody reads.
    """
    J, G, (B, S) = grid.shape[1], q.shape[2], answer_bias.shape
    q = q * q.shape[-1] ** -0.5
    grouped = q[grid].transpose(1, 2).flatten(2, 3)  # (N, K, J*G, D)
    scores = (grouped @ prompts[0].mT).float() + prompt_bias[:, None, None]  # (N, K, J*G, P)
    top = scores.amax(-1, keepdim=True)
    weights = (scores - top).exp()
    summed = ((weights.to(q.dtype) @ prompts[1]).float(), weights.sum(-1, keepdim=True), top)
    shared = torch.cat(summed, -1).unflatten(2, (J, G)).transpose(1, 2).flatten(0, 1)[place]  # (B, K, G, D + 2)
    out, total, top = shared.split((q.shape[-1], 1, 1), -1)

    scores = _scores(q, answers[0, :B, :, :S], flat) + answer_bias[:, None, None]  # (B, K, G, S)
    itself = (q * k[:, :, None]).float().sum(-1, keepdim=True)  # (B, K, G, 1)
    highest = torch.maximum(torch.maximum(top, itself), scores.amax(-1, keepdim=True))
    scale, weights, weight = (top - highest).exp(), (scores - highest).exp(), (itself - highest).exp()
    out = out * scale + _sums(weights.to(q.dtype), answers[1], flat) + weight * v[:, :, None].float()
    return (out / (total * scale + weights.sum(-1, keepdim=True) + weight)).to(q.dtype)


def _scores(q: Tensor, keys: Tensor, flat: Tensor | None) -> Tensor:
    """(B, K, G, S) in fp32, of q (B, K, G, D) and keys (B, K, S, D)."""
    if flat is None:
        return (q @ keys.mT).float()
    return (q[:, :, :, None].float() * keys[:, :, None].float()).sum(-1)  # of which torch.compile makes a loop


def _sums(weights: Tensor, values: Tensor, flat: Tensor | None) -> Tensor:
    """(B, K, G, D) in fp32: the first rows and slots of values (B, K, S, D), weighted by (B, K, G, S)."""
    B, K, G, S = weights.shape
    if flat is None:
        return (weights @ values[:B, :, :S]).float()
    sums = F.embedding_bag(flat, values.flatten(0, 2), per_sample_weights=weights.flatten(0, 2), mode="sum")
    return sums.view(B, K, G, -1).float()


@dataclass
class _Step:
    """The cache as one decoding step reads it. New keys and values collect in `new`, and are written after the last read:
    only then does torch.compile update the cache in place."""

    prompts: Tensor  # (L, 2, N, K, P, D)
    answers: Tensor  # (L, 2, B, K, S, D), the whole cache
    grid: Tensor
    place: Tensor
    prompt_bias: Tensor
    flat: Tensor | None
    answer_bias: Tensor
    new: list[Tensor] = field(default_factory=list)  # (2, B, K, D) of each layer

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, _, H, D = q.shape
        k, v = k[:, 0], v[:, 0]
        self.new.append(torch.stack((k, v)))
        q = q.reshape(B, k.shape[1], -1, D)
        out = shared_attention(q, k, v, self.prompts[layer], self.answers[layer], self.grid, self.place, self.prompt_bias,
                               self.answer_bias, self.flat)
        return out.reshape(B, 1, H, D)


def decode_step(model, answers: Tensor, prompts: Tensor, slots: Tensor, prompt_lengths: Tensor, owned: Tensor, grid: Tensor,
                place: Tensor, prompt_bias: Tensor, flat: Tensor | None, draw: Callable, newest: Tensor, lengths: Tensor,
                *more) -> Any:
    """`KVCache.step` of all that it needs. New keys and values are written into `answers`, the whole cache, in place: to
    slot `lengths` of the row, or to slot 0 where no answer owns it (owned (B,): whether one does).

    slots (S,) are the numbers 0, 1, ... of those that are read; grid and so on are as in `_Step`."""
    rows, written = torch.arange(len(newest), device=newest.device), lengths * owned
    step = _Step(prompts, answers, grid, place, prompt_bias, flat, _bias(slots < written[:, None]))
    hidden = model(newest[:, None], (prompt_lengths + written)[:, None], step)
    answers[:, :, rows, :, written] = torch.stack(step.new).permute(2, 0, 1, 3, 4)
    return draw(model, hidden[:, 0], newest, lengths, *more)


# Of `decode_step`'s inputs the dimensions that change in size, by place: rows, prompts, slots.
SIZES = {1: (2, 4), 2: (2, 4), 3: (0,), 4: (0,), 5: (0,), 6: (0, 1), 7: (0,), 8: (0, 1), 9: (0, 1)}


def run_graph(function: Callable, compiled: bool, sizes: dict[int, tuple[int, ...]], *inputs) -> Any:
    """function(*inputs), by one graph of torch.compile if `compiled`. sizes: by an input's place the dimensions to mark."""
    if not compiled:
        return function(*inputs)
    for place, dims in sizes.items():
        if inputs[place] is not None:
            mark(inputs[place], *dims)
    return compiled_form(function, next(x for x in inputs if isinstance(x, Tensor)).is_cpu)(*inputs)


def mark(tensor: Tensor, *dims: int):
    """Tells torch.compile which dimensions of an input change from call to call, none of them 1."""
    torch._dynamo.mark_dynamic(tensor, dims)


@cache
def compiled_form(function: Callable, cpu: bool) -> Callable:
    """Without torch.compile's checks of its own buffers' sizes, and on a CPU called from C++ and not from Python: 5%
    and 7% of a toy step. `reorder_for_locality` would move the write of `decode_step` before its last read, which copies
    the whole cache."""
    return torch.compile(function, options={"size_asserts": False, "cpp_wrapper": cpu,
                                            "reorder_for_locality": function is not decode_step})


class KVCache:
    """What sampling keeps: `prompts` (L, 2, N, K, P, D), keys and values, and `answers` (L, 2, B, K, S, D).

    `arrange` says which answers there are: row b goes on from prompt owner[b]. Of their slots the first `used` are in use,
    as the caller says, who knows it without asking the device.
    Slots start at zero, because what is masked is still multiplied by 0, and uninitialised memory may hold a NaN.
    Each dimension is larger than the part that a compiled step reads, and that part is never 1: torch.compile would make
    other graphs. Such a step may run more rows than are live (`fitting`): spare ones attend to prompt 0 and write to slot 0.
    """

    def __init__(self, config, prompts: int, prompt_slots: int, rows: int, slots: int, dtype=torch.float32, device="cpu",
                 compiled: bool = False):
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        prompts, prompt_slots, rows, slots = (size + 2 for size in (prompts, prompt_slots, fitting(rows), slots))
        self.prompts = torch.zeros(layers, 2, prompts, K, prompt_slots, D, dtype=dtype, device=device)
        self.answers = torch.zeros(layers, 2, rows, K, slots, D, dtype=dtype, device=device)
        self.slots = torch.arange(slots, dtype=torch.int32, device=device)
        self.used, self.compiled = 0, compiled
        starts = torch.arange(rows * K, dtype=torch.int32, device=device).view(rows, K, 1) * slots
        self.starts = starts.repeat_interleave(config.num_attention_heads // K, 1)  # (B, K*G, 1)

    def put_prompts(self, first: int, filled: "PromptCache"):
        """Copy prefilled prompts to places first, first + 1, ...; there is always room: it doubles when it is short."""
        n, _, p, _ = filled.layers[0][0].shape
        while first + n >= self.prompts.shape[2]:
            self.prompts = doubled(self.prompts)
        for layer, pair in enumerate(filled.layers):
            self.prompts[layer, :, first : first + n, :, :p] = torch.stack(pair)

    def move_prompts(self, sources: list[int], places: list[int]):
        self.prompts[:, :, places] = self.prompts[:, :, sources]

    def move_rows(self, sources: list[int], places: list[int]):
        self.answers[:, :, places, :, : self.used] = self.answers[:, :, sources, :, : self.used]

    def arrange(self, owner: list[int], lengths: list[int]):
        """Row b answers prompt owner[b]; lengths: tokens kept of each prompt, by place."""
        members: list[list[int]] = [[] for _ in range(max(2, len(lengths)))]
        for row, prompt in enumerate(owner):
            members[prompt].append(row)
        most = max(2, *map(len, members))
        grid = [rows + [0] * (most - len(rows)) for rows in members]
        rank = {row: rank for rows in members for rank, row in enumerate(rows)}
        place = [prompt * most + rank[row] for row, prompt in enumerate(owner)]
        device, spare = self.answers.device, [0] * (self.answers.shape[2] - len(owner))
        self.grid, self.place = torch.tensor(grid, device=device), torch.tensor(place + spare, device=device)  # (N, J), (B,)
        self.prompt_lengths = torch.tensor([lengths[prompt] for prompt in owner] + spare, device=device)  # (B,)
        self.owned = torch.arange(len(self.place), device=device) < len(owner)  # (B,)
        self.prompt_limit = max(2, *lengths)
        seen = torch.tensor([*lengths, 0, 0][: len(grid)], device=device)
        self.prompt_bias = _bias(torch.arange(self.prompt_limit, device=device) < seen[:, None])  # (N, P)

    def run_step(self, advance: Callable[[int, int], None], rows: int, longest: int):
        """advance(rows, longest), which calls `step`; if compiled, for as many rows as are `fitting`."""
        advance(fitting(rows) if self.compiled else rows, longest)

    def step(self, model, longest: int, draw: Callable, newest: Tensor, lengths: Tensor, *more) -> Any:
        """Runs the newest token (B,) of each row, keeps its keys and values, and gives its hidden states (B, C) to
        draw(model, hidden, newest, lengths, *more), which draws the next; if compiled, all in one graph.

        lengths (B,): slots of its answer that a row has filled, and longest the most of these; the newest token goes to the
        next slot, so in `generate` the prompt's last to slot 0. `draw` may change them. If compiled, what changes in size
        must be marked (`mark`)."""
        B, prompts = len(newest), self.prompts[:, :, : len(self.grid), :, : self.prompt_limit]
        self.used, slots = longest + 1, self.slots[: max(2, longest)]
        return run_graph(decode_step, self.compiled, SIZES, model, self.answers, prompts, slots, self.prompt_lengths[:B],
                         self.owned[:B], self.grid, self.place[:B], self.prompt_bias, self.flat(B, slots), draw, newest,
                         lengths, *more)

    def flat(self, rows: int, slots: Tensor) -> Tensor | None:
        """(B*K*G, S): where the values of each query's slots stand among all of a layer, one (D,) after another.

        Only for a compiled step on a CPU: weighted sums of rows of that table, read in their order, take a sixth to
        two thirds less time there than matrix products in fp32 or than the loop that torch.compile makes (docs/log.md)."""
        if not (self.compiled and slots.is_cpu):
            return None
        return (self.starts[:rows] + slots).flatten(0, 1)


def doubled(prompts: Tensor) -> Tensor:
    """The same with as much room again, zeros, in dimension 2."""
    n = prompts.shape[2]
    grown = prompts.new_zeros(*prompts.shape[:2], 2 * n, *prompts.shape[3:])
    grown[:, :, :n] = prompts
    return grown


def fitting(rows: int) -> int:
    """The next multiple of four: of 15 rows a compiled step on a CPU takes a fifth to a third longer than of 16."""
    return -(-rows // 4) * 4


def _bias(seen: Tensor) -> Tensor:
    """0 where there is something to see, elsewhere the lowest number: of -inf alone, as where a prompt is empty, a softmax
    would be NaN."""
    return torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, torch.finfo(torch.float32).min)


class PromptCache:
    """Keys and values of prompts (N, P), padded on the right, as one forward pass leaves them for a `KVCache`."""

    def __init__(self):
        self.layers: list[tuple[Tensor, Tensor]] = []  # (N, K, P, D) each

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.layers.append((k.transpose(1, 2), v.transpose(1, 2)))
        return causal_attention(layer, q, k, v)
