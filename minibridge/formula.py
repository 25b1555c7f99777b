"""Formulas as they stand in worked answers: read from text, brought into one form, compared, reduced.

A formula in canonical form is one of
    int or Decimal            a number
    str                       the key of a node
    (op, arg, arg, ...)       op "+" or "*": at least two canonical operands, sorted, none of the same operator
    (op, arg)                 op "neg", "inv" (one over), "sqrt" or "square"
so that formulas that differ only in the order of operands or in needless parentheses have the same form.

What cannot be read or computed raises Wrong(kind, reason). Nothing is evaluated as code, and no text is slow to read.
"""
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from minibridge.dag import Expr

ARITHMETIC = "wrong arithmetic"
UNKNOWN = "unknown operand"
UNREADABLE = "unreadable"

MAX_DIGITS = 100   # of a number, and
MAX_TOKENS = 100   # of a formula: what is longer cannot be right, and would be slow or deep
MAX_REGROUPED = 8  # operands of one sum whose regrouping is searched; above, values alone are compared
TOLERANCE = Decimal("1e-4")  # relative, between numbers that are not both whole; or, absolute,
ROUNDING = Decimal("5e-5")   # half a unit of the fourth decimal, the last that answers show

WORD = r"[^\W\d_]{1,20}\d{0,4}"  # a letter, or what may stand for one
NUMBER = r"[-+]?\d+(?:\.\d+)?"
TOKEN = rf"\d+(?:\.\d+)?|{WORD}|\S"

Number = int | Decimal
Form = Number | str | tuple


class Wrong(Exception):
    """args: kind of error, reason."""


# --- numbers -----------------------------------------------------------------------------------------------------


def read_number(text: str, kind: str = ARITHMETIC) -> Number:
    """The only place where digits become a number. Raises Wrong of `kind` when there are too many."""
    if len(text) > MAX_DIGITS:
        raise Wrong(kind, f"a number of {len(text)} digits")
    return Decimal(text) if "." in text else int(text)


def only_number(text: str) -> Number | None:
    """The number a text consists of; None for any other text, and for too many digits."""
    text = text.strip().replace("- ", "-")
    return read_number(text) if len(text) <= MAX_DIGITS and re.fullmatch(NUMBER, text) else None


def is_number(form: Form) -> bool:
    return isinstance(form, (int, Decimal))


def same(a: Form, b: Form) -> bool:
    """Whether two canonical forms are equal: whole numbers exactly, others within TOLERANCE."""
    if is_number(a) and is_number(b):
        if a == b or isinstance(a, int) and isinstance(b, int):
            return a == b
        return abs(a - b) <= max(ROUNDING, TOLERANCE * max(abs(a), abs(b)))
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] == b[0] and len(a) == len(b) and all(map(same, a[1:], b[1:]))
    return a == b


def value(form: Form) -> Number:
    """Value of a canonical form without letters. Raises Wrong where there is none."""
    if is_number(form):
        return form
    op, *args = form[0], *map(value, form[1:])
    try:
        if op in "+*":
            return sum(args) if op == "+" else math.prod(args)
        return {"neg": lambda a: -a, "inv": lambda a: Decimal(1) / a, "square": lambda a: a * a,
                "sqrt": lambda a: Decimal(a).sqrt()}[op](args[0])
    except ArithmeticError as error:
        raise Wrong(ARITHMETIC, f"no value: {type(error).__name__}") from None


# --- canonical forms ---------------------------------------------------------------------------------------------


def gather(op: str, operands: list[Form]) -> Form:
    """The canonical sum or product of canonical operands."""
    flat = []
    for operand in operands:
        flat += operand[1:] if isinstance(operand, tuple) and operand[0] == op else [operand]
    flat.sort(key=lambda form: (0, form, "") if is_number(form) else (1, 0, repr(form)))
    return flat[0] if len(flat) == 1 else (op, *flat)


def negative(form: Form) -> Form:
    if isinstance(form, tuple) and form[0] == "+":
        return gather("+", [negative(term) for term in form[1:]])
    if isinstance(form, tuple) and form[0] == "neg":
        return form[1]
    return -form if is_number(form) else ("neg", form)


def inverse(form: Form) -> Form:
    if isinstance(form, tuple) and form[0] == "*":
        return gather("*", [inverse(factor) for factor in form[1:]])
    return form[1] if isinstance(form, tuple) and form[0] == "inv" else ("inv", form)


def canonical(expr: Expr) -> Form:
    """Of an expression of a problem: "-" is the first minus all others, "/" the first over all others."""
    if not isinstance(expr, tuple):
        return expr
    op, first, *rest = expr[0], *map(canonical, expr[1:])
    if op in "+-":
        return gather("+", [first, *(rest if op == "+" else map(negative, rest))])
    if op in "*/":
        return gather("*", [first, *(rest if op == "*" else map(inverse, rest))])
    return op, first


def commutes(expr: Expr) -> bool:
    """Whether an expression stays the same whatever the order of its operands."""
    return not isinstance(expr, tuple) or expr[0] in "+*" and all(map(commutes, expr[1:]))


def substitute(form: Form, values: Mapping[str, Number]) -> Form:
    """A canonical form with numbers for its nodes. Raises Wrong for a node without a value."""
    if isinstance(form, str):
        if form not in values:
            raise Wrong(UNKNOWN, f"{form} has no value yet")
        return values[form]
    if is_number(form):
        return form
    args = [substitute(arg, values) for arg in form[1:]]
    return gather(form[0], args) if form[0] in "+*" else negative(args[0]) if form[0] == "neg" else (form[0], *args)


def operands(form: Form) -> list[str]:
    """Its nodes, repeats included."""
    return [name for arg in form[1:] for name in operands(arg)] if isinstance(form, tuple) else \
        [form] if isinstance(form, str) else []


def size(form: Form) -> int:
    """Operations still to be done, and one more: numbers and names count, and so do roots and squares."""
    return sum(map(size, form[1:])) + (form[0] in ("sqrt", "square")) if isinstance(form, tuple) else 1


# --- reductions --------------------------------------------------------------------------------------------------


def reduces(form: Form, reduced: Form) -> bool:
    """Whether `reduced` is `form` with some operations done, none included, in any order. It takes more than the same
    value: 0 * (3 + 4) is not 0 * 8, and 64 + -45 is not 63 + -44. (2 * (3 + 4) = 6 + 8 is compared in value.)"""
    if same(form, reduced):
        return True
    if size(reduced) >= size(form):
        return False
    if is_number(reduced):
        return same(value(form), reduced)
    op, first = form[:2]
    if op not in "+*":
        return reduced[0] == op and reduces(first, reduced[1])
    done = list(reduced[1:]) if reduced[0] == op else [reduced]
    absorbing = op == "*" and value(form) == value(reduced) == 0
    for untouched in (operator.eq, lambda operand, new: operand == new and not is_number(new)):
        left, rest = list(form[1:]), list(done)  # 2 * 3 * 6 = 6 * 6: the second time, no number counts as untouched
        for match in (untouched, lambda operand, new: isinstance(operand, tuple) and reduces(operand, new)):
            for new in list(rest):
                if old := [operand for operand in left if match(operand, new)]:
                    left.remove(old[0])
                    rest.remove(new)
        if len(left) > MAX_REGROUPED or rest and op == "*" and reduced[0] == "+":
            return same(value(form), value(reduced))
        if _regroups(op, left, rest, absorbing):
            return True
    return False


def _regroups(op: str, left: list[Form], done: list[Form], absorbing: bool) -> bool:
    """Whether each of `done` is the value of some of `left`, none used twice. What stays over must not count:
    3 + 0 + 4 = 3 + 4; or, `absorbing`, 0 * 3 * 4 = 0 * 4."""
    if not done:
        return not left or absorbing or same(value((op, *left)), int(op == "*"))
    first, *rest = done
    turn = inverse if isinstance(first, tuple) and first[0] == "inv" else lambda form: form  # 8 / (2 * 2) = 8 / 4
    if not is_number(turn(first)):
        return False
    for count in range(1, len(left) - len(rest) + 1):
        for chosen in itertools.combinations(range(len(left)), count):
            others = [operand for i, operand in enumerate(left) if i not in chosen]
            combined = value((op, *(turn(left[i]) for i in chosen)))
            if same(combined, turn(first)) and _regroups(op, others, rest, absorbing):
                return True
    return False


# --- text --------------------------------------------------------------------------------------------------------


def tokens_of(names: str = "(?!)") -> re.Pattern:
    """What `parse` cuts a text into; `names` is a pattern for operands of several words, by default none."""
    return re.compile(rf"\s*((?<!\w)(?:{names})(?!\w)|{TOKEN})", re.IGNORECASE)


LETTERS_ONLY = tokens_of()


def parse(text: str, key: Callable[[str], str], pattern: re.Pattern = LETTERS_ONLY) -> Form:
    """Infix text -> canonical form: + - * / with the usual precedence, signs, parentheses, sqrt(x) and square(x); `key`
    turns a letter or name into a node. Raises Wrong when the text is no formula, or too long for one."""
    tokens = [match[1] for match in itertools.islice(pattern.finditer(text), MAX_TOKENS + 1)]
    if len(tokens) > MAX_TOKENS:
        raise Wrong(UNREADABLE, "too long for a formula")
    tokens = [*tokens, ""][::-1]  # popped from the end; "" follows the last one

    def total() -> Form:
        terms = [product()]
        while tokens[-1] in ("+", "-"):
            terms.append(product() if tokens.pop() == "+" else negative(product()))
        return gather("+", terms)

    def product() -> Form:
        factors = [atom()]
        while tokens[-1] in ("*", "/"):
            factors.append(atom() if tokens.pop() == "*" else inverse(atom()))
        return gather("*", factors)

    def atom() -> Form:
        token = tokens.pop()
        if token in ("-", "+"):
            return negative(atom()) if token == "-" else atom()
        if token in ("sqrt", "square") and tokens[-1] == "(":
            return token, atom()
        if token == "(":
            inside = total()
            if tokens.pop() == ")":
                return inside
        elif re.fullmatch(NUMBER, token):
            return read_number(token)
        elif token[:1].isalpha() or len(token) > 1:
            return key(token)
        raise Wrong(UNREADABLE, f"no formula: {text.strip()[:80]}")

    form = total()
    if tokens != [""]:
        raise Wrong(UNREADABLE, f"no formula: {text.strip()[:80]}")
    return form
