"""Attention on an NVIDIA GPU in bf16 or fp16, by torch's own fused kernel for texts of different lengths.

`varlen` is that kernel (FlashAttention-2, arXiv 2307.08691), which gives the logsumexp of a query's scores beside what it
finds, so that what it finds in several places can be joined. It reads the keys that are in use and no others, wherever they
lie, and where they lie is data on the device. So a decoding step of `FlashCache` has the same shapes and addresses as the
next: it is recorded once as a CUDA graph, and played again without Python. Elsewhere `cache.KVCache` does the same.

Axes: N prompts of P slots, B rows of S slots, L layers, H query and K key heads, G = H / K, D head size, Q queries.
"""
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from minibridge.cache import KVCache, PromptCache, doubled, run_graph

FEWEST_ROWS = 16  # for fewer a step takes no less time


def usable(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether there is a kernel: from Ampere on, and not while the fused ones are switched off (`sdpa_kernel`)."""
    return (device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256
            and torch.backends.cuda.flash_sdp_enabled()
            and not (torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)))  # a plan needs no GPU


def varlen(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, most: tuple[int, int], causal: bool = False,
           used: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What q (Q, H, D) finds in k and v (.., K, D), (Q, H, D), and the logsumexp of its scores, (H, Q) fp32.

    Text i has the queries from queries[i] to queries[i + 1], and the keys from keys[i] on, to keys[i + 1] or `used[i]`
    of them (int32 all); if `causal`, its last query meets all of them, the query before it all but the last, and so on.
    most: the most queries and keys that a text has. Without any keys it finds 0, with a logsumexp of +inf.
    """
    return torch.ops.aten._flash_attention_forward(q, k, v, queries, keys, *most, 0.0, causal, False, seqused_k=used)[:2]


def varlen_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor, queries: Tensor, keys: Tensor,
                    most: tuple[int, int], causal: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for q, k and v, given that for `out`. Of what was joined, `out` and `sums` are the joint ones."""
    seed, unused = torch.zeros(2, dtype=torch.uint64, device=q.device), torch.empty(0, device=q.device)  # no dropout
    return torch.ops.aten._flash_attention_backward(grad, q, k, v, out, sums, queries, keys, *most, 0.0, causal, seed,
                                                    unused)


def decoding_cache(config, prompts: int, prompt_slots: int, rows: int, slots: int, dtype: torch.dtype, device: torch.device,
                   compiled: bool) -> "KVCache | FlashCache":
    kind = FlashCache if usable(device, dtype, config.head_dim) else KVCache
    return kind(config, prompts, prompt_slots, rows, slots, dtype, device, compiled)


def decode_block(block, x: Tensor, cos: Tensor, sin: Tensor, prompts: Tensor, answers: Tensor, order: Tensor, place: Tensor,
                 by_prompt: Tensor, prompt_starts: Tensor, prompt_lengths: Tensor, by_row: Tensor, row_starts: Tensor,
                 answer_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's part of a decoding step on x (B, 1, C): its output, and the new keys and values (2, B, K, D).

    Each row attends to its prompt, of prompts (2, N, P, K, D), to the tokens of its answer, of answers (2, B, S, K, D), and
    to itself. For the kernel the G queries of a key head are a text's, by prompt those of all its answers. All int32:
    order (B,), rows sorted by prompt; place (B,), where a row is among them; by_prompt (N + 1,) and by_row (B + 1,), where
    a text's queries begin; prompt_starts and row_starts, where its keys do; prompt_lengths (N,) and answer_lengths (B,).
    """
    new = []

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (B, _, K, D), (P, S) = k.shape, (prompts.shape[2], answers.shape[2])
        new.append(torch.stack((k[:, 0], v[:, 0])))
        q = q.view(B, K, -1, D).transpose(1, 2)  # (B, G, K, D); k and v (B, 1, K, D)
        G = q.shape[1]
        shared = varlen(q[order].flatten(0, 1), *prompts.flatten(1, 2), by_prompt, prompt_starts, (B * G, P),
                        used=prompt_lengths)
        own = varlen(q.flatten(0, 1), *answers.flatten(1, 2), by_row, row_starts, (G, S), used=answer_lengths)
        shared, shared_sums = (x.unflatten(0, (B, G))[place] for x in (shared[0], shared[1].T))  # (B, G, K, ...)
        own, own_sums = (x.unflatten(0, (B, G)) for x in (own[0], own[1].T))
        itself = (q.float() * k.float()).sum(-1) * D**-0.5  # (B, G, K)
        sums = torch.stack((shared_sums, own_sums, itself))
        share = sums.masked_fill(sums == torch.inf, -torch.inf).softmax(0)[..., None]  # inf: where there are no keys
        out = share[0] * shared + share[1] * own + share[2] * v
        return out.to(q.dtype).transpose(1, 2).reshape(B, 1, -1, D)

    return block(x, (cos, sin), 0, attend), new[0]


# Of `decode_block`'s inputs those that change in size, by place: rows, prompts, slots.
SIZES = {place: (0,) for place in range(1, 14)} | {4: (1, 2), 5: (1, 2)}


class FlashCache:
    """`KVCache` for `varlen`: `prompts` (L, 2, N, P, K, D) and `answers` (L, 2, B, S, K, D), of which the kernel reads
    what it is told to.

    If `compiled`, a step works on all rows, or on half of them, a quarter, ... as long as those hold the live ones;
    what it does for the others nobody reads.
    """

    def __init__(self, config, prompts: int, prompt_slots: int, rows: int, slots: int, dtype: torch.dtype,
                 device: torch.device, compiled: bool):
        layers, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        self.prompts = torch.zeros(layers, 2, prompts, prompt_slots, K, D, dtype=dtype, device=device)
        self.answers = torch.zeros(layers, 2, rows, slots, K, D, dtype=dtype, device=device)
        self.grouped, self.compiled = config.num_attention_heads // K, compiled
        self._lay_out()

    def _lay_out(self):
        """What is known of the sizes alone, and room for what `arrange` says; graphs of an earlier layout are gone."""
        (N, P), (B, S) = self.prompts.shape[2:4], self.answers.shape[2:4]
        def multiples(count: int, of: int) -> Tensor:
            return torch.arange(count, dtype=torch.int32, device=self.answers.device) * of
        self.rows, self.by_row = multiples(B, 1), multiples(B + 1, self.grouped)
        self.row_starts, self.prompt_starts = multiples(B + 1, S), multiples(N + 1, P)
        self.layout = torch.zeros(3 * B + 2 * N + 1, dtype=torch.int32, device=self.answers.device)
        parts = self.layout.split((B, B, B, N + 1, N))
        self.order, self.place, self.row_prompts, self.by_prompt, self.prompt_lengths = parts
        self.graphs: dict[int, torch.cuda.CUDAGraph | None] = {}
        self.memory = None

    def put_prompts(self, first: int, filled: PromptCache):
        """As `KVCache.put_prompts`."""
        n, _, p, _ = filled.layers[0][0].shape
        while first + n > self.prompts.shape[2]:
            self.prompts = doubled(self.prompts)
            self._lay_out()
        for layer, pair in enumerate(filled.layers):
            self.prompts[layer, :, first : first + n, :p] = torch.stack(pair).transpose(2, 3)

    def move_prompts(self, sources: list[int], places: list[int]):
        self.prompts[:, :, places] = self.prompts[:, :, sources]

    def move_rows(self, sources: list[int], places: list[int]):
        self.answers[:, :, places] = self.answers[:, :, sources]

    def arrange(self, owner: list[int], lengths: list[int]):
        """Row b answers prompt owner[b]; lengths: tokens kept of each prompt, by place."""
        B, N = self.answers.shape[2], self.prompts.shape[2]
        order = sorted(range(len(owner)), key=owner.__getitem__) + [*range(len(owner), B)]
        place = sorted(range(B), key=order.__getitem__)
        answers = [0] * N
        for prompt in owner:
            answers[prompt] += self.grouped
        spare = [1] * (N - len(lengths))
        asked = [lengths[prompt] for prompt in owner] + [1] * (B - len(owner))
        self.layout.copy_(torch.tensor(order + place + asked + [*accumulate(answers, initial=0)] + lengths + spare))

    def run_step(self, advance: Callable[[int, int], None], rows: int, longest: int):
        """advance(rows, longest), which calls `step`: at first itself, which compiles what is not yet, then by a graph
        of it."""
        if not self.compiled:
            return advance(rows, longest)
        size = self.answers.shape[2]
        while size // 2 >= max(rows, FEWEST_ROWS):
            size //= 2
        if size not in self.graphs:
            self.graphs[size] = None
            return advance(size, 0)
        if self.graphs[size] is None:
            self.graphs[size] = self._recorded(advance, size)
        self.graphs[size].replay()

    def _recorded(self, advance: Callable[[int, int], None], size: int) -> torch.cuda.CUDAGraph:
        self.memory = self.memory or torch.cuda.graph_pool_handle()  # graphs take turns, so they share it
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, self.memory):
            advance(size, 0)
        return graph

    def step(self, model, longest: int, draw: Callable, newest: Tensor, lengths: Tensor, *more) -> Any:
        """As `KVCache.step`."""
        B = len(newest)
        written = lengths.clamp(max=self.answers.shape[3] - 1)  # (B,): the new slots
        read = (self.order[:B], self.place[:B], self.by_prompt, self.prompt_starts, self.prompt_lengths,
                self.by_row[: B + 1], self.row_starts[: B + 1], written.int())
        (x, rope), new = model.embed(newest[:, None], (self.row_prompts[:B] + written)[:, None]), []
        for block, prompts, answers in zip(model.model.layers, self.prompts, self.answers):
            x, added = run_graph(decode_block, self.compiled, SIZES, block, x, *rope, prompts, answers, *read)
            new.append(added)
        self.answers[:, :, self.rows[:B], written] = torch.stack(new)
        hidden = model.model.norm(x)[:, 0]
        return run_graph(draw, self.compiled and B > 1, {1: (0,)}, model, hidden, newest, lengths, *more)
