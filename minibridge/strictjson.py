"""One JSON object from bytes, strictly (RFC 8259): Python's own reader takes more than other readers do. Only stdlib.

    NaN, Infinity        are no JSON
    {"a": 1, "a": 2}     readers differ in which of the two counts
    "\\ud83d"             half of a surrogate pair is no text, and no file can hold it
    [[[[...]]]]          beyond MOST_NESTED, what walks through it meets Python's limit of recursion
"""
import json
import math
import re
from typing import Any

MOST_NESTED = 100
SURROGATE = re.compile("[\ud800-\udfff]")  # always half of a pair: a whole one is a single character to Python


def loads(data: bytes) -> dict:
    """The object that UTF-8 bytes hold. Raises ValueError, whose text says in one line what is wrong."""
    if not data.strip():
        raise ValueError("blank line" if data else "empty file")
    try:
        text = data.decode("utf-8").rstrip("\r\n")  # or an error at the end of a line would be said to be on the next
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise ValueError(f"not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8: {error.reason} at byte {error.start + 1}") from None
    except (ValueError, RecursionError) as error:  # _unique, a number of thousands of digits, ...
        raise ValueError(f"not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {type(value).__name__}")
    if _deeper(value, MOST_NESTED):
        raise ValueError(f"not readable JSON: nested more than {MOST_NESTED} deep")
    if "\\u" in text and SURROGATE.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair, which is no text")
    return value


def _finite(number: str) -> float:
    if math.isinf(value := float(number)):
        raise ValueError(f"{number[:20]} is beyond what a float can hold")
    return value


def _no_number(name: str):
    raise ValueError(f"{name} is no JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _deeper(value: dict, levels: int) -> bool:
    """Whether objects and lists stand in one another more than so many levels deep."""
    level: list[Any] = [value]
    for _ in range(levels):
        level = [item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer)
                 if isinstance(item, (dict, list))]
    return bool(level)
