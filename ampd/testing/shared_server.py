"""A managed PostgreSQL for tests, shared by the processes of a run and by runs at the same time.

Whoever needs it first starts a process of its own for it, this module as a program, which belongs to no run: a worker
that ends, or is killed, takes nothing away from the others. Each user holds a shared lock on a file, which the kernel
frees however that user ends; once nobody holds one, the process stops the server and removes its folder.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO

import anyio

from ampd.errors import AmpdError, ConnectionFailed
from ampd.local_server.folders import beside, make_folder, open_without_links, usable
from ampd.local_server.launcher import is_running, wait_while
from ampd.local_server.server import local_server

# Nothing of it is to outlive a crash of the machine, or grows old enough for maintenance.
SETTINGS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "autovacuum": "off",
    "jit": "off",
    "max_connections": "300",
    "max_wal_size": "256MB",
    "checkpoint_timeout": "1h",
}

_MEMORY = Path("/dev/shm")  # where Linux has it; a container's often has no more than 64 MB
_ENOUGH = 2**30  # bytes
_PAUSE_SECS = 0.1


@contextmanager
def shared_server(project: str) -> Iterator[str]:
    """Yield the URL of the server for a project, which runs at least until the end of the block.

    Raises:
        AmpdError: it does not start.
    """
    folder = folder_of(project)
    with usable(folder), _used(folder):
        with open(folder / "start", "a", opener=open_without_links) as start:
            fcntl.flock(start, fcntl.LOCK_EX)  # one looks, or starts it, at a time
            url = _running(folder / "db") or _start(folder)
        yield url


def folder_of(project: str) -> Path:
    """Return the folder for a project: everybody who tests it in this environment finds the same."""
    key = sha256(f"{project}\0{sys.prefix}".encode()).hexdigest()[:12]
    in_memory = os.access(_MEMORY, os.W_OK | os.X_OK) and shutil.disk_usage(_MEMORY).total >= _ENOUGH
    base = _MEMORY if in_memory else Path(tempfile.gettempdir())
    return base / f"ampd-pytest-{os.geteuid()}-{key}"


@contextmanager
def _used(folder: Path) -> Iterator[None]:
    """Use a folder for the length of the block; while one is being removed, wait for its end."""
    while True:
        make_folder(folder)
        with suppress(FileNotFoundError), open(folder / "users", "a", opener=open_without_links) as users:
            fcntl.flock(users, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(users.fileno()), os.stat(users.name)):  # else it was removed meanwhile
                yield
                return


def _running(data_dir: Path) -> str:
    """Return the URL of the server in a folder; "" if nobody runs it."""
    with open(beside(data_dir, "lock"), "a+", opener=open_without_links) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            return lock.read()
    return ""


def _start(folder: Path) -> str:
    command = [sys.executable, "-P", "-m", __spec__.name, str(folder)]
    process = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if url := _running(folder / "db"):
        return url
    raise ConnectionFailed(
        f"no PostgreSQL server for the tests: {process.stderr.strip() or 'it has ended at once'}",
        hint="or set AMPD_TEST_URL to a server whose role may create databases",
    )


def main(folder: Path) -> None:
    """Start the server in a process that goes on by itself; return once it is ready, or exit with what is wrong."""
    reading, writing = os.pipe()
    if os.fork():
        os.close(writing)
        with open(reading, encoding="utf-8") as answer:
            if problem := answer.read():
                sys.exit(problem)
        return
    os.close(reading)
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    with (
        open(writing, "w", encoding="utf-8") as answer,
        open(folder / "users", "a", opener=open_without_links) as users,
    ):
        try:
            anyio.run(_serve, folder, users, answer.close)
        except AmpdError as error:
            answer.write(str(error))
            return
        if not _is_in_use(users):
            _remove(folder)


async def _serve(folder: Path, users: IO[str], ready: Callable[[], None]) -> None:
    """Run the server until nobody uses it, or until it ends by itself."""
    async with local_server(folder / "db", settings=SETTINGS) as server:
        ready()
        await wait_while(lambda: is_running(server.process) and _is_in_use(users), interval=_PAUSE_SECS)


def _is_in_use(users: IO[str]) -> bool:
    """Return whether others hold the lock; else it is ours now, and whoever comes waits."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _remove(folder: Path) -> None:
    """Remove a folder, the lock last: by then another process may make the folder anew."""
    for each in folder.iterdir():
        if each.is_dir():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name != "users":
            each.unlink(missing_ok=True)
    (folder / "users").unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
