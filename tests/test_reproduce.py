"""The comparison end to end on a tiny random model: every stage really runs, none twice, and the table adds up."""

import dataclasses
import json

import pytest

from minibridge import reproduce
from minibridge.checkpoint import load
from minibridge.config import InputError, read_jsonl
from minibridge.dag import Problem
from minibridge.evaluate import Scored


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("reproduce") / "run"
    config = reproduce.Toy(out=str(out), base=toy.model, sft_ops=(2, 3), ops=(2, 3), sft_rows=32, sft_epochs=1.0, rl_steps=2,
                           rl_prompts=2, rl_samples=2, test_problems=24, test_samples=3, max_new_tokens=24)
    reproduce.main_toy(config)
    return config, out


def test_every_stage_leaves_its_result(finished):
    _, out = finished
    for arm in reproduce.ARMS:
        assert load(out / f"sft_{arm}" / "model").config == load(out / f"rl_{arm}" / "model").config
        assert len(list((out / f"rl_{arm}" / "rollouts").iterdir())) == 2
        for stage in ("sft", "rl"):
            for test in reproduce.TESTS:
                assert len(read_jsonl(out / f"{stage}_{arm}_{test}_greedy.jsonl")) == 24
                assert len(read_jsonl(out / f"{stage}_{arm}_{test}_sampled.jsonl")) == 24 * 3
    table = (out / "table.md").read_text()
    assert table.count("| vanilla |") == table.count("| bridge |") == 2 * len(reproduce.TESTS)
    assert len((out / "curves.csv").read_text().splitlines()) == 1 + 2 * len(reproduce.ARMS)


def test_arms_share_problems_and_splits_share_none(finished):
    _, out = finished
    ids = {name: [row["id"] for row in read_jsonl(out / f"{name}.jsonl")]
           for name in ("sft_vanilla", "sft_bridge")}
    assert ids["sft_vanilla"] == ids["sft_bridge"]
    splits = [{Problem.from_dict(row["problem"]).structure for name in names for row in read_jsonl(out / f"{name}.jsonl")}
              for names in (["sft_bridge"], ["rl"], ["test_id", "test_ood"])]
    assert len(set.union(*splits)) == sum(map(len, splits))


def test_a_second_run_repeats_no_stage(finished, monkeypatch):
    config, out = finished

    def repeated(config):
        raise AssertionError("a finished stage ran again")

    for script in (reproduce.train_sft, reproduce.train_rl):
        monkeypatch.setattr(script, "main", repeated)
    monkeypatch.setattr(reproduce.evaluate, "sample", repeated)
    before = (out / "table.md").read_text()
    reproduce.main_toy(config)
    assert (out / "table.md").read_text() == before


def test_other_settings_are_refused_by_name(finished):
    config, out = finished
    with pytest.raises(InputError, match="seed"):
        reproduce.main_toy(dataclasses.replace(config, seed=1))
    assert json.loads((out / "run.json").read_text())["config"]["seed"] == 0


@pytest.mark.parametrize("change, message", [
    ({"max_new_tokens": 1024}, "max_new_tokens: 1024 leave no room"), ({"base": "no/such"}, "no/such: no such folder")])
def test_what_cannot_work_is_refused_before_any_file(finished, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        reproduce.main_toy(dataclasses.replace(finished[0], out=str(tmp_path / "run"), **change))
    assert not (tmp_path / "run").exists()


def test_paired_gain_by_hand():
    """Changes +1, 0, 0, -1, +1: mean 1/5, variance (0.64 + 0.04 + 0.04 + 1.44 + 0.64) / 4 = 0.7. Twice the same answer to
    a problem, or one of two right before and after, changes nothing."""
    right = [(False, True), (True, True), (False, False), (True, False), (False, True)]
    before, after = ([Scored("1", 8, [pair[i]]) for pair in right] for i in range(2))
    gain, reach = reproduce.paired_gain(before, after)
    assert gain == pytest.approx(0.2)
    assert reach == pytest.approx(1.96 * (0.7 / 5) ** 0.5)
    twice = [[Scored(s.answer, s.num_ops, s.correct * 2) for s in scored] for scored in (before, after)]
    assert reproduce.paired_gain(*twice) == pytest.approx((gain, reach))
    half = [Scored("1", 8, [True, False]), Scored("1", 8, [False, True])]
    assert reproduce.paired_gain(half, half[::-1]) == (0, 0)


def test_the_shipped_base_is_small_and_opens():
    files = [path for path in reproduce.TOY_BASE.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 4_000_000
    model = load(reproduce.TOY_BASE)
    assert model.config.max_position_embeddings >= reproduce.MAX_PROMPT + reproduce.Toy().max_new_tokens
