"""One step's rollouts under all presets: what train_rl.py would have done, whatever the micro-batches; bad files named."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

import train_rl
from minibridge import compare_losses
from minibridge.checkpoint import load, save
from minibridge.compare_losses import Config
from minibridge.config import read_jsonl, run_main, write_jsonl
from minibridge.grpo import PRESETS
from minibridge.model import Decoder
from minibridge.tokenizer import train_toy

NAMES = list(PRESETS)


def run(toy, guesser, out, *flags) -> int:
    """At a temperature where the guesser sometimes loses its thread, so that lengths differ."""
    words = ["--model", guesser, "--data", toy.rl, "--out", out, "--device", "cpu", "--prompts", 2,
             "--samples", 16, "--max-new-tokens", 12, "--temperature", 2.5, "--show-every", 0, *flags]
    return run_main(train_rl.main, train_rl.Config, [str(word) for word in words])


@pytest.fixture(scope="module")
def step(toy, guesser, tmp_path_factory) -> Path:
    """Rollouts of two prompts, 16 answers each, in the folder of a run that moved on from them."""
    out = tmp_path_factory.mktemp("step")
    assert run(toy, guesser, out, "--steps", 3, "--learning-rate", 0.003) == 0
    assert read_jsonl(out / "metrics.jsonl")[0]["dead_groups"] == 0
    assert len({len(line["ids"]) for line in read_jsonl(out / "rollouts" / "step_0001.jsonl")}) > 3
    return out


def compare(rollouts, model, *flags) -> int:
    return run_main(compare_losses.main, Config, ["--rollouts", str(rollouts), "--model", str(model), "--device", "cpu",
                                                  *map(str, flags)])


def table(capsys, step, model, *flags) -> dict[str, list[str]]:
    """Cells by preset: loss, gradient norm, clipped, and a cosine for each preset."""
    capsys.readouterr()
    assert compare(step / "rollouts" / "step_0001.jsonl", model, *flags) == 0
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in capsys.readouterr().out.splitlines()]
    assert rows[0][:4] == ["preset", "loss", "gradient norm", "clipped"] and all(len(row) == 4 + len(NAMES) for row in rows)
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("name", NAMES)
def test_each_row_is_the_first_step_of_training_with_that_preset(toy, guesser, step, tmp_path, capsys, name):
    """The rollouts of a first step do not depend on the preset."""
    ratios = () if PRESETS[name].clip_low is None else ("--old-logps", "sampler")
    assert run(toy, guesser, tmp_path, "--steps", 1, "--preset", name, *ratios) == 0
    assert read_jsonl(tmp_path / "rollouts" / "step_0001.jsonl") == read_jsonl(step / "rollouts" / "step_0001.jsonl")
    (logged,) = read_jsonl(tmp_path / "metrics.jsonl")
    cells = table(capsys, step, guesser)[name]
    assert float(cells[0]) == pytest.approx(logged["loss"], abs=2e-6)
    assert float(cells[1]) == pytest.approx(logged["grad_norm"], rel=1e-3) and logged["grad_norm"] > 0.01


def test_groups_that_were_sampled_to_refill_and_not_trained_on_do_not_count(toy, guesser, tmp_path, capsys):
    assert run(toy, guesser, tmp_path, "--steps", 1, "--preset", "dapo", "--old-logps", "sampler", "--samples", 3,
               "--refill", 3) == 0
    (logged,) = read_jsonl(tmp_path / "metrics.jsonl")
    assert logged["groups"] > logged["groups"] * (1 - logged["dead_groups"]) > 0
    cells = table(capsys, tmp_path, guesser)["dapo"]
    assert float(cells[1]) == pytest.approx(logged["grad_norm"], rel=1e-3) and logged["grad_norm"] > 0.01


def test_on_the_model_that_sampled_them_clips_do_nothing(guesser, step, capsys):
    rows = table(capsys, step, guesser)
    assert list(rows) == NAMES and {row[2] for row in rows.values()} == {"0.0%"}
    cosines = {(name, other): rows[name][3 + place] for name in NAMES for place, other in enumerate(NAMES)}
    assert {cosines[name, name] for name in NAMES} == {"1.0000"}
    assert all(cosines[name, other] == cosines[other, name] for name in NAMES for other in NAMES)
    assert cosines["dapo", "cispo"] == cosines["cispo", "grpo_zero"] == "1.0000"


def test_on_a_later_model_the_clips_tell(step, capsys):
    rows = table(capsys, step, step / "model")
    assert rows["gspo"][2] != "0.0%" and rows["grpo_zero"][2] == "0.0%"
    assert rows["paper"][3 + NAMES.index("gspo")] != "1.0000"


def test_micro_batches_change_nothing(step, capsys):
    assert table(capsys, step, step / "model") == table(capsys, step, step / "model", "--micro-tokens", 150)


def test_the_run_says_where_prompts_and_reference_are_unless_told(toy, guesser, step, tmp_path, capsys):
    """Of a run whose files have moved: told where they are, the table is the same."""
    moved = tmp_path / "moved"
    shutil.copytree(step, moved)
    record = json.loads((moved / "run.json").read_text())
    record["config"] |= {"data": "gone.jsonl", "model": "gone"}
    (moved / "run.json").write_text(json.dumps(record))
    assert compare(moved / "rollouts" / "step_0001.jsonl", step / "model") == 2
    assert "gone: no such folder" in capsys.readouterr().err
    assert compare(moved / "rollouts" / "step_0001.jsonl", step / "model", "--reference", guesser) == 2
    assert "gone.jsonl: No such file" in capsys.readouterr().err
    told = table(capsys, moved, step / "model", "--reference", guesser, "--data", toy.rl)
    assert told == table(capsys, step, step / "model")
    other = table(capsys, moved, step / "model", "--reference", toy.model, "--data", toy.rl)
    assert other["paper"][0] != told["paper"][0] and other["dapo"][:3] == told["dapo"][:3]  # only one has a KL term


def test_a_gradient_of_zero_has_no_direction(guesser, step, tmp_path, capsys):
    """All rewards equal: nothing is learned but the paper's entropy bonus."""
    shutil.copytree(step, tmp_path / "run")
    path = tmp_path / "run" / "rollouts" / "step_0001.jsonl"
    write_jsonl(path, [line | {"reward": 0.1} for line in read_jsonl(path)])
    rows = table(capsys, tmp_path / "run", guesser)
    assert {tuple(row[1:2] + row[3:]) for name, row in rows.items() if name != "paper"} == {("0", *["nan"] * len(NAMES))}
    assert rows["paper"][3] == "1.0000" and float(rows["paper"][1]) > 0


def test_bad_input_is_one_line(toy, guesser, step, tmp_path, capsys):
    shutil.copytree(step, tmp_path / "run")
    path = tmp_path / "run" / "rollouts" / "step_0001.jsonl"
    rows = read_jsonl(path)

    def refused(message: str, rollouts=path):
        assert compare(rollouts, guesser) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1

    write_jsonl(path, [rows[0] | {"ids": "x"}, *rows[1:]])
    refused(f"{path}:1: field 'ids' must be a list")
    write_jsonl(path, [rows[0] | {"ids": [10**6], "logprobs": [-1.0]}, *rows[1:]])
    refused(f"{path}: a token 1000000, but the model's vocab_size is")
    few = Decoder(dataclasses.replace(load(guesser).config, vocab_size=259))  # a reference whose tokenizer is another
    few.init_weights(torch.Generator().manual_seed(0))
    save(few, tmp_path / "few", train_toy(["a"], 259))
    write_jsonl(path, [rows[0] | {"ids": [259], "logprobs": [-1.0]}, *rows[1:]])
    assert compare(path, guesser, "--reference", tmp_path / "few") == 2
    assert f"{path}: a token " in (error := capsys.readouterr().err) and "but the reference's vocab_size is 259" in error
    write_jsonl(path, [])
    refused(f"{path}: no lines in it")
    refused(f"{tmp_path}/run.json: No such file or directory; --rollouts must lie in a run folder",
            tmp_path / "run" / "run.json")
    (tmp_path / "run" / "run.json").write_text('{"config": {"data": 1}}')
    refused("run.json: not the record of a run of train_rl.py")


@pytest.mark.parametrize("name, value", [("temperature", 0.0), ("temperature", -1.0), ("prompts", 0), ("prompts", 2.7), ("prompts", True),
                                         ("max_new_tokens", 0), ("data", None)])
def test_settings_that_no_run_has(step, guesser, tmp_path, capsys, name, value):
    record = json.loads((step / "run.json").read_text())
    record["config"][name] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "rollouts").mkdir()
    rollouts = tmp_path / "rollouts" / "step_0001.jsonl"
    rollouts.write_bytes((step / "rollouts" / "step_0001.jsonl").read_bytes())
    words = ["--rollouts", str(rollouts), "--model", str(guesser), "--device", "cpu"]
    assert run_main(compare_losses.main, compare_losses.Config, words) == 2
    assert f"{tmp_path}/run.json: not the record of a run of train_rl.py" in capsys.readouterr().err
