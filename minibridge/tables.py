"""Tables: a table is a list of dicts, one a row, that is printed and written as CSV; "+-" in a column's name is half the
width of a 95% interval (Student's t). Only stdlib."""
import csv
import io
import math
from pathlib import Path

from minibridge.config import InputError, write_whole

Table = list[dict]

T_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # of 1, 2, ... degrees of freedom
BINS = ("0", "0-0.2", "0.2-0.4", "0.4-0.6", "0.6-0.8", "0.8-1", "1")  # of alpha; the ends, where no step is taken, apart


def write(path: Path, table: Table):
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in table for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_whole(path, text.getvalue())


def read(path: Path) -> Table:
    """Rows of texts. Raises InputError for a file that is no such table."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            table = list(csv.DictReader(file))
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"{path}: not a table ({error})") from None
    for number, row in enumerate(table, start=1):
        if None in row or None in row.values():  # how the reader says that a row is longer or shorter
            raise InputError(f"{path}: row {number} has not as many cells as there are columns")
    return table


def number(row: dict, column: str, where: str) -> float:
    """What a cell of a table that was read holds, NaN where it is empty. Raises InputError("where: field ...")."""
    if column not in row:
        raise InputError(f"{where}: no field {column!r}")
    value = row[column]
    try:
        found = math.nan if value in ("", None) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.inf
    if math.isinf(found):
        raise InputError(f"{where}: field {column!r} must be a number, not {value!r}")
    return found


def markdown(table: Table) -> str:
    lines = ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(_cell, row.values())) + " |" for row in table])


def narrowed(table: Table, without: tuple[str, ...]) -> Table:
    """Without the columns whose names begin with one of these."""
    return [{name: value for name, value in row.items() if not name.startswith(without)} for row in table]


def _cell(value) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


def half_width(deviation: float, count: int) -> float:
    """Of the 95% interval of the mean of `count` numbers, at least two, with this sample standard deviation."""
    return t_quantile(count - 1) * deviation / math.sqrt(count)


def t_quantile(freedom: int) -> float:
    """97.5% quantile of Student's t: a table, then Fisher's expansion around the normal one, good to 3e-3."""
    z = 1.959964
    if freedom <= len(T_QUANTILES):
        return T_QUANTILES[freedom - 1]
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
