"""Lanes dealt out to devices, of one process or of several that run the same command.

A mesh has one axis, "lanes"; nothing is said along it inside a chunk. Between chunks every process
holds the same plan and the same numbers, so that all decide alike; only what the clock says is
asked of process 0, which alone writes.
"""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "agreed",
    "by_lane",
    "join",
    "mesh",
    "on_all",
    "placed",
    "refuse_another",
    "rounded",
    "tiles_at_once",
    "to_host",
    "writes",
]


def join(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several; before anything else is asked of jax.

    Args:
      coordinator: host:port of process 0, which listens on that address alone.
      processes: how many there are; None: as Slurm, Open MPI or the like say.
      process: which one this is, from 0; None: likewise.
    """
    jax.distributed.initialize(
        coordinator,
        num_processes=processes,
        process_id=process,
        coordinator_bind_address=coordinator,  # else process 0 listens to everybody
        heartbeat_timeout_seconds=20,
    )


def mesh(devices: int | None) -> jax.sharding.Mesh | None:
    """A mesh of the first devices; None for one alone. Several processes use all of theirs.

    Raises: ValueError for more devices than there are.
    """
    known = jax.devices()
    count = len(known) if devices is None else devices
    if jax.process_count() > 1 and count != len(known):
        raise ValueError(f"sweep: several processes use all their {len(known)} devices")
    if not 1 <= count <= len(known):
        raise ValueError(f"sweep: devices must be in 1 to {len(known)}, got {count}")
    return None if count == 1 else jax.sharding.Mesh(np.array(known[:count]), ("lanes",))


def tiles_at_once(mesh: jax.sharding.Mesh | None) -> int:
    """How many tiles run at the same time: one for each core, where cores are all there is.

    The steps of a small network are too small for two cores to share.
    """
    if mesh is not None or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return 1
    if hasattr(os, "sched_getaffinity"):  # those that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def by_lane(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """The leading axis dealt out; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes"))


def on_all(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """The same on every device; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def placed(x: Any, sharding: Any) -> jax.Array:
    """An array that this host has, and all others have too, where it belongs; random keys too."""
    if sharding is None:
        return jnp.asarray(x)
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=str(jax.random.key_impl(x)))
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would ask the other processes whether theirs is the same
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_host(tree: Any) -> Any:
    """Arrays as NumPy's; of what other processes hold, they send a copy."""
    leaves = jax.tree.leaves(tree)
    if not all(getattr(x, "is_fully_addressable", True) for x in leaves):
        tree = _replicated(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _replicated(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=on_all(mesh))


def rounded(width: int, devices: int) -> int:
    """The next width that can be dealt out evenly."""
    return -(-width // devices) * devices


def agreed(here: bool) -> bool:
    """What process 0 says."""
    if jax.process_count() == 1:
        return here
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.array(here)))


def refuse_another(digest: str) -> None:
    """Raise ValueError if process 0 has another task, or other data."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    here = np.frombuffer(digest.encode(), np.uint8)
    if not np.array_equal(multihost_utils.broadcast_one_to_all(here), here):
        raise ValueError(
            f"sweep: process {jax.process_index()} has another task than process 0, or other data"
        )


def writes() -> bool:
    """Whether this process writes files and screens."""
    return jax.process_index() == 0
