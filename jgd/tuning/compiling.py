"""Compilation ahead of time, with the arrays that a function closes over as arguments.

    compiler = Compiler(mesh)
    program = compiler.compiled(f, *examples)       # program(*arguments)

If a program contained its data as constants, XLA would spend seconds on analyzing them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from jgd.tuning import devices

__all__ = ["Compiled", "Compiler", "LeafSpec", "has_decomposition"]

DECOMPOSITIONS = {
    *("cholesky", "eig", "eigh", "geqrf", "hessenberg", "householder_product", "lu", "ormqr", "qr"),
    *("schur", "svd", "triangular_solve", "tridiagonal", "tridiagonal_solve"),
}


class Compiled:
    """A compiled program and the arrays it closes over."""

    def __init__(self, program: Any, constants: list[jax.Array]) -> None:
        self.program, self.constants = program, constants

    def __call__(self, *arguments: Any) -> Any:
        return self.program(self.constants, *arguments)

    def bytes(self) -> int:
        """Return the bytes that a call needs beside its arguments; 0 if unknown."""
        analysis = self.program.memory_analysis()
        if analysis is None:
            return 0
        return analysis.temp_size_in_bytes + 2 * analysis.output_size_in_bytes


class Compiler:
    """Compiler of programs for one mesh. Programs share the arrays they close over."""

    def __init__(self, mesh: jax.sharding.Mesh | None) -> None:
        self.on_all, self.by_lane = devices.on_all(mesh), devices.by_lane(mesh)
        self._placed = dict[int, tuple[Any, jax.Array]]()

    def compiled(
        self, f: Callable[..., Any], *examples: Any, donate: bool = False, out: Any = None
    ) -> Compiled:
        """Return `f` compiled for arguments like the examples.

        Args:
          donate: whether to donate the first argument.
          out: the sharding of all results; None: XLA chooses.
        """
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*examples)
        structure = jax.tree.structure(shape)

        def flat(constants: Any, *arguments: Any) -> Any:
            leaves = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(arguments))
            return jax.tree.unflatten(structure, leaves)

        for x in closed.consts:  # keeps the original alive, so that its id() is not reused
            self._placed.setdefault(id(x), (x, devices.placed(x, self.on_all)))
        constants = [self._placed[id(x)][1] for x in closed.consts]
        sharding: dict[str, Any] = {} if out is None else {"out_shardings": out}
        program = jax.jit(flat, donate_argnums=1 if donate else (), **sharding)
        return Compiled(program.lower(constants, *examples).compile(), constants)


class LeafSpec:
    """The form of a leaf of lanes outside the program: its dtype, or the bits of random keys.

    Lanes on the host and in files are then plain arrays.
    """

    def __init__(self, dtype: Any) -> None:
        self.is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        self.dtype = dtype
        self.impl = str(jax.random.key_impl(jnp.zeros([], dtype))) if self.is_key else None

    def pack(self, x: Any) -> jax.Array:
        """Return a leaf in its form outside the program."""
        if self.is_key:
            return jax.random.key_data(x)
        return x if x.dtype == self.dtype else x.astype(self.dtype)

    def unpack(self, x: Any) -> jax.Array:
        """Return a leaf in its form inside the program."""
        return jax.random.wrap_key_data(x, impl=self.impl) if self.is_key else x


def has_decomposition(jaxpr: Any) -> bool:
    """Return whether a program decomposes matrices.

    On a CPU, batched decompositions in two programs that run at once can deadlock: each waits for
    threads that the other one holds.
    """
    return any(name in DECOMPOSITIONS for name in _primitives(jaxpr))


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Yield the names of all primitives, including those of inner programs."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _primitives(inner)
