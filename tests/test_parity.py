"""Worked answers beside those of the code published with the paper: steps, failed attempts, restatements, lengths.

Their figures are means and standard deviations over problems of the same filters (|answer| < 1000, zeros not thinned). What
the two have in common is counted in nodes, sentences and operations; wordings are each one's own, so lengths are compared
where no word is involved, and roughly elsewhere. (The problems themselves are compared in test_igsm.py.)
"""

import random
from collections import Counter
from math import sqrt
from statistics import mean, stdev

import pytest

from minibridge import igsm, traces
from minibridge.traces import BRIDGE, VANILLA, Behaviors
from minibridge.verify import verify

PAPER, LONG = (15, 20), (21, 25)
COUNT = {PAPER: 500, LONG: 300}  # of problems, theirs and ours

# mean, standard deviation
BRIDGE_MEANS = {
    PAPER: {"steps": (13.21, 2.57), "failed": (.89, .95), "restatements": (3.88, 1.63), "redundant picks": (.178, .5),
            "redundant solved": (.116, .4), "early": (.074, .3)},
    LONG: {"steps": (16.44, 3.27), "failed": (1.15, .98), "restatements": (5.34, 1.96), "redundant picks": (.193, .5),
           "redundant solved": (.107, .4), "early": (.120, .4)},
}
# failed attempts per answer, and the share of answers without any, by probability
REFLECTION = {PAPER: {.05: (.36, .70), .1: (.80, .46), .2: (1.57, .19), .3: (2.46, .07)},
              LONG: {.05: (.50, .61), .1: (1.13, .32), .2: (2.44, .07), .3: (3.39, .05)}}
# characters, over those of the vanilla answers to the same problems
ARMS = {"vanilla": VANILLA, "subgoal": Behaviors(subgoal=True), "analysis": Behaviors(analysis=2),
        "reflection": Behaviors(reflection=.1), "level 1": Behaviors(True, 1, .1), "bridge": BRIDGE,
        "level 3": Behaviors(True, 3, .1), "level 4": Behaviors(True, 4, .1), "p 0.3": Behaviors(True, 2, .3)}
LENGTHS = {PAPER: (1489, 1531, 1873, 1694, 1950, 2148, 2334, 2464, 2622),
           LONG: (1834, 1910, 2393, 2069, 2510, 2798, 3011, 3130, 3441)}


@pytest.fixture(scope="module", params=COUNT, ids=str)
def kept(request):
    """(op range, its problems)"""
    rng, problems = random.Random(f"parity {request.param}"), []
    while len(problems) < COUNT[request.param]:
        problem = igsm.attempt(rng, request.param)
        if problem is not None and abs(problem.answer) < 1000:
            problems.append(problem)
    return request.param, problems


def close(ours, theirs, spread, size):
    """Within three standard errors, those of the two samples taken together."""
    error = sqrt(stdev(ours) ** 2 / len(ours) + spread**2 / size)
    assert abs(mean(ours) - theirs) <= 3 * error, f"{mean(ours):.3f}, not {theirs} ± {error:.3f}"


def counted(problem, text) -> dict:
    """What an answer of the arm holds, read from its text."""
    verdict = verify(problem, text)
    assert verdict.correct
    tried = [step.node for step in verdict.steps if step.kind in ("step", "failed attempt")]
    solved = [step.node for step in verdict.steps if step.kind == "step"]
    redundant, place = set(problem.redundant), {key: i for i, key in enumerate(problem.order)}
    turns = [place[key] for key in solved if key in place]
    return {"steps": len(tried), "failed": verdict.attempts, "restatements": verdict.restatements,
            "redundant picks": sum(key in redundant for key in tried),
            "redundant solved": sum(key in redundant for key in solved),
            "early": sum(any(later < turn for later in turns[i + 1:]) for i, turn in enumerate(turns))}


def test_bridge_answers_of_the_published_code(kept):
    ops, problems = kept
    found = [counted(problem, traces.answer(problem, random.Random(problem.id), BRIDGE)) for problem in problems]
    for measure, (theirs, spread) in BRIDGE_MEANS[ops].items():
        close([counts[measure] for counts in found], theirs, spread, COUNT[ops])


def test_vanilla_answers_have_one_step_a_necessary_node(kept):
    for problem in kept[1][:100]:
        counts = Counter(counted(problem, traces.answer(problem, random.Random(problem.id), VANILLA)))
        assert +counts == {"steps": len(problem.order)}


def test_reflections_by_probability(kept):
    """One answer a problem, as there; their spread is taken to be ours."""
    ops, problems = kept
    for p, (theirs, without) in REFLECTION[ops].items():
        failed = [sum(bool(attempt.missing) for attempt in traces.plan(problem, random.Random(problem.id), p))
                  for problem in problems]
        close(failed, theirs, stdev(failed), COUNT[ops])
        close([float(count == 0) for count in failed], without, sqrt(without * (1 - without)), COUNT[ops])


def test_lengths_over_vanilla(kept):
    """Subgoals add no word, so their extra characters agree; with words of one's own, the arms come in the same order and
    lie within a quarter of vanilla's length."""
    ops, problems = kept
    lengths = {arm: [len(traces.answer(problem, random.Random(problem.id), behaviors)) for problem in problems]
               for arm, behaviors in ARMS.items()}
    extra = [longer - plain for longer, plain in zip(lengths["subgoal"], lengths["vanilla"])]
    close(extra, LENGTHS[ops][1] - LENGTHS[ops][0], stdev(extra), COUNT[ops])
    ratios = {arm: mean(values) / mean(lengths["vanilla"]) for arm, values in lengths.items()}
    theirs = {arm: length / LENGTHS[ops][0] for arm, length in zip(ARMS, LENGTHS[ops])}
    for arm in ARMS:
        assert abs(ratios[arm] - theirs[arm]) < .25, (arm, ratios[arm], theirs[arm])
    by_level = ["vanilla", "subgoal", "level 1", "bridge", "level 3", "level 4"]
    assert sorted(by_level, key=ratios.get) == by_level and ratios["bridge"] < ratios["p 0.3"]
