"""Accuracy of a model on a file of prompts, with its uncertainty; or of answers that were saved before.

    python -m minibridge.evaluate --model runs/rl_bridge/model --data data/test_id.jsonl --out runs/eval.jsonl
    python -m minibridge.evaluate --model ... --data ... --samples 16 --temperature 1       # pass@k as well
    python -m minibridge.evaluate --rescore runs/eval.jsonl                                # score saved answers again
    python -m minibridge.evaluate --explain runs/rl_bridge/rollouts/step_0001.jsonl        # why each is right or wrong

Where the lines carry their "problem", every answer is also re-executed step by step (`verify`): how often it shows the
behaviors, and where it goes wrong first.

Beside the answers in FILE.jsonl, FILE.run.json holds settings, versions, commit, and a hash of settings, data and weights.
--rescore and --explain read what this module or train_rl.py has written; --explain any lines {"text": ..., "answer": ...}.

Greedy by default. Intervals are 95% over problems. The row "answer not 0" leaves out the problems that a lazy constant
would get right, and "best constant" is what always giving the commonest right answer would earn.
"""
import math
import statistics
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from minibridge import answer
from minibridge.checkpoint import outline
from minibridge.config import InputError, check_fields, numbered, option, printable, run_main, write_jsonl, write_whole
from minibridge.dag import problem_in
from minibridge.data import load_prompts
from minibridge.opening import fingerprint, open_model, pick_device, prompt_limit
from minibridge.rollout import lines, rollout
from minibridge.run_folder import record, write_record
from minibridge.spans import COUNTED
from minibridge.tables import markdown
from minibridge.verify import WRONG_BOX, Verdict, verify


@dataclass(frozen=True)
class Config:
    model: str | None = option(None, "Hugging Face folder")
    data: str | None = option(None, "JSONL file of prompts")
    out: str | None = option(None, "JSONL file for the answers")
    rescore: str | None = option(None, "JSONL file of saved answers, instead of a model")
    explain: str | None = option(None, "JSONL file of saved answers: say of each why it is right or wrong")
    samples: int = option(1, "answers for each prompt", least=1)
    temperature: float = option(0.0, "0: greedy", least=0)
    max_prompt: int = option(1024, "longest prompt, in tokens", least=1)
    max_new_tokens: int = option(2560, "longest answer, in tokens", least=1)
    rows: int = option(256, "answers decoded at the same time", least=1)
    seed: int = option(0, "seed of sampling", least=0)
    dtype: Literal["auto", "fp32", "bf16"] = option("auto", "matrix products; auto: bf16 on a GPU, fp32 on a CPU")
    device: str = option("auto", "cpu, cuda, cuda:1, ...")


@dataclass(frozen=True)
class Scored:
    """One problem and which of the answers to it were right; verdicts on them where the problem is known."""
    answer: str
    num_ops: int | None
    correct: list[bool]
    verdicts: tuple[Verdict, ...] = ()


def wilson(mean: float, count: float) -> tuple[float, float]:
    """95% interval of a share of `count` independent questions of yes or no (Wilson 1927)."""
    z = 1.96
    centre = (mean + z * z / (2 * count)) / (1 + z * z / count)
    reach = z / (1 + z * z / count) * math.sqrt(mean * (1 - mean) / count + z * z / (4 * count * count))
    return max(0.0, centre - reach), min(1.0, centre + reach)


def interval(values: list[float], answers: int) -> tuple[float, float]:
    """95% interval of the mean of numbers between 0 and 1, each of another problem, which took so many answers in all.

    Wilson's, of as many questions of yes or no as would have a mean of the same variance: the modified Wilson interval of
    surveys (Franco et al. 2019). With one answer to a problem that is Wilson's own. With 16, counting problems makes
    it up to three times too wide, and counting answers too narrow."""
    mean, spread = statistics.fmean(values), statistics.pvariance(values)
    if mean in (0, 1):  # after rounding, so there may be a spread
        return wilson(mean, len(values))
    return wilson(mean, min(answers, len(values) * mean * (1 - mean) / spread) if spread else answers)


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Unbiased estimate of P(at least one of k answers is right) from `samples` answers of which `right` are:
    1 - C(n - c, k) / C(n, k) (arXiv 2107.03374, equation 1)."""
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)


def estimate(problems: list[Scored], k: int = 1) -> tuple[float, float, float]:
    """pass@k, its 95% interval from, and to; pass@1 is the accuracy."""
    values = [pass_at_k(len(p.correct), sum(p.correct), k) for p in problems]
    return statistics.fmean(values), *interval(values, sum(len(p.correct) for p in problems))


def accuracy(problems: list[Scored]) -> float:
    return sum(sum(p.correct) / len(p.correct) for p in problems) / len(problems)


def best_constant(problems: list[Scored]) -> tuple[str, float]:
    """The commonest right answer and its share of the problems."""
    text, count = Counter(p.answer for p in problems).most_common(1)[0]
    return text, count / len(problems)


def table(problems: list[Scored]) -> str:
    """Accuracy of all problems, of those whose answer is not 0, by op count, and pass@k where there are k answers."""
    samples = min(len(p.correct) for p in problems)
    ks = [2**i for i in range(samples.bit_length())]
    rows = [("all", problems), ("answer not 0", [p for p in problems if p.answer != "0"])]
    for ops in sorted({p.num_ops for p in problems if p.num_ops is not None}):
        rows.append((f"{ops} ops", [p for p in problems if p.num_ops == ops]))
    found = []
    for name, chosen in rows:
        if chosen:
            (share, low, high), *passes = (estimate(chosen, k) for k in ks)
            found.append({"problems": name, "count": len(chosen), "accuracy": f"{share:.1%}",
                          "95% interval": f"{low:.1%} to {high:.1%}",
                          **{f"pass@{k}": "{:.1%} ({:.1%} to {:.1%})".format(*values) for k, values in zip(ks[1:], passes)}})
    constant, share = best_constant(problems)
    return f"{markdown(found)}\n\nbest constant answer: {printable(constant)}, {share:.1%}"


def behaviors(verdicts: list[Verdict]) -> str:
    """What the answers do, right or wrong, and the kind of the first error of those with a wrong step."""
    def mean(values) -> float:
        return sum(values) / len(verdicts)

    boxed = [verdict for verdict in verdicts if verdict.boxed]
    found = {"with a failed attempt": f"{mean(verdict.attempts > 0 for verdict in verdicts):.1%}"}
    for name, field in (COUNTED | {"right failed attempts": "right_attempts", "steps with a value": "solved",
                                   "steps without need": "unneeded"}).items():
        if field != "correct":  # a share, below
            found[f"{name} per answer"] = f"{mean(getattr(verdict, field) for verdict in verdicts):.2f}"
    found["right in every step"] = f"{mean(verdict.correct for verdict in verdicts):.1%}"
    if boxed:
        wrong = sum(not verdict.correct for verdict in boxed) / len(boxed)
        found["right result with a wrong step"] = f"{wrong:.1%} of right results"
    errors = Counter(verdict.error for verdict in verdicts if verdict.error)
    listed = ", ".join(f"{error}: {count}" for error, count in errors.most_common())
    rows = [{"behavior": name, "all answers": value} for name, value in found.items()]
    return f"{markdown(rows)}\n\nfirst errors: {listed or 'none'}"


def rescore(path: str) -> list[Scored]:
    """Score saved answers (of this module, or a step of rollouts) by today's rule."""
    groups: dict[int, list[dict]] = {}
    verdicts: dict[int, list[Verdict]] = defaultdict(list)
    for where, line, verdict in _saved(path, {"group": (int,), "text": (str,), "num_ops": (int, None)}):
        if verdict is not None:
            verdicts[line["group"]].append(verdict)
        group = groups.setdefault(line["group"], [])
        group.append(line)
        if any(line.get(name) != group[0].get(name) for name in ("id", "answer")):
            raise InputError(f"{where}: another prompt than that of its group's first line")
    return [Scored(group[0]["answer"], group[0].get("num_ops"), [answer.correct(*_scoring(line)) for line in group],
                   tuple(verdicts[number])) for number, group in groups.items()]


def explain(path: str) -> list[str]:
    """A line on each of a file's saved answers, then how often each reason was given: in a terminal the end is seen."""
    text, boxes, formats = [], Counter(), Counter()
    for where, line, verdict in _saved(path, {"text": (str,)}):
        wrong = verdict is not None and verdict.error not in (None, WRONG_BOX)  # a box may be right give or take a tolerance
        right = "right with a wrong step" if wrong else "right"
        boxes[(answer.box_fault(*_scoring(line)) or right).partition(":")[0]] += 1
        formats[answer.format_fault(line["text"]) or "good"] += 1
        text.append(f"{where}: {answer.explain(*_scoring(line))}")
        if line.get("finish_reason") == "length":
            text[-1] += "; cut off at the longest length allowed"
        if wrong:
            step = verdict.steps[verdict.first_wrong_step]
            text[-1] += f"; {step.error} in step {verdict.first_wrong_step + 1}: {step.reason!a}"
    return text + [f"{name}: " + ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
                   for name, counts in (("answers", boxes), ("formats", formats))]


def _saved(path: str, fields: dict[str, tuple]) -> Iterator[tuple[str, dict, Verdict | None]]:
    """("path:line", line, verdict where the problem is known) of saved answers, checked to have the fields."""
    for where, line in numbered(path):
        answer.check_scoring(line, where)
        check_fields(line, fields, where)
        problem = problem_in(line, where)
        yield where, line, verify(problem, line["text"]) if problem else None


def _scoring(line: dict) -> tuple[str, str, float]:
    return line["text"], line["answer"], line.get("tolerance", 0.0)


def sample(config: Config) -> list[dict]:
    """The answers of a model, as JSONL lines."""
    if 0 < config.temperature < 1e-3:
        raise InputError(f"temperature: {config.temperature:g} is too small to sample at; 0 is greedy")
    if config.temperature == 0 and config.samples > 1:
        raise InputError("samples: greedy answers are all the same; set --temperature")
    device = pick_device(config.device)
    model, tokenizer = open_model(config.model, device, config.dtype)
    prompts = load_prompts(config.data, tokenizer, prompt_limit(model, config.max_prompt, config.max_new_tokens))
    for number, prompt in enumerate(prompts, 1):
        problem_in(prompt.record, f"{config.data}:{number}")  # what is wrong is said before the answers are sampled
    generator = torch.Generator().manual_seed(config.seed)
    episodes = rollout(model, tokenizer, prompts, config.samples, max_new_tokens=config.max_new_tokens,
                       temperature=config.temperature, rows=config.rows, generator=generator)
    return lines(episodes)


def main(config: Config):
    for name in ("rescore", "explain"):
        if (path := getattr(config, name)) is not None and config != Config(**{name: path}):
            raise InputError(f"{name}: no other option goes with it")
    if config.explain is not None:
        print("\n".join(explain(config.explain)))
        return
    if config.rescore is None:
        if config.model is None or config.data is None or config.out is None:
            raise InputError("give --model, --data and --out, or --rescore, or --explain")
        if Path(config.out).is_dir():
            raise InputError(f"out: {config.out} is a folder")
        beside = Path(config.out).with_suffix(".run.json")
        if found := [path for path in (config.out, beside) if Path(path).exists()]:
            raise InputError(f"out: {found[0]} is there already; remove it or choose another")
        write_whole(config.out, "")  # what is wrong with it is said before hours of sampling
        Path(config.out).unlink()
        outline(config.model)  # a wrong folder is named as everywhere
        made = record(config, pick_device(config.device), fingerprint=fingerprint(config))
        write_jsonl(config.out, sample(config))
        write_record(beside, made)
    problems = rescore(config.rescore or config.out)
    print(table(problems))
    if verdicts := [verdict for problem in problems for verdict in problem.verdicts]:
        print("\n" + behaviors(verdicts))


if __name__ == "__main__":
    sys.exit(run_main(main, Config))
