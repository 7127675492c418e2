"""docs/sql.md: what ampd sends to the server, recorded between the two while it runs.

    python -m tests.sql_page FILE

Every message of the recorded runs has to be one that the page has a sentence for. Where a run sends several of one
kind, the page shows the first.
"""

import asyncio
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from difflib import unified_diff
from pathlib import Path

import asyncpg
import msgspec

import ampd
from ampd.migrator import overview
from ampd.sql.splitter import split
from ampd.takeover.amp import amp_history
from benchmarks.proxy import Conversation
from tests.conftest import start_server
from tests.scenes import building, end_backend, scripts, transaction, until
from tests.servers import Database, Proxy

PAGE = Path(__file__).parent.parent / "docs" / "sql.md"
RENEW = "make docs"

_LARGE = "SELECT '" + "x" * 300_000 + "';\n"
FILES = scripts(
    "CREATE TABLE accounts (id bigint PRIMARY KEY, email text);\nINSERT INTO accounts VALUES (1, 'a@example.com');\n",
    "ALTER TABLE accounts ADD COLUMN name text;\n",
    "-- no-transaction\nUPDATE accounts SET name = email;\nCREATE INDEX CONCURRENTLY by_name ON accounts (name);\n",
    "ALTER TABLE accounts ADD COLUMN age int;\n",
    "-- no-transaction\nCREATE INDEX CONCURRENTLY by_age ON accounts (age);\n",
    _LARGE * 4,
    "CREATE TABLE orders (id bigint PRIMARY KEY);\n",
    "-- no-transaction\nCALL no_such_procedure();\n",
    "LOCK TABLE accounts;\nDROP TABLE no_such_table;\n",
)

# The history of goose, and that of amp without amp's tables.
TAKEN_OVER = """
    CREATE SCHEMA taken; CREATE TABLE taken.goose_db_version AS
        SELECT 1 AS id, 1 AS version_id, true AS is_applied, TIMESTAMP '2026-03-12' AS tstamp;
    CREATE SCHEMA amp CREATE TABLE _sqlx_migrations
        (version bigint, description text, installed_on timestamptz, success bool, checksum bytea);
""" + "".join(
    f"INSERT INTO amp._sqlx_migrations VALUES ({version}, '{name}', now(), true, decode('{checksum}', 'hex'));"
    for version, (name, checksum) in amp_history().items()
)


class Kind(msgspec.Struct, frozen=True):
    """Messages of one kind: what they are recognised by, and what the page says of them."""

    title: str
    pattern: str  # of which the first that is found in a message, in the order of KINDS, says its kind
    purpose: str
    like: str | None = None  # the title of the kind that it is shown beside, line by line, where most is the same


_QUESTION = r"^BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; (SET LOCAL [^;]*; |DO [^;]*; )*DO .*"
GROUPS: dict[str, tuple[Kind, ...]] = {
    "Every run": (
        Kind(
            "Reading the history",
            r"'expected', same\)",
            "The one message of a run that has nothing to do: finds the history table, locks it, looks at it by its "
            "oid, and reads its rows only if its owner and that of its schema are trusted and nothing on it would run "
            "code.",
        ),
        Kind(
            "Reading it again",
            r"'expected', same, 'holder', holder\)",
            "As above, and who holds the advisory lock: sent while waiting for it, and before a no-transaction file.",
            like="Reading the history",
        ),
        Kind(
            "Before a first run",
            r"READ ONLY; DO .*'histories', ",
            "Asks the catalog alone what else stands in the database, so that nothing is applied twice or to a "
            "stranger's database; sent only where the history has no rows.",
        ),
    ),
    "A migration in a transaction": (
        Kind(
            "The first migrations",
            r"CREATE TABLE \"public\"\.ampd_schema_migrations",
            "Two migrations in one message: for each the lock, its history row, its script and its commit. The first "
            "transaction makes the whole check and prepares what every one of them executes before and after its "
            "script; the last one drops it. The marker before each statement tells which one is running or has failed; "
            "what follows the last one resets the session.",
        ),
        Kind(
            "A later migration",
            r"^/\* ampd \w+ [49] ",
            "The same where the history exists: it is locked, looked at by its oid and compared with what was read.",
            like="The first migrations",
        ),
        Kind(
            "Before a migration on a connection of the caller's",
            r"pg_listening_channels",
            "Asks what the reset of the session would take away that is not ours; nothing is run where there is any. "
            "Not sent to a connection that ampd itself takes from a pool.",
        ),
        Kind(
            "On a connection of the caller's, or of its pool",
            r"^/\* ampd \w+ 7 ",
            "Others use the session as well: what they have set is noted before the script, and put back after it.",
            like="A later migration",
        ),
        Kind(
            "The first message of a large file",
            r"^/\* ampd \w+ 6 \w+ \*/ BEGIN .*idle_in_transaction_session_timeout",
            "Above 1 MB a script goes in several messages of one transaction: the server ends it after 20 s without "
            "one, and says which transaction it is.",
            like="A later migration",
        ),
        Kind(
            "A further message of a large file",
            r"pg_current_xact_id_if_assigned(?!.*COMMIT;?\n?$)",
            "Goes on only in the transaction that the first message has begun.",
        ),
        Kind(
            "The last message of a large file",
            r"pg_current_xact_id_if_assigned",
            "The same, with the end of every migration.",
            like="A further message of a large file",
        ),
        Kind(
            "After an error or a cancellation",
            r"^ROLLBACK; SELECT pg_catalog\.pg_advisory_unlock_all",
            "Ends the transaction, and takes back what no rollback does.",
        ),
        Kind(
            "Looking at who blocks whom",
            r"pg_blocking_pids",
            "Sent on a second connection when a migration has waited for a table lock for a while.",
        ),
    ),
    "A migration outside of a transaction": (
        Kind(
            "Greeting on the second connection",
            r"^DO \$ampd\$BEGIN RAISE INFO '\w+ %', pg_catalog.pg_backend_pid\(\); END\$ampd\$$",
            "Makes sure that a server stands behind the guard's connection, which a pooler may let wait.",
        ),
        Kind(
            "The guard takes the lock",
            r"^BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL statement_timeout = 0; SET LOCAL idle_in_transaction",
            "On the second connection: its open transaction holds the advisory lock, touches no table and has no "
            "snapshot that a concurrent build could wait for; the server ends it after 20 s of silence.",
        ),
        Kind(
            "The guard's heartbeat",
            r"^SELECT 1$",
            "Renews the guard's 20 s every few seconds, and checks before each statement that the lock is still held.",
        ),
        Kind(
            "Where the statements will run",
            r"jsonb_build_object\('pid', pg_catalog\.pg_backend_pid\(\), 'schema'",
            "Asks the first connection for its backend and schema: behind a pooler they can be others each time.",
        ),
        Kind(
            "Recording that the file has begun",
            r"^/\* ampd \w+ [358] .*INSERT INTO \"public\"\.ampd_schema_migrations",
            "The history row, committed before the first statement, with the column by which a run is resumed.",
        ),
        Kind(
            "A statement that can run in a transaction",
            r"^/\* ampd \w+ 3 .*UPDATE accounts",
            "Runs together with the record that it is done, so that it is never in doubt.",
        ),
        Kind(
            "Whether a build can only fail",
            r"to_jsonb\(EXISTS \(SELECT FROM pg_class c JOIN pg_class t",
            "Asks whether something has the name of the index already: such a build is not recorded as begun.",
        ),
        Kind(
            "Recording that a statement begins",
            r"^/\* ampd \w+ (3 .*SET statements_done = 1|[58] .*SET statements_done = 0), done_checksum",
            "Only a statement that cannot run in a transaction needs this: after a crash it may be done or not.",
        ),
        Kind(
            "Limits for a statement outside of a transaction",
            r"^/\* ampd \w+ [358] step \*/ DO .*pg_settings WHERE name OPERATOR\(pg_catalog\.=\) 'lock_timeout'",
            "No lock_timeout for a concurrent build, which would leave an INVALID index: it is watched instead.",
        ),
        Kind(
            "Whether somebody else builds an index there",
            r"ShareUpdateExclusiveLock(?!.*indisvalid)",
            "Two concurrent builds on one table would wait for one another.",
        ),
        Kind(
            "A statement outside of a transaction",
            r"^/\* ampd \w+ \d+ step \*/ (CREATE INDEX CONCURRENTLY|CALL)",
            "Nothing is added but the comment, by which an orphaned statement is recognised.",
        ),
        Kind(
            "Whether the index is valid",
            r"'valid', bool_and",
            "After a build, since IF NOT EXISTS is content with an INVALID index; after a crash, whether it was done.",
        ),
        Kind(
            "Recording that a statement is done",
            r"^/\* ampd \w+ (3 .*SET statements_done = 2|5 .*SET statements_done = 1), done_checksum",
            "The update names the state that it follows: if another runner has gone on meanwhile, it finds no row.",
            like="Recording that a statement begins",
        ),
        Kind(
            "Recording that the file is done",
            r"^/\* ampd \w+ [35] .*SET finished_at = clock_timestamp\(\), statements_done = \d, name = ",
            "The row of the history as it stays.",
            like="Recording that a statement begins",
        ),
        Kind(
            "Resetting the session",
            r"^SET LOCAL statement_timeout = 0; SET SESSION AUTHORIZATION DEFAULT",
            "Takes back whatever the file has done to its session, before the next migration has it.",
        ),
        Kind("The guard lets go", r"^ROLLBACK; $", "Ends the guard's transaction, and with it the advisory lock."),
    ),
    "After an interruption": (
        Kind(
            "Going on with the file",
            r"^/\* ampd \w+ 5 (?!.*(INSERT INTO|UPDATE ONLY)).*RAISE INFO '\w+ lock'",
            "Under the lock: the history must still be as it was read.",
            like="Recording that the file has begun",
        ),
        Kind(
            "When the build was recorded as begun",
            r"SELECT to_jsonb\(h\.xmin::text\)",
            "The transaction that has written the row, once the table has been locked and looked at: what is older was "
            "not left by this migration.",
        ),
        Kind(
            "What an interrupted build has left",
            r"NOT i\.indisvalid",
            "INVALID indexes of the same table and name that are younger than that record.",
        ),
        Kind(
            "Dropping it",
            r"DROP INDEX CONCURRENTLY IF EXISTS",
            "Before the statement is run again.",
        ),
        Kind(
            "Recording a person's decision",
            r"DELETE FROM ONLY \"public\"\.ampd_schema_migrations",
            "`ampd resolve 8 --rolled-back`, under the same lock.",
        ),
    ),
    "Taking over a database": (
        Kind(
            "Reading another tool's history",
            r"INTO found\s+FROM \(SELECT \* FROM ONLY",
            "Locks it, looks whose it is, and reads it only if its owner is trusted and it is a plain table.",
        ),
        Kind(
            "Recording what it has applied",
            r"INSERT INTO \"taken\"\.ampd_schema_migrations",
            "One transaction, under the lock, with the checks of every other write to the history.",
        ),
        Kind(
            "Looking at amp's own tables",
            r"pg_get_constraintdef",
            "A line for each column, constraint, index, trigger and rule; without names of constraints and indexes.",
        ),
    ),
    "Looking at a whole database": (
        Kind(
            "Every history",
            r"HAVING count\(\*\) = ",
            "The one message of `ampd status --all`: finds every table with the columns of a history, locks and reads "
            "those of trusted owners, each in a block that ends with an error, so that its lock is released.",
        ),
    ),
}
KINDS = tuple(kind for group in GROUPS.values() for kind in group)
_OF_OTHERS = (r"^SELECT pg_advisory_unlock_all\(\);\s*CLOSE ALL",)  # what asyncpg's pool sends on release


class _Recording(Conversation):
    def __init__(self, messages: list[str]) -> None:
        super().__init__()
        self._messages = messages
        self._pending = b""

    def client_says(self, data: bytes) -> None:
        super().client_says(data)
        if self.stands:
            self._pending += data
            while len(self._pending) > 4 and len(self._pending) > (length := int.from_bytes(self._pending[1:5])):
                message, self._pending = self._pending[: length + 1], self._pending[length + 1 :]
                assert message[:1] in (b"Q", b"X"), f"neither a simple query nor the end of the session: {message!r}"
                if message[:1] == b"Q":
                    self._messages.append(message[5:-1].decode())


class Recorder(Proxy):
    """A proxy that keeps the text of every message of the simple protocol, and lets no other pass unnoticed."""

    def __init__(self, database: Database) -> None:
        super().__init__(database.server.host, database.server.port)
        self._database = database
        self.messages: list[str] = []

    def _conversation(self) -> Conversation:
        return _Recording(self.messages)

    @property
    def url(self) -> str:
        """The URL of the database, seen through here."""
        return f"postgresql://postgres@{self.host}:{self.port}/{self._database.name}"

    async def heard(self, word: str) -> None:
        """Wait until a message contains a word."""

        async def is_there() -> bool:
            return any(word in message for message in self.messages)

        await until(is_there)


async def record(database: Database) -> list[str]:
    """Return what ampd sends on an empty database: in a first run, and in some that are blocked, stopped or refused."""
    async with Recorder(database) as recorder:
        await ampd.migrate(recorder.url, migrations=FILES[:3])
        await ampd.migrate(recorder.url, migrations=FILES[:4])
        async with transaction(database, "LOCK TABLE accounts"):
            limits, refused = ampd.Limits(lock_timeout_secs=0.5), (*FILES[:4], FILES[8])
            run = asyncio.ensure_future(ampd.migrate(recorder.url, migrations=refused, limits=limits))
            await recorder.heard("pg_blocking_pids")
        with suppress(ampd.AmpdError):
            await run
        async with transaction(database, "SELECT FROM accounts"):
            run = asyncio.ensure_future(ampd.migrate(recorder.url, migrations=FILES[:5]))
            await end_backend(database, await building(database))
            with suppress(ampd.AmpdError):
                await run
        await ampd.migrate(recorder.url, migrations=FILES[:6])
        lent = asyncpg.create_pool(recorder.url, min_size=1, max_size=2, statement_cache_size=0)
        async with lent as pool, pool.acquire() as connection:
            await ampd.migrate(connection, migrations=FILES[:7])
        with suppress(ampd.AmpdError):
            await ampd.migrate(recorder.url, migrations=FILES[:8])
        await ampd.resolve(recorder.url, 8, ampd.Resolution.ROLLED_BACK, migrations=FILES[:8])
        await database.execute(TAKEN_OVER)
        await ampd.baseline(recorder.url, source="goose", migrations=FILES[:1], schema="taken")
        with suppress(ampd.AmpdError):
            await ampd.baseline(recorder.url, source="sqlx", schema="amp")
        await overview(ampd.MetadataDb(url=ampd.DatabaseUrl(recorder.url)))
        return recorder.messages


_FIXED = (
    (r"((RAISE INFO '+)|[a-z]_)[0-9a-f]{16}\b", r"\g<1>0123456789abcdef"),  # what tells what is ours from a script's
    (r"(ampd_)[0-9a-f]{16}_", r"\g<1>0123456789abcdef_"),
    (r"(c\.oid = )[1-9][0-9]*", r"\g<1>16384"),
    (r"(nspowner IN \(c\.relowner, )[0-9]+", r"\g<1>10"),
    (r"(worker := )[0-9]+", r"\g<1>4711"),
    (r"(, ''\) OPERATOR\(pg_catalog\.<>\) ')[0-9]+'", r"\g<1>750'"),
    (r"(age\(')[0-9]+'", r"\g<1>750'"),
    (r"x{1000,}", "xxx…"),
)


def fixed(message: str) -> str:
    """Return a message with what is random in it replaced by values that are always the same."""
    for pattern, value in _FIXED:
        message = re.sub(pattern, value, message)
    return message


def kind_of(message: str) -> Kind | None:
    """Return what kind of message it is; None for none of ampd's.

    Raises:
        LookupError: the page has no words for it.
    """
    for kind in KINDS:
        if re.search(kind.pattern, message, re.DOTALL):
            return kind
    if any(re.search(pattern, message) for pattern in _OF_OTHERS):
        return None
    raise LookupError(f"{__name__} has no kind for the message\n{message}")


def laid_out(message: str) -> str:
    """Return a message with a line break after each of its statements."""
    text, at = "", 0
    for start, end in split(message).spans():
        gap = message[at:start]
        text += gap if "\n" in gap or not text else gap.rstrip() + "\n"
        text, at = text + message[start:end], end
    return re.sub(r"[ ]+$", "", text + message[at:], flags=re.MULTILINE).rstrip()


def page(messages: Sequence[str]) -> str:
    """Return the page that shows the first message of each kind.

    Raises:
        LookupError: a message is of no kind, or there is none of a kind.
    """
    found: dict[Kind, str] = {}
    for message in map(fixed, messages):
        kind = kind_of(message)
        if kind is not None:
            found.setdefault(kind, message)
    if missing := [kind.title for kind in KINDS if kind not in found]:
        raise LookupError(f"nothing was recorded of: {', '.join(missing)}")
    return "\n".join(_lines(found))


def _lines(found: dict[Kind, str]) -> Iterator[str]:
    yield f"""# The SQL that ampd sends

Recorded between ampd and a server, and written by `{RENEW}`; a test fails when it is no longer what is sent. Every
message is one of the simple query protocol, and what it prepares is gone at its end, so that any pooler will do. Shown
is the first message of each kind, with a line break added after each of its statements; one that is much like another
is shown by the lines in which it differs. Random values are replaced by fixed ones: the word in ampd's own notices and
names (`0123456789abcdef`), process and transaction numbers, oids.

Whose code could run in these, and as whom, is in
[SECURITY.md](https://github.com/edgeandnode/ampd-migrate/blob/main/SECURITY.md);
why they are as they are, in [ARCHITECTURE.md](https://github.com/edgeandnode/ampd-migrate/blob/main/ARCHITECTURE.md).

The migrations are these, each named `step`:
"""
    for file in FILES:
        yield f"```sql\n-- {file.file}\n{fixed(file.sql).rstrip()}\n```\n"
    shown = {kind.title: message for kind, message in found.items()}
    for group, kinds in GROUPS.items():
        yield f"## {group}\n"
        for kind in kinds:
            text = laid_out(found[kind])
            block = f"```sql\n{text}\n```" if kind.like is None else _beside(laid_out(shown[kind.like]), text)
            yield f"### {kind.title}\n\n{kind.purpose}\n\n{block}\n"


def _beside(other: str, text: str) -> str:
    """Return what a message has in other ways than another one."""
    lines = list(unified_diff(other.splitlines(), text.splitlines(), n=1, lineterm=""))[2:]
    return "```diff\n" + "\n".join("@@" if line.startswith("@@") else line.rstrip() for line in lines) + "\n```"


async def _record_anew() -> list[str]:
    with ExitStack() as stack:
        database = Database(start_server(stack), "sql_page")
        await Database(database.server, "postgres").execute(f"CREATE DATABASE {database.name}")
        return await record(database)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(asyncio.run(_record_anew())), encoding="utf-8")
