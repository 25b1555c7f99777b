"""Re-executes a worked answer, written by a person or sampled from a model, against its problem, step by step.

    verdict = verify(problem, text)
    verdict.correct, verdict.first_wrong_step, verdict.error        (False, 3, "wrong arithmetic")
    verdict.steps[3].reason                                         "2 * 3 is not 7"
    verdict.spans()                                                 (start, end, kind) of every step and of its parts

A step is a "- " line of the think block. Its sentences are known by the wordings of `traces`, whatever is added there,
and by "letter = formula = ... = value". Blanks, a missing last full stop, upper or lower case of the words, the order
of operands and of steps, and the choice of letters are free; numbers are not. Nothing is evaluated as code, the time
is linear in the length of the text, and no text makes `verify` raise.

A step is judged by what was written before it: after a wrong value, a step that goes on with this value is right. So
one slip is one wrong step, but a later step may suffer from an earlier one (a letter that never got its value).
"""
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minibridge import answer, traces
from minibridge.dag import Expr, Problem

# Kinds of text, in `Step.kind` and `Part.kind`.
STEP = "step"                      # gives a node its value
FAILED_ATTEMPT = "failed attempt"  # says that the node must wait for others
MENTION = "mention"                # a line that does neither: names a node, or cannot be read
CLOSING = "closing"                # what stands between the last step and the end of the think block
BOX = "box"
ANALYSIS = "analysis"              # part: the node's condition restated
SUBGOAL = "subgoal"                # part: a formula in numbers, partly reduced

# Kinds of error, in `Step.error`.
RETRIEVAL = "wrong retrieval"        # the formula or the stated constant is not the problem's
SUBSTITUTION = "wrong substitution"  # the formula, with numbers put in for letters, has a number its letter did not get
ARITHMETIC = "wrong arithmetic"      # a reduction or the final value is wrong, or there is none
UNKNOWN = "unknown operand"          # computes with a node that has no value yet
UNDEFINED = "undefined name"         # a letter nobody introduced, or a node the problem does not have
NAMING = "wrong letter"              # a letter that belongs to another node
LOCK = "wrong lock"                  # the nodes said to be unknown are not those that are
RESTATEMENT = "wrong restatement"    # the restated condition is not the problem's
UNREADABLE = "unreadable"            # no sentence or formula of the grammar
UNFINISHED = "unfinished"            # the answer closes before the question's node has a value
WRONG_CLOSING = "wrong closing"      # the closing sentence gives another number than the steps
WRONG_BOX = "wrong box"              # no box, or not the right answer in it

MAX_DIGITS = 100    # of a number, and
MAX_TOKENS = 100    # of a formula: what is longer cannot be right, and would be slow or deep
MAX_REGROUPED = 8   # operands of one sum whose regrouping is searched; above, values alone are compared
TOLERANCE = 1e-4    # relative and absolute, between numbers that are not both whole
LOOKALIKES = str.maketrans("×·⋅÷−’", "***/-'")  # one for one: spans stay

WORD = r"[^\W\d_]{1,20}\d{0,4}"  # a letter, or what may stand for one
NUMBER = r"[-+]?\d+(?:\.\d+)?"
FIELDS = {"node": r"(?P<node>.{1,200}?)", "letter": f"(?P<letter>{WORD})", "value": f"(?P<value>{NUMBER})",
          "expression": "(?P<expression>.+)", "nodes": "(?P<nodes>.+)", "verb": "(?:is|are)"}
BULLET = re.compile(r"[^\S\n]*[-*•][^\S\n]+(?=\S)")
SENTENCE = re.compile(r"[^\s.](?:[^.]++|\.(?!\s|$))*+")  # up to a full stop that is not a decimal point
CHAIN_HEAD = re.compile(rf"(?:(?:so|then|thus|hence|therefore),?\s+)?({WORD})\s*", re.IGNORECASE)
TOKEN = re.compile(rf"\s*(\d+(?:\.\d+)?|{WORD}|\S)")

Number = int | float


class _Wrong(Exception):
    """args: kind of error, reason."""


class Part(NamedTuple):
    kind: str
    start: int
    end: int


@dataclass(frozen=True)
class Step:
    """One line of the answer, text[start:end]; `node` is the key of the node it is about. `error`: None for a right
    step, else the first thing wrong in it; `reason` says it in words."""
    kind: str
    start: int
    end: int
    node: str | None = None
    error: str | None = None
    reason: str | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """steps: every line, and in the end always the closing and the box. boxed: the box holds the right answer.
    redundant: nodes solved that the question does not need. unneeded: steps on these, or on nodes solved before."""
    steps: tuple[Step, ...]
    boxed: bool
    redundant: int
    unneeded: int

    @property
    def first_wrong_step(self) -> int | None:
        return next((i for i, step in enumerate(self.steps) if step.error), None)

    @property
    def correct(self) -> bool:
        return self.first_wrong_step is None

    @property
    def error(self) -> str | None:
        """Kind of the first error."""
        return None if self.correct else self.steps[self.first_wrong_step].error

    @property
    def solved(self) -> int:
        """Steps that give a value, right or wrong."""
        return sum(step.kind == STEP for step in self.steps)

    @property
    def attempts(self) -> int:
        """Failed attempts: steps that say their node must wait, rightly or not."""
        return sum(step.kind == FAILED_ATTEMPT for step in self.steps)

    @property
    def analyses(self) -> int:
        return sum(part.kind == ANALYSIS for step in self.steps for part in step.parts)

    @property
    def subgoals(self) -> int:
        """Right reductions short of the value: 2 in "x = p * (q + r) + s = 2 * (3 + 4) + 5 = 2 * 7 + 5 = 14 + 5 = 19"."""
        return sum(part.kind == SUBGOAL for step in self.steps for part in step.parts)

    def spans(self) -> Iterator[Part]:
        """Steps and their parts, in the order of the text; a part lies within its step."""
        for step in self.steps:
            yield Part(step.kind, step.start, step.end)
            yield from step.parts


def verify(problem: Problem, text: str) -> Verdict:
    """`text` is an answer, or a completion that begins after the opening tag. What stands before the first "- " line is
    not looked at. Never raises."""
    text = text.translate(LOOKALIKES)
    thought = re.search(r"</think>|<answer>|\Z", text).start()
    lines = [match.span() for match in re.finditer(r"[^\n]+", text[:thought]) if not match[0].isspace()]
    bullets = [i for i, (start, _) in enumerate(lines) if BULLET.match(text, start)] or [len(lines), -1]
    ledger = _Ledger(problem)
    steps = [ledger.step(text, *span) for span in lines[bullets[0]:bullets[-1] + 1]]
    start = steps[-1].end if steps else thought
    steps.append(ledger.closing(text, start, thought))
    boxed = answer.correct(text, str(problem.answer))
    box = re.compile(r"\\boxed\{[^}]*\}?").search(text)
    steps.append(Step(BOX, *(box.span() if box else (len(text),) * 2), error=None if boxed else WRONG_BOX,
                      reason=None if boxed else f"the answer is {problem.answer}"))
    solved = [step.node for step in steps if step.kind == STEP and step.node]
    needed = set(problem.order)
    return Verdict(tuple(steps), boxed, len(set(solved) - needed), len(solved) - len(needed.intersection(solved)))


# --- sentences ---------------------------------------------------------------------------------------------------


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template.rstrip("."))
    return "".join(FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))


def _grammar() -> list[tuple[re.Pattern, str]]:
    """(what a whole sentence looks like, the method of `_Ledger` that judges it). The order matters: "it" in "Let it be
    x." is no letter, and "Now take A, call it x." is no node."""
    select, name = [*traces.SELECT, *traces.STATED], traces.NAME
    kinds = [(map(_pattern, name), "_name"), (map(_pattern, traces.REMIND), "_remind"),
             (map(_pattern, traces.RESTATE), "_restate"), (map(_pattern, traces.LOCKED), "_lock"),
             ((f"{_pattern(a)}[,;:]?(?: and)? {_pattern(b)}" for a in select for b in name), "_name"),
             (map(_pattern, [*traces.SELECT_AND_NAME, *select]), "_name")]
    return [(re.compile(pattern, re.IGNORECASE), method) for patterns, method in kinds for pattern in patterns]


GRAMMAR = _grammar()


class _Ledger:
    """What the answer has said so far: letters (of which node) and values (as written), judged line by line."""

    def __init__(self, problem: Problem):
        self.problem = problem
        self.letters: dict[str, str] = {}
        self.values: dict[str, Number] = {}
        self.keys = {traces.phrase(node).casefold(): key for key, node in problem.nodes.items()}
        longest_first = sorted(map(re.escape, self.keys), key=len, reverse=True)
        self.phrases = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)")

    def step(self, text: str, start: int, end: int) -> Step:
        """Reads the line text[start:end]; after an error the rest of it is still read for what it defines."""
        self.kind, self.node, self.parts, error = MENTION, None, [], None
        bullet = BULLET.match(text, start, end)
        if not bullet:
            return Step(MENTION, start, end, error=UNREADABLE, reason="not a step")
        for match in SENTENCE.finditer(text, bullet.end(), end):
            try:
                self._sentence(match[0].rstrip(), match.start())
            except _Wrong as wrong:
                error = error or wrong.args
        return Step(self.kind, start, end, self.node, *(error or (None, None)), tuple(self.parts))

    def closing(self, text: str, start: int, end: int) -> Step:
        """The last number after the steps, where there is one, must be the value found."""
        try:
            if self.problem.target not in self.values:
                raise _Wrong(UNFINISHED, f"{self.problem.target} has no value")
            found, words = self.values[self.problem.target], None
            for words in re.finditer(rf"(?<![\w.]){NUMBER}", text[start:end]):
                pass
            if words and not same(_number(words[0], WRONG_CLOSING), found):
                raise _Wrong(WRONG_CLOSING, f"{words[0]} is not {_short(found)}")
        except _Wrong as wrong:
            return Step(CLOSING, start, end, self.problem.target, *wrong.args)
        return Step(CLOSING, start, end, self.problem.target)

    def _sentence(self, words: str, at: int):
        if "=" in words:
            return self._chain(words, at)
        plain = " ".join(words.split()).rstrip(" .")
        for pattern, method in GRAMMAR:
            if match := pattern.fullmatch(plain):
                if method == "_restate":
                    self.parts.append(Part(ANALYSIS, at, at + len(words)))
                return getattr(self, method)(**match.groupdict())
        raise _Wrong(UNREADABLE, plain[:80])

    def _name(self, node: str | None = None, letter: str | None = None, value: str | None = None):
        if node is not None:
            self.node = self.keys.get(node.casefold())
        if self.node is None:
            raise _Wrong(UNDEFINED, f"no node {node!r}" if node else f"nothing to call {letter}")
        expr = self.problem.nodes[self.node].expr
        if value is not None and (not is_number(expr) or not same(_number(value, RETRIEVAL), expr)):
            raise _Wrong(RETRIEVAL, f"the problem does not give {self.node} as {value[:80]}")
        if letter is not None and self.letters.setdefault(letter, self.node) != self.node:
            raise _Wrong(NAMING, f"{letter} is {self.letters[letter]}")

    def _remind(self, letter: str):
        if letter not in self.letters:
            raise _Wrong(UNDEFINED, letter)
        if self.letters[letter] != self.node:
            raise _Wrong(NAMING, f"{letter} is {self.letters[letter]}")

    def _restate(self, expression: str):
        """Right when it has the words of the question, and its nodes, in any order where that is free."""
        node = self.problem.nodes.get(self.node)
        if node is None or not node.stated:
            raise _Wrong(RESTATEMENT, "the problem states no condition of it")
        (said, names), (words, parents) = map(self._named, (expression, traces.describe(node.expr, self.problem.nodes)))
        if _operators(node.expr) <= set("+*"):
            names, parents = sorted(names), sorted(parents)
        if (said, names) != (words, parents):
            raise _Wrong(RESTATEMENT, expression[:80])

    def _lock(self, nodes: str):
        if self.kind == MENTION:
            self.kind = FAILED_ATTEMPT
        said, names = self._named(nodes)
        if said or self.node is None:
            raise _Wrong(UNDEFINED, " ".join(said)[:80] or "the node that must wait")
        missing = self.problem.missing(self.node, self.values.keys())
        if sorted(names) != sorted(missing):
            raise _Wrong(LOCK, f"unknown: {', '.join(missing) or 'none'}")

    def _named(self, text: str) -> tuple[list[str], list[str]]:
        """The nodes named in a text, and the words around them, without commas and "and"."""
        text = text.casefold()
        names = [self.keys[match[0]] for match in self.phrases.finditer(text)]
        words = self.phrases.sub(" ", text).replace(",", " ").split()
        return [word for word in words if word != "and"], names

    def _chain(self, words: str, at: int):
        """Judges "x = p + q = 3 + 4 = 7" and keeps the last number, right or wrong, as the value of x."""
        self.kind = STEP
        head, *links = words.split("=")
        letter = CHAIN_HEAD.fullmatch(head)
        if not letter:
            raise _Wrong(UNREADABLE, head[:80])
        if letter[1] not in self.letters:
            raise _Wrong(UNDEFINED, letter[1])
        key = self.letters[letter[1]]
        selected, self.node = self.node, self.node or key
        try:
            if selected not in (None, key):
                raise _Wrong(NAMING, f"{letter[1]} is {key}")
            self._reduce(key, links, at + len(head) + 1)
        finally:
            last = links[-1].strip().replace("- ", "-")
            if re.fullmatch(NUMBER, last) and len(last) <= MAX_DIGITS:
                self.values[key] = _number(last)

    def _reduce(self, key: str, links: list[str], at: int):
        """links[0] must be the formula of the node, in letters (or at once in numbers), every later one the one before
        with some operations done; the last must be a number. `at`: where links[0] begins."""
        wanted = canonical(self.problem.nodes[key].expr)
        current = parse(links[0], self._key)
        in_letters = bool(_names(current))
        if in_letters and current != wanted or is_number(wanted) and not same(current, wanted):
            raise _Wrong(RETRIEVAL, f"{links[0].strip()[:80]} is not the formula of {key}")
        wanted = substitute(wanted, self.values)
        current = substitute(current, self.values)
        if not same(current, wanted):
            raise _Wrong(RETRIEVAL, f"{links[0].strip()[:80]} is not the formula of {key}")
        for i, link in enumerate(links[1:], 1):
            at += len(links[i - 1]) + 1
            reduced = substitute(parse(link, self._key), self.values)
            if not reduces(current, reduced):
                kind = SUBSTITUTION if _size(reduced) == _size(wanted) else ARITHMETIC
                raise _Wrong(kind, f"{links[i - 1].strip()[:80]} is not {link.strip()[:80]}")
            if _size(reduced) < _size(current) and not is_number(reduced):
                start = at + len(link) - len(link.lstrip())
                self.parts.append(Part(SUBGOAL, start, at + len(link.rstrip())))
            current = reduced
        if not is_number(current):
            raise _Wrong(ARITHMETIC, "no value in the end")

    def _key(self, letter: str) -> str:
        if letter not in self.letters:
            raise _Wrong(UNDEFINED, letter)
        return self.letters[letter]


# --- numbers and formulas ----------------------------------------------------------------------------------------
#
# A formula in canonical form is a number, the key of a node, or one of ("+", terms...), ("*", factors...) with sorted
# operands, at least two, none of the same operator; ("neg", term), ("inv", factor). Two formulas that differ in the
# order of operands only, or in needless parentheses, have the same form.


def _number(text: str, kind: str = ARITHMETIC) -> Number:
    """The only place where digits become a number. Raises _Wrong of `kind` when there are too many."""
    if len(text) > MAX_DIGITS:
        raise _Wrong(kind, f"a number of {len(text)} digits")
    return float(text) if "." in text else int(text)


def _short(number: Number) -> str:
    return str(number) if abs(number) < 10**MAX_DIGITS else "a huge number"


def is_number(form) -> bool:
    return isinstance(form, (int, float))


def same(a, b) -> bool:
    """Whether two canonical forms are equal: whole numbers exactly, others within TOLERANCE."""
    if is_number(a) and is_number(b):
        if a == b or isinstance(a, int) and isinstance(b, int):
            return a == b
        return max(abs(a), abs(b)) < 1e300 and math.isclose(a, b, rel_tol=TOLERANCE, abs_tol=TOLERANCE)
    if isinstance(a, tuple) and isinstance(b, tuple):
        return a[0] == b[0] and len(a) == len(b) and all(map(same, a[1:], b[1:]))
    return a == b


def gather(op: str, operands: list):
    """The canonical sum or product of canonical operands."""
    flat = []
    for operand in operands:
        flat += operand[1:] if isinstance(operand, tuple) and operand[0] == op else [operand]
    flat.sort(key=lambda form: (0, form, "") if is_number(form) else (1, 0, repr(form)))
    return flat[0] if len(flat) == 1 else (op, *flat)


def negative(form):
    if is_number(form):
        return -form
    if isinstance(form, tuple) and form[0] == "+":
        return gather("+", [negative(term) for term in form[1:]])
    return form[1] if isinstance(form, tuple) and form[0] == "neg" else ("neg", form)


def inverse(form):
    if isinstance(form, tuple) and form[0] == "*":
        return gather("*", [inverse(factor) for factor in form[1:]])
    return form[1] if isinstance(form, tuple) and form[0] == "inv" else ("inv", form)


def canonical(expr: Expr):
    if not isinstance(expr, tuple):
        return expr
    op, first, *rest = expr[0], *map(canonical, expr[1:])
    if op in "+-":
        return gather("+", [first, *(rest if op == "+" else map(negative, rest))])
    return gather("*", [first, *(rest if op == "*" else map(inverse, rest))])


def value(form) -> Number:
    """Value of a canonical form without letters. Raises _Wrong where there is none."""
    if is_number(form):
        return form
    op, *args = form[0], *map(value, form[1:])
    try:
        if op == "*":
            return math.prod(args)
        return sum(args) if op == "+" else -args[0] if op == "neg" else 1 / args[0]
    except (ZeroDivisionError, OverflowError) as error:
        raise _Wrong(ARITHMETIC, str(error)) from None


def substitute(form, values: dict[str, Number]):
    """A canonical form with numbers for its nodes. Raises _Wrong for a node without a value."""
    if isinstance(form, str):
        if form not in values:
            raise _Wrong(UNKNOWN, f"{form} has no value yet")
        return values[form]
    if not isinstance(form, tuple):
        return form
    args = [substitute(arg, values) for arg in form[1:]]
    return gather(form[0], args) if form[0] in "+*" else negative(args[0]) if form[0] == "neg" else (form[0], *args)


def reduces(form, reduced) -> bool:
    """Whether `reduced` is `form` with some operations done, none included, in any order. It takes more than the same
    value: 0 * (3 + 4) is not 0 * 8, and 64 + -45 is not 63 + -44. (A formula of another shape is compared in value.)"""
    if same(form, reduced):
        return True
    if not same(value(form), value(reduced)) or _size(reduced) >= _size(form):
        return False
    if is_number(reduced) or form[0] != reduced[0] or form[0] not in "+*":
        return True
    left, done = list(form[1:]), list(reduced[1:])
    for match in (same, reduces):
        for new in list(done):
            if old := [operand for operand in left if match(operand, new)]:
                left.remove(old[0])
                done.remove(new)
    return len(left) > MAX_REGROUPED or _regroups(form[0], left, done)


def _regroups(op: str, left: list, done: list) -> bool:
    """Whether every one of `done` is the value of some of `left`, each used once. What stays over has been absorbed:
    3 - 0 + 4 = 3 + 4, 0 * 3 * 4 = 0 * 4."""
    if not done:
        return True
    first, rest = value(done[0]), done[1:]
    for count in range(1, len(left) - len(rest) + 1):
        for chosen in itertools.combinations(range(len(left)), count):
            others = [operand for i, operand in enumerate(left) if i not in chosen]
            if same(value((op, *(left[i] for i in chosen))), first) and _regroups(op, others, rest):
                return True
    return False


def _names(form) -> list[str]:
    return [name for arg in form[1:] for name in _names(arg)] if isinstance(form, tuple) else \
        [form] if isinstance(form, str) else []


def _size(form) -> int:
    return sum(map(_size, form[1:])) if isinstance(form, tuple) else 1


def _operators(expr: Expr) -> set[str]:
    return {expr[0]}.union(*map(_operators, expr[1:])) if isinstance(expr, tuple) else set()


def parse(text: str, key: Callable[[str], str]):
    """Infix text -> canonical form: + - * / with the usual precedence, signs, parentheses; `key` turns a letter into
    a node. Raises _Wrong when the text is no formula, or too long for one."""
    tokens = []
    for match in TOKEN.finditer(text):
        tokens.append(match[1])
        if len(tokens) > MAX_TOKENS:
            raise _Wrong(UNREADABLE, "too long for a formula")
    tokens = [*tokens, ""][::-1]  # popped from the end; "" follows the last one

    def total():
        terms = [product()]
        while tokens[-1] in ("+", "-"):
            terms.append(product() if tokens.pop() == "+" else negative(product()))
        return gather("+", terms)

    def product():
        factors = [atom()]
        while tokens[-1] in ("*", "/"):
            factors.append(atom() if tokens.pop() == "*" else inverse(atom()))
        return gather("*", factors)

    def atom():
        token = tokens.pop()
        if token in ("-", "+"):
            return negative(atom()) if token == "-" else atom()
        if token == "(":
            inside = total()
            if tokens.pop() == ")":
                return inside
        elif token[:1].isdecimal():
            return _number(token)
        elif token[:1].isalpha():
            return key(token)
        raise _Wrong(UNREADABLE, f"no formula: {text.strip()[:80]}")

    form = total()
    if tokens != [""]:
        raise _Wrong(UNREADABLE, f"no formula: {text.strip()[:80]}")
    return form
