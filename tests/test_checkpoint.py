"""Checkpoints: bit-exact round trips, every corruption named, no half-written folder, exact resume."""

import json
import math
import os
import re
from pathlib import Path

import pytest
import torch
from conftest import within
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.model import Decoder
from minibridge.model_config import SIZES, ModelConfig
from minibridge.tokenizer import Tokenizer, train_toy

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EMBEDDING, HEAD = checkpoint.EMBEDDING, checkpoint.HEAD
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


def make(model_type="qwen2", tied=False, seed=0, **changes) -> Decoder:
    config = ModelConfig(
        model_type=model_type,
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        **changes,
    )
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # biases and norms too, so that a swapped or skipped tensor shows
        for parameter in model.parameters():
            parameter.normal_(0, 0.5, generator=generator)
    return model


def same(one: Decoder, other: Decoder) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def edit_weights(folder: Path, edit) -> None:
    weights = load_file(folder / checkpoint.WEIGHTS)
    edit(weights)
    save_file(weights, folder / checkpoint.WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def folder(tmp_path) -> Path:
    checkpoint.save(make(), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_round_trip_is_bit_exact(tmp_path, model_type, tied, dtype):
    model = make(model_type, tied).to(dtype)
    checkpoint.save(model, tmp_path / "model")
    loaded = checkpoint.load(tmp_path / "model", dtype=dtype)
    assert loaded.config == model.config and same(loaded, model)
    assert all(parameter.dtype == dtype and parameter.requires_grad for parameter in loaded.parameters())
    ids = torch.arange(8)[None]
    assert torch.equal(loaded.logits(loaded(ids)), model.logits(model(ids)))


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_who_may_read_the_weights_is_up_to_the_umask(tmp_path, mask, mode):
    before = os.umask(mask)
    try:
        checkpoint.save(make(), tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {mode}


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_are_cast_on_both_sides(tmp_path, stored, dtype):
    model = make()
    checkpoint.save(model, tmp_path / "model", dtype=stored)
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert str(stored) == "torch." + written["torch_dtype"]
    assert same(checkpoint.load(tmp_path / "model", dtype=dtype), model.to(stored).to(dtype))


def test_loaded_weights_do_not_follow_the_file(folder):
    model = checkpoint.load(folder)
    path = folder / checkpoint.WEIGHTS
    with open(path, "r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert same(model, make())


def shard(folder: Path, **changes) -> None:
    """Rewrite a folder as two shards and an index; `changes` are put over the index's map."""
    weights = load_file(folder / checkpoint.WEIGHTS)
    (folder / checkpoint.WEIGHTS).unlink()
    parts = {name: f"model-0000{1 + turn % 2}-of-00002.safetensors" for turn, name in enumerate(weights)}
    for part in set(parts.values()):
        save_file({name: weights[name] for name in weights if parts[name] == part}, folder / part)
    index = {"metadata": {}, "weight_map": parts | changes}
    (folder / checkpoint.INDEX).write_text(json.dumps(index))


def test_shards_and_index(folder):
    shard(folder)
    assert same(checkpoint.load(folder), make())


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "a\0b"])
def test_shard_outside_the_folder(folder, name):
    shard(folder, **{EMBEDDING: name})
    with pytest.raises(InputError, match=f"{checkpoint.INDEX}: .*{re.escape(repr(name))}"):
        checkpoint.load(folder)


def test_shard_missing_or_cut(folder):
    shard(folder)
    part = folder / "model-00002-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-1])
    with pytest.raises(InputError, match=part.name):
        checkpoint.load(folder)
    part.unlink()
    with pytest.raises(InputError, match=f"{part.name}: no such file"):
        checkpoint.load(folder)


def test_tensor_in_two_shards(folder):
    shard(folder, extra="again.safetensors")
    save_file({EMBEDDING: make().model.embed_tokens.weight.detach()}, folder / "again.safetensors")
    with pytest.raises(InputError, match=f"unexpected tensor {EMBEDDING}"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_broken_index(folder, content):
    shard(folder)
    (folder / checkpoint.INDEX).write_text(content)
    with pytest.raises(InputError, match=checkpoint.INDEX):
        checkpoint.load(folder)


def test_missing_folder_and_files(folder):
    assert folder.name == "model"
    with pytest.raises(InputError, match=f"^{folder.parent}: a run folder; its model is {folder}$"):
        checkpoint.load(folder.parent)
    with pytest.raises(InputError, match="absent: no such folder"):
        checkpoint.load(folder / "absent")
    (folder / checkpoint.WEIGHTS).unlink()
    with pytest.raises(InputError, match=f"{folder.name}: neither {checkpoint.WEIGHTS}"):
        checkpoint.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="config.json: No such file"):
        checkpoint.load(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"model_type": "gpt2"}'])
def test_broken_config(folder, content):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(InputError, match="config.json: "):
        checkpoint.load(folder)


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_truncated_weights(folder, kept):
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(InputError, match=f"{checkpoint.WEIGHTS}: not a whole"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", [EMBEDDING, HEAD, "model.layers.1.self_attn.k_proj.bias"])
def test_missing_tensor(folder, name):
    edit_weights(folder, lambda weights: weights.pop(name))
    with pytest.raises(InputError, match=f"{folder.name}: tensor {name} is missing"):
        checkpoint.load(folder)


def test_unexpected_tensor(folder):
    edit_weights(folder, lambda weights: weights.update({"model.layers.2.mlp.bias": torch.ones(2)}))
    with pytest.raises(InputError, match=f"{checkpoint.WEIGHTS}: unexpected tensor model.layers.2.mlp.bias"):
        checkpoint.load(folder)


@pytest.mark.parametrize("name", ["x" * 5000, "\x00"])
def test_shard_with_an_impossible_name(folder, name):
    shard(folder, **{EMBEDDING: name})
    with pytest.raises(InputError, match=f"{folder.name}/"):
        checkpoint.load(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(folder, value):
    edit_weights(folder, lambda weights: weights["model.norm.weight"][3].fill_(value))
    with pytest.raises(InputError, match=f"{checkpoint.WEIGHTS}: tensor model.norm.weight is not finite"):
        checkpoint.load(folder)


def test_weights_that_a_narrower_type_cannot_hold(folder):
    edit_weights(folder, lambda weights: weights["model.norm.weight"][3].fill_(1e5))
    assert checkpoint.load(folder, torch.bfloat16).model.norm.weight[3] > 9e4
    with pytest.raises(InputError, match="model.norm.weight is not finite as torch.float16"):
        checkpoint.load(folder, torch.float16)


def test_sizes_that_the_weights_do_not_have_are_refused_at_once(folder):
    """Before anything is allocated, and without a module for each of a million layers."""
    before = json.loads((folder / "config.json").read_text())
    for name in SIZES.keys() - {"max_position_embeddings"}:  # of which no tensor tells
        for value in (1000, 10**6, 2**31 - 2, 10**12):
            edit_config(folder, **before | {name: value})
            with within(60), pytest.raises(InputError, match=f"config.json: .*{name}|{folder.name}.* tensor "):
                checkpoint.load(folder)


@pytest.mark.parametrize("tensor", [torch.ones(17), torch.ones(16, 1), torch.ones(16, dtype=torch.int8),
                                    torch.ones(16, dtype=torch.float8_e4m3fn)])
def test_wrong_shape_or_kind(folder, tensor):
    edit_weights(folder, lambda weights: weights.update({"model.norm.weight": tensor}))
    with pytest.raises(InputError, match=f"{checkpoint.WEIGHTS}: tensor model.norm.weight is .*16"):
        checkpoint.load(folder)


def test_old_rotary_constants_are_skipped(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda weights: weights.update({name: torch.ones(2)}))
    assert same(checkpoint.load(folder), make())


def test_tied_head_may_be_repeated_but_not_differ(tmp_path):
    checkpoint.save(make(tied=True), tmp_path)
    assert HEAD not in load_file(tmp_path / checkpoint.WEIGHTS)
    edit_weights(tmp_path, lambda weights: weights.update({HEAD: weights[EMBEDDING].clone()}))
    assert same(checkpoint.load(tmp_path), make(tied=True))
    edit_weights(tmp_path, lambda weights: weights[HEAD].add_(1))
    with pytest.raises(InputError, match=f"{HEAD}.*differ"):
        checkpoint.load(tmp_path)
    edit_weights(tmp_path, lambda weights: weights.pop(EMBEDDING))
    with pytest.raises(InputError, match=f"{EMBEDDING} is missing"):
        checkpoint.load(tmp_path)


def test_untied_model_needs_its_head(folder):
    edit_config(folder, tie_word_embeddings=True)
    with pytest.raises(InputError, match=f"{HEAD}.*differ"):
        checkpoint.load(folder)


def test_tokenizer_files(tmp_path):
    tokenizer = train_toy(["a b"], 300)
    checkpoint.save(make(), tmp_path, tokenizer)
    assert Tokenizer.load(tmp_path).encode("a b") == tokenizer.encode("a b")
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation == {"eos_token_id": list(tokenizer.stop_ids), "pad_token_id": tokenizer.pad_id}


def test_replacing_leaves_nothing_of_the_old_checkpoint(folder):
    checkpoint.save(make(), folder, train_toy(["a b"], 300))
    checkpoint.save(make("llama"), folder)
    assert same(checkpoint.load(folder), make("llama"))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", checkpoint.WEIGHTS]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_leftovers_of_a_killed_save_are_swept_away(folder):
    for suffix in ("part", "old"):
        (folder.parent / f".{folder.name}.{suffix}").mkdir()
        (folder.parent / f".{folder.name}.{suffix}" / "half").write_text("")
    checkpoint.save(make(seed=1), folder)
    assert same(checkpoint.load(folder), make(seed=1))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", checkpoint.WEIGHTS]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_a_process_killed_between_two_renamings_costs_nothing(folder):
    """The old checkpoint comes back, also if the next save fails."""
    folder.rename(folder.parent / f".{folder.name}.old")
    broken = make(seed=1)
    broken.model.norm.weight.data.fill_(math.nan)
    with pytest.raises(InputError, match="was not saved"):
        checkpoint.save(broken, folder)
    assert same(checkpoint.load(folder), make())


def test_double_precision_comes_back(tmp_path):
    checkpoint.save(make().double(), tmp_path / "model")
    assert same(checkpoint.load(tmp_path / "model", torch.float64), make().double())


def test_weights_are_marked_as_torch_tensors(folder):
    with safe_open(folder / checkpoint.WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_other_folders_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="not a checkpoint"):
        checkpoint.save(make(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_broken_model_is_not_saved(folder):
    model, before = checkpoint.load(folder), (folder / checkpoint.WEIGHTS).read_bytes()
    with torch.no_grad():
        model.lm_head_weight[3, 1] = float("nan")
    with pytest.raises(InputError, match="not all of .* is finite"):
        checkpoint.save(model, folder)
    assert (folder / checkpoint.WEIGHTS).read_bytes() == before


def test_a_full_disk_is_named_by_the_folder(folder, monkeypatch):
    def full(*arguments, **keywords):
        raise checkpoint.SafetensorError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(InputError, match=f"^{folder.parent}.*No space left"):
        checkpoint.save(make(), folder)
    assert checkpoint.load(folder)


def failing(*arguments, **keywords):
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["save_file", "_write_json", "_flush"])
def test_failure_before_the_end_leaves_the_old_folder(folder, monkeypatch, name):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(checkpoint, name, failing)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(make(seed=1), folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_failure_between_the_renames_puts_the_old_folder_back(folder, monkeypatch):
    rename = Path.rename

    def once(path, target):
        return failing() if path.name.endswith(".part") else rename(path, target)

    monkeypatch.setattr(Path, "rename", once)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(make(seed=1), folder)
    assert same(checkpoint.load(folder), make())


def test_files_are_on_disk_before_the_rename(folder, monkeypatch):
    events = []
    flush, rename = checkpoint._flush, Path.rename
    monkeypatch.setattr(checkpoint, "_flush", lambda path: (events.append(path.name), flush(path)))
    monkeypatch.setattr(Path, "rename", lambda path, target: (events.append("rename"), rename(path, target)))
    checkpoint.save(make(), folder)
    assert sorted(events[:3]) == [".model.part", "config.json", checkpoint.WEIGHTS]
    assert events[3:] == ["rename", "rename", folder.parent.name]


def adam(model: Decoder) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)


def train(model: Decoder, optimizer: torch.optim.Optimizer, steps: int, generator: torch.Generator) -> None:
    for _ in range(steps):
        ids = torch.randint(0, 48, (2, 6), generator=generator)
        model.logits(model(ids)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def state_of(generator: torch.Generator, step: int) -> dict:
    return {"step": step, "generator": generator.get_state().tolist(), "note": {"data": [1, 2]}}


@pytest.mark.parametrize("tied", [False, True])
def test_resumed_training_is_bit_exact(tmp_path, tied):
    model, generator = make(tied=tied), torch.Generator().manual_seed(5)
    optimizer = adam(model)
    train(model, optimizer, 3, generator)
    checkpoint.save_training(tmp_path / "3", model, optimizer, state_of(generator, 3))
    train(model, optimizer, 3, generator)

    resumed, generator = make(tied=tied, seed=9), torch.Generator()
    optimizer = adam(resumed)
    state = checkpoint.load_training(tmp_path / "3", resumed, optimizer)
    assert (state["step"], state["note"]) == (3, {"data": [1, 2]})
    generator.set_state(torch.tensor(state["generator"], dtype=torch.uint8))
    train(resumed, optimizer, 3, generator)
    assert same(resumed, model)


def test_training_can_resume_before_its_first_step(tmp_path):
    model, generator = make(), torch.Generator()
    checkpoint.save_training(tmp_path / "0", model, adam(model), state_of(generator, 0))
    optimizer = adam(model)
    assert checkpoint.load_training(tmp_path / "0", model, optimizer)["step"] == 0
    assert not optimizer.state


def test_moments_belong_to_names_not_positions(tmp_path):
    model = make()
    optimizer = adam(model)
    train(model, optimizer, 1, torch.Generator())
    checkpoint.save_training(tmp_path / "1", model, optimizer, {"step": 1})
    other = torch.optim.AdamW(list(model.parameters())[::-1])
    checkpoint.load_training(tmp_path / "1", model, other)
    for parameter, moments in optimizer.state.items():
        assert torch.equal(other.state[parameter]["exp_avg"], moments["exp_avg"])
        assert other.state[parameter]["step"] == 1
    assert other.param_groups[0]["lr"] == 1e-3  # settings are the new optimizer's


@pytest.fixture
def training_folder(tmp_path) -> Path:
    model = make()
    optimizer = adam(model)
    train(model, optimizer, 1, torch.Generator())
    checkpoint.save_training(tmp_path / "1", model, optimizer, {"step": 1})
    return tmp_path / "1"


@pytest.mark.parametrize("name", [checkpoint.TRAINING, checkpoint.TRAINING_TENSORS, checkpoint.WEIGHTS])
def test_broken_training_files(training_folder, name):
    model = make()
    path = training_folder / name
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(InputError, match=name):
        checkpoint.load_training(training_folder, model, adam(model))
    path.unlink()
    with pytest.raises(InputError, match=name):
        checkpoint.load_training(training_folder, model, adam(model))


def edit_training(folder: Path, edit) -> None:
    tensors = load_file(folder / checkpoint.TRAINING_TENSORS)
    edit(tensors)
    save_file(tensors, folder / checkpoint.TRAINING_TENSORS)


NORM = "optimizer/model.norm.weight"


@pytest.mark.parametrize("edit, words", [
    (lambda tensors: tensors[f"{NORM}/exp_avg"][3].fill_(float("nan")), "exp_avg of model.norm.weight"),
    (lambda tensors: tensors[f"{NORM}/exp_avg_sq"][3].fill_(float("inf")), "exp_avg_sq of model.norm.weight"),
    (lambda tensors: tensors[f"{NORM}/exp_avg_sq"][3].neg_(), "exp_avg_sq of model.norm.weight"),
    (lambda tensors: tensors[f"{NORM}/step"].fill_(-1.0), "step of model.norm.weight"),
    (lambda tensors: tensors[f"{NORM}/step"].fill_(1.5), "1.5 updates of model.norm.weight, .* step 1"),
    (lambda tensors: tensors.update({f"{NORM}/step": torch.ones(1)}), "model.norm.weight have the wrong shape"),
    (lambda tensors: tensors.update({f"{NORM}/exp_avg": torch.ones(16, dtype=torch.int32)}), "exp_avg of model.norm.weight"),
    (lambda tensors: tensors.pop(f"{NORM}/exp_avg_sq"), "model.norm.weight have the wrong shape"),
    (lambda tensors: tensors.update({f"{NORM}/more": torch.ones(16)}), "model.norm.weight have the wrong shape"),
    (lambda tensors: [tensors.pop(f"{NORM}/{key}") for key in ("step", "exp_avg", "exp_avg_sq")], "not those of this model"),
    (lambda tensors: tensors.clear(), "not those of this model at step 1"),
    (lambda tensors: tensors.update({"state/step": torch.ones(())}), "not those of this model"),
    (lambda tensors: tensors.update({"moments/a/b": torch.ones(())}), "not those of this model"),
])
def test_damaged_training_tensors_are_named_and_fill_nothing(training_folder, edit, words):
    edit_training(training_folder, edit)
    model = make(seed=3)
    optimizer = adam(model)
    with pytest.raises(InputError, match=f"{checkpoint.TRAINING_TENSORS}: .*{words}"):
        checkpoint.load_training(training_folder, model, optimizer)
    assert same(model, make(seed=3)) and not optimizer.state


@pytest.mark.parametrize("change, words", [
    ({"step": None}, "'step'"), ({"step": "1"}, "'step'"), ({"step": True}, "'step'"), ({"step": -1}, "'step'"),
    ({"step": 7}, "1 updates of .* step 7"), ({"step": 0}, "step 0")])
def test_damaged_training_numbers_are_named(training_folder, change, words):
    path = training_folder / checkpoint.TRAINING
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = make()
    with pytest.raises(InputError, match=f"{training_folder}/training.*: .*{words}"):
        checkpoint.load_training(training_folder, model, adam(model))


def test_a_checkpoint_with_another_config_is_not_resumed(training_folder):
    edit_config(training_folder, rms_norm_eps=1e-3)
    model = make()
    with pytest.raises(InputError, match="config.json: not the model"):
        checkpoint.load_training(training_folder, model, adam(model))


def test_several_updates_a_step_can_be_resumed(tmp_path):
    model = make()
    optimizer = adam(model)
    train(model, optimizer, 6, torch.Generator())
    checkpoint.save_training(tmp_path / "2", model, optimizer, {"step": 2})
    assert checkpoint.load_training(tmp_path / "2", model, adam(model), updates=3)["step"] == 2
    for updates in (1, 2, 4):
        with pytest.raises(InputError, match=f"6 updates of .* step 2, of {updates}"):
            checkpoint.load_training(tmp_path / "2", model, adam(model), updates=updates)


def test_training_state_of_another_model(training_folder):
    other = make("llama")
    with pytest.raises(InputError, match="config.json: not the model"):
        checkpoint.load_training(training_folder, other, adam(other))
    model = make()
    part = torch.optim.AdamW([model.model.norm.weight])
    with pytest.raises(InputError, match=f"{checkpoint.TRAINING_TENSORS}: "):
        checkpoint.load_training(training_folder, model, part)


def test_a_training_checkpoint_is_a_model_folder(training_folder):
    assert checkpoint.load(training_folder).config == make().config


def test_latest_goes_by_step_and_sees_only_whole_checkpoints(tmp_path):
    model = make()
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    for step in (9, 100, 20):
        checkpoint.save_training(tmp_path / f"step_{step}", model, adam(model), {"step": step})
    checkpoint.save(model, tmp_path / "step_999")  # weights only
    checkpoint.save_training(tmp_path / ".step_500.part", model, adam(model), {"step": 500})
    assert checkpoint.latest(tmp_path) == tmp_path / "step_100"


@pytest.mark.oracle
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "model_type, changes",
    [("qwen2", {}), ("qwen3", {"attention_bias": True}), ("llama", {"rope_scaling": SCALING})],
)
def test_transformers_opens_the_folder(tmp_path, model_type, tied, changes):
    transformers = pytest.importorskip("transformers")
    model, tokenizer = make(model_type, tied, **changes), train_toy(["a b"], 300)
    checkpoint.save(model, tmp_path, tokenizer)
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info  # no missing, unexpected or mismatched tensor
    assert theirs.generation_config.eos_token_id == list(tokenizer.stop_ids)
    ids = torch.randint(0, 48, (2, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("model_type", ["Qwen2", "Qwen3", "Llama"])
@pytest.mark.parametrize("shard_size", ["5GB", "8KB"])
def test_folders_of_transformers_open_here(tmp_path, model_type, shard_size):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{model_type}Config")(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=64,
    )  # fmt: skip
    theirs = getattr(transformers, f"{model_type}ForCausalLM")(config)
    theirs.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / checkpoint.INDEX).exists() == (shard_size == "8KB")
    ours = checkpoint.load(tmp_path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, rtol=1e-4, atol=1e-5)
