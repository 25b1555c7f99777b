"""What a GRPO step on each prompt would do for a validation set Q, and what else makes a model ready for RL.

    python -m minibridge.influence --model runs/sft/model --data data/rl.jsonl --val data/val.jsonl --out runs/influence

The equations are in `coinfluence`. Printed, and written to the folder --out as CSV:

    rollout_accuracy   how many prompts got which share alpha of right answers
    influence          I(q) and its factors, grouped by alpha; every prompt's in prompts.csv
    behaviors          what failed attempts, restatements and subgoals bring to I(q), token by token, where problems are
                       known
    fluency            entropy and perplexity on the model's own answers, and on --reference
    steps              with --check: I(q) against the growth seen when the step is really taken

and not printed rollouts.jsonl, the answers with kappa of every token; validation.jsonl, those of Q; ranked.jsonl, the
lines of --data from the most to the least influential, for train_rl.py; and, with matplotlib, the figures of `plots`.
Influence is the growth of GRPO's objective over Q for each unit of step size. Derivatives are in fp32. "+-" is half the
width of a 95% interval over the measured prompts.
"""
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from minibridge import breakdown, plots, tables
from minibridge.checkpoint import outline
from minibridge.coinfluence import (
    Measured, adam_scale, check_live, live_batches, live_prompts, means, measure, per_step, taken
)
from minibridge.config import REQUIRED, InputError, option, run_main, write_jsonl
from minibridge.dag import Problem, problem_in
from minibridge.data import Example, Prompt, load_prompts, load_sft, micro_batches
from minibridge.grpo import group_advantages
from minibridge.jvp import Direction
from minibridge.logprob import token_logprobs
from minibridge.model import Decoder
from minibridge.opening import fingerprint, open_model, pick_device, prompt_limit, same_run
from minibridge.policy import example_hidden
from minibridge.rollout import Episode, correctness, lines, mix, rollout
from minibridge.run_folder import Run
from minibridge.spans import token_kinds
from minibridge.tokenizer import Tokenizer

NOT_PRINTED = ("factor +-", "K+ +-", "K- +-", "influence, half", "K++", "K+-", "K-+", "K--")  # columns left to the CSV
UNRELIABLE = 0.5  # rank correlation of the halves; by chance alone it spreads widely, as few directions dominate gradients


@dataclass(frozen=True)
class Config:
    model: str = option(REQUIRED, "Hugging Face folder")
    data: str = option(REQUIRED, "JSONL file of RL prompts, whose influence is measured")
    val: str | None = option(None, "JSONL file of prompts for Q; none: the lines of --data after the first --prompts")
    out: str = option("runs/influence", "folder for tables and figures")
    prompts: int = option(64, "prompts of --data, from its first", least=1)
    val_prompts: int = option(64, "prompts of Q", least=2)
    samples: int = option(16, "answers to each prompt", least=2)
    halves: bool = option(True, "also by either half of Q, to see how far the ranking rests on it; one more pass")
    contrast: bool = option(False, "also the four means over right and wrong answers on both sides; two more passes")
    check: int = option(0, "prompts on which a step is really taken, and one on all: 5 passes over Q each", least=0)
    adam: str | None = option(None, "folder checkpoints/step_K of train_rl.py, by whose second moments steps are scaled")
    reference: str | None = option(None, "JSONL file of SFT answers for perplexity, its first --prompts lines")
    temperature: float = option(1.0, "of sampling and of the log-probabilities", least=1e-3)
    max_prompt: int = option(1024, "longest prompt, in tokens", least=1)
    max_new_tokens: int = option(2560, "longest answer, in tokens", least=1)
    rows: int = option(256, "answers decoded at the same time", least=1)
    micro_tokens: int = option(8192, "most tokens trained at a time, as if padded: sets memory, no result", least=1)
    checkpointing: bool = option(False, "keep only the input of each layer for the backward pass: less memory, more time")
    seed: int = option(0, "seed of sampling", least=0)
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "of sampling alone; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


def read_prompts(config: Config, tokenizer: Tokenizer, limit: int) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to measure, and those of Q; no prompt is in both."""
    prompts = load_prompts(config.data, tokenizer, limit)
    chosen, rest = prompts[:config.prompts], prompts[config.prompts:]
    held_out = (load_prompts(config.val, tokenizer, limit) if config.val else rest)[:config.val_prompts]
    if len(held_out) < 2:
        where = config.val or f"{config.data} after its first {len(chosen)}"
        raise InputError(f"val: Q needs 2 prompts, and there are {len(held_out)} in {where}")
    asked = {tuple(prompt.ids) for prompt in chosen}
    if shared := sum(tuple(prompt.ids) in asked for prompt in held_out):
        raise InputError(f"val: {shared} of its prompts are also measured; an influence on itself says nothing")
    return chosen, held_out


def reference_row(model: Decoder, examples: list[Example], temperature: float, max_tokens: int) -> dict:
    """`breakdown.fluency` of given answers; the prompts of SFT lines are not among the tokens."""
    found = []
    for piece in micro_batches(examples, max_tokens):
        with torch.no_grad():
            hidden, targets = example_hidden(model, [examples[index] for index in piece])
            found.append(torch.stack(token_logprobs(hidden, model.lm_head_weight, targets, temperature)))
    return breakdown.fluency("reference answers", *torch.cat(found, 1).cpu(), len(examples))


def own_rows(groups: list[list[Episode]], tokens: list[list[Tensor]]) -> list[dict]:
    """`breakdown.fluency` of the model's own answers, all of them and apart."""
    answers = [(episode.correct, values) for group, row in zip(groups, tokens) for episode, values in zip(group, row)]
    kinds = {"own answers": (True, False), "own right answers": (True,), "own wrong answers": (False,)}
    chosen = {name: [values for correct, values in answers if correct in wanted] for name, wanted in kinds.items()}
    return [breakdown.fluency(name, *torch.cat(values, 1)[[0, 2]], len(values)) for name, values in chosen.items() if values]


def columns_of(found: Measured, correct: Tensor, kappa: Tensor) -> dict[str, Tensor]:
    """Everything that is known of each prompt, (N,) each. K+- and the like: the first sign is that of Q's answers, which
    count as in g_Q, so that K+ - K- = (K++ - K+-) - (K-+ - K--)."""
    influence = found.influence
    columns = {"factor": influence.factor, "K+": influence.right, "K-": influence.wrong,
               "K+ - K-": influence.right - influence.wrong, "influence": influence.value}
    if "half" in found.parts:
        half = found.parts["half"]
        columns |= {"influence, half 1": per_step(half, correct).value,
                    "influence, half 2": per_step(kappa - half, correct).value}
    if "right" in found.parts:
        right = found.parts["right"]
        for of_q, part in (("+", right), ("-", right - kappa)):  # the advantages of Q's wrong answers are negative
            terms = per_step(part, correct)
            for own, term in (("+", terms.right), ("-", terms.wrong)):
                columns[f"K{of_q}{own}"] = torch.where(influence.factor > 0, term, torch.nan)
    return columns


def take_steps(model: Decoder, val: list[list[Episode]], groups: list[list[Episode]], found: Measured, config: Config,
               scale: Direction | None) -> list[dict]:
    """`coinfluence.taken` on all prompts together, then on the --check prompts of largest influence, up or down."""
    value, rows = found.influence.value, []
    q = live_batches(val, config.micro_tokens, model.device)
    largest = sorted(live_prompts(correctness(groups)), key=lambda n: -abs(value[n]))[:config.check]
    for name, chosen in [("all", list(range(len(groups)))), *((f"line {n + 1}", [n]) for n in largest)]:
        batches = live_batches([groups[n] for n in chosen], config.micro_tokens, model.device)
        steps = taken(model, q, batches, value[chosen].mean().item(), config.temperature, scale)
        rows += [{"step on": name, **row} for row in steps]
    return rows


def summarise(found: Measured, correct: Tensor, kappa: Tensor, columns: dict[str, Tensor]) -> dict[str, float | None]:
    """What stands for the whole run. The rank correlations, over the prompts that have an influence: of I(q) by one half
    of Q and by the other, and of I(q) from one half of q's own answers and from the other."""
    live = live_prompts(correct)
    own = [per_step(kappa[:, first::2], correct[:, first::2]).value[live] for first in (0, 1)]
    mean = found.influence.value.mean().item()
    summary = mix(correct) | {"influence": mean, "gradient_norm": found.norm,
                              "influence_over_norm": found.norm and mean / found.norm,
                              "answers_rank_correlation": breakdown.rank_correlation(*own)}
    if "half" in found.parts:
        halves = [columns[f"influence, half {half}"][live] for half in (1, 2)]
        summary |= {"halves_cosine": found.cosine, "common_gradient_norm": found.common,
                    "halves_rank_correlation": breakdown.rank_correlation(*halves)}
    return summary


def doubts(summary: dict[str, float | None], live: int) -> list[str]:
    """What to think of the ranking, if not all is well."""
    if live < 3:
        return [f"{live} of the prompts got both right and wrong answers: there is nothing to rank."]
    causes = {"halves_rank_correlation": "the two halves of Q do not rank the prompts alike; Q needs more prompts",
              "answers_rank_correlation": "the two halves of each prompt's answers do not rank the prompts alike; "
                                          "give more --samples"}
    return [f"The ranking is not to be trusted: {text}." for name, text in causes.items()
            if name in summary and (summary[name] is None or summary[name] < UNRELIABLE)]


def main(config: Config):
    out, device = Path(config.out), pick_device(config.device)
    outline(config.model)  # a wrong folder is named as everywhere
    run_hash = fingerprint(config)
    same_run(config, run_hash)
    model, tokenizer = open_model(config.model, device, config.dtype)
    prompts, held_out = read_prompts(config, tokenizer, prompt_limit(model, config.max_prompt, config.max_new_tokens))
    problems = [problem_in(prompt.record, f"{config.data}:{number}") for number, prompt in enumerate(prompts, 1)]
    longest = min(config.micro_tokens, model.config.max_position_embeddings)
    examples = load_sft(config.reference, tokenizer, longest, first=config.prompts,
                        limit="that --micro-tokens or the model's positions allow") if config.reference else []
    scale = adam_scale(config.adam, model) if config.adam else None
    run = Run(out, config, device=device, fingerprint=run_hash)
    print(f"sampling {config.samples} answers to each of {len(held_out)} prompts of Q and {len(prompts)} others", flush=True)
    generator = torch.Generator().manual_seed(config.seed)

    def sampled(asked: list[Prompt]) -> list[list[Episode]]:
        return rollout(model, tokenizer, asked, config.samples, max_new_tokens=config.max_new_tokens, rows=config.rows,
                       temperature=config.temperature, generator=generator)

    val = sampled(held_out)
    write_jsonl(out / "validation.jsonl", lines(val))
    check_live(val)
    groups = sampled(prompts)
    print("derivatives\n", flush=True)
    model.compute_dtype, model.checkpointing = None, config.checkpointing  # fp32 from here on
    passes = (config.temperature, config.micro_tokens)
    found = measure(model, val, groups, *passes, config.halves, config.contrast, scale)
    given = [reference_row(model, examples, *passes)] if examples else []
    summary = report(out, prompts, groups, found, own_rows(groups, found.tokens) + given, tokenizer, problems)
    if config.check and live_prompts(correctness(groups)):
        show(out, "steps", take_steps(model, val, groups, found, config, scale))
    run.finish(**summary)
    print(f"written: {out}", flush=True)
    try:
        plots.draw([(out.resolve().name, out)], out / "figures")
    except InputError as error:
        print(error)


def report(out: Path, prompts: list[Prompt], groups: list[list[Episode]], found: Measured, fluency: list[dict],
           tokenizer: Tokenizer, problems: list[Problem | None]) -> dict[str, float | None]:
    """Prints and writes what was found, and returns the summary."""
    correct, kappa = correctness(groups), means(found.tokens)
    columns = columns_of(found, correct, kappa)
    show(out, "rollout_accuracy", breakdown.histogram(correct))
    show(out, "influence", breakdown.by_accuracy(correct, columns))
    if None not in problems:
        kinds = [[token_kinds(tokenizer, episode, problem) for episode in group] for group, problem in zip(groups, problems)]
        show(out, "behaviors", breakdown.by_kind(found.tokens, kinds, group_advantages(correct)))
    show(out, "fluency", fluency)
    summary = summarise(found, correct, kappa, columns)
    print(tables.markdown([{"of the run": name, "": value} for name, value in summary.items()]), flush=True)
    print("", *doubts(summary, len(live_prompts(correct))), "", sep="\n", flush=True)
    write_prompts(out, prompts, correct, columns)
    write_jsonl(out / "rollouts.jsonl", [
        {**line, "kappa": answer[1].mean(), "token_kappa": [float(f"{value:.4g}") for value in answer[1].tolist()]}
        for line, answer in zip(lines(groups), (answer for row in found.tokens for answer in row))])
    return summary


def show(out: Path, name: str, table: tables.Table):
    tables.write(out / f"{name}.csv", table)
    print(f"{name}\n\n{tables.markdown(tables.narrowed(table, NOT_PRINTED))}\n", flush=True)


def write_prompts(out: Path, prompts: list[Prompt], correct: Tensor, columns: dict[str, Tensor]):
    """prompts.csv in the order of --data, and ranked.jsonl: its lines, the most influential first."""
    values = {"right": correct.sum(1).long(), "alpha": correct.mean(1), **columns}
    tables.write(out / "prompts.csv", [
        {"line": n + 1, **{name: prompt.record.get(name) for name in ("id", "num_ops")},
         **{name: None if value[n].isnan() else value[n].item() for name, value in values.items()}}
        for n, prompt in enumerate(prompts)])
    order = columns["influence"].argsort(descending=True, stable=True).tolist()
    write_jsonl(out / "ranked.jsonl", [{**prompts[n].record, "influence": columns["influence"][n]} for n in order])


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
