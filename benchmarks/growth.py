"""Trivial migrations by the thousand: ampd beside psql with the same statements, rows and commits."""

import shutil
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.compare import run
from benchmarks.peers import AMPD
from benchmarks.record import Timing, TimingsRecord, facts
from benchmarks.server import Server
from benchmarks.workload import PreparedMigration

DATABASE = "bench_growth"
COUNTS = (1_000, 10_000)
ROUNDS = 3
PSQL = "psql"
FRESH, STARTED = "fresh", "start"  # of the latter nothing is pending

HISTORY = """\
CREATE TABLE ampd_schema_migrations (
    version bigint PRIMARY KEY, name text NOT NULL, checksum bytea NOT NULL, started_at timestamptz NOT NULL,
    finished_at timestamptz, statements_done integer NOT NULL, applied_by text NOT NULL, ampd_version text NOT NULL
);
"""


async def growth(server: Server, counts: Sequence[int] = COUNTS, rounds: int = ROUNDS) -> TimingsRecord:
    """Applies each number of migrations to empty databases, and then starts each program once with nothing to do."""
    psql = [shutil.which("psql") or "psql", "--no-psqlrc", "--quiet", "--output", "/dev/null"]
    url = server.url_of(DATABASE)
    timings = []
    with TemporaryDirectory() as scratch:
        for count in counts:
            folder = Path(scratch, str(count))
            folder.mkdir()
            migrations = [
                PreparedMigration(number, f"step_{number}", f"SELECT {number};\n") for number in numbers(count)
            ]
            AMPD.lay_out(migrations, folder)
            (folder / "all.sql").write_text("".join(_script(migrations)))
            ways = {
                (AMPD.name, FRESH): AMPD.argv(url),
                (AMPD.name, STARTED): AMPD.argv(url),
                (PSQL, FRESH): [*psql, "--set", "ON_ERROR_STOP=1", "--file", "all.sql", url],
                (PSQL, STARTED): [*psql, "--command", "SELECT 1", url],
            }
            for number in range(rounds):
                for (subject, scenario), argv in ways.items():
                    if scenario == FRESH:
                        await server.create_anew(DATABASE)
                    seconds = await run(argv, folder, **{AMPD.url_variable: url})
                    timings.append(Timing(subject, f"{count} {scenario}", number, seconds))
    return TimingsRecord(facts(await server.release()), timings)


def growth_report(record: TimingsRecord) -> Iterator[str]:
    """Yield a table: each number of migrations, without what the program takes to start."""
    yield "|  | ampd | psql | ratio | without the start |"
    yield "| --: | --: | --: | --: | --: |"
    for count in dict.fromkeys(int(timing.case.split()[0]) for timing in record.timings):
        (fresh, start), (psql, psql_start) = (
            [record.median(subject, f"{count} {scenario}") for scenario in (FRESH, STARTED)]
            for subject in (AMPD.name, PSQL)
        )
        bare = (fresh - start) / (psql - psql_start)
        yield f"| {count:,} | {fresh:.2f} s | {psql:.2f} s | {fresh / psql:.2f} | {bare:.2f} |"


def numbers(count: int) -> range:
    """Return the versions of so many migrations."""
    return range(1, count + 1)


def _script(migrations: Sequence[PreparedMigration]) -> Iterator[str]:
    yield HISTORY
    for each in migrations:
        yield (
            f"BEGIN;\n{each.sql}INSERT INTO ampd_schema_migrations VALUES ({each.version}, '{each.name}', "
            f"'\\x{sha256(each.sql.encode()).hexdigest()}', now(), now(), 1, current_user, 'psql');\nCOMMIT;\n"
        )
