"""Every reader on damaged files: it reads what the file says, or refuses it with an InputError that names the file.

    python -m pytest tests/test_fuzz.py --fuzz 2000 --fuzz-seed 1 -s     # 2,000 damaged files, and what came of them

Without --fuzz a few hundred are tried. Each is drawn from (seed, reader, number) alone, and a failure names these.
What a reader accepts is held against a second, naive reading of the same bytes, so that no damage is read as something
else than what it says. No reader may hang, ask for much memory, change a file, or raise any other exception.
(tokenizer_config.json is written for other tools and never read: no damage to it changes anything.)
"""

import collections
import faulthandler
import json
import math
import random
import resource
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Late, within
from safetensors.torch import load_file, save_file

from minibridge import checkpoint, evaluate
from minibridge.arms import read_rollouts
from minibridge.config import InputError, read_jsonl, write_jsonl
from minibridge.dag import read_problem
from minibridge.data import Example, Prompt, load_prompts, load_sft
from minibridge.model import Decoder
from minibridge.model_config import SIZES, ModelConfig
from minibridge.reproduce import TOY_BASE
from minibridge.opening import fingerprint, resume_point
from minibridge.optim import adamw, update
from minibridge.run_folder import Run, _lines_before
from minibridge.tokenizer import Tokenizer

SECONDS, GIBIBYTES = 20, 3  # bounds of one reading: an undamaged file takes some hundredths of a second, and megabytes

# --- JSON that keeps what a dict would lose: the order of names, names that stand twice, raw text ----------------------


class Pairs(list):
    """A JSON object as a list of [name, value]."""


class Raw(str):
    """A piece of JSON, or of what should be JSON, as it stands in the file."""


NUMBERS = [Raw(text) for text in (
    "0", "-1", "1", "3", "64", "0.5", "1e-300", "1e29", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "4096", "1000000",
    "2147483646", "2147483647", "2147483648", "1000000000000", "9" * 400, "9" * 5000)]
HOSTILE = NUMBERS + [Raw(text) for text in (
    "null", "true", "false", '""', '"x"', '"24"', r'"\u0000"', r'"\ud83d"', r'"\udc00x"', r'"a\nb"',
    '"' + "x" * 100_000 + '"', '"F16"', '"I32"', '"U8"', '"F64"', '"F8_E4M3"', '"C64"', '"F4"', '"llama3"', '"qwen2"',
    "[]", "{}", "[[]]", "[null]",
    '{"a": 1, "a": 2}', "[" * 90 + "]" * 90, "[" * 300 + "]" * 300, "[" * 950 + "]" * 950, "[" * 100_000 + "]" * 100_000,
    '{"a":' * 990 + "1" + "}" * 990, "'x'", "01", "+1", "0x10", "")]


def parsed(data: bytes):
    return json.loads(data, object_pairs_hook=lambda pairs: Pairs(map(list, pairs)))


def dumped(value) -> str:
    if isinstance(value, Raw):
        return value
    if isinstance(value, Pairs):
        return "{" + ", ".join(f"{json.dumps(name)}: {dumped(item)}" for name, item in value) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dumped, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def places(value) -> list[tuple[list, int]]:
    """(holder, index) of every value inside; holder[index] is the value, or in an object its [name, value]."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        found += [(holder, index) for index in range(len(holder))]
        inner = (item[1] if isinstance(holder, Pairs) else item for item in holder)
        waiting += [item for item in inner if isinstance(item, list)]
    return found


# --- damage --------------------------------------------------------------------------------------------------------


def damage_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One value replaced, removed, doubled or renamed."""
    value = parsed(data)
    everywhere = places(value)
    shallow = [place for place in everywhere if place[0] is value]  # a long vocabulary would hide what stands beside it
    holder, index = rng.choice(shallow if rng.random() < 0.4 else everywhere)
    name, item = holder[index] if isinstance(holder, Pairs) else (index, holder[index])
    new = rng.choice(NUMBERS if type(item) in (int, float) and rng.random() < 0.5 else HOSTILE)
    change = rng.choice(("replace", "replace", "replace", "remove", "double", "rename"))
    if change == "replace":
        holder[index] = [name, new] if isinstance(holder, Pairs) else new
    elif change == "remove":
        del holder[index]
    elif change == "double":
        holder.insert(rng.randint(0, len(holder)), [name, new] if isinstance(holder, Pairs) else item)
    elif isinstance(holder, Pairs):
        holder[index] = [rng.choice(("", "x", f"{name} ", rng.choice(holder)[0])), item]
    return dumped(value).encode(), f"{change} {str(name)[:40]!r}, {new[:30]!r}"


def damage_lines(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number], change = damage_json(rng, lines[number])
    return b"\n".join(lines) + b"\n", f"line {number + 1}: {change}"


def damage_tensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file: 8 bytes with the length of its header, the header in JSON, the numbers, here all fp32."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    change = rng.choice(("header", "header", "length", "number", "body"))
    if change == "header":
        header, change = damage_json(rng, header)
        size = len(header)
    elif change == "length":
        size = rng.choice((0, 1, size - 1, size + 1, size + len(body), 2**31, 2**40, 2**63, 2**64 - 1))
    elif change == "number":
        place = 4 * rng.randrange(len(body) // 4)
        number = rng.choice((math.nan, math.inf, -math.inf, 0.0, -1.0, 3e38, 1e-45))
        body, change = body[:place] + struct.pack("<f", number) + body[place + 4:], f"number {number}"
    else:
        body = body[:-rng.choice((1, 4, 4000))] if rng.random() < 0.5 else body + bytes(rng.choice((1, 4, 4000)))
    return struct.pack("<Q", size) + header + body, change


def damage_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 8, 100)))
    before, middle, after = data[:start], data[start:end], data[end:]
    change = rng.choice(("flip", "flip", "cut", "insert", "delete", "repeat", "zero", "turn"))
    if change == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), change
    inserted = rng.choice((rng.randbytes(4), b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\x00", b"\n", b"\n\n", b'"',
                           b"}", b"[" * 9999, b"NaN", b"9" * 5000))
    changed = {"cut": before, "insert": before + inserted + middle + after, "delete": before + after,
               "repeat": before + middle + middle + after, "zero": before + bytes(len(middle)) + after,
               "turn": before + middle[::-1] + after}[change]
    return changed, f"{change} {start}:{end}"


def damage(rng: random.Random, path: Path) -> str:
    """Damages a file; returns how."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        if (change := rng.choice(("missing", "empty", "folder"))) != "missing":
            path.write_bytes(b"") if change == "empty" else path.mkdir()
        return f"{path.name}: {change}"
    by_kind = {".json": damage_json, ".jsonl": damage_lines, ".safetensors": damage_tensors}[path.suffix]
    data, change = (by_kind if kind < 0.7 else damage_bytes)(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {change}"


# --- what is read, and how it is known to be right ---------------------------------------------------------------------


def naive_tensors(path: Path) -> dict[str, torch.Tensor]:
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8:8 + size]), bytearray(data[8 + size:])
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "U8": torch.uint8}
    return {name: torch.frombuffer(body[slice(*entry["data_offsets"])], dtype=kinds[entry["dtype"]]).view(entry["shape"])
            for name, entry in header.items() if name != "__metadata__"}


def naive_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_bytes().removesuffix(b"\n").split(b"\n")]


def check_model(model: Decoder, folder: Path):
    data = json.loads((folder / "config.json").read_bytes())
    for name in (*SIZES, "rms_norm_eps", "rope_theta", "tie_word_embeddings", "model_type"):
        said, used = data.get(name), getattr(model.config, name)
        left_out = said is None and name in ("head_dim", "tie_word_embeddings")
        assert left_out or used == said and type(used) is type(said), name
    scaling = data.get("rope_scaling")
    assert model.config.rope_scaling == (scaling and {name: scaling[name] for name in TINY.rope_scaling} or None)
    assert model.frequencies.isfinite().all()
    weights = {}
    for path in folder.glob("model*.safetensors"):
        weights |= naive_tensors(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].float()) and parameter.isfinite().all(), name


TEXTS = ["", " ", "a", "Ann's 12 apples = 3 * 4.\n\n", "na\u00efve \u65e5\u672c \U0001f600 \u0410\u044f", "\x00\x7f\t\r\n",
         "<think>\nx</think>"]


def check_tokenizer(tokenizer: Tokenizer, folder: Path):
    ids = list(tokenizer.tokenizer.get_vocab().values())
    assert len(set(ids)) == len(ids)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "1+1?"}])
    assert tokenizer.decode(prompt, skip_special=False).endswith("1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert tokenizer.end_of_turn_id in prompt


def read_examples(folder: Path) -> list[Example]:
    return load_sft(folder / "sft.jsonl", Tokenizer.load(folder / "model"), 2000)


def check_examples(examples: list[Example], folder: Path):
    encode = Tokenizer.load(folder / "model").encode_example
    assert [(example.ids, example.mask) for example in examples] == [encode(line["messages"])
                                                                     for line in naive_lines(folder / "sft.jsonl")]


def read_prompts(folder: Path) -> list[Prompt]:
    return load_prompts(folder / "rl.jsonl", Tokenizer.load(folder / "model"), 2000)


def check_prompts(prompts: list[Prompt], folder: Path):
    lines, encode = naive_lines(folder / "rl.jsonl"), Tokenizer.load(folder / "model").encode_prompt
    assert [prompt.record for prompt in prompts] == lines
    assert [prompt.ids for prompt in prompts] == [encode(line["prompt"]) for line in lines]
    write_jsonl(folder.parent / "copy.jsonl", lines)  # as results are


def read_answers(folder: Path):
    path = str(folder / "answers.jsonl")
    problems = [read_problem(line, f"{path}:{number}") for number, line in enumerate(read_jsonl(path), 1)]
    return evaluate.rescore(path), read_rollouts(path), evaluate.explain(path), problems


def check_answers(found, folder: Path):
    groups, rollouts, why, problems = found
    lines = naive_lines(folder / "answers.jsonl")
    right = ["\\boxed{" + line["answer"] + "}" in line["text"] for line in lines]
    assert sum(sum(group.correct) for group in groups) == sum(right)
    assert sum(line["correct"] for rows in rollouts.values() for line in rows) == sum(right)
    assert [": right: " in line for line in why[:-2]] == right
    assert [str(problem.answer) for problem in problems] == [line["answer"] for line in lines]


@dataclass(frozen=True)
class Settings:
    out: str
    data: str = __file__  # some file that stays as it is
    model: str = str(TOY_BASE)
    resume: bool = True
    seed: int = 0
    rate: float = 0.5


def read_run(folder: Path):
    """What resuming does before its first step."""
    saved = resume_point(Settings(str(folder)), fingerprint(Settings("here")))
    if saved is None:
        return None
    model = Decoder(TINY)
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer = adamw(model, (0.9, 0.999), 0.01)
    state = checkpoint.load_training(saved, model, optimizer)
    return saved, state, model, optimizer, _lines_before(folder / "metrics.jsonl", state["step"] + 1)


def check_run(found, folder: Path):
    if found is None:  # a checkpoint without it is but a model, and training begins anew
        assert not (folder / "checkpoints/step_1/training.json").exists()
        return
    saved, state, model, optimizer, metrics = found
    check_model(model, saved)
    assert type(state["step"]) is int and state["step"] == json.loads((saved / "training.json").read_text())["step"] >= 0
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []  # a last one without its end was cut off
    infinite = (math.inf, -math.inf)
    rows = [{name: None if item in infinite else item for name, item in json.loads(line).items()} for line in lines]
    assert [json.loads(line) for line in metrics.splitlines()] == [row for row in rows if row["step"] <= state["step"]]
    tensors = naive_tensors(saved / "training.safetensors")
    for name, parameter in model.named_parameters():
        moments = optimizer.state[parameter]
        assert moments and all(torch.equal(value, tensors[f"optimizer/{name}/{key}"]) for key, value in moments.items())
        parameter.grad = torch.zeros_like(parameter)
    update(model, optimizer, 1e-6, 1.0)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@dataclass(frozen=True)
class Reader:
    files: tuple[str, ...]  # one of them is damaged
    read: Callable[[Path], Any]
    check: Callable[[Any, Path], None]


TINY = ModelConfig("llama", 40, 8, 12, 2, 2, 1, 4, 64, rope_theta=1e4,
                   rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 16})
READERS = {
    "model": Reader(("config.json", "model.safetensors"), checkpoint.load, check_model),
    "shards": Reader((checkpoint.INDEX, "model-1.safetensors", "model-2.safetensors"), checkpoint.load, check_model),
    "tokenizer": Reader(("tokenizer.json", "tokenizer.json", "tokenizer_config.json"), Tokenizer.load, check_tokenizer),
    "sft": Reader(("sft.jsonl",), read_examples, check_examples),
    "prompts": Reader(("rl.jsonl",), read_prompts, check_prompts),
    "answers": Reader(("answers.jsonl",), read_answers, check_answers),
    "run": Reader(("run.json", "metrics.jsonl", *(f"checkpoints/step_1/{name}" for name in (
        "config.json", "model.safetensors", "training.json", "training.safetensors", "training.safetensors"))),
        read_run, check_run),
}

# --- the test ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(toy, tmp_path_factory) -> Path:
    """A folder of undamaged files for each reader."""
    root = tmp_path_factory.mktemp("whole")
    model = Decoder(TINY)
    model.init_weights(torch.Generator().manual_seed(0), std=0.3)
    checkpoint.save(model, root / "model")
    checkpoint.save(model, root / "shards")
    weights = list(load_file(root / "shards" / checkpoint.WEIGHTS).items())
    (root / "shards" / checkpoint.WEIGHTS).unlink()
    for number in (0, 1):
        save_file(dict(weights[number::2]), root / "shards" / f"model-{number + 1}.safetensors")
    (root / "shards" / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {
        name: f"model-{number % 2 + 1}.safetensors" for number, (name, _) in enumerate(weights)}}))
    for name in ("tokenizer", "sft/model", "prompts/model"):
        toy.tokenizer.save(root / name)
    write_jsonl(root / "sft" / "sft.jsonl", read_jsonl(toy.sft)[:4])
    write_jsonl(root / "prompts" / "rl.jsonl", read_jsonl(toy.rl)[:4])
    write_jsonl(root / "answers" / "answers.jsonl", [
        {"group": number, "id": line["id"], "answer": line["answer"], "text": text, "num_ops": line["num_ops"],
         "tolerance": 0.0, "finish_reason": "stop", "problem": line["problem"]}
        for number, line in enumerate(read_jsonl(toy.rl)[:3]) for text in (f"\\boxed{{{line['answer']}}}", "\\boxed{x}")])
    write_run(root / "run", model)
    return root


def write_run(folder: Path, model: Decoder):
    optimizer, generator = adamw(model, (0.9, 0.999), 0.01), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    run = Run(folder, Settings("here"), "cpu")  # the folder may be moved
    for step in (1, 2):
        run.log(step, console=(), loss=0.5)
    state = {"step": 1, "fingerprint": fingerprint(Settings("here")), "drawn": 3}
    checkpoint.save_training(folder / "checkpoints" / "step_1", model, optimizer, state)


@pytest.fixture
def bounded():
    """Asking for much memory fails; a hang in native code, where no signal is heard, ends the process at last."""
    faulthandler.dump_traceback_later(3600, exit=True)
    limits, status = resource.getrlimit(resource.RLIMIT_AS), Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    faulthandler.cancel_dump_traceback_later()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(reader: Reader, folder: Path, damaged: Path) -> str:
    before = snapshot(folder)
    try:
        with within(SECONDS):
            found = reader.read(folder)
    except InputError as error:
        assert str(damaged.parent) in str(error)[:500], f"no file is named: {error}"  # so much of it is printed
        return "refused"
    finally:
        assert snapshot(folder) == before, "a reader has changed files"
    reader.check(found, folder)
    return "read"


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_as_they_are(name, whole, bounded, tmp_path, request):
    total, seed = (request.config.getoption(option) for option in ("--fuzz", "--fuzz-seed"))
    reader, outcomes = READERS[name], collections.Counter()
    assert outcome(reader, whole / name, whole / name / reader.files[0]) == "read"
    for number in range(-(-total // len(READERS))):
        rng = random.Random(f"{seed}/{name}/{number}")
        folder = tmp_path / str(number)
        shutil.copytree(whole / name, folder)
        damaged = folder / rng.choice(reader.files)
        change = damage(rng, damaged)
        try:
            outcomes[outcome(reader, folder, damaged)] += 1
        except (Exception, Late) as error:
            error.add_note(f"seed {seed}, reader {name}, number {number}: {change}")
            raise
        shutil.rmtree(folder)
    print(f"\n{name}: {outcomes['refused']} refused, {outcomes['read']} read as they are")
