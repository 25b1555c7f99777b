"""Problem -> question text and worked answer, with the injected behaviors as independent choices.

    question(problem, rng)            the conditions, in random order unless told otherwise, then what is asked
    answer(problem, rng, behaviors)   a solution in the layout of `answer.py`, one "- " line per step
    equations(problem)                a solution in bare equations, for the toy's base model

The behaviors of the paper (arXiv 2505.18917, section 4), written once over `Problem`:
    reflection  exploration: with probability p try a node out of turn; if a parent is still unknown, notice, go back
    analysis    exploitation: restate what the question says about the node before computing it
    subgoal     exploitation: reduce a formula one operation at a time
in the variant of the authors' code or, `strict`, as we read the paper's Algorithm 1.
The answer is made in two hops: `plan` decides which node is tried when, `answer` puts each attempt into words. Nodes get
letters to compute with; where every name is one word, as in arithmetic, names stand in the formulas themselves.
Three random streams are split off the one given (wording, reflection, analysis), so that two arms of one seed
use the same letters (if any) for the same nodes.
"""
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from minibridge.answer import OPENING
from minibridge.config import InputError
from minibridge.dag import NUMBERS, UNARY, Expr, Node, Number, Problem, leaves, operate, pick

# Probability of restating a condition, by the node's in-degree 1, 2, 3, 4, 5+ (constants count), for each level.
ANALYSIS_LEVELS = ((0, 0, 0, 0, 0), (0, .1, .4, .8, 1), (.1, .4, .8, 1, 1), (.4, .8, 1, 1, 1), (1, 1, 1, 1, 1))
REDUNDANT_SHARE = 0.3  # of the picks out of turn, when the problem has redundant nodes

CONDITION = "The {kind} of {node} equals {expression}."
NOUNS = {"+": "sum", "-": "difference", "*": "product", "/": "quotient", "sqrt": "square root", "square": "square"}
OPENINGS = ("I will find one quantity at a time.", "Let me go step by step.", "I work it out one step at a time.")
STATED = ("{node} is {value}.", "The text gives {node} as {value}.")
SELECT = ("Next is {node}.", "Now take {node}.")
NAME = ("Call it {letter}.", "Write {letter} for it.", "Let it be {letter}.")
SELECT_AND_NAME = ("Let {letter} be {node}.", "Let {letter} stand for {node}.", "Write {letter} for {node}.")
REMIND = ("It is {letter} already.", "It has the letter {letter}.")
RESTATE = ("It equals {expression}.", "The text says it equals {expression}.")
QUOTE = ("The text says: {text}", "Recall: {text}")  # where the question has a sentence of its own for the node
LOCKED = ("But {nodes} {verb} not known yet, so it must wait.", "Since {nodes} {verb} still unknown, go back.",
          "It needs {nodes}, which {verb} not known yet.")
CLOSINGS = ("So the result is {value}.", "That gives {value}.")


@dataclass(frozen=True)
class Behaviors:
    """subgoal: reduce formulas stepwise. analysis: level 0..4 of ANALYSIS_LEVELS. reflection: probability p.

    By default they act as in the authors' code: a pick out of turn may turn out solvable and is then solved; analysis
    is drawn at failed attempts too, with a probability that grows with the in-degree; with `subgoal`, every formula is
    reduced stepwise. (Two things are not as there: a negative number in parentheses is no operation, and gets no step;
    and an answer ends once the target is solved.) strict=True is our reading of the paper's Algorithm 1, with p =
    `reflection` for everything:
        exploration   a pick out of turn is made among the locked nodes alone (redundant: 3 in 10), so it always fails
        exploitation  at each unlocked node one draw of probability p decides whether its condition is restated (if
                      analysis > 0, whatever the level) and its formula reduced stepwise (if subgoal); else it is plain
    so strict answers with p = 0 are vanilla ones.
    """
    subgoal: bool = False
    analysis: int = 0
    reflection: float = 0.0
    strict: bool = False

    def __post_init__(self):
        if self.analysis not in range(len(ANALYSIS_LEVELS)):
            raise InputError(f"analysis: level {self.analysis} is not one of 0..4")
        if not 0 <= self.reflection <= 1:
            raise InputError(f"reflection: {self.reflection} is not a probability")

    def __str__(self) -> str:
        return " ".join(f"{name}={value:g}" for name, value in vars(self).items() if value or name != "strict")


VANILLA = Behaviors()
BRIDGE = Behaviors(subgoal=True, analysis=2, reflection=0.1)


class Attempt(NamedTuple):
    """One try at a node; `missing` names the parents that were unsolved, so empty means solved."""
    key: str
    missing: tuple[str, ...]


# --- the question --------------------------------------------------------------------------------------------


Lines = Literal["random", "topological", "reversed", "given"]


def question(problem: Problem, rng: random.Random, lines: Lines = "random") -> str:
    """The stated conditions, one line each, and the question on the last line. `lines`: uniformly shuffled; in a random
    solving order of all nodes, or that backwards; or in the order of the problem's own nodes."""
    keys = list(problem.nodes)
    if lines in ("topological", "reversed"):
        keys = problem.topological_order(rng, keys)[::1 if lines == "topological" else -1]
    conditions = [condition(problem.nodes[key], problem.nodes) for key in keys if problem.nodes[key].stated]
    if lines == "random":
        rng.shuffle(conditions)
    return "\n".join([*conditions, closing_question(problem)])


def condition(node: Node, nodes: dict[str, Node]) -> str:
    """The sentence of the question that states a node."""
    kind = "number" if node.item else "value"
    return node.text or CONDITION.format(kind=kind, node=phrase(node), expression=describe(node.expr, nodes))


def closing_question(problem: Problem) -> str:
    owner, item = problem.nodes[problem.target].owner, problem.nodes[problem.target].item
    return problem.ask or (f"How many {item} does each {owner} have?" if item else f"What is the value of {owner}?")


def phrase(node: Node) -> str:
    return f"each {node.owner}'s {node.item}" if node.item else node.owner


def describe(expr: Expr, nodes: dict[str, Node]) -> str:
    """An expression in the benchmark's words: "3 more than the difference of each A's B and each C's D"."""
    if isinstance(expr, NUMBERS):
        return str(expr)
    if isinstance(expr, str):
        return phrase(nodes[expr])
    op, first, *rest = expr
    if isinstance(first, int) and op in "+*" and len(rest) == 1:
        return f"{first} {'more than' if op == '+' else 'times'} {describe(rest[0], nodes)}"
    return f"the {NOUNS[op]} of {listing([describe(arg, nodes) for arg in expr[1:]])}"


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# --- the plan: which node is tried when ----------------------------------------------------------------------


def plan(problem: Problem, rng: random.Random, reflection: float = 0.0, strict: bool = False) -> list[Attempt]:
    """Attempts in order. With reflection 0, every necessary node once, in the problem's order.

    Before each step but the first and the last, and never right after a failed attempt, with probability
    `reflection` a node is picked out of turn: a later necessary one, or (3 in 10) a redundant one. A pick whose
    parents are all known is simply solved, one that is already solved is passed over in silence, and after either the
    same step draws again. `strict` picks among locked nodes only; there is always one, since the target stays locked
    until the last step.
    """
    order, attempts, solved = problem.order, [], set()

    def attempt(key: str) -> bool:
        missing = tuple(problem.missing(key, solved))
        attempts.append(Attempt(key, missing))
        if not missing:
            solved.add(key)
        return not missing

    def candidates(keys: Sequence[str]) -> Sequence[str]:
        if strict:
            return [key for key in keys if problem.missing(key, solved)]
        if problem.task.startswith("arithmetic"):  # full of leaves, which are never locked
            return [key for key in keys if problem.nodes[key].parents]
        return keys

    i, went_well = 0, False
    while problem.target not in solved:  # every necessary node leads to it
        chosen = None
        if 0 < i < len(order) - 1 and went_well and rng.random() < reflection:
            redundant = candidates(problem.redundant)
            pool = redundant if redundant and rng.random() < REDUNDANT_SHARE else candidates(order[i + 1:])
            chosen = pick(rng, pool) if pool else None
        if chosen is None:
            if order[i] not in solved:
                went_well = attempt(order[i])
            i += 1
        elif chosen not in solved:
            went_well = attempt(chosen)
    return attempts


# --- the answer ----------------------------------------------------------------------------------------------


def answer(problem: Problem, rng: random.Random, behaviors: Behaviors = VANILLA, letters: str = string.ascii_letters) -> str:
    """A worked answer; every node gets one of `letters`. Without letters (""), and where all names are single words,
    formulas call the nodes by their keys. Raises InputError when there are more nodes than letters."""
    wording, reflecting, analysing = (random.Random(rng.getrandbits(64)) for _ in range(3))
    letters = "" if problem.symbolic else letters
    names = _names(problem, wording, letters)
    named: set[str] = set()
    steps = []
    for key, missing in plan(problem, reflecting, behaviors.reflection, behaviors.strict):
        node = problem.nodes[key]
        restate, stepwise = exploited(node, missing, analysing, behaviors)
        parts = [_introduce(problem, key, letters and names[key], wording, again=key in named)]
        named.add(key)
        if restate:
            templates = QUOTE if node.text else RESTATE
            parts.append(pick(wording, templates).format(expression=describe(node.expr, problem.nodes), text=node.text))
        if missing:
            unknown = listing([phrase(problem.nodes[parent]) for parent in missing])
            parts.append(pick(wording, LOCKED).format(nodes=unknown, verb="is" if len(missing) == 1 else "are"))
        else:
            parts.append(compute(node.expr, names[key], names, problem.values, stepwise))
        steps.append("- " + " ".join(parts))
    return OPENING + "\n".join([pick(wording, OPENINGS), *steps, pick(wording, CLOSINGS).format(value=problem.answer),
                                _result(problem)])


def equations(problem: Problem) -> str:
    """A solution in bare equations without letters, one way of writing it: what the toy's base model learns from.
    "- Fir's Cafe = 6 * Elm's Shop = 6 * 8 = 48." """
    steps = ["- " + compute(problem.nodes[key].expr, key, None, problem.values, subgoal=False) for key in problem.order]
    return OPENING + "\n".join([*steps, _result(problem)])


def _result(problem: Problem) -> str:
    return f"</think>\n<answer>\nThe answer is \\boxed{{{problem.answer}}}.\n</answer>"


def _names(problem: Problem, wording: random.Random, letters: str) -> dict[str, str]:
    """What formulas call each node: a letter of its own, none that is the key of another; without letters its key."""
    if not letters:
        return {key: key for key in problem.nodes}
    nodes = [*problem.order, *problem.redundant]
    free = [letter for letter in letters if letter not in problem.nodes]
    if len(nodes) > len(free):
        raise InputError(f"problem {problem.id}: {len(nodes)} nodes, but only {len(free)} letters")
    return dict(zip(nodes, wording.sample(free, len(nodes))))


def _introduce(problem: Problem, key: str, letter: str, wording: random.Random, again: bool) -> str:
    """The words before a formula: which node, and the letter it gets or already has, if it has one."""
    node = problem.nodes[key]
    stated = STATED[1:] if node.text else STATED  # a name of the user's may be a plural: "the pupils is 27"
    if not letter:
        templates = (pick(wording, stated if isinstance(node.expr, NUMBERS) else SELECT),)
    elif isinstance(node.expr, NUMBERS):
        templates = (pick(wording, stated), pick(wording, NAME))
    elif again:
        templates = (pick(wording, SELECT), pick(wording, REMIND))
    elif wording.random() < 0.5:
        templates = (pick(wording, SELECT), pick(wording, NAME))
    else:
        templates = (pick(wording, SELECT_AND_NAME),)
    text = " ".join(templates).format(node=phrase(node), letter=letter, value=problem.values[key])
    return text if problem.symbolic else text[0].upper() + text[1:]


def exploited(node: Node, missing: Sequence[str], rng: random.Random, behaviors: Behaviors) -> tuple[bool, bool]:
    """Whether this attempt restates the node's condition, and whether its formula is reduced stepwise."""
    restatable = node.stated and bool(node.parents)  # others say nothing that the formula does not
    if behaviors.strict:
        injected = not missing and rng.random() < behaviors.reflection
        return injected and behaviors.analysis > 0 and restatable, injected and behaviors.subgoal
    chances = ANALYSIS_LEVELS[behaviors.analysis]
    return restatable and rng.random() < chances[min(node.degree, 5) - 1], behaviors.subgoal


def compute(expr: Expr, name: str, names: dict[str, str] | None, values: dict[str, Number], subgoal: bool) -> str:
    """"x = p * (q + r) = 3 * (4 + 5) = 3 * 9 = 27."; without subgoals the reductions in between are left out."""
    chain = [name, infix(expr, names)] if any(isinstance(leaf, str) for leaf in leaves(expr)) else [name]
    numbers = [substitute(expr, values)]
    while isinstance(numbers[-1], tuple):
        numbers.append(reduce_once(numbers[-1]))
    if not subgoal:
        numbers = [numbers[0], *numbers[1:][-1:]]
    return " = ".join([*chain, *map(infix, numbers)]) + "."


def substitute(expr: Expr, values: dict[str, Number]) -> Expr:
    if isinstance(expr, tuple):
        return (expr[0], *(substitute(arg, values) for arg in expr[1:]))
    return values[expr] if isinstance(expr, str) else expr


def reduce_once(expr: tuple) -> Expr:
    """One operation less: the first nested group first, then from left to right.
    3 * (4 + 5 + 6) -> 3 * (9 + 6);   2 * 3 + 4 * 5 -> 6 + 4 * 5;   9 - (3 + 2) -> 9 - 5."""
    op, *args = expr
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            return (op, *args[:i], reduce_once(arg), *args[i + 1:])
    if op in UNARY:
        return operate(op, *args)
    first = operate(op, args[0], args[1])
    return (op, first, *args[2:]) if len(args) > 2 else first


def infix(expr: Expr, names: dict[str, str] | None = None) -> str:
    """Infix text, nodes by their `names` or, without any, by their keys; negative numbers stand bare ("4 - -3"), nested
    groups in parentheses, but for a product or quotient in a sum or difference; roots and squares are written sqrt(x),
    square(x)."""
    if not isinstance(expr, tuple):
        return names[expr] if names is not None and isinstance(expr, str) else str(expr)
    op, *args = expr
    if op in UNARY:
        return f"{op}({infix(args[0], names)})"
    texts = [infix(arg, names) for arg in args]
    for i, arg in enumerate(args):
        if isinstance(arg, tuple) and (arg[0] in "+-" or arg[0] in "*/" and op in "*/"):
            texts[i] = f"({texts[i]})"
    return f" {op} ".join(texts)
