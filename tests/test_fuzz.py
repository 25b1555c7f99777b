"""Every reader on damaged files: it loads what the file says, or refuses it in one line that names the file.

    python -m pytest tests/test_fuzz.py --fuzz 2000 --fuzz-seed 1 -s     # 2,000 mutations, and what came of them

Without --fuzz a few hundred are tried. Each is drawn from (seed, reader, number) alone, so a failure names what repeats it.
Whatever a reader accepts is held against a second, naive reading of the same bytes: no mutation may be loaded as something
else than what it says. No reader may hang, ask for much memory, change a file, or raise anything but an InputError.
"""

import collections
import faulthandler
import json
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
from conftest import within
from safetensors.torch import load_file, save_file

from minibridge import checkpoint
from minibridge.arms import read_rollouts
from minibridge.config import InputError, Run, _lines_before as lines_before, read_jsonl, write_jsonl
from minibridge.dag import read_problem
from minibridge.data import Example, Prompt, load_prompts, load_sft
from minibridge.evaluate import rescore
from minibridge.model import SIZES, Decoder, ModelConfig
from minibridge.optim import adamw, resume_point, update
from minibridge.tokenizer import Tokenizer

def read_problems(path):
    return [read_problem(line, f"{path}:{n}") for n, line in enumerate(read_jsonl(path), 1)]

SECONDS, GIBIBYTES = 20, 3  # of one reading; the slowest takes a tenth of a second and a few megabytes

# --- JSON that keeps what a dict would lose: the order of names, names that stand twice, and raw text -----------------


class Pairs(list):
    """A JSON object as a list of [name, value]."""


class Raw(str):
    """A piece of JSON, or of what should be JSON, as it stands in the file."""


NUMBERS = [Raw(text) for text in (
    "0", "-1", "1", "3", "64", "0.5", "1e-300", "1e29", "1e999", "-1e999", "NaN", "Infinity", "-Infinity", "4096", "1000000",
    "2147483646", "2147483647", "2147483648", "1000000000000", "9" * 400, "9" * 5000)]
HOSTILE = NUMBERS + [Raw(text) for text in (
    "null", "true", "false", '"F16"', '"I32"', '"U8"', '"F64"', '"F8_E4M3"', '"C64"', '"F4"', '"llama3"', '"qwen2"', '""', '"x"', '"24"', r'"\u0000"', r'"\ud83d"', r'"\udc00x"', '"a\\nb"',
    "[]", "{}", "[[]]", "[null]", '{"a": 1, "a": 2}', "[" * 90 + "]" * 90, "[" * 300 + "]" * 300, "[" * 950 + "]" * 950,
    "[" * 100_000 + "]" * 100_000, '{"a":' * 990 + "1" + "}" * 990, '"' + "x" * 100_000 + '"', "'x'", "01", "+1", "0x10", "")]


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
    """(list, index) of every value inside, so that `holder[index]` can be replaced; of objects, their [name, value]."""
    found, waiting = [], [value]
    while waiting:
        holder = waiting.pop()
        for index, item in enumerate(holder):
            found.append((holder, index))
            inner = item[1] if isinstance(holder, Pairs) else item
            if isinstance(inner, list):
                waiting.append(inner)
    return found


def mutate_json(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """One value replaced, removed, doubled or renamed."""
    value = parsed(data)
    all_places = places(value)
    shallow = [place for place in all_places if place[0] is value]  # a vocabulary would else drown what stands beside it
    holder, index = rng.choice(shallow if rng.random() < 0.4 else all_places)
    item = holder[index]
    number = type(item[1] if isinstance(holder, Pairs) else item) in (int, float)
    new = rng.choice(NUMBERS if number and rng.random() < 0.5 else HOSTILE)
    change = rng.choice(("replace", "replace", "replace", "remove", "double", "rename"))
    name = item[0] if isinstance(holder, Pairs) else index
    if change == "replace":
        holder[index] = [item[0], new] if isinstance(holder, Pairs) else new
    elif change == "remove":
        del holder[index]
    elif change == "double":
        holder.insert(rng.randint(0, len(holder)), [item[0], new] if isinstance(holder, Pairs) else item)
    elif isinstance(holder, Pairs):
        holder[index] = [rng.choice(("", "x", str(item[0]) + " ", rng.choice(holder)[0])), item[1]]
    return dumped(value).encode("utf-8", "surrogatepass"), f"{change} {str(name)[:40]!r} {new[:30]}"


# --- bytes --------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    start = rng.randrange(len(data) + 1)
    end = min(len(data), start + rng.choice((1, 2, 8, 100)))
    change = rng.choice(("flip", "flip", "cut", "insert", "delete", "repeat", "zero", "swap"))
    if change == "flip":
        changed = bytearray(data)
        for _ in range(rng.choice((1, 1, 2, 16))):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(changed), "flip bits"
    middle = {"cut": b"", "delete": b"", "repeat": data[start:end] * 2, "zero": bytes(end - start), "swap": data[start:end][::-1],
              "insert": rng.choice((rng.randbytes(4), b"\xff\xfe", b"\xed\xa0\x80", b"\x00", b"\n", b"\n\n", b'"', b"}", b"[" * 9999,
                                    b"NaN", b"9" * 5000, b"\xef\xbb\xbf")) + data[start:end]}[change]
    return data[:start] + middle + (b"" if change == "cut" else data[end:]), f"{change} {start}:{end}"


def mutate_lines(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    lines = data.splitlines()
    number = rng.randrange(len(lines))
    lines[number], change = mutate_json(rng, lines[number])
    return b"\n".join(lines) + b"\n", f"line {number + 1}: {change}"


def mutate_tensors(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A safetensors file: 8 bytes with the length of its header, the header in JSON, the numbers."""
    size = struct.unpack("<Q", data[:8])[0]
    header, body = data[8:8 + size], data[8 + size:]
    change = rng.choice(("header", "header", "length", "number", "body"))
    if change == "header":
        header, change = mutate_json(rng, header)
        size = len(header)
    elif change == "length":
        size = rng.choice((0, 1, size - 1, size + 1, size + len(body), 2**31, 2**40, 2**63, 2**64 - 1))
    elif change == "number":  # all are fp32
        place = 4 * rng.randrange(len(body) // 4)
        number = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 3e38, 1e-45))
        body, change = body[:place] + struct.pack("<f", number) + body[place + 4:], f"number {number}"
    else:
        body = body[:-rng.choice((1, 4, 4000))] if rng.random() < 0.5 else body + bytes(rng.choice((1, 4, 4000)))
    return struct.pack("<Q", size) + header + body, change


def mutation(rng: random.Random, path: Path) -> str:
    """Damages a file; returns what was done."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        if change := rng.choice(("missing", "empty", "folder")) != "missing":
            path.write_bytes(b"") if change == "empty" else path.mkdir()
        return f"{path.name}: missing, empty or a folder"
    mutate = {".json": mutate_json, ".jsonl": mutate_lines, ".safetensors": mutate_tensors}[path.suffix]
    data, change = (mutate if kind < 0.7 else mutate_bytes)(rng, path.read_bytes())
    path.write_bytes(data)
    return f"{path.name}: {change}"


# --- what is read, and how it is known to be right -----------------------------------------------------------------


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
        assert used == said and type(used) is type(said) or said is None and name in ("head_dim", "tie_word_embeddings"), name
    assert model.frequencies.isfinite().all()
    weights = {}
    for path in folder.glob("model*.safetensors"):
        weights |= naive_tensors(path)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name].float()) and parameter.isfinite().all(), name


TEXTS = ["", " ", "a", "Ann's 12 apples = 3 * 4.\n\n", "na\u00efve \u65e5\u672c \U0001f600 \u0410\u044f", "\x00\x7f\t\r\n", "<think>\nx</think>"]


def check_tokenizer(tokenizer: Tokenizer, folder: Path):
    ids = list(tokenizer.tokenizer.get_vocab().values())
    assert len(set(ids)) == len(ids), "an id of two tokens"
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text, text
    prompt = tokenizer.encode_prompt([{"role": "user", "content": "1+1?"}])
    assert tokenizer.decode(prompt, skip_special=False).endswith("1+1?<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert tokenizer.end_of_turn_id in prompt


def check_examples(examples: list[Example], folder: Path):
    encode = Tokenizer.load(folder / "model").encode_example
    assert [(example.ids, example.mask) for example in examples] == [encode(line["messages"])
                                                                     for line in naive_lines(folder / "sft.jsonl")]


def check_prompts(prompts: list[Prompt], folder: Path):
    lines, encode = naive_lines(folder / "rl.jsonl"), Tokenizer.load(folder / "model").encode_prompt
    assert [prompt.record for prompt in prompts] == lines
    assert [prompt.ids for prompt in prompts] == [encode(line["prompt"]) for line in lines]
    write_jsonl(folder.parent / "copy.jsonl", lines)  # as results are


def read_answers(folder: Path):
    path = str(folder / "answers.jsonl")
    return rescore(path), read_rollouts(path), read_problems(path)


def check_answers(found, folder: Path):
    groups, answers, problems = found
    lines = naive_lines(folder / "answers.jsonl")
    right = ["\\boxed{" + line["answer"] + "}" in line["text"] for line in lines]
    assert sum(sum(group.correct) for group in groups) == sum(right)
    assert sum(line["correct"] for rows in answers.values() for line in rows) == sum(right)
    assert [str(problem.answer) for problem in problems] == [line["answer"] for line in lines]


@dataclass(frozen=True)
class Settings:
    out: str
    resume: bool = True
    seed: int = 0
    rate: float = 0.5


def read_run(folder: Path):
    """What resuming does before its first step."""
    saved = resume_point(Settings(str(folder)))
    model = Decoder(TINY)
    model.init_weights(torch.Generator().manual_seed(1))
    optimizer, generator = adamw(model, (0.9, 0.999), 0.01), torch.Generator()
    state = checkpoint.load_training(saved, model, optimizer)
    generator.set_state(state["generator"])
    return saved, state, model, optimizer, lines_before(folder / "metrics.jsonl", state["step"] + 1)


def check_run(found, folder: Path):
    saved, state, model, optimizer, metrics = found
    check_model(model, saved)
    assert type(state["step"]) is int and state["step"] == json.loads((saved / "training.json").read_text())["step"] >= 0
    whole_lines = (folder / "metrics.jsonl").read_bytes().split(b"\n")[:-1]  # a last one without its end was cut off
    assert [json.loads(line) for line in metrics.splitlines()] == [row for row in map(json.loads, whole_lines)
                                                                   if row["step"] <= state["step"]]
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


READERS = {
    "model": Reader(("config.json", "model.safetensors"), checkpoint.load, check_model),
    "shards": Reader((checkpoint.INDEX, "model-1.safetensors", "model-2.safetensors"), checkpoint.load, check_model),
    "tokenizer": Reader(("tokenizer.json", "tokenizer_config.json"), Tokenizer.load, check_tokenizer),
    "sft": Reader(("sft.jsonl",), lambda folder: load_sft(folder / "sft.jsonl", Tokenizer.load(folder / "model"), 2000),
                  check_examples),
    "prompts": Reader(("rl.jsonl",), lambda folder: load_prompts(folder / "rl.jsonl", Tokenizer.load(folder / "model"), 2000),
                      check_prompts),
    "answers": Reader(("answers.jsonl",), read_answers, check_answers),
    "run": Reader(("run.json", "metrics.jsonl", *(f"checkpoints/step_1/{name}" for name in (
        "config.json", "model.safetensors", "training.json", "training.safetensors", "training.safetensors"))),
        read_run, check_run),
}
TINY = ModelConfig("llama", 40, 8, 12, 2, 2, 1, 4, 64, rope_theta=1e4,
                   rope_scaling={"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                 "original_max_position_embeddings": 16})


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
    for number, part in enumerate((weights[::2], weights[1::2]), 1):
        save_file(dict(part), root / "shards" / f"model-{number}.safetensors")
    (root / "shards" / checkpoint.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {
        name: f"model-{1 + number % 2}.safetensors" for number, (name, _) in enumerate(weights)}}))
    toy.tokenizer.save(root / "tokenizer")
    for name in ("sft", "prompts"):
        toy.tokenizer.save(root / name / "model")
    write_jsonl(root / "sft" / "sft.jsonl", read_jsonl(toy.sft)[:4])
    write_jsonl(root / "prompts" / "rl.jsonl", read_jsonl(toy.rl)[:4])
    write_jsonl(root / "answers" / "answers.jsonl", [
        {"group": number // 2, "id": line["id"], "answer": line["answer"], "text": text, "num_ops": line["num_ops"],
         "tolerance": 0.0, "problem": line["problem"]}
        for number, line in enumerate(read_jsonl(toy.rl)[:2] * 2) for text in ("\\boxed{" + line["answer"] + "}", "\\boxed{x}")])
    write_run(root / "run", model)
    return root


def write_run(folder: Path, model: Decoder):
    optimizer, generator = adamw(model, (0.9, 0.999), 0.01), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    run = Run(folder, Settings(str(folder)))
    for step in (1, 2):
        run.log(step, console=(), loss=0.5)
    checkpoint.save_training(folder / "checkpoints" / "step_1", model, optimizer, {"step": 1, "generator": generator.get_state()})


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def outcome(reader: Reader, folder: Path, damaged: Path) -> str:
    before = snapshot(folder)
    try:
        with within(SECONDS):
            found = reader.read(folder)
    except InputError as error:
        assert "\n" not in str(error)[:400] and (str(damaged) in str(error) or str(damaged.parent) in str(error)), error
        return "refused"
    finally:
        assert snapshot(folder) == before, "files were changed"
    reader.check(found, folder)
    return "loaded"


@pytest.fixture
def bounded():
    """A hang in native code ends the process, and an absurd allocation fails."""
    faulthandler.dump_traceback_later(600, exit=True)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    status = Path("/proc/self/statm")
    if status.exists():
        used = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + GIBIBYTES * 2**30, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)
    faulthandler.cancel_dump_traceback_later()


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused_or_read_as_they_are(name, whole, bounded, tmp_path, request, capsys):
    count, seed = (request.config.getoption(option) for option in ("--fuzz", "--fuzz-seed"))
    reader, outcomes = READERS[name], collections.Counter()
    assert outcome(reader, whole / name, whole / name / reader.files[0]) == "loaded"
    for number in range(-(-count // len(READERS))):
        rng = random.Random(f"{seed}/{name}/{number}")
        folder = tmp_path / str(number)
        shutil.copytree(whole / name, folder)
        if name == "run":
            (folder / "run.json").write_bytes((folder / "run.json").read_bytes().replace(str(whole / name).encode(), str(folder).encode()))
        damaged = folder / rng.choice(reader.files)
        change = mutation(rng, damaged)
        try:
            outcomes[outcome(reader, folder, damaged)] += 1
        except BaseException as error:
            if request.config.getoption("--fuzz-go"):
                outcomes["FAILED"] += 1
                import traceback
                with capsys.disabled():
                    tb = traceback.extract_tb(error.__traceback__)[-1]
                    print(f"FAIL seed {seed} {name} {number}: {change} -> {type(error).__name__} {str(error)[:150]!r} at {tb.filename.split('/')[-1]}:{tb.lineno}", flush=True)
                if isinstance(error, KeyboardInterrupt): raise
            else:
                error.add_note(f"seed {seed}, reader {name}, number {number}: {change}")
                raise
        shutil.rmtree(folder)
    with capsys.disabled():
        print(name, dict(outcomes))
