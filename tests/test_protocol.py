"""The crash protocol of no-transaction files: every row of its tables, first by itself and then on a database."""

import asyncio
import sys
from contextlib import AsyncExitStack, nullcontext
from itertools import product
from pathlib import Path
from typing import NamedTuple

import anyio
import pytest

import ampd as library
from ampd.apply.protocol import AFTER_A_CRASH, TRANSITIONS, Protocol, State, Step
from ampd.resumption import done_checksum
from ampd.sql.splitter import split
from tests.scenes import Heard, end_backend, folder_of, scripts, transaction, waiting_for_a_lock
from tests.servers import Database

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(("state", "step"), list(product(State, Step)))
def test_each_state_takes_the_steps_of_the_table_and_no_other(state: State, step: Step) -> None:
    """A step that the table does not have is an error, and leaves the state as it was."""
    protocol = Protocol(state)
    if (state, step) in TRANSITIONS:
        protocol.take(step)
        assert protocol.state is TRANSITIONS[state, step]
    else:
        with pytest.raises(KeyError):
            protocol.take(step)
        assert protocol.state is state


def test_the_tables_agree_with_one_another() -> None:
    """What is recorded is in doubt after a crash; every state can be reached, and but for DONE left again."""
    assert {state for state in State if state.recorded} == {
        state for state, after in AFTER_A_CRASH.items() if after is State.IN_DOUBT
    }
    assert AFTER_A_CRASH.keys() == set(State)
    assert {*TRANSITIONS.values(), State.IN_DOUBT} == set(State)
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.DONE}


CRASH = """
import os, sys
import anyio
import ampd
from ampd.apply import protocol

url, folder, state, step = sys.argv[1:]
take = protocol.Protocol.take

def crash(self, taken):
    before = self.state.name
    take(self, taken)
    if (before, taken.name) == (state, step):
        os._exit(9)

protocol.Protocol.take = crash
limits = ampd.Limits(lock_timeout_secs=0.1, lock_retry_secs=0.5 if step == "WITHDRAW" else 60)
anyio.run(lambda: ampd.migrate(url, migrations=ampd.read_migrations(folder), limits=limits))
"""

INDEX = "CREATE INDEX CONCURRENTLY i ON t (id)"
UNIQUE = "CREATE UNIQUE INDEX CONCURRENTLY i ON t (id)"
TAKEN = "CREATE INDEX CONCURRENTLY taken ON t (more)"
MAYBE = "CREATE INDEX CONCURRENTLY IF NOT EXISTS taken ON t (id)"
IMPATIENT = f"SET lock_timeout = '50ms'; {TAKEN}"
CALL = "CALL p()"  # of which nobody can tell how far it came
EQUAL = "INSERT INTO t VALUES (1)"
BLOCKED = "LOCK TABLE t IN ACCESS EXCLUSIVE MODE"
APPLIED, INTERRUPTED, FAILED = "applied", "MigrationInterrupted", "MigrationFailed"


class Row(NamedTuple):
    """A crash right after a step: in which run of which file, and what is to be seen afterwards."""

    state: State
    step: Step
    sql: str
    recorded: tuple[int, int]  # how many statements the history has as done, and as begun
    then: str  # what the next run comes to
    before: str = ""  # what an earlier crash of the same file was after
    meanwhile: str = ""  # what a person, or a server that went on, has done since that crash
    blocker: str = ""  # what another session's transaction has done while the run lasts


ROWS = (
    Row(State.READY, Step.COMMIT, "INSERT INTO t VALUES (3)", (1, 1), APPLIED),
    Row(State.READY, Step.RECORD, INDEX, (0, 1), APPLIED),
    Row(State.READY, Step.RECORD, "VACUUM t", (0, 1), APPLIED),
    Row(State.READY, Step.RECORD, CALL, (0, 1), INTERRUPTED),
    Row(State.READY, Step.SEND, TAKEN, (0, 0), FAILED),
    Row(State.RECORDED, Step.SEND, INDEX, (0, 1), APPLIED),
    Row(State.RECORDED, Step.SEND, CALL, (0, 1), INTERRUPTED),
    Row(State.RECORDED, Step.WITHDRAW, INDEX, (0, 0), APPLIED, blocker="INSERT INTO t VALUES (4)"),
    Row(State.SENT, Step.REFUSE, UNIQUE, (0, 1), APPLIED, meanwhile=EQUAL),
    Row(State.SENT, Step.FINISH, INDEX, (1, 1), APPLIED),
    Row(State.SENT, Step.FINISH, CALL, (1, 1), APPLIED),
    Row(State.REFUSED, Step.SEND, "VACUUM FULL t", (0, 1), APPLIED, blocker=BLOCKED),
    Row(State.REFUSED, Step.WITHDRAW, "VACUUM nothing", (0, 0), FAILED),
    Row(State.TRIED, Step.SEND, IMPATIENT, (1, 1), FAILED, blocker=BLOCKED),
    Row(State.TRIED, Step.REFUSE, TAKEN, (0, 0), FAILED),
    Row(State.TRIED, Step.FINISH, MAYBE, (1, 1), APPLIED),
    Row(State.IN_DOUBT, Step.SEND, INDEX, (0, 1), APPLIED, before="RECORD"),
    Row(State.IN_DOUBT, Step.FINISH, INDEX, (1, 1), APPLIED, before="RECORD", meanwhile="CREATE INDEX i ON t (id)"),
)


def test_every_row_of_the_table_is_walked() -> None:
    """No transition is left out below."""
    assert {(row.state, row.step) for row in ROWS} == set(TRANSITIONS)


async def crash(database: Database, folder: Path, state: str, step: str) -> None:
    """Run `migrate` until it dies right after a step."""
    command = [sys.executable, "-c", CRASH, database.url, str(folder), state, step]
    ended = await anyio.run_process(command, check=False)
    assert ended.returncode == 9, ended.stderr.decode()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.state.name} {row.step.name} {row.sql.split()[0]}")
async def test_a_crash_after_each_step(database: Database, tmp_path: Path, row: Row) -> None:
    """The history says what the table says, and the next run ends as the table has it: nothing is run twice."""
    await database.execute(
        "CREATE TABLE t (id integer, more integer); INSERT INTO t VALUES (1), (2); CREATE INDEX taken ON t (id);"
        "CREATE TABLE calls (); CREATE PROCEDURE p() LANGUAGE sql AS 'INSERT INTO calls DEFAULT VALUES'"
    )
    files = scripts(f"-- no-transaction\n{row.sql}")
    folder, statements = folder_of(tmp_path / "m", files[0].sql), split(files[0].sql)
    if row.before:
        await crash(database, folder, State.READY.name, row.before)
    if row.meanwhile:
        await database.execute(row.meanwhile)
    async with AsyncExitStack() as others:
        if row.blocker:
            await others.enter_async_context(transaction(database, row.blocker))
        if row.step is Step.WITHDRAW and row.blocker:  # another's build on the same table waits for that transaction
            other = await others.enter_async_context(database.connect())
            task = asyncio.create_task(other.execute("CREATE INDEX CONCURRENTLY other ON t (id)"))
            others.callback(task.cancel)
            await waiting_for_a_lock(database)
        await crash(database, folder, row.state.name, row.step.name)
    (found,) = await database.fetch("SELECT statements_done, done_checksum FROM ampd_schema_migrations")
    checksums = [done_checksum(statements[:count]) for count in range(len(statements) + 1)]
    assert (found["statements_done"], checksums.index(found["done_checksum"])) == row.recorded
    if row.meanwhile == EQUAL:
        await database.execute("DELETE FROM t WHERE ctid = (SELECT max(ctid) FROM t WHERE id = 1)")
    with pytest.raises(library.AmpdError) if row.then != APPLIED else nullcontext() as failed:
        await library.migrate(database.url, migrations=files)
    assert row.then == (type(failed.value).__name__ if failed else APPLIED)
    assert await database.fetchval("SELECT count(*) FROM calls") == (row.step is Step.FINISH and row.sql == CALL)
    if row.then == APPLIED and row.sql in (INDEX, UNIQUE):
        assert await database.fetchval("SELECT indisvalid FROM pg_index WHERE indexrelid = 'i'::regclass")


@pytest.mark.any_server
async def test_a_statement_lost_at_a_later_attempt_stays_in_doubt(database: Database) -> None:
    """The refusal of an earlier attempt says nothing of the one that was lost with its connection."""
    await database.execute("CREATE TABLE t ()")
    files, heard, limits = scripts("-- no-transaction\nVACUUM FULL t"), Heard(), library.Limits(lock_timeout_secs=2)
    async with transaction(database, BLOCKED), anyio.create_task_group() as tasks:

        async def lose() -> None:
            await heard.first(library.LockRetry)
            (pid,) = await waiting_for_a_lock(database)
            await end_backend(database, pid)

        tasks.start_soon(lose)
        with pytest.raises(library.ConnectionFailed):
            await library.migrate(database.url, migrations=files, limits=limits, on_event=heard)
    recorded = await database.fetchval("SELECT done_checksum FROM ampd_schema_migrations")
    assert recorded == done_checksum(split(files[0].sql))
