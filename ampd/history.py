"""The history table and the turn: what the database remembers, and who may add to it next.

Writes the SQL of both, and runs none of it but the one read.

The lock is `pg_try_advisory_xact_lock`: it ends with its transaction, so that no crash, pooler or pool can strand it.
It is only ever tried: a statement that blocked on it would hold a snapshot, and the holder's CREATE INDEX CONCURRENTLY
would wait for that snapshot for ever.

Migrations may leave any search_path behind and strangers may own objects on it. So every name here is qualified,
operators included, and a history table is read only if it is a plain table, and written only if its owner could harm
us anyway.
"""

from __future__ import annotations

from datetime import datetime
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec

from .errors import ConfigError, MigrationFailed, PermissionDenied
from .migration import AppliedMigration
from .postgres import do_block, identifier, literal, read_only
from .version import VERSION

if TYPE_CHECKING:
    from .errors import AmpdError
    from .migration import Migration
    from .postgres import ServerError, Session

TABLE = "ampd_schema_migrations"

# Raised by the blocks below; the class AM is nobody else's.
BUSY = "AM001"  # another runner holds the lock
MOVED = "AM002"  # the history is not what the plan was made from
ESCAPED = "AM003"  # the migration ended the transaction that it ran in, or took its row out of the history
STRANGER = "AM004"  # the history table belongs to somebody whose triggers must not run with our rights

_UNSIGNED = 0xFFFF_FFFF_FFFF_FFFF

READ_LOCK_SECS = 10  # nobody locks a history table for so long but by hand
GUARD_LEASE_SECS = 20  # a guard that is silent for so long has lost its client


# What our own statements can only meet when somebody else has written, created or dropped the same thing just now:
# unique_violation, undefined_table, duplicate_table, duplicate_schema.
_COLLISIONS = ("23505", "42P01", "42P07", "42P06")


class TurnTaken(Exception):
    """Another runner has the lock, or has added to the history: read it again.

    `unless` is what the server's refusal means if it turns out that no other runner was there.
    """

    def __init__(self, message: str, *, unless: AmpdError | None = None) -> None:
        super().__init__(message)
        self.unless = unless


class Holder(msgspec.Struct, frozen=True):
    """The session that has the turn; what the role may not see is None."""

    pid: int
    application: str | None = None
    client: str | None = None
    since: datetime | None = None
    query: str | None = None

    @property
    def migration(self) -> str | None:
        """Return the migration that it runs, from the comment that its message begins with."""
        if self.query is None or not self.query.startswith("/* ampd "):
            return None
        return self.query.removeprefix("/* ampd ").partition(" */")[0].partition(" ")[2] or None


class History(msgspec.Struct, frozen=True):
    """One consistent read of everything a plan depends on."""

    database: str
    user: str
    host: str | None
    port: int | None
    pid: int
    read_only: bool
    schema: str | None
    schema_exists: bool
    table_exists: bool
    owner: str | None
    plain: bool | None
    lacks: str | None  # columns; looked for only in an empty table
    holder_known: bool
    holder: Holder | None
    applied: tuple[AppliedMigration, ...] = ()

    def with_row(self, row: AppliedMigration) -> History:
        """Return the history as it is after one more migration, told from our own commit without asking again."""
        rows = (*(known for known in self.applied if known.version != row.version), row)
        return msgspec.structs.replace(self, applied=rows, table_exists=True, schema_exists=True)

    @property
    def address(self) -> str:
        """Return `host:port/database` as the server sees itself."""
        return f"{self.host}:{self.port}/{self.database}" if self.host else f"local/{self.database}"

    @property
    def name(self) -> str:
        """Return the history table's qualified and quoted name."""
        assert self.schema is not None
        return f"{identifier(self.schema)}.{TABLE}"


class _Row(msgspec.Struct, frozen=True):
    """A row of the history table as JSON has it: bytes are `\\x` and hexadecimal digits."""

    version: int
    name: str
    checksum: str
    started_at: datetime
    finished_at: datetime | None
    statements_done: int
    applied_by: str
    ampd_version: str
    done_checksum: str | None = None

    def migration(self) -> AppliedMigration:
        return AppliedMigration(
            version=self.version,
            name=self.name,
            checksum=bytes.fromhex(self.checksum[2:]),
            started_at=self.started_at,
            finished_at=self.finished_at,
            statements_done=self.statements_done,
            applied_by=self.applied_by,
            ampd_version=self.ampd_version,
            done_checksum=None if self.done_checksum is None else bytes.fromhex(self.done_checksum[2:]),
        )


class _Answer(msgspec.Struct, frozen=True):
    """What the server answers to a read."""

    history: History
    rows: tuple[_Row, ...] | None


def lock_key(schema: str) -> int:
    """Return the advisory lock's key: 64 bits, signed, of the SHA-256 of the history table's qualified name."""
    return int.from_bytes(sha256(f"{schema}.{TABLE}".encode()).digest()[:8], "big", signed=True)


async def read(session: Session, schema: str | None, *, who: str | None = None) -> History:
    """Read the history in one round trip, in a read-only transaction; with `who` (a schema) also who has its turn.

    Raises:
        ConfigError: the table is not one of ampd's, or no schema of the search path exists.
        PermissionDenied: the role may not read the table, or use any schema of its search path.
    """
    try:
        answer = await session.ask(_read_message(session, schema, who), _Answer)
    except msgspec.ValidationError as error:
        raise _not_ours(f"{TABLE} in {schema or 'the search path'}", str(error)) from error
    history = msgspec.structs.replace(answer.history, applied=tuple(row.migration() for row in answer.rows or ()))
    session.role, session.pooled = history.user, history.pid != session.server_pid
    if history.schema is None:
        raise _leads_nowhere(history.user, await session.ask(_path_message(session), _SearchPath))
    if history.table_exists and not history.plain:
        raise ConfigError(
            f"{history.name} (owner {history.owner}) is not a plain table, so it is not read as ampd's history",
            hint=_ELSEWHERE,
        )
    if history.lacks:
        raise _not_ours(history.name, f"it has no column {history.lacks}")
    return history


class _SearchPath(msgspec.Struct, frozen=True):
    """A search path, and each schema that it names, quoted where need be, with whether it exists."""

    text: str
    schemas: tuple[tuple[str, bool], ...]


def _path_message(session: Session) -> str:
    document = r"""jsonb_build_object('text', path, 'schemas', (
    SELECT coalesce(jsonb_agg(jsonb_build_array(name, to_regnamespace(name) IS NOT NULL) ORDER BY position), '[]')
    FROM regexp_matches(path, '("(?:[^"]|"")*"|[^",\s]+)', 'g') WITH ORDINALITY _ (word, position),
      replace(word[1], '"$user"', quote_ident(current_user)) name
    WHERE name <> '""' AND NOT starts_with(name, 'pg_')))"""
    return do_block(f"""
DECLARE
  path pg_catalog.text := pg_catalog.current_setting('search_path');
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true);
  {session.note(document)}
END""")


def _leads_nowhere(user: str, path: _SearchPath) -> ConfigError | PermissionDenied:
    """Return the error for a search path on which there is no schema that the role may use."""
    role, otherwise = identifier(user), "or set metadata_db.schema"
    shown = f"the search path of role {user} ({path.text or 'empty'})"
    for schema, exists in path.schemas:
        if exists:
            grant = f"GRANT USAGE, CREATE ON SCHEMA {schema} TO {role}"
            return PermissionDenied(
                f"{shown} names no schema that it may use", hint=f"as its owner: {grant}; {otherwise}"
            )
    make = f"CREATE SCHEMA {path.schemas[-1][0]} AUTHORIZATION {role}" if path.schemas else ""
    hint = make or f"ALTER ROLE {role} SET search_path = public"
    return ConfigError(f"{shown} names no schema that exists", hint=f"{hint}; {otherwise}")


_ELSEWHERE = "if it is not yours, drop it; or keep the history elsewhere with metadata_db.schema"


def _not_ours(name: str, why: str) -> ConfigError:
    return ConfigError(f"{name} is not ampd's history table, or was changed by hand: {why}", hint=_ELSEWHERE)


def refuse_to_write(history: History) -> None:
    """Refuse to write to a server that takes no writes.

    Raises:
        ReadOnlyServer: a standby, or a database set to read-only.
    """
    if history.read_only:
        raise read_only(f"{history.address} takes no writes: a standby, or read-only by default")


def turned_away(error: ServerError, history: History) -> Exception | None:
    """Return what it means that `take_turn` or `insist_on` has refused; None for any other error."""
    if error.sqlstate in (BUSY, MOVED):
        return TurnTaken(error.message)
    if error.sqlstate in _COLLISIONS:
        return TurnTaken(error.message, unless=unwritable(error, history))
    if error.sqlstate == STRANGER:
        return PermissionDenied(
            f"the history table {history.name} belongs to {error.message}, who is neither a superuser, nor the owner "
            f"of the database or the schema, nor a role that {history.user} is a member of",
            hint=f"if it is rightly yours: ALTER TABLE {history.name} OWNER TO {identifier(history.user)}; "
            "if not, drop it, and REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        )
    return None


def unwritable(error: ServerError, history: History) -> AmpdError:
    """Return the error for a server that has refused what it is asked with every migration, whoever is to blame."""
    return MigrationFailed(
        f"the history table {history.name} could not be written: {error.message} (SQLSTATE {error.sqlstate})",
        hint="look for an event trigger, a trigger or a type that is in its way, and run again; nothing was kept",
        sqlstate=error.sqlstate,
        detail=error.detail,
    )


def _read_message(session: Session, schema: str | None, who: str | None) -> str:
    # Nothing may be looked up on the search path before the block has replaced it, types included; and every catalog
    # that a fresh backend need not open saves a tenth of a millisecond.
    places = "pg_catalog.current_schemas(false)" if schema is None else f"ARRAY[{literal(schema)}::pg_catalog.name]"
    holder = "NULL" if who is None else _holder(who)
    columns = ", ".join(literal(name) for name in _Row.__struct_fields__ if name != "done_checksum")
    document = f"""jsonb_build_object('rows', applied, 'history', jsonb_build_object(
    'database', current_database(), 'user', current_user, 'pid', pg_backend_pid(),
    'host', host(inet_server_addr()), 'port', inet_server_port(),
    'read_only', pg_is_in_recovery() OR current_setting('default_transaction_read_only') = 'on',
    'schema', CASE WHEN home IS NULL THEN first ELSE place END,
    'schema_exists', to_regnamespace(quote_ident(first)) IS NOT NULL,
    'table_exists', home IS NOT NULL, 'plain', plain, 'owner', owner, 'lacks', lacks,
    'holder_known', {"false" if who is None else "true"}, 'holder', {holder}))"""
    body = f"""
DECLARE
  places pg_catalog.name[] := {places};
  place pg_catalog.name;
  first pg_catalog.name;
  home pg_catalog.regclass;
  plain pg_catalog.bool;
  owner pg_catalog.name;
  lacks pg_catalog.text;
  applied pg_catalog.jsonb;
BEGIN
  PERFORM pg_catalog.set_config('search_path', 'pg_catalog, pg_temp', true),
          pg_catalog.set_config('bytea_output', 'hex', true),
          pg_catalog.set_config('lock_timeout', '{READ_LOCK_SECS}s', true),
          pg_catalog.set_config('statement_timeout', '30s', true);
  FOREACH place IN ARRAY places LOOP
    CONTINUE WHEN starts_with(place, 'pg_temp_');
    first := coalesce(first, place);
    home := to_regclass(quote_ident(place) || '.{TABLE}');
    EXIT WHEN home IS NOT NULL;
  END LOOP;
  IF home IS NOT NULL THEN
    -- A view, a policy, and a cast to json of a type that is not built in would all run a stranger's code.
    SELECT pg_get_userbyid(relowner), relkind = 'r' AND NOT relrowsecurity AND NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = home AND attnum > 0 AND atttypid >= 16384)
      INTO owner, plain FROM pg_class WHERE oid = home;
    IF plain THEN
      EXECUTE 'SELECT jsonb_agg(h) FROM ' || quote_ident(place) || '.{TABLE} h' INTO applied;
    END IF;
    IF applied IS NULL THEN
      SELECT string_agg(wanted, ', ' ORDER BY position) INTO lacks
      FROM unnest(ARRAY[{columns}]) WITH ORDINALITY _ (wanted, position) WHERE NOT EXISTS (
        SELECT FROM pg_attribute WHERE attrelid = home AND attname = wanted AND NOT attisdropped);
    END IF;
  END IF;
  {session.note(document)}
END"""
    return f"BEGIN ISOLATION LEVEL READ COMMITTED READ ONLY; {do_block(body)}; COMMIT"


def _holder(schema: str) -> str:
    """Return an expression for who holds the lock, or runs a statement on behalf of a runner that is gone."""
    key = lock_key(schema)
    return f"""(
    SELECT jsonb_build_object('pid', coalesce(a.pid, l.pid), 'application', a.application_name,
      'client', coalesce(a.client_hostname, host(a.client_addr)), 'since', a.xact_start, 'query', left(a.query, 300))
    FROM pg_stat_activity a FULL JOIN (
        SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted AND objsubid = 1
          AND classid = {(key >> 32) & 0xFFFFFFFF} AND objid = {key & 0xFFFFFFFF}
          AND database = (SELECT oid FROM pg_database WHERE datname = current_database())) l ON l.pid = a.pid
    WHERE l.pid IS NOT NULL
       OR a.state = 'active' AND a.pid <> pg_backend_pid() AND a.datname = current_database()
          AND starts_with(a.query, '/* ampd {key & _UNSIGNED:x} ')
    ORDER BY starts_with(a.query, '/* ampd ') DESC NULLS LAST, l.pid IS NULL LIMIT 1)"""


def label(schema: str, migration: Migration) -> str:
    """Return the comment that a migration's messages begin with, for whoever looks at pg_stat_activity."""
    name = migration.label.replace("*/", "* /").replace("/*", "/ *")
    return f"/* ampd {lock_key(schema) & _UNSIGNED:x} {name} */"


def take_turn(history: History) -> str:
    """Return PL/pgSQL that tries the lock, and touches nothing else."""
    assert history.schema is not None
    return f"""
  IF NOT pg_catalog.pg_try_advisory_xact_lock({lock_key(history.schema)}) THEN
    RAISE EXCEPTION 'another runner has its turn' USING ERRCODE = '{BUSY}';
  END IF;"""


def insist_on(history: History) -> str:
    """Return PL/pgSQL that checks, under the lock, that the history is ours to write and as it was when it was read."""
    ours = ""
    if history.table_exists:
        ours = _insist_on_owner(history)
        finished = sum(1 for row in history.applied if row.finished_at is not None)
        newest = max((row.version for row in history.applied), default=-1)
        moved = f"""(SELECT pg_catalog.count(*) OPERATOR(pg_catalog.<>) {len(history.applied)}
          OR pg_catalog.count(h.finished_at) OPERATOR(pg_catalog.<>) {finished}
          OR COALESCE(pg_catalog.max(h.version), -1) OPERATOR(pg_catalog.<>) {newest}
      FROM {history.name} h)"""
    else:
        # A query, and not to_regclass: that may answer from what this session knew before the lock was to be had.
        moved = f"""EXISTS (
      SELECT FROM pg_catalog.pg_class c JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
      WHERE n.nspname OPERATOR(pg_catalog.=) {literal(history.schema)}
        AND c.relname OPERATOR(pg_catalog.=) '{TABLE}')"""
    return f"""{ours}
  IF {moved} THEN
    RAISE EXCEPTION 'the history has moved' USING ERRCODE = '{MOVED}';
  END IF;"""


def trusted_owner_sql(owner: str, role: str | None = None) -> str:
    """Return an SQL expression for whether a history that belongs to `owner`, an expression of type oid, is trusted.

    Trusted are the role that connects or migrates, a superuser, the owner of the database, and `role`, the configured
    one; never a role for being a group of ours, nor for owning the schema: either may be a stranger's.
    """
    me = ", ".join(("CURRENT_USER", "SESSION_USER", *(f"{literal(name)}::pg_catalog.name" for name in (role,) if name)))
    return f"""EXISTS (
      SELECT FROM pg_catalog.pg_roles r WHERE r.oid OPERATOR(pg_catalog.=) {owner} AND (
        r.rolsuper OR r.rolname OPERATOR(pg_catalog.=) ANY (ARRAY[{me}]) OR r.oid OPERATOR(pg_catalog.=) (
          SELECT d.datdba FROM pg_catalog.pg_database d
          WHERE d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database())))"""


def _insist_on_owner(history: History) -> str:
    return f"""
  DECLARE
    stranger pg_catalog.name := (
      SELECT owner.rolname
      FROM pg_catalog.pg_class c
      JOIN pg_catalog.pg_namespace n ON n.oid OPERATOR(pg_catalog.=) c.relnamespace
      JOIN pg_catalog.pg_roles owner ON owner.oid OPERATOR(pg_catalog.=) c.relowner
      JOIN pg_catalog.pg_roles me ON me.rolname OPERATOR(pg_catalog.=) CURRENT_USER
      JOIN pg_catalog.pg_database d ON d.datname OPERATOR(pg_catalog.=) pg_catalog.current_database()
      WHERE c.oid OPERATOR(pg_catalog.=) {literal(history.name)}::pg_catalog.regclass AND NOT (
        owner.rolsuper
        OR owner.oid OPERATOR(pg_catalog.=) me.oid
        OR owner.oid OPERATOR(pg_catalog.=) n.nspowner
        OR owner.oid OPERATOR(pg_catalog.=) d.datdba
        OR (NOT me.rolsuper AND pg_catalog.pg_has_role(owner.oid, 'MEMBER'))));
  BEGIN
    IF stranger IS NOT NULL THEN
      RAISE EXCEPTION '%', stranger USING ERRCODE = '{STRANGER}';
    END IF;
  END;"""


def create(history: History) -> str:
    """Return PL/pgSQL that creates the history table where there was none; free of races only under the lock."""
    if history.table_exists:
        return ""
    assert history.schema is not None
    # CREATE SCHEMA wants the right to create one even where it exists: only when it does not.
    schema = "" if history.schema_exists else f"CREATE SCHEMA IF NOT EXISTS {identifier(history.schema)};"
    return f"""{schema}
  CREATE TABLE IF NOT EXISTS {history.name} (
    version bigint PRIMARY KEY,
    name pg_catalog.text NOT NULL,
    checksum pg_catalog.bytea NOT NULL,
    started_at timestamp with time zone NOT NULL,
    finished_at timestamp with time zone,
    statements_done integer NOT NULL,
    applied_by pg_catalog.text NOT NULL,
    ampd_version pg_catalog.text NOT NULL
  );
  COMMENT ON TABLE {history.name} IS 'Which migrations ampd has applied, one row each';"""


def insert(history: History, migration: Migration) -> str:
    """Return PL/pgSQL that records a migration as started."""
    return f"""
  INSERT INTO {history.name} (version, name, checksum, started_at, statements_done, applied_by, ampd_version)
  VALUES ({migration.version}, {literal(migration.name)}, pg_catalog.decode('{migration.checksum.hex()}', 'hex'),
          pg_catalog.clock_timestamp(), 0, CURRENT_USER, '{VERSION}');"""


def make_room(history: History) -> str:
    """Return PL/pgSQL that adds the one column which resuming needs, when the first no-transaction migration comes."""
    return f"""
  IF NOT {_has_room(history)} THEN
    ALTER TABLE {history.name} ADD COLUMN done_checksum pg_catalog.bytea;
    COMMENT ON COLUMN {history.name}.done_checksum IS
      'SHA-256 of the statements that a no-transaction migration has begun or done; null once it is finished';
  END IF;"""


def _has_room(history: History) -> str:
    return f"""EXISTS (SELECT FROM pg_catalog.pg_attribute
                 WHERE attrelid OPERATOR(pg_catalog.=) {literal(history.name)}::pg_catalog.regclass
                   AND attname OPERATOR(pg_catalog.=) 'done_checksum' AND NOT attisdropped)"""


class Mark(msgspec.Struct, frozen=True):
    """How far a no-transaction migration has come: statements done, and the checksum of all that were begun."""

    done: int
    checksum: bytes | None


def advance(history: History, migration: Migration, was: Mark, now: Mark) -> str:
    """Return PL/pgSQL that records how far a no-transaction migration has come, unless another runner has gone on.

    That can be: what a runner has sent may reach the server long after it was given up for dead.
    """
    return _from(history, migration, was, f"statements_done = {now.done}, done_checksum = {_hex(now.checksum)}")


def finish_stepwise(history: History, migration: Migration, was: Mark, statements: int) -> str:
    """Return PL/pgSQL that records a no-transaction migration as finished, by the file as it is now."""
    return _from(
        history,
        migration,
        was,
        f"finished_at = pg_catalog.clock_timestamp(), statements_done = {statements}, "
        f"name = {literal(migration.name)}, checksum = {_hex(migration.checksum)}, done_checksum = NULL",
    )


def _from(history: History, migration: Migration, was: Mark, change: str) -> str:
    begun = was.checksum.hex() if was.checksum else ""
    return f"""
  UPDATE {history.name} SET {change}
   WHERE version OPERATOR(pg_catalog.=) {migration.version} AND finished_at IS NULL
     AND statements_done OPERATOR(pg_catalog.=) {was.done}
     AND COALESCE(pg_catalog.encode(done_checksum, 'hex'), '') OPERATOR(pg_catalog.=) '{begun}';
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the history has moved' USING ERRCODE = '{MOVED}';
  END IF;"""


def _hex(checksum: bytes | None) -> str:
    return "NULL" if checksum is None else f"pg_catalog.decode('{checksum.hex()}', 'hex')"


def settle(history: History, version: int, migration: Migration | None, statements: int, *, applied: bool) -> str:
    """Return PL/pgSQL that ends an interrupted migration by a person's word: as applied, or as never having been."""
    this = f"WHERE version OPERATOR(pg_catalog.=) {version} AND finished_at IS NULL"
    if not applied:
        return f"\n  DELETE FROM {history.name} {this};"
    file = (
        f", name = {literal(migration.name)}, checksum = pg_catalog.decode('{migration.checksum.hex()}', 'hex'), "
        f"statements_done = {statements}"
        if migration
        else ""
    )
    return f"""
  UPDATE {history.name} SET finished_at = pg_catalog.clock_timestamp(), applied_by = CURRENT_USER,
    ampd_version = '{VERSION}'{file} {this};
  IF {_has_room(history)} THEN
    UPDATE {history.name} SET done_checksum = NULL WHERE version OPERATOR(pg_catalog.=) {version};
  END IF;"""


def finish(history: History, migration: Migration, statements: int) -> str:
    """Return a statement that records a migration as finished, in the transaction that started it and in no other."""
    return do_block(f"""BEGIN
  UPDATE {history.name} SET finished_at = pg_catalog.clock_timestamp(), statements_done = {statements}
   WHERE version OPERATOR(pg_catalog.=) {migration.version}
     AND xmin OPERATOR(pg_catalog.=) pg_catalog.pg_current_xact_id()::pg_catalog.xid;
  IF NOT FOUND THEN
    RAISE EXCEPTION 'the migration ended the transaction that it ran in, or took its row out of the history'
      USING ERRCODE = '{ESCAPED}';
  END IF;
END""")
