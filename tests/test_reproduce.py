"""The comparison end to end on a tiny random model: every stage really runs, none twice, and the table adds up."""

import dataclasses
import itertools
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minibridge import evaluate, igsm, jobs, reproduce, results, tables, traces
from minibridge.checkpoint import load, save
from minibridge.config import InputError, read_jsonl, run_command, run_main, write_jsonl
from minibridge.dag import Problem
from minibridge.evaluate import Scored
from minibridge.model import Decoder
from minibridge.model_config import ModelConfig


ARMS = ("vanilla", "bridge", "pp-aug", "subgoal+reflection@0.3")


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "run"
    config = reproduce.Experiment(out=str(out), base=toy.model, workers=1, arms=",".join(ARMS),
                           sft_ops=(4, 5), ops=(4, 5), rl_ops=(4, 5), sft_rows=33, sft_batch=32,
                           sft_epochs=1.0, rl_steps=2, rl_prompts=2, rl_samples=2, test_problems=24, test_samples=3,
                           max_new_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        tested, sample = [], reproduce.evaluate.sample
        patch.setattr(reproduce.evaluate, "sample", lambda asked: tested.append(asked) or sample(asked))
        reproduce.main(config)
    (out / "tested.json").write_text(json.dumps([[asked.model, asked.data, asked.temperature] for asked in tested]))
    return config, out


def test_every_stage_starts_from_the_one_before(finished, toy):
    folder = finished[1] / "seed_0"
    for arm in ARMS:
        sft, rl = (json.loads((folder / f"{stage}_{arm}" / "run.json").read_text())["config"] for stage in results.STAGES)
        assert (sft["model"], sft["data"]) == (toy.model, str(folder / f"sft_{arm}.jsonl"))
        assert (rl["model"], rl["data"]) == (str(folder / f"sft_{arm}" / "model"), str(folder / "rl.jsonl"))
    tested = json.loads((finished[1] / "tested.json").read_text())
    assert tested == [[str(folder / f"{stage}_{arm}" / "model"), str(folder / f"test_{test}.jsonl"), temperature]
                      for arm in ARMS for stage in results.STAGES for test in ("id", "ood") for temperature in (0.0, 1.0)]


def test_every_stage_leaves_its_result(finished):
    config, out = finished
    folder = out / "seed_0"
    for arm in ARMS:
        assert load(folder / f"sft_{arm}" / "model").config == load(folder / f"rl_{arm}" / "model").config
        assert len(list((folder / f"rl_{arm}" / "rollouts").iterdir())) == 2
        for stage in results.STAGES:
            for test in config.tests:
                assert len(read_jsonl(folder / f"{stage}_{arm}_{test}_greedy.jsonl")) == 24
                assert len(read_jsonl(folder / f"{stage}_{arm}_{test}_sampled.jsonl")) == 24 * 3
    table = (out / "table.md").read_text()
    assert all(table.count(f"| {arm} |") == 2 * len(config.tests) + 4 for arm in ARMS)
    assert len(tables.read(out / "curves.csv")) == 2 * len(ARMS)
    rows = tables.read(out / "results.csv")
    assert len(rows) == len(ARMS) * len(config.tests) * 2 * 2
    for row in rows:  # intervals count all three answers to a problem
        saved = f"{row['stage']}_{row['arm']}_{row['test'].partition(',')[0]}_{row['decoding']}.jsonl"
        expected = evaluate.estimate(evaluate.rescore(str(folder / saved)))
        assert [float(row[name]) for name in ("accuracy", "low", "high")] == pytest.approx(expected, abs=1e-5)
    assert {row["test"] for row in rows} == {line.split(" | ")[1] for line in table.splitlines()[2:2 + len(ARMS) * 4]}


def test_arms_share_problems_and_rows_and_splits_share_none(finished):
    folder = finished[1] / "seed_0"
    rows = {arm: read_jsonl(folder / f"sft_{arm}.jsonl") for arm in ARMS}
    ids = {arm: [row["id"] for row in lines] for arm, lines in rows.items()}
    assert ids["vanilla"] == ids["bridge"] == ids[ARMS[3]] and len(set(ids["vanilla"])) == 33
    assert ids["pp-aug"] == [id for id in ids["vanilla"][:9] for _ in range(4)][:33]
    assert {row["behaviors"] for row in rows[ARMS[3]]} == {"subgoal=1 analysis=0 reflection=0.3 strict=1"}
    splits = [{Problem.from_dict(row["problem"]).structure for name in names for row in read_jsonl(folder / f"{name}.jsonl")}
              for names in (["sft_bridge"], ["rl"], ["test_id", "test_ood"])]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_several_seeds_side_by_side(finished, tmp_path, capsys):
    """Another seed has other problems; processes of their own change nothing."""
    config = dataclasses.replace(finished[0], out=str(tmp_path / "run"), arms="bridge", seeds=2, workers=2,
                                 rl_steps=1, test_problems=2, test_samples=1)
    reproduce.main(config)
    a, b = (tmp_path / "run" / f"seed_{seed}" for seed in (0, 1))
    assert not {row["id"] for row in read_jsonl(a / "rl.jsonl")} & {row["id"] for row in read_jsonl(b / "rl.jsonl")}
    assert (a / "sft_bridge.jsonl").read_bytes() == (finished[1] / "seed_0" / "sft_bridge.jsonl").read_bytes()
    assert {row["seed"] for row in tables.read(tmp_path / "run" / "results.csv")} == {"0", "1"}
    printed = capsys.readouterr().out
    assert "=== GRPO, bridge" in (b / "bridge.log").read_text() and "===" not in printed
    assert read_jsonl(next(line for line in printed.splitlines() if "minibridge.show" in line).split()[-1])
    for folder, seed in ((a, 0), (b, 1)):
        for stage in results.STAGES:
            assert json.loads((folder / f"{stage}_bridge" / "run.json").read_text())["config"]["seed"] == seed


def test_jobs_side_by_side_say_how_far_they_are(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(jobs, "REPORTS", 0.05)
    job = dataclasses.replace(finished[0], out=str(tmp_path))
    log = jobs.log_of(job, "bridge")
    jobs.report([(job, "bridge")])  # no log yet
    assert not capsys.readouterr().out
    log.write_text("=== GRPO, bridge\nstep 1/2 | accuracy 0\n--- reward 0\nstep by step\n<think>\n")
    jobs.report([(job, "bridge"), (job, "vanilla")])
    assert capsys.readouterr().out[5:] == "  seed 0, bridge: step 1/2 | accuracy 0\n"
    config = dataclasses.replace(finished[0], out=str(tmp_path / "run"), arms="bridge", workers=2, rl_steps=1, test_problems=2)
    reproduce.main(config)
    assert "  seed 0, bridge: " in capsys.readouterr().out


def test_a_process_that_fails_ends_the_whole_in_a_line(finished, tmp_path):
    config = dataclasses.replace(finished[0], out=str(tmp_path / "run"), arms="bridge", workers=2)
    broken = tmp_path / "run" / "seed_0" / "sft_bridge" / "run.json"
    broken.parent.mkdir(parents=True)
    shutil.copy(finished[1] / "run.json", tmp_path / "run")
    broken.write_text("{")
    with pytest.raises(InputError, match=f"^seed 0, bridge: {broken}"):
        reproduce.main(config)


def fails(config, arm):
    print("step 1/2 | accuracy 0")
    raise RuntimeError("can't allocate memory")


def test_a_process_that_fails_by_an_error_of_ours_says_which(finished, tmp_path):
    job = dataclasses.replace(finished[0], out=str(tmp_path))
    with pytest.raises(InputError, match="^seed 0, bridge: RuntimeError: can't allocate memory$"):
        jobs.side_by_side(fails, [(job, "bridge")], 1)
    assert "Traceback" in jobs.log_of(job, "bridge").read_text()


def test_a_log_that_cannot_be_written_is_named(finished, tmp_path, capfd):
    job = dataclasses.replace(finished[0], out=str(tmp_path))
    jobs.log_of(job, "bridge").mkdir()
    with pytest.raises(InputError, match="^seed 0, bridge: failed$"):
        jobs.side_by_side(fails, [(job, "bridge")], 1)
    error = capfd.readouterr().err
    assert "Traceback" not in error and f"Is a directory: '{jobs.log_of(job, 'bridge')}'" in error


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="asks Linux which processes there are")
def test_a_run_that_is_terminated_takes_its_processes_along(toy, tmp_path):
    words = (f"toy --base {toy.model} --out {tmp_path} --sft-ops 4-5 --rl-ops 4-5 --ops 4-5 --ood-ops 6 --sft-rows 32"
             " --rl-steps 50 --rl-prompts 4 --test-problems 2")
    parent = subprocess.Popen([sys.executable, "-m", "minibridge.reproduce", *words.split()],
                              stdout=subprocess.PIPE, text=True, cwd=Path(reproduce.__file__).parents[1])
    assert all(parent.stdout.readline().startswith("started: ") for _ in range(2))
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    assert len(children) >= 2
    parent.terminate()
    assert parent.wait(60) == 143
    alive = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < alive
        time.sleep(0.1)


def test_help_alone_shows_what_there_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce", "--help"])
    assert run_command(reproduce.COMMANDS) == 0 and "first argument must be one of toy," in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["reproduce", "tiny"])
    assert run_command(reproduce.COMMANDS) == 2 and capsys.readouterr().err.startswith("error: the first argument must be")


def test_other_weights_under_the_same_run_are_refused(finished, guesser):
    with pytest.raises(InputError, match="began with another base"):
        reproduce.main(dataclasses.replace(finished[0], base=guesser))


def test_another_tokenizer_under_the_same_run_is_refused(finished, toy, tmp_path):
    base = Path(shutil.copytree(toy.model, tmp_path / "base"))
    reproduce.base_mark(dataclasses.replace(finished[0], base=str(base)), finished[1])
    (base / "tokenizer.json").write_text((base / "tokenizer.json").read_text() + " ")
    with pytest.raises(InputError, match="began with another base"):
        reproduce.base_mark(dataclasses.replace(finished[0], base=str(base)), finished[1])


@pytest.mark.parametrize("arm", ["vanilla", "pp-aug"])
def test_an_arm_added_to_other_problems_is_refused(finished, arm):
    """As when another version, which draws others, began the folder."""
    path = finished[1] / "seed_0" / f"sft_{arm}.jsonl"
    before, added = path.read_bytes(), dataclasses.replace(finished[0], arms=f"{arm},analysis")
    path.write_bytes(b"".join(before.splitlines(keepends=True)[::-1]))
    try:
        with pytest.raises(InputError, match=f"sft_{arm}.jsonl: other problems than are drawn now"):
            reproduce.make_data(added.one_seed_each[0])
    finally:
        path.write_bytes(before)
    assert not path.with_name("sft_analysis.jsonl").exists()
    reproduce.make_data(added.one_seed_each[0])
    path.with_name("sft_analysis.jsonl").unlink()


def test_a_second_run_repeats_no_stage(finished, monkeypatch):
    config, out = finished

    def repeated(config):
        raise AssertionError("a finished stage ran again")

    for script in (reproduce.train_sft, reproduce.train_rl):
        monkeypatch.setattr(script, "main", repeated)
    monkeypatch.setattr(reproduce.evaluate, "sample", repeated)
    before = (out / "table.md").read_text()
    reproduce.main(config)
    assert (out / "table.md").read_text() == before


@pytest.mark.parametrize("damage, message", [
    (lambda lines: lines[:-1], "not answers to the problems of .*test_id.jsonl"), (lambda lines: [], "no lines in it"),
    (lambda lines: [lines[0] | {"ids": None}, *lines[1:]], "jsonl:1: field 'ids' must be a list"),
    (lambda lines: [lines[0] | {"problem": None}, *lines[1:]], "jsonl:1: field 'problem' must be an object")])
@pytest.mark.parametrize("files", ["rl_bridge_id_greedy", "*_id_greedy"])
def test_damaged_answers_are_named(finished, files, damage, message):
    """Of all arms alike, too."""
    before = {path: path.read_bytes() for path in (finished[1] / "seed_0").glob(f"{files}.jsonl")}
    for path in before:
        write_jsonl(path, damage(read_jsonl(path)))
    try:
        with pytest.raises(InputError, match=message) as raised:
            reproduce.write_results(finished[0])
        assert str(raised.value).startswith(tuple(map(str, before)))
    finally:
        for path, content in before.items():
            path.write_bytes(content)


def test_a_log_of_anything_is_reported(finished, tmp_path, capsys):
    job = dataclasses.replace(finished[0], out=str(tmp_path))
    jobs.log_of(job, "bridge").write_bytes(b"step 3/4 | \xff\n\xe2\x82")
    jobs.log_of(job, "vanilla").mkdir()
    jobs.report([(job, "bridge"), (job, "vanilla")])
    assert capsys.readouterr().out.endswith("seed 0, bridge: step 3/4 | \ufffd\n")


def test_other_settings_are_refused_by_name(finished):
    config, out = finished
    with pytest.raises(InputError, match="seed"):
        reproduce.main(dataclasses.replace(config, seed=1))
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 0


@pytest.mark.parametrize("change, message", [
    ({"arms": "vanilla,bird"}, "arm: 'bird' is none of"), ({"arms": "bridge@x"}, "'x' is not a probability"),
    ({"arms": "bridge@2"}, "'bridge@2': '2' is not a probability"), ({"arms": "bridge@.3,bridge@0.3"}, "names one twice"),
    ({"arms": "vanilla,prompts"}, "'prompts' has no answers"), ({"arms": "bridge,bridge"}, "names one twice"),
    ({"arms": "subgoal+analysis,analysis+subgoal"}, "names one twice"), ({"kl_threshold": 0.0}, "kl_threshold: 0 would drop"),
    ({"arms": "bridge,reflection+subgoal+analysis"}, "names one twice"),
    ({"sft_batch": 34}, "sft_batch: 34 examples"), ({"device": "cuda:99"}, "device"),
    ({"max_length": 2000}, "max_length: 2000 tokens"),
    ({"max_new_tokens": 1024}, "max_prompt: 1424 tokens in all"), ({"base": "no/such"}, "no/such: no such folder"),
    ({"ood_ops": (0, 3)}, "ood problems: ops: 0-3 is not a range"), ({"sft_ops": (90, 90)}, "sft problems: ops: no problem of"),
    ({"task": "arithmetic-int"}, "sft_ops: does not apply to task arithmetic-int"),
    ({"redundant": (1, 2)}, "redundant: does not apply to task igsm")])
def test_what_cannot_work_is_refused_before_any_file(finished, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        reproduce.main(dataclasses.replace(finished[0], out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


PAPER = {"qwen2.5-1.5b": dict(kl_coef=0.001, kl_threshold=None, entropy_coef=0.001, clip=1.0, format_scale=0.0),
         "qwen2.5-3b": dict(kl_coef=0.001, kl_threshold=None, entropy_coef=0.001, clip=1.0, format_scale=0.0),
         "llama-3.2-1b": dict(kl_coef=0.01, kl_threshold=0.15, entropy_coef=0.0, clip=0.2, format_scale=0.05),
         "small": dict(kl_coef=0.0, kl_threshold=None, entropy_coef=0.0, clip=1.0, format_scale=0.0)}


@pytest.fixture(scope="module")
def random_bases(toy, tmp_path_factory) -> dict[str, str]:
    """Untrained models that can read the paper's problems, in the letters of the toy tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    for kind in ("qwen2", "llama"):
        model = Decoder(ModelConfig(kind, toy.tokenizer.vocab_size, hidden_size=32, intermediate_size=48,
                                    num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
                                    max_position_embeddings=2**14))
        model.init_weights(torch.Generator().manual_seed(0))
        save(model, folder / kind, toy.tokenizer)
    return {name: str(folder / ("llama" if "llama" in name else "qwen2")) for name in PAPER}


@pytest.mark.parametrize("name", PAPER)
def test_each_setting_of_the_paper_runs_on_random_weights(name, random_bases, tmp_path, capsys):
    """Every stage with the setting's own loss and problems; fewer of everything."""
    few = dict(sft_rows=4, sft_batch=4, sft_epochs=1.0, rl_steps=1, rl_prompts=2, rl_samples=2, val_problems=2,
               test_problems=2, max_prompt=8192, max_length=16384, max_new_tokens=6, micro_tokens=20_000, rows=8)
    setting = reproduce.SETTINGS[name]
    defaults = setting()
    assert run_main(*reproduce.COMMANDS[name], []) == 2
    assert capsys.readouterr().err == "error: base: give the folder of a base model\n"
    reproduce.main(dataclasses.replace(defaults, base=random_bases[name], out=str(tmp_path / "run"), arms="bridge", **few))
    folder = tmp_path / "run" / "seed_0"
    config = json.loads((folder / "rl_bridge" / "run.json").read_text())["config"]
    assert {key: config[key] for key in PAPER[name]} == PAPER[name]
    assert {row["num_ops"] for row in read_jsonl(folder / "test_id.jsonl")} == {20}
    assert {row["num_ops"] for row in read_jsonl(folder / "test_ood.jsonl")} == {25}
    assert all(15 <= row["num_ops"] <= 20 for name in ("rl", "sft_bridge") for row in read_jsonl(folder / f"{name}.jsonl"))
    assert (tmp_path / "run" / "table.md").exists()
    assert (defaults.sft_rows, defaults.rl_prompts * defaults.rl_samples) == (2000, 1024)


def test_the_other_task(random_bases, tmp_path):
    """The paper's depths and premises by default; the tests differ in premises, and what is drawn is of that task."""
    assert [getattr(reproduce.Experiment(), name) for name in ("sft_depth", "depth", "redundant", "ood_redundant")] == [
        4, 5, (0, 8), (20, 22)]
    config = reproduce.Experiment(
        task="arithmetic-int", base=random_bases["qwen2.5-1.5b"], out=str(tmp_path / "run"), arms="vanilla,bridge", workers=1,
        sft_depth=2, depth=3, redundant=(0, 1), ood_redundant=(2, 3), sft_rows=40, sft_batch=4, rl_steps=1, rl_prompts=20,
        rl_samples=2, val_problems=20, test_problems=20, max_prompt=1500, max_length=4096, max_new_tokens=6)
    reproduce.main(config)
    found = {path.stem: [Problem.from_dict(row["problem"]) for row in read_jsonl(path)]
             for path in (tmp_path / "run" / "seed_0").glob("*.jsonl")}
    assert {problem.task for problems in found.values() for problem in problems} == {"arithmetic-int"}
    assert all(len(problem.order) == 3 for arm in ("vanilla", "bridge") for problem in found[f"sft_{arm}"])
    for name, premises in {"rl": {0, 1}, "val": {0, 1}, "test_id": {0, 1}, "test_ood": {2, 3}}.items():
        assert {-(-len(problem.redundant) // 3) for problem in found[name]} == premises  # two or three sentences each
        assert all(len(problem.order) == 7 for problem in found[name])
    table = (tmp_path / "run" / "table.md").read_text()
    assert "| id, 0-1 unneeded |" in table and "| ood, 2-3 unneeded |" in table


def test_what_is_the_authors_own_stays_behind_a_flag():
    plain = reproduce.SETTINGS["llama-3.2-1b"](base="x")
    authors, out = dataclasses.replace(plain, as_authors=True), Path("x")
    (a, b), (c, d) = ((reproduce.sft_config(one, out, "bridge"), reproduce.rl_config(one, out, "bridge"))
                      for one in (plain, authors))
    assert dataclasses.replace(a, whole_chat=True, truncate=True) == c != a
    assert dataclasses.replace(b, clip=1.6) == d != b
    assert (a.learning_rate, a.batch_size, a.epochs, a.schedule, a.warmup) == (5e-6, 128, 5.0, "constant", 0)
    assert (b.learning_rate, b.schedule, b.warmup, b.steps) == (1e-6, "constant", 0, 200)
    assert (b.prompts, b.samples, b.updates, b.clip_low, b.clip_high, b.temperature) == (32, 32, 1, 0.2, 0.2, 1.0)
    assert (b.weight_decay, b.max_new_tokens, b.eval_every, b.val, a.max_length) == (0.01, 2560, 5, "x/val.jsonl", 2048)
    assert (plain.val_problems, plain.test_problems, plain.ops, plain.ood_ops) == (500, 500, (20, 20), (25, 25))
    assert {name: reproduce.SETTINGS[name]().rl_steps for name in PAPER} == {
        "qwen2.5-1.5b": 200, "qwen2.5-3b": 100, "llama-3.2-1b": 200, "small": 100}


def test_the_plan_of_a_setting(random_bases, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(reproduce.plan, "resident", lambda: 2**30)
    config = reproduce.SETTINGS["qwen2.5-1.5b"](base=random_bases["qwen2.5-1.5b"], out=str(tmp_path / "run"), plan=True)
    reproduce.main(config)
    printed = capsys.readouterr().out
    assert printed.startswith("=== SFT\n") and "\n=== RL\n" in printed and printed.count("\ntotal ") == 2
    held = [line.split()[2:] for line in printed.splitlines() if line.startswith("this process")]
    assert [len(columns) for columns in held] == [1, 3] and len({number for columns in held for number in columns}) == 1
    assert "75 steps" in printed and "200 steps" in printed and "2 arms and 1 seeds" in printed
    assert not (tmp_path / "run").exists()


def outcome(arm: str, seed: int, before, after) -> results.Outcome:
    scored = [[Scored("1", 8, [bool(right) for right in problem]) for problem in stage] for stage in (before, after)]
    return results.Outcome(seed, arm, "id", "greedy", *scored, (3.0, 4.0))


def test_the_gain_of_one_seed_by_hand():
    """Changes +1, 0, 0, -1, +1: mean 1/5, variance (0.64 + 0.04 + 0.04 + 1.44 + 0.64) / 4 = 0.7."""
    changes = outcome("a", 0, [[0], [1], [0], [1], [0]], [[1], [1], [0], [0], [1]]).changes
    assert changes == [1, 0, 0, -1, 1]
    assert results.mean_and_reach([changes]) == pytest.approx((0.2, 2.7764 * (0.7 / 5) ** 0.5))
    assert outcome("a", 0, [[1, 0], [0, 1]], [[0, 1], [1, 0]]).changes == [0, 0]


def test_the_gain_of_several_seeds_by_hand():
    """Means .5, 0, .25 of the seeds: mean .25, deviation .25, and 4.303 deviations of the mean of three."""
    seeds = [[1, 0], [0, 0], [0, 0.5]]
    assert results.mean_and_reach(seeds) == pytest.approx((0.25, 4.3027 * 0.25 / 3**0.5))
    mine = [outcome("b", seed, [[0], [0]], [[gain > 0], [gain > 1]]) for seed, gain in enumerate((1, 2))]
    firsts = [outcome("a", seed, [[0], [0]], [[1], [0]]) for seed in range(2)]
    cells = results.row(mine, firsts)
    assert (cells["after SFT"], cells["after RL"], cells["RL gain"]) == ("0.0%", "75.0%", "+75.0%")
    reach = 12.7062 * 0.5 / 2**0.5 / 2**0.5  # of 0 and 1/2
    assert cells["more than a"] == "+25.0%" and cells["interval"] == f"{0.25 - reach:+.1%} to {0.25 + reach:+.1%}"
    assert results.row(firsts, firsts)["more than a"] == ""
    assert results.gains([*firsts, *mine]) == [
        {"arm": "a", "test": "id", "decoding": "greedy", "gain": 0.5, "gain +-": 0, "more": None, "more +-": None},
        {"arm": "b", "test": "id", "decoding": "greedy", "gain": 0.75, "gain +-": pytest.approx(reach), "more": 0.25,
         "more +-": pytest.approx(reach)}]
    still = [outcome("a", seed, [[1], [0]], [[1], [0]]) for seed in range(2)]
    assert (results.row(still, firsts)["RL gain"], results.row(still, firsts)["95% interval"]) == ("+0.0%", "")


def test_the_effect_of_a_behavior_by_hand(monkeypatch):
    """Two problems. Arms with reflection: both right after RL; analysis adds the first, and takes it away beside reflection."""
    arms = ["vanilla", "subgoal", "analysis", "reflection", "subgoal+analysis", "subgoal+reflection", "reflection+analysis",
            "bridge", "bridge@0.2", "pp-aug"]

    def after(arm):
        reflected, analysed = "reflection" in arm or arm == "bridge", "analysis" in arm or arm == "bridge"
        return [[reflected != analysed], [reflected]]

    found = [outcome(arm, seed, [[0], [seed]], after(arm)) for arm in arms for seed in (0, 1)]
    rows = {row["behavior"]: row for row in results.effects(found)}
    assert [*rows] == ["subgoal", "analysis", "reflection"]
    # Seed 0: first problem 1/2 on either side, second 1 - 0. Seed 1: the same, but all gains of the second one less.
    assert (rows["reflection"]["gain with"], rows["reflection"]["without"]) == ("+50.0%", "+0.0%")
    assert (rows["reflection"]["more"], rows["reflection"]["95% interval"]) == ("+50.0%", "")  # both seeds alike
    assert rows["analysis"]["more"] == rows["subgoal"]["more"] == "+0.0%"
    one = {row["behavior"]: row for row in results.effects([o for o in found if o.seed == 0])}
    reach = 12.7062 * 0.5**0.5 / 2**0.5  # of 0 and 1
    assert one["reflection"]["95% interval"] == f"{0.5 - reach:+.1%} to {0.5 + reach:+.1%}"
    assert not results.effects([o for o in found if o.arm != "subgoal+analysis"])
    monkeypatch.setattr(results, "shown", lambda scored: {"failed attempts": 0.0})
    both = found + [dataclasses.replace(o, decoding="sampled") for o in found]
    assert results.table(both).count("| reflection | id |") == 4  # in the table of arms and in that of effects


def test_the_shipped_base_is_small_and_opens():
    files = [path for path in reproduce.TOY_BASE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    model = load(reproduce.TOY_BASE)
    assert model.config.max_position_embeddings >= reproduce.Experiment().max_prompt + reproduce.Experiment().max_new_tokens


def test_prompts_that_are_too_long_are_found_before_any_training(finished, toy, tmp_path, monkeypatch):
    for script in (reproduce.train_sft, reproduce.train_rl):
        monkeypatch.setattr(script, "main", lambda config: pytest.fail("trained"))
    for settings, message in (({"max_prompt": 30}, "a prompt of"), ({"max_length": 90}, "90"),
                              ({"micro_tokens": 100}, "row of .* does not fit"),
                              ({"micro_tokens": 700, "max_new_tokens": 600}, "cannot hold a prompt of .* of 600 tokens")):
        with pytest.raises(InputError, match=message):
            reproduce.main(dataclasses.replace(finished[0], out=str(tmp_path / message.split()[0]), **settings))


def test_before_rl_is_before_it_in_every_table(tmp_path):
    """Before: right answers with behaviors, of 3 ids. After: "0" and nothing else, of 5. Of `id` one answer is 0, of `ood` both."""
    problems = [igsm.draw(random.Random(seed), (4, 6)) for seed in range(200)]
    zero = next(problem for problem in problems if problem.answer == 0)
    other = next(problem for problem in problems if problem.answer != 0 and len(problem.order) > 3)
    asked = {"id": [zero, other], "ood": [zero, zero]}
    for test, chosen in asked.items():
        write_jsonl(tmp_path / f"test_{test}.jsonl", [{"answer": str(problem.answer)} for problem in chosen])
    for stage, test, decoding in itertools.product(results.STAGES, asked, results.DECODINGS):
        write_jsonl(tmp_path / f"{stage}_bridge_{test}_{decoding}.jsonl", [
            {"group": n, "id": problem.id, "answer": str(problem.answer), "num_ops": problem.num_ops,
             "problem": problem.to_dict(), "ids": [1] * (3 if stage == "sft" else 5),
             "text": traces.answer(problem, random.Random(n), traces.Behaviors(True, 4, 0.9)) if stage == "sft" else r"\boxed{0}"}
            for n, problem in enumerate(asked[test])])
    found = results.outcomes(0, tmp_path, ["bridge"], {"id": "id, 5 ops", "ood": "ood, 6 ops"})
    before, after = found[0].rows()
    assert [before[name] for name in ("stage", "accuracy", "tokens", "accuracy, answer not 0")] == ["sft", 1, 3, 1]
    assert [after[name] for name in ("stage", "accuracy", "tokens", "accuracy, answer not 0")] == ["rl", 0.5, 5, 0]
    assert before["right in every step"] == 1 and after["right in every step"] == 0 < before["restatements"]
    text = results.table(found)
    assert "\n95% intervals: of the gain, and of how much more it is; over the problems of one seed (" in text
    assert "; over 2 seeds (Student's t).\n" in results.table(found + [dataclasses.replace(outcome, seed=1) for outcome in found])
    assert "| 3 -> 5 |" in text and "id, 5 ops: 50.0%; ood, 6 ops: 100.0%" in text
    sft, rl = (line.split(" | ") for line in text.splitlines() if line.startswith("| bridge | ") and ", greedy" in line)
    assert (sft[1], rl[1]) == ("SFT", "RL") and float(sft[4]) > 0 == float(rl[4])
