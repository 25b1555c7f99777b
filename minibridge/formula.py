"""Formulas as they stand in worked answers: read from text, brought into one form, compared, reduced.

A formula in canonical form is one of
    int or Decimal            a number
    str                       the key of a node
    (op, arg, arg, ...)       op "+" or "*": at least two canonical operands, sorted, none of the same operator; in a
                              product no sign: it stands before the whole
    (op, arg)                 op "neg", "inv" (one over), "sqrt" or "square"
so that formulas that differ only in the order of operands, in needless parentheses or in the place of a minus have the
same form. What is copied must be copied exactly (but for signs in a product that is zero); what is computed may be
rounded to the fourth decimal or to a later one.

What cannot be read or computed raises Wrong(kind, reason). Nothing is evaluated as code, and no text is slow to read.
"""
import functools
import itertools
import math
import operator
import re
from collections.abc import Callable, Mapping
from decimal import Decimal

from minibridge.dag import Expr, Number

ARITHMETIC = "wrong arithmetic"
UNKNOWN = "unknown operand"
UNREADABLE = "unreadable"

MAX_DIGITS = 100   # of a number, written or on the way to a value, and
MAX_TOKENS = 300   # of a formula: what is longer cannot be right, and would be slow or deep
MAX_PARENTHESES = 50  # of a formula: each is some calls deep
MAX_REGROUPED = 6  # operands whose regrouping into several others is searched
ROUNDING = Decimal("5.0001e-5")  # half a unit of the fourth decimal, the last that answers show, and what 1 / x leaves off
LOOKALIKES = str.maketrans("×·⋅÷−’", "***/-'")  # one for one: places in a text stay

WORD = r"[^\W\d_]{1,20}\d{0,4}"  # a letter, or what may stand for one
NUMBER = r"[-+]?\d+(?:\.\d+)?"
TOKEN = rf"\d+(?:\.\d+)?|{WORD}|\S"

Form = Number | str | tuple


class Wrong(Exception):
    """args: kind of error, reason."""


def plain(name: str) -> str:
    """What is the same in all spellings of a name."""
    return name.translate(LOOKALIKES).lower()


# --- numbers -----------------------------------------------------------------------------------------------------


def read_number(text: str, kind: str = ARITHMETIC) -> Number:
    """The only place where digits become a number, an int if it is whole. Raises Wrong of `kind` when there are too many."""
    if len(text) > MAX_DIGITS:
        raise Wrong(kind, f"a number of {len(text)} digits")
    number = Decimal(text) if "." in text else int(text)
    return int(number) if number == int(number) else number


def only_number(text: str) -> Number | None:
    """The number a text consists of; None for any other text, and for too many digits."""
    text = text.strip().replace("- ", "-")
    return read_number(text) if len(text) <= MAX_DIGITS and re.fullmatch(NUMBER, text) else None


def is_number(form: Form) -> bool:
    return isinstance(form, (int, Decimal))


def computed(exact: Number, written: Number) -> bool:
    """Whether a written result is right: equal, or, where it is not whole, rounded to the fourth decimal or a later one."""
    decimals = -written.as_tuple().exponent if isinstance(written, Decimal) else 0
    return exact == written or exact != int(exact) and abs(exact - written) <= ROUNDING.scaleb(min(0, 4 - decimals))


def value(form: Form) -> Number:
    """Value of a canonical form without letters. Raises Wrong where there is none, or one of too many digits."""
    if is_number(form):
        return form
    op, *args = form[0], *map(value, form[1:])
    try:
        if op in "+*":
            result = sum(args) if op == "+" else math.prod(args)
        else:
            result = {"neg": operator.neg, "inv": lambda a: Decimal(1) / a, "square": lambda a: a * a,
                      "sqrt": lambda a: Decimal(a).sqrt()}[op](args[0])
    except ArithmeticError as error:
        raise Wrong(ARITHMETIC, f"no value: {type(error).__name__}") from None
    if abs(result) >= 10**MAX_DIGITS:
        raise Wrong(ARITHMETIC, f"a value of more than {MAX_DIGITS} digits")
    return result


# --- canonical forms ---------------------------------------------------------------------------------------------


def gather(op: str, operands: list[Form]) -> Form:
    """The canonical sum or product of canonical operands."""
    flat, negated = [], False
    for operand in operands:
        if op == "*" and (is_number(operand) and operand < 0 or isinstance(operand, tuple) and operand[0] == "neg"):
            operand, negated = negative(operand), not negated
        flat += operand[1:] if isinstance(operand, tuple) and operand[0] == op else [operand]
    flat.sort(key=lambda form: (0, form, "") if is_number(form) else (1, 0, repr(form)))
    form = flat[0] if len(flat) == 1 else (op, *flat)
    return negative(form) if negated else form


def negative(form: Form) -> Form:
    if isinstance(form, tuple) and form[0] == "+":
        return gather("+", [negative(term) for term in form[1:]])
    if isinstance(form, tuple) and form[0] == "neg":
        return form[1]
    return -form if is_number(form) else ("neg", form)


def inverse(form: Form) -> Form:
    if is_number(form):
        return negative(("inv", -form)) if form < 0 else ("inv", form)
    if isinstance(form, tuple) and form[0] in ("*", "neg"):
        return gather("*", [inverse(factor) for factor in form[1:]]) if form[0] == "*" else negative(inverse(form[1]))
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
    """Whether an expression stays the same whatever the order of its nodes, which are the operands of one sum or product."""
    if not isinstance(expr, tuple):
        return True
    named = [arg for arg in expr[1:] if not is_number(arg)]
    return expr[0] in "+*" and (all(isinstance(arg, str) for arg in named) or len(named) == 1 and commutes(named[0]))


def unordered(words: list[str], node: str) -> list[str]:
    """The words of a formula in words, operands that stand side by side (numbers, and `node` for any node) in one order."""
    runs = itertools.groupby(words, key=lambda word: word == node or bool(re.fullmatch(NUMBER, word)))
    return [word for are_operands, run in runs for word in (sorted(run) if are_operands else run)]


def substitute(form: Form, values: Mapping[str, Number]) -> Form:
    """A canonical form with numbers for its nodes. Raises Wrong for a node without a value."""
    if isinstance(form, str):
        if form not in values:
            raise Wrong(UNKNOWN, f"{form} has no value yet")
        return values[form]
    if is_number(form):
        return form
    args = [substitute(arg, values) for arg in form[1:]]
    if form[0] in "+*":
        return gather(form[0], args)
    return negative(args[0]) if form[0] == "neg" else inverse(args[0]) if form[0] == "inv" else (form[0], *args)


def operands(form: Form) -> list[str]:
    """Its nodes, repeats included."""
    return [name for arg in form[1:] for name in operands(arg)] if isinstance(form, tuple) else \
        [form] if isinstance(form, str) else []


def size(form: Form) -> int:
    """Operations still to be done, and one more: numbers and names count, and so do roots and squares."""
    return sum(map(size, form[1:])) + (form[0] in ("sqrt", "square")) if isinstance(form, tuple) else 1


# --- reductions --------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)  # nested groups are asked about again and again
def reduces(form: Form, reduced: Form) -> bool:
    """Whether `reduced` is `form` with some operations done, none included, in any order, or with a product taken into
    a sum, where that is all there is. It takes more than the same value: 0 * (3 + 4) is not 0 * 8, and 64 + -45 is not
    63 + -44."""
    if form == reduced:
        return True
    if is_number(reduced):
        return computed(value(form), reduced)
    if is_number(form) or isinstance(reduced, str):
        return False
    turn = negative if form[0] == "neg" else lambda form: form
    if form[0] in ("*", "neg"):  # in products the sign is compared here, and below only what it stands before
        if value(form) * value(reduced) < 0:
            return False
        form, reduced = (side[1] if side[0] == "neg" else side for side in (form, reduced))
    op, first = form[:2]
    if op in "+*":
        parts = list(reduced[1:]) if reduced[0] == op else [reduced]
        if size(reduced) < size(form) and (_matches(op, form, parts, keep_numbers=True)
                                           or _matches(op, form, parts, keep_numbers=False)):
            return True
        spread = _distributed(form) if op == "*" and reduced[0] == "+" else None
        return spread is not None and reduces(turn(spread), reduced)
    return reduced[0] == op and reduces(first, reduced[1])


def _matches(op: str, form: tuple, parts: list[Form], keep_numbers: bool) -> bool:
    """Whether the operands of a sum or product make up `parts`, after taking out those that are still there, and the
    groups that are reduced. 2 * 3 * 6 = 6 * 6 needs a second look, where no number counts as still there."""
    left, rest = list(form[1:]), []
    for part in parts:  # still there
        if part in left and (keep_numbers or not _is_plain(part)):
            left.remove(part)
        else:
            rest.append(part)
    for part in sorted(rest, key=_is_plain):  # reduced inside; numbers last, which other groups may make up as well
        signs = (part, negative(part)) if op == "*" else (part,)
        groups = [operand for operand in left if not _is_plain(operand)]
        group = next((operand for operand in groups if any(reduces(operand, signed) for signed in signs)), None)
        if group is not None:
            left.remove(group)
            rest.remove(part)
    absorbing = op == "*" and 0 in parts and 0 in map(value, form[1:])  # 0 * 3 * 4 = 0 * 4
    return _regroups(op, left, rest, absorbing)


def _is_plain(operand: Form) -> bool:
    """Whether there is nothing to compute in it: a number, or one that is divided by."""
    return is_number(operand[1] if isinstance(operand, tuple) and operand[0] == "inv" else operand)


def _regroups(op: str, left: list[Form], parts: list[Form], absorbing: bool) -> bool:
    """Whether each of `parts` is the value of some of `left`, none used twice. What stays over must not count:
    3 + 0 + 4 = 3 + 4; or, `absorbing`, 0 * 3 * 4 = 0 * 4."""
    if not parts:
        return not left or absorbing or computed(abs(value((op, *left))), int(op == "*"))
    first, *rest = parts
    divided = op == "*" and isinstance(first, tuple) and first[0] == "inv"
    turn = inverse if divided else lambda form: form  # 8 / 2 / 2 = 8 / 4
    if not is_number(turn(first)) or rest and len(left) > MAX_REGROUPED:
        return False
    counts = range(1, len(left) - len(rest) + 1) if rest or len(left) <= MAX_REGROUPED else [len(left)]
    for chosen in itertools.chain.from_iterable(itertools.combinations(range(len(left)), count) for count in counts):
        others = [operand for i, operand in enumerate(left) if i not in chosen]
        combined = value((op, *(turn(left[i]) for i in chosen)))
        if computed(abs(combined) if op == "*" else combined, turn(first)) and _regroups(op, others, rest, absorbing):
            return True
    return False


def _distributed(form: tuple) -> Form | None:
    """A product with one sum among its factors, as a sum of products: 2 * (3 + 4) as 2 * 3 + 2 * 4."""
    sums = [factor for factor in form[1:] if isinstance(factor, tuple) and factor[0] == "+"]
    if len(sums) != 1:
        return None
    others = list(form[1:])
    others.remove(sums[0])
    return gather("+", [gather("*", [*others, term]) for term in sums[0][1:]])


# --- text --------------------------------------------------------------------------------------------------------


def tokens_of(names: str = "(?!)") -> re.Pattern:
    """What `parse` cuts a text into; `names` is a pattern for operands of several words, by default none."""
    return re.compile(rf"\s*((?<!\w)(?:{names})(?!\w)|{TOKEN})", re.IGNORECASE)


LETTERS_ONLY = tokens_of()


def parse(text: str, key: Callable[[str], str], pattern: re.Pattern = LETTERS_ONLY) -> Form:
    """Infix text -> canonical form: + - * / with the usual precedence, signs, parentheses, sqrt(x) and square(x); `key`
    turns a letter or name into a node. Raises Wrong when the text is no formula, or too long for one."""
    tokens = [match[1] for match in itertools.islice(pattern.finditer(text.strip()), MAX_TOKENS + 1)]
    if len(tokens) > MAX_TOKENS or tokens.count("(") > MAX_PARENTHESES:
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
