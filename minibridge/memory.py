"""Bytes that training and decoding take, counted from the shapes alone, op by op, as the code allocates them.

    held        what is there all the time: parameters, Adam's moments, the reference
    training    one micro-batch, from its first forward pass to the end of its backward pass
    highest     the same, of the way to pack a step's rows into micro-batches that takes most
    decoding    `generate.generate`: the cache, and the largest of what comes and goes beside it

Each gives the bytes of the highest moment by what they are for. The counts follow model.py, functional.py, cache.py,
packed.py, policy.py, logprob.py, generate.py and sampling.py and must change with them; tests/test_memory.py holds them
to what the allocator reports. Not counted: ids and masks, what the allocator loses between blocks, what libraries take
for themselves.

Axes: N prompts of P tokens, B answers of T tokens, C hidden, V vocabulary, L layers.
"""
import itertools
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import torch

from minibridge.cache import fitting
from minibridge.packed import PLACES, in_pieces
from minibridge.functional import MLP_ROWS
from minibridge.generate import prefill_batch, prompt_places
from minibridge.logprob import COMPILE_ELEMENTS, chunk_tokens
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig

ITEMS = ("this process", "parameters", "Adam's moments", "copy to sample with", "reference", "gradients", "keys and values",
         "activations", "casts of weights", "logits and loss", "work space")


class Line(NamedTuple):
    """A micro-batch as the model sees it: tokens end to end, and the rows of them that attention copies them to, where
    it does (`packed.Packed`)."""
    tokens: int
    rows: int
    slots: int   # tokens of the longest row
    scored: int  # tokens whose log-probabilities are asked for


@dataclass(frozen=True)
class Sizes:
    """What bytes hang on."""
    config: ModelConfig
    body: int            # parameters but for embedding and head
    head: int            # those of the head: V * C
    size: int            # bytes of an activation: 4 for fp32, 2 for bf16
    cuda: bool
    checkpointing: bool

    @property
    def weights(self) -> int:
        return self.body + self.head * (1 if self.config.tie_word_embeddings else 2)

    @property
    def mlp_by_hand(self) -> bool:
        """Whether it is `functional.swiglu`."""
        return not self.cuda and not self.config.mlp_bias

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.size == 2 else torch.float32

    @property
    def cast(self) -> int:
        """Bytes of a weight's copy in the dtype of the activations; 0 if it has that dtype already."""
        return self.size if self.size < 4 else 0

    @property
    def key_width(self) -> int:
        return self.config.num_key_value_heads * self.config.head_dim

    @property
    def slot(self) -> int:
        """Keys and values of one token in all layers."""
        return 2 * self.config.num_hidden_layers * self.key_width * self.size


def sizes(model: Decoder, size: int, cuda: bool, checkpointing: bool) -> Sizes:
    """`model` may be on the meta device."""
    head = model.lm_head_weight.numel()
    body = sum(parameter.numel() for parameter in model.parameters())
    return Sizes(model.config, body - head * (1 if model.config.tie_word_embeddings else 2), head, size, cuda, checkpointing)


def layer(s: Sizes, line: Line) -> int:
    """Bytes that autograd keeps of one layer for the backward pass."""
    c, width = s.config, s.config.num_attention_heads * s.config.head_dim
    each = 4 * s.size * c.hidden_size                     # input and output of both norms
    # gate, up; and if autograd does it silu(gate), product
    each += (2 if s.mlp_by_hand else 4) * s.size * c.intermediate_size
    each += s.size * width                                # attention's output
    if c.model_type == "qwen3":
        each += s.size * (width + s.key_width)            # into the norms of queries and keys
    met = s.size * (width + 2 * s.key_width) + 4 * c.num_attention_heads  # what attention keeps: q, k, v, fp32 logsumexp
    if in_pieces(torch.device("cuda" if s.cuda else "cpu"), s.dtype, c.num_key_value_heads, c.head_dim):
        return line.tokens * (each + met)
    if s.cuda and s.size == 4:                            # keys and values for every head
        met += 2 * s.size * (width - s.key_width)
    return line.tokens * each + line.rows * line.slots * (met + s.size * width)  # of its rows, and what it finds for them


def kept(s: Sizes, line: Line) -> Counter:
    """What autograd keeps of a whole forward pass."""
    layers = s.config.num_hidden_layers
    total = Counter({"activations": line.tokens * (s.size * s.config.hidden_size + 8 * s.config.head_dim)})  # cos and sin
    if s.checkpointing:  # the input of each layer
        return total + Counter({"activations": line.tokens * layers * s.size * s.config.hidden_size})
    return total + Counter({"activations": layers * layer(s, line), "casts of weights": s.cast * s.body})


def training(s: Sizes, line: Line, first: bool, entropy: bool) -> Counter:
    """The highest moment of one micro-batch, without what `held` counts; `first`: there are no gradients before it."""
    c, whole, head = s.config, kept(s, line), 4 * s.head
    gradients, waiting = (0, 4 * s.body) if first else (4 * s.weights, 0)
    chunk = chunk_tokens(line.scored, c.vocab_size) * c.vocab_size
    logit = 4 + s.cast if chunk >= COMPILE_ELEMENTS else 16 if entropy else 8  # eager: logps, exp and their product too
    # In the backward pass of a layer: the gradient that comes in, and the most that the MLP's own holds at a time; with
    # checkpointing also the layer's activations, which are there again.
    grown = s.size * line.tokens * (c.hidden_size + 2 * c.intermediate_size)
    if s.mlp_by_hand:
        rows = min(line.tokens, MLP_ROWS)
        grown = (s.size * (2 * line.tokens * c.hidden_size + 3 * rows * c.intermediate_size)
                 + 12 * c.hidden_size * c.intermediate_size)
    shared = s.size * line.tokens * c.hidden_size if s.checkpointing and (s.cuda or not s.cast) else 0  # the layer's input
    again = layer(s, line) - shared + s.cast * s.body // c.num_hidden_layers
    tied = c.tie_word_embeddings
    moments = [
        # the loss: hidden states and the head, with their gradients
        whole + Counter({"gradients": gradients, "logits and loss": (
            2 * s.size * line.scored * c.hidden_size + s.cast * s.head + head + logit * chunk)}),
        # the backward pass of the last layer, of the first, and of the embedding
        whole + Counter({"gradients": gradients, "logits and loss": head,
                         "work space": grown + again * s.checkpointing}),
        Counter({"gradients": gradients + waiting + head * (tied or first), "work space": grown + again}),
        Counter({"gradients": gradients + waiting + head * (2 if tied else 1 + first)}),
    ]
    return max(moments, key=Counter.total)


def highest(s: Sizes, answers: int, group: int, prompt: int, longest: int, limit: int, entropy: bool) -> Counter:
    """Of all ways to pack `answers` of at most `longest` tokens, `group` of them to a prompt of at most `prompt`, into
    micro-batches of `limit` tokens as `policy.pack` does, the one that takes most. prompt 0: rows without a prompt."""
    prompts = -(-answers // group)
    one = prompts * prompt + answers * longest <= limit and answers * (prompt + longest) <= PLACES * limit
    found, rows = Counter(), 0
    while rows < answers:
        rows = min(answers, max(rows + 1, rows * 11 // 10))
        # Prompts of so many neighbours, their groups whole or cut; and whether there are gradients of another micro-batch.
        asking = {-(-rows // group), min(prompts, 1 + -(-(rows - 1) // group))}
        for first, asked in itertools.product({True, one or rows == answers}, asking):
            for given in _corners(rows, asked, prompt, longest, limit):
                tokens = min(longest, (limit - asked * given) // rows, PLACES * limit // rows - given)
                if tokens > 0:
                    line = Line(asked * given + rows * tokens, rows, given + tokens, rows * tokens)
                    found = max(found, training(s, line, first, entropy), key=Counter.total)
    return found


def _corners(rows: int, asked: int, prompt: int, longest: int, limit: int) -> set[int]:
    """Lengths of prompts with which rows could take most: memory grows with them and with the answers, so that it is highest
    where two of the four limits meet (longest prompt, longest answer, tokens, places)."""
    found = {prompt, PLACES * limit // rows - longest, (limit - rows * longest) // asked}
    if rows > asked:
        found.add((PLACES - 1) * limit // (rows - asked))
    return {min(prompt, max(1, length)) for length in found} if prompt else {0}


def decoding(s: Sizes, prompts: int, samples: int, prompt: int, answer: int, rows: int) -> Counter:
    """The highest moment of `generate.generate`, without what `held` counts."""
    prompt = max(1, prompt - 1)  # its last token is run with the answers
    c, live, batch = s.config, min(rows, prompts * samples), min(prompts, prefill_batch(rows, samples, prompt))
    places = prompt_places(rows, samples, batch, prompts)
    slots = (places + 2) * (prompt + 2) + (fitting(live) + 2) * (answer + 2)  # of cache.KVCache
    drawing = 12 * live * c.vocab_size  # logits, probabilities, and these in blocks
    scores = 12 * live * c.num_attention_heads * max(prompt, answer)  # scores, less the highest, exp; or these and `flat`
    tokens = batch * prompt
    mlp_rows = min(tokens, MLP_ROWS) if s.mlp_by_hand else tokens  # at a time; of several parts it joins the results
    results = c.hidden_size * tokens * (mlp_rows < tokens)
    projected = 2 * (c.num_attention_heads * c.head_dim + s.key_width) * tokens  # q, k and v, and q rotated
    between = max(3 * c.intermediate_size * mlp_rows + results, 2 * results, projected) + 2 * c.hidden_size * tokens
    prefill = tokens * s.slot + s.size * between
    return Counter({"keys and values": s.slot * slots, "work space": max(drawing, scores, prefill)})


def held(s: Sizes, reference: bool, sampled: bool) -> Counter:
    """What is there all the time, from the second step on; sampled: with what sampling needs."""
    items = Counter({"parameters": 4 * s.weights, "Adam's moments": 8 * s.weights})
    items += Counter({"copy to sample with": s.cast * s.weights * sampled})  # `sharding.sampling_copy`
    return items + Counter({"reference": s.size * s.weights * reference})
