"""Sharding of lanes over devices, in one process or in several that run the same command.

A mesh has one axis, "lanes"; devices do not communicate along it inside a chunk. Between chunks
every process holds the same plan and the same numbers, so all processes make the same decisions.
Only process 0 reads the clock and writes files.
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
    """Join this process with the others of a sweep. Call it before any other function of JAX.

    Args:
      coordinator: host:port of process 0, which listens on that address only.
      processes: number of processes; None: read from the environment (Slurm, Open MPI or similar).
      process: index of this process; None: read from the environment.
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

    Args:
      devices: number of devices; None: all of them.

    Raises: ValueError for a number of devices that is out of range.
    """
    available = jax.devices()
    count = len(available) if devices is None else devices
    if jax.process_count() > 1 and count != len(available):
        raise ValueError(
            f"sweep: devices must be {len(available)}, the devices of all processes, got {count}"
        )
    if not 1 <= count <= len(available):
        raise ValueError(f"sweep: devices must be in 1 to {len(available)}, got {count}")
    return None if count == 1 else jax.sharding.Mesh(np.array(available[:count]), ("lanes",))


def tiles_at_once(mesh: jax.sharding.Mesh | None) -> int:
    """Return how many tiles run at the same time: one per core of a single CPU device, else one.

    The steps of a small network are too short to be split between two cores.
    """
    if mesh is not None or jax.default_backend() != "cpu" or jax.process_count() > 1:
        return 1
    if hasattr(os, "sched_getaffinity"):  # the cores that this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def by_lane(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """Return the sharding of the leading axis over the devices; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("lanes"))


def on_all(mesh: jax.sharding.Mesh | None) -> jax.sharding.NamedSharding | None:
    """Return the sharding that puts a copy on every device; None without a mesh."""
    return mesh and jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def placed(x: Any, sharding: Any) -> jax.Array:
    """Return an array or random keys with this sharding. Every process passes the same values."""
    if sharding is None:
        return jnp.asarray(x)
    if isinstance(x, jax.Array) and x.sharding == sharding:
        return x
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        bits = placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(bits, impl=str(jax.random.key_impl(x)))
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)  # device_put would compare the values of all processes
    x = x.astype(jax.dtypes.canonicalize_dtype(x.dtype))
    return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def to_host(tree: Any) -> Any:
    """Return arrays as NumPy arrays. If they span several processes, all processes call this."""
    leaves = jax.tree.leaves(tree)
    if not all(getattr(x, "is_fully_addressable", True) for x in leaves):
        tree = _replicated(leaves[0].sharding.mesh)(tree)
    return jax.tree.map(np.asarray, tree)


@functools.cache
def _replicated(mesh: jax.sharding.Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=on_all(mesh))


def round_up(width: int, devices: int) -> int:
    """Round a width up to a multiple of the number of devices."""
    return -(-width // devices) * devices


# --- several processes -----------------------------------------------------------------------


def is_writer() -> bool:
    """Return whether this process writes files and prints to the terminal."""
    return jax.process_index() == 0


def from_process_0(values: Iterable[Any]) -> list[Any]:
    """Return the values of process 0 as bools. With one process, return the values unchanged."""
    if jax.process_count() == 1:
        return list(values)
    from jax.experimental import multihost_utils

    flags = np.array([bool(value) for value in values])
    return multihost_utils.broadcast_one_to_all(flags).astype(bool).tolist()


def wait_for_all() -> None:
    """Wait until all processes have called this function."""
    from_process_0([True])


def check_same_task(digest: str) -> None:
    """Raise ValueError if process 0 has a task with another digest."""
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    own = np.frombuffer(digest.encode(), np.uint8)
    if not np.array_equal(multihost_utils.broadcast_one_to_all(own), own):
        raise ValueError(
            "sweep: task and its data must be the same in all processes, got other ones in process"
            f" {jax.process_index()} than in process 0. Start the same command in every process"
        )


def checkpointer() -> Any:
    """Return an orbax checkpointer that does not wait for other processes."""
    import orbax.checkpoint

    logging.getLogger("absl").addFilter(_is_not_of_orbax)
    index = jax.process_index()  # only the process that writes has the states on its host
    one = orbax.checkpoint.options.MultiprocessingOptions(
        primary_host=index, active_processes={index}, barrier_sync_key_prefix=str(index)
    )
    several: dict[str, Any] = {"multiprocessing_options": one} if jax.process_count() > 1 else {}
    return orbax.checkpoint.StandardCheckpointer(**several)


def _is_not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname  # orbax raises the errors that it logs


class Failures:
    """Errors of this process, stored until all processes can raise them together.

    If one process raised alone, the others would wait for it. With one process, errors are raised
    where they occur.
    """

    LENGTH = 400  # bytes of a message

    def __init__(self) -> None:
        self._error: Exception | None = None

    @contextlib.contextmanager
    def collected(self) -> Generator[None]:
        """Store errors that occur inside this context for `raise_everywhere`."""
        try:
            yield
        except Exception as error:
            if jax.process_count() == 1:
                raise
            self._error = self._error or error

    def raise_everywhere(self) -> None:
        """Raise the error of this process, or else of another one. All processes call this."""
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        text = "" if self._error is None else f"{type(self._error).__name__}: {self._error}"
        message = np.zeros(self.LENGTH, np.uint8)
        data = " ".join(text.split()).encode()[: self.LENGTH]
        message[: len(data)] = np.frombuffer(data, np.uint8)
        messages = multihost_utils.process_allgather(message)
        if self._error is not None:
            raise self._error
        for process, padded in enumerate(messages):
            if error := bytes(padded).rstrip(b"\0").decode(errors="replace"):
                raise RuntimeError(f"process {process} failed: {error}")


@contextlib.contextmanager
def fails_everywhere() -> Generator[None]:
    """Raise an error of one process in this context on all processes, all of which enter it."""
    failures = Failures()
    with failures.collected():
        yield
    failures.raise_everywhere()
