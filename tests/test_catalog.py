"""The optimizers by name, and the table of them."""

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


def test_get_gives_factories_and_suggests():
    for entry in catalog.entries():
        assert jgd.get(entry.name) is getattr(jgd, entry.name)
    with pytest.raises(ValueError, match=r"no optimizer named 'rmsprob'; did you mean 'rmsprop'\?"):
        jgd.get("rmsprob")
    with pytest.raises(ValueError, match="no optimizer named 'scale_by_adam'"):
        jgd.get("scale_by_adam")


def test_every_entry_is_whole():
    entries = catalog.entries()
    lifted = [n for n in jgd.optimizers.lifted.__all__ if not n.startswith("scale_by_")]
    assert {e.name for e in entries} == {*own_optimizers(), *lifted}
    for entry in entries:
        assert entry.own == (entry.name not in lifted)
        assert re.search(r"(^|; )u =", entry.formula), entry
        assert entry.source, entry
        assert entry.numbers, entry


def test_the_table_in_the_docs_is_the_code_s():
    _, _, rest = TABLE.read_text().partition("<!-- optimizers -->\n")
    table, _, _ = rest.partition("<!-- end -->")
    assert table.strip() == catalog.markdown(), "run `python -m jgd.catalog docs/optimizers.md`"


COUNTS = {"no": 0, "one": 1, "two": 2, "three": 3, "four": 4}
SQUARES = (1000**2 + 1000**2 + 100**2) / 1e8  # a matrix for each axis of 1000 x 1000 x 100
BESIDE = {"adafactor": 2e-4, "sm3": 2e-4, "shampoo": SQUARES, "soap": 2 * SQUARES}


def _said(factory):
    """How many trees the docstring names first, with no conditions."""
    text = re.sub(r"\s+", " ", factory.__doc__)
    state = re.search(r"State: (.*?)(?: Raises:| Differs from:)", text)[1]
    if other := re.match(r"as `(\w+)`", state):
        return _said(jgd.get(other[1]))
    if state.startswith("none"):
        return 0
    found = re.search(r"\b(\w+) trees?\b(?!')", state.split(";")[0])
    return COUNTS[found[1]] if found else 0


@pytest.mark.parametrize("name", own_optimizers())
def test_state_takes_what_its_docstring_says(name):
    """At a hundred million parameters, by shape alone."""
    factory = jgd.get(name)
    entry = next(e for e in catalog.entries() if e.name == name)
    tx = factory(*[0.1] * sum(x is ... for x in entry.numbers.values()))
    shape = (1000, 1000, 100) if name in ("shampoo", "soap") else (10_000, 10_000)
    state = jax.eval_shape(tx.init, {"w": jax.ShapeDtypeStruct(shape, jnp.float32)})
    trees = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)) / 4e8
    assert trees == pytest.approx(_said(factory) + BESIDE.get(name, 0), abs=1e-6)
