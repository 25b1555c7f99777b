"""Tables of the analysis: bins, means and their intervals, parts that add up, and their way through a file."""

import math

import pytest
import torch

from minibridge import breakdown, tables
from minibridge.coinfluence import per_step
from minibridge.config import InputError
from minibridge.grpo import group_advantages
from minibridge.spans import KINDS

F64 = torch.float64


def test_a_table_through_its_file(tmp_path):
    table = [{"alpha": "0-0.2", "x": 1 / 3, "y": None}, {"alpha": 'a "b", c', "x": 2, "z": "\n"}]
    tables.write(tmp_path / "t.csv", table)
    assert tables.read(tmp_path / "t.csv") == [
        {"alpha": "0-0.2", "x": repr(1 / 3), "y": "", "z": ""}, {"alpha": 'a "b", c', "x": "2", "y": "", "z": "\n"}]
    (tmp_path / "t.csv").write_bytes(b"\xff")
    for name in ("t.csv", "none.csv"):
        with pytest.raises(InputError, match=name):
            tables.read(tmp_path / name)


def test_markdown():
    table = [{"a": 1, "b": 0.12345, "K+ +-": 2.0}, {"a": "x", "b": None, "K+ +-": 1e-7}]
    assert tables.markdown(table) == "| a | b | K+ +- |\n|---|---|---|\n| 1 | 0.123 | 2 |\n| x |  | 1e-07 |"
    assert tables.narrowed(table, ("K+ ",)) == [{"a": 1, "b": 0.12345}, {"a": "x", "b": None}]


def test_histogram():
    table = breakdown.histogram(torch.tensor([[1, 0], [1, 1], [1, 0], [0, 1]], dtype=F64))
    assert table == [{"alpha": 0, "prompts": 0, "share": 0}, {"alpha": 0.5, "prompts": 3, "share": 0.75},
                     {"alpha": 1, "prompts": 1, "share": 0.25}]


def test_bins_of_every_number_of_right_answers():
    """Edges belong to the upper bin, but 0 and 1 to none but their own; also where 5 alpha is no whole number in floats."""
    for samples in (4, 5, 10, 32):
        correct = (torch.arange(samples) < torch.arange(samples + 1)[:, None]).double()
        table = breakdown.by_accuracy(correct, {"right": correct.sum(1)})
        expected = [[0]] + [[n for n in range(1, samples) if b * samples <= 5 * n < (b + 1) * samples] for b in range(5)]
        for row, inside in zip(table, [*expected, [samples], list(range(samples + 1))], strict=True):
            assert row["prompts"] == len(inside) and row["right"] == (sum(inside) / len(inside) if inside else None)
    assert [row["alpha"] for row in table] == ["0", *(f"{b / 5:g}-{(b + 1) / 5:g}" for b in range(5)), "1", "all"]


def test_means_leave_out_what_is_not_known_and_have_intervals():
    correct = torch.tensor([[1, 0], [1, 0], [0, 1], [1, 1]], dtype=F64)
    values = torch.tensor([1.0, 4.0, math.nan, math.nan], dtype=F64)
    table = breakdown.by_accuracy(correct, {"x": values})
    reach = 12.7062 * math.sqrt(4.5 / 2)
    for row in (table[3], table[-1]):
        assert row["x"] == 2.5 and row["x +-"] == pytest.approx(reach)
    assert table[6] == {"alpha": "1", "prompts": 1, "x": None, "x +-": None}
    one = breakdown.by_accuracy(correct[:1], {"x": values[:1]})[-1]
    assert one["x"] == 1 and one["x +-"] is None


def test_what_kinds_bring_adds_up_to_the_influence():
    generator = torch.Generator().manual_seed(0)
    correct = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 1, 1]], dtype=F64)
    tokens = [[torch.randn(3, 2 + n + g, dtype=F64, generator=generator) for g in range(3)] for n in range(3)]
    kinds = [[torch.randint(0, 4, (2 + n + g,), generator=generator) for g in range(3)] for n in range(3)]
    kappa = torch.tensor([[answer[1].mean() for answer in group] for group in tokens], dtype=F64)
    table = breakdown.by_kind(tokens, kinds, group_advantages(correct))
    value = per_step(kappa, correct).value
    assert sum(row["influence"] for row in table) == pytest.approx(value.mean().item())
    assert [row["text"] for row in table] == list(KINDS) and sum(row["share of tokens"] for row in table) == pytest.approx(1)
    assert sum(row["tokens"] for row in table) == sum(2 + n + g for n in (0, 2) for g in range(3))

    def brought_by(kind: int) -> torch.Tensor:
        advantages = group_advantages(correct)
        return torch.stack([sum(advantages[n, g] * (tokens[n][g][1] * (kinds[n][g] == kind)).mean() for g in range(3)) / 3
                            for n in range(3)])

    wrong = [slope for n in (0, 2) for g in range(3) if not correct[n, g] for slope, kind in
             zip(tokens[n][g][1].tolist(), kinds[n][g].tolist()) if kind == 1]
    right = [slope for n in (0, 2) for g in range(3) if correct[n, g] for slope, kind in
             zip(tokens[n][g][1].tolist(), kinds[n][g].tolist()) if kind == 1]
    assert table[1]["kappa, wrong"] == pytest.approx(sum(wrong) / len(wrong))
    assert table[1]["kappa, right"] == pytest.approx(sum(right) / len(right))
    dead = breakdown.by_kind(tokens[1:2], kinds[1:2], group_advantages(correct[1:2]))
    assert [(row["text"], row["tokens"], row["influence"], row["kappa, right"]) for row in dead] == [
        (kind, 0, 0, None) for kind in KINDS]
    assert table[1]["influence +-"] == pytest.approx(4.3027 * brought_by(1).std().item() / 3**0.5)


def test_students_quantiles():
    """Between them lies 95% of the density, which with t = sqrt(freedom) tan(angle) is a power of the cosine."""
    def inside(reach: float, freedom: int) -> float:
        angles = torch.linspace(0, math.atan(reach / math.sqrt(freedom)), 10_001, dtype=F64)
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
        return 2 * scale * torch.trapezoid(angles.cos() ** (freedom - 1), angles).item()

    for freedom in range(1, 200):
        error = 6e-5 if freedom < 10 else 3.5 / freedom**3  # of four decimals; of Fisher's next terms, at most 1.6e-3 of it
        quantile = tables.t_quantile(freedom)
        assert inside(quantile - error, freedom) < 0.95 < inside(quantile + error, freedom)
    assert tables.t_quantile(10**6) == pytest.approx(1.959964, abs=3e-6)


def test_fluency():
    row = breakdown.fluency("own", torch.tensor([0.5, 0.5, 0.125]).log(), torch.tensor([1.0, 2.0, 6.0]), 2)
    assert row == {"text": "own", "answers": 2, "tokens": 3, "entropy": 3, "perplexity": pytest.approx(2 ** (5 / 3))}


@pytest.mark.parametrize("a, b, expected", [
    ([1, 2, 3], [10, 20, 30], 1), ([1, 2, 3], [3, 2, -1], -1), ([1, 2, 3], [1, 3, 2], 0.5), ([1, 2], [5, 5], None),
    ([], [], None),
    ([1, 2, 2, 3], [1, 2, 3, 4], 0.9486832980505138)])  # ties: 9 / sqrt(90)
def test_rank_correlation(a, b, expected):
    found = breakdown.rank_correlation(torch.tensor(a, dtype=F64), torch.tensor(b, dtype=F64))
    assert found == (None if expected is None else pytest.approx(expected))
