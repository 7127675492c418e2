"""What the tests of security share: a stranger's traps, and who has stepped into them."""

from tests.scenes import scripts
from tests.servers import Database, Role

FILES = scripts(
    "CREATE TABLE victims (x int);\nINSERT INTO victims VALUES (1);",
    "-- no-transaction\nCREATE INDEX CONCURRENTLY i ON victims (x);\nSELECT 1;",
    "DROP TABLE victims;",
)


async def plant(database: Database, stranger: Role, sql: str) -> None:
    """Run SQL as the stranger; `snap(text)` and `snap()` note who has run them."""
    async with database.connect(stranger.url) as connection:
        await connection.execute(
            "CREATE FUNCTION snap(what text) RETURNS boolean LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO evidence.traps SELECT current_user, what; RETURN true; END $$;"
            "CREATE FUNCTION snap() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
            "INSERT INTO evidence.traps SELECT current_user, tg_name; RETURN new; END $$;" + sql
        )


async def caught(database: Database, victim: str = "postgres") -> list[tuple[str, str]]:
    """Return what has been run with the rights of the victim."""
    rows = await database.fetch("SELECT by, what FROM evidence.traps WHERE by = $1", victim)
    return [tuple(row) for row in rows]


TABLE = (
    "CREATE TABLE ampd_schema_migrations (version bigint PRIMARY KEY, name text NOT NULL, checksum bytea NOT NULL, "
    "started_at timestamptz NOT NULL, finished_at timestamptz, statements_done integer NOT NULL, "
    "applied_by text NOT NULL, ampd_version text NOT NULL);"
)
ROW = (
    f"INSERT INTO ampd_schema_migrations VALUES (1, 'step', '\\x{FILES[0].checksum.hex()}', now(), now(), 2, 'x', 'y');"
)
