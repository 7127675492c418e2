"""A refusal for want of a privilege: whose, on what, and the GRANT or ALTER that mends it."""

import re
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest

import ampd
from ampd.errors import AmpdError, AuthenticationFailed, DatabaseMissing
from ampd.postgres.permissions import grant_hint
from ampd.postgres.server_error import ServerError
from tests.scenes import scripts
from tests.servers import Database

pytestmark = pytest.mark.anyio

AT_ONCE = ampd.Limits(connect_wait_secs=0)


async def refused(url: str, *texts: str, **options: Any) -> AmpdError:
    """Return the error of a run that is refused."""
    with pytest.raises(AmpdError) as caught:
        await ampd.migrate(url, migrations=scripts(*texts), limits=AT_ONCE, **options)
    return caught.value


async def test_no_right_to_create_in_the_schema(database: Database) -> None:
    """A role without CREATE on the schema is told the GRANT to run."""
    role = await database.role("low")
    await database.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    error = await refused(role.url, "CREATE TABLE a ();")
    assert isinstance(error, ampd.PermissionDenied)
    assert (error.sqlstate, error.message) == ("42501", "permission denied for schema public")
    assert f'GRANT USAGE, CREATE ON SCHEMA "public" TO "{role.name}"' in str(error.hint)


async def test_no_right_to_create_a_schema(database: Database) -> None:
    """A role that may not create the configured schema is told the GRANT to run."""
    role = await database.role("low")
    error = await refused(role.url, "CREATE TABLE a ();", schema="elsewhere")
    assert isinstance(error, ampd.PermissionDenied)
    assert error.message == f"permission denied for database {database.name}"
    assert f'GRANT CREATE ON DATABASE "{database.name}" TO "{role.name}"' in str(error.hint)


async def test_no_right_to_use_the_schema(database: Database) -> None:
    """A role without USAGE on the configured schema is told the GRANT to run, by `status` as well."""
    role = await database.role("low")
    await database.execute("CREATE SCHEMA elsewhere")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"), schema="elsewhere")
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"), schema="elsewhere")
        assert caught.value.message == "permission denied for schema elsewhere"
        assert 'GRANT USAGE, CREATE ON SCHEMA "elsewhere"' in str(caught.value.hint)


async def test_no_right_to_read_the_history(database: Database) -> None:
    """A role without SELECT on the history table is told the GRANT to run; with SELECT alone `status` works."""
    role = await database.role("low")
    await ampd.migrate(database.url, migrations=scripts("SELECT 1"))
    for run in (ampd.migrate, ampd.status):
        with pytest.raises(ampd.PermissionDenied) as caught:
            await run(role.url, migrations=scripts("SELECT 1"))
        assert caught.value.message == "permission denied for table ampd_schema_migrations"
        grant = f'GRANT SELECT ON TABLE "public".ampd_schema_migrations TO "{role.name}"'
        assert caught.value.hint == f"as its owner: {grant}; and INSERT, UPDATE, DELETE, if it is to migrate"
    await database.execute(grant)
    assert (await ampd.status(role.url, migrations=scripts("SELECT 1"))).up_to_date
    assert (await ampd.migrate(role.url, migrations=scripts("SELECT 1"))).applied == ()


@pytest.mark.parametrize(
    ("path", "said", "hint"),
    [
        (
            "amp",
            "the search path of role {role} (amp) names no schema that exists",
            'CREATE SCHEMA amp AUTHORIZATION "{role}"',
        ),
        (
            '"A mp"',
            'the search path of role {role} ("A mp") names no schema that exists',
            'CREATE SCHEMA "A mp" AUTHORIZATION "{role}"',
        ),
        (
            '"$user", amp',
            'the search path of role {role} ("$user", amp) names no schema that exists',
            'CREATE SCHEMA amp AUTHORIZATION "{role}"',
        ),
        ("pg_temp", "the search path of role {role} (pg_temp) names no schema that exists", None),
        ("''", 'the search path of role {role} ("") names no schema that exists', None),
        (
            '"$user", amp, closed',
            'role {role} may not use any schema on its search path ("$user", amp, closed)',
            'as its owner: GRANT USAGE, CREATE ON SCHEMA closed TO "{role}"',
        ),
    ],
)
async def test_a_search_path_that_leads_nowhere(database: Database, path: str, said: str, hint: str | None) -> None:
    """A schema that does not exist is told from one that the role may not use; the hint runs as it is printed."""
    role = await database.role("low")
    await database.execute(f"CREATE SCHEMA closed; ALTER ROLE {role.name} SET search_path = {path}")
    with pytest.raises(AmpdError) as caught:
        await ampd.status(role.url, migrations=())
    error = caught.value
    assert (error.code, error.message) == (
        "permission" if "may not use" in said else "config",
        said.format(role=role.name),
    )
    statement = hint.format(role=role.name) if hint else f'ALTER ROLE "{role.name}" SET search_path = public'
    assert error.hint == f"{statement}; or set metadata_db.schema"
    await database.execute(statement.removeprefix("as its owner: "))
    assert (await ampd.status(role.url, migrations=())).up_to_date


async def test_a_statement_that_the_role_may_not_run(database: Database) -> None:
    """A privilege that a statement lacks is `permission`, with file and line, and the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"CREATE TABLE theirs (id int); GRANT CREATE ON SCHEMA public TO {role.name}")
    error = await refused(role.url, "SELECT 1;\n\nALTER TABLE theirs ADD x int;")
    assert isinstance(error, ampd.PermissionDenied)
    assert (error.file, error.line, error.sqlstate) == ("1_step.sql", 3, "42501")
    assert error.hint == (
        f'as a superuser (in its schema): ALTER TABLE "theirs" OWNER TO "{role.name}"; or migrate as the owner; '
        "nothing of this migration was kept: run again after that"
    )
    error = await refused(role.url, "SELECT 1;\nSELECT * FROM theirs;")
    assert (error.code, error.line) == ("permission", 2)
    assert error.hint == (
        f'as its owner (in its schema): GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE "theirs" TO "{role.name}"; '
        "nothing of this migration was kept: run again after that"
    )


NAMES = ("theirs", "Theirs", "the irs", 'th"eirs', "the.irs")
ROUTINE_NAMES = NAMES[:4]
FUNCTION = "CREATE {} {{}}() {} LANGUAGE sql AS 'SELECT 1'; REVOKE EXECUTE ON ROUTINE {{}} FROM PUBLIC"
PRIVILEGES = [
    pytest.param("CREATE TABLE {} (id int PRIMARY KEY)", "INSERT INTO {} SELECT 1 FROM {}", NAMES, id="table"),
    pytest.param("CREATE TABLE {} ()", "TRUNCATE {}", NAMES, id="truncate"),
    pytest.param(
        "CREATE TABLE {} (id int PRIMARY KEY)", "CREATE TABLE t{number} (x int REFERENCES {})", NAMES, id="fk"
    ),
    pytest.param(
        "CREATE TABLE {} ()",
        "CREATE TRIGGER t AFTER INSERT ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
        NAMES,
        id="trigger",
    ),
    pytest.param("CREATE VIEW {} AS SELECT 1", "SELECT * FROM {}", NAMES, id="view"),
    pytest.param("CREATE MATERIALIZED VIEW {} AS SELECT 1", "CREATE TABLE t{number} AS TABLE {}", NAMES, id="matview"),
    pytest.param("CREATE SEQUENCE {}", "SELECT setval('{}', nextval('{}'))", NAMES, id="sequence"),
    pytest.param("CREATE SCHEMA {}", "CREATE TABLE {}.t ()", NAMES, id="schema"),
    pytest.param(FUNCTION.format("FUNCTION", "RETURNS int"), "SELECT {}()", ROUTINE_NAMES, id="function"),
    pytest.param(FUNCTION.format("PROCEDURE", ""), "CALL {}()", ROUTINE_NAMES, id="procedure"),
    pytest.param(
        "CREATE AGGREGATE {}(int) (SFUNC = int4pl, STYPE = int); REVOKE EXECUTE ON ROUTINE {} FROM PUBLIC",
        "SELECT {}(1)",
        ROUTINE_NAMES,
        id="aggregate",
    ),
    pytest.param("REVOKE CREATE ON DATABASE {} FROM PUBLIC", "CREATE SCHEMA s", ("DATABASE",), id="database"),
    pytest.param("REVOKE USAGE ON LANGUAGE {} FROM PUBLIC", "SELECT 1", ("plpgsql",), id="language"),
]
OWNERS = [
    pytest.param("CREATE TABLE {} ()", "ALTER TABLE {} ADD x int", NAMES, id="table"),
    pytest.param("CREATE VIEW {} AS SELECT 1", "ALTER VIEW {} RENAME TO v{number}", NAMES, id="view"),
    pytest.param("CREATE MATERIALIZED VIEW {} AS SELECT 1", "DROP MATERIALIZED VIEW {}", NAMES, id="matview"),
    pytest.param("CREATE SEQUENCE {}", "ALTER SEQUENCE {} CYCLE", NAMES, id="sequence"),
    pytest.param("CREATE SCHEMA {}", "DROP SCHEMA {}", NAMES, id="schema"),
    pytest.param(
        FUNCTION.format("FUNCTION", "RETURNS int"), "ALTER FUNCTION {}() STRICT", ROUTINE_NAMES, id="function"
    ),
    pytest.param(FUNCTION.format("PROCEDURE", ""), "DROP PROCEDURE public.{}()", ROUTINE_NAMES, id="procedure"),
    pytest.param("SELECT '{}'", "ALTER DATABASE {} SET work_mem = '5MB'", ("DATABASE",), id="database"),
]


async def _refused_until_obeyed(
    database: Database, prepare: str, action: str, names: tuple[str, ...], statement: str
) -> None:
    """Run an action on an object of each name, follow the hint, and see it succeed."""
    role = await database.role("low", "CREATE ON SCHEMA public")
    texts = []
    for number, each in enumerate(names):
        name = each.replace("DATABASE", database.name)
        quoted = '"' + name.replace('"', '""') + '"'
        await database.execute(prepare.replace("{}", quoted))
        texts.append(action.replace("{number}", str(number)).replace("{}", quoted))
        error = await refused(role.url, *texts)
        assert isinstance(error, ampd.PermissionDenied)
        hint = re.match(
            rf'as (?:its owner|a superuser)(?: \(in its schema\))?: ({statement} .* TO "{role.name}")', str(error.hint)
        )
        assert hint, error
        await database.execute(hint[1])
        await ampd.migrate(role.url, migrations=scripts(*texts))


@pytest.mark.parametrize(("prepare", "action", "names"), PRIVILEGES)
async def test_the_grant_of_the_hint_is_what_was_missing(
    database: Database, prepare: str, action: str, names: tuple[str, ...]
) -> None:
    """The GRANT of a hint runs as it is printed, whatever the name, and what was refused then succeeds."""
    await _refused_until_obeyed(database, prepare, action, names, "GRANT")


@pytest.mark.parametrize("directive", ["", "-- no-transaction\n"])
@pytest.mark.parametrize("taken", ["SET ROLE {}", "SET LOCAL ROLE '{}'", 'SET SESSION AUTHORIZATION "{}"'])
async def test_the_grant_of_the_hint_is_to_the_role_of_the_file(database: Database, taken: str, directive: str) -> None:
    """Where a file has taken on another role it is that one which lacks the privilege, and gets it."""
    low = await database.role("low")
    await database.execute("CREATE SCHEMA closed")
    begin, commit = ("BEGIN; ", "; COMMIT") if directive else ("", "")
    files = scripts(f"{directive}{begin}{taken.format(low.name)}; CREATE TABLE closed.t (){commit}")
    with pytest.raises(ampd.PermissionDenied) as raised:
        await ampd.migrate(database.url, migrations=files)
    grant = f'GRANT USAGE, CREATE ON SCHEMA "closed" TO "{low.name}"'
    assert str(raised.value.hint).startswith(f"as its owner: {grant}; ")
    await database.execute(grant)
    await ampd.migrate(database.url, migrations=files)


@pytest.mark.parametrize(("prepare", "action", "names"), OWNERS)
async def test_the_change_of_owner_of_the_hint_is_what_was_missing(
    database: Database, prepare: str, action: str, names: tuple[str, ...]
) -> None:
    """Where only the owner may do it, the ALTER of the hint runs as it is printed, and it then succeeds."""
    await _refused_until_obeyed(database, prepare, action, names, "ALTER")


@pytest.mark.parametrize(
    ("message", "hint"),
    [
        ("permission denied for schema Fast", 'as its owner: GRANT USAGE, CREATE ON SCHEMA "Fast" TO "r"'),
        (
            "permission denied for materialized view a view",
            'as its owner (in its schema): GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE "a view" TO "r"',
        ),
        *(
            (message, 'migrate as its owner, or grant "r" the membership in the role that owns it')
            for message in ("must be owner of index i", "must be owner of type t", "must be owner of large object 7")
        ),
        *(
            (message, 'grant "r" the privilege that the message names, or migrate as a role that has it')
            for message in (
                'permission denied to create extension "x"',
                "permission denied for column x of relation y",
                "permission denied for tables",
                "permission denied for tablespace Fast",
                "permission denied for type t",
                "permission denied for foreign server s",
                "keine Berechtigung für Tabelle t",
            )
        ),
    ],
)
def test_what_a_refusal_is_read_as(message: str, hint: str) -> None:
    """Only the kinds of object that have a GRANT or an owner of their own get a statement to run."""
    said = SimpleNamespace(message=message, sqlstate="42501", detail=None, hint=None, position=None, context=None)
    assert grant_hint(ServerError(said, str, "r")) == hint


@pytest.mark.parametrize(
    ("statement", "table"),
    [
        ("SELECT * FROM amp.theirs", 'amp."theirs"'),
        ("INSERT INTO Amp . Theirs SELECT", None),  # which is not how the server spells it
        ('DELETE FROM "Am""p"."theirs" USING x.theirs_too', '"Am""p"."theirs"'),
        ("SELECT t.theirs FROM theirs t", None),
        ("SELECT FROM a.theirs, b.theirs", None),
        ("SELECT FROM their.s", None),
    ],
)
def test_the_schema_of_a_table_that_was_refused(statement: str, table: str | None) -> None:
    """The table in the GRANT has the schema that the statement gives it; else the hint says that it has one."""
    words = "permission denied for table theirs"
    said = SimpleNamespace(message=words, sqlstate="42501", detail=None, hint=None, position=None, context=None)
    hint = grant_hint(ServerError(said, str, "r"), (), statement)
    where = "as its owner" if table else "as its owner (in its schema)"
    assert hint == f"""{where}: GRANT SELECT, INSERT, UPDATE, DELETE ON TABLE {table or '"theirs"'} TO "r\""""


async def test_hints_about_a_database_with_an_odd_name(database: Database) -> None:
    """The statements of the hints on connecting name the URL's database, however it is spelt, and run as printed."""
    name, odd = quote(f'{database.name}/"O d', safe=""), f'{database.name}/"O d'
    role = await database.role("low")
    url = database.server.url(name, role.name)
    with pytest.raises(DatabaseMissing) as missing:
        await ampd.status(url, migrations=())
    create = str(missing.value.hint).removeprefix("create it (").partition("), or")[0]
    assert create == 'CREATE DATABASE "' + odd.replace('"', '""') + '"'
    await database.execute(create)
    try:
        await database.execute(f"REVOKE CONNECT ON DATABASE {create.removeprefix('CREATE DATABASE ')} FROM PUBLIC")
        with pytest.raises(ampd.PermissionDenied) as denied:
            await ampd.status(url, migrations=())
        await database.execute(str(denied.value.hint))
        await ampd.status(url, migrations=())
    finally:
        await database.execute(f"DROP DATABASE {create.removeprefix('CREATE DATABASE ')} WITH (FORCE)")


@pytest.mark.parametrize(
    ("user", "problem", "verb"),
    [
        ("no body", "does not exist", "CREATE"),
        ("", "does not exist", "CREATE"),
        ("{database}_low", "is not permitted to log in", "ALTER"),
    ],
)
async def test_a_role_that_may_not_log_in(
    database: Database, monkeypatch: pytest.MonkeyPatch, user: str, problem: str, verb: str
) -> None:
    """A role that is not there, or no login, wants another statement than a new password."""
    monkeypatch.setenv("LOGNAME", "no body")
    role = await database.role("low")
    await database.execute(f"ALTER ROLE {role.name} NOLOGIN")
    name = user.format(database=database.name)
    with pytest.raises(AuthenticationFailed) as caught:
        await ampd.status(database.server.url(database.name, name).replace("//@", "//"), migrations=())
    who = name or "no body"
    assert caught.value.message.endswith(f'/{database.name}: role "{who}" {problem}')
    assert caught.value.hint == f'{verb} ROLE "{who}" LOGIN, or correct the user of the URL'


async def test_a_role_that_may_not_connect(database: Database) -> None:
    """A role without CONNECT is told the GRANT to run."""
    role = await database.role("low")
    await database.execute(f"REVOKE CONNECT ON DATABASE {database.name} FROM PUBLIC")
    error = await refused(role.url)
    assert isinstance(error, ampd.PermissionDenied)
    assert error.hint == f'GRANT CONNECT ON DATABASE "{database.name}" TO "{role.name}"'
