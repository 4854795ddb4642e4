"""The optimizers by name, and the table of optimizers that the docs and `jgd optimizers` show.

The table is read from the code: formulas and papers from the docstrings, numbers and defaults from
the signatures, the size of the state from `jax.eval_shape`.
"""

import difflib
import inspect
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jgd.optimizers
from jgd.calls import spec_of

__all__ = ["Entry", "entries", "get", "markdown"]


class Entry(NamedTuple):
    """Entry of the table: an optimizer."""

    name: str
    title: str  # the first words of the docstring
    formula: str  # the formula in the docstring, on one line
    trees: float  # size of the state for a 1024 x 1024 matrix, relative to the matrix
    numbers: dict[str, Any]  # name -> default, `...` if it is required
    source: str
    own: bool  # False: lifted from optax


def _names() -> dict[str, bool]:
    """Return the name of each optimizer, with False if its math is lifted from optax."""
    lifted = jgd.optimizers.lifted
    families = jgd.optimizers.families
    pairs = [(name, family is not lifted) for family in families for name in family.__all__]
    return {name: own for name, own in pairs if not name.startswith("scale_by_")}


def get(name: str) -> Callable[..., Any]:
    """Return the factory of an optimizer by its name: `get("adam")(1e-3)` is `adam(1e-3)`.

    Raises: ValueError for an unknown name; the error suggests the closest one.
    """
    names = _names()
    if name not in names:
        close = difflib.get_close_matches(str(name), names, n=1, cutoff=0.45)
        hint = f"did you mean {close[0]!r}?" if close else "`jgd optimizers` lists them"
        raise ValueError(f"no optimizer named {name!r}; {hint}")
    return getattr(jgd.optimizers, name)


def entries() -> list[Entry]:
    """Return the entries of all optimizers, sorted by name."""
    return [_entry(name, own) for name, own in sorted(_names().items())]


def _entry(name: str, own: bool) -> Entry:
    factory = get(name)
    spec = spec_of(factory)
    text = inspect.getdoc(factory) or ""  # without indentation, as Python 3.13 stores it
    numeric = spec.numeric()
    parameters = spec.signature.parameters
    empty = parameters[numeric[0]].empty
    numbers = {n: ... if parameters[n].default is empty else parameters[n].default for n in numeric}
    block = re.search(r"\n\n((?: {4}.+\n)+)", text)
    statements = re.split(r"\n| {3,}", block[1].strip()) if block else []
    source = re.search(r"Source: (.*?)\.?\s*\Z", text, re.DOTALL)
    return Entry(
        name,
        text.partition(":")[0],
        "; ".join(re.sub(" +", " ", part.strip()) for part in statements if part.strip()),
        _trees(factory(*[0.1] * sum(default is ... for default in numbers.values()))),
        numbers,
        re.sub(r"\s+", " ", source[1]) if source else "",
        own,
    )


def _trees(tx: Any) -> float:
    matrix = jax.ShapeDtypeStruct((1024, 1024), jnp.float32)
    state = jax.eval_shape(tx.init, {"w": matrix})
    sizes = [x.size for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    return round(sum(sizes) / matrix.size, 2)


HEADER = ["name", "formula", "state", "numbers", "source", "math"]


def cells(entry: Entry) -> list[str]:
    """Return an entry as a row under `HEADER`."""
    numbers = [n if x is ... else f"{n}={_short(x)}" for n, x in entry.numbers.items()]
    origin = "own" if entry.own else "lifted"
    return [entry.name, entry.formula, f"{entry.trees:g}", ", ".join(numbers), entry.source, origin]


def _short(default: Any) -> str:
    if isinstance(default, tuple):
        return f"({', '.join(map(_short, default))})"
    return f"{default:g}" if isinstance(default, int | float) else repr(default)


def markdown() -> str:
    """Return the table as Markdown."""
    rows = [HEADER, ["---"] * len(HEADER)]
    for entry in entries():
        name, formula, trees, numbers, source, origin = cells(entry)
        rows.append([f"`{name}`", f"`{formula}`", trees, f"`{numbers}`", source, origin])
    return "\n".join("| " + " | ".join(x.replace("|", "\\|") for x in row) + " |" for row in rows)


def _main(path: str) -> None:
    """Write the table between its two markers in a file."""
    text = pathlib.Path(path).read_text()
    before, mark, rest = text.partition("<!-- optimizers -->\n")
    _, end, after = rest.partition("<!-- end -->")
    pathlib.Path(path).write_text(f"{before}{mark}\n{markdown()}\n\n{end}{after}")


if __name__ == "__main__":
    _main(sys.argv[1])
