"""Draws iGSM problems: items in layers, instance and abstract quantities, a dependency graph of n operations.

The five stages and all their probabilities follow the generator published with the paper (arXiv 2505.18917),
which builds on iGSM (arXiv 2407.20311). It departs from that code where the distribution of problems is not
touched: constants, signs and operand orders are drawn when the graph is made, not while it is printed, and owner
and item are kept apart, not split at "'s". Quirks that shape the distribution stay and are marked "kept".

    draw(random.Random(0), ops=(15, 20)) -> Problem
"""
import math
import random
import string
from collections import Counter
from dataclasses import dataclass

from minibridge.config import InputError
from minibridge.dag import Expr, Node, Problem, Undefined, pick
from minibridge.worlds import TOY_WORLDS, WORLDS

CONSTANT = "constant"  # stands among a node's parents for "a constant of its own", drawn from 0..9
STRUCTURE_TRIES = 50
MAX_DRAWS = 2000  # of 21 to 25 operations in small worlds one draw in a hundred passes


@dataclass(frozen=True)
class Scale:
    """What bounds a problem besides its op count. The defaults are the paper's. `instances` is the most pairs of items of
    which one may hold the other; `layers` and `widths` are what numbers of layers, and of items in a layer, are drawn from;
    `cap` bounds every value in the problem (None: only the answer is bounded, by 1000); `letters` are what answers may call
    its quantities (none: formulas hold their names); `redundant` is the most quantities the question may hold without
    need (None: any number)."""
    instances: int = 20
    layers: tuple[int, ...] = (2, 3, 4)
    widths: tuple[int, ...] = (2, 3, 4)
    cap: int | None = None
    worlds: tuple = WORLDS
    letters: str = string.ascii_letters
    redundant: int | None = None


PAPER = Scale()
TOY = Scale(instances=8, layers=(2, 3), widths=(2, 3), cap=50, worlds=TOY_WORLDS, letters="", redundant=0)


def draw(rng: random.Random, ops: tuple[int, int] = (15, 20), scale: Scale = PAPER) -> Problem:
    """A problem of ops[0]..ops[1] operations that passes the benchmark's filters: |answer| < 1000, and where
    the range begins above 20 operations six in ten of those with answer 0 are dropped.

    Raises InputError when the op range admits none at this scale.
    """
    low, high = ops
    if not 1 <= low <= high <= 100:
        raise InputError(f"ops: {low}-{high} is not a range between 1 and 100")
    for _ in range(MAX_DRAWS):
        problem = attempt(rng, ops, scale)
        if problem is None or abs(problem.answer) >= 1000:
            continue
        if scale.cap is not None and any(abs(value) >= scale.cap for value in problem.values.values()):
            continue
        if scale.redundant is not None and len(problem.redundant) > scale.redundant:
            continue
        if low > 20 and problem.answer == 0 and rng.random() < 0.6:
            continue
        return problem
    raise InputError(f"ops: no problem of {low}-{high} operations in {MAX_DRAWS} draws at this scale")


def attempt(rng: random.Random, ops: tuple[int, int], scale: Scale = PAPER) -> Problem | None:
    """One draw of the hyper-parameters and up to 50 structures for them, before any filter; None: given up."""
    n = min(_integer(rng, *ops), _integer(rng, *ops))
    abstract_budget = max(_integer(rng, 1, n), _integer(rng, 1, n))
    budget = _integer(rng, abstract_budget, n)
    layers = _size(rng, n, scale.layers)
    narrow, wide = sorted((_size(rng, n, scale.widths), _size(rng, n, scale.widths)))
    fewest = (layers - 1) * narrow
    most = max(fewest, scale.instances)
    edges = min(_integer(rng, fewest, most), _integer(rng, fewest, most), (layers - 1) * wide**2)
    categories = _names(rng, layers, scale.worlds)
    for _ in range(STRUCTURE_TRIES):
        structure = _structure(rng, layers, narrow, wide, edges, categories)
        parents = _necessary(rng, structure, abstract_budget, budget)
        order = _solving_order(rng, structure, parents)
        if order is not None:
            break
    else:
        return None
    if not _spend_ops(rng, structure, order, parents, n):
        return None
    redundant = _redundant(rng, structure, order, parents)
    nodes = {key: _node(rng, structure, key, parents[key]) for key in (*order, *redundant)}
    try:
        return Problem("igsm", nodes, tuple(order), tuple(redundant), n)
    except Undefined:  # once in thousands of the longest problems, a chain of products has more than a hundred digits
        return None


# --- hyper-parameters, names and the layered structure -------------------------------------------------------


def _integer(rng: random.Random, low: int, high: int) -> int:
    """rng.randint, but faster."""
    return low + int(rng.random() * (high - low + 1))


def _size(rng: random.Random, n: int, choices: tuple[int, ...]) -> int:
    """A number of layers, or of items in a layer: the longer the problem, the larger, but only slightly."""
    centre = {2: 0.2, 3: 0.5, 4: 0.8}
    weights = [math.exp(-(((n - 1) / 19 - centre[k]) ** 2)) for k in choices]
    return rng.choices(choices, weights)[0]


def _names(rng: random.Random, layers: int, worlds: tuple) -> list[tuple[str, tuple[str, ...]]]:
    """(category, item names) of consecutive layers, smallest parts first."""
    world = [(category, pick(rng, themes)) for category, themes in pick(rng, worlds)][::-1]
    first = _integer(rng, 0, len(world) - layers)
    return world[first:first + layers]


class _Structure:
    """The quantities that follow from items[i], the names in layer i, and below[a], the items directly inside a.

    instances: keys "a's b" of the edges. abstract: key "a's category" -> its level, the number of layers it spans;
    levels[level]: the same the other way round.
    parents_of[key]: the quantities an abstract quantity sums over. owner_item[key]: (owner, item) of any of them.
    """

    def __init__(self, categories: list, items: list[list[str]], below: dict[str, list[str]]):
        self.owner_item: dict[str, tuple[str, str]] = {}
        self.parents_of: dict[str, list[str]] = {}
        self.abstract: dict[str, int] = {}
        self.levels: list[list[str]] = [[] for _ in items]
        self.instances = [self._key(a, b) for layer in items[1:] for a in layer for b in below[a]]
        for upper, layer in enumerate(items):
            for lower in range(upper - 1, -1, -1):
                category = categories[lower][0]
                for a in layer:
                    key = self._key(a, category)
                    self.abstract[key] = upper - lower
                    self.levels[upper - lower].append(key)
                    if upper - lower == 1:
                        self.parents_of[key] = [f"{a}'s {b}" for b in below[a]]
                    else:
                        self.parents_of[key] = [part for b in below[a] for part in (f"{a}'s {b}", f"{b}'s {category}")]

    def _key(self, owner: str, item: str) -> str:
        key = f"{owner}'s {item}"
        self.owner_item[key] = owner, item
        return key


def _structure(rng: random.Random, layers: int, narrow: int, wide: int, edges: int, categories: list) -> _Structure:
    sizes = [narrow] * layers
    eagerness = rng.random()
    while min(sizes) < wide:
        if sum(sizes[1:]) == edges:
            break
        if sum(a * b for a, b in zip(sizes, sizes[1:])) >= edges and rng.random() >= eagerness:
            break
        sizes[pick(rng, [i for i in range(layers) if sizes[i] < wide])] += 1
    items = [rng.sample(names, size) for (_, names), size in zip(categories, sizes)]
    below = {a: [pick(rng, items[i])] for i in range(layers - 1) for a in items[i + 1]}
    count = sum(sizes[1:])
    while count < edges:
        i = 1 + int(rng.random() * (layers - 1))
        a, b = pick(rng, items[i]), pick(rng, items[i - 1])
        if b not in below[a]:
            below[a].append(b)
            count += 1
    return _Structure(categories, items, below)


# --- the dependency graph, stages 1 to 5 ---------------------------------------------------------------------


def _cost(parents: list[str]) -> int:
    return len(parents) - 1 if len(parents) > 2 else 1


def _necessary(rng: random.Random, structure: _Structure, abstract_budget: int, budget: int) -> dict[str, list[str]]:
    """Stages 1 and 2: abstract quantities with their ancestors while they fit, then single instances."""
    included: dict[str, list[str]] = {}
    cost = 0

    def collect(key: str, new: dict[str, list[str]]) -> dict[str, list[str]]:
        parents = structure.parents_of.get(key, ())
        for parent in parents:
            if parent not in included and parent not in new:
                collect(parent, new)
        new[key] = list(parents)
        return new

    def grow() -> int:
        """Commit one abstract quantity, the deepest level first; one candidate per level, cheaper ones of the
        same level are not looked for (kept)."""
        for level in reversed(structure.levels):
            candidates = [key for key in level if key not in included]
            if candidates:
                new = collect(pick(rng, candidates), {})
                extra = sum([_cost(parents) for parents in new.values()])
                if cost + extra <= abstract_budget:
                    included.update(new)
                    return extra
        return 0

    while extra := grow():
        cost += extra
    remaining = [key for key in structure.instances if key not in included]
    rng.shuffle(remaining)
    while cost < budget and remaining:
        included[remaining.pop()] = []
        cost += 1
    return included


def _solving_order(rng: random.Random, structure: _Structure, parents: dict[str, list[str]]) -> list[str] | None:
    """Stage 3: a solving order, found backwards from the question, in which every node is needed by a later one;
    instances receive at most one parent on the way. None when an abstract node is left with nothing to lean on.

    `asked` is a list with repeats: a node wanted twice is twice as likely to come next (kept). Nodes that
    are out stay in it, where nothing sees them: they are neither `free` nor in the `rest`.
    """
    children = Counter(parent for own in parents.values() for parent in own)
    asked: list[str] = []
    free = [key for key in parents if not children[key]]
    rest = list(parents)
    backwards: list[str] = []

    def weighted(candidates: list[str]) -> str:
        once = math.exp(abs(rng.gauss(0.0, 1.0)))
        weights = (1.0, once, once * once)
        return rng.choices(candidates, [weights[(key in structure.abstract) + (key in asked)] for key in candidates])[0]

    while True:
        key = pick(rng, [k for k in asked if k in free] if backwards else free)
        backwards.append(key)
        rest.remove(key)
        free.remove(key)
        for parent in parents[key]:
            asked.append(parent)
            children[parent] -= 1
            if not children[parent]:
                free.append(parent)
        if not rest:
            return backwards[::-1]
        if not any(k in free for k in asked):
            if key in structure.abstract:
                return None
            extra = weighted(free)
        elif key not in structure.abstract and rng.random() < 0.5:
            extra = weighted(rest)
        else:
            continue
        parents[key].append(extra)
        asked.append(extra)


def _spend_ops(rng: random.Random, structure: _Structure, order: list[str], parents: dict[str, list[str]], n: int) -> bool:
    """Stage 4: hands out the remaining operations and gives every instance its parents; False when n is too large.

    With a parent from stage 3 and one slot, a constant comes on top of it; and the branch without a reserved
    constant may still pick one (both kept).
    """
    cost = [_cost(parents[key]) for key in order]
    instances = [i for i, key in enumerate(order) if key not in structure.abstract]
    open_ = [i for i in instances if cost[i] < min(3, i)]
    for _ in range(n - sum(cost)):
        if not open_:
            return False
        i = pick(rng, open_)
        cost[i] += 1
        if cost[i] == min(3, i):
            open_.remove(i)
    for i in instances:
        own = parents[order[i]]
        pool = order[:i] + [CONSTANT]
        degree = min(_integer(rng, 1, 2) if cost[i] == 1 else cost[i] + 1, len(pool))
        if own:
            pool.remove(own[0])
            degree -= 1
        if degree == len(pool):
            own += pool
        elif rng.random() < 0.5:
            own += [CONSTANT, *rng.sample(pool[:-1], max(0, degree - 1))]
        else:
            own += rng.sample(pool, degree)
    return True


def _redundant(rng: random.Random, structure: _Structure, order: list[str], parents: dict[str, list[str]]) -> list[str]:
    """Stage 5: the instances the question does not need, each defined by what is already in the graph."""
    remaining = [key for key in structure.instances if key not in parents]
    rng.shuffle(remaining)
    reusable: list[str] = []
    redundant: list[str] = []
    for key in remaining:
        if rng.random() < 0.5:
            pool = list(reusable)
            reusable.append(key)
        else:
            pool = order + [a for a in structure.abstract if a not in parents
                            and all(parent in parents for parent in structure.parents_of[a])]
        size = len(pool) + 1  # the constant is one more choice
        degree = 1
        while degree < min(4, size) and rng.random() < 0.5:
            degree += 1
        if degree == size:
            chosen = [*pool, CONSTANT]
        elif rng.random() < 0.5:
            chosen = [CONSTANT, *rng.sample(pool, degree - 1)]
        else:
            chosen = rng.sample(pool, degree)
        for parent in chosen:
            if parent != CONSTANT and parent not in parents:
                parents[parent] = list(structure.parents_of[parent])
                redundant.append(parent)
        parents[key] = chosen
        redundant.append(key)
    return redundant


# --- expressions ---------------------------------------------------------------------------------------------


def _node(rng: random.Random, structure: _Structure, key: str, parents: list[str]) -> Node:
    owner, item = structure.owner_item[key]
    if level := structure.abstract.get(key):
        pairs = tuple(parents) if level == 1 else tuple(("*", a, b) for a, b in zip(parents[::2], parents[1::2]))
        return Node(owner, item, pairs[0] if len(pairs) == 1 else ("+", *pairs), stated=False)
    return Node(owner, item, _expression(rng, parents))


def _expression(rng: random.Random, parents: list[str]) -> Expr:
    """c | A | A ± B | A + B + C (+ D), or "c more than / c times" one of these."""
    operands = [parent for parent in parents if parent != CONSTANT]
    rng.shuffle(operands)
    group: Expr | None = None
    if len(operands) == 1:
        group = operands[0]
    elif operands:
        group = (pick(rng, "+-") if len(operands) == 2 else "+", *operands)
    if CONSTANT not in parents:
        return group
    constant = _integer(rng, 0, 9)
    return constant if group is None else (pick(rng, "+*"), constant, group)
