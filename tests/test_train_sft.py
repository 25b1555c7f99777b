"""SFT: the loss against a naive one, micro-batches, learning to stop, exact resume, one-line errors."""

import itertools
import json
import math
import os
import resource
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import train_sft
from conftest import make_model, metrics, weights, without_times
from minibridge import checkpoint
from minibridge.config import parse, read_jsonl, run_main, write_jsonl
from minibridge.data import Example, index_stream, load_sft
from minibridge.generate import generate
from minibridge.optim import NonFinite, learning_rate
from minibridge.tokenizer import Tokenizer, train_toy
from train_sft import Config, accumulate

CPU = torch.device("cpu")


def train(toy, out, *flags, data=None) -> int:
    """Batches of 6 from 12 lines: two steps an epoch."""
    words = ["--model", toy.model, "--data", data or toy.sft, "--out", out, "--device", "cpu",
             "--batch-size", 6, "--learning-rate", 0.003, "--max-length", 800,
             *" ".join(map(str, flags)).split()]
    return run_main(train_sft.main, Config, [str(word) for word in words])


def naive_loss(model, examples) -> torch.Tensor:
    """Mean negative log-likelihood of the tokens under the mask: row by row, all logits, no padding."""
    total, count = 0.0, 0
    for example in examples:
        logps = model.logits(model(torch.tensor([example.ids])))[0].log_softmax(-1)  # (T, V)
        for position in range(1, len(example.ids)):
            if example.mask[position]:
                total, count = total - logps[position - 1, example.ids[position]], count + 1
    return total / count


def gradients(model) -> dict:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def largest_difference(one: dict, other: dict) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_steps_lower_the_loss_and_move_every_weight(toy, tmp_path, capsys):
    assert train(toy, tmp_path, "--batch-size 12 --epochs 2") == 0
    first, second = metrics(tmp_path)
    assert second["loss"] < first["loss"] - 0.1
    start, end = toy.load().state_dict(), checkpoint.load(tmp_path / "model").state_dict()
    assert not any(torch.equal(start[name], end[name]) for name in start)
    assert Tokenizer.load(tmp_path / "model").encode("b = 6") == toy.tokenizer.encode("b = 6")
    values = [value for row in metrics(tmp_path) for value in row.values()]
    assert all(isinstance(value, (int, float)) for value in values)  # null if it was not finite
    assert json.loads((tmp_path / "run.json").read_text())["config"]["epochs"] == 2
    assert capsys.readouterr().out.count("step ") == 2


@pytest.mark.parametrize("flag", ["--no-whole-chat", "--whole-chat"])
def test_logged_losses_are_the_naive_ones(toy, tmp_path, flag):
    """Of the answers alone or of whole chats; before the first step, and on held-out lines after the last."""
    val, out = tmp_path / "val.jsonl", tmp_path / "run"
    write_jsonl(val, read_jsonl(toy.sft)[:5])
    assert train(toy, out, flag, "--batch-size 12 --epochs 1 --micro-tokens 800 --val", val) == 0
    (row,) = metrics(out)
    examples = load_sft(toy.sft, toy.tokenizer, 800, whole_chat=flag == "--whole-chat")
    with torch.no_grad():
        assert row["loss"] == pytest.approx(naive_loss(toy.load(), examples).item(), abs=1e-5)
        assert row["val_loss"] == pytest.approx(
            naive_loss(checkpoint.load(out / "model"), examples[:5]).item(), abs=1e-5)


def test_the_first_example_is_shown_as_the_loss_sees_it(toy, tmp_path, capsys):
    """Of the answer what comes after the tag that opens it, of the whole chat all but its first token; to the stop token."""
    messages = read_jsonl(toy.sft)[0]["messages"]
    answer, chat = messages[-1]["content"], toy.tokenizer.render(messages)
    for flag, text in (("--no-whole-chat", answer.removeprefix("<think>\n")), ("--whole-chat", chat.removeprefix("<|im_start|>"))):
        assert train(toy, tmp_path / flag, flag, "--batch-size 12 --epochs 1") == 0
        (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("first example: trains on ")]
        example = load_sft(toy.sft, toy.tokenizer, 800, whole_chat=flag == "--whole-chat")[0]
        assert line == (f"first example: trains on {sum(example.mask[1:])} of its {len(example.ids)} tokens, "
                        f"from {text[:30]!r} to {(answer + '<|im_end|>')[-30:]!r}")


def test_accumulated_gradient_is_the_naive_one(toy):
    """Also in pieces of any size and in any order: rows of few answer tokens weigh less than rows of many."""
    examples = load_sft(toy.sft, toy.tokenizer, 800)[:6]
    examples[1] = Example(examples[1].ids, [0] * (len(examples[1].ids) - 2) + [1, 1])
    model = toy.load()
    loss = naive_loss(model, examples)
    loss.backward()
    naive = gradients(model)
    assert max(gradient.abs().max().item() for gradient in naive.values()) > 0.01
    longest = max(len(example.ids) for example in examples)
    for micro_tokens in (longest, 2 * longest, 16384):
        for batch in (examples, examples[::-1], examples[3:] + examples[:3]):
            config = parse(Config, f"--model x --data x --out x --micro-tokens {micro_tokens}".split())
            found = accumulate(model, batch, config)
            assert found == pytest.approx(loss.item(), rel=1e-6)
            assert largest_difference(gradients(model), naive) < 1e-6


def test_stopping_is_learned(toy, tmp_path):
    """Fitted to one short answer, the model writes it and ends its turn, after the prompt that RL gives."""
    line = read_jsonl(toy.sft)[0]
    line["messages"][-1]["content"] = "<think>\nb = 6.\n</think>\n<answer>\n\\boxed{6}\n</answer>"
    write_jsonl(tmp_path / "one.jsonl", [line])
    assert train(toy, tmp_path, "--batch-size 1 --epochs 25 --learning-rate 0.02 --log-every 25",
                 data=tmp_path / "one.jsonl") == 0
    model, tokenizer = checkpoint.load(tmp_path / "model"), toy.tokenizer
    prompt = tokenizer.encode_prompt(line["messages"][:2])
    (group,) = generate(model, [prompt], max_new_tokens=80, temperature=0, stop_ids=tokenizer.stop_ids)
    (completion,) = group
    assert completion.finish_reason == "stop" and completion.ids[-1] == tokenizer.end_of_turn_id
    assert "<think>\n" + tokenizer.decode(completion.ids) == line["messages"][-1]["content"]


def test_an_epoch_is_every_line_once(toy, tmp_path, monkeypatch):
    seen = []

    def spy(model, batch, *rest):
        seen.append([example.ids for example in batch])
        return accumulate(model, batch, *rest)

    monkeypatch.setattr(train_sft, "accumulate", spy)
    assert train(toy, tmp_path, "--epochs 2") == 0
    everything = sorted(example.ids for example in load_sft(toy.sft, toy.tokenizer, 800))
    assert sorted(seen[0] + seen[1]) == sorted(seen[2] + seen[3]) == everything
    assert seen[:2] != seen[2:]


def test_learning_rate_validations_and_console(toy, tmp_path, capsys):
    assert train(toy, tmp_path, "--epochs 2.5 --warmup 2 --schedule cosine --val", toy.sft,
                 "--eval-every 2 --log-every 3") == 0
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    expected = [learning_rate(step, 5, 0.003, 2, "cosine") for step in range(5)]
    assert [row["learning_rate"] for row in rows] == expected
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 5]
    shown = [line.split("|")[0].split() for line in capsys.readouterr().out.splitlines()]
    assert shown[0][:4] == ["Planned", "memory", "fits:", "it"]
    assert shown[1][:2] == ["first", "example:"]
    assert shown[2:] == [["step", f"{step}/5"] for step in (2, 3, 4, 5)] + [[f"{tmp_path}/model:", "written"]]


def test_flags_reach_the_optimizer(toy, tmp_path, monkeypatch):
    made, taken = [], []
    make, take = train_sft.adamw, train_sft.update
    monkeypatch.setattr(train_sft, "adamw", lambda *words: made.append(words[1:]) or make(*words))
    monkeypatch.setattr(train_sft, "update", lambda *words: taken.append(words[2:]) or take(*words))
    assert train(toy, tmp_path, "--epochs 0.5 --beta2 0.9 --weight-decay 0.2 --clip 0.3") == 0
    assert made == [((0.9, 0.9), 0.2)] and taken == [(0.003, 0.3)]


SETTINGS = "--epochs 2 --save-every 2 --schedule cosine --warmup 1"  # 4 steps, two orders of the lines


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory):
    """A run of four steps, never cut."""
    out = tmp_path_factory.mktemp("whole")
    assert train(toy, out, SETTINGS) == 0
    return out


def test_resumed_run_is_the_whole_run_bit_for_bit(toy, whole, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # killed while writing step 4
    assert train(toy, out, SETTINGS, "--resume") == 0
    assert weights(out / "model") == weights(whole / "model")
    assert without_times(metrics(out)) == without_times(metrics(whole))
    assert [row["step"] for row in metrics(out)] == [1, 2, 3, 4]
    assert json.loads((out / "run.json").read_text())["resume_step"] == 3


def test_interrupted_run_is_resumed_bit_for_bit(toy, whole, tmp_path, monkeypatch):
    def interrupted(model, optimizer, rate, clip):
        if next(iter(optimizer.state.values()), {"step": torch.tensor(0)})["step"] == 3:
            raise KeyboardInterrupt
        return update(model, optimizer, rate, clip)

    update = train_sft.update
    monkeypatch.setattr(train_sft, "update", interrupted)
    assert train(toy, tmp_path, SETTINGS) == 130
    assert not (tmp_path / "model").exists() and len(metrics(tmp_path)) == 3
    monkeypatch.undo()
    assert train(toy, tmp_path, SETTINGS, "--resume") == 0
    assert weights(tmp_path / "model") == weights(whole / "model")
    assert without_times(metrics(tmp_path)) == without_times(metrics(whole))


def test_a_full_disk_costs_the_new_checkpoint_only(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "model")
    before, limits = weights(out / "checkpoints" / "step_2"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * 3 // 2, limits[1]))  # the optimizer's file is twice the model's
    try:
        assert train(toy, out, SETTINGS, "--resume --save-every 1") == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {out}/checkpoints") and "File too large" in error and error.count("\n") == 1
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_2"]
    assert weights(out / "checkpoints" / "step_2") == before
    assert train(toy, out, SETTINGS, "--resume") == 0
    assert weights(out / "model") == weights(whole / "model")


def test_the_newest_checkpoints_stay(toy, whole, tmp_path):
    for keep, names in ((1, ["step_3"]), (2, ["step_2", "step_3"]), (0, ["step_1", "step_2", "step_3"])):
        out = tmp_path / str(keep)
        assert train(toy, out, SETTINGS, "--save-every 1 --keep", keep) == 0
        assert sorted(path.name for path in (out / "checkpoints").iterdir()) == names
        assert weights(out / "model") == weights(whole / "model")


def test_a_checkpoint_of_another_run_or_other_data_is_refused(toy, whole, tmp_path, capsys):
    """run.json alone would not notice either."""
    out, other = tmp_path / "run", tmp_path / "other"
    assert train(toy, other, SETTINGS, "--seed 1") == 0
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    shutil.copytree(other / "checkpoints", out / "checkpoints")
    assert train(toy, out, SETTINGS, "--resume") == 2
    assert f"{out}/checkpoints/step_2: not of this run" in capsys.readouterr().err
    data = tmp_path / "data.jsonl"
    shutil.copy(toy.sft, data)
    assert train(toy, tmp_path / "third", SETTINGS, data=data) == 0
    write_jsonl(data, read_jsonl(toy.sft)[::-1])
    assert train(toy, tmp_path / "third", SETTINGS, "--resume", data=data) == 2
    assert f"{data} or {toy.model} has changed since" in capsys.readouterr().err


def test_another_tokenizer_is_refused(toy, tmp_path, capsys):
    model, out = shutil.copytree(toy.model, tmp_path / "model"), tmp_path / "run"
    assert train(toy, out, SETTINGS, "--model", model) == 0
    train_toy(["Another text, with other words."] * 3, 290).save(model)
    assert train(toy, out, SETTINGS, "--resume --model", model) == 2
    assert f"{toy.sft} or {model} has changed since" in capsys.readouterr().err


def test_another_config_is_refused(toy, tmp_path, capsys):
    model, out = Path(shutil.copytree(toy.model, tmp_path / "model")), tmp_path / "run"
    assert train(toy, out, SETTINGS, "--model", model) == 0
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert train(toy, out, SETTINGS, "--resume --model", model) == 2
    assert f"{toy.sft} or {model} has changed since" in capsys.readouterr().err


def test_the_mark_of_a_checkpoint_is_of_what_the_run_has_read(toy, whole, tmp_path, monkeypatch, capsys):
    """Not of what lies there when it saves: the run goes on without its data file, which comes back and is right."""
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    shutil.copy(toy.sft, data)
    update = train_sft.update
    monkeypatch.setattr(train_sft, "update", lambda *words: data.unlink(missing_ok=True) or update(*words))
    assert train(toy, out, SETTINGS, data=data) == 0
    shutil.rmtree(out / "model")
    write_jsonl(data, read_jsonl(toy.sft)[::-1])
    assert train(toy, out, SETTINGS, "--resume", data=data) == 2
    shutil.copy(toy.sft, data)
    assert train(toy, out, SETTINGS, "--resume", data=data) == 0
    assert weights(out / "model") == weights(whole / "model")


def test_other_starting_weights_are_refused(toy, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(toy.model, model)
    moved = replace(toy, model=str(model))
    assert train(moved, tmp_path / "run", SETTINGS) == 0
    shutil.rmtree(tmp_path / "run" / "model")
    checkpoint.save(make_model(toy.tokenizer.vocab_size, seed=1), model, toy.tokenizer)
    assert train(moved, tmp_path / "run", SETTINGS, "--resume") == 2
    assert f"{model} has changed since" in capsys.readouterr().err


def test_a_finished_run_is_not_run_again(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = (out / "metrics.jsonl").read_bytes()
    assert train(toy, out, SETTINGS, "--resume") == 0
    assert f"{out}: this run is finished" in capsys.readouterr().out
    assert (out / "metrics.jsonl").read_bytes() == before and weights(out / "model") == weights(whole / "model")


@pytest.mark.parametrize("changed", ["data", "val"])
def test_a_finished_run_does_not_pass_for_one_on_other_rows(toy, tmp_path, capsys, changed):
    """Without a checkpoint too."""
    files, out = {"data": tmp_path / "data.jsonl", "val": tmp_path / "val.jsonl"}, tmp_path / "run"
    for path in files.values():
        shutil.copy(toy.sft, path)
    words = f"{SETTINGS} --save-every 0 --val {files['val']}"
    assert train(toy, out, words, data=files["data"]) == 0 and not (out / "checkpoints").exists()
    assert train(toy, out, words, "--resume", data=files["data"]) == 0
    write_jsonl(files[changed], read_jsonl(toy.sft)[::-1])
    assert train(toy, out, words, "--resume", data=files["data"]) == 2
    changes = f"{files['data']} or {files['val']} or {toy.model} has changed since; choose another --out"
    assert capsys.readouterr().err == f"error: {out}: {changes}\n"


def test_a_model_that_no_run_has_left_is_not_replaced(toy, tmp_path, capsys):
    shutil.copytree(toy.model, tmp_path / "model")
    moved = replace(toy, model=str(tmp_path / "model"))
    assert train(moved, tmp_path, SETTINGS, "--resume") == 2
    assert "no run.json" in capsys.readouterr().err and weights(tmp_path / "model") == weights(Path(toy.model))


def test_only_the_runs_own_folders_make_room(toy, whole, tmp_path):
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / ".mine").mkdir(parents=True)
    (checkpoints / ".DS_Store").touch()
    shutil.copytree(whole / "checkpoints" / "step_2", checkpoints / "best")
    for leftover in (".step_1.part", ".step_7.old"):
        (checkpoints / leftover).mkdir()
    assert train(toy, tmp_path / "run", SETTINGS, "--save-every 1 --keep 1") == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == [".DS_Store", ".mine", "best", "step_3"]


def test_resume_without_a_checkpoint_starts_at_the_beginning(toy, whole, tmp_path, capsys):
    assert train(toy, tmp_path / "new", SETTINGS, "--resume") == 0
    assert weights(tmp_path / "new" / "model") == weights(whole / "model")
    assert "no run yet, so one begins\n" in capsys.readouterr().out  # nothing was there to go on from
    died = tmp_path / "died"
    died.mkdir()
    shutil.copy(whole / "run.json", died)
    assert train(toy, died, SETTINGS, "--resume") == 0
    assert f"{died}: no checkpoint yet, so the run begins anew" in capsys.readouterr().out
    assert weights(died / "model") == weights(whole / "model")


def test_checkpoints_without_the_record_of_their_run_are_refused(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    (out / "run.json").unlink()
    assert train(toy, out, SETTINGS, "--resume --seed 7") == 2
    assert f"{out}: holds metrics.jsonl, but no run.json" in capsys.readouterr().err


def test_validation_row_that_fits_no_micro_batch_is_found_before_training(toy, tmp_path, capsys):
    """Found at the last step, it would cost the whole run."""
    rows = sorted(read_jsonl(toy.sft), key=lambda row: len(str(row["messages"])))
    write_jsonl(tmp_path / "short.jsonl", rows[:6])
    write_jsonl(tmp_path / "long.jsonl", rows[-1:])
    longest, shortest = (max(len(example.ids) for example in load_sft(tmp_path / name, toy.tokenizer, 1024))
                         for name in ("long.jsonl", "short.jsonl"))
    assert shortest < longest
    assert train(toy, tmp_path / "run", f"--val {tmp_path / 'long.jsonl'} --micro-tokens {longest - 1}",
                 data=tmp_path / "short.jsonl") == 2
    assert f"micro_tokens: a row of {longest} tokens" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_folder_of_another_command_is_not_taken(toy, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    record = '{"config": {"model": "x", "data": "y", "seed": 0}, "commit": "z"}'
    (tmp_path / "run" / "run.json").write_text(record)
    for flags in (SETTINGS, f"{SETTINGS} --resume"):
        assert train(toy, tmp_path / "run", flags) == 2
        assert "run.json: not the record of such a run, but of another command" in capsys.readouterr().err
    assert (tmp_path / "run" / "run.json").read_text() == record and not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "gains.csv", "seed_3/x", "rollouts/step_0001.jsonl", "config.json"])
def test_a_folder_with_results_of_unknown_runs_is_not_taken(toy, tmp_path, capsys, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    (tmp_path / "run" / "a.log").write_text("a log")
    assert train(toy, tmp_path / "run", SETTINGS) == 2
    assert f"{tmp_path / 'run'}: holds {name.split('/')[0]}, but no run.json to say of which run" in capsys.readouterr().err
    assert path.read_text() == "mine"


def test_a_run_without_a_checkpoint_is_not_begun_again_unasked(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    shutil.rmtree(out / "model")
    before = metrics(out)
    assert train(toy, out, SETTINGS, "--seed 5") == 2
    assert "holds an earlier run; give --resume or choose another --out" in capsys.readouterr().err
    assert metrics(out) == before


def test_a_folder_with_checkpoints_is_not_begun_again(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    before = metrics(out)
    assert train(toy, out, SETTINGS) == 2
    assert "holds an earlier run" in capsys.readouterr().err
    assert metrics(out) == before


def test_resume_with_other_settings_is_refused_by_name(toy, whole, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(whole, out)
    assert train(toy, out, SETTINGS, "--resume --seed 7 --log-every 3") == 2
    error = capsys.readouterr().err
    assert "seed was 0, is 7" in error and "log_every" not in error


def test_gradient_that_is_not_finite_stops_the_run(toy, whole, tmp_path, monkeypatch, capsys):
    def broken(model, batch):
        loss, count = answer_loss(model, batch)
        return loss * (math.nan if len(metrics(tmp_path)) == 2 else 1), count

    answer_loss = train_sft.answer_loss
    monkeypatch.setattr(train_sft, "answer_loss", broken)
    assert train(toy, tmp_path, SETTINGS) == 2
    assert capsys.readouterr().err.startswith("error: step 3: the loss is nan")
    rows = read_jsonl(tmp_path / "failed_step_0003.jsonl")
    expected = next(itertools.islice(index_stream(12, 6, 0), 2, None))
    assert rows == [read_jsonl(toy.sft)[index] for index in expected]
    assert checkpoint.latest(tmp_path / "checkpoints").name == "step_2"
    assert weights(tmp_path / "checkpoints" / "step_2") == weights(whole / "checkpoints" / "step_2")
    assert not (tmp_path / "model").exists()


def test_what_was_not_finite_is_said_even_if_its_rows_are_gone(toy, tmp_path, monkeypatch, capsys):
    data = Path(shutil.copy(toy.sft, tmp_path / "data.jsonl"))

    def broken(*_):
        data.write_text("")
        raise NonFinite("the loss is nan")

    monkeypatch.setattr(train_sft, "accumulate", broken)
    assert train(toy, tmp_path / "run", SETTINGS, data=data) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: step 1: the loss is nan; its rows are not kept (") and error.count("\n") == 1


@pytest.mark.parametrize("flags, message", [
    ("--model {folder}/no", "{folder}/no: no such folder"),
    ("--data {folder}/no", "{folder}/no: No such file"),
    ("--data {empty}", "{empty}: no lines"),
    ("--data {pipe}", "{pipe}: a pipe"),
    ("--data {rl}", "{rl}:1: field 'messages'"),
    ("--val {rl}", "{rl}:1: field 'messages'"),
    ("--max-length 100", "{sft}:1: "),
    ("--max-length 60 --truncate", "{sft}:1: nothing is left to learn"),
    ("--epochs 0", "epochs: must be at least 1e-06, not 0"),
    ("--epochs -1", "epochs: must be at least 1e-06, not -1"),
    ("--epochs many", "--epochs"),
    ("--batch-size 13", "batch_size: 13, but {sft} has only 12 rows"),
    ("--batch-size 0", "batch_size: must be at least 1"),
    ("--micro-tokens 100", "tokens does not fit into 100"),
    ("--device nosuch", "device 'nosuch'"),
    ("--schedule linear", "--schedule"),
    ("--lr 1", "--lr"),
    ("--beta2 1", "beta2: must be at most 0.999999"),
    ("--epochs 1e300", "epochs: must be at most"),
    ("--clip 0", "clip: must be at least"),
])
def test_wrong_input_is_one_line(toy, tmp_path, capsys, flags, message):
    names = {"folder": toy.folder, "sft": toy.sft, "rl": toy.rl, "empty": tmp_path / "empty", "pipe": tmp_path / "pipe"}
    names["empty"].write_text("")
    os.mkfifo(names["pipe"])
    assert train(toy, tmp_path / "run", flags.format(**names)) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and message.format(**names) in captured.err
    assert captured.err.count("\n") == 1 and captured.out == ""
    assert not (tmp_path / "run" / "model").exists()


def test_a_long_row_to_validate_on_is_named_before_training(toy, tmp_path, capsys):
    row = read_jsonl(toy.sft)[0]
    row["messages"][1]["content"] *= 20
    write_jsonl(tmp_path / "val.jsonl", [row])
    assert train(toy, tmp_path / "run", "--max-length 9000 --val", tmp_path / "val.jsonl") == 2
    assert "exceeds the model's max_position_embeddings 1024" in capsys.readouterr().err


def test_checkpointing_and_dtype_reach_the_model(toy, tmp_path, monkeypatch):
    seen, accumulate = [], train_sft.accumulate

    def look(model, *rest):
        seen.append((model.checkpointing, model.activation_dtype))
        return accumulate(model, *rest)

    monkeypatch.setattr(train_sft, "accumulate", look)
    assert train(toy, tmp_path, "--epochs 0.5 --checkpointing --dtype bf16") == 0
    assert seen == [(True, torch.bfloat16)]
