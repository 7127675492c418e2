"""A server that answers what no PostgreSQL would: every answer ends in an AmpdError, and none without an end."""

import asyncio
import json
import re
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest

import ampd
from ampd.postgres.permissions import grant_hint
from ampd.postgres.server_error import ServerError
from tests.scenes import GENEROUS, Heard, scripts

pytestmark = pytest.mark.anyio

MARK = re.compile(rb"RAISE INFO '([0-9a-f]{16}) ")


def message(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    """Return one message of the protocol, with a length that need not be true."""
    return kind + struct.pack("!I", len(body) + 4 if length is None else length) + body


def notice(kind: bytes, severity: str, text: bytes) -> bytes:
    """Return an error or a notice."""
    fields = (b"S" + severity.encode(), b"V" + severity.encode(), b"C00000", b"M" + text)
    return message(kind, b"".join(field + b"\0" for field in fields) + b"\0")


OK = message(b"R", struct.pack("!I", 0))
READY = message(b"Z", b"I")
KEY = message(b"K", struct.pack("!II", 1, 2))
ENCODING = message(b"S", b"server_encoding\0UTF8\0") + message(b"S", b"server_version\0" + b"15.4\0")
GREETING = OK + ENCODING + KEY + READY
DONE = message(b"C", b"DO\0") + READY


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait long for an answer that never comes, and take a megabyte for too much."""
    monkeypatch.setattr("ampd.postgres.connection.Session.ask.__kwdefaults__", {"timeout": 0.5})
    monkeypatch.setattr("ampd.postgres.database.CONNECT_TIMEOUT_SECS", 0.5)
    monkeypatch.setattr("ampd.postgres.connection._LARGEST_NOTE", 2**20)


@asynccontextmanager
async def hostile(greeting: bytes, answer: Callable[[bytes], bytes] | None = None) -> AsyncIterator[str]:
    """Run such a server and yield its URL; `answer` is given each query, with its mark if it has one."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            (length,) = struct.unpack("!I", await reader.readexactly(4))
            await reader.readexactly(length - 4)
            writer.write(greeting)
            while answer:
                _, length = struct.unpack("!cI", await reader.readexactly(5))
                query = await reader.readexactly(length - 4)
                mark = MARK.search(query)
                writer.write(answer(mark[1] if mark else b""))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        yield f"postgresql://u:geheim@127.0.0.1:{server.sockets[0].getsockname()[1]}/d?sslmode=disable"


AT_ONCE = ampd.Limits(connect_wait_secs=0, advisory_lock_wait_secs=0.5)

GREETINGS = {
    "nothing": b"",
    "text": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "a length of zero": message(b"R", b"", 0),
    "a short authentication": message(b"R", b"\0"),
    "an unknown authentication": message(b"R", struct.pack("!I", 99)),
    "SASL without a mechanism": message(b"R", struct.pack("!I", 10)),
    "an unknown SASL mechanism": message(b"R", struct.pack("!I", 10) + b"NOSUCH\0\0"),
    "an error without fields": message(b"E", b"\0"),
    "an error that breaks off": message(b"E", b"SFATAL"),
    "an error that is not UTF-8": notice(b"E", "FATAL", b"\xff\xfe"),
    "an unknown SQLSTATE": message(b"E", b"SFATAL\0C?!\0Mno\0\0"),
    "a parameter that breaks off": OK + message(b"S", b"server_encoding"),
    "an unknown encoding": OK + ENCODING + message(b"S", b"client_encoding\0NOSUCH\0") + KEY + READY,
    "a short key": OK + message(b"K", b"\0") + READY,
    "an unknown state": OK + ENCODING + KEY + message(b"Z", b"?"),
    "an unknown message": OK + ENCODING + message(b"?", b"x") + KEY + READY,
    "a message that never ends": OK + message(b"S", b"x", 0x7FFFFFFF),
}


@pytest.mark.parametrize("greeting", GREETINGS.values(), ids=GREETINGS.keys())
async def test_whatever_greets_it_is_an_error_of_ours(greeting: bytes) -> None:
    """No traceback of the driver's reaches a person, in status or in migrate."""
    async with hostile(greeting, lambda _: b"") as url:
        for run in (ampd.status, ampd.migrate):
            with pytest.raises(ampd.AmpdError) as caught:
                await run(url, migrations=scripts("SELECT 1"), limits=AT_ONCE)
            assert "geheim" not in str(caught.value)


ANSWERS: dict[str, Callable[[bytes], bytes]] = {
    "nothing was noted": lambda _: DONE,
    "a note that is no JSON": lambda mark: notice(b"N", "INFO", mark + b" {") + DONE,
    "a note of another type": lambda mark: notice(b"N", "INFO", mark + b" []") + DONE,
    "a note that is nested deep": lambda mark: notice(b"N", "INFO", mark + b" " + b"[" * 100_000) + DONE,
    "a note that is not UTF-8": lambda mark: notice(b"N", "INFO", mark + b" \xff") + DONE,
    "a huge note": lambda mark: notice(b"N", "INFO", mark + b' "' + b"x" * 1_100_000 + b'"') + DONE,
    "rows": lambda _: message(b"T", struct.pack("!H", 1) + b"a\0" + b"\0" * 18) + message(b"D", b"\0\1") + DONE,
    "a description that breaks off": lambda _: message(b"T", b"\0\1a") + DONE,
    "a tag that breaks off": lambda _: message(b"C", b"DO") + READY,
    "an unknown state": lambda _: message(b"C", b"DO\0") + message(b"Z", b"?"),
    "a copy": lambda _: message(b"G", b"\0\0\0"),
    "a notice without fields": lambda _: message(b"N", b"\0") + DONE,
    "a notice that breaks off": lambda _: message(b"N", b"SINFO") + DONE,
    "a notification that breaks off": lambda _: message(b"A", b"\0\0") + DONE,
    "an authentication": lambda _: message(b"R", struct.pack("!I", 3)) + DONE,
    "an error without fields": lambda _: message(b"E", b"\0") + READY,
    "an error without a SQLSTATE": lambda _: message(b"E", b"SERROR\0Mno\0\0") + READY,
    "a position that is no number": lambda _: message(b"E", b"SERROR\0C42601\0Mno\0P?\0\0") + READY,
    "an unknown message": lambda _: message(b"?", b"x") + DONE,
    "the end": lambda _: b"",
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS.keys())
async def test_whatever_answers_it_is_an_error_of_ours(answer: Callable[[bytes], bytes]) -> None:
    """What cannot be understood is told as that; what never comes is not waited for beyond the limit."""
    async with hostile(GREETING, answer) as url:
        for run in (ampd.status, ampd.migrate):
            with pytest.raises(ampd.AmpdError) as caught:
                await run(url, migrations=scripts("SELECT 1"), limits=AT_ONCE)
            assert len(str(caught.value)) < 50_000


def fields(kind: bytes = b"E", **given: str) -> bytes:
    """Return an error, or another message of its form, with fields by their letters."""
    every = {"S": "ERROR", "V": "ERROR", "C": "42501", "M": "x"} | given
    return message(kind, b"".join(letter.encode() + text.encode() + b"\0" for letter, text in every.items()) + b"\0")


def noted(mark: bytes, text: str) -> bytes:
    """Return a note."""
    return notice(b"N", "INFO", mark + b" " + text.encode())


HISTORY = {"database": "d", "user": "u", "host": "127.0.0.1", "port": 5432, "pid": 2, "read_only": False}
HISTORY |= {"schema": "public", "schema_exists": True, "table_exists": False, "schema_owner": None}
HISTORY |= {"holder_known": False, "holder": None}
READ = json.dumps({"rows": None, "fit": None, "history": HISTORY})
Answer = Callable[[bytes], bytes]


def in_turn(*answers: Answer) -> Answer:
    """Return an answer that is another one each time, and the last one in the end."""
    left = list(answers)

    def answer(mark: bytes) -> bytes:
        return (left.pop(0) if len(left) > 1 else left[0])(mark)

    return answer


def to_migration(*notes: str, error: bytes) -> Answer:
    """Answer as a server does up to the migration, and to that with an error."""
    begun = ("pid 2", "begin 0", *notes)
    return in_turn(
        lambda mark: noted(mark, READ) + DONE,
        lambda mark: b"".join(noted(mark, note) for note in begun) + error + READY,
    )


FORGED = "x\n::error::forged\nlocalhost/d: up to date, at version 1"
LIARS: dict[str, tuple[bytes, Answer]] = {
    "before the login": (fields(S="FATAL", V="FATAL", C="28P01", M=FORGED), lambda _: b""),
    "a farewell": (GREETING, lambda _: fields(S="FATAL", V="FATAL", C="57P01", M=FORGED)),
    "a severity": (GREETING, in_turn(lambda _: fields(b"N", S=FORGED, V=FORGED, C="00000") + fields() + READY)),
    "a severity in a migration": (
        GREETING,
        to_migration("0", error=fields(b"N", S=FORGED, V=FORGED, C="00000") + fields()),
    ),
    "a SQLSTATE": (GREETING, to_migration("0", error=fields(C=FORGED))),
    "a position": (GREETING, to_migration(error=fields(C="42601", P="1" * 5000))),
    "a pid": (GREETING, to_migration(f"pid {'9' * 5000}", error=fields())),
    "a statement": (GREETING, to_migration("9" * 5000, error=fields())),
    "a line in a block": (
        GREETING,
        to_migration("0", error=fields(C="22012", W=f"function inline_code_block line {'9' * 5000}")),
    ),
    "neighbours": (
        GREETING,
        in_turn(
            lambda mark: noted(mark, READ) + DONE,
            lambda _: fields(C="AM008") + READY,
            lambda mark: noted(mark, '{"histories": 5}') + DONE,
        ),
    ),
}


@pytest.mark.parametrize(("greeting", "answer"), LIARS.values(), ids=LIARS.keys())
async def test_whatever_it_says_is_shown_as_its_own(greeting: bytes, answer: Answer) -> None:
    """No field of a message begins a line of ours, and none that should be a number ends in a traceback."""
    heard = Heard()
    async with hostile(greeting, answer) as url:
        with pytest.raises(ampd.AmpdError) as caught:
            await ampd.migrate(url, migrations=scripts("DO $$ BEGIN END $$"), limits=AT_ONCE, on_event=heard)
    said = [str(caught.value), str(caught.value.sqlstate), *map(str, heard)]
    lines = [line for text in said for line in text.splitlines()]
    assert [line for line in lines if line.startswith(("::", "localhost"))] == []


class Driver:
    """An error as the driver gives it."""

    sqlstate = "42501"
    detail = hint = None
    position = "1"

    def __init__(self, message: str, context: str) -> None:
        self.message = message
        self.context = context


@pytest.mark.parametrize("unit", ['"', "a$", "word ", "function a ", "inline_code_block", "a.", '"a".', "t ", '"t".t '])
@pytest.mark.parametrize("part", ["context", "statement"])
async def test_the_search_of_its_words_is_linear(monkeypatch: pytest.MonkeyPatch, unit: str, part: str) -> None:
    """What takes a fraction of a second would take minutes, deaf to signals, if it were quadratic."""
    monkeypatch.setattr("ampd.postgres.connection.Session.ask.__kwdefaults__", {"timeout": GENEROUS})
    monkeypatch.setattr("ampd.postgres.database.CONNECT_TIMEOUT_SECS", GENEROUS)
    text = unit * (1_000_000 // len(unit))
    error = ServerError(Driver("permission denied for table t", text if part == "context" else ""), str, "u")
    assert len(error.context) <= 4001
    assert grant_hint(error, (), text).startswith("as its owner")
    answer = to_migration("0", error=fields(C="22012", W=text if part == "context" else "x"))
    async with hostile(GREETING, answer) as url:
        with pytest.raises(ampd.MigrationFailed):
            await ampd.migrate(url, migrations=scripts("DO $$ BEGIN END $$"), limits=AT_ONCE)
