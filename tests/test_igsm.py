"""Drawn problems: the statistics of the paper's own generator, the op count, the structure, the filters."""

import random
from collections import Counter, defaultdict
from dataclasses import replace
from math import exp, sqrt
from statistics import NormalDist, mean, stdev
from types import SimpleNamespace

import pytest

from conftest import FREE_TOY
from minibridge import igsm
from minibridge.config import InputError
from minibridge.dag import Node, Problem, leaves
from minibridge.worlds import TOY_WORLDS, WORLDS

PAPER, LONG = (15, 20), (21, 25)
KEPT = {PAPER: 1500, LONG: 1000}  # problems drawn here, of the training and of the validation range


# --- the vocabulary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("worlds", [WORLDS, TOY_WORLDS], ids=["paper", "toy"])
def test_worlds_are_well_formed(worlds):
    for world in worlds:
        assert len(world) == 4
        categories = [category for category, _ in world]
        names = [name for _, themes in world for theme in themes for name in theme]
        assert all(themes and all(len(theme) >= 4 for theme in themes) for _, themes in world)
        assert len({*names, *categories}) == len(names) + len(categories)  # each once, and no name a category
        for name in names + categories:
            assert name == name.strip() and name.replace(" ", "").isalpha()  # so no "'s", comma or full stop
            assert not {"and", "each", "of", "does", "is", "are"} & set(name.lower().split())


# --- statistics ----------------------------------------------------------------------------------------

# Measured with the generator published with the paper, over problems with |answer| < 1000, before zeros are
# thinned out. Means over problems: mean, standard deviation, sample size.
MEANS = {
    PAPER: {"necessary": (12.10, 2.17, 3000), "abstract": (3.46, 1.79, 3000), "redundant": (2.59, 3.35, 3000),
            "conditions": (10.95, 3.57, 3000), "parents": (1.57, .26, 500), "degree": (2.07, .31, 500)},
    LONG: {"necessary": (15.34, 2.86, 2000), "abstract": (4.83, 2.56, 2000), "redundant": (1.50, 2.56, 2000),
           "conditions": (11.85, 3.15, 2000), "parents": (1.75, .30, 300), "degree": (2.23, .36, 300)},
}
# Shares: share, sample size.
SHARES = {
    PAPER: {"given up": (.178, 7500), "rejected": (.527, 8461), "zero": (.185, 6000),
            "abstract target": (.51, 500), "op counts": ((.358, .261, .186, .120, .055, .020), 3000),
            "constant": (.69, 13000), "degrees": ((.33, .41, .19, .07), 4400),
            "redundant degrees": ((.60, .24, .09, .08), 1300)},
    LONG: {"given up": (.241, 8800), "rejected": (.696, 9868), "zero": (.261, 6300),
           "abstract target": (.57, 300), "op counts": ((.403, .290, .182, .099, .026), 2000),
           "degrees": ((.30, .36, .22, .13), 3200),
           "redundant degrees": ((.61, .20, .11, .08), 430)},
}


@pytest.fixture(scope="module")
def attempts():
    """Attempts of one random stream for each op range, until enough of them would be kept."""
    made = {}
    for ops, needed in KEPT.items():
        rng, made[ops] = random.Random(f"statistics {ops}"), []
        while needed:
            made[ops].append(igsm.attempt(rng, ops))
            needed -= made[ops][-1] is not None and abs(made[ops][-1].answer) < 1000
    return made


@pytest.fixture(scope="module")
def made(attempts):
    """Every problem made, the answers the filter rejects included."""
    return {ops: [problem for problem in attempts[ops] if problem is not None] for ops in attempts}


@pytest.fixture(scope="module")
def kept(made):
    return {ops: [problem for problem in made[ops] if abs(problem.answer) < 1000] for ops in made}


def check_share(values, share, size, rounding=.0005):
    """The share of true values agrees with that of another sample, within 3 standard errors of both."""
    values = list(values)
    error = sqrt(share * (1 - share) * (1 / len(values) + 1 / size))
    ours = mean(values)
    assert abs(ours - share) <= 3 * error + rounding, f"{ours:.4f}, not {share} ± {error:.4f}"


def check_distribution(values, shares, size, first=1):
    values = list(values)
    assert set(values) <= set(range(first, first + len(shares)))
    for value, share in enumerate(shares, start=first):
        check_share([v == value for v in values], share, size, rounding=.005)


def fair(values, share=.5):
    """Coin tosses that are known to be fair: within 4 standard errors."""
    values = list(values)
    error = sqrt(share * (1 - share) / len(values))
    assert abs(mean(values) - share) <= 4 * error, f"{mean(values):.4f}, not {share} ± {error:.4f}"


MEASURES = {
    "necessary": lambda p: len(p.order),
    "abstract": lambda p: sum(not p.nodes[key].stated for key in p.order),
    "redundant": lambda p: len(p.redundant),
    "conditions": lambda p: sum(node.stated for node in p.nodes.values()),
    "parents": lambda p: mean(len(p.nodes[key].parents) for key in p.order),
    "degree": lambda p: mean(p.nodes[key].degree for key in p.order),
}


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("ops", MEANS, ids=str)
def test_means_of_the_published_generator(kept, ops, measure):
    ours = [MEASURES[measure](problem) for problem in kept[ops]]
    theirs, spread, size = MEANS[ops][measure]
    error = sqrt(stdev(ours) ** 2 / len(ours) + spread**2 / size)
    assert abs(mean(ours) - theirs) <= 3 * error, f"{mean(ours):.3f}, not {theirs} ± {error:.3f}"
    assert stdev(ours) == pytest.approx(spread, rel=.25)  # long tails: a rough check


@pytest.mark.parametrize("ops", SHARES, ids=str)
def test_shares_of_the_published_generator(attempts, made, kept, ops):
    shares = SHARES[ops]
    check_share([p is None for p in attempts[ops]], *shares["given up"])
    check_share([abs(p.answer) >= 1000 for p in made[ops]], *shares["rejected"])
    check_share([p.answer == 0 for p in kept[ops]], *shares["zero"])
    check_share([not p.nodes[p.target].stated for p in kept[ops]], *shares["abstract target"], rounding=.005)
    check_distribution([p.num_ops for p in kept[ops]], *shares["op counts"], first=ops[0])


def stated(problem, keys):
    return [problem.nodes[key] for key in keys if problem.nodes[key].stated]


@pytest.mark.parametrize("ops", SHARES, ids=str)
def test_in_degrees_of_the_published_generator(kept, ops):
    necessary = [node for problem in kept[ops] for node in stated(problem, problem.order)]
    redundant = [node for problem in kept[ops] for node in stated(problem, problem.redundant)]
    check_distribution([node.degree for node in necessary], *SHARES[ops]["degrees"])
    check_distribution([node.degree for node in redundant], *SHARES[ops]["redundant degrees"])
    if "constant" in SHARES[ops]:
        constants = [any(isinstance(leaf, int) for leaf in leaves(node.expr)) for node in necessary]
        check_share(constants, *SHARES[ops]["constant"], rounding=.005)


# --- what holds for every problem ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(made):
    toy = [igsm.draw(random.Random(seed), (1, 6), FREE_TOY) for seed in range(200)]
    return [*made[PAPER][:300], *made[LONG][:200], *toy]


def test_op_count_is_exact(everything):
    for problem in everything:
        costs = [max(1, problem.nodes[key].degree - 1) if problem.nodes[key].stated else
                 max(1, len(leaves(problem.nodes[key].expr)) - 1) for key in problem.order]
        assert sum(costs) == problem.num_ops


def test_the_question_needs_every_necessary_node_and_no_redundant_one(everything):
    for problem in everything:
        needed, waiting = set(), [problem.target]
        while waiting:
            key = waiting.pop()
            needed.add(key)
            waiting += [parent for parent in problem.nodes[key].parents if parent not in needed]
        assert len(problem.order) == len(needed) and set(problem.order) == needed
        assert len(problem.redundant) == len(problem.nodes) - len(needed)
        assert set(problem.redundant) == problem.nodes.keys() - needed
        solved = set(problem.order)
        for key in problem.redundant:  # each after its parents
            assert not problem.missing(key, solved)
            solved.add(key)


def test_some_redundant_nodes_are_abstract_and_used_at_once(everything):
    used = 0
    for problem in everything:
        for i, key in enumerate(problem.redundant):
            if not problem.nodes[key].stated:
                user = next(node for node in stated(problem, problem.redundant[i:]))
                assert key in user.parents
                used += 1
    assert used > 20


def test_a_parent_found_on_the_way_is_rather_an_abstract_quantity():
    """Backwards from x, with y and the abstract A free: A has weight exp |g|, y weight 1, g a normal draw."""
    rng, chosen = random.Random(0), []
    while len(chosen) < 1500:
        parents = {"A": ["a"], "a": [], "x": [], "y": []}
        order = igsm._solving_order(rng, SimpleNamespace(abstract={"A"}), parents)
        if order is not None and order[-1] == "x":
            chosen.append(parents["x"] == ["A"])
    quantiles = [NormalDist().inv_cdf((i + .5) / 1000) for i in range(1000)]
    fair(chosen, mean(1 / (1 + exp(-abs(quantile))) for quantile in quantiles))


def test_an_abstract_quantity_that_is_asked_for_counts_twice():
    """p leans, if at all, on the abstract A, asked for by t, with weight exp 2 |g|, or on A's part b with weight 1."""
    rng, chosen = random.Random(0), []
    while len(chosen) < 15000:
        parents = {"t": ["p", "A"], "p": [], "A": ["b"], "b": []}
        order = igsm._solving_order(rng, SimpleNamespace(abstract={"t", "A"}), parents)
        if order is not None and order[-2] == "p" and parents["p"]:
            chosen.append(parents["p"] == ["A"])
    quantiles = [NormalDist().inv_cdf((i + .5) / 1000) for i in range(1000)]
    fair(chosen, mean(1 / (1 + exp(-2 * abs(quantile))) for quantile in quantiles))


def test_a_node_asked_for_twice_is_twice_as_likely_to_come_next():
    """Backwards from the abstract t, once u and v are out: a stands two times in the list, b once."""
    rng, abstract = random.Random(0), {"t", "u", "v"}
    orders = [igsm._solving_order(rng, SimpleNamespace(abstract=abstract), {"t": ["u", "v"], "u": ["a"], "v": ["a", "b"],
                                                                            "a": [], "b": []}) for _ in range(9000)]
    late = [order for order in orders if order[-1] == "t" and {"u", "v"} == set(order[2:4])]
    fair([order[1] == "a" for order in late], 2 / 3)


def test_an_instance_gets_a_parent_on_the_way_in_half_of_all_cases():
    """p and q are the parts of the abstract t: whichever comes out first may lean on the other."""
    rng, leaning = random.Random(0), []
    for _ in range(3000):
        parents = {"t": ["p", "q"], "p": [], "q": []}
        order = igsm._solving_order(rng, SimpleNamespace(abstract={"t"}), parents)
        leaning.append(bool(parents[order[1]]))
        assert not parents[order[0]]
    fair(leaning)


def test_layers_grow_with_one_probability_a_structure():
    """Two items in each of two layers, at most four, four edges: growth stops with a probability that is uniform over
    structures, so k items are added in 1 / ((k + 1) (k + 2)) of them; the upper layer gets none of these in .604."""
    rng, categories = random.Random(0), [("Bs", tuple("bcde")), ("As", tuple("stuv"))]
    grown = [len(igsm._structure(rng, 2, 2, 4, 4, categories).levels[1]) > 2 for _ in range(6000)]
    fair(grown, 1 - (1 / 2 + 1 / 6 / 2 + 1 / 12 / 4))


def test_any_consecutive_layers_of_a_world_may_be_used():
    rng = random.Random(0)
    places = [igsm._names(rng, 2, WORLDS) for _ in range(3000)]
    worlds = [[category for category, _ in world][::-1] for world in WORLDS]
    for first in range(3):
        fair([any(world[first:first + 2] == [category for category, _ in names] for world in worlds) for names in places],
             1 / 3)


# Item: the number of its world, its category, and the category's place, counted from the smallest parts up.
ITEMS = {name: (number, category, place) for number, world in enumerate(WORLDS + TOY_WORLDS)
         for place, (category, themes) in enumerate(reversed(world)) for theme in themes for name in theme}
PLACES = {category: place for _, category, place in ITEMS.values()}


def test_structures_are_layers_of_neighbouring_categories(everything):
    for problem in everything:
        scale = FREE_TOY if problem.num_ops <= 6 else igsm.PAPER
        edges = [(node.owner, node.item) for node in problem.nodes.values() if node.stated]
        assert all(key == f"{node.owner}'s {node.item}" for key, node in problem.nodes.items())
        assert len(edges) <= scale.instances
        layers = defaultdict(set)
        for owner, item in edges:
            assert ITEMS[owner][0] == ITEMS[item][0] and ITEMS[owner][2] == ITEMS[item][2] + 1
            layers[ITEMS[owner][2]].add(owner)
            layers[ITEMS[item][2]].add(item)
        assert 2 <= len(layers) <= max(scale.layers) and max(map(len, layers.values())) <= max(scale.widths)
        owners = {owner for owner, _ in edges}
        assert all(layers[place] <= owners for place in sorted(layers)[1:])  # nothing is empty
    assert {len(world) for world in WORLDS + TOY_WORLDS} == {4}


def test_abstract_quantities_count_what_the_items_hold(everything):
    levels = set()
    for problem in everything:
        inside = defaultdict(dict)
        for key, node in problem.nodes.items():
            if node.stated:
                inside[node.owner][node.item] = problem.values[key]

        def total(owner, category):
            """How many parts of a category one `owner` holds, at any depth."""
            return sum(number * (1 if ITEMS[item][1] == category else total(item, category))
                       for item, number in inside[owner].items())

        for key, node in problem.nodes.items():
            if not node.stated:
                levels.add(ITEMS[node.owner][2] - PLACES[node.item])
                assert problem.values[key] == total(node.owner, node.item)
    assert levels == {1, 2, 3}


def test_expressions(made):
    """Constant, copy, sum or difference of two, sum of more; a constant on top is added or multiplied."""
    seen = set()
    signs, operators, constants, swapped = [], [], [], []
    for problem in made[PAPER]:
        position = {key: i for i, key in enumerate((*problem.order, *problem.redundant))}
        for node in stated(problem, problem.nodes):
            expr, constant = node.expr, isinstance(node.expr, int)
            if isinstance(expr, tuple) and isinstance(expr[1], int):
                operators.append(expr[0] == "*")
                constants.append(expr[1])
                assert expr[0] in "+*" and len(expr) == 3
                expr, constant = expr[2], True
            elif constant:
                constants.append(expr)
            operands = () if isinstance(expr, int) else (expr,) if isinstance(expr, str) else expr[1:]
            assert all(isinstance(operand, str) for operand in operands)
            assert len(set(operands)) == len(operands)
            seen.add((len(operands), constant))
            if len(operands) == 2:
                signs.append(expr[0] == "-")
                swapped.append(position[operands[0]] > position[operands[1]])
            elif len(operands) > 2:
                assert expr[0] == "+"
    assert seen == {(0, True), (4, False), *((n, constant) for n in (1, 2, 3) for constant in (True, False))}
    fair(signs)
    fair(operators)
    fair(swapped)
    assert set(constants) == set(range(10))
    for digit in range(10):
        fair([constant == digit for constant in constants], 1 / 10)


# --- draw: filters, streams, impossible ranges ---------------------------------------------------------


def numbers(*values):
    """A problem whose nodes are these constants, the last one asked for."""
    nodes = [Node(f"Crate {i}", "Ball", value) for i, value in enumerate(values)]
    return Problem("igsm", {node.key: node for node in nodes}, tuple(node.key for node in nodes), (), 1)


def scripted(monkeypatch, *problems):
    script = iter(problems)
    monkeypatch.setattr(igsm, "attempt", lambda rng, ops, scale: next(script))


def test_only_answers_below_a_thousand_are_kept(monkeypatch):
    for answer in (999, -999):  # values on the way there are not bounded at the paper's scale
        scripted(monkeypatch, None, numbers(1000), numbers(-1000), numbers(123456), numbers(5000, answer))
        assert igsm.draw(random.Random(0)).answer == answer


def test_cap_bounds_every_value(monkeypatch):
    scripted(monkeypatch, numbers(50, 1), numbers(-50, 1), numbers(1, 50), numbers(-49, 49))
    assert igsm.draw(random.Random(0), (1, 6), FREE_TOY) == numbers(-49, 49)


def test_toy_problems_stay_small():
    for seed in range(200):
        problem = igsm.draw(random.Random(seed), (1, 8), FREE_TOY)
        assert all(abs(value) < 50 for value in problem.values.values())
        assert len(problem.nodes) <= len(FREE_TOY.letters)


@pytest.mark.parametrize("most", [0, 2])
def test_a_scale_limits_the_redundant_quantities(most):
    scale = replace(igsm.TOY, redundant=most)
    counts = {len(igsm.draw(random.Random(seed), (1, 8), scale).redundant) for seed in range(100)}
    assert counts == {*range(most + 1)}


@pytest.mark.parametrize("ops, share", [((15, 20), .5), ((20, 20), .5), ((18, 25), .5),
                                        ((21, 25), .4 / 1.4), ((25, 25), .4 / 1.4)])
def test_six_in_ten_zeros_are_dropped_above_twenty_operations(monkeypatch, ops, share):
    monkeypatch.setattr(igsm, "attempt", lambda rng, ops, scale: numbers(rng.randrange(2)))
    rng = random.Random(0)
    fair([igsm.draw(rng, ops).answer == 0 for _ in range(2000)], share)


def test_same_stream_same_problem():
    before = random.getstate()
    drawn = [[igsm.draw(random.Random(seed)).to_dict() for seed in range(5)] for _ in range(2)]
    assert drawn[0] == drawn[1]
    assert len({str(problem) for problem in drawn[0]}) == 5
    assert random.getstate() == before  # global randomness is left alone


@pytest.mark.parametrize("ops", [(1, 1), (2, 4), (7, 7), (15, 20), (25, 25)], ids=str)
def test_op_range_is_kept(ops):
    drawn = {igsm.draw(random.Random(seed), ops).num_ops for seed in range(30)}
    assert drawn <= set(range(ops[0], ops[1] + 1))


def test_a_stream_that_needs_many_draws_still_gives_a_problem():
    """This one more than 500; one such stream would end a whole file."""
    assert 21 <= igsm.draw(random.Random(470), (21, 25), igsm.TOY).num_ops <= 25


@pytest.mark.parametrize("ops", [(0, 3), (-1, 1), (5, 3), (60, 60)], ids=str)
def test_impossible_ranges(monkeypatch, ops):
    monkeypatch.setattr(igsm, "MAX_DRAWS", 100)
    with pytest.raises(InputError, match=f"ops: .*{ops[0]}-{ops[1]}[^\n]*$"):
        igsm.draw(random.Random(0), ops, FREE_TOY)


def test_a_value_of_more_than_a_hundred_digits_is_drawn_again():
    """The first attempt of this stream has one."""
    rng = random.Random("0/test/25-25/562")
    assert igsm.draw(rng, (25, 25), igsm.PAPER).num_ops == 25


def test_every_name_of_every_world_comes_up(made):
    used = {name for problems in made.values() for problem in problems for node in problem.nodes.values()
            for name in (node.owner, node.item)}
    assert used >= {name for world in WORLDS for _, themes in world for theme in themes for name in theme}


def test_instances_that_fill_the_budget_and_redundant_ones_come_in_random_order():
    def even(counts, keys):
        assert counts.keys() == set(keys)
        for key in keys:
            fair([True] * counts[key] + [False] * (draws - counts[key]), 1 / len(keys))

    categories = [("Cs", tuple("cdef")), ("Bs", tuple("bghi")), ("As", tuple("stuv"))]
    rng, draws = random.Random(0), 2000
    structure = igsm._structure(random.Random(1), 3, 2, 2, 8, categories)
    even(Counter(key for _ in range(draws) for key in igsm._necessary(rng, structure, 0, 1)), structure.instances)
    asked, *others = structure.instances
    drawn = (igsm._redundant(rng, structure, [asked], {asked: [igsm.CONSTANT]}) for _ in range(draws))
    even(Counter(next(key for key in keys if key in others) for keys in drawn), others)


def test_a_redundant_quantity_leans_on_redundant_ones_in_half_of_all_cases():
    """One quantity is in the graph; the first redundant one has no others to lean on, and then is a constant."""
    categories = [("Bs", tuple("bghi")), ("As", tuple("stuv"))]
    rng, draws, found = random.Random(0), 4000, Counter()
    structure = igsm._structure(random.Random(1), 2, 2, 2, 4, categories)
    asked = structure.instances[0]
    for _ in range(draws):
        parents = {asked: [igsm.CONSTANT]}
        first, *_ = igsm._redundant(rng, structure, [asked], parents)
        found[tuple(sorted(parents[first]))] += 1
    shares = {(igsm.CONSTANT,): 5 / 8, tuple(sorted((asked, igsm.CONSTANT))): 1 / 4, (asked,): 1 / 8}
    assert found.keys() == shares.keys()
    for chosen, share in shares.items():
        fair([True] * found[chosen] + [False] * (draws - found[chosen]), share)
