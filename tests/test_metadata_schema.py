"""The packaged migrations add up to amp's metadata schema, and its rules hold in a living database."""

from collections.abc import AsyncIterator
from difflib import unified_diff
from typing import Any

import asyncpg
import pytest

import ampd
from ampd.config import HISTORY_TABLE as TABLE
from ampd.redaction import Hidden
from ampd.run import Run
from ampd.takeover.amp import NEWEST, packaged_facts, read_facts
from tests import schema_page
from tests.servers import Database
from tests.sql_page import RENEW

pytestmark = pytest.mark.anyio


TABLES = {fact.partition(":")[0] for fact in packaged_facts()}

# One row in each table, all hanging together; every id is 1.
LIFE = """
    INSERT INTO workers (node_id, heartbeat_at) VALUES ('node', now());
    INSERT INTO jobs (node_id, idempotency_key) VALUES ('node', 'key');
    INSERT INTO job_events (job_id, node_id, event_type) VALUES (1, 'node', 'SCHEDULED');
    INSERT INTO jobs_status (job_id, node_id, status) VALUES (1, 'node', 'SCHEDULED');
    INSERT INTO manifest_files (hash, path) VALUES ('hash', 'manifests/hash');
    INSERT INTO dataset_manifests (namespace, name, hash) VALUES ('space', 'blocks', 'hash');
    INSERT INTO tags (namespace, name, version, hash) VALUES ('space', 'blocks', '1.0.0', 'hash');
    INSERT INTO physical_table_revisions (path, writer) VALUES ('space/blocks/1', 1);
    INSERT INTO physical_tables (dataset_namespace, dataset_name, table_name, manifest_hash, active_revision_id)
        VALUES ('space', 'blocks', 'headers', 'hash', 1);
    INSERT INTO file_metadata (location_id, file_name, metadata, url) VALUES (1, 'a.parquet', '{}', 's3://a.parquet');
    INSERT INTO footer_cache (file_id, footer) VALUES (1, 'PAR1');
    INSERT INTO gc_manifest (location_id, file_id, file_path, expiration)
        VALUES (1, 1, 'a.parquet', (now() AT TIME ZONE 'utc') + interval '1 hour');
"""


@pytest.fixture
async def connection(database: Database) -> AsyncIterator[asyncpg.Connection]:
    """Return a connection to a database that the packaged migrations have just built."""
    await ampd.migrate(database.url)
    async with database.connect() as connection:
        yield connection


async def emptied(connection: asyncpg.Connection, deletion: str) -> set[str]:
    """Fill every table, delete something, and return the tables that are empty afterwards."""
    await connection.execute(LIFE)
    assert await connection.execute(deletion) == "DELETE 1"
    return {table for table in TABLES if not await connection.fetchval(f"SELECT count(*) FROM {table}")}


async def test_the_catalog_equals_the_transcribed_schema(database: Database) -> None:
    """The tables, columns, defaults, keys, delete rules and indexes are those transcribed, and no others.

    What amp's own database is compared with is the same list; the files that make it are never changed.
    """
    files = tuple(file for file in ampd.read_migrations() if file.version <= NEWEST)
    await ampd.migrate(database.url, migrations=files, schema="app")
    source: Hidden[Any] = Hidden(database.url)
    run = await Run.of(source, files, schema="app")
    async with run.sessions() as (session, *_):
        assert sorted(await read_facts(session, "app")) == sorted(packaged_facts())
    tables = await database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'app'")
    assert {row["tablename"] for row in tables} == TABLES | {TABLE}


async def test_later_migrations_name_no_constraint_or_index_of_the_first(connection: asyncpg.Connection) -> None:
    """In a database that amp's Rust ampd has migrated these have other names."""
    first = "".join(file.sql for file in ampd.read_migrations() if file.version <= NEWEST)
    names = await connection.fetch(
        "SELECT conname AS name FROM pg_constraint WHERE connamespace = 'public'::regnamespace "
        "UNION SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid::regclass::text = ANY ($1)",
        list(TABLES),
    )
    own = {row["name"] for row in names if row["name"] in first}
    assert len(own) > len(TABLES)
    later = "".join(file.sql for file in ampd.read_migrations() if file.version > NEWEST)
    assert [name for name in own if name in later] == []


@pytest.mark.one_version
async def test_the_page_shows_the_schema(connection: asyncpg.Connection) -> None:
    """docs/metadata-schema.md, diagram included, is what the catalog says, and no table is without a purpose."""
    built = schema_page.page(await schema_page.read(connection)).splitlines()
    shown = schema_page.PAGE.read_text(encoding="utf-8").splitlines()
    if built != shown:
        changes = "\n".join(unified_diff(shown, built, "docs/metadata-schema.md", "the catalog", n=1, lineterm=""))
        pytest.fail(f"docs/metadata-schema.md is not the schema: write it anew with `{RENEW}`\n{changes}")


async def test_no_table_has_a_trigger(connection: asyncpg.Connection) -> None:
    """The only triggers are the ones with which PostgreSQL keeps foreign keys."""
    assert await connection.fetch("SELECT tgname FROM pg_trigger WHERE NOT tgisinternal") == []


async def test_every_table_has_a_comment(connection: asyncpg.Connection) -> None:
    """A reader at the psql prompt finds a sentence on each table."""
    silent = [table for table in TABLES if not await connection.fetchval("SELECT obj_description($1::regclass)", table)]
    assert silent == []


async def test_a_job_takes_its_history_along_but_not_its_output(connection: asyncpg.Connection) -> None:
    """Deleting a job deletes its events and its status, and leaves its revision without a writer."""
    assert await emptied(connection, "DELETE FROM jobs") == {"jobs", "job_events", "jobs_status"}
    assert await connection.fetchval("SELECT writer FROM physical_table_revisions") is None


async def test_a_worker_with_jobs_stays(connection: asyncpg.Connection) -> None:
    """Deleting a worker that still has jobs is refused."""
    with pytest.raises(asyncpg.ForeignKeyViolationError):
        await emptied(connection, "DELETE FROM workers")


async def test_a_manifest_takes_its_links_and_tags_along(connection: asyncpg.Connection) -> None:
    """Deleting a manifest deletes its links to datasets and their tags, and leaves the data alone."""
    assert await emptied(connection, "DELETE FROM manifest_files") == {"manifest_files", "dataset_manifests", "tags"}


async def test_a_revision_takes_its_files_along_but_not_its_table(connection: asyncpg.Connection) -> None:
    """Deleting a revision deletes its files with all about them, and leaves its table without an active one."""
    assert await emptied(connection, "DELETE FROM physical_table_revisions") == {
        "physical_table_revisions",
        "file_metadata",
        "footer_cache",
        "gc_manifest",
    }
    assert await connection.fetchval("SELECT active_revision_id FROM physical_tables") is None


async def test_a_file_takes_its_footer_and_collection_along(connection: asyncpg.Connection) -> None:
    """Deleting a file deletes its footer and its planned collection."""
    assert await emptied(connection, "DELETE FROM file_metadata") == {"file_metadata", "footer_cache", "gc_manifest"}


@pytest.mark.parametrize("time_zone", ["UTC", "Pacific/Auckland", "America/Los_Angeles"])
@pytest.mark.parametrize("offset", ["-1 hour", "0"])
async def test_a_collection_cannot_expire_in_the_past(
    connection: asyncpg.Connection, time_zone: str, offset: str
) -> None:
    """An expiration that is not in the future of UTC is refused, whatever time zone the session is in."""
    await connection.execute("SELECT set_config('TimeZone', $1, false)", time_zone)
    await connection.execute(LIFE)
    with pytest.raises(asyncpg.CheckViolationError) as refused:
        await connection.execute(
            f"UPDATE gc_manifest SET expiration = (now() AT TIME ZONE 'utc') + interval '{offset}'"
        )
    assert refused.value.constraint_name == "gc_manifest_expiration_ck"
