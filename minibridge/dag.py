"""A problem as a directed acyclic graph of quantities, evaluated once when it is made.

An expression is one of
    int                     a constant the problem states
    str                     the key of another node, "Owner's Item"
    (op, arg, arg, ...)     op in + - *, applied from left to right; arguments are expressions
so that it prints, hashes and serialises as it stands. A node's parents are the nodes its expression names.

The graph knows nothing of text: sentences and worked answers are made from it in `traces`.
"""
import hashlib
import json
import random
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from minibridge.config import InputError

Expr = int | str | tuple
OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def evaluate(expr: Expr, values: dict[str, int]) -> int:
    """Value of an expression, given the values of the nodes it names."""
    if isinstance(expr, int):
        return expr
    if isinstance(expr, str):
        return values[expr]
    op, first, *rest = expr
    result = evaluate(first, values)
    for arg in rest:
        result = OPERATORS[op](result, evaluate(arg, values))
    return result


def leaves(expr: Expr) -> list[int | str]:
    """Constants and node keys of an expression, left to right, repeats included."""
    return [leaf for arg in expr[1:] for leaf in leaves(arg)] if isinstance(expr, tuple) else [expr]


@dataclass(frozen=True)
class Node:
    """One quantity, "each {owner}'s {item}". `stated` says whether the question spells its expression out:
    an abstract quantity ("each School's Furniture") is left for the reader to infer from the structure."""
    owner: str
    item: str
    expr: Expr
    stated: bool = True

    @property
    def key(self) -> str:
        return f"{self.owner}'s {self.item}"

    @cached_property
    def parents(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(leaf for leaf in leaves(self.expr) if isinstance(leaf, str)))

    @cached_property
    def degree(self) -> int:
        """In-degree, a stated constant counted as one more parent (as the op count of iGSM does)."""
        return len(self.parents) + any(isinstance(leaf, int) for leaf in leaves(self.expr))


@dataclass(frozen=True)
class Problem:
    """A question about the last node of `order`.

    nodes: every quantity by its key. order: the nodes the question needs, in one solving order, the asked one
    last. redundant: the other nodes. num_ops: the op count the generator booked.
    Raises InputError when the nodes form a cycle, name an unknown node, or `order` cannot be solved in turn.
    """
    task: str
    nodes: dict[str, Node]
    order: tuple[str, ...]
    redundant: tuple[str, ...]
    num_ops: int
    values: dict[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for key, node in self.nodes.items():
            if unknown := [parent for parent in node.parents if parent not in self.nodes]:
                raise InputError(f"node {key!r}: unknown parent {unknown[0]!r}")
        try:
            solving = tuple(TopologicalSorter({key: node.parents for key, node in self.nodes.items()}).static_order())
        except CycleError as error:
            raise InputError(f"nodes form a cycle: {' -> '.join(error.args[1])}") from None
        solved: set[str] = set()
        for key in self.order:
            if key not in self.nodes or key in solved or self.missing(key, solved):
                raise InputError(f"order: {key!r} is unknown, repeated or comes before one of its parents")
            solved.add(key)
        if not self.order:
            raise InputError("order: no node to ask for")
        for key in self.redundant:
            if key not in self.nodes or key in solved:
                raise InputError(f"redundant: {key!r} is unknown or stands in order too")
        values: dict[str, int] = {}
        for key in solving:
            values[key] = evaluate(self.nodes[key].expr, values)
        object.__setattr__(self, "values", values)

    @property
    def target(self) -> str:
        return self.order[-1]

    @property
    def answer(self) -> int:
        return self.values[self.target]

    def missing(self, key: str, solved: set[str]) -> list[str]:
        """The parents of a node that are not solved yet; the node is locked while there are any."""
        return [parent for parent in self.nodes[key].parents if parent not in solved]

    def topological_order(self, rng: random.Random) -> tuple[str, ...]:
        """Another solving order of the necessary nodes: Kahn's algorithm, a random ready node at each turn.
        (Every order has positive probability, but they are not equally likely.)"""
        solved, waiting = [], list(self.order)
        while waiting:
            key = rng.choice([key for key in waiting if not self.missing(key, set(solved))])
            waiting.remove(key)
            solved.append(key)
        return tuple(solved)

    @cached_property
    def id(self) -> str:
        """Hash of the problem with its names: the same for every wording and every arm that renders it."""
        return _digest([self.target, sorted((key, node.expr) for key, node in self.nodes.items())])

    @cached_property
    def structure(self) -> str:
        """Hash of the problem without its names and without the order of its nodes: two problems that differ
        only in what things are called are one structure. Splits are kept apart by it."""
        digests: dict[str, str] = {}

        def anonymous(expr: Expr):
            if isinstance(expr, tuple):
                return [expr[0], *map(anonymous, expr[1:])]
            return digest(expr) if isinstance(expr, str) else expr

        def digest(key: str) -> str:
            if key not in digests:
                digests[key] = _digest(anonymous(self.nodes[key].expr))
            return digests[key]

        return _digest([digest(self.target), sorted(map(digest, self.nodes))])

    def to_dict(self) -> dict:
        nodes = [{"owner": n.owner, "item": n.item, "expr": n.expr, "stated": n.stated} for n in self.nodes.values()]
        return {"task": self.task, "num_ops": self.num_ops, "nodes": nodes, "order": self.order,
                "redundant": self.redundant}

    @classmethod
    def from_dict(cls, record: dict) -> "Problem":
        nodes = [Node(n["owner"], n["item"], _tuples(n["expr"]), n["stated"]) for n in record["nodes"]]
        return cls(record["task"], {node.key: node for node in nodes}, tuple(record["order"]),
                   tuple(record["redundant"]), record["num_ops"])


def _tuples(expr):
    return tuple(map(_tuples, expr)) if isinstance(expr, list) else expr


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
