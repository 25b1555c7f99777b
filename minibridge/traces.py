"""Problem -> question text and worked answer, with the injected behaviors as independent choices.

    question(problem, rng)            the conditions in random order, then what is asked
    answer(problem, rng, behaviors)   a solution in the layout of `answer.py`, one "- " line per step
    equations(problem)                a solution in bare equations, for the toy's base model

The behaviors of the paper (arXiv 2505.18917, section 4), written once over `Problem`:
    reflection  exploration: with probability p try a node out of turn; if a parent is still unknown, notice, go back
    analysis    exploitation: restate what the question says about the node before computing it
    subgoal     exploitation: reduce a formula one operation at a time
The answer is made in two hops: `plan` decides which node is tried when, `answer` puts each attempt into words.
Three random streams are split off the one given (wording, reflection, analysis), so that two arms of one seed
use the same letters (if any) for the same nodes.
"""
import random
import string
from dataclasses import dataclass
from typing import NamedTuple

from minibridge.answer import OPENING
from minibridge.config import InputError
from minibridge.dag import OPERATORS, Expr, Node, Problem

# Probability of restating a condition, by the node's in-degree 1, 2, 3, 4, 5+ (constants count), for each level.
ANALYSIS_LEVELS = ((0, 0, 0, 0, 0), (0, .1, .4, .8, 1), (.1, .4, .8, 1, 1), (.4, .8, 1, 1, 1), (1, 1, 1, 1, 1))
REDUNDANT_SHARE = 0.3  # of the picks out of turn, when the problem has redundant nodes

OPENINGS = ("I will find one quantity at a time.", "Let me go step by step.", "I work it out one step at a time.")
STATED = ("{node} is {value}.", "The text gives {node} as {value}.")
SELECT = ("Next is {node}.", "Now take {node}.")
NAME = ("Call it {letter}.", "Write {letter} for it.", "Let it be {letter}.")
SELECT_AND_NAME = ("Let {letter} be {node}.", "Let {letter} stand for {node}.", "Write {letter} for {node}.")
REMIND = ("It is {letter} already.", "It has the letter {letter}.")
RESTATE = ("It equals {expression}.", "The text says it equals {expression}.")
LOCKED = ("But {nodes} {verb} not known yet, so it must wait.", "Since {nodes} {verb} still unknown, go back.",
          "It needs {nodes}, which {verb} not known yet.")
CLOSINGS = ("So the result is {value}.", "That gives {value}.")


@dataclass(frozen=True)
class Behaviors:
    """subgoal: reduce formulas stepwise. analysis: level 0..4 of ANALYSIS_LEVELS. reflection: probability p."""
    subgoal: bool = False
    analysis: int = 0
    reflection: float = 0.0

    def __post_init__(self):
        if self.analysis not in range(len(ANALYSIS_LEVELS)):
            raise InputError(f"analysis: level {self.analysis} is not one of 0..4")
        if not 0 <= self.reflection <= 1:
            raise InputError(f"reflection: {self.reflection} is not a probability")

    def __str__(self) -> str:
        return f"subgoal={int(self.subgoal)} analysis={self.analysis} reflection={self.reflection:g}"


VANILLA = Behaviors()
BRIDGE = Behaviors(subgoal=True, analysis=2, reflection=0.1)


class Attempt(NamedTuple):
    """One try at a node; `missing` names the parents that were unsolved, so empty means solved."""
    key: str
    missing: tuple[str, ...]


# --- the question --------------------------------------------------------------------------------------------


def question(problem: Problem, rng: random.Random) -> str:
    """The stated conditions, one line each, uniformly shuffled, and the question on the last line."""
    nodes = problem.nodes
    lines = [f"The number of {phrase(node)} equals {describe(node.expr, nodes)}." for node in nodes.values() if node.stated]
    rng.shuffle(lines)
    target = nodes[problem.target]
    return "\n".join([*lines, f"How many {target.item} does each {target.owner} have?"])


def phrase(node: Node) -> str:
    return f"each {node.owner}'s {node.item}"


def describe(expr: Expr, nodes: dict[str, Node]) -> str:
    """An expression in the benchmark's words: "3 more than the difference of each A's B and each C's D"."""
    if isinstance(expr, int):
        return str(expr)
    if isinstance(expr, str):
        return phrase(nodes[expr])
    op, first, *rest = expr
    if isinstance(first, int):
        return f"{first} {'more than' if op == '+' else 'times'} {describe(rest[0], nodes)}"
    names = [phrase(nodes[arg]) for arg in expr[1:]]
    return f"the {'sum' if op == '+' else 'difference'} of {listing(names)}"


def listing(names: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1])))


# --- the plan: which node is tried when ----------------------------------------------------------------------


def plan(problem: Problem, rng: random.Random, reflection: float = 0.0) -> list[Attempt]:
    """Attempts in order. With reflection 0, every necessary node once, in the problem's order.

    Before each step but the first and the last, and never right after a failed attempt, with probability
    `reflection` a node is picked out of turn: a later necessary one, or (3 in 10) a redundant one. A pick whose
    parents are all known is simply solved; one that is already solved is passed over in silence.
    """
    order, attempts, solved = problem.order, [], set()

    def attempt(key: str) -> bool:
        missing = tuple(problem.missing(key, solved))
        attempts.append(Attempt(key, missing))
        if not missing:
            solved.add(key)
        return not missing

    i, went_well = 0, False
    while problem.target not in solved:  # every necessary node leads to it
        if 0 < i < len(order) - 1 and went_well and rng.random() < reflection:
            redundant = problem.redundant and rng.random() < REDUNDANT_SHARE
            key = rng.choice(problem.redundant if redundant else order[i + 1:])
            if key not in solved:
                went_well = attempt(key)
        else:
            if order[i] not in solved:
                went_well = attempt(order[i])
            i += 1
    return attempts


# --- the answer ----------------------------------------------------------------------------------------------


def answer(problem: Problem, rng: random.Random, behaviors: Behaviors = VANILLA, letters: str = string.ascii_letters) -> str:
    """A worked answer; every node gets one of `letters`, or, without letters (""), keeps its own name in the formulas.
    Raises InputError when there are more nodes than letters."""
    wording, reflecting, analysing = (random.Random(rng.getrandbits(64)) for _ in range(3))
    nodes = [*problem.order, *problem.redundant]
    if letters and len(nodes) > len(letters):
        raise InputError(f"problem {problem.id}: {len(nodes)} nodes, but only {len(letters)} letters")
    names = dict(zip(nodes, wording.sample(letters, len(nodes)))) if letters else own_names(problem)
    named: set[str] = set()
    steps = []
    for key, missing in plan(problem, reflecting, behaviors.reflection):
        node = problem.nodes[key]
        parts = [_introduce(problem, key, letters and names[key], wording, again=key in named)]
        named.add(key)
        if restated(node, analysing, behaviors.analysis):
            parts.append(wording.choice(RESTATE).format(expression=describe(node.expr, problem.nodes)))
        if missing:
            unknown = listing([phrase(problem.nodes[parent]) for parent in missing])
            parts.append(wording.choice(LOCKED).format(nodes=unknown, verb="is" if len(missing) == 1 else "are"))
        else:
            parts.append(compute(node.expr, names[key], names, problem.values, behaviors.subgoal))
        steps.append("- " + " ".join(parts))
    return OPENING + "\n".join([wording.choice(OPENINGS), *steps, wording.choice(CLOSINGS).format(value=problem.answer),
                                _result(problem)])


def equations(problem: Problem) -> str:
    """A solution in bare equations without letters, one way of writing it: what the toy's base model learns from.
    "- each Fir's Cafe = 6 * each Elm's Shop = 6 * 8 = 48." """
    names = own_names(problem)
    steps = ["- " + compute(problem.nodes[key].expr, names[key], names, problem.values, subgoal=False)
             for key in problem.order]
    return OPENING + "\n".join([*steps, _result(problem)])


def own_names(problem: Problem) -> dict[str, str]:
    return {key: phrase(node) for key, node in problem.nodes.items()}


def _result(problem: Problem) -> str:
    return f"</think>\n<answer>\nThe answer is \\boxed{{{problem.answer}}}.\n</answer>"


def _introduce(problem: Problem, key: str, letter: str, wording: random.Random, again: bool) -> str:
    """The words before a formula: which node, and the letter it gets or already has, if it has one."""
    node = problem.nodes[key]
    if not letter:
        templates = (wording.choice(STATED if isinstance(node.expr, int) else SELECT),)
    elif isinstance(node.expr, int):
        templates = (wording.choice(STATED), wording.choice(NAME))
    elif again:
        templates = (wording.choice(SELECT), wording.choice(REMIND))
    elif wording.random() < 0.5:
        templates = (wording.choice(SELECT), wording.choice(NAME))
    else:
        templates = (wording.choice(SELECT_AND_NAME),)
    text = " ".join(templates).format(node=phrase(node), letter=letter, value=problem.values[key])
    return text[0].upper() + text[1:]


def restated(node: Node, rng: random.Random, level: int) -> bool:
    """Whether an attempt restates the node's condition; drawn at every attempt, only where there is something
    to restate: a stated node that depends on another."""
    if not (node.stated and node.parents):
        return False
    return rng.random() < ANALYSIS_LEVELS[level][min(node.degree, 5) - 1]


def compute(expr: Expr, letter: str, letters: dict[str, str], values: dict[str, int], subgoal: bool) -> str:
    """"x = p * (q + r) = 3 * (4 + 5) = 3 * 9 = 27."; without subgoals the reductions in between are left out."""
    chain = [letter] if isinstance(expr, int) else [letter, formula(expr, letters)]
    numbers = substitute(expr, values)
    while isinstance(numbers, tuple):
        if len(chain) == 2 or subgoal:
            chain.append(formula(numbers))
        numbers = reduce_once(numbers)
    return " = ".join([*chain, str(numbers)]) + "."


def substitute(expr: Expr, values: dict[str, int]) -> Expr:
    if isinstance(expr, tuple):
        return (expr[0], *(substitute(arg, values) for arg in expr[1:]))
    return values[expr] if isinstance(expr, str) else expr


def reduce_once(expr: tuple) -> Expr:
    """One operation less: the first nested group first, then from left to right.
    3 * (4 + 5 + 6) -> 3 * (9 + 6);   2 * 3 + 4 * 5 -> 6 + 4 * 5."""
    op, *args = expr
    for i, arg in enumerate(args):
        if isinstance(arg, tuple):
            return (op, *args[:i], reduce_once(arg), *args[i + 1:])
    first = OPERATORS[op](args[0], args[1])
    return (op, first, *args[2:]) if len(args) > 2 else first


def formula(expr: Expr, letters: dict[str, str] | None = None) -> str:
    """Infix text; a nested sum or difference stands in parentheses, negative numbers stand bare ("4 - -3")."""
    if not isinstance(expr, tuple):
        return letters[expr] if isinstance(expr, str) else str(expr)
    op, *args = expr
    texts = [f"({formula(arg, letters)})" if isinstance(arg, tuple) and arg[0] in "+-" else formula(arg, letters)
             for arg in args]
    return f" {op} ".join(texts)
