"""Re-executes a worked answer, written by a person or sampled from a model, against its problem, step by step.

    verdict = verify(problem, text)
    verdict.correct, verdict.first_wrong_step, verdict.error        (False, 3, "wrong arithmetic")
    verdict.steps[3].reason                                         "2 * 3 is not 7"
    verdict.spans()                                                 (start, end, kind) of every step and of its parts

A step is a "- " line of the think block. Its sentences are known by the wordings of `traces`, whatever is added there,
and by "name = formula = ... = value", where names are the letters it has given, or the problem's own. Blanks, a missing
last full stop, upper or lower case of the words, the order of operands and of steps, and the choice of letters are free;
numbers are not. Nothing is evaluated as code, the time is linear in the length of the text, and no text makes `verify`
raise.

A step is judged by what was written before it: after a wrong value, a step that goes on with this value is right. So
one slip is one wrong step, but a later step may suffer from an earlier one (a letter that never got its value).
"""
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from minibridge import answer, formula, traces
from minibridge.dag import Problem, evaluate
from minibridge.formula import (ARITHMETIC, LOOKALIKES, NUMBER, UNREADABLE, WORD, Number, Wrong, is_number, plain,
                                read_number)

# Kinds of text, in `Step.kind` and `Part.kind`.
STEP = "step"                      # gives a node its value
FAILED_ATTEMPT = "failed attempt"  # says that the node must wait for others
MENTION = "mention"                # a line that does neither: names a node, or cannot be read
CLOSING = "closing"                # what stands between the last step and the end of the think block
BOX = "box"
RESTATEMENT = "restatement"        # part: the node's condition restated
SUBGOAL = "subgoal"                # part: a formula in numbers, partly reduced

# Kinds of error, in `Step.error`; and, from `formula`:
#   ARITHMETIC "wrong arithmetic"   a reduction or the final value is wrong, or there is no value
#   UNKNOWN "unknown operand"       computes with a node that has no value yet
#   UNREADABLE "unreadable"         no sentence or formula of the grammar
RETRIEVAL = "wrong retrieval"        # the formula or the stated constant is not the problem's
SUBSTITUTION = "wrong substitution"  # the formula, with numbers put in for letters, has a number its letter did not get
UNDEFINED = "undefined name"         # a letter nobody introduced, or a node the problem does not have
NAMING = "wrong letter"              # a letter, or name before "=", that belongs to another node
LOCK = "wrong lock"                  # the nodes said to be unknown are not those that are
WRONG_RESTATEMENT = "wrong restatement"  # the restated condition is not the problem's
UNFINISHED = "unfinished"            # the answer closes before the question's node has a value
WRONG_CLOSING = "wrong closing"      # the closing sentence gives another number than the steps
WRONG_BOX = "wrong box"              # no box, or not the right answer in it

FIELDS = {"node": r"(?P<node>.{1,200}?)", "letter": f"(?P<letter>{WORD})", "value": f"(?P<value>{NUMBER})",
          "expression": "(?P<expression>.+)", "text": "(?P<text>.+)", "nodes": "(?P<nodes>.+)", "verb": "(?:is|are)"}
BULLET = re.compile(r"[^\S\n]*[-*•][^\S\n]+(?=\S)")
SENTENCE = r"[^\s.](?:[^.]++|\.(?!\s|$))*+"  # up to a full stop that is not a decimal point
NODE = "="  # where a sentence names a node: it stands in no sentence of the grammar
CHAIN_HEAD = r"(?:(?:so|then|thus|hence|therefore),?\s+)?"


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
    unneeded: steps on nodes that the question does not need, or that were solved before."""
    steps: tuple[Step, ...]
    boxed: bool
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
    def right_attempts(self) -> int:
        """Failed attempts that name a locked quantity and what it waits for, right in every word."""
        return sum(step.kind == FAILED_ATTEMPT and step.error is None for step in self.steps)

    @property
    def restatements(self) -> int:
        return sum(part.kind == RESTATEMENT for step in self.steps for part in step.parts)

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
    boxed = answer.correct(text, str(problem.answer), problem.tolerance)
    text = text.translate(LOOKALIKES)
    thought = re.search(r"</think>|<answer>|\Z", text).start()
    lines = [match.span() for match in re.finditer(r"[^\n]+", text[:thought]) if not match[0].isspace()]
    bullets = [i for i, (start, _) in enumerate(lines) if BULLET.match(text, start)] or [len(lines), -1]
    ledger = _Ledger(problem)
    steps = [ledger.step(text, *span) for span in lines[bullets[0]:bullets[-1] + 1]]
    start = steps[-1].end if steps else thought
    steps.append(ledger.closing(text, start, thought))
    box = re.search(r"\\boxed\{[^}]*\}?", text)
    steps.append(Step(BOX, *(box.span() if box else (len(text),) * 2), error=None if boxed else WRONG_BOX,
                      reason=None if boxed else f"the answer is {problem.answer}"))
    solved = [step.node for step in steps if step.kind == STEP and step.node]
    return Verdict(tuple(steps), boxed, unneeded=len(solved) - len({*solved} & {*problem.order}))


# --- sentences ---------------------------------------------------------------------------------------------------


def _pattern(template: str) -> str:
    parts = re.split(r"\{(\w+)\}", template.rstrip("."))
    return "".join(FIELDS[part] if i % 2 else re.escape(part) for i, part in enumerate(parts))


def _loose(text: str) -> str:
    """A pattern for a text, whatever its blanks."""
    return r"\s+".join(map(re.escape, text.split()))


def _grammar() -> list[tuple[re.Pattern, str]]:
    """(what a whole sentence looks like, the method of `_Ledger` that judges it). The order matters: "it" in "Let it be
    x." is no letter, and "Now take A, call it x." is no node."""
    select, name = [*traces.SELECT, *traces.STATED], traces.NAME
    kinds = [(map(_pattern, name), "_name"), (map(_pattern, traces.REMIND), "_remind"),
             (map(_pattern, traces.RESTATE), "_restate"), (map(_pattern, traces.QUOTE), "_quote"),
             (map(_pattern, traces.LOCKED), "_lock"),
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
        self.keys = {plain(name): key for key, node in problem.nodes.items() for name in (key, traces.phrase(node))}
        names = "|".join(map(_loose, sorted(self.keys, key=len, reverse=True)))
        self.phrases = re.compile(rf"(?<!\w)(?:{names})(?!\w)")
        self.tokens = formula.tokens_of(names)
        self.chain_head = re.compile(rf"{CHAIN_HEAD}({names}|{WORD})\s*", re.IGNORECASE)
        self.texts = {key: node.text.translate(LOOKALIKES) for key, node in problem.nodes.items() if node.text}
        texts = sorted(self.texts.values(), key=len, reverse=True)  # one may begin like another
        quotes = "|".join(_loose(quote.format(text=text)) for quote in traces.QUOTE for text in texts)
        self.sentences = re.compile(f"(?P<quote>{quotes or '(?!)'})|{SENTENCE}", re.IGNORECASE)  # a quote may have several

    def step(self, text: str, start: int, end: int) -> Step:
        """Reads the line text[start:end]; after an error the rest of it is still read for what it defines."""
        self.kind, self.node, self.parts, error = MENTION, None, [], None
        bullet = BULLET.match(text, start, end)
        if not bullet:
            return Step(MENTION, start, end, error=UNREADABLE, reason="not a step")
        for match in self.sentences.finditer(text, bullet.end(), end):
            try:
                self._sentence(match[0].rstrip(), match.start(), quoted=bool(match["quote"]))
            except Wrong as wrong:
                error = error or wrong.args
        return Step(self.kind, start, end, self.node, *(error or (None, None)), tuple(self.parts))

    def closing(self, text: str, start: int, end: int) -> Step:
        """The last number after the steps, where there is one, must be the value found."""
        try:
            if self.problem.target not in self.values:
                raise Wrong(UNFINISHED, f"{self.problem.target} has no value")
            found, words = self.values[self.problem.target], None
            for words in re.finditer(rf"(?<![\w.]){NUMBER}", text[start:end].partition("\\boxed")[0]):
                pass
            if words and read_number(words[0], WRONG_CLOSING) != found:
                raise Wrong(WRONG_CLOSING, f"{words[0]} is not {found}")
        except Wrong as wrong:
            return Step(CLOSING, start, end, self.problem.target, *wrong.args)
        return Step(CLOSING, start, end, self.problem.target)

    def _sentence(self, words: str, at: int, quoted: bool):
        if "=" in words and not quoted:
            return self._chain(words, at)
        sentence = " ".join(words.split()).rstrip(" .")
        for pattern, method in GRAMMAR:
            if match := pattern.fullmatch(sentence):
                if method in ("_restate", "_quote"):
                    self.parts.append(Part(RESTATEMENT, at, at + len(words)))
                return getattr(self, method)(**match.groupdict())
        raise Wrong(UNREADABLE, sentence[:80])

    def _name(self, node: str | None = None, letter: str | None = None, value: str | None = None):
        if node is not None:
            self.node = self.keys.get(plain(node))
        if self.node is None:
            raise Wrong(UNDEFINED, f"no node {node!r}" if node else f"nothing to call {letter}")
        if letter is not None and self.letters.setdefault(letter, self.node) != self.node:
            raise Wrong(NAMING, f"{letter} is {self.letters[letter]}")
        if value is not None:
            self._state(read_number(value, RETRIEVAL))

    def _state(self, number: Number):
        expr = self.problem.nodes[self.node].expr
        if not is_number(expr):
            raise Wrong(RETRIEVAL, f"the problem does not state a value of {self.node}")
        self.kind, self.values[self.node] = STEP, number
        if number != expr:
            raise Wrong(RETRIEVAL, f"{self.node} is {expr}, not {number}")

    def _remind(self, letter: str):
        if letter not in self.letters:
            raise Wrong(UNDEFINED, letter)
        if self.letters[letter] != self.node:
            raise Wrong(NAMING, f"{letter} is {self.letters[letter]}")

    def _restate(self, expression: str):
        """Right when it has the words of the question, and its nodes, in any order where that is free."""
        node = self.problem.nodes.get(self.node)
        if node is None or not node.stated:
            raise Wrong(WRONG_RESTATEMENT, "the problem states no condition of it")
        stated = traces.describe(node.expr, self.problem.nodes)
        if plain(expression) == plain(stated):
            return  # also where names hold an "and" or a comma, and cannot be told apart
        (said, names), (words, parents) = map(self._named, (expression, stated))
        if formula.commutes(node.expr):
            names, parents = sorted(names), sorted(parents)
            said, words = formula.unordered(said, NODE), formula.unordered(words, NODE)
        if (said, names) != (words, parents):
            raise Wrong(WRONG_RESTATEMENT, expression[:80])

    def _quote(self, text: str):
        """Right when it is the question's own sentence about the node."""
        if plain(text) != " ".join(plain(self.texts.get(self.node, "")).split()).rstrip(" ."):
            raise Wrong(WRONG_RESTATEMENT, text[:80])

    def _lock(self, nodes: str):
        if self.kind == MENTION:
            self.kind = FAILED_ATTEMPT
        missing = self.problem.missing(self.node, self.values.keys()) if self.node else []
        if missing and plain(nodes) == plain(traces.listing([traces.phrase(self.problem.nodes[key]) for key in missing])):
            return
        said, names = self._named(nodes)
        said = [word for word in said if word != NODE]
        if said or not names or self.node is None:
            raise Wrong(UNDEFINED, " ".join(said)[:80] or "the node that must wait")
        if sorted(names) != sorted(missing):
            raise Wrong(LOCK, f"unknown: {', '.join(missing) or 'none'}")

    def _named(self, text: str) -> tuple[list[str], list[str]]:
        """The nodes named in a text, and its words, without commas and "and", NODE standing for each node."""
        text = plain(text)
        names = [self.keys[match[0]] for match in self.phrases.finditer(text)]
        words = self.phrases.sub(f" {NODE} ", text).replace(",", " ").split()
        return [word for word in words if word != "and"], names

    def _chain(self, words: str, at: int):
        """Judges "x = p + q = 3 + 4 = 7" and keeps the last number, right or wrong, as the value of x."""
        self.kind = STEP
        head, *links = words.split("=")
        name = self.chain_head.fullmatch(head)
        if not name:
            raise Wrong(UNDEFINED if re.fullmatch(r"\w[\w' ]*", head) else UNREADABLE, head[:80])
        key = self._key(name[1])
        selected, self.node = self.node, self.node or key
        try:
            if selected not in (None, key):
                raise Wrong(NAMING, f"{name[1]} is {key}")
            self._reduce(key, links, at + len(head) + 1)
        finally:
            if (number := formula.only_number(links[-1].strip(" .()"))) is not None:
                self.values[key] = number

    def _reduce(self, key: str, links: list[str], at: int):
        """links[0] must be the formula of the node, in letters (or at once in numbers), every later one the one before
        with some operations done; the last must be a number. `at`: where links[0] begins."""
        wanted = formula.canonical(self.problem.nodes[key].expr)
        current = formula.parse(links[0], self._key, self.tokens)
        if formula.operands(current) and current != wanted:
            raise Wrong(RETRIEVAL, f"{links[0].strip()[:80]} is not the formula of {key}")
        wanted = formula.substitute(wanted, self.values)
        current = formula.substitute(current, self.values)
        if current != wanted:
            raise Wrong(RETRIEVAL, f"{links[0].strip()[:80]} is not the formula of {key}")
        for i, link in enumerate(links[1:], 1):
            at += len(links[i - 1]) + 1
            reduced = formula.substitute(formula.parse(link, self._key, self.tokens), self.values)
            if not formula.reduces(current, reduced) and not (is_number(reduced) and reduced == self._evaluated(key)):
                kind = SUBSTITUTION if formula.size(reduced) == formula.size(wanted) else ARITHMETIC
                raise Wrong(kind, f"{links[i - 1].strip()[:80]} is not {link.strip()[:80]}")
            if formula.size(reduced) < formula.size(current) and not is_number(reduced):
                start = at + len(link) - len(link.lstrip())
                self.parts.append(Part(SUBGOAL, start, at + len(link.rstrip())))
            current = reduced
        if not is_number(current) or formula.only_number(links[-1].strip(" .()")) is None:
            raise Wrong(ARITHMETIC, "no value in the end")

    def _evaluated(self, key: str) -> Number | None:
        """The node's value, from the written ones, by the problem's own order and rounding of operations."""
        try:
            return evaluate(self.problem.nodes[key].expr, self.values)
        except ArithmeticError:
            return None

    def _key(self, name: str) -> str:
        """The node of a letter, or of a name that stands in a formula itself."""
        key = self.letters.get(name) or self.keys.get(" ".join(plain(name).split()))
        if key is None:
            raise Wrong(UNDEFINED, name[:80])
        return key
