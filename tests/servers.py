"""What the tests run against: databases, what may stand between them and a client, and ampd as a process."""

import asyncio
import fcntl
import os
import pwd
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote

import anyio
import asyncpg
import msgspec
import pytest
from anyio.from_thread import BlockingPortal

import benchmarks.proxy
from ampd.local_server.folders import make_folder
from ampd.local_server.launcher import Launcher, is_running, wait_while
from ampd.local_server.server import LocalServer
from tests.forks import Fork

CACHE = Path(__file__).parent.parent / ".cache"


class Server(msgspec.Struct, frozen=True):
    """A PostgreSQL server on the loopback interface and in `socket_dir`; its superuser needs no password."""

    port: int
    socket_dir: str
    data_dir: str
    bindir: str
    major: int
    host: str = "127.0.0.1"
    cluster: str = ""  # a data folder as initdb has made it

    def url(self, database: str = "postgres", user: str = "postgres", password: str | None = None) -> str:
        """Return the URL of a database by TCP."""
        secret = "" if password is None else f":{quote(password, safe='')}"
        return f"postgresql://{quote(user, safe='')}{secret}@{self.host}:{self.port}/{database}"

    def socket_url(self, database: str = "postgres", user: str = "postgres") -> str:
        """Return the URL of a database by Unix socket."""
        return f"postgresql:///{database}?host={quote(self.socket_dir)}&port={self.port}&user={quote(user, safe='')}"


def server_of(local: LocalServer, cluster: str = "") -> Server:
    """Return a managed server as the tests know servers."""
    place, installation = (str(local.socket_dir), str(local.data_dir)), local.installation
    return Server(local.port, *place, str(installation.bindir), installation.major, cluster=cluster)


def copy_cluster(cluster: str | Path, data_dir: Path) -> Path:
    """Put a cluster that is not running into another place; initdb takes ten times as long."""
    make_folder(data_dir.parent)
    subprocess.run(["cp", "-a", cluster, data_dir], check=True)
    return data_dir


@asynccontextmanager
async def anothers_server(
    launcher: Launcher, data_dir: Path, program: Path, *arguments: Path
) -> AsyncIterator[subprocess.Popen[bytes]]:
    """Run the server of a cluster for the length of the block as another program does."""
    log = data_dir.with_name("another.log")
    place = ("-c", "listen_addresses=", "-c", "unix_socket_directories=.")
    process = launcher.start(program, *arguments, "-D", data_dir, *place, log=log)
    try:
        await wait_while(lambda: is_running(process) and "ready to accept" not in log.read_text())
        assert is_running(process), log.read_text()
        yield process
    finally:
        os.killpg(process.pid, signal.SIGINT)
        process.wait()
        with anyio.fail_after(60):
            await wait_while((data_dir / "postmaster.pid").exists)


class AdminSession:
    """A superuser's session on an event loop of its own: tests of any loop and thread may use it, and share its start.

    Whoever finds it busy gets a session for the moment; one whose settings may have changed is not used again.
    """

    _OPEN: ClassVar[dict[str, "AdminSession"]] = {}  # by URL
    _CHANGES = re.compile(
        r"\b(SET|RESET|LISTEN|LOAD|TEMP\w*|BEGIN|set_config|pg_(try_)?advisory_lock)\b"
        r"|\bALTER\s+(DATABASE|ROLE|USER|SYSTEM|TYPE)\b",
        re.IGNORECASE,
    )

    def __init__(self, portal: BlockingPortal, url: str) -> None:
        self._portal = portal
        self._url = url
        self._idle: asyncpg.Connection | None = None

    @classmethod
    def of(cls, url: str) -> "AdminSession | None":
        """Return the session that is open for a database."""
        return cls._OPEN.get(url)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Offer the session for the length of the block."""
        self._OPEN[self._url] = self
        try:
            yield
        finally:
            del self._OPEN[self._url]
            if self._idle is not None:
                self._portal.call(self._idle.close)

    def run(self, method: str, *arguments: object) -> Any:
        """Call a method of the connection, and block until it has answered."""
        return self._portal.call(self._run, method, arguments)

    async def ask(self, method: str, *arguments: object) -> Any:
        """Call a method of the connection."""
        return await asyncio.wrap_future(self._portal.start_task_soon(self._run, method, arguments))

    async def _run(self, method: str, arguments: tuple[object, ...]) -> Any:
        connection, self._idle = self._idle, None
        if connection is None or connection.is_closed():
            connection = await asyncpg.connect(self._url, statement_cache_size=0, ssl=False)
        try:
            answer = await getattr(connection, method)(*arguments)
        except asyncpg.PostgresError:
            await connection.close()
            raise
        except BaseException:
            connection.terminate()
            raise
        if self._idle is None and not self._CHANGES.search(str(arguments[0])):
            self._idle = connection
        else:
            await connection.close()
        return answer


class Role(msgspec.Struct, frozen=True):
    """A role that is no superuser, and its URL of one database."""

    name: str
    url: str


class Database(msgspec.Struct, frozen=True):
    """A database of one test's own."""

    server: Server
    name: str

    @property
    def url(self) -> str:
        """Its URL by TCP, for the superuser."""
        return self.server.url(self.name)

    @property
    def socket_url(self) -> str:
        """Its URL by Unix socket, for the superuser."""
        return self.server.socket_url(self.name)

    @asynccontextmanager
    async def connect(self, url: str | None = None, **options: Any) -> AsyncIterator[asyncpg.Connection]:
        """Connect for the length of the block, as the superuser unless another URL is given."""
        connection = await asyncpg.connect(url or self.url, **({"ssl": False} | options))
        try:
            yield connection
        finally:
            await connection.close()

    async def execute(self, sql: str) -> str:
        """Run SQL as the superuser and return its command tag."""
        tag: str = await self._ask("execute", sql)
        return tag

    async def fetch(self, sql: str, *arguments: object) -> list[asyncpg.Record]:
        """Return the rows of a query."""
        rows: list[asyncpg.Record] = await self._ask("fetch", sql, *arguments)
        return rows

    async def fetchval(self, sql: str, *arguments: object) -> Any:
        """Return the first value of a query."""
        return await self._ask("fetchval", sql, *arguments)

    async def _ask(self, method: str, sql: str, *arguments: object) -> Any:
        if session := AdminSession.of(self.url):
            return await session.ask(method, sql, *arguments)
        async with self.connect() as connection:
            return await getattr(connection, method)(sql, *arguments)

    async def role(self, suffix: str, *grants: str, password: str | None = None) -> Role:
        """Create a role with these `GRANT … TO` it; it is dropped together with the database."""
        name = f"{self.name}_{suffix}"
        secret = "" if password is None else f" PASSWORD '{password}'"
        await self.execute(
            f"CREATE ROLE {name} LOGIN{secret};" + "".join(f"GRANT {grant} TO {name};" for grant in grants)
        )
        return Role(name, self.server.url(self.name, name, password))


_OF_THE_INTERPRETER = ("PYTHON", "LC_", "LANG")  # it reads them once, when it starts


class Ampd:
    """The command line as a process of its own, without the PG* and AMP_* variables of whoever runs the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self,
        *arguments: str | Path,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run `ampd` to its end; `url` is the database it is configured for."""
        process = self.start(*arguments, url=url, env=env, cwd=cwd)
        try:
            stdout, stderr = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def start(
        self,
        *arguments: str | Path,
        url: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start `ampd` and leave it running."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "AMP_"))}
        configured = {} if url is None else {"AMP_CONFIG_METADATA_DB__URL": url}
        environment |= {**configured, **(env or {})}
        if not any(name.startswith(_OF_THE_INTERPRETER) for name in env or ()):
            return Fork([str(each) for each in arguments], cwd or self.folder, environment)
        return subprocess.Popen(
            [sys.executable, "-m", "ampd", *arguments],
            cwd=cwd or self.folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


class Proxy(benchmarks.proxy.Proxy):
    """The benchmarks' proxy, which can also cut every connection it carries."""

    def cut(self) -> None:
        """Abort the connections that stand, as a dying network device does."""
        for conversation in self._conversations:
            conversation.cancel()


class Treacherous(Proxy):
    """A proxy that aborts each connection at a moment of its own, often while it is still being made."""

    def __init__(self, server: Server, chance: random.Random, longest_secs: float) -> None:
        super().__init__(server.host, server.port)
        self.cuts = 0
        self._chance = chance
        self._longest_secs = longest_secs

    async def _converse(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        life = self._longest_secs * self._chance.random() ** 3  # half of them below an eighth of the longest time
        try:
            async with asyncio.timeout(life):
                await super()._converse(client_reader, client_writer)
        except TimeoutError:
            self.cuts += 1
        finally:
            client_writer.transport.abort()


@contextmanager
def pgbouncer(server: Server, pool_mode: str = "transaction", **settings: object) -> Iterator[Server]:
    """Run a real PgBouncer in front of a server and yield it in that server's place; every client is its superuser."""
    program = _pgbouncer()
    with tempfile.TemporaryDirectory(prefix="ampd-pgbouncer-") as name:
        folder, port = Path(name), free_port()
        place = {"listen_addr": server.host, "listen_port": port, "unix_socket_dir": "", "auth_type": "any"}
        pool = {"pool_mode": pool_mode, "max_client_conn": 1000, "default_pool_size": 20}
        query = f" connect_query='{settings.pop('connect_query')}'" if "connect_query" in settings else ""
        values = "".join(f"{key} = {value}\n" for key, value in {**place, **pool, **settings}.items())
        upstream = f"* = host={server.host} port={server.port} user=postgres{query}\n"
        (folder / "pgbouncer.ini").write_text(f"[databases]\n{upstream}[pgbouncer]\n{values}")
        for file in (program, *program.parent.glob("lib*.so*")):  # its user may not reach the clone
            shutil.copy(file, folder)
        folder.chmod(0o755)
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(
                [folder / program.name, folder / "pgbouncer.ini"],
                env=os.environ | {"LD_LIBRARY_PATH": name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                **_unprivileged(),
            )
        try:
            _wait_for_port(port, process, folder / "log")
            yield msgspec.structs.replace(server, port=port, socket_dir="")
        finally:
            process.kill()
            process.wait()


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _unprivileged() -> dict[str, Any]:
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _wait_for_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    while process.poll() is None:
        with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.01)
    pytest.fail(f"PgBouncer does not start:\n{log.read_text()}")


def _pgbouncer() -> Path:
    """Return PgBouncer from PATH, else from Debian's package, unpacked into the cache together with its libraries."""
    if installed := shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin"):
        return Path(installed)
    folder = CACHE / "pgbouncer"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bin").exists():
            try:
                _unpack_debian_package(folder)
            except (OSError, subprocess.CalledProcessError) as error:
                said = getattr(error, "stderr", None) or error
                (pytest.fail if os.environ.get("CI") else pytest.skip)(f"NOT TESTED, no PgBouncer to be had: {said}")
    return folder / "bin" / "pgbouncer"


def _unpack_debian_package(folder: Path) -> None:
    """Download as any user, with apt's state in a folder of our own."""
    state, cache, tree = (folder / part for part in ("state", "cache", "tree"))
    for part in (state / "lists" / "partial", cache / "archives" / "partial", tree):
        part.mkdir(parents=True, exist_ok=True)
    user = pwd.getpwuid(os.geteuid()).pw_name
    private = (f"Dir::State={state}", "Dir::State::status=/var/lib/dpkg/status", f"Dir::Cache={cache}")
    options = [
        word for option in (*private, "Debug::NoLocking=1", f"APT::Sandbox::User={user}") for word in ("-o", option)
    ]

    def run(*command: str | Path) -> str:
        return subprocess.run(command, cwd=cache, capture_output=True, text=True, check=True).stdout

    run("apt-get", *options, "-qq", "update")
    libraries = re.findall(r"Depends: (libevent\S*|libc-?ares\S*)", run("apt-cache", *options, "depends", "pgbouncer"))
    run("apt-get", *options, "-qq", "download", "pgbouncer", *libraries)
    for package in cache.glob("*.deb"):
        run("dpkg-deb", "-x", package, tree)
    ready = folder / "new"
    ready.mkdir(exist_ok=True)
    for file in (tree / "usr" / "sbin" / "pgbouncer", *tree.glob("usr/lib/*/lib*.so.*")):
        shutil.copy(file, ready)
    ready.rename(folder / "bin")
    for part in (state, cache, tree):
        shutil.rmtree(part)
