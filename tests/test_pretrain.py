"""The base models: what each stage shows, and that every stage runs; a tiny model stands in for them."""
import json
import shutil
from dataclasses import replace

import pytest
import torch

from minibridge import pretrain, splits, traces
from minibridge.checkpoint import load
from minibridge.config import InputError, read_jsonl
from minibridge.dag import Problem
from minibridge.pretrain import SIZES, Stage, all_styles, examples, half_words, mostly_equations
from minibridge.tokenizer import Tokenizer
from minibridge.traces import VANILLA, Behaviors

TINY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1}


def test_styles():
    assert [mostly_equations(ops, number) for ops in (3, 5) for number in (0, 1)] == [VANILLA, None, None, None]
    assert [half_words(6, number) for number in (0, 1)] == [VANILLA, None]
    mixes = [all_styles(5, number) for number in range(10)]
    assert mixes[4] is mixes[9] is None and len(set(mixes) - {None}) == 8
    assert set(mixes) - {None} == {Behaviors(s, a, r) for s in (False, True) for a in (0, 2) for r in (0.0, 0.1)}
    assert mixes == [all_styles(5, number) for number in range(10, 20)]


@pytest.mark.parametrize("name, most", [("toy", 6), ("small", 14)])
def test_examples_are_of_the_size_and_in_the_style(name, most):
    size = SIZES[name]
    assert max(ops for stage in size.stages for ops in stage.rows) == most
    rows = examples(size, Stage("", {}, all_styles, 0, 0), 4, 10, seed=0)
    assert all(row["num_ops"] == 4 for row in rows) and len({row["id"] for row in rows}) == 10
    for number, row in enumerate(rows):
        problem, style, text = Problem.from_dict(row["problem"]), all_styles(4, number), row["messages"][-1]["content"]
        assert int(problem.structure, 16) % 10 in splits.SPLITS["base"][2]
        assert (text == traces.equations(problem)) == (style is None) and row["behaviors"] == str(style or VANILLA)


def test_the_sizes_are_what_they_say():
    for name, low, high in (("toy", 1.0e6, 1.2e6), ("small", 13.5e6, 14.5e6)):
        size = SIZES[name]
        config = pretrain.ModelConfig.from_hf({**size.model, "vocab_size": size.vocabulary})
        with torch.device("meta"):
            assert low < sum(parameter.numel() for parameter in pretrain.Decoder(config).parameters()) < high


@pytest.mark.parametrize("name", ["toy", "small"])
def test_every_stage_runs_and_the_last_model_is_the_base(name, tmp_path, monkeypatch):
    size = SIZES[name]
    stages = tuple(replace(stage, rows={3: 110, 4: 50}) for stage in size.stages)  # the second: as few as make a batch
    monkeypatch.setitem(SIZES, name, replace(size, model=size.model | TINY, stages=stages, batch=4))
    draw = splits.problems  # fewer for the tokenizer
    monkeypatch.setattr(splits, "problems", lambda split, count, *rest, **named: draw(split, min(count, 300), *rest, **named))
    config = pretrain.Config(str(tmp_path / "run"), name, workers=1, device="cpu")
    pretrain.main(config)
    folder = tmp_path / "run"
    last = stages[-1].name
    trained, base = load(folder / last / "sft" / "model").state_dict(), load(folder / f"{name}_base").state_dict()
    assert all(torch.equal(trained[key].half().float(), base[key].float()) for key in trained)
    assert len(read_jsonl(folder / last / "train.jsonl")) == 14 and len(read_jsonl(folder / last / "val.jsonl")) == 200
    starts = [json.loads((folder / stage.name / "sft" / "run.json").read_text())["config"]["model"] for stage in stages]
    assert starts == [str(folder / "init"), *(str(folder / stage.name / "sft" / "model") for stage in stages[:-1])]
    assert size.vocabulary // 2 < Tokenizer.load(folder / f"{name}_base").vocab_size <= size.vocabulary
    pretrain.main(config)  # nothing is left to do
    with pytest.raises(InputError, match="share was 1.0, is 0.5"):
        pretrain.main(replace(config, share=0.5))


@pytest.mark.parametrize("name", ["toy_base", "init"])
def test_a_model_of_others_is_neither_replaced_nor_begun_with(toy, tmp_path, name):
    shutil.copytree(toy.model, tmp_path / name)
    before = (tmp_path / name / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match=f"holds {name}, but no run.json"):
        pretrain.main(pretrain.Config(out=str(tmp_path), share=1e-6, workers=1, device="cpu"))
    assert (tmp_path / name / "model.safetensors").read_bytes() == before
