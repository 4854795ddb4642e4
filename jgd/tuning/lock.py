"""One sweep at a time in a folder.

    with locked(Path("runs/a")):  # BlockingIOError, naming the holder, if another process has it
        ...

The system locks the file `lock`, and releases it when the process dies. It also releases it when
the process closes any descriptor of the file: so a process opens it once for each folder, and all
its contexts share that lock. The file stays in the folder of a sweep.

Where files cannot be locked, the holder creates `lock.held`. If it dies, another process takes over
on the same host until a reboot; elsewhere nobody knows that it is dead.
"""

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

__all__ = ["LOCKS", "locked"]

LOCKS = ("lock", "lock.held", "lock.takeover")
UNSUPPORTED = (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.ENOSYS)


@dataclass
class _Held:
    """A folder that this process holds."""

    release: Callable[[], None]
    contexts: int = 0


_folders = dict[tuple[int, str], _Held]()  # by process: a fork inherits the dict but no lock
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold a folder, which is created if it is missing.

    Where nothing is written into it, it is left as it was found.

    A process that holds the folder may enter a second context.

    Raises: BlockingIOError if another process holds the folder; OSError if it cannot be written.
    """
    key = os.getpid(), os.path.realpath(folder)
    with _guard:
        held = _folders.get(key) or _Held(_take(folder))
        _folders[key] = held
        held.contexts += 1
    try:
        yield
    finally:
        with _guard:
            held.contexts -= 1
            if not held.contexts:
                del _folders[key]
                held.release()


def _take(folder: Path) -> Callable[[], None]:
    """Lock a folder; return the function that releases it."""
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise NotADirectoryError(f"sweep: folder must be a folder, got {folder}: {file} is a file")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    before = _names(folder)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # the holder before may have deleted the folder
        with contextlib.suppress(FileNotFoundError):
            unlock = _by_system(folder) or _by_creation(folder)
            break

    def release() -> None:
        with contextlib.suppress(OSError):
            if "lock" not in before and _names(folder) - set(LOCKS) <= before:  # nothing is new
                (folder / "lock").unlink(missing_ok=True)
        unlock()
        with contextlib.suppress(OSError):  # it is not empty
            for path in created:
                path.rmdir()

    return release


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _by_system(folder: Path) -> Callable[[], None] | None:
    """Lock the file `lock`. Returns None where files cannot be locked."""
    file = folder / "lock"
    if fcntl is None:
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), file.stat()):
            raise FileNotFoundError(file)  # deleted between the two calls
        os.pwrite(descriptor, _this_process().ljust(512), 0)  # in one write, over the holder before
    except OSError as error:
        holder = os.pread(descriptor, 4096, 0)
        os.close(descriptor)
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            _refuse(folder, holder)
        raise
    return lambda: os.close(descriptor)


def _by_creation(folder: Path) -> Callable[[], None]:
    """Create the file `lock.held`; that of a dead process is deleted first."""
    file, takeover = folder / "lock.held", folder / "lock.takeover"
    if _is_dead(_read(file)):
        with _created(takeover, folder):  # else a second process could delete the new file
            if _is_dead(_read(file)):
                file.unlink()
    stack = contextlib.ExitStack()
    stack.enter_context(_created(file, folder))
    return stack.close


@contextlib.contextmanager
def _created(file: Path, folder: Path) -> Generator[None]:
    """Create a file for the time of this context. Raises BlockingIOError if it exists."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        _refuse(folder, _read(file), f". If it no longer runs, delete {file}")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(_this_process())
        yield
    finally:
        file.unlink(missing_ok=True)


def _refuse(folder: Path, holder: bytes, hint: str = "") -> NoReturn:
    who = "by another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):  # the file is being written
        known = json.loads(holder)
        who = f"by a sweep on {known['host']}, pid {known['pid']}, since {known['since']}"
    raise BlockingIOError(
        f"{folder} is in use {who}. Wait for its end, or give a new sweep a folder of its own{hint}"
    )


# --- who holds a folder ----------------------------------------------------------------------


def _this_process() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    known = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "since": since}
    return json.dumps(known).encode()


def _boot() -> str | None:
    """Return a name of this boot and of the numbering of its processes; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _is_dead(holder: bytes) -> bool:
    """Return whether a holder ran on this host, since its last boot, and runs no more."""
    try:
        known = json.loads(holder)
        here = (socket.gethostname(), _boot())
        if here[1] is None or (known["host"], known["boot"]) != here:
            return False
        os.kill(known["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError, KeyError, TypeError):
        return False
    return False
