"""An application and two libraries that migrate in one database, each under a history of its own."""

import msgspec

import ampd
from tests.scenes import scripts

# A table that all three change; run twice, a migration would fail.
SHARED = "CREATE TABLE public.shared (id integer, name text); INSERT INTO public.shared SELECT generate_series(1, 100)"


class Member(msgspec.Struct, frozen=True):
    """One of the three: where its history is, and its migrations."""

    name: str
    schema: str | None
    table: str | None

    @property
    def migrations(self) -> tuple[ampd.Migration, ...]:
        """Return migrations of both kinds, on tables of its own and on the shared one."""
        return scripts(
            f"CREATE TABLE {self.name} (id integer PRIMARY KEY, note text);",
            f"ALTER TABLE public.shared ADD COLUMN {self.name} integer;\nUPDATE public.shared SET {self.name} = id;",
            f"-- no-transaction\nCREATE INDEX CONCURRENTLY {self.name}_note ON {self.name} (note);\n"
            f"CREATE INDEX CONCURRENTLY shared_{self.name} ON public.shared ({self.name});\n",
            f"ALTER TABLE {self.name} ADD COLUMN done boolean;\nLOCK TABLE public.shared;",
        )

    @property
    def history(self) -> str:
        """Return the qualified name of its history."""
        return f"{self.schema or 'public'}.{self.table or 'ampd_schema_migrations'}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the same for the command line."""
        values = {"SCHEMA": self.schema, "MIGRATIONS__TABLE": self.table, "MIGRATIONS__LOCK_RETRY_SECS": "120"}
        return {f"AMP_CONFIG_METADATA_DB__{key}": value for key, value in values.items() if value}


MEMBERS = (
    Member("app", None, None),
    Member("queue", None, "queue_migrations"),
    Member("audit", "audit", "audit_migrations"),
)
