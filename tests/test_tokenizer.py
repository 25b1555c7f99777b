"""Tokenizer: the boundary between prompt and completion, the mask, the chat formats, files."""

import json

import pytest
import tokenizers

from minibridge.config import InputError
from minibridge.tokenizer import PIECES, PROBES, Tokenizer, train_toy

TEXTS = [
    "The number of each River High's Backpack equals 3 more than 12.\n<think>\nSo b = 3 + 12 = 15.\n",
    "How many Pencil does Oak Hall have? Define Oak Hall's Pencil as p; so p = 7 * 13 = 91.\n</think>\n\n",
] * 4
CHAT = [
    {"role": "system", "content": " Think first.\n"},
    {"role": "user", "content": "How many Pencil does Oak Hall have? 3 + 12\n\n"},
    {"role": "assistant", "content": "<think>\nSo p = 3 + 12 = 15.\n</think>\n<answer>\n15\n</answer>"},
]
BOS = "<|begin_of_text|>"


@pytest.fixture(scope="module")
def chatml() -> Tokenizer:
    return train_toy(TEXTS, 400)


@pytest.fixture(scope="module")
def llama3() -> Tokenizer:
    """A toy vocabulary with Llama 3's special tokens and, like Llama's own file, a BOS added by default."""
    text = train_toy(TEXTS, 400).tokenizer.to_str()
    for old, new in (("endoftext", "end_of_text"), ("im_start", "start_header_id"), ("im_end", "eot_id")):
        text = text.replace(f"<|{old}|>", f"<|{new}|>")
    inner = tokenizers.Tokenizer.from_str(text)
    inner.add_special_tokens([BOS, "<|end_header_id|>"])
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, inner.token_to_id(BOS))]
    )
    return Tokenizer(inner, "llama3")


@pytest.fixture(params=["chatml", "llama3"])
def tokenizer(request) -> Tokenizer:
    return request.getfixturevalue(request.param)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [tokenizer.decode([token]) for token in tokenizer.encode(text)]


def test_toy_splits_digits_one_by_one():
    tokenizer = train_toy(["12 1234 + 56 = 12"] * 9, 400)
    assert pieces(tokenizer, "1234 + 56") == ["1", "2", "3", "4", " +", " 5", "6"]


def test_toy_learns_words_with_their_space_and_line_ends(chatml):
    assert pieces(chatml, " Hall Pencil.\n") == [" Hall", " Pencil", ".\n"]


def test_toy_is_deterministic_and_within_its_size(chatml):
    assert train_toy(TEXTS, 400).tokenizer.to_str() == chatml.tokenizer.to_str()
    assert 300 < chatml.vocab_size <= 400
    assert train_toy(TEXTS, 300).vocab_size == 300


def test_toy_too_small():
    with pytest.raises(InputError, match="258.*259"):
        train_toy(TEXTS, 258)


@pytest.mark.parametrize("text", ["", " \n\n\t x ", "naïve 数学 🙂 e\u0301", "a\r\nb", "<think>\n\n12.\n"])
def test_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_one_token_and_left_out_of_text(tokenizer):
    text = tokenizer.render(CHAT)
    ids = tokenizer.encode(text)
    assert ids.count(tokenizer.end_of_turn_id) == 3
    assert tokenizer.decode(ids, skip_special=False) == text
    assert "<|" not in tokenizer.decode(ids)


def test_stop_and_pad_ids(chatml, llama3):
    expected = {chatml: ("<|im_end|>", "<|endoftext|>"), llama3: ("<|eot_id|>", "<|end_of_text|>")}
    for tokenizer, names in expected.items():
        assert tuple(tokenizer.tokenizer.id_to_token(token) for token in tokenizer.stop_ids) == names
        assert (tokenizer.end_of_turn_id, tokenizer.pad_id) == tokenizer.stop_ids


def test_render_text(chatml, llama3):
    assert chatml.render(CHAT[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\nHow many Pencil does Oak Hall have? 3 + 12\n\n<|im_end|>\n<|im_start|>assistant\n"
    )
    assert llama3.render(CHAT[:1], add_generation_prompt=True) == BOS + (
        "<|start_header_id|>system<|end_header_id|>\n\nThink first.<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_prompt_ends_with_the_opening(tokenizer):
    text = tokenizer.decode(tokenizer.encode_prompt(CHAT[:2]), skip_special=False)
    assert text == tokenizer.render(CHAT[:2], add_generation_prompt=True) + "<think>\n"


@pytest.mark.parametrize("start", ["", "\n", "\n\n", " ", ">", "So p", "12"])
def test_example_begins_with_the_very_prompt_ids(tokenizer, start):
    chat = [*CHAT[:2], {"role": "assistant", "content": f"<think>\n{start}x</answer>"}]
    prompt = tokenizer.encode_prompt(chat[:2])
    ids, mask = tokenizer.encode_example(chat)
    assert ids[: len(prompt)] == prompt
    assert mask == [0] * len(prompt) + [1] * (len(ids) - len(prompt))


def test_whole_chat_at_once_would_move_the_boundary():
    """The reason why prompt and completion are encoded apart."""
    chat = [*CHAT[:2], {"role": "assistant", "content": "<think>\n\n\n</think>"}]
    tokenizer = train_toy([*TEXTS, "<think>\n\n\n</think>" * 9], 500)
    prompt = tokenizer.encode_prompt(chat[:2])
    assert tokenizer.encode(tokenizer.render(chat))[: len(prompt)] != prompt


def test_mask_covers_the_completion_and_its_end(tokenizer):
    ids, mask = tokenizer.encode_example(CHAT)
    learned = [token for token, weight in zip(ids, mask, strict=True) if weight]
    rest = CHAT[2]["content"].removeprefix("<think>\n")
    assert tokenizer.decode(learned, skip_special=False) == rest + tokenizer.chat.end_of_turn
    assert ids[-1] == tokenizer.end_of_turn_id and mask[-1] == 1


def test_llama_has_one_bos(llama3):
    bos = llama3.tokenizer.token_to_id(BOS)
    ids, _ = llama3.encode_example(CHAT)
    assert ids[0] == bos and ids.count(bos) == 1
    assert bos not in llama3.encode("12")


NO_OPENING = [("assistant", "15"), ("assistant", "<think>"), ("user", "<think>\n1")]


@pytest.mark.parametrize("role, content", NO_OPENING)
def test_example_without_the_opening(tokenizer, role, content):
    with pytest.raises(InputError, match="assistant.*<think>"):
        tokenizer.encode_example([*CHAT[:2], {"role": role, "content": content}])


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "new")
    loaded = Tokenizer.load(tmp_path / "new")
    assert loaded.encode_example(CHAT) == tokenizer.encode_example(CHAT)
    assert (loaded.stop_ids, loaded.chat) == (tokenizer.stop_ids, tokenizer.chat)


def test_truncation_in_the_file_is_switched_off(tmp_path):
    inner = train_toy(TEXTS, 300).tokenizer
    inner.enable_truncation(4)
    inner.enable_padding(length=9)
    inner.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    assert len(loaded.encode("abcdefgh ijkl")) > 9 and len(loaded.encode("a")) == 1


@pytest.mark.parametrize("content", [None, "{", "{}", '{"model": 1}', "\x00"])
def test_broken_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match="tokenizer.json"):
        Tokenizer.load(tmp_path)


def test_tags_that_decoding_would_drop_are_refused(tokenizer, tmp_path):
    """As special tokens they would vanish from every decoded answer, and none would be well formed."""
    tokenizer.save(tmp_path)
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.add_special_tokens(["</think>"])
    library.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="tokenizer.json.*comes back"):
        Tokenizer.load(tmp_path)


def test_a_marker_that_falls_into_pieces_is_no_chat_format(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["added_tokens"] = [token for token in data["added_tokens"] if token["content"] != tokenizer.chat.marker]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    assert tokenizer.chat.marker in data["model"]["vocab"]
    with pytest.raises(InputError, match="chat format"):
        Tokenizer.load(tmp_path)


def edited(tokenizer: Tokenizer, folder, edit) -> Tokenizer:
    """The tokenizer after a change of its tokenizer.json."""
    tokenizer.save(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    edit(data)
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return Tokenizer.load(folder)


@pytest.mark.parametrize("edit, words", [
    (lambda data: data["model"]["vocab"].pop("\u010d"), "(comes back|the same id)"),  # the token of byte 13
    (lambda data: data["model"]["vocab"].update({"Z": 7}), "the same id"),
    (lambda data: data["model"].update(continuing_subword_prefix="x" * 99), "not a tokenizer file"),  # a panic
    (lambda data: data.update(model={"type": "WordLevel", "vocab": data["model"]["vocab"], "unk_token": "[UNK]"}),
     "not a tokenizer file"),  # fails at the first text with a word it does not know
    (lambda data: [token.update(rstrip=True) for token in data["added_tokens"]], "comes back"),
    (lambda data: [token.update(special=False) for token in data["added_tokens"]], "comes back"),
    (lambda data: data.update(decoder={"type": "Sequence", "decoders": [data["decoder"], {  # " the" alone comes back as "the"
        "type": "Strip", "content": " ", "start": 1, "stop": 0}]}), "comes back"),
])
def test_vocabularies_that_change_texts_are_refused(tokenizer, tmp_path, edit, words):
    with pytest.raises(InputError, match=f"tokenizer.json: .*{words}"):
        edited(tokenizer, tmp_path, edit)


def test_dropout_in_the_file_is_switched_off(tokenizer, tmp_path):
    """It is for training tokenizers: with it, the same text gets other ids each time."""
    loaded = edited(tokenizer, tmp_path, lambda data: data["model"].update(dropout=0.9))
    assert [loaded.encode(TEXTS[0]) for _ in range(5)] == [tokenizer.encode(TEXTS[0])] * 5


def test_probes_hold_every_byte_of_utf_8_and_stand_normalisation(tokenizer, tmp_path):
    """Qwen's own files normalise (NFC); what they would change is no reason to refuse them."""
    assert set(range(256)) - set("".join(PROBES).encode()) == {0xC0, 0xC1, *range(0xF5, 0x100)}
    loaded = edited(tokenizer, tmp_path, lambda data: data.update(normalizer={"type": "NFC"}))
    assert loaded.encode("e\u0301") == tokenizer.encode("\u00e9")


def test_unknown_chat_format(tmp_path):
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="tokenizer.json.*chat format"):
        Tokenizer.load(tmp_path)


OF_MODELS = pytest.mark.parametrize("tokenizer, kind", [("chatml", "qwen2"), ("chatml", "qwen3"), ("chatml", "llama"),
                                                        ("llama3", "llama")], indirect=["tokenizer"])


def saved_for_transformers(tokenizer, folder, kind):
    """What transformers makes of it in the folder of a model: by its type alone it may choose a tokenizer of its own."""
    transformers = pytest.importorskip("transformers")
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.oracle
@pytest.mark.parametrize("generation", [False, True])
@pytest.mark.parametrize("chat", [CHAT, CHAT[:2], CHAT[1:2], [*CHAT, *CHAT[1:]]])
@OF_MODELS
def test_transformers_sees_the_same_chat(tokenizer, tmp_path, kind, chat, generation):
    theirs = saved_for_transformers(tokenizer, tmp_path, kind)
    text = tokenizer.render(chat, generation)
    assert theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation) == text
    ids = theirs.apply_chat_template(chat, add_generation_prompt=generation, return_dict=True)["input_ids"]
    assert ids == tokenizer.encode(text)


@pytest.mark.oracle
def test_qwens_own_cuts_need_no_other_class(chatml, tmp_path):
    text = chatml.tokenizer.to_str()
    cuts = json.dumps(PIECES.replace(r"|\p{N}", r"| ?\p{N}"))
    assert text.count(cuts) == 1
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text.replace(cuts, json.dumps(PIECES))), "chatml")
    theirs = saved_for_transformers(tokenizer, tmp_path, "qwen2")
    assert "auto_map" not in json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert theirs(TEXTS[0])["input_ids"] == tokenizer.encode(TEXTS[0]) != chatml.encode(TEXTS[0])


@pytest.mark.oracle
@OF_MODELS
def test_transformers_sees_the_same_special_tokens(tokenizer, tmp_path, kind):
    theirs = saved_for_transformers(tokenizer, tmp_path, kind)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.end_of_turn_id, tokenizer.pad_id)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.bos_token == (BOS if tokenizer.chat.strip else None)  # only the Llama format has one
    ids = tokenizer.encode(tokenizer.render(CHAT))
    assert theirs.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids)
