"""Long campaigns that a test suite has no time for: kills, races and waiting builds by the hundred.

    python -m tests.campaign kills --folder DIR [--kills 1000] [--prepare SQL] [--psql PROGRAM]
    python -m tests.campaign races [--processes 100] [--rounds 50] [--pooled]
    python -m tests.campaign losses --folder DIR [--cuts 1000] [--prepare SQL] [--lent]
    python -m tests.campaign builds [--waiters 50] [--rounds 20]
    python -m tests.campaign rehearsals [--rounds 10] [--clients 4]
    python -m tests.campaign libraries [--processes 20] [--rounds 20] [--pooled]
    python -m tests.campaign services [uvicorn | gunicorn | hypercorn …] [--rounds 50]
    python -m tests.campaign stops [--seconds 25]
    python -m tests.campaign suites [--kills 20] [--managed]

Each prints one line of figures, and exits 1 if anything went wrong.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import asyncpg
from cyclopts import App, Parameter

import ampd as library
from ampd.apply.rehearsal_report import Rehearsal
from ampd.preview import rehearse
from ampd.testing.shared_server import folder_of as test_folder
from tests.conftest import start_server
from tests.folders import write
from tests.libraries import MEMBERS, SHARED
from tests.servers import Ampd, Server, Treacherous, pgbouncer
from tests.services import EXAMPLES, RECIPES, Recipe, service

app = App(name="campaign", help=__doc__, result_action="return_value")

CATALOG = """
SELECT n.nspname, c.relname, c.relkind::text, c.relpersistence::text,
       (SELECT array_agg(row(a.attname, a.atttypid::regtype, a.attnotnull, pg_get_expr(d.adbin, d.adrelid))::text
                         ORDER BY a.attnum)
          FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND NOT a.attisdropped) AS columns,
       (SELECT array_agg(pg_get_constraintdef(k.oid) ORDER BY k.conname) FROM pg_constraint k
         WHERE k.conrelid = c.oid) AS constraints,
       CASE WHEN c.relkind IN ('i', 'I') THEN pg_get_indexdef(c.oid) END AS index,
       (SELECT i.indisvalid FROM pg_index i WHERE i.indexrelid = c.oid) AS valid,
       obj_description(c.oid, 'pg_class') AS comment
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname !~ '^(pg_|information_schema)' AND c.relname !~ '^ampd_schema_migrations'
 ORDER BY 1, 2, 3"""
FUNCTIONS = """
SELECT n.nspname, p.proname, pg_get_function_identity_arguments(p.oid), p.prosrc FROM pg_proc p
  JOIN pg_namespace n ON n.oid = p.pronamespace
 WHERE n.nspname !~ '^(pg_|information_schema)' ORDER BY 1, 2, 3, 4"""


@app.command
def kills(*, folder: Path, kills: int = 1000, prepare: Path | None = None, seed: int = 1) -> int:
    """Kill `ampd migrate` at random instants until it is through, again and again, and compare what it has built."""
    chance = random.Random(seed)
    folder = folder.absolute()
    with _server() as server, tempfile.TemporaryDirectory() as scratch:
        ampd = Ampd(Path(scratch))
        whole = _fresh(server, "whole", prepare)
        begun = time.monotonic()
        assert ampd("migrate", "--migrations", folder, url=whole).returncode == 0
        longest = time.monotonic() - begun
        reference = asyncio.run(_catalog(whole))
        killed = databases = different = interrupted = 0
        while killed < kills:
            url = _fresh(server, "killed", prepare)
            databases += 1
            while True:
                process = ampd.start("migrate", "--migrations", folder, url=url)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=chance.uniform(0.1, longest))
                    break
                process.kill()
                process.communicate()
                killed += 1
                if chance.random() < 0.05:  # now and then the next one is let through
                    break
            last = ampd("migrate", "--migrations", folder, url=url)
            if "ampd resolve" in last.stderr:  # a person has to look: after a DO that commits by itself, say
                interrupted += 1
                continue
            found = asyncio.run(_catalog(url)) if last.returncode == 0 else []
            if found != reference:
                different += 1
                print(last.stderr, f"{len(set(found) ^ set(reference))} rows of the catalog differ", file=sys.stderr)
        print(f"kills {killed}, databases {databases}, differences {different}, interrupted {interrupted}")
        return int(different > 0)


@app.command
def losses(
    *,
    folder: Path,
    cuts: int = 1000,
    prepare: Path | None = None,
    seed: int = 1,
    lent: Annotated[bool, Parameter(negative=())] = False,
) -> int:
    """Cut each connection of `ampd.migrate` at a random moment until it is through; compare, and count other errors."""
    with _server() as server:
        whole = _fresh(server, "whole", prepare)
        files = library.read_migrations(folder)
        begun = time.monotonic()
        asyncio.run(library.migrate(whole, migrations=files))
        longest, reference = time.monotonic() - begun, asyncio.run(_catalog(whole))
        chance, count = random.Random(seed), Counter[str]()
        while count["cuts"] < cuts:
            url = _fresh(server, "cut", prepare)
            count["databases"] += 1
            asyncio.run(_through_cuts(server, files, chance, 3 * longest, count, lent=lent))
            if asyncio.run(_catalog(url)) != reference:
                count["differences"] += 1
        print(", ".join(f"{name} {count[name]}" for name in ("cuts", "databases", "failures", "differences", "others")))
        return int(count["differences"] + count["others"] > 0)


async def _through_cuts(
    server: Server,
    files: tuple[library.Migration, ...],
    chance: random.Random,
    longest: float,
    count: Counter[str],
    *,
    lent: bool,
) -> None:
    limits = library.Limits(connect_wait_secs=60)
    async with contextlib.AsyncExitStack() as stack:
        line = await stack.enter_async_context(Treacherous(server, chance, longest))
        url = f"postgresql://postgres@{line.host}:{line.port}/cut?sslmode=disable"
        source = await stack.enter_async_context(asyncpg.create_pool(url, min_size=0, max_size=3)) if lent else url
        for attempt in range(11):
            try:
                await library.migrate(source if attempt < 10 else server.url("cut"), migrations=files, limits=limits)
                break
            except library.ConnectionFailed:
                count["failures"] += 1
            except Exception:
                count["others"] += 1
                traceback.print_exc()
        count["cuts"] += line.cuts


@app.command
def races(*, processes: int = 100, rounds: int = 50, pooled: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Start many runners at once on an empty database, and count."""
    with _server() as server, contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        front = stack.enter_context(pgbouncer(server, "transaction")) if pooled else server
        ampd = Ampd(Path(scratch))
        failures = wrong = 0
        for _ in range(rounds):
            url = _fresh(server, "race")
            runners = [ampd.start("migrate", "--json", url=front.url("race")) for _ in range(processes)]
            codes = Counter[int]()
            for runner in runners:
                _, said = runner.communicate(timeout=300)
                codes[runner.returncode] += 1
                if runner.returncode:
                    print(said, file=sys.stderr)
            failures += processes - codes[0]
            wrong += asyncio.run(_count(url)) != (7, 7, 0)
        print(f"processes {processes}, rounds {rounds}, pooled {pooled}: failures {failures}, wrong databases {wrong}")
        return int(failures + wrong > 0)


@app.command
def builds(*, waiters: int = 50, rounds: int = 20) -> int:
    """Let many runners wait while one builds an index concurrently, and count deadlocks."""
    with _server() as server, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "migrations"
        folder.mkdir()
        (folder / "1_table.sql").write_text("CREATE TABLE t AS SELECT g AS x FROM generate_series(1, 200000) g;\n")
        (folder / "2_index.sql").write_text("-- no-transaction\nCREATE INDEX CONCURRENTLY t_x ON t (x);\n")
        ampd = Ampd(Path(scratch))
        failures = wrong = 0
        for _ in range(rounds):
            url = _fresh(server, "build")
            runners = [ampd.start("migrate", "--migrations", folder, url=url) for _ in range(waiters)]
            for runner in runners:
                _, said = runner.communicate(timeout=300)
                if runner.returncode:
                    failures += 1
                    print(said, file=sys.stderr)
            wrong += asyncio.run(_count(url)) != (2, 2, 0)
        print(f"waiters {waiters}, rounds {rounds}: failures {failures}, wrong databases {wrong}")
        return int(failures + wrong > 0)


@app.command
def libraries(*, processes: int = 20, rounds: int = 20, pooled: Annotated[bool, Parameter(negative=())] = False) -> int:
    """Let two libraries and an application migrate in one database, many processes of each at once, and count."""
    with _server() as server, contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        front = stack.enter_context(pgbouncer(server, "session")) if pooled else server
        ampd = Ampd(Path(scratch))
        for member in MEMBERS:
            files = {each.file: each.sql for each in member.migrations}
            write(Path(scratch) / member.name, files)
        failures = wrong = 0
        for _ in range(rounds):
            url = _fresh(server, "libraries")
            asyncio.run(_execute(url, SHARED))
            runners = [
                ampd.start("migrate", "--migrations", member.name, url=front.url("libraries"), env=member.environment)
                for number in range(processes)
                for member in [MEMBERS[number % len(MEMBERS)]]
            ]
            for runner in runners:
                _, said = runner.communicate(timeout=300)
                if runner.returncode:
                    failures += 1
                    print(said, file=sys.stderr)
            wrong += any(asyncio.run(_count(url, member.history)) != (4, 4, 0) for member in MEMBERS)
        print(f"processes {processes}, rounds {rounds}, pooled {pooled}: failures {failures}, wrong databases {wrong}")
        return int(failures + wrong > 0)


async def _execute(url: str, sql: str) -> None:
    connection = await asyncpg.connect(url)
    await connection.execute(sql)
    await connection.close()


@app.command
def services(*names: str, rounds: int = 50) -> int:
    """Start eight workers of each server's example on an empty database, again and again, and count."""
    failures = wrong = 0
    with _server() as server:
        for name in names or RECIPES:
            recipe = RECIPES[name]
            eight = Recipe(recipe.module, (*recipe.arguments, "--workers=8"), recipe.application, 8, recipe.says)
            begun = time.monotonic()
            for _ in range(rounds):
                url = _fresh(server, "service")
                with service(eight, url) as running:
                    running.wait_for(eight.says, eight.workers)
                    if running.log.count(eight.says) != eight.workers or "worker" not in running.get("/visit"):
                        failures += 1
                        print(running.log, file=sys.stderr)
                wrong += asyncio.run(_count(url)) != (2, 2, 0)
            print(f"{name}: {rounds} starts of {eight.workers} workers in {time.monotonic() - begun:.0f} s")
    print(f"failures {failures}, wrong databases {wrong}")
    return int(failures + wrong > 0)


STOPS = {
    "uvicorn": ("uvicorn", ()),
    "uvicorn, 2 workers": ("uvicorn", ("--workers=2",)),
    "gunicorn": ("gunicorn", ("--no-control-socket", "--worker-class=uvicorn_worker.UvicornWorker")),
    "gunicorn, 3 s of grace": (
        "gunicorn",
        ("--no-control-socket", "--worker-class=uvicorn_worker.UvicornWorker", "--graceful-timeout=3"),
    ),
    "hypercorn": ("hypercorn", ()),
    "hypercorn, in one process": ("hypercorn", ("--workers=0",)),
}


@app.command
def stops(*, seconds: int = 25) -> int:
    """Send SIGTERM to each server while a migration of so many seconds runs in its lifespan, and print what happens."""
    with _server() as server, tempfile.TemporaryDirectory() as scratch:
        folder = Path(shutil.copytree(EXAMPLES, Path(scratch) / "examples"))
        slow = f"CREATE TABLE slow (x int);\nSELECT pg_sleep({seconds});\n"
        (folder / "shop" / "migrations" / "3_slow.sql").write_text(slow)
        for application in ("starlette_app:app", "stopping_app:app"):
            for name, (module, arguments) in STOPS.items():
                url = _fresh(server, "stop")
                with service(Recipe(module, arguments, application, 1), url, folder=folder) as running:
                    while not asyncio.run(_sleeps(url)):
                        time.sleep(0.1)
                    begun = time.monotonic()
                    running.process.terminate()
                    code = running.exit_code()
                    took = time.monotonic() - begun
                result = "applied" if asyncio.run(_count(url))[1] == 3 else "rolled back"
                print(f"{application}, {name}: exit {code} after {took:.1f} s, {result}")
    return 0


REHEARSED = {
    "1_filler.sql": "ALTER TABLE pgbench_accounts ADD COLUMN note text, ALTER COLUMN filler TYPE varchar(90);",
    "2_index.sql": "CREATE INDEX ON pgbench_history (tid); COMMENT ON TABLE pgbench_branches IS 'changed';",
    "3_still.sql": "UPDATE still SET x = x + 1; DROP INDEX still_x; CREATE TABLE made AS TABLE pgbench_tellers;",
    "4_slow.sql": "TRUNCATE pgbench_history; SELECT pg_sleep(0.3);",
}
LOCKS = """
SELECT c.oid::regclass::text AS table, l.mode FROM pg_locks l
  JOIN pg_stat_activity a USING (pid) JOIN pg_class c ON c.oid = l.relation AND c.relkind = 'r'
 WHERE a.application_name = 'ampd rehearsal' AND l.granted AND c.relnamespace = 'public'::regnamespace"""


@app.command
def rehearsals(*, rounds: int = 10, clients: int = 4) -> int:
    """Rehearse under pgbench, again and again; compare the dump, and the locks with those that another session sees."""
    with _server() as server, tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "migrations"
        folder.mkdir()
        for name, text in REHEARSED.items():
            (folder / name).write_text(text)
        url = _fresh(server, "rehearsed")
        subprocess.run(["pgbench", "-q", "-i", "-s", "1", url], check=True, capture_output=True)
        asyncio.run(_execute(url, "CREATE TABLE still AS SELECT x FROM generate_series(1, 10000) x"))
        asyncio.run(_execute(url, "CREATE INDEX still_x ON still (x)"))
        before, failures, changed, different = _dump(url), 0, 0, 0
        for number in range(rounds):
            seconds = ["-T", "600", "-n", "-c", str(clients), "-b", "tpcb-like" if number % 2 else "select-only"]
            bench = subprocess.Popen(["pgbench", *seconds, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                rehearsal, seen = asyncio.run(_rehearse_and_look(url, folder))
            finally:
                bench.terminate()
                bench.wait()
            if rehearsal.error is not None:
                failures += 1
                print(rehearsal.error, file=sys.stderr)
                continue
            told = {
                (lock.table.removeprefix("public."), f"{lock.mode.title().replace(' ', '')}Lock")
                for each in rehearsal.migrations
                for lock in each.locks
            }
            different += not told <= seen or {table for table, _ in seen} != {table for table, _ in told}
            changed += _dump(url) != before
        print(f"rounds {rounds}: failures {failures}, dumps that differ {changed}, locks that differ {different}")
        return int(failures + changed + different > 0)


async def _rehearse_and_look(url: str, folder: Path) -> tuple[Rehearsal, set[tuple[str, str]]]:
    """Return what a rehearsal says, and the locks that another session has seen it hold on tables that were there."""
    seen = set[tuple[str, str]]()
    configured = library.MetadataDb(url=library.DatabaseUrl(url), migrations=library.Migrations(dir=folder))
    watcher = await asyncpg.connect(url)
    rehearsing = asyncio.create_task(rehearse(configured, secs=60))
    while not rehearsing.done():
        seen |= {(row["table"], row["mode"]) for row in await watcher.fetch(LOCKS)}
    await watcher.close()
    return await rehearsing, seen


def _dump(url: str) -> str:
    """Return the whole database as SQL, but for the rows that pgbench changes."""
    command = ["pg_dump", "--exclude-table-data=pgbench_*", url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return "\n".join(line for line in text.splitlines() if not line.startswith(("\\restrict", "\\unrestrict")))


SUITE = {
    "pytest.ini": "[pytest]\nampd_migrations = .\n",
    "1_accounts.sql": "CREATE TABLE accounts (email text)",
    "test_many.py": """
import pytest

@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
@pytest.mark.parametrize("number", range(40))
async def test_it(ampd_pool, number):
    await ampd_pool.execute("INSERT INTO accounts VALUES ('a'); SELECT pg_sleep(0.05)")
    assert await ampd_pool.fetchval("SELECT count(*) FROM accounts") == 1
""",
}


@app.command
def suites(*, kills: int = 20, managed: Annotated[bool, Parameter(negative=())] = False, seed: int = 1) -> int:
    """Kill pytest with its four workers in the middle of a project's tests, run them again, and count what is left."""
    chance, count = random.Random(seed), Counter[str]()
    with _server() as server, tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), SUITE)
        environment = os.environ | ({} if managed else {"AMPD_TEST_URL": server.url()})

        def start() -> subprocess.Popen[str]:
            return subprocess.Popen(
                [sys.executable, "-m", "pytest", "-q", "-n", "4"],
                cwd=scratch,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,  # to be killed together with the workers
            )

        begun = time.monotonic()
        start().communicate()
        longest = time.monotonic() - begun
        folder = test_folder(scratch)
        for _ in range(kills):
            process = start()
            while process.poll() is None and not (folder.exists() if managed else asyncio.run(_test_databases(server))):
                time.sleep(0.01)  # importing takes most of the time, and leaves nothing behind
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=chance.uniform(0, longest if managed else longest / 4))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            count["killed"] += process.returncode == -signal.SIGKILL
            count["left by kills"] += asyncio.run(_test_databases(server))
            process = start()
            said, _ = process.communicate()
            if process.returncode:
                count["failures"] += 1
                print(said, file=sys.stderr)
            count["left in the end"] += asyncio.run(_test_databases(server))
        give_up = time.monotonic() + 30
        while folder.exists() and time.monotonic() < give_up:
            time.sleep(0.1)
        count["servers left"] += folder.exists()
    names = ("killed", "left by kills", "failures", "left in the end", "servers left")
    print(f"managed {managed}: " + ", ".join(f"{name} {count[name]}" for name in names))
    return int(count["failures"] + count["left in the end"] + count["servers left"] > 0)


async def _test_databases(server: Server) -> int:
    connection = await asyncpg.connect(server.url())
    found: int = await connection.fetchval("SELECT count(*) FROM pg_database WHERE datname ~ '^ampd_test_'")
    await connection.close()
    return found


@contextlib.contextmanager
def _server() -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        yield start_server(stack)


def _fresh(server: Server, name: str, prepare: Path | None = None) -> str:
    async def make() -> None:
        admin = await asyncpg.connect(server.url("postgres"))
        await admin.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        await admin.execute(f"CREATE DATABASE {name}")
        await admin.close()
        if prepare is not None:
            await _execute(server.url(name), prepare.read_text())

    asyncio.run(make())
    return server.url(name)


async def _catalog(url: str) -> list[tuple[str, ...]]:
    connection = await asyncpg.connect(url)
    rows = [*await connection.fetch(CATALOG), *await connection.fetch(FUNCTIONS)]
    unfinished = await connection.fetchval("SELECT count(*) FROM ampd_schema_migrations WHERE finished_at IS NULL")
    await connection.close()
    return [*(tuple(map(str, row)) for row in rows), (str(unfinished),)]


async def _sleeps(url: str) -> bool:
    connection = await asyncpg.connect(url)
    query = "SELECT EXISTS (SELECT FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database())"
    found: bool = await connection.fetchval(query)
    await connection.close()
    return found


async def _count(url: str, history: str = "ampd_schema_migrations") -> tuple[int, int, int]:
    connection = await asyncpg.connect(url)
    row = await connection.fetchrow(
        "SELECT count(*), count(finished_at), (SELECT count(*) FROM pg_locks WHERE locktype = 'advisory')"
        f" FROM {history}"
    )
    await connection.close()
    return tuple(row)


if __name__ == "__main__":
    sys.exit(app())
