"""What ends a migration from outside of its file: a person, a limit, a full disk, a server without PL/pgSQL."""

from collections.abc import Awaitable, Callable

import anyio
import pytest

import ampd
from tests.scenes import scripts, skip_before, transaction, waiting_for_a_lock
from tests.servers import Database

pytestmark = pytest.mark.anyio

GATE = "LOCK TABLE gate IN ACCESS EXCLUSIVE MODE"
KEPT = "nothing of this migration was kept: run again"
CANCELLED = "a person or a program has cancelled it (pg_cancel_backend)"
UNFINISHED = "it is recorded as unfinished: fix the cause and run `ampd migrate` again; it resumes at this statement"


async def failure(database: Database, *texts: str, **options: object) -> ampd.AmpdError:
    """Return the error of a run of these migrations."""
    with pytest.raises(ampd.AmpdError) as caught:
        await ampd.migrate(database.url, migrations=scripts(*texts), **options)  # type: ignore[arg-type]
    return caught.value


async def interrupted(database: Database, text: str, end: Callable[[int], Awaitable[object]]) -> ampd.AmpdError:
    """Return the error of a migration whose backend meets this end while it waits for a lock."""
    await database.execute("CREATE TABLE gate ()")
    errors = list[ampd.AmpdError]()

    async def run() -> None:
        errors.append(await failure(database, text))

    async with transaction(database, GATE), anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        (worker,) = await waiting_for_a_lock(database)
        await end(worker)
    return errors[0]


@pytest.mark.parametrize(
    ("directive", "hint"),
    [
        ("", f"{CANCELLED}; {KEPT}"),
        ("-- no-transaction\n", f"{CANCELLED}; {UNFINISHED}"),
    ],
    ids=["in a transaction", "outside of one"],
)
async def test_a_cancelled_statement_is_no_timeout(database: Database, directive: str, hint: str) -> None:
    """Somebody's pg_cancel_backend is told as that; statement_timeout has nothing to do with it."""
    error = await interrupted(
        database,
        f"{directive}SELECT 1;\nSELECT FROM gate;\n",
        lambda worker: database.fetchval("SELECT pg_cancel_backend($1)", worker),
    )
    line = 3 if directive else 2
    assert error.message == f"1_step.sql:{line}: canceling statement due to user request (SQLSTATE 57014)"
    assert (error.code, error.hint) == ("migration_failed", hint)


@pytest.mark.parametrize(
    ("sqlstate", "hint"),
    [
        ("53100", f"the server's disk is full: make room; {KEPT}"),
        ("53200", f"the server is out of memory or of another resource; {KEPT}"),
        ("58030", f"the server's own storage or system has failed: see its log; {KEPT}"),
        ("XX001", f"the server's own data are damaged, or it has a bug: see its log; {KEPT}"),
        ("40001", f"another transaction was in its way; {KEPT}"),
        ("22012", KEPT.replace("run", "fix the file and run")),
    ],
)
async def test_the_file_is_not_blamed_for_its_server(database: Database, sqlstate: str, hint: str) -> None:
    """A full disk is nothing that a change of the file would mend."""
    body = f"DO $$ BEGIN RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END $$"
    error = await failure(database, body)
    assert (error.message, error.hint) == (f"1_step.sql:1: no (SQLSTATE {sqlstate})", hint)


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"], ids=["in a transaction", "outside of one"])
async def test_a_transaction_timeout_of_the_file(database: Database, directive: str) -> None:
    """A limit that the file itself has set is told as that, with the statement that it has met."""
    skip_before(database, 17, "transaction_timeout")
    text = f"{directive}BEGIN;\nSET transaction_timeout = '100ms';\nSELECT pg_sleep(9);\nCOMMIT"
    error = await failure(database, text if directive else "SET transaction_timeout = '100ms';\nSELECT pg_sleep(9)")
    line = 4 if directive else 2
    assert error.message == f"1_step.sql:{line}: terminating connection due to transaction timeout (SQLSTATE 25P04)"
    assert error.code == "migration_failed"
    assert error.hint is not None
    assert error.hint.startswith("the file, or a function that it calls, sets transaction_timeout: raise it; ")


MISSING = "ampd needs the language plpgsql, which this database lacks"
FORBIDDEN = "ampd needs the language plpgsql, which this role may not use"


@pytest.mark.parametrize("command", ["status", "migrate"])
async def test_a_database_without_plpgsql(database: Database, command: str) -> None:
    """What ampd itself needs of the database is named as that, by every command."""
    await database.execute("DROP EXTENSION plpgsql")
    with pytest.raises(ampd.ConfigError) as caught:
        await getattr(ampd, command)(database.url, migrations=scripts("SELECT 1"))
    assert (caught.value.message, caught.value.hint) == (MISSING, "CREATE EXTENSION plpgsql, as the database's owner")


async def test_a_role_without_plpgsql(database: Database) -> None:
    """Where the language is kept from everybody, the GRANT is printed."""
    role = await database.role("plain", "CREATE ON SCHEMA public")
    await database.execute("REVOKE USAGE ON LANGUAGE plpgsql FROM PUBLIC")
    with pytest.raises(ampd.PermissionDenied) as caught:
        await ampd.status(role.url, migrations=scripts("SELECT 1"))
    assert caught.value.message == FORBIDDEN
    assert caught.value.hint == f'as a superuser: GRANT USAGE ON LANGUAGE plpgsql TO "{role.name}"'


async def test_a_migration_that_takes_plpgsql_away(database: Database) -> None:
    """It is rolled back, and the reason is ampd's need of the language."""
    error = await failure(database, "SELECT 1;\nDROP EXTENSION plpgsql;\nSELECT 2;\n")
    assert error.message == "1_step.sql:2: ampd needs the language plpgsql, which this database lacks after it"
    assert error.code == "migration_failed"
