"""Draws arithmetic problems: a tree of operations over small whole numbers, with a few extra links and unneeded trees.

The rules are those of DyVal's arithmetic task (arXiv 2309.17167), which PromptBench offers and the paper (arXiv 2505.18917)
trains on. It departs from them in three ways: names are drawn at random (there they are handed out along the tree, so that
their alphabetical order is a solving order); every operation is rounded to four decimals; and `draw` has stricter filters.

    draw(random.Random(0), depth=5, redundant=(0, 8)) -> Problem

Two variants. "6op" has all six operations; values are rounded to four decimals at every step (see `dag`), and an answer is
right within a relative error of 1e-4. "int" has + - * alone and exact answers: easier for small models, a deviation from
the benchmark.
"""
import itertools
import random
from collections.abc import Iterable

from minibridge.config import InputError
from minibridge.dag import UNARY, Expr, Node, Number, Problem, evaluate, topological_order

VARIANTS = {"6op": ("+", "-", "*", "/", "sqrt", "square"), "int": ("+", "-", "*")}
TOLERANCE = 1e-4  # of the score, and the most that rounding may move the answer
LEAST, BELOW = 1e-4, 1000  # an answer is at least LEAST and smaller than BELOW
LARGEST = 10_000  # no value of the problem gets there, whatever its sign
MAX_DRAWS = 2000
MOST_REDUNDANT = 1000  # of up to three names each
# Three consonants make no English word, and none of the words around them.
NAMES = ["".join(letters) for letters in itertools.product("bcdfghjklmnpqrstvwxz", repeat=3)]

Tree = dict[str, int | tuple]  # name -> leaf, or (op, child, child, ...); in a fresh tree the root comes last


def draw(rng: random.Random, depth: int = 5, redundant: tuple[int, int] = (0, 8), variant: str = "6op",
         links: int = 1) -> Problem:
    """A problem whose tree has `depth` levels, operations and leaves together, each operation of two numbers taking
    one more of its nodes as an operand, `links` times; and redundant[0]..redundant[1] premises that are not needed, each an
    unconnected tree of two levels (two or three sentences).

    Raises InputError when no draw passes the filters: 1e-4 <= answer < 1000, every value below 10,000, no division
    by zero, no root of a negative number, no more than 1e-4 of relative error in the answer from rounding.
    """
    if depth < 2:
        raise InputError(f"depth: must be at least 2, not {depth}")
    if redundant[1] > MOST_REDUNDANT:
        raise InputError(f"redundant: at most {MOST_REDUNDANT}, not {redundant[1]}")
    for _ in range(MAX_DRAWS):
        problem = attempt(rng, depth, redundant, variant, links)
        if problem is not None:
            return problem
    raise InputError(f"depth: no problem of {depth} levels in {MAX_DRAWS} draws")


def attempt(rng: random.Random, depth: int, redundant: tuple[int, int], variant: str, links: int) -> Problem | None:
    """One draw; None where a value cannot be computed or a filter rejects it (the redundant trees are too small to)."""
    numbers = itertools.count()
    try:
        needed = _link(rng, _grow(rng, numbers, VARIANTS[variant], depth), links)
        order = topological_order({key: _children(vertex) for key, vertex in needed.items()}, rng)
        values = _values(needed, order)
    except ArithmeticError:
        return None
    if not LEAST <= values[order[-1]] < BELOW or max(map(abs, values.values())) >= LARGEST:
        return None
    others = [_grow(rng, numbers, VARIANTS[variant], 2) for _ in range(rng.randint(*redundant))]
    tree = {key: vertex for part in (needed, *others) for key, vertex in part.items()}
    names = dict(zip(tree, rng.sample(NAMES, len(tree))))
    nodes = [Node(names[key], "", _expression(vertex, names)) for key, vertex in tree.items()]
    ops = sum(max(1, len(_children(vertex)) - 1) for vertex in needed.values() if isinstance(vertex, tuple))
    task, tolerance = ("arithmetic-int", 0.0) if variant == "int" else ("arithmetic", TOLERANCE)
    problem = Problem(task, {node.key: node for node in nodes}, tuple(names[key] for key in order),
                      tuple(node.key for node in nodes[len(needed):]), ops, tolerance)
    return problem if problem.drift <= TOLERANCE else None


def _grow(rng: random.Random, numbers: itertools.count, operations: tuple[str, ...], depth: int) -> Tree:
    """A tree of `depth` levels whose leaves all lie on the last; a child that its operation cannot take is redrawn."""
    if depth == 1:
        return {f"{next(numbers)}": rng.randint(1, 10)}
    op = rng.choice(operations)
    tree, children = {}, []
    for place in range(1 if op in UNARY else 2):
        child = _grow(rng, numbers, operations, depth - 1)
        while op in ("/", "sqrt") and not _allowed(op, place, list(_values(child, child).values())[-1]):
            child = _grow(rng, numbers, operations, depth - 1)
        tree |= child
        children.append(list(child)[-1])
    return tree | {f"{next(numbers)}": (op, *children)}


def _allowed(op: str, place: int, value: Number) -> bool:
    """Whether an operation can take this value as its operand number `place`, counted from 0."""
    return value >= 0 if op == "sqrt" else value != 0 if op == "/" and place else True


def _link(rng: random.Random, tree: Tree, links: int) -> Tree:
    """Each operation but roots and squares gets one more operand, `links` times over: a random node that closes no cycle
    and, where it is divided by, whose value before any link is not 0."""
    values, tree = _values(tree, tree), dict(tree)
    for key, vertex in tree.items():
        if isinstance(vertex, tuple) and vertex[0] not in UNARY:
            child = next((other for other in rng.sample(list(tree), len(tree)) if key not in _below(tree, other)
                          and _allowed(vertex[0], len(vertex) - 1, values[other])), None)
            if child is not None:
                tree[key] = (*vertex, *[child] * links)
    return tree


def _below(tree: Tree, key: str) -> set[str]:
    """The node itself and everything it is computed from."""
    found, waiting = set(), [key]
    while waiting:
        current = waiting.pop()
        if current not in found:
            found.add(current)
            waiting += _children(tree[current])
    return found


def _children(vertex: int | tuple) -> tuple[str, ...]:
    return vertex[1:] if isinstance(vertex, tuple) else ()


def _values(tree: Tree, order: Iterable[str]) -> dict[str, Number]:
    """Of all nodes; `order` is one to compute them in."""
    values: dict[str, Number] = {}
    for key in order:
        values[key] = evaluate(_expression(tree[key]), values)
    return values


def _expression(vertex: int | tuple, names: dict[str, str] | None = None) -> Expr:
    """With several operands, a difference is the first minus the sum of the rest, and a quotient the first over their
    product."""
    if isinstance(vertex, int):
        return vertex
    op, first, *rest = (vertex[0], *(names[child] if names else child for child in vertex[1:]))
    if op in "-/" and len(rest) > 1:
        return (op, first, ("+" if op == "-" else "*", *rest))
    return (op, first, *rest)
