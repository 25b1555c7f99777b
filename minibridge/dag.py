"""A problem as a directed acyclic graph of quantities, evaluated once when it is made.

An expression is one of
    int or Decimal          a constant the problem states
    str                     the key of another node, "Owner's Item" or just its name
    (op, arg, arg, ...)     op in + - * /, applied from left to right, or sqrt, square; arguments are expressions
so that it prints, hashes and serialises as it stands. A node's parents are the nodes its expression names.

Whole numbers stay exact. Whatever is not whole is rounded to four decimals, halves away from zero, after every operation:
what an answer prints is what it goes on computing with, so its steps can be checked from the text alone.

The graph knows nothing of text: sentences and worked answers are made from it in `traces`.
"""
import hashlib
import json
import operator
import random
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from functools import cached_property
from graphlib import CycleError, TopologicalSorter

from minibridge.config import InputError

Number = int | Decimal
NUMBERS = (int, Decimal)  # the same for isinstance, which is slower with a union
Expr = int | Decimal | str | tuple
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": lambda a, b: Decimal(a) / b,
             "sqrt": lambda a: Decimal(a).sqrt(), "square": lambda a: a * a}
UNARY = ("sqrt", "square")
PLACES = Decimal("0.0001")
LARGEST = 10**100  # no result of an operation gets there


class Undefined(InputError):
    """A node whose value is no number, or one that is too large."""


def rounded(number: Number) -> Number:
    """To four decimals, halves away from zero; an int where nothing is left behind the point."""
    if type(number) is int:
        return number
    number = number.quantize(PLACES, ROUND_HALF_UP)
    return int(number) if number == number.to_integral_value() else number.normalize()


def operate(op: str, *args: Number, finish: Callable[[Number], Number] = rounded) -> Number:
    """One operation, of two numbers or of one. Raises ArithmeticError for a zero divisor, for the root of a negative
    number, and for results of more than 100 digits, or of more than 24 but for + - * and square of integers."""
    result = OPERATORS[op](*args)
    if abs(result) >= LARGEST:
        raise OverflowError
    return finish(result)


def evaluate(expr: Expr, values: dict[str, Number], finish: Callable[[Number], Number] = rounded) -> Number:
    """Value of an expression, given the values of the nodes it names; `finish` is applied to every operation's result."""
    if type(expr) is not tuple:
        return values[expr] if type(expr) is str else expr
    op, first, *rest = expr
    result = evaluate(first, values, finish)
    if op in UNARY:
        return operate(op, result, finish=finish)
    for arg in rest:
        result = operate(op, result, evaluate(arg, values, finish), finish=finish)
    return result


def leaves(expr: Expr) -> list[Number | str]:
    """Constants and node keys of an expression, left to right, repeats included."""
    if type(expr) is not tuple:
        return [expr]
    found: list[Number | str] = []
    for arg in expr[1:]:
        if type(arg) is tuple:
            found += leaves(arg)
        else:
            found.append(arg)
    return found


def pick(rng: random.Random, choices: Sequence):
    """rng.choice, but faster: little else is done as often to make problems and their answers."""
    return choices[int(rng.random() * len(choices))]


def topological_order(parents: Mapping[str, Sequence[str]], rng: random.Random) -> tuple[str, ...]:
    """A random order of the keys in which every key comes after its parents, all of them keys too; there is no cycle."""
    solved, waiting = {}, list(parents)  # a dict keeps the order and finds its keys quickly
    while waiting:
        key = pick(rng, [key for key in waiting if all(parent in solved for parent in parents[key])])
        waiting.remove(key)
        solved[key] = True
    return tuple(solved)


@dataclass(frozen=True)
class Node:
    """One quantity: "each {owner}'s {item}", or, without an item, called {owner}. `stated` says whether the question
    spells its expression out: an abstract quantity ("each School's Furniture") is left for the reader to infer from
    the structure. `text` is the sentence that states it; empty: `traces` words the expression."""
    owner: str
    item: str
    expr: Expr
    stated: bool = True
    text: str = ""
    parents: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        names = [leaf for leaf in leaves(self.expr) if type(leaf) is str]
        object.__setattr__(self, "parents", tuple(dict.fromkeys(names)))

    @property
    def key(self) -> str:
        return f"{self.owner}'s {self.item}" if self.item else self.owner

    @property
    def degree(self) -> int:
        """In-degree, constants and repeated operands counted too."""
        return len(leaves(self.expr))


@dataclass(frozen=True)
class Problem:
    """A question about the last node of `order`.

    nodes: every quantity by its key. order: the nodes the question needs, in one solving order, the asked one
    last. redundant: the other nodes. num_ops: the op count the generator booked. tolerance: relative error up to which
    an answer counts as right; 0: only its very text does. ask: the closing question; empty: `traces` words it.
    Raises InputError when the nodes form a cycle, name an unknown node, cannot be computed, or when `order` cannot be
    solved in turn.
    """
    task: str
    nodes: dict[str, Node]
    order: tuple[str, ...]
    redundant: tuple[str, ...]
    num_ops: int
    tolerance: float = 0.0
    ask: str = ""
    values: dict[str, Number] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        solving = solving_order(self.nodes)
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
        object.__setattr__(self, "values", self._evaluate(solving))

    def _evaluate(self, keys: tuple[str, ...], finish: Callable[[Number], Number] = rounded) -> dict[str, Number]:
        """Values of `keys`, which stand in a solving order."""
        values: dict[str, Number] = {}
        for key in keys:
            try:
                values[key] = evaluate(self.nodes[key].expr, values, finish)
            except ArithmeticError:
                raise Undefined(f"node {key!r}: division by zero, root of a negative number, or too large") from None
        return values

    @property
    def target(self) -> str:
        return self.order[-1]

    @property
    def answer(self) -> Number:
        return self.values[self.target]

    @property
    def symbolic(self) -> bool:
        """Whether every name is one word, so that it can stand in a formula itself."""
        return all(key.isidentifier() for key in self.nodes)

    @property
    def drift(self) -> float:
        """Relative error that the rounding of every step has left in the answer (the exact one: to 28 digits)."""
        try:
            exact = self._evaluate(self.order, finish=lambda number: number)[self.target]
        except InputError:  # a divisor or root that is on the safe side of 0 only after rounding
            return float("inf")
        error = abs(self.answer - exact)
        return float(error / abs(Decimal(exact))) if exact else float("inf") if error else 0.0

    def missing(self, key: str, solved: Container[str]) -> list[str]:
        """The parents of a node that are not solved yet; the node is locked while there are any."""
        return [parent for parent in self.nodes[key].parents if parent not in solved]

    def topological_order(self, rng: random.Random, keys: Sequence[str] | None = None) -> tuple[str, ...]:
        """Another solving order of the necessary nodes, or of `keys`: Kahn's algorithm, a random ready node at each
        turn. (Every order has positive probability, but they are not equally likely.)"""
        return topological_order({key: self.nodes[key].parents for key in keys or self.order}, rng)

    @cached_property
    def id(self) -> str:
        """Hash of the problem with its names: the same for every wording and every arm that renders it."""
        told = [self.target, sorted((key, node.expr, node.text) if node.text else (key, node.expr)
                                    for key, node in self.nodes.items())]
        return _digest([*told, self.ask] if self.ask else told)

    @cached_property
    def structure(self) -> str:
        """Hash of the graph and its constants: two problems that differ only in what things are called, in the order of
        their nodes or in that of the terms of a sum or product are one structure. Splits are kept apart by it."""
        digests = self._digests
        return _digest([digests[self.target], sorted(digests.values())])

    @property
    def core(self) -> str:
        """Hash of what the question needs, without names: the same with other redundant nodes beside it."""
        return self._digests[self.target]

    @property
    def split_key(self) -> str:
        """The hash that decides which split may hold the problem: in arithmetic two that differ in redundant nodes alone are
        of one split."""
        return self.core if self.task.startswith("arithmetic") else self.structure

    @cached_property
    def _digests(self) -> dict[str, str]:
        """Of each node, a hash of its expression with the parents' hashes in place of their names."""
        digests: dict[str, str] = {}

        def anonymous(expr: Expr):
            if isinstance(expr, tuple):
                args = [anonymous(arg) for arg in expr[1:]]
                return [expr[0], *(sorted(args, key=repr) if expr[0] in ("+", "*") else args)]
            return digests[expr] if isinstance(expr, str) else expr

        for key in self.values:  # parents first
            digests[key] = _digest(anonymous(self.nodes[key].expr))
        return digests

    def to_dict(self) -> dict:
        """In JSON's types; what stands at its default is left out, but for the fields every problem has."""
        nodes = [{"owner": n.owner, "item": n.item, "expr": _json(n.expr), "stated": n.stated}
                 | ({"text": n.text} if n.text else {}) for n in self.nodes.values()]
        extra = {"tolerance": self.tolerance, "ask": self.ask}
        return {"task": self.task, "num_ops": self.num_ops, "nodes": nodes, "order": list(self.order),
                "redundant": list(self.redundant)} | {name: value for name, value in extra.items() if value}

    @classmethod
    def from_dict(cls, record: dict) -> "Problem":
        """The problem that `to_dict` wrote. Raises InputError for anything else."""
        _check_types(record, PROBLEM_FIELDS, "problem")
        for node in record["nodes"]:
            _check_types(node, NODE_FIELDS, "problem: node")
        for name in ("order", "redundant"):
            if not all(isinstance(key, str) for key in record[name]):
                raise InputError(f"problem: field {name!r} must hold names")
        nodes = [Node(n["owner"], n["item"], _expression(n["expr"]), n["stated"], n.get("text", ""))
                 for n in record["nodes"]]
        if {node.key for node in nodes} != {*record["order"], *record["redundant"]}:
            raise InputError("problem: order and redundant must name every node, and nothing else")
        if not 0 <= record.get("tolerance", 0.0) < 1 or record["num_ops"] < 0:
            raise InputError("problem: tolerance must be at least 0 and below 1, num_ops at least 0")
        if len({node.key for node in nodes}) < len(nodes):
            raise InputError("problem: two nodes of one name")
        return cls(record["task"], {node.key: node for node in nodes}, tuple(record["order"]),
                   tuple(record["redundant"]), record["num_ops"], record.get("tolerance", 0.0), record.get("ask", ""))


def solving_order(nodes: dict[str, Node]) -> tuple[str, ...]:
    """All keys, each after its parents. Raises InputError for an unknown parent and for a cycle."""
    for key, node in nodes.items():
        if unknown := [parent for parent in node.parents if parent not in nodes]:
            raise InputError(f"node {key!r}: no node is called {unknown[0]!r}")
    try:
        return tuple(TopologicalSorter({key: node.parents for key, node in nodes.items()}).static_order())
    except CycleError as error:
        cycle = error.args[1][::-1]  # each needs the next
        raise InputError(f"node {cycle[0]!r}: is computed from itself: {' -> '.join(cycle)}") from None


def _json(expr: Expr):
    """Tuples become JSON's lists; a Decimal becomes a float, whose shortest text is the Decimal's own."""
    if isinstance(expr, tuple):
        return list(map(_json, expr))
    return float(expr) if isinstance(expr, Decimal) else expr


def read_problem(line: dict, where: str) -> Problem:
    """The problem of a JSONL line, whose "answer", if it has one, is the problem's. Raises InputError("where: what")."""
    try:
        problem = Problem.from_dict(line.get("problem"))
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    if line.get("answer", str(problem.answer)) != str(problem.answer):
        raise InputError(f"{where}: field 'answer' is {line['answer']!r}, its problem's {str(problem.answer)!r}")
    return problem


def problem_in(line: dict, where: str) -> Problem | None:
    """`read_problem` of a line that holds a graph; elsewhere "problem" is often a text."""
    return read_problem(line, where) if isinstance(line.get("problem"), dict) else None


PROBLEM_FIELDS = {"task": str, "num_ops": int, "nodes": list, "order": list, "redundant": list, "tolerance": float,
                  "ask": str}
NODE_FIELDS = {"owner": str, "item": str, "expr": (int, float, str, list), "stated": bool, "text": str}
OPTIONAL = ("tolerance", "ask", "text")
MOST_NESTED = 50


def _check_types(record, kinds: dict[str, type], where: str):
    for name, kind in kinds.items():
        value = record.get(name) if isinstance(record, dict) else None
        left_out = name in OPTIONAL and name not in record
        if not left_out and (not isinstance(value, kind) or isinstance(value, bool) and kind is not bool):
            raise InputError(f"{where}: field {name!r} is missing or of another type")


def _expression(value, depth: int = 0) -> Expr:
    """An expression from JSON: its lists are tuples here, its floats decimals."""
    if isinstance(value, list):
        op, *args = value or [None]
        if depth == MOST_NESTED:
            raise InputError(f"problem: operations nested more than {MOST_NESTED} deep")
        if not isinstance(op, str) or op not in OPERATORS or len(args) < 1 or (len(args) > 1) == (op in UNARY):
            raise InputError(f"problem: no operation: {str(value)[:80]}")
        return (op, *(_expression(arg, depth + 1) for arg in args))
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InputError(f"problem: no expression: {str(value)[:80]}")
    return Decimal(str(value)) if isinstance(value, float) else value


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, default=float).encode()).hexdigest()[:16]
