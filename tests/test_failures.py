"""Each failure to connect has its own class and hint, and none shows a password."""

import os
import tempfile
import traceback
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import quote

import anyio
import asyncpg
import msgspec
import pytest
import trustme

import ampd
from ampd.errors import AmpdError, AuthenticationFailed, DatabaseMissing, ReadOnlyServer, TlsFailed
from ampd.local_server.server import local_server
from tests.folders import write
from tests.scenes import GENEROUS, scripts, until
from tests.servers import Ampd, Database, Server, copy_cluster

pytestmark = pytest.mark.anyio


async def test_a_database_that_is_read_only_by_default(database: Database) -> None:
    """A read-only database is refused by name before anything runs; with nothing pending it is no obstacle."""
    one, two = scripts("CREATE TABLE a ();", "CREATE TABLE b ();")
    await ampd.migrate(database.url, migrations=(one,))
    await database.execute(f"ALTER DATABASE {database.name} SET default_transaction_read_only = on")
    assert (await ampd.migrate(database.url, migrations=(one,))).applied == ()
    assert not (await ampd.status(database.url, migrations=(one, two))).up_to_date
    with pytest.raises(ReadOnlyServer) as caught:
        await ampd.migrate(database.url, migrations=(one, two))
    assert (caught.value.code, caught.value.message.endswith("a standby, or read-only by default")) == (
        "connection",
        True,
    )
    assert str(caught.value.hint).startswith("connect to the primary")


# --- connections: each failure its own class and hint, at once, and never a password


SECRET = "s3cr3t/p@ss:w%rd"
CODED = quote(SECRET, safe="")


class Strict(msgspec.Struct, frozen=True):
    """A server that wants passwords and speaks TLS as `localhost`, and a folder with the certificates."""

    port: int
    folder: Path

    def url(self, user: str, query: str = "", *, host: str = "localhost", database: str = "amp") -> str:
        """Return a URL with the password in it; `{folder}` in the query is that of the certificates."""
        return f"postgresql://{user}:{CODED}@{host}:{self.port}/{database}?{query.format(folder=self.folder)}"


@pytest.fixture(scope="module")
async def strict(server: Server, anyio_backend: str) -> AsyncIterator[Strict]:  # noqa: ARG001
    """One such server for these tests: `alice` needs a password, `bob` TLS, and `eve` is let in by no rule."""
    rules = """
        local all all trust
        hostssl all bob all trust
        hostnossl all bob all reject
        host all eve all reject
        host all all all scram-sha-256
    """
    ours, other = trustme.CA(), trustme.CA()
    certificate = ours.issue_cert("localhost")
    with tempfile.TemporaryDirectory(prefix="ampd-tls-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        ours.cert_pem.write_to_path(str(folder / "ca.pem"))
        other.cert_pem.write_to_path(str(folder / "other.pem"))
        data_dir = copy_cluster(server.cluster, folder / "db")
        async with local_server(data_dir, bindir=Path(server.bindir), tcp=True) as local:
            data, owner = local.data_dir, local.data_dir.stat()
            certificate.cert_chain_pems[0].write_to_path(str(data / "server.crt"))
            certificate.private_key_pem.write_to_path(str(data / "server.key"))
            (data / "pg_hba.conf").write_text(rules)
            for file in ("server.crt", "server.key", "pg_hba.conf"):
                (data / file).chmod(0o600)
                os.chown(data / file, owner.st_uid, owner.st_gid)
            admin = await asyncpg.connect(local.url)
            await admin.execute("SET password_encryption = 'scram-sha-256'")
            await admin.execute(
                f"CREATE ROLE alice LOGIN PASSWORD '{SECRET}'; CREATE ROLE bob LOGIN; CREATE ROLE eve LOGIN"
            )
            await admin.execute("GRANT CREATE ON SCHEMA public TO alice; GRANT CREATE ON DATABASE amp TO alice, bob")
            await admin.execute("ALTER SYSTEM SET ssl = on")
            await admin.execute("SELECT pg_reload_conf()")
            await admin.close()
            await until(lambda: _speaks_tls(local.url))
            yield Strict(local.port, folder)


async def _speaks_tls(url: str) -> bool:
    connection = await asyncpg.connect(url)
    try:
        return bool(await connection.fetchval("SELECT current_setting('ssl')::bool"))
    finally:
        await connection.close()


CHECK = "check user and password of the URL; with psql: ALTER ROLE \"{user}\" PASSWORD '...'"
TLS = "check sslmode, sslrootcert, sslcert and sslkey of the URL against what the server offers"
ASK = "ask the server's administrator for a pg_hba.conf entry for this role, database and address"


@pytest.mark.parametrize(
    ("user", "query", "host", "database", "kind", "said", "hint"),
    [
        pytest.param(
            "alice:wrong",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            'password authentication failed for user "alice"',
            CHECK.format(user="alice"),
            id="wrong password",
        ),
        pytest.param(
            "mallory",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            'password authentication failed for user "mallory"',
            CHECK.format(user="mallory"),
            id="unknown role",
        ),
        pytest.param(
            "eve",
            "",
            "localhost",
            "amp",
            AuthenticationFailed,
            "pg_hba.conf rejects connection for host",
            None,
            id="rejected by a rule",
        ),
        pytest.param(
            "bob",
            "sslmode=disable",
            "localhost",
            "amp",
            AuthenticationFailed,
            "pg_hba.conf rejects connection",  # "no encryption" since PostgreSQL 14, "SSL off" before
            f"add sslmode=require to the URL if the server insists on TLS; or {ASK}",
            id="rejected without TLS",
        ),
        pytest.param(
            "alice",
            "",
            "localhost",
            "nosuch",
            DatabaseMissing,
            'database "nosuch" does not exist',
            'create it (CREATE DATABASE "nosuch"), or correct the name in the URL',
            id="no such database",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-full&sslrootcert={folder}/ca.pem",
            "127.0.0.1",
            "amp",
            TlsFailed,
            "certificate is not valid for '127.0.0.1'",
            TLS,
            id="verify-full by another name",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-ca&sslrootcert={folder}/other.pem",
            "localhost",
            "amp",
            TlsFailed,
            "certificate verify failed",
            TLS,
            id="verify-ca with another authority",
        ),
        pytest.param(
            "alice",
            "sslmode=verify-full&sslrootcert={folder}/nosuch.pem",
            "localhost",
            "amp",
            AmpdError,
            "nosuch.pem",
            None,
            id="no such authority file",
        ),
        pytest.param(
            "alice",
            "require_auth=none",
            "localhost",
            "amp",
            ampd.ConfigError,
            "require_auth=none, which ampd cannot honour",
            "remove require_auth from the URL if you can do without it",
            id="a security parameter that cannot be honoured",
        ),
    ],
)
async def test_each_failure_to_connect_has_its_own_class_and_hint(
    strict: Strict,
    user: str,
    query: str,
    host: str,
    database: str,
    kind: type[AmpdError],
    said: str,
    hint: str | None,
) -> None:
    """What cannot pass by itself is told at once, with what to do, and without the password in any form."""
    url = strict.url(user, query, host=host, database=database)
    with pytest.raises(kind) as caught, anyio.fail_after(GENEROUS):
        await ampd.status(url, migrations=())  # patient for 30 s, if that were of any use
    error = caught.value
    assert kind is AmpdError or type(error) is kind
    assert said in error.message
    assert hint is None or error.hint == hint
    everything = "".join(traceback.format_exception(error)) + repr(error) + str(vars(error))
    for secret in (SECRET, CODED, quote(SECRET)):
        assert secret not in everything


def without_password(url: str) -> str:
    """Return a URL of a user's without the password."""
    return url.replace(f":{CODED}@", "@").replace("localhost", "127.0.0.1")


@pytest.mark.any_server
@pytest.mark.parametrize("auto_migrate", [True, False])
async def test_a_password_that_a_function_gives(strict: Strict, auto_migrate: bool) -> None:
    """The `password=` of `open_pool` lets in the migration as well as the pool, asked for each connection."""
    url, asked = without_password(strict.url("alice", "sslmode=disable")), list[str]()

    async def current() -> str:
        asked.append("now")
        return SECRET

    def at_once() -> str:
        return SECRET

    metadata_db = ampd.MetadataDb(url=ampd.DatabaseUrl(url), auto_migrate=auto_migrate, schema="alices")
    async with asyncpg.create_pool(url, password=at_once, min_size=0) as pool:
        await ampd.migrate(pool, migrations=scripts("SELECT 1"), schema="alices")
    with pytest.raises(AuthenticationFailed):
        await ampd.migrate(url, migrations=scripts("SELECT 1"), schema="alices")
    files = scripts("SELECT 1", "SELECT 2")[: 1 + auto_migrate]
    for given in (current, at_once, SECRET):
        async with ampd.open_pool(metadata_db, migrations=files, password=given, min_size=2) as opened:
            assert await opened.fetchval("SELECT current_user") == "alice"
    assert len(asked) == 3
    await ampd.migrate(strict.url("alice", "sslmode=disable"), migrations=(*files,), schema="alices")


async def test_a_function_that_gives_no_password(strict: Strict) -> None:
    """What it raises is raised as it is; a password that it gives shows nowhere; a migration's own URL asks nobody."""
    url = ampd.DatabaseUrl(without_password(strict.url("alice", "sslmode=disable")))

    async def broken() -> str:
        raise LookupError("no credentials")

    metadata_db = ampd.MetadataDb(url=url, auto_migrate=True)
    with pytest.raises(LookupError, match="no credentials"):
        async with ampd.open_pool(metadata_db, migrations=(), password=broken):
            pass
    with pytest.raises(AuthenticationFailed) as wrong:
        async with ampd.open_pool(metadata_db, migrations=(), password=lambda: f"not {SECRET}"):
            pass
    assert SECRET not in str(wrong.value)
    own = ampd.Migrations(url=ampd.DatabaseUrl(strict.url("alice", "sslmode=disable", host="127.0.0.1")))
    with pytest.raises(LookupError, match="no credentials"):  # of the pool, after the migration
        async with ampd.open_pool(
            ampd.MetadataDb(url=url, auto_migrate=True, migrations=own, schema="own"),
            migrations=scripts("SELECT 1"),
            password=broken,
        ):
            pass
    assert (await ampd.status(own.url or "", migrations=scripts("SELECT 1"), schema="own")).up_to_date


GIVE = (
    "no password was given: write it into the URL (user:password@host), set PGPASSWORD, or use a password file "
    "(PGPASSFILE, by default ~/.pgpass)"
)


async def test_no_password_at_all(strict: Strict, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server says the same as of a wrong one; the hint says how to give one, and not to change the role's."""
    url = without_password(strict.url("alice", "sslmode=disable"))
    own = ampd.Migrations(url=ampd.DatabaseUrl(strict.url("alice", "sslmode=disable")))
    pool = ampd.open_pool(ampd.MetadataDb(url=ampd.DatabaseUrl(url), migrations=own), migrations=())
    failures = list[AuthenticationFailed]()
    with pytest.raises(AuthenticationFailed) as caught:
        await ampd.status(url, migrations=())
    failures.append(caught.value)
    with pytest.raises(AuthenticationFailed) as caught:
        async with pool:
            pass
    failures.append(caught.value)
    said = f'127.0.0.1:{strict.port}/amp: password authentication failed for user "alice"'
    assert [(failure.message, failure.hint) for failure in failures] == [(said, GIVE)] * 2
    monkeypatch.setenv("PGPASSWORD", "wrong")
    with pytest.raises(AuthenticationFailed) as caught:
        await ampd.status(url, migrations=())
    assert caught.value.hint == CHECK.format(user="alice")


async def test_a_pool_whose_password_is_wrong(strict: Strict) -> None:
    """Of a pool the user is known by the server's own words."""
    pool = asyncpg.create_pool(strict.url("alice").replace(CODED, "wrong"), min_size=0)
    async with pool:
        with pytest.raises(AuthenticationFailed) as caught:
            await ampd.status(pool, migrations=())
    assert caught.value.message == 'the pool\'s server: password authentication failed for user "alice"'
    hint = """check user and password of the URL; with psql: ALTER ROLE "alice" PASSWORD '...'"""
    assert caught.value.hint == hint


@pytest.mark.any_server
@pytest.mark.parametrize(
    ("user", "query", "tls"),
    [
        ("alice", "sslmode=verify-full&sslrootcert={folder}/ca.pem", True),
        ("alice", "sslmode=verify-ca&sslrootcert={folder}/ca.pem", True),
        ("alice", "sslmode=require", True),
        ("alice", "sslmode=prefer", True),
        ("alice", "sslmode=disable", False),
        ("bob", "", True),
    ],
)
async def test_tls_modes_that_can_be_honoured_are(strict: Strict, user: str, query: str, tls: bool) -> None:
    """Each mode connects in the way that it names: the script itself finds out whether the connection is encrypted."""
    script = f"DO $$ BEGIN ASSERT (SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()) IS {tls}; END $$"
    report = await ampd.migrate(strict.url(user, query), migrations=scripts(script), schema=f"s_{uuid.uuid4().hex}")
    assert report.current_version == 1


async def test_a_server_without_tls(database: Database) -> None:
    """A URL that insists on TLS is refused by name where the server has none."""
    with pytest.raises(TlsFailed, match="rejected SSL upgrade") as caught:
        await ampd.status(f"{database.url}?sslmode=require", migrations=())
    assert caught.value.hint == TLS


@pytest.mark.any_server
@pytest.mark.parametrize(
    "form",
    [
        f"postgresql://alice:{CODED}@localhost:{{port}}/amp?sslmode={{mode}}",
        f"postgresql://localhost:{{port}}/amp?user=alice&password={CODED}&sslmode={{mode}}",
        f"postgresql://alice@localhost:{{port}}/amp?sslmode={{mode}}&password={CODED}&sslpassword={CODED}",
        f"postgres://alice:{CODED}@localhost:{{port}},localhost:{{port}}/amp?sslmode={{mode}}",
    ],
)
@pytest.mark.parametrize(("mode", "code"), [("require", 0), ("bogus", 1), ("verify-full", 1)])
async def test_no_stream_shows_a_password(strict: Strict, ampd: Ampd, form: str, mode: str, code: int) -> None:
    """Whichever form the URL has, as a variable or in a file, neither stream ever shows its password."""
    url = form.format(port=strict.port, mode=mode)
    write(ampd.folder / "m", {"1_a.sql": f"SELECT 1;\nDO $$ BEGIN RAISE NOTICE '%', '{SECRET}'; END $$;"})
    (ampd.folder / "c.toml").write_text(f'[metadata_db]\nurl = "{url}"\npool_size = 1\n')
    here = {"AMP_CONFIG_METADATA_DB__SCHEMA": "public"}  # other tests have left their histories in other schemas
    runs = [
        ampd("status", "--migrations", "m", url=url, env=here),
        ampd("status", "--json", "--migrations", "m", "--config", "c.toml", env=here),
        ampd("migrate", "--json", "--migrations", "m", url=url, env=here),
    ]
    assert [process.returncode for process in runs] == [code] * 3
    for process in runs:
        for secret in (SECRET, CODED, quote(SECRET)):
            assert secret not in process.stdout + process.stderr


async def test_what_the_server_says_of_a_password_is_not_repeated(database: Database) -> None:
    """An error of the server that happens to hold the URL's password is shown without it."""
    role = await database.role("alice", password=SECRET)
    joined = f"'{SECRET[:5]}' || '{SECRET[5:]}'"
    text = f"DO $$ DECLARE a text := {joined}; BEGIN RAISE '%', a USING DETAIL = a, HINT = a; END $$"
    await database.execute(f"GRANT CREATE ON SCHEMA public TO {role.name}")
    with pytest.raises(ampd.MigrationFailed) as caught:
        await ampd.migrate(role.url, migrations=scripts(text))
    assert caught.value.message == "1_step.sql:1: *** (SQLSTATE P0001)"
    assert (caught.value.detail, str(caught.value.hint).split(";")[0]) == ("***", "***")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.any_server
async def test_a_password_that_asyncpg_would_repeat(strict: Strict, ampd: Ampd) -> None:
    """A URL whose password was not encoded, and so reads as host or port, is not repeated either."""
    for url in (
        f"postgresql://alice:hush#hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush/hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush?hush@localhost:{strict.port}/amp",
        f"postgresql://alice:hush:hush@localhost:{strict.port}/amp",
    ):
        process = ampd("status", url=url, env={"AMP_CONFIG_METADATA_DB__MIGRATIONS__CONNECT_WAIT_SECS": "0"})
        assert (process.returncode, process.stdout) == (1, "")
        assert "hush" not in process.stderr
        assert "Traceback" not in process.stderr
