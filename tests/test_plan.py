"""--plan: what is printed from a config.json alone, which flags are suggested, what a run notes."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_rl
import train_sft
from conftest import metrics
from minibridge import measure, plan
from minibridge.config import run_main
from minibridge.data import Example

QWEN_7B = {
    "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": False}
QWEN_1_5B = QWEN_7B | {"hidden_size": 1536, "intermediate_size": 8960, "num_attention_heads": 12, "num_key_value_heads": 2,
                       "vocab_size": 151936, "tie_word_embeddings": True}


@pytest.fixture
def folder(tmp_path):
    """Makes a folder that holds a config.json and nothing else."""
    def make(config: dict) -> str:
        (tmp_path / "config.json").write_text(json.dumps(config))
        return str(tmp_path)
    return make


def rl(model, **flags) -> train_rl.Config:
    return train_rl.Config(model=model, data="missing.jsonl", out="nowhere", **flags)


def gpu(monkeypatch, gib=80.0):
    monkeypatch.setattr(plan, "pick_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(plan, "_rates", lambda device, dtype: (1e15, 3e12))
    monkeypatch.setattr(plan, "free_memory", lambda device: gib * 2**30)


def test_the_papers_run_fits_80_gib(folder, monkeypatch):
    gpu(monkeypatch)
    planned = plan.rl(rl(folder(QWEN_1_5B), val="missing.jsonl"))
    weights = 1_543_714_304  # as the model's own files count them
    for items in planned.phases.values():
        assert items["parameters"] == 4 * weights and items["Adam's moments"] == 8 * weights
        assert items["reference"] == 2 * weights and not items["this process"]
    assert planned.phases["training"]["gradients"] == 4 * weights
    shown = str(planned)
    assert "28 layers, 1,543.7 million parameters; bfloat16 products on a GPU" in shown
    assert "32 prompts of at most 1,024 tokens, 32 answers to each of at most 2,560" in shown
    highest = max(items.total() for items in planned.phases.values())
    assert f"Planned memory fits: it takes up to {highest / 2**30:.2f} of 80.00 GiB that are free, while" in shown
    table = [line.split() for line in shown.split("\n\n")[1].splitlines()]
    assert table[0] == ["GiB", "decoding", "validating", "training"]
    assert table[-1] == ["total", *(f"{items.total() / 2**30:.2f}" for items in planned.phases.values())]
    assert len({len(line) for line in shown.split("\n\n")[1].splitlines()}) == 1  # aligned
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    assert "\n".join(line.rstrip() for line in shown.split("\n\n")[1].splitlines()) in readme
    assert "reference" not in str(plan.rl(rl(folder(QWEN_1_5B), kl_coef=0.0)))


def suggested(planned: plan.Plan) -> dict[str, int]:
    return {flag: int(value) for line in planned.advice() if "would fit with" in line
            for flag, value in re.findall(r"--([a-z-]+) (\d+)", line)}


@pytest.mark.parametrize("gib, flags", [(80.0, {}), (300.0, {}), (50.0, {"rows": 1000}), (40.0, {"micro_tokens": 100_000})])
def test_suggestions_fit_and_twice_as_much_would_not(folder, monkeypatch, gib, flags):
    gpu(monkeypatch, gib)
    config = rl(folder(QWEN_1_5B), **flags)
    planned = plan.rl(config)
    found, checkpointing = suggested(planned), any("--checkpointing" in line for line in planned.advice())
    assert found and not any("not fit" in line for line in planned.advice())
    for flag, phase in (("micro-tokens", "training"), ("rows", "decoding")):
        name, value = flag.replace("-", "_"), found.get(flag)
        now = replace(config, checkpointing=checkpointing and flag == "micro-tokens")
        if value is None:  # what is set already is the largest that fits
            value = getattr(config, name)
        fits, twice = (plan.rl(replace(now, **{name: times * value})).phases[phase].total() / 2**30 for times in (1, 2))
        assert fits <= 0.9 * gib
        assert twice > 0.9 * gib or value >= {"rows": 1024, "micro_tokens": 32 * (1024 + 32 * 2560)}[name]


def test_a_model_that_is_too_large_is_told_so(folder, monkeypatch):
    gpu(monkeypatch)
    planned = plan.rl(rl(folder(QWEN_7B)))
    assert planned.verdict().startswith("Planned memory DOES NOT FIT: it takes up to ")
    assert [line.split(" would not fit: ")[0] for line in planned.advice()] == [
        "Even --checkpointing --micro-tokens 3584", "Even --rows 1"]


@pytest.mark.parametrize("script", [train_rl, train_sft])
def test_plan_needs_a_config_alone(folder, tmp_path, capsys, script):
    words = ["--model", folder(QWEN_7B), "--data", str(tmp_path / "missing.jsonl"), "--out", str(tmp_path / "out"), "--plan",
             "--device", "cpu"]
    assert run_main(script.main, script.Config, words) == 0
    assert "7,615.6 million parameters; float32 products on a CPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("script, flags, line", [
    (train_rl, "--max-prompt 90 --max-new-tokens 20 --micro-tokens 109",
     "error: micro_tokens: 109 cannot hold a prompt of 90 and an answer of 20 tokens, which the flags allow"),
    (train_sft, "--max-length 110 --micro-tokens 109",
     "error: micro_tokens: 109 cannot hold an example of 110 tokens, which the flags allow"),
    (train_rl, "--max-new-tokens 40000", "error: max_new_tokens: 40000 leave no room for a prompt in the model's "
                                         "max_position_embeddings 32768 (--max-new-tokens)"),
    (train_rl, "--model {}/none", "error: {}/none: no such folder"),
    (train_sft, "--model {0}/empty", "error: {0}/empty/config.json: No such file or directory")])
def test_bad_flags_get_one_line(folder, tmp_path, capsys, script, flags, line):
    (tmp_path / "empty").mkdir()
    words = f"--model {folder(QWEN_7B)} --data x --out {tmp_path}/out --plan --device cpu {flags}".format(tmp_path).split()
    assert run_main(script.main, script.Config, words) == 2
    assert capsys.readouterr().err.splitlines() == [line.format(tmp_path)]


def test_examples_at_hand_give_the_mean_length(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "LOOKED_AT", 5)
    config = train_sft.Config(model=toy.model, data=toy.sft, out="nowhere", device="cpu", batch_size=4, epochs=2.0)
    with_data, without = plan.sft(config), plan.sft(replace(config, data="missing.jsonl"))
    lengths = [len(example.ids) for example in train_sft.load_sft(toy.sft, toy.tokenizer, 800)]
    assert sum(lengths[:5]) / 5 != pytest.approx(sum(lengths) / 12, abs=1)
    assert f"{sum(lengths[:5]) / 5:,.0f} on average" in str(with_data) and "1,024 on average" in str(without)
    assert with_data.steps == 6 and without.steps == 0
    bare = tmp_path / "bare"
    shutil.copytree(toy.model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert plan.sft(replace(config, model=str(bare))).seconds == pytest.approx(without.seconds, rel=1e-6)


def test_seconds(folder, monkeypatch):
    """Decoding reads the weights, and the keys of prompts once a group; training multiplies."""
    model = folder(QWEN_1_5B | {"num_hidden_layers": 2, "vocab_size": 1000})
    config = rl(model, prompts=4, samples=8, rows=16, max_prompt=100, max_new_tokens=50, device="cpu")
    body = 2 * (1536 * (2 * 1536 + 2 * 256 + 3 * 8960 + 2) + 1536 + 2 * 256) + 1536
    slot = 2 * 2 * 256 * 4
    monkeypatch.setattr(plan, "_rates", lambda *_: (1e30, 1.0))
    read = 4 * (body + 1536 * 1000) + slot * (2 * 100 + 16 * 25)
    assert plan.rl(config).seconds["decoding"] == pytest.approx(2 * 50 * read)
    monkeypatch.setattr(plan, "_rates", lambda *_: (1.0, 1e30))
    tokens, pairs = 4 * 100 + 32 * 50, 4 * 100**2 / 2 + 32 * 50 * 125
    once = 2 * body * tokens + 2 * 1536 * 1000 * 32 * 50 + 4 * 2 * 12 * 128 * pairs
    assert plan.rl(config).seconds["training"] == pytest.approx(4 * once)
    found = plan.rl(replace(config, kl_coef=0.0, updates=2, checkpointing=True)).seconds["training"]
    again = once - 2 * 1536 * 1000 * 32 * 50  # layers, without the head
    assert found == pytest.approx(7 * once + 2 * again)
    config = train_sft.Config(model=model, data="x", out="x", device="cpu", batch_size=3, max_length=100)
    layers, head = 2 * body * 300 + 4 * 2 * 12 * 128 * 3 * 100**2 / 2, 2 * 1536 * 1000 * 3
    assert plan.sft(config).seconds["training"] == pytest.approx(3 * (layers + 99 * head))
    known = plan.sft(replace(config, checkpointing=True), [Example([0] * 100, [0] * 60 + [1] * 40)])
    assert known.seconds["training"] == pytest.approx(4 * layers + 3 * 40 * head)


@pytest.mark.parametrize("script, flags", [(train_rl, "--prompts 3 --samples 2 --max-new-tokens 8 --steps 2 --show-every 0"),
                                           (train_sft, "--batch-size 6 --epochs 1")])
def test_a_run_notes_its_plan_beside_what_it_took(toy, tmp_path, capsys, script, flags):
    data = toy.rl if script is train_rl else toy.sft
    words = f"--model {toy.model} --data {data} --out {tmp_path} --device cpu {flags}".split()
    assert run_main(script.main, script.Config, words) == 0
    noted = json.loads((tmp_path / "run.json").read_text())["plan"]
    words = capsys.readouterr().out.split()
    assert words[:6] == ["Planned", "memory", "fits:", "it", "takes", "up"]
    assert float(words[7]) == pytest.approx(noted["planned_gib"], abs=0.01)
    phase = noted["gib"]["training"]
    assert noted["planned_gib"] == pytest.approx(max(sum(items.values()) for items in noted["gib"].values()), abs=0.01)
    rows = metrics(tmp_path)
    assert len(rows) == 2 and all(0.7 * phase["this process"] < row["memory_gib"] < 64 for row in rows)


def test_validation_is_planned_for_the_prompts_held_out(toy):
    """They may be longer than those to train on."""
    config = rl(toy.model, device="cpu", val="missing.jsonl", max_prompt=200, max_new_tokens=8, rows=2)
    short, long, unseen = (plan.rl(config, *given).phases for given in (([50], [50] * 3), ([50], [50, 200, 50]), ()))
    assert short["decoding"] == long["decoding"] and short["training"] == long["training"]
    kept = [phases["validating"]["keys and values"] for phases in (short, long, unseen)]
    assert 2 * kept[0] < kept[1] <= kept[2]


def test_the_process_counts_less_what_it_has_loaded(toy, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda: 10**9)
    config = rl(toy.model, device="cpu", max_new_tokens=8)
    before, loaded = plan.rl(config), plan.rl(config, [50, 60], [70, 80, 90])
    weights = sum(parameter.nbytes for parameter in toy.load().parameters())
    assert before.phases["decoding"]["this process"] == 10**9
    assert loaded.phases["decoding"]["this process"] == 10**9 - 2 * weights  # the model and its reference


def test_examples_alone_are_no_loaded_model(toy, monkeypatch):
    monkeypatch.setattr(plan, "resident", lambda: 10**9)
    config = train_sft.Config(model=str(toy.model), data="missing.jsonl", out="nowhere", device="cpu")
    found = [plan.sft(config, [Example([0] * 50, [1] * 50)], loaded).phases["training"]["this process"] for loaded in (False, True)]
    assert found == [10**9, 10**9 - sum(parameter.nbytes for parameter in toy.load().parameters())]


def test_memory_of_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    assert measure.resident() < measure.free_memory(cpu)
    monkeypatch.setattr(measure, "_read_kib", lambda *_: 0)  # as where there is no /proc
    assert measure.free_memory(cpu) > 2**30 and measure.highest_memory(cpu) != measure.highest_memory(cpu)  # NaN
