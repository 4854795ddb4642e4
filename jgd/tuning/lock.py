"""A lock that allows one sweep at a time in a folder.

    with locked(Path("runs/a")):  # BlockingIOError, naming the holder, if another process has it
        ...

The operating system locks the file `lock`, and unlocks it when the process dies. It also unlocks it
when the process closes any descriptor of the file. A process therefore opens the file once for each
folder, and all its contexts share that lock. The file stays in the folder of a sweep.

Where files cannot be locked, the holder creates the file `lock.held`. If the holder dies, another
process on the same host can take over until the host reboots; other hosts cannot know that it died.
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
class _Lock:
    """The lock of a folder that this process holds."""

    release: Callable[[], None]
    contexts: int = 0


_folders = dict[tuple[int, str], _Lock]()  # by process, since a fork inherits this but no lock
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Hold the lock of a folder, which is created if it is missing.

    A process that holds the folder may enter a second context. At the end of the last one, the
    lock and new folders are deleted if nothing else was written to the folder.

    Raises: BlockingIOError if another process holds the folder; OSError if it cannot be written.
    """
    key = os.getpid(), os.path.realpath(folder)
    with _guard:
        lock = _folders.get(key) or _Lock(_acquire(folder))
        _folders[key] = lock
        lock.contexts += 1
    try:
        yield
    finally:
        with _guard:
            lock.contexts -= 1
            if not lock.contexts:
                del _folders[key]
                lock.release()


def _acquire(folder: Path) -> Callable[[], None]:
    """Lock a folder; return the function that releases it."""
    if file := next((path for path in (folder, *folder.parents) if path.is_file()), None):
        raise NotADirectoryError(f"sweep: folder must be a folder, got {folder}: {file} is a file")
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    before = _names(folder)
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # the previous holder may have deleted the folder
        with contextlib.suppress(FileNotFoundError):
            unlock = _by_system(folder) or _by_creation(folder)
            break

    def release() -> None:
        with contextlib.suppress(OSError):
            # nothing was written to the folder
            if "lock" not in before and _names(folder) - set(LOCKS) <= before:
                (folder / "lock").unlink(missing_ok=True)
        unlock()
        with contextlib.suppress(OSError):  # a folder that is not empty stays
            for path in created:
                path.rmdir()

    return release


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _by_system(folder: Path) -> Callable[[], None] | None:
    """Lock the file `lock`; return the function that unlocks it, None if files have no locks."""
    file = folder / "lock"
    if fcntl is None:
        return None
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), file.stat()):
            raise FileNotFoundError(file)  # deleted between the two calls
        # one write, which replaces the entry of the previous holder
        os.pwrite(descriptor, _this_process().ljust(512), 0)
    except OSError as error:
        holder = os.pread(descriptor, 4096, 0)
        os.close(descriptor)
        if error.errno in UNSUPPORTED:
            return None
        if error.errno in (errno.EACCES, errno.EAGAIN):
            _raise_in_use(folder, holder)
        raise
    return lambda: os.close(descriptor)


def _by_creation(folder: Path) -> Callable[[], None]:
    """Create the file `lock.held`, after deleting that of a dead process. Return its deletion."""
    file, takeover = folder / "lock.held", folder / "lock.takeover"
    if _is_dead(_read(file)):
        with _created(takeover, folder):  # stops a second process from deleting the new file
            if _is_dead(_read(file)):
                file.unlink()
    stack = contextlib.ExitStack()
    stack.enter_context(_created(file, folder))
    return stack.close


@contextlib.contextmanager
def _created(file: Path, folder: Path) -> Generator[None]:
    """Create a file, and delete it at the end. Raises BlockingIOError if the file exists."""
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        _raise_in_use(folder, _read(file), f". If that sweep no longer runs, delete {file}")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(_this_process())
        yield
    finally:
        file.unlink(missing_ok=True)


def _raise_in_use(folder: Path, holder: bytes, hint: str = "") -> NoReturn:
    who = "by another process"
    with contextlib.suppress(ValueError, KeyError, TypeError):  # the holder is writing its entry
        entry = json.loads(holder)
        who = f"by a sweep on {entry['host']}, pid {entry['pid']}, since {entry['since']}"
    raise BlockingIOError(
        f"{folder} is in use {who}. Wait until it ends, or give a new sweep another folder{hint}"
    )


# --- who holds a folder ----------------------------------------------------------------------


def _this_process() -> bytes:
    since = time.strftime("%Y-%m-%d %H:%M:%S %z")
    entry = {"host": socket.gethostname(), "boot": _boot(), "pid": os.getpid(), "since": since}
    return json.dumps(entry).encode()


def _boot() -> str | None:
    """Return an identifier of this boot and of the pid namespace; None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def _read(file: Path) -> bytes:
    return file.read_bytes() if file.exists() else b""


def _is_dead(holder: bytes) -> bool:
    """Return whether a holder was a process of this host and boot, and no longer runs."""
    try:
        entry = json.loads(holder)
        host, boot = socket.gethostname(), _boot()
        if boot is None or (entry["host"], entry["boot"]) != (host, boot):
            return False
        os.kill(entry["pid"], 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError, ValueError, KeyError, TypeError):
        return False
    return False
