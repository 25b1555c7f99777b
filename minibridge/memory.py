"""Bytes that training and decoding take, counted from the shapes alone, op by op, as the code allocates them.

    held        what is there all the time: parameters, Adam's moments, the reference
    training    one micro-batch, from its first forward pass to the end of its backward pass
    highest     the same, of the way to pack a step's rows into micro-batches that takes most
    decoding    `generate.generate`: the cache, and the largest of what comes and goes beside it

Each gives the bytes of the highest moment by what they are for. The counts follow model.py, cache.py, policy.py,
logprob.py, generate.py and sampling.py and must change with them; tests/test_memory.py holds them to what the allocator
reports. Not counted: ids and masks, what the allocator loses between blocks, what libraries take for themselves.

Axes: N prompts of P tokens, B answers of T tokens, C hidden, V vocabulary, L layers.
"""
from collections import Counter
from dataclasses import dataclass

from minibridge.generate import prefill_batch
from minibridge.logprob import COMPILE_ELEMENTS, chunk_tokens
from minibridge.model import Decoder, ModelConfig

ITEMS = ("this process", "parameters", "Adam's moments", "reference", "gradients", "keys and values", "activations",
         "attention masks", "casts of weights", "logits and loss", "work space")
Pass = tuple[int, int, int | None]  # rows, tokens of each, tokens of the prompt that each goes on from (None: no prompt)


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
    def cast(self) -> int:
        """Bytes of a weight's copy in the dtype of the activations; 0 if it has that dtype already."""
        return self.size if self.size < 4 else 0

    @property
    def normed(self) -> int:
        """Bytes that a norm keeps of each number: its input, as it is where it has a kernel of its own (CUDA), else in
        fp32 and normed."""
        return self.size if self.cuda else 8

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


def layer(s: Sizes, rows: int, tokens: int, prompt: int | None) -> Counter:
    """What autograd keeps of one layer for the backward pass."""
    c, n, width = s.config, rows * tokens, s.config.num_attention_heads * s.config.head_dim
    group = c.num_attention_heads // c.num_key_value_heads
    each = 2 * (s.normed + s.size) * c.hidden_size        # of both norms what they keep, and their output
    each += 4 * s.size * c.intermediate_size              # gate, silu(gate), up, and their product
    each += 2 * s.size * width + 4 * c.num_attention_heads  # queries, attention's output and its fp32 logsumexp
    if c.model_type == "qwen3":
        each += s.normed * (width + s.key_width)          # the norms of queries and keys
    slots, masks = n, 0                                   # keys and values
    if prompt is not None:                                # cache.PromptCache._read: each answer has its prompt's again,
        slots = rows * (prompt + tokens)
        each += s.size * width * (group > 1)              # and the output in the order of the heads
    elif s.cuda and s.size == 4 and group > 1:            # no fused kernel takes these: all weights, keys for every head
        masks = 4 * c.num_attention_heads * n * tokens
        each += 2 * s.size * (width - s.key_width)
    return Counter({"activations": n * each + 2 * s.size * s.key_width * slots, "attention masks": masks})


def bias(s: Sizes, rows: int, tokens: int, prompt: int | None) -> int:
    """Bytes of cache.PromptCache's bias of answers, one for each query of a group, which all layers share."""
    group = s.config.num_attention_heads // s.config.num_key_value_heads
    return 0 if prompt is None else s.size * group * rows * tokens * (prompt + tokens)


def kept(s: Sizes, passes: list[Pass]) -> Counter:
    """What autograd keeps of whole forward passes."""
    total, layers = Counter(), s.config.num_hidden_layers
    for rows, tokens, prompt in passes:
        n = rows * tokens
        total["activations"] += n * (s.normed * s.config.hidden_size + 8 * s.config.head_dim)  # last norm, cos and sin
        total["attention masks"] += bias(s, rows, tokens, prompt)
        if s.checkpointing:  # the input of each layer; keys and values of prompts
            total["activations"] += n * layers * s.size * s.config.hidden_size
            if prompt is None and len(passes) > 1:
                total["activations"] += n * s.slot
        else:
            for name, bytes_ in layer(s, rows, tokens, prompt).items():
                total[name] += layers * bytes_
            total["casts of weights"] += s.cast * s.body
    return total


def training(s: Sizes, passes: list[Pass], first: bool, entropy: bool) -> Counter:
    """The highest moment of one micro-batch, without what `held` counts; `first`: there are no gradients before it."""
    c, layers, (rows, tokens, _), shared = s.config, s.config.num_hidden_layers, passes[-1], passes[:-1]
    n, whole, head = rows * tokens, kept(s, passes), 4 * s.head
    before, gradients = whole - kept(s, passes[-1:]), 0 if first else 4 * s.weights
    # What two passes use waits for the second's share: keys and values of the prompts, and each weight for its gradient.
    before["activations"] += sum(s.slot * rows * tokens for rows, tokens, _ in shared)
    waiting = 4 * s.body if first or shared else 0
    chunk = chunk_tokens(n, c.vocab_size) * c.vocab_size
    logit = 4 + s.cast if chunk >= COMPILE_ELEMENTS else 16 if entropy else 8  # eager: logps, exp and their product too
    # A layer's backward pass: the gradient that comes in, and the MLP's two before it has freed as much; what checkpointing
    # left out is there again.
    grown = [s.size * rows * tokens * (c.hidden_size + 2 * c.intermediate_size) for rows, tokens, _ in passes]
    again = [layer(s, *shape).total() + s.cast * s.body // layers for shape in passes]
    tied = c.tie_word_embeddings
    moments = [
        # the loss: hidden states and the head, with their gradients
        whole + Counter({"gradients": gradients, "logits and loss": (
            2 * s.size * n * c.hidden_size + s.cast * s.head + head + logit * chunk)}),
        # the backward pass of the last layer, of the first, and of the embedding
        whole + Counter({"gradients": gradients, "logits and loss": head,
                         "work space": grown[-1] + again[-1] * s.checkpointing}),
        before + Counter({"gradients": gradients + waiting + head * (tied or first), "work space": grown[-1] + again[-1],
                          "attention masks": bias(s, *passes[-1])}),
        before + Counter({"gradients": gradients + waiting + head * (2 if tied else 1 + first)}),
        # the same of the prompts: the last layer, whose norm is done with, and the embedding
        *(before + Counter({"gradients": gradients + waiting + head * (1 if tied else 1 + first), "work space": (
            grown[0] + again[0] * s.checkpointing - rows * tokens * s.normed * c.hidden_size)})
          for rows, tokens, _ in shared),
        Counter({"gradients": gradients + 4 * s.body * first + head * (2 if tied else len(passes) + first)}),
    ]
    return max(moments, key=Counter.total)


def highest(s: Sizes, answers: int, group: int, prompt: int, longest: int, limit: int, entropy: bool) -> Counter:
    """Of all ways to pack `answers` of at most `longest` tokens, `group` of them to a prompt, into micro-batches of
    `limit` padded tokens, prompts included, the one that takes most. prompt 0: the rows are examples without a prompt."""
    found, count = Counter(), 0
    while count < answers:
        count = min(answers, max(count + 1, count * 11 // 10))
        tokens = min(longest, (limit - -(-count // group) * prompt) // count)
        for rows, first in ((count, True), (min(count, answers - count), False)):
            if tokens > 0 and rows > 0:
                passes = [(-(-rows // group), prompt, None), (rows, tokens, prompt)] if prompt else [(rows, tokens, None)]
                found = max(found, training(s, passes, first, entropy), key=Counter.total)
    return found


def decoding(s: Sizes, prompts: int, samples: int, prompt: int, answer: int, rows: int) -> Counter:
    """The highest moment of `generate.generate`, without what `held` counts."""
    c, live, batch = s.config, min(rows, prompts * samples), min(prompts, prefill_batch(rows, samples, prompt))
    places = min(-(-rows // samples) + batch, prompts)  # unless answers of more prompts live at once, one or two of each
    cache = (places + 2) * (prompt + 2) + (live + 2) * (answer + 2)  # slots of cache.KVCache
    drawing = max(12 * live * c.vocab_size, s.cast * s.head)  # logits, probabilities, and these in blocks
    scores = 12 * live * c.num_attention_heads * max(prompt, answer)
    prefill = batch * prompt * (s.slot + s.size * (3 * c.intermediate_size + 2 * c.hidden_size))
    return Counter({"keys and values": s.slot * cache, "work space": max(drawing, scores, prefill)})


def held(s: Sizes, reference: bool) -> Counter:
    """What is there all the time, from the second step on."""
    items = Counter({"parameters": 4 * s.weights, "Adam's moments": 8 * s.weights})
    return items + Counter({"reference": s.size * s.weights * reference})
