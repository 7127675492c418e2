"""Databases made by the real tools, taken over and migrated on; and each with one row tampered with, refused.

    python -m tests.takeovers [--amp FOLDER] [TOOL …]

Fetches the tools as the benchmarks do. FOLDER has the 28 migration files of amp of 2026-03, which sqlx
then applies to another database. Exits 1 if anything was not as it should be.
"""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import asyncpg
from cyclopts import App

import ampd as library
from ampd.migration import checksum
from ampd.takeover.tools import TOOLS
from benchmarks.peers import PEERS, Absent, Subject, obtain
from benchmarks.workload import generated
from tests.conftest import start_server
from tests.servers import Server

app = App(name="takeovers", help=__doc__, result_action="return_value")

TAMPERED = {
    "sqlx": r"UPDATE _sqlx_migrations SET checksum = '\x00'",
    "flyway": "UPDATE flyway_schema_history SET checksum = checksum + 1",
    "alembic": "UPDATE alembic_version SET version_num = 'tampered'",
    "goose": "DELETE FROM goose_db_version WHERE id = 2",
    "golang-migrate": "UPDATE schema_migrations SET dirty = true",
    "dbmate": "UPDATE schema_migrations SET version = '1' WHERE version = (SELECT max(version) FROM schema_migrations)",
    "node-pg-migrate": "UPDATE pgmigrations SET name = name || 'x'",
    "yoyo": "UPDATE _yoyo_migration SET migration_id = migration_id || 'x'",
}
_LAST_SQL = "CREATE TABLE last ();\n"
LAST = library.Migration(20990101000000, "last", "20990101000000_last.sql", _LAST_SQL, checksum(_LAST_SQL.encode()))


class Wrong(Exception):
    """Something was not as it should be."""


async def execute(url: str, *statements: str) -> None:
    """Run statements, each by itself."""
    connection = await asyncpg.connect(url)
    for statement in statements:
        await connection.execute(statement)
    await connection.close()


async def take_over(server: Server, tool: str, files: Sequence[library.Migration]) -> None:
    """Refuse a copy in which a row was tampered with, take over the database, and migrate it on."""
    await execute(server.url(), "CREATE DATABASE tampered TEMPLATE made")
    await execute(server.url("tampered"), TAMPERED[tool])
    try:
        await library.baseline(server.url("tampered"), source=tool, migrations=files)
    except library.MigrationConflict as refused:
        print(f"{tool}: tampered with, refused: {refused.message.splitlines()[1].strip()}")
    else:
        raise Wrong(f"{tool}: a row was tampered with, and nobody minds")
    status = await library.baseline(server.url("made"), source="auto", migrations=files)
    if not status.up_to_date:
        raise Wrong(f"{tool}: {status.summary()}")
    report = await library.migrate(server.url("made"), migrations=(*files, LAST))
    if [each.version for each in report.applied] != [LAST.version]:
        raise Wrong(f"{tool}: {report.text()}")
    print(f"{tool}: {status.summary()}; taken over, and migrated on")


def make(server: Server, subject: Subject, folder: Path) -> None:
    """Let a tool migrate a fresh database by the files in a folder."""
    drop = [f"DROP DATABASE IF EXISTS {name} WITH (FORCE)" for name in ("made", "tampered")]
    asyncio.run(execute(server.url(), *drop, "CREATE DATABASE made"))
    url = f"{server.url('made')}?sslmode=disable"
    subprocess.run(
        subject.argv(url), cwd=folder, env=os.environ | {subject.url_variable: url}, check=True, capture_output=True
    )


def make_and_take_over(server: Server, tool: str, subject: Subject, folder: Path) -> None:
    """Let a tool migrate a database, and take it over with the same files, or with those under ampd's names."""
    scripts, ours = generated()[:3], folder / "migrations"
    subject.lay_out(scripts, folder)
    if tool in ("alembic", "flyway"):
        ours = folder / "ours"
        ours.mkdir()
        for script in scripts:
            (ours / f"{script.version}_{script.name}.sql").write_text(script.sql, encoding="utf-8")
    make(server, subject, folder)
    asyncio.run(take_over(server, tool, library.read_migrations(ours)))


@app.default
def takeovers(*tools: str, amp: Path | None = None) -> int:
    """Take over a database of each tool."""
    wrong = 0
    with ExitStack() as stack:
        server = start_server(stack)
        for subject in PEERS:
            tool = subject.name.lower()
            if tool not in TOOLS or (tools and tool not in tools):
                continue
            obtained = obtain(subject)
            if isinstance(obtained, Absent):
                print(f"{tool}: left out, {obtained.reason}")
                continue
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            try:
                make_and_take_over(server, tool, obtained, folder)
                if tool == "sqlx" and amp is not None:
                    shutil.copytree(amp, folder / "amp" / "migrations")
                    make(server, obtained, folder / "amp")
                    asyncio.run(take_over(server, tool, library.read_migrations()))
            except (Wrong, library.AmpdError, subprocess.CalledProcessError) as error:
                wrong += 1
                print(f"{tool}: {error}{getattr(error, 'stderr', '') or ''}", file=sys.stderr)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(app())
