"""Lanes sharded over devices, of one process or of several that run the same command.

A mesh has one axis, "lanes"; devices do not communicate along it inside a chunk. Between chunks
every process holds the same plan and the same numbers, so that all decide alike. Process 0 alone
reads the clock and writes files.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Generator, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    "Failures",
    "by_lane",
    "check_same_task",
    "checkpointer",
    "fails_everywhere",
    "from_process_0",
    "is_writer",
    "join",
    "mesh",
    "on_all",
    "placed",
    "round_up",
    "tiles_at_once",
    "to_host",
    "wait_for_all",
]


def join(coordinator: str, processes: int | None = None, process: int | None = None) -> None:
    """Make this process one of several. Call it before anything else of JAX.

    Args:
      coordinator: host:port of process 0, which listens on that address alone.
      processes: number of processes; None: as Slurm, Open MPI or a similar environment says.
      process: index of this process; None: as the environment says.
    """
    jax.distributed.initialize(
        coordinator,
        num_processes=processes,
        process_id=process,
        coordinator_bind_address=coordinator,  # else process 0 listens on all addresses
        heartbeat_timeout_seconds=20,
    )


# --- sharding --------------------------------------------------------------------------------


def mesh(devices: int | None) -> jax.sharding.Mesh | None:
    """Return a mesh of the first devices; None for one device. Several processes use all devices.

    Raises: ValueError for more devices than there are.
    """
    known = jax.devices()
    count = len(known) if devices is None else devices
    if jax.process_count() > 1 and count != len(known):
        raise ValueError(
            f"sweep: devices must be all {len(known)} with several processes, got {count}"
        )
    if not 1 <= count <= len(known):
        raise ValueError(f"sweep: devices must be in 1 to {len(known)}, got {count}")
    return None if count == 1 else jax.sharding.Mesh(np.array(known[:count]), ("lanes",))


def tiles_at_once(mesh: jax.sharding.Mesh | None) -> int:
    """Return how many tiles run at the same time: one for each core if cores are the devices.

    The steps of a small network are too small for two cores to share.
    """
    if mesh is not None or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return 1
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def by_lane(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """Return the sharding of the leading axis; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes"))


def on_all(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """Return the sharding with a copy on every device; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def placed(x: Any, sharding: Any) -> jax.Array:
    """Place an array, or random keys, that every process holds."""
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
    """Return arrays as NumPy arrays. All processes call this if some hold parts of them."""
    leaves = jax.tree.leaves(tree)
    if not all(getattr(x, "is_fully_addressable", True) for x in leaves):
        tree = _replicated(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _replicated(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=on_all(mesh))


def round_up(width: int, devices: int) -> int:
    """Return the next width that divides evenly among devices."""
    return -(-width // devices) * devices


# --- several processes -----------------------------------------------------------------------


def is_writer() -> bool:
    """Return whether this process writes files and to the terminal."""
    return jax.process_index() == 0


def from_process_0(values: Iterable[Any]) -> list[Any]:
    """Return the bools of process 0. With one process, return any values as they are."""
    if jax.process_count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    known = np.array([bool(value) for value in values])
    return multihost_utils.broadcast_one_to_all(known).astype(bool).tolist()


def wait_for_all() -> None:
    """Wait until all processes are here."""
    from_process_0([True])


def check_same_task(digest: str) -> None:
    """Raise ValueError if process 0 has another task or other data."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    here = np.frombuffer(digest.encode(), np.uint8)
    if not np.array_equal(multihost_utils.broadcast_one_to_all(here), here):
        raise ValueError(
            f"sweep: process {jax.process_index()} has another task than process 0, or other data"
        )


def checkpointer() -> Any:
    """Return a checkpointer of orbax that works in this process alone."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    here = jax.process_index()  # states are on the host of the one process that writes
    alone = orbax.checkpoint.options.MultiprocessingOptions(
        primary_host=here, active_processes={here}, barrier_sync_key_prefix=str(here)
    )
    several: dict[str, Any] = {"multiprocessing_options": alone} if jax.process_count() > 1 else {}
    return orbax.checkpoint.StandardCheckpointer(**several)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname  # errors are raised as well


class Failures:
    """Errors of this process, kept until all processes know them.

    A process that raised at once would leave the others waiting for it. With one process, errors
    are raised where they occur.
    """

    LENGTH = 400  # of a message, in bytes

    def __init__(self) -> None:
        self._error: Exception | None = None

    @contextlib.contextmanager
    def collected(self) -> Generator[None]:
        """Within this context errors are kept for `raise_everywhere`."""
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._error = self._error or error

    def raise_everywhere(self) -> None:
        """Raise an error that occurred on any process. All processes call this."""
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        text = "" if self._error is None else f"{type(self._error).__name__}: {self._error}"
        here = np.zeros(self.LENGTH, np.uint8)
        data = " ".join(text.split()).encode()[: self.LENGTH]
        here[: len(data)] = np.frombuffer(data, np.uint8)
        everywhere = multihost_utils.process_allgather(here)
        if self._error is not None:
            raise self._error
        for process, other in enumerate(everywhere):
            if message := bytes(other).rstrip(b"\0").decode(errors="replace"):
                raise RuntimeError(f"process {process} failed: {message}")


@contextlib.contextmanager
def fails_everywhere() -> Generator[None]:
    """Within this context an error on one process is raised on all. All processes enter it."""
    failures = Failures()
    with failures.collected():
        yield
    failures.raise_everywhere()
