"""The PostgreSQL under measurement: a managed local one, or any whose URL is given."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import asyncpg
import msgspec

from ampd.local_server.server import local_server


class Server(msgspec.Struct, frozen=True):
    """A server by the URL of its superuser, reached over TCP."""

    url: str

    @property
    def address(self) -> tuple[str, int]:
        """Host and port."""
        parts = urlsplit(self.url)
        return parts.hostname or "127.0.0.1", parts.port or 5432

    def url_of(self, database: str, *, through: int | None = None) -> str:
        """The URL of one of its databases, or of the same through a proxy at that local port."""
        parts = urlsplit(self.url)
        login, _, place = parts.netloc.rpartition("@")
        place = place if through is None else f"127.0.0.1:{through}"
        return parts._replace(netloc=f"{login}@{place}", path=f"/{database}", query="sslmode=disable").geturl()

    @asynccontextmanager
    async def connect(self, database: str) -> AsyncIterator[asyncpg.Connection]:
        """A connection of our own, to prepare and to check."""
        connection = await asyncpg.connect(self.url_of(database))
        try:
            yield connection
        finally:
            await connection.close()

    async def create_anew(self, database: str) -> None:
        """An empty database, in place of any that has the name."""
        async with self.connect("postgres") as connection:
            await connection.execute(f'DROP DATABASE IF EXISTS "{database}" WITH (FORCE)')
            await connection.execute(f'CREATE DATABASE "{database}" TEMPLATE template0')

    async def release(self) -> str:
        """The version that the server tells of itself."""
        async with self.connect("postgres") as connection:
            return str(await connection.fetchval("SELECT current_setting('server_version')")).split()[0]


@asynccontextmanager
async def server(url: str | None) -> AsyncIterator[Server]:
    """The server at that URL, else a new local one with PostgreSQL's own settings, gone afterwards."""
    if url is not None:
        yield Server(url)
        return
    with TemporaryDirectory() as scratch:
        Path(scratch).chmod(0o755)  # root runs the server as another user
        async with local_server(Path(scratch, "server"), tcp=True) as local:
            yield Server(str(local.tcp_url))
