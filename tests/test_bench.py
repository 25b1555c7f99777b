"""The bench: its arithmetic by hand, and each command once on work of a second."""

import json
import time

import pytest
import torch

from minibridge import bench, measure, peers
from minibridge.config import InputError, parse
from minibridge.generate import Completion
from minibridge.tokenizer import Tokenizer

CPU = torch.device("cpu")
SMALL = "--prompts 2 --samples 3 --prompt-tokens 9 --new-tokens 8 --repeats 2 --eager"


def test_functions_take_turns_and_the_first_turn_does_not_count():
    calls = []

    def work(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds if len(calls) > 2 else 0.2)
            return 10
        return run

    found = measure.rates(3, work("a", 0.01), work("b", 0.02))
    assert calls == ["a", "b"] * 4 and [len(rates) for rates in found] == [3, 3]
    assert all(500 < rate <= 1000 for rate in found[0][1:]) or max(found[0]) > 200  # not the slow first turn's 50
    assert max(found[1]) <= 500


def test_a_row_holds_medians_their_ratio_and_the_share_of_the_limit():
    config = parse(bench.Work, [])
    row = measure.row(config, "decode", "tokens/s", [1.0, 30.0, 20.0], "peer", [10.0, 1.0, 99.0], limit=80.0)
    assert (row.ours, row.peer_value, row.ratio, row.limit_share) == (20.0, 10.0, 2.0, 0.25)
    alone = measure.row(config, "decode", "tokens/s", [5.0])
    assert (alone.peer_value, alone.ratio, alone.limit, alone.limit_share) == (0.0, 0.0, 0.0, 0.0)


@pytest.mark.parametrize("vocabulary, longest", [(1024, 256), (151_936, 1024)])
def test_ragged_answers_are_half_as_long_as_they_may_be(vocabulary, longest):
    chance = len(bench.stop_ids(vocabulary, longest)) / vocabulary
    mean = sum((1 - chance) ** n for n in range(longest))  # of a geometric length, cut off
    assert 0.45 < mean / longest < 0.55


def test_the_limit_of_decoding_by_hand(monkeypatch):
    model = bench.build(parse(bench.Work, ["--new-tokens", "8"]), CPU)
    answers = [[Completion([1] * 4), Completion([1] * 2)], [Completion([1] * 4)]]
    parameters = 3_409_664 + 256  # 4 (4 C^2 / 2 + ...) by the shape, checked against the model itself
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(parameters, rel=2e-3)
    parameters = sum(p.numel() for p in model.parameters())
    pairs = (4 * 9 + 8) + (2 * 9 + 2) + (4 * 9 + 8)  # each new token and its prompt of 9, and half its answer squared
    flops = 2 * parameters * 10 + 4 * 4 * 4 * 64 * pairs
    slot = 2 * 4 * 2 * 64 * 4  # bytes of a token's keys and values, 4 layers of 2 heads of 64 in fp32
    read = 4 * parameters * 4 + slot * ((8 + 2 + 8) + 9 * (4 + 4))  # four steps; each prompt once a step
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e9)
    monkeypatch.setattr(bench, "bandwidth", lambda *_: 1e18)
    assert bench.decode_limit(model, answers, 9) == pytest.approx(10 / (flops / 1e9))
    monkeypatch.setattr(bench, "matmul_rate", lambda *_: 1e18)
    monkeypatch.setattr(bench, "bandwidth", lambda *_: 1e9)
    assert bench.decode_limit(model, answers, 9) == pytest.approx(10 / (read / 1e9))


@pytest.mark.parametrize("work, flags, names", [
    ("decode", SMALL, ["decode, equal", "decode, ragged"]),
    ("train", SMALL, ["train"]),
    ("step", SMALL, ["GRPO step"]),
    ("influence", SMALL.removesuffix(" --eager"), ["derivative of each answer"]),
    ("logprob", "--shape toy --tokens 32 --repeats 2", ["fused_loss", "token_logprobs", "fused_loss, with entropy: memory"]),
    ("data", "--count 10 --repeats 1 --ops 3-5 --workers 1", ["both: a problem with its texts"]),
])
def test_each_command_measures_and_writes_its_rows(work, flags, names, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "MEASURABLE", 0)
    main, config = bench.COMMANDS[work]
    main(parse(config, [*flags.split(), "--json", str(tmp_path / "rows.json")]))
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert set(names) <= {row["work"] for row in rows}
    assert set(rows[0]) == {"work", "shape", "device", "ours", "peer", "peer_value", "ratio", "unit", "limit", "limit_share"}
    assert all(row["ours"] > 0 for row in rows if "memory" not in row["work"])
    assert torch.cuda.is_available() or {row["device"] for row in rows} == {f"cpu, {torch.get_num_threads()} threads"}
    table = capsys.readouterr().out
    assert all(f"| {row['work']} |" in table for row in rows)


def test_memory_too_small_to_tell_is_not_shown(tmp_path):
    bench.main_logprob(parse(bench.LogProb, [*"--shape toy --tokens 32 --repeats 1 --device cpu --json".split(), str(tmp_path / "rows")]))
    assert "memory" not in (tmp_path / "rows").read_text()


def test_peak_memory_sees_what_a_function_held_for_a_while():
    def held():
        torch.ones(2**26).add_(1)  # 256 MiB, gone at the end; more than earlier tests leave free in this process

    assert 252 * 2**20 < measure.peak_memory(CPU, held) < 292 * 2**20


@pytest.mark.parametrize("work, packages", [("decode", "transformers"), ("train", "transformers"),
                                            ("step", "transformers, trl, datasets")])
def test_a_missing_library_is_named_before_anything_is_measured(work, packages, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    main, config = bench.COMMANDS[work]
    with pytest.raises(InputError, match=f"peers: {packages} not installed"):
        main(parse(config, ["--peers"]))


def test_a_peer_that_ends_early_is_one_line(tmp_path, monkeypatch):
    """It has no model, or TRL is not installed."""
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "0")
    peer = peers.TRL(tmp_path / "nothing", ["a"], 2, 4, 1, True, True, False)
    with pytest.raises(InputError, match="^peers: TRL 0, checkpointing has ended before its time"):
        peer.step()


def test_steps_take_turns_and_the_first_does_not_count(monkeypatch, capsys):
    """A peer whose steps take 1,000, 1, 2 and 3 seconds."""
    class Peer:
        def __init__(self, folder, texts, *rest):
            self.name, self.seconds = f"peer {rest[3]}", iter([1000.0, 1.0, 2.0, 3.0])
            assert (folder / "model.safetensors").exists() and len(texts) == 2 and rest[:3] == (3, 8, 4)
            assert rest[4:] == (True, False)  # on a CPU in fp32

        def step(self):
            return next(self.seconds)

    monkeypatch.setattr(bench.peers, "TRL", Peer)
    monkeypatch.setattr(bench, "check_peers", lambda *_: None)
    bench.main_step(parse(bench.Work, f"{SMALL} --repeats 3 --peers --eager".split()))
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if "GRPO step" in line]
    assert [(row[5].strip(), float(row[6])) for row in rows] == [("peer True", 3.0), ("peer False", 3.0)]  # 6 answers in 2 s


@pytest.mark.oracle
def test_the_peer_does_the_same_work(tmp_path):
    pytest.importorskip("transformers")
    config = parse(bench.Work, SMALL.split())
    model, prompts = bench.build(config, CPU), bench.random_prompts(config)
    bench.checkpoint.save(model, tmp_path)
    peer = peers.Transformers(tmp_path, torch.float32, CPU)
    assert peer.decode(prompts, 3, 8, []) == 2 * 3 * 8
    stop = list(range(1024))  # every token stops
    assert peer.decode(prompts, 3, 8, stop) == 2 * 3
    assert 2 * 3 < peer.decode(prompts, 3, 8, list(range(256))) < 2 * 3 * 8
    ids, changes = torch.tensor(prompts), []
    for micro_tokens in (100, 9):
        peer = peers.Transformers(tmp_path, torch.float32, CPU)
        before = peer.model.get_input_embeddings().weight.clone()
        assert peer.trainer(ids, micro_tokens)() == 18
        changes.append(peer.model.get_input_embeddings().weight - before)
    assert changes[0].norm() > 1e-3 and (changes[1] - changes[0]).norm() < 1e-3 * changes[0].norm()  # by rounding


def test_the_text_that_a_peer_gets_has_the_same_ids():
    tokenizer, config = Tokenizer.load(bench.TOY_BASE), parse(bench.Work, [])
    prompts = peers.spelled(bench.random_prompts(config), tokenizer)
    assert [tokenizer.encode(tokenizer.decode(ids)) for ids in prompts] == prompts
    assert [len(ids) for ids in prompts] == [128] * 8 and len({id_ for ids in prompts for id_ in ids}) > 100


def test_rows_replace_no_file(tmp_path):
    (tmp_path / "mine.json").write_text("mine")
    with pytest.raises(InputError, match="json: .*mine.json is there already"):
        parse(bench.Data, ["--json", str(tmp_path / "mine.json")])
