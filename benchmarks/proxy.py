"""A transparent TCP proxy in front of PostgreSQL: it counts round trips and bytes, adds delay, and can fall silent."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

SSL_REQUEST, GSSENC_REQUEST = ((80877103).to_bytes(4), (80877104).to_bytes(4))
READY_FOR_QUERY = ord("Z")
END = b""


class Conversation:
    """What one connection's bytes tell: whether it stands yet, and how many of the client's bursts were answered.

    It stands from the server's first ReadyForQuery on; a burst is whatever the client says between two answers. What
    follows an accepted TLS or GSSAPI request is passed on uncounted, since nobody but the two ends can read it.
    """

    def __init__(self) -> None:
        self.stands = False
        self._asked_for_encryption = False
        self._awaits_answer = False
        self._greeting = b""

    def client_says(self, data: bytes) -> None:
        """Takes note of what the client sent."""
        self._asked_for_encryption = not self.stands and data[4:8] in (SSL_REQUEST, GSSENC_REQUEST)
        self._awaits_answer = self.stands

    def server_says(self, data: bytes) -> bool:
        """Takes note of what the server sent, and tells whether it completes a round trip."""
        if self.stands:
            completes, self._awaits_answer = self._awaits_answer, False
            return completes
        if self._asked_for_encryption:
            self._asked_for_encryption = False
            data = data[1:]
        self._greeting += data
        self._read_greeting()
        return False

    def _read_greeting(self) -> None:
        while len(self._greeting) >= 5 and not self.stands:
            length = 1 + int.from_bytes(self._greeting[1:5])
            if len(self._greeting) < length:
                return
            self.stands = self._greeting[0] == READY_FOR_QUERY
            self._greeting = self._greeting[length:]


class Proxy:
    """Listens on a free local port while entered; an upstream host that begins with a slash is a socket folder.

    `delay` is seconds each way; a change holds for what is sent from then on. While `silent`, nothing is delivered
    either way, ends of streams included, as on a cut network; afterwards everything held back arrives.
    """

    def __init__(self, upstream_host: str, upstream_port: int = 5432, *, delay: float = 0.0) -> None:
        self.host = "127.0.0.1"
        self.port = 0
        self.delay = delay
        self.reset()
        self._upstream = upstream_host, upstream_port
        self._audible = asyncio.Event()
        self._audible.set()
        self._conversations: set[asyncio.Task[None]] = set()

    def reset(self) -> None:
        """Counts from zero again."""
        self.connections = self.round_trips = self.bytes_to_server = self.bytes_to_client = 0

    @property
    def silent(self) -> bool:
        """Whether everything is being held back."""
        return not self._audible.is_set()

    @silent.setter
    def silent(self, silent: bool) -> None:
        (self._audible.clear if silent else self._audible.set)()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, self.host, self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.close()
        for conversation in self._conversations:
            conversation.cancel()
        await asyncio.gather(*self._conversations, return_exceptions=True)

    def _accept(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        conversation = asyncio.create_task(self._converse(client_reader, client_writer))
        self._conversations.add(conversation)
        conversation.add_done_callback(self._conversations.discard)

    def _conversation(self) -> Conversation:
        return Conversation()

    async def _converse(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        conversation = self._conversation()

        def heed_client(data: bytes) -> None:
            self.bytes_to_server += len(data)
            conversation.client_says(data)

        def heed_server(data: bytes) -> None:
            self.bytes_to_client += len(data)
            self.round_trips += conversation.server_says(data)

        try:
            server_reader, server_writer = await self._connect()
        except OSError:
            client_writer.transport.abort()
            return
        try:
            async with asyncio.TaskGroup() as directions:
                directions.create_task(self._carry(client_reader, server_writer, heed_client))
                directions.create_task(self._carry(server_reader, client_writer, heed_server))
        finally:
            client_writer.transport.abort()
            server_writer.transport.abort()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        host, port = self._upstream
        if host.startswith("/"):
            return await asyncio.open_unix_connection(Path(host, f".s.PGSQL.{port}"))
        return await asyncio.open_connection(host, port)

    async def _carry(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, heed: Callable[[bytes], None]
    ) -> None:
        clock = asyncio.get_running_loop().time
        road: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        async with asyncio.TaskGroup() as both_ends:
            both_ends.create_task(self._deliver(road, sink))
            while data := await _read(source):
                heed(data)
                road.put_nowait((clock() + self.delay, data))
            road.put_nowait((clock() + self.delay, END))

    async def _deliver(self, road: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        clock = asyncio.get_running_loop().time
        data = None
        while data != END:
            due, data = await road.get()
            await asyncio.sleep(due - clock())
            await self._audible.wait()
            sink.write(data)
        sink.close()


async def _read(source: asyncio.StreamReader) -> bytes:
    try:
        return await source.read(65536)
    except ConnectionError:
        return END
