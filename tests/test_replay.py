"""A second look at a step that was not finite: the same losses, and the place where it went wrong."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import train_rl
from conftest import metrics
from minibridge import replay
from minibridge.config import run_main
from minibridge.optim import NonFinite

CPU = torch.device("cpu")


def train(toy, out, *flags) -> int:
    words = ["--model", toy.model, "--data", toy.rl, "--out", out, "--device", "cpu", "--prompts", 3, "--samples", 4,
             "--max-new-tokens", 12, "--steps", 2, "--learning-rate", 0.01, "--show-every", 0, "--kl-coef", 0.1,
             "--micro-tokens", 600, *" ".join(map(str, flags)).split()]
    return run_main(train_rl.main, train_rl.Config, [str(word) for word in words])


def second_look(path, capsys) -> list[str]:
    capsys.readouterr()
    assert run_main(replay.main, replay.Config, ["--replay", str(path), "--device", "cpu"]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("flags", ["", "--preset gspo", "--tis-cap 2 --mask-truncated", "--checkpointing"])
def test_the_replayed_losses_are_those_of_the_step(toy, tmp_path, monkeypatch, flags):
    assert train(toy, tmp_path / "whole", flags) == 0

    def refuse(model, optimizer, rate, clip):
        if len(metrics(tmp_path / "run")) == 1:
            raise NonFinite("just so")
        return update(model, optimizer, rate, clip)

    update = train_rl.update
    monkeypatch.setattr(train_rl, "update", refuse)
    assert train(toy, tmp_path / "run", flags) == 2
    model, batches, step = replay.load_failure(tmp_path / "run" / "failed_step_0002.safetensors", CPU)
    found = [replay.examine(model, batch, step) for batch in batches]
    assert len(batches) > 1 and not any(finding.where for finding in found)
    loss = sum(finding.loss for finding in found)
    assert loss == pytest.approx(metrics(tmp_path / "whole")[1]["loss"], rel=1e-5, abs=1e-9)
    alone = [replay.examine(model, row, step).loss for batch in batches for row in replay.rows(batch)]
    assert len(alone) == 12 and sum(alone) == pytest.approx(loss, rel=1e-4, abs=1e-8)


def broken_input(monkeypatch):
    """The reference's log-probability of one token of the second answer."""
    def broken(model, batch, temperature, **options):
        found = answer_logps(model, batch, temperature, **options)
        found[0][1, 3] = math.nan
        return found

    answer_logps = train_rl.answer_logps
    monkeypatch.setattr(train_rl, "answer_logps", broken)


def test_a_broken_input_is_traced_to_its_answer(toy, tmp_path, monkeypatch, capsys):
    broken_input(monkeypatch)
    assert train(toy, tmp_path) == 2
    assert "step 1: the loss is nan" in capsys.readouterr().err
    monkeypatch.undo()
    lines = second_look(tmp_path / "failed_step_0001.safetensors", capsys)
    assert lines[0] == "weights that are not finite: none"
    answers = [line.split() for line in lines if line.startswith("  answer")]
    assert answers and all(words[1] == "1" and words[-2:] == ["input", "ref_logps"] for words in answers)
    batches = [line for line in lines if line[:1].isdigit()]
    assert len(batches) == len(answers) and all(line.endswith("input ref_logps") for line in batches)


@pytest.mark.parametrize("name, value, where", [
    ("model.layers.1.mlp.down_proj.weight", 1e38, "output of model.layers.1.mlp"),
    ("model.layers.0.self_attn.q_proj.bias", math.inf, "output of model.layers.0.self_attn.q_proj"),
    ("model.norm.weight", 3e38, "output of model.norm")])
def test_the_first_module_that_overflows_is_named(toy, tmp_path, monkeypatch, capsys, name, value, where):
    def refuse(*words):
        raise NonFinite("just so")

    monkeypatch.setattr(train_rl, "update", refuse)
    assert train(toy, tmp_path) == 2
    path = tmp_path / "failed_step_0001.safetensors"
    model, batches, step = replay.load_failure(path, CPU)
    with torch.no_grad():
        dict(model.named_parameters())[name].fill_(value)
    replay.save_failure(path, model, batches, step)
    lines = second_look(path, capsys)
    assert lines[0] == "weights that are not finite: " + (name if math.isinf(value) else "none")
    assert all(line.endswith(where) for line in lines if line[:1].isdigit())


@pytest.mark.parametrize("name, tensor", [
    ("0/answers", torch.full((4, 12), 10**6)), ("0/owner", torch.zeros(4)), ("0/prompt_lengths", torch.tensor([999])),
    ("0/prompt_lengths", torch.tensor([0])),
    ("0/trained", torch.ones(4, 12)), ("0/advantages", torch.ones(3)), ("0/ref_logps", None)])
def test_tensors_that_do_not_fit_are_refused_in_one_line(toy, tmp_path, monkeypatch, capsys, name, tensor):
    broken_input(monkeypatch)
    assert train(toy, tmp_path, "--micro-tokens 5000") == 2
    path = tmp_path / "failed_step_0001.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    tensors |= {name: tensor}
    save_file({key: value for key, value in tensors.items() if value is not None}, path, metadata)
    capsys.readouterr()
    assert run_main(replay.main, replay.Config, ["--replay", str(path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: not what a failed step leaves") and error.count("\n") == 1


def test_no_memory_is_no_fault_of_the_file(toy, tmp_path, monkeypatch, capsys):
    broken_input(monkeypatch)
    assert train(toy, tmp_path) == 2

    def examine(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(replay, "examine", examine)
    capsys.readouterr()
    words = ["--replay", str(tmp_path / "failed_step_0001.safetensors"), "--device", "cpu"]
    assert run_main(replay.main, replay.Config, words) == 2
    assert capsys.readouterr().err.startswith("error: no memory: DefaultCPUAllocator")


@pytest.mark.parametrize("change", [{"temperature": 10**400}, {"normalizer": 10**400}], ids=["temperature", "normalizer"])
def test_numbers_without_end_are_refused_in_one_line(toy, tmp_path, monkeypatch, capsys, change):
    broken_input(monkeypatch)
    assert train(toy, tmp_path) == 2
    path = tmp_path / "failed_step_0001.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()
    save_file(tensors, path, metadata | {"step": json.dumps(json.loads(metadata["step"]) | change)})
    capsys.readouterr()
    assert run_main(replay.main, replay.Config, ["--replay", str(path), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: not what a failed step leaves") and error.count("\n") == 1


@pytest.mark.parametrize("damage", ["missing", "cut", "no metadata", "a folder"])
def test_another_file_is_refused_in_one_line(toy, tmp_path, capsys, damage):
    path = {"no metadata": f"{toy.model}/model.safetensors", "a folder": toy.model}.get(damage, tmp_path / "x.safetensors")
    if damage == "cut":
        path.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    assert run_main(replay.main, replay.Config, ["--replay", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}") and error.count("\n") == 1
