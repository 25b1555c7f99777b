"""Records to examples to batches: bad lines are named, batches resume exactly, pieces fit."""

import copy
import itertools
import json
import random

import pytest

from minibridge.config import InputError
from minibridge.data import Example, batches, index_stream, load_prompts, load_sft, micro_batches, prompt_stream
from minibridge.tokenizer import train_toy

SYSTEM = {"role": "system", "content": "Think."}
USER = {"role": "user", "content": "3 + 4?"}
ASSISTANT = {"role": "assistant", "content": "<think>\n3 + 4 = 7\n</think>\n<answer>7</answer>"}
SFT = {"messages": [SYSTEM, USER, ASSISTANT], "answer": "7", "num_ops": 1}
RL = {"prompt": [SYSTEM, USER], "answer": "7", "num_ops": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_toy(["system user assistant <think>\n</think>\n<answer>"] * 2, 300)


@pytest.fixture
def write(tmp_path):
    def write(*rows) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return write


def test_sft_example(tokenizer, write):
    examples = load_sft(write(SFT, SFT), tokenizer, 500)
    assert examples == [Example(*tokenizer.encode_example(SFT["messages"]))] * 2


def test_sft_without_a_system_message(tokenizer, write):
    (example,) = load_sft(write({"messages": [USER, ASSISTANT]}), tokenizer, 500)
    assert example.ids == tokenizer.encode_example([USER, ASSISTANT])[0]


def test_whole_chat_learns_every_token(tokenizer, write):
    (example,) = load_sft(write(SFT), tokenizer, 500, whole_chat=True)
    assert example.ids == tokenizer.encode_example(SFT["messages"])[0]
    assert example.mask == [1] * len(example.ids)


def test_length_limit(tokenizer, write):
    ids, mask = tokenizer.encode_example(SFT["messages"])
    path = write(SFT)
    assert load_sft(path, tokenizer, len(ids))[0].ids == ids
    with pytest.raises(InputError, match=f"rows.jsonl:1: {len(ids)} tokens.* {len(ids) - 1} "):
        load_sft(path, tokenizer, len(ids) - 1)
    (example,) = load_sft(path, tokenizer, len(ids) - 1, truncate=True)
    assert example == Example(ids[:-1], mask[:-1])


def test_truncation_must_leave_something_to_learn(tokenizer, write):
    prompt = len(tokenizer.encode_prompt(SFT["messages"][:2]))
    path = write(SFT)
    assert sum(load_sft(path, tokenizer, prompt + 1, truncate=True)[0].mask) == 1
    with pytest.raises(InputError, match="rows.jsonl:1: nothing is left"):
        load_sft(path, tokenizer, prompt, truncate=True)
    assert len(load_sft(path, tokenizer, prompt, whole_chat=True, truncate=True)[0].ids) == prompt


BAD_MESSAGES = [
    None,
    "text",
    ["text"],
    [],
    [SYSTEM, USER],
    [USER, SYSTEM, ASSISTANT],
    [SYSTEM, USER, ASSISTANT, USER],
    [SYSTEM, {"role": ["user"], "content": ""}, ASSISTANT],
    [SYSTEM, {"role": "user"}, ASSISTANT],
    [SYSTEM, {"role": "user", "content": 7}, ASSISTANT],
]


@pytest.mark.parametrize("messages", BAD_MESSAGES)
def test_bad_messages_are_named_by_line(tokenizer, write, messages):
    with pytest.raises(InputError, match="rows.jsonl:2: .*'messages'"):
        load_sft(write(SFT, {"messages": messages}), tokenizer, 500)


@pytest.mark.parametrize("change", [{"prompt": None}, {"prompt": SFT["messages"]}, {"prompt": [SYSTEM]}])
def test_bad_prompts_are_named_by_line(tokenizer, write, change):
    with pytest.raises(InputError, match="rows.jsonl:2: .*'prompt'"):
        load_prompts(write(RL, RL | change), tokenizer, 500)


@pytest.mark.parametrize("answer", [None, 7])
def test_bad_answer_is_named_by_line(tokenizer, write, answer):
    with pytest.raises(InputError, match="rows.jsonl:2: .*'answer'"):
        load_prompts(write(RL, RL | {"answer": answer}), tokenizer, 500)


@pytest.mark.parametrize("change, fine", [
    ({"id": 7}, True), ({"id": None}, True), ({"id": [["deep"]]}, False), ({"task": {}}, False),
    ({"num_ops": 5}, True), ({"num_ops": "5"}, False), ({"num_ops": True}, False)])
def test_what_is_copied_into_results_must_be_plain(tokenizer, write, change, fine):
    path = write(RL, RL | change)
    if fine:
        assert load_prompts(path, tokenizer, 500)[1].record == RL | change
    else:
        with pytest.raises(InputError, match=f"rows.jsonl:2: field '{next(iter(change))}'"):
            load_prompts(path, tokenizer, 500)


def test_missing_opening_is_named_by_line(tokenizer, write):
    bare = {"messages": [USER, {"role": "assistant", "content": "7"}]}
    with pytest.raises(InputError, match="rows.jsonl:2: .*<think>"):
        load_sft(write(SFT, bare), tokenizer, 500)


def test_a_tolerance_comes_with_its_prompt(write, tokenizer):
    (prompt,) = load_prompts(write(RL), tokenizer, 500)
    assert prompt.tolerance == 0
    (prompt,) = load_prompts(write(RL | {"tolerance": 1e-4}), tokenizer, 500)
    assert prompt.tolerance == 1e-4
    with pytest.raises(InputError, match=":1: .*'tolerance'"):
        load_prompts(write(RL | {"tolerance": "little"}), tokenizer, 500)


@pytest.mark.parametrize("load", [load_sft, load_prompts])
@pytest.mark.parametrize("rows, message", [((), "rows.jsonl: no lines"), (("{",), "rows.jsonl:1: ")])
def test_empty_and_broken_files(tokenizer, write, load, rows, message):
    with pytest.raises(InputError, match=message):
        load(write(*rows), tokenizer, 500)


def test_prompts(tokenizer, write):
    (prompt,) = load_prompts(write(RL), tokenizer, 500)
    assert prompt.ids == tokenizer.encode_prompt(RL["prompt"])
    assert prompt.answer == "7" and prompt.record == RL
    length = len(prompt.ids)
    assert load_prompts(write(RL), tokenizer, length) == [prompt]
    with pytest.raises(InputError, match=f"rows.jsonl:1: .*{length} tokens.* {length - 1} "):
        load_prompts(write(RL), tokenizer, length - 1)


def test_an_epoch_uses_each_example_at_most_once():
    for epoch in range(3):
        for count in (9, 10, 11):
            found = batches(count, 3, seed=1, epoch=epoch)
            assert [len(batch) for batch in found] == [3, 3, 3]
            assert len(set(itertools.chain(*found))) == 9
    assert sorted(itertools.chain(*batches(6, 3, seed=1, epoch=0))) == list(range(6))


def test_shuffles_differ_by_epoch_and_seed_and_ignore_global_randomness():
    orders = {(seed, epoch): batches(20, 20, seed, epoch)[0] for seed in (1, 2) for epoch in (0, 1)}
    assert len({tuple(order) for order in orders.values()}) == 4
    random.seed(0)
    assert batches(20, 20, 1, 0)[0] == orders[1, 0]


def test_prompt_stream_is_the_batches_in_a_row_each_prompt_with_its_seed():
    whole = list(itertools.islice(prompt_stream(10, 3, seed=4), 30))
    batches = list(itertools.islice(index_stream(10, 3, seed=4), 10))
    assert [index for index, _ in whole] == [index for batch in batches for index in batch]
    assert len({seed for _, seed in whole}) == 30
    for start in range(25):
        assert list(itertools.islice(prompt_stream(10, 3, seed=4, start=start), 5)) == whole[start : start + 5]
    assert next(prompt_stream(10, 3, seed=5))[1] != whole[0][1]


def test_index_stream_resumes_anywhere():
    whole = list(itertools.islice(index_stream(10, 3, seed=4), 12))
    assert whole == [batch for epoch in range(4) for batch in batches(10, 3, 4, epoch)]
    for start in range(11):
        assert list(itertools.islice(index_stream(10, 3, seed=4, start=start), 2)) == whole[start : start + 2]


@pytest.mark.parametrize("count, size", [(2, 3), (0, 1), (4, 0), (4, -1)])
def test_batch_larger_than_the_data(count, size):
    with pytest.raises(InputError, match=f"batch of {size} .* {count} examples"):
        index_stream(count, size, seed=0)


@pytest.mark.parametrize("max_tokens", [30, 31, 64, 10_000])
def test_micro_batches_cover_all_and_fit(max_tokens):
    rng = random.Random(3)
    lengths = [rng.randint(1, 30) for _ in range(57)] + [30]
    examples = [Example([1] * length, [1] * length) for length in lengths]
    before = copy.deepcopy(examples)
    pieces = micro_batches(examples, max_tokens)
    assert sorted(itertools.chain(*pieces)) == list(range(58))
    for piece in pieces:
        assert len(piece) * max(len(examples[index].ids) for index in piece) <= max_tokens
    assert examples == before


def test_micro_batches_are_not_smaller_than_needed():
    lengths = [4, 1, 4, 1, 2, 2]
    assert micro_batches([Example([0] * n, [1] * n) for n in lengths], 8) == [[0, 2], [4, 5, 1, 3]]


def test_micro_batch_that_cannot_fit():
    with pytest.raises(InputError, match="micro_tokens: .* 31 tokens .* 30"):
        micro_batches([Example([0] * 31, [1] * 31)], 30)
