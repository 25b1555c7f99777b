"""The command: what it prints and writes for a model of known distribution, and what it says to wrong input."""

import json
import math
import shutil
import sys

import pytest
import torch

from minibridge import checkpoint, influence, tables
from minibridge.coinfluence import per_step
from minibridge.config import read_jsonl, run_main, write_jsonl
from minibridge.data import load_prompts, load_sft
from minibridge.jvp import gradient
from minibridge.optim import adamw
from minibridge.policy import pack
from minibridge.rollout import rollout
from minibridge.tokenizer import Tokenizer

F64 = torch.float64


def run(*argv) -> int:
    return run_main(influence.main, influence.Config, [str(word) for word in argv])


@pytest.fixture(scope="module")
def tuned(toy, guesser, tmp_path_factory) -> str:
    """The guesser with layers that add something, so that answers differ in more than a digit; and a training state."""
    model = checkpoint.load(guesser)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers" in name and parameter.ndim == 2:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    optimizer = adamw(model, (0.9, 0.999), 0.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    folder = tmp_path_factory.mktemp("tuned") / "sft" / "model"
    checkpoint.save_training(folder, model, optimizer, {"step": 1, "drawn": 6}, toy.tokenizer)
    return str(folder)


@pytest.fixture(scope="module")
def arguments(toy, tuned, tmp_path_factory):
    """Digits from 0 to 9 are guessed with about equal chance, and six prompts of one digit make 24 answers each."""
    folder = tmp_path_factory.mktemp("data")
    lines = [line | {"answer": "7", "problem": None} for line in read_jsonl(toy.rl)]
    write_jsonl(folder / "rl.jsonl", lines)
    return ["--model", tuned, "--data", folder / "rl.jsonl", "--prompts", 5, "--samples", 24, "--max-new-tokens", 8,
            "--device", "cpu"]


@pytest.fixture(scope="module")
def finished(toy, arguments, tmp_path_factory):
    out, reference = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("reference") / "sft.jsonl"
    write_jsonl(reference, [*read_jsonl(toy.sft), {"messages": []}])  # past the first --prompts lines, which are read
    assert run(*arguments, "--out", out, "--contrast", "--check", 1, "--reference", reference) == 0
    return out


@pytest.fixture
def no_figures(monkeypatch):
    """As without matplotlib: drawing takes longer than all else here."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def numbers(table, column) -> list[float]:
    return [float(row[column] or "nan") for row in table]


def test_prompts_csv_follows_from_the_saved_answers(finished, arguments):
    """The proposition, by hand, from kappa of each saved answer."""
    table, saved = tables.read(finished / "prompts.csv"), read_jsonl(finished / "rollouts.jsonl")
    assert len(table) == 5 and len(saved) == 5 * 24
    correct = torch.tensor([line["correct"] for line in saved], dtype=F64).view(5, 24)
    kappa = torch.tensor([line["kappa"] for line in saved], dtype=F64).view(5, 24)
    found = per_step(kappa, correct)
    assert numbers(table, "right") == correct.sum(1).tolist() and sum(0 < a < 1 for a in numbers(table, "alpha")) >= 3
    assert numbers(table, "influence") == pytest.approx(found.value.tolist(), rel=1e-4, abs=1e-9)
    assert numbers(table, "K+") == pytest.approx(found.right.tolist(), rel=1e-4, nan_ok=True)
    for line in saved[:5]:
        assert len(line["token_kappa"]) == len(line["ids"])
        assert line["kappa"] == pytest.approx(sum(line["token_kappa"]) / len(line["ids"]), rel=1e-2, abs=1e-6)
    halves = [sum(pair) for pair in zip(numbers(table, "influence, half 1"), numbers(table, "influence, half 2"))]
    assert halves == pytest.approx(numbers(table, "influence"), rel=1e-6, abs=1e-9)
    terms = {name: torch.tensor(numbers(table, name)) for name in ("K++", "K+-", "K-+", "K--", "K+ - K-")}
    contrast = (terms["K++"] - terms["K+-"]) - (terms["K-+"] - terms["K--"])
    torch.testing.assert_close(contrast, terms["K+ - K-"], equal_nan=True)


def test_the_ranked_file_is_the_data_in_another_order_and_trains(toy, finished, arguments):
    ranked, given = read_jsonl(finished / "ranked.jsonl"), read_jsonl(arguments[3])[:5]
    values = [line.pop("influence") for line in ranked]
    assert values == sorted(values, reverse=True) and values[0] > 0
    assert sorted(map(json.dumps, ranked)) == sorted(map(json.dumps, given))
    by_id = {row["id"]: float(row["influence"]) for row in tables.read(finished / "prompts.csv")}
    assert [by_id[line["id"]] for line in ranked] == values
    assert len(load_prompts(finished / "ranked.jsonl", toy.tokenizer, 1000)) == 5


@pytest.mark.plot
def test_figures_of_the_run(finished):
    pytest.importorskip("matplotlib")
    names = {f"{name}.{kind}" for name in ("rollout_accuracy", "influence", "fluency") for kind in ("png", "csv")}
    assert {path.name for path in (finished / "figures").iterdir()} == names


def test_the_step_that_is_taken_brings_what_is_predicted(finished):
    rows = tables.read(finished / "steps.csv")
    assert {row["step on"] for row in rows} == {"all", max(tables.read(finished / "prompts.csv"), key=lambda row: abs(
        float(row["influence"])))["line"].join(("line ", ""))}
    errors = {row["length"]: float(row["relative error"]) for row in rows if row["step on"] == "all"}
    assert errors["0.001"] < 0.02 and errors["0.001"] < errors["0.1"]


def test_the_other_tables(toy, finished):
    histogram, bins = tables.read(finished / "rollout_accuracy.csv"), tables.read(finished / "influence.csv")
    assert sum(int(row["prompts"]) for row in histogram) == 5 and len(histogram) == 25
    influences = numbers(tables.read(finished / "prompts.csv"), "influence")
    assert float(bins[-1]["influence"]) == pytest.approx(sum(influences) / 5)
    fluency = {row["text"]: row for row in tables.read(finished / "fluency.csv")}
    assert int(fluency["own answers"]["answers"]) == 120 and int(fluency["reference answers"]["answers"]) == 5
    sampled = [logprob for line in read_jsonl(finished / "rollouts.jsonl") for logprob in line["logprobs"]]
    assert float(fluency["own answers"]["perplexity"]) == pytest.approx(math.exp(-sum(sampled) / len(sampled)), rel=1e-4)
    assert float(fluency["reference answers"]["perplexity"]) > 100 > float(fluency["own answers"]["perplexity"])
    assert int(fluency["reference answers"]["tokens"]) == sum(
        sum(example.mask) for example in load_sft(toy.sft, toy.tokenizer, 1024)[:5])
    assert not (finished / "behaviors.csv").exists()  # the problems are not known here
    results = json.loads((finished / "run.json").read_text())
    assert results["gradient_norm"] > 0 and -1 <= results["halves_cosine"] <= 1
    assert results["influence_over_norm"] == pytest.approx(sum(influences) / 5 / results["gradient_norm"])
    assert results["halves_rank_correlation"] is not None


def test_reference_perplexity_by_hand(toy):
    model, examples = toy.load(), load_sft(toy.sft, toy.tokenizer, 1024)[:3]
    surprise, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([example.ids])
        with torch.no_grad():
            logps = model.logits(model(ids))[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        learned = torch.tensor(example.mask[1:]) > 0
        surprise, count = surprise - logps[learned].sum().item(), count + int(learned.sum())
    row = influence.reference_row(model, examples, 1.0, 800)
    assert row["tokens"] == count and row["perplexity"] == pytest.approx(math.exp(surprise / count), rel=1e-4)


def test_same_seed_same_bytes_and_nothing_depends_on_the_micro_batch(arguments, tmp_path, no_figures):
    outs = [tmp_path / name for name in ("a", "b", "c")]
    for out, more in zip(outs, ((), (), ("--micro-tokens", 400, "--checkpointing", "--no-halves"))):
        assert run(*arguments, "--out", out, *more) == 0
    for name in ("prompts.csv", "influence.csv", "rollouts.jsonl", "ranked.jsonl"):
        assert (outs[0] / name).read_bytes() == (outs[1] / name).read_bytes()
    for column in ("alpha", "influence", "K+"):
        found = [numbers(tables.read(out / "prompts.csv"), column) for out in (outs[0], outs[2])]
        assert found[1] == pytest.approx(found[0], rel=1e-3, abs=1e-6, nan_ok=True)
    assert "influence, half 1" not in tables.read(outs[2] / "prompts.csv")[0]


def test_sampling_in_bf16_and_derivatives_in_fp32_at_the_temperature(arguments, tmp_path, monkeypatch, no_figures):
    seen = []
    for name in ("measure", "taken"):
        function = getattr(influence, name)
        monkeypatch.setattr(influence, name, lambda model, *args, name=name, function=function: seen.append(
            (name, model.compute_dtype, 0.7 in args)) or function(model, *args))
    assert run(*arguments, "--out", tmp_path, "--temperature", 0.7, "--dtype", "bf16", "--check", 1) == 0
    assert set(seen) == {("measure", None, True), ("taken", None, True)}


def test_fluency_of_right_and_wrong_answers(finished):
    rows, saved = tables.read(finished / "fluency.csv"), read_jsonl(finished / "rollouts.jsonl")
    for row, right in zip(rows[1:3], (True, False)):
        logprobs = [logprob for line in saved if line["correct"] == right for logprob in line["logprobs"]]
        assert row["text"] == f"own {'right' if right else 'wrong'} answers" and int(row["tokens"]) == len(logprobs)
        assert float(row["perplexity"]) == pytest.approx(math.exp(-sum(logprobs) / len(logprobs)), rel=1e-4)
        assert 0 < float(row["entropy"]) < math.log(300)


def test_adam_changes_the_direction(arguments, tuned, finished, tmp_path, no_figures):
    assert run(*arguments, "--out", tmp_path, "--adam", tuned, "--check", 1) == 0
    plain, scaled = (numbers(tables.read(out / "prompts.csv"), "influence") for out in (finished, tmp_path))
    assert max(abs(a / b - 1) for a, b in zip(plain, scaled) if a) > 0.01  # fp32 gives 1e-5
    rows = tables.read(tmp_path / "steps.csv")
    assert all(float(row["relative error"]) < 0.1 for row in rows if row["length"] == "0.001")


def test_where_problems_are_known_kinds_of_text_add_up(toy, tuned, tmp_path, no_figures):
    lines = [line for line in read_jsonl(toy.rl) if len(line["answer"]) == 1]
    write_jsonl(tmp_path / "rl.jsonl", lines)
    assert len(lines) >= 6
    assert run("--model", tuned, "--data", tmp_path / "rl.jsonl", "--prompts", 3, "--samples", 30, "--max-new-tokens", 8,
               "--device", "cpu", "--out", tmp_path / "out") == 0
    kinds = tables.read(tmp_path / "out" / "behaviors.csv")
    mean = float(tables.read(tmp_path / "out" / "influence.csv")[-1]["influence"])
    assert sum(numbers(kinds, "influence")) == pytest.approx(mean) and mean
    assert int(kinds[-1]["tokens"]) == sum(len(line["ids"]) for line in read_jsonl(tmp_path / "out" / "rollouts.jsonl"))


def test_the_direction_is_that_of_the_sampled_answers(toy, tuned, arguments, finished):
    """|g_Q| again, from the same random stream, of which Q is the first to draw."""
    model = checkpoint.load(tuned)
    prompts = load_prompts(arguments[3], toy.tokenizer, 1000)
    generator = torch.Generator().manual_seed(0)
    settings = dict(max_new_tokens=8, rows=256, temperature=1.0, generator=generator)
    val = rollout(model, toy.tokenizer, prompts[5:], 24, **settings)
    correct = torch.tensor([[episode.correct for episode in group] for group in val], dtype=F64)
    advantages = (correct - correct.mean(1, keepdim=True)) / (correct.std(1, keepdim=True) + 1e-6) / correct.numel()
    found = gradient(model, pack(val, advantages, 10**6, torch.device("cpu")), 1.0)
    norm = sum(float(tensor.double().square().sum()) for tensor in found.values()) ** 0.5
    assert json.loads((finished / "run.json").read_text())["gradient_norm"] == pytest.approx(norm, rel=1e-4)


def test_without_matplotlib_only_the_figures_are_missing(arguments, tmp_path, capsys, no_figures):
    assert run(*arguments, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.endswith('no figures without matplotlib: pip install -e ".[plot]"\n') and "| gradient_norm |" in printed
    assert (tmp_path / "prompts.csv").exists() and not (tmp_path / "figures").exists()


def test_another_run_into_the_same_folder_is_refused(finished, arguments, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*.*")}
    assert run(*arguments, "--out", finished, "--samples", 7) == 2
    assert "samples was 24, is 7" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*.*")} == before


def test_answers_of_q_are_kept_though_they_teach_nothing(toy, tmp_path):
    assert run("--model", toy.model, "--data", toy.rl, "--prompts", 4, "--max-new-tokens", 8, "--out", tmp_path / "out") == 2
    assert len(read_jsonl(tmp_path / "out" / "validation.jsonl")) == 4 * 16


def test_an_unreliable_ranking_is_called_so(arguments, tmp_path, capsys, monkeypatch, no_figures):
    for limit, said in ((-1.0, False), (1.1, True)):
        monkeypatch.setattr(influence, "UNRELIABLE", limit)
        assert run(*arguments, "--out", tmp_path) == 0
        assert ("not to be trusted" in capsys.readouterr().out) == said


@pytest.mark.parametrize("argv, message", [
    ("--model {model} --data {rl} --prompts 7", "val: Q needs 2 prompts, and there are 1 in {rl} after its first 7"),
    ("--model {model} --data {rl} --val {one}", "val: Q needs 2 prompts, and there are 1 in {one}"),
    ("--model {model} --data {rl} --val {rl}", "val: 8 of its prompts are also measured"),
    ("--model {model} --data {rl} --prompts 4", "needs two; 0% of the answers are right, 95% were cut off at --max-new"),
    ("--model {model} --data {rl} --prompts 4 --adam {model}", "{model}/training.json: No such file"),
    ("--model {model} --data {rl} --prompts 4 --reference {rl}", "{rl}:1: field 'messages'"),
    ("--model {model} --data {rl} --prompts 4 --out {training}", "{training}/run.json: not the record of such a run, but of another"),
    ("--model {model} --data {rl} --samples 1", "samples: must be at least 2"),
    ("--model {model} --data {sft}", "{sft}:1: field 'prompt'"),
])
def test_wrong_input_is_one_line(toy, tmp_path, capsys, argv, message):
    names = {"model": toy.model, "rl": toy.rl, "sft": toy.sft, "one": tmp_path / "one.jsonl"}
    names["training"] = tmp_path / "training"
    write_jsonl(names["one"], read_jsonl(toy.rl)[-1:])
    write_jsonl(names["training"] / "metrics.jsonl", [{"step": 1}])
    (names["training"] / "run.json").write_text('{"config": {"steps": 1}}')
    words = argv.format(**names).split() + ["--max-new-tokens", "8"]
    words += [] if "--out" in words else ["--out", tmp_path / "out"]
    assert run(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message.format(**names) in error and error.count("\n") == 1
    assert read_jsonl(names["training"] / "metrics.jsonl") == [{"step": 1}]


def test_an_analysis_of_other_weights_is_not_replaced(arguments, tmp_path, capsys, no_figures):
    """Under the same name; the same weights may be measured again."""
    model = tmp_path / "model"
    shutil.copytree(arguments[1], model)
    words = ["--model", model, *arguments[2:], "--out", tmp_path / "out", "--no-halves"]
    assert run(*words) == 0 and run(*words, "--micro-tokens", 4000) == 0  # as after running out of memory
    before = (tmp_path / "out" / "rollouts.jsonl").read_bytes()
    other = checkpoint.load(model)
    with torch.no_grad():
        other.lm_head_weight.mul_(1.5)
    checkpoint.save(other, model, Tokenizer.load(model))
    capsys.readouterr()
    assert run(*words) == 2
    assert "has changed since; choose another --out" in capsys.readouterr().err
    assert (tmp_path / "out" / "rollouts.jsonl").read_bytes() == before
