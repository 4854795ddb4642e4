"""The optimizers by name, and the table of optimizers."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from table import own_optimizers

import jgd
import jgd.optimizers
from jgd import catalog

TABLE = Path(__file__).parent.parent / "docs" / "optimizers.md"


def test_get_returns_factories_and_suggests_names():
    for entry in catalog.entries():
        assert jgd.get(entry.name) is getattr(jgd, entry.name)
    with pytest.raises(ValueError, match=r"no optimizer named 'rmsprob'; did you mean 'rmsprop'\?"):
        jgd.get("rmsprob")
    with pytest.raises(ValueError, match="no optimizer named 'scale_by_adam'"):
        jgd.get("scale_by_adam")


def test_every_entry_is_complete():
    entries = catalog.entries()
    lifted = [n for n in jgd.optimizers.lifted.__all__ if not n.startswith("scale_by_")]
    assert {e.name for e in entries} == {*own_optimizers(), *lifted}
    for entry in entries:
        assert entry.own == (entry.name not in lifted)
        assert re.search(r"(^|; )u =", entry.formula), entry
        assert entry.source, entry
        assert entry.numbers, entry


def test_the_table_in_the_docs_equals_the_code():
    _, _, rest = TABLE.read_text().partition("<!-- optimizers -->\n")
    table, _, _ = rest.partition("<!-- end -->")
    assert table.strip() == catalog.markdown(), "run `python -m jgd.catalog docs/optimizers.md`"


COUNTS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4}
SQUARES = (1000**2 + 1000**2 + 100**2) / 1e8  # one square matrix for each axis of 1000 x 1000 x 100
EXTRA = {"adafactor": 2e-4, "sm3": 2e-4, "shampoo": SQUARES, "soap": 2 * SQUARES}


def _documented(factory):
    """Return the number of trees that the docstring states first, without conditions."""
    text = re.sub(r"\s+", " ", factory.__doc__)
    state = re.search(r"State: (.*?)(?: Raises:| Differs from:)", text)[1]
    if other := re.match(r"as (?:in )?`(\w+)`", state):
        return _documented(jgd.get(other[1]))
    if state.startswith("none"):
        return 0
    match = re.search(r"\b(\w+) trees?\b(?!')", state.split(";")[0])
    return COUNTS[match[1]] if match else 0


@pytest.mark.parametrize("name", own_optimizers())
def test_the_size_of_the_state_is_as_documented(name):
    """The size is that of the docstring for a hundred million parameters, computed from shapes."""
    factory = jgd.get(name)
    entry = next(e for e in catalog.entries() if e.name == name)
    tx = factory(*[0.1] * sum(x is ... for x in entry.numbers.values()))
    shape = (1000, 1000, 100) if name in ("shampoo", "soap") else (10_000, 10_000)
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    trees = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 4e8
    assert trees == pytest.approx(_documented(factory) + EXTRA.get(name, 0), abs=1e-6)
