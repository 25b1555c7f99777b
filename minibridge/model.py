"""The decoder: Qwen2 / Qwen2.5, Qwen3 and Llama 3.x in one class.

One `forward` serves training, prefill and decoding (on a GPU `flash.FlashCache` runs the layers itself, to record its
steps); positions are an argument. Parameter names are those of Hugging Face's classes, so a checkpoint maps one to one.
Not here: text, sampling, losses, files. Departures from the library models: no dropout, no sliding window, and no attention
mask (what pads a row is on its right, where causality already keeps it from every real token).

Axes: B rows, T tokens, C hidden, H heads, K key/value heads, D head size, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minibridge.cache import Attend, Cache, causal_attention
from minibridge.functional import gated, linear, rms_norm, rotary_frequencies, rotate, swiglu
from minibridge.model_config import ModelConfig


class Linear(nn.Linear):
    """x Wᵀ + b in the dtype of x: here, in norms and in the MLP fp32 parameters meet bf16 activations.

    The weights are not set: `Decoder.init_weights` or a checkpoint fills them.
    """

    def reset_parameters(self):
        pass

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class RMSNorm(nn.Module):
    """`rms_norm` with a weight to train."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """What self-attention has of its own: projections to H query and K <= H key/value heads, and their rotary embeddings.
    Who attends to whom is for the `attend` that `Block.forward` is given."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        width = config.num_attention_heads * config.head_dim
        kv_width = config.num_key_value_heads * config.head_dim
        qkv_bias = config.attention_bias or config.model_type == "qwen2"
        self.q_proj = Linear(config.hidden_size, width, bias=qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_width, bias=qkv_bias)
        self.o_proj = Linear(width, config.hidden_size, bias=config.attention_bias)
        normed = config.model_type == "qwen3"  # each head on its own, before the rotation
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if normed else nn.Identity()

    def project(self, x: Tensor, rope) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (B, T, H, D) and k (B, T, K, D), and v (B, T, K, D)."""
        q = self.q_proj(x).unflatten(-1, (-1, self.head_dim))
        k = self.k_proj(x).unflatten(-1, (-1, self.head_dim))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(self.q_norm(q), *rope), rotate(self.k_norm(k), *rope), v


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202); without biases all three products are one function, so that
    forward hooks on its Linear modules are not called."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.gate_proj.bias is not None:
            return self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return swiglu(x, *(layer.weight.to(x.dtype) for layer in (self.gate_proj, self.up_proj, self.down_proj)))


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend) -> Tensor:
        """(B, T, C) of x (B, T, C); rope: cos and sin (B, T, 1, D)."""
        q, k, v = self.self_attn.project(self.input_layernorm(x), rope)
        x = x + self.self_attn.o_proj(attend(layer, q, k, v).flatten(2))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """The language model. Its activations are in compute_dtype, by default the dtype of the parameters.

    checkpointing: training keeps only what goes into each layer, and runs the layer again in the backward pass.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.compute_dtype: torch.dtype | None = None
        self.model = nn.Module()
        self.model.embed_tokens = Linear(config.hidden_size, config.vocab_size, bias=False)  # (V, C): a head too, if tied
        self.model.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: Module.to(bfloat16) would round it.
        self.frequencies = rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)

    @property
    def lm_head_weight(self) -> Tensor:
        """(V, C): the embedding itself when the head is tied."""
        return (self.model.embed_tokens if self.config.tie_word_embeddings else self.lm_head).weight

    @property
    def device(self) -> torch.device:
        return self.lm_head_weight.device

    @property
    def activation_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.lm_head_weight.dtype

    def forward(self, ids: Tensor, positions: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Final hidden states (B, T, C) of ids (B, T) at positions (B, T), by default 0 .. T - 1.

        Attention is causal among the tokens given, unless `cache` says otherwise (`packed.Packed` in training,
        `cache.PromptCache` in prefill, what `cache.KVCache` makes for a step of sampling).
        """
        if positions is None:
            positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        x, rope = self.embed(ids, positions)
        attend = causal_attention if cache is None else cache.attend
        for layer, block in enumerate(self.model.layers):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, layer, attend, use_reentrant=False)
            else:
                x = block(x, rope, layer, attend)
        return self.model.norm(x)

    def embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """What the first layer gets: x (B, T, C), and the tables that every layer rotates by."""
        return F.embedding(ids, self.model.embed_tokens.weight).to(self.activation_dtype), self._rope_tables(positions)

    def compile_layers(self):
        """In place, by torch.compile: for training, not for sampling with this model. All layers share its graphs."""
        for block in self.model.layers:
            block.compile(dynamic=True)

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits (..., V) of hidden (..., C)."""
        return linear(hidden, self.lm_head_weight.to(hidden.dtype)).float()

    def _rope_tables(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        self.frequencies = self.frequencies.to(positions.device)
        angles = positions[:, :, None, None] * self.frequencies  # (B, T, 1, D/2) fp32
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)  # (B, T, 1, D) each

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator, std: float = 0.02):
        """Normal(0, std) matrices, over √(2L) those that add to the residual (GPT-2); biases 0, norms 1."""
        shrink = 1 / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("o_proj.weight", "down_proj.weight"))
                parameter.normal_(0.0, std * shrink if residual else std, generator=generator)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
