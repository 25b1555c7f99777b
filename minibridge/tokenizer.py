"""Text to token ids: a `tokenizer.json`, the two chat formats, and the training of toy tokenizers.

What it is: the one place where a conversation becomes ids, so that SFT, RL and evaluation feed the model the
very same prompt ids. Two formats are known, told apart by the special tokens the vocabulary holds:

    chatml (Qwen)    <|im_start|>user\\n1+1?<|im_end|>\\n<|im_start|>assistant\\n
    llama3           <|begin_of_text|><|start_header_id|>user<|end_header_id|>\\n\\n1+1?<|eot_id|>...

What it is not: a Jinja engine. Chats are rendered by hand; `save` writes the equal Jinja template for other
tools. Neither format adds a default system message or a date.

The trap it exists for: BPE merges across the place where the prompt ends (">\\n" is one token, ">\\n\\n" is
another), so encoding a whole chat at once can give ids that no sampler's prompt ends with. Here the prompt,
opening tag included, and the completion are always encoded apart.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from minibridge.answer import OPENING
from minibridge.config import InputError, write_whole

# How Qwen cuts text into pieces before BPE: contractions; words with the one character before them; single
# digits; punctuation with the newlines after it; blank space.
# Source: tokenizer.json of https://huggingface.co/Qwen/Qwen2.5-0.5B
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Texts that every tokenizer must keep whole. One whose tags are special tokens would lose them in decoding; one without
# a token for every byte of UTF-8 (all of them are in here) would lose what it does not know.
PROBES = (
    "<think>\n- Let k be Mill's Pot. k = 7 * (8 - 5) = 21.\n</think>\n<answer>\nThe answer is \\boxed{21}.\n</answer>",
    " ".join(map(chr, [*range(0x80), *range(0xBF, 0x800, 0x40), *range(0x400, 0x440), 0x800, *range(0x1010, 0xD011, 0x1000),
                       0xE000, 0xF000, 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000])),
)


@dataclass(frozen=True)
class Chat:
    """The literal text of one chat format; `header` holds {role}."""

    marker: str  # the special token that gives the format away
    begin: str
    header: str
    end_of_turn: str
    after_turn: str
    end_of_text: str
    strip: bool  # Llama trims blank space around each message

    def content(self, message: dict) -> str:
        return message["content"].strip() if self.strip else message["content"]

    def template(self) -> str:
        """The Jinja twin of `Tokenizer.render`."""
        # Newlines stand inside string literals: Jinja drops one that follows a block tag.
        role_before, role_after = (json.dumps(part) for part in self.header.split("{role}"))
        content = "message['content']" + (" | trim" if self.strip else "")
        return (
            f"{self.begin}"
            "{% for message in messages %}"
            f"{{{{ {role_before} + message['role'] + {role_after} }}}}"
            f"{{{{ {content} }}}}"
            f"{{{{ {json.dumps(self.end_of_turn + self.after_turn)} }}}}"
            "{% endfor %}"
            "{% if add_generation_prompt %}"
            f"{{{{ {json.dumps(self.header.format(role='assistant'))} }}}}"
            "{% endif %}"
        )


CHATS = {
    "chatml": Chat(
        marker="<|im_start|>",
        begin="",
        header="<|im_start|>{role}\n",
        end_of_turn="<|im_end|>",
        after_turn="\n",
        end_of_text="<|endoftext|>",
        strip=False,
    ),
    "llama3": Chat(
        marker="<|start_header_id|>",
        begin="<|begin_of_text|>",
        header="<|start_header_id|>{role}<|end_header_id|>\n\n",
        end_of_turn="<|eot_id|>",
        after_turn="",
        end_of_text="<|end_of_text|>",
        strip=True,
    ),
}


class Tokenizer:
    """A `tokenizers.Tokenizer` that knows its chat format ("chatml" or "llama3").

    Attributes: `end_of_turn_id`, the token that ends every message; `stop_ids`, the tokens that end sampling
    (end of turn, then end of text if there is one); `pad_id`, for the saved configuration: nothing here is padded by it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, chat: str):
        self.tokenizer = tokenizer
        self.chat = CHATS[chat]
        ids = (tokenizer.token_to_id(token) for token in (self.chat.end_of_turn, self.chat.end_of_text))
        self.stop_ids = tuple(token_id for token_id in ids if token_id is not None)
        self.end_of_turn_id = tokenizer.token_to_id(self.chat.end_of_turn)
        self.pad_id = self.stop_ids[-1]

    @classmethod
    def load(cls, folder: str | Path) -> "Tokenizer":
        """Open `folder`/tokenizer.json. Raises InputError if missing, broken or of an unknown chat format."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"{path}: no such file")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
            # Some published files switch these on, and would cut, pad or vary the ids of a text without a word.
            tokenizer.no_truncation()
            tokenizer.no_padding()
            if isinstance(tokenizer.model, models.BPE):
                tokenizer.model.dropout = None
            found = cls(tokenizer, _chat_format(tokenizer))
            found._check()
            return found
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        except BaseException as error:  # the package raises nothing narrower than Exception, and panics are not even that
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise InputError(f"{path}: not a tokenizer file ({error})") from None

    def _check(self) -> None:
        """InputError for a vocabulary that would change what passes through it."""
        ids = self.tokenizer.get_vocab().values()
        if len(set(ids)) < len(ids):
            raise InputError("two tokens have the same id")
        prompt = self.render([{"role": "user", "content": PROBES[0]}], add_generation_prompt=True)
        whole = [(text, self.decode(self.encode(text))) for text in PROBES]
        whole += [(prompt, self.decode(self.encode(prompt), skip_special=False)), ("", self.decode(self.stop_ids))]
        # In parts, too: where an answer goes on after its opening, and token by token.
        whole += [(OPENING + PROBES[0], self.decode(self.encode(OPENING) + self.encode(PROBES[0]))),
                  (PROBES[0], "".join(self.decode([id_]) for id_ in self.encode(PROBES[0])))]
        for text, back in whole:
            if back != text:
                start = max(0, len(os.path.commonprefix([text, back])) - 10)
                text, back = text[start:start + 40], back[start:start + 40]
                raise InputError(f"{text!r} comes back from its ids as {back!r}")

    @property
    def vocab_size(self) -> int:
        """Number of tokens, special ones included; a model's embedding may have more rows."""
        return self.tokenizer.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; special tokens written out in it become their ids, and nothing is added (no BOS)."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special)

    def render(self, messages: list[dict], add_generation_prompt: bool = False) -> str:
        """The chat as one string, equal to transformers' `apply_chat_template(messages, tokenize=False)`."""
        chat = self.chat
        text = chat.begin
        for message in messages:
            text += chat.header.format(role=message["role"]) + chat.content(message)
            text += chat.end_of_turn + chat.after_turn
        return text + chat.header.format(role="assistant") if add_generation_prompt else text

    def encode_prompt(self, messages: list[dict]) -> list[int]:
        """Ids the model is given before it writes: the chat, the assistant's header and the opening tag."""
        return self.encode(self.render(messages, add_generation_prompt=True) + OPENING)

    def encode_example(self, messages: list[dict]) -> tuple[list[int], list[int]]:
        """Ids and loss mask of a chat that ends with the assistant's text, which must start with OPENING.

        The ids are exactly `encode_prompt(messages[:-1])`, then the rest of the text, then the end of turn.
        The mask is 0 on the prompt and 1 after it, the end of turn included: stopping has to be learned too.
        """
        text = self.chat.content(messages[-1])
        if messages[-1]["role"] != "assistant" or not text.startswith(OPENING):
            raise InputError(f"the last message must be the assistant's and start with {OPENING!r}")
        prompt = self.encode_prompt(messages[:-1])
        completion = self.encode(text[len(OPENING) :]) + [self.end_of_turn_id]
        return prompt + completion, [0] * len(prompt) + [1] * len(completion)

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, so that transformers and vLLM see the same chat."""
        folder = Path(folder)
        write_whole(folder / "tokenizer.json", self.tokenizer.to_str(pretty=True))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.chat.begin or None,
            "eos_token": self.chat.end_of_turn,
            "pad_token": self.tokenizer.id_to_token(self.pad_id),
            "clean_up_tokenization_spaces": False,
            "chat_template": self.chat.template(),
        }
        if self.chat is CHATS["chatml"] and json.dumps(PIECES) not in self.tokenizer.to_str():
            # For a model of type qwen2 transformers 5 cuts text as Qwen does, whatever tokenizer.json says, unless a class
            # in the folder is named (there is none, and without trust_remote_code none is looked for).
            settings["auto_map"] = {"AutoTokenizer": [None, "none.Tokenizer"]}
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        write_whole(folder / "tokenizer_config.json", text + "\n")


def _chat_format(tokenizer: tokenizers.Tokenizer) -> str:
    for name, chat in CHATS.items():
        if all(_is_token(tokenizer, token) for token in (chat.marker, chat.end_of_turn)):
            return name
    raise InputError("unknown chat format: neither <|im_start|> with <|im_end|> nor <|start_header_id|> with <|eot_id|>")


def _is_token(tokenizer: tokenizers.Tokenizer, token: str) -> bool:
    """Whether `token` is in the vocabulary and, standing in a text, becomes that one id."""
    number = tokenizer.token_to_id(token)
    return number is not None and tokenizer.encode(token, add_special_tokens=False).ids == [number]


def train_toy(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `texts`, ChatML, cut like Qwen's; same texts, same tokenizer.

    It has at most `vocab_size` tokens: 3 special ones, the 256 bytes and merges of pairs seen at least twice.
    """
    chat = CHATS["chatml"]
    special = [chat.end_of_text, chat.marker, chat.end_of_turn]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special):
        raise InputError(f"vocab_size {vocab_size}: at least {len(alphabet) + len(special)} are needed")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    # Unlike Qwen's, a number's first digit takes the space before it: a third fewer tokens in a formula.
    pieces = PIECES.replace(r"|\p{N}", r"| ?\p{N}")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(tokenizers.Regex(pieces), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return Tokenizer(tokenizer, "chatml")
