"""Lookup of Keras's optimizers by name, as in `compile("adam")`."""

import difflib
from collections.abc import Callable
from typing import Any

from jgd.compat.keras import optimizers

__all__ = ["get"]


def get(name: str) -> Callable[..., Any]:
    """Return the optimizer with Keras's name: `get("adam")()` is Adam with Keras's defaults.

    Args:
      name: a class name of Keras in any case, as `keras.optimizers.get` takes it ("SGD",
        "adamw"), or a name in `jgd.compat.keras` ("schedule_free_adamw").

    Raises: ValueError for an unknown name; the error lists the closest names.
    Differs from: `keras.optimizers.get`, which returns an optimizer instead of its factory, and
      does not know "lamb"; `jgd.get`, whose optimizers have no default learning rate.
    """
    known = {_squeeze(factory): factory for factory in optimizers.__all__}
    factory = known.get(_squeeze(str(name)))
    if factory is None:
        close = difflib.get_close_matches(_squeeze(str(name)), known, cutoff=0.45)
        names = ", ".join(repr(known[match]) for match in close or sorted(known))
        raise ValueError(
            f"get: name must be an optimizer of Keras, got {name!r}."
            f" {'Did you mean' if close else 'Use one of'} {names}{'?' if close else '.'}"
        )
    return getattr(optimizers, factory)


def _squeeze(name: str) -> str:
    """Return a name in lower case without underscores."""
    return name.lower().replace("_", "")
