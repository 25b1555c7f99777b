"""The decoder: against hand calculations and naive twins, and (oracle) against transformers."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minibridge.config import InputError
from minibridge.generate import generate
from minibridge.model import Decoder, RMSNorm
from minibridge.model_config import ModelConfig
from minibridge.functional import rotary_frequencies, rotate

SHAPE = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
FAMILIES = {
    "qwen2": dict(model_type="qwen2", head_dim=8),
    "qwen2-tied": dict(model_type="qwen2", head_dim=8, tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=12),
    "qwen3-tied": dict(model_type="qwen3", head_dim=12, tie_word_embeddings=True, attention_bias=True),
    "llama": dict(model_type="llama", head_dim=8, attention_bias=True, mlp_bias=True),
    "llama-tied": dict(model_type="llama", head_dim=8, tie_word_embeddings=True, rope_theta=500.0,
                       rope_scaling=LLAMA3),
}


@pytest.fixture(params=FAMILIES, name="config")
def config_of_each_family(request) -> ModelConfig:
    return ModelConfig(**SHAPE, **FAMILIES[request.param])


def random_decoder(config: ModelConfig) -> Decoder:
    """Weights large enough for sharp attention; biases and norms are random too."""
    model, generator = Decoder(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return model


def random_ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, tokens), generator=torch.Generator().manual_seed(1))


def naive_logits(config: ModelConfig, weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """The architecture once more, one row (T,) and one head at a time. Returns (T, V)."""
    D, T = config.head_dim, len(ids)

    def linear(name, x):
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0.0)

    def norm(name, x):
        rms = (x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
        return x / rms * weights[name + ".weight"]

    def turn(name, x):  # (T, D)
        x = norm(name, x) if config.model_type == "qwen3" else x
        angles = torch.arange(T)[:, None] * rotary_frequencies(config.head_dim, config.rope_theta, config.rope_scaling)
        turned = torch.complex(x[:, : D // 2], x[:, D // 2 :]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.embed_tokens.weight"][ids]  # (T, C)
    future = torch.ones(T, T).triu(1).bool()
    for layer in (f"model.layers.{i}." for i in range(config.num_hidden_layers)):
        y = norm(layer + "input_layernorm", x)
        q, k, v = (linear(f"{layer}self_attn.{name}_proj", y) for name in "qkv")
        heads = []
        for head in range(config.num_attention_heads):
            shared = head * config.num_key_value_heads // config.num_attention_heads
            q_head = turn(layer + "self_attn.q_norm", q[:, head * D :][:, :D])
            k_head = turn(layer + "self_attn.k_norm", k[:, shared * D :][:, :D])
            scores = (q_head @ k_head.T / D**0.5).masked_fill(future, -torch.inf)  # (T, T)
            heads.append(scores.softmax(-1) @ v[:, shared * D :][:, :D])
        x = x + linear(layer + "self_attn.o_proj", torch.cat(heads, -1))
        y = norm(layer + "post_attention_layernorm", x)
        gate, up = linear(layer + "mlp.gate_proj", y), linear(layer + "mlp.up_proj", y)
        x = x + linear(layer + "mlp.down_proj", gate * gate.sigmoid() * up)
    head = "model.embed_tokens" if config.tie_word_embeddings else "lm_head"
    return norm("model.norm", x) @ weights[head + ".weight"].T


# The forward pass


@torch.no_grad()
def test_logits_equal_the_naive_decoder(config):
    model, ids = random_decoder(config), random_ids(2, 9)
    expected = torch.stack([naive_logits(config, model.state_dict(), row) for row in ids])
    assert expected.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(model.logits(model(ids)), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_padding_never_changes_a_real_token(config):
    model, ids = random_decoder(config), random_ids(1, 7)
    padded = torch.cat((ids.expand(2, -1), torch.tensor([[0] * 5, [7] * 5])), 1)
    hidden = model(padded)[:, :7]
    torch.testing.assert_close(hidden, model(ids).expand(2, -1, -1), atol=1e-5, rtol=1e-5)


def test_every_parameter_gets_a_gradient(config):
    model, ids = random_decoder(config), random_ids(2, 6)
    logits = model.logits(model(ids))
    F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 1e-8, name


def test_bfloat16_compute_is_close_and_leaves_parameters_and_logits_in_float32(config):
    ids = random_ids(2, 10)
    exact, rounded = random_decoder(config), random_decoder(config)
    rounded.compute_dtype = torch.bfloat16
    logits = rounded.logits(rounded(ids))
    expected = exact.logits(exact(ids))
    assert rounded(ids).dtype == torch.bfloat16 and logits.dtype == torch.float32
    assert 0 < (logits - expected).norm() / expected.norm() < 0.05
    logits.sum().backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in rounded.parameters())


@torch.no_grad()
def test_bfloat16_copy_equals_bfloat16_compute(config):
    """The sampler's bf16 copy and the learner's cast are one model; neither rounds the rotary table."""
    ids, rounded = random_ids(2, 40), random_decoder(config)
    rounded.compute_dtype = torch.bfloat16
    copy = random_decoder(config).to(torch.bfloat16)
    assert copy.frequencies.dtype == torch.float32
    torch.testing.assert_close(copy(ids), rounded(ids), atol=0, rtol=0)
    assert copy.activation_dtype == rounded.activation_dtype == torch.bfloat16


# Its parts


def test_rms_norm_equals_the_equation():
    x, norm = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0)) * 30, RMSNorm(16, 1e-2)
    torch.nn.init.normal_(norm.weight, 1.0, 0.5, generator=torch.Generator().manual_seed(1))
    expected = x / ((x * x).sum(-1, keepdim=True) / 16 + 1e-2).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x.bfloat16()), expected.bfloat16(), atol=0.02, rtol=0.02)
    small = torch.full((16,), 0.1)  # mean of squares 0.01 = eps
    torch.testing.assert_close(norm(small), norm.weight / 2**0.5)


def test_rotary_angle_is_position_times_frequency():
    config = ModelConfig(**SHAPE | dict(model_type="llama", head_dim=4, rope_theta=100.0))
    tables = Decoder(config)._rope_tables(torch.tensor([[0, 3]]))
    x = torch.tensor([1.0, 2.0, 0.5, -1.0]).expand(1, 2, 1, 4)  # pairs (1, 0.5) and (2, -1)
    out = rotate(x, *tables)[0, :, 0]
    torch.testing.assert_close(out[0], x[0, 0, 0])
    turned = [complex(1.0, 0.5), complex(2.0, -1.0)]
    for pair, frequency in enumerate((1.0, 0.1)):  # 100 ** (-2i / 4)
        angle = torch.tensor(3 * frequency)
        expected = turned[pair] * complex(angle.cos(), angle.sin())
        torch.testing.assert_close(out[1, [pair, pair + 2]], torch.tensor([expected.real, expected.imag]))


def test_llama3_scaling_against_a_hand_calculation():
    scaling = LLAMA3 | dict(original_max_position_embeddings=200)
    # Unscaled 1, 0.1, 0.01: 31.8, 3.183 and 0.318 turns over 200 positions. The first is kept, the last is
    # divided by 8; the middle is kept to (3.1831 - 1) / (4 - 1) = 0.72770: 0.072770 + 0.27230 * 0.1 / 8.
    expected = torch.tensor([1.0, 0.0761738, 0.00125])
    torch.testing.assert_close(rotary_frequencies(6, 1000.0, scaling), expected, atol=1e-6, rtol=0)


def test_initialisation_is_drawn_from_the_generator_alone(config):
    torch.manual_seed(0)
    before, config = torch.get_rng_state(), replace(config, num_hidden_layers=8)
    first, second, other = Decoder(config), Decoder(config), Decoder(config)
    for model, seed in ((first, 3), (second, 3), (other, 4)):
        model.init_weights(torch.Generator().manual_seed(seed))
    assert torch.equal(before, torch.get_rng_state())
    for (name, a), b, c in zip(first.named_parameters(), second.parameters(), other.parameters()):
        assert torch.equal(a, b), name
        if a.ndim == 1:
            assert (a == (0.0 if name.endswith("bias") else 1.0)).all(), name
        else:
            assert not torch.equal(a, c), name
            std = 0.005 if "o_proj" in name or "down_proj" in name else 0.02  # 0.02 / sqrt(2 * 8 layers)
            assert a.std().item() == pytest.approx(std, rel=0.15), name


def test_parameter_names_are_hugging_face_names():
    names = {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight",
        *(f"model.layers.0.{name}.weight" for name in (
            "input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
            "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
    }
    qkv_biases = {f"model.layers.0.self_attn.{name}_proj.bias" for name in "qkv"}
    qk_norms = {f"model.layers.0.self_attn.{name}_norm.weight" for name in "qk"}
    o_bias = {"model.layers.0.self_attn.o_proj.bias"}
    mlp_biases = {f"model.layers.0.mlp.{name}_proj.bias" for name in ("gate", "up", "down")}

    def of(**changes):
        config = ModelConfig(**SHAPE | dict(num_hidden_layers=1, head_dim=8) | changes)
        return set(Decoder(config).state_dict())

    assert of(model_type="llama") == names
    assert of(model_type="llama", tie_word_embeddings=True) == names - {"lm_head.weight"}
    assert of(model_type="llama", attention_bias=True) == names | qkv_biases | o_bias
    assert of(model_type="llama", mlp_bias=True) == names | mlp_biases
    assert of(model_type="qwen2") == names | qkv_biases
    assert of(model_type="qwen3") == names | qk_norms
    assert of(model_type="qwen3", attention_bias=True) == names | qk_norms | qkv_biases | o_bias


# config.json


def test_config_survives_a_round_trip(config):
    assert ModelConfig.from_hf(config.to_hf()) == config


HF_LLAMA = SHAPE | dict(model_type="llama", rms_norm_eps=1e-5, rope_theta=500.0, hidden_act="silu")


def test_old_and_new_rope_fields_are_read_alike():
    scaling = dict(LLAMA3, rope_type="llama3")
    old = ModelConfig.from_hf(HF_LLAMA | dict(rope_scaling=scaling))
    new = {name: value for name, value in HF_LLAMA.items() if name != "rope_theta"}
    assert ModelConfig.from_hf(new | dict(rope_parameters=dict(scaling, rope_theta=500.0))) == old
    assert old.rope_scaling == LLAMA3 and old.rope_theta == 500.0 and old.head_dim == 8
    plain = ModelConfig.from_hf(new | dict(rope_parameters=dict(rope_type="default", rope_theta=500.0)))
    assert plain.rope_scaling is None and plain.rope_theta == 500.0


@pytest.mark.parametrize("changes, words", [
    (dict(model_type="gpt2"), "model_type 'gpt2'"),
    (dict(hidden_act="gelu"), "hidden_act 'gelu'"),
    (dict(vocab_size=None), "vocab_size must be a positive integer up to 16777216, not None"),
    (dict(num_hidden_layers=0), "num_hidden_layers"),
    (dict(intermediate_size=1.5), "intermediate_size"),
    (dict(num_attention_heads=True), "num_attention_heads"),
    (dict(num_attention_heads=8, num_key_value_heads=3), "num_key_value_heads 3"),
    (dict(hidden_size=34), "hidden_size 34"),
    (dict(head_dim=7), "head_dim"),
    (dict(model_type="qwen3"), "head_dim"),
    (dict(rms_norm_eps=None), "rms_norm_eps"),
    (dict(rope_theta=None), "rope_theta"),
    (dict(rope_scaling=dict(rope_type="yarn", factor=4.0)), "yarn"),
    (dict(rope_scaling=dict(type="linear", factor=4.0)), "linear"),
    (dict(rope_scaling=dict(rope_type="llama3", factor=8.0)), "low_freq_factor"),
    (dict(vocab_size=10**12), "vocab_size must be a positive integer up to"),
    (dict(num_hidden_layers=10**6), "num_hidden_layers must be a positive integer up to 1000"),
    (dict(head_dim=2**30), "head_dim must be a positive integer up to"),
    (dict(intermediate_size=10**4000), "intermediate_size must be"),
    (dict(rope_theta=1e-300), "infinite angles"), (dict(rope_theta=10**25), "rope_theta must be a positive number, not 1"),
    (dict(rms_norm_eps=10**25), "rms_norm_eps must be a positive number"),
    (dict(rope_scaling=dict(LLAMA3, rope_type="llama3", factor=10**25)), "factor must be a positive number"),
    (dict(rope_scaling=dict(LLAMA3, rope_type="llama3", factor=1e-300)), "infinite angles"),
    (dict(rope_scaling=0), "rope_scaling must be an object"),
    (dict(tie_word_embeddings=0), "tie_word_embeddings must be true or false, not 0"),
    (dict(rope_theta=float("nan")), "rope_theta"),
    (dict(rms_norm_eps=float("inf")), "rms_norm_eps"),
    (dict(rope_scaling=dict(factor=8.0)), "rope scaling"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings must be true or false, not 'false'"),
    (dict(quantization_config=dict(bits=4)), "quantized"),
    (dict(layer_types="full_attention"), "full attention"),
    (dict(rope_parameters=dict(rope_type="default", rope_theta=1e4), rope_scaling=dict(type="linear", factor=4.0)), "both given"),
    (dict(rope_scaling=dict(LLAMA3, rope_type="llama3"), original_max_position_embeddings=3), "is 3, but that of the rope"),
    (dict(rope_scaling=dict(LLAMA3, rope_type="llama3", high_freq_factor=0.5)), "high_freq_factor must not be below"),
    (dict(is_causal=False), "only causal attention"),
    (dict(model_type="qwen2", use_sliding_window=True), "sliding window"),
    (dict(model_type="qwen2", layer_types=["full_attention", "sliding_attention"]), "sliding window"),
])
def test_unusable_configs_are_named_in_one_line(changes, words):
    with pytest.raises(InputError) as error:
        ModelConfig.from_hf(HF_LLAMA | changes, source="folder/config.json")
    line = str(error.value)
    assert line.startswith("folder/config.json: ") and words in line and "\n" not in line


def test_biases_that_the_type_does_not_have_are_refused():
    for wrong in (dict(model_type="qwen2", attention_bias=True), dict(model_type="qwen3", mlp_bias=True)):
        with pytest.raises(InputError, match="attention_bias, mlp_bias: not in a model of type qwen"):
            ModelConfig(**SHAPE | dict(head_dim=8) | wrong)


# Against transformers


@pytest.fixture(name="library")
def library_model(config):
    transformers = pytest.importorskip("transformers")
    data = config.to_hf()
    kind = transformers.AutoConfig.for_model(data["model_type"])
    library = transformers.AutoModelForCausalLM.from_config(type(kind).from_dict(data)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in library.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3, generator=generator)
    return library


def load_library_weights(config: ModelConfig, library) -> Decoder:
    weights = library.state_dict()
    if config.tie_word_embeddings:
        assert weights.pop("lm_head.weight").data_ptr() == weights["model.embed_tokens.weight"].data_ptr()
    model = Decoder(config)
    model.load_state_dict(weights, strict=True)
    return model


@pytest.mark.oracle
@torch.no_grad()
def test_logits_equal_transformers_on_ragged_batches(config, library):
    model, ids = load_library_weights(config, library), random_ids(3, 30)
    lengths = torch.tensor([30, 11, 22])
    real = torch.arange(30) < lengths[:, None]  # (B, T)
    expected = library(ids, attention_mask=real.long()).logits[real]
    assert expected.std() > 0.5  # not a comparison of zeros
    torch.testing.assert_close(model.logits(model(ids))[real], expected, atol=1e-4, rtol=0)


@pytest.mark.oracle
@torch.no_grad()
def test_greedy_continuation_equals_transformers(config, library):
    model, prompts = load_library_weights(config, library), [random_ids(1, length)[0] for length in (7, 3)]
    completions = generate(model, [prompt.tolist() for prompt in prompts], max_new_tokens=20, temperature=0)
    for prompt, (completion,) in zip(prompts, completions):
        out = library.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=20,
                               do_sample=False, eos_token_id=None, pad_token_id=0)
        assert completion.ids == out[0, len(prompt) :].tolist()


@pytest.mark.oracle
def test_config_reads_what_transformers_writes(config, library):
    assert ModelConfig.from_hf(library.config.to_dict()) == config
