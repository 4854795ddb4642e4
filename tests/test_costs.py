"""An update of jgd costs about as much as optax's, in stack frames, equations, bytes and kernels.

The bounds are relative to optax in the same process. `benchmarks/step.py` measures time.
"""

import costs
import pytest
from conftest import release

import jgd

CASES = [(name, "small") for name in costs.OPTIMIZERS] + [("adam", "GPT-2")]


@pytest.mark.skipif(release("jaxlib") < (0, 8), reason="jaxlib 0.7.0 may abort in clear_caches")
@pytest.mark.parametrize(("name", "tree"), CASES)
def test_few_frames_between_update_and_arithmetic(name, tree):
    deepest = costs.frames(costs.OPTIMIZERS[name](jgd), costs.TREES[tree], jgd)
    assert deepest <= costs.FRAMES_OF.get(name, costs.FRAMES)


@pytest.mark.parametrize(("name", "tree"), CASES)
def test_program_costs_as_much_as_that_of_optax(name, tree):
    programs = []
    for library in (jgd, costs.OPTAX):
        tx = costs.OPTIMIZERS[name](library)
        traced = costs.trace(tx, costs.shapes_of_arguments(tx, costs.TREES[tree]))
        programs.append(costs.counts(traced, traced.lower().compile()))
    ours, theirs = programs
    ratios = {count: ours[count] / theirs[count] for count in costs.BOUNDS}
    excessive = {count: r for count, r in ratios.items() if r > costs.BOUNDS[count]}
    assert not excessive, f"{name}, {tree}: jgd {ours}, optax {theirs}"
