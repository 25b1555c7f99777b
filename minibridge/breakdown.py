"""What accuracies and influences look like by prompt and by kind of text: the tables of `influence`.

All take tensors of one model's rollouts. Axes: N prompts, G answers to each, T tokens of an answer. Intervals are of means
over prompts; Q's own sampling error, common to all of them, is not in them.
"""
import math

import torch
from torch import Tensor

from minibridge.spans import KINDS
from minibridge.tables import BINS, Table, half_width


def histogram(correct: Tensor) -> Table:
    """How many prompts got 0, 1, ... G right answers; correct (N, G)."""
    counts = torch.bincount(correct.sum(1).long(), minlength=correct.shape[1] + 1).tolist()
    return [{"alpha": n / correct.shape[1], "prompts": count, "share": count / len(correct)}
            for n, count in enumerate(counts)]


def by_accuracy(correct: Tensor, columns: dict[str, Tensor]) -> Table:
    """Means of columns, (N,) each, over the prompts of each bin of alpha, and over all. A NaN is left out of its mean."""
    right, samples = correct.sum(1).long(), correct.shape[1]
    inner = len(BINS) - 2
    bins = torch.where(right == 0, 0, torch.where(right == samples, inner + 1, 1 + inner * right // samples))
    table = []
    for name, chosen in [*((name, bins == b) for b, name in enumerate(BINS)), ("all", bins >= 0)]:
        row = {"alpha": name, "prompts": int(chosen.sum())}
        for column, values in columns.items():
            row[column], row[f"{column} +-"] = _mean(values[chosen & values.isfinite()])
        table.append(row)
    return table


def by_kind(tokens: list[list[Tensor]], kinds: list[list[Tensor]], advantages: Tensor) -> Table:
    """What the tokens of each kind of text bring to I(q): rows that add up to its mean over the prompts.
    tokens: as `jvp.directional` has them, kinds: as `spans.token_kinds`, advantages (N, G). The other columns are of the
    prompts that have an influence: "kappa" is the mean over tokens of d log pi along g_Q, in right and in wrong answers."""
    brought = torch.zeros(len(tokens), len(KINDS), dtype=torch.float64)
    slopes = {(kind, right): [torch.empty(0, dtype=torch.float64)] for kind in range(len(KINDS)) for right in (True, False)}
    for n, g in advantages.nonzero().tolist():
        values, weight = tokens[n][g][1].double(), advantages[n, g]
        brought[n].index_add_(0, kinds[n][g], values * weight / (len(values) * advantages.shape[1]))
        for kind in range(len(KINDS)):
            slopes[kind, bool(weight > 0)].append(values[kinds[n][g] == kind])
    found = {key: torch.cat(values) for key, values in slopes.items()}
    total, table = max(1, sum(map(len, found.values()))), []
    for kind, name in enumerate(KINDS):
        right, wrong = found[kind, True], found[kind, False]
        influence, reach = _mean(brought[:, kind])
        table.append({"text": name, "tokens": len(right) + len(wrong), "share of tokens": (len(right) + len(wrong)) / total,
                      "kappa, right": _mean(right)[0], "kappa, wrong": _mean(wrong)[0],
                      "influence": influence, "influence +-": reach})
    return table


def fluency(name: str, logps: Tensor, entropies: Tensor, answers: int) -> dict:
    """A row for the tokens of some answers, logps and entropies (tokens,): nats a token, and exp of the mean surprise."""
    return {"text": name, "answers": answers, "tokens": len(logps), "entropy": entropies.double().mean().item(),
            "perplexity": (-logps.double().mean()).exp().item()}


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's, of two (n,); ties share their rank. None where one of them is constant, or there are too few."""
    ranks = [(x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2 for x in (a, b)]
    ranks = [rank - rank.mean() for rank in ranks]
    scale = math.sqrt(ranks[0].square().sum() * ranks[1].square().sum())
    return (ranks[0] @ ranks[1]).item() / scale if scale else None


def _mean(values: Tensor) -> tuple[float | None, float | None]:
    """Mean and "+-" of values (n,); None where there are too few."""
    count = len(values)
    reach = half_width(values.std().item(), count) if count > 1 else None
    return values.mean().item() if count else None, reach
