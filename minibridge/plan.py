"""Memory and time of a run, predicted from config.json and the flags, and flags that would use the device better.

    python train_rl.py --plan --model FOLDER ...          python train_sft.py --plan --model FOLDER ...

Bytes are those of `memory`, at the lengths that take most among those that the flags allow. Seconds are for answers
of full length, and count only the matrix products, or the memory that decoding must read, at the rates of the idle device: a
real step takes longer. No weights are loaded. A run plans once more when it has loaded its data, and notes
that in run.json under "plan".
"""
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minibridge import checkpoint
from minibridge.config import InputError
from minibridge.data import Example, load_sft
from minibridge.logprob import chunk_tokens
from minibridge.measure import bandwidth, free_memory, matmul_rate, resident
from minibridge.memory import ITEMS, Sizes, decoding, held, highest, sizes
from minibridge.model import Decoder
from minibridge.opening import pick_device, pick_dtype, prompt_limit
from minibridge.optim import training_flops
from minibridge.packed import PLACES
from minibridge.tokenizer import Tokenizer

SPARE = 0.9  # suggestions fill so much of the free memory: an allocator loses some between its blocks
LOOKED_AT = 64  # examples whose mean length stands for all

Phases = dict[str, Counter]  # bytes by phase and by what they are for
_rates = cache(lambda device, dtype: (matmul_rate(device, dtype), bandwidth(device, 128)))  # measured once a process


@dataclass(frozen=True)
class Plan:
    about: list[str]
    phases: Phases
    seconds: dict[str, float]   # of one step, by phase
    steps: int | None
    free: float                 # bytes that the process has or could have
    rates: tuple[float, float]  # floating-point operations and bytes, per second
    advice: Callable[[], list[str]]

    def record(self) -> dict[str, Any]:
        """For run.json. planned_gib: of the highest phase."""
        def gib(count: float) -> float:
            return round(count / 2**30, 3)
        items = {phase: {name: gib(count) for name, count in found.items()} for phase, found in self.phases.items()}
        return {"planned_gib": gib(_peak(self.phases)), "free_gib": gib(self.free), "gib": items,
                "seconds": {phase: float(f"{seconds:.3g}") for phase, seconds in self.seconds.items()}}

    def verdict(self) -> str:
        highest = max(self.phases, key=lambda phase: self.phases[phase].total())
        verb = "fits" if _peak(self.phases) <= self.free else "DOES NOT FIT"
        return f"Planned memory {verb}: it takes up to {_of(_peak(self.phases), self.free)} that are free, while {highest}."

    def time(self) -> str:
        step = sum(self.seconds.values())
        parts = " + ".join(f"{phase} {_time(seconds)}" for phase, seconds in self.seconds.items())
        whole = f"; {self.steps:,} steps take {_time(self.steps * step)}" if self.steps else ""
        full = " whose answers are all of full length" * ("decoding" in self.seconds)
        return (f"A step{full} takes at least {_time(step)} ({parts}) at {self.rates[0] / 1e12:.3g} TFLOP/s and "
                f"{self.rates[1] / 1e9:,.0f} GB/s{whole}.")

    def __str__(self) -> str:
        return "\n".join([*self.about, "", *self.table(), "", self.time(), self.verdict(), *self.advice()])

    def table(self) -> list[str]:
        unit, size = ("GiB", 2**30) if _peak(self.phases) > 2**32 else ("MiB", 2**20)
        rows = [(item, [found[item] for found in self.phases.values()]) for item in ITEMS]
        rows += [("total", [found.total() for found in self.phases.values()])]
        return [unit.ljust(20) + "".join(phase.rjust(12) for phase in self.phases)] + [
            item.ljust(20) + "".join((f"{count / size:,.2f}" if count else "").rjust(12) for count in counts)
            for item, counts in rows if any(counts)]


def rl(config: Any, prompts: Sequence[int] = (), held_out: Sequence[int] = ()) -> Plan:
    """Of train_rl.py's Config. A run that has loaded its models and data gives the lengths of its prompts, and of those
    held out. InputError for a wrong model folder, or if no micro-batch holds a prompt and an answer."""
    device, dtype, model, s = _opened(config)
    limit = prompt_limit(model, config.max_prompt, config.max_new_tokens)
    longest = max(prompts, default=limit)
    answers, least = config.prompts * config.samples, check_answer_fits(config, longest, bool(prompts))
    validated = len(held_out) or (_lines(config.val) if config.val else 0)  # 0: not known
    reference = bool(config.kl_coef) or config.kl_threshold is not None

    def phases(trial: Any) -> Phases:
        new, rows = trial.max_new_tokens, trial.rows
        found = {"decoding": decoding(s, trial.prompts, trial.samples, longest, new, rows)}
        if trial.val:
            found["validating"] = decoding(s, validated or 2 * rows, 1, max(held_out, default=limit), new, rows)
        found["training"] = highest(replace(s, checkpointing=trial.checkpointing), answers, trial.samples, longest, new,
                                    trial.micro_tokens, entropy=True)
        return _with_held(found, held(s, reference, sampled=True), s, loaded=bool(prompts))

    rates, mean = _rates(device, dtype), sum(prompts) / len(prompts) if prompts else longest
    about = (f"{config.prompts} prompts of at most {longest:,} tokens, {config.samples} answers to each of at most "
             f"{config.max_new_tokens:,}{'; refilling comes on top' if config.refill else ''}")
    most = max(config.prompts * longest + answers * config.max_new_tokens, -(-answers * least // PLACES))
    flags = {"micro_tokens": (least, most), "rows": (1, answers)}
    seconds = _rl_seconds(config, model, s, mean, reference, *rates)
    return _plan(config, s, device, dtype, about, phases, seconds, config.steps, rates, flags)


def sft(config: Any, examples: Sequence[Example] = (), loaded: bool = True) -> Plan:
    """Of train_sft.py's Config. A run that has loaded its model and data gives its examples (loaded=False: others may, too).
    InputError for a wrong model folder, or if no micro-batch holds the longest example."""
    device, dtype, model, s = _opened(config)
    longest = min(config.max_length, model.config.max_position_embeddings)
    longest = max((len(example.ids) for example in examples), default=longest)
    _check_micro(config, longest, f"an example of {longest} tokens", bool(examples))

    def phases(trial: Any) -> Phases:
        found = highest(replace(s, checkpointing=trial.checkpointing), trial.batch_size, 1, 0, longest,
                        trial.micro_tokens, entropy=False)
        return _with_held({"training": found}, held(s, False, sampled=False), s, loaded and bool(examples))

    seen, count = (examples, len(examples)) if examples else _examples(config, longest)
    mean = sum(len(example.ids) for example in seen) / len(seen)
    scored = sum(sum(example.mask[1:]) for example in seen) / len(seen)
    rates, tokens = _rates(device, dtype), config.batch_size * mean
    about = f"{config.batch_size} examples of at most {longest:,} tokens, {mean:,.0f} on average"
    flops = training_flops(model, tokens, config.batch_size * scored, tokens * mean / 2)
    flops += training_flops(model, tokens, 0, tokens * mean / 2, passes=config.checkpointing)
    return _plan(config, s, device, dtype, about, phases, {"training": flops / rates[0]},
                 round(config.epochs * (count // config.batch_size)), rates,
                 {"micro_tokens": (longest, config.batch_size * longest)})


def _examples(config: Any, longest: int) -> tuple[list[Example], int]:
    """The first examples, and the number of all; without the file or the tokenizer: one as long as can be, and 0."""
    if not Path(config.data).is_file() or not (Path(config.model) / "tokenizer.json").is_file():
        return [Example([0] * longest, [1] * longest)], 0
    examples = load_sft(config.data, Tokenizer.load(config.model), config.max_length, config.whole_chat, config.truncate,
                        LOOKED_AT)
    return examples, _lines(config.data)


def _lines(path: str) -> int:
    """0 if there is no such file."""
    if not Path(path).is_file():
        return 0
    with open(path, "rb") as file:
        return sum(1 for _ in file)


def _opened(config: Any) -> tuple[torch.device, torch.dtype, Decoder, Sizes]:
    device, model = pick_device(config.device), checkpoint.outline(config.model)
    dtype = pick_dtype(config.dtype, device)
    return device, dtype, model, sizes(model, dtype.itemsize, device.type == "cuda", config.checkpointing)


def check_answer_fits(config: Any, prompt: int, seen: bool) -> int:
    """Tokens of a prompt and the longest answer. InputError if no micro-batch holds them; seen: whether there is such a
    prompt, and not just a flag that allows it."""
    tokens = prompt + config.max_new_tokens
    _check_micro(config, tokens, f"a prompt of {prompt} and an answer of {config.max_new_tokens} tokens", seen)
    return tokens


def _check_micro(config: Any, least: int, what: str, seen: bool):
    if config.micro_tokens < least:
        raise InputError(f"micro_tokens: {config.micro_tokens} cannot hold {what}" + ", which the flags allow" * (not seen))


def _with_held(phases: Phases, always: Counter, s: Sizes, loaded: bool) -> Phases:
    """With what is there in every phase; on a CPU that is this process too, but for the weights that it has loaded."""
    if not s.cuda:
        weights = always["parameters"] + always["reference"] if loaded else 0
        always["this process"] = max(0, resident() - weights)
    return {phase: always + items for phase, items in phases.items()}


def passes(config: Any, reference: bool) -> int:
    """Forward passes that an RL step's training is worth: three an update, one each for other log-probabilities."""
    return 3 * config.updates + reference + (config.updates > 1 and config.old_logps == "recomputed")


def _rl_seconds(config: Any, model: Decoder, s: Sizes, prompt: float, reference: bool, rate: float, speed: float):
    """Of one step whose answers are all as long as they can be."""
    answer, answers = config.max_new_tokens, config.prompts * config.samples
    live = min(config.rows, answers)
    read = (s.body + s.head) * s.size
    read += s.slot * live * (prompt / config.samples + answer / 2)
    flops = training_flops(model, live, live, live * (prompt + answer / 2), passes=1)
    prefill = training_flops(model, config.prompts * prompt, 0, config.prompts * prompt**2 / 2, passes=1)
    pairs = config.prompts * prompt**2 / 2 + answers * answer * (prompt + answer / 2)
    tokens = config.prompts * prompt + answers * answer
    training = training_flops(model, tokens, answers * answer, pairs, passes(config, reference))
    training += training_flops(model, tokens, 0, pairs, passes=config.checkpointing * config.updates)
    return {"decoding": -(-answers // live) * answer * max(flops / rate, read / speed) + prefill / rate,
            "training": training / rate}


def _plan(config: Any, s: Sizes, device: torch.device, dtype: torch.dtype, about: str, phases: Callable[[Any], Phases],
          seconds: dict[str, float], steps: int, rates: tuple[float, float], flags: dict[str, tuple[int, int]]) -> Plan:
    name = torch.cuda.get_device_name(device) if s.cuda else "a CPU"
    title = (f"{config.model}: {s.config.model_type}, {s.config.num_hidden_layers} layers, {s.weights / 1e6:,.1f} million "
             f"parameters; {str(dtype).removeprefix('torch.')} products on {name}")
    chunk = chunk_tokens(config.micro_tokens, s.config.vocab_size)
    settings = ", ".join(f"--{flag.replace('_', '-')} {getattr(config, flag)}" for flag in flags)
    free = free_memory(device)
    return Plan([title, about, f"{settings}; logits of {chunk:,} tokens at a time"], phases(config), seconds, steps, free,
                rates, lambda: _advice(config, phases, free, flags))


def _advice(config: Any, phases: Callable[[Any], Phases], free: float, flags: dict[str, tuple[int, int]]) -> list[str]:
    """A line for each flag that could be larger or must be smaller. `flags`: the least and the most that make sense."""
    lines = []
    for flag, (least, most) in flags.items():
        def taken(value: int, config: Any) -> int:
            found = phases(replace(config, **{flag: value}))
            return _peak({phase: found[phase] for phase in found if (phase == "training") == (flag == "micro_tokens")})

        now, shown = min(most, getattr(config, flag)), "--" + flag.replace("_", "-")
        values = sorted({min(most, max(least, now * 2**k // 2**10)) for k in range(21)})
        for other in (config, replace(config, checkpointing=True)):
            fitting = [value for value in values if taken(value, other) <= SPARE * free]
            if fitting or flag == "rows":
                break
        shown = shown if other == config else "--checkpointing " + shown
        if not fitting:
            lines += [f"Even {shown} {values[0]} would not fit: {_of(taken(values[0], other), free)}."]
        elif fitting[-1] != now or other != config:
            lines += [f"{shown} {fitting[-1]} would fit with a tenth to spare: {_of(taken(fitting[-1], other), free)}."]
    return lines


def _peak(phases: Phases) -> int:
    return max(map(Counter.total, phases.values()))


def _of(count: float, free: float) -> str:
    return f"{count / 2**30:.2f} of {free / 2**30:.2f} GiB"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
