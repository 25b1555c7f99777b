"""A decoder's shape, from and to the config.json of Hugging Face."""
from dataclasses import dataclass

from minibridge.config import InputError
from minibridge.functional import rotary_frequencies

ARCHITECTURES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "llama": "LlamaForCausalLM"}
# Each with the largest that is taken: many times what any model has, and little enough to build its shapes at once.
SIZES = {"vocab_size": 2**24, "hidden_size": 2**18, "intermediate_size": 2**20, "num_hidden_layers": 1000,
         "num_attention_heads": 2**12, "num_key_value_heads": 2**12, "head_dim": 2**12, "max_position_embeddings": 2**31}
LLAMA3_SCALING = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a decoder, in Hugging Face's words. Raises InputError for a shape that cannot be built."""

    model_type: str                    # "qwen2" (Qwen2.5 too), "qwen3" or "llama"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None   # the four numbers of LLAMA3_SCALING, or None: rotary embeddings as is
    tie_word_embeddings: bool = False
    attention_bias: bool = False       # qwen3, llama: on q, k, v and o. qwen2 always has it on q, k and v
    mlp_bias: bool = False             # llama

    def __post_init__(self):
        if self.model_type not in ARCHITECTURES:
            raise InputError(f"model_type {self.model_type!r} is not one of {', '.join(ARCHITECTURES)}")
        numbers = {name: getattr(self, name) for name in (*SIZES, "rms_norm_eps", "rope_theta")}
        numbers |= {name: self.rope_scaling.get(name) for name in LLAMA3_SCALING} if self.rope_scaling else {}
        for name, value in numbers.items():
            kinds, most = ((int,), SIZES[name]) if name in SIZES else ((int, float), 1e18)
            if type(value) not in kinds or not 0 < value <= most:  # no NaN, no infinity
                kind = f"integer up to {most}" if name in SIZES else "number"
                raise InputError(f"{name} must be a positive {kind}, not {repr(value)[:40]}")
        if self.attention_bias and self.model_type == "qwen2" or self.mlp_bias and self.model_type != "llama":
            raise InputError(f"attention_bias, mlp_bias: not in a model of type {self.model_type}")
        if self.rope_scaling and self.rope_scaling["high_freq_factor"] < self.rope_scaling["low_freq_factor"]:
            raise InputError("high_freq_factor must not be below low_freq_factor")
        if self.num_attention_heads % self.num_key_value_heads:
            raise InputError(f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                             f"num_key_value_heads {self.num_key_value_heads}")
        if self.head_dim % 2:
            raise InputError(f"head_dim must be even for rotary embeddings, not {self.head_dim}")
        if not rotary_frequencies(self.head_dim, self.rope_theta, self.rope_scaling).isfinite().all():
            raise InputError(f"rope_theta {self.rope_theta} and rope_scaling {self.rope_scaling} give infinite angles")

    @classmethod
    def from_hf(cls, data: dict, source: str = "config.json") -> "ModelConfig":
        """Read the contents of a Hugging Face config.json; `source` begins the line of an InputError."""
        try:
            return cls(**_fields_from_hf(data), **_rope_from_hf(data))
        except InputError as error:
            raise InputError(f"{source}: {error}") from None

    def to_hf(self, dtype: str = "float32") -> dict:
        """The contents of a config.json that transformers and vLLM open. dtype: that of the saved weights."""
        data = {"architectures": [ARCHITECTURES[self.model_type]], "model_type": self.model_type}
        data |= {"torch_dtype": dtype, "hidden_act": "silu", "use_cache": True}
        data |= {name: getattr(self, name) for name in SIZES}
        data |= {name: getattr(self, name) for name in ("rms_norm_eps", "rope_theta", "tie_word_embeddings")}
        data["rope_scaling"] = {"rope_type": "llama3", **self.rope_scaling} if self.rope_scaling else None
        if self.model_type != "qwen2":
            data["attention_bias"] = self.attention_bias
        if self.model_type == "llama":
            data["mlp_bias"] = self.mlp_bias
        return data


def _fields_from_hf(data: dict) -> dict:
    """ModelConfig's fields but for the rotary ones; ModelConfig checks the values."""
    kind = str(data.get("model_type"))
    if kind in ARCHITECTURES and data.get("hidden_act", "silu") != "silu":
        raise InputError(f"hidden_act {data['hidden_act']!r} is not supported, only 'silu'")
    layers = data.get("layer_types") or []
    if data.get("use_sliding_window") or not isinstance(layers, list) or any(layer != "full_attention" for layer in layers):
        raise InputError("only full attention is supported, no sliding window")
    if data.get("is_causal", True) is not True:
        raise InputError("only causal attention is supported")
    if data.get("quantization_config"):
        raise InputError("quantized weights are not supported")
    for flag in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if not isinstance(data.get(flag), bool | None):
            raise InputError(f"{flag} must be true or false, not {data[flag]!r}")
    sizes = {name: data.get(name) for name in SIZES}
    width, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if sizes["head_dim"] is None and kind != "qwen3" and type(width) is type(heads) is int and heads > 0:
        sizes["head_dim"] = width // heads  # Qwen3 alone always names it
        if width % heads:
            raise InputError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return sizes | {
        "model_type": kind,
        "rms_norm_eps": data.get("rms_norm_eps"),
        "tie_word_embeddings": bool(data.get("tie_word_embeddings")),
        "attention_bias": kind != "qwen2" and bool(data.get("attention_bias")),
        "mlp_bias": kind == "llama" and bool(data.get("mlp_bias")),
    }


def _rope_from_hf(data: dict) -> dict:
    """transformers 5 writes rope_parameters; before it, rope_theta stood alone beside rope_scaling."""
    if data.get("rope_parameters") and data.get("rope_scaling"):
        raise InputError("rope_parameters and rope_scaling are both given, of which libraries take one or the other")
    rope = next((data[name] for name in ("rope_parameters", "rope_scaling") if data.get(name) is not None), {})
    if not isinstance(rope, dict):
        raise InputError(f"rope_scaling must be an object, not {rope!r}")
    kind = rope.get("rope_type", rope.get("type")) if rope.keys() - {"rope_theta", "partial_rotary_factor"} else "default"
    if kind not in ("default", "llama3") or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"rope scaling {rope!r} is not supported, only 'llama3'")
    scaling = {name: rope.get(name) for name in LLAMA3_SCALING} if kind == "llama3" else None
    original = "original_max_position_embeddings"  # transformers prefers that beside the scaling to that in it
    if scaling and data.get(original, scaling[original]) != scaling[original]:
        raise InputError(f"{original} is {data[original]!r}, but that of the rope scaling {scaling[original]!r}")
    return {"rope_theta": rope.get("rope_theta", data.get("rope_theta")), "rope_scaling": scaling}
