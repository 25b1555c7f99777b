"""Attention in training: texts end to end in one line, of which several may go on from the same tokens.

Axes: S tokens of the line, B rows of L tokens, T tokens of a text, H query and K key heads, D head size.
"""
from collections.abc import Iterable
from itertools import accumulate, groupby
from operator import itemgetter

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minibridge import flash
from minibridge.cache import causal_attention

# How many places of `Packed` rows a micro-batch may have for each of its tokens, since rows copy their prompt. It holds
# where there are no rows too, so that a step's micro-batches are the same on every device.
PLACES = 2
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Packed:
    """Attention in texts whose tokens lie end to end in one line of S tokens: the model sees (1, S), and no padding.

    Text i has lengths[i] tokens. It continues text number after[i], to all of which it attends too, or none (None): so do
    answers their prompt, which stands in the line once for all of them. A text that is continued continues no other.

    If `in_pieces`, each text attends to itself, and neighbouring answers attend to their prompt in one call: nothing is
    copied. Elsewhere each layer copies q, k and v to `rows` (B, L), which hold a prompt and one answer each, and reads the
    results back from there (`first` (S,): the place of a token's first copy); slots past a row's end hold arbitrary tokens.
    """

    def __init__(self, lengths: list[int], after: list[int | None]):
        self.spans = [slice(start, start + length) for start, length in zip(accumulate(lengths, initial=0), lengths)]
        self.after, self.lengths, self.shared = after, [length for length in lengths if length], []
        for before, run in groupby(zip(after, self.spans), itemgetter(0)):
            texts = [span for _, span in run]
            if before is not None and lengths[before] and texts[0].start < texts[-1].stop:
                self.shared.append((slice(texts[0].start, texts[-1].stop), self.spans[before]))
        self.rows = self.pieces = None

    @torch.compiler.disable  # it is the kernels' own; what is around it compiles
    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if in_pieces(q.device, q.dtype, k.shape[2], q.shape[3]):
            if self.pieces is None:
                self.pieces = (_OnCPU if q.is_cpu else _OnGPU)(self.lengths, self.shared, q.device)
            return _PieceAttention.apply(q[0], k[0], v[0], self.pieces, self.shared)[None]
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
        # known without asking the device
        longest = max(before.stop - before.start + own.stop - own.start for before, own in last)
        slot = torch.arange(longest, device=device)  # (L,)
        self.rows = (slot + torch.where(slot < given, begins, start - given)).clamp(max=tokens - 1)  # (B, L)
        real, places = slot < slots, torch.arange(self.rows.numel(), device=device).view_as(self.rows)
        never = places.new_full((tokens,), places.numel())
        self.first = never.scatter_reduce(0, self.rows[real], places[real], "amin")  # (S,)


def in_pieces(device: torch.device, dtype: torch.dtype, key_heads: int, head_dim: int) -> bool:
    """Whether training attention goes by pieces. On a GPU where `flash.varlen` can; on a CPU unless the fused kernels
    are switched off (`sdpa_kernel`; its switch is named after CUDA, but is for all), or there are more threads than key
    heads, since the kernel's backward pass has one thread for each of these in a piece."""
    if device.type == "cuda":
        return flash.usable(device, dtype, head_dim)
    return torch.backends.cuda.flash_sdp_enabled() and torch.get_num_threads() <= key_heads


class _PieceAttention(torch.autograd.Function):
    """Attention (S, H, D) of q (S, H, D) over k and v (S, K, D): of each text over itself, causally, and of `shared`,
    pairs of slices, of the first over all of the second.

    What a query finds in two places is joined by the logsumexp of its scores in each. Given the joint one, a kernel's
    backward pass finds each place's share of the gradient by itself.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, pieces, shared: list[tuple[slice, slice]]) -> Tensor:
        out, total = pieces.texts(q, k, v)  # (S, H, D), and (S, H) in fp32 at least
        for queries, keys in shared:
            values, sums = pieces.whole(q[queries], k[keys], v[keys])
            before, gain = out[queries].to(sums.dtype), (sums - total[queries]).sigmoid()[..., None]
            out[queries] = torch.lerp(before, values.to(sums.dtype), gain)
            total[queries] = torch.logaddexp(total[queries], sums)
        ctx.save_for_backward(q, k, v, out, total)
        ctx.pieces, ctx.shared = pieces, shared
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        q, k, v, out, total = ctx.saved_tensors
        grads = ctx.pieces.texts_backward(grad, q, k, v, out, total)
        for queries, keys in ctx.shared:
            parts = ctx.pieces.whole_backward(grad[queries], q[queries], k[keys], v[keys], out[queries], total[queries])
            for sum_, part, here in zip(grads, parts, (queries, keys, keys)):
                sum_[here] += part
        return *grads, None, None


class _OnGPU:
    """`flash.varlen` on all texts at once, which have these lengths."""

    def __init__(self, lengths: list[int], shared: list[tuple[slice, slice]], device: torch.device):
        self.starts = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
        self.most = max(lengths), max(lengths)
        sizes = {span.stop - span.start for pair in shared for span in pair}
        self.ends = {size: torch.tensor([0, size], dtype=torch.int32, device=device) for size in sizes}

    def texts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, sums = flash.varlen(q, k, v, self.starts, self.starts, self.most, causal=True)
        return out, sums.T.contiguous()

    def texts_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
                       total: Tensor) -> tuple[Tensor, ...]:
        sums = total.T.contiguous()
        return flash.varlen_backward(grad, q, k, v, out, sums, self.starts, self.starts, self.most, causal=True)

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, sums = flash.varlen(q, k, v, self.ends[len(q)], self.ends[len(k)], (len(q), len(k)))
        return out, sums.T

    def whole_backward(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
                       total: Tensor) -> tuple[Tensor, ...]:
        sums, ends = total.T.contiguous(), (self.ends[len(q)], self.ends[len(k)])
        return flash.varlen_backward(grad, q, k, v, out, sums, *ends, (len(q), len(k)))


class _OnCPU:
    """The kernel for CPUs, on neighbours of one length at once; made by the same words as `_OnGPU`. Last axes must be
    contiguous: called without the checks of `scaled_dot_product_attention`, it takes that for granted."""

    def __init__(self, lengths: list[int], shared: list[tuple[slice, slice]], device: torch.device):
        self.runs = [(length, len([*run])) for length, run in groupby(lengths)]

    def texts(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        found = [_FLASH(*texts, is_causal=True) for texts in zip(*self._views(q, k, v))]
        return _line(values for values, _ in found), _line(sums for _, sums in found)

    def texts_backward(self, *arrays: Tensor) -> list[Tensor]:
        found = [_FLASH_BACKWARD(*texts, 0.0, True) for texts in zip(*self._views(*arrays))]
        return [_line(parts) for parts in zip(*found)]

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        values, sums = _FLASH(*(x.transpose(0, 1)[None] for x in (q, k, v)))
        return values[0].transpose(0, 1), sums[0].T

    def whole_backward(self, *arrays: Tensor) -> list[Tensor]:
        return [part[0].transpose(0, 1) for part in _FLASH_BACKWARD(*(x.transpose(0, 1)[None] for x in arrays), 0.0, False)]

    def _views(self, *arrays: Tensor) -> list[list[Tensor]]:
        """Views (B, H, T, ...) of each array (S, H, ...): neighbours of one length are rows of one view."""
        sizes = [length * count for length, count in self.runs]
        return [[part.unflatten(0, (count, length)).transpose(1, 2)
                 for part, (length, count) in zip(x.split(sizes), self.runs)]
                for x in arrays]


def _line(parts: Iterable[Tensor]) -> Tensor:
    """(S, H, ...) of views."""
    return torch.cat([part.transpose(1, 2).flatten(0, 1) for part in parts])
