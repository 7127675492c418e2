"""Whose history table is believed and written, and what on it is refused."""

import pytest

from ampd.history import trusted_owner_sql
from tests.servers import Database

pytestmark = pytest.mark.anyio


async def test_trusted_owners_are_me_superusers_the_databases_owner_and_the_configured_role(database: Database) -> None:
    """A group that I am a member of is not among them, nor is anybody else."""
    me, group, owner, other = [await database.role(name) for name in ("me", "group", "owner", "other")]
    await database.execute(f"GRANT {group.name} TO {me.name}; ALTER DATABASE {database.name} OWNER TO {owner.name}")

    async def trusted(name: str, role: str | None) -> bool:
        async with database.connect(me.url) as connection:
            oid = f"(SELECT oid FROM pg_roles WHERE rolname = '{name}')"
            return bool(await connection.fetchval(f"SELECT {trusted_owner_sql(oid, role)}"))

    for name in (me.name, "postgres", owner.name):
        assert await trusted(name, None), name
    for name in (group.name, other.name, "pg_monitor"):
        assert not await trusted(name, None), name
    assert await trusted(other.name, other.name)
